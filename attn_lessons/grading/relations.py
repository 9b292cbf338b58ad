"""What can be observed about a wrong answer that no known mistake reproduces.

Every observation holds in all failing cases of both draws, or says in which case it was made. It
states what the numbers show and leaves the cause to the reader.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attn_lessons.gradcheck import describe_difference
from attn_lessons.grading import compare
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.grading.records import Mismatch, Returned

Draws = Sequence[Sequence[Case]]
Results = Sequence[Sequence[Returned]]

MOST = 4  # observations shown
FEW = 4  # failing cases that are listed by name
SAME = 1e-6  # relations are looked for up to this relative difference


@dataclass(frozen=True)
class Look:
    """One case of one draw: what came, what was expected, and what is wrong with it.

    ``values`` holds every returned array beside the expected one, by name; it is empty where the
    two are not built alike.
    """

    draw: int
    case: Case
    got: Returned
    want: Returned
    fault: Mismatch | None
    values: Mapping[str, tuple[np.ndarray, np.ndarray]]


def carried(mistake: Mistake, earlier: str, answer: Callable[..., Any]) -> Mistake:
    """An earlier exercise's mistake as it shows in a later one, which calls ``answer``.

    For the catalogue: ``answer`` is the later function built on the earlier, mistaken one.
    """
    why = f"This is what a {earlier} with a known mistake leads to: {mistake.why}"
    return replace(mistake, name=f"{mistake.name} (in {earlier})", why=why, answer=answer)


def looks(exercise: Exercise, draws: Draws, returned: Results, wanted: Results) -> list[Look]:
    """All cases of all draws, each with its fault."""
    return [
        Look(
            i,
            case,
            got,
            want,
            compare.fault(got, want, exercise, case),
            _paired(got, want, exercise),
        )
        for i, row in enumerate(zip(draws, returned, wanted, strict=True))
        for case, got, want in zip(*row, strict=True)
    ]


def only_mutated(seen: Sequence[Look]) -> bool:
    """Whether every value is right and some argument was changed."""
    return {look.fault.kind for look in seen if look.fault is not None} == {"mutated"}


def observe(exercise: Exercise, seen: Sequence[Look]) -> tuple[str, ...]:
    """Facts about a wrong answer, the most telling first."""
    failing = [look for look in seen if look.fault is not None and look.fault.kind != "mutated"]
    if not failing:
        return ()
    facts = [*_raised(exercise, failing), *_returned(failing), *_outputs(exercise, seen, failing)]
    facts += [*_cases(seen), *_mutated(seen)]
    return tuple(dict.fromkeys(facts))[:MOST]


# ----------------------------------------------------------------- which cases, which outputs


def _cases(seen: Sequence[Look]) -> Iterator[str]:
    """The mechanism that is wrong, where only some cases fail."""
    names = list(dict.fromkeys(look.case.name for look in seen))
    bad = {look.case.name for look in seen if look.fault is not None}
    good = [name for name in names if name not in bad]
    if good and len(bad) <= FEW:
        shown = listed([f"“{name}”" for name in names if name in bad])
        yield f"only {shown} {'fails' if len(bad) == 1 else 'fail'}, the other cases are right"


def _mutated(seen: Sequence[Look]) -> Iterator[str]:
    names = dict.fromkeys(name for look in seen for name in look.got.mutated)
    if names:
        yield f"besides, the call changes its argument {listed(list(names))}"


def _returned(failing: Sequence[Look]) -> Iterator[str]:
    if all(look.got.error is None and look.got.value is None for look in failing):
        yield "every call returns None: a function without a return statement does that"


def _outputs(exercise: Exercise, seen: Sequence[Look], failing: Sequence[Look]) -> Iterator[str]:
    """Right outputs beside wrong ones, outputs in each other's place, and each wrong output."""
    paired = [look for look in failing if look.values]
    if not paired:
        return
    names = list(dict.fromkeys(name for look in paired for name in look.values))
    if exercise.order:  # a gradient that is 0 on paper, such as a key's bias's, says nothing
        names = [n for n in names if any(n in x.values and x.values[n][1].any() for x in paired)]
    wrong = [name for name in names if any(_is_wrong(exercise, look, name) for look in paired)]
    swapped = list(_swapped(wrong, exercise, paired))
    yield from swapped
    right = [name for name in names if name not in wrong]
    if right and wrong and all(look.values for look in seen if look.got.error is None):
        verb = "is" if len(right) == 1 else "are"
        yield (
            f"{listed(_in_parts(right, names))} {verb} right in every case, "
            f"only {listed(_in_parts(wrong, names))} not"
        )
    if len(wrong) > 1 and set(wrong) <= set(exercise.order):
        wrong = sorted(wrong, key=exercise.order.index)[:1]
        yield f"the first wrong one on the way back is {wrong[0]}{_by_how_much(wrong[0], paired)}"
    if not swapped:
        for name in wrong:
            yield from about(name, exercise, paired)


def _by_how_much(name: str, paired: Sequence[Look]) -> str:
    pairs = [look.values[name] for look in paired if name in look.values]
    if any(got.shape != want.shape or not np.isfinite(got).all() for got, want in pairs):
        return ""
    shares = [
        float(compare.difference(got, want).max()) / compare.largest(want)
        for got, want in pairs
        if want.size and compare.largest(want) > 0
    ]
    return f", off by up to {compare.number(100 * max(shares))} % of its largest entry"


def _in_parts(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names, those of a part that was chosen whole as one: ``grads['ffn.w1']`` … as ffn."""

    def part(name: str) -> str:
        found = re.fullmatch(r"\w+\['([^']+)\.\w+'\]", name)
        return found[1] if found else name

    def whole(name: str) -> bool:
        return all(other in chosen for other in names if part(other) == part(name))

    return list(dict.fromkeys(part(name) if whole(name) else name for name in chosen))


def _is_wrong(exercise: Exercise, look: Look, name: str) -> bool:
    if name not in look.values:
        return False
    got, want = look.values[name]
    return compare.wrong_leaf(compare.Leaf(name, got, want), exercise, look.case) is not None


def _swapped(wrong: list[str], exercise: Exercise, paired: Sequence[Look]) -> Iterator[str]:
    for i, a in enumerate(wrong):
        for b in wrong[i + 1 :]:
            if all(_exchanged(look, a, b) for look in paired):
                yield f"{a} holds what {b} should be, and {b} what {a} should be: swapped"


def _exchanged(look: Look, a: str, b: str) -> bool:
    if a not in look.values or b not in look.values:
        return False
    (got_a, want_a), (got_b, want_b) = look.values[a], look.values[b]
    return _close(got_a, want_b) and _close(got_b, want_a)


def about(name: str, exercise: Exercise, paired: Sequence[Look]) -> Iterator[str]:
    """Facts about one wrong output that hold wherever it is wrong; else those of the first case."""
    wrong = [look for look in paired if _is_wrong(exercise, look, name)]
    found = [dict(_facts(name, look, exercise)) for look in wrong]
    common = _common(found)
    if common:
        for key in common:
            text = found[0][key]
            alike = all(facts[key] == text for facts in found)
            told = alike or key[0] == "factor"
            yield text if told else f"{text} (numbers of the case “{wrong[0].case.name}”)"
        return
    first = wrong[0].case.name
    here = [facts for look, facts in zip(wrong, found, strict=True) if look.case.name == first]
    if len(here) > 1:
        common = [key for key in _common(here) if key[0] != "side"]
        yield from (f"in the case “{first}”, {here[0][key]}" for key in common)
        yield from _same_number(name, here)


def _same_number(name: str, here: Sequence[Mapping[Any, str]]) -> Iterator[str]:
    """Which sizes of one call are the plain number that an output is too large by."""
    labels = [key[1] for key in here[0] if key[0] == "factor" and all(key in f for f in here)]
    named = [label for label in labels if "." in label and not _is_literal(label)]
    if labels and _is_literal(labels[0]) and named:
        yield f"{labels[0]} is also {named[0]} there"


def _common(found: Sequence[Mapping[Any, str]]) -> list[Any]:
    """What is found everywhere, and of all ways to say a factor the first."""
    keys = [key for key in found[0] if all(key in facts for facts in found)]
    factors = [key for key in keys if key[0] == "factor"]
    keys = [key for key in keys if key not in factors[1:] and not (factors and key == SIGNS)]
    # That a number is too large says nothing beside how it is.
    return [key for key in keys if key[0] != "side" or len(keys) == 1]


# ------------------------------------------------------------------------------- one output

Fact = tuple[Any, str]  # what makes it the same fact in another case, and the words
SIGNS = ("signs",)
PROPORTIONAL = ("factor", "of no known name")


def _facts(name: str, look: Look, exercise: Exercise) -> Iterator[Fact]:
    got, want = look.values[name]
    same = max(
        SAME, 1e3 * compare.rounding_unit(compare.Leaf(name, got, want), exercise, look.case)
    )
    yield from _boolean(name, got, want)
    yield from _argument(name, got, look, exercise, same)
    if want.dtype.kind != "b":
        yield from _factor(name, got, want, look, exercise, same)
    yield from _difference(name, got, want, same)
    yield from _small(name, got, want)
    yield from _side(name, got, want)


def _boolean(name: str, got: np.ndarray, want: np.ndarray) -> Iterator[Fact]:
    if got.dtype.kind == want.dtype.kind == "b" and got.shape == want.shape:
        if not (got & ~want).any():
            yield ("too few",), f"{name} is True only where it should be, but not everywhere there"
        elif not (want & ~got).any():
            yield ("too many",), f"{name} is True wherever it should be, and elsewhere too"


def _argument(
    name: str, got: np.ndarray, look: Look, exercise: Exercise, same: float
) -> Iterator[Fact]:
    for argument, value in arguments(exercise, look.case).items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fc" and _close(got, value, same):
            yield ("argument", argument), f"{name} is the argument {argument}, unchanged"


def _factor(
    name: str, got: np.ndarray, want: np.ndarray, look: Look, exercise: Exercise, same: float
) -> Iterator[Fact]:
    """got = c * want, and which size or number of this call the c is."""
    factor = _ratio(got, want, same)
    if factor is None:
        return
    if abs(factor + 1) < same:
        yield ("factor", "-1"), f"{name} has the opposite sign and is right otherwise"
        return
    sign = "-" if factor < 0 else ""
    for label, value in _constants(look.case, exercise):
        if abs(abs(factor) - value) <= 10 * same * value:
            here = (
                ""
                if _is_literal(label)
                else f" ({compare.number(factor)} in the case “{look.case.name}”)"
            )
            yield ("factor", sign + label), f"{name} is {sign}{label} times what it should be{here}"
    fixed = compare.number(factor)
    yield ("factor", fixed), f"{name} is {fixed} times what it should be"
    if want.size > 1:
        yield PROPORTIONAL, f"{name} is proportional to what it should be, by a factor that varies"


def _ratio(got: np.ndarray, want: np.ndarray, same: float) -> float | None:
    """The c of got = c * want, None where there is none (or it is 1 or 0)."""
    if got.shape != want.shape or "c" in (got.dtype.kind, want.dtype.kind):
        return None
    scale = compare.largest(want)
    if scale == 0 or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return None
    a, b = got.astype(np.float64) / scale, want.astype(np.float64) / scale
    factor = float(np.vdot(b, a) / np.vdot(b, b))
    if not np.isfinite(factor) or factor == 0 or abs(factor - 1) < same:
        return None
    return factor if _close(a, factor * b, same) else None


def _constants(case: Case, exercise: Exercise) -> Iterator[tuple[str, float]]:
    """Numbers that a forgotten or extra factor may be, with their names."""
    yield from (("2", 2.0), ("1/2", 0.5), ("3", 3.0), ("1/3", 1 / 3), ("4", 4.0), ("1/4", 0.25))
    for name, value in arguments(exercise, case).items():
        if isinstance(value, np.ndarray):
            # Counted from the end, an axis has the same number whatever the rank.
            for axis in range(value.ndim):
                yield from _powers(f"{name}.shape[{axis - value.ndim}]", value.shape[axis])
                yield from _powers(f"{name}.shape[{axis}]", value.shape[axis])
            yield from _powers(f"{name}.size", value.size)
        elif isinstance(value, float | int) and value > 0:
            yield from _powers(name, value)
            if value < 1:
                yield from _powers(f"(1 - {name})", 1 - value)


def _is_literal(label: str) -> bool:
    return re.fullmatch(r"-?[\d/.e+-]+", label) is not None


def _powers(label: str, value: float) -> Iterator[tuple[str, float]]:
    if value == 0 or value == 1:
        return
    yield label, value
    yield f"1/{label}", 1 / value
    yield f"sqrt({label.strip('()')})", value**0.5
    yield f"1/sqrt({label.strip('()')})", value**-0.5
    if value >= 3:
        yield f"{label}/({label} - 1)", value / (value - 1)
        yield f"({label} - 1)/{label}", (value - 1) / value


def _difference(name: str, got: np.ndarray, want: np.ndarray, same: float) -> Iterator[Fact]:
    """What the gradient checker says of any two arrays; its numbers may differ by case."""
    if "c" in (got.dtype.kind, want.dtype.kind):
        return
    with np.errstate(all="ignore"):
        found = describe_difference(got, want, same, beside="what it should be")
    for observation in found:
        if observation.kind not in ("factor", "sign", "shape"):
            pattern = re.sub(r"\d[\d.e+-]*", "#", observation.text)
            yield (observation.kind, pattern), f"{name}: {observation.text}"


def _small(name: str, got: np.ndarray, want: np.ndarray) -> Iterator[Fact]:
    if got.shape != want.shape or not want.size or want.dtype.kind not in "fc":
        return
    scale, gap = compare.largest(want), float(compare.difference(got, want).max())
    share = gap / scale if scale > 0 else 1.0
    if 0 < share < 1e-4:
        like = "; rounding to float32 is of that size" if 1e-8 < share < 1e-5 else ""
        yield (
            ("small",),
            f"{name} is right to {-round(np.log10(share))} digits: something small is left out or "
            f"added, or precision is lost on the way{like}",
        )


def _side(name: str, got: np.ndarray, want: np.ndarray) -> Iterator[Fact]:
    """Right but for signs; and of single numbers, whether they are too large or too small."""
    if got.shape != want.shape or not {got.dtype.kind, want.dtype.kind} <= set("iuf"):
        return
    if _close(got, want):  # wrong by little: the signs are right
        return
    if got.size > 1 and _close(np.abs(got), np.abs(want)) and not _close(got, -want):
        yield SIGNS, f"{name} is right in size everywhere, but not in sign"
    if got.size == 1 and np.isfinite(got).all() and np.isfinite(want).all():
        if _close(np.abs(got), np.abs(want)):
            yield SIGNS, f"{name} is right but for its sign"
        elif got < want:
            yield ("side", "small"), f"{name} is smaller than it should be"
        else:
            yield ("side", "large"), f"{name} is larger than it should be"


def arguments(exercise: Exercise, case: Case) -> dict[str, Any]:
    """The case's arguments by name, defaults included."""
    bound = inspect.signature(exercise.reference).bind(*case.args, **case.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _close(a: np.ndarray, b: np.ndarray, same: float = SAME) -> bool:
    if a.shape != b.shape or a.size == 0:
        return False
    scale = max(compare.largest(a), compare.largest(b))
    return bool((compare.difference(a, b) <= same * scale).all())


def _paired(
    got: Returned, want: Returned, exercise: Exercise
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if got.error is not None or want.error is not None:
        return {}
    try:
        pairs = compare.leaves(got.value, want.value, exercise.returns)
    except compare.StructureError:
        return {}
    return {p.name: (p.got, p.want) for p in pairs if isinstance(p.want, np.ndarray)}


def listed(names: Sequence[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


# ------------------------------------------------------------------------------- exceptions


def _raised(exercise: Exercise, failing: Sequence[Look]) -> Iterator[str]:
    errors = [look.got for look in failing if look.got.error is not None]
    if not errors:
        return
    text = errors[0].error_message
    for pattern, words in _EXPLAINED:
        match = re.search(pattern, text)
        if match:
            yield words(match)
            break
    else:
        if errors[0].error == "TypeError" and "argument" in text:
            yield f"the function is called as {exercise.signature}"
    if len(errors) < len(failing):
        yield "in some cases it raises, in others it returns wrong values"


def _broadcast(match: re.Match[str]) -> str:
    a, b = (tuple(int(n) for n in re.findall(r"\d+", shape)) for shape in match.groups()[:2])
    short, long = sorted((a, b), key=len)
    fact = f"shapes {a} and {b} do not fit together (they are matched from the last axis backwards)"
    lost = any((*long[:i], *long[i + 1 :]) == short for i in range(len(long)))
    kept = "; one of them lost an axis, which a reduction keeps with keepdims=True"
    return fact + kept if lost and len(long) == len(short) + 1 else fact


def _product(match: re.Match[str]) -> str:
    return (
        f"in a matrix product `a @ b` the last axis of a has to be as long as the last but one of "
        f"b; here {match[2]} meets {match[1]}"
    )


_EXPLAINED: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"could not be broadcast together with shapes (\([\d,]*\)) (\([\d,]*\))", _broadcast),
    (
        r"shapes .* not aligned",
        lambda m: (
            "np.dot multiplies matrices: for the inner product of two arrays of one shape, "
            "multiply them entry by entry and sum"
        ),
    ),
    (r"matmul.*size (\d+) is different from (\d+)", _product),
    (
        r"axis (-?\d+) is out of bounds for array of dimension (\d+)",
        lambda m: (
            f"axis {m[1]} does not exist in an array with {m[2]} axes: not every input has "
            "the same rank, so count axes from the end"
        ),
    ),
    (
        r"name '(\w+)' is not defined",
        lambda m: (
            f"the name {m[1]} means nothing when the function runs: is the cell that defines "
            "or imports it above, and has it run?"
        ),
    ),
    (
        r"truth value of an array",
        lambda m: (
            "an `if` (or `and`, `or`) was given a whole array: compare entry by entry with "
            "np.where, & and |"
        ),
    ),
    (
        r"Cannot cast ufunc",
        lambda m: (
            "an in-place step would put fractions into an integer array: make it a float "
            "array first"
        ),
    ),
    (r"maximum recursion depth", lambda m: "the function calls itself without an end"),
)
