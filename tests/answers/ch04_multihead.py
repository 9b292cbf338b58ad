"""Chapter 4 in many hands."""

import numpy as np
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong

NAMES = ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo")

# -------------------------------------------------------------------------------- split_heads


@right("split_heads")
def split_plain(x, n_heads):
    B, N, C = x.shape
    return x.reshape(B, N, n_heads, C // n_heads).transpose(0, 2, 1, 3)


@right("split_heads")
def split_slices(x, n_heads):
    return np.stack(np.split(x, n_heads, axis=-1), axis=1)


@right("split_heads")
def split_loops(x, n_heads):
    B, N, C = x.shape
    d = C // n_heads
    out = np.zeros((B, n_heads, N, d), np.float32 if x.dtype == np.float32 else float)
    for b in range(B):
        for h in range(n_heads):
            for n in range(N):
                for i in range(d):
                    out[b, h, n, i] = x[b, n, h * d + i]
    return out


@right("split_heads")
def split_torch(x, n_heads):
    return torch.tensor(x).unflatten(-1, (n_heads, -1)).transpose(1, 2)


@right("split_heads")
def split_torch_chunks(x, n_heads):
    return torch.stack(torch.tensor(x, requires_grad=True).chunk(n_heads, dim=-1), dim=1)


@right("split_heads")
def split_einsum(x, n_heads):
    B, N, C = x.shape
    return np.einsum("bnhd->bhnd", x.reshape(B, N, n_heads, C // n_heads))


@right("split_heads")
def split_by_one_hot(x, n_heads):
    C = x.shape[-1]
    d = C // n_heads
    take = np.eye(C).reshape(C, n_heads, d)
    return np.einsum("bnc,chd->bhnd", x, take)


@right("split_heads")
def split_width_inferred(x, n_heads):
    return x.reshape(len(x), x.shape[1], n_heads, -1).swapaxes(1, 2)


@mutating("split_heads")
def split_clears_its_input(x, n_heads):
    out = split_plain(x, n_heads).copy()
    x[:] = 0
    return out


@mutating("split_heads")
def split_into_x(x, n_heads):
    out = split_plain(x, n_heads).copy()
    x += 1
    return out


@wrong("split_heads")
def split_reversed(x, n_heads):
    return split_plain(x, n_heads)[:, ::-1]


@wrong("split_heads")
def split_scaled(x, n_heads):
    return split_plain(x, n_heads) / n_heads


@wrong("split_heads")
def split_tokens_reversed(x, n_heads):
    return split_plain(x[:, ::-1], n_heads)


# -------------------------------------------------------------------------------- merge_heads


@right("merge_heads")
def merge_plain(x):
    B, H, N, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, N, H * d)


@right("merge_heads")
def merge_concatenated(x):
    return np.concatenate([x[:, h] for h in range(x.shape[1])], axis=-1)


@right("merge_heads")
def merge_loops(x):
    B, H, N, d = x.shape
    out = np.zeros((B, N, H * d))
    for b, h, n, i in np.ndindex(x.shape):
        out[b, n, h * d + i] = x[b, h, n, i]
    return out


@right("merge_heads")
def merge_torch(x):
    return torch.tensor(x).transpose(1, 2).flatten(2)


@right("merge_heads")
def merge_torch_contiguous(x):
    B, H, N, d = x.shape
    return torch.tensor(x).permute(0, 2, 1, 3).contiguous().view(B, N, H * d)


@right("merge_heads")
def merge_einsum(x):
    B, H, N, d = x.shape
    return np.einsum("bhnd->bnhd", x).reshape(B, N, H * d)


@right("merge_heads")
def merge_moved(x):
    return np.concatenate(tuple(np.moveaxis(x, 1, 0)), axis=2)


@right("merge_heads")
def merge_width_inferred(x):
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


@mutating("merge_heads")
def merge_clears_its_input(x):
    out = merge_plain(x).copy()
    x[:] = 0
    return out


@wrong("merge_heads")
def merge_first_head_twice(x):
    return np.concatenate([x[:, 0]] * x.shape[1], axis=-1)


@wrong("merge_heads")
def merge_scaled(x):
    return merge_plain(x) * x.shape[1]


@wrong("merge_heads")
def merge_rolled(x):
    return np.roll(merge_plain(x), 1, axis=-1)


# ---------------------------------------------------------------------------- linear_backward


@right("linear_backward")
def linear_plain(dy, x, w):
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return dy @ w.T, rows.T @ drows, dy.sum(axis=(0, 1))


@right("linear_backward")
def linear_einsum(dy, x, w):
    dx = np.einsum("bno,io->bni", dy, w)
    dw = np.einsum("bni,bno->io", x, dy)
    return dx, dw, np.einsum("bno->o", dy)


@right("linear_backward")
def linear_loops(dy, x, w):
    B, N, Cin = x.shape
    Cout = w.shape[1]
    dx = [[[0.0] * Cin for _ in range(N)] for _ in range(B)]
    dw = [[0.0] * Cout for _ in range(Cin)]
    db = [0.0] * Cout
    for b, n, o in np.ndindex(dy.shape):
        db[o] += float(dy[b, n, o])
        for i in range(Cin):
            dx[b][n][i] += float(dy[b, n, o]) * float(w[i, o])
            dw[i][o] += float(x[b, n, i]) * float(dy[b, n, o])
    return [dx, dw, db]


@right("linear_backward")
def linear_autograd(dy, x, w):
    x, w = torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)
    b = torch.zeros(w.shape[1], dtype=w.dtype, requires_grad=True)
    F.linear(x, w.T, b).backward(torch.tensor(dy))
    return x.grad, w.grad, b.grad


@right("linear_backward")
def linear_sentence_by_sentence(dy, x, w):
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[1])
    for b in range(len(x)):
        dx[b] = dy[b] @ w.T
        dw += x[b].T @ dy[b]
        db += dy[b].sum(axis=0)
    return dx, dw, db


@right("linear_backward")
def linear_tensordot(dy, x, w):
    dx = np.tensordot(dy, w, axes=(2, 1))
    return dx, np.tensordot(x, dy, axes=([0, 1], [0, 1])), np.ones(dy.shape[1]) @ dy.sum(axis=0)


@right("linear_backward")
def linear_batched_product(dy, x, w):
    return dy @ w.T, (x.swapaxes(1, 2) @ dy).sum(axis=0), dy.sum(axis=0).sum(axis=0)


@right("linear_backward")
def linear_float32(dy, x, w):
    return linear_plain(*(a.astype(np.float32) for a in (dy, x, w)))


@mutating("linear_backward")
def linear_changes_dy(dy, x, w):
    grads = linear_plain(dy, x, w)
    dy *= 2
    return grads


@mutating("linear_backward")
def linear_changes_w(dy, x, w):
    grads = linear_plain(dy, x, w)
    w -= 0.1 * grads[1]
    return grads


@wrong("linear_backward")
def linear_another_order(dy, x, w):
    dx, dw, db = linear_plain(dy, x, w)
    return dw, dx, db


@wrong("linear_backward")
def linear_negated(dy, x, w):
    dx, dw, db = linear_plain(dy, x, w)
    return dx, -dw, db


@wrong("linear_backward")
def linear_without_db(dy, x, w):
    return linear_plain(dy, x, w)[:2]


@wrong("linear_backward")
def linear_last_token(dy, x, w):
    dx, _, db = linear_plain(dy, x, w)
    return dx, x[:, -1].T @ dy[:, -1], db


# ------------------------------------------------------------------------- multihead_backward


def heads_of(x, n_heads):
    B, N, C = x.shape
    return x.reshape(B, N, n_heads, C // n_heads).transpose(0, 2, 1, 3)


def rows_of(x):
    B, H, N, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, N, H * d)


def probabilities(q, k, mask):
    z = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is None:
        mask = np.ones(z.shape, bool)
    mask = np.broadcast_to(mask, z.shape)
    peak = np.where(mask, z, -1e300).max(axis=-1, keepdims=True)
    e = np.exp(np.where(mask, z - peak, -np.inf))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(mask.any(axis=-1, keepdims=True), total, 1.0)


def plain(dout, x, memory, params, n_heads, mask):
    """dx by the queries, dmemory, grads."""
    p = dict(zip(NAMES, params, strict=True))
    q = heads_of(x @ p["wq"] + p["bq"], n_heads)
    k = heads_of(memory @ p["wk"] + p["bk"], n_heads)
    v = heads_of(memory @ p["wv"] + p["bv"], n_heads)
    P = probabilities(q, k, mask)
    merged = rows_of(P @ v)
    grads = {}
    dmerged, grads["wo"], grads["bo"] = linear_plain(dout, merged, p["wo"])
    dO = heads_of(dmerged, n_heads)
    dP = dO @ v.swapaxes(-1, -2)
    dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True)) / np.sqrt(q.shape[-1])
    dq, dk, dv = dS @ k, dS.swapaxes(-1, -2) @ q, P.swapaxes(-1, -2) @ dO
    dx, grads["wq"], grads["bq"] = linear_plain(rows_of(dq), x, p["wq"])
    dm_k, grads["wk"], grads["bk"] = linear_plain(rows_of(dk), memory, p["wk"])
    dm_v, grads["wv"], grads["bv"] = linear_plain(rows_of(dv), memory, p["wv"])
    return dx, dm_k + dm_v, grads


@right("multihead_backward")
def multihead_plain(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    dx, dmemory, grads = plain(dout, x, x, (wq, wk, wv, wo, bq, bk, bv, bo), n_heads, mask)
    return dx + dmemory, grads


def autograd(dout, x, memory, params, n_heads, mask, attend):
    leaves = [torch.tensor(a, requires_grad=True) for a in params]
    wq, wk, wv, wo, bq, bk, bv, bo = leaves
    x = torch.tensor(x, requires_grad=True)
    memory = x if memory is None else torch.tensor(memory, requires_grad=True)

    def project(a, w, b):
        return (a @ w + b).unflatten(-1, (n_heads, -1)).transpose(1, 2)

    q, k, v = project(x, wq, bq), project(memory, wk, bk), project(memory, wv, bv)
    mask = None if mask is None else torch.tensor(mask)
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2) @ wo + bo
    out.backward(torch.tensor(dout))
    return x.grad, memory.grad, {n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=True)}


def by_softmax(q, k, v, mask):
    z = q @ k.mT / q.shape[-1] ** 0.5
    if mask is None:
        return torch.softmax(z, -1) @ v
    alive = mask.any(-1, keepdim=True)
    return torch.softmax(z.masked_fill(~mask & alive, -torch.inf), -1) * alive @ v


def by_sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@right("multihead_backward")
def multihead_autograd(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    dx, _, grads = autograd(dout, x, None, params, n_heads, mask, by_softmax)
    return dx, grads


@right("multihead_backward")
def multihead_sdpa(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    dx, _, grads = autograd(dout, x, None, params, n_heads, mask, by_sdpa)
    return dx, grads


def head_by_head(dout, x, memory, params, n_heads, mask):
    """Loops over sentences and heads, every matrix with two axes."""
    p = dict(zip(NAMES, params, strict=True))
    B, Nq = x.shape[:2]
    Nk, d = memory.shape[1], p["wq"].shape[1] // n_heads
    seen = np.broadcast_to(True if mask is None else mask, (B, n_heads, Nq, Nk))
    dx, dm = np.zeros(x.shape), np.zeros(memory.shape)
    grads = {n: np.zeros(np.shape(a)) for n, a in p.items()}
    grads["bo"] += dout.sum(axis=(0, 1))
    for b in range(B):
        for h in range(n_heads):
            own = slice(h * d, (h + 1) * d)
            q = x[b] @ p["wq"][:, own] + p["bq"][own]
            k = memory[b] @ p["wk"][:, own] + p["bk"][own]
            v = memory[b] @ p["wv"][:, own] + p["bv"][own]
            P = np.zeros((Nq, Nk))
            for i in range(Nq):
                js = np.flatnonzero(seen[b, h, i])
                if len(js):
                    z = q[i] @ k[js].T * d**-0.5
                    e = np.exp(z - z.max())
                    P[i, js] = e / e.sum()
            grads["wo"][own] += (P @ v).T @ dout[b]
            dO = dout[b] @ p["wo"][own].T
            dP = dO @ v.T
            dS = P * (dP - np.einsum("ij,ij->i", P, dP)[:, None]) * d**-0.5
            for name, rows, dy, into in (
                ("q", x, dS @ k, dx),
                ("k", memory, dS.T @ q, dm),
                ("v", memory, P.T @ dO, dm),
            ):
                into[b] += dy @ p[f"w{name}"][:, own].T
                grads[f"w{name}"][:, own] += rows[b].T @ dy
                grads[f"b{name}"][own] += dy.sum(axis=0)
    return dx, dm, grads


@right("multihead_backward")
def multihead_head_by_head(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    dx, dm, grads = head_by_head(dout, x, x, params, n_heads, mask)
    return [(dx + dm).tolist(), {n: g.tolist() for n, g in grads.items()}]


@right("multihead_backward")
def multihead_fused(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    """One product for q, k and v each way; the three paths are its inner sum."""
    w, b = np.concatenate([wq, wk, wv], axis=1), np.concatenate([bq, bk, bv])
    q, k, v = (heads_of(a, n_heads) for a in np.split(x @ w + b, 3, axis=-1))
    P = probabilities(q, k, mask)
    dmerged, dwo, dbo = linear_plain(dout, rows_of(P @ v), wo)
    dO = heads_of(dmerged, n_heads)
    dP = dO @ v.swapaxes(-1, -2)
    # rowsum(P dP) = rowsum(O dO)
    dS = P * (dP - np.einsum("bhid,bhid->bhi", P @ v, dO)[..., None]) * q.shape[-1] ** -0.5
    dqkv = np.concatenate(
        [rows_of(a) for a in (dS @ k, dS.swapaxes(-1, -2) @ q, P.swapaxes(-1, -2) @ dO)], axis=-1
    )
    dx, dw, db = linear_plain(dqkv, x, w)
    (dwq, dwk, dwv), (dbq, dbk, dbv) = np.split(dw, 3, axis=1), np.split(db, 3)
    return dx, dict(zip(NAMES, (dwq, dwk, dwv, dwo, dbq, dbk, dbv, dbo), strict=True))


@right("multihead_backward")
def multihead_bk_is_zero(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    dx, grads = multihead_plain(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask)
    return dx, dict(reversed(list((grads | {"bk": np.zeros(len(bk))}).items())))


@right("multihead_backward")
def multihead_float32(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    arrays = (dout, x, wq, wk, wv, wo, bq, bk, bv, bo)
    dx, grads = multihead_plain(*(a.astype(np.float32) for a in arrays), n_heads, mask)
    return np.float32(dx), {n: np.float32(g) for n, g in grads.items()}


@mutating("multihead_backward")
def multihead_centres_x(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    answer = multihead_plain(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask)
    x -= x.mean()
    return answer


@mutating("multihead_backward")
def multihead_steps(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    dx, grads = multihead_plain(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask)
    wv -= 0.1 * grads["wv"]
    return dx, grads


@wrong("multihead_backward")
def multihead_skip_path(dout, *rest):
    dx, grads = multihead_plain(dout, *rest)
    return dx + dout, grads


@wrong("multihead_backward")
def multihead_twice_the_logits(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    """A softmax of twice the logits."""
    return multihead_plain(dout, x, 2 * wq, wk, wv, wo, 2 * bq, bk, bv, bo, n_heads, mask)


@wrong("multihead_backward")
def multihead_grads_in_a_tuple(dout, *rest):
    dx, grads = multihead_plain(dout, *rest)
    return dx, tuple(grads[n] for n in NAMES)


@wrong("multihead_backward")
def multihead_half_of_dk(dout, *rest):
    dx, grads = multihead_plain(dout, *rest)
    return dx, grads | {"wk": grads["wk"] / 2}


@wrong("multihead_backward")
def multihead_other_names(dout, *rest):
    dx, grads = multihead_plain(dout, *rest)
    return dx, {f"d{n}": g for n, g in grads.items()}


# ------------------------------------------------------------------- cross_attention_backward


@right("cross_attention_backward")
def cross_plain(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    return plain(dout, x, memory, (wq, wk, wv, wo, bq, bk, bv, bo), n_heads, mask)


@right("cross_attention_backward")
def cross_head_by_head(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    return head_by_head(dout, x, memory, (wq, wk, wv, wo, bq, bk, bv, bo), n_heads, mask)


@right("cross_attention_backward")
def cross_autograd(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    return autograd(dout, x, memory, params, n_heads, mask, by_softmax)


@right("cross_attention_backward")
def cross_sdpa(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    params = (wq, wk, wv, wo, bq, bk, bv, bo)
    return autograd(dout, x, memory, params, n_heads, mask, by_sdpa)


@right("cross_attention_backward")
def cross_float32(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    arrays = (dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo)
    dx, dmemory, grads = cross_plain(*(a.astype(np.float32) for a in arrays), n_heads, mask)
    return np.float32(dx), np.float32(dmemory), {n: np.float32(g) for n, g in grads.items()}


@right("cross_attention_backward")
def cross_fused_memory(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    """Keys and values from one product; dmemory's two paths are its inner sum."""
    dx, _, grads = plain(dout, x, memory, (wq, wk, wv, wo, bq, bk, bv, bo), n_heads, mask)
    q, w = heads_of(x @ wq + bq, n_heads), np.concatenate([wk, wv], axis=1)
    kv = memory @ w + np.concatenate([bk, bv])
    k, v = (heads_of(a, n_heads) for a in np.split(kv, 2, axis=-1))
    P, dO = probabilities(q, k, mask), heads_of(dout @ wo.T, n_heads)
    dP = dO @ v.swapaxes(-1, -2)
    dS = P * (dP - (P * dP).sum(-1, keepdims=True)) / q.shape[-1] ** 0.5
    dkv = [rows_of(dS.swapaxes(-1, -2) @ q), rows_of(P.swapaxes(-1, -2) @ dO)]
    return dx, np.concatenate(dkv, axis=-1) @ w.T, grads


@mutating("cross_attention_backward")
def cross_changes_memory(dout, x, memory, *rest):
    answer = cross_plain(dout, x, memory, *rest)
    memory *= 2
    return answer


@wrong("cross_attention_backward")
def cross_dmemory_negated(dout, x, memory, *rest):
    dx, dmemory, grads = cross_plain(dout, x, memory, *rest)
    return dx, -dmemory, grads


@wrong("cross_attention_backward")
def cross_in_another_order(dout, x, memory, *rest):
    dx, dmemory, grads = cross_plain(dout, x, memory, *rest)
    return dmemory, dx, grads


@wrong("cross_attention_backward")
def cross_without_dmemory(dout, x, memory, *rest):
    dx, _, grads = cross_plain(dout, x, memory, *rest)
    return dx, grads


# ------------------------------------------------------------------------ grouped_kv_backward


@right("grouped_kv_backward")
def grouped_plain(dk_rep, n_kv_heads):
    B, H, N, d = dk_rep.shape
    return dk_rep.reshape(B, n_kv_heads, H // n_kv_heads, N, d).sum(axis=2)


@right("grouped_kv_backward")
def grouped_loops(dk_rep, n_kv_heads):
    B, H, N, d = dk_rep.shape
    dk = np.zeros((B, n_kv_heads, N, d))
    for h in range(H):
        dk[:, h // (H // n_kv_heads)] += dk_rep[:, h]
    return dk.tolist()


@right("grouped_kv_backward")
def grouped_add_at(dk_rep, n_kv_heads):
    B, H, N, d = dk_rep.shape
    dk = np.zeros((B, n_kv_heads, N, d))
    np.add.at(dk, (slice(None), np.repeat(np.arange(n_kv_heads), H // n_kv_heads)), dk_rep)
    return dk


@right("grouped_kv_backward")
def grouped_einsum(dk_rep, n_kv_heads):
    B, _, N, d = dk_rep.shape
    return np.einsum("bgrnd->bgnd", dk_rep.reshape(B, n_kv_heads, -1, N, d))


@right("grouped_kv_backward")
def grouped_one_hot(dk_rep, n_kv_heads):
    H = dk_rep.shape[1]
    belongs = np.repeat(np.eye(n_kv_heads), H // n_kv_heads, axis=1)
    return np.einsum("gh,bhnd->bgnd", belongs, dk_rep)


@right("grouped_kv_backward")
def grouped_autograd(dk_rep, n_kv_heads):
    dk_rep = torch.tensor(dk_rep)
    B, H, N, d = dk_rep.shape
    k = torch.zeros(B, n_kv_heads, N, d, dtype=dk_rep.dtype, requires_grad=True)
    k.repeat_interleave(H // n_kv_heads, dim=1).backward(dk_rep)
    return k.grad


@right("grouped_kv_backward")
def grouped_reduceat(dk_rep, n_kv_heads):
    H = dk_rep.shape[1]
    return np.add.reduceat(dk_rep, np.arange(0, H, H // n_kv_heads), axis=1)


@right("grouped_kv_backward")
def grouped_float32(dk_rep, n_kv_heads):
    return grouped_plain(dk_rep.astype(np.float32), n_kv_heads)


@mutating("grouped_kv_backward")
def grouped_adds_into_its_input(dk_rep, n_kv_heads):
    group = dk_rep.shape[1] // n_kv_heads
    for r in range(1, group):
        dk_rep[:, ::group] += dk_rep[:, r::group]
    dk = dk_rep[:, ::group].copy()
    dk_rep *= 2
    return dk


@wrong("grouped_kv_backward")
def grouped_maximum(dk_rep, n_kv_heads):
    B, _, N, d = dk_rep.shape
    return dk_rep.reshape(B, n_kv_heads, -1, N, d).max(axis=2)


@wrong("grouped_kv_backward")
def grouped_negated(dk_rep, n_kv_heads):
    return -grouped_plain(dk_rep, n_kv_heads)


@wrong("grouped_kv_backward")
def grouped_shifted(dk_rep, n_kv_heads):
    return grouped_plain(np.roll(dk_rep, 1, axis=1), n_kv_heads)
