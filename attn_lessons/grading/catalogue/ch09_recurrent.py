"""Chapter 9: RNN and LSTM backward through time, one LSTM step, gradient norm by lag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from attn_lessons import recurrent as library
from attn_lessons.grading.catalogue._parts import (
    left_factor,
    named,
    quiet,
    right_factor,
    scattered,
)
from attn_lessons.grading.exercise import Case, Exercise, Intermediate, Mistake
from attn_lessons.grading.relations import carried

CHAPTER = "ch09_recurrent"
SHAPES = f"{CHAPTER}.html#ch09-shapes"
RNN = f"{CHAPTER}.html#ch09-rnn"
BPTT = f"{CHAPTER}.html#ch09-bptt"
OVERWRITTEN = f"{CHAPTER}.html#ch09-overwritten"
LSTM = f"{CHAPTER}.html#ch09-lstm"
GATES = f"{CHAPTER}.html#ch09-gates"
LSTM_BACKWARD = f"{CHAPTER}.html#ch09-lstm-backward"
PATHS = f"{CHAPTER}.html#ch09-paths"
LAG = f"{CHAPTER}.html#ch09-lag"
WRONG = f"{CHAPTER}.html#ch09-wrong"
TORCH = f"{CHAPTER}.html#ch09-torch"

NAMES = library.PARAMETERS

Array = np.ndarray
Rng = np.random.Generator
Answer = Callable[..., Any]


# --- inputs -----------------------------------------------------------------------------------


def _weights(rng: Rng, d: int, h: int, gates: int) -> tuple[Array, Array, Array]:
    """Columns of a size at which neither tanh nor a gate is saturated, no gate like another."""
    wx, wh = rng.normal(size=(d, gates * h)), rng.normal(size=(h, gates * h))
    return 0.8 * wx / d**0.5, 1.2 * wh / h**0.5, 0.5 * rng.normal(size=gates * h)


def _rnn_call(rng: Rng, b: int, t: int, d: int, h: int) -> tuple[Array, ...]:
    dh_all, x, h0 = (rng.normal(size=size) for size in ((b, t, h), (b, t, d), (b, h)))
    return (dh_all, x, np.tanh(h0), *_weights(rng, d, h, 1))


def _only(dh_all: Array, *steps: int) -> Array:
    kept = np.zeros_like(dh_all)
    kept[:, list(steps)] = dh_all[:, list(steps)]
    return kept


def _rnn_cases(rng: Rng) -> list[Case]:
    def call(b: int, t: int, d: int, h: int) -> tuple[Array, ...]:
        return _rnn_call(rng, b, t, d, h)

    last, first, strong, shut = (list(call(2, 4, 5, 3)) for _ in range(4))
    last[0], first[0] = _only(last[0], -1), _only(first[0], 0)
    strong[4] = 2.5 * strong[4]
    shut[5] = 4.0 * rng.choice([-1, 1], 3)
    return [
        Case("one step", call(2, 1, 4, 3), hint="T = 1: nothing is carried, h0 gets a gradient."),
        Case("two steps", call(1, 2, 5, 3), hint="One row, two steps: one carry."),
        Case("a batch", call(2, 4, 5, 3), hint="B 2, T 4, D 5, H 3: all different."),
        Case("wider than its input", call(3, 4, 2, 5), hint="H = 5, D = 2."),
        Case("a long sequence", call(2, 12, 4, 3), hint="T = 12: errors of the carry add up."),
        Case(
            "loss at the last step only",
            tuple(last),
            hint="dh_all is 0 but at the last step: the earlier ones get what is carried.",
        ),
        Case(
            "loss at the first step only",
            tuple(first),
            hint="dh_all is 0 but at step 0: what comes later has no gradient.",
        ),
        Case("as wide as its input", call(2, 3, 4, 4), hint="D = H: wx and wh fit either way."),
        Case("all sizes alike", call(3, 3, 3, 3), hint="No shape will complain."),
        Case("one unit", call(2, 5, 4, 1), hint="H = 1."),
        Case("one input", call(2, 5, 1, 3), hint="D = 1."),
        Case("a strong recurrence", tuple(strong), hint="wh stretches: gradients grow or drown."),
        Case(
            "near saturation", tuple(shut), hint="The bias holds h near ±1, where tanh′ is small."
        ),
        Case(
            "not contiguous in memory",
            tuple(scattered(a) for a in call(2, 4, 5, 3)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            tuple(a.astype(np.float32) for a in call(2, 4, 5, 3)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _step_call(rng: Rng, b: int, d: int, h: int) -> tuple[Array, ...]:
    """x, h, c, wx, wh, b."""
    x, state, cell = (rng.normal(size=size) for size in ((b, d), (b, h), (b, h)))
    return (x, np.tanh(state), cell, *_weights(rng, d, h, 4))


def _step_cases(rng: Rng) -> list[Case]:
    def call(b: int, d: int, h: int) -> tuple[Array, ...]:
        return _step_call(rng, b, d, h)

    one = list(call(2, 4, 3))
    ends = list(call(2, 4, 3))
    ends[5] = 1000.0 * rng.choice([-1, 1], 12)
    ends[5][6:9] = rng.normal(size=3)  # with a candidate shut too, nothing would be left
    large, empty = list(call(2, 4, 3)), list(call(2, 4, 3))
    large[2] = 4 * large[2]
    empty[1], empty[2] = np.zeros((2, 3)), np.zeros((2, 3))
    return [
        Case("one row", call(1, 4, 3), hint="B = 1."),
        Case("a batch", tuple(one), hint="B 2, D 4, H 3: all different."),
        Case("a wide batch", call(5, 3, 2), hint="B 5, D 3, H 2."),
        Case("wider than its input", call(3, 2, 5), hint="H = 5, D = 2."),
        Case("as wide as its input", call(2, 4, 4), hint="D = H: wx and wh fit either way."),
        Case("all sizes alike", call(3, 3, 3), hint="No shape will complain."),
        Case("one unit", call(3, 5, 1), hint="H = 1: four columns, one a gate."),
        Case("one input", call(2, 1, 3), hint="D = 1."),
        Case("the first step", tuple(empty), hint="h and c are 0: there is nothing to forget."),
        Case("a large cell", tuple(large), hint="Entries of c well above 1: tanh bends them."),
        Case(
            "gates open or shut",
            tuple(ends),
            hint="The bias is ±1000: a gate is 0 or 1, and exp must not overflow into NaN.",
        ),
        Case(
            "not contiguous in memory",
            tuple(scattered(a) for a in call(3, 4, 2)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            tuple(a.astype(np.float32) for a in call(2, 4, 3)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _step_backward_cases(rng: Rng) -> list[Case]:
    cases = []
    for case in _step_cases(rng):
        if case.name == "gates open or shut":
            continue  # slopes of 0 and little else
        x, h = case.args[:2]
        dh, dc = (rng.normal(size=h.shape).astype(x.dtype) for _ in range(2))
        if case.name == "not contiguous in memory":
            dh, dc = scattered(dh), scattered(dc)
        cases.append(Case(case.name, (dh, dc, *case.args), hint=case.hint))
    given = _step_call(rng, 2, 4, 3)
    some = rng.normal(size=(2, 3))
    return [
        *cases,
        Case("dc is 0", (some, 0 * some, *given), hint="The last step: only h is read."),
        Case("dh is 0", (0 * some, some, *given), hint="Nobody reads h; the next step reads c."),
    ]


def _lstm_call(rng: Rng, b: int, t: int, d: int, h: int) -> tuple[Array, ...]:
    dh_all, x, h0, c0 = (rng.normal(size=size) for size in ((b, t, h), (b, t, d), (b, h), (b, h)))
    return (dh_all, x, np.tanh(h0), c0, *_weights(rng, d, h, 4))


def _lstm_cases(rng: Rng) -> list[Case]:
    def call(b: int, t: int, d: int, h: int) -> tuple[Array, ...]:
        return _lstm_call(rng, b, t, d, h)

    last, first = list(call(2, 4, 3, 2)), list(call(2, 4, 3, 2))
    last[0], first[0] = _only(last[0], -1), _only(first[0], 0)
    keeping = list(call(2, 7, 3, 2))
    keeping[6][2:4] += 3
    return [
        Case("one step", call(2, 1, 4, 3), hint="T = 1: nothing is carried, h0 and c0 get theirs."),
        Case("two steps", call(1, 2, 3, 2), hint="One row, two steps: one carry of each state."),
        Case("a batch", call(2, 4, 5, 3), hint="B 2, T 4, D 5, H 3: all different."),
        Case("wider than its input", call(3, 3, 2, 4), hint="H = 4, D = 2."),
        Case("a long sequence", call(2, 9, 3, 2), hint="T = 9: errors of the carry add up."),
        Case(
            "loss at the last step only",
            tuple(last),
            hint="dh_all is 0 but at the last step: the earlier ones get what is carried.",
        ),
        Case(
            "loss at the first step only",
            tuple(first),
            hint="dh_all is 0 but at step 0: what comes later has no gradient.",
        ),
        Case("a cell that keeps", tuple(keeping), hint="Forget gates near 1: c reaches far back."),
        Case("many inputs", call(2, 4, 9, 2), hint="D = 9, more than the 4H = 8 columns."),
        Case("as wide as its input", call(2, 3, 3, 3), hint="D = H: wx and wh fit either way."),
        Case("one unit", call(2, 5, 6, 1), hint="H = 1: four columns, one a gate."),
        Case("one input", call(2, 5, 1, 2), hint="D = 1."),
        Case(
            "not contiguous in memory",
            tuple(scattered(a) for a in call(2, 4, 3, 2)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            tuple(a.astype(np.float32) for a in call(2, 4, 3, 2)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _states(rng: Rng, t: int, h: int, size: float = 0.7) -> Array:
    return np.tanh(size * rng.normal(size=(t, h)))


def _square(rng: Rng, h: int, size: float = 1.0) -> Array:
    return size * rng.normal(size=(h, h)) / h**0.5


def _lag_cases(rng: Rng) -> list[Case]:
    nilpotent = np.triu(rng.normal(size=(3, 3)), 1)
    nilpotent *= 11 / np.linalg.norm(nilpotent, 2)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    return [
        Case("one step", (_square(rng, 3), _states(rng, 1, 3)), hint="T = 1: lag 0, norm 1."),
        Case("two steps", (_square(rng, 3), _states(rng, 2, 3)), hint="One factor."),
        Case("a sequence", (_square(rng, 4), _states(rng, 6, 4)), hint="T 6, H 4."),
        Case("as many steps as units", (_square(rng, 4), _states(rng, 4, 4)), hint="T = H."),
        Case(
            "one unit", (2 + rng.random((1, 1)), _states(rng, 5, 1)), hint="H = 1: plain factors."
        ),
        Case("two units", (_square(rng, 2, 1.5), _states(rng, 7, 2)), hint="H = 2."),
        Case(
            "a strong recurrence",
            (_square(rng, 3, 3.0), _states(rng, 8, 3, 0.3)),
            hint="The norm grows with the lag.",
        ),
        Case(
            "near saturation",
            (_square(rng, 3, 2.0), _states(rng, 6, 3, 2.0)),
            hint="Entries of h near ±1: most of the gradient is gone after a step.",
        ),
        Case(
            "a rotation",
            (turn, _states(rng, 9, 4, 0.4)),
            hint="wh stretches nothing: what is lost is lost in tanh′.",
        ),
        Case(
            "nilpotent",
            (nilpotent, _states(rng, 6, 3, 0.2)),
            hint="The largest singular value is 11, and three steps leave 0.",
        ),
        Case("a long sequence", (_square(rng, 4), _states(rng, 40, 4)), hint="T = 40."),
        Case(
            "not contiguous in memory",
            (scattered(_square(rng, 3)), scattered(_states(rng, 5, 3))),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (_square(rng, 3).astype(np.float32), _states(rng, 5, 3).astype(np.float32)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- oracles: the same values by another road -------------------------------------------------

STEP = 1e-30


def _open(z: Array) -> Array:
    """σ, of complex numbers too."""
    return 1 / (1 + np.exp(-z))


def _rnn_states(given: Mapping[str, Array]) -> Array:
    """h after every step; every array has one axis more in front: many at once."""
    h, states = given["h0"], []
    for t in range(given["x"].shape[2]):
        h = np.tanh(given["x"][:, :, t] @ given["wx"] + h @ given["wh"] + given["b"][:, None])
        states.append(h)
    return np.stack(states, axis=2)


def _lstm_states(given: Mapping[str, Array]) -> tuple[Array, Array]:
    """h after every step, and the last c; every array has one axis more in front."""
    h, c, states = given["h0"], given["c0"], []
    for t in range(given["x"].shape[2]):
        z = given["x"][:, :, t] @ given["wx"] + h @ given["wh"] + given["b"][:, None]
        zi, zf, zg, zo = np.split(z, 4, axis=-1)
        c = _open(zf) * c + _open(zi) * np.tanh(zg)
        h = _open(zo) * np.tanh(c)
        states.append(h)
    return np.stack(states, axis=2), c


def _by_complex_step(
    loss: Callable[[Mapping[str, Array]], Array], given: Mapping[str, Array]
) -> dict[str, Array]:
    """Every entry of every array moved by i h, each in a copy of its own: no backward pass."""
    one = {name: np.asarray(value, float)[None] for name, value in given.items()}
    found = {}
    for name, value in one.items():
        moved = value + 1j * STEP * np.eye(value.size).reshape(-1, *value.shape[1:])
        found[name] = loss({**one, name: moved}).imag.reshape(value.shape[1:]) / STEP
    return found


def _rnn_by_complex_step(dh_all, x, h0, wx, wh, b):
    given = {"x": x, "h0": h0, "wx": wx, "wh": wh, "b": b}
    found = _by_complex_step(
        lambda given: np.einsum("bth,pbth->p", dh_all, _rnn_states(given)), given
    )
    return found["x"], found["h0"], {name: found[name] for name in NAMES}


def _lstm_by_complex_step(dh_all, x, h0, c0, wx, wh, b):
    given = {"x": x, "h0": h0, "c0": c0, "wx": wx, "wh": wh, "b": b}
    found = _by_complex_step(
        lambda given: np.einsum("bth,pbth->p", dh_all, _lstm_states(given)[0]), given
    )
    return found["x"], found["h0"], found["c0"], {name: found[name] for name in NAMES}


def _step_backward_by_complex_step(dh, dc, x, h, c, wx, wh, b):
    given = {"x": x[:, None], "h0": h, "c0": c, "wx": wx, "wh": wh, "b": b}

    def loss(given: Mapping[str, Array]) -> Array:
        states, cell = _lstm_states(given)
        return np.einsum("bh,pbh->p", dh, states[:, :, 0]) + np.einsum("bh,pbh->p", dc, cell)

    found = _by_complex_step(loss, given)
    grads = {name: found[name] for name in NAMES}
    return found["x"][:, 0], found["h0"], found["c0"], grads


def _step_unit_by_unit(x, h, c, wx, wh, b):
    """One number at a time, by the definition."""
    x, h, c, wx, wh, b = (np.asarray(a, float) for a in (x, h, c, wx, wh, b))
    h_next, c_next, width = np.zeros(h.shape), np.zeros(c.shape), h.shape[1]
    for row, unit in np.ndindex(h.shape):
        zi, zf, zg, zo = (
            sum(x[row] * wx[:, k]) + sum(h[row] * wh[:, k]) + b[k]
            for k in range(unit, 4 * width, width)
        )
        c_next[row, unit] = _open(zf) * c[row, unit] + _open(zi) * np.tanh(zg)
        h_next[row, unit] = _open(zo) * np.tanh(c_next[row, unit])
    return h_next, c_next


def _lag_forward_mode(wh, h_all):
    """Every unit of h_(T-1-lag) moved by itself and followed to the end; then eigenvalues."""
    wh, h_all = np.asarray(wh, float), np.asarray(h_all, float)
    n, width = h_all.shape
    norms = np.zeros(n)
    for lag in range(n):
        moved = np.eye(width)
        for t in range(n - lag, n):
            moved = moved @ wh * (1 - h_all[t] ** 2)
        norms[lag] = max(np.linalg.eigvalsh(moved @ moved.T)[-1], 0.0) ** 0.5
    return norms


# --- mistakes: rnn_backward -------------------------------------------------------------------


class _RNNParts:
    """A right backward pass through time, step by step; a mistake overrides a step."""

    def first(self, h0: Array) -> Array:
        return h0

    def z(self, x: Array, h: Array, wx: Array, wh: Array, b: Array) -> Array:
        return x @ wx + h @ wh + b

    def own(self, dh_all: Array, t: int) -> Array:
        return dh_all[:, t]

    def dz(self, own: Array, carry: Array, slope: Array) -> Array:
        return (own + carry) * slope

    def slope(self, h: Array, z: Array, before: Array) -> Array:
        return 1 - h**2

    def carry(self, dz: Array, wh: Array, total: Array) -> Array:
        return dz @ wh.T

    def dx(self, dz: Array, wx: Array) -> Array:
        return dz @ wx.T

    def left(self, before: Array, after: Array, t: int) -> Array:
        """What dz is multiplied with for wh's gradient."""
        return before

    def wx(self, terms: Sequence[Array]) -> Array:
        return sum(terms[1:], terms[0])

    def wh(self, terms: Sequence[Array]) -> Array:
        return sum(terms[1:], terms[0])

    def b(self, terms: Sequence[Array]) -> Array:
        """Terms ``(B, H)``, one a step."""
        return sum(terms[1:], terms[0]).sum(axis=0)


def _rnn_with(finish: Answer | None = None, **steps: Answer) -> Answer:
    """The backward pass with some of its steps replaced; ``finish`` changes what is returned."""
    parts: Any = _RNNParts()
    for name, step in steps.items():
        setattr(parts, name, step)

    def answer(dh_all, x, h0, wx, wh, b):
        h, kept = parts.first(h0), []
        for t in range(x.shape[1]):
            z = parts.z(x[:, t], h, wx, wh, b)
            kept.append((h, z, np.tanh(z)))
            h = kept[-1][2]
        carry, dzs, dxs, totals = np.zeros_like(h0), [], [], []
        for t in reversed(range(x.shape[1])):
            before, z, after = kept[t]
            own = parts.own(dh_all, t)
            totals.append(own + carry)
            dzs.append(parts.dz(own, carry, parts.slope(after, z, before)))
            dxs.append(parts.dx(dzs[-1], wx))
            carry = parts.carry(dzs[-1], wh, totals[-1])
        dzs, dxs, totals = dzs[::-1], dxs[::-1], totals[::-1]
        lefts = [parts.left(kept[t][0], kept[t][2], t) for t in range(len(dzs))]
        grads = {
            "wx": parts.wx([x[:, t].T @ dz for t, dz in enumerate(dzs)]),
            "wh": parts.wh([left.T @ dz for left, dz in zip(lefts, dzs, strict=True)]),
            "b": parts.b(dzs),
        }
        answer = np.stack(dxs, axis=1), carry, grads
        if finish is None:
            return answer
        seen = SimpleNamespace(dzs=dzs, totals=totals, kept=kept, x=x, h0=h0, wx=wx, wh=wh)
        return finish(answer, seen)

    return answer


def _first(terms: Sequence[Array]) -> Array:
    return terms[0]


def _last(terms: Sequence[Array]) -> Array:
    return terms[-1]


def _mean_over_time(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], terms[0]) / len(terms)


def _overwritten(keep: Callable[[Sequence[Array]], Array]) -> tuple[Answer, ...]:
    """All of them, all but the bias, one alone."""
    bias = lambda terms: keep(terms).sum(axis=0)  # noqa: E731
    return (
        _rnn_with(wx=keep, wh=keep, b=bias),
        _rnn_with(wx=keep, wh=keep),
        _rnn_with(wx=keep),
        _rnn_with(wh=keep),
        _rnn_with(b=bias),
    )


def _bias_mean(terms: Sequence[Array]) -> Array:
    return _mean_over_time(terms).sum(axis=0)


def _batch_mean(answer, seen):
    dx, dh0, grads = answer
    return dx, dh0, {name: grad / len(seen.x) for name, grad in grads.items()}


def _steps_and_batch_mean(answer, seen):
    dx, dh0, grads = answer
    size = len(seen.x) * seen.x.shape[1]
    return dx, dh0, {name: grad / size for name, grad in grads.items()}


def _reversed_dx(answer, seen):
    dx, dh0, grads = answer
    return dx[:, ::-1], dh0, grads


def _dh0(of: Callable[[Any], Array]) -> Answer:
    def finish(answer, seen):
        dx, _, grads = answer
        return dx, of(seen), grads

    return _rnn_with(finish)


def _grad(name: str, change: Callable[[Array], Array]) -> Answer:
    def finish(answer, seen):
        dx, dh0, grads = answer
        return dx, dh0, {**grads, name: change(grads[name])}

    return finish


def _h_all(seen: Any) -> Array:
    return np.stack([after for _, _, after in seen.kept], axis=1)


def _wh_shortened(answer, seen):
    """h_{t-1} taken from h_all, where step 0 finds none."""
    dx, dh0, grads = answer
    pairs = zip(seen.kept[1:], seen.dzs[1:], strict=True)
    wh = sum((kept[0].T @ dz for kept, dz in pairs), np.zeros_like(seen.wh))
    return dx, dh0, {**grads, "wh": wh}


def _wrapped_left(answer, seen):
    """np.roll, or h_all[:, t - 1] at t = 0, which is the last one."""
    dx, dh0, grads = answer
    h_all = np.roll(_h_all(seen), 1, axis=1)
    dz = np.stack(seen.dzs, axis=1)
    return dx, dh0, {**grads, "wh": np.einsum("bti,btj->ij", h_all, dz)}


CARRY = (
    "h_t is read twice: by the loss at step t, and by step t + 1. dh_t is the sum of dh_all[:, t] "
    "and of what comes back from t + 1, dz_{t+1} @ wh.T."
)
SLOPE = (
    "h = tanh(z) has the slope 1 - tanh²(z), which is 1 - h²: of the state that came out at this "
    "step, not of z, and without another tanh."
)
SUMMED = (
    "wx, wh and b were used at every step, so each of their gradients is a sum over all steps: "
    "`+=` in the loop, not `=`. One step's share alone, be it the first, is not dL/dW."
)

RNN_WAYS: tuple[tuple[str, str, str, tuple[Answer, ...]], ...] = (
    (
        "carry from t+1 dropped",
        CARRY,
        BPTT,
        (
            _rnn_with(dz=lambda own, carry, slope: own * slope),
            _rnn_with(carry=lambda dz, wh, total: np.zeros_like(total)),
        ),
    ),
    (
        "tanh′ of the input",
        SLOPE,
        RNN,
        (
            _rnn_with(slope=lambda h, z, before: 1 - z**2),
            _rnn_with(slope=lambda h, z, before: 1 - np.tanh(h) ** 2),
        ),
    ),
    (
        "slope of the state before",
        "The slope at step t is made of the state that step made, h_t, not of h_{t-1}, which it "
        "read.",
        BPTT,
        (_rnn_with(slope=lambda h, z, before: 1 - before**2),),
    ),
    (
        "1+h²",
        "tanh′ is 1 - tanh²: never above 1, and 0 where h is ±1.",
        RNN,
        (_rnn_with(slope=lambda h, z, before: 1 + h**2),),
    ),
    (
        "1-h",
        "tanh′ is 1 - h², with the square; h(1 - h) is the logistic function's.",
        RNN,
        (
            _rnn_with(slope=lambda h, z, before: 1 - h),
            _rnn_with(slope=lambda h, z, before: h * (1 - h)),
        ),
    ),
    (
        "tanh′ forgotten",
        "Between h_t and z_t stands a tanh: its slope 1 - h_t² belongs into dz_t, at every step.",
        BPTT,
        (
            _rnn_with(slope=lambda h, z, before: np.ones_like(h)),
            _rnn_with(carry=lambda dz, wh, total: total @ wh.T),
        ),
    ),
    (
        "carry added behind tanh′",
        "What comes from t + 1 comes back to h_t, so it goes through tanh′ together with "
        "dh_all[:, t]: (dh_all + carry)(1 - h²).",
        BPTT,
        (_rnn_with(dz=lambda own, carry, slope: own * slope + carry),),
    ),
    ("grads overwritten, not summed over time", SUMMED, OVERWRITTEN, _overwritten(_first)),
    (
        "gradients of the last step only",
        SUMMED,
        OVERWRITTEN,
        _overwritten(_last),
    ),
    (
        "gradients averaged over time",
        "The steps' shares add up; a mean belongs to the loss, which has already divided.",
        OVERWRITTEN,
        (
            _rnn_with(wx=_mean_over_time, wh=_mean_over_time, b=_bias_mean),
            _rnn_with(wx=_mean_over_time, wh=_mean_over_time),
        ),
    ),
    (
        "gradients averaged over the batch",
        "The rows' shares add up; a mean belongs to the loss, which has already divided.",
        SHAPES,
        (_rnn_with(_batch_mean), _rnn_with(_steps_and_batch_mean)),
    ),
    (
        "dh_all read at the last step only",
        "dh_all has a gradient for every h_t, not only for the last: each enters at its own step.",
        BPTT,
        (
            _rnn_with(
                own=lambda dh_all, t: dh_all[:, t] * (t == dh_all.shape[1] - 1),
            ),
        ),
    ),
    (
        "dh_all read from the wrong end",
        "dh_all[:, t] is the gradient of h_all[:, t]: the walk back starts with the last one.",
        BPTT,
        (_rnn_with(own=lambda dh_all, t: dh_all[:, dh_all.shape[1] - 1 - t]),),
    ),
    (
        "dx in reverse order",
        "The walk goes from the last step to the first, and a list filled on the way has the last "
        "step first: write to dx[:, t], or turn the list round.",
        BPTT,
        (_rnn_with(_reversed_dx),),
    ),
    (
        "wh not transposed in the carry",
        "z = h @ wh has the gradient dz @ wh.T by h. wh is square, so that no shape complains.",
        SHAPES,
        (_rnn_with(carry=lambda dz, wh, total: dz @ wh),),
    ),
    (
        "wx not transposed",
        "z = x @ wx has the gradient dz @ wx.T by x; where D = H the shapes fit without it.",
        SHAPES,
        (_rnn_with(dx=lambda dz, wx: dz @ wx),),
    ),
    (
        "h_t for h_{t-1} in wh's gradient",
        "wh was multiplied with the state before the step: dwh sums h_{t-1}ᵀ dz_t, and h0 is the "
        "first of them.",
        OVERWRITTEN,
        (_rnn_with(left=lambda before, after, t: after),),
    ),
    (
        "h0 left out of wh's gradient",
        "At step 0 wh was multiplied with h0, which need not be 0: h0ᵀ dz_0 is part of the sum.",
        OVERWRITTEN,
        (_rnn_with(_wh_shortened),),
    ),
    (
        "the last state before the first",
        "h_all[:, t - 1] at t = 0 is Python's last one. The state before step 0 is h0.",
        OVERWRITTEN,
        (_rnn_with(_wrapped_left),),
    ),
    (
        "h0 taken as 0",
        "The sequence starts from the h0 that was given.",
        RNN,
        (_rnn_with(first=np.zeros_like),),
    ),
    (
        "dh0 not through the first step",
        "dh0 is what comes out of step 0: dz_0 @ wh.T, one tanh′ and one wh behind h_all[:, 0].",
        BPTT,
        (_dh0(lambda seen: seen.totals[0]), _dh0(lambda seen: seen.dzs[0])),
    ),
    (
        "dh0 left at 0",
        "h0 went into step 0 and has a gradient like every other state.",
        BPTT,
        (_dh0(lambda seen: np.zeros_like(seen.h0)),),
    ),
    (
        "b forgotten",
        "The forward pass that the slopes are taken from has b in it.",
        RNN,
        (_rnn_with(z=lambda x, h, wx, wh, b: x @ wx + h @ wh),),
    ),
    (
        "db not summed over the batch",
        "There is one b for all rows and steps: its gradient has b's shape, (H,).",
        SHAPES,
        (
            _rnn_with(b=lambda dzs: sum(dzs[1:], dzs[0])),
            _rnn_with(b=lambda dzs: np.stack(dzs).sum(axis=1)),
        ),
    ),
    (
        "wh's gradient transposed",
        "dwh[i, j] = Σ h_{t-1, i} dz_{t, j}: h before dz. wh is square: no shape complains.",
        SHAPES,
        (_rnn_with(_grad("wh", np.transpose)),),
    ),
    (
        "wx's gradient transposed",
        "dwx has wx's shape, (D, H): x_tᵀ dz_t.",
        SHAPES,
        (_rnn_with(_grad("wx", np.transpose)),),
    ),
)


def _is_fine(given: Mapping[str, Any]) -> bool:
    """Whether solving for a factor leaves digits to compare: single precision has too few."""
    return given["x"].dtype == np.float64


def _rnn_dz(dh_all, x, h0, wx, wh, b):
    """dz of every step."""
    dz = np.zeros(dh_all.shape)
    h_all, _ = library.rnn_forward(x, h0, wx, wh, b)
    carry = np.zeros(h0.shape)
    for t in reversed(range(dh_all.shape[1])):
        dz[:, t] = (dh_all[:, t] + carry) * (1 - h_all[:, t] ** 2)
        carry = dz[:, t] @ wh.T
    return dz


# Of T steps, named as the walk back meets them: where in time, and the shortest T that has it.
ON_THE_WAY = (
    ("dz of the last step", slice(-1, None), 1),
    ("dz of the step before it", slice(-2, -1), 2),
    ("dz of the first step", slice(0, 1), 3),
)


def _through_time(
    name: str, where: slice, shortest: int, *, dz: Callable[..., Array]
) -> Intermediate:
    def value(**given: Any) -> Array:
        arguments = {n: given[n] for n in given if n not in ("lengths", "truncate", "dc_last")}
        steps = dz(**arguments)
        return steps[:, where] if steps.shape[1] >= shortest else steps[:, :0]

    def solved(dx: Array, **given: Any) -> Array | None:
        if dx.shape[1] < shortest or not _is_fine(given):
            return None
        return left_factor(dx[:, where], np.asarray(given["wx"], float).T)

    return Intermediate(name, value, {"dx": solved})


RNN_BACKWARD = Exercise(
    id="rnn_backward",
    chapter=CHAPTER,
    title="Backpropagation through time",
    points=4,
    returns=("dx", "dh0", "grads"),
    reference=library.rnn_backward,
    oracle=quiet(_rnn_by_complex_step),
    cases=_rnn_cases,
    tokens=("dx",),
    intermediates=tuple(_through_time(*place, dz=_rnn_dz) for place in ON_THE_WAY),
    mistakes=tuple(
        mistake
        for name, why, section, answers in RNN_WAYS
        for mistake in named(name, why, section, *answers)
    ),
)


# --- mistakes: lstm_step_forward --------------------------------------------------------------


def _pre_activation(x, h, wx, wh, b):
    return x @ wx + h @ wh + b


def _right_activations(i, f, g, o):
    return _open(i), _open(f), np.tanh(g), _open(o)


def _right_cell(i, f, g, o, c):
    return f * c + i * g


def _right_state(i, f, g, o, c, c_next):
    return o * np.tanh(c_next)


def _step_with(
    order: str = "ifgo",
    z: Answer = _pre_activation,
    activations: Answer = _right_activations,
    cell: Answer = _right_cell,
    state: Answer = _right_state,
) -> Answer:
    """One step, its columns read in ``order``, some of its pieces replaced."""

    def answer(x, h, c, wx, wh, b):
        columns = np.split(z(x, h, wx, wh, b), 4, axis=-1)
        i, f, g, o = activations(*(columns[order.index(gate)] for gate in "ifgo"))
        c_next = cell(i, f, g, o, c)
        return state(i, f, g, o, c, c_next), c_next

    return answer


def _interleaved(x, h, c, wx, wh, b):
    z = _pre_activation(x, h, wx, wh, b)
    i, f, g, o = _right_activations(*(z[:, gate::4] for gate in range(4)))
    c_next = f * c + i * g
    return o * np.tanh(c_next), c_next


def _unstable(z):
    return np.exp(z) / (1 + np.exp(z))


def _exchanged(x, h, c, wx, wh, b):
    h_next, c_next = library.lstm_step_forward(x, h, c, wx, wh, b)
    return c_next, h_next


ORDER = (
    "The four blocks of H columns are i, f, g, o, torch's order. ONNX has i, o, f, g, TensorFlow's "
    "old cells i, g, f, o, many courses f, i, o, g or i, f, o, g; a test with equal weights for "
    "all gates lets every order pass."
)
ORDERS = ("ifog", "figo", "fiog", "igfo", "iofg", "fgio", "gifo", "ofig", "iogf", "ogfi")
TWO_BIASES = (
    "torch's LSTM has two biases, bias_ih and bias_hh, and adds both. Here there is one b, which "
    "is their sum: it enters once."
)
NOT_SQUASHED = (
    "The state shows the squashed cell: h = o ∘ tanh(c), with the new c. Without tanh h is not "
    "bounded."
)

STEP_WAYS: tuple[tuple[str, str, str, tuple[Answer, ...]], ...] = (
    ("gate order", ORDER, GATES, tuple(_step_with(order=order) for order in ORDERS)),
    (
        "gates interleaved",
        "Each gate owns H neighbouring columns: np.split(z, 4, axis=-1). z[:, 0::4] takes every "
        "fourth column instead.",
        GATES,
        (_interleaved,),
    ),
    (
        "sigmoid for the candidate",
        "i, f and o are gates between 0 and 1; the candidate g is a value between -1 and 1: tanh.",
        LSTM,
        (_step_with(activations=lambda i, f, g, o: tuple(map(_open, (i, f, g, o)))),),
    ),
    (
        "tanh for a gate",
        "A gate says how much passes, between 0 and 1: σ. tanh is for the candidate g alone.",
        LSTM,
        (
            _step_with(activations=lambda i, f, g, o: (_open(i), _open(f), np.tanh(g), np.tanh(o))),
            _step_with(activations=lambda i, f, g, o: (np.tanh(i), _open(f), np.tanh(g), _open(o))),
            _step_with(activations=lambda i, f, g, o: tuple(map(np.tanh, (i, f, g, o)))),
        ),
    ),
    (
        "candidate not squashed",
        "g = tanh(z_g), between -1 and 1.",
        LSTM,
        (_step_with(activations=lambda i, f, g, o: (_open(i), _open(f), g, _open(o))),),
    ),
    (
        "forget gate not applied",
        "The old cell is multiplied by f before anything is added: c = f ∘ c + i ∘ g.",
        LSTM,
        (_step_with(cell=lambda i, f, g, o, c: c + i * g),),
    ),
    (
        "forget gate upside down",
        "f is what is kept of the old cell: 1 keeps all, 0 forgets all. Nor is it 1 - i: both have "
        "weights of their own.",
        LSTM,
        (
            _step_with(cell=lambda i, f, g, o, c: (1 - f) * c + i * g),
            _step_with(cell=lambda i, f, g, o, c: (1 - i) * c + i * g),
        ),
    ),
    (
        "input gate not applied",
        "The candidate enters as far as i lets it: i ∘ g.",
        LSTM,
        (_step_with(cell=lambda i, f, g, o, c: f * c + g),),
    ),
    (
        "gates exchanged in the cell",
        "f belongs to the old cell and i to the candidate: c = f ∘ c + i ∘ g.",
        LSTM,
        (
            _step_with(cell=lambda i, f, g, o, c: f * c + f * g),
            _step_with(cell=lambda i, f, g, o, c: f * c + o * g),
        ),
    ),
    (
        "candidate added before forgetting",
        "f weighs the old cell only; what is new is not forgotten at once.",
        LSTM,
        (_step_with(cell=lambda i, f, g, o, c: f * (c + i * g)),),
    ),
    (
        "input and candidate added",
        "The input gate multiplies the candidate: i ∘ g.",
        LSTM,
        (_step_with(cell=lambda i, f, g, o, c: f * c + i + g),),
    ),
    (
        "cell not squashed in the state",
        NOT_SQUASHED,
        LSTM,
        (_step_with(state=lambda i, f, g, o, c, c_next: o * c_next),),
    ),
    (
        "state from the old cell",
        "c is renewed first, then shown: h = o ∘ tanh(c_next).",
        LSTM,
        (_step_with(state=lambda i, f, g, o, c, c_next: o * np.tanh(c)),),
    ),
    (
        "output gate not applied",
        "What the state shows of the cell is o's to say: h = o ∘ tanh(c).",
        LSTM,
        (_step_with(state=lambda i, f, g, o, c, c_next: np.tanh(c_next)),),
    ),
    (
        "output gate inside tanh",
        "o multiplies the squashed cell, from outside: h = o ∘ tanh(c), not tanh(o ∘ c).",
        LSTM,
        (_step_with(state=lambda i, f, g, o, c, c_next: np.tanh(o * c_next)),),
    ),
    (
        "bias counted twice",
        TWO_BIASES,
        TORCH,
        (_step_with(z=lambda x, h, wx, wh, b: x @ wx + h @ wh + 2 * b),),
    ),
    (
        "bias forgotten",
        "z = x @ wx + h @ wh + b, for all four blocks.",
        LSTM,
        (_step_with(z=lambda x, h, wx, wh, b: x @ wx + h @ wh),),
    ),
    (
        "one gate's bias for all",
        "Each of the four blocks has its own H entries of b.",
        GATES,
        tuple(
            _step_with(
                z=lambda x, h, wx, wh, b, k=k: x @ wx + h @ wh + np.tile(np.split(b, 4)[k], 4)
            )
            for k in (0, 1, 3)
        ),
    ),
    (
        "forget bias of 1 added",
        "A forget bias is part of b from the start; the step adds nothing of its own.",
        LSTM,
        (
            _step_with(
                activations=lambda i, f, g, o: (_open(i), _open(f + 1), np.tanh(g), _open(o))
            ),
        ),
    ),
    (
        "state not read",
        "z has two products: the input's, x @ wx, and the old state's, h @ wh.",
        LSTM,
        (_step_with(z=lambda x, h, wx, wh, b: x @ wx + b),),
    ),
    (
        "cell read for the state",
        "The gates read h, what was shown; the cell itself enters only in f ∘ c.",
        LSTM,
        (lambda x, h, c, wx, wh, b: library.lstm_step_forward(x, c, c, wx, wh, b),),
    ),
    (
        "h and c returned the wrong way round",
        "The state first, then the cell: h_next, c_next.",
        SHAPES,
        (_exchanged,),
    ),
    (
        "overflow in the sigmoid",
        "exp(z)/(1 + exp(z)) is inf/inf = NaN for large z. 1/(1 + exp(-z)) is 1/inf = 0 at the "
        "other end, and right.",
        WRONG,
        (
            _step_with(
                activations=lambda i, f, g, o: (
                    _unstable(i),
                    _unstable(f),
                    np.tanh(g),
                    _unstable(o),
                )
            ),
        ),
    ),
)

LSTM_STEP_FORWARD = Exercise(
    id="lstm_step_forward",
    chapter=CHAPTER,
    title="One step of an LSTM",
    points=2,
    returns=("h_next", "c_next"),
    reference=library.lstm_step_forward,
    oracle=quiet(_step_unit_by_unit),
    cases=_step_cases,
    mistakes=tuple(
        mistake
        for name, why, section, answers in STEP_WAYS
        for mistake in named(name, why, section, *answers)
    ),
)


# --- mistakes: lstm_step_backward -------------------------------------------------------------


class _StepParts:
    """A right backward step; a mistake overrides a piece. ``s`` has all that was computed."""

    order = "ifgo"

    def z(self, x: Array, h: Array, wx: Array, wh: Array, b: Array) -> Array:
        return x @ wx + h @ wh + b

    def total(self, s: Any) -> Array:
        """dc_t: from the next step, and from h_t."""
        return s.dc + s.dh * s.o * (1 - s.tanh_c**2)

    def dz_i(self, s: Any) -> Array:
        return s.total * s.g * s.i * (1 - s.i)

    def dz_f(self, s: Any) -> Array:
        return s.total * s.c * s.f * (1 - s.f)

    def dz_g(self, s: Any) -> Array:
        return s.total * s.i * (1 - s.g**2)

    def dz_o(self, s: Any) -> Array:
        return s.dh * s.tanh_c * s.o * (1 - s.o)

    def joined(self, i: Array, f: Array, g: Array, o: Array) -> Array:
        return np.concatenate([i, f, g, o], axis=-1)

    def dx(self, s: Any) -> Array:
        return s.dz @ s.wx.T

    def dh_prev(self, s: Any) -> Array:
        return s.dz @ s.wh.T

    def dc_prev(self, s: Any) -> Array:
        return s.total * s.f

    def grad_wx(self, s: Any) -> Array:
        return s.x.T @ s.dz

    def grad_wh(self, s: Any) -> Array:
        return s.h.T @ s.dz

    def grad_b(self, s: Any) -> Array:
        return s.dz.sum(axis=0)


def _back_with(**pieces: Any) -> Answer:
    """The backward step with some of its pieces replaced."""
    parts: Any = _StepParts()
    for name, piece in pieces.items():
        setattr(parts, name, piece)

    def answer(dh, dc, x, h, c, wx, wh, b):
        s = SimpleNamespace(dh=dh, dc=dc, x=x, h=h, c=c, wx=wx, wh=wh, b=b)
        s.columns = np.split(parts.z(x, h, wx, wh, b), 4, axis=-1)
        z_i, z_f, z_g, z_o = (s.columns[parts.order.index(gate)] for gate in "ifgo")
        s.z_i, s.z_f, s.z_g, s.z_o = z_i, z_f, z_g, z_o
        s.i, s.f, s.g, s.o = _open(z_i), _open(z_f), np.tanh(z_g), _open(z_o)
        s.c_next = s.f * c + s.i * s.g
        s.tanh_c = np.tanh(s.c_next)
        s.total = parts.total(s)
        by_gate = {
            "i": parts.dz_i(s),
            "f": parts.dz_f(s),
            "g": parts.dz_g(s),
            "o": parts.dz_o(s),
        }
        s.by_gate = by_gate
        s.dz = parts.joined(*(by_gate[gate] for gate in parts.order))
        grads = {"wx": parts.grad_wx(s), "wh": parts.grad_wh(s), "b": parts.grad_b(s)}
        return parts.dx(s), parts.dh_prev(s), parts.dc_prev(s), grads

    return answer


def _joined_as(order: str) -> Answer:
    """The columns' gradients put side by side in another order than the columns."""

    def joined(i: Array, f: Array, g: Array, o: Array) -> Array:
        by_gate = {"i": i, "f": f, "g": g, "o": o}
        return np.concatenate([by_gate[gate] for gate in order], axis=-1)

    return joined


def _of_gates(gates: str) -> Callable[[Any], Array]:
    """dz with nothing but some gates in it."""

    def kept(s: Any) -> Array:
        parts = [s.by_gate[gate] * (gate in gates) for gate in "ifgo"]
        return np.concatenate(parts, axis=-1)

    return kept


def _dh_of(gates: str) -> Callable[[Any], Array]:
    return lambda s: _of_gates(gates)(s) @ s.wh.T


def _dx_of(gates: str) -> Callable[[Any], Array]:
    return lambda s: _of_gates(gates)(s) @ s.wx.T


def _halves_exchanged(s: Any) -> Array:
    return s.total * s.i * s.g * (1 - s.g)


def _sigmoid_again(s: Any) -> Array:
    return s.total * s.c * _open(s.f)


THROUGH_H = (
    "c_t has two readers: the next step, and h_t = o ∘ tanh(c_t). dc_t is what came in as dc plus "
    "dh ∘ o ∘ (1 - tanh² c_t)."
)
PARTNER = (
    "c = f ∘ c_prev + i ∘ g is two products: the gradient of a factor holds the other factor, i's "
    "g and g's i, f's c_prev."
)
OWN_SLOPE = (
    "σ has the slope s(1 - s) of its own value, tanh the slope 1 - t²: i, f, o take the first, g "
    "takes the second."
)
TANH_OF_TANH = (
    "1 - t² is made of t = tanh(…) as it was computed; another tanh around it, or c itself in its "
    "place, is another slope."
)

BACK_WAYS: tuple[tuple[str, str, str, tuple[Answer, ...]], ...] = (
    (
        "dc path through h missing",
        THROUGH_H,
        PATHS,
        (_back_with(total=lambda s: s.dc),),
    ),
    (
        "path through h not passed on",
        "dc_prev is the whole dc_t times f, with what came to c_t through h_t: that way to the "
        "past is as long as the other.",
        PATHS,
        (_back_with(dc_prev=lambda s: s.dc * s.f),),
    ),
    (
        "dc from the next step dropped",
        THROUGH_H,
        PATHS,
        (_back_with(total=lambda s: s.dh * s.o * (1 - s.tanh_c**2)),),
    ),
    (
        "forget gate not carried",
        "c_prev entered as f ∘ c_prev: dc_prev = dc_t ∘ f. That factor f, near 1 if it has learnt "
        "to be, is what an LSTM is for.",
        LSTM_BACKWARD,
        (_back_with(dc_prev=lambda s: s.total),),
    ),
    (
        "i gate multiplied by i",
        PARTNER,
        LSTM_BACKWARD,
        (
            _back_with(dz_i=lambda s: s.total * s.i * s.i * (1 - s.i)),
            _back_with(
                dz_i=lambda s: s.total * s.i * s.i * (1 - s.i),
                dz_g=lambda s: s.total * s.g * (1 - s.g**2),
            ),
        ),
    ),
    (
        "candidate multiplied by itself",
        PARTNER,
        LSTM_BACKWARD,
        (_back_with(dz_g=lambda s: s.total * s.g * (1 - s.g**2)),),
    ),
    (
        "forget gate's partner wrong",
        PARTNER,
        LSTM_BACKWARD,
        (
            _back_with(dz_f=lambda s: s.total * s.c_next * s.f * (1 - s.f)),
            _back_with(dz_f=lambda s: s.total * s.g * s.f * (1 - s.f)),
            _back_with(dz_f=lambda s: s.total * s.f * s.f * (1 - s.f)),
        ),
    ),
    (
        "output gate's partner wrong",
        "h = o ∘ tanh(c): the gradient of o holds tanh(c_t), of the new cell, squashed.",
        LSTM_BACKWARD,
        (
            _back_with(dz_o=lambda s: s.dh * s.c_next * s.o * (1 - s.o)),
            _back_with(dz_o=lambda s: s.dh * np.tanh(s.c) * s.o * (1 - s.o)),
            _back_with(dz_o=lambda s: s.dh * s.o * s.o * (1 - s.o)),
        ),
    ),
    (
        "output gate's gradient from dc",
        "o is in h only, not in c: its gradient starts from dh.",
        LSTM_BACKWARD,
        (_back_with(dz_o=lambda s: s.total * s.tanh_c * s.o * (1 - s.o)),),
    ),
    (
        "gate order",
        ORDER,
        GATES,
        (
            *(_back_with(order=order) for order in ORDERS),
            *(_back_with(joined=_joined_as(order)) for order in ("ifog", "figo", "fiog", "igfo")),
        ),
    ),
    (
        "gates' slopes exchanged",
        OWN_SLOPE,
        LSTM_BACKWARD,
        (
            _back_with(dz_g=_halves_exchanged),
            _back_with(
                dz_i=lambda s: s.total * s.g * (1 - s.i**2),
                dz_f=lambda s: s.total * s.c * (1 - s.f**2),
                dz_o=lambda s: s.dh * s.tanh_c * (1 - s.o**2),
            ),
            _back_with(dz_o=lambda s: s.dh * s.tanh_c * (1 - s.o**2)),
        ),
    ),
    (
        "a gate's slope forgotten",
        "Each gate's gradient ends with its own slope, s(1 - s) for i, f and o, 1 - g² for g: "
        "behind it stands dz, the gradient by what the activation was given.",
        LSTM_BACKWARD,
        (
            _back_with(dz_i=lambda s: s.total * s.g),
            _back_with(dz_f=lambda s: s.total * s.c),
            _back_with(dz_g=lambda s: s.total * s.i),
            _back_with(dz_o=lambda s: s.dh * s.tanh_c),
            _back_with(
                dz_i=lambda s: s.total * s.g,
                dz_f=lambda s: s.total * s.c,
                dz_g=lambda s: s.total * s.i,
                dz_o=lambda s: s.dh * s.tanh_c,
            ),
        ),
    ),
    (
        "a gate's value for its slope",
        "The slope of σ is s(1 - s), not s, and not another σ of s.",
        LSTM_BACKWARD,
        (
            _back_with(
                dz_i=lambda s: s.total * s.g * s.i,
                dz_f=lambda s: s.total * s.c * s.f,
                dz_o=lambda s: s.dh * s.tanh_c * s.o,
            ),
            _back_with(dz_f=_sigmoid_again),
        ),
    ),
    (
        "tanh′ of a tanh",
        TANH_OF_TANH,
        WRONG,
        (
            _back_with(total=lambda s: s.dc + s.dh * s.o * (1 - np.tanh(s.tanh_c) ** 2)),
            _back_with(dz_g=lambda s: s.total * s.i * (1 - np.tanh(s.g) ** 2)),
            _back_with(
                total=lambda s: s.dc + s.dh * s.o * (1 - np.tanh(s.tanh_c) ** 2),
                dz_g=lambda s: s.total * s.i * (1 - np.tanh(s.g) ** 2),
            ),
            _back_with(total=lambda s: s.dc + s.dh * s.o * (1 - s.c_next**2)),
            _back_with(total=lambda s: s.dc + s.dh * s.o * (1 - np.tanh(s.c) ** 2)),
        ),
    ),
    (
        "tanh′ of the cell forgotten",
        THROUGH_H,
        LSTM_BACKWARD,
        (_back_with(total=lambda s: s.dc + s.dh * s.o),),
    ),
    (
        "output gate missing on the way to c",
        THROUGH_H,
        LSTM_BACKWARD,
        (_back_with(total=lambda s: s.dc + s.dh * (1 - s.tanh_c**2)),),
    ),
    (
        "dh_prev from one gate only",
        "h went into all four gates: their four paths add up, which dz @ wh.T does in one product.",
        LSTM_BACKWARD,
        (
            *(_back_with(dh_prev=_dh_of(gate)) for gate in "ifgo"),
            *(_back_with(dh_prev=_dh_of(gate), dx=_dx_of(gate)) for gate in "ifgo"),
            _back_with(dh_prev=_dh_of("ifg")),
        ),
    ),
    (
        "dh passed on beside the gates",
        "There is no skip path from h to h: the old state is read by the gates alone.",
        PATHS,
        (_back_with(dh_prev=lambda s: s.dz @ s.wh.T + s.dh),),
    ),
    (
        "bias gradients all from one gate",
        "Each block of b gets the sum over the batch of its own gate's dz.",
        GATES,
        tuple(
            _back_with(grad_b=lambda s, gate=gate: np.tile(s.by_gate[gate].sum(axis=0), 4))
            for gate in "ifo"
        ),
    ),
    (
        "new state in wh's gradient",
        "wh was multiplied with the state before the step: dwh = hᵀ dz, with the h that came in.",
        WRONG,
        (_back_with(grad_wh=lambda s: (s.o * s.tanh_c).T @ s.dz),),
    ),
    (
        "gradients averaged over the batch",
        "The rows' shares add up; a mean belongs to the loss, which has already divided.",
        SHAPES,
        (
            _back_with(
                grad_wx=lambda s: s.x.T @ s.dz / len(s.x),
                grad_wh=lambda s: s.h.T @ s.dz / len(s.x),
                grad_b=lambda s: s.dz.mean(axis=0),
            ),
            _back_with(grad_b=lambda s: s.dz.mean(axis=0)),
        ),
    ),
    (
        "db not summed over the batch",
        "There is one b for all rows: its gradient has b's shape, (4H,).",
        SHAPES,
        (_back_with(grad_b=lambda s: s.dz),),
    ),
    (
        "weights' gradients transposed",
        "dwx has wx's shape, (D, 4H): xᵀ dz, and dwh likewise hᵀ dz.",
        SHAPES,
        (
            _back_with(grad_wx=lambda s: s.dz.T @ s.x, grad_wh=lambda s: s.dz.T @ s.h),
            _back_with(grad_wh=lambda s: s.dz.T @ s.h),
            _back_with(grad_wx=lambda s: s.dz.T @ s.x),
        ),
    ),
)


def _carried_forward() -> tuple[Mistake, ...]:
    """Mistakes of lstm_step_forward in the forward pass that the slopes are taken from."""
    ways = {
        "bias counted twice": _back_with(z=lambda x, h, wx, wh, b: x @ wx + h @ wh + 2 * b),
        "bias forgotten": _back_with(z=lambda x, h, wx, wh, b: x @ wx + h @ wh),
        "state not read": _back_with(z=lambda x, h, wx, wh, b: x @ wx + b),
    }
    by_name = {mistake.name: mistake for mistake in LSTM_STEP_FORWARD.mistakes}
    return tuple(
        carried(by_name[name], "lstm_step_forward", quiet(answer)) for name, answer in ways.items()
    )


def _seen_of(given: Mapping[str, Any]) -> Any:
    """All values on the way of a right backward step."""
    found: dict[str, Any] = {}

    def spy(s: Any) -> Array:
        found["s"] = s
        return s.dz @ s.wx.T

    arguments = {name: np.asarray(value, float) for name, value in given.items()}
    _back_with(dx=spy)(**arguments)
    return found["s"]


def _solved_gate(gate: int, left: str) -> Callable[..., Array | None]:
    """The dz of one gate from grads['wx'] = xᵀ dz, or grads['wh'] = hᵀ dz."""

    def solved(grad: Array, **given: Any) -> Array | None:
        if not _is_fine(given):
            return None
        found = right_factor(np.asarray(given[left], float).T, grad)
        return None if found is None else np.split(found, 4, axis=-1)[gate]

    return solved


STEP_INTERMEDIATES = (
    Intermediate(
        "dc in all",
        lambda **given: _seen_of(given).total,
        {"dc_prev": lambda dc_prev, **given: dc_prev / _seen_of(given).f},
    ),
    *(
        Intermediate(
            f"dz of {gate}",
            lambda gate=gate, **given: _seen_of(given).by_gate[gate],
            {"grads['wx']": _solved_gate(n, "x"), "grads['wh']": _solved_gate(n, "h")},
        )
        for n, gate in enumerate("ifgo")
    ),
)

LSTM_STEP_BACKWARD = Exercise(
    id="lstm_step_backward",
    chapter=CHAPTER,
    title="One step of an LSTM, backward",
    points=4,
    returns=("dx", "dh_prev", "dc_prev", "grads"),
    reference=library.lstm_step_backward,
    oracle=quiet(_step_backward_by_complex_step),
    cases=_step_backward_cases,
    order=("dc_prev", "grads['b']", "grads['wx']", "grads['wh']", "dx", "dh_prev"),
    intermediates=STEP_INTERMEDIATES,
    mistakes=(
        *(
            mistake
            for name, why, section, answers in BACK_WAYS
            for mistake in named(name, why, section, *answers)
        ),
        *_carried_forward(),
    ),
)


# --- mistakes: lstm_backward ------------------------------------------------------------------


class _LSTMParts:
    """A right walk back through time over a backward step; a mistake overrides a piece."""

    def first(self, h0: Array, c0: Array) -> tuple[Array, Array]:
        return h0, c0

    def own(self, dh_all: Array, t: int) -> Array:
        return dh_all[:, t]

    def meet(self, own: Array, carry: Array) -> Array:
        return own + carry

    def carry_h(self, dh_prev: Array, dh: Array) -> Array:
        return dh_prev

    def carry_c(self, dc_prev: Array, dc: Array) -> Array:
        return dc_prev

    def grads(self, name: str, terms: Sequence[Array]) -> Array:
        return sum(terms[1:], terms[0])


def _lstm_with(
    step: Answer = library.lstm_step_backward, finish: Answer | None = None, **pieces: Answer
) -> Answer:
    """lstm_backward by a backward step that may be wrong, with some pieces replaced."""
    parts: Any = _LSTMParts()
    for name, piece in pieces.items():
        setattr(parts, name, piece)

    def answer(dh_all, x, h0, c0, wx, wh, b):
        states = [parts.first(h0, c0)]
        for t in range(x.shape[1]):
            h, c = states[-1]
            states.append(library.lstm_step_forward(x[:, t], h, c, wx, wh, b))
        dh, dc = np.zeros_like(h0), np.zeros_like(c0)
        dxs, terms, totals = [], [], []
        for t in reversed(range(x.shape[1])):
            total = parts.meet(parts.own(dh_all, t), dh)
            dx, dh_prev, dc_prev, grads = step(total, dc, x[:, t], *states[t], wx, wh, b)
            dxs.append(dx)
            terms.append(grads)
            totals.append((total, dc))
            dh, dc = parts.carry_h(dh_prev, total), parts.carry_c(dc_prev, dc)
        dxs, terms, totals = dxs[::-1], terms[::-1], totals[::-1]
        summed = {name: parts.grads(name, [term[name] for term in terms]) for name in NAMES}
        answer = np.stack(dxs, axis=1), dh, dc, summed
        if finish is None:
            return answer
        seen = SimpleNamespace(x=x, h0=h0, c0=c0, totals=totals, states=states, terms=terms)
        return finish(answer, seen)

    return answer


def _all_of(keep: Callable[[Sequence[Array]], Array]) -> Answer:
    return _lstm_with(grads=lambda name, terms: keep(terms))


def _one_of(chosen: str, keep: Callable[[Sequence[Array]], Array]) -> Answer:
    def grads(name: str, terms: Sequence[Array]) -> Array:
        return keep(terms) if name in chosen.split() else sum(terms[1:], terms[0])

    return _lstm_with(grads=grads)


def _lstm_dx_reversed(answer, seen):
    dx, *rest = answer
    return (dx[:, ::-1], *rest)


def _first_states(h: Callable[[Any, Array], Array], c: Callable[[Any, Array], Array]) -> Answer:
    def finish(answer, seen):
        dx, dh0, dc0, grads = answer
        return dx, h(seen, dh0), c(seen, dc0), grads

    return _lstm_with(finish=finish)


def _kept_state(seen: Any, gradient: Array) -> Array:
    return gradient


def _gone(seen: Any, gradient: Array) -> Array:
    return np.zeros_like(gradient)


def _lstm_batch_mean(answer, seen):
    *rest, grads = answer
    return (*rest, {name: grad / len(seen.x) for name, grad in grads.items()})


# Mistakes of the step that keep their name in the sequence: the walk is what shows them.
OWN = (
    "dc path through h missing",
    "forget gate not carried",
    "i gate multiplied by i",
    "gate order",
)

# Walked through time, these are mistakes of the walk, which has names for them.
SAME_IN_THE_WALK = (
    "dc from the next step dropped",
    "path through h not passed on",
    "gradients averaged over the batch",
)

WALK_WAYS: tuple[tuple[str, str, str, tuple[Answer, ...]], ...] = (
    (
        "carry of h dropped",
        "h_t is read by the loss and by step t + 1: dh is dh_all[:, t] plus the dh_prev that step "
        "t + 1 gave back.",
        PATHS,
        (
            _lstm_with(meet=lambda own, carry: own),
            _lstm_with(carry_h=lambda dh_prev, dh: np.zeros_like(dh)),
        ),
    ),
    (
        "carry of c dropped",
        "c_t is read by step t + 1 too: the dc_prev that it gave back comes in as dc. It is the "
        "path that reaches far.",
        PATHS,
        (_lstm_with(carry_c=lambda dc_prev, dc: np.zeros_like(dc)),),
    ),
    (
        "dc added to itself",
        "dc_prev is all that goes on to step t - 1; the old dc is already in it.",
        PATHS,
        (_lstm_with(carry_c=lambda dc_prev, dc: dc_prev + dc),),
    ),
    (
        "grads overwritten, not summed over time",
        SUMMED,
        OVERWRITTEN,
        (_all_of(_first), _one_of("wx wh", _first), _one_of("wh", _first), _one_of("b", _first)),
    ),
    (
        "gradients of the last step only",
        SUMMED,
        OVERWRITTEN,
        (_all_of(_last), _one_of("wx wh", _last)),
    ),
    (
        "gradients averaged over time",
        "The steps' shares add up; a mean belongs to the loss, which has already divided.",
        OVERWRITTEN,
        (_all_of(_mean_over_time),),
    ),
    (
        "gradients averaged over the batch",
        "The rows' shares add up; a mean belongs to the loss, which has already divided.",
        SHAPES,
        (_lstm_with(finish=_lstm_batch_mean),),
    ),
    (
        "dh_all read at the last step only",
        "dh_all has a gradient for every h_t, not only for the last: each enters at its own step.",
        LSTM_BACKWARD,
        (_lstm_with(own=lambda dh_all, t: dh_all[:, t] * (t == dh_all.shape[1] - 1)),),
    ),
    (
        "dh_all read from the wrong end",
        "dh_all[:, t] is the gradient of h_all[:, t]: the walk back starts with the last one.",
        LSTM_BACKWARD,
        (_lstm_with(own=lambda dh_all, t: dh_all[:, dh_all.shape[1] - 1 - t]),),
    ),
    (
        "dx in reverse order",
        "The walk goes from the last step to the first, and a list filled on the way has the last "
        "step first: write to dx[:, t], or turn the list round.",
        LSTM_BACKWARD,
        (_lstm_with(finish=_lstm_dx_reversed),),
    ),
    (
        "first states taken as 0",
        "The sequence starts from the h0 and c0 that were given.",
        LSTM,
        (
            _lstm_with(first=lambda h0, c0: (0 * h0, 0 * c0)),
            _lstm_with(first=lambda h0, c0: (h0, 0 * c0)),
            _lstm_with(first=lambda h0, c0: (0 * h0, c0)),
        ),
    ),
    (
        "dh0 or dc0 left at 0",
        "h0 and c0 went into step 0 and have gradients like every other state: what is carried out "
        "of step 0.",
        LSTM_BACKWARD,
        (
            _first_states(_gone, _gone),
            _first_states(_kept_state, _gone),
            _first_states(_gone, _kept_state),
        ),
    ),
    (
        "dh0 and dc0 not through the first step",
        "dh0 and dc0 are what comes out of step 0, not what went into it.",
        LSTM_BACKWARD,
        (
            _first_states(lambda seen, dh0: seen.totals[0][0], lambda seen, dc0: seen.totals[0][1]),
            _first_states(lambda seen, dh0: seen.totals[0][0], _kept_state),
            _first_states(_kept_state, lambda seen, dc0: seen.totals[0][1]),
        ),
    ),
)


def _carried_step() -> tuple[Mistake, ...]:
    """Mistakes of lstm_step_backward walked through time; four of them keep their names."""
    found: list[Mistake] = []
    for mistake in LSTM_STEP_BACKWARD.mistakes:
        walked = quiet(_lstm_with(step=mistake.answer))
        if mistake.name in OWN:
            found += named(mistake.name, mistake.why, mistake.section, walked)
        elif " (in " not in mistake.name and mistake.name not in SAME_IN_THE_WALK:
            found.append(carried(mistake, "lstm_step_backward", walked))
    return tuple(found)


def _lstm_dz(dh_all, x, h0, c0, wx, wh, b):
    """dz ``(B, T, 4H)`` of every step."""
    dzs: list[Array] = []

    def spy(s: Any) -> Array:
        dzs.append(s.dz)
        return s.dz @ s.wx.T

    arguments = (np.asarray(a, float) for a in (dh_all, x, h0, c0, wx, wh, b))
    _lstm_with(step=_back_with(dx=spy))(*arguments)
    return np.stack(dzs[::-1], axis=1)


LSTM_BACKWARD_EXERCISE = Exercise(
    id="lstm_backward",
    chapter=CHAPTER,
    title="An LSTM backward through time",
    points=4,
    returns=("dx", "dh0", "dc0", "grads"),
    reference=library.lstm_backward,
    oracle=quiet(_lstm_by_complex_step),
    cases=_lstm_cases,
    tokens=("dx",),
    intermediates=tuple(_through_time(*place, dz=_lstm_dz) for place in ON_THE_WAY),
    mistakes=(
        *(
            mistake
            for name, why, section, answers in WALK_WAYS
            for mistake in named(name, why, section, *answers)
        ),
        *_carried_step(),
    ),
)


# --- mistakes: gradient_norm_by_lag -----------------------------------------------------------


def _spectral(jacobian: Array) -> float:
    return float(np.linalg.norm(jacobian, 2))


def _right_factor_of(wh: Array, h_all: Array, t: int) -> Array:
    """d h_t by h_(t-1), rows by columns."""
    return (1 - h_all[t] ** 2)[:, None] * wh.T


def _lag_with(
    factor: Callable[[Array, Array, int], Array] = _right_factor_of,
    norm: Callable[[Array], float] = _spectral,
    join: Callable[[Array, Array], Array] = np.matmul,
    finish: Callable[[Array], Array] = np.asarray,
    shift: int = 0,
) -> Answer:
    """The norms with a wrong factor, norm or order; ``shift`` moves the steps."""

    def answer(wh, h_all):
        n, width = h_all.shape
        product, norms = np.eye(width), []
        for lag in range(n):
            norms.append(norm(product))
            t = n - 1 - lag + shift
            product = join(product, factor(wh, h_all, max(t, 0) if shift < 0 else t % n))
        return finish(np.array(norms))

    return answer


def _norm_of_each_step(wh, h_all):
    back = range(len(h_all) - 1, 0, -1)
    return np.array([1.0, *(_spectral(_right_factor_of(wh, h_all, t)) for t in back)])


def _product_of_norms(wh, h_all):
    return np.cumprod(_norm_of_each_step(wh, h_all))


def _powers(size: Callable[[Array], float]) -> Answer:
    return lambda wh, h_all: size(wh) ** np.arange(len(h_all))


def _radius(jacobian: Array) -> float:
    return float(np.abs(np.linalg.eigvals(jacobian)).max())


def _smallest(jacobian: Array) -> float:
    return float(np.linalg.svd(jacobian, compute_uv=False)[-1])


def _from_the_front(wh, h_all):
    """d h_lag by h_0."""
    product, norms = np.eye(len(wh)), [1.0]
    for t in range(1, len(h_all)):
        product = _right_factor_of(wh, h_all, t) @ product
        norms.append(_spectral(product))
    return np.array(norms)


FACTOR = (
    "h_t = tanh(… + h_{t-1} wh) has the Jacobian diag(1 - h_t²) whᵀ: the slopes belong to the "
    "state that came out, one to each of its entries."
)
SPECTRAL = (
    "Asked for is the spectral norm of the product, its largest singular value: the most that a "
    "gradient can be stretched on the way. np.linalg.norm(J, 2)."
)

LAG_WAYS: tuple[tuple[str, str, str, tuple[Answer, ...]], ...] = (
    (
        "Frobenius norm",
        SPECTRAL + " Without the 2 it is Frobenius's, which is √H at lag 0.",
        LAG,
        (
            _lag_with(norm=lambda j: float(np.linalg.norm(j))),
            _lag_with(norm=lambda j: float(np.linalg.norm(j)) / len(j) ** 0.5),
        ),
    ),
    (
        "another norm",
        SPECTRAL,
        LAG,
        (
            _lag_with(norm=lambda j: float(np.linalg.norm(j, 1))),
            _lag_with(norm=lambda j: float(np.linalg.norm(j, np.inf))),
            _lag_with(norm=lambda j: float(np.abs(j).max())),
            _lag_with(norm=lambda j: float(np.linalg.norm(j, "nuc"))),
        ),
    ),
    (
        "largest eigenvalue",
        SPECTRAL + " Eigenvalues say what many equal steps do in the end, not what these do.",
        LAG,
        (_lag_with(norm=_radius),),
    ),
    ("smallest singular value", SPECTRAL, LAG, (_lag_with(norm=_smallest),)),
    (
        "product of norms",
        "The norm of a product is at most the product of the norms, mostly less: what one step "
        "stretches, the next may shrink. Multiply the matrices, then take the norm.",
        LAG,
        (_product_of_norms,),
    ),
    (
        "norm of each step alone",
        "The gradient goes back through all steps between: the product of their Jacobians.",
        LAG,
        (_norm_of_each_step,),
    ),
    (
        "powers of wh's norm",
        "A bound, not the norm: wh's largest singular value to the power of the lag leaves out "
        "tanh′ and that the steps do not stretch the same directions.",
        LAG,
        (_powers(_spectral), _powers(_radius)),
    ),
    (
        "tanh′ forgotten",
        FACTOR,
        LAG,
        (_lag_with(factor=lambda wh, h_all, t: wh.T),),
    ),
    (
        "1+h²",
        FACTOR,
        LAG,
        (_lag_with(factor=lambda wh, h_all, t: (1 + h_all[t] ** 2)[:, None] * wh.T),),
    ),
    (
        "tanh′ of the state",
        "h_all holds states, which went through tanh already: the slope is 1 - h², not "
        "1 - tanh²(h).",
        LAG,
        (_lag_with(factor=lambda wh, h_all, t: (1 - np.tanh(h_all[t]) ** 2)[:, None] * wh.T),),
    ),
    (
        "wh not transposed",
        FACTOR + " With diag on the same side, wh in its place is another matrix.",
        LAG,
        (
            _lag_with(factor=lambda wh, h_all, t: (1 - h_all[t] ** 2)[:, None] * wh),
            _lag_with(factor=lambda wh, h_all, t: wh.T * (1 - h_all[t] ** 2)),
        ),
    ),
    (
        "slopes of the state before",
        FACTOR + " From h_{t-1} to h_t, that is h_t.",
        LAG,
        (_lag_with(shift=-1),),
    ),
    (
        "product in reverse order",
        "Matrices do not commute: seen from the end, J_{T-1} J_{T-2} …, each new one on the right.",
        LAG,
        (_lag_with(join=lambda product, factor: factor @ product),),
    ),
    (
        "from the first state on",
        "Lags count back from the last state: entry k belongs to h_{T-1} and h_{T-1-k}.",
        LAG,
        (_from_the_front,),
    ),
    (
        "largest lag first",
        "Entry 0 is lag 0, which is 1; the last one is the largest lag.",
        LAG,
        (_lag_with(finish=lambda norms: norms[::-1]),),
    ),
    (
        "lag 0 left out",
        "Entry 0 is lag 0: the last state by itself, 1. There are T entries.",
        LAG,
        (
            _lag_with(finish=lambda norms: norms[1:]),
            _lag_with(finish=lambda norms: np.append(norms[1:], 0.0)),
        ),
    ),
    (
        "squared",
        "The norm is the largest singular value; the largest eigenvalue of J Jᵀ is its square.",
        LAG,
        (_lag_with(finish=lambda norms: norms**2),),
    ),
    (
        "logarithm",
        "The norms themselves are asked for; take logarithms for the picture.",
        LAG,
        (_lag_with(finish=np.log), _lag_with(finish=np.log10)),
    ),
)

GRADIENT_NORM_BY_LAG = Exercise(
    id="gradient_norm_by_lag",
    chapter=CHAPTER,
    title="How far the gradient reaches",
    points=2,
    returns=("norms",),
    reference=library.gradient_norm_by_lag,
    oracle=quiet(_lag_forward_mode),
    cases=_lag_cases,
    mistakes=tuple(
        mistake
        for name, why, section, answers in LAG_WAYS
        for mistake in named(name, why, section, *answers)
    ),
)


EXERCISES = (
    RNN_BACKWARD,
    LSTM_STEP_FORWARD,
    LSTM_STEP_BACKWARD,
    LSTM_BACKWARD_EXERCISE,
    GRADIENT_NORM_BY_LAG,
)
