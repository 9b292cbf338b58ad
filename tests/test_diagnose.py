"""A mistake is named where it reproduces the numbers, and nobody is accused by coincidence."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from toys import BACKWARD, answer, backward, exercise_of, no_keepdims, no_row_sum

from attn_lessons.grading import catalogue
from attn_lessons.grading.exercise import Case, Mistake
from attn_lessons.normalization import layernorm_backward


def named(exercise, function):
    diagnosis = answer(exercise, function).diagnosis
    return diagnosis and diagnosis.mistake


def mistake(name, function):
    return Mistake(name, "why", "ch00.html#x", function)


@pytest.mark.parametrize("each", BACKWARD.mistakes, ids=lambda m: m.name)
def test_every_mistake_is_found_by_its_own_check(each):
    verdict = answer(BACKWARD, each.answer)
    assert verdict.diagnosis.mistake == each.name
    assert (verdict.diagnosis.why, verdict.diagnosis.section) == (each.why, each.section)


def test_in_the_learners_own_arithmetic():
    def loops(dp, p, axis=-1):
        dz = np.empty(p.shape)
        for index in np.ndindex(p.shape):
            dz[index] = dp[index] * p[index]
        return dz

    def single(dp, p, axis=-1):
        return dp.astype(np.float32) * p.astype(np.float32)

    assert named(BACKWARD, loops) == "row sum dropped"
    assert named(BACKWARD, single) == "row sum dropped"
    assert named(BACKWARD, lambda dp, p, axis=-1: (p * dp).tolist()) == "row sum dropped"


def test_one_case_that_fits_is_not_enough():
    def only_heads(dp, p, axis=-1):
        return (no_row_sum if p.ndim == 3 else backward)(dp, p, axis)

    verdict = answer(BACKWARD, only_heads)
    assert verdict.diagnosis.mistake is None
    assert verdict.diagnosis.observations


def test_the_second_draw_has_to_agree():
    calls = []

    def first_draw_only(dp, p, axis=-1):
        calls.append(1)
        return (no_row_sum if len(calls) <= 5 else backward)(dp, p, axis)

    assert named(BACKWARD, first_draw_only) is None


def test_the_same_exception_counts_only_beside_values():
    # Raises in every case: nothing says that it is the forgotten axis.
    assert named(BACKWARD, lambda dp, p, axis=-1: p @ np.ones((9, 9, 9))) is None

    def other_words_for_it(dp, p, axis=-1):
        return dp * p - p * np.add.reduce(p * dp, axis)

    assert named(BACKWARD, other_words_for_it) == "keepdims forgotten"


def test_another_exception_is_another_mistake():
    def other(dp, p, axis=-1):
        if p.ndim > 1:
            raise KeyError("p")
        return backward(dp, p, axis)

    assert named(BACKWARD, other) is None


def test_nan_and_infinity_are_part_of_the_numbers():
    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum()

    def no_max(z):
        return np.exp(z) / np.exp(z).sum()

    exercise = exercise_of(
        softmax,
        (np.array([0.0, 1.0, 2.0]),),
        (np.array([1e3, 0.0, 1e3]),),
        mistakes=(mistake("no maximum", no_max),),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named(exercise, no_max) == "no maximum"
        assert named(exercise, lambda z: np.exp(z) / sum(np.exp(z))) == "no maximum"
        clipped = lambda z: np.exp(np.minimum(z, 700)) / np.exp(np.minimum(z, 700)).sum()  # noqa: E731
        assert named(exercise, clipped) is None


def test_a_mistake_that_happens_to_be_right_is_never_named():
    exercise = replace(BACKWARD, mistakes=(mistake("no mistake", backward), *BACKWARD.mistakes))
    assert named(exercise, no_row_sum) == "row sum dropped"
    assert named(exercise, lambda dp, p, axis=-1: backward(dp, p, axis) * 3) is None


def test_of_two_that_fit_the_closer_is_named_then_the_first_listed():
    def off_by(size):
        return lambda x: x + size

    x = np.linspace(0.5, 1, 6)
    mistakes = tuple(mistake(f"{size}", off_by(size)) for size in (1e-2, 1.001e-2, 1e-2))
    exercise = exercise_of(lambda x: x, (x,), id="toy", mistakes=mistakes)
    assert named(exercise, off_by(1e-2)) == "0.01"
    assert named(exercise, off_by(1.001e-2)) == "0.01001"
    twins = (mistake("first", off_by(0.3)), mistake("second", off_by(0.3)))
    exercise = exercise_of(lambda x: x, (x,), id="toy", mistakes=twins)
    assert named(exercise, off_by(0.3)) == "first"


def test_a_small_difference_is_told_from_rounding():
    # The mistake is off by 1e-7, another wrong answer by 3e-7: near each other, yet not the same.
    x = np.linspace(0.5, 1, 6)
    exercise = exercise_of(
        lambda x: x, (x,), id="toy", mistakes=(mistake("small", lambda x: x + 1e-7),)
    )
    assert named(exercise, lambda x: x + 1e-7 * (1 + 1e-4)) == "small"
    assert named(exercise, lambda x: x + 3e-7) is None


def test_a_mistake_in_another_shape_or_build():
    def pair(x):
        return x.sum(), x

    mistakes = (
        mistake("order", lambda x: (x, x.sum())),
        mistake("only one", lambda x: x),
        mistake("row", lambda x: (x.sum(keepdims=True), x)),
    )
    x = np.arange(12.0).reshape(3, 4)
    exercise = exercise_of(pair, (x,), returns=("sum", "x"), mistakes=mistakes)
    assert named(exercise, lambda x: [x, x.sum()]) == "order"
    assert named(exercise, lambda x: x + 0) == "only one"
    assert named(exercise, lambda x: (x.sum(keepdims=True), x)) == "row"
    assert named(exercise, lambda x: None) is None


def test_a_mutation_is_named_where_all_else_is_right():
    def in_place(dp, p, axis=-1):
        dp -= (dp * p).sum(axis=axis, keepdims=True)
        return dp * p

    verdict = answer(BACKWARD, in_place)
    assert verdict.status == "failed"
    assert verdict.diagnosis.mistake == "changes its input"
    assert "dp" in verdict.diagnosis.why

    def wrong_and_in_place(dp, p, axis=-1):
        dp *= p
        return dp

    assert named(BACKWARD, wrong_and_in_place) == "row sum dropped"


def test_a_mistake_may_be_the_mutation_itself():
    def restore_forgotten(x):
        x[0] += 1e-5
        return x * 2 - np.eye(len(x))[0] * 2e-5

    exercise = exercise_of(
        lambda x: x * 2,
        (np.array([1.0, 2.0]),),
        id="toy",
        mistakes=(mistake("x not restored", restore_forgotten),),
    )
    assert named(exercise, restore_forgotten) == "x not restored"

    def other_values(x):
        x[0] += 1e-5
        return x * 3

    assert named(exercise, other_values) is None


def test_a_mistake_that_crashes_does_no_harm():
    def crashes(dp, p, axis=-1):
        raise SystemExit

    def warns(dp, p, axis=-1):
        warnings.warn("loud", UserWarning, stacklevel=1)
        return np.log(dp) / 0

    exercise = replace(BACKWARD, mistakes=(mistake("a", crashes), mistake("b", warns)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named(exercise, no_row_sum) is None
        assert named(exercise, warns) == "b"


def test_defaults_and_keywords_reach_the_mistake():
    calls = [Case("default", (np.ones(3),)), Case("given", (np.ones(3),), {"scale": 2.0})]
    exercise = exercise_of(
        lambda x, scale=1.0: x * scale,
        id="toy",
        cases=lambda rng: calls,
        mistakes=(mistake("scale ignored", lambda x, scale=1.0: x),),
    )
    verdict = answer(exercise, lambda x, scale=1.0: x)
    assert verdict.diagnosis.mistake == "scale ignored"
    assert verdict.cases_passed == ("default",)


def test_no_known_mistake_of_the_toys_is_named_for_a_right_answer():
    for function in (
        backward,
        lambda dp, p, axis=-1: dp * p - p * (p * dp).sum(axis, keepdims=True),
    ):
        verdict = answer(BACKWARD, function)
        assert verdict.status == "passed"
        assert verdict.diagnosis is None
    assert no_keepdims is BACKWARD.mistakes[1].answer


def test_parts_that_are_right_may_be_rounded_in_another_way():
    """dgamma is right in both, and near an offset of 10000 they differ by more than a rounding."""
    gamma_last = catalogue.find("layernorm_backward")

    def with_the_library(dy, x, gamma, eps=1e-5):
        plain, dgamma, dbeta = layernorm_backward(dy, x, np.ones_like(gamma), eps)
        return gamma * plain, dgamma, dbeta

    def with_the_last_digits_off(dy, x, gamma, eps=1e-5):
        dx, dgamma, dbeta = with_the_library(dy, x, gamma, eps)
        return dx, dgamma * (1 + 1e-4), dbeta

    assert named(gamma_last, with_the_library) == "gamma applied last"
    assert named(gamma_last, with_the_last_digits_off) is None
