"""make start: ports, copies, stamps, the book's routes, and real starts of a tiny project."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from attn_lessons import install, start

BUILDER = """
import pathlib, sys, time
root = pathlib.Path(__file__).resolve().parents[1]
built = root / "book" / "_build"
(built / "html").mkdir(parents=True, exist_ok=True)
if (built / "built-from").exists():
    print("The book is up to date")
    sys.exit()
print("[1/2] ch01_softmax: ran in 0.1 s", flush=True)
while not (root / "go").exists():
    time.sleep(0.05)
if (root / "warn").exists():
    (built / "html" / "index.html").write_text("<h1>The book, with a warning</h1>")
if (root / "warn").exists() or (root / "break").exists():
    print("The book was not built: ch01_softmax.md:12: WARNING", flush=True)
    sys.exit(1)
(built / "html" / "index.html").write_text("<h1>The book</h1>")
(built / "html" / "style.css").write_text("h1 {}")
(built / "built-from").write_text("now")
"""


def notebook(title: str) -> str:
    answer = {"attn": {"role": "answer", "exercise": "softmax", "points": 3}}
    check = {"attn": {"role": "check", "exercise": "softmax"}}
    code = {"cell_type": "code", "execution_count": None, "outputs": []}
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": [f"# {title}\n", "text"]},
        {**code, "id": "b", "metadata": answer, "source": "def softmax(z): ..."},
        {**code, "id": "c", "metadata": check, "source": 'check("softmax", softmax)'},
    ]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one chapter and a builder that waits until it is let go."""
    root = tmp_path / "a project"
    for folder in ("exercises", "attn_lessons", "book"):
        (root / folder).mkdir(parents=True)
    (root / "exercises" / "ch01_softmax.ipynb").write_text(notebook("1 Softmax"))
    (root / "attn_lessons" / "__init__.py").write_text("")
    (root / "attn_lessons" / "bookbuild.py").write_text(BUILDER)
    return root


# ------------------------------------------------------------------------------------ parts


def test_the_port_asked_for_is_taken_when_it_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    assert start.free_port(port) == port


def test_a_taken_port_gives_the_next_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        if port > 65000:
            pytest.skip("the system handed out a port at the very end of the range")
        assert port < start.free_port(port) < port + start.PORTS_TRIED


def test_no_free_port_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "port_is_free", lambda port: False)
    with pytest.raises(start.StartError, match="no free port from 65530 to 65535"):
        start.free_port(65530)


@pytest.mark.parametrize("text", ["0", "65536", "many"])
def test_a_port_out_of_range_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        start.parse(["--port", text])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_an_empty_port_means_the_usual_one() -> None:
    assert start.parse(["--port", ""]).port == 8888


def test_what_a_learner_has_is_never_overwritten(tmp_path: Path) -> None:
    source, workspace = tmp_path / "exercises", tmp_path / "work space"
    source.mkdir()
    (source / "ch01_softmax.ipynb").write_text("released")
    assert start.copy_exercises(source, workspace) == ["ch01_softmax.ipynb"]
    (workspace / "ch01_softmax.ipynb").write_text("mine")
    (source / "ch02_gradient_checking.ipynb").write_text("released")
    assert start.copy_exercises(source, workspace) == ["ch02_gradient_checking.ipynb"]
    assert start.copy_exercises(source, workspace) == []
    assert (workspace / "ch01_softmax.ipynb").read_text() == "mine"
    assert sorted(path.name for path in workspace.iterdir()) == [
        "ch01_softmax.ipynb",
        "ch02_gradient_checking.ipynb",
    ]


def test_the_list_of_exercises_names_functions_and_points(project: Path) -> None:
    chapter = start.read_chapter(project / "exercises" / "ch01_softmax.ipynb")
    assert chapter == start.Chapter("ch01_softmax.ipynb", "1 Softmax", ("softmax",), 3)
    page = start.contents([chapter], "http://127.0.0.1:1/book/")
    assert "| [1 Softmax](ch01_softmax.ipynb) | `softmax` | 3 |" in page
    assert "(http://127.0.0.1:1/book/ch01_softmax.html)" in page


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"cells": 3}', "{}"])
def test_a_broken_notebook_still_stands_in_the_list(tmp_path: Path, text: str) -> None:
    broken = tmp_path / "ch01_softmax.ipynb"
    broken.write_text(text)
    assert start.read_chapter(broken) == start.Chapter("ch01_softmax.ipynb", "ch01_softmax", (), 0)


def test_lines_of_the_builder_become_steps_that_only_grow() -> None:
    lines = ["[1/5] intro: read", "[4/5] ch02: ran in 3.1 s", "[5/5] x: read", "Writing the pages"]
    steps = [start.build_step(line) for line in lines]
    shares = [step[1] for step in steps if step]
    assert shares == sorted(shares)
    assert len(shares) == 4
    assert all(0 < share < 100 for share in shares)
    assert start.build_step("Sphinx says something") is None


# ----------------------------------------------------------------------------- installation


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "check out"
    (root / ".venv" / "bin").mkdir(parents=True)
    install.venv_python(root).write_text("")
    (root / "constraints.txt").write_text("numpy==2.4.6\n")
    (root / "pyproject.toml").write_text(
        '[project]\nname = "attn-lessons"\n[project.optional-dependencies]\n'
        'torch = ["torch>=2"]\nbook = ["jupyter-book", "attn-lessons[torch]"]\n'
        'test = ["hypothesis"]\ndev = ["ruff"]\n'
    )
    return root


def test_an_installation_is_valid_until_a_pin_changes(checkout: Path) -> None:
    assert not install.is_installed(checkout, "lab")
    stamp = install.stamp_file(checkout, "lab")
    stamp.write_text(install.wanted_stamp(checkout, "lab"))
    assert install.is_installed(checkout, "lab")
    assert not install.is_installed(checkout, "book")
    (checkout / "constraints.txt").write_text("numpy==2.4.7\n")
    assert not install.is_installed(checkout, "lab")


def test_a_later_stage_holds_the_earlier_ones(checkout: Path) -> None:
    stamp = install.stamp_file(checkout, "test")
    stamp.write_text(install.wanted_stamp(checkout, "test"))
    assert all(install.is_installed(checkout, stage) for stage in install.STAGES)


def test_a_moved_checkout_is_installed_again(checkout: Path) -> None:
    install.stamp_file(checkout, "lab").write_text(install.wanted_stamp(checkout, "lab"))
    moved = checkout.rename(checkout.with_name("elsewhere"))
    assert not install.is_installed(moved, "lab")


def test_requirements_leave_out_the_project_itself(checkout: Path) -> None:
    assert install.requirements(checkout, ["torch", "book"]) == ["jupyter-book", "torch>=2"]


def test_nothing_runs_when_all_is_installed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.stamp_file(checkout, "lab").write_text(install.wanted_stamp(checkout, "lab"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert install.ensure(checkout, "lab") is False


def test_a_failing_pip_leaves_no_stamp_and_says_why(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "make_venv", lambda root: None)
    python = install.venv_python(checkout)
    python.write_text("#!/bin/sh\necho Collecting numpy\necho ERROR: no such version\nexit 1\n")
    python.chmod(0o755)
    seen: list[str] = []
    with pytest.raises(install.InstallError, match="no such version"):
        install.ensure(checkout, "lab", seen.append)
    assert seen == ["1 packages found, now numpy"]
    assert not install.stamp_file(checkout, "lab").exists()


def test_an_old_python_is_told_so() -> None:
    with pytest.raises(install.InstallError, match=r"3\.11 or newer is needed; this is 3\.9"):
        install.check_python((3, 9, 6))


# ------------------------------------------------------------------------------- a real run


class Run:
    """A started ``attn_lessons.start`` and the two addresses it printed."""

    def __init__(self, project: Path, workspace: Path, port: int) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "attn_lessons.start",
                f"--port={port}",
                f"--workspace={workspace}",
            ],
            env=os.environ | {"ATTN_LESSONS_PROJECT": str(project)},
            cwd=Path(start.__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self.lines: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(target=self.listen, daemon=True)
        self.reader.start()
        found = re.findall(r"http://\S+", self.until("Ctrl-C stops"))
        self.lab, self.book = found

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def until(self, words: str, seconds: float = 60) -> str:
        end = time.monotonic() + seconds
        while words not in self.said:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                line = ""
            assert line, f"{words!r} was not said within {seconds} s: {self.said}"
            self.said += line
        return self.said

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """End it and prove that nothing of it is left."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        self.process.wait(timeout=30)
        self.reader.join(timeout=5)
        while not self.lines.empty():
            self.said += self.lines.get()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        return self.process.returncode


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        if run.process.poll() is None:
            run.stop()
        if run.process.stdout:
            run.process.stdout.close()


def fetch(url: str, method: str = "GET") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=20) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_start_from_the_first_page_to_ctrl_c(
    project: Path, tmp_path: Path, runs: list[Run]
) -> None:
    workspace = tmp_path / "my work"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        run = Run(project, workspace, taken)
        runs.append(run)
    assert f":{taken}/" not in run.lab, "a taken port was used"

    # JupyterLab answers with the token in the printed address, and asks for one without it.
    status, page = fetch(run.lab)
    assert status == 200
    assert "JupyterLab" in page
    token = run.lab.partition("token=")[2]
    base = run.book.removesuffix("book/")
    assert fetch(base + "api/contents")[0] == 403
    assert fetch(f"{base}api/contents/ch01_softmax.ipynb?token={token}")[0] == 200
    listed = fetch(f"{base}api/contents/contents.md?type=file&token={token}")[1]
    assert "1 Softmax" in json.loads(listed)["content"]
    plugin = "@jupyterlab/apputils-extension:notification"
    settings = json.loads(fetch(f"{base}lab/api/settings/{plugin}?token={token}")[1])
    assert settings["schema"]["properties"]["fetchNews"]["default"] == "false"

    # The book's address shows how far it is, needs no token, and turns into the book.
    status, page = fetch(run.book)
    assert status == 200
    assert "being built" in page
    assert fetch(run.book + "ch01_softmax.html")[1] == page
    assert fetch(run.book + "style.css")[0] == 404
    assert fetch(run.book, "HEAD") == (200, "")
    for _ in range(100):
        state = json.loads(fetch(run.book + "_status")[1])
        if "Page 1 of 2" in state["what"]:
            break
        time.sleep(0.1)
    assert state["what"] == "Page 1 of 2, ch01_softmax: ran in 0.1 s"
    assert 0 < state["percent"] < 100
    (project / "go").touch()
    run.until("is built")
    assert json.loads(fetch(run.book + "_status")[1])["ready"] is True
    assert fetch(run.book) == (200, "<h1>The book</h1>")
    assert fetch(run.book.removesuffix("/")) == (200, "<h1>The book</h1>")
    assert fetch(run.book + "style.css") == (200, "h1 {}")
    assert fetch(run.book + "missing.html")[0] == 404
    assert fetch(run.book + "../built-from")[0] in (400, 403, 404)

    # A kernel runs; Ctrl-C ends it, the server and all else.
    asked = urllib.request.Request(
        f"{base}api/kernels", method="POST", headers={"Authorization": f"token {token}"}
    )
    with urllib.request.urlopen(asked, timeout=30) as reply:
        assert reply.status == 201
    assert len(psutil.Process(run.process.pid).children(recursive=True)) >= 2
    assert run.stop() == 0
    assert "Traceback" not in run.said

    # The second time nothing is copied or built, and the book is there at once.
    (workspace / "ch01_softmax.ipynb").write_text(notebook("1 Softmax, half done"))
    begun = time.monotonic()
    again = Run(project, workspace, taken)
    runs.append(again)
    assert time.monotonic() - begun < 30
    assert fetch(again.book) == (200, "<h1>The book</h1>")
    assert "as you left them" in again.until("is up to date")
    assert "half done" in (workspace / "ch01_softmax.ipynb").read_text()


def test_ctrl_c_while_the_book_is_being_built(
    project: Path, tmp_path: Path, runs: list[Run]
) -> None:
    run = Run(project, tmp_path / "workspace", 20000 + os.getpid() % 20000)
    runs.append(run)
    assert run.stop(signal.SIGTERM) == 0
    assert "could not be built" not in run.said
    assert "Traceback" not in run.said
    assert not (project / "book" / "_build" / "built-from").exists()


def test_a_book_that_fails_leaves_the_exercises_running(
    project: Path, tmp_path: Path, runs: list[Run]
) -> None:
    (project / "go").touch()
    (project / "break").touch()
    run = Run(project, tmp_path / "workspace", 20000 + os.getpid() % 20000)
    runs.append(run)
    assert "ch01_softmax.md:12" in run.until("all it said")
    state = json.loads(fetch(run.book + "_status")[1])
    assert state["failed"] is True
    assert "ch01_softmax.md:12" in state["log"]
    assert fetch(run.lab)[0] == 200


def test_a_book_with_warnings_is_shown_and_the_warnings_are_said(
    project: Path, tmp_path: Path, runs: list[Run]
) -> None:
    (project / "go").touch()
    (project / "warn").touch()
    run = Run(project, tmp_path / "workspace", 20000 + os.getpid() % 20000)
    runs.append(run)
    assert "not without warnings" in run.until("all it said")
    assert fetch(run.book) == (200, "<h1>The book, with a warning</h1>")


def test_the_server_ends_when_its_starter_is_killed(
    project: Path, tmp_path: Path, runs: list[Run]
) -> None:
    (project / "go").touch()
    run = Run(project, tmp_path / "workspace", 20000 + os.getpid() % 20000)
    runs.append(run)
    run.until("is built")
    family = psutil.Process(run.process.pid).children(recursive=True)
    run.process.kill()
    run.process.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
