"""Right or wrong: every right answer passes, every wrong one is told the first fact that is off."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from toys import BACKWARD, PRODUCT, answer, backward, exercise_of, product

from attn_lessons.grading import compare, learner
from attn_lessons.grading.compare import fault, mismatch
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.records import Returned


def plain(value):
    return learner.call(lambda: value, ()).value


def told(got, want, **fields):
    """The message about ``got`` where ``want`` is expected, None where it is right."""
    exercise = exercise_of(lambda: want, id="toy", **fields)
    found = mismatch(plain(got), want, exercise, Case("a case", ()))
    return found and found.message


M = np.arange(12.0).reshape(3, 4) / 8

RIGHT = [
    (M, M.copy()),
    (M, M.tolist()),
    (M, tuple(map(tuple, M))),
    (M, torch.from_numpy(M.copy()).requires_grad_()),
    (M, M.astype(np.float32)),
    (M, np.asfortranarray(M)),
    (M, M + 0j),
    (M, np.ma.array(M)),
    (0.25, 0.25),
    (0.25, np.float64(0.25)),
    (0.25, np.array(0.25)),
    (0.25, np.float32(0.25)),
    (np.array(0.25), 0.25),
    (torch.tensor(0.25).double(), 0.25),
    (3, 3),
    (3, 3.0),
    (3, np.int32(3)),
    (np.arange(4), np.arange(4.0)),
    (np.arange(4.0), np.arange(4)),
    (True, np.True_),
    (np.array([True, False]), [True, False]),
    ("dq", "dq"),
    (None, None),
    ((M, 1.0), [M, 1.0]),
    ((M, M), np.stack((M, M))),
    ({"w": M, "b": 1.0}, {"b": 1.0, "w": M}),
    (np.nan, np.nan),
    (np.array([-np.inf, 0.0]), [-np.inf, 0.0]),
    (np.zeros((0, 3)), np.zeros((0, 3))),
]


@pytest.mark.parametrize(("want", "got"), RIGHT)
def test_right_in_any_style(want, got):
    want = plain(want) if isinstance(want, torch.Tensor) else want
    assert told(got, want) is None


WRONG = [
    (M, M.T, "y: shape (4, 3), expected (3, 4)"),
    (M, M[None], "y: shape (1, 3, 4), expected (3, 4): is there a comma too many after return?"),
    (0.5, [0.5], "y: shape (1,), expected ()"),
    (M, None, "y is None, expected one array of shape (3, 4): is the return statement missing?"),
    (M, "M", "y is 'M', expected one array of shape (3, 4)"),
    (M, {"a": M}, "y is a dict with 'a', expected one array of shape (3, 4)"),
    (M, (M, M[0]), "y is 2 values, expected one array of shape (3, 4)"),
    (None, M, "y is one array of shape (3, 4), expected None"),
    ("dq", None, "y is None, expected 'dq'"),
    ("dq", 1, "y is 1, expected 'dq'"),
    (None, 0.5, "y is 0.5, expected None"),
    ("dq", "dk", "y is 'dk', expected 'dq'"),
    (True, 1, "y: dtype int64, expected bool"),
    (1.0, True, "y: dtype bool, expected float64"),
    (3, 3.5, "y is 3.5, expected 3 (has to be exact)"),
    (
        np.array([True, False]),
        [True, True],
        "y[1] is True, expected False (1 of 2 entries off, this one most)",
    ),
    (0.5, np.nan, "y is nan, expected 0.5"),
    (M, np.where(M > 1, np.nan, M), "y[2, 1] is nan, expected 1.125 (3 of 12 entries like this)"),
    (np.array([0.0, -np.inf]), [0.0, -800.0], "y[1] is -800, expected -inf"),
    (np.array([0.0, np.inf]), [0.0, -np.inf], "y[1] is -inf, expected inf"),
    (np.nan, 0.0, "y is 0, expected nan"),
    (1.0, 1.0 + 1e-9, "y is 1.000000001, expected 1 (relative error 1e-09, allowed 6e-14)"),
    (
        M,
        np.where(M == 1, 3, M),
        "y[2, 0] is 3, expected 1 (1 of 12 entries off, this one most; relative error 1.5, "
        "allowed 2e-13)",
    ),
]


@pytest.mark.parametrize(("want", "got", "message"), WRONG)
def test_wrong_is_told_the_fact(want, got, message):
    assert told(got, want).startswith(message)


def test_outputs_are_named():
    names = {"returns": ("loss", "grads")}
    want = (1.0, {"wq": M, "bq": M[0]})
    assert told(1.0, want, **names) == "returned one number, expected 2 values (loss, grads)"
    assert told((1.0,), want, **names) == "returned 1 value, expected 2 values (loss, grads)"
    assert "expected 2 values (loss, grads): is the return" in told(None, want, **names)
    assert told((1.0, {"wq": M, "bk": M[0]}), want, **names) == (
        "grads lacks 'bq' and has 'bk', which nobody asked for"
    )
    assert told((1.0, M), want, **names) == (
        "grads is one array of shape (3, 4), expected a dict with 'wq', 'bq'"
    )
    wrong = (1.0, {"bq": M[0], "wq": 2 * M})
    assert told(wrong, want, **names).startswith("grads['wq'][2, 3] is 2.75, expected 1.375")


def test_structure_comes_before_shape_before_finiteness_before_values():
    names = {"returns": ("a", "b")}
    want = (M, M)
    assert told((M * 2, M.T), want, **names).startswith("b: shape")
    assert told((M * 2, M * np.nan), want, **names).startswith("b[0, 0] is nan")
    assert told((M.T, None), want, **names).startswith("b is None")
    assert told((M * 2, M + 1), want, **names).startswith("a[2, 3]")


def test_raising_and_mutation():
    case, right = Case("a case", (M,), hint="about it"), Returned(M)
    exercise = exercise_of(lambda x: x, id="toy")
    raised = fault(Returned(error="ValueError", error_message="no"), right, exercise, case)
    assert (raised.kind, raised.message, raised.hint) == ("raised", "ValueError: no", "about it")
    changed = fault(Returned(M, mutated=("x",)), right, exercise, case)
    assert changed.kind == "mutated"
    assert "argument x" in changed.message
    assert fault(Returned(2 * M, mutated=("x",)), right, exercise, case).kind == "values"


def test_an_expected_error_has_to_be_raised():
    case, exercise = Case("bad input", ()), exercise_of(lambda: None, id="toy")
    want = Returned(error="ValueError", error_message="x: expected …")
    assert fault(Returned(error="ValueError"), want, exercise, case) is None
    assert fault(Returned(error="TypeError"), want, exercise, case).kind == "raised"
    silent = fault(Returned(1.0), want, exercise, case)
    assert silent.message == "nothing was raised, expected ValueError: x: expected …"


def test_float32_only_where_it_is_allowed():
    def single(dp, p, axis=-1):
        return backward(dp.astype(np.float32), p.astype(np.float32), axis)

    assert answer(BACKWARD, single).status == "passed"
    strict = Exercise(**{**vars(BACKWARD), "float32_allowed": False})
    verdict = answer(strict, single)
    assert verdict.status == "failed"
    assert "the result is float32" in verdict.message


def test_half_precision_is_held_to_single():
    def half(dp, p, axis=-1):
        return backward(dp.astype(np.float16), p.astype(np.float16), axis)

    assert answer(BACKWARD, half).status == "failed"


def test_cancellation_is_allowed_what_its_inputs_rounding_is():
    # log(x) near 1 loses digits: a float32 x is off by up to 6e-8, and so is the result.
    exercise = exercise_of(lambda x: np.log(x) * 1e3, (np.array([1.0001, 0.99995]),), id="toy")
    assert answer(exercise, lambda x: 1e3 * np.log(x.astype(np.float32))).status == "passed"
    assert answer(exercise, lambda x: 1e3 * np.log1p(x - 1)).status == "passed"
    assert answer(exercise, lambda x: 1e3 * (x - 1)).status == "failed"


def test_a_large_shift_inside_an_exponent_costs_digits_and_passes():
    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum()

    def through_logsumexp(z):
        return np.exp(z - (z.max() + np.log(np.exp(z - z.max()).sum())))

    rng = np.random.default_rng(4)
    inputs = [(1e4 + rng.normal(size=6),) for _ in range(200)]
    exercise = exercise_of(softmax, *inputs)
    assert max(np.abs(softmax(z) - through_logsumexp(z)).max() for (z,) in inputs) > 2e-13
    assert answer(exercise, through_logsumexp).status == "passed"
    assert answer(exercise, lambda z: softmax(z) * (1 + 1e-9)).status == "failed"


def test_a_gradient_that_is_zero_may_be_rounding_error():
    ones = np.full((3, 4), 0.25)
    constant = np.full((3, 4), 1e4 / 3)
    exercise = exercise_of(backward, (constant, ones), id="toy")

    def other(dp, p, axis=-1):
        jacobian = np.einsum("bi,ij->bij", p, np.eye(4)) - np.einsum("bi,bj->bij", p, p)
        return np.einsum("bij,bj->bi", jacobian, dp) + 1e-13

    assert answer(exercise, other).status == "passed"
    assert answer(exercise, lambda dp, p, axis=-1: p * dp).status == "failed"


def test_a_cases_own_tolerance_replaces_the_derived_one():
    exercise = exercise_of(lambda x: x, id="toy")
    loose = Case("loose", (M,), rtol=1e-6)
    assert mismatch(M * (1 + 5e-7), M, exercise, loose) is None
    assert mismatch(M * (1 + 5e-6), M, exercise, loose).tolerance == pytest.approx(1e-6)
    absolute = Case("absolute", (M,), atol=1e-3)
    assert mismatch(M + 9e-4, M, exercise, absolute) is None
    assert mismatch(M + 2e-3, M, exercise, absolute) is not None


def test_tolerance_grows_with_size_and_follows_the_dtype():
    def rtol(n, dtype):
        x = np.ones(n, dtype)
        exercise = exercise_of(lambda x: x, id="toy")
        return compare.tolerance(compare.Leaf("y", x, x), exercise, Case("", (x,))).rtol

    eps = np.finfo(np.float64).eps
    assert rtol(1, np.float64) == pytest.approx(256 * eps)
    assert rtol(10_000, np.float64) == pytest.approx(25_600 * eps)
    assert rtol(1, np.float32) == pytest.approx(256 * float(np.finfo(np.float32).eps))


@pytest.mark.parametrize("n", [10, 1000, 30_000])
def test_any_summation_order_passes(n):
    x = np.random.default_rng(n).normal(size=n)
    exercise = exercise_of(lambda x: x.cumsum(), (x,), id="toy")

    def backwards(x):
        total = x[::-1].cumsum()[::-1]
        return total[0] - np.append(total[1:], 0.0)

    assert answer(exercise, backwards).status == "passed"


@given(
    hnp.arrays(np.float64, hnp.array_shapes(max_dims=4, max_side=4), elements=st.floats(-1e3, 1e3)),
    st.floats(1e-9, 1e3),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_one_entry_off_is_found_and_named(want, size, data):
    where = tuple(data.draw(st.integers(0, n - 1)) for n in want.shape)
    got = want.copy()
    got[where] += size * max(1.0, float(np.abs(want).max()))
    found = mismatch(got, want, exercise_of(lambda: want, id="toy"), Case("a case", ()))
    assert found.kind == "values"
    assert found.where == where
    assert mismatch(want.copy(), want, exercise_of(lambda: want, id="t"), Case("c", ())) is None


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | hnp.arrays(
        st.sampled_from([np.float64, np.float32, np.int8, np.bool_, np.complex128]),
        hnp.array_shapes(min_dims=0, max_dims=3, max_side=4, min_side=0),
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from(["w", "b", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(anything)
@settings(max_examples=150, deadline=None)
def test_whatever_is_returned_gets_a_verdict(value):
    for exercise in (BACKWARD, PRODUCT):
        verdict = answer(exercise, lambda *args, **kwargs: value)
        assert verdict.status in ("failed", "error")
        assert verdict.message


def test_one_array_is_no_pair_with_a_tuple_in_it():
    message = told(np.stack((M, M)), (M, (M, M[0], 3)))
    assert message.startswith("returned one array of shape (2, 3, 4), expected 2 values")


def test_product_passes_in_other_styles():
    def loops(dy, x, w):
        dw = sum(np.outer(a, b) for a, b in zip(x, dy, strict=True))
        grads = {"b": np.add.reduce(dy), "w": dw}
        return [np.einsum("nd,cd->nc", dy, w), grads, np.array(1.5 * np.vdot(dy, dy))]

    def torched(dy, x, w):
        dy, x, w = (torch.from_numpy(a) for a in (dy, x, w))
        x, w, b = x.requires_grad_(), w.requires_grad_(), torch.zeros(w.shape[1]).double()
        y = x @ w + b.requires_grad_()
        dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
        return dx, {"w": dw, "b": db}, 1.5 * dy.square().sum()

    for function in (product, loops, torched):
        assert answer(PRODUCT, function).status == "passed"


def test_a_signalling_nan_is_not_finite_and_warns_of_nothing():
    signalling = np.array([0x7F800001], np.uint32).view(np.float32)
    verdict = answer(exercise_of(lambda x: x * 2, (np.ones(1, np.float32),)), lambda x: signalling)
    assert verdict.status == "failed"
