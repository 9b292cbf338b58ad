"""Chapter 8: SGD, AdamW and its groups, clipping, schedules, accumulation, padded targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attn_lessons import optim, softmax, training
from attn_lessons.grading.catalogue._parts import named, quiet, scattered
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.grading.relations import carried

CHAPTER = "ch08_training"
SGD = f"{CHAPTER}.html#ch08-sgd"
ADAM = f"{CHAPTER}.html#ch08-adam"
BIAS = f"{CHAPTER}.html#ch08-bias"
EPS = f"{CHAPTER}.html#ch08-eps"
ADAMW = f"{CHAPTER}.html#ch08-adamw"
GROUPS = f"{CHAPTER}.html#ch08-groups"
CLIPPING = f"{CHAPTER}.html#ch08-clipping"
WARMUP = f"{CHAPTER}.html#ch08-warmup"
COSINE = f"{CHAPTER}.html#ch08-cosine"
SMOOTHING = f"{CHAPTER}.html#ch08-smoothing"
ACCUMULATE = f"{CHAPTER}.html#ch08-accumulate"

Array = np.ndarray
Arrays = Mapping[str, Array]
Answer = Callable[..., Any]
Rng = np.random.Generator

BETAS = (0.9, 0.999)
SMALL = 1e-8


# --- sgd_step -----------------------------------------------------------------------------------


def _sgd_cases(rng: Rng) -> list[Case]:
    def call(*shape: int, v: float = 1.0, dtype: str = "float64") -> tuple[Array, ...]:
        scales = (1.0, 1.0, v)
        return tuple((s * rng.normal(size=shape)).astype(dtype) for s in scales)

    still = call(3, 4)
    still[1][:] = 0
    laid = tuple(scattered(a) for a in call(3, 5))
    return [
        Case(
            "no momentum",
            (*call(4, 3, v=0), 0.1, 0.0, 0.0),
            hint="θ - η g, and the velocity is the gradient.",
        ),
        Case(
            "the first step",
            (*call(5, v=0), 0.2, 0.9, 0.0),
            hint="The velocity was 0: the step is the same as without momentum.",
        ),
        Case(
            "momentum",
            (*call(3, 2), 0.1, 0.9, 0.0),
            hint="The old velocity counts 0.9 times, the gradient once.",
        ),
        Case(
            "momentum 0.5 and another rate",
            (*call(2, 6), 0.03, 0.5, 0.0),
            hint="μ and η are arguments.",
        ),
        Case(
            "decay without momentum",
            (*call(4, v=0), 0.1, 0.0, 0.3),
            hint="λθ is part of the gradient.",
        ),
        Case(
            "decay and momentum",
            (*call(2, 3), 0.1, 0.8, 0.3),
            hint="λθ goes into the velocity with the rest of the gradient.",
        ),
        Case(
            "no gradient",
            (*still, 0.1, 0.9, 0.0),
            hint="The gradient is 0, and the velocity rolls on.",
        ),
        Case(
            "three axes",
            (*call(2, 3, 4), 0.1, 0.9, 0.1),
            hint="Entry by entry, whatever the shape.",
        ),
        Case(
            "not contiguous in memory",
            (*laid, 0.1, 0.9, 0.1),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (*call(3, 4, dtype="float32"), 0.1, 0.9, 0.1),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _sgd_by_entry(
    param: Array,
    grad: Array,
    velocity: Array,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> tuple[Array, Array]:
    """One number at a time, each result as one exact sum."""
    new, rolled = np.empty(param.shape), np.empty(param.shape)
    for at in np.ndindex(param.shape):
        p, g, u = (float(a[at]) for a in (param, grad, velocity))
        rolled[at] = math.fsum((momentum * u, g, weight_decay * p))
        new[at] = math.fsum((p, -lr * momentum * u, -lr * g, -lr * weight_decay * p))
    return new, rolled


def _sgd_with(
    gradient: Callable[..., Any] | None = None,
    velocity: Callable[..., Any] | None = None,
    change: Callable[..., Any] | None = None,
) -> Answer:
    """The step with one of its three lines replaced."""

    def answer(param, grad, velocity_, lr, momentum=0.0, weight_decay=0.0):
        g = gradient(grad, param, weight_decay) if gradient else grad + weight_decay * param
        u = velocity(velocity_, g, momentum, lr) if velocity else momentum * velocity_ + g
        return (
            change(param, u, g, velocity_, lr, momentum, weight_decay)
            if change
            else param - lr * u,
            u,
        )

    return answer


SGD_STEP = Exercise(
    id="sgd_step",
    chapter=CHAPTER,
    title="A step of SGD with momentum",
    points=2,
    returns=("param", "velocity"),
    reference=optim.sgd_step,
    oracle=quiet(_sgd_by_entry),
    cases=_sgd_cases,
    mistakes=(
        *named(
            "gradient damped",
            "The gradient enters the velocity once, not 1 - μ times: that is the running mean of "
            "Adam, and makes the step shorter.",
            SGD,
            _sgd_with(velocity=lambda u, g, mu, lr: mu * u + (1 - mu) * g),
        ),
        *named(
            "learning rate in the velocity",
            "The velocity is made of gradients, and the learning rate stands outside it; inside, a "
            "schedule would reach old gradients with the old rate.",
            SGD,
            _sgd_with(
                velocity=lambda u, g, mu, lr: mu * u + lr * g,
                change=lambda p, u, g, old, lr, mu, d: p - u,
            ),
            _sgd_with(
                velocity=lambda u, g, mu, lr: mu * u - lr * g,
                change=lambda p, u, g, old, lr, mu, d: p + u,
            ),
        ),
        *named(
            "the old velocity moves the parameter",
            "The velocity is brought up to date first, and the new one moves the parameter.",
            SGD,
            _sgd_with(change=lambda p, u, g, old, lr, mu, d: p - lr * old),
        ),
        *named(
            "the velocity moves nothing",
            "The parameter is moved by the velocity, which holds the gradient already.",
            SGD,
            _sgd_with(change=lambda p, u, g, old, lr, mu, d: p - lr * g),
        ),
        *named(
            "momentum forgotten",
            "Of the old velocity μ times is kept: u = μ u + g.",
            SGD,
            _sgd_with(velocity=lambda u, g, mu, lr: g),
        ),
        *named(
            "all of the velocity kept",
            "Of the old velocity μ times is kept; all of it, and no step is ever forgotten.",
            SGD,
            _sgd_with(velocity=lambda u, g, mu, lr: u + g),
        ),
        *named(
            "Nesterov's step",
            "Asked for is the plain step, θ - η u; Nesterov's looks ahead with g + μ u.",
            SGD,
            _sgd_with(change=lambda p, u, g, old, lr, mu, d: p - lr * (g + mu * u)),
        ),
        *named(
            "decay forgotten",
            "weight_decay times the parameter is added to the gradient.",
            SGD,
            _sgd_with(gradient=lambda g, p, d: g),
        ),
        *named(
            "decay past the velocity",
            "In SGD the decay is part of the gradient and goes through the velocity; beside it, it "
            "is AdamW's.",
            ADAMW,
            _sgd_with(
                gradient=lambda g, p, d: g,
                change=lambda p, u, g, old, lr, mu, d: p - lr * u - lr * d * p,
            ),
        ),
        *named(
            "decay with the wrong sign",
            "The penalty λ/2 θ² has the gradient +λθ, which pulls the parameter to 0.",
            SGD,
            _sgd_with(gradient=lambda g, p, d: g - d * p),
        ),
        *named(
            "uphill",
            "The gradient points to larger loss: the step goes against it.",
            SGD,
            _sgd_with(change=lambda p, u, g, old, lr, mu, d: p + lr * u),
        ),
    ),
)


# --- adamw_step ---------------------------------------------------------------------------------


def _moments(rng: Rng, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A mean of gradients, and a mean of squares that is no less than its square."""
    m = rng.normal(size=shape)
    return m, m**2 + rng.uniform(0.2, 2, shape)


def _adamw_cases(rng: Rng) -> list[Case]:
    def call(*shape: int, fresh: bool = False) -> list[Array]:
        m, v = _moments(rng, shape)
        zero = np.zeros(shape)
        moments = (zero, zero.copy()) if fresh else (m, v)
        return [rng.normal(size=shape), rng.normal(size=shape), *moments]

    def tiny(scale: float) -> list[Array]:
        arrays = call(3, 4, fresh=True)
        arrays[1] = scale * (1 + rng.random((3, 4))) * rng.choice([-1.0, 1.0], (3, 4))
        return arrays

    untouched = call(2, 5, fresh=True)
    untouched[1] = np.zeros((2, 5))
    resting = call(2, 5)
    resting[1] = np.zeros((2, 5))
    single = [a.astype("float32") for a in call(3, 4)]
    laid = [scattered(a) for a in call(3, 5)]
    return [
        Case(
            "step 1",
            (*call(3, 4, fresh=True), 1, 0.01, BETAS, SMALL, 0.1),
            hint="The moments were 0. After the correction m̂ is the gradient and v̂ its square: "
            "the step has length η in every entry.",
        ),
        Case(
            "step 2",
            (*call(2, 3), 2, 0.02, BETAS, SMALL, 0.1),
            hint="Both corrections are still large: 0.19 and 0.002.",
        ),
        Case(
            "step 1000",
            (*call(3, 2), 1000, 0.01, BETAS, SMALL, 0.1),
            hint="β1's correction is over; β2's is 1 - 0.999^1000 = 0.63.",
        ),
        Case(
            "step 100000",
            (*call(4, 3), 100_000, 0.01, BETAS, SMALL, 0.1),
            hint="Both corrections are 1.",
        ),
        Case(
            "no decay",
            (*call(5), 7, 0.03, BETAS, SMALL, 0.0),
            hint="weight_decay is 0: this is Adam.",
        ),
        Case(
            "large decay",
            (*call(2, 4), 3, 0.1, BETAS, SMALL, 2.0),
            hint="η λ is 0.2: a fifth of the parameter goes.",
        ),
        Case(
            "tiny gradient",
            (*tiny(1e-8), 1, 0.05, BETAS, SMALL, 0.0),
            hint="The gradient is as small as eps = 1e-8, which is now half of the denominator: "
            "where it stands decides.",
        ),
        Case(
            "large eps",
            (*call(3, 3), 5, 0.1, BETAS, 0.1, 0.1),
            hint="eps is an argument, and large enough here to be seen.",
        ),
        Case(
            "other betas",
            (*call(2, 3), 4, 0.05, (0.8, 0.95), SMALL, 0.1),
            hint="β1 = 0.8 belongs to m, β2 = 0.95 to v.",
        ),
        Case(
            "never a gradient",
            (*untouched, 1, 0.1, BETAS, SMALL, 0.1),
            hint="Only the decay is left: θ becomes (1 - ηλ)θ.",
        ),
        Case(
            "zero gradient after others",
            (*resting, 20, 0.1, BETAS, SMALL, 0.1),
            hint="The moments fade by their betas, and m still moves the parameter.",
        ),
        Case(
            "not contiguous in memory",
            (*laid, 6, 0.1, BETAS, SMALL, 0.1),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (*single, 9, 0.1, BETAS, SMALL, 0.1),
            hint="Single precision in; single or double precision out.",
        ),
        Case(
            "defaults",
            (*call(3), 3, 0.01),
            hint="betas (0.9, 0.999), eps 1e-8, weight_decay 0.01 where nothing is said.",
        ),
    ]


def _adamw_by_entry(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    betas: tuple[float, float] = BETAS,
    eps: float = SMALL,
    weight_decay: float = 0.01,
) -> tuple[Array, Array, Array]:
    """One number at a time, in extended precision, the corrections by their logarithms."""
    wide = np.longdouble
    first, second = (wide(b) for b in betas)
    corrections = [-np.expm1(step * np.log(b)) for b in (first, second)]
    out = [np.empty(param.shape) for _ in range(3)]
    for at in np.ndindex(param.shape):
        p, g, mean, square = (wide(a[at]) for a in (param, grad, m, v))
        mean += (1 - first) * (g - mean)
        square += (1 - second) * (g * g - square)
        ratio = mean / corrections[0] / ((square / corrections[1]) ** wide(0.5) + eps)
        out[0][at] = p - lr * ratio - lr * weight_decay * p
        out[1][at], out[2][at] = mean, square
    return out[0], out[1], out[2]


class _Adam:
    """A right AdamW step, line by line; a mistake overrides a line."""

    def gradient(self, g, p, decay):
        return g

    def first(self, m, g, b1):
        return b1 * m + (1 - b1) * g

    def second(self, v, g, b2):
        return b2 * v + (1 - b2) * g**2

    def step(self, t):
        return t

    def mhat(self, m, b1, t):
        return m / (1 - b1**t)

    def vhat(self, v, b2, t):
        return v / (1 - b2**t)

    def ratio(self, mhat, vhat, eps, correction):
        return mhat / (np.sqrt(vhat) + eps)

    def moved(self, p, ratio, lr, decay):
        return p - lr * decay * p - lr * ratio

    def returned(self, p, m, v, mhat, vhat):
        return p, m, v


def _adamw_with(**lines: Callable[..., Any]) -> Answer:
    parts: Any = _Adam()
    for name, line in lines.items():
        setattr(parts, name, line)

    def answer(param, grad, m, v, step, lr, betas=BETAS, eps=SMALL, weight_decay=0.01):
        b1, b2 = betas
        g = parts.gradient(grad, param, weight_decay)
        m, v, t = parts.first(m, g, b1), parts.second(v, g, b2), parts.step(step)
        correction = (np.float64(1 - b1**t), np.float64(1 - b2**t))
        mhat, vhat = parts.mhat(m, np.float64(b1), t), parts.vhat(v, np.float64(b2), t)
        ratio = parts.ratio(mhat, vhat, eps, correction)
        return parts.returned(parts.moved(param, ratio, lr, weight_decay), m, v, mhat, vhat)

    return answer


def _decay_of_the_updated(p, ratio, lr, decay):
    new = p - lr * ratio
    return new - lr * decay * new


def _uncorrected(x, b, t):
    return x


# name, why, section, the lines that are wrong (one dict a way)
Lines = tuple[str, str, str, tuple[dict[str, Callable[..., Any]], ...]]

ADAMW_MISTAKES: tuple[Lines, ...] = (
    (
        "L2 in the moments",
        "In AdamW the decay bypasses the moments; added to the gradient it is divided by √v̂ like "
        "everything else, and weights with large gradients hardly decay.",
        ADAMW,
        (
            {
                "gradient": lambda g, p, decay: g + decay * p,
                "moved": lambda p, ratio, lr, decay: p - lr * ratio,
            },
        ),
    ),
    (
        "decay twice",
        "The decay is taken from the parameter, and only from there: in the gradient it would "
        "count again.",
        ADAMW,
        ({"gradient": lambda g, p, decay: g + decay * p},),
    ),
    (
        "no bias correction",
        "The moments start at 0: after t steps they hold only 1 - β^t of a mean, which is divided "
        "out. Without it the first step is 3.16 times too long.",
        BIAS,
        ({"mhat": _uncorrected, "vhat": _uncorrected},),
    ),
    (
        "first moment not corrected",
        "Both moments are corrected, m by 1 - β1^t and v by 1 - β2^t.",
        BIAS,
        ({"mhat": _uncorrected},),
    ),
    (
        "second moment not corrected",
        "Both moments are corrected, m by 1 - β1^t and v by 1 - β2^t.",
        BIAS,
        ({"vhat": _uncorrected},),
    ),
    (
        "corrections exchanged",
        "m is divided by 1 - β1^t and v by 1 - β2^t, each by its own.",
        BIAS,
        (
            {
                "mhat": lambda m, b, t: m,
                "vhat": lambda v, b, t: v,
                "ratio": lambda m, v, eps, c: m / c[1] / (np.sqrt(v / c[0]) + eps),
            },
        ),
    ),
    (
        "correction with t, not with a power",
        "The corrections are 1 - β to the power of t.",
        BIAS,
        (
            {
                "mhat": lambda m, b, t: m / (1 - b),
                "vhat": lambda v, b, t: v / (1 - b),
            },
            {
                "mhat": lambda m, b, t: m / (1 - b * t),
                "vhat": lambda v, b, t: v / (1 - b * t),
            },
        ),
    ),
    (
        "step off by one",
        "Steps count from 1: the first update is corrected by 1 - β^1.",
        BIAS,
        ({"step": lambda t: t + 1}, {"step": lambda t: t - 1}),
    ),
    (
        "decay on the updated weight",
        "The decay is of the parameter as it came in; taken from the updated one it is off by "
        "η²λ times the step.",
        ADAMW,
        ({"moved": _decay_of_the_updated},),
    ),
    (
        "decay not scaled by the learning rate",
        "As in torch, a step's decay is η λ: weight_decay times the learning rate.",
        ADAMW,
        ({"moved": lambda p, ratio, lr, decay: p - decay * p - lr * ratio},),
    ),
    (
        "decay forgotten",
        "weight_decay pulls the parameter to 0: θ loses η λ θ in every step.",
        ADAMW,
        ({"moved": lambda p, ratio, lr, decay: p - lr * ratio},),
    ),
    (
        "decay with the wrong sign",
        "The decay makes the parameter smaller.",
        ADAMW,
        ({"moved": lambda p, ratio, lr, decay: p + lr * decay * p - lr * ratio},),
    ),
    (
        "eps inside the root",
        "eps is added to √v̂. Under the root its place is that of a squared gradient, and 1e-8 is "
        "no longer small: a gradient of 1e-8 moves 5000 times too little.",
        EPS,
        ({"ratio": lambda m, v, eps, c: m / np.sqrt(v + eps)},),
    ),
    (
        "eps before the correction",
        "eps is added to √v̂, after the correction; added to √v it is larger by 1/√(1 - β2^t), 32 "
        "times in the first step.",
        EPS,
        (
            {
                "ratio": lambda m, v, eps, c: m * np.sqrt(c[1]) / (np.sqrt(v * c[1]) + eps),
            },
        ),
    ),
    (
        "eps forgotten",
        "Without eps a parameter that never had a gradient is divided 0 by 0, and the smallest "
        "gradients take whole steps.",
        EPS,
        ({"ratio": lambda m, v, eps, c: m / np.sqrt(v)},),
    ),
    (
        "eps fixed",
        "eps is an argument: 1e-8 is only its default.",
        EPS,
        ({"ratio": lambda m, v, eps, c: m / (np.sqrt(v) + SMALL)},),
    ),
    (
        "root forgotten",
        "m̂ is divided by the root of v̂: else the step would have the unit of 1/gradient.",
        ADAM,
        ({"ratio": lambda m, v, eps, c: m / (v + eps)},),
    ),
    (
        "gradient not squared",
        "v is the running mean of the squared gradient.",
        ADAM,
        ({"second": lambda v, g, b: b * v + (1 - b) * g},),
    ),
    (
        "square of the mean",
        "v is the running mean of the gradient's square, not the square of m.",
        ADAM,
        (
            {
                "second": lambda v, g, b: b * v + (1 - b) * np.abs(g),
            },
        ),
    ),
    (
        "sum in place of a mean",
        "A running mean: β of the old and 1 - β of the new.",
        ADAM,
        (
            {
                "first": lambda m, g, b: b * m + g,
                "second": lambda v, g, b: b * v + g**2,
            },
            {"first": lambda m, g, b: b * m + g},
            {"second": lambda v, g, b: b * v + g**2},
        ),
    ),
    (
        "β and 1 - β exchanged",
        "β of the old moment is kept and 1 - β of the new gradient is added.",
        ADAM,
        (
            {
                "first": lambda m, g, b: (1 - b) * m + b * g,
                "second": lambda v, g, b: (1 - b) * v + b * g**2,
            },
        ),
    ),
    (
        "corrected moments returned",
        "m and v go on uncorrected into the next step, which corrects with its own t.",
        BIAS,
        ({"returned": lambda p, m, v, mhat, vhat: (p, mhat, vhat)},),
    ),
    (
        "uphill",
        "The step goes against the gradient.",
        ADAM,
        ({"moved": lambda p, ratio, lr, decay: p - lr * decay * p + lr * ratio},),
    ),
)


def _betas_exchanged(param, grad, m, v, step, lr, betas=BETAS, eps=SMALL, weight_decay=0.01):
    return _adamw_with()(param, grad, m, v, step, lr, betas[::-1], eps, weight_decay)


def _old_moments(param, grad, m, v, step, lr, betas=BETAS, eps=SMALL, weight_decay=0.01):
    new, _, _ = _adamw_with()(param, grad, m, v, step, lr, betas, eps, weight_decay)
    return new, m, v


ADAMW_STEP = Exercise(
    id="adamw_step",
    chapter=CHAPTER,
    title="A step of AdamW",
    points=3,
    returns=("param", "m", "v"),
    reference=optim.adamw_step,
    oracle=quiet(_adamw_by_entry),
    cases=_adamw_cases,
    mistakes=(
        *(
            mistake
            for name, why, section, ways in ADAMW_MISTAKES
            for mistake in named(name, why, section, *(_adamw_with(**way) for way in ways))
        ),
        *named(
            "betas exchanged",
            "β1 = 0.9 belongs to m, β2 = 0.999 to v: betas = (β1, β2).",
            ADAM,
            _betas_exchanged,
        ),
        *named(
            "moments not passed on",
            "The new m and v are returned: the next step needs them.",
            ADAM,
            _old_moments,
        ),
    ),
)


# --- model_adamw_step ---------------------------------------------------------------------------


def model_adamw_step(
    params: Arrays,
    grads: Arrays,
    m: Arrays,
    v: Arrays,
    step: int,
    lr: float,
    weight_decay: float = 0.01,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The library's step of a whole model, with its state in three arguments."""
    state = optim.AdamState(step - 1, dict(m), dict(v))
    new, state = optim.adamw_update(params, grads, state, lr, weight_decay=weight_decay)
    return new, state.m, state.v


BLOCK = {
    "self_attn.wq": (4, 4),
    "self_attn.bq": (4,),
    "linear1.weight": (4, 6),
    "linear1.bias": (6,),
    "norm1.weight": (4,),
    "norm1.bias": (4,),
}
Shapes = Mapping[str, tuple[int, ...]]


def _model_cases(rng: Rng) -> list[Case]:
    def call(shapes: Shapes, *rest: Any, dtype: str = "float64") -> tuple[Any, ...]:
        both = {n: _moments(rng, s) for n, s in shapes.items()}
        dicts: list[dict[str, Array]] = [
            {n: rng.normal(size=s) for n, s in shapes.items()} for _ in range(2)
        ]
        dicts += [{n: pair[i] for n, pair in both.items()} for i in range(2)]
        return (*({n: a.astype(dtype) for n, a in d.items()} for d in dicts), *rest)

    def fresh(params: Any, grads: Any, m: Any, v: Any, *rest: Any) -> tuple[Any, ...]:
        zero = ({n: np.zeros_like(a) for n, a in d.items()} for d in (m, v))
        return (params, grads, *zero, *rest)

    embedded = {"embed.weight": (7, 4), "position.weight": (5, 4)} | BLOCK
    return [
        Case(
            "one projection",
            call({"linear1.weight": (3, 5)}, 4, 0.1, 0.5),
            hint="One matrix, which decays: adamw_step as it is.",
        ),
        Case(
            "a projection and its bias",
            call({"linear1.weight": (3, 5), "linear1.bias": (5,)}, 4, 0.1, 0.5),
            hint="The matrix decays, its bias does not.",
        ),
        Case(
            "attention and its biases",
            call({"self_attn.wq": (4, 4), "self_attn.bq": (4,)}, 4, 0.1, 0.5),
            hint="wq decays, though its name says no weight; bq does not.",
        ),
        Case(
            "a norm",
            call({"norm1.weight": (5,), "norm1.bias": (5,), "head.weight": (5, 2)}, 4, 0.1, 0.5),
            hint="norm1.weight is a gain, with one axis: it does not decay.",
        ),
        Case(
            "an embedding",
            call({"embed.weight": (6, 3), "head.weight": (3, 6)}, 4, 0.1, 0.5),
            hint="Rows of an embedding are looked up: it does not decay, though it is a matrix.",
        ),
        Case(
            "learned positions",
            call({"position.weight": (6, 3), "head.weight": (3, 2)}, 4, 0.1, 0.5),
            hint="A table of positions is an embedding too.",
        ),
        Case("a whole model", call(embedded, 12, 0.1, 0.5), hint="Eight parameters, two decay."),
        Case(
            "step 1",
            fresh(*call(embedded, 1, 0.1, 0.5)),
            hint="All parameters take step 1 together.",
        ),
        Case("no decay", call(BLOCK, 3, 0.1, 0.0), hint="weight_decay is 0."),
        Case(
            "a matrix with one row",
            call({"linear1.weight": (1, 4), "linear1.bias": (4,)}, 3, 0.1, 0.5),
            hint="It has two axes: it decays.",
        ),
        Case(
            "float32 input",
            call(BLOCK, 3, 0.1, 0.5, dtype="float32"),
            hint="Single precision in; single or double precision out.",
        ),
    ]


SPARED = ("embed", "position")


def _decays(name: str, param: Array) -> bool:
    return np.ndim(param) > 1 and not any(word in name for word in SPARED)


def _model_with(
    decays: Callable[[str, Array], bool] = _decays,
    one: Answer | None = None,
    step: Callable[[int, int], int] = lambda step, place: step,
) -> Answer:
    """Each parameter's step by itself, with a rule of what decays."""
    one_step = one or _adamw_with()

    def answer(params, grads, m, v, step_, lr, weight_decay=0.01):
        out: tuple[dict[str, Array], ...] = ({}, {}, {})
        for place, (name, param) in enumerate(params.items()):
            share = weight_decay if decays(name, param) else 0.0
            stepped = one_step(
                param,
                grads[name],
                m[name],
                v[name],
                step(step_, place),
                lr,
                BETAS,
                SMALL,
                share,
            )
            for part, array in zip(out, stepped, strict=True):
                part[name] = array
        return out

    return answer


def _model_old_moments(params, grads, m, v, step, lr, weight_decay=0.01):
    return _model_with()(params, grads, m, v, step, lr, weight_decay)[0], m, v


CARRIED = (
    "L2 in the moments",
    "no bias correction",
    "decay on the updated weight",
    "decay not scaled by the learning rate",
    "decay with the wrong sign",
    "step off by one",
    "corrected moments returned",
    "sum in place of a mean",
)


def _carried_steps() -> tuple[Mistake, ...]:
    """Mistakes of adamw_step as they show in a whole model."""
    return tuple(
        carried(mistake, "adamw_step", quiet(_model_with(one=_adamw_with(**way))))
        for name, why, section, ways in ADAMW_MISTAKES
        if name in CARRIED
        for way in ways
        for mistake in named(name, why, section, _adamw_with(**way))
    )


MODEL_ADAMW_STEP = Exercise(
    id="model_adamw_step",
    chapter=CHAPTER,
    title="A step of a whole model, with decay for some",
    points=2,
    returns=("params", "m", "v"),
    reference=model_adamw_step,
    oracle=quiet(_model_with(one=_adamw_by_entry)),
    cases=_model_cases,
    mistakes=(
        *named(
            "everything decays",
            "Decay is meant for the matrices of projections; biases, gains of norms and embeddings "
            "are left alone.",
            GROUPS,
            _model_with(lambda name, param: True),
        ),
        *named(
            "nothing decays",
            "The matrices of projections decay.",
            GROUPS,
            _model_with(lambda name, param: False),
        ),
        *named(
            "embeddings decay",
            "The tables of tokens and positions are matrices, but their rows are looked up, not "
            "multiplied by: a token that did not occur would shrink all the same.",
            GROUPS,
            _model_with(lambda name, param: np.ndim(param) > 1),
        ),
        *named(
            "positions decay",
            "The table of positions is an embedding like that of the tokens.",
            GROUPS,
            _model_with(lambda name, param: np.ndim(param) > 1 and "embed" not in name),
        ),
        *named(
            "gains of norms decay",
            "A norm's weight is its gain, one number a channel, whose natural value is 1 and not "
            "0: by the number of axes it is told from a matrix.",
            GROUPS,
            _model_with(
                lambda name, param: (
                    _decays(name, param) or ("norm" in name and name.endswith("weight"))
                )
            ),
            _model_with(
                lambda name, param: (
                    not (name.endswith("bias") or name.rpartition(".")[2].startswith("b"))
                )
            ),
            _model_with(
                lambda name, param: (
                    not (name.endswith("bias") or name.rpartition(".")[2].startswith("b"))
                    and not any(word in name for word in SPARED)
                )
            ),
        ),
        *named(
            "decay by the name “weight”",
            "What decays has two axes and is no embedding: attention's matrices are called wq … "
            "wo, and a norm's gain is called weight.",
            GROUPS,
            _model_with(lambda name, param: name.endswith("weight")),
            _model_with(
                lambda name, param: (
                    name.endswith("weight") and not any(word in name for word in SPARED)
                )
            ),
            _model_with(lambda name, param: name.endswith("weight") and _decays(name, param)),
        ),
        *named(
            "the others decay",
            "Decay is for the matrices of projections, not for the rest.",
            GROUPS,
            _model_with(lambda name, param: not _decays(name, param)),
        ),
        *named(
            "the step counts parameters",
            "A step is one update of the whole model: all parameters share the same t.",
            BIAS,
            _model_with(step=lambda step, place: step + place),
        ),
        *named(
            "moments not passed on",
            "The new moments of every parameter are returned: the next step needs them.",
            ADAM,
            _model_old_moments,
        ),
        *_carried_steps(),
    ),
)


# --- clip_by_global_norm ------------------------------------------------------------------------

# torch divides by the norm plus 1e-6. With norms of 1 or more, which all clipped cases have, that
# is a millionth: both ways are right. What is not clipped has to come back to the last digits.
EITHER_WAY = 2e-6


def _clip_cases(rng: Rng) -> list[Case]:
    def call(*shapes: tuple[int, ...], length: float = 5.0) -> dict[str, Array]:
        grads = {name: rng.normal(size=s) for name, s in zip("wbgu", shapes, strict=False)}
        total = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        return {name: length / total * g for name, g in grads.items()}

    def spoiled(value: float, **grads: Array) -> dict[str, Array]:
        name = str(rng.choice(list(grads)))
        flat = grads[name].reshape(-1)
        flat[rng.integers(len(flat))] = value
        return grads

    uneven = call((3, 4), (4,), (2,))
    uneven["w"] *= 10
    small = {n: 0.05 * g for n, g in call((3, 2), (2,)).items()}
    laid = {n: scattered(g) for n, g in call((3, 4), (4, 2)).items()}
    single = {n: g.astype("float32") for n, g in call((3, 4), (4,)).items()}
    return [
        Case(
            "one long gradient",
            (call((3, 4)), 1.0),
            hint="Of length 5: every entry is divided by 5.",
            rtol=EITHER_WAY,
        ),
        Case(
            "several long gradients",
            (call((3, 4), (4,), (2, 3)), 1.0),
            hint="One factor for all, from the length of all of them together.",
            rtol=EITHER_WAY,
        ),
        Case(
            "one much longer than the others",
            (uneven, 2.0),
            hint="The short ones are shortened too, by the same factor: the direction stays.",
            rtol=EITHER_WAY,
        ),
        Case(
            "short one by one and long together",
            (call((2,), (2,), (3,), (2,), length=1.5), 1.2),
            hint="It is the length of all together that counts.",
            rtol=EITHER_WAY,
        ),
        Case(
            "short enough",
            (call((3, 4), (4,), length=0.6), 2.5),
            hint="Below max_norm nothing is changed, and the norm is reported all the same.",
        ),
        Case(
            "very short",
            (small, 10.0),
            hint="Gradients are never made longer.",
        ),
        Case(
            "all zero",
            ({"w": np.zeros((2, 3)), "b": np.zeros(3)}, 1.0),
            hint="The norm is 0, and nothing may be divided by it.",
        ),
        Case(
            "an infinite entry",
            (spoiled(float(rng.choice([-np.inf, np.inf])), **call((2, 3), (3,))), 1.0),
            hint="inf times 0 is NaN: the gradients come back as they are, with norm inf, and the "
            "caller skips the step.",
        ),
        Case(
            "an entry that is NaN",
            (spoiled(np.nan, **call((2, 3), (3,))), 1.0),
            hint="The gradients come back as they are, with norm NaN; no entry is made NaN that "
            "was none.",
        ),
        Case(
            "no limit",
            (call((2, 3), (3,)), np.inf),
            hint="max_norm is inf: the norm is all that is asked for.",
        ),
        Case(
            "not contiguous in memory",
            (laid, 1.5),
            hint="The same numbers in another memory order.",
            rtol=EITHER_WAY,
        ),
        Case(
            "float32 input",
            (single, 1.5),
            hint="Single precision in; single or double precision out.",
            rtol=1e-5,
        ),
    ]


def _clip_by_hypot(grads: Arrays, max_norm: float) -> tuple[dict[str, Array], float]:
    """Lengths by math.hypot over all entries, in place of a root of sums of squares."""
    entries = [float(x) for g in grads.values() for x in np.ravel(g)]
    # hypot says inf of (inf, NaN); a NaN is to be seen.
    norm = math.nan if any(map(math.isnan, entries)) else math.hypot(*entries)
    longer = (norm + optim.CLIP_EPS) / max_norm
    if not math.isfinite(norm) or longer <= 1:
        return {n: np.array(g, dtype=float) for n, g in grads.items()}, norm
    return {n: np.asarray(g, float) / longer for n, g in grads.items()}, norm


def _lengths(grads: Arrays) -> dict[str, Any]:
    return {n: np.sqrt(np.sum(np.asarray(g, float) ** 2)) for n, g in grads.items()}


def _global(grads: Arrays) -> Any:
    return np.sqrt(sum(x**2 for x in _lengths(grads).values()))


def _shortened(
    norm: Callable[[Arrays], Any] = _global,
    factor: Callable[[Any, float], Any] = lambda norm, limit: np.minimum(1, limit / norm),
    guarded: bool = True,
) -> Answer:
    """One factor for all; guarded leaves what is not finite as it came, like all zeros."""

    def answer(grads, max_norm):
        length = norm(grads)
        if guarded and (not np.isfinite(length) or length == 0):
            return dict(grads), length
        scale = factor(length, max_norm)
        return {n: g * scale for n, g in grads.items()}, length

    return answer


def _per_tensor(reported: Callable[[Arrays], Any]) -> Answer:
    def answer(grads, max_norm):
        lengths = _lengths(grads)
        factors = {n: max_norm / x if x > max_norm else 1.0 for n, x in lengths.items()}
        if not np.isfinite(_global(grads)):
            factors = dict.fromkeys(grads, 1.0)
        return {n: g * factors[n] for n, g in grads.items()}, reported(grads)

    return answer


def _by_value(grads, max_norm):
    length = _global(grads)
    if not np.isfinite(length):
        return dict(grads), length
    return {n: np.clip(g, -max_norm, max_norm) for n, g in grads.items()}, length


def _emptied(grads, max_norm):
    length = _global(grads)
    if not np.isfinite(length):
        return {n: np.zeros_like(g) for n, g in grads.items()}, length
    return _shortened()(grads, max_norm)


def _mended(grads, max_norm):
    clean = {n: np.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for n, g in grads.items()}
    return _shortened()(clean, max_norm)[0], _global(grads)


def _cleaned(grads, max_norm):
    clean = {n: np.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for n, g in grads.items()}
    return _shortened()(clean, max_norm)


def _norm_afterwards(grads, max_norm):
    clipped, _ = _shortened()(grads, max_norm)
    return clipped, _global(clipped)


def _norm_of_the_largest(grads: Arrays) -> Any:
    return max(_lengths(grads).values())


CLIP_BY_GLOBAL_NORM = Exercise(
    id="clip_by_global_norm",
    chapter=CHAPTER,
    title="Clipping by the global norm",
    points=2,
    returns=("grads", "norm"),
    reference=optim.clip_by_global_norm,
    oracle=quiet(_clip_by_hypot),
    cases=_clip_cases,
    mistakes=(
        *named(
            "per tensor",
            "There is one length, that of all gradients taken as one vector, and one factor; with "
            "a factor each, the direction is lost.",
            CLIPPING,
            _per_tensor(_global),
            _per_tensor(_norm_of_the_largest),
        ),
        *named(
            "scaled up when below",
            "The factor is at most 1: a short gradient is not made longer.",
            CLIPPING,
            _shortened(factor=lambda norm, limit: limit / norm if limit < np.inf else 1.0),
            _shortened(factor=lambda norm, limit: limit / norm),
            _shortened(factor=lambda norm, limit: limit / norm, guarded=False),
        ),
        *named(
            "scaled where the norm is not finite",
            "With norm inf the factor is 0 and inf times 0 is NaN; with norm NaN everything turns "
            "NaN. Such gradients come back as they are, and the norm says that the step is to be "
            "skipped.",
            CLIPPING,
            _shortened(
                factor=lambda norm, limit: np.minimum(1, limit / (norm + 1e-6)), guarded=False
            ),
            _shortened(
                factor=lambda norm, limit: limit / norm if norm > limit else 1.0, guarded=False
            ),
            _shortened(factor=lambda norm, limit: min(1.0, limit / (norm + 1e-6)), guarded=False),
        ),
        *named(
            "gradients of a bad step set to 0",
            "A gradient of 0 still decays the weights and fades the moments: the caller has to see "
            "what came, and skip.",
            CLIPPING,
            _emptied,
        ),
        *named(
            "bad entries replaced",
            "Taking inf and NaN out hides that the step is worthless.",
            CLIPPING,
            _mended,
            _cleaned,
        ),
        *named(
            "clipped by value",
            "Entries are not cut off at ±max_norm, which turns the gradient: all are shortened by "
            "one factor.",
            CLIPPING,
            _by_value,
        ),
        *named(
            "root forgotten",
            "The norm is the root of the sum of squares.",
            CLIPPING,
            _shortened(norm=lambda grads: _global(grads) ** 2),
            _shortened(norm=lambda grads: _global(grads) ** 2, guarded=False),
        ),
        *named(
            "lengths added",
            "Lengths add up as squares: √(‖a‖² + ‖b‖²), not ‖a‖ + ‖b‖.",
            CLIPPING,
            _shortened(norm=lambda grads: sum(_lengths(grads).values())),
            _shortened(norm=lambda grads: sum(_lengths(grads).values()), guarded=False),
        ),
        *named(
            "the longest gradient's norm",
            "The norm is that of all gradients together.",
            CLIPPING,
            _shortened(norm=_norm_of_the_largest),
            _shortened(norm=_norm_of_the_largest, guarded=False),
        ),
        *named(
            "the largest entry as norm",
            "The norm is Euclidean, the root of the sum of squares of all entries.",
            CLIPPING,
            _shortened(norm=lambda grads: max(np.abs(g).max() for g in grads.values())),
            _shortened(
                norm=lambda grads: max(np.abs(g).max() for g in grads.values()), guarded=False
            ),
        ),
        *named(
            "norm after clipping",
            "The norm that is returned is the one from before: after clipping it says nothing.",
            CLIPPING,
            _norm_afterwards,
        ),
        *named(
            "divided by the norm only",
            "The clipped length is max_norm, not 1.",
            CLIPPING,
            _shortened(factor=lambda norm, limit: 1 / norm if norm > limit else 1.0),
            _shortened(factor=lambda norm, limit: 1 / norm if norm > limit else 1.0, guarded=False),
        ),
    ),
)


# --- warmup_inverse_sqrt ------------------------------------------------------------------------


def _inverse_sqrt_cases(rng: Rng) -> list[Case]:
    d, w = int(rng.choice([48, 96, 320, 512])), int(rng.choice([300, 700, 4000]))
    return [
        Case("step 1", (1, d, w), hint="The first step up: d^-½ w^-1½."),
        Case("half-way up", (w // 2, d, w), hint="Half the peak."),
        Case("the last step up", (w - 1, d, w), hint="One step before the peak."),
        Case("the peak", (w, d, w), hint="At step = warmup both sides are (d w)^-½."),
        Case("just over the peak", (w + 1, d, w), hint="Downhill, and still close to the peak."),
        Case("four times the warm-up", (4 * w, d, w), hint="Half the peak again."),
        Case("far out", (50 * w, d, w), hint="d^-½ t^-½, which does not depend on the warm-up."),
        Case("a narrow model", (int(w * 0.7), 3, w), hint="d is 3: the peak is higher."),
        Case("width 1", (int(rng.integers(20, 90)), 1, 10), hint="d is 1."),
        Case("warm-up of one step", (int(rng.integers(2, 9)), d, 1), hint="warmup is 1."),
    ]


def _inverse_sqrt_by_logarithms(step: int, d_model: int, warmup: int) -> float:
    """The two branches by their logarithms, told apart by the step."""
    if step < warmup:
        return math.exp(math.log(step) - 1.5 * math.log(warmup) - math.log(d_model) / 2)
    return math.exp(-(math.log(step) + math.log(d_model)) / 2)


def _noam(step: float, d: float, w: float) -> float:
    return d**-0.5 * min(step**-0.5, step * w**-1.5)


WARMUP_INVERSE_SQRT = Exercise(
    id="warmup_inverse_sqrt",
    chapter=CHAPTER,
    title="Warm-up, then one over the root",
    points=1,
    returns=("lr",),
    reference=optim.warmup_inverse_sqrt,
    oracle=quiet(_inverse_sqrt_by_logarithms),
    cases=_inverse_sqrt_cases,
    mistakes=(
        *named(
            "off by one",
            "Steps count from 1, and the peak is at step = warmup.",
            WARMUP,
            lambda step, d_model, warmup: _noam(step + 1, d_model, warmup),
            lambda step, d_model, warmup: _noam(np.float64(step - 1), d_model, warmup),
            lambda step, d_model, warmup: _noam(step, d_model, warmup + 1),
        ),
        *named(
            "discontinuous at the join",
            "Both sides have to meet at step = warmup: t w^-1½ is w^-½ there, as t^-½ is.",
            WARMUP,
            lambda step, d_model, warmup: (
                d_model**-0.5 * (step / warmup if step < warmup else step**-0.5)
            ),
            lambda step, d_model, warmup: (
                d_model**-0.5 * (step / warmup if step <= warmup else step**-0.5)
            ),
            lambda step, d_model, warmup: (
                d_model**-0.5 * (step * warmup**-1.5 if step <= warmup else (step - warmup) ** -0.5)
            ),
        ),
        *named(
            "width forgotten",
            "The factor d^-½ makes wider models learn more slowly.",
            WARMUP,
            lambda step, d_model, warmup: _noam(step, 1, warmup),
        ),
        *named(
            "wrong power of the width",
            "The width enters as d^-½.",
            WARMUP,
            lambda step, d_model, warmup: d_model**0.5 * _noam(step, 1, warmup),
            lambda step, d_model, warmup: _noam(step, 1, warmup) / d_model,
        ),
        *named(
            "the larger of the two",
            "The smaller of t^-½ and t w^-1½: the warm-up holds down what would be too large.",
            WARMUP,
            lambda step, d_model, warmup: d_model**-0.5 * max(step**-0.5, step * warmup**-1.5),
        ),
        *named(
            "no warm-up",
            "Up to step = warmup the rate grows with the step.",
            WARMUP,
            lambda step, d_model, warmup: d_model**-0.5 * step**-0.5,
        ),
        *named(
            "peak of 1",
            "The peak is (d w)^-½: nothing has to be multiplied by afterwards.",
            WARMUP,
            lambda step, d_model, warmup: min(step / warmup, (warmup / step) ** 0.5),
        ),
        *named(
            "wrong power of the warm-up",
            "t is multiplied by w^-1½, so that both sides meet at t = w.",
            WARMUP,
            lambda step, d_model, warmup: d_model**-0.5 * min(step**-0.5, step * warmup**-0.5),
            lambda step, d_model, warmup: d_model**-0.5 * min(step**-0.5, step * warmup**-1.0),
        ),
        *named(
            "constant after the warm-up",
            "From step = warmup on the rate falls as t^-½.",
            WARMUP,
            lambda step, d_model, warmup: _noam(min(step, warmup), d_model, warmup),
        ),
    ),
)


# --- warmup_cosine ------------------------------------------------------------------------------


def _cosine_cases(rng: Rng) -> list[Case]:
    w, more = int(rng.choice([40, 60, 100])), int(rng.choice([400, 600, 1000]))
    peak, floor = float(rng.uniform(1e-3, 1e-2)), float(rng.uniform(1e-4, 5e-4))
    total = w + more
    return [
        Case("step 0", (0, peak, w, total), hint="The warm-up begins at 0."),
        Case("step 1", (1, peak, w, total), hint="One w-th of the peak."),
        Case("half-way up", (w // 2, peak, w, total), hint="Half the peak."),
        Case("the last step up", (w - 1, peak, w, total), hint="One step before the peak."),
        Case("the peak", (w, peak, w, total), hint="At step = warmup both sides are the peak."),
        Case("just over the peak", (w + 1, peak, w, total), hint="A cosine begins flat."),
        Case("a quarter down", (w + more // 4, peak, w, total), hint="(1 + cos 45°)/2 of it."),
        Case("half-way down", (w + more // 2, peak, w, total), hint="Half the peak."),
        Case(
            "the last step but one",
            (total - 1, peak, w, total),
            hint="Nearly 0.",
            rtol=1e-9,  # 1 + cos cancels here
        ),
        Case(
            "step 0 with a floor",
            (0, peak, w, total, floor),
            hint="The warm-up begins at 0, below the floor.",
        ),
        Case(
            "going up with a floor",
            (w // 3, peak, w, total, floor),
            hint="The floor belongs to the way down; the warm-up begins at 0.",
        ),
        Case(
            "half-way down to a floor",
            (w + more // 2, peak, w, total, floor),
            hint="Half-way between peak and floor.",
        ),
        Case("the end on a floor", (total, peak, w, total, floor), hint="The floor itself."),
        Case(
            "beyond the end",
            (total + more // 3, peak, w, total, floor),
            hint="It stays on the floor: the cosine is not to come up again.",
        ),
        Case(
            "no warm-up",
            (more // 5, peak, 0, more, floor),
            hint="warmup is 0: nothing may be divided by it.",
        ),
    ]


def _cosine_by_half_angles(
    step: int, peak: float, warmup: int, total: int, floor: float = 0.0
) -> float:
    """(1 + cos x)/2 is the square of cos(x/2)."""
    if step < warmup:
        return peak * (step / warmup)
    part = min(step - warmup, total - warmup) / (total - warmup)
    # Of the right angle less half the way, so that the end is 0 exactly.
    return floor + (peak - floor) * math.sin(math.pi / 2 * (1 - part)) ** 2


def _half_cosine(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2


def _cosine_with(
    up: Callable[..., float] = lambda t, p, w, f: p * t / w,
    part: Callable[..., float] = lambda t, w, total: min((t - w) / (total - w), 1.0),
    down: Callable[..., float] = lambda x, p, f: f + (p - f) * _half_cosine(x),
    last: int = 0,
) -> Answer:
    """The schedule with one of its sides replaced; the warm-up's last step may lie further out."""

    def answer(step, peak, warmup, total, floor=0.0):
        if step < warmup + last and warmup:
            return up(step, peak, warmup, floor)
        return down(part(step, warmup, total), peak, floor)

    return answer


def _zero_beyond(step, peak, warmup, total, floor=0.0):
    return 0.0 if step >= total else _cosine_with()(step, peak, warmup, total, floor)


def _shifted(by: int) -> Answer:
    def answer(step, peak, warmup, total, floor=0.0):
        return _cosine_with()(max(step + by, 0), peak, warmup, total, floor)

    return answer


WARMUP_COSINE = Exercise(
    id="warmup_cosine",
    chapter=CHAPTER,
    title="Warm-up, then half a cosine",
    points=2,
    returns=("lr",),
    reference=optim.warmup_cosine,
    oracle=quiet(_cosine_by_half_angles),
    cases=_cosine_cases,
    mistakes=(
        *named(
            "off by one",
            "At step t the warm-up is at t/w of the peak: 0 at step 0, and the peak at step = "
            "warmup.",
            WARMUP,
            _cosine_with(up=lambda t, p, w, f: p * (t + 1) / w),
            _cosine_with(up=lambda t, p, w, f: p * t / (w - 1)),
            _cosine_with(up=lambda t, p, w, f: p * (t + 1) / (w + 1)),
            _shifted(1),
            _shifted(-1),
        ),
        *named(
            "discontinuous at the join",
            "The cosine begins at step = warmup: its part of the way is (t - w)/(T - w), which is "
            "0 there.",
            COSINE,
            _cosine_with(part=lambda t, w, total: min(t / total, 1.0)),
            _cosine_with(part=lambda t, w, total: t / total),
            _cosine_with(part=lambda t, w, total: min(t / (total - w), 1.0)),
            _cosine_with(part=lambda t, w, total: t / (total - w)),
        ),
        *named(
            "steps down counted to total",
            "The way down has T - w steps: it ends at step = total, and not w steps later.",
            COSINE,
            _cosine_with(part=lambda t, w, total: min((t - w) / total, 1.0)),
            _cosine_with(part=lambda t, w, total: (t - w) / total),
        ),
        *named(
            "floor forgotten",
            "The cosine runs from the peak down to the floor.",
            COSINE,
            _cosine_with(down=lambda x, p, f: p * _half_cosine(x)),
        ),
        *named(
            "floor added on top",
            "The cosine takes the rate from peak to floor: its height is peak - floor.",
            COSINE,
            _cosine_with(down=lambda x, p, f: f + p * _half_cosine(x)),
        ),
        *named(
            "cut off at the floor",
            "The floor is where the cosine ends, not a limit that cuts it off.",
            COSINE,
            _cosine_with(down=lambda x, p, f: max(f, p * _half_cosine(x))),
        ),
        *named(
            "warm-up from the floor",
            "The warm-up begins at 0; the floor belongs to the way down.",
            WARMUP,
            _cosine_with(up=lambda t, p, w, f: f + (p - f) * t / w),
            _cosine_with(up=lambda t, p, w, f: max(f, p * t / w)),
        ),
        *named(
            "up again after the end",
            "After step = total the rate stays on the floor; a cosine that goes on rises.",
            COSINE,
            _cosine_with(part=lambda t, w, total: (t - w) / (total - w)),
        ),
        *named(
            "0 after the end",
            "After step = total the rate stays on the floor.",
            COSINE,
            _zero_beyond,
        ),
        *named(
            "half forgotten",
            "1 + cos runs from 2 to 0: half of it is the share.",
            COSINE,
            _cosine_with(down=lambda x, p, f: f + (p - f) * 2 * _half_cosine(x)),
        ),
        *named(
            "whole wave",
            "Half a wave, cos from 0 to π: a whole one would come up again.",
            COSINE,
            _cosine_with(down=lambda x, p, f: f + (p - f) * _half_cosine(2 * x)),
        ),
        *named(
            "quarter of a wave",
            "Half a wave, (1 + cos)/2 from 0 to π: a quarter, cos from 0 to π/2, ends steeply.",
            COSINE,
            _cosine_with(down=lambda x, p, f: f + (p - f) * math.cos(math.pi / 2 * x)),
        ),
        *named(
            "straight down",
            "Half a cosine, flat at both ends.",
            COSINE,
            _cosine_with(down=lambda x, p, f: f + (p - f) * (1 - x)),
        ),
        *named(
            "no warm-up",
            "Up to step = warmup the rate grows from 0 to the peak.",
            WARMUP,
            lambda step, peak, warmup, total, floor=0.0: (
                floor + (peak - floor) * _half_cosine(max(0, min(step, total) - warmup) / total)
                if warmup == 0
                else _cosine_with(up=lambda t, p, w, f: p)(step, peak, warmup, total, floor)
            ),
        ),
    ),
)


# --- accumulate_gradients -----------------------------------------------------------------------


def _pieces_cases(rng: Rng) -> list[Case]:
    def call(*sizes: int, dtype: str = "float64") -> tuple[Any, ...]:
        grads = [
            {n: rng.normal(size=s).astype(dtype) for n, s in (("w", (3, 2)), ("b", (2,)))}
            for _ in sizes
        ]
        return 3 + rng.normal(size=len(sizes)), grads, list(sizes)

    losses, grads, _ = call(1, 1)
    laid = [{n: scattered(g) for n, g in piece.items()} for piece in grads]
    one = int(rng.integers(4, 9))
    return [
        Case("one piece", call(one), hint="Nothing to average."),
        Case("two equal pieces", call(one, one), hint="Here the mean of the means is right."),
        Case(
            "two unequal pieces",
            call(one, 3 * one),
            hint="The second piece has three quarters of the tokens.",
        ),
        Case("three unequal pieces", call(2, 5, 11), hint="2, 5 and 11 of 18."),
        Case("one token in a piece", call(1, 40), hint="It counts one part in 41."),
        Case(
            "an empty piece",
            call(one, 0, one + 2),
            hint="A piece without tokens that count has no say.",
        ),
        Case("many pieces", call(*(int(n) for n in rng.integers(1, 30, 9))), hint="Nine pieces."),
        Case("large pieces", call(4000, 1000, 3500), hint="Thousands of tokens."),
        Case(
            "not contiguous in memory",
            (losses, laid, [2, 7]),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            call(3, 8, dtype="float32"),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _pieces_by_fsum(
    losses: Sequence[float], grads: Sequence[Arrays], sizes: Sequence[int]
) -> tuple[float, dict[str, Array]]:
    """Each number as one exact sum over all tokens."""
    total = sum(sizes)

    def mean(values: list[float]) -> float:
        return math.fsum(n * v for n, v in zip(sizes, values, strict=True)) / total

    out = {}
    for name, first in grads[0].items():
        out[name] = np.empty(first.shape)
        for at in np.ndindex(first.shape):
            out[name][at] = mean([float(g[name][at]) for g in grads])
    return mean([float(x) for x in losses]), out


def _pieces_with(
    loss: Callable[[Array, Array], Any] | None = None,
    grad: Callable[[Array, Array], Any] | None = None,
) -> Answer:
    """Loss and gradients by weights of their own, each of the sizes and the stacked values."""

    def right(sizes: Array, values: Array) -> Any:
        return np.tensordot(sizes / sizes.sum(), values, 1)

    def answer(losses, grads, sizes):
        n = np.array(sizes, dtype=float)
        stacked = {name: np.stack([g[name] for g in grads]) for name in grads[0]}
        mean = {name: (grad or right)(n, values) for name, values in stacked.items()}
        return (loss or right)(n, np.asarray(losses)), mean

    return answer


def _mean(n, x):
    return x.mean(axis=0)


def _sum(n, x):
    return x.sum(axis=0)


def _weighted_sum(n, x):
    return np.tensordot(n, x, 1)


def _over_pieces(n, x):
    return np.tensordot(n, x, 1) / len(n)


def _last(n, x):
    return x[-1]


def _both(line: Callable[..., Any]) -> Answer:
    return _pieces_with(loss=line, grad=line)


ACCUMULATE_GRADIENTS = Exercise(
    id="accumulate_gradients",
    chapter=CHAPTER,
    title="Gradients of unequal pieces",
    points=2,
    returns=("loss", "grads"),
    reference=training.accumulate_gradients,
    oracle=quiet(_pieces_by_fsum),
    cases=_pieces_cases,
    mistakes=(
        *named(
            "mean of the means",
            "A piece's mean counts as often as it has tokens: the tokens of a short piece would "
            "weigh more than those of a long one.",
            ACCUMULATE,
            _both(_mean),
        ),
        *named(
            "mean of the means that are not empty",
            "A piece's mean counts as often as it has tokens; leaving out the empty ones is not "
            "enough.",
            ACCUMULATE,
            _both(lambda n, x: x[n > 0].mean(axis=0)),
        ),
        *named(
            "gradients right, loss a mean of means",
            "The loss is weighted like the gradients.",
            ACCUMULATE,
            _pieces_with(loss=_mean),
        ),
        *named(
            "loss right, gradients a mean of means",
            "The gradients are weighted like the loss.",
            ACCUMULATE,
            _pieces_with(grad=_mean),
        ),
        *named(
            "summed",
            "A sum of means grows with the number of pieces, and the learning rate with it.",
            ACCUMULATE,
            _both(_sum),
            _pieces_with(grad=_sum),
            _pieces_with(loss=_mean, grad=_sum),
        ),
        *named(
            "not divided by the tokens",
            "Weighted by their sizes, the means are sums over tokens: they are divided by the "
            "number of all tokens.",
            ACCUMULATE,
            _both(_weighted_sum),
            _pieces_with(grad=_weighted_sum),
        ),
        *named(
            "divided by the pieces",
            "After weighting by size it is the number of all tokens that is divided by, not the "
            "number of pieces.",
            ACCUMULATE,
            _both(_over_pieces),
            _pieces_with(grad=_over_pieces),
        ),
        *named(
            "only the last piece",
            "The gradients of all pieces count: the last one does not replace the others.",
            ACCUMULATE,
            _both(_last),
            _pieces_with(grad=_last),
        ),
        *named(
            "weighted the wrong way round",
            "A piece with more tokens counts more.",
            ACCUMULATE,
            _both(
                lambda n, x: np.tensordot(
                    np.where(n > 0, 1 / n, 0) / np.where(n > 0, 1 / n, 0).sum(), x, 1
                )
            ),
        ),
    ),
)


# --- padded_cross_entropy -----------------------------------------------------------------------


def padded_cross_entropy(
    logits: Array, targets: Array, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[Any, Array]:
    """The library's cross-entropy, which takes ``ignore_index`` by name."""
    return softmax.cross_entropy(logits, targets, label_smoothing, ignore_index=ignore_index)


def _padded_cases(rng: Rng) -> list[Case]:
    def call(b: int, k: int, padded: int, at: int = -100) -> tuple[Array, Array]:
        logits, targets = 2 * rng.normal(size=(b, k)), rng.integers(0, k, b)
        targets[rng.permutation(b)[:padded]] = at
        return logits, targets

    chosen = int(rng.integers(3))
    logits, targets = call(6, 4, 2)
    large, those = call(5, 4, 2)
    return [
        Case("no padding", call(5, 4, 0), hint="Cross-entropy as in chapter 1."),
        Case("smoothing without padding", (*call(4, 6, 0), 0.2), hint="Smoothing as in chapter 1."),
        Case("padding", call(6, 4, 2), hint="The mean is over the 4 rows that count."),
        Case(
            "smoothing and padding",
            (*call(7, 5, 3), 0.2),
            hint="Ignored rows count neither in the part of the target nor in the uniform part.",
        ),
        Case("mostly padding", (*call(9, 3, 8), 0.1), hint="One row counts."),
        Case(
            "nothing but padding",
            (*call(3, 4, 3), 0.1),
            hint="No row counts: loss 0 and gradient 0, not 0/0.",
        ),
        Case(
            "ignore_index -1",
            (*call(6, 4, 2, -1), 0.1, -1),
            hint="As an index, -1 is the last class; here it says: do not count.",
        ),
        Case(
            "ignore_index a class",
            (*call(7, 3, 2, chosen), 0.1, chosen),
            hint="One of the classes is the padding; rows with it as target do not count.",
        ),
        Case(
            "all of the smoothing",
            (*call(5, 4, 1), 1.0),
            hint="ε = 1: the target is uniform, whatever the class.",
        ),
        Case(
            "large logits",
            (1000 * large, those, 0.1),
            hint="Through log-softmax, as in chapter 1.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(logits), targets, 0.1),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (call(6, 5, 2)[0].astype("float32"), call(6, 5, 2)[1], 0.1),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _padded_by_rows(
    logits: Array, targets: Array, label_smoothing: float = 0.0, ignore_index: int = -100
) -> tuple[float, Array]:
    """Row by row in extended precision; the gradient from the definition by the complex step."""
    rows = [i for i, t in enumerate(targets) if t != ignore_index]
    loss, dlogits = np.longdouble(0), np.zeros(logits.shape)
    for i in rows:
        z = np.asarray(logits[i], np.longdouble)
        share = np.full(len(z), np.longdouble(label_smoothing) / len(z))
        share[targets[i]] += 1 - np.longdouble(label_smoothing)
        far = z - z.max()
        total = np.exp(far).sum()
        loss += (share * (np.log(total) - far)).sum() / len(rows)
        for j in range(len(z)):
            moved = far.astype(np.clongdouble)
            moved[j] += 1e-30j
            value = (share * (np.log(np.exp(moved).sum()) - moved)).sum()
            dlogits[i, j] = value.imag / 1e-30 / len(rows)
    return float(loss), dlogits


def _padded_with(
    share: Callable[..., Any] | None = None,
    dshare: Callable[..., Any] | None = None,
    n: Callable[[Array], Any] | None = None,
    dn: Callable[[Array], Any] | None = None,
    counted: Callable[[Array, int], Array] | None = None,
    dcounted: Callable[[Array, int], Array] | None = None,
    guarded: bool = True,
) -> Answer:
    """Loss and gradient by their targets' shares, rows and divisor, each as right as given."""

    def spread(k: int, eps: float, one: Array) -> Array:
        return (1 - eps) * one + eps / k

    def answer(logits, targets, label_smoothing=0.0, ignore_index=-100):
        z = np.asarray(logits, float)
        kept = counted(targets, ignore_index) if counted else targets != ignore_index
        dkept = dcounted(targets, ignore_index) if dcounted else kept
        one = np.zeros(z.shape)
        one[np.arange(len(z)), np.where(targets == ignore_index, 0, targets)] = 1
        one[(targets == ignore_index) & (ignore_index == -1)] = np.eye(z.shape[1])[-1]
        far = z - z.max(axis=1, keepdims=True)
        logp = far - np.log(np.exp(far).sum(axis=1, keepdims=True))
        q = (share or spread)(z.shape[1], label_smoothing, one)
        dq = (dshare or share or spread)(z.shape[1], label_smoothing, one)
        rows = n(kept) if n else kept.sum()
        drows = dn(kept) if dn else rows
        if guarded:
            rows, drows = max(rows, 1), max(drows, 1)
        loss = -(q * logp).sum(axis=1)[kept].sum() / np.float64(rows)
        return loss, np.where(dkept[:, None], np.exp(logp) - dq, 0) / np.float64(drows)

    return answer


def _also_unguarded(**wrong: Any) -> tuple[Answer, Answer]:
    """The same mistake by those who thought of n = 0 and by those who did not."""
    return _padded_with(**wrong), _padded_with(**wrong, guarded=False)


def _log_probs(logits: Array) -> Array:
    z = np.asarray(logits, float)
    far = z - z.max(axis=1, keepdims=True)
    return far - np.log(np.exp(far).sum(axis=1, keepdims=True))


def _diluted(
    loss: bool = True, gradient: bool = True, guarded: bool = True, over_all: bool = False
) -> Answer:
    """The uniform part summed over all rows, over the number of those that count or of all."""

    def answer(logits, targets, label_smoothing=0.0, ignore_index=-100):
        right = _padded_with(guarded=guarded)
        hard, dhard = right(logits, targets, 0.0, ignore_index)
        value, dlogits = right(logits, targets, label_smoothing, ignore_index)
        rows = len(logits) if over_all else (targets != ignore_index).sum()
        n = np.float64(max(rows, 1) if guarded else rows)
        logp, eps = _log_probs(logits), label_smoothing
        if loss:
            value = (1 - eps) * hard - eps * logp.mean(axis=1).sum() / n
        if gradient:
            dlogits = (1 - eps) * dhard + eps * (np.exp(logp) - 1 / logp.shape[1]) / n
        return value, dlogits

    return answer


def _uniform_target_kept(guarded: bool, divisor: Callable[[Array], Any]) -> Answer:
    """q = (1 - ε) one-hot + ε/K with an empty one-hot where a row is padding."""

    def answer(logits, targets, label_smoothing=0.0, ignore_index=-100):
        kept, logp = targets != ignore_index, _log_probs(logits)
        q = np.full(logp.shape, label_smoothing / logp.shape[1])
        q[kept, targets[kept]] += 1 - label_smoothing
        n = np.float64(max(divisor(kept), 1) if guarded else divisor(kept))
        return -(q * logp).sum() / n, (np.exp(logp) - q) / n

    return answer


def _hard_coded(logits, targets, label_smoothing=0.0, ignore_index=-100):
    k = np.shape(logits)[1]
    taken = np.where(targets == -100, -100, targets % k)
    return _padded_with()(logits, taken, label_smoothing, -100)


def _count(kept: Array) -> Any:
    return kept.sum()


def _all_rows(kept: Array) -> int:
    return len(kept)


def _every_row(targets: Array, ignore_index: int) -> Array:
    return np.ones(len(targets), bool)


PADDED_CROSS_ENTROPY = Exercise(
    id="padded_cross_entropy",
    chapter=CHAPTER,
    title="Label smoothing with padding",
    points=2,
    returns=("loss", "dlogits"),
    reference=padded_cross_entropy,
    oracle=quiet(_padded_by_rows),
    cases=_padded_cases,
    mistakes=(
        *named(
            "smoothing counts the padding",
            "The uniform part is a mean over the rows that count, like the target's part; summed "
            "over all rows, padding is learnt from.",
            SMOOTHING,
            *(_diluted(guarded=g) for g in (True, False)),
            *(_diluted(gradient=False, guarded=g) for g in (True, False)),
            *(_diluted(loss=False, guarded=g) for g in (True, False)),
            *(_diluted(over_all=True, guarded=g) for g in (True, False)),
        ),
        *named(
            "padding keeps the uniform part",
            "A row that does not count has no target at all, neither the class's part nor ε/K of "
            "the others, and no gradient: left in, its p - q is nearly p.",
            SMOOTHING,
            *(_uniform_target_kept(g, n) for g in (True, False) for n in (_count, _all_rows)),
        ),
        *named(
            "divided by all rows",
            "The mean is over the rows that count; otherwise a batch with much padding takes "
            "smaller steps.",
            SMOOTHING,
            _padded_with(n=_all_rows),
            *_also_unguarded(n=_all_rows, dn=lambda kept: kept.sum()),
            *_also_unguarded(dn=_all_rows),
        ),
        *named(
            "ignored rows get a gradient",
            "A row that does not count in the loss has gradient 0.",
            SMOOTHING,
            *_also_unguarded(dcounted=_every_row),
        ),
        *named(
            "padding counts",
            "Rows whose target is ignore_index count neither in the loss nor in the gradient.",
            SMOOTHING,
            _padded_with(counted=_every_row),
        ),
        *named(
            "ignore_index fixed",
            "ignore_index is an argument: -100 is only its default, and -1 as an index is the last "
            "class.",
            SMOOTHING,
            _hard_coded,
        ),
        *named(
            "0/0 where nothing counts",
            "A batch of nothing but padding has no mean; loss and gradient are 0 here, so that the "
            "run goes on.",
            SMOOTHING,
            _padded_with(guarded=False),
        ),
        *named(
            "smoothing spread over K - 1 classes",
            "ε is spread over all K classes, the target's included, as in Szegedy et al. 2016 and "
            "in torch.",
            SMOOTHING,
            *_also_unguarded(share=lambda k, eps, one: (1 - eps) * one + eps * (1 - one) / (k - 1)),
        ),
        *named(
            "smoothing forgotten",
            "With label smoothing the targets are (1 - ε) one-hot + ε/K.",
            SMOOTHING,
            *_also_unguarded(share=lambda k, eps, one: one),
        ),
        *named(
            "smoothing forgotten in the gradient",
            "dlogits = (p - q)/n with the smoothed q.",
            SMOOTHING,
            *_also_unguarded(dshare=lambda k, eps, one: one),
        ),
        *named(
            "gradient not divided",
            "The loss is a mean over the n rows that count, so the gradient is divided by n.",
            SMOOTHING,
            *_also_unguarded(dn=lambda kept: 1),
        ),
        *named(
            "summed over the rows",
            "Loss and gradient are means over the rows that count.",
            SMOOTHING,
            _padded_with(n=lambda kept: 1),
        ),
        *named(
            "smoothing without 1 - ε",
            "What is given to the other classes is taken from the target: (1 - ε) one-hot + ε/K.",
            SMOOTHING,
            *_also_unguarded(share=lambda k, eps, one: one + eps / k),
        ),
    ),
)


EXERCISES = (
    SGD_STEP,
    ADAMW_STEP,
    MODEL_ADAMW_STEP,
    CLIP_BY_GLOBAL_NORM,
    WARMUP_INVERSE_SQRT,
    WARMUP_COSINE,
    ACCUMULATE_GRADIENTS,
    PADDED_CROSS_ENTROPY,
)
