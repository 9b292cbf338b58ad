"""Chapter 11: prediction, the Riccati step, MPC's quadratic program, its residuals, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attn_lessons import control as library
from attn_lessons.grading.catalogue._parts import left_factor, named, scattered
from attn_lessons.grading.exercise import Case, Exercise, Intermediate

CHAPTER = "ch11_control"
SHAPES = f"{CHAPTER}.html#ch11-shapes"
CONDENSE = f"{CHAPTER}.html#ch11-condense"
QP = f"{CHAPTER}.html#ch11-qp"
BOUNDS = f"{CHAPTER}.html#ch11-bounds"
TERMINAL = f"{CHAPTER}.html#ch11-terminal"
INFEASIBLE = f"{CHAPTER}.html#ch11-infeasible"
LQR = f"{CHAPTER}.html#ch11-lqr"
METRICS = f"{CHAPTER}.html#ch11-metrics"

Array = np.ndarray
Rng = np.random.Generator


# --- inputs -----------------------------------------------------------------------------------


def _model(rng: Rng, n: int, m: int) -> tuple[Array, Array]:
    """A plant that neither dies away nor runs off within a few steps; A is not symmetric."""
    a = rng.normal(size=(n, n))
    # Its largest singular value is about 1.3, so that powers of A keep their size.
    a *= 1.3 / np.linalg.norm(a, 2) if n > 1 else 0.9 / abs(a[0, 0])
    return a, rng.normal(size=(n, m))


def _cost(rng: Rng, n: int) -> Array:
    """Symmetric, positive definite, not diagonal, not of scale 1."""
    root = rng.normal(size=(n, n))
    return (root @ root.T / n + 0.3 * np.eye(n)) * rng.uniform(0.5, 3)


def _single(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.astype(np.float32) if isinstance(v, Array) else v for v in values)


def _laid(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(scattered(v) if isinstance(v, Array) and v.ndim > 1 else v for v in values)


def _integrator(dt: float) -> tuple[Array, Array]:
    return np.array([[1.0, dt], [0.0, 1.0]]), np.array([[dt * dt / 2], [dt]])


def _condense_cases(rng: Rng) -> list[Case]:
    def call(n: int, m: int, horizon: int) -> tuple[Any, ...]:
        return (*_model(rng, n, m), horizon)

    dies = np.triu(rng.uniform(0.5, 2, (3, 3)), 1)
    return [
        Case("one step", call(3, 2, 1), hint="N = 1: phi is A, gamma is B."),
        Case("two steps", call(3, 2, 2), hint="x2 = A² x0 + A B u0 + B u1."),
        Case("many steps", call(3, 2, 5), hint="N = 5, three states, two inputs."),
        Case("more inputs than states", call(2, 3, 4), hint="X = 2, U = 3, N = 4."),
        Case("as many inputs as states", call(3, 3, 4), hint="B is square: A B and B A both fit."),
        Case("one state", call(1, 2, 3), hint="A is one number."),
        Case("one input", call(4, 1, 3), hint="B is one column."),
        Case("one number each", call(1, 1, 4), hint="X = U = 1: powers of a number."),
        Case(
            "an integrator",
            (*_integrator(float(rng.uniform(0.1, 0.5))), 5),
            hint="A push now shows in the position later: A has no inverse problem, B is a column.",
        ),
        Case(
            "a plant that forgets",
            (dies, rng.normal(size=(3, 2)), 5),
            hint="A³ = 0: what happened three steps ago is gone.",
        ),
        Case("not contiguous in memory", _laid(call(3, 2, 4)), hint="The same, laid out anew."),
        Case(
            "float32 input",
            _single(call(3, 2, 4)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _riccati_cases(rng: Rng) -> list[Case]:
    def call(n: int, m: int) -> tuple[Any, ...]:
        a, b = _model(rng, n, m)
        return _cost(rng, n), a, b, _cost(rng, n), _cost(rng, m)

    def changed(place: int, value: Array, n: int = 3, m: int = 2) -> tuple[Any, ...]:
        arguments = list(call(n, m))
        arguments[place] = value
        return tuple(arguments)

    loose = np.array([[1.0], [-2.0], [0.5]]) * rng.uniform(0.5, 2)
    return [
        Case("two inputs", call(3, 2), hint="Three states, two inputs."),
        Case("more inputs than states", call(2, 3), hint="X = 2, U = 3."),
        Case("as many inputs as states", call(3, 3), hint="Everything is square."),
        Case("one state", call(1, 2), hint="P is one number."),
        Case("one input", call(4, 1), hint="R + BᵀPB is one number, in a matrix."),
        Case("one number each", call(1, 1), hint="A formula of school algebra."),
        Case(
            "the last step",
            changed(0, np.zeros((3, 3))),
            hint="Nothing is paid afterwards: no input is worth its cost, K = 0 and P⁻ = Q.",
        ),
        Case("inputs that cost little", changed(4, 1e-3 * _cost(rng, 2)), hint="R is small."),
        Case("inputs that cost much", changed(4, 1e3 * _cost(rng, 2)), hint="R is large."),
        Case(
            "a state that costs nothing",
            changed(3, loose @ loose.T),
            hint="Q has rank 1: it has no inverse.",
        ),
        Case(
            "a plant that forgets",
            changed(1, np.triu(rng.uniform(0.5, 2, (3, 3)), 1)),
            hint="A has no inverse.",
        ),
        Case("not contiguous in memory", _laid(call(3, 2)), hint="The same, laid out anew."),
        Case(
            "float32 input",
            _single(call(3, 2)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _limits(rng: Rng, n: int) -> tuple[Array, Array]:
    """Lower and upper limits that are not each other's mirror image."""
    return -rng.uniform(0.5, 1.5, n), rng.uniform(2, 3, n)


def _program_cases(rng: Rng) -> list[Case]:
    def call(n: int, m: int, horizon: int, **changed: Any) -> tuple[Any, ...]:
        a, b = _model(rng, n, m)
        given: dict[str, Any] = {
            "a": a,
            "b": b,
            "q": _cost(rng, n),
            "r": _cost(rng, m),
            "p": _cost(rng, n),
        }
        given |= {"x0": rng.uniform(-0.5, 0.5, n), "horizon": horizon}
        given |= dict(zip(("u_min", "u_max"), _limits(rng, m), strict=True))
        given |= dict(zip(("x_min", "x_max"), _limits(rng, n), strict=True))
        return tuple((given | changed).values())

    half_open = np.array([-np.inf, -1.0, -np.inf]), np.array([np.inf, np.inf, 2.0])
    free = np.full(3, np.inf)
    return [
        Case("one step", call(3, 2, 1), hint="N = 1: z = (x0, x1, u0)."),
        Case("two steps", call(3, 2, 2), hint="N = 2: z = (x0, x1, x2, u0, u1)."),
        Case("many steps", call(2, 3, 4), hint="X = 2, U = 3, N = 4."),
        Case("as many inputs as states", call(3, 3, 3), hint="Shapes cannot help here."),
        Case("as many steps as states", call(3, 2, 3), hint="N = X."),
        Case("one state", call(1, 2, 3), hint="X = 1."),
        Case("one input", call(3, 1, 4), hint="U = 1."),
        Case(
            "some limits are infinite",
            call(3, 2, 3, x_min=half_open[0], x_max=half_open[1]),
            hint="No limit is written as -inf or inf; the row stays.",
        ),
        Case(
            "only inputs are limited",
            call(3, 2, 3, x_min=-free, x_max=free),
            hint="All limits of states are infinite; their rows stay.",
        ),
        Case(
            "a start outside the limits",
            call(3, 2, 3, x0=rng.uniform(4, 5, 3)),
            hint="The program has no solution, and says so: x0 and its limits stay as they are.",
        ),
        Case("a start at rest", call(3, 2, 3, x0=np.zeros(3)), hint="x0 = 0."),
        Case(
            "the end costs as much as the way",
            (lambda given: (*given[:4], given[2], *given[5:]))(call(3, 2, 3)),
            hint="p equals q.",
        ),
        Case("not contiguous in memory", _laid(call(3, 2, 3)), hint="The same, laid out anew."),
        Case(
            "float32 input",
            _single(call(3, 2, 3)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


def _residual_cases(rng: Rng) -> list[Case]:
    def call(n: int, m: int) -> list[Any]:
        lower, upper = _limits(rng, m)
        A = rng.normal(size=(m, n))
        # Some rows inside, some beyond either end.
        return [_cost(rng, n), rng.normal(size=n), A, lower, upper, 2 * rng.normal(size=n),
                rng.normal(size=m)]  # fmt: skip

    def solved() -> list[Any]:
        """A program whose solution is known: some rows at a bound and pushed by it."""
        P, _, A, lower, upper, z, y = call(4, 5)
        values = A @ z
        y = np.array([1.3, -0.7, 0.0, 2.1, 0.0]) * rng.uniform(0.5, 2, 5)
        lower, upper = values - rng.uniform(0.5, 1, 5), values + rng.uniform(0.5, 1, 5)
        lower, upper = np.where(y < 0, values, lower), np.where(y > 0, values, upper)
        return [P, -P @ z - A.T @ y, A, lower, upper, z, y]

    one_sided = call(3, 5)
    one_sided[4] = np.where(np.arange(5) % 2, np.inf, one_sided[4])
    one_sided[3] = np.where(np.arange(5) % 2, one_sided[3], -np.inf)
    one_sided[6] = np.where(np.arange(5) % 2, -1, 1) * np.abs(one_sided[6])
    pushed = call(3, 4)
    pushed[4] = np.where(np.arange(4) == 1, np.inf, pushed[4])
    pushed[6] = np.abs(pushed[6])
    equal = call(4, 3)
    equal[4] = equal[3].copy()
    below, above = call(3, 4), call(3, 4)
    below[3], above[4] = below[2] @ below[5] + [0.2, -1, 0.9, -2], above[2] @ above[5] - 0.7
    below[4], above[3] = below[3] + 5, above[4] - 5
    inside = call(3, 4)
    inside[3], inside[4] = inside[2] @ inside[5] - 1, inside[2] @ inside[5] + 2
    idle = call(3, 4)
    idle[6] = np.zeros(4)
    idle[1] = -idle[0] @ idle[5] * rng.uniform(2, 4)
    free = call(3, 4)
    free[3], free[4], free[6] = np.full(4, -np.inf), np.full(4, np.inf), np.zeros(4)
    return [
        Case("three unknowns", tuple(call(3, 4)), hint="Three unknowns, four rows."),
        Case("more unknowns than rows", tuple(call(5, 2)), hint="n = 5, m = 2."),
        Case("as many rows as unknowns", tuple(call(3, 3)), hint="A is square: A z and Aᵀ z fit."),
        Case("one unknown", tuple(call(1, 1)), hint="n = m = 1."),
        Case(
            "a solution",
            tuple(solved()),
            hint="Bounds kept, slope 0, gap 0: all three vanish but for rounding.",
            atol=1e-10,
        ),
        Case("below its bounds", tuple(below), hint="Some rows are under l, none over u."),
        Case("above its bounds", tuple(above), hint="Every row is over u."),
        Case("within its bounds", tuple(inside), hint="No row is violated: primal is 0, not less."),
        Case(
            "nothing pushes",
            tuple(idle),
            hint="y = 0: no multiplier in slope or gap, and zᵀPz + qᵀz is negative.",
        ),
        Case(
            "infinite bounds",
            tuple(one_sided),
            hint="Every other row has one bound only; y pushes at the one it has.",
        ),
        Case(
            "no bounds at all",
            tuple(free),
            hint="l = -inf, u = inf, y = 0: inf · 0 is no number, and no part of the gap.",
        ),
        Case(
            "pushed by a bound that is not there",
            tuple(pushed),
            hint="A multiplier that is not 0 at an infinite bound: the gap is infinite.",
        ),
        Case("equalities", tuple(equal), hint="l = u in every row: y may have either sign."),
        Case("not contiguous in memory", _laid(tuple(call(3, 4))), hint="Laid out anew."),
    ]


def _metrics_cases(rng: Rng) -> list[Case]:
    def call(steps: int, n: int, m: int, **changed: Any) -> tuple[Any, ...]:
        """An episode that comes to rest near 0, within the limits for most of its steps."""
        fade = 0.55 ** np.arange(steps + 1)[:, None]
        given: dict[str, Any] = {"x": fade * rng.choice([-1, 1], n) * rng.uniform(1, 2, n)}
        given["x"] = given["x"] + 0.01 * rng.normal(size=(steps + 1, n))
        given["u"] = rng.uniform(-0.4, 0.4, (steps, m))
        given |= {"q": _cost(rng, n), "r": _cost(rng, m)}
        given |= {"x_min": np.full(n, -0.7), "x_max": np.full(n, 0.6)}
        given |= {"u_min": np.full(m, -0.5), "u_max": np.full(m, 0.7), "band": 0.15}
        return tuple((given | changed).values())

    def with_states(states: list[list[float]], m: int = 1, **changed: Any) -> tuple[Any, ...]:
        shaken = np.array(states) * rng.uniform(0.97, 1.03)
        return call(len(states) - 1, len(states[0]), m, x=shaken, **changed)

    wild = rng.choice([-1, 1], (7, 2)) * rng.uniform(0.75, 2, (7, 2))
    wild[[1, 4]] = rng.uniform(-0.3, 0.3, (2, 2))
    open_ends = {"x_min": np.array([-np.inf, -0.7]), "x_max": np.array([np.inf, np.inf])}
    back = [[1.0, 0.5], [0.1, 0.05], [0.1, -0.1], [0.4, 0.1], [0.1, 0.12], [0.05, 0.1], [0.0, 0.1]]
    return [
        Case("two states", call(8, 2, 1), hint="Eight steps: x has a row more than u."),
        Case("more inputs than states", call(7, 2, 3), hint="T = 7, X = 2, U = 3."),
        Case("one state", call(6, 1, 2), hint="X = 1."),
        Case("one step", call(1, 3, 2), hint="T = 1: two states, one input."),
        Case(
            "in the band and out again",
            with_states(back, x_max=np.full(2, 2.0)),
            hint="It is within the band at step 1, leaves it at step 3, and settles at step 4.",
        ),
        Case(
            "never settled",
            with_states([[1.0], [0.1], [0.05], [0.1], [0.5]]),
            hint="The last state is outside the band: settling is inf.",
        ),
        Case(
            "settled from the start",
            with_states([[0.1, -0.1], [0.05, 0.1], [0.1, 0.1], [0.0, 0.05]]),
            hint="Every state is within the band, x0 too: settling is 0.",
        ),
        Case(
            "only the start is outside",
            with_states([[1.5, -1.2], [0.1, 0.05], [0.05, 0.1], [0.01, 0.05]]),
            hint="x0 is beyond its limits, which nobody chose: no violation. Settling is 1.",
        ),
        Case(
            "only the last state is outside",
            with_states([[0.1, 0.3], [0.2, 0.1], [0.3, 0.1], [0.9, 0.05]]),
            hint="The state after the last input counts.",
        ),
        Case(
            "inputs beyond their limits",
            call(7, 2, 2, u=wild),
            hint="Both entries are outside in some steps: a step counts once.",
        ),
        Case(
            "above and below",
            call(6, 2, 1, x=rng.choice([-1, 1], (7, 2)) * rng.uniform(0.8, 2, (7, 2))),
            hint="States beyond the upper and beyond the lower limit.",
        ),
        Case(
            "one-sided limits",
            call(7, 2, 1, **open_ends),
            hint="An infinite limit is never passed.",
        ),
        Case(
            "a band for every state",
            call(8, 3, 2, band=np.array([0.3, 0.1, 0.6])),
            hint="band is an array: each entry of x has its own.",
        ),
        Case("not contiguous in memory", _laid(call(7, 3, 2)), hint="The same, laid out anew."),
        Case(
            "float32 input",
            _single(call(7, 2, 1)),
            hint="Single precision in; single or double precision out.",
        ),
    ]


# --- oracles: the same values by another road -------------------------------------------------


def _by_simulation(a: Array, b: Array, horizon: int) -> tuple[Array, Array]:
    """Column by column: run the plant from a unit start, and with one unit push."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    n, m = b.shape

    def run(x: Array, pushes: Array) -> Array:
        seen = []
        for u in pushes:
            x = a @ x + b @ u
            seen.append(x)
        return np.concatenate(seen)

    still = np.zeros((horizon, m))
    phi = np.stack([run(start, still) for start in np.eye(n)], axis=1)
    pushes = np.eye(horizon * m).reshape(-1, horizon, m)
    return phi, np.stack([run(np.zeros(n), push) for push in pushes], axis=1)


def _by_completing_the_square(
    p: Array, a: Array, b: Array, q: Array, r: Array
) -> tuple[Array, Array]:
    """The cost of (x, u) is one quadratic form; what is left of it once u is the best one."""
    p, a, b, q, r = (np.asarray(v, float) for v in (p, a, b, q, r))
    n, m = b.shape
    motion = np.hstack([a, b])
    form = motion.T @ p @ motion
    form[:n, :n] += q
    form[n:, n:] += r
    # The best u is where the form is flat in u; without u it is by Gauss, an input at a time.
    gain = np.linalg.lstsq(form[n:, n:], form[n:, :n], rcond=None)[0]
    for j in reversed(range(n, n + m)):
        form = form - np.outer(form[:, j], form[j]) / form[j, j]
    return form[:n, :n], gain


def _program_entry_by_entry(
    a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max
) -> tuple[Array, Array, Array, Array, Array]:
    """Every row and every block written where it belongs."""
    a, b, q, r, p, x0 = (np.asarray(v, float) for v in (a, b, q, r, p, x0))
    n, m = b.shape
    states = [slice(n * k, n * (k + 1)) for k in range(horizon + 1)]
    after = n * (horizon + 1)
    inputs = [slice(after + m * k, after + m * (k + 1)) for k in range(horizon)]
    size = after + m * horizon
    P, A = np.zeros((size, size)), np.zeros((after + size, size))
    lower, upper = np.zeros(after + size), np.zeros(after + size)
    for k in range(horizon + 1):
        P[states[k], states[k]] = q + q if k < horizon else p + p
        A[states[k], states[k]] = -np.eye(n)
        if k > 0:
            A[states[k], states[k - 1]] = a
            A[states[k], inputs[k - 1]] = b
    for k in range(horizon):
        P[inputs[k], inputs[k]] = r + r
    lower[:n] = upper[:n] = -x0
    for i in range(size):
        A[after + i, i] = 1
        of_state = i < after
        entry = i % n if of_state else (i - after) % m
        lower[after + i] = (x_min if of_state else u_min)[entry]
        upper[after + i] = (x_max if of_state else u_max)[entry]
    return P, np.zeros(size), A, lower, upper


def _residuals_entry_by_entry(P, q, A, l, u, z, y) -> tuple[float, float, float]:  # noqa: E741
    rows, columns = A.shape
    primal = dual = 0.0
    gap = sum(z[i] * P[i, j] * z[j] for i in range(columns) for j in range(columns))
    gap += sum(q[j] * z[j] for j in range(columns))
    for i in range(rows):
        value = sum(A[i, j] * z[j] for j in range(columns))
        primal = max(primal, l[i] - value, value - u[i])
        if y[i] > 0:
            gap += u[i] * y[i]
        elif y[i] < 0:
            gap += l[i] * y[i]
    for j in range(columns):
        slope = q[j] + sum(P[j, i] * z[i] for i in range(columns))
        slope += sum(A[i, j] * y[i] for i in range(rows))
        dual = max(dual, abs(slope))
    return primal, dual, abs(gap)


def _metrics_step_by_step(
    x, u, q, r, x_min, x_max, u_min, u_max, band: Any = 0.05
) -> dict[str, float]:
    x, u = np.asarray(x, float), np.asarray(u, float)
    found = dict.fromkeys(METRIC_NAMES, 0.0)
    for k in range(1, len(x)):
        for name, value, weight, low, high in (
            ("state", x[k], q, x_min, x_max),
            ("input", u[k - 1], r, u_min, u_max),
        ):
            n = len(value)
            found["cost"] += sum(
                value[i] * float(weight[i, j]) * value[j] for i in range(n) for j in range(n)
            )
            over = max(max(low[i] - value[i], value[i] - high[i]) for i in range(n))
            found[f"{name}_violations"] += over > 0
            found[f"max_{name}_violation"] = max(found[f"max_{name}_violation"], over)
    limits = np.broadcast_to(band, x.shape[1:])
    inside = [all(abs(v) <= limit for v, limit in zip(row, limits, strict=True)) for row in x]
    found["settling"] = next((float(k) for k in range(len(x)) if all(inside[k:])), np.inf)
    return found


METRIC_NAMES = (
    "cost",
    "settling",
    "state_violations",
    "input_violations",
    "max_state_violation",
    "max_input_violation",
)


# --- mistakes: condense -----------------------------------------------------------------------


def _stacked(
    blocks: Callable[[Array, Array, int, int], Array | None],
    powers: Callable[[Array, int], Array] = lambda a, k: np.linalg.matrix_power(a, k + 1),
) -> Callable[..., tuple[Array, Array]]:
    """phi from powers(a, k) for x_{k+1}, gamma from blocks(a, b, k, j) for u_j's part in it."""

    def answer(a, b, horizon):
        a, b = np.asarray(a, float), np.asarray(b, float)
        n, m = b.shape
        gamma = np.zeros((horizon * n, horizon * m))
        for k in range(horizon):
            for j in range(horizon):
                block = blocks(a, b, k, j)
                if block is not None:
                    gamma[n * k : n * (k + 1), m * j : m * (j + 1)] = block
        return np.vstack([powers(a, k) for k in range(horizon)]), gamma

    return answer


power = np.linalg.matrix_power


def _right_block(a: Array, b: Array, k: int, j: int) -> Array | None:
    return power(a, k - j) @ b if j <= k else None


def _with_first_state(a, b, horizon):
    phi, gamma = library.condense(a, b, horizon)
    n = len(a)
    return np.vstack([np.eye(n), phi]), np.vstack([np.zeros((n, gamma.shape[1])), gamma])


def _entrywise_power(a: Array, k: int) -> Array:
    return a ** (k + 1)


def _mixed_order(a, b, horizon):
    """gamma's columns by input first and by time second."""
    phi, gamma = library.condense(a, b, horizon)
    n, m = b.shape
    columns = gamma.reshape(horizon * n, horizon, m).swapaxes(1, 2)
    return phi, columns.reshape(horizon * n, horizon * m)


CONDENSE_MISTAKES = (
    *named(
        "first input not applied",
        "x_1 already feels u_0: the block of x_{k} and u_{k-1} is B, and gamma's diagonal is not "
        "empty.",
        CONDENSE,
        _stacked(lambda a, b, k, j: power(a, k - 1 - j) @ b if j < k else None),
    ),
    *named(
        "a power too many in gamma",
        "u_j acts first in x_{j+1}, unchanged by A: the block is A^(k-1-j) B for x_k, and B where "
        "k = j + 1.",
        CONDENSE,
        _stacked(lambda a, b, k, j: power(a, k - j + 1) @ b if j <= k else None),
    ),
    *named(
        "phi starts with x_0",
        "The first block row is x_1, so phi starts with A and not with the identity.",
        CONDENSE,
        _stacked(_right_block, lambda a, k: power(a, k)),
    ),
    *named(
        "x_0 among the predicted states",
        "x_0 is given and not predicted: there are N block rows, x_1 to x_N.",
        SHAPES,
        _with_first_state,
    ),
    *named(
        "entries to a power instead of the matrix",
        "A**k raises every entry to the power; the state after k steps is A @ A @ … @ x.",
        CONDENSE,
        _stacked(_right_block, _entrywise_power),
        _stacked(
            lambda a, b, k, j: (a ** (k - j) if k > j else np.eye(len(a))) @ b if j <= k else None,
            _entrywise_power,
        ),
        _stacked(lambda a, b, k, j: a ** (k - j) @ b if j <= k else None, _entrywise_power),
    ),
    *named(
        "gamma not filled below its diagonal",
        "An input acts on every state after it, not on the next one alone: what it did then is "
        "carried on by A.",
        CONDENSE,
        _stacked(lambda a, b, k, j: b if j == k else None),
        _stacked(lambda a, b, k, j: _right_block(a, b, k, j) if k - j <= 1 else None),
    ),
    *named(
        "gamma upside down",
        "Rows are times of states and columns times of inputs: the older the input, the higher the "
        "power of A, and no state feels an input that comes after it.",
        CONDENSE,
        _stacked(lambda a, b, k, j: power(a, j - k) @ b if j >= k else None),
        _stacked(lambda a, b, k, j: power(a, j) @ b if j <= k else None),
    ),
    *named(
        "every block is B",
        "An input of j steps ago has been through A j times since.",
        CONDENSE,
        _stacked(lambda a, b, k, j: b if j <= k else None),
    ),
    *named(
        "A transposed",
        "The motion is A x with x a column; its powers stand as they are, not transposed.",
        SHAPES,
        _stacked(lambda a, b, k, j: _right_block(a.T, b, k, j), lambda a, k: power(a.T, k + 1)),
        _stacked(_right_block, lambda a, k: power(a.T, k + 1)),
    ),
    *named(
        "inputs grouped by entry, not by time",
        "The inputs are stacked u_0, u_1, …, each whole; the entries of one input stand together.",
        SHAPES,
        _mixed_order,
    ),
    *named(
        "phi and gamma swapped",
        "phi, which multiplies x_0, comes first and gamma second.",
        SHAPES,
        lambda a, b, horizon: library.condense(a, b, horizon)[::-1],
    ),
)


# --- mistakes: riccati_step -------------------------------------------------------------------


def _riccati_with(
    gain: Callable[..., Array] | None = None, before: Callable[..., Array] | None = None
) -> Callable[..., tuple[Array, Array]]:
    def right_gain(p, a, b, q, r):
        return np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)

    def right_before(p, a, b, q, r, k):
        return q + a.T @ p @ (a - b @ k)

    def answer(p, a, b, q, r):
        p, a, b, q, r = (np.asarray(v, float) for v in (p, a, b, q, r))
        k = (gain or right_gain)(p, a, b, q, r)
        return (before or right_before)(p, a, b, q, r, k), k

    return answer


def _joseph(p, a, b, q, r, k, paid: float = 1.0):
    loop = a - b @ k
    return q + paid * k.T @ r @ k + loop.T @ p @ loop


solve = np.linalg.solve


def _negative_gain(p, a, b, q, r):
    before, k = library.riccati_step(p, a, b, q, r)
    return before, -k


RICCATI_MISTAKES = (
    *named(
        "sign of K",
        "Here u = -Kx: the minus is the law's, and K = (R + BᵀPB)⁻¹BᵀPA has none.",
        LQR,
        _negative_gain,
        _riccati_with(
            lambda p, a, b, q, r: -solve(r + b.T @ p @ b, b.T @ p @ a),
            lambda p, a, b, q, r, k: _joseph(p, a, b, q, r, k),
        ),
        _riccati_with(
            lambda p, a, b, q, r: -solve(r + b.T @ p @ b, b.T @ p @ a),
            lambda p, a, b, q, r, k: q + a.T @ p @ (a - b @ k),
        ),
    ),
    *named(
        "R left out of K",
        "The input costs uᵀRu now besides what it saves later: R stands in the bracket, and "
        "without it K would spend any force.",
        LQR,
        _riccati_with(lambda p, a, b, q, r: np.linalg.pinv(b.T @ p @ b) @ (b.T @ p @ a)),
        _riccati_with(lambda p, a, b, q, r: np.linalg.pinv(b.T @ p @ b) @ (b.T @ p @ a), _joseph),
    ),
    *named(
        "P left out of the bracket",
        "The later cost of an input is (Bu)ᵀP(Bu): the bracket is R + BᵀPB, not R alone and not "
        "R + BᵀB.",
        LQR,
        _riccati_with(lambda p, a, b, q, r: solve(r, b.T @ p @ a)),
        _riccati_with(lambda p, a, b, q, r: solve(r, b.T @ p @ a), _joseph),
        _riccati_with(lambda p, a, b, q, r: solve(r + b.T @ b, b.T @ p @ a)),
        _riccati_with(lambda p, a, b, q, r: solve(r + b.T @ b, b.T @ p @ a), _joseph),
    ),
    *named(
        "Q left out",
        "The state costs xᵀQx now, before anything happens: P⁻ begins with Q.",
        LQR,
        _riccati_with(before=lambda p, a, b, q, r, k: a.T @ p @ (a - b @ k)),
        _riccati_with(before=lambda p, a, b, q, r, k: _joseph(p, a, b, 0 * q, r, k)),
    ),
    *named(
        "cost of the input left out of P",
        "The input that is applied costs (Kx)ᵀR(Kx): with (A - BK)ᵀP(A - BK) on both sides, KᵀRK "
        "has to be added.",
        LQR,
        _riccati_with(before=lambda p, a, b, q, r, k: _joseph(p, a, b, q, r, k, paid=0.0)),
    ),
    *named(
        "cost of the input counted twice",
        "Q + AᵀP(A - BK) has the cost of the input in it already; KᵀRK is added only to the form "
        "with (A - BK) on both sides.",
        LQR,
        _riccati_with(before=lambda p, a, b, q, r, k: q + a.T @ p @ (a - b @ k) + k.T @ r @ k),
    ),
    *named(
        "no input",
        "Q + AᵀPA is the cost of a plant that nobody steers; what the best input saves is still to "
        "be taken off.",
        LQR,
        _riccati_with(before=lambda p, a, b, q, r, k: q + a.T @ p @ a),
    ),
    *named(
        "what the input saves added",
        "AᵀPBK is what the input saves: it is taken off.",
        LQR,
        _riccati_with(before=lambda p, a, b, q, r, k: q + a.T @ p @ (a + b @ k)),
        _riccati_with(
            before=lambda p, a, b, q, r, k: q + k.T @ r @ k + (a + b @ k).T @ p @ (a + b @ k)
        ),
    ),
    *named(
        "A transposed",
        "xᵀAᵀPAx: the transposed A stands on the left.",
        SHAPES,
        _riccati_with(
            lambda p, a, b, q, r: solve(r + b.T @ p @ b, b.T @ p @ a.T),
            lambda p, a, b, q, r, k: q + a @ p @ (a.T - b @ k),
        ),
        _riccati_with(before=lambda p, a, b, q, r, k: q + a @ p @ (a - b @ k).T),
        _riccati_with(before=lambda p, a, b, q, r, k: q + a @ p @ (a - b @ k)),
        _riccati_with(
            before=lambda p, a, b, q, r, k: (
                q + a @ p @ a.T - a @ p @ b @ solve(r + b.T @ p @ b, b.T @ p @ a.T)
            )
        ),
    ),
    *named(
        "K of the new P",
        "The input now is paid for by the cost from the next state on: K comes from the P that is "
        "given, not from the one that is returned.",
        LQR,
        lambda p, a, b, q, r: (lambda new: (new, library.riccati_step(new, a, b, q, r)[1]))(
            library.riccati_step(p, a, b, q, r)[0]
        ),
    ),
    *named(
        "factor 2",
        "Costs here are xᵀQx without a half, on both sides of the equation: no factor 2 arises.",
        LQR,
        lambda p, a, b, q, r: (lambda found: (2 * found[0], found[1]))(
            library.riccati_step(p, a, b, q, r)
        ),
        _riccati_with(before=lambda p, a, b, q, r, k: q + 2 * a.T @ p @ (a - b @ k)),
        _riccati_with(before=lambda p, a, b, q, r, k: 2 * q + a.T @ p @ (a - b @ k)),
        _riccati_with(lambda p, a, b, q, r: solve(r + 2 * b.T @ p @ b, 2 * b.T @ p @ a)),
    ),
    *named(
        "P and K swapped",
        "P⁻ comes first and K second.",
        SHAPES,
        lambda p, a, b, q, r: library.riccati_step(p, a, b, q, r)[::-1],
    ),
)


# --- mistakes: mpc_qp -------------------------------------------------------------------------


class _Parts:
    """The pieces of the program, from which a mistaken one is put together."""

    def __init__(self, a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
        self.a, self.b, self.q, self.r, self.p, self.x0, *limits = (
            np.asarray(v, float) for v in (a, b, q, r, p, x0, u_min, u_max, x_min, x_max)
        )
        self.u_min, self.u_max, self.x_min, self.x_max = limits
        self.horizon, (self.n, self.m) = horizon, self.b.shape
        self.n_states = self.n * (horizon + 1)
        self.size = self.n_states + self.m * horizon
        self.P, self.g, self.A, self.l, self.u = library.mpc_qp(
            self.a, self.b, self.q, self.r, self.p, self.x0, horizon, *limits
        )

    @property
    def program(self) -> tuple[Array, ...]:
        return self.P, self.g, self.A, self.l, self.u

    def hessian(self, *blocks: Array) -> Array:
        return library._block_diagonal(blocks)

    def costs(self, q: Array, p: Array, r: Array) -> Array:
        return self.hessian(*[q] * self.horizon, p, *[r] * self.horizon)


def _program_with(change: Callable[[_Parts], Any]) -> Callable[..., tuple[Array, ...]]:
    """The right program but for what ``change`` does to its parts."""

    def answer(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
        parts = _Parts(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max)
        found = change(parts)
        return parts.program if found is None else found

    return answer


def _limits_of_inputs_first(of: _Parts) -> None:
    """The rows are in the order of z, what is written beside them is not."""
    n = of.horizon
    of.l[of.n_states :] = np.concatenate([np.tile(of.u_min, n), np.tile(of.x_min, n + 1)])
    of.u[of.n_states :] = np.concatenate([np.tile(of.u_max, n), np.tile(of.x_max, n + 1)])


def _limits_before_the_motion(of: _Parts) -> None:
    order = np.concatenate([np.arange(of.n_states, len(of.l)), np.arange(of.n_states)])
    of.A, of.l, of.u = of.A[order], of.l[order], of.u[order]


def _limits_beside_wrong_rows(of: _Parts) -> None:
    order = np.concatenate([np.arange(of.n_states, len(of.l)), np.arange(of.n_states)])
    of.l, of.u = of.l[order], of.u[order]


def _limits_repeated(of: _Parts) -> None:
    n = of.horizon
    of.l[of.n_states :] = np.concatenate([np.repeat(of.x_min, n + 1), np.repeat(of.u_min, n)])
    of.u[of.n_states :] = np.concatenate([np.repeat(of.x_max, n + 1), np.repeat(of.u_max, n)])


def _inputs_shifted(of: _Parts) -> None:
    """u_k drives x_{k+2}: the first row of the motion has no input."""
    inputs = np.kron(np.eye(of.horizon + 1, of.horizon, k=-2), of.b)
    of.A[: of.n_states, of.n_states :] = inputs


def _inputs_early(of: _Parts) -> None:
    """u_k in the row of x_k, where x_0 is fixed."""
    of.A[: of.n_states, of.n_states :] = np.kron(np.eye(of.horizon + 1, of.horizon), of.b)


def _without_last_motion(of: _Parts) -> None:
    of.A[: of.n_states, of.n_states :][-of.n :] = 0


def _free_start(of: _Parts) -> None:
    """x_0 is fixed, and so has no row of limits."""
    kept = np.r_[: of.n_states, of.n_states + of.n : len(of.l)]
    of.A, of.l, of.u = of.A[kept], of.l[kept], of.u[kept]


def _open_start(of: _Parts) -> None:
    first = slice(of.n_states, of.n_states + of.n)
    of.l[first], of.u[first] = -np.inf, np.inf


def _interleaved(of: _Parts) -> None:
    """z = (x_0, u_0, x_1, u_1, …, x_N)."""
    order: list[int] = []
    for k in range(of.horizon + 1):
        order += range(of.n * k, of.n * (k + 1))
        if k < of.horizon:
            order += range(of.n_states + of.m * k, of.n_states + of.m * (k + 1))
    of.P, of.g = of.P[np.ix_(order, order)], of.g[order]
    of.A[: of.n_states] = of.A[: of.n_states, order]
    rows = of.n_states + np.array(order)
    of.l[of.n_states :], of.u[of.n_states :] = of.l[rows], of.u[rows]


def _positive_rows(of: _Parts) -> None:
    """x_{k+1} - A x_k - B u_k = 0 and x_0 = x(0): the same program, each row times -1."""
    motion = slice(0, of.n_states)
    of.A[motion] = -of.A[motion]
    of.l[motion] = of.u[motion] = -of.l[motion]


def _set(**values: Callable[[_Parts], Any]) -> Callable[[_Parts], None]:
    def change(of: _Parts) -> None:
        for name, value in values.items():
            setattr(of, name, value(of))

    return change


def _wrong_start(sign: float) -> Callable[[_Parts], None]:
    def change(of: _Parts) -> None:
        of.l[: of.n] = of.u[: of.n] = sign * of.x0

    return change


def _motion_transposed(of: _Parts) -> None:
    states = np.kron(np.eye(of.horizon + 1, k=-1), of.a.T) - np.eye(of.n_states)
    of.A[: of.n_states, : of.n_states] = states


def _motion_upwards(of: _Parts) -> None:
    states = np.kron(np.eye(of.horizon + 1, k=1), of.a) - np.eye(of.n_states)
    of.A[: of.n_states, : of.n_states] = states


def _one_sided_limits(of: _Parts) -> None:
    of.l[of.n_states :] = -of.u[of.n_states :]


def _open_motion(of: _Parts) -> None:
    of.l[: of.n_states] = -np.inf


PROGRAM_MISTAKES = (
    *named(
        "factor 2",
        "OSQP minimises ½zᵀPz, the cost is xᵀQx without a half: P has to hold 2Q, 2R and 2P_N.",
        QP,
        _program_with(_set(P=lambda of: of.P / 2)),
        _program_with(_set(P=lambda of: of.P * 2)),
        _program_with(_set(P=lambda of: of.costs(2 * of.q, 2 * of.p, of.r))),
        _program_with(_set(P=lambda of: of.costs(2 * of.q, of.p, 2 * of.r))),
        _program_with(_set(P=lambda of: of.costs(of.q, of.p, 2 * of.r))),
    ),
    *named(
        "bounds in the wrong rows",
        "The limits stand after the motion's rows, in the order of z: all states' first, then all "
        "inputs', each whole.",
        BOUNDS,
        _program_with(_limits_of_inputs_first),
        _program_with(_limits_before_the_motion),
        _program_with(_limits_beside_wrong_rows),
        _program_with(_limits_repeated),
    ),
    *named(
        "terminal cost forgotten",
        "The last state is weighed by p, which stands for all that is paid after the horizon; not "
        "by q, and not by nothing.",
        TERMINAL,
        _program_with(_set(P=lambda of: of.costs(2 * of.q, 2 * of.q, 2 * of.r))),
        _program_with(_set(P=lambda of: of.costs(2 * of.q, 0 * of.p, 2 * of.r))),
    ),
    *named(
        "terminal cost on every state",
        "p weighs x_N alone; the states before it are weighed by q.",
        TERMINAL,
        _program_with(_set(P=lambda of: of.costs(2 * of.p, 2 * of.p, 2 * of.r))),
    ),
    *named(
        "terminal cost added to the stage cost",
        "x_N is weighed by p instead of q, not by both: the sum over stages ends at N - 1.",
        TERMINAL,
        _program_with(_set(P=lambda of: of.costs(2 * of.q, 2 * (of.q + of.p), 2 * of.r))),
    ),
    *named(
        "first input not applied",
        "x_1 = A x_0 + B u_0: u_k stands in the block row of x_{k+1}, so that the first input "
        "moves the first predicted state.",
        QP,
        _program_with(_inputs_shifted),
        _program_with(_inputs_early),
    ),
    *named(
        "sign of the start",
        "The first rows are -x_0, so what they equal is -x(0).",
        QP,
        _program_with(_wrong_start(1.0)),
    ),
    *named(
        "start forgotten",
        "Nothing ties the plan to the state of now: the first rows have to equal -x(0).",
        QP,
        _program_with(_wrong_start(0.0)),
    ),
    *named(
        "rows of the motion with the other sign",
        "The same program, but the rows asked for are -x_0 and A x_k + B u_k - x_{k+1}.",
        QP,
        _program_with(_positive_rows),
    ),
    *named(
        "A transposed",
        "The row of x_{k+1} holds A as it is.",
        QP,
        _program_with(_motion_transposed),
    ),
    *named(
        "motion runs backwards",
        "x_{k+1} comes from x_k: A stands below the diagonal, in the columns of the state before.",
        QP,
        _program_with(_motion_upwards),
    ),
    *named(
        "no limits for x_0",
        "Here z has a row of limits for each of its entries, x_0's too; a start outside them makes "
        "the program infeasible, and that is to be seen.",
        INFEASIBLE,
        _program_with(_free_start),
        _program_with(_open_start),
    ),
    *named(
        "lower limits taken as the upper ones' mirror",
        "x_min and u_min are arguments of their own: thrust that can fall by 1 may rise by 2.4.",
        BOUNDS,
        _program_with(_one_sided_limits),
    ),
    *named(
        "motion as an inequality",
        "The motion is an equation: its rows have l = u.",
        BOUNDS,
        _program_with(_open_motion),
    ),
    *named(
        "upper half of P",
        "OSQP's own set-up wants the upper half; here P is asked for whole and symmetric.",
        QP,
        _program_with(_set(P=lambda of: np.triu(of.P))),
    ),
    *named(
        "states and inputs interleaved",
        "z holds all states and then all inputs: (x_0, …, x_N, u_0, …, u_{N-1}).",
        SHAPES,
        _program_with(_interleaved),
    ),
)


# --- mistakes: qp_residuals -------------------------------------------------------------------


def _residuals_with(**changed: Callable[..., Any]) -> Callable[..., tuple[Any, Any, Any]]:
    """The right residuals but for those named; each gets all arguments."""

    def primal(P, q, A, lo, hi, z, y):
        return max(0.0, (lo - A @ z).max(), (A @ z - hi).max())

    def dual(P, q, A, lo, hi, z, y):
        return np.abs(P @ z + q + A.T @ y).max()

    def gap(P, q, A, lo, hi, z, y):
        return abs(z @ P @ z + q @ z + _support(lo, hi, y))

    def answer(*arguments):
        parts = {"primal": primal, "dual": dual, "gap": gap} | changed
        return tuple(parts[name](*arguments) for name in ("primal", "dual", "gap"))

    return answer


def _support(lo: Array, hi: Array, y: Array) -> Any:
    return np.sum(np.where(y == 0, 0, np.where(y > 0, hi, lo)) * y)


def _plain_support(lo: Array, hi: Array, y: Array) -> Any:
    return hi @ np.maximum(y, 0) + lo @ np.minimum(y, 0)


def _gap_with(support: Callable[[Array, Array, Array], Any]) -> Callable[..., Any]:
    return _residuals_with(
        gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z + q @ z + support(lo, hi, y))
    )


RESIDUAL_MISTAKES = (
    *named(
        "one side of the bounds only",
        "A row can be below l as well as above u: the violation is the larger of the two.",
        INFEASIBLE,
        _residuals_with(primal=lambda P, q, A, lo, hi, z, y: max(0.0, (A @ z - hi).max())),
        _residuals_with(primal=lambda P, q, A, lo, hi, z, y: max(0.0, (lo - A @ z).max())),
    ),
    *named(
        "a row within its bounds counts",
        "The distance of a row that is inside its bounds is no violation: it counts as 0, not as "
        "less, and not by its size.",
        INFEASIBLE,
        _residuals_with(
            primal=lambda P, q, A, lo, hi, z, y: max((lo - A @ z).max(), (A @ z - hi).max())
        ),
        _residuals_with(
            primal=lambda P, q, A, lo, hi, z, y: np.maximum(
                np.abs(lo - A @ z), np.abs(A @ z - hi)
            ).max()
        ),
        _residuals_with(
            primal=lambda P, q, A, lo, hi, z, y: np.minimum(
                np.abs(lo - A @ z), np.abs(A @ z - hi)
            ).max()
        ),
    ),
    *named(
        "sum or mean instead of the largest",
        "One violated bound must not hide among many that are kept: residuals are maxima.",
        INFEASIBLE,
        *(
            _residuals_with(
                primal=lambda P, q, A, lo, hi, z, y, over=over: over(
                    np.maximum(np.maximum(lo - A @ z, A @ z - hi), 0)
                ),
                dual=lambda P, q, A, lo, hi, z, y, over=over: over(np.abs(P @ z + q + A.T @ y)),
            )
            for over in (np.sum, np.mean, np.linalg.norm)
        ),
        *(
            _residuals_with(
                primal=lambda P, q, A, lo, hi, z, y, over=over: over(
                    np.maximum(np.maximum(lo - A @ z, A @ z - hi), 0)
                )
            )
            for over in (np.sum, np.mean, np.linalg.norm)
        ),
        *(
            _residuals_with(
                dual=lambda P, q, A, lo, hi, z, y, over=over: over(np.abs(P @ z + q + A.T @ y))
            )
            for over in (np.sum, np.mean, np.linalg.norm)
        ),
    ),
    *named(
        "multipliers left out of the slope",
        "At a bound the cost still slopes; the bound's multiplier holds against it: Pz + q + Aᵀy.",
        QP,
        _residuals_with(dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z + q).max()),
    ),
    *named(
        "sign of y",
        "y is positive where an upper bound pushes: the slope is Pz + q + Aᵀy.",
        QP,
        _residuals_with(dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z + q - A.T @ y).max()),
        _residuals_with(
            dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z + q - A.T @ y).max(),
            gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z + q @ z + _support(lo, hi, -y)),
        ),
        _residuals_with(
            gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z + q @ z - _support(lo, hi, y))
        ),
    ),
    *named(
        "upper and lower bounds swapped in the gap",
        "A positive multiplier belongs to the upper bound, a negative one to the lower.",
        QP,
        _residuals_with(
            gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z + q @ z + _support(hi, lo, y))
        ),
    ),
    *named(
        "q left out of the slope",
        "The slope of ½zᵀPz + qᵀz is Pz + q.",
        QP,
        _residuals_with(dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z + A.T @ y).max()),
    ),
    *named(
        "half of P",
        "The slope of ½zᵀPz is Pz, and the gap, cost less dual cost, has zᵀPz without a half.",
        QP,
        _residuals_with(dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z / 2 + q + A.T @ y).max()),
        _residuals_with(
            gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z / 2 + q @ z + _support(lo, hi, y))
        ),
        _residuals_with(
            dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z / 2 + q + A.T @ y).max(),
            gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z / 2 + q @ z + _support(lo, hi, y)),
        ),
    ),
    *named(
        "P counted twice",
        "P holds the factor 2 already, and the half stands in front of zᵀPz: the slope is Pz.",
        QP,
        _residuals_with(dual=lambda P, q, A, lo, hi, z, y: np.abs(2 * P @ z + q + A.T @ y).max()),
    ),
    *named(
        "inf times 0",
        "A bound at infinity that does not push has no part in the gap; inf · 0 is NaN.",
        INFEASIBLE,
        _residuals_with(
            gap=lambda P, q, A, lo, hi, z, y: abs(z @ P @ z + q @ z + _plain_support(lo, hi, y))
        ),
    ),
    *named(
        "infinite bounds left out of the gap",
        "A multiplier that is not 0 at a bound that is not there is an error without end: inf.",
        INFEASIBLE,
        _residuals_with(
            gap=lambda P, q, A, lo, hi, z, y: abs(
                z @ P @ z
                + q @ z
                + _support(np.where(np.isfinite(lo), lo, 0), np.where(np.isfinite(hi), hi, 0), y)
            )
        ),
    ),
    *named(
        "gap with a sign",
        "The gap is a size: a dual cost above the cost is as wrong as one below.",
        QP,
        _residuals_with(gap=lambda P, q, A, lo, hi, z, y: z @ P @ z + q @ z + _support(lo, hi, y)),
    ),
    *named(
        "A not transposed",
        "A takes z to rows; multipliers go back to the unknowns by Aᵀ.",
        SHAPES,
        _residuals_with(dual=lambda P, q, A, lo, hi, z, y: np.abs(P @ z + q + A @ y).max()),
    ),
)


# --- mistakes: closed_loop_metrics ------------------------------------------------------------


def _metrics_with(**changed: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The right metrics but for those named; each gets all arguments."""

    def answer(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
        given = [np.asarray(v, float) for v in (x, u, q, r, x_min, x_max, u_min, u_max, band)]
        right = library.closed_loop_metrics(*given)
        return right | {name: value(*given) for name, value in changed.items()}

    return answer


def _quadratic(values: Array, weight: Array) -> Any:
    return np.einsum("ki,ij,kj->", values, weight, values)


def _paired_states(take: slice, inputs: slice = slice(None)) -> Callable[..., Any]:
    return lambda x, u, q, r, *_: _quadratic(x[take], q) + _quadratic(u[inputs], r)


def _inside(x: Array, band: Array) -> Array:
    return (np.abs(x) <= band).all(axis=1)


def _first_time_inside(x, u, q, r, a, b, c, d, band):
    inside = _inside(x, band)
    return float(inside.argmax()) if inside.any() else np.inf


def _last_outside(x, u, q, r, a, b, c, d, band):
    outside = np.flatnonzero(~_inside(x, band))
    return float(outside[-1]) if outside.size else 0.0


def _settling_from_one(x, u, q, r, a, b, c, d, band):
    outside = np.flatnonzero(~_inside(x[1:], band))
    found = float(outside[-1] + 1) if outside.size else 0.0
    return found if found < len(u) else np.inf


def _settled_at_the_end(x, u, q, r, a, b, c, d, band):
    outside = np.flatnonzero(~_inside(x, band))
    return float(outside[-1] + 1) if outside.size else 0.0


def _settling_of_the_length(x, u, q, r, a, b, c, d, band):
    outside = np.flatnonzero(~_inside(x, band))
    found = float(outside[-1] + 1) if outside.size else 0.0
    return found if found <= len(u) else float(len(u))


def _any_entry_inside(x, u, q, r, a, b, c, d, band):
    outside = np.flatnonzero((np.abs(x) > band).all(axis=1))
    found = float(outside[-1] + 1) if outside.size else 0.0
    return found if found <= len(u) else np.inf


def _signed_band(x, u, q, r, a, b, c, d, band):
    outside = np.flatnonzero((x > band).any(axis=1))
    found = float(outside[-1] + 1) if outside.size else 0.0
    return found if found <= len(u) else np.inf


def _excess(values: Array, low: Array, high: Array) -> Array:
    return np.maximum(low - values, values - high)


def _count(values: Array, low: Array, high: Array) -> float:
    return float((_excess(values, low, high) > 0).any(axis=1).sum())


def _largest(values: Array, low: Array, high: Array) -> float:
    return max(0.0, float(_excess(values, low, high).max()))


# Four keys at once: what is done to states is done to inputs.
def _violations(
    count: Callable[[Array, Array, Array], Any] | None = None,
    largest: Callable[[Array, Array, Array], Any] | None = None,
) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    if count is not None:
        found["state_violations"] = lambda x, u, q, r, a, b, c, d, _: count(x[1:], a, b)
        found["input_violations"] = lambda x, u, q, r, a, b, c, d, _: count(u, c, d)
    if largest is not None:
        found["max_state_violation"] = lambda x, u, q, r, a, b, c, d, _: largest(x[1:], a, b)
        found["max_input_violation"] = lambda x, u, q, r, a, b, c, d, _: largest(u, c, d)
    return found


METRICS_MISTAKES = (
    *named(
        "cost over the states before each step",
        "The start is nobody's choice and the last state is the last input's work: the cost runs "
        "over x_1 … x_T.",
        METRICS,
        _metrics_with(cost=_paired_states(slice(0, -1))),
    ),
    *named(
        "start counted",
        "x_0 is given, not steered to: neither its cost nor its violation is the controller's.",
        METRICS,
        _metrics_with(cost=_paired_states(slice(0, None))),
        _metrics_with(state_violations=lambda x, u, q, r, a, b, c, d, _: _count(x, a, b)),
        _metrics_with(
            cost=_paired_states(slice(0, None)),
            state_violations=lambda x, u, q, r, a, b, c, d, _: _count(x, a, b),
            max_state_violation=lambda x, u, q, r, a, b, c, d, _: _largest(x, a, b),
        ),
        _metrics_with(
            state_violations=lambda x, u, q, r, a, b, c, d, _: _count(x, a, b),
            max_state_violation=lambda x, u, q, r, a, b, c, d, _: _largest(x, a, b),
        ),
        _metrics_with(max_state_violation=lambda x, u, q, r, a, b, c, d, _: _largest(x, a, b)),
    ),
    *named(
        "first input not applied",
        "u_0 is what moves x_0 to x_1: it is paid for and held to its limits like every other.",
        METRICS,
        _metrics_with(cost=_paired_states(slice(1, None), slice(1, None))),
        _metrics_with(
            cost=_paired_states(slice(1, None), slice(1, None)),
            input_violations=lambda x, u, q, r, a, b, c, d, _: _count(u[1:], c, d),
            max_input_violation=lambda x, u, q, r, a, b, c, d, _: (
                _largest(u[1:], c, d) if len(u) > 1 else 0.0
            ),
        ),
    ),
    *named(
        "inputs cost nothing",
        "The cost has two parts: the states' and the inputs', uᵀRu.",
        METRICS,
        _metrics_with(cost=lambda x, u, q, r, *_: _quadratic(x[1:], q)),
    ),
    *named(
        "factor 2",
        "The cost is xᵀQx + uᵀRu, neither halved nor doubled.",
        METRICS,
        _metrics_with(cost=lambda x, u, q, r, *_: (_quadratic(x[1:], q) + _quadratic(u, r)) / 2),
        _metrics_with(cost=lambda x, u, q, r, *_: 2 * (_quadratic(x[1:], q) + _quadratic(u, r))),
    ),
    *named(
        "mean instead of sum",
        "The cost of an episode is the sum over its steps: a mean does not grow with time spent "
        "off course.",
        METRICS,
        _metrics_with(
            cost=lambda x, u, q, r, *_: (_quadratic(x[1:], q) + _quadratic(u, r)) / len(u)
        ),
    ),
    *named(
        "diagonal of Q and R only",
        "Q and R may have entries beside the diagonal: xᵀQx, not Σ Q_ii x_i².",
        METRICS,
        _metrics_with(
            cost=lambda x, u, q, r, *_: (x[1:] ** 2 @ np.diag(q)).sum() + (u**2 @ np.diag(r)).sum()
        ),
    ),
    *named(
        "settled at the first time inside",
        "To settle is to stay: an episode that enters the band and leaves it again has not "
        "settled.",
        METRICS,
        _metrics_with(settling=_first_time_inside),
    ),
    *named(
        "settling one step early",
        "The last step outside is not settled yet; the one after it is.",
        METRICS,
        _metrics_with(settling=_last_outside),
        _metrics_with(settling=_settling_from_one),
    ),
    *named(
        "never settled taken as settled",
        "Where the last state is outside the band there is no settling time: inf, so that no mean "
        "over episodes looks good by it.",
        METRICS,
        _metrics_with(settling=_settled_at_the_end),
        _metrics_with(settling=_settling_of_the_length),
    ),
    *named(
        "settled when any entry is",
        "Every entry of the state has to be within its band.",
        METRICS,
        _metrics_with(settling=_any_entry_inside),
    ),
    *named(
        "band on one side only",
        "The band is ±: an entry far below 0 is as far from rest as one far above.",
        METRICS,
        _metrics_with(settling=_signed_band),
    ),
    *named(
        "entries counted, not steps",
        "A step with two entries outside is one step outside.",
        METRICS,
        _metrics_with(**_violations(lambda v, low, high: float((_excess(v, low, high) > 0).sum()))),
    ),
    *named(
        "upper limits only",
        "A limit can be passed downwards as well.",
        METRICS,
        _metrics_with(
            **_violations(
                lambda v, low, high: float((v > high).any(axis=1).sum()),
                lambda v, low, high: max(0.0, float((v - high).max())),
            )
        ),
        _metrics_with(**_violations(lambda v, low, high: float((v > high).any(axis=1).sum()))),
        _metrics_with(
            **_violations(largest=lambda v, low, high: max(0.0, float((v - high).max())))
        ),
    ),
    *named(
        "largest violation below 0",
        "Where every entry is within its limits, the largest violation is 0 and not the distance "
        "to the nearest limit.",
        METRICS,
        _metrics_with(**_violations(largest=lambda v, low, high: _excess(v, low, high).max())),
    ),
    *named(
        "violations summed, not the largest",
        "The largest violation is one number of one entry: by how much it would have been through "
        "the fence.",
        METRICS,
        _metrics_with(
            **_violations(largest=lambda v, low, high: np.maximum(_excess(v, low, high), 0).sum())
        ),
    ),
    *named(
        "last state left out",
        "The state after the last input counts, in the cost as in the violations.",
        METRICS,
        _metrics_with(
            state_violations=lambda x, u, q, r, a, b, c, d, _: _count(x[:-1], a, b),
            max_state_violation=lambda x, u, q, r, a, b, c, d, _: _largest(x[:-1], a, b),
            cost=_paired_states(slice(0, -1)),
        ),
        _metrics_with(
            state_violations=lambda x, u, q, r, a, b, c, d, _: _count(x[:-1], a, b),
            max_state_violation=lambda x, u, q, r, a, b, c, d, _: _largest(x[:-1], a, b),
        ),
        _metrics_with(
            state_violations=lambda x, u, q, r, a, b, c, d, _: _count(x[1:-1], a, b),
            max_state_violation=lambda x, u, q, r, a, b, c, d, _: (
                _largest(x[1:-1], a, b) if len(u) > 1 else 0.0
            ),
            cost=lambda x, u, q, r, *_: _quadratic(x[1:-1], q) + _quadratic(u, r),
        ),
    ),
)


# --- the exercises ----------------------------------------------------------------------------


def _bracket(p: Array, a: Array, b: Array, q: Array, r: Array) -> Array:
    return r + b.T @ p @ b


RICCATI_STEPS = (
    Intermediate(
        "the gain",
        lambda p, a, b, q, r: library.riccati_step(p, a, b, q, r)[1],
        {
            "K": lambda k, p, a, b, q, r: k,
            # P⁻ = Q + AᵀP(A - BK): K from it, where AᵀPB has no more columns than rows.
            "P": lambda before, p, a, b, q, r: _gain_from(before, p, a, b, q),
        },
    ),
)


def _gain_from(before: Array, p: Array, a: Array, b: Array, q: Array) -> Array | None:
    saved = q + a.T @ p @ a - before  # AᵀPB K
    found = left_factor(saved.T, (a.T @ p @ b).T)
    return None if found is None else found.T


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "condense",
        CHAPTER,
        "Prediction matrices",
        2,
        ("phi", "gamma"),
        library.condense,
        _condense_cases,
        CONDENSE_MISTAKES,
        oracle=_by_simulation,
    ),
    Exercise(
        "riccati_step",
        CHAPTER,
        "One step of the Riccati equation",
        3,
        ("P", "K"),
        library.riccati_step,
        _riccati_cases,
        RICCATI_MISTAKES,
        oracle=_by_completing_the_square,
        intermediates=RICCATI_STEPS,
    ),
    Exercise(
        "mpc_qp",
        CHAPTER,
        "MPC as a quadratic program",
        4,
        ("P", "q", "A", "l", "u"),
        library.mpc_qp,
        _program_cases,
        PROGRAM_MISTAKES,
        oracle=_program_entry_by_entry,
    ),
    Exercise(
        "qp_residuals",
        CHAPTER,
        "Is it a solution?",
        3,
        ("primal", "dual", "gap"),
        library.qp_residuals,
        _residual_cases,
        RESIDUAL_MISTAKES,
        oracle=_residuals_entry_by_entry,
        float32_allowed=False,
    ),
    Exercise(
        "closed_loop_metrics",
        CHAPTER,
        "What an episode cost",
        3,
        ("metrics",),
        library.closed_loop_metrics,
        _metrics_cases,
        METRICS_MISTAKES,
        oracle=_metrics_step_by_step,
    ),
)
