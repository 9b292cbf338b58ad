"""The book: cold build, warm build, and the bytes a browser loads for each page.

To reach: at most 6 min, 20 s, and 1.5 MB before caching. Run as ``python benchmarks/pages.py``.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machine

from attn_lessons import bookbuild

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def timed_build(folder: Path) -> float:
    begun = time.monotonic()
    bookbuild.build(folder)
    return time.monotonic() - begun


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def served(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def bytes_of_pages(site: Path) -> dict[str, dict[str, int]]:
    """What a browser with an empty cache loads for each page, scripts and fonts included."""
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("no Chromium on the path: the bytes of a page are counted in a browser")
    found = {}
    with served(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for page in sorted(site.glob("*.html")):
            if page.stem in ("index", "genindex", "search", "py-modindex"):
                continue
            sizes: list[int] = []
            context = browser.new_context()
            tab = context.new_page()
            tab.on("response", lambda reply, sizes=sizes: sizes.append(len(reply.body())))
            tab.goto(address + page.name, wait_until="networkidle")
            found[page.stem] = {
                "requests": len(sizes),
                "bytes": sum(sizes),
                "html_bytes": page.stat().st_size,
            }
            context.close()
        browser.close()
    return found


def main() -> None:
    where = machine.machine()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        cold = timed_build(out)
        stamp = out / "_build" / bookbuild.STAMP
        stamp.unlink()
        warm = timed_build(out)
        unchanged = timed_build(out)
        pages = bytes_of_pages(out / "_build" / "html")
    result = {
        "build": {
            "cold_s": round(cold, 1),
            "warm_s": round(warm, 1),
            "unchanged_s": round(unchanged, 2),
        },
        "pages": pages,
        "largest_page_bytes": max(page["bytes"] for page in pages.values()),
    }
    packages = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "playwright")
    machine.write("pages", result, *packages, where=where)


if __name__ == "__main__":
    main()
