"""RNN and LSTM, through time, against torch, finite differences and each other."""

import inspect
import typing
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generators, strided
from torch import nn

from attn_lessons import recurrent as library
from attn_lessons.gradcheck import numerical_vjp
from attn_lessons.recurrent import (
    from_torch_lstm,
    from_torch_rnn,
    gradient_norm_by_lag,
    init_lstm,
    init_rnn,
    lstm_backward,
    lstm_backward_cached,
    lstm_forward,
    lstm_gradient_norm_by_lag,
    lstm_step_backward,
    lstm_step_forward,
    rnn_backward,
    rnn_backward_cached,
    rnn_forward,
    rnn_step_backward,
    rnn_step_forward,
    to_torch_lstm,
    to_torch_rnn,
)

EXACT = 1e-10
MEASURED = 1e-8
NAMES = library.PARAMETERS
KINDS = ("rnn", "lstm")
each_kind = pytest.mark.parametrize("kind", KINDS)
GATES_OF = {"rnn": 1, "lstm": 4}


def largest(x):
    return np.abs(x).max(initial=0)


def agree(got, want, rtol=EXACT, beside=0.0):
    """An error of at most ``rtol`` of the largest entry wanted, or of ``beside``."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale = max(largest(want), beside)
    assert largest(got - want) <= rtol * scale, f"off by {largest(got - want):.3g} of {scale:.3g}"


def all_agree(got, want, rtol=EXACT, beside=0.0):
    assert got.keys() == want.keys()
    for name in want:
        agree(got[name], want[name], rtol, beside)


def tensor(x, **options):
    return torch.tensor(np.array(x, order="C"), **options)


# --- inputs and oracles ---------------------------------------------------------------------------


def problem(kind, rng, b=2, t=5, d=3, h=4, scale=1.0, dtype=np.float64):
    """Upstream gradients and arguments by name, no weight like another."""
    tall, states = GATES_OF[kind] * h, ("h0", "c0")[: 1 + (kind == "lstm")]
    shapes = {"x": (b, t, d)} | {s: (b, h) for s in states}
    shapes |= {"wx": (d, tall), "wh": (h, tall), "b": (tall,)}
    given = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    given |= {"wx": scale * given["wx"] * max(d, 1) ** -0.5}
    given |= {"wh": scale * given["wh"] * max(h, 1) ** -0.5}
    up = {"dh_all": rng.normal(size=(b, t, h))}
    if kind == "lstm":
        up["dc_last"] = rng.normal(size=(b, h))
    return tuple({k: v.astype(dtype) for k, v in part.items()} for part in (up, given))


def forward(kind, given, **options):
    """h_all, and for the LSTM c_last too: what the upstream gradients belong to."""
    if kind == "rnn":
        return (rnn_forward(**given, **options)[0],)
    return lstm_forward(**given, **options)[:2]


def backward(kind, up, given, **options):
    """Every gradient by its argument's name."""
    if kind == "rnn":
        dx, dh0, grads = rnn_backward(up["dh_all"], **given, **options)
        return {"x": dx, "h0": dh0, **grads}
    dx, dh0, dc0, grads = lstm_backward(up["dh_all"], **given, dc_last=up["dc_last"], **options)
    return {"x": dx, "h0": dh0, "c0": dc0, **grads}


def torch_loop(kind, given, lengths=None, truncate=None):
    """The equations step by step in torch: states after every step, and the last cell."""
    x, h, wx, wh, b = (given[n] for n in ("x", "h0", "wx", "wh", "b"))
    c, out = given.get("c0"), []
    for t in range(x.shape[1]):
        if truncate and t and t % truncate == 0:
            h, c = h.detach(), c if c is None else c.detach()
        z = x[:, t] @ wx + h @ wh + b
        if kind == "rnn":
            new, new_c = torch.tanh(z), c
        else:
            i, f, g, o = z.chunk(4, -1)
            new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            new = torch.sigmoid(o) * torch.tanh(new_c)
        if lengths is None:
            h, c = new, new_c
        else:
            on = (t < tensor(lengths))[:, None]
            h, c = torch.where(on, new, h), c if c is None else torch.where(on, new_c, c)
        out.append(h)
    h_all = torch.stack(out, 1)
    return (h_all,) if kind == "rnn" else (h_all, c)


def by_torch(kind, up, given, **options):
    """Outputs and all gradients by autograd."""
    leaves = {n: tensor(a, requires_grad=True) for n, a in given.items()}
    out = torch_loop(kind, leaves, **options)
    sum((o * tensor(u)).sum() for o, u in zip(out, up.values(), strict=True)).backward()
    # A state that was only detached has no gradient at all.
    grads = {n: np.zeros(a.shape) if a.grad is None else a.grad.numpy() for n, a in leaves.items()}
    return [o.detach().numpy() for o in out], grads


def module(kind, given):
    """torch's own layer with these weights."""
    d, tall = given["wx"].shape
    make, to_torch = {"rnn": (nn.RNN, to_torch_rnn), "lstm": (nn.LSTM, to_torch_lstm)}[kind]
    layer = make(d, tall // GATES_OF[kind], batch_first=True).to(tensor(given["wx"]).dtype)
    state = to_torch({n: given[n] for n in NAMES})
    layer.load_state_dict({n: tensor(a) for n, a in state.items()})
    return layer


def by_module(kind, up, given, lengths=None):
    """Outputs and all gradients of nn.RNN and nn.LSTM, packed where there are lengths."""
    layer = module(kind, given)
    x, *states = (tensor(given[n], requires_grad=True) for n in given if n in ("x", "h0", "c0"))
    first = [s[None] for s in states]
    start = first[0] if kind == "rnn" else tuple(first)
    if lengths is None:
        h_all, last = layer(x, start)
    else:
        pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
        packed = pack(x, tensor(lengths), batch_first=True, enforce_sorted=False)
        h_all, last = layer(packed, start)
        h_all, _ = pad(h_all, batch_first=True, total_length=x.shape[1])
    loss = (h_all * tensor(up["dh_all"])).sum()
    if kind == "lstm":
        loss = loss + (last[1][0] * tensor(up["dc_last"])).sum()
    loss.backward()
    grads = {n: leaf.grad.numpy() for n, leaf in zip(("x", "h0", "c0"), (x, *states), strict=False)}
    grads |= {"wx": layer.weight_ih_l0.grad.numpy().T, "wh": layer.weight_hh_l0.grad.numpy().T}
    grads["b"] = layer.bias_ih_l0.grad.numpy()
    agree(grads["b"], layer.bias_hh_l0.grad.numpy(), 1e-13)
    last = [s[0].detach().numpy() for s in (last if kind == "lstm" else (last,))]
    return h_all.detach().numpy(), last, grads


@st.composite
def problems(draw, kind, scales=(0.3, 1.0, 3.0)):
    """Lengths of B, T, D and H from 1 to 7, no two alike, in any memory layout."""
    b, t, d, h = draw(st.permutations(range(1, 8)))[:4]
    scale = draw(st.sampled_from(scales))
    parts = problem(kind, draw(generators()), b, t, d, h, scale)
    return tuple({n: draw(strided(a)) for n, a in part.items()} for part in parts)


@st.composite
def problems_with_lengths(draw, kind, least=0):
    up, given = draw(problems(kind))
    b, t, _ = given["x"].shape
    lengths = draw(st.lists(st.integers(least, t), min_size=b, max_size=b))
    return up, given, np.array(lengths)


# --- one step -------------------------------------------------------------------------------------


@each_kind
@given(data=st.data())
def test_a_step_equals_torch(kind, data):
    up, given = data.draw(problems(kind))
    given = given | {"x": given["x"][:, :1]}
    up = up | {"dh_all": up["dh_all"][:, :1]}
    want, grads = by_torch(kind, up, given)
    x, *rest = given.values()
    if kind == "rnn":
        agree(rnn_step_forward(x[:, 0], *rest), want[0][:, 0])
        dx, dh, got = rnn_step_backward(up["dh_all"][:, 0], x[:, 0], *rest)
        all_agree({"x": dx[:, None], "h0": dh, **got}, grads)
        return
    h, c = lstm_step_forward(x[:, 0], *rest)
    agree(h, want[0][:, 0])
    agree(c, want[1])
    dx, dh, dc, got = lstm_step_backward(up["dh_all"][:, 0], up["dc_last"], x[:, 0], *rest)
    all_agree({"x": dx[:, None], "h0": dh, "c0": dc, **got}, grads)


@each_kind
def test_a_step_equals_the_cell_of_torch(kind):
    _, given = problem(kind, np.random.default_rng(5))
    cell = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell}[kind](3, 4).double()
    state = {"rnn": to_torch_rnn, "lstm": to_torch_lstm}[kind]({n: given[n] for n in NAMES})
    cell.load_state_dict({n.removesuffix("_l0"): tensor(a) for n, a in state.items()})
    x, *rest = given.values()
    with torch.no_grad():
        if kind == "rnn":
            agree(rnn_step_forward(x[:, 0], *rest), cell(tensor(x[:, 0]), tensor(given["h0"])))
        else:
            want = cell(tensor(x[:, 0]), (tensor(given["h0"]), tensor(given["c0"])))
            for got, theirs in zip(lstm_step_forward(x[:, 0], *rest), want, strict=True):
                agree(got, theirs)


@each_kind
def test_steps_one_after_the_other_are_the_sequence(kind):
    """What streaming relies on: the state is all that has to be kept."""
    _, given = problem(kind, np.random.default_rng(6), t=7)
    step = {"rnn": rnn_step_forward, "lstm": lstm_step_forward}[kind]
    x, states, weights = given["x"], [given["h0"]], [given[n] for n in NAMES]
    states += [given["c0"]] if kind == "lstm" else []
    h_all = forward(kind, given)[0]
    for t in range(7):
        states = step(x[:, t], *states, *weights)
        states = [states] if kind == "rnn" else states
        agree(states[0], h_all[:, t], 1e-14)
    if kind == "lstm":
        agree(states[1], forward(kind, given)[1], 1e-14)


def test_gates_stand_in_the_order_i_f_g_o():
    """Biases so large that gates are open or shut: the state follows by hand."""
    big, zero = 1e3, np.zeros((1, 1))
    for open_gate, want in {
        "igo": np.tanh(1.0),  # the candidate 1 enters an empty cell and is shown
        "fo": np.tanh(0.25),  # the old cell is kept and shown
        "ifgo": np.tanh(1.25),
        "ifg": 0.0,  # kept, added, and not shown
        "io": 0.0,  # the candidate is 0
    }.items():
        b = np.array([big if gate in open_gate else -big for gate in "ifgo"])
        b[2] = big if "g" in open_gate else 0
        h, _ = lstm_step_forward(zero, zero, zero + 0.25, np.zeros((1, 4)), np.zeros((1, 4)), b)
        assert h.item() == pytest.approx(want, abs=1e-15)


def test_a_step_backward_equals_finite_differences():
    for kind in KINDS:
        up, given = problem(kind, np.random.default_rng(7), t=1)
        x, *rest = given.values()
        given = dict(zip(given, (x[:, 0], *rest), strict=True))
        step = {"rnn": rnn_step_forward, "lstm": lstm_step_forward}[kind]
        ups = [up["dh_all"][:, 0], *list(up.values())[1:]]
        back = {"rnn": rnn_step_backward, "lstm": lstm_step_backward}[kind]
        *by_input, grads = back(*ups, *given.values())
        for name, got in zip(given, (*by_input, *grads.values()), strict=True):

            def moved(value, name=name, given=given, step=step):
                out = step(*(given | {name: value}).values())
                return np.concatenate(out if isinstance(out, tuple) else [out])

            agree(got, numerical_vjp(moved, given[name], np.concatenate(ups)), MEASURED)


# --- a sequence -----------------------------------------------------------------------------------


@each_kind
@given(data=st.data())
def test_through_time_equals_torch(kind, data):
    up, given = data.draw(problems(kind))
    want, grads = by_torch(kind, up, given)
    for got, theirs in zip(forward(kind, given), want, strict=True):
        agree(got, theirs)
    all_agree(backward(kind, up, given), grads)


@each_kind
@given(data=st.data())
def test_through_time_equals_the_module_of_torch(kind, data):
    up, given = data.draw(problems(kind))
    h_all, last, grads = by_module(kind, up, given)
    agree(forward(kind, given)[0], h_all)
    agree(forward(kind, given)[0][:, -1], last[0])
    if kind == "lstm":
        agree(forward(kind, given)[1], last[1])
    all_agree(backward(kind, up, given), grads)


@each_kind
@given(data=st.data())
def test_lengths_equal_torch(kind, data):
    up, given, lengths = data.draw(problems_with_lengths(kind))
    want, grads = by_torch(kind, up, given, lengths=lengths)
    for got, theirs in zip(forward(kind, given, lengths=lengths), want, strict=True):
        agree(got, theirs)
    all_agree(backward(kind, up, given, lengths=lengths), grads, beside=1e-3)


@each_kind
@given(data=st.data())
def test_lengths_equal_a_packed_sequence_of_torch(kind, data):
    """There, what lies behind a length is 0 and reads no gradient."""
    up, given, lengths = data.draw(problems_with_lengths(kind, least=1))
    real = np.arange(given["x"].shape[1]) < lengths[:, None]
    up = up | {"dh_all": up["dh_all"] * real[..., None]}
    h_all, last, grads = by_module(kind, up, given, lengths)
    ours = forward(kind, given, lengths=lengths)
    agree(ours[0] * real[..., None], h_all)
    agree(ours[0][:, -1], last[0])
    if kind == "lstm":
        agree(ours[1], last[1])
    all_agree(backward(kind, up, given, lengths=lengths), grads, beside=1e-3)


@each_kind
@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e300])
def test_padding_is_never_read(kind, fill):
    up, given = problem(kind, np.random.default_rng(8), b=3)
    lengths = np.array([5, 2, 0])
    real = np.arange(5) < lengths[:, None]
    other = given | {"x": np.where(real[..., None], given["x"], fill)}
    for got, want in zip(
        forward(kind, other, lengths=lengths), forward(kind, given, lengths=lengths), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    got = backward(kind, up, other, lengths=lengths)
    for name, want in backward(kind, up, given, lengths=lengths).items():
        np.testing.assert_array_equal(got[name], want)
    assert not got["x"][~real].any()
    assert got["x"][real].all()


@each_kind
def test_a_row_of_length_0_keeps_its_first_state(kind):
    up, given = problem(kind, np.random.default_rng(9))
    got = forward(kind, given, lengths=np.array([0, 5]))
    np.testing.assert_array_equal(got[0][0], np.broadcast_to(given["h0"][0], (5, 4)))
    grads = backward(kind, up, given, lengths=np.array([0, 5]))
    agree(grads["h0"][0], up["dh_all"][0].sum(axis=0), 1e-14)
    if kind == "lstm":
        np.testing.assert_array_equal(got[1][0], given["c0"][0])
        np.testing.assert_array_equal(grads["c0"][0], up["dc_last"][0])


@each_kind
def test_lengths_that_are_all_full_change_nothing(kind):
    up, given = problem(kind, np.random.default_rng(10))
    full = np.array([5, 5])
    for name, want in backward(kind, up, given).items():
        agree(backward(kind, up, given, lengths=full)[name], want, 1e-15)


@each_kind
@given(data=st.data(), truncate=st.integers(1, 8))
def test_truncation_equals_detaching_in_torch(kind, data, truncate):
    up, given, lengths = data.draw(problems_with_lengths(kind))
    for options in ({}, {"lengths": lengths}):
        _, grads = by_torch(kind, up, given, truncate=truncate, **options)
        got = backward(kind, up, given, truncate=truncate, **options)
        all_agree(got, grads, beside=1e-3)


@each_kind
def test_truncation_is_a_sum_over_pieces(kind):
    """Each piece by itself, started from the state before it: the same gradients."""
    up, given = problem(kind, np.random.default_rng(11), t=7)
    got = backward(kind, up, given, truncate=3)
    h_all = forward(kind, given)[0]
    cells = lstm_forward(**given)[2].c_all if kind == "lstm" else None
    total = {n: np.zeros(given[n].shape) for n in NAMES}
    for start in (0, 3, 6):
        here = slice(start, start + 3)
        piece = given | {"x": given["x"][:, here]}
        piece_up = {"dh_all": up["dh_all"][:, here]}
        if start:
            piece["h0"] = h_all[:, start - 1]
        if kind == "lstm":
            piece["c0"] = given["c0"] if start == 0 else cells[:, start - 1]
            piece_up["dc_last"] = up["dc_last"] * (start == 6)
        grads = backward(kind, piece_up, piece)
        agree(got["x"][:, here], grads["x"], 1e-13)
        total = {n: total[n] + grads[n] for n in NAMES}
        if start == 0:
            agree(got["h0"], grads["h0"], 1e-13)
    for name in NAMES:
        agree(got[name], total[name], 1e-13)


@each_kind
def test_truncation_beyond_the_end_changes_nothing(kind):
    up, given = problem(kind, np.random.default_rng(12))
    for far in (5, 6, 100):
        for name, want in backward(kind, up, given).items():
            np.testing.assert_array_equal(backward(kind, up, given, truncate=far)[name], want)
    shorter = backward(kind, up, given, truncate=4)
    assert largest(shorter["x"] - backward(kind, up, given)["x"]) > 1e-3


@each_kind
@pytest.mark.parametrize("lengths", [None, np.array([5, 2])])
def test_through_time_equals_finite_differences(kind, lengths):
    up, given = problem(kind, np.random.default_rng(13))
    grads = backward(kind, up, given, lengths=lengths)
    upstream = np.concatenate([u.ravel() for u in up.values()])
    for name, got in grads.items():

        def moved(value, name=name):
            out = forward(kind, given | {name: value}, lengths=lengths)
            return np.concatenate([o.ravel() for o in out])

        agree(got, numerical_vjp(moved, given[name], upstream), MEASURED)


@each_kind
def test_the_cached_backward_is_the_same(kind):
    up, given = problem(kind, np.random.default_rng(14))
    lengths = np.array([4, 5])
    if kind == "rnn":
        _, cache = rnn_forward(**given, lengths=lengths)
        dx, dh0, grads = rnn_backward_cached(up["dh_all"], cache, truncate=2)
        got = {"x": dx, "h0": dh0, **grads}
    else:
        _, _, cache = lstm_forward(**given, lengths=lengths)
        options = {"dc_last": up["dc_last"], "truncate": 2}
        dx, dh0, dc0, grads = lstm_backward_cached(up["dh_all"], cache, **options)
        got = {"x": dx, "h0": dh0, "c0": dc0, **grads}
    for name, want in backward(kind, up, given, lengths=lengths, truncate=2).items():
        np.testing.assert_array_equal(got[name], want)


def test_without_dc_last_nothing_reads_the_last_cell():
    up, given = problem("lstm", np.random.default_rng(15))
    zero = up | {"dc_last": np.zeros((2, 4))}
    *_, got = lstm_backward(up["dh_all"], **given)
    for name in NAMES:
        np.testing.assert_array_equal(got[name], backward("lstm", zero, given)[name])


@each_kind
def test_the_first_state_gets_a_gradient(kind):
    """A learned first state, shared by the batch: its gradient is the sum over rows."""
    up, given = problem(kind, np.random.default_rng(16), b=3)
    shared = tensor(given["h0"][0], requires_grad=True)
    leaves = {n: tensor(a) for n, a in given.items()} | {"h0": shared.expand(3, 4)}
    out = torch_loop(kind, leaves)
    sum((o * tensor(u)).sum() for o, u in zip(out, up.values(), strict=True)).backward()
    got = backward(kind, up, given | {"h0": np.tile(given["h0"][0], (3, 1))})
    agree(got["h0"].sum(axis=0), shared.grad.numpy())


@each_kind
@given(data=st.data())
def test_the_gradient_is_linear_in_the_upstream(kind, data):
    up, given = data.draw(problems(kind))
    doubled = backward(kind, {n: -2 * u for n, u in up.items()}, given)
    for name, got in backward(kind, up, given).items():
        agree(doubled[name], -2 * got, 1e-12)


@each_kind
@given(data=st.data())
def test_rows_know_nothing_of_each_other(kind, data):
    """A row by itself has the gradients it has in the batch; the weights' add up over rows."""
    up, given = data.draw(problems(kind))
    whole, total = backward(kind, up, given), {n: np.zeros(given[n].shape) for n in NAMES}
    for row in range(len(given["x"])):
        one = {n: a if n in NAMES else a[row : row + 1] for n, a in given.items()}
        grads = backward(kind, {n: u[row : row + 1] for n, u in up.items()}, one)
        for name in set(grads) - set(NAMES):
            agree(grads[name][0], whole[name][row], 1e-12, beside=1e-3)
        total = {n: total[n] + grads[n] for n in NAMES}
    all_agree(total, {n: whole[n] for n in NAMES}, 1e-12)


@each_kind
@given(data=st.data())
def test_the_future_gives_the_past_no_state_and_takes_no_gradient(kind, data):
    up, given = data.draw(problems(kind))
    t = data.draw(st.integers(0, given["x"].shape[1] - 1))
    later = given["x"].copy()
    later[:, t + 1 :] += 1
    before = forward(kind, given)[0][:, : t + 1]
    # The products over all steps may be blocked in another way.
    agree(forward(kind, given | {"x": later})[0][:, : t + 1], before, 1e-13)
    early = np.zeros(up["dh_all"].shape)
    early[:, : t + 1] = up["dh_all"][:, : t + 1]
    up = {n: early if n == "dh_all" else 0 * u for n, u in up.items()}
    assert not backward(kind, up, given)["x"][:, t + 1 :].any()


@each_kind
@given(data=st.data())
def test_memory_layout_does_not_matter(kind, data):
    up, given = data.draw(problems(kind))
    plain = [{n: np.ascontiguousarray(a) for n, a in part.items()} for part in (up, given)]
    for name, want in backward(kind, *plain).items():
        agree(backward(kind, up, given)[name], want, 1e-13)


# --- numbers that are awkward ---------------------------------------------------------------------


def adversarial(name, kind, rng):
    up, given = problem(kind, rng, b=4, t=12, d=5, h=6)
    if name == "gates at plus and minus 80":
        given["b"] = rng.choice([-80.0, 80.0], size=given["b"].shape)
        given |= {"wx": 0.1 * given["wx"], "wh": 0.1 * given["wh"]}
    elif name == "gates shut but not quite":
        given["b"] = given["b"] - 12
    elif name == "one input dominates":
        given["x"] = given["x"] * np.array([30.0, 0.01, 0.01, 0.01, 0.01])
    elif name == "all equal":
        given = {n: np.full(a.shape, 0.3) for n, a in given.items()}
    elif name == "strong recurrence":
        given["wh"] = 4 * given["wh"]
    return up, given


ADVERSARIAL = (
    "random",
    "gates at plus and minus 80",
    "gates shut but not quite",
    "one input dominates",
    "all equal",
    "strong recurrence",
)


@each_kind
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_float32_error_is_at_most_twice_torchs(kind, name):
    """Errors against float64, as root mean squares over five draws; ours beside torch's loop."""
    ours, theirs, floor = {}, {}, {}
    for seed in range(5):
        up, given = adversarial(name, kind, np.random.default_rng(seed))
        up, given = ({n: a.astype(np.float32) for n, a in part.items()} for part in (up, given))
        wide = [{n: a.astype(float) for n, a in part.items()} for part in (up, given)]
        exact = backward(kind, *wide) | dict(enumerate(forward(kind, wide[1])))
        got = backward(kind, up, given) | dict(enumerate(forward(kind, given)))
        out, grads = by_torch(kind, up, given)
        for key, want in exact.items():
            other = (grads | dict(enumerate(out)))[key]
            assert got[key].dtype == np.float32
            ours[key] = ours.get(key, 0) + ((got[key] - want) ** 2).sum()
            theirs[key] = theirs.get(key, 0) + ((other - want) ** 2).sum()
            # tanh' is made of h, which near 1 holds no more of it than its own last bit.
            size = max(largest(want), float(kind == "rnn"))
            unit = np.finfo(np.float32).eps * size
            floor[key] = floor.get(key, 0) + unit**2 * want.size
    for key in ours:
        assert ours[key] ** 0.5 <= 2 * theirs[key] ** 0.5 + floor[key] ** 0.5, key


def test_a_gate_far_shut_is_small_and_not_rounded_away():
    """At z = -40, σ is 4e-18: (1 + tanh(z/2))/2 would be 0."""
    zero, b = np.zeros((1, 1)), np.array([-40.0, -1e3, 20.0, 20.0])
    _, c = lstm_step_forward(zero, zero, zero, np.zeros((1, 4)), np.zeros((1, 4)), b)
    assert c.item() == pytest.approx(np.exp(-40.0), rel=1e-14)
    small = np.float32
    zero, b = zero.astype(small), np.array([-20, -80, 20, 20], small)
    weights = np.zeros((1, 4), small)
    _, c = lstm_step_forward(zero, zero, zero, weights, weights, b)
    assert c.item() == pytest.approx(np.exp(-20.0), rel=1e-6)


@each_kind
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype_stays(kind, dtype):
    up, given = problem(kind, np.random.default_rng(17), dtype=dtype)
    for out in (*forward(kind, given), *backward(kind, up, given).values()):
        assert out.dtype == dtype
    got = backward(kind, up, given, lengths=np.array([2, 5]), truncate=2)
    assert {g.dtype for g in got.values()} == {np.dtype(dtype)}


@each_kind
def test_one_float64_argument_makes_all_float64(kind):
    up, given = problem(kind, np.random.default_rng(17), dtype=np.float32)
    for name in given:
        mixed = given | {name: given[name].astype(float)}
        wide = {n: a.astype(float) for n, a in given.items()}
        for got, want in zip(forward(kind, mixed), forward(kind, wide), strict=True):
            assert got.dtype == np.float64, name
            agree(got, want, 1e-5)
        assert {g.dtype for g in backward(kind, up, mixed).values()} == {np.dtype(float)}


@each_kind
def test_integers_become_float64(kind):
    up, given = problem(kind, np.random.default_rng(18))
    whole = [{n: np.round(2 * a).astype(int) for n, a in part.items()} for part in (up, given)]
    floats = [{n: a.astype(float) for n, a in part.items()} for part in whole]
    for name, want in backward(kind, *floats).items():
        got = backward(kind, *whole)[name]
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)


@each_kind
@pytest.mark.parametrize("axis", ["b", "t", "d", "h"])
def test_axes_of_length_zero(kind, axis):
    up, given = problem(kind, np.random.default_rng(19), **{axis: 0})
    out = forward(kind, given)
    assert out[0].shape == up["dh_all"].shape
    got = backward(kind, up, given)
    assert {n: g.shape for n, g in got.items()} == {n: a.shape for n, a in given.items()}
    if axis == "t" and kind == "lstm":
        np.testing.assert_array_equal(out[1], given["c0"])
        np.testing.assert_array_equal(got["c0"], up["dc_last"])
    if axis in "tb":
        assert not any(got[n].any() for n in NAMES)


# --- gradient norm by lag -------------------------------------------------------------------------


def jacobian(function, state):
    return torch.autograd.functional.jacobian(function, tensor(state)).numpy()


@given(data=st.data())
@settings(max_examples=15)
def test_norm_by_lag_equals_a_jacobian_of_torch(data):
    _, given = data.draw(problems("rnn"))
    h_all = forward("rnn", given)[0]
    got = gradient_norm_by_lag(given["wh"], h_all)
    assert got.shape == h_all.shape[:2]
    n, weights = h_all.shape[1], {k: tensor(given[k]) for k in NAMES}
    for row in range(len(h_all)):
        for lag in range(n):
            x = tensor(given["x"][row : row + 1, n - lag :])

            def last(h, x=x):
                out = torch_loop("rnn", {"x": x, "h0": h[None], **weights})[0] if x.numel() else h
                return out.reshape(-1, len(h))[-1]

            want = np.linalg.norm(jacobian(last, h_all[row, n - 1 - lag]), 2)
            assert got[row, lag] == pytest.approx(want, rel=1e-10)
        np.testing.assert_allclose(gradient_norm_by_lag(given["wh"], h_all[row]), got[row], 1e-12)


@given(data=st.data())
@settings(max_examples=10)
def test_lstm_norms_by_lag_equal_a_jacobian_of_torch(data):
    _, given, lengths = data.draw(problems_with_lengths("lstm"))
    lengths = data.draw(st.sampled_from([None, lengths]))
    h_all, _, cache = lstm_forward(**given, lengths=lengths)
    norms = lstm_gradient_norm_by_lag(cache)
    (b, n, width), weights = h_all.shape, {k: tensor(given[k]) for k in NAMES}
    assert all(part.shape == (b, n) for part in norms)
    for row in range(b):
        kept = np.ones(width)
        for lag in range(n):
            start = n - 1 - lag
            left = None if lengths is None else np.maximum(lengths[row : row + 1] - start - 1, 0)

            def last(state, row=row, lag=lag, left=left):
                h, c = state[None, :width], state[None, width:]
                if lag:
                    x = tensor(given["x"][row : row + 1, n - lag :])
                    h, c = torch_loop("lstm", {"x": x, "h0": h, "c0": c, **weights}, left)
                    h = h[:, -1]
                return torch.cat([h, c], 1)[0]

            state = np.concatenate([h_all[row, start], cache.c_all[row, start]])
            want = jacobian(last, state)
            beside = 1e-12
            assert norms.full[row, lag] == pytest.approx(np.linalg.norm(want, 2), rel=1e-9)
            cell = np.linalg.norm(want[width:, width:], 2)
            assert norms.cell[row, lag] == pytest.approx(cell, rel=1e-9, abs=beside)
            assert norms.direct[row, lag] == pytest.approx(kept.max(), rel=1e-12)
            over = lengths is not None and start >= lengths[row]
            kept = kept * (1 if over else cache.gates[row, start, width : 2 * width])


def test_the_direct_path_is_not_the_whole_gradient():
    """diag(f) leaves out that the gates read h, which the cell made."""
    _, given = problem("lstm", np.random.default_rng(3), b=1, t=12, d=6, h=8)
    norms = lstm_gradient_norm_by_lag(lstm_forward(**given)[2])
    assert norms.cell[0, 1] == pytest.approx(norms.direct[0, 1], rel=1e-12)
    assert np.abs(norms.cell - norms.direct)[0, 2:].max() > 0.1 * norms.direct[0, 2]


def test_a_large_singular_value_need_not_explode():
    wh = np.triu(np.random.default_rng(0).normal(size=(4, 4)), 1)
    wh *= 11 / np.linalg.norm(wh, 2)
    norms = gradient_norm_by_lag(wh, np.zeros((7, 4)))
    assert norms[1] == pytest.approx(11)
    assert not norms[4:].any()


def test_norms_by_lag_of_a_rotation_stay_1_and_else_follow_powers():
    rng = np.random.default_rng(1)
    turn = init_rnn(rng, 3, 5)["wh"]
    still = np.zeros((400, 5))
    np.testing.assert_allclose(gradient_norm_by_lag(turn, still), 1, rtol=1e-12)
    np.testing.assert_allclose(
        gradient_norm_by_lag(0.5 * turn, still), 0.5 ** np.arange(400), rtol=1e-12
    )
    # 2^2000 overflows, 2^-2000 is 0: neither is NaN, and nothing raises.
    still = np.zeros((2001, 5))
    assert gradient_norm_by_lag(2 * turn, still)[-1] == np.inf
    assert gradient_norm_by_lag(0.5 * turn, still)[-1] == 0


def test_norms_by_lag_of_one_state_and_of_none():
    assert gradient_norm_by_lag(np.eye(3), np.zeros((1, 3))).tolist() == [1]
    assert gradient_norm_by_lag(np.eye(3), np.zeros((2, 0, 3))).shape == (2, 0)
    _, given = problem("lstm", np.random.default_rng(0), t=0)
    assert lstm_gradient_norm_by_lag(lstm_forward(**given)[2]).full.shape == (2, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norms_by_lag_keep_their_dtype(dtype):
    _, given = problem("rnn", np.random.default_rng(2), dtype=dtype)
    assert gradient_norm_by_lag(given["wh"], forward("rnn", given)[0]).dtype == dtype
    _, given = problem("lstm", np.random.default_rng(2), dtype=dtype)
    norms = lstm_gradient_norm_by_lag(lstm_forward(**given)[2])
    assert {part.dtype for part in norms} == {np.dtype(dtype)}


# --- torch's layout and initial weights -----------------------------------------------------------


@each_kind
@given(data=st.data())
def test_weights_go_to_torch_and_back(kind, data):
    _, given = data.draw(problems(kind))
    params = {n: given[n] for n in NAMES}
    to, back = {"rnn": (to_torch_rnn, from_torch_rnn), "lstm": (to_torch_lstm, from_torch_lstm)}[
        kind
    ]
    got = back(to(params))
    assert tuple(got) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(got[name], params[name])
        assert not np.shares_memory(got[name], params[name])


@each_kind
@pytest.mark.parametrize("bias", [True, False])
def test_both_biases_of_torch_count(kind, bias):
    """pytorch#750: two biases, of which code ported with one forgets the other."""
    torch.manual_seed(0)
    layer = {"rnn": nn.RNN, "lstm": nn.LSTM}[kind](3, 4, batch_first=True, bias=bias).double()
    state = layer.state_dict()
    params = {"rnn": from_torch_rnn, "lstm": from_torch_lstm}[kind](state)
    _, given = problem(kind, np.random.default_rng(20))
    given |= params
    x, *states = (tensor(given[n])[None] for n in ("x", "h0", "c0") if n in given)
    start = states[0] if kind == "rnn" else tuple(states)
    with torch.no_grad():
        want = layer(x[0], start)[0].numpy()
    agree(forward(kind, given)[0], want)
    if bias:
        one = given | {"b": state["bias_ih_l0"].numpy()}
        assert largest(forward(kind, one)[0] - want) > 0.01


@each_kind
def test_each_bias_of_torch_gets_the_whole_gradient(kind):
    """One step of SGD moves their sum twice as far as our one bias."""
    up, given = problem(kind, np.random.default_rng(21))
    layer = module(kind, given)
    x, *states = (tensor(given[n]) for n in ("x", "h0", "c0") if n in given)
    start = states[0][None] if kind == "rnn" else tuple(s[None] for s in states)
    up = up | {n: 0 * u for n, u in up.items() if n != "dh_all"}
    (layer(x, start)[0] * tensor(up["dh_all"])).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    moved = {"rnn": from_torch_rnn, "lstm": from_torch_lstm}[kind](layer.state_dict())["b"]
    agree(moved, given["b"] - 2 * 0.1 * backward(kind, up, given)["b"])


def test_first_weights_are_what_they_say():
    rng = np.random.default_rng(22)
    rnn, lstm = init_rnn(rng, 200, 30), init_lstm(rng, 200, 30, forget_bias=1.5)
    np.testing.assert_allclose(rnn["wh"] @ rnn["wh"].T, np.eye(30), atol=1e-13)
    for gate in np.split(lstm["wh"], 4, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(30), atol=1e-13)
    for params, tall in ((rnn, 30), (lstm, 120)):
        assert params["wx"].shape == (200, tall)
        assert params["wx"].std() == pytest.approx(200**-0.5, rel=0.05)
    assert not rnn["b"].any()
    np.testing.assert_array_equal(lstm["b"], np.repeat([0, 1.5, 0, 0], 30))
    np.testing.assert_array_equal(init_lstm(rng, 2, 3)["b"], np.repeat([0, 1, 0, 0], 3))
    again = init_rnn(np.random.default_rng(22), 200, 30)
    np.testing.assert_array_equal(again["wh"], rnn["wh"])
    assert init_rnn(rng, 1, 1)["wh"].shape == (1, 1)


def test_first_recurrent_weights_turn_either_way():
    """QR alone would fix the signs: half of the rotations would never be drawn."""
    rng = np.random.default_rng(23)
    entries = np.array([init_rnn(rng, 1, 3)["wh"][0, 0] for _ in range(300)])
    assert 0.4 < (entries > 0).mean() < 0.6
    assert {np.sign(np.linalg.det(init_rnn(rng, 1, 3)["wh"])) for _ in range(20)} == {-1, 1}


# --- public failures ------------------------------------------------------------------------------


def test_every_gate_has_its_own_slope_and_partner():
    """Neuron#181 mixes gates' derivatives up; equal weights would not show it.

    One gate's upstream at a time, by the definition of each: only its own columns get a gradient.
    """
    up, given = problem("lstm", np.random.default_rng(24), t=1)
    x, h, c, wx, wh, b = given["x"][:, 0], *list(given.values())[1:]
    dh, dc = up["dh_all"][:, 0], up["dc_last"]
    *_, grads = lstm_step_backward(dh, dc, x, h, c, wx, wh, b)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    zi, zf, zg, zo = np.split(x @ wx + h @ wh + b, 4, axis=-1)
    i, f, g, o = sigmoid(zi), sigmoid(zf), np.tanh(zg), sigmoid(zo)
    new = np.tanh(f * c + i * g)
    dc = dc + dh * o * (1 - new**2)
    want = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * new * o * (1 - o)]
    for got, dz in zip(np.split(grads["b"], 4), want, strict=True):
        agree(got, dz.sum(axis=0), 1e-12)


def test_swapped_gates_are_seen_with_distinct_weights_only():
    """Popular tests with equal weights pass any order of the gates."""
    _, given = problem("lstm", np.random.default_rng(25))
    swapped = given | {
        n: np.concatenate([np.split(given[n], 4, axis=-1)[k] for k in (1, 0, 2, 3)], axis=-1)
        for n in NAMES
    }
    assert largest(forward("lstm", given)[0] - forward("lstm", swapped)[0]) > 0.05


# --- inputs and errors ----------------------------------------------------------------------------


def calls(dtype=np.float64):
    rng = np.random.default_rng(1)
    rnn_up, rnn = problem("rnn", rng, dtype=dtype)
    lstm_up, lstm = problem("lstm", rng, dtype=dtype)
    rnn_step = (rnn["x"][:, 0], *list(rnn.values())[1:])
    lstm_step = (lstm["x"][:, 0], *list(lstm.values())[1:])
    h_all, rnn_cache = rnn_forward(**rnn)
    lstm_cache = lstm_forward(**lstm)[2]
    params = [{n: given[n] for n in NAMES} for given in (rnn, lstm)]
    return {
        rnn_step_forward: rnn_step,
        rnn_step_backward: (rnn_up["dh_all"][:, 0], *rnn_step),
        rnn_forward: tuple(rnn.values()),
        rnn_backward: (rnn_up["dh_all"], *rnn.values()),
        rnn_backward_cached: (rnn_up["dh_all"], rnn_cache),
        lstm_step_forward: lstm_step,
        lstm_step_backward: (lstm_up["dh_all"][:, 0], lstm_up["dc_last"], *lstm_step),
        lstm_forward: tuple(lstm.values()),
        lstm_backward: (lstm_up["dh_all"], *lstm.values()),
        lstm_backward_cached: (lstm_up["dh_all"], lstm_cache),
        gradient_norm_by_lag: (rnn["wh"], h_all),
        lstm_gradient_norm_by_lag: (lstm_cache,),
        to_torch_rnn: (params[0],),
        from_torch_rnn: (to_torch_rnn(params[0]),),
        to_torch_lstm: (params[1],),
        from_torch_lstm: (to_torch_lstm(params[1]),),
        init_rnn: (np.random.default_rng(0), 3, 4),
        init_lstm: (np.random.default_rng(0), 3, 4),
    }


def arrays_in(value, into_caches=True):
    """All arrays in nested tuples and dicts; a cache's too, if asked."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    elif isinstance(value, library.RNNCache | library.LSTMCache) and not into_caches:
        return []
    if isinstance(value, tuple):
        return [a for part in value for a in arrays_in(part, into_caches)]
    return []


@pytest.mark.parametrize("function", calls())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inputs_may_be_read_only_and_are_never_returned(function, dtype):
    if function in (init_rnn, init_lstm):
        pytest.skip("takes no array")
    arguments = calls(dtype)[function]
    given = arrays_in(arguments)
    before = [a.copy() for a in given]
    for a in given:
        a.flags.writeable = False
    for result in arrays_in(function(*arguments), into_caches=False):
        assert result.dtype == dtype
        assert not any(np.shares_memory(result, a) for a in given)
    for a, same in zip(given, before, strict=True):
        np.testing.assert_array_equal(a, same)


@pytest.mark.parametrize("function", calls())
def test_nothing_depends_on_the_callers_error_state(function):
    arguments = calls()[function]
    quiet = function(*arguments)
    if function in (init_rnn, init_lstm):
        arguments = calls()[function]
    with np.errstate(all="raise"):
        loud = function(*arguments)
    for got, want in zip(arrays_in(loud), arrays_in(quiet), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_shut_gate_warns_nobody():
    given = calls()[lstm_step_forward]
    with np.errstate(all="raise"):
        h, c = lstm_step_forward(*given[:-1], np.full(16, -1e4))
    assert not h.any()
    assert not c.any()


R = dict(zip(("x", "h0", "wx", "wh", "b"), calls()[rnn_forward], strict=True))
L = dict(zip(("x", "h0", "c0", "wx", "wh", "b"), calls()[lstm_forward], strict=True))
RNN_CACHE, LSTM_CACHE = rnn_forward(**R)[1], lstm_forward(**L)[2]
RP, LP = ({n: given[n] for n in NAMES} for given in (R, L))
ONES = np.ones
BAD = [
    (rnn_step_forward, (ONES(3), *list(R.values())[1:]), r"x: expected shape \(B, D\); got \(3,\)"),
    (rnn_step_forward, (ONES((3, 3)), *list(R.values())[1:]), r"h: .*\(3, H\) to match x \(3, 3\)"),
    (rnn_forward, R | {"x": ONES((2, 3))}, r"x: expected shape \(B, T, D\); got \(2, 3\)"),
    (rnn_forward, R | {"x": 1j * R["x"]}, "x: expected real numbers; got dtype complex128"),
    (rnn_forward, R | {"h0": ONES((3, 4))}, r"h0: expected shape \(2, H\) to match x \(2, 5, 3\)"),
    (
        rnn_forward,
        R | {"wx": R["wx"].T},
        r"wx: expected shape \(3, 4\) to match x \(2, 5, 3\) and h0 \(2, 4\); got \(4, 3\)",
    ),
    (rnn_forward, R | {"wh": ONES((4, 5))}, r"wh: expected shape \(4, 4\) .*; got \(4, 5\)"),
    (rnn_forward, R | {"b": ONES(3)}, r"b: expected shape \(4,\) .*; got \(3,\)"),
    (rnn_forward, R | {"lengths": np.array([1])}, r"lengths: expected shape \(2,\) to match x"),
    (rnn_forward, R | {"lengths": np.array([1, 6])}, r"lengths: expected 0 … T = 5, x .*got \[1 6"),
    (rnn_forward, R | {"lengths": np.array([-1, 5])}, r"lengths: expected 0 … T = 5.*got \[-1  5"),
    (rnn_forward, R | {"lengths": np.array([1.0, 5])}, "lengths: expected integers; got dtype fl"),
    (rnn_backward, {"dh_all": R["x"]} | R, r"dh_all: .*\(2, 5, 4\) to match h_all .*\(2, 5, 3\)"),
    (rnn_backward, {"dh_all": ONES((2, 5, 4)), "truncate": 0} | R, "truncate: expected at least 1"),
    (
        rnn_backward_cached,
        {"dh_all": ONES((2, 5, 4)), "cache": RNN_CACHE, "truncate": 1.5},
        "truncate: expected an integer; got 1.5",
    ),
    (rnn_step_backward, (ONES((2, 3)), R["x"][:, 0], *list(R.values())[1:]), r"dh_next: .*\(2, 4"),
    (
        lstm_forward,
        L | {"c0": ONES((2, 5))},
        r"c0: expected shape \(2, 4\) to match h0 \(2, 4\); got \(2, 5\)",
    ),
    (lstm_forward, L | {"wx": ONES((3, 4))}, r"wx: expected shape \(3, 16\) to match x .*\(3, 4\)"),
    (lstm_forward, L | {"wh": ONES((4, 12))}, r"wh: expected shape \(4, 16\) .*; got \(4, 12\)"),
    (lstm_forward, L | {"b": ONES(4)}, r"b: expected shape \(16,\) .*; got \(4,\)"),
    (lstm_forward, L | {"lengths": np.array([5, 9])}, "lengths: expected 0 … T = 5"),
    (lstm_step_forward, tuple(L.values()), r"x: expected shape \(B, D\); got \(2, 5, 3\)"),
    (
        lstm_step_backward,
        (ONES((2, 4)), ONES((2, 3)), L["x"][:, 0], *list(L.values())[1:]),
        r"dc: expected shape \(2, 4\) to match h \(2, 4\); got \(2, 3\)",
    ),
    (
        lstm_backward,
        {"dh_all": ONES((2, 4, 4))} | L,
        r"dh_all: expected shape \(2, 5, 4\) to match",
    ),
    (
        lstm_backward_cached,
        {"dh_all": ONES((2, 5, 4)), "cache": LSTM_CACHE, "dc_last": ONES(4)},
        r"dc_last: expected shape \(2, 4\) to match c0 \(2, 4\); got \(4,\)",
    ),
    (
        lstm_backward_cached,
        {"dh_all": ONES((2, 5, 4)), "cache": LSTM_CACHE, "truncate": -1},
        "truncate: expected at least 1; got -1",
    ),
    (
        rnn_backward,
        {"dh_all": ONES((2, 1, 4)), "truncate": 0} | R | {"x": ONES((2, 1, 3))},
        "truncate: expected at least 1; got 0",
    ),
    (gradient_norm_by_lag, (np.eye(3), ONES(3)), r"h_all: .*\(T, H\) or \(B, T, H\); got \(3,\)"),
    (gradient_norm_by_lag, (np.eye(4), ONES((2, 3))), r"wh: .*\(3, 3\) to match h_all \(2, 3\)"),
    (gradient_norm_by_lag, (np.nan * np.eye(3), ONES((2, 3))), "wh: expected finite numbers; got"),
    (gradient_norm_by_lag, (np.eye(3), np.inf * ONES((2, 3))), "h_all: expected finite numbers"),
    (
        lstm_gradient_norm_by_lag,
        (LSTM_CACHE._replace(gates=np.nan * LSTM_CACHE.gates),),
        "gates: expected finite numbers",
    ),
    (to_torch_rnn, ({"wx": R["wx"]},), "params: expected wx, wh, b; got wx"),
    (to_torch_rnn, (LP,), r"wx: expected shape \(3, 4\) to match wh \(4, 16\); got \(3, 16\)"),
    (to_torch_lstm, (RP,), r"wx: expected shape \(3, 16\) to match wh \(4, 4\); got \(3, 4\)"),
    (to_torch_lstm, (LP | {"wx": ONES(3)},), r"wx: expected shape \(D, 4H\); got \(3,\)"),
    (
        from_torch_lstm,
        (to_torch_lstm(LP) | {"weight_ih_l1": ONES((16, 4))},),
        "state: expected weight_ih_l0, .*; got .*weight_ih_l1",
    ),
    (
        from_torch_lstm,
        ({k: v for k, v in to_torch_lstm(LP).items() if k != "bias_hh_l0"},),
        "state: expected weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0; got",
    ),
    (
        from_torch_lstm,
        (to_torch_rnn(RP),),
        r"weight_ih_l0: expected shape \(16, 3\) with H = 4; got \(4, 3\)",
    ),
    (
        from_torch_rnn,
        (to_torch_lstm(LP),),
        r"weight_ih_l0: expected shape \(4, 3\) with H = 4; got \(16, 3\)",
    ),
    (
        from_torch_rnn,
        (to_torch_rnn(RP) | {"bias_hh_l0": ONES(3)},),
        r"bias_hh_l0: expected shape \(4,\) with H = 4; got \(3,\)",
    ),
    (init_rnn, (np.random.default_rng(0), 0, 3), "d_in: expected at least 1; got 0"),
    (init_rnn, (np.random.default_rng(0), 3, 0), "d_hidden: expected at least 1; got 0"),
    (init_lstm, (np.random.default_rng(0), 3, 2.5), "d_hidden: expected an integer; got 2.5"),
    (
        partial(init_lstm, forget_bias=np.inf),
        (np.random.default_rng(0), 3, 2),
        "forget_bias: expected a finite number; got inf",
    ),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_bad_input_is_named(function, arguments, message):
    named = isinstance(arguments, dict)
    call = partial(function, **arguments) if named else partial(function, *arguments)
    with pytest.raises(ValueError, match=message):
        call()


def test_shapes_are_checked_at_run_time_here():
    with pytest.raises(jaxtyping.TypeCheckError):
        rnn_forward(**R | {"wh": ONES((4, 5))})
    with pytest.raises(jaxtyping.TypeCheckError):
        lstm_forward(**L | {"c0": ONES((2, 5))})
    with pytest.raises(jaxtyping.TypeCheckError):
        library._rnn_cached(*[ONES((2, 3))] * 5, None)
    with pytest.raises(jaxtyping.TypeCheckError):
        library._lstm_cached(*[ONES((2, 3))] * 9, None)


@pytest.mark.parametrize("function", calls())
def test_every_function_states_equation_shapes_and_errors(function):
    doc = inspect.getdoc(function)
    assert ".. math::" in doc
    assert "Shapes:" in doc
    assert "ValueError:" in doc
    assert "Source:" in doc
    hints = typing.get_type_hints(function)
    assert set(hints) == {*inspect.signature(function).parameters, "return"}


def test_everything_public_is_tried_here():
    public = {
        f
        for n, f in vars(library).items()
        if inspect.isfunction(f) and f.__module__ == library.__name__ and not n.startswith("_")
    }
    assert public == set(calls())
