"""Chapter 14: rounding to bf16, the accumulator, the loss scale, unscaling before clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from attn_lessons import precision as library
from attn_lessons.grading.catalogue import ch08_training
from attn_lessons.grading.catalogue._parts import named, quiet, scattered
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.relations import carried

CHAPTER = "ch14_mixed_precision"
FORMATS = f"{CHAPTER}.html#ch14-formats"
ROUNDING = f"{CHAPTER}.html#ch14-rounding"
ACCUMULATE = f"{CHAPTER}.html#ch14-accumulate"
SCALING = f"{CHAPTER}.html#ch14-scaling"
DYNAMIC = f"{CHAPTER}.html#ch14-dynamic"
UNSCALE = f"{CHAPTER}.html#ch14-unscale"
CLIP = f"{CHAPTER}.html#ch14-clip"

Array = np.ndarray
Arrays = Mapping[str, Array]
Answer = Callable[..., Any]
Rng = np.random.Generator

# Rounding is asked for to the last bit.
EXACT = 0.0


def _any(rng: Rng, *choices: int) -> int:
    return int(rng.choice(choices))


# --- round_to_bf16 ------------------------------------------------------------------------------


def _patterns(rng: Rng, heads: Any, tails: Any, shape: tuple[int, ...]) -> Array:
    """float32 numbers with the given upper and lower 16 bits, of either sign."""
    size = math.prod(shape)
    signs = rng.integers(0, 2, size, np.uint32) << 31
    bits = signs | (np.resize(heads, size).astype(np.uint32) << 16)
    return (bits | np.resize(tails, size).astype(np.uint32)).view(np.float32).reshape(shape)


def _bf16_cases(rng: Rng) -> list[Case]:
    def heads(n: int, low: int = 30, high: int = 220) -> Array:
        """Upper 15 bits, the exponents between two bounds."""
        return (rng.integers(low, high, n) << 7) | rng.integers(0, 128, n)

    def tails(n: int) -> Array:
        return rng.integers(1, 1 << 16, n)

    even, odd = heads(4) & ~1, heads(4) | 1
    full = (rng.integers(60, 190, 6) << 7) | 0x7F
    wide = _patterns(rng, heads(12), tails(12), (3, 4)).astype(np.float64)
    tiny = np.float32(2.0**-133)
    small = rng.choice([-1, 1], 8) * np.array([0, 0.3, 0.5, 0.5, 0.51, 1, 1.5, 2.5]) * tiny
    edge = float(np.float32(2.0**128 - 2.0**119))
    inside = float(np.nextafter(np.float32(edge), np.float32(0)))
    sizes = [edge, inside, 3.39e38, 3.4e38, float(np.finfo(np.float32).max), 3e38, 1.5e38]
    large = (rng.choice([-1, 1], 7) * np.array(sizes, np.float32)).astype(np.float64)
    nans = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00001, 0x7FE09234], np.uint32)
    some = _patterns(rng, heads(5), tails(5), (5,))
    infinite = _patterns(rng, heads(4), tails(4), (4,))
    infinite[1:3] = np.inf, -np.inf
    zeros = _patterns(rng, heads(6), tails(6), (2, 3))
    zeros[0, 1], zeros[1, 2] = 0.0, -0.0
    return [
        Case(
            "between 1 and 2",
            (_patterns(rng, (127 << 7) | rng.integers(0, 128, 12), tails(12), (3, 4)),),
            hint="The numbers of bf16 are 1/128 apart here.",
            rtol=EXACT,
        ),
        Case(
            "numbers of any size",
            (_patterns(rng, heads(20), tails(20), (4, 5)),),
            hint="The gap grows with the number: it is 2^(e - 7) from 2^e on.",
            rtol=EXACT,
        ),
        Case(
            "numbers that bf16 has",
            (_patterns(rng, heads(10), 0, (10,)),),
            hint="They stay as they are.",
            rtol=EXACT,
        ),
        Case(
            "ties below an odd number",
            (_patterns(rng, even, 0x8000, (4,)),),
            hint="Midway between two, the even one is taken: here the one nearer to 0.",
            rtol=EXACT,
        ),
        Case(
            "ties above an odd number",
            (_patterns(rng, odd, 0x8000, (4,)),),
            hint="Midway between two, the even one is taken: here the one further from 0.",
            rtol=EXACT,
        ),
        Case(
            "beside a tie",
            (_patterns(rng, heads(8), [0x7FFF, 0x8001], (2, 4)),),
            hint="One float32 below the middle goes down, one above it up.",
            rtol=EXACT,
        ),
        Case(
            "into the next power of two",
            (_patterns(rng, full, rng.integers(0x8000, 1 << 16, 6), (6,)),),
            hint="1.9999 rounds to 2: the carry goes into the exponent.",
            rtol=EXACT,
        ),
        Case(
            "float64 input",
            (wide,),
            hint="The same numbers in 64 bits each; float32 has all of them.",
            rtol=EXACT,
        ),
        Case(
            "zero and others",
            (zeros,),
            hint="0 is 0, and so is -0; the logarithm of neither is a number.",
            rtol=EXACT,
        ),
        Case(
            "subnormal numbers",
            (_patterns(rng, rng.integers(1, 128, 9), [0x8000, 0x1234, 0xC001], (3, 3)),),
            hint="Below 2^-126 the gap stays 2^-133. They are numbers, not zeros.",
            rtol=EXACT,
        ),
        Case(
            "next to the smallest number",
            (small.astype(np.float32),),
            hint="Up to half of 2^-133 is 0, half included.",
            rtol=EXACT,
        ),
        Case(
            "next to the largest number",
            (rng.permutation(large),),
            hint="The largest is 3.3895e38; from half a gap above it on, inf.",
            rtol=EXACT,
        ),
        Case("infinite", (infinite,), hint="inf stays inf, with its sign.", rtol=EXACT),
        Case(
            "NaN in all its forms",
            (np.append(some, rng.permutation(nans).view(np.float32)),),
            hint="NaN is every pattern whose exponent is all ones and whose fraction is not 0; a "
            "carry must not run through it.",
            rtol=EXACT,
        ),
        Case(
            "not contiguous in memory",
            (scattered(_patterns(rng, heads(15), tails(15), (3, 5))),),
            hint="The same kind of numbers in another memory order.",
            rtol=EXACT,
        ),
    ]


@lru_cache(maxsize=1)
def _all_bf16() -> Array:
    """Every number of the format from 0 up, 2^128 in the place of inf, as float64."""
    patterns = np.arange(0x7F81, dtype=np.uint32) << 16
    numbers = patterns.view(np.float32).astype(np.float64)
    numbers[-1] = 2.0**128
    return numbers


def _bf16_from_a_table(x: Array) -> Array:
    """The nearest of all numbers of the format; of two, that with the even pattern."""
    table, size = _all_bf16(), np.abs(np.asarray(x, np.float64))
    above = np.searchsorted(table, size).clip(1, len(table) - 1)
    to_above, to_below = table[above] - size, size - table[above - 1]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    place = np.where(up, above, above - 1)
    found = np.where(place == len(table) - 1, np.inf, table[place])
    found = np.where(np.isfinite(size), found, size)
    return np.copysign(found, x)


def _by_bits(change: Callable[[Array], Array], keep_nan: bool = True) -> Answer:
    """Bits of float32 changed, and the lower half cut off."""

    def answer(x):
        single = np.asarray(x, np.float32)
        cut = (change(single.view(np.uint32)) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isnan(single) & keep_nan, single, cut).astype(x.dtype)

    return answer


def _both(change: Callable[[Array], Array]) -> tuple[Answer, Answer]:
    """With NaN looked after, and without."""
    return _by_bits(change), _by_bits(change, keep_nan=False)


def _lowest(bits: Array, place: int = 16) -> Array:
    return (bits >> np.uint32(place)) & np.uint32(1)


def _half(bits: Array, more: Any = 0) -> Array:
    return bits + np.uint32(0x7FFF) + np.asarray(more, np.uint32)


def _gap(x: Array, digits: int = 8, least: int = -126) -> Array:
    exponent = np.where(x == 0, -2000, np.frexp(x)[1] - 1)
    return np.ldexp(1.0, np.maximum(exponent, least) - digits + 1)


def _overflowing(y: Array, digits: int = 8) -> Array:
    largest = math.ldexp(2 - 2.0 ** (1 - digits), 127)
    return np.where(np.abs(y) > largest, np.copysign(np.inf, y), y)


def _by_gaps(
    nearest: Callable[[Array], Array] = np.rint,
    digits: int = 8,
    least: int = -126,
    over: Callable[..., Array] = _overflowing,
    gap: Callable[..., Array] = _gap,
) -> Answer:
    """x over its gap, made a whole number, times the gap."""

    def answer(x):
        wide = np.asarray(x, np.float64)
        unit = gap(wide, digits, least)
        y = over(nearest(wide / unit) * unit, digits)
        return np.where(np.isfinite(wide), y, wide).astype(x.dtype)

    return answer


def _away(x: Array) -> Array:
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


def _toward(x: Array) -> Array:
    return np.copysign(np.ceil(np.abs(x) - 0.5), x)


def _to_odd(x: Array) -> Array:
    down = np.floor(x)
    return np.where(x - down == 0.5, down + (down % 2 == 0), np.rint(x))


def _flushed(x):
    y = library.round_to_bf16(x)
    return np.where(np.abs(y) < 2.0**-126, 0 * np.nan_to_num(y), y).astype(x.dtype)


def _flushed_first(x):
    return library.round_to_bf16(np.where(np.abs(x) < 2.0**-126, 0, x).astype(x.dtype))


def _by_logarithm(x):
    """No care for 0 and inf, whose logarithms are infinite."""
    wide = np.asarray(x, np.float64)
    unit = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(wide))), -np.inf) - 7)
    unit = np.where((wide != 0) & np.isfinite(wide), np.maximum(unit, 2.0**-133), unit)
    return _overflowing(np.rint(wide / unit) * unit).astype(x.dtype)


def _fixed_grid(steps: int) -> Answer:
    def answer(x):
        wide = np.asarray(x, np.float64)
        return _overflowing(np.rint(wide * steps) / steps).astype(x.dtype)

    return answer


def _saturated(x):
    largest = float(_all_bf16()[-2])
    y = library.round_to_bf16(x)
    return np.where(np.isfinite(x), np.clip(y, -largest, largest), x).astype(x.dtype)


def _saturated_all(x):
    largest = float(_all_bf16()[-2])
    return np.clip(library.round_to_bf16(x), -largest, largest).astype(x.dtype)


def _pattern(x: Array) -> Array:
    """The upper 16 bits of the right answer."""
    return np.asarray(library.round_to_bf16(x), np.float32).view(np.uint32) >> np.uint32(16)


def _carried_nan(x):
    return _by_bits(lambda b: _half(b, _lowest(b)), keep_nan=False)(x)


def _viewed_as_it_comes(x):
    """The bits of whatever comes, float64 too, taken for those of float32."""
    bits = x.view(np.uint32)
    rounded = (_half(bits, _lowest(bits)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(bits.view(np.float32)), np.float32(np.nan), rounded)


ROUND_MISTAKES = (
    *named(
        "truncation",
        "Cutting off the lower 16 bits rounds toward 0: up to a whole gap off, and always to the "
        "same side, so that sums drift. Nearest means up to half a gap.",
        ROUNDING,
        *_both(lambda b: b),
        _by_gaps(np.trunc),
    ),
    *named(
        "ties away from 0",
        "Half a gap added before the cut sends every tie away from 0. Midway between two numbers, "
        "the one whose last bit is 0 is taken: add 0x7fff and the last bit that stays.",
        ROUNDING,
        *_both(lambda b: b + np.uint32(0x8000)),
        *_both(lambda b: _half(b, _lowest(b, 15))),
        _by_gaps(_away),
    ),
    *named(
        "ties toward 0",
        "Every tie goes to the smaller number. Ties go to the even one: up where the last bit that "
        "stays is 1, which is bit 16, not bit 0.",
        ROUNDING,
        *_both(lambda b: _half(b)),
        *_both(lambda b: _half(b, _lowest(b, 0))),
        _by_gaps(_toward),
    ),
    *named(
        "ties up",
        "floor(x + 1/2) sends every tie up: 2.5 to 3 and -2.5 to -2. np.rint takes the even one.",
        ROUNDING,
        _by_gaps(lambda x: np.floor(x + 0.5)),
    ),
    *named(
        "ties to odd",
        "Midway between two numbers, the one whose last bit is 0 is taken, not the one whose last "
        "bit is 1.",
        ROUNDING,
        *_both(lambda b: _half(b, 1 - _lowest(b))),
        _by_gaps(_to_odd),
    ),
    *named(
        "NaN carried into a number",
        "A carry runs through the bits of a NaN as through any others, and 0x7fffffff becomes -0. "
        "Whatever is NaN has to be set aside first.",
        ROUNDING,
        _carried_nan,
    ),
    *named(
        "float64 read as 32 bits",
        "A float64 has other bits, and twice as many: make it float32 before looking at them.",
        FORMATS,
        _viewed_as_it_comes,
    ),
    *named(
        "a digit too few",
        "bf16 has 8 significant digits: the leading 1, which is not stored, and 7 that are. "
        "np.frexp's mantissa lies in [1/2, 1): all 8 stand behind its point.",
        FORMATS,
        _by_gaps(digits=7),
        _by_gaps(digits=7, least=-125),
        _by_gaps(digits=7, least=-2000),
    ),
    *named(
        "a digit too many",
        "bf16 has 8 significant digits: the leading 1, which is not stored, and 7 that are.",
        FORMATS,
        _by_gaps(digits=9),
        _by_gaps(digits=9, least=-127),
        _by_gaps(digits=9, least=-2000),
    ),
    *named(
        "one gap for all sizes",
        "The gap is relative: 1/128 between 1 and 2, twice that between 2 and 4. Rounding to a "
        "fixed number of places is another thing.",
        FORMATS,
        _fixed_grid(128),
        _fixed_grid(256),
    ),
    *named(
        "rounded to float16",
        "float16 has 11 digits and ends at 65504. bf16 has 8 digits and the range of float32.",
        FORMATS,
        lambda x: x.astype(np.float16).astype(x.dtype),
        lambda x: x.astype(np.float16),
    ),
    *named(
        "subnormals set to 0",
        "Below 2^-126 the numbers go on, 2^-133 apart: subnormal ones. Only up to half of 2^-133 "
        "is nearest to 0.",
        FORMATS,
        _flushed,
        _flushed_first,
    ),
    *named(
        "digits below the smallest gap",
        "Below 2^-126 the gap stays 2^-133 and the digits get fewer: with 8 digits kept, numbers "
        "come out that bf16 has not.",
        FORMATS,
        _by_gaps(least=-2000),
    ),
    *named(
        "overflow not made inf",
        "Half a gap above the largest number, 3.3895e38, rounding gives 2^128, which bf16 has not: "
        "it is inf, and neither 2^128 nor the largest number.",
        FORMATS,
        _saturated,
        _saturated_all,
        _by_gaps(over=lambda y, digits: y),
    ),
    *named(
        "0 and inf made NaN",
        "log2(0) is -inf and log2(inf) is inf, and the gaps made of them are 0 and inf: 0/0 and "
        "inf/inf are NaN. Look after both, or take the exponent from np.frexp.",
        ROUNDING,
        _by_logarithm,
    ),
    *named(
        "bits returned for the number",
        "Asked for is the number, not its pattern: the upper 16 bits go back to where they were, "
        "with 16 zeros below, and are read as float32.",
        FORMATS,
        _pattern,
        lambda x: _pattern(x).astype(np.uint16),
        lambda x: _pattern(x).view(np.float32),
    ),
)

ROUND_TO_BF16 = Exercise(
    id="round_to_bf16",
    chapter=CHAPTER,
    title="Rounding to bf16",
    points=3,
    returns=("y",),
    reference=library.round_to_bf16,
    oracle=quiet(_bf16_from_a_table),
    cases=_bf16_cases,
    mistakes=ROUND_MISTAKES,
)


# --- mixed_precision_dot ------------------------------------------------------------------------

# Sums in a format are exact or wrong; this much is for float64's own last bits.
NEARLY_EXACT = 1e-12


def _fp16(x: Any) -> Array:
    return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def _in_turn(products: Array, fit: Callable[[Any], Any]) -> Array:
    total = np.zeros(products.shape[:-1])
    for p in np.moveaxis(products, -1, 0):
        total = fit(total + p)
    return np.asarray(total, np.float64)


def _settled(make: Callable[[], tuple[Array, Array]], format: str) -> tuple[Array, Array]:
    """Inputs on which all sums that are right agree.

    A sum made in float32 and then rounded to the format is rounded twice: once in some thousand
    times that gives the other neighbour. No right answer is to depend on it.
    """
    while True:
        a, b = make()
        products = _fp16(a) * _fp16(b)
        twice = _in_turn(products, lambda s: library.round_to(np.asarray(s, np.float32), format))
        once = _in_turn(products, lambda s: library.round_to(s, format))
        exact = _dot_in_fractions(a, b, format)
        if np.array_equal(once, twice) and np.array_equal(once, exact):
            return a, b


@quiet
def _dot_cases(rng: Rng) -> list[Case]:
    def drawn(*shape: int, size: float = 1.0, format: str = "float32") -> tuple[Array, Array]:
        def some() -> Array:
            # float32 has them all: going through it first is no second rounding.
            return (size * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

        return _settled(lambda: (some(), some()), format)

    def first_then_ones(first: float, n: int, ones: float = 1.0) -> tuple[Array, Array]:
        """A large product, then small ones, all of either sign, as rows of a batch."""
        a = np.full((2, n), ones)
        a[:, 0] = first
        b = np.ones((2, n)) * np.array([[1.0], [-1.0]])
        b[:, 0] *= first
        # Powers of two go from one side to the other and change no product.
        power = 2.0 ** rng.integers(-3, 4, n)
        return a * power, b / power

    def start_then_ones(start: float, n: int) -> tuple[Array, Array]:
        """The start is one product, then come ones; once as it is, once negative."""
        a, b = first_then_ones(1.0, n)
        return a * np.append(start, np.ones(n - 1)), b

    thirties = 30 * (1 + rng.uniform(0, 0.1, 90)), 30 * (1 + rng.uniform(0, 0.1, 90))
    far = drawn(3, 6)
    far[0][1, _any(rng, 1, 2, 3)] = _any(rng, 70_000, 90_000, -80_000)
    near_zero = tuple(
        rng.choice([1e-8, 2.9e-8, 4e-8, 7e-8, 1e-7], 12) * rng.choice([-1, 1], 12) for _ in "ab"
    )
    near_zero = near_zero[0], 1000 * rng.uniform(1, 9, 12)
    single = tuple(x.astype(np.float32) for x in drawn(2, 23, format="float16"))
    laid = tuple(scattered(x) for x in drawn(4, 19, format="bfloat16"))
    cancelling = drawn(20, size=30.0)
    cancelling = np.append(cancelling[0], -cancelling[0]), np.append(cancelling[1], cancelling[1])

    def case(name: str, arrays: tuple[Array, ...], *format: str, hint: str) -> Case:
        return Case(name, (*arrays, *format), hint=hint, rtol=NEARLY_EXACT)

    return [
        case("one product", drawn(1), "float32", hint="22 digits, which float32 holds."),
        case(
            "one product in a bf16 accumulator",
            drawn(3, 1, format="bfloat16"),
            "bfloat16",
            hint="0 + p is a sum too, and is rounded.",
        ),
        case(
            "a float32 accumulator",
            drawn(41),
            "float32",
            hint="Each sum is rounded to float32, from the first entry to the last.",
        ),
        case(
            "a float16 accumulator",
            drawn(37, format="float16"),
            "float16",
            hint="Each sum is rounded to float16; the products are not.",
        ),
        case(
            "a bf16 accumulator",
            drawn(31, format="bfloat16"),
            "bfloat16",
            hint="Each sum is rounded to bf16. The inputs are float16 all the same.",
        ),
        case("no accumulator named", drawn(29), hint="float32 where nothing is said."),
        case(
            "a batch",
            drawn(2, 3, 17, format="float16"),
            "float16",
            hint="One sum for each leading index, along the last axis.",
        ),
        case(
            "240 and ones in bf16",
            start_then_ones(240.0, 30),
            "bfloat16",
            hint="256 + 1 lies midway between 256 and 258, and 256 is even: the sum stands still.",
        ),
        case(
            "258 and ones in bf16",
            start_then_ones(258.0, 9),
            "bfloat16",
            hint="258 + 1 is a tie too, and 260 is the even one; there the sum stands still.",
        ),
        case(
            "1024 and halves in float16",
            first_then_ones(32.0, 20, 0.5),
            "float16",
            hint="Next to 1024 the gap of float16 is 1: a half is a tie.",
        ),
        case(
            "2 to the 24th and ones in float32",
            first_then_ones(4096.0, 20),
            "float32",
            hint="float32 stands still too, later: at 2^24. The order of the sum is to be kept.",
        ),
        case(
            "a sum beyond float16",
            thirties,
            "float16",
            hint="Beyond 65504 the accumulator is inf.",
        ),
        case(
            "the same sum in float32",
            thirties,
            "float32",
            hint="float32 has room for it.",
        ),
        case(
            "an input beyond float16",
            far,
            "float32",
            hint="Beyond 65504 the input itself is inf, whatever adds it up.",
        ),
        case(
            "inputs next to 0",
            near_zero,
            "float32",
            hint="float16's numbers are 6e-8 apart there: a third of that is 0.",
        ),
        case(
            "sums that cancel",
            cancelling,
            "float32",
            hint="The second half takes away what the first has added: only roundings are left.",
        ),
        case(
            "not contiguous in memory",
            laid,
            "bfloat16",
            hint="The same kind of numbers in another memory order.",
        ),
        case(
            "float32 input",
            single,
            "float16",
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _rounded_fraction(x: Fraction, format: str) -> float:
    """The nearest number of a format, in exact arithmetic."""
    digits, least, most = {
        "float16": (11, -14, 15),
        "bfloat16": (8, -126, 127),
        "float32": (24, -126, 127),
    }[format]
    if x == 0:
        return 0.0
    exponent = math.frexp(float(x))[1] - 1
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    nearest = round(x / unit) * unit  # of a Fraction, ties go to even
    return math.copysign(math.inf, x) if abs(nearest) >= 2 ** (most + 1) else float(nearest)


def _dot_in_fractions(a: Array, b: Array, accumulate: str = "float32") -> Array:
    """Each sum as a fraction, without any rounding but the one asked for."""
    a, b = _fp16(a), _fp16(b)
    out = np.empty(a.shape[:-1])
    for row in np.ndindex(out.shape):
        total = 0.0
        for x, y in zip(a[row], b[row], strict=True):
            if not math.isfinite(total + x * y):
                total += x * y
            else:
                exact = Fraction(float(total)) + Fraction(float(x)) * Fraction(float(y))
                total = _rounded_fraction(exact, accumulate)
        out[row] = total
    return out


def _plain(x: Any, format: str) -> Array:
    return np.asarray(x, np.float64)


def _asked(x: Any, format: str) -> Array:
    return library.round_to(np.asarray(x, np.float64), format)


def _always(fit: Callable[[Any], Any]) -> Callable[[Any, str], Array]:
    return lambda x, format: np.asarray(fit(x), np.float64)


def _to(format: str) -> Callable[[Any, str], Array]:
    return lambda x, _: library.round_to(np.asarray(x, np.float64), format)


_halved_input = _to("float16")


def _dot_with(
    left: Callable[..., Array] = _halved_input,
    right: Callable[..., Array] = _halved_input,
    product: Callable[..., Array] = _plain,
    fit: Callable[..., Array] = _asked,
    total: Callable[..., Any] | None = None,
    last: Callable[..., Array] = _plain,
) -> Answer:
    """The dot product with a step replaced, or with the whole sum replaced by ``total``."""

    def answer(a, b, accumulate="float32"):
        products = product(left(a, accumulate) * right(b, accumulate), accumulate)
        if total is None:
            s = _in_turn(products, lambda s: fit(s, accumulate))
        else:
            s = total(products, accumulate)
        return last(s, accumulate)

    return answer


def _whole(dtype: type, add: Callable[[Array], Array] = lambda p: p.sum(axis=-1)) -> Any:
    """A sum left to NumPy, in one dtype."""
    return lambda products, format: np.asarray(add(products.astype(dtype)), np.float64)


def _by_matmul(p: Array) -> Array:
    return (p[..., None, :] @ np.ones((p.shape[-1], 1), p.dtype))[..., 0, 0]


def _by_einsum(p: Array) -> Array:
    return np.einsum("...n->...", p)


def _only_float32(add: Callable[[Array], Array]) -> Any:
    """Sums in float32 left to NumPy, the others made in turn."""

    def total(products, format):
        if format == "float32":
            return np.asarray(add(products.astype(np.float32)), np.float64)
        return _in_turn(products, lambda s: _asked(s, format))

    return total


def _dotted_in_float32(multiply: Callable[[Array, Array], Array]) -> Answer:
    """Inputs as float32 arrays given to NumPy's product where float32 is asked for."""

    def answer(a, b, accumulate="float32"):
        x, y = (_fp16(v).astype(np.float32) for v in (a, b))
        if accumulate == "float32":
            return np.asarray(multiply(x, y), np.float64)
        return library.mixed_precision_dot(a, b, accumulate)

    return answer


def _all_in_float16(multiply: Callable[[Array, Array], Array]) -> Answer:
    def answer(a, b, accumulate="float32"):
        x, y = (np.asarray(v, np.float64).astype(np.float16) for v in (a, b))
        return np.asarray(multiply(x, y), np.float64)

    return answer


def _first_as_it_is(products, format):
    total = products[..., 0]
    for p in np.moveaxis(products[..., 1:], -1, 0):
        total = _asked(total + p, format)
    return total


def _backwards(products, format):
    return _in_turn(products[..., ::-1], lambda s: _asked(s, format))


def _halves_clipped(x, format):
    y = _asked(x, format)
    return np.clip(y, -65504, 65504) if format == "float16" else y


def _rounding_of(mistaken: Answer) -> Answer:
    """bf16 sums rounded by an earlier, mistaken answer."""

    def fit(s, format):
        return _asked(s, format) if format != "bfloat16" else mistaken(np.asarray(s, np.float64))

    return _dot_with(fit=fit)


# What of the first exercise's mistakes can be seen in a sum of ordinary numbers.
SEEN_IN_A_SUM = (
    "truncation",
    "ties away from 0",
    "ties toward 0",
    "ties up",
    "ties to odd",
    "a digit too few",
    "a digit too many",
    "one gap for all sizes",
    "rounded to float16",
)

MIXED_PRECISION_DOT = Exercise(
    id="mixed_precision_dot",
    chapter=CHAPTER,
    title="A dot product and its accumulator",
    points=3,
    returns=("s",),
    reference=library.mixed_precision_dot,
    oracle=quiet(_dot_in_fractions),
    cases=_dot_cases,
    mistakes=(
        *named(
            "fp16 accumulator",
            "Sums made in float16 stand still at 2048 times the term, and end at 65504. Products "
            "of float16 numbers are added up in the format that accumulate names.",
            ACCUMULATE,
            _dot_with(fit=_to("float16")),
            _dot_with(fit=_to("float16"), product=_to("float16")),
            _all_in_float16(lambda x, y: (x * y).sum(axis=-1)),
            _all_in_float16(lambda x, y: np.einsum("...n,...n->...", x, y)),
        ),
        *named(
            "float32 accumulator whatever is asked for",
            "accumulate names the format of the sums: every one of them is rounded to it.",
            ACCUMULATE,
            _dot_with(fit=_to("float32")),
            _dot_with(total=_whole(np.float32)),
            _dot_with(total=_whole(np.float32, _by_matmul)),
            _dot_with(total=_whole(np.float32, _by_einsum)),
        ),
        *named(
            "float64 accumulator",
            "Sums that float32 would round are kept whole: NumPy's default dtype has 53 digits, "
            "the accumulator 24, 11 or 8.",
            ACCUMULATE,
            _dot_with(fit=_plain),
        ),
        *named(
            "rounded once, at the end",
            "Hardware has no wider place to keep the sum in until the end: each sum is rounded, "
            "and what is lost on the way does not come back.",
            ACCUMULATE,
            _dot_with(fit=_plain, last=_asked),
            _dot_with(total=_whole(np.float32), last=_asked),
            _dot_with(fit=_to("float32"), last=_asked),
        ),
        *named(
            "summed in another order",
            "Rounded sums depend on their order, and asked for is from the first entry to the "
            "last. np.sum adds up in pairs, np.dot and einsum as the processor likes.",
            ACCUMULATE,
            _dot_with(total=_only_float32(lambda p: p.sum(axis=-1))),
            _dot_with(total=_only_float32(_by_einsum)),
            _dot_with(total=_only_float32(_by_matmul)),
            _dotted_in_float32(lambda x, y: np.einsum("...n,...n->...", x, y)),
            _dotted_in_float32(lambda x, y: (x[..., None, :] @ y[..., :, None])[..., 0, 0]),
            _dot_with(total=_backwards),
        ),
        *named(
            "inputs not rounded",
            "A tensor core is given float16: both inputs are rounded to it first.",
            FORMATS,
            _dot_with(left=_plain, right=_plain),
        ),
        *named(
            "one input not rounded",
            "Both inputs are rounded to float16, a and b.",
            FORMATS,
            _dot_with(left=_plain),
            _dot_with(right=_plain),
        ),
        *named(
            "inputs rounded to the accumulator's format",
            "The inputs are float16 whatever adds them up; accumulate is the format of the sums.",
            ACCUMULATE,
            _dot_with(left=_asked, right=_asked),
        ),
        *named(
            "inputs rounded to bf16",
            "The inputs are float16, with 11 digits; bf16 has 8.",
            FORMATS,
            _dot_with(left=_to("bfloat16"), right=_to("bfloat16")),
        ),
        *named(
            "products rounded to float16",
            "The product of two numbers of 11 digits has 22, and goes into the sum with all of "
            "them.",
            ACCUMULATE,
            _dot_with(product=_to("float16")),
        ),
        *named(
            "products rounded to the accumulator's format",
            "The product goes into the sum with all of its 22 digits; it is the sum that is "
            "rounded.",
            ACCUMULATE,
            _dot_with(product=_asked),
        ),
        *named(
            "first product not rounded",
            "The sum starts from 0, and 0 + p is rounded as all sums are.",
            ACCUMULATE,
            _dot_with(total=_first_as_it_is),
        ),
        *named(
            "kept at 65504",
            "A sum beyond float16 is inf. Kept at the largest number, an overflow is never found.",
            FORMATS,
            _dot_with(fit=_halves_clipped),
        ),
        *(
            carried(mistake, "round_to_bf16", quiet(_rounding_of(mistake.answer)))
            for mistake in ROUND_MISTAKES
            if mistake.name in SEEN_IN_A_SUM
        ),
    ),
)


# --- loss_scale_step ----------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float32).max)


def _scale_cases(rng: Rng) -> list[Case]:
    def scale() -> float:
        return 2.0 ** _any(rng, 8, 10, 12, 13, 15, 16)

    def count(below: int = 1900) -> int:
        return int(rng.integers(100, below))

    odd = float(_any(rng, 3, 5, 7, 11)) * scale()
    every = _any(rng, 20, 50, 200)
    return [
        Case(
            "a good step",
            (scale(), count(), False),
            hint="The scale stays, and the count goes up by one.",
        ),
        Case("the first good step", (scale(), 0, False), hint="The count goes from 0 to 1."),
        Case(
            "one step before the interval is full",
            (scale(), 1998, False),
            hint="This is the 1999th good step: the scale grows with the next.",
        ),
        Case(
            "the interval is full",
            (scale(), 1999, False),
            hint="This is the 2000th good step: the scale doubles, and the count begins again.",
        ),
        Case(
            "inf",
            (scale(), count(), True),
            hint="The scale is halved, and the count begins again at 0.",
        ),
        Case("inf after inf", (scale(), 0, True), hint="The scale is halved again."),
        Case(
            "inf where the scale would have grown",
            (scale(), 1999, True),
            hint="inf comes first: the scale is halved, not doubled.",
        ),
        Case(
            "another growth and interval",
            (scale(), every - 1, False, 4.0, 0.5, every),
            hint="growth and interval are arguments.",
        ),
        Case(
            "another interval not yet full",
            (scale(), every // 2, False, 4.0, 0.5, every),
            hint="Nothing but the count changes.",
        ),
        Case(
            "another backoff",
            (scale(), count(), True, 2.0, 0.125, 2000),
            hint="backoff is an argument: an eighth is left.",
        ),
        Case(
            "an interval of one",
            (scale(), 0, False, 2.0, 0.5, 1),
            hint="The scale grows with every good step.",
        ),
        Case("no power of two", (odd, 1999, False, 1.5), hint="growth is 1.5 here."),
        Case(
            "below 1",
            (2.0 ** -_any(rng, 0, 1, 2, 3), count(), True),
            hint="A scale may be smaller than 1: the loss may be too large.",
        ),
        Case(
            "the last doubling that fits",
            (2.0**126, 1999, False),
            hint="2^127 is a number of float32.",
        ),
        Case(
            "at the end of float32",
            (2.0**127, 1999, False),
            hint="2^128 is none: the scale stays, and the count begins again.",
        ),
        Case(
            "inf at the end of float32",
            (2.0**127, count(), True),
            hint="Downwards there is room.",
        ),
        Case(
            "very small",
            (2.0 ** -_any(rng, 100, 110, 120), 1999, False),
            hint="It grows as any other.",
        ),
    ]


def _scale_by_outcomes(
    scale: float,
    good_steps: int,
    found_inf: bool,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> tuple[float, int]:
    """What follows from each of the three things that can happen, looked up."""
    full = len(range(good_steps + 1)) == interval
    grown, shrunk = (Fraction(scale) * Fraction(by) for by in (growth, backoff))
    fits = grown < Fraction(2) ** 128
    outcomes = {
        (True, True): (float(shrunk), 0),
        (True, False): (float(shrunk), 0),
        (False, True): (float(grown) if fits else scale, 0),
        (False, False): (scale, good_steps + 1),
    }
    return outcomes[bool(found_inf), full]


def _grown(s: float, n: int, growth: float, backoff: float, interval: int) -> tuple[float, int]:
    return (s * growth if s * growth <= LARGEST else s), 0


def _shrunk(s: float, n: int, growth: float, backoff: float, interval: int) -> tuple[float, int]:
    return s * backoff, 0


def _counted(s: float, n: int, *_: float) -> tuple[float, int]:
    return s, n + 1


def _full(n: int, interval: int) -> bool:
    return n + 1 == interval


def _rule(inf=_shrunk, full=_full, grow=_grown, wait=_counted) -> Answer:
    """GradScaler's rule with one of its lines replaced."""

    def answer(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
        given = (scale, good_steps, growth, backoff, interval)
        if found_inf:
            return inf(*given)
        return grow(*given) if full(good_steps, interval) else wait(*given)

    return answer


def _growth_first(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    if good_steps + 1 == interval:
        return _grown(scale, good_steps, growth, backoff, interval)
    return _rule()(scale, good_steps, found_inf, growth, backoff, interval)


def _fixed(**fixed: float) -> Answer:
    """An argument that is not used."""

    def answer(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
        used = {"growth": growth, "backoff": backoff, "interval": interval} | fixed
        return _rule()(scale, good_steps, found_inf, **used)

    return answer


def _inf_ignored(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    return _rule()(scale, good_steps, False, growth, backoff, interval)


def _opposite(scale, good_steps, found_inf, growth=2.0, backoff=0.5, interval=2000):
    return _rule()(scale, good_steps, not found_inf, growth, backoff, interval)


LOSS_SCALE_STEP = Exercise(
    id="loss_scale_step",
    chapter=CHAPTER,
    title="The loss scale after a step",
    points=2,
    returns=("scale", "good_steps"),
    reference=library.loss_scale_step,
    oracle=quiet(_scale_by_outcomes),
    cases=_scale_cases,
    mistakes=(
        *named(
            "scale never regrows",
            "After interval good steps, this one counted, the scale grows: where good_steps + 1 is "
            "interval. A test of good_steps alone never comes true in time.",
            DYNAMIC,
            _rule(grow=_counted),
            _rule(grow=lambda s, n, *_: (s, 0)),
            _rule(grow=lambda s, n, *_: (s, 1)),
        ),
        *named(
            "one step early",
            "The scale grows with the step that makes the interval full: good_steps came before, "
            "and this one is the next.",
            DYNAMIC,
            _rule(full=lambda n, interval: n + 2 == interval),
            _rule(full=lambda n, interval: n + 2 >= interval),
        ),
        *named(
            "growth with every good step",
            "The scale grows after interval good steps in a row; growing with each, it would "
            "overflow every few steps.",
            DYNAMIC,
            _rule(full=lambda n, interval: True),
            _rule(
                full=lambda n, interval: True, grow=lambda s, n, *r: (_grown(s, n, *r)[0], n + 1)
            ),
        ),
        *named(
            "count not begun again after growth",
            "After the scale has grown, interval good steps have to come before it grows again.",
            DYNAMIC,
            _rule(grow=lambda s, n, *r: (_grown(s, n, *r)[0], n + 1)),
            _rule(grow=lambda s, n, *r: (_grown(s, n, *r)[0], n)),
        ),
        *named(
            "count goes on after inf",
            "Good steps are counted in a row: inf ends the row, and the count is 0.",
            DYNAMIC,
            _rule(inf=lambda s, n, *r: (_shrunk(s, n, *r)[0], n)),
            _rule(inf=lambda s, n, *r: (_shrunk(s, n, *r)[0], n + 1)),
        ),
        *named(
            "count begins at 1",
            "When the row begins again, no good step has been made in it: 0.",
            DYNAMIC,
            _rule(
                inf=lambda s, n, *r: (_shrunk(s, n, *r)[0], 1),
                grow=lambda s, n, *r: (_grown(s, n, *r)[0], 1),
            ),
            _rule(inf=lambda s, n, *r: (_shrunk(s, n, *r)[0], 1)),
            _rule(grow=lambda s, n, *r: (_grown(s, n, *r)[0], 1)),
        ),
        *named(
            "skipped step without an update",
            "It is the skipped step that has to lower the scale: left as it is, the next gradient "
            "overflows as well, and training stands still.",
            DYNAMIC,
            _rule(inf=lambda s, n, *r: (s, n)),
            _rule(inf=lambda s, n, *r: (s, 0)),
        ),
        *named(
            "step taken on inf",
            "found_inf says that the gradients are worthless: such a step is none, is not counted, "
            "and lowers the scale.",
            DYNAMIC,
            _inf_ignored,
        ),
        *named(
            "growth before inf",
            "inf is looked at first: where the interval is full too, it lowers the scale.",
            DYNAMIC,
            _growth_first,
        ),
        *named(
            "growth and backoff exchanged",
            "inf means that the scale is too large: backoff lowers it. growth is for good times.",
            DYNAMIC,
            lambda s, n, inf, growth=2.0, backoff=0.5, interval=2000: _rule()(
                s, n, inf, backoff, growth, interval
            ),
        ),
        *named(
            "found_inf the wrong way round",
            "found_inf is True where an entry was inf or NaN.",
            DYNAMIC,
            _opposite,
        ),
        *named(
            "divided by backoff",
            "backoff is a factor below 1: the scale is multiplied by it.",
            DYNAMIC,
            _rule(inf=lambda s, n, growth, backoff, interval: (s / backoff, 0)),
        ),
        *named(
            "growth added",
            "growth is a factor.",
            DYNAMIC,
            _rule(grow=lambda s, n, growth, *_: (s + growth, 0)),
        ),
        *named(
            "never below 1",
            "A scale below 1 is as good as any: where even the loss's own gradient overflows, it "
            "is what is needed.",
            DYNAMIC,
            _rule(inf=lambda s, n, *r: (max(1.0, _shrunk(s, n, *r)[0]), 0)),
        ),
        *named(
            "grown out of float32",
            "The scale is a number of float32. Where growth would take it out of its range, to inf "
            "or beyond, it stays.",
            DYNAMIC,
            _rule(grow=lambda s, n, growth, *_: (s * growth, 0)),
            _rule(grow=lambda s, n, growth, *_: (float(np.float32(s * growth)), 0)),
            _rule(grow=lambda s, n, growth, *_: (min(s * growth, LARGEST), 0)),
        ),
        *named(
            "count goes on where the scale cannot grow",
            "The interval was full, and the count begins again, whether the scale could grow or "
            "not.",
            DYNAMIC,
            _rule(
                grow=lambda s, n, *r: _grown(s, n, *r) if _grown(s, n, *r)[0] != s else (s, n + 1)
            ),
            _rule(grow=lambda s, n, *r: _grown(s, n, *r) if _grown(s, n, *r)[0] != s else (s, n)),
        ),
        *named(
            "growth not used",
            "growth is an argument; 2 is its default.",
            DYNAMIC,
            _fixed(growth=2.0),
        ),
        *named(
            "backoff not used",
            "backoff is an argument; 1/2 is its default.",
            DYNAMIC,
            _fixed(backoff=0.5),
        ),
        *named(
            "interval not used",
            "interval is an argument; 2000 is its default.",
            DYNAMIC,
            _fixed(interval=2000),
        ),
    ),
)


# --- unscale_then_clip --------------------------------------------------------------------------

EITHER_WAY = ch08_training.EITHER_WAY


def _unscale_cases(rng: Rng) -> list[Case]:
    def call(*shapes: tuple[int, ...], length: float, scale: float) -> dict[str, Array]:
        """Gradients of the scaled loss, as long as ``length`` without the scale."""
        grads = {name: rng.normal(size=s) for name, s in zip("wbg", shapes, strict=False)}
        total = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        return {name: scale * length / total * g for name, g in grads.items()}

    def spoiled(name: str, value: float, scale: float) -> dict[str, Array]:
        grads = call((2, 3), (3,), (4,), length=5, scale=scale)
        flat = grads[name].reshape(-1)
        flat[rng.integers(len(flat))] = value
        return grads

    s = 2.0 ** _any(rng, 7, 9, 10, 12)
    odd = float(_any(rng, 300, 700, 1100, 3000))
    both = call((3, 4), (4,), length=5, scale=s)
    both["w"] *= 10
    half = {
        name: (rng.choice([-1, 1], shape) * rng.uniform(2e-4, 9e-4, shape)).astype(np.float16)
        for name, shape in (("w", (3, 4)), ("b", (4,)))
    }
    for g in half.values():
        g.flat[0] *= 1000  # one in each that is not lost
    full = {
        n: rng.uniform(-300, 300, shape).astype(np.float16)
        for n, shape in (("w", (2, 3)), ("b", (3,)))
    }
    full["b"][1] = np.inf
    single = {n: g.astype(np.float32) for n, g in call((3, 4), (4,), length=5, scale=s).items()}
    laid = {n: scattered(g) for n, g in call((3, 4), (4, 2), length=5, scale=s).items()}
    return [
        Case(
            "one long gradient",
            (call((3, 4), length=5, scale=s), s, 1.0),
            hint="Unscaled it has length 5, and is divided by 5.",
            rtol=EITHER_WAY,
        ),
        Case(
            "several long gradients",
            (call((3, 4), (4,), (2, 3), length=4, scale=s), s, 1.5),
            hint="One factor for all, from the length of all of them together, unscaled.",
            rtol=EITHER_WAY,
        ),
        Case(
            "one much longer than the others",
            (both, s, 2.0),
            hint="The short one is shortened by the same factor: the direction stays.",
            rtol=EITHER_WAY,
        ),
        Case(
            "long only while scaled",
            (call((3, 4), (4,), length=0.6, scale=s), s, 2.5),
            hint="The scaled gradient is longer than max_norm, the gradient is not: nothing is "
            "clipped.",
        ),
        Case(
            "no power of two",
            (call((2, 3), (3,), length=3, scale=odd), odd, 1.0),
            hint="Any positive scale will do.",
            rtol=EITHER_WAY,
        ),
        Case(
            "a scale below 1",
            (call((2, 3), (3,), length=6, scale=0.125), 0.125, 2.0),
            hint="Unscaling makes them larger here.",
            rtol=EITHER_WAY,
        ),
        Case(
            "all zero",
            ({"w": np.zeros((2, 3)), "b": np.zeros(3)}, s, 1.0),
            hint="The norm is 0, nothing may be divided by it, and nothing was found.",
        ),
        Case(
            "no limit",
            (call((2, 3), (3,), length=5, scale=s), s, np.inf),
            hint="max_norm is inf: unscaled, and nothing else.",
        ),
        Case(
            "inf in the first gradient",
            (spoiled("w", np.inf, s), s, 1.0),
            hint="found_inf is True, the norm is inf, and nothing is clipped: inf times 0 is NaN.",
        ),
        Case(
            "-inf in the last gradient",
            (spoiled("g", -np.inf, s), s, 1.0),
            hint="Of either sign, and in any of them.",
        ),
        Case(
            "NaN in the first gradient",
            (spoiled("w", np.nan, s), s, 1.0),
            hint="NaN counts as well: it is what inf - inf leaves behind.",
        ),
        Case(
            "NaN in the last gradient",
            (spoiled("g", np.nan, s), s, 1.0),
            hint="One entry in any of them is enough.",
        ),
        Case(
            "float16 gradients",
            (half, 32768.0, 1.0),
            hint="Unscaled most are near 1e-8, which float16 has not: divide in float32 or wider.",
            rtol=1e-5,  # what float32 does, and not what rounding the float16 inputs would do
        ),
        Case(
            "float16 gradients with inf",
            (full, 1024.0, 0.1),
            hint="Beyond 65504 a float16 gradient is inf: the scale was too large.",
        ),
        Case(
            "not contiguous in memory",
            (laid, s, 1.5),
            hint="The same kind of numbers in another memory order.",
            rtol=EITHER_WAY,
        ),
        Case(
            "float32 gradients",
            (single, s, 1.5),
            hint="Single precision in; single or double precision out.",
            rtol=1e-5,
        ),
    ]


def _unscale_by_entry(
    grads: Arrays, scale: float, max_norm: float
) -> tuple[dict[str, Array], float, bool]:
    """Each entry divided in extended precision, the length by math.hypot."""
    plain = {n: (g.astype(np.longdouble) / scale).astype(float) for n, g in grads.items()}
    bad = [x for g in plain.values() for x in g.ravel().tolist() if x - x != 0]
    clipped, norm = ch08_training._clip_by_hypot(plain, max_norm)
    return clipped, norm, bool(bad)


def _divided(grads: Arrays, scale: float) -> dict[str, Array]:
    return {n: g.astype(np.result_type(g, np.float32)) / scale for n, g in grads.items()}


def _wide(grads: Arrays) -> dict[str, Array]:
    return {n: g.astype(np.result_type(g, np.float32)) for n, g in grads.items()}


def _length(grads: Arrays) -> float:
    return float(np.sqrt(sum(np.sum(np.asarray(g, float) ** 2) for g in grads.values())))


def _clipped(grads: Arrays, max_norm: float) -> tuple[dict[str, Array], float]:
    norm = _length(grads)
    factor = max_norm / norm if np.isfinite(norm) and norm > max_norm else 1.0
    return {n: g * factor for n, g in grads.items()}, norm


def _clipped_blindly(grads: Arrays, max_norm: float) -> tuple[dict[str, Array], float]:
    norm = _length(grads)
    factor = np.minimum(1, max_norm / (norm + 1e-6))
    return {n: g * factor for n, g in grads.items()}, norm


def _clipped_by_min(grads: Arrays, max_norm: float) -> tuple[dict[str, Array], float]:
    """As blindly, but min(1, NaN) is 1 in Python."""
    norm = _length(grads)
    factor = min(1.0, max_norm / (norm + 1e-6))
    return {n: g * factor for n, g in grads.items()}, norm


def _not_finite(grads: Arrays) -> bool:
    return not all(np.isfinite(g).all() for g in grads.values())


def _in_turn_with(
    plain: Callable[..., dict[str, Array]] = _divided,
    clip: Callable[..., tuple[dict[str, Array], float]] = _clipped,
    found: Callable[[Arrays], Any] = _not_finite,
) -> Answer:
    """Unscaled, then clipped, with a step replaced."""

    def answer(grads, scale, max_norm):
        unscaled = plain(grads, scale)
        return (*clip(unscaled, max_norm), found(unscaled))

    return answer


def _clip_first(
    norm: Callable[..., float], clip: Callable[..., tuple[dict[str, Array], float]] = _clipped
) -> Answer:
    """Clipped while scaled; ``norm`` is what is said of the length."""

    def answer(grads, scale, max_norm):
        clipped, length = clip(_wide(grads), max_norm)
        out = _divided(clipped, scale)
        return out, norm(length, scale, out), _not_finite(_wide(grads))

    return answer


def _changed(change: Callable[..., Any]) -> Answer:
    """The right answer, something in it changed afterwards."""

    def answer(grads, scale, max_norm):
        return change(*_in_turn_with()(grads, scale, max_norm), grads, scale)

    return answer


def _flagged(found: Callable[[Array], Any]) -> Answer:
    return _in_turn_with(found=lambda grads: bool(any(found(g) for g in grads.values())))


def _one_looked_at(which: int) -> Answer:
    return _in_turn_with(found=lambda grads: not np.isfinite(list(grads.values())[which]).all())


def _halved(grads: Arrays, scale: float) -> dict[str, Array]:
    """Whatever dtype comes is divided in, float16 too."""
    return {n: (g * g.dtype.type(1 / scale)).astype(g.dtype) for n, g in grads.items()}


def _halved_by_division(grads: Arrays, scale: float) -> dict[str, Array]:
    return {n: (g / g.dtype.type(scale)).astype(g.dtype) for n, g in grads.items()}


UNSCALE_THEN_CLIP = Exercise(
    id="unscale_then_clip",
    chapter=CHAPTER,
    title="Unscaled, then clipped",
    points=2,
    returns=("grads", "norm", "found_inf"),
    reference=library.unscale_then_clip,
    oracle=quiet(_unscale_by_entry),
    cases=_unscale_cases,
    mistakes=(
        *named(
            "clip before unscale",
            "The scaled gradient is s times too long. Clipped to max_norm and then divided by s, "
            "hardly anything is left of it, and whether it was too long was never asked.",
            CLIP,
            *(
                _clip_first(norm, clip)
                for norm in (
                    lambda length, scale, out: length,
                    lambda length, scale, out: length / scale,
                    lambda length, scale, out: _length(out),
                )
                for clip in (_clipped, _clipped_blindly, _clipped_by_min)
            ),
        ),
        *named(
            "not unscaled",
            "The gradients are those of s times the loss: before anything else, each is divided by "
            "s.",
            UNSCALE,
            _in_turn_with(plain=lambda grads, scale: _wide(grads)),
            _in_turn_with(plain=lambda grads, scale: dict(grads)),
        ),
        *named(
            "multiplied by the scale",
            "The loss was multiplied by s, and so were its gradients: divide.",
            UNSCALE,
            _in_turn_with(plain=lambda grads, scale: _divided(grads, 1 / scale)),
        ),
        *named(
            "unscaled twice",
            "The gradients are divided by s once.",
            UNSCALE,
            _in_turn_with(plain=lambda grads, scale: _divided(_divided(grads, scale), scale)),
            _changed(lambda out, norm, found, grads, scale: (_divided(out, scale), norm, found)),
        ),
        *named(
            "not clipped",
            "After unscaling, gradients longer than max_norm are shortened to it.",
            CLIP,
            _in_turn_with(clip=lambda grads, limit: (grads, _length(grads))),
        ),
        *named(
            "norm of the scaled gradients",
            "The norm that is returned is that of the gradients without the scale: logged with it, "
            "it jumps whenever the scale changes.",
            CLIP,
            _changed(lambda out, norm, found, grads, scale: (out, _length(_wide(grads)), found)),
        ),
        *named(
            "step taken on inf",
            "found_inf is True where an entry is inf or NaN: without it the step is taken, and the "
            "weights are NaN for good.",
            UNSCALE,
            _in_turn_with(found=lambda grads: False),
        ),
        *named(
            "NaN overlooked",
            "NaN is as bad as inf, and is what inf - inf leaves behind: ask np.isfinite.",
            UNSCALE,
            _flagged(lambda g: np.isinf(g).any()),
        ),
        *named(
            "inf overlooked",
            "Overflow shows as inf first: ask np.isfinite.",
            UNSCALE,
            _flagged(lambda g: np.isnan(g).any()),
        ),
        *named(
            "-inf overlooked",
            "Overflow has either sign: ask np.isfinite.",
            UNSCALE,
            _flagged(lambda g: (g == np.inf).any()),
            _flagged(lambda g: not np.max(g) < np.inf),
        ),
        *named(
            "one gradient looked at",
            "One bad entry in any of the gradients makes the step worthless: collect what is found "
            "over all of them.",
            UNSCALE,
            _one_looked_at(-1),
            _one_looked_at(0),
        ),
        *named(
            "found_inf the wrong way round",
            "found_inf is True where something is not finite.",
            UNSCALE,
            _in_turn_with(found=lambda grads: not _not_finite(grads)),
        ),
        *named(
            "divided in float16",
            "What the scale kept from underflow in float16 underflows when it is divided in "
            "float16: make the gradients float32 first.",
            UNSCALE,
            _in_turn_with(plain=_halved),
            _in_turn_with(plain=_halved_by_division),
        ),
        *(
            carried(mistake, "clip_by_global_norm", quiet(_in_turn_with(clip=mistake.answer)))
            for mistake in ch08_training.CLIP_BY_GLOBAL_NORM.mistakes
        ),
    ),
)

EXERCISES = (ROUND_TO_BF16, MIXED_PRECISION_DOT, LOSS_SCALE_STEP, UNSCALE_THEN_CLIP)
