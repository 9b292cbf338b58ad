"""Why an answer is wrong: the known mistake that reproduces it, else what can be observed.

A mistake is named only where its function returns the learner's numbers in every case of both
draws (the same NaN and infinities, the same kind of exception) and differs from the expected
values in each draw. So one coincidence on one input never accuses anybody.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from attn_lessons.grading import compare, intermediates, learner, relations
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.grading.records import Diagnosis, Returned

# A learner's rounding may differ from the mistake's by more than a right answer's from the
# reference (a dropped maximum loses digits), yet has to be far nearer to it than to the truth.
LOOSENESS = 1e4
NEARER = 1e-2
ROUNDING = 1e-12
NOTHING = 1e-13  # of the largest array returned: what is smaller is 0 but for rounding

Draws = Sequence[Sequence[Case]]
Results = Sequence[Sequence[Returned]]


def attempt(function: Callable[..., Any], exercise: Exercise, case: Case) -> Returned:
    """What ``function`` does with one case."""
    return learner.call(function, case.args, case.kwargs, _parameters(exercise.reference))


@cache
def _parameters(reference: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(reference).parameters)


def diagnose(exercise: Exercise, draws: Draws, returned: Results, wanted: Results) -> Diagnosis:
    """The named mistake of a wrong answer, or observations about it."""
    named = name_mistake(exercise, draws, returned, wanted)
    if named is not None and not named.observed:
        return Diagnosis(named.name, named.why, named.section)
    seen = relations.looks(exercise, draws, returned, wanted)
    if named is not None:
        facts = relations.observe(exercise, seen)
        return Diagnosis(named.name, named.why, named.section, facts)
    if relations.only_mutated(seen):
        return _changes_input(returned)
    found = [*intermediates.first_wrong(exercise, seen), *relations.observe(exercise, seen)]
    return Diagnosis(observations=tuple(found[: relations.MOST]))


def name_mistake(
    exercise: Exercise, draws: Draws, returned: Results, wanted: Results
) -> Mistake | None:
    """The mistake that reproduces the answer; of several the closest, then the first listed."""
    draws, returned, wanted = _failing_first(exercise, draws, returned, wanted)
    found = [
        (distance, mistake)
        for mistake in exercise.mistakes
        if (distance := _distance(mistake, exercise, draws, returned, wanted)) is not None
    ]
    # Distances below rounding say nothing about which is closer; min() keeps the listed order.
    return min(found, key=lambda pair: max(pair[0], ROUNDING), default=(0.0, None))[1]


def _failing_first(
    exercise: Exercise, draws: Draws, returned: Results, wanted: Results
) -> tuple[Draws, Results, Results]:
    """The same calls, those that failed before the others: most mistakes part from them at once."""
    rows = [
        sorted(zip(*row, strict=True), key=lambda call: not _failed(exercise, *call))
        for row in zip(draws, returned, wanted, strict=True)
    ]
    cases, gots, wants = zip(*(zip(*row, strict=True) for row in rows), strict=True)
    return cases, gots, wants


def _failed(exercise: Exercise, case: Case, got: Returned, want: Returned) -> bool:
    return compare.fault(got, want, exercise, case) is not None


def _distance(
    mistake: Mistake, exercise: Exercise, draws: Draws, returned: Results, wanted: Results
) -> float | None:
    """The largest relative distance of the answer from the mistake, None where they part."""
    total, values_met = 0.0, False
    for cases, gots, wants in zip(draws, returned, wanted, strict=True):
        differs = False
        for case, got, want in zip(cases, gots, wants, strict=True):
            wrong = attempt(mistake.answer, exercise, case)
            gap = _gap(got, wrong, want, exercise, case)
            if gap is None:
                return None
            total = max(total, gap)
            values_met = values_met or wrong.error is None
            differs = differs or compare.fault(wrong, want, exercise, case) is not None
        if not differs:
            return None
    return total if values_met else None


def _gap(
    got: Returned, wrong: Returned, want: Returned, exercise: Exercise, case: Case
) -> float | None:
    """Relative distance of one result from the mistake's; None where they are not the same."""
    if wrong.error is not None or got.error is not None:
        return 0.0 if wrong.error == got.error else None
    if wrong.mutated and got.mutated != wrong.mutated:
        return None
    pairs = _leaves(got, wrong, exercise)
    if pairs is None:
        return None
    truth = {leaf.name: leaf for leaf in _leaves(got, want, exercise) or ()}
    arrays = [leaf for leaf in pairs if isinstance(leaf.want, np.ndarray)]
    # The gradient of a key's bias is 0 on paper and rounding in each answer's own way.
    nothing = NOTHING * max((compare.largest(leaf.want) for leaf in arrays), default=0.0)
    gaps = [
        0.0 if _vanishes(leaf, nothing) else _leaf_gap(leaf, truth.get(leaf.name), exercise, case)
        for leaf in pairs
    ]
    known = [gap for gap in gaps if gap is not None]
    return max(known, default=0.0) if len(known) == len(gaps) else None


def _vanishes(leaf: compare.Leaf, nothing: float) -> bool:
    if not isinstance(leaf.want, np.ndarray) or not compare.alike(leaf):
        return False
    both = (leaf.got, leaf.want)
    finite = all(np.isfinite(values).all() for values in both if values.dtype.kind in "fc")
    return (
        finite and all(0 <= compare.largest(values) <= nothing for values in both) and nothing > 0
    )


def _leaves(got: Returned, other: Returned, exercise: Exercise) -> list[compare.Leaf] | None:
    try:
        return compare.leaves(got.value, other.value, exercise.returns)
    except compare.StructureError:
        return None


def _leaf_gap(
    leaf: compare.Leaf, truth: compare.Leaf | None, exercise: Exercise, case: Case
) -> float | None:
    if not isinstance(leaf.want, np.ndarray):
        return 0.0 if leaf.got == leaf.want else None
    if not compare.alike(leaf):
        return None
    allowed = compare.tolerance(leaf, exercise, case)
    off = float(compare.difference(leaf.got, leaf.want).max(initial=0.0))
    limit = LOOSENESS * allowed.absolute
    if truth is not None and isinstance(truth.want, np.ndarray) and compare.alike(truth):
        from_truth = float(compare.difference(truth.got, truth.want).max(initial=0.0))
        limit = max(allowed.absolute, min(limit, NEARER * from_truth))
    if off <= limit:
        return off / (allowed.scale or 1.0)
    return 0.0 if _both_right(leaf, truth, exercise, case) else None


def _both_right(
    leaf: compare.Leaf, truth: compare.Leaf | None, exercise: Exercise, case: Case
) -> bool:
    """Whether both are the expected numbers, though each rounded in its own way.

    Near an offset of 10000 two right answers differ by more than either may from the truth where
    nothing is lost.
    """
    if truth is None:
        return False
    pair = (truth, replace(leaf, got=leaf.want, want=truth.want))
    return all(compare.wrong_leaf(each, exercise, case) is None for each in pair)


def _changes_input(returned: Results) -> Diagnosis:
    names = next(got.mutated for gots in returned for got in gots if got.mutated)
    shown = " and ".join(names)
    return Diagnosis(
        mistake="changes its input",
        why=f"What is returned is right, but {shown} no longer holds what the caller put there: "
        "an in-place step (`x -= …`, `x[i] = …`, `out=x`) worked on the caller's array instead of "
        "a copy.",
    )
