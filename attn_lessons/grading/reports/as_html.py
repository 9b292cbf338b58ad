"""Rows as a folder of pages: a table of the class, and a page a notebook."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from attn_lessons.grading.records import ExerciseRow, NotebookRow

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5b5d66; --paper: #fff; --line: #d9dae0;
  --band: #f5f6f8; --link: #0b5cad; --good: #14693b; --bad: #a3261f; --wait: #7a4d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a9abb5; --paper: #16171b;
  --line: #383a42; --band: #1f2026; --link: #82b8f5; --good: #6fd39b; --bad: #ff9a90;
  --wait: #f0c06a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .soft { color: var(--soft); } a { color: var(--link); }
.facts { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 1.5rem 0 0; padding: 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dt { color: var(--soft); font-size: .875rem; }
.facts dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .5rem .75rem;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody tr:hover { background: var(--band); }
th[scope=row] { font-weight: 600; } .number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td.text { min-width: 16rem; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, monospace; }
.passed { color: var(--good); } .graded { color: var(--soft); }
.failed, .error, .crashed, .unreadable { color: var(--bad); }
.timeout, .missing { color: var(--wait); } .status { font-weight: 600; white-space: nowrap; }
.bar { display: inline-block; width: 6rem; height: .5rem; border-radius: .25rem;
  background: var(--line); vertical-align: middle; margin-right: .6rem; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--good); }
"""
MARK = "<meta name='generator' content='attn-lessons grade'>"
MARKS = {
    "passed": "✓",
    "failed": "✗",
    "error": "✗",
    "crashed": "✗",
    "unreadable": "✗",
    "timeout": "◷",
    "missing": "–",
}


def render(rows: Sequence[NotebookRow]) -> dict[str, str]:
    """File name → page; ``index.html`` comes last, when all that it links to is there."""
    pages = {page_name(row): _notebook_page(row) for row in rows}
    return pages | {"index.html": _index_page(rows)}


def page_name(row: NotebookRow) -> str:
    """A file name that no other notebook's page has."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", f"{row.student}-{row.chapter}").strip("-")[:60]
    digest = hashlib.sha256(f"{row.notebook}\0{row.student}".encode()).hexdigest()[:8]
    return f"{readable.lower()}-{digest}.html"


def stale(index: str, now: Mapping[str, str]) -> set[str]:
    """Pages that the folder's earlier ``index`` links to and that are no longer written."""
    if MARK not in index:
        return set()
    return set(re.findall(r"href='([a-z0-9-]+-[0-9a-f]{8}\.html)'", index)) - set(now)


def _index_page(rows: Sequence[NotebookRow]) -> str:
    students = len({row.student for row in rows})
    got, most = sum(r.points for r in rows), sum(r.max_points for r in rows)
    trouble = sum(row.status != "graded" for row in rows)
    facts = [
        ("notebooks", str(len(rows))),
        ("students", str(students)),
        ("points", _share(got, most)),
        ("not graded", str(trouble)),
    ]
    body = [
        "<h1>Grades</h1>",
        _facts(facts),
        "<h2 id='notebooks'>Notebooks</h2>",
        _table(
            "notebooks",
            ("Student", "Chapter", "Points", "Passed", "Status", "Message"),
            (_index_row(row) for row in rows),
        ),
        "<h2 id='exercises'>Exercises</h2>",
        _table(
            "exercises",
            ("Exercise", "Passed", "Most frequent mistake", "Chapter"),
            _exercise_rows(rows),
        ),
    ]
    return _page("Grades", body)


def _index_row(row: NotebookRow) -> str:
    passed = sum(e.status == "passed" for e in row.exercises)
    return (
        f"<tr><th scope='row'><a href='{page_name(row)}'>{escape(row.student)}</a></th>"
        f"<td>{escape(row.chapter)}</td>"
        f"<td class='number'>{row.points} / {row.max_points}</td>"
        f"<td class='number'>{passed} / {len(row.exercises)}</td>{_status(row.status)}"
        f"<td class='text'>{escape(row.message)}</td></tr>"
    )


def _exercise_rows(rows: Sequence[NotebookRow]) -> Iterator[str]:
    tried: dict[tuple[str, str], list[ExerciseRow]] = {}
    for row in rows:
        for exercise in row.exercises:
            tried.setdefault((row.chapter, exercise.id), []).append(exercise)
    for (chapter, name), results in tried.items():
        passed = sum(e.status == "passed" for e in results)
        mistakes = Counter(e.mistake for e in results if e.mistake).most_common(1)
        often = f"{escape(mistakes[0][0])} ({mistakes[0][1]})" if mistakes else ""
        width = round(100 * passed / len(results))
        yield (
            f"<tr><th scope='row'><code>{escape(name)}</code></th>"
            f"<td class='number'><span class='bar' aria-hidden='true'>"
            f"<i style='width:{width}%'></i></span>{passed} / {len(results)}</td>"
            f"<td class='text'>{often}</td><td>{escape(chapter)}</td></tr>"
        )


def _notebook_page(row: NotebookRow) -> str:
    facts = [("points", _share(row.points, row.max_points)), ("status", row.status)]
    body = [
        "<p><a href='index.html'>All notebooks</a></p>",
        f"<h1>{escape(row.student)}: {escape(row.chapter)}</h1>",
        f"<p class='soft'><code>{escape(row.notebook)}</code></p>",
        f"<p>{escape(row.message)}</p>" if row.message else "",
        _facts(facts),
        "<h2 id='exercises'>Exercises</h2>",
        _table(
            "exercises",
            ("Exercise", "Status", "Points", "Mistake", "Message"),
            (_exercise_row(exercise) for exercise in row.exercises),
        ),
    ]
    return _page(f"{row.student}: {row.chapter}", body)


def _exercise_row(exercise: ExerciseRow) -> str:
    return (
        f"<tr><th scope='row'><code>{escape(exercise.id)}</code></th>{_status(exercise.status)}"
        f"<td class='number'>{exercise.points} / {exercise.max_points}</td>"
        f"<td class='text'>{escape(exercise.mistake or '')}</td>"
        f"<td class='text'>{escape(exercise.message)}</td></tr>"
    )


def _status(status: str) -> str:
    mark = f"<span aria-hidden='true'>{MARKS[status]}</span> " if status in MARKS else ""
    return f"<td class='status {escape(status)}'>{mark}{escape(status)}</td>"


def _share(points: int, most: int) -> str:
    return f"{points} / {most}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f"<dl class='facts'>{items}</dl>"


def _table(label: str, columns: Sequence[str], rows: Iterator[str]) -> str:
    heads = "".join(f"<th scope='col'{_number(name)}>{escape(name)}</th>" for name in columns)
    return (
        f"<div class='scroll' role='region' aria-labelledby='{label}' tabindex='0'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(column: str) -> str:
    return " class='number'" if column in ("Points", "Passed") else ""


def _page(title: str, body: Sequence[str]) -> str:
    return (
        f"<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n{MARK}\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )
