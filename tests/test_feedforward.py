"""Activations and the feed-forward layer against torch, fifty digits and finite differences."""

import inspect
import math
import typing

import jaxtyping
import mpmath
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, generators, shapes, strided

from attn_lessons import feedforward as library
from attn_lessons.feedforward import (
    FAR,
    MILLS_DENOMINATOR,
    MILLS_NUMERATOR,
    ffn_backward,
    ffn_backward_cached,
    ffn_forward,
    gelu,
    gelu_backward,
    normal_cdf,
    normal_pdf,
    relu_backward,
    relu_forward,
    silu,
    silu_backward,
    swiglu_backward,
    swiglu_backward_cached,
    swiglu_forward,
)
from attn_lessons.gradcheck import complex_step_gradient, directional_check, numerical_vjp

EXACT = 1e-10
INF = np.inf


def gelu_tanh(x):
    return gelu(x, "tanh")


def gelu_tanh_backward(dy, x):
    return gelu_backward(dy, x, "tanh")


# forward, backward, torch's
ACTIVATIONS = {
    "gelu": (gelu, gelu_backward, F.gelu),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward, lambda input: F.gelu(input, approximate="tanh")),
    "relu": (relu_forward, relu_backward, F.relu),
    "silu": (silu, silu_backward, F.silu),
}
KINDS = tuple(ACTIVATIONS)
each_activation = pytest.mark.parametrize("kind", KINDS)


def agree(got, want, rtol=EXACT, beside=0.0):
    """Same shape, and an error of at most ``rtol`` of the largest entry wanted, or of ``beside``.

    torch computes 1 + erf, which is off by 1e-16 however small it should be.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale = max(np.abs(want).max(initial=0), beside)
    error = np.abs(got - want).max(initial=0)
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def grads_agree(got, want, rtol=EXACT, beside=0.0):
    assert got.keys() == want.keys()
    for name in want:
        agree(got[name], want[name], rtol, beside)


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def autograd(function, upstream, **arrays):
    """The value, and the gradient by each array, of a function of torch tensors."""
    leaves = {name: tensor(a, requires_grad=True) for name, a in arrays.items()}
    out = function(**leaves)
    out.backward(tensor(upstream))
    return out.detach().numpy(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@st.composite
def inputs(draw, dtype=np.float64, scales=(1e-3, 1.0, 5.0, 80.0)):
    """dy and x of one shape, x of some scale, laid out in any way."""
    rng, shape = draw(generators()), draw(shapes())
    x = rng.normal(size=shape) * draw(st.sampled_from(scales))
    return tuple(draw(strided(a.astype(dtype))) for a in (rng.normal(size=shape), x))


# --- the normal distribution --------------------------------------------------------------------


def exact_cdf(x):
    with mpmath.workdps(50):
        return mpmath.ncdf(mpmath.mpf(float(x)))


def relative(got, want):
    with mpmath.workdps(50):
        return float(abs(mpmath.mpf(float(got)) / want - 1))


@given(rng=generators(), scale=st.sampled_from([1e-8, 1.0, 6.0, 15.0]))
@settings(max_examples=20)
def test_cdf_equals_fifty_digits_however_small_it_is(rng, scale):
    x = np.clip(scale * rng.normal(size=12), -37, 37)
    assert max(relative(p, exact_cdf(v)) for v, p in zip(x, normal_cdf(x), strict=True)) < 2e-15


def test_cdf_is_within_2e_16_everywhere():
    x = np.linspace(-9, 9, 1801)
    off = max(float(abs(exact_cdf(v) - float(p))) for v, p in zip(x, normal_cdf(x), strict=True))
    assert off < 2.5e-16


def test_the_quotient_is_mills_ratio():
    """The coefficients evaluated in 50 digits: what is left is their fit and their rounding."""
    u = [*np.linspace(0, 6, 121), *np.linspace(6, FAR, 69)]
    with mpmath.workdps(50):
        for v in map(mpmath.mpf, u):
            mills = mpmath.ncdf(-v) / mpmath.npdf(v)
            above = mpmath.polyval(MILLS_NUMERATOR[::-1], v)
            below = mpmath.polyval(MILLS_DENOMINATOR[::-1], v)
            assert abs(above / below / mills - 1) < 4e-16
    assert min(MILLS_NUMERATOR + MILLS_DENOMINATOR) > 0, "or terms would cancel"


def test_pdf_equals_fifty_digits():
    for x in (*np.random.default_rng(0).uniform(-37, 37, 200), 0.0, 1e-200):
        with mpmath.workdps(50):
            want = mpmath.npdf(mpmath.mpf(float(x)))
        assert relative(normal_pdf(np.array([x]))[0], want) < 1e-15


def test_cdf_equals_the_standard_library_and_scipy():
    x = np.random.default_rng(3).normal(size=200) * 4
    # Both round x/√2 before they square it.
    np.testing.assert_allclose(normal_cdf(x), [math.erfc(-v / 2**0.5) / 2 for v in x], rtol=1e-13)
    np.testing.assert_allclose(normal_cdf(x), scipy.special.ndtr(x), rtol=1e-13)


@given(drawn=inputs(scales=(1.0, 5.0)))
def test_a_number_lies_below_x_or_above_it(drawn):
    _, x = drawn
    np.testing.assert_allclose(normal_cdf(x) + normal_cdf(-x), 1, rtol=3e-16)
    assert np.array_equal(normal_pdf(x), normal_pdf(-x))


def test_cdf_at_the_ends():
    x = np.array([-INF, -1e300, -40.0, 0.0, 40.0, 1e300, INF, np.nan])
    np.testing.assert_array_equal(normal_cdf(x), [0, 0, 0, 0.5, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(normal_pdf(x)[[0, 1, 2, 4, 5, 6, 7]], [0] * 6 + [np.nan])
    # Where 1 + erf is 0, Φ is 2e-17 and stays that, down to the smallest float.
    assert 1 + math.erf(-8.4 / 2**0.5) == 0
    assert 2e-17 < normal_cdf(np.array([-8.4]))[0] < 3e-17
    assert 0 < normal_cdf(np.array([-38.4]))[0] < 1e-320


@pytest.mark.parametrize(("dtype", "limit"), [(np.float16, 1e-3), (np.float32, 6e-7)])
def test_cdf_in_lower_precision_keeps_its_tail(dtype, limit):
    x = np.linspace(-5 if dtype == np.float16 else -12, 5, 400).astype(dtype)
    got = normal_cdf(x)
    assert got.dtype == dtype
    normal = got > np.finfo(dtype).smallest_normal
    want = normal_cdf(x.astype(float))
    np.testing.assert_allclose(got[normal], want[normal], rtol=limit)


# --- activations ----------------------------------------------------------------------------------


@each_activation
@given(drawn=inputs())
def test_an_activation_equals_torch(kind, drawn):
    dy, x = drawn
    forward, backward, theirs = ACTIVATIONS[kind]
    out, grads = autograd(theirs, dy, input=x)
    agree(forward(x), out, beside=np.abs(x).max())
    agree(backward(dy, x), grads["input"], beside=np.abs(dy).max())


@each_activation
@settings(max_examples=12)
@given(drawn=inputs(scales=(1.0, 3.0)))
def test_an_activation_backward_equals_finite_differences(kind, drawn):
    dy, x = drawn
    forward, backward, _ = ACTIVATIONS[kind]
    agree(backward(dy, x), numerical_vjp(forward, x, dy), 1e-8)


def test_tanh_form_equals_a_complex_step():
    """A third road to the same numbers: no autograd, no subtraction."""
    dy, x = np.random.default_rng(4).normal(size=(2, 3, 5)) * 2

    def weighted(x):
        u = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
        return (dy * x * (1 + np.tanh(u)) / 2).sum()

    agree(gelu_backward(dy, x, "tanh"), complex_step_gradient(weighted, x), 1e-14)


@given(rng=generators())
@settings(max_examples=15)
def test_gelu_keeps_its_digits_in_the_lower_tail(rng):
    """torch's is 0 there to within 1e-16; ours is right in every digit."""
    x = -rng.uniform(5, 37, 8)
    with mpmath.workdps(50):
        exact = [mpmath.mpf(float(v)) for v in x]
        want = [float(v * mpmath.ncdf(v)) for v in exact]
        slope = [float(mpmath.ncdf(v) + v * mpmath.npdf(v)) for v in exact]
    np.testing.assert_allclose(gelu(x), want, rtol=4e-15)
    np.testing.assert_allclose(gelu_backward(np.ones(8), x), slope, rtol=4e-15)


@each_activation
def test_the_ends_are_limits(kind):
    forward, backward, _ = ACTIVATIONS[kind]
    x = np.array([-INF, -1e308, -1e4, 1e4, 1e308, INF])
    assert forward(x).tolist() == [0, 0, 0, 1e4, 1e308, INF]
    assert backward(np.full(6, 3.0), x).tolist() == [0, 0, 0, 3, 3, 3]
    assert forward(np.zeros(1)).tolist() == [0]
    assert backward(np.ones(1), np.zeros(1)).tolist() == [0 if kind == "relu" else 0.5]


@each_activation
def test_nan_stays_in_its_entry(kind):
    forward, backward, _ = ACTIVATIONS[kind]
    x = np.array([np.nan, 1.0, -1.0])
    assert np.isnan(forward(x)).tolist() == [True, False, False]
    out = backward(np.ones(3), x)
    # relu's gradient at NaN is dy, in torch as here.
    assert np.isnan(out).tolist() == [kind != "relu", False, False]
    _, grads = autograd(ACTIVATIONS[kind][2], np.ones(3), input=x)
    np.testing.assert_allclose(out, grads["input"], rtol=1e-12)


def test_facts_told_of_gelu():
    x = np.linspace(-12, 12, 240001)
    gate_gap = np.abs(normal_cdf(x) - np.divide(gelu(x, "tanh"), x, out=x * 0 + 0.5, where=x != 0))
    assert 1.78e-4 < gate_gap.max() < 1.8e-4
    slope = gelu_backward(np.ones_like(x), x)
    assert slope.min() == pytest.approx(-0.12890, abs=1e-5)
    assert slope.max() == pytest.approx(1.12890, abs=1e-5)
    assert abs(x[slope.argmax()]) == pytest.approx(2**0.5, abs=1e-4)


@each_activation
@given(drawn=inputs(), data=st.data(), dtype=DTYPES)
def test_memory_layout_and_dtype_do_not_matter(kind, drawn, data, dtype):
    dy, x = (np.ascontiguousarray(a.astype(dtype)) for a in drawn)
    forward, backward, _ = ACTIVATIONS[kind]
    other = [data.draw(strided(a)) for a in (dy, x)]
    limit = 1e-6 if dtype == np.float32 else 1e-14
    assert forward(x).dtype == backward(dy, x).dtype == dtype
    agree(forward(other[1]), forward(x), limit)
    agree(backward(*other), backward(dy, x), limit)


@each_activation
def test_scalars_and_empty_arrays_are_arrays(kind):
    forward, backward, _ = ACTIVATIONS[kind]
    for x in (np.array(1.0), np.zeros((2, 0))):
        for out in (forward(x), backward(x, x)):
            assert isinstance(out, np.ndarray)
            assert out.shape == x.shape


ADVERSARIAL = {
    "normal": lambda rng: rng.normal(size=4000),
    "plus and minus 80": lambda rng: rng.choice([-80.0, 80.0], size=4000),
    "tails": lambda rng: rng.uniform(-12, 12, size=4000),
    "near 0": lambda rng: 1e-4 * rng.normal(size=4000),
    "near the slope's 0": lambda rng: -0.7518 + 1e-3 * rng.normal(size=4000),
}


@each_activation
@pytest.mark.parametrize("entries", ADVERSARIAL)
def test_float32_error_is_at_most_twice_torchs(kind, entries):
    rng = np.random.default_rng(6)
    x, dy = ADVERSARIAL[entries](rng).astype(np.float32), rng.normal(size=4000).astype(np.float32)
    forward, backward, theirs = ACTIVATIONS[kind]
    exact = forward(x.astype(float)), backward(dy.astype(float), x.astype(float))
    out, grads = autograd(theirs, dy, input=x)
    for got, other, want in zip(
        (forward(x), backward(dy, x)), (out, grads["input"]), exact, strict=True
    ):
        assert got.dtype == np.float32
        floor = np.finfo(np.float32).eps * np.abs(want).max()
        assert np.abs(got - want).max() <= 2 * np.abs(other - want).max() + floor


# --- the feed-forward layer -----------------------------------------------------------------------


def layer(rng, batch, width, inner, dtype=np.float64, scale=1.0):
    """dout, x, w1, b1, w2, b2."""
    sizes = ((*batch, width), (*batch, width), (width, inner), (inner,), (inner, width), (width,))
    dout, x, w1, b1, w2, b2 = (rng.normal(size=size).astype(dtype) for size in sizes)
    return dout, (scale * x).astype(dtype), w1, b1, w2, b2


@st.composite
def layers(draw, dtype=np.float64, max_side=7):
    sizes = st.integers(1, max_side)
    batch = draw(st.lists(sizes, max_size=3).map(tuple))
    scale = draw(st.sampled_from([1.0, 10.0]))
    arrays = layer(draw(generators()), batch, draw(sizes), draw(sizes), dtype, scale)
    return [draw(strided(a)) for a in arrays]


def torch_ffn(kind):
    return lambda x, w1, b1, w2, b2: ACTIVATIONS[kind][2](x @ w1 + b1) @ w2 + b2


@each_activation
@settings(max_examples=20)
@given(drawn=layers())
def test_ffn_equals_torch(kind, drawn):
    dout, *arguments = drawn
    named = dict(zip(("x", "w1", "b1", "w2", "b2"), arguments, strict=True))
    out, cache = ffn_forward(*arguments, activation=kind)
    want, dwant = autograd(torch_ffn(kind), dout, **named)
    agree(out, want)
    dx, grads = ffn_backward(dout, *arguments, activation=kind)
    # Where every hidden unit is shut, torch's slopes are 0 and ours are 1e-16.
    grads_agree({"x": dx, **grads}, dwant, beside=1e-4)
    cached_dx, cached = ffn_backward_cached(dout, cache)
    np.testing.assert_array_equal(cached_dx, dx)
    grads_agree(cached, grads, 0)


def test_ffn_is_two_linear_modules_with_their_weights_transposed():
    rng = np.random.default_rng(1)
    dout, x, w1, b1, w2, b2 = layer(rng, (2, 3), 4, 6)
    up, down = torch.nn.Linear(4, 6, dtype=float), torch.nn.Linear(6, 4, dtype=float)
    with torch.no_grad():
        for parameter, value in zip(
            (up.weight, up.bias, down.weight, down.bias), (w1.T, b1, w2.T, b2), strict=True
        ):
            parameter.copy_(tensor(value))
    leaf = tensor(x, requires_grad=True)
    out = torch.nn.Sequential(up, torch.nn.GELU(), down)(leaf)
    out.backward(tensor(dout))
    agree(ffn_forward(x, w1, b1, w2, b2)[0], out.detach().numpy())
    dx, grads = ffn_backward(dout, x, w1, b1, w2, b2)
    agree(dx, leaf.grad.numpy())
    agree(grads["w1"], up.weight.grad.numpy().T)
    agree(grads["b2"], down.bias.grad.numpy())


@each_activation
def test_ffn_backward_equals_finite_differences(kind):
    names = ("x", "w1", "b1", "w2", "b2")
    for batch, width, inner in (((2, 3), 4, 5), ((), 1, 3), ((2,), 3, 3)):
        dout, *arguments = layer(np.random.default_rng(8), batch, width, inner)
        dx, grads = ffn_backward(dout, *arguments, activation=kind)
        for i, (name, got) in enumerate({"x": dx, **grads}.items()):
            assert name == names[i]

            def forward(value, i=i, arguments=arguments):
                moved = [*arguments[:i], value, *arguments[i + 1 :]]
                return ffn_forward(*moved, activation=kind)[0]

            agree(got, numerical_vjp(forward, arguments[i], dout), 1e-8)


@settings(max_examples=25)
@given(drawn=layers())
def test_swiglu_equals_torch(drawn):
    dout, x, w_gate, _, w_down, _ = drawn
    w_up = np.flip(w_gate, 0) - 0.5
    named = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down}

    def theirs(x, w_gate, w_up, w_down):
        return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down

    out, cache = swiglu_forward(**named)
    want, dwant = autograd(theirs, dout, **named)
    agree(out, want)
    dx, grads = swiglu_backward(dout, **named)
    grads_agree({"x": dx, **grads}, dwant)
    cached_dx, cached = swiglu_backward_cached(dout, cache)
    np.testing.assert_array_equal(cached_dx, dx)
    grads_agree(cached, grads, 0)


def test_swiglu_backward_equals_finite_differences():
    rng = np.random.default_rng(9)
    dout, x, w_gate, _, w_down, _ = layer(rng, (2, 3), 4, 5)
    arguments = [x, w_gate, rng.normal(size=(4, 5)), w_down]
    dx, grads = swiglu_backward(dout, *arguments)
    for i, got in enumerate((dx, *grads.values())):

        def forward(value, i=i):
            return swiglu_forward(*arguments[:i], value, *arguments[i + 1 :])[0]

        agree(got, numerical_vjp(forward, arguments[i], dout), 1e-8)


def test_directional_check_at_working_size():
    rng = np.random.default_rng(10)
    dout, x, w1, b1, w2, b2 = layer(rng, (4, 16), 32, 128, scale=0.5)
    dx, grads = ffn_backward(dout, x, w1, b1, w2, b2)

    def loss_of_x(x):
        return float((dout * ffn_forward(x, w1, b1, w2, b2)[0]).sum())

    def loss_of_w1(w1):
        return float((dout * ffn_forward(x, w1, b1, w2, b2)[0]).sum())

    assert directional_check(loss_of_x, x, dx, rng.normal(size=x.shape)) <= 1e-8
    assert directional_check(loss_of_w1, w1, grads["w1"], rng.normal(size=w1.shape)) <= 1e-8


@given(drawn=layers(), split=st.integers(0, 7))
@settings(max_examples=20)
def test_tokens_do_not_see_each_other_and_share_their_parameters(drawn, split):
    dout, *arguments = drawn
    width = dout.shape[-1]
    dout, x = dout.reshape(-1, width), arguments[0].reshape(-1, width)
    out, _ = ffn_forward(x, *arguments[1:])
    agree(out.reshape(arguments[0].shape), ffn_forward(*arguments)[0], 1e-13)
    _, whole = ffn_backward(dout, x, *arguments[1:])
    parts = [
        ffn_backward(dout[rows], x[rows], *arguments[1:])[1]
        for rows in (slice(0, split), slice(split, None))
    ]
    scale = max(np.abs(g).max(initial=0) for g in whole.values())
    for name, grad in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], grad, atol=1e-12 * scale)


def test_biases_are_not_ignored_and_may_be_anywhere():
    """A hidden unit that its bias shuts has no gradient; one that its bias opens is linear."""
    dout, x, w1, _, w2, b2 = layer(np.random.default_rng(2), (2, 3), 4, 5)
    b1 = np.array([-1e3, 1e3, -1e3, 1e3, 0.0])
    _, grads = ffn_backward(dout, x, w1, b1, w2, b2)
    assert (grads["b1"][[0, 2]] == 0).all()
    assert (grads["w1"][:, [0, 2]] == 0).all()
    agree(grads["b1"][[1, 3]], (dout @ w2.T).sum((0, 1))[[1, 3]], 1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_layer_error_is_at_most_twice_torchs(kind):
    arrays = layer(np.random.default_rng(12), (8, 16), 24, 96, np.float32)
    dout, *arguments = arrays
    named = dict(zip(("x", "w1", "b1", "w2", "b2"), arguments, strict=True))
    wide = [a.astype(float) for a in arguments]
    dx, exact = ffn_backward(dout.astype(float), *wide, activation=kind)
    got_dx, got = ffn_backward(dout, *arguments, activation=kind)
    _, other = autograd(torch_ffn(kind), dout, **named)
    for name, want in {"x": dx, **exact}.items():
        ours = {"x": got_dx, **got}[name]
        assert ours.dtype == np.float32
        floor = np.finfo(np.float32).eps * np.abs(want).max()
        assert np.abs(ours - want).max() <= 2 * np.abs(other[name] - want).max() + floor


def test_axes_of_length_zero():
    for batch, width, inner in (((0, 3), 4, 5), ((2, 0), 4, 5), ((2, 3), 4, 0), ((2,), 0, 3)):
        dout, *arguments = layer(np.random.default_rng(0), batch, width, inner)
        out, _ = ffn_forward(*arguments)
        assert out.shape == (*batch, width)
        if inner == 0:
            agree(out, np.broadcast_to(arguments[4], out.shape))
        dx, grads = ffn_backward(dout, *arguments)
        assert dx.shape == dout.shape
        for grad, argument in zip(grads.values(), arguments[1:], strict=True):
            assert grad.shape == argument.shape
        x, w1, _, w2, _ = arguments
        _, grads = swiglu_backward(dout, x, w1, w1, w2)
        assert [g.shape for g in grads.values()] == [w1.shape, w1.shape, w2.shape]


# --- inputs and errors ----------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)
    dout, x, w1, b1, w2, b2 = layer(rng, (2, 3), 4, 5, dtype)
    caches = ffn_forward(x, w1, b1, w2, b2)[1], swiglu_forward(x, w1, w1, w2)[1]
    return {
        normal_pdf: (x,),
        normal_cdf: (x,),
        relu_forward: (x,),
        relu_backward: (dout, x),
        gelu: (x,),
        gelu_backward: (dout, x),
        silu: (x,),
        silu_backward: (dout, x),
        ffn_forward: (x, w1, b1, w2, b2),
        ffn_backward: (dout, x, w1, b1, w2, b2),
        ffn_backward_cached: (dout, caches[0]),
        swiglu_forward: (x, w1, w1, w2),
        swiglu_backward: (dout, x, w1, w1, w2),
        swiglu_backward_cached: (dout, caches[1]),
    }


def results(out):
    """The arrays that a call returned, without what a cache keeps."""
    parts = out if type(out) is tuple else (out,)
    found = [p for p in parts if isinstance(p, np.ndarray)]
    return found + [v for p in parts if isinstance(p, dict) for v in p.values()]


def given_arrays(arguments):
    return [a for a in arguments if isinstance(a, np.ndarray)] + [
        a for c in arguments if isinstance(c, tuple) for a in c if isinstance(a, np.ndarray)
    ]


@pytest.mark.parametrize("function", calls())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_may_be_read_only_and_are_never_returned(function, dtype):
    arguments = calls(dtype)[function]
    arrays = given_arrays(arguments)
    for a in arrays:
        a.flags.writeable = False
    for result in results(function(*arguments)):
        assert result.dtype == dtype
        assert not any(np.shares_memory(result, a) for a in arrays)


def test_gradients_of_a_single_token_are_no_views():
    dout, *arguments = layer(np.random.default_rng(1), (), 4, 5)
    _, grads = ffn_backward(dout, *arguments)
    assert not any(np.shares_memory(g, dout) for g in grads.values())


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    with np.errstate(all="raise"):
        loud = function(*arguments)
        assert np.geterr()["over"] == "raise", "the caller's settings come back"
    for got, want in zip(results(loud), results(quiet), strict=True):
        np.testing.assert_array_equal(got, want)


@each_activation
def test_integers_become_float64(kind):
    forward, backward, _ = ACTIVATIONS[kind]
    whole = np.arange(-3, 4)
    assert forward(whole).dtype == backward(whole, whole).dtype == np.float64
    np.testing.assert_array_equal(forward(whole), forward(whole.astype(float)))
    np.testing.assert_array_equal(backward(whole, whole), backward(1.0 * whole, 1.0 * whole))


X, W1, B1, W2, B2 = np.ones((2, 3)), np.ones((3, 5)), np.ones(5), np.ones((5, 3)), np.ones(3)
BAD = [
    (gelu, (X, "erf"), 'approximate: expected "none" or "tanh"; got \'erf\''),
    (gelu_backward, (X, X, None), 'approximate: expected "none" or "tanh"; got None'),
    (gelu, (1j * X,), "x: expected real numbers; got dtype complex128"),
    (gelu_backward, (X[0], X), r"dy: expected shape \(2, 3\) to match x; got \(3,\)"),
    (silu_backward, (X.T, X), r"dy: expected shape \(2, 3\) to match x; got \(3, 2\)"),
    (relu_backward, (X[:1], X), r"dy: expected shape \(2, 3\) to match x; got \(1, 3\)"),
    (normal_cdf, (np.array(["a"]),), "x: expected real numbers; got dtype <U1"),
    (ffn_forward, (np.array(1.0), W1, B1, W2, B2), r"x: expected shape \(..., C\); got a scalar"),
    (ffn_forward, (X, W1.T, B1, W2, B2), r"w1: expected shape \(3, F\) to match x \(2, 3\); got"),
    (ffn_forward, (X, W1, B2, W2, B2), r"b1: expected shape \(5,\) to match w1 \(3, 5\); got"),
    (ffn_forward, (X, W1, B1, W2.T, B2), r"w2: expected shape \(5, 3\) to match w1 .*got \(3, 5"),
    (ffn_forward, (X, W1, B1, W2, B1), r"b2: expected shape \(3,\) to match x \(2, 3\); got \(5,"),
    (ffn_backward, (X.T, X, W1, B1, W2, B2), r"dout: expected shape \(2, 3\) to match x; got"),
    (swiglu_forward, (X, W1.T, W1, W2), r"w_gate: expected shape \(3, F\) to match x \(2, 3\)"),
    (swiglu_forward, (X, W1, W2, W2), r"w_up: expected shape \(3, 5\) to match w_gate; got"),
    (swiglu_forward, (X, W1, W1, W1), r"w_down: expected shape \(5, 3\) to match w_gate \(3, 5\)"),
    (swiglu_backward, (X[0], X, W1, W1, W2), r"dout: expected shape \(2, 3\) to match x; got"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_activation_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="activation: expected one of gelu, gelu_tanh, relu, silu"):
        ffn_forward(X, W1, B1, W2, B2, activation="tanh")


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        gelu_backward(np.zeros(3), np.zeros(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        ffn_forward(X, W1, B2, W2, B2)
    with pytest.raises(jaxtyping.TypeCheckError):
        swiglu_forward(X, W1, W1, W1)


def test_every_function_states_equation_shapes_and_errors():
    here = {
        f
        for n, f in vars(library).items()
        if inspect.isfunction(f) and n[0] != "_" and f.__module__ == library.__name__
    }
    assert here == set(calls())
    for function in here:
        doc = inspect.getdoc(function)
        assert ".. math::" in doc
        assert "Shapes:" in doc
        assert "ValueError:" in doc
        hints = typing.get_type_hints(function)
        assert set(hints) == {*inspect.signature(function).parameters, "return"}
