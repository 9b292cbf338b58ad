"""LayerNorm, RMSNorm, residual and dropout against torch, exact fractions and differences."""

import inspect
import math
import typing
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, generators, shapes, strided

from attn_lessons import normalization as library
from attn_lessons.attention import dropout_keep
from attn_lessons.gradcheck import directional_check, numerical_gradient, numerical_vjp
from attn_lessons.normalization import (
    dropout_backward,
    dropout_forward,
    layernorm_backward,
    layernorm_forward,
    layernorm_statistics,
    residual_backward,
    residual_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)

EXACT = 1e-10
INF = np.inf
FUNCTIONS = (
    layernorm_statistics,
    layernorm_forward,
    layernorm_backward,
    rmsnorm_forward,
    rmsnorm_backward,
    residual_forward,
    residual_backward,
    dropout_forward,
    dropout_backward,
)


def agree(got, want, rtol=EXACT, cancelled=0.0):
    """Same shape, same NaN, and an error of at most ``rtol`` of the largest entry wanted.

    Or of the largest number that ``cancelled`` on the way: of one entry a row, dx is 0.
    """
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True)
    scale = max(np.abs(want[finite]).max(initial=0), cancelled)
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def all_agree(got, want, rtol=EXACT, cancelled=(0.0, 0.0, 0.0, 0.0)):
    for one, other, size in zip(got, want, cancelled[-len(got) :], strict=True):
        agree(one, other, rtol, size)


def terms(dy, x, gamma, eps):
    """How large the numbers are that cancel in out, dx, dgamma and dbeta."""
    axes = tuple(range(-gamma.ndim, 0))
    rstd = (x.var(axes, keepdims=True) + eps) ** -0.5
    dgamma = np.abs(rstd * x).max() * np.abs(dy).max()
    return 0.0, np.abs(rstd * gamma * dy).max(), dgamma, 0.0


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def torch_layernorm(dy, x, gamma, beta, eps):
    """out, then dx, dgamma, dbeta by autograd."""
    leaves = [tensor(a, requires_grad=True) for a in (x, gamma, beta)]
    out = F.layer_norm(leaves[0], gamma.shape, leaves[1], leaves[2], eps)
    out.backward(tensor(dy))
    return out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)


def torch_rmsnorm(dy, x, gamma, eps):
    leaves = [tensor(a, requires_grad=True) for a in (x, gamma)]
    out = F.rms_norm(leaves[0], gamma.shape, leaves[1], eps)
    out.backward(tensor(dy))
    return out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)


def ours_layernorm(dy, x, gamma, beta, eps):
    return layernorm_forward(x, gamma, beta, eps), *layernorm_backward(dy, x, gamma, eps)


def ours_rmsnorm(dy, x, gamma, eps):
    return rmsnorm_forward(x, gamma, eps), *rmsnorm_backward(dy, x, gamma, eps)


EPS = st.sampled_from([1e-5, 1e-6, 1e-3, 0.5])


@st.composite
def norms(draw, dtype=np.float64, max_side=7, max_dims=4):
    """dy, x, gamma, beta and eps; gamma has one to all of x's axes, each row its own offset."""
    shape = draw(shapes(1, max_dims, max_side=max_side))
    n_axes = draw(st.integers(1, len(shape)))
    rng = draw(generators())
    rows = shape[: len(shape) - n_axes] + (1,) * n_axes
    spread = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    x = spread * (rng.normal(size=shape) + draw(st.sampled_from([0, 5])) * rng.normal(size=rows))
    dy, gamma, beta = (rng.normal(size=s) for s in (shape, shape[-n_axes:], shape[-n_axes:]))
    arrays = [draw(strided(a.astype(dtype))) for a in (dy, x, gamma, beta)]
    return *arrays, draw(EPS)


# --- against autograd ---------------------------------------------------------------------------


@given(drawn=norms())
def test_layernorm_equals_torch(drawn):
    dy, x, gamma, _, eps = drawn
    sizes = terms(dy, x, gamma, eps)
    all_agree(ours_layernorm(*drawn), torch_layernorm(*drawn), cancelled=sizes)


@given(drawn=norms())
def test_rmsnorm_equals_torch(drawn):
    dy, x, gamma, _, eps = drawn
    sizes = terms(dy, x, gamma, eps)[:3]
    all_agree(ours_rmsnorm(dy, x, gamma, eps), torch_rmsnorm(dy, x, gamma, eps), cancelled=sizes)


def test_the_module_form_of_torch_takes_the_same_parameters():
    """nn.LayerNorm's weight is gamma, its bias beta, its default eps ours."""
    rng = np.random.default_rng(2)
    layer = torch.nn.LayerNorm(6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(tensor(rng.normal(size=6)))
    x, dy = rng.normal(size=(2, 3, 4, 6))
    gamma, beta = (p.detach().numpy() for p in (layer.weight, layer.bias))
    leaf = tensor(x, requires_grad=True)
    out = layer(leaf)
    out.backward(tensor(dy))
    agree(layernorm_forward(x, gamma, beta), out.detach().numpy())
    grads = (leaf.grad, layer.weight.grad, layer.bias.grad)
    all_agree(layernorm_backward(dy, x, gamma), [g.numpy() for g in grads])


# --- against differences ------------------------------------------------------------------------


@settings(max_examples=12)
@given(drawn=norms(max_side=3, max_dims=3))
def test_layernorm_backward_equals_finite_differences(drawn):
    dy, x, gamma, beta, eps = drawn
    dx, dgamma, dbeta = layernorm_backward(dy, x, gamma, eps)

    def measured(f, at):
        return numerical_vjp(f, at, dy)

    sizes = terms(dy, x, gamma, eps)
    agree(dx, measured(lambda x: layernorm_forward(x, gamma, beta, eps), x), 1e-8, sizes[1])
    want = measured(lambda gamma: layernorm_forward(x, gamma, beta, eps), gamma)
    agree(dgamma, want, 1e-8, sizes[2])
    agree(dbeta, measured(lambda beta: layernorm_forward(x, gamma, beta, eps), beta), 1e-8)


@settings(max_examples=12)
@given(drawn=norms(max_side=3, max_dims=3))
def test_rmsnorm_backward_equals_finite_differences(drawn):
    dy, x, gamma, _, eps = drawn
    dx, dgamma = rmsnorm_backward(dy, x, gamma, eps)
    want = numerical_vjp(lambda x: rmsnorm_forward(x, gamma, eps), x, dy)
    agree(dx, want, 1e-8, terms(dy, x, gamma, eps)[1])
    agree(dgamma, numerical_vjp(lambda gamma: rmsnorm_forward(x, gamma, eps), gamma, dy), 1e-8)


def test_directional_checks_at_working_size():
    rng = np.random.default_rng(11)
    x, dy, v = rng.normal(size=(3, 4, 33, 64))
    gamma, beta = rng.normal(size=(2, 64))
    for forward, dx in (
        (lambda x: layernorm_forward(x, gamma, beta), layernorm_backward(dy, x, gamma)[0]),
        (lambda x: rmsnorm_forward(x, gamma), rmsnorm_backward(dy, x, gamma)[0]),
    ):

        def loss(x, forward=forward):
            return float((dy * forward(x)).sum())

        assert directional_check(loss, x, dx, v) <= 1e-8


# --- against exact arithmetic --------------------------------------------------------------------


def exact_layernorm(row, eps):
    """The normalised row in fractions; the one root with 50 digits."""
    x = [Fraction(float(v)) for v in row]
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x) + Fraction(eps)
    root = Fraction(math.isqrt(int(variance * 10**100))) / 10**50
    return [float((v - mean) / root) for v in x]


OFFSETS = [0.0, 1e3, 4e4, 8e4, 1e6]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [*OFFSETS, -4e4])
@given(rng=generators(), n=st.integers(2, 9))
@settings(max_examples=10)
def test_an_offset_costs_no_digits(dtype, offset, rng, n):
    row = (rng.normal(size=n) + offset).astype(dtype)
    xhat, _ = layernorm_statistics(row)
    agree(xhat, np.array(exact_layernorm(row, 1e-5)), 4 * np.finfo(dtype).eps)


def test_float64_at_1e15_where_the_mean_itself_is_rounded():
    row = 1e15 + np.array([0.0, 1.0, 2.0, 5.0, 7.0])
    agree(layernorm_statistics(row)[0], exact_layernorm(row, 1e-5), 1e-14)
    # The sum is rounded by more than the row is wide: a mean taken first is off.
    ten = 1e16 + np.array([0.0, 2.0, 4.0, 10.0, 14.0, 2.0, 8.0])
    agree(layernorm_statistics(ten)[0], exact_layernorm(ten, 1e-5), 1e-14)
    plain = (ten - ten.mean()) / ten.std()
    assert np.abs(plain - exact_layernorm(ten, 1e-5)).max() > 1e-2


@pytest.mark.parametrize("first", [1e6, -1e12, 1e-30])
def test_an_outlier_in_the_first_place_costs_no_digits(first):
    """Rows are shifted by their first entry; it may be unlike all others."""
    row = np.random.default_rng(1).normal(size=40)
    row[0] = first
    agree(layernorm_statistics(row)[0], exact_layernorm(row, 1e-5), 1e-13)


# --- public failures ------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [40000.0, 80000.0, 4e6])
def test_onnxruntime_28463_large_values_with_a_small_spread(start):
    """NaN there: in float32 the mean of the squares minus the squared mean was negative."""
    x = start + np.arange(4, dtype=np.float32)[None]
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    out = layernorm_forward(x, ones, zeros)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[0], np.array([-3, -1, 1, 3]) / (5 + 4e-5) ** 0.5, rtol=1e-7)
    mean = x.mean()
    one_pass = (x * x).mean(dtype=np.float32) - mean * mean
    assert not 1.2 <= one_pass <= 1.3, "the variance is 1.25: one pass in float32 misses it"
    dx, dgamma, _ = layernorm_backward(np.array([[1, 0, 0, 2]], np.float32), x, ones)
    want, *rest = layernorm_backward(np.array([[1.0, 0, 0, 2]]), np.arange(4.0)[None], np.ones(4))
    agree(dx, want, 1e-6)
    agree(dgamma, rest[0], 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, 1234.0, -1 / 3, 6e4, 1e-4])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_onnxruntime_21935_a_constant_row_is_exactly_beta(dtype, value, eps):
    """NaN there, for 256 times 1234: a variance of 0 came out negative."""
    x = np.full((3, 256), value, dtype)
    gamma, beta = np.random.default_rng(3).normal(size=(2, 256)).astype(dtype)
    assert np.array_equal(layernorm_forward(x, gamma, beta, eps), np.broadcast_to(beta, x.shape))
    dx, dgamma, dbeta = layernorm_backward(np.ones_like(x), x, gamma, eps)
    assert np.isfinite(dbeta).all()
    assert (dgamma == 0).all()
    # Wherever x̂ is 0, the gradient is that of centring, times 1/√ε.
    wide = gamma.astype(float)
    with np.errstate(over="ignore"):
        want = np.broadcast_to((wide - wide.mean()) * eps**-0.5, x.shape).astype(dtype)
    agree(dx, want, 2 * np.finfo(dtype).eps)


def test_pytorch_51102_weakly_shifted_rows_in_float32():
    """There, rows at 2000 with variance 1 came out with variance 0.2 or 30823."""
    x = (np.random.default_rng(0).normal(size=(50, 4)) + 2000).astype(np.float32)
    xhat, _ = layernorm_statistics(x)
    wide = x.astype(float)
    want = (wide - wide.mean(-1, keepdims=True)) / (wide.var(-1, keepdims=True) + 1e-5) ** 0.5
    agree(xhat, want, 2e-7)


def test_onnxruntime_17692_float16_with_a_variance_beyond_its_range():
    """Variance 246419 does not fit float16, whose largest number is 65504; the result does."""
    x = np.array([[-700, -300, 20, 980]], np.float16)
    assert x.astype(float).var() > 65504
    xhat, rstd = layernorm_statistics(x)
    assert xhat.dtype == rstd.dtype == np.float16
    agree(xhat, layernorm_statistics(x.astype(float))[0], 1e-3)
    gamma, dy = np.ones(4, np.float16), np.array([[1, 2, 0, -1]], np.float16)
    assert np.isfinite(rmsnorm_forward(x, gamma)).all()
    for got, want in zip(
        (*layernorm_backward(dy, x, gamma), *rmsnorm_backward(dy, x, gamma)),
        (
            *layernorm_backward(dy.astype(float), x.astype(float), gamma),
            *rmsnorm_backward(dy.astype(float), x.astype(float), gamma),
        ),
        strict=True,
    ):
        agree(got, want, 2e-3)


def test_float32_whose_squares_overflow():
    x = np.array([[3e30, -1e30, 2e25, 0]], np.float32)
    ones = np.ones(4, np.float32)
    agree(layernorm_statistics(x)[0], layernorm_statistics(x / np.float32(1e30))[0], 1e-5)
    agree(rmsnorm_forward(x, ones), rmsnorm_forward(x / np.float32(1e30), ones), 1e-5)


def test_annotated_transformer_119_the_variance_is_the_biased_one():
    """torch.std divides by n - 1: 13 % off at width 4, 0.1 % at 512 (facts of that issue's kind).

    [1, 0, 0, 0] gave [1.5, -0.5, …] there; torch's LayerNorm gives 1.7320 (BERT-pytorch#30).
    """
    out = layernorm_forward(np.array([1.0, 0, 0, 0]), np.ones(4), np.zeros(4))
    np.testing.assert_allclose(out, [1.7320, -0.5773, -0.5773, -0.5773], atol=1e-4)
    rng = np.random.default_rng(0)
    for width, low, high in ((4, 0.12, 0.14), (512, 0.0009, 0.0011)):
        x = rng.normal(size=(5, width))
        right = layernorm_statistics(x)[0]
        bessel = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True, ddof=1) + 1e-6)
        assert low <= np.abs(right - bessel).max() / np.abs(right).max() <= high


def test_annotated_transformer_119_eps_stands_inside_the_root():
    """Where the variance is 1, nobody sees where eps stands; where it is 1e-6, everybody does."""
    x = np.random.default_rng(1).normal(size=(5, 16))
    for scale, low, high in ((1.0, 0, 1e-4), (1e-3, 0.5, 10)):
        row = scale * x
        right = layernorm_forward(row, np.ones(16), np.zeros(16))
        want = F.layer_norm(tensor(row), (16,)).numpy()
        outside = (row - row.mean(-1, keepdims=True)) / (row.std(-1, keepdims=True) + 1e-5)
        agree(right, want)
        assert low <= np.abs(right - outside).max() / np.abs(right).max() <= high


def test_entrenar_313_the_skip_gradient_arrives_at_the_first_of_24_blocks():
    """There, the second residual's own path was lost: blocks 0 … 18 of 24 got nothing."""
    rng = np.random.default_rng(4)
    weights = 0.02 * rng.normal(size=(24, 16, 16))
    dout = lost = rng.normal(size=(3, 16))
    kept = dout
    for w in weights:
        kept = residual_backward(kept, lambda d, w=w: d @ w.T)
        lost = lost @ w.T
    assert 0.5 < np.linalg.norm(kept) / np.linalg.norm(dout) < 2
    assert np.linalg.norm(lost) / np.linalg.norm(dout) < 1e-20


# --- float32 -------------------------------------------------------------------------------------


ROWS = {
    "normal": lambda rng: rng.normal(size=(64, 48)),
    "plus and minus 80": lambda rng: rng.choice([-80.0, 80.0], size=(64, 48)),
    "offset 100": lambda rng: rng.normal(size=(64, 48)) + 100,
    "one large": lambda rng: np.where(rng.random((64, 48)) < 0.02, 1e4, rng.normal(size=(64, 48))),
    "all but equal": lambda rng: 1 + 1e-6 * rng.normal(size=(64, 48)),
    "tiny": lambda rng: 1e-3 * rng.normal(size=(64, 48)),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("ours", "theirs", "beta"),
    [(ours_layernorm, torch_layernorm, True), (ours_rmsnorm, torch_rmsnorm, False)],
    ids=["layernorm", "rmsnorm"],
)
def test_float32_error_is_at_most_twice_torchs(rows, ours, theirs, beta):
    rng = np.random.default_rng(7)
    single = [a.astype(np.float32) for a in (rng.normal(size=(64, 48)), ROWS[rows](rng))]
    single += [a.astype(np.float32) for a in rng.normal(size=(1 + beta, 48))]
    exact = theirs(*(a.astype(float) for a in single), 1e-5)
    for got, other, want in zip(ours(*single, 1e-5), theirs(*single, 1e-5), exact, strict=True):
        assert got.dtype == np.float32
        floor = np.finfo(np.float32).eps * np.abs(want).max()
        assert np.abs(got - want).max() <= 2 * np.abs(other - want).max() + floor


@given(drawn=norms(), single=st.sets(st.integers(0, 3), min_size=1))
def test_dtypes_meet_as_numpys_do(drawn, single):
    *arrays, eps = drawn
    dy, x, gamma, beta = (a.astype(np.float32) if i in single else a for i, a in enumerate(arrays))
    assert layernorm_forward(x, gamma, beta, eps).dtype == np.result_type(x, gamma, beta)
    wanted = np.result_type(dy, x, gamma)
    assert {g.dtype for g in layernorm_backward(dy, x, gamma, eps)} == {wanted}
    assert {g.dtype for g in rmsnorm_backward(dy, x, gamma, eps)} == {wanted}
    assert rmsnorm_forward(x, gamma, eps).dtype == np.result_type(x, gamma)
    assert {a.dtype for a in layernorm_statistics(x, gamma.ndim, eps)} == {x.dtype}


@pytest.mark.usefixtures("unchecked")
def test_extended_precision_is_kept():
    rng = np.random.default_rng(1)
    dy, x = rng.normal(size=(2, 3, 5)).astype(np.longdouble)
    gamma = np.ones(5, np.longdouble)
    dx, _, _ = layernorm_backward(dy, x, gamma)
    assert dx.dtype == np.longdouble
    # Far below what float64 would leave of the sum.
    assert np.abs(dx.sum(-1)).max() <= 1e-17


# --- what must hold whatever the numbers ----------------------------------------------------------


@given(drawn=norms())
def test_a_normalised_row_has_mean_0_and_the_variance_that_eps_leaves(drawn):
    _, x, gamma, _, eps = drawn
    axes = tuple(range(-gamma.ndim, 0))
    xhat, rstd = layernorm_statistics(x, gamma.ndim, eps)
    assert rstd.shape == x.mean(axes, keepdims=True).shape
    np.testing.assert_allclose(xhat.mean(axes), 0, atol=1e-13)
    variance = x.var(axes, keepdims=True)
    np.testing.assert_allclose(
        xhat.var(axes, keepdims=True), variance / (variance + eps), atol=1e-9
    )
    np.testing.assert_allclose(rstd, (variance + eps) ** -0.5, rtol=1e-9)


@given(drawn=norms(), shift=st.sampled_from([-50.0, 3.0]))
def test_layernorm_sees_no_shift_of_a_row(drawn, shift):
    dy, x, gamma, beta, eps = drawn
    np.testing.assert_allclose(
        layernorm_forward(x + shift, gamma, beta, eps),
        layernorm_forward(x, gamma, beta, eps),
        rtol=1e-7,
        atol=1e-7,
    )
    dx, _, _ = layernorm_backward(dy, x, gamma, eps)
    axes = tuple(range(-gamma.ndim, 0))
    size = np.abs(dx).max(initial=0)
    # So a row's gradient has no part along the ones.
    assert np.abs(dx.sum(axes)).max(initial=0) <= 1e-11 * max(size, np.abs(dy).max(initial=0) / eps)


def test_rmsnorm_sees_a_shift():
    x = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_allclose(rmsnorm_forward(x, np.ones(3), 0.0), x / (14 / 3) ** 0.5)
    np.testing.assert_allclose(rmsnorm_forward(x - 2, np.ones(3), 0.0), (x - 2) / (2 / 3) ** 0.5)


@given(rng=generators(), factor=st.sampled_from([1e-2, 7.0, 1e5]))
def test_without_eps_neither_sees_a_factor(rng, factor):
    x, dy = rng.normal(size=(2, 3, 5))
    gamma, beta = rng.normal(size=(2, 5))
    for got, want in (
        (layernorm_forward(factor * x, gamma, beta, 0.0), layernorm_forward(x, gamma, beta, 0.0)),
        (rmsnorm_forward(factor * x, gamma, 0.0), rmsnorm_forward(x, gamma, 0.0)),
    ):
        agree(got, want, 1e-12)
    # So the gradient has no part along x: exactly so without eps, and up to O(eps) with it.
    dx, _, _ = layernorm_backward(dy, x, gamma, 0.0)
    np.testing.assert_allclose((dx * x).sum(-1), 0, atol=1e-12)
    np.testing.assert_allclose((rmsnorm_backward(dy, x, gamma, 0.0)[0] * x).sum(-1), 0, atol=1e-12)
    along = np.abs((layernorm_backward(dy, x, gamma, 1e-2)[0] * x).sum(-1))
    assert along.max() > 1e-8


def test_what_eps_leaves_of_the_gradient_along_x_is_of_its_order():
    """facts: dx · x̂ is O(ε), not 0."""
    rng = np.random.default_rng(6)
    x, dy = rng.normal(size=(2, 4, 16))
    gamma = rng.normal(size=16)
    xhat, _ = layernorm_statistics(x)
    sizes = [
        np.abs((layernorm_backward(dy, x, gamma, eps)[0] * xhat).sum()) for eps in (1e-4, 1e-5)
    ]
    assert 9 < sizes[0] / sizes[1] < 11


@given(rng=generators())
def test_on_centred_rows_both_norms_are_the_same(rng):
    x, dy = rng.normal(size=(2, 4, 6))
    x -= x.mean(-1, keepdims=True)
    gamma = rng.normal(size=6)
    agree(rmsnorm_forward(x, gamma), layernorm_forward(x, gamma, np.zeros(6)), 1e-12)
    centred = rmsnorm_backward(dy, x, gamma)[0]
    dx, dgamma, _ = layernorm_backward(dy, x, gamma)
    # The gradients by x differ by the mean that LayerNorm takes off x.
    agree(dx, centred - centred.mean(-1, keepdims=True), 1e-11)
    agree(dgamma, rmsnorm_backward(dy, x, gamma)[1], 1e-11)


@given(drawn=norms(max_dims=3))
def test_trailing_axes_are_one_row(drawn):
    """A norm over (H, W) is a norm over H · W numbers, reshaped."""
    dy, x, gamma, beta, eps = drawn
    rows, flat = (-1, gamma.size), gamma.size
    out = layernorm_forward(x.reshape(rows), gamma.reshape(flat), beta.reshape(flat), eps)
    agree(layernorm_forward(x, gamma, beta, eps), out.reshape(x.shape), 1e-13)
    dx, dgamma, dbeta = layernorm_backward(
        dy.reshape(rows), x.reshape(rows), gamma.reshape(flat), eps
    )
    want = dx.reshape(x.shape), dgamma.reshape(gamma.shape), dbeta.reshape(gamma.shape)
    all_agree(layernorm_backward(dy, x, gamma, eps), want, 1e-9)


@given(drawn=norms(max_side=5), data=st.data())
def test_memory_layout_does_not_matter(drawn, data):
    dy, x, gamma, _, eps = (np.ascontiguousarray(a) if np.ndim(a) else a for a in drawn)
    other = [data.draw(strided(a)) for a in (dy, x, gamma)]
    all_agree(layernorm_backward(*other, eps), layernorm_backward(dy, x, gamma, eps), 1e-11)
    all_agree(rmsnorm_backward(*other, eps), rmsnorm_backward(dy, x, gamma, eps), 1e-11)


def test_one_entry_a_row_is_beta_and_has_no_gradient():
    x, dy = np.random.default_rng(0).normal(size=(2, 4, 1))
    assert (layernorm_forward(x, np.array([2.0]), np.array([3.0])) == 3).all()
    dx, dgamma, dbeta = layernorm_backward(dy, x, np.array([2.0]))
    assert (dx == 0).all()
    assert (dgamma == 0).all()
    agree(dbeta, dy.sum(0))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 3)])
def test_axes_of_length_zero(shape):
    x, gamma = np.zeros(shape), np.ones(shape[-1])
    assert layernorm_forward(x, gamma, gamma).shape == shape
    assert rmsnorm_forward(x, gamma).shape == shape
    for grads in (layernorm_backward(x, x, gamma), rmsnorm_backward(x, x, gamma)):
        assert [g.shape for g in grads] == [shape, *[gamma.shape] * (len(grads) - 1)]
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_no_number_stays_in_its_row(bad, place):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 4))
    gamma, beta = rng.normal(size=(2, 4))
    clean = layernorm_forward(x, gamma, beta), layernorm_backward(dy, x, gamma)[0]
    x[1, place] = bad
    for got, want in zip(
        (layernorm_forward(x, gamma, beta), layernorm_backward(dy, x, gamma)[0]), clean, strict=True
    ):
        assert np.isnan(got[1]).all()
        np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])
    assert np.isnan(layernorm_backward(dy, x, gamma)[1]).all()
    assert np.isfinite(layernorm_backward(dy, x, gamma)[2]).all()


def test_a_constant_row_without_eps_is_nan_and_alone_in_it():
    x = np.array([[2.0, 2.0], [1.0, 3.0]])
    out = layernorm_forward(x, np.ones(2), np.zeros(2), 0.0)
    assert np.isnan(out[0]).all()
    assert out[1].tolist() == [-1, 1]
    assert np.isnan(F.layer_norm(tensor(x), (2,), eps=0.0).numpy()[0]).all(), "torch: the same"


# --- residual -------------------------------------------------------------------------------------


@given(rng=generators(), dtype=DTYPES)
def test_residual_equals_torch(rng, dtype):
    x, dout = rng.normal(size=(2, 3, 4, 5)).astype(dtype)
    w = rng.normal(size=(5, 5)).astype(dtype)
    out = residual_forward(x, lambda x: np.tanh(x @ w))
    dx = residual_backward(dout, lambda d: (d * (1 - np.tanh(x @ w) ** 2)) @ w.T)
    assert out.dtype == dx.dtype == dtype
    leaf = tensor(x, requires_grad=True)
    want = leaf + torch.tanh(leaf @ tensor(w))
    want.backward(tensor(dout))
    limit = EXACT if dtype == np.float64 else 1e-5
    agree(out, want.detach().numpy(), limit)
    agree(dx, leaf.grad.numpy(), limit)


def test_residual_backward_equals_finite_differences():
    rng = np.random.default_rng(3)
    x, dout = rng.normal(size=(2, 3, 4))
    want = numerical_vjp(lambda x: residual_forward(x, np.sin), x, dout)
    agree(residual_backward(dout, lambda d: d * np.cos(x)), want, 1e-8)


def test_a_sublayer_that_is_0_leaves_its_input_and_its_gradient():
    x = np.random.default_rng(5).normal(size=(2, 3))
    assert np.array_equal(residual_forward(x, np.zeros_like), x)
    assert np.array_equal(residual_backward(x, np.zeros_like), x)
    assert not np.shares_memory(residual_backward(x, np.zeros_like), x)


def test_the_sublayer_is_called_once():
    calls = []

    def sublayer(x):
        calls.append(x)
        return 2 * x

    residual_forward(np.ones(3), sublayer)
    assert len(calls) == 1
    residual_backward(np.ones(3), sublayer)
    assert len(calls) == 2


# --- dropout --------------------------------------------------------------------------------------


@given(rng=generators(), rate=st.sampled_from([0.0, 0.1, 0.5, 0.9]), dtype=DTYPES)
def test_dropout_equals_torch_with_the_same_mask(rng, rate, dtype):
    x, dout = rng.normal(size=(2, 3, 4, 5)).astype(dtype)
    keep = dropout_keep(rng, x.shape, rate)
    leaf = tensor(x, requires_grad=True)
    want = leaf * tensor(keep) / (1 - rate)
    want.backward(tensor(dout))
    out, dx = dropout_forward(x, keep, rate), dropout_backward(dout, keep, rate)
    assert out.dtype == dx.dtype == dtype
    agree(out, want.detach().numpy(), 1e-6)
    agree(dx, leaf.grad.numpy(), 1e-6)


def test_dropout_backward_equals_finite_differences():
    rng = np.random.default_rng(2)
    x, dout = rng.normal(size=(2, 4, 3))
    keep = dropout_keep(rng, (4, 1), 0.4)
    want = numerical_vjp(lambda x: dropout_forward(x, keep, 0.4), x, dout)
    agree(dropout_backward(dout, keep, 0.4), want, 1e-8)


def test_the_mean_over_masks_is_the_input():
    rng = np.random.default_rng(9)
    x = rng.normal(size=6)
    mean = np.mean([dropout_forward(x, dropout_keep(rng, (6,), 0.3), 0.3) for _ in range(4000)], 0)
    # Standard error of a mean of 4000: |x| √(0.3/0.7) / √4000, about 1 % of |x|.
    assert (np.abs(mean - x) <= 5 * np.abs(x) * (0.3 / 0.7 / 4000) ** 0.5).all()


def test_what_is_dropped_may_be_anything():
    x = np.array([np.nan, INF, 2.0])
    keep = np.array([False, False, True])
    assert dropout_forward(x, keep, 0.5).tolist() == [0, 0, 4]
    assert dropout_backward(x, keep, 0.5).tolist() == [0, 0, 4]


# --- inputs and errors ---------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)
    dy, x = rng.normal(size=(2, 2, 3, 4)).astype(dtype)
    gamma, beta = rng.normal(size=(2, 4)).astype(dtype)
    keep = rng.random(x.shape) < 0.5
    return {
        layernorm_statistics: (x,),
        layernorm_forward: (x, gamma, beta),
        layernorm_backward: (dy, x, gamma),
        rmsnorm_forward: (x, gamma),
        rmsnorm_backward: (dy, x, gamma),
        residual_forward: (x, np.zeros_like),
        residual_backward: (dy, np.zeros_like),
        dropout_forward: (x, keep, 0.0),
        dropout_backward: (dy, keep, 0.0),
    }


def parts(out):
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("function", calls())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_may_be_read_only_and_are_never_returned(function, dtype):
    arguments = calls(dtype)[function]
    arrays = [a for a in arguments if isinstance(a, np.ndarray)]
    kept = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    for result in parts(function(*arguments)):
        assert result.dtype == dtype
        assert not any(np.shares_memory(result, a) for a in arrays)
    for a, before in zip(arrays, kept, strict=True):
        np.testing.assert_array_equal(a, before)


def test_the_gradient_of_a_single_row_is_no_view_of_dy():
    dy, x = np.random.default_rng(1).normal(size=(2, 4))
    for grads in (layernorm_backward(dy, x, np.ones(4)), rmsnorm_backward(dy, x, np.ones(4))):
        assert not any(np.shares_memory(g, dy) for g in grads)


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    with np.errstate(all="raise"):
        loud = function(*arguments)
        assert np.geterr()["over"] == "raise", "the caller's settings come back"
    np.testing.assert_equal(loud, quiet)


@pytest.mark.parametrize("function", [layernorm_forward, layernorm_backward, rmsnorm_backward])
def test_integers_become_float64(function):
    arguments = [(4 * a).astype(int) for a in calls()[function]]
    for got, want in zip(
        parts(function(*arguments)),
        parts(function(*(a.astype(float) for a in arguments))),
        strict=True,
    ):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)


X, G = np.zeros((2, 3)), np.ones(3)
BAD = [
    (
        layernorm_forward,
        (X, np.ones(2), np.ones(2)),
        r"gamma: expected shape \(3,\), that of the l",
    ),
    (
        layernorm_forward,
        (X, np.ones((2, 2)), G),
        r"gamma: .*\(2, 3\), that of the last 2 axes of x",
    ),
    (layernorm_forward, (X, np.ones((1, 2, 3)), G), r"gamma: .*trailing axes of x \(2, 3\); got"),
    (layernorm_forward, (X, np.array(1.0), G), r"gamma: .*trailing axes of x \(2, 3\); got \(\)"),
    (layernorm_forward, (X, G, np.ones(2)), r"beta: expected shape \(3,\) to match gamma; got \(2"),
    (layernorm_forward, (X, G, 1j * G), "beta: expected real numbers; got dtype complex128"),
    (
        layernorm_forward,
        (X, G, G, -1e-5),
        "eps: expected a finite number of at least 0; got -1e-05",
    ),
    (layernorm_forward, (X, G, G, np.nan), "eps: expected a finite number of at least 0; got nan"),
    (layernorm_forward, (X, G, G, INF), "eps: expected a finite number of at least 0; got inf"),
    (layernorm_backward, (X[:1], X, G), r"dy: expected shape \(2, 3\) to match x; got \(1, 3\)"),
    (layernorm_backward, (X, X, np.ones(4)), r"gamma: expected shape \(3,\).*got \(4,\)"),
    (layernorm_backward, (X, X, G, -1.0), "eps: .*got -1.0"),
    (layernorm_statistics, (X, 3), r"x: expected at least 3 axes; got shape \(2, 3\)"),
    (layernorm_statistics, (np.array(1.0),), r"x: expected at least 1 axis; got shape \(\)"),
    (layernorm_statistics, (X, 0), "n_axes: expected at least 1; got 0"),
    (layernorm_statistics, (X, 1.5), "n_axes: expected an integer; got 1.5"),
    (layernorm_statistics, (X, 1, -1.0), "eps: .*got -1.0"),
    (rmsnorm_forward, (X, np.ones(2)), r"gamma: expected shape \(3,\)"),
    (rmsnorm_forward, (X, G, -1.0), "eps: .*got -1.0"),
    (rmsnorm_backward, (X[0], X, G), r"dy: expected shape \(2, 3\) to match x; got \(3,\)"),
    (rmsnorm_backward, (X, X, np.ones(2)), r"gamma: expected shape \(3,\)"),
    (residual_forward, (X, lambda x: x[0]), r"sublayer\(x\): .*\(2, 3\) to match x; got \(3,\)"),
    (residual_backward, (X, lambda d: d[:, :1]), r"sublayer_backward\(dout\): .*got \(2, 1\)"),
    (residual_backward, (X, lambda d: None), r"sublayer_backward\(dout\): expected real numbers"),
    (dropout_forward, (X, np.ones((2, 3)), 0.5), "keep: expected booleans; got dtype float64"),
    (dropout_forward, (X, np.ones(2, bool), 0.5), r"keep: .*broadcasts to \(2, 3\); got \(2,\)"),
    (dropout_forward, (X, np.ones(3, bool), 1.0), r"rate: expected a number in \[0, 1\); got 1.0"),
    (dropout_backward, (X, np.ones(3, bool), -0.1), "rate: .*got -0.1"),
    (dropout_backward, (X, np.ones(3, bool), np.nan), "rate: .*got nan"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        layernorm_backward(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros(3))
    with pytest.raises(jaxtyping.TypeCheckError):
        layernorm_forward(np.zeros((2, 3)), np.zeros(3), np.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        dropout_forward(np.zeros((2, 3)), np.ones(2, bool), 0.5)


def test_every_function_states_equation_shapes_and_errors():
    assert set(FUNCTIONS) == set(calls())
    public = {n for n, f in vars(library).items() if inspect.isfunction(f) and n[0] != "_"}
    assert {f.__name__ for f in FUNCTIONS} <= public
    for function in FUNCTIONS:
        doc = inspect.getdoc(function)
        assert ".. math::" in doc
        assert "Shapes:" in doc
        assert "ValueError:" in doc
        hints = typing.get_type_hints(function)
        assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_the_gradient_of_a_sum_is_zero_through_layernorm():
    """Why checks draw dy at random: with dy = 1 and gamma = 1, zeros would be the right answer."""
    x = np.random.default_rng(8).normal(size=(3, 5))
    dx, _, _ = layernorm_backward(np.ones((3, 5)), x, np.ones(5))
    assert np.abs(dx).max() <= 1e-14
    total = numerical_gradient(lambda x: layernorm_forward(x, np.ones(5), np.zeros(5)).sum(), x)
    assert np.abs(total).max() <= 1e-9
