"""One notebook graded: rebuilt from the release, run by nbval, judged outside its process.

``python -m attn_lessons.grading.runner`` is a worker: a job a line in, a row a line out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import nbformat
import nbval.plugin
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from nbval.kernel import RunningKernel

from attn_lessons.grading import calls, catalogue, check, notebook, protocol, sandbox, seeds
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.job import (
    LONGEST_MESSAGE,
    Job,
    Settings,
    judged,
    row_of,
    ungraded,
    unjudged,
)
from attn_lessons.grading.records import (
    ExerciseRow,
    NotebookRow,
    NotebookStatus,
)

LEARNER = '__import__("attn_lessons.grading.learner", fromlist=["emit"])'
PRELUDE = f"{LEARNER}.quiet()"
NEEDS_TORCH = re.compile(r"^\s*(?:import|from)\s+torch\b", re.MULTILINE)
INTERRUPT_GRACE = 3.0
POLL = 0.2

Outcome = Literal["ran", "raised", "timeout", "died"]
Draws = list[list[Case]]


@dataclass(frozen=True)
class Ran:
    """What became of one step. ``fatal`` where the kernel did not survive it."""

    outcome: Outcome
    message: str = ""
    emitted: Any = None
    fatal: bool = False


@dataclass
class Deadline:
    """The end of a notebook's time; kills the kernel that runs then."""

    seconds: float
    kernel: GradedKernel | None = None
    expired: bool = False
    _timer: threading.Timer | None = field(default=None, repr=False)

    def __enter__(self) -> Deadline:
        self._timer = threading.Timer(self.seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()

    def watch(self, kernel: GradedKernel) -> GradedKernel:
        """``kernel`` is the one that runs now."""
        self.kernel = kernel
        kernel.doomed = self.expired
        return kernel

    def _expire(self) -> None:
        self.expired = True
        if self.kernel is not None:
            self.kernel.doomed = True


class KernelDied(RuntimeError):
    """The kernel ended while something was expected of it."""


class GradedKernel(RunningKernel):
    """nbval's kernel, started by us: always our own Python, and its end is noticed at once."""

    def __init__(self, process: sandbox.KernelProcess, startup_timeout: float) -> None:
        self.process = process
        self.doomed = False
        self._stopped = False
        self._interrupted: float | None = None
        self.kc = BlockingKernelClient(connection_file=str(process.connection_file))
        try:
            self.kc.load_connection_file()
            end = time.monotonic() + startup_timeout
            self._await_sockets(end)
            self.kc.start_channels(hb=False)
            self._await_answer(end)
        except BaseException:
            self.stop()
            raise

    def _await_sockets(self, end: float) -> None:
        """The kernel listens: a client that knocks earlier comes back only after a tenth second."""
        ports = (self.kc.shell_port, self.kc.iopub_port, self.kc.control_port)
        sockets = [Path(f"{self.kc.ip}-{port}") for port in ports]
        while not all(socket.exists() for socket in sockets):
            if time.monotonic() > end:
                raise KernelDied("the kernel did not start in time")
            if self.process.exit_code() is not None:
                raise KernelDied(self._end())
            time.sleep(0.01)

    def _await_answer(self, end: float) -> None:
        """The kernel has answered on both channels: nothing it says from now on gets lost."""
        while time.monotonic() < end:
            message = self.kc.kernel_info()
            try:
                self.await_reply(message, timeout=max(end - time.monotonic(), POLL))
                self.await_idle(message, POLL)
            except queue.Empty:
                continue
            return
        raise KernelDied("the kernel did not answer in time")

    def get_message(self, stream: str, timeout: float | None = None) -> dict[str, Any]:
        """The next message; ``KernelDied`` as soon as none can come any more."""
        read = self.kc.get_iopub_msg if stream == "iopub" else self.kc.get_shell_msg
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._hold_to_account()
            left = POLL if end is None else min(POLL, end - time.monotonic())
            try:
                return _without_ballast(read(timeout=max(left, 0.001)))
            except queue.Empty:
                if self.process.exit_code() is not None:
                    raise KernelDied(self._end()) from None
                if end is not None and time.monotonic() >= end:
                    raise

    def _hold_to_account(self) -> None:
        overdue = self._interrupted and time.monotonic() - self._interrupted > INTERRUPT_GRACE
        if (self.doomed or overdue) and self.process.exit_code() is None:
            self.process.kill()

    def _end(self) -> str:
        code = self.process.exit_code()
        if code is not None and code < 0:
            return f"its process was killed (signal {-code})"
        return f"its process ended (exit code {code})"

    def is_alive(self) -> bool:
        return self.process.exit_code() is None

    def interrupt(self) -> None:
        self._interrupted = time.monotonic()
        request = self.kc.session.msg("interrupt_request", {})
        self.kc.control_channel.send(request)

    def execute_cell_input(self, cell_input: str, allow_stdin: bool | None = None) -> str:
        self._interrupted = None
        return super().execute_cell_input(cell_input, allow_stdin)

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.kc.stop_channels()
        self.process.kill()


class Collector:
    """What nbval's cells did, held apart from whether nbval calls that a pass."""

    def __init__(self) -> None:
        self.ran: dict[int, Ran] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        # Comments and tags in a learner's cell have no say: every cell runs, none is compared.
        for item in items:
            item.options = {"check": False, "skip": False, "check_exception": False}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[Any]:
        if call.when == "call" or (call.when == "setup" and call.excinfo):
            self.ran[item.cell_num] = _ran(item, call.excinfo)
        return (yield)


class Kitchen:
    """What a worker keeps warm between notebooks."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], sandbox.ForkServer] = {}

    def kernel(self, settings: Settings, torch: bool) -> GradedKernel:
        """A kernel that is ready to run a notebook."""
        limits = sandbox.Limits(seconds=int(settings.whole_timeout) + 10)
        process: sandbox.KernelProcess
        if settings.warm and settings.sandbox == "none":
            modules = ("torch",) if torch else ()
            server = self._servers.setdefault(modules, sandbox.ForkServer(modules))
            process = server.start(limits)
        else:
            process = sandbox.OwnKernel(limits, settings.sandbox)
        return GradedKernel(process, sandbox.START_TIMEOUT)

    def close(self) -> None:
        """End what is kept warm."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()


def grade(job: Job, settings: Settings, kitchen: Kitchen) -> NotebookRow:
    """The row of one submission, whatever it contains."""
    try:
        if job.fault:
            raise notebook.NotebookError(job.fault)
        submission = notebook.parse(job.text, Path(job.notebook))
    except notebook.NotebookError as error:
        return ungraded(job, "unreadable", str(error).removeprefix(f"{job.notebook}: "))
    try:
        released = notebook.pristine_for(submission)
    except notebook.NotebookError as error:
        return ungraded(job, "unreadable", str(error))
    try:
        return _graded(job, submission, released, settings, kitchen)
    except Exception as error:  # a row is due
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}, line {last.lineno}"
        told = f"the grader failed ({at}): {type(error).__name__}: {error}"
        return ungraded(job, "crashed", told)


def run(
    steps: Sequence[notebook.Step], settings: Settings, kitchen: Kitchen, deadline: Deadline
) -> dict[int, Ran]:
    """Run a rebuilt notebook once under nbval: what became of each step that was reached."""
    torch = any(NEEDS_TORCH.search(step.source) for step in steps)

    def start(*_: Any, **__: Any) -> GradedKernel:
        kernel = deadline.watch(kitchen.kernel(settings, torch))
        kernels.append(kernel)
        return kernel

    kernels: list[GradedKernel] = []
    collector = Collector()
    with tempfile.TemporaryDirectory(prefix="attn-nb-") as folder:
        path = Path(folder) / "notebook.ipynb"
        nbformat.write(_as_notebook(steps), path)
        with _started_by(start), contextlib.redirect_stdout(io.StringIO()):
            pytest.main([*_pytest_options(path, settings), str(path)], plugins=[collector])
    for kernel in kernels:
        kernel.stop()
    return collector.ran


def _graded(
    job: Job,
    submission: notebook.Notebook,
    released: notebook.Notebook,
    settings: Settings,
    kitchen: Kitchen,
) -> NotebookRow:
    exercises = [catalogue.find(name) for name in released.exercises]
    draws = {e.id: _draws(e, job, released, settings) for e in exercises}
    sent = {e.id: _emit_source(e, draws[e.id]) for e in exercises}
    steps = [
        notebook.Step("prelude", PRELUDE),
        *notebook.rebuild(released, submission, sent.__getitem__),
    ]
    with Deadline(settings.whole_timeout) as deadline:
        ran = _run_through(steps, settings, kitchen, deadline)
        for e in exercises:
            ran |= _second_chance(e.id, steps, ran, settings, kitchen, deadline)
    status, message = _notebook_status(steps, ran, deadline, settings)
    missing = notebook.missing(released, submission)
    rows = []
    for e in exercises:
        row = _exercise_row(e, steps, ran, draws[e.id], e.id in missing, settings)
        rows.append(row or _not_reached(e, status))
    notes = [notebook.staleness(submission, released), message]
    if not submission.code:
        notes.append("it holds no code cells")
    return row_of(job, released.name, status, "; ".join(n for n in notes if n), rows)


def _run_through(
    steps: Sequence[notebook.Step], settings: Settings, kitchen: Kitchen, deadline: Deadline
) -> dict[int, Ran]:
    """Run until every check has had its turn: what ends a kernel is left out of the next run."""
    ran: dict[int, Ran] = {}
    left = list(range(len(steps)))
    while not deadline.expired:
        now = run([steps[i] for i in left], settings, kitchen, deadline)
        results = {left[number]: result for number, result in now.items()}
        fatal = next((i for i in left if i in results and results[i].fatal), None)
        reached = [i for i in left if fatal is None or i <= fatal]
        ran |= {i: results[i] for i in reached if i in results}
        if fatal is None or steps[fatal].role in ("prelude", "given"):
            break
        if deadline.expired:
            break
        left = _without(left, steps, fatal)
        if not any(steps[i].role == "emit" for i in left):
            break
    return ran


def _second_chance(
    exercise: str,
    steps: Sequence[notebook.Step],
    ran: Mapping[int, Ran],
    settings: Settings,
    kitchen: Kitchen,
    deadline: Deadline,
) -> dict[int, Ran]:
    """An exercise whose turn it was when the kernel ended, run without the other answers.

    What ends a kernel may have been set off before: a thread, a timer, a killed parent.
    """
    blamed = any(
        step.exercise == exercise and i in ran and ran[i].outcome == "died"
        for i, step in enumerate(steps)
    )
    if not blamed or deadline.expired:
        return {}
    own = [i for i, step in enumerate(steps) if step.exercise in ("", exercise)]
    again = run([steps[i] for i in own], settings, kitchen, deadline)
    results = {own[number]: result for number, result in again.items()}
    verdict = next(i for i in own if steps[i].role == "emit")
    if verdict not in results or results[verdict].emitted is None:
        return {}
    return {i: results[i] for i in own if steps[i].exercise and i in results}


def _without(left: list[int], steps: Sequence[notebook.Step], fatal: int) -> list[int]:
    """What a further run is made of: not the step that ended the kernel, no check already made."""
    gone = {i for i in left if i <= fatal and steps[i].role == "emit"} | {fatal}
    if steps[fatal].role == "answer":
        exercise = steps[fatal].exercise
        gone |= {i for i in left if steps[i].role == "emit" and steps[i].exercise == exercise}
    return [i for i in left if i not in gone]


def _notebook_status(
    steps: Sequence[notebook.Step], ran: dict[int, Ran], deadline: Deadline, settings: Settings
) -> tuple[NotebookStatus, str]:
    if deadline.expired:
        return "timeout", f"stopped after {settings.whole_timeout:g} s"
    first = ran.get(0)
    if first is None or first.outcome != "ran":
        return "crashed", f"no kernel: {first.message if first else 'nothing was run'}"
    for number, step in enumerate(steps):
        result = ran.get(number)
        if result and result.fatal and step.role == "given":
            return "crashed", f"the kernel was lost in a released cell: {result.message}"
    return "graded", ""


def _exercise_row(
    exercise: Exercise,
    steps: Sequence[notebook.Step],
    ran: dict[int, Ran],
    draws: Draws,
    missing: bool,
    settings: Settings,
) -> ExerciseRow | None:
    """The row that follows from what ran; None where the exercise's turn never came."""
    own = {step.role: i for i, step in enumerate(steps) if step.exercise == exercise.id}
    emitted = ran.get(own["emit"])
    if emitted is not None and emitted.emitted is not None and _defined(emitted.emitted):
        try:
            return judged(check.judge(exercise, draws, calls.outcomes(emitted.emitted, draws)))
        except protocol.ProtocolError as error:
            return unjudged(exercise, "error", f"what it returned cannot be read: {error}")
    if missing:
        return unjudged(exercise, "missing", "the notebook has no cell that defines it")
    answer = ran.get(own["answer"]) if "answer" in own else None
    for result, place in ((answer, "its cell"), (emitted, "a call of it")):
        if result is None or result.outcome == "ran":
            continue
        if result.outcome == "timeout":
            return unjudged(exercise, "timeout", f"{place} ran longer than {settings.timeout:g} s")
        if result.outcome == "died":
            return unjudged(exercise, "error", f"{place} ended the kernel: {result.message}")
        return unjudged(exercise, "error", result.message)
    if emitted is None:
        return None
    return unjudged(exercise, "error", f"the notebook does not define {exercise.id}")


def _defined(message: Any) -> bool:
    """Whether the function was there to be called."""
    return not (isinstance(message, dict) and message.get("defined") is False)


def _not_reached(exercise: Exercise, status: NotebookStatus) -> ExerciseRow:
    if status == "timeout":
        return unjudged(exercise, "timeout", "the notebook's time was over before its turn")
    return unjudged(exercise, "error", "not run: the kernel was lost before its turn")


def _draws(exercise: Exercise, job: Job, released: notebook.Notebook, settings: Settings) -> Draws:
    name = f"{released.name} {job.digest}"
    return check.make_draws(exercise, seeds.secret_seeds(settings.seed, name, exercise.id))


def _emit_source(exercise: Exercise, draws: Draws) -> str:
    return f'{LEARNER}.emit("{exercise.id}", globals(), {calls.message(exercise, draws)!r})'


def _as_notebook(steps: Sequence[notebook.Step]) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(step.source, id=f"s{i}") for i, step in enumerate(steps)]
    return nbformat.v4.new_notebook(cells=cells)


def _pytest_options(path: Path, settings: Settings) -> list[str]:
    return [
        "--nbval",
        f"--nbval-cell-timeout={settings.timeout}",
        f"--rootdir={path.parent}",
        f"--confcutdir={path.parent}",
        f"--override-ini=cache_dir={path.parent}",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        "-p",
        "no:unraisableexception",  # collects garbage five times a run
        "-p",
        "no:threadexception",
        "-p",
        "nbval.plugin",
        "--capture=no",
        "--quiet",
        "--tb=no",
        "--color=no",
    ]


@contextlib.contextmanager
def _started_by(start: Any) -> Iterator[None]:
    """nbval asks ``start`` for its kernels."""
    before, autoload = nbval.plugin.RunningKernel, os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    nbval.plugin.RunningKernel = start
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        nbval.plugin.RunningKernel = before
        if autoload is None:
            del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        else:
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = autoload


def _ran(item: Any, excinfo: Any) -> Ran:
    outputs = item.test_outputs or []
    emitted = [
        output["data"][protocol.MIME]
        for output in outputs
        if protocol.MIME in (output.get("data") or {})
    ]
    last = emitted[-1] if emitted else None
    if excinfo is None:
        return Ran("ran", emitted=last)
    errors = [output for output in outputs if output["output_type"] == "error"]
    told = str(excinfo.value).strip().splitlines()[:1] or [excinfo.typename]
    kernel = item.parent.kernel
    interrupted = getattr(kernel, "_interrupted", None) is not None
    gone = kernel is None or not kernel.is_alive()
    if interrupted:
        return Ran("timeout", told[0], last, fatal=gone)
    if gone:
        return Ran("died", told[0], last, fatal=True)
    return Ran("raised", _raised(errors[-1]) if errors else told[0], last)


def _raised(error: Any) -> str:
    # IPython names a cell by a file of its own ("1234.py, line 3"); the line is what counts.
    text = re.sub(r"\((?:\S+\.py|<[^>]*>), (line \d+)\)", r"(\1)", str(error["evalue"]))
    return f"{error['ename']}: {text}" if text else str(error["ename"])


def _without_ballast(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what nobody reads: prints, pictures, tables."""
    content = message.get("content", {})
    if message.get("msg_type") == "stream":
        content["text"] = ""
    elif message.get("msg_type") in ("display_data", "execute_result"):
        data = content.get("data") or {}
        content["data"] = {k: v for k, v in data.items() if k == protocol.MIME}
    elif message.get("msg_type") == "error":
        content["traceback"] = []
        content["evalue"] = str(content.get("evalue", ""))[:LONGEST_MESSAGE]
    return message


def main() -> None:
    """Grade the jobs that come in until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    kitchen = Kitchen()
    while True:
        request = json.loads(requests.get())
        job, settings = Job(**request["job"]), Settings(**request["settings"])
        row = grade(job, settings, kitchen)
        print(json.dumps(asdict(row)), file=answers, flush=True)


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Pass requests on; when whoever sends them is gone, so is all work for them."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
