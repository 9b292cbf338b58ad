"""Docstrings as they read best in an editor, set as they read best on a page.

A paragraph that begins with ``Shapes:``, ``ValueError:`` or ``Source:`` becomes a labelled field,
and the bars of an absolute value such as ``|x|`` are kept from being read as markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

LABEL = re.compile(r"(Shapes|Source|Sources|\w+Error): +(?=\S)")
LITERAL = re.compile(r"(``.*?``|:math:`.*?`)")


def escape_bars(line: str) -> str:
    parts = LITERAL.split(line)
    return "".join(p if i % 2 else p.replace("|", r"\|") for i, p in enumerate(parts))


def set_paragraphs(lines: list[str]) -> Iterator[str]:
    """Fields for labelled paragraphs; a directive and what is indented under it stay."""
    field = directive = False
    for line in lines:
        blank = not line.strip()
        if line.startswith(".. "):
            directive = True
        elif directive and line and not line[0].isspace():
            directive = False
        field = not blank and (field or bool(LABEL.match(line)))
        if directive or blank:
            yield line
        elif field:
            label = LABEL.match(line)
            text = escape_bars(line[label.end() :] if label else line.strip())
            yield f":{label[1]}: {text}" if label else f"   {text}"
        else:
            yield escape_bars(line)


def process(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = list(set_paragraphs(lines))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", process, priority=900)
