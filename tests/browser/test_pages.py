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
PATIENCE = 180_000  # milliseconds: a busy machine is slow, not wrong
WEIGHT = 1.5e6  # bytes of a page and all it loads, nothing cached, nothing compressed

# Raw TeX that was not set would still stand between these delimiters.
LEFT_OVER = r"""() => {
  const walker = document.createTreeWalker(document.querySelector('article') || document.body, 4);
  const found = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (parent.closest('pre, code, script, style, mjx-container, textarea')) continue;
    const text = walker.currentNode.data;
    if (/\\\(|\\\[|\\begin\{|\$\$/.test(text)) found.push(text);
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
PICTURES = """async () => {
  const wait = [...document.images].map((image) => {
    image.loading = 'eager';
    return image.decode().then(() => image.naturalWidth ? '' : image.src, () => image.src);
  });
  return (await Promise.all(wait)).filter(Boolean);
}"""


# axe looks at thirty thousand elements of a chapter one by one, for minutes; most are parts of
# equations and words of code. Equations are looked at on the short pages; on long ones a box of
# the same size stands for each. Of the words of one colour in code, the first few are kept.
THINNED = """() => {
  const equations = [...document.querySelectorAll('mjx-container')];
  const sizes = equations.map((one) => one.getBoundingClientRect());
  if (equations.length > 100) equations.forEach((one, i) => {
    one.replaceChildren('x');
    Object.assign(one.style, { display: 'inline-block', overflow: 'hidden' });
    Object.assign(one.style, { width: `${sizes[i].width}px`, height: `${sizes[i].height}px` });
  });
  const met = new Map();
  for (const word of document.querySelectorAll('pre span[class]')) {
    const key = word.className + !!word.closest('.cell_output') + !!word.closest('.admonition');
    met.set(key, (met.get(key) ?? 0) + 1);
    if (met.get(key) > 3 && !word.querySelector('a')) word.replaceWith(word.textContent);
  }
}"""


@dataclass
class Tab:
    """A page of the browser, and what has gone wrong on it since it was opened."""

    page: Any
    origin: str
    troubles: list[str] = field(default_factory=list)

    def listen(self) -> None:
        note = self.troubles.append
        self.page.on("pageerror", lambda error: note(f"script error: {error}"))
        self.page.on("requestfailed", lambda request: note(f"failed: {request.url}"))
        self.page.on("console", self.heard)
        self.page.on("request", self.asked)
        self.page.on("response", self.answered)

    def heard(self, said: Any) -> None:
        if said.type in ("error", "warning"):
            self.troubles.append(f"console {said.type}: {said.text}")

    def asked(self, request: Any) -> None:
        if not request.url.startswith((self.origin, "data:", "blob:")):
            self.troubles.append(f"external request: {request.url}")

    def answered(self, response: Any) -> None:
        if response.status >= 400:
            self.troubles.append(f"{response.status}: {response.url}")

    def visit(self, address: str) -> None:
        """Open a page and wait until its equations are set."""
        self.troubles.clear()
        self.page.goto(address, wait_until="load")
        self.page.evaluate("() => window.MathJax?.startup?.promise.then(() => 0)")
        self.page.wait_for_load_state("networkidle")


@contextmanager
def tab(browser: Any, served: Any, width: int = 1280, mode: str = "light") -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode)
    context.set_default_timeout(PATIENCE)
    try:
        one = Tab(context.new_page(), served.address.removesuffix("/book/"))
        one.listen()
        yield one
    finally:
        context.close()


def names(site: Path) -> list[str]:
    """Every page but the one that only leads on to the first."""
    every = [str(path.relative_to(site)) for path in sorted(site.rglob("*.html"))]
    return [name for name in every if name != "index.html"]


@pytest.fixture(scope="module")
def axe() -> str:
    package = importlib.resources.files("axe_playwright_python")
    return (package / "axe.min.js").read_text(encoding="utf-8")


def accessibility(page: Any, axe: str) -> list[str]:
    page.evaluate(THINNED)
    page.evaluate(axe)
    # Without preload: its own fetching of style sheets asks for addresses the page never uses.
    result = page.evaluate("() => axe.run(document, {resultTypes: ['violations'], preload: false})")
    return [
        f"axe {found['impact']}: {found['id']}: {found['nodes'][0]['html'][:160]}"
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("width", "mode"), VIEWS)
def test_pages_are_whole(
    browser: Any, served: Any, site: Path, axe: str, width: int, mode: str
) -> None:
    wrong: list[str] = []
    with tab(browser, served, width, mode) as one:
        for name in names(site):
            one.visit(served.address + name)
            count = one.page.evaluate(EQUATIONS)
            found = [
                *(f"wider than the page: {what}" for what in one.page.evaluate(SPILL)),
                *(f"raw TeX: {text[:80]}" for text in one.page.evaluate(LEFT_OVER)),
                *(f"picture not loaded: {src}" for src in one.page.evaluate(PICTURES)),
                *accessibility(one.page, axe),
                *one.troubles,
            ]
            if count["set"] < count["wanted"] or count["errors"]:
                found.append(f"equations: {count}")
            if one.page.evaluate("document.documentElement.dataset.theme") != mode:
                found.append(f"not in {mode} mode")
            wrong += [f"{name}: {what}" for what in found]
    assert not wrong, "\n".join(wrong)


def test_chapters_have_equations_and_pictures(browser: Any, served: Any, site: Path) -> None:
    with tab(browser, served) as one:
        for name in [n for n in names(site) if n.startswith("ch")]:
            one.visit(served.address + name)
            assert one.page.evaluate(EQUATIONS)["set"] > 20, name
            assert one.page.locator("article figure img").count() >= 2, name


def test_pages_are_light(browser: Any, served: Any, site: Path) -> None:
    weights = {}
    for name in names(site):
        with tab(browser, served) as one:
            before = served.sent
            one.visit(served.address + name)
            weights[name] = served.sent - before
    print({name: f"{weight / 1e6:.2f} MB" for name, weight in weights.items()})
    assert max(weights.values()) <= WEIGHT, weights


def test_resting_on_a_link_shows_what_it_leads_to(browser: Any, served: Any) -> None:
    with tab(browser, served) as one:
        one.visit(served.address + "ch01_softmax.html")
        link = one.page.locator('article a.reference.internal[href^="#eq"]').first
        link.scroll_into_view_if_needed()
        link.hover()
        preview = one.page.locator(".book-preview")
        preview.wait_for()
        assert preview.locator("mjx-container").count() >= 1
        box = preview.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 1280
        one.page.keyboard.press("Escape")
        assert preview.count() == 0
        one.page.keyboard.press("Tab")
        link.focus()
        preview.wait_for()
        assert link.get_attribute("aria-describedby") == "book-preview"
        assert not one.troubles


def test_a_preview_of_another_page_has_its_equations_set(browser: Any, served: Any) -> None:
    with tab(browser, served) as one:
        one.visit(served.address + "ch01_softmax.html")
        softmax = 'article a[href="reference.html#attn_lessons.softmax.softmax"]'
        link = one.page.locator(f"{softmax} >> visible=true").first
        link.scroll_into_view_if_needed()
        link.hover()
        one.page.locator(".book-preview mjx-container").first.wait_for()
        assert "\\(" not in one.page.locator(".book-preview").inner_text()
        assert not one.troubles


def test_names_in_code_cells_lead_to_the_reference(browser: Any, served: Any) -> None:
    with tab(browser, served) as one:
        one.visit(served.address + "ch01_softmax.html")
        names = 'div.cell a.sphinx-codeautolink-a[href^="reference.html#"]'
        assert "attn_lessons." in one.page.locator(names).first.get_attribute("href")


def test_a_folded_answer_opens(browser: Any, served: Any) -> None:
    with tab(browser, served, 390, "dark") as one:
        one.visit(served.address + "ch01_softmax.html")
        answer = one.page.locator("div.admonition.toggle").first
        answer.scroll_into_view_if_needed()
        body = answer.locator("p").nth(1)
        assert not body.is_visible()
        answer.locator("button, .admonition-title").last.click()
        body.wait_for(state="visible")


def test_the_link_into_jupyterlab_shows_where_there_is_one(browser: Any, served: Any) -> None:
    outside = served.address.replace("/book/", "/")
    for address, shown in [(served.address, True), (outside, False)]:
        with tab(browser, served) as one:
            one.visit(address + "ch01_softmax.html")
            link = one.page.locator(".exercise-links a.lab-only").first
            assert link.get_attribute("href") == "../lab/tree/ch01_softmax.ipynb"
            assert link.is_visible() == shown


def test_search_finds_a_word(browser: Any, served: Any) -> None:
    with tab(browser, served) as one:
        one.visit(served.address + "search.html?q=logsumexp")
        one.page.locator("#search-results li").first.wait_for()
        assert not one.troubles


def test_the_header_menu_opens_and_closes(browser: Any, served: Any) -> None:
    with tab(browser, served) as one:
        one.visit(served.address + "intro.html")
        button = one.page.locator('[data-bs-toggle="dropdown"]').first
        menu = one.page.locator(".dropdown-menu").first
        button.focus()
        one.page.keyboard.press("Enter")
        menu.wait_for()
        assert button.get_attribute("aria-expanded") == "true"
        one.page.keyboard.press("Escape")
        menu.wait_for(state="hidden")
        assert not one.troubles
