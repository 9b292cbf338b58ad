"""What an exercise is: cases to try, a reference to agree with, and the mistakes people make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)  # arrays have no hash; a case is known by its identity
class Case:
    """One call of the learner's function, made so that one mechanism decides it.

    ``name`` is what the learner reads when this is the first case that fails ("large logits"),
    ``hint`` one sentence on what the case is about. ``rtol`` and ``atol`` replace the tolerance
    that is otherwise derived from dtype and size.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    hint: str = ""
    rtol: float | None = None
    atol: float | None = None


@dataclass(frozen=True)
class Mistake:
    """A wrong answer with a name: ``answer`` computes exactly what it computes.

    ``why`` is one sentence on what is wrong with it, ``section`` the page and anchor of the book
    that explains it (``"ch01_softmax.html#ch01-backward"``). With ``observed``, what can be seen in
    the numbers is told beside the name: for a name that does not say where to look.
    """

    name: str
    why: str
    section: str
    answer: Callable[..., Any]
    observed: bool = False


@dataclass(frozen=True)
class Intermediate:
    """A value on the way to what is returned, which an answer can be asked for without showing it.

    ``value`` computes it from the call's arguments. ``solved`` has, for the name of a returned
    array, a function of that array and the call's arguments: the intermediate that the array must
    have been made of, or None where it does not determine one. For dq = dlogits @ k that is
    ``dq @ pinv(k)``, where k has no more rows than columns.
    """

    name: str
    value: Callable[..., np.ndarray]
    solved: Mapping[str, Callable[..., np.ndarray | None]]


@dataclass(frozen=True, eq=False)
class Exercise:
    """One function for the learner to write; its ``id`` is the function's name.

    ``reference`` is the library's function of the same signature. ``oracle``, where given,
    computes the same values by an independent road (finite differences, complex step, an explicit
    Jacobian) and is what a learner's numbers are held against; a test holds both together.
    ``returns`` names what is returned, one name for each element of a returned tuple.
    ``tokens`` names those returned arrays whose last two axes are laid out so that a picture of
    the error over them says something. ``intermediates`` are in the order in which a right answer
    meets them, so that the first wrong one can be named. ``order`` has the returned arrays' names
    in the order in which a right answer computes them: of many wrong ones the first is described.
    """

    id: str
    chapter: str
    title: str
    points: int
    returns: tuple[str, ...]
    reference: Callable[..., Any]
    cases: Callable[[np.random.Generator], list[Case]]
    mistakes: tuple[Mistake, ...]
    oracle: Callable[..., Any] | None = None
    float32_allowed: bool = True
    tokens: tuple[str, ...] = ()
    intermediates: tuple[Intermediate, ...] = ()
    order: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        """The call a learner has to support, without annotations."""
        parameters = inspect.signature(self.reference).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        shown = [p for p in plain if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        return f"{self.id}{inspect.Signature(shown)}"
