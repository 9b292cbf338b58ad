"""Chapter 8 in many hands."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong


def tensor(x):
    return torch.tensor(np.array(x, dtype=float))


# ----------------------------------------------------------------------------------- sgd_step


@right("sgd_step")
def sgd_plain(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    velocity = momentum * velocity + grad + weight_decay * param
    return param - lr * velocity, velocity


@right("sgd_step")
def sgd_loops(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    new, rolled = np.zeros(param.shape), np.zeros(param.shape)
    for at in np.ndindex(param.shape):
        rolled[at] = momentum * velocity[at] + grad[at] + weight_decay * param[at]
        new[at] = param[at] - lr * rolled[at]
    return [new.tolist(), rolled.tolist()]


@right("sgd_step")
def sgd_own_buffers(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    u = np.array(velocity, dtype=float)
    u *= momentum
    u += grad
    u += weight_decay * param
    new = np.array(param, dtype=float)
    new -= lr * u
    return new, u


@right("sgd_step")
def sgd_torch(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    p = torch.nn.Parameter(tensor(param))
    optimizer = torch.optim.SGD([p], lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        optimizer.state[p]["momentum_buffer"] = tensor(velocity)
    p.grad = tensor(grad)
    optimizer.step()
    rolled = (
        optimizer.state[p]["momentum_buffer"] if momentum else tensor(grad + weight_decay * param)
    )
    return p, rolled


@right("sgd_step")
def sgd_shrunk(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    """The parameter's own share put together."""
    new = (1 - lr * weight_decay) * param - lr * (grad + momentum * velocity)
    return new, np.stack([momentum * velocity, grad, weight_decay * param]).sum(axis=0)


@right("sgd_step")
def sgd_scaled_velocity(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    step = momentum * (lr * velocity) + lr * (grad + weight_decay * param)
    return param - step, step / lr


@mutating("sgd_step")
def sgd_in_place(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    velocity *= momentum
    velocity += grad + weight_decay * param
    return param - lr * velocity, velocity.copy()


@wrong("sgd_step")
def sgd_normalised(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    u = momentum * velocity + grad / (1 + np.linalg.norm(grad)) + weight_decay * param
    return param - lr * u, u


@wrong("sgd_step")
def sgd_momentum_squared(param, grad, velocity, lr, momentum=0.0, weight_decay=0.0):
    u = momentum**2 * velocity + grad + weight_decay * param
    return param - lr * u, u


# --------------------------------------------------------------------------------- adamw_step


@right("adamw_step")
def adamw_plain(param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    b1, b2 = betas
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad**2
    mhat, vhat = m / (1 - b1**step), v / (1 - b2**step)
    return param - lr * weight_decay * param - lr * mhat / (np.sqrt(vhat) + eps), m, v


@right("adamw_step")
def adamw_as_in_the_paper(
    param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad * grad
    ratio = (m / (1 - b1**step)) / ((v / (1 - b2**step)) ** 0.5 + eps)
    return [param - lr * (ratio + weight_decay * param), m, v]


@right("adamw_step")
def adamw_as_in_torch(param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    b1, b2 = betas
    p = np.array(param, dtype=float)
    p *= 1 - lr * weight_decay
    m, v = m + (1 - b1) * (grad - m), b2 * v + (1 - b2) * np.square(grad)
    size = lr / (1 - b1**step)
    p -= size * m / (np.sqrt(v) / math.sqrt(1 - b2**step) + eps)
    return p, m, v


@right("adamw_step")
def adamw_torch(param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    p = torch.nn.Parameter(tensor(param))
    optimizer = torch.optim.AdamW([p], lr, betas, eps, weight_decay)
    optimizer.state[p] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": tensor(m),
        "exp_avg_sq": tensor(v),
    }
    p.grad = tensor(grad)
    optimizer.step()
    return p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]


@right("adamw_step")
def adamw_loops(param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    b1, b2 = betas
    out = [np.zeros(param.shape) for _ in range(3)]
    for at in np.ndindex(param.shape):
        g, p = float(grad[at]), float(param[at])
        mean, square = b1 * float(m[at]) + (1 - b1) * g, b2 * float(v[at]) + (1 - b2) * g * g
        root = math.sqrt(square / (1 - b2**step))
        p = p * (1 - lr * weight_decay) - lr * mean / (1 - b1**step) / (root + eps)
        for part, value in zip(out, (p, mean, square), strict=True):
            part[at] = value
    return tuple(part.tolist() for part in out)


@right("adamw_step")
def adamw_with_eps_scaled(
    param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    """The corrections pulled into the rate, eps scaled along: the efficient form, kept exact."""
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
    root = (1 - b2**step) ** 0.5
    rate = lr * root / (1 - b1**step)
    return param - rate * m / (np.sqrt(v) + eps * root) - lr * weight_decay * param, m, v


@mutating("adamw_step")
def adamw_in_place(param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    found = adamw_plain(param, grad, m, v, step, lr, betas, eps, weight_decay)
    param -= 0.5
    m += 1
    return found


@wrong("adamw_step")
def adamw_largest_square(
    param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    """AMSGrad by another name."""
    _, m, new = adamw_plain(param, grad, m, v, step, lr, betas, eps, weight_decay)
    v = np.maximum(v, new)
    ratio = m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
    return param - lr * (ratio + weight_decay * param), m, v


@wrong("adamw_step")
def adamw_sign_of_m(param, grad, m, v, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    _, m, v = adamw_plain(param, grad, m, v, step, lr, betas, eps, weight_decay)
    return param - lr * (np.sign(m) + weight_decay * param), m, v


# ---------------------------------------------------------------------------- model_adamw_step


def decays(name, param):
    return param.ndim > 1 and "embed" not in name and "position" not in name


@right("model_adamw_step")
def model_plain(params, grads, m, v, step, lr, weight_decay=0.01):
    new, new_m, new_v = {}, {}, {}
    for name, p in params.items():
        share = weight_decay if decays(name, p) else 0.0
        new[name], new_m[name], new_v[name] = adamw_plain(
            p, grads[name], m[name], v[name], step, lr, weight_decay=share
        )
    return new, new_m, new_v


@right("model_adamw_step")
def model_by_words(params, grads, m, v, step, lr, weight_decay=0.01):
    """Told by name: what ends in a matrix's name, wherever it stands."""

    def share(name):
        last = name.split(".")[-1]
        if "embed" in name or "position" in name or "norm" in name:
            return 0.0
        return weight_decay if last in ("weight", "wq", "wk", "wv", "wo") else 0.0

    steps = {
        n: adamw_as_in_torch(p, grads[n], m[n], v[n], step, lr, weight_decay=share(n))
        for n, p in params.items()
    }
    return [{n: each[i] for n, each in steps.items()} for i in range(3)]


@right("model_adamw_step")
def model_torch(params, grads, m, v, step, lr, weight_decay=0.01):
    p = {n: torch.nn.Parameter(tensor(a)) for n, a in params.items()}
    groups = [
        {"params": [w for n, w in p.items() if decays(n, w)], "weight_decay": weight_decay},
        {"params": [w for n, w in p.items() if not decays(n, w)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr)
    for n, w in p.items():
        w.grad = tensor(grads[n])
        optimizer.state[w] = {
            "step": torch.tensor(float(step - 1)),
            "exp_avg": tensor(m[n]),
            "exp_avg_sq": tensor(v[n]),
        }
    optimizer.step()
    return (
        {n: w.detach().numpy() for n, w in p.items()},
        {n: optimizer.state[w]["exp_avg"].numpy() for n, w in p.items()},
        {n: optimizer.state[w]["exp_avg_sq"].numpy() for n, w in p.items()},
    )


@right("model_adamw_step")
def model_decay_first(params, grads, m, v, step, lr, weight_decay=0.01):
    shrunk = {n: p * (1 - lr * weight_decay) if decays(n, p) else p for n, p in params.items()}
    steps = {
        n: adamw_plain(p, grads[n], m[n], v[n], step, lr, weight_decay=0) for n, p in shrunk.items()
    }
    return tuple({n: each[i] for n, each in steps.items()} for i in range(3))


@right("model_adamw_step")
def model_lists(params, grads, m, v, step, lr, weight_decay=0.01):
    found = model_plain(params, grads, m, v, step, lr, weight_decay)
    return tuple({n: a.tolist() for n, a in part.items()} for part in found)


@right("model_adamw_step")
def model_backwards(params, grads, m, v, step, lr, weight_decay=0.01):
    """In another order of names, and by the shape's length."""
    chosen = {
        n for n in params if len(params[n].shape) == 2 and not n.startswith(("embed", "position"))
    }
    out = {}, {}, {}
    for n in reversed(list(params)):
        share = weight_decay * (n in chosen)
        stepped = adamw_loops(params[n], grads[n], m[n], v[n], step, lr, weight_decay=share)
        for part, a in zip(out, stepped, strict=True):
            part[n] = np.array(a)
    return out


@mutating("model_adamw_step")
def model_in_place(params, grads, m, v, step, lr, weight_decay=0.01):
    found = model_plain(params, grads, m, v, step, lr, weight_decay)
    for g in grads.values():
        g += 1
    return found


@wrong("model_adamw_step")
def model_half_decay_for_biases(params, grads, m, v, step, lr, weight_decay=0.01):
    new, new_m, new_v = {}, {}, {}
    for name, p in params.items():
        share = weight_decay if decays(name, p) else weight_decay / 2
        new[name], new_m[name], new_v[name] = adamw_plain(
            p, grads[name], m[name], v[name], step, lr, weight_decay=share
        )
    return new, new_m, new_v


# ------------------------------------------------------------------------- clip_by_global_norm


@right("clip_by_global_norm")
def clip_plain(grads, max_norm):
    norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in grads.values()))
    if not np.isfinite(norm) or norm <= max_norm:
        return grads, norm
    return {n: g * (max_norm / norm) for n, g in grads.items()}, norm


@right("clip_by_global_norm")
def clip_with_torchs_eps(grads, max_norm):
    norm = math.sqrt(sum(float(np.square(g, dtype=float).sum()) for g in grads.values()))
    factor = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
    return {n: factor * g for n, g in grads.items()}, norm


@right("clip_by_global_norm")
def clip_flat(grads, max_norm):
    flat = np.concatenate([np.asarray(g, float).ravel() for g in grads.values()])
    norm = np.linalg.norm(flat)
    out = {n: np.array(g, dtype=float) for n, g in grads.items()}
    if np.isfinite(norm) and norm > max_norm:
        for g in out.values():
            g *= max_norm / norm
    return out, norm


@right("clip_by_global_norm")
def clip_torch(grads, max_norm):
    held = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads.values()]
    for p, g in zip(held, grads.values(), strict=True):
        p.grad = tensor(g)
    norm = torch.nn.utils.get_total_norm([p.grad for p in held])
    if torch.isfinite(norm):
        torch.nn.utils.clip_grad_norm_(held, max_norm)
    return {n: p.grad for n, p in zip(grads, held, strict=True)}, norm


@right("clip_by_global_norm")
def clip_loops(grads, max_norm):
    total = 0.0
    for g in grads.values():
        for x in g.ravel().tolist():
            total += x * x
    norm = total**0.5
    if norm > max_norm and norm != math.inf:
        return {n: (g / norm * max_norm).tolist() for n, g in grads.items()}, norm
    return {n: g.tolist() for n, g in grads.items()}, norm


@right("clip_by_global_norm")
def clip_largest_first(grads, max_norm):
    peak = max(np.abs(g).max() for g in grads.values())
    if peak == 0 or not np.isfinite(peak):
        return {n: g.copy() for n, g in grads.items()}, peak
    scaled = [np.asarray(g, float) / peak for g in grads.values()]
    norm = peak * np.sqrt(sum(np.vdot(g, g) for g in scaled))
    return {n: np.asarray(g, float) / max(1, norm / max_norm) for n, g in grads.items()}, norm


@mutating("clip_by_global_norm")
def clip_in_place(grads, max_norm):
    clipped, norm = clip_plain(grads, max_norm)
    out = {n: np.array(g) for n, g in clipped.items()}
    for g in grads.values():
        g -= 1
    return out, norm


@wrong("clip_by_global_norm")
def clip_to_half(grads, max_norm):
    return clip_plain(grads, max_norm / 2)


@wrong("clip_by_global_norm")
def clip_softly(grads, max_norm):
    norm = clip_plain(grads, max_norm)[1]
    if not np.isfinite(norm):
        return grads, norm
    return {n: g / (1 + norm / max_norm) for n, g in grads.items()}, norm


# ------------------------------------------------------------------------- warmup_inverse_sqrt


@right("warmup_inverse_sqrt")
def inverse_paper(step, d_model, warmup):
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


@right("warmup_inverse_sqrt")
def inverse_branches(step, d_model, warmup):
    if step <= warmup:
        return step / (warmup * math.sqrt(warmup) * math.sqrt(d_model))
    return 1 / math.sqrt(d_model * step)


@right("warmup_inverse_sqrt")
def inverse_from_the_peak(step, d_model, warmup):
    peak = 1 / np.sqrt(d_model * warmup)
    return peak * step / warmup if step < warmup else peak * np.sqrt(warmup / step)


@right("warmup_inverse_sqrt")
def inverse_array(step, d_model, warmup):
    sides = np.array([step**-0.5, step / warmup**1.5])
    return sides.min() / np.sqrt(d_model)


@right("warmup_inverse_sqrt")
def inverse_torch(step, d_model, warmup):
    t = torch.tensor(float(step), dtype=torch.float64)
    return torch.minimum(t.rsqrt(), t * warmup**-1.5) * d_model**-0.5


@right("warmup_inverse_sqrt")
def inverse_logarithms(step, d_model, warmup):
    t, w = math.log(step), math.log(warmup)
    return math.exp(min(-t / 2, t - 1.5 * w) - math.log(d_model) / 2)


@wrong("warmup_inverse_sqrt")
def inverse_cube_root(step, d_model, warmup):
    return (d_model * warmup) ** -0.5 * min(step / warmup, (warmup / step) ** (1 / 3))


# ------------------------------------------------------------------------------- warmup_cosine


@right("warmup_cosine")
def cosine_plain(step, peak, warmup, total, floor=0.0):
    if step < warmup:
        return peak * step / warmup
    part = min(1.0, (step - warmup) / (total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * part))


@right("warmup_cosine")
def cosine_numpy(step, peak, warmup, total, floor=0.0):
    part = np.clip((step - warmup) / (total - warmup), 0, 1)
    up = step / warmup if warmup else 1.0
    return np.where(
        step < warmup, peak * up, floor + (peak - floor) * (1 + np.cos(np.pi * part)) / 2
    )


@right("warmup_cosine")
def cosine_middle_and_swing(step, peak, warmup, total, floor=0.0):
    if step < warmup:
        return peak / warmup * step
    if step >= total:
        return floor
    swing = math.cos((step - warmup) / (total - warmup) * math.pi)
    return (peak + floor) / 2 + (peak - floor) / 2 * swing


@right("warmup_cosine")
def cosine_mixed(step, peak, warmup, total, floor=0.0):
    if step < warmup:
        return step / warmup * peak
    share = math.cos(math.pi / 2 * min(1, (step - warmup) / (total - warmup))) ** 2
    return share * peak + (1 - share) * floor


@right("warmup_cosine")
def cosine_torch(step, peak, warmup, total, floor=0.0):
    if step < warmup:
        return torch.tensor(peak * step / warmup, dtype=torch.float64)
    part = torch.tensor(min(step, total) - warmup, dtype=torch.float64) / (total - warmup)
    return floor + (peak - floor) * (1 + torch.cos(torch.pi * part)) / 2


@right("warmup_cosine")
def cosine_table(step, peak, warmup, total, floor=0.0):
    """The whole schedule, of which one entry is asked for."""
    up = [peak * t / warmup for t in range(warmup)]
    angles = np.linspace(0, np.pi, total - warmup + 1)
    down = floor + (peak - floor) * (1 + np.cos(angles)) / 2
    return [*up, *down][min(step, total)]


@wrong("warmup_cosine")
def cosine_squared(step, peak, warmup, total, floor=0.0):
    if step < warmup:
        return peak * (step / warmup) ** 2
    return cosine_plain(step, peak, warmup, total, floor)


# ------------------------------------------------------------------------ accumulate_gradients


@right("accumulate_gradients")
def pieces_plain(losses, grads, sizes):
    total = sum(sizes)
    loss = sum(n * x for n, x in zip(sizes, losses, strict=True)) / total
    return loss, {
        name: sum(n * g[name] for n, g in zip(sizes, grads, strict=True)) / total
        for name in grads[0]
    }


@right("accumulate_gradients")
def pieces_average(losses, grads, sizes):
    return np.average(losses, weights=sizes), {
        name: np.average([g[name] for g in grads], axis=0, weights=sizes) for name in grads[0]
    }


@right("accumulate_gradients")
def pieces_running(losses, grads, sizes):
    """A mean that is corrected with every piece."""
    seen, loss = 0, 0.0
    mean = {name: np.zeros(g.shape) for name, g in grads[0].items()}
    for x, piece, n in zip(losses, grads, sizes, strict=True):
        if n == 0:
            continue
        seen += n
        loss += (x - loss) * n / seen
        for name, g in piece.items():
            mean[name] += (g - mean[name]) * n / seen
    return loss, mean


@right("accumulate_gradients")
def pieces_einsum(losses, grads, sizes):
    share = np.array(sizes) / np.sum(sizes)
    return share @ losses, {
        name: np.einsum("k,k...->...", share, np.stack([g[name] for g in grads]))
        for name in grads[0]
    }


@right("accumulate_gradients")
def pieces_torch(losses, grads, sizes):
    share = torch.tensor(sizes, dtype=torch.float64)
    share = share / share.sum()
    mean = {
        name: torch.tensordot(share, torch.stack([tensor(g[name]) for g in grads]), 1)
        for name in grads[0]
    }
    return share @ tensor(losses), mean


@right("accumulate_gradients")
def pieces_lists(losses, grads, sizes):
    loss, mean = pieces_plain(losses, grads, sizes)
    return [float(loss), {name: g.tolist() for name, g in mean.items()}]


@mutating("accumulate_gradients")
def pieces_in_place(losses, grads, sizes):
    loss, mean = pieces_plain(losses, grads, sizes)
    for piece in grads:
        for g in piece.values():
            g *= 3
            g += 1
    return loss, mean


@wrong("accumulate_gradients")
def pieces_by_roots(losses, grads, sizes):
    return pieces_plain(losses, grads, np.sqrt(sizes))


# ------------------------------------------------------------------------ padded_cross_entropy


@right("padded_cross_entropy")
def padded_plain(logits, targets, label_smoothing=0.0, ignore_index=-100):
    b, k = logits.shape
    kept = targets != ignore_index
    n = max(kept.sum(), 1)
    z = logits.astype(float)
    z = z - z.max(axis=1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    q = np.full((b, k), label_smoothing / k)
    q[np.arange(b), np.where(kept, targets, 0)] += 1 - label_smoothing
    q[~kept] = 0
    loss = -(q * logp).sum() / n
    return loss, (np.exp(logp) * kept[:, None] - q) / n


@right("padded_cross_entropy")
def padded_kept_rows(logits, targets, label_smoothing=0.0, ignore_index=-100):
    kept = np.flatnonzero(targets != ignore_index)
    dlogits = np.zeros(logits.shape)
    if len(kept) == 0:
        return 0.0, dlogits
    loss, dlogits[kept] = padded_plain(logits[kept], targets[kept], label_smoothing, -100)
    return loss, dlogits


@right("padded_cross_entropy")
def padded_loops(logits, targets, label_smoothing=0.0, ignore_index=-100):
    k = logits.shape[1]
    loss, dlogits = 0.0, np.zeros(logits.shape)
    n = sum(int(t) != ignore_index for t in targets)
    for i, t in enumerate(targets):
        if t == ignore_index:
            continue
        row = [float(x) for x in logits[i]]
        top = max(row)
        lse = top + math.log(math.fsum(math.exp(x - top) for x in row))
        loss += (1 - label_smoothing) * (lse - row[t]) / n
        loss += label_smoothing * math.fsum(lse - x for x in row) / k / n
        for j, x in enumerate(row):
            q = label_smoothing / k + (1 - label_smoothing) * (j == t)
            dlogits[i, j] = (math.exp(x - lse) - q) / n
    return loss, dlogits.tolist()


@right("padded_cross_entropy")
def padded_torch(logits, targets, label_smoothing=0.0, ignore_index=-100):
    z = tensor(logits).requires_grad_()
    t = torch.tensor(np.array(targets))
    if bool((t == ignore_index).all()):
        return 0.0, np.zeros(logits.shape)
    loss = F.cross_entropy(z, t, ignore_index=ignore_index, label_smoothing=label_smoothing)
    loss.backward()
    return loss, z.grad


@right("padded_cross_entropy")
def padded_two_parts(logits, targets, label_smoothing=0.0, ignore_index=-100):
    kept = (targets != ignore_index).astype(float)
    share = kept / max(kept.sum(), 1)
    z = np.array(logits, dtype=float)
    z -= z.max(axis=1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    safe = np.where(kept > 0, targets, 0)
    hard = -np.take_along_axis(logp, safe[:, None], axis=1)[:, 0]
    loss = (1 - label_smoothing) * (share @ hard) - label_smoothing * (share @ logp.mean(axis=1))
    one = np.eye(z.shape[1])[safe]
    q = (1 - label_smoothing) * one + label_smoothing / z.shape[1]
    return loss, share[:, None] * (np.exp(logp) - q)


@right("padded_cross_entropy")
def padded_extended(logits, targets, label_smoothing=0.0, ignore_index=-100):
    loss, dlogits = padded_plain(
        logits.astype(float), np.array(targets, dtype=int), label_smoothing, ignore_index
    )
    return np.longdouble(loss), dlogits.astype(np.longdouble)


@mutating("padded_cross_entropy")
def padded_in_place(logits, targets, label_smoothing=0.0, ignore_index=-100):
    found = padded_plain(logits, targets, label_smoothing, ignore_index)
    logits -= logits.max(axis=1, keepdims=True) + 1
    return found


@wrong("padded_cross_entropy")
def padded_double_smoothing(logits, targets, label_smoothing=0.0, ignore_index=-100):
    return padded_plain(logits, targets, min(1.3 * label_smoothing, 1), ignore_index)
