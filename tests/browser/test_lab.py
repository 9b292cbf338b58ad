"""The learner's way in a real browser: a wrong answer named, a right one green, and graded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lab
import pytest

from attn_lessons.grading import catalogue

NAME = "ch01_softmax"
MISTAKE = "no max subtraction"
NO_MAXIMUM = """def softmax(z, axis=-1):
    e = np.exp(z)
    return e / e.sum(axis=axis, keepdims=True)
"""
RIGHT = """def softmax(z, axis=-1):
    z = np.asarray(z)
    shifted = z - z.max(axis=axis, keepdims=True)
    weights = np.exp(shifted)
    return weights / weights.sum(axis=axis, keepdims=True)
"""

pytestmark = pytest.mark.browser


def test_from_a_wrong_answer_to_full_marks(browser: Any, tmp_path: Path) -> None:
    project = lab.project_without_book(tmp_path / "project")
    workspace = tmp_path / "work space"
    elsewhere: list[str] = []
    with lab.started(workspace, 21000 + os.getpid() % 20000, project) as (address, book):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda asked: elsewhere.append(asked.url))
        notebook = lab.Notebook(page, address, f"{NAME}.ipynb")
        file = workspace / f"{NAME}.ipynb"
        answer, check = (lab.position(file, role, "softmax") for role in ("answer", "check"))
        for index in range(answer):
            notebook.run(index)

        # As released: not an error, only not solved.
        notebook.run(answer)
        assert "not solved yet" in notebook.run(check).inner_text()

        # Wrong: its mistake is named, with a way into the book.
        notebook.type(answer, NO_MAXIMUM)
        notebook.run(answer)
        shown = notebook.run(check)
        wrong = shown.inner_text()
        expected = next(m for m in catalogue.find("softmax").mistakes if m.name == MISTAKE)
        assert expected.name.lower() in wrong.lower()
        assert expected.why.rstrip(".") in wrong
        assert "First case that fails" in wrong
        assert "Traceback" not in wrong
        link = shown.locator("a", has_text="book").first.get_attribute("href")
        assert book.endswith("/book/")
        assert link == f"/book/{expected.section}"

        # Right: green, and nothing red is left.
        notebook.type(answer, RIGHT)
        notebook.run(answer)
        right = notebook.run(check)
        assert "passed" in right.inner_text()
        assert expected.name.lower() not in right.inner_text().lower()
        notebook.save()
        page.close()

    # Nothing was asked of any other machine.
    host = address.split("/lab")[0]
    local = (host, host.replace("http", "ws"), "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(local)] == []

    report = tmp_path / "grades.json"
    subprocess.run(
        [sys.executable, "-m", "attn_lessons.cli", "grade", str(file), "--json", str(report)],
        cwd=lab.ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    (row,) = json.loads(report.read_text())
    assert row["status"] == "graded"
    by_id = {exercise["id"]: exercise for exercise in row["exercises"]}
    assert by_id["softmax"]["status"] == "passed"
    assert by_id["softmax"]["points"] == by_id["softmax"]["max_points"] > 0
    assert {e["status"] for name, e in by_id.items() if name != "softmax"} <= {"failed", "error"}
    assert row["points"] == by_id["softmax"]["points"]
