"""The first wrong value on the way, solved from what an answer returned."""

import numpy as np
import pytest
from toys import answer, exercise_of

from attn_lessons.grading.catalogue._parts import left_factor, right_factor
from attn_lessons.grading.exercise import Case, Intermediate


def weights(dout, v):
    return dout @ v.swapaxes(-1, -2)


def logits(dout, v):
    dprobs = weights(dout, v)
    return dprobs - dprobs.mean(axis=-1, keepdims=True)


def gradients(dout, v, q, k):
    dlogits = logits(dout, v)
    return dlogits @ k, dlogits.swapaxes(-1, -2) @ q


def swapped(x):
    return None if x is None else x.swapaxes(-1, -2)


def cases(rng):
    def call(n_q, n_k, d, d_v):
        shapes = ((2, n_q, d_v), (2, n_k, d_v), (2, n_q, d), (2, n_k, d))
        return tuple(rng.normal(size=shape) for shape in shapes)

    return [Case("short", call(2, 3, 7, 5)), Case("long", call(9, 8, 3, 4))]


EXERCISE = exercise_of(
    gradients,
    cases=cases,
    returns=("dq", "dk"),
    intermediates=(
        Intermediate(
            "dlogits",
            lambda dout, v, q, k: logits(dout, v),
            {
                "dq": lambda dq, dout, v, q, k: left_factor(dq, k),
                "dk": lambda dk, dout, v, q, k: swapped(left_factor(dk, q)),
            },
        ),
    ),
)


def said(function):
    verdict = answer(EXERCISE, function)
    assert verdict.status == "failed"
    assert verdict.diagnosis.mistake is None
    return verdict.diagnosis.observations


def test_a_right_answer_passes():
    assert answer(EXERCISE, gradients).status == "passed"


def test_two_outputs_made_of_the_same_wrong_value():
    def no_mean(dout, v, q, k):
        dlogits = 3 * weights(dout, v) + 1
        return dlogits @ k, dlogits.swapaxes(-1, -2) @ q

    assert said(no_mean)[0] == (
        "first wrong on the way: dq and dk were made of the same wrong dlogits"
    )


def test_what_is_known_about_it_follows():
    def doubled(dout, v, q, k):
        dlogits = 2 * logits(dout, v)
        return dlogits @ k, dlogits.swapaxes(-1, -2) @ q

    assert said(doubled)[:2] == (
        "first wrong on the way: dq and dk were made of the same wrong dlogits",
        "dlogits is 2 times what it should be",
    )


def test_one_output_wrong_after_it():
    def scaled(dout, v, q, k):
        dq, dk = gradients(dout, v, q, k)
        return dq, 0.3 * dk

    assert said(scaled)[0] == "dlogits is right, as dq shows: dk goes wrong after it"


def test_outputs_that_contradict_each_other_say_nothing():
    def apart(dout, v, q, k):
        dq, dk = gradients(dout, v, q, k)
        return 2 * dq, 0.3 * dk

    assert not any("dlogits" in fact for fact in said(apart))


def test_an_output_that_is_no_such_product_says_nothing():
    rng = np.random.default_rng(5)

    def noise(dout, v, q, k):
        return rng.normal(size=q.shape), rng.normal(size=k.shape)

    assert not any("dlogits" in fact for fact in said(noise))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_says_nothing(bad):
    def broken(dout, v, q, k):
        dq, dk = gradients(dout, v, q, k)
        return dq * bad, dk * bad

    assert not any("dlogits" in fact for fact in said(broken))


def test_factors_come_back():
    rng = np.random.default_rng(1)
    x, right = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 4, 6))
    assert np.allclose(left_factor(x @ right, right), x, rtol=1e-12, atol=1e-12)
    left, y = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 4, 3))
    assert np.allclose(right_factor(left, left @ y), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "right",
    [
        np.ones((4, 6)),  # rank 1: many factors
        np.random.default_rng(0).normal(size=(6, 4)),  # more rows than columns
        np.ones((0, 4)),
        np.zeros((2, 4)),  # any factor gives 0
        np.full((2, 4), np.nan),
    ],
)
def test_no_factor_where_it_is_not_determined(right):
    product = np.ones((3, right.shape[1]))
    assert left_factor(product, right) is None


def test_no_factor_of_what_is_no_product():
    rng = np.random.default_rng(2)
    assert left_factor(rng.normal(size=(3, 6)), rng.normal(size=(2, 6))) is None
    assert right_factor(np.ones(3), np.ones(3)) is None
