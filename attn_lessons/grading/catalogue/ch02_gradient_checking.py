"""Chapter 2: derivatives by differences, and what to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from attn_lessons import gradcheck as library
from attn_lessons.grading.catalogue._parts import named, scattered
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.probe import Probe

CHAPTER = "ch02_gradient_checking"
SHAPES = f"{CHAPTER}.html#ch02-shapes"
CENTRAL = f"{CHAPTER}.html#ch02-central"
STEP = f"{CHAPTER}.html#ch02-step"
RESTORE = f"{CHAPTER}.html#ch02-restore"
RELATIVE_ERROR = f"{CHAPTER}.html#ch02-relative-error"
DIRECTIONAL = f"{CHAPTER}.html#ch02-directional"
FIRST_WRONG = f"{CHAPTER}.html#ch02-first-wrong"

Array = np.ndarray
Rng = np.random.Generator

# What a default step may cost. On the smooth functions below a central difference with a step
# from 1e-7 to 1e-3 stays within 2e-7 of the derivative, one of 1e-2 is 1.7e-5 off.
BY_DEFAULT = 1e-6
# A loss near 1000 is rounded to 1.1e-13: steps from 1e-7 up stay within 6e-7 of a derivative
# near 1, a step of 1e-8 turns it into a multiple of 5.7e-6.
AT_1000 = 1.2e-6
# A given step leaves no freedom but rounding.
GIVEN = 1e-9

# Steps that people write down, for mistakes whose numbers depend on the step.
EPS = float(np.finfo(float).eps)
STEPS = (1e-5, 1e-6, 1e-4, 1e-7, 1e-3, 1e-8, EPS**0.5, EPS ** (1 / 3))
SMALL_STEPS = (1e-8, 1e-10, 1e-12, 1e-9, EPS**0.5, 1e-11, 1e-13, 1e-14, 1e-15, EPS, 1e-16, 1e-20)
LARGE_STEPS = (1e-2, 0.1, 0.5, 1.0)


# --- functions to differentiate --------------------------------------------------------------


def _away_from_zero(rng: Rng, shape: tuple[int, ...]) -> Array:
    """Numbers between 0.5 and 1.5 in size, of either sign."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def _sine(rng: Rng, shape: tuple[int, ...], offset: float = 0.0) -> tuple[Probe, Array]:
    """A sine an entry, taken where its slope is between 0.5 and 1.5 in size."""
    x = rng.normal(size=shape)
    phase = rng.uniform(-0.5, 0.5, shape) - x
    height = _away_from_zero(rng, shape)
    return Probe("sine", {"height": height, "phase": phase, "offset": np.array(offset)}), x


def _quadratic(rng: Rng, shape: tuple[int, ...]) -> tuple[Probe, Array]:
    n = int(np.prod(shape))
    params = {"matrix": rng.normal(size=(n, n)), "slope": rng.normal(size=shape)}
    return Probe("quadratic", params), rng.normal(size=shape)


def _logsumexp(rng: Rng, shape: tuple[int, ...]) -> tuple[Probe, Array]:
    return Probe("logsumexp", {"weight": _away_from_zero(rng, shape)}), rng.normal(size=shape)


def _cubic(rng: Rng, shape: tuple[int, ...]) -> tuple[Probe, Array]:
    params = {
        # Beyond 1, so that a step scaled with |x| differs from the step.
        "centre": 2.5 * _away_from_zero(rng, shape),
        "slope": _away_from_zero(rng, shape),
        "curve": _away_from_zero(rng, shape),
        "third": 6 * _away_from_zero(rng, shape),
    }
    return Probe("cubic", params), params["centre"] + 0.1 * rng.uniform(-1, 1, shape)


def _corner(rng: Rng, shape: tuple[int, ...]) -> tuple[Probe, Array]:
    """A corner in every entry of x: the slopes on its two sides differ."""
    centre = rng.normal(size=shape)
    params = {
        "centre": centre,
        "slope": _away_from_zero(rng, shape),
        "bend": rng.uniform(0.5, 1.5, shape),
    }
    return Probe("corner", params), centre.copy()


def _sine_at_zero(rng: Rng, n: int) -> tuple[Probe, Array]:
    params = {
        "height": _away_from_zero(rng, (n,)),
        "phase": rng.uniform(-0.5, 0.5, n),
        "offset": np.array(0.0),
    }
    x = rng.normal(size=n)
    x[rng.permutation(n)[: n // 2]] = 0.0
    params["phase"] = np.where(x == 0, params["phase"], params["phase"] - x)
    return Probe("sine", params), x


def _numerical_gradient_cases(rng: Rng) -> list[Case]:
    scattered_f, scattered_x = _quadratic(rng, (3, 4))
    return [
        Case(
            "eps=0.1 given",
            _cubic(rng, (3,)),
            {"eps": 0.1},
            hint="A cubic: the central difference with this step is exact arithmetic, and "
            "differs from the derivative by the third-order term.",
            rtol=GIVEN,
        ),
        Case(
            "a vector",
            _sine(rng, (4,)),
            hint="A smooth function and your own default step.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "a corner in every entry",
            _corner(rng, (4,)),
            hint="The slopes left and right of x differ; the central difference is their mean, "
            "whatever the step.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "entries of x that are 0",
            _sine_at_zero(rng, 4),
            hint="A step in proportion to x is no step at all here.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "a single number",
            _sine(rng, ()),
            hint="x has no axes: its shape is (), and so is the gradient's.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "a matrix whose entries interact",
            _quadratic(rng, (2, 3)),
            hint="The slope in one entry depends on all others: each entry is moved alone, and "
            "put back before the next.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "three axes",
            _logsumexp(rng, (2, 3, 2)),
            hint="f wants x in its own shape, and the gradient has this shape too.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "not contiguous in memory",
            (scattered_f, scattered(scattered_x)),
            hint="reshape(-1) and ravel() copy here, so f does not see what is changed in them.",
            rtol=BY_DEFAULT,
        ),
        Case(
            "eps=0.01 given for a matrix",
            _cubic(rng, (3, 2)),
            {"eps": 0.01},
            hint="The given step is used as it is, in every entry.",
            rtol=GIVEN,
        ),
        Case(
            "a loss near 1000",
            _sine(rng, (8,), offset=1000.0),
            hint="f is rounded to 1e-13 here; divided by too small a step this is no longer small.",
            rtol=AT_1000,
        ),
    ]


def _with_direction(
    rng: Rng, made: tuple[Probe, Array], wrong: Callable[[Array], Array] | None = None
) -> tuple[Probe, Array, Array, Array]:
    """f, x, a gradient (right, or made wrong) and a direction along which f rises by 1."""
    f, x = made
    exact = _complex_step(f, x)
    v = rng.normal(size=x.shape)
    v = v + exact * (1 - np.sum(exact * v)) / np.sum(exact**2)
    return f, x, exact if wrong is None else np.asarray(wrong(exact)), v


def _directional_cases(rng: Rng) -> list[Case]:
    def one_entry_off(grad: Array) -> Array:
        off = grad.copy()
        off[rng.integers(len(off))] += 1.0
        return off

    def with_nan(grad: Array) -> Array:
        bad = grad.copy()
        bad[rng.integers(len(bad))] = np.nan
        return bad

    flat = Probe("linear", {"slope": np.zeros(4), "offset": rng.normal(size=())})
    awkward = _with_direction(rng, _quadratic(rng, (3, 4)), lambda g: 1.5 * g)
    return [
        Case(
            "eps=0.1 given",
            _with_direction(rng, _cubic(rng, (4,))),
            {"eps": 0.1},
            hint="x is moved by eps times v, and by nothing else.",
            atol=GIVEN,
        ),
        Case(
            "a right gradient",
            _with_direction(rng, _sine(rng, (5,))),
            hint="Both sides agree: the error is nearly 0.",
            atol=BY_DEFAULT,
        ),
        Case(
            "twice the gradient",
            _with_direction(rng, _sine(rng, (5,)), lambda g: 2 * g),
            hint="2 against 1 is a relative error of 1/2.",
            atol=BY_DEFAULT,
        ),
        Case(
            "the sign turned over",
            _with_direction(rng, _sine(rng, (6,)), lambda g: -g),
            hint="-1 against 1 is a relative error of 2.",
            atol=BY_DEFAULT,
        ),
        Case(
            "one entry off",
            _with_direction(rng, _sine(rng, (5,)), one_entry_off),
            hint="One wrong entry shows through its share of v.",
            atol=BY_DEFAULT,
        ),
        Case(
            "a third too small",
            _with_direction(rng, _logsumexp(rng, (7,)), lambda g: g * 2 / 3),
            hint="The larger of the two numbers is the numerical one here.",
            atol=BY_DEFAULT,
        ),
        Case(
            "a corner in every entry",
            _with_direction(rng, _corner(rng, (4,)), lambda g: 0.9 * g),
            hint="The slopes on the two sides of x differ; the central difference is their mean.",
            atol=BY_DEFAULT,
        ),
        Case(
            "a matrix not contiguous in memory",
            (awkward[0], *(scattered(a) for a in awkward[1:])),
            hint="The inner product runs over all entries of both matrices.",
            atol=BY_DEFAULT,
        ),
        Case(
            "a single number",
            _with_direction(rng, _sine(rng, ()), lambda g: 3 * g),
            hint="x, grad and v have shape ().",
            atol=BY_DEFAULT,
        ),
        Case(
            "a constant function",
            (flat, rng.normal(size=4), np.zeros(4), rng.normal(size=4)),
            hint="Both numbers are 0: the relative error of two zeros is 0.",
            atol=BY_DEFAULT,
        ),
        Case(
            "NaN in the gradient",
            _with_direction(rng, _sine(rng, (5,)), with_nan),
            hint="A gradient with NaN in it must not come out as right.",
            atol=BY_DEFAULT,
        ),
        Case(
            "a loss near 1000",
            _with_direction(rng, _sine(rng, (6,), offset=1000.0), lambda g: 1.25 * g),
            hint="f is rounded to 1e-13 here; divided by too small a step this is no longer small.",
            atol=AT_1000,
        ),
    ]


def _relative_error_cases(rng: Rng) -> list[Case]:
    def pair(*shape: int) -> tuple[Array, Array]:
        a = rng.normal(size=shape)
        return a, a + 0.1 * rng.normal(size=shape)

    zeros_a, zeros_b = pair(3, 4)
    both_zero = rng.permuted(np.arange(12) < 4).reshape(3, 4)
    zeros_a[both_zero] = zeros_b[both_zero] = 0.0
    one_zero = _away_from_zero(rng, (5,))
    with_zero = one_zero * (1 + 0.01 * rng.uniform(-1, 1, 5))
    with_zero[rng.integers(5)] = 0.0
    nan_a, nan_b = pair(2, 5)
    nan_a[rng.integers(2), rng.integers(5)] = np.nan
    nan_c, nan_d = pair(6)
    nan_d[rng.integers(6)] = np.nan
    small = _away_from_zero(rng, (6,))
    near = small * (1 + 1e-9 * rng.uniform(-1, 1, 6))
    place = rng.integers(6)
    small[place], near[place] = 3e-40, 1e-40
    scattered_a, scattered_b = pair(4, 3)
    large = _away_from_zero(rng, (5,))
    return [
        Case("vectors", pair(6), hint="The largest of six relative errors."),
        Case("matrices", pair(3, 4), hint="The largest over all entries: one number."),
        Case("equal arrays", (large, large.copy()), hint="No error at all: 0."),
        Case(
            "entries that are 0 in both",
            (zeros_a, zeros_b),
            hint="Where both are 0 they agree: the error there is 0, not 0/0.",
        ),
        Case(
            "nothing but zeros",
            (np.zeros((2, 3)), np.zeros((2, 3))),
            hint="Two arrays of zeros agree: 0.",
        ),
        Case(
            "0 against a number",
            (one_zero, with_zero),
            hint="|a - 0| / max(|a|, 0) is 1, however small a is.",
        ),
        Case(
            "tiny entries far apart",
            (small, near),
            hint="3e-40 against 1e-40 is a relative error of 2/3, beside entries that agree.",
        ),
        Case(
            "opposite signs",
            (large, -large * rng.uniform(0.5, 0.9, 5)),
            hint="Between 1 and 2: the difference is larger than either number.",
        ),
        Case("NaN in a", (nan_a, nan_b), hint="One NaN makes the result NaN."),
        Case("NaN in b", (nan_c, nan_d), hint="One NaN makes the result NaN."),
        Case(
            "single numbers",
            (np.array(rng.normal() + 3), np.array(rng.normal() + 5)),
            hint="Arrays of shape ().",
        ),
        Case(
            "not contiguous in memory",
            (scattered(scattered_a), scattered_b),
            hint="Entries belong together by index, not by their place in memory.",
        ),
    ]


# --- oracles: the same values by another road ------------------------------------------------


def _complex_step(f: Probe, x: Array) -> Array:
    """The gradient to the last digit: no difference is taken, so nothing cancels."""
    gradient = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[i] += 1e-30j
        gradient[i] = f(moved).imag / 1e-30
    return gradient


def _extended_difference(f: Probe, x: Array, eps: float) -> Array:
    """The central difference with this step, in extended precision."""
    gradient = np.empty(x.shape)
    step = np.longdouble(eps)
    for i in np.ndindex(x.shape):
        above, below = x.astype(np.longdouble), x.astype(np.longdouble)
        above[i] += step
        below[i] -= step
        gradient[i] = (f(above) - f(below)) / (2 * step)
    return gradient


def _gradient_oracle(f: Probe, x: Array, eps: float | None = None) -> Array:
    return _complex_step(f, x) if eps is None else _extended_difference(f, x, eps)


def _fraction_error(a: float, b: float) -> float:
    """The relative error of two numbers, in exact rational arithmetic."""
    if np.isnan(a) or np.isnan(b):
        return float("nan")
    one, other = Fraction(a), Fraction(b)
    larger = max(abs(one), abs(other))
    return float(abs(one - other) / larger) if larger else 0.0


def _relative_error_oracle(a: Array, b: Array) -> float:
    errors = [_fraction_error(float(a[i]), float(b[i])) for i in np.ndindex(a.shape)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _directional_oracle(
    f: Probe, x: Array, grad: Array, v: Array, eps: float | None = None
) -> float:
    if eps is None:
        rise = f(x + 1e-30j * v).imag / 1e-30
    else:
        step = np.longdouble(eps) * v
        rise = (f(x + step) - f(x - step)) / (2 * np.longdouble(eps))
    predicted = sum(grad[i] * v[i] for i in np.ndindex(x.shape))
    return _fraction_error(float(predicted), float(rise))


# --- mistakes: numerical_gradient ------------------------------------------------------------


def _each_entry(difference: Callable[..., Any]) -> Callable[..., Array]:
    """The gradient whose entry i is ``difference(f, x, i, h)``, x being the caller's own array."""

    def gradient(f: Probe, x: Array, h: float) -> Array:
        found = np.zeros(x.shape)
        for i in np.ndindex(x.shape):
            found[i] = difference(f, x, i, h)
        return found

    return gradient


def _moved(x: Array, i: tuple[int, ...], by: float) -> Array:
    moved = x.copy()
    moved[i] += by
    return moved


@_each_entry
def _central(f, x, i, h):
    return (f(_moved(x, i, h)) - f(_moved(x, i, -h))) / (2 * h)


@_each_entry
def _central_two_steps_down(f, x, i, h):
    above = _moved(x, i, h)
    return (f(above) - f(_moved(above, i, -2 * h))) / (2 * h)


@_each_entry
def _forward(f, x, i, h):
    return (f(_moved(x, i, h)) - f(x)) / h


@_each_entry
def _backward(f, x, i, h):
    return (f(x) - f(_moved(x, i, -h))) / h


@_each_entry
def _forward_halved(f, x, i, h):
    return (f(_moved(x, i, h)) - f(x)) / (2 * h)


@_each_entry
def _left_below(f, x, i, h):
    x[i] += h
    above = f(x)
    x[i] -= 2 * h
    return (above - f(x)) / (2 * h)


@_each_entry
def _left_below_saved(f, x, i, h):
    saved = x[i].copy()
    x[i] = saved + h
    above = f(x)
    x[i] = saved - h
    return (above - f(x)) / (2 * h)


@_each_entry
def _left_above(f, x, i, h):
    x[i] += h
    return (f(x) - f(_moved(x, i, -2 * h))) / (2 * h)


@_each_entry
def _put_back_by_adding(f, x, i, h):
    x[i] += h
    above = f(x)
    x[i] -= 2 * h
    below = f(x)
    x[i] += h
    return (above - below) / (2 * h)


@_each_entry
def _not_halved(f, x, i, h):
    return (f(_moved(x, i, h)) - f(_moved(x, i, -h))) / h


@_each_entry
def _swapped_sides(f, x, i, h):
    return (f(_moved(x, i, -h)) - f(_moved(x, i, h))) / (2 * h)


@_each_entry
def _relative_step(f, x, i, h):
    return _central_entry(f, x, i, h * abs(x[i]))


def _central_entry(f, x, i, h):
    return (f(_moved(x, i, h)) - f(_moved(x, i, -h))) / (2 * h)


@_each_entry
def _floored_relative_step(f, x, i, h):
    return _central_entry(f, x, i, h * max(1.0, abs(x[i])))


@_each_entry
def _rounded_result(f, x, i, h):
    return np.float32(_central_entry(f, x, i, h))


def _ravelled(f: Probe, x: Array, h: float) -> Array:
    flat = x.reshape(-1)
    found = np.zeros(x.size)
    for i in range(x.size):
        saved = flat[i]
        flat[i] = saved + h
        above = f(x)
        flat[i] = saved - h
        below = f(x)
        flat[i] = saved
        found[i] = (above - below) / (2 * h)
    return found.reshape(x.shape)


def _all_at_once(f: Probe, x: Array, h: float) -> Any:
    return (f(x + h) - f(x - h)) / (2 * h)


def _all_at_once_filled(f: Probe, x: Array, h: float) -> Array:
    return np.full(x.shape, _all_at_once(f, x, h))


def _row_at_a_time(f: Probe, x: Array, h: float) -> Array:
    found = np.zeros(x.shape)
    for i in range(len(x)):
        found[i] = _central_entry(f, x, i, h)
    return found


def _flattened(f: Probe, x: Array, h: float) -> Array:
    flat = x.flatten()
    found = np.zeros(x.size)
    for i in range(x.size):
        found[i] = (f(_moved(flat, (i,), h)) - f(_moved(flat, (i,), -h))) / (2 * h)
    return found.reshape(x.shape)


def _flat_result(f: Probe, x: Array, h: float) -> Array:
    return _central(f, x, h).ravel()


def _same_point_twice(f, x, eps=None):
    return np.zeros(x.shape)


def _with_step(
    formula: Callable[..., Any], default: float, given: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """An answer that uses ``formula``, at ``default`` where no step is given."""

    def answer(f, x, eps=None):
        if eps is None:
            return formula(f, x, default)
        return (given or formula)(f, x, eps)

    return answer


def _eps_ignored(f, x, eps=None):
    return _central(f, x, 1e-6)


def _at(steps: Sequence[float], *formulas: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Every formula at every default step."""
    return [_with_step(formula, step) for formula in formulas for step in steps]


NUMERICAL_GRADIENT = Exercise(
    id="numerical_gradient",
    chapter=CHAPTER,
    title="The gradient of any function, by central differences",
    points=4,
    returns=("gradient",),
    reference=library.numerical_gradient,
    oracle=_gradient_oracle,
    cases=_numerical_gradient_cases,
    float32_allowed=False,
    tokens=("gradient",),
    mistakes=(
        *named(
            "forward difference",
            "(f(x + h) - f(x)) / h has an error of order h, the central difference one of order "
            "h²: use a point on either side.",
            CENTRAL,
            *_at(STEPS, _forward),
        ),
        *named(
            "backward difference",
            "(f(x) - f(x - h)) / h has an error of order h, the central difference one of order "
            "h²: use a point on either side.",
            CENTRAL,
            *_at(STEPS[:6], _backward),
        ),
        *named(
            "x not restored",
            "Each entry has to be put back, exactly as it was, before the next is moved: save "
            "the old value and assign it; subtracting what was added leaves rounding behind.",
            RESTORE,
            *_at(STEPS[:5], _left_below, _left_below_saved, _left_above, _put_back_by_adding),
        ),
        *named(
            "shared view",
            "x_plus = x gives the same array a second name: what is done to x_minus is done to "
            "x_plus too, and the two values of f are not taken at x + h and x - h.",
            RESTORE,
            _same_point_twice,
            *_at(STEPS[:6], _forward_halved),
        ),
        *named(
            "a copy moved that f does not see",
            "reshape(-1) and ravel() return a copy where x is not contiguous: moving its "
            "entries leaves x, and so f(x), as they were, and the difference is 0.",
            RESTORE,
            *_at(STEPS[:2], _ravelled),
        ),
        *named(
            "eps too small",
            "f is only known to a relative 1e-16, and the difference divides that by the step: "
            "a central difference wants a step near 1e-5.",
            STEP,
            *_at(SMALL_STEPS, _central, _central_two_steps_down),
        ),
        *named(
            "eps too large",
            "The central difference is off by h²/6 times the third derivative: a step near 1e-5 "
            "keeps that small.",
            STEP,
            *_at(LARGE_STEPS, _central),
        ),
        *named(
            "eps argument ignored",
            "When a step is given it is the one to use; the default is for eps=None.",
            STEP,
            _eps_ignored,
        ),
        *named(
            "divided by h instead of 2h",
            "The two points lie 2h apart.",
            CENTRAL,
            *_at(STEPS[:1], _not_halved),
        ),
        *named(
            "sign",
            "The value at x + h comes first: f(x + h) - f(x - h).",
            CENTRAL,
            *_at(STEPS[:1], _swapped_sides),
        ),
        *named(
            "step in proportion to x",
            "A step of eps * |x| is 0 where x is 0, and 0/0 is NaN; a given eps is the step "
            "itself.",
            STEP,
            *_at(STEPS[:1], _relative_step),
            _with_step(_relative_step, STEPS[0], given=_central),
        ),
        *named(
            "given step rescaled",
            "When a step is given it is the one to use, in every entry; scaling it with |x| is a "
            "choice for the default.",
            STEP,
            *_at(STEPS[:1], _floored_relative_step),
        ),
        *named(
            "all entries moved at once",
            "x + h moves every entry: that measures the slope along (1, …, 1), the sum of all "
            "partial derivatives, not each of them.",
            CENTRAL,
            *_at(STEPS[:1], _all_at_once, _all_at_once_filled),
        ),
        *named(
            "a whole row moved at once",
            "x[i] of a matrix is a row, and range(len(x)) counts rows: go over all indices, with "
            "np.ndindex(x.shape) for example.",
            SHAPES,
            *_at(STEPS[:1], _row_at_a_time),
        ),
        *named(
            "f given a flat array",
            "f takes an array of x's own shape; flattening is for the loop, not for f.",
            SHAPES,
            *_at(STEPS[:1], _flattened),
        ),
        *named(
            "a flat gradient",
            "The gradient has x's shape: every entry of x has its derivative at the same index.",
            SHAPES,
            *_at(STEPS[:1], _flat_result),
        ),
        *named(
            "single precision",
            "float32 holds 7 digits, fewer than a difference with a good step delivers.",
            STEP,
            *_at(STEPS[:1], _rounded_result),
        ),
    ),
)


# --- mistakes: relative_error ----------------------------------------------------------------


def _ratios(a: Array, b: Array) -> Array:
    """|a - b| / max(|a|, |b|) entry by entry, NaN where both are 0."""
    return np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))


def _zero_by_zero(a, b):
    return _ratios(a, b).max()


def _nan_skipped(a, b):
    ratios = np.where((a == 0) & (b == 0), 0.0, _ratios(a, b))
    return np.max(ratios, where=~np.isnan(ratios), initial=0.0)


def _mean_error(a, b):
    return np.where((a == 0) & (b == 0), 0.0, _ratios(a, b)).mean()


def _mean_error_zero_by_zero(a, b):
    return _ratios(a, b).mean()


def _mean_without_zeros(a, b):
    used = ~((a == 0) & (b == 0))
    return _ratios(a, b)[used].mean() if used.any() else 0.0


def _over(denominator: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
    """The largest |a - b| / denominator, 0 where both are 0."""

    def answer(a, b):
        ratios = np.abs(a - b) / denominator(a, b)
        return np.where((a == 0) & (b == 0), 0.0, ratios).max()

    return answer


def _over_raw(denominator: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
    """The largest |a - b| / denominator, whatever happens at 0."""

    def answer(a, b):
        return (np.abs(a - b) / denominator(a, b)).max()

    return answer


def _by_sum(a, b):
    return np.abs(a) + np.abs(b)


def _by_b(a, b):
    return np.abs(b)


def _by_a(a, b):
    return np.abs(a)


def _by_smaller(a, b):
    return np.minimum(np.abs(a), np.abs(b))


def _by_mean_size(a, b):
    return (np.abs(a) + np.abs(b)) / 2


def _floored(floor: float) -> Callable[[Array, Array], Any]:
    def answer(a, b):
        return (np.abs(a - b) / np.maximum(np.maximum(np.abs(a), np.abs(b)), floor)).max()

    return answer


def _raised(floor: float) -> Callable[[Array, Array], Any]:
    def answer(a, b):
        return (np.abs(a - b) / (np.maximum(np.abs(a), np.abs(b)) + floor)).max()

    return answer


def _floored_sum(floor: float) -> Callable[[Array, Array], Any]:
    def answer(a, b):
        return (np.abs(a - b) / np.maximum(np.abs(a) + np.abs(b), floor)).max()

    return answer


def _raised_sum(floor: float) -> Callable[[Array, Array], Any]:
    def answer(a, b):
        return (np.abs(a - b) / (np.abs(a) + np.abs(b) + floor)).max()

    return answer


def _absolute_error(a, b):
    return np.abs(a - b).max()


def _without_magnitude(a, b):
    ratios = (a - b) / np.maximum(np.abs(a), np.abs(b))
    return np.where((a == 0) & (b == 0), 0.0, ratios).max()


def _denominator_signed(a, b):
    ratios = np.abs(a - b) / np.maximum(a, b)
    return np.where((a == 0) & (b == 0), 0.0, ratios).max()


def _of_the_whole(a, b):
    largest = max(np.abs(a).max(), np.abs(b).max())
    return np.abs(a - b).max() / largest if largest != 0 else 0.0


def _of_the_whole_raw(a, b):
    return np.abs(a - b).max() / np.maximum(np.abs(a).max(), np.abs(b).max())


def _of_norms(a, b):
    largest = max(np.linalg.norm(a), np.linalg.norm(b))
    return np.linalg.norm(a - b) / largest if largest != 0 else 0.0


def _of_norms_raw(a, b):
    return np.linalg.norm(a - b) / np.maximum(np.linalg.norm(a), np.linalg.norm(b))


def _of_norms_sum(a, b):
    return np.linalg.norm(a - b) / (np.linalg.norm(a) + np.linalg.norm(b))


def _of_norms_one(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def _sum_of_errors(a, b):
    return np.where((a == 0) & (b == 0), 0.0, _ratios(a, b)).sum()


def _close(a, b):
    return np.allclose(a, b)


def _entry_by_entry(a, b):
    return np.where((a == 0) & (b == 0), 0.0, _ratios(a, b))


# A floor shows only below it; a summand shows everywhere, down to the rounding at 1e-15.
SUMMANDS = (1e-8, 1e-12, 1e-10, 1e-7, 1e-6, 1e-9, 1e-15)

RELATIVE_ERROR_EXERCISE = Exercise(
    id="relative_error",
    chapter=CHAPTER,
    title="One number for how far two arrays are apart",
    points=2,
    returns=("error",),
    reference=library.relative_error,
    oracle=_relative_error_oracle,
    cases=_relative_error_cases,
    float32_allowed=False,
    mistakes=(
        *named(
            "division by zero",
            "Where both numbers are 0 the quotient is 0/0, which is NaN; two zeros agree, so "
            "their error is 0.",
            RELATIVE_ERROR,
            _zero_by_zero,
        ),
        *named(
            "nan ignored",
            "A NaN in either array has to come out: skipped, or lost in a comparison that is "
            "never true, it makes a broken gradient look right.",
            RELATIVE_ERROR,
            _nan_skipped,
        ),
        *named(
            "mean instead of max",
            "One wrong entry among thousands that are right hardly moves a mean: take the largest.",
            RELATIVE_ERROR,
            _mean_error,
            _mean_error_zero_by_zero,
            _mean_without_zeros,
        ),
        *named(
            "sum in the denominator",
            "|a| + |b| halves the error, or nearly: here the denominator is the larger of the two.",
            RELATIVE_ERROR,
            _over(_by_sum),
            _over_raw(_by_sum),
            _floored_sum(1e-8),
            *(_raised_sum(summand) for summand in SUMMANDS),
            _over(_by_mean_size),
            _over_raw(_by_mean_size),
        ),
        *named(
            "divided by one side only",
            "With |b| alone below, the result depends on which array is called b, and is "
            "infinite where b is 0.",
            RELATIVE_ERROR,
            _over(_by_b),
            _over_raw(_by_b),
            _over(_by_a),
            _over_raw(_by_a),
        ),
        *named(
            "smaller instead of larger in the denominator",
            "The denominator is the larger of the two magnitudes, so that the error against 0 "
            "is 1, not infinite.",
            RELATIVE_ERROR,
            _over(_by_smaller),
            _over_raw(_by_smaller),
        ),
        *named(
            "small number in the denominator",
            "A floor under the denominator hides every error in entries below it: 1e-40 against "
            "3e-40 comes out as agreement.",
            RELATIVE_ERROR,
            _floored(1e-8),
            *(_raised(summand) for summand in SUMMANDS),
        ),
        *named(
            "absolute error",
            "|a - b| says nothing until one knows how large a and b are: divide by the larger.",
            RELATIVE_ERROR,
            _absolute_error,
        ),
        *named(
            "magnitude forgotten",
            "Without the absolute values a negative number is not counted as an error, or turns "
            "the denominator's sign.",
            RELATIVE_ERROR,
            _without_magnitude,
            _denominator_signed,
        ),
        *named(
            "compared as a whole",
            "Divided by the largest entry or by the norm, an error in a small entry disappears "
            "beside large ones: divide entry by entry, then take the maximum.",
            RELATIVE_ERROR,
            _of_the_whole,
            _of_the_whole_raw,
            _of_norms,
            _of_norms_raw,
            _of_norms_sum,
            _of_norms_one,
        ),
        *named(
            "sum instead of max",
            "A sum grows with the number of entries: take the largest.",
            RELATIVE_ERROR,
            _sum_of_errors,
        ),
        *named(
            "a verdict instead of the error",
            "How far the arrays are apart is asked for, not whether that is near enough.",
            RELATIVE_ERROR,
            _close,
            lambda a, b: not _close(a, b),
        ),
        *named(
            "an array instead of its maximum",
            "The result is one number, the largest of the entries' errors.",
            RELATIVE_ERROR,
            _entry_by_entry,
        ),
    ),
)


# --- mistakes: directional_check -------------------------------------------------------------


def _compared(predicted: Any, measured: Any) -> float:
    """The relative error of two numbers: 0 where both are 0, NaN where one is NaN."""
    if predicted == 0 and measured == 0:
        return 0.0
    return abs(predicted - measured) / np.maximum(abs(predicted), abs(measured))


def _rise(f: Probe, x: Array, v: Array, h: float) -> float:
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def _directional(
    default: float = 1e-5,
    predict: Callable[[Array, Array], Any] = lambda grad, v: np.sum(grad * v),
    measure: Callable[[Probe, Array, Array, float], Any] = _rise,
    compare: Callable[[Any, Any], Any] = _compared,
) -> Callable[..., Any]:
    """The right answer, except for the parts that are handed in."""

    def answer(f, x, grad, v, eps=None):
        h = default if eps is None else eps
        return compare(predict(grad, v), measure(f, x, v, h))

    return answer


def _directional_eps_ignored(f, x, grad, v, eps=None):
    return _directional()(f, x, grad, v)


def _normalised(measured_only: bool) -> Callable[..., Any]:
    def answer(f, x, grad, v, eps=None):
        norm = np.linalg.norm(v)
        unit = v / norm if norm else v
        if measured_only:
            return _compared(np.sum(grad * v), _rise(f, x, unit, eps or 1e-5))
        return _directional()(f, x, grad, unit, eps)

    return answer


def _python_max(predicted: Any, measured: Any) -> float:
    larger = max(abs(predicted), abs(measured))
    return abs(predicted - measured) / larger if larger > 0 else 0.0


DIRECTIONAL_EXERCISE = Exercise(
    id="directional_check",
    chapter=CHAPTER,
    title="A whole gradient checked with two evaluations",
    points=3,
    returns=("error",),
    reference=library.directional_check,
    oracle=_directional_oracle,
    cases=_directional_cases,
    float32_allowed=False,
    mistakes=(
        *named(
            "forward difference",
            "(f(x + hv) - f(x)) / h has an error of order h, the central difference one of order "
            "h²: use a point on either side.",
            CENTRAL,
            *(_directional(h, measure=lambda f, x, v, h: (f(x + h * v) - f(x)) / h) for h in STEPS),
        ),
        *named(
            "norms instead of the inner product",
            "The slope along v is ⟨grad, v⟩; the product of the norms is the slope only where v "
            "points along the gradient.",
            DIRECTIONAL,
            _directional(predict=lambda grad, v: np.linalg.norm(grad) * np.linalg.norm(v)),
            _directional(predict=lambda grad, v: np.linalg.norm(grad)),
        ),
        *named(
            "v missing on one side",
            "Both points lie on the line through x along v: x + hv and x - hv.",
            DIRECTIONAL,
            *(
                _directional(h, measure=lambda f, x, v, h: (f(x + h * v) - f(x - h)) / (2 * h))
                for h in STEPS[:3]
            ),
        ),
        *named(
            "v missing in the inner product",
            "The sum of the gradient's entries is the slope along (1, …, 1); along v each entry "
            "counts with its share of v.",
            DIRECTIONAL,
            _directional(predict=lambda grad, v: np.sum(grad)),
        ),
        *named(
            "v missing in the difference",
            "x + h moves every entry alike: that is the direction (1, …, 1), not v.",
            DIRECTIONAL,
            _directional(measure=lambda f, x, v, h: (f(x + h) - f(x - h)) / (2 * h)),
        ),
        *named(
            "divided by h instead of 2h",
            "The two points lie 2h apart, measured in lengths of v.",
            CENTRAL,
            _directional(measure=lambda f, x, v, h: (f(x + h * v) - f(x - h * v)) / h),
        ),
        *named(
            "absolute error",
            "The difference says nothing until it is divided by the larger of the two numbers.",
            RELATIVE_ERROR,
            _directional(compare=lambda a, b: abs(a - b)),
        ),
        *named(
            "signed error",
            "An error is a magnitude: without abs a prediction that is too small comes out "
            "negative, below any tolerance.",
            RELATIVE_ERROR,
            _directional(
                compare=lambda a, b: (
                    0.0 if a == 0 and b == 0 else (a - b) / np.maximum(abs(a), abs(b))
                )
            ),
            _directional(
                compare=lambda a, b: (
                    0.0 if a == 0 and b == 0 else (b - a) / np.maximum(abs(a), abs(b))
                )
            ),
        ),
        *named(
            "divided by one side only",
            "The denominator is the larger of the two magnitudes.",
            RELATIVE_ERROR,
            *(
                _directional(compare=compare)
                for compare in (
                    lambda a, b: abs(a - b) / np.abs(b),
                    lambda a, b: abs(a - b) / np.abs(a),
                    lambda a, b: 0.0 if a == 0 and b == 0 else abs(a - b) / np.abs(b),
                    lambda a, b: 0.0 if a == 0 and b == 0 else abs(a - b) / np.abs(a),
                )
            ),
        ),
        *named(
            "sum in the denominator",
            "|a| + |b| halves the error, or nearly: here the denominator is the larger of the two.",
            RELATIVE_ERROR,
            _directional(compare=lambda a, b: abs(a - b) / np.float64(abs(a) + abs(b))),
            _directional(
                compare=lambda a, b: (
                    0.0 if a == 0 and b == 0 else abs(a - b) / np.float64(abs(a) + abs(b))
                )
            ),
            _directional(compare=lambda a, b: abs(a - b) / np.maximum(abs(a) + abs(b), 1e-8)),
        ),
        *named(
            "division by zero",
            "Where f does not change both numbers are 0: they agree, and their error is 0, not "
            "0/0.",
            RELATIVE_ERROR,
            _directional(compare=lambda a, b: abs(a - b) / np.maximum(abs(a), abs(b))),
        ),
        *named(
            "nan ignored",
            "max(nan, …) > 0 is never true, so a gradient with NaN in it comes out as right.",
            RELATIVE_ERROR,
            _directional(compare=_python_max),
            _directional(predict=lambda grad, v: np.nansum(grad * v)),
        ),
        *named(
            "eps argument ignored",
            "When a step is given it is the one to use; the default is for eps=None.",
            STEP,
            _directional_eps_ignored,
        ),
        *named(
            "v scaled to length 1",
            "The points are x ± eps·v with v as it is given, and the slope along v is measured "
            "in lengths of v, as ⟨grad, v⟩ is.",
            DIRECTIONAL,
            _normalised(measured_only=False),
            _normalised(measured_only=True),
        ),
        *named(
            "matrix product instead of the inner product",
            "grad @ v multiplies matrices; the inner product is the sum over all entries of "
            "grad * v.",
            SHAPES,
            _directional(predict=lambda grad, v: grad @ v),
            _directional(predict=lambda grad, v: np.dot(grad, v)),
        ),
        *named(
            "eps too small",
            "f is only known to a relative 1e-16, and the difference divides that by the step: "
            "a central difference wants a step near 1e-5.",
            STEP,
            *(_directional(h) for h in SMALL_STEPS if h < 1e-9),
        ),
        *named(
            "a verdict instead of the error",
            "How far the two numbers are apart is asked for, not whether that is near enough.",
            DIRECTIONAL,
            _directional(compare=lambda a, b: bool(_compared(a, b) < 1e-6)),
        ),
        *named(
            "one of the two numbers returned",
            "What is asked for is how far ⟨grad, v⟩ and the measured slope are apart, not either "
            "of them.",
            DIRECTIONAL,
            _directional(compare=lambda a, b: a),
            _directional(compare=lambda a, b: b),
        ),
    ),
)


# --- first_wrong -----------------------------------------------------------------------------

NAMES = ("logits", "shifted", "weights", "total", "p")
SIZES: tuple[tuple[int, ...], ...] = ((3, 4), (3, 4), (5,), (2, 1), (2, 3))


def _intermediates(rng: Rng, scale: float = 1.0) -> tuple[list[Array], list[Array]]:
    """Five arrays and copies of them that are right but for rounding."""
    want = [scale * _away_from_zero(rng, size) for size in SIZES]
    got = [w * (1 + 1e-13 * rng.uniform(-1, 1, w.shape)) for w in want]
    return got, want


def _first_wrong_cases(rng: Rng) -> list[Case]:
    def spoiled(
        *off: tuple[int, float], scale: float = 1.0
    ) -> tuple[list[str], list[Array], list[Array]]:
        """Intermediates of which those listed are off, each by its relative error."""
        got, want = _intermediates(rng, scale)
        for place, error in off:
            got[place] = want[place] * (1 + error * rng.uniform(0.8, 1.2, want[place].shape))
        return list(NAMES), got, want

    def one_entry(place: int, value: float, beside: float) -> tuple[list[str], list, list]:
        names, got, want = spoiled()
        index = tuple(int(rng.integers(n)) for n in want[place].shape)
        want[place][index], got[place][index] = beside, value
        return names, got, want

    zeros = spoiled((3, 0.1))
    zeros[1][0][...] = zeros[2][0][...] = 0.0
    scattered_names, scattered_got, scattered_want = spoiled((4, 1e-3))
    return [
        Case(
            "two in the middle",
            (*spoiled((1, 0.01), (3, 0.01)), 1e-6),
            hint="What follows a wrong value is wrong because of it: the first one counts.",
        ),
        Case("none wrong", (*spoiled(), 1e-6), hint="Differences of 1e-13 are rounding: None."),
        Case(
            "the very first",
            (*spoiled((0, 1e-3), (1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1)), 1e-6),
            hint="All five are off, the first least of all.",
        ),
        Case("only the last", (*spoiled((4, 0.01)), 1e-6), hint="Four are right, the last is off."),
        Case(
            "one entry NaN",
            (*one_entry(2, np.nan, 1.0), 1e-6),
            hint="NaN > rtol is false, and yet NaN is wrong.",
        ),
        Case(
            "tiny values",
            (*spoiled((1, 0.5), scale=1e-12), 1e-6),
            hint="Values near 1e-12 that are off by half: an absolute tolerance cannot see it.",
        ),
        Case(
            "huge values",
            (*spoiled((0, 1e-9), (1, 1e-9), (4, 1e-2), scale=1e12), 1e-6),
            hint="A difference of 1000 in 1e12 is a relative error of 1e-9, which is allowed.",
        ),
        Case(
            "a small entry among large ones",
            (*one_entry(3, 3e-12, 1e-12), 1e-6),
            hint="3e-12 against 1e-12 is a relative error of 2/3, whatever the entry's neighbours.",
        ),
        Case(
            "a wide tolerance",
            (*spoiled((0, 0.01), (2, 0.3), (3, 0.5)), 0.1),
            hint="rtol = 0.1 lets an error of 0.01 pass.",
        ),
        Case(
            "a narrow tolerance",
            (*spoiled((2, 1e-9), (3, 1e-3)), 1e-11),
            hint="rtol = 1e-11 does not let an error of 1e-9 pass.",
        ),
        Case(
            "zeros that agree",
            (*zeros, 1e-6),
            hint="An array of zeros is right where zeros are wanted.",
        ),
        Case(
            "not contiguous in memory",
            (scattered_names, [scattered(g) for g in scattered_got], scattered_want, 1e-6),
            hint="Entries belong together by index, not by their place in memory.",
        ),
    ]


def _first_wrong_oracle(
    names: Sequence[str], got: Sequence[Array], want: Sequence[Array], rtol: float
) -> str | None:
    errors = [_relative_error_oracle(a, b) for a, b in zip(got, want, strict=True)]
    off = [name for name, error in zip(names, errors, strict=True) if not error <= rtol]
    return off[0] if off else None


def _errors(got: Sequence[Array], want: Sequence[Array]) -> list[float]:
    return [float(library.relative_error(a, b)) for a, b in zip(got, want, strict=True)]


def _last_wrong(names, got, want, rtol):
    off = [n for n, e in zip(names, _errors(got, want), strict=True) if not e <= rtol]
    return off[-1] if off else None


def _worst(names, got, want, rtol):
    errors = [np.inf if e != e else e for e in _errors(got, want)]
    worst = int(np.argmax(errors))
    return names[worst] if errors[worst] > rtol else None


def _worst_always(names, got, want, rtol):
    return names[int(np.argmax(_errors(got, want)))]


def _first_right(names, got, want, rtol):
    return next((n for n, e in zip(names, _errors(got, want), strict=True) if e <= rtol), None)


def _index(names, got, want, rtol):
    return next((i for i, e in enumerate(_errors(got, want)) if not e <= rtol), None)


def _all_wrong(names, got, want, rtol):
    return [n for n, e in zip(names, _errors(got, want), strict=True) if not e <= rtol]


def _all_wrong_or_none(names, got, want, rtol):
    return _all_wrong(names, got, want, rtol) or None


def _only_the_first_looked_at(names, got, want, rtol):
    return names[0] if not _errors(got, want)[0] <= rtol else None


def _first_by(off: Callable[[Array, Array, float], Any]) -> Callable[..., str | None]:
    """The first name whose pair is ``off``."""

    def answer(names, got, want, rtol):
        triples = zip(names, got, want, strict=True)
        return next((n for n, a, b in triples if off(a, b, rtol)), None)

    return answer


def _nan_passes(a, b, rtol):
    return library.relative_error(a, b) > rtol


def _by_absolute(a, b, rtol):
    return not np.abs(a - b).max() <= rtol


def _by_absolute_nan_passes(a, b, rtol):
    return np.abs(a - b).max() > rtol


def _by_absolute_allclose(a, b, rtol):
    return not np.allclose(a, b, rtol=0, atol=rtol)


def _by_absolute_any(a, b, rtol):
    return (np.abs(a - b) > rtol).any()


def _by_allclose(a, b, rtol):
    return not np.allclose(a, b, rtol=rtol)


def _by_allclose_equal_nan(a, b, rtol):
    return not np.allclose(a, b, rtol=rtol, equal_nan=True)


def _by_norms(a, b, rtol):
    return not np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


def _by_norms_nan_passes(a, b, rtol):
    return np.linalg.norm(a - b) > rtol * np.linalg.norm(b)


def _by_largest(a, b, rtol):
    return not np.abs(a - b).max() <= rtol * np.abs(b).max()


def _by_largest_nan_passes(a, b, rtol):
    return np.abs(a - b).max() > rtol * np.abs(b).max()


def _by_mean(a, b, rtol):
    return not _mean_error(a, b) <= rtol


def _zero_by_zero_is_wrong(a, b, rtol):
    return not _zero_by_zero(a, b) <= rtol


def _not_equal(a, b, rtol):
    return not np.array_equal(a, b)


def _fixed(tolerance: float) -> Callable[[Array, Array, float], Any]:
    return lambda a, b, rtol: not library.relative_error(a, b) <= tolerance


def _message(names, got, want, rtol):
    found = library.first_wrong(names, got, want, rtol)
    return "None" if found is None else found


def _empty(names, got, want, rtol):
    return library.first_wrong(names, got, want, rtol) or ""


FIRST_WRONG_EXERCISE = Exercise(
    id="first_wrong",
    chapter=CHAPTER,
    title="Where a computation first goes wrong",
    points=2,
    returns=("name",),
    reference=library.first_wrong,
    oracle=_first_wrong_oracle,
    cases=_first_wrong_cases,
    mistakes=(
        *named(
            "last instead of first",
            "Everything after the first wrong value is wrong because of it: go through in order "
            "and stop at the first.",
            FIRST_WRONG,
            _last_wrong,
        ),
        *named(
            "worst instead of first",
            "An error often grows on its way: the largest one shows where it ended, not where it "
            "began.",
            FIRST_WRONG,
            _worst,
            _worst_always,
        ),
        *named(
            "nan passes",
            "A comparison with NaN is always false, so `error > rtol` lets it pass: ask whether "
            "not `error <= rtol`.",
            FIRST_WRONG,
            _first_by(_nan_passes),
        ),
        *named(
            "tolerance compared absolutely",
            "rtol is relative: it is held against the relative error, not against |got - want|.",
            RELATIVE_ERROR,
            *(
                _first_by(off)
                for off in (
                    _by_absolute,
                    _by_absolute_nan_passes,
                    _by_absolute_allclose,
                    _by_absolute_any,
                )
            ),
        ),
        *named(
            "allclose with its own atol",
            "np.allclose adds atol=1e-8 to what is allowed, and two tiny arrays always agree: "
            "pass atol=0.",
            RELATIVE_ERROR,
            _first_by(_by_allclose),
            _first_by(_by_allclose_equal_nan),
        ),
        *named(
            "compared as a whole",
            "Divided by the norm or by the largest entry, an error in a small entry disappears "
            "beside large ones.",
            RELATIVE_ERROR,
            *(
                _first_by(off)
                for off in (_by_norms, _by_norms_nan_passes, _by_largest, _by_largest_nan_passes)
            ),
        ),
        *named(
            "rtol ignored",
            "The tolerance is the caller's: a float32 computation needs a wider one than a "
            "float64 one.",
            FIRST_WRONG,
            *(_first_by(_fixed(tolerance)) for tolerance in (1e-6, 1e-5, 1e-8, 1e-4, 1e-3)),
        ),
        *named(
            "compared for equality",
            "Two right computations differ by rounding; equality calls that wrong.",
            FIRST_WRONG,
            _first_by(_not_equal),
        ),
        *named(
            "division by zero",
            "Where both are 0 the quotient is 0/0, NaN, and arrays of zeros that agree count as "
            "wrong.",
            RELATIVE_ERROR,
            _first_by(_zero_by_zero_is_wrong),
        ),
        *named(
            "the first that is right",
            "The condition is turned over: what is asked for is the first that is off.",
            FIRST_WRONG,
            _first_right,
        ),
        *named(
            "only the first looked at",
            "A return inside the loop that is reached in every round ends it after the first name.",
            FIRST_WRONG,
            _only_the_first_looked_at,
        ),
        *named(
            "index instead of name",
            "The name is asked for, not its place in the list.",
            FIRST_WRONG,
            _index,
        ),
        *named(
            "all instead of the first",
            "One name is asked for: the first.",
            FIRST_WRONG,
            _all_wrong,
            _all_wrong_or_none,
        ),
        *named(
            "text instead of None",
            "Where nothing is off the result is None itself, so that `if first_wrong(…)` and "
            "`is None` both work.",
            FIRST_WRONG,
            _message,
            _empty,
        ),
    ),
)

EXERCISES = (
    NUMERICAL_GRADIENT,
    RELATIVE_ERROR_EXERCISE,
    DIRECTIONAL_EXERCISE,
    FIRST_WRONG_EXERCISE,
)
