r"""RNN and LSTM: a step, a sequence, and backpropagation through time, full and truncated.

A sequence is x ``(B, T, D)``: batch, time, width; a state is ``(B, H)``. Weights stand on the
right, ``z = x @ wx + h @ wh + b``: the transpose of what torch stores. The conventions are the same
in every function:

- The LSTM's gates stand side by side in 4H columns, in torch's order: input i, forget f, candidate
  g, output o. One bias; torch has two, and only their sum matters.
- ``h_all[:, t]`` is the state after step t, which read ``x[:, t]``; h0 is the state before step 0.
- With ``lengths``, a row's state stays as it is from its length on: ``h_all[:, -1]`` is every row's
  last state. Padding in x is never read, NaN in it included, and its gradient is 0. What comes back
  to a state that stayed goes to the step that made it.
- ``truncate=k`` cuts the gradient wherever it would cross a multiple of k steps, as detaching
  the state every k steps does.
- Gradients of parameters come as a dict with the parameters' names.
- float32 stays float32, integers become float64, inputs are never written to.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from attn_lessons._arrays import as_count, as_float, check_rank, check_shape

PARAMETERS = ("wx", "wh", "b")
GATES = ("i", "f", "g", "o")

# A gate far on its closed side overflows in exp and is 0, as it should be.
_quiet = np.errstate(all="ignore")

_TORCH_NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

Weights = Mapping[str, Any]
Gradients = dict[str, np.ndarray]


# --- RNN: one step ----------------------------------------------------------------------------


@_quiet
def rnn_step_forward(
    x: Real[np.ndarray, "B D"],
    h: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H"],
    wh: Real[np.ndarray, "H H"],
    b: Real[np.ndarray, "H"],
) -> Float[np.ndarray, "B H"]:
    r"""The next state from the input and the state before.

    .. math:: h_t = \tanh(x_t W_x + h_{t-1} W_h + b)

    Shapes: x ``(B, D)``, h ``(B, H)``, wx ``(D, H)``, wh ``(H, H)``,
    b ``(H,)``; the result ``(B, H)``.

    ValueError: shapes do not fit.

    Source: Elman 1990; the equation of torch.nn.RNN, with one bias.
    """
    x, h, wx, wh, b = _step_inputs(x, {"h": h}, wx, wh, b, 1)
    return np.tanh(x @ wx + h @ wh + b)


@_quiet
def rnn_step_backward(
    dh_next: Real[np.ndarray, "B H"],
    x: Real[np.ndarray, "B D"],
    h: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H"],
    wh: Real[np.ndarray, "H H"],
    b: Real[np.ndarray, "H"],
) -> tuple[Float[np.ndarray, "B D"], Float[np.ndarray, "B H"], Gradients]:
    r"""Gradients of one step, given that of the state it made.

    .. math:: dz = dh_t \circ (1 - h_t^2), \qquad
              dx_t = dz\, W_x^\top, \qquad dh_{t-1} = dz\, W_h^\top

    .. math:: dW_x = x_t^\top dz, \qquad dW_h = h_{t-1}^\top dz,
              \qquad db = \textstyle\sum_B dz

    tanh′ is taken from the new state, not from the old one and not from
    z. Returns ``(dx, dh, grads)``.

    Shapes: dh_next ``(B, H)``, the rest as in rnn_step_forward; each
    gradient as its array, grads keyed wx, wh, b.

    ValueError: shapes do not fit.

    Source: the derivative of Elman 1990.
    """
    x, h, wx, wh, b = _step_inputs(x, {"h": h}, wx, wh, b, 1)
    dh_next = _checked("dh_next", dh_next, h.shape, f"to match h {h.shape}")
    dz = dh_next * _one_minus_square(np.tanh(x @ wx + h @ wh + b))
    return dz @ wx.T, dz @ wh.T, {"wx": x.T @ dz, "wh": h.T @ dz, "b": _total(dz)}


# --- RNN: a sequence --------------------------------------------------------------------------


class RNNCache(NamedTuple):
    """What the backward pass reads.

    - x ``(B, T, D)``: as read, 0 in padding.
    - h0 ``(B, H)``, wx ``(D, H)``, wh ``(H, H)``: as given.
    - h_all ``(B, T, H)``: the state after every step.
    - held ``(B, T)``: True where a row is over and its state stays;
      None without lengths.
    """

    x: Float[np.ndarray, "B T D"]
    h0: Float[np.ndarray, "B H"]
    wx: Float[np.ndarray, "D H"]
    wh: Float[np.ndarray, "H H"]
    h_all: Float[np.ndarray, "B T H"]
    held: Bool[np.ndarray, "B T"] | None


@_quiet
def rnn_forward(
    x: Real[np.ndarray, "B T D"],
    h0: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H"],
    wh: Real[np.ndarray, "H H"],
    b: Real[np.ndarray, "H"],
    *,
    lengths: Integer[np.ndarray, "B"] | None = None,
) -> tuple[Float[np.ndarray, "B T H"], RNNCache]:
    r"""All states of a sequence, one after the other.

    .. math:: h_t = \tanh(x_t W_x + h_{t-1} W_h + b),
              \qquad t = 0 \dots T-1

    x W_x is one product for all steps; only h W_h has to wait for the
    step before. Returns ``(h_all, cache)``.

    Shapes: x ``(B, T, D)``, h0 ``(B, H)``, wx ``(D, H)``, wh ``(H, H)``,
    b ``(H,)``, lengths ``(B,)``; h_all ``(B, T, H)``.

    ValueError: shapes do not fit; a length is below 0 or above T.

    Source: Elman 1990; the equation of torch.nn.RNN, with one bias.
    """
    x, h, wx, wh, b = _sequence_inputs(x, {"h0": h0}, wx, wh, b, 1)
    x, held = _without_padding(x, lengths)
    h0 = h
    h_all = _all_steps(x, wx, b, h, wh)  # z, until a step makes it h
    for t, z in enumerate(h_all):
        z += h @ wh
        np.tanh(z, out=z)
        if held is not None:
            np.copyto(z, h, where=held[:, t, None])
        h = z
    cache = _rnn_cached(x, h0, wx, wh, h_all, held)
    return cache.h_all, cache


@_quiet
def rnn_backward_cached(
    dh_all: Real[np.ndarray, "B T H"],
    cache: RNNCache,
    *,
    truncate: int | None = None,
) -> tuple[Float[np.ndarray, "B T D"], Float[np.ndarray, "B H"], Gradients]:
    r"""Backpropagation through time, from what rnn_forward kept.

    From the last step to the first, what the loss says about h_t itself
    meets what step t + 1 says about it:

    .. math:: dz_t = (dh^{\mathrm{all}}_t + dz_{t+1} W_h^\top)
              \circ (1 - h_t^2)

    The weights were used at every step, so their gradients are sums
    over all of them:

    .. math:: dx_t = dz_t W_x^\top, \qquad
              dW_x = \sum_t x_t^\top dz_t, \qquad
              dW_h = \sum_t h_{t-1}^\top dz_t, \qquad
              db = \sum_t dz_t

    and dh0 is what is left over: :math:`dz_0 W_h^\top`. Returns ``(dx,
    dh0, grads)``.

    Shapes: dh_all ``(B, T, H)``, the gradient by every h_all; dx
    ``(B, T, D)``, dh0 ``(B, H)``, grads as in rnn_step_backward.

    ValueError: dh_all does not fit; ``truncate`` is below 1.

    Source: Werbos 1990; truncated: Williams & Peng 1990.
    """
    x, h0, wx, wh, h_all, held = cache
    why, truncate = f"to match h_all {h_all.shape}", _every(truncate)
    dh_all = _checked("dh_all", dh_all, h_all.shape, why)
    dh = np.zeros(h0.shape, np.result_type(dh_all, h_all))
    h_all = h_all.swapaxes(0, 1)
    # tanh′, until a step makes it dz:
    dz = _one_minus_square(h_all).astype(dh.dtype, copy=False)
    if held is not None:
        dz[held.T] = 0
    for t in reversed(range(len(dz))):
        dh = dh + dh_all[:, t]
        dz[t] *= dh
        dh = _carried(dz[t] @ wh.T, dh, held, t)
        if _is_cut(t, truncate):
            dh = np.zeros_like(dh)
    return _by_input(dz, wx), dh, _parameter_gradients(x, h0, h_all, dz)


def rnn_backward(
    dh_all: Real[np.ndarray, "B T H"],
    x: Real[np.ndarray, "B T D"],
    h0: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H"],
    wh: Real[np.ndarray, "H H"],
    b: Real[np.ndarray, "H"],
    *,
    lengths: Integer[np.ndarray, "B"] | None = None,
    truncate: int | None = None,
) -> tuple[Float[np.ndarray, "B T D"], Float[np.ndarray, "B H"], Gradients]:
    r"""Backpropagation through time, from the arguments alone.

    .. math:: dz_t = (dh^{\mathrm{all}}_t + dz_{t+1} W_h^\top)
              \circ (1 - h_t^2)

    The forward pass, then rnn_backward_cached. Returns ``(dx, dh0,
    grads)``.

    Shapes: dh_all ``(B, T, H)``, the rest as in rnn_forward; each
    gradient as its array.

    ValueError: as there and in rnn_backward_cached.

    Source: Werbos 1990; truncated: Williams & Peng 1990.
    """
    _, cache = rnn_forward(x, h0, wx, wh, b, lengths=lengths)
    return rnn_backward_cached(dh_all, cache, truncate=truncate)


# --- LSTM: one step ---------------------------------------------------------------------------


@_quiet
def lstm_step_forward(
    x: Real[np.ndarray, "B D"],
    h: Real[np.ndarray, "B H"],
    c: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H4"],
    wh: Real[np.ndarray, "H H4"],
    b: Real[np.ndarray, "H4"],
) -> tuple[Float[np.ndarray, "B H"], Float[np.ndarray, "B H"]]:
    r"""The next state and the next cell.

    .. math:: [\,z_i \mid z_f \mid z_g \mid z_o\,]
              = x_t W_x + h_{t-1} W_h + b

    .. math:: i = \sigma(z_i), \qquad f = \sigma(z_f), \qquad
              g = \tanh(z_g), \qquad o = \sigma(z_o)

    .. math:: c_t = f \circ c_{t-1} + i \circ g, \qquad
              h_t = o \circ \tanh(c_t)

    Returns ``(h_next, c_next)``: all that streaming has to keep.

    Shapes: x ``(B, D)``, h and c ``(B, H)``, wx ``(D, 4H)``, wh ``(H,
    4H)``, b ``(4H,)``; both results ``(B, H)``.

    ValueError: shapes do not fit.

    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers
    et al. 2000; gate order of torch.nn.LSTM.
    """
    x, h, c, wx, wh, b = _step_inputs(x, {"h": h, "c": c}, wx, wh, b, 4)
    i, f, g, o = _split_gates(_activated(x @ wx + h @ wh + b))
    c_next = f * c + i * g
    return o * np.tanh(c_next), c_next


@_quiet
def lstm_step_backward(
    dh: Real[np.ndarray, "B H"],
    dc: Real[np.ndarray, "B H"],
    x: Real[np.ndarray, "B D"],
    h: Real[np.ndarray, "B H"],
    c: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H4"],
    wh: Real[np.ndarray, "H H4"],
    b: Real[np.ndarray, "H4"],
) -> tuple[
    Float[np.ndarray, "B D"],
    Float[np.ndarray, "B H"],
    Float[np.ndarray, "B H"],
    Gradients,
]:
    r"""Gradients of one step, given those of the h and the c it made.

    The cell has two readers, h_t and step t + 1:

    .. math:: dc_t = dc + dh \circ o \circ (1 - \tanh^2 c_t)

    Each gate's gradient holds its partner of the product it stood in,
    and its own slope:

    .. math:: dz_i &= dc_t \circ g \circ i\,(1 - i), &
              dz_f &= dc_t \circ c_{t-1} \circ f\,(1 - f), \\
              dz_g &= dc_t \circ i \circ (1 - g^2), &
              dz_o &= dh \circ \tanh(c_t) \circ o\,(1 - o)

    .. math:: dx_t = dz\, W_x^\top, \qquad
              dh_{t-1} = dz\, W_h^\top, \qquad
              dc_{t-1} = dc_t \circ f

    Returns ``(dx, dh_prev, dc_prev, grads)``.

    Shapes: dh and dc ``(B, H)``, at h_next and c_next; the rest as in
    lstm_step_forward; each gradient as its array, grads keyed wx, wh, b.

    ValueError: shapes do not fit.

    Source: the derivative of Gers et al. 2000.
    """
    x, h, c, wx, wh, b = _step_inputs(x, {"h": h, "c": c}, wx, wh, b, 4)
    dh = _checked("dh", dh, h.shape, f"to match h {h.shape}")
    dc = _checked("dc", dc, h.shape, f"to match h {h.shape}")
    i, f, g, o = _split_gates(_activated(x @ wx + h @ wh + b))
    tanh_c = np.tanh(f * c + i * g)

    dc = dc + dh * o * _one_minus_square(tanh_c)
    dz_i = dc * g * i * (1 - i)
    dz_f = dc * c * f * (1 - f)
    dz_g = dc * i * _one_minus_square(g)
    dz_o = dh * tanh_c * o * (1 - o)
    dz = np.concatenate([dz_i, dz_f, dz_g, dz_o], axis=-1)
    grads = {"wx": x.T @ dz, "wh": h.T @ dz, "b": _total(dz)}
    return dz @ wx.T, dz @ wh.T, dc * f, grads


# --- LSTM: a sequence -------------------------------------------------------------------------


class LSTMCache(NamedTuple):
    """What the backward pass reads.

    - x ``(B, T, D)``: as read, 0 in padding.
    - h0 and c0 ``(B, H)``, wx ``(D, 4H)``, wh ``(H, 4H)``: as given.
    - gates ``(B, T, 4H)``: i, f, g, o after their activations.
    - c_all, tanh_c, h_all ``(B, T, H)``: cell, its tanh, and state
      after every step.
    - held ``(B, T)``: True where a row is over and its state stays;
      None without lengths.
    """

    x: Float[np.ndarray, "B T D"]
    h0: Float[np.ndarray, "B H"]
    c0: Float[np.ndarray, "B H"]
    wx: Float[np.ndarray, "D H4"]
    wh: Float[np.ndarray, "H H4"]
    gates: Float[np.ndarray, "B T H4"]
    c_all: Float[np.ndarray, "B T H"]
    tanh_c: Float[np.ndarray, "B T H"]
    h_all: Float[np.ndarray, "B T H"]
    held: Bool[np.ndarray, "B T"] | None


@_quiet
def lstm_forward(
    x: Real[np.ndarray, "B T D"],
    h0: Real[np.ndarray, "B H"],
    c0: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H4"],
    wh: Real[np.ndarray, "H H4"],
    b: Real[np.ndarray, "H4"],
    *,
    lengths: Integer[np.ndarray, "B"] | None = None,
) -> tuple[Float[np.ndarray, "B T H"], Float[np.ndarray, "B H"], LSTMCache]:
    r"""All states of a sequence, and the cell after the last step.

    .. math:: c_t = f_t \circ c_{t-1} + i_t \circ g_t, \qquad
              h_t = o_t \circ \tanh(c_t), \qquad t = 0 \dots T-1

    with the gates of lstm_step_forward. x W_x is one product for all
    steps. Returns ``(h_all, c_last, cache)``.

    Shapes: x ``(B, T, D)``, h0 and c0 ``(B, H)``, wx ``(D, 4H)``, wh
    ``(H, 4H)``, b ``(4H,)``, lengths ``(B,)``; h_all ``(B, T, H)``,
    c_last ``(B, H)``.

    ValueError: shapes do not fit; a length is below 0 or above T.

    Source: Hochreiter & Schmidhuber 1997; Gers et al. 2000; gate order
    of torch.nn.LSTM.
    """
    x, h, c, wx, wh, b = _sequence_inputs(x, {"h0": h0, "c0": c0}, wx, wh, b, 4)
    x, held = _without_padding(x, lengths)
    h0, c0 = h, c
    gates = _all_steps(x, wx, b, h, c, wh)  # z, until a step opens them
    shape = (3, *gates.shape[:2], h.shape[1])
    c_all, tanh_c, h_all = np.empty(shape, gates.dtype)
    for t, z in enumerate(gates):
        z += h @ wh
        i, f, g, o = _split_gates(_activated(z))
        np.add(f * c, i * g, out=c_all[t])
        np.tanh(c_all[t], out=tanh_c[t])
        np.multiply(o, tanh_c[t], out=h_all[t])
        if held is not None:
            np.copyto(h_all[t], h, where=held[:, t, None])
            np.copyto(c_all[t], c, where=held[:, t, None])
        h, c = h_all[t], c_all[t]
    steps = gates, c_all, tanh_c, h_all
    cache = _lstm_cached(x, h0, c0, wx, wh, *steps, held)
    return cache.h_all, c.astype(gates.dtype), cache


@_quiet
def lstm_backward_cached(
    dh_all: Real[np.ndarray, "B T H"],
    cache: LSTMCache,
    *,
    dc_last: Real[np.ndarray, "B H"] | None = None,
    truncate: int | None = None,
) -> tuple[
    Float[np.ndarray, "B T D"],
    Float[np.ndarray, "B H"],
    Float[np.ndarray, "B H"],
    Gradients,
]:
    r"""Backpropagation through time, from what lstm_forward kept.

    From the last step to the first, with both states carried:

    .. math:: dh_t &= dh^{\mathrm{all}}_t + dz_{t+1} W_h^\top \\
              dc_t &= dc_{t+1} \circ f_{t+1}
                    + dh_t \circ o_t \circ (1 - \tanh^2 c_t)

    dz_t as in lstm_step_backward. What dc and dh are multiplied by is
    known for all steps beforehand; the weights' gradients are products
    over all steps afterwards. Returns ``(dx, dh0, dc0, grads)``.

    Shapes: dh_all ``(B, T, H)``, the gradient by every h_all, dc_last
    ``(B, H)``, that by the last cell, 0 unless said; each gradient as
    its array, grads keyed wx, wh, b.

    ValueError: dh_all or dc_last does not fit; ``truncate`` is below 1.

    Source: the derivative of Gers et al. 2000, exact, not cut at the
    gates as in Hochreiter & Schmidhuber 1997.
    """
    x, h0, c0, wx, wh, _, _, _, h_all, held = cache
    why, truncate = f"to match h_all {h_all.shape}", _every(truncate)
    dh_all = _checked("dh_all", dh_all, h_all.shape, why)
    dc = np.zeros_like(c0) if dc_last is None else dc_last
    dc = _checked("dc_last", dc, c0.shape, f"to match c0 {c0.shape}")
    dtype = np.result_type(dh_all, dc, h_all)
    # Slopes, until a step makes them dz:
    forget, to_cell, dz = _local_slopes(cache, dtype)
    dh, dc = np.zeros(h0.shape, dtype), dc.astype(dtype)
    for t in reversed(range(len(dz))):
        dh = dh + dh_all[:, t]
        dc = dc + dh * to_cell[t]
        dz[t, :, :3] *= dc[:, None]
        dz[t, :, 3] *= dh
        dh_before = dz[t].reshape(len(dh), wh.shape[1]) @ wh.T
        dh = _carried(dh_before, dh, held, t)
        dc = dc * forget[t]
        if _is_cut(t, truncate):
            dh, dc = np.zeros_like(dh), np.zeros_like(dc)
    dz = dz.reshape(*dz.shape[:2], wx.shape[1])
    grads = _parameter_gradients(x, h0, h_all.swapaxes(0, 1), dz)
    return _by_input(dz, wx), dh, dc, grads


def lstm_backward(
    dh_all: Real[np.ndarray, "B T H"],
    x: Real[np.ndarray, "B T D"],
    h0: Real[np.ndarray, "B H"],
    c0: Real[np.ndarray, "B H"],
    wx: Real[np.ndarray, "D H4"],
    wh: Real[np.ndarray, "H H4"],
    b: Real[np.ndarray, "H4"],
    *,
    dc_last: Real[np.ndarray, "B H"] | None = None,
    lengths: Integer[np.ndarray, "B"] | None = None,
    truncate: int | None = None,
) -> tuple[
    Float[np.ndarray, "B T D"],
    Float[np.ndarray, "B H"],
    Float[np.ndarray, "B H"],
    Gradients,
]:
    r"""Backpropagation through time, from the arguments alone.

    .. math:: dc_t = dc_{t+1} \circ f_{t+1}
              + dh_t \circ o_t \circ (1 - \tanh^2 c_t)

    The forward pass, then lstm_backward_cached. Returns ``(dx, dh0,
    dc0, grads)``.

    Shapes: dh_all ``(B, T, H)``, dc_last ``(B, H)``, the rest as in
    lstm_forward; each gradient as its array.

    ValueError: as there and in lstm_backward_cached.

    Source: the derivative of Gers et al. 2000.
    """
    _, _, cache = lstm_forward(x, h0, c0, wx, wh, b, lengths=lengths)
    return lstm_backward_cached(dh_all, cache, dc_last=dc_last, truncate=truncate)


def _local_slopes(cache, dtype):
    """What dc and dh are multiplied by at each step: forget gate, slope of h by c, slopes of z.

    Time first: ``(T, B, H)`` twice and ``(T, B, 4, H)``.
    """
    gates, c_all, tanh_c = (a.swapaxes(0, 1) for a in (cache.gates, cache.c_all, cache.tanh_c))
    i, f, g, o = _split_gates(gates)
    to_cell = o * _one_minus_square(tanh_c)
    slopes = np.empty((*c_all.shape[:2], 4, c_all.shape[2]), dtype)
    slopes[:, :, 0] = g * i * (1 - i)
    slopes[:, :, 1] = _before(cache.c0, c_all) * f * (1 - f)
    slopes[:, :, 2] = i * _one_minus_square(g)
    slopes[:, :, 3] = tanh_c * o * (1 - o)
    if cache.held is not None:
        over = cache.held.T
        slopes[over] = to_cell[over] = 0
        f = np.where(over[..., None], 1, f)
    return f, to_cell, slopes


# --- gradient norm by lag ---------------------------------------------------------------------


@_quiet
def gradient_norm_by_lag(
    wh: Real[np.ndarray, "H H"],
    h_all: Real[np.ndarray, "*B T H"],
) -> Float[np.ndarray, "*B T"]:
    r"""How far the last state's gradient reaches back in a tanh RNN.

    .. math:: n_k = \Bigl\| \frac{\partial h_{T-1}}
              {\partial h_{T-1-k}} \Bigr\|_2 = \Bigl\|
              \prod_{t=T-k}^{T-1} W_h\, \mathrm{diag}(1 - h_t^2)
              \Bigr\|_2, \qquad k = 0 \dots T-1

    The spectral norm: the largest factor by which k steps can stretch a
    gradient. It may rise or fall on the way whatever the singular
    values of W_h: a nilpotent W_h with a singular value of 11 is 0
    after H steps.

    Shapes: wh ``(H, H)``, h_all ``(T, H)`` or ``(B, T, H)``, the states
    after each step; the result ``(T,)`` or ``(B, T)``, by lag.

    ValueError: shapes do not fit; an entry is not finite.

    Source: Bengio et al. 1994, section 3; Pascanu et al. 2013, eq. (5).
    """
    wh, h_all = as_float("wh", wh), as_float("h_all", h_all)
    if h_all.ndim not in (2, 3):
        raise ValueError(f"h_all: expected shape (T, H) or (B, T, H); got {h_all.shape}")
    width = h_all.shape[-1]
    check_shape("wh", wh, (width, width), f"to match h_all {h_all.shape}")
    _check_finite(wh=wh, h_all=h_all)
    slopes = _one_minus_square(h_all if h_all.ndim == 3 else h_all[None])
    steps = (slopes[:, t, :, None] * wh.T for t in reversed(range(1, slopes.shape[1])))
    start = np.eye(width, dtype=np.result_type(wh, h_all))
    (norms,) = _norms_of_products(start, steps, slopes.shape[:2], [slice(None)])
    return norms.reshape(h_all.shape[:-1])


class LagNorms(NamedTuple):
    """Spectral norms by lag of an LSTM's Jacobians, each ``(B, T)``.

    - full: of (h, c) at the end by (h, c) that many steps before.
    - cell: of c at the end by that c alone, through all paths.
    - direct: of the product of the forget gates: the path on which the
      cell is only multiplied, the h's in between held fast.
    """

    full: Float[np.ndarray, "B T"]
    cell: Float[np.ndarray, "B T"]
    direct: Float[np.ndarray, "B T"]


@_quiet
def lstm_gradient_norm_by_lag(cache: LSTMCache) -> LagNorms:
    r"""How far the last state's gradient reaches back in an LSTM.

    .. math:: \Bigl\| \frac{\partial (h, c)_{T-1}}
              {\partial (h, c)_{T-1-k}} \Bigr\|_2, \qquad
              \Bigl\| \frac{\partial c_{T-1}}
              {\partial c_{T-1-k}} \Bigr\|_2, \qquad
              \Bigl\| \prod_{t=T-k}^{T-1} \mathrm{diag}(f_t) \Bigr\|_2

    for k = 0 … T-1, from what lstm_forward kept. The last one is the
    direct path alone: the gates read h, which c made, and that is left
    out.

    Shapes: caches of ``(B, T, ·)``; LagNorms of three ``(B, T)``.

    ValueError: an entry is not finite.

    Source: Hochreiter & Schmidhuber 1997, section 4, for the direct
    path.
    """
    b, n, width = cache.h_all.shape
    _check_finite(wh=cache.wh, gates=cache.gates, c_all=cache.c_all)
    forget, to_cell, slopes = _local_slopes(cache, cache.h_all.dtype)
    start = np.eye(2 * width, dtype=forget.dtype)
    steps = (
        _lstm_jacobian(cache, forget[t], to_cell[t], slopes[t], t) for t in reversed(range(1, n))
    )
    blocks = [slice(None), slice(width, None)]
    full, cell = _norms_of_products(start, steps, (b, n), blocks)
    kept = np.cumprod(forget[:0:-1], axis=0).max(axis=-1, initial=0)
    direct = np.concatenate([np.ones((min(n, 1), b), kept.dtype), kept]).T
    return LagNorms(full, cell, direct)


def _lstm_jacobian(cache, forget, to_cell, slopes, t):
    """(h, c) after step t, down the rows, by (h, c) before it: ``(B, 2H, 2H)``."""
    same = np.eye(forget.shape[-1], dtype=forget.dtype)
    by_i, by_f, by_g, by_o = slopes.swapaxes(0, 1)[..., None] * np.split(cache.wh.T[None], 4, 1)
    c_by_h, c_by_c = by_i + by_f + by_g, forget[..., None] * same
    to_cell = to_cell[..., None]
    h_by_h, h_by_c = by_o + to_cell * c_by_h, to_cell * c_by_c
    if cache.held is not None:
        # A state that stays is its own copy; the slopes are 0 there.
        h_by_h = h_by_h + cache.held[:, t, None, None] * same
    return np.block([[h_by_h, h_by_c], [c_by_h, c_by_c]])


def _norms_of_products(start, steps, shape, blocks):
    """Spectral norms of start, start @ step, start @ step @ step, … for every row of a batch.

    Of the whole product and of blocks of it on its diagonal. It is kept near 1 and its size apart,
    so that a long one neither overflows nor sinks into the smallest floats on the way.
    """
    norms = np.zeros((len(blocks), *shape), start.dtype)
    product, size = np.broadcast_to(start, (shape[0], *start.shape)), np.ones(shape[0])
    for lag in range(shape[1]):
        if lag > 0:
            product = product @ next(steps)
            largest = np.abs(product).max(axis=(-2, -1), initial=0).astype(float)
            size = size * largest
            product = product / np.where(largest > 0, largest, 1)[:, None, None].astype(start.dtype)
        for n, block in enumerate(blocks):
            norms[n, :, lag] = size * np.linalg.norm(product[:, block, block], 2, axis=(-2, -1))
    return norms


# --- torch's layout ---------------------------------------------------------------------------


def to_torch_rnn(params: Weights) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Parameters as nn.RNN's state_dict holds them.

    .. math:: W_{ih} = W_x^\top, \qquad W_{hh} = W_h^\top, \qquad
              b_{ih} = b, \qquad b_{hh} = 0

    torch adds two biases, for cuDNN's sake; which of them holds what
    makes no difference. In training it does: each gets the whole
    gradient, so that their sum moves twice as far as our one bias.

    Shapes: params wx ``(D, H)``, wh ``(H, H)``, b ``(H,)``;
    weight_ih_l0 ``(H, D)``, weight_hh_l0 ``(H, H)``, bias_ih_l0 and
    bias_hh_l0 ``(H,)``.

    ValueError: a name is missing or unknown; shapes do not fit.

    Source: the state_dict of torch.nn.RNN; pytorch#750.
    """
    return _to_torch(params, 1)


def from_torch_rnn(state: Weights) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Our parameters from nn.RNN's state_dict, one layer, one way.

    .. math:: W_x = W_{ih}^\top, \qquad W_h = W_{hh}^\top, \qquad
              b = b_{ih} + b_{hh}

    The arrays are copies. Without biases in the state, b is 0.

    Shapes: as in to_torch_rnn, the other way.

    ValueError: a name is missing, or unknown (a second layer, a reverse
    direction, a projection); shapes do not fit.

    Source: the state_dict of torch.nn.RNN; pytorch#750.
    """
    return _from_torch(state, 1)


def to_torch_lstm(params: Weights) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Parameters as nn.LSTM's state_dict holds them.

    .. math:: W_{ih} = W_x^\top, \qquad W_{hh} = W_h^\top, \qquad
              b_{ih} = b, \qquad b_{hh} = 0

    The gates' order is the same, i, f, g, o.

    Shapes: params wx ``(D, 4H)``, wh ``(H, 4H)``, b ``(4H,)``;
    weight_ih_l0 ``(4H, D)``, weight_hh_l0 ``(4H, H)``, bias_ih_l0 and
    bias_hh_l0 ``(4H,)``.

    ValueError: a name is missing or unknown; shapes do not fit.

    Source: the state_dict of torch.nn.LSTM; pytorch#750.
    """
    return _to_torch(params, 4)


def from_torch_lstm(state: Weights) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Our parameters from nn.LSTM's state_dict, one layer, one way.

    .. math:: W_x = W_{ih}^\top, \qquad W_h = W_{hh}^\top, \qquad
              b = b_{ih} + b_{hh}

    The arrays are copies. Without biases in the state, b is 0. A forget
    bias of 1 set in both of torch's is a forget bias of 2.

    Shapes: as in to_torch_lstm, the other way.

    ValueError: a name is missing, or unknown (a second layer, a reverse
    direction, a projection); shapes do not fit.

    Source: the state_dict of torch.nn.LSTM; pytorch#750.
    """
    return _from_torch(state, 4)


# --- initial weights --------------------------------------------------------------------------


def init_rnn(
    rng: np.random.Generator, d_in: SupportsIndex, d_hidden: SupportsIndex
) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Weights for a tanh RNN to start from.

    .. math:: W_x \sim \mathcal N(0, 1/D), \qquad
              W_h^\top W_h = 1, \qquad b = 0

    An orthogonal W_h neither stretches nor shrinks a gradient; only
    tanh′ does.

    Shapes: wx ``(D, H)``, wh ``(H, H)``, b ``(H,)``, in a dict.

    ValueError: ``d_in`` or ``d_hidden`` is below 1.

    Source: Saxe et al. 2014, section 3.
    """
    d_in, d_hidden = as_count("d_in", d_in, 1), as_count("d_hidden", d_hidden, 1)
    wx = rng.normal(size=(d_in, d_hidden)) * d_in**-0.5
    return {"wx": wx, "wh": _orthogonal(rng, d_hidden), "b": np.zeros(d_hidden)}


def init_lstm(
    rng: np.random.Generator,
    d_in: SupportsIndex,
    d_hidden: SupportsIndex,
    *,
    forget_bias: float = 1.0,
) -> dict[str, Float[np.ndarray, "..."]]:
    r"""Weights for an LSTM to start from.

    .. math:: W_x \sim \mathcal N(0, 1/D), \qquad
              W_{h,\mathrm{gate}}^\top W_{h,\mathrm{gate}} = 1,
              \qquad b_f = \mathrm{forget\_bias}, \qquad
              b_i = b_g = b_o = 0

    A forget gate starts near σ(forget_bias): at bias 0, a cell keeps
    half of itself over one step and 1e-3 over ten; at bias 1, 0.73 and
    0.044.

    Shapes: wx ``(D, 4H)``, wh ``(H, 4H)``, b ``(4H,)``, in a dict.

    ValueError: ``d_in`` or ``d_hidden`` is below 1; ``forget_bias`` is
    not finite.

    Source: Gers et al. 2000; Jozefowicz et al. 2015, section 2.2, for
    the forget bias of 1.
    """
    d_in, d_hidden = as_count("d_in", d_in, 1), as_count("d_hidden", d_hidden, 1)
    if not np.isfinite(forget_bias):
        raise ValueError(f"forget_bias: expected a finite number; got {forget_bias}")
    wx = rng.normal(size=(d_in, 4 * d_hidden)) * d_in**-0.5
    wh = np.concatenate([_orthogonal(rng, d_hidden) for _ in GATES], axis=1)
    b = np.zeros(4 * d_hidden)
    b[d_hidden : 2 * d_hidden] = forget_bias
    return {"wx": wx, "wh": wh, "b": b}


# --- the steps --------------------------------------------------------------------------------


def _activated(z):
    """i, f, g, o in place of their z."""
    _, _, candidate, _ = _split_gates(z)
    g = np.tanh(candidate)
    # (1 + tanh(z/2))/2 would round the small values of a closed gate away.
    # All four at once: one pass over neighbours beats two over slices.
    np.negative(z, out=z)
    np.exp(z, out=z)
    z += 1
    np.reciprocal(z, out=z)
    candidate[...] = g
    return z


def _split_gates(gates):
    width = gates.shape[-1] // 4
    return tuple(gates[..., n * width : (n + 1) * width] for n in range(4))


def _one_minus_square(y):
    # tanh' = 1 - y²; near 1, the square's rounding is as large as what is left.
    return (1 - y) * (1 + y)


def _is_cut(t: int, truncate: int | None) -> bool:
    """Whether the step from t to t - 1 crosses a multiple of ``truncate``; h0 is its own start."""
    return truncate is not None and t > 0 and t % truncate == 0


def _every(truncate: SupportsIndex | None) -> int | None:
    return None if truncate is None else as_count("truncate", truncate, 1)


def _all_steps(x, wx, b, *states):
    """x W_x + b of all steps in one product, time first: a step's numbers are neighbours."""
    dtype = np.result_type(x, wx, b, *states)
    rows = (_rows(x.swapaxes(0, 1)) @ wx).astype(dtype, copy=False)
    rows += b
    return rows.reshape(x.shape[1], x.shape[0], wx.shape[1])


def _before(first, states):
    """The states before each step, time first."""
    return np.concatenate([first[None], states[:-1]])[: len(states)]


def _carried(dh_before, dh, held, t):
    """The gradient of the state before step t: where it stayed, that of the state itself."""
    return dh_before if held is None else np.where(held[:, t, None], dh, dh_before)


def _by_input(dz, wx):
    """dx ``(B, T, D)`` from dz ``(T, B, ·)``, in one product."""
    n, b, _ = dz.shape
    return (_rows(dz) @ wx.T).reshape(n, b, wx.shape[0]).swapaxes(0, 1)


def _parameter_gradients(x, h0, h_all, dz) -> Gradients:
    """All steps of all rows in one product each; h_all and dz have time first."""
    rows, x_rows, h_rows = _rows(dz), _rows(x.swapaxes(0, 1)), _rows(_before(h0, h_all))
    return {"wx": x_rows.T @ rows, "wh": h_rows.T @ rows, "b": _total(rows)}


def _rows(x):
    # -1 cannot be worked out beside a length of 0.
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _total(rows):
    # Added one by one in float32, 4096 equal rows lose two more digits.
    wide = np.promote_types(rows.dtype, np.float64)
    return rows.sum(axis=0, dtype=wide).astype(rows.dtype, copy=False)


def _orthogonal(rng: np.random.Generator, n: int) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    # QR fixes signs by a rule; with R's diagonal positive, q is uniform.
    return q * np.sign(np.diag(r))


# --- at the door ------------------------------------------------------------------------------


def _checked(name: str, x: Any, wanted: tuple[int | str, ...], why: str = "") -> np.ndarray:
    x = as_float(name, x)
    check_shape(name, x, wanted, why)
    return x


def _weights(d: int, width: int, wx: Any, wh: Any, b: Any, gates: int, why: str):
    wx = _checked("wx", wx, (d, gates * width), why)
    wh = _checked("wh", wh, (width, gates * width), why)
    return wx, wh, _checked("b", b, (gates * width,), why)


def _step_inputs(x: Any, states: Mapping[str, Any], wx: Any, wh: Any, b: Any, gates: int):
    x = as_float("x", x)
    check_rank("x", x, "B D")
    return _inputs(x, states, wx, wh, b, gates)


def _sequence_inputs(x: Any, states: Mapping[str, Any], wx: Any, wh: Any, b: Any, gates: int):
    x = as_float("x", x)
    check_rank("x", x, "B T D")
    return _inputs(x, states, wx, wh, b, gates)


def _inputs(x: np.ndarray, states: Mapping[str, Any], wx: Any, wh: Any, b: Any, gates: int):
    """All as floats, after a look at every shape; the states' width is the first one's."""
    first, *_ = states
    shape: tuple[int | str, ...] = (x.shape[0], "H")
    checked = []
    for name, state in states.items():
        why = f"to match x {x.shape}" if name == first else f"to match {first} {shape}"
        checked.append(_checked(name, state, shape, why))
        shape = checked[0].shape
    why = f"to match x {x.shape} and {first} {shape}"
    weights = _weights(x.shape[-1], checked[0].shape[1], wx, wh, b, gates, why)
    return x, *checked, *weights


def _without_padding(x: np.ndarray, lengths: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """x with 0 in padding, and where that is: nothing there is read, be it NaN."""
    if lengths is None:
        return x, None
    lengths = np.asarray(lengths)
    check_shape("lengths", lengths, (x.shape[0],), f"to match x {x.shape}")
    if lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths: expected integers; got dtype {lengths.dtype}")
    if ((lengths < 0) | (lengths > x.shape[1])).any():
        raise ValueError(f"lengths: expected 0 … T = {x.shape[1]}, x {x.shape}; got {lengths}")
    held = np.arange(x.shape[1]) >= lengths[:, None]
    return np.where(held[..., None], 0, x), held


def _check_finite(**arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers; got NaN or inf among them")


def _to_torch(params: Weights, gates: int) -> dict[str, np.ndarray]:
    given = {name: as_float(name, np.asarray(value)) for name, value in params.items()}
    _check_names("params", given, PARAMETERS)
    wx, wh, b = (given[name] for name in PARAMETERS)
    check_rank("wx", wx, "D H" if gates == 1 else "D 4H")
    check_rank("wh", wh, "H H" if gates == 1 else "H 4H")
    wx, wh, b = _weights(wx.shape[0], wh.shape[0], wx, wh, b, gates, f"to match wh {wh.shape}")
    values = (wx.T.copy(), wh.T.copy(), b.copy(), np.zeros_like(b))
    return dict(zip(_TORCH_NAMES, values, strict=True))


def _from_torch(state: Weights, gates: int) -> dict[str, np.ndarray]:
    state = {name: as_float(name, np.asarray(value)) for name, value in state.items()}
    biased = bool({"bias_ih_l0", "bias_hh_l0"} & set(state))
    _check_names("state", state, _TORCH_NAMES if biased else _TORCH_NAMES[:2])
    check_rank("weight_ih_l0", state["weight_ih_l0"], "4H D" if gates == 4 else "H D")
    wh = state["weight_hh_l0"]
    check_rank("weight_hh_l0", wh, "4H H" if gates == 4 else "H H")
    d, tall, why = state["weight_ih_l0"].shape[1], gates * wh.shape[1], f"with H = {wh.shape[1]}"
    shapes = ((tall, d), (tall, wh.shape[1]), (tall,), (tall,))
    for name, shape in zip(_TORCH_NAMES, shapes, strict=True):
        if name in state:
            check_shape(name, state[name], shape, why)
    b = state["bias_ih_l0"] + state["bias_hh_l0"] if biased else np.zeros(tall, wh.dtype)
    return {"wx": state["weight_ih_l0"].T.copy(), "wh": wh.T.copy(), "b": b}


def _check_names(name: str, given: Weights, wanted: tuple[str, ...]) -> None:
    if set(given) != set(wanted):
        raise ValueError(f"{name}: expected {', '.join(wanted)}; got {', '.join(given)}")


def _rnn_cached(
    x: Float[np.ndarray, "B T D"],
    h0: Float[np.ndarray, "B H"],
    wx: Float[np.ndarray, "D H"],
    wh: Float[np.ndarray, "H H"],
    h_all: Float[np.ndarray, "T B H"],
    held: Bool[np.ndarray, "B T"] | None,
) -> RNNCache:
    # jaxtyping checks a function's arguments, not a NamedTuple's fields.
    return RNNCache(x, h0, wx, wh, h_all.swapaxes(0, 1), held)


def _lstm_cached(
    x: Float[np.ndarray, "B T D"],
    h0: Float[np.ndarray, "B H"],
    c0: Float[np.ndarray, "B H"],
    wx: Float[np.ndarray, "D H4"],
    wh: Float[np.ndarray, "H H4"],
    gates: Float[np.ndarray, "T B H4"],
    c_all: Float[np.ndarray, "T B H"],
    tanh_c: Float[np.ndarray, "T B H"],
    h_all: Float[np.ndarray, "T B H"],
    held: Bool[np.ndarray, "B T"] | None,
) -> LSTMCache:
    gates, c_all, tanh_c, h_all = (a.swapaxes(0, 1) for a in (gates, c_all, tanh_c, h_all))
    return LSTMCache(x, h0, c0, wx, wh, gates, c_all, tanh_c, h_all, held)
