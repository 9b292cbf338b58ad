"""``make start`` and ``attn-lessons start``: one JupyterLab with the exercises and the book.

Standard library only: from a checkout this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from attn_lessons import bookbuild, install
from attn_lessons._paths import project_root

HOST = "127.0.0.1"
CONTENTS = "contents.md"
PORTS_TRIED = 50

# JupyterLab asks nobody for news or updates, and shows Markdown as a page.
LAB_SETTINGS: dict[str, dict[str, Any]] = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
    "@jupyterlab/docmanager-extension:plugin": {
        "defaultViewers": {"markdown": "Markdown Preview"},
    },
    "@jupyterlab/extensionmanager-extension:plugin": {"enabled": False},
}


# ---------------------------------------------------------------- the person at the terminal


class Terminal:
    """One line a subject: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, stream: Any = None, quiet_seconds: float = 15.0) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.quiet_seconds = quiet_seconds
        self.lock = threading.RLock()
        self.open = ""
        self.printed_at = 0.0

    def _line(self, subject: str, text: str) -> str:
        return f"  {subject:<11} {text}"

    def _close(self) -> None:
        if self.open and self.live:
            self.stream.write("\n")
        self.open = ""

    def say(self, subject: str, text: str) -> None:
        """A line that stays."""
        with self.lock:
            if self.live and self.open == subject:
                self.stream.write("\r\x1b[2K")
                self.open = ""
            self._close()
            self.stream.write(self._line(subject, text) + "\n")
            self.stream.flush()

    def progress(self, subject: str, text: str) -> None:
        """A line that will be written over."""
        with self.lock:
            now = time.monotonic()
            if self.live:
                if self.open not in ("", subject):
                    self._close()
                width = shutil.get_terminal_size().columns
                self.stream.write("\r\x1b[2K" + self._line(subject, text)[: width - 1])
                self.open = subject
            elif now - self.printed_at > self.quiet_seconds:
                self.stream.write(self._line(subject, text) + "\n")
                self.printed_at = now
            self.stream.flush()


# ------------------------------------------------------------------------------- the learner


def copy_exercises(source: Path, workspace: Path) -> list[str]:
    """Copy the notebooks that the workspace lacks; what is there is the learner's and stays."""
    workspace.mkdir(parents=True, exist_ok=True)
    new = []
    for notebook in sorted(source.glob("ch*.ipynb")):
        target = workspace / notebook.name
        if target.exists():
            continue
        part = workspace / f".{notebook.name}.part"
        shutil.copyfile(notebook, part)
        os.replace(part, target)
        new.append(notebook.name)
    return new


@dataclass(frozen=True)
class Chapter:
    """A row of the list of exercises."""

    file: str
    title: str
    exercises: tuple[str, ...]
    points: int


def read_chapter(notebook: Path) -> Chapter:
    """Title, exercises and points of a notebook; a file that is none still has its name."""
    title, points = notebook.stem, dict[str, int]()
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        title = heading[1].strip() if heading else title
        for cell in cells:
            attn = cell["metadata"].get("attn", {})
            if "exercise" in attn:
                name = attn["exercise"]
                points[name] = max(points.get(name, 0), int(attn.get("points", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return Chapter(notebook.name, title, tuple(points), sum(points.values()))


def contents(chapters: Sequence[Chapter], book: str) -> str:
    """The page that JupyterLab opens on."""
    rows = []
    for chapter in chapters:
        names = ", ".join(f"`{name}`" for name in chapter.exercises)
        page = f"{book}{Path(chapter.file).stem}.html"
        rows.append(
            f"| [{chapter.title}]({chapter.file}) | {names} | {chapter.points} | [read]({page}) |"
        )
    return "\n".join(
        [
            "# Attention by Hand",
            "",
            f"The book is at [{book}]({book}). Open a notebook, replace "
            "`raise NotImplementedError`, and run the cell below it with Shift+Enter: "
            "`check(...)` says whether the answer is right, and if not, what is wrong with it.",
            "",
            "| exercises | functions to write | points | chapter |",
            "| :-- | :-- | --: | :-- |",
            *rows,
            "",
            "A fresh copy of a chapter: `attn-lessons reset ch01` in a terminal; "
            "your work is kept beside it.",
            "What is solved, what is next: `attn-lessons progress`.",
            "",
            "This page is written anew at every start.",
            "",
        ]
    )


# ------------------------------------------------------------------------------- the server


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(wanted: int) -> int:
    """The port asked for, or the next one that nobody holds."""
    for port in range(wanted, min(wanted + PORTS_TRIED, 65536)):
        if port_is_free(port):
            return port
    raise StartError(f"no free port from {wanted} to {min(wanted + PORTS_TRIED, 65536) - 1}")


def server_command(python: Path, workspace: Path, port: int) -> list[str]:
    flags = {
        "ServerApp.root_dir": str(workspace),
        "ServerApp.ip": HOST,
        "ServerApp.port": str(port),
        "ServerApp.port_retries": "0",
        "ServerApp.open_browser": "False",
        "ServerApp.default_url": f"/lab/tree/{CONTENTS}",
        "ServerApp.jpserver_extensions": "attn_lessons.server=True",
        "ServerApp.allow_root": str(os.geteuid() == 0),
        "ServerApp.log_level": "WARN",
        "LabApp.news_url": "None",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.extension_manager": "readonly",
    }
    return [str(python), "-m", "jupyter_server", *(f"--{k}={v}" for k, v in flags.items())]


def server_environment(state: Path, book: Path, token: str) -> dict[str, str]:
    return os.environ | {
        "ATTN_LESSONS_BOOK": str(book),
        "ATTN_LESSONS_STATUS": str(state / "status.json"),
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_PATH": str(state / "jupyter"),
        # The environment's own kernel, not one of the same name in the home folder.
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "lab-workspaces"),
    }


def write_lab_settings(state: Path) -> None:
    folder = state / "jupyter" / "labconfig"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "default_setting_overrides.json", json.dumps(LAB_SETTINGS, indent=1))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def write(path: Path, text: str) -> None:
    """All of the text or none of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class StartError(RuntimeError):
    """Nothing could be started; the message is for the person at the terminal."""


class Children:
    """The processes that were started, so that all of them end with us."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: list[subprocess.Popen[str]] = []
        self.closed = False

    def add(self, process: subprocess.Popen[str]) -> None:
        with self.lock:
            self.running.append(process)
            if self.closed:
                _signal_group(process, signal.SIGTERM)

    def stop(self, patience: float = 10.0) -> None:
        """Ask every process group to end, newest first, then make sure."""
        with self.lock:
            self.closed = True
            running = [p for p in reversed(self.running) if p.poll() is None]
        for process in running:
            _signal_group(process, signal.SIGTERM)
        until = time.monotonic() + patience
        for process in running:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                process.wait()


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        process.send_signal(number)


# --------------------------------------------------------------------------------- the book


@dataclass
class Book:
    """The build behind the server: what is done, for the waiting page and the terminal."""

    python: Path
    root: Path
    state: Path
    terminal: Terminal
    children: Children

    def __post_init__(self) -> None:
        self.since = time.time()
        self.ready = (self.build_folder / bookbuild.STAMP).exists()
        self.status(what="Getting ready")

    @property
    def build_folder(self) -> Path:
        return self.root / "book" / "_build"

    @property
    def pages(self) -> Path:
        return self.build_folder / "html"

    @property
    def log(self) -> Path:
        return self.state / "book.log"

    def status(self, **facts: Any) -> None:
        facts = {"since": self.since, "ready": self.ready} | facts
        write(self.state / "status.json", json.dumps(facts))

    def installing(self, text: str) -> None:
        self.status(what=f"Installing what the book needs: {text}", percent=2)
        self.terminal.progress("book", f"installing what it needs: {text}")

    def build(self) -> bool:
        """Run the builder and tell what it is at. False where there was nothing to do.

        Raises CommandFailed with the end of what the builder said; where it only had warnings,
        which fail a build, the pages are there all the same.
        """
        polite = ["nice", "-n", "5"] if shutil.which("nice") else []
        # Run in the book's root, so that it is the package there that builds, of the sources there.
        command = [str(self.python), "-m", "attn_lessons.bookbuild"]
        worked = True
        for line in install.lines_of(
            [*polite, *command], self.log, self.children.add, cwd=self.root
        ):
            worked = worked and "up to date" not in line
            step = build_step(line)
            if step is not None and worked:
                what, percent = step
                self.status(what=what, percent=percent)
                self.terminal.progress("book", what[0].lower() + what[1:])
        self.readable()
        return worked

    def readable(self) -> None:
        self.ready = True
        self.status(what="Built", percent=100)

    def has_new_pages(self) -> bool:
        index = self.pages / "index.html"
        return index.exists() and index.stat().st_mtime >= self.since

    def failed(self, text: str) -> None:
        self.status(failed=True, what="Stopped", percent=100, log=text)


def build_step(line: str) -> tuple[str, int] | None:
    """What a line of the builder tells: a step for people, and how far that is in per cent."""
    page = re.match(r"\[(\d+)/(\d+)\] (.+)", line.strip())
    if page:
        return f"Page {page[1]} of {page[2]}, {page[3]}", 5 + 85 * int(page[1]) // int(page[2])
    if line.startswith("Writing"):
        return line.strip(), 92
    return None


def book_root(state: Path) -> Path:
    """Where the book is built: in the checkout, or in a copy of what the wheel carries."""
    root = project_root()
    if (root / "attn_lessons").is_dir():
        return root
    staged = state / "project"
    package = Path(__file__).resolve().parent
    left_out = shutil.ignore_patterns("_project", "__pycache__")
    shutil.copytree(root, staged, dirs_exist_ok=True, ignore=left_out)
    shutil.copytree(package, staged / "attn_lessons", dirs_exist_ok=True, ignore=left_out)
    return staged


# ---------------------------------------------------------------------------------- the run


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the run the way Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(
    python: Path, workspace: Path, state: Path, output: Path, wanted: int, children: Children
) -> tuple[subprocess.Popen[str], str, str]:
    """A server that answers, its address and its token. Tries on where a port is snatched away."""
    token = secrets.token_hex(16)
    log = state / "server.log"
    port = wanted
    while True:
        port = free_port(port)
        with log.open("w", encoding="utf-8") as stream:
            server = subprocess.Popen(
                server_command(python, workspace, port),
                env=server_environment(state, output, token),
                cwd=workspace,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        children.add(server)
        url = f"http://{HOST}:{port}/"
        while server.poll() is None:
            if answers(url + "api"):
                return server, url, token
            time.sleep(0.1)
        if port_is_free(port) or port >= 65535:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-12:])
            raise StartError(f"JupyterLab did not start:\n{tail}\n({log})")
        port += 1


def make_book(book: Book, root: Path | None) -> None:
    """What goes on behind the running server: install the rest, then build the pages."""
    begun = time.monotonic()
    try:
        if root is not None:
            install.ensure(root, "book", book.installing, book.children.add)
        worked = book.build()
    except (install.CommandFailed, install.InstallError, OSError) as failure:
        if book.children.closed:
            return
        if book.has_new_pages():
            book.readable()
            book.terminal.say("book", "is built, not without warnings")
        else:
            book.failed(str(failure))
            last = str(failure).strip().splitlines()[-1:]
            book.terminal.say("book", f"could not be built: {''.join(last)}")
        book.terminal.say("", f"all it said: {book.log}")
        return
    took = f"is built ({time.monotonic() - begun:.0f} s)"
    book.terminal.say("book", took if worked else "is up to date")


def prepare(root: Path, terminal: Terminal, children: Children) -> Path:
    """The checkout's interpreter, with JupyterLab and the library installed beside it."""
    install.check_python()
    if not install.is_installed(root, "lab"):
        terminal.say("packages", "installing JupyterLab and the library into .venv (once)")
    begun = time.monotonic()

    def tell(text: str) -> None:
        terminal.progress("packages", f"JupyterLab and the library: {text}")

    if install.ensure(root, "lab", tell, children.add):
        terminal.say("packages", f"installed ({time.monotonic() - begun:.0f} s)")
    return install.venv_python(root)


def lay_out(workspace: Path, terminal: Terminal) -> list[Chapter]:
    """The workspace with every chapter in it, and what its list of exercises says."""
    released = project_root() / "exercises"
    new = copy_exercises(released, workspace)
    chapters = [read_chapter(workspace / path.name) for path in sorted(released.glob("ch*.ipynb"))]
    told = f"{len(new)} of them new" if new else "as you left them"
    terminal.say("exercises", f"{len(chapters)} chapters in {workspace}, {told}")
    return chapters


def run(options: argparse.Namespace, terminal: Terminal, children: Children) -> None:
    """Everything in turn, then wait for the server to end."""
    workspace = Path(options.workspace).resolve()
    state = workspace / ".attn"
    root = project_root() if options.install else None
    python = Path(sys.executable) if root is None else prepare(root, terminal, children)
    chapters = lay_out(workspace, terminal)
    state.mkdir(exist_ok=True)
    write_lab_settings(state)
    book = Book(python, book_root(state), state, terminal, children)
    terminal.progress("JupyterLab", "starting")
    server, url, token = launch(python, workspace, state, book.pages, options.port, children)
    write(workspace / CONTENTS, contents(chapters, url + "book/"))
    terminal.say("JupyterLab", f"{url}lab/tree/{CONTENTS}?token={token}")
    note = "" if book.ready else "   (being built: the page says how far)"
    terminal.say("book", f"{url}book/{note}")
    terminal.say("", "Ctrl-C stops everything.")
    threading.Thread(target=make_book, args=(book, root), daemon=True).start()
    if server.wait():
        tail = (state / "server.log").read_text(encoding="utf-8").splitlines()[-6:]
        raise StartError("JupyterLab has stopped:\n" + "\n".join(tail))


def port_number(text: str) -> int:
    number = int(text or 8888)
    if not 1 <= number <= 65535:
        raise ValueError
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="attn-lessons start", description=__doc__)
    parser.add_argument("--port", type=port_number, default=8888, help="first port to try")
    parser.add_argument("--workspace", default="workspace", help="where your notebooks live")
    parser.add_argument("--install", action="store_true", help="make the checkout's .venv first")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, and stay until Ctrl-C. The exit code is 0 where the person ended it."""
    options = parse(arguments)
    terminal = Terminal()
    children = Children()
    try:
        with ended_by_signals():
            run(options, terminal, children)
    except KeyboardInterrupt:
        terminal.say("", "Stopping …")
    except (StartError, install.InstallError, OSError) as error:
        terminal.say("", "")
        print(error, file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut this short
        children.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
