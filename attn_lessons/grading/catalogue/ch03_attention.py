"""Chapter 3: masks, scaled dot-product attention, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from attn_lessons import attention as library
from attn_lessons.grading.catalogue import ch01_softmax
from attn_lessons.grading.catalogue._parts import left_factor, named, quiet, scattered
from attn_lessons.grading.exercise import Case, Exercise, Intermediate, Mistake
from attn_lessons.grading.relations import carried
from attn_lessons.softmax import softmax, softmax_backward

CHAPTER = "ch03_attention"
SHAPES = f"{CHAPTER}.html#ch03-shapes"
SCALE = f"{CHAPTER}.html#ch03-scale"
MASK = f"{CHAPTER}.html#ch03-mask"
CAUSAL = f"{CHAPTER}.html#ch03-causal"
PADDING = f"{CHAPTER}.html#ch03-padding"
INFINITY = f"{CHAPTER}.html#ch03-infinity"
FORWARD = f"{CHAPTER}.html#ch03-forward"
BACKWARD = f"{CHAPTER}.html#ch03-backward"
DV = f"{CHAPTER}.html#ch03-dv"
DLOGITS = f"{CHAPTER}.html#ch03-dlogits"
DQDK = f"{CHAPTER}.html#ch03-dqdk"
DROPOUT = f"{CHAPTER}.html#ch03-dropout"

Array = np.ndarray
Rng = np.random.Generator
INF = np.inf


def _turned(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


# --- inputs ---------------------------------------------------------------------------------


def _causal_cases(rng: Rng) -> list[Case]:
    def count(low: int, high: int) -> int:
        return int(rng.integers(low, high))

    few, many = count(2, 5), count(6, 12)
    n = count(3, 12)
    return [
        Case("square", (n, n), hint="Query i sees the keys 0 … i, its own position included."),
        Case(
            "more keys than queries",
            (few, many),
            hint="The last query sees all keys: the queries are the last positions.",
        ),
        Case(
            "one query",
            (1, count(3, 30)),
            hint="Decoding: the newest token sees everything before it and itself.",
        ),
        Case(
            "a chunk behind a cache",
            (count(3, 6), count(20, 40)),
            hint="All cached keys are in the past of every query of the chunk.",
        ),
        Case(
            "more queries than keys",
            (many, few),
            hint="The last query sees all keys, so the first ones see none.",
        ),
        Case("one key", (count(3, 30), 1), hint="Only the last query sees the only key."),
        Case(
            "one key more",
            (n, n + 1),
            hint="One key before the first query: every query sees at least two.",
        ),
        Case("one query and one key", (1, 1), hint="A token may always see itself."),
        Case("two of each", (2, 2), hint="Three entries are True, one is not."),
    ]


def _padding_cases(rng: Rng) -> list[Case]:
    def lengths(b: int, low: int, high: int) -> Array:
        return rng.integers(low, high, size=b)

    n = int(rng.integers(5, 9))
    some_empty = rng.permutation(np.r_[0, 0, lengths(3, 1, 7)])
    return [
        Case("a batch", (lengths(4, 1, 6), 7), hint="Four sequences of at most 5 of 7 keys."),
        Case("one sequence", (lengths(1, 1, 8), 9), hint="B = 1 keeps its axis."),
        Case(
            "as many sequences as keys",
            (lengths(n, 1, n), n),
            hint="B = Nk: only the axes' order says which is which.",
        ),
        Case(
            "no padding",
            (np.full(int(rng.integers(2, 9)), n), n),
            hint="A sequence of length Nk has no padding.",
        ),
        Case(
            "empty sequences",
            (some_empty, 6),
            hint="A sequence of length 0 is all padding: none of its keys is True.",
        ),
        Case(
            "nobody has full length",
            (lengths(6, 0, 10), 17),
            hint="The width is n_k, not the longest length.",
        ),
        Case(
            "int32 lengths",
            (lengths(5, 0, 12).astype(np.int32), 11),
            hint="Integers of any width count.",
        ),
        Case(
            "not contiguous in memory",
            (lengths(10, 0, 9)[::2], 8),
            hint="Every other entry of a longer array of lengths.",
        ),
    ]


def _inputs(
    rng: Rng, b: int, h: int, n_q: int, n_k: int, d: int, d_v: int
) -> tuple[Array, Array, Array]:
    return (
        rng.normal(size=(b, h, n_q, d)),
        rng.normal(size=(b, h, n_k, d)),
        rng.normal(size=(b, h, n_k, d_v)),
    )


def _some(rng: Rng, *shape: int) -> Array:
    """A random mask in which every row sees at least one key, and one at most half of them."""
    mask = rng.random(shape) < 0.6
    mask[..., rng.integers(shape[-1])] = True
    mask.reshape(-1, shape[-1])[0] = np.arange(shape[-1]) < shape[-1] // 2
    return mask


def _causal(n_q: int, n_k: int) -> Array:
    return np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q


def _forward_cases(rng: Rng) -> list[Case]:
    q, k, v = _inputs(rng, 2, 3, 4, 5, 6, 7)
    far = np.array(k)
    far[:, :, 3:] += 40 * np.sign(q.sum()) * q.mean(axis=2, keepdims=True)
    hidden = np.arange(5) < 3
    behind = _inputs(rng, 2, 3, 4, 5, 6, 7)
    behind[0][...] = np.abs(behind[0])
    behind[1][:, :, 3:] = 3e3 + rng.normal(size=(2, 3, 2, 6))
    lengths = rng.permutation([5, 3, 1])
    blind = _some(rng, 2, 1, 4, 5)
    blind[0, 0, rng.integers(4)] = False
    blind[1] = False
    small = [x.astype(np.float32) for x in _inputs(rng, 2, 3, 4, 5, 6, 7)]
    return [
        Case("several heads", (q, k, v), hint="Every head of every sequence works by itself."),
        Case("one head", _inputs(rng, 3, 1, 4, 2, 5, 6), hint="H = 1."),
        Case("one query", _inputs(rng, 2, 3, 1, 4, 5, 6), hint="One row of weights a head."),
        Case(
            "one key",
            _inputs(rng, 2, 3, 4, 1, 5, 6),
            hint="One key takes all the weight, whatever its logit: each output is its value.",
        ),
        Case(
            "all lengths alike",
            _inputs(rng, 3, 3, 3, 3, 3, 3),
            hint="No shape complains here when an axis is taken for another.",
        ),
        Case(
            "a mask of queries and keys",
            (*_inputs(rng, 2, 3, 4, 5, 6, 7), _some(rng, 4, 5)),
            hint="One (Nq, Nk) mask serves all sequences and heads.",
        ),
        Case(
            "a causal mask",
            (*_inputs(rng, 2, 3, 4, 6, 5, 7), _causal(4, 6)),
            hint="Aligned bottom-right; the mask comes ready made.",
        ),
        Case(
            "a padding mask",
            (*_inputs(rng, 3, 2, 4, 5, 6, 7), np.arange(5) < lengths[:, None, None, None]),
            hint="A mask of shape (B, 1, 1, Nk), one row for each sequence.",
        ),
        Case(
            "a mask for each head",
            (*_inputs(rng, 2, 3, 4, 5, 6, 7), _some(rng, 3, 4, 5)),
            hint="A mask of shape (H, Nq, Nk): heads may look at different things.",
        ),
        Case(
            "rows that see nothing",
            (*_inputs(rng, 2, 3, 4, 5, 6, 7), blind),
            hint="Where a row of the mask is all False, output and probabilities are 0.",
        ),
        Case(
            "large logits",
            tuple(x * s for x, s in zip(_inputs(rng, 2, 3, 4, 5, 6, 7), (100, 40, 1), strict=True)),
            hint="Logits of thousands: exp overflows unless each row's maximum is subtracted.",
        ),
        Case(
            "large logits behind the mask",
            (*behind, hidden),
            hint="The largest logits are masked out: the maximum is that of what may be seen.",
        ),
        Case(
            "not contiguous in memory",
            tuple(scattered(x) for x in _inputs(rng, 2, 3, 4, 5, 6, 7)),
            hint="The same numbers in another memory order: reshape copies here.",
        ),
        Case(
            "float32 input",
            (*small, _causal(4, 5)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _backward_call(
    rng: Rng, *lengths: int, mask: Array | None = None, spread: float = 1.0
) -> tuple[Array, ...]:
    q, k, v = _inputs(rng, *lengths)
    q = spread * q
    _, probs = _forward_by_pairs(q, k, v, mask)
    return rng.normal(size=(*q.shape[:3], v.shape[-1])), q, k, v, probs


def _blind_rows(rng: Rng) -> Array:
    mask = _some(rng, 2, 1, 4, 5)
    mask[0, 0, rng.integers(4)] = False
    mask[1] = False
    return mask


def _backward_cases(rng: Rng) -> list[Case]:
    usual = (2, 3, 4, 5, 6, 7)
    one_entry = np.zeros((2, 3, 4, 7))
    one_entry[tuple(rng.integers(n) for n in one_entry.shape)] = rng.normal() + 2
    alike = list(_backward_call(rng, *usual))
    alike[3][:, 1] = alike[3][:, 1, :1]
    small = _backward_call(rng, *usual)
    return [
        Case(
            "several heads",
            _backward_call(rng, *usual),
            hint="Every head of every sequence works by itself.",
        ),
        Case("one head", _backward_call(rng, 3, 1, 4, 2, 5, 6), hint="H = 1."),
        Case(
            "one query",
            _backward_call(rng, 2, 3, 1, 4, 5, 6),
            hint="Nq = 1: dk and dv are outer products.",
        ),
        Case(
            "one key",
            _backward_call(rng, 2, 3, 4, 1, 5, 6),
            hint="The one key has weight 1 whatever its logit: dq and dk are 0.",
        ),
        Case(
            "all lengths alike",
            _backward_call(rng, 3, 3, 3, 3, 3, 3),
            hint="No shape complains here when a transpose is missing.",
        ),
        Case(
            "long and narrow",
            _backward_call(rng, 1, 2, 9, 8, 3, 4),
            hint="More tokens than columns.",
        ),
        Case(
            "a causal mask",
            _backward_call(rng, 2, 3, 4, 6, 5, 7, mask=_causal(4, 6)),
            hint="Masked entries have weight 0: nothing flows through them.",
        ),
        Case(
            "rows that see nothing",
            _backward_call(rng, *usual, mask=_blind_rows(rng)),
            hint="A row of zero weights gives zero gradients.",
        ),
        Case(
            "sharp weights",
            _backward_call(rng, *usual, spread=6.0),
            hint="Most of each row's weight on one key.",
        ),
        Case(
            "all values of a head alike",
            tuple(alike),
            hint="What head 1 returns does not depend on its weights: its dq and dk are 0.",
        ),
        Case(
            "upstream in one entry",
            (one_entry, *_backward_call(rng, *usual)[1:]),
            hint="One head of one sequence has gradients, the others none.",
        ),
        Case(
            "not contiguous in memory",
            tuple(scattered(x) for x in _backward_call(rng, *usual)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            tuple(x.astype(np.float32) for x in small),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _keep(rng: Rng, call: tuple[Array, ...], rate: float) -> Array:
    """At least one entry kept, and one dropped that has weight."""
    probs = call[4]
    keep = rng.random(probs.shape) >= rate
    flat = keep.reshape(-1)
    flat[:2] = [True, False]
    flat[probs.argmax()] = False
    return keep


def _dropout_cases(rng: Rng) -> list[Case]:
    usual = (2, 3, 4, 5, 6, 7)

    def dropped(*lengths: int, rate: float | None = None, **options: Any) -> tuple[Any, ...]:
        call = _backward_call(rng, *lengths, **options)
        rate = float(rng.uniform(0.2, 0.45)) if rate is None else rate
        return (*call, _keep(rng, call, rate), rate)

    rows = list(dropped(*usual))
    rows[5] = rows[5].copy()
    rows[5][0, :, rng.integers(4)] = False
    rows[5][1, rng.integers(3)] = False
    everything = _backward_call(rng, *usual)
    spaced, small = dropped(*usual), dropped(*usual)
    return [
        Case("several heads", dropped(*usual), hint="A mask of its own for every head."),
        Case(
            "most dropped",
            dropped(*usual, rate=0.8),
            hint="At rate 0.8 what is kept counts five times.",
        ),
        Case(
            "half dropped", dropped(*usual, rate=0.5), hint="rate and 1 - rate are the same here."
        ),
        Case(
            "nothing dropped",
            (*everything, np.ones((2, 3, 4, 5), bool), 0.0),
            hint="Rate 0: the gradients of attention without dropout.",
        ),
        Case(
            "whole rows dropped",
            tuple(rows),
            hint="A query whose weights are all dropped has output 0 and sends nothing back.",
        ),
        Case("one query", dropped(2, 3, 1, 4, 5, 6), hint="Nq = 1."),
        Case(
            "all lengths alike",
            dropped(3, 3, 3, 3, 3, 3),
            hint="No shape complains here when a transpose is missing.",
        ),
        Case(
            "a causal mask",
            dropped(2, 3, 4, 6, 5, 7, mask=_causal(4, 6)),
            hint="Masked entries have weight 0, kept or not.",
        ),
        Case(
            "rows that see nothing",
            dropped(*usual, mask=_blind_rows(rng)),
            hint="A row of zero weights gives zero gradients.",
        ),
        Case(
            "not contiguous in memory",
            (*(scattered(x) for x in spaced[:6]), spaced[6]),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (*(x.astype(np.float32) for x in small[:5]), *small[5:]),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- oracles: the same values by another road ----------------------------------------------


def _causal_by_rows(n_q: int, n_k: int) -> Array:
    """Counted from the end: the last query misses no key, the one before it the last key, …"""
    mask = np.zeros((n_q, n_k), bool)
    for back in range(n_q):
        mask[n_q - 1 - back, : max(n_k - back, 0)] = True
    return mask


def _padding_by_rows(lengths: Array, n_k: int) -> Array:
    """``length`` times True, then False, sequence by sequence."""
    rows = [[True] * int(n) + [False] * (n_k - int(n)) for n in lengths]
    return np.array(rows, bool).reshape(len(rows), 1, 1, n_k)


@quiet
def _forward_by_pairs(
    q: Array, k: Array, v: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """``p_ij = 1 / sum_m exp(z_im - z_ij)`` over the keys m that i may see."""
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    z = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(q.shape[-1])
    seen = np.broadcast_to(True if mask is None else mask, z.shape)
    gaps = np.where(seen[..., None, :], z[..., None, :] - z[..., :, None], -INF)
    probs = np.where(seen, 1 / np.exp(gaps).sum(axis=-1), 0.0)
    return np.einsum("bhij,bhjc->bhic", probs, v), probs


def _backward_by_complex_step(
    dout: Array, q: Array, k: Array, v: Array, probs: Array
) -> tuple[Array, Array, Array]:
    """The logits' gradient one column at a time by the complex step, the rest by index sums."""
    return _dropout_by_complex_step(dout, q, k, v, probs, np.array(True), 0.0)


def _dropout_by_complex_step(
    dout: Array, q: Array, k: Array, v: Array, probs: Array, keep: Array, rate: float
) -> tuple[Array, Array, Array]:
    dout, q, k, v, probs = (np.asarray(x, float) for x in (dout, q, k, v, probs))
    factor, step = np.where(keep, 1 / (1 - rate), 0.0), 1e-30
    dlogits = np.zeros(probs.shape)
    for j in range(probs.shape[-1]):
        # softmax(log p + i h e_j): column j of p turned by i h, the row divided by its sum.
        moved = probs.astype(complex)
        moved[..., j] *= np.exp(1j * step)
        total = moved.sum(axis=-1, keepdims=True)
        out = np.einsum("bhim,bhmc->bhic", factor * moved / np.where(total == 0, 1, total), v)
        dlogits[..., j] = (dout * out).sum(axis=-1).imag / step
    root = np.sqrt(q.shape[-1])
    dq = np.einsum("bhij,bhjd->bhid", dlogits, k) / root
    dk = np.einsum("bhij,bhid->bhjd", dlogits, q) / root
    return dq, dk, np.einsum("bhij,bhic->bhjc", factor * probs, dout)


# --- mistakes: causal_mask ------------------------------------------------------------------


def _tri(shift: Callable[[int, int], int]) -> Callable[..., Array]:
    return lambda n_q, n_k: np.tri(n_q, n_k, shift(n_q, n_k), dtype=bool)


def _triu(shift: Callable[[int, int], int]) -> Callable[..., Array]:
    return lambda n_q, n_k: ~np.tri(n_q, n_k, shift(n_q, n_k) - 1, dtype=bool)


def _causal_changed(change: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda n_q, n_k: change(_causal(n_q, n_k))


def _additive(mask: Array) -> Array:
    return np.where(mask, 0.0, -INF)


CAUSAL_MASK = Exercise(
    id="causal_mask",
    chapter=CHAPTER,
    title="Who may see whom",
    points=1,
    returns=("mask",),
    reference=library.causal_mask,
    oracle=_causal_by_rows,
    cases=_causal_cases,
    mistakes=(
        *named(
            "strictly lower",
            "A token may see itself: the diagonal that ends in the last row and column is True.",
            CAUSAL,
            _tri(lambda n_q, n_k: n_k - n_q - 1),
        ),
        *named(
            "upper",
            "The triangle that is True lies below the diagonal: with queries as rows, keys to "
            "the right are in the future.",
            CAUSAL,
            _triu(lambda n_q, n_k: n_k - n_q),
            _triu(lambda n_q, n_k: 0),
        ),
        *named(
            "True where hidden",
            "Here True means may attend; in torch's nn.MultiheadAttention a boolean mask says "
            "the opposite.",
            MASK,
            _triu(lambda n_q, n_k: n_k - n_q + 1),
            _triu(lambda n_q, n_k: 1),
        ),
        *named(
            "top-left when n_q≠n_k",
            "The queries are the last n_q of n_k positions, so query i stands at position "
            "i + n_k - n_q; aligned top-left, a decoding step sees key 0 alone.",
            CAUSAL,
            _tri(lambda n_q, n_k: 0),
        ),
        *named(
            "strictly lower and top-left",
            "Two things: a token may see itself, and the last query sees all keys.",
            CAUSAL,
            _tri(lambda n_q, n_k: -1),
        ),
        *named(
            "offset with the wrong sign",
            "Query i stands at key i + n_k - n_q, not at i + n_q - n_k.",
            CAUSAL,
            _tri(lambda n_q, n_k: n_q - n_k),
        ),
        *named(
            "one key of the future",
            "The diagonal lies one too far to the right: every query sees the key after its own.",
            CAUSAL,
            _tri(lambda n_q, n_k: n_k - n_q + 1),
        ),
        *named(
            "axes swapped",
            "Queries are the rows, keys the columns: the shape is (n_q, n_k).",
            SHAPES,
            lambda n_q, n_k: _causal(n_k, n_q),
            lambda n_q, n_k: np.tri(n_k, n_q, dtype=bool),
            _causal_changed(np.transpose),
        ),
        *named(
            "square whatever n_q is",
            "The mask has a row for each of the n_q queries, not for each key.",
            SHAPES,
            lambda n_q, n_k: np.tri(n_k, dtype=bool),
        ),
        *named(
            "square whatever n_k is",
            "The mask has a column for each of the n_k keys, not for each query.",
            SHAPES,
            lambda n_q, n_k: np.tri(n_q, dtype=bool),
        ),
        *named(
            "numbers instead of booleans",
            "A mask of 0 and 1 is not boolean: `~` and `np.where` treat it differently. Pass "
            "dtype=bool, or compare.",
            MASK,
            _causal_changed(lambda mask: mask.astype(float)),
            lambda n_q, n_k: np.tri(n_q, n_k),
        ),
        *named(
            "additive instead of boolean",
            "0 and -inf are what is added to the logits; the mask itself says True and False.",
            MASK,
            _causal_changed(_additive),
            _causal_changed(lambda mask: np.where(mask, 0.0, -1e9)),
        ),
        *named(
            "four axes",
            "The mask has two axes; it broadcasts over batch and heads by itself.",
            SHAPES,
            _causal_changed(lambda mask: mask[None, None]),
        ),
    ),
)


# --- mistakes: padding_mask -----------------------------------------------------------------


def _padding_changed(change: Callable[[Array], Array]) -> Callable[..., Array]:
    return lambda lengths, n_k: change(np.arange(n_k) < lengths[:, None, None, None])


PADDING_MASK = Exercise(
    id="padding_mask",
    chapter=CHAPTER,
    title="Tokens and padding",
    points=1,
    returns=("mask",),
    reference=library.padding_mask,
    oracle=_padding_by_rows,
    cases=_padding_cases,
    mistakes=(
        *named(
            "True where padding",
            "Here True means may attend; torch's key_padding_mask is True at the padding.",
            PADDING,
            _padding_changed(np.logical_not),
        ),
        *named(
            "one key too many",
            "A sequence of length n has the keys 0 … n - 1: compare with <, not <=.",
            PADDING,
            lambda lengths, n_k: np.arange(n_k) <= lengths[:, None, None, None],
        ),
        *named(
            "one key too few",
            "A sequence of length n has the keys 0 … n - 1, n of them.",
            PADDING,
            lambda lengths, n_k: np.arange(n_k) < lengths[:, None, None, None] - 1,
            lambda lengths, n_k: np.arange(1, n_k + 1) < lengths[:, None, None, None],
        ),
        *named(
            "padding in front",
            "The tokens come first and the padding behind them.",
            PADDING,
            lambda lengths, n_k: np.arange(n_k) >= n_k - lengths[:, None, None, None],
        ),
        *named(
            "two axes",
            "A mask of shape (B, Nk) lines up with (Nq, Nk) of the logits, not with batch and "
            "keys: give it axes of length 1 for heads and queries.",
            PADDING,
            _padding_changed(lambda mask: mask[:, 0, 0]),
        ),
        *named(
            "three axes",
            "A mask of shape (B, 1, Nk) lines up with (H, Nq, Nk) of the logits: it needs an "
            "axis for the heads too.",
            PADDING,
            _padding_changed(lambda mask: mask[:, 0]),
        ),
        *named(
            "axes in the wrong places",
            "The batch is the first axis and the keys are the last, with two axes of length 1 "
            "between them.",
            SHAPES,
            _padding_changed(lambda mask: mask.transpose(1, 2, 0, 3)),
            _padding_changed(lambda mask: mask.transpose(0, 1, 3, 2)),
            _padding_changed(lambda mask: mask.transpose(0, 3, 1, 2)),
            _padding_changed(lambda mask: mask.transpose(1, 0, 2, 3)),
            _padding_changed(lambda mask: mask.transpose(3, 1, 2, 0)),
        ),
        *named(
            "queries masked too",
            "What a padded query computes is nobody's business, and masking its row makes it "
            "fully masked: the mask is about keys only, with shape (B, 1, 1, Nk).",
            PADDING,
            _padding_changed(lambda mask: mask & _turned(mask)),
        ),
        *named(
            "written out over queries",
            "An axis of length 1 broadcasts over the queries, whose number nobody gave: the "
            "shape is (B, 1, 1, Nk).",
            SHAPES,
            _padding_changed(lambda mask: np.repeat(mask, mask.shape[-1], axis=2)),
        ),
        *named(
            "width from the longest sequence",
            "The mask is n_k wide, padding of the longest sequence included.",
            PADDING,
            lambda lengths, n_k: np.arange(lengths.max()) < lengths[:, None, None, None],
        ),
        *named(
            "one length for all",
            "Every sequence has its own length.",
            PADDING,
            *(
                lambda lengths, n_k, pick=pick: np.repeat(
                    np.arange(n_k)[None, None, None] < pick(lengths), len(lengths), axis=0
                )
                for pick in (np.max, np.min, lambda lengths: lengths[0])
            ),
        ),
        *named(
            "numbers instead of booleans",
            "A mask of 0 and 1 is not boolean: `~` and `np.where` treat it differently.",
            MASK,
            _padding_changed(lambda mask: mask.astype(float)),
        ),
        *named(
            "additive instead of boolean",
            "0 and -inf are what is added to the logits; the mask itself says True and False.",
            MASK,
            _padding_changed(_additive),
            _padding_changed(lambda mask: np.where(mask, 0.0, -1e9)),
        ),
    ),
)


# --- mistakes: attention_forward ------------------------------------------------------------


def _root(q: Array, k: Array, v: Array) -> float:
    return q.shape[-1] ** 0.5


def _dots(q: Array, k: Array) -> Array:
    return q @ _turned(k)


def _masked(z: Array, mask: Array | None) -> Array:
    return z if mask is None else np.where(mask, z, -INF)


def _attend(
    root: Callable[..., float] = _root,
    dots: Callable[..., Array] = _dots,
    masked: Callable[..., Array] = _masked,
    weigh: Callable[..., Array] = softmax,
    end: Callable[..., Any] = lambda probs, v, z, mask: (probs @ v, probs),
) -> Callable[..., Any]:
    """attention_forward with one of its steps replaced."""

    def answer(q, k, v, mask=None):
        z = dots(q, k) / root(q, k, v)
        return end(weigh(masked(z, mask)), v, z, mask)

    return answer


def _plain_softmax(z: Array) -> Array:
    """Without a guard for rows of nothing but -inf."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _softmax_without_max(z: Array) -> Array:
    e = np.exp(z)
    return e / e.sum(axis=-1, keepdims=True)


def _guarded_without_max(z: Array) -> Array:
    e = np.exp(z)
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def _after_softmax(weigh: Callable[[Array], Array]) -> Callable[..., Any]:
    def answer(q, k, v, mask=None):
        probs = weigh(_dots(q, k) / _root(q, k, v))
        probs = probs if mask is None else probs * mask
        return probs @ v, probs

    return answer


def _renormalised_without_guard(q, k, v, mask=None):
    probs = softmax(_dots(q, k) / _root(q, k, v))
    if mask is not None:
        probs = probs * mask
        probs = probs / probs.sum(axis=-1, keepdims=True)
    return probs @ v, probs


def _max_over_hidden(guarded: bool) -> Callable[..., Any]:
    def answer(q, k, v, mask=None):
        z = _dots(q, k) / _root(q, k, v)
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        e = e if mask is None else e * mask
        total = e.sum(axis=-1, keepdims=True)
        probs = e / (np.where(total == 0, 1, total) if guarded else total)
        return probs @ v, probs

    return answer


def _sentinel(value: float) -> Callable[..., Any]:
    return _attend(masked=lambda z, mask: z if mask is None else np.where(mask, z, value))


def _added(value: float) -> Callable[..., Any]:
    return _attend(masked=lambda z, mask: z if mask is None else z + value * ~mask)


def _out_only(change: Callable[..., Array]) -> Callable[..., Any]:
    """Another out; the probabilities are right."""

    def answer(q, k, v, mask=None):
        _, probs = library.attention_forward(q, k, v, mask)
        return change(probs, q, k, v), probs

    return answer


def _unmasked_returned(q, k, v, mask=None):
    return library.attention_forward(q, k, v, mask)[0], library.attention_forward(q, k, v)[1]


def _zero_out_uniform(q, k, v, mask=None):
    """NaN replaced in out only."""
    z = _masked(_dots(q, k) / _root(q, k, v), mask)
    probs = _plain_softmax(z)
    return np.nan_to_num(probs) @ v, probs


# Logarithms of smaller weights say little about the logits.
FAINT = 1e-9


def _centred(z: Array) -> Array:
    """A softmax forgets what is added to a whole row."""
    return z - z.mean(axis=-1, keepdims=True)


@quiet
def _solved_logits(probs: Array, mask: Array | None) -> Array | None:
    usable = mask is None and probs.size and np.isfinite(probs).all() and probs.min() > FAINT
    return _centred(np.log(np.asarray(probs, float))) if usable else None


SENTINELS = (-1e4, -1e6, -1e8, -1e9, -1e10, -1e15, -1e20, -1e30)

ATTENTION_FORWARD = Exercise(
    id="attention_forward",
    chapter=CHAPTER,
    title="Scaled dot-product attention",
    points=3,
    returns=("out", "probs"),
    reference=library.attention_forward,
    oracle=_forward_by_pairs,
    cases=_forward_cases,
    tokens=("probs",),
    intermediates=(
        Intermediate(
            "logits (less each row's mean)",
            lambda q, k, v, mask, **_: _centred(_dots(q, k) / _root(q, k, v)),
            {"probs": lambda probs, q, k, v, mask, **_: _solved_logits(probs, mask)},
        ),
        Intermediate(
            "the weight matrix in out",
            lambda q, k, v, mask, **_: _forward_by_pairs(q, k, v, mask)[1],
            {"out": lambda out, q, k, v, mask, **_: left_factor(out, v)},
        ),
    ),
    mistakes=(
        *named(
            "no 1/√d",
            "A dot product of d independent terms has variance d: without 1/√d the softmax "
            "saturates as d grows.",
            SCALE,
            _attend(root=lambda q, k, v: 1.0),
        ),
        *named(
            "1/√(H·d)",
            "Each head's dot product has d terms, so its scale is 1/√d, the width of the head "
            "and not that of the model; with one head nobody sees the difference.",
            SCALE,
            _attend(root=lambda q, k, v: (q.shape[1] * q.shape[-1]) ** 0.5),
        ),
        *named(
            "1/d instead of 1/√d",
            "The standard deviation of a dot product of d terms is √d, not d.",
            SCALE,
            _attend(root=lambda q, k, v: q.shape[-1]),
        ),
        *named(
            "multiplied by √d",
            "The logits are divided by √d.",
            SCALE,
            _attend(root=lambda q, k, v: q.shape[-1] ** -0.5),
        ),
        *named(
            "scale from another length",
            "The scale is 1/√d with d the last axis of q and k: not a number of tokens, nor the "
            "width of v.",
            SCALE,
            *(
                _attend(root=lambda q, k, v, a=a, i=i: (q, k, v)[a].shape[i] ** 0.5)
                for a, i in ((0, 2), (1, 2), (2, 3), (0, 1), (0, 0))
            ),
        ),
        *named(
            "scaled after softmax",
            "The scale belongs to the logits; dividing the probabilities leaves the softmax as "
            "sharp as before, and their sum at 1/√d.",
            SCALE,
            lambda q, k, v, mask=None: tuple(
                x / q.shape[-1] ** 0.5 for x in _attend(root=lambda q, k, v: 1.0)(q, k, v, mask)
            ),
            _attend(
                root=lambda q, k, v: 1.0,
                end=lambda probs, v, z, mask: (probs @ v / v.shape[-1] ** 0.5, probs),
            ),
            lambda q, k, v, mask=None: (
                _attend(root=lambda q, k, v: 1.0)(q, k, v, mask)[0] / q.shape[-1] ** 0.5,
                _attend(root=lambda q, k, v: 1.0)(q, k, v, mask)[1],
            ),
        ),
        *named(
            "mask after softmax",
            "Weights set to 0 after the softmax leave the others too small: the row no longer "
            "sums to 1. The mask goes on the logits, as -inf.",
            MASK,
            _after_softmax(softmax),
            _after_softmax(_plain_softmax),
        ),
        *named(
            "multiplied instead of masked",
            "A logit of 0 is not ruled out, it has weight exp(0): masked logits are -inf.",
            MASK,
            _attend(masked=lambda z, mask: z if mask is None else z * mask),
            _attend(masked=lambda z, mask: z if mask is None else np.where(mask, z, 0)),
        ),
        *named(
            "NaN on a fully masked row",
            "A row of nothing but -inf has maximum -inf, and -inf - -inf is NaN; such a row has "
            "no weights to give: set it to 0.",
            INFINITY,
            _attend(weigh=_plain_softmax),
            _zero_out_uniform,
        ),
        *named(
            "finite sentinel on a fully masked row",
            "In a row that sees nothing all logits are the same finite number, so the softmax is "
            "uniform and the padding is averaged: use -inf, and set such rows to 0.",
            INFINITY,
            *(_sentinel(value) for value in (*SENTINELS, float(np.finfo(np.float32).min))),
            *(_added(value) for value in SENTINELS),
        ),
        *named(
            "0 · inf is NaN",
            "(1 - mask) * -inf is NaN where the mask is True: choose with np.where instead of "
            "multiplying.",
            INFINITY,
            _added(-INF),
        ),
        *named(
            "mask the wrong way round",
            "True means may attend: what is False becomes -inf.",
            MASK,
            _attend(masked=lambda z, mask: z if mask is None else np.where(mask, -INF, z)),
            _attend(
                masked=lambda z, mask: z if mask is None else np.where(mask, -INF, z),
                weigh=_plain_softmax,
            ),
        ),
        *named(
            "mask ignored",
            "The logits of keys that may not be seen have to become -inf.",
            MASK,
            _attend(masked=lambda z, mask: z),
        ),
        *named(
            "maximum over hidden keys",
            "The row's maximum was taken before the mask: where a hidden key has it, all that may "
            "be seen underflows to 0. Mask first.",
            INFINITY,
            _max_over_hidden(guarded=False),
            _max_over_hidden(guarded=True),
            _renormalised_without_guard,
        ),
        *named(
            "no max subtraction",
            "exp overflows above 709, and inf / inf is NaN: subtract each row's maximum.",
            FORWARD,
            _attend(weigh=_softmax_without_max),
            _attend(weigh=_guarded_without_max),
        ),
        *named(
            "softmax over the wrong axis",
            "Keys compete for each query: the softmax runs along the last axis of the logits.",
            FORWARD,
            *(_attend(weigh=lambda z, axis=axis: softmax(z, axis)) for axis in (-2, 1, 0)),
        ),
        *named(
            "keys reshaped instead of transposed",
            "reshape keeps the order of the numbers in memory and so mixes tokens with columns; "
            "swapaxes(-1, -2) exchanges the axes.",
            SHAPES,
            _attend(dots=lambda q, k: q @ k.reshape(*k.shape[:2], k.shape[3], k.shape[2])),
        ),
        *named(
            "keys not transposed",
            "Each query meets each key: q @ k needs k with its last two axes exchanged.",
            SHAPES,
            _attend(dots=lambda q, k: q @ k),
        ),
        *named(
            "queries and keys swapped",
            "Rows of the logits are queries: q @ kᵀ, not k @ qᵀ.",
            SHAPES,
            _attend(dots=lambda q, k: _dots(k, q)),
        ),
        *named(
            "out and probs swapped",
            "out comes first, then probs.",
            FORWARD,
            lambda q, k, v, mask=None: library.attention_forward(q, k, v, mask)[::-1],
        ),
        *named(
            "logits instead of probs returned",
            "The second result are the weights after the softmax.",
            FORWARD,
            _attend(end=lambda probs, v, z, mask: (probs @ v, z)),
            _attend(end=lambda probs, v, z, mask: (probs @ v, _masked(z, mask))),
        ),
        *named(
            "probs returned without the mask",
            "out is right; the probabilities that are returned have to be those it was made of.",
            FORWARD,
            _unmasked_returned,
        ),
        *named(
            "weights transposed",
            "Row i of the weights belongs to query i: out = probs @ v.",
            FORWARD,
            _out_only(lambda probs, q, k, v: _turned(probs) @ v),
        ),
        *named(
            "only out returned",
            "Two values are asked for, out and probs: the backward pass needs the probabilities.",
            FORWARD,
            lambda q, k, v, mask=None: library.attention_forward(q, k, v, mask)[0],
        ),
    ),
)


# --- mistakes: the backward pass ------------------------------------------------------------

DEFAULT: dict[str, Callable[..., Any]] = {
    "dv": lambda dropped, dout, probs, w: _turned(dropped) @ dout,
    "dprobs": lambda dout, v, w, keep, rate: (dout @ _turned(v)) * w,
    "dlogits": lambda dprobs, probs, dropped, w: softmax_backward(dprobs, probs),
    "dq": lambda dlogits, q, k: dlogits @ k,
    "dk": lambda dlogits, q, k: _turned(dlogits) @ q,
    "scale_q": lambda q, v: q.shape[-1] ** -0.5,
    "scale_k": lambda q, v: q.shape[-1] ** -0.5,
    "factor": lambda keep, rate: keep / (1 - rate),
    "end": lambda dq, dk, dv: (dq, dk, dv),
}


def _back(**steps: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass with some of its steps replaced; with dropout where it is asked for."""
    do = DEFAULT | steps

    def answer(dout, q, k, v, probs, keep=True, rate=0.0):
        w = do["factor"](keep, rate)
        dropped = np.asarray(probs * w, probs.dtype)
        dv = do["dv"](dropped, dout, probs, w)
        dprobs = do["dprobs"](dout, v, w, keep, rate)
        dlogits = do["dlogits"](dprobs, probs, dropped, w)
        dq = do["scale_q"](q, v) * do["dq"](dlogits, q, k)
        dk = do["scale_k"](q, v) * do["dk"](dlogits, q, k)
        return do["end"](dq, dk, dv)

    return answer


def _logits_by(rule: Callable[[Array, Array], Array]) -> Callable[..., Any]:
    return _back(dlogits=lambda dprobs, probs, dropped, w: rule(dprobs, probs))


def _scaled(rule: Callable[[Array, Array], float]) -> Callable[..., Any]:
    return _back(scale_q=rule, scale_k=rule)


def _one(q: Array, v: Array) -> float:
    return 1.0


def _reshaped(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2])


# Of chapter 1's mistakes those that are not listed here under a name of their own.
CARRIED = (
    "mean instead of sum",
    "p not multiplied into both terms",
    "multiplied by upstream twice",
    "p * dp multiplied by p again",
    "keepdims forgotten",
)


def _from_softmax_backward() -> tuple[Mistake, ...]:
    return tuple(
        replace(carried(m, "softmax_backward", quiet(_logits_by(m.answer))), section=DLOGITS)
        for m in ch01_softmax.BACKWARD_EXERCISE.mistakes
        if m.name in CARRIED
    )


def _solved_dlogits(product: Array, factor: Array, q: Array) -> Array | None:
    found = left_factor(product, factor)
    return None if found is None else found * q.shape[-1] ** 0.5


def _solved_from_dk(dk: Array, q: Array) -> Array | None:
    found = _solved_dlogits(dk, q, q)
    return None if found is None else _turned(found)


def _solved_weights(dv: Array, dout: Array) -> Array | None:
    found = left_factor(dv, dout)
    return None if found is None else _turned(found)


def _dlogits(dout: Array, v: Array, probs: Array, w: Any = 1.0) -> Array:
    return softmax_backward((dout @ _turned(v)) * w, probs)


ATTENTION_BACKWARD = Exercise(
    id="attention_backward",
    chapter=CHAPTER,
    title="The backward pass",
    points=4,
    returns=("dq", "dk", "dv"),
    reference=library.attention_backward,
    oracle=_backward_by_complex_step,
    cases=_backward_cases,
    tokens=("dq", "dk", "dv"),
    intermediates=(
        Intermediate(
            "dlogits",
            lambda dout, q, k, v, probs, **_: _dlogits(dout, v, probs),
            {
                "dq": lambda dq, dout, q, k, v, probs, **_: _solved_dlogits(dq, k, q),
                "dk": lambda dk, dout, q, k, v, probs, **_: _solved_from_dk(dk, q),
            },
        ),
        Intermediate(
            "the weight matrix in dv",
            lambda dout, q, k, v, probs, **_: probs,
            {"dv": lambda dv, dout, q, k, v, probs, **_: _solved_weights(dv, dout)},
        ),
    ),
    mistakes=(
        *named(
            "scale forgotten in dq or dk",
            "The logits are q · k / √d, so what flows back to q and to k passes through 1/√d "
            "in both.",
            DQDK,
            _scaled(_one),
            _back(scale_q=_one),
            _back(scale_k=_one),
        ),
        *named(
            "scale applied twice",
            "1/√d enters dq and dk once: where dlogits were scaled already, the products are not.",
            DQDK,
            _scaled(lambda q, v: 1 / q.shape[-1]),
            _back(scale_q=lambda q, v: 1 / q.shape[-1]),
            _back(scale_k=lambda q, v: 1 / q.shape[-1]),
        ),
        *named(
            "multiplied by √d",
            "The forward pass divides by √d, and so does its derivative.",
            DQDK,
            _scaled(lambda q, v: q.shape[-1] ** 0.5),
        ),
        *named(
            "1/√(H·d)",
            "The scale is that of one head's width, 1/√d, as in the forward pass.",
            SCALE,
            _scaled(lambda q, v: (q.shape[1] * q.shape[-1]) ** -0.5),
        ),
        *named(
            "1/√d_v instead of 1/√d",
            "The scale comes from the width of q and k; v may be of another.",
            SCALE,
            _scaled(lambda q, v: v.shape[-1] ** -0.5),
        ),
        *named(
            "probs not transposed for dv",
            "Key j collects from all queries that looked at it: dv = probsᵀ @ dout.",
            DV,
            _back(dv=lambda dropped, dout, probs, w: dropped @ dout),
        ),
        *named(
            "row sum dropped",
            "probs * dprobs is only the diagonal part of the softmax's Jacobian: each row's "
            "average of dprobs under probs is subtracted.",
            DLOGITS,
            _logits_by(lambda dp, p: p * dp),
        ),
        *named(
            "diagonal p(1-p)",
            "p (1 - p) is only the diagonal of the Jacobian: raising one logit lowers the other "
            "weights of its row.",
            DLOGITS,
            _logits_by(lambda dp, p: dp * p * (1 - p)),
        ),
        *named(
            "softmax skipped",
            "dprobs is the gradient by the weights; the softmax lies between them and the logits.",
            DLOGITS,
            _logits_by(lambda dp, p: dp),
        ),
        *named(
            "row sum over the wrong axis",
            "The sum runs over the keys of one query: the last axis.",
            DLOGITS,
            _logits_by(lambda dp, p: p * (dp - (p * dp).sum(-2, keepdims=True))),
            _logits_by(lambda dp, p: p * (dp - (p * dp).sum())),
            _logits_by(lambda dp, p: p * (dp - (p * dp).sum((-2, -1), keepdims=True))),
            _logits_by(lambda dp, p: p * (dp - (p * dp).sum(1, keepdims=True))),
        ),
        *named(
            "row sum not weighted by probs",
            "What is subtracted is the average of dprobs under probs, not its plain sum or mean.",
            DLOGITS,
            _logits_by(lambda dp, p: p * (dp - dp.sum(-1, keepdims=True))),
            _logits_by(lambda dp, p: p * (dp - dp.mean(-1, keepdims=True))),
        ),
        *named(
            "sign of the row sum",
            "The row sum is subtracted from dprobs; a row of dlogits sums to 0.",
            DLOGITS,
            _logits_by(lambda dp, p: p * (dp + (p * dp).sum(-1, keepdims=True))),
            _logits_by(lambda dp, p: -softmax_backward(dp, p)),
        ),
        *named(
            "softmax applied again",
            "probs are the weights after the softmax already.",
            DLOGITS,
            _logits_by(lambda dp, p: softmax_backward(dp, softmax(p))),
        ),
        *named(
            "dk transposed",
            "dk = dlogitsᵀ @ q, of k's shape: the transpose is on dlogits, not on the result, "
            "and without one queries and keys trade places.",
            DQDK,
            _back(dk=lambda dlogits, q, k: dlogits @ q),
            _back(dk=lambda dlogits, q, k: _turned(q) @ dlogits),
        ),
        *named(
            "dq and dk swapped",
            "dq is made of k and has q's shape; dk is made of q and has k's. They are returned in "
            "the order dq, dk, dv.",
            DQDK,
            _back(end=lambda dq, dk, dv: (dk, dq, dv)),
            _back(
                dq=lambda dlogits, q, k: dlogits @ q, dk=lambda dlogits, q, k: _turned(dlogits) @ k
            ),
            _back(
                dq=lambda dlogits, q, k: _turned(dlogits) @ k, dk=lambda dlogits, q, k: dlogits @ q
            ),
        ),
        *named(
            "dlogits transposed for dq",
            "Row i of dlogits belongs to query i: dq = dlogits @ k.",
            DQDK,
            _back(dq=lambda dlogits, q, k: _turned(dlogits) @ k),
        ),
        *named(
            "v not transposed",
            "dprobs[i, j] is the product of dout[i] with v[j]: dprobs = dout @ vᵀ.",
            BACKWARD,
            _back(dprobs=lambda dout, v, w, keep, rate: (dout @ v) * w),
        ),
        *named(
            "reshaped instead of transposed",
            "reshape keeps the order of the numbers in memory and so mixes tokens with columns; "
            "swapaxes(-1, -2) exchanges the axes.",
            SHAPES,
            _back(
                dv=lambda dropped, dout, probs, w: _reshaped(dropped) @ dout,
                dprobs=lambda dout, v, w, keep, rate: (dout @ _reshaped(v)) * w,
                dk=lambda dlogits, q, k: _reshaped(dlogits) @ q,
            ),
            _back(dv=lambda dropped, dout, probs, w: _reshaped(dropped) @ dout),
            _back(dprobs=lambda dout, v, w, keep, rate: (dout @ _reshaped(v)) * w),
            _back(dk=lambda dlogits, q, k: _reshaped(dlogits) @ q),
        ),
        *named(
            "another order of the results",
            "The order is that of the arguments: dq, dk, dv.",
            BACKWARD,
            _back(end=lambda dq, dk, dv: (dv, dk, dq)),
            _back(end=lambda dq, dk, dv: (dv, dq, dk)),
            _back(end=lambda dq, dk, dv: (dq, dv, dk)),
        ),
        *named(
            "summed over the batch",
            "q, k and v differ from sequence to sequence, so each has its own gradient; only "
            "parameters shared by all collect a sum.",
            SHAPES,
            _back(end=lambda dq, dk, dv: tuple(x.sum(axis=0, keepdims=True) for x in (dq, dk, dv))),
            _back(end=lambda dq, dk, dv: tuple(x.sum(axis=0) for x in (dq, dk, dv))),
            _back(end=lambda dq, dk, dv: tuple(x / len(x) for x in (dq, dk, dv))),
        ),
        *_from_softmax_backward(),
    ),
)


# --- mistakes: dropout ------------------------------------------------------------------------


def _unscaled(dout, v, w, keep, rate):
    return (dout @ _turned(v)) * keep


def _unmasked(dout, v, w, keep, rate):
    return dout @ _turned(v)


def _renormalised(dropped: Array) -> Array:
    total = dropped.sum(axis=-1, keepdims=True)
    return dropped / np.where(total == 0, 1, total)


def _factor(rule: Callable[[Any, float], Any]) -> Callable[..., Any]:
    return _back(factor=rule)


ATTENTION_BACKWARD_DROPOUT = Exercise(
    id="attention_backward_dropout",
    chapter=CHAPTER,
    title="The backward pass through dropout",
    points=3,
    returns=("dq", "dk", "dv"),
    reference=library.attention_backward_dropout,
    oracle=_dropout_by_complex_step,
    cases=_dropout_cases,
    tokens=("dq", "dk", "dv"),
    intermediates=(
        Intermediate(
            "the weight matrix in dv",
            lambda dout, q, k, v, probs, keep, rate, **_: probs * keep / (1 - rate),
            {"dv": lambda dv, dout, q, k, v, probs, keep, rate, **_: _solved_weights(dv, dout)},
        ),
        Intermediate(
            "dlogits",
            lambda dout, q, k, v, probs, keep, rate, **_: _dlogits(
                dout, v, probs, keep / (1 - rate)
            ),
            {
                "dq": lambda dq, dout, q, k, v, probs, keep, rate, **_: _solved_dlogits(dq, k, q),
                "dk": lambda dk, dout, q, k, v, probs, keep, rate, **_: _solved_from_dk(dk, q),
            },
        ),
    ),
    mistakes=(
        *named(
            "mask not applied in backward",
            "What the forward pass dropped contributed nothing to the output, and gets no "
            "gradient through it: the same keep is replayed in dv and in dprobs.",
            DROPOUT,
            lambda dout, q, k, v, probs, keep, rate: _back()(dout, q, k, v, probs),
            lambda dout, q, k, v, probs, keep, rate: _back()(dout, q, k, v, probs, True, rate),
        ),
        *named(
            "dv from undropped probabilities",
            "out = (probs * keep / (1 - rate)) @ v, so dv is made with the dropped weights.",
            DROPOUT,
            _back(dv=lambda dropped, dout, probs, w: _turned(probs) @ dout),
        ),
        *named(
            "mask forgotten in dprobs",
            "Dropout lies between probs and out, so dout @ vᵀ is the gradient by the dropped "
            "weights: times keep / (1 - rate) it is that by probs.",
            DROPOUT,
            _back(dprobs=_unmasked),
            _back(dprobs=lambda dout, v, w, keep, rate: dout @ _turned(v) / (1 - rate)),
        ),
        *named(
            "1/(1-rate) forgotten",
            "Inverted dropout divides what it keeps by 1 - rate, and the gradient passes through "
            "that factor too, in dv and in dprobs.",
            DROPOUT,
            _factor(lambda keep, rate: keep * 1.0),
            _back(dprobs=_unscaled),
            lambda dout, q, k, v, probs, keep, rate: (
                *_back()(dout, q, k, v, probs, keep, rate)[:2],
                _turned(probs * keep) @ dout,
            ),
        ),
        *named(
            "1/rate instead of 1/(1-rate)",
            "rate is the share that is dropped: what is kept is divided by 1 - rate.",
            DROPOUT,
            _factor(lambda keep, rate: keep / np.float64(rate)),
        ),
        *named(
            "multiplied by 1-rate",
            "Inverted dropout divides by 1 - rate while it trains; multiplying is what the older "
            "form does when it does not drop.",
            DROPOUT,
            _factor(lambda keep, rate: keep * (1 - rate)),
        ),
        *named(
            "keep the wrong way round",
            "keep is True where the weight is kept.",
            DROPOUT,
            _factor(lambda keep, rate: ~keep / (1 - rate)),
        ),
        *named(
            "dropped probabilities in the softmax derivative",
            "Dropout comes after the softmax: the Jacobian is made of the probabilities before "
            "it, which sum to 1.",
            DROPOUT,
            _back(dlogits=lambda dprobs, probs, dropped, w: softmax_backward(dprobs, dropped)),
            _back(
                dprobs=_unmasked,
                dlogits=lambda dprobs, probs, dropped, w: softmax_backward(dprobs, dropped),
            ),
        ),
        *named(
            "dropped after the softmax derivative",
            "Backwards, dropout comes before the softmax: dprobs is multiplied by "
            "keep / (1 - rate), then the row sum is taken. Logits of dropped weights have "
            "gradients too.",
            DROPOUT,
            _back(
                dprobs=_unmasked,
                dlogits=lambda dprobs, probs, dropped, w: softmax_backward(dprobs, probs) * w,
            ),
            _back(dlogits=lambda dprobs, probs, dropped, w: softmax_backward(dprobs, probs) * w),
        ),
        *named(
            "dropout applied twice",
            "keep / (1 - rate) enters dv once and dprobs once.",
            DROPOUT,
            _back(dprobs=lambda dout, v, w, keep, rate: (dout @ _turned(v)) * w * w),
            _back(dv=lambda dropped, dout, probs, w: _turned(dropped * w) @ dout),
        ),
        *named(
            "kept weights renormalised",
            "Dropout does not make the kept weights sum to 1 again; it divides them by 1 - rate.",
            DROPOUT,
            _back(dv=lambda dropped, dout, probs, w: _turned(_renormalised(dropped)) @ dout),
        ),
        *(
            carried(mistake, "attention_backward", mistake.answer)
            for mistake in ATTENTION_BACKWARD.mistakes
            if mistake.name != "summed over the batch"
        ),
    ),
)

EXERCISES = (
    CAUSAL_MASK,
    PADDING_MASK,
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
    ATTENTION_BACKWARD_DROPOUT,
)
