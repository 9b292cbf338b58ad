"""How two arrays differ, in words: a factor, a sign, an axis order, a slice.

An observation states a fact that was checked on all the numbers it speaks of. Where no
relation holds, none is made up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from attn_lessons._arrays import as_float

Scalar = float | int | np.generic
Array = Float[np.ndarray, "..."]
Mask = Bool[np.ndarray, "..."]


@dataclass(frozen=True)
class Observation:
    """One fact about how an array differs from the one wanted.

    ``kind`` is a word for programs ("factor", "slice"), ``text`` a sentence for people,
    ``detail`` the numbers in it.
    """

    kind: str
    text: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


def wrong_entries(got: Array, want: Array, rtol: float, noise: Array | float = 0.0) -> Mask:
    """Where ``got`` is off by more than ``rtol`` relative to the entry and more than ``noise``.

    Beside the largest entry of ``want``, one that is smaller than a thousandth of ``rtol``
    counts as 0: no sum over them resolves it. A NaN is wrong, whatever is wanted there; an
    infinity is right only where the same one is wanted.
    """
    with np.errstate(all="ignore"):
        off = np.abs(got - want)
        allowed = rtol * np.maximum(np.abs(got), np.abs(want)) + noise
        allowed = np.maximum(allowed, 1e-3 * rtol * _scale(want))
        return np.asarray((got != want) & ~((off <= allowed) & np.isfinite(off)))


def describe_difference(
    got: Shaped[np.ndarray, "..."] | Scalar,
    want: Shaped[np.ndarray, "..."] | Scalar,
    rtol: float = 1e-6,
    *,
    beside: str = "the expected one",
    sizes: Mapping[str, int] | None = None,
) -> tuple[Observation, ...]:
    """Say how ``got`` differs from ``want``; nothing where they agree or no relation holds.

    Looks for, in this order: another shape; NaN and infinity; all zeros; a constant factor and
    which known constant it is (2, 1/2, an axis length N, 1/N, √N, 1/√N, N/(N-1), a change of
    logarithm), a sign, a constant added, another order of the axes or entries, a sum or mean
    too many or too few, a factor or offset of its own for each row; then which slice, diagonal,
    triangle or entry alone is off, and how.

    ``beside`` is what texts call the wanted entry; ``sizes`` names further lengths whose
    factors are worth recognising (``{"d": 64}``).

    ValueError: an argument is not an array of real numbers.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return _shapes(as_float("got", got), as_float("want", want), rtol)
    if got.dtype == want.dtype == bool and got.size and (got ^ want).all():
        return (Observation("inverted", "True and False are swapped in every entry"),)
    pair = _Pair(as_float("got", got), as_float("want", want), rtol, beside, dict(sizes or {}))
    if not pair.wrong.any():
        return ()
    relations = [_order, _reduced] if got.dtype == bool else _RELATIONS
    for relation in (_nonfinite, _zeros, *relations):
        if found := tuple(relation(pair)):
            return found
    return tuple(_placed(pair))


class _Pair:
    """Both arrays in float64 with what every relation asks for."""

    def __init__(self, got: Array, want: Array, rtol: float, beside: str, sizes: dict[str, int]):
        self.rtol, self.beside, self.sizes = rtol, beside, sizes
        got, want = got.astype(np.float64), want.astype(np.float64)
        self.unfinished = np.asarray(~np.isfinite(got) | ~np.isfinite(want))
        both_nan = np.isnan(got) & np.isnan(want)
        self.wrong = np.asarray(wrong_entries(got, want, rtol) & ~both_nan)
        self.nonfinite = np.asarray(self.unfinished & self.wrong)
        self.raw = got
        # Where both hold the same infinity there is nothing to relate.
        self.got = np.where(self.unfinished, 0, got)
        self.want = np.where(self.unfinished, 0, want)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.want.shape

    def equal(self, got: Any, want: Any) -> bool:
        return not wrong_entries(np.asarray(got), np.asarray(want), self.rtol).any()


# --- shapes differ ------------------------------------------------------------------------


def _shapes(got: Array, want: Array, rtol: float) -> tuple[Observation, ...]:
    text = f"its shape is {got.shape} where {want.shape} is expected"
    shape = Observation("shape", text, {"got": got.shape, "want": want.shape})
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return (shape,)
    return (shape, *_shape_relations(got, want, rtol))


def _shape_relations(got: Array, want: Array, rtol: float) -> Iterator[Observation]:
    def equal(a: Any, b: Any) -> bool:
        return a.shape == b.shape and not wrong_entries(np.asarray(a), np.asarray(b), rtol).any()

    squeezed = equal(got.squeeze(), want.squeeze())
    if squeezed and got.ndim != want.ndim:
        word = "missing (keepdims?)" if got.ndim < want.ndim else "too many"
        yield Observation("keepdims", f"the values are right; an axis of length 1 is {word}")
    elif squeezed:
        yield Observation("keepdims", "the values are right; an axis of length 1 is misplaced")
    elif got.ndim == want.ndim and got.size == want.size:
        for axes in _axis_orders(got.ndim):
            if equal(got.transpose(axes), want):
                yield _transposed(axes, "the values are right, but ")
                return
        if equal(got.ravel(), want.ravel()):
            text = "the values are right and in order, laid out in another shape"
            yield Observation("reshaped", text)
    yield from _shape_reductions(got, want, equal)


def _shape_reductions(
    got: Array, want: Array, equal: Callable[[Array, Array], bool]
) -> Iterator[Observation]:
    for name, reduce in (("sum", np.sum), ("mean", np.mean)):
        for keep in (False, True):
            for axis in range(got.ndim):
                if got.shape[axis] > 1 and equal(reduce(got, axis=axis, keepdims=keep), want):
                    text = f"its {name} over axis {axis} is right: that reduction is missing"
                    yield Observation("missing_reduction", text, {"axis": axis, "by": name})
                    return
            for axis in range(want.ndim):
                if want.shape[axis] > 1 and equal(got, reduce(want, axis=axis, keepdims=keep)):
                    text = f"it is the {name} of what is expected over axis {axis}"
                    yield Observation("extra_reduction", text, {"axis": axis, "by": name})
                    return


# --- relations that hold for all entries ----------------------------------------------------


def _nonfinite(pair: _Pair) -> Iterator[Observation]:
    if not pair.nonfinite.any():
        return
    strange = pair.raw[pair.nonfinite]
    missed = np.isfinite(strange)
    if missed.all():
        what = "finite where infinity or NaN is expected"
    elif np.isnan(strange).all():
        what = "NaN"
    elif not np.isnan(strange).any() and not missed.any():
        what = "infinite"
    else:
        what = "NaN or infinite"
    where = _where(pair.nonfinite)
    detail = {"count": int(pair.nonfinite.sum()), "where": where}
    yield Observation("nonfinite", f"{where} {_are(pair.nonfinite)} {what}", detail)
    rest = pair.wrong & ~pair.nonfinite
    if rest.any():
        text = f"of the finite entries {int(rest.sum())} are off as well"
        yield Observation("nonfinite_rest", text, {"count": int(rest.sum())})


def _zeros(pair: _Pair) -> Iterator[Observation]:
    if not pair.got.any():
        yield Observation("zeros", "every entry is 0")


def _factor(pair: _Pair) -> Iterator[Observation]:
    factor = _common_factor(pair, pair.got, pair.want)
    if factor is None:
        return
    names = _factor_names(factor, pair)
    text = f"every entry is {_times(factor)} {pair.beside}{_because(factor, names)}"
    kind = "sign" if np.isclose(factor, -1, rtol=10 * pair.rtol, atol=0) else "factor"
    yield Observation(kind, text, {"factor": factor, "names": names})


def _offset(pair: _Pair) -> Iterator[Observation]:
    offset = _common_offset(pair, pair.got, pair.want)
    if offset is not None:
        text = f"every entry is {abs(offset):.6g} {_more(offset)} {pair.beside}"
        yield Observation("offset", text, {"offset": offset})


def _order(pair: _Pair) -> Iterator[Observation]:
    got, want = pair.got, pair.want
    for axes in _axis_orders(want.ndim):
        moved = want.transpose(axes)
        if moved.shape == want.shape and pair.equal(got, moved):
            yield _transposed(axes)
            return
    for axis in range(want.ndim):
        if pair.equal(got, np.flip(want, axis)):
            text = f"the entries along {_axis(axis, want.ndim)} are in reverse order"
            yield Observation("reversed", text, {"axis": axis})
            return
    for axes in _axis_orders(want.ndim):
        if pair.equal(got, want.transpose(axes).reshape(want.shape)):
            text = f"the right values, read in the axis order {axes} and reshaped"
            yield Observation("reshaped", f"{text}: a transpose is missing or too many")
            return
    if _shuffled(pair):
        yield Observation("shuffled", "the right values stand in other places")


def _reduced(pair: _Pair) -> Iterator[Observation]:
    for axis, length in enumerate(pair.shape):
        for name, reduce in (("sum", np.sum), ("mean", np.mean)):
            if length < 2:
                continue
            along = _axis(axis, len(pair.shape))
            detail = {"axis": axis, "by": name}
            if pair.equal(pair.got, _spread(reduce, pair.want, axis)):
                text = f"every entry holds the {name} over {along} of what is expected"
                yield Observation("extra_reduction", text, detail)
                return
            if pair.equal(_spread(reduce, pair.got, axis), pair.want):
                text = f"the {name} over {along} is right: that reduction is missing"
                yield Observation("missing_reduction", text, detail)
                return


def _row_factor(pair: _Pair) -> Iterator[Observation]:
    for axis in _long_axes(pair):
        got, want = _rows(pair.got, axis), _rows(pair.want, axis)
        told = (np.abs(want) > 1e-3 * pair.rtol * _scale(want)).sum(axis=1) > 1
        weight = (want * want).sum(axis=1)
        factors = (got * want).sum(axis=1) / np.where(weight == 0, 1, weight)
        own = (np.abs(factors - 1) > pair.rtol) | ~told
        if told.mean() > 0.5 and own.all() and pair.equal(got, factors[:, None] * want):
            text = f"every entry is off by a factor that is the same along {_along(axis, pair)}"
            yield Observation("row_factor", text, {"axis": axis, "factors": factors})
            return


def _row_offset(pair: _Pair) -> Iterator[Observation]:
    for axis in _long_axes(pair):
        got, want = _rows(pair.got, axis), _rows(pair.want, axis)
        told = np.ptp(want, axis=1) > 1e-3 * pair.rtol * _scale(want)
        offsets = (got - want).mean(axis=1)
        own = np.abs(offsets) > pair.rtol * _scale(want)
        if told.mean() > 0.5 and own.all() and pair.equal(got - offsets[:, None], want):
            text = f"every entry is off by an amount that is the same along {_along(axis, pair)}"
            yield Observation("row_offset", text, {"axis": axis, "offsets": offsets})
            return


_RELATIONS: Sequence[Callable[[_Pair], Iterator[Observation]]] = (
    _factor,
    _offset,
    _order,
    _reduced,
    _row_factor,
    _row_offset,
)


# --- only some entries are off ---------------------------------------------------------------


def _placed(pair: _Pair) -> Iterator[Observation]:
    count, size = int(pair.wrong.sum()), pair.wrong.size
    # A 0 that is 0 in any case (masked out) says nothing about what is right.
    if (pair.wrong | (pair.got == 0) & (pair.want == 0)).all():
        return
    region = _region(pair.wrong)
    kind = region[0] if region else "entries"
    text = f"only {_where(pair.wrong)} {_are(pair.wrong)} off"
    if region is None:
        text = f"{count} of {size} entries are off, the others are right"
    detail = {"count": count, "size": size, **(region[2] if region else {})}
    yield Observation(kind, text + _manner(pair, count), detail)


def _manner(pair: _Pair, count: int) -> str:
    """How the wrong entries alone are off: ``": 2 times the expected one"``, or nothing."""
    got, want = pair.got[pair.wrong], pair.want[pair.wrong]
    if not got.any():
        return ": 0 there"
    if count == 1:
        return f": {got[0]:.6g} there, {pair.beside} is {want[0]:.6g}"
    factor = _common_factor(pair, got, want)
    if factor is not None:
        return f": {_times(factor)} {pair.beside} there"
    offset = _common_offset(pair, got, want)
    if offset is not None:
        return f": {abs(offset):.6g} {_more(offset)} {pair.beside} there"
    return ""


def _where(mask: Mask) -> str:
    """The entries of ``mask`` as the subject of a sentence."""
    count = int(mask.sum())
    if count == mask.size:
        return "every entry" if count > 1 or mask.ndim else "the value"
    region = _region(mask)
    return region[1] if region else f"{count} of {mask.size} entries"


def _are(mask: Mask) -> str:
    count = int(mask.sum())
    region = _region(mask)
    single = count == 1 or count == mask.size or (region is not None and region[2]["single"])
    return "is" if single else "are"


def _region(mask: Mask) -> tuple[str, str, dict[str, Any]] | None:
    """The tightest named region that holds all of ``mask``, if ``mask`` fills 3/4 of it."""
    if mask.sum() == 1:
        index = tuple(int(i) for i in np.argwhere(mask)[0])
        return "entry", f"the entry at {_index(index)}", {"index": index, "single": True}
    candidates = [c for c in (*_blocks(mask), *_triangles(mask)) if (mask <= c[3]).all()]
    fill, best = max(
        ((mask.sum() / c[3].sum(), c) for c in candidates), key=lambda t: t[0], default=(0, None)
    )
    return best[:3] if best is not None and fill >= 0.75 else None


def _blocks(mask: Mask) -> Iterator[tuple[str, str, dict[str, Any], Mask]]:
    """The smallest block of whole indices that holds ``mask``."""
    block = np.ones(mask.shape, bool)
    texts, chosen = [], {}
    for axis, length in enumerate(mask.shape):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        used = np.flatnonzero(mask.any(axis=others))
        if len(used) == length:
            continue
        inside = np.zeros(length, bool)
        inside[used] = True
        block &= np.expand_dims(inside, others)
        texts.append(_indices(used, length, axis, mask.ndim))
        chosen[axis] = tuple(int(i) for i in used)
    if texts:
        single = len(texts) == 1 and len(next(iter(chosen.values()))) == 1
        yield "slice", " in ".join(texts[::-1]), {"indices": chosen, "single": single}, block


def _triangles(mask: Mask) -> Iterator[tuple[str, str, dict[str, Any], Mask]]:
    if mask.ndim < 2 or min(mask.shape[-2:]) < 2:
        return
    row, column = np.indices(mask.shape[-2:])
    regions = {
        "the diagonal": row == column,
        "the entries above the diagonal": row < column,
        "the entries below the diagonal": row > column,
        "the entries on and above the diagonal": row <= column,
        "the entries on and below the diagonal": row >= column,
        "the entries off the diagonal": row != column,
    }
    for text, region in regions.items():
        part = text.removeprefix("the ").removeprefix("entries ")
        detail = {"region": part, "single": text == "the diagonal"}
        yield "triangle" if "entries" in text else "diagonal", text, detail, region | (mask & False)


# --- constants -----------------------------------------------------------------------------


def _common_factor(pair: _Pair, got: Array, want: Array) -> float | None:
    weight = float((want * want).sum())
    if weight == 0 or not np.isfinite(weight):
        return None
    factor = float((got * want).sum() / weight)
    if factor == 0 or not pair.equal(got, factor * want):
        return None
    told = want[np.abs(want) > 1e-3 * pair.rtol * _scale(want)]
    # One number, or the same one everywhere, is some multiple of any other.
    if np.ptp(told) <= pair.rtol * _scale(told) and not _factor_names(factor, pair):
        return None
    return _rounded(factor, pair.rtol)


def _common_offset(pair: _Pair, got: Array, want: Array) -> float | None:
    if want.size < 2 or np.ptp(want) <= pair.rtol * _scale(want):
        return None
    offset = float((got - want).mean())
    return _rounded(offset, pair.rtol) if pair.equal(got - offset, want) else None


def _factor_names(factor: float, pair: _Pair) -> tuple[str, ...]:
    """The known constants that ``factor`` equals up to its sign."""
    close = 10 * pair.rtol
    found = [n for v, n in _constants(pair) if abs(abs(factor) - v) <= close * v]
    return tuple(dict.fromkeys(found))


def _constants(pair: _Pair) -> Iterator[tuple[float, str]]:
    yield 1.0, "1"
    yield 2.0, "2"
    yield 0.5, "1/2"
    yield 1 / np.log(2), "1/ln 2 (logarithm to base 2)"
    yield 1 / np.log(10), "1/ln 10 (logarithm to base 10)"
    lengths = {f"the length of {_axis(a, len(pair.shape))}": n for a, n in enumerate(pair.shape)}
    lengths |= {f"the size {name}": n for name, n in pair.sizes.items()}
    if len(pair.shape) > 1:
        lengths["the number of entries"] = pair.want.size
    for name, n in lengths.items():
        if n > 1:
            yield from _powers(n, name)


def _powers(n: int, name: str) -> Iterator[tuple[float, str]]:
    yield float(n), f"{n}, {name}"
    yield 1 / n, f"1/{n}, {n} being {name}"
    yield n**0.5, f"√{n}, {n} being {name}"
    yield n**-0.5, f"1/√{n}, {n} being {name}"
    if n > 2:
        yield n / (n - 1), f"{n}/{n - 1}, {n} being {name}"
        yield (n - 1) / n, f"{n - 1}/{n}, {n} being {name}"


def _because(factor: float, names: tuple[str, ...]) -> str:
    flipped = ", with the sign flipped" if factor < 0 else ""
    if not names:
        return flipped
    plain = {
        "1": ": the sign is flipped",
        "2": f": a factor 2 too many{flipped}",
        "1/2": f": a factor 2 is missing{flipped}",
    }
    also = f" (or {' or '.join(names[1:3])})" if names[1:] else ""
    return plain.get(names[0], f": the factor is {names[0]}{flipped}") + also


def _rounded(value: float, rtol: float) -> float:
    """Drop the digits that the comparison did not establish: 2.0000000003 is 2."""
    digits = max(int(-np.floor(np.log10(max(rtol, 1e-15)))), 1)
    return float(f"{value:.{digits}g}")


def _times(factor: float) -> str:
    return f"{factor:.6g} times"


def _more(offset: float) -> str:
    return "more than" if offset > 0 else "less than"


# --- words for axes and indices -----------------------------------------------------------


def _transposed(axes: tuple[int, ...], start: str = "") -> Observation:
    moved = [a for a, b in enumerate(axes) if a != b]
    if len(axes) == 2:
        text = "it is the transpose of what is expected"
    elif len(moved) == 2:
        text = f"axes {moved[0]} and {moved[1]} are swapped"
    else:
        text = f"the axes are in the order {axes}"
    return Observation("transposed", start + text, {"axes": axes})


def _axis(axis: int, ndim: int) -> str:
    return f"axis {axis}" if ndim > 1 else "the axis"


def _along(axis: int, pair: _Pair) -> str:
    if len(pair.shape) == 2:
        return "each row" if axis == 1 else "each column"
    return f"axis {axis}"


def _indices(used: Int[np.ndarray, "n"], length: int, axis: int, ndim: int) -> str:
    """``used`` of the indices of ``axis`` in words: "row 0 (the first)", "columns 2 to 4"."""
    one, many = ("row", "rows") if (ndim, axis) == (2, 0) else ("index", "indices")
    one, many = ("column", "columns") if (ndim, axis) == (2, 1) else (one, many)
    of = f" of axis {axis}" if ndim > 2 else ""
    left = np.setdiff1d(np.arange(length), used)
    first, last, step = int(used[0]), int(used[-1]), set(np.diff(used).tolist())
    if len(used) == 1:
        place = {0: " (the first)", length - 1: " (the last)"}.get(first, "")
        return f"{one} {first}{of}{place}"
    if len(left) == 1 and length > 3:
        return f"the {many}{of} other than {int(left[0])}"
    if step == {2} and (len(used) > 2 or length < 5):
        return f"the {'odd' if first % 2 else 'even'} {many} {first} to {last}{of}"
    if step == {1} and len(used) > 2:
        return f"{many} {first} to {last}{of}"
    if len(used) <= 6:
        head = ", ".join(str(int(i)) for i in used[:-1])
        return f"{many} {head} and {last}{of}"
    return f"{len(used)} of the {length} {many}{of}"


def _index(index: tuple[int, ...]) -> str:
    return str(index[0]) if len(index) == 1 else str(index)


# --- arithmetic ------------------------------------------------------------------------------


def _axis_orders(ndim: int) -> list[tuple[int, ...]]:
    """All orders of up to five axes but the given one, swaps of two first."""
    orders = list(permutations(range(ndim)))[1:] if ndim <= 5 else []
    return sorted(orders, key=lambda axes: sum(a != b for a, b in enumerate(axes)))


def _shuffled(pair: _Pair) -> bool:
    got, want = np.sort(pair.got.ravel()), np.sort(pair.want.ravel())
    gaps = np.diff(want) > pair.rtol * _scale(want)
    return bool(gaps.sum() > 2) and pair.equal(got, want)


def _spread(reduce: Callable[..., Array], x: Array, axis: int) -> Array:
    return np.broadcast_to(reduce(x, axis=axis, keepdims=True), x.shape)


def _long_axes(pair: _Pair) -> list[int]:
    """Axes long enough that a constant along them is no chance, where there are several rows."""
    return [a for a, n in enumerate(pair.shape) if n > 2 and pair.want.size > n][::-1]


def _rows(x: Array, axis: int) -> Float[np.ndarray, "rows n"]:
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _scale(x: Array) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return float(finite.max(initial=0))
