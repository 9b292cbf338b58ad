"""Plain frozen data that passes between the rooms of the grader: no behaviour, no rendering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

UNSOLVED = "not solved yet"  # the message of an exercise whose stub still stands

ExerciseStatus = Literal["passed", "failed", "error", "timeout", "missing"]
NotebookStatus = Literal["graded", "unreadable", "crashed", "timeout"]
MismatchKind = Literal["raised", "structure", "shape", "nonfinite", "values", "mutated"]


@dataclass(frozen=True)
class Returned:
    """What a learner's function did with one case, seen from the learner's side of the fence.

    ``value`` is plain data (arrays, numbers, strings, None, tuples, dicts). ``error`` is None or
    the exception's type name, ``error_message`` its text with the learner's line. ``mutated``
    names the arguments whose contents differ after the call.
    """

    value: Any = None
    error: str | None = None
    error_message: str = ""
    mutated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """The first thing wrong with one returned value of one case.

    ``output`` names the returned value ("dlogits"), ``where`` the index of the largest error,
    ``got`` and ``want`` the whole values, ``error`` the largest error relative to the scale of
    ``want`` and ``tolerance`` what was allowed.
    """

    case: str
    kind: MismatchKind
    output: str
    message: str
    hint: str = ""
    got: Any = None
    want: Any = None
    where: tuple[int, ...] | None = None
    error: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Why an answer is wrong: a named mistake, or observations where no mistake reproduces it."""

    mistake: str | None = None
    why: str = ""
    section: str = ""
    observations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """The verdict on one exercise with all that feedback needs to show it."""

    exercise: str
    status: ExerciseStatus
    points: int
    max_points: int
    cases_passed: tuple[str, ...] = ()
    cases_total: int = 0
    mismatch: Mismatch | None = None
    diagnosis: Diagnosis | None = None
    message: str = ""


@dataclass(frozen=True)
class ExerciseRow:
    """One exercise of a report, field by field as published in the JSON."""

    id: str
    status: ExerciseStatus
    points: int
    max_points: int
    mistake: str | None
    message: str


@dataclass(frozen=True)
class NotebookRow:
    """One notebook of a report, field by field as published in the JSON (after ``schema``)."""

    notebook: str
    student: str
    chapter: str
    status: NotebookStatus
    message: str
    points: int
    max_points: int
    exercises: tuple[ExerciseRow, ...] = ()
