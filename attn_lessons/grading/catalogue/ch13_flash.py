"""Chapter 13: partial softmaxes merged, attention in tiles, and its backward pass in tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from attn_lessons.attention import attention_forward
from attn_lessons.flash import numpy_tiles as library
from attn_lessons.grading.catalogue import ch03_attention
from attn_lessons.grading.catalogue._parts import left_factor, named, quiet, scattered
from attn_lessons.grading.exercise import Case, Exercise, Intermediate, Mistake
from attn_lessons.grading.relations import carried

CHAPTER = "ch13_flash"
ONLINE = f"{CHAPTER}.html#ch13-online"
MERGE = f"{CHAPTER}.html#ch13-merge"
FORWARD = f"{CHAPTER}.html#ch13-forward"
RESCALE = f"{CHAPTER}.html#ch13-rescale"
LSE = f"{CHAPTER}.html#ch13-lse"
BACKWARD = f"{CHAPTER}.html#ch13-backward"
DELTA = f"{CHAPTER}.html#ch13-delta"
TILES = f"{CHAPTER}.html#ch13-tiles"
CAUSAL = f"{CHAPTER}.html#ch13-causal"
RAGGED = f"{CHAPTER}.html#ch13-ragged"
SHAPES = f"{CHAPTER}.html#ch13-shapes"

Array = np.ndarray
Rng = np.random.Generator
Answer = Callable[..., Any]
INF = np.inf
SENTINELS = (-1e4, -1e9, -1e10, -1e30, float(np.finfo(np.float32).min))


def _turned(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def _single(x: Array) -> Array:
    return x.astype(np.float32)


# --- inputs: merge_softmax_blocks ---------------------------------------------------------------


def _part(
    rng: Rng, rows: tuple[int, ...], n_keys: int, d_v: int, shift: Any = 0.0, spread: float = 1.0
) -> tuple[Array, Array, Array]:
    """What is kept of the softmax over some random logits and values."""
    z = spread * rng.normal(size=(*rows, n_keys)) + shift
    m = z.max(axis=-1)
    p = np.exp(z - m[..., None])
    return (
        m,
        p.sum(axis=-1),
        np.einsum("...j,...jc->...c", p, rng.normal(size=(*rows, n_keys, d_v))),
    )


def _emptied(part: tuple[Array, Array, Array], where: Array) -> tuple[Array, Array, Array]:
    """The same part with no key at all in some of its rows."""
    m, total, o = part
    hidden = where[..., None]
    return np.where(where, -INF, m), np.where(where, 0, total), np.where(hidden, 0, o)


def _merge_cases(rng: Rng) -> list[Case]:
    usual, every = (2, 3, 4), np.ones((2, 3, 4), bool)

    def one(n_keys: int = 6, **options: Any) -> tuple[Array, Array, Array]:
        return _part(rng, usual, n_keys, 5, **options)

    level, apart = one(), 900 * rng.choice([-1, 1], (2, 3, 4, 1))
    mixed = rng.permutation(np.arange(24) % 4).reshape(usual)
    return [
        Case(
            "rows of one head",
            (*_part(rng, (4,), 6, 5), *_part(rng, (4,), 3, 5)),
            hint="m and l of shape (4,), o of shape (4, 5).",
        ),
        Case("batch and heads", (*one(), *one(4)), hint="m and l (2, 3, 4), o (2, 3, 4, 5)."),
        Case(
            "larger logits in the second part",
            (*one(spread=0.5), *one(spread=0.5, shift=6)),
            hint="The first part's sums shrink by the factor e^(m1 - m2).",
        ),
        Case(
            "larger logits in the first part",
            (*one(spread=0.5, shift=6), *one(spread=0.5)),
            hint="The second part's sums shrink by the factor e^(m2 - m1).",
        ),
        Case(
            "equal maxima",
            (*level, level[0], *one()[1:]),
            hint="Both factors are 1: the sums are added as they are.",
        ),
        Case("one key in each part", (*one(1), *one(1)), hint="l is 1 and o is the key's value."),
        Case(
            "a large part and a small one",
            (*one(40), *one(2)),
            hint="The larger part has the larger l: sums are merged, not averages.",
        ),
        Case(
            "parts far apart",
            (*one(), *one(shift=apart)),
            hint="900 between the maxima: one factor is 1, the other 0; neither may overflow.",
        ),
        Case(
            "large logits",
            (*one(shift=1000), *one(shift=1001)),
            hint="e^1000 overflows; the differences of the maxima are small.",
        ),
        Case(
            "very negative logits",
            (*one(shift=-1000), *one(shift=-1001)),
            hint="e^-1000 is 0; the differences of the maxima are small.",
        ),
        Case(
            "an empty first part",
            (*_emptied(one(), every), *one()),
            hint="(-inf, 0, 0) is where every loop begins: the result is the second part.",
        ),
        Case(
            "an empty second part",
            (*one(), *_emptied(one(), every)),
            hint="A block of which nothing is seen changes nothing.",
        ),
        Case(
            "rows that are empty in both parts",
            (*_emptied(one(), mixed % 2 == 0), *_emptied(one(), mixed < 2)),
            hint="Where neither part has a key the result has none: -inf, 0 and 0.",
        ),
        Case(
            "as many rows as columns",
            (*_part(rng, (5,), 6, 5), *_part(rng, (5,), 3, 5)),
            hint="No shape complains here when a factor runs along the wrong axis of o.",
        ),
        Case(
            "not contiguous in memory",
            tuple(map(scattered, (*one(), *one(3)))),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            tuple(map(_single, (*one(), *one(3)))),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- inputs: attention in tiles -----------------------------------------------------------------


def _inputs(
    rng: Rng, b: int, h: int, n_q: int, n_k: int, d: int, d_v: int, spread: float = 1.0
) -> tuple[Array, Array, Array]:
    return (
        spread * rng.normal(size=(b, h, n_q, d)),
        rng.normal(size=(b, h, n_k, d)),
        rng.normal(size=(b, h, n_k, d_v)),
    )


def _lifted(call: tuple[Array, ...], rows: Any, keys: Any) -> tuple[Array, ...]:
    """Something added to every logit: ``rows`` (Nq,) by the query, ``keys`` (Nk,) by the key.

    Two more columns of q and k do it, so that nothing else changes but the width.
    """
    q, k, *rest = call
    root = (q.shape[-1] + 2) ** 0.5
    n_q, n_k = q.shape[2], k.shape[2]

    def column(x: Any, like: Array) -> Array:
        return np.broadcast_to(np.reshape(x, (-1, 1)), (*like.shape[:3], 1))

    q = np.concatenate([q, column(np.zeros(n_q) + rows, q) * root, column(root, q)], axis=-1)
    k = np.concatenate([k, column(1.0, k), column(np.zeros(n_k) + keys, k)], axis=-1)
    return (q, k, *rest)


def _hidden_giants(rng: Rng) -> tuple[Array, ...]:
    """Logits near 2000 at the last three keys, which under the causal mask few queries see."""
    return _lifted(_inputs(rng, 2, 3, 6, 8, 3, 7), 0.0, np.arange(8) // 5 * 2000.0)


def _forward_cases(rng: Rng) -> list[Case]:
    usual = (2, 3, 4, 5, 6, 7)

    def call(*sizes: int, **options: Any) -> tuple[Array, ...]:
        return _inputs(rng, *(sizes or usual), **options)

    def lifted(rows: Any, keys: Any, *sizes: int) -> tuple[Array, ...]:
        return _lifted(call(*sizes), rows, keys)

    steps = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    return [
        Case(
            "a block larger than both lengths",
            (*call(), 8),
            hint="One tile: the softmax of chapter 3, and its log-sum-exp.",
        ),
        Case("two blocks of keys", (*call(2, 3, 4, 8, 5, 6), 4), hint="Keys 0 to 3, then 4 to 7."),
        Case(
            "blocks that divide both lengths",
            (*call(2, 3, 6, 9, 4, 5), 3),
            hint="Two blocks of queries, three of keys.",
        ),
        Case("small tiles", (*call(), 2), hint="Nq 4, Nk 5, blocks of 2: the last key is alone."),
        Case(
            "ragged last blocks",
            (*call(2, 3, 7, 8, 4, 5), 3),
            hint="Queries in blocks of 3, 3 and 1; keys in blocks of 3, 3 and 2.",
        ),
        Case("blocks of one", (*call(2, 3, 4, 5, 7, 6), 1), hint="Key after key."),
        Case(
            "the largest logits in the last block",
            (*lifted(0.0, 4.0 * steps, 2, 3, 4, 8, 3, 6), 3),
            hint="The maximum grows with every block, and what was summed has to shrink.",
        ),
        Case(
            "the largest logits in the first block",
            (*lifted(0.0, -800.0 * steps, 2, 3, 4, 8, 3, 6), 3),
            hint="Later blocks lie 800 and 1600 lower: the maximum stays that of the first.",
        ),
        Case(
            "later blocks far above",
            (*lifted(0.0, 800.0 * steps, 2, 3, 4, 8, 3, 6), 3),
            hint="Each block lies 800 above the one before: only the last one counts.",
        ),
        Case(
            "rows of very different size",
            (*lifted(np.array([-900.0, 900.0, 0.0, -400.0, 1800.0]), 0.0, 2, 3, 5, 8, 4, 6), 3),
            hint="Every row has a maximum of its own; one for the whole tile makes others vanish.",
        ),
        Case("causal", (*call(2, 3, 7, 7, 4, 5), 3, True), hint="Query i sees the keys 0 … i."),
        Case(
            "causal with more keys than queries",
            (*call(2, 3, 4, 9, 5, 6), 3, True),
            hint="Bottom-right: query i sees the keys j ≤ i + 5, the last one all of them.",
        ),
        Case(
            "causal with more queries than keys",
            (*call(2, 3, 8, 5, 4, 6), 2, True),
            hint="Queries 0 to 2 see no key: out 0, lse -inf. Query 3 shares a block with query 2.",
        ),
        Case(
            "causal with large logits in the future",
            (*_hidden_giants(rng), 3, True),
            hint="Hidden keys have the largest logits: mask first, then take the maximum.",
        ),
        Case("one query", (*call(2, 3, 1, 7, 4, 5), 3), hint="Nq = 1."),
        Case(
            "one key",
            (*call(2, 3, 5, 1, 4, 6), 2),
            hint="out is the key's value, lse its logit.",
        ),
        Case(
            "all lengths alike",
            (*call(3, 3, 3, 3, 3, 3), 2),
            hint="No shape complains here when an axis is taken for another.",
        ),
        Case(
            "not contiguous in memory",
            (*map(scattered, call(2, 3, 5, 7, 4, 6)), 3),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            (*map(_single, call(2, 3, 5, 7, 4, 6)), 3, True),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _backward_call(
    rng: Rng, inputs: tuple[Array, ...], block: int, causal: bool = False
) -> tuple[Any, ...]:
    q, k, v = inputs
    out, lse = _forward_whole(q, k, v, block, causal)
    dout = rng.normal(size=out.shape)
    return (dout, q, k, v, out, lse, block, *([True] if causal else []))


def _relaid(call: tuple[Any, ...], change: Callable[[Array], Array]) -> tuple[Any, ...]:
    return tuple(change(x) if isinstance(x, np.ndarray) else x for x in call)


def _backward_cases(rng: Rng) -> list[Case]:
    def call(block: int, *sizes: int, causal: bool = False, **options: Any) -> tuple[Any, ...]:
        return _backward_call(rng, _inputs(rng, *sizes, **options), block, causal)

    usual = (2, 3, 4, 5, 6, 7)
    high = _lifted(_inputs(rng, 1, 3, 4, 7, 3, 2), 1500.0, 0.0)
    lonely = call(2, *usual)
    one_entry = np.zeros(lonely[0].shape)
    one_entry[tuple(rng.integers(n) for n in one_entry.shape)] = rng.normal() + 2
    return [
        Case(
            "a block larger than both lengths",
            call(8, *usual),
            hint="One tile: the backward pass of chapter 3.",
        ),
        Case(
            "two blocks of keys",
            call(4, 2, 3, 3, 8, 9, 6),
            hint="dq adds up over the blocks of keys; δ is that of the whole row.",
        ),
        Case(
            "two blocks of queries",
            call(4, 2, 3, 8, 3, 9, 6),
            hint="dk and dv add up over the blocks of queries.",
        ),
        Case(
            "small tiles",
            call(2, *usual),
            hint="Nq 4, Nk 5, blocks of 2: the last key is alone.",
        ),
        Case(
            "blocks that divide both lengths",
            call(3, 2, 3, 6, 9, 4, 5),
            hint="Two blocks of queries, three of keys.",
        ),
        Case(
            "ragged last blocks",
            call(3, 2, 3, 7, 8, 4, 5),
            hint="Queries in blocks of 3, 3 and 1; keys in blocks of 3, 3 and 2.",
        ),
        Case("blocks of one", call(1, 2, 3, 4, 5, 7, 6), hint="One logit at a time."),
        Case(
            "sharp weights",
            call(3, 2, 3, 5, 7, 8, 6, spread=6.0),
            hint="Most of each row's weight on one key.",
        ),
        Case(
            "large logits",
            _backward_call(rng, high, 3),
            hint="Logits near 1500, and lse too: subtract first, then take the exponential.",
        ),
        Case("causal", call(3, 2, 3, 7, 7, 8, 5, causal=True), hint="Query i sees keys 0 … i."),
        Case(
            "causal with more keys than queries",
            call(3, 2, 3, 4, 9, 5, 6, causal=True),
            hint="Bottom-right: query i sees the keys j ≤ i + 5, the last one all of them.",
        ),
        Case(
            "causal with more queries than keys",
            call(2, 2, 3, 8, 5, 4, 6, causal=True),
            hint="Queries 0 to 2 see no key: their lse is -inf, and their gradient 0.",
        ),
        Case("one query", call(3, 2, 3, 1, 7, 8, 5), hint="Nq = 1."),
        Case("one key", call(2, 2, 3, 5, 1, 4, 6), hint="Its weight is 1: dq and dk are 0."),
        Case(
            "all lengths alike",
            call(2, 3, 3, 3, 3, 3, 3),
            hint="No shape complains here when an axis is taken for another.",
        ),
        Case(
            "upstream in one entry",
            (one_entry, *lonely[1:]),
            hint="One head of one sequence has gradients, the others none.",
        ),
        Case(
            "not contiguous in memory",
            _relaid(call(3, 2, 3, 5, 7, 8, 6), scattered),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            _relaid(call(2, 2, 3, 4, 5, 8, 6, causal=True), _single),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- oracles: the same values by another road ---------------------------------------------------


def _merge_by_rows(
    m1: Array, l1: Array, o1: Array, m2: Array, l2: Array, o2: Array
) -> tuple[Array, Array, Array]:
    """Row by row: the part with the smaller maximum is brought to the other's, if it has keys."""
    first, second = ([np.asarray(x, float) for x in part] for part in ((m1, l1, o1), (m2, l2, o2)))
    m, total, o = (x.copy() for x in first)
    for row in np.ndindex(m.shape):
        high, low = [x[row] for x in first], [x[row] for x in second]
        if low[0] > high[0]:
            high, low = low, high
        share = 0.0 if np.isneginf(low[0]) else float(np.exp2((low[0] - high[0]) / np.log(2)))
        m[row], total[row], o[row] = high[0], high[1] + share * low[1], high[2] + share * low[2]
    return m, total, o


def _mask(q: Array, k: Array, causal: bool) -> Array | None:
    """The causal mask, counted from the end: the last query misses no key."""
    n_q, n_k = q.shape[2], k.shape[2]
    return np.tri(n_q, n_k, dtype=bool, k=n_k - n_q) if causal else None


@quiet
def _forward_whole(
    q: Array, k: Array, v: Array, block: int, causal: bool = False
) -> tuple[Array, Array]:
    """All keys at once; the logarithm of the sum by adding one exponential after the other."""
    mask = _mask(q, k, causal)
    z = np.einsum("bhid,bhjd->bhij", *(np.asarray(x, float) for x in (q, k))) / q.shape[-1] ** 0.5
    z = z if mask is None else np.where(mask, z, -INF)
    out, _ = ch03_attention.ATTENTION_FORWARD.oracle(q, k, v, mask)  # type: ignore[misc]
    return out, np.logaddexp.reduce(z, axis=-1)


def _backward_whole(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    block: int,
    causal: bool = False,
) -> tuple[Array, Array, Array]:
    """Chapter 3's: every logit's gradient by the complex step, the rest by index sums."""
    _, probs = ch03_attention.ATTENTION_FORWARD.oracle(  # type: ignore[misc]
        q, k, v, _mask(q, k, causal)
    )
    return ch03_attention.ATTENTION_BACKWARD.oracle(dout, q, k, v, probs)  # type: ignore[misc]


# --- mistakes: merge_softmax_blocks -------------------------------------------------------------


def _guarded(m: Array) -> Array:
    return np.where(m == -INF, 0, m).astype(m.dtype, copy=False)


def _as_it_is(m: Array) -> Array:
    return m


def _divided(o: Array, total: Array) -> Array:
    return o / total[..., None]


def _divided_guarded(o: Array, total: Array) -> Array:
    return o / np.where(total == 0, 1, total)[..., None]


def _merge(
    peak: Callable[..., Array] = np.maximum,
    guard: Callable[..., Array] = _guarded,
    power: Callable[..., Array] = np.exp,
    factors: Callable[..., Any] = lambda a, b: (a, b),
    total: Callable[..., Array] = lambda a, b, l1, l2: a * l1 + b * l2,
    o: Callable[..., Array] = lambda a, b, o1, o2: a[..., None] * o1 + b[..., None] * o2,
    end: Callable[..., Any] = lambda m, total, o: (m, total, o),
) -> Answer:
    """The merge with some of its steps replaced."""

    def answer(m1, l1, o1, m2, l2, o2):
        m = peak(m1, m2)
        a, b = factors(power(m1 - guard(m)), power(m2 - guard(m)))
        return end(m, total(a, b, l1, l2), o(a, b, o1, o2))

    return answer


def _with_and_without(build: Callable[..., Answer], **steps: Any) -> tuple[Answer, Answer]:
    """A mistake where the maximum -inf is guarded, and where it is not."""
    return build(**steps), build(guard=_as_it_is, **steps)


_merges = partial(_with_and_without, _merge)


def _inverse(both: bool) -> dict[str, Any]:
    def o(a, b, o1, o2):
        return o1 / a[..., None] + (o2 / b[..., None] if both else b[..., None] * o2)

    return {"o": o}


def _inverse_total(both: bool) -> dict[str, Any]:
    return {"total": lambda a, b, l1, l2: l1 / a + (l2 / b if both else b * l2)}


def _other_m(pick: int) -> Answer:
    """The sums are right, the maximum that goes with them is that of one part."""

    def answer(*parts):
        _, total, o = library.merge_softmax_blocks(*parts)
        return parts[3 * pick].copy(), total, o

    return answer


def _averages(divide: Callable[..., Array] | None, guard: Callable[..., Array]) -> Answer:
    """The rule for o that was divided by l before."""

    def answer(m1, l1, o1, m2, l2, o2):
        m = np.maximum(m1, m2)
        a, b = np.exp(m1 - guard(m)), np.exp(m2 - guard(m))
        total = a * l1 + b * l2
        o = (a * l1)[..., None] * o1 + (b * l2)[..., None] * o2
        return m, total, o if divide is None else divide(o, total)

    return answer


def _exp_first(back: bool) -> Answer:
    """Exponentials of the maxima themselves."""

    def answer(m1, l1, o1, m2, l2, o2):
        m, a, b = np.maximum(m1, m2), np.exp(m1), np.exp(m2)
        share = 1 / np.exp(_guarded(m)) if back else np.ones_like(m)
        total, o = a * l1 + b * l2, a[..., None] * o1 + b[..., None] * o2
        return m, total * share, o * share[..., None]

    return answer


def _whole_lse(m1, l1, o1, m2, l2, o2):
    """The log-sum-exp of everything in the maximum's place, and sums to match."""
    m = np.logaddexp(m1 + np.log(l1), m2 + np.log(l2))
    a, b = np.exp(m1 - _guarded(m)), np.exp(m2 - _guarded(m))
    return m, a * l1 + b * l2, a[..., None] * o1 + b[..., None] * o2


def _one_peak(m1: Array, m2: Array) -> Array:
    return np.full_like(m1, max(m1.max(), m2.max()))


def _merged(end: Callable[..., Any]) -> tuple[Answer, ...]:
    return _merges(end=end)


MERGE_MISTAKES: tuple[Mistake, ...] = (
    *named(
        "inverse rescale",
        "The factor e^(m1 - m) is at most 1 and multiplies: sums taken with a smaller maximum are "
        "too large for the common one. The inverse, as FlashAttention-2's algorithm is printed, "
        "makes them larger still.",
        RESCALE,
        *(
            answer
            for both in (False, True)
            for also in ({}, _inverse_total(both))
            for answer in _merges(**_inverse(both), **also)
        ),
        *_merges(o=lambda a, b, o1, o2: a[..., None] * o1 + o2 / b[..., None]),
    ),
    *named(
        "max not carried",
        "The merged part belongs to the larger of both maxima, row by row: it is what the sums "
        "are taken with, and what is handed on.",
        MERGE,
        *_merges(peak=lambda m1, m2: m2),
        *_merges(peak=lambda m1, m2: m1),
        _other_m(1),
        _other_m(0),
    ),
    *named(
        "parts added without rescaling",
        "Each part's sums were taken with a maximum of its own: bring both to the common one, "
        "times e^(m1 - m) and e^(m2 - m), before they are added.",
        MERGE,
        _merge(factors=lambda a, b: (np.ones_like(a), np.ones_like(b))),
    ),
    *named(
        "only one part rescaled",
        "Either part may have the smaller maximum, in another row the other: both get their "
        "factor.",
        MERGE,
        *_merges(factors=lambda a, b: (a, np.ones_like(b))),
        *_merges(factors=lambda a, b: (np.ones_like(a), b)),
    ),
    *named(
        "factors exchanged",
        "e^(m1 - m) belongs to l1 and o1, e^(m2 - m) to l2 and o2.",
        MERGE,
        *_merges(factors=lambda a, b: (b, a)),
    ),
    *named(
        "l not rescaled",
        "l is a sum of e^(z - m) as well, and changes with m as o does.",
        MERGE,
        *_merges(total=lambda a, b, l1, l2: l1 + l2),
    ),
    *named(
        "o not rescaled",
        "o is a sum of e^(z - m) v, and changes with m as l does.",
        MERGE,
        *_merges(o=lambda a, b, o1, o2: o1 + o2),
    ),
    *named(
        "o divided by l",
        "A part keeps its sums: o is divided by l once, when all parts are in.",
        MERGE,
        *(
            answer
            for divide in (_divided_guarded, _divided)
            for answer in _merged(lambda m, total, o, divide=divide: (m, total, divide(o, total)))
        ),
    ),
    *named(
        "parts taken for averages",
        "o1 and o2 are sums that were not divided by l1 and l2: no l multiplies them here, as it "
        "does where outputs are merged.",
        MERGE,
        *(
            _averages(divide, guard)
            for divide in (None, _divided_guarded, _divided)
            for guard in (_guarded, _as_it_is)
        ),
    ),
    *named(
        "exponentials of the maxima themselves",
        "e^1000 overflows and e^-1000 is 0: only the differences m1 - m and m2 - m, which are at "
        "most 0, go into an exponential.",
        ONLINE,
        _exp_first(back=True),
        _exp_first(back=False),
    ),
    *named(
        "log-sum-exp instead of the maximum",
        "m is the larger of both maxima. The log-sum-exp is m + log l, when all parts are in.",
        MERGE,
        *_merges(peak=np.logaddexp),
        _whole_lse,
    ),
    *named(
        "minimum instead of maximum",
        "With the smaller one the exponents are positive, and overflow; an empty part makes it "
        "-inf.",
        MERGE,
        *_merges(peak=np.minimum),
    ),
    *named(
        "one maximum for all rows",
        "Every row is a softmax of its own and has a maximum of its own.",
        MERGE,
        *_merges(peak=_one_peak),
        *_merges(peak=lambda m1, m2: max(m1.max(), m2.max())),
    ),
    *named(
        "NaN where neither part has a key",
        "-inf - -inf is NaN: where the maximum is -inf, subtract 0 instead.",
        MERGE,
        _merge(guard=_as_it_is),
        _merge(guard=_as_it_is, end=lambda m, total, o: (m, np.nan_to_num(total), o)),
        _merge(guard=_as_it_is, end=lambda m, total, o: (m, total, np.nan_to_num(o))),
    ),
    *named(
        "the guard's 0 returned as m",
        "The 0 is only what is subtracted where there is no key; the maximum stays -inf.",
        MERGE,
        _merged(lambda m, total, o: (_guarded(m), total, o))[0],
    ),
    *named(
        "finite sentinel for the maximum of no key",
        "The maximum of no logit is -inf: a large negative number is one that logits may lie "
        "below, and that a later log-sum-exp shows.",
        MERGE,
        *(_merge(peak=lambda m1, m2, s=s: np.maximum(np.maximum(m1, m2), s)) for s in SENTINELS),
    ),
    *named(
        "factor along the wrong axis",
        "m has a number for each row of o: give the factor an axis of length 1 for the columns, "
        "a[..., None] * o1.",
        SHAPES,
        *_merges(o=lambda a, b, o1, o2: a * o1 + b * o2),
    ),
    *named(
        "powers of 2 instead of e",
        "2^x is e^x only with x times log2(e): kernels that use exp2 put that factor into the "
        "logits' scale.",
        ONLINE,
        *_merges(power=np.exp2),
    ),
    *named(
        "l returned as its logarithm",
        "l is the sum itself; its logarithm is taken when all parts are in.",
        LSE,
        *_merged(lambda m, total, o: (m, np.log(total), o)),
        *_merged(lambda m, total, o: (m, m + np.log(total), o)),
    ),
    *named(
        "another order of the results",
        "The order is that of the arguments: m, l, o.",
        MERGE,
        *_merged(lambda m, total, o: (o, total, m)),
        *_merged(lambda m, total, o: (m, o, total)),
        *_merged(lambda m, total, o: (total, m, o)),
        *_merged(lambda m, total, o: (o, m, total)),
    ),
)

MERGE_EXERCISE = Exercise(
    id="merge_softmax_blocks",
    chapter=CHAPTER,
    title="Two partial softmaxes made one",
    points=2,
    returns=("m", "l", "o"),
    reference=library.merge_softmax_blocks,
    oracle=_merge_by_rows,
    cases=_merge_cases,
    mistakes=MERGE_MISTAKES,
)


# --- how tiles are cut, rightly and wrongly -----------------------------------------------------


def _blocks(n: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, n)) for start in range(0, n, block)]


def _whole_blocks(n: int, block: int) -> list[slice]:
    """What n // block says: the rest is left out."""
    return [slice(start, start + block) for start in range(0, n - block + 1, block)]


def _whole_blocks_or_one(n: int, block: int) -> list[slice]:
    """The same with the block cut down to the length first."""
    return _whole_blocks(n, min(block, n))


def _shifted_back(n: int, block: int) -> list[slice]:
    """The last block is made as long as the others by beginning earlier."""
    return [slice(max(min(s, n - block), 0), min(s + block, n)) for s in range(0, n, block)]


def _overhanging(n: int, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, n, block)]


def _taken(x: Array, where: slice) -> Array:
    return x[:, :, where]


def _padded(x: Array, where: slice) -> Array:
    """Zeros behind the end."""
    found = x[:, :, where]
    missing = where.stop - where.start - found.shape[2]
    return np.pad(found, ((0, 0), (0, 0), (0, missing), (0, 0)))


def _seen_where(rule: Callable[..., Array]) -> Callable[..., Array]:
    """A mask for a tile from ``rule(i, j, Nk - Nq)``."""

    def seen(rows: slice, keys: slice, n_q: int, n_k: int) -> Array:
        i, j = np.arange(rows.start, rows.stop)[:, None], np.arange(keys.start, keys.stop)
        return rule(i, j, n_k - n_q)

    return seen


_bottom_right = _seen_where(lambda i, j, offset: j <= i + offset)
_top_left = _seen_where(lambda i, j, offset: j <= i)


def _own_indices(of_rows: bool, of_keys: bool, offset: bool) -> Callable[..., Array]:
    """Indices that begin at 0 in every tile."""

    def seen(rows: slice, keys: slice, n_q: int, n_k: int) -> Array:
        i = np.arange(rows.stop - rows.start) + (0 if of_rows else rows.start)
        j = np.arange(keys.stop - keys.start) + (0 if of_keys else keys.start)
        return j <= i[:, None] + offset * (n_k - n_q)

    return seen


def _never(rows: slice, keys: slice, n_q: int, n_k: int) -> bool:
    return False


def _future(rows: slice, keys: slice, n_q: int, n_k: int) -> bool:
    """Whether no query of the block sees any key of the block."""
    return keys.start > rows.stop - 1 + n_k - n_q


def _beyond_first(rows: slice, keys: slice, n_q: int, n_k: int) -> bool:
    return keys.start > rows.start + n_k - n_q


def _future_top_left(rows: slice, keys: slice, n_q: int, n_k: int) -> bool:
    return keys.start > rows.stop - 1


def _partly_future(rows: slice, keys: slice, n_q: int, n_k: int) -> bool:
    return keys.stop - 1 > rows.stop - 1 + n_k - n_q


Step = Callable[..., Any]
CUTS: dict[str, Step] = {
    "rows": _blocks,
    "keys": _blocks,
    "tile": _taken,
    "seen": _bottom_right,
    "skip": _never,
    "asked": lambda causal: causal,
    "scale": lambda q, k, v: q.shape[-1] ** -0.5,
    "dots": lambda q, k: q @ _turned(k),
}


def _tiles(do: dict[str, Step], rows: slice, q: Array, k: Array, block: int, causal: bool):
    """The blocks of keys that a block of queries meets, each with what is seen of it."""
    n_q, n_k = q.shape[2], k.shape[2]
    for keys in do["keys"](n_k, block):
        if not do["asked"](causal):
            yield keys, np.True_
        elif not do["skip"](rows, keys, n_q, n_k):
            yield keys, do["seen"](rows, keys, n_q, n_k)


# Mistakes in cutting and masking are the same in both passes.
CUTTING: tuple[tuple[str, str, str, tuple[dict[str, Step], ...]], ...] = (
    (
        "ragged last block",
        "The last block is shorter where the block does not divide the length, and it counts: "
        "range(0, n, block), not n // block whole blocks.",
        RAGGED,
        tuple(
            dict.fromkeys(which, cut)
            for cut in (_whole_blocks, _whole_blocks_or_one)
            for which in (("keys",), ("rows",), ("rows", "keys"))
        ),
    ),
    (
        "causal top-left",
        "The mask is aligned bottom-right: query i sees the keys j ≤ i + Nk - Nq, the last query "
        "all of them. Aligned top-left, a decoding step sees key 0 alone.",
        CAUSAL,
        ({"seen": _top_left}, {"seen": _top_left, "skip": _future_top_left}),
    ),
    (
        "tile's own indices taken for positions",
        "A tile's first row is query rows.start and its first column key keys.start: the mask "
        "compares positions in the whole sequence.",
        CAUSAL,
        tuple(
            {"seen": _own_indices(of_rows, of_keys, offset), "skip": skip}
            for of_rows, of_keys in ((True, True), (True, False), (False, True))
            for offset in (True, False)
            for skip in (_never, _future)
        ),
    ),
    (
        "does not see itself",
        "A token may see itself: j ≤ i + Nk - Nq, with equality.",
        CAUSAL,
        (
            {"seen": _seen_where(lambda i, j, offset: j < i + offset)},
            {"seen": _seen_where(lambda i, j, offset: j < i)},
        ),
    ),
    (
        "one key of the future",
        "The diagonal lies one too far to the right: every query sees the key after its own.",
        CAUSAL,
        ({"seen": _seen_where(lambda i, j, offset: j <= i + offset + 1)},),
    ),
    (
        "the future instead of the past",
        "Query i sees the keys j ≤ i + Nk - Nq: what lies behind it is hidden.",
        CAUSAL,
        (
            {"seen": _seen_where(lambda i, j, offset: j >= i + offset)},
            {"seen": _seen_where(lambda i, j, offset: j > i + offset)},
        ),
    ),
    (
        "offset with the wrong sign",
        "Query i stands at key i + Nk - Nq, not at i + Nq - Nk.",
        CAUSAL,
        ({"seen": _seen_where(lambda i, j, offset: j <= i - offset)},),
    ),
    (
        "blocks left out that some query sees",
        "A block of keys may be left out only where not even the last query of the block sees its "
        "first key.",
        TILES,
        tuple({"skip": skip} for skip in (_beyond_first, _future_top_left, _partly_future)),
    ),
    (
        "causal though not asked",
        "Without causal=True every query sees every key.",
        CAUSAL,
        ({"asked": lambda causal: True}, {"asked": lambda causal: True, "skip": _future}),
    ),
    (
        "1/√(H·d)",
        "The scale is that of one head: d is the width of q and k.",
        FORWARD,
        ({"scale": lambda q, k, v: (q.shape[1] * q.shape[-1]) ** -0.5},),
    ),
    (
        "1/√d_v instead of 1/√d",
        "The scale comes from the width of q and k; v may be of another.",
        FORWARD,
        ({"scale": lambda q, k, v: v.shape[-1] ** -0.5},),
    ),
    (
        "keys counted twice",
        "A last block that begins earlier, to be as long as the others, has keys of the block "
        "before in it.",
        RAGGED,
        ({"keys": _shifted_back},),
    ),
    (
        "keys reshaped instead of transposed",
        "reshape keeps the order of the numbers in memory and so mixes tokens with columns; "
        "swapaxes(-1, -2) exchanges the axes.",
        SHAPES,
        ({"dots": lambda q, k: q @ k.reshape(*k.shape[:2], k.shape[3], k.shape[2])},),
    ),
)


def _cutting(build: Callable[..., Answer], **more: Any) -> tuple[Mistake, ...]:
    found: tuple[Mistake, ...] = ()
    for name, why, section, ways in CUTTING:
        found += named(name, why, section, *(build(**way) for way in ways), *more.get(name, ()))
    return found


# --- mistakes: flash_forward --------------------------------------------------------------------


def _add_to(m, total, o, z, v_j, seen, do):
    """One block more, with the sums brought to the new maximum first."""
    new = do["peak"](m, z, seen)
    old = np.exp(m - do["guard"](new))
    p = do["weights"](z, do["guard"](new), seen)
    return new, do["total"](total, old, p), do["o"](o, old, p, v_j)


def _normal_end(m, total, o):
    return o / np.where(total == 0, 1, total), (m + np.log(total))[..., 0]


STEPS: dict[str, Step] = CUTS | {
    "begin": lambda m, total, o: (m, total, o),
    "again": lambda state, begun: begun,
    "hide": lambda z, seen: np.where(seen, z, -INF),
    "add": _add_to,
    "peak": lambda m, z, seen: np.maximum(m, z.max(axis=-1, keepdims=True)),
    "guard": _guarded,
    "weights": lambda z, peak, seen: np.exp(z - peak),
    "total": lambda total, old, p: old * total + p.sum(axis=-1, keepdims=True),
    "o": lambda o, old, p, v_j: old * o + p @ v_j,
    "blank": lambda out, lse: (out, lse),
    "end": _normal_end,
    "after": lambda out, lse: (out, lse),
}


def _forward(**steps: Step) -> Answer:
    """The forward pass in tiles with some of its steps replaced."""
    do = STEPS | steps

    def answer(q, k, v, block, causal=False):
        scale, heads = do["scale"](q, k, v), q.shape[:2]
        shape = (*q.shape[:3], v.shape[-1])
        out, lse = do["blank"](np.zeros(shape, q.dtype), np.zeros(shape[:3], q.dtype))
        state = None
        for rows in do["rows"](q.shape[2], block):
            q_i = _taken(q, rows)
            column = np.zeros((*heads, q_i.shape[2], 1), q.dtype)
            begun = do["begin"](column - INF, column, column * v[:, :, 0:1])
            state = begun if state is None else do["again"](state, begun)
            for keys, seen in _tiles(do, rows, q, k, block, causal):
                k_j, v_j = do["tile"](k, keys), do["tile"](v, keys)
                z = do["hide"](do["dots"](q_i, k_j) * scale, seen)
                state = do["add"](*state, z, v_j, seen, do)
            out[:, :, rows], lse[:, :, rows] = do["end"](*state)
        return do["after"](out, lse)

    return answer


_forwards = partial(_with_and_without, _forward)


def _started(m, total, o, z, v_j, seen, do):
    """The first block as it is, so that nothing is ever rescaled from -inf."""
    if np.isneginf(m).all() and not total.any():
        new = z.max(axis=-1, keepdims=True)
        p = np.exp(z - do["guard"](new))
        return new, p.sum(axis=-1, keepdims=True), p @ v_j
    return _add_to(m, total, o, z, v_j, seen, do)


def _inverted(total: bool, started: bool) -> dict[str, Step]:
    steps: dict[str, Step] = {"o": lambda o, old, p, v_j: o / old + p @ v_j}
    if total:
        steps["total"] = lambda total, old, p: total / old + p.sum(axis=-1, keepdims=True)
    return steps | ({"add": _started} if started else {})


def _inverted_by_row(total: bool) -> dict[str, Step]:
    """The inverse, and 0 in a row that has seen nothing yet."""

    def add(m, sums, o, z, v_j, seen, do):
        new = np.maximum(m, z.max(axis=-1, keepdims=True))
        p = np.exp(z - do["guard"](new))
        inverse = np.where(np.isneginf(m), 0, np.exp(new - m))
        factor = inverse if total else np.exp(m - do["guard"](new))
        return new, factor * sums + p.sum(axis=-1, keepdims=True), inverse * o + p @ v_j

    return {"add": add}


def _first_max(m, z, seen):
    """The first block's maximum, for good."""
    return np.where(m == -INF, z.max(axis=-1, keepdims=True), m)


def _plain_sums() -> dict[str, Step]:
    return {
        "total": lambda total, old, p: total + p.sum(axis=-1, keepdims=True),
        "o": lambda o, old, p, v_j: o + p @ v_j,
    }


def _overwritten() -> dict[str, Step]:
    return {
        "peak": lambda m, z, seen: z.max(axis=-1, keepdims=True),
        "total": lambda total, old, p: p.sum(axis=-1, keepdims=True),
        "o": lambda o, old, p, v_j: p @ v_j,
    }


def _ending(end: Callable[..., Any]) -> dict[str, Step]:
    """Another way to make out and lse of the last m, l and o."""
    return {"end": end}


def _lse_by(rule: Callable[..., Array]) -> dict[str, Step]:
    return _ending(lambda m, total, o: (_normal_end(m, total, o)[0], rule(m, total)[..., 0]))


def _nonzero(total: Array) -> Array:
    return np.where(total == 0, 1, total)


def _each_block(mean: bool, right_lse: bool) -> Answer:
    """The softmax of every block by itself, the outputs added up or averaged."""

    def answer(q, k, v, block, causal=False):
        out, mask = np.zeros((*q.shape[:3], v.shape[-1])), _mask(q, k, causal)
        blocks = _blocks(k.shape[2], block)
        for keys in blocks:
            part = None if mask is None else mask[:, keys]
            out = out + attention_forward(q, k[:, :, keys], v[:, :, keys], part)[0]
        whole = library.flash_forward(q, k, v, block, causal)[1]
        last = _forward(**_overwritten())(q, k, v, block, causal)[1]
        return out / (len(blocks) if mean else 1), whole if right_lse else last

    return answer


def _forward_by(merge: Answer) -> Answer:
    """The forward pass built on a merge of whatever kind."""

    def add(m, total, o, z, v_j, seen, do):
        peak = z.max(axis=-1, keepdims=True)
        p = np.exp(z - _guarded(peak))
        part = (peak[..., 0], p.sum(axis=-1), p @ v_j)
        new, total, o = merge(m[..., 0], total[..., 0], o, *part)
        return new[..., None], total[..., None], o

    return _forward(add=add)


# Those that show in another way than one of the forward pass's own.
CARRIED = (
    "factors exchanged",
    "parts taken for averages",
    "exponentials of the maxima themselves",
    "powers of 2 instead of e",
)


def _from_merge() -> tuple[Mistake, ...]:
    return tuple(
        carried(m, "merge_softmax_blocks", quiet(_forward_by(m.answer)))
        for m in MERGE_MISTAKES
        if m.name in CARRIED
    )


def _hidden_peak(**more: Step) -> Answer:
    """The maximum of all logits, hidden or not; weights of hidden ones set to 0."""
    return _forward(
        hide=lambda z, seen: z,
        weights=lambda z, peak, seen: np.where(seen, np.exp(z - peak), 0),
        **more,
    )


def _sentinel_ways() -> tuple[Answer, ...]:
    ways: list[dict[str, Step]] = [
        {"hide": lambda z, seen, s=s: np.where(seen, z, s), "skip": skip}
        for s in SENTINELS
        for skip in (_never, _future)
    ]
    ways += [{"hide": lambda z, seen, s=s: z + s * ~seen} for s in SENTINELS]
    ways += [
        {
            "begin": lambda m, total, o, s=s: (total + s, total, o),
            "end": lambda m, total, o: (
                o / _nonzero(total),
                (m + np.log(_nonzero(total)))[..., 0],
            ),
        }
        for s in SENTINELS
    ]
    return tuple(_forward(**way) for way in ways)


def _divided_on(m, total, o):
    return m, total, o / _nonzero(total)


def _left_out(which: tuple[str, ...], end: Step, blank: Step) -> dict[str, Step]:
    """Ragged last blocks of queries, of keys or of both not computed."""
    steps: dict[str, Step] = dict.fromkeys(which, _whole_blocks)
    return steps | {"end": end, "blank": blank}


def _divided_end(m, total, o):
    return o / total, (m + np.log(total))[..., 0]


def _repaired_end(m, total, o):
    return np.nan_to_num(o / total), (m + np.log(total))[..., 0]


FORWARD_MISTAKES: tuple[Mistake, ...] = (
    *named(
        "inverse rescale",
        "What was summed with the old maximum is too large for the new one: it is multiplied by "
        "e^(m_old - m_new), which is at most 1. FlashAttention-2's algorithm is printed with the "
        "inverse; its code is right.",
        RESCALE,
        *(
            answer
            for total in (False, True)
            for started in (True, False)
            for answer in _forwards(**_inverted(total, started))
        ),
        *(answer for total in (False, True) for answer in _forwards(**_inverted_by_row(total))),
    ),
    *named(
        "max not carried",
        "The maximum is that of all blocks so far, m_new = max(m_old, this block's), and goes on "
        "to the next block with the sums that were taken with it.",
        ONLINE,
        *(
            answer
            for sums in (_plain_sums(), {})
            for answer in _forwards(
                peak=lambda m, z, seen: z.max(axis=-1, keepdims=True),
                **sums,
            )
        ),
        _forward(peak=_first_max),
    ),
    *named(
        "old sums not rescaled",
        "When the maximum grows, l and o shrink by e^(m_old - m_new): they were taken with the "
        "old one.",
        RESCALE,
        *_forwards(**_plain_sums()),
    ),
    *named(
        "l not rescaled",
        "l is a sum of e^(z - m) as well, and changes with m as o does.",
        RESCALE,
        *_forwards(total=_plain_sums()["total"]),
    ),
    *named(
        "o not rescaled",
        "o is a sum of e^(z - m) v, and changes with m as l does.",
        RESCALE,
        *_forwards(o=_plain_sums()["o"]),
    ),
    *named(
        "new block rescaled too",
        "The new block's weights were taken with the new maximum already: the factor is for what "
        "was there before.",
        RESCALE,
        *_forwards(
            total=lambda total, old, p: old * (total + p.sum(axis=-1, keepdims=True)),
            o=lambda o, old, p, v_j: old * (o + p @ v_j),
        ),
        *_forwards(o=lambda o, old, p, v_j: old * (o + p @ v_j)),
    ),
    *named(
        "only the last block counts",
        "l and o add up over the blocks, and m goes on: where m begins at -inf again the factor "
        "e^(m_old - m_new) is 0, and what was summed is lost.",
        ONLINE,
        *_forwards(**_overwritten()),
    ),
    *named(
        "only the first block counts",
        "The softmax runs over all blocks of keys: divide and return after the loop, not in it.",
        ONLINE,
        _forward(keys=lambda n, block: _blocks(n, block)[:1]),
    ),
    *named(
        "not begun anew for the next queries",
        "m, l and o belong to one block of queries: each begins with -inf, 0 and 0.",
        TILES,
        *_forwards(again=lambda state, begun: state),
    ),
    *named(
        "each block normalised by itself",
        "A block's own softmax does not know the others' weights: o and l are summed over all "
        "blocks, and divided once.",
        ONLINE,
        *(_each_block(mean, right_lse) for mean in (False, True) for right_lse in (True, False)),
    ),
    *named(
        "divided by l in every block",
        "o is the sum before the division: divided in every block, it is divided several times.",
        ONLINE,
        *(
            _forward(
                add=lambda m, total, o, z, v_j, seen, do, end=end: _divided_on(
                    *_add_to(m, total, o, z, v_j, seen, do)
                ),
                end=end,
            )
            for end in (
                _normal_end,
                lambda m, total, o: (o, (m + np.log(total))[..., 0]),
            )
        ),
    ),
    *named(
        "out not divided by l",
        "o is the sum of e^(z - m) v; divided by l, it is the average that out is.",
        FORWARD,
        *_forwards(**_ending(lambda m, total, o: (o, (m + np.log(total))[..., 0]))),
    ),
    *named(
        "lse after normalisation",
        "After the division the weights sum to 1, and log 1 is 0: take the logarithm of l as it "
        "was before, lse = m + log l.",
        LSE,
        *_forwards(**_lse_by(lambda m, total: m)),
        _forward(**_lse_by(lambda m, total: m + np.log(total / total))),
    ),
    *named(
        "lse without the max",
        "l is the sum of e^(z - m), so log l lacks m: lse = m + log l.",
        LSE,
        *_forwards(**_lse_by(lambda m, total: np.log(total))),
    ),
    *named(
        "log forgotten in lse",
        "lse = m + log l: the logarithm of the sum, not the sum.",
        LSE,
        *_forwards(**_lse_by(lambda m, total: m + total)),
        *_forwards(**_lse_by(lambda m, total: total)),
        *_forwards(**_lse_by(lambda m, total: np.exp(m) * total)),
    ),
    *named(
        "lse in base 2",
        "Kernels compute with powers of 2; what is returned is the natural logarithm.",
        LSE,
        *_forwards(**_lse_by(lambda m, total: m + np.log2(total))),
        *_forwards(**_lse_by(lambda m, total: (m + np.log(total)) / np.log(2))),
    ),
    *named(
        "lse with an axis too many",
        "lse is one number a row: (B, H, Nq).",
        LSE,
        *_forwards(after=lambda out, lse: (out, lse[..., None])),
    ),
    *named(
        "one maximum for the whole tile",
        "Every row has a maximum of its own: with that of another row, far above, all of its "
        "weights underflow to 0.",
        ONLINE,
        *(
            _forward(
                peak=lambda m, z, seen, axes=axes: np.maximum(m, z.max(axes, keepdims=True)),
                guard=guard,
            )
            for axes in ((-2, -1), None)
            for guard in (_guarded, _as_it_is)
        ),
    ),
    *named(
        "no max subtraction",
        "exp overflows above 709 and vanishes below -745: subtract each row's maximum so far.",
        ONLINE,
        _forward(peak=lambda m, z, seen: np.zeros_like(m)),
        _forward(peak=lambda m, z, seen: np.zeros_like(m), end=_divided_end),
    ),
    *named(
        "maximum over hidden keys",
        "The maximum was taken before the mask: where a hidden key has it, all that may be seen "
        "underflows to 0. Mask first.",
        CAUSAL,
        *(
            _hidden_peak(end=end, skip=skip)
            for end in (_normal_end, _divided_end)
            for skip in (_never, _future)
        ),
    ),
    *named(
        "NaN on a fully masked row",
        "A row that sees no key has maximum -inf and sum 0, and both -inf - -inf and 0 / 0 are "
        "NaN: subtract 0 there, and divide by 1.",
        CAUSAL,
        *(
            _forward(guard=_as_it_is, skip=skip, end=end)
            for skip in (_never, _future)
            for end in (_normal_end, _divided_end, _repaired_end)
        ),
        _forward(end=_divided_end),
    ),
    *named(
        "finite sentinel on a fully masked row",
        "In a row that sees nothing all logits are the same finite number, so hidden keys get "
        "weights and lse is finite: use -inf, guarded where it is subtracted.",
        CAUSAL,
        *_sentinel_ways(),
    ),
    *named(
        "lse 0 on a fully masked row",
        "The sum over no key is 0 and its logarithm -inf: the guards' 0 and 1 are only for what "
        "is subtracted and divided by.",
        LSE,
        _forward(**_lse_by(lambda m, total: _guarded(m) + np.log(_nonzero(total)))),
    ),
    *named(
        "multiplied instead of masked",
        "A logit of 0 is not ruled out, it has weight e^-m: hidden logits are -inf.",
        CAUSAL,
        *(_forward(hide=lambda z, seen: z * seen, skip=skip) for skip in (_never, _future)),
    ),
    *named(
        "padding of a ragged block attended to",
        "Zeros that fill up the last block have logits of 0, and weight: they are hidden with "
        "-inf, as the future is.",
        RAGGED,
        _forward(keys=_overhanging, tile=_padded),
    ),
    *named(
        "no 1/√d",
        "The logits are scaled by 1/√d, in every tile.",
        FORWARD,
        _forward(scale=lambda q, k, v: 1.0),
    ),
    *named(
        "1/d instead of 1/√d",
        "The scale is 1/√d, once: on q before the loop or on the logits in it, not both.",
        FORWARD,
        _forward(scale=lambda q, k, v: 1 / q.shape[-1]),
    ),
    *named(
        "out and lse swapped",
        "out comes first, then lse.",
        FORWARD,
        _forward(after=lambda out, lse: (lse, out)),
    ),
    *named(
        "only out returned",
        "Two values are asked for, out and lse: the backward pass makes the weights of it again.",
        LSE,
        _forward(after=lambda out, lse: out),
    ),
    *_cutting(
        _forward,
        **{
            "ragged last block": tuple(
                _forward(**_left_out(which, end, blank))
                for which in (("keys",), ("rows",), ("rows", "keys"))
                for end in (_normal_end, _divided_end)
                for blank in (STEPS["blank"], lambda out, lse: (out, lse - INF))
            )
        },
    ),
    *named(
        "causal ignored",
        "With causal=True query i sees the keys j ≤ i + Nk - Nq alone, in every tile.",
        CAUSAL,
        _forward(asked=lambda causal: False),
    ),
    *_from_merge(),
)


FORWARD_EXERCISE = Exercise(
    id="flash_forward",
    chapter=CHAPTER,
    title="Attention in tiles",
    points=4,
    returns=("out", "lse"),
    reference=library.flash_forward,
    oracle=_forward_whole,
    cases=_forward_cases,
    tokens=("out",),
    intermediates=(
        Intermediate(
            "the weight matrix in out",
            lambda q, k, v, causal=False, **_: _weights_of(q, k, v, causal),
            {"out": lambda out, v, **_: left_factor(out, v)},
        ),
    ),
    mistakes=FORWARD_MISTAKES,
)


# --- mistakes: flash_backward -------------------------------------------------------------------


@quiet
def _weights_of(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    return attention_forward(q, k, v, _mask(q, k, causal))[1]


def _masked_weights(z, lse, seen):
    return np.where(seen, np.exp(np.where(seen, z, -INF) - _guarded(lse)), 0)


def _row_delta(dout, out):
    return (dout * out).sum(axis=-1, keepdims=True)


BACK: dict[str, Step] = CUTS | {
    "delta": _row_delta,
    "z": lambda dots, scale: dots * scale,
    "weights": _masked_weights,
    "in_dv": lambda p, z, lse, seen, peak: p,
    "dz": lambda p, dp, delta, seen: p * (dp - delta),
    "dq": lambda dz, k_j, q_i: dz @ k_j,
    "dk": lambda dz, k_j, q_i: _turned(dz) @ q_i,
    "scale_q": lambda scale: scale,
    "scale_k": lambda scale: scale,
    "add_q": lambda old, new: old + new,
    "add_k": lambda old, new: old + new,
    "end": lambda dq, dk, dv: (dq, dk, dv),
}


@lru_cache(maxsize=8)
def _row_peaks(key: tuple[bytes, bytes, tuple[int, ...], tuple[int, ...], str, bool]) -> Array:
    """Each row's largest logit over all keys it sees."""
    q_bytes, k_bytes, q_shape, k_shape, dtype, causal = key
    q = np.frombuffer(q_bytes, dtype).reshape(q_shape)
    k = np.frombuffer(k_bytes, dtype).reshape(k_shape)
    z, mask = q @ _turned(k) * q.shape[-1] ** -0.5, _mask(q, k, causal)
    return (z if mask is None else np.where(mask, z, -INF)).max(axis=-1, keepdims=True)


def _peaks(q: Array, k: Array, causal: bool) -> Array:
    return _row_peaks((q.tobytes(), k.tobytes(), q.shape, k.shape, q.dtype.str, causal))


def _back(**steps: Step) -> Answer:
    """The backward pass in tiles with some of its steps replaced."""
    do = BACK | steps

    def answer(dout, q, k, v, out, lse, block, causal=False):
        scale, delta, peaks = do["scale"](q, k, v), do["delta"](dout, out), _peaks(q, k, causal)
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for rows in do["rows"](q.shape[2], block):
            q_i, dout_i, lse_i = q[:, :, rows], dout[:, :, rows], lse[:, :, rows, None]
            delta_i = delta[:, :, rows] if np.ndim(delta) else delta
            for keys, seen in _tiles(do, rows, q, k, block, causal):
                k_j, v_j = k[:, :, keys], v[:, :, keys]
                z = do["z"](do["dots"](q_i, k_j), scale)
                p = do["weights"](z, lse_i, seen)
                used = do["in_dv"](p, z, lse_i, seen, peaks[:, :, rows])
                dz = do["dz"](p, dout_i @ _turned(v_j), delta_i, seen)
                dq[:, :, rows] = do["add_q"](dq[:, :, rows], do["dq"](dz, k_j, q_i))
                dk[:, :, keys] = do["add_k"](dk[:, :, keys], do["dk"](dz, k_j, q_i))
                dv[:, :, keys] = do["add_k"](dv[:, :, keys], _turned(used) @ dout_i)
        return do["end"](dq * do["scale_q"](scale), dk * do["scale_k"](scale), dv)

    return answer


def _dz_by(rule: Callable[..., Array], **more: Step) -> Answer:
    return _back(dz=lambda p, dp, delta, seen: rule(p, dp, delta), **more)


def _running_delta(dout, q, k, v, out, lse, block, causal=False):
    """δ summed over the blocks so far."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    probs, scale = _weights_of(q, k, v, causal), q.shape[-1] ** -0.5
    delta = np.zeros((*q.shape[:3], 1), q.dtype)
    for keys in _blocks(k.shape[2], block):
        p, dp = probs[..., keys], dout @ _turned(v[:, :, keys])
        delta = delta + (p * dp).sum(axis=-1, keepdims=True)
        dz = p * (dp - delta) * scale
        dq += dz @ k[:, :, keys]
        dk[:, :, keys] = _turned(dz) @ q
        dv[:, :, keys] = _turned(p) @ dout
    return dq, dk, dv


def _unzeroed(guard: Callable[..., Array]) -> Step:
    """Logits left as they are, and nothing set to 0 after the exponential."""
    return lambda z, lse, seen: np.exp(z - guard(lse))


def _hidden_then_exp(value: float, guard: Callable[..., Array]) -> Step:
    """Logits hidden before the exponential, nothing set to 0 after it."""
    return lambda z, lse, seen: np.exp(np.where(seen, z, value) - guard(lse))


def _dz_zeroed(p, dp, delta, seen):
    return np.where(seen, p * (dp - delta), 0)


def _tile_softmax(z, lse, seen):
    z = np.where(seen, z, -INF)
    p = np.exp(z - _guarded(z.max(axis=-1, keepdims=True)))
    return p / _nonzero(p.sum(axis=-1, keepdims=True))


def _over_tile_peak(p, z, lse, seen, peak):
    z = np.where(seen, z, -INF)
    return np.exp(z - _guarded(z.max(axis=-1, keepdims=True)))


def _over_row_peak(p, z, lse, seen, peak):
    return np.exp(np.where(seen, z, -INF) - _guarded(peak))


def _everywhere(unnormalised: Step) -> Answer:
    """dv, dq and dk from the weights that are not divided by l."""

    def answer(dout, q, k, v, out, lse, block, causal=False):
        if unnormalised is _over_row_peak:
            return _back(weights=_masked_weights)(
                dout, q, k, v, out, _peaks(q, k, causal)[..., 0], block, causal
            )
        return _back(weights=lambda z, lse, seen: _over_tile_peak(None, z, lse, seen, None))(
            dout, q, k, v, out, lse, block, causal
        )

    return answer


def _scaled_dv(dout, q, k, v, *rest):
    dq, dk, dv = _back()(dout, q, k, v, *rest)
    return dq, dk, dv * q.shape[-1] ** -0.5


def _once(scale: float) -> float:
    return 1.0


def _twice(scale: float) -> float:
    return scale * scale


def _latest(old: Array, new: Array) -> Array:
    return new


def _solved_dz(product: Array, factor: Array) -> Array | None:
    found = left_factor(product, factor)
    return None if found is None else found * factor.shape[-1] ** 0.5


def _solved_from_dq(dq: Array, k: Array) -> Array | None:
    # The gradient by the logit of a single key is 0: what is there is rounding.
    return None if k.shape[2] == 1 else _solved_dz(dq, k)


def _solved_from_dk(dk: Array, q: Array) -> Array | None:
    found = None if dk.shape[2] == 1 else _solved_dz(dk, q)
    return None if found is None else _turned(found)


def _solved_weights(dv: Array, dout: Array) -> Array | None:
    found = left_factor(dv, dout)
    return None if found is None else _turned(found)


def _true_p(q: Array, k: Array, v: Array, causal: bool = False, **_: Any) -> Array:
    return _weights_of(q, k, v, causal)


@quiet
def _true_dz(dout: Array, q: Array, k: Array, v: Array, causal: bool = False, **_: Any) -> Array:
    p, dp = _weights_of(q, k, v, causal), dout @ _turned(v)
    return p * (dp - (p * dp).sum(axis=-1, keepdims=True))


BACKWARD_MISTAKES: tuple[Mistake, ...] = (
    *named(
        "delta from one block",
        "δ is the sum of p ∘ dp over all keys of the row, and a tile has only some of them: take "
        "the row sum of dout ∘ out, which is the same and needs no keys.",
        DELTA,
        *(
            _dz_by(lambda p, dp, delta: p * (dp - (p * dp).sum(axis=-1, keepdims=True)), **more)
            for more in (
                {},
                {"weights": _hidden_then_exp(-INF, _as_it_is)},
                {"weights": _hidden_then_exp(-INF, _as_it_is), "skip": _future},
            )
        ),
        _running_delta,
    ),
    *named(
        "row sum dropped",
        "p ∘ dp is only the diagonal part of the softmax's Jacobian: δ is subtracted from dp.",
        DELTA,
        _dz_by(lambda p, dp, delta: p * dp),
        _dz_by(lambda p, dp, delta: p * dp, weights=_hidden_then_exp(-INF, _as_it_is)),
    ),
    *named(
        "delta outside the bracket",
        "dz = p ∘ (dp - δ): what is subtracted from each entry is p times δ.",
        DELTA,
        _dz_by(lambda p, dp, delta: p * dp - delta),
    ),
    *named(
        "sign of delta",
        "δ is subtracted from dp; a row of dz sums to 0 over all keys.",
        DELTA,
        _dz_by(lambda p, dp, delta: p * (dp + delta)),
        _dz_by(lambda p, dp, delta: p * (delta - dp)),
    ),
    *named(
        "delta over the wrong axis",
        "δ has one number for each query: dout ∘ out summed over the columns, the last axis.",
        DELTA,
        _back(delta=lambda dout, out: (dout * out).mean(axis=-1, keepdims=True)),
        _back(
            delta=lambda dout, out: (
                (dout * out).sum(axis=(-2, -1), keepdims=True) + 0 * dout[..., :1]
            )
        ),
        _back(delta=lambda dout, out: (dout * out).sum()),
    ),
    *named(
        "delta of one factor alone",
        "δ is the row sum of the product dout ∘ out.",
        DELTA,
        _back(delta=lambda dout, out: dout.sum(axis=-1, keepdims=True)),
        _back(delta=lambda dout, out: out.sum(axis=-1, keepdims=True)),
    ),
    *named(
        "row sum not weighted by p",
        "What is subtracted is the average of dp under p over the whole row, not a tile's plain "
        "sum or mean.",
        DELTA,
        _dz_by(lambda p, dp, delta: p * (dp - dp.sum(axis=-1, keepdims=True))),
        _dz_by(lambda p, dp, delta: p * (dp - dp.mean(axis=-1, keepdims=True))),
    ),
    *named(
        "softmax skipped",
        "dp is the gradient by the weights; the softmax lies between them and the logits.",
        BACKWARD,
        _dz_by(lambda p, dp, delta: dp),
        _dz_by(lambda p, dp, delta: dp - delta),
    ),
    *named(
        "scale missing in dq",
        "The logits are q · k / √d, so what flows back to q passes through 1/√d.",
        BACKWARD,
        _back(scale_q=_once),
        _back(scale_q=_once, weights=_hidden_then_exp(-INF, _as_it_is)),
    ),
    *named(
        "scale missing in dk",
        "The logits are q · k / √d, so what flows back to k passes through 1/√d; where q was "
        "scaled before the loop, dk has it already.",
        BACKWARD,
        _back(scale_k=_once),
        _back(scale_k=_once, weights=_hidden_then_exp(-INF, _as_it_is)),
    ),
    *named(
        "scale missing in dq and dk",
        "The logits are q · k / √d, so what flows back to q and to k passes through 1/√d.",
        BACKWARD,
        _back(scale_q=_once, scale_k=_once),
    ),
    *named(
        "scale applied twice",
        "1/√d enters dq and dk once: where q was scaled before the loop, dk = dzᵀ q has it "
        "already, and where dz was, both have.",
        BACKWARD,
        _back(scale_k=_twice),
        _back(scale_q=_twice),
        _back(scale_q=_twice, scale_k=_twice),
    ),
    *named(
        "scale in dv",
        "out = p v has no scale of its own: 1/√d is in the logits.",
        BACKWARD,
        _scaled_dv,
    ),
    *named(
        "logits not scaled when made again",
        "lse is that of the scaled logits: p = e^(q · k / √d - lse), as in the forward pass.",
        BACKWARD,
        _back(z=lambda dots, scale: dots),
    ),
    *named(
        "dv with unnormalised p",
        "dv = pᵀ dout with weights that sum to 1, e^(z - lse); e^(z - m) is l times as much.",
        LSE,
        _back(in_dv=_over_row_peak),
        _back(in_dv=_over_tile_peak),
    ),
    *named(
        "p not normalised",
        "The weights are e^(z - lse): e^(z - m) is l times as much, in dv and in dz.",
        LSE,
        _everywhere(_over_row_peak),
        _everywhere(_over_tile_peak),
        _back(weights=lambda z, lse, seen: np.where(seen, np.exp(z), 0)),
    ),
    *named(
        "p normalised within its tile",
        "A tile's own softmax does not know the other tiles: lse does, p = e^(z - lse).",
        LSE,
        _back(weights=_tile_softmax),
        _back(in_dv=lambda p, z, lse, seen, peak: _tile_softmax(z, lse, seen)),
    ),
    *named(
        "exponential before lse is subtracted",
        "e^z and e^lse overflow where logits are large; e^(z - lse) does not.",
        LSE,
        _back(weights=lambda z, lse, seen: np.where(seen, np.exp(z) / np.exp(lse), 0)),
        _back(weights=lambda z, lse, seen: np.where(seen, np.exp(z) * np.exp(-lse), 0)),
        _back(
            weights=lambda z, lse, seen: np.where(
                seen, np.exp(z) / np.where(lse == -INF, 1, np.exp(lse)), 0
            )
        ),
    ),
    *named(
        "powers of 2 instead of e",
        "lse is a natural logarithm: 2^x needs x times log2(e).",
        LSE,
        _back(weights=lambda z, lse, seen: np.where(seen, np.exp2(z - _guarded(lse)), 0)),
    ),
    *named(
        "p not zeroed after exp",
        "Hidden entries of p are 0, in dv and in dz: set them after the exponential, where lse is "
        "-inf a hidden logit alone does not make them 0.",
        CAUSAL,
        *(
            _back(weights=_unzeroed(guard), dz=_dz_zeroed, skip=skip)
            for guard in (_guarded, _as_it_is)
            for skip in (_never, _future)
        ),
        *(
            _back(
                weights=_unzeroed(guard),
                in_dv=lambda p, z, lse, seen, peak: np.where(seen, p, 0),
                skip=skip,
            )
            for guard in (_guarded, _as_it_is)
            for skip in (_never, _future)
        ),
        # Whatever the finite number: less -inf it is inf.
        *(
            _back(weights=_hidden_then_exp(-1e9, _as_it_is), skip=skip, dz=dz)
            for skip in (_never, _future)
            for dz in (BACK["dz"], _dz_zeroed)
        ),
    ),
    *named(
        "causal mask forgotten in the backward pass",
        "The weights are made again, and so is the mask: what the forward pass hid has weight 0.",
        CAUSAL,
        *(
            _back(weights=_unzeroed(guard), skip=skip)
            for guard in (_guarded, _as_it_is)
            for skip in (_never, _future)
        ),
        _back(asked=lambda causal: False),
    ),
    *named(
        "NaN on a fully masked row",
        "Where lse is -inf, -inf - -inf is NaN: subtract 0 there, or set p to 0 afterwards.",
        CAUSAL,
        *(
            _back(weights=_hidden_then_exp(-INF, _as_it_is), dz=dz, skip=skip)
            for dz in (BACK["dz"], _dz_zeroed)
            for skip in (_never, _future)
        ),
    ),
    *named(
        "finite sentinel on a fully masked row",
        "A hidden logit less the same number for lse is 0, and e^0 is 1: use -inf, guarded where "
        "it is subtracted, and set p to 0.",
        CAUSAL,
        # Whatever the finite number: less itself it is 0.
        *(
            _back(
                weights=_hidden_then_exp(-1e9, lambda lse: np.where(lse == -INF, -1e9, lse)),
                skip=skip,
            )
            for skip in (_never, _future)
        ),
    ),
    *named(
        "dq of the last block alone",
        "Every block of keys adds to dq: +=, not =.",
        TILES,
        _back(add_q=_latest),
    ),
    *named(
        "dk and dv of the last block alone",
        "Every block of queries adds to dk and dv: +=, not =.",
        TILES,
        _back(add_k=_latest),
        _back(add_q=_latest, add_k=_latest),
    ),
    *named(
        "queries counted twice",
        "A last block that begins earlier, to be as long as the others, has queries of the block "
        "before in it.",
        RAGGED,
        _back(rows=_shifted_back),
        _back(rows=_shifted_back, keys=_shifted_back),
    ),
    *named(
        "dz not transposed for dk",
        "Key j collects from all queries: dk = dzᵀ q. The shapes complain unless the tile is "
        "square.",
        BACKWARD,
        _back(dk=lambda dz, k_j, q_i: dz @ q_i),
    ),
    *named(
        "dq and dk swapped",
        "dq is made of k and dk of q: dq = dz k, dk = dzᵀ q, in the order dq, dk, dv.",
        BACKWARD,
        _back(end=lambda dq, dk, dv: (dk, dq, dv)),
    ),
    *named(
        "another order of the results",
        "The order is dq, dk, dv.",
        BACKWARD,
        _back(end=lambda dq, dk, dv: (dv, dk, dq)),
        _back(end=lambda dq, dk, dv: (dv, dq, dk)),
        _back(end=lambda dq, dk, dv: (dq, dv, dk)),
    ),
    *named(
        "1/d instead of 1/√d",
        "The scale is 1/√d, in the logits and in their gradient.",
        BACKWARD,
        _back(scale=lambda q, k, v: 1 / q.shape[-1]),
    ),
    *named(
        "no 1/√d",
        "1/√d is in the logits that are made again, and in dq and dk.",
        BACKWARD,
        _back(scale=lambda q, k, v: 1.0),
    ),
    *_cutting(_back),
)


BACKWARD_EXERCISE = Exercise(
    id="flash_backward",
    chapter=CHAPTER,
    title="The backward pass in tiles",
    points=5,
    returns=("dq", "dk", "dv"),
    reference=library.flash_backward,
    oracle=_backward_whole,
    cases=_backward_cases,
    tokens=("dq", "dk", "dv"),
    intermediates=(
        Intermediate("p", _true_p, {"dv": lambda dv, dout, **_: _solved_weights(dv, dout)}),
        Intermediate(
            "dz",
            _true_dz,
            {
                "dq": lambda dq, k, **_: _solved_from_dq(dq, k),
                "dk": lambda dk, q, **_: _solved_from_dk(dk, q),
            },
        ),
    ),
    mistakes=BACKWARD_MISTAKES,
)

EXERCISES = (MERGE_EXERCISE, FORWARD_EXERCISE, BACKWARD_EXERCISE)
