"""Grading: seconds a notebook, cold and warm, against plain nbval and nbgrader's autograde.

The same solved notebooks go to each side, one after another in every round, on the same cores; the
figure is the median of the rounds. nbgrader runs from an environment of its own, whose interpreter
is named with ``--nbgrader``; without it that side is left out. To reach, as notebooks a minute
against nbgrader: 10 times where torch is imported, 4 times where it is not.
Run as ``python benchmarks/grading.py --nbgrader /path/to/python``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
ASSIGNMENT = "lessons"


def solved(chapter: Path, torch: bool) -> dict[str, Any]:
    """A submission with full marks: the chapter's solution, with torch imported where asked."""
    notebook = json.loads((ROOT / "solutions" / chapter.name).read_text(encoding="utf-8"))
    if torch:
        for cell in notebook["cells"]:
            if cell["metadata"].get("attn", {}).get("role") == "answer":
                cell["source"] = ["import torch\n", *as_lines(cell["source"])]
                break
    return notebook


def as_lines(source: str | list[str]) -> list[str]:
    return source.splitlines(keepends=True) if isinstance(source, str) else source


def for_nbgrader(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """The same notebook with nbgrader's marks: answers as solutions, checks as locked tests."""
    copy = json.loads(json.dumps(notebook))
    for index, cell in enumerate(copy["cells"]):
        attn = cell["metadata"].pop("attn", {})
        role = attn.get("role")
        if role in ("answer", "check"):
            grade = role == "check"
            cell["metadata"]["nbgrader"] = {
                "grade": grade,
                "solution": not grade,
                "locked": grade,
                "task": False,
                "schema_version": 3,
                "grade_id": f"cell-{index}",
                **({"points": 1} if grade else {}),
            }
    return copy


def timed(command: Sequence[str | Path], cwd: Path, **environment: str) -> float:
    begun = time.perf_counter()
    ran = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    if ran.returncode:
        raise SystemExit(f"{command}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}")
    return seconds


def class_of(folder: Path, notebooks: Mapping[str, Any], students: int) -> Path:
    for student in range(students):
        for name, notebook in notebooks.items():
            path = folder / f"student{student:02}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(notebook), encoding="utf-8")
    return folder


def grade(paths: Sequence[Path], jobs: int, where: Path) -> float:
    report = where / "report.json"
    command = [sys.executable, "-m", "attn_lessons.cli", "grade", *paths]
    options = ["--jobs", str(jobs), "--json", str(report), "--strict"]
    seconds = timed([*command, *options], ROOT, ATTN_LESSONS_STATE=str(where / "state"))
    assert all(row["status"] == "graded" for row in json.loads(report.read_text()))
    return seconds


def nbval(paths: Sequence[Path], where: Path) -> float:
    """Each notebook by itself, as one would loop over a class."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    return sum(timed([*command, "--rootdir", where, path], where) for path in paths)


class Nbgrader:
    """A course with one assignment, its release made once and all students' work submitted."""

    def __init__(self, python: Path, course: Path, notebooks: Mapping[str, Any], n: int) -> None:
        self.python, self.course = python, course
        source = course / "source" / ASSIGNMENT
        source.mkdir(parents=True)
        self.environment = {
            "PYTHONPATH": str(ROOT),
            "JUPYTER_PREFER_ENV_PATH": "1",
            # nbgrader calls alembic, which lies beside its interpreter.
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        }
        for name, notebook in notebooks.items():
            (source / name).write_text(json.dumps(for_nbgrader(notebook)), encoding="utf-8")
        self.run("generate_assignment", ASSIGNMENT, "--force")
        for student in range(n):
            submitted = course / "submitted" / f"student{student:02}" / ASSIGNMENT
            shutil.copytree(source, submitted)

    def run(self, *words: str) -> float:
        command = [self.python, "-m", "nbgrader", *words]
        return timed([*command, f"--course={self.course}"], self.course, **self.environment)

    def grade(self) -> float:
        return self.run("autograde", ASSIGNMENT, "--force")


def measure(torch: bool, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chapters = sorted((ROOT / "exercises").glob("ch*.ipynb"))
    notebooks = {chapter.name: solved(chapter, torch) for chapter in chapters}
    students: int = options.students
    submissions = class_of(folder / "class", notebooks, students)
    paths = sorted(submissions.rglob("*.ipynb"))
    sides: dict[str, Callable[[], float]] = {
        "cold_one": lambda: grade(paths[:1], 1, folder),
        "class": lambda: grade([submissions], options.jobs, folder),
        "nbval": lambda: nbval(paths, folder) / len(paths),
    }
    if options.nbgrader:
        course = Nbgrader(options.nbgrader, folder / "course", notebooks, students)
        sides["nbgrader"] = lambda: course.grade() / len(paths)
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            rounds[name].append(side())
    per_notebook = [whole / len(paths) for whole in rounds["class"]]
    result: dict[str, Any] = {
        "notebooks": len(paths),
        "cold_one_notebook_s": round(statistics.median(rounds["cold_one"]), 2),
        "class_s_a_notebook": round(statistics.median(per_notebook), 3),
        "notebooks_a_minute": round(60 / statistics.median(per_notebook), 1),
    }
    for name in ("nbval", "nbgrader"):
        if name in rounds:
            ratios = [a / b for a, b in zip(rounds[name], per_notebook, strict=True)]
            result[f"{name}_s_a_notebook"] = round(statistics.median(rounds[name]), 2)
            result[f"times_faster_than_{name}"] = round(statistics.median(ratios), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--nbgrader", type=Path, help="interpreter of an environment with nbgrader")
    options = parser.parse_args()
    where = machine.machine()
    result: dict[str, Any] = {"rounds": options.rounds, "jobs": options.jobs}
    if options.nbgrader:
        asked = "from importlib.metadata import version; print(version('nbgrader'))"
        said = subprocess.run([options.nbgrader, "-c", asked], capture_output=True, text=True)
        result["nbgrader"] = said.stdout.strip()
    for torch in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            name = "torch_imported" if torch else "numpy_only"
            result[name] = measure(torch, options, Path(folder))
    machine.write("grading", result, "nbval", "nbclient", "torch", "numpy", where=where)


if __name__ == "__main__":
    main()
