"""Rows as JSON, in the published form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from attn_lessons.grading.records import ExerciseRow, NotebookRow

SCHEMA = 1


def render(rows: Sequence[NotebookRow]) -> str:
    """A list with one object a notebook."""
    return json.dumps([notebook(row) for row in rows], indent=1, ensure_ascii=False) + "\n"


def notebook(row: NotebookRow) -> dict[str, Any]:
    """One notebook's object."""
    return {"schema": SCHEMA, **asdict(row)}


def exercise(row: ExerciseRow) -> str:
    """One exercise, in the form of an entry of ``exercises``."""
    return json.dumps(asdict(row), indent=1, ensure_ascii=False) + "\n"
