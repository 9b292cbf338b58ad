"""A small project of one chapter for tests of release and grading: the first one's exercises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_lessons.grading import release

NAME = "ch01_softmax"
ANSWERS = {
    "softmax": """
def softmax(z, axis=-1):
    # solution
    e = np.exp(z - np.max(z, axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)
    # end solution
""",
    "log_softmax": """
def log_softmax(z, axis=-1):
    # solution
    shifted = z - np.max(z, axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    # end solution
""",
    "softmax_jacobian": """
def softmax_jacobian(p):
    # solution
    return np.diag(p) - np.outer(p, p)
    # end solution
""",
    "softmax_backward": """
def softmax_backward(dp, p, axis=-1):
    # solution
    return p * (dp - (dp * p).sum(axis=axis, keepdims=True))
    # end solution
""",
    "cross_entropy": """
def cross_entropy(logits, targets, label_smoothing=0.0):
    # solution
    b, k = logits.shape
    shifted = logits - logits.max(axis=1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    want = np.full((b, k), label_smoothing / k)
    want[np.arange(b), targets] += 1 - label_smoothing
    loss = -(want * logp).sum() / b
    return loss, (np.exp(logp) - want) / b
    # end solution
""",
}
POINTS = {
    "softmax": 2,
    "log_softmax": 2,
    "softmax_jacobian": 2,
    "softmax_backward": 3,
    "cross_entropy": 3,
}
TOTAL = sum(POINTS.values())

Cell = dict[str, Any]


def code(source: str, id: str = "", **attn: Any) -> Cell:
    """One code cell, as JSON."""
    metadata = {"attn": attn} if attn else {}
    cell = {"cell_type": "code", "metadata": metadata, "source": source.strip("\n")}
    return cell | {"outputs": [], "execution_count": None} | ({"id": id} if id else {})


def whole(cells: list[Cell], metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A notebook of these cells, as JSON."""
    return {"cells": cells, "metadata": dict(metadata or {}), "nbformat": 4, "nbformat_minor": 5}


def solution() -> dict[str, Any]:
    """The chapter's solution notebook."""
    cells: list[Cell] = [
        {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# Softmax"},
        code("import numpy as np\n\nfrom attn_lessons import check", "setup", role="given"),
    ]
    for name, source in ANSWERS.items():
        short = name.replace("_", "-")
        points = POINTS[name]
        cells.append(code(source, f"{short}-answer", role="answer", exercise=name, points=points))
        line = f'check("{name}", {name})'
        cells.append(code(line, f"{short}-check", role="check", exercise=name))
    return whole(cells)


def build(root: Path) -> Path:
    """Write the project to ``root`` and release it."""
    (root / "solutions").mkdir(parents=True)
    path = root / "solutions" / f"{NAME}.ipynb"
    path.write_text(json.dumps(solution()), encoding="utf-8")
    release.release(root / "solutions", root / "exercises")
    return root


def answered(root: Path, **answers: str) -> dict[str, Any]:
    """The released notebook with these answers typed in."""
    text = (root / "exercises" / f"{NAME}.ipynb").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    for name, source in answers.items():
        cell_of(data, name)["source"] = source.strip("\n")
    return data


def cell_of(data: dict[str, Any], exercise: str, role: str = "answer") -> Cell:
    """The cell of an exercise in a notebook given as JSON."""
    wanted = {"role": role, "exercise": exercise}
    found = (c for c in data["cells"] if wanted.items() <= c["metadata"].get("attn", {}).items())
    return next(found)


def solved(root: Path) -> dict[str, Any]:
    """The released notebook with every answer right."""
    return answered(root, **ANSWERS)
