"""Everything a page loads is served beside it: MathJax's parts are copied into the built site."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

# The parts of MathJax that the book's equations use; the stock bundle is half as big again. An
# equation that needs another part is an error that the tests of the pages see.
COMPONENTS = [
    "core",
    "input/tex-base",
    "input/tex/extensions/ams",
    "input/tex/extensions/boldsymbol",
    "output/chtml",
    "output/chtml/fonts/tex",
    "a11y/assistive-mml",
]
LOADED = [
    "core",
    "input/tex-base",
    "[tex]/ams",
    "[tex]/boldsymbol",
    "output/chtml",
    "a11y/assistive-mml",
]
PACKAGES = ["base", "ams", "boldsymbol"]


TEMPLATES = Path(__file__).resolve().parent / "templates"


def mathjax_folder() -> Path:
    """The MathJax that ``pip install django-static-mathjax`` brings (it does not need Django)."""
    spec = importlib.util.find_spec("mathjax")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("MathJax is not installed: pip install django-static-mathjax")
    return Path(spec.submodule_search_locations[0]) / "static" / "mathjax" / "es5"


def configure_mathjax(app: Sphinx, config: Config) -> None:
    settings = dict(config.mathjax3_config or {})
    settings["loader"] = {"load": LOADED}
    settings["tex"] = {"packages": PACKAGES, **settings.get("tex", {})}
    config.mathjax3_config = settings


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    source, target = mathjax_folder(), Path(app.outdir) / "_static" / "mathjax"
    fonts = sorted((source / "output/chtml/fonts/woff-v2").glob("*.woff"))
    files = [source / f"{name}.js" for name in ["startup", *COMPONENTS]] + fonts
    for file in files:
        copy = target / file.relative_to(source)
        if not copy.exists() or copy.stat().st_size != file.stat().st_size:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def drop_thebe(app: Sphinx) -> None:
    """Jupyter Book always loads sphinx-thebe, which names a CDN on each page: take it out."""
    for event in ("builder-inited", "env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners.get(event, [])):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)
    sheets = app.registry.css_files
    sheets[:] = [(name, options) for name, options in sheets if "thebe" not in name]
    app.config.html_static_path = [
        path for path in app.config.html_static_path if "sphinx_thebe" not in str(path)
    ]


def own_templates(app: Sphinx, config: Config) -> None:
    config.templates_path = [str(TEMPLATES), *config.templates_path]


def mend_lists(
    app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object
) -> None:
    """docutils calls a bibliography a list and its entries something else; readers stumble."""
    if "body" in context:
        context["body"] = context["body"].replace(
            '<div role="list" class="citation-list">', '<div class="citation-list">'
        )


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", mend_lists)
    app.connect("config-inited", own_templates)
    app.connect("config-inited", configure_mathjax)
    app.connect("config-inited", lambda app, config: drop_thebe(app))
    app.connect("build-finished", copy_mathjax)
