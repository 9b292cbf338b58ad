"""Caches, chunks and a model's step against the full pass, by torch where it can say it."""

import inspect
import itertools
import tracemalloc
import typing

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import generators, strided

from attn_lessons import streaming as library
from attn_lessons.attention import attention_forward, causal_mask
from attn_lessons.gradcheck import numerical_vjp
from attn_lessons.multihead import grouped_kv_forward, multihead_forward
from attn_lessons.positions import rope
from attn_lessons.recurrent import (
    init_lstm,
    init_rnn,
    lstm_forward,
    lstm_step_forward,
    rnn_forward,
    rnn_step_forward,
)
from attn_lessons.streaming import (
    EMPTY,
    KVCache,
    ModelState,
    chunked_causal_attention,
    chunked_causal_attention_backward,
    encoder_block_step,
    kv_cache_bytes,
    kv_cache_start,
    kv_cache_step,
    language_model_prefill,
    language_model_start,
    language_model_step,
    multihead_step,
    position_mask,
    prefill,
    ring_positions,
    rope_cache_step,
)
from attn_lessons.transformer import (
    Config,
    encoder_block_forward,
    init_encoder_block,
    init_language_model,
    language_model_forward,
)

EXACT = 1e-10
SAME = 1e-12  # streamed against the full pass
NAN, INF = np.nan, np.inf
LENGTHS = st.integers(1, 7)


def largest(x):
    return np.abs(x).max(initial=0)


def agree(got, want, rtol=SAME, scale=0.0):
    """An error of at most ``rtol`` of the largest entry wanted, or of ``scale``."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    error, scale = largest(got - want), max(scale, largest(want))
    assert error <= rtol * scale, f"off by {error:.3g} where the largest entry is {scale:.3g}"


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


def windowed(n_q, n_k, window=None):
    """Which keys a query sees, entry by entry: the last query stands at the last key."""
    mask = np.zeros((n_q, n_k), bool)
    for i, j in itertools.product(range(n_q), range(n_k)):
        back = i + n_k - n_q - j
        mask[i, j] = back >= 0 and (window is None or back < window)
    return mask


def full(q, k, v, window=None):
    """The full pass by torch, key heads repeated; a row that sees nothing is 0."""
    q, k, v = tensor(q), tensor(k), tensor(v)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = tensor(windowed(q.shape[2], k.shape[2], window))
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -INF)
    probs = torch.where(mask.any(-1, keepdim=True), torch.softmax(logits, -1), 0)
    return (probs @ v).numpy()


@st.composite
def sequences(draw, n=None, dtype=np.float64, scale=1.0):
    """q, k and v of any sizes, grouped heads among them; k and v as long as q."""
    rng = draw(generators())
    b, h_kv, group = draw(st.tuples(*[st.integers(1, 3)] * 3))
    d, d_v = draw(st.tuples(LENGTHS, LENGTHS))
    n = draw(st.integers(1, 12)) if n is None else n
    shapes = ((b, h_kv * group, n, d), (b, h_kv, n, d), (b, h_kv, n, d_v))
    return tuple((rng.normal(size=s) * scale).astype(dtype) for s in shapes)


def empty_for(k, v, capacity, dtype=float):
    """An empty cache that fits k and v, its slots full of NaN: nobody may look there."""
    cache = kv_cache_start(*k.shape[:2], capacity, k.shape[-1], v.shape[-1], dtype=dtype)
    cache.k.fill(NAN), cache.v.fill(NAN)
    return cache


def one_by_one(q, k, v, cache, step=kv_cache_step):
    """All tokens through ``step``: the outputs side by side, and the cache behind the last."""
    outs = []
    for t in range(q.shape[2]):
        at = (slice(None), slice(None), slice(t, t + 1))
        out_t, cache = step(q[at], k[at], v[at], cache)
        outs.append(out_t)
    return np.concatenate(outs, axis=2), cache


@st.composite
def pieces(draw, n):
    """Cuts of 0 … n into pieces of any length, the last one ragged."""
    cuts = draw(st.lists(st.integers(1, n), max_size=4))
    ends = sorted({c for c in cuts if c < n} | {n})
    return list(itertools.pairwise([0, *ends]))


# --- one token at a time --------------------------------------------------------------------------


@given(tokens=sequences(), extra=st.integers(0, 5))
def test_token_by_token_is_the_full_causal_pass(tokens, extra):
    q, k, v = tokens
    n = q.shape[2]
    out, cache = one_by_one(q, k, v, empty_for(k, v, n + extra))
    agree(out, full(q, k, v))
    assert cache.length == n
    np.testing.assert_array_equal(cache.k[:, :, :n], k)
    np.testing.assert_array_equal(cache.v[:, :, :n], v)
    assert np.isnan(cache.k[:, :, n:]).all(), "slots behind the last token stay as they were"


@given(tokens=sequences(), window=st.integers(1, 12))
def test_a_ring_buffer_is_window_attention(tokens, window):
    q, k, v = tokens
    n = q.shape[2]
    out, cache = one_by_one(q, k, v, empty_for(k, v, window))
    agree(out, full(q, k, v, window))
    for slot, p in enumerate(ring_positions(n, window)):
        if p == EMPTY:
            assert np.isnan(cache.k[:, :, slot]).all()
        else:
            assert p >= n - window
            np.testing.assert_array_equal(cache.k[:, :, slot], k[:, :, p])
            np.testing.assert_array_equal(cache.v[:, :, slot], v[:, :, p])


@given(tokens=sequences(), window=st.integers(1, 14), data=st.data())
def test_every_chunking_of_a_prefill_gives_the_same(tokens, window, data):
    """In pieces cut anywhere, each taken whole, in chunks or token by token."""
    q, k, v = tokens
    want, behind = one_by_one(q, k, v, empty_for(k, v, window))
    cache, outs = empty_for(k, v, window), []
    for start, end in data.draw(pieces(q.shape[2])):
        part = [x[:, :, start:end] for x in (q, k, v)]
        chunk = data.draw(st.none() | st.integers(1, 12))
        if data.draw(st.booleans()):
            out, cache = prefill(*part, cache, chunk)
        else:
            out, cache = one_by_one(*part, cache)
        outs.append(out)
    got = np.concatenate(outs, axis=2)
    agree(got, want)
    agree(got, full(q, k, v, window))
    assert cache.length == behind.length
    np.testing.assert_array_equal(cache.k, behind.k)
    np.testing.assert_array_equal(cache.v, behind.v)


@given(tokens=sequences(), window=st.integers(1, 12), data=st.data())
def test_rotary_positions_with_a_cache_are_those_of_the_full_pass(tokens, window, data):
    q, k, v = tokens
    q, k = (np.concatenate([x, x[..., ::-1]], axis=-1) for x in (q, k))  # an even width
    n, base = q.shape[2], data.draw(st.sampled_from([10.0, 10000.0]))
    turned = rope(q, np.arange(n), base), rope(k, np.arange(n), base)

    def step(q_t, k_t, v_t, cache):
        return rope_cache_step(q_t, k_t, v_t, cache, base)

    out, cache = one_by_one(q, k, v, empty_for(k, v, window), step)
    agree(out, full(*turned, v, window))
    _, plain = one_by_one(*turned, v, empty_for(k, v, window))
    np.testing.assert_array_equal(cache.k, plain.k)


def test_a_window_of_one_returns_the_value():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 2, 5, 4))
    out, _ = one_by_one(q, k, v, empty_for(k, v, 1))
    np.testing.assert_array_equal(out, v)


def test_by_hand():
    """d = 1, so that the scale is 1: weights of 1 : 3 between two keys."""
    one = np.ones((1, 1, 1, 1))
    cache = kv_cache_start(1, 1, 2, 1)
    out, cache = kv_cache_step(one, 0 * one, 8 * one, cache)
    assert out.item() == 8, "the first token sees itself alone"
    out, cache = kv_cache_step(np.log(3) * one, one, 4 * one, cache)
    agree(out.item(), (1 * 8 + 3 * 4) / 4)
    # The third evicts the first: keys 1 and 0 remain, in slots 1 and 0.
    out, cache = kv_cache_step(np.log(3) * one, 0 * one, 12 * one, cache)
    agree(out.item(), (3 * 4 + 1 * 12) / 4)
    assert cache.v.ravel().tolist() == [12, 4]
    assert cache.length == 3


@pytest.mark.parametrize("how", ["step", "prefill", "rope"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("length", [2, 3, 8])
def test_a_cache_stays_as_it_is_unless_in_place(how, plain, length):
    rng = np.random.default_rng(length)
    q, k, v = rng.normal(size=(3, 2, 3, 1, 4))
    arrays = rng.normal(size=(2, 2, 3, 3, 4))
    cache = KVCache(arrays[0].copy(), arrays[1].copy(), length)
    cache = tuple(cache) if plain else cache
    call = {"step": kv_cache_step, "prefill": prefill, "rope": rope_cache_step}[how]
    want, fresh = call(q, k, v, cache)
    assert type(fresh) is (tuple if plain else KVCache)
    np.testing.assert_array_equal(cache[:2], arrays)
    assert fresh[2] == length + 1
    for new, old in zip(fresh[:2], cache[:2], strict=True):
        assert not np.shares_memory(new, old)
        changed = (new != old).any(axis=(0, 1, 3))
        assert changed.tolist() == [s == length % 3 for s in range(3)], "one slot is new"
    got, same = call(q, k, v, cache, in_place=True)
    np.testing.assert_array_equal(got, want)
    for i in (0, 1):
        assert same[i] is cache[i], "the very array, written to"
        np.testing.assert_array_equal(same[i], fresh[i])


@given(tokens=sequences(), window=st.integers(1, 6), data=st.data())
def test_memory_layout_does_not_matter(tokens, window, data):
    q, k, v = tokens
    want, behind = prefill(q, k, v, empty_for(k, v, window), 3)
    laid = [data.draw(strided(x)) for x in tokens]
    cache = [data.draw(strided(x)) for x in empty_for(k, v, window)[:2]]
    got, cache = prefill(*laid, KVCache(*cache, 0), 3)
    agree(got, want)
    np.testing.assert_array_equal(cache.k, behind.k)
    agree(chunked_causal_attention(*laid, 3), chunked_causal_attention(q, k, v, 3))


def test_a_cache_keeps_its_dtype():
    """What goes into a float32 cache is rounded, the new token's own key too."""
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 1, 2, 6, 4))
    out, cache = one_by_one(q, k, v, kv_cache_start(1, 2, 6, 4, dtype=np.float32))
    assert (out.dtype, cache.k.dtype, cache.v.dtype) == (np.float64, np.float32, np.float32)
    rounded = [x.astype(np.float32).astype(float) for x in (k, v)]
    agree(out, full(q, *rounded))
    single = [x.astype(np.float32) for x in (q, k, v)]
    out, cache = prefill(*single, kv_cache_start(1, 2, 4, 4, dtype=np.float32), 2)
    assert (out.dtype, cache.k.dtype) == (np.float32, np.float32)


# --- who may see whom -----------------------------------------------------------------------------


@given(length=st.integers(0, 40), capacity=st.integers(1, 12))
def test_ring_positions_are_what_writing_leaves(length, capacity):
    slots = [EMPTY] * capacity
    for p in range(length):
        slots[p % capacity] = p
    assert ring_positions(length, capacity).tolist() == slots


@given(
    n=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    window=st.none() | st.integers(1, 9),
    rng=generators(),
    data=st.data(),
)
def test_a_mask_follows_the_positions_in_any_order(n, window, rng, data):
    q_positions = rng.integers(0, 30, size=n[0])
    k_positions = rng.permutation(30)[: n[1]]
    k_positions[rng.random(n[1]) < 0.3] = EMPTY
    mask = position_mask(q_positions, data.draw(strided(k_positions)), window)
    assert mask.shape == n
    for i, j in np.ndindex(*n):
        p, at = q_positions[i], k_positions[j]
        assert mask[i, j] == (0 <= at <= p and (window is None or at > p - window))


@given(n_q=st.integers(0, 9), n_k=st.integers(0, 9), window=st.none() | st.integers(1, 9))
def test_a_mask_of_neighbours_is_the_causal_one(n_q, n_k, window):
    mask = position_mask(np.arange(n_q) + n_k - n_q, np.arange(n_k), window)
    np.testing.assert_array_equal(mask, windowed(n_q, n_k, window))
    if window is None:
        np.testing.assert_array_equal(mask, causal_mask(n_q, n_k))


def test_positions_without_a_sign_do_not_wrap():
    mask = position_mask(np.array([0, 3], np.uint8), np.array([2, 5], np.uint8))
    assert mask.tolist() == [[False, False], [True, False]]


# --- a whole sequence in chunks -------------------------------------------------------------------


@st.composite
def chunked_problems(draw):
    """q, k and v of different lengths, chunk, window, and the upstream gradient."""
    q, k, v = draw(sequences())
    n_k, rng = draw(st.integers(1, 12)), draw(generators())
    k, v = (rng.normal(size=(*x.shape[:2], n_k, x.shape[-1])) for x in (k, v))
    chunk, window = draw(st.integers(1, 14)), draw(st.none() | st.integers(1, 12))
    dout = rng.normal(size=(*q.shape[:3], v.shape[-1]))
    return dout, tuple(draw(strided(x)) for x in (q, k, v)), chunk, window


@given(problem=chunked_problems())
def test_chunks_are_the_full_pass(problem):
    _, (q, k, v), chunk, window = problem
    agree(chunked_causal_attention(q, k, v, chunk, window=window), full(q, k, v, window))
    heads = (grouped_kv_forward(x, q.shape[1]) for x in (k, v))
    whole, _ = attention_forward(q, *heads, windowed(q.shape[2], k.shape[2], window))
    agree(chunked_causal_attention(q, k, v, chunk, window=window), whole)


@given(problem=chunked_problems())
def test_gradients_of_chunks_equal_autograd(problem):
    dout, (q, k, v), chunk, window = problem
    leaves = [tensor(x, requires_grad=True) for x in (q, k, v)]
    heads = [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in leaves[1:]]
    mask = tensor(windowed(q.shape[2], k.shape[2], window))
    alive = mask.any(-1, keepdim=True)
    logits = leaves[0] @ heads[0].mT / q.shape[-1] ** 0.5
    probs = torch.softmax(logits.masked_fill(~mask & alive, -INF), -1) * alive
    (probs @ heads[1]).backward(tensor(dout))
    got = chunked_causal_attention_backward(dout, q, k, v, chunk, window=window)
    # With one key all gradients behind softmax cancel to 0: dv says how large their terms are.
    for gradient, leaf in zip(got, leaves, strict=True):
        agree(gradient, leaf.grad, EXACT, largest(got[2]))


def test_gradients_of_chunks_equal_finite_differences():
    rng = np.random.default_rng(4)
    shapes = ((1, 2, 3, 2), (1, 1, 5, 2), (1, 1, 5, 3))
    inputs = [rng.normal(size=s) for s in shapes]
    dout = rng.normal(size=(1, 2, 3, 3))
    got = chunked_causal_attention_backward(dout, *inputs, 2, window=3)
    for i, gradient in enumerate(got):

        def output(x, i=i):
            return chunked_causal_attention(*inputs[:i], x, *inputs[i + 1 :], 2, window=3)

        agree(gradient, numerical_vjp(output, inputs[i], dout), 1e-8)


def peak_of(call):
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("unchecked")
def test_memory_of_a_chunked_pass_is_of_chunk_times_n():
    rng = np.random.default_rng(5)
    n = 1024
    q, k, v = rng.normal(size=(3, 1, 2, n, 4))
    row = 2 * n * 8  # one query's logits in both heads, in bytes
    peaks = {c: peak_of(lambda c=c: chunked_causal_attention(q, k, v, c)) for c in (16, 64, n)}
    # Logits, probabilities, their exponentials and the mask: between two and six rows a query.
    for chunk, peak in peaks.items():
        assert 2 * row * chunk < peak < 6 * row * chunk + 10 * q.nbytes
    back = peak_of(lambda: chunked_causal_attention_backward(v, q, k, v, 16))
    assert back < peaks[n] / 8
    window = peak_of(lambda: chunked_causal_attention(q, k, v, 16, window=32))
    assert window < peaks[16] / 2


@pytest.mark.usefixtures("unchecked")
def test_keys_of_the_past_are_not_copied():
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, 1, 2, 256, 128))
    assert peak_of(lambda: chunked_causal_attention(q, k, v, 4)) < v.nbytes + k.nbytes / 4
    cache = kv_cache_start(1, 2, 2000, 128)
    _, cache = prefill(q, k, v, cache)
    at = (slice(None), slice(None), slice(0, 1))
    arrays = (q[at], k[at], v[at])
    assert peak_of(lambda: kv_cache_step(*arrays, cache, in_place=True)) < k.nbytes / 16
    copied = peak_of(lambda: kv_cache_step(*arrays, cache))
    assert 2 * cache.k.nbytes < copied < 2.1 * cache.k.nbytes, "what being pure costs"


# --- what is not finite, and single precision -----------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_evicted_token_leaves_nothing(bad):
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(3, 2, 2, 9, 4))
    spoiled = [x.copy() for x in (q, k, v)]
    for x in spoiled:
        x[:, :, 2] = bad
    want, _ = one_by_one(q, k, v, empty_for(k, v, 3))
    for got in (
        one_by_one(*spoiled, empty_for(k, v, 3))[0],
        prefill(*spoiled, empty_for(k, v, 3))[0],
        prefill(*spoiled, empty_for(k, v, 3), 4)[0],
        chunked_causal_attention(*spoiled, 4, window=3),
    ):
        seen = np.arange(9)
        apart = (seen < 2) | (seen >= 5)
        agree(got[:, :, apart], want[:, :, apart])
        if np.isnan(bad):  # an infinite key may have weight 0
            assert not np.isfinite(got[:, :, 2:5]).any(), "whoever sees it is not finite"


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_future_token_may_hold_anything(bad):
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(3, 1, 2, 6, 4))
    want = full(q, k, v)
    k[:, :, 4], v[:, :, 4] = bad, bad
    for got in (
        prefill(q, k, v, empty_for(k, v, 6))[0],
        chunked_causal_attention(q, k, v, 4),
    ):
        agree(got[:, :, :4], want[:, :, :4])


ADVERSARIAL = ["random", "logits of 80", "one key dominating", "all equal"]


def adversarial(kind, rng):
    q, k, v = rng.normal(size=(3, 2, 3, 40, 16))
    if kind == "logits of 80":
        q *= 20
    if kind == "one key dominating":
        k[:, :, 5] *= 30
    if kind == "all equal":
        q[:], k[:] = q[:, :, :1], k[:, :, :1]
    return [x.astype(np.float32) for x in (q, k, v)]


def rms(values):
    return float(np.mean(np.square(values)) ** 0.5)


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_float32_error_is_within_twice_torchs(kind):
    """Against float64 on the same numbers, plus one rounding of the largest entry."""
    ways = {
        "step": lambda q, k, v: one_by_one(q, k, v, empty_for(k, v, 40, np.float32))[0],
        "prefill": lambda q, k, v: prefill(q, k, v, empty_for(k, v, 40, np.float32), 7)[0],
        "chunks": lambda q, k, v: chunked_causal_attention(q, k, v, 7),
    }
    errors = {name: [] for name in (*ways, "torch", "floor")}
    for seed in range(8):
        q, k, v = adversarial(kind, np.random.default_rng(seed))
        exact = full(*(x.astype(float) for x in (q, k, v)))
        theirs = F.scaled_dot_product_attention(*map(tensor, (q, k, v)), is_causal=True).numpy()
        for name, way in ways.items():
            got = way(q, k, v)
            assert got.dtype == theirs.dtype == np.float32
            errors[name].append(largest(got - exact))
        errors["torch"].append(largest(theirs - exact))
        errors["floor"].append(largest(exact) * 2.0**-24)
    for name in ways:
        assert rms(errors[name]) <= 2 * rms(errors["torch"]) + rms(errors["floor"]), name


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_float32_gradients_are_within_twice_torchs(kind):
    ours, theirs, floor = ([[] for _ in range(3)] for _ in range(3))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        arrays = adversarial(kind, rng)
        dout = rng.normal(size=arrays[0].shape).astype(np.float32)
        wide = [x.astype(float) for x in (dout, *arrays)]
        exact = chunked_causal_attention_backward(*wide, 7)
        got = chunked_causal_attention_backward(dout, *arrays, 7)
        leaves = [tensor(x, requires_grad=True) for x in arrays]
        hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
        logits = (leaves[0] @ leaves[1].mT / 4).masked_fill(hidden, -INF)
        (torch.softmax(logits, -1) @ leaves[2]).backward(tensor(dout))
        for i in range(3):
            assert got[i].dtype == np.float32
            ours[i].append(largest(got[i] - exact[i]))
            theirs[i].append(largest(leaves[i].grad.numpy() - exact[i]))
            floor[i].append(largest(exact[i]) * 2.0**-24)
    for i, name in enumerate(("dq", "dk", "dv")):
        assert rms(ours[i]) <= 2 * rms(theirs[i]) + rms(floor[i]), name


# --- layers and a model ---------------------------------------------------------------------------


def attention_params(rng, c, e, e_kv):
    shapes = {"wq": (c, e), "wk": (c, e_kv), "wv": (c, e_kv), "wo": (e, c)}
    shapes |= {"bq": (e,), "bk": (e_kv,), "bv": (e_kv,), "bo": (c,)}
    return {n: rng.normal(size=s) / s[0] ** 0.5 for n, s in shapes.items()}


@given(
    sizes=st.tuples(LENGTHS, st.integers(1, 9), LENGTHS, st.integers(1, 3), st.integers(1, 3)),
    window=st.integers(1, 9),
    rng=generators(),
    data=st.data(),
)
def test_multihead_attention_in_pieces(sizes, window, rng, data):
    b, n, c, h_kv, group = sizes
    h, d = h_kv * group, 2
    x, params = rng.normal(size=(b, n, c)), attention_params(rng, c, h * d, h_kv * d)
    if data.draw(st.booleans()):
        params |= dict.fromkeys(("bq", "bk", "bv", "bo"))
    mask = windowed(n, n, window)
    want, _ = multihead_forward(x, **params, n_heads=h, n_kv_heads=h_kv, mask=mask)
    cache, outs = kv_cache_start(b, h_kv, window, d), []
    for start, end in data.draw(pieces(n)):
        out, cache = multihead_step(x[:, start:end], **params, n_heads=h, cache=cache)
        outs.append(out)
    agree(np.concatenate(outs, axis=1), want)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_block_in_pieces(norm, activation):
    rng = np.random.default_rng(8)
    x, params = rng.normal(size=(2, 7, 6)), init_encoder_block(rng, 6, 10)
    params = {n: p + 0.3 * rng.normal(size=p.shape) for n, p in params.items()}
    options = {"activation": activation, "eps": 1e-3}
    want, _ = encoder_block_forward(x, params, 3, causal_mask(7, 7), norm, **options)
    cache, outs = kv_cache_start(2, 3, 7, 2), []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        out, cache = encoder_block_step(x[:, rows], params, 3, cache, norm, **options)
        outs.append(out)
    agree(np.concatenate(outs, axis=1), want)


def a_model(rng, tied=True, **changes):
    config = Config(**{"n_layers": 3, "d_model": 12, "n_heads": 3, "d_ff": 20, "max_len": 16})
    config = config._replace(**changes)
    params = init_language_model(rng, config, 11, tied=tied)
    return config, {n: p + 0.2 * rng.normal(size=p.shape) for n, p in params.items()}


@given(
    rng=generators(),
    tied=st.booleans(),
    norm=st.sampled_from(["pre", "post"]),
    layers=st.integers(0, 3),
    data=st.data(),
)
def test_a_language_model_in_pieces(rng, tied, norm, layers, data):
    config, params = a_model(rng, tied, norm=norm, n_layers=layers)
    n = data.draw(st.integers(1, 16))
    tokens = rng.integers(11, size=(2, n))
    want, _ = language_model_forward(tokens, params, config)
    state, rows = language_model_start(config, 2), []
    for start, end in data.draw(pieces(n)):
        if end - start == 1:
            logits, state = language_model_step(tokens[:, start], state, params, config)
            rows.append(logits[:, None])
        else:
            chunk = data.draw(st.none() | st.integers(1, 5))
            logits, state = language_model_prefill(
                tokens[:, start:end], state, params, config, chunk
            )
            rows.append(logits)
    agree(np.concatenate(rows, axis=1), want)
    assert state.length == n
    assert all(cache.length == n for cache in state.caches)


def test_a_language_model_with_a_window_in_every_layer():
    """Ring buffers in all layers: the full pass with a window's mask in each."""
    rng = np.random.default_rng(9)
    config, params = a_model(rng)
    tokens, h = rng.integers(11, size=(2, 15)), None
    h = params["embed.weight"][tokens] + params["position.weight"][:15]
    for i in range(config.n_layers):
        block = {n[9:]: p for n, p in params.items() if n.startswith(f"layers.{i}.")}
        h, _ = encoder_block_forward(h, block, 3, windowed(15, 15, 4), "pre")
    centred = h - h.mean(-1, keepdims=True)
    hidden = centred / np.sqrt(h.var(-1, keepdims=True) + config.eps)
    hidden = hidden * params["norm.weight"] + params["norm.bias"]
    want = hidden @ params["embed.weight"].T
    state, rows = language_model_start(config, 2, capacity=4), []
    for t in range(15):
        logits, state = language_model_step(tokens[:, t], state, params, config)
        rows.append(logits)
    agree(np.stack(rows, axis=1), want)
    whole, _ = language_model_forward(tokens, params, config)
    assert largest(want - whole) > 0.01, "the window tells"
    state = language_model_start(config, 2, capacity=4)
    agree(language_model_prefill(tokens, state, params, config)[0], want)


def test_a_state_may_be_kept_and_gone_on_from_twice():
    """Two continuations of one prompt: the first leaves the state as it was."""
    rng = np.random.default_rng(10)
    config, params = a_model(rng)
    prompt = rng.integers(11, size=(1, 6))
    _, state = language_model_prefill(prompt, language_model_start(config), params, config)
    for token in (3, 8, 3):
        got, _ = language_model_step(np.array([token]), state, params, config)
        tokens = np.concatenate([prompt, [[token]]], axis=1)
        agree(got, language_model_forward(tokens, params, config)[0][:, -1])
    got, after = language_model_step(np.array([3]), state, params, config, in_place=True)
    agree(got, language_model_forward(np.append(prompt, 3)[None], params, config)[0][:, -1])
    assert after.caches[0].k is state.caches[0].k


def test_a_float32_model_streams_in_float32():
    rng = np.random.default_rng(11)
    config, params = a_model(rng)
    params = {n: p.astype(np.float32) for n, p in params.items()}
    state = language_model_start(config, 1, dtype=np.float32)
    logits, state = language_model_step(np.array([4]), state, params, config)
    assert logits.dtype == state.caches[0].k.dtype == np.float32


# --- the other kind of state ----------------------------------------------------------------------


@given(sizes=st.tuples(st.integers(1, 3), st.integers(1, 12), LENGTHS, LENGTHS), rng=generators())
def test_a_recurrent_network_streams_with_a_state_that_does_not_grow(sizes, rng):
    b, n, d, width = sizes
    x, h, c = rng.normal(size=(b, n, d)), rng.normal(size=(b, width)), rng.normal(size=(b, width))
    rnn, lstm = init_rnn(rng, d, width), init_lstm(rng, d, width)
    plain, gated, steps = h, (h, c), []
    for t in range(n):
        plain = rnn_step_forward(x[:, t], plain, **rnn)
        gated = lstm_step_forward(x[:, t], *gated, **lstm)
        assert [s.shape for s in (plain, *gated)] == [(b, width)] * 3, "whatever t is"
        steps.append((plain, gated[0]))
    agree(np.stack([s for s, _ in steps], axis=1), rnn_forward(x, h, **rnn)[0])
    h_all, c_last, _ = lstm_forward(x, h, c, **lstm)
    agree(np.stack([s for _, s in steps], axis=1), h_all)
    agree(gated[1], c_last)


# --- what it costs --------------------------------------------------------------------------------


def test_bytes_are_those_that_numpy_counts():
    for dtype, batch in ((np.float32, 1), (np.float64, 3)):
        caches = [kv_cache_start(batch, 2, 50, 6, dtype=dtype) for _ in range(4)]
        counted = sum(c.k.nbytes + c.v.nbytes for c in caches)
        assert kv_cache_bytes(4, 2, 6, 50, np.dtype(dtype).itemsize, batch=batch) == counted
    assert kv_cache_bytes(4, 2, 6, 900, 8, window=50) == kv_cache_bytes(4, 2, 6, 50, 8)
    assert kv_cache_bytes(4, 2, 6, 10, 8, window=50) == kv_cache_bytes(4, 2, 6, 10, 8)


def test_a_70b_model_needs_327680_bytes_a_token():
    """80 layers, 8 key heads of width 128, 16 bit; 2.6 MB, as often read, is with 64 key heads."""
    assert kv_cache_bytes(80, 8, 128, 1, 2) == 327_680
    assert kv_cache_bytes(80, 64, 128, 1, 2) == 2_621_440


# --- failures of public code ----------------------------------------------------------------------


def test_llms_from_scratch_697_the_mask_of_a_cached_step_is_a_row_of_all_keys():
    """mask[:n, :n] with n = 1 new token is one entry; the row has as many as there are keys."""
    rng = np.random.default_rng(12)
    q, k, v = rng.normal(size=(3, 1, 2, 6, 4))
    want = full(q, k, v)
    whole = causal_mask(6, 6)
    for t in range(1, 6):
        row = position_mask(np.array([t]), np.arange(t + 1))
        assert row.shape == (1, t + 1)
        assert row.all(), "a new token has no future among the keys"
        np.testing.assert_array_equal(row, whole[t : t + 1, : t + 1])
        sliced = whole[:1, :1] & np.eye(1, t + 1, dtype=bool)  # what a (1, 1) mask lets through
        wrong, _ = attention_forward(q[:, :, [t]], k[:, :, : t + 1], v[:, :, : t + 1], sliced)
        assert largest(wrong - want[:, :, [t]]) > 0.1
    # With three new tokens and a cache of two the square mask has the wrong corner.
    mask = position_mask(np.arange(2, 5), np.arange(5))
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_tinyllm_17_a_prefill_with_a_cache_is_still_masked():
    rng = np.random.default_rng(12)
    q, k, v = rng.normal(size=(3, 1, 2, 6, 4))
    out, _ = prefill(q, k, v, kv_cache_start(1, 2, 9, 4))
    later = [x.copy() for x in (q, k, v)]
    for x in later:
        x[:, :, 4:] += 1
    changed, _ = prefill(*later, kv_cache_start(1, 2, 9, 4))
    np.testing.assert_array_equal(changed[:, :, :4], out[:, :, :4])


def test_executorch_21749_a_second_chunk_sees_the_first():
    """torch's is_causal is aligned top-left: query 0 of the chunk would see key 0 alone."""
    rng = np.random.default_rng(13)
    q, k, v = rng.normal(size=(3, 1, 2, 7, 4))
    _, cache = prefill(q[:, :, :4], k[:, :, :4], v[:, :, :4], kv_cache_start(1, 2, 9, 4))
    out, _ = prefill(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], cache)
    agree(out, full(q, k, v)[:, :, 4:])
    wrong = F.scaled_dot_product_attention(
        tensor(q[:, :, 4:]), tensor(k), tensor(v), is_causal=True
    )
    assert largest(wrong.numpy() - out) > 0.1


def test_transformers_35350_positions_go_on_counting_after_eviction():
    """Keys turned by slot, or turned back where they are kept while the new one is not."""
    rng = np.random.default_rng(14)
    n, window = 12, 4
    q, k, v = rng.normal(size=(3, 1, 2, n, 8))
    places = np.arange(n)
    want = full(rope(q, places), rope(k, places), v, window)
    out, _ = one_by_one(q, k, v, kv_cache_start(1, 2, window, 8), rope_cache_step)
    agree(out, want)
    # By the slot: right until the ring is full, wrong from the first eviction on.
    slots = places % window
    by_slot, _ = one_by_one(rope(q, slots), rope(k, slots), v, kv_cache_start(1, 2, window, 8))
    agree(by_slot[:, :, :window], want[:, :, :window])
    errors = np.abs(by_slot - want).max(axis=(0, 1, 3))[window:]
    assert (errors > 0.01).sum() >= len(errors) - 2, "but where window divides the position"
    # Never past the last slot: the query stands still, its keys too.
    still = np.minimum(places, window - 1)
    wrong, _ = one_by_one(rope(q, still), rope(k, still), v, kv_cache_start(1, 2, window, 8))
    assert np.abs(wrong - want).max(axis=(0, 1, 3))[window:].min() > 0.01
    # All of them counted from the window's first token: the differences are the same.
    for t in range(window, n):
        seen = slice(t - window + 1, t + 1)
        again = rope(k[:, :, seen], np.arange(window))
        query = rope(q[:, :, [t]], window - 1)
        agree(attention_forward(query, again, v[:, :, seen])[0], want[:, :, [t]])
        # The kept ones alone, while query and new key stay at t: the distances are mixed up.
        again[:, :, -1] = rope(k[:, :, t], t)
        mixed, _ = attention_forward(rope(q[:, :, [t]], t), again, v[:, :, seen])
        assert largest(mixed - want[:, :, [t]]) > 0.01


# --- inputs and errors ----------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    q, k, v = normal(2, 4, 5, 6), normal(2, 2, 5, 6), normal(2, 2, 5, 3)
    one = tuple(x[:, :, :1].copy() for x in (q, k, v))
    cache = (normal(2, 2, 4, 6), normal(2, 2, 4, 3), 7)
    block = {n: p.astype(dtype) for n, p in init_encoder_block(rng, 6, 8).items()}
    attention = {n[10:]: p for n, p in block.items() if n.startswith("self_attn.")}
    config, params = a_model(rng)
    params = {n: p.astype(dtype) for n, p in params.items()}
    tokens = rng.integers(11, size=(2, 3))
    state = language_model_start(config, 2, dtype=dtype)
    own = (normal(2, 3, 4, 2), normal(2, 3, 4, 2), 5)
    return {
        kv_cache_start: (2, 3, 4, 5),
        ring_positions: (7, 3),
        position_mask: (np.arange(3), np.arange(4)),
        kv_cache_bytes: (2, 3, 4, 5, 8),
        kv_cache_step: (*one, cache),
        rope_cache_step: (*one, cache),
        prefill: (q, k, v, cache, 2),
        chunked_causal_attention: (q, k, v, 2),
        chunked_causal_attention_backward: (normal(2, 4, 5, 3), q, k, v, 2),
        multihead_step: (normal(2, 3, 6), *attention.values(), 3, own),
        encoder_block_step: (normal(2, 3, 6), block, 3, own),
        language_model_start: (config,),
        language_model_prefill: (tokens, state, params, config),
        language_model_step: (tokens[:, 0], state, params, config),
    }


def arrays(value):
    """Every array in nested tuples and dicts."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from arrays(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from arrays(part)


NUMBERS = {kv_cache_start, ring_positions, position_mask, kv_cache_bytes, language_model_start}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", [f for f in calls() if f not in NUMBERS])
def test_inputs_may_be_read_only_are_not_returned_and_keep_their_dtype(function, dtype):
    arguments = calls(dtype)[function]
    given = list(arrays(arguments))
    for a in given:
        a.flags.writeable = False
    results = list(arrays(function(*arguments)))
    assert results
    for result in results:
        assert result.dtype == dtype
        assert not any(np.shares_memory(result, a) for a in given)


@pytest.mark.parametrize("function", [kv_cache_step, prefill, chunked_causal_attention])
def test_integers_become_float64(function):
    def whole(value):
        if isinstance(value, tuple):
            return tuple(whole(part) for part in value)
        return np.round(3 * value).astype(int) if isinstance(value, np.ndarray) else value

    def floats(value):
        if isinstance(value, tuple):
            return tuple(floats(part) for part in value)
        return value.astype(float) if isinstance(value, np.ndarray) else value

    arguments = whole(calls()[function])
    got, want = function(*arguments), function(*floats(arguments))
    for a, b in zip(arrays((got,)), arrays((want,)), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    with np.errstate(all="raise"):
        loud = function(*arguments)
    for got, want in zip(arrays((loud,)), arrays((quiet,)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_no_tokens_change_nothing():
    q, k, v = np.zeros((2, 4, 0, 3)), np.zeros((2, 2, 0, 3)), np.zeros((2, 2, 0, 5))
    cache = kv_cache_start(2, 2, 4, 3, 5)
    for chunk in (None, 3):
        out, after = prefill(q, k, v, cache, chunk)
        assert out.shape == (2, 4, 0, 5)
        assert after.length == 0
    assert chunked_causal_attention(q, k, v, 3).shape == (2, 4, 0, 5)
    keys = np.ones((2, 2, 6, 3))
    assert chunked_causal_attention(q, keys, keys, 3).shape == (2, 4, 0, 3)
    queries = np.ones((2, 4, 6, 3))
    assert not chunked_causal_attention(queries, k, v, 4).any(), "no keys: zeros"
    grads = chunked_causal_attention_backward(np.ones((2, 4, 6, 5)), queries, k, v, 4)
    assert [g.shape for g in grads] == [queries.shape, k.shape, v.shape]
    assert not grads[0].any()
    config, params = a_model(np.random.default_rng(0))
    start = language_model_start(config, 2)
    logits, state = language_model_prefill(np.zeros((2, 0), int), start, params, config)
    assert logits.shape == (2, 0, 11)
    assert state.length == 0


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6])
def test_more_tokens_than_slots_at_once(start):
    rng = np.random.default_rng(start)
    q, k, v = rng.normal(size=(3, 1, 2, start + 9, 4))
    cache = kv_cache_start(1, 2, 4, 4)
    first, rest = ([x[:, :, s] for x in (q, k, v)] for s in (slice(start), slice(start, None)))
    _, cache = prefill(*first, cache)
    out, cache = prefill(*rest, cache)
    agree(out, full(q, k, v, 4)[:, :, start:])
    np.testing.assert_array_equal(cache.k, k[:, :, ring_positions(start + 9, 4)])


def changed(**changes):
    """Arguments of one step with a cache of (2, 2, 4, 6) and (2, 2, 4, 3), one of them changed."""
    arguments = {"q_t": np.ones((2, 4, 1, 6)), "k_t": np.ones((2, 2, 1, 6))}
    arguments |= {"v_t": np.ones((2, 2, 1, 3))}
    arguments |= {"cache": (np.ones((2, 2, 4, 6)), np.ones((2, 2, 4, 3)), 3)}
    return arguments | changes


def frozen():
    x = np.ones((2, 2, 4, 6))
    x.flags.writeable = False
    return x


BAD = [
    (kv_cache_start, (0, 1, 1, 1), "batch: expected at least 1; got 0"),
    (kv_cache_start, (1, 1, 0, 1), "capacity: expected at least 1; got 0"),
    (kv_cache_start, (1, 1.5, 1, 1), "n_kv_heads: expected an integer; got 1.5"),
    (kv_cache_start, (1, 1, 1, 1, 0), "d_v: expected at least 1; got 0"),
    (
        kv_cache_start,
        {"batch": 1, "n_kv_heads": 1, "capacity": 1, "d": 1, "dtype": int},
        "dtype: expected a floating type; got int64",
    ),
    (ring_positions, (-1, 3), "length: expected at least 0; got -1"),
    (ring_positions, (3, 0), "capacity: expected at least 1; got 0"),
    (position_mask, (np.zeros((1, 2), int), np.arange(3)), r"q_positions: expected shape \(N,\)"),
    (position_mask, (np.arange(3), np.arange(3.0)), "k_positions: expected integers; got dtype"),
    (position_mask, (np.arange(3), np.arange(3), 0), "window: expected at least 1; got 0"),
    (kv_cache_bytes, (1, 1, 1, -1, 1), "tokens: expected at least 0; got -1"),
    (kv_cache_bytes, (1, 1, 1, 1, 0.5), "itemsize: expected an integer; got 0.5"),
    (kv_cache_step, changed(q_t=np.ones((2, 4, 2, 6))), r"q_t: expected one token, .*\(2, 4, 2, 6"),
    (kv_cache_step, changed(q_t=np.ones((2, 4, 6))), r"q_t: expected shape \(B, H, 1, d\); got"),
    (kv_cache_step, changed(q_t=np.ones((2, 3, 1, 6))), r"q_t: expected a multiple of H_kv = 2"),
    (kv_cache_step, changed(q_t=np.ones((2, 4, 1, 5))), r"q_t: .*\(2, H, 1, 6\) to match cache.k"),
    (kv_cache_step, changed(k_t=np.ones((2, 4, 1, 6))), r"k_t: .*\(2, 2, 1, 6\) to match cache.k"),
    (kv_cache_step, changed(v_t=np.ones((2, 2, 1, 6))), r"v_t: .*\(2, 2, 1, 3\) to match cache.v"),
    (kv_cache_step, changed(cache=(1, 2)), r"cache: expected \(k, v, length\); got 2 parts"),
    (
        kv_cache_step,
        changed(cache=(np.ones((2, 2, 4)), np.ones((2, 2, 4, 3)), 0)),
        r"cache.k: expected shape \(B, H_kv, M, d\); got \(2, 2, 4\)",
    ),
    (
        kv_cache_step,
        changed(cache=(np.ones((2, 2, 0, 6)), np.ones((2, 2, 0, 3)), 0)),
        r"cache.k: expected no axis of length 0; got shape \(2, 2, 0, 6\)",
    ),
    (
        kv_cache_step,
        changed(cache=(np.ones((2, 2, 4, 6)), np.ones((2, 2, 5, 3)), 0)),
        r"cache.v: expected shape \(2, 2, 4, d_v\) to match cache.k",
    ),
    (
        kv_cache_step,
        changed(cache=(np.ones((2, 2, 4, 6)), np.ones((2, 2, 4, 3)), -1)),
        "cache.length: expected at least 0; got -1",
    ),
    (
        kv_cache_step,
        changed(cache=(frozen(), np.ones((2, 2, 4, 3)), 3), in_place=True),
        "cache.k: expected a writeable array of floats",
    ),
    (
        kv_cache_step,
        changed(cache=(np.ones((2, 2, 4, 6)), np.ones((2, 2, 4, 3), int), 3), in_place=True),
        "cache.v: expected a writeable array of floats",
    ),
    (rope_cache_step, changed(cache=(1, 2)), r"cache: expected \(k, v, length\); got 2 parts"),
    (prefill, (*list(changed().values())[:3], changed()["cache"], 0), "chunk: .* 1; got 0"),
    (
        chunked_causal_attention,
        (np.ones((2, 3, 4, 5)), np.ones((2, 2, 4, 5)), np.ones((2, 2, 4, 5)), 2),
        r"q: expected a multiple of H_kv = 2 heads; got shape \(2, 3, 4, 5\)",
    ),
    (chunked_causal_attention, (*[np.ones((2, 3, 4, 5))] * 3, 2.5), "chunk: expected an integer"),
    (
        chunked_causal_attention,
        (np.ones((2, 3, 4, 5)), np.ones((2, 3, 4, 6)), np.ones((2, 3, 4, 6)), 2),
        r"k: expected shape \(2, H_kv, Nk, 5\) to match q",
    ),
    (
        chunked_causal_attention_backward,
        (*[np.ones((2, 3, 4, 5))] * 3, np.ones((2, 3, 4, 6)), 2),
        r"dout: expected shape \(2, 3, 4, 6\) to match q",
    ),
    (language_model_start, (Config(1, 5, 2, 3, 4),), "config.n_heads: expected a divisor of 5"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments) if isinstance(arguments, dict) else function(*arguments)


def test_bad_states_are_named():
    config, params = a_model(np.random.default_rng(0))
    state, tokens = language_model_start(config), np.zeros((1, 10), int)
    _, state = language_model_prefill(tokens, state, params, config)
    with pytest.raises(ValueError, match="at most max_len = 16 in all, 10 of them seen; got 10"):
        language_model_prefill(tokens, state, params, config)
    with pytest.raises(ValueError, match="state: expected 3 caches; got 2"):
        language_model_step(
            tokens[:, 0], ModelState(state.caches[:2], state.length), params, config
        )
    lacking = {n: p for n, p in params.items() if n != "layers.1.self_attn.wk"}
    with pytest.raises(ValueError, match=r"params: expected an entry 'self_attn.wk'"):
        language_model_step(tokens[:, 0], state, lacking, config)


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        kv_cache_step(**changed(q_t=np.zeros((2, 4, 2, 6))))
    with pytest.raises(jaxtyping.TypeCheckError):
        chunked_causal_attention(*[np.zeros((2, 3, 4))] * 3, 2)


@pytest.mark.parametrize("function", calls())
def test_every_function_states_shapes_and_errors(function):
    doc = inspect.getdoc(function)
    assert "ValueError:" in doc or "errors: as in" in doc
    assert "Shapes" in doc or function is kv_cache_bytes
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_everything_public_is_tried_here():
    public = {
        f
        for n, f in vars(library).items()
        if inspect.isfunction(f) and f.__module__ == library.__name__ and not n.startswith("_")
    }
    assert public == set(calls())
