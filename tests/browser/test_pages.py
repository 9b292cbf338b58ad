"""Every built page in a real browser: wide and narrow, light and dark."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("book")]
VIEWS = [(width, mode) for width in (1280, 390) for mode in ("light", "dark")]
WEIGHT = 1.5e6  # bytes of a page and all it loads, nothing cached, nothing compressed

# Raw TeX that was not set would still stand between these delimiters.
LEFT_OVER = r"""() => {
  const walker = document.createTreeWalker(document.querySelector('article') || document.body, 4);
  const found = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (parent.closest('pre, code, script, style, mjx-container, textarea')) continue;
    if (/\\\(|\\\[|\\begin\{|\$\$/.test(walker.currentNode.data)) found.push(walker.currentNode.data);
  }
  return found;
}"""
EQUATIONS = """() => ({
  wanted: document.querySelectorAll('article .math').length,
  set: document.querySelectorAll('article .math mjx-container').length,
  errors: [...document.querySelectorAll('mjx-merror, [data-mml-node="merror"]')].length,
})"""
SPILL = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  return [...document.querySelectorAll('article *, footer *')]
    .filter((node) => node.getBoundingClientRect().right > width + 1)
    .map((node) => node.tagName + '.' + node.className).slice(0, 5);
}"""
PICTURES = """() => [...document.images]
  .filter((image) => !(image.complete && image.naturalWidth > 0)).map((image) => image.src)"""


@dataclass
class Seen:
    """What went wrong while a page was open, and what it loaded."""

    troubles: list[str] = field(default_factory=list)
    bytes: int = 0


@contextmanager
def opened(browser: Any, address: str, width: int, mode: str) -> Iterator[tuple[Any, Seen]]:
    """A page in a context of its own, finished with its equations."""
    seen = Seen()
    origin = address.split("/book/")[0]
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode)

    def guard(route: Any) -> None:
        if route.request.url.startswith((origin, "data:", "blob:")):
            route.continue_()
        else:
            seen.troubles.append(f"external request: {route.request.url}")
            route.abort()

    def weigh(response: Any) -> None:
        if response.status >= 400:
            seen.troubles.append(f"{response.status}: {response.url}")
        elif response.status == 200:
            seen.bytes += len(response.body())

    try:
        page = context.new_page()
        page.route("**/*", guard)
        page.on("response", weigh)
        page.on("requestfailed", lambda request: seen.troubles.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: seen.troubles.append(f"script error: {error}"))
        page.on(
            "console",
            lambda said: (
                seen.troubles.append(f"console {said.type}: {said.text}")
                if said.type in ("error", "warning")
                else None
            ),
        )
        page.goto(address, wait_until="networkidle")
        page.evaluate("() => window.MathJax?.startup?.promise")
        page.wait_for_load_state("networkidle")
        yield page, seen
    finally:
        context.close()


def names(site: Path) -> list[str]:
    return [str(path.relative_to(site)) for path in sorted(site.rglob("*.html"))]


@pytest.fixture(scope="module")
def axe() -> str:
    package = importlib.resources.files("axe_playwright_python")
    return (package / "axe.min.js").read_text(encoding="utf-8")


def accessibility(page: Any, axe: str) -> list[str]:
    page.evaluate(axe)
    result = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [
        f"axe {found['impact']}: {found['id']}: {found['nodes'][0]['html'][:160]}"
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("width", "mode"), VIEWS)
def test_pages_are_whole(
    browser: Any, served: str, site: Path, axe: str, width: int, mode: str
) -> None:
    wrong: list[str] = []
    for name in names(site):
        with opened(browser, served + name, width, mode) as (page, seen):
            count = page.evaluate(EQUATIONS)
            found = [
                *seen.troubles,
                *accessibility(page, axe),
                *(f"wider than the page: {what}" for what in page.evaluate(SPILL)),
                *(f"raw TeX: {text[:80]}" for text in page.evaluate(LEFT_OVER)),
                *(f"picture not loaded: {src}" for src in page.evaluate(PICTURES)),
            ]
            if count["set"] < count["wanted"] or count["errors"]:
                found.append(f"equations: {count}")
            if page.evaluate("document.documentElement.dataset.theme") != mode:
                found.append(f"not in {mode} mode")
            wrong += [f"{name}: {what}" for what in found]
    assert not wrong, "\n".join(wrong)


def test_chapters_have_equations_and_pictures(browser: Any, served: str, site: Path) -> None:
    for name in [n for n in names(site) if n.startswith("ch")]:
        with opened(browser, served + name, 1280, "light") as (page, _):
            assert page.evaluate(EQUATIONS)["set"] > 20, name
            assert page.locator("article figure img").count() >= 2, name


def test_pages_are_light(browser: Any, served: str, site: Path) -> None:
    weights = {}
    for name in names(site):
        with opened(browser, served + name, 1280, "light") as (_, seen):
            weights[name] = seen.bytes
    print({name: f"{weight / 1e6:.2f} MB" for name, weight in weights.items()})
    assert max(weights.values()) <= WEIGHT, weights


def test_resting_on_a_link_shows_what_it_leads_to(browser: Any, served: str) -> None:
    with opened(browser, served + "ch01_softmax.html", 1280, "light") as (page, seen):
        link = page.locator('article a.reference.internal[href^="#eq"]').first
        link.scroll_into_view_if_needed()
        link.hover()
        preview = page.locator(".book-preview")
        preview.wait_for(timeout=5000)
        assert preview.locator("mjx-container").count() >= 1
        box = preview.bounding_box()
        assert 0 <= box["x"]
        assert box["x"] + box["width"] <= 1280
        page.keyboard.press("Escape")
        assert preview.count() == 0
        page.keyboard.press("Tab")
        link.focus()
        preview.wait_for(timeout=5000)
        assert link.get_attribute("aria-describedby") == "book-preview"
        assert not seen.troubles


def test_names_in_code_cells_lead_to_the_reference(browser: Any, served: str) -> None:
    with opened(browser, served + "ch01_softmax.html", 1280, "light") as (page, _):
        link = page.locator('div.cell a.sphinx-codeautolink-a[href^="reference.html#"]').first
        assert "attn_lessons." in link.get_attribute("href")


def test_a_folded_answer_opens(browser: Any, served: str) -> None:
    with opened(browser, served + "ch01_softmax.html", 390, "dark") as (page, _):
        answer = page.locator("div.admonition.toggle").first
        answer.scroll_into_view_if_needed()
        body = answer.locator("p").nth(1)
        assert not body.is_visible()
        answer.locator("button, .admonition-title").last.click()
        body.wait_for(state="visible", timeout=5000)


def test_the_link_into_jupyterlab_shows_where_there_is_one(
    browser: Any, served: str, site: Path
) -> None:
    link = ".exercise-links a.lab-only"
    with opened(browser, served + "ch01_softmax.html", 1280, "light") as (page, _):
        assert page.locator(link).first.is_visible()
    outside = served.replace("/book/", "/")
    with opened(browser, outside + "ch01_softmax.html", 1280, "light") as (page, _):
        assert not page.locator(link).first.is_visible()


def test_search_finds_a_word(browser: Any, served: str) -> None:
    with opened(browser, served + "search.html?q=logsumexp", 1280, "light") as (page, seen):
        page.locator("#search-results li").first.wait_for(timeout=10000)
        assert not seen.troubles
