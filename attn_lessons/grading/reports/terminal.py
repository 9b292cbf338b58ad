"""Rows as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from attn_lessons.grading.records import UNSOLVED, ExerciseRow, NotebookRow

STYLES = {
    "passed": "green",
    "graded": "",
    "failed": "red",
    "error": "red",
    "crashed": "red",
    "unreadable": "red",
    "timeout": "yellow",
    "missing": "yellow",
}
MARKS = {"passed": "✓", "failed": "✗", "error": "!", "timeout": "◷", "missing": "–"}


def report(rows: Sequence[NotebookRow]) -> Group:
    """Everything there is to say on a terminal: one notebook in full, a class as a table."""
    total = f"{sum(r.points for r in rows)} of {sum(r.max_points for r in rows)} points"
    if len(rows) == 1:
        row = rows[0]
        head = Text(f"{row.chapter}: {row.status}", STYLES[row.status])
        note = Text(f" {row.message}" if row.message else "", "dim")
        table = [exercises(row)] if row.exercises else []
        return Group(head + note, *table, Text(total, "bold"))
    graded = sum(row.status == "graded" for row in rows)
    foot = Text(f"{graded} of {len(rows)} notebooks graded, {total}", "bold")
    return Group(grades(rows), Text(), legend(), foot)


def progress(rows: Sequence[NotebookRow], upcoming: ExerciseRow | None) -> Table:
    """What is solved and what is next."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("chapter", no_wrap=True)
    table.add_column("exercise", no_wrap=True)
    table.add_column("points", justify="right", no_wrap=True)
    table.add_column("state", overflow="fold")
    for row in rows:
        for number, exercise in enumerate(row.exercises):
            solved = exercise.status == "passed"
            style = "green" if solved else "bold" if exercise is upcoming else ""
            mark = "✓ " if solved else "→ " if exercise is upcoming else "  "
            table.add_row(
                Text("" if number else row.chapter),
                Text(mark + exercise.id, style),
                f"{exercise.points} / {exercise.max_points}",
                Text(state(exercise), style),
            )
        if row.message:
            table.add_row("", "", "", Text(row.message, "yellow"))
    return table


def state(exercise: ExerciseRow) -> str:
    """What became of one exercise, for the person who works on it."""
    if exercise.status == "passed":
        return "solved"
    if exercise.message == UNSOLVED or exercise.status == "missing":
        return "to do"
    return exercise.mistake or f"not right yet: {exercise.message}"


def grades(rows: Sequence[NotebookRow]) -> Table:
    """The class: a line a notebook, a mark an exercise."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("student", overflow="fold")
    table.add_column("chapter")
    table.add_column("status")
    table.add_column("points", justify="right")
    table.add_column("exercises", no_wrap=True)
    table.add_column("what to know", overflow="fold", style="dim")
    for row in rows:
        table.add_row(
            Text(row.student),
            Text(row.chapter),
            Text(row.status, STYLES[row.status]),
            f"{row.points} / {row.max_points}",
            _marks(row.exercises),
            Text(row.message),
        )
    return table


def exercises(row: NotebookRow) -> Table:
    """One notebook: a line an exercise."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("exercise", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("points", justify="right", no_wrap=True)
    table.add_column("what is wrong", overflow="fold")
    for exercise in row.exercises:
        named = f"{exercise.mistake}; " if exercise.mistake else ""
        wrong = "" if exercise.status == "passed" else f"{named}{exercise.message}"
        table.add_row(
            exercise.id,
            Text(exercise.status, STYLES[exercise.status]),
            f"{exercise.points} / {exercise.max_points}",
            Text(wrong),
        )
    return table


def legend() -> Text:
    """What the marks mean."""
    text = Text(style="dim")
    for status, mark in MARKS.items():
        text.append(mark, STYLES[status]).append(f" {status}   ")
    return text.append("○").append(f" {UNSOLVED}")


def _marks(exercises: Sequence[ExerciseRow]) -> Text:
    text = Text()
    for exercise in exercises:
        if exercise.message == UNSOLVED:
            text.append("○", "dim")
        else:
            text.append(MARKS[exercise.status], STYLES[exercise.status])
    return text
