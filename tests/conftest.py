"""For every test: shapes checked at run time, hypothesis that repeats itself, no shared state."""

import os
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parent.parent


def mathematics() -> list[str]:
    """The library's modules that annotate shapes: all outside grading that import jaxtyping."""
    package = ROOT / "attn_lessons"
    sources = [p for p in sorted(package.rglob("*.py")) if "grading" not in p.parts]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sources]
    texts = [p.read_text(encoding="utf-8") for p in sources]
    return [n for n, text in zip(names, texts, strict=True) if "from jaxtyping import" in text]


# Before anything imports them: each call then checks its shapes and dtypes with beartype.
jaxtyping.install_import_hook(mathematics(), "typecheck.check")

# One draw of examples for everybody, on a machine of any speed. For a longer hunt:
# HYPOTHESIS_PROFILE=thorough pytest
common = {"deadline": None, "database": None}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=40, **common)
hypothesis.settings.register_profile("thorough", max_examples=1000, **common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside the tests: no shape checks before the function's own, so its errors are seen."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
