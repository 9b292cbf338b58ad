"""Peak resident memory of one call, in a process of its own.

A script that measures memory runs itself again, once a measurement (``apart``), and there calls
``peak``. Inputs are made before the call and so not counted; what it returns is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def apart(script: str, *arguments: object, threads: int | None = None) -> Any:
    """What ``script --in-here arguments`` prints, as JSON, from a fresh process."""
    # A threshold that is said stays: otherwise it grows, and freed arrays stay resident.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    if threads is not None:
        env |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, script, "--in-here", *map(str, arguments)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(ran.stdout)


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that the process grew by at most while ``call`` ran, and what it returned."""
    trim()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    returned = call()
    return max(resident("VmHWM") - before, 0), returned


def resident(which: str) -> int:
    """A line of this process's status, in bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) * 1024


def trim() -> None:
    """What was freed goes back to the system: taken again unseen, it would hide the first MiB."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def warm_blas() -> None:
    """The first large product takes buffers, which stay."""
    square = np.ones((1024, 1024), np.float32)
    square @= square
