"""Reading whatever comes as a notebook, and putting answers into the released one."""

import copy
import json
from pathlib import Path

import project
import pytest

from attn_lessons.grading import notebook

PATH = Path("ada/ch01_softmax.ipynb")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return project.build(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def _in_project(root, monkeypatch):
    monkeypatch.setenv("ATTN_LESSONS_PROJECT", str(root))
    notebook.pristine.cache_clear()
    yield
    notebook.pristine.cache_clear()


def parsed(data):
    return notebook.parse(json.dumps(data), PATH)


def rebuilt(data):
    return notebook.rebuild(notebook.pristine(project.NAME), parsed(data), lambda e: f"emit {e}")


def order(data):
    """The rebuilt notebook, told shortly: what stands where."""
    return [(s.role, s.exercise or s.source.strip().splitlines()[0]) for s in rebuilt(data)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ('{"cells": [', "line 1 is not JSON"),
        ("[]", "no list of cells"),
        ("3", "no list of cells"),
        ('{"cells": 3}', "no list of cells"),
        ('{"metadata": {}}', "no list of cells"),
        ("[" * 100_000, "cannot be read"),
        ('{"cells": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_what_is_no_notebook_is_told_in_one_line(text, told):
    with pytest.raises(notebook.NotebookError) as caught:
        notebook.parse(text, PATH)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [None, 3, "x", []],
        [{}],
        [{"cell_type": "code"}],
        [{"cell_type": "code", "source": None, "metadata": None}],
        [{"cell_type": "code", "source": ["a\n", 3, "b"], "metadata": {"attn": []}}],
        [{"cell_type": "code", "source": "x", "id": 7, "metadata": {"attn": {"points": "many"}}}],
        [{"cell_type": "code", "source": "\ud800"}],
    ],
)
def test_odd_cells_do_not_stop_the_reading(cells):
    read = parsed({"cells": cells, "metadata": 3})
    for cell in read.cells:
        cell.source.encode("utf-8")
    rebuilt({"cells": cells})


def test_the_older_format_is_read():
    old = {"worksheets": [{"cells": [{"cell_type": "code", "input": ["a = 1\n", "b"]}]}]}
    assert parsed(old).cells[0].source == "a = 1\nb"


@pytest.mark.parametrize("bad", [b"\xff\xfe\x00", b"\x89PNG\r\n"])
def test_bytes_that_are_no_text(tmp_path, bad):
    path = tmp_path / "x.ipynb"
    path.write_bytes(bad)
    with pytest.raises(notebook.NotebookError, match="not UTF-8"):
        notebook.read(path)
    with pytest.raises(notebook.NotebookError, match="no such file"):
        notebook.read(tmp_path / "y.ipynb")


def test_the_rebuilt_notebook_has_the_released_order(root):
    expected = [("given", "import numpy as np")]
    for name in project.ANSWERS:
        expected += [("answer", name), ("emit", name)]
    assert order(project.answered(root)) == expected
    assert rebuilt(project.solved(root))[1].source == project.ANSWERS["softmax"].strip("\n")


@pytest.mark.parametrize("lost", ["id", "metadata", "both"])
def test_answers_are_found_without_ids_or_metadata(root, lost):
    data = project.solved(root)
    for cell in data["cells"]:
        if lost in ("id", "both"):
            cell["id"] = "other-" + cell["id"]
        if lost in ("metadata", "both"):
            cell["metadata"] = {}
    assert order(data) == order(project.solved(root))
    assert notebook.missing(notebook.pristine(project.NAME), parsed(data)) == ()


def test_checks_come_from_the_release(root):
    expected = order(project.solved(root))
    deleted = project.solved(root)
    deleted["cells"] = [
        c for c in deleted["cells"] if c["metadata"].get("attn", {}).get("role") != "check"
    ]
    assert order(deleted) == expected
    edited = project.solved(root)
    project.cell_of(edited, "softmax", "check")["source"] = "print('passed')"
    emitted = [s.source for s in rebuilt(edited) if s.role == "emit"]
    assert emitted == [f"emit {name}" for name in project.ANSWERS]


def test_helper_cells_stay_where_they_stood(root):
    data = project.solved(root)
    place = data["cells"].index(project.cell_of(data, "log_softmax"))
    data["cells"].insert(place, project.code("def helper(): ...", "mine"))
    data["cells"].insert(0, project.code("early = 1", "early"))
    told = order(data)
    assert told[0] == ("learner", "early = 1")
    assert told.index(("learner", "def helper(): ...")) == told.index(("answer", "log_softmax")) - 1


def test_an_answer_written_under_the_stub_counts(root):
    data = project.answered(root)
    place = data["cells"].index(project.cell_of(data, "softmax"))
    data["cells"].insert(place + 1, project.code(project.ANSWERS["softmax"], "mine"))
    told = [role for role, _ in order(data)]
    assert told[:4] == ["given", "answer", "learner", "emit"]


def test_copied_cells_run_in_their_order(root):
    data = project.answered(root)
    original = project.cell_of(data, "softmax")
    twin = copy.deepcopy(original) | {"source": project.ANSWERS["softmax"].strip("\n")}
    data["cells"].insert(data["cells"].index(original) + 1, twin)
    assert [s.role for s in rebuilt(data)][:4] == ["given", "answer", "learner", "emit"]


def test_of_several_definitions_the_last_is_the_answer():
    final = "def softmax(z, axis=-1):\n    return 'final'"
    cells = [
        project.code("def softmax(z):\n    return 'draft'"),
        project.code(final),
    ]
    steps = rebuilt(project.whole(cells))
    assert [s.source for s in steps if s.role == "answer"] == [final]
    assert [s.role for s in steps].index("learner") < [s.role for s in steps].index("answer")


def test_a_changed_given_cell_runs_behind_the_released_one(root):
    data = project.solved(root)
    data["cells"][1]["source"] += "\nimport torch"
    steps = rebuilt(data)
    assert [s.role for s in steps[:2]] == ["given", "learner"]
    assert "torch" not in steps[0].source
    assert "torch" in steps[1].source


def test_an_answer_turned_into_text_is_missing(root):
    data = project.solved(root)
    project.cell_of(data, "softmax")["cell_type"] = "markdown"
    assert notebook.missing(notebook.pristine(project.NAME), parsed(data)) == ("softmax",)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(): ...", {"f"}),
        ("%matplotlib inline\nf = lambda x: x", {"f"}),
        ("from m import g as f, h", {"f", "h"}),
        ("if True:\n    def f(): ...\nelse:\n    g = 1", {"f", "g"}),
        ("def f(:\n  pass\ndef g(x):\n  return", {"f", "g"}),
        ("class C:\n    def f(self): ...", {"C"}),
        ("\0", set()),
    ],
)
def test_what_a_cell_defines(source, names):
    assert notebook.defined_names(source) == names


@pytest.mark.parametrize("asked", ["ch01", "ch01_softmax", "ch01_softmax.ipynb", "x/ch01.ipynb"])
def test_a_chapter_is_found_by_any_of_its_names(asked):
    assert notebook.find_name(asked) == project.NAME


def test_an_unknown_chapter_gets_the_nearest_name():
    with pytest.raises(notebook.NotebookError, match="did you mean ch01_softmax"):
        notebook.find_name("ch01_sofmax")
    with pytest.raises(notebook.NotebookError, match="there are ch01_softmax"):
        notebook.find_name("zzz")


@pytest.mark.parametrize("name", ["ch01_softmax.ipynb", "ch01_softmax (1).ipynb", "hw.ipynb"])
def test_a_renamed_submission_finds_its_chapter(root, name):
    text = json.dumps(project.solved(root))
    assert notebook.pristine_for(notebook.parse(text, Path(name))).name == project.NAME


def test_a_strange_notebook_belongs_nowhere():
    strange = notebook.parse(json.dumps(project.whole([project.code("1")])), Path("hw.ipynb"))
    with pytest.raises(notebook.NotebookError, match="no released notebook"):
        notebook.pristine_for(strange)


def test_another_release_is_told(root):
    released = notebook.pristine(project.NAME)
    data = project.solved(root)
    assert notebook.staleness(parsed(data), released) == ""
    data["metadata"]["attn"]["release"] |= {"version": "0.0.1", "fingerprint": "0" * 12}
    told = notebook.staleness(parsed(data), released)
    assert "0.0.1" in told
    assert "attn-lessons reset ch01" in told
    del data["metadata"]["attn"]
    assert notebook.staleness(parsed(data), released) == ""
