"""What the book needs beyond the stock Sphinx extensions.

* ``offline``: MathJax, icons and theme files are served with the pages, nothing from elsewhere.
* ``lighten``, ``trim``: what no page uses is left out of the built site.
* ``library``: a changed library makes the pages run again.
* ``reference``: docstrings set for the page.
* ``exercises``: the ``{exercise-links}`` directive and the notebooks to download.
* ``repository``: links to the repository where its address is known.
* ``streams``: what a cell prints keeps its lines whole.
"""

from __future__ import annotations

from sphinx.application import Sphinx

from . import exercises, library, lighten, offline, reference, repository, streams, trim


def setup(app: Sphinx) -> dict[str, bool]:
    for part in (offline, lighten, trim, library, reference, exercises, repository, streams):
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
