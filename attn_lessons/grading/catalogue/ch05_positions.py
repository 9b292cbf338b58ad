"""Chapter 5: positions added, looked up, turned in and subtracted, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_lessons import positions as library
from attn_lessons.grading.catalogue._parts import named, scattered
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.grading.relations import carried

CHAPTER = "ch05_positions"
SHAPES = f"{CHAPTER}.html#ch05-shapes"
SINUSOIDAL = f"{CHAPTER}.html#ch05-sinusoidal"
LEARNED = f"{CHAPTER}.html#ch05-learned"
ROPE = f"{CHAPTER}.html#ch05-rope"
ROPE_BACKWARD = f"{CHAPTER}.html#ch05-rope-backward"
HALF = f"{CHAPTER}.html#ch05-half"
ALIBI = f"{CHAPTER}.html#ch05-alibi"
PRECISION = f"{CHAPTER}.html#ch05-precision"

Array = np.ndarray
Rng = np.random.Generator

# Beyond position 100000 an angle in float32 is off by up to 0.01, one in float64 by 1e-11; the
# result may still be rounded to float32.
FAR = 2e-6


# --- inputs ---------------------------------------------------------------------------------


def _any(rng: Rng, *choices: int) -> int:
    return int(rng.choice(choices))


def _sinusoidal_cases(rng: Rng) -> list[Case]:
    square = _any(rng, 4, 6, 8)
    return [
        Case(
            "two columns",
            (_any(rng, 4, 5, 6, 7), 2),
            hint="One pair, and its frequency is 1: sin p beside cos p.",
        ),
        Case(
            "an even width",
            (_any(rng, 5, 7, 9), _any(rng, 6, 10, 12)),
            hint="Sines in columns 0, 2, 4 …, each with its cosine to the right.",
        ),
        Case(
            "a wide table",
            (_any(rng, 9, 10, 11), _any(rng, 64, 96, 128)),
            hint="The frequencies fall from 1 to nearly 1/10000, by the same factor each time.",
        ),
        Case(
            "as many positions as columns",
            (square, square),
            hint="Rows are positions, columns are frequencies.",
        ),
        Case(
            "many positions",
            (_any(rng, 200, 300, 400), _any(rng, 8, 14, 16)),
            hint="The same formula further out.",
        ),
        Case(
            "one position",
            (1, _any(rng, 6, 8, 10)),
            hint="Position 0: every sine is 0 and every cosine 1.",
        ),
        Case(
            "no positions",
            (0, _any(rng, 4, 6, 8)),
            hint="An empty sequence has a table of shape (0, d).",
        ),
        Case(
            "an odd width",
            (_any(rng, 5, 6, 8), _any(rng, 7, 9, 11)),
            hint="The last column is a sine without its cosine; exponents are 2i/d with the odd d.",
        ),
        Case(
            "three columns",
            (_any(rng, 4, 5, 6), 3),
            hint="sin, cos, sin: exponents 0, 0 and 2/3.",
        ),
        Case("one column", (_any(rng, 4, 5, 6), 1), hint="sin p alone."),
    ]


def _learned_cases(rng: Rng) -> list[Case]:
    def upstream(*shape: int) -> Array:
        return rng.normal(size=shape)

    return [
        Case(
            "each position once",
            (upstream(5, 3), np.arange(5), 5),
            hint="Every row was used once: its gradient is what arrives there.",
        ),
        Case(
            "positions out of order",
            (upstream(5, 3), rng.permutation(5), 5),
            hint="Row p of the table gets the gradient of the token that stands at p.",
        ),
        Case(
            "repeated positions",
            (upstream(6, 4), rng.permutation([1, 1, 1, 0, 3, 3]), 5),
            hint="A row that was used three times collects three gradients.",
        ),
        Case(
            "one position many times",
            (upstream(7, 3), np.full(7, rng.integers(4)), 4),
            hint="All tokens stand at the same position: one row gets the sum of everything.",
        ),
        Case(
            "rows that are not used",
            (upstream(3, 4), rng.permutation(9)[:3], 9),
            hint="The table has n rows; those of positions that did not occur get gradient 0.",
        ),
        Case(
            "a batch that shares its positions",
            (upstream(2, 5, 3), rng.permutation(7)[:5], 7),
            hint="dout is (B, N, C), positions (N,): row p was used in every sequence.",
        ),
        Case(
            "a batch with positions of its own",
            (upstream(2, 4, 3), rng.integers(0, 6, (2, 4)), 6),
            hint="dout is (B, N, C), positions (B, N).",
        ),
        Case(
            "batch and heads share their positions",
            (upstream(2, 3, 5, 4), rng.integers(0, 6, 5), 6),
            hint="dout is (B, H, N, d), positions (N,): sum over both leading axes.",
        ),
        Case(
            "one token",
            (upstream(1, 4), rng.integers(0, 3, 1), 3),
            hint="One row of the table is not 0.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(upstream(2, 4, 3)), rng.integers(0, 5, (2, 4)), 5),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 upstream",
            (upstream(8, 3).astype(np.float32), rng.integers(0, 3, 8), 3),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _rotary_cases(rng: Rng) -> list[Case]:
    """What rope and its backward pass are both tried on."""

    def rows(*shape: int) -> Array:
        return rng.normal(size=shape)

    late = int(rng.integers(20, 40))
    far = int(rng.integers(100_000, 120_000))
    return [
        Case(
            "one pair",
            (rows(4, 2), rng.permutation(9)[:4]),
            hint="d = 2: one pair, whose angle at position p is p itself.",
        ),
        Case(
            "one token",
            (rows(1, 6), rng.integers(1, 9, 1)),
            hint="Three pairs, three angles: p, p/10000^(2/6) and p/10000^(4/6).",
        ),
        Case(
            "position 0",
            (rows(3, 6), np.zeros(3, int)),
            hint="At position 0 every angle is 0: nothing is turned.",
        ),
        Case(
            "a sequence",
            (rows(5, 8), np.arange(5)),
            hint="Row t stands at position t; pairs are columns (0, 1), (2, 3) …",
        ),
        Case(
            "positions that start late",
            (rows(5, 8), late + np.arange(5)),
            hint="As in decoding with cached keys: the positions given count, not the row numbers.",
        ),
        Case(
            "positions out of order",
            (rows(6, 4), rng.permutation([7, 0, 3, 3, 12, 1])),
            hint="Each row is turned by its own position, whatever the other rows' are.",
        ),
        Case(
            "batch and heads",
            (rows(2, 3, 5, 4), np.arange(5)),
            hint="x is (B, H, N, d): all batches and heads share the positions of the N rows.",
        ),
        Case(
            "a wide head",
            (rows(3, 64), rng.permutation(50)[:3]),
            hint="The angles fall from p to nearly p/10000, by the same factor each time.",
        ),
        Case(
            "base=100 given",
            (rows(4, 6), rng.permutation(30)[:4]),
            {"base": 100.0},
            hint="The angle of pair i is p / base^(2i/d).",
        ),
        Case(
            "negative and fractional positions",
            (rows(5, 6), rng.uniform(-20, 20, 5)),
            hint="Positions are real numbers here; a negative one turns the other way.",
        ),
        Case(
            "every sequence at positions of its own",
            (rows(2, 3, 5, 6), rng.integers(0, 40, (2, 1, 5))),
            hint="positions has shape (B, 1, N), and broadcasts to x's (B, H, N).",
        ),
        Case(
            "large positions",
            (rows(4, 8), far + rng.permutation(9999)[:4]),
            hint="Angles near 100000 and more: in float64 they are known to 1e-11.",
            rtol=FAR,
        ),
        Case(
            "large positions and float32 rows",
            (rows(4, 8).astype(np.float32), far + rng.permutation(9999)[:4]),
            hint="Angles near 100000 and more: in float32 they are known to 0.01 only, whatever "
            "the dtype of the rows.",
            rtol=FAR,
        ),
        Case(
            "not contiguous in memory",
            (scattered(rows(2, 5, 6)), np.arange(5)),
            hint="The same numbers in another memory order: reshape copies here.",
        ),
        Case(
            "float32 rows",
            (rows(5, 6).astype(np.float32), np.arange(5)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _permutation_cases(rng: Rng) -> list[Case]:
    return [
        Case("one pair", (2,), hint="One pair is laid out alike in both."),
        Case("two pairs", (4,), hint="Interleaved: a₀ b₀ a₁ b₁; half-split: a₀ a₁ b₀ b₁."),
        Case("three pairs", (6,), hint="From here on the permutation is not its own inverse."),
        Case("four pairs", (8,), hint="First the columns of the a, then those of the b."),
        Case("an odd number of pairs", (_any(rng, 10, 14, 18, 22),), hint="d/2 may be odd."),
        Case("a small head", (_any(rng, 12, 16, 20, 24),), hint="A width that small models have."),
        Case("a head", (_any(rng, 64, 80, 96),), hint="A width that models have."),
        Case("a wide head", (_any(rng, 128, 192, 256),), hint="A width that large models have."),
    ]


def _slopes_cases(rng: Rng) -> list[Case]:
    return [
        Case("eight heads", (8,), hint="The paper's: 1/2, 1/4 … 1/256."),
        Case("one head", (1,), hint="H = 1, h = 1: 2^-8."),
        Case("two heads", (2,), hint="2^-4 and 2^-8."),
        Case("four heads", (4,), hint="2^-2, 2^-4, 2^-6, 2^-8."),
        Case("sixteen heads", (16,), hint="The first is 2^(-1/2), the last again 2^-8."),
        Case(
            "a larger power of two",
            (_any(rng, 32, 64, 128),),
            hint="A geometric sequence whose first element is its ratio.",
        ),
        Case(
            "three heads",
            (3,),
            hint="No power of two: the slopes of 2 heads, then one of those of 4.",
        ),
        Case(
            "six heads",
            (6,),
            hint="The 4 slopes of 4 heads, then the first and the third of 8 heads'.",
        ),
        Case(
            "one head more than a power of two",
            (_any(rng, 5, 9, 17, 33),),
            hint="All but the last slope are those of the power of two.",
        ),
        Case(
            "one head less than a power of two",
            (_any(rng, 7, 15, 31),),
            hint="Nearly as many slopes are added as there were.",
        ),
        Case(
            "another number of heads",
            (_any(rng, 10, 12, 20, 24, 40),),
            hint="Every second slope of the next power of two, from its first on.",
        ),
    ]


def _bias_cases(rng: Rng) -> list[Case]:
    n = _any(rng, 5, 6, 7)
    return [
        Case(
            "one head and two tokens",
            (1, 2, 2),
            hint="Neighbours are at distance 1, a token is at distance 0 from itself.",
        ),
        Case("a square", (4, n, n), hint="0 on the diagonal, falling away from it on both sides."),
        Case("eight heads", (8, 3, 3), hint="Each head has a slope of its own."),
        Case(
            "more keys than queries",
            (2, 3, _any(rng, 5, 6, 8)),
            hint="The last query stands at the last key, as in the causal mask.",
        ),
        Case(
            "one query of decoding",
            (4, 1, _any(rng, 6, 7, 9)),
            hint="The one query stands at the last key: distance 0 there, n_k - 1 at the first.",
        ),
        Case(
            "more queries than keys",
            (2, _any(rng, 5, 6, 7), 3),
            hint="The first queries stand before the first key.",
        ),
        Case(
            "six heads",
            (6, 3, 4),
            hint="Not a power of two: the slopes are those of the last exercise.",
        ),
        Case("one token", (_any(rng, 2, 4, 8), 1, 1), hint="Distance 0: no bias."),
        Case(
            "a longer sequence",
            (2, 20, 20 + _any(rng, 1, 2, 3)),
            hint="The bias falls linearly, without end.",
        ),
    ]


# --- oracles: the same values by another road ------------------------------------------------


def _sinusoids_one_by_one(n: int, d: int) -> Array:
    """The formula entry by entry, the frequency as an exponential of a logarithm."""
    found = np.zeros((n, d))
    for p, j in np.ndindex(n, d):
        angle = p * math.exp(-math.log(10000.0) * 2 * (j // 2) / d)
        found[p, j] = math.cos(angle) if j % 2 else math.sin(angle)
    return found


def _one_hot_product(dout: Array, positions: Array, n: int) -> Array:
    """The lookup as a matrix product: e = S E with one-hot rows S, so dE = Sᵀ de."""
    dout = np.asarray(dout, float)
    picked = np.broadcast_to(positions, dout.shape[:-1]).reshape(-1)
    selection = np.equal(picked[:, None], np.arange(n)).astype(float)
    return selection.T @ dout.reshape(-1, dout.shape[-1])


def _turned_as_complex(x: Array, positions: Array, base: float = 10000.0) -> Array:
    """Pairs as complex numbers, times e^(i p θ)."""
    x = np.asarray(x, float)
    d = x.shape[-1]
    theta = np.exp(-np.log(float(base)) * np.arange(d // 2) * (2 / d))
    turn = np.exp(1j * np.multiply.outer(np.asarray(positions, float), theta))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def _turned_by_the_jacobian(dy: Array, positions: Array, base: float = 10000.0) -> Array:
    """The forward pass is linear: column i of its Jacobian is what it makes of a unit vector."""
    dy = np.asarray(dy, float)
    dx = np.empty(dy.shape)
    for i, unit in enumerate(np.eye(dy.shape[-1])):
        column = _turned_as_complex(np.broadcast_to(unit, dy.shape), positions, base)
        dx[..., i] = np.einsum("...j,...j->...", dy, column)
    return dx


def _sorted_columns(d: int) -> Array:
    """Columns by their place in the pair, then by the pair's number."""
    return np.array(sorted(range(d), key=lambda j: (j % 2, j // 2)))


def _slopes_by_recursion(n_heads: int) -> Array:
    """The definition: a geometric sequence, or two of them."""
    power = 2 ** int(math.log2(n_heads))
    ratio = 2.0 ** (-8 / power)
    slopes = np.cumprod(np.full(power, ratio))
    if power == n_heads:
        return slopes
    return np.append(slopes, _slopes_by_recursion(2 * power)[::2][: n_heads - power])


def _bias_one_by_one(n_heads: int, n_q: int, n_k: int) -> Array:
    slopes = _slopes_by_recursion(n_heads)
    found = np.zeros((n_heads, n_q, n_k))
    for h, i, j in np.ndindex(found.shape):
        stands_at = n_k - n_q + i
        found[h, i, j] = -slopes[h] * abs(stands_at - j)
    return found


# --- mistakes: sinusoidal_positions ------------------------------------------------------------


def _sines(angles: Array, d: int) -> Array:
    """The table of these angles, one for each of the d columns."""
    return np.where(np.arange(d) % 2, np.cos(angles), np.sin(angles))


def _with_exponents(exponents: Callable[[Array, int], Any], sign: float = -1.0) -> Any:
    """The table whose column j has frequency base^-exponents(j, d)."""

    def answer(n: int, d: int) -> Array:
        columns = np.arange(d)
        frequencies = 10000.0 ** (sign * np.asarray(exponents(columns, d), float))
        return _sines(np.arange(n)[:, None] * frequencies, d)

    return answer


def _sin_in_halves(n, d):
    table = library.sinusoidal_positions(n, d)
    return np.concatenate([table[:, 0::2], table[:, 1::2]], axis=1)


def _sin_halves_padded(n, d):
    half = d // 2
    angles = np.arange(n)[:, None] * 10000.0 ** (-2 * np.arange(half) / d)
    found = np.zeros((n, d))
    found[:, :half], found[:, half : 2 * half] = np.sin(angles), np.cos(angles)
    return found


def _sin_end_angles(n, d):
    half = d // 2
    steps = np.arange((d + 1) // 2) / max(half - 1, 1)
    return np.arange(n)[:, None] * 10000.0**-steps


def _sin_to_the_end(n, d):
    return _sines(np.repeat(_sin_end_angles(n, d), 2, axis=1)[:, :d], d)


def _sin_to_the_end_in_halves(n, d):
    angles = _sin_end_angles(n, d)[:, : d // 2]
    odd = np.zeros((n, d % 2))
    return np.concatenate([np.sin(angles), np.cos(angles), odd], axis=1)


def _sin_cosines_first(n, d):
    angles = np.arange(n)[:, None] * 10000.0 ** (-2 * (np.arange(d) // 2) / d)
    return np.where(np.arange(d) % 2, np.sin(angles), np.cos(angles))


def _sin_from_one(n, d):
    return library.sinusoidal_positions(n + 1, d)[1:]


def _sin_only(n, d):
    return np.sin(np.arange(n)[:, None] * 10000.0 ** (-2 * (np.arange(d) // 2) / d))


def _sin_only_own_frequencies(n, d):
    return np.sin(np.arange(n)[:, None] * 10000.0 ** (-np.arange(d) / d))


def _sin_cut_from_even(n, d):
    return library.sinusoidal_positions(n, d + d % 2)[:, :d]


def _sin_zero_for_odd(n, d):
    even = d - d % 2
    found = np.zeros((n, d))
    if even:
        found[:, :even] = library.sinusoidal_positions(n, even)
    return found


def _sin_zero_last(n, d):
    found = library.sinusoidal_positions(n, d)
    if d % 2:
        found[:, -1] = 0
    return found


def _sin_too_many_cosines(n, d):
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    found = np.zeros((n, d))
    found[:, 0::2] = np.sin(angles)
    found[:, 1::2] = np.cos(angles)
    return found


SINUSOIDAL_EXERCISE = Exercise(
    id="sinusoidal_positions",
    chapter=CHAPTER,
    title="Sinusoidal positions",
    points=2,
    returns=("table",),
    reference=library.sinusoidal_positions,
    oracle=_sinusoids_one_by_one,
    cases=_sinusoidal_cases,
    tokens=("table",),
    mistakes=(
        *named(
            "exponent 2i/d with i already doubled",
            "In the formula i counts pairs: columns 2i and 2i+1 share the exponent 2i/d. With the "
            "column's number j = 2i it is j/d, not 2j/d.",
            SINUSOIDAL,
            _with_exponents(lambda j, d: 4 * (j // 2) / d),
            _with_exponents(lambda j, d: 2 * j / d),
        ),
        *named(
            "cos shifted",
            "The cosine in column 2i+1 has the frequency of the sine to its left, 2i/d; with "
            "(2i+1)/d the two are no pair, and a shift of position is no rotation of it.",
            SINUSOIDAL,
            _with_exponents(lambda j, d: j / d),
            _with_exponents(lambda j, d: 2 * ((j + 1) // 2) / d),
        ),
        *named(
            "interleaved vs halves",
            "Here, as in the paper, sines and cosines take turns: even columns are sines, odd "
            "ones cosines. All sines first, then all cosines, is the same table with its columns "
            "permuted, which only matters when it meets weights trained with the other one.",
            SINUSOIDAL,
            _sin_in_halves,
            _sin_halves_padded,
        ),
        *named(
            "frequencies down to 1/10000",
            "Dividing by d/2 - 1 makes the last frequency exactly 1/10000, as some older code has "
            "it; the paper's exponent 2i/d ends just before.",
            SINUSOIDAL,
            _sin_to_the_end,
            _sin_to_the_end_in_halves,
        ),
        *named(
            "exponent not doubled",
            "Pair i has the exponent 2i/d; with i/d the frequencies fall only to 1/100.",
            SINUSOIDAL,
            _with_exponents(lambda j, d: (j // 2) / d),
        ),
        *named(
            "frequencies upside down",
            "The position is divided by 10000^(2i/d), not multiplied: later pairs turn more "
            "slowly.",
            SINUSOIDAL,
            _with_exponents(lambda j, d: 2 * (j // 2) / d, sign=1.0),
            _with_exponents(lambda j, d: j / d, sign=1.0),
        ),
        *named(
            "sine and cosine swapped",
            "Column 0 is a sine: position 0 reads 0, 1, 0, 1 and so on.",
            SINUSOIDAL,
            _sin_cosines_first,
        ),
        *named(
            "positions counted from 1",
            "The first row is position 0.",
            SINUSOIDAL,
            _sin_from_one,
        ),
        *named(
            "sines only",
            "Without its cosine a sine does not determine the angle, and no rotation leads from "
            "one position to the next: odd columns are cosines.",
            SINUSOIDAL,
            _sin_only,
            _sin_only_own_frequencies,
        ),
        *named(
            "odd width rounded to an even one",
            "With an odd d the exponent is still 2i/d, and the last column is a sine: it is "
            "neither the table of d + 1 cut off nor that of d - 1 with a column of zeros.",
            SINUSOIDAL,
            _sin_cut_from_even,
            _sin_zero_for_odd,
            _sin_zero_last,
        ),
        *named(
            "one cosine too many at an odd width",
            "An odd d has (d+1)/2 sines and (d-1)/2 cosines: the cosines of the last frequency "
            "have no column, so the angles have to be cut to d // 2 for them.",
            SINUSOIDAL,
            _sin_too_many_cosines,
        ),
    ),
)


# --- mistakes: learned_positions_backward ------------------------------------------------------


def _picked(dout, positions):
    return np.broadcast_to(positions, dout.shape[:-1])


def _batch_summed(dout, positions):
    """dout with the leading axes that positions lacks summed away."""
    return dout.sum(axis=tuple(range(dout.ndim - 1 - positions.ndim)))


def _learned_assigned(dout, positions, n):
    dtable = np.zeros((n, dout.shape[-1]))
    dtable[_picked(dout, positions)] = dout
    return dtable


def _learned_summed_then_assigned(dout, positions, n):
    dtable = np.zeros((n, dout.shape[-1]))
    dtable[positions] = _batch_summed(dout, positions)
    return dtable


def _learned_indexed(dout, positions, n):
    dtable = np.zeros((n, dout.shape[-1]))
    dtable[positions] += dout
    return dtable


def _learned_mean(dout, positions, n):
    counts = np.bincount(_picked(dout, positions).ravel(), minlength=n)
    total = library.learned_positions_backward(dout, positions, n)
    return total / np.maximum(counts, 1)[:, None]


def _learned_mean_of_repeats(dout, positions, n):
    counts = np.bincount(positions.ravel(), minlength=n)
    total = library.learned_positions_backward(dout, positions, n)
    return total / np.maximum(counts, 1)[:, None]


def _learned_batch_mean(dout, positions, n):
    axes = tuple(range(dout.ndim - 1 - positions.ndim))
    return library.learned_positions_backward(dout.mean(axis=axes), positions, n)


def _learned_over_batch_size(dout, positions, n):
    batch = dout.shape[0] if dout.ndim > 2 else 1
    return library.learned_positions_backward(dout, positions, n) / batch


def _learned_over_batch_and_length(dout, positions, n):
    rows = math.prod(dout.shape[:-1])
    return library.learned_positions_backward(dout, positions, n) / rows


def _learned_one_sequence(which):
    def answer(dout, positions, n):
        while dout.ndim - 1 > positions.ndim:
            dout = dout[which]
        return library.learned_positions_backward(dout, positions, n)

    return answer


def _learned_as_long_as_needed(dout, positions, n):
    return library.learned_positions_backward(dout, positions, int(positions.max()) + 1)


def _learned_as_long_as_the_sequence(dout, positions, n):
    return _batch_summed(dout, positions)


def _learned_rows_in_order(dout, positions, n):
    total = dout.sum(axis=tuple(range(dout.ndim - 2)))
    dtable = np.zeros((n, dout.shape[-1]))
    dtable[: len(total)] += total
    return dtable


def _learned_batch_kept(dout, positions, n):
    lead = dout.shape[: dout.ndim - 1 - positions.ndim]
    found = [library.learned_positions_backward(dout[b], positions, n) for b in np.ndindex(lead)]
    return np.reshape(found, (*lead, n, dout.shape[-1]))


def _learned_used_rows_once(dout, positions, n):
    """One row for every distinct position."""
    total = library.learned_positions_backward(dout, positions, n)
    return total[np.unique(positions)]


LEARNED_EXERCISE = Exercise(
    id="learned_positions_backward",
    chapter=CHAPTER,
    title="Gradient of a table of learned positions",
    points=2,
    returns=("dtable",),
    reference=library.learned_positions_backward,
    oracle=_one_hot_product,
    cases=_learned_cases,
    mistakes=(
        *named(
            "assignment instead of accumulation",
            "A row that was used several times collects all their gradients. "
            "`dtable[positions] = dout` keeps the last one, and so does "
            "`dtable[positions] += dout`: NumPy reads, adds and writes once for each row. "
            "np.add.at adds every time.",
            LEARNED,
            _learned_assigned,
            _learned_summed_then_assigned,
            _learned_indexed,
        ),
        *named(
            "mean instead of sum",
            "The loss depends on a row through each of its uses, and these effects add up; "
            "nothing divides by their number.",
            LEARNED,
            _learned_mean,
            _learned_mean_of_repeats,
        ),
        *named(
            "averaged over the batch",
            "What averages over the batch is the loss, and its 1/B is in dout already: the "
            "gradient of a shared parameter is a sum over the batch.",
            LEARNED,
            _learned_batch_mean,
            _learned_over_batch_size,
            _learned_over_batch_and_length,
        ),
        *named(
            "one sequence of the batch",
            "With positions (N,) and dout (B, N, C) row p was used B times, once in every "
            "sequence: sum over all leading axes.",
            LEARNED,
            _learned_one_sequence(0),
            _learned_one_sequence(-1),
        ),
        *named(
            "batch axis kept",
            "The table has no batch axis, so neither has its gradient: all sequences used the "
            "same n rows.",
            SHAPES,
            _learned_batch_kept,
        ),
        *named(
            "not the shape of the table",
            "The gradient has the table's n rows; those of positions that did not occur are 0.",
            SHAPES,
            _learned_as_long_as_needed,
            _learned_as_long_as_the_sequence,
            _learned_used_rows_once,
        ),
        *named(
            "positions ignored",
            "Token t used row positions[t], not row t.",
            LEARNED,
            _learned_rows_in_order,
        ),
    ),
)


# --- mistakes: rope and rope_backward ----------------------------------------------------------


def _theta(d, base):
    return float(base) ** (-np.arange(0, d, 2) / d)


def _by_angles(angles_of: Callable[..., Array], direction: float = 1.0) -> Callable[..., Array]:
    """A rotation of interleaved pairs by ``direction`` times ``angles_of(x, positions, base)``."""

    def answer(x, positions, base=10000.0):
        angles = direction * angles_of(x, np.asarray(positions), base)
        cos, sin = np.cos(angles), np.sin(angles)
        return _woven(*_turn(x[..., 0::2], x[..., 1::2], cos, sin))

    return answer


def _turn(a, b, cos, sin):
    return a * cos - b * sin, a * sin + b * cos


def _woven(first, second):
    return np.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


def _halves(x):
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _crossed(x):
    """(-x₁, x₀, -x₃, x₂ …)"""
    return _woven(-x[..., 1::2], x[..., 0::2])


def _crossed_halves(x):
    first, second = _halves(x)
    return np.concatenate([-second, first], axis=-1)


def _angles(x, positions, base):
    return np.asarray(positions)[..., None] * _theta(x.shape[-1], base)


def _from_exponents(exponents: Callable[[Array, int], Any]) -> Callable[..., Array]:
    """Angles p · base^-exponents(i, d) of pairs i."""

    def angles(x, positions, base):
        d = x.shape[-1]
        return positions[..., None] * float(base) ** -np.asarray(exponents(np.arange(d // 2), d))

    return angles


EXPONENTS = (
    _from_exponents(lambda i, d: i / d),
    _from_exponents(lambda i, d: 4 * i / d),
    _from_exponents(lambda i, d: 2 * (i + 1) / d),
    _from_exponents(lambda i, d: (i + 1) / d),
    _from_exponents(lambda i, d: i / max(d // 2 - 1, 1)),
    _from_exponents(lambda i, d: 2 * i),
)
UPSIDE_DOWN = _from_exponents(lambda i, d: -2 * i / d)
ONE_FREQUENCY = _from_exponents(lambda i, d: 0.0 * i)


def _default_base(x, positions, base):
    return _angles(x, positions, 10000.0)


def _row_numbers(x, positions, base):
    return _angles(x, np.arange(x.shape[-2]), base)


def _from_one(x, positions, base):
    return _angles(x, positions + 1, base)


def _narrow(of: Callable[..., Array], always: bool) -> Callable[..., Array]:
    """Angles in float32: always, as torch's default has it, or where the rows are float32."""

    def angles(x, positions, base):
        if not always and x.dtype != np.float32:
            return _angles(x, positions, base)
        places = positions.astype(np.float32)[..., None]
        return of(places, np.arange(0, x.shape[-1], 2), x.shape[-1], base).astype(np.float32)

    return angles


def _narrow_at_last(p, columns, d, base):
    return p * float(base) ** (-columns / d)


def _narrow_theta(p, columns, d, base):
    return p * (float(base) ** (-columns / d)).astype(np.float32)


def _narrow_power(p, columns, d, base):
    return p * np.float32(base) ** -(columns.astype(np.float32) / np.float32(d))


def _narrow_inverse(p, columns, d, base):
    return p * (np.float32(1) / np.float32(base) ** (columns.astype(np.float32) / np.float32(d)))


def _narrow_divided(p, columns, d, base):
    return p / np.float32(base) ** (columns.astype(np.float32) / np.float32(d))


NARROW = tuple(
    _narrow(of, always)
    for always in (False, True)
    for of in (_narrow_at_last, _narrow_theta, _narrow_power, _narrow_inverse, _narrow_divided)
)


def _one_axis(x, positions, base):
    return positions[:, None] * _theta(x.shape[-1], base)


def _outer(x, positions, base):
    return np.outer(positions, _theta(x.shape[-1], base))


def _in_halves(direction):
    def answer(x, positions, base=10000.0):
        angles = direction * _angles(x, positions, base)
        first, second = _halves(x)
        return np.concatenate(_turn(first, second, np.cos(angles), np.sin(angles)), axis=-1)

    return answer


def _out_in_halves(direction):
    """Pairs (2i, 2i+1) read, halves written."""

    def answer(x, positions, base=10000.0):
        angles = direction * _angles(x, positions, base)
        a, b = x[..., 0::2], x[..., 1::2]
        return np.concatenate(_turn(a, b, np.cos(angles), np.sin(angles)), axis=-1)

    return answer


def _in_from_halves(direction):
    """Halves read, pairs (2i, 2i+1) written."""

    def answer(x, positions, base=10000.0):
        angles = direction * _angles(x, positions, base)
        first, second = _halves(x)
        return _woven(*_turn(first, second, np.cos(angles), np.sin(angles)))

    return answer


def _layouts_mixed(repeat, cross, direction):
    """Cosines and sines laid out in one way, columns crossed in the other."""

    def answer(x, positions, base=10000.0):
        angles = repeat(direction * _angles(x, positions, base))
        return x * np.cos(angles) + cross(x) * np.sin(angles)

    return answer


def _twice_by_halves(angles):
    return np.concatenate([angles, angles], axis=-1)


def _twice_by_pairs(angles):
    return np.repeat(angles, 2, axis=-1)


def _own_angles(direction):
    """Every column its own frequency, base^(-j/d)."""

    def answer(x, positions, base=10000.0):
        d = x.shape[-1]
        angles = np.asarray(positions)[..., None] * float(base) ** (-np.arange(d) / d)
        return x * np.cos(angles) + direction * _crossed(x) * np.sin(angles)

    return answer


def _signs(first, second):
    """Both sines with these signs: (a cos + first · b sin, second · a sin + b cos)."""

    def answer(x, positions, base=10000.0):
        angles = _angles(x, positions, base)
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = x[..., 0::2], x[..., 1::2]
        return _woven(a * cos + first * b * sin, second * a * sin + b * cos)

    return answer


def _cos_and_sin_swapped(x, positions, base=10000.0):
    angles = _angles(x, positions, base)
    return _woven(*_turn(x[..., 0::2], x[..., 1::2], np.sin(angles), np.cos(angles)))


def _no_cross(x, positions, base=10000.0):
    angles = _angles(x, positions, base)
    return _woven(x[..., 0::2] * np.cos(angles), x[..., 1::2] * np.sin(angles))


def _only_cosines(x, positions, base=10000.0):
    return x * np.cos(_twice_by_pairs(_angles(x, positions, base)))


def _uncrossed(x, positions, base=10000.0):
    angles = _twice_by_pairs(_angles(x, positions, base))
    return x * np.cos(angles) + x * np.sin(angles)


def _overwritten(direction):
    """The second column made of the first one already turned."""

    def answer(x, positions, base=10000.0):
        angles = direction * _angles(x, positions, base)
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = x[..., 0::2], x[..., 1::2]
        turned = a * cos - b * sin
        return _woven(turned, turned * sin + b * cos)

    return answer


def _added(x, positions, base=10000.0):
    angles = _angles(x, positions, base)
    return x + _woven(np.sin(angles), np.cos(angles))


def _layout_mistakes(direction: float) -> tuple[Mistake, ...]:
    return (
        *named(
            "halves instead of pairs",
            "A pair here is columns (2i, 2i+1), as in the paper; columns (i, i + d/2) are the "
            "other common layout. Both are rotations, and both make logits depend on differences "
            "of positions only, but weights trained with one give other logits with the other.",
            HALF,
            _in_halves(direction),
        ),
        *named(
            "pairs and halves mixed",
            "Columns are paired in one layout and put back, or multiplied with cosines, in the "
            "other: that is no rotation of pairs, and logits no longer depend on differences of "
            "positions alone.",
            HALF,
            _out_in_halves(direction),
            _in_from_halves(direction),
            _layouts_mixed(_twice_by_halves, _crossed, direction),
            _layouts_mixed(_twice_by_pairs, _crossed_halves, direction),
        ),
        *named(
            "base exponent",
            "Pair i = 0 … d/2 - 1 turns by p / base^(2i/d): 1 for the first pair, nearly 1/base "
            "for the last. `np.arange(0, d, 2) / d` is 2i/d already.",
            ROPE,
            *(_by_angles(angles, direction) for angles in EXPONENTS),
        ),
        *named(
            "frequencies upside down",
            "The position is divided by base^(2i/d), not multiplied: later pairs turn more slowly.",
            ROPE,
            _by_angles(UPSIDE_DOWN, direction),
        ),
        *named(
            "one frequency for all pairs",
            "With the same angle for every pair positions repeat every 2π tokens: each pair has a "
            "frequency of its own.",
            ROPE,
            _by_angles(ONE_FREQUENCY, direction),
        ),
        *named(
            "every column an angle of its own",
            "The two columns of a pair turn by the same angle; with base^(-j/d) for column j they "
            "do not, and lengths are not kept.",
            ROPE,
            _own_angles(direction),
        ),
        *named(
            "base ignored",
            "The frequencies are base^(-2i/d) with the base that was given, not always 10000.",
            ROPE,
            _by_angles(_default_base, direction),
        ),
        *named(
            "angles in float32",
            "A float32 holds 7 digits: an angle near 100000 is off by up to 0.01 in it. The "
            "angles are computed in float64, and only their cosines and sines rounded to the "
            "dtype of the rows.",
            PRECISION,
            *(_by_angles(angles, direction) for angles in NARROW),
        ),
        *named(
            "positions of one axis only",
            "positions may have shape (B, 1, N), one row for each sequence: `positions[..., None]` "
            "adds the axis of the pairs behind whatever is there, `positions[:, None]` and "
            "np.outer do not.",
            SHAPES,
            _by_angles(_one_axis, direction),
            _by_angles(_outer, direction),
        ),
    )


POSITIONS_IGNORED = named(
    "positions ignored",
    "The rows stand at the positions given, which need not be 0, 1, 2 …: in decoding with cached "
    "keys the only row may be number 1000.",
    ROPE,
    _by_angles(_row_numbers),
)
COUNTED_FROM_ONE = named(
    "positions counted from 1",
    "A row at position p turns by p times its frequencies, and one at position 0 not at all. "
    "Logits do not show it, as both of their positions are shifted; keys cached by other code do.",
    ROPE,
    _by_angles(_from_one),
)
SECOND_FROM_TURNED = named(
    "second column from the first one already turned",
    "Both new columns are made of the two old ones: where the first is overwritten before the "
    "second is computed, the second is made of the wrong number.",
    ROPE,
    _overwritten(1.0),
)
NO_ROTATION = named(
    "no rotation",
    "(a cos - b sin, a sin + b cos) has one minus, before b sin; with other signs, or without "
    "the crossed terms, lengths are not kept.",
    ROPE,
    _signs(1, 1),
    _signs(-1, -1),
    _no_cross,
    _only_cosines,
    _uncrossed,
)
COS_AND_SIN_SWAPPED = named(
    "cosine and sine swapped",
    "At position 0 nothing turns: cos 0 = 1 goes with the column itself, sin 0 = 0 with its "
    "partner.",
    ROPE,
    _cos_and_sin_swapped,
)

ROPE_EXERCISE = Exercise(
    id="rope",
    chapter=CHAPTER,
    title="Rotary positions",
    points=3,
    returns=("y",),
    reference=library.rope,
    oracle=_turned_as_complex,
    cases=_rotary_cases,
    tokens=("y",),
    mistakes=(
        *_layout_mistakes(1.0),
        *named(
            "turned the other way",
            "The pair at position p turns by +p times its frequency: (a cos - b sin, "
            "a sin + b cos). The other way logits depend on differences of positions too, but "
            "with the opposite sign.",
            ROPE,
            _signs(1, -1),
        ),
        *POSITIONS_IGNORED,
        *COUNTED_FROM_ONE,
        *SECOND_FROM_TURNED,
        *NO_ROTATION,
        *COS_AND_SIN_SWAPPED,
        *named(
            "added instead of turned",
            "Rotary positions multiply: they turn queries and keys. Sines and cosines are added "
            "to the tokens in the sinusoidal way.",
            ROPE,
            _added,
        ),
    ),
)


def _same_rotation(x, positions, base=10000.0):
    return _signs(-1, 1)(x, positions, base)


def _unturned(dy, positions, base=10000.0):
    return np.array(dy)


def _negated(dy, positions, base=10000.0):
    return -_same_rotation(dy, positions, base)


def _negated_back(dy, positions, base=10000.0):
    return -_signs(1, -1)(dy, positions, base)


def _differentiated(dy, positions, base=10000.0):
    """cos read as having become -sin, and sin cos: a derivative by the angle, transposed."""
    angles = _angles(dy, positions, base)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = dy[..., 0::2], dy[..., 1::2]
    return _woven(-a * sin + b * cos, -a * cos - b * sin)


def _differentiated_forward(dy, positions, base=10000.0):
    angles = _angles(dy, positions, base)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = dy[..., 0::2], dy[..., 1::2]
    return _woven(-a * sin - b * cos, a * cos - b * sin)


def _back_by_rope(mistake: Mistake) -> Callable[..., Array]:
    """The backward pass as a mistaken rope at -positions."""

    def answer(dy, positions, base=10000.0):
        return mistake.answer(dy, -np.asarray(positions), base)

    return answer


ROPE_BACKWARD_EXERCISE = Exercise(
    id="rope_backward",
    chapter=CHAPTER,
    title="Gradient through rotary positions",
    points=2,
    returns=("dx",),
    reference=library.rope_backward,
    oracle=_turned_by_the_jacobian,
    cases=_rotary_cases,
    tokens=("dx",),
    mistakes=(
        *named(
            "same rotation in backward",
            "y = R x gives dx = Rᵀ dy, and a rotation's transpose turns back: by -p times the "
            "frequencies.",
            ROPE_BACKWARD,
            _same_rotation,
        ),
        *named(
            "only one sine's sign turned",
            "In the transpose both sines change sign: dx = (da cos + db sin, -da sin + db cos).",
            ROPE_BACKWARD,
            _signs(1, 1),
            _signs(-1, -1),
        ),
        *named(
            "passed through unturned",
            "An added position lets the gradient through as it is; a rotation turns it back on "
            "its way.",
            ROPE_BACKWARD,
            _unturned,
        ),
        *named(
            "negated instead of turned back",
            "To turn back is to negate the angle, not the result.",
            ROPE_BACKWARD,
            _negated,
            _negated_back,
        ),
        *named(
            "cosine and sine differentiated",
            "The angles do not depend on x: cos and sin are constants here, and their transposed "
            "matrix is the derivative.",
            ROPE_BACKWARD,
            _differentiated,
            _differentiated_forward,
        ),
        *named(
            "second column from the first one already turned",
            "Both columns of dx are made of the two columns of dy: where the first is overwritten "
            "before the second is computed, the second is made of the wrong number.",
            ROPE_BACKWARD,
            _overwritten(-1.0),
        ),
        *_layout_mistakes(-1.0),
        *named(
            "positions ignored",
            "The rows stand at the positions given, which need not be their numbers.",
            ROPE_BACKWARD,
            _by_angles(_row_numbers, -1.0),
        ),
        *named(
            "positions counted from 1",
            "A row at position 0 was not turned, so its gradient is not turned back either.",
            ROPE_BACKWARD,
            _by_angles(_from_one, -1.0),
        ),
        # A rope with these, called at -positions, is told from the same mistake made here.
        *(
            carried(mistake, "rope", _back_by_rope(mistake))
            for mistake in (*POSITIONS_IGNORED, *COUNTED_FROM_ONE, *NO_ROTATION[2:])
        ),
    ),
)


# --- mistakes: rope_permutation ------------------------------------------------------------------


def _perm_inverse(d):
    return np.arange(d).reshape(2, -1).T.reshape(-1)


def _perm_odd_first(d):
    return np.concatenate([np.arange(1, d, 2), np.arange(0, d, 2)])


def _perm_none(d):
    return np.arange(d)


def _perm_halves_swapped(d):
    return np.roll(np.arange(d), d // 2)


def _perm_pairs_swapped(d):
    return np.arange(d).reshape(-1, 2)[:, ::-1].reshape(-1)


def _perm_odd_reversed(d):
    return np.concatenate([np.arange(0, d, 2), np.arange(1, d, 2)[::-1]])


def _perm_reversed(d):
    return np.arange(d)[::-1]


def _perm_matrix(d):
    return np.eye(d)[library.rope_permutation(d)]


def _perm_matrix_transposed(d):
    return np.eye(d)[:, library.rope_permutation(d)]


def _perm_two_rows(d):
    return library.rope_permutation(d).reshape(2, -1)


PERMUTATION_EXERCISE = Exercise(
    id="rope_permutation",
    chapter=CHAPTER,
    title="From one rotary layout to the other",
    points=1,
    returns=("order",),
    reference=library.rope_permutation,
    oracle=_sorted_columns,
    cases=_permutation_cases,
    mistakes=(
        *named(
            "inverse permutation",
            "order[j] is the interleaved column that goes to place j of the half-split layout: "
            "0, 2, 4 … come first. 0, d/2, 1 … leads the other way; up to d = 4 they are the same.",
            HALF,
            _perm_inverse,
        ),
        *named(
            "odd columns first",
            "The first half holds the first columns of the pairs: 0, 2, 4 and so on.",
            HALF,
            _perm_odd_first,
        ),
        *named(
            "nothing moved",
            "The layouts pair different columns: only at d = 2 is there nothing to move.",
            HALF,
            _perm_none,
        ),
        *named(
            "blocks swapped",
            "Pairs are taken apart, not swapped: all first columns go to the first half, all "
            "second ones to the second.",
            HALF,
            _perm_halves_swapped,
            _perm_pairs_swapped,
        ),
        *named(
            "order reversed",
            "Both halves keep the order of the pairs, so that pair i keeps its frequency.",
            HALF,
            _perm_odd_reversed,
            _perm_reversed,
        ),
        *named(
            "a matrix instead of indices",
            "Asked for are d indices, which `w[:, order]` takes; a matrix that permutes does it "
            "in d² multiplications.",
            SHAPES,
            _perm_matrix,
            _perm_matrix_transposed,
        ),
        *named(
            "two rows instead of one",
            "The two halves stand behind each other in one array of length d.",
            SHAPES,
            _perm_two_rows,
        ),
    ),
)


# --- mistakes: alibi_slopes and alibi_bias -------------------------------------------------------


def _power_below(n_heads):
    return 2 ** int(math.log2(n_heads))


def _slopes_plain(n_heads):
    return 2.0 ** (-8 * np.arange(1, n_heads + 1) / n_heads)


def _extended(power_slopes: Callable[[int], Array], every: slice = slice(0, None, 2)) -> Any:
    """Slopes of a power of two, and what is missing from those of the next one."""

    def answer(n_heads):
        power = _power_below(n_heads)
        if power == n_heads:
            return power_slopes(n_heads)
        extra = power_slopes(2 * power)[every][: n_heads - power]
        return np.concatenate([power_slopes(power), extra])

    return answer


def _slopes_from_one(n):
    return 2.0 ** (-8 * np.arange(n) / n)


def _slopes_of_eight(n):
    return 2.0 ** -np.arange(1.0, n + 1)


def _slopes_exponential(n):
    return np.exp(-8 * np.arange(1, n + 1) / n)


def _slopes_reversed(n_heads):
    return library.alibi_slopes(n_heads)[::-1]


def _slopes_sorted(n_heads):
    return np.sort(library.alibi_slopes(n_heads))[::-1]


def _slopes_of_next_power(n_heads):
    return _slopes_plain(2 ** math.ceil(math.log2(n_heads)))[:n_heads]


def _slopes_negative(n_heads):
    return -library.alibi_slopes(n_heads)


def _slopes_linear(n_heads):
    return np.arange(1, n_heads + 1) / n_heads


STARTS_AT_ONE = named(
    "starts at 1",
    "The heads are h = 1 … H: the first slope is the ratio itself, 2^(-8/H), and the last 2^-8. "
    "Counted from 0 the first head would have slope 1.",
    ALIBI,
    _extended(_slopes_from_one),
    _slopes_from_one,
)
EIGHT_ALWAYS = named(
    "ratio of eight heads for every number",
    "1/2, 1/4, 1/8 … are the slopes of 8 heads; with H heads the ratio is 2^(-8/H), and the last "
    "slope always 2^-8.",
    ALIBI,
    _slopes_of_eight,
    _extended(_slopes_of_eight),
)
ONE_FORMULA = named(
    "the power of two's formula for every number",
    "Where H is no power of two, the slopes are those of the power of two below it, and then every "
    "second one of the power above: that is how the paper's code does it and how published "
    "weights were trained.",
    ALIBI,
    _slopes_plain,
)
NEXT_POWER = named(
    "the next power of two cut off",
    "The first K slopes are those of the power of two below H; only the rest comes from the one "
    "above, and of that every second.",
    ALIBI,
    _slopes_of_next_power,
)
WRONG_HALF = named(
    "slopes that are there already",
    "Every second slope of 2K heads is one of the K heads'; those between them, from the first "
    "on, are added.",
    ALIBI,
    _extended(_slopes_plain, slice(1, None, 2)),
    _extended(_slopes_plain, slice(None)),
)
WITH_E = named(
    "powers of e",
    "The slopes are powers of two.",
    ALIBI,
    _extended(_slopes_exponential),
    _slopes_exponential,
)
IN_REVERSE = named(
    "order reversed",
    "The steepest head comes first.",
    ALIBI,
    _slopes_reversed,
)
SORTED = named(
    "sorted",
    "The added slopes stand behind the others, not between them: head h of trained weights "
    "expects its own.",
    ALIBI,
    _slopes_sorted,
)

SLOPES_EXERCISE = Exercise(
    id="alibi_slopes",
    chapter=CHAPTER,
    title="ALiBi's slopes",
    points=2,
    returns=("slopes",),
    reference=library.alibi_slopes,
    oracle=_slopes_by_recursion,
    cases=_slopes_cases,
    mistakes=(
        *STARTS_AT_ONE,
        *EIGHT_ALWAYS,
        *ONE_FORMULA,
        *NEXT_POWER,
        *WRONG_HALF,
        *WITH_E,
        *IN_REVERSE,
        *SORTED,
        *named(
            "sign",
            "A slope is a positive number; the minus stands in the bias.",
            ALIBI,
            _slopes_negative,
        ),
        *named(
            "linear instead of geometric",
            "Each slope is the one before times 2^(-8/H): h stands in the exponent.",
            ALIBI,
            _slopes_linear,
        ),
    ),
)


def _offsets(n_q, n_k):
    """The query's position minus the key's."""
    return np.arange(n_q)[:, None] + (n_k - n_q) - np.arange(n_k)


def _biased(slopes, distances):
    return -slopes[:, None, None] * distances


def _bias_top_left(n_heads, n_q, n_k):
    distances = np.abs(np.arange(n_q)[:, None] - np.arange(n_k))
    return _biased(library.alibi_slopes(n_heads), distances)


def _bias_signed(n_heads, n_q, n_k):
    return _biased(library.alibi_slopes(n_heads), _offsets(n_q, n_k))


def _bias_signed_top_left(n_heads, n_q, n_k):
    offsets = np.arange(n_q)[:, None] - np.arange(n_k)
    return _biased(library.alibi_slopes(n_heads), offsets)


def _bias_clipped(n_heads, n_q, n_k):
    return _biased(library.alibi_slopes(n_heads), np.maximum(_offsets(n_q, n_k), 0))


def _bias_lower(n_heads, n_q, n_k):
    return np.tril(_bias_signed(n_heads, n_q, n_k), n_k - n_q)


def _bias_rising(n_heads, n_q, n_k):
    return -library.alibi_bias(n_heads, n_q, n_k)


def _bias_rising_signed(n_heads, n_q, n_k):
    return -_bias_signed(n_heads, n_q, n_k)


def _bias_of_keys(first):
    """slope · (j - first): rows all alike."""

    def answer(n_heads, n_q, n_k):
        keys = np.arange(n_k) - first(n_k)
        bias = library.alibi_slopes(n_heads)[:, None, None] * keys
        return np.broadcast_to(bias, (n_heads, n_q, n_k)).copy()

    return answer


def _bias_of_keys_one_row(n_heads, n_q, n_k):
    return library.alibi_slopes(n_heads)[:, None, None] * np.arange(n_k)


def _bias_of_last_row(n_heads, n_q, n_k):
    return library.alibi_slopes(n_heads)[:, None, None] * (np.arange(n_k) - (n_k - 1))


def _bias_masked(n_heads, n_q, n_k):
    bias = library.alibi_bias(n_heads, n_q, n_k)
    return np.where(_offsets(n_q, n_k) < 0, -np.inf, bias)


def _bias_masked_finite(value):
    def answer(n_heads, n_q, n_k):
        bias = library.alibi_bias(n_heads, n_q, n_k)
        return np.where(_offsets(n_q, n_k) < 0, value, bias)

    return answer


def _bias_first_slope(n_heads, n_q, n_k):
    slopes = np.full(n_heads, library.alibi_slopes(n_heads)[0])
    return _biased(slopes, np.abs(_offsets(n_q, n_k)))


def _bias_unsloped(n_heads, n_q, n_k):
    return _biased(np.ones(n_heads), np.abs(_offsets(n_q, n_k)))


def _bias_from_one(n_heads, n_q, n_k):
    return _biased(library.alibi_slopes(n_heads), np.abs(_offsets(n_q, n_k)) + 1)


def _bias_divided(n_heads, n_q, n_k):
    return _biased(1 / library.alibi_slopes(n_heads), np.abs(_offsets(n_q, n_k)))


def _bias_with(mistake: Mistake) -> Callable[..., Array]:
    """The bias made of mistaken slopes."""

    def answer(n_heads, n_q, n_k):
        return _biased(np.asarray(mistake.answer(n_heads)), np.abs(_offsets(n_q, n_k)))

    return answer


BIAS_EXERCISE = Exercise(
    id="alibi_bias",
    chapter=CHAPTER,
    title="ALiBi's bias",
    points=2,
    returns=("bias",),
    reference=library.alibi_bias,
    oracle=_bias_one_by_one,
    cases=_bias_cases,
    tokens=("bias",),
    mistakes=(
        *named(
            "top-left aligned",
            "Query i stands at position i + (n_k - n_q), so that the last query meets the last "
            "key; i alone is right only where n_q = n_k.",
            ALIBI,
            _bias_top_left,
        ),
        *named(
            "rises for later keys",
            "The bias is -m times the distance, a number that is not negative: without the "
            "absolute value a key after the query is given a bonus.",
            ALIBI,
            _bias_signed,
            _bias_signed_top_left,
        ),
        *named(
            "later keys not penalised",
            "A key after the query is as far away as one before it; what rules it out, where it "
            "has to be, is the mask.",
            ALIBI,
            _bias_clipped,
            _bias_lower,
        ),
        *named(
            "sign",
            "A key further away gets a lower logit: -m times the distance.",
            ALIBI,
            _bias_rising,
            _bias_rising_signed,
        ),
        *named(
            "the key's position instead of the distance",
            "m·j differs from -m·(i - j) by m·i, the same in the whole row: under a causal mask "
            "softmax does not see it. It is not the distance, though, and no bias for attention "
            "to both sides.",
            ALIBI,
            _bias_of_keys(lambda n_k: 0),
            _bias_of_keys(lambda n_k: n_k - 1),
            _bias_of_keys_one_row,
            _bias_of_last_row,
        ),
        *named(
            "mask built in",
            "The bias is finite everywhere; which keys may be attended to is said by the mask, "
            "and not every attention is causal.",
            ALIBI,
            _bias_masked,
            *(_bias_masked_finite(value) for value in (-1e9, -1e4, float(np.finfo(float).min))),
        ),
        *named(
            "one slope for all heads",
            "Each head has a slope of its own: some look far, some near.",
            ALIBI,
            _bias_first_slope,
            _bias_unsloped,
        ),
        *named(
            "a token at distance 1 from itself",
            "The query's own key is at distance 0.",
            ALIBI,
            _bias_from_one,
        ),
        *named(
            "distance divided by the slope",
            "The bias is the slope times the distance: a small slope looks far.",
            ALIBI,
            _bias_divided,
        ),
        *(
            carried(mistake, "alibi_slopes", _bias_with(mistake))
            for mistake in (
                *STARTS_AT_ONE,
                *EIGHT_ALWAYS,
                *ONE_FORMULA,
                *NEXT_POWER,
                *WRONG_HALF,
                *WITH_E,
                *IN_REVERSE,
                *SORTED,
            )
        ),
    ),
)

EXERCISES = (
    SINUSOIDAL_EXERCISE,
    LEARNED_EXERCISE,
    ROPE_EXERCISE,
    ROPE_BACKWARD_EXERCISE,
    PERMUTATION_EXERCISE,
    SLOPES_EXERCISE,
    BIAS_EXERCISE,
)
