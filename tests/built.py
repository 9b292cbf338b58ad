"""The built book as the tests read it: its pages, their ids and what they link to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup, Tag

from attn_lessons import bookbuild

LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data"}
LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}
CSS_URL = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


@cache
def attempt() -> Path | bookbuild.BookError:
    """Built once; when that fails, every test that wants the pages is told why, at once."""
    try:
        return bookbuild.build(progress=None)
    except bookbuild.BookError as error:
        return error


def site() -> Path:
    """The folder of the pages; built when it is not there or not fresh, warnings as errors."""
    result = attempt()
    if isinstance(result, bookbuild.BookError):
        pytest.fail(str(result), pytrace=False)
    return result


@cache
def page(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(root: Path) -> list[Path]:
    return sorted(root.rglob("*.html"))


def chapters(root: Path) -> list[Path]:
    return sorted(root.glob("ch[0-9][0-9]_*.html"))


@cache
def ids(path: Path) -> frozenset[str]:
    named = page(path).find_all(lambda tag: tag.get("id") or tag.get("name"))
    return frozenset(str(tag[key]) for tag in named for key in ("id", "name") if tag.get(key))


@dataclass(frozen=True)
class Link:
    """One reference of a page, as written."""

    page: Path
    tag: str
    target: str


def links(root: Path) -> Iterator[Link]:
    """Everything a reader can follow and everything a page loads."""
    for path in pages(root):
        for tag in page(path).find_all(True):
            for key in ("href", "src", "data"):
                if tag.get(key) and not tag.name.startswith("mjx"):
                    yield Link(path, tag.name, str(tag[key]))


def broken(root: Path, link: Link) -> str | None:
    """Why a link inside the site leads nowhere; None when it leads somewhere or outside."""
    parts = urlsplit(link.target)
    if parts.scheme or parts.netloc or link.target.startswith("data:"):
        return None
    where = unquote(parts.path)
    target = (link.page.parent / where).resolve() if where else link.page
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(root.resolve()):
        return None if "/lab/tree/" in where else f"{link.target} leaves the site"
    if not target.exists():
        return f"{link.target}: no such file"
    fragment = unquote(parts.fragment)
    if fragment and target.suffix == ".html" and fragment not in ids(target):
        return f"{link.target}: no such place on the page"
    return None


def loads(root: Path) -> Iterator[tuple[Path, str]]:
    """What the pages and style sheets make a browser fetch by themselves."""
    for path in pages(root):
        for tag in page(path).find_all([*LOADED, "link"]):
            if tag.name == "link":
                if LOADING_LINKS & {str(word) for word in tag.get("rel") or ()}:
                    yield path, str(tag["href"])
            elif tag.get(LOADED[tag.name]):
                yield path, str(tag[LOADED[tag.name]])
    for sheet in root.rglob("*.css"):
        for url, imported in CSS_URL.findall(sheet.read_text(encoding="utf-8")):
            yield sheet, url or imported


def article(path: Path) -> Tag:
    found = page(path).find("article")
    assert isinstance(found, Tag), f"{path.name} has no article"
    return found
