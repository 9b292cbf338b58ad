"""A Jupyter server extension: the built book under ``book/``, and a page to wait on until it is.

The server is told where to look by the environment, so that it runs in any Jupyter server.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.ioloop import PeriodicCallback

BOOK = "ATTN_LESSONS_BOOK"
STATUS = "ATTN_LESSONS_STATUS"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The book is being built · Attention by Hand</title>
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="4"></noscript>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #57606a; --line: #d0d7de;
  --page: #ffffff; --accent: #0072b2; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --quiet: #a8b0b8; --line: #3a3f45;
  --page: #121212; --accent: #56b4e9; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 1.5rem;
  background: var(--page); color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { width: min(36rem, 100%); }
h1 { font: 600 1.75rem/1.25 Georgia, "Times New Roman", serif; margin: 0 0 .25rem; }
p { margin: 0 0 1.25rem; color: var(--quiet); }
a { color: var(--accent); }
.bar { height: .5rem; border-radius: .25rem; background: var(--line); overflow: hidden; }
.bar div { height: 100%; width: 0; border-radius: inherit; background: var(--accent);
  transition: width .6s ease; }
#stage { display: flex; justify-content: space-between; gap: 1rem; margin: .75rem 0 1.25rem;
  color: var(--ink); font-variant-numeric: tabular-nums; }
#since { color: var(--quiet); white-space: nowrap; }
pre { margin: 0 0 1.25rem; padding: .75rem 1rem; border: 1px solid var(--line);
  border-radius: .375rem; font-size: .8125rem; line-height: 1.5; white-space: pre-wrap;
  overflow-wrap: anywhere; }
pre:empty { display: none; }
.failed h1 { color: var(--wrong); }
.failed .bar div { background: var(--wrong); }
</style>
</head>
<body>
<main id="page">
<h1 id="title">The book is being built</h1>
<p id="text">The exercises are ready in <a href="../lab">JupyterLab</a> already, at the address
in the terminal. This page turns into the book when it is there.</p>
<div class="bar" role="progressbar" aria-label="Building the book" aria-valuemin="0"
  aria-valuemax="100"><div id="fill"></div></div>
<div id="stage"><span id="what" role="status">Starting</span><span id="since"></span></div>
<pre id="log"></pre>
</main>
<script>
const at = id => document.getElementById(id);
const clock = s => Math.floor(s / 60) + ":" + String(Math.floor(s % 60)).padStart(2, "0");
async function look() {
  try {
    const status = await (await fetch("STATUS_URL", {cache: "no-store"})).json();
    if (status.ready) { location.reload(); return; }
    at("what").textContent = status.what;
    at("since").textContent = status.since ? clock(Date.now() / 1000 - status.since) : "";
    at("fill").style.width = status.percent + "%";
    document.querySelector(".bar").setAttribute("aria-valuenow", status.percent);
    if (status.failed) {
      at("page").className = "failed";
      at("title").textContent = "The book could not be built";
      at("text").textContent = "The exercises do not need it. The end of what was said:";
      at("log").textContent = status.log;
    }
  } catch (error) { at("what").textContent = "The server has stopped"; }
  setTimeout(look, 1000);
}
look();
</script>
</body>
</html>
"""


def read_status(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How far the book is; a missing or half-written file reads as the very beginning."""
    waiting = {
        "ready": False,
        "failed": False,
        "what": "Waiting to start",
        "percent": 0,
        "since": 0,
        "log": "",
    }
    try:
        return waiting | json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return waiting


class StatusHandler(JupyterHandler):
    """``book/_status``: the state of the build as JSON."""

    def initialize(self, status: str) -> None:
        self.status = status

    @allow_unauthenticated
    def get(self) -> None:
        self.set_header("Cache-Control", "no-store")
        self.finish(read_status(self.status))


class BookHandler(JupyterHandler, web.StaticFileHandler):
    """The built pages, readable without a token: they are what the repository holds, no more."""

    def initialize(  # type: ignore[override]
        self, path: str, status: str, status_url: str
    ) -> None:
        web.StaticFileHandler.initialize(self, path, default_filename="index.html")
        self.status = status
        self.status_url = status_url

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Cache-Control", "no-cache")

    def compute_etag(self) -> str | None:
        waiting = getattr(self, "absolute_path", None) is None
        return None if waiting else web.StaticFileHandler.compute_etag(self)

    @allow_unauthenticated
    async def get(self, path: str, include_body: bool = True) -> None:
        if read_status(self.status)["ready"]:
            return await web.StaticFileHandler.get(self, path, include_body)
        if path and not path.endswith((".html", "/")):
            raise web.HTTPError(404)
        self.set_header("Cache-Control", "no-store")
        self.finish(PAGE.replace("STATUS_URL", self.status_url) if include_body else "")

    @allow_unauthenticated
    async def head(self, path: str) -> None:
        await self.get(path, include_body=False)


class ToBookHandler(JupyterHandler):
    """``book`` without its slash."""

    @allow_unauthenticated
    def get(self) -> None:
        self.redirect(url_path_join(self.base_url, "book/"))

    head = get


def stop_with_parent(server: Any) -> PeriodicCallback:
    """Stop the server soon after the process that started it is gone."""
    parent = os.getppid()

    def look() -> None:
        if os.getppid() != parent:
            server.stop(from_signal=True)

    watch = PeriodicCallback(look, 1000)
    watch.start()
    return watch


def handlers(base_url: str, book: str, status: str) -> list[tuple[Any, ...]]:
    at = url_path_join(base_url, "book")
    status_url = url_path_join(at, "_status")
    pages = {"path": book, "status": status, "status_url": status_url}
    return [
        (at, ToBookHandler),
        (status_url, StatusHandler, {"status": status}),
        (at + "/(.*)", BookHandler, pages),
    ]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "attn_lessons.server"}]


def _load_jupyter_server_extension(server: Any) -> None:
    """Add the book to a server that was started by ``attn-lessons start``."""
    if BOOK not in os.environ:
        return
    routes = handlers(server.web_app.settings["base_url"], os.environ[BOOK], os.environ[STATUS])
    server.web_app.add_handlers(".*$", routes)
    server.web_app.settings["attn_lessons_watch"] = stop_with_parent(server)
