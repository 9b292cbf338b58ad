r"""Gradients by measurement, and the report that says where and how a gradient is off.

``f`` is always a function of one array. Each call hands it a fresh float64 copy, so it may keep
or overwrite what it gets, and ``x`` stays as found even where ``f`` raises. It must compute
from its argument: one that reads an array of the surrounding scope sees no step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real

from attn_lessons._arrays import as_float, check_same_shape
from attn_lessons._difference import Observation, describe_difference, wrong_entries

__all__ = [
    "GradientReport",
    "Observation",
    "best_step",
    "central_difference",
    "check_gradient",
    "complex_step_gradient",
    "describe_difference",
    "directional_check",
    "first_wrong",
    "numerical_gradient",
    "numerical_vjp",
    "relative_error",
    "step_sweep",
]

Scalar = float | int | np.generic
Point = Float[np.ndarray, "*shape"] | Scalar
Step = float | np.floating | Literal["best"] | None

EPSILON = float(np.finfo(np.float64).eps)


# --- gradients ------------------------------------------------------------------------------


def central_difference(
    g: Callable[[float], float],
    t: float,
    h: float,
) -> float:
    r"""Slope of ``g`` at ``t`` from a value on either side.

    .. math:: g'(t) \approx \frac{g(t + h) - g(t - h)}{2h}

    ValueError: ``h`` is so small that ``t + h`` and ``t - h`` are the
    same float.

    Source: Nocedal & Wright 2006, eq. (8.7).
    """
    right, left, distance = _ends(g, t, h)
    return (right - left) / distance


def numerical_gradient(
    f: Callable[..., Any], x: Point, eps: Step = None
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient of a scalar function by central differences.

    .. math:: \frac{\partial f}{\partial x_i} \approx
              \frac{f(x + h e_i) - f(x - h e_i)}{2h}

    ``eps`` is the step h, for 2 evaluations an entry; its error is
    about ``h² f‴/6 + 1e-16 f/h``, least near 1e-5 where all is of order
    1. ``eps="best"`` takes best_step's.

    Without ``eps`` every entry gets its own step: h is halved from 1/64
    (or from half of ``|x_i|``: log x must not see a negative x),
    Richardson's extrapolation removes the terms in h² and h⁴, and
    halving ends where two results agree to 1e-10. Where rounding
    forbids that, larger steps are tried, up to ``max(1, |x_i|)/4``. 6
    evaluations an entry are enough where f changes slowly over 1/64;
    9 more, at x and next to it, measure the rounding noise of f.

    Shapes: ``x`` any, a scalar too; the result the same, in float64. A
    float32 ``x`` is lifted to float64, as float32 differences hold 3
    digits. An infinite entry of ``x`` cannot be moved and gets 0.

    ValueError: ``x`` is not floating point; ``f`` returns no real
    scalar; ``eps`` is not positive, or vanishes beside an entry.

    Source: Press et al. 2007, section 5.7; Nocedal & Wright 2006,
    section 8.1.
    """
    x = _point("x", x)
    grad = np.zeros(x.shape)
    for i, slope in _slopes(f, x, eps):
        grad[i] = slope.value
    return grad


def numerical_vjp(
    f: Callable[..., Any],
    x: Point,
    dout: Real[np.ndarray, "..."] | Scalar,
    eps: Step = None,
) -> Float[np.ndarray, "*shape"]:
    r"""Vector-Jacobian product: what a backward pass returns.

    .. math:: dx_i = \sum_j d\mathrm{out}_j \, \frac{\partial f_j}{\partial x_i}

    Shapes: ``x`` any, ``dout`` as ``f(x)``; the result as ``x``.

    ValueError: ``f(x)`` and ``dout`` differ in shape; and as
    numerical_gradient.
    """
    dout = as_float("dout", np.asarray(dout)).astype(np.float64)

    def weighted(x: Float[np.ndarray, "..."]) -> float:
        out = as_float("f", np.asarray(f(x)))
        if out.shape != dout.shape:
            raise ValueError(f"dout: expected shape {out.shape}, that of f(x); got {dout.shape}")
        return float((out * dout).sum())

    return numerical_gradient(weighted, x, eps)


def complex_step_gradient(
    f: Callable[..., Any], x: Point, step: float = 1e-20
) -> Float[np.ndarray, "*shape"]:
    r"""Gradient of an analytic function, exact to rounding.

    .. math:: \frac{\partial f}{\partial x_i} \approx
              \frac{\operatorname{Im} f(x + i h e_i)}{h}

    Nothing is subtracted; the error is h²f‴/6, with h = 1e-20 none. ``f`` must take
    complex arrays and be analytic: no abs, conj, real part or cast to
    float, and no maximum that compares complex numbers. That is checked
    against one central difference in a fixed random direction.

    Shapes: ``x`` any, a scalar too; the result the same, in float64.

    ValueError: ``f`` returns a real number, or one whose imaginary part
    is no derivative.

    Source: Squire & Trapp 1998.
    """
    x = _point("x", x)
    grad = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        z = x.astype(complex)
        z[i] += 1j * step
        grad[i] = _imaginary(f, z) / step
    _check_analytic(f, x, grad)
    return grad


def directional_check(
    f: Callable[..., Any],
    x: Point,
    grad: Real[np.ndarray, "*shape"] | Scalar,
    v: Real[np.ndarray, "*shape"] | Scalar,
    eps: Step = None,
) -> float:
    r"""Relative error of the slope that ``grad`` predicts along ``v``.

    .. math:: \langle \mathrm{grad}, v \rangle \approx
              \frac{f(x + h v) - f(x - h v)}{2h}

    Two evaluations check a gradient of any size (some more without
    ``eps``, see numerical_gradient); a random ``v`` misses a wrong one
    with probability 0.

    Shapes: ``x`` any; ``grad`` and ``v`` the same.

    ValueError: shapes differ; ``v`` is 0 or not finite; and as
    numerical_gradient.
    """
    x, v = _point("x", x), as_float("v", np.asarray(v)).astype(np.float64)
    grad = as_float("grad", np.asarray(grad))
    check_same_shape("grad", grad, "x", x)
    slope = _slope_along(f, x, v, eps)
    return relative_error(np.asarray((grad * v).sum()), np.asarray(slope.value))


# --- the step ---------------------------------------------------------------------------------


def step_sweep(
    f: Callable[..., Any],
    x: Point,
    exact: Real[np.ndarray, "*shape"] | Scalar,
    steps: Sequence[float] | Float[np.ndarray, "steps"] | None = None,
    *,
    gradient: Callable[..., Any] = numerical_gradient,
) -> tuple[Float[np.ndarray, "steps"], Float[np.ndarray, "steps"]]:
    """Error of a numerical gradient for every step: the arms of a V.

    The error is the largest absolute one over the largest entry of
    ``exact`` (the absolute one where ``exact`` is 0). A step that
    vanishes beside x measures slope 0 and has error 1. Steps run from
    1e-15 to 1, in units of max(1, |x|), unless given.

    Shapes: ``exact`` as ``x``; both results one number a step.

    ValueError: ``exact`` has not x's shape; and as ``gradient``.
    """
    x, exact = _point("x", x), as_float("exact", np.asarray(exact)).astype(np.float64)
    check_same_shape("exact", exact, "x", x)
    steps = _reach(x) * np.logspace(-15, 0, 61) if steps is None else np.asarray(steps, float)
    size = np.abs(exact).max(initial=0) or 1.0
    errors = [_sweep_error(gradient, f, x, h, exact) / size for h in steps.tolist()]
    return steps, np.array(errors)


def best_step(f: Callable[..., Any], x: Point) -> float:
    r"""The step with which central differences err least.

    Truncation grows as h², rounding as 1/h; where both are of order 1
    they balance at

    .. math:: h = (3\,\epsilon\,|f| / |f'''|)^{1/3} \approx 10^{-5}

    The steps of a quarter decade are tried against the extrapolated
    gradient, which is more exact than any of them. A step is judged by
    the worst of itself and its neighbours, so that none wins by a lucky
    cancellation. Of more than 32 entries, 32 are tried.

    ValueError: ``x`` has no entry; and as numerical_gradient.

    Source: Press et al. 2007, eq. (5.7.8); Nocedal & Wright 2006,
    section 8.1.
    """
    x = _point("x", x)
    if x.size == 0:
        raise ValueError(f"x: expected at least one entry; got shape {x.shape}")
    entries = [i for i in np.ndindex(x.shape) if np.isfinite(x[i])][:: -(-x.size // 32)]
    exact = np.array([_slope(_along(f, x, i), float(x[i]), None).value for i in entries])
    steps = _reach(x) * np.logspace(-13, 0, 53)
    errors = np.array([_step_error(f, x, entries, exact, h) for h in steps])
    worst = np.maximum(errors, np.maximum(np.r_[np.inf, errors[:-1]], np.r_[errors[1:], np.inf]))
    return float(steps[worst.argmin()])


# --- comparison -------------------------------------------------------------------------------


def relative_error(
    a: Real[np.ndarray, "*shape"] | Scalar,
    b: Real[np.ndarray, "*shape"] | Scalar,
) -> float:
    r"""Largest difference of two entries, relative to the larger one.

    .. math:: \max_i \frac{|a_i - b_i|}{\max(|a_i|, |b_i|)}

    0 where both are 0; NaN if any entry is; equal infinities differ by
    0, an infinity and anything else by infinity. Never more than 2
    otherwise. Empty arrays: 0.

    Shapes: ``a`` and ``b`` the same. ValueError: they differ, or are no
    real numbers.
    """
    a, b = as_float("a", np.asarray(a)), as_float("b", np.asarray(b))
    check_same_shape("a", a, "b", b)
    return float(_relative_errors(a, b).max(initial=0))


def first_wrong(
    names: Sequence[str],
    got: Sequence[Any],
    want: Sequence[Any],
    rtol: float,
) -> str | None:
    """Name of the first intermediate result that is off.

    What comes after it is wrong because of it. Off means a relative
    error above ``rtol``, a NaN, or another shape. None: all are right.

    ValueError: ``names``, ``got`` and ``want`` differ in length.
    """
    if not len(names) == len(got) == len(want):
        lengths = f"{len(names)}, {len(got)} and {len(want)}"
        raise ValueError(f"names, got, want: expected the same length; got {lengths}")
    for name, a, b in zip(names, got, want, strict=True):
        # "error > rtol" would let NaN pass.
        if np.shape(a) != np.shape(b) or not relative_error(a, b) <= rtol:
            return name
    return None


@dataclass(frozen=True)
class GradientReport:
    """Where and how a gradient is off; ``str()`` says it in words.

    ``error`` holds the relative errors, 0 where the difference is below
    what the measurement resolves; ``wrong`` the entries that are off,
    ``where`` the index of the one with the largest difference (None
    where none is off, or the shapes differ), ``observations`` what
    relation holds.
    """

    name: str
    ok: bool
    got: Float[np.ndarray, "..."]
    want: Float[np.ndarray, "..."]
    error: Float[np.ndarray, "..."]
    max_error: float
    where: tuple[int, ...] | None
    wrong: Bool[np.ndarray, "..."]
    observations: tuple[Observation, ...]

    def __str__(self) -> str:
        if self.ok:
            return (
                f"{self.name} agrees with the numerical gradient: "
                f"largest relative error {self.max_error:.1e} in {_count(self.want.size)}"
            )
        lines = [f"{self.name} is wrong in {int(self.wrong.sum())} of {_count(self.wrong.size)}"]
        if self.where is not None:
            got, want = self.got[self.where], self.want[self.where]
            at = f" at {_place(self.where)}" if self.where else ""
            lines.append(f"largest difference{at}: {got:.6g}, numerically {want:.6g}")
        return "\n- ".join([*lines, *(o.text for o in self.observations)])


def check_gradient(
    f: Callable[..., Any],
    x: Point,
    grad: Any,
    *,
    rtol: float = 1e-6,
    eps: Step = None,
    name: str = "gradient",
) -> GradientReport:
    """Hold ``grad`` against the numerical gradient; say what is off.

    An entry is wrong where it differs by more than ``rtol`` relative to
    the larger of the two, and by more than ten times the measurement's
    own error. ``grad`` may be anything that ``np.asarray`` takes;
    another shape than x's is reported, not raised.

    ValueError: as numerical_gradient; ``grad`` holds no real numbers.
    """
    x = _point("x", x)
    got = as_float(name, np.asarray(grad)).astype(np.float64)
    want, noise = np.zeros(x.shape), np.zeros(x.shape)
    for i, slope in _slopes(f, x, eps):
        want[i], noise[i] = slope.value, 10 * slope.error
    if got.shape != want.shape:
        return _misshapen(name, got, want, rtol)
    wrong = wrong_entries(got, want, rtol, noise)
    with np.errstate(invalid="ignore"):
        off = _absolute(np.asarray(got - want))
    error = np.where(off <= noise, 0, _relative_errors(got, want))
    where = _worst(np.where(wrong, off, -1)) if wrong.any() else None
    # What is right up to noise shall not be described as a difference.
    seen = _described(np.where(wrong, got, want), want, rtol)
    top = float(error.max(initial=0))
    ok = not wrong.any()
    return GradientReport(name, ok, got, want, error, top, where, wrong, seen)


def _misshapen(
    name: str, got: Float[np.ndarray, "..."], want: Float[np.ndarray, "..."], rtol: float
) -> GradientReport:
    error, wrong = np.full(want.shape, np.nan), np.ones(want.shape, bool)
    seen = _described(got, want, rtol)
    return GradientReport(name, False, got, want, error, np.nan, None, wrong, seen)


def _described(
    got: Float[np.ndarray, "..."], want: Float[np.ndarray, "..."], rtol: float
) -> tuple[Observation, ...]:
    return describe_difference(got, want, rtol, beside="the numerical one")


def _absolute(difference: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Sizes of differences, NaN as infinite."""
    return np.asarray(np.nan_to_num(np.abs(difference), nan=np.inf))


# --- one slope --------------------------------------------------------------------------------


class Slope(NamedTuple):
    """A measured derivative and an absolute estimate of its error."""

    value: float
    error: float

    @property
    def doubt(self) -> float:
        """The error relative to the value; 1 where a value of 0 is only known to be small."""
        if self.value == 0:
            return float(self.error > 0)
        doubt = self.error / abs(self.value)
        return np.inf if np.isnan(doubt) else doubt


class _StepVanishes(ValueError):
    pass


def _slopes(
    f: Callable[..., Any], x: Float[np.ndarray, "..."], eps: Step
) -> Iterator[tuple[tuple[int, ...], Slope]]:
    step = _step(f, x, eps)
    # Where f(x) is NaN, no step has anything to say.
    known = x.size > 0 and np.isfinite(_value(f, x))
    noise = _noise(f, x) if known and step is None else 0.0
    for i in np.ndindex(x.shape):
        if np.isinf(x[i]):
            yield i, Slope(0.0, 0.0)
        elif known:
            yield i, _slope(_along(f, x, i), float(x[i]), step, noise)
        else:
            yield i, Slope(np.nan, np.nan)


def _slope(g: Callable[[float], float], t: float, h: float | None, noise: float = 0.0) -> Slope:
    if h is not None:
        return _measured(g, t, h)
    near = min(2**-6, abs(t) / 2) if t else 2**-6
    # At t = 1e14 floats lie 1/64 apart: step over thousands of them.
    near = max(near, 2**12 * float(np.spacing(abs(t))))
    return _searched(g, t, near, max(1.0, abs(t)) / 4, noise)


def _slope_along(
    f: Callable[..., Any], x: Float[np.ndarray, "..."], v: Float[np.ndarray, "..."], eps: Step
) -> Slope:
    check_same_shape("v", v, "x", x)
    longest = float(np.abs(v).max(initial=0))
    if not 0 < longest < np.inf:
        raise ValueError(f"v: expected a finite direction other than 0; got one of size {longest}")
    h = _step(f, x, eps)
    if h is not None:
        return _measured(_towards(f, x, v), 0.0, h)
    moved = (x != 0) & (v != 0)
    room = float((np.abs(x[moved]) / np.abs(v[moved])).min(initial=np.inf))
    near = min(2**-6 / longest, room / 2)
    return _searched(_towards(f, x, v), 0.0, near, _reach(x) / longest / 4, _noise(f, x))


def _noise(f: Callable[..., Any], x: Float[np.ndarray, "..."]) -> float:
    """Rounding noise of ``f`` at ``x``: its bend over a few neighbouring floats.

    Over so short a way ``f`` is straight, so what bends is noise. The sum of a normalised row
    is 0 up to 1e-16 and has noise of that size: by ``EPSILON * |f|`` it would have none.
    """
    values, signs = [_value(f, x), _value(f, x)], np.random.default_rng(0)
    if values[0] != values[1]:  # random: no rounding, and no excuse for a wrong gradient
        return 0.0
    ulp = np.where(np.isfinite(x), np.spacing(np.abs(x)), 0.0)
    bends = [0.0]
    for n in (1, 2, 3):
        step = n * ulp * signs.choice([-1.0, 1.0], x.shape)
        right, left = (_tried(f, np.asarray(x + s)) for s in (step, -step))
        bends.append(abs(right - 2 * values[0] + left))
    largest = float(np.max(bends))
    return largest if largest <= 1e-10 * max(1.0, abs(values[0])) else 0.0


def _tried(f: Callable[..., Any], x: np.ndarray) -> float:
    """``f(x)``, NaN where x has left its domain."""
    try:
        with np.errstate(all="ignore"):
            return _value(f, x)
    except (ArithmeticError, ValueError):
        return np.nan


def _measured(g: Callable[[float], float], t: float, h: float, noise: float = 0.0) -> Slope:
    """Central difference with what rounding alone may do to it."""
    right, left, distance = _ends(g, t, h)
    noise = max(noise, EPSILON * max(abs(right), abs(left)))
    return Slope((right - left) / distance, noise / h)


def _ends(g: Callable[[float], float], t: float, h: float) -> tuple[float, float, float]:
    right, left = t + h, t - h
    if right == left:
        raise _StepVanishes(f"eps: expected a step that moves {t:.6g}; got {h:.6g}")
    # 1e6 + 1e-6 is off by 1e-11, a relative 1e-5 of the step: divide
    # by the distance really stepped, not by 2h.
    return g(right), g(left), right - left


def _searched(
    g: Callable[[float], float], t: float, near: float, wide: float, noise: float
) -> Slope:
    """Extrapolate from ``near`` down; where rounding spoils that, from ever larger steps."""
    slope = _extrapolated(g, t, near, noise)
    # f = 1 + x at x = 1e-6: a step within |x| drowns in rounding.
    while slope.doubt > 1e-9 and 4 * near <= wide and (slope.value or near < 2**-6):
        near *= 4
        larger = _ventured(g, t, near, noise)
        # x + cos x at x = 1e6: steps of 1e4 agree among themselves on
        # the slope 1. What a larger step says must fit the smaller one's.
        if not abs(larger.value - slope.value) <= 10 * slope.error:
            break
        slope = min(slope, larger, key=lambda s: s.error)
    return slope


def _ventured(g: Callable[[float], float], t: float, h: float, noise: float) -> Slope:
    # A large step may leave f's domain: what that raises decides nothing.
    try:
        with np.errstate(all="ignore"):
            return _richardson(*(_measured(g, t, h / n, noise) for n in (1, 2, 4)))
    except (ArithmeticError, ValueError):
        return Slope(np.nan, np.inf)


def _extrapolated(g: Callable[[float], float], t: float, h: float, noise: float) -> Slope:
    """Halve ``h`` until two extrapolations agree, or rounding outweighs the gain."""
    best, rows = Slope(np.nan, np.inf), list[Slope]()
    while len(rows) < 50 and t + h != t - h:
        rows.append(_measured(g, t, h, noise))
        if len(rows) > 2:
            best = min(best, _richardson(*rows[-3:]), key=lambda s: s.error)
            if best.doubt <= 1e-10 or rows[-1].error > best.error:
                break
        h /= 2
    return best


def _richardson(whole: Slope, half: Slope, quarter: Slope) -> Slope:
    """Remove the errors in h² and h⁴ from differences at h, h/2 and h/4."""
    coarse = half.value + (half.value - whole.value) / 3
    fine = quarter.value + (quarter.value - half.value) / 3
    value = fine + (fine - coarse) / 15
    return Slope(value, abs(value - fine) + quarter.error)


def _along(
    f: Callable[..., Any], x: Float[np.ndarray, "..."], i: tuple[int, ...]
) -> Callable[[float], float]:
    """``f`` as a function of entry ``i`` alone."""
    return lambda t: _value(f, _replaced(x, i, t))


def _towards(
    f: Callable[..., Any], x: Float[np.ndarray, "..."], v: Float[np.ndarray, "..."]
) -> Callable[[float], float]:
    """``f`` along the line through ``x`` in direction ``v``."""
    # 0-d: numpy turns x + t v into a scalar, which is no array.
    return lambda t: _value(f, np.asarray(x + t * v))


def _replaced(x: np.ndarray, i: tuple[int, ...], t: float) -> np.ndarray:
    x = x.copy()
    x[i] = t
    return x


# --- at the door ------------------------------------------------------------------------------


def _point(name: str, x: Any) -> Float[np.ndarray, "..."]:
    x = np.asarray(x)
    if x.dtype.kind != "f":
        raise ValueError(
            f"{name}: expected floating point, which a small step can move; "
            f"got dtype {x.dtype}: pass x.astype(float)"
        )
    return x.astype(np.float64)


def _step(f: Callable[..., Any], x: Float[np.ndarray, "..."], eps: Step) -> float | None:
    if eps is None:
        return None
    if isinstance(eps, str):
        if eps != "best":
            raise ValueError(f'eps: expected a positive number, None or "best"; got {eps!r}')
        return best_step(f, x)
    if not 0 < eps < np.inf:
        raise ValueError(f'eps: expected a positive number, None or "best"; got {eps!r}')
    return float(eps)


def _value(f: Callable[..., Any], x: np.ndarray) -> float:
    """``f`` of a copy of ``x``, as a float that shares no memory with it."""
    out = np.asarray(f(np.array(x)))
    if out.ndim or out.dtype.kind not in "fiu":
        got = f"an array of shape {out.shape}" if out.ndim else f"{out.dtype} {out}"
        raise ValueError(f"{_called(f)}: expected to return a real scalar; got {got}")
    return float(out)


def _imaginary(f: Callable[..., Any], z: np.ndarray) -> float:
    try:
        out = np.asarray(f(z))
    except TypeError as error:
        text = f"{_called(f)}: expected to take a complex array; it raised TypeError: {error}"
        raise ValueError(text) from error
    if out.ndim:
        raise ValueError(f"{_called(f)}: expected to return a scalar; got shape {out.shape}")
    if out.dtype.kind != "c":
        raise ValueError(
            f"{_called(f)}: expected to return a complex number for a complex x; got {out.dtype} "
            f"{out}: abs, a real part or a cast to float lost the imaginary part"
        )
    return float(out.imag)


def _check_analytic(
    f: Callable[..., Any], x: Float[np.ndarray, "..."], grad: Float[np.ndarray, "..."]
) -> None:
    if not (x.size and np.isfinite(x).all() and np.isfinite(grad).all()):
        return
    v = np.random.default_rng(0).normal(size=x.shape)
    slope = _slope_along(lambda x: np.real(f(x)), x, v, None)
    predicted = float((grad * v).sum())
    allowed = 1e-3 * float(np.abs(grad * v).sum() + abs(slope.value)) + 10 * slope.error
    if abs(predicted - slope.value) > allowed:
        raise ValueError(
            f"{_called(f)}: not analytic at x: the imaginary part gives slope {predicted:.6g} "
            f"along a random direction, differences give {slope.value:.6g} (abs or conj inside?)"
        )


def _called(f: Callable[..., Any]) -> str:
    name = getattr(f, "__name__", type(f).__name__)
    return "f" if name in ("f", "<lambda>") else f"f ({name})"


# --- arithmetic -------------------------------------------------------------------------------


def _relative_errors(
    a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.maximum(np.abs(a), np.abs(b))
    # 1e308 - -1e308 overflows: halve what is large.
    half = np.where(size > 1, 0.5, 1.0)
    with np.errstate(all="ignore"):
        error = np.abs(half * a - half * b) / (half * np.where(size == 0, 1, size))
    error = np.where(np.isinf(size), np.inf, error)
    return np.where(a == b, 0.0, np.where(np.isnan(a) | np.isnan(b), np.nan, error))


def _step_error(
    f: Callable[..., Any],
    x: Float[np.ndarray, "..."],
    entries: Sequence[tuple[int, ...]],
    exact: Float[np.ndarray, "n"],
    h: float,
) -> float:
    """Root mean square error of central differences with step ``h``; inf where f breaks down."""
    try:
        with np.errstate(all="ignore"):
            slopes = [central_difference(_along(f, x, i), float(x[i]), h) for i in entries]
    except (ArithmeticError, ValueError):
        return np.inf
    error = float(np.sqrt(np.mean((np.array(slopes) - exact) ** 2)))
    return np.inf if np.isnan(error) else error


def _sweep_error(
    gradient: Callable[..., Any],
    f: Callable[..., Any],
    x: Float[np.ndarray, "*shape"],
    h: float,
    exact: Float[np.ndarray, "*shape"],
) -> float:
    try:
        measured = gradient(f, x, h)
    except _StepVanishes:
        measured = np.zeros(x.shape)
    return float(np.abs(measured - exact).max(initial=0))


def _reach(x: Float[np.ndarray, "..."]) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return max(1.0, float(finite.max(initial=0)))


def _worst(error: Float[np.ndarray, "..."]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))


def _place(where: tuple[int, ...]) -> str:
    return str(where[0]) if len(where) == 1 else str(where)


def _count(n: int) -> str:
    return "1 entry" if n == 1 else f"{n} entries"
