"""Chapter 1 in many hands."""

import math

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong

# ------------------------------------------------------------------------------------ softmax


@right("softmax")
def softmax_plain(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@right("softmax")
def softmax_loops(z, axis=-1):
    rows = np.moveaxis(z, axis, -1)
    out = np.zeros(rows.shape)
    for place in np.ndindex(rows.shape[:-1]):
        peak = max(rows[place])
        weights = [math.exp(value - peak) for value in rows[place]]
        out[place] = [w / math.fsum(weights) for w in weights]
    return np.moveaxis(out, -1, axis).tolist()


@right("softmax")
def softmax_torch(z, axis=-1):
    return torch.softmax(torch.from_numpy(z), axis)


@right("softmax")
def softmax_torch_with_gradient(z, axis=-1):
    return torch.tensor(z, requires_grad=True).softmax(dim=axis)


@right("softmax")
def softmax_scipy(z, axis=-1):
    return scipy.special.softmax(z, axis=axis)


@right("softmax")
def softmax_through_logsumexp(z, axis=-1):
    return np.exp(z - np.logaddexp.reduce(z, axis=axis, keepdims=True))


@right("softmax")
def softmax_own_buffer(z, axis=-1):
    e = np.array(z, dtype=float)
    e -= e.max(axis=axis, keepdims=True)
    np.exp(e, out=e)
    e /= e.sum(axis=axis, keepdims=True)
    return e


@right("softmax")
def softmax_einsum(z, axis=-1):
    rows = np.moveaxis(z, axis, -1)
    e = np.exp(rows - np.amax(rows, axis=-1)[..., None])
    return np.moveaxis(np.einsum("...n,...->...n", e, 1 / np.einsum("...n->...", e)), -1, axis)


@right("softmax")
def softmax_exp_in_float32(z, axis=-1):
    e = np.exp((z - z.max(axis=axis, keepdims=True)).astype(np.float32))
    return e / e.sum(axis=axis, keepdims=True)


@right("softmax")
def softmax_extended(z, axis=-1):
    e = np.exp((z - z.max(axis=axis, keepdims=True)).astype(np.longdouble))
    return e / e.sum(axis=axis, keepdims=True)


@right("softmax")
def softmax_along_axis(z, axis=-1):
    def one(row):
        e = np.exp(row - np.max(row))
        return e / np.sum(e)

    return np.asfortranarray(np.apply_along_axis(one, axis, z))


@mutating("softmax")
def softmax_in_place(z, axis=-1):
    z -= z.max(axis=axis, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


@mutating("softmax")
def softmax_torch_shared(z, axis=-1):
    t = torch.from_numpy(z)
    return t.sub_(t.amax(axis, keepdim=True)).exp_().div_(t.sum(axis, keepdim=True))


@wrong("softmax")
def softmax_base_2(z, axis=-1):
    e = 2 ** (z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@wrong("softmax")
def softmax_unit_norm(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / np.linalg.norm(e, axis=axis, keepdims=True)


@wrong("softmax")
def softmax_minus_inf_replaced(z, axis=-1):
    z = np.where(np.isneginf(z), -10.0, z)
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


# -------------------------------------------------------------------------------- log_softmax


@right("log_softmax")
def log_softmax_plain(z, axis=-1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


@right("log_softmax")
def log_softmax_logaddexp(z, axis=-1):
    return z - np.logaddexp.reduce(z, axis=axis, keepdims=True)


@right("log_softmax")
def log_softmax_maximum_added_back(z, axis=-1):
    peak = z.max(axis=axis, keepdims=True)
    return z - (peak + np.log(np.exp(z - peak).sum(axis=axis, keepdims=True)))


@right("log_softmax")
def log_softmax_torch(z, axis=-1):
    return F.log_softmax(torch.from_numpy(z), dim=axis)


@right("log_softmax")
def log_softmax_torch_with_gradient(z, axis=-1):
    z = torch.tensor(z, requires_grad=True)
    return z - torch.logsumexp(z, axis, keepdim=True)


@right("log_softmax")
def log_softmax_scipy(z, axis=-1):
    return scipy.special.log_softmax(z, axis=axis)


@right("log_softmax")
def log_softmax_loops(z, axis=-1):
    rows = np.moveaxis(z, axis, -1)
    out = np.zeros(rows.shape)
    for place in np.ndindex(rows.shape[:-1]):
        peak = max(rows[place])
        total = math.log(math.fsum(math.exp(v - peak) for v in rows[place]))
        out[place] = [v - peak - total for v in rows[place]]
    return np.moveaxis(out, -1, axis).tolist()


@right("log_softmax")
def log_softmax_log1p(z, axis=-1):
    rows = np.sort(z, axis=axis)
    peak = np.take(rows, [-1], axis=axis)
    others = np.delete(rows, -1, axis=axis)
    rest = np.exp(others - peak).sum(axis=axis, keepdims=True)
    return z - peak - np.log1p(rest)


@mutating("log_softmax")
def log_softmax_in_place(z, axis=-1):
    z -= z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


@wrong("log_softmax")
def log_softmax_base_2(z, axis=-1):
    return log_softmax_plain(z, axis) / np.log(2)


@wrong("log_softmax")
def log_softmax_clipped(z, axis=-1):
    return np.maximum(log_softmax_plain(z, axis), -100)


@wrong("log_softmax")
def log_softmax_mean(z, axis=-1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).mean(axis=axis, keepdims=True))


# --------------------------------------------------------------------------- softmax_jacobian


@right("softmax_jacobian")
def jacobian_plain(p):
    return np.diag(p) - np.outer(p, p)


@right("softmax_jacobian")
def jacobian_loops(p):
    n = len(p)
    return [[p[i] * ((i == j) - p[j]) for j in range(n)] for i in range(n)]


@right("softmax_jacobian")
def jacobian_einsum(p):
    return np.einsum("i,ij->ij", p, np.eye(len(p))) - np.einsum("i,j->ij", p, p)


@right("softmax_jacobian")
def jacobian_broadcast(p):
    return p[:, None] * (np.eye(p.size) - p[None, :])


@right("softmax_jacobian")
def jacobian_own_buffer(p):
    jacobian = -p[:, None] @ p[None, :]
    jacobian[np.diag_indices(len(p))] += p
    return jacobian


@right("softmax_jacobian")
def jacobian_torch(p):
    p = torch.from_numpy(p).clone().requires_grad_()
    return torch.diag(p) - torch.outer(p, p)


@right("softmax_jacobian")
def jacobian_autograd(p):
    z = torch.from_numpy(p).log()
    return torch.autograd.functional.jacobian(lambda z: torch.softmax(z, 0), z)


@right("softmax_jacobian")
def jacobian_float32(p):
    p = p.astype(np.float32)
    return np.diag(p) - np.outer(p, p)


@right("softmax_jacobian")
def jacobian_rows(p):
    return tuple(p[i] * (np.eye(len(p))[i] - p) for i in range(len(p)))


@mutating("softmax_jacobian")
def jacobian_changes_p(p):
    jacobian = np.diag(p) - np.outer(p, p)
    p[:] = 0
    return jacobian


@wrong("softmax_jacobian")
def jacobian_upper(p):
    return np.triu(jacobian_plain(p))


@wrong("softmax_jacobian")
def jacobian_twice_off_diagonal(p):
    return np.diag(p * (1 - p)) - 2 * np.outer(p, p) * (1 - np.eye(len(p)))


@wrong("softmax_jacobian")
def jacobian_squares_on_diagonal(p):
    return np.diag(p**2) - np.outer(p, p)


# --------------------------------------------------------------------------- softmax_backward


@right("softmax_backward")
def backward_plain(dp, p, axis=-1):
    return p * (dp - (p * dp).sum(axis=axis, keepdims=True))


@right("softmax_backward")
def backward_jacobians(dp, p, axis=-1):
    dp, p = np.moveaxis(dp, axis, -1), np.moveaxis(p, axis, -1)
    out = np.zeros(p.shape)
    for place in np.ndindex(p.shape[:-1]):
        out[place] = (np.diag(p[place]) - np.outer(p[place], p[place])) @ dp[place]
    return np.moveaxis(out, -1, axis)


@right("softmax_backward")
def backward_einsum(dp, p, axis=-1):
    dp, p = np.moveaxis(dp, axis, -1), np.moveaxis(p, axis, -1)
    dz = p * dp - p * np.einsum("...n,...n->...", p, dp)[..., None]
    return np.moveaxis(dz, -1, axis)


@right("softmax_backward")
def backward_autograd(dp, p, axis=-1):
    z = torch.from_numpy(p).log().requires_grad_()
    torch.softmax(z, axis).backward(torch.from_numpy(dp))
    return z.grad


@right("softmax_backward")
def backward_torch_internal(dp, p, axis=-1):
    dp, p = torch.from_numpy(dp), torch.from_numpy(p)
    return torch.ops.aten._softmax_backward_data(dp, p, axis % p.ndim, p.dtype)


@right("softmax_backward")
def backward_own_buffer(dp, p, axis=-1):
    dz = dp * p
    dz -= p * dz.sum(axis=axis, keepdims=True)
    return dz


@right("softmax_backward")
def backward_loops(dp, p, axis=-1):
    dp, p = np.moveaxis(dp, axis, -1), np.moveaxis(p, axis, -1)
    out = np.zeros(p.shape)
    for place in np.ndindex(p.shape[:-1]):
        inner = math.fsum(a * b for a, b in zip(dp[place], p[place], strict=True))
        for i in range(p.shape[-1]):
            out[place][i] = p[place][i] * (dp[place][i] - inner)
    return np.moveaxis(out, -1, axis).tolist()


@right("softmax_backward")
def backward_average(dp, p, axis=-1):
    return p * (dp - np.expand_dims(np.average(dp, axis=axis, weights=p), axis))


@right("softmax_backward")
def backward_float32(dp, p, axis=-1):
    dp, p = dp.astype(np.float32), p.astype(np.float32)
    return p * (dp - (p * dp).sum(axis=axis, keepdims=True))


@mutating("softmax_backward")
def backward_changes_dp(dp, p, axis=-1):
    dp -= (p * dp).sum(axis=axis, keepdims=True)
    return p * dp


@mutating("softmax_backward")
def backward_into_p(dp, p, axis=-1):
    p *= dp - (p * dp).sum(axis=axis, keepdims=True)
    return p


@wrong("softmax_backward")
def backward_divided(dp, p, axis=-1):
    return p * (dp - (p * dp).sum(axis=axis, keepdims=True) / p.shape[axis] ** 0.5)


@wrong("softmax_backward")
def backward_maximum(dp, p, axis=-1):
    return p * (dp - (p * dp).max(axis=axis, keepdims=True))


@wrong("softmax_backward")
def backward_first_axis_only(dp, p, axis=-1):
    return p * (dp - (p * dp).sum(axis=tuple(range(1, p.ndim)), keepdims=True))


@wrong("softmax_backward")
def backward_squared(dp, p, axis=-1):
    return p * (dp - (p * p * dp).sum(axis=axis, keepdims=True))


@wrong("softmax_backward")
def backward_half(dp, p, axis=-1):
    return backward_plain(dp, p, axis) / 2


# ------------------------------------------------------------------------------ cross_entropy


@right("cross_entropy")
def cross_entropy_plain(logits, targets, label_smoothing=0.0):
    B, K = logits.shape
    y = np.full((B, K), label_smoothing / K)
    y[np.arange(B), targets] += 1 - label_smoothing
    logp = log_softmax_plain(logits)
    return -(y * logp).sum() / B, (np.exp(logp) - y) / B


@right("cross_entropy")
def cross_entropy_torch(logits, targets, label_smoothing=0.0):
    z = torch.tensor(logits, requires_grad=True)
    loss = F.cross_entropy(z, torch.tensor(targets), label_smoothing=label_smoothing)
    loss.backward()
    return loss, z.grad


@right("cross_entropy")
def cross_entropy_loops(logits, targets, label_smoothing=0.0):
    B, K = logits.shape
    loss, gradient = 0.0, [[0.0] * K for _ in range(B)]
    for b in range(B):
        peak = max(logits[b])
        lse = peak + math.log(sum(math.exp(v - peak) for v in logits[b]))
        for k in range(K):
            y = label_smoothing / K + (1 - label_smoothing) * (k == targets[b])
            loss -= y * (logits[b, k] - lse) / B
            gradient[b][k] = (math.exp(logits[b, k] - lse) - y) / B
    return [loss, gradient]


@right("cross_entropy")
def cross_entropy_picked(logits, targets, label_smoothing=0.0):
    rows = np.arange(len(logits))
    logp = log_softmax_plain(logits)
    picked, average = logp[rows, targets], logp.mean(axis=1)
    loss = -((1 - label_smoothing) * picked + label_smoothing * average).mean()
    gradient = np.exp(logp) - label_smoothing / logits.shape[1]
    gradient[rows, targets] -= 1 - label_smoothing
    return np.array(loss), gradient / len(logits)


@right("cross_entropy")
def cross_entropy_one_hot(logits, targets, label_smoothing=0.0):
    K = logits.shape[1]
    y = (1 - label_smoothing) * np.eye(K)[targets] + label_smoothing * np.ones(K) / K
    lse = np.logaddexp.reduce(logits, axis=1)
    loss = np.mean(lse - np.einsum("bk,bk->b", y, logits))
    return float(loss), (softmax_plain(logits) - y) / len(logits)


@right("cross_entropy")
def cross_entropy_through_log_softmax(logits, targets, label_smoothing=0.0):
    B, K = logits.shape
    y = label_smoothing / K + (1 - label_smoothing) * (targets[:, None] == np.arange(K))
    logp = log_softmax_plain(logits)
    dlogp = -y / B
    return (dlogp * logp).sum(), dlogp - np.exp(logp) * dlogp.sum(axis=1, keepdims=True)


@right("cross_entropy")
def cross_entropy_gradient_in_float32(logits, targets, label_smoothing=0.0):
    loss, gradient = cross_entropy_plain(logits.astype(np.float32), targets, label_smoothing)
    return np.float32(loss), gradient.astype(np.float32)


@mutating("cross_entropy")
def cross_entropy_shifts_logits(logits, targets, label_smoothing=0.0):
    logits -= logits.max(axis=1, keepdims=True)
    return cross_entropy_plain(logits, targets, label_smoothing)


@wrong("cross_entropy")
def cross_entropy_in_bits(logits, targets, label_smoothing=0.0):
    loss, gradient = cross_entropy_plain(logits, targets, label_smoothing)
    return loss / np.log(2), gradient


@wrong("cross_entropy")
def cross_entropy_swapped(logits, targets, label_smoothing=0.0):
    return cross_entropy_plain(logits, targets, label_smoothing)[::-1]


@wrong("cross_entropy")
def cross_entropy_loss_only(logits, targets, label_smoothing=0.0):
    return cross_entropy_plain(logits, targets, label_smoothing)[0]


@wrong("cross_entropy")
def cross_entropy_mean_squares(logits, targets, label_smoothing=0.0):
    B, K = logits.shape
    y = (1 - label_smoothing) * np.eye(K)[targets] + label_smoothing / K
    p = softmax_plain(logits)
    return ((p - y) ** 2).sum() / B, 2 * (p - y) / B
