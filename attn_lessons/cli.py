"""The ``attn-lessons`` command: reads what was asked for, has it done, prints it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attn_lessons import _paths
from attn_lessons.grading.records import NotebookRow

if TYPE_CHECKING:
    from attn_lessons.grading.classroom import Class

app = typer.Typer(
    help="Attention by Hand: exercises, their checks, and grading.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

WRONG_USAGE = 2
INTERRUPTED = 130


def fail(*lines: str, code: int = WRONG_USAGE) -> NoReturn:
    """Say what is wrong, one line each, and end."""
    for line in lines:
        err.print(line, markup=False)
    raise typer.Exit(code)


@app.command()
def release(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 where anything differs.")
    ] = False,
) -> None:
    """Write exercises/ from solutions/."""
    from attn_lessons.grading.release import ReleaseError
    from attn_lessons.grading.release import release as make

    try:
        differ = make(_paths.solutions_dir(), _paths.exercises_dir(), check=check)
    except (ReleaseError, OSError) as error:
        fail(*str(error).splitlines())
    for name in differ:
        there = (_paths.exercises_dir() / name).exists()
        done = "differs from its solution" if check else "written" if there else "removed"
        out.print(f"{name}: {done}", markup=False)
    if not differ:
        out.print("exercises/ is in step with solutions/")
    raise typer.Exit(1 if check and differ else 0)


@app.command()
def check(
    exercise: Annotated[str, typer.Argument(metavar="ID", help="The exercise: a function's name.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="The file that defines it.")],
    json: Annotated[
        str, typer.Option(metavar="FILE", help="Write the verdict as JSON; - is standard output.")
    ] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds it may run.")] = 60.0,
) -> None:
    """Check one function in a plain file. Exit code: 0 right, 1 wrong, 2 nothing to check."""
    from attn_lessons.grading import catalogue, feedback, job, onefile
    from attn_lessons.grading.reports import as_json

    if json and json != "-":
        _writable_file("--json", Path(json))
    try:
        wanted = catalogue.find(exercise)
    except ValueError as error:
        fail(str(error).removeprefix("exercise_id: "))
    try:
        verdict = onefile.judge(wanted, file, timeout)
    except onefile.FileFault as error:
        fail(str(error))
    console = err if json == "-" else out
    console.print(feedback.text(verdict), markup=False, highlight=False, soft_wrap=True)
    try:
        _write(json, as_json.exercise(job.judged(verdict)))
    except OSError as error:
        fail(_told(error), code=1)
    raise typer.Exit(0 if verdict.status == "passed" else 1)


@app.command()
def grade(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Notebooks, or folders of them.")
    ],
    json: Annotated[
        str, typer.Option(metavar="FILE", help="Write the report as JSON; - is standard output.")
    ] = "",
    csv: Annotated[
        str, typer.Option(metavar="FILE", help="Write the report as CSV; - is standard output.")
    ] = "",
    html: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the report as web pages.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Secret the inputs follow from; drawn if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0 is one a core.")] = 0,
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Grade on the machines of this Dask scheduler.")
    ] = "",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a cell may run; a notebook gets ten times that.")
    ] = 30.0,
    sandbox: Annotated[
        Literal["auto", "bubblewrap", "none"],
        typer.Option(help="What is put around the code that is graded."),
    ] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 where any point was lost.")
    ] = False,
) -> None:
    """Grade notebooks: PATH is a notebook, a folder of them, or one of STUDENT/chNN_name.ipynb.

    Exit code: 0 when every notebook was given a row, 2 for wrong usage. An interrupted run goes on
    where it was when the same command is given again.
    """
    from attn_lessons.grading import classroom
    from attn_lessons.grading.job import Settings
    from attn_lessons.grading.reports import terminal

    _writable(json, csv, html)
    try:
        submissions = classroom.gather(paths)
        classroom.refuse_outdated(paths)
        settings = Settings(seed or 0, timeout, _sandbox(sandbox))
        run = classroom.begin(submissions, settings, seed)
    except classroom.ClassError as error:
        fail(str(error))
    if run.rows:
        err.print(f"going on with an interrupted run: {len(run.rows)} of {len(run.jobs)} are done")
    rows = _finish(run, jobs or os.cpu_count() or 1, scheduler)
    try:
        _write_reports(rows, json, csv, html)
    except OSError as error:
        run.ledger.close()
        fail(f"{_told(error)}; the grades are kept, the same command writes them", code=1)
    run.ledger.finish()
    (err if "-" in (json, csv) else out).print(terminal.report(rows))
    lost = any(row.status != "graded" or row.points < row.max_points for row in rows)
    raise typer.Exit(1 if strict and lost else 0)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def start(context: typer.Context) -> None:
    """Start JupyterLab with the exercises and the book (--port, --workspace)."""
    from attn_lessons import start as starting

    raise typer.Exit(starting.main(context.args))


@app.command()
def reset(
    chapter: Annotated[str, typer.Argument(metavar="chNN", help="ch01, or the notebook's name.")],
    workspace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where your notebooks live.")
    ] = None,
) -> None:
    """Put a fresh copy of a chapter into the workspace; yours is kept under a dated name."""
    from attn_lessons.grading import progress as state
    from attn_lessons.grading.notebook import NotebookError, find_name

    try:
        name = find_name(chapter)
        folder = state.find_workspace(workspace)
        kept = state.reset(folder, name, datetime.now())
    except NotebookError as error:
        fail(str(error))
    except OSError as error:
        fail(_told(error), code=1)
    out.print(f"{folder / name}.ipynb is a fresh copy", markup=False, highlight=False)
    if kept is not None:
        out.print(f"yours is kept as {kept}", markup=False, highlight=False)


@app.command()
def progress(
    workspace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where your notebooks live.")
    ] = None,
) -> None:
    """What is solved and what is next, from the notebooks as they are saved."""
    from attn_lessons.grading import progress as state
    from attn_lessons.grading.notebook import NotebookError
    from attn_lessons.grading.reports import terminal

    try:
        folder = state.find_workspace(workspace)
    except NotebookError as error:
        fail(str(error))
    with out.status("running your notebooks"):
        found = state.progress(folder)
    out.print(terminal.progress(found.rows, found.next))
    out.print(escape(found.summary), highlight=False)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a mark that a terminal cannot show ends nothing
            stream.reconfigure(errors="backslashreplace")
    app()


def _sandbox(asked: str) -> Literal["bubblewrap", "none"]:
    """The sandbox to use, with one line where the wanted one cannot be had."""
    from attn_lessons.grading.classroom import ClassError
    from attn_lessons.grading.sandbox import bubblewrap_fault

    if asked == "none":
        return "none"
    fault = bubblewrap_fault()
    if not fault:
        return "bubblewrap"
    if asked == "bubblewrap":
        raise ClassError(f"--sandbox bubblewrap: {fault}")
    err.print(f"no sandbox: {fault}; notebooks run with your rights", style="yellow")
    return "none"


def _finish(run: Class, jobs: int, scheduler: str) -> list[NotebookRow]:
    """Grade what is left; whatever stops it, the rows that are done stay on record."""
    from attn_lessons.grading import classroom

    try:
        with _bar(len(run.jobs), len(run.rows)) as step:
            if scheduler:
                classroom.grade_on(run, scheduler, step)
            else:
                classroom.grade(run, jobs, step)
    except classroom.ClassError as error:
        run.ledger.close()
        fail(str(error))
    except OSError as error:
        fail(f"the record of the run cannot be written: {_told(error)}", code=1)
    except KeyboardInterrupt:
        run.ledger.close()
        done = f"{len(run.rows)} of {len(run.jobs)} notebooks are graded"
        fail(f"stopped: {done}; the same command goes on from there", code=INTERRUPTED)
    return run.finished


def _write_reports(rows: Sequence[NotebookRow], json: str, csv: str, html: Path | None) -> None:
    from attn_lessons.grading.reports import as_csv, as_html, as_json

    if html is not None:
        _write_pages(html, as_html.render(rows))
    for name, render in ((json, as_json.render), (csv, as_csv.render)):
        _write(name, render(rows))


def _write_pages(folder: Path, pages: Mapping[str, str]) -> None:
    """The pages, and nothing left in the folder of those that an earlier run put there."""
    from attn_lessons.grading.release import write_whole
    from attn_lessons.grading.reports import as_html

    index = folder / "index.html"
    before = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    for name, text in pages.items():
        write_whole(folder / name, text)
    for name in as_html.stale(before, pages):
        (folder / name).unlink(missing_ok=True)


def _write(name: str, text: str) -> None:
    from attn_lessons.grading.release import write_whole

    if name == "-":
        sys.stdout.write(text)
    elif name:
        try:
            write_whole(Path(os.path.realpath(name)), text)
        except OSError as error:  # by the name the user knows, not the passing one
            raise OSError(error.errno, error.strerror, name) from None


def _writable(json: str, csv: str, html: Path | None) -> None:
    """Refuse outputs that could not be written, before anything is run."""
    for option, name in (("--json", json), ("--csv", csv)):
        if name and name != "-":
            _writable_file(option, Path(name))
    if json and csv and (json == csv or os.path.realpath(json) == os.path.realpath(csv)):
        both = "standard output" if json == "-" else json
        fail(f"--json and --csv: only one of them can be {both}")
    if html is None:
        return
    there = next(p for p in (html, *html.parents) if os.path.lexists(p))
    if not there.is_dir():
        fail(f"--html: {there} is not a folder")
    _open_folder("--html", there)


def _writable_file(option: str, path: Path) -> None:
    if path.suffix in (".ipynb", ".py"):
        fail(f"{option}: {path} is the name of a notebook or a program, not of a report")
    if os.path.isdir(path):
        fail(f"{option}: {path} is a folder, a file is wanted")
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"{option}: {path} is not a regular file; - is standard output")
    parent = path.absolute().parent
    if not os.path.isdir(parent):
        fail(f"{option}: there is no folder {parent}")
    _open_folder(option, parent)


def _open_folder(option: str, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        fail(f"{option}: the folder {folder} cannot be written to")


def _told(error: OSError) -> str:
    """An error of the system in one line."""
    return ": ".join(str(part) for part in (error.filename, error.strerror) if part) or str(error)


@contextlib.contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[NotebookRow], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("grading", total=total, completed=done)
        yield lambda row: bar.update(task, advance=1, description=escape(row.student or "grading"))


if __name__ == "__main__":
    main()
