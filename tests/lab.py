"""JupyterLab as a learner has it, driven by the system's Chromium: for tests and for pictures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# In place of the real builder, whose pages have tests of their own.
NO_BOOK = """
import pathlib
built = pathlib.Path(__file__).resolve().parents[1] / "book" / "_build"
(built / "html").mkdir(parents=True, exist_ok=True)
(built / "html" / "index.html").write_text("<title>The book</title>")
(built / "built-from").write_text("now")
"""


def browser() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def project_without_book(folder: Path) -> Path:
    """The exercises as released, with a builder that is done at once."""
    shutil.copytree(ROOT / "exercises", folder / "exercises")
    (folder / "attn_lessons").mkdir()
    (folder / "attn_lessons" / "__init__.py").write_text("")
    (folder / "attn_lessons" / "bookbuild.py").write_text(NO_BOOK)
    return folder


@contextlib.contextmanager
def started(workspace: Path, port: int, project: Path | None = None) -> Iterator[tuple[str, str]]:
    """Run the start command; gives the addresses of JupyterLab and of the book."""
    named = {} if project is None else {"ATTN_LESSONS_PROJECT": str(project)}
    options = ["--port", str(port), "--workspace", str(workspace)]
    with subprocess.Popen(
        [sys.executable, "-m", "attn_lessons.start", *options],
        cwd=ROOT,
        env={**os.environ, **named},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            while "Ctrl-C" not in said:
                line = process.stdout.readline()
                assert line, f"JupyterLab did not start:\n{said}"
                said += line
            lab, book = re.findall(r"http://\S+", said)
            yield lab, book
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 0


def code_cells(notebook: Path) -> list[dict[str, Any]]:
    cells = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def position(notebook: Path, role: str, exercise: str) -> int:
    """Which of the code cells is this exercise's answer or check."""
    for index, cell in enumerate(code_cells(notebook)):
        attn = cell["metadata"].get("attn", {})
        if (attn.get("role"), attn.get("exercise")) == (role, exercise):
            return index
    raise LookupError(f"{notebook.name} has no {role} cell of {exercise}")


class Notebook:
    """An open notebook in a page of JupyterLab."""

    def __init__(self, page: Any, address: str, name: str) -> None:
        self.page = page
        page.goto(address)
        page.locator(".jp-MarkdownViewer table").wait_for(timeout=90_000)
        page.locator(f".jp-MarkdownViewer a[href*='{name}']").first.click()
        self.panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.panel.locator(".jp-CodeCell").first.wait_for(timeout=60_000)
        page.locator("#jp-main-statusbar", has_text="| Idle").wait_for(timeout=60_000)

    def cell(self, index: int) -> Any:
        return self.panel.locator(".jp-CodeCell").nth(index)

    def enter(self, index: int) -> Any:
        """Put the cursor into a cell; JupyterLab may still be laying it out, so it is looked at."""
        cell = self.cell(index)
        for _ in range(20):
            cell.locator(".cm-content").click(timeout=60_000)
            if cell.locator(".cm-content:focus").count():
                return cell
            self.page.wait_for_timeout(250)
        raise AssertionError(f"code cell {index} cannot be entered")

    def type(self, index: int, source: str) -> None:
        """Replace what stands in a cell, as if pasted."""
        self.enter(index)
        self.page.keyboard.press("ControlOrMeta+A")
        self.page.keyboard.press("Delete")
        self.page.keyboard.insert_text(source)

    def run(self, index: int) -> Any:
        """Run a cell and wait for it; gives its output area."""
        from playwright.sync_api import expect

        cell = self.enter(index)
        prompt = cell.locator(".jp-InputPrompt")
        before = prompt.inner_text()
        self.page.keyboard.press("ControlOrMeta+Enter")
        expect(prompt).not_to_have_text(before, timeout=60_000)
        expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=60_000)
        return cell.locator(".jp-Cell-outputWrapper")

    def save(self) -> None:
        self.page.keyboard.press("ControlOrMeta+S")
        self.panel.page.locator(".jp-mod-dirty").first.wait_for(state="detached", timeout=20_000)
