"""Attention by Hand: forward and backward passes of attention, written out and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_lessons.grading.check import check
    from attn_lessons.grading.progress import progress

__all__ = ["__version__", "check", "progress"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The exercises are read only where somebody checks an answer.
    if name == "check":
        from attn_lessons.grading.check import check

        return check
    if name == "progress":
        from attn_lessons.grading.progress import progress

        return progress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
