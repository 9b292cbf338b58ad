"""Makes each page light: spans that colour nothing, scripts nobody runs, pictures with few colours.

Together about 0.8 MB of a chapter. Every step leaves a page that it has already been over as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image
from sphinx.application import Sphinx

# Names, punctuation and space have the colour that code has anyway, in both modes. Operators, every
# dot and equals sign among them, would have that of strings: 50 kB in a long chapter.
PLAIN_SPAN = re.compile(r'<span class="[npwo]">([^<]*)</span>')
# The theme needs these on every page only to search while one types, which is off.
SEARCH_SCRIPT = re.compile(
    r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>'
)
TABS_SCRIPT = re.compile(r'\s*<script src="[^"]*design-tabs\.js[^"]*"></script>')
# A name's full path, which is in the link, and in its preview.
LINK_TITLE = re.compile(r'(<a class="sphinx-codeautolink-a" href="[^"]*") title="[^"]*"')
PICTURE = re.compile(r'<img (?![^>]*loading=)(?=[^>]*src="([^"]*_images/[^"]+\.png)")')


def sized(page: Path, match: re.Match[str]) -> str:
    """Fetched when it comes near, with its size, so that the text does not jump when it does."""
    with Image.open((page.parent / match[1]).resolve()) as picture:
        width, height = picture.size
    tag = match[0]
    whole = match.string[match.start() : match.string.index(">", match.start())]
    size = "" if re.search(r"\b(width|style)=", whole) else f'width="{width}" height="{height}" '
    return f'{tag}loading="lazy" {size}'


def lighten_page(page: Path) -> None:
    before = text = page.read_text(encoding="utf-8")
    text = PLAIN_SPAN.sub(r"\1", text)
    text = LINK_TITLE.sub(r"\1", text)
    if page.name != "search.html":
        text = SEARCH_SCRIPT.sub("", text)
    if "sd-tab-set" not in text:
        text = TABS_SCRIPT.sub("", text)
    text = PICTURE.sub(lambda match: sized(page, match), text)
    if text != before:
        page.write_text(text, encoding="utf-8")


def lighten_picture(path: Path) -> None:
    """256 colours are more than a figure has; kept only where that is smaller."""
    with Image.open(path) as picture:
        if picture.mode == "P":
            return
        flat = Image.new("RGB", picture.size, "white")
        flat.paste(picture.convert("RGB"), mask=picture.convert("RGBA").getchannel("A"))
    few = flat.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    part = path.with_suffix(".part")
    few.save(part, format="PNG", optimize=True)
    if part.stat().st_size < path.stat().st_size:
        part.replace(path)
    else:
        part.unlink()


def lighten_site(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    site = Path(app.outdir)
    for picture in (site / "_images").glob("*.png"):
        lighten_picture(picture)
    for page in site.rglob("*.html"):
        lighten_page(page)


def setup(app: Sphinx) -> None:
    app.connect("build-finished", lighten_site, priority=600)
