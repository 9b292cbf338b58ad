"""Numerical gradients against exact ones, and what a report says about a wrong one."""

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import generators, shapes, strided

from attn_lessons.gradcheck import (
    best_step,
    central_difference,
    check_gradient,
    complex_step_gradient,
    describe_difference,
    directional_check,
    first_wrong,
    numerical_gradient,
    numerical_vjp,
    relative_error,
    step_sweep,
)

INF = np.inf


def total(f):
    return lambda x: f(x).sum()


# name: function, derivative, points where the exact slope is no smaller than rounding allows
SMOOTH = {
    "square": (np.square, lambda x: 2 * x, [1e-12, 1e-6, 1e-3, 0.3, 1, 7, 1e3, 1e6, 1e12]),
    "cube": (lambda x: x**3, lambda x: 3 * x**2, [1e-6, 0.3, 7, 1e6]),
    "exp": (np.exp, np.exp, [-30, -1, 1e-12, 1e-6, 0.3, 1, 7, 100, 600]),
    "sin": (np.sin, np.cos, [1e-12, 1e-6, 0.3, 1, 7, 1e3, 1e6]),
    "log": (np.log, lambda x: 1 / x, [1e-300, 1e-12, 1e-6, 1e-3, 0.3, 1, 7, 1e3, 1e6]),
    "reciprocal": (lambda x: 1 / x, lambda x: -1 / x**2, [1e-12, 1e-6, 0.3, 1, 7, 1e3, 1e6]),
    "square root": (np.sqrt, lambda x: 0.5 / np.sqrt(x), [1e-12, 1e-6, 0.3, 1, 7, 1e3, 1e6]),
    "fast": (lambda x: np.sin(50 * x), lambda x: 50 * np.cos(50 * x), [1e-6, 0.3, 1, 7, 1e3]),
    "large constant": (
        lambda x: 1 + x + np.cos(x),
        lambda x: 1 - np.sin(x),
        [0.0, 1e-12, 1e-6, 0.3, 7, 1e3],
    ),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2, [0.0, 1e-6, 0.3, 1, 3]),
    "gelu": (
        lambda x: x * scipy.special.ndtr(x),
        lambda x: scipy.special.ndtr(x) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
        [-2, -0.5, 0.0, 1e-6, 0.3, 4],
    ),
}


@pytest.mark.parametrize(
    ("name", "point"), [(name, x) for name, (_, _, points) in SMOOTH.items() for x in points]
)
def test_default_reaches_1e_8_at_every_scale(name, point):
    f, slope, _ = SMOOTH[name]
    x = np.array([point], float)
    got = numerical_gradient(total(f), x)
    np.testing.assert_allclose(got, slope(x), rtol=1e-8, atol=0)


@given(shape=shapes(0, 3, max_side=3), rng=generators(), data=st.data())
@settings(max_examples=25)
def test_gradient_of_any_rank_and_layout_equals_torch(shape, rng, data):
    x = np.asarray(rng.normal(size=shape))
    a = rng.normal(size=shape)
    leaf = torch.tensor(x, requires_grad=True)
    (torch.tanh(leaf) * torch.tensor(a) + leaf.exp() / 3).sum().backward()
    got = numerical_gradient(
        lambda x: (np.tanh(x) * a + np.exp(x) / 3).sum(), data.draw(strided(x))
    )
    assert got.shape == x.shape
    np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-8, atol=1e-10)


def test_a_plain_float_is_a_point():
    got = numerical_gradient(math.exp, 1.0)
    assert got.shape == ()
    assert abs(got / math.e - 1) < 1e-12


def test_scipy_finds_the_same_gradient_less_exactly():
    x = np.array([0.7, -1.3, 2.1])
    want = scipy.optimize.approx_fprime(x, scipy.optimize.rosen)
    np.testing.assert_allclose(numerical_gradient(scipy.optimize.rosen, x), want, rtol=1e-5)
    exact = scipy.optimize.rosen_der(x)
    np.testing.assert_allclose(numerical_gradient(scipy.optimize.rosen, x), exact, rtol=1e-9)


def test_a_given_step_is_the_textbook_formula():
    x, h = np.array([0.5, -2.0]), 2.0**-10
    want = [(np.exp(v + h) - np.exp(v - h)) / (2 * h) for v in x]
    got = [numerical_gradient(total(np.exp), x[i], h) for i in range(2)]
    np.testing.assert_array_equal(got, want)


def test_evaluations_an_entry():
    count = itertools.count()

    def f(x):
        next(count)
        return np.sin(x).sum()

    x = np.random.default_rng(0).uniform(0.1, 2, 10)
    numerical_gradient(f, x, 1e-5)
    assert next(count) == 1 + 2 * 10
    numerical_gradient(f, x)
    assert next(count) - 22 <= 9 + 8 * 10


@pytest.mark.parametrize("point", [0.03, 1.0, 1e6])
def test_the_distance_really_stepped_counts(point):
    h = 3e-7 * point
    assert abs(central_difference(lambda t: 5 * t, point, h) / 5 - 1) < 1e-9


def test_log_never_sees_a_negative_number():
    x = np.array([1e-9, 1e-3, 0.01, 0.5])

    def f(x):
        assert (x > 0).all()
        return np.log(x).sum()

    np.testing.assert_allclose(numerical_gradient(f, x), 1 / x, rtol=1e-8)


def test_a_larger_step_that_leaves_the_domain_decides_nothing():
    # At 1e-3, 1e6 + log x is lost in rounding within |x|: larger steps are tried, and raise.
    got = numerical_gradient(lambda x: 1e6 + math.log(x), 1e-3)
    np.testing.assert_allclose(got, 1e3, rtol=1e-5)


def test_kinks_are_stepped_around():
    x = np.array([-0.001, 0.001, 0.02, -3.0])
    got = numerical_gradient(lambda x: np.maximum(x, 0).sum(), x)
    np.testing.assert_allclose(got, [0, 1, 1, 0], rtol=1e-8)
    near = numerical_gradient(lambda x: np.abs(x - 1).sum(), np.array([0.999, 1.001]))
    np.testing.assert_allclose(near, [-1, 1], rtol=1e-8)


def test_x_is_left_as_found_even_where_f_raises_or_writes():
    x = np.random.default_rng(0).normal(size=(3, 4))[:, ::-2]
    before = x.copy()
    calls = itertools.count()

    def raises(x):
        if next(calls) == 5:
            raise RuntimeError("here")
        return x.sum()

    with pytest.raises(RuntimeError, match="here"):
        numerical_gradient(raises, x)
    np.testing.assert_array_equal(x, before)

    def writes(x):
        x *= 2
        return (x * x).sum()

    np.testing.assert_allclose(numerical_gradient(writes, x), 8 * before)
    np.testing.assert_array_equal(x, before)
    x.flags.writeable = False
    np.testing.assert_allclose(numerical_gradient(lambda x: (x * x).sum(), x), 2 * before)


def test_a_view_as_result_or_a_kept_argument_is_no_trap():
    x, kept = np.array([3.0, 4.0]), []

    def f(x):
        kept.append(x)
        return x[1, ...]

    np.testing.assert_allclose(numerical_gradient(f, x), [0, 1])
    assert len({a.__array_interface__["data"][0] for a in kept}) == len(kept)
    assert kept[0].tolist() == [3, 4]


def test_float32_is_lifted():
    seen = set()

    def f(x):
        seen.add(x.dtype)
        return (x**3).sum()

    x = np.array([0.1, 2.5], np.float32)
    got = numerical_gradient(f, x)
    assert seen == {np.dtype(np.float64)}
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, 3 * x.astype(float) ** 2, rtol=1e-10)


def test_a_function_that_rounds_to_float32_costs_only_its_own_digits():
    got = numerical_gradient(lambda x: np.float32(np.sin(x).sum()), np.array([0.4, 1.0]))
    np.testing.assert_allclose(got, np.cos([0.4, 1.0]), rtol=1e-4)


def test_infinite_and_nan_entries():
    x = np.array([1.0, -INF, 2.0])
    got = numerical_gradient(lambda x: np.exp(x).sum(), x)
    np.testing.assert_allclose(got, np.exp(x))
    assert np.isnan(numerical_gradient(total(np.exp), np.array([np.nan, 1.0]))).all()
    assert numerical_gradient(total(np.exp), np.zeros((0, 3))).shape == (0, 3)


def test_best_as_a_step():
    x = np.array([0.3, 1.0])
    got = numerical_gradient(total(np.exp), x, "best")
    np.testing.assert_allclose(got, np.exp(x), rtol=1e-9)


def test_numerical_vjp_equals_torch():
    rng = np.random.default_rng(2)
    x, dout = rng.normal(size=(3, 4)), rng.normal(size=(4, 3))
    leaf = torch.tensor(x, requires_grad=True)
    (leaf.T.exp() * leaf.sum()).backward(torch.tensor(dout))
    got = numerical_vjp(lambda x: np.exp(x.T) * x.sum(), x, dout)
    np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-8)


# --- complex step ----------------------------------------------------------------------------

ANALYTIC = {
    "exp": (np.exp, np.exp),
    "Squire & Trapp's": (
        lambda x: np.exp(x) / (np.cos(x) ** 3 + np.sin(x) ** 3),
        lambda x: (
            np.exp(x)
            * (np.cos(3 * x) + np.sin(3 * x) / 2 + 1.5 * np.sin(x))
            / (np.cos(x) ** 3 + np.sin(x) ** 3) ** 2
        ),
    ),
    "x^4.5": (lambda x: x**4.5, lambda x: 4.5 * x**3.5),
}


@pytest.mark.parametrize("name", ANALYTIC)
def test_complex_step_is_exact(name):
    f, slope = ANALYTIC[name]
    x = np.array([[0.2, 1.5, 0.9]])
    np.testing.assert_allclose(complex_step_gradient(total(f), x), slope(x), rtol=3e-15)


def test_complex_step_where_differences_have_nothing_to_say():
    x = np.array([0.5, 2.0])
    got = complex_step_gradient(lambda x: 1e12 + np.sin(x).sum(), x)
    np.testing.assert_allclose(got, np.cos(x), rtol=1e-15)
    assert complex_step_gradient(lambda x: x * x, 3.0) == 6
    assert complex_step_gradient(total(np.exp), np.zeros((0, 2))).shape == (0, 2)


NOT_ANALYTIC = [
    (
        lambda x: np.abs(x).sum(),
        "expected to return a complex number .* abs, a real part or a cast",
    ),
    (lambda x: (x * x).real.sum(), "expected to return a complex number"),
    (lambda x: (x * x.conj()).sum(), "not analytic"),
    (lambda x: (np.abs(x) + x).sum(), "not analytic"),
    (lambda x: math.fsum(x.tolist()), "expected to take a complex array; it raised TypeError"),
    (lambda x: x * 1j, r"expected to return a scalar; got shape \(3,\)"),
]


@pytest.mark.parametrize(("f", "message"), NOT_ANALYTIC)
def test_complex_step_names_a_function_that_is_not_analytic(f, message):
    with pytest.raises(ValueError, match=message):
        complex_step_gradient(f, np.array([1.0, -2.0, 0.5]))


# --- the step --------------------------------------------------------------------------------

STEPPED = {
    "exp": (np.exp, np.exp, np.array([0.5, 1.0, 1.5])),
    "sin 30x": (lambda x: np.sin(30 * x), lambda x: 30 * np.cos(30 * x), np.array([0.5, 1.0])),
    "log": (np.log, lambda x: 1 / x, np.array([0.02, 0.03])),
    "sin at 1e4": (np.sin, np.cos, np.array([1e4, 0.9e4])),
}


@pytest.mark.parametrize("name", STEPPED)
def test_best_step_errs_little_more_than_the_best_of_all(name):
    f, slope, x = STEPPED[name]
    _, errors = step_sweep(total(f), x, slope(x), np.logspace(-11, -2, 91))
    _, (reached,) = step_sweep(total(f), x, slope(x), [best_step(total(f), x)])
    assert reached <= 10 * np.median(np.sort(errors)[:9])


def test_best_step_is_near_theory():
    # exp at 0: f = f''' = 1, so h = (3 · 1.1e-16)^(1/3) = 6.9e-6.
    assert 1e-6 < best_step(math.exp, 0.0) < 5e-5


def test_best_step_of_many_entries_tries_some():
    count = itertools.count()

    def f(x):
        next(count)
        return np.sin(x).sum()

    best_step(f, np.linspace(0, 1, 4000))
    assert next(count) < 32 * 130


def test_the_v():
    x = np.array([0.7])
    steps, errors = step_sweep(total(np.exp), x, np.exp(x))
    bottom = errors.argmin()
    assert 1e-7 < steps[bottom] < 1e-4
    assert errors[bottom] < 1e-9
    big = steps > 1e-3
    slope = np.polyfit(np.log(steps[big]), np.log(errors[big]), 1)[0]
    assert 1.9 < slope < 2.1, "truncation: h squared"
    small = steps < 1e-8
    slope = np.polyfit(np.log(steps[small]), np.log(errors[small] + 1e-12), 1)[0]
    assert -1.4 < slope < -0.6, "rounding: 1/h"


def test_a_vanishing_step_has_error_one_and_the_complex_step_none():
    x = np.array([0.7])
    _, errors = step_sweep(total(np.exp), x, np.exp(x), [1e-18, 1e-20])
    assert errors.tolist() == [1, 1]
    _, errors = step_sweep(
        total(np.exp), x, np.exp(x), [1e-18, 1e-200], gradient=complex_step_gradient
    )
    assert errors.max() < 1e-15


# --- comparison --------------------------------------------------------------------------------


@given(shape=shapes(0, 3), rng=generators(), scale=st.sampled_from([1e-300, 1e-8, 1, 1e300]))
def test_relative_error_is_the_formula(shape, rng, scale):
    a, b = np.asarray(rng.normal(size=shape) * scale), np.asarray(rng.normal(size=shape) * scale)
    pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
    want = max(abs(p - q) / max(abs(p), abs(q)) for p, q in pairs)
    assert math.isclose(relative_error(a, b), want, rel_tol=1e-14)
    assert relative_error(a, b) == relative_error(b, a)
    assert relative_error(a, a) == 0


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        ([0.0, 1.0], [0.0, 1.0], 0),
        ([0.0, -0.0], [-0.0, 0.0], 0),
        ([1.0, 0.0], [1.0, 1e-300], 1),
        ([1.0, -1.0], [1.0, 1.0], 2),
        ([1.0, 2.0], [1.5, 2.0], 1 / 3),
        ([1e308], [-1e308], 2),
        ([5e-324], [1e-323], 0.5),
        ([INF, 1.0], [INF, 1.0], 0),
        ([INF], [1.0], INF),
        ([INF], [-INF], INF),
        ([np.nan, 1.0], [1.0, 1.0], np.nan),
        ([np.nan], [np.nan], np.nan),
        ([1.0, np.nan], [2.0, 1.0], np.nan),
        ([np.nan], [INF], np.nan),
        ([], [], 0),
    ],
)
def test_relative_error_at_the_corners(a, b, want):
    np.testing.assert_equal(relative_error(np.array(a), np.array(b)), float(want))


@given(rng=generators(), shape=shapes(0, 3, max_side=3))
@settings(max_examples=25)
def test_directional_check_passes_the_right_gradient_and_no_other(rng, shape):
    x, v = np.asarray(rng.normal(size=shape)), np.asarray(rng.normal(size=shape))
    grad = np.cos(x)
    assume(abs((grad * v).sum()) > 0.05)
    f = total(np.sin)
    assert directional_check(f, x, grad, v) < 1e-8
    assert directional_check(f, x, grad, v, 1e-5) < 1e-6
    assert directional_check(f, x, 2 * grad, v) > 0.49
    wrong = grad + rng.normal(size=shape)
    predicted, true = (wrong * v).sum(), (grad * v).sum()
    want = abs(predicted - true) / max(abs(predicted), abs(true))
    assert abs(directional_check(f, x, wrong, v) - want) < 1e-6


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_the_length_of_the_direction_does_not_matter(size):
    rng = np.random.default_rng(3)
    x, v = rng.normal(size=(2, 20))
    assert directional_check(total(np.exp), x, np.exp(x), size * v) < 1e-8


def test_first_wrong_names_the_earliest():
    want = [np.ones(3), np.ones((2, 2)), np.array(4.0)]
    names = ["logits", "probs", "loss"]
    assert first_wrong(names, want, want, 1e-9) is None
    got = [want[0], want[1] * 1.1, want[2] * 2]
    assert first_wrong(names, got, want, 1e-9) == "probs"
    assert first_wrong(names, got, want, 0.2) == "loss"
    assert first_wrong(names, [want[0], want[1], np.array(np.nan)], want, 1e-9) == "loss"
    assert first_wrong(names, [np.ones(4), want[1], want[2]], want, 1e-9) == "logits"
    assert first_wrong(["loss"], [3.0], [3], 1e-9) is None
    assert first_wrong([], [], [], 1e-9) is None


# --- the report -------------------------------------------------------------------------------


def report(spoil, shape=(4, 5)):
    rng = np.random.default_rng(7)
    x = rng.normal(size=shape)
    grad = np.cos(x)
    spoiled = spoil(grad.copy())
    return check_gradient(total(np.sin), x, spoiled, name="dx")


def test_a_right_gradient_is_reported_right():
    seen = report(lambda g: g)
    assert seen.ok
    assert not seen.wrong.any()
    assert seen.where is None
    assert seen.observations == ()
    assert seen.max_error < 1e-8
    assert str(seen).startswith("dx agrees with the numerical gradient: largest relative error ")
    assert str(seen).endswith("in 20 entries")


def test_a_wrong_entry_is_reported_where_it_is():
    def spoil(g):
        g[2, 3] = 9
        return g

    seen = report(spoil)
    assert not seen.ok
    assert seen.where == (2, 3)
    assert np.argwhere(seen.wrong).tolist() == [[2, 3]]
    assert "dx is wrong in 1 of 20 entries" in str(seen)
    assert "at (2, 3): 9, numerically " in str(seen)
    assert "only the entry at (2, 3) is off" in str(seen)


def test_what_a_person_reads():
    assert "- every entry is 2 times the numerical one: a factor 2 too many" in str(
        report(lambda g: 2 * g)
    )

    def flip(g):
        g[0] *= -1
        return g

    assert "- only row 0 (the first) is off: -1 times the numerical one there" in str(report(flip))


def test_differences_below_what_the_measurement_resolves_are_no_mistake():
    # sin at pi/2 has slope 6e-17; 1e5 + sin measures it to 1e-9 at best.
    x = np.array([math.pi / 2, math.pi / 2])
    seen = check_gradient(lambda x: 1e5 + np.sin(x).sum(), x, np.zeros(2))
    assert seen.ok, str(seen)
    assert seen.max_error == 0
    assert not check_gradient(lambda x: 1e5 + np.sin(x).sum(), x, np.full(2, 1e-3)).ok


def normalized(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_a_sum_that_cancels_is_not_taken_for_a_slope(seed):
    # The sum of a normalised row is 0 up to 1e-16: small steps would measure slopes of 10 in it.
    x = np.random.default_rng(seed).normal(size=(3, 8))
    assert np.abs(numerical_gradient(total(normalized), x)).max() < 1e-11
    assert check_gradient(total(normalized), x, np.zeros(x.shape)).ok
    assert not check_gradient(total(normalized), x, np.full(x.shape, 1e-6)).ok


def test_a_random_function_excuses_no_gradient():
    rng = np.random.default_rng(0)
    x = np.ones(4)
    assert not check_gradient(lambda x: np.sum(x**2) + 1e-3 * rng.normal(), x, np.zeros(4)).ok


@pytest.mark.parametrize("value", [np.nan, INF, -INF])
def test_nan_and_infinity_never_pass(value):
    def spoil(g):
        g[1, 1] = value
        return g

    seen = report(spoil)
    assert not seen.ok
    assert seen.where == (1, 1)
    assert not seen.max_error <= 1


def test_another_shape_is_reported():
    seen = report(lambda g: g.T)
    assert not seen.ok
    assert seen.wrong.all()
    assert [o.kind for o in seen.observations] == ["shape", "transposed"]
    assert "its shape is (5, 4) where (4, 5) is expected" in str(seen)


def test_a_report_is_plain_and_frozen():
    seen = report(lambda g: g)
    with pytest.raises(AttributeError):
        seen.ok = False
    assert check_gradient(math.exp, 1.0, math.e).ok
    assert check_gradient(total(np.exp), np.zeros((0, 2)), np.zeros((0, 2))).ok


# --- what describe_difference finds ---------------------------------------------------------------

RNG = np.random.default_rng(11)
W = RNG.normal(size=(3, 5))
Q = RNG.normal(size=(2, 3, 4, 5))
S = RNG.normal(size=(4, 4))
V = RNG.normal(size=6)


def on(x, index, change):
    x = x.copy()
    x[index] = change(x[index])
    return x


def told(got, want, **options):
    return [(o.kind, o.text) for o in describe_difference(got, want, **options)]


SEEN = [
    (2 * W, W, "factor", "every entry is 2 times the expected one: a factor 2 too many"),
    (W / 2, W, "factor", "a factor 2 is missing"),
    (-W, W, "sign", "every entry is -1 times the expected one: the sign is flipped"),
    (-2 * W, W, "factor", "a factor 2 too many, with the sign flipped"),
    (3 * W, W, "factor", "the factor is 3, the length of axis 0"),
    (W / 5, W, "factor", "1/5, 5 being the length of axis 1"),
    (W / 15, W, "factor", "1/15, 15 being the number of entries"),
    (W * 5**0.5, W, "factor", "√5, 5 being the length of axis 1"),
    (W / 3**0.5, W, "factor", "1/√3, 3 being the length of axis 0"),
    (W * 5 / 4, W, "factor", "5/4, 5 being the length of axis 1"),
    (W / math.log(2), W, "factor", "logarithm to base 2"),
    (W * 1.37, W, "factor", "every entry is 1.37 times the expected one"),
    (2 * S, S, "factor", "a factor 2 too many (or √4, 4 being the length of axis 0"),
    (W * 0, W, "zeros", "every entry is 0"),
    (W + 0.25, W, "offset", "every entry is 0.25 more than the expected one"),
    (W - 3, W, "offset", "every entry is 3 less than the expected one"),
    (S.T, S, "transposed", "it is the transpose of what is expected"),
    (V[::-1], V, "reversed", "the entries along the axis are in reverse order"),
    (W[:, ::-1], W, "reversed", "the entries along axis 1 are in reverse order"),
    (W.T.reshape(3, 5), W, "reshaped", "a transpose is missing or too many"),
    (RNG.permutation(V), V, "shuffled", "the right values stand in other places"),
    (W * 0 + W.sum(1, keepdims=True), W, "extra_reduction", "holds the sum over axis 1 of what"),
    (W * 0 + W.mean(0), W, "extra_reduction", "holds the mean over axis 0 of what"),
    (W, W * 0 + W.sum(0), "missing_reduction", "the sum over axis 0 is right"),
    (W * [[2.0], [3], [0.7]], W, "row_factor", "by a factor that is the same along each row"),
    (
        W + np.array([[2.0], [3], [0.7]]),
        W,
        "row_offset",
        "by an amount that is the same along each row",
    ),
    (W + np.arange(1.0, 6), W, "row_offset", "by an amount that is the same along each column"),
    (on(W, 0, lambda v: -v), W, "slice", "only row 0 (the first) is off: -1 times the expected"),
    (on(W, 2, lambda v: v * 0), W, "slice", "only row 2 (the last) is off: 0 there"),
    (on(W, (slice(None), 4), lambda v: v + 1), W, "slice", "only column 4 (the last) is off: 1 mo"),
    (on(W, (slice(None), slice(1, 4)), np.exp), W, "slice", "only columns 1 to 3 are off"),
    (on(V, slice(1, None, 2), np.exp), V, "slice", "only the odd indices 1 to 5 are off"),
    (on(V, slice(1, None), np.exp), V, "slice", "only the indices other than 0 are off"),
    (on(Q, (slice(None), 1), np.exp), Q, "slice", "only index 1 of axis 1 is off"),
    (on(Q, (1, 2), np.exp), Q, "slice", "only index 2 of axis 1 (the last) in index 1 of axis 0"),
    (on(S, np.diag_indices(4), np.exp), S, "diagonal", "only the diagonal is off"),
    (
        on(S, np.triu_indices(4, 1), np.exp),
        S,
        "triangle",
        "only the entries above the diagonal are",
    ),
    (
        on(S, np.tril_indices(4), np.exp),
        S,
        "triangle",
        "only the entries on and below the diagonal",
    ),
    (on(S, ~np.eye(4, dtype=bool), np.exp), S, "triangle", "only the entries off the diagonal are"),
    (on(S, (1, 2), np.exp), S, "entry", "only the entry at (1, 2) is off"),
    (on(S, ([0, 1, 3], [2, 0, 3]), np.exp), S, "entries", "3 of 16 entries are off, the others"),
    (on(W, 1, lambda v: v * np.nan), W, "nonfinite", "row 1 is NaN"),
    (W * np.nan, W, "nonfinite", "every entry is NaN"),
    (on(W, (1, 1), lambda v: INF), W, "nonfinite", "the entry at (1, 1) is infinite"),
    (W, on(W, (1, 1), lambda v: INF), "nonfinite", "is finite where infinity or NaN is expected"),
    (Q.swapaxes(2, 3), Q, "transposed", "the values are right, but axes 2 and 3 are swapped"),
    (W.T, W, "transposed", "the values are right, but it is the transpose"),
    (W[:, None], W, "keepdims", "an axis of length 1 is too many"),
    (V, V[:, None], "keepdims", "an axis of length 1 is missing (keepdims?)"),
    (V[None], V[:, None], "keepdims", "an axis of length 1 is misplaced"),
    (Q, Q.sum(0), "missing_reduction", "its sum over axis 0 is right: that reduction is missing"),
    (W.mean(1), W, "extra_reduction", "it is the mean of what is expected over axis 1"),
    (Q.reshape(6, 20), Q.reshape(20, 6), "reshaped", "laid out in another shape"),
    (W[0], W, "shape", "its shape is (5,) where (3, 5) is expected"),
]


@pytest.mark.parametrize(("got", "want", "kind", "text"), SEEN)
def test_a_difference_is_described(got, want, kind, text):
    seen = told(np.asarray(got), want)
    assert any(k == kind and text in t for k, t in seen), seen
    assert len(seen) <= 2


@pytest.mark.parametrize(("got", "want", "kind", "text"), SEEN)
def test_float32_rounding_hides_nothing(got, want, kind, text):
    with np.errstate(all="ignore"):
        got, want = np.asarray(got).astype(np.float32), np.asarray(want).astype(np.float32)
    seen = told(got, want, rtol=1e-4)
    assert any(k == kind for k, _ in seen), seen


def test_masks_are_described_as_masks():
    mask = np.tri(5, 5, dtype=bool)
    assert told(~mask, mask) == [("inverted", "True and False are swapped in every entry")]
    assert told(mask.T, mask)[0][0] == "transposed"
    strict = np.tri(5, 5, -1, dtype=bool)
    assert told(strict, mask)[0] == ("diagonal", "only the diagonal is off: 0 there")


def test_sizes_beyond_the_axes_are_recognised():
    seen = told(W / 8, W, sizes={"d": 64})
    assert "1/√64, 64 being the size d" in seen[0][1]
    assert "size d" not in told(W / 8, W)[0][1]


def test_masked_entries_do_not_hide_a_factor_and_say_nothing_themselves():
    masked = np.where(np.tri(4) > 0, S, 0)
    assert told(2 * masked, masked)[0][0] == "factor"
    assert told(np.where(np.tri(4) > 0, np.exp(S), 0), masked) == []
    logp = np.where(np.tri(4) > 0, S, -INF)
    assert told(np.where(np.tri(4) > 0, 2 * S, -INF), logp)[0][0] == "factor"


PLACES = {"entry", "entries", "slice", "diagonal", "triangle"}


@given(shape=shapes(0, 4, max_side=4), rng=generators(), rtol=st.sampled_from([1e-9, 1e-6, 1e-4]))
@settings(max_examples=60)
def test_no_relation_is_seen_in_random_wrong_arrays(shape, rng, rtol):
    got, want = np.asarray(rng.normal(size=shape)), np.asarray(rng.normal(size=shape))
    assume(got.size > 1)
    assert describe_difference(got, want, rtol) == ()
    # Nor in a wrong one that is close (some of its entries may be right), or of another scale.
    for near in (want + 0.01 * got, want * np.exp(0.01 * got), 1e6 * got):
        assert {o.kind for o in describe_difference(near, want, rtol)} <= PLACES


@given(rng=generators())
@settings(max_examples=100)
def test_no_relation_is_seen_in_one_wrong_number(rng):
    got, want = rng.normal(size=(2, 1))
    assert describe_difference(got, want) == ()


@given(shape=shapes(1, 4, max_side=5), rng=generators(), rate=st.floats(0.02, 0.98))
@settings(max_examples=80)
def test_what_is_said_about_random_entries_is_true(shape, rng, rate):
    want = rng.normal(size=shape)
    wrong = rng.random(shape) < rate
    got = np.where(wrong, rng.normal(size=shape), want)
    for seen in describe_difference(got, want):
        assert wrong.any()
        assert not wrong.all()
        assert seen.kind in PLACES
        assert seen.detail["count"] == wrong.sum()
        assert " times " not in seen.text
        if seen.kind == "slice":
            inside = np.ones(shape, bool)
            for axis, indices in seen.detail["indices"].items():
                used = np.isin(np.arange(shape[axis]), indices)
                inside &= np.expand_dims(used, [a for a in range(len(shape)) if a != axis])
            assert (wrong <= inside).all()
            assert wrong.sum() >= 0.75 * inside.sum()


@given(shape=shapes(0, 4), rng=generators())
def test_nothing_is_said_where_arrays_agree(shape, rng):
    want = np.asarray(rng.normal(size=shape))
    assert describe_difference(want, want.copy()) == ()
    assert describe_difference(want * (1 + 1e-8), want) == ()
    special = np.array([np.nan, INF, -INF, 0.0])
    assert describe_difference(special, special.copy()) == ()


# --- bad input -------------------------------------------------------------------------------


def rosenbrock(x):
    return np.array([x[0]])


X = np.array([1.0, 2.0])
BAD = [
    (numerical_gradient, (total(np.exp), np.array([1, 2])), r"x: expected floating .*int64.*float"),
    (numerical_gradient, (total(np.exp), X.astype(complex)), "x: expected floating .*complex128"),
    (
        numerical_gradient,
        (rosenbrock, X),
        r"f \(rosenbrock\): .*real scalar; got an array .*\(1,\)",
    ),
    (numerical_gradient, (lambda x: x, X), r"f: expected to return a real scalar.* shape \(2,\)"),
    (numerical_gradient, (lambda x: None, X), "f: expected to return a real scalar; got object"),
    (numerical_gradient, (lambda x: 1j, X), "f: expected to return a real scalar; got complex"),
    (numerical_gradient, (total(np.exp), X, 0.0), "eps: expected a positive number, .*got 0.0"),
    (numerical_gradient, (total(np.exp), X, -1e-5), "eps: expected a positive number"),
    (numerical_gradient, (total(np.exp), X, np.nan), "eps: expected a positive number"),
    (numerical_gradient, (total(np.exp), X, "good"), "eps: .*got 'good'"),
    (numerical_gradient, (total(np.exp), X, 1e-20), "eps: expected a step that moves 1; got 1e-20"),
    (numerical_vjp, (np.exp, X, np.ones(3)), r"dout: expected shape \(2,\), that of f\(x\); got"),
    (complex_step_gradient, (total(np.exp), np.array([1])), "x: expected floating"),
    (relative_error, (X, np.ones(3)), r"a: expected shape \(3,\) to match b; got \(2,\)"),
    (relative_error, (X, X.astype(complex)), "b: expected real numbers; got dtype complex128"),
    (directional_check, (total(np.exp), X, np.ones(3), X), r"grad: expected shape \(2,\)"),
    (directional_check, (total(np.exp), X, X, np.ones(3)), r"v: expected shape \(2,\)"),
    (
        directional_check,
        (total(np.exp), X, X, 0 * X),
        "v: expected a finite direction other than 0",
    ),
    (first_wrong, (["a"], [1.0, 2.0], [1.0, 2.0], 0.1), "same length; got 1, 2 and 2"),
    (step_sweep, (total(np.exp), X, np.ones(3)), r"exact: expected shape \(2,\)"),
    (
        best_step,
        (total(np.exp), np.zeros((0, 2))),
        r"x: expected at least one entry; got .*\(0, 2\)",
    ),
    (describe_difference, (X, X.astype(complex)), "want: expected real numbers"),
    (check_gradient, (total(np.exp), X, X.astype(str)), "gradient: expected real numbers"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        relative_error(np.zeros(3), np.zeros(4))
