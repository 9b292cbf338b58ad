"""Links to the repository, filled from the environment; none where it is unknown.

The names of the variables are in ``attn_lessons/bookbuild.py``.
"""

from __future__ import annotations

import os

from sphinx.application import Sphinx
from sphinx.config import Config


def repository_url() -> str:
    return os.environ.get("ATTN_REPOSITORY_URL", "").rstrip("/").removesuffix(".git")


def branch() -> str:
    return os.environ.get("ATTN_BRANCH", "") or "main"


def fill_repository(app: Sphinx, config: Config) -> None:
    options = config.html_theme_options
    url = repository_url()
    options["repository_url"] = url
    options["repository_branch"] = branch()
    options["use_repository_button"] = bool(url)
    options["use_issues_button"] = url.startswith("https://github.com/")
    config.html_baseurl = os.environ.get("ATTN_BOOK_URL", config.html_baseurl)


def setup(app: Sphinx) -> None:
    app.connect("config-inited", fill_repository, priority=100)
