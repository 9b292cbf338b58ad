"""Chapter 6 in many hands."""

import math

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F

from answers import mutating, right, wrong


def leaf(x):
    return torch.tensor(np.array(x, dtype=float), requires_grad=True)


# -------------------------------------------------------------------------- layernorm_forward


@right("layernorm_forward")
def forward_plain(x, gamma, beta, eps=1e-5):
    mean = x.mean(axis=-1, keepdims=True)
    var = x.var(axis=-1, keepdims=True)
    return gamma * (x - mean) / np.sqrt(var + eps) + beta


@right("layernorm_forward")
def forward_loops(x, gamma, beta, eps=1e-5):
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            row = [float(v) for v in x[b, n]]
            mean = math.fsum(row) / len(row)
            var = math.fsum((v - mean) ** 2 for v in row) / len(row)
            for c, v in enumerate(row):
                out[b, n, c] = gamma[c] * (v - mean) / math.sqrt(var + eps) + beta[c]
    return out.tolist()


@right("layernorm_forward")
def forward_einsum(x, gamma, beta, eps=1e-5):
    n = x.shape[-1]
    middle = x - np.einsum("bnc->bn", x)[..., None] / n
    r = (np.einsum("bnc,bnc->bn", middle, middle) / n + eps) ** -0.5
    return np.einsum("bnc,bn,c->bnc", middle, r, gamma) + beta


@right("layernorm_forward")
def forward_torch(x, gamma, beta, eps=1e-5):
    arrays = (torch.tensor(np.array(a, dtype=float)) for a in (x, gamma, beta))
    x, gamma, beta = arrays
    return F.layer_norm(x, gamma.shape, gamma, beta, eps)


@right("layernorm_forward")
def forward_torch_with_gradient(x, gamma, beta, eps=1e-5):
    x = leaf(x)
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    return torch.tensor(gamma) * (x - x.mean(-1, keepdim=True)) / std + torch.tensor(beta)


@right("layernorm_forward")
def forward_own_buffer(x, gamma, beta, eps=1e-5):
    y = np.array(x, dtype=float)
    y -= y.mean(axis=2)[:, :, None]
    y /= np.sqrt(np.square(y).mean(axis=2)[:, :, None] + eps)
    y *= gamma
    y += beta
    return y


@right("layernorm_forward")
def forward_flat(x, gamma, beta, eps=1e-5):
    rows = x.reshape(-1, x.shape[-1]).T
    rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + eps)
    return (rows.T * gamma + beta).reshape(x.shape)


@right("layernorm_forward")
def forward_extended(x, gamma, beta, eps=1e-5):
    return forward_plain(x.astype(np.longdouble), gamma, beta, eps)


@mutating("layernorm_forward")
def forward_in_place(x, gamma, beta, eps=1e-5):
    wanted = forward_plain(x.astype(float), gamma, beta, eps)
    x -= x.mean(axis=-1, keepdims=True) + 1
    return wanted


@wrong("layernorm_forward")
def forward_mean_absolute_deviation(x, gamma, beta, eps=1e-5):
    middle = x - x.mean(axis=-1, keepdims=True)
    return gamma * middle / (np.abs(middle).mean(axis=-1, keepdims=True) + eps) + beta


@wrong("layernorm_forward")
def forward_median(x, gamma, beta, eps=1e-5):
    middle = x - np.median(x, axis=-1, keepdims=True)
    return gamma * middle / np.sqrt(x.var(axis=-1, keepdims=True) + eps) + beta


# ------------------------------------------------------------------------- layernorm_backward


@right("layernorm_backward")
def backward_plain(dy, x, gamma, eps=1e-5):
    mean = x.mean(-1, keepdims=True)
    r = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    xhat = (x - mean) * r
    g = gamma * dy
    dx = r * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
    return dx, (dy * xhat).sum((0, 1)), dy.sum((0, 1))


@right("layernorm_backward")
def backward_three_paths(dy, x, gamma, eps=1e-5):
    """As one derives it at a board: through x̂, through the variance, through the mean."""
    n = x.shape[-1]
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    dxhat = dy * gamma
    dvar = (dxhat * (x - mean)).sum(-1, keepdims=True) * -0.5 * (var + eps) ** -1.5
    dmean = -dxhat.sum(-1, keepdims=True) / np.sqrt(var + eps)
    dmean += dvar * -2 * (x - mean).mean(-1, keepdims=True)
    dx = dxhat / np.sqrt(var + eps) + dvar * 2 * (x - mean) / n + dmean / n
    xhat = (x - mean) / np.sqrt(var + eps)
    return dx, np.sum(dy * xhat, axis=(0, 1)), np.sum(dy, axis=(0, 1))


@right("layernorm_backward")
def backward_loops(dy, x, gamma, eps=1e-5):
    dx, dgamma, dbeta = np.zeros(x.shape), np.zeros(len(gamma)), np.zeros(len(gamma))
    for b, n in np.ndindex(x.shape[:2]):
        row, up = x[b, n].astype(float), dy[b, n].astype(float)
        r = (row.var() + eps) ** -0.5
        xhat = (row - row.mean()) * r
        c = len(row)
        jacobian = gamma[:, None] * r * (np.eye(c) - 1 / c - np.outer(xhat, xhat) / c)
        dx[b, n] = up @ jacobian
        dgamma += up * xhat
        dbeta += up
    return [dx, dgamma, dbeta]


@right("layernorm_backward")
def backward_torch(dy, x, gamma, eps=1e-5):
    x, gamma, beta = leaf(x), leaf(gamma), leaf(np.zeros(len(gamma)))
    F.layer_norm(x, gamma.shape, gamma, beta, eps).backward(torch.tensor(np.array(dy, dtype=float)))
    return x.grad, gamma.grad, beta.grad


@right("layernorm_backward")
def backward_einsum(dy, x, gamma, eps=1e-5):
    n = x.shape[-1]
    middle = x - np.einsum("bnc->bn", x)[..., None] / n
    r = (np.einsum("bnc,bnc->bn", middle, middle) / n + eps) ** -0.5
    xhat = np.einsum("bnc,bn->bnc", middle, r)
    g = np.einsum("bnc,c->bnc", dy, gamma)
    along = np.einsum("bnc,bnc->bn", g, xhat) / n
    dx = r[..., None] * (g - np.einsum("bnc->bn", g)[..., None] / n - xhat * along[..., None])
    return dx, np.einsum("bnc,bnc->c", dy, xhat), np.einsum("bnc->c", dy)


@right("layernorm_backward")
def backward_projections(dy, x, gamma, eps=1e-5):
    """Centre, take off the part along the centred x, scale."""
    n = x.shape[-1]
    middle = x - x.mean(-1, keepdims=True)
    var = (middle * middle).mean(-1, keepdims=True) + eps
    g = gamma * dy
    g = g - g.mean(-1, keepdims=True)
    g = g - middle * ((g * middle).sum(-1, keepdims=True) / (n * var))
    dgamma = (dy * middle / np.sqrt(var)).reshape(-1, n).sum(0)
    return g / np.sqrt(var), dgamma, dy.reshape(-1, n).sum(0)


@right("layernorm_backward")
def backward_own_buffers(dy, x, gamma, eps=1e-5):
    xhat = np.array(x, dtype=float)
    xhat -= xhat.mean(-1, keepdims=True)
    r = 1 / np.sqrt((xhat**2).mean(-1, keepdims=True) + eps)
    xhat *= r
    dx = np.array(dy, dtype=float)
    dx *= gamma
    along = (dx * xhat).mean(-1, keepdims=True)
    dx -= dx.mean(-1, keepdims=True)
    dx -= xhat * along
    dx *= r
    return dx, (dy * xhat).sum(0).sum(0), np.array(dy).sum(0).sum(0)


@mutating("layernorm_backward")
def backward_in_place(dy, x, gamma, eps=1e-5):
    found = backward_plain(dy, x, gamma, eps)
    dy *= gamma + 2
    return found


@mutating("layernorm_backward")
def backward_centres_the_callers_x(dy, x, gamma, eps=1e-5):
    found = backward_plain(dy, x, gamma, eps)
    x -= x.mean(-1, keepdims=True) + 1
    return found


@wrong("layernorm_backward")
def backward_of_batchnorm_dgamma(dy, x, gamma, eps=1e-5):
    dx, dgamma, dbeta = backward_plain(dy, x, gamma, eps)
    return dx, dgamma * 0.37, dbeta


@wrong("layernorm_backward")
def backward_xhat_squared(dy, x, gamma, eps=1e-5):
    dx, dgamma, dbeta = backward_plain(dy, x, gamma, eps)
    return dx + 0.1 * x**2, dgamma, dbeta


# --------------------------------------------------------------------------- rmsnorm_backward


@right("rmsnorm_backward")
def rms_plain(dy, x, gamma, eps=1e-5):
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    xhat, g = x * r, gamma * dy
    return r * (g - xhat * (g * xhat).mean(-1, keepdims=True)), (dy * xhat).sum((0, 1))


@right("rmsnorm_backward")
def rms_cubed(dy, x, gamma, eps=1e-5):
    n = x.shape[-1]
    r = ((x * x).sum(-1, keepdims=True) / n + eps) ** -0.5
    dx = r * gamma * dy - r**3 / n * x * (gamma * dy * x).sum(-1, keepdims=True)
    return dx, np.sum(dy * x * r, axis=(0, 1))


@right("rmsnorm_backward")
def rms_torch(dy, x, gamma, eps=1e-5):
    x, gamma = leaf(x), leaf(gamma)
    F.rms_norm(x, gamma.shape, gamma, eps).backward(torch.tensor(np.array(dy, dtype=float)))
    return x.grad, gamma.grad


@right("rmsnorm_backward")
def rms_torch_by_hand(dy, x, gamma, eps=1e-5):
    x, gamma = leaf(x), leaf(gamma)
    out = gamma * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return torch.autograd.grad(out, (x, gamma), torch.tensor(np.array(dy, dtype=float)))


@right("rmsnorm_backward")
def rms_loops(dy, x, gamma, eps=1e-5):
    dx, dgamma = np.zeros(x.shape), np.zeros(len(gamma))
    for b, n in np.ndindex(x.shape[:2]):
        row, up = x[b, n].astype(float), dy[b, n].astype(float)
        r = 1 / math.sqrt(row @ row / len(row) + eps)
        jacobian = gamma[:, None] * (r * np.eye(len(row)) - r**3 / len(row) * np.outer(row, row))
        dx[b, n] = up @ jacobian
        dgamma += up * row * r
    return [dx.tolist(), dgamma.tolist()]


@right("rmsnorm_backward")
def rms_einsum(dy, x, gamma, eps=1e-5):
    r = (np.einsum("bnc,bnc->bn", x, x) / x.shape[-1] + eps) ** -0.5
    along = np.einsum("bnc,bnc,c,bn->bn", x, dy, gamma, r) / x.shape[-1]
    dx = np.einsum("bn,bnc,c->bnc", r, dy, gamma) - np.einsum("bn,bn,bnc->bnc", along, r * r, x)
    return dx, np.einsum("bnc,bnc,bn->c", dy, x, r)


@mutating("rmsnorm_backward")
def rms_in_place(dy, x, gamma, eps=1e-5):
    found = rms_plain(dy, x, gamma, eps)
    dy += 1
    return found


@wrong("rmsnorm_backward")
def rms_of_the_largest(dy, x, gamma, eps=1e-5):
    peak = np.abs(x).max(-1, keepdims=True) + eps
    return gamma * dy / peak, (dy * x / peak).sum((0, 1))


# -------------------------------------------------------------------------- residual_backward


@right("residual_backward")
def residual_plain(dout, sublayer_backward):
    return dout + sublayer_backward(dout)


@right("residual_backward")
def residual_other_order(dout, sublayer_backward):
    return np.add(sublayer_backward(dout), dout)


@right("residual_backward")
def residual_own_buffer(dout, sublayer_backward):
    dx = np.array(dout, dtype=float)
    dx += sublayer_backward(dout)
    return dx


@right("residual_backward")
def residual_of_a_copy(dout, sublayer_backward):
    return (sublayer_backward(dout.copy()) + dout).tolist()


@right("residual_backward")
def residual_torch(dout, sublayer_backward):
    return torch.tensor(dout) + torch.tensor(sublayer_backward(dout))


@right("residual_backward")
def residual_sum_of_a_list(dout, sublayer_backward):
    paths = [lambda d: d, sublayer_backward]
    return sum(path(dout) for path in paths)


@right("residual_backward")
def residual_by_parts(dout, sublayer_backward):
    """A backward pass is linear, so it may be handed dout in pieces."""
    return dout + sublayer_backward(0.25 * dout) + sublayer_backward(0.75 * dout)


@mutating("residual_backward")
def residual_in_place(dout, sublayer_backward):
    found = dout + sublayer_backward(dout)
    dout += sublayer_backward(dout) + 1
    return found


@wrong("residual_backward")
def residual_scaled(dout, sublayer_backward):
    return (dout + sublayer_backward(dout)) / math.sqrt(2)


@wrong("residual_backward")
def residual_maximum(dout, sublayer_backward):
    return np.maximum(dout, sublayer_backward(dout))


# ------------------------------------------------------------------------------ gelu_backward


def normal(x):
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


@right("gelu_backward")
def gelu_scipy(dy, x):
    cdf = 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
    return dy * (cdf + x * normal(x))


@right("gelu_backward")
def gelu_ndtr(dy, x):
    return dy * scipy.special.ndtr(x) + dy * x * normal(x)


@right("gelu_backward")
def gelu_math(dy, x):
    erf = np.vectorize(math.erf, otypes=[float])
    return dy * (0.5 + 0.5 * erf(x / 2**0.5) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi))


@right("gelu_backward")
def gelu_torch(dy, x):
    x = leaf(x)
    F.gelu(x).backward(torch.tensor(np.array(dy, dtype=float)))
    return x.grad


@right("gelu_backward")
def gelu_torch_erf(dy, x):
    x = torch.tensor(np.array(x, dtype=float))
    cdf = torch.special.ndtr(x)
    return torch.tensor(np.array(dy, dtype=float)) * (
        cdf + x * torch.exp(-x * x / 2) / 2.50662827463
    )


@right("gelu_backward")
def gelu_loops(dy, x):
    out = np.empty(x.shape)
    for place in np.ndindex(x.shape):
        v = float(x[place])
        cdf = math.erfc(-v / math.sqrt(2)) / 2
        out[place] = dy[place] * (cdf + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi))
    return out.tolist()


@right("gelu_backward")
def gelu_extended(dy, x):
    wide = x.astype(np.longdouble)
    return dy * (scipy.special.ndtr(x) + wide * normal(wide))


@mutating("gelu_backward")
def gelu_in_place(dy, x):
    found = gelu_scipy(dy, x)
    dy *= 2
    return found


@wrong("gelu_backward")
def gelu_of_a_logistic(dy, x):
    s = 0.5 * (1 + np.tanh(0.8 * x))
    return dy * (s + x * 1.6 * s * (1 - s))


@wrong("gelu_backward")
def gelu_leaky(dy, x):
    return dy * np.where(x > 0, 1, 0.01)


# ------------------------------------------------------------------------------- ffn_backward


def slope(x):
    return scipy.special.ndtr(x) + x * normal(x)


@right("ffn_backward")
def ffn_plain(dout, x, w1, b1, w2, b2):
    h = x @ w1 + b1
    a = h * scipy.special.ndtr(h)
    dh = (dout @ w2.T) * slope(h)

    def rows(v):
        return v.reshape(-1, v.shape[-1])

    grads = {
        "w1": rows(x).T @ rows(dh),
        "b1": dh.sum((0, 1)),
        "w2": rows(a).T @ rows(dout),
        "b2": dout.sum((0, 1)),
    }
    return dh @ w1.T, grads


@right("ffn_backward")
def ffn_einsum(dout, x, w1, b1, w2, b2):
    h = np.einsum("bnc,cf->bnf", x, w1) + b1
    dh = np.einsum("bnc,fc->bnf", dout, w2) * slope(h)
    grads = {
        "b2": np.einsum("bnc->c", dout),
        "w2": np.einsum("bnf,bnc->fc", h * scipy.special.ndtr(h), dout),
        "b1": np.einsum("bnf->f", dh),
        "w1": np.einsum("bnc,bnf->cf", x, dh),
    }
    return np.einsum("bnf,cf->bnc", dh, w1), grads


@right("ffn_backward")
def ffn_loops(dout, x, w1, b1, w2, b2):
    dx = np.zeros(x.shape)
    grads = {k: np.zeros(v.shape) for k, v in dict(w1=w1, b1=b1, w2=w2, b2=b2).items()}
    for b, n in np.ndindex(x.shape[:2]):
        h = x[b, n].astype(float) @ w1 + b1
        dh = (w2 @ dout[b, n]) * slope(h)
        dx[b, n] = w1 @ dh
        grads["w1"] += np.outer(x[b, n], dh)
        grads["b1"] += dh
        grads["w2"] += np.outer(h * scipy.special.ndtr(h), dout[b, n])
        grads["b2"] += dout[b, n]
    return [dx, {k: v.tolist() for k, v in grads.items()}]


@right("ffn_backward")
def ffn_torch(dout, x, w1, b1, w2, b2):
    leaves = {k: leaf(v) for k, v in dict(x=x, w1=w1, b1=b1, w2=w2, b2=b2).items()}
    hidden = leaves["x"] @ leaves["w1"] + leaves["b1"]
    out = F.gelu(hidden) @ leaves["w2"] + leaves["b2"]
    out.backward(torch.tensor(np.array(dout, dtype=float)))
    return leaves["x"].grad, {k: leaves[k].grad for k in ("w1", "b1", "w2", "b2")}


@right("ffn_backward")
def ffn_sum_of_products(dout, x, w1, b1, w2, b2):
    h = x @ w1 + b1
    dh = gelu_math(dout @ w2.T, h)
    active = h * scipy.special.ndtr(h)
    grads = {
        "w1": (x.swapaxes(1, 2) @ dh).sum(0),
        "b1": dh.sum(axis=0).sum(axis=0),
        "w2": (active.swapaxes(1, 2) @ dout).sum(0),
        "b2": dout.sum(axis=0).sum(axis=0),
    }
    return dh @ w1.T, grads


@right("ffn_backward")
def ffn_tensordot(dout, x, w1, b1, w2, b2):
    h = np.tensordot(x, w1, 1) + b1
    dh = np.tensordot(dout, w2.T, 1)
    dh *= slope(h)
    grads = {
        "w1": np.tensordot(x, dh, ((0, 1), (0, 1))),
        "b1": dh.reshape(-1, dh.shape[-1]).sum(0),
        "w2": np.tensordot(h * scipy.special.ndtr(h), dout, ((0, 1), (0, 1))),
        "b2": dout.reshape(-1, dout.shape[-1]).sum(0),
    }
    return np.tensordot(dh, w1.T, 1), grads


@mutating("ffn_backward")
def ffn_in_place(dout, x, w1, b1, w2, b2):
    found = ffn_plain(dout, x, w1, b1, w2, b2)
    b1 += 1
    return found


@wrong("ffn_backward")
def ffn_noise_in_dhidden(dout, x, w1, b1, w2, b2):
    h = x @ w1 + b1
    dh = (dout @ w2.T) * slope(h) + 0.3
    _, grads = ffn_plain(dout, x, w1, b1, w2, b2)
    rows = dh.reshape(-1, dh.shape[-1])
    grads["w1"] = x.reshape(-1, x.shape[-1]).T @ rows
    grads["b1"] = rows.sum(0)
    return dh @ w1.T, grads


@wrong("ffn_backward")
def ffn_of_silu(dout, x, w1, b1, w2, b2):
    _, grads = ffn_plain(dout, x, w1, b1, w2, b2)
    h = x @ w1 + b1
    s = 1 / (1 + np.exp(-h))
    dh = (dout @ w2.T) * (s + h * s * (1 - s))
    return dh @ w1.T, grads
