"""Chapter 13 in many hands."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong

INF = np.inf

# ----------------------------------------------------------------------- merge_softmax_blocks


@right("merge_softmax_blocks")
def merge_plain(m1, l1, o1, m2, l2, o2):
    m = np.maximum(m1, m2)
    base = np.where(np.isneginf(m), 0, m)
    a, b = np.exp(m1 - base), np.exp(m2 - base)
    return m, a * l1 + b * l2, a[..., None] * o1 + b[..., None] * o2


@right("merge_softmax_blocks")
def merge_by_difference(m1, l1, o1, m2, l2, o2):
    """The larger part stays as it is, the other shrinks."""
    gap = np.where(m1 == m2, 0, m2 - m1)
    a, b = np.exp(np.minimum(-gap, 0)), np.exp(np.minimum(gap, 0))
    return [np.where(gap > 0, m2, m1), l1 * a + l2 * b, (o1.T * a.T).T + (o2.T * b.T).T]


@right("merge_softmax_blocks")
def merge_in_logarithms(m1, l1, o1, m2, l2, o2):
    m = np.fmax(m1, m2)
    lse1, lse2 = m1 + np.log(l1), m2 + np.log(l2)
    total = np.exp(np.logaddexp(lse1, lse2) - np.where(m == -INF, 0, m))
    first, second = (np.nan_to_num(np.exp(x - m)) for x in (m1, m2))
    return m, total, np.expand_dims(first, -1) * o1 + np.expand_dims(second, -1) * o2


@right("merge_softmax_blocks")
def merge_rows(m1, l1, o1, m2, l2, o2):
    m, l, o = np.zeros(m1.shape), np.zeros(m1.shape), np.zeros(o1.shape)  # noqa: E741
    for i in np.ndindex(m1.shape):
        m[i] = max(m1[i], m2[i])
        for mine, total, acc in ((m1, l1, o1), (m2, l2, o2)):
            if mine[i] > -math.inf:
                factor = math.exp(mine[i] - m[i])
                l[i] += factor * total[i]
                o[i] += factor * acc[i]
    return m, l, o


@right("merge_softmax_blocks")
def merge_torch(*parts):
    m1, l1, o1, m2, l2, o2 = (torch.tensor(x) for x in parts)
    m = torch.maximum(m1, m2)
    a, b = (torch.where(x.isneginf(), 0.0, torch.exp(x - m)) for x in (m1, m2))
    return m, a * l1 + b * l2, a.unsqueeze(-1) * o1 + b.unsqueeze(-1) * o2


@right("merge_softmax_blocks")
def merge_stacked(m1, l1, o1, m2, l2, o2):
    """Any number of parts along a new first axis."""
    m, l, o = np.stack([m1, m2]), np.stack([l1, l2]), np.stack([o1, o2])  # noqa: E741
    top = m.max(axis=0)
    shares = np.exp(m - np.where(np.isfinite(top), top, 0))
    return top, (shares * l).sum(0), np.einsum("p...,p...c->...c", shares, o)


@right("merge_softmax_blocks")
def merge_base_2(m1, l1, o1, m2, l2, o2):
    m = np.maximum(m1, m2)
    a, b = (np.where(x > -INF, np.exp2((x - m) * math.log2(math.e)), 0) for x in (m1, m2))
    return m, a * l1 + b * l2, a[..., np.newaxis] * o1 + b[..., np.newaxis] * o2


@right("merge_softmax_blocks")
def merge_one_wide_array(m1, l1, o1, m2, l2, o2):
    """l carried as one more column of o, as if v had a column of ones."""
    first, second = (np.concatenate([o, t[..., None]], -1) for o, t in ((o1, l1), (o2, l2)))
    m = np.maximum(m1, m2)
    base = np.maximum(m, np.finfo(m.dtype).min)
    both = np.exp(m1 - base)[..., None] * first + np.exp(m2 - base)[..., None] * second
    return m, both[..., -1], both[..., :-1]


@right("merge_softmax_blocks")
def merge_in_float32(*parts):
    return [x.astype(np.float32) for x in merge_plain(*(np.float32(x) for x in parts))]


@mutating("merge_softmax_blocks")
def merge_into_the_first(m1, l1, o1, m2, l2, o2):
    m, l, o = merge_plain(m1, l1, o1, m2, l2, o2)  # noqa: E741
    m1[...], l1[...], o1[...] = m, l, o
    return m, l, o


@mutating("merge_softmax_blocks")
def merge_guards_in_place(m1, l1, o1, m2, l2, o2):
    merged = merge_plain(m1, l1, o1, m2, l2, o2)
    m1[np.isneginf(m1)] = 0
    m2[np.isneginf(m2)] = 0
    return merged


@wrong("merge_softmax_blocks")
def merge_factor_squared(m1, l1, o1, m2, l2, o2):
    m, l, _ = merge_plain(m1, l1, o1, m2, l2, o2)  # noqa: E741
    return m, l, merge_plain(2 * m1, l1, o1, 2 * m2, l2, o2)[2]


@wrong("merge_softmax_blocks")
def merge_halved(m1, l1, o1, m2, l2, o2):
    m, l, o = merge_plain(m1, l1, o1, m2, l2, o2)  # noqa: E741
    return m, l / 2, o / 2


@wrong("merge_softmax_blocks")
def merge_without_o(m1, l1, o1, m2, l2, o2):
    return merge_plain(m1, l1, o1, m2, l2, o2)[:2]


@wrong("merge_softmax_blocks")
def merge_doubles_o2(m1, l1, o1, m2, l2, o2):
    return merge_plain(m1, l1, o1, m2, l2, o2 + o2)


# ------------------------------------------------------------------------------ flash_forward


def visible(q, k, causal):
    n_q, n_k = q.shape[2], k.shape[2]
    return np.tri(n_q, n_k, n_k - n_q if causal else n_k, dtype=bool)


def guarded(m):
    return np.where(m == -INF, 0, m)


@right("flash_forward")
def forward_rows_outside(q, k, v, block, causal=False):
    B, H, Nq, d = q.shape
    Nk = k.shape[2]
    out, lse = np.zeros((B, H, Nq, v.shape[-1])), np.zeros((B, H, Nq))
    for r in range(0, Nq, block):
        rows = np.arange(r, min(r + block, Nq))
        m = np.full((B, H, len(rows), 1), -INF)
        l, o = np.zeros_like(m), 0.0  # noqa: E741
        for c in range(0, Nk, block):
            cols = np.arange(c, min(c + block, Nk))
            if causal and cols[0] > rows[-1] + Nk - Nq:
                break
            z = q[:, :, rows] @ k[:, :, cols].swapaxes(-1, -2) / np.sqrt(d)
            if causal:
                z = np.where(cols <= rows[:, None] + Nk - Nq, z, -INF)
            new = np.maximum(m, z.max(-1, keepdims=True))
            p, old = np.exp(z - guarded(new)), np.exp(m - guarded(new))
            m, l, o = new, old * l + p.sum(-1, keepdims=True), old * o + p @ v[:, :, cols]  # noqa: E741
        out[:, :, rows] = o / np.where(l == 0, 1, l)
        lse[:, :, rows] = (m + np.log(l))[..., 0]
    return out, lse


@right("flash_forward")
def forward_keys_outside(q, k, v, block, causal=False):
    """All queries at once, m, l and o of all rows kept between blocks of keys."""
    seen = visible(q, k, causal)
    m, l = np.full(q.shape[:3], -INF), np.zeros(q.shape[:3])  # noqa: E741
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for start in range(0, k.shape[2], block):
        keys = slice(start, start + block)
        z = np.einsum("bhid,bhjd->bhij", q, k[:, :, keys]) * q.shape[-1] ** -0.5
        z[:, :, ~seen[:, keys]] = -INF
        peak = z.max(-1)
        p = np.exp(z - guarded(peak)[..., None])
        m, l, o = merge_plain(m, l, o, peak, p.sum(-1), p @ v[:, :, keys])  # noqa: E741
    with np.errstate(all="ignore"):
        return np.nan_to_num(o / l[..., None]), m + np.log(l)


@right("flash_forward")
def forward_dense(q, k, v, block, causal=False):
    """The whole array of logits, block or not: the numbers are right."""
    z = np.where(visible(q, k, causal), q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -INF)
    lse = np.logaddexp.reduce(z, axis=-1)
    return np.exp(z - guarded(lse)[..., None]) @ v, lse


@right("flash_forward")
def forward_torch(q, k, v, block, causal=False):
    q, k, v = (torch.tensor(x) for x in (q, k, v))
    z = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        future = torch.ones(z.shape[-2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
        z = z.masked_fill(future, -torch.inf)
    return torch.softmax(z, -1).nan_to_num() @ v, torch.logsumexp(z, -1)


@right("flash_forward")
def forward_torchs_kernel(q, k, v, block, causal=False):
    mask = torch.tensor(visible(q, k, causal))
    q, k, v = (torch.tensor(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).nan_to_num()
    z = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return out, z.logsumexp(-1)


@right("flash_forward")
def forward_normalised_in_every_step(q, k, v, block, causal=False):
    """out and lse of what was seen so far, merged with those of the next block."""
    seen, lse, out = visible(q, k, causal), np.full(q.shape[:3], -INF), 0.0
    for keys in np.array_split(np.arange(k.shape[2]), -(-k.shape[2] // block)):
        z = np.where(seen[:, keys], q @ k[:, :, keys].swapaxes(-1, -2) / q.shape[-1] ** 0.5, -INF)
        part = np.logaddexp.reduce(z, -1)
        new = np.logaddexp(lse, part)
        out = (
            np.exp(lse - guarded(new))[..., None] * out
            + np.exp(z - guarded(new)[..., None]) @ v[:, :, keys]
        )
        lse = new
    return out, lse


@right("flash_forward")
def forward_base_2(q, k, v, block, causal=False):
    """As kernels do it: log2(e) in the scale of q, a natural logarithm at the end."""
    q = q * (q.shape[-1] ** -0.5 * math.log2(math.e))
    seen = visible(q, k, causal)
    m, l, o = np.full((*q.shape[:3], 1), -INF), 0.0, 0.0  # noqa: E741
    for start in range(0, k.shape[2], block):
        keys = slice(start, start + block)
        z = np.where(seen[:, keys], q @ k[:, :, keys].swapaxes(-1, -2), -INF)
        new = np.maximum(m, z.max(-1, keepdims=True))
        p, old = np.exp2(z - guarded(new)), np.exp2(m - guarded(new))
        m, l, o = new, old * l + p.sum(-1, keepdims=True), old * o + p @ v[:, :, keys]  # noqa: E741
    return o / np.where(l > 0, l, 1), ((m + np.log2(l)) * math.log(2))[..., 0]


@right("flash_forward")
def forward_key_after_key(q, k, v, block, causal=False):
    """Plain numbers, one key at a time, and only those that are seen."""
    (B, H, Nq, d), Nk = q.shape, k.shape[2]
    out, lse = np.zeros((B, H, Nq, v.shape[-1])), np.full((B, H, Nq), -INF)
    for b, h, i in np.ndindex(B, H, Nq):
        m, l, o = -math.inf, 0.0, 0.0  # noqa: E741
        for j in range(min(i + Nk - Nq + 1, Nk) if causal else Nk):
            z = float(q[b, h, i] @ k[b, h, j]) / math.sqrt(d)
            if z > m:
                shrink = math.exp(m - z)
                m, l, o = z, l * shrink, o * shrink  # noqa: E741
            l, o = l + math.exp(z - m), o + math.exp(z - m) * v[b, h, j]  # noqa: E741
        if l:
            out[b, h, i], lse[b, h, i] = o / l, m + math.log(l)
    return out, lse


@right("flash_forward")
def forward_in_two_passes(q, k, v, block, causal=False):
    """The maximum over all blocks first, then the sums: nothing is ever rescaled."""
    seen, blocks = visible(q, k, causal), range(0, k.shape[2], block)

    def logits(start):
        keys = slice(start, start + block)
        z = q @ k[:, :, keys].swapaxes(-1, -2) * q.shape[-1] ** -0.5
        return np.where(seen[:, keys], z, -INF)

    m = np.max([logits(start).max(-1) for start in blocks], axis=0)
    parts = [(np.exp(logits(s) - guarded(m)[..., None]), v[:, :, s : s + block]) for s in blocks]
    l = sum(p.sum(-1) for p, _ in parts)  # noqa: E741
    o = sum(p @ v_j for p, v_j in parts)
    return o / (l + (l == 0))[..., None], m + np.log(l)


@right("flash_forward")
def forward_zeroed_not_hidden(q, k, v, block, causal=False):
    """Weights of hidden keys set to 0, the maximum taken over what is seen."""
    seen, scale = visible(q, k, causal), q.shape[-1] ** -0.5
    outs, lses = [], []
    for start in range(0, q.shape[2], block):
        mask = seen[start : start + block]
        z = q[:, :, start : start + block] @ k.swapaxes(-1, -2) * scale
        m = np.max(z, axis=-1, keepdims=True, initial=-1e5, where=mask)
        p = np.where(mask, np.exp(np.minimum(z - m, 0)), 0)
        l = p.sum(-1, keepdims=True)  # noqa: E741
        outs.append(p @ v / np.maximum(l, 1e-300))
        lses.append(np.where(l > 0, m + np.log(l), -INF)[..., 0])
    return np.concatenate(outs, 2), np.concatenate(lses, 2)


@right("flash_forward")
def forward_finite_start(q, k, v, block, causal=False):
    """A maximum that begins at a large negative number, and logits that are truly hidden."""
    seen = visible(q, k, causal)
    m, l, o = np.full((*q.shape[:3], 1), -1e30), 0.0, 0.0  # noqa: E741
    for start in range(0, k.shape[2], block):
        keys = slice(start, start + block)
        z = np.where(seen[:, keys], q @ k[:, :, keys].swapaxes(-1, -2), -INF) / q.shape[-1] ** 0.5
        new = np.maximum(m, z.max(-1, keepdims=True))
        p = np.exp(z - new)
        l = np.exp(m - new) * l + p.sum(-1, keepdims=True)  # noqa: E741
        o, m = np.exp(m - new) * o + p @ v[:, :, keys], new
    return np.divide(o, l, out=np.zeros_like(o), where=l > 0), (m + np.log(l))[..., 0]


@right("flash_forward")
def forward_in_float32(q, k, v, block, causal=False):
    return tuple(
        x.astype(np.float32)
        for x in forward_keys_outside(*(x.astype(np.float32) for x in (q, k, v)), block, causal)
    )


@mutating("flash_forward")
def forward_scales_q_in_place(q, k, v, block, causal=False):
    out = forward_rows_outside(q, k, v, block, causal)
    q *= q.shape[-1] ** -0.5
    return out


@mutating("flash_forward")
def forward_writes_into_v(q, k, v, block, causal=False):
    out = forward_dense(q, k, v, block, causal)
    v[:, :, -1] = 0
    return out


@wrong("flash_forward")
def forward_too_warm(q, k, v, block, causal=False):
    return forward_dense(0.7 * q, k, v, block, causal)


@wrong("flash_forward")
def forward_doubles_lse(q, k, v, block, causal=False):
    out, lse = forward_dense(q, k, v, block, causal)
    return out, 2 * lse


@wrong("flash_forward")
def forward_forgets_every_other_block(q, k, v, block, causal=False):
    keep = np.arange(k.shape[2]) // block % 2 == 0
    z = np.where(visible(q, k, causal) & keep, q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -INF)
    lse = np.logaddexp.reduce(z, axis=-1)
    return np.exp(z - guarded(lse)[..., None]) @ v, lse


@wrong("flash_forward")
def forward_reversed(q, k, v, block, causal=False):
    out, lse = forward_dense(q, k, v, block, causal)
    return out[:, :, ::-1], lse[:, :, ::-1]


# ----------------------------------------------------------------------------- flash_backward


@right("flash_backward")
def backward_rows_outside(dout, q, k, v, out, lse, block, causal=False):
    Nq, Nk, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
    delta = (dout * out).sum(-1, keepdims=True)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for r in range(0, Nq, block):
        rows = np.arange(r, min(r + block, Nq))
        for c in range(0, Nk, block):
            cols = np.arange(c, min(c + block, Nk))
            if causal and cols[0] > rows[-1] + Nk - Nq:
                continue
            z = q[:, :, rows] @ k[:, :, cols].swapaxes(-1, -2) * scale
            p = np.exp(z - guarded(lse[:, :, rows, None]))
            if causal:
                p = np.where(cols <= rows[:, None] + Nk - Nq, p, 0)
            dp = dout[:, :, rows] @ v[:, :, cols].swapaxes(-1, -2)
            dz = p * (dp - delta[:, :, rows]) * scale
            dv[:, :, cols] += p.swapaxes(-1, -2) @ dout[:, :, rows]
            dq[:, :, rows] += dz @ k[:, :, cols]
            dk[:, :, cols] += dz.swapaxes(-1, -2) @ q[:, :, rows]
    return dq, dk, dv


@right("flash_backward")
def backward_keys_outside(dout, q, k, v, out, lse, block, causal=False):
    """q scaled once before the loop: dk has the scale in it, dq gets its own at the end."""
    seen = visible(q, k, causal)
    scaled = q * q.shape[-1] ** -0.5
    delta = np.einsum("bhic,bhic->bhi", dout, out)
    dq, dks, dvs = 0, [], []
    for start in range(0, k.shape[2], block):
        k_j, v_j = k[:, :, start : start + block], v[:, :, start : start + block]
        z = np.einsum("bhid,bhjd->bhij", scaled, k_j)
        z = np.where(seen[:, start : start + block], z, -INF)
        p = np.exp(z - guarded(lse)[..., None])
        dz = p * (np.einsum("bhic,bhjc->bhij", dout, v_j) - delta[..., None])
        dq = dq + np.einsum("bhij,bhjd->bhid", dz, k_j)
        dks.append(np.einsum("bhij,bhid->bhjd", dz, scaled))
        dvs.append(np.einsum("bhij,bhic->bhjc", p, dout))
    return [dq * q.shape[-1] ** -0.5, np.concatenate(dks, 2), np.concatenate(dvs, 2)]


@right("flash_backward")
def backward_dense(dout, q, k, v, out, lse, block, causal=False):
    """Chapter 3's, with the whole array of weights."""
    scale = 1 / np.sqrt(q.shape[-1])
    z = np.where(visible(q, k, causal), q @ k.swapaxes(-1, -2) * scale, -INF)
    p = np.exp(z - guarded(lse)[..., None])
    dp = dout @ v.swapaxes(-1, -2)
    dz = p * (dp - (p * dp).sum(-1, keepdims=True))
    return dz @ k * scale, dz.swapaxes(-1, -2) @ q * scale, p.swapaxes(-1, -2) @ dout


@right("flash_backward")
def backward_autograd(dout, q, k, v, out, lse, block, causal=False):
    mask = torch.tensor(visible(q, k, causal))
    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    z = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    # A row that sees nothing: any finite logits, and weights of 0.
    blind = ~mask.any(-1, keepdim=True)
    p = torch.softmax(z.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return torch.autograd.grad(p @ v, (q, k, v), torch.tensor(dout))


@right("flash_backward")
def backward_torch_tiles(dout, q, k, v, out, lse, block, causal=False):
    from attn_lessons.flash.torch_tiles import flash_attention

    q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
    made = flash_attention(q, k, v, causal, block=block)
    return torch.autograd.grad(made, (q, k, v), torch.tensor(dout))


@right("flash_backward")
def backward_two_kernels(dout, q, k, v, out, lse, block, causal=False):
    """dk and dv in one loop over keys, dq in another over queries, as on a GPU."""
    seen, scale = visible(q, k, causal), q.shape[-1] ** -0.5
    delta = (dout * out).sum(-1)

    def tile(rows, keys):
        z = q[:, :, rows] @ k[:, :, keys].swapaxes(-1, -2) * scale
        with np.errstate(all="ignore"):
            p = np.where(seen[rows, keys], np.exp(z - lse[:, :, rows, None]), 0)
        dp = dout[:, :, rows] @ v[:, :, keys].swapaxes(-1, -2)
        return p, p * (dp - delta[:, :, rows, None])

    whole = slice(None)
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for start in range(0, k.shape[2], block):
        keys = slice(start, start + block)
        p, dz = tile(whole, keys)
        dk[:, :, keys] = dz.swapaxes(-1, -2) @ q * scale
        dv[:, :, keys] = p.swapaxes(-1, -2) @ dout
    for start in range(0, q.shape[2], block):
        rows = slice(start, start + block)
        dq[:, :, rows] = tile(rows, whole)[1] @ k * scale
    return dq, dk, dv


@right("flash_backward")
def backward_base_2(dout, q, k, v, out, lse, block, causal=False):
    """As kernels do it: log2(e) in the scale, lse in base 2."""
    e, d = math.log2(math.e), q.shape[-1]
    low, seen = np.where(lse == -INF, 0, lse * e), visible(q, k, causal)
    delta = (dout * out).sum(-1, keepdims=True)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for start in range(0, k.shape[2], block):
        keys = slice(start, start + block)
        p = np.exp2(q @ k[:, :, keys].swapaxes(-1, -2) * (e / d**0.5) - low[..., None])
        p *= seen[:, keys]
        dz = p * (dout @ v[:, :, keys].swapaxes(-1, -2) - delta)
        dv[:, :, keys] = p.swapaxes(-1, -2) @ dout
        dq += dz @ k[:, :, keys] / d**0.5
        dk[:, :, keys] = dz.swapaxes(-1, -2) @ q / d**0.5
    return dq, dk, dv


@right("flash_backward")
def backward_row_by_row(dout, q, k, v, out, lse, block, causal=False):
    """One query at a time, and only the keys that it sees."""
    (B, H, Nq, d), Nk = q.shape, k.shape[2]
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h, i in np.ndindex(B, H, Nq):
        n = max(i + Nk - Nq + 1, 0) if causal else Nk
        if n == 0:
            continue
        p = np.exp(k[b, h, :n] @ q[b, h, i] / math.sqrt(d) - lse[b, h, i])
        dz = p * (v[b, h, :n] @ dout[b, h, i] - dout[b, h, i] @ out[b, h, i]) / math.sqrt(d)
        dq[b, h, i] = dz @ k[b, h, :n]
        dk[b, h, :n] += np.outer(dz, q[b, h, i])
        dv[b, h, :n] += np.outer(p, dout[b, h, i])
    return dq, dk, dv


@right("flash_backward")
def backward_forward_again(dout, q, k, v, out, lse, block, causal=False):
    """out and lse made once more instead of taken as given."""
    out, lse = forward_keys_outside(q, k, v, block, causal)
    return backward_keys_outside(dout, q, k, v, out, lse, block, causal)


@right("flash_backward")
def backward_in_float32(dout, q, k, v, out, lse, block, causal=False):
    arrays = [x.astype(np.float32) for x in (dout, q, k, v, out, lse)]
    return [x.astype(np.float32) for x in backward_rows_outside(*arrays, block, causal)]


@mutating("flash_backward")
def backward_scales_q_in_place(dout, q, k, v, out, lse, block, causal=False):
    gradients = backward_rows_outside(dout, q, k, v, out, lse, block, causal)
    q *= q.shape[-1] ** -0.5
    return gradients


@mutating("flash_backward")
def backward_guards_lse_in_place(dout, q, k, v, out, lse, block, causal=False):
    gradients = backward_rows_outside(dout, q, k, v, out, lse, block, causal)
    lse[lse == -INF] = 0
    return gradients


@mutating("flash_backward")
def backward_delta_into_out(dout, q, k, v, out, lse, block, causal=False):
    gradients = backward_dense(dout, q, k, v, out, lse, block, causal)
    out *= dout
    return gradients


@wrong("flash_backward")
def backward_half_delta(dout, q, k, v, out, lse, block, causal=False):
    return backward_rows_outside(dout, q, k, v, out / 2, lse, block, causal)


@wrong("flash_backward")
def backward_third_of_dk(dout, q, k, v, out, lse, block, causal=False):
    dq, dk, dv = backward_rows_outside(dout, q, k, v, out, lse, block, causal)
    return dq, dk / 3, dv


@wrong("flash_backward")
def backward_blurred(dout, q, k, v, out, lse, block, causal=False):
    return backward_rows_outside(dout, q, k, v, out, lse + 0.3, block, causal)


@wrong("flash_backward")
def backward_without_dv(dout, q, k, v, out, lse, block, causal=False):
    return backward_rows_outside(dout, q, k, v, out, lse, block, causal)[:2]
