"""Builds the book: ``python -m attn_lessons.bookbuild`` or :func:`build`.

It runs ``jupyter-book build book --config _config.yml -W --keep-going`` and shows one line a page.
That command works by itself too; this module adds the progress, a lock, and nothing to do when
nothing has changed.

Variables of the environment that fill the links on the pages (a link whose variable is not set
is not shown):

``ATTN_REPOSITORY_URL``
    Address of the repository. Any host gives a repository button; one on GitHub also gives an
    issue button and the Colab and Binder links beside "Download the notebook".
``ATTN_BRANCH``
    Branch those links point to; ``main`` when not set.
``ATTN_BOOK_URL``
    Address the built book is published at, for the pages' canonical links.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("ATTN_REPOSITORY_URL", "ATTN_BRANCH", "ATTN_BOOK_URL")
STAMP = "built-from"  # what the last good build was made of

Progress = Callable[[str], None]


class BookError(RuntimeError):
    """The book could not be built; the message says why, warning by warning."""


def build(
    out: Path | None = None, *, strict: bool = True, progress: Progress | None = print
) -> Path:
    """Build the book and return the folder of its pages.

    ``out`` is the folder that gets ``_build/``; the book's own folder when None. ``strict`` makes
    every warning an error. ``progress`` is called with one line for each page. Nothing is run
    when the pages there were made from the same sources. Raises :class:`BookError`.
    """
    say = progress or (lambda line: None)
    _require(ROOT / "_config.yml", "the book's sources: build it from a clone of the repository")
    folder = Path(out or ROOT / "book").resolve() / "_build"
    folder.mkdir(parents=True, exist_ok=True)
    pages, stamp = folder / "html", folder / STAMP
    with _lock(folder / ".lock", say):
        if is_fresh(out):
            say(f"The book is up to date: {pages}")
            return pages
        stamp.unlink(missing_ok=True)
        begin, digest = time.monotonic(), _digest()
        _run(folder, strict, say)
        stamp.write_text(digest + "\n", encoding="utf-8")
        say(f"Book built in {time.monotonic() - begin:.0f} s: {pages}")
    return pages


def is_fresh(out: Path | None = None) -> bool:
    """Whether the pages in ``out`` were made from the sources as they are now."""
    folder = Path(out or ROOT / "book").resolve() / "_build"
    stamp = folder / STAMP
    return (
        stamp.exists()
        and (folder / "html" / "intro.html").exists()
        and stamp.read_text(encoding="utf-8").strip() == _digest()
    )


def _require(path: Path, what: str) -> None:
    if not path.exists():
        raise BookError(f"{path} is missing: it belongs to {what}")
    if importlib.util.find_spec("jupyter_book") is None:
        raise BookError("jupyter-book is not installed: pip install 'attn-lessons[book]'")


def _digest() -> str:
    """Of every file a page is made from, and of the variables that fill its links."""
    kinds = {
        "book": ("md", "yml", "bib", "css", "js", "svg", "png", "py", "html"),
        "attn_lessons": ("py", "mplstyle"),
        "exercises": ("ipynb",),
        "benchmarks/results": ("json",),
    }
    files = [
        path
        for folder, suffixes in kinds.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix[1:] in suffixes and "_build" not in path.parts
    ]
    digest = hashlib.sha256()
    for path in sorted([ROOT / "_config.yml", *files]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    for name in VARIABLES:
        digest.update(f"{name}={os.environ.get(name, '')}\0".encode())
    return digest.hexdigest()


@contextmanager
def _lock(path: Path, say: Progress) -> Iterator[None]:
    """Two builds into one folder take turns."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another build of the book is running; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(folder: Path, strict: bool, say: Progress) -> None:
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(ROOT / "book"), "--config", str(ROOT / "_config.yml")]
    command += ["--path-output", str(folder.parent)]
    command += ["-W", "--keep-going"] if strict else []
    # The kernels' start-up notes go to stderr and are no warnings of the book.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    log = _Log(say)
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                log.take(line)
        except BaseException:
            process.terminate()
            raise
    log.end_page()
    if process.returncode:
        raise BookError(log.explain(folder / "html" / "reports"))


@dataclass
class _Log:
    """Sphinx's output as one line a page; its warnings kept for the end."""

    say: Progress
    total: int = 0
    done: int = 0
    page: str = ""
    what: str = ""
    troubles: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
    FOUND = re.compile(r"(\d+) added, (\d+) changed")
    READING = re.compile(r"reading sources\.\.\. \[ *\d+%\] (\S+)")
    RAN = re.compile(r"Executed notebook in ([\d.]+) seconds")
    TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL|SEVERE)\b|^(Sphinx|Extension|Theme) error")

    def take(self, raw: str) -> None:
        line = self.ESCAPES.sub("", raw).rstrip()
        self.tail = [*self.tail[-30:], line]
        if found := self.FOUND.search(line):
            self.total = int(found[1]) + int(found[2])
        elif reading := self.READING.search(line):
            self.end_page()
            self.page, self.what = reading[1], "read"
        elif ran := self.RAN.search(line):
            self.what = f"ran in {float(ran[1]):.1f} s"
        elif "Using cached notebook" in line:
            self.what = "kept its outputs"
        elif "looking for now-outdated files" in line:
            self.end_page()
            self.say("Writing the pages")
        elif self.TROUBLE.search(line) and "IPKernelApp" not in line:
            self.troubles.append(line.replace(f"{ROOT}/", ""))

    def end_page(self) -> None:
        if self.page:
            self.done += 1
            self.say(f"[{self.done}/{self.total}] {self.page}: {self.what}")
        self.page = ""

    def explain(self, reports: Path) -> str:
        """The warnings, and where a cell failed the end of its traceback."""
        lines = self.troubles or self.tail
        failed = {trouble.split(":")[0] for trouble in self.troubles if "[mystnb.exec]" in trouble}
        for page in sorted(failed):
            report = reports / f"{Path(page).stem}.err.log"
            if report.exists():
                text = self.ESCAPES.sub("", report.read_text(encoding="utf-8"))
                lines = [*lines, *text.strip().splitlines()[-8:]]
        return "The book was not built.\n" + "\n".join(f"  {line}" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m attn_lessons.bookbuild", description="Build the book."
    )
    parser.add_argument("--out", type=Path, help="folder that gets _build/ (default: book/)")
    parser.add_argument("--lenient", action="store_true", help="warnings do not fail the build")
    chosen = parser.parse_args(arguments)
    try:
        build(chosen.out, strict=not chosen.lenient)
    except BookError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
