"""A page shows what the library computes, so a changed library makes every page run again.

The execution cache compares a page's code cells only; it does not notice that the functions they
call have changed. Here its folder is named after a digest of the library and of the benchmark
results, and a build whose digest differs from the last one begins anew.

Sphinx has one more trap: a build that failed on a warning passes when it is repeated, because the
page that warned is not read again. Here only a clean build is built upon.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[2] / "benchmarks" / "results"
KEEP = 2  # libraries whose outputs are kept, so that going back and forth stays quick
CLEAN = "clean"  # file that says what the last build without error and warning was made from


def library_folder() -> Path:
    """Where the library that the pages import lies."""
    spec = importlib.util.find_spec("attn_lessons")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("attn_lessons is not installed: pip install -e '.[book]'")
    return Path(spec.submodule_search_locations[0])


def digest_of(paths: Iterable[Path], *texts: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def library_digest() -> str:
    """Changes whenever a source file, a style sheet or a benchmark result changes."""
    sources = [p for p in library_folder().rglob("*") if p.suffix in {".py", ".mplstyle"}]
    return digest_of([*sources, *RESULTS.glob("*.json")])


def page_digest() -> str:
    """Changes with the library, with this extension and with what fills the links."""
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("ATTN_"))
    return digest_of(HERE.rglob("*.py"), library_digest(), *variables)


def key_cache(app: Sphinx, config: Config) -> None:
    """Name the execution cache after the library, and drop the oldest ones."""
    root = Path(app.outdir).parent / ".jupyter_cache"
    folder = root / library_digest()
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    config.nb_execution_cache_path = str(folder)
    others = [p for p in root.iterdir() if p.is_dir() and p != folder]
    for old in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[KEEP - 1 :]:
        shutil.rmtree(old)


def forget_other_builds(app: Sphinx, config: Config) -> None:
    """Begin anew unless the last build was clean and made from the same library."""
    clean = Path(app.doctreedir) / CLEAN
    if not clean.exists() or clean.read_text(encoding="utf-8") != page_digest():
        (Path(app.doctreedir) / "environment.pickle").unlink(missing_ok=True)
        shutil.rmtree(Path(app.outdir) / "_modules", ignore_errors=True)
    clean.unlink(missing_ok=True)


def mark_clean_build(app: Sphinx, exception: Exception | None) -> None:
    # Sphinx has no public count of the warnings it gave.
    if exception is None and app._warncount == 0:
        (Path(app.doctreedir) / CLEAN).write_text(page_digest(), encoding="utf-8")


def outdated(
    app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]
) -> list[str]:
    """Every page when any has changed.

    A page that is written again without being read again would lose its links from code to the
    reference. Reading is quick: cells whose outputs are kept do not run.
    """
    for listener in app.events.listeners["build-finished"]:
        linker = getattr(listener.handler, "__self__", None)
        if hasattr(linker, "outdated_docs"):  # sphinx_codeautolink looks at the sources' age only
            linker.outdated_docs = {str(Path(name)) for name in env.found_docs}
    return sorted(env.found_docs - added) if added or changed or removed else []


def setup(app: Sphinx) -> None:
    app.connect("config-inited", key_cache, priority=100)
    app.connect("config-inited", forget_other_builds)
    app.connect("env-get-outdated", outdated)
    app.connect("build-finished", mark_clean_build, priority=900)
