"""What the kernel's side reports of a call: values, exceptions with the line, changed arguments."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

from attn_lessons.grading import learner


def test_the_function_gets_fresh_writeable_copies():
    given = np.arange(6.0).reshape(2, 3).T
    given.setflags(write=False)
    seen = []
    learner.call(lambda z: seen.append(z), (given,))
    assert seen[0] is not given
    assert seen[0].flags.writeable
    assert seen[0].strides == given.strides


def test_a_changed_argument_is_named():
    def spoil(dp, p, axis=-1):
        p *= 2
        return dp

    got = learner.call(spoil, (np.ones(2), np.ones(2)), {"axis": 0}, ("dp", "p", "axis"))
    assert got.mutated == ("p",)


def test_changes_inside_containers_and_keywords_are_seen():
    def spoil(grads, extra):
        grads["w"][0] = 7
        extra.append(1)

    got = learner.call(spoil, ({"w": np.zeros(2)},), {"extra": []}, ("grads",))
    assert got.mutated == ("grads", "extra")


def test_nan_that_stays_is_no_change():
    assert learner.call(lambda z: z, (np.array([np.nan]),), {}, ("z",)).mutated == ()


def test_an_exception_is_told_with_the_learners_line():
    def answer(z):
        return z @ np.ones(3)

    got = learner.call(answer, (np.ones(2),))
    assert got.error == "ValueError"
    assert "return z @ np.ones(3)" in got.error_message


@pytest.mark.parametrize("ending", [SystemExit(0), GeneratorExit(), BaseException("x")])
def test_whatever_is_raised_is_an_outcome(ending):
    def answer():
        raise ending

    assert learner.call(answer, ()).error == type(ending).__name__


def test_an_interrupt_gets_through():
    def answer():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.call(answer, ())


def test_warnings_of_an_answer_are_its_own_affair():
    def answer(z):
        warnings.warn("careful", stacklevel=1)
        return np.exp(z)

    assert np.isinf(learner.call(answer, (np.array([1e4]),)).value).all()


def test_tensors_become_arrays():
    torch = pytest.importorskip("torch")
    asked = torch.ones(2, requires_grad=True)
    assert isinstance(learner.plain(asked * 2), np.ndarray)
    assert learner.plain(torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32
    assert isinstance(learner.plain((asked, 1.0))[0], np.ndarray)


def test_an_answer_from_a_torch_function_does_not_warn():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = learner.call(lambda z: torch.softmax(torch.from_numpy(z), -1), (np.ones(3),))
    assert got.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [object(), np, [object()], np.array(["x"])])
def test_what_holds_no_numbers_is_an_error_of_the_answer(value):
    got = learner.call(lambda: value, ())
    assert got.error == "TypeError"
    assert "arrays of numbers" in got.error_message


def test_the_kernels_side_never_loads_the_catalogue():
    code = (
        "import sys; from attn_lessons.grading import learner, warm; out = sys.stdout;"
        "learner.quiet(); from attn_lessons import check; check('softmax', 1);"
        "print([m for m in sys.modules if 'catalogue' in m or 'grading.check' in m], file=out)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_entry_of_another_kind_is_a_change():
    for entry in (None, 3, np.zeros(2)):
        returned = learner.call(lambda names, to=entry: names.__setitem__(0, to), ([["a"]],))
        assert returned.mutated == ("argument 1",)
