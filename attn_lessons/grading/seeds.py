"""Seeds: the same ones for every interactive check, secret ones for every graded notebook."""

from __future__ import annotations

import hashlib

import numpy as np

DRAWS = 2


def check_seeds(exercise_id: str) -> list[np.random.SeedSequence]:
    """Seeds of an interactive check: one a draw, always the same for one exercise."""
    return _seeds(0, exercise_id)


def secret_seeds(seed: int, notebook: str, exercise_id: str) -> list[np.random.SeedSequence]:
    """Seeds of a graded run: they follow from the grader's secret, the notebook, the exercise."""
    return _seeds(seed, notebook, exercise_id)


def _seeds(seed: int, *names: str) -> list[np.random.SeedSequence]:
    if seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0; got {seed}")
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    words = [int(word) for word in np.frombuffer(digest, dtype="<u4")]
    return np.random.SeedSequence([seed, *words]).spawn(DRAWS)
