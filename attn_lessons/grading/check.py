"""The verdict on one answer, and the ``check`` a learner calls in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_lessons.grading import catalogue, compare, feedback, seeds
from attn_lessons.grading.diagnose import Draws, Results, attempt, diagnose
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.records import UNSOLVED, Judgement, Mismatch, Returned

STUB = "NotImplementedError"


@dataclass(frozen=True)
class Passed:
    """A right answer, as the notebook shows it; its text is the same on every run."""

    judgement: Judgement

    def __repr__(self) -> str:
        return feedback.text(self.judgement)

    def _repr_html_(self) -> str:
        return feedback.html(self.judgement)


class CheckFailed(AssertionError):
    """A wrong answer; in a notebook it is one line, because the feedback stands above it."""

    def __init__(self, judgement: Judgement) -> None:
        super().__init__(feedback.text(judgement))
        self.judgement = judgement

    def _render_traceback_(self) -> list[str]:
        return [feedback.line(self.judgement)]


class WrongUse(ValueError):
    """``check`` itself was called with something it cannot check."""

    def _render_traceback_(self) -> list[str]:
        return [f"check: {self}"]


def check(exercise_id: str, function: Callable[..., Any]) -> Passed:
    """Try ``function`` on every case of an exercise; raise ``CheckFailed`` where it is wrong.

    ValueError: there is no such exercise, or ``function`` is not a function.
    """
    try:
        exercise = catalogue.find(exercise_id)
    except ValueError as unknown:
        raise WrongUse(str(unknown)) from None
    if not callable(function):
        raise WrongUse(
            f"function: expected {exercise.id} itself, "
            f'check("{exercise.id}", {exercise.id}); got {_kind(function)}'
        )
    draws = make_draws(exercise, seeds.check_seeds(exercise.id))
    returned = [[attempt(function, exercise, case) for case in cases] for cases in draws]
    judgement = judge(exercise, draws, returned)
    if judgement.status == "passed":
        return Passed(judgement)
    _show(judgement, exercise)
    raise CheckFailed(judgement)


def make_draws(exercise: Exercise, sequences: Sequence[np.random.SeedSequence]) -> list[list[Case]]:
    """The exercise's cases, once for each seed."""
    return [exercise.cases(np.random.default_rng(sequence)) for sequence in sequences]


def judge(exercise: Exercise, draws: Draws, returned: Results) -> Judgement:
    """The verdict on what a function returned for every case of every draw; pure."""
    _counted(draws, returned)
    wanted = [[expected(exercise, case) for case in cases] for cases in draws]
    found = [
        [compare.fault(got, want, exercise, case) for case, got, want in zip(*row, strict=True)]
        for row in zip(draws, returned, wanted, strict=True)
    ]
    total = len(draws[0])
    passed = tuple(
        case.name for i, case in enumerate(draws[0]) if all(row[i] is None for row in found)
    )
    first = _first(found)
    if first is None:
        return Judgement(
            exercise.id,
            "passed",
            exercise.points,
            exercise.points,
            passed,
            total,
            message=f"{total} of {total} cases",
        )
    mistaken = None if _unsolved(returned) else diagnose(exercise, draws, returned, wanted)
    return Judgement(
        exercise.id,
        "error" if first.kind == "raised" else "failed",
        0,
        exercise.points,
        passed,
        total,
        first,
        mistaken,
        UNSOLVED if mistaken is None else f"{first.case}: {first.message}",
    )


def expected(exercise: Exercise, case: Case) -> Returned:
    """What a right answer returns, or the ``ValueError`` it raises, in one case."""
    want = attempt(exercise.oracle or exercise.reference, exercise, case)
    if want.error not in (None, "ValueError"):
        raise RuntimeError(
            f"the reference of {exercise.id} fails in case {case.name!r}: "
            f"{want.error}: {want.error_message}"
        )
    return want


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")


def _counted(draws: Draws, returned: Results) -> None:
    want, got = [len(cases) for cases in draws], [len(results) for results in returned]
    if want != got:
        raise ValueError(f"returned: expected {want} results, one a case; got {got}")


def _first(found: Sequence[Sequence[Mismatch | None]]) -> Mismatch | None:
    """The first fault; a changed argument counts only where nothing else is wrong."""
    faults = [fault for row in found for fault in row if fault is not None]
    return min(faults, key=lambda fault: fault.kind == "mutated", default=None)


def _unsolved(returned: Results) -> bool:
    return all(got.error == STUB for row in returned for got in row)


def _show(judgement: Judgement, exercise: Exercise) -> None:
    """Display the feedback where there is a notebook to display it in."""
    shell = sys.modules.get("IPython")
    if shell is None or shell.get_ipython() is None:
        return
    from IPython.display import display

    bundle = {
        "text/plain": feedback.text(judgement),
        "text/html": feedback.html(judgement, exercise),
    }
    display(bundle, raw=True)
