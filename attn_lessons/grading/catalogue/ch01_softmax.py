"""Chapter 1: softmax, its logarithm, its derivative, and the loss on top."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_lessons import softmax as library
from attn_lessons.grading.catalogue._parts import named, quiet, scattered
from attn_lessons.grading.exercise import Case, Exercise

CHAPTER = "ch01_softmax"
DEFINITION = f"{CHAPTER}.html#ch01-definition"
STABLE = f"{CHAPTER}.html#ch01-stable"
LOGSUMEXP = f"{CHAPTER}.html#ch01-logsumexp"
JACOBIAN = f"{CHAPTER}.html#ch01-jacobian"
BACKWARD = f"{CHAPTER}.html#ch01-backward"
CROSS_ENTROPY = f"{CHAPTER}.html#ch01-cross-entropy"
LABEL_SMOOTHING = f"{CHAPTER}.html#ch01-label-smoothing"
SHAPES = f"{CHAPTER}.html#ch01-shapes"

Array = np.ndarray
Rng = np.random.Generator


# --- inputs ---------------------------------------------------------------------------------


def _logit_cases(rng: Rng) -> list[Case]:
    """What softmax and its logarithm are both tried on."""
    far_apart = rng.normal(size=(3, 5)) + np.array([[0.0], [1e4], [-1e4]])
    huge = np.array([[1e308, 9e307, 0, 0, 0], [0, 1.7e308, 1e300, 1, 2], [0, 0, 0, 0, 1e308]])
    blocked = rng.normal(size=(4, 6))
    blocked[0, 0] = blocked[1, 2:] = blocked[2, -1] = -np.inf
    return [
        Case("one row", (rng.normal(size=7),), hint="A vector: everything along its one axis."),
        Case(
            "a batch of rows",
            (2 * rng.normal(size=(3, 5)),),
            hint="Each of the 3 rows is normalised by itself.",
        ),
        Case(
            "four axes",
            (2 * rng.normal(size=(2, 3, 4, 5)),),
            hint="Scores of attention have shape (B, H, Nq, Nk): only the last axis is summed.",
        ),
        Case(
            "axis=0",
            (2 * rng.normal(size=(4, 3)),),
            {"axis": 0},
            hint="The columns are normalised, not the rows.",
        ),
        Case(
            "a middle axis",
            (2 * rng.normal(size=(2, 5, 3)),),
            {"axis": 1},
            hint="axis=1 of three: maximum and sum both run along it.",
        ),
        Case(
            "one class",
            (3 * rng.normal(size=(4, 1)),),
            hint="One class takes all the probability, whatever its logit.",
        ),
        Case(
            "large logits",
            (rng.uniform(-1e4, 1e4, size=(3, 5)),),
            hint="exp(1e4) overflows; differences to the maximum do not.",
        ),
        Case(
            "large negative logits",
            (rng.normal(size=(3, 5)) - 1e4,),
            hint="exp(-1e4) is 0 in every entry: the maximum here is a negative number.",
        ),
        Case(
            "rows far apart",
            (rng.permutation(far_apart),),
            hint="Rows near 0, 1e4 and -1e4: each row needs its own maximum.",
        ),
        Case(
            "logits of 1e308",
            (rng.permuted(huge, axis=1),),
            hint="Near the largest float64: even differences of them are finite.",
        ),
        Case(
            "-inf entries",
            (rng.permuted(blocked, axis=1),),
            hint="A logit of -inf is an entry ruled out; every row keeps finite ones.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(2 * rng.normal(size=(3, 4, 5))),),
            hint="The same numbers in another memory order: reshape copies here.",
        ),
        Case(
            "float32 input",
            (2 * rng.normal(size=(3, 6)).astype(np.float32),),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _probabilities(rng: Rng, *shape: int, axis: int = -1, spread: float = 1.0) -> Array:
    return _pairwise_softmax(spread * rng.normal(size=shape), axis)


def _jacobian_cases(rng: Rng) -> list[Case]:
    with_zeros = np.zeros(6)
    with_zeros[rng.permutation(6)[:4]] = _probabilities(rng, 4)
    return [
        Case("five classes", (_probabilities(rng, 5),), hint="A general p."),
        Case("two classes", (_probabilities(rng, 2),), hint="The smallest that is not trivial."),
        Case(
            "one class",
            (np.ones(1),),
            hint="p = 1 whatever the logit is, so nothing depends on it: the Jacobian is 0.",
        ),
        Case("uniform p", (np.full(4, 0.25),), hint="Diagonal 3/16, elsewhere -1/16."),
        Case("peaked p", (_probabilities(rng, 6, spread=4.0),), hint="Most of p in one entry."),
        Case("zeros in p", (with_zeros,), hint="An entry ruled out moves nothing."),
        Case(
            "not contiguous in memory",
            (_probabilities(rng, 7, 3, axis=0)[:, 1],),
            hint="A column of a matrix of probabilities.",
        ),
        Case(
            "float32 input",
            (_probabilities(rng, 5).astype(np.float32),),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _backward_cases(rng: Rng) -> list[Case]:
    def pair(*shape: int, axis: int = -1, spread: float = 1.0) -> tuple[Array, Array]:
        return rng.normal(size=shape), _probabilities(rng, *shape, axis=axis, spread=spread)

    one_entry = np.zeros((3, 5))
    one_entry[rng.integers(3), rng.integers(5)] = rng.normal() + 2
    logits = rng.normal(size=(4, 6))
    logits[0, 0] = logits[1, 2:] = -np.inf
    constant = np.repeat(rng.normal(size=(4, 1)) + 2, 6, axis=1)
    constant[0] = rng.normal(size=6)
    dp, p = pair(3, 4, 5)
    dp32, p32 = pair(3, 6)
    return [
        Case("one row", pair(7), hint="A vector: dz = J dp."),
        Case("a batch of rows", pair(3, 5), hint="Each row has its own inner product."),
        Case("four axes", pair(2, 3, 4, 5), hint="Attention's shape (B, H, Nq, Nk)."),
        Case("axis=0", pair(4, 3, axis=0), {"axis": 0}, hint="p sums to 1 down the columns."),
        Case("a middle axis", pair(2, 5, 3, axis=1), {"axis": 1}, hint="p sums to 1 on axis 1."),
        Case("one class", pair(4, 1), hint="p is 1 whatever z is: no gradient."),
        Case("peaked p", pair(3, 5, spread=4.0), hint="Most of each row in one entry."),
        Case(
            "zeros in p",
            (rng.normal(size=(4, 6)), _pairwise_softmax(rng.permuted(logits, axis=1), -1)),
            hint="Entries ruled out get no gradient.",
        ),
        Case(
            "upstream in one entry",
            (one_entry, _probabilities(rng, 3, 5)),
            hint="One entry of p matters to the loss, yet its whole row of z moves.",
        ),
        Case(
            "constant upstream in some rows",
            (rng.permutation(constant), _probabilities(rng, 4, 6)),
            hint="A row of p always sums to 1: where dp is constant along it, dz is 0.",
        ),
        Case(
            "large upstream",
            (1e4 * rng.normal(size=(3, 5)), _probabilities(rng, 3, 5)),
            hint="The gradient is linear in dp.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(dp), scattered(p)),
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 input",
            (dp32.astype(np.float32), p32.astype(np.float32)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _cross_entropy_cases(rng: Rng) -> list[Case]:
    def batch(b: int, k: int, spread: float = 2.0) -> tuple[Array, Array]:
        return spread * rng.normal(size=(b, k)), rng.integers(k, size=b)

    logits, targets = batch(5, 3)
    single, single_targets = batch(4, 6)
    gaps = rng.uniform(-1e4, 1e4, size=(3, 5))
    far_apart = rng.normal(size=(3, 5)) + np.array([[0.0], [1e4], [-1e4]])
    return [
        Case("a batch", batch(4, 6), hint="Mean over the 4 rows, of loss and of gradient."),
        Case("one example", batch(1, 5), hint="B = 1: mean and sum are the same."),
        Case("one class", batch(4, 1), hint="p = 1: no loss and no gradient."),
        Case(
            "all targets alike",
            (2 * rng.normal(size=(5, 4)), np.full(5, rng.integers(4))),
            hint="Every row has the same target.",
        ),
        Case(
            "label smoothing 0.1",
            batch(4, 6),
            {"label_smoothing": 0.1},
            hint="A tenth of the target's weight is spread over all 6 classes, target included.",
        ),
        Case(
            "label smoothing 0.4 of two classes",
            batch(5, 2),
            {"label_smoothing": 0.4},
            hint="With K = 2 the target keeps 0.8.",
        ),
        Case(
            "large logits",
            (gaps, np.argmin(gaps, axis=1)),
            hint="The target is the least likely class: the loss is the gap, about 1e4.",
        ),
        Case(
            "large logits and smoothing",
            (rng.uniform(-1e4, 1e4, size=(3, 5)), rng.integers(5, size=3)),
            {"label_smoothing": 0.2},
            hint="Every class now has weight in the loss, so every log-probability counts.",
        ),
        Case(
            "rows far apart",
            (rng.permutation(far_apart), rng.integers(5, size=3)),
            hint="Rows near 0, 1e4 and -1e4: each row needs its own maximum.",
        ),
        Case(
            "not contiguous in memory",
            (scattered(logits), targets),
            {"label_smoothing": 0.1},
            hint="The same numbers in another memory order.",
        ),
        Case(
            "float32 logits",
            (single.astype(np.float32), single_targets),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- oracles: the same values by another road ----------------------------------------------


@quiet
def _pairwise_softmax(z: Array, axis: int = -1) -> Array:
    """``p_i = 1 / sum_j exp(z_j - z_i)``: the definition divided through by its numerator."""
    rows = np.moveaxis(np.asarray(z, float), axis, -1)
    gaps = rows[..., None, :] - rows[..., :, None]
    p = 1 / np.exp(np.where(np.isneginf(rows[..., None, :]), -np.inf, gaps)).sum(axis=-1)
    return np.moveaxis(np.where(np.isneginf(rows), 0.0, p), -1, axis)


@quiet
def _pairwise_log_softmax(z: Array, axis: int = -1) -> Array:
    """``z`` minus its logsumexp, folded up two entries at a time by ``np.logaddexp``."""
    z = np.asarray(z, float)
    return z - np.logaddexp.reduce(z, axis=axis, keepdims=True)


def _complex_step_jacobian(p: Array) -> Array:
    """``J_ij = Im softmax(log p + i h e_j)_i / h`` over the entries that are not 0."""
    p = np.asarray(p, float)
    alive = np.flatnonzero(p)
    step = 1e-30
    # Row j of the shifted logits is log p with entry j moved by i h.
    exps = p[alive] * np.exp(1j * step * np.eye(alive.size))
    jacobian = np.zeros((p.size, p.size))
    moved = (exps / exps.sum(axis=1, keepdims=True)).imag / step
    jacobian[np.ix_(alive, alive)] = moved.T
    return jacobian


def _jacobian_row_by_row(dp: Array, p: Array, axis: int = -1) -> Array:
    """``J dp`` with the whole Jacobian of every row."""
    dp_rows = np.moveaxis(np.asarray(dp, float), axis, -1)
    p_rows = np.moveaxis(np.asarray(p, float), axis, -1)
    dz = np.empty(p_rows.shape)
    for row in np.ndindex(p_rows.shape[:-1]):
        dz[row] = _complex_step_jacobian(p_rows[row]) @ dp_rows[row]
    return np.moveaxis(dz, -1, axis)


def _cross_entropy_by_complex_step(
    logits: Array, targets: Array, label_smoothing: float = 0.0
) -> tuple[float, Array]:
    """The loss from its definition, its gradient one entry at a time by the complex step."""
    z = np.asarray(logits, float)
    b, k = z.shape
    weights = np.full((b, k), label_smoothing / k)
    weights[np.arange(b), targets] += 1 - label_smoothing
    loss = -(weights * _pairwise_log_softmax(z)).sum() / b

    step = 1e-30
    # Copy j of the logits (first axis) has its column j moved by i h.
    moved = (z - z.max(axis=1, keepdims=True)) + 1j * step * np.eye(k)[:, None, :]
    logsumexp = np.log(np.exp(moved).sum(axis=-1, keepdims=True))
    losses = (weights * (logsumexp - moved)).sum(axis=-1)
    return float(loss), losses.imag.T / step / b


# --- mistakes: softmax ----------------------------------------------------------------------


def _softmax_without_max(z, axis=-1):
    e = np.exp(z)
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_global_max(z, axis=-1):
    e = np.exp(z - z.max())
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_sum_over_first(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=0, keepdims=True)


def _softmax_all_over_first(z, axis=-1):
    return library.softmax(z, axis=0)


def _softmax_over_everything(z, axis=-1):
    e = np.exp(z - z.max())
    return e / e.sum()


def _softmax_sum_over_everything(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum()


def _softmax_no_keepdims(z, axis=-1):
    e = np.exp(z - z.max(axis=axis))
    return e / e.sum(axis=axis)


def _softmax_no_keepdims_in_max(z, axis=-1):
    e = np.exp(z - z.max(axis=axis))
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_no_keepdims_in_sum(z, axis=-1):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis)


def _softmax_last_axis(z, axis=-1):
    return library.softmax(z)


def _softmax_largest_magnitude(z, axis=-1):
    e = np.exp(z - np.abs(z).max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_minimum(z, axis=-1):
    e = np.exp(z - z.min(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_divided_by_max(z, axis=-1):
    e = np.exp(z / z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _softmax_standardised(z, axis=-1):
    e = np.exp(z - z.mean(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _sigmoid(z, axis=-1):
    return 1 / (1 + np.exp(-z))


def _one_hot(z, axis=-1):
    return (z == z.max(axis=axis, keepdims=True)).astype(float)


def _softmax_clipped(limit):
    def answer(z, axis=-1):
        return library.softmax(np.clip(z, -limit, limit), axis=axis)

    return answer


def _softmax_peak_one(z, axis=-1):
    return np.exp(z - z.max(axis=axis, keepdims=True))


SOFTMAX = Exercise(
    id="softmax",
    chapter=CHAPTER,
    title="Softmax that does not overflow",
    points=2,
    returns=("p",),
    reference=library.softmax,
    oracle=_pairwise_softmax,
    cases=_logit_cases,
    tokens=("p",),
    mistakes=(
        *named(
            "no max subtraction",
            "exp overflows to inf above 709, and inf / inf is NaN: subtract each row's maximum "
            "first, which leaves the ratio as it is.",
            STABLE,
            _softmax_without_max,
        ),
        *named(
            "max over the whole array",
            "One maximum for all rows pushes the lower rows so far down that their exponentials "
            "are all 0, and 0 / 0 is NaN: take the maximum along the axis.",
            STABLE,
            _softmax_global_max,
        ),
        *named(
            "normalised over the wrong axis",
            "The sum has to run along the axis whose entries compete with each other, and only "
            "along it: there each slice must sum to 1.",
            DEFINITION,
            _softmax_sum_over_first,
            _softmax_all_over_first,
            _softmax_over_everything,
            _softmax_sum_over_everything,
        ),
        *named(
            "keepdims forgotten",
            "Without keepdims=True a (B, N) array meets a sum of shape (B,), which broadcasts "
            "along the wrong axis or not at all.",
            SHAPES,
            _softmax_no_keepdims,
            _softmax_no_keepdims_in_max,
            _softmax_no_keepdims_in_sum,
        ),
        *named(
            "axis argument ignored",
            "The result is the softmax along the last axis whatever axis says: pass axis to both "
            "the maximum and the sum.",
            DEFINITION,
            _softmax_last_axis,
        ),
        *named(
            "largest magnitude subtracted",
            "The maximum of |z| is not the maximum of z: a row of large negative logits is pushed "
            "down further still, to exponentials that are all 0.",
            STABLE,
            _softmax_largest_magnitude,
        ),
        *named(
            "minimum or mean subtracted",
            "Only the maximum makes every exponent at most 0; after any other shift exp can still "
            "overflow.",
            STABLE,
            _softmax_minimum,
            _softmax_standardised,
        ),
        *named(
            "divided by the maximum",
            "Softmax is unchanged by subtracting from the logits, not by scaling them: "
            "z / max(z) is another distribution.",
            STABLE,
            _softmax_divided_by_max,
        ),
        *named(
            "logits clipped",
            "Clipping keeps exp finite by changing the logits: those beyond the limit all become "
            "equal, and -inf is no longer ruled out.",
            STABLE,
            *(_softmax_clipped(limit) for limit in (50, 100, 20, 500, 700, 709, 30, 10)),
        ),
        *named(
            "sigmoid instead of softmax",
            "1 / (1 + exp(-z)) looks at one logit at a time; softmax weighs each against all "
            "others of its row, so that they sum to 1.",
            DEFINITION,
            _sigmoid,
        ),
        *named(
            "one-hot of the maximum",
            "The largest logit gets the most of the probability, not all of it.",
            DEFINITION,
            _one_hot,
        ),
        *named(
            "not normalised",
            "exp(z - max) has its largest entry at 1; it still has to be divided by its sum.",
            DEFINITION,
            _softmax_peak_one,
        ),
    ),
)


# --- mistakes: log_softmax ------------------------------------------------------------------


def _log_of_softmax(z, axis=-1):
    return np.log(library.softmax(z, axis=axis))


def _log_softmax_without_max(z, axis=-1):
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


def _log_of_unstable_softmax(z, axis=-1):
    return np.log(_softmax_without_max(z, axis=axis))


def _log_softmax_max_lost(z, axis=-1):
    peak = z.max(axis=axis, keepdims=True)
    return z - np.log(np.exp(z - peak).sum(axis=axis, keepdims=True))


def _log_softmax_max_twice(z, axis=-1):
    peak = z.max(axis=axis, keepdims=True)
    return z - peak - (peak + np.log(np.exp(z - peak).sum(axis=axis, keepdims=True)))


def _log_softmax_global_max(z, axis=-1):
    peak = z.max()
    return z - peak - np.log(np.exp(z - peak).sum(axis=axis, keepdims=True))


def _log_softmax_sum_over_first(z, axis=-1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=0, keepdims=True))


def _log_softmax_all_over_first(z, axis=-1):
    return library.log_softmax(z, axis=0)


def _log_softmax_over_everything(z, axis=-1):
    shifted = z - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def _log_softmax_sum_over_everything(z, axis=-1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum())


def _log_softmax_last_axis(z, axis=-1):
    return library.log_softmax(z)


def _log_softmax_no_keepdims(z, axis=-1):
    shifted = z - z.max(axis=axis)
    return shifted - np.log(np.exp(shifted).sum(axis=axis))


def _log_softmax_no_keepdims_in_sum(z, axis=-1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis))


def _log_softmax_no_keepdims_in_max(z, axis=-1):
    shifted = z - z.max(axis=axis)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _negative_log_softmax(z, axis=-1):
    return -library.log_softmax(z, axis=axis)


def _log_softmax_no_log(z, axis=-1):
    shifted = z - z.max(axis=axis, keepdims=True)
    return shifted - np.exp(shifted).sum(axis=axis, keepdims=True)


def _log_softmax_with_epsilon(epsilon):
    def answer(z, axis=-1):
        return np.log(library.softmax(z, axis=axis) + epsilon)

    return answer


def _log_softmax_clipped(epsilon):
    def answer(z, axis=-1):
        return np.log(np.maximum(library.softmax(z, axis=axis), epsilon))

    return answer


EPSILONS = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12, 1e-15, 1e-16, 1e-20, 1e-30, 1e-300)

LOG_SOFTMAX = Exercise(
    id="log_softmax",
    chapter=CHAPTER,
    title="Log-softmax without taking the logarithm of 0",
    points=2,
    returns=("logp",),
    reference=library.log_softmax,
    oracle=_pairwise_log_softmax,
    cases=_logit_cases,
    tokens=("logp",),
    mistakes=(
        *named(
            "log of softmax",
            "A probability below 1e-308 has already become 0 when the logarithm is taken, so a "
            "gap of 1000 gives -inf instead of -1000.",
            LOGSUMEXP,
            _log_of_softmax,
        ),
        *named(
            "logsumexp without max",
            "log(sum(exp(z))) overflows above 709 and is log(0) below -745: take the maximum out "
            "of the sum and add it back after the logarithm.",
            LOGSUMEXP,
            _log_softmax_without_max,
            _log_of_unstable_softmax,
        ),
        *named(
            "maximum not added back",
            "logsumexp(z) = max + log(sum(exp(z - max))): without the maximum the result is off "
            "by a constant in every row, and exp of it does not sum to 1.",
            LOGSUMEXP,
            _log_softmax_max_lost,
        ),
        *named(
            "maximum subtracted twice",
            "The maximum is taken off the logits and then again as part of the logsumexp; once "
            "is enough.",
            LOGSUMEXP,
            _log_softmax_max_twice,
        ),
        *named(
            "max over the whole array",
            "One maximum for all rows makes every exponential of the lower rows 0, and log(0) is "
            "-inf: take the maximum along the axis.",
            STABLE,
            _log_softmax_global_max,
        ),
        *named(
            "normalised over the wrong axis",
            "The sum under the logarithm has to run along axis, and only along it.",
            DEFINITION,
            _log_softmax_sum_over_first,
            _log_softmax_all_over_first,
            _log_softmax_over_everything,
            _log_softmax_sum_over_everything,
        ),
        *named(
            "axis argument ignored",
            "The result is the log-softmax along the last axis whatever axis says.",
            DEFINITION,
            _log_softmax_last_axis,
        ),
        *named(
            "keepdims forgotten",
            "Without keepdims=True a (B, N) array meets a sum of shape (B,), which broadcasts "
            "along the wrong axis or not at all.",
            SHAPES,
            _log_softmax_no_keepdims,
            _log_softmax_no_keepdims_in_sum,
            _log_softmax_no_keepdims_in_max,
        ),
        *named(
            "small number added under the log",
            "A small number under the logarithm keeps it finite by changing the answer: every "
            "log-probability below log(epsilon) comes out as log(epsilon).",
            LOGSUMEXP,
            *(_log_softmax_with_epsilon(epsilon) for epsilon in EPSILONS),
            *(_log_softmax_clipped(epsilon) for epsilon in EPSILONS),
        ),
        *named(
            "sign",
            "This is -log p, which is a loss; log p is never above 0.",
            LOGSUMEXP,
            _negative_log_softmax,
        ),
        *named(
            "sum of exponentials without its log",
            "The normaliser is subtracted in the log domain, so it is log(sum(exp)) that is "
            "subtracted, not the sum.",
            LOGSUMEXP,
            _log_softmax_no_log,
        ),
    ),
)


# --- mistakes: softmax_jacobian -------------------------------------------------------------


def _jacobian_diagonal_only(p):
    return np.diag(p * (1 - p))


def _jacobian_sign(p):
    return np.diag(p) + np.outer(p, p)


def _jacobian_sign_off_diagonal(p):
    return np.diag(p * (1 - p)) + np.outer(p, p) * (1 - np.eye(p.size))


def _jacobian_outer(p):
    return -np.outer(p, p)


def _jacobian_outer_positive(p):
    return np.outer(p, p)


def _jacobian_negated(p):
    return np.outer(p, p) - np.diag(p)


def _jacobian_diag_p(p):
    return np.diag(p)


def _jacobian_transposed_vector(p):
    return np.diag(p) - p * p.T


def _jacobian_inner(p):
    return np.diag(p) - p @ p.T


def _jacobian_of_softmax_of_p(p):
    again = library.softmax(p)
    return np.diag(again) - np.outer(again, again)


def _jacobian_eye(p):
    return np.eye(p.size) - np.outer(p, p)


def _jacobian_vector(p):
    return p * (1 - p)


def _jacobian_row_scaled(p):
    return np.outer(p, 1 - p)


JACOBIAN_EXERCISE = Exercise(
    id="softmax_jacobian",
    chapter=CHAPTER,
    title="The whole derivative, N by N",
    points=2,
    returns=("jacobian",),
    reference=library.softmax_jacobian,
    oracle=_complex_step_jacobian,
    cases=_jacobian_cases,
    tokens=("jacobian",),
    mistakes=(
        *named(
            "diagonal only",
            "Raising one logit lowers every other probability, so the entries off the diagonal "
            "are -p_i p_j, not 0.",
            JACOBIAN,
            _jacobian_diagonal_only,
        ),
        *named(
            "p pᵀ sign",
            "The outer product is subtracted: with a plus the rows do not sum to 0, although the "
            "probabilities always sum to 1.",
            JACOBIAN,
            _jacobian_sign,
            _jacobian_sign_off_diagonal,
        ),
        *named(
            "outer product only",
            "The term with i = j of the numerator is missing: diag(p) has to be added.",
            JACOBIAN,
            _jacobian_outer,
            _jacobian_outer_positive,
        ),
        *named(
            "negated",
            "All signs are turned over: raising a logit raises its own probability, so the "
            "diagonal p_i (1 - p_i) is positive.",
            JACOBIAN,
            _jacobian_negated,
        ),
        *named(
            "outer product missing",
            "diag(p) is the derivative of the numerator alone; the normaliser depends on every "
            "logit too and contributes -p pᵀ.",
            JACOBIAN,
            _jacobian_diag_p,
        ),
        *named(
            "p.T of a vector",
            "A one-dimensional array has no transpose: p * p.T is a vector of squares and "
            "p @ p.T is a number; use np.outer(p, p) or p[:, None] * p.",
            SHAPES,
            _jacobian_transposed_vector,
            _jacobian_inner,
        ),
        *named(
            "softmax applied again",
            "The argument is already p, the probabilities, not the logits.",
            JACOBIAN,
            _jacobian_of_softmax_of_p,
        ),
        *named(
            "identity instead of diag(p)",
            "J_ij = p_i (δ_ij - p_j): the factor p_i belongs to both terms.",
            JACOBIAN,
            _jacobian_eye,
        ),
        *named(
            "δ taken as 1",
            "p_i (1 - p_j) is right on the diagonal only: off it δ_ij is 0 and the entry is "
            "-p_i p_j.",
            JACOBIAN,
            _jacobian_row_scaled,
        ),
        *named(
            "a vector instead of a matrix",
            "p (1 - p) is only the diagonal of the Jacobian; the result has a row for every "
            "probability and a column for every logit.",
            JACOBIAN,
            _jacobian_vector,
        ),
    ),
)


# --- mistakes: softmax_backward -------------------------------------------------------------


def _backward_no_row_sum(dp, p, axis=-1):
    return p * dp


def _backward_diagonal(dp, p, axis=-1):
    return dp * p * (1 - p)


def _backward_sum_over_all(dp, p, axis=-1):
    return p * (dp - (p * dp).sum())


def _backward_upstream_twice(dp, p, axis=-1):
    return dp * library.softmax_backward(dp, p, axis=axis)


def _backward_unweighted_sum(dp, p, axis=-1):
    return p * (dp - dp.sum(axis=axis, keepdims=True))


def _backward_mean(dp, p, axis=-1):
    return p * (dp - (p * dp).mean(axis=axis, keepdims=True))


def _backward_unweighted_mean(dp, p, axis=-1):
    return p * (dp - dp.mean(axis=axis, keepdims=True))


def _backward_last_axis(dp, p, axis=-1):
    return p * (dp - (p * dp).sum(axis=-1, keepdims=True))


def _backward_first_axis(dp, p, axis=-1):
    return p * (dp - (p * dp).sum(axis=0, keepdims=True))


def _backward_p_forgotten(dp, p, axis=-1):
    return p * dp - (p * dp).sum(axis=axis, keepdims=True)


def _backward_p_outside(dp, p, axis=-1):
    return dp - (p * dp).sum(axis=axis, keepdims=True)


def _backward_sign(dp, p, axis=-1):
    return p * (dp + (p * dp).sum(axis=axis, keepdims=True))


def _backward_negated(dp, p, axis=-1):
    return -library.softmax_backward(dp, p, axis=axis)


def _backward_no_keepdims(dp, p, axis=-1):
    return p * (dp - (p * dp).sum(axis=axis))


def _backward_of_softmax_of_p(dp, p, axis=-1):
    return library.softmax_backward(dp, library.softmax(p, axis=axis), axis=axis)


def _backward_p_times_dp_twice(dp, p, axis=-1):
    return p * (p * dp - (p * dp).sum(axis=axis, keepdims=True))


BACKWARD_EXERCISE = Exercise(
    id="softmax_backward",
    chapter=CHAPTER,
    title="The vector-Jacobian product, without the Jacobian",
    points=3,
    returns=("dz",),
    reference=library.softmax_backward,
    oracle=_jacobian_row_by_row,
    cases=_backward_cases,
    tokens=("dz",),
    mistakes=(
        *named(
            "row sum dropped",
            "p * dp treats the normaliser as a constant; it depends on every logit of the row, "
            "which subtracts the row's sum of p * dp from dp.",
            BACKWARD,
            _backward_no_row_sum,
        ),
        *named(
            "diagonal p(1-p)",
            "p (1 - p) is only the diagonal of the Jacobian, right for a sigmoid: the entries "
            "off the diagonal carry gradient from every p of the row to every logit.",
            BACKWARD,
            _backward_diagonal,
        ),
        *named(
            "sum over all axes",
            "The inner product is taken within each slice along axis; one sum over the whole "
            "array mixes rows that have nothing to do with each other.",
            BACKWARD,
            _backward_sum_over_all,
        ),
        *named(
            "multiplied by upstream twice",
            "dp enters once, as the vector that J is applied to; the result is not multiplied by "
            "it again, and is linear in it.",
            BACKWARD,
            _backward_upstream_twice,
        ),
        *named(
            "row sum not weighted by p",
            "What is subtracted from dp is its average under p, sum(p * dp), not its plain sum "
            "or mean.",
            BACKWARD,
            _backward_unweighted_sum,
            _backward_unweighted_mean,
        ),
        *named(
            "mean instead of sum",
            "p already sums to 1, so sum(p * dp) is an average; dividing by N once more makes it "
            "too small.",
            BACKWARD,
            _backward_mean,
        ),
        *named(
            "axis argument ignored",
            "The inner product runs along the last axis whatever axis says.",
            BACKWARD,
            _backward_last_axis,
        ),
        *named(
            "sum over the wrong axis",
            "The inner product runs along the axis on which p sums to 1.",
            BACKWARD,
            _backward_first_axis,
        ),
        *named(
            "p not multiplied into both terms",
            "dz = p * (dp - sum(p * dp)): the outer p belongs to dp and to the sum alike.",
            BACKWARD,
            _backward_p_forgotten,
            _backward_p_outside,
        ),
        *named(
            "sign",
            "The row sum is subtracted from dp, and the whole is not negated: a row of dz always "
            "sums to 0.",
            BACKWARD,
            _backward_sign,
            _backward_negated,
        ),
        *named(
            "keepdims forgotten",
            "Without keepdims=True the row sums have shape (B,) and do not line up with the rows "
            "of a (B, N) array.",
            SHAPES,
            _backward_no_keepdims,
        ),
        *named(
            "softmax applied again",
            "The second argument is already p, the probabilities, not the logits.",
            BACKWARD,
            _backward_of_softmax_of_p,
        ),
        *named(
            "p * dp multiplied by p again",
            "dz = p * dp - p * sum(p * dp): p enters the first term once.",
            BACKWARD,
            _backward_p_times_dp_twice,
        ),
    ),
)


# --- mistakes: cross_entropy ----------------------------------------------------------------


def _targets(logits: Array, targets: Array, label_smoothing: float) -> Array:
    """The distribution that p is compared with, one row an example."""
    k = logits.shape[1]
    return (1 - label_smoothing) * np.eye(k)[targets] + label_smoothing / k


def _loss(logp: Array, weights: Array) -> Any:
    return -(weights * logp).sum() / len(logp)


def _ce_sum_gradient(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss, dlogits * len(logits)


def _ce_sum_both(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss * len(logits), dlogits * len(logits)


def _ce_sum_loss(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss * len(logits), dlogits


def _ce_divided_by_all(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss / logits.shape[1], dlogits / logits.shape[1]


def _ce_gradient_divided_by_all(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss, dlogits / logits.shape[1]


def _ce_gradient_divided_by_classes(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss, dlogits * len(logits) / logits.shape[1]


def _ce_softmax_twice(logits, targets, label_smoothing=0.0):
    return library.cross_entropy(library.softmax(logits), targets, label_smoothing)


def _ce_softmax_twice_in_loss(logits, targets, label_smoothing=0.0):
    loss, _ = _ce_softmax_twice(logits, targets, label_smoothing)
    return loss, library.cross_entropy(logits, targets, label_smoothing)[1]


def _ce_softmax_twice_in_gradient(logits, targets, label_smoothing=0.0):
    _, dlogits = _ce_softmax_twice(logits, targets, label_smoothing)
    return library.cross_entropy(logits, targets, label_smoothing)[0], dlogits


def _ce_smoothing_over_others(logits, targets, label_smoothing=0.0):
    k = logits.shape[1]
    onehot = np.eye(k)[targets]
    spread = label_smoothing / (k - 1) if k > 1 else 0.0
    weights = (1 - label_smoothing) * onehot + spread * (1 - onehot)
    loss = _loss(library.log_softmax(logits), weights)
    return loss, (library.softmax(logits) - weights) / len(logits)


def _ce_smoothing_not_in_gradient(logits, targets, label_smoothing=0.0):
    loss, _ = library.cross_entropy(logits, targets, label_smoothing)
    return loss, library.cross_entropy(logits, targets)[1]


def _ce_smoothing_not_in_loss(logits, targets, label_smoothing=0.0):
    _, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return library.cross_entropy(logits, targets)[0], dlogits


def _ce_smoothing_ignored(logits, targets, label_smoothing=0.0):
    return library.cross_entropy(logits, targets)


def _ce_smoothing_added(logits, targets, label_smoothing=0.0):
    k = logits.shape[1]
    weights = np.eye(k)[targets] + label_smoothing / k
    loss = _loss(library.log_softmax(logits), weights)
    return loss, (library.softmax(logits) - weights) / len(logits)


def _ce_smoothing_not_divided(logits, targets, label_smoothing=0.0):
    weights = (1 - label_smoothing) * np.eye(logits.shape[1])[targets] + label_smoothing
    loss = _loss(library.log_softmax(logits), weights)
    return loss, (library.softmax(logits) - weights) / len(logits)


def _ce_gradient_sign(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss, -dlogits


def _ce_loss_sign(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return -loss, dlogits


def _ce_both_signs(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return -loss, -dlogits


def _ce_columns(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    logp = library.log_softmax(logits, axis=0)
    return _loss(logp, weights), (np.exp(logp) - weights) / len(logits)


def _ce_loss_a_row(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    losses = -(weights * library.log_softmax(logits)).sum(axis=1)
    return losses, library.cross_entropy(logits, targets, label_smoothing)[1]


def _ce_through_softmax_again(logits, targets, label_smoothing=0.0):
    loss, dlogits = library.cross_entropy(logits, targets, label_smoothing)
    return loss, library.softmax_backward(dlogits, library.softmax(logits))


def _ce_target_not_subtracted(logits, targets, label_smoothing=0.0):
    loss, _ = library.cross_entropy(logits, targets, label_smoothing)
    return loss, library.softmax(logits) / len(logits)


def _ce_log_of_softmax(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    p = library.softmax(logits)
    return _loss(np.log(p), weights), (p - weights) / len(logits)


def _ce_log_of_softmax_picked(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    p = library.softmax(logits)
    logp = np.log(p)
    picked = logp[np.arange(len(p)), targets].mean()
    loss = -(1 - label_smoothing) * picked - label_smoothing * logp.mean()
    return loss, (p - weights) / len(logits)


def _ce_log_of_softmax_branched(logits, targets, label_smoothing=0.0):
    if label_smoothing:
        return _ce_log_of_softmax(logits, targets, label_smoothing)
    loss, _ = _ce_log_of_softmax_picked(logits, targets)
    return loss, library.cross_entropy(logits, targets)[1]


def _ce_without_max(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    p = _softmax_without_max(logits)
    logp = _log_softmax_without_max(logits)
    return _loss(logp, weights), (p - weights) / len(logits)


def _ce_without_max_picked(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    p = _softmax_without_max(logits)
    logp = np.log(p)
    picked = logp[np.arange(len(p)), targets].mean()
    loss = -(1 - label_smoothing) * picked - label_smoothing * logp.mean()
    return loss, (p - weights) / len(logits)


def _ce_without_max_dense(logits, targets, label_smoothing=0.0):
    weights = _targets(logits, targets, label_smoothing)
    p = _softmax_without_max(logits)
    return _loss(np.log(p), weights), (p - weights) / len(logits)


def _ce_with_epsilon(epsilon):
    def answer(logits, targets, label_smoothing=0.0):
        weights = _targets(logits, targets, label_smoothing)
        p = library.softmax(logits)
        return _loss(np.log(p + epsilon), weights), (p - weights) / len(logits)

    return answer


CROSS_ENTROPY_EXERCISE = Exercise(
    id="cross_entropy",
    chapter=CHAPTER,
    title="Cross-entropy with label smoothing, loss and gradient",
    points=3,
    returns=("loss", "dlogits"),
    reference=library.cross_entropy,
    oracle=_cross_entropy_by_complex_step,
    cases=_cross_entropy_cases,
    tokens=("dlogits",),
    mistakes=(
        *named(
            "gradient not divided by B",
            "The loss is a mean over the batch, so each row of its gradient carries 1/B.",
            CROSS_ENTROPY,
            _ce_sum_gradient,
        ),
        *named(
            "softmax applied twice",
            "The log-softmax is taken of logits; given probabilities it sees numbers between 0 "
            "and 1 and cannot become confident.",
            CROSS_ENTROPY,
            _ce_softmax_twice,
            _ce_softmax_twice_in_loss,
            _ce_softmax_twice_in_gradient,
        ),
        *named(
            "smoothing spread over K-1 classes",
            "Here, as in PyTorch, the smoothing is spread over all K classes: the target has "
            "1 - ε + ε/K and every other class ε/K.",
            LABEL_SMOOTHING,
            _ce_smoothing_over_others,
        ),
        *named(
            "smoothing forgotten in the gradient",
            "The gradient is (p - q) / B with the same smoothed q as in the loss, not with the "
            "one-hot target.",
            LABEL_SMOOTHING,
            _ce_smoothing_not_in_gradient,
        ),
        *named(
            "smoothing forgotten in the loss",
            "The loss has to use the smoothed target that the gradient uses.",
            LABEL_SMOOTHING,
            _ce_smoothing_not_in_loss,
        ),
        *named(
            "label_smoothing ignored",
            "Loss and gradient are those of the one-hot target whatever label_smoothing says.",
            LABEL_SMOOTHING,
            _ce_smoothing_ignored,
        ),
        *named(
            "smoothed target does not sum to 1",
            "What is spread over the classes has to be taken off the target: it keeps 1 - ε, and "
            "every class, itself included, gets ε/K.",
            LABEL_SMOOTHING,
            _ce_smoothing_added,
            _ce_smoothing_not_divided,
        ),
        *named(
            "loss summed over the batch",
            "The loss is the mean over the B rows, not their sum.",
            CROSS_ENTROPY,
            _ce_sum_both,
            _ce_sum_loss,
        ),
        *named(
            "divided by the number of classes",
            "The mean is over the batch only; the sum over classes belongs to each row's loss.",
            CROSS_ENTROPY,
            _ce_divided_by_all,
            _ce_gradient_divided_by_all,
            _ce_gradient_divided_by_classes,
        ),
        *named(
            "sign",
            "The loss is -sum(q log p), never negative, and its gradient is p - q: it pushes the "
            "target's logit up when one steps against it.",
            CROSS_ENTROPY,
            _ce_gradient_sign,
            _ce_loss_sign,
            _ce_both_signs,
        ),
        *named(
            "normalised over the wrong axis",
            "Each row of the batch has its own softmax over its K classes; axis 0 is the batch.",
            DEFINITION,
            _ce_columns,
        ),
        *named(
            "loss not averaged",
            "The loss is one number, the mean over the rows, not a loss for each of them.",
            CROSS_ENTROPY,
            _ce_loss_a_row,
        ),
        *named(
            "softmax derivative applied twice",
            "p - q is already the gradient by the logits; it does not go through softmax's "
            "backward pass again.",
            CROSS_ENTROPY,
            _ce_through_softmax_again,
        ),
        *named(
            "target not subtracted",
            "The gradient is (p - q) / B; p alone is the gradient of the logsumexp.",
            CROSS_ENTROPY,
            _ce_target_not_subtracted,
        ),
        *named(
            "log of softmax",
            "A target that softmax has rounded to 0 costs -log 0 = inf, and 0 * -inf is NaN: use "
            "the log-softmax.",
            LOGSUMEXP,
            _ce_log_of_softmax,
            _ce_log_of_softmax_picked,
            _ce_log_of_softmax_branched,
        ),
        *named(
            "no max subtraction",
            "exp of a large logit overflows to inf, and inf / inf is NaN.",
            STABLE,
            _ce_without_max,
            _ce_without_max_picked,
            _ce_without_max_dense,
        ),
        *named(
            "small number added under the log",
            "log(p + epsilon) caps the loss at -log(epsilon): a confident wrong answer then "
            "costs no more than that.",
            LOGSUMEXP,
            *(_ce_with_epsilon(epsilon) for epsilon in EPSILONS),
        ),
    ),
)

EXERCISES = (
    SOFTMAX,
    LOG_SOFTMAX,
    JACOBIAN_EXERCISE,
    BACKWARD_EXERCISE,
    CROSS_ENTROPY_EXERCISE,
)
