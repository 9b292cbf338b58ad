"""Chapter 3 in many hands."""

import math

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong

# -------------------------------------------------------------------------------- causal_mask


@right("causal_mask")
def causal_tri(n_q, n_k):
    return np.tri(n_q, n_k, n_k - n_q, dtype=bool)


@right("causal_mask")
def causal_compared(n_q, n_k):
    return np.arange(n_k)[None, :] <= np.arange(n_q)[:, None] + (n_k - n_q)


@right("causal_mask")
def causal_lists(n_q, n_k):
    return [[j <= i + n_k - n_q for j in range(n_k)] for i in range(n_q)]


@right("causal_mask")
def causal_tril(n_q, n_k):
    return np.tril(np.ones((n_q, n_k)), k=n_k - n_q).astype(bool)


@right("causal_mask")
def causal_not_triu(n_q, n_k):
    return ~np.triu(np.ones((n_q, n_k), dtype=bool), k=n_k - n_q + 1)


@right("causal_mask")
def causal_torch(n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(diagonal=n_k - n_q)


@right("causal_mask")
def causal_last_rows_of_a_square(n_q, n_k):
    n = max(n_q, n_k)
    return np.tri(n, dtype=bool)[n - n_q :, n - n_k :]


@right("causal_mask")
def causal_filled(n_q, n_k):
    mask = np.full((n_q, n_k), True)
    mask[np.triu_indices(n_q, n_k - n_q + 1, n_k)] = False
    return mask


@right("causal_mask")
def causal_turned_around(n_q, n_k):
    return (np.arange(n_q)[::-1, None] <= np.arange(n_k)[::-1])[:, :]


@right("causal_mask")
def causal_from_floats(n_q, n_k):
    return np.fromfunction(lambda i, j: n_k - j >= n_q - i, (n_q, n_k))


@wrong("causal_mask")
def causal_banded(n_q, n_k):
    return causal_tri(n_q, n_k) & ~np.tri(n_q, n_k, n_k - n_q - 2, dtype=bool)


@wrong("causal_mask")
def causal_first_key_always(n_q, n_k):
    mask = causal_tri(n_q, n_k)
    mask[:, 0] = True
    return mask


@wrong("causal_mask")
def causal_everything(n_q, n_k):
    return np.ones((n_q, n_k), bool)


# ------------------------------------------------------------------------------- padding_mask


@right("padding_mask")
def padding_compared(lengths, n_k):
    return (np.arange(n_k) < lengths[:, None])[:, None, None, :]


@right("padding_mask")
def padding_loops(lengths, n_k):
    mask = np.zeros((len(lengths), 1, 1, n_k), dtype=bool)
    for b, n in enumerate(lengths):
        mask[b, ..., :n] = True
    return mask


@right("padding_mask")
def padding_lists(lengths, n_k):
    return [[[[j < n for j in range(n_k)]]] for n in lengths.tolist()]


@right("padding_mask")
def padding_torch(lengths, n_k):
    lengths = torch.as_tensor(np.array(lengths))
    return (torch.arange(n_k) < lengths.unsqueeze(1)).view(len(lengths), 1, 1, n_k)


@right("padding_mask")
def padding_less_outer(lengths, n_k):
    return np.expand_dims(np.greater.outer(lengths, np.arange(n_k)), (1, 2))


@right("padding_mask")
def padding_from_ones(lengths, n_k):
    rows = [np.r_[np.ones(n), np.zeros(n_k - n)] for n in lengths]
    return np.array(rows).astype(bool).reshape(-1, 1, 1, n_k)


@right("padding_mask")
def padding_lower_triangle(lengths, n_k):
    return np.tri(n_k + 1, n_k, -1, dtype=bool)[lengths][:, None, None]


@right("padding_mask")
def padding_not_hidden(lengths, n_k):
    return ~(np.arange(n_k) >= np.reshape(lengths, (-1, 1, 1, 1)))


@mutating("padding_mask")
def padding_last_index(lengths, n_k):
    lengths -= 1
    return np.arange(n_k) <= lengths[:, None, None, None]


@wrong("padding_mask")
def padding_sorted(lengths, n_k):
    return padding_compared(np.sort(lengths), n_k)


@wrong("padding_mask")
def padding_first_key_always(lengths, n_k):
    return padding_compared(np.maximum(lengths, 1), n_k)


@wrong("padding_mask")
def padding_two_too_many(lengths, n_k):
    return padding_compared(lengths + 2, n_k)


# -------------------------------------------------------------------------- attention_forward


@right("attention_forward")
def forward_plain(q, k, v, mask=None):
    z = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        z = np.where(mask, z, -np.inf)
    peak = z.max(axis=-1, keepdims=True)
    e = np.exp(z - np.where(np.isfinite(peak), peak, 0))
    total = e.sum(axis=-1, keepdims=True)
    probs = e / np.where(total == 0, 1, total)
    return probs @ v, probs


@right("attention_forward")
def forward_einsum(q, k, v, mask=None):
    scale = 1 / math.sqrt(q.shape[-1])
    z = np.einsum("bhid,bhjd->bhij", q * scale, k)
    seen = np.broadcast_to(np.array(True) if mask is None else mask, z.shape)
    z = np.where(seen, z, -1e30)
    e = np.exp(z - z.max(-1)[..., None]) * seen
    probs = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    return [np.einsum("bhij,bhjc->bhic", probs, v), probs]


@right("attention_forward")
def forward_loops(q, k, v, mask=None):
    B, H, Nq, d = q.shape
    Nk, d_v = v.shape[2:]
    seen = np.broadcast_to(True if mask is None else mask, (B, H, Nq, Nk))
    out, probs = np.zeros((B, H, Nq, d_v)), np.zeros((B, H, Nq, Nk))
    for b, h, i in np.ndindex(B, H, Nq):
        keys = np.flatnonzero(seen[b, h, i])
        if len(keys) == 0:
            continue
        scores = [float(q[b, h, i] @ k[b, h, j]) / d**0.5 for j in keys]
        weights = np.array([math.exp(s - max(scores)) for s in scores])
        probs[b, h, i, keys] = weights / math.fsum(weights)
        for j in keys:
            out[b, h, i] += probs[b, h, i, j] * v[b, h, j]
    return out.tolist(), probs.tolist()


@right("attention_forward")
def forward_torch(q, k, v, mask=None):
    q, k, v = (torch.from_numpy(np.array(x)) for x in (q, k, v))
    z = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        z = z.masked_fill(~torch.from_numpy(np.array(mask)), -torch.inf)
    probs = torch.softmax(z, -1).nan_to_num(0.0)
    return probs @ v, probs


@right("attention_forward")
def forward_torch_with_gradient(q, k, v, mask=None):
    q, k, v = (torch.tensor(np.array(x), requires_grad=True) for x in (q, k, v))
    shape = (*q.shape[:3], k.shape[2])
    seen = torch.tensor(np.array(np.broadcast_to(True if mask is None else mask, shape)))
    alive = seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen | ~alive) * alive
    z = torch.where(seen, q @ k.mT / math.sqrt(q.shape[-1]), -torch.inf)
    return out, torch.where(alive, z, 0.0).softmax(-1) * alive


@right("attention_forward")
def forward_scipy_and_a_sentinel(q, k, v, mask=None):
    z = (q @ k.transpose(0, 1, 3, 2)) / q.shape[3] ** 0.5
    if mask is None:
        probs = scipy.special.softmax(z, axis=-1)
    else:
        probs = scipy.special.softmax(np.where(mask, z, -1e9), axis=-1) * mask
    return np.matmul(probs, v), probs


@right("attention_forward")
def forward_own_buffer(q, k, v, mask=None):
    z = np.matmul(q, np.swapaxes(k, 2, 3))
    z /= np.sqrt(q.shape[-1])
    if mask is not None:
        z[~np.broadcast_to(mask, z.shape)] = -np.inf
    z -= np.nan_to_num(z.max(-1, keepdims=True), neginf=0.0)
    np.exp(z, out=z)
    z /= z.sum(-1, keepdims=True) + (z.sum(-1, keepdims=True) == 0)
    return z @ v, z


@right("attention_forward")
def forward_logaddexp(q, k, v, mask=None):
    z = np.einsum("...id,...jd->...ij", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        z = z + np.where(mask, 0, -np.inf)
    lse = np.logaddexp.reduce(z, axis=-1, keepdims=True)
    probs = np.exp(z - np.where(np.isneginf(lse), 0, lse))
    return np.einsum("...ij,...jc->...ic", probs, v), probs


@right("attention_forward")
def forward_streaming(q, k, v, mask=None):
    """One key after the other, as FlashAttention does, then the weights from the sum."""
    z = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    seen = np.broadcast_to(True if mask is None else mask, z.shape)
    z = np.where(seen, z, -np.inf)
    m, total = np.full(z.shape[:3], -np.inf), np.zeros(z.shape[:3])
    out = np.zeros((*z.shape[:3], v.shape[-1]))
    for j in range(z.shape[-1]):
        new = np.maximum(m, z[..., j])
        safe = np.where(np.isneginf(new), 0, new)
        old, weight = np.exp(m - safe), np.exp(z[..., j] - safe)
        total = old * total + weight
        out = old[..., None] * out + weight[..., None] * v[:, :, None, j]
        m = new
    total = np.where(total == 0, 1, total)[..., None]
    m = np.where(np.isneginf(m), 0, m)[..., None]
    return out / total, np.exp(z - m) / total


@right("attention_forward")
def forward_in_float32_out(q, k, v, mask=None):
    """Exact logits, weights and sums in single precision."""
    out, probs = forward_plain(q, k, v, mask)
    return out.astype(np.float32), probs.astype(np.float32)


@mutating("attention_forward")
def forward_scales_q_in_place(q, k, v, mask=None):
    q /= np.sqrt(q.shape[-1])
    return forward_plain(q * np.sqrt(q.shape[-1]), k, v, mask)


@mutating("attention_forward")
def forward_clears_values(q, k, v, mask=None):
    out, probs = forward_plain(q, k, v, mask)
    v[...] = 0
    return out, probs


@wrong("attention_forward")
def forward_queries_normalised(q, k, v, mask=None):
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return forward_plain(q, k, v, mask)


@wrong("attention_forward")
def forward_scale_of_three_quarters(q, k, v, mask=None):
    return forward_plain(q * q.shape[-1] ** -0.25, k, v, mask)


@wrong("attention_forward")
def forward_sees_only_the_best(q, k, v, mask=None):
    probs = forward_plain(q, k, v, mask)[1]
    probs = (probs == probs.max(-1, keepdims=True)) * (probs > 0) * 1.0
    return probs @ v, probs


@wrong("attention_forward")
def forward_first_head_for_all(q, k, v, mask=None):
    return forward_plain(*(np.repeat(x[:, :1], x.shape[1], axis=1) for x in (q, k, v)), mask)


# ------------------------------------------------------------------------- attention_backward


@right("attention_backward")
def backward_plain(dout, q, k, v, probs):
    scale = q.shape[-1] ** -0.5
    dv = probs.swapaxes(-1, -2) @ dout
    dprobs = dout @ v.swapaxes(-1, -2)
    dlogits = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))
    return scale * dlogits @ k, scale * dlogits.swapaxes(-1, -2) @ q, dv


@right("attention_backward")
def backward_einsum(dout, q, k, v, probs):
    dprobs = np.einsum("bhic,bhjc->bhij", dout, v)
    dz = probs * (dprobs - np.einsum("bhij,bhij->bhi", probs, dprobs)[..., None])
    dz = dz / np.sqrt(q.shape[-1])
    return (
        np.einsum("bhij,bhjd->bhid", dz, k),
        np.einsum("bhij,bhid->bhjd", dz, q),
        np.einsum("bhij,bhic->bhjc", probs, dout),
    )


@right("attention_backward")
def backward_loops(dout, q, k, v, probs):
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        p = probs[b, h, i].astype(float)
        jacobian = np.diag(p) - np.outer(p, p)
        dz = jacobian @ (v[b, h] @ dout[b, h, i]) / math.sqrt(q.shape[-1])
        dq[b, h, i] = dz @ k[b, h]
        dk[b, h] += np.outer(dz, q[b, h, i])
        dv[b, h] += np.outer(p, dout[b, h, i])
    return [dq.tolist(), dk.tolist(), dv.tolist()]


@right("attention_backward")
def backward_through_the_output(dout, q, k, v, probs):
    """The row sum as dout · out: what FlashAttention saves."""
    delta = (dout * (probs @ v)).sum(-1, keepdims=True)
    dz = probs * (dout @ v.transpose(0, 1, 3, 2) - delta) * (1 / math.sqrt(q.shape[-1]))
    return dz @ k, np.transpose(dz, (0, 1, 3, 2)) @ q, np.transpose(probs, (0, 1, 3, 2)) @ dout


def by_autograd(dout, q, k, v, probs, factor=1.0):
    """Logits of which probs are the softmax, moved by what q and k change."""
    dout, q0, k0, v, p = (torch.from_numpy(np.array(x)) for x in (dout, q, k, v, probs))
    q, k, v = (x.clone().requires_grad_() for x in (q0, k0, v))
    z = (q @ k.mT - q0 @ k0.mT) / math.sqrt(q.shape[-1])
    weights = p * torch.exp(z)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1, total)
    (weights * torch.as_tensor(factor, dtype=p.dtype) @ v * dout).sum().backward()
    return q.grad, k.grad, v.grad


@right("attention_backward")
def backward_autograd(dout, q, k, v, probs):
    return by_autograd(dout, q, k, v, probs)


@right("attention_backward")
def backward_torch_formulas(dout, q, k, v, probs):
    dout, q, k, v, p = (torch.from_numpy(np.array(x)) for x in (dout, q, k, v, probs))
    dz = torch._softmax_backward_data(dout @ v.mT, p, -1, p.dtype) / q.shape[-1] ** 0.5
    return dz @ k, dz.mT @ q, p.mT @ dout


@right("attention_backward")
def backward_own_buffer(dout, q, k, v, probs):
    dz = dout @ np.swapaxes(v, -1, -2)
    dz -= (dz * probs).sum(-1)[..., None]
    dz *= probs
    dz /= np.sqrt(q.shape[-1])
    return dz @ k, (np.swapaxes(q, -1, -2) @ dz).swapaxes(-1, -2), probs.swapaxes(2, 3) @ dout


@right("attention_backward")
def backward_all_pairs(dout, q, k, v, probs):
    """The Jacobian of every row at once."""
    jacobian = probs[..., None] * np.eye(probs.shape[-1]) - probs[..., None] * probs[..., None, :]
    dz = np.einsum("...ijm,...im->...ij", jacobian, dout @ v.swapaxes(-1, -2))
    dq = np.einsum("...ij,...jd->...id", dz, k) / np.sqrt(q.shape[-1])
    dk = np.einsum("...ij,...id->...jd", dz, q) / np.sqrt(q.shape[-1])
    return dq, dk, np.einsum("...ij,...ic->...jc", probs, dout)


@right("attention_backward")
def backward_head_by_head(dout, q, k, v, probs):
    grads = [np.empty(x.shape) for x in (q, k, v)]
    for place in np.ndindex(q.shape[:2]):
        one = backward_plain(*(x[place][None, None] for x in (dout, q, k, v, probs)))
        for grad, part in zip(grads, one, strict=True):
            grad[place] = part[0, 0]
    return tuple(grads)


@mutating("attention_backward")
def backward_overwrites_upstream(dout, q, k, v, probs):
    result = backward_plain(dout, q, k, v, probs)
    dout *= 0
    return result


@mutating("attention_backward")
def backward_scales_k_in_place(dout, q, k, v, probs):
    before = np.array(k)
    k *= q.shape[-1] ** -0.5
    return backward_plain(dout, q, before, v, probs)


@wrong("attention_backward")
def backward_half_of_everything(dout, q, k, v, probs):
    return tuple(x / 2 for x in backward_plain(dout, q, k, v, probs))


@wrong("attention_backward")
def backward_dprobs_from_the_output(dout, q, k, v, probs):
    dprobs = (probs @ v) @ v.swapaxes(-1, -2)
    dlogits = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))
    return (
        dlogits @ k * q.shape[-1] ** -0.5,
        dlogits.swapaxes(-1, -2) @ q * q.shape[-1] ** -0.5,
        probs.swapaxes(-1, -2) @ dout,
    )


@wrong("attention_backward")
def backward_zeros(dout, q, k, v, probs):
    return np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)


@wrong("attention_backward")
def backward_row_sum_of_squares(dout, q, k, v, probs):
    dprobs = dout @ v.swapaxes(-1, -2)
    dz = probs * (dprobs - (probs**2 * dprobs).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    return dz @ k, dz.swapaxes(-1, -2) @ q, probs.swapaxes(-1, -2) @ dout


# ----------------------------------------------------------------- attention_backward_dropout


@right("attention_backward_dropout")
def dropout_plain(dout, q, k, v, probs, keep, rate):
    scale, w = q.shape[-1] ** -0.5, keep / (1 - rate)
    dv = (probs * w).swapaxes(-1, -2) @ dout
    dprobs = (dout @ v.swapaxes(-1, -2)) * w
    dlogits = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))
    return scale * dlogits @ k, scale * dlogits.swapaxes(-1, -2) @ q, dv


@right("attention_backward_dropout")
def dropout_einsum(dout, q, k, v, probs, keep, rate):
    dropped = np.where(keep, probs / (1 - rate), 0)
    dp = np.where(keep, np.einsum("bhic,bhjc->bhij", dout, v) / (1 - rate), 0)
    dz = probs * (dp - np.einsum("bhij,bhij->bhi", probs, dp)[..., None]) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bhij,bhjd->bhid", dz, k),
        np.einsum("bhij,bhid->bhjd", dz, q),
        np.einsum("bhij,bhic->bhjc", dropped, dout),
    )


@right("attention_backward_dropout")
def dropout_through_the_output(dout, q, k, v, probs, keep, rate):
    dropped = probs * keep / (1 - rate)
    delta = (dout * (dropped @ v)).sum(-1, keepdims=True)
    dz = dropped * (dout @ v.swapaxes(-1, -2)) - probs * delta
    root = math.sqrt(q.shape[-1])
    return dz @ k / root, dz.swapaxes(-1, -2) @ q / root, dropped.swapaxes(-1, -2) @ dout


@right("attention_backward_dropout")
def dropout_loops(dout, q, k, v, probs, keep, rate):
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h, i in np.ndindex(q.shape[:3]):
        p, w = probs[b, h, i].astype(float), keep[b, h, i] / (1 - rate)
        dp = w * (v[b, h] @ dout[b, h, i])
        dz = p * (dp - p @ dp) / math.sqrt(q.shape[-1])
        dq[b, h, i] = dz @ k[b, h]
        dk[b, h] += np.outer(dz, q[b, h, i])
        dv[b, h] += np.outer(p * w, dout[b, h, i])
    return [dq, dk, dv]


@right("attention_backward_dropout")
def dropout_autograd(dout, q, k, v, probs, keep, rate):
    return by_autograd(dout, q, k, v, probs, keep / (1 - rate))


@right("attention_backward_dropout")
def dropout_indexed(dout, q, k, v, probs, keep, rate):
    dropped = probs.copy()
    dropped[~keep] = 0
    dropped /= 1 - rate
    dprobs = dout @ np.swapaxes(v, 2, 3)
    dprobs[~keep] = 0
    dprobs *= 1 / (1 - rate)
    dprobs -= (dprobs * probs).sum(-1, keepdims=True)
    dprobs *= probs
    dprobs *= q.shape[-1] ** -0.5
    return dprobs @ k, np.swapaxes(dprobs, 2, 3) @ q, np.swapaxes(dropped, 2, 3) @ dout


@right("attention_backward_dropout")
def dropout_scaled_upstream(dout, q, k, v, probs, keep, rate):
    """1/(1 - rate) taken out of both products, into dout."""
    dout = dout / (1 - rate)
    dv = (probs * keep).swapaxes(-1, -2) @ dout
    dprobs = (dout @ v.swapaxes(-1, -2)) * keep
    dz = probs * (dprobs - (probs * dprobs).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return dz @ k, dz.swapaxes(-1, -2) @ q, dv


@mutating("attention_backward_dropout")
def dropout_clears_the_dropped(dout, q, k, v, probs, keep, rate):
    result = dropout_plain(dout, q, k, v, probs, keep, rate)
    probs *= keep
    keep[...] = True
    return result


@mutating("attention_backward_dropout")
def dropout_scales_upstream_in_place(dout, q, k, v, probs, keep, rate):
    result = dropout_plain(dout, q, k, v, probs, keep, rate)
    dout *= 2
    return result


@wrong("attention_backward_dropout")
def dropout_draws_again(dout, q, k, v, probs, keep, rate):
    fresh = np.random.default_rng(0).random(probs.shape) >= rate
    return dropout_plain(dout, q, k, v, probs, fresh, rate)


@wrong("attention_backward_dropout")
def dropout_on_the_keys(dout, q, k, v, probs, keep, rate):
    return dropout_plain(dout, q, k, v, probs, np.broadcast_to(keep[:, :, :1], keep.shape), rate)


@wrong("attention_backward_dropout")
def dropout_root_of_the_factor(dout, q, k, v, probs, keep, rate):
    return dropout_plain(dout, q, k, v, probs, keep, 1 - math.sqrt(1 - rate))
