"""The bug hunt that ends chapter 7: six blocks to mend, and how mending goes wrong.

Each ``hunt_k`` is block k of attn_lessons.hunt with a right backward pass. Each of these is made
with its steps exposed, so that a wrong repair is the right pass with one step replaced. The first
mistake of each is the block as it was handed out. It is told without the place: the cases of an
exercise differ in sizes, and the fault shows in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from attn_lessons import hunt as handed_out
from attn_lessons.attention import attention_backward, attention_forward
from attn_lessons.feedforward import (
    ffn_backward_cached,
    ffn_forward,
    swiglu_backward_cached,
    swiglu_forward,
)
from attn_lessons.grading.catalogue import _blocks
from attn_lessons.grading.catalogue._blocks import by_complex_step
from attn_lessons.grading.catalogue._parts import named, quiet, scattered
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.hunt import ALPHA, part
from attn_lessons.hunt import named as in_part
from attn_lessons.multihead import (
    cross_attention_backward,
    cross_attention_forward,
    grouped_kv_backward,
    grouped_kv_forward,
    linear_backward,
    linear_forward,
    merge_heads,
    multihead_backward,
    multihead_backward_cached,
    multihead_forward,
    split_heads,
)
from attn_lessons.normalization import (
    layernorm_backward,
    layernorm_forward,
    rmsnorm_backward,
    rmsnorm_forward,
)
from attn_lessons.positions import rope, rope_backward

CHAPTER = "ch07_encoder"
HUNT = f"{CHAPTER}.html#ch07-hunt"
RESIDUAL = f"{CHAPTER}.html#ch07-residual"
NORMS = f"{CHAPTER}.html#ch07-norms"
SHARED = f"{CHAPTER}.html#ch07-tied"
DECODER = f"{CHAPTER}.html#ch07-decoder"
WRONG = f"{CHAPTER}.html#ch07-wrong"

Array = np.ndarray
Arrays = Mapping[str, Array]
Answer = Callable[..., Any]
Rng = np.random.Generator

MULTIHEAD = ("wq", "wk", "wv", "wo", "bq", "bk", "bv", "bo")


# --- inputs ---------------------------------------------------------------------------------


def _part(rng: Rng, name: str, c: int, f: int, c_kv: int) -> dict[str, Array]:
    """Parameters of one part: gains away from 1, biases away from 0."""
    shapes: dict[str, tuple[int, ...]] = {"gamma": (c,), "beta": (c,)}
    if name.endswith("attn"):
        shapes = {n: (c, c_kv if n in ("wk", "wv") else c) for n in MULTIHEAD[:4]}
        shapes |= {"bq": (c,), "bk": (c_kv,), "bv": (c_kv,), "bo": (c,)}
    elif name == "rms1" or name == "rms2":
        shapes, name = {"gamma": (c,)}, name.replace("rms", "norm")
    elif name == "ffn":
        shapes = {"w1": (c, f), "b1": (f,), "w2": (f, c), "b2": (c,)}
    elif name == "swiglu":
        shapes, name = {"w_gate": (c, f), "w_up": (c, f), "w_down": (f, c)}, "ffn"
    arrays = {n: rng.normal(size=s) * (s[0] ** -0.5 if s[1:] else 0.5) for n, s in shapes.items()}
    # Logits of a few units: where one probability is 1, a right answer has lost digits too.
    for n in {"wq", "wk"} & set(arrays):
        arrays[n] *= 0.8
    if "gamma" in arrays:
        arrays["gamma"] = np.where(arrays["gamma"] < 0, 0.6, 1.4) + 0.3 * arrays["gamma"]
    return in_part(name, **arrays)


def _causal_and_padded(rng: Rng, b: int, n: int) -> Array:
    """(B, 1, N, N): causal, and one sentence at least ends early."""
    lengths = np.append(rng.integers(2, n + 1, size=b - 1), n - 1)
    return np.tri(n, dtype=bool) & (np.arange(n) < lengths[:, None, None, None])


def _padded(rng: Rng, b: int, n: int) -> Array:
    """(B, 1, 1, N): every memory ends early."""
    return np.arange(n) < rng.integers(1, n, size=b)[:, None, None, None]


Sizes = tuple[str, tuple[int, int, int, int, int], str]

SIZES: tuple[Sizes, ...] = (
    ("one sentence", (1, 4, 2, 3, 5), "B = 1, N = 4, two heads of width 3, F = 5."),
    ("a batch", (4, 5, 2, 3, 7), "B 4, N 5, H 2, d 3, C 6, F 7: all different."),
    ("three heads", (2, 4, 3, 1, 5), "B 2, N 4, H 3, d 1, F 5."),
    ("many tokens", (2, 6, 2, 2, 3), "More tokens than columns."),
    ("one head", (2, 3, 1, 4, 5), "H = 1."),
    ("narrow inside", (3, 4, 2, 2, 1), "F = 1 is less than C = 4."),
)
GROUPED: tuple[Sizes, ...] = (
    ("one sentence", (1, 3, 4, 2, 5), "B = 1, N = 3, four heads of width 2."),
    ("a batch", (3, 5, 4, 2, 7), "B 3, N 5, H 4, d 2, C 8, F 7: all different."),
    ("six heads", (1, 4, 6, 2, 3), "N 4, H 6, d 2, F 3."),
    ("many tokens", (2, 6, 4, 2, 3), "N = 6."),
    ("two sentences", (2, 3, 4, 2, 5), "B = 2, N = 3."),
    ("narrow inside", (3, 4, 4, 2, 1), "F = 1 is less than C = 8."),
)


def _cases(*parts: str, memory: bool = False, grouped: bool = False) -> Callable[[Rng], list[Case]]:
    """Calls of several sizes, masks on."""

    def call(rng: Rng, b: int, n: int, h: int, d: int, f: int, n_k: int = 5) -> list[Any]:
        c = h * d
        c_kv = (2 if h == 4 else 3) * d if grouped else c
        params: dict[str, Array] = {}
        for name in parts:
            params |= _part(rng, name, c, f, c_kv)
        x = rng.normal(0.3, rng.uniform(1.4, 1.9), size=(b, n, c))
        args = [rng.normal(size=(b, n, c)), x, params, h, _causal_and_padded(rng, b, n)]
        if memory:
            args.insert(2, rng.normal(size=(b, n_k, c)))
            args.append(_padded(rng, b, n_k))
        return args

    def cases(rng: Rng) -> list[Case]:
        sizes = GROUPED if grouped else SIZES
        made = [Case(name, tuple(call(rng, *size)), hint=hint) for name, size, hint in sizes]
        silent = call(rng, *sizes[4][1])
        one = np.zeros_like(silent[0])
        # Late in a sentence, so that it sees several tokens.
        one[rng.integers(len(one)), -1 - rng.integers(2)] = rng.normal(size=one.shape[-1])
        silent[0] = one
        free = call(rng, *sizes[3][1])
        free[5 if memory else 4] = None
        laid = [scattered(a) if isinstance(a, Array) else a for a in call(rng, *sizes[5][1])]
        made += [
            Case("upstream in one token", tuple(silent), hint="The loss reads one token."),
            Case("no mask over x", tuple(free), hint="mask is None."),
            Case("not contiguous in memory", tuple(laid), hint="The same numbers, laid out anew."),
        ]
        if memory:
            alike = call(rng, 2, 4, 2, 2, 3, n_k=4)
            text = "Nq = Nk: x and memory fit in each other's place."
            made.append(Case("as many keys as queries", tuple(alike), hint=text))
        return made

    return cases


def _still_there(block: Answer) -> tuple[Mistake, ...]:
    return (
        Mistake(
            "the bug is still there",
            "These are the numbers of the block as it was handed out.",
            HUNT,
            quiet(block),
            observed=True,
        ),
    )


def _order(*backwards: str, first: tuple[str, ...] = (), last: tuple[str, ...] = ("dx",)) -> Any:
    """The names in the order of the backward pass: parts from the output down, then dx."""
    return (*first, *(f"grads['{name}']" for name in backwards), *last)


def _names(part_name: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{part_name}.{name}" for name in names)


FFN = _names("ffn", "w2", "b2", "w1", "b1")
SWIGLU = _names("ffn", "w_down", "w_up", "w_gate")
SELF = _names("self_attn", "wo", "bo", "wv", "bv", "wq", "bq", "wk", "bk")
CROSS = _names("cross_attn", "wo", "bo", "wv", "bv", "wq", "bq", "wk", "bk")
NORM1, NORM2, NORM3 = (_names(f"norm{i}", "gamma", "beta") for i in (1, 2, 3))


def _slopes(dout: Array, forward: Callable[[Arrays], Array], **given: Any) -> Iterator[Any]:
    """dx, dmemory where there is one, and the gradients by name."""
    params = given.pop("params")
    found = by_complex_step(dout, given | params, forward)
    yield from (found[name] for name in given)
    yield {name: found[name] for name in params}


# --- 1: post-norm, the skip path times alpha -----------------------------------------------------


def _sum_1(dfed: Array, dsecond: Array, dout: Array) -> Array:
    return dfed + ALPHA * dsecond


def _way_1(
    da: Callable[..., Array] = _sum_1,
    dfirst: Callable[..., Array] = lambda dfirst, dsecond: dfirst,
    dx: Callable[..., Array] = lambda dx, dfirst, dsecond: dx + ALPHA * dfirst,
) -> Answer:
    def answer(dout, x, params, n_heads, mask=None):
        own = part(params, "self_attn")
        attended, attn = multihead_forward(x, n_heads=n_heads, mask=mask, **own)
        first = ALPHA * x + attended
        a = layernorm_forward(first, **part(params, "norm1"))
        fed, feed = ffn_forward(a, **part(params, "ffn"))
        second = ALPHA * a + fed
        dsecond, *norm2 = layernorm_backward(dout, second, params["norm2.gamma"])
        dfed, dfeed = ffn_backward_cached(dsecond, feed)
        below, *norm1 = layernorm_backward(da(dfed, dsecond, dout), first, params["norm1.gamma"])
        below = dfirst(below, dsecond)
        through, dattn = multihead_backward_cached(below, attn)
        grads = in_part("self_attn", **dattn) | in_part("ffn", **dfeed)
        grads |= in_part("norm1", gamma=norm1[0], beta=norm1[1])
        grads |= in_part("norm2", gamma=norm2[0], beta=norm2[1])
        return dx(through, below, dsecond), grads

    return answer


def hunt_1(dout, x, params, n_heads, mask=None):
    """Block 1's gradients."""
    return _way_1()(dout, x, params, n_heads, mask)


def _slopes_1(dout, x, params, n_heads, mask=None):
    def forward(p: Arrays) -> Array:
        y = ALPHA * p["x"] + _blocks.attention(p["x"], p["x"], part(p, "self_attn"), n_heads, mask)
        a = _blocks.layer_norm(y, **part(p, "norm1"))
        out = ALPHA * a + _blocks.feed_forward(a, **part(p, "ffn"))
        return _blocks.layer_norm(out, **part(p, "norm2"))

    return tuple(_slopes(dout, forward, x=x, params=params))


HUNT_1 = Exercise(
    id="hunt_1",
    chapter=CHAPTER,
    title="Mend block 1: the norm after the sum",
    points=2,
    returns=("dx", "grads"),
    reference=hunt_1,
    oracle=_slopes_1,
    cases=_cases("self_attn", "norm1", "ffn", "norm2"),
    tokens=("dx",),
    order=_order(*NORM2, *FFN, *NORM1, *SELF),
    mistakes=(
        *_still_there(handed_out.block_1_backward),
        *named(
            "skip path without its factor",
            "a enters the second sum as α a: its gradient by this way is α times the sum's, not "
            "the sum's alone.",
            RESIDUAL,
            _way_1(da=lambda dfed, dsecond, dout: dfed + dsecond),
        ),
        *named(
            "skip path past the norm",
            "The sum stands inside the norm: what comes back by the skip path is the gradient "
            "after the norm's backward pass, not dout.",
            NORMS,
            _way_1(da=lambda dfed, dsecond, dout: dfed + ALPHA * dout),
            _way_1(da=lambda dfed, dsecond, dout: dfed + dout),
        ),
        *named(
            "factor on both paths",
            "Only the skip path is multiplied by α; the feed-forward layer's output enters the sum "
            "as it is.",
            RESIDUAL,
            _way_1(da=lambda dfed, dsecond, dout: ALPHA * (dfed + dsecond)),
            _way_1(da=lambda dfed, dsecond, dout: ALPHA * dfed + dsecond),
            _way_1(
                dx=lambda dx, dfirst, dsecond: ALPHA * (dx + dfirst),
            ),
        ),
        *named(
            "skip path added below the norm",
            "The skip path starts at a, behind the first norm: its gradient goes through that "
            "norm's backward pass too.",
            RESIDUAL,
            _way_1(
                da=lambda dfed, dsecond, dout: dfed,
                dfirst=lambda dfirst, dsecond: dfirst + ALPHA * dsecond,
            ),
            _way_1(
                da=lambda dfed, dsecond, dout: dfed,
                dfirst=lambda dfirst, dsecond: dfirst + dsecond,
            ),
        ),
        *named(
            "skip path added to dx only",
            "What comes back to a by the skip path has the first norm and the attention still "
            "before it: added at the very end, it misses both.",
            RESIDUAL,
            *(
                _way_1(
                    da=lambda dfed, dsecond, dout: dfed,
                    dx=lambda dx, dfirst, dsecond, factor=factor: (
                        dx + ALPHA * dfirst + factor * dsecond
                    ),
                )
                for factor in (1.0, ALPHA, ALPHA**2)
            ),
        ),
        *named(
            "skip path counted twice",
            "There is one skip path around each sublayer, and its gradient is added once.",
            RESIDUAL,
            _way_1(da=lambda dfed, dsecond, dout: dfed + 2 * ALPHA * dsecond),
            _way_1(dx=lambda dx, dfirst, dsecond: dx + 2 * ALPHA * dfirst),
        ),
    ),
)


# --- 2: one layer applied twice ------------------------------------------------------------------


def _both_2(second: Array, first: Array, name: str) -> Array:
    return second + first


def _way_2(combined: Callable[[Array, Array, str], Array] = _both_2) -> Answer:
    """``combined`` makes one gradient of those of the second and the first use."""

    def answer(dout, x, params, n_heads, mask=None):
        own, ffn = part(params, "self_attn"), part(params, "ffn")
        steps = []
        for _ in range(2):
            normed = layernorm_forward(x, **part(params, "norm1"))
            attended, attn = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
            a = x + attended
            fed, feed = ffn_forward(layernorm_forward(a, **part(params, "norm2")), **ffn)
            steps.append((x, attn, a, feed))
            x = a + fed
        uses, dx = [], dout
        for x, attn, a, feed in reversed(steps):
            dnormed, dfeed = ffn_backward_cached(dx, feed)
            da, *norm2 = layernorm_backward(dnormed, a, params["norm2.gamma"])
            da = dx + da
            dnormed, dattn = multihead_backward_cached(da, attn)
            through, *norm1 = layernorm_backward(dnormed, x, params["norm1.gamma"])
            dx = da + through
            grads = in_part("self_attn", **dattn) | in_part("ffn", **dfeed)
            grads |= in_part("norm1", gamma=norm1[0], beta=norm1[1])
            uses.append(grads | in_part("norm2", gamma=norm2[0], beta=norm2[1]))
        return dx, {name: combined(uses[0][name], uses[1][name], name) for name in uses[0]}

    return answer


def hunt_2(dout, x, params, n_heads, mask=None):
    """Block 2's gradients."""
    return _way_2()(dout, x, params, n_heads, mask)


def _slopes_2(dout, x, params, n_heads, mask=None):
    def forward(p: Arrays) -> Array:
        x = p["x"]
        for _ in range(2):
            y = _blocks.layer_norm(x, **part(p, "norm1"))
            x = x + _blocks.attention(y, y, part(p, "self_attn"), n_heads, mask)
            y = _blocks.layer_norm(x, **part(p, "norm2"))
            x = x + _blocks.feed_forward(y, **part(p, "ffn"))
        return x

    return tuple(_slopes(dout, forward, x=x, params=params))


def _added_up_only(*parts: str) -> Answer:
    """The gradients of some parts added up, those of the rest overwritten."""
    return _way_2(lambda second, first, name: second + first if name.startswith(parts) else first)


HUNT_2 = Exercise(
    id="hunt_2",
    chapter=CHAPTER,
    title="Mend block 2: one layer, applied twice",
    points=2,
    returns=("dx", "grads"),
    reference=hunt_2,
    oracle=_slopes_2,
    cases=_cases("norm1", "self_attn", "norm2", "ffn"),
    tokens=("dx",),
    order=_order(*FFN, *NORM2, *SELF, *NORM1),
    mistakes=(
        *_still_there(handed_out.block_2_backward),
        *named(
            "the other use only",
            "A parameter that is used twice gets a gradient from both uses, and they add up: here "
            "the first use's is lost in place of the second's.",
            SHARED,
            _way_2(lambda second, first, name: second),
        ),
        *named(
            "averaged over the uses",
            "The gradients of a parameter's uses are added, not averaged.",
            SHARED,
            _way_2(lambda second, first, name: (second + first) / 2),
        ),
        *named(
            "only some parameters added up",
            "Every parameter of the layer is used twice, those of the norms and the biases too: "
            "all their gradients add up.",
            SHARED,
            _added_up_only("self_attn", "ffn"),
            _added_up_only("norm1", "norm2"),
            _added_up_only("self_attn"),
            _added_up_only("ffn"),
            _added_up_only("norm1"),
            _added_up_only("norm2"),
        ),
        *named(
            "one use counted twice",
            "The two uses see different inputs: twice the gradient of one is not the sum of both.",
            SHARED,
            _way_2(lambda second, first, name: 2 * first),
            _way_2(lambda second, first, name: 2 * second),
        ),
        *named(
            "sum started with what is added",
            "In a sum over the uses every use enters once: one that is stored first and then "
            "added as well counts double.",
            SHARED,
            _way_2(lambda second, first, name: 2 * second + first),
            _way_2(lambda second, first, name: second + 2 * first),
        ),
    ),
)


# --- 3: grouped key heads, rotary positions ------------------------------------------------------


def _way_3(
    keys: Callable[[Array, int], Array] = grouped_kv_backward,
    values: Callable[[Array, int], Array] = grouped_kv_backward,
    repeated: Callable[[Array, int], Array] = grouped_kv_forward,
    turned_back: Callable[..., Array] = rope_backward,
) -> Answer:
    def answer(dout, x, params, n_heads, mask=None):
        p, positions = part(params, "self_attn"), np.arange(x.shape[1])
        n_kv_heads = n_heads * p["wk"].shape[1] // p["wq"].shape[1]
        normed = layernorm_forward(x, **part(params, "norm1"))
        q = split_heads(linear_forward(normed, p["wq"], p["bq"]), n_heads)
        k = split_heads(linear_forward(normed, p["wk"], p["bk"]), n_kv_heads)
        v = split_heads(linear_forward(normed, p["wv"], p["bv"]), n_kv_heads)
        q, k = rope(q, positions), repeated(rope(k, positions), n_heads)
        v = repeated(v, n_heads)
        heads, probs = attention_forward(q, k, v, mask)
        merged = merge_heads(heads)
        a = x + linear_forward(merged, p["wo"], p["bo"])
        normed2 = layernorm_forward(a, **part(params, "norm2"))
        _, feed = ffn_forward(normed2, **part(params, "ffn"))
        dnormed2, dfeed = ffn_backward_cached(dout, feed)
        da, *norm2 = layernorm_backward(dnormed2, a, params["norm2.gamma"])
        da = dout + da
        dmerged, dwo, dbo = linear_backward(da, merged, p["wo"])
        dq, dk, dv = attention_backward(split_heads(dmerged, n_heads), q, k, v, probs)
        dk, dv = keys(dk, n_kv_heads), values(dv, n_kv_heads)
        rows = merge_heads(rope_backward(dq, positions)), merge_heads(turned_back(dk, positions))
        dx_q, dwq, dbq = linear_backward(rows[0], normed, p["wq"])
        dx_k, dwk, dbk = linear_backward(rows[1], normed, p["wk"])
        dx_v, dwv, dbv = linear_backward(merge_heads(dv), normed, p["wv"])
        dx, *norm1 = layernorm_backward(dx_q + dx_k + dx_v, x, params["norm1.gamma"])
        every = (dwq, dwk, dwv, dwo, dbq, dbk, dbv, dbo)
        grads = in_part("self_attn", **dict(zip(MULTIHEAD, every, strict=True)))
        grads |= in_part("norm1", gamma=norm1[0], beta=norm1[1]) | in_part("ffn", **dfeed)
        return da + dx, grads | in_part("norm2", gamma=norm2[0], beta=norm2[1])

    return answer


def hunt_3(dout, x, params, n_heads, mask=None):
    """Block 3's gradients."""
    return _way_3()(dout, x, params, n_heads, mask)


def _slopes_3(dout, x, params, n_heads, mask=None):
    def forward(p: Arrays) -> Array:
        y = _blocks.layer_norm(p["x"], **part(p, "norm1"))
        own = part(p, "self_attn")
        a = p["x"] + _blocks.attention(y, y, own, n_heads, mask, turned=True)
        y = _blocks.layer_norm(a, **part(p, "norm2"))
        return a + _blocks.feed_forward(y, **part(p, "ffn"))

    return tuple(_slopes(dout, forward, x=x, params=params))


def _in_groups(g: Array, n_kv_heads: int) -> Array:
    b, h, n, d = g.shape
    return g.reshape(b, n_kv_heads, h // n_kv_heads, n, d)


def _mean_of_group(g: Array, n_kv_heads: int) -> Array:
    return _in_groups(g, n_kv_heads).mean(axis=2)


def _dealt_out(g: Array, n_kv_heads: int) -> Array:
    b, _, n, d = g.shape
    return g.reshape(b, -1, n_kv_heads, n, d).sum(axis=1)


def _one_of_group(which: int) -> Callable[[Array, int], Array]:
    return lambda g, n_kv_heads: _in_groups(g, n_kv_heads)[:, :, which]


def _counts_exchanged(g: Array, n_kv_heads: int) -> Array:
    b, _, n, d = g.shape
    return g.reshape(b, -1, n_kv_heads, n, d).sum(axis=2)


def _tiled(k: Array, n_heads: int) -> Array:
    return np.tile(k, (1, n_heads // k.shape[1], 1, 1))


HUNT_3 = Exercise(
    id="hunt_3",
    chapter=CHAPTER,
    title="Mend block 3: grouped key heads, rotary positions",
    points=2,
    returns=("dx", "grads"),
    reference=hunt_3,
    oracle=_slopes_3,
    cases=_cases("norm1", "self_attn", "norm2", "ffn", grouped=True),
    tokens=("dx",),
    order=_order(
        *FFN, *NORM2, *_names("self_attn", "wo", "bo", "wv", "bv", "wq", "bq", "wk", "bk"), *NORM1
    ),
    mistakes=(
        *_still_there(handed_out.block_3_backward),
        *named(
            "mended for the keys only",
            "Values were repeated for their groups as keys were, and come back together in the "
            "same way.",
            HUNT,
            _way_3(values=_dealt_out),
        ),
        *named(
            "mended for the values only",
            "Keys were repeated for their groups as values were, and come back together in the "
            "same way.",
            HUNT,
            _way_3(keys=_dealt_out),
        ),
        *named(
            "mean over a group",
            "A key head that serves a group of query heads collects a gradient from each: they "
            "add up.",
            HUNT,
            _way_3(_mean_of_group, _mean_of_group),
            _way_3(keys=_mean_of_group),
            _way_3(values=_mean_of_group),
        ),
        *named(
            "one head of a group",
            "Every query head of a group sends a gradient back to the key head; one is kept here.",
            HUNT,
            _way_3(_one_of_group(0), _one_of_group(0)),
            _way_3(_one_of_group(-1), _one_of_group(-1)),
        ),
        *named(
            "number and size of groups exchanged",
            "n_kv_heads is the number of groups: the axis of heads is split into (H_kv, G), and "
            "the sum runs over G.",
            HUNT,
            _way_3(_counts_exchanged, _counts_exchanged),
        ),
        *named(
            "the forward pass changed instead",
            "The forward pass is right: query head h reads key head h // G. Another forward pass "
            "agrees with the backward pass it was made for, and with nothing else.",
            HUNT,
            _way_3(_dealt_out, _dealt_out, _tiled),
        ),
        *named(
            "turned on instead of back",
            "The transpose of a rotation is the rotation back: rope_backward turns by the "
            "opposite angle.",
            HUNT,
            _way_3(turned_back=rope),
            _way_3(_dealt_out, _dealt_out, turned_back=rope),
        ),
    ),
)


# --- 4: RMSNorm and SwiGLU -----------------------------------------------------------------------


def _norm_4(dnormed: Array, x: Array, normed: Array, a: Array, gamma: Array) -> Any:
    return rmsnorm_backward(dnormed, x, gamma)


def _way_4(
    first: Callable[..., Any] = _norm_4,
    skip: Callable[[Array, Array], Array] = lambda da, dx: da + dx,
) -> Answer:
    def answer(dout, x, params, n_heads, mask=None):
        gamma1, gamma2 = params["norm1.gamma"], params["norm2.gamma"]
        normed1, own = rmsnorm_forward(x, gamma1), part(params, "self_attn")
        attended, attn = multihead_forward(normed1, n_heads=n_heads, mask=mask, **own)
        a = x + attended
        _, feed = swiglu_forward(rmsnorm_forward(a, gamma2), **part(params, "ffn"))
        dnormed2, dfeed = swiglu_backward_cached(dout, feed)
        da, dgamma2 = rmsnorm_backward(dnormed2, a, gamma2)
        da = dout + da
        dnormed1, dattn = multihead_backward_cached(da, attn)
        dx, dgamma1 = first(dnormed1, x, normed1, a, gamma1)
        grads = in_part("self_attn", **dattn) | in_part("ffn", **dfeed)
        grads |= in_part("norm1", gamma=dgamma1) | in_part("norm2", gamma=dgamma2)
        return skip(da, dx), grads

    return answer


def hunt_4(dout, x, params, n_heads, mask=None):
    """Block 4's gradients."""
    return _way_4()(dout, x, params, n_heads, mask)


def _slopes_4(dout, x, params, n_heads, mask=None):
    def forward(p: Arrays) -> Array:
        y = _blocks.rms_norm(p["x"], p["norm1.gamma"])
        a = p["x"] + _blocks.attention(y, y, part(p, "self_attn"), n_heads, mask)
        y, ffn = _blocks.rms_norm(a, p["norm2.gamma"]), part(p, "ffn")
        active = _blocks.silu(_blocks.linear(y, ffn["w_gate"])) * _blocks.linear(y, ffn["w_up"])
        return a + _blocks.linear(active, ffn["w_down"])

    return tuple(_slopes(dout, forward, x=x, params=params))


def _rms(x: Array) -> Array:
    return np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)


def _divided_4(dnormed, x, normed, a, gamma):
    dx, dgamma = rmsnorm_backward(dnormed, normed, gamma)
    return dx / _rms(x), dgamma


def _new_gamma_only_4(dnormed, x, normed, a, gamma):
    return rmsnorm_backward(dnormed, normed, gamma)[0], rmsnorm_backward(dnormed, x, gamma)[1]


def _constant_size_4(dnormed, x, normed, a, gamma):
    return gamma * dnormed / _rms(x), rmsnorm_backward(dnormed, x, gamma)[1]


HUNT_4 = Exercise(
    id="hunt_4",
    chapter=CHAPTER,
    title="Mend block 4: RMSNorm and SwiGLU",
    points=2,
    returns=("dx", "grads"),
    reference=hunt_4,
    oracle=_slopes_4,
    cases=_cases("rms1", "self_attn", "rms2", "swiglu"),
    tokens=("dx",),
    order=_order(*SWIGLU, "norm2.gamma", *SELF, "norm1.gamma"),
    mistakes=(
        *_still_there(handed_out.block_4_backward),
        *named(
            "LayerNorm's backward pass",
            "The forward pass has RMSNorm: nothing is centred, and no mean is taken off backwards.",
            NORMS,
            _way_4(lambda dy, x, normed, a, gamma: layernorm_backward(dy, x, gamma)[:2]),
            _way_4(lambda dy, x, normed, a, gamma: layernorm_backward(dy, normed, gamma)[:2]),
        ),
        *named(
            "gain taken out instead",
            "A norm's backward pass wants what went into the norm. Of a row that is normalised "
            "already, with or without its gain, the size by which it was divided is lost.",
            NORMS,
            _way_4(lambda dy, x, normed, a, gamma: rmsnorm_backward(dy, x / _rms(x), gamma)),
            _way_4(
                lambda dy, x, normed, a, gamma: rmsnorm_backward(dy, normed, np.ones_like(gamma))
            ),
        ),
        *named(
            "input of the other norm",
            "Each norm's backward pass takes the input of that norm: of the first it is x, of the "
            "second a.",
            NORMS,
            _way_4(lambda dy, x, normed, a, gamma: rmsnorm_backward(dy, a, gamma)),
        ),
        *named(
            "size put right afterwards",
            "Dividing by the row's size mends part of dx; along the row, and in the gain's "
            "gradient, the wrong input is still there.",
            NORMS,
            _way_4(_divided_4),
        ),
        *named(
            "mended for the gain only",
            "dx and the gain's gradient come from the same call, with the norm's input.",
            NORMS,
            _way_4(_new_gamma_only_4),
        ),
        *named(
            "norm gradient skipped",
            "The gradient that leaves the attention goes through the norm before it joins the "
            "skip path.",
            NORMS,
            _way_4(lambda dy, x, normed, a, gamma: (dy, rmsnorm_backward(dy, x, gamma)[1])),
            _way_4(_constant_size_4),
        ),
        *named(
            "skip path forgotten",
            "x reaches a by two ways, through the attention and past it: both gradients add up.",
            RESIDUAL,
            _way_4(skip=lambda da, dx: dx),
        ),
    ),
)


# --- 5: a decoder's block ------------------------------------------------------------------------


def _cross_5(dread, normed, memory, cross, n_heads, mask, memory_mask):
    return cross_attention_backward(
        dread, normed, memory, n_heads=n_heads, mask=memory_mask, **cross
    )


def _way_5(
    read_backward: Callable[..., Any] = _cross_5,
    read_mask: Callable[..., Any] = lambda mask: mask,
    own_mask: Callable[..., Any] = lambda mask: mask,
) -> Answer:
    def answer(dout, x, memory, params, n_heads, mask=None, memory_mask=None):
        own, cross = part(params, "self_attn"), part(params, "cross_attn")
        normed1 = layernorm_forward(x, **part(params, "norm1"))
        a = x + multihead_forward(normed1, n_heads=n_heads, mask=mask, **own)[0]
        normed2 = layernorm_forward(a, **part(params, "norm2"))
        b = (
            a
            + cross_attention_forward(
                normed2, memory, n_heads=n_heads, mask=read_mask(memory_mask), **cross
            )[0]
        )
        _, feed = ffn_forward(layernorm_forward(b, **part(params, "norm3")), **part(params, "ffn"))
        dnormed3, dfeed = ffn_backward_cached(dout, feed)
        db, *norm3 = layernorm_backward(dnormed3, b, params["norm3.gamma"])
        db = dout + db
        dnormed2, dmemory, dcross = read_backward(
            db, normed2, memory, cross, n_heads, mask, memory_mask
        )
        da, *norm2 = layernorm_backward(dnormed2, a, params["norm2.gamma"])
        da = db + da
        dnormed1, dself = multihead_backward(
            da, normed1, n_heads=n_heads, mask=own_mask(mask), **own
        )
        dx, *norm1 = layernorm_backward(dnormed1, x, params["norm1.gamma"])
        grads = in_part("self_attn", **dself) | in_part("cross_attn", **dcross)
        for i, (dgamma, dbeta) in enumerate((norm1, norm2, norm3), 1):
            grads |= in_part(f"norm{i}", gamma=dgamma, beta=dbeta)
        return da + dx, dmemory, grads | in_part("ffn", **dfeed)

    return answer


def hunt_5(dout, x, memory, params, n_heads, mask=None, memory_mask=None):
    """Block 5's gradients."""
    return _way_5()(dout, x, memory, params, n_heads, mask, memory_mask)


def _slopes_5(dout, x, memory, params, n_heads, mask=None, memory_mask=None):
    def forward(p: Arrays) -> Array:
        y = _blocks.layer_norm(p["x"], **part(p, "norm1"))
        a = p["x"] + _blocks.attention(y, y, part(p, "self_attn"), n_heads, mask)
        y, cross = _blocks.layer_norm(a, **part(p, "norm2")), part(p, "cross_attn")
        b = a + _blocks.attention(y, p["memory"], cross, n_heads, memory_mask)
        y = _blocks.layer_norm(b, **part(p, "norm3"))
        return b + _blocks.feed_forward(y, **part(p, "ffn"))

    return tuple(_slopes(dout, forward, x=x, memory=memory, params=params))


def _zeroed_5(dread, normed, memory, cross, n_heads, mask, memory_mask):
    """The padding's rows of dmemory set to 0, all else as without a mask."""
    dnormed, dmemory, grads = cross_attention_backward(
        dread, normed, memory, n_heads=n_heads, **cross
    )
    return dnormed, dmemory * memory_mask[:, 0, 0, :, None], grads


def _zero_memory_5(dread, normed, memory, cross, n_heads, mask, memory_mask):
    """The padding's rows of memory set to 0 before it is read without a mask."""
    blank = memory * memory_mask[:, 0, 0, :, None]
    dnormed, dmemory, grads = cross_attention_backward(
        dread, normed, blank, n_heads=n_heads, **cross
    )
    return dnormed, dmemory, grads


def _masked_by(choose: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def read_backward(dread, normed, memory, cross, n_heads, mask, memory_mask):
        chosen = choose(mask, memory_mask)
        return _cross_5(dread, normed, memory, cross, n_heads, mask, chosen)

    return read_backward


HUNT_5 = Exercise(
    id="hunt_5",
    chapter=CHAPTER,
    title="Mend block 5: a decoder's block",
    points=2,
    returns=("dx", "dmemory", "grads"),
    reference=hunt_5,
    oracle=_slopes_5,
    cases=_cases("norm1", "self_attn", "norm2", "cross_attn", "norm3", "ffn", memory=True),
    tokens=("dx", "dmemory"),
    order=_order(*FFN, *NORM3, *CROSS, last=("dmemory",)) + _order(*NORM2, *SELF, *NORM1),
    mistakes=(
        *_still_there(handed_out.block_5_backward),
        *named(
            "the other mask",
            "mask says what x may see of itself, memory_mask what it may see of the memory: the "
            "shapes differ, unless both have as many tokens.",
            DECODER,
            _way_5(_masked_by(lambda mask, memory_mask: mask)),
        ),
        *named(
            "mask the other way round",
            "True = may attend. A mask turned round lets x see the padding and nothing else.",
            DECODER,
            _way_5(_masked_by(lambda mask, memory_mask: ~memory_mask)),
        ),
        *named(
            "padding zeroed afterwards",
            "Zeros in dmemory hide what padding took part in: probabilities made without a mask "
            "are too small everywhere else.",
            DECODER,
            _way_5(_zeroed_5),
        ),
        *named(
            "padding zeroed beforehand",
            "A memory of zeros still has keys, those of the bias, and takes its share of every "
            "row of probabilities: padding has to be masked.",
            DECODER,
            _way_5(_zero_memory_5),
        ),
        *named(
            "the forward pass changed instead",
            "The forward pass masks the memory's padding, and is right. Without its mask it agrees "
            "with the backward pass, and both are wrong.",
            DECODER,
            _way_5(_masked_by(lambda mask, memory_mask: None), read_mask=lambda mask: None),
        ),
        *named(
            "mask lost in the self-attention",
            "The self-attention has a mask of its own, in the backward pass as in the forward.",
            DECODER,
            _way_5(own_mask=lambda mask: None),
            _way_5(_masked_by(lambda mask, memory_mask: None), own_mask=lambda mask: None),
        ),
    ),
)


# --- 6: attention and feed-forward side by side --------------------------------------------------


def _way_6(
    dnormed: Callable[[Array, Array], Array] = lambda from_attn, from_ffn: from_attn + from_ffn,
    dx: Callable[[Array, Array], Array] = lambda dout, dbranches: dout + dbranches,
    upstream: Callable[[Array], Array] = lambda dout: dout,
) -> Answer:
    def answer(dout, x, params, n_heads, mask=None):
        normed = layernorm_forward(x, **part(params, "norm"))
        own = part(params, "self_attn")
        _, attn = multihead_forward(normed, n_heads=n_heads, mask=mask, **own)
        _, feed = ffn_forward(normed, **part(params, "ffn"))
        from_attn, dattn = multihead_backward_cached(upstream(dout), attn)
        from_ffn, dfeed = ffn_backward_cached(upstream(dout), feed)
        dbranches, dgamma, dbeta = layernorm_backward(
            dnormed(from_attn, from_ffn), x, params["norm.gamma"]
        )
        grads = in_part("self_attn", **dattn) | in_part("ffn", **dfeed)
        return dx(dout, dbranches), grads | in_part("norm", gamma=dgamma, beta=dbeta)

    return answer


def hunt_6(dout, x, params, n_heads, mask=None):
    """Block 6's gradients."""
    return _way_6()(dout, x, params, n_heads, mask)


def _slopes_6(dout, x, params, n_heads, mask=None):
    def forward(p: Arrays) -> Array:
        y = _blocks.layer_norm(p["x"], **part(p, "norm"))
        attended = _blocks.attention(y, y, part(p, "self_attn"), n_heads, mask)
        return p["x"] + attended + _blocks.feed_forward(y, **part(p, "ffn"))

    return tuple(_slopes(dout, forward, x=x, params=params))


def _spoiled_6(dout, x, params, n_heads, mask=None):
    """One branch after the other, the second fed what the first has changed."""
    gamma = params["norm.gamma"]
    normed = layernorm_forward(x, **part(params, "norm"))
    _, attn = multihead_forward(normed, n_heads=n_heads, mask=mask, **part(params, "self_attn"))
    _, feed = ffn_forward(normed, **part(params, "ffn"))
    dx = np.array(dout)
    from_attn, dattn = multihead_backward_cached(dx, attn)
    one, dgamma, dbeta = layernorm_backward(from_attn, x, gamma)
    dx = dx + one
    from_ffn, dfeed = ffn_backward_cached(dx, feed)
    other, more_gamma, more_beta = layernorm_backward(from_ffn, x, gamma)
    grads = in_part("self_attn", **dattn) | in_part("ffn", **dfeed)
    norm = in_part("norm", gamma=dgamma + more_gamma, beta=dbeta + more_beta)
    return dx + other, grads | norm


HUNT_6 = Exercise(
    id="hunt_6",
    chapter=CHAPTER,
    title="Mend block 6: attention and feed-forward side by side",
    points=2,
    returns=("dx", "grads"),
    reference=hunt_6,
    oracle=_slopes_6,
    cases=_cases("norm", "self_attn", "ffn"),
    tokens=("dx",),
    order=_order(*FFN, *SELF, *_names("norm", "gamma", "beta")),
    mistakes=(
        *_still_there(handed_out.block_6_backward),
        *named(
            "skip path lost",
            "x reaches the output past both branches too: dout itself is part of dx.",
            RESIDUAL,
            _way_6(dx=lambda dout, dbranches: dbranches),
            _way_6(
                dx=lambda dout, dbranches: dbranches, upstream=lambda dout: np.zeros(dout.shape)
            ),
        ),
        *named(
            "skip path counted twice",
            "There is one skip path past both branches, not one past each.",
            RESIDUAL,
            _way_6(dx=lambda dout, dbranches: 2 * dout + dbranches),
        ),
        *named(
            "one branch's gradient dropped",
            "Both branches read the norm's output: both gradients arrive there, and add up.",
            HUNT,
            _way_6(dnormed=lambda from_attn, from_ffn: from_attn),
            _way_6(dnormed=lambda from_attn, from_ffn: from_ffn),
        ),
        *named(
            "one branch's gradient counted twice",
            "Each branch's gradient arrives at the norm's output once.",
            HUNT,
            _way_6(dnormed=lambda from_attn, from_ffn: from_attn + 2 * from_ffn),
            _way_6(dnormed=lambda from_attn, from_ffn: 2 * from_attn + from_ffn),
            _way_6(dnormed=lambda from_attn, from_ffn: 2 * from_attn),
            _way_6(dnormed=lambda from_attn, from_ffn: 2 * from_ffn),
        ),
        *named(
            "second branch fed the first one's sum",
            "The branches stand side by side: each is fed dout as it came, not what the other has "
            "added to it.",
            HUNT,
            _spoiled_6,
        ),
    ),
)

HUNTS = (HUNT_1, HUNT_2, HUNT_3, HUNT_4, HUNT_5, HUNT_6)
