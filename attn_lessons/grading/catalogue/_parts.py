"""What the lists are built from: quiet mistakes under one name, awkward memory layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_lessons.grading.exercise import Mistake


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its overflows and divisions by zero unreported."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return called


def named(name: str, why: str, section: str, *answers: Callable[..., Any]) -> tuple[Mistake, ...]:
    """One mistake in all the ways in which people write it: same name, one entry a way."""
    return tuple(Mistake(name, why, section, quiet(answer)) for answer in answers)


def scattered(x: np.ndarray) -> np.ndarray:
    """The same array with its axes reversed in memory, so that it is not C-contiguous."""
    return np.asfortranarray(x)
