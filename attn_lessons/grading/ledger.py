"""An append-only record of one grading run, so that an interrupted one goes on where it was.

One JSON object a line: first what the run is, then one finished row after another, each forced to
disk before the next notebook is taken. A line that a kill cut short is dropped on reading.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from attn_lessons.grading.records import ExerciseRow, NotebookRow

VERSION = 1


class LedgerBusy(RuntimeError):
    """Another process is writing to this ledger."""


class Ledger:
    """The rows a run has finished, by key. ``header`` is the first opener's and stays."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _opened(path)
        self.header, self.rows = self._read()
        if not self.header:
            self.header = {"ledger": VERSION, **header}
            self._append(self.header)

    def add(self, key: str, row: NotebookRow) -> None:
        """Put a finished row on record; it survives whatever happens afterwards."""
        self.rows[key] = row
        self._append({"key": key, "row": as_dict(row)})

    def finish(self) -> None:
        """The run's reports are written: nothing is left to resume."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the record as it is, for a later run to go on from."""
        self._file.close()

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> tuple[dict[str, Any], dict[str, NotebookRow]]:
        self._file.seek(0)
        header: dict[str, Any] = {}
        rows: dict[str, NotebookRow] = {}
        good = 0
        for line in self._file:
            try:
                entry = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if not header:
                    if entry["ledger"] != VERSION:
                        break
                    header = entry
                else:
                    rows[entry["key"]] = from_dict(entry["row"])
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        self._file.truncate(good)
        self._file.seek(good)
        return header, rows


def as_dict(row: NotebookRow) -> dict[str, Any]:
    """A row as plain data."""
    return vars(row) | {"exercises": [vars(exercise) for exercise in row.exercises]}


def from_dict(data: Mapping[str, Any]) -> NotebookRow:
    """The row that ``as_dict`` made ``data`` of."""
    exercises = tuple(ExerciseRow(**exercise) for exercise in data["exercises"])
    return NotebookRow(**{**data, "exercises": exercises})


def _opened(path: Path) -> IO[bytes]:
    # Nobody but the owner: the header holds the seed.
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    file = os.fdopen(handle, "r+b")
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise LedgerBusy(str(path)) from None
    return file
