"""Chapter 10: what a cache holds, who may see whom, one token's step, attention in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_lessons import streaming as library
from attn_lessons.grading.catalogue._parts import named, scattered
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.grading.relations import carried
from attn_lessons.positions import rope

CHAPTER = "ch10_streaming"
SHAPES = f"{CHAPTER}.html#ch10-shapes"
CACHE = f"{CHAPTER}.html#ch10-cache"
MASK = f"{CHAPTER}.html#ch10-mask"
RING = f"{CHAPTER}.html#ch10-ring"
POSITIONS = f"{CHAPTER}.html#ch10-positions"
CHUNKED = f"{CHAPTER}.html#ch10-chunked"
SCALE = f"{CHAPTER}.html#ch10-scale"

Array = np.ndarray
Rng = np.random.Generator
Cache = tuple[Array, Array, int]


# --- inputs ---------------------------------------------------------------------------------


def _any(rng: Rng, *choices: int) -> int:
    return int(rng.choice(choices))


def _bytes_cases(rng: Rng) -> list[Case]:
    layers, tokens = _any(rng, 12, 24, 32), _any(rng, 500, 1000, 3000)
    return [
        Case("one token", (1, 1, _any(rng, 48, 64, 96), 1, 4), hint="A key and a value of d."),
        Case("one layer", (1, 1, 64, _any(rng, 7, 9, 11), 4), hint="One of each for every token."),
        Case(
            "several key heads",
            (1, _any(rng, 3, 5, 8), 64, 10, 4),
            hint="Every key head keeps keys and values of its own.",
        ),
        Case("several layers", (layers, 1, 64, 10, 4), hint="Every layer has a cache of its own."),
        Case("a small model", (layers, 12, 64, tokens, 4), hint="All of it, in single precision."),
        Case(
            "half precision",
            (layers, 12, 64, tokens, 2),
            hint="itemsize is in bytes: 16 bit are 2.",
        ),
        Case("double precision", (layers, 12, 64, tokens, 8), hint="float64 has 8 bytes."),
        Case(
            "a large model with grouped heads",
            (80, 8, 128, _any(rng, 8192, 32768, 131072), 2),
            hint="64 query heads share 8 key heads: only keys and values are kept.",
        ),
        Case("no tokens", (layers, 12, 64, 0, 4), hint="An empty cache holds nothing."),
    ]


def _ring_cases(rng: Rng) -> list[Case]:
    m = _any(rng, 5, 6, 7)
    return [
        Case("nothing yet", (0, m), hint="All slots are empty: -1."),
        Case("the first token", (1, m), hint="Token 0 lies in slot 0."),
        Case("half full", (_any(rng, 3, 4), m), hint="Slots behind the last token are empty."),
        Case("exactly full", (m, m), hint="Token p lies in slot p."),
        Case("the first eviction", (m + 1, m), hint="Token m went where token 0 was."),
        Case(
            "in the second turn",
            (m + _any(rng, 2, 3), m),
            hint="The newest tokens in front, older ones behind them.",
        ),
        Case("a whole number of turns", (3 * m, m), hint="The newest token in the last slot."),
        Case(
            "many turns",
            (_any(rng, 20, 30, 40) * m + _any(rng, 1, 2, 3), m),
            hint="Only the last M tokens are left.",
        ),
        Case("two slots", (_any(rng, 3, 5, 7), 2), hint="The last token and the one before it."),
        Case("one slot", (_any(rng, 2, 4, 9), 1), hint="Nothing but the newest token."),
        Case("a wide ring", (_any(rng, 700, 900), 512), hint="The same with more slots."),
    ]


def _held(length: int, capacity: int) -> Array:
    """Which token each slot holds, from the definition."""
    slots = np.full(capacity, -1)
    for p in range(length):
        slots[p % capacity] = p
    return slots


def _mask_cases(rng: Rng) -> list[Case]:
    start, m = _any(rng, 11, 13, 17, 19), _any(rng, 5, 6)
    chunk = start + np.arange(3)
    late = m + _any(rng, 1, 2, 3)
    return [
        Case(
            "one query of decoding",
            (np.array([start]), np.arange(start + 1)),
            hint="The newest token sees all: a row of True, as long as there are keys.",
        ),
        Case(
            "one query and a future",
            (np.array([start]), np.arange(start + 4)),
            hint="Keys 0 … p_q are seen, the later ones are not.",
        ),
        Case(
            "a chunk with a past",
            (chunk, np.arange(start + 3)),
            hint="Three queries, and the keys of all tokens before them.",
        ),
        Case(
            "a square far from 0",
            (start + np.arange(4), start + np.arange(4)),
            hint="As many queries as keys: the lower triangle with its diagonal.",
        ),
        Case(
            "keys in any order",
            (np.array([start, start + 2]), rng.permutation(start + 3)),
            hint="A key's position counts, not where it stands in the array.",
        ),
        Case(
            "queries in any order",
            (rng.permutation(9)[:4], rng.permutation(9)[:5]),
            hint="The same for the queries.",
        ),
        Case(
            "empty slots",
            (np.array([2, 3]), rng.permutation(np.array([0, 1, 2, 3, -1, -1, -1]))),
            hint="-1 is a slot without a token: nobody sees it.",
        ),
        Case(
            "a window",
            (chunk, np.arange(start + 3)),
            {"window": _any(rng, 3, 4)},
            hint="window tokens at most, the query's own among them.",
        ),
        Case(
            "a window and empty slots",
            (np.array([1, 2, 3]), rng.permutation(np.array([0, 1, 2, 3, -1, -1]))),
            {"window": 5},
            hint="-1 is within five of position 1, and still no token.",
        ),
        Case(
            "a window of one",
            (chunk, rng.permutation(start + 3)),
            {"window": 1},
            hint="Every token sees itself alone.",
        ),
        Case(
            "a window wider than the past",
            (chunk, np.arange(start + 3)),
            {"window": 500},
            hint="It hides nothing.",
        ),
        Case(
            "a ring buffer's keys",
            (np.array([late - 1]), _held(late, m)),
            {"window": m},
            hint="After an eviction the newest tokens lie in front of the older ones.",
        ),
        Case(
            "a chunk behind a ring buffer",
            (late + np.arange(3), np.append(_held(late, m), late + np.arange(3))),
            {"window": m},
            hint="A later query of the chunk no longer sees what an earlier one saw.",
        ),
        Case(
            "nothing to see",
            (np.array([start]), start + 1 + np.arange(4)),
            hint="All keys are later: a row of False.",
        ),
    ]


def _cache(rng: Rng, b: int, h_kv: int, m: int, d: int, d_v: int, length: int) -> Cache:
    """A cache that ``length`` tokens went into; slots not yet used hold zeros."""
    k, v = rng.normal(size=(b, h_kv, m, d)), rng.normal(size=(b, h_kv, m, d_v))
    k[:, :, length:], v[:, :, length:] = 0, 0
    return k, v, length


def _step_call(
    rng: Rng, b: int, h_kv: int, m: int, d: int, d_v: int, length: int, group: int = 1
) -> tuple[Array, Array, Array, Cache]:
    q_t, k_t = rng.normal(size=(b, h_kv * group, 1, d)), rng.normal(size=(b, h_kv, 1, d))
    v_t = rng.normal(size=(b, h_kv, 1, d_v))
    return q_t, k_t, v_t, _cache(rng, b, h_kv, m, d, d_v, length)


def _laid(call: tuple[Any, ...], change: Callable[[Array], Array]) -> tuple[Any, ...]:
    q_t, k_t, v_t, (k, v, length) = call
    return (*map(change, (q_t, k_t, v_t)), (change(k), change(v), length))


def _single(x: Array) -> Array:
    return x.astype(np.float32)


def _kv_cases(rng: Rng) -> list[Case]:
    def call(*sizes: int, **more: int) -> tuple[Array, Array, Array, Cache]:
        return _step_call(rng, *sizes, **more)

    sharp = call(2, 3, 6, 4, 5, 4)
    return [
        Case("the first token", call(2, 3, 4, 5, 6, 0), hint="It sees itself alone: out is v_t."),
        Case("the second token", call(2, 3, 5, 4, 6, 1), hint="Two keys: the first and its own."),
        Case(
            "a cache half full",
            call(2, 3, 7, 4, 5, 3),
            hint="B 2, H 3, M 7, d 4, d_v 5; three tokens were there. Slots 4 to 6 are empty.",
        ),
        Case("the last free slot", call(2, 3, 5, 4, 6, 4), hint="From here on the cache is full."),
        Case(
            "the first eviction",
            call(2, 3, 5, 4, 6, 5),
            hint="length = M: the new token takes slot 0, where token 0 was.",
        ),
        Case(
            "a ring that has turned",
            call(2, 3, 5, 4, 6, 5 * _any(rng, 2, 3) + 2),
            hint="Token p goes to slot p mod M; all M slots are seen.",
        ),
        Case(
            "the ring's last slot",
            call(1, 2, 6, 3, 4, 6 * _any(rng, 2, 3) + 5),
            hint="length mod M = M - 1.",
        ),
        Case("one slot", call(2, 3, 1, 4, 5, 3), hint="M = 1: every token sees itself alone."),
        Case(
            "two query heads share a key head",
            call(2, 3, 7, 4, 5, 4, group=2),
            hint="H = 6 and H_kv = 3: query heads 0 and 1 read key head 0.",
        ),
        Case(
            "three query heads share a key head in a ring",
            call(2, 2, 5, 4, 3, 8, group=3),
            hint="H = 6 and H_kv = 2: query heads 0, 1 and 2 read key head 0.",
        ),
        Case(
            "one key head for all",
            call(3, 1, 6, 4, 5, 2, group=4),
            hint="Multi-query attention: H_kv = 1.",
        ),
        Case("one head of width 1", call(2, 1, 4, 1, 3, 2), hint="d = 1: the scale is 1."),
        Case(
            "large logits",
            (sharp[0] * 60, *sharp[1:]),
            hint="Logits near 100: exp needs the row's maximum taken off.",
        ),
        Case(
            "not contiguous in memory",
            _laid(call(2, 3, 5, 4, 6, 7), scattered),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            _laid(call(2, 3, 6, 4, 5, 3), _single),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _rope_cases(rng: Rng) -> list[Case]:
    def call(*sizes: int, **more: int) -> tuple[Array, Array, Array, Cache]:
        return _step_call(rng, *sizes, **more)

    return [
        Case(
            "the first token",
            call(2, 3, 4, 6, 8, 0),
            hint="Position 0: no angle, and nothing to see but itself.",
        ),
        Case("the second token", call(2, 3, 5, 4, 6, 1), hint="It stands at position 1."),
        Case(
            "a cache half full",
            call(2, 3, 7, 4, 8, 3),
            hint="The keys in the cache were turned when they came; the new one is at 3.",
        ),
        Case("one pair of columns", call(2, 3, 5, 2, 4, 3), hint="d = 2: the angle is p itself."),
        Case(
            "the first eviction",
            call(2, 3, 5, 4, 6, 5),
            hint="The new token goes to slot 0 and stands at position 5.",
        ),
        Case(
            "a ring that has turned",
            call(2, 3, 5, 4, 6, 5 * _any(rng, 2, 3) + 3),
            hint="Positions go on counting when old tokens are gone.",
        ),
        Case(
            "far out",
            call(2, 2, 6, 8, 4, _any(rng, 3001, 4003, 5002)),
            hint="Thousands of tokens have come and gone.",
        ),
        Case(
            "base=100 given",
            call(2, 3, 5, 6, 4, 9),
            {"base": 100.0},
            hint="The angle of pair i is p / base^(2i/d).",
        ),
        Case("one slot", call(2, 3, 1, 4, 6, 3), hint="M = 1: it sees itself, and keeps its key."),
        Case(
            "two query heads share a key head",
            call(2, 3, 7, 4, 6, 4, group=2),
            hint="H = 6 and H_kv = 3: query heads 0 and 1 read key head 0.",
        ),
        Case(
            "one key head for all in a ring",
            call(3, 1, 5, 4, 6, 8, group=4),
            hint="Multi-query attention: H_kv = 1.",
        ),
        Case(
            "not contiguous in memory",
            _laid(call(2, 3, 5, 4, 6, 7), scattered),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            _laid(call(2, 3, 6, 4, 8, 3), _single),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _chunk_cases(rng: Rng) -> list[Case]:
    def call(b: int, h: int, n: int, d: int, d_v: int, chunk: int) -> tuple[Any, ...]:
        shapes = ((b, h, n, d), (b, h, n, d), (b, h, n, d_v))
        return (*(rng.normal(size=shape) for shape in shapes), chunk)

    sharp, laid, single = call(2, 3, 9, 4, 5, 4), call(2, 3, 9, 4, 6, 4), call(2, 3, 9, 4, 5, 4)
    return [
        Case("two chunks", call(1, 1, 6, 3, 4, 3), hint="Tokens 0 to 2, then 3 to 5."),
        Case("a batch", call(2, 3, 8, 5, 6, 4), hint="B 2, H 3, N 8, d 5, d_v 6, chunks of 4."),
        Case("three chunks", call(2, 3, 12, 5, 6, 4), hint="The third sees both before it."),
        Case("many chunks", call(2, 1, 15, 4, 3, 3), hint="Five chunks of three."),
        Case(
            "a short last chunk",
            call(2, 3, 11, 4, 5, 4),
            hint="Chunks of 4, 4 and 3 tokens.",
        ),
        Case("a last chunk of one", call(2, 3, 9, 4, 5, 4), hint="Chunks of 4, 4 and 1 tokens."),
        Case("chunks of one", call(2, 3, 5, 4, 6, 1), hint="Token by token, as in decoding."),
        Case("one chunk", call(2, 3, 6, 4, 5, 6), hint="The whole sequence at once."),
        Case("a chunk longer than the sequence", call(2, 3, 5, 4, 6, 8), hint="N = 5, chunk = 8."),
        Case("one token", call(3, 2, 1, 4, 5, 3), hint="It sees itself: out is v."),
        Case(
            "large logits",
            (sharp[0] * 60, *sharp[1:]),
            hint="Logits near 100: exp needs the row's maximum taken off.",
        ),
        Case(
            "not contiguous in memory",
            (*map(scattered, laid[:3]), laid[3]),
            hint="The same numbers, laid out anew.",
        ),
        Case(
            "float32 input",
            (*map(_single, single[:3]), single[3]),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- oracles: the same values by another road -------------------------------------------------


def _bytes_added_up(n_layers: int, n_kv_heads: int, d: int, tokens: int, itemsize: int) -> int:
    """What each array of each layer takes."""
    one = n_kv_heads * tokens * d * itemsize
    return sum(one for _ in range(n_layers) for _ in ("k", "v"))


def _mask_one_by_one(q_positions: Array, k_positions: Array, window: int | None = None) -> Array:
    found = np.zeros((len(q_positions), len(k_positions)), bool)
    for i, j in np.ndindex(found.shape):
        p, other = int(q_positions[i]), int(k_positions[j])
        found[i, j] = other in range(0 if window is None else max(p - window + 1, 0), p + 1)
    return found


def _one_row(q: Array, keys: Array, values: Array) -> Array:
    """One query's attention, in plain sums."""
    logits = [float(q @ key) / len(q) ** 0.5 for key in keys]
    weights = np.exp(np.array(logits) - max(logits))
    return sum(w * value for w, value in zip(weights, values, strict=True)) / weights.sum()


def _step_by_position(q_t: Array, k_t: Array, v_t: Array, cache: Cache) -> tuple[Array, Cache]:
    """The kept tokens looked up by their positions, oldest first."""
    q_t, k_t, v_t = (np.asarray(x, float) for x in (q_t, k_t, v_t))
    k, v, length = np.array(cache[0], float), np.array(cache[1], float), cache[2]
    (b, h, _, _), (_, h_kv, m, _) = q_t.shape, k.shape
    k[:, :, length % m], v[:, :, length % m] = k_t[:, :, 0], v_t[:, :, 0]
    slots = [p % m for p in range(max(length + 1 - m, 0), length + 1)]
    out_t = np.zeros((b, h, 1, v.shape[-1]))
    for i, head in np.ndindex(b, h):
        of = head * h_kv // h
        out_t[i, head, 0] = _one_row(q_t[i, head, 0], k[i, of, slots], v[i, of, slots])
    return out_t, (k, v, length + 1)


def _turned(x: Array, p: int, base: float) -> Array:
    """Pairs as complex numbers, times e^(i p θ)."""
    x = np.asarray(x, float)
    theta = np.exp(-np.log(base) * 2 * np.arange(x.shape[-1] // 2) / x.shape[-1])
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * p * theta)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _rope_step_by_position(
    q_t: Array, k_t: Array, v_t: Array, cache: Cache, base: float = 10000.0
) -> tuple[Array, Cache]:
    p = cache[2]
    return _step_by_position(_turned(q_t, p, base), _turned(k_t, p, base), v_t, cache)


def _row_by_row(q: Array, k: Array, v: Array, chunk: int) -> Array:
    """Every query by itself; the chunk has no say."""
    q, k, v = (np.asarray(x, float) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, i in np.ndindex(q.shape[:3]):
        out[b, h, i] = _one_row(q[b, h, i], k[b, h, : i + 1], v[b, h, : i + 1])
    return out


# --- kv_cache_bytes ----------------------------------------------------------------------------


def _bytes_of(**left_out: Any) -> Callable[..., Any]:
    """The product with some of its factors changed: a function of what is given."""

    def answer(n_layers: int, n_kv_heads: int, d: int, tokens: int, itemsize: int) -> Any:
        given = {"n_layers": n_layers, "n_kv_heads": n_kv_heads, "d": d, "tokens": tokens}
        given |= {"itemsize": itemsize, "both": 2}
        total = 1
        for name, n in given.items():
            total = total * (left_out[name](n) if name in left_out else n)
        return total

    return answer


def _one(_: int) -> int:
    return 1


BYTES_EXERCISE = Exercise(
    id="kv_cache_bytes",
    chapter=CHAPTER,
    title="Bytes of a key/value cache",
    points=1,
    returns=("size",),
    reference=library.kv_cache_bytes,
    oracle=_bytes_added_up,
    cases=_bytes_cases,
    mistakes=(
        *named(
            "keys without values",
            "Both are kept, the keys and the values: twice as much.",
            SCALE,
            _bytes_of(both=_one),
        ),
        *named(
            "one layer only",
            "Every layer has keys and values of its own.",
            SCALE,
            _bytes_of(n_layers=_one),
        ),
        *named(
            "one key head only",
            "Each of the n_kv_heads key heads keeps d numbers a token, and as many for the values.",
            SCALE,
            _bytes_of(n_kv_heads=_one),
        ),
        *named(
            "numbers, not bytes",
            "itemsize is what one number takes: 2 bytes in half precision, 4 in single.",
            SCALE,
            _bytes_of(itemsize=_one),
        ),
        *named(
            "bits, not bytes",
            "itemsize is in bytes already, and bytes are asked for.",
            SCALE,
            _bytes_of(itemsize=lambda n: 8 * n),
            _bytes_of(itemsize=lambda n: n / 8),
        ),
        *named(
            "squared in the tokens",
            "A cache holds one key and one value a token: it grows with their number. It is the "
            "probabilities of a full pass that grow with its square, and these are not kept.",
            SCALE,
            _bytes_of(tokens=lambda n: n * n),
            _bytes_of(tokens=lambda n: n * (n + 1) // 2),
        ),
        *named(
            "queries kept too",
            "A query is used once, when its token comes: keys and values are kept, nothing else.",
            SCALE,
            _bytes_of(both=lambda _: 3),
        ),
        *named(
            "one token more",
            "tokens is how many are kept; the new one is among them.",
            SCALE,
            _bytes_of(tokens=lambda n: n + 1),
        ),
        *named(
            "in another unit",
            "Bytes are asked for, not KiB, MiB or GiB.",
            SCALE,
            *(
                _bytes_of(both=lambda n, unit=unit: n / unit)
                for unit in (2**10, 2**20, 2**30, 10**3, 10**6, 10**9)
            ),
        ),
    ),
)


# --- ring_positions ----------------------------------------------------------------------------


def _unmarked(length, capacity):
    last = length - 1
    return last - (last - np.arange(capacity)) % capacity


def _empty_as_zero(length, capacity):
    return np.maximum(_unmarked(length, capacity), 0)


def _empty_as_slots(length, capacity):
    held = _held(length, capacity)
    return np.where(held < 0, np.arange(capacity), held)


def _first_stay(length, capacity):
    slots = np.arange(capacity)
    return np.where(slots < length, slots, -1)


def _padded(tokens, capacity):
    return np.append(tokens, np.full(capacity - len(tokens), -1)).astype(int)


def _by_arrival(length, capacity):
    return _padded(np.arange(max(length - capacity, 0), length), capacity)


def _padding_first(length, capacity):
    return np.arange(length - capacity, length).clip(-1)


def _newest_first(length, capacity):
    return _padded(np.arange(max(length - capacity, 0), length)[::-1], capacity)


def _newest_goes(length, capacity):
    held = _first_stay(length, capacity)
    held[-1] = length - 1 if length >= capacity else held[-1]
    return held


def _next_too(length, capacity):
    return _held(length + 1, capacity)


def _last_not(length, capacity):
    return _held(max(length - 1, 0), capacity)


def _this_turn(turn):
    def answer(length, capacity):
        held = np.arange(capacity) + capacity * turn(length, capacity)
        return np.where(length > np.arange(capacity), held, -1)

    return answer


def _this_turn_alone(length, capacity):
    held = np.arange(capacity) + capacity * ((length - 1) // capacity)
    return np.where(held < length, held, -1)


RING_EXERCISE = Exercise(
    id="ring_positions",
    chapter=CHAPTER,
    title="What a ring buffer holds",
    points=2,
    returns=("positions",),
    reference=library.ring_positions,
    oracle=_held,
    cases=_ring_cases,
    mistakes=(
        *named(
            "in order of arrival",
            "Slots are asked for, not an ordered list: token p lies in slot p mod M and stays "
            "there, so that after an eviction the newest tokens stand in front of the older ones.",
            RING,
            _by_arrival,
            _padding_first,
        ),
        *named(
            "newest first",
            "Slots are asked for, not a list from the newest token to the oldest: token p lies in "
            "slot p mod M.",
            RING,
            _newest_first,
        ),
        *named(
            "no eviction",
            "Token M goes where token 0 was: a slot holds the last token with p mod M = s, not "
            "the first.",
            RING,
            _first_stay,
        ),
        *named(
            "the newest evicted instead of the oldest",
            "A full cache gives up its oldest token: slot length mod M, not always the last one.",
            RING,
            _newest_goes,
        ),
        *named(
            "tokens that have not come",
            "Behind the newest token's slot still lie those of the turn before: a position cannot "
            "be length or more.",
            RING,
            _this_turn(lambda n, m: (n - 1) // m),
            _this_turn(lambda n, m: n // m),
        ),
        *named(
            "the turn before left out",
            "Slots behind the newest token's are not empty after the first turn: they hold the "
            "tokens of the turn before.",
            RING,
            _this_turn_alone,
        ),
        *named(
            "one token too many",
            "length tokens have come, numbers 0 to length - 1: the newest is length - 1.",
            RING,
            _next_too,
        ),
        *named(
            "one token too few",
            "length tokens have come, numbers 0 to length - 1: the newest is length - 1.",
            RING,
            _last_not,
        ),
        *named(
            "empty slots not marked",
            "A slot that holds no token yet is -1: neither 0, which is the first token's position, "
            "nor another number.",
            RING,
            _unmarked,
            _empty_as_zero,
            _empty_as_slots,
        ),
        *named(
            "empty slots left out",
            "There is an entry for each of the M slots, -1 for the empty ones.",
            RING,
            lambda length, capacity: _held(length, capacity)[: min(length, capacity)],
        ),
    ),
)


# --- position_mask -----------------------------------------------------------------------------


def _mask_by(visible, empties=True):
    """The mask where ``visible(distance, window)`` says so, and the slot is not empty."""

    def answer(q_positions, k_positions, window=None):
        distance = q_positions[:, None] - k_positions
        seen = visible(distance, np.inf if window is None else window)
        return seen & (k_positions >= 0) if empties else seen

    return answer


def _within(distance, window):
    return (distance >= 0) & (distance < window)


def _mask_by_rows(rows, columns, empties=False):
    """The same from the arrays' indices instead of, or for one of, the positions."""

    def answer(q_positions, k_positions, window=None):
        n_q, n_k = len(q_positions), len(k_positions)
        i, j = rows(q_positions, n_q, n_k), columns(k_positions, n_k)
        seen = _within(i[:, None] - j, np.inf if window is None else window)
        return seen & (k_positions >= 0) if empties else seen

    return answer


def _top_left(_, n_q, n_k):
    return np.arange(n_q)


def _bottom_right(_, n_q, n_k):
    return np.arange(n_q) + n_k - n_q


def _as_given(positions, *_):
    return positions


def _slots(_, n_k):
    return np.arange(n_k)


def _first_token_empty(q_positions, k_positions, window=None):
    distance = q_positions[:, None] - k_positions
    return _within(distance, np.inf if window is None else window) & (k_positions > 0)


def _changed_mask(change):
    def answer(q_positions, k_positions, window=None):
        return change(library.position_mask(q_positions, k_positions, window))

    return answer


def _window_forgotten(q_positions, k_positions, window=None):
    return library.position_mask(q_positions, k_positions)


MASK_EXERCISE = Exercise(
    id="position_mask",
    chapter=CHAPTER,
    title="Who may see whom",
    points=2,
    returns=("mask",),
    reference=library.position_mask,
    oracle=_mask_one_by_one,
    cases=_mask_cases,
    tokens=("mask",),
    mistakes=(
        *named(
            "slots taken for positions",
            "Where a key stands in the array says nothing about when it came: a ring buffer's keys "
            "are out of order, and a chunk's queries do not begin at 0. Compare the positions.",
            MASK,
            *(
                _mask_by_rows(rows, columns, empties)
                for rows, columns in (
                    (_bottom_right, _slots),
                    (_top_left, _slots),
                    (_as_given, _slots),
                    (_top_left, _as_given),
                    (_bottom_right, _as_given),
                )
                for empties in (False, True)
            ),
        ),
        *named(
            "sees the future",
            "A key whose position is larger than the query's is hidden.",
            MASK,
            _mask_by(lambda distance, w: np.abs(distance) < w),
            _mask_by(lambda distance, w: distance < w),
            _mask_by(lambda distance, w: np.abs(distance) < w, empties=False),
            _mask_by(lambda distance, w: distance < w, empties=False),
        ),
        *named(
            "sees only the future",
            "The condition is turned round: the query's position is at least the key's.",
            MASK,
            _mask_by(lambda distance, w: (distance <= 0) & (-distance < w)),
            _mask_by(lambda distance, w: (distance <= 0) & (distance > -w), empties=False),
            _mask_by(lambda distance, w: distance <= 0),
        ),
        *named(
            "does not see itself",
            "A token sees its own key: the positions may be equal.",
            MASK,
            _mask_by(lambda distance, w: (distance > 0) & (distance < w)),
            _mask_by(lambda distance, w: (distance > 0) & (distance <= w)),
        ),
        *named(
            "empty slots seen",
            "-1 is no position: it is smaller than every query's, and nothing lies there.",
            MASK,
            _mask_by(_within, empties=False),
        ),
        *named(
            "the first token taken for an empty slot",
            "Positions are counted from 0: empty is -1 alone.",
            MASK,
            _first_token_empty,
        ),
        *named(
            "window one too wide",
            "A window of w holds the query's own token and w - 1 before it: the distance is "
            "smaller than w.",
            RING,
            _mask_by(lambda distance, w: (distance >= 0) & (distance <= w)),
        ),
        *named(
            "window one too narrow",
            "A window of w holds the query's own token and w - 1 before it: w tokens.",
            RING,
            _mask_by(lambda distance, w: (distance >= 0) & (distance < w - 1)),
        ),
        *named(
            "window forgotten",
            "With a window a query sees no further back than window - 1.",
            RING,
            _window_forgotten,
        ),
        *named(
            "True = hidden",
            "Here, as everywhere in this book, True says that the query may see the key.",
            MASK,
            _changed_mask(np.logical_not),
        ),
        *named(
            "queries and keys exchanged",
            "Rows are queries, columns keys: (Nq, Nk).",
            MASK,
            _changed_mask(np.transpose),
        ),
        *named(
            "numbers instead of booleans",
            "The mask is boolean. What is added to logits, 0 and -inf, is made of it.",
            MASK,
            _changed_mask(lambda mask: np.where(mask, 0, -np.inf)),
            _changed_mask(lambda mask: mask.astype(float)),
        ),
    ),
)


# --- kv_cache_step -----------------------------------------------------------------------------


def _attended(q, k, v, scale=None, repeat=np.repeat, nothing=0.0):
    """Attention of every query to all of these keys, groups of heads included."""
    if not k.shape[2]:
        return np.full((*q.shape[:3], v.shape[-1]), nothing)
    if repeat is not None and q.shape[1] != k.shape[1]:
        k, v = (repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale(q)
    logits = q @ k.swapaxes(-1, -2) * scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def _unscaled(q):
    return 1.0


def _by_all_heads(q):
    return (q.shape[1] * q.shape[-1]) ** -0.5


def _tiled(x, times, axis):
    return np.concatenate([x] * times, axis=axis)


def _kept(n, m):
    return slice(0, min(n + 1, m))


def _turn(n, m):
    return n % m


def _on(n, m):
    return n + 1


def _wrong_step(slot=_turn, seen=_kept, after=_on, **how):
    """A step that writes, looks or counts in another way, from length and capacity."""

    def answer(q_t, k_t, v_t, cache):
        k, v, n = cache[0].copy(), cache[1].copy(), cache[2]
        m = k.shape[2]
        k[:, :, slot(n, m)], v[:, :, slot(n, m)] = k_t[:, :, 0], v_t[:, :, 0]
        looked = seen(n, m)
        return _attended(q_t, k[:, :, looked], v[:, :, looked], **how), (k, v, after(n, m))

    return answer


def _seeing(which, nothing=0.0):
    """The right cache, and an output from other keys: a function of all there are."""

    def answer(q_t, k_t, v_t, cache):
        _, after = library.kv_cache_step(q_t, k_t, v_t, cache)
        keys, values = which(cache, after)
        return _attended(q_t, keys, values, nothing=nothing), after

    return answer


def _before(cache, after):
    kept = min(cache[2], cache[0].shape[2])
    return cache[0][:, :, :kept], cache[1][:, :, :kept]


def _without_its_own(cache, after):
    own, kept = cache[2] % cache[0].shape[2], min(after[2], cache[0].shape[2])
    others = [s for s in range(kept) if s != own]
    return after[0][:, :, others], after[1][:, :, others]


def _grown(of, repeat=np.repeat):
    """The arrays, or what is kept of them, and the new token behind."""

    def answer(q_t, k_t, v_t, cache):
        old = slice(None) if of == "all" else slice(0, min(cache[2], cache[0].shape[2]))
        k, v = (
            np.concatenate([held[:, :, old], new], axis=2)
            for held, new in zip(cache[:2], (k_t, v_t), strict=True)
        )
        return _attended(q_t, k, v, repeat=repeat), (k, v, cache[2] + 1)

    return answer


def _grown_and_cut(q_t, k_t, v_t, cache):
    """What is kept and the new token, the oldest cut off: as many slots as tokens."""
    m = cache[0].shape[2]
    kept = min(cache[2], m)
    k, v = (
        np.concatenate([old[:, :, :kept], new], axis=2)[:, :, -m:]
        for old, new in ((cache[0], k_t), (cache[1], v_t))
    )
    return _attended(q_t, k, v), (k, v, cache[2] + 1)


def _shifted(when_full):
    """The oldest goes out in front, the new one comes in at the end."""

    def answer(q_t, k_t, v_t, cache):
        m, n = cache[0].shape[2], cache[2]
        if when_full and n < m:
            return library.kv_cache_step(q_t, k_t, v_t, cache)
        k, v = (
            np.concatenate([old[:, :, 1:], new], axis=2)
            for old, new in ((cache[0], k_t), (cache[1], v_t))
        )
        kept = min(n + 1, m)
        return _attended(q_t, k[:, :, m - kept :], v[:, :, m - kept :]), (k, v, n + 1)

    return answer


def _new_token_everywhere(q_t, k_t, v_t, cache):
    k, v = (np.broadcast_to(new, old.shape) for new, old in ((k_t, cache[0]), (v_t, cache[1])))
    return _attended(q_t, k_t, v_t), (k.copy(), v.copy(), cache[2] + 1)


def _new_token_alone(q_t, k_t, v_t, cache):
    k, v, n = np.zeros_like(cache[0]), np.zeros_like(cache[1]), cache[2]
    m = k.shape[2]
    k[:, :, n % m], v[:, :, n % m] = k_t[:, :, 0], v_t[:, :, 0]
    kept = min(n + 1, m)
    return _attended(q_t, k[:, :, :kept], v[:, :, :kept]), (k, v, n + 1)


def _nothing_but_the_new(q_t, k_t, v_t, cache):
    return _attended(q_t, k_t, v_t), (k_t.copy(), v_t.copy(), cache[2] + 1)


def _values_not_kept(seen_anyway):
    def answer(q_t, k_t, v_t, cache):
        out_t, (k, _, n) = library.kv_cache_step(q_t, k_t, v_t, cache)
        kept = min(n, k.shape[2])
        if not seen_anyway:
            out_t = _attended(q_t, k[:, :, :kept], cache[1][:, :, :kept])
        return out_t, (k, cache[1].copy(), n)

    return answer


def _cache_not_updated(q_t, k_t, v_t, cache):
    out_t, _ = library.kv_cache_step(q_t, k_t, v_t, cache)
    return out_t, (cache[0].copy(), cache[1].copy(), cache[2])


def _cache_counted_only(q_t, k_t, v_t, cache):
    out_t, _ = library.kv_cache_step(q_t, k_t, v_t, cache)
    return out_t, (cache[0].copy(), cache[1].copy(), cache[2] + 1)


def _own_slot(n, m):
    return slice(n % m, n % m + 1)


KV_MISTAKES: tuple[Mistake, ...] = (
    *named(
        "mask sliced to one key",
        "A square mask cut to the one new token, mask[:1, :1], or aligned top-left, lets it see "
        "one key. Its row is as long as there are keys, and all of it is True: a new token has no "
        "future among them, and needs no mask.",
        MASK,
        _wrong_step(seen=lambda n, m: slice(0, 1)),
        _wrong_step(seen=_own_slot),
    ),
    *named(
        "cache overwritten",
        "The new token goes behind the others, into slot length mod M; here it was written over "
        "one that is still needed, or over all of them.",
        CACHE,
        _wrong_step(slot=lambda n, m: 0),
        _wrong_step(slot=lambda n, m: max(n - 1, 0) % m),
        _wrong_step(slot=lambda n, m: (n - 1) % m),
        _new_token_everywhere,
        _new_token_alone,
        _nothing_but_the_new,
    ),
    *named(
        "the newest evicted instead of the oldest",
        "A full cache gives up its oldest token: the new one goes to slot length mod M, not into "
        "the last slot over and over.",
        RING,
        _wrong_step(slot=lambda n, m: min(n, m - 1)),
    ),
    *named(
        "one slot too far",
        "Slots are counted from 0: the token that length others came before goes to slot length "
        "mod M.",
        CACHE,
        _wrong_step(slot=lambda n, m: (n + 1) % m),
        _wrong_step(slot=lambda n, m: (n + 1) % m, seen=lambda n, m: slice(0, min(n + 2, m))),
    ),
    *named(
        "does not see itself",
        "A token attends to itself too: put its key and value in first, then attend.",
        CACHE,
        *(
            _seeing(which, nothing)
            for which in (_before, _without_its_own)
            for nothing in (0.0, np.nan)
        ),
    ),
    *named(
        "empty slots attended to",
        "A slot that was not used holds zeros, and a logit of 0 has a weight like any other: only "
        "the first length + 1 slots count until the cache is full.",
        MASK,
        _wrong_step(seen=lambda n, m: slice(0, m)),
    ),
    *named(
        "slots behind the newest one not seen",
        "Once the ring has turned, the slots behind the newest token's hold older tokens that are "
        "still in the window: all M slots are seen.",
        RING,
        _wrong_step(seen=lambda n, m: slice(0, n % m + 1)),
    ),
    *named(
        "length not counted on",
        "One token more has come: the cache that is returned says length + 1, or the next token "
        "overwrites this one.",
        CACHE,
        _wrong_step(after=lambda n, m: n),
    ),
    *named(
        "length stops at the capacity",
        "length counts all tokens that have come, the evicted ones too: the next slot and the "
        "positions follow from it.",
        RING,
        _wrong_step(after=lambda n, m: min(n + 1, m)),
    ),
    *named(
        "length counted from 1 again",
        "length counts all tokens that have come; only the slot begins at 0 again.",
        RING,
        _wrong_step(after=lambda n, m: n % m + 1),
        _wrong_step(after=lambda n, m: (n + 1) % m),
    ),
    *named(
        "cache grows",
        "The arrays keep their M slots: the new token is written into one of them. A longer array "
        "for each token copies everything each time, and never evicts.",
        CACHE,
        *(_grown(of, repeat) for of in ("all", "kept") for repeat in (np.repeat, None)),
        _grown_and_cut,
    ),
    *named(
        "cache shifted instead of a ring",
        "The output is right, but the tokens were moved: token p lies in slot p mod M and stays "
        "there, and one slot is written. Moving all of them costs a copy of the cache a token.",
        RING,
        _shifted(when_full=True),
        _shifted(when_full=False),
    ),
    *named(
        "values not kept",
        "Both are kept: the value goes into its slot as the key does.",
        CACHE,
        _values_not_kept(seen_anyway=True),
        _values_not_kept(seen_anyway=False),
    ),
    *named(
        "cache returned as it came",
        "The output is right; the cache that is returned has to hold the new key and value, or "
        "the next token does not find them.",
        CACHE,
        _cache_not_updated,
        _cache_counted_only,
    ),
    *named(
        "no 1/√d",
        "The logits are scaled by 1/√d as in the full pass.",
        CACHE,
        _wrong_step(scale=_unscaled),
    ),
    *named(
        "1/√(H·d)",
        "The scale is that of one head: d is the width of a key, not the model's.",
        CACHE,
        _wrong_step(scale=_by_all_heads),
    ),
    *named(
        "heads of a group not repeated",
        "With fewer key heads than query heads, query head h reads key head h // G: repeat each "
        "key head G times, or give a group's queries to its key head as rows.",
        SHAPES,
        _wrong_step(repeat=None),
    ),
    *named(
        "heads of a group: repeat taken as tile",
        "The query heads of a group are neighbours: head h reads key head h // G. Repeat each key "
        "head G times, one after the other.",
        SHAPES,
        _wrong_step(repeat=_tiled),
    ),
)

KV_EXERCISE = Exercise(
    id="kv_cache_step",
    chapter=CHAPTER,
    title="One token with a key/value cache",
    points=3,
    returns=("out_t", "cache"),
    reference=library.kv_cache_step,
    oracle=_step_by_position,
    cases=_kv_cases,
    mistakes=KV_MISTAKES,
)


# --- rope_cache_step ---------------------------------------------------------------------------


def _position(n, m):
    return n


def _turned_step(
    q_at=_position, k_at=_position, base_of=lambda base, d: base, layout="interleaved", step=None
):
    """A step whose query and key are turned by other positions, or in another way."""

    def answer(q_t, k_t, v_t, cache, base=10000.0):
        n, m = cache[2], cache[0].shape[2]
        turn = base_of(base, q_t.shape[-1])
        if q_at is not None:
            q_t = rope(q_t, q_at(n, m), turn, layout=layout)
        if k_at is not None:
            k_t = rope(k_t, k_at(n, m), turn, layout=layout)
        return (step or library.kv_cache_step)(q_t, k_t, v_t, cache)

    return answer


def _at(position):
    return _turned_step(q_at=position, k_at=position)


def _values_turned(q_t, k_t, v_t, cache, base=10000.0):
    return library.rope_cache_step(q_t, k_t, rope(v_t, cache[2], base), cache, base)


def _kept_unturned(q_t, k_t, v_t, cache, base=10000.0):
    out_t, (k, v, n) = library.rope_cache_step(q_t, k_t, v_t, cache, base)
    k[:, :, cache[2] % k.shape[2]] = k_t[:, :, 0]
    return out_t, (k, v, n)


def _all_turned_now(kept):
    """Every key in the cache is turned by its position, those that were turned again."""

    def answer(q_t, k_t, v_t, cache, base=10000.0):
        _, (k, v, n) = library.kv_cache_step(q_t, k_t, v_t, cache)
        m = k.shape[2]
        some = min(n, m)
        turned = k.copy()
        turned[:, :, :some] = rope(k[:, :, :some], _held(n, m)[:some], base)
        out_t = _attended(rope(q_t, cache[2], base), turned[:, :, :some], v[:, :, :some])
        return out_t, (turned if kept else k, v, n)

    return answer


def _base_fixed(q_t, k_t, v_t, cache, base=10000.0):
    return library.rope_cache_step(q_t, k_t, v_t, cache)


ROPE_EXERCISE = Exercise(
    id="rope_cache_step",
    chapter=CHAPTER,
    title="Rotary positions with a cache",
    points=2,
    returns=("out_t", "cache"),
    reference=library.rope_cache_step,
    oracle=_rope_step_by_position,
    cases=_rope_cases,
    mistakes=(
        *named(
            "position of the slot",
            "A slot is where a token lies, its position when it came: length, not length mod M. "
            "By slots the newest token may seem to stand before older ones.",
            POSITIONS,
            _at(lambda n, m: n % m),
        ),
        *named(
            "position stops at the window",
            "Positions go on counting when old tokens are evicted: the kept keys were turned by "
            "their own, and a query that stands still drifts away from them.",
            POSITIONS,
            _at(lambda n, m: min(n, m - 1)),
            _at(lambda n, m: min(n, m)),
        ),
        *named(
            "position 0 for every token",
            "The new token is row 0 of its own array; in the sequence it stands at length. By "
            "position 0 nothing is turned.",
            POSITIONS,
            _turned_step(q_at=None, k_at=None),
        ),
        *named(
            "positions off by one",
            "length tokens came before, at positions 0 to length - 1: this one stands at length.",
            POSITIONS,
            _at(lambda n, m: n + 1),
            _at(lambda n, m: n - 1),
            _at(lambda n, m: max(n - 1, 0)),
        ),
        *named(
            "query not turned",
            "Both are turned, the query and the key: a logit then depends on the difference.",
            POSITIONS,
            _turned_step(q_at=None),
        ),
        *named(
            "key not turned",
            "Both are turned, the query and the key: a logit then depends on the difference.",
            POSITIONS,
            _turned_step(k_at=None),
        ),
        *named(
            "key kept as it came",
            "The output is right, but the key was put into the cache unturned: this cache keeps "
            "turned keys, and the next step does not turn it.",
            POSITIONS,
            _kept_unturned,
        ),
        *named(
            "keys in the cache turned again",
            "The keys in this cache were turned when they came. Turned at every step they turn "
            "further and further; only the new one is left to turn.",
            POSITIONS,
            _all_turned_now(kept=False),
            _all_turned_now(kept=True),
        ),
        *named(
            "value turned",
            "Positions act on queries and keys. A value is added up as it is.",
            POSITIONS,
            _values_turned,
        ),
        *named(
            "turned the other way",
            "The angle is +pθ: the cached keys were turned this way.",
            POSITIONS,
            _at(lambda n, m: -n),
        ),
        *named(
            "halves instead of pairs",
            "Here pairs are columns (2i, 2i+1). The half-split layout is a rotation too, but the "
            "keys in the cache are not in it.",
            POSITIONS,
            _turned_step(layout="half"),
        ),
        *named(
            "base exponent",
            "Pair i of d/2 turns by base^(-2i/d) a position: from 1 to nearly 1/base.",
            POSITIONS,
            _turned_step(base_of=lambda base, d: base**0.5),
            _turned_step(base_of=lambda base, d: base**2),
        ),
        *named(
            "base not used",
            "base is an argument: 10000 is its default only.",
            POSITIONS,
            _base_fixed,
        ),
        *(
            carried(mistake, "kv_cache_step", _turned_step(step=mistake.answer))
            for mistake in KV_MISTAKES
        ),
    ),
)


# --- chunked_causal_attention ------------------------------------------------------------------


def _masked(q, k, v, mask, scale=None):
    """Attention under a mask; a row that sees nothing gives zeros."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale(q)
    logits = np.where(mask, q @ k.swapaxes(-1, -2) * scale, -np.inf)
    peak = np.where(mask.any(axis=-1), logits.max(axis=-1, initial=-1e300), 0)[..., None]
    weights = np.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


def _cuts(n, chunk):
    return [(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _in_chunks(seen, cuts=_cuts, scale=None):
    """Chunk by chunk, where ``seen(i, j, start, end, chunk)`` says what query i sees of key j.

    i and j are positions; start and end those of the chunk that i is in.
    """

    def answer(q, k, v, chunk):
        n, out = q.shape[2], np.zeros((*q.shape[:3], v.shape[-1]))
        for start, end in cuts(n, chunk):
            i, j = np.arange(start, end)[:, None], np.arange(n)
            mask = np.broadcast_to(seen(i, j, start, end, chunk), (end - start, n))
            out[:, :, start:end] = _masked(q[:, :, start:end], k, v, mask, scale)
        return out

    return answer


def _causal(i, j, *_):
    return j <= i


def _whole_chunks(n, chunk):
    return [(start, start + chunk) for start in range(0, n - chunk + 1, chunk)]


def _whole_chunks_joined(q, k, v, chunk):
    out = library.chunked_causal_attention(q, k, v, chunk)
    n = q.shape[2] // chunk * chunk
    if not n:
        raise ValueError("need at least one array to concatenate")
    return out[:, :, :n]


def _part(which):
    """Only one chunk's outputs come back."""

    def answer(q, k, v, chunk):
        start, end = _cuts(q.shape[2], chunk)[which]
        return library.chunked_causal_attention(q, k, v, chunk)[:, :, start:end]

    return answer


def _own_softmax(divide):
    """Each chunk of keys normalised by itself, the outputs added up or averaged."""

    def answer(q, k, v, chunk):
        n, out = q.shape[2], np.zeros((*q.shape[:3], v.shape[-1]))
        count = np.zeros((n, 1))
        for start, end in _cuts(n, chunk):
            mask = np.arange(start, end) <= np.arange(n)[:, None]
            out += _masked(q, k[:, :, start:end], v[:, :, start:end], mask)
            count += mask.any(axis=-1, keepdims=True)
        return out / count if divide else out

    return answer


CHUNKED_EXERCISE = Exercise(
    id="chunked_causal_attention",
    chapter=CHAPTER,
    title="Causal attention in chunks",
    points=3,
    returns=("out",),
    reference=library.chunked_causal_attention,
    oracle=_row_by_row,
    cases=_chunk_cases,
    tokens=("out",),
    mistakes=(
        *named(
            "chunk sees the future",
            "The past is seen whole, but inside a chunk a query must not see the keys after its "
            "own: rows start … end - 1 of the causal mask.",
            CHUNKED,
            _in_chunks(lambda i, j, start, end, chunk: j < end),
            _in_chunks(lambda i, j, start, end, chunk: j >= 0),
            # Aligned bottom-right to all keys.
            lambda q, k, v, chunk: _in_chunks(
                lambda i, j, start, end, chunk: j <= i - end + q.shape[2]
            )(q, k, v, chunk),
        ),
        *named(
            "one token ahead",
            "Query i sees keys 0 … i, and not i + 1, its target.",
            CHUNKED,
            _in_chunks(lambda i, j, *_: j <= i + 1),
        ),
        *named(
            "does not see itself",
            "A token attends to itself too: keys 0 … i.",
            CHUNKED,
            _in_chunks(lambda i, j, *_: j < i),
        ),
        *named(
            "chunk sees only itself",
            "The keys of all chunks before belong to a query's past: slice them from 0 to the "
            "chunk's end, not from its start.",
            CHUNKED,
            _in_chunks(lambda i, j, start, *_: (j <= i) & (j >= start)),
            _in_chunks(lambda i, j, start, end, chunk: (j < end) & (j >= start)),
        ),
        *named(
            "chunk sees only the past",
            "A query sees the keys of its own chunk too, up to its own.",
            CHUNKED,
            _in_chunks(lambda i, j, start, *_: (j < start) & (i >= 0)),
        ),
        *named(
            "chunk sees itself and the one before",
            "The whole past is seen, not the last chunk alone: keys 0 to the chunk's end.",
            CHUNKED,
            _in_chunks(lambda i, j, start, end, chunk: (j <= i) & (j >= start - chunk)),
        ),
        *named(
            "mask aligned top-left",
            "Query i of a chunk that begins at start sees keys 0 … start + i. Aligned top-left, "
            "as torch's is_causal, it sees 0 … i only.",
            MASK,
            _in_chunks(lambda i, j, start, *_: j <= i - start),
        ),
        *named(
            "mask of a whole chunk on a short one",
            "In a short last chunk the offset is the chunk's start, not its end less the usual "
            "length.",
            CHUNKED,
            _in_chunks(lambda i, j, start, end, chunk: j <= i - start + end - chunk),
        ),
        *named(
            "short last chunk left out",
            "N need not be a multiple of chunk: the last chunk is as short as it comes.",
            CHUNKED,
            _in_chunks(_causal, _whole_chunks),
            _whole_chunks_joined,
        ),
        *named(
            "one chunk returned",
            "All chunks' outputs are asked for, one behind the other: (B, H, N, d_v).",
            CHUNKED,
            _part(-1),
            _part(0),
        ),
        *named(
            "normalised chunk by chunk",
            "A row's weights add up to 1 over all its keys. Softmax over each chunk of keys alone "
            "gives each the same say; chunk the queries, not the keys.",
            CHUNKED,
            _own_softmax(divide=False),
            _own_softmax(divide=True),
        ),
        *named(
            "no 1/√d",
            "The logits are scaled by 1/√d as in the full pass.",
            CHUNKED,
            _in_chunks(_causal, scale=_unscaled),
        ),
        *named(
            "1/√(H·d)",
            "The scale is that of one head: d is the width of a key, not the model's.",
            CHUNKED,
            _in_chunks(_causal, scale=_by_all_heads),
        ),
    ),
)

EXERCISES = (
    BYTES_EXERCISE,
    RING_EXERCISE,
    MASK_EXERCISE,
    KV_EXERCISE,
    ROPE_EXERCISE,
    CHUNKED_EXERCISE,
)
