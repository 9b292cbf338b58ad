"""The repository is as its papers say: floors, documents, commands, and what the wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]


PACKAGE = ROOT / "attn_lessons"


def modules() -> list[str]:
    """Every module of the package, without the package's name: ``grading.check``."""
    files = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    parts = (p.parts[:-1] if p.name == "__init__" else p.parts for p in files)
    return sorted(".".join(p) for p in parts if p)


def room(module: str) -> str:
    """A module as a path below the package: ``grading/check.py``, ``grading/``."""
    file = module.replace(".", "/") + ".py"
    return file if (PACKAGE / file).exists() else module.replace(".", "/") + "/"


def in_layers(contract: dict[str, list[str]]) -> set[str]:
    return {name.strip(" ()") for line in contract["layers"] for name in re.split(r"[|:]", line)}


def directly_in(container: str) -> set[str]:
    inside_it = container.removeprefix("attn_lessons").lstrip(".")
    depth = inside_it.count(".") + 1 if inside_it else 0
    return {m.split(".")[depth] for m in modules() if m.startswith(inside_it) and m != inside_it}


# ------------------------------------------------------------------------------------ floors


LINT = "from importlinter.cli import lint_imports_command as command; command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_floors() -> None:
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout


def test_floors_are_complete() -> None:
    """No module is without a floor, and no floor names a module that is gone."""
    layers = [contract for contract in CONTRACTS if contract["type"] == "layers"]
    assert [each["containers"] for each in layers] == [["attn_lessons"], ["attn_lessons.grading"]]
    for contract in layers:
        assert contract["exhaustive"]
        assert in_layers(contract) == directly_in(*contract["containers"])


def test_a_wrong_import_would_be_found(tmp_path: Path) -> None:
    """The contracts bite: an upward import in a copy of the package breaks them."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "attn_lessons", tmp_path / "attn_lessons")
    with (tmp_path / "attn_lessons" / "softmax.py").open("a") as module:
        module.write("\nimport attn_lessons.grading.records\nimport torch\n")
    linted = lint(tmp_path)
    assert linted.returncode == 1
    assert "Floors: imports go down only BROKEN" in linted.stdout
    assert "The mathematics is NumPy BROKEN" in linted.stdout


# ----------------------------------------------------------------------------------- papers


def test_the_architecture_has_a_sentence_for_every_room() -> None:
    described = set(re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "ARCHITECTURE.md").read_text()))
    inner = ("grading.catalogue.", "grading.reports.")
    assert {room(m) for m in modules() if not m.startswith(inner)} - described == set()
    gone = {name for name in described if not (PACKAGE / name).exists()}
    assert {name for name in gone if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("paper", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"])
def test_relative_links_lead_somewhere(paper: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / paper).read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def commands(paper: str) -> set[tuple[str, ...]]:
    """Every command in the code blocks and code spans of a paper, as words."""
    text = (ROOT / paper).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    return {tuple(line.split("#")[0].split()) for line in lines if line.split("#")[0].strip()}


@pytest.mark.parametrize("paper", ["README.md", "CONTRIBUTING.md"])
def test_commands_that_papers_name_exist(paper: str) -> None:
    from typer.main import get_command

    from attn_lessons.cli import app

    named = commands(paper)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in named if words[0] == "make" and len(words) > 1} <= targets
    group = get_command(app)
    known = set(group.commands)  # type: ignore[attr-defined]
    ours = {
        words[i + 1 :]
        for words in named
        for i, word in enumerate(words)
        if word.endswith("attn-lessons") and i < 2 and len(words) > i + 1
    }
    assert {words[0] for words in ours} <= known
    for words in ours:
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        options = {name for parameter in command.params for name in parameter.opts}
        given = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        assert given <= options, f"{paper}: {' '.join(words)}"


def test_the_readme_is_for_a_fresh_machine() -> None:
    named = commands("README.md")
    assert ("make", "start") in named
    assert ("make", "test") in named
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(pictures) == 1
    (alt, file), *_ = pictures
    assert len(alt) > 40
    assert (ROOT / file).stat().st_size <= 300_000


def test_versions_agree() -> None:
    from attn_lessons import __version__

    version = PROJECT["project"]["version"]
    assert __version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_every_pin_is_exact_and_torch_is_the_one_the_book_was_made_with() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", pin)] == []
    assert "torch==2.13.0" in pins
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(line for lines in extras for line in lines)]
    names = {re.split(r"[\[><=!~; ]", line)[0].lower() for line in wanted}
    assert names - pinned == {PROJECT["project"]["name"]}


# ------------------------------------------------------------------------------------ wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in this process, from what is installed: no network."""
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)


def test_the_wheel_carries_exercises_and_book(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    carried = {name.partition("_project/")[2] for name in names if "_project/" in name}
    wanted_in = {
        "exercises": "ch*.ipynb",
        "book": "*.*",
        "benchmarks/results": "*.json",
    }
    for folder, pattern in wanted_in.items():
        wanted = {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)}
        assert wanted
        assert wanted <= carried
    assert "_config.yml" in carried
    assert not any("_build" in name or "/tests/" in name for name in names)
    assert not any("solutions/" in name for name in names)
    assert {f"attn_lessons/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")} <= names


def test_an_installed_wheel_finds_its_exercises(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "from attn_lessons import _paths, start; from pathlib import Path;"
        "print(_paths.__file__); print(*start.copy_exercises(_paths.exercises_dir(), Path('w')));"
        "root = start.book_root(Path('state')); print(root / '_config.yml')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    source, copied, config = ran.stdout.splitlines()
    assert source.startswith(str(tmp_path))
    assert copied.split() == sorted(path.name for path in (ROOT / "exercises").glob("ch*.ipynb"))
    staged = (tmp_path / config).parent
    assert (staged / "attn_lessons" / "softmax.py").exists()
    assert (staged / "book" / "intro.md").exists()
