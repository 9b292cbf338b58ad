"""Draws the book's own pictures: logo, favicon, cover and the map of the chapters.

``python book/_ext/pictures.py`` writes them to ``book/_static``; a test holds both together. All
are plain SVG on white, in the figures' colours; the style sheet inverts them in dark mode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attn_lessons.softmax import softmax, softmax_backward

BOOK = Path(__file__).resolve().parents[1]
BLUE, RED, INK, GREY, LINE = "#0072B2", "#D55E00", "#222222", "#595959", "#8a8a8a"
FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"'
SERIF = 'font-family="Georgia, Times, serif" font-style="italic"'


@dataclass(frozen=True)
class Chapter:
    """Where a chapter stands on the map, and the chapters it builds on."""

    number: int
    name: str
    row: int
    column: float
    needs: tuple[int, ...] = ()


CHAPTERS = (
    Chapter(1, "Softmax", 0, 0.5),
    Chapter(2, "Gradient checks", 0, 1.5, (1,)),
    Chapter(3, "Attention", 1, 0.5, (1, 2)),
    Chapter(9, "RNN and LSTM", 1, 1.5, (2,)),
    Chapter(4, "Multi-head", 2, 0, (3,)),
    Chapter(12, "Memory", 2, 1, (3,)),
    Chapter(10, "Streaming", 2, 2, (3, 9)),
    Chapter(5, "Positions", 3, 0, (4,)),
    Chapter(13, "FlashAttention", 3, 1, (12,)),
    Chapter(11, "Control", 3, 2, (10,)),
    Chapter(6, "Norm, residual", 4, 0, (5,)),
    Chapter(17, "Parallel", 4, 1, (13,)),
    Chapter(15, "Sparse", 4, 2, (13,)),
    Chapter(7, "Encoder", 5, 0, (6,)),
    Chapter(8, "Training", 6, 0, (7,)),
    Chapter(16, "Compilers", 6, 1, (7,)),
    Chapter(14, "Mixed precision", 7, 0, (8,)),
    Chapter(18, "The interview", 7, 1.5),
)
WIDTH, BOX, GAP, HIGH, STEP, TOP, DEEP = 360, 112, 12, 40, 63, 4, 490


def written() -> set[int]:
    """The chapters of this edition: those the table of contents lists."""
    contents = (BOOK / "_toc.yml").read_text(encoding="utf-8")
    return {int(number) for number in re.findall(r"file: ch(\d\d)_", contents)}


def svg(width: float, height: float, body: list[str], title: str = "") -> str:
    label = f'role="img" aria-label="{title}"' if title else 'aria-hidden="true"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" {label}>',
            *body,
            "</svg>\n",
        ]
    )


def corner(chapter: Chapter) -> tuple[float, float]:
    return chapter.column * (BOX + GAP), TOP + chapter.row * STEP


def arrow(start: Chapter, end: Chapter) -> str:
    (x0, y0), (x1, y1) = corner(start), corner(end)
    if start.row == end.row:
        x0, y0, y1 = x0 + BOX, y0 + HIGH / 2, y1 + HIGH / 2
        path = f"M{x0:g} {y0:g}H{x1 - 1:g}"
    else:
        x0, x1, y0 = x0 + BOX / 2, x1 + BOX / 2, y0 + HIGH
        x1 += 18 * np.sign(x0 - x1)
        bend = (y1 - y0) / 2
        path = f"M{x0:g} {y0:g}C{x0:g} {y0 + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1 - 1:g}"
    return f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.3" marker-end="url(#a)"/>'


def box(chapter: Chapter, done: bool) -> list[str]:
    x, y = corner(chapter)
    fill, stroke, ink, dash = (
        (BLUE, BLUE, "#fff", "") if done else ("#fff", LINE, GREY, ' stroke-dasharray="4 3"')
    )
    middle = x + BOX / 2
    return [
        f'<rect x="{x + 0.75:g}" y="{y:g}" width="{BOX - 1.5:g}" height="{HIGH}" rx="6" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.3"{dash}/>',
        f'<text x="{middle:g}" y="{y + 16:g}" text-anchor="middle" font-size="11.5" fill="{ink}" '
        f'font-weight="600">{chapter.number}</text>',
        f'<text x="{middle:g}" y="{y + 31:g}" text-anchor="middle" font-size="13" fill="{ink}">'
        f"{chapter.name}</text>",
    ]


def chapter_map() -> str:
    """Boxes for chapters, an arrow from each to those that use it."""
    done = written()
    by_number = {chapter.number: chapter for chapter in CHAPTERS}
    body = [
        f'<rect width="{WIDTH}" height="{DEEP}" fill="#fff"/>',
        f"<g {FONT}>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
    ]
    body += [arrow(by_number[n], chapter) for chapter in CHAPTERS for n in chapter.needs]
    for chapter in CHAPTERS:
        body += box(chapter, chapter.number in done)
    return svg(WIDTH, DEEP, [*body, "</g>"])


def attention_rows(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A causal softmax and its gradient, both computed by the library."""
    rng = np.random.default_rng(12)
    logits = rng.normal(size=(n, n)) * 1.6
    logits[np.triu_indices(n, 1)] = -np.inf
    probs = softmax(logits)
    return probs, softmax_backward(rng.normal(size=(n, n)), probs)


def shade(value: float, colour: str) -> str:
    """Between white and the colour, as a hex number."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(255 + (c - 255) * min(value, 1.0)) for c in rgb]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def grid(x: float, y: float, size: float, colours: list[list[str]]) -> list[str]:
    return [
        f'<rect x="{x + j * size:g}" y="{y + i * size:g}" width="{size - 2:g}" '
        f'height="{size - 2:g}" rx="2" fill="{colour}"/>'
        for i, row in enumerate(colours)
        for j, colour in enumerate(row)
        if colour
    ]


def cover() -> str:
    """The probabilities of a causal attention, and the gradient of their logits beside them."""
    n, size = 8, 17
    probs, grad = attention_rows(n)
    grad = grad / np.abs(grad).max()
    lower = np.tril(np.ones((n, n), bool))
    forward = [
        [shade(0.08 + p, BLUE) if ok else "" for p, ok in zip(row, oks, strict=True)]
        for row, oks in zip(probs, lower, strict=True)
    ]
    backward = [
        [
            shade(0.08 + abs(g), BLUE if g > 0 else RED) if ok else ""
            for g, ok in zip(row, oks, strict=True)
        ]
        for row, oks in zip(grad, lower, strict=True)
    ]
    line = f'fill="none" stroke="{INK}" stroke-width="1.3"'
    body = [
        '<rect width="360" height="212" fill="#fff"/>',
        '<defs><marker id="h" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{INK}"/>'
        "</marker></defs>",
        *grid(14, 36, size, forward),
        *grid(214, 36, size, backward),
        f'<path d="M158 92H204" {line} marker-end="url(#h)"/>',
        f'<g {SERIF} font-size="15" fill="{INK}">',
        '<text x="14" y="22">P = softmax(S)</text>',
        '<text x="214" y="22">dS</text>',
        '<text x="16" y="198">dS = P ∘ (dP − rowsum(P ∘ dP))</text>',
        "</g>",
        f'<g {FONT} font-size="12" fill="{GREY}">',
        '<text x="181" y="82" text-anchor="middle">backward</text>',
        "</g>",
    ]
    return svg(360, 212, body)


def logo(background: bool) -> str:
    """A causal attention of four tokens; on a tile where it has to stand alone."""
    weights = [[1.0], [0.45, 1.0], [0.9, 0.4, 0.7], [0.45, 1.0, 0.55, 0.9]]
    size, edge = 10, 4
    body = [f'<rect width="48" height="48" rx="9" fill="{BLUE}"/>'] if background else []
    colour = "#fff" if background else BLUE
    body += [
        f'<rect x="{edge + j * size + 0.75:g}" y="{edge + i * size + 0.75:g}" width="8.5" '
        f'height="8.5" rx="1.5" fill="{colour}" fill-opacity="{weight:g}"/>'
        for i, row in enumerate(weights)
        for j, weight in enumerate(row)
    ]
    return svg(48, 48, body)


def pictures() -> dict[str, str]:
    return {
        "logo.svg": logo(background=True),
        "favicon.svg": logo(background=True),
        "cover.svg": cover(),
        "chapters.svg": chapter_map(),
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        (BOOK / "_static" / name).write_text(text, encoding="utf-8")
