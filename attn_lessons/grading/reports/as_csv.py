"""Rows as CSV: one line a notebook, three columns an exercise."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from attn_lessons.grading.records import NotebookRow

FIXED = ("student", "chapter", "notebook", "status", "points", "max_points", "message")
# A spreadsheet takes a cell that begins with one of these for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def render(rows: Sequence[NotebookRow]) -> str:
    """The table as text, exercises in the order in which they first appear."""
    names = list(dict.fromkeys(e.id for row in rows for e in row.exercises))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\r\n")
    columns = [column for name in names for column in (name, f"{name} status", f"{name} mistake")]
    table.writerow([*FIXED, *columns])
    for row in rows:
        table.writerow([*(_safe(getattr(row, f)) for f in FIXED), *_exercises(row, names)])
    return out.getvalue()


def _exercises(row: NotebookRow, names: Sequence[str]) -> list[str | int]:
    found = {exercise.id: exercise for exercise in row.exercises}
    cells: list[str | int] = []
    for name in names:
        exercise = found.get(name)
        if exercise is None:
            cells += ["", "", ""]
        else:
            cells += [exercise.points, exercise.status, _safe(exercise.mistake or "")]
    return cells


def _safe(value: str | int) -> str | int:
    """Text that no spreadsheet will compute."""
    if isinstance(value, str) and value.lstrip(" ").startswith(FORMULA):
        return f"'{value}"
    return value
