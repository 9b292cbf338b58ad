"""What the lists are built from: quiet mistakes under one name, awkward layouts, solved factors."""

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


# A factor is solved for only where that costs at most this many of its digits, and taken only
# where the product comes back to as many.
CONDITION = 1e3
RETURNS = 1e-5


def left_factor(product: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """The X of ``X @ right = product``; None where there is none or more than one.

    Shapes: product (..., n, d), right (..., m, d) with m <= d, X (..., n, m).
    """
    product, right = np.asarray(product, float), np.asarray(right, float)
    if not (product.size and right.size and product.shape[-1] == right.shape[-1]):
        return None
    if not (np.isfinite(product).all() and np.isfinite(right).all()):
        return None
    stretch = np.linalg.svd(right, compute_uv=False)
    if right.shape[-2] > right.shape[-1] or (stretch[..., -1] * CONDITION <= stretch[..., 0]).any():
        return None
    factor = product @ np.linalg.pinv(right)
    off = np.abs(factor @ right - product).max()
    return factor if off <= RETURNS * np.abs(product).max() else None


def right_factor(left: np.ndarray, product: np.ndarray) -> np.ndarray | None:
    """The X of ``left @ X = product``; None where there is none or more than one.

    Shapes: left (..., n, m) with m <= n, product (..., n, d), X (..., m, d).
    """
    if np.ndim(left) < 2 or np.ndim(product) < 2:
        return None
    found = left_factor(np.swapaxes(product, -1, -2), np.swapaxes(left, -1, -2))
    return None if found is None else found.swapaxes(-1, -2)
