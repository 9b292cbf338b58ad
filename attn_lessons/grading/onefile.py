"""One function in a plain file: found, called in a process of its own, judged here."""

from __future__ import annotations

import ast
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from attn_lessons.grading import calls, check, seeds
from attn_lessons.grading.exercise import Exercise
from attn_lessons.grading.protocol import ProtocolError
from attn_lessons.grading.records import ExerciseStatus, Judgement

MAX_FILE_BYTES = 4 * 2**20


class FileFault(ValueError):
    """A file that holds no such answer, said in one line."""


def judge(exercise: Exercise, path: Path, timeout: float) -> Judgement:
    """The verdict on the function that ``path`` defines."""
    _parses(path)
    draws = check.make_draws(exercise, seeds.check_seeds(exercise.id))
    learner = "attn_lessons.grading.learner"
    command = [sys.executable, "-P", "-m", learner, str(path), exercise.id]
    try:
        done = subprocess.run(
            command,
            input=calls.message(exercise, draws),
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return _unjudged(exercise, "timeout", f"ran longer than {timeout:g} s")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        message = f"ended the process that called it (exit code {done.returncode})"
        return _unjudged(exercise, "error", message)
    if (fault := _fault(answer, exercise.id)) is not None:
        raise FileFault(f"{path}: {fault}")
    try:
        return check.judge(exercise, draws, calls.outcomes(answer, draws))
    except ProtocolError as error:
        return _unjudged(exercise, "error", f"what it returned cannot be read: {error}")


def _parses(path: Path) -> None:
    if path.suffix == ".ipynb":
        raise FileFault(f"{path}: a notebook, not a Python file; `attn-lessons grade` takes it")
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise FileFault(f"{path}: a folder, not a Python file")
        if not stat.S_ISREG(status.st_mode):
            raise FileFault(f"{path}: not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise FileFault(f"{path}: too large for a Python file")
        source = path.read_bytes()
    except FileNotFoundError:
        raise FileFault(f"{path}: no such file") from None
    except OSError as error:
        raise FileFault(f"{path}: {error.strerror or error}") from None
    try:
        ast.parse(source, str(path))
    except SyntaxError as error:
        at = f"line {error.lineno}: " if error.lineno else ""
        raise FileFault(f"{path}: {at}{error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise FileFault(f"{path}: not a Python file: {error}") from None


def _fault(answer: Any, name: str) -> str | None:
    match answer:
        case {"raised": str(text)}:
            return text
        case {"defines": list(names)}:
            has = f"it defines {', '.join(map(str, names))}" if names else "it defines no function"
            return f"does not define {name}; {has}"
    return None


def _unjudged(exercise: Exercise, status: ExerciseStatus, message: str) -> Judgement:
    return Judgement(exercise.id, status, 0, exercise.points, message=message)
