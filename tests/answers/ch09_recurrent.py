"""Chapter 9 in many hands."""

import numpy as np
import torch

from answers import mutating, right, wrong

NAMES = ("wx", "wh", "b")


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def leaves_of(arrays):
    """Torch leaves of float64, whatever the arrays are."""
    return [torch.tensor(np.array(a, float), requires_grad=True) for a in arrays]


def single(value):
    """Everything as float32."""
    if isinstance(value, tuple):
        return tuple(map(single, value))
    if isinstance(value, dict):
        return {name: single(part) for name, part in value.items()}
    return np.asarray(value, np.float32)


def in_single(answer):
    """The answer on float32 arguments."""
    return lambda *args: single(answer(*(a.astype(np.float32) for a in args)))


# ------------------------------------------------------------------------------- rnn_backward


@right("rnn_backward")
def rnn_plain(dh_all, x, h0, wx, wh, b):
    T = x.shape[1]
    h_all, h = [], h0
    for t in range(T):
        h = np.tanh(x[:, t] @ wx + h @ wh + b)
        h_all.append(h)
    dx = np.zeros(x.shape)
    dwx, dwh, db = np.zeros(wx.shape), np.zeros(wh.shape), np.zeros(b.shape)
    dh = np.zeros(h0.shape)
    for t in range(T - 1, -1, -1):
        dh = dh + dh_all[:, t]
        dz = dh * (1 - h_all[t] ** 2)
        dx[:, t] = dz @ wx.T
        dwx += x[:, t].T @ dz
        dwh += (h_all[t - 1] if t else h0).T @ dz
        db += dz.sum(axis=0)
        dh = dz @ wh.T
    return dx, dh, {"wx": dwx, "wh": dwh, "b": db}


@right("rnn_backward")
def rnn_hoisted(dh_all, x, h0, wx, wh, b):
    """All products over all steps at once, states in one array."""
    T = x.shape[1]
    states = np.zeros((x.shape[0], T + 1, h0.shape[1]), np.result_type(x, float))
    states[:, 0] = h0
    zx = x @ wx + b
    for t in range(T):
        states[:, t + 1] = np.tanh(zx[:, t] + states[:, t] @ wh)
    dz = np.empty(dh_all.shape)
    carry = 0
    for t in reversed(range(T)):
        dz[:, t] = (dh_all[:, t] + carry) * (1 - states[:, t + 1] ** 2)
        carry = dz[:, t] @ wh.T
    grads = {
        "b": np.einsum("bth->h", dz),
        "wx": np.einsum("btd,bth->dh", x, dz),
        "wh": np.einsum("bti,bth->ih", states[:, :-1], dz),
    }
    return np.einsum("bth,dh->btd", dz, wx), carry, grads


@right("rnn_backward")
def rnn_autograd(dh_all, x, h0, wx, wh, b):
    leaves = leaves_of((x, h0, wx, wh, b))
    X, h, Wx, Wh, B = leaves
    out = []
    for t in range(X.shape[1]):
        h = torch.tanh(X[:, t] @ Wx + h @ Wh + B)
        out.append(h)
    torch.stack(out, 1).backward(torch.tensor(np.array(dh_all, float)))
    dx, dh0, *grads = (leaf.grad for leaf in leaves)
    return dx, dh0, dict(zip(NAMES, grads, strict=True))


@right("rnn_backward")
def rnn_module(dh_all, x, h0, wx, wh, b):
    """nn.RNN with its second bias at 0."""
    layer = torch.nn.RNN(*wx.shape, batch_first=True).double()
    values = (wx.T, wh.T, b, 0 * b)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(np.array(value, float)))
    X, H = leaves_of((x, h0))
    layer(X, H[None])[0].backward(torch.tensor(np.array(dh_all, float)))
    w_ih, w_hh, b_ih, _ = (p.grad for p in layer.parameters())
    return X.grad, H.grad, {"wx": w_ih.T, "wh": w_hh.T, "b": b_ih}


@right("rnn_backward")
def rnn_double_sum(dh_all, x, h0, wx, wh, b):
    """Every loss followed back to every use by itself: T² terms."""
    T = x.shape[1]
    h, before, slopes = h0, [], []
    for t in range(T):
        before.append(h)
        h = np.tanh(x[:, t] @ wx + h @ wh + b)
        slopes.append(1 - h**2)
    dx, dh0 = np.zeros(x.shape), np.zeros(h0.shape)
    grads = {"wx": np.zeros(wx.shape), "wh": np.zeros(wh.shape), "b": np.zeros(b.shape)}
    for loss in range(T):
        dh = dh_all[:, loss]
        for t in range(loss, -1, -1):
            dz = dh * slopes[t]
            dx[:, t] += dz @ wx.T
            grads["wx"] += x[:, t].T @ dz
            grads["wh"] += before[t].T @ dz
            grads["b"] += dz.sum(axis=0)
            dh = dz @ wh.T
        dh0 += dh
    return [dx.tolist(), dh0.tolist(), grads]


@right("rnn_backward")
def rnn_row_by_row(dh_all, x, h0, wx, wh, b):
    """Vectors only: one row of the batch at a time."""
    answers = []
    for row in range(len(x)):
        h, kept = h0[row], []
        for t in range(x.shape[1]):
            kept.append(h)
            h = np.tanh(wx.T @ x[row, t] + wh.T @ h + b)
        dx, dh = np.zeros(x[row].shape), np.zeros(h.shape)
        dwx, dwh, db = 0 * wx, 0 * wh, 0 * b
        for t in reversed(range(x.shape[1])):
            dz = (dh + dh_all[row, t]) * (1 - h) * (1 + h)
            dx[t] = wx @ dz
            dwx, dwh, db = dwx + np.outer(x[row, t], dz), dwh + np.outer(kept[t], dz), db + dz
            dh, h = wh @ dz, kept[t]
        answers.append((dx, dh, dwx, dwh, db))
    dx, dh0, dwx, dwh, db = zip(*answers, strict=True)
    return np.array(dx), np.array(dh0), {"wx": sum(dwx), "wh": sum(dwh), "b": sum(db)}


@right("rnn_backward")
def rnn_float32(*args):
    return in_single(rnn_plain)(*args)


@right("rnn_backward")
def rnn_own_buffers(dh_all, x, h0, wx, wh, b):
    """The upstream copied and then worked on in place."""
    h_all = np.zeros(dh_all.shape)
    h = h0
    for t in range(x.shape[1]):
        h = h_all[:, t] = np.tanh(x[:, t] @ wx + h @ wh + b)
    dz = np.array(dh_all, float)
    for t in range(x.shape[1] - 1, 0, -1):
        dz[:, t] *= 1 - h_all[:, t] ** 2
        dz[:, t - 1] += dz[:, t] @ wh.T
    dz[:, 0] *= 1 - h_all[:, 0] ** 2
    before = np.concatenate([h0[:, None], h_all[:, :-1]], axis=1)
    flat = dz.reshape(-1, dz.shape[-1])
    grads = {
        "wx": x.reshape(-1, x.shape[-1]).T @ flat,
        "wh": before.reshape(-1, h0.shape[-1]).T @ flat,
        "b": flat.sum(axis=0),
    }
    return dz @ wx.T, dz[:, 0] @ wh.T, grads


@mutating("rnn_backward")
def rnn_into_dh_all(dh_all, x, h0, wx, wh, b):
    answer = rnn_plain(dh_all, x, h0, wx, wh, b)
    dh_all[:, 0] += 1
    return answer


@mutating("rnn_backward")
def rnn_into_h0(dh_all, x, h0, wx, wh, b):
    answer = rnn_plain(dh_all, x, h0, wx, wh, b)
    h0 *= 0.5
    return answer


@wrong("rnn_backward")
def rnn_leaky_carry(dh_all, x, h0, wx, wh, b):
    """What is carried loses a tenth at every step."""
    h, kept = h0, []
    for t in range(x.shape[1]):
        kept.append((h, np.tanh(x[:, t] @ wx + h @ wh + b)))
        h = kept[-1][1]
    dh, dx = 0 * h0, np.zeros(x.shape)
    grads = {"wx": 0 * wx, "wh": 0 * wh, "b": 0 * b}
    for t in range(x.shape[1] - 1, -1, -1):
        before, after = kept[t]
        dz = (dh_all[:, t] + 0.9 * dh) * (1 - after**2)
        dx[:, t], dh = dz @ wx.T, dz @ wh.T
        grads["wx"] = grads["wx"] + x[:, t].T @ dz
        grads["wh"] = grads["wh"] + before.T @ dz
        grads["b"] = grads["b"] + dz.sum(axis=0)
    return dx, dh, grads


@wrong("rnn_backward")
def rnn_weaker_recurrence(dh_all, x, h0, wx, wh, b):
    return rnn_plain(dh_all, x, h0, wx, 0.9 * wh, b)


@wrong("rnn_backward")
def rnn_grads_in_a_tuple(*args):
    dx, dh0, grads = rnn_plain(*args)
    return dx, dh0, tuple(grads.values())


@wrong("rnn_backward")
def rnn_other_names(*args):
    dx, dh0, grads = rnn_plain(*args)
    return dx, dh0, {f"d{name}": grad for name, grad in grads.items()}


@wrong("rnn_backward")
def rnn_time_first(*args):
    dx, dh0, grads = rnn_plain(*args)
    return dx.swapaxes(0, 1), dh0, grads


@wrong("rnn_backward")
def rnn_half_of_wh(*args):
    dx, dh0, grads = rnn_plain(*args)
    return dx, dh0, grads | {"wh": 0.5 * grads["wh"]}


@wrong("rnn_backward")
def rnn_clipped(*args):
    dx, dh0, grads = rnn_plain(*args)
    return dx, dh0, {name: np.clip(grad, -0.1, 0.1) for name, grad in grads.items()}


# -------------------------------------------------------------------------- lstm_step_forward


@right("lstm_step_forward")
def step_plain(x, h, c, wx, wh, b):
    i, f, g, o = np.split(x @ wx + h @ wh + b, 4, axis=1)
    c_next = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c_next), c_next


@right("lstm_step_forward")
def step_slices(x, h, c, wx, wh, b):
    H = h.shape[1]
    z = np.concatenate([x, h], axis=1) @ np.concatenate([wx, wh]) + b
    i, f, o = (sigmoid(z[:, k * H : (k + 1) * H]) for k in (0, 1, 3))
    new = f * c + i * np.tanh(z[:, 2 * H : 3 * H])
    return [(o * np.tanh(new)).tolist(), new.tolist()]


@right("lstm_step_forward")
def step_by_tanh(x, h, c, wx, wh, b):
    """σ(z) = (1 + tanh(z/2))/2."""
    z = (x @ wx + h @ wh + b).reshape(len(x), 4, -1)
    i, f, o = (0.5 + 0.5 * np.tanh(0.5 * z[:, k]) for k in (0, 1, 3))
    c_next = f * c + i * np.tanh(z[:, 2])
    return o * np.tanh(c_next), c_next


@right("lstm_step_forward")
def step_gate_by_gate(x, h, c, wx, wh, b):
    H = h.shape[1]

    def gate(k, squash):
        own = slice(k * H, (k + 1) * H)
        return squash(x @ wx[:, own] + h @ wh[:, own] + b[own])

    i, f, g, o = (gate(k, s) for k, s in enumerate((sigmoid, sigmoid, np.tanh, sigmoid)))
    c_next = f * c + i * g
    return o * np.tanh(c_next), c_next


@right("lstm_step_forward")
def step_torch(x, h, c, wx, wh, b):
    x, h, c, wx, wh, b = (torch.tensor(np.array(a)) for a in (x, h, c, wx, wh, b))
    i, f, g, o = (x @ wx + h @ wh + b).chunk(4, dim=1)
    c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c_next), c_next


@right("lstm_step_forward")
def step_cell_of_torch(x, h, c, wx, wh, b):
    """Half of the bias in each of torch's two."""
    cell = torch.nn.LSTMCell(x.shape[1], h.shape[1]).double()
    with torch.no_grad():
        for parameter, value in zip(cell.parameters(), (wx.T, wh.T, b / 2, b / 2), strict=True):
            parameter.copy_(torch.tensor(np.array(value, float)))
        x, h, c = (torch.tensor(np.array(a, float)) for a in (x, h, c))
        return cell(x, (h, c))


@right("lstm_step_forward")
def step_einsum(x, h, c, wx, wh, b):
    H = h.shape[1]
    split = (4, H)
    z = np.einsum("bd,dgh->gbh", x, wx.reshape(-1, *split))
    z = z + np.einsum("bk,kgh->gbh", h, wh.reshape(-1, *split)) + b.reshape(4, 1, H)
    i, f, o = sigmoid(z[[0, 1, 3]])
    c_next = f * c + i * np.tanh(z[2])
    return o * np.tanh(c_next), c_next


@right("lstm_step_forward")
def step_float32(*args):
    return in_single(step_plain)(*args)


@mutating("lstm_step_forward")
def step_into_c(x, h, c, wx, wh, b):
    h_next, c_next = step_plain(x, h, c, wx, wh, b)
    c[:] = c_next
    return h_next, c_next


@mutating("lstm_step_forward")
def step_into_h(x, h, c, wx, wh, b):
    h_next, c_next = step_plain(x, h, c, wx, wh, b)
    h[:] = h_next
    return h_next, c_next


@wrong("lstm_step_forward")
def step_peephole(x, h, c, wx, wh, b):
    return step_plain(x, h, c, wx, wh, b + np.tile(0.1 * c[0], 4))


@wrong("lstm_step_forward")
def step_state_only(*args):
    return step_plain(*args)[0]


@wrong("lstm_step_forward")
def step_hard_sigmoid(x, h, c, wx, wh, b):
    i, f, g, o = np.split(x @ wx + h @ wh + b, 4, axis=1)
    i, f, o = (np.clip(0.2 * z + 0.5, 0, 1) for z in (i, f, o))
    c_next = f * c + i * np.tanh(g)
    return o * np.tanh(c_next), c_next


@wrong("lstm_step_forward")
def step_negated(*args):
    h_next, c_next = step_plain(*args)
    return -h_next, c_next


# ------------------------------------------------------------------------- lstm_step_backward


@right("lstm_step_backward")
def back_plain(dh, dc, x, h, c, wx, wh, b):
    i, f, g, o = np.split(x @ wx + h @ wh + b, 4, axis=1)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    th = np.tanh(f * c + i * g)
    dc = dc + dh * o * (1 - th**2)
    dz = np.hstack(
        [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * th * o * (1 - o)]
    )
    grads = {"wx": x.T @ dz, "wh": h.T @ dz, "b": dz.sum(axis=0)}
    return dz @ wx.T, dz @ wh.T, dc * f, grads


@right("lstm_step_backward")
def back_autograd(dh, dc, x, h, c, wx, wh, b):
    leaves = leaves_of((x, h, c, wx, wh, b))
    X, H, C, Wx, Wh, B = leaves
    i, f, g, o = (X @ Wx + H @ Wh + B).chunk(4, dim=1)
    C = torch.sigmoid(f) * C + torch.sigmoid(i) * torch.tanh(g)
    out = torch.sigmoid(o) * torch.tanh(C)
    upstream = [torch.tensor(np.array(a, float)) for a in (dh, dc)]
    torch.autograd.backward([out, C], upstream)
    dx, dh_prev, dc_prev, *grads = (leaf.grad for leaf in leaves)
    return dx, dh_prev, dc_prev, dict(zip(NAMES, grads, strict=True))


@right("lstm_step_backward")
def back_gate_by_gate(dh, dc, x, h, c, wx, wh, b):
    """No concatenation: every gate has its own slices, written to buffers."""
    H = h.shape[1]
    z = x @ wx + h @ wh + b
    own = [slice(k * H, (k + 1) * H) for k in range(4)]
    i, f, o = (sigmoid(z[:, own[k]]) for k in (0, 1, 3))
    g = np.tanh(z[:, own[2]])
    new = f * c + i * g
    whole = dc + dh * o / np.cosh(new) ** 2
    dzs = (
        whole * g * i * sigmoid(-z[:, own[0]]),
        whole * c * f * sigmoid(-z[:, own[1]]),
        whole * i / np.cosh(z[:, own[2]]) ** 2,
        dh * np.tanh(new) * o * sigmoid(-z[:, own[3]]),
    )
    dx, dh_prev = np.zeros(x.shape), np.zeros(h.shape)
    grads = {name: np.zeros(w.shape) for name, w in zip(NAMES, (wx, wh, b), strict=True)}
    for columns, dz in zip(own, dzs, strict=True):
        dx += dz @ wx[:, columns].T
        dh_prev += dz @ wh[:, columns].T
        grads["wx"][:, columns] = x.T @ dz
        grads["wh"][:, columns] = h.T @ dz
        grads["b"][columns] = dz.sum(axis=0)
    return dx, dh_prev, whole * f, grads


@right("lstm_step_backward")
def back_row_by_row(dh, dc, x, h, c, wx, wh, b):
    rows = [
        back_plain(*(a[r : r + 1] for a in (dh, dc, x, h, c)), wx, wh, b) for r in range(len(x))
    ]
    dx, dh_prev, dc_prev = (np.concatenate([row[k] for row in rows]) for k in range(3))
    return dx, dh_prev, dc_prev, {n: sum(row[3][n] for row in rows) for n in reversed(NAMES)}


@right("lstm_step_backward")
def back_joined(dh, dc, x, h, c, wx, wh, b):
    """x and h as one row, wx and wh as one matrix."""
    xh, w = np.hstack([x, h]), np.vstack([wx, wh])
    z = (xh @ w + b).reshape(len(x), 4, -1)
    s, g = sigmoid(z), np.tanh(z[:, 2])
    th = np.tanh(s[:, 1] * c + s[:, 0] * g)
    dc = dc + dh * s[:, 3] * (1 - th * th)
    dz = s * (1 - s) * np.stack([dc * g, dc * c, dc, dh * th], axis=1)
    dz[:, 2] = dc * s[:, 0] * (1 - g * g)
    dz = dz.reshape(len(x), -1)
    dxh, dw, D = dz @ w.T, xh.T @ dz, x.shape[1]
    return dxh[:, :D], dxh[:, D:], dc * s[:, 1], {"wx": dw[:D], "wh": dw[D:], "b": dz.sum(0)}


@right("lstm_step_backward")
def back_lists(*args):
    dx, dh_prev, dc_prev, grads = back_plain(*args)
    return [dx.tolist(), dh_prev.tolist(), dc_prev.tolist(), grads]


@right("lstm_step_backward")
def back_float32(*args):
    return in_single(back_plain)(*args)


@mutating("lstm_step_backward")
def back_adds_to_dc(dh, dc, *rest):
    answer = back_plain(dh, dc, *rest)
    dc += dh
    return answer


@mutating("lstm_step_backward")
def back_into_c(dh, dc, x, h, c, *rest):
    answer = back_plain(dh, dc, x, h, c, *rest)
    c *= 2
    return answer


@wrong("lstm_step_backward")
def back_half_of_dc(dh, dc, *rest):
    return back_plain(dh, 0.5 * dc, *rest)


@wrong("lstm_step_backward")
def back_swapped_states(*args):
    dx, dh_prev, dc_prev, grads = back_plain(*args)
    return dx, dc_prev, dh_prev, grads


@wrong("lstm_step_backward")
def back_without_grads(*args):
    return back_plain(*args)[:3]


@wrong("lstm_step_backward")
def back_odd_forget_slope(dh, dc, x, h, c, wx, wh, b):
    """The forget gate's gradient a third too small."""
    dx, dh_prev, dc_prev, grads = back_plain(dh, dc, x, h, c, wx, wh, b)
    H = h.shape[1]
    i, f, g, o = np.split(x @ wx + h @ wh + b, 4, axis=1)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    th = np.tanh(f * c + i * g)
    off = -(dc + dh * o * (1 - th**2)) * c * f * (1 - f) / 3
    own = slice(H, 2 * H)
    grads = {n: a.copy() for n, a in grads.items()}
    grads["wx"][:, own] += x.T @ off
    grads["wh"][:, own] += h.T @ off
    grads["b"][own] += off.sum(axis=0)
    return dx + off @ wx[:, own].T, dh_prev + off @ wh[:, own].T, dc_prev, grads


# ------------------------------------------------------------------------------ lstm_backward


@right("lstm_backward")
def lstm_by_steps(dh_all, x, h0, c0, wx, wh, b):
    states = [(h0, c0)]
    for t in range(x.shape[1]):
        states.append(step_plain(x[:, t], *states[-1], wx, wh, b))
    dh, dc, dx = 0 * h0, 0 * c0, np.zeros(x.shape)
    total = {"wx": 0 * wx, "wh": 0 * wh, "b": 0 * b}
    for t in range(x.shape[1] - 1, -1, -1):
        dx[:, t], dh, dc, grads = back_plain(dh + dh_all[:, t], dc, x[:, t], *states[t], wx, wh, b)
        total = {name: total[name] + grads[name] for name in total}
    return dx, dh, dc, total


@right("lstm_backward")
def lstm_autograd(dh_all, x, h0, c0, wx, wh, b):
    leaves = leaves_of((x, h0, c0, wx, wh, b))
    X, h, c, Wx, Wh, B = leaves
    out = []
    for t in range(X.shape[1]):
        i, f, g, o = (X[:, t] @ Wx + h @ Wh + B).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    torch.stack(out, 1).backward(torch.tensor(np.array(dh_all, float)))
    dx, dh0, dc0, *grads = (leaf.grad for leaf in leaves)
    return dx, dh0, dc0, dict(zip(NAMES, grads, strict=True))


@right("lstm_backward")
def lstm_module(dh_all, x, h0, c0, wx, wh, b):
    """nn.LSTM; each of its two biases has the whole gradient of ours."""
    layer = torch.nn.LSTM(x.shape[2], h0.shape[1], batch_first=True).double()
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (wx.T, wh.T, b, 0 * b), strict=True):
            parameter.copy_(torch.tensor(np.array(value, float)))
    X, H, C = leaves_of((x, h0, c0))
    layer(X, (H[None], C[None]))[0].backward(torch.tensor(np.array(dh_all, float)))
    w_ih, w_hh, _, b_hh = (p.grad for p in layer.parameters())
    return X.grad, H.grad, C.grad, {"wx": w_ih.T, "wh": w_hh.T, "b": b_hh}


@right("lstm_backward")
def lstm_hoisted(dh_all, x, h0, c0, wx, wh, b):
    """Slopes of all steps before the walk, products over all steps after it."""
    B, T = x.shape[:2]
    H = h0.shape[1]
    h, c, gates, cells, states = h0, c0, [], [c0], [h0]
    for t in range(T):
        i, f, g, o = np.split(x[:, t] @ wx + h @ wh + b, 4, axis=1)
        gates.append((sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)))
        c = gates[-1][1] * c + gates[-1][0] * gates[-1][2]
        h = gates[-1][3] * np.tanh(c)
        cells.append(c)
        states.append(h)
    i, f, g, o = (np.stack(part, axis=1) for part in zip(*gates, strict=True))
    before, th = np.stack(cells[:-1], axis=1), np.tanh(np.stack(cells[1:], axis=1))
    by_c = np.concatenate([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], axis=2)
    dz = np.zeros((B, T, 4 * H))
    dh, dc = np.zeros((B, H)), np.zeros((B, H))
    for t in reversed(range(T)):
        dh = dh + dh_all[:, t]
        dc = dc + dh * o[:, t] * (1 - th[:, t] ** 2)
        dz[:, t, : 3 * H] = np.tile(dc, 3) * by_c[:, t]
        dz[:, t, 3 * H :] = dh * th[:, t] * o[:, t] * (1 - o[:, t])
        dh, dc = dz[:, t] @ wh.T, dc * f[:, t]
    h_before = np.stack(states[:-1], axis=1)
    grads = {
        "wx": np.tensordot(x, dz, ((0, 1), (0, 1))),
        "wh": np.tensordot(h_before, dz, ((0, 1), (0, 1))),
        "b": dz.sum(axis=(0, 1)),
    }
    return dz @ wx.T, dh, dc, grads


@right("lstm_backward")
def lstm_recursive(dh_all, x, h0, c0, wx, wh, b):
    """The first step around the rest of the sequence."""
    if x.shape[1] == 0:
        return x, 0 * h0, 0 * c0, {"wx": 0 * wx, "wh": 0 * wh, "b": 0 * b}
    h, c = step_plain(x[:, 0], h0, c0, wx, wh, b)
    dx, dh, dc, later = lstm_recursive(dh_all[:, 1:], x[:, 1:], h, c, wx, wh, b)
    first, dh0, dc0, grads = back_plain(dh + dh_all[:, 0], dc, x[:, 0], h0, c0, wx, wh, b)
    total = {name: later[name] + grads[name] for name in NAMES}
    return np.concatenate([first[:, None], dx], axis=1), dh0, dc0, total


@right("lstm_backward")
def lstm_row_by_row(dh_all, x, h0, c0, wx, wh, b):
    rows = [
        lstm_by_steps(*(a[r : r + 1] for a in (dh_all, x, h0, c0)), wx, wh, b)
        for r in range(len(x))
    ]
    dx, dh0, dc0 = (np.concatenate([row[k] for row in rows]) for k in range(3))
    return [dx, dh0.tolist(), dc0, {n: sum(row[3][n] for row in rows) for n in NAMES}]


@right("lstm_backward")
def lstm_float32(*args):
    return in_single(lstm_by_steps)(*args)


@mutating("lstm_backward")
def lstm_into_dh_all(dh_all, *rest):
    answer = lstm_by_steps(dh_all, *rest)
    dh_all[:, -1] = 0
    return answer


@mutating("lstm_backward")
def lstm_into_c0(dh_all, x, h0, c0, *rest):
    answer = lstm_by_steps(dh_all, x, h0, c0, *rest)
    c0 += 1
    return answer


@wrong("lstm_backward")
def lstm_leaky_carry(dh_all, x, h0, c0, wx, wh, b):
    """What is carried loses a tenth at every step."""
    states = [(h0, c0)]
    for t in range(x.shape[1]):
        states.append(step_plain(x[:, t], *states[-1], wx, wh, b))
    dh, dc, dx = 0 * h0, 0 * c0, np.zeros(x.shape)
    total = {"wx": 0 * wx, "wh": 0 * wh, "b": 0 * b}
    for t in range(x.shape[1] - 1, -1, -1):
        dx[:, t], dh, dc, grads = back_plain(
            0.9 * dh + dh_all[:, t], 0.9 * dc, x[:, t], *states[t], wx, wh, b
        )
        total = {name: total[name] + grads[name] for name in total}
    return dx, dh, dc, total


@wrong("lstm_backward")
def lstm_without_dc0(*args):
    dx, dh0, _, grads = lstm_by_steps(*args)
    return dx, dh0, grads


@wrong("lstm_backward")
def lstm_swapped_states(*args):
    dx, dh0, dc0, grads = lstm_by_steps(*args)
    return dx, dc0, dh0, grads


@wrong("lstm_backward")
def lstm_a_third_of_b(*args):
    dx, dh0, dc0, grads = lstm_by_steps(*args)
    return dx, dh0, dc0, grads | {"b": grads["b"] / 3}


# ----------------------------------------------------------------------- gradient_norm_by_lag


@right("gradient_norm_by_lag")
def lag_plain(wh, h_all):
    T, H = h_all.shape
    J, norms = np.eye(H), []
    for lag in range(T):
        norms.append(np.linalg.norm(J, 2))
        J = J @ np.diag(1 - h_all[T - 1 - lag] ** 2) @ wh.T
    return norms


@right("gradient_norm_by_lag")
def lag_of_gradients(wh, h_all):
    """Rows are gradients: as in the backward pass itself."""
    T, H = h_all.shape
    dh, norms = np.eye(H), np.zeros(T)
    for t in range(T - 1, -1, -1):
        norms[T - 1 - t] = np.linalg.svd(dh, compute_uv=False)[0]
        dh = (dh * (1 - h_all[t] ** 2)) @ wh.T
    return norms


@right("gradient_norm_by_lag")
def lag_from_scratch(wh, h_all):
    """Each lag's product by itself."""
    T, H = h_all.shape
    jacobians = [(1 - h[:, None] ** 2) * wh.T for h in h_all]
    products = [
        np.linalg.multi_dot([np.eye(H), np.eye(H), *jacobians[: T - 1 - lag : -1]])
        for lag in range(T)
    ]
    return [np.linalg.norm(p, ord=2) for p in products]


@right("gradient_norm_by_lag")
def lag_torch(wh, h_all):
    W, h_all = torch.tensor(np.array(wh)), torch.tensor(np.array(h_all))
    J, norms = torch.eye(len(W), dtype=h_all.dtype), []
    for h in h_all.flip(0):
        norms.append(torch.linalg.matrix_norm(J, 2))
        J = J @ ((1 - h**2)[:, None] * W.T)
    return torch.stack(norms)


@right("gradient_norm_by_lag")
def lag_transposed(wh, h_all):
    """The transposed product has the same singular values."""
    T, H = h_all.shape
    M, norms = np.eye(H), []
    for t in reversed(range(T)):
        norms.append(np.linalg.svd(M)[1].max())
        M = wh * (1 - h_all[t] ** 2) @ M
    return np.array(norms)


@right("gradient_norm_by_lag")
def lag_rescaled(wh, h_all):
    """The product kept at norm 1, its logarithm apart."""
    T, H = h_all.shape
    J, size, norms = np.eye(H), 0.0, np.ones(T)
    for lag in range(1, T):
        J = J @ ((1 - h_all[T - lag, :, None] ** 2) * wh.T)
        norm = np.linalg.norm(J, 2)
        if norm == 0:
            norms[lag:] = 0
            break
        J, size = J / norm, size + np.log(norm)
        norms[lag] = np.exp(size)
    return norms


@right("gradient_norm_by_lag")
def lag_float32(wh, h_all):
    return np.asarray(lag_plain(wh.astype(np.float32), h_all.astype(np.float32)), np.float32)


@mutating("gradient_norm_by_lag")
def lag_squares_in_place(wh, h_all):
    norms = lag_plain(wh, h_all)
    h_all **= 2
    return norms


@mutating("gradient_norm_by_lag")
def lag_into_wh(wh, h_all):
    norms = lag_plain(wh, h_all)
    wh /= 2
    return norms


@wrong("gradient_norm_by_lag")
def lag_of_half_steps(wh, h_all):
    return lag_plain(0.5 * wh, h_all)


@wrong("gradient_norm_by_lag")
def lag_last_only(wh, h_all):
    return lag_plain(wh, h_all)[-1]


@wrong("gradient_norm_by_lag")
def lag_as_a_column(wh, h_all):
    return np.array(lag_plain(wh, h_all))[:, None]


@wrong("gradient_norm_by_lag")
def lag_of_the_mean_slope(wh, h_all):
    return lag_plain(wh, 0 * h_all + np.sqrt((h_all**2).mean()))
