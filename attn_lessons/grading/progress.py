"""What is solved and what is next: the notebooks of a workspace, graded as they were saved.

There is no record of past successes that could be out of date: each notebook's exercises are
graded as the class is, with fixed inputs. A notebook that has not changed since is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from html import escape
from pathlib import Path

from attn_lessons import _paths
from attn_lessons.grading import catalogue, classroom, notebook
from attn_lessons.grading.job import Job, Settings
from attn_lessons.grading.ledger import as_dict, from_dict
from attn_lessons.grading.records import ExerciseRow, NotebookRow
from attn_lessons.grading.release import write_whole
from attn_lessons.grading.reports.terminal import state

KEPT = Path(".attn") / "progress.json"
SETTINGS = Settings(seed=0, timeout=20)


@dataclass(frozen=True)
class Progress:
    """The rows of a workspace, one a chapter; shows itself as a table in a notebook."""

    rows: tuple[NotebookRow, ...]

    @property
    def solved(self) -> int:
        return sum(e.status == "passed" for row in self.rows for e in row.exercises)

    @property
    def total(self) -> int:
        return sum(len(row.exercises) for row in self.rows)

    @property
    def next(self) -> ExerciseRow | None:
        """The first exercise that is not solved."""
        left = (e for row in self.rows for e in row.exercises if e.status != "passed")
        return next(left, None)

    @property
    def summary(self) -> str:
        """One line: how many, and what comes next."""
        upcoming = self.next
        after = f"next: {upcoming.id}" if upcoming else "nothing is left"
        return f"{self.solved} of {self.total} exercises solved; {after}"

    def __repr__(self) -> str:
        lines = [f"{row.chapter}  {e.id}: {state(e)}" for row in self.rows for e in row.exercises]
        return "\n".join([*lines, self.summary])

    def _repr_html_(self) -> str:
        body = "".join(_chapter_html(row, self.next) for row in self.rows)
        return (
            "<table style='text-align:left'><thead><tr><th>Chapter</th><th>Exercise</th>"
            "<th>State</th><th>Points</th></tr></thead>"
            f"<tbody>{body}</tbody></table><p>{escape(self.summary)} (as last saved)</p>"
        )


def progress(workspace: Path | str | None = None) -> Progress:
    """How far the notebooks of ``workspace`` are, as they lie on disk."""
    return Progress(tuple(rows(find_workspace(workspace))))


def find_workspace(named: Path | str | None = None) -> Path:
    """The folder named, else this one if it holds the book's notebooks, else ``workspace``."""
    if named is not None:
        folder = Path(named)
    else:
        here = any((Path.cwd() / f"{name}.ipynb").exists() for name in notebook.notebook_names())
        folder = Path.cwd() if here else Path("workspace")
    if not folder.is_dir():
        raise notebook.NotebookError(
            f"{folder}: no such folder; `attn-lessons start` makes it and puts the exercises there"
        )
    return folder


def rows(workspace: Path) -> list[NotebookRow]:
    """A row for every released chapter, from the workspace's notebook of that name."""
    kept = _read_kept(workspace)
    found: dict[str, NotebookRow] = {}
    left: list[tuple[str, Job]] = []
    for name in notebook.notebook_names():
        path = workspace / f"{name}.ipynb"
        if not path.exists():
            found[name] = _absent(name)
            continue
        job = classroom.job(path, "")
        if (row := kept.get(_key(job))) is not None:
            found[name] = row
        else:
            left.append((name, job))
    worker = classroom.Worker()
    try:
        for name, job in left:
            found[name] = kept[_key(job)] = worker.grade(job, SETTINGS)
    finally:
        worker.close()
    if left:
        _keep(workspace, kept)
    return [found[name] for name in notebook.notebook_names()]


def reset(workspace: Path, name: str, now: datetime) -> Path | None:
    """A fresh copy of a notebook; returns what the old one is called now, None if there was none.

    The name of a kept copy does not begin with its chapter, so nothing takes it for the notebook.
    """
    path = workspace / f"{name}.ipynb"
    fresh = (_paths.exercises_dir() / f"{name}.ipynb").read_text(encoding="utf-8")
    kept = None
    if path.exists() and not path.is_file():
        raise notebook.NotebookError(f"{path}: not a regular file; it has to be moved away first")
    if path.exists():
        kept = _unused(workspace / f"kept_{now:%Y-%m-%d_%H%M%S}_{name}.ipynb")
        os.link(path, kept)  # unlike a rename, this never replaces a file
    write_whole(path, fresh)
    return kept


def _unused(path: Path) -> Path:
    tries = (path.with_stem(f"{path.stem}_{n}") if n > 1 else path for n in itertools.count(1))
    return next(candidate for candidate in tries if not candidate.exists())


def _chapter_html(row: NotebookRow, upcoming: ExerciseRow | None) -> str:
    lines = []
    for number, exercise in enumerate(row.exercises):
        span = f"rowspan='{len(row.exercises)}' style='vertical-align:top'"
        first = "" if number else f"<th scope='rowgroup' {span}>{escape(row.chapter)}</th>"
        mark = "✓ " if exercise.status == "passed" else "→ " if exercise is upcoming else ""
        weight = "bold" if exercise is upcoming else "normal"
        left = f"<td style='text-align:left;font-weight:{weight}'>"
        lines.append(
            f"<tr>{first}{left}{mark}<code>{escape(exercise.id)}</code></td>"
            f"{left}{escape(state(exercise))}</td>"
            f"<td>{exercise.points} / {exercise.max_points}</td></tr>"
        )
    return "".join(lines)


def _absent(name: str) -> NotebookRow:
    exercises = [catalogue.find(e) for e in notebook.pristine(name).exercises]
    entries = tuple(ExerciseRow(e.id, "missing", 0, e.points, None, "") for e in exercises)
    most = sum(e.points for e in entries)
    return NotebookRow(name, "", name, "unreadable", "not in the workspace", 0, most, entries)


def _key(job: Job) -> str:
    release = {n: dict(notebook.pristine(n).release) for n in notebook.notebook_names()}
    what = json.dumps([job.digest, job.notebook, release, asdict(SETTINGS)], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:24]


def _read_kept(workspace: Path) -> dict[str, NotebookRow]:
    try:
        stored = json.loads((workspace / KEPT).read_text(encoding="utf-8"))
        return {key: from_dict(row) for key, row in stored.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _keep(workspace: Path, kept: dict[str, NotebookRow]) -> None:
    # Only finished verdicts: a notebook that met a slow moment gets another chance.
    good = {key: as_dict(row) for key, row in kept.items() if row.status == "graded"}
    newest: Sequence[str] = list(good)[-200:]
    with contextlib.suppress(OSError):
        write_whole(workspace / KEPT, json.dumps({key: good[key] for key in newest}))
