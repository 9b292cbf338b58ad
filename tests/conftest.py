"""For every test: shapes checked at run time, hypothesis that repeats itself, no shared state."""

import os
import re
from pathlib import Path

# One thread a process, before NumPy is imported: two workers and what they start share the cores,
# and a matrix product that waits for a core it does not get takes ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton reads this when it is imported, which parts of torch do too: its kernels run on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

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


def pytest_xdist_make_scheduler(config, log):
    """A file stays in one worker, and of the catalogue's tests an exercise."""
    from xdist.scheduler import LoadFileScheduling

    class ByExercise(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            exercise = re.search(r"/test_catalogue\.py::.*?\[(\w+)", nodeid)
            return super()._split_scope(nodeid) + (exercise[1] if exercise else "")

    return ByExercise(config, log)
