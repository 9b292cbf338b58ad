r"""Half precision by hand: rounding, accumulators, loss scaling, master weights.

A format is named as in torch: "float16", "bfloat16" or "float32". Its numbers are kept in arrays
of the caller's dtype, each entry one that the format has: NumPy has no bfloat16, and what the
rounding did can be looked at with ordinary arithmetic.

- Rounding is to nearest, ties to the even neighbour, from the number that came in: float64 is not
  rounded to float32 on the way, as it is in torch.
- What lies beyond the largest number by half a gap or more becomes inf; below half the smallest, 0
  with its sign. Subnormal numbers are numbers. NaN stays NaN.
- float32 stays float32, integers become float64, inputs are never written to.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Real

from attn_lessons._arrays import as_count, as_float
from attn_lessons.optim import clip_by_global_norm

Arrays = dict[str, np.ndarray]
FormatName = Literal["float16", "bfloat16", "float32"]

# Overflow to inf is what rounding is asked for here.
_quiet = np.errstate(all="ignore")


class Format(NamedTuple):
    """A binary floating format: what decides how a number rounds."""

    digits: int
    """Significant binary digits, the leading 1 counted."""
    least: int
    """Exponent of the smallest normal number, 2**least."""
    most: int
    """Exponent of the largest numbers; 2**(most + 1) is inf."""

    @property
    def smallest(self) -> float:
        """The smallest positive number, a subnormal one."""
        return math.ldexp(1.0, self.least - self.digits + 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return math.ldexp(2.0 - math.ldexp(1.0, 1 - self.digits), self.most)


FORMATS = {
    "float16": Format(digits=11, least=-14, most=15),
    "bfloat16": Format(digits=8, least=-126, most=127),
    "float32": Format(digits=24, least=-126, most=127),
}


# --- rounding ---------------------------------------------------------------------------------


@_quiet
def spacing(x: Real[np.ndarray, "*shape"], format: str) -> Float[np.ndarray, "*shape"]:
    r"""Gap between the numbers of a format around x.

    .. math:: u(x) = 2^{\max(\lfloor \log_2 |x| \rfloor,\; e_{\min}) - p + 1}

    with p digits and smallest normal number 2^e_min. Below that the gap
    stays the same: these are the subnormal numbers. A sum stands still
    once what is added is less than half the gap at the sum.

    Shapes: any, the result the same. NaN and inf have gap NaN.

    ValueError: the format is unknown.

    Source: IEEE 754-2019, section 3.3.
    """
    x, kind = as_float("x", x), _format(format)
    gap = np.where(np.isfinite(x), _gap(_wide(x), kind), np.nan)
    return gap.astype(x.dtype, copy=False)


@_quiet
def round_to(x: Real[np.ndarray, "*shape"], format: str) -> Float[np.ndarray, "*shape"]:
    r"""The nearest number of a format; between two, the even one.

    .. math:: \operatorname{round}(x) = u \cdot
              \operatorname{rint}(x / u), \qquad u = u(x)

    u is a power of two, so that only rint rounds.

    Shapes: any, the result the same, in the dtype of x.

    ValueError: the format is unknown.

    Source: IEEE 754-2019, section 4.3.1.
    """
    x, kind = as_float("x", x), _format(format)
    gap = _gap(_wide(x), kind)
    rounded = np.rint(_wide(x) / gap) * gap
    # 65520 lies midway between 65504 and 65536, which fp16 has not.
    over = np.abs(rounded) > kind.largest
    rounded = np.where(over, np.copysign(np.inf, rounded), rounded)
    # A gap at infinity is no number; NaN and inf are what they were.
    return np.where(np.isfinite(x), rounded, x).astype(x.dtype, copy=False)


def round_to_fp16(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""The nearest number with 11 binary digits from 6e-8 to 65504.

    .. math:: p = 11, \quad e_{\min} = -14

    Shapes: any, the result the same, in the dtype of x.

    ValueError: x holds no real numbers.

    Source: IEEE 754-2019, binary16.
    """
    return round_to(x, "float16")


def round_to_bf16(x: Real[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    r"""The nearest number with 8 binary digits, in float32's range.

    .. math:: p = 8, \quad e_{\min} = -126

    Cutting a float32's last 16 bits off instead rounds toward 0: twice
    the error at worst, and all of it in one direction.

    Shapes: any, the result the same, in the dtype of x.

    ValueError: x holds no real numbers.

    Source: Kalamkar et al. 2019, section 2.
    """
    return round_to(x, "bfloat16")


def share_below(
    grads: Mapping[str, Any] | np.ndarray, format: str = "float16", scale: float = 1.0
) -> float:
    r"""Share of the entries that a format turns into 0.

    .. math:: \frac{|\{i : g_i \ne 0,\;
              \operatorname{round}(s\, g_i) = 0\}|}{|\{i : g_i \ne 0\}|}

    Entries that are 0 already have nothing to lose and are not counted;
    of no others, the share is 0. ``scale`` is s, the loss scale.

    Shapes: an array, or a dict of arrays taken together; a number.

    ValueError: the format is unknown; ``scale`` is not positive.

    Source: Micikevicius et al. 2018, section 3.2 and figure 3.
    """
    scale = _positive("scale", scale)
    arrays = grads.values() if isinstance(grads, Mapping) else [grads]
    lost = nonzero = 0
    for g in arrays:
        # In float32, 1e-40 times a scale would lose digits of its own.
        g = _wide(as_float("grads", g))
        nonzero += int(np.count_nonzero(g))
        lost += int(np.count_nonzero(g[round_to(g * scale, format) == 0]))
    return float(lost / nonzero) if nonzero else 0.0


# --- accumulators -----------------------------------------------------------------------------


@_quiet
def accumulate_in(terms: Real[np.ndarray, "*batch n"], format: str) -> Float[np.ndarray, "*batch"]:
    r"""Sum along the last axis, one term after the other, each sum rounded.

    .. math:: s_0 = 0, \qquad
              s_i = \operatorname{round}(s_{i-1} + t_i)

    The terms are taken as they are. Ones added up in bfloat16 stop at
    256, in float16 at 2048: the next sum lies midway between two
    numbers, and the even one is where it stood.

    Shapes: ``(..., n)`` to ``(...)``, in the dtype of ``terms``.

    ValueError: the format is unknown; ``terms`` is a scalar.
    """
    terms, _ = as_float("terms", terms), _format(format)
    _check_axes("terms", terms)
    total = np.zeros(terms.shape[:-1], _wide(terms).dtype)
    for term in np.moveaxis(_wide(terms), -1, 0):
        total = round_to(_sum_to_odd(total, term), format)
    return np.asarray(total, terms.dtype)


@_quiet
def mixed_precision_dot(
    a: Real[np.ndarray, "*batch n"],
    b: Real[np.ndarray, "*batch n"],
    accumulate: FormatName = "float32",
) -> Float[np.ndarray, "*batch"]:
    r"""What a tensor core does: fp16 times fp16, summed in another format.

    .. math:: s_0 = 0, \qquad s_i = \operatorname{round}
              \bigl(s_{i-1} + \mathrm{fp16}(a_i) \,
              \mathrm{fp16}(b_i)\bigr)

    The product of two 11-digit numbers has 22 digits and is not
    rounded: float32 has 24. Only the sums are, one after the other, in
    ``accumulate``.

    Shapes: a and b ``(..., n)``, the result ``(...)``, in their dtype.

    ValueError: shapes differ; ``accumulate`` is unknown.

    Source: Micikevicius et al. 2018, section 3.3.
    """
    a, b = as_float("a", a), as_float("b", b)
    if a.shape != b.shape:
        raise ValueError(f"b: expected shape {a.shape} to match a; got {b.shape}")
    _format(accumulate, "accumulate")
    dtype = np.result_type(a, b)
    products = round_to_fp16(_wide(a)) * round_to_fp16(_wide(b))
    return accumulate_in(products, accumulate).astype(dtype, copy=False)


# --- loss scaling -----------------------------------------------------------------------------


@_quiet
def loss_scale_step(
    scale: float,
    good_steps: int,
    found_inf: bool,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> tuple[float, int]:
    r"""The loss scale after a step, and the good steps since it changed.

    .. math:: (s, n) \to \begin{cases}
              (\mathrm{backoff} \cdot s,\; 0) & \text{inf or NaN} \\
              (\mathrm{growth} \cdot s,\; 0) & n + 1 = \mathrm{interval} \\
              (s,\; n + 1) & \text{else} \end{cases}

    To be called after every step, the skipped ones above all: it is
    they that lower the scale. A scale that would overflow float32 stays.

    Returns ``(scale, good_steps)``.

    ValueError: ``scale`` is not a positive number, ``growth`` not above
    1, ``backoff`` not in (0, 1); ``good_steps`` or ``interval`` is no
    count.

    Source: Micikevicius et al. 2018, section 3.2; the rule is that of
    torch.amp.GradScaler.
    """
    scale, good_steps = _positive("scale", scale), as_count("good_steps", good_steps)
    _check_rule(growth, backoff, interval)
    if found_inf:
        return float(np.float32(scale * backoff)), 0
    if good_steps + 1 != interval:
        return scale, good_steps + 1
    grown = float(np.float32(scale * growth))
    return (grown if math.isfinite(grown) else scale), 0


@_quiet
def unscale(grads: Mapping[str, np.ndarray], scale: float) -> tuple[Arrays, bool]:
    r"""Gradients of the loss from those of the scaled loss.

    .. math:: g \leftarrow g / s

    In float32 at least: float16 gradients divided in float16 would
    underflow where the scale had kept them.

    Shapes: each gradient keeps its own. Returns ``(grads, found_inf)``,
    found_inf telling whether an entry is inf or NaN.

    ValueError: ``scale`` is not a positive number.

    Source: Micikevicius et al. 2018, section 3.2.
    """
    inverse = 1 / _positive("scale", scale)
    arrays = {name: as_float(name, g) for name, g in grads.items()}
    # 1/s is a Python float: a float32 gradient meets it rounded, as torch's does.
    plain = {n: g.astype(np.result_type(g, np.float32)) * inverse for n, g in arrays.items()}
    return plain, not all(np.isfinite(g).all() for g in plain.values())


def unscale_then_clip(
    grads: Mapping[str, np.ndarray], scale: float, max_norm: float
) -> tuple[Arrays, float, bool]:
    r"""Gradients unscaled, then shortened to a common length.

    .. math:: g \leftarrow g / s, \qquad
              g \leftarrow g \cdot \min\Bigl(1,
              \frac{c}{\|g\| + 10^{-6}}\Bigr)

    In this order: the length of scaled gradients is s times too large,
    and clipping them to c leaves, once unscaled, steps of length c/s.
    Where an entry is inf or NaN nothing is clipped, and the step is to
    be skipped.

    Shapes: each gradient keeps its own. Returns ``(grads, norm,
    found_inf)``, norm being that before clipping.

    ValueError: ``scale`` is not positive, ``max_norm`` is negative.

    Source: Pascanu et al. 2013, algorithm 1; the order is
    pytorch/examples#1196's.
    """
    plain, found_inf = unscale(grads, scale)
    clipped, norm = clip_by_global_norm(plain, max_norm)
    return clipped, norm, found_inf


class LossScaler:
    """A loss scale that finds its own size, or with ``dynamic=False`` stays what it is.

    >>> scaler = LossScaler(1024.0, interval=2)
    >>> [scaler.update(found_inf) for found_inf in (False, False, True)]
    [1024.0, 2048.0, 1024.0]
    """

    def __init__(
        self,
        scale: float = 65536.0,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        dynamic: bool = True,
    ) -> None:
        """ValueError: as loss_scale_step."""
        _check_rule(growth, backoff, interval)
        self.scale = _positive("scale", scale)
        self.good_steps = 0
        self.growth, self.backoff, self.interval = float(growth), float(backoff), int(interval)
        self.dynamic = dynamic

    def update(self, found_inf: bool) -> float:
        """Hear how a step went, and return the scale of the next."""
        if self.dynamic:
            rule = (self.growth, self.backoff, self.interval)
            self.scale, self.good_steps = loss_scale_step(
                self.scale, self.good_steps, found_inf, *rule
            )
        return self.scale


# --- a step with master weights ---------------------------------------------------------------


class MixedStep(NamedTuple):
    """What one step in mixed precision did."""

    loss: float
    """Not scaled."""
    scale: float
    """The scale it was taken with."""
    norm: float
    """Length of the gradient, unscaled and not clipped."""
    skipped: bool
    """Whether an entry was inf or NaN, and the weights stayed."""
    lost: float
    """Share of the scaled gradients' entries that rounding to the format turned into 0."""


def mixed_precision_step(
    master: Mapping[str, np.ndarray],
    loss: Callable[[Arrays, float], tuple[Any, Mapping[str, np.ndarray]]],
    update: Callable[[Arrays, Arrays], Mapping[str, np.ndarray]],
    scaler: LossScaler,
    *,
    format: FormatName = "float16",
    max_norm: float = math.inf,
) -> tuple[Arrays, MixedStep]:
    r"""One step: gradients in half precision, weights in full.

    .. math:: w = \operatorname{round}(W), \quad
              g = \operatorname{round}\Bigl(
              \frac{\partial\, sL}{\partial w}\Bigr), \quad
              W \leftarrow \operatorname{update}\bigl(W,
              \operatorname{clip}(g / s)\bigr)

    W are the master weights: an update below half a gap of w is kept in
    W and shows in w once enough of them have come together.

    ``loss(weights, scale)`` takes rounded weights and returns the loss
    and the gradients of ``scale`` times the loss; how much of its own
    arithmetic is rounded is its affair. ``update(master, grads)``
    returns new master weights (an optimizer's step), and is not called
    where an entry of the gradient is inf or NaN. The scaler hears of
    every step.

    Shapes: master's arrays keep theirs. Returns ``(master, step)``.

    ValueError: the format is unknown; ``max_norm`` is negative.

    Source: Micikevicius et al. 2018, figure 1.
    """
    weights = {name: round_to(p, format) for name, p in master.items()}
    scale = scaler.scale
    value, scaled = loss(weights, scale)
    lost = share_below(scaled, format)
    rounded = {name: round_to(g, format) for name, g in scaled.items()}
    grads, norm, found_inf = unscale_then_clip(rounded, scale, max_norm)
    scaler.update(found_inf)
    kept = dict(master) if found_inf else dict(update(dict(master), grads))
    return kept, MixedStep(float(value), scale, norm, found_inf, lost)


def mixed_precision_loss(
    loss: Callable[..., tuple[Any, Mapping[str, np.ndarray]]],
    scaler: LossScaler,
    *,
    format: FormatName = "float16",
) -> Callable[[Mapping[str, np.ndarray], np.random.Generator], tuple[Any, Arrays]]:
    """A loss for training.train_step, from one that works in half precision.

    ``loss(weights, rng, scale)`` is as in mixed_precision_step, with the generator besides. What
    comes back takes the master weights and returns gradients rounded and unscaled, which
    train_step then clips; where one is inf or NaN, it skips the step. The scaler hears of every
    call: train with ``accumulate=1``.

    ValueError: the format is unknown.
    """
    _format(format)

    def wrapped(master: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[Any, Arrays]:
        weights = {name: round_to(p, format) for name, p in master.items()}
        value, scaled = loss(weights, rng, scaler.scale)
        rounded = {name: round_to(g, format) for name, g in scaled.items()}
        grads, found_inf = unscale(rounded, scaler.scale)
        scaler.update(found_inf)
        return value, grads

    return wrapped


# --- below ------------------------------------------------------------------------------------


def _gap(x, kind: Format):
    # frexp's mantissa lies in [1/2, 1), one digit lower than 1.xxx does.
    # Of 0 it has exponent 0, as of 1/2.
    exponent = np.where(x == 0, kind.least, np.frexp(x)[1] - 1)
    return np.ldexp(np.ones((), x.dtype), np.maximum(exponent, kind.least) - kind.digits + 1)


def _sum_to_odd(a, b):
    """a + b for rounding again: where the sum is not exact, its last bit is made odd.

    Rounded to nearest here and again to fewer digits, 1 + 2**-11 + 2**-60 would first become a tie,
    then 1; the next number above is right. An odd last bit says "and a little besides".
    """
    total = a + b
    # Knuth's two-sum: what the addition lost.
    back = total - a
    error = (a - (total - back)) + (b - back)
    even = np.abs(np.frexp(total)[0]) * 2.0**53 % 2 == 0
    moved = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(error) & (error != 0) & even, moved, total)


def _wide(x):
    # Gaps of float32's smallest numbers are no float32; float64 has room for them all.
    return x.astype(np.float64, copy=False)


def _format(name: str, argument: str = "format") -> Format:
    if name not in FORMATS:
        raise ValueError(f"{argument}: expected one of {', '.join(FORMATS)}; got {name!r}")
    return FORMATS[name]


def _check_axes(name, x):
    if x.ndim == 0:
        raise ValueError(f"{name}: expected shape (..., n); got a scalar, shape ()")


def _positive(name: str, x: float) -> float:
    # torch keeps its scale in float32.
    if not 0 < x <= FORMATS["float32"].largest:
        raise ValueError(f"{name}: expected a number > 0 that float32 has; got {x!r}")
    return float(x)


def _check_rule(growth: float, backoff: float, interval: int) -> None:
    if not 1 < growth < math.inf:
        raise ValueError(f"growth: expected a finite number > 1; got {growth!r}")
    if not 0 < backoff < 1:
        raise ValueError(f"backoff: expected a number in (0, 1); got {backoff!r}")
    as_count("interval", interval, 1)
