"""Chapter 6: LayerNorm and RMSNorm, the residual connection, and the feed-forward layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from attn_lessons import feedforward, normalization
from attn_lessons.grading.catalogue._parts import (
    left_factor,
    named,
    quiet,
    right_factor,
    scattered,
)
from attn_lessons.grading.exercise import Case, Exercise, Intermediate, Mistake
from attn_lessons.grading.probe import Probe
from attn_lessons.grading.relations import carried

CHAPTER = "ch06_residual_layernorm"
SHAPES = f"{CHAPTER}.html#ch06-shapes"
LAYERNORM = f"{CHAPTER}.html#ch06-layernorm"
LAYERNORM_BACKWARD = f"{CHAPTER}.html#ch06-layernorm-backward"
EPS = f"{CHAPTER}.html#ch06-eps"
RMSNORM = f"{CHAPTER}.html#ch06-rmsnorm"
RESIDUAL = f"{CHAPTER}.html#ch06-residual"
GELU = f"{CHAPTER}.html#ch06-gelu"
FFN = f"{CHAPTER}.html#ch06-ffn"
WRONG = f"{CHAPTER}.html#ch06-wrong"

Array = np.ndarray
Rng = np.random.Generator
Axis = int | tuple[int, ...] | None

DEFAULT = 1e-5


# --- inputs: norms ----------------------------------------------------------------------------


def _parameter(rng: Rng, width: int) -> Array:
    """Entries that are neither 0 nor 1, of both signs."""
    return rng.uniform(0.5, 2.0, width) * rng.choice([-1.0, 1.0], width)


def _rows(rng: Rng, *shape: int) -> Array:
    """Tokens whose mean and spread differ from one another and from 0 and 1."""
    spread, offset = rng.uniform(0.5, 3, shape[:-1]), rng.normal(size=shape[:-1])
    return spread[..., None] * rng.normal(size=shape) + offset[..., None]


# name, shape, what is done to x, keyword arguments, hint
Norm = tuple[str, tuple[int, ...], Callable[[Rng, Array], Array], dict[str, float], str]


def _as_drawn(rng: Rng, x: Array) -> Array:
    return x


def _one_constant_token(rng: Rng, x: Array) -> Array:
    x[rng.integers(len(x)), rng.integers(x.shape[1])] = rng.normal() + 3
    return x


def _near_40000(rng: Rng, x: Array) -> Array:
    return (40000 + rng.permuted(np.broadcast_to(np.arange(x.shape[-1]), x.shape), axis=-1)).astype(
        np.float32
    )


NORMS: tuple[Norm, ...] = (
    (
        "one token",
        (1, 1, 7),
        _as_drawn,
        {},
        "One row: mean and variance run over its 7 entries.",
    ),
    (
        "a sequence",
        (1, 4, 5),
        _as_drawn,
        {},
        "Each of the 4 tokens has its own mean and variance.",
    ),
    (
        "a batch",
        (2, 3, 6),
        _as_drawn,
        {},
        "Statistics over C alone: not over B, not over N.",
    ),
    (
        "all sizes alike",
        (4, 4, 4),
        _as_drawn,
        {},
        "Shapes fit along any axis; only one is right.",
    ),
    ("wide", (2, 3, 33), _as_drawn, {}, "33 entries a token."),
    (
        "small variance",
        (2, 3, 8),
        lambda rng, x: 1e-3 * x,
        {},
        "Entries of about 1e-3, variance about 1e-6: less than eps, whose place now matters.",
    ),
    (
        "eps=0.1",
        (3, 2, 5),
        _as_drawn,
        {"eps": 0.1},
        "eps is an argument, and large enough here to be seen.",
    ),
    (
        "a constant token",
        (2, 4, 6),
        _one_constant_token,
        {},
        "One token has the same number in every entry: its variance is 0, and only eps is left.",
    ),
    (
        "one channel",
        (3, 4, 1),
        _as_drawn,
        {},
        "One entry a token: n is 1, and n - 1 is 0.",
    ),
    (
        "an offset of 10000",
        (2, 3, 7),
        lambda rng, x: x + 1e4,
        {},
        "Variance about 1 beside a squared mean of 1e8: centre first, square then.",
    ),
    (
        "not contiguous in memory",
        (3, 4, 5),
        lambda rng, x: scattered(x),
        {},
        "Another order.",
    ),
    (
        "float32 input",
        (2, 3, 6),
        lambda rng, x: x.astype(np.float32),
        {},
        "Single precision in; single or double precision out.",
    ),
)


def _forward_cases(rng: Rng) -> list[Case]:
    cases = []
    near: Norm = (
        "float32 near 40000",
        (2, 3, 4),
        _near_40000,
        {},
        "Rows of 40000, …, 40003, shuffled.",
    )
    for name, shape, change, kwargs, hint in (*NORMS, near):
        x = change(rng, _rows(rng, *shape))
        gamma, beta = _parameter(rng, shape[-1]), _parameter(rng, shape[-1])
        args = tuple(a.astype(x.dtype) for a in (gamma, beta))
        cases.append(Case(name, (x, *args), kwargs, hint))
    return cases


def _backward_cases(rng: Rng) -> list[Case]:
    cases = []
    for name, shape, change, kwargs, hint in NORMS:
        x = change(rng, _rows(rng, *shape))
        dy = rng.normal(size=shape).astype(x.dtype)
        dy = scattered(dy) if not x.flags.c_contiguous else dy
        gamma = _parameter(rng, shape[-1]).astype(x.dtype)
        cases.append(Case(name, (dy, x, gamma), kwargs, hint))
    one_entry = np.zeros((2, 3, 5))
    one_entry[rng.integers(2), rng.integers(3), rng.integers(5)] = rng.normal() + 3
    cases.append(
        Case(
            "upstream in one entry",
            (one_entry, _rows(rng, 2, 3, 5), _parameter(rng, 5)),
            hint="One entry of y matters to the loss, yet its whole row of x moves.",
        )
    )
    return cases


# --- oracles: norms ----------------------------------------------------------------------------


def _pairwise_layernorm(x: Array, gamma: Array, beta: Array, eps: float = DEFAULT) -> Array:
    """Mean and variance from the differences of all pairs: of a shift, nothing is left in them."""
    x = np.asarray(x, float)
    gaps = x[..., :, None] - x[..., None, :]
    variance = (gaps**2).mean(axis=(-1, -2))[..., None] / 2
    return gamma * gaps.mean(axis=-1) / np.sqrt(variance + eps) + beta


STEP = 1e-30


def _by_complex_step(loss: Callable[[Array], Any], at: Array) -> Array:
    """The gradient of a number, one entry at a time; nothing is subtracted."""
    grad = np.zeros(at.shape)
    moved = at.astype(complex)
    for place in np.ndindex(at.shape):
        moved[place] += 1j * STEP
        grad[place] = np.imag(loss(moved)) / STEP
        moved[place] = at[place]
    return grad


def _by_columns(weighted: Callable[[Array], Array], x: Array) -> Array:
    """The gradient of ``sum over tokens of weighted(x)``, a channel of every token at a time.

    Tokens do not see each other, so one call moves the same channel in all of them.
    """
    dx = np.empty(x.shape)
    for channel in range(x.shape[-1]):
        moved = x.astype(complex)
        moved[..., channel] += 1j * STEP
        dx[..., channel] = weighted(moved).imag / STEP
    return dx


def _layernorm_by_complex_step(
    dy: Array, x: Array, gamma: Array, eps: float = DEFAULT
) -> tuple[Array, Array, Array]:
    """Every gradient from the definition by the complex step."""
    dy, gamma = np.asarray(dy, float), np.asarray(gamma, float)
    # A shift of a token changes nothing that is returned.
    x = np.asarray(x, float) - np.asarray(x, float)[..., :1]

    def normalised(x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)

    xhat = normalised(x)
    return (
        _by_columns(lambda x: (dy * gamma * normalised(x)).sum(axis=-1), x),
        _by_complex_step(lambda gamma: (dy * gamma * xhat).sum(), gamma),
        _by_complex_step(lambda beta: (dy * (gamma * xhat + beta)).sum(), np.zeros(len(gamma))),
    )


def _rmsnorm_by_complex_step(
    dy: Array, x: Array, gamma: Array, eps: float = DEFAULT
) -> tuple[Array, Array]:
    """Both gradients from the definition by the complex step."""
    dy, x, gamma = (np.asarray(a, float) for a in (dy, x, gamma))

    def normalised(x: Array) -> Array:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)

    xhat = normalised(x)
    return (
        _by_columns(lambda x: (dy * gamma * normalised(x)).sum(axis=-1), x),
        _by_complex_step(lambda gamma: (dy * gamma * xhat).sum(), gamma),
    )


# --- mistakes: norms ---------------------------------------------------------------------------


def _statistics(
    x: Array,
    eps: float,
    axis: Axis = -1,
    ddof: int = 0,
    root: str = "inside",
    centred: bool = True,
) -> tuple[Array, Array]:
    """x̂ and what the centred x is multiplied by, as right or as wrong as the arguments say."""
    middle = x - x.mean(axis=axis, keepdims=True) if centred else x
    n = np.prod([x.shape[a] for a in np.atleast_1d(axis)]) if axis is not None else x.size
    variance = (middle**2).sum(axis=axis, keepdims=True) / np.float64(n - ddof)
    r = {
        "inside": lambda: 1 / np.sqrt(variance + eps),
        "outside": lambda: 1 / (np.sqrt(variance) + eps),
        "none": lambda: 1 / np.sqrt(variance),
        "variance": lambda: 1 / (variance + eps),
    }[root]()
    return middle * r, r


def _forward_with(**changed: Any) -> Callable[..., Any]:
    def answer(x, gamma, beta, eps=DEFAULT):
        return gamma * _statistics(x, eps, **changed)[0] + beta

    return answer


def _forward_default_eps(x, gamma, beta, eps=DEFAULT):
    return gamma * _statistics(x, DEFAULT)[0] + beta


def _forward_one_pass(x, gamma, beta, eps=DEFAULT):
    mean = x.mean(axis=-1, keepdims=True)
    variance = (x**2).mean(axis=-1, keepdims=True) - mean**2
    return gamma * (x - mean) / np.sqrt(variance + eps) + beta


def _forward_one_pass_normalised_first(x, gamma, beta, eps=DEFAULT):
    mean = x.mean(axis=-1, keepdims=True)
    variance = (x * x).mean(axis=-1, keepdims=True) - mean * mean
    return gamma * ((x - mean) / np.sqrt(variance + eps)) + beta


def _forward_no_gamma(x, gamma, beta, eps=DEFAULT):
    return _statistics(x, eps)[0] + beta


def _forward_no_beta(x, gamma, beta, eps=DEFAULT):
    return gamma * _statistics(x, eps)[0]


def _forward_neither(x, gamma, beta, eps=DEFAULT):
    return _statistics(x, eps)[0]


def _forward_gamma_last(x, gamma, beta, eps=DEFAULT):
    return gamma * (_statistics(x, eps)[0] + beta)


def _forward_swapped(x, gamma, beta, eps=DEFAULT):
    return beta * _statistics(x, eps)[0] + gamma


def _forward_only_centred(x, gamma, beta, eps=DEFAULT):
    return gamma * (x - x.mean(axis=-1, keepdims=True)) + beta


def _forward_mean_kept(x, gamma, beta, eps=DEFAULT):
    return gamma * x * _statistics(x, eps)[1] + beta


def _forward_no_keepdims(x, gamma, beta, eps=DEFAULT):
    return gamma * (x - x.mean(axis=-1)) / np.sqrt(x.var(axis=-1) + eps) + beta


def _forward_product_of_roots(x, gamma, beta, eps=DEFAULT):
    middle = x - x.mean(axis=-1, keepdims=True)
    return gamma * middle / (x.std(axis=-1, keepdims=True) + np.sqrt(eps)) + beta


BESSEL = (
    "LayerNorm divides the sum of squares by n, not by n - 1; torch.std and np.std(ddof=1) divide "
    "by n - 1, which is 13 % off at width 4 and 0.1 % at 512."
)
OUTSIDE = (
    "eps is added to the variance, under the root; added to the standard deviation it does "
    "something else wherever the variance is as small as eps."
)
BOTH = (
    "The variance is the biased one (1/n) and eps stands under the root: x.std() + eps, as in the "
    "Annotated Transformer, gets both wrong."
)
ALL_AXES: tuple[Axis, ...] = (0, 1, (0, 1), (1, 2), None)

LAYERNORM_FORWARD = Exercise(
    id="layernorm_forward",
    chapter=CHAPTER,
    title="LayerNorm",
    points=2,
    returns=("out",),
    reference=normalization.layernorm_forward,
    oracle=quiet(_pairwise_layernorm),
    cases=_forward_cases,
    tokens=("out",),
    mistakes=(
        *named("Bessel's correction", BESSEL, LAYERNORM, _forward_with(ddof=1)),
        *named(
            "eps outside the root",
            OUTSIDE,
            EPS,
            _forward_with(root="outside"),
            _forward_product_of_roots,
        ),
        *named(
            "Bessel's correction and eps outside the root",
            BOTH,
            EPS,
            _forward_with(ddof=1, root="outside"),
        ),
        *named(
            "wrong axis",
            "Mean and variance of each token run over its own C entries, the last axis: neither "
            "over the tokens, nor over the batch, nor over everything.",
            LAYERNORM,
            *(_forward_with(axis=axis) for axis in ALL_AXES),
        ),
        *named(
            "eps forgotten",
            "Without eps a token whose entries are all alike is 0/0, which is NaN.",
            EPS,
            _forward_with(root="none"),
        ),
        *named(
            "eps argument ignored",
            "eps is 1e-5 only by default; where the caller passes another, that one counts.",
            EPS,
            _forward_default_eps,
        ),
        *named(
            "mean of squares minus square of the mean",
            "With a large mean and a small spread this subtracts two numbers that agree in nearly "
            "every digit, and can come out negative: centre first, then square.",
            WRONG,
            _forward_one_pass,
            _forward_one_pass_normalised_first,
        ),
        *named(
            "divided by the variance",
            "A token is divided by its standard deviation, the root of the variance.",
            LAYERNORM,
            _forward_with(root="variance"),
        ),
        *named(
            "not divided by the standard deviation",
            "Centring is half of it: the token is also divided by the root of variance plus eps.",
            LAYERNORM,
            _forward_only_centred,
        ),
        *named(
            "mean not subtracted",
            "x is centred before it is divided; without that it is RMSNorm, or neither.",
            LAYERNORM,
            _forward_with(centred=False),
            _forward_mean_kept,
        ),
        *named(
            "gamma forgotten",
            "Each channel of the normalised token is multiplied by its own gamma.",
            LAYERNORM,
            _forward_no_gamma,
        ),
        *named(
            "beta forgotten",
            "Each channel gets its own beta added, last.",
            LAYERNORM,
            _forward_no_beta,
        ),
        *named(
            "gamma and beta forgotten",
            "After normalising come a scale and a shift, one of each a channel.",
            LAYERNORM,
            _forward_neither,
        ),
        *named(
            "gamma multiplied into beta",
            "gamma scales the normalised x alone; beta is added after it.",
            LAYERNORM,
            _forward_gamma_last,
        ),
        *named(
            "gamma and beta swapped",
            "gamma is the factor and beta the summand.",
            LAYERNORM,
            _forward_swapped,
        ),
        *named(
            "keepdims forgotten",
            "Without keepdims=True the means have shape (B, N) and do not line up with the tokens "
            "of a (B, N, C) array.",
            SHAPES,
            _forward_no_keepdims,
        ),
    ),
)


def _mean(x: Array) -> Array:
    return x.mean(axis=-1, keepdims=True)


def _sum(x: Array) -> Array:
    return x.sum(axis=-1, keepdims=True)


def _total(x: Array) -> Array:
    return x.sum(axis=(0, 1))


def _dx(
    dxhat: Array,
    xhat: Array,
    r: Any,
    first: Callable[[Array], Any] = _mean,
    second: Callable[[Array], Any] = _mean,
) -> Array:
    return r * (dxhat - first(dxhat) - xhat * second(dxhat * xhat))


def _nothing(x: Array) -> float:
    return 0.0


def _norm_backward(
    dx: Callable[..., Array],
    dgamma: Callable[..., Array] = lambda dy, x, xhat: _total(dy * xhat),
    dbeta: Callable[..., Array] | None = lambda dy, x, xhat: _total(dy),
    **changed: Any,
) -> Callable[..., Any]:
    """An answer from its parts: ``dx(dy, x, gamma, xhat, r)``, and the parameters' gradients."""

    def answer(dy, x, gamma, eps=DEFAULT):
        xhat, r = _statistics(x, eps, **changed)
        found = dx(dy, x, gamma, xhat, r), dgamma(dy, x, xhat)
        return (*found, dbeta(dy, x, xhat)) if dbeta else found

    return answer


def _right_dx(dy, x, gamma, xhat, r):
    return _dx(gamma * dy, xhat, r)


def _ln_axis(axis: Axis) -> Callable[..., Any]:
    def mean(x: Array) -> Array:
        return x.mean(axis=axis, keepdims=True)

    return _norm_backward(
        lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, mean, mean), axis=axis
    )


def _ln_axis_of_means(axis: Axis) -> Callable[..., Any]:
    def mean(x: Array) -> Array:
        return x.mean(axis=axis, keepdims=True)

    return _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, mean, mean))


def _ln_default_eps(dy, x, gamma, eps=DEFAULT):
    return _norm_backward(_right_dx)(dy, x, gamma, DEFAULT)


def _ln_std_plus_eps(dy, x, gamma, eps=DEFAULT, ddof=0):
    """The true gradient of the forward pass that adds eps to the standard deviation."""
    middle = x - _mean(x)
    n = np.float64(x.shape[-1] - ddof)
    std = np.sqrt(_sum(middle**2) / n)
    r = 1 / (std + eps)
    g = gamma * dy
    dx = r * (g - _mean(g) - middle * r * _sum(g * middle) / (n * std))
    return dx, _total(dy * middle * r), _total(dy)


def _ln_true_bessel(dy, x, gamma, eps=DEFAULT):
    """The true gradient of the forward pass with the unbiased variance."""
    xhat, r = _statistics(x, eps, ddof=1)
    g = gamma * dy
    dx = r * (g - _mean(g) - xhat * _sum(g * xhat) / np.float64(x.shape[-1] - 1))
    return dx, _total(dy * xhat), _total(dy)


def _ln_swapped(dy, x, gamma, eps=DEFAULT):
    dx, dgamma, dbeta = _norm_backward(_right_dx)(dy, x, gamma, eps)
    return dx, dbeta, dgamma


def _over_batch(x: Array) -> Array:
    return x.sum(axis=0)


def _over_last(x: Array) -> Array:
    return x.sum(axis=-1)


def _averaged(x: Array) -> Array:
    return x.mean(axis=(0, 1))


def _over_batch_averaged(x: Array) -> Array:
    return x.sum(axis=(0, 1)) / len(x)


def _reduced(reduce: Callable[[Array], Array]) -> tuple[Callable[..., Any], ...]:
    """Both parameters' gradients reduced in this way, or only one of them."""
    dgamma, dbeta = (
        (lambda dy, x, xhat: reduce(dy * xhat)),
        (lambda dy, x, xhat: reduce(dy)),
    )
    return (
        _norm_backward(_right_dx, dgamma, dbeta),
        _norm_backward(_right_dx, dgamma),
        _norm_backward(_right_dx, dbeta=dbeta),
    )


LAYERNORM_BACKWARD_EXERCISE = Exercise(
    id="layernorm_backward",
    chapter=CHAPTER,
    title="LayerNorm's backward pass",
    points=4,
    returns=("dx", "dgamma", "dbeta"),
    reference=normalization.layernorm_backward,
    oracle=quiet(_layernorm_by_complex_step),
    cases=_backward_cases,
    tokens=("dx",),
    intermediates=(
        Intermediate(
            "xhat",
            lambda dy, x, gamma, eps: normalization.layernorm_statistics(x, 1, eps)[0],
            {"dgamma": lambda dgamma, dy, x, gamma, eps: _xhat_of_one_token(dgamma, dy)},
        ),
    ),
    mistakes=(
        *named(
            "mean term missing",
            "Moving one entry moves the row's mean, which every entry has subtracted: the mean of "
            "gamma * dy is taken off.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, first=_nothing)),
        ),
        *named(
            "variance term missing",
            "Moving one entry moves the row's variance, by which every entry is divided: x̂ times "
            "the mean of x̂ * gamma * dy is taken off too.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, second=_nothing)),
        ),
        *named(
            "mean and variance taken as constants",
            "dy * gamma / sigma is right only if mean and variance did not depend on x; each "
            "brings a term of its own.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: r * gamma * dy),
        ),
        *named(
            "gamma forgotten",
            "The gradient reaches x̂ through gamma: dx̂ = gamma * dy, before anything else.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(dy, xhat, r)),
        ),
        *named(
            "gamma applied last",
            "gamma * dy comes first and is averaged over the row; gamma differs from channel to "
            "channel, so it cannot be multiplied on afterwards.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: gamma * _dx(dy, xhat, r)),
        ),
        *named(
            "gamma missing in the means",
            "Both means are of gamma * dy, not of dy.",
            LAYERNORM_BACKWARD,
            _norm_backward(
                lambda dy, x, gamma, xhat, r: r * (gamma * dy - _mean(dy) - xhat * _mean(dy * xhat))
            ),
            _norm_backward(
                lambda dy, x, gamma, xhat, r: (
                    r * (gamma * dy - _mean(gamma * dy) - xhat * _mean(dy * xhat))
                )
            ),
            _norm_backward(
                lambda dy, x, gamma, xhat, r: (
                    r * (gamma * dy - _mean(dy) - xhat * _mean(gamma * dy * xhat))
                )
            ),
        ),
        *named(
            "dgamma summed over batch only",
            "gamma and beta are shared by all tokens of all sequences: their gradients are summed "
            "over B and over N, and have shape (C,).",
            SHAPES,
            *_reduced(_over_batch),
        ),
        *named(
            "parameters' gradients averaged",
            "Every token adds its share to dgamma and dbeta; a mean belongs to the loss, which has "
            "already divided.",
            SHAPES,
            *_reduced(_averaged),
            *_reduced(_over_batch_averaged),
        ),
        *named(
            "parameters' gradients summed over the channels",
            "gamma has an entry a channel: the sum runs over the tokens and leaves C entries.",
            SHAPES,
            *_reduced(_over_last),
        ),
        *named(
            "dgamma from x",
            "gamma multiplies x̂, not x: dgamma is the sum of dy * x̂.",
            LAYERNORM_BACKWARD,
            _norm_backward(_right_dx, lambda dy, x, xhat: _total(dy * x)),
            _norm_backward(_right_dx, lambda dy, x, xhat: _total(dy * (x - _mean(x)))),
        ),
        *named(
            "dgamma and dbeta swapped",
            "dgamma = sum(dy * x̂) is returned before dbeta = sum(dy).",
            LAYERNORM_BACKWARD,
            _ln_swapped,
        ),
        *named(
            "sum instead of mean",
            "Mean and variance carry 1/C, so the two terms are means over the row, not sums.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, _sum, _sum)),
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, _sum)),
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, second=_sum)),
        ),
        *named(
            "not divided by the standard deviation",
            "The whole bracket is multiplied by r = 1 / sqrt(var + eps): what x̂ was scaled by, "
            "its gradient is too.",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, 1.0)),
        ),
        *named(
            "divided by the variance",
            "The bracket is multiplied by r once, not by r².",
            LAYERNORM_BACKWARD,
            _norm_backward(lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r**2)),
        ),
        *named(
            "sign of a term",
            "Both terms are subtracted: what the mean and the variance take up, x̂ loses.",
            LAYERNORM_BACKWARD,
            _norm_backward(
                lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, second=lambda v: -_mean(v))
            ),
            _norm_backward(
                lambda dy, x, gamma, xhat, r: _dx(gamma * dy, xhat, r, lambda v: -_mean(v))
            ),
            _norm_backward(
                lambda dy, x, gamma, xhat, r: _dx(
                    gamma * dy, xhat, r, lambda v: -_mean(v), lambda v: -_mean(v)
                )
            ),
        ),
        *named(
            "centred x for x̂",
            "The variance term is x̂ times the mean of x̂ * gamma * dy, with x̂ = r (x - mean) in "
            "both places.",
            LAYERNORM_BACKWARD,
            _norm_backward(
                lambda dy, x, gamma, xhat, r: _dx(gamma * dy, x - _mean(x), r),
            ),
            _norm_backward(
                lambda dy, x, gamma, xhat, r: (
                    r * (gamma * dy - _mean(gamma * dy) - (x - _mean(x)) * _mean(xhat * gamma * dy))
                ),
            ),
        ),
        *named(
            "Bessel's correction",
            BESSEL,
            LAYERNORM,
            _norm_backward(_right_dx, ddof=1),
            _ln_true_bessel,
        ),
        *named(
            "eps outside the root",
            OUTSIDE,
            EPS,
            _norm_backward(_right_dx, root="outside"),
            _ln_std_plus_eps,
        ),
        *named(
            "Bessel's correction and eps outside the root",
            BOTH,
            EPS,
            _norm_backward(_right_dx, ddof=1, root="outside"),
            lambda dy, x, gamma, eps=DEFAULT: _ln_std_plus_eps(dy, x, gamma, eps, ddof=1),
        ),
        *named(
            "eps forgotten",
            "Without eps a token whose entries are all alike is 0/0, which is NaN.",
            EPS,
            _norm_backward(_right_dx, root="none"),
        ),
        *named(
            "eps argument ignored",
            "eps is 1e-5 only by default; where the caller passes another, that one counts.",
            EPS,
            _ln_default_eps,
        ),
        *named(
            "wrong axis",
            "Statistics, and the two means of the backward pass, run over the C entries of each "
            "token.",
            LAYERNORM_BACKWARD,
            *(_ln_axis(axis) for axis in ALL_AXES),
            *(_ln_axis_of_means(axis) for axis in ALL_AXES),
        ),
        *named(
            "keepdims forgotten",
            "Without keepdims=True the means have shape (B, N) and do not line up with the tokens "
            "of a (B, N, C) array.",
            SHAPES,
            _norm_backward(
                lambda dy, x, gamma, xhat, r: _dx(
                    gamma * dy, xhat, r, lambda v: v.mean(-1), lambda v: v.mean(-1)
                )
            ),
        ),
    ),
)


def _xhat_of_one_token(dgamma: Array, dy: Array) -> Array | None:
    """Of a single token, dgamma = dy * x̂ gives x̂."""
    dy = np.asarray(dy, float)
    return None if dy.size != dy.shape[-1] or (dy == 0).any() else dgamma / dy


# --- RMSNorm ---------------------------------------------------------------------------------


def _rms(dx: Callable[..., Array], dgamma: Any = None, **changed: Any) -> Callable[..., Any]:
    chosen = dgamma or (lambda dy, x, xhat: _total(dy * xhat))
    return _norm_backward(dx, chosen, None, **{"centred": False, **changed})


def _rms_dx(dxhat: Array, xhat: Array, r: Any, second: Callable[[Array], Any] = _mean) -> Array:
    return _dx(dxhat, xhat, r, _nothing, second)


def _right_rms_dx(dy, x, gamma, xhat, r):
    return _rms_dx(gamma * dy, xhat, r)


def _rms_default_eps(dy, x, gamma, eps=DEFAULT):
    return _rms(_right_rms_dx)(dy, x, gamma, DEFAULT)


def _rms_plus_eps(dy, x, gamma, eps=DEFAULT):
    """The true gradient of the forward pass that adds eps to the root mean square."""
    rms = np.sqrt(_mean(x**2))
    r = 1 / (rms + eps)
    g = gamma * dy
    return r * (g - x * r * _mean(g * x) / rms), _total(dy * x * r)


def _rms_axis(axis: Axis) -> Callable[..., Any]:
    def mean(x: Array) -> Array:
        return x.mean(axis=axis, keepdims=True)

    return _rms(lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, xhat, r, mean), axis=axis)


RMSNORM_BACKWARD = Exercise(
    id="rmsnorm_backward",
    chapter=CHAPTER,
    title="RMSNorm's backward pass",
    points=3,
    returns=("dx", "dgamma"),
    reference=normalization.rmsnorm_backward,
    oracle=quiet(_rmsnorm_by_complex_step),
    cases=_backward_cases,
    tokens=("dx",),
    intermediates=(
        Intermediate(
            "xhat",
            lambda dy, x, gamma, eps: normalization.rmsnorm_forward(x, np.ones_like(gamma), eps),
            {"dgamma": lambda dgamma, dy, x, gamma, eps: _xhat_of_one_token(dgamma, dy)},
        ),
    ),
    mistakes=(
        *named(
            "treated as LayerNorm",
            "RMSNorm subtracts no mean, so its backward pass takes none off either.",
            RMSNORM,
            _norm_backward(_right_dx, dbeta=None),
            _norm_backward(_right_dx, dbeta=None, centred=False),
            _norm_backward(_right_rms_dx, dbeta=None),
        ),
        *named(
            "root mean square taken as a constant",
            "Moving one entry moves the root mean square, by which every entry is divided: x̂ times "
            "the mean of x̂ * gamma * dy is taken off.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: r * gamma * dy),
        ),
        *named(
            "gamma forgotten",
            "The gradient reaches x̂ through gamma: dx̂ = gamma * dy, before anything else.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: _rms_dx(dy, xhat, r)),
        ),
        *named(
            "gamma applied last",
            "gamma * dy comes first and is averaged over the row; gamma differs from channel to "
            "channel, so it cannot be multiplied on afterwards.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: gamma * _rms_dx(dy, xhat, r)),
        ),
        *named(
            "gamma missing in the mean",
            "The mean is of x̂ * gamma * dy, not of x̂ * dy.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: r * (gamma * dy - xhat * _mean(dy * xhat))),
        ),
        *named(
            "dgamma summed over batch only",
            "gamma is shared by all tokens of all sequences: its gradient is summed over B and "
            "over N, and has shape (C,).",
            SHAPES,
            _rms(_right_rms_dx, lambda dy, x, xhat: _over_batch(dy * xhat)),
        ),
        *named(
            "dgamma averaged",
            "Every token adds its share to dgamma; a mean belongs to the loss, which has already "
            "divided.",
            SHAPES,
            _rms(_right_rms_dx, lambda dy, x, xhat: _averaged(dy * xhat)),
            _rms(_right_rms_dx, lambda dy, x, xhat: _over_batch_averaged(dy * xhat)),
        ),
        *named(
            "dgamma from x",
            "gamma multiplies x̂, not x: dgamma is the sum of dy * x̂.",
            RMSNORM,
            _rms(_right_rms_dx, lambda dy, x, xhat: _total(dy * x)),
        ),
        *named(
            "sum instead of mean",
            "The mean square carries 1/C, so the term is a mean over the row, not a sum.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, xhat, r, _sum)),
        ),
        *named(
            "not divided by the root mean square",
            "The whole bracket is multiplied by r: what x was scaled by, its gradient is too.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, xhat, 1.0)),
        ),
        *named(
            "power of r",
            "dx = r gamma dy - r³ x mean(x gamma dy): with x for x̂ the second term has r three "
            "times.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, x, r)),
            _rms(lambda dy, x, gamma, xhat, r: r * (gamma * dy - x * _mean(xhat * gamma * dy))),
            _rms(lambda dy, x, gamma, xhat, r: r * gamma * dy - xhat * _mean(xhat * gamma * dy)),
            _rms(lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, xhat, r**2)),
        ),
        *named(
            "sign of the second term",
            "The term is subtracted: what the root mean square takes up, x̂ loses.",
            RMSNORM,
            _rms(lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, xhat, r, lambda v: -_mean(v))),
        ),
        *named(
            "eps outside the root",
            OUTSIDE.replace("variance", "mean square").replace(
                "standard deviation", "root mean square"
            ),
            EPS,
            _rms(_right_rms_dx, root="outside"),
            _rms_plus_eps,
        ),
        *named(
            "eps argument ignored",
            "eps is 1e-5 only by default; where the caller passes another, that one counts.",
            EPS,
            _rms_default_eps,
        ),
        *named(
            "eps forgotten",
            "eps is part of the root mean square; at entries of 1e-3 it is most of it.",
            EPS,
            _rms(_right_rms_dx, root="none"),
        ),
        *named(
            "wrong axis",
            "The mean square, and the mean of the backward pass, run over the C entries of each "
            "token.",
            RMSNORM,
            *(_rms_axis(axis) for axis in ALL_AXES),
        ),
        *named(
            "keepdims forgotten",
            "Without keepdims=True the means have shape (B, N) and do not line up with the tokens "
            "of a (B, N, C) array.",
            SHAPES,
            _rms(
                lambda dy, x, gamma, xhat, r: _rms_dx(gamma * dy, xhat, r, lambda v: v.mean(-1)),
            ),
        ),
    ),
)


# --- the residual connection ------------------------------------------------------------------


def _sublayer(rng: Rng, *shape: int, size: float = 1.0) -> Probe:
    """The backward pass of some sublayer: dout to (slope * dout) @ matrix, linear as all are."""
    slope = size * rng.uniform(0.5, 2, shape) * rng.choice([-1.0, 1.0], shape)
    return Probe("layer", {"slope": slope, "matrix": rng.normal(size=(shape[-1], shape[-1]))})


def _residual_cases(rng: Rng) -> list[Case]:
    def pair(*shape: int, size: float = 1.0) -> tuple[Array, Probe]:
        return rng.normal(size=shape), _sublayer(rng, *shape, size=size)

    one_entry = np.zeros((2, 3, 5))
    one_entry[rng.integers(2), rng.integers(3), rng.integers(5)] = rng.normal() + 3
    dout, sublayer = pair(2, 4, 3)
    single, single_sublayer = pair(3, 2, 5)
    undone = Probe("layer", {"slope": -np.ones((2, 3, 4)), "matrix": np.eye(4)})
    dead = Probe("layer", {"slope": np.zeros((2, 3, 4)), "matrix": rng.normal(size=(4, 4))})
    return [
        Case("one token", pair(1, 1, 5), hint="dx has two contributions."),
        Case("a batch", pair(2, 3, 4), hint="The same in every token."),
        Case("two axes", pair(3, 4), hint="Any shape: nothing is summed away."),
        Case("all sizes alike", pair(4, 4, 4), hint="Nothing is transposed."),
        Case(
            "a sublayer that does nothing",
            (rng.normal(size=(2, 3, 4)), dead),
            hint="Its gradient is 0, and dout still arrives whole: what residuals are for.",
        ),
        Case(
            "a sublayer that undoes the skip",
            (rng.normal(size=(2, 3, 4)), undone),
            hint="f(x) = -x: the output is 0 whatever x is, and so is its gradient.",
        ),
        Case("a faint sublayer", pair(2, 3, 6, size=1e-3), hint="Near the identity."),
        Case(
            "a strong sublayer",
            pair(2, 3, 6, size=1e3),
            hint="The skip is small beside it.",
        ),
        Case(
            "upstream in one entry",
            (one_entry, _sublayer(rng, 2, 3, 5)),
            hint="One entry goes straight through; through the sublayer, it reaches others.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(dout), sublayer),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (single.astype(np.float32), single_sublayer),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _residual_by_jacobian(dout: Array, sublayer_backward: Callable[[Array], Array]) -> Array:
    """The Jacobian of x + f(x), its rows from unit vectors, and one product with it."""
    dout = np.asarray(dout, float)
    units = np.eye(dout.size).reshape(-1, *dout.shape)
    rows = np.stack([unit + sublayer_backward(unit) for unit in units]).reshape(dout.size, -1)
    return (dout.reshape(-1) @ rows).reshape(dout.shape)


RESIDUAL_BACKWARD = Exercise(
    id="residual_backward",
    chapter=CHAPTER,
    title="The residual connection's backward pass",
    points=1,
    returns=("dx",),
    reference=normalization.residual_backward,
    oracle=quiet(_residual_by_jacobian),
    cases=_residual_cases,
    tokens=("dx",),
    mistakes=(
        *named(
            "skip path dropped",
            "x reaches the output twice, past the sublayer and through it: without dout itself, "
            "the gradient shrinks from block to block until the first ones get nothing.",
            RESIDUAL,
            lambda dout, sublayer_backward: sublayer_backward(dout),
        ),
        *named(
            "doubled",
            "dout arrives once by each way, not twice by either.",
            RESIDUAL,
            lambda dout, sublayer_backward: 2 * dout + sublayer_backward(dout),
            lambda dout, sublayer_backward: 2 * (dout + sublayer_backward(dout)),
            lambda dout, sublayer_backward: dout + 2 * sublayer_backward(dout),
        ),
        *named(
            "sublayer path dropped",
            "x also goes through the sublayer: what sublayer_backward makes of dout is added.",
            RESIDUAL,
            lambda dout, sublayer_backward: dout + 0.0,
        ),
        *named(
            "multiplied instead of added",
            "Where two ways lead from x to the output, their gradients add; factors multiply "
            "along one way.",
            RESIDUAL,
            lambda dout, sublayer_backward: dout * sublayer_backward(dout),
        ),
        *named(
            "shared between the two ways",
            "A sum hands the whole of dout to each of its terms, not half of it.",
            RESIDUAL,
            lambda dout, sublayer_backward: (dout + sublayer_backward(dout)) / 2,
            lambda dout, sublayer_backward: dout / 2 + sublayer_backward(dout / 2),
            lambda dout, sublayer_backward: dout / 2 + sublayer_backward(dout),
            lambda dout, sublayer_backward: dout + sublayer_backward(dout) / 2,
        ),
        *named(
            "sublayer's gradient subtracted",
            "The output is x + f(x): both terms come with a plus.",
            RESIDUAL,
            lambda dout, sublayer_backward: dout - sublayer_backward(dout),
            lambda dout, sublayer_backward: sublayer_backward(dout) - dout,
        ),
        *named(
            "sublayer gone through twice",
            "The gradient of the sum goes through the sublayer once, as dout, not again as what "
            "has already come back.",
            RESIDUAL,
            lambda dout, sublayer_backward: dout + sublayer_backward(sublayer_backward(dout)),
            lambda dout, sublayer_backward: (
                dout + sublayer_backward(dout + sublayer_backward(dout))
            ),
            lambda dout, sublayer_backward: sublayer_backward(dout + sublayer_backward(dout)),
        ),
        *named(
            "ones in place of dout on the skip",
            "The identity's Jacobian is the identity matrix, and times dout that is dout, not 1.",
            RESIDUAL,
            lambda dout, sublayer_backward: 1 + sublayer_backward(dout),
        ),
    ),
)


# --- GELU -------------------------------------------------------------------------------------


def _gelu_cases(rng: Rng) -> list[Case]:
    def pair(*shape: int, spread: float = 1.0) -> tuple[Array, Array]:
        return rng.normal(size=shape), spread * rng.normal(size=shape)

    zeros = rng.normal(size=(3, 5))
    zeros[rng.random(zeros.shape) < 0.4] = 0.0
    zeros[0, 0] = 0.0
    dy, x = pair(2, 4, 3)
    single, single_x = pair(3, 6)
    return [
        Case("one axis", pair(7), hint="Entry by entry: nothing is summed."),
        Case("a batch", pair(2, 3, 5), hint="The same slope function in every entry."),
        Case("four axes", pair(2, 3, 4, 5), hint="Any shape."),
        Case(
            "from -6 to 6",
            (rng.normal(size=41), rng.permutation(np.linspace(-6, 6, 41))),
            hint="The bend and both tails: the slope goes below 0, and above 1.",
        ),
        Case(
            "small entries",
            pair(3, 4, spread=1e-3),
            hint="Near 0 the slope is about 1/2.",
        ),
        Case(
            "zeros in x",
            (rng.normal(size=(3, 5)), zeros),
            hint="At 0 the slope is exactly 1/2.",
        ),
        Case(
            "large entries",
            (
                rng.normal(size=(4, 3)),
                rng.uniform(10, 1000, (4, 3)) * rng.choice([-1, 1], (4, 3)),
            ),
            hint="Far out the slope is 0 on one side and 1 on the other.",
        ),
        Case(
            "large upstream",
            (1e4 * rng.normal(size=(3, 5)), rng.normal(size=(3, 5))),
            hint="The gradient is linear in dy.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(dy), scattered(x)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (single.astype(np.float32), single_x.astype(np.float32)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


NODES, WEIGHTS = np.polynomial.legendre.leggauss(80)


def _gelu_by_quadrature(z: Array) -> Array:
    """``z Φ(z)`` with Φ(z) = 1/2 + ∫ of the density along the segment from 0 to z; z complex."""
    # Beyond 12, Φ is 0 or 1 to 32 digits: the segment ends there, and its slope with it.
    inner = np.where(np.abs(z.real) < 12, z, 12 * np.sign(z.real))
    t = (NODES + 1) / 2
    density = np.exp(-((inner[..., None] * t) ** 2) / 2) / math.sqrt(2 * math.pi)
    return z * (0.5 + inner * (density @ WEIGHTS) / 2)


def _gelu_slope(x: Array) -> Array:
    """GELU's slope by the complex step through that integral."""
    x = np.asarray(x, float)
    return _gelu_by_quadrature(x + 1j * STEP).imag / STEP


def _gelu_by_complex_step(dy: Array, x: Array) -> Array:
    return np.asarray(dy, float) * _gelu_slope(x)


def gelu_backward(dy, x):
    """The library's function, of the exact form alone."""
    return feedforward.gelu_backward(dy, x)


Slope = Callable[[Array], Array]
cdf, pdf = quiet(feedforward.normal_cdf), quiet(feedforward.normal_pdf)


def _tanh_slope(x: Array) -> Array:
    return feedforward.gelu_backward(np.ones_like(x), x, "tanh")


def _right_slope(x: Array) -> Array:
    return cdf(x) + x * pdf(x)


def _sigmoid_slope(x: Array) -> Array:
    # x σ(1.702 x)
    return feedforward.silu_backward(np.ones_like(x), 1.702 * x)


def _by(slope: Slope) -> Callable[..., Any]:
    return lambda dy, x: dy * slope(x)


ROOT = math.sqrt(2)
# name, why, the slopes that people write; every one of them also breaks the feed-forward layer
SLOPES: tuple[tuple[str, str, tuple[Slope, ...]], ...] = (
    (
        "tanh form",
        "This is the slope of the tanh approximation; the exact GELU is x Φ(x), with the slope "
        "Φ(x) + x φ(x), and differs from the fourth digit on.",
        (_tanh_slope,),
    ),
    (
        "sigmoid form",
        "x σ(1.702 x) is a rougher approximation; the exact GELU is x Φ(x).",
        (_sigmoid_slope,),
    ),
    (
        "activation gradient at the output",
        "The slope is taken at x, what went into the activation, not at what came out of it.",
        (lambda x: _right_slope(feedforward.gelu(x)),),
    ),
    (
        "density term missing",
        "x Φ(x) is a product: the slope is Φ(x), from its first factor, plus x φ(x), from its "
        "second.",
        (cdf,),
    ),
    (
        "Φ term missing",
        "x Φ(x) is a product: the slope is x φ(x), from its second factor, plus Φ(x), from its "
        "first.",
        (lambda x: x * pdf(x),),
    ),
    (
        "x forgotten before the density",
        "The derivative of Φ is multiplied by the factor x that stands beside it: Φ(x) + x φ(x).",
        (lambda x: cdf(x) + pdf(x),),
    ),
    (
        "density of another width",
        "φ(x) = exp(-x²/2) / sqrt(2π): the ½ in the exponent and the factor in front belong "
        "together.",
        (
            lambda x: cdf(x) + x * np.exp(-(x**2)) / math.sqrt(2 * math.pi),
            lambda x: cdf(x) + x * np.exp(-(x**2)) / math.sqrt(math.pi),
            lambda x: cdf(x) + x * np.exp(-(x**2) / 2) / math.sqrt(math.pi),
            lambda x: cdf(x) + x * np.exp(-(x**2) / 2),
            lambda x: cdf(x) + x * np.exp(-(x**2) / 2) / (2 * math.pi),
        ),
    ),
    (
        "erf without the root of 2",
        "Φ(x) = (1 + erf(x / √2)) / 2: erf belongs to a normal distribution of variance ½.",
        (
            lambda x: cdf(ROOT * x) + x * pdf(x),
            lambda x: cdf(ROOT * x) + x * np.exp(-(x**2)) / math.sqrt(math.pi),
        ),
    ),
    (
        "half forgotten",
        "Φ(x) = (1 + erf(x / √2)) / 2 lies between 0 and 1.",
        (lambda x: 2 * cdf(x) + x * pdf(x), lambda x: 2 * _right_slope(x)),
    ),
    (
        "sign of the density term",
        "φ falls for positive x, but it enters as it is: Φ(x) + x φ(x).",
        (lambda x: cdf(x) - x * pdf(x),),
    ),
    (
        "the slope of relu",
        "relu's slope jumps from 0 to 1; GELU's bends from 0 to 1, below 0 and above 1 on the way.",
        (lambda x: (x > 0) * 1.0,),
    ),
    (
        "the value in place of the slope",
        "The upstream gradient is multiplied by the derivative of x Φ(x), not by x Φ(x).",
        (feedforward.gelu,),
    ),
)

GELU_BACKWARD = Exercise(
    id="gelu_backward",
    chapter=CHAPTER,
    title="GELU's backward pass",
    points=2,
    returns=("dx",),
    reference=gelu_backward,
    oracle=quiet(_gelu_by_complex_step),
    cases=_gelu_cases,
    mistakes=(
        *(m for name, why, slopes in SLOPES for m in named(name, why, GELU, *map(_by, slopes))),
        *named(
            "dy forgotten",
            "What is returned is dy times the slope, not the slope itself.",
            GELU,
            lambda dy, x: _right_slope(x),
        ),
        *named(
            "multiplied by dy twice",
            "dy enters once; the gradient is linear in it.",
            GELU,
            lambda dy, x: dy**2 * _right_slope(x),
        ),
        *named(
            "dy and x exchanged",
            "The first argument is the upstream gradient, the second what the activation took in.",
            SHAPES,
            lambda dy, x: x * _right_slope(dy),
        ),
    ),
)


# --- the feed-forward layer -------------------------------------------------------------------


def _ffn_cases(rng: Rng) -> list[Case]:
    def call(b: int, n: int, c: int, f: int) -> tuple[Array, ...]:
        return (
            rng.normal(size=(b, n, c)),
            rng.normal(size=(b, n, c)),
            rng.normal(size=(c, f)),
            rng.normal(size=f),
            rng.normal(size=(f, c)),
            rng.normal(size=c),
        )

    one_entry = np.zeros((2, 3, 4))
    one_entry[rng.integers(2), rng.integers(3), rng.integers(4)] = rng.normal() + 3
    shut = list(call(2, 3, 4, 5))
    shut[3] = shut[3] + rng.choice([-30.0, 30.0], 5)
    return [
        Case("one token", call(1, 1, 6, 4), hint="One row of x, one row of hidden units."),
        Case("one sequence", call(1, 3, 5, 4), hint="Three tokens share the parameters."),
        Case(
            "a batch",
            call(2, 3, 4, 6),
            hint="Parameters' gradients are summed over B and N.",
        ),
        Case("narrow inside", call(2, 4, 5, 3), hint="F is smaller than C here."),
        Case("square weights", call(3, 2, 4, 4), hint="Shapes fit transposed, too."),
        Case("all sizes alike", call(3, 3, 3, 3), hint="No shape will complain."),
        Case("one hidden unit", call(2, 3, 4, 1), hint="F = 1."),
        Case("one channel", call(2, 3, 1, 4), hint="C = 1."),
        Case(
            "upstream in one entry",
            (one_entry, *call(2, 3, 4, 5)[1:]),
            hint="One token matters to the loss: only it gets a gradient.",
        ),
        Case(
            "units open or shut",
            tuple(shut),
            hint="The biases put every hidden unit far out: slope 1 or slope 0.",
        ),
        Case(
            "not contiguous in memory",
            tuple(scattered(a) for a in call(2, 3, 5, 4)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            tuple(a.astype(np.float32) for a in call(2, 3, 4, 5)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _ffn_by_complex_step(
    dout: Array, x: Array, w1: Array, b1: Array, w2: Array, b2: Array
) -> tuple[Array, dict[str, Array]]:
    """One entry of one argument at a time, through a forward pass in complex numbers."""
    dout, *given = (np.asarray(a, float) for a in (dout, x, w1, b1, w2, b2))
    hidden = given[0] @ given[1] + given[2]
    value, slope = _gelu_by_quadrature(hidden.astype(complex)).real, _gelu_slope(hidden)

    def loss(*entries: Array) -> Any:
        x, w1, b1, w2, b2 = entries
        # The step is so small that the activation is its value plus its slope times the step.
        active = value + 1j * slope * np.imag(x @ w1 + b1)
        return (dout * (active @ w2 + b2)).sum()

    def moved(i: int) -> Array:
        return _by_complex_step(lambda a: loss(*given[:i], a, *given[i + 1 :]), given[i])

    dx, *grads = map(moved, range(5))
    return dx, dict(zip(("w1", "b1", "w2", "b2"), grads, strict=True))


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _product(x: Array, dy: Array) -> Array:
    return _flat(x).T @ _flat(dy)


class _Parts:
    """A right feed-forward backward pass, step by step; a mistake overrides a step."""

    def slope(self, hidden: Array) -> Array:
        return _right_slope(hidden)

    def active(self, hidden: Array) -> Array:
        return hidden * cdf(hidden)

    def hidden(self, x: Array, w1: Array, b1: Array) -> Array:
        return x @ w1 + b1

    def dactive(self, dout: Array, w2: Array) -> Array:
        return dout @ w2.T

    def dhidden(self, dactive: Array, hidden: Array, active: Array) -> Array:
        return dactive * self.slope(hidden)

    def dx(self, dhidden: Array, w1: Array, dout: Array) -> Array:
        return dhidden @ w1.T

    def dw1(self, x: Array, dhidden: Array) -> Array:
        return _product(x, dhidden)

    def dw2(self, active: Array, hidden: Array, dout: Array) -> Array:
        return _product(active, dout)

    def db1(self, dhidden: Array) -> Array:
        return _total(dhidden)

    def db2(self, dout: Array) -> Array:
        return _total(dout)


def _ffn_with(**steps: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass with some of its steps replaced."""
    parts: Any = _Parts()
    for name, step in steps.items():
        setattr(parts, name, step)

    def answer(dout, x, w1, b1, w2, b2):
        hidden = parts.hidden(x, w1, b1)
        active = parts.active(hidden)
        dactive = parts.dactive(dout, w2)
        dhidden = parts.dhidden(dactive, hidden, active)
        grads = {
            "w1": parts.dw1(x, dhidden),
            "b1": parts.db1(dhidden),
            "w2": parts.dw2(active, hidden, dout),
            "b2": parts.db2(dout),
        }
        return parts.dx(dhidden, w1, dout), grads

    return answer


def _carried_gelu() -> tuple[Mistake, ...]:
    """Mistakes of gelu_backward as they show here; two of them have their own name here."""
    own = ("tanh form", "activation gradient at the output")
    return tuple(
        replace(
            carried(mistake, "gelu_backward", quiet(_ffn_with(slope=slope))),
            section=GELU,
        )
        for name, why, slopes in SLOPES
        for slope in slopes
        for mistake in named(name, why, GELU, _by(slope))
        if name not in own
    )


def _tanh_value(x: Array) -> Array:
    return feedforward.gelu(x, "tanh")


def _swapped_weights(dout, x, w1, b1, w2, b2):
    dx, grads = _ffn_with()(dout, x, w1, b1, w2, b2)
    return dx, {**grads, "w1": grads["w2"].T, "w2": grads["w1"].T}


def _forward_value_for_dx(dhidden: Array, w1: Array, dout: Array) -> Array:
    return dhidden @ w1.T + dout


def _solved_active(grad: Array, given: Mapping[str, Array]) -> Array | None:
    """The a of ``grads['w2'] = aᵀ dout``."""
    found = left_factor(grad, _flat(np.asarray(given["dout"], float)))
    return None if found is None else found.T.reshape(*given["x"].shape[:-1], -1)


def _solved_dhidden(grad: Array, given: Mapping[str, Array]) -> Array | None:
    """The dhidden of ``grads['w1'] = xᵀ dhidden``."""
    found = right_factor(_flat(np.asarray(given["x"], float)).T, grad)
    return None if found is None else found.reshape(*given["x"].shape[:-1], -1)


def _value_of_active(**given: Array) -> Array:
    hidden = np.asarray(given["x"] @ given["w1"] + given["b1"], float)
    return hidden * cdf(hidden)


def _value_of_dhidden(**given: Array) -> Array:
    hidden = np.asarray(given["x"] @ given["w1"] + given["b1"], float)
    return (given["dout"] @ given["w2"].T) * _right_slope(hidden)


# The library's function has keyword arguments besides; a learner's call has none of them.
FFN_INTERMEDIATES = (
    Intermediate(
        "active",
        _value_of_active,
        {"grads['w2']": lambda grad, **given: _solved_active(grad, given)},
    ),
    Intermediate(
        "dhidden",
        _value_of_dhidden,
        {
            "grads['w1']": lambda grad, **given: _solved_dhidden(grad, given),
            "dx": lambda dx, **given: left_factor(dx, np.swapaxes(given["w1"], 0, 1)),
        },
    ),
)


FFN_BACKWARD = Exercise(
    id="ffn_backward",
    chapter=CHAPTER,
    title="The feed-forward layer's backward pass",
    points=4,
    returns=("dx", "grads"),
    reference=feedforward.ffn_backward,
    oracle=quiet(_ffn_by_complex_step),
    cases=_ffn_cases,
    tokens=("dx",),
    intermediates=FFN_INTERMEDIATES,
    mistakes=(
        *named(
            "tanh form",
            "The activation here is the exact GELU, x Φ(x), forward and backward; the tanh form "
            "differs from the fourth digit on.",
            GELU,
            _ffn_with(slope=_tanh_slope),
            _ffn_with(slope=_tanh_slope, active=_tanh_value),
            _ffn_with(active=_tanh_value),
        ),
        *named(
            "activation gradient at the output",
            "The slope is taken at hidden = x @ w1 + b1, what the activation was given, not at "
            "what it made of it.",
            FFN,
            _ffn_with(dhidden=lambda dactive, hidden, active: dactive * _right_slope(active)),
        ),
        *named(
            "activation skipped in the backward pass",
            "Between the two products the gradient goes through the activation: it is multiplied "
            "by its slope at hidden.",
            FFN,
            _ffn_with(dhidden=lambda dactive, hidden, active: dactive),
        ),
        *named(
            "dw2 from hidden",
            "The second product was given the activated units: dw2 = activeᵀ dout, with hidden "
            "only inside the activation.",
            FFN,
            _ffn_with(dw2=lambda active, hidden, dout: _product(hidden, dout)),
        ),
        *named(
            "b1 forgotten",
            "The activation was given x @ w1 + b1; its slope is taken there.",
            FFN,
            _ffn_with(hidden=lambda x, w1, b1: x @ w1),
        ),
        *named(
            "biases' gradients summed over batch only",
            "b1 and b2 are shared by all tokens of all sequences: their gradients are summed over "
            "B and over N.",
            SHAPES,
            _ffn_with(db1=_over_batch, db2=_over_batch),
            _ffn_with(db1=_over_batch),
            _ffn_with(db2=_over_batch),
        ),
        *named(
            "gradients averaged over the batch",
            "Every token adds its share to the parameters' gradients; a mean belongs to the loss, "
            "which has already divided.",
            SHAPES,
            _ffn_with(db1=_averaged, db2=_averaged),
            _ffn_with(
                dw1=lambda x, dhidden: _product(x, dhidden) / len(x),
                db1=_over_batch_averaged,
                dw2=lambda active, hidden, dout: _product(active, dout) / len(dout),
                db2=_over_batch_averaged,
            ),
            _ffn_with(
                dw1=lambda x, dhidden: _product(x, dhidden) / (len(x) * x.shape[1]),
                db1=_averaged,
                dw2=lambda active, hidden, dout: (
                    _product(active, dout) / (len(dout) * dout.shape[1])
                ),
                db2=_averaged,
            ),
            _ffn_with(
                dw1=lambda x, dhidden: _product(x, dhidden) / len(x),
                dw2=lambda active, hidden, dout: _product(active, dout) / len(dout),
            ),
        ),
        *named(
            "weights' gradients of one sequence each",
            "w1 and w2 are shared by the whole batch: xᵀ dhidden is summed over the B sequences.",
            SHAPES,
            _ffn_with(
                dw1=lambda x, dhidden: x.swapaxes(-1, -2) @ dhidden,
                dw2=lambda active, hidden, dout: active.swapaxes(-1, -2) @ dout,
            ),
        ),
        *named(
            "weights not transposed",
            "Backward through y = x @ w is dx = dy @ w.T; with a square w the shapes fit without "
            "the transpose, and the numbers do not.",
            FFN,
            _ffn_with(dactive=lambda dout, w2: dout @ w2),
            _ffn_with(dx=lambda dhidden, w1, dout: dhidden @ w1),
            _ffn_with(
                dactive=lambda dout, w2: dout @ w2,
                dx=lambda dhidden, w1, dout: dhidden @ w1,
            ),
        ),
        *named(
            "weights' gradients transposed",
            "dw1 has w1's shape, (C, F): xᵀ dhidden, not dhiddenᵀ x.",
            SHAPES,
            _ffn_with(
                dw1=lambda x, dhidden: _product(dhidden, x),
                dw2=lambda active, hidden, dout: _product(dout, active),
            ),
            _ffn_with(dw1=lambda x, dhidden: _product(dhidden, x)),
            _ffn_with(dw2=lambda active, hidden, dout: _product(dout, active)),
        ),
        *named(
            "gradients of w1 and w2 exchanged",
            "w1 leads up from C to F, w2 back down: each gradient goes under its own name.",
            FFN,
            _swapped_weights,
        ),
        *named(
            "the residual's gradient added",
            "The layer alone is asked for: its skip connection adds dout in residual_backward.",
            RESIDUAL,
            _ffn_with(dx=_forward_value_for_dx),
        ),
        *named(
            "db1 behind the activation",
            "b1 is added before the activation, so its gradient is the sum of dhidden.",
            FFN,
            lambda dout, x, w1, b1, w2, b2: _db1_of_dactive(dout, x, w1, b1, w2, b2),
        ),
        *_carried_gelu(),
    ),
)


def _db1_of_dactive(dout, x, w1, b1, w2, b2):
    dx, grads = _ffn_with()(dout, x, w1, b1, w2, b2)
    return dx, {**grads, "b1": _total(dout @ w2.T)}


EXERCISES = (
    LAYERNORM_FORWARD,
    LAYERNORM_BACKWARD_EXERCISE,
    RMSNORM_BACKWARD,
    RESIDUAL_BACKWARD,
    GELU_BACKWARD,
    FFN_BACKWARD,
)
