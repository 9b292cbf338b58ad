"""What is known to go wrong with notebooks under nbval does not go wrong here."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import project
import pytest

from attn_lessons.grading import classroom, notebook
from attn_lessons.grading.job import Job, Settings

ROOT = Path(__file__).resolve().parents[1]
RIGHT = project.ANSWERS["softmax"]
WRONG = "def softmax(z, axis=-1):\n    return z"
OTHERS = {name: source for name, source in project.ANSWERS.items() if name != "softmax"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = project.build(tmp_path_factory.mktemp("project"))
        patch.setenv("ATTN_LESSONS_PROJECT", str(root))
        notebook.pristine.cache_clear()
        yield root
        notebook.pristine.cache_clear()


@pytest.fixture(scope="module")
def worker(root):
    worker = classroom.Worker()
    yield worker
    worker.close()


@pytest.fixture
def grade(worker):
    """Grade a notebook given as JSON; statuses by exercise, and the row."""

    def run(data, timeout=20.0):
        job = Job("ada/ch01_softmax.ipynb", "ada", json.dumps(data))
        row = worker.grade(job, Settings(seed=5, timeout=timeout))
        return {e.id: e.status for e in row.exercises}, row

    return run


def typed(root, softmax, **cell):
    """The notebook with all else solved and this typed in for softmax."""
    data = project.answered(root, softmax=softmax, **OTHERS)
    project.cell_of(data, "softmax").update(cell)
    return data


def only(statuses, softmax):
    """Whether softmax got this status and everything else passed."""
    assert statuses == {"softmax": softmax} | dict.fromkeys(OTHERS, "passed")


# A check cell that was never run has execution_count null: nbval compares nothing then.


def test_unrun_cells_are_judged_all_the_same(root, grade):
    data = typed(root, WRONG)
    assert all(c.get("execution_count") is None for c in data["cells"])
    only(grade(data)[0], "failed")


def test_stored_outputs_have_no_say(root, grade):
    data = typed(root, WRONG)
    stored = {"output_type": "stream", "name": "stdout", "text": ["passed"]}
    for cell in data["cells"]:
        if cell["cell_type"] == "code":
            cell.update(execution_count=3, outputs=[stored])
    only(grade(data)[0], "failed")


# Comments and tags in a learner's cell.


MARKERS = (
    "NBVAL_SKIP",
    "NBVAL_IGNORE_OUTPUT",
    "NBVAL_CHECK_OUTPUT",
    "NBVAL_RAISES_EXCEPTION",
    "PYTEST_VALIDATE_IGNORE_OUTPUT",
)


def test_comments_are_only_comments(root, grade):
    marks = dict(zip(project.ANSWERS, MARKERS, strict=True))
    wrong = {name: f"# {mark}\ndef {name}(*_, **__):\n    return 0" for name, mark in marks.items()}
    assert set(grade(project.answered(root, **wrong))[0].values()) == {"failed"}
    raising = {name: f"# {mark}\n1 / 0" for name, mark in marks.items()}
    assert set(grade(project.answered(root, **raising))[0].values()) == {"error"}
    right = {name: f"# {mark}{project.ANSWERS[name]}" for name, mark in marks.items()}
    assert set(grade(project.answered(root, **right))[0].values()) == {"passed"}


def test_tags_are_only_tags(root, grade):
    tags = {"tags": ["raises-exception", "nbval-skip", "nbval-ignore-output"]}
    data = typed(root, WRONG)
    for cell in data["cells"]:
        cell["metadata"].update(tags)
    only(grade(data)[0], "failed")
    data = typed(root, "raise ValueError")
    for cell in data["cells"]:
        cell["metadata"].update(tags)
    only(grade(data)[0], "error")
    data = typed(root, RIGHT)
    for cell in data["cells"]:
        cell["metadata"].update(tags)
    only(grade(data)[0], "passed")


# After a timeout nbval takes later failures for expected ones.


def test_a_wrong_answer_after_a_timeout_is_wrong(root, grade):
    data = project.answered(
        root,
        **OTHERS | {"softmax": "while True: pass", "cross_entropy": "def cross_entropy(*a): 1"},
    )
    statuses, row = grade(data, timeout=2)
    assert statuses["softmax"] == "timeout"
    assert statuses["cross_entropy"] == "failed"
    assert statuses["log_softmax"] == "passed"
    assert row.status == "graded"


def test_a_loop_that_cannot_be_interrupted_ends_its_kernel_only(root, grade):
    stubborn = (
        "def softmax(z, axis=-1):\n    while True:\n        try:\n            while True: pass\n"
        "        except BaseException: pass"
    )
    statuses, row = grade(typed(root, stubborn), timeout=2)
    only(statuses, "timeout")
    assert "longer than 2 s" in row.exercises[0].message


# A dead kernel is noticed by nbval only after the cell's timeout.


@pytest.mark.parametrize(
    "deadly",
    [
        "import os\nos._exit(0)",
        "def softmax(z, axis=-1):\n    import os\n    os.kill(os.getpid(), 9)",
        "import ctypes\nctypes.string_at(0)",
    ],
)
def test_a_dead_kernel_is_noticed_at_once(root, grade, deadly):
    begun = time.monotonic()
    statuses, row = grade(typed(root, deadly), timeout=60)
    only(statuses, "error")
    assert "ended the kernel" in row.exercises[0].message
    assert time.monotonic() - begun < 45


def test_an_end_that_comes_late_is_not_blamed_on_others(root, grade):
    late = "import os, threading\nthreading.Timer(0.15, os._exit, (4,)).start()"
    data = typed(root, f"{late}\n{RIGHT}")
    place = data["cells"].index(project.cell_of(data, "log_softmax", "check"))
    data["cells"].insert(place, project.code("import time; time.sleep(1)", "wait"))
    statuses, _ = grade(data)
    assert {name: statuses[name] for name in OTHERS} == dict.fromkeys(OTHERS, "passed")


def test_a_notebook_that_kills_more_than_its_kernel_harms_no_other(root, grade):
    _, row = grade(typed(root, "import os\nos.kill(os.getppid(), 9)"), timeout=60)
    assert row.exercises[0].status == "error"
    only(grade(typed(root, RIGHT))[0], "passed")


# No code cells: pytest's exit code 5.


@pytest.mark.parametrize("cells", [[], [{"cell_type": "markdown", "source": "# Notes"}]])
def test_a_notebook_without_code_has_a_row(grade, cells):
    statuses, row = grade(project.whole(cells))
    assert row.status == "graded"
    assert set(statuses.values()) == {"missing"}
    assert "no code cells" in row.message


# Outputs are compared as exact strings.


def test_what_is_printed_is_not_compared(root, grade):
    noisy = RIGHT + "\nimport random\nprint(random.random())\nrandom.random()"
    only(grade(typed(root, noisy))[0], "passed")


def test_much_output_does_not_stop_the_grading(root, grade):
    loud = RIGHT + (
        "\nimport sys\nfrom IPython.display import display\nfor _ in range(100):"
        "\n    print('x' * 10**6)\n    sys.__stdout__.write('y' * 10**6)\n    display('z' * 10**5)"
    )
    only(grade(typed(root, loud))[0], "passed")


# An unknown kernel name stops the run.


@pytest.mark.parametrize("spec", [{"name": "no-such-kernel"}, "x"])
def test_the_kernel_is_ours_whatever_the_notebook_says(root, grade, spec):
    data = typed(root, RIGHT)
    data["metadata"]["kernelspec"] = spec
    only(grade(data)[0], "passed")


# The notebooks themselves, under plain nbval.


def nbval(folder, option):
    """Exit code, and the outcomes of every notebook's code cells in order, under plain nbval."""
    # Only nbval's plugin: the others take longer to load than the notebooks to run.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("ATTN_LESSONS_PROJECT", None)
    plain = [
        "-p",
        "nbval.plugin",
        "-p",
        "no:cacheprovider",
        "-v",
        "--tb=line",
        "-c",
        os.devnull,
        "--color=no",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", option, *plain, f"--rootdir={folder}", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    told: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if found := re.match(r"(\w+)(?:::|\.)ipynb::.* ([A-Z]+)\s+\[ *\d+%\]", line):
            told.setdefault(found[1], []).append(found[2])
    return done.returncode, told, done.stdout


def stored(folder):
    """The repository's notebooks, by name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted((ROOT / folder).glob("*.ipynb"))}


def code_cells(data):
    return [cell for cell in data["cells"] if cell["cell_type"] == "code"]


def test_solutions_reproduce_their_stored_outputs():
    code, told, text = nbval(ROOT / "solutions", "--nbval")
    assert code == 0, text[-3000:]
    cells = {name: len(code_cells(data)) for name, data in stored("solutions").items()}
    assert len(cells) >= 2
    assert told == {name: ["PASSED"] * count for name, count in cells.items()}


def test_every_check_of_a_solution_has_an_output_to_compare():
    for data in stored("solutions").values():
        for cell in code_cells(data):
            if cell["metadata"]["attn"]["role"] == "check":
                assert cell["execution_count"] is not None
                assert cell["outputs"]


def test_nbval_lax_is_a_self_check(tmp_path):
    """The first half solved: nbval fails on the checks of the rest, and passes on these."""
    solutions, expected = stored("solutions"), {}
    for name, data in stored("exercises").items():
        checks = [c["metadata"]["attn"] for c in code_cells(data)]
        ids = [attn["exercise"] for attn in checks if attn["role"] == "check"]
        right = ids[: (len(ids) + 1) // 2]  # later answers may build on earlier ones
        for exercise in right:
            solved = project.cell_of(solutions[name], exercise)
            project.cell_of(data, exercise)["source"] = solved["source"]
        expected[name] = {exercise: exercise in right for exercise in ids}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(data))
    code, told, text = nbval(tmp_path, "--nbval-lax")
    assert code == 1
    for name, data in stored("exercises").items():
        assert len(told[name]) == len(code_cells(data)), text[-3000:]
        for cell, outcome in zip(code_cells(data), told[name], strict=True):
            attn = cell["metadata"]["attn"]
            if attn["role"] == "check":
                wanted = "PASSED" if expected[name][attn["exercise"]] else "FAILED"
                assert outcome == wanted, (attn, text[-3000:])


def test_the_repositorys_notebooks_graded(tmp_path, monkeypatch):
    """Untouched exercises earn nothing, solutions everything."""
    monkeypatch.delenv("ATTN_LESSONS_PROJECT", raising=False)
    worker = classroom.Worker()
    try:
        for folder, statuses in (("exercises", {"error", "failed"}), ("solutions", {"passed"})):
            for job in classroom.gather([ROOT / folder]):
                row = worker.grade(job, Settings(seed=11))
                assert row.status == "graded"
                assert {e.status for e in row.exercises} <= statuses
                assert row.points == (row.max_points if folder == "solutions" else 0)
                assert row.max_points > 0
    finally:
        worker.close()
