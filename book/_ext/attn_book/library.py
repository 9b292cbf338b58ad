"""A page shows what the library computes, so a changed library makes every page run again.

The execution cache compares a page's code cells only; it does not notice that the functions they
call have changed. Here its folder is named after a digest of the library and of the benchmark
results, and a build whose digest differs from the last one reads every page anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
KEEP = 2  # digests whose outputs are kept, so that going back and forth stays quick


def library_folder() -> Path:
    """Where the library that the pages import lies."""
    spec = importlib.util.find_spec("attn_lessons")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("attn_lessons is not installed: pip install -e '.[book]'")
    return Path(spec.submodule_search_locations[0])


def library_digest() -> str:
    """Changes whenever a source file, a style sheet or a benchmark result changes."""
    folder = library_folder()
    sources = [p for p in folder.rglob("*") if p.suffix in {".py", ".mplstyle"}]
    digest = hashlib.sha256()
    for path in sorted([*sources, *RESULTS.glob("*.json")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


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


def outdated(app: Sphinx, env: BuildEnvironment, added, changed, removed) -> list[str]:  # type: ignore[no-untyped-def]
    """Every page, when the library is not the one of the last build."""
    digest = Path(app.config.nb_execution_cache_path).name
    last, env.attn_library = getattr(env, "attn_library", None), digest
    return [] if last in (None, digest) else sorted(env.found_docs)


def setup(app: Sphinx) -> None:
    app.connect("config-inited", key_cache, priority=100)
    app.connect("env-get-outdated", outdated)
