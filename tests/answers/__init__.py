"""Answers that learners could hand in, right and wrong, by exercise."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

Answer = Callable[..., Any]

RIGHT: dict[str, list[Answer]] = defaultdict(list)
MUTATING: dict[str, list[Answer]] = defaultdict(list)
WRONG: dict[str, list[Answer]] = defaultdict(list)


def _entered(table: dict[str, list[Answer]], exercise: str) -> Callable[[Answer], Answer]:
    def enter(answer: Answer) -> Answer:
        table[exercise].append(answer)
        return answer

    return enter


def right(exercise: str) -> Callable[[Answer], Answer]:
    """An answer that has to pass."""
    return _entered(RIGHT, exercise)


def mutating(exercise: str) -> Callable[[Answer], Answer]:
    """An answer with the right values that changes what it was given."""
    return _entered(MUTATING, exercise)


def wrong(exercise: str) -> Callable[[Answer], Answer]:
    """A plausible wrong answer that is in no list of mistakes."""
    return _entered(WRONG, exercise)
