"""Chapter 4: heads, projections, multi-head attention backward, cross-attention, grouped heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attn_lessons import multihead as library
from attn_lessons.grading.catalogue._parts import (
    left_factor,
    named,
    quiet,
    right_factor,
    scattered,
)
from attn_lessons.grading.exercise import Case, Exercise, Intermediate, Mistake
from attn_lessons.grading.relations import carried
from attn_lessons.softmax import softmax, softmax_backward

CHAPTER = "ch04_multihead"
SHAPES = f"{CHAPTER}.html#ch04-shapes"
SPLIT = f"{CHAPTER}.html#ch04-split"
MERGE = f"{CHAPTER}.html#ch04-merge"
LINEAR = f"{CHAPTER}.html#ch04-linear"
FORWARD = f"{CHAPTER}.html#ch04-forward"
BACKWARD = f"{CHAPTER}.html#ch04-backward"
PATHS = f"{CHAPTER}.html#ch04-paths"
CROSS = f"{CHAPTER}.html#ch04-cross"
GROUPED = f"{CHAPTER}.html#ch04-grouped"
SCALE = f"{CHAPTER}.html#ch04-scale"
TORCH = f"{CHAPTER}.html#ch04-torch"

NAMES = library.WEIGHTS + library.BIASES

Array = np.ndarray
Rng = np.random.Generator
Params = Mapping[str, Any]


# --- inputs ---------------------------------------------------------------------------------


def _split_cases(rng: Rng) -> list[Case]:
    def call(b: int, n: int, h: int, d: int) -> tuple[Array, int]:
        return rng.normal(size=(b, n, h * d)), h

    x, h = call(2, 5, 3, 4)
    return [
        Case("one sentence", call(1, 4, 2, 3), hint="Four tokens of 6 numbers, 3 for each head."),
        Case("a batch", call(2, 5, 3, 4), hint="B = 2, N = 5, H = 3, d = 4: all different."),
        Case("as many tokens as heads", call(2, 3, 3, 4), hint="N = H: shapes cannot help here."),
        Case(
            "as many tokens as numbers in a head",
            call(2, 4, 3, 4),
            hint="N = d: a wrong transpose has the right shape.",
        ),
        Case("one head", call(3, 5, 1, 4), hint="One head owns all columns: only an axis is new."),
        Case("heads of width 1", call(2, 3, 5, 1), hint="Every column is a head of its own."),
        Case("one token", call(3, 1, 2, 4), hint="N = 1: decoding takes one token at a time."),
        Case(
            "not contiguous in memory", (scattered(x), h), hint="The same numbers, laid out anew."
        ),
        Case(
            "float32 input",
            (x.astype(np.float32) + 1, h),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _merge_cases(rng: Rng) -> list[Case]:
    def call(b: int, h: int, n: int, d: int) -> tuple[Array]:
        return (rng.normal(size=(b, h, n, d)),)

    return [
        Case("one sentence", call(1, 2, 4, 3), hint="Two heads of width 3: rows of 6 numbers."),
        Case("a batch", call(2, 3, 5, 4), hint="B = 2, H = 3, N = 5, d = 4: all different."),
        Case("as many tokens as heads", call(2, 3, 3, 4), hint="N = H: shapes cannot help here."),
        Case(
            "as many heads as numbers in a head",
            call(2, 4, 5, 4),
            hint="H = d: a wrong order of the columns has the right shape.",
        ),
        Case("one head", call(3, 1, 5, 4), hint="One head: only an axis goes."),
        Case("heads of width 1", call(2, 5, 3, 1), hint="Every head is one column."),
        Case("one token", call(3, 2, 1, 4), hint="N = 1: decoding takes one token at a time."),
        Case(
            "heads split from a row",
            (library.split_heads(rng.normal(size=(2, 5, 12)), 3),),
            hint="What split_heads returns is no contiguous array.",
        ),
        Case(
            "float32 input",
            (rng.normal(size=(2, 3, 5, 4)).astype(np.float32),),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _linear_cases(rng: Rng) -> list[Case]:
    def call(b: int, n: int, c_in: int, c_out: int) -> tuple[Array, Array, Array]:
        shapes = ((b, n, c_out), (b, n, c_in), (c_in, c_out))
        return tuple(rng.normal(size=shape) for shape in shapes)  # type: ignore[return-value]

    dy, x, w = call(2, 3, 5, 4)
    one = np.zeros((3, 4, 2))
    one[rng.integers(3), rng.integers(4)] = rng.normal(size=2) + 2
    return [
        Case("one token", call(1, 1, 3, 4), hint="B = N = 1: dw is an outer product, db is dy."),
        Case("one sentence", call(1, 5, 3, 4), hint="w serves every token: its gradient adds up."),
        Case("a batch", call(2, 3, 5, 4), hint="All tokens of all sentences add up in dw and db."),
        Case("a wide batch", call(4, 3, 2, 5), hint="B = 4, N = 3, C_in = 2, C_out = 5."),
        Case(
            "as wide out as in",
            call(2, 3, 4, 4),
            hint="w is square, as attention's mostly are: w and its transpose fit equally well.",
        ),
        Case("as many sentences as tokens", call(3, 3, 2, 5), hint="B = N: axes may be mistaken."),
        Case("one column in", call(2, 4, 1, 3), hint="C_in = 1."),
        Case("one column out", call(2, 4, 3, 1), hint="C_out = 1: db is one number in an array."),
        Case(
            "upstream in one token",
            (one, rng.normal(size=(3, 4, 5)), rng.normal(size=(5, 2))),
            hint="One token matters to the loss: dw is made of its row alone.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(dy), scattered(x), scattered(w)),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            tuple(a.astype(np.float32) for a in call(2, 3, 5, 4)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _grouped_cases(rng: Rng) -> list[Case]:
    def call(b: int, h_kv: int, group: int, n: int, d: int) -> tuple[Array, int]:
        return rng.normal(size=(b, h_kv * group, n, d)), h_kv

    dk, h_kv = call(2, 3, 2, 5, 4)
    return [
        Case("six heads on two", call(1, 2, 3, 5, 4), hint="Heads 0, 1, 2 share key head 0."),
        Case("six heads on three", call(2, 3, 2, 5, 4), hint="Heads 0 and 1 share key head 0."),
        Case("four heads on two", call(3, 2, 2, 5, 7), hint="As many groups as heads in a group."),
        Case("multi-query", call(2, 1, 4, 3, 5), hint="One key head for all query heads."),
        Case("as many key heads as heads", call(2, 3, 1, 4, 5), hint="Groups of one: no change."),
        Case("one head", call(2, 1, 1, 3, 4), hint="Nothing is shared."),
        Case("one token", call(3, 2, 4, 1, 5), hint="N = 1."),
        Case("heads of width 1", call(2, 2, 3, 4, 1), hint="d = 1."),
        Case(
            "not contiguous in memory",
            (scattered(dk), h_kv),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            (rng.normal(size=(2, 6, 5, 4)).astype(np.float32), 3),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _params(rng: Rng, c: int, m: int, e: int) -> dict[str, Array]:
    shapes = ((c, e), (m, e), (m, e), (e, c), (e,), (e,), (e,), (c,))
    spread = {"wq": 1.5, "wk": 1.5}  # probabilities that are far from uniform
    return {
        name: rng.normal(size=shape) * (spread.get(name, 1) / shape[0] ** 0.5 if shape[1:] else 1)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def _some_masked(rng: Rng, shape: tuple[int, ...]) -> Array:
    """A random mask in which every row may see something, and not all."""
    mask = rng.random(shape) < 0.6
    seen = rng.integers(shape[-1], size=shape[:-1])[..., None]
    np.put_along_axis(mask, seen, True, -1)
    np.put_along_axis(mask, (seen + 1) % shape[-1], False, -1)
    return mask


def _padded(lengths: list[int], n: int) -> Array:
    return (np.arange(n) < np.array(lengths)[:, None])[:, None, None, :]


def _multihead_cases(rng: Rng) -> list[Case]:
    def call(b: int, h: int, n: int, d: int, mask: Array | None = None) -> tuple[Any, ...]:
        c = h * d
        dout, x = rng.normal(size=(2, b, n, c))
        return (dout, x, *_params(rng, c, c, c).values(), h, mask)

    one = call(2, 3, 4, 2)
    silent = np.zeros_like(one[0])
    silent[rng.integers(2), rng.integers(4)] = rng.normal(size=6)
    sharp = list(call(2, 3, 4, 2))
    sharp[2] = sharp[2] * 15
    dead = _some_masked(rng, (2, 1, 4, 4))
    dead[rng.integers(2), 0, rng.integers(4)] = False
    laid = tuple(scattered(a) if isinstance(a, Array) else a for a in call(2, 3, 4, 2))
    return [
        Case("one sentence", call(1, 2, 3, 5), hint="Three tokens, two heads of width 5, no mask."),
        Case("a batch", call(2, 3, 4, 5), hint="B = 2, H = 3, N = 4, d = 5: all different."),
        Case("many tokens", call(3, 2, 7, 4), hint="More tokens than columns."),
        Case("one head", call(2, 1, 4, 3), hint="H = 1: the width of a head is the whole width."),
        Case("heads of width 1", call(2, 5, 3, 1), hint="d = 1: the scale is 1."),
        Case(
            "one token",
            call(3, 2, 1, 4),
            hint="N = 1: the only probability is 1 whatever q and k are: no gradient reaches them.",
        ),
        Case(
            "causal mask",
            call(2, 3, 4, 2, np.tri(4, dtype=bool)),
            hint="Token i sees the tokens 0 … i. True in the mask = may attend.",
        ),
        Case(
            "padding mask",
            call(3, 2, 5, 4, _padded([5, int(rng.integers(1, 3)), int(rng.integers(3, 5))], 5)),
            hint="A mask (B, 1, 1, N): sentences of different length in one batch.",
        ),
        Case(
            "a mask of its own for every head",
            call(2, 3, 4, 2, _some_masked(rng, (2, 3, 4, 4))),
            hint="A mask (B, H, N, N).",
        ),
        Case(
            "a query with nothing to attend to",
            call(2, 3, 4, 2, dead),
            hint="A fully masked row of logits: its probabilities are 0, and so are its gradients.",
        ),
        Case(
            "upstream in one token",
            (silent, *one[1:]),
            hint="The loss reads one token; its keys and values are all tokens.",
        ),
        Case("large logits", tuple(sharp), hint="Most probabilities are near 0 or near 1."),
        Case("not contiguous in memory", laid, hint="The same numbers, laid out anew."),
    ]


def _cross_cases(rng: Rng) -> list[Case]:
    def call(
        b: int, h: int, n_q: int, n_k: int, d: int, m: int, mask: Array | None = None
    ) -> tuple[Any, ...]:
        c = h * d
        dout, x = rng.normal(size=(2, b, n_q, c))
        memory = rng.normal(size=(b, n_k, m))
        return (dout, x, memory, *_params(rng, c, m, c).values(), h, mask)

    dead = _some_masked(rng, (2, 1, 4, 5))
    dead[rng.integers(2), 0, rng.integers(4)] = False
    laid = tuple(scattered(a) if isinstance(a, Array) else a for a in call(2, 3, 4, 5, 2, 7))
    return [
        Case("one sentence", call(1, 2, 4, 3, 5, 7), hint="Four queries, three keys; M = 7."),
        Case("a batch", call(2, 3, 4, 5, 6, 11), hint="B 2, H 3, Nq 4, Nk 5, d 6, M 11."),
        Case("more queries than keys", call(2, 3, 7, 4, 2, 5), hint="Nq = 7, Nk = 4."),
        Case("one query", call(3, 2, 1, 5, 4, 7), hint="Nq = 1."),
        Case(
            "one key",
            call(3, 2, 4, 1, 5, 7),
            hint="Nk = 1: the only probability is 1: memory's gradient comes through v alone.",
        ),
        Case(
            "memory as long and as wide as x",
            call(2, 3, 4, 4, 2, 6),
            hint="Nq = Nk and M = C: x and memory fit in each other's place.",
        ),
        Case("one head", call(2, 1, 4, 5, 3, 7), hint="H = 1."),
        Case(
            "padding mask",
            call(3, 2, 4, 5, 1, 7, _padded([5, int(rng.integers(1, 3)), 4], 5)),
            hint="A mask (B, 1, 1, Nk): memories of different length in one batch.",
        ),
        Case(
            "causal mask",
            call(2, 3, 4, 6, 2, 5, np.tri(4, 6, 2, dtype=bool)),
            hint="A mask (Nq, Nk): the last query sees every key.",
        ),
        Case(
            "a query with nothing to attend to",
            call(2, 3, 4, 5, 2, 7, dead),
            hint="A fully masked row of logits: its probabilities are 0, and so are its gradients.",
        ),
        Case("not contiguous in memory", laid, hint="The same numbers, laid out anew."),
    ]


# --- oracles: the same values by another road ----------------------------------------------


def _split_by_columns(x: Array, n_heads: int) -> Array:
    """Head h is a slice of the columns."""
    d = x.shape[-1] // n_heads
    return np.stack([x[:, :, h * d : (h + 1) * d] for h in range(n_heads)], axis=1)


def _merge_by_columns(x: Array) -> Array:
    """The heads' columns written where they belong."""
    b, h, n, d = x.shape
    merged = np.empty((b, n, h * d))
    for i in range(h):
        merged[:, :, i * d : (i + 1) * d] = x[:, i]
    return merged


def _linear_token_by_token(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    """One outer product and one row for every token."""
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[1])
    for token in np.ndindex(x.shape[:-1]):
        dx[token] = [float(dy[token] @ row) for row in w]
        dw += np.outer(x[token], dy[token])
        db += dy[token]
    return dx, dw, db


def _grouped_head_by_head(dk_rep: Array, n_kv_heads: int) -> Array:
    b, h, n, d = dk_rep.shape
    dk = np.zeros((b, n_kv_heads, n, d))
    for head in range(h):
        dk[:, head // (h // n_kv_heads)] += dk_rep[:, head]
    return dk


STEP = 1e-30
NOTHING = 1e-13


@quiet
def _output(given: Mapping[str, Array], n_heads: int, mask: Array | None) -> Array:
    """Multi-head attention where every array has one axis more in front: many at once."""

    def projected(rows: Array, name: str) -> Array:
        y = rows @ given[f"w{name}"][:, None] + given[f"b{name}"][:, None, None]
        return np.stack(np.split(y, n_heads, axis=-1), axis=2)

    q, k, v = (projected(given["x"], "q"), *(projected(given["memory"], n) for n in "kv"))
    logits = np.einsum("pbhid,pbhjd->pbhij", q, k, optimize=True) / np.sqrt(q.shape[-1])
    seen = np.broadcast_to(True if mask is None else mask, logits.shape)
    peak = np.where(seen, logits.real, -np.inf).max(axis=-1, keepdims=True)
    weights = np.where(seen, np.exp(logits - np.where(np.isfinite(peak), peak, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    heads = weights / np.where(seen.any(axis=-1, keepdims=True), total, 1) @ v
    merged = np.concatenate([heads[:, :, h] for h in range(n_heads)], axis=-1)
    return merged @ given["wo"][:, None] + given["bo"][:, None, None]


def _by_complex_step(
    dout: Array, given: Mapping[str, Array], n_heads: int, mask: Array | None, shared: bool
) -> dict[str, Array]:
    """Every entry of every array moved by i h, each in a copy of its own: no backward pass."""
    one = {name: np.asarray(value, float)[None] for name, value in given.items()}
    found = {}
    for name, value in one.items():
        moved = value + 1j * STEP * np.eye(value.size).reshape(-1, *value.shape[1:])
        # In self-attention memory is x, and moves with it.
        together = {"memory": moved} if shared and name == "x" else {}
        out = _output({**one, name: moved, **together}, n_heads, mask)
        slopes = np.einsum("bnc,pbnc->p", dout, out.imag / STEP)
        found[name] = slopes.reshape(value.shape[1:])
    # What cancels to rounding (bk always; wq and wk with one key) is 0.
    most = max(np.abs(g).max() for g in found.values())
    return {name: np.where(np.abs(g).max() > NOTHING * most, g, 0.0) for name, g in found.items()}


def _multihead_by_complex_step(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    given = dict(zip(NAMES, (wq, wk, wv, wo, bq, bk, bv, bo), strict=True)) | {"x": x, "memory": x}
    found = _by_complex_step(dout, given, n_heads, mask, shared=True)
    return found["x"], {name: found[name] for name in NAMES}


def _cross_by_complex_step(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    given = dict(zip(NAMES, (wq, wk, wv, wo, bq, bk, bv, bo), strict=True))
    given |= {"x": x, "memory": memory}
    found = _by_complex_step(dout, given, n_heads, mask, shared=False)
    return found["x"], found["memory"], {name: found[name] for name in NAMES}


# --- mistakes: split_heads and merge_heads -----------------------------------------------------


def _reshape_only(x, n_heads):
    b, n, c = x.shape
    return x.reshape(b, n_heads, n, c // n_heads)


def _batch_and_heads_in_one(x, n_heads):
    b, n, c = x.shape
    return x.reshape(b * n_heads, n, c // n_heads)


def _dealt_out(x, n_heads):
    b, n, c = x.shape
    return x.reshape(b, n, c // n_heads, n_heads).transpose(0, 3, 1, 2)


def _split_then(*order):
    def answer(x, n_heads):
        b, n, c = x.shape
        return x.reshape(b, n, n_heads, c // n_heads).transpose(order)

    return answer


def _width_for_heads(x, n_heads):
    b, n, c = x.shape
    return x.reshape(b, n, c // n_heads, n_heads).swapaxes(1, 2)


def _every_head_all(x, n_heads):
    return np.repeat(x[:, None], n_heads, axis=1)


SPLIT_EXERCISE = Exercise(
    id="split_heads",
    chapter=CHAPTER,
    title="Columns to heads",
    points=1,
    returns=("heads",),
    reference=library.split_heads,
    oracle=_split_by_columns,
    cases=_split_cases,
    tokens=("heads",),
    mistakes=(
        *named(
            "reshape without transpose",
            "A reshape keeps the order in memory, token after token: split straight into (B, H, "
            "N, d), head 0 gets the first tokens whole. Split C into (H, d), then swap N and H.",
            SPLIT,
            _reshape_only,
            _batch_and_heads_in_one,
        ),
        *named(
            "transposed wrong pair",
            "After reshape(B, N, H, d) the axes to exchange are N and H, numbers 1 and 2; B and d "
            "stay where they are.",
            SPLIT,
            _split_then(0, 1, 3, 2),
            _split_then(0, 3, 2, 1),
            _split_then(2, 1, 0, 3),
            _split_then(0, 2, 3, 1),
            _split_then(0, 3, 1, 2),
        ),
        *named(
            "transpose forgotten",
            "(B, N, H, d) has the heads inside the tokens: a product over the last two axes would "
            "mix heads. Swap N and H.",
            SPLIT,
            _split_then(0, 1, 2, 3),
        ),
        *named(
            "heads before the batch",
            "The batch stays the first axis: with (H, B, N, d) every mask and bias of shape "
            "(B, …) meets the wrong axis.",
            SHAPES,
            _split_then(2, 0, 1, 3),
        ),
        *named(
            "columns dealt out in turn",
            "Head h owns d neighbouring columns, from h·d on, not every H-th: C is split into "
            "(H, d), not into (d, H).",
            SPLIT,
            _dealt_out,
        ),
        *named(
            "number and width of heads exchanged",
            "n_heads is H; the width of one is d = C / H. C is split into (H, d).",
            SPLIT,
            _width_for_heads,
        ),
        *named(
            "every head gets all columns",
            "The heads share out the C columns, d = C / H each; none sees them all.",
            SHAPES,
            _every_head_all,
        ),
    ),
)


def _merge_reshape_only(x):
    b, h, n, d = x.shape
    return x.reshape(b, n, h * d)


def _merge_then(*order):
    def answer(x):
        b, h, n, d = x.shape
        return x.transpose(order).reshape(b, n, h * d)

    return answer


def _merge_axes_only(x):
    return x.swapaxes(1, 2)


def _merged_by(reduce):
    def answer(x):
        return reduce(x, axis=1)

    return answer


def _concatenated_tokens(x):
    return np.concatenate(list(x.swapaxes(0, 1)), axis=1)


def _merged_backwards(x):
    return library.merge_heads(x[:, ::-1])


MERGE_EXERCISE = Exercise(
    id="merge_heads",
    chapter=CHAPTER,
    title="Heads back to columns",
    points=1,
    returns=("merged",),
    reference=library.merge_heads,
    oracle=_merge_by_columns,
    cases=_merge_cases,
    tokens=("merged",),
    mistakes=(
        *named(
            "reshape without transpose",
            "A reshape keeps the order in memory, head after head: a row of the result would hold "
            "several tokens of one head. Swap N and H first.",
            MERGE,
            _merge_reshape_only,
        ),
        *named(
            "transposed wrong pair",
            "From (B, H, N, d) to (B, N, H, d) the axes 1 and 2 change places; then the last two, "
            "H and d in this order, become C.",
            MERGE,
            _merge_then(0, 1, 3, 2),
            _merge_then(2, 1, 0, 3),
            _merge_then(2, 0, 1, 3),
            _merge_then(0, 3, 2, 1),
            _merge_then(0, 3, 1, 2),
        ),
        *named(
            "columns dealt out in turn",
            "The d columns of a head stay neighbours: (H, d) becomes C, not (d, H).",
            MERGE,
            _merge_then(0, 2, 3, 1),
        ),
        *named(
            "last two axes not joined",
            "(B, N, H, d) has every token's heads side by side already; what is left is to join H "
            "and d to C.",
            MERGE,
            _merge_axes_only,
        ),
        *named(
            "heads added up",
            "The heads are put side by side, not summed or averaged: wo decides how they mix.",
            MERGE,
            _merged_by(np.sum),
            _merged_by(np.mean),
        ),
        *named(
            "heads joined along the tokens",
            "The heads stand side by side in one row of the token, along the last axis.",
            MERGE,
            _concatenated_tokens,
        ),
        *named(
            "heads in reverse order",
            "Head 0 owns the first d columns.",
            MERGE,
            _merged_backwards,
        ),
    ),
)


# --- mistakes: linear_backward -------------------------------------------------------------------


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _linear_with(dx=None, dw=None, db=None):
    """The right gradients, but for those computed otherwise."""

    def answer(dy, x, w):
        right = library.linear_backward(dy, x, w)
        ways = (dx, dw, db)
        return tuple(
            g if way is None else way(dy, x, w) for way, g in zip(ways, right, strict=True)
        )

    return answer


def _dw(dy, x, w):
    return _rows(x).T @ _rows(dy)


def _scaled(gradient, by):
    return lambda dy, x, w: gradient(dy, x, w) / by(*dy.shape[:2])


def _db(dy, x, w):
    return dy.sum(axis=(0, 1))


LINEAR_WAYS: tuple[tuple[str, str, tuple[Callable[..., Any], ...]], ...] = (
    (
        "db summed over batch only",
        "b is added to every token of every sentence: its gradient is the sum over both axes, and "
        "has b's shape, (C_out,).",
        (_linear_with(db=lambda dy, x, w: dy.sum(axis=0)),),
    ),
    (
        "db summed over tokens only",
        "b is added to every token of every sentence: its gradient is the sum over both axes, and "
        "has b's shape, (C_out,).",
        (_linear_with(db=lambda dy, x, w: dy.sum(axis=1)),),
    ),
    (
        "dw averaged",
        "The loss says whether it is a mean; a gradient adds up what every use of w contributes.",
        (
            _linear_with(dw=_scaled(_dw, lambda b, n: b * n)),
            _linear_with(dw=_scaled(_dw, lambda b, n: b)),
            _linear_with(dw=_scaled(_dw, lambda b, n: n)),
            _linear_with(dw=_scaled(_dw, lambda b, n: b), db=_scaled(_db, lambda b, n: b)),
            _linear_with(dw=_scaled(_dw, lambda b, n: b * n), db=_scaled(_db, lambda b, n: b * n)),
        ),
    ),
    (
        "db averaged",
        "b is added to B · N tokens, and its gradient is the sum over them, not the mean.",
        (
            _linear_with(db=_scaled(_db, lambda b, n: b * n)),
            _linear_with(db=lambda dy, x, w: dy.sum(axis=0).mean(axis=0)),
            _linear_with(db=lambda dy, x, w: dy.mean(axis=0).sum(axis=0)),
        ),
    ),
    (
        "w not transposed",
        "dx_i = Σ_j dy_j w_ij: the sum runs over w's columns. With a square w the shapes fit "
        "either way and say nothing.",
        (_linear_with(dx=lambda dy, x, w: dy @ w),),
    ),
    (
        "dw transposed",
        "dw_ij = Σ x_i dy_j has w's shape, (C_in, C_out): xᵀ dy, not dyᵀ x. With a square w the "
        "shapes fit either way and say nothing.",
        (_linear_with(dw=lambda dy, x, w: _dw(dy, x, w).T),),
    ),
    (
        "dw not summed over the batch",
        "Every sentence went through the same w: what they contribute adds up.",
        (_linear_with(dw=lambda dy, x, w: x.swapaxes(1, 2) @ dy),),
    ),
    (
        "one sentence only",
        "Every sentence went through the same w and b. An assignment in a loop over the batch "
        "keeps the last one's gradient: add up instead.",
        (
            _linear_with(dw=lambda dy, x, w: x[-1].T @ dy[-1]),
            _linear_with(
                dw=lambda dy, x, w: x[-1].T @ dy[-1], db=lambda dy, x, w: dy[-1].sum(axis=0)
            ),
            _linear_with(dw=lambda dy, x, w: x[0].T @ dy[0]),
        ),
    ),
    (
        "reshaped instead of transposed",
        "x.reshape(C_in, -1) has the transpose's shape and its numbers in another order; flatten "
        "to (B · N, C_in), then take .T.",
        (
            _linear_with(
                dw=lambda dy, x, w: x.reshape(x.shape[-1], -1) @ dy.reshape(-1, dy.shape[-1])
            ),
        ),
    ),
    (
        "db of everything",
        "b has one entry a column: sum over the batch and the tokens, not over the columns.",
        (
            _linear_with(db=lambda dy, x, w: dy.sum()),
            _linear_with(db=lambda dy, x, w: dy.sum(axis=(0, 1), keepdims=True)),
            _linear_with(db=lambda dy, x, w: np.full(dy.shape[-1], dy.sum())),
        ),
    ),
)

LINEAR_EXERCISE = Exercise(
    id="linear_backward",
    chapter=CHAPTER,
    title="A projection backward",
    points=2,
    returns=("dx", "dw", "db"),
    reference=library.linear_backward,
    oracle=_linear_token_by_token,
    cases=_linear_cases,
    tokens=("dx", "dw"),
    mistakes=tuple(
        mistake
        for name, why, answers in LINEAR_WAYS
        for mistake in named(name, why, LINEAR, *answers)
    ),
)


# --- multi-head attention, with a fault in it ----------------------------------------------------


def _root_d(d, c, h):
    return d**-0.5


def _masked_softmax(logits, mask):
    if mask is None:
        return softmax(logits)
    return softmax(np.where(mask, logits, -np.inf))


def _plain_softmax(logits, mask):
    """A row of nothing but -inf becomes NaN here."""
    z = logits if mask is None else np.where(mask, logits, -np.inf)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _finite_sentinel(size):
    def masked(logits, mask):
        return softmax(logits if mask is None else np.where(mask, logits, size))

    return masked


def _zeroed_logits(logits, mask):
    return softmax(logits if mask is None else logits * mask)


def _zeroed_probs(logits, mask):
    return softmax(logits) if mask is None else softmax(logits) * mask


def _mask_ignored(logits, mask):
    return softmax(logits)


def _mask_opposite(logits, mask):
    return _masked_softmax(logits, None if mask is None else ~mask)


def _no_row_sum(dprobs, probs):
    return probs * dprobs


def _elementwise(dprobs, probs):
    return probs * (1 - probs) * dprobs


def _worked(
    dout,
    x,
    memory,
    params,
    n_heads,
    mask=None,
    *,
    split=library.split_heads,
    merge=library.merge_heads,
    merge_out=None,
    scale=_root_d,
    scale_q=None,
    scale_k=None,
    biased=True,
    masked=_masked_softmax,
    back=softmax_backward,
    linear=library.linear_backward,
    linear_out=None,
    through_wo=True,
):
    """The three paths to x and memory, and the gradients by name; any step may be another."""
    wq, wk, wv, wo, bq, bk, bv, _ = params
    factors = (wq.shape[1] // n_heads, wq.shape[0], n_heads)
    q, k, v = (
        split(rows @ w + (b if biased else 0), n_heads)
        for rows, w, b in ((x, wq, bq), (memory, wk, bk), (memory, wv, bv))
    )
    probs = masked(q @ k.swapaxes(-1, -2) * scale(*factors), mask)
    merged = (merge_out or merge)(probs @ v)
    dmerged, dwo, dbo = (linear_out or linear)(dout, merged, wo)
    dheads = split(dmerged if through_wo else dout, n_heads)
    dv = probs.swapaxes(-1, -2) @ dheads
    dlogits = back(dheads @ v.swapaxes(-1, -2), probs)
    dq = dlogits @ k * (scale_q or scale)(*factors)
    dk = dlogits.swapaxes(-1, -2) @ q * (scale_k or scale)(*factors)
    path_q, dwq, dbq = linear(merge(dq), x, wq)
    path_k, dwk, dbk = linear(merge(dk), memory, wk)
    path_v, dwv, dbv = linear(merge(dv), memory, wv)
    grads = dict(zip(NAMES, (dwq, dwk, dwv, dwo, dbq, dbk, dbv, dbo), strict=True))
    return (path_q, path_k, path_v), grads


def _all_paths(paths):
    return paths[0] + paths[1] + paths[2]


def _same(grads, **given):
    return grads


def _self(dx=_all_paths, grads=_same, **steps):
    """Self-attention's answer with these steps, dx and grads otherwise than they should be."""

    def answer(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
        params = (wq, wk, wv, wo, bq, bk, bv, bo)
        paths, found = _worked(dout, x, x, params, n_heads, mask, **steps)
        return dx(paths), grads(found, dout=dout, x=x)

    return answer


def _cross(dmemory=lambda paths: paths[1] + paths[2], grads=_same, **steps):
    def answer(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
        params = (wq, wk, wv, wo, bq, bk, bv, bo)
        paths, found = _worked(dout, x, memory, params, n_heads, mask, **steps)
        return paths[0], dmemory(paths), grads(found, dout=dout, x=x)

    return answer


def _without(*names):
    def grads(found, **given):
        return {name: g for name, g in found.items() if name not in names}

    return grads


def _zero(*names):
    def grads(found, **given):
        return found | {name: np.zeros_like(found[name]) for name in names}

    return grads


def _wo_from_x(found, dout, x):
    return found | {"wo": _rows(x).T @ _rows(dout)}


def _exchanged(a, b):
    def grads(found, **given):
        return found | {a: found[b], b: found[a]}

    return grads


def _per_sentence(only):
    def linear(dy, x, w):
        dx, _, _ = library.linear_backward(dy, x, w)
        return dx, x[only].T @ dy[only], dy[only].sum(axis=0)

    return linear


def _merge_dealt_out(x):
    return _merge_then(0, 2, 3, 1)(x)


def _linear_way(name, way=0):
    return next(answers[way] for known, _, answers in LINEAR_WAYS if known == name)


Steps = dict[str, Any]

# Faults of both, self- and cross-attention: name, why, section, and the steps that are otherwise.
SHARED_WAYS: tuple[tuple[str, str, str, tuple[Steps, ...]], ...] = (
    (
        "scale by √C",
        "A logit is a dot product of d = C / H numbers, so the scale is 1/√d; with 1/√C all "
        "logits are too small by √H, which shows only with more than one head.",
        SCALE,
        (
            {"scale": lambda d, c, h: c**-0.5},
            {"scale_q": lambda d, c, h: c**-0.5, "scale_k": lambda d, c, h: c**-0.5},
        ),
    ),
    (
        "scale by √H",
        "The scale is 1/√d, from the width of a head, not from the number of heads.",
        SCALE,
        (
            {"scale": lambda d, c, h: h**-0.5},
            {"scale_q": lambda d, c, h: h**-0.5, "scale_k": lambda d, c, h: h**-0.5},
        ),
    ),
    (
        "scale forgotten in the backward pass",
        "The logits are q kᵀ/√d: the factor 1/√d belongs to dq and to dk.",
        BACKWARD,
        (
            {"scale_q": lambda d, c, h: 1.0, "scale_k": lambda d, c, h: 1.0},
            {"scale_q": lambda d, c, h: 1.0},
            {"scale_k": lambda d, c, h: 1.0},
        ),
    ),
    (
        "no scale",
        "The logits are q kᵀ/√d, here and in the gradients of q and k.",
        SCALE,
        ({"scale": lambda d, c, h: 1.0},),
    ),
    (
        "multiplied by √d",
        "q kᵀ is divided by √d: d**-0.5 multiplies, d**0.5 divides.",
        SCALE,
        ({"scale": lambda d, c, h: d**0.5},),
    ),
    (
        "merge order in dwo",
        "dwo = mergedᵀ dout, where merged has the columns of head 0 first: swap H and N before "
        "the reshape, as in the forward pass.",
        MERGE,
        (
            {"merge_out": _merge_reshape_only},
            {"merge_out": _merge_dealt_out},
            {"merge_out": _merged_backwards},
        ),
    ),
    (
        "bo forgotten",
        "bo is added to every token: its gradient is dout summed over the batch and the tokens.",
        BACKWARD,
        ({"grads": _zero("bo")}, {"grads": _without("bo")}),
    ),
    (
        "bias gradients forgotten",
        "bq, bk and bv are parameters: their gradients are dq, dk and dv summed over the batch "
        "and the tokens.",
        BACKWARD,
        (
            {"grads": _without("bq", "bk", "bv")},
            {"grads": _without(*library.BIASES)},
            {"grads": _zero("bq", "bk", "bv")},
            {"grads": _zero(*library.BIASES)},
        ),
    ),
    (
        "biases missing in the forward pass",
        "The q, k and v that the backward pass needs have their biases in them.",
        FORWARD,
        ({"biased": False},),
    ),
    (
        "wo skipped",
        "dout arrives after wo: the heads receive dout woᵀ.",
        BACKWARD,
        ({"through_wo": False},),
    ),
    (
        "dwo from x",
        "wo multiplies the merged heads, not x: dwo = mergedᵀ dout.",
        BACKWARD,
        ({"grads": _wo_from_x},),
    ),
    (
        "row sum dropped",
        "softmax's backward pass is p ∘ (dp - Σ p dp): without the sum a row of dlogits does not "
        "add up to 0.",
        BACKWARD,
        ({"back": _no_row_sum},),
    ),
    (
        "diagonal p(1-p)",
        "p (1 - p) is only the diagonal of softmax's Jacobian; every logit moves its whole row.",
        BACKWARD,
        ({"back": _elementwise},),
    ),
    (
        "mask ignored",
        "The backward pass needs the probabilities of the forward pass, and those are masked.",
        FORWARD,
        ({"masked": _mask_ignored},),
    ),
    (
        "mask the other way round",
        "Here True = may attend. In nn.MultiheadAttention's masks True = may not.",
        TORCH,
        ({"masked": _mask_opposite},),
    ),
    (
        "multiplied instead of masked",
        "A logit of 0 still has weight e⁰ = 1: the masked get -inf before the softmax.",
        FORWARD,
        ({"masked": _zeroed_logits},),
    ),
    (
        "mask after softmax",
        "Zeroed after the softmax, the remaining probabilities do not add up to 1.",
        FORWARD,
        ({"masked": _zeroed_probs},),
    ),
    (
        "NaN on a fully masked row",
        "A row of nothing but -inf has maximum -inf, and -inf - -inf is NaN: such a row has "
        "probabilities 0.",
        FORWARD,
        ({"masked": _plain_softmax},),
    ),
    (
        "finite number instead of -inf",
        "Where nothing may be attended to, equal large negative logits make a uniform row: its "
        "probabilities have to be 0.",
        FORWARD,
        tuple({"masked": _finite_sentinel(size)} for size in (-1e9, -1e4, -1e30)),
    ),
    (
        "w not transposed",
        "dx = dy wᵀ. Attention's weights are square, so dy w has the right shape and wrong "
        "numbers.",
        LINEAR,
        (
            {"linear": _linear_way("w not transposed")},
            {"linear_out": _linear_way("w not transposed")},
            {
                "linear": _linear_way("w not transposed"),
                "linear_out": library.linear_backward,
            },
        ),
    ),
    (
        "dw transposed",
        "dw = xᵀ dy. Attention's weights are square, so dyᵀ x has the right shape and wrong "
        "numbers.",
        LINEAR,
        (
            {"linear": _linear_way("dw transposed")},
            {"linear_out": _linear_way("dw transposed")},
            {"linear": _linear_way("dw transposed"), "linear_out": library.linear_backward},
        ),
    ),
    (
        "dwq and dwk exchanged",
        "dwq belongs to dq = dlogits k/√d, dwk to dk = dlogitsᵀ q/√d.",
        BACKWARD,
        ({"grads": _exchanged("wq", "wk")},),
    ),
)


def _shared(answer: Callable[..., Any]) -> tuple[Mistake, ...]:
    return tuple(
        mistake
        for name, why, section, ways in SHARED_WAYS
        for mistake in named(name, why, section, *(answer(**steps) for steps in ways))
    )


def _carried(answer: Callable[..., Any]) -> tuple[Mistake, ...]:
    """What mistaken split_heads, merge_heads and linear_backward lead to."""
    split = {m.name: m for m in reversed(SPLIT_EXERCISE.mistakes)}
    merge = {m.name: m for m in reversed(MERGE_EXERCISE.mistakes)}
    linear = {m.name: m for m in reversed(LINEAR_EXERCISE.mistakes)}
    plain, dealt = "reshape without transpose", "columns dealt out in turn"

    def faulty(mistake: Mistake, earlier: str, **steps: Any) -> Mistake:
        return carried(mistake, earlier, quiet(answer(**steps)))

    return (
        faulty(split[plain], "split_heads", split=_reshape_only),
        faulty(split[plain], "split_heads", split=_reshape_only, merge=_merge_reshape_only),
        faulty(merge[plain], "merge_heads", merge=_merge_reshape_only),
        faulty(split[dealt], "split_heads", split=_dealt_out),
        faulty(split[dealt], "split_heads", split=_dealt_out, merge=_merge_dealt_out),
        faulty(merge[dealt], "merge_heads", merge=_merge_dealt_out),
        faulty(merge["heads in reverse order"], "merge_heads", merge=_merged_backwards),
        *(
            faulty(linear[name], "linear_backward", linear=ways[0])
            for name, _, ways in LINEAR_WAYS
            if name not in ("w not transposed", "dw transposed", "one sentence only")
        ),
    )


# --- the first wrong value on the way -------------------------------------------------------------


@quiet
def _on_the_way(dout, x, memory, n_heads, mask, **p):
    """What a right answer meets, by name; dq, dk and dv with the heads side by side."""
    split, merge = library.split_heads, library.merge_heads
    q = split(x @ p["wq"] + p["bq"], n_heads)
    k, v = (split(memory @ p[f"w{n}"] + p[f"b{n}"], n_heads) for n in "kv")
    scale = q.shape[-1] ** -0.5
    probs = _masked_softmax(q @ k.swapaxes(-1, -2) * scale, mask)
    dheads = split(dout @ p["wo"].T, n_heads)
    dlogits = softmax_backward(dheads @ v.swapaxes(-1, -2), probs)
    return {
        "q": q,
        "k": k,
        "v": v,
        "probs": probs,
        "merged": merge(probs @ v),
        "dv": merge(probs.swapaxes(-1, -2) @ dheads),
        "dlogits": dlogits,
        "dq": merge(dlogits @ k * scale),
        "dk": merge(dlogits.swapaxes(-1, -2) @ q * scale),
    }


def _way(given: Params) -> dict[str, Array]:
    own = {"memory": given["x"]} | {
        n: given[n] for n in ("dout", "x", "memory", "n_heads", "mask", *NAMES) if n in given
    }
    return _on_the_way(**own)


def _value(name: str) -> Callable[..., Array]:
    return lambda **given: _way(given)[name]


def _solved_merged(dwo: Array, **given: Any) -> Array | None:
    """dwo = mergedᵀ dout."""
    dout = given["dout"]
    rows = left_factor(dwo, _rows(dout))
    return None if rows is None else rows.T.reshape(*dout.shape[:2], -1)


def _solved_dy(rows_of: str) -> Callable[..., Array | None]:
    """dw = xᵀ dy."""

    def solve(dw: Array, **given: Any) -> Array | None:
        x = given["x"] if rows_of == "x" else given.get("memory", given["x"])
        rows = right_factor(_rows(x).T, dw)
        return None if rows is None else rows.reshape(*x.shape[:2], -1)

    return solve


def _solved_probs(dwo: Array, **given: Any) -> Array | None:
    """A head is probs v; with as many keys as columns any head would be."""
    merged, v = _solved_merged(dwo, **given), _way(given)["v"]
    if merged is None or v.shape[-2] >= v.shape[-1]:
        return None
    return left_factor(library.split_heads(merged, given["n_heads"]), v)


def _solved_dlogits_q(dwq: Array, **given: Any) -> Array | None:
    """dq = dlogits k/√d."""
    dq, k = _solved_dy("x")(dwq, **given), _way(given)["k"]
    if dq is None or k.shape[-2] >= k.shape[-1]:
        return None
    return left_factor(library.split_heads(dq, given["n_heads"]), k * k.shape[-1] ** -0.5)


def _solved_dlogits_k(dwk: Array, **given: Any) -> Array | None:
    """dk = dlogitsᵀ q/√d."""
    dk, q = _solved_dy("memory")(dwk, **given), _way(given)["q"]
    if dk is None or q.shape[-2] >= q.shape[-1]:
        return None
    found = left_factor(library.split_heads(dk, given["n_heads"]), q * q.shape[-1] ** -0.5)
    return None if found is None else found.swapaxes(-1, -2)


INTERMEDIATES = (
    Intermediate("probs", _value("probs"), {"grads['wo']": _solved_probs}),
    Intermediate("merged", _value("merged"), {"grads['wo']": _solved_merged}),
    Intermediate("dv", _value("dv"), {"grads['wv']": _solved_dy("memory")}),
    Intermediate(
        "dlogits",
        _value("dlogits"),
        {"grads['wq']": _solved_dlogits_q, "grads['wk']": _solved_dlogits_k},
    ),
    Intermediate("dq", _value("dq"), {"grads['wq']": _solved_dy("x")}),
    Intermediate("dk", _value("dk"), {"grads['wk']": _solved_dy("memory")}),
)


# --- multihead_backward ---------------------------------------------------------------------------

MULTIHEAD_EXERCISE = Exercise(
    id="multihead_backward",
    chapter=CHAPTER,
    title="Multi-head attention backward",
    points=5,
    returns=("dx", "grads"),
    reference=library.multihead_backward,
    oracle=_multihead_by_complex_step,
    cases=_multihead_cases,
    tokens=("dx",),
    intermediates=INTERMEDIATES,
    mistakes=(
        *named(
            "dx from one of q, k, v only",
            "x went into q, k and v: each sends a gradient back, and dx is the sum of the three.",
            PATHS,
            _self(dx=lambda paths: paths[0]),
            _self(dx=lambda paths: paths[1]),
        ),
        *named(
            "last instead of summed",
            "What is computed later replaces what was there: of dx only v's path is left, or of a "
            "parameter's gradient one sentence's. Uses of the same array add up: +=, not =.",
            PATHS,
            _self(dx=lambda paths: paths[2]),
            _self(linear=_per_sentence(-1)),
        ),
        *named(
            "one of the three paths forgotten",
            "dx = dq wqᵀ + dk wkᵀ + dv wvᵀ: here one of the three is missing.",
            PATHS,
            _self(dx=lambda paths: paths[0] + paths[1]),
            _self(dx=lambda paths: paths[0] + paths[2]),
            _self(dx=lambda paths: paths[1] + paths[2]),
        ),
        *named(
            "dx averaged over the paths",
            "The three paths' gradients are added, not averaged.",
            PATHS,
            _self(dx=lambda paths: _all_paths(paths) / 3),
        ),
        *_shared(_self),
        *_carried(_self),
    ),
)


# --- cross_attention_backward ---------------------------------------------------------------------


def _keys_from_x(dout, x, memory, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask=None):
    dx, grads = library.multihead_backward(dout, x, wq, wk, wv, wo, bq, bk, bv, bo, n_heads, mask)
    return dx, np.zeros_like(memory), grads


def _queries_from_memory(dout, x, memory, *rest):
    dx, dmemory, grads = library.cross_attention_backward(dout, memory, x, *rest)
    return dmemory, dx, grads


def _dw_from_x(dout, x, memory, *rest):
    """dwk and dwv against x's rows: the right rows only where memory is x."""
    dx, dmemory, grads = library.cross_attention_backward(dout, x, memory, *rest)
    steps = _on_the_way(dout, x, memory, rest[8], *rest[9:], **dict(zip(NAMES, rest, strict=False)))
    dk, dv = (_rows(steps[n]) for n in ("dk", "dv"))
    return dx, dmemory, grads | {"wk": _rows(x).T @ dk, "wv": _rows(x).T @ dv}


def _all_into_x(dout, x, memory, *rest):
    dx, dmemory, grads = library.cross_attention_backward(dout, x, memory, *rest)
    return dx + dmemory, dmemory, grads


CROSS_EXERCISE = Exercise(
    id="cross_attention_backward",
    chapter=CHAPTER,
    title="Cross-attention backward",
    points=3,
    returns=("dx", "dmemory", "grads"),
    reference=library.cross_attention_backward,
    oracle=_cross_by_complex_step,
    cases=_cross_cases,
    tokens=("dx", "dmemory"),
    intermediates=INTERMEDIATES,
    mistakes=(
        *named(
            "memory gradient from k only",
            "Keys and values are both made of memory: dmemory = dk wkᵀ + dv wvᵀ.",
            CROSS,
            _cross(dmemory=lambda paths: paths[1]),
        ),
        *named(
            "memory gradient from v only",
            "Keys and values are both made of memory: dmemory = dk wkᵀ + dv wvᵀ.",
            CROSS,
            _cross(dmemory=lambda paths: paths[2]),
        ),
        *named(
            "memory gradient averaged",
            "The two paths' gradients are added, not averaged.",
            CROSS,
            _cross(dmemory=lambda paths: (paths[1] + paths[2]) / 2),
        ),
        *named(
            "memory's paths added to dx",
            "x made the queries only: dx = dq wqᵀ. What comes back through k and v is memory's.",
            CROSS,
            _all_into_x,
        ),
        *named(
            "memory not used",
            "Keys and values are projections of memory; only the queries are made of x.",
            CROSS,
            _keys_from_x,
        ),
        *named(
            "x and memory exchanged",
            "x asks and memory answers: queries are made of x, keys and values of memory.",
            CROSS,
            _queries_from_memory,
        ),
        *named(
            "dwk and dwv from x",
            "wk and wv multiply memory: dwk = memoryᵀ dk and dwv = memoryᵀ dv.",
            CROSS,
            _dw_from_x,
        ),
        *named(
            "last instead of summed",
            "An assignment in a loop over the batch keeps one sentence's gradient by the "
            "parameters: every sentence's adds up.",
            LINEAR,
            _cross(linear=_per_sentence(-1)),
        ),
        *_shared(_cross),
        *_carried(_cross),
    ),
)


# --- grouped_kv_backward -----------------------------------------------------------------------


def _groups(dk_rep, n_kv_heads):
    b, h, n, d = dk_rep.shape
    return dk_rep.reshape(b, n_kv_heads, h // n_kv_heads, n, d)


def _group_mean(dk_rep, n_kv_heads):
    return _groups(dk_rep, n_kv_heads).mean(axis=2)


def _tiled(dk_rep, n_kv_heads):
    b, h, n, d = dk_rep.shape
    return dk_rep.reshape(b, h // n_kv_heads, n_kv_heads, n, d).sum(axis=1)


def _tiled_mean(dk_rep, n_kv_heads):
    return _tiled(dk_rep, n_kv_heads) * n_kv_heads / dk_rep.shape[1]


def _one_of_group(which):
    def answer(dk_rep, n_kv_heads):
        return _groups(dk_rep, n_kv_heads)[:, :, which]

    return answer


def _first_heads(dk_rep, n_kv_heads):
    return dk_rep[:, :n_kv_heads].copy()


def _last_heads(dk_rep, n_kv_heads):
    return dk_rep[:, -n_kv_heads:].copy()


def _all_heads(dk_rep, n_kv_heads):
    return dk_rep.sum(axis=1, keepdims=True)


def _all_heads_everywhere(dk_rep, n_kv_heads):
    return np.repeat(dk_rep.sum(axis=1, keepdims=True), n_kv_heads, axis=1)


def _not_summed(dk_rep, n_kv_heads):
    return dk_rep.copy()


def _counts_exchanged(dk_rep, n_kv_heads):
    b, h, n, d = dk_rep.shape
    return dk_rep.reshape(b, h // n_kv_heads, n_kv_heads, n, d).sum(axis=2)


def _summed_and_repeated(dk_rep, n_kv_heads):
    dk = library.grouped_kv_backward(dk_rep, n_kv_heads)
    return np.repeat(dk, dk_rep.shape[1] // n_kv_heads, axis=1)


def _tokens_summed(dk_rep, n_kv_heads):
    return _groups(dk_rep, n_kv_heads).sum(axis=(2, 3))


def _root_of_group(dk_rep, n_kv_heads):
    dk = library.grouped_kv_backward(dk_rep, n_kv_heads)
    return dk * (n_kv_heads / dk_rep.shape[1]) ** 0.5


GROUPED_EXERCISE = Exercise(
    id="grouped_kv_backward",
    chapter=CHAPTER,
    title="Grouped heads backward",
    points=2,
    returns=("dk",),
    reference=library.grouped_kv_backward,
    oracle=_grouped_head_by_head,
    cases=_grouped_cases,
    tokens=("dk",),
    mistakes=(
        *named(
            "mean",
            "A key head that serves G query heads collects G gradients: they add up.",
            GROUPED,
            _group_mean,
        ),
        *named(
            "wrong interleaving: repeat taken as tile",
            "The heads of a group are neighbours: query head h reads key head h // G, not "
            "h % H_kv. Split H into (H_kv, G), in this order.",
            GROUPED,
            _tiled,
            _tiled_mean,
        ),
        *named(
            "one head of the group only",
            "Every query head of the group sent a gradient back; one of them is kept here. An "
            "assignment in a loop does that: add up instead.",
            GROUPED,
            _one_of_group(-1),
            _one_of_group(0),
            _first_heads,
            _last_heads,
        ),
        *named(
            "summed over all heads",
            "Each key head has its own group: only the gradients of its query heads are its own.",
            GROUPED,
            _all_heads,
            _all_heads_everywhere,
        ),
        *named(
            "not summed",
            "The result has H_kv heads: the copies were made in the forward pass and their "
            "gradients come together again.",
            GROUPED,
            _not_summed,
        ),
        *named(
            "number and size of groups exchanged",
            "n_kv_heads is the number of groups; each has G = H / n_kv_heads heads.",
            GROUPED,
            _counts_exchanged,
        ),
        *named(
            "repeated again",
            "The gradient has the shape of what was repeated, (B, H_kv, N, d).",
            GROUPED,
            _summed_and_repeated,
        ),
        *named(
            "summed over the tokens too",
            "Every token has a key of its own: the sum runs over the heads of a group only.",
            GROUPED,
            _tokens_summed,
        ),
        *named(
            "divided by √G",
            "Copies' gradients are added as they are.",
            GROUPED,
            _root_of_group,
        ),
    ),
)

EXERCISES = (
    SPLIT_EXERCISE,
    MERGE_EXERCISE,
    LINEAR_EXERCISE,
    MULTIHEAD_EXERCISE,
    CROSS_EXERCISE,
    GROUPED_EXERCISE,
)
