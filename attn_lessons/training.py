r"""A training loop whose every number can be asked for: schedule, clipping, norms, checkpoints.

One step is

.. math:: g = \frac1a \sum_{i=1}^{a} \nabla L_i, \qquad
          g \leftarrow \operatorname{clip}(g), \qquad
          \theta \leftarrow \operatorname{AdamW}(\theta, g, \eta_t)

over ``a`` accumulated batches. What a step reads is in its state: parameters, moments, the step's
number and the generator that draws batches and dropout. So a run that was saved and loaded goes on
bit for bit as if it had not stopped.

A step whose gradient is not finite is skipped: parameters and moments stay, the record says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attn_lessons._arrays import as_count
from attn_lessons.optim import AdamState, adam_start, adamw_update, clip_by_global_norm, global_norm

Arrays = dict[str, np.ndarray]
Loss = Callable[[Mapping[str, np.ndarray], np.random.Generator], tuple[Any, Arrays]]

FORMAT = "attn-lessons 1"


class Record(NamedTuple):
    """What one step saw."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the accumulated batches, before the step."""
    lr: float
    norm: float
    """Length of the whole gradient before clipping."""
    norms: dict[str, float]
    """The same by layer, where it was asked for."""
    skipped: bool
    """Whether the gradient was not finite, and nothing was changed."""


class TrainState(NamedTuple):
    """All that the next step depends on."""

    params: Arrays
    adam: AdamState
    rng: np.random.Generator
    step: int = 0
    """Steps tried, skipped ones included; ``adam.step`` counts those taken."""


def train_start(params: Mapping[str, np.ndarray], seed: int) -> TrainState:
    """The state before the first step; ``seed`` decides every batch and every dropout mask."""
    return TrainState(dict(params), adam_start(params), np.random.default_rng(seed))


def train_step(
    state: TrainState,
    loss: Loss,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decayed: Iterable[str] | None = None,
    max_norm: float | None = 1.0,
    accumulate: int = 1,
    by_layer: bool = False,
) -> tuple[TrainState, Record]:
    """One AdamW step on the mean gradient of ``accumulate`` batches.

    ``loss(params, rng)`` draws its batch and its dropout from ``rng`` and returns the batch's mean
    loss and gradients. The mean over equal batches is that of one batch as large as all of them.
    ``max_norm=None`` does not clip. The state passed in stays as it was, but for its generator,
    which moves on.

    ValueError: ``accumulate`` < 1; the gradients' names are not the parameters'; and adamw_step's.
    """
    pieces = [loss(state.params, state.rng) for _ in range(as_count("accumulate", accumulate, 1))]
    value = float(np.mean([float(piece) for piece, _ in pieces]))
    grads = _mean([grads for _, grads in pieces])
    norms = norm_by_layer(grads) if by_layer else {}
    grads, norm = clip_by_global_norm(grads, math.inf if max_norm is None else max_norm)
    step = state.step + 1
    record = Record(step, value, lr, norm, norms, not math.isfinite(norm))
    if record.skipped:
        return state._replace(step=step), record
    params, adam = adamw_update(
        state.params,
        grads,
        state.adam,
        lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decayed=decayed,
    )
    return TrainState(params, adam, state.rng, step), record


def train(
    state: TrainState,
    loss: Loss,
    steps: int,
    schedule: Callable[[int], float],
    *,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    stop_on_divergence: bool = True,
    **options: Any,
) -> tuple[TrainState, list[Record]]:
    """Steps from ``state.step`` up to ``steps``; ``schedule(step)`` is the learning rate.

    ``progress`` wraps the steps (``rich.progress.track``, say; nothing is shown when None).
    ``checkpoint`` is a file that is replaced ``every`` so many steps and at the end. ``options``
    go to train_step. Where divergence sees something, the loop ends with the step it saw it in,
    and the caller asks divergence what it was. Returns ``(state, records)``.

    ValueError: ``every`` < 1; and train_step's.
    """
    every = as_count("every", every, 1)
    numbers: Iterable[int] = range(state.step + 1, as_count("steps", steps) + 1)
    records: list[Record] = []
    for step in numbers if progress is None else progress(numbers):
        state, record = train_step(state, loss, schedule(step), **options)
        records.append(record)
        if checkpoint is not None and step % every == 0:
            save_state(checkpoint, state)
        if stop_on_divergence and divergence(records):
            break
    if checkpoint is not None:
        save_state(checkpoint, state)
    return state, records


def accumulate_gradients(
    losses: Sequence[float], grads: Sequence[Mapping[str, np.ndarray]], sizes: Sequence[int]
) -> tuple[float, Arrays]:
    r"""Loss and gradient of one large batch from those of its pieces.

    .. math:: \ell = \frac{\sum_i n_i \ell_i}{\sum_i n_i}, \qquad
              g = \frac{\sum_i n_i g_i}{\sum_i n_i}

    Each piece's loss and gradient is a mean over ``sizes[i]`` = n of
    its own (tokens that count, say). A piece of size 0 adds nothing,
    whatever its mean over nothing is; where all are empty, loss and
    gradient are 0.

    Shapes: each gradient keeps its own; returns ``(loss, grads)``.

    ValueError: no pieces; lengths differ; a size is no integer or
    negative; gradients have other names than the first piece's.
    """
    if not len(losses) == len(grads) == len(sizes) > 0:
        raise ValueError(
            "losses: expected as many losses, grads and sizes, at least one; "
            f"got {len(losses)}, {len(grads)} and {len(sizes)}"
        )
    counts = [as_count("sizes", n) for n in sizes]
    for piece in grads:
        if set(piece) != set(grads[0]):
            raise ValueError(
                f"grads: expected the names {', '.join(grads[0])} in each; got {', '.join(piece)}"
            )
    total = max(sum(counts), 1)
    full = [i for i, n in enumerate(counts) if n]
    loss = sum(counts[i] / total * float(losses[i]) for i in full)
    zeros = {name: np.zeros_like(g) for name, g in grads[0].items()}
    return float(loss), {
        name: sum((counts[i] / total * grads[i][name] for i in full), zero)
        for name, zero in zeros.items()
    }


# --- looking at a run -------------------------------------------------------------------------


def norm_by_layer(grads: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Length of the gradient of each layer: ``layers.0``, ``layers.1``, … and each part outside.

    >>> norm_by_layer({"embed.weight": np.array([3.0, 4.0]), "layers.0.norm1.bias": np.ones(4)})
    {'embed': 5.0, 'layers.0': 2.0}
    """
    groups: dict[str, Arrays] = {}
    for name, grad in grads.items():
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        groups.setdefault(layer, {})[name] = grad
    return {layer: global_norm(group) for layer, group in groups.items()}


def divergence(
    records: Sequence[Record],
    *,
    window: int = 50,
    spike: float = 30.0,
    rise: float = 1.5,
    share: float = 0.25,
) -> str | None:
    """What the last step says about a run that is going wrong, or None.

    - The loss is not finite.
    - Three gradients in a row were not finite.
    - The gradient is ``spike`` times as long as the median of the last ``window`` steps, and longer
      than any before.
    - The mean loss of the last ten steps is ``rise`` times the lowest such mean before, and of what
      had been learnt by then, a ``share`` is lost.

    A single gradient that is not finite is skipped and forgiven. Nothing is said of the length or
    the rise in the first ten steps, when all is in motion. Where nearly everything is learnt, one
    batch's loss is a multiple of another's and its gradient too, and nothing is wrong: for that are
    the second halves of both.
    """
    if not records:
        return None
    last = records[-1]
    if not math.isfinite(last.loss):
        return f"step {last.step}: the loss is {last.loss}"
    if len(records) >= 3 and all(r.skipped for r in records[-3:]):
        return (
            f"step {last.step}: the gradient is {last.norm}, the third in a row that is not finite"
        )
    return _spiked(records, window, spike) or _risen(records, rise, share)


def _spiked(records: Sequence[Record], window: int, spike: float) -> str | None:
    last, before = records[-1], [r.norm for r in records[-window - 1 : -1] if not r.skipped]
    if last.skipped or len(before) < 10:
        return None
    usual = float(np.median(before))
    longest = max(r.norm for r in records[:-1] if not r.skipped)
    if not last.norm > max(spike * usual, longest):
        return None
    times = f"{last.norm / usual:.3g} times " if usual > 0 else ""
    return (
        f"step {last.step}: the gradient's norm is {last.norm:.3g}, {times}the median of the "
        f"{len(before)} steps before, {usual:.3g}"
    )


def _risen(records: Sequence[Record], rise: float, share: float) -> str | None:
    losses = [r.loss for r in records]
    if len(losses) < 20:
        return None
    means = np.convolve(losses, np.full(10, 0.1), "valid")
    lowest = int(means[:-1].argmin())
    if not means[-1] > rise * means[lowest] > 0:
        return None
    if means[-1] - means[lowest] < share * (means[0] - means[lowest]):
        return None
    return (
        f"step {records[-1].step}: the loss, {means[-1]:.3g} over ten steps, is "
        f"{means[-1] / means[lowest]:.3g} times its lowest, {means[lowest]:.3g} "
        f"at step {records[lowest + 9].step}"
    )


# --- keeping a run ----------------------------------------------------------------------------


def save_params(path: str | os.PathLike[str], params: Mapping[str, np.ndarray]) -> None:
    """Parameters to a safetensors file, whole or not at all."""
    _write(Path(path), {name: np.asarray(p) for name, p in params.items()}, {})


def load_params(path: str | os.PathLike[str]) -> Arrays:
    """Parameters from a safetensors file.

    ValueError: the file is no safetensors file.
    """
    return _read(Path(path))[0]


def save_state(path: str | os.PathLike[str], state: TrainState) -> None:
    """A training state to a safetensors file, whole or not at all: an interrupted save leaves the
    file that was there before."""
    arrays = {f"params/{name}": p for name, p in state.params.items()}
    arrays |= {f"m/{name}": m for name, m in state.adam.m.items()}
    arrays |= {f"v/{name}": v for name, v in state.adam.v.items()}
    notes = {
        "format": FORMAT,
        "step": str(state.step),
        "adam.step": str(state.adam.step),
        "rng": json.dumps(state.rng.bit_generator.state),
    }
    _write(Path(path), arrays, notes)


def load_state(path: str | os.PathLike[str]) -> TrainState:
    """A training state from a file of save_state.

    ValueError: the file is no safetensors file, or not save_state's.
    """
    arrays, notes = _read(Path(path))
    if notes.get("format") != FORMAT:
        raise ValueError(
            f"path: expected a training state ({FORMAT}); got {path}, with {len(arrays)} arrays "
            "and no such mark"
        )
    params, m, v = (
        {n.removeprefix(part): a for n, a in arrays.items() if n.startswith(part)}
        for part in ("params/", "m/", "v/")
    )
    held = json.loads(notes["rng"])
    generator = getattr(np.random, held["bit_generator"])()
    generator.state = held
    adam = AdamState(int(notes["adam.step"]), m, v)
    return TrainState(params, adam, np.random.Generator(generator), int(notes["step"]))


def _mean(pieces: Sequence[Arrays]) -> Arrays:
    if len(pieces) == 1:
        return pieces[0]
    first, *others = pieces
    return {n: sum((p[n] for p in others), g) / len(pieces) for n, g in first.items()}


def _write(path: Path, arrays: Arrays, notes: dict[str, str]) -> None:
    from safetensors.numpy import save

    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # safetensors writes strides away: a transposed array would come back scrambled.
        packed = {name: np.asarray(a, order="C") for name, a in arrays.items()}
        beside.write_bytes(save(packed, metadata=notes))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Arrays, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as wrong:
        raise ValueError(f"path: expected a safetensors file; got {path}: {wrong}") from None
