"""Notebooks: read whatever comes, find the learner's answers, put them into the released one."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from attn_lessons import _paths

StepRole = Literal["prelude", "given", "learner", "answer", "emit"]
MAX_NOTEBOOK_BYTES = 64 * 2**20


class NotebookError(ValueError):
    """A notebook that cannot be used, said in one line."""


@dataclass(frozen=True)
class Cell:
    """One cell, as far as grading looks at it."""

    id: str
    kind: str
    source: str
    role: str = ""
    exercise: str = ""
    points: int = 0
    stub: str = ""


@dataclass(frozen=True)
class Notebook:
    """A notebook's cells and what its metadata says of the release it was copied from."""

    name: str
    cells: tuple[Cell, ...]
    release: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exercises(self) -> tuple[str, ...]:
        """The exercises that are checked, in order."""
        return tuple(cell.exercise for cell in self.cells if cell.role == "check")

    @property
    def code(self) -> tuple[Cell, ...]:
        """The code cells that say something."""
        return tuple(c for c in self.cells if c.kind == "code" and c.source.strip())


@dataclass(frozen=True)
class Step:
    """One cell of a rebuilt notebook. ``cell`` is its number in the learner's, from 1."""

    role: StepRole
    source: str
    exercise: str = ""
    cell: int | None = None


def read(path: Path) -> Notebook:
    """The notebook at ``path``, however oddly formed; ``NotebookError`` where there is none."""
    return parse(text_of(path), path)


def text_of(path: Path) -> str:
    """What the file holds; ``NotebookError`` where that can be no notebook."""
    try:
        size = path.stat().st_size
        if size > MAX_NOTEBOOK_BYTES:
            raise NotebookError(f"{path}: {size / 2**20:.0f} MiB is too large for a notebook")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotebookError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise NotebookError(f"{path}: not a notebook (not UTF-8 text)") from None
    except OSError as error:
        raise NotebookError(f"{path}: {error.strerror or error}") from None


def parse(text: str, path: Path) -> Notebook:
    """The notebook that ``text`` holds; ``path`` names it in messages."""
    if not text.strip():
        raise NotebookError(f"{path}: the file is empty")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotebookError(
            f"{path}: not a notebook (line {error.lineno} is not JSON: {error.msg})"
        ) from None
    except (RecursionError, ValueError):
        raise NotebookError(f"{path}: not a notebook (JSON that cannot be read)") from None
    cells = _cells(data)
    if cells is None:
        raise NotebookError(f"{path}: JSON, but not a notebook (no list of cells)")
    release = _mapping(_mapping(_mapping(data.get("metadata")).get("attn")).get("release"))
    return Notebook(path.stem, tuple(_cell(c) for c in cells if isinstance(c, dict)), release)


def notebook_names() -> tuple[str, ...]:
    """The released notebooks' names, in the book's order."""
    return tuple(sorted(path.stem for path in _paths.exercises_dir().glob("ch*.ipynb")))


def find_name(asked: str) -> str:
    """The released notebook called ``asked`` ("ch01", "ch01_softmax", "ch01_softmax.ipynb")."""
    names, stem = notebook_names(), Path(asked).stem
    exact = [name for name in names if stem in (name, name.split("_")[0])]
    if exact:
        return exact[0]
    near = difflib.get_close_matches(stem, [*names, *(n.split("_")[0] for n in names)], 1, 0.5)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(names) or 'none'}"
    raise NotebookError(f"{asked}: no such chapter; {advice}")


@lru_cache(maxsize=64)
def pristine(name: str) -> Notebook:
    """The released notebook of this name."""
    return read(_paths.exercises_dir() / f"{name}.ipynb")


def pristine_for(submission: Notebook) -> Notebook:
    """The released notebook a submission belongs to: by its name, else by what it holds."""
    names = notebook_names()
    recorded = submission.release.get("notebook")
    for candidate in (submission.name, recorded):
        if candidate in names:
            return pristine(str(candidate))
    chapter = re.match(r"(ch\d\d)(?!\d)", submission.name)
    if chapter and (same := [n for n in names if n.startswith(chapter[1])]):
        return pristine(same[0])
    asked = {c.exercise for c in submission.cells if c.exercise}
    shared = {name: len(asked & set(pristine(name).exercises)) for name in names}
    best = max(shared, key=lambda name: shared[name], default=None)
    if best is None or not shared[best]:
        raise NotebookError(f"{submission.name}: belongs to no released notebook")
    return pristine(best)


def fingerprint(cells: Iterable[Cell]) -> str:
    """What makes two releases of a notebook the same to the grader: its exercises and code."""
    code = [[c.id, c.role, c.exercise, c.points, c.source] for c in cells if c.kind == "code"]
    text = json.dumps(code, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def staleness(submission: Notebook, released: Notebook) -> str:
    """One sentence where a submission was made from another release, or an empty string."""
    mine, current = submission.release, released.release
    if not mine.get("fingerprint") or mine.get("fingerprint") == current.get("fingerprint"):
        return ""
    return (
        f"made from release {_release_name(mine)}, this is {_release_name(current)}; "
        f"`attn-lessons reset {released.name.split('_')[0]}` makes a fresh copy and keeps yours"
    )


def rebuild(released: Notebook, submission: Notebook, emit: Callable[[str], str]) -> list[Step]:
    """The released notebook with the learner's cells in it and ``emit`` for every check.

    Answers are found by cell id, else by the exercise in the metadata, else by the function they
    define. The learner's other code (helpers, changed given cells) comes along: it stands behind
    the cell it stood behind. Checks come from the release alone.
    """
    matched = _match(released, submission)
    extras = _extras(submission, matched)
    home = {place: number for number, place in matched.items()}
    steps = [*_learners(extras.get(None, []), submission)]
    for number, cell in enumerate(released.cells):
        place = home.get(number)
        mine = submission.cells[place] if place is not None else None
        if cell.role == "answer" and mine is not None and place is not None:
            steps.append(Step("answer", mine.source, cell.exercise, place + 1))
        elif cell.role == "check":
            steps += _learners(_changed(cell, mine, place), submission)
            steps.append(Step("emit", emit(cell.exercise), cell.exercise))
        elif cell.kind == "code" and cell.role != "answer":
            steps.append(Step("given", cell.source))
            steps += _learners(_changed(cell, mine, place), submission)
        if place is not None:
            steps += _learners(extras.get(place, []), submission)
    return steps


def missing(released: Notebook, submission: Notebook) -> tuple[str, ...]:
    """Exercises for which the submission has no answer cell at all."""
    found = [released.cells[number] for number in _match(released, submission).values()]
    answered = {cell.exercise for cell in found if cell.role == "answer"}
    return tuple(e for e in released.exercises if e not in answered)


def defined_names(source: str) -> set[str]:
    """Names that ``source`` binds at top level; by reading its lines where it does not parse."""
    try:
        tree = ast.parse(_without_magics(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set(re.findall(r"^(?:async\s+)?def\s+(\w+)", source, re.MULTILINE))
    return set(_bound(tree.body))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name.split(".")[0] for alias in names)
            case ast.Assign(targets=targets):
                yield from (t.id for t in targets if isinstance(t, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                yield name
            case ast.If(body=inner, orelse=other) | ast.Try(body=inner, orelse=other):
                yield from _bound([*inner, *other])
            case ast.With(body=inner):
                yield from _bound(inner)


def _without_magics(source: str) -> str:
    return re.sub(r"^[ \t]*[%!?].*$", "", source, flags=re.MULTILINE)


def _match(released: Notebook, submission: Notebook) -> dict[int, int]:
    """Where each recognised cell of the submission belongs: its index -> the released one's."""
    matched: dict[int, int] = {}

    def pair(place: int, number: int) -> None:
        if place not in matched and number not in matched.values():
            matched[place] = number

    rules: tuple[Callable[[Cell, Cell], bool], ...] = (_same_id, _same_exercise, _same_source)
    for rule in rules:
        for number, cell in enumerate(released.cells):
            for place, mine in enumerate(submission.cells):
                if mine.kind == cell.kind and rule(mine, cell):
                    pair(place, number)
    for number, cell in enumerate(released.cells):
        if cell.role == "answer" and number not in matched.values():
            _pair_by_definition(cell, number, submission, pair)
    return matched


def _pair_by_definition(
    cell: Cell, number: int, submission: Notebook, pair: Callable[[int, int], None]
) -> None:
    """The last cell that defines the function is the one that counts when cells run in order."""
    for place in reversed(range(len(submission.cells))):
        mine = submission.cells[place]
        if mine.kind == "code" and cell.exercise in defined_names(mine.source):
            pair(place, number)


def _same_id(mine: Cell, cell: Cell) -> bool:
    return bool(mine.id) and mine.id == cell.id


def _same_exercise(mine: Cell, cell: Cell) -> bool:
    return bool(cell.exercise) and (mine.role, mine.exercise) == (cell.role, cell.exercise)


def _same_source(mine: Cell, cell: Cell) -> bool:
    return cell.role != "answer" and bool(cell.source) and mine.source == cell.source


def _extras(submission: Notebook, matched: Mapping[int, int]) -> dict[int | None, list[int]]:
    """The learner's own code cells, listed under the recognised cell they stand behind."""
    behind: dict[int | None, list[int]] = {}
    last: int | None = None
    for place, cell in enumerate(submission.cells):
        if place in matched:
            last = place
        elif cell.kind == "code" and cell.source.strip():
            behind.setdefault(last, []).append(place)
    return behind


def _learners(places: Iterable[int], submission: Notebook) -> Iterator[Step]:
    for place in places:
        yield Step("learner", submission.cells[place].source, cell=place + 1)


def _changed(cell: Cell, mine: Cell | None, place: int | None) -> list[int]:
    same = mine is None or place is None or mine.source.strip() in ("", cell.source.strip())
    return [] if same or place is None else [place]


def _release_name(release: Mapping[str, Any]) -> str:
    return f"{release.get('version', '?')} ({release.get('fingerprint', '?')})"


def _cells(data: Any) -> list[Any] | None:
    """The list of cells, in today's format or in the one before it."""
    if not isinstance(data, dict):
        return None
    cells = data.get("cells")
    sheets = data.get("worksheets")
    if cells is None and isinstance(sheets, list):
        cells = [cell for sheet in sheets for cell in _mapping(sheet).get("cells") or []]
    return cells if isinstance(cells, list) else None


def _cell(data: dict[str, Any]) -> Cell:
    attn = _mapping(_mapping(data.get("metadata")).get("attn"))
    points = attn.get("points")
    return Cell(
        id=_text(data.get("id")),
        kind=_text(data.get("cell_type")),
        source=_text(data.get("source", data.get("input"))),
        role=_text(attn.get("role")),
        exercise=_text(attn.get("exercise")),
        points=points if type(points) is int else 0,
        stub=_text(attn.get("stub")),
    )


def _text(value: Any) -> str:
    parts = value if isinstance(value, list) else [value]
    text = "".join(part for part in parts if isinstance(part, str))
    # Half a surrogate pair is valid JSON, but no text that could be written down again.
    return text.encode("utf-8", "replace").decode("utf-8")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
