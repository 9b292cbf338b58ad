"""The command: one clear line for bad input, exit codes, and nothing written where it fails."""

import json
import os
import re
import subprocess
import sys

import project
import pytest
from typer.testing import CliRunner

import attn_lessons
from attn_lessons import cli
from attn_lessons.grading import notebook, progress
from attn_lessons.grading.notebook import NotebookError

RIGHT = "import numpy as np\n" + project.ANSWERS["softmax"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return project.build(tmp_path_factory.mktemp("project"))


@pytest.fixture
def here(built, tmp_path, monkeypatch):
    """An empty folder to work in, beside a project of one chapter."""
    monkeypatch.setenv("ATTN_LESSONS_PROJECT", str(built))
    monkeypatch.setenv("ATTN_LESSONS_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "120")
    notebook.pristine.cache_clear()
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    notebook.pristine.cache_clear()


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def refused(folder, *arguments):
    """The one line that a wrong use is told, with nothing written."""
    before = sorted(p.name for p in folder.rglob("*"))
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert sorted(p.name for p in folder.rglob("*")) == before
    (line,) = done.stderr.splitlines()
    return line


# ------------------------------------------------------------------------------- check


def test_a_right_file(here):
    (here / "a.py").write_text(RIGHT)
    done = run("check", "softmax", "a.py")
    assert done.exit_code == 0
    assert done.stdout.startswith("softmax: passed")


def test_a_wrong_file_as_text_and_json(here):
    (here / "a.py").write_text(
        "import numpy as np\ndef softmax_backward(dp, p, axis=-1):\n    return p * dp"
    )
    done = run("check", "softmax_backward", "a.py", "--json", "-")
    assert done.exit_code == 1
    entry = json.loads(done.stdout)
    assert list(entry) == ["id", "status", "points", "max_points", "mistake", "message"]
    assert (entry["id"], entry["status"], entry["points"]) == ("softmax_backward", "failed", 0)
    assert entry["mistake"]
    assert entry["mistake"] in done.stderr
    run("check", "softmax_backward", "a.py", "--json", "out.json")
    assert json.loads((here / "out.json").read_text()) == entry


def test_neighbouring_modules_and_paths_with_spaces(here):
    (here / "my answers").mkdir()
    (here / "my answers" / "helped.py").write_text(RIGHT)
    (here / "my answers" / "a.py").write_text("from helped import softmax")
    assert run("check", "softmax", "my answers/a.py").exit_code == 0


@pytest.mark.parametrize(
    ("source", "status", "told"),
    [
        ("def softmax(z, axis=-1):\n    raise NotImplementedError", "error", "not solved yet"),
        ("def softmax(z, axis=-1):\n    while True: pass", "timeout", "longer than 3 s"),
        ("def softmax(z, axis=-1):\n    import os; os._exit(3)", "error", "exit code 3"),
        ("print('x')\ndef softmax(z, axis=-1):\n    print('y'); return 1 / 0", "error", "line 3"),
    ],
)
def test_answers_that_do_not_return(here, source, status, told):
    (here / "a.py").write_text(source)
    done = run("check", "softmax", "a.py", "--json", "-", "--timeout", 3)
    assert done.exit_code == 1
    entry = json.loads(done.stdout)
    assert entry["status"] == status
    assert told in entry["message"]
    assert told in done.stderr


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "def sofmax(z): ...\ndef helper(): ...",
            "does not define softmax; it defines sofmax, helper",
        ),
        ("x = 1", "does not define softmax; it defines no function"),
        ("def softmax(z)\n    return z", "a.py: line 1: expected ':'"),
        ("import numpy\n1 / 0", "a.py: line 2: ZeroDivisionError"),
        ("raise SystemExit(0)", "line 1: SystemExit"),
        ("\0", "a.py"),
    ],
)
def test_files_with_nothing_to_check(here, source, told):
    (here / "a.py").write_text(source)
    assert told in refused(here, "check", "softmax", "a.py", "--json", "out.json")


def put_file(folder, name, content):
    (folder / name).write_bytes(content)
    return name


def test_check_names_what_is_not_there(here):
    assert "did you mean softmax" in refused(here, "check", "sofmax", "a.py")
    assert refused(here, "check", "softmax", "a.py") == "a.py: no such file"
    assert "a folder, not a Python file" in refused(here, "check", "softmax", here)
    assert "line None" not in refused(here, "check", "softmax", put_file(here, "n.py", b"a\0"))
    book = put_file(here, "ch01.ipynb", b"{}")
    assert "a notebook, not a Python file" in refused(here, "check", "softmax", book)
    os.mkfifo(here / "p.py")
    assert "not a regular file" in refused(here, "check", "softmax", "p.py")
    assert "name too long" in refused(here, "check", "softmax", "a" * 300).lower()
    (here / "a.py").write_text(RIGHT)
    assert "no folder" in refused(here, "check", "softmax", "a.py", "--json", "no/out.json")


# ------------------------------------------------------------------------------- grade


def put(here, data, name="ch01_softmax.ipynb"):
    path = here / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_class_from_the_command_line(here, built):
    put(here, project.solved(built), "class/ada/ch01_softmax.ipynb")
    put(here, project.answered(built), "class/bob/ch01_softmax.ipynb")
    put(here, "{", "class/cyd/ch01_softmax.ipynb")
    reports = ("--json", "r.json", "--csv", "r.csv", "--html", "pages")
    done = run("grade", "class", *reports, "--seed", 3, "--jobs", 2)
    assert done.exit_code == 0, done.output
    rows = json.loads((here / "r.json").read_text())
    assert [(r["student"], r["status"], r["points"]) for r in rows] == [
        ("ada", "graded", project.TOTAL),
        ("bob", "graded", 0),
        ("cyd", "unreadable", 0),
    ]
    assert rows[0]["notebook"] == "class/ada/ch01_softmax.ipynb"
    assert {e["status"] for e in rows[1]["exercises"]} == {"error"}
    assert (here / "pages" / "index.html").exists()
    assert len((here / "r.csv").read_text().splitlines()) == 4
    assert "2 of 3 notebooks graded" in done.stdout


def test_strict_tells_lost_points_by_the_exit_code(here, built):
    full = put(here, project.solved(built))
    part = put(here, project.answered(built), "part/ch01_softmax.ipynb")
    options = ("--strict", "--json", "-", "--sandbox", "none")
    done = run("grade", full, *options)
    assert done.exit_code == 0
    assert json.loads(done.stdout)[0]["points"] == project.TOTAL
    assert run("grade", part, *options).exit_code == 1


def test_the_same_seed_gives_the_same_report(here, built):
    wrong = {"softmax": "def softmax(z, axis=-1):\n    return z + 1e-3"}
    path = put(here, project.answered(built, **wrong))
    options = ("--json", "-", "--sandbox", "none", "--seed")
    first, again = (run("grade", path, *options, 1).stdout for _ in range(2))
    assert first == again
    assert json.loads(first)[0]["exercises"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("no.ipynb",), "no.ipynb: no such file or folder"),
        (("x.txt",), "x.txt: not a notebook"),
        (("empty",), "empty: holds no notebooks"),
        (("nb.ipynb", "--json", "no/r.json"), "--json: there is no folder"),
        (("nb.ipynb", "--json", "empty"), "--json: empty is a folder"),
        (("nb.ipynb", "--json", "nb.ipynb"), "--json: nb.ipynb is the name of a notebook"),
        (("nb.ipynb", "--json", os.devnull), "is not a regular file; - is standard output"),
        (("nb.ipynb", "--json", "r", "--csv", "./r"), "only one of them can be r"),
        (("nb.ipynb", "--html", "x.txt"), "--html: x.txt is not a folder"),
        (("nb.ipynb", "--html", "x.txt/pages"), "--html: x.txt is not a folder"),
        (("a" * 300,), "name too long"),
        (("nb.ipynb", "--json", "-", "--csv", "-"), "only one of them"),
    ],
)
def test_grade_refuses_wrong_usage_in_one_line(here, arguments, told):
    (here / "x.txt").write_text("{}")
    (here / "nb.ipynb").write_text("{}")
    (here / "empty").mkdir()
    assert told.lower() in refused(here, "grade", *arguments).lower()


def test_names_that_no_report_could_hold(here):
    for student in ("=1+1", "esc\x1b[31m", "no text \udcff", "ü name"):
        put(here, "{", f"class/{student}/{project.NAME}.ipynb")
    outputs = ("--json", "r.json", "--csv", "r.csv", "--html", "pages")
    done = run("grade", "class", "--sandbox", "none", *outputs)
    assert done.exit_code == 0, done.output
    students = {row["student"] for row in json.loads((here / "r.json").read_text())}
    assert students == {"=1+1", "esc\\x1b[31m", "no text \\udcff", "ü name"}
    assert "'=1+1," in (here / "r.csv").read_text()
    assert len(list((here / "pages").iterdir())) == 5


def test_pages_of_an_earlier_run_go_and_other_files_stay(here):
    old = put(here, "{", f"class/ada/{project.NAME}.ipynb")
    put(here, "{", f"class/ben/{project.NAME}.ipynb")
    run("grade", "class", "--sandbox", "none", "--html", "pages")
    other = put(here, "mine", "pages/notes-ada-0123abcd.html")
    old.unlink()
    run("grade", "class", "--sandbox", "none", "--html", "pages")
    names = {path.name.rsplit("-", 1)[0] for path in (here / "pages").iterdir()}
    assert names == {"index.html", "ben-ch01-softmax", "notes-ada"}
    assert other.read_text() == "mine"


def test_grades_are_kept_where_a_report_cannot_be_written(here, monkeypatch):
    from attn_lessons.grading import release

    def full(path, text):
        raise OSError(28, "No space left on device", f"{path}.part")

    put(here, "{", f"class/ada/{project.NAME}.ipynb")
    command = ("grade", "class", "--sandbox", "none", "--json", "r.json")
    with monkeypatch.context() as disk:
        disk.setattr(release, "write_whole", full)
        done = run(*command)
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "r.json: No space left on device; the grades are kept, the same command writes them"
    ]
    assert "1 of 1 are done" in run(*command).stderr
    assert (here / "r.json").exists()


@pytest.mark.parametrize("option", [("--jobs", "-1"), ("--timeout", "0"), ("--sandbox", "x")])
def test_grade_refuses_values_that_make_no_sense(here, option):
    assert run("grade", here, *option).exit_code == 2


def test_a_notebook_of_another_release_is_refused_alone_and_told_in_a_class(here, built):
    data = project.solved(built)
    data["metadata"]["attn"]["release"] |= {"version": "0.0.1", "fingerprint": "0" * 12}
    path = put(here, data, "class/ada/ch01_softmax.ipynb")
    line = refused(here, "grade", path, "--json", "r.json")
    assert "made from release 0.0.1" in line
    done = run("grade", "class", "--json", "-", "--sandbox", "none")
    (row,) = json.loads(done.stdout)
    assert row["points"] == project.TOTAL
    assert "made from release 0.0.1" in row["message"]


def test_a_missing_sandbox_is_told_once_or_refused(here, built, monkeypatch):
    from attn_lessons.grading import sandbox

    monkeypatch.setattr(sandbox, "bubblewrap_fault", lambda: "bubblewrap is not installed")
    path = put(here, project.solved(built))
    told = refused(here, "grade", path, "--sandbox", "bubblewrap")
    assert told == "--sandbox bubblewrap: bubblewrap is not installed"
    done = run("grade", path)
    assert done.exit_code == 0
    assert done.stderr.count("bubblewrap is not installed") == 1


def test_no_scheduler_is_told_in_one_line(here, built):
    path = put(here, project.solved(built))
    line = refused(here, "grade", path, "--scheduler", "tcp://127.0.0.1:9")
    assert line.startswith("--scheduler: ")


def test_ctrl_c_keeps_what_is_done(here, built, monkeypatch):
    from attn_lessons.grading import classroom

    def interrupted(run, workers, report):
        raise KeyboardInterrupt

    monkeypatch.setattr(classroom, "grade", interrupted)
    done = run("grade", put(here, project.solved(built)), "--sandbox", "none", "--json", "r.json")
    assert done.exit_code == 130
    assert "0 of 1 notebooks are graded; the same command goes on from there" in done.stderr
    assert not (here / "r.json").exists()


def test_a_class_on_a_dask_scheduler(here, built):
    distributed = pytest.importorskip("distributed")
    put(here, project.solved(built), f"class/ada/{project.NAME}.ipynb")
    put(here, "{", f"class/ben/{project.NAME}.ipynb")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        grade = ("grade", "class", "--sandbox", "none", "--json", "-")
        done = run(*grade, "--scheduler", cluster.scheduler_address)
    assert [row["points"] for row in json.loads(done.stdout)] == [project.TOTAL, 0]


# ------------------------------------------------------------------------------- release


def test_release_says_what_it_did(here, built):
    assert "in step" in run("release").stdout
    path = built / "exercises" / f"{project.NAME}.ipynb"
    before = path.read_text()
    path.write_text("{}")
    done = run("release", "--check")
    assert done.exit_code == 1
    assert done.stdout.strip() == f"{project.NAME}.ipynb: differs from its solution"
    assert path.read_text() == "{}"
    assert run("release").stdout.strip() == f"{project.NAME}.ipynb: written"
    assert path.read_text() == before


# ------------------------------------------------------------------------------- workspace


def test_reset_makes_a_fresh_copy_and_keeps_the_old_one(here, built):
    released = (built / "exercises" / f"{project.NAME}.ipynb").read_text()
    space = here / "workspace"
    space.mkdir()
    mine = put(space, "mine")
    assert run("reset", "ch01").exit_code == 0
    assert mine.read_text() == released
    mine.write_text("mine again")
    assert run("reset", "ch01_softmax").exit_code == 0
    kept = sorted(p for p in space.iterdir() if p != mine)
    assert sorted(p.read_text() for p in kept) == ["mine", "mine again"]
    for path in kept:
        assert re.match(r"kept_\d{4}-\d\d-\d\d_\d{6}_ch01_softmax", path.name)
    mine.unlink()
    assert "kept" not in run("reset", "ch01").stdout
    assert mine.read_text() == released


def test_reset_never_takes_a_name_that_is_taken(here):
    from datetime import datetime

    now = datetime(2026, 1, 2, 3, 4, 5)
    names = []
    for text in ("one", "two", "three"):
        put(here, text)
        names.append(progress.reset(here, project.NAME, now).name)
    assert len(set(names)) == 3
    assert [(here / name).read_text() for name in names] == ["one", "two", "three"]


def test_reset_refuses_what_it_does_not_know(here):
    (here / "workspace").mkdir()
    assert "did you mean ch01" in refused(here, "reset", "ch10")
    assert "no such folder" in refused(here, "reset", "ch01", "--workspace", "elsewhere")
    (here / "workspace" / f"{project.NAME}.ipynb").mkdir()
    assert "not a regular file" in refused(here, "reset", "ch01")


def test_progress_is_what_the_saved_notebooks_can_do(here, built, monkeypatch):
    wrong = "def log_softmax(z, axis=-1):\n    return z"
    put(here, project.answered(built, softmax=project.ANSWERS["softmax"], log_softmax=wrong))
    done = run("progress")
    assert done.exit_code == 0, done.output
    assert "1 of 5 exercises solved; next: log_softmax" in done.stdout
    assert "✓ softmax" in done.stdout
    assert "→ log_softmax" in done.stdout
    # Unchanged notebooks are not run a second time.
    monkeypatch.setattr("attn_lessons.grading.classroom.WORKER", "raise SystemExit(1)")
    assert run("progress").stdout == done.stdout
    shown = attn_lessons.progress()
    assert "<table" in shown._repr_html_()
    assert "next: log_softmax" in repr(shown)


def test_progress_without_a_workspace_or_a_notebook(here):
    assert "no such folder" in refused(here, "progress")
    with pytest.raises(NotebookError, match="attn-lessons start"):
        attn_lessons.progress()
    (here / "workspace").mkdir()
    assert "0 of 5 exercises solved; next: softmax" in run("progress").stdout


# ------------------------------------------------------------------------------- the command


def test_every_command_explains_itself():
    for name in ("release", "check", "grade", "reset", "progress"):
        done = run(name, "--help")
        assert done.exit_code == 0
    listed = run("--help").stdout
    for name in ("release", "check", "grade", "start", "reset", "progress"):
        assert name in listed


def test_start_passes_its_options_on(monkeypatch):
    from attn_lessons import start

    seen = []
    monkeypatch.setattr(start, "main", lambda arguments: seen.append(arguments) or 0)
    assert run("start", "--port", "9000").exit_code == 0
    assert seen == [["--port", "9000"]]


def test_help_is_quick_and_loads_no_grader():
    code = (
        "import sys; from attn_lessons import cli;"
        "print([m for m in ('numpy', 'nbval', 'torch', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "attn-lessons")
    if not os.path.exists(command):
        pytest.skip("the package is not installed here")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "grade" in done.stdout
