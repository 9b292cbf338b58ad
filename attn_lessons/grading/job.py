"""One submission on its way through the grader, and the rows of those that never get far."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attn_lessons.grading import catalogue, notebook
from attn_lessons.grading.exercise import Exercise
from attn_lessons.grading.records import (
    ExerciseRow,
    ExerciseStatus,
    Judgement,
    NotebookRow,
    NotebookStatus,
)

SandboxName = Literal["bubblewrap", "none"]
# A notebook gets this many times the time of a cell.
CELLS_A_NOTEBOOK = 10
LONGEST_MESSAGE = 400


@dataclass(frozen=True)
class Settings:
    """How notebooks are graded. ``timeout`` is a cell's, in seconds."""

    seed: int
    timeout: float = 30.0
    sandbox: SandboxName = "none"
    warm: bool = True

    @property
    def whole_timeout(self) -> float:
        """What a whole notebook may take, in seconds."""
        return self.timeout * CELLS_A_NOTEBOOK


@dataclass(frozen=True)
class Job:
    """One submission: where it came from, whose it is, and what the file holds (or its fault)."""

    notebook: str
    student: str
    text: str
    fault: str = ""

    @property
    def digest(self) -> str:
        """What the submission is, whatever it is called."""
        return hashlib.sha256(f"{self.text}\0{self.fault}".encode()).hexdigest()


def ungraded(job: Job, status: NotebookStatus, message: str) -> NotebookRow:
    """A row for what could not be run, with the points that were to be had where that is known."""
    try:
        name = notebook.find_name(Path(job.notebook).name)
        exercises = [catalogue.find(e) for e in notebook.pristine(name).exercises]
    except (notebook.NotebookError, ValueError):
        return row_of(job, Path(job.notebook).stem, status, message, [])
    rows = [unjudged(e, "missing", "the notebook could not be graded") for e in exercises]
    return row_of(job, name, status, message, rows)


def row_of(
    job: Job, chapter: str, status: NotebookStatus, message: str, rows: Sequence[ExerciseRow]
) -> NotebookRow:
    """The row of a notebook with these exercises."""
    return NotebookRow(
        notebook=job.notebook,
        student=job.student,
        chapter=chapter,
        status=status,
        message=one_line(message),
        points=sum(row.points for row in rows),
        max_points=sum(row.max_points for row in rows),
        exercises=tuple(rows),
    )


def unjudged(exercise: Exercise, status: ExerciseStatus, message: str) -> ExerciseRow:
    """The row of an exercise whose function gave nothing to judge."""
    return ExerciseRow(exercise.id, status, 0, exercise.points, None, one_line(message))


def judged(verdict: Judgement) -> ExerciseRow:
    """The row of an exercise whose function was called."""
    mistake = verdict.diagnosis.mistake if verdict.diagnosis else None
    return ExerciseRow(
        verdict.exercise,
        verdict.status,
        verdict.points,
        verdict.max_points,
        mistake,
        one_line(verdict.message),
    )


def one_line(text: str) -> str:
    """``text`` without control characters and line breaks, of a length a table can bear."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    text = "".join(c if c.isprintable() else " " for c in text)
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 1] + "…"
