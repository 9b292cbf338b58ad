"""Exercises follow from solutions, byte for byte, or nothing is written."""

import json
import os
from pathlib import Path

import nbformat
import numpy as np
import project
import pytest

from attn_lessons import hunt
from attn_lessons.grading import release

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    return project.build(tmp_path / "project")


def again(root, change):
    """The faults of the solution notebook after ``change``, and what is in exercises then."""
    path = root / "solutions" / f"{project.NAME}.ipynb"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    before = snapshot(root)
    with pytest.raises(release.ReleaseError) as caught:
        release.release(root / "solutions", root / "exercises")
    assert snapshot(root) == before
    return caught.value.lines


def snapshot(root):
    return {p.name: p.read_bytes() for p in (root / "exercises").iterdir()}


def test_the_repositorys_exercises_are_in_step_with_its_solutions():
    differ = release.release(ROOT / "solutions", ROOT / "exercises", check=True)
    assert differ == [], "run `attn-lessons release`"


def test_answers_become_stubs_and_outputs_go(root):
    text = (root / "exercises" / f"{project.NAME}.ipynb").read_text()
    assert "np.exp(z - np.max" not in text
    assert "solution" not in text
    data = json.loads(text)
    assert nbformat.reads(text, as_version=4)
    for cell in data["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    stub = "".join(project.cell_of(data, "softmax")["source"])
    assert stub.startswith("def softmax(z, axis=-1):\n    raise NotImplementedError(")


def test_a_stub_says_what_to_write_and_compiles():
    source = (
        "def f(x):\n    '''Doc.'''\n    # solution\n    y = x\n    return y\n    # end solution"
    )
    made = release.stub(source, "f")
    compile(made, "f", "exec")
    assert "return y" not in made
    assert "'''Doc.'''" in made
    assert "NotImplementedError" in made


BROKEN = "attn_lessons.hunt:block_4_backward"
MENDED = (
    'def hunt(dout, x, params, n_heads, mask=None):\n    """Mend it."""\n'
    "    # solution\n    return mended\n    # end solution"
)


def test_a_function_s_body_can_stand_where_the_solution_was():
    made = release.stub(MENDED, "hunt", release.body_of(BROKEN))
    compile(made, "hunt", "exec")
    assert made.startswith('def hunt(dout, x, params, n_heads, mask=None):\n    """Mend it."""\n')
    assert "mended" not in made
    assert "with one mistake" not in made, "its docstring is not its body"
    arguments = hunt.example(4)
    namespace = dict(vars(hunt))
    exec(made, namespace)
    for got, want in zip(
        namespace["hunt"](**arguments)[1].values(),
        hunt.block_4_backward(**arguments)[1].values(),
        strict=True,
    ):
        assert np.array_equal(got, want)


def commented(x):
    """Of two lines,

    and a third.
    """
    # Why it is done.
    if x:
        return x

    return None


def bare(x):
    return x


def nothing(x):
    """Nothing below."""


def test_a_body_keeps_its_comments_and_blank_lines():
    vars(release)["commented"] = commented
    try:
        body = release.body_of("attn_lessons.grading.release:commented")
    finally:
        del vars(release)["commented"]
    assert body == "# Why it is done.\nif x:\n    return x\n\nreturn None"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("attn_lessons.hunt", "expected module:function"),
        ("attn_lessons.nowhere:f", "No module named 'attn_lessons.nowhere'"),
        ("attn_lessons.hunt:block_7_backward", "has no attribute 'block_7_backward'"),
        ("attn_lessons.hunt:ALPHA", "of a function written in Python"),
        ("attn_lessons.grading.release:ReleaseError", "is no function"),
        ("math:sqrt", "of a function written in Python"),
        ("attn_lessons.grading.release:nothing", "has no docstring with something below it"),
        ("attn_lessons.grading.release:bare", "has no docstring with something below it"),
    ],
)
def test_a_place_without_a_body_is_told(place, told):
    vars(release).update(nothing=nothing, bare=bare)
    try:
        with pytest.raises(ValueError, match=told) as caught:
            release.body_of(place)
    finally:
        del vars(release)["nothing"], vars(release)["bare"]
    assert place in str(caught.value)


def stubbed(place, source):
    def change(data):
        cell = project.cell_of(data, "softmax")
        cell["metadata"]["attn"]["stub"] = place
        cell["source"] = source

    return change


SOFTMAX = "attn_lessons.softmax:softmax"
ANSWER = "def softmax({}):\n    # solution\n    return z\n    # end solution"


def test_a_stub_from_the_library_is_released_without_its_place(root):
    path = root / "solutions" / f"{project.NAME}.ipynb"
    data = json.loads(path.read_text())
    stubbed(SOFTMAX, ANSWER.format("z, axis=-1"))(data)
    path.write_text(json.dumps(data))
    release.release(root / "solutions", root / "exercises")
    released = json.loads((root / "exercises" / f"{project.NAME}.ipynb").read_text())
    cell = project.cell_of(released, "softmax")
    assert cell["metadata"]["attn"] == {"role": "answer", "exercise": "softmax", "points": 2}
    source = "".join(cell["source"])
    assert source.startswith("def softmax(z, axis=-1):\n    ")
    assert "NotImplementedError" not in source
    assert release.body_of(SOFTMAX).splitlines()[-1] in source


@pytest.mark.parametrize(
    ("place", "source", "told"),
    [
        ("attn_lessons.softmax:hardmax", ANSWER.format("z, axis=-1"), "no attribute 'hardmax'"),
        (
            SOFTMAX,
            ANSWER.format("x, axis=-1"),
            "stub: 'attn_lessons.softmax:softmax' takes (z, axis), but 'softmax' (x, axis)",
        ),
        (
            SOFTMAX,
            ANSWER.format("z, axis=-1") + "\n    # solution\n    # end solution",
            "needs one `# solution`",
        ),
    ],
)
def test_a_faulty_stub_is_refused_in_one_line(root, place, source, told):
    lines = again(root, stubbed(place, source))
    assert [line for line in lines if told in line], lines
    assert len(lines) == 1


def test_the_same_bytes_every_time(root):
    first = snapshot(root)
    assert release.release(root / "solutions", root / "exercises") == []
    for path in (root / "exercises").iterdir():
        path.unlink()
    release.release(root / "solutions", root / "exercises")
    assert snapshot(root) == first


def test_outputs_and_formatting_of_a_solution_do_not_matter(root):
    path = root / "solutions" / f"{project.NAME}.ipynb"
    data = json.loads(path.read_text())
    for number, cell in enumerate(data["cells"]):
        cell["source"] = cell["source"].splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell["execution_count"] = number
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
            cell["metadata"]["execution"] = {"iopub.execute_input": "now"}
    path.write_text(json.dumps(data, indent=4))
    assert release.release(root / "solutions", root / "exercises", check=True) == []


def test_check_writes_nothing_and_names_what_differs(root):
    path = root / "exercises" / f"{project.NAME}.ipynb"
    path.write_text(path.read_text() + " ")
    (root / "exercises" / "ch99_left.ipynb").write_text("{}")
    before = snapshot(root)
    differ = release.release(root / "solutions", root / "exercises", check=True)
    assert differ == [f"{project.NAME}.ipynb", "ch99_left.ipynb"]
    assert snapshot(root) == before
    assert release.release(root / "solutions", root / "exercises") == differ
    assert release.release(root / "solutions", root / "exercises", check=True) == []


def drop(data, exercise, role):
    data["cells"].remove(project.cell_of(data, exercise, role))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["cells"][2].update(id="setup"), "cell id 'setup' is used 2 times"),
        (lambda d: d["cells"][2].pop("id"), "cell 3 has no id"),
        (
            lambda d: project.cell_of(d, "softmax")["metadata"]["attn"].update(exercise="sofmax"),
            "no exercise is called 'sofmax'; did you mean softmax",
        ),
        (lambda d: drop(d, "softmax", "check"), "exercise 'softmax' has no check cell"),
        (lambda d: drop(d, "softmax", "answer"), "'softmax' has a check cell but no answer cell"),
        (
            lambda d: project.cell_of(d, "softmax").update(source="def softmax(z, axis=-1): ..."),
            "without `# solution` and `# end solution`",
        ),
        (
            lambda d: project.cell_of(d, "softmax").update(
                source="def softmax(z):\n    # solution\n    pass"
            ),
            "do not alternate",
        ),
        (
            lambda d: project.cell_of(d, "softmax").update(
                source="# solution\nx = 1\n# end solution"
            ),
            "does not define it",
        ),
        (
            lambda d: project.cell_of(d, "softmax", "check").update(source="check(softmax)"),
            'has to be the line check("softmax", softmax)',
        ),
        (
            lambda d: project.cell_of(d, "softmax")["metadata"]["attn"].update(points=77),
            "77 points here, 2 in the catalogue",
        ),
        (lambda d: d["cells"][1]["metadata"].clear(), "role '' is none of given, answer, check"),
        (
            lambda d: (drop(d, "softmax", "check"), drop(d, "softmax", "answer")),
            "'softmax' is in the catalogue but not in the notebook",
        ),
        (
            lambda d: d["cells"].append({**project.cell_of(d, "softmax"), "id": "twin"}),
            "exercise 'softmax' stands there more than once",
        ),
    ],
)
def test_a_faulty_solution_is_refused_in_one_line(root, change, told):
    lines = again(root, change)
    assert len([line for line in lines if told in line]) == 1, lines
    assert all(line.startswith(f"{project.NAME}.ipynb: ") for line in lines)


def test_every_notebook_is_built_before_one_is_written(root):
    (root / "solutions" / "ch02_broken.ipynb").write_text("{")
    path = root / "exercises" / f"{project.NAME}.ipynb"
    path.write_text("old")
    with pytest.raises(release.ReleaseError, match="ch02_broken"):
        release.release(root / "solutions", root / "exercises")
    assert path.read_text() == "old"


def test_no_solutions_is_told(tmp_path):
    with pytest.raises(release.ReleaseError, match="holds no notebooks"):
        release.release(tmp_path, tmp_path / "exercises")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        release.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert path.read_text() == "old"


def test_released_files_can_be_read_by_others(root):
    before = os.umask(0o022)
    try:
        release.write_whole(root / "x", "x")
    finally:
        os.umask(before)
    assert (root / "x").stat().st_mode & 0o777 == 0o644
