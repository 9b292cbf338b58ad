"""An exercise's calls on their way to a learner's function, and the outcomes on their way back."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from attn_lessons.grading import protocol
from attn_lessons.grading.exercise import Case, Exercise
from attn_lessons.grading.records import Returned


def message(exercise: Exercise, draws: Sequence[Sequence[Case]]) -> str:
    """Every case's arguments, and nothing of what they should lead to."""
    names = list(inspect.signature(exercise.reference).parameters)
    sent = [
        {"names": names, "calls": [(case.args, dict(case.kwargs)) for case in cases]}
        for cases in draws
    ]
    return json.dumps(protocol.encode({"draws": sent}))


def outcomes(answer: Any, draws: Sequence[Sequence[Case]]) -> list[list[Returned]]:
    """What came back, one outcome a case; ``ProtocolError`` where it is anything else."""
    match answer:
        case {"draws": list(sent)} if [_length(d) for d in sent] == [len(d) for d in draws]:
            return [[protocol.decode_returned(item) for item in draw] for draw in sent]
    raise protocol.ProtocolError("message: not one outcome for each case")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else -1
