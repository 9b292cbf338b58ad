r"""Plants with limits, model predictive control, and what a closed loop costs.

A plant moves in steps, :math:`x_{k+1} = f(x_k, u_k)`, linear ones as
:math:`x_{k+1} = A x_k + B u_k`. A controller is anything that is called
with the state and returns the input, or a ``Decision``, which says
besides how it came about. The conventions are the same in every
function:

- A stage costs :math:`x^\top Q x + u^\top R u`, without a half; so the
  Hessian of a quadratic program is *twice* Q, R and P.
- Feedback gains are for :math:`u = -Kx`.
- Limits are arrays of the state's or input's length, infinite where
  there is none.
- Nothing is clipped silently: an input beyond the limits is applied as
  it was commanded, and counted.

Nothing that is needed to state a problem needs a solver: OSQP and SciPy
are imported where a ``LinearMPC`` or ``NonlinearMPC`` is made.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Num, Real

from attn_lessons._arrays import as_count, as_float, check_rank, check_shape
from attn_lessons.multihead import linear_backward, linear_forward
from attn_lessons.optim import warmup_cosine
from attn_lessons.recurrent import (
    init_lstm,
    lstm_backward_cached,
    lstm_forward,
    lstm_step_forward,
)
from attn_lessons.training import Record, train, train_start
from attn_lessons.transformer import (
    Config,
    classifier_backward,
    classifier_forward,
    init_classifier,
)

Motion = Callable[[np.ndarray, np.ndarray], np.ndarray]
Controller = Callable[[np.ndarray], Any]


# --- plants -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plant:
    """What is controlled: its motion, its limits, and what a step costs."""

    name: str
    a: Float[np.ndarray, "X X"]
    """The motion, or its linearisation at rest."""
    b: Float[np.ndarray, "X U"]
    q: Float[np.ndarray, "X X"]
    """Symmetric: the cost of the state."""
    r: Float[np.ndarray, "U U"]
    """Symmetric and positive definite: the cost of the input."""
    u_min: Float[np.ndarray, "U"]
    u_max: Float[np.ndarray, "U"]
    x_min: Float[np.ndarray, "X"]
    x_max: Float[np.ndarray, "X"]
    dt: float
    """Seconds a step, and so the deadline of a controller."""
    x_lost: Float[np.ndarray, "X"]
    """An entry beyond this ends an episode: fallen, off the road."""
    motion: Motion | None = None
    """The motion where it is not linear: x ``(..., X)``, u ``(..., U)``."""

    def step(
        self, x: Num[np.ndarray, "*batch X"], u: Num[np.ndarray, "*batch U"]
    ) -> Num[np.ndarray, "*batch X"]:
        """The next state; complex numbers go through, so that linearise can ask."""
        if self.motion is not None:
            return self.motion(x, u)
        return x @ self.a.T + u @ self.b.T


def double_integrator(dt: float = 0.1) -> Plant:
    """A mass pushed along a line: x = (position, speed), u = acceleration.

    Limits: ±1 for the push, ±5 for the position, ±1 for the speed.
    """
    a, b = discretise(np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0], [1.0]]), dt)
    limit = np.array([5.0, 1.0])
    return Plant(
        name="double integrator",
        a=a,
        b=b,
        q=np.diag([1.0, 0.1]),
        r=np.array([[0.1]]),
        u_min=-np.ones(1),
        u_max=np.ones(1),
        x_min=-limit,
        x_max=limit,
        dt=dt,
        x_lost=np.full(2, 100.0),
    )


def quadcopter() -> Plant:
    """The quadcopter of OSQP's documentation: 12 states, 4 rotors.

    The numbers and the order of the states are the example's: its third
    entry is what it steers to 1, its first two are limited to ±π/6 and
    its sixth to at least -1. The input is each rotor's thrust less that
    of hovering, 10.5916; the thrust itself is from 9.6 to 13.

    Source: OSQP documentation, example "Model predictive control".
    """
    a = np.eye(12)
    a[[0, 1, 2], [6, 7, 8]] = 0.1
    a[3, [0, 6, 9]] = 0.0488, 0.0016, 0.0992
    a[4, [1, 7, 10]] = -0.0488, -0.0016, 0.0992
    a[5, 11] = 0.0992
    a[9, [0, 6, 9]] = 0.9734, 0.0488, 0.9846
    a[10, [1, 7, 10]] = -0.9734, -0.0488, 0.9846
    a[11, 11] = 0.9846
    across = np.array([0.0, -1.0, 0.0, 1.0])  # rotors 2 and 4 against each other
    along = np.array([-1.0, 0.0, 1.0, 0.0])
    turn = np.array([-1.0, 1.0, -1.0, 1.0])
    lift = np.ones(4)
    b = np.stack(
        [
            *(0.0726 * across, 0.0726 * along, 0.0152 * turn),
            *(0.0006 * across, -0.0006 * along, 0.0106 * lift),
            *(1.4512 * across, 1.4512 * along, 0.3049 * turn),
            *(0.0236 * across, -0.0236 * along, 0.2107 * lift),
        ]
    )
    free, hover = np.full(12, np.inf), 10.5916
    x_min, x_max = -free, free.copy()
    x_min[[0, 1, 5]] = -np.pi / 6, -np.pi / 6, -1.0
    x_max[[0, 1]] = np.pi / 6
    return Plant(
        name="quadcopter",
        a=a,
        b=b,
        q=np.diag([0, 0, 10.0, 10, 10, 10, 0, 0, 0, 5, 5, 5]),
        r=0.1 * np.eye(4),
        u_min=np.full(4, 9.6 - hover),
        u_max=np.full(4, 13.0 - hover),
        x_min=x_min,
        x_max=x_max,
        dt=0.1,
        x_lost=np.full(12, 100.0),
    )


def lane_keeping(
    speed: float = 30.0,
    *,
    mass: float = 1573.0,
    inertia: float = 2873.0,
    front: float = 1.1,
    rear: float = 1.58,
    stiffness: float = 80000.0,
    dt: float = 0.05,
) -> Plant:
    r"""A car beside the middle of its lane: the linear bicycle model.

    x = (offset e, its rate, heading error ψ, its rate), u = steering
    angle δ in degrees, so that a unit is a usual size; with tyre
    stiffness C a wheel and axles at l_f and l_r:

    .. math:: \ddot e = -\tfrac{4C}{mv} \dot e + \tfrac{4C}{m} \psi
              - \tfrac{2C(l_f - l_r)}{mv} \dot\psi
              + \tfrac{2C}{m} \delta

    .. math:: \ddot\psi = -\tfrac{2C(l_f - l_r)}{I v} \dot e
              + \tfrac{2C(l_f - l_r)}{I} \psi
              - \tfrac{2C(l_f^2 + l_r^2)}{I v} \dot\psi
              + \tfrac{2C l_f}{I} \delta

    held exactly over steps of ``dt`` seconds. Metres, radians, seconds.
    Limits: steering 1.7 degrees; the offset 0.8 m, which leaves a car
    of 1.9 m in a lane of 3.5; heading 0.1 rad.

    ValueError: a size is not positive.

    Source: Rajamani 2012, eq. (2.45), with the car of its example.
    """
    for name, value in (("speed", speed), ("mass", mass), ("stiffness", stiffness), ("dt", dt)):
        _positive(name, value)
    c, arm, square = 2 * stiffness, front - rear, front**2 + rear**2
    flow = np.array(
        [
            [0, 1, 0, 0],
            [0, -2 * c / (mass * speed), 2 * c / mass, -c * arm / (mass * speed)],
            [0, 0, 0, 1],
            [0, -c * arm / (inertia * speed), c * arm / inertia, -c * square / (inertia * speed)],
        ]
    )
    push = np.array([[0.0], [c / mass], [0.0], [c * front / inertia]]) * np.pi / 180
    a, b = discretise(flow, push, dt)
    x_max = np.array([0.8, np.inf, 0.1, np.inf])
    return Plant(
        name="lane keeping",
        a=a,
        b=b,
        q=np.diag([1.0, 0.05, 2.0, 0.05]),
        r=np.array([[5.0]]),
        u_min=np.full(1, -1.7),
        u_max=np.full(1, 1.7),
        x_min=-x_max,
        x_max=x_max,
        dt=dt,
        x_lost=np.array([3.5, 100.0, 0.8, 100.0]),
    )


def cart_pole(
    *, cart: float = 1.0, pole: float = 0.2, length: float = 0.5, dt: float = 0.05
) -> Plant:
    r"""A pole balanced on a cart: the one plant here that is not linear.

    x = (place p, angle θ from upright, speed, turn rate), u = force. The
    pole is a mass m at the end of a rod of length l, the cart's mass M:

    .. math:: \ddot p = \frac{u + m \sin\theta\,(l \dot\theta^2
              - g \cos\theta)}{M + m \sin^2\theta}, \qquad
              \ddot\theta = \frac{g \sin\theta
              - \ddot p \cos\theta}{l}

    by one Runge–Kutta step of ``dt`` seconds. ``a`` and ``b`` are its
    linearisation upright. Limits: force 20 N, place 1 m either way. An
    episode is lost beyond 2.5 m and a right angle.

    ValueError: a size is not positive.
    """
    for name, value in (("cart", cart), ("pole", pole), ("length", length), ("dt", dt)):
        _positive(name, value)

    def flow(x, u):
        angle, speed, rate = x[..., 1], x[..., 2], x[..., 3]
        sin, cos = np.sin(angle), np.cos(angle)
        push = u[..., 0] + pole * sin * (length * rate**2 - 9.81 * cos)
        along = push / (cart + pole * sin**2)
        return np.stack([speed, rate, along, (9.81 * sin - along * cos) / length], axis=-1)

    def motion(x, u):
        return rk4_step(flow, x, u, dt)

    a, b, _ = linearise(motion, np.zeros(4), np.zeros(1))
    x_max = np.array([1.0, np.inf, np.inf, np.inf])
    return Plant(
        name="cart-pole",
        a=a,
        b=b,
        q=np.diag([1.0, 5.0, 0.1, 0.1]),
        r=np.array([[0.02]]),
        u_min=np.full(1, -20.0),
        u_max=np.full(1, 20.0),
        x_min=-x_max,
        x_max=x_max,
        dt=dt,
        x_lost=np.array([2.5, np.pi / 2, 100.0, 100.0]),
        motion=motion,
    )


def discretise(
    a: Real[np.ndarray, "X X"], b: Real[np.ndarray, "X U"], dt: float
) -> tuple[Float[np.ndarray, "X X"], Float[np.ndarray, "X U"]]:
    r"""The exact step of :math:`\dot x = Ax + Bu` with u held over it.

    .. math:: \begin{pmatrix} A_d & B_d \\ 0 & I \end{pmatrix}
              = \exp \begin{pmatrix} A\,dt & B\,dt \\ 0 & 0
              \end{pmatrix}

    No inverse of A is taken, so an integrator is no special case.

    Shapes: a ``(X, X)``, b ``(X, U)``; the same come back.

    ValueError: shapes do not fit; dt is not positive.

    Source: Van Loan 1978, theorem 1.
    """
    a, b = _model(a, b)
    n, total = len(a), len(a) + b.shape[1]
    block = np.zeros((total, total))
    block[:n, :n], block[:n, n:] = a, b
    block *= _positive("dt", dt)
    # Halved until Taylor's series needs few terms, and squared as often.
    halvings = max(0, int(np.ceil(np.log2(max(np.abs(block).sum(axis=0).max(), 1e-300)))) + 1)
    block /= 2.0**halvings
    whole = term = np.eye(total)
    for k in range(1, 19):
        term = term @ block / k
        whole = whole + term
    for _ in range(halvings):
        whole = whole @ whole
    return whole[:n, :n].copy(), whole[:n, n:].copy()


def rk4_step(flow: Motion, x: np.ndarray, u: np.ndarray, dt: float) -> np.ndarray:
    r"""One Runge–Kutta step of :math:`\dot x = f(x, u)`, u held over it.

    .. math:: x + \tfrac{dt}{6} (k_1 + 2 k_2 + 2 k_3 + k_4)

    Shapes: x ``(..., X)``, u ``(..., U)``.
    """
    k1 = flow(x, u)
    k2 = flow(x + dt / 2 * k1, u)
    k3 = flow(x + dt / 2 * k2, u)
    k4 = flow(x + dt * k3, u)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def linearise(
    step: Motion, x: Real[np.ndarray, "*batch X"], u: Real[np.ndarray, "*batch U"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""The motion's tangent at a state and an input, by the complex step.

    .. math:: f(x', u') \approx A x' + B u' + c, \qquad
              A_{ij} = \operatorname{Im} f_i(x + ih e_j, u) / h

    Nothing is subtracted, so it is exact to rounding. ``step`` has to
    take complex numbers and be analytic.

    Shapes: x ``(..., X)``, u ``(..., U)``; returns A ``(..., X, X)``,
    B ``(..., X, U)`` and c ``(..., X)``.

    Source: Squire & Trapp 1998.
    """
    x, u = as_float("x", x), as_float("u", u)
    n, tiny = x.shape[-1], 1e-30
    point = np.concatenate([x, u], axis=-1).astype(complex)
    columns = []
    for j in range(point.shape[-1]):
        moved = point.copy()
        moved[..., j] += 1j * tiny
        columns.append(step(moved[..., :n], moved[..., n:]).imag / tiny)
    tangent = np.stack(columns, axis=-1)
    linear = (tangent @ point.real[..., None])[..., 0]
    return tangent[..., :n], tangent[..., n:], step(x, u) - linear


# --- prediction and the linear-quadratic regulator ---------------------------------------------


def condense(
    a: Real[np.ndarray, "X X"], b: Real[np.ndarray, "X U"], horizon: int
) -> tuple[Float[np.ndarray, "NX X"], Float[np.ndarray, "NX NU"]]:
    r"""All states to come from the state now and the inputs to come.

    .. math:: \begin{pmatrix} x_1 \\ \vdots \\ x_N \end{pmatrix}
              = \Phi x_0 + \Gamma \begin{pmatrix} u_0 \\ \vdots \\
              u_{N-1} \end{pmatrix}, \qquad
              \Phi_k = A^k, \quad \Gamma_{kj} = A^{k-1-j} B
              \;(j < k)

    Shapes: a ``(X, X)``, b ``(X, U)``; phi ``(N·X, X)``, gamma
    ``(N·X, N·U)``, N = ``horizon``.

    ValueError: shapes do not fit; horizon < 1.
    """
    a, b = _model(a, b)
    horizon = as_count("horizon", horizon, 1)
    n, m = b.shape
    phi = np.zeros((horizon, n, n), a.dtype)
    gamma = np.zeros((horizon, n, horizon, m), a.dtype)
    power, response = np.eye(n, dtype=a.dtype), b
    for k in range(horizon):
        # What an input does k steps later is the same for every input.
        for j in range(horizon - k):
            gamma[j + k, :, j] = response
        power, response = a @ power, a @ response
        phi[k] = power
    return phi.reshape(horizon * n, n), gamma.reshape(horizon * n, horizon * m)


def riccati_step(
    p: Real[np.ndarray, "X X"],
    a: Real[np.ndarray, "X X"],
    b: Real[np.ndarray, "X U"],
    q: Real[np.ndarray, "X X"],
    r: Real[np.ndarray, "U U"],
) -> tuple[Float[np.ndarray, "X X"], Float[np.ndarray, "U X"]]:
    r"""One step back in time: what a state costs, and the best input.

    .. math:: K = (R + B^\top P B)^{-1} B^\top P A, \qquad
              P^- = Q + A^\top P (A - B K), \qquad u = -Kx

    where :math:`x^\top P x` is the cost from the next step on, and
    :math:`x^\top P^- x` that from this one on.

    Shapes: p, a, q ``(X, X)``, b ``(X, U)``, r ``(U, U)``; returns P⁻
    ``(X, X)`` and K ``(U, X)``.

    ValueError: shapes do not fit.

    Source: Rawlings, Mayne & Diehl 2017, section 1.3.
    """
    a, b = _model(a, b)
    p, q, r = _costs(a, b, p=p, q=q, r=r)
    k = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
    before = q + a.T @ p @ (a - b @ k)
    # Rounding leaves P a little asymmetric, and steps would feed on that.
    return (before + before.T) / 2, k


def riccati(
    a: Real[np.ndarray, "X X"],
    b: Real[np.ndarray, "X U"],
    q: Real[np.ndarray, "X X"],
    r: Real[np.ndarray, "U U"],
) -> tuple[Float[np.ndarray, "X X"], Float[np.ndarray, "U X"]]:
    r"""The P and K that riccati_step no longer changes.

    .. math:: P = Q + A^\top P A - A^\top P B
              (R + B^\top P B)^{-1} B^\top P A

    By doubling: round j holds what 2^j steps do, so a few rounds are
    a thousand steps.

    .. math:: W = I + GH, \quad H \leftarrow H + A^\top H W^{-1} A,
              \quad G \leftarrow G + A W^{-1} G A^\top,
              \quad A \leftarrow A W^{-1} A

    from H = Q and G = B R⁻¹ Bᵀ; P is the limit of H.

    Shapes: as in riccati_step; returns ``(p, k)`` for u = -Kx.

    ValueError: shapes do not fit; no input brings the state to rest.

    Source: Anderson 1978; Chu, Fan, Lin & Wang 2004.
    """
    a, b = _model(a, b)
    h, r = _costs(a, b, q=q, r=r)
    step, g = a, b @ np.linalg.solve(r, b.T)
    with np.errstate(all="ignore"):
        for _ in range(64):
            w = np.linalg.solve(np.eye(len(a)) + g @ h, np.hstack([step, g @ step.T]))
            more = step.T @ h @ w[:, : len(a)]
            g, step = g + step @ w[:, len(a) :], step @ w[:, : len(a)]
            h = h + (more + more.T) / 2
            if not np.isfinite(h).all() or not np.isfinite(step).all():
                break
            if np.abs(more).max() <= 1e-15 * max(np.abs(h).max(), 1e-300):
                k = riccati_step(h, a, b, q, r)[1]
                if np.abs(np.linalg.eigvals(a - b @ k)).max() < 1 - 1e-8:
                    return h, k
                break
    raise ValueError("a, b: expected a plant that its inputs can bring to rest; these cannot")


def lqr(plant: Plant, *, clipped: bool = True) -> Controller:
    r"""The linear-quadratic regulator, u = -Kx, clipped to the limits or not.

    It knows of no limit when it decides; clipping comes after.
    """
    _, k = riccati(plant.a, plant.b, plant.q, plant.r)

    def feedback(x: np.ndarray) -> np.ndarray:
        u = -k @ x
        return np.clip(u, plant.u_min, plant.u_max) if clipped else u

    return feedback


# --- the quadratic program ---------------------------------------------------------------------

QP = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def mpc_qp(
    a: Real[np.ndarray, "X X"],
    b: Real[np.ndarray, "X U"],
    q: Real[np.ndarray, "X X"],
    r: Real[np.ndarray, "U U"],
    p: Real[np.ndarray, "X X"],
    x0: Real[np.ndarray, "X"],
    horizon: int,
    u_min: Real[np.ndarray, "U"],
    u_max: Real[np.ndarray, "U"],
    x_min: Real[np.ndarray, "X"],
    x_max: Real[np.ndarray, "X"],
    *,
    reference: Real[np.ndarray, "X"] | None = None,
) -> QP:
    r"""The regulator's quadratic program in OSQP's form.

    .. math:: \min_z \tfrac12 z^\top P z + q^\top z
              \;\text{with}\; l \le A z \le u, \qquad
              z = (x_0, \dots, x_N, u_0, \dots, u_{N-1})

    for the cost :math:`\sum_{k<N} (x_k^\top Q x_k + u_k^\top R u_k)
    + x_N^\top P_N x_N`, of x less ``reference`` where one is given. The
    rows of A are

    - first the motion: :math:`-x_0 = -x(0)`, then
      :math:`A x_k + B u_k - x_{k+1} = 0`;
    - then the limits of every variable, in the order of z: the identity.

    Shapes: P ``(n, n)`` whole and symmetric, q ``(n,)``, A ``(m, n)``, l
    and u ``(m,)`` with n = (N + 1)·X + N·U, m = (N + 1)·X + n. Dense.

    ValueError: shapes do not fit; horizon < 1; a lower limit is above
    the upper one.

    Source: OSQP documentation, example "Model predictive control".
    """
    a, b = _model(a, b)
    q, r, p = _costs(a, b, q=q, r=r, p=p)
    n, m = b.shape
    horizon = as_count("horizon", horizon, 1)
    x0, reference = _state("x0", x0, n), _state("reference", _or_zeros(reference, n), n)
    _limits("u", u_min, u_max, m)
    _limits("x", x_min, x_max, n)
    hessian = 2 * _block_diagonal([q] * horizon + [p] + [r] * horizon)
    gradient = np.zeros(len(hessian))
    gradient[: n * horizon] = np.tile(-2 * q @ reference, horizon)
    gradient[n * horizon : n * (horizon + 1)] = -2 * p @ reference
    states = np.kron(np.eye(horizon + 1, k=-1), a) - np.eye(n * (horizon + 1))
    inputs = np.kron(np.eye(horizon + 1, horizon, k=-1), b)
    rows = np.vstack([np.hstack([states, inputs]), np.eye(len(hessian))])
    fixed = np.concatenate([-x0, np.zeros(n * horizon)])
    lower = np.concatenate([fixed, np.tile(x_min, horizon + 1), np.tile(u_min, horizon)])
    upper = np.concatenate([fixed, np.tile(x_max, horizon + 1), np.tile(u_max, horizon)])
    return hessian, gradient, rows, lower, upper


def soften(qp: QP, rows: Integer[np.ndarray, "S"] | Sequence[int], penalty: float) -> QP:
    r"""The same program, some of its rows allowed to give way at a price.

    .. math:: l_i - s_i \le (Az)_i \le u_i + s_i, \qquad s \ge 0,
              \qquad \text{cost } \dots + \rho \sum_i (s_i + s_i^2)

    The linear part keeps :math:`s = 0` as long as that can be had for
    multipliers below ρ; the square shares out what cannot. The first
    rows and columns stay in their places.

    Shapes: with S rows to soften, S more variables and 2·S more rows.

    ValueError: penalty is not positive.

    Source: Kerrigan & Maciejowski 2000.
    """
    hessian, gradient, a, lower, upper = qp
    rows = np.asarray(rows, int)
    n, slack = len(gradient), np.eye(len(rows))
    give = np.zeros((len(a), len(rows)))
    give[rows] = -slack
    softened = np.block([[a, give], [a[rows], slack], [np.zeros((len(rows), n)), slack]])
    below = lower.copy()
    below[rows] = -np.inf
    open_end = np.full(len(rows), np.inf)
    return (
        _block_diagonal([hessian, 2 * _positive("penalty", penalty) * slack]),
        np.concatenate([gradient, np.full(len(rows), float(penalty))]),
        softened,
        np.concatenate([below, lower[rows], np.zeros(len(rows))]),
        np.concatenate([upper, open_end, open_end]),
    )


def qp_residuals(
    P: Real[np.ndarray, "n n"],
    q: Real[np.ndarray, "n"],
    A: Real[np.ndarray, "m n"],
    l: Real[np.ndarray, "m"],  # noqa: E741
    u: Real[np.ndarray, "m"],
    z: Real[np.ndarray, "n"],
    y: Real[np.ndarray, "m"],
) -> tuple[float, float, float]:
    r"""How far a claimed solution is from one: bounds, slope, gap.

    .. math:: \text{primal} = \max_i \max(l - Az,\; Az - u,\; 0)_i,
              \qquad
              \text{dual} = \max_j |Pz + q + A^\top y|_j

    .. math:: \text{gap} = \bigl| z^\top P z + q^\top z
              + u^\top y_+ - l^\top y_- \bigr|, \qquad
              y_+ = \max(y, 0), \; y_- = \max(-y, 0)

    y is positive where an upper bound pushes, negative where a lower
    one does. An infinite bound and a multiplier of 0 give 0; one that
    is not 0 gives inf. All three are 0 at a solution and only there.

    Shapes: P ``(n, n)`` whole, A ``(m, n)``, z and q ``(n,)``, y, l, u
    ``(m,)``; returns three floats ``(primal, dual, gap)``.

    ValueError: shapes do not fit.

    Source: Stellato et al. 2020, section 2.
    """
    P, q, A = as_float("P", P), as_float("q", q), as_float("A", A)
    check_rank("A", A, "m n")
    m, n = A.shape
    check_shape("P", P, (n, n), f"to match A {A.shape}")
    vectors = {"q": (q, n), "l": (l, m), "u": (u, m), "z": (z, n), "y": (y, m)}
    for name, (vector, length) in vectors.items():
        check_shape(name, np.asarray(vector), (length,), f"to match A {A.shape}")
    values = A @ z
    primal = max(np.max(l - values, initial=0), np.max(values - u, initial=0))
    dual = np.max(np.abs(P @ z + q + A.T @ y), initial=0)
    pushed = np.where(y > 0, u, l)
    # inf · 0 is NaN: a bound that does not push has no part in the gap.
    support = np.sum(np.where(y == 0, 0, pushed) * y)
    return float(primal), float(dual), float(np.abs(z @ P @ z + q @ z + support))


# --- controllers that plan ---------------------------------------------------------------------


class Decision(NamedTuple):
    """An input, and how it came about."""

    u: np.ndarray
    status: str = "computed"
    """``solved``, ``unconverged``, or why not and what was done instead."""
    iterations: int = 0
    primal: float = 0.0
    """Largest violation of a row of the program, recomputed."""
    dual: float = 0.0
    """Largest entry of its gradient over one plus the largest multiplier, recomputed."""


class _Found(NamedTuple):
    z: np.ndarray
    status: str
    iterations: int
    primal: float
    dual: float


class _Solver:
    """OSQP, set up once; bounds and entries of A change, and nothing it says is taken on trust."""

    def __init__(self, qp: QP, pattern: np.ndarray, accept: float, settings: Mapping[str, Any]):
        import osqp
        from scipy import sparse

        hessian, gradient, rows, lower, upper = qp
        self.gradient, self.lower, self.upper = gradient, lower.copy(), upper.copy()
        self.accept, self.n = accept, len(gradient)
        # The pattern may hold places that are 0 now and will not stay so.
        a = sparse.csc_matrix(pattern, dtype=float)
        column = np.repeat(np.arange(a.shape[1]), np.diff(a.indptr))
        self.place = np.full(a.shape, -1)
        self.place[a.indices, column] = np.arange(a.nnz)
        a.data[:] = rows[a.indices, column]
        self._a, hessian = a, sparse.csc_matrix(hessian)
        self._products(hessian)
        self._solver = osqp.OSQP()
        ended = osqp.SolverStatus
        self._solved = ended.OSQP_SOLVED
        self._infeasible = (
            ended.OSQP_PRIMAL_INFEASIBLE,
            ended.OSQP_PRIMAL_INFEASIBLE_INACCURATE,
        )
        self._solver.setup(
            sparse.triu(hessian, format="csc"), gradient, a, lower, upper, **settings
        )

    def _products(self, hessian: Any) -> None:
        """P z + Aᵀy and A z in one product; where A's entries are in it is found by numbering."""
        from scipy import sparse

        numbers = self._a.copy()
        numbers.data[:] = np.arange(1, self._a.nnz + 1)
        nothing = sparse.csr_matrix((self._a.shape[0],) * 2)
        stacked = [
            sparse.vstack([sparse.hstack([p, a.T]), sparse.hstack([a, nothing])], format="csr")
            for p, a in ((hessian, self._a), (0 * hessian, numbers))
        ]
        self._both = stacked[0]
        self._from = stacked[1].data.astype(int) - 1
        self._of_a = np.flatnonzero(self._from >= 0)
        self._from = self._from[self._of_a]

    def change(self, places: np.ndarray, values: np.ndarray) -> None:
        """Other numbers at some places of A."""
        self._a.data[places] = values
        self._both.data[self._of_a] = self._a.data[self._from]
        self._solver.update(Ax=self._a.data)

    def solve(self) -> _Found:
        self._solver.update(l=self.lower, u=self.upper)
        result = self._solver.solve(raise_error=False)
        ended, z, y = result.info.status_val, result.x, result.y
        if ended in self._infeasible or z is None or not np.isfinite(z).all():
            # What it holds now points to infinity: no start for the next one.
            self._solver.warm_start(np.zeros(self.n), np.zeros(len(self.lower)))
            status = "infeasible" if ended in self._infeasible else "unfinished"
            return _Found(np.full(self.n, np.nan), status, result.info.iter, np.inf, np.inf)
        products = self._both @ np.concatenate([z, y])
        slope, values = products[: self.n] + self.gradient, products[self.n :]
        primal = max(0.0, (self.lower - values).max(), (values - self.upper).max())
        # Multipliers of 1e3 bring roundings of 1e3 · eps with them.
        dual = max(slope.max(), -slope.min()) / (1 + max(y.max(), -y.min()))
        status = "unfinished"
        if ended == self._solved:
            status = "solved" if max(primal, dual) <= self.accept else "inaccurate"
        return _Found(z, status, result.info.iter, float(primal), float(dual))


class _Planner:
    """What both predictive controllers share: the last good plan, and what to do without one."""

    def __init__(self, plant: Plant, horizon: int, reference: np.ndarray | None, usable: float):
        self.plant, self.horizon = plant, as_count("horizon", horizon, 1)
        n = len(plant.a)
        self.reference = _state("reference", _or_zeros(reference, n), n)
        self.usable = usable
        self._feedback = lqr(plant)
        self._planned: deque[np.ndarray] = deque()

    def _keep(self, inputs: np.ndarray) -> None:
        """The inputs that follow the one applied now."""
        self._planned = deque(inputs[1:])

    def _is_usable(self, found: _Found) -> bool:
        return found.status == "solved" or max(found.primal, found.dual) <= self.usable

    def _limited(self, u: np.ndarray) -> np.ndarray:
        """What a solver leaves over a limit, an actuator does not see."""
        return np.minimum(np.maximum(u, self.plant.u_min), self.plant.u_max)

    def _fall_back(self, x: np.ndarray, found: _Found) -> Decision:
        """The plan's next input while it lasts, the clipped regulator after that."""
        if self._planned:
            # Not the input of last time again: the plan's next one.
            u, what = self._planned.popleft(), "next input of the last plan"
        else:
            u, what = self._feedback(x - self.reference), "clipped LQR"
        status = f"{found.status}: {what}"
        return Decision(self._limited(u), status, found.iterations, found.primal, found.dual)


class LinearMPC(_Planner):
    """Model predictive control of the plant's linear model, on OSQP.

    The program of mpc_qp is set up once. A step changes x(0) in it,
    solves from where the last step ended, recomputes the residuals, and
    returns the first input of the plan, as a ``Decision`` whose status is

    - ``solved``: OSQP says so, and neither residual is above
      ``accept``: the largest violation of a row, and the largest entry
      of the gradient over one plus the largest multiplier;
    - ``inaccurate`` where OSQP says solved and the residuals say
      otherwise, ``unfinished`` where its iterations ran out, with
      ``: plan used`` as long as neither is above ``usable``;
    - those two, or ``infeasible``, with what was applied instead:
      ``: next input of the last plan``, or ``: clipped LQR`` where no
      plan is left.

    ``terminal`` is the cost of the last state, the Riccati equation's P
    when None. ``soft``, a penalty as in soften, lets states be outside
    their limits; then no start is infeasible. ``eps`` is OSQP's
    tolerance, absolute and relative: its own, 1e-3, leaves the
    quadcopter's cost right to five digits, 1e-8 to ten. Other
    ``settings`` are OSQP's; where it takes many iterations, ``rho`` is
    the one to try.

    ValueError: shapes do not fit; horizon < 1; the state is not finite.

    Source: Rawlings, Mayne & Diehl 2017, section 1.3 (the regulator);
    Stellato et al. 2020 (the solver).
    """

    def __init__(
        self,
        plant: Plant,
        horizon: int,
        *,
        terminal: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        soft: float | None = None,
        eps: float = 1e-8,
        accept: float = 1e-6,
        usable: float = 1e-3,
        **settings: Any,
    ):
        super().__init__(plant, horizon, reference, usable)
        qp = _plant_qp(plant, self.horizon, terminal, self.reference, soft)
        self._solver = _Solver(qp, qp[2], accept, _settings(eps, settings))
        self._inputs = len(plant.a) * (self.horizon + 1)

    @property
    def n_parameters(self) -> int:
        return 0

    def reset(self) -> None:
        """Forget the last plan; OSQP's warm start stays."""
        self._planned.clear()

    def __call__(self, x: Real[np.ndarray, "X"]) -> Decision:
        n, m = self.plant.b.shape
        x = _state("x", x, n)
        self._solver.lower[:n] = self._solver.upper[:n] = -x
        found = self._solver.solve()
        if not self._is_usable(found):
            return self._fall_back(x, found)
        plan = found.z[self._inputs : self._inputs + m * self.horizon].reshape(-1, m)
        self._keep(plan)
        status = found.status if found.status == "solved" else f"{found.status}: plan used"
        return Decision(self._limited(plan[0]), status, *found[2:])


class NonlinearMPC(_Planner):
    """Model predictive control of the plant's own motion, by successive linearisation.

    A step starts from the last plan, moved on by one. Each iteration
    replaces the motion by its tangent along the plan and solves the
    program that is left; when plan and inputs move by no more than
    ``tolerance``, the plan obeys the motion itself and the status is
    ``solved``. After ``max_iterations`` the input at hand is applied
    with the status ``unconverged``: its plan is one of a motion that
    the plant has not. A program that fails ends as in LinearMPC. States
    are ``soft``, because a tangent far off may have no feasible plan.

    The other arguments are those of LinearMPC.

    ValueError: shapes do not fit; a count is < 1; the state is not
    finite.

    Source: Diehl, Bock & Schlöder 2005, with more than their one
    iteration.
    """

    def __init__(
        self,
        plant: Plant,
        horizon: int,
        *,
        terminal: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        soft: float | None = 100.0,
        max_iterations: int = 10,
        tolerance: float = 1e-3,
        eps: float = 1e-6,
        accept: float = 1e-4,
        usable: float = 1e-3,
        **settings: Any,
    ):
        super().__init__(plant, horizon, reference, usable)
        self.max_iterations = as_count("max_iterations", max_iterations, 1)
        self.tolerance = _positive("tolerance", tolerance)
        qp = _plant_qp(plant, self.horizon, terminal, self.reference, soft)
        n, m = plant.b.shape
        pattern = (qp[2] != 0).astype(float)
        k = np.arange(self.horizon)[:, None, None]
        row = n * (k + 1) + np.arange(n)[:, None]
        of_a = (row, n * k + np.arange(n))
        of_b = (row, n * (self.horizon + 1) + m * k + np.arange(m))
        pattern[of_a] = pattern[of_b] = 1
        self._solver = _Solver(qp, pattern, accept, _settings(eps, settings))
        self._of_a, self._of_b = self._solver.place[of_a], self._solver.place[of_b]
        self._plan: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def n_parameters(self) -> int:
        return 0

    def reset(self) -> None:
        """Forget the last plan."""
        self._planned.clear()
        self._plan = None

    def __call__(self, x: Real[np.ndarray, "X"]) -> Decision:
        n, m = self.plant.b.shape
        x = _state("x", x, n)
        states, inputs = self._start(x)
        worked, found = 0, None
        for _ in range(self.max_iterations):
            found = self._tangent_program(x, states, inputs)
            worked += found.iterations
            if not self._is_usable(found):
                self._plan = None
                return self._fall_back(x, found._replace(iterations=worked))
            split = n * (self.horizon + 1)
            new_states = found.z[:split].reshape(-1, n)
            new_inputs = found.z[split : split + m * self.horizon].reshape(-1, m)
            moved = max(np.abs(new_states - states).max(), np.abs(new_inputs - inputs).max())
            states, inputs = new_states, new_inputs
            if moved <= self.tolerance:
                break
        assert found is not None
        status = "solved" if moved <= self.tolerance else "unconverged"
        self._plan = states, inputs
        self._keep(inputs)
        return Decision(self._limited(inputs[0]), status, worked, found.primal, found.dual)

    def _start(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last plan moved on by one; without one, a straight line to the reference."""
        if self._plan is None:
            share = np.linspace(0, 1, self.horizon + 1)[:, None]
            line = (1 - share) * x + share * self.reference
            return line, np.zeros((self.horizon, self.plant.b.shape[1]))
        states, inputs = self._plan
        inputs = np.concatenate([inputs[1:], inputs[-1:]])
        last = self.plant.step(states[-1], inputs[-1])
        return np.concatenate([x[None], states[2:], last[None]]), inputs

    def _tangent_program(self, x: np.ndarray, states: np.ndarray, inputs: np.ndarray) -> _Found:
        a, b, c = linearise(self.plant.step, states[:-1], inputs)
        places = np.concatenate([self._of_a.ravel(), self._of_b.ravel()])
        self._solver.change(places, np.concatenate([a.ravel(), b.ravel()]))
        fixed = np.concatenate([-x, -c.ravel()])
        self._solver.lower[: fixed.size] = self._solver.upper[: fixed.size] = fixed
        return self._solver.solve()


class ClippedPolicy:
    """Any controller, its input clipped to the limits and called so."""

    def __init__(
        self, policy: Controller, u_min: Real[np.ndarray, "U"], u_max: Real[np.ndarray, "U"]
    ):
        self.policy = policy
        self.u_min, self.u_max = as_float("u_min", u_min), as_float("u_max", u_max)

    @property
    def n_parameters(self) -> int:
        return getattr(self.policy, "n_parameters", 0)

    def reset(self) -> None:
        reset = getattr(self.policy, "reset", None)
        if reset is not None:
            reset()

    def __call__(self, x: np.ndarray) -> Decision:
        decision = _decision(self.policy(x), self.u_min.size)
        u = np.clip(decision.u, self.u_min, self.u_max)
        if np.array_equal(u, decision.u, equal_nan=True):
            return decision
        return decision._replace(u=u, status=f"{decision.status}, clipped")


def _plant_qp(plant, horizon, terminal, reference, soft) -> QP:
    """A plant's program; with soft limits those of x(0), which nothing can change, are left out."""
    p = riccati(plant.a, plant.b, plant.q, plant.r)[0] if terminal is None else terminal
    limits = (plant.u_min, plant.u_max, plant.x_min, plant.x_max)
    start = np.zeros(len(plant.a))
    arguments = (plant.a, plant.b, plant.q, plant.r, p, start, horizon, *limits)
    qp = mpc_qp(*arguments, reference=reference)
    if soft is None:
        return qp
    _, _, _, lower, upper = qp
    n = len(plant.a)
    first = n * (horizon + 1)  # the rows of the motion come before those of the limits
    lower[first : first + n], upper[first : first + n] = -np.inf, np.inf
    states = np.arange(first + n, 2 * first)
    limited = np.isfinite(lower[states]) | np.isfinite(upper[states])
    return soften(qp, states[limited], soft)


def _settings(eps: float, others: Mapping[str, Any]) -> dict[str, Any]:
    tolerances = {"eps_abs": _positive("eps", eps), "eps_rel": eps}
    return {"verbose": False, "max_iter": 4000, **tolerances, **others}


# --- the closed loop ---------------------------------------------------------------------------


class Rollout(NamedTuple):
    """One episode of T steps, or fewer where it was lost."""

    x: np.ndarray
    """``(T + 1, X)``."""
    u: np.ndarray
    """``(T, U)``: the inputs that were applied, not those commanded and still under way."""
    status: tuple[str, ...]
    """What the controller said of each step."""
    seconds: np.ndarray
    """``(T,)``: how long it took to decide."""
    lost: int | None = None
    """The step after which the state was beyond the plant's ``x_lost``, or not finite."""


def closed_loop(
    plant: Plant,
    controller: Controller,
    x0: Real[np.ndarray, "X"],
    steps: int,
    *,
    rng: np.random.Generator | None = None,
    noise: float | Real[np.ndarray, "X"] = 0.0,
    mismatch: Plant | None = None,
    delay: int = 0,
) -> Rollout:
    r"""Let a controller drive a plant.

    .. math:: u_k = \pi(x_{k-d}), \qquad
              x_{k+1} = f(x_k, u_k) + \sigma \circ w_k, \quad
              w_k \sim N(0, I)

    ``noise`` is σ, drawn from ``rng``. ``mismatch`` is the plant that
    really moves, where the controller's is a model of another one.
    ``delay`` is d, in steps; until the first command arrives, the input
    is 0. The controller's ``reset`` is called first if it has one.

    ValueError: shapes do not fit; a count is negative; noise without
    rng; the controller returns another shape than ``(U,)``.
    """
    n, m = plant.b.shape
    moving = plant if mismatch is None else mismatch
    check_shape("mismatch", moving.b, (n, m), "as plant's b")
    x = _state("x0", x0, n).copy()
    sigma = np.broadcast_to(as_float("noise", np.asarray(noise)), (n,))
    if rng is None and sigma.any():
        raise ValueError("rng: expected a generator to draw the noise from; got None")
    if hasattr(controller, "reset"):
        controller.reset()
    on_the_way = deque([np.zeros(m)] * as_count("delay", delay))
    states, inputs, said, seconds = [x], [], [], []
    for step in range(1, as_count("steps", steps) + 1):
        seen = x.copy()
        begun = time.perf_counter()
        answer = controller(seen)
        seconds.append(time.perf_counter() - begun)
        decision = _decision(answer, m)
        on_the_way.append(decision.u)
        u = on_the_way.popleft()
        with np.errstate(all="ignore"):
            x = moving.step(x, u)
        if rng is not None:
            x = x + sigma * rng.normal(size=n)
        states.append(x)
        inputs.append(u)
        said.append(decision.status)
        if not (np.abs(x) <= plant.x_lost).all():  # NaN is lost too
            return _rollout(states, inputs, said, seconds, m, step)
    return _rollout(states, inputs, said, seconds, m, None)


def _rollout(states, inputs, said, seconds, m, lost) -> Rollout:
    applied = np.array(inputs).reshape(-1, m)
    return Rollout(np.array(states), applied, tuple(said), np.array(seconds), lost)


def _decision(answer: Any, m: int) -> Decision:
    decision = answer if isinstance(answer, Decision) else Decision(np.asarray(answer, float))
    if decision.u.shape != (m,):
        raise ValueError(f"controller: expected inputs of shape ({m},); got {decision.u.shape}")
    return decision


def closed_loop_metrics(
    x: Real[np.ndarray, "T1 X"],
    u: Real[np.ndarray, "T U"],
    q: Real[np.ndarray, "X X"],
    r: Real[np.ndarray, "U U"],
    x_min: Real[np.ndarray, "X"],
    x_max: Real[np.ndarray, "X"],
    u_min: Real[np.ndarray, "U"],
    u_max: Real[np.ndarray, "U"],
    band: float | Real[np.ndarray, "X"] = 0.05,
    *,
    reference: Real[np.ndarray, "X"] | None = None,
    tolerance: float = 0.0,
) -> dict[str, float]:
    r"""What an episode cost, when it came to rest, and what it broke.

    .. math:: \text{cost} = \sum_{k=1}^{T} (x_k - r)^\top Q (x_k - r)
              + u_{k-1}^\top R\, u_{k-1}

    so every input is counted with the state that it leads to, and the
    state at the start, which nobody chose, is not. The keys are

    - ``cost``;
    - ``settling``: the first k from which on every entry of x - r stays
      within ±band, k = 0 … T; inf where the last state is outside;
    - ``state_violations``, ``input_violations``: how many of x₁ … x_T
      and of u₀ … u_{T-1} have an entry beyond its limit by more than
      ``tolerance``;
    - ``max_state_violation``, ``max_input_violation``: by how much the
      worst entry among them is, at least 0.

    Shapes: x ``(T + 1, X)``, u ``(T, U)``; band ``(X,)`` or one number.

    ValueError: shapes do not fit.
    """
    x, u = as_float("x", x), as_float("u", u)
    check_rank("u", u, "T U")
    (steps, m), n = u.shape, np.shape(q)[0]
    check_shape("x", x, (steps + 1, n), f"to match u {u.shape} and q")
    check_shape("r", np.asarray(r), (m, m), f"to match u {u.shape}")
    _limits("x", x_min, x_max, n)
    _limits("u", u_min, u_max, m)
    error = x - _state("reference", _or_zeros(reference, n), n)
    after = error[1:]
    cost = np.sum((after @ q) * after) + np.sum((u @ r) * u)
    outside = np.flatnonzero((np.abs(error) > band).any(axis=1))
    settling = 0.0 if not outside.size else float(outside[-1] + 1)
    x_excess = np.maximum(x_min - x[1:], x[1:] - x_max).max(axis=1, initial=-np.inf)
    u_excess = np.maximum(u_min - u, u - u_max).max(axis=1, initial=-np.inf)
    return {
        "cost": float(cost),
        "settling": settling if settling <= steps else float("inf"),
        "state_violations": float((x_excess > tolerance).sum()),
        "input_violations": float((u_excess > tolerance).sum()),
        "max_state_violation": float(x_excess.max(initial=0)),
        "max_input_violation": float(u_excess.max(initial=0)),
    }


def latency(seconds: Real[np.ndarray, "T"], deadline: float) -> dict[str, float]:
    """Median, 99th percentile and maximum of some times, and how many passed the deadline."""
    seconds = as_float("seconds", seconds)
    p50, p99 = (float(np.quantile(seconds, share)) for share in (0.5, 0.99))
    missed = float((seconds > deadline).sum())
    return {"p50": p50, "p99": p99, "max": float(seconds.max()), "misses": missed}


def status_counts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """How often each status was given, the commonest first."""
    return dict(Counter(said for rollout in rollouts for said in rollout.status).most_common())


# --- policies learned by imitation ---------------------------------------------------------------


def demonstrations(
    plant: Plant,
    expert: Controller,
    starts: Real[np.ndarray, "E X"],
    steps: int,
    *,
    rng: np.random.Generator,
    noise: float | Real[np.ndarray, "X"] = 0.0,
    explore: float = 0.0,
) -> tuple[Float[np.ndarray, "K T X"], Float[np.ndarray, "K T U"]]:
    r"""What an expert sees and does, an episode for each start.

    .. math:: u_k = \pi(x_k) \;\text{is recorded}, \qquad
              u_k + \epsilon\, (u_{\max} - u_{\min})\, w_k
              \;\text{is applied}

    With ``explore``, ε > 0, the expert shows as well how it comes back
    from where it would not have gone. ``noise`` is closed_loop's. An
    episode that is lost is left out.

    Shapes: starts ``(E, X)``; returns states ``(K, T, X)`` and inputs
    ``(K, T, U)``, K <= E, T = ``steps``.

    ValueError: shapes do not fit; every episode is lost; a limit on the
    input is infinite and ``explore`` is not 0.

    Source: Laskey et al. 2017, with a fixed noise.
    """
    m = plant.b.shape[1]
    width = plant.u_max - plant.u_min if explore else np.zeros(m)
    if not np.isfinite(width).all():
        raise ValueError("explore: expected 0 where an input has no limits to be measured by")
    states, inputs = [], []
    for start in as_float("starts", starts):
        shown: list[np.ndarray] = []

        def shaken(x: np.ndarray, shown: list[np.ndarray] = shown) -> np.ndarray:
            shown.append(_decision(expert(x), m).u)
            return shown[-1] + explore * width * rng.normal(size=m)

        if hasattr(expert, "reset"):
            expert.reset()
        rollout = closed_loop(plant, shaken, start, steps, rng=rng, noise=noise)
        if rollout.lost is None:
            states.append(rollout.x[:-1])
            inputs.append(np.array(shown))
    if not states:
        raise ValueError(
            f"expert: expected at least one episode to be kept; lost all {len(starts)}"
        )
    return np.array(states), np.array(inputs)


class AttentionPolicy:
    """The last ``config.max_len`` states through a Transformer, one input out.

    A state is a token; the newest has the last place, and where an
    episode has just begun, the places before it are masked. ``params``
    are a classifier's; its K outputs are the U inputs over ``u_scale``.
    States are divided by ``x_scale``.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        config: Config,
        x_scale: Real[np.ndarray, "X"],
        u_scale: Real[np.ndarray, "U"],
    ):
        self.params, self.config = params, config
        self.x_scale, self.u_scale = as_float("x_scale", x_scale), as_float("u_scale", u_scale)
        self.reset()

    @property
    def n_parameters(self) -> int:
        return sum(p.size for p in self.params.values())

    def reset(self) -> None:
        """An episode begins: no state has been seen."""
        self._seen = np.zeros((1, self.config.max_len, self.x_scale.size))
        self._mask = np.zeros((1, self.config.max_len), bool)

    def __call__(self, x: Real[np.ndarray, "X"]) -> np.ndarray:
        self._seen[0, :-1], self._seen[0, -1] = self._seen[0, 1:].copy(), x / self.x_scale
        self._mask[0, :-1], self._mask[0, -1] = self._mask[0, 1:].copy(), True
        u, _ = classifier_forward(self._seen, self.params, self.config, self._mask)
        return u[0] * self.u_scale


class LSTMPolicy:
    """An LSTM that carries h and c from state to state, and a linear layer to the input.

    ``params`` are ``lstm.wx``, ``lstm.wh``, ``lstm.b`` as in
    recurrent.py, ``head.weight`` ``(H, U)`` and ``head.bias``; scales as
    in AttentionPolicy.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        x_scale: Real[np.ndarray, "X"],
        u_scale: Real[np.ndarray, "U"],
    ):
        self.params = params
        self.x_scale, self.u_scale = as_float("x_scale", x_scale), as_float("u_scale", u_scale)
        self._weights = tuple(params[f"lstm.{name}"] for name in ("wx", "wh", "b"))
        self.reset()

    @property
    def n_parameters(self) -> int:
        return sum(p.size for p in self.params.values())

    def reset(self) -> None:
        """An episode begins: both states are 0."""
        self._h = self._c = np.zeros((1, len(self.params["lstm.wh"])))

    def __call__(self, x: Real[np.ndarray, "X"]) -> np.ndarray:
        scaled = (x / self.x_scale)[None]
        self._h, self._c = lstm_step_forward(scaled, self._h, self._c, *self._weights)
        u = self._h @ self.params["head.weight"] + self.params["head.bias"]
        return u[0] * self.u_scale


class Imitation(NamedTuple):
    """A policy, and the record of every step of its training."""

    policy: AttentionPolicy | LSTMPolicy
    records: list[Record]


def imitate(
    states: Real[np.ndarray, "E T X"],
    inputs: Real[np.ndarray, "E T U"],
    kind: Literal["attention", "lstm"],
    *,
    seed: int = 0,
    steps: int = 2000,
    batch: int = 64,
    width: int = 32,
    window: int = 8,
    n_heads: int = 4,
    lr: float = 3e-3,
) -> Imitation:
    r"""A policy that does what the expert did, as nearly as it learns to.

    .. math:: L = \frac{1}{nU} \sum_{k} \bigl\| (\pi_\theta(x_{\le k})
              - u_k) / s_u \bigr\|^2

    by AdamW without decay, warmed up and then along a cosine. An
    attention policy of one block learns from ``batch`` windows a step,
    an LSTM from whole episodes, as many as hold ``batch`` times ``window``
    states. Scales are the demonstrations' root mean squares. ``width``
    is the model's, and that of the LSTM's state.

    Shapes: states ``(E, T, X)``, inputs ``(E, T, U)``; returns
    ``(policy, records)``.

    ValueError: shapes do not fit; ``kind`` is unknown; a count is < 1.

    Source: Pomerleau 1989.
    """
    states, inputs = as_float("states", states), as_float("inputs", inputs)
    check_rank("states", states, "E T X")
    check_shape("inputs", inputs, (*states.shape[:2], "U"), f"to match states {states.shape}")
    x_scale, u_scale = _root_mean_square(states), _root_mean_square(inputs)
    x, u = states / x_scale, inputs / u_scale
    width, window = as_count("width", width, 1), as_count("window", window, 1)
    batch, rng = as_count("batch", batch, 1), np.random.default_rng(seed)
    if kind == "attention":
        config = Config(1, width, n_heads, 2 * width, window)
        params = init_classifier(rng, config, x.shape[2], u.shape[2])
        loss = _attention_loss(x, u, config, batch)
    elif kind == "lstm":
        params = {f"lstm.{n}": w for n, w in init_lstm(rng, x.shape[2], width).items()}
        params |= {"head.weight": rng.normal(size=(width, u.shape[2])) * width**-0.5}
        params |= {"head.bias": np.zeros(u.shape[2])}
        loss = _lstm_loss(x, u, max(1, batch * window // x.shape[1]))
    else:
        raise ValueError(f"kind: expected 'attention' or 'lstm'; got {kind!r}")
    state, records = train(
        train_start(params, seed),
        loss,
        steps,
        lambda step: warmup_cosine(step, lr, max(1, steps // 20), steps),
        weight_decay=0.0,
        stop_on_divergence=False,
    )
    if kind == "attention":
        return Imitation(AttentionPolicy(state.params, config, x_scale, u_scale), records)
    return Imitation(LSTMPolicy(state.params, x_scale, u_scale), records)


def _root_mean_square(x: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.mean(x**2, axis=(0, 1)))
    return np.where(size > 0, size, 1.0)


def _squared_error(got: np.ndarray, want: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean square and its gradient."""
    error = got - want
    return float(np.mean(error**2)), 2 * error / error.size


def _windows(x: np.ndarray, episode: np.ndarray, end: np.ndarray, window: int):
    """The states up to and with ``end``, (n, window, X), and which of them there are."""
    at = end[:, None] + np.arange(1 - window, 1)
    mask = at >= 0
    return np.where(mask[..., None], x[episode[:, None], np.maximum(at, 0)], 0), mask


def _attention_loss(x, u, config, batch):
    def loss(params, rng):
        episode, end = rng.integers(len(x), size=batch), rng.integers(x.shape[1], size=batch)
        tokens, mask = _windows(x, episode, end, config.max_len)
        got, cache = classifier_forward(tokens, params, config, mask)
        value, dgot = _squared_error(got, u[episode, end])
        return value, classifier_backward(dgot, cache)

    return loss


def _lstm_loss(x, u, batch):
    def loss(params, rng):
        episode = rng.integers(len(x), size=batch)
        weights = [params[f"lstm.{name}"] for name in ("wx", "wh", "b")]
        start = np.zeros((batch, len(weights[1])))
        h_all, _, cache = lstm_forward(x[episode], start, start, *weights)
        got = linear_forward(h_all, params["head.weight"], params["head.bias"])
        value, dgot = _squared_error(got, u[episode])
        dh_all, dweight, dbias = linear_backward(dgot, h_all, params["head.weight"])
        _, _, _, grads = lstm_backward_cached(dh_all, cache)
        head = {"head.weight": dweight, "head.bias": dbias}
        return value, {f"lstm.{name}": g for name, g in grads.items()} | head

    return loss


# --- small things ------------------------------------------------------------------------------


def _model(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = as_float("a", a), as_float("b", b)
    check_rank("a", a, "X X")
    check_shape("a", a, (len(a), len(a)), "with as many columns as rows")
    check_shape("b", b, (len(a), "U"), f"to match a {a.shape}")
    return a, b


def _costs(a, b, **matrices) -> list[np.ndarray]:
    found = []
    for name, matrix in matrices.items():
        n = b.shape[1] if name == "r" else len(a)
        matrix = as_float(name, matrix)
        check_shape(name, matrix, (n, n), f"to match {'b' if name == 'r' else 'a'}")
        found.append(matrix)
    return found


def _state(name: str, x: Any, n: int) -> np.ndarray:
    x = as_float(name, x)
    if x.shape != (n,):
        check_shape(name, x, (n,), "as the plant has states")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: expected finite numbers; got {x}")
    return x


def _or_zeros(x, n: int) -> np.ndarray:
    return np.zeros(n) if x is None else x


def _limits(name: str, lower, upper, n: int) -> None:
    for end, limit in (("min", lower), ("max", upper)):
        check_shape(f"{name}_{end}", as_float(f"{name}_{end}", limit), (n,), "one for each entry")
    if not (np.asarray(lower) <= np.asarray(upper)).all():
        raise ValueError(f"{name}_min: expected at most {name}_max, {upper}; got {lower}")


def _positive(name: str, value: float) -> float:
    if not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a positive number; got {value!r}")
    return float(value)


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    whole = np.zeros((size, size))
    at = 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole
