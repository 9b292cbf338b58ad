"""Takes the README's picture: a named mistake in JupyterLab, and the book's page it leads to.

Run as ``python docs/picture.py``; it starts the real thing, types a wrong answer and photographs
what comes back. Needs a Chromium on the path.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import lab  # noqa: E402

PICTURE = ROOT / "docs" / "picture.png"
CHAPTER = "ch01_softmax"
EXERCISE = "softmax_backward"
SECTION = f"{CHAPTER}.html#ch01-backward"
WRONG = """def softmax_backward(dp, p, axis=-1):
    return p * dp"""
WIDTH, HEIGHT, GAP = 800, 940, 24
COLOURS = 128


def of_lab(browser: Browser, address: str, workspace: Path) -> Image.Image:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    notebook = lab.Notebook(page, address, f"{CHAPTER}.ipynb")
    file = workspace / f"{CHAPTER}.ipynb"
    answer, check = (lab.position(file, role, EXERCISE) for role in ("answer", "check"))
    for index, cell in enumerate(lab.code_cells(file)[:answer]):
        if cell["metadata"].get("attn", {}).get("role") == "given":
            notebook.run(index)
    notebook.type(answer, WRONG)
    notebook.run(answer)
    notebook.run(check)
    page.keyboard.press("ControlOrMeta+B")  # no file browser: the notebook has the width
    page.wait_for_timeout(1500)
    notebook.cell(answer).evaluate("cell => cell.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(1500)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def of_book(browser: Browser, address: str) -> Image.Image:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    while not page.request.get(f"{address}_status").json()["ready"]:
        time.sleep(1)
    page.goto(address + SECTION)
    page.locator("mjx-container").last.wait_for(timeout=120_000)
    page.goto(address + SECTION)  # once more to the section, now that equations have their height
    page.add_style_tag(content="#pst-back-to-top { display: none !important }")
    page.wait_for_timeout(1500)
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both on grey, each with a thin line around it."""
    both = Image.new("RGB", (2 * WIDTH + 3 * GAP, HEIGHT + 2 * GAP), "#e8eaed")
    frame = ImageDraw.Draw(both)
    for at, picture in ((GAP, left), (2 * GAP + WIDTH, right)):
        both.paste(picture, (at, GAP))
        frame.rectangle((at - 1, GAP - 1, at + WIDTH, GAP + HEIGHT), outline="#9aa0a6")
    return both.quantize(COLOURS, dither=Image.Dither.NONE)


def main() -> None:
    path = lab.browser()
    if path is None:
        raise SystemExit("no Chromium on the path")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        workspace = Path(folder) / "workspace"
        browser = playwright.chromium.launch(executable_path=path, args=lab.FLAGS)
        with lab.started(workspace, 8888) as (address, book):
            left = of_lab(browser, address, workspace)
            right = of_book(browser, book)
        browser.close()
    side_by_side(left, right).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
