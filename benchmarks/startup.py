"""A fresh clone, with nothing but Python and make: how long until each thing is there.

Measures ``make start`` twice (JupyterLab answers; the book is readable; the second time) and
``make test``. To reach on 2 cores: 180 s, 300 s, a few seconds, 900 s.
Run as ``python benchmarks/startup.py``; it takes about as long as the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
PORT = 18970


def wait_for(url: str, seconds: float) -> bytes:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.read()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {seconds:.0f} s")


def started(clone: Path) -> dict[str, float]:
    """One ``make start``: seconds until JupyterLab and the book answer, and to stop it."""
    begun = time.monotonic()
    with subprocess.Popen(
        ["make", "start", f"PORT={PORT}"],
        cwd=clone,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"make start ended:\n{said}")
            said += line
        lab, book = re.findall(r"http://\S+", said)
        wait_for(lab, 60)
        lab_s = time.monotonic() - begun
        while not json.loads(wait_for(book + "_status", 60))["ready"]:
            if time.monotonic() - begun > 1800:
                raise SystemExit("the book was not built within half an hour")
            time.sleep(0.5)
        wait_for(book + "intro.html", 60)
        book_s = time.monotonic() - begun
        asked = time.monotonic()
        # As Ctrl-C in a terminal reaches everything in the foreground, make included.
        os.killpg(process.pid, signal.SIGINT)
        process.communicate()
    return {
        "lab_s": round(lab_s, 1),
        "book_s": round(book_s, 1),
        "stop_s": round(time.monotonic() - asked, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-tests", action="store_true")
    where = machine.machine()
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="attention by hand ") as folder:
        clone = Path(folder) / "a clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        result["first_start"] = started(clone)
        result["second_start"] = started(clone)
        if not parser.parse_args().without_tests:
            begun = time.monotonic()
            tests = subprocess.run(["make", "test"], cwd=clone, capture_output=True, text=True)
            last = tests.stdout.strip().splitlines()[-1] if tests.stdout.strip() else ""
            result["test"] = {
                "seconds": round(time.monotonic() - begun, 1),
                "exit_code": tests.returncode,
                "last_line": last,
            }
    machine.write("startup", result, "jupyterlab", "jupyter-book", "torch", where=where)


if __name__ == "__main__":
    main()
