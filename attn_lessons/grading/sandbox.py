"""Kernels for graded notebooks: how they are started, bounded, walled in and killed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from jupyter_client.connect import write_connection_file

from attn_lessons import _paths
from attn_lessons.grading.job import SandboxName

WARM = "attn_lessons.grading.warm"
# -P: what lies in the folder the grader was started in is none of a kernel's modules.
WARM_COMMAND = (sys.executable, "-P", "-m", WARM)
START_TIMEOUT = 60.0
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/nix")
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "ATTN_LESSONS_PROJECT")


@dataclass(frozen=True)
class Limits:
    """What one kernel may take: address space beyond its start, processor time, file size."""

    memory: int = 2 * 2**30
    seconds: int = 600
    file_bytes: int = 64 * 2**20


class KernelProcess(Protocol):
    """A running kernel, however it was started."""

    connection_file: Path

    def exit_code(self) -> int | None:
        """None while it runs."""

    def kill(self) -> None:
        """End it and everything it started, and remove its folder."""


class Room:
    """A private folder for one kernel: its connection file, its sockets, its working folder."""

    def __init__(self) -> None:
        # Socket paths are short of 100 characters, so this lies in the system's /tmp.
        base = "/tmp" if os.path.isdir("/tmp") else None
        self.path = Path(tempfile.mkdtemp(prefix="attn-", dir=base)).resolve()
        self.work = self.path / "work"
        self.work.mkdir()
        file, _ = write_connection_file(
            str(self.path / "kernel.json"),
            ip=str(self.path / "s"),
            transport="ipc",
            key=secrets.token_hex(16).encode(),
        )
        self.connection_file = Path(file)

    def request(self, limits: Limits) -> dict[str, Any]:
        """What the process that becomes the kernel has to be told."""
        return {
            "do": "start",
            "connection_file": str(self.connection_file),
            "cwd": str(self.work),
            "memory": limits.memory,
            "seconds": limits.seconds,
            "file_bytes": limits.file_bytes,
        }

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class ForkServer:
    """A warm process of our own that forks kernels; restarted when it is gone."""

    def __init__(self, modules: tuple[str, ...] = ()) -> None:
        self.modules = modules
        self.process: subprocess.Popen[str] | None = None

    def start(self, limits: Limits) -> ForkedKernel:
        room = Room()
        try:
            return ForkedKernel(self, room, int(self.ask(room.request(limits))["pid"]))
        except BaseException:
            room.remove()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer; ``RuntimeError`` where the server does not answer."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return self._read(process)
        except (OSError, ValueError) as error:
            self.close()
            raise RuntimeError(f"the process that starts kernels is gone: {error}") from None

    def close(self) -> None:
        if self.process is None:
            return
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [*WARM_COMMAND, *self.modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=kernel_environment(Path(tempfile.gettempdir())),
            )
            self._read(self.process)
        return self.process

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], START_TIMEOUT)[0]:
            raise OSError("no answer")
        line = process.stdout.readline()
        if not line:
            raise OSError("no answer")
        return json.loads(line)


class ForkedKernel:
    """A kernel forked from a warm process."""

    def __init__(self, server: ForkServer, room: Room, pid: int) -> None:
        self.server, self.room, self.pid = server, room, pid
        self._parent = server.process
        self.connection_file = room.connection_file
        self._code: int | None = None

    def exit_code(self) -> int | None:
        if self._code is None:
            self._code = self._ask("poll")
        return self._code

    def kill(self) -> None:
        if self._code is None:
            self._code = self._ask("kill")
        self.room.remove()

    def _ask(self, what: str) -> int | None:
        died_with_it = -signal.SIGKILL
        if self._parent is None or self.server.process is not self._parent:
            return died_with_it
        if self._parent.poll() is not None:
            return died_with_it
        try:
            return self.server.ask({"do": what, "pid": self.pid})["code"]
        except RuntimeError:
            return died_with_it


class OwnKernel:
    """A kernel in a fresh process, with or without bubblewrap around it."""

    def __init__(self, limits: Limits, sandbox: SandboxName) -> None:
        self.room = Room()
        self.connection_file = self.room.connection_file
        request = self.room.path / "request.json"
        request.write_text(json.dumps(self.room.request(limits)))
        command = [*WARM_COMMAND, "--once", str(request)]
        if sandbox == "bubblewrap":
            command = [*bubblewrap_command(self.room.path), *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=kernel_environment(self.room.work),
            cwd=self.room.work,
            start_new_session=True,
        )

    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.room.remove()


def kernel_environment(home: Path) -> dict[str, str]:
    """What a graded kernel sees of the environment: nothing private, one thread, one backend."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | {
        "HOME": str(home),
        "IPYTHONDIR": str(home / ".ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(home / ".matplotlib"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def bubblewrap_command(room: Path) -> list[str]:
    """The command that walls a kernel in: no network, a read-only system, ``room`` to write in.

    Of the rest of the machine it sees the Python environment and the library, without the
    catalogue of exercises and without the notebooks a wheel carries.
    """
    package = _paths.PACKAGE
    seen = [*SYSTEM_FOLDERS, sys.base_prefix, sys.prefix, str(package)]
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for folder in dict.fromkeys(seen):
        command += ["--ro-bind-try", folder, folder]
    for hidden in (package / "grading" / "catalogue", package / "_project"):
        if hidden.is_dir():
            command += ["--tmpfs", str(hidden)]
    return [*command, "--bind", str(room), str(room), "--chdir", str(room / "work"), "--"]


@cache
def bubblewrap_fault() -> str:
    """Why bubblewrap cannot be used here, or an empty string where it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    with tempfile.TemporaryDirectory(prefix="attn-") as folder:
        room = Path(folder).resolve()
        (room / "work").mkdir()
        try:
            tried = subprocess.run(
                [*bubblewrap_command(room), sys.executable, "-P", "-c", f"import {WARM}"],
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"bubblewrap does not run: {error}"
    last = tried.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"bubblewrap does not run here: {last[0]}" if tried.returncode else ""
