"""A process that has imported everything slow, and forks itself into ready kernels.

``python -m attn_lessons.grading.warm [MODULE…]`` imports the modules, then reads one JSON request
a line from its input and answers each with one line. ``python -m attn_lessons.grading.warm --once
FILE`` becomes a single kernel, for a sandbox that is built around it. This side of the fence
imports neither the catalogue nor the grader.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

READY = {"ready": True}
# What a kernel imports by the time it answers, and NumPy with its generators.
ALWAYS = (
    "numpy.random",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
    "IPython.core.completerlib",
    "IPython.core.debugger",
    "IPython.core.oinspect",
    "IPython.extensions.storemagic",
    "tornado.platform.asyncio",
    "tornado.queues",
    "attn_lessons.grading.learner",
)


def main(arguments: list[str]) -> None:
    """Serve, or with ``--once`` become a kernel."""
    # Nobody debugs a graded notebook; without this every kernel imports the debugger.
    sys.modules["debugpy"] = None  # type: ignore[assignment]
    if arguments[:1] == ["--once"]:
        become_kernel(json.loads(Path(arguments[1]).read_text()))
    serve(arguments)


def serve(modules: list[str]) -> None:
    """Answer requests until the input ends, then take all kernels down."""
    for module in (*ALWAYS, *modules):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that collecting in a child does not copy every page
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    children: dict[int, int | None] = {}
    print(json.dumps(READY), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), children)), file=answers, flush=True)
    for pid in [pid for pid, code in children.items() if code is None]:
        _kill(pid)


def become_kernel(request: dict[str, Any]) -> None:
    """Turn this process into the kernel that ``request`` describes; does not return."""
    os.chdir(request["cwd"])
    limit(request["memory"], request["seconds"], request["file_bytes"])
    _forget_randomness()
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(
        argv=["-f", request["connection_file"], "--HistoryManager.enabled=False"]
    )
    os._exit(0)


def limit(memory: int, seconds: int, file_bytes: int) -> None:
    """Bound what this process may take, beyond the address space it holds already."""
    try:
        import resource
    except ImportError:  # no such limits on this platform
        return
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_AS: _address_space() + memory,
    }
    for kind, value in wanted.items():
        # macOS refuses a bound on the address space; the others hold there too.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _answer(request: dict[str, Any], children: dict[int, int | None]) -> dict[str, Any]:
    match request:
        case {"do": "start"}:
            pid = _fork(request)
            children[pid] = None
            return {"pid": pid}
        case {"do": "poll", "pid": int(pid)}:
            children[pid] = _poll(pid, children.get(pid, 0))
            return {"code": children[pid]}
        case {"do": "kill", "pid": int(pid)}:
            if children.get(pid, 0) is None:
                _kill(pid)
                children[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return {"code": children.get(pid, 0)}
    return {"error": "unknown request"}


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        _die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        sys.stdin = os.fdopen(0, closefd=False)
        # What the pipes to the grader would be: the child must not hold them.
        os.closerange(3, 256)
        os.environ["JPY_PARENT_PID"] = str(os.getppid())
        become_kernel(request)
    finally:
        os._exit(70)


def _poll(pid: int, known: int | None) -> int | None:
    if known is not None:
        return known
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _kill(pid: int) -> None:
    for target in (os.killpg, os.kill):  # until it has called setsid there is no group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            target(pid, signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _forget_randomness() -> None:
    """Forked twins would draw the same numbers."""
    import numpy as np

    random.seed()
    np.random.seed()  # noqa: NPY002 - the learner's code may draw from the legacy generator


def _address_space() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])
