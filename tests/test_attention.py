"""Attention against torch, finite differences and loops; and what public kernels got wrong."""

import inspect
import math
import typing

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import attention_inputs, attention_shapes, generators, masks, strided

from attn_lessons import attention as library
from attn_lessons._arrays import as_bool, as_count, check_broadcasts, check_shape, weighted_sum
from attn_lessons.attention import (
    attention_backward,
    attention_backward_dropout,
    attention_forward,
    attention_logits,
    causal_mask,
    dropout_keep,
    padding_mask,
)
from attn_lessons.gradcheck import numerical_gradient

EXACT = 1e-10
INF, NAN = np.inf, np.nan


def agree(got, want, rtol=EXACT, what=""):
    """Same infinities, and an error of at most ``rtol`` of the largest entry wanted."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), what
    scale = np.abs(want[finite]).max(initial=0)
    error = np.abs(got[finite] - want[finite]).max(initial=0)
    # Gradients that cancel to 0 leave the rounding of their terms.
    assert error <= rtol * scale + 1e-15, f"{what} off by {error:.3g} of {scale:.3g}"


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def whole(mask, shape):
    return np.broadcast_to(True if mask is None else mask, shape)


def torch_attention(q, k, v, bias, case):
    """The definition in torch's own operations; rows without a key are cut out of the graph."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias
    mask = tensor(whole(case["mask"], logits.shape))
    alive = mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~mask & alive, -INF)
    probs = torch.softmax(logits, -1) * alive
    keep = 1 if case["keep"] is None else tensor(case["keep"] / (1 - case["rate"]))
    lse = torch.where(alive[..., 0], torch.logsumexp(logits, -1), 0)
    return (probs * keep) @ v, probs, lse, alive[..., 0].numpy()


NAMES = ("q", "k", "v", "bias")


def by_torch(case):
    """out, probs, lse and the gradients by q, k, v and bias, from autograd."""
    leaves = [case[n] if case[n] is None else tensor(case[n], requires_grad=True) for n in NAMES]
    out, probs, lse, alive = torch_attention(*leaves, case)
    loss = (out * tensor(case["dout"])).sum()
    if case["dlse"] is not None:
        loss = loss + (lse * tensor(case["dlse"])).sum()
    loss.backward()
    grads = [x.grad.numpy() for x in leaves if x is not None]
    lse = np.where(alive, lse.detach().numpy(), -INF)
    return [out.detach().numpy(), probs.detach().numpy(), lse, *grads]


def by_hand(case):
    options = {n: case[n] for n in ("bias", "keep", "rate")}
    out, probs, lse = attention_forward(
        case["q"], case["k"], case["v"], case["mask"], **options, return_lse=True
    )
    arrays = (case["dout"], case["q"], case["k"], case["v"], probs)
    return [out, probs, lse, *attention_backward(*arrays, dlse=case["dlse"], **options)]


RETURNED = ("out", "probs", "lse", "dq", "dk", "dv", "dbias")


# --- against torch ------------------------------------------------------------------------------


@given(case=attention_inputs())
def test_forward_and_backward_equal_autograd(case):
    got, want = by_hand(case), by_torch(case)
    for name, a, b in zip(RETURNED, got, want, strict=False):
        # A gradient through many scores cancels: errors are those of its terms.
        scale = np.abs(b).max(initial=0, where=np.isfinite(b))
        agree(a, b, EXACT + 1e-14 / (scale or 1), name)
    assert len(got) == len(want) == 6 + (case["bias"] is not None)


@given(case=attention_inputs())
def test_forward_and_backward_equal_torchs_own_kernel(case):
    q, k, v = (tensor(case[n], requires_grad=True) for n in "qkv")
    shape = (*q.shape[:3], k.shape[2])
    mask = whole(case["mask"], shape)
    alive = mask.any(-1, keepdims=True)
    # Rows that see nothing are opened for torch, and taken out of its result.
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=tensor(mask | ~alive))
    (want * tensor(case["dout"] * alive)).sum().backward()
    out, probs = attention_forward(case["q"], case["k"], case["v"], case["mask"])
    agree(out, want.detach().numpy() * alive)
    grads = attention_backward(case["dout"], case["q"], case["k"], case["v"], probs)
    for name, got, leaf in zip("qkv", grads, (q, k, v), strict=True):
        scale = leaf.grad.abs().max().item() or 1
        agree(got, leaf.grad.numpy(), EXACT + 1e-14 / scale, name)


@pytest.mark.parametrize("n_q", [1, 4, 6])
def test_top_left_is_torchs_is_causal(n_q):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, n_q, 5)), *rng.normal(size=(2, 2, 3, 6, 5))
    want = F.scaled_dot_product_attention(tensor(q), tensor(k), tensor(v), is_causal=True)
    agree(attention_forward(q, k, v, causal_mask(n_q, 6, align="top-left"))[0], want.numpy())


def test_padding_is_the_opposite_of_torchs_key_padding_mask():
    rng = np.random.default_rng(1)
    module = torch.nn.MultiheadAttention(4, 1, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for weight in (module.in_proj_weight, module.out_proj.weight):
            weight.copy_(torch.eye(4, dtype=torch.float64).repeat(len(weight) // 4, 1))
    x, mask = rng.normal(size=(3, 5, 4)), padding_mask(np.array([5, 2, 1]), 5)
    want = module(*[tensor(x)] * 3, key_padding_mask=tensor(~mask[:, 0, 0]))[0]
    agree(attention_forward(*[x[:, None]] * 3, mask)[0][:, 0], want.detach().numpy())


# --- against differences and loops ------------------------------------------------------------


def loss_by(case, name):
    """The loss as a function of one of the arrays; rows without a key have no finite lse."""
    alive = whole(case["mask"], (*case["q"].shape[:3], case["k"].shape[2])).any(-1)
    dlse = 0 if case["dlse"] is None else case["dlse"]

    def loss(x):
        out, _, lse = by_hand(case | {name: x})[:3]
        return float((out * case["dout"]).sum() + (np.where(alive, lse, 0) * dlse).sum())

    return loss


@given(case=attention_inputs(scales=(0.3, 1.0)), rng=generators())
def test_gradients_equal_finite_differences_along_a_random_direction(case, rng):
    names = [n for n in NAMES if case[n] is not None]
    for name, grad in zip(names, by_hand(case)[3:], strict=True):
        x, v = np.array(case[name]), rng.normal(size=grad.shape)
        loss = loss_by(case, name)
        slope = numerical_gradient(lambda t, f=loss, x=x, v=v: f(x + t * v), np.array(0.0))
        predicted, size = (grad * v).sum(), np.abs(grad * v).sum()
        assert abs(slope - predicted) <= 1e-8 * size + 1e-9, name


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_gradients_equal_finite_differences_entry_by_entry(rate):
    rng = np.random.default_rng(20)
    case = sized(rng, B=1, H=2, Nq=3, Nk=4, d=2, d_v=1) | {"bias": rng.normal(size=(2, 1, 4))}
    case |= {"mask": causal_mask(3, 4) & ~np.eye(3, 4, dtype=bool)}
    case |= {"keep": rng.random((1, 2, 3, 4)) >= rate, "rate": rate}
    for name, got in zip(NAMES, by_hand(case)[3:], strict=True):
        want = numerical_gradient(loss_by(case, name), np.array(case[name]))
        agree(got, want, 1e-8, name)


@given(case=attention_inputs(most=6))
def test_every_row_is_a_weighted_mean_of_the_values_it_may_see(case):
    q, k, v = case["q"], case["k"], case["v"]
    out, probs = attention_forward(q, k, v, case["mask"])
    mask = whole(case["mask"], probs.shape)
    for b, h, i in np.ndindex(probs.shape[:3]):
        seen = [j for j in range(k.shape[2]) if mask[b, h, i, j]]
        scores = [math.fsum(q[b, h, i] * k[b, h, j]) / math.sqrt(q.shape[-1]) for j in seen]
        peak = max(scores, default=0.0)
        weights = [math.exp(s - peak) for s in scores]
        total = math.fsum(weights) or 1.0
        row = [
            math.fsum(w * v[b, h, j, c] for w, j in zip(weights, seen, strict=True)) / total
            for c in range(v.shape[-1])
        ]
        np.testing.assert_allclose(out[b, h, i], row, rtol=1e-12, atol=1e-13)
        assert (probs[b, h, i][~mask[b, h, i]] == 0).all()


@given(case=attention_inputs())
def test_rows_of_probabilities_sum_to_one_or_to_nothing(case):
    probs = attention_forward(case["q"], case["k"], case["v"], case["mask"], bias=case["bias"])[1]
    alive = whole(case["mask"], probs.shape).any(-1)
    np.testing.assert_allclose(probs.sum(-1), alive, rtol=1e-13)
    assert ((probs >= 0) & (probs <= 1)).all()


@given(case=attention_inputs())
def test_the_dropout_exercise_is_the_keyword(case):
    if case["keep"] is None:
        case |= {"keep": np.array(True)}
    probs = attention_forward(case["q"], case["k"], case["v"], case["mask"])[1]
    arrays = (case["dout"], case["q"], case["k"], case["v"], probs)
    got = attention_backward_dropout(*arrays, case["keep"], case["rate"])
    want = attention_backward(*arrays, keep=case["keep"], rate=case["rate"])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@given(case=attention_inputs(), seed=st.integers(0, 99))
def test_the_order_of_the_keys_does_not_matter(case, seed):
    case |= {"bias": None, "keep": None, "rate": 0.0}
    shape = (*case["q"].shape[:3], case["k"].shape[2])
    case |= {"mask": whole(case["mask"], shape)}
    order = np.random.default_rng(seed).permutation(shape[-1])
    moved = case | {n: case[n][:, :, order] for n in "kv"} | {"mask": case["mask"][..., order]}
    got, want = by_hand(moved), by_hand(case)
    # out, lse and dq know no order of the keys; dk and dv follow it.
    pairs = [(got[i], want[i]) for i in (0, 2, 3)]
    pairs += [(got[i], want[i][:, :, order]) for i in (4, 5)]
    for a, b in pairs:
        size = np.abs(b).max(initial=1, where=np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13 * size)


# --- layout, dtype, inputs --------------------------------------------------------------------


@given(case=attention_inputs(), data=st.data())
def test_memory_layout_does_not_matter(case, data):
    plain = {
        n: np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for n, x in case.items()
    }
    other = {n: data.draw(strided(x)) if isinstance(x, np.ndarray) else x for n, x in plain.items()}
    for name, a, b in zip(RETURNED, by_hand(other), by_hand(plain), strict=False):
        scale = np.abs(b).max(initial=0, where=np.isfinite(b))
        agree(a, b, 1e-12 + 1e-14 / (scale or 1), name)


@given(case=attention_inputs(dtype=np.float32))
def test_float32_stays_float32(case):
    if case["bias"] is not None:
        case |= {"bias": case["bias"].astype(np.float64)}  # as alibi_bias makes it
    case |= {"rate": np.float64(case["rate"])}
    assert {x.dtype for x in by_hand(case)} == {np.dtype(np.float32)}


def test_integers_become_float64():
    q = np.arange(24).reshape(1, 2, 3, 4)
    out, probs = attention_forward(q, q, q)
    grads = attention_backward(q, q, q, q, probs)
    whole_numbers = attention_forward(q.astype(float), q.astype(float), q.astype(float))[0]
    np.testing.assert_array_equal(out, whole_numbers)
    assert {x.dtype for x in (out, probs, *grads)} == {np.dtype(np.float64)}


@given(case=attention_inputs())
def test_inputs_may_be_read_only_and_are_never_returned(case):
    arrays = [x for x in case.values() if isinstance(x, np.ndarray)]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    for result in by_hand(case):
        assert not any(np.shares_memory(result, x) for x in arrays)
    for x, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, old)


def test_nothing_depends_on_the_callers_error_state():
    rng = np.random.default_rng(2)
    case = public_case(rng) | {"mask": causal_mask(4, 3)}
    case["k"][0, 0, 2] = INF
    case["k"][1] *= 1e200
    quiet = by_hand(case)
    with np.errstate(all="raise"):
        loud = by_hand(case)
    np.testing.assert_equal(loud, quiet)


# --- accuracy -----------------------------------------------------------------------------------


def adversarial(kind, rng):
    q, k, v, dout = rng.normal(size=(4, 2, 3, 24, 16))
    if kind == "logits of 80":
        # Each query meets each key at +80 or -80.
        direction = rng.normal(size=16)
        direction /= np.linalg.norm(direction)
        signs = rng.choice([-1.0, 1.0], size=(2, 2, 3, 24, 1))
        q, k = np.sqrt(80 * 16**0.5) * signs * direction + 1e-2 * np.stack([q, k])
    elif kind == "one key dominates":
        k[:, :, 5] = 20 * q.mean(axis=2)
        q += 3 * q.mean(axis=2, keepdims=True)
    elif kind == "all equal":
        q, k, v = np.ones_like(q), np.ones_like(k), np.ones_like(v)
    elif kind == "all keys equal":
        k[:] = k[:, :, :1]
    return [x.astype(np.float32) for x in (q, k, v, dout)]


KINDS = ["random", "logits of 80", "one key dominates", "all equal", "all keys equal"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_errors_are_within_twice_torchs(kind, masked):
    for seed in range(3):
        q, k, v, dout = adversarial(kind, np.random.default_rng([KINDS.index(kind), seed]))
        mask = causal_mask(24, 24) if masked else None
        base = {"q": q, "k": k, "v": v, "dout": dout, "mask": mask, "dlse": None, "bias": None}
        base |= {"keep": None, "rate": 0.0}
        exact = by_hand(
            {n: x.astype(float) if n in ("q", "k", "v", "dout") else x for n, x in base.items()}
        )
        ours = by_hand(base)
        leaves = [tensor(x, requires_grad=True) for x in (q, k, v)]
        options = {} if mask is None else {"attn_mask": tensor(mask)}
        theirs = F.scaled_dot_product_attention(*leaves, **options)
        theirs.backward(tensor(dout))
        theirs = [theirs.detach().numpy(), *(x.grad.numpy() for x in leaves)]
        for i, name in enumerate(("out", "dq", "dk", "dv")):
            want = exact[(0, 3, 4, 5)[i]]
            # 8 roundings of the largest term: what two right orders of summation differ by.
            floor = 8 * np.finfo(np.float32).eps * max(np.abs(want).max(), np.abs(dout).max())
            error = np.abs(ours[(0, 3, 4, 5)[i]] - want).max()
            peer = np.abs(theirs[i] - want).max()
            assert error <= 2 * peer + floor, f"{name}: {error:.3g}, torch {peer:.3g}"


def test_huge_scores_neither_overflow_nor_vanish():
    q = np.array([1e160, -1e160]).reshape(1, 1, 2, 1)
    k = np.array([1e140, 1e139, -1e140]).reshape(1, 1, 3, 1)
    v = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    out, probs, lse = attention_forward(q, k, v, return_lse=True)
    assert out.ravel().tolist() == [1, 3]
    assert lse.ravel().tolist() == [1e300, 1e300]
    assert all(np.isfinite(g).all() for g in attention_backward(v[:, :, :2], q, k, v, probs))


def test_the_scale_is_applied_before_the_product_overflows():
    q = np.full((1, 1, 1, 4), 1e154)
    k = np.full((1, 1, 1, 4), 0.4e154)  # q · k is 1.6e308, twice 0.8e308: no overflow on the way
    assert attention_logits(2 * q, k)[0, 0, 0, 0] == pytest.approx(1.6e308)


# --- masks --------------------------------------------------------------------------------------


@given(n_q=st.integers(0, 7), n_k=st.integers(0, 7))
def test_causal_mask_entry_by_entry(n_q, n_k):
    mask, left = causal_mask(n_q, n_k), causal_mask(n_q, n_k, align="top-left")
    assert mask.dtype == left.dtype == bool
    assert mask.shape == left.shape == (n_q, n_k)
    for i, j in np.ndindex(n_q, n_k):
        # Counted from the end, query i stands where key i + n_k - n_q stands.
        assert mask[i, j] == ((n_k - 1 - j) >= (n_q - 1 - i))
        assert left[i, j] == (j <= i)


@given(n_q=st.integers(1, 6), n_k=st.integers(1, 6), cut=st.integers(0, 6))
def test_the_last_queries_alone_get_the_last_rows(n_q, n_k, cut):
    """Decoding: a mask for fewer queries is the lower part of the one for all of them."""
    kept = max(n_q - cut, 0)
    np.testing.assert_array_equal(causal_mask(kept, n_k), causal_mask(n_q, n_k)[n_q - kept :])


@given(rng=generators(), b=st.integers(0, 5), n_k=st.integers(0, 7))
def test_padding_mask_counts_the_tokens(rng, b, n_k):
    for kind in (np.int64, np.uint8):
        lengths = rng.integers(0, n_k + 1, size=b).astype(kind)
        mask = padding_mask(lengths, n_k)
        assert mask.shape == (b, 1, 1, n_k)
        assert mask.dtype == bool
        assert mask.sum(axis=-1).ravel().tolist() == lengths.tolist()
        assert (np.sort(mask, axis=-1)[..., ::-1] == mask).all(), "tokens first"


def test_causal_and_padding_together():
    both = causal_mask(3, 4) & padding_mask(np.array([4, 1]), 4)
    want = [[[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], [[1, 0, 0, 0]] * 3]
    assert both.shape == (2, 1, 3, 4)
    assert both[:, 0].astype(int).tolist() == want


@given(shape=attention_shapes(), rng=generators(), rate=st.sampled_from([0.0, 0.3, 0.9]))
def test_dropout_is_drawn_at_its_rate_and_keeps_the_mean(shape, rng, rate):
    shape = (shape["B"], shape["H"], 40, 60)
    keep = dropout_keep(rng, shape, rate)
    assert keep.shape == shape
    assert keep.dtype == bool
    spread = 6 * math.sqrt(rate * (1 - rate) / keep.size)
    assert abs(keep.mean() - (1 - rate)) <= spread
    if rate == 0:
        assert keep.all()


def test_the_expected_output_under_dropout_is_the_output():
    rng, n, rate = np.random.default_rng(3), 20_000, 0.4
    q, k, v = rng.normal(size=(1, 1, 3, 2)), *rng.normal(size=(2, 1, 1, 4, 2))
    plain = attention_forward(q, k, v)[0]
    many = [np.repeat(x, n, axis=0) for x in (q, k, v)]
    keep = dropout_keep(rng, (n, 1, 3, 4), rate)
    drawn = attention_forward(*many, keep=keep, rate=rate)[0]
    error = drawn.std(axis=0) / math.sqrt(n)
    assert (np.abs(drawn.mean(axis=0) - plain[0]) <= 5 * error).all()


@given(case=attention_inputs())
def test_minus_infinity_in_the_bias_masks_like_the_mask(case):
    shape = (*case["q"].shape[:3], case["k"].shape[2])
    mask = whole(case["mask"], shape)
    plain = case | {"mask": mask, "bias": np.zeros(shape)}
    biased = case | {"mask": None, "bias": np.where(mask, 0, -INF)}
    for a, b in zip(by_hand(plain), by_hand(biased), strict=True):
        np.testing.assert_array_equal(a, b)


# --- rows without keys, arrays without rows -----------------------------------------------------


@given(case=attention_inputs(), rng=generators())
def test_a_fully_masked_row_gives_nothing_and_takes_nothing(case, rng):
    shape = (*case["q"].shape[:3], case["k"].shape[2])
    dead = rng.random(shape[:3]) < 0.5
    mask = whole(case["mask"], shape) & ~dead[..., None]
    dead = ~mask.any(-1)
    got = by_hand(case | {"mask": mask})
    out, probs, lse, dq = got[:4]
    assert (out[dead] == 0).all()
    assert (probs[dead] == 0).all()
    assert (lse[dead] == -INF).all()
    assert (dq[dead] == 0).all()
    assert all(np.isfinite(g).all() for g in got[3:])
    # Whatever such a row holds, or is sent, changes nothing elsewhere.
    spoiled = {n: np.array(case[n]) for n in ("q", "dout")}
    for x in spoiled.values():
        x[dead] = rng.choice([NAN, INF, -INF, 1e300])
    if case["dlse"] is not None:
        spoiled["dlse"] = np.where(dead, NAN, case["dlse"])
    for a, b in zip(got, by_hand(case | {"mask": mask} | spoiled), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-13)


SIZES = {"B": 2, "H": 3, "Nq": 4, "Nk": 5, "d": 6, "d_v": 7}


def sized(rng, **lengths):
    n = SIZES | lengths
    names = {"q": "B H Nq d", "k": "B H Nk d", "v": "B H Nk d_v", "dout": "B H Nq d_v"}
    case = {x: rng.normal(size=tuple(n[a] for a in axes.split())) for x, axes in names.items()}
    dlse = rng.normal(size=(n["B"], n["H"], n["Nq"]))
    rest = {"mask": None, "bias": np.zeros((n["H"], 1, 1)), "keep": None, "rate": 0.0}
    return case | rest | {"dlse": dlse}


@pytest.mark.parametrize("axis", ["B", "H", "Nq", "Nk", "d_v"])
def test_an_axis_of_length_zero(axis):
    case = sized(np.random.default_rng(4), **{axis: 0})
    out, probs, lse, dq, dk, dv, dbias = by_hand(case)
    assert out.shape == case["dout"].shape
    assert lse.shape == probs.shape[:3]
    assert (dq.shape, dk.shape, dv.shape) == tuple(case[n].shape for n in "qkv")
    assert dbias.shape == case["bias"].shape
    if axis == "Nk":
        assert (out == 0).all()
        assert (lse == -INF).all()
        assert (dq == 0).all()
    if axis == "Nq":
        assert (dk == 0).all()
        assert (dv == 0).all()


def test_one_key_takes_all_the_weight_and_no_gradient():
    case = sized(np.random.default_rng(5), Nk=1) | {"dlse": None}
    out, probs, lse, dq, dk, dv, dbias = by_hand(case)
    assert (probs == 1).all()
    np.testing.assert_array_equal(out, np.broadcast_to(case["v"], out.shape))
    for grad in (dq, dk, dbias):
        assert np.abs(grad).max() <= 1e-14
    agree(dv, case["dout"].sum(axis=2, keepdims=True))
    agree(lse, attention_logits(case["q"], case["k"])[..., 0])


def test_one_token_one_head_one_width():
    one = np.ones((1, 1, 1, 1))
    out, probs, lse = attention_forward(2 * one, 3 * one, 5 * one, return_lse=True)
    assert (out.item(), probs.item(), lse.item()) == (5, 1, 6)


# --- NaN behind a mask --------------------------------------------------------------------------


@given(case=attention_inputs(), rng=generators(), bad=st.sampled_from([NAN, INF, -INF, 1e308]))
def test_what_no_query_may_see_may_hold_anything(case, rng, bad):
    shape = (*case["q"].shape[:3], case["k"].shape[2])
    hidden = rng.random((*shape[:2], shape[-1])) < 0.4
    case |= {"mask": whole(case["mask"], shape) & ~hidden[:, :, None, :]}
    spoiled = {n: np.array(case[n]) for n in ("k", "v")}
    for x in spoiled.values():
        x[hidden] = bad
    got, want = by_hand(case | spoiled), by_hand(case)
    for name, a, b in zip(RETURNED, got, want, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13, err_msg=name)
    assert (got[4][hidden] == 0).all()
    assert (got[5][hidden] == 0).all()


def test_a_key_behind_a_bias_of_minus_infinity_may_hold_anything():
    case = sized(np.random.default_rng(19))
    case["bias"] = np.where(np.arange(5) == 2, -INF, 0.0)
    clean, case["k"] = by_hand(case), np.array(case["k"])
    for bad in (NAN, INF):
        case["k"][:, :, 2] = bad
        for a, b in zip(by_hand(case), clean, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_what_some_queries_see_reaches_them_alone():
    """Key 2 is NaN and causal: rows 0 and 1 come before it."""
    rng = np.random.default_rng(6)
    case = sized(rng, Nq=4, Nk=4) | {"mask": causal_mask(4, 4), "bias": None, "dlse": None}
    clean = by_hand(case)
    for spoiled in ("k", "v"):
        x = case[spoiled].copy()
        x[0, 1, 2] = NAN
        out, probs, lse, dq, dk, dv = by_hand(case | {spoiled: x})
        seen = np.zeros((2, 3, 4), bool)
        seen[0, 1, 2:] = True
        assert np.isnan(out[seen]).all()
        for got, want in ((out, clean[0]), (dq, clean[3])):
            np.testing.assert_allclose(got[~seen], want[~seen], rtol=1e-12, atol=1e-14)
        assert np.isnan(dq[seen]).all()
        others = np.ones((2, 3), bool)
        others[0, 1] = False
        for got, want in ((dk, clean[4]), (dv, clean[5]), (lse, clean[2]), (probs, clean[1])):
            np.testing.assert_allclose(got[others], want[others], rtol=1e-12, atol=1e-14)


def test_a_query_of_nan_reaches_only_the_keys_it_may_see():
    rng = np.random.default_rng(7)
    case = sized(rng, Nq=3, Nk=5, B=1, H=1) | {"bias": None, "dlse": None}
    mask = np.ones((3, 5), bool)
    mask[1, 3:] = False
    case |= {"mask": mask}
    clean = by_hand(case)
    case["q"] = case["q"].copy()
    case["q"][0, 0, 1, 2] = NAN
    out, probs, _, dq, dk, dv = by_hand(case)
    assert np.isnan(out[0, 0, 1]).all()
    assert (probs[0, 0, 1, 3:] == 0).all()
    assert np.isnan(dk[0, 0, :3]).all()
    assert np.isnan(dv[0, 0, :3]).all()
    agree(dk[0, 0, 3:], clean[4][0, 0, 3:])
    agree(dv[0, 0, 3:], clean[5][0, 0, 3:])
    agree(out[0, 0, [0, 2]], clean[0][0, 0, [0, 2]])
    agree(dq[0, 0, [0, 2]], clean[3][0, 0, [0, 2]])


def test_a_dropped_value_may_hold_anything():
    rng = np.random.default_rng(8)
    case = sized(rng) | {"bias": None, "keep": np.ones((2, 3, 4, 5), bool), "rate": 0.5}
    case["keep"][..., 2] = False
    clean = by_hand(case)
    case["v"] = case["v"].copy()
    case["v"][:, :, 2] = NAN
    for a, b in zip(by_hand(case), clean, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@given(shape=attention_shapes(), rng=generators(), data=st.data())
def test_a_weighted_sum_is_the_product_with_zeros_left_out(shape, rng, data):
    b, m, n, d = shape["B"], shape["Nq"], shape["Nk"], shape["d"]
    weights = data.draw(strided(rng.choice([0.0, 0.0, 1.5, -2.0], size=(b, m, n))))
    values = rng.normal(size=(b, n, d))
    values[rng.random((b, n)) < 0.3] = rng.choice([NAN, INF, -INF])
    values = data.draw(strided(values))
    with np.errstate(invalid="ignore"):
        terms = weights[..., None] * values[:, None]
        want = np.where(weights[..., None] == 0, 0, terms).sum(axis=-2)
        got = weighted_sum(weights, values)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


# --- what public kernels got wrong --------------------------------------------------------------


def public_case(rng, n_q=4, n_k=3):
    return sized(rng, Nq=n_q, Nk=n_k) | {"bias": None, "dlse": None}


def test_rows_that_see_nothing_are_zero_and_do_not_poison_their_batch():
    """pytorch#41508, #103749: NaN, which the backward pass spreads over every weight."""
    rng = np.random.default_rng(9)
    case = public_case(rng) | {"mask": padding_mask(np.array([3, 0]), 3)}
    got = by_hand(case)
    assert (got[0][1] == 0).all()
    assert all(np.isfinite(x).all() for x in got[3:])
    assert all((x[1] == 0).all() for x in got[3:])
    alone = by_hand({n: x[:1] if isinstance(x, np.ndarray) else x for n, x in case.items()})
    for a, b in zip(got, alone, strict=True):
        agree(a[:1], b)


def test_one_query_at_the_end_sees_all_keys():
    """pytorch#103082: under a top-left mask a decoding step sees key 0 alone."""
    rng = np.random.default_rng(10)
    case = public_case(rng, n_q=6, n_k=6) | {"mask": causal_mask(6, 6)}
    step = case | {"q": case["q"][:, :, -1:], "mask": causal_mask(1, 6)}
    agree(
        attention_forward(step["q"], step["k"], step["v"], step["mask"])[0],
        by_hand(case)[0][:, :, -1:],
    )
    wrong = attention_forward(step["q"], step["k"], step["v"], causal_mask(1, 6, align="top-left"))
    np.testing.assert_array_equal(wrong[0][:, :, 0], case["v"][:, :, 0])


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_a_chunk_of_queries_behind_a_cache_equals_the_whole(chunk):
    """flash-attention#517, onnxruntime#28904: causal masks are aligned to the last key."""
    rng = np.random.default_rng(11)
    case = public_case(rng, n_q=7, n_k=7)
    q, k, v = case["q"], case["k"], case["v"]
    want = attention_forward(q, k, v, causal_mask(7, 7))[0]
    for start in range(0, 7, chunk):
        stop = min(start + chunk, 7)
        seen = (k[:, :, :stop], v[:, :, :stop])
        mask = causal_mask(stop - start, stop)
        agree(attention_forward(q[:, :, start:stop], *seen, mask)[0], want[:, :, start:stop])


def test_more_queries_than_keys_leave_the_first_rows_without_any():
    """flash-attention#517: with bottom-right alignment these rows are fully masked."""
    mask = causal_mask(5, 2)
    assert mask.astype(int).tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    case = public_case(np.random.default_rng(12), n_q=5, n_k=2) | {"mask": mask}
    got = by_hand(case)
    assert (got[0][:, :, :3] == 0).all()
    assert (got[3][:, :, :3] == 0).all()


def test_an_upstream_gradient_of_any_strides():
    """flash-attention#355: an expanded or transposed dout was read as if contiguous."""
    rng = np.random.default_rng(13)
    case = public_case(rng)
    expanded = np.broadcast_to(rng.normal(size=7), case["dout"].shape)
    turned = np.ascontiguousarray(case["dout"].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    for dout in (expanded, turned, case["dout"][:, :, ::-1], case["dout"][..., ::-1]):
        for a, b in zip(
            by_hand(case | {"dout": dout}),
            by_hand(case | {"dout": np.array(dout, order="C")}),
            strict=True,
        ):
            agree(a, b, 1e-13)


def test_a_finite_sentinel_makes_a_masked_row_uniform():
    """d2l#2423: with -1e6 for -inf a row without keys averages the padding."""
    rng = np.random.default_rng(14)
    case = public_case(rng) | {"mask": np.zeros((1, 1, 1, 1), bool)}
    out, probs = by_hand(case)[:2]
    assert (probs == 0).all()
    assert (out == 0).all()
    sentinel = case | {"mask": None, "bias": np.full((1, 1, 1, 1), -1e6)}
    wrong = by_hand(sentinel)[1]
    np.testing.assert_allclose(wrong.sum(-1), 1)


def test_the_scale_is_the_heads_width_not_the_models():
    """DL4Proteins#12: √(H·d) is right with one head, so more than one head has to be tried."""
    q, k = np.ones((1, 4, 2, 9)), np.ones((1, 4, 3, 9))
    assert (attention_logits(q, k) == 3).all()


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (4, 1), (4, 5), (3, 1, 1), (3, 1, 5), (2, 1, 4, 1), (1, 3, 1, 5)]
)
def test_a_bias_gradient_is_summed_over_every_axis_it_was_broadcast_along(shape):
    """AiDotNet.Tensors#234 summed over one axis; a wrong one may still have the right shape."""
    rng = np.random.default_rng(15)
    case = sized(rng) | {"bias": rng.normal(size=shape)}
    agree(by_hand(case)[6], by_torch(case)[6], 1e-10)


# --- errors ---------------------------------------------------------------------------------------


def zeros(*shape):
    return np.zeros(shape)


Q, K, V = zeros(2, 3, 4, 6), zeros(2, 3, 5, 6), zeros(2, 3, 5, 7)
OUT, PROBS = zeros(2, 3, 4, 7), zeros(2, 3, 4, 5)
BACK = (OUT, Q, K, V, PROBS)
RNG = np.random.default_rng(0)
BAD = [
    (causal_mask, (-1, 3), {}, "n_q: expected at least 0; got -1"),
    (causal_mask, (2, 1.5), {}, "n_k: expected an integer; got 1.5"),
    (causal_mask, (2, 3), {"align": "left"}, "align: expected .* got 'left'"),
    (padding_mask, (np.array([[1]]), 3), {}, r"lengths: expected shape \(B,\); got \(1, 1\)"),
    (padding_mask, (np.array([1.0]), 3), {}, "lengths: expected integers; got dtype float64"),
    (padding_mask, (np.array([True]), 3), {}, "lengths: expected integers; got dtype bool"),
    (padding_mask, (np.array([3, 4]), 3), {}, "lengths: expected 0 … 3, n_k; got 4 at 1"),
    (padding_mask, (np.array([-1]), 3), {}, "lengths: .* got -1 at 0"),
    (dropout_keep, (RNG, (2,), 1.0), {}, r"rate: expected a number in \[0, 1\); got 1.0"),
    (dropout_keep, (RNG, (2,), -0.1), {}, "rate: .* got -0.1"),
    (attention_logits, (zeros(3, 4, 6), K), {}, r"q: expected shape \(B, H, Nq, d\); got \(3, 4"),
    (attention_logits, (zeros(1, 1, 1, 0), K), {}, "q: expected a width d of at least 1"),
    (attention_logits, (Q, zeros(2, 3, 5, 7)), {}, r"k: .*\(2, 3, Nk, 6\) to match q .*5, 7\)"),
    (attention_logits, (Q, zeros(2, 1, 5, 6)), {}, r"k: expected shape \(2, 3, Nk, 6\)"),
    (attention_logits, (Q.astype(complex), K), {}, "q: expected real numbers; got dtype comp"),
    (attention_logits, (Q, K, zeros(4, 5)), {}, "mask: expected booleans; got dtype float64"),
    (
        attention_logits,
        (Q, K, np.ones((2, 5), bool)),
        {},
        r"mask: .* \(B, H, Nq, Nk\) = \(2, 3, 4, 5\); got \(2, 5\)",
    ),
    (attention_logits, (Q, K, np.ones((1, 2, 3, 4, 5), bool)), {}, r"mask: .*got \(1, 2, 3, 4"),
    (attention_logits, (Q, K), {"bias": zeros(5, 4)}, r"bias: .*\(2, 3, 4, 5\); got \(5, 4\)"),
    (attention_forward, (Q, K, zeros(2, 3, 4, 7)), {}, r"v: .*\(2, 3, 5, d_v\) to match k .*5, 6"),
    (attention_forward, (Q, K, V), {"rate": 0.5}, "keep: .*rate=0.5 drew; got None"),
    (attention_forward, (Q, K, V), {"rate": 1, "keep": PROBS == 0}, "rate: .* got 1"),
    (attention_forward, (Q, K, V), {"rate": 0.5, "keep": PROBS}, "keep: expected booleans"),
    (attention_forward, (Q, K, V), {"rate": NAN, "keep": PROBS == 0}, "rate: .* got nan"),
    (attention_backward, (OUT[..., 1:], *BACK[1:]), {}, r"dout: .*\(2, 3, 4, 7\) to match q"),
    (attention_backward, (*BACK[:4], PROBS[..., 1:]), {}, r"probs: .*\(2, 3, 4, 5\).*4, 4\)"),
    (attention_backward, (*BACK[:3], V[:, :, 1:], PROBS), {}, r"v: .*\(2, 3, 5, d_v\)"),
    (attention_backward, BACK, {"dlse": zeros(2, 3, 5)}, r"dlse: .*\(2, 3, 4\) to match probs"),
    (attention_backward, BACK, {"bias": zeros(3, 3)}, r"bias: .*got \(3, 3\)"),
    (attention_backward, BACK, {"rate": 0.1}, "keep: "),
    (attention_backward_dropout, (*BACK, zeros(4, 5) == 0, 1.5), {}, "rate: .* got 1.5"),
    (attention_backward_dropout, (*BACK, zeros(5, 4) == 0, 0.5), {}, r"keep: .*got \(5, 4\)"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "options", "message"), BAD)
def test_bad_input_is_named(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_forward(Q, zeros(2, 3, 5, 5), V)
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_forward(Q, K, V, zeros(4, 5))
    with pytest.raises(jaxtyping.TypeCheckError):
        attention_backward(OUT, Q, K, V, zeros(2, 3, 5, 4))


def test_errors_shared_with_other_modules():
    with pytest.raises(ValueError, match=r"w: expected shape \(4, Cout\) to match x; got \(3, 5\)"):
        check_shape("w", zeros(3, 5), (4, "Cout"), "to match x")
    with pytest.raises(ValueError, match=r"b: expected shape \(N,\); got \(3, 5\)"):
        check_shape("b", zeros(3, 5), ("N",))
    with pytest.raises(ValueError, match=r"x: .* broadcasts to \(2, 3\); got \(4,\)"):
        check_broadcasts("x", zeros(4), (2, 3))
    with pytest.raises(ValueError, match="n: expected at least 1; got 0"):
        as_count("n", 0, 1)
    with pytest.raises(ValueError, match="m: expected booleans; got dtype int64"):
        as_bool("m", np.array([0, 1]))
    assert as_count("n", np.int32(3)) == 3
    check_shape("b", zeros(3, 5), (3, "N"))
    check_broadcasts("x", zeros(3, 1), (2, 3, 4))


FUNCTIONS = [
    causal_mask,
    padding_mask,
    dropout_keep,
    attention_logits,
    attention_forward,
    attention_backward,
    attention_backward_dropout,
]


def test_every_function_states_equation_shapes_and_errors():
    public = {
        f
        for _, f in inspect.getmembers(library, inspect.isfunction)
        if f.__module__ == library.__name__ and not f.__name__.startswith("_")
    }
    assert public == set(FUNCTIONS)
    for function in FUNCTIONS:
        doc = inspect.getdoc(function)
        for part in (".. math::", "Shapes:", "ValueError:"):
            assert part in doc, function.__name__
        hints = typing.get_type_hints(function)
        assert set(hints) == {*inspect.signature(function).parameters, "return"}


@given(shape=attention_shapes(), data=st.data())
def test_a_mask_of_any_shape_is_the_mask_written_out(shape, data):
    over_keys = tuple(shape[n] for n in ("B", "H", "Nq", "Nk"))
    mask = data.draw(masks(over_keys))
    rng = np.random.default_rng(0)
    q, k = (
        rng.normal(size=(*over_keys[:3], shape["d"])),
        rng.normal(size=(*over_keys[:2], over_keys[3], shape["d"])),
    )
    got, full = (attention_logits(q, k, m) for m in (mask, np.array(whole(mask, over_keys))))
    np.testing.assert_array_equal(got, full)
    assert ((got == -INF) == ~full_mask(mask, over_keys)).all()


def full_mask(mask, shape):
    return np.array(whole(mask, shape))
