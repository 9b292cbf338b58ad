"""From the authors' notebooks to the learners': answers become stubs, outputs go."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import os
import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attn_lessons
from attn_lessons.grading import catalogue, notebook

BEGIN = re.compile(r"^(?P<indent>[ \t]*)# solution[ \t]*$")
END = re.compile(r"^[ \t]*# end solution[ \t]*$")
ROLES = ("given", "answer", "check")
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}


class ReleaseError(ValueError):
    """Solutions that cannot be released; each of ``lines`` says one thing that is wrong."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def release(solutions: Path, exercises: Path, *, check: bool = False) -> list[str]:
    """Write ``exercises`` from ``solutions``; return the names of the files that differed.

    With ``check`` nothing is written. Every notebook is built before the first one is written,
    and each is moved into place whole.
    """
    built = build(solutions)
    stale = [name for name, text in built.items() if _stored(exercises / name) != text]
    left = [p.name for p in sorted(exercises.glob("*.ipynb")) if p.name not in built]
    if not check:
        exercises.mkdir(parents=True, exist_ok=True)
        for name in stale:
            write_whole(exercises / name, built[name])
        for name in left:
            (exercises / name).unlink()
    return sorted([*stale, *left])


def build(solutions: Path) -> dict[str, str]:
    """Every notebook of ``solutions`` as the text its exercise notebook has to have."""
    paths = sorted(solutions.glob("*.ipynb"))
    if not paths:
        raise ReleaseError([f"{solutions}: holds no notebooks"])
    wrong: list[str] = []
    built: dict[str, str] = {}
    for path in paths:
        try:
            built[path.name] = exercise_text(path.read_text(encoding="utf-8"), path)
        except ReleaseError as error:
            wrong += error.lines
    if wrong:
        raise ReleaseError(wrong)
    return built


def exercise_text(solution: str, path: Path) -> str:
    """The exercise notebook's text for one solution notebook's text."""
    try:
        parsed = notebook.parse(solution, path)
    except notebook.NotebookError as error:
        raise ReleaseError([str(error)]) from None
    if wrong := [f"{path.name}: {line}" for line in faults(parsed)]:
        raise ReleaseError(wrong)
    data = json.loads(solution)
    cells = [_released(cell) for cell in data["cells"]]
    mark = {
        "notebook": path.stem,
        "version": attn_lessons.__version__,
        "fingerprint": notebook.fingerprint(notebook.parse(_dump(cells, {}), path).cells),
    }
    return _dump(cells, {"attn": {"release": mark}})


def faults(parsed: notebook.Notebook) -> Iterator[str]:
    """What keeps a solution notebook from being released, one line each."""
    yield from _id_faults(parsed)
    for number, cell in enumerate(parsed.cells, 1):
        yield from (f"cell {number}: {line}" for line in _cell_faults(cell))
    answers = [c.exercise for c in parsed.cells if c.role == "answer"]
    checks = [c.exercise for c in parsed.cells if c.role == "check"]
    for exercise in dict.fromkeys([*answers, *checks]):
        if exercise not in checks:
            yield f"exercise {exercise!r} has no check cell"
        elif exercise not in answers:
            yield f"exercise {exercise!r} has a check cell but no answer cell"
        elif answers.count(exercise) > 1 or checks.count(exercise) > 1:
            yield f"exercise {exercise!r} stands there more than once"
    for known in catalogue.exercises():
        if known.chapter == parsed.name and known.id not in answers:
            yield f"exercise {known.id!r} is in the catalogue but not in the notebook"


def stub(source: str, exercise: str, body: str | None = None) -> str:
    """``source`` with every marked solution replaced by ``body``, else by a line that raises."""
    body = f'raise NotImplementedError("write {exercise} here")' if body is None else body
    kept: list[str] = []
    inside = False
    for line in source.splitlines():
        if begin := BEGIN.match(line):
            inside = True
            kept += textwrap.indent(body, begin["indent"]).splitlines()
        elif END.match(line):
            inside = False
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


def body_of(place: str) -> str:
    """What stands below the docstring of the function at ``place``, ``"module:function"``.

    An answer cell whose metadata has such a place as ``stub`` hands learners that body to mend.

    ValueError: there is no such function.
    """
    module, _, name = place.partition(":")
    try:
        function = inspect.unwrap(getattr(importlib.import_module(module), name))
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        text = f"stub: expected module:function, of a function written in Python; got {place!r}"
        raise ValueError(f"{text} ({error})") from None
    (definition,) = ast.parse("\n".join(lines)).body
    if not isinstance(definition, ast.FunctionDef):
        raise ValueError(f"stub: {place!r} is no function")
    documented = ast.get_docstring(definition) is not None
    body = textwrap.dedent("\n".join(lines[definition.body[0].end_lineno :]))
    if not documented or not body.strip():
        raise ValueError(f"stub: {place!r} has no docstring with something below it")
    return body.strip("\n")


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _id_faults(parsed: notebook.Notebook) -> Iterator[str]:
    counts = Counter(cell.id for cell in parsed.cells)
    for number, cell in enumerate(parsed.cells, 1):
        if not cell.id:
            yield f"cell {number} has no id"
    for name, count in counts.items():
        if name and count > 1:
            yield f"cell id {name!r} is used {count} times"


def _cell_faults(cell: notebook.Cell) -> Iterator[str]:
    if cell.kind != "code":
        return
    if cell.role not in ROLES:
        yield f"role {cell.role!r} is none of {', '.join(ROLES)}"
    if cell.role not in ("answer", "check"):
        return
    try:
        exercise = catalogue.find(cell.exercise)
    except ValueError as error:
        yield str(error).removeprefix("exercise_id: ")
        return
    if cell.role == "check":
        wanted = f'check("{cell.exercise}", {cell.exercise})'
        if cell.source.strip() != wanted:
            yield f"a check cell has to be the line {wanted}"
        return
    yield from _marker_faults(cell.source)
    if cell.exercise not in notebook.defined_names(cell.source):
        yield f"the answer cell of {cell.exercise!r} does not define it"
    if cell.stub:
        yield from _stub_faults(cell)
    if cell.points != exercise.points:
        yield f"{cell.exercise!r} has {cell.points} points here, {exercise.points} in the catalogue"


def _stub_faults(cell: notebook.Cell) -> Iterator[str]:
    """What keeps a function's body from standing in for the marked solution."""
    try:
        made = stub(cell.source, cell.exercise, body_of(cell.stub))
    except ValueError as error:
        yield str(error)
        return
    if sum(bool(BEGIN.match(line)) for line in cell.source.splitlines()) != 1:
        yield f"stub: {cell.stub!r} needs one `# solution`, whose place it takes"
        return
    module, _, name = cell.stub.partition(":")
    given = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    for node in ast.walk(ast.parse(made)):
        if isinstance(node, ast.FunctionDef) and node.name == cell.exercise:
            own = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if own != given:
                yield (
                    f"stub: {cell.stub!r} takes ({', '.join(given)}), but {cell.exercise!r} "
                    f"({', '.join(own)})"
                )


def _marker_faults(source: str) -> Iterator[str]:
    marks = [line.strip() for line in source.splitlines() if BEGIN.match(line) or END.match(line)]
    if not marks:
        yield "an answer cell without `# solution` and `# end solution`"
    elif marks != ["# solution", "# end solution"] * (len(marks) // 2):
        yield "`# solution` and `# end solution` do not alternate"


def _released(cell: dict[str, Any]) -> dict[str, Any]:
    cell = copy.deepcopy(cell)
    source = cell.get("source", "")
    text = "".join(source) if isinstance(source, list) else source
    attn = cell.get("metadata", {}).get("attn", {})
    if cell["cell_type"] == "code":
        cell |= {"outputs": [], "execution_count": None}
        cell["metadata"].pop("execution", None)
    if attn.get("role") == "answer":
        place = attn.pop("stub", None)
        text = stub(text, attn["exercise"], body_of(place) if place else None)
    cell["source"] = text.splitlines(keepends=True)
    return cell


def _dump(cells: list[dict[str, Any]], metadata: dict[str, Any]) -> str:
    whole = {
        "cells": cells,
        "metadata": {**metadata, "kernelspec": KERNEL, "language_info": LANGUAGE},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _stored(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
