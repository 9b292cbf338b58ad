"""The checkout's own virtual environment: made once, and again only when the pins change.

Standard library only, since it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

OLDEST_PYTHON = (3, 11)
# Each stage holds the extras that it adds to the stages before it.
STAGES: dict[str, tuple[str, ...]] = {
    "lab": (),
    "book": ("torch", "book"),
    "test": ("torch", "book", "test", "dev"),
}

Progress = Callable[[str], None]
Started = Callable[["subprocess.Popen[str]"], None]


class InstallError(RuntimeError):
    """The environment could not be made; the message is for the person at the terminal."""


class CommandFailed(RuntimeError):
    """A child process ended with an error; the message is the end of what it said."""


def venv_python(root: Path) -> Path:
    """The interpreter of the checkout's environment."""
    return root / ".venv" / "bin" / "python"


def stamp_file(root: Path, stage: str) -> Path:
    return root / ".venv" / f".installed-{stage}"


def wanted_stamp(root: Path, stage: str) -> str:
    """A hash of all that decides what an installation holds."""
    digest = hashlib.sha256(stage.encode())
    digest.update(str(root.resolve()).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def is_installed(root: Path, stage: str) -> bool:
    """Whether this stage, or one that includes it, was installed from the files as they are."""
    later = list(STAGES)[list(STAGES).index(stage) :]
    return venv_python(root).exists() and any(
        stamp_file(root, each).exists()
        and stamp_file(root, each).read_text() == wanted_stamp(root, each)
        for each in later
    )


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    if version[:2] < OLDEST_PYTHON:
        raise InstallError(
            f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer is needed; this is "
            f"{version[0]}.{version[1]} ({sys.executable}). Name another one with "
            "`make start PYTHON=python3.12`."
        )


def requirements(root: Path, extras: Sequence[str]) -> list[str]:
    """What the extras ask for, without the project's references to itself."""
    import tomllib  # not at the top: an older Python must get as far as check_python

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line for extra in extras for line in project["optional-dependencies"][extra]]
    own = project["name"].lower()
    return sorted({line for line in named if not line.lower().startswith(own)})


def make_venv(root: Path) -> None:
    """A fresh environment, unless a working one stands there already."""
    python = venv_python(root)
    if python.exists() and subprocess.run([python, "-c", ""], check=False).returncode == 0:
        return
    check_python()
    shutil.rmtree(root / ".venv", ignore_errors=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(root / ".venv")], capture_output=True, text=True
    )
    if made.returncode:
        raise InstallError(
            f"{sys.executable} -m venv failed:\n{made.stdout}{made.stderr}".rstrip()
            + "\nOn Debian and Ubuntu the module is in the package python3-venv."
        )


def lines_of(
    command: Sequence[str], log: Path, started: Started | None = None, cwd: Path | None = None
) -> Iterator[str]:
    """Run a command in a session of its own, keep what it says in ``log`` and yield its lines."""
    with (
        log.open("w", encoding="utf-8") as copy,
        subprocess.Popen(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        if started is not None:
            started(process)
        assert process.stdout is not None
        for line in process.stdout:
            copy.write(line)
            copy.flush()
            yield line
    if process.returncode:
        tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-12:])
        raise CommandFailed(tail.rstrip())


def describe(line: str) -> str:
    """The one word of a line of pip that a waiting person wants to see."""
    collected = re.match(r"Collecting ([\w.-]*\w)", line)
    if collected:
        return collected[1]
    return "unpacking" if line.startswith("Installing collected") else ""


def ensure(
    root: Path,
    stage: str,
    progress: Progress = lambda text: None,
    started: Started | None = None,
) -> bool:
    """Install a stage unless it is there. True where something was installed."""
    if is_installed(root, stage):
        return False
    make_venv(root)
    python = str(venv_python(root))
    log = root / ".venv" / f"install-{stage}.log"
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    targets = requirements(root, STAGES[stage])
    if not is_installed(root, "lab"):
        targets = ["--editable", str(root), *targets]
    command = [*pip, "--constraint", str(root / "constraints.txt"), *targets]
    seen = 0
    try:
        for line in lines_of(command, log, started):
            name = describe(line)
            if name == "unpacking":
                progress(f"unpacking {seen} packages")
            elif name:
                seen += 1
                progress(f"{seen} packages found, now {name}")
    except CommandFailed as failure:
        raise InstallError(f"pip could not install the packages:\n{failure}\n({log})") from None
    stamp_file(root, stage).write_text(wanted_stamp(root, stage))
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m attn_lessons.install test``: make the environment and say what is done."""
    (stage,) = arguments if arguments is not None else sys.argv[1:]
    root = Path(__file__).resolve().parent.parent
    try:
        if not is_installed(root, stage):
            print(f"Installing what '{stage}' needs into .venv (once) …", flush=True)
        ensure(root, stage)
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
