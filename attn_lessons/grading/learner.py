"""The kernel's side: calls the learner's function and hands on what it did, right or wrong.

Nothing here knows an expected value, and nothing here imports the catalogue.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import linecache
import os
import runpy
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from attn_lessons.grading.protocol import (
    MAX_DEPTH,
    MIME,
    ProtocolError,
    decode,
    encode_returned,
    layout_of,
    with_layout,
)
from attn_lessons.grading.records import Returned

LONGEST_MESSAGE = 500


def call(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
) -> Returned:
    """Call ``function`` on fresh writeable copies and say what it returned, raised and changed.

    ``names`` are the positional parameters' names, for saying which argument was changed.
    """
    given = [fresh(value) for value in args]
    named = {key: fresh(value) for key, value in (kwargs or {}).items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = plain(function(*given, **named))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a verdict is still due
        message = _where(error, function)
        return Returned(error=type(error).__name__, error_message=message)
    labels = [*names[: len(args)], *(f"argument {i + 1}" for i in range(len(names), len(args)))]
    mutated = [n for n, old, new in zip(labels, args, given, strict=True) if not same(old, new)]
    mutated += [key for key, new in named.items() if not same((kwargs or {})[key], new)]
    return Returned(value=value, mutated=tuple(mutated))


def fresh(value: Any) -> Any:
    """A writeable copy that lies in memory as the original does."""
    match value:
        case np.ndarray():
            return with_layout(value, layout_of(value))
        case tuple() | list():
            return type(value)(fresh(item) for item in value)
        case dict():
            return {key: fresh(item) for key, item in value.items()}
    return copy.deepcopy(value)


def same(old: Any, new: Any) -> bool:
    """Whether nothing in ``old`` was changed in ``new`` (NaN equals NaN here)."""
    if type(old) is not type(new):
        return False
    match old:
        case np.ndarray():
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                return False
            return np.array_equal(old, new, equal_nan=old.dtype.kind in "fc")
        case tuple() | list():
            same_length = len(old) == len(new)
            return same_length and all(same(a, b) for a, b in zip(old, new, strict=True))
        case dict():
            return list(old) == list(new) and all(same(old[key], new[key]) for key in old)
    return bool(old == new) or old != old


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as plain data: whatever holds numbers becomes an array, nesting is kept."""
    if depth > MAX_DEPTH:
        raise TypeError(f"the returned value is nested deeper than {MAX_DEPTH}")
    match value:
        case None | bool() | int() | float() | complex() | str() | np.generic():
            return value
        case np.ndarray():
            return _numeric(np.array(value, subok=False))
        case tuple():
            return tuple(plain(item, depth + 1) for item in value)
        case list():
            return [plain(item, depth + 1) for item in value]
        case Mapping():
            return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if hasattr(value, "detach"):  # a torch tensor that may want gradients
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    return _numeric(np.array(value))


def find(name: str, namespace: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The function of this name, or None where the learner has not defined one."""
    found = namespace.get(name)
    return found if callable(found) else None


def quiet() -> None:
    """Swallow what a graded notebook prints; its ``check`` and ``exit`` calls do nothing."""
    from IPython import get_ipython

    import attn_lessons

    shell = get_ipython()
    if shell is not None:  # exit() would end the kernel a few cells later
        shell.ask_exit = lambda: None
    sys.stdout, sys.stderr = _Mute(), _Mute()
    for name in ("check", "progress"):
        vars(attn_lessons)[name] = lambda *_args, **_kwargs: None


def emit(name: str, namespace: Mapping[str, Any], message: str) -> None:
    """Run the sent draws of one exercise and publish what came back, for the grader to judge."""
    from IPython.display import publish_display_data

    function = find(name, namespace)
    if function is None:
        publish_display_data({MIME: {"exercise": name, "defined": False, "draws": []}})
        return
    publish_display_data(
        {MIME: {"exercise": name, "defined": True, "draws": run(function, message)}}
    )


def run(function: Callable[..., Any], message: str) -> list[list[dict[str, Any]]]:
    """Every call of every draw in ``message``, as data that can be sent back."""
    sent = decode(json.loads(message))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return [[_sendable(outcome) for outcome in _run(function, d)] for d in sent["draws"]]


def from_file(path: str, name: str, message: str) -> dict[str, Any]:
    """What the function ``name`` of a plain file does, or why there is none."""
    try:
        namespace = runpy.run_path(path, run_name="answer")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file may raise anything, SystemExit too
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        at = f"line {lines[-1]}: " if lines else ""
        return {"raised": f"{at}{type(error).__name__}: {str(error)[:LONGEST_MESSAGE]}"}
    function = find(name, namespace)
    if function is None:
        own = [n for n, v in namespace.items() if callable(v) and not n.startswith("_")]
        return {"defines": own}
    return {"draws": run(function, message)}


def main(arguments: list[str]) -> None:
    """``python -m attn_lessons.grading.learner FILE NAME``: calls come in, outcomes go out."""
    path, name = arguments
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    message = sys.stdin.read()
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    json.dump(from_file(path, name, message), answers)
    answers.flush()


def _run(function: Callable[..., Any], draw: Mapping[str, Any]) -> Iterator[Returned]:
    for args, kwargs in draw["calls"]:
        yield call(function, args, kwargs, draw["names"])


def _sendable(returned: Returned) -> dict[str, Any]:
    try:
        return encode_returned(returned)
    except ProtocolError as error:
        return encode_returned(Returned(error="TypeError", error_message=str(error)))


def _numeric(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "biufc":
        return array
    raise TypeError(f"the returned value holds {array.dtype} data; arrays of numbers are expected")


def _where(error: BaseException, function: Callable[..., Any]) -> str:
    """The exception's text with the learner's line, as far as there is one."""
    text = str(error).strip()[:LONGEST_MESSAGE]
    line = _learners_line(error.__traceback__, function)
    return f"{text} {line}".strip() if line else text


def _learners_line(trace: types.TracebackType | None, function: Callable[..., Any]) -> str:
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    found = ""
    while trace is not None:
        file, number = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if own is not None and (file == own or _is_cell(file)):
            source = linecache.getline(file, number).strip()
            found = f"(line {number}: {source})" if source else f"(line {number})"
        trace = trace.tb_next
    return found


def _is_cell(file: str) -> bool:
    return file.startswith("<ipython-input") or f"{os.sep}ipykernel_" in file


class _Mute(io.TextIOBase):
    """A stream that swallows everything: nobody reads what a graded notebook prints."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def writable(self) -> bool:
        return True


if __name__ == "__main__":
    main(sys.argv[1:])
