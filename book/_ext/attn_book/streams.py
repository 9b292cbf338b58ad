"""A printed line stays one line.

A kernel sends what a cell prints in pieces, cut by the clock and not at the ends of lines.
MyST-NB merges the pieces with a line break between them, so a slow cell's output would break in
the middle of a line. Here the pieces are joined as they are before it sees them.
"""

from __future__ import annotations

from typing import Any

from myst_nb.core import render
from sphinx.application import Sphinx

_merge = render.coalesce_streams


def joined(outputs: list[Any]) -> list[Any]:
    """``outputs`` with all pieces of stdout, and all of stderr, in the place of the first."""
    first: dict[str, Any] = {}
    whole = []
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] in first:
            first[output["name"]]["text"] += output["text"]
            continue
        if output["output_type"] == "stream":
            first[output["name"]] = output = output.copy()
        whole.append(output)
    return whole


def setup(app: Sphinx) -> None:
    render.coalesce_streams = lambda outputs: _merge(joined(outputs))
