"""Right or wrong: what was returned against what was expected, one fact at a time.

The order is fixed: raised, structure, shape, finiteness, values, and last whether an argument was
changed. Numbers agree where every entry differs by no more than ``rtol`` times the largest
expected entry of its array, with

    rtol = 256 * eps * sqrt(n)

``eps`` is the rounding unit of the coarsest dtype in play (the inputs' and, where the exercise
allows float32, the result's) and ``n`` the number of entries of the largest array in play. Two
summation orders of n terms differ by about ``eps * sqrt(n)``; the 256 pays for the roundings
before and after, in whatever order they come. Where that alone is too tight, because the values
come from a cancellation, an answer may also differ by what rounding its *inputs* would change: the
reference is evaluated again with every input off by ``eps``, up or down at random. And as much
as one rounding of a value as large as the largest input changes in an exponent: exp(z - logsumexp)
of logits of 1e4 is right, and off by 1e-12.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.records import Mismatch, MismatchKind, Returned

ROUNDINGS = 256.0
INPUT_ROUNDINGS = 16.0
TRIALS = 12  # two inputs move in opposite directions in one of them at least
# A difference above this times sqrt(eps) of the scale (1e-6 in float64, 3e-2 in float32) is never
# put down to rounding of the inputs.
LARGEST_ROUNDING = 100.0


@dataclass(frozen=True)
class Leaf:
    """One returned value beside the one expected at the same place."""

    name: str
    got: Any
    want: Any


@dataclass(frozen=True)
class Tolerance:
    """What two arrays may differ by: ``rtol`` of ``scale``, and ``atol`` on top."""

    rtol: float
    atol: float
    scale: float

    @property
    def absolute(self) -> float:
        return self.rtol * self.scale + self.atol

    @property
    def relative(self) -> float:
        return self.absolute / self.scale if self.scale > 0 else self.absolute


class StructureError(Exception):
    """The returned value does not have the expected build."""

    def __init__(self, output: str, message: str) -> None:
        super().__init__(message)
        self.output = output


def fault(got: Returned, want: Returned, exercise: Exercise, case: Case) -> Mismatch | None:
    """The first thing wrong with one call, or None where it is right in every respect."""
    if want.error is not None and got.error == want.error:
        return _mutation(got, case)
    if got.error is not None:
        return Mismatch(case.name, "raised", "", _raised(got), case.hint)
    if want.error is not None:
        message = f"nothing was raised, expected {want.error}: {want.error_message}"
        return Mismatch(case.name, "raised", "", message, case.hint, got=got.value)
    return mismatch(got.value, want.value, exercise, case) or _mutation(got, case)


def mismatch(got: Any, want: Any, exercise: Exercise, case: Case) -> Mismatch | None:
    """The first difference between a returned value and the expected one, or None."""
    try:
        pairs = leaves(got, want, exercise.returns)
    except StructureError as wrong:
        return Mismatch(
            case.name, "structure", wrong.output, str(wrong), case.hint, got=got, want=want
        )
    for test in (_kind, _shape, _finiteness):
        for leaf in pairs:
            found = test(leaf)
            if found is not None:
                return replace(found, case=case.name, hint=case.hint)
    for leaf in pairs:
        found = _values(leaf, exercise, case)
        if found is not None:
            return replace(found, case=case.name, hint=case.hint)
    return None


def wrong_leaf(leaf: Leaf, exercise: Exercise, case: Case) -> Mismatch | None:
    """What is wrong with one output, or None."""
    return _kind(leaf) or _shape(leaf) or _finiteness(leaf) or _values(leaf, exercise, case)


def leaves(got: Any, want: Any, names: tuple[str, ...] = ()) -> list[Leaf]:
    """Returned and expected arrays, numbers and strings side by side, each with its name."""
    return list(_pairs(got, want, _root(want, names), names))


def alike(leaf: Leaf) -> bool:
    """Whether both sides have the same shape and both or neither are boolean."""
    return _kind(leaf) is None and _shape(leaf) is None


def tolerance(leaf: Leaf, exercise: Exercise, case: Case) -> Tolerance:
    """What the numbers of one output may differ by: the case's own word, else the formula above."""
    scale = largest(leaf.want)
    if scale == 0:
        scale = min(1.0, max((largest(a) for a in _floats(case)), default=1.0)) or 1.0
    if case.rtol is not None or case.atol is not None:
        return Tolerance(case.rtol or 0.0, case.atol or 0.0, scale)
    size = max([np.size(leaf.want), *(a.size for a in _floats(case))])
    return Tolerance(ROUNDINGS * rounding_unit(leaf, exercise, case) * size**0.5, 0.0, scale)


def rounding_unit(leaf: Leaf, exercise: Exercise, case: Case) -> float:
    """eps of the coarsest dtype in play, never coarser than float32's."""
    used = [a.dtype for a in _floats(case)]
    if exercise.float32_allowed:
        used.append(np.asarray(leaf.got).dtype)
    units = [float(np.finfo(t).eps) for t in used if t.kind in "fc"]
    finest, coarsest = float(np.finfo(np.float64).eps), float(np.finfo(np.float32).eps)
    return min(max([finest, *units]), coarsest)


def largest(values: Any) -> float:
    """The largest finite magnitude in an array, 0 where there is none."""
    array = np.abs(_wide(values))
    finite = array[np.isfinite(array)]
    return float(finite.max()) if finite.size else 0.0


def difference(got: Any, want: Any) -> np.ndarray:
    """|got - want| with 0 where both are the same infinity or both NaN, inf where only one is."""
    a, b = _wide(got), _wide(want)
    with np.errstate(all="ignore"):
        gap = np.abs(a - b)
    gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, gap)
    return np.where(np.isnan(gap), np.inf, gap)


def number(value: Any, other: Any = None) -> str:
    """A number as a learner reads it, with enough digits to tell it from ``other``."""
    shown = value.item() if isinstance(value, np.generic) else value
    if isinstance(shown, bool | int | str) or shown is None:
        return repr(shown)
    shown = shown + 0.0  # -0.0 reads as 0
    for digits in (4, 6, 9, 12, 17):
        text = format(shown, f".{digits}g")
        if other is None or text != format(other, f".{digits}g"):
            return text
    return text


def _raised(got: Returned) -> str:
    return f"{got.error}: {got.error_message}" if got.error_message else str(got.error)


def _mutation(got: Returned, case: Case) -> Mismatch | None:
    if not got.mutated:
        return None
    names = " and ".join(got.mutated)
    message = f"the call changes its argument {names}; the caller's array has to stay as it was"
    return Mismatch(case.name, "mutated", got.mutated[0], message, case.hint)


def _root(want: Any, names: tuple[str, ...]) -> str:
    if isinstance(want, tuple | list):
        return ""
    return names[0] if len(names) == 1 else "the returned value"


def _pairs(got: Any, want: Any, name: str, names: tuple[str, ...]) -> Iterator[Leaf]:
    if isinstance(want, tuple | list):
        yield from _sequence(got, want, name, names)
    elif isinstance(want, Mapping):
        yield from _mapping(got, want, name)
    elif want is None or isinstance(want, str):
        if not (got is None or isinstance(got, str)):
            shown = number(got) if isinstance(got, bool | int | float | np.generic) else _build(got)
            raise StructureError(name, f"{name} is {shown}, expected {want!r}")
        yield Leaf(name, got, want)
    else:
        yield Leaf(name, _numbers(got, want, name), np.asarray(want))


def _sequence(got: Any, want: Any, name: str, names: tuple[str, ...]) -> Iterator[Leaf]:
    parts = names if len(names) == len(want) else tuple(f"{name}[{i}]" for i in range(len(want)))
    if isinstance(got, np.ndarray) and _unpacks(got, want):
        got = tuple(got)
    if not isinstance(got, tuple | list):
        raise StructureError(
            name, f"returned {_build(got)}, expected {_several(parts)}{_forgot(got)}"
        )
    if len(got) != len(want):
        raise StructureError(name, f"returned {_build(got)}, expected {_several(parts)}")
    for part, one, other in zip(parts, got, want, strict=True):
        yield from _pairs(one, other, part, ())


def _mapping(got: Any, want: Mapping[str, Any], name: str) -> Iterator[Leaf]:
    if not isinstance(got, Mapping):
        raise StructureError(
            name, f"{name} is {_build(got)}, expected a dict with {', '.join(map(repr, want))}"
        )
    missing = [repr(k) for k in want if k not in got]
    extra = [repr(k) for k in got if k not in want]
    if missing or extra:
        facts = [f"lacks {', '.join(missing)}"] * bool(missing)
        facts += [f"has {', '.join(extra)}, which nobody asked for"] * bool(extra)
        raise StructureError(name, f"{name} {' and '.join(facts)}")
    for key, value in want.items():
        yield from _pairs(got[key], value, f"{name}[{key!r}]", ())


def _numbers(got: Any, want: Any, name: str) -> np.ndarray:
    if got is None or isinstance(got, str | Mapping):
        wanted = _build(np.asarray(want))
        raise StructureError(name, f"{name} is {_build(got)}, expected {wanted}{_forgot(got)}")
    try:
        array = np.asarray(got)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "biufc":
        wanted = _build(np.asarray(want))
        raise StructureError(name, f"{name} is {_build(got)}, expected {wanted}")
    return array


def _unpacks(got: np.ndarray, want: Any) -> bool:
    plain = not any(isinstance(w, tuple | list | Mapping) for w in want)
    return plain and got.ndim > 0 and [np.shape(g) for g in got] == [np.shape(w) for w in want]


def _forgot(got: Any) -> str:
    return ": is the return statement missing?" if got is None else ""


def _several(names: tuple[str, ...]) -> str:
    return f"{len(names)} values ({', '.join(names)})"


def _build(value: Any) -> str:
    if value is None or isinstance(value, str):
        return repr(value)
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, value)) or 'no keys'}"
    if isinstance(value, tuple | list):
        return f"{len(value)} value{'s' * (len(value) != 1)}"
    if np.ndim(value) == 0:
        return "one number"
    return f"one array of shape {np.shape(value)}"


def _kind(leaf: Leaf) -> Mismatch | None:
    if leaf.want is None or isinstance(leaf.want, str):
        if leaf.got == leaf.want:
            return None
        message = f"{leaf.name} is {leaf.got!r}, expected {leaf.want!r}"
        return _wrong("values", leaf, message)
    if (leaf.want.dtype.kind == "b") == (leaf.got.dtype.kind == "b"):
        return None
    message = f"{leaf.name}: dtype {leaf.got.dtype}, expected {leaf.want.dtype}"
    return _wrong("structure", leaf, message)


def _shape(leaf: Leaf) -> Mismatch | None:
    if np.shape(leaf.got) == np.shape(leaf.want):
        return None
    got, want = np.shape(leaf.got), np.shape(leaf.want)
    comma = ": is there a comma too many after return?" if got == (1, *want) and want else ""
    return _wrong("shape", leaf, f"{leaf.name}: shape {got}, expected {want}{comma}")


def _finiteness(leaf: Leaf) -> Mismatch | None:
    if not isinstance(leaf.want, np.ndarray) or leaf.want.dtype.kind == "b":
        return None
    a, b = _wide(leaf.got), _wide(leaf.want)
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isfinite(a) & np.isfinite(b))
    if same.all():
        return None
    where = _first(~same)
    got, want = leaf.got[where], leaf.want[where]
    count = int((~same).sum())
    rest = f" ({count} of {same.size} entries like this)" if same.size > 1 else ""
    message = f"{_entry(leaf.name, where)} is {number(got)}, expected {number(want)}{rest}"
    return replace(_wrong("nonfinite", leaf, message), where=where)


def _values(leaf: Leaf, exercise: Exercise, case: Case) -> Mismatch | None:
    if not isinstance(leaf.want, np.ndarray) or leaf.want.size == 0:
        return None
    gap = difference(leaf.got, leaf.want)
    if leaf.want.dtype.kind in "biu":
        allowed = Tolerance(0.0, 0.0, max(largest(leaf.want), 1.0))
    else:
        allowed = tolerance(leaf, exercise, case)
        if gap.max() > allowed.absolute:
            allowed = _with_rounded_inputs(allowed, float(gap.max()), leaf, exercise, case)
    if gap.max() <= allowed.absolute:
        return None
    return _off(leaf, gap, allowed)


def _off(leaf: Leaf, gap: np.ndarray, allowed: Tolerance) -> Mismatch:
    where = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
    got, want = leaf.got[where], leaf.want[where]
    error = float(gap.max()) / allowed.scale if allowed.scale > 0 else float(gap.max())
    entries = int((gap > allowed.absolute).sum())
    rest = f"{entries} of {gap.size} entries off, this one most; " if gap.size > 1 else ""
    if leaf.want.dtype.kind in "biu":
        size = f"({rest.removesuffix('; ')})" if rest else "(has to be exact)"
    else:
        size = f"({rest}relative error {error:.2g}, allowed {allowed.relative:.1g})"
    message = (
        f"{_entry(leaf.name, where)} is {number(got, want)}, expected {number(want, got)} {size}"
    )
    if leaf.got.dtype.itemsize < leaf.want.dtype.itemsize and leaf.got.dtype.kind == "f":
        message += f"; the result is {leaf.got.dtype}"
    found = _wrong("values", leaf, message)
    return replace(found, where=where, error=error, tolerance=allowed.relative)


def _with_rounded_inputs(
    allowed: Tolerance, gap: float, leaf: Leaf, exercise: Exercise, case: Case
) -> Tolerance:
    eps = rounding_unit(leaf, exercise, case)
    most = LARGEST_ROUNDING * eps**0.5 * allowed.scale
    if case.rtol is not None or case.atol is not None or gap > most:
        return allowed
    response = _response(leaf.name, exercise, case, eps)
    shifted = eps * allowed.scale * max((largest(a) for a in _floats(case)), default=0.0)
    return replace(allowed, atol=min(INPUT_ROUNDINGS * max(response, shifted), most))


def _response(name: str, exercise: Exercise, case: Case, eps: float) -> float:
    """By how much one output of the reference moves at most when every input is off by eps."""
    return _responses(exercise, case, eps).get(name, 0.0)


@lru_cache(maxsize=64)  # of one case, every output and every mistake ask for the same
def _responses(exercise: Exercise, case: Case, eps: float) -> dict[str, float]:
    signs = np.random.default_rng(0)

    def outputs(unit: float) -> dict[str, Any]:
        value = exercise.reference(*_rounded(case.args, unit, signs), **dict(case.kwargs))
        pairs = leaves(value, value, exercise.returns)
        return {x.name: x.want for x in pairs if isinstance(x.want, np.ndarray)}

    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exact = outputs(0.0)
            moved = [outputs(eps) for _ in range(TRIALS)]
        except ValueError:  # an input that may not be off by anything
            return {}
    most = dict.fromkeys(exact, 0.0)
    for name, each in ((name, each) for found in moved for name, each in found.items()):
        gap = difference(each, exact[name])
        most[name] = max(most[name], float(gap[np.isfinite(gap)].max(initial=0.0)))
    return most


def _rounded(value: Any, eps: float, signs: np.random.Generator) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_rounded(v, eps, signs) for v in value)
    if isinstance(value, Mapping):
        return {k: _rounded(v, eps, signs) for k, v in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fc":
        unit = max(eps, float(np.finfo(value.dtype).eps)) if eps else 0.0
        return (value * (1 + unit * signs.choice([-1.0, 1.0], value.shape))).astype(value.dtype)
    return value


def _floats(case: Case) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    stack = [*case.args, *case.kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, tuple | list):
            stack.extend(value)
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, np.ndarray | np.floating) and value.dtype.kind in "fc":
            found.append(np.asarray(value))
    return found


# A learner who truncates bits may make a signalling NaN, which a cast would warn of.
@np.errstate(invalid="ignore")
def _wide(values: Any) -> np.ndarray:
    array = np.asarray(values)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _first(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(flags)[0])


def _entry(name: str, where: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, where))}]" if where else name


def _wrong(kind: MismatchKind, leaf: Leaf, message: str) -> Mismatch:
    return Mismatch("", kind, leaf.name, message, got=leaf.got, want=leaf.want)
