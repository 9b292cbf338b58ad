"""Plants, programs and closed loops against SciPy, three solvers, and sums done by hand."""

import inspect
import itertools
import json
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import clarabel  # noqa: F401  (both are reached through qpsolvers)
import numpy as np
import osqp
import piqp  # noqa: F401
import pytest
import qpsolvers
import scipy.integrate
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from strategies import generators, strided

from attn_lessons import control as library
from attn_lessons.control import (
    ClippedPolicy,
    Decision,
    LinearMPC,
    NonlinearMPC,
    Plant,
    cart_pole,
    closed_loop,
    closed_loop_metrics,
    condense,
    demonstrations,
    discretise,
    double_integrator,
    imitate,
    lane_keeping,
    latency,
    linearise,
    lqr,
    mpc_qp,
    qp_residuals,
    quadcopter,
    riccati,
    riccati_step,
    rk4_step,
    soften,
    status_counts,
)
from attn_lessons.gradcheck import directional_check

ROOT = Path(__file__).resolve().parents[1]
EXACT = 1e-10
INF = np.inf
PLANTS = (double_integrator, quadcopter, lane_keeping, cart_pole)
each_plant = pytest.mark.parametrize("make", PLANTS, ids=lambda make: make.__name__)


def agree(got, want, rtol=EXACT):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= rtol * max(np.abs(want).max(initial=0), 1e-300)


@st.composite
def models(draw, most=5):
    """A and B of different sizes, laid out in any way; A may be unstable or an integrator."""
    n, m = draw(st.permutations(range(1, most + 1)))[:2]
    rng = draw(generators())
    a = rng.normal(size=(n, n)) * draw(st.sampled_from([0.0, 0.3, 1.0]))
    a += draw(st.sampled_from([0.0, 1.0])) * np.eye(n)
    return draw(strided(a)), draw(strided(rng.normal(size=(n, m)))), rng


def weights(rng, n, m):
    def positive(size):
        root = rng.normal(size=(size, size))
        return root @ root.T + 0.1 * np.eye(size)

    return positive(n), positive(m)


def simulated(plant_step, x, inputs):
    states = [x]
    for u in np.asarray(inputs, float):
        states.append(plant_step(states[-1], u))
    return np.array(states)


def at_height_one():
    reference = np.zeros(12)
    reference[2] = 1
    return reference


# --- plants -------------------------------------------------------------------------------------


@each_plant
def test_a_plant_is_whole(make):
    plant = make()
    n, m = plant.b.shape
    assert np.array_equal(plant.q, plant.q.T)
    assert np.array_equal(plant.r, plant.r.T)
    assert np.linalg.eigvalsh(plant.q).min() >= 0
    assert np.linalg.eigvalsh(plant.r).min() > 0
    assert (plant.u_min < 0).all()
    assert (plant.u_max > 0).all()
    assert (plant.x_min < plant.x_max).all()
    assert (plant.x_lost > np.where(np.isfinite(plant.x_max), plant.x_max, 0)).all()
    # At rest without a push it stays, and a, b are the tangent there.
    assert np.array_equal(plant.step(np.zeros(n), np.zeros(m)), np.zeros(n))
    a, b, c = linearise(plant.step, np.zeros(n), np.zeros(m))
    agree(a, plant.a)
    agree(b, plant.b)
    assert np.array_equal(c, np.zeros(n))


@each_plant
def test_a_plant_steps_many_states_at_once(make):
    plant, rng = make(), np.random.default_rng(0)
    n, m = plant.b.shape
    x, u = 0.3 * rng.normal(size=(3, 2, n)), rng.normal(size=(3, 2, m))
    one_by_one = [plant.step(x[i], u[i]) for i in np.ndindex(3, 2)]
    agree(plant.step(x, u), np.reshape(one_by_one, x.shape), 1e-14)


def test_a_plant_cannot_be_changed():
    with pytest.raises(AttributeError):
        quadcopter().dt = 1.0


@given(models(), st.sampled_from([1e-3, 0.1, 2.0]))
def test_discretise_is_the_matrix_exponential(model, dt):
    a, b, _ = model
    n, m = b.shape
    block = np.zeros((n + m, n + m))
    block[:n, :n], block[:n, n:] = a, b
    whole = scipy.linalg.expm(block * dt)
    got_a, got_b = discretise(a, b, dt)
    agree(np.hstack([got_a, got_b]), whole[:n])


def test_discretise_by_hand():
    """A mass: after dt under u, u·dt faster and u·dt²/2 further. A has no inverse."""
    a, b = discretise(np.array([[0.0, 1], [0, 0]]), np.array([[0.0], [1]]), 0.1)
    agree(a, [[1, 0.1], [0, 1]], 1e-15)
    agree(b, [[0.005], [0.1]], 1e-15)


def test_discretise_steps_as_the_flow_does():
    """Against an integrator of differential equations, for the car."""
    plant = lane_keeping(dt=0.05)
    fine = lane_keeping(dt=0.05 / 50)
    x, u = np.array([0.4, -0.3, 0.02, 0.1]), np.array([0.02])
    agree(plant.step(x, u), simulated(fine.step, x, [u] * 50)[-1], 1e-12)
    rate = (fine.a - np.eye(4)) / fine.dt
    speed = 30.0
    # Sideways speed of a car that goes straight at an angle is v·ψ: no side slip, no force.
    assert abs((rate @ [0, speed * 1e-3, 1e-3, 0])[1]) <= 5e-3


@given(generators())
def test_rk4_is_of_fourth_order(rng):
    """Half the step, a sixteenth of the error a second."""
    x, u = 0.5 * rng.normal(size=4), rng.normal(size=1)

    def end(dt):
        plant = cart_pole(dt=dt)
        return simulated(plant.step, x, [u] * round(0.4 / dt))[-1]

    exact = end(0.4 / 256)
    coarse, fine = (np.abs(end(dt) - exact).max() for dt in (0.05, 0.025))
    assert fine <= coarse / 8


def test_rk4_of_a_linear_flow_is_taylors_series_to_the_fourth():
    a = np.array([[0.0, 1.0], [-2.0, -0.3]])
    got = rk4_step(lambda x, u: x @ a.T, np.eye(2), np.zeros((2, 1)), 0.1)
    powers = [np.linalg.matrix_power(0.1 * a, k) / f for k, f in enumerate((1, 1, 2, 6, 24))]
    agree(got.T, sum(powers), 1e-14)


def test_cart_pole_keeps_its_energy():
    """Nobody pushes: what is lost in height comes back as speed."""
    cart, pole, length = 1.0, 0.2, 0.5
    plant = cart_pole(dt=0.001)
    states = simulated(plant.step, np.array([0.0, 0.4, 0.1, -0.2]), [np.zeros(1)] * 1500)
    _, angle, speed, rate = states.T
    sideways = speed + length * rate * np.cos(angle)
    up = -length * rate * np.sin(angle)
    energy = cart * speed**2 / 2 + pole * (sideways**2 + up**2) / 2
    energy += pole * 9.81 * length * np.cos(angle)
    assert np.ptp(energy) <= 1e-9
    assert np.ptp(angle) > 1


def test_cart_pole_against_an_integrator():
    cart, pole, length = 1.0, 0.2, 0.5

    def flow(_, x):
        """The two equations of motion, solved for the accelerations as a linear system."""
        angle, rate = x[1], x[3]
        sin, cos = np.sin(angle), np.cos(angle)
        mass = [[cart + pole, pole * length * cos], [cos, length]]
        pushed = [3.0 + pole * length * rate**2 * sin, 9.81 * sin]
        return [x[2], rate, *np.linalg.solve(mass, pushed)]

    x = np.array([0.1, 0.5, -0.3, 0.4])
    exact = scipy.integrate.solve_ivp(flow, (0, 0.05), x, rtol=1e-12, atol=1e-12).y[:, -1]
    got = simulated(cart_pole(dt=0.005).step, x, [np.array([3.0])] * 10)[-1]
    agree(got, exact, 1e-7)


@given(generators())
def test_linearise_agrees_with_differences(rng):
    plant = cart_pole()
    x, u = 0.7 * rng.normal(size=(3, 4)), 5 * rng.normal(size=(3, 1))
    a, b, c = linearise(plant.step, x, u)
    for j in range(4):
        move = 1e-6 * np.eye(4)[j]
        agree(a[..., j], (plant.step(x + move, u) - plant.step(x - move, u)) / 2e-6, 1e-7)
    agree(b[..., 0], (plant.step(x, u + 1e-4) - plant.step(x, u - 1e-4)) / 2e-4, 1e-7)
    agree((a @ x[..., None] + b @ u[..., None])[..., 0] + c, plant.step(x, u), 1e-12)


# --- prediction, LQR ----------------------------------------------------------------------------


@given(models(), st.integers(1, 7))
def test_condense_predicts_what_a_simulation_does(model, horizon):
    a, b, rng = model
    n, m = b.shape
    phi, gamma = condense(a, b, horizon)
    x, inputs = rng.normal(size=n), rng.normal(size=(horizon, m))
    states = simulated(lambda x, u: a @ x + b @ u, x, inputs)
    agree(phi @ x + gamma @ inputs.ravel(), states[1:].ravel())
    # No state answers to an input that comes after it.
    blocks = gamma.reshape(horizon, n, horizon, m)
    for k, j in itertools.combinations(range(horizon), 2):
        assert not blocks[k, :, j].any()


def test_condense_by_hand():
    phi, gamma = condense(np.array([[2.0]]), np.array([[3.0, 5.0]]), 3)
    agree(phi, [[2], [4], [8]])
    agree(gamma, [[3, 5, 0, 0, 0, 0], [6, 10, 3, 5, 0, 0], [12, 20, 6, 10, 3, 5]])


def can_rest(a, b):
    """Whether inputs reach every mode that does not die away by itself (Hautus's test)."""
    modes = np.linalg.eigvals(a)
    tests = (np.hstack([a - mode * np.eye(len(a)), b]) for mode in modes if abs(mode) > 1 - 1e-6)
    return all(np.linalg.svd(test, compute_uv=False)[-1] > 1e-3 for test in tests)


@given(models())
def test_riccati_against_scipy(model):
    a, b, rng = model
    q, r = weights(rng, *b.shape)
    if not can_rest(a, b):
        return
    p, k = riccati(a, b, q, r)
    agree(p, scipy.linalg.solve_discrete_are(a, b, q, r), 1e-7)
    again, same = riccati_step(p, a, b, q, r)
    agree(again, p, 1e-9)
    agree(k, same)
    assert np.abs(np.linalg.eigvals(a - b @ k)).max() < 1


@given(st.integers(2, 5), generators())
def test_riccati_refuses_what_no_input_brings_to_rest(n, rng):
    """n integrators and n - 1 inputs: some combination of them is moved by none."""
    b = rng.normal(size=(n, n - 1))
    with pytest.raises(ValueError, match="a, b: expected a plant that its inputs can bring"):
        riccati(np.eye(n), b, *weights(rng, n, n - 1))


@each_plant
def test_riccati_of_the_plants(make):
    """The quadcopter's sideways place costs nothing, so its P is semidefinite; the others' not."""
    plant = make()
    p, k = riccati(plant.a, plant.b, plant.q, plant.r)
    one, gain = riccati_step(p, plant.a, plant.b, plant.q, plant.r)
    agree(one, p, 1e-12)
    agree(gain, k, 1e-12)
    assert np.linalg.eigvalsh(p).min() >= -1e-9
    loop = np.abs(np.linalg.eigvals(plant.a - plant.b @ k))
    assert loop.max() < 1


@given(models(), st.integers(1, 6))
def test_riccati_steps_give_the_cost_of_the_best_inputs(model, horizon):
    """Back N times from P: the least cost from x, found besides by minimising over all inputs."""
    a, b, rng = model
    n, m = b.shape
    q, r = weights(rng, n, m)
    last, _ = weights(rng, n, m)
    x = rng.normal(size=n)
    p = last
    for _ in range(horizon):
        p, k = riccati_step(p, a, b, q, r)
    phi, gamma = condense(a, b, horizon)
    costs = scipy.linalg.block_diag(*[q] * (horizon - 1), last)
    hessian = gamma.T @ costs @ gamma + np.kron(np.eye(horizon), r)
    inputs = np.linalg.solve(hessian, -gamma.T @ costs @ phi @ x)
    states = phi @ x + gamma @ inputs
    least = x @ q @ x + states @ costs @ states + inputs @ np.kron(np.eye(horizon), r) @ inputs
    agree(x @ p @ x, least, 1e-9)
    agree(-k @ x, inputs[:m], 1e-7)


def test_riccati_says_where_there_is_no_solution():
    a = np.diag([1.1, 0.5])
    with pytest.raises(ValueError, match="a, b: expected a plant that its inputs can bring"):
        riccati(a, np.array([[0.0], [1.0]]), np.eye(2), np.eye(1))


def test_lqr_is_clipped_or_not():
    plant = double_integrator()
    x = np.array([4.0, 0.5])
    _, k = riccati(plant.a, plant.b, plant.q, plant.r)
    agree(lqr(plant, clipped=False)(x), -k @ x)
    agree(lqr(plant)(x), [-1.0])


# --- the quadratic program ----------------------------------------------------------------------


@st.composite
def programs(draw):
    """A plant with limits, a state within them and a horizon."""
    a, b, rng = draw(models())
    n, m = b.shape
    q, r = weights(rng, n, m)
    p, _ = weights(rng, n, m)
    u_max, x_max = rng.uniform(0.5, 2, m), rng.uniform(1, 3, n)
    x_max[rng.random(n) < 0.5] = INF
    x0 = 0.5 * np.where(np.isfinite(x_max), x_max, 1) * rng.uniform(-1, 1, n)
    limits = (-0.7 * u_max, u_max, -1.3 * x_max, x_max)
    return (a, b, q, r, p, x0, draw(st.integers(1, 5)), *limits), rng


@given(programs())
def test_mpc_qp_is_the_cost_and_the_motion(program):
    """At any plan that obeys the motion; and one that does not breaks a row of the motion."""
    arguments, rng = program
    a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max = arguments
    n, m = b.shape
    reference = rng.normal(size=n)
    P, g, A, l, u = mpc_qp(*arguments, reference=reference)  # noqa: E741
    inputs = rng.uniform(u_min, u_max, (horizon, m))
    states = simulated(lambda x, v: a @ x + b @ v, x0, inputs)
    z = np.concatenate([states.ravel(), inputs.ravel()])
    error = states - reference
    cost = sum(e @ q @ e for e in error[:-1]) + sum(v @ r @ v for v in inputs)
    cost += error[-1] @ p @ error[-1]
    constant = horizon * reference @ q @ reference + reference @ p @ reference
    agree(z @ P @ z / 2 + g @ z + constant, cost, 1e-9)
    agree(P, P.T, 0)
    rows = n * (horizon + 1)
    assert A.shape == (rows + len(z), len(z))
    assert np.array_equal(l[:rows], u[:rows])
    scale = max(1, np.abs(states).max())
    assert np.abs(A[:rows] @ z - l[:rows]).max() <= 1e-12 * scale
    assert np.array_equal(A[rows:], np.eye(len(z)))
    assert np.array_equal(l[rows:], [*np.tile(x_min, horizon + 1), *np.tile(u_min, horizon)])
    assert np.array_equal(u[rows:], [*np.tile(x_max, horizon + 1), *np.tile(u_max, horizon)])
    for place in range(rows):
        off = z + 1e-3 * np.eye(len(z))[place]
        assert np.abs(A[:rows] @ off - l[:rows]).max() >= 0.99e-3


def solved_by(solver, qp, **options):
    P, q, A, l, u = qp  # noqa: E741
    same, above, below = l == u, (l < u) & np.isfinite(u), (l < u) & np.isfinite(l)
    problem = qpsolvers.Problem(
        *(sparse.csc_matrix(P), q),
        *(sparse.csc_matrix(np.vstack([A[above], -A[below]])), np.hstack([u[above], -l[below]])),
        *(sparse.csc_matrix(A[same]), u[same]),
    )
    with warnings.catch_warnings():  # one says by a warning that there is no solution
        warnings.simplefilter("ignore")
        solution = qpsolvers.solve_problem(problem, solver=solver, **options)
    if not solution.found:
        return None, None
    y = np.zeros(len(A))
    y[same] = solution.y
    y[above] += solution.z[: above.sum()]
    y[below] -= solution.z[above.sum() :]
    return solution.x, y


TIGHT = {
    "clarabel": {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12},
    "piqp": {"eps_abs": 1e-11, "eps_rel": 1e-11},
}
each_solver = pytest.mark.parametrize("solver", sorted(TIGHT))


@each_solver
@given(program=programs())
def test_a_solution_of_another_solver_has_no_residuals(solver, program):
    arguments, _ = program
    qp = mpc_qp(*arguments)
    z, y = solved_by(solver, qp, **TIGHT[solver])
    if z is None:
        return
    size = 1 + max(np.abs(y).max(), np.abs(z).max()) ** 2
    primal, dual, gap = qp_residuals(*qp, z, y)
    assert max(primal, dual) <= 1e-7 * size
    assert gap <= 1e-6 * size


def test_qp_residuals_by_hand():
    r"""min z² with z >= 1: z = 1, y = -2; each way of being wrong shows in its own number."""
    qp = (np.array([[2.0]]), np.zeros(1), np.eye(1), np.array([1.0]), np.array([INF]))
    assert qp_residuals(*qp, np.array([1.0]), np.array([-2.0])) == (0, 0, 0)
    assert qp_residuals(*qp, np.array([0.75]), np.array([-1.5])) == (0.25, 0, 0.375)
    assert qp_residuals(*qp, np.array([1.0]), np.array([0.0])) == (0, 2, 2)
    # Feasible and flat, and still no solution: the bound that pushes is not touched.
    assert qp_residuals(*qp, np.array([2.0]), np.array([-4.0])) == (0, 0, 4)
    primal, dual, gap = qp_residuals(*qp, np.array([-1.0]), np.array([2.0]))
    assert (primal, dual, gap) == (2, 0, INF)


@given(programs())
def test_softened_rows_give_way_and_the_others_do_not(program):
    arguments, rng = program
    qp = mpc_qp(*arguments)
    P, q, A, l, u = qp  # noqa: E741
    z = rng.normal(size=len(q))
    values = A @ z
    rows = np.flatnonzero(rng.random(len(A)) < 0.5)
    slack = np.maximum(np.maximum(l - values, values - u)[rows], 0)
    P2, q2, A2, l2, u2 = soften(qp, rows, 7.0)
    both = np.concatenate([z, slack])
    penalty = 7 * (slack.sum() + (slack**2).sum())
    agree(both @ P2 @ both / 2 + q2 @ both, z @ P @ z / 2 + q @ z + penalty, 1e-9)
    over = np.maximum(l2 - A2 @ both, A2 @ both - u2)
    kept = np.setdiff1d(np.arange(len(A)), rows)
    hard = np.maximum(l - values, values - u)[kept]
    np.testing.assert_allclose(over[kept], hard, rtol=1e-9, atol=1e-12)
    tiny = 1e-12 * (1 + np.abs(values).max())
    assert over[rows].max(initial=-INF) <= tiny
    assert over[len(A) :].max(initial=-INF) <= tiny
    if slack.any():
        less = np.concatenate([z, 0.9 * slack])
        assert (
            np.maximum(l2 - A2 @ less, A2 @ less - u2)[[*rows, *range(len(A), len(A2))]].max() > 0
        )


# --- linear MPC: the published example ----------------------------------------------------------

# The first 100 steps from rest to a height of 1, counted over the states after each step.
PUBLISHED = {10: 18.067446, 40: 18.065115}
FIRST = [-0.9916, 1.748388, -0.9916, 1.748388]  # at horizon 10


def flown(horizon, **options):
    plant = quadcopter()
    mpc = LinearMPC(plant, horizon, terminal=plant.q, reference=at_height_one(), **options)
    return closed_loop(plant, mpc, np.zeros(12), 100)


def cost_of(plant, rollout, reference=None):
    limits = (plant.x_min, plant.x_max, plant.u_min, plant.u_max)
    return closed_loop_metrics(
        rollout.x, rollout.u, plant.q, plant.r, *limits, reference=reference, tolerance=1e-6
    )


@pytest.mark.parametrize("horizon", PUBLISHED)
def test_the_quadcopter_costs_what_it_is_known_to(horizon):
    rollout = flown(horizon)
    found = cost_of(quadcopter(), rollout, at_height_one())
    assert round(found["cost"], 6) == PUBLISHED[horizon]
    assert status_counts([rollout]) == {"solved": 100}
    assert found["input_violations"] == found["state_violations"] == 0


def test_the_quadcopters_first_input_is_the_known_one():
    np.testing.assert_allclose(flown(10).u[0], FIRST, atol=5e-7)


def test_osqps_own_tolerance_is_too_loose_for_six_digits():
    """Why eps is 1e-8 here: at OSQP's 1e-3 the cost differs in the sixth digit."""
    rollout = flown(10, eps=1e-3, accept=1.0)
    cost = cost_of(quadcopter(), rollout, at_height_one())["cost"]
    assert 1e-5 < abs(cost - PUBLISHED[10]) < 1e-2


@each_solver
@pytest.mark.parametrize("horizon", PUBLISHED)
def test_other_solvers_agree_on_the_quadcopters_programs(solver, horizon):
    """The programs of the closed loop, a few of them: the same plans and the same first input."""
    plant = quadcopter()
    rollout = flown(horizon)
    for step in (0, 1, 5, 40):
        qp = mpc_qp(
            *(plant.a, plant.b, plant.q, plant.r, plant.q, rollout.x[step], horizon),
            *(plant.u_min, plant.u_max, plant.x_min, plant.x_max),
            reference=at_height_one(),
        )
        z, _ = solved_by(solver, qp, **TIGHT[solver])
        first = z[12 * (horizon + 1) : 12 * (horizon + 1) + 4]
        np.testing.assert_allclose(rollout.u[step], first, atol=1e-6)


# --- linear MPC: what it falls back on -----------------------------------------------------------


@given(models(most=4), st.integers(1, 6))
def test_without_limits_mpc_is_lqr(model, horizon):
    """With the Riccati equation's P at the end, any horizon gives -Kx."""
    a, b, rng = model
    n, m = b.shape
    q, r = weights(rng, n, m)
    free_x, free_u = np.full(n, INF), np.full(m, INF)
    plant = Plant("free", a, b, q, r, -free_u, free_u, -free_x, free_x, 1.0, free_x)
    if not can_rest(a, b):
        return
    _, k = riccati(a, b, q, r)
    x = rng.normal(size=n)
    decision = LinearMPC(plant, horizon, max_iter=100_000)(x)
    assert decision.status == "solved"
    np.testing.assert_allclose(decision.u, -k @ x, atol=1e-5 * (1 + np.abs(k @ x).max()))


@pytest.mark.parametrize("make", [double_integrator, lane_keeping, cart_pole])
def test_inside_its_limits_a_plants_mpc_is_lqr(make):
    plant = make()
    x = 0.02 * np.arange(1, len(plant.a) + 1) / len(plant.a)
    want = lqr(plant, clipped=False)(x)
    np.testing.assert_allclose(LinearMPC(plant, 8)(x).u, want, atol=1e-5 * plant.u_max[0])


def test_an_infeasible_start_is_said_and_handled():
    """0.2 m outside the lane: no plan can make x(0) another one."""
    plant = lane_keeping()
    x = np.array([1.0, 0.0, 0.0, 0.0])
    decision = LinearMPC(plant, 20)(x)
    assert decision.status == "infeasible: clipped LQR"
    agree(decision.u, lqr(plant)(x))
    rollout = closed_loop(plant, LinearMPC(plant, 20), x, 100)
    counts = status_counts([rollout])
    assert counts["infeasible: clipped LQR"] >= 1
    assert counts["solved"] >= 80
    # It is back in its lane, and there for good.
    assert rollout.status[-1] == "solved"
    assert np.abs(rollout.x[-1]).max() <= 0.05
    inside = np.abs(rollout.x[:-1, 0]) <= plant.x_max[0]
    assert [said == "solved" for said in rollout.status] == inside.tolist()


def test_a_soft_limit_has_no_infeasible_start():
    plant = lane_keeping()
    decision = LinearMPC(plant, 20, soft=100.0)(np.array([1.0, 0.0, 0.0, 0.0]))
    assert decision.status == "solved"


def test_a_soft_limit_holds_where_it_can():
    """The penalty is above the multipliers: inside, hard and soft decide alike."""
    plant = lane_keeping()
    x = np.array([0.6, 0.5, 0.0, 0.0])
    hard = closed_loop(plant, LinearMPC(plant, 20), x, 60)
    soft = closed_loop(plant, LinearMPC(plant, 20, soft=1e4), x, 60)
    assert status_counts([hard, soft]) == {"solved": 120}
    np.testing.assert_allclose(soft.u, hard.u, atol=1e-5)


def test_a_limit_makes_a_difference():
    """From here LQR drifts 4 cm out of the lane; MPC, which knows of the edge, less than 1 mm."""
    plant = lane_keeping()
    x = np.array([0.7, 1.2, 0.0, 0.0])
    free = cost_of(plant, closed_loop(plant, lqr(plant), x, 60))
    bound = cost_of(plant, closed_loop(plant, LinearMPC(plant, 20, soft=1e3), x, 60))
    assert free["max_state_violation"] > 0.03
    assert bound["max_state_violation"] < 0.001
    assert bound["state_violations"] < free["state_violations"]


def test_multi_purpose_mpc_3_an_old_input_is_not_used_again_in_silence():
    """There, an infeasible step printed a line and applied the last input once more.

    Here it applies the plan's *next* input, says so in the status, and when the plan is used up
    it says that too.
    """
    plant = double_integrator()
    mpc = LinearMPC(plant, 4)
    start = np.array([3.0, 0.9])
    first = mpc(start)
    assert first.status == "solved"
    qp = mpc_qp(
        *(plant.a, plant.b, plant.q, plant.r, riccati(plant.a, plant.b, plant.q, plant.r)[0]),
        *(start, 4, plant.u_min, plant.u_max, plant.x_min, plant.x_max),
    )
    plan = solved_by("clarabel", qp, **TIGHT["clarabel"])[0][10:]
    too_fast = np.array([3.0, 1.5])
    said = [mpc(too_fast) for _ in range(5)]
    assert [d.status for d in said] == [
        *["infeasible: next input of the last plan"] * 3,
        *["infeasible: clipped LQR"] * 2,
    ]
    np.testing.assert_allclose([d.u[0] for d in said[:3]], plan[1:], atol=1e-5)
    # Back inside, it solves again: what it held was not a start from infinity.
    assert mpc(start).status == "solved"
    np.testing.assert_allclose(mpc(start).u, first.u, atol=1e-6)
    # And an episode begins without the plan of the last one.
    mpc.reset()
    assert mpc(too_fast).status == "infeasible: clipped LQR"


def test_osqp_225_solved_with_violated_bounds_is_caught():
    """Tilted by half a radian, at OSQP's default tolerance: a rotor below its limit, "solved"."""
    plant = quadcopter()
    x = np.zeros(12)
    x[0] = 0.5
    qp = mpc_qp(
        *(plant.a, plant.b, plant.q, plant.r, plant.q, x, 10),
        *(plant.u_min, plant.u_max, plant.x_min, plant.x_max),
    )
    P, q, A, l, u = qp  # noqa: E741
    solver = osqp.OSQP()
    solver.setup(
        *(sparse.triu(sparse.csc_matrix(P), format="csc"), q, sparse.csc_matrix(A), l, u),
        **{"verbose": False, "eps_abs": 1e-3, "eps_rel": 1e-3},
    )
    result = solver.solve(raise_error=False)
    assert result.info.status == "solved"
    assert result.x[135] < plant.u_min[3] - 1e-3
    decision = LinearMPC(plant, 10, terminal=plant.q, eps=1e-3)(x)
    assert decision.status == "inaccurate: clipped LQR"
    # The residuals are those of the program, not the solver's word.
    primal, dual, _ = qp_residuals(*qp, result.x, result.y)
    assert primal > 1e-3
    agree(decision.primal, primal, 1e-6)
    agree(decision.dual, dual / (1 + np.abs(result.y).max()), 1e-6)
    # With the tolerance of LinearMPC the same solver solves it, and the limit holds.
    solved = LinearMPC(plant, 10, terminal=plant.q)(x)
    assert solved.status == "solved"
    assert (solved.u >= plant.u_min).all()


def test_a_plan_that_is_a_little_off_is_used_and_called_so():
    plant = quadcopter()
    loose = {"terminal": plant.q, "reference": at_height_one(), "eps": 1e-3}
    decision = LinearMPC(plant, 10, **loose)(np.zeros(12))
    assert decision.status == "inaccurate: plan used"
    assert 1e-6 < decision.primal <= 1e-3
    assert (decision.u >= plant.u_min).all()
    strict = LinearMPC(plant, 10, **loose, usable=1e-6)(np.zeros(12))
    assert strict.status == "inaccurate: clipped LQR"


def test_iterations_that_run_out_are_said():
    plant = quadcopter()
    mpc = LinearMPC(plant, 10, reference=at_height_one(), max_iter=1)
    assert mpc(np.zeros(12)).status in ("unfinished: plan used", "unfinished: clipped LQR")


def test_linear_mpc_names_a_bad_state():
    mpc = LinearMPC(double_integrator(), 3)
    with pytest.raises(ValueError, match=r"x: expected shape \(2,\) .*; got \(3,\)"):
        mpc(np.zeros(3))
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        mpc(np.array([0.0, np.nan]))


# --- non-linear MPC -----------------------------------------------------------------------------


def test_nonlinear_mpc_of_a_linear_plant_is_linear_mpc():
    plant = double_integrator()
    for x in ([2.0, 0.3], [-4.0, -0.9], [0.1, 0.0]):
        hard, planned = LinearMPC(plant, 10), NonlinearMPC(plant, 10, soft=None, eps=1e-9)
        np.testing.assert_allclose(planned(np.array(x)).u, hard(np.array(x)).u, atol=1e-6)


def test_a_solved_plan_obeys_the_motion_and_cannot_be_bettered():
    """Against a general optimiser over the inputs, the motion simulated."""
    from scipy.optimize import minimize

    plant = cart_pole()
    x0, horizon = np.array([0.2, 0.35, 0.0, 0.3]), 8
    mpc = NonlinearMPC(plant, horizon, soft=None, tolerance=1e-7, eps=1e-10, accept=1e-7)
    decision = mpc(x0)
    assert decision.status == "solved"
    states, inputs = mpc._plan
    np.testing.assert_allclose(states, simulated(plant.step, x0, inputs), atol=1e-6)
    p, _ = riccati(plant.a, plant.b, plant.q, plant.r)

    def cost(flat):
        x = simulated(plant.step, x0, flat.reshape(-1, 1))
        ahead = np.einsum("ki,ij,kj->", x[:-1], plant.q, x[:-1])
        return ahead + x[-1] @ p @ x[-1] + plant.r[0, 0] * flat @ flat

    best = minimize(cost, np.zeros(horizon), bounds=[(-20, 20)] * horizon, tol=1e-12)
    assert cost(inputs.ravel()) <= best.fun * (1 + 1e-6)


def test_an_unconverged_step_is_said_and_is_wrong():
    """After one tangent, the plan is one of a motion that the plant has not."""
    plant = cart_pole()
    x0 = np.array([0.0, 0.9, 0.0, 0.0])
    mpc = NonlinearMPC(plant, 10, max_iterations=1)
    decision = mpc(x0)
    assert decision.status == "unconverged"
    states, inputs = mpc._plan
    assert np.abs(states - simulated(plant.step, x0, inputs)).max() > 0.1
    assert (plant.u_min <= decision.u).all()
    assert (decision.u <= plant.u_max).all()


def test_nonlinear_mpc_beats_linear_mpc_where_the_plant_is_not_linear():
    plant = cart_pole()
    x0 = np.array([0.0, 0.7, 0.0, 0.0])
    costs = [
        cost_of(plant, closed_loop(plant, make(plant, 16, soft=100.0), x0, 80))["cost"]
        for make in (NonlinearMPC, LinearMPC)
    ]
    assert costs[0] < costs[1]


def test_a_reset_forgets_the_plan():
    plant = cart_pole()
    mpc = NonlinearMPC(plant, 6)
    x = np.array([0.3, 0.2, 0.0, 0.0])
    first = mpc(x).u
    mpc(-x)
    mpc.reset()
    np.testing.assert_allclose(mpc(x).u, first, atol=1e-3)


# --- the closed loop ----------------------------------------------------------------------------


def test_the_loop_by_hand():
    plant = double_integrator()
    seen = []

    def controller(x):
        seen.append(x.copy())
        return np.array([0.1 * len(seen)])

    rollout = closed_loop(plant, controller, np.array([1.0, 0.0]), 3)
    want = simulated(plant.step, np.array([1.0, 0.0]), [[0.1], [0.2], [0.3]])
    agree(rollout.x, want)
    agree(rollout.u, [[0.1], [0.2], [0.3]])
    agree(seen, want[:-1])
    assert rollout.status == ("computed",) * 3
    assert rollout.seconds.shape == (3,)
    assert rollout.lost is None


def test_a_delayed_input_arrives_later_and_none_is_lost():
    plant, sent = double_integrator(), itertools.count(1)
    rollout = closed_loop(plant, lambda x: np.array([0.1 * next(sent)]), np.ones(2), 5, delay=2)
    agree(rollout.u, [[0], [0], [0.1], [0.2], [0.3]])
    agree(rollout.x, simulated(plant.step, np.ones(2), rollout.u))


def test_a_mismatch_moves_the_other_plant():
    plant, other = lane_keeping(30.0), lane_keeping(40.0)
    x = np.array([0.3, 0.1, 0.0, 0.0])
    rollout = closed_loop(plant, lqr(plant), x, 4, mismatch=other)
    agree(rollout.x, simulated(other.step, x, rollout.u))


def test_noise_is_what_the_seed_says():
    plant = double_integrator()
    sigma = np.array([0.0, 0.2])
    runs = [
        closed_loop(plant, lqr(plant), np.ones(2), 400, rng=np.random.default_rng(s), noise=sigma)
        for s in (3, 3, 4)
    ]
    assert np.array_equal(runs[0].x, runs[1].x)
    assert not np.array_equal(runs[0].x, runs[2].x)
    shocks = runs[0].x[1:] - plant.step(runs[0].x[:-1], runs[0].u)
    assert np.abs(shocks[:, 0]).max() <= 1e-12
    assert 0.17 <= shocks[:, 1].std() <= 0.23


def test_the_controller_cannot_move_the_plant_by_writing_to_the_state():
    plant = double_integrator()

    def writes(x):
        x[:] = 0
        return np.zeros(1)

    agree(closed_loop(plant, writes, np.ones(2), 1).x[0], [1, 1])


def test_a_lost_episode_ends_and_says_when():
    plant = cart_pole()
    rollout = closed_loop(plant, lambda x: np.zeros(1), np.array([0.0, 0.3, 0.0, 0.0]), 200)
    assert rollout.lost == len(rollout.u) == len(rollout.status) < 200
    assert abs(rollout.x[-1, 1]) > np.pi / 2
    assert (np.abs(rollout.x[:-1, 1]) <= np.pi / 2).all()


def test_an_episode_with_nan_is_lost():
    plant = double_integrator()
    rollout = closed_loop(plant, lambda x: np.full(1, np.nan), np.ones(2), 9)
    assert rollout.lost == 1


def test_a_clipped_policy_says_when_it_clips():
    plant = double_integrator()
    policy = ClippedPolicy(lqr(plant, clipped=False), plant.u_min, plant.u_max)
    rollout = closed_loop(plant, policy, np.array([4.0, 0.0]), 120)
    agree(rollout.u, closed_loop(plant, lqr(plant), np.array([4.0, 0.0]), 120).u)
    counts = status_counts([rollout])
    assert set(counts) == {"computed", "computed, clipped"}
    # A policy that is not finite is not made so.
    assert np.isnan(
        ClippedPolicy(lambda x: np.full(1, np.nan), -np.ones(1), np.ones(1))(np.ones(2)).u
    )


def test_a_clipped_policy_resets_what_it_holds():
    class Counting:
        resets = 0

        def reset(self):
            self.resets += 1

        def __call__(self, x):
            return np.zeros(1)

    inner = Counting()
    closed_loop(double_integrator(), ClippedPolicy(inner, -np.ones(1), np.ones(1)), np.ones(2), 1)
    assert inner.resets == 1


def test_the_loop_names_what_does_not_fit():
    plant = double_integrator()
    with pytest.raises(ValueError, match=r"controller: expected inputs of shape \(1,\)"):
        closed_loop(plant, lambda x: np.zeros(2), np.zeros(2), 1)
    with pytest.raises(ValueError, match=r"rng: expected a generator"):
        closed_loop(plant, lqr(plant), np.zeros(2), 1, noise=0.1)
    with pytest.raises(ValueError, match=r"mismatch: expected shape \(2, 1\)"):
        closed_loop(plant, lqr(plant), np.zeros(2), 1, mismatch=quadcopter())
    with pytest.raises(ValueError, match="delay"):
        closed_loop(plant, lqr(plant), np.zeros(2), 1, delay=-1)


# --- policies learned by imitation ---------------------------------------------------------------


def shown(n_episodes=12, steps=30, explore=0.1):
    plant, rng = double_integrator(), np.random.default_rng(0)
    starts = rng.uniform(-1, 1, (n_episodes, 2)) * [2, 0.5]
    return demonstrations(plant, lqr(plant), starts, steps, rng=rng, explore=explore)


def test_demonstrations_show_what_the_expert_does_not_what_is_applied():
    states, inputs = shown()
    assert states.shape == (12, 30, 2)
    assert inputs.shape == (12, 30, 1)
    plant = double_integrator()
    expert = lqr(plant)
    agree(inputs, [[expert(x) for x in episode] for episode in states], 1e-12)
    applied = (states[:, 1:] - states[:, :-1] @ plant.a.T)[..., 1:] / plant.b[1]
    off = applied - inputs[:, :-1]
    assert 0.15 <= off.std() <= 0.25  # a tenth of the width between the limits, 2
    quiet_states, quiet_inputs = shown(explore=0.0)
    agree(plant.step(quiet_states[:, :-1], quiet_inputs[:, :-1]), quiet_states[:, 1:], 1e-12)


def test_demonstrations_leave_lost_episodes_out():
    plant, rng = cart_pole(), np.random.default_rng(0)
    starts = np.array([[0, 0.1, 0, 0], [0, 1.5, 0, 5.0]])
    states, _ = demonstrations(plant, lqr(plant), starts, 20, rng=rng)
    assert len(states) == 1
    agree(states[0, 0], starts[0])
    with pytest.raises(ValueError, match="expert: expected at least one episode to be kept"):
        demonstrations(plant, lqr(plant), starts[1:], 20, rng=rng)


LOSSES = {
    "attention": (
        lambda x, u: library._attention_loss(x, u, library.Config(1, 8, 2, 16, 4), 5),
        lambda rng: library.init_classifier(rng, library.Config(1, 8, 2, 16, 4), 2, 1),
    ),
    "lstm": (
        lambda x, u: library._lstm_loss(x, u, 3),
        lambda rng: {
            **{f"lstm.{n}": w for n, w in library.init_lstm(rng, 2, 5).items()},
            "head.weight": rng.normal(size=(5, 1)),
            "head.bias": rng.normal(size=1),
        },
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_of_imitation(kind):
    """Every parameter, along a random direction, the same batch on both sides."""
    make, start = LOSSES[kind]
    loss, params = make(*shown(4, 9)), start(np.random.default_rng(1))
    _, grads = loss(params, np.random.default_rng(2))
    assert set(grads) == set(params)
    for name, grad in grads.items():
        v = np.random.default_rng(3).normal(size=grad.shape)

        def value(w, name=name):
            return loss({**params, name: w}, np.random.default_rng(2))[0]

        if np.abs(grad).max() <= 1e-14:  # softmax takes no notice of the keys' bias
            assert name.endswith("bk")
            assert abs(value(params[name] + v) - value(params[name])) <= 1e-12
        else:
            assert directional_check(value, params[name], grad, v) <= 1e-6, name


@pytest.mark.parametrize(("kind", "lr"), [("attention", 3e-3), ("lstm", 1e-2)])
def test_a_policy_learns_what_it_is_shown(kind, lr):
    states, inputs = shown(40, 30)
    found = imitate(states, inputs, kind, steps=250, width=16, window=4, lr=lr, seed=1)
    losses = [record.loss for record in found.records]
    assert len(losses) == 250
    assert np.mean(losses[-20:]) < 0.05 * np.mean(losses[:5])
    again = imitate(states, inputs, kind, steps=3, width=16, window=4, lr=lr, seed=1)
    assert [r.loss for r in again.records][:1] == losses[:1]
    plant = double_integrator()
    start = np.array([1.5, 0.2])
    rollout = closed_loop(plant, found.policy, start, 80)
    assert np.abs(rollout.x[-1]).max() <= 0.3
    # Called twice, it begins anew.
    assert np.array_equal(rollout.x, closed_loop(plant, found.policy, start, 80).x)
    assert found.policy.n_parameters == sum(p.size for p in found.policy.params.values())
    assert ClippedPolicy(found.policy, plant.u_min, plant.u_max).n_parameters > 100


@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_a_policy_in_the_loop_is_the_model_that_was_trained(kind):
    """State by state, it says what the training pass says of the whole episode."""
    states, inputs = shown(3, 11)
    policy, _ = imitate(states, inputs, kind, steps=5, width=8, window=4, seed=2)
    episode = states[1]
    policy.reset()
    got = np.array([policy(x) for x in episode])
    x = episode[None] / policy.x_scale
    if kind == "lstm":
        zeros = np.zeros((1, 8))
        weights = [policy.params[f"lstm.{n}"] for n in ("wx", "wh", "b")]
        h_all, _, _ = library.lstm_forward(x, zeros, zeros, *weights)
        want = h_all[0] @ policy.params["head.weight"] + policy.params["head.bias"]
    else:
        tokens, mask = library._windows(x, np.zeros(11, int), np.arange(11), 4)
        assert mask.sum(axis=1).tolist() == [1, 2, 3, *[4] * 8]
        agree(tokens[7], x[0, 4:8])
        want, _ = library.classifier_forward(tokens, policy.params, policy.config, mask)
    agree(got, want * policy.u_scale)


@pytest.mark.usefixtures("unchecked")
def test_imitate_names_what_does_not_fit():
    states, inputs = shown(3, 5)
    with pytest.raises(ValueError, match="kind: expected 'attention' or 'lstm'; got 'rnn'"):
        imitate(states, inputs, "rnn")
    with pytest.raises(ValueError, match=r"inputs: expected shape \(3, 5, U\)"):
        imitate(states, inputs[:, :4], "lstm")
    with pytest.raises(ValueError, match=r"states: expected shape \(E, T, X\)"):
        imitate(states[0], inputs, "lstm")


def test_a_state_that_never_moves_has_a_scale():
    states, inputs = shown(3, 5)
    states[..., 1] = 0
    policy, _ = imitate(states, inputs, "lstm", steps=2, width=4)
    assert policy.x_scale[1] == 1
    assert np.isfinite(policy(np.zeros(2))).all()


# --- metrics ------------------------------------------------------------------------------------


def test_metrics_by_hand():
    x = np.array([[9.0], [2.0], [0.04], [-0.2], [0.03], [0.0]])
    u = np.array([[1.0], [-3.0], [0.0], [0.5], [0.0]])
    limits = (np.array([-0.1]), np.array([1.0]), np.array([-2.0]), np.array([0.75]))
    got = closed_loop_metrics(x, u, np.array([[2.0]]), np.array([[10.0]]), *limits)
    states = 2 * (4 + 0.04**2 + 0.04 + 0.03**2)
    agree(got.pop("cost"), states + 10 * (1 + 9 + 0.25))
    agree(got.pop("max_state_violation"), 1.0)
    agree(got.pop("max_input_violation"), 1.0)
    assert got == {"settling": 4.0, "state_violations": 2.0, "input_violations": 2.0}


@pytest.mark.parametrize(
    ("states", "settling"),
    [([0, 0, 0], 0), ([1, 0, 0], 1), ([0, 1, 0], 2), ([0, 0, 1], INF), ([1, 1, 1], INF)],
)
def test_settling_is_for_good(states, settling):
    x = np.array(states, float)[:, None]
    free = (-np.full(1, INF), np.full(1, INF)) * 2
    got = closed_loop_metrics(x, np.zeros((2, 1)), np.eye(1), np.eye(1), *free)
    assert got["settling"] == settling
    # Measured from the reference.
    moved = closed_loop_metrics(
        x + 5, np.zeros((2, 1)), np.eye(1), np.eye(1), *free, reference=np.array([5.0])
    )
    assert moved == got


def test_an_episode_without_steps_costs_nothing():
    free = (-np.full(2, INF), np.full(2, INF), -np.full(1, INF), np.full(1, INF))
    got = closed_loop_metrics(np.ones((1, 2)), np.zeros((0, 1)), np.eye(2), np.eye(1), *free)
    assert got["cost"] == got["state_violations"] == got["max_input_violation"] == 0
    assert got["settling"] == INF


def test_latency_counts_what_came_too_late():
    got = latency(np.arange(101.0), 95.0)
    assert got == {"p50": 50.0, "p99": 99.0, "max": 100.0, "misses": 5.0}


def test_statuses_are_counted_over_episodes():
    plant = double_integrator()
    answers = iter([Decision(np.zeros(1), "a"), Decision(np.zeros(1), "b"), np.zeros(1)] * 2)
    rollouts = [closed_loop(plant, lambda x: next(answers), np.zeros(2), 3) for _ in range(2)]
    assert status_counts(rollouts) == {"a": 2, "b": 2, "computed": 2}


# --- what is stored -----------------------------------------------------------------------------

RESULT = json.loads((ROOT / "benchmarks" / "results" / "control.json").read_text(encoding="utf-8"))
CONTROLLERS = (
    "LQR, clipped",
    "linear MPC",
    "soft MPC",
    "non-linear MPC",
    "LSTM",
    "LSTM, clipped",
    "attention",
    "attention, clipped",
)


def test_the_stored_step_is_at_most_a_third_slower_than_the_bare_solver():
    assert [each["horizon"] for each in RESULT["step"]] == [10, 40]
    for each in RESULT["step"]:
        assert each["cost_of_100_steps"] == PUBLISHED[each["horizon"]]
        assert each["mpc_over_bare"] <= 1.3


def test_the_stored_table_leaves_no_seed_out():
    """Eight controllers, four scenarios, two plants, 100 seeds; every step has a status."""
    plants = RESULT["table"]["plants"]
    assert list(plants) == ["lane keeping", "cart-pole"]
    for plant in plants.values():
        assert len(plant["scenarios"]) == 4
        for rows in plant["scenarios"].values():
            assert tuple(row["controller"] for row in rows) == CONTROLLERS
            for row in rows:
                assert row["episodes"] == RESULT["table"]["seeds"] == 100
                steps = sum(row["statuses"].values())
                whole = (100 - len(row["lost"])) * RESULT["table"]["steps"]
                assert whole <= steps <= 100 * RESULT["table"]["steps"]
                assert row["settled"] <= 100 - len(row["lost"])
                clipped = "clipped" in row["controller"] or row["controller"].endswith("MPC")
                assert not (clipped and row["steps_outside_input_limits"])


# --- doors --------------------------------------------------------------------------------------

GOOD = {
    "a": np.eye(2),
    "b": np.ones((2, 1)),
    "q": np.eye(2),
    "r": np.eye(1),
    "p": np.eye(2),
    "x0": np.zeros(2),
    "horizon": 3,
    "u_min": -np.ones(1),
    "u_max": np.ones(1),
    "x_min": -np.ones(2),
    "x_max": np.ones(2),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": np.ones((2, 3))}, r"a: expected shape \(2, 2\)"),
        ({"a": np.ones(2)}, r"a: expected shape \(X, X\); got \(2,\)"),
        ({"b": np.ones((3, 1))}, r"b: expected shape \(2, U\) to match a \(2, 2\); got \(3, 1\)"),
        ({"q": np.eye(3)}, r"q: expected shape \(2, 2\)"),
        ({"r": np.eye(2)}, r"r: expected shape \(1, 1\)"),
        ({"p": np.eye(1)}, r"p: expected shape \(2, 2\)"),
        ({"x0": np.zeros(3)}, r"x0: expected shape \(2,\)"),
        ({"x0": np.array([0, np.inf])}, "x0: expected finite numbers"),
        ({"horizon": 0}, "horizon: expected at least 1; got 0"),
        ({"horizon": 1.5}, "horizon: expected an integer; got 1.5"),
        ({"u_max": np.ones(2)}, r"u_max: expected shape \(1,\)"),
        ({"x_min": np.full(2, 2.0)}, "x_min: expected at most x_max"),
        ({"a": np.array([["a"]])}, "a: expected real numbers"),
        ({"reference": np.zeros(1)}, r"reference: expected shape \(2,\)"),
    ],
)
def test_mpc_qp_names_what_does_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        mpc_qp(**{**GOOD, **changed})


@pytest.mark.usefixtures("unchecked")
def test_the_others_name_what_does_not_fit():
    eye, one = np.eye(2), np.ones((2, 1))
    for call, message in [
        (lambda: condense(eye, np.ones((3, 1)), 2), "b: expected shape"),
        (lambda: condense(eye, one, 0), "horizon: expected at least 1"),
        (lambda: riccati_step(np.eye(3), eye, one, eye, np.eye(1)), "p: expected shape"),
        (lambda: riccati(eye, one, eye, eye), r"r: expected shape \(1, 1\) to match b"),
        (lambda: discretise(eye, one, 0.0), "dt: expected a positive number; got 0.0"),
        (lambda: lane_keeping(0.0), "speed: expected a positive number"),
        (lambda: cart_pole(pole=-1.0), "pole: expected a positive number"),
        (lambda: soften(mpc_qp(**GOOD), [0], 0.0), "penalty: expected a positive number"),
        (lambda: qp_residuals(*mpc_qp(**GOOD), np.zeros(2), np.zeros(19)), "z: expected shape"),
        (lambda: qp_residuals(eye, np.ones(2), np.ones(2), *[np.ones(2)] * 4), "A: expected"),
        (
            lambda: closed_loop_metrics(
                np.ones((3, 2)),
                np.ones((3, 1)),
                eye,
                np.eye(1),
                *[np.ones(2)] * 2,
                *[np.ones(1)] * 2,
            ),
            r"x: expected shape \(4, 2\) to match u \(3, 1\)",
        ),
        (lambda: NonlinearMPC(cart_pole(), 5, max_iterations=0), "max_iterations"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@given(programs())
def test_no_input_is_written_to(program):
    arguments, rng = program
    a, b, q, r, p, *_ = arguments
    arrays = [x for x in arguments if isinstance(x, np.ndarray)]
    before = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    qp = mpc_qp(*arguments)
    condense(a, b, 3)
    riccati_step(p, a, b, q, r)
    frozen = [x.copy() for x in qp]
    soften(qp, [0, 1], 2.0)
    qp_residuals(*qp, np.ones(len(qp[1])), rng.normal(size=len(qp[3])))
    for x, old in zip([*arrays, *qp], [*before, *frozen], strict=True):
        assert np.array_equal(x, old)


@given(models(), st.integers(1, 4))
def test_condense_keeps_float32(model, horizon):
    a, b, _ = model
    a, b = a.astype(np.float32), b.astype(np.float32)
    phi, gamma = condense(a, b, horizon)
    assert phi.dtype == gamma.dtype == np.float32
    want = condense(a.astype(float), b.astype(float), horizon)
    agree(phi, want[0], 1e-4)
    agree(gamma, want[1], 1e-4)


def test_every_function_states_shapes_and_errors():
    functions = (discretise, condense, riccati_step, riccati, mpc_qp, soften, qp_residuals)
    for function in (*functions, closed_loop, closed_loop_metrics, lane_keeping, cart_pole):
        doc = inspect.getdoc(function)
        assert ".. math::" in doc
        assert "ValueError:" in doc
        hints = typing.get_type_hints(function)
        assert set(hints) == {*inspect.signature(function).parameters, "return"}
    for function in functions:
        doc = inspect.getdoc(function)
        assert "Shapes:" in doc
        assert function is condense or re.search(r"Source: .+\d{4}|Source: OSQP", doc)


def test_stating_a_problem_needs_no_solver():
    """What exercises and pages read without a controller imports neither OSQP nor SciPy."""
    code = (
        "import sys; from attn_lessons.control import *; p = cart_pole();"
        "riccati(p.a, p.b, p.q, p.r); x = p.u_max.repeat(4) * 0;"
        "mpc_qp(p.a, p.b, p.q, p.r, p.q, x, 3, p.u_min, p.u_max, p.x_min, p.x_max);"
        "print(sorted({'osqp', 'scipy', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert library.__doc__
