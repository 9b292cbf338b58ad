"""``{exercise-links} chNN_name``: the ways to open a chapter's exercise notebook.

Download always; JupyterLab when the page is served by the local server under ``/book/`` (a script
checks); Colab and Binder when the repository is known.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from .repository import branch, repository_url

EXERCISES = Path(__file__).resolve().parents[3] / "exercises"
DOWNLOADS = "exercises"  # folder of the notebooks inside the built site


def hosted_links(name: str) -> list[tuple[str, str]]:
    """Label and address of the hosted ways, for a repository on GitHub."""
    url = repository_url()
    if not url.startswith("https://github.com/"):
        return []
    where = url.removeprefix("https://github.com/")
    path = f"exercises/{name}.ipynb"
    return [
        (
            "Open in Colab",
            f"https://colab.research.google.com/github/{where}/blob/{branch()}/{path}",
        ),
        (
            "Open in Binder",
            f"https://mybinder.org/v2/gh/{where}/{branch()}?labpath={quote(path, safe='')}",
        ),
    ]


class ExerciseLinks(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if not (EXERCISES / f"{name}.ipynb").exists():
            raise self.error(f"exercise-links: there is no exercises/{name}.ipynb")
        up = "../" * self.env.docname.count("/")
        lab = f"{up}../lab/tree/{name}.ipynb"
        links = [
            f'<a class="lab-only" hidden href="{lab}">Open in JupyterLab</a>',
            f'<a href="{up}{DOWNLOADS}/{name}.ipynb" download>Download the notebook</a>',
            *(f'<a href="{href}">{label}</a>' for label, href in hosted_links(name)),
        ]
        html = f'<nav class="exercise-links" aria-label="Exercise notebook">{"".join(links)}</nav>'
        return [nodes.raw("", html, format="html")]


def copy_notebooks(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / DOWNLOADS
    target.mkdir(exist_ok=True)
    for notebook in EXERCISES.glob("*.ipynb"):
        shutil.copyfile(notebook, target / notebook.name)


def setup(app: Sphinx) -> None:
    app.add_directive("exercise-links", ExerciseLinks)
    app.connect("build-finished", copy_notebooks)
