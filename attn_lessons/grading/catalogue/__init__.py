"""Every exercise of the book, one module a chapter; a module lists its own in ``EXERCISES``."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from attn_lessons.grading.exercise import Exercise


@cache
def chapters() -> tuple[str, ...]:
    """Names of the chapters that have exercises, in the book's order."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if name.startswith("ch")))


@cache
def exercises() -> tuple[Exercise, ...]:
    """All exercises, in the order in which the book sets them."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in chapters())
    return tuple(exercise for module in modules for exercise in module.EXERCISES)


@cache
def _by_id() -> dict[str, Exercise]:
    return {exercise.id: exercise for exercise in exercises()}


def find(exercise_id: str) -> Exercise:
    """The exercise of this id; ``ValueError`` with the nearest ids where there is none."""
    known = _by_id()
    if exercise_id in known:
        return known[exercise_id]
    near = difflib.get_close_matches(str(exercise_id), known, n=2, cutoff=0.4)
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"exercise_id: no exercise is called {exercise_id!r}; {advice}")
