"""The book: it builds without a warning, its links lead somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import built
import pytest

from attn_lessons import bookbuild
from attn_lessons.grading import catalogue

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("book")


@pytest.fixture(scope="session")
def site() -> Path:
    return built.site()


# --- the pages --------------------------------------------------------------------------------


def test_every_internal_link_leads_somewhere(site: Path) -> None:
    wrong = [
        f"{link.page.relative_to(site)}: {why}"
        for link in built.links(site)
        if (why := built.broken(site, link))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_link_checker_sees_broken_links(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<article id="top"><a href="#top">1</a><a href="#gone">2</a><a href="b.html">3</a>'
        '<img src="a.png"><a href="https://example.org/">4</a></article>'
    )
    why = [built.broken(tmp_path, link) for link in built.links(tmp_path)]
    assert [bool(w) for w in why] == [False, True, True, True, False]


def test_every_section_that_a_mistake_names_exists(site: Path) -> None:
    wrong = [
        f"{exercise.id}, {mistake.name}: {mistake.section}"
        for exercise in catalogue.exercises()
        for mistake in exercise.mistakes
        if built.broken(site, built.Link(site / "intro.html", "a", mistake.section))
    ]
    assert not wrong, "\n".join(wrong)


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    outside = [
        f"{path.relative_to(site)}: {url}"
        for path, url in built.loads(site)
        if re.match(r"(https?:)?//", url)
    ]
    assert not outside, "\n".join(outside)


def test_what_the_pages_load_is_there(site: Path) -> None:
    missing = [
        f"{path.relative_to(site)}: {url}"
        for path, url in built.loads(site)
        if not url.startswith(("data:", "#"))
        and not (path.parent / url.split("?")[0].split("#")[0]).exists()
    ]
    assert not missing, "\n".join(missing)


def test_every_picture_says_in_words_what_it_shows(site: Path) -> None:
    poor = [
        f"{path.name}: {image.get('src')}: {image.get('alt')!r}"
        for path in built.pages(site)
        if "_modules" not in path.parts and path.name != "index.html"
        for image in built.page(path).select("article img")
        if len(alt := str(image.get("alt") or "")) < 25 or re.search(r"\.(png|svg)$|_images/", alt)
    ]
    assert not poor, "\n".join(poor)


def test_every_cell_ran(site: Path) -> None:
    for path in built.chapters(site):
        source = (ROOT / "book" / path.name).with_suffix(".md").read_text(encoding="utf-8")
        cells = re.findall(r"^```\{code-cell\}.*?^```$", source, re.M | re.S)
        hidden = [cell for cell in cells if "remove-cell" in cell]
        assert len(built.page(path).select("div.cell")) == len(cells) - len(hidden) > 0, path.name
        shown = built.page(path).select(".cell_output .traceback, .cell_output .stderr")
        # A check that fails on purpose says so in its tags.
        assert not [s for s in shown if not s.find_parent(class_="tag_raises-exception")], path.name
    assert not list((site / "reports").glob("*")), "a cell failed"


def test_notebooks_to_download_are_the_exercises(site: Path) -> None:
    released = sorted((ROOT / "exercises").glob("ch*.ipynb"))
    assert released
    for notebook in released:
        assert (site / "exercises" / notebook.name).read_bytes() == notebook.read_bytes()
        chapter = built.page(site / f"{notebook.stem}.html")
        linked = [a["href"] for a in chapter.select(".exercise-links a")]
        assert f"exercises/{notebook.name}" in linked
        assert f"../lab/tree/{notebook.name}" in linked


def test_the_reference_shows_every_public_function(site: Path) -> None:
    places = built.ids(site / "reference.html")
    for name in ("softmax", "gradcheck"):
        module = __import__(f"attn_lessons.{name}", fromlist=["_"])
        public = getattr(module, "__all__", None) or [
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_") and value.__module__ == module.__name__
        ]
        missing = [key for key in public if f"attn_lessons.{name}.{key}" not in places]
        assert public
        assert not missing, f"{name}: {missing}"


def test_nothing_on_the_pages_points_at_an_unknown_repository(site: Path) -> None:
    if any(os.environ.get(name) for name in bookbuild.VARIABLES):
        pytest.skip("the environment names a repository")
    hosts = {"github.com/executablebooks", "mybinder.org", "colab.research.google.com", "unpkg.com"}
    for path in built.pages(site):
        text = path.read_text(encoding="utf-8")
        assert not [host for host in hosts if host in text], path.name


def test_pictures_are_those_the_script_draws() -> None:
    spec = importlib.util.spec_from_file_location(
        "pictures", ROOT / "book" / "_ext" / "pictures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module
    spec.loader.exec_module(module)
    for name, text in module.pictures().items():
        kept = (ROOT / "book" / "_static" / name).read_text(encoding="utf-8")
        assert kept == text, f"{name}: run python book/_ext/pictures.py"
    assert module.written() == {int(p.stem[2:4]) for p in (ROOT / "book").glob("ch[0-9]*.md")}


# --- building ---------------------------------------------------------------------------------

HEAD = """---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
LINKED = """
```{eval-rst}
.. py:module:: attn_lessons
.. py:data:: VALUE
```
"""
GOOD = """# One

$$ y = z $$ (eq-one)

By {eq}`eq-one`:

```{code-cell}
import attn_lessons
print("library says", attn_lessons.VALUE)
```
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A project of one page, the real configuration and extension, and a library of one line."""
    book = tmp_path / "book"
    shutil.copytree(ROOT / "book" / "_ext", book / "_ext", ignore=shutil.ignore_patterns("__py*"))
    shutil.copytree(ROOT / "book" / "_static", book / "_static")
    shutil.copyfile(ROOT / "_config.yml", tmp_path / "_config.yml")
    (book / "references.bib").write_text("")
    (book / "_toc.yml").write_text("format: jb-book\nroot: intro\n")
    (book / "intro.md").write_text(HEAD + GOOD + LINKED)
    (tmp_path / "exercises").mkdir()
    (tmp_path / "attn_lessons").mkdir()
    (tmp_path / "attn_lessons" / "__init__.py").write_text("VALUE = 1\n")
    return tmp_path


def plain_build(project: Path) -> subprocess.CompletedProcess[str]:
    """The command of the README, as anyone would type it."""
    main = "from jupyter_book.cli.main import main; main()"
    options = ["build", "book", "--config", "_config.yml", "-W", "--keep-going"]
    return subprocess.run(
        [sys.executable, "-c", main, *options],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_changed_library_makes_the_page_run_again(tiny: Path) -> None:
    html = tiny / "_build" / "html" / "intro.html"  # beside the _config.yml, unless told otherwise
    first = plain_build(tiny)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "library says 1" in html.read_text()
    assert "sphinx-codeautolink-a" in html.read_text()
    (tiny / "attn_lessons" / "__init__.py").write_text("VALUE = 2\n")
    again = plain_build(tiny)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "library says 2" in html.read_text()
    assert "sphinx-codeautolink-a" in html.read_text(), "the names in code lost their links"


def test_a_failing_cell_fails_the_build_every_time(tiny: Path) -> None:
    (tiny / "book" / "intro.md").write_text(HEAD + GOOD.replace("VALUE", "GONE"))
    for attempt in (1, 2):
        result = plain_build(tiny)
        assert result.returncode != 0, f"attempt {attempt} passed"
        assert "Executing notebook failed" in result.stderr


def test_a_warning_fails_the_build_every_time(tiny: Path) -> None:
    (tiny / "book" / "intro.md").write_text(HEAD + GOOD.replace("`eq-one`", "`eq-two`"))
    for attempt in (1, 2):
        result = plain_build(tiny)
        assert result.returncode != 0, f"attempt {attempt} passed"
        assert "eq-two" in result.stderr


def test_build_shows_a_line_a_page_and_then_has_nothing_to_do(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookbuild, "ROOT", tiny)
    monkeypatch.setenv("PYTHONPATH", str(tiny))
    lines: list[str] = []
    out = bookbuild.build(progress=lines.append)
    assert (out / "intro.html").exists()
    assert [line for line in lines if re.fullmatch(r"\[1/1\] intro: ran in [\d.]+ s", line)]
    assert bookbuild.is_fresh()
    lines.clear()
    assert bookbuild.build(progress=lines.append) == out
    assert lines == [f"The book is up to date: {out}"]
    (tiny / "exercises" / "ch01_x.ipynb").write_text("{}")
    assert not bookbuild.is_fresh()


def test_build_says_why_it_failed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookbuild, "ROOT", tiny)
    monkeypatch.setenv("PYTHONPATH", str(tiny))
    (tiny / "book" / "intro.md").write_text(HEAD + GOOD.replace("VALUE", "GONE"))
    with pytest.raises(bookbuild.BookError, match="GONE") as failure:
        bookbuild.build(progress=None)
    message = str(failure.value)
    assert "book/intro.md" in message
    assert "\x1b" not in message
    assert not bookbuild.is_fresh()


def test_without_the_sources_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookbuild, "ROOT", tmp_path)
    with pytest.raises(bookbuild.BookError, match=r"_config\.yml is missing"):
        bookbuild.build(progress=None)
    assert not list(tmp_path.iterdir())


def test_a_known_repository_fills_the_links(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookbuild, "ROOT", tiny)
    monkeypatch.setenv("PYTHONPATH", str(tiny))
    monkeypatch.setenv("ATTN_REPOSITORY_URL", "https://github.com/owner/name.git")
    monkeypatch.setenv("ATTN_BRANCH", "v1")
    (tiny / "exercises" / "ch01_x.ipynb").write_text("{}")
    links = "\n```{exercise-links} ch01_x\n```\n"
    (tiny / "book" / "intro.md").write_text(HEAD + GOOD + links)
    html = bookbuild.build(progress=None) / "intro.html"
    found = {a.get_text(): a["href"] for a in built.page(html).select(".exercise-links a")}
    assert found == {
        "Open in JupyterLab": "../lab/tree/ch01_x.ipynb",
        "Download the notebook": "exercises/ch01_x.ipynb",
        "Open in Colab": "https://colab.research.google.com/github/owner/name/blob/v1/"
        "exercises/ch01_x.ipynb",
        "Open in Binder": "https://mybinder.org/v2/gh/owner/name/v1"
        "?labpath=exercises%2Fch01_x.ipynb",
    }
    assert 'href="https://github.com/owner/name"' in html.read_text()
