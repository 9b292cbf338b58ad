"""The first value on the way that is wrong, although the answer returns only the end of the way.

A gradient such as dq = dlogits @ k is an equation for dlogits: given what came back for dq, it says
which dlogits the answer must have had. Where two outputs are made of the same intermediate and both
say the same wrong thing about it, the fault lies there or before; where one of them has it right,
the fault lies in the other, after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from attn_lessons.grading import compare
from attn_lessons.grading.exercise import Exercise, Intermediate
from attn_lessons.grading.relations import Look, about, arguments, listed

ALIKE = 1e-4  # of the largest entry: what solving for a factor may cost, and far below a mistake


@dataclass(frozen=True)
class Solved:
    """An intermediate of one call: as it should be, and as each output says it was."""

    look: Look
    want: np.ndarray
    by_output: Mapping[str, np.ndarray]


def first_wrong(exercise: Exercise, seen: Sequence[Look]) -> tuple[str, ...]:
    """What can be said about the first wrong intermediate; nothing where none is determined."""
    right: list[str] = []
    for step in exercise.intermediates:
        calls = [_solve(step, exercise, look) for look in seen if look.values]
        wrong = _outputs(calls, agreeing=False)
        well = [name for name in _outputs(calls, agreeing=True) if name not in wrong]
        if wrong:
            return _told(step.name, exercise, calls, wrong, well, right)
        right += [step.name] if well else []
    return ()


def _solve(step: Intermediate, exercise: Exercise, look: Look) -> Solved:
    given = arguments(exercise, look.case)
    found = {
        output: solve(look.values[output][0], **given)
        for output, solve in step.solved.items()
        if output in look.values and look.values[output][0].shape == look.values[output][1].shape
    }
    known = {output: value for output, value in found.items() if value is not None}
    return Solved(look, np.asarray(step.value(**given)), known)


def _outputs(calls: Sequence[Solved], agreeing: bool) -> list[str]:
    """Outputs whose intermediate is, in some call, what it should be (or is not)."""
    return list(
        dict.fromkeys(
            output
            for call in calls
            for output, got in call.by_output.items()
            if _alike(got, call.want) == agreeing
        )
    )


def _told(
    name: str,
    exercise: Exercise,
    calls: Sequence[Solved],
    wrong: list[str],
    well: list[str],
    right: list[str],
) -> tuple[str, ...]:
    before = f"{listed(right)} {'is' if len(right) == 1 else 'are'} right; " if right else ""
    if well:
        verb = "goes" if len(wrong) == 1 else "go"
        fact = f"{name} is right, as {listed(well)} shows: {listed(wrong)} {verb} wrong after it"
        return (before + fact,)
    if not all(_agree(call, wrong) for call in calls):
        return ()
    if len(wrong) > 1:
        where = f"{listed(wrong)} were made of the same wrong {name}"
    else:
        where = f"solved from {wrong[0]}, {name} is off, or the step from it to {wrong[0]} is"
    looks = [
        replace(call.look, values={name: (call.by_output[wrong[0]], call.want)})
        for call in calls
        if wrong[0] in call.by_output and not _alike(call.by_output[wrong[0]], call.want)
    ]
    details = list(about(name, exercise, looks))[:1]
    return (f"first wrong on the way: {before}{where}", *details)


def _agree(call: Solved, outputs: Sequence[str]) -> bool:
    said = [call.by_output[output] for output in outputs if output in call.by_output]
    return all(_alike(value, said[0]) for value in said[1:])


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    limit = ALIKE * max(compare.largest(a), compare.largest(b))
    return bool((compare.difference(a, b) <= limit).all())
