"""Observations state what the numbers show, in every failing case, and no more."""

import numpy as np
import pytest
from toys import BACKWARD, PRODUCT, answer, backward, exercise_of, product

from attn_lessons.grading.exercise import Case, Mistake
from attn_lessons.grading.relations import carried


def seen(exercise, function):
    verdict = answer(exercise, function)
    assert verdict.status != "passed"
    assert verdict.diagnosis.mistake is None
    return verdict.diagnosis.observations


def test_a_constant_factor():
    assert seen(BACKWARD, lambda *a, **k: 2 * backward(*a, **k))[0] == (
        "dz is 2 times what it should be"
    )
    assert seen(BACKWARD, lambda *a, **k: -backward(*a, **k))[0] == (
        "dz has the opposite sign and is right otherwise"
    )
    assert seen(BACKWARD, lambda *a, **k: -0.3 * backward(*a, **k))[0] == (
        "dz is -0.3 times what it should be"
    )


def test_a_factor_is_known_by_the_sizes_of_the_call():
    def by_rows(dy, x, w):
        dx, grads, size = product(dy, x, w)
        return dx / np.sqrt(w.shape[0]), {**grads, "w": grads["w"] / len(x)}, size

    facts = seen(PRODUCT, by_rows)
    assert facts[0] == "grads['b'] and size are right in every case, only dx and grads['w'] not"
    assert facts[1] == (
        "dx is 1/sqrt(x.shape[-1]) times what it should be (0.5 in the case “wide”)"
    )
    assert facts[2].startswith("grads['w'] is 1/dy.shape[-2] times what it should be (0.3333")


def test_a_factor_that_fits_one_case_only_is_not_called_constant():
    facts = seen(BACKWARD, lambda dp, p, axis=-1: backward(dp, p, axis) * (1 + p.size % 5))
    assert not any("times" in fact for fact in facts if "in the case" not in fact)


def test_a_factor_named_by_a_number_that_was_passed():
    def scaled(x, rate=0.25):
        return x / (1 - rate)

    cases = [
        Case("a", (np.arange(1.0, 6.0),), {"rate": 0.2}),
        Case("b", (np.arange(1.0, 5.0),), {"rate": 0.4}),
    ]
    exercise = exercise_of(scaled, cases=lambda rng: cases)
    assert seen(exercise, lambda x, rate: x)[0] in (
        "y is the argument x, unchanged",
        "y is (1 - rate) times what it should be (0.8 in the case “a”)",
    )
    assert "y is (1 - rate) times what it should be (0.8 in the case “a”)" in seen(
        exercise, lambda x, rate: x
    )


def test_outputs_in_each_others_place():
    def attention(q, k):
        return q @ k.T @ k, k @ q.T @ q

    rng = np.random.default_rng(0)
    inputs = [tuple(rng.normal(size=(2, 4, 3))) for _ in range(2)]
    exercise = exercise_of(attention, *inputs, returns=("dq", "dk"))
    facts = seen(exercise, lambda q, k: attention(q, k)[::-1])
    assert facts == ("dq holds what dk should be, and dk what dq should be: swapped",)


def test_one_of_several_outputs():
    def doubled(dy, x, w):
        dx, grads, size = product(dy, x, w)
        return dx, {**grads, "b": grads["b"] * 2}, size

    assert seen(PRODUCT, doubled) == (
        "dx, grads['w'] and size are right in every case, only grads['b'] not",
        "grads['b'] is 2 times what it should be",
    )


def test_only_some_cases():
    def last_axis(dp, p, axis=-1):
        return backward(dp, p)

    assert "only “axis 0” fails, the other cases are right" in seen(BACKWARD, last_axis)


def test_a_transpose():
    def transposed(dy, x, w):
        dx, grads, size = product(dy, x, w)
        return dx, {**grads, "w": grads["w"].T}, size

    facts = seen(PRODUCT, transposed)
    assert any("transpose" in fact for fact in facts)


def test_a_missing_and_an_extra_reduction():
    def unsummed(dy, x, w):
        dx, grads, size = product(dy, x, w)
        return dx, {**grads, "b": dy}, size

    assert any("reduction is missing" in fact for fact in seen(PRODUCT, unsummed))

    def overdone(dy, x, w):
        dx, grads, size = product(dy, x, w)
        return dx, {**grads, "w": grads["w"].sum(axis=0)}, size

    assert any("the sum of what is expected" in fact for fact in seen(PRODUCT, overdone))


def test_one_slice():
    def first_row_zero(dp, p, axis=-1):
        dz = backward(dp, p, axis)
        if dz.ndim == 2:
            dz[0] = 0
        return dz

    facts = seen(BACKWARD, first_row_zero)
    assert any("row 0 (the first)" in fact and "off" in fact for fact in facts)


def test_an_argument_handed_back_and_zeros():
    assert seen(BACKWARD, lambda dp, p, axis=-1: dp)[0] == "dz is the argument dp, unchanged"
    assert "every entry is 0" in seen(BACKWARD, lambda dp, p, axis=-1: 0 * dp)[0]


def test_no_return_statement():
    (fact,) = seen(BACKWARD, lambda dp, p, axis=-1: None)
    assert "return" in fact


def test_a_boolean_mask():
    def causal(n):
        return np.tril(np.ones((n, n), bool))

    exercise = exercise_of(causal, (4,), (6,))
    assert "False" in seen(exercise, lambda n: ~causal(n))[0]
    strict = seen(exercise, lambda n: np.tril(np.ones((n, n), bool), -1))
    assert strict[0] == "y is True only where it should be, but not everywhere there"
    assert any("diagonal" in fact for fact in strict)
    assert seen(exercise, lambda n: np.ones((n, n), bool))[0] == (
        "y is True wherever it should be, and elsewhere too"
    )


def test_precision_lost_on_the_way():
    def through_single(dp, p, axis=-1):
        return backward(dp.astype(np.float32), p.astype(np.float32), axis).astype(np.float64)

    facts = seen(BACKWARD, through_single)
    assert any("float32" in fact for fact in facts)
    assert any(
        "nearly" in f or "digits" in f
        for f in seen(BACKWARD, lambda dp, p, axis=-1: backward(dp, p, axis) + 1e-11)
    )


EXCEPTIONS = [
    (lambda dp, p, axis=-1: p.T @ np.ones((9, 9)), "last axis of a"),
    (lambda dp, p, axis=-1: np.dot(np.ones((3, 4)), np.ones((3, 4))), "np.dot multiplies matrices"),
    (lambda dp, p, axis=-1: p.sum(axis=7), "axis 7 does not exist in an array with 1 axes"),
    (lambda dp, p, axis=-1: undefined_name * p, "the name undefined_name means nothing"),
    (lambda dp, p, axis=-1: p if p > 0 else dp, "np.where"),
    (lambda dp: dp, "the function is called as backward(dp, p, axis=-1)"),
    (lambda dp, p: p * dp, "the function is called as backward(dp, p, axis=-1)"),
    (lambda dp, p, axis=-1: dp + np.ones(11), "(7,) and (11,) do not fit together"),
]


@pytest.mark.parametrize(("function", "words"), EXCEPTIONS)
def test_an_exception_in_plain_words(function, words):
    assert any(words in fact for fact in seen(BACKWARD, function))


def test_a_lost_axis_is_recognised_in_the_shapes():
    def lost(dp, p, axis=-1):
        if p.ndim == 1:
            raise ValueError("no vectors")
        return dp - (dp * p).sum(axis)

    facts = seen(
        BACKWARD, lambda dp, p, axis=-1: dp[None].repeat(3, 0) - dp[None].repeat(3, 0).sum(1)
    )
    assert any("keepdims=True" in fact for fact in facts)
    assert seen(BACKWARD, lost)


def test_a_mutation_is_mentioned_beside_the_rest():
    def wrong_and_in_place(dp, p, axis=-1):
        dp *= 2
        return dp + p

    assert any("changes its argument dp" in fact for fact in seen(BACKWARD, wrong_and_in_place))


def test_an_earlier_mistake_is_carried():
    early = Mistake("row sum dropped", "the normaliser moves too", "ch00.html#sum", lambda x: x)
    late = carried(early, "softmax_backward", lambda x: x * 2)
    assert late.name == "row sum dropped (in softmax_backward)"
    assert early.why in late.why
    exercise = exercise_of(lambda x: x * 3, (np.ones(3),), id="toy", mistakes=(late,))
    assert answer(exercise, lambda x: x + x).diagnosis.mistake == late.name


def test_signs_and_sides():
    assert "dz is right in size everywhere, but not in sign" in seen(
        BACKWARD, lambda dp, p, axis=-1: np.abs(backward(dp, p, axis))
    )

    # Only imprecise: nothing is said of signs.
    coarse = seen(BACKWARD, lambda dp, p, axis=-1: backward(dp, p, axis) * (1 + 1e-9))
    assert coarse
    assert not any("sign" in fact for fact in coarse)

    def largest(x):
        return float(np.max(x) - np.min(x))

    rng = np.random.default_rng(2)
    exercise = exercise_of(largest, (rng.normal(size=5),), (rng.normal(size=8),))
    assert seen(exercise, lambda x: float(np.mean(x)) / 9)[0] == "y is smaller than it should be"
    assert seen(exercise, lambda x: 9 + np.max(x) ** 2)[0] == "y is larger than it should be"
    assert seen(exercise, lambda x: -largest(x))[0] == (
        "y has the opposite sign and is right otherwise"
    )


def test_nothing_is_said_where_nothing_holds():
    rng = np.random.default_rng(1)
    assert seen(BACKWARD, lambda dp, p, axis=-1: rng.normal(size=p.shape)) == ()


ORDER = ("grads['dw']", "grads['db']")


def test_an_output_that_only_some_cases_have_is_told_of_in_those():
    def backward_of(x):
        grads = {"dw": 2 * x, "db": x + 1}
        return grads if len(x) > 2 else {"dw": grads["dw"]}

    def halved(x):
        return {name: grad / 2 for name, grad in backward_of(x).items()}

    rng = np.random.default_rng(5)
    cases = (rng.normal(size=2),), (rng.normal(size=5),)
    exercise = exercise_of(backward_of, *cases, returns=("grads",), order=ORDER)
    assert any("the first wrong one on the way back is" in fact for fact in seen(exercise, halved))
