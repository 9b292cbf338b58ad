"""How long a check cell takes: every exercise, with a right answer and with every known mistake.

To reach: p95 of at most 0.5 s. Run as ``python benchmarks/check_latency.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import time

import machine

from attn_lessons import check
from attn_lessons.grading import catalogue
from attn_lessons.grading.check import CheckFailed


def timed(exercise_id: str, answer: object) -> float:
    """One check, with its feedback rendered as a notebook would."""
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(CheckFailed):
        check(exercise_id, answer)._repr_html_()  # type: ignore[arg-type]
    return time.perf_counter() - begun


def first_import() -> float:
    """What the first check of a fresh kernel pays once: importing."""
    line = "from attn_lessons import check"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import numpy; {line}"], check=True)
    with_check = time.perf_counter() - begun
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return with_check - (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="checks of each answer")
    runs = parser.parse_args().runs
    where = machine.machine()
    exercises = {}
    for exercise in catalogue.exercises():
        right = [timed(exercise.id, exercise.reference) for _ in range(runs)]
        wrong = [
            timed(exercise.id, mistake.answer)
            for mistake in exercise.mistakes
            for _ in range(max(1, runs // 4))
        ]
        exercises[exercise.id] = {"right": machine.spread(right), "wrong": machine.spread(wrong)}
    slowest = max(times[kind]["p95_s"] for times in exercises.values() for kind in times)
    result = {
        "exercises": exercises,
        "slowest_p95_s": slowest,
        "first_import_s": round(sorted(first_import() for _ in range(5))[2], 3),
    }
    machine.write("check_latency", result, "attn-lessons", "numpy", where=where)


if __name__ == "__main__":
    main()
