"""Where the project's files lie: in a checkout, or inside an installed wheel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def project_root() -> Path:
    """The folder that holds ``exercises/`` and ``solutions/``.

    ``ATTN_LESSONS_PROJECT`` names another one; otherwise it is the checkout the package lies in,
    or else the copy that a wheel carries in ``attn_lessons/_project``.
    """
    named = os.environ.get("ATTN_LESSONS_PROJECT")
    if named:
        return Path(named).resolve()
    carried = PACKAGE / "_project"
    return carried if carried.is_dir() else PACKAGE.parent


def exercises_dir() -> Path:
    """The released exercise notebooks."""
    return project_root() / "exercises"


def solutions_dir() -> Path:
    """The notebooks that authors edit."""
    return project_root() / "solutions"


def measured(name: str) -> Any:
    """What ``benchmarks/NAME.py`` measured last: ``benchmarks/results/NAME.json``, as stored.

    FileNotFoundError: it was never run.
    """
    path = project_root() / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def state_dir() -> Path:
    """Where unfinished grading runs keep their ledgers (``ATTN_LESSONS_STATE`` moves it)."""
    named = os.environ.get("ATTN_LESSONS_STATE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "attn-lessons"
