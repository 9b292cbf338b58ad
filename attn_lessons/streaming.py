r"""Attention as tokens arrive: a key/value cache, a ring buffer, chunks, a language model's step.

The keys and values of a token do not change when others follow it: under a causal mask they are
computed once and kept. What is computed here is what the full pass computes, to rounding.

- q is ``(B, H, N, d)``, k and v are ``(B, H_kv, N, d)`` and ``(B, H_kv, N, d_v)``: H is a multiple
  of H_kv, and neighbouring query heads share a key head. Nothing is repeated for them.
- A cache holds M tokens. Token p goes to slot p mod M, where token p - M was: a cache shorter than
  the sequence is a ring buffer, and each token sees itself and the M - 1 before it.
- A token's position is how many came before it, not the slot it lies in.
- Functions are pure: a cache handed in stays as it is, which costs a copy of its arrays a call.
  With ``in_place=True`` they are written to instead, and the old cache is used up.
- A cache keeps its dtype: what is put into a float32 one is rounded.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Real
from numpy.typing import DTypeLike

from attn_lessons._arrays import as_count, as_float, check_rank, check_shape
from attn_lessons.attention import attention_backward, attention_forward
from attn_lessons.feedforward import ffn_forward
from attn_lessons.multihead import BIASES, WEIGHTS, linear_forward, merge_heads, split_heads
from attn_lessons.normalization import layernorm_forward
from attn_lessons.positions import learned_positions_forward, rope
from attn_lessons.transformer import (
    FEED_FORWARD,
    Config,
    Norm,
    branch_forward,
    embedding_forward,
)

EMPTY = -1  # the position of a slot that holds no token yet

Params = Mapping[str, Any]


# --- what is kept, and who may see it -------------------------------------------------------


class KVCache(NamedTuple):
    """The keys and values of the last M tokens.

    - k ``(B, H_kv, M, d)``, v ``(B, H_kv, M, d_v)``: token p in slot
      p mod M; slots not yet used hold anything.
    - length: how many tokens were put in, the evicted ones counted.

    A plain tuple of the three serves as well, and comes back as one.
    """

    k: Float[np.ndarray, "B H_kv M d"]
    v: Float[np.ndarray, "B H_kv M d_v"]
    length: int


Cache = tuple[Any, Any, Any]  # a KVCache, or a plain tuple


def kv_cache_start(
    batch: int,
    n_kv_heads: int,
    capacity: int,
    d: int,
    d_v: int | None = None,
    *,
    dtype: DTypeLike = float,
) -> KVCache:
    r"""An empty cache of M = ``capacity`` tokens, allocated once.

    Shapes: k ``(batch, n_kv_heads, capacity, d)``, v likewise with d_v,
    which is d unless said; length 0.

    ValueError: a size is no integer, or smaller than 1; ``dtype`` is no
    floating type.
    """
    sizes = {"batch": batch, "n_kv_heads": n_kv_heads, "capacity": capacity}
    shape = tuple(as_count(name, n, 1) for name, n in sizes.items())
    d = as_count("d", d, 1)
    d_v = d if d_v is None else as_count("d_v", d_v, 1)
    if np.dtype(dtype).kind != "f":
        raise ValueError(f"dtype: expected a floating type; got {np.dtype(dtype)}")
    return KVCache(np.zeros((*shape, d), dtype), np.zeros((*shape, d_v), dtype), 0)


def ring_positions(length: int, capacity: int) -> Integer[np.ndarray, "M"]:
    r"""Which token each slot of a ring buffer holds, -1 where none yet.

    .. math:: p_s = n - 1 - \bigl((n - 1 - s) \bmod M\bigr)

    the last of the n = ``length`` tokens with p mod M = s.

    Shapes: ``(capacity,)``.

    ValueError: ``length`` is no integer or negative, ``capacity`` no
    integer or smaller than 1.
    """
    length, capacity = as_count("length", length), as_count("capacity", capacity, 1)
    last = length - 1
    positions = last - (last - np.arange(capacity)) % capacity
    return np.where(positions < 0, EMPTY, positions)


def position_mask(
    q_positions: Integer[np.ndarray, "Nq"],
    k_positions: Integer[np.ndarray, "Nk"],
    window: int | None = None,
) -> Bool[np.ndarray, "Nq Nk"]:
    r"""Who may see whom, read off the positions of queries and keys.

    .. math:: \mathrm{mask}_{ij} = [\,p_j \ge 0\,]\,
              [\,0 \le p_i - p_j < w\,]

    The keys may lie in any order, as a ring buffer's do; -1 marks an
    empty slot. Without ``window`` w is infinite.

    Shapes: q_positions ``(Nq,)``, k_positions ``(Nk,)`` to ``(Nq,
    Nk)``, True = may attend.

    ValueError: positions have not one axis or are no integers;
    ``window`` is no integer, or smaller than 1.
    """
    q_positions = _positions("q_positions", q_positions)
    k_positions = _positions("k_positions", k_positions)
    distance = q_positions[:, None] - k_positions
    mask = (distance >= 0) & (k_positions >= 0)
    return mask if window is None else mask & (distance < as_count("window", window, 1))


def kv_cache_bytes(
    n_layers: int,
    n_kv_heads: int,
    d: int,
    tokens: int,
    itemsize: int,
    *,
    batch: int = 1,
    window: int | None = None,
) -> int:
    r"""Bytes of keys and values kept for ``tokens`` tokens.

    .. math:: 2 \cdot L \cdot H_{kv} \cdot d \cdot n \cdot
              \mathrm{itemsize} \cdot B

    The 2 is k and v. With ``window`` n is at most that.

    ValueError: a number is no integer, or negative.

    Source: Pope et al. 2022, section 3.3; H_kv: Shazeer 2019.
    """
    tokens = as_count("tokens", tokens)
    if window is not None:
        tokens = min(tokens, as_count("window", window))
    size = 2 * tokens
    sizes = {"n_layers": n_layers, "n_kv_heads": n_kv_heads, "d": d}
    for name, n in (sizes | {"itemsize": itemsize, "batch": batch}).items():
        size *= as_count(name, n)
    return size


# --- tokens as they come --------------------------------------------------------------------


def kv_cache_step(
    q_t: Real[np.ndarray, "B H 1 d"],
    k_t: Real[np.ndarray, "B H_kv 1 d"],
    v_t: Real[np.ndarray, "B H_kv 1 d_v"],
    cache: Cache,
    *,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B H 1 d_v"], Cache]:
    r"""One token's attention: to itself and to all tokens kept.

    .. math:: \mathrm{out}_t = \sum_{j > t - M}^{t}
              \operatorname{softmax}_j\Bigl(
              \frac{q_t \cdot k_j}{\sqrt d}\Bigr) v_j

    Its key and value are put in first, in the oldest one's slot when
    all are taken. There is no future among the keys: no mask. Returns
    ``(out_t, cache)``.

    Shapes: q_t ``(B, H, 1, d)``, k_t ``(B, H_kv, 1, d)``, v_t ``(B,
    H_kv, 1, d_v)``; cache as KVCache; out_t ``(B, H, 1, d_v)``.

    ValueError: shapes do not fit; H is no multiple of H_kv; the cache
    has not three parts; with ``in_place``, its arrays cannot be
    written to.

    Source: Shazeer 2019, section 2.4, "incremental".
    """
    q_t = as_float("q_t", q_t)
    check_rank("q_t", q_t, "B H 1 d")
    if q_t.shape[2] != 1:
        raise ValueError(f"q_t: expected one token, shape (B, H, 1, d); got {q_t.shape}")
    opened = _opened(cache, in_place)
    q_t, k_t, v_t = _new_tokens(("q_t", "k_t", "v_t"), (q_t, k_t, v_t), opened)
    out_t, opened = _extend(q_t, k_t, v_t, opened)
    return out_t, _closed(opened, cache)


def rope_cache_step(
    q_t: Real[np.ndarray, "B H 1 d"],
    k_t: Real[np.ndarray, "B H_kv 1 d"],
    v_t: Real[np.ndarray, "B H_kv 1 d_v"],
    cache: Cache,
    base: float = 10000.0,
    *,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B H 1 d_v"], Cache]:
    r"""One token's attention with rotary positions.

    .. math:: \mathrm{out}_t = \operatorname{step}(R_t q_t,\; R_t k_t,\;
              v_t), \qquad t = \mathrm{length}

    Keys are kept turned, each by its own position, once. t goes on
    counting when old tokens are evicted: a logit depends on the
    difference of two positions, and slots do not have it.

    Shapes, errors: as in kv_cache_step; besides, d is even.

    Source: Su et al. 2021, eq. (16).
    """
    t = _checked_cache(cache).length
    turned = rope(q_t, t, base), rope(k_t, t, base)
    return kv_cache_step(*turned, v_t, cache, in_place=in_place)


def prefill(
    q: Real[np.ndarray, "B H N d"],
    k: Real[np.ndarray, "B H_kv N d"],
    v: Real[np.ndarray, "B H_kv N d_v"],
    cache: Cache,
    chunk: int | None = None,
    *,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B H N d_v"], Cache]:
    r"""N tokens at once, as if kv_cache_step had taken them one by one.

    Token i of them stands at length + i: it sees itself, those before
    it and what the cache holds, M tokens in all. ``chunk`` takes them in
    pieces, the last one as short as it comes; logits are then ``(chunk,
    M + chunk)`` a head instead of ``(N, M + N)``. Returns ``(out,
    cache)``.

    Shapes: q ``(B, H, N, d)``, k ``(B, H_kv, N, d)``, v ``(B, H_kv, N,
    d_v)``; cache as KVCache; out ``(B, H, N, d_v)``.

    ValueError: as kv_cache_step; ``chunk`` is no integer, or smaller
    than 1.
    """
    opened = _opened(cache, in_place)
    q, k, v = _new_tokens(("q", "k", "v"), (q, k, v), opened)
    n = q.shape[2]
    out = np.empty((*q.shape[:3], v.shape[-1]), np.result_type(q, opened.k, opened.v))
    for rows in _pieces(n, max(n, 1) if chunk is None else chunk):
        out[:, :, rows], opened = _extend(q[:, :, rows], k[:, :, rows], v[:, :, rows], opened)
    return out, _closed(opened, cache)


# --- a whole sequence in chunks -------------------------------------------------------------


def chunked_causal_attention(
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B H_kv Nk d"],
    v: Real[np.ndarray, "B H_kv Nk d_v"],
    chunk: int,
    *,
    window: int | None = None,
) -> Float[np.ndarray, "B H Nq d_v"]:
    r"""Causal attention, ``chunk`` queries at a time.

    .. math:: \mathrm{out}_{[s,e)} = \operatorname{attention}\bigl(
              q_{[s,e)},\; k_{[0,\,e+N_k-N_q)},\; v_{[0,\,e+N_k-N_q)}
              \bigr)

    under the causal mask's rows s … e - 1: each row of logits is whole,
    so nothing has to be merged. The keys are views; what is allocated
    is ``(chunk, Nk)`` a head instead of ``(Nq, Nk)``. ``window`` w lets
    a query see the last w keys only, and with it the slice begins at
    s + Nk - Nq - w + 1.

    Shapes: as in attention_forward, with H_kv heads of keys. Aligned
    bottom-right, as causal_mask is.

    ValueError: shapes do not fit; ``chunk`` or ``window`` is no
    integer, or smaller than 1.
    """
    q, k, v = _sequences(q, k, v)
    out = np.empty((*q.shape[:3], v.shape[-1]), np.result_type(q, k, v))
    for rows, keys, mask in _chunks(q.shape[2], k.shape[2], chunk, window):
        out[:, :, rows] = _attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask)
    return out


def chunked_causal_attention_backward(
    dout: Real[np.ndarray, "B H Nq d_v"],
    q: Real[np.ndarray, "B H Nq d"],
    k: Real[np.ndarray, "B H_kv Nk d"],
    v: Real[np.ndarray, "B H_kv Nk d_v"],
    chunk: int,
    *,
    window: int | None = None,
) -> tuple[
    Float[np.ndarray, "B H Nq d"],
    Float[np.ndarray, "B H_kv Nk d"],
    Float[np.ndarray, "B H_kv Nk d_v"],
]:
    r"""Gradients by q, k and v, each chunk's probabilities made again.

    .. math:: dk = \sum_{\mathrm{chunks}} dk^{(c)}, \qquad
              dv = \sum_{\mathrm{chunks}} dv^{(c)}

    A query belongs to one chunk, a key to all that may see it. Nothing
    of the forward pass is kept: one more product a chunk for ``(chunk,
    Nk)`` of memory. Returns ``(dq, dk, dv)``.

    Shapes, errors: as in chunked_causal_attention; dout ``(B, H, Nq,
    d_v)``, each gradient as its array.
    """
    q, k, v = _sequences(q, k, v)
    dout = as_float("dout", dout)
    wanted = (*q.shape[:3], v.shape[-1])
    check_shape("dout", dout, wanted, f"to match q {q.shape} and v {v.shape}")
    dtype, h_kv = np.result_type(dout, q, k, v), k.shape[1]
    dq, dk, dv = (np.zeros(x.shape, dtype) for x in (q, k, v))
    for rows, keys, mask in _chunks(q.shape[2], k.shape[2], chunk, window):
        q_rows, dout_rows = _folded(q[:, :, rows], h_kv), _folded(dout[:, :, rows], h_kv)
        k_rows, v_rows = k[:, :, keys], v[:, :, keys]
        _, probs = attention_forward(q_rows, k_rows, v_rows, _for_group(mask, q, h_kv))
        gradients = attention_backward(dout_rows, q_rows, k_rows, v_rows, probs)
        dq[:, :, rows] = gradients[0].reshape(dq[:, :, rows].shape)
        dk[:, :, keys] += gradients[1]
        dv[:, :, keys] += gradients[2]
    return dq, dk, dv


# --- layers and a model, one token at a time ------------------------------------------------


def multihead_step(
    x: Real[np.ndarray, "B n C"],
    wq: Real[np.ndarray, "C E"],
    wk: Real[np.ndarray, "C E_kv"],
    wv: Real[np.ndarray, "C E_kv"],
    wo: Real[np.ndarray, "E C"],
    bq: Real[np.ndarray, "E"] | None,
    bk: Real[np.ndarray, "E_kv"] | None,
    bv: Real[np.ndarray, "E_kv"] | None,
    bo: Real[np.ndarray, "C"] | None,
    n_heads: int,
    cache: Cache,
    *,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B n C"], Cache]:
    r"""Causal multi-head self-attention of the next n tokens.

    Only theirs are projected; the past is in the cache, whose number of
    heads is H_kv. Returns ``(out, cache)``.

    Shapes: x and out ``(B, n, C)``, parameters as in
    multihead_forward; cache as KVCache, d = E / H.

    ValueError: shapes do not fit; ``n_heads`` does not divide E.
    """
    h_kv = _checked_cache(cache).k.shape[1]
    q = split_heads(linear_forward(x, wq, bq), n_heads)
    k = split_heads(linear_forward(x, wk, bk), h_kv)
    v = split_heads(linear_forward(x, wv, bv), h_kv)
    heads, cache = prefill(q, k, v, cache, in_place=in_place)
    return linear_forward(merge_heads(heads), wo, bo), cache


def encoder_block_step(
    x: Real[np.ndarray, "B n C"],
    params: Params,
    n_heads: int,
    cache: Cache,
    norm: Norm = "post",
    *,
    activation: str = "gelu",
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B n C"], Cache]:
    r"""The next n tokens through a causal encoder block.

    Norms, skip paths and the feed-forward layer work on each token by
    itself: attention alone needs the past. Returns ``(out, cache)``.

    Shapes: x and out ``(B, n, C)``, parameters as in
    encoder_block_forward; cache as KVCache, d = C / H.

    ValueError: a name is missing; and as encoder_block_forward and
    multihead_step.
    """

    def attend(y: np.ndarray) -> tuple[np.ndarray, Any]:
        weights = {n: _entry(params, f"self_attn.{n}") for n in WEIGHTS + BIASES}
        return multihead_step(y, **weights, n_heads=n_heads, cache=cache, in_place=in_place)

    def feed(y: np.ndarray) -> tuple[np.ndarray, Any]:
        options: Any = {"activation": activation}
        return ffn_forward(y, *(_entry(params, n) for n in FEED_FORWARD), **options)

    a, first = branch_forward(x, attend, *_pair(params, "norm1"), norm, eps=eps)
    out, _ = branch_forward(a, feed, *_pair(params, "norm2"), norm, eps=eps)
    return out, first.inner


class ModelState(NamedTuple):
    """All that a language model keeps of the tokens it has seen.

    - caches: a KVCache a layer.
    - length: the number of tokens, which is the next one's position.
    """

    caches: tuple[KVCache, ...]
    length: int


def language_model_start(
    config: Config,
    batch: int = 1,
    *,
    capacity: int | None = None,
    dtype: DTypeLike = float,
) -> ModelState:
    r"""The state before the first token.

    ``capacity`` less than ``config.max_len`` makes of each layer's
    attention a window of that many tokens.

    Shapes: a cache a layer, ``(batch, n_heads, capacity, d_model /
    n_heads)``.

    ValueError: a size is no integer, or smaller than 1; ``n_heads``
    does not divide ``d_model``.
    """
    n_heads, d_model = config.n_heads, config.d_model
    if as_count("config.n_heads", n_heads, 1) and d_model % n_heads:
        raise ValueError(f"config.n_heads: expected a divisor of {d_model}; got {n_heads}")
    capacity = config.max_len if capacity is None else capacity
    caches = [
        kv_cache_start(batch, n_heads, capacity, d_model // n_heads, dtype=dtype)
        for _ in range(config.n_layers)
    ]
    return ModelState(tuple(caches), 0)


def language_model_prefill(
    tokens: Integer[np.ndarray, "B n"],
    state: ModelState,
    params: Params,
    config: Config,
    chunk: int | None = None,
    *,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B n V"], ModelState]:
    r"""Logits after each of the next n tokens, and the state behind them.

    .. math:: \mathrm{logits}_{t} = \mathrm{language\_model\_forward}
              (\mathrm{tokens}_{0 \dots t})_{t}

    ``chunk`` sends them through the model in pieces. Returns ``(logits,
    state)``.

    Shapes: tokens ``(B, n)``, logits ``(B, n, V)``.

    ValueError: a name is missing; there are more than ``max_len``
    tokens in all; tokens are out of range; the state is of another
    model.
    """
    tokens = np.asarray(tokens)
    check_rank("tokens", tokens, "B n")
    n, pieces = tokens.shape[1], []
    if state.length + n > config.max_len:
        raise ValueError(
            f"tokens: expected at most max_len = {config.max_len} in all, "
            f"{state.length} of them seen; got {n}"
        )
    if len(state.caches) != config.n_layers:
        raise ValueError(f"state: expected {config.n_layers} caches; got {len(state.caches)}")
    for rows in _pieces(n, max(n, 1) if chunk is None else chunk):
        logits, state = _next_tokens(tokens[:, rows], state, params, config, in_place)
        pieces.append(logits)
    vocab = len(np.asarray(_entry(params, "embed.weight")))
    return np.concatenate(pieces or [np.zeros((len(tokens), 0, vocab))], axis=1), state


def language_model_step(
    token: Integer[np.ndarray, "B"],
    state: ModelState,
    params: Params,
    config: Config,
    *,
    in_place: bool = False,
) -> tuple[Float[np.ndarray, "B V"], ModelState]:
    r"""One token in, the logits of the next one out.

    Returns ``(logits, state)``: the row that language_model_forward
    has last for all tokens so far, at the cost of one token.

    Shapes: token ``(B,)``, logits ``(B, V)``.

    ValueError: as language_model_prefill.
    """
    token = np.asarray(token)
    check_rank("token", token, "B")
    arguments: Any = (state, params, config)
    logits, state = language_model_prefill(token[:, None], *arguments, in_place=in_place)
    return logits[:, 0], state


def _next_tokens(tokens, state, params, config, in_place):
    places = np.arange(state.length, state.length + tokens.shape[1])
    h = embedding_forward(_entry(params, "embed.weight"), tokens)
    h = h + learned_positions_forward(_entry(params, "position.weight"), places)
    options: Any = {"activation": config.activation, "eps": config.eps, "in_place": in_place}
    caches: list[Any] = []
    for i, cache in enumerate(state.caches):
        block = _Below(params, f"layers.{i}.")
        h, cache = encoder_block_step(h, block, config.n_heads, cache, config.norm, **options)
        caches.append(cache)
    hidden = layernorm_forward(h, *_pair(params, "norm"), config.eps)
    state = ModelState(tuple(caches), state.length + tokens.shape[1])
    if "head.weight" in params:
        return linear_forward(hidden, *_pair(params, "head")), state
    return linear_forward(hidden, as_float("embed.weight", params["embed.weight"]).T), state


# --- the steps ------------------------------------------------------------------------------


def _extend(q, k, v, cache):
    """Some tokens more in a cache whose arrays are ours to write to."""
    n, capacity = q.shape[2], cache.k.shape[2]
    places = np.arange(cache.length, cache.length + n)
    if n == 1 or cache.length + n <= capacity:
        # None of them evicts what another one has yet to see.
        cache = _put(k, v, cache)
        kept = min(cache.length, capacity)
        # A lone token is the last: all keys are its past, whatever their order.
        mask = None if n == 1 else position_mask(places, np.arange(kept))
        return _attend(q, cache.k[:, :, :kept], cache.v[:, :, :kept], mask), cache
    kept = min(cache.length, capacity)
    held = np.concatenate([ring_positions(cache.length, capacity)[:kept], places])
    keys, values = (
        np.concatenate([old[:, :, :kept], new], axis=2) for old, new in ((cache.k, k), (cache.v, v))
    )
    out = _attend(q, keys, values, position_mask(places, held, capacity))
    return out, _put(k, v, cache)


def _put(k, v, cache):
    n, capacity = k.shape[2], cache.k.shape[2]
    length = cache.length + n
    # Of more tokens than slots, the last ones stay.
    last = slice(max(n - capacity, 0), n)
    slots = np.arange(cache.length + last.start, length) % capacity
    cache.k[:, :, slots], cache.v[:, :, slots] = k[:, :, last], v[:, :, last]
    return KVCache(cache.k, cache.v, length)


def _attend(q, k, v, mask):
    """Attention where a group of query heads are rows of one key head."""
    out, _ = attention_forward(_folded(q, k.shape[1]), k, v, _for_group(mask, q, k.shape[1]))
    return out.reshape(*q.shape[:3], v.shape[-1])


def _folded(x, h_kv):
    b, h, n, d = x.shape
    return x.reshape(b, h_kv, h // h_kv * n, d)


def _for_group(mask, q, h_kv):
    return None if mask is None else np.tile(mask, (q.shape[1] // h_kv, 1))


def _pieces(n: int, chunk: int) -> Iterator[slice]:
    chunk = as_count("chunk", chunk, 1)
    return (slice(start, min(start + chunk, n)) for start in range(0, n, chunk))


def _chunks(n_q, n_k, chunk, window):
    """The rows of each chunk, the keys some of them see, and who sees whom there."""
    window = None if window is None else as_count("window", window, 1)
    for rows in _pieces(n_q, chunk):
        first, end = rows.start + n_k - n_q, max(rows.stop + n_k - n_q, 0)
        keys = slice(0 if window is None else max(first - window + 1, 0), end)
        places = np.arange(first, rows.stop + n_k - n_q)
        yield rows, keys, position_mask(places, np.arange(keys.start, end), window)


# --- at the door ----------------------------------------------------------------------------


def _positions(name, positions):
    positions = np.asarray(positions)
    check_rank(name, positions, "N")
    if positions.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers; got dtype {positions.dtype}")
    return positions.astype(np.int64)  # unsigned ones would wrap below 0


def _checked_cache(cache: Cache) -> KVCache:
    if len(cache) != 3:
        raise ValueError(f"cache: expected (k, v, length); got {len(cache)} parts")
    k, v = as_float("cache.k", cache[0]), as_float("cache.v", cache[1])
    check_rank("cache.k", k, "B H_kv M d")
    if 0 in k.shape:
        raise ValueError(f"cache.k: expected no axis of length 0; got shape {k.shape}")
    check_shape("cache.v", v, (*k.shape[:3], "d_v"), f"to match cache.k {k.shape}")
    return KVCache(k, v, as_count("cache.length", cache[2]))


def _opened(cache: Cache, in_place: bool) -> KVCache:
    """The cache with arrays that may be written to."""
    k, v, length = _checked_cache(cache)
    if not in_place:
        return KVCache(k.copy(), v.copy(), length)
    for name, given, array in (("k", cache[0], k), ("v", cache[1], v)):
        if given is not array or not array.flags.writeable:
            raise ValueError(f"cache.{name}: expected a writeable array of floats; got {given!r}")
    return KVCache(k, v, length)


def _closed(cache: KVCache, given: Cache) -> Cache:
    return cache if isinstance(given, KVCache) else (cache.k, cache.v, cache.length)


def _new_tokens(names, tokens, cache):
    q, k, v = (as_float(name, x) for name, x in zip(names, tokens, strict=True))
    b, h_kv, _, d = cache.k.shape
    check_rank(names[0], q, "B H N d")
    n = q.shape[2]
    why = f"to match cache.k {cache.k.shape}"
    check_shape(names[0], q, (b, "H", n, d), why)
    check_shape(names[1], k, (b, h_kv, n, d), f"{why} and {names[0]} {q.shape}")
    check_shape(names[2], v, (b, h_kv, n, cache.v.shape[-1]), f"to match cache.v {cache.v.shape}")
    _check_groups(names[0], q, h_kv)
    return q, k, v


def _sequences(q, k, v):
    q, k, v = as_float("q", q), as_float("k", k), as_float("v", v)
    check_rank("q", q, "B H Nq d")
    b, _, _, d = q.shape
    check_shape("k", k, (b, "H_kv", "Nk", d), f"to match q {q.shape}")
    check_shape("v", v, (*k.shape[:3], "d_v"), f"to match k {k.shape}")
    _check_groups("q", q, k.shape[1])
    return q, k, v


def _check_groups(name, q, h_kv):
    if h_kv == 0 or q.shape[1] % h_kv:
        raise ValueError(f"{name}: expected a multiple of H_kv = {h_kv} heads; got shape {q.shape}")


class _Below(Mapping[str, Any]):
    """The parameters whose names begin alike, without that beginning and without a copy."""

    def __init__(self, params: Params, prefix: str) -> None:
        self._params, self._prefix = params, prefix

    def __getitem__(self, name: str) -> Any:
        return self._params[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        n = len(self._prefix)
        return (name[n:] for name in self._params if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _entry(params: Params, name: str) -> Any:
    if name not in params:
        raise ValueError(f"params: expected an entry {name!r}; got none of that name")
    return params[name]


def _pair(params: Params, prefix: str) -> tuple[Any, Any]:
    return _entry(params, f"{prefix}.weight"), _entry(params, f"{prefix}.bias")
