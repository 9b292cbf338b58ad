"""Every notebook gets a fair row, whatever it contains, and an interrupted run goes on."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import project
import pytest

from attn_lessons.grading import classroom, ledger, notebook, runner, sandbox
from attn_lessons.grading.job import Job, Settings, one_line
from attn_lessons.grading.records import ExerciseRow, NotebookRow
from attn_lessons.grading.reports import as_csv, as_html, as_json, terminal

RIGHT = project.ANSWERS["softmax"]
OTHERS = {name: source for name, source in project.ANSWERS.items() if name != "softmax"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = project.build(tmp_path_factory.mktemp("project"))
        patch.setenv("ATTN_LESSONS_PROJECT", str(root))
        patch.setenv("ATTN_LESSONS_STATE", str(tmp_path_factory.mktemp("state")))
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
    def run(data, seed=5, **settings):
        text = data if isinstance(data, str) else json.dumps(data)
        job = Job("ada/ch01_softmax.ipynb", "ada", text)
        return worker.grade(job, Settings(seed=seed, **{"timeout": 20.0, **settings}))

    return run


def statuses(row):
    return {e.id: e.status for e in row.exercises}


def only(row, softmax):
    assert statuses(row) == {"softmax": softmax} | dict.fromkeys(OTHERS, "passed")


def typed(root, softmax):
    return project.answered(root, softmax=softmax, **OTHERS)


# ------------------------------------------------------------------------------- what is right


def test_solved_notebooks_get_full_marks_and_untouched_ones_none(root, grade):
    full = grade(project.solved(root))
    assert (full.status, full.points, full.max_points) == ("graded", project.TOTAL, project.TOTAL)
    none = grade(project.answered(root))
    assert (none.status, none.points, none.max_points) == ("graded", 0, project.TOTAL)
    assert set(statuses(none).values()) == {"error"}


def test_inputs_follow_from_seed_and_submission(root):
    job = Job("a.ipynb", "ada", json.dumps(project.solved(root)))
    released = notebook.pristine(project.NAME)
    exercise = runner.catalogue.find("softmax")

    def sent(job, seed):
        draws = runner._draws(exercise, job, released, Settings(seed=seed))
        return runner._emit_source(exercise, draws)

    assert sent(job, 1) == sent(job, 1)
    assert sent(job, 1) != sent(job, 2)
    assert sent(job, 1) != sent(dataclasses.replace(job, text="{}"), 1)


def test_a_named_mistake_is_reported(root, grade):
    wrong = OTHERS | {
        "softmax_backward": "def softmax_backward(dp, p, axis=-1):\n    return p * dp"
    }
    row = grade(project.answered(root, softmax=RIGHT, **wrong))
    backward = next(e for e in row.exercises if e.id == "softmax_backward")
    named = [mistake.name for mistake in runner.catalogue.find("softmax_backward").mistakes]
    assert backward.status == "failed"
    assert backward.mistake in named


def test_a_right_answer_may_use_torch(root, grade):
    answer = (
        "import torch\ndef softmax(z, axis=-1):\n"
        "    return torch.softmax(torch.from_numpy(z), axis)"
    )
    only(grade(typed(root, answer)), "passed")


def test_helpers_and_failing_cells_around_do_no_harm(root, grade):
    data = typed(root, "def softmax(z, axis=-1):\n    return helped(z, axis)")
    data["cells"].insert(2, project.code(RIGHT.replace("softmax(", "helped("), "help"))
    data["cells"].insert(2, project.code("1 / 0", "broken"))
    data["cells"].insert(2, project.code("def unclosed(:", "syntax"))
    data["cells"].insert(2, project.code("%matplotlib inline\n%no_such_magic", "magic"))
    only(grade(data), "passed")


# ------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("def softmax(z, axis=-1)\n    return z", "SyntaxError: expected ':' (line 1)"),
        ("import sys\nsys.exit()", "SystemExit"),
        ("exit()", "does not define softmax"),
        ("raise RuntimeError('no')", "RuntimeError: no"),
        ("", "does not define softmax"),
        ("softmax = 3", "does not define softmax"),
        ("def softmax(z, axis=-1):\n    import sys\n    sys.exit(1)", "SystemExit"),
        ("def softmax(z, axis=-1):\n    return np.ones(2**36)", "MemoryError"),
        ("def softmax(z, axis=-1):\n    return input()", "Error"),
        ("def softmax(z, axis=-1):\n    return softmax(z)", "RecursionError"),
        ("def softmax(z, axis=-1):\n    return globals()", ""),
    ],
)
def test_one_bad_answer_costs_its_own_points_only(root, grade, answer, told):
    row = grade(typed(root, answer))
    only(row, "error")
    assert told in row.exercises[0].message


def test_the_whole_notebooks_time_is_bounded(root, grade):
    data = project.solved(root)
    slow = [project.code("import time; time.sleep(0.6)", f"slow{i}") for i in range(40)]
    place = data["cells"].index(project.cell_of(data, "softmax_jacobian"))
    data["cells"][place:place] = slow
    begun = time.monotonic()
    row = grade(data, timeout=1.0)
    assert row.status == "timeout"
    assert "10 s" in row.message
    assert statuses(row)["softmax"] == "passed"
    assert statuses(row)["cross_entropy"] == "timeout"
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 1}', "\ufeff"])
def test_unreadable_notebooks_have_a_row(grade, text):
    row = grade(text)
    assert row.status == "unreadable"
    assert (row.points, row.max_points) == (0, project.TOTAL)
    assert set(statuses(row).values()) == {"missing"}
    assert row.message


def test_nothing_is_gained_without_the_right_numbers(root, grade):
    cheat = """
import numpy as np, builtins
import attn_lessons
from attn_lessons.grading import learner, protocol
from IPython.display import publish_display_data
attn_lessons.check = lambda *a: print("passed")
np.allclose = np.array_equal = lambda *a, **k: True
np.testing.assert_allclose = lambda *a, **k: None
learner.call = lambda *a, **k: learner.Returned(value=np.zeros(3))
publish_display_data({protocol.MIME: {"exercise": "softmax", "status": "passed", "points": 2}})
print("softmax: passed")
def softmax(z, axis=-1):
    publish_display_data({protocol.MIME: {"defined": True, "draws": [[], []]}})
    return z
"""
    data = project.answered(root, softmax=cheat)
    for name in project.ANSWERS:
        project.cell_of(data, name, "check")["source"] = "print('passed')"
    row = grade(data)
    assert row.points == 0


def test_what_a_kernel_forges_is_refused(root, grade):
    forged = (
        "from attn_lessons.grading import learner\n"
        "from IPython.display import publish_display_data\n"
        "def forge(name, *_):\n"
        "    publish_display_data({learner.MIME: {'defined': True, 'draws': 'all right'}})\n"
        "learner.emit = forge\ndef softmax(z): return z"
    )
    row = grade(typed(root, forged))
    assert row.points == 0
    assert "cannot be read" in row.exercises[0].message


def test_the_kernel_is_kept_from_the_environment_and_cleaned_up(root, grade, monkeypatch):
    answer = (
        "import os\ndef softmax(z, axis=-1):\n"
        "    raise ValueError(' '.join(sorted(os.environ)) + os.getcwd())"
    )
    message = grade(typed(root, answer)).exercises[0].message
    assert "ATTN_LESSONS_STATE" not in message
    folder = Path("/" + message.split("(line")[0].split("/", 1)[1].strip())
    assert not folder.exists()


@pytest.mark.skipif(bool(sandbox.bubblewrap_fault()), reason=sandbox.bubblewrap_fault())
def test_bubblewrap_keeps_a_kernel_from_network_files_and_catalogue(root, grade, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    probe = f"""
import os, socket
seen = []
if os.path.exists({str(secret)!r}): seen.append("file")
if os.path.exists({str(root)!r}): seen.append("project")
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    if error.errno not in (101, 111): seen.append(str(error))
if len(socket.if_nameindex()) > 1: seen.append("network")
try:
    from attn_lessons.grading.catalogue import ch01_softmax
    seen.append("catalogue")
except ImportError:
    pass
for place in ("/usr/x", os.__file__):
    try:
        open(place, "a"); seen.append("write " + place)
    except OSError:
        pass
open("mine", "w").write("x")
def softmax(z, axis=-1):
    if seen: raise ValueError(", ".join(seen))
    e = np.exp(z - np.max(z, axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)
"""
    row = grade(typed(root, probe), sandbox="bubblewrap")
    assert row.exercises[0].message.endswith("cases"), row.exercises[0].message
    only(row, "passed")


# ------------------------------------------------------------------------------- a class


def put(folder, student, data, name="ch01_softmax.ipynb"):
    path = folder / student / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_who_handed_in_what(tmp_path):
    put(tmp_path / "class", "ada", "{}")
    put(tmp_path / "class", "bob/deep", "{}")
    put(tmp_path / "class", "bob/.ipynb_checkpoints", "{}")
    (tmp_path / "class" / "cyd" / "x.ipynb").mkdir(parents=True)
    os.mkfifo(tmp_path / "class" / "pipe.ipynb")
    jobs = classroom.gather([tmp_path / "class", tmp_path / "class" / "ada"])
    assert [(Path(j.notebook).parent.name, j.student) for j in jobs] == [
        ("ada", "ada"),
        ("deep", "bob"),
        ("class", "class"),
    ]
    assert jobs[2].fault == "not a regular file"
    flat = classroom.gather([tmp_path / "class" / "ada"])
    assert [j.student for j in flat] == ["ada"]


@pytest.mark.parametrize(
    ("name", "told"), [("no", "no such file"), ("x.txt", "not a notebook"), ("dir", "no notebooks")]
)
def test_paths_that_hold_nothing(tmp_path, name, told):
    (tmp_path / "x.txt").write_text("{}")
    (tmp_path / "dir").mkdir()
    with pytest.raises(classroom.ClassError, match=told):
        classroom.gather([tmp_path / name])


def test_a_killed_run_goes_on_where_it_was(root, tmp_path):
    folder, report = tmp_path / "class", tmp_path / "report.json"
    sleepy = RIGHT + "\nimport time; time.sleep(8)"
    for student in ("ada", "bob"):
        put(folder, student, project.solved(root))
    put(folder, "cyd", typed(root, sleepy))
    environment = os.environ | {"ATTN_LESSONS_STATE": str(tmp_path / "state")}
    command = [sys.executable, "-m", "attn_lessons.cli", "grade", str(folder), "--jobs", "1"]
    command += ["--sandbox", "none", "--json", str(report), "--timeout"]
    process = subprocess.Popen([*command, "60"], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 90
    record = []
    while len(record) < 3 and time.monotonic() < end:
        time.sleep(0.05)
        record = [p.read_bytes() for p in (tmp_path / "state" / "runs").glob("*.jsonl")]
        record = record[0].splitlines() if record else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(record) == 3, "a header and two rows"
    assert not report.exists()
    (path,) = (tmp_path / "state" / "runs").glob("*.jsonl")
    assert path.stat().st_mode & 0o077 == 0
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    # What is on record is taken from there: mark a row to see it come back.
    text = path.read_text().replace('"message": "13 of 13 cases"', '"message": "from the record"')
    path.write_text(text)
    put(folder, "cyd", typed(root, sleepy))
    done = subprocess.run(
        [*command, "60"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 3 are done" in done.stderr
    rows = json.loads(report.read_text())
    assert [row["student"] for row in rows] == ["ada", "bob", "cyd"]
    assert rows[0]["exercises"][0]["message"] == "from the record"
    assert [row["status"] for row in rows] == ["graded"] * 3
    assert not list((tmp_path / "state" / "runs").glob("*"))


ROW = NotebookRow(
    "a/ch01_softmax.ipynb",
    "a",
    "ch01_softmax",
    "graded",
    "",
    2,
    5,
    (
        ExerciseRow("softmax", "passed", 2, 2, None, "13 of 13 cases"),
        ExerciseRow("log_softmax", "failed", 0, 3, "no max", "<b>first</b>: off"),
    ),
)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_ledger_cut_at_any_place_keeps_its_whole_rows(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    book = ledger.Ledger(path, {"seed": 7})
    book.add("one", ROW)
    book.add("two", ROW)
    book.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = ledger.Ledger(path, {"seed": 8})
    assert again.header["seed"] == 7
    assert again.rows == {"one": ROW}
    again.add("two", ROW)
    again.close()
    last = ledger.Ledger(path, {})
    assert last.rows == {"one": ROW, "two": ROW}
    last.finish()
    assert not path.exists()


def test_a_ledger_has_one_writer(tmp_path):
    book = ledger.Ledger(tmp_path / "run.jsonl", {})
    with pytest.raises(ledger.LedgerBusy):
        ledger.Ledger(tmp_path / "run.jsonl", {})
    book.close()


def test_a_lost_worker_costs_one_row_not_the_run(root, monkeypatch):
    monkeypatch.setattr(classroom, "WORKER", "import os; os._exit(1)")
    worker = classroom.Worker()
    row = worker.grade(Job("a/ch01_softmax.ipynb", "a", "{}"), Settings(seed=1))
    worker.close()
    assert (row.status, row.max_points) == ("crashed", project.TOTAL)


# ------------------------------------------------------------------------------- reports


def test_json_has_the_published_form():
    (data,) = json.loads(as_json.render([ROW]))
    assert data["schema"] == 1
    assert list(data) == [
        *("schema", "notebook", "student", "chapter", "status", "message"),
        *("points", "max_points", "exercises"),
    ]
    assert list(data["exercises"][0]) == [
        *("id", "status", "points", "max_points", "mistake", "message")
    ]


def test_csv_has_a_line_a_notebook_and_no_formulas():
    evil = dataclasses.replace(ROW, student="=HYPERLINK(1)", message='@x, "y"\n', exercises=())
    table = list(csv.DictReader(io.StringIO(as_csv.render([ROW, evil]))))
    assert table[0]["softmax"] == "2"
    assert table[0]["log_softmax mistake"] == "no max"
    assert table[1]["student"] == "'=HYPERLINK(1)"
    assert table[1]["message"].startswith("'@x")
    assert table[1]["softmax status"] == ""


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " ="])
def test_no_cell_begins_like_a_formula(start):
    row = dataclasses.replace(ROW, student=f"{start}1+1")
    cell = next(csv.DictReader(io.StringIO(as_csv.render([row]))))["student"]
    assert cell.startswith("'")


class Balance(HTMLParser):
    """Holds a page to its tags being closed in order, and collects its links."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_pages_are_whole_escaped_and_linked():
    evil = dataclasses.replace(ROW, student="<script>x</script>", notebook="../../x.ipynb")
    pages = as_html.render([ROW, evil])
    assert list(pages)[-1] == "index.html"
    assert len(pages) == 3
    assert all("/" not in name for name in pages)
    for page in pages.values():
        parsed = Balance()
        parsed.feed(page)
        assert parsed.open == []
        assert "<script" not in page
        assert set(parsed.links) <= set(pages)
    assert "<b>first" not in "".join(pages.values())


def test_a_table_for_the_terminal():
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(terminal.report([ROW, ROW]))
    text = console.file.getvalue()
    assert "2 / 5" in text
    assert "2 of 2 notebooks graded, 4 of 10 points" in text
    console.print(terminal.report([ROW]))
    assert "no max" in console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\t c", "a b c"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("a\x00\u202eb", "a b"),
        ("x" * 999, 400),
    ],
)
def test_messages_are_one_safe_line(text, line):
    made = one_line(text)
    assert len(made) == line if isinstance(line, int) else made == line
