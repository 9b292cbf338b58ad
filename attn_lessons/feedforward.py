r"""The feed-forward layer and its activations, forward and backward.

Two products with a nonlinearity between them, the same for each token. The conventions are the
same in every function:

- Activations act entry by entry on arrays of any shape, so each backward takes x itself.
- The exact GELU is x Φ(x) with Φ right to the last digits, in the lower tail too: 1 + erf(x/√2)
  is 0 from x = -8.4 down, where Φ is 2e-17 and the slope is not yet nothing. NumPy has no erf; the
  standard library's takes one number at a time, so ``normal_cdf`` is made of array operations.
- At 0, relu's slope is 0, as in torch. At ±inf every activation and slope is its limit. NaN stays
  NaN, in its own entry.
- float32 stays float32, integers become float64, inputs are never written to.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real

from attn_lessons._arrays import as_float, check_same_shape, check_shape, unbroadcast
from attn_lessons.normalization import dropout_backward, dropout_forward

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

# exp underflows to the right answer: far out, every gate is open or shut.
_quiet = np.errstate(all="ignore")


# --- the normal distribution ------------------------------------------------------------------

# Φ(-u) / φ(u), Mills' ratio, as a quotient of polynomials in u, by
# rising powers: a reweighted least-squares fit in 60 digits. As rounded
# here, its relative error is below 4e-16 on [0, 40]. No coefficient is
# negative, so nothing cancels.
MILLS_NUMERATOR = (
    374939.0962729923,
    578868.6612463167,
    442281.5998805632,
    214689.62388936675,
    72240.47678992186,
    17401.276373672226,
    2999.9883545478165,
    358.12221690711704,
    27.059822058652653,
    0.9999999999957506,
)
MILLS_DENOMINATOR = (
    299158.1161575997,
    700564.0096620768,
    762279.809156686,
    508791.36954548006,
    231384.73948843457,
    75186.34138168882,
    17757.398744375576,
    3027.048172436453,
    359.12221698386725,
    27.0598220578021,
    1.0,
)

# Beyond it the density is 0 in float64, and a polynomial might overflow.
FAR = 40.0


@_quiet
def normal_pdf(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""Density of the standard normal distribution.

    .. math:: \varphi(x) = \frac{1}{\sqrt{2\pi}} \, e^{-x^2/2}

    Shapes: any, the result the same.

    ValueError: ``x`` holds no real numbers.
    """
    x = as_float("x", x)
    return np.asarray(_density(np.minimum(abs(_worked(x)), FAR)), x.dtype)


@_quiet
def normal_cdf(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""Chance that a standard normal number lies below x.

    .. math:: \Phi(x) = \int_{-\infty}^x \varphi(t) \, dt
              = \frac12 \Bigl( 1 + \operatorname{erf} \frac{x}{\sqrt2} \Bigr)

    For negative x it is the density times Mills' ratio, which falls
    slowly from 1.25 and is approximated by one quotient of polynomials;
    for positive x, 1 minus that. Relative error below 2e-15 in float64,
    however small the result.

    Shapes: any, the result the same.

    ValueError: ``x`` holds no real numbers.
    """
    x = as_float("x", x)
    return _normal(_worked(x))[0].astype(x.dtype, copy=False)


# --- activations ------------------------------------------------------------------------------


@_quiet
def relu_forward(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""The positive part.

    .. math:: y = \max(x, 0)

    Shapes: any, the result the same.

    ValueError: ``x`` holds no real numbers.

    Source: Vaswani et al. 2017, eq. (2).
    """
    x = as_float("x", x)
    # NaN goes the second way, and stays.
    return np.where(x <= 0, 0, x)


@_quiet
def relu_backward(
    dy: Real[np.ndarray, "*shape"],
    x: Real[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]:
    r"""The gradient where x is positive, 0 elsewhere.

    .. math:: dx = dy \, [x > 0]

    Shapes: dy and x the same, any; the result too.

    ValueError: dy has not x's shape.
    """
    dy, x = _pair(dy, x)
    return np.where(x <= 0, 0, dy).astype(np.result_type(dy, x), copy=False)


@_quiet
def gelu(
    x: Real[np.ndarray, "*shape"],
    approximate: Literal["none", "tanh"] = "none",
) -> Float[np.ndarray, "*shape"]:
    r"""x, weighted by the chance that a normal number lies below it.

    .. math:: y = x \, \Phi(x)

    ``approximate="tanh"`` replaces Φ, by up to 1.8e-4, with

    .. math:: \frac12 (1 + \tanh u) = \sigma(2u), \qquad
              u = \sqrt{2/\pi} \, (x + 0.044715 \, x^3)

    Shapes: any, the result the same.

    ValueError: ``approximate`` is neither "none" nor "tanh".

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    return _gated(x, _gelu_gate(approximate))


@_quiet
def gelu_backward(
    dy: Real[np.ndarray, "*shape"],
    x: Real[np.ndarray, "*shape"],
    approximate: Literal["none", "tanh"] = "none",
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient by x, of either form.

    .. math:: dx = dy \, \bigl( \Phi(x) + x \, \varphi(x) \bigr), \qquad
              dx = dy \, \bigl( \sigma(2u)
                   + 2 x \, \sigma(2u) \, \sigma(-2u) \, u' \bigr)

    with :math:`u' = \sqrt{2/\pi} \, (1 + 3 \cdot 0.044715 \, x^2)`.
    The slope is not confined to [0, 1]: it goes from -0.129 to 1.129.

    Shapes: dy and x the same, any; the result too.

    ValueError: dy has not x's shape; ``approximate`` is neither "none"
    nor "tanh".

    Source: the derivative of Hendrycks & Gimpel 2016, section 2.
    """
    return _gated_backward(dy, x, _gelu_gate(approximate))


@_quiet
def silu(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""x, weighted by its logistic sigmoid; also called swish.

    .. math:: y = x \, \sigma(x), \qquad \sigma(x) = \frac{1}{1 + e^{-x}}

    Shapes: any, the result the same.

    ValueError: ``x`` holds no real numbers.

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    return _gated(x, _logistic)


@_quiet
def silu_backward(
    dy: Real[np.ndarray, "*shape"],
    x: Real[np.ndarray, "*shape"],
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient by x.

    .. math:: dx = dy \, \bigl( \sigma(x) + x \, \sigma(x) \, \sigma(-x) \bigr)

    Shapes: dy and x the same, any; the result too.

    ValueError: dy has not x's shape.
    """
    return _gated_backward(dy, x, _logistic)


# --- the feed-forward layer -------------------------------------------------------------------


class FFNCache(NamedTuple):
    """What the backward pass reads."""

    x: np.ndarray  # (..., C)
    w1: np.ndarray  # (C, F)
    w2: np.ndarray  # (F, C)
    hidden: np.ndarray  # (..., F), before the activation
    active: np.ndarray  # (..., F), after it and after dropout
    activation: Activation
    keep: np.ndarray | None  # (..., F), what dropout kept
    rate: float


@_quiet
def ffn_forward(
    x: Real[np.ndarray, "*batch C"],
    w1: Real[np.ndarray, "C F"],
    b1: Real[np.ndarray, "F"],
    w2: Real[np.ndarray, "F C"],
    b2: Real[np.ndarray, "C"],
    *,
    activation: Activation = "gelu",
    keep: Bool[np.ndarray, "*batch F"] | None = None,
    rate: float = 0.0,
) -> tuple[Float[np.ndarray, "*batch C"], FFNCache]:
    r"""Up to width F, through the activation, and down to width C.

    .. math:: h = x W_1 + b_1, \qquad a = \operatorname{act}(h), \qquad
              y = a W_2 + b_2

    With ``keep``, a is dropped out: a ∘ keep/(1 - rate).

    Shapes: x ``(..., C)``, ``(B, N, C)`` as a rule; w1 ``(C, F)``, b1
    ``(F,)``, w2 ``(F, C)``, b2 ``(C,)``; keep ``(..., F)``; the result
    as x.

    ValueError: shapes do not fit; ``activation`` is none of "gelu",
    "gelu_tanh", "relu", "silu"; ``rate`` lies outside [0, 1).

    Source: Vaswani et al. 2017, eq. (2), with relu.
    """
    x, w1, b1, w2, b2 = _parameters(x, w1, b1, w2, b2)
    act, _ = _activation(activation)
    hidden = x @ w1 + b1
    active = act(hidden)
    if keep is not None:
        active = dropout_forward(active, keep, rate)
    out = active @ w2 + b2
    return out, FFNCache(x, w1, w2, hidden, active, activation, keep, rate)


@_quiet
def ffn_backward(
    dout: Real[np.ndarray, "*batch C"],
    x: Real[np.ndarray, "*batch C"],
    w1: Real[np.ndarray, "C F"],
    b1: Real[np.ndarray, "F"],
    w2: Real[np.ndarray, "F C"],
    b2: Real[np.ndarray, "C"],
    *,
    activation: Activation = "gelu",
) -> tuple[Float[np.ndarray, "*batch C"], dict[str, np.ndarray]]:
    r"""Gradients from the arguments alone: runs the forward pass again.

    .. math:: da = dy \, W_2^\top, \qquad dW_2 = a^\top dy, \qquad
              db_2 = \textstyle\sum dy

    .. math:: dh = da \circ \operatorname{act}'(h)

    .. math:: dx = dh \, W_1^\top, \qquad dW_1 = x^\top dh, \qquad
              db_1 = \textstyle\sum dh

    The slope is taken at h, what the activation was given, not at a,
    what it made of it.

    Shapes: dout and x ``(..., C)``; dx as x; the second result a dict
    with w1, b1, w2 and b2, each as the argument of that name.

    ValueError: dout has not x's shape; and as ffn_forward.
    """
    _, cache = ffn_forward(x, w1, b1, w2, b2, activation=activation)
    return ffn_backward_cached(dout, cache)


@_quiet
def ffn_backward_cached(
    dout: Real[np.ndarray, "*batch C"],
    cache: FFNCache,
) -> tuple[Float[np.ndarray, "*batch C"], dict[str, np.ndarray]]:
    r"""Gradients from what ffn_forward kept.

    .. math:: dx = \bigl( dy \, W_2^\top \circ \operatorname{act}'(h) \bigr) W_1^\top

    and the others as in ffn_backward.

    Shapes: as ffn_backward.

    ValueError: dout has not x's shape.
    """
    x, w1, w2, hidden, active, activation, keep, rate = cache
    dout = as_float("dout", dout)
    check_same_shape("dout", dout, "x", x)
    _, act_backward = _activation(activation)
    dactive = dout @ w2.T
    if keep is not None:
        dactive = dropout_backward(dactive, keep, rate)
    dhidden = act_backward(dactive, hidden)
    dx = dhidden @ w1.T
    grads = {
        "w1": _over_tokens(x, dhidden),
        "b1": _total(dhidden),
        "w2": _over_tokens(active, dout),
        "b2": _total(dout),
    }
    return dx, grads


# --- the gated one ----------------------------------------------------------------------------


class SwigluCache(NamedTuple):
    """What the backward pass reads."""

    x: np.ndarray  # (..., C)
    w_gate: np.ndarray  # (C, F)
    w_up: np.ndarray  # (C, F)
    w_down: np.ndarray  # (F, C)
    gate: np.ndarray  # (..., F), before silu
    up: np.ndarray  # (..., F)


@_quiet
def swiglu_forward(
    x: Real[np.ndarray, "*batch C"],
    w_gate: Real[np.ndarray, "C F"],
    w_up: Real[np.ndarray, "C F"],
    w_down: Real[np.ndarray, "F C"],
) -> tuple[Float[np.ndarray, "*batch C"], SwigluCache]:
    r"""Two ways up, one of them the gate of the other, and one down.

    .. math:: g = x W_g, \qquad u = x W_u, \qquad
              y = (\operatorname{silu}(g) \circ u) \, W_d

    Shapes: x ``(..., C)``; w_gate and w_up ``(C, F)``, w_down ``(F,
    C)``; the result as x. No biases.

    ValueError: shapes do not fit.

    Source: Shazeer 2020, eq. (6).
    """
    x, w_gate = as_float("x", x), as_float("w_gate", w_gate)
    w_up, w_down = as_float("w_up", w_up), as_float("w_down", w_down)
    width = _width(x)
    check_shape("w_gate", w_gate, (width, "F"), f"to match x {x.shape}")
    check_same_shape("w_up", w_up, "w_gate", w_gate)
    check_shape("w_down", w_down, w_gate.shape[::-1], f"to match w_gate {w_gate.shape}")
    gate, up = x @ w_gate, x @ w_up
    out = (silu(gate) * up) @ w_down
    return out, SwigluCache(x, w_gate, w_up, w_down, gate, up)


@_quiet
def swiglu_backward(
    dout: Real[np.ndarray, "*batch C"],
    x: Real[np.ndarray, "*batch C"],
    w_gate: Real[np.ndarray, "C F"],
    w_up: Real[np.ndarray, "C F"],
    w_down: Real[np.ndarray, "F C"],
) -> tuple[Float[np.ndarray, "*batch C"], dict[str, np.ndarray]]:
    r"""Gradients from the arguments alone: runs the forward pass again.

    .. math:: da = dy \, W_d^\top, \qquad
              du = da \circ \operatorname{silu}(g), \qquad
              dg = da \circ u \circ \operatorname{silu}'(g)

    .. math:: dx = dg \, W_g^\top + du \, W_u^\top, \qquad
              dW_g = x^\top dg, \qquad dW_u = x^\top du

    Shapes: dout and x ``(..., C)``; dx as x; the second result a dict
    with w_gate, w_up and w_down, each as the argument of that name.

    ValueError: dout has not x's shape; and as swiglu_forward.
    """
    _, cache = swiglu_forward(x, w_gate, w_up, w_down)
    return swiglu_backward_cached(dout, cache)


@_quiet
def swiglu_backward_cached(
    dout: Real[np.ndarray, "*batch C"],
    cache: SwigluCache,
) -> tuple[Float[np.ndarray, "*batch C"], dict[str, np.ndarray]]:
    r"""Gradients from what swiglu_forward kept.

    .. math:: dx = dg \, W_g^\top + du \, W_u^\top

    with dg and du as in swiglu_backward.

    Shapes: as swiglu_backward.

    ValueError: dout has not x's shape.
    """
    x, w_gate, w_up, w_down, gate, up = cache
    dout = as_float("dout", dout)
    check_same_shape("dout", dout, "x", x)
    opened = silu(gate)
    dactive = dout @ w_down.T
    dup = dactive * opened
    dgate = silu_backward(dactive * up, gate)
    dx = dgate @ w_gate.T + dup @ w_up.T
    grads = {
        "w_gate": _over_tokens(x, dgate),
        "w_up": _over_tokens(x, dup),
        "w_down": _over_tokens(opened * up, dout),
    }
    return dx, grads


# --- gates: x times a number between 0 and 1 --------------------------------------------------

# A gate takes x to its value there and to x times its slope.
Gate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _gated(x, gate: Gate):
    x = as_float("x", x)
    value, _ = gate(_worked(x))
    # A gate that is shut lets nothing through: -inf * 0 is NaN.
    return np.where(value == 0, 0, x * value).astype(x.dtype, copy=False)


def _gated_backward(dy, x, gate: Gate):
    dy, x = _pair(dy, x)
    value, bend = gate(_worked(x))
    return np.asarray(dy * (value + bend), np.result_type(dy, x))


def _normal(x):
    u = np.minimum(abs(x), FAR)
    density = _density(u)
    tail = density * _polynomial(MILLS_NUMERATOR, u) / _polynomial(MILLS_DENOMINATOR, u)
    # NaN goes the second way, and stays.
    return np.where(x < 0, tail, 1 - tail), np.copysign(u, x) * density


def _density(u):
    # Rounding u² alone would cost 13 digits of exp(-u²/2) where u = 38:
    # split u so that the large part's square is exact.
    large = np.rint(16 * u) / 16
    rest = (u - large) * (u + large)
    return np.exp(-large * large / 2) * np.exp(-rest / 2) * (2 * np.pi) ** -0.5


def _polynomial(coefficients, u):
    value = np.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value *= u
        value += coefficient
    return value


def _tanh_gate(x):
    near = np.clip(x, -FAR, FAR)
    root = (2 / np.pi) ** 0.5
    square = near * near  # near**3 would take ten times as long in float32
    u = root * near * (1 + 0.044715 * square)
    slope = root * (1 + 3 * 0.044715 * square)
    small = np.exp(-2 * abs(u))
    value = np.where(u < 0, small, 1) / (1 + small)
    return value, 2 * near * slope * small / (1 + small) ** 2


def _logistic(x):
    value = _sigmoid(x)
    # Far out the slope is 0 and x may be inf.
    near = np.clip(x, -1e3, 1e3)
    return value, near * value * _sigmoid(-near)


def _sigmoid(x):
    # exp of a positive number may overflow.
    small = np.exp(-abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


def _gelu_gate(approximate) -> Gate:
    gates: dict[str, Gate] = {"none": _normal, "tanh": _tanh_gate}
    if approximate not in gates:
        raise ValueError(f'approximate: expected "none" or "tanh"; got {approximate!r}')
    return gates[approximate]


# --- at the door ------------------------------------------------------------------------------


def _worked(x):
    # The coefficients do not fit float16.
    return x.astype(np.result_type(x, np.float32), copy=False)


def _pair(dy, x):
    dy, x = as_float("dy", dy), as_float("x", x)
    check_same_shape("dy", dy, "x", x)
    return dy, x


def _width(x):
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., C); got a scalar, shape ()")
    return x.shape[-1]


def _parameters(x, w1, b1, w2, b2):
    named = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    x, w1, b1, w2, b2 = (as_float(name, array) for name, array in named.items())
    width = _width(x)
    check_shape("w1", w1, (width, "F"), f"to match x {x.shape}")
    check_shape("b1", b1, w1.shape[1:], f"to match w1 {w1.shape}")
    check_shape("w2", w2, w1.shape[::-1], f"to match w1 {w1.shape}")
    check_shape("b2", b2, (width,), f"to match x {x.shape}")
    return x, w1, b1, w2, b2


def _activation(name):
    pairs = {
        "gelu": (gelu, gelu_backward),
        "gelu_tanh": (
            lambda x: gelu(x, "tanh"),
            lambda dy, x: gelu_backward(dy, x, "tanh"),
        ),
        "relu": (relu_forward, relu_backward),
        "silu": (silu, silu_backward),
    }
    if name not in pairs:
        raise ValueError(f"activation: expected one of {', '.join(pairs)}; got {name!r}")
    return pairs[name]


# --- over all tokens --------------------------------------------------------------------------


def _over_tokens(x, dy):
    """The gradient of the w in ``y = x @ w``: every token has its share in it."""
    tokens = tuple(range(x.ndim - 1))
    return np.tensordot(x, dy, axes=(tokens, tokens))


def _total(dy):
    return unbroadcast(dy, dy.shape[-1:])
