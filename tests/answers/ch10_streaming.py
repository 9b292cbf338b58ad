"""Chapter 10 in many hands."""

import collections
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong

# ----------------------------------------------------------------------------- kv_cache_bytes


@right("kv_cache_bytes")
def bytes_plain(n_layers, n_kv_heads, d, tokens, itemsize):
    return 2 * n_layers * n_kv_heads * d * tokens * itemsize


@right("kv_cache_bytes")
def bytes_by_token(n_layers, n_kv_heads, d, tokens, itemsize):
    key = value = n_kv_heads * d * itemsize
    per_token = n_layers * (key + value)
    return per_token * tokens


@right("kv_cache_bytes")
def bytes_prod(*sizes):
    return np.prod(np.array([2, *sizes], dtype=np.int64))


@right("kv_cache_bytes")
def bytes_math(n_layers, n_kv_heads, d, tokens, itemsize):
    return math.prod((n_layers, n_kv_heads, d, tokens, itemsize)) << 1


@right("kv_cache_bytes")
def bytes_as_float(n_layers, n_kv_heads, d, tokens, itemsize):
    return 2.0 * n_layers * n_kv_heads * d * tokens * itemsize


@right("kv_cache_bytes")
def bytes_torch(*sizes):
    return torch.prod(torch.tensor(sizes, dtype=torch.int64)) * 2


@right("kv_cache_bytes")
def bytes_reduced(*sizes):
    return functools.reduce(lambda a, b: a * b, sizes, 2)


@wrong("kv_cache_bytes")
def bytes_added(n_layers, n_kv_heads, d, tokens, itemsize):
    return 2 * (n_layers + n_kv_heads) * d * tokens * itemsize


@wrong("kv_cache_bytes")
def bytes_without_width(n_layers, n_kv_heads, d, tokens, itemsize):
    return 2 * n_layers * n_kv_heads * tokens * itemsize


# ----------------------------------------------------------------------------- ring_positions


@right("ring_positions")
def ring_written(length, capacity):
    slots = [-1] * capacity
    for p in range(length):
        slots[p % capacity] = p
    return slots


@right("ring_positions")
def ring_arithmetic(length, capacity):
    slots = np.arange(capacity)
    p = slots + capacity * ((length - 1 - slots) // capacity)
    return np.where(slots < length, p, -1)


@right("ring_positions")
def ring_scattered(length, capacity):
    slots = np.full(capacity, -1)
    kept = np.arange(max(0, length - capacity), length)
    slots[kept % capacity] = kept
    return slots


@right("ring_positions")
def ring_rolled(length, capacity):
    kept = np.arange(max(0, length - capacity), length)
    padded = np.concatenate([kept, -np.ones(capacity - len(kept))])
    return np.roll(padded, length % capacity if length > capacity else 0)


@right("ring_positions")
def ring_torch(length, capacity):
    slots = torch.arange(capacity)
    p = length - 1 - torch.remainder(length - 1 - slots, capacity)
    return p.clamp(min=-1)


@right("ring_positions")
def ring_searched(length, capacity):
    return tuple(
        max((p for p in range(max(0, length - capacity), length) if p % capacity == s), default=-1)
        for s in range(capacity)
    )


@right("ring_positions")
def ring_deque(length, capacity):
    kept = collections.deque(range(length), maxlen=capacity)
    slots = np.full(capacity, -1, dtype=np.int32)
    for p in kept:
        slots[p % capacity] = p
    return slots


@wrong("ring_positions")
def ring_of_ones(length, capacity):
    return np.where(ring_scattered(length, capacity) < 0, -1, 1)


@wrong("ring_positions")
def ring_backwards(length, capacity):
    return ring_scattered(length, capacity)[::-1]


@wrong("ring_positions")
def ring_turned_by_two(length, capacity):
    return np.roll(ring_scattered(length, capacity), 2)


# ------------------------------------------------------------------------------ position_mask


@right("position_mask")
def mask_plain(q_positions, k_positions, window=None):
    distance = q_positions[:, None] - k_positions[None, :]
    mask = (distance >= 0) & (k_positions >= 0)
    if window is not None:
        mask &= distance < window
    return mask


@right("position_mask")
def mask_loops(q_positions, k_positions, window=None):
    rows = []
    for p in q_positions:
        row = []
        for j in k_positions:
            row.append(bool(0 <= j <= p and (window is None or p - j < window)))
        rows.append(row)
    return rows


@right("position_mask")
def mask_outer(q_positions, k_positions, window=None):
    mask = np.greater_equal.outer(q_positions, k_positions)
    mask = mask & (k_positions != -1)
    if window:
        mask = mask & np.less.outer(q_positions - window, k_positions)
    return mask


@right("position_mask")
def mask_torch(q_positions, k_positions, window=None):
    q, k = torch.tensor(q_positions)[:, None], torch.tensor(k_positions)[None]
    hidden = (k > q) | (k < 0)
    if window is not None:
        hidden |= k <= q - window
    return ~hidden


@right("position_mask")
def mask_by_bounds(q_positions, k_positions, window=None):
    oldest = np.zeros_like(q_positions) if window is None else q_positions - window + 1
    oldest = np.maximum(oldest, 0)
    k = np.asarray(k_positions)
    return np.stack([(k >= o) & (k <= p) for o, p in zip(oldest, q_positions, strict=True)])


@right("position_mask")
def mask_meshgrid(q_positions, k_positions, window=None):
    q, k = np.meshgrid(q_positions, k_positions, indexing="ij")
    far = np.inf if window is None else window
    return np.logical_and.reduce([k >= 0, k <= q, q - k < far])


@mutating("position_mask")
def mask_marks_empty_slots(q_positions, k_positions, window=None):
    k_positions[k_positions < 0] = 10**9
    mask = q_positions[:, None] >= k_positions
    if window is not None:
        mask &= q_positions[:, None] - k_positions < window
    return mask


@wrong("position_mask")
def mask_all(q_positions, k_positions, window=None):
    return np.ones((len(q_positions), len(k_positions)), bool)


@wrong("position_mask")
def mask_of_the_last_query(q_positions, k_positions, window=None):
    mask = mask_plain(q_positions, k_positions, window)
    return np.repeat(mask[-1:], len(mask), axis=0)


@wrong("position_mask")
def mask_window_doubled(q_positions, k_positions, window=None):
    return mask_plain(q_positions, k_positions, window and 2 * window)


# ------------------------------------------------------------------------------ kv_cache_step


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@right("kv_cache_step")
def step_plain(q_t, k_t, v_t, cache):
    k, v, length = cache
    k, v = k.copy(), v.copy()
    M = k.shape[2]
    k[:, :, length % M] = k_t[:, :, 0]
    v[:, :, length % M] = v_t[:, :, 0]
    n = min(length + 1, M)
    G = q_t.shape[1] // k.shape[1]
    keys, values = np.repeat(k[:, :, :n], G, axis=1), np.repeat(v[:, :, :n], G, axis=1)
    probs = softmax(q_t @ keys.transpose(0, 1, 3, 2) / np.sqrt(q_t.shape[-1]))
    return probs @ values, (k, v, length + 1)


@right("kv_cache_step")
def step_masked(q_t, k_t, v_t, cache):
    """All slots, the empty ones hidden by -inf."""
    k, v = np.array(cache[0], float), np.array(cache[1], float)
    length = cache[2]
    B, H, _, d = q_t.shape
    Hkv, M = k.shape[1:3]
    slot = length % M
    k[:, :, slot : slot + 1], v[:, :, slot : slot + 1] = k_t, v_t
    q = q_t.reshape(B, Hkv, H // Hkv, d)
    z = np.einsum("bgid,bgmd->bgim", q, k) * d**-0.5
    z = z + np.where(np.arange(M) <= length, 0, -np.inf)
    out = np.einsum("bgim,bgme->bgie", softmax(z), v).reshape(B, H, 1, -1)
    return [out, [k, v, length + 1]]


@right("kv_cache_step")
def step_loops(q_t, k_t, v_t, cache):
    k, v = [x.tolist() for x in cache[:2]]
    length = cache[2]
    (B, H, _, d), (_, Hkv, M, _) = q_t.shape, cache[0].shape
    for b in range(B):
        for g in range(Hkv):
            k[b][g][length % M] = k_t[b, g, 0].tolist()
            v[b][g][length % M] = v_t[b, g, 0].tolist()
    out = np.zeros((B, H, 1, cache[1].shape[-1]))
    for b in range(B):
        for h in range(H):
            g = h // (H // Hkv)
            slots = range(min(length + 1, M))
            z = [sum(a * c for a, c in zip(q_t[b, h, 0], k[b][g][s], strict=True)) for s in slots]
            z = [float(x) / math.sqrt(d) for x in z]
            w = [math.exp(x - max(z)) for x in z]
            for s in slots:
                out[b, h, 0] += w[s] / sum(w) * np.array(v[b][g][s])
    return out, (k, v, length + 1)


@right("kv_cache_step")
def step_torch(q_t, k_t, v_t, cache):
    q_t, k_t, v_t = (torch.tensor(x) for x in (q_t, k_t, v_t))
    k, v, length = torch.tensor(cache[0]), torch.tensor(cache[1]), cache[2]
    M = k.shape[2]
    k[:, :, length % M], v[:, :, length % M] = k_t[:, :, 0], v_t[:, :, 0]
    n = min(length + 1, M)
    G = q_t.shape[1] // k.shape[1]
    keys, values = (x[:, :, :n].repeat_interleave(G, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q_t, keys, values), (k, v, torch.tensor(length + 1))


@right("kv_cache_step")
def step_in_order(q_t, k_t, v_t, cache):
    """Tokens gathered from the oldest to the newest; the sum does not mind."""
    k, v, length = cache
    M, H = k.shape[2], q_t.shape[1]
    where = np.arange(M) == length % M
    k, v = (np.where(where[:, None], new, old) for new, old in ((k_t, k), (v_t, v)))
    order = [p % M for p in range(max(0, length + 1 - M), length + 1)]
    heads = np.arange(H) // (H // k.shape[1])
    keys, values = k[:, heads][:, :, order], v[:, heads][:, :, order]
    z = (q_t * keys).sum(-1, keepdims=True).swapaxes(-1, -2) / q_t.shape[-1] ** 0.5
    return softmax(z) @ values, (k, v, length + 1)


@right("kv_cache_step")
def step_online(q_t, k_t, v_t, cache):
    """One key after the other, the running maximum carried."""
    k, v, length = cache[0].astype(float), cache[1].astype(float), int(cache[2])
    M, d = k.shape[2:]
    k[:, :, length % M], v[:, :, length % M] = k_t[:, :, 0], v_t[:, :, 0]
    G = q_t.shape[1] // k.shape[1]
    m, s, o = -np.inf, 0.0, 0.0
    for slot in range(min(length + 1, M)):
        key, value = (np.repeat(x[:, :, slot : slot + 1], G, axis=1) for x in (k, v))
        z = (q_t * key).sum(-1, keepdims=True) / d**0.5
        new = np.maximum(m, z)
        scale, weight = np.exp(m - new), np.exp(z - new)
        m, s, o = new, s * scale + weight, o * scale + weight * value
    return o / s, (k, v, length + 1)


@right("kv_cache_step")
def step_in_float32(q_t, k_t, v_t, cache):
    args = [np.asarray(x, np.float32) for x in (q_t, k_t, v_t, *cache[:2])]
    out, after = step_plain(*args[:3], (*args[3:], cache[2]))
    return out.astype(np.float32), after


@mutating("kv_cache_step")
def step_in_place(q_t, k_t, v_t, cache):
    k, v, length = cache
    M = k.shape[2]
    k[:, :, length % M] = k_t[:, :, 0]
    v[:, :, length % M] = v_t[:, :, 0]
    out, _ = step_plain(q_t, k_t, v_t, (k, v, length))
    return out, (k, v, length + 1)


@mutating("kv_cache_step")
def step_scales_its_query(q_t, k_t, v_t, cache):
    out = step_plain(q_t, k_t, v_t, cache)
    q_t /= 7.0
    return out


@wrong("kv_cache_step")
def step_uniform(q_t, k_t, v_t, cache):
    _, (k, v, length) = step_plain(q_t, k_t, v_t, cache)
    n = min(length, k.shape[2])
    mean = np.repeat(v[:, :, :n].mean(axis=2, keepdims=True), q_t.shape[1] // k.shape[1], axis=1)
    return mean, (k, v, length)


@wrong("kv_cache_step")
def step_returns_the_output_alone(q_t, k_t, v_t, cache):
    return step_plain(q_t, k_t, v_t, cache)[0]


@wrong("kv_cache_step")
def step_without_length(q_t, k_t, v_t, cache):
    out, (k, v, _) = step_plain(q_t, k_t, v_t, cache)
    return out, (k, v)


@wrong("kv_cache_step")
def step_scaled_by_d(q_t, k_t, v_t, cache):
    return step_plain(q_t / q_t.shape[-1] ** 0.5, k_t, v_t, cache)


# ---------------------------------------------------------------------------- rope_cache_step


def turn(x, position, base):
    d = x.shape[-1]
    angle = position * base ** (-np.arange(0, d, 2) / d)
    y = np.empty_like(x)
    y[..., 0::2] = x[..., 0::2] * np.cos(angle) - x[..., 1::2] * np.sin(angle)
    y[..., 1::2] = x[..., 0::2] * np.sin(angle) + x[..., 1::2] * np.cos(angle)
    return y


@right("rope_cache_step")
def rope_plain(q_t, k_t, v_t, cache, base=10000.0):
    p = cache[2]
    return step_plain(turn(q_t, p, base), turn(k_t, p, base), v_t, cache)


@right("rope_cache_step")
def rope_as_matrix(q_t, k_t, v_t, cache, base=10000.0):
    d = q_t.shape[-1]
    R = np.zeros((d, d))
    for i in range(d // 2):
        a = cache[2] * base ** (-2 * i / d)
        R[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return step_masked(q_t @ R.T, k_t @ R.T, v_t, cache)


@right("rope_cache_step")
def rope_complex(q_t, k_t, v_t, cache, base=10000.0):
    def turned(x):
        pairs = torch.view_as_complex(torch.tensor(x).double().unflatten(-1, (-1, 2)).contiguous())
        d = x.shape[-1]
        angle = cache[2] * base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    q, k = turned(q_t).numpy(), turned(k_t).numpy()
    held = tuple(np.asarray(x, float) for x in cache[:2])
    return step_torch(q, k, np.asarray(v_t, float), (*held, cache[2]))


@right("rope_cache_step")
def rope_by_loops(q_t, k_t, v_t, cache, base=10000.0):
    q, k = (np.array(x, float) for x in (q_t, k_t))
    for x in (q, k):
        for i in range(0, x.shape[-1], 2):
            a = cache[2] / base ** (i / x.shape[-1])
            first, second = x[..., i].copy(), x[..., i + 1].copy()
            x[..., i] = first * math.cos(a) - second * math.sin(a)
            x[..., i + 1] = first * math.sin(a) + second * math.cos(a)
    return step_loops(q, k, v_t, cache)


@right("rope_cache_step")
def rope_both_at_once(q_t, k_t, v_t, cache, base=10000.0):
    both = turn(np.concatenate([q_t, k_t], axis=1), np.array([cache[2]])[:, None], base)
    q, k = np.split(both, [q_t.shape[1]], axis=1)
    return step_in_order(q, k, v_t, cache)


@right("rope_cache_step")
def rope_from_the_library(q_t, k_t, v_t, cache, base=10000.0):
    from attn_lessons.positions import rope

    at = np.array([cache[2]])
    return step_online(rope(q_t, at, base), rope(k_t, at, base), v_t, cache)


@mutating("rope_cache_step")
def rope_into_the_key(q_t, k_t, v_t, cache, base=10000.0):
    k_t[:] = turn(k_t, cache[2], base)
    return step_plain(turn(q_t, cache[2], base), k_t, v_t, cache)


@mutating("rope_cache_step")
def rope_in_place(q_t, k_t, v_t, cache, base=10000.0):
    return step_in_place(turn(q_t, cache[2], base), turn(k_t, cache[2], base), v_t, cache)


@wrong("rope_cache_step")
def rope_in_degrees(q_t, k_t, v_t, cache, base=10000.0):
    at = math.radians(cache[2])
    return step_plain(turn(q_t, at, base), turn(k_t, at, base), v_t, cache)


@wrong("rope_cache_step")
def rope_query_ahead(q_t, k_t, v_t, cache, base=10000.0):
    return step_plain(turn(q_t, cache[2] + 1, base), turn(k_t, cache[2], base), v_t, cache)


# ------------------------------------------------------------------- chunked_causal_attention


@right("chunked_causal_attention")
def chunks_plain(q, k, v, chunk):
    N, d = q.shape[2:]
    outs = []
    for start in range(0, N, chunk):
        end = min(start + chunk, N)
        z = q[:, :, start:end] @ k[:, :, :end].swapaxes(-1, -2) / np.sqrt(d)
        mask = np.tri(end - start, end, start, dtype=bool)
        outs.append(softmax(np.where(mask, z, -np.inf)) @ v[:, :, :end])
    return np.concatenate(outs, axis=2)


@right("chunked_causal_attention")
def chunks_ignored(q, k, v, chunk):
    z = np.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    z[:, :, ~np.tri(q.shape[2], dtype=bool)] = -np.inf
    return np.einsum("bhij,bhje->bhie", softmax(z), v)


@right("chunked_causal_attention")
def chunks_of_rows(q, k, v, chunk):
    """A query at a time inside each chunk: no mask at all."""
    out = np.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
    for start in range(0, q.shape[2], chunk):
        for i in range(start, min(start + chunk, q.shape[2])):
            keys, values = k[:, :, : i + 1], v[:, :, : i + 1]
            z = (keys @ q[:, :, i, :, None])[..., 0] * q.shape[-1] ** -0.5
            out[:, :, i] = (softmax(z)[..., None, :] @ values)[..., 0, :]
    return out


@right("chunked_causal_attention")
def chunks_torch(q, k, v, chunk):
    q, k, v = (torch.tensor(x) for x in (q, k, v))
    outs, start = [], 0
    for part in q.split(chunk, dim=2):
        end = start + part.shape[2]
        mask = torch.ones(part.shape[2], end, dtype=torch.bool).tril(start)
        outs.append(
            F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end], attn_mask=mask)
        )
        start = end
    return torch.cat(outs, dim=2)


@right("chunked_causal_attention")
def chunks_merged(q, k, v, chunk):
    """Chunks of keys as well, their partial softmaxes merged."""
    B, H, N, d = q.shape
    m, s = np.full((B, H, N, 1), -np.inf), np.zeros((B, H, N, 1))
    o = np.zeros((B, H, N, v.shape[-1]))
    for start in range(0, N, chunk):
        keys, values = k[:, :, start : start + chunk], v[:, :, start : start + chunk]
        rows = slice(start, N)
        z = q[:, :, rows] @ keys.swapaxes(-1, -2) / np.sqrt(d)
        z = np.where(np.tri(N - start, keys.shape[2], dtype=bool), z, -np.inf)
        new = np.maximum(m[:, :, rows], z.max(-1, keepdims=True))
        old, weights = np.exp(m[:, :, rows] - new), np.exp(z - new)
        s[:, :, rows] = s[:, :, rows] * old + weights.sum(-1, keepdims=True)
        o[:, :, rows] = o[:, :, rows] * old + weights @ values
        m[:, :, rows] = new
    return o / s


@right("chunked_causal_attention")
def chunks_through_a_cache(q, k, v, chunk):
    """Every token a step with a cache."""
    B, H, N, d = q.shape
    cache = (np.zeros((B, H, N, d)), np.zeros((B, H, N, v.shape[-1])), 0)
    outs = []
    for t in range(N):
        out, cache = step_plain(q[:, :, [t]], k[:, :, [t]], v[:, :, [t]], cache)
        outs.append(out)
    return np.concatenate(outs, axis=2)


@right("chunked_causal_attention")
def chunks_in_float32(q, k, v, chunk):
    out = chunks_plain(*(x.astype(np.float32) for x in (q, k, v)), chunk)
    return out.astype(np.float32)


@mutating("chunked_causal_attention")
def chunks_scale_q_in_place(q, k, v, chunk):
    q *= q.shape[-1] ** -0.5
    return chunks_plain(q * q.shape[-1] ** 0.5, k, v, chunk)


@mutating("chunked_causal_attention")
def chunks_write_into_v(q, k, v, chunk):
    out = chunks_plain(q, k, v, chunk)
    v[...] = 0
    return out


@wrong("chunked_causal_attention")
def chunks_with_a_finite_sentinel(q, k, v, chunk):
    """A sentinel that is no smaller than many a logit: the future keeps a weight."""
    N, d = q.shape[2:]
    outs = []
    for start in range(0, N, chunk):
        z = q[:, :, start : start + chunk] @ k.swapaxes(-1, -2) / np.sqrt(d)
        mask = np.arange(N) <= np.arange(start, start + z.shape[2])[:, None]
        outs.append(softmax(np.where(mask, z, -2.0)) @ v)
    return np.concatenate(outs, axis=2)


@wrong("chunked_causal_attention")
def chunks_reversed(q, k, v, chunk):
    return chunks_plain(q, k, v, chunk)[:, :, ::-1]


@wrong("chunked_causal_attention")
def chunks_weighted_later(q, k, v, chunk):
    return chunks_plain(q, k, v, chunk) * 0.5
