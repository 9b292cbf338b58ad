"""What can be observed about a wrong answer that no known mistake reproduces."""

from __future__ import annotations

from collections.abc import Sequence

from attn_lessons.grading import compare
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.records import Returned

Draws = Sequence[Sequence[Case]]
Results = Sequence[Sequence[Returned]]


def only_mutated(exercise: Exercise, draws: Draws, returned: Results, wanted: Results) -> bool:
    """Whether every value is right and some argument was changed."""
    found = [
        compare.fault(got, want, exercise, case)
        for cases, gots, wants in zip(draws, returned, wanted, strict=True)
        for case, got, want in zip(cases, gots, wants, strict=True)
    ]
    return {f.kind for f in found if f is not None} == {"mutated"}


def observe(
    exercise: Exercise, draws: Draws, returned: Results, wanted: Results
) -> tuple[str, ...]:
    """Facts that hold in every failing case of both draws, the most telling first."""
    return ()
