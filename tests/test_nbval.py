"""What is known to go wrong with notebooks under nbval does not go wrong here."""

import json
import os
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


@pytest.mark.parametrize(
    "marker",
    [
        "NBVAL_SKIP",
        "NBVAL_IGNORE_OUTPUT",
        "NBVAL_CHECK_OUTPUT",
        "NBVAL_RAISES_EXCEPTION",
        "PYTEST_VALIDATE_IGNORE_OUTPUT",
    ],
)
def test_comments_are_only_comments(root, grade, marker):
    statuses, _ = grade(typed(root, f"# {marker}\n{WRONG}"))
    only(statuses, "failed")
    if marker in ("NBVAL_SKIP", "NBVAL_CHECK_OUTPUT"):
        only(grade(typed(root, f"# {marker}{RIGHT}"))[0], "passed")


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


@pytest.mark.parametrize("spec", [{"name": "no-such-kernel"}, {"name": 3}, "x", None])
def test_the_kernel_is_ours_whatever_the_notebook_says(root, grade, spec):
    data = typed(root, RIGHT)
    data["metadata"]["kernelspec"] = spec
    only(grade(data)[0], "passed")


# The notebooks themselves, under plain nbval.


def nbval(path, *options):
    """Outcomes of a notebook's code cells under nbval, in order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("ATTN_LESSONS_PROJECT", None)
    plain = ["-p", "no:cacheprovider", "-v", "--tb=line", "-c", os.devnull, "--color=no"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *plain, f"--rootdir={path.parent}", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=path.parent,
    )
    lines = [line for line in done.stdout.splitlines() if "::Cell" in line]
    words = ("PASSED", "FAILED", "SKIPPED", "XFAIL", "XPASS", "ERROR")
    told = [next(w for w in words if f" {w}" in line) for line in lines if "%]" in line]
    return done.returncode, told, done.stdout


def released():
    return sorted((ROOT / "exercises").glob("*.ipynb"))


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("*.ipynb")), ids=lambda p: p.stem)
def test_solutions_reproduce_their_stored_outputs(path):
    code, told, text = nbval(path, "--nbval")
    assert code == 0, text[-3000:]
    assert set(told) == {"PASSED"}


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_check_of_a_solution_has_an_output_to_compare(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["metadata"].get("attn", {}).get("role") == "check":
            assert cell["execution_count"] is not None
            assert cell["outputs"]


def test_there_are_notebooks_to_test():
    assert len(released()) == len(list((ROOT / "solutions").glob("*.ipynb"))) >= 2


@pytest.mark.parametrize("path", released(), ids=lambda p: p.stem)
def test_nbval_lax_is_a_self_check(path, tmp_path):
    """Every other exercise solved: nbval fails on the checks of the rest, and on them only."""
    data = json.loads(path.read_text())
    solved = json.loads((ROOT / "solutions" / path.name).read_text())
    names = [
        c["metadata"]["attn"]["exercise"]
        for c in data["cells"]
        if c["metadata"].get("attn", {}).get("role") == "check"
    ]
    right = set(names[::2])
    for name in right:
        project.cell_of(data, name)["source"] = project.cell_of(solved, name)["source"]
    copy = tmp_path / path.name
    copy.write_text(json.dumps(data))
    code, told, text = nbval(copy, "--nbval-lax")
    assert code == 1
    code_cells = [c for c in data["cells"] if c["cell_type"] == "code"]
    assert len(told) == len(code_cells), text[-3000:]
    for cell, outcome in zip(code_cells, told, strict=True):
        attn = cell["metadata"].get("attn", {})
        if attn.get("role") == "check":
            expected = "PASSED" if attn["exercise"] in right else "FAILED"
            assert outcome == expected, (attn, text[-3000:])
