"""``check`` as a learner meets it: in a notebook, in a terminal, and used wrongly."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from toys import BACKWARD, answer, backward, exercise_of, no_row_sum

from attn_lessons.grading import catalogue, seeds
from attn_lessons.grading import check as module
from attn_lessons.grading.check import CheckFailed, attempt, check, judge, make_draws
from attn_lessons.grading.exercise import Case
from attn_lessons.grading.records import Returned


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    known = {"backward": BACKWARD}

    def find(exercise_id):
        if exercise_id in known:
            return known[exercise_id]
        raise ValueError(f"exercise_id: no exercise is called {exercise_id!r}")

    monkeypatch.setattr(catalogue, "find", find)


def test_a_right_answer_is_shown_alike_every_time():
    first, second = check("backward", backward), check("backward", backward)
    assert repr(first) == repr(second)
    assert first._repr_html_() == second._repr_html_()
    assert repr(first).splitlines()[0].startswith("backward: passed")
    assert first.judgement.points == 2
    assert first.judgement.cases_passed == ("one row", "a batch", "axis 0", "heads", "zeros")


def test_a_wrong_answer_raises_with_the_feedback_as_its_text():
    with pytest.raises(CheckFailed, match="row sum dropped") as caught:
        check("backward", no_row_sum)
    assert isinstance(caught.value, AssertionError)
    assert "First case that fails: one row" in str(caught.value)
    assert caught.value._render_traceback_() == ["backward: row sum dropped"]


def test_random_state_and_numpy_settings_are_left_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    with np.errstate(all="raise"):
        check("backward", backward)
        with pytest.raises(CheckFailed):
            check("backward", lambda dp, p, axis=-1: np.log(dp) / 0)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_an_answer_that_uses_randomness_or_prints_is_no_trouble(capsys):
    rng = np.random.default_rng()

    def shuffled(dp, p, axis=-1):
        rng.normal(size=3)
        return backward(dp, p, axis)

    assert check("backward", shuffled).judgement.status == "passed"
    assert capsys.readouterr() == ("", "")


def test_wrong_use_is_one_clear_line():
    with pytest.raises(ValueError, match="no exercise is called 'forward'") as unknown:
        check("forward", backward)
    assert len(unknown.value._render_traceback_()) == 1
    with pytest.raises(ValueError, match="function: expected backward itself") as value:
        check("backward", np.ones((2, 3)))
    assert "got ndarray of shape (2, 3)" in str(value.value)
    with pytest.raises(ValueError, match="got NoneType"):
        check("backward", None)


def test_the_books_catalogue_suggests_the_nearest(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="did you mean softmax_backward"):
        check("softmax_backwards", backward)


def test_an_unsolved_stub_is_calm():
    def stub(dp, p, axis=-1):
        raise NotImplementedError("write softmax's backward pass")

    verdict = answer(BACKWARD, stub)
    assert (verdict.status, verdict.message) == ("error", "not solved yet")
    assert verdict.diagnosis is None
    with pytest.raises(CheckFailed, match=r"^backward: not solved yet$"):
        check("backward", stub)


def test_statuses_and_points():
    assert answer(BACKWARD, backward).points == 2
    wrong = answer(BACKWARD, no_row_sum)
    assert (wrong.status, wrong.points, wrong.max_points) == ("failed", 0, 2)
    assert wrong.message.startswith("one row: dz[")
    raising = answer(BACKWARD, lambda dp, p, axis=-1: 1 / 0)
    assert raising.status == "error"
    assert raising.message.startswith("one row: ZeroDivisionError: division by zero")

    def exits(dp, p, axis=-1):
        sys.exit(3)

    assert answer(BACKWARD, exits).message.startswith("one row: SystemExit")


def test_ctrl_c_stops_the_check():
    def interrupted(dp, p, axis=-1):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("backward", interrupted)


def test_every_case_is_tried_on_two_draws_and_a_case_passes_only_in_both():
    calls = []

    def second_draw_wrong(dp, p, axis=-1):
        calls.append(p)
        return backward(dp, p, axis) * (2 if len(calls) == 6 else 1)

    verdict = answer(BACKWARD, second_draw_wrong)
    assert len(calls) == 10
    assert not np.array_equal(calls[0], calls[5])
    assert verdict.mismatch.case == "one row"
    assert verdict.cases_passed == ("a batch", "axis 0", "heads", "zeros")


def test_arguments_are_fresh_and_writeable_for_every_call():
    def scribbles_on_a_copy(dp, p, axis=-1):
        assert dp.flags.writeable
        assert p.flags.writeable
        return backward(dp, p, axis)

    assert answer(BACKWARD, scribbles_on_a_copy).status == "passed"

    def scribbles_at_last(dp, p, axis=-1):
        dz = backward(dp, p, axis)
        p[...] = 0
        return dz

    verdict = answer(BACKWARD, scribbles_at_last)
    assert verdict.mismatch.kind == "mutated"
    assert verdict.cases_passed == ()


def test_an_argument_handed_back_is_compared_as_it_came():
    exercise = exercise_of(lambda x: x + 1, (np.zeros(3),), id="toy")

    def in_place(x):
        x += 1
        return x

    assert answer(exercise, in_place).mismatch.kind == "mutated"


def test_judge_needs_one_result_a_case():
    draws = make_draws(BACKWARD, seeds.check_seeds("backward"))
    returned = [[attempt(backward, BACKWARD, case) for case in cases] for cases in draws]
    assert judge(BACKWARD, draws, returned).status == "passed"
    with pytest.raises(ValueError, match=r"returned: expected \[5, 5\] results"):
        judge(BACKWARD, draws, returned[:1])
    with pytest.raises(ValueError, match="returned: expected"):
        judge(BACKWARD, draws, [returned[0], returned[1][:-1]])


def test_judge_holds_answers_against_the_oracle():
    exercise = replace(BACKWARD, oracle=lambda dp, p, axis=-1: 2 * backward(dp, p, axis))
    assert answer(exercise, backward).status == "failed"
    assert answer(exercise, exercise.oracle).status == "passed"


def test_an_error_that_is_expected_has_to_be_raised():
    def strict(x):
        if x.ndim != 1:
            raise ValueError(f"x: expected a vector; got {x.shape}")
        return x * 2

    exercise = exercise_of(strict, (np.ones(3),), (np.ones((2, 3)),))
    assert answer(exercise, strict).status == "passed"
    silent = answer(exercise, lambda x: x * 2)
    assert silent.status == "error"
    assert "nothing was raised, expected ValueError" in silent.message


def test_a_broken_reference_is_not_the_learners_fault():
    exercise = exercise_of(lambda x: 1 / 0, (np.ones(3),), id="toy")
    with pytest.raises(RuntimeError, match="the reference of toy fails in case 'case 0'"):
        answer(exercise, lambda x: x)


def test_seeds_are_stable_for_a_check_and_secret_for_a_grade():
    def numbers(sequences):
        return [np.random.default_rng(s).integers(2**62) for s in sequences]

    assert numbers(seeds.check_seeds("softmax")) == numbers(seeds.check_seeds("softmax"))
    drawn = {
        tuple(numbers(sequences))
        for sequences in (
            seeds.check_seeds("softmax"),
            seeds.check_seeds("log_softmax"),
            seeds.secret_seeds(1, "a/ch01.ipynb", "softmax"),
            seeds.secret_seeds(2, "a/ch01.ipynb", "softmax"),
            seeds.secret_seeds(1, "b/ch01.ipynb", "softmax"),
            seeds.secret_seeds(1, "a/ch01.ipynb", "log_softmax"),
            seeds.secret_seeds(0, "softmax", ""),
        )
    }
    assert len(drawn) == 7
    assert all(len(set(pair)) == 2 for pair in drawn)
    same = seeds.secret_seeds(2**200, "a", "b")
    assert numbers(same) == numbers(seeds.secret_seeds(2**200, "a", "b"))
    with pytest.raises(ValueError, match="seed: expected an integer of at least 0; got -1"):
        seeds.secret_seeds(-1, "a", "b")


# ------------------------------------------------------------------------------ in a notebook


@pytest.fixture
def shell():
    shell = InteractiveShell.instance()
    shell.user_ns.update(check=check, backward=backward, no_row_sum=no_row_sum, np=np)
    yield shell
    InteractiveShell.clear_instance()


def test_in_a_notebook_the_feedback_is_displayed_and_the_traceback_is_one_line(shell):
    with capture_output() as captured:
        result = shell.run_cell('check("backward", no_row_sum)')
    assert isinstance(result.error_in_exec, CheckFailed)
    (shown,) = captured.outputs
    assert set(shown.data) == {"text/plain", "text/html"}
    assert "<strong>Row sum dropped.</strong>" in shown.data["text/html"]
    assert shown.data["text/plain"] == str(result.error_in_exec)
    assert captured.stdout.strip() == "backward: row sum dropped"
    assert captured.stderr == ""


def test_in_a_notebook_a_pass_is_the_cells_value(shell):
    with capture_output() as captured:
        result = shell.run_cell('check("backward", backward)')
    assert result.success
    assert result.result.judgement.status == "passed"
    assert captured.stderr == ""


def test_overflow_in_an_answer_is_not_noise(shell):
    with capture_output() as captured:
        shell.run_cell('check("backward", lambda dp, p, axis=-1: np.exp(1e5 * p) / 0)')
    assert "Warning" not in captured.stdout + captured.stderr


def test_check_is_exported_without_the_heavy_imports():
    heavy = "{'torch', 'matplotlib', 'scipy', 'pandas', 'dask', 'triton'}"
    script = (
        "import sys, attn_lessons; assert 'numpy' not in sys.modules;"
        "from attn_lessons import check; from attn_lessons.grading import catalogue;"
        f"catalogue.exercises(); print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_an_unknown_name_in_the_package_is_an_attribute_error():
    import attn_lessons

    with pytest.raises(AttributeError, match="no attribute 'chek'"):
        _ = attn_lessons.chek
    assert attn_lessons.check is module.check
    assert isinstance(Returned(), Returned)
    assert Case("a", ()).rtol is None
