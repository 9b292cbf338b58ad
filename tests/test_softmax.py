"""Softmax and its kin against torch, scipy, mpmath and finite differences."""

import inspect
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
from hypothesis.extra import numpy as hnp
from strategies import generators, logits, shapes, strided, with_axis

from attn_lessons import softmax as library
from attn_lessons._arrays import unbroadcast
from attn_lessons.gradcheck import complex_step_gradient, numerical_gradient, numerical_vjp
from attn_lessons.softmax import (
    cross_entropy,
    log_softmax,
    log_softmax_backward,
    logsumexp,
    logsumexp_backward,
    softmax,
    softmax_backward,
    softmax_jacobian,
)

EXACT = 1e-10
INF = np.inf
ALONG_AN_AXIS = [softmax, log_softmax, logsumexp]
FORWARD = {
    softmax: (torch.softmax, scipy.special.softmax),
    log_softmax: (torch.log_softmax, scipy.special.log_softmax),
    logsumexp: (torch.logsumexp, scipy.special.logsumexp),
}


def agree(got, want, rtol=EXACT):
    """Same infinities, and an error of at most ``rtol`` of the largest entry wanted."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True)
    scale = np.abs(want[finite]).max(initial=0)
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def alive(z, axis):
    """Rows with a finite entry, in the shape of ``z``: torch knows no empty rows."""
    return np.broadcast_to(np.isfinite(z).any(axis, keepdims=True), z.shape)


def torch_vjp(function, z, axis, upstream):
    leaf = tensor(z, requires_grad=True)
    function(leaf, axis).backward(tensor(upstream))
    return leaf.grad.numpy()


# --- forward --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ALONG_AN_AXIS)
@given(drawn=with_axis(logits(dtype=np.float64)))
def test_forward_equals_torch(function, drawn):
    z, axis = drawn
    rows = alive(z, axis)
    got, want = function(z, axis), FORWARD[function][0](tensor(z), axis).numpy()
    if function is logsumexp:
        agree(got, want)
    else:
        agree(got[rows], want[rows])
        assert (got[~rows] == (0 if function is softmax else -INF)).all()


@pytest.mark.parametrize("function", ALONG_AN_AXIS)
@given(drawn=with_axis(logits(dtype=np.float64, masked=False)))
def test_forward_equals_scipy(function, drawn):
    z, axis = drawn
    agree(function(z, axis), FORWARD[function][1](z, axis=axis))


@given(rng=generators(), scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]))
def test_forward_equals_fifty_digits(rng, scale):
    z = rng.normal(size=5) * scale
    with mpmath.workdps(50):
        exact = [mpmath.mpf(float(v)) for v in z]
        total = mpmath.fsum(mpmath.exp(v) for v in exact)
        want = [float(mpmath.exp(v) / total) for v in exact]
        want_log = [float(v - mpmath.log(total)) for v in exact]
        want_lse = float(mpmath.log(total))
    # exp(z - m) inherits the rounding of z - m: up to half a unit in its last place.
    np.testing.assert_allclose(softmax(z), want, rtol=1e-15 + 2e-16 * np.ptp(z))
    np.testing.assert_allclose(log_softmax(z), want_log, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(logsumexp(z), want_lse, rtol=1e-14)


@given(drawn=with_axis(logits(scales=(1.0, 1e4, 1e30))))
def test_softmax_is_a_distribution_on_every_row_with_a_finite_entry(drawn):
    z, axis = drawn
    p = softmax(z, axis)
    assert ((p >= 0) & (p <= 1)).all()
    rows = np.isfinite(z).any(axis)
    np.testing.assert_allclose(p.sum(axis), rows, rtol=1e-6)
    assert (p[z == -INF] == 0).all()


@given(drawn=with_axis(logits(dtype=np.float64)), shift=st.sampled_from([-1e3, 0.5, 1e3]))
def test_a_shift_of_all_logits_changes_only_logsumexp(drawn, shift):
    z, axis = drawn
    np.testing.assert_allclose(softmax(z + shift, axis), softmax(z, axis), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(logsumexp(z + shift, axis), logsumexp(z, axis) + shift, atol=1e-10)


@given(drawn=with_axis(logits()), seed=st.integers(0, 99))
def test_order_of_the_logits_does_not_matter(drawn, seed):
    z, axis = drawn
    order = np.random.default_rng(seed).permutation(z.shape[axis])
    got, want = softmax(z.take(order, axis), axis), softmax(z, axis).take(order, axis)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("function", ALONG_AN_AXIS)
@given(drawn=with_axis(logits()), data=st.data())
def test_memory_layout_and_dtype_do_not_matter(function, drawn, data):
    z, axis = drawn
    plain = function(np.ascontiguousarray(z), axis)
    other = function(data.draw(strided(np.ascontiguousarray(z))), axis)
    assert plain.dtype == other.dtype == z.dtype
    np.testing.assert_allclose(other, plain, rtol=1e-5 if z.dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("size", [1e4, 1e17, 1e300, 1e308, np.finfo(float).max])
def test_huge_logits(function, size):
    z = np.array([[size, -size, 0.0], [size, size, -size], [-size, -size, -size]])
    got = function(z)
    want = {
        softmax: [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3] * 3],
        log_softmax: [
            [0, -2 * size if size < 1e308 else -INF, -size],
            [-np.log(2), -np.log(2), -2 * size - np.log(2) if size < 1e308 else -INF],
            [-np.log(3)] * 3,
        ],
    }[function]
    if size == 1e17:
        # log 2 is far below the spacing of floats at 1e17, and must survive beside it.
        np.testing.assert_allclose(got[:, 0], np.array(want)[:, 0], rtol=1e-15)
    np.testing.assert_allclose(got, want, rtol=1e-15)


def test_logsumexp_of_huge_logits():
    for size in (1e4, 1e308):
        np.testing.assert_allclose(logsumexp(np.array([size, size])), size + np.log(2))
        np.testing.assert_allclose(logsumexp(np.array([-size, -size])), np.log(2) - size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_nothing_but_minus_infinity(dtype):
    z = np.array([[-INF, -INF], [1, -INF]], dtype)
    assert softmax(z).tolist() == [[0, 0], [1, 0]]
    assert log_softmax(z).tolist() == [[-INF, -INF], [0, -INF]]
    assert logsumexp(z).tolist() == [-INF, 1]


def test_nan_and_plus_infinity_stay_in_their_row():
    z = np.array([[np.nan, 0.0], [INF, 0.0], [INF, INF], [1.0, 1.0]])
    assert np.isnan(softmax(z)[:3]).all()
    assert np.isnan(log_softmax(z)[:3]).all()
    assert softmax(z)[3].tolist() == [0.5, 0.5]
    assert np.isnan(torch.softmax(tensor(z), -1).numpy()[:3]).all(), "torch does the same"
    np.testing.assert_array_equal(logsumexp(z), [np.nan, INF, INF, 1 + np.log(2)])
    np.testing.assert_array_equal(logsumexp(z), torch.logsumexp(tensor(z), -1).numpy())


@pytest.mark.parametrize("function", ALONG_AN_AXIS)
def test_axes_of_length_zero_and_one(function):
    empty = function(np.zeros((3, 0)))
    assert empty.shape == ((3,) if function is logsumexp else (3, 0))
    assert function is not logsumexp or (empty == -INF).all()
    assert function(np.zeros((0, 4))).shape == ((0,) if function is logsumexp else (0, 4))
    single = function(np.array([[5.0], [-1e308]]))
    want = {softmax: [[1], [1]], log_softmax: [[0], [0]], logsumexp: [5, -1e308]}[function]
    assert single.tolist() == want


def test_logsumexp_keeps_its_axis_when_asked():
    z = np.arange(24.0).reshape(2, 3, 4)
    kept = logsumexp(z, 1, keepdims=True)
    assert kept.shape == (2, 1, 4)
    np.testing.assert_array_equal(kept.squeeze(1), logsumexp(z, 1))


@pytest.mark.parametrize("function", ALONG_AN_AXIS)
def test_integers_become_float64(function):
    whole = np.array([[0, 1, 2], [1000, -1000, 0]])
    got = function(whole)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, function(whole.astype(float)))


# --- backward -------------------------------------------------------------------------------


@given(drawn=with_axis(logits(dtype=np.float64)), rng=generators())
def test_softmax_backward_equals_torch(drawn, rng):
    z, axis = drawn
    dp, rows = rng.normal(size=z.shape), alive(z, axis)
    got = softmax_backward(dp, softmax(z, axis), axis)
    agree(got[rows], torch_vjp(torch.softmax, z, axis, dp)[rows])
    assert (got[~rows] == 0).all()
    assert (got[z == -INF] == 0).all()
    np.testing.assert_allclose(got.sum(axis), 0, atol=1e-14 * z.shape[axis])


@given(drawn=with_axis(logits(dtype=np.float64)), rng=generators())
def test_log_softmax_backward_equals_torch(drawn, rng):
    z, axis = drawn
    dlogp, rows = rng.normal(size=z.shape), alive(z, axis)
    got = log_softmax_backward(dlogp, log_softmax(z, axis), axis)
    agree(got[rows], torch_vjp(torch.log_softmax, z, axis, dlogp)[rows])
    assert (got[~rows] == 0).all()


@given(drawn=with_axis(logits(dtype=np.float64)), rng=generators(), keepdims=st.booleans())
def test_logsumexp_backward_equals_torch(drawn, rng, keepdims):
    z, axis = drawn
    dlse = rng.normal(size=logsumexp(z, axis, keepdims=keepdims).shape)
    got, rows = logsumexp_backward(dlse, z, axis), alive(z, axis)
    upstream = dlse.squeeze(axis) if keepdims else dlse
    agree(got[rows], torch_vjp(torch.logsumexp, z, axis, upstream)[rows])
    assert (got[~rows] == 0).all()


@given(z=logits(shape=shapes(1, 1, max_side=8), dtype=np.float64), rng=generators())
def test_jacobian_equals_torch_and_gives_the_vector_product(z, rng):
    p = softmax(z)
    jacobian = softmax_jacobian(p)
    if np.isfinite(z).any():
        want = torch.autograd.functional.jacobian(lambda t: torch.softmax(t, -1), tensor(z))
        agree(jacobian, want.numpy())
    dp = rng.normal(size=p.shape)
    np.testing.assert_allclose(softmax_backward(dp, p), jacobian @ dp, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(jacobian, jacobian.T)
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-15)


SMALL = logits(shape=shapes(1, 3, max_side=3), dtype=np.float64, scales=(1.0, 5.0))


@settings(max_examples=15)
@given(drawn=with_axis(SMALL), rng=generators())
def test_backward_equals_finite_differences(drawn, rng):
    z, axis = drawn
    rows, dp = alive(z, axis), rng.normal(size=z.shape)
    got = softmax_backward(dp, softmax(z, axis), axis)
    agree(got, numerical_vjp(lambda z: softmax(z, axis), z, dp), 1e-8)
    # log_softmax's own -inf entries have no finite value to difference.
    kept = np.where(z == -INF, 0.0, dp)

    def finite_log_softmax(z):
        logp = log_softmax(z, axis)
        return np.where(np.isneginf(logp), 0, logp)

    got = log_softmax_backward(kept, log_softmax(z, axis), axis)
    agree(got[rows], numerical_vjp(finite_log_softmax, z, kept)[rows], 1e-8)


@pytest.mark.parametrize("size", [1e4, 1e308])
def test_gradients_of_huge_logits_are_torchs_and_finite(size):
    rng = np.random.default_rng(4)
    z = rng.choice([-size, 0, size, size * (1 - 1e-4)], size=(50, 4))
    z[rng.random(z.shape) < 0.2] = -INF
    z[:, 0] = np.where(np.isfinite(z).any(1), z[:, 0], 0)
    d, targets = rng.normal(size=z.shape), rng.integers(0, 4, 50)
    agree(softmax_backward(d, softmax(z)), torch_vjp(torch.softmax, z, -1, d))
    agree(log_softmax_backward(d, log_softmax(z)), torch_vjp(torch.log_softmax, z, -1, d))
    assert np.isfinite(cross_entropy(z, targets, 0.1)[1]).all()
    agree(cross_entropy(z, targets)[1], torch_cross_entropy(z, targets)[1])


@given(drawn=with_axis(logits()), rng=generators())
def test_backward_keeps_float32(drawn, rng):
    z, axis = drawn
    upstream = rng.normal(size=z.shape).astype(z.dtype)
    assert softmax_backward(upstream, softmax(z, axis), axis).dtype == z.dtype
    assert log_softmax_backward(upstream, log_softmax(z, axis), axis).dtype == z.dtype
    lse = logsumexp(z, axis)
    assert logsumexp_backward(lse, z, axis).dtype == z.dtype


def test_float32_gradients_are_within_three_times_torchs_error():
    rng = np.random.default_rng(5)
    z, dp = rng.normal(size=(2, 400, 30)).astype(np.float32) * 4
    exact = softmax_backward(dp.astype(float), softmax(z.astype(float)))
    ours = np.abs(softmax_backward(dp, softmax(z)) - exact).max()
    theirs = np.abs(torch_vjp(torch.softmax, z, -1, dp) - exact).max()
    assert ours <= 3 * theirs


# --- cross-entropy ---------------------------------------------------------------------------


def torch_cross_entropy(logits, targets, smoothing=0.0, **options):
    leaf = tensor(logits, requires_grad=True)
    loss = F.cross_entropy(leaf, tensor(targets), label_smoothing=smoothing, **options)
    loss.backward()
    return loss.item(), leaf.grad.numpy()


@st.composite
def batches(draw, side=7, **options):
    z = draw(logits(shape=shapes(2, 2, max_side=side), dtype=np.float64, **options))
    return z, draw(generators()).integers(0, z.shape[1], len(z))


SMOOTHINGS = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@given(batch=batches(masked=False), smoothing=SMOOTHINGS)
def test_cross_entropy_equals_torch(batch, smoothing):
    loss, dlogits = cross_entropy(*batch, smoothing)
    want, dwant = torch_cross_entropy(*batch, smoothing)
    agree(loss, want)
    agree(dlogits, dwant)
    np.testing.assert_allclose(dlogits.sum(axis=1), 0, atol=1e-15)


@settings(max_examples=15)
@given(batch=batches(side=4, masked=False, scales=(1.0,)), smoothing=SMOOTHINGS)
def test_cross_entropy_gradient_equals_finite_differences(batch, smoothing):
    z, targets = batch
    want = numerical_gradient(lambda z: cross_entropy(z, targets, smoothing)[0], z)
    agree(cross_entropy(z, targets, smoothing)[1], want, 1e-8)


@given(batch=batches(), smoothing=SMOOTHINGS)
def test_masked_classes_cost_infinity_where_they_carry_weight_and_nothing_elsewhere(
    batch, smoothing
):
    z, targets = batch
    loss, dlogits = cross_entropy(z, targets, smoothing)
    rows = np.isfinite(z).any(axis=1)
    weight = (np.arange(z.shape[1]) == targets[:, None]) * (1 - smoothing) + smoothing / z.shape[1]
    assert np.isinf(loss) == ((z == -INF) & (weight > 0)).any()
    assert np.isfinite(dlogits).all()
    assert (dlogits[~rows] == 0).all()
    want = (softmax(z) - weight) / len(z)
    np.testing.assert_allclose(dlogits[rows], want[rows], atol=1e-15)


def test_gradient_at_a_masked_target_is_torchs():
    z, targets = np.array([[1.0, -INF, 0.5], [0.0, 1.0, 2.0]]), np.array([1, 2])
    loss, dlogits = cross_entropy(z, targets)
    want, dwant = torch_cross_entropy(z, targets)
    assert loss == want == INF
    agree(dlogits, dwant)
    assert np.isfinite(dlogits).all()


@given(batch=batches(masked=False), smoothing=SMOOTHINGS, rng=generators())
def test_ignored_rows_equal_torch(batch, smoothing, rng):
    z, targets = batch
    ignored = rng.random(len(z)) < 0.4
    targets = np.where(ignored, -100, targets)
    loss, dlogits = cross_entropy(z, targets, smoothing, ignore_index=-100)
    if ignored.all():
        assert loss == 0
    else:
        want, dwant = torch_cross_entropy(z, targets, smoothing, ignore_index=-100)
        agree(loss, want)
        agree(dlogits, dwant)
    assert (dlogits[ignored] == 0).all()


def test_nothing_to_count_costs_nothing():
    z = np.array([[np.nan, 1.0], [2.0, 3.0]])
    for rows, targets in ((z, np.array([-1, -1])), (z[:0], np.array([], int))):
        loss, dlogits = cross_entropy(rows, targets, 0.1, ignore_index=-1)
        assert loss == 0
        assert np.array_equal(dlogits, np.zeros_like(rows))
    assert np.isnan(torch_cross_entropy(z, np.array([-1, -1]), ignore_index=-1)[0]), "torch: NaN"


def test_an_ignored_row_may_hold_anything():
    z = np.array([[np.nan, INF, -INF], [2.0, 3.0, 1.0]])
    loss, dlogits = cross_entropy(z, np.array([9, 1]), ignore_index=9)
    alone, dalone = cross_entropy(z[1:], np.array([1]))
    assert loss == alone
    np.testing.assert_array_equal(dlogits, np.vstack([np.zeros(3), dalone]))


def test_ignore_index_may_be_a_class():
    z, targets = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 2, 0])
    loss, dlogits = cross_entropy(z, targets, 0.2, ignore_index=0)
    want, dwant = torch_cross_entropy(z, targets, 0.2, ignore_index=0)
    agree(loss, want)
    agree(dlogits, dwant)


def test_nan_stays_in_its_row_of_the_gradient():
    z = np.array([[np.nan, 0.0], [1.0, 2.0]])
    loss, dlogits = cross_entropy(z, np.array([0, 1]))
    assert np.isnan(loss)
    assert np.isnan(dlogits[0]).all()
    assert np.isfinite(dlogits[1]).all()


def test_one_class_costs_nothing():
    for smoothing in (0.0, 0.3):
        loss, dlogits = cross_entropy(np.array([[3.0], [-1e308]]), np.array([0, 0]), smoothing)
        assert loss == 0
        assert dlogits.tolist() == [[0], [0]]


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_targets_of_every_integer_dtype(kind):
    z, targets = np.random.default_rng(0).normal(size=(3, 4)), np.array([3, 0, 2])
    loss, dlogits = cross_entropy(z, targets.astype(kind))
    assert loss == cross_entropy(z, targets)[0]
    assert dlogits.dtype == np.float64


def test_cross_entropy_keeps_float32():
    loss, dlogits = cross_entropy(np.zeros((2, 3), np.float32), np.array([0, 1]), 0.1)
    assert loss.dtype == dlogits.dtype == np.float32


# --- inputs and errors --------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)
    z, d = rng.normal(size=(2, 3, 4)).astype(dtype)
    z[0, 1] = -INF
    return {
        softmax: (z,),
        log_softmax: (z,),
        logsumexp: (z,),
        softmax_jacobian: (softmax(z[1]),),
        softmax_backward: (d, softmax(z)),
        log_softmax_backward: (d, log_softmax(z)),
        logsumexp_backward: (d[:, 0], z),
        cross_entropy: (z, np.array([0, 1, 2])),
    }


@pytest.mark.parametrize("function", calls())
def test_inputs_may_be_read_only_and_are_never_returned(function):
    arguments = calls()[function]
    for a in arguments:
        a.flags.writeable = False
    out = function(*arguments)
    for result in out if isinstance(out, tuple) else (out,):
        assert not any(np.shares_memory(result, a) for a in arguments)


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    with np.errstate(all="raise"):
        loud = function(*arguments)
        assert np.geterr()["over"] == "raise", "the caller's settings come back"
    np.testing.assert_equal(loud, quiet)


BAD = [
    (softmax, (np.zeros((2, 3)), 2), r"axis: expected -2 … 1 for z of shape \(2, 3\); got 2"),
    (log_softmax, (np.zeros((2, 3)), -3), r"axis: expected -2 … 1 .* got -3"),
    (logsumexp, (np.zeros(3), 1), r"axis: expected -1 … 0 for z of shape \(3,\); got 1"),
    (softmax, (np.zeros(3), (0,)), r"axis: expected one integer; got \(0,\)"),
    (softmax, (np.zeros(3), None), "axis: expected one integer; got None"),
    (softmax, (np.array(1.0),), "z: expected at least one axis; got a scalar"),
    (softmax, (np.zeros(3, complex),), "z: expected real numbers; got dtype complex128"),
    (logsumexp, (np.array(["a"]),), "z: expected real numbers; got dtype <U1"),
    (softmax_jacobian, (np.zeros((2, 2)),), r"p: expected shape \(N,\); got \(2, 2\)"),
    (softmax_backward, (np.zeros((3, 2)), np.zeros((2, 3))), r"dp: expected shape \(2, 3\) to"),
    (softmax_backward, (np.zeros(3), np.zeros((2, 3))), r"dp: .* to match p; got \(3,\)"),
    (log_softmax_backward, (np.zeros(3), np.zeros(4)), r"dlogp: .*\(4,\) to match logp; got"),
    (log_softmax_backward, (np.zeros(3), np.zeros(3), 1), "axis: .* for logp of shape"),
    (logsumexp_backward, (np.zeros(3), np.zeros((2, 3))), r"dlse: .*\(2,\) or \(2, 1\), .*\(3,\)"),
    (cross_entropy, (np.zeros(3), np.zeros(3, int)), r"logits: expected shape \(B, K\); got"),
    (cross_entropy, (np.zeros((2, 3)), np.zeros(3, int)), r"targets: expected shape \(2,\)"),
    (cross_entropy, (np.zeros((2, 3)), np.zeros((2, 3), int)), r"targets: .*got \(2, 3\)"),
    (cross_entropy, (np.zeros((2, 3)), np.zeros(2)), "targets: expected integer .*float64"),
    (cross_entropy, (np.zeros((2, 3)), np.zeros(2, bool)), "targets: expected integer .*bool"),
    (cross_entropy, (np.zeros((2, 3)), np.array([0, 3])), "targets: .*0 … 2.* got 3 at row 1"),
    (cross_entropy, (np.zeros((2, 3)), np.array([-1, 0])), "targets: .* got -1 at row 0"),
    (cross_entropy, (np.zeros((2, 3)), np.array([0, 1]), 1.5), "label_smoothing: .*got 1.5"),
    (cross_entropy, (np.zeros((2, 3)), np.array([0, 1]), -0.1), "label_smoothing: .*got -0.1"),
    (cross_entropy, (np.zeros((2, 3)), np.array([0, 1]), np.nan), "label_smoothing: .*got nan"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        softmax_backward(np.zeros(3), np.zeros(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        cross_entropy(np.zeros((2, 3)), np.zeros(3, int))


def test_every_function_states_equation_shapes_and_errors():
    for function in calls():
        doc = inspect.getdoc(function)
        assert ".. math::" in doc
        assert "Shapes:" in doc
        assert "ValueError:" in doc
        hints = typing.get_type_hints(function)
        assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_the_source_fits_on_a_page():
    lines = inspect.getsource(library).splitlines()
    assert max(map(len, lines)) <= 100


@given(
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), rng=generators()
)
def test_unbroadcast_is_the_gradient_of_broadcasting(shapes, rng):
    shape, result = shapes.input_shapes[0], shapes.result_shape
    dout = rng.normal(size=result)
    leaf = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    leaf.broadcast_to(result).backward(tensor(dout))
    agree(unbroadcast(dout, shape), leaf.grad.numpy(), 1e-13)


def test_unbroadcast_names_a_shape_that_does_not_fit():
    for shape in ((2,), (1, 2, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"shape: expected one that broadcasts to \(2, 3\)"):
            unbroadcast(np.zeros((2, 3)), shape)


def test_complex_step_agrees_on_a_plain_log_softmax():
    """A third road to the same numbers: no autograd, no subtraction."""
    rng = np.random.default_rng(8)
    z, d = rng.normal(size=(2, 3, 4))

    def weighted(z):
        return (d * (z - np.log(np.exp(z).sum(-1, keepdims=True)))).sum()

    agree(log_softmax_backward(d, log_softmax(z)), complex_step_gradient(weighted, z), 1e-13)
