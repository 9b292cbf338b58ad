"""The verdict in words, for a terminal and for a notebook."""

from __future__ import annotations

import html as markup

from attn_lessons.grading.exercise import Exercise
from attn_lessons.grading.records import Judgement


def line(judgement: Judgement) -> str:
    """The verdict in one line."""
    if judgement.status == "passed":
        return f"{judgement.exercise}: passed, {judgement.message}"
    if judgement.message == "not solved yet":
        return f"{judgement.exercise}: not solved yet"
    named = judgement.diagnosis.mistake if judgement.diagnosis else None
    return f"{judgement.exercise}: {named or judgement.message}"


def text(judgement: Judgement) -> str:
    """The verdict as plain text."""
    return line(judgement)


def html(judgement: Judgement, exercise: Exercise | None = None) -> str:
    """The verdict for a notebook."""
    return f"<pre>{markup.escape(text(judgement))}</pre>"
