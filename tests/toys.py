"""Small exercises for the tests of the verdict, so that they do not lean on the book's."""

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_lessons.grading import seeds
from attn_lessons.grading.check import attempt, judge, make_draws
from attn_lessons.grading.exercise import Case, Exercise, Mistake
from attn_lessons.grading.records import Judgement


def probabilities(rng: np.random.Generator, *shape: int) -> np.ndarray:
    e = np.exp(rng.normal(size=shape))
    return e / e.sum(axis=-1, keepdims=True)


# ------------------------------------------------------------- one array: softmax's backward


def backward(dp, p, axis=-1):
    return p * (dp - (dp * p).sum(axis=axis, keepdims=True))


def no_row_sum(dp, p, axis=-1):
    return p * dp


def no_keepdims(dp, p, axis=-1):
    return p * (dp - (dp * p).sum(axis=axis))


def backward_cases(rng):
    zeros = probabilities(rng, 2, 5)
    zeros[1, :3] = 0
    return [
        Case("one row", (rng.normal(size=7), probabilities(rng, 7)), hint="A vector."),
        Case("a batch", (rng.normal(size=(3, 4)), probabilities(rng, 3, 4))),
        Case("axis 0", (rng.normal(size=(5, 2)), probabilities(rng, 2, 5).T), {"axis": 0}),
        Case("heads", (rng.normal(size=(2, 3, 4)), probabilities(rng, 2, 3, 4))),
        Case("zeros", (rng.normal(size=(2, 5)), zeros), hint="Some p are 0."),
    ]


BACKWARD = Exercise(
    id="backward",
    chapter="ch00_toys",
    title="A vector-Jacobian product",
    points=2,
    returns=("dz",),
    reference=backward,
    cases=backward_cases,
    mistakes=(
        Mistake("row sum dropped", "the normaliser moves too", "ch00.html#sum", no_row_sum),
        Mistake("keepdims forgotten", "the axis is lost", "ch00.html#keep", no_keepdims),
    ),
    tokens=("dz",),
)


# ------------------------------------------------------------ a tuple with a dict: a product


def product(dy, x, w):
    """y = x @ w, and how often it was done."""
    return dy @ w.T, {"w": x.T @ dy, "b": dy.sum(axis=0)}, 1.5 * float((dy * dy).sum())


def product_cases(rng):
    def call(n, c, d):
        return rng.normal(size=(n, d)), rng.normal(size=(n, c)), rng.normal(size=(c, d))

    return [
        Case("wide", call(3, 4, 6)),
        Case("tall", call(7, 5, 2)),
        Case("square", call(4, 4, 4), hint="All sizes alike."),
    ]


PRODUCT = Exercise(
    id="product",
    chapter="ch00_toys",
    title="The backward pass of a product",
    points=3,
    returns=("dx", "grads", "size"),
    reference=product,
    cases=product_cases,
    mistakes=(),
)


def answer(exercise: Exercise, function: Callable[..., Any]) -> Judgement:
    """The verdict on ``function``, as ``check`` takes it."""
    draws = make_draws(exercise, seeds.check_seeds(exercise.id))
    returned = [[attempt(function, exercise, case) for case in cases] for cases in draws]
    return judge(exercise, draws, returned)


def exercise_of(reference: Callable[..., Any], *inputs: Any, **fields: Any) -> Exercise:
    """An exercise of one function with a case for each tuple of inputs."""
    given = {"id": reference.__name__, "returns": ("y",), "mistakes": (), **fields}
    cases = given.pop("cases", lambda rng: [Case(f"case {i}", x) for i, x in enumerate(inputs)])
    return Exercise(
        chapter="ch00_toys", title="toy", points=1, reference=reference, cases=cases, **given
    )
