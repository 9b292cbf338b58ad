"""A class of notebooks: which there are, who works on them, and a row for every one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import attn_lessons
from attn_lessons import _paths
from attn_lessons.grading import notebook
from attn_lessons.grading.job import Job, Settings, one_line, ungraded
from attn_lessons.grading.ledger import Ledger, LedgerBusy, from_dict
from attn_lessons.grading.records import NotebookRow

# What a worker may take beyond a notebook's own time: its start, its imports, the verdict.
WORKER_GRACE = 60.0
# jsonschema imports rfc3987_syntax where it can, for a check that notebooks have no use for, and
# that alone takes longer than to grade a notebook.
WORKER = (
    "import sys; sys.modules['rfc3987_syntax'] = None; "
    "from attn_lessons.grading import runner; runner.main()"
)
Report = Callable[[NotebookRow], None]


class ClassError(ValueError):
    """A class run that cannot be begun, said in one line."""


@dataclass
class Class:
    """The submissions of a run with what has been found out about them so far."""

    jobs: list[Job]
    settings: Settings
    ledger: Ledger
    rows: dict[str, NotebookRow] = field(default_factory=dict)

    @property
    def left(self) -> list[Job]:
        """Submissions without a row."""
        return [job for job in self.jobs if _key(job) not in self.rows]

    @property
    def finished(self) -> list[NotebookRow]:
        """The rows so far, in the order of the submissions."""
        return [self.rows[key] for job in self.jobs if (key := _key(job)) in self.rows]

    def add(self, job: Job, row: NotebookRow) -> None:
        self.ledger.add(_key(job), row)
        self.rows[_key(job)] = row


def gather(paths: Sequence[Path]) -> list[Job]:
    """The submissions that ``paths`` (notebooks or folders of them) hold, each once."""
    found: dict[Path, Job] = {}
    for path in paths:
        try:
            for file, student in _notebooks(path):
                found.setdefault(file.resolve(), job(file, student))
        except OSError as error:
            raise ClassError(f"{path}: {error.strerror or error}") from None
    return list(found.values())


def refuse_outdated(paths: Sequence[Path]) -> None:
    """A notebook named on its own has to be of this release; in a class its row says so."""
    for path in paths:
        if path.is_dir():
            continue
        with contextlib.suppress(notebook.NotebookError):
            submission = notebook.read(path)
            stale = notebook.staleness(submission, notebook.pristine_for(submission))
            if stale:
                raise ClassError(f"{path}: {one_line(stale)}")


def begin(jobs: Sequence[Job], settings: Settings, seed: int | None) -> Class:
    """A run over ``jobs``: a new one, or one that was interrupted and goes on.

    Without a ``seed`` a secret one is drawn, and kept until the run has been finished.
    """
    released = [notebook.pristine(name).release for name in notebook.notebook_names()]
    what = [
        attn_lessons.__version__,
        [dict(mark) for mark in released],
        [_key(job) for job in jobs],
        seed,
        settings.timeout,
        settings.sandbox,
    ]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    drawn = secrets.randbits(63) if seed is None else seed
    try:
        ledger = Ledger(_paths.state_dir() / "runs" / f"{name}.jsonl", {"seed": drawn})
    except LedgerBusy:
        raise ClassError("another run is grading the same notebooks with these settings") from None
    except OSError as error:
        raise ClassError(
            f"{error.filename}: {error.strerror}; ATTN_LESSONS_STATE names another folder"
        ) from None
    used = replace(settings, seed=int(ledger.header["seed"]))
    return Class(list(jobs), used, ledger, dict(ledger.rows))


def grade(run: Class, workers: int, report: Report) -> None:
    """Grade what is left with ``workers`` processes; ``report`` gets every new row."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, NotebookRow]] = queue.SimpleQueue()
    left = run.left
    for job in left:
        waiting.put(job)
    team = [Worker() for _ in range(max(1, min(workers, len(left))))]
    for worker in team:
        arguments = (worker, waiting, done, run.settings)
        threading.Thread(target=_work, args=arguments, daemon=True).start()
    try:
        for _ in left:
            job, row = done.get()
            run.add(job, row)
            report(row)
    finally:
        for worker in team:
            worker.close()


def grade_on(run: Class, address: str, report: Report) -> None:
    """Grade what is left on the machines behind a Dask scheduler."""
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise ClassError(
            "--scheduler: dask.distributed is not installed here (pip install distributed)"
        ) from None
    try:
        client = Client(address, timeout=20)
    except (OSError, ValueError) as error:
        raise ClassError(f"--scheduler: nobody answers at {address}: {error}") from None
    with client:
        if not client.nthreads():
            raise ClassError(f"--scheduler: no worker is connected to {address}")
        sent = {client.submit(grade_here, job, run.settings, pure=False): job for job in run.left}
        for future in as_completed(sent):
            job = sent[future]
            if future.cancelled():
                raise ClassError(f"--scheduler: {address} is gone; the same command goes on")
            lost = future.exception()
            row = future.result() if lost is None else ungraded(job, "crashed", f"lost: {lost}")
            run.add(job, row)
            report(row)


def grade_here(job: Job, settings: Settings) -> NotebookRow:
    """Grade one submission in this process's own worker."""
    worker = _own_worker()
    with _own_lock:
        return worker.grade(job, settings)


class Worker:
    """A process that grades one notebook after another; replaced when it hangs or dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def grade(self, job: Job, settings: Settings) -> NotebookRow:
        """The row of one submission, whatever happens to the process that works on it."""
        request = json.dumps({"job": asdict(job), "settings": asdict(settings)})
        for _ in range(2):
            try:
                return self._ask(request, settings.whole_timeout + WORKER_GRACE)
            except TimeoutError:
                self._kill()
                return ungraded(job, "timeout", "the grader had to stop its worker")
            except (OSError, ValueError):
                self._kill()
        return ungraded(job, "crashed", "the process that graded it was lost, twice")

    def close(self) -> None:
        """Take the process and everything it started down."""
        self._closed = True
        self._kill()

    def _ask(self, request: str, seconds: float) -> NotebookRow:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise BrokenPipeError("the worker is gone")
        return from_dict(json.loads(line))

    def _running(self) -> subprocess.Popen[str]:
        if self._closed:
            raise BrokenPipeError("closed")
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


_own_lock = threading.Lock()


@cache
def _own_worker() -> Worker:
    return Worker()


def _work(
    worker: Worker,
    waiting: queue.SimpleQueue[Job],
    done: queue.SimpleQueue[tuple[Job, NotebookRow]],
    settings: Settings,
) -> None:
    while True:
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            return
        done.put((job, worker.grade(job, settings)))


def _key(job: Job) -> str:
    text = json.dumps([job.notebook, job.student, job.digest])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _notebooks(path: Path) -> Iterator[tuple[Path, str]]:
    """Notebook files with their students' names: the first folder below ``path``, else its own."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.ipynb") if not _hidden(file, path))
        files = [file for file in files if not file.is_dir()]
        if not files:
            raise ClassError(f"{path}: holds no notebooks")
        for file in files:
            inside = file.relative_to(path).parts
            yield file, inside[0] if len(inside) > 1 else path.resolve().name
    elif not path.exists():
        raise ClassError(f"{path}: no such file or folder")
    elif path.suffix != ".ipynb":
        raise ClassError(f"{path}: not a notebook (its name does not end in .ipynb)")
    else:
        yield path, path.resolve().parent.name


def _hidden(file: Path, base: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(base).parts)


def job(file: Path, student: str) -> Job:
    """The submission that a file holds, or its fault: nothing in it can stop a run."""
    name, student = _printable(file.as_posix()), _printable(student)
    try:
        if not file.is_file():
            raise notebook.NotebookError(f"{file}: not a regular file")
        return Job(name, student, notebook.text_of(file))
    except notebook.NotebookError as error:
        return Job(name, student, "", str(error).removeprefix(f"{file}: "))


def _printable(name: str) -> str:
    """A file's name without what no report can hold: control characters, bytes that are no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
