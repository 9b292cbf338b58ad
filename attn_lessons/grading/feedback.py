"""The verdict in words and numbers, for a terminal and for a notebook.

Nothing is computed here that decides anything. Whatever comes from the learner is escaped. The
HTML takes its text colour from the page and tints what stands behind it, so that one rendering
reads well in light and in dark themes. A link into the book is given where the server that runs
the notebook also serves the book, at ``/book/`` (``attn-lessons start`` says so by setting
``ATTN_LESSONS_BOOK``); elsewhere the section is named.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from attn_lessons.grading.compare import difference, number
from attn_lessons.grading.exercise import Exercise
from attn_lessons.grading.records import UNSOLVED, Diagnosis, Judgement, Mismatch

WIDTH = 96
WHOLE = 6  # matrices up to this many rows and columns are shown whole
ROW = 8  # and vectors up to this length
WINDOW = 5  # of larger ones, this many around the largest error
MAP = 24  # rows and columns of a heat map

PASS, FAIL, CALM = "#2e9e5b", "#d6453d", "#8a8f98"
RED, BLUE = (178, 24, 43), (33, 102, 172)


# ------------------------------------------------------------------------------------- text


def line(judgement: Judgement) -> str:
    """The verdict in one line."""
    if judgement.status == "passed" or judgement.message == UNSOLVED:
        return f"{judgement.exercise}: {_headline(judgement)}"
    if judgement.diagnosis is not None and judgement.diagnosis.mistake:
        return f"{judgement.exercise}: {judgement.diagnosis.mistake}"
    if judgement.mismatch is None:
        return f"{judgement.exercise}: {judgement.message or judgement.status}"
    first = f"first in the case “{judgement.mismatch.case}”"
    return f"{judgement.exercise}: {_headline(judgement)}, {first}"


def text(judgement: Judgement) -> str:
    """The verdict as plain text, at most fifteen lines."""
    if judgement.status == "passed":
        return "\n".join([line(judgement), *_wrapped(", ".join(judgement.cases_passed))])
    if judgement.message == UNSOLVED or judgement.mismatch is None:
        return line(judgement)
    head = f"{judgement.exercise}: {_headline(judgement)}"
    body = [*_reasons(judgement.diagnosis), *_first_failure(judgement.mismatch)]
    return "\n".join([head, *body, *_wrapped(_right_in(judgement), lines=2)])


def _headline(judgement: Judgement) -> str:
    if judgement.status == "passed":
        return f"passed, {judgement.cases_total} cases on two draws of numbers each"
    if judgement.message == UNSOLVED:
        return UNSOLVED
    raised = judgement.mismatch is not None and judgement.mismatch.kind == "raised"
    return "raises an error" if raised else "not right yet"


def _reasons(diagnosis: Diagnosis | None) -> list[str]:
    if diagnosis is None:
        return []
    if diagnosis.mistake:
        book = f" Book: {diagnosis.section}" if diagnosis.section else ""
        named = f"Mistake: {diagnosis.mistake}. {_sentence(diagnosis.why)}{book}"
        return [*_wrapped(named, lines=4), *_seen(diagnosis.observations[:2])]
    return _seen(diagnosis.observations[:3])


def _seen(facts: Sequence[str]) -> list[str]:
    return [row for fact in facts for row in _wrapped(f"Seen: {fact}", lines=2)]


def _first_failure(fault: Mismatch) -> list[str]:
    hint = f" ({fault.hint.rstrip('.')})" if fault.hint else ""
    rows = _wrapped(f"First case that fails: {fault.case}{hint}", lines=2)
    rows += _wrapped(fault.message, lines=3)
    if _has_numbers(fault) and np.ndim(fault.want) > 0:
        rows += _number_rows(_View(fault))
    return rows


def _number_rows(view: _View) -> list[str]:
    """The row of the largest error, as much of it as fits."""
    row, column = view.worst
    wide = max(10, *(len(entry) for _, table in view.tables for entry in table[row]))
    room = (WIDTH - 15) // (wide + 2)
    span = _span(len(view.tables[0][1][row]), column, room, room)
    return [
        f"    {label:<11}" + "  ".join(f"{table[row][j]:>{wide}}" for j in span)
        for label, table in view.tables
    ]


def _right_in(judgement: Judgement) -> str:
    count = f"{len(judgement.cases_passed)} of {judgement.cases_total} cases"
    names = f": {', '.join(judgement.cases_passed)}" if judgement.cases_passed else ""
    return f"Right in {count}{names}"


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) or not words else f"{words}."


def _wrapped(words: str, lines: int = 8) -> list[str]:
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        max_lines=lines,
        placeholder=" …",
        break_on_hyphens=False,
    )


# ------------------------------------------------------------------------------------- HTML


def html(judgement: Judgement, exercise: Exercise | None = None) -> str:
    """The verdict for a notebook; ``exercise`` tells which outputs are laid out over tokens."""
    title = f"<code>{escape(judgement.exercise)}</code> {escape(_headline(judgement))}"
    if judgement.status == "passed":
        chips = "".join(_chip(name) for name in judgement.cases_passed)
        return _box(PASS, "✓", title, f"<div>{chips}</div>")
    if judgement.message == UNSOLVED or judgement.mismatch is None:
        return _box(CALM, "○", title, "Write the function above, run its cell, then this one.")
    fault = judgement.mismatch
    parts = [_reasons_html(judgement.diagnosis, fault), _failure_html(fault)]
    if _has_numbers(fault):
        drawn = exercise is not None and fault.output in exercise.tokens
        parts.append(_numbers_html(fault, _heat_map(fault) if drawn else ""))
    parts.append(f"<div style='{MUTED}'>{escape(_right_in(judgement))}</div>")
    return _box(FAIL, "✗", title, "".join(parts))


MUTED = "opacity:.8;margin-top:.6em"
MONO = "font-family:var(--jp-code-font-family,ui-monospace,monospace);font-size:.87em"


def _box(colour: str, mark: str, title: str, body: str) -> str:
    tint = ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return (
        f"<div style='border:1px solid rgba({tint},.45);border-left:5px solid {colour};"
        f"border-radius:4px;background:rgba({tint},.09);padding:.7em 1em;margin:.2em 0;"
        "max-width:68em;line-height:1.5;color:var(--jp-content-font-color1,inherit);"
        "font-family:var(--jp-content-font-family,system-ui,sans-serif)'>"
        f"<div style='font-size:1.05em;margin-bottom:.35em'><span aria-hidden='true' style='color:"
        f"{colour};font-weight:700;margin-right:.4em'>{mark}</span>{title}</div>{body}</div>"
    )


def _chip(name: str) -> str:
    return (
        "<span style='display:inline-block;border:1px solid rgba(46,158,91,.5);border-radius:1em;"
        f"padding:0 .7em;margin:.15em .35em .15em 0;font-size:.92em'>{escape(name)}</span>"
    )


def _reasons_html(diagnosis: Diagnosis | None, fault: Mismatch) -> str:
    if diagnosis is None:
        return ""
    if diagnosis.mistake:
        return (
            f"<div style='margin:.3em 0'><strong>{escape(_capital(diagnosis.mistake))}.</strong> "
            f"{escape(_sentence(diagnosis.why))} {_link(diagnosis.section)}"
            f"{_listed_html(diagnosis.observations)}</div>"
        )
    numeric = fault.kind in ("values", "nonfinite", "shape")
    if not diagnosis.observations:
        unknown = "None of the known mistakes gives these numbers."
        return f"<div style='margin:.3em 0'>{unknown}</div>" if numeric else ""
    known = "None of the known mistakes gives these numbers. What can be seen in them:"
    intro = known if numeric else "What can be seen:"
    return f"<div style='margin:.3em 0'>{intro}{_listed_html(diagnosis.observations)}</div>"


def _listed_html(facts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(_sentence(fact))}</li>" for fact in facts)
    return f"<ul style='margin:.2em 0 .2em 1.2em;padding:0'>{items}</ul>" if facts else ""


def _link(section: str) -> str:
    if not section:
        return ""
    if "ATTN_LESSONS_BOOK" not in os.environ:
        return f"<span style='overflow-wrap:anywhere'>Book: <code>{escape(section)}</code></span>"
    base = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "/").rstrip("/")
    address = escape(f"{base}/book/{section}", quote=True)
    colour = "var(--jp-content-link-color,#1976d2)"
    return (
        f"<a href='{address}' target='_blank' rel='noopener' style='color:{colour};"
        "text-decoration:underline'>Read it in the book</a>"
    )


def _failure_html(fault: Mismatch) -> str:
    hint = f" <span style='opacity:.8'>– {escape(fault.hint)}</span>" if fault.hint else ""
    return (
        f"<div style='margin-top:.5em'>First case that fails: <strong>{escape(fault.case)}</strong>"
        f"{hint}</div><div style='{MONO};margin:.25em 0;overflow-wrap:anywhere'>"
        f"{escape(fault.message)}</div>"
    )


def _numbers_html(fault: Mismatch, picture: str) -> str:
    """Matrices beside each other, vectors and single numbers below each other in one table."""
    view = _View(fault)
    if view.rows:
        parts = [_table(label, view.rows, view.columns, e, view.off) for label, e in view.tables]
    else:
        labels = [label for label, _ in view.tables]
        entries = [rows[0] for _, rows in view.tables]
        parts = [_table("", labels, view.columns, entries, view.off.repeat(len(labels), axis=0))]
    tables = "".join(parts)
    title = f"<div style='{MUTED};margin-bottom:.2em'>{escape(view.title)}</div>"
    beside = "display:flex;flex-wrap:wrap;align-items:flex-start;gap:.4em 1.2em"
    return f"{title}<div style='{beside}'>{tables}{picture}</div>"


def _table(
    label: str,
    names: Sequence[object],
    columns: Sequence[int],
    entries: list[list[str]],
    off: np.ndarray,
) -> str:
    plain = "border:0;background:none;text-align:right;padding:.1em .4em;font-weight:400"
    faint = f"{plain};opacity:.7"
    heads = "".join(f"<th scope='col' style='{faint}'>{i}</th>" for i in columns)
    rows = [f"<td style='{faint}'></td>{heads}"] if heads else []
    for i, name in enumerate(names):
        cells = f"<th scope='row' style='{faint}'>{name}</th>"
        for j, entry in enumerate(entries[i]):
            marked = ";font-weight:700;background:rgba(214,69,61,.22)" if off[i, j] else ""
            cells += f"<td style='{plain}{marked}'>{escape(entry)}</td>"
        rows.append(cells)
    body = "".join(f"<tr style='background:none'>{row}</tr>" for row in rows)
    # A page's own style makes captions pale; on the red ground they must stay readable.
    look = "caption-side:top;text-align:left;color:inherit;opacity:.85"
    caption = f"<caption style='{look}'>{label}</caption>"
    return (
        f"<table style='{MONO};border-collapse:collapse;border:0;margin:0;width:auto;"
        f"font-variant-numeric:tabular-nums'>{caption if label else ''}{body}</table>"
    )


def _heat_map(fault: Mismatch) -> str:
    """The signed error over the last two axes, at the leading indices of the largest error."""
    if np.ndim(fault.want) < 2:
        return ""
    view = _View(fault, MAP, MAP)
    side = 22 if max(view.error.shape) <= 12 else 14
    rows, columns = view.error.shape
    left, top = 34, 18
    largest = np.abs(view.error[np.isfinite(view.error)]).max(initial=0.0) or 1.0
    cells = []
    for i in range(rows):
        for j in range(columns):
            value = view.error[i, j]
            label = f"[{view.rows[i]}, {view.columns[j]}] {number(value)}"
            fill = _shade(value / largest) if np.isfinite(value) else "#111111"
            cells.append(
                f"<rect x='{left + j * side}' y='{top + i * side}' width='{side}' height='{side}' "
                f"fill='{fill}' stroke='#9aa0a6' stroke-width='.5'><title>{escape(label)}</title>"
                "</rect>"
            )
    labels = [
        f"<text x='{left + (j + 0.5) * side}' y='{top - 5}' text-anchor='middle'>{k}</text>"
        for j, k in enumerate(view.columns)
        if side > 14 or j % 4 == 0
    ] + [
        f"<text x='{left - 6}' y='{top + (i + 0.5) * side + 4}' text-anchor='end'>{k}</text>"
        for i, k in enumerate(view.rows)
        if side > 14 or i % 4 == 0
    ]
    width, height = left + columns * side + 4, top + rows * side + 4
    broken = "" if np.isfinite(view.error).all() else ", black nan or infinite"
    told = (
        f"Heat map of the error of {view.title}: {int(view.off.sum())} of {view.off.size} entries "
        f"off, the largest at row {view.rows[view.worst[0]]}, column {view.columns[view.worst[1]]}"
    )
    return (
        f"<figure style='margin:0'><svg role='img' aria-label='{escape(told, quote=True)}' "
        f"width='{width}' height='{height}' viewBox='0 0 {width} {height}' style='max-width:100%;"
        "height:auto'><g fill='currentColor' font-size='11' font-family='sans-serif'>"
        f"{''.join(labels)}</g>{''.join(cells)}</svg>"
        "<figcaption style='color:inherit;font-weight:normal;opacity:.85;font-size:.92em'>"
        f"Error of {escape(view.title)}: white is right, blue too large, red too small{broken}."
        "</figcaption></figure>"
    )


def _shade(share: float) -> str:
    """White at 0, blue towards 1, red towards -1."""
    end = BLUE if share > 0 else RED
    mixed = (round(255 + abs(share) * (channel - 255)) for channel in end)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _capital(words: str) -> str:
    """A capital first letter, unless the first word is code."""
    first = words.split(" ", 1)[0]
    return words[:1].upper() + words[1:] if first.isalpha() and first.islower() else words


# --------------------------------------------------------------------------- shared by both


def _has_numbers(fault: Mismatch) -> bool:
    if fault.kind not in ("values", "nonfinite") or not isinstance(fault.want, np.ndarray):
        return False
    return np.shape(fault.got) == fault.want.shape and fault.want.size > 0


class _View:
    """The part of an output around its largest error, as rows and columns of short numbers."""

    def __init__(self, fault: Mismatch, whole: int = WHOLE, window: int = WINDOW) -> None:
        got, want = np.asarray(fault.got), np.asarray(fault.want)
        where = fault.where or (0,) * want.ndim
        lead, last = where[:-2], where[-2:]
        got, want = _matrix(got[lead]), _matrix(want[lead])
        at = (0,) * (2 - len(last)) + last
        if len(last) < 2:
            whole, window = max(whole, ROW), max(window, ROW)
        spans = [_span(n, i, whole, window) for n, i in zip(want.shape, at, strict=True)]
        part = np.ix_(*spans)
        self.columns = list(spans[1]) if want.shape[1] > 1 or len(last) > 0 else []
        self.rows = list(spans[0]) if len(last) > 1 else []
        self.worst = (spans[0].index(at[0]), spans[1].index(at[1]))
        self.error = _signed(got[part], want[part])
        gap = difference(got[part], want[part])
        self.off = gap > _threshold(fault, got, want, at)
        self.tables = [
            ("got", _texts(got[part])),
            ("expected", _texts(want[part])),
            ("difference", _texts(self.error, self.off)),
        ]
        self.title = _title(fault.output, lead, spans, want.shape, len(last))


def _matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape((1,) * (2 - array.ndim) + array.shape)


def _span(size: int, at: int, whole: int, window: int) -> range:
    if size <= whole:
        return range(size)
    start = min(max(at - window // 2, 0), size - window)
    return range(start, start + window)


def _threshold(fault: Mismatch, got: np.ndarray, want: np.ndarray, at: tuple[int, ...]) -> float:
    """The largest difference that was still allowed."""
    if fault.error is None or fault.tolerance is None or fault.error == 0:
        return 0.0 if want.dtype.kind in "biu" else 1e-8
    return float(difference(got[at], want[at])) * fault.tolerance / fault.error


def _signed(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    if got.dtype.kind == "c" or want.dtype.kind == "c":
        return difference(got, want)
    a, b = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, a - b)


def _texts(table: np.ndarray, off: np.ndarray | None = None) -> list[list[str]]:
    """Numbers in one form for the whole table; differences that are allowed read ≈0."""
    finite = np.abs(table[np.isfinite(table)])
    fixed = (
        table.dtype.kind == "f"
        and bool((finite % 1).any())
        and 1e-2 <= finite.max(initial=0.0) < 1e3
    )
    rows = [[_text(entry, fixed) for entry in row] for row in table]
    if off is not None:
        near = ~off & (table != 0)
        rows = [["≈0" if near[i, j] else t for j, t in enumerate(r)] for i, r in enumerate(rows)]
    return rows


def _text(entry: Any, fixed: bool) -> str:
    if not fixed or entry == 0 or not np.isfinite(entry):
        return number(entry)
    return f"{entry:.4f}" if abs(entry) >= 5e-5 else f"{entry:.0e}"


def _title(
    name: str, lead: tuple[int, ...], spans: list[range], shape: tuple[int, ...], ndim: int
) -> str:
    shown = [str(i) for i in lead]
    parts = zip(spans[2 - ndim :], shape[2 - ndim :], strict=True)
    shown += [":" if len(s) == n else f"{s.start}:{s.stop}" for s, n in parts]
    trivial = all(index == ":" for index in shown)
    return name if trivial else f"{name}[{', '.join(shown)}]"
