"""Answers to the exercises of chapter 11, as learners write them."""

import itertools

import numpy as np
import scipy.linalg
import torch
from scipy import sparse

from answers import mutating, right, wrong

# --- condense ---------------------------------------------------------------------------------


@right("condense")
def condense_loops(a, b, horizon):
    n, m = b.shape
    phi, gamma = np.zeros((horizon * n, n)), np.zeros((horizon * n, horizon * m))
    for k in range(horizon):
        phi[k * n : (k + 1) * n] = np.linalg.matrix_power(a, k + 1)
        for j in range(k + 1):
            block = np.linalg.matrix_power(a, k - j) @ b
            gamma[k * n : (k + 1) * n, j * m : (j + 1) * m] = block
    return phi, gamma


@right("condense")
def condense_row_by_row(a, b, horizon):
    """The next block row is A times the last one, with B at the end."""
    n, m = b.shape
    row, power, rows, powers = np.zeros((n, horizon * m)), np.eye(n), [], []
    for k in range(horizon):
        row = a @ row
        row[:, k * m : (k + 1) * m] += b
        power = a @ power
        rows.append(row.copy())
        powers.append(power)
    return np.concatenate(powers), np.concatenate(rows)


@right("condense")
def condense_by_solving(a, b, horizon):
    """The motion of all steps as one linear system."""
    n = len(a)
    shifted = np.eye(horizon * n) - np.kron(np.eye(horizon, k=-1), a)
    start = np.kron(np.eye(horizon, 1), a)
    return (
        np.linalg.solve(shifted, start),
        np.linalg.solve(shifted, np.kron(np.eye(horizon), b)),
    )


@right("condense")
def condense_np_block(a, b, horizon):
    powers = [np.eye(len(a))]
    for _ in range(horizon):
        powers.append(powers[-1] @ a)
    blocks = [
        [powers[k - j] @ b if j <= k else np.zeros(b.shape) for j in range(horizon)]
        for k in range(horizon)
    ]
    return [np.vstack(powers[1:]), np.block(blocks)]


@right("condense")
def condense_torch(a, b, horizon):
    a, b = torch.tensor(np.array(a)), torch.tensor(np.array(b))
    n, m = b.shape
    gamma = torch.zeros(horizon * n, horizon * m, dtype=a.dtype)
    for k, j in itertools.product(range(horizon), repeat=2):
        if j <= k:
            gamma[k * n : k * n + n, j * m : j * m + m] = torch.matrix_power(a, k - j) @ b
    return torch.cat([torch.matrix_power(a, k + 1) for k in range(horizon)]), gamma


@right("condense")
def condense_lists(a, b, horizon):
    phi, gamma = condense_loops(a, b, horizon)
    return phi.tolist(), gamma.tolist()


@right("condense")
def condense_diagonals(a, b, horizon):
    gamma, response = 0, b
    for k in range(horizon):
        gamma = gamma + np.kron(np.eye(horizon, k=-k), response)
        response = a @ response
    return condense_loops(a, b, horizon)[0], gamma


@mutating("condense")
def condense_in_place(a, b, horizon):
    found = condense_loops(a, b, horizon)
    a[:] = np.linalg.matrix_power(a, horizon + 2) + 1
    return found


@wrong("condense")
def condense_half_of_the_past(a, b, horizon):
    phi, gamma = condense_loops(a, b, horizon)
    return phi, gamma - 0.5 * np.kron(np.eye(horizon, k=-1), a @ b)


@wrong("condense")
def condense_of_the_mean_motion(a, b, horizon):
    return condense_loops((a + np.eye(len(a))) / 2, b, horizon)


# --- riccati_step -----------------------------------------------------------------------------


@right("riccati_step")
def riccati_plain(p, a, b, q, r):
    k = np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
    return q + a.T @ p @ a - a.T @ p @ b @ k, k


@right("riccati_step")
def riccati_joseph(p, a, b, q, r):
    k = np.linalg.inv(r + b.T @ p @ b) @ b.T @ p @ a
    loop = a - b @ k
    return q + k.T @ r @ k + loop.T @ p @ loop, k


@right("riccati_step")
def riccati_cholesky(p, a, b, q, r):
    factor = scipy.linalg.cho_factor(r + b.T @ p @ b)
    k = scipy.linalg.cho_solve(factor, b.T @ p @ a)
    new = q + a.T @ p @ (a - b @ k)
    return (new + new.T) / 2, k


@right("riccati_step")
def riccati_einsum(p, a, b, q, r):
    pb = np.einsum("ij,jk->ik", p, b)
    bracket = r + np.einsum("ji,jk->ik", b, pb)
    k = np.linalg.solve(bracket, np.einsum("ji,jk->ik", pb, a))
    return q + np.einsum("ji,jk,kl->il", a, p, a) - np.einsum("ji,jk,kl->il", k, bracket, k), k


@right("riccati_step")
def riccati_schur(p, a, b, q, r):
    motion = np.hstack([a, b])
    form = motion.T @ p @ motion + scipy.linalg.block_diag(q, r)
    n = len(a)
    k = np.linalg.solve(form[n:, n:], form[n:, :n])
    return form[:n, :n] - form[:n, n:] @ k, k


@right("riccati_step")
def riccati_torch(p, a, b, q, r):
    p, a, b, q, r = (torch.tensor(np.array(v)) for v in (p, a, b, q, r))
    k = torch.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
    return [q + a.T @ p @ (a - b @ k), k]


@mutating("riccati_step")
def riccati_in_place(p, a, b, q, r):
    before, k = riccati_plain(p, a, b, q, r)
    p[:] = before + 1
    return before, k


@wrong("riccati_step")
def riccati_timid(p, a, b, q, r):
    """Half the gain, with the cost that goes with it."""
    k = 0.4 * riccati_plain(p, a, b, q, r)[1]
    loop = a - b @ k
    return q + k.T @ r @ k + loop.T @ p @ loop, k


@wrong("riccati_step")
def riccati_of_a_shifted_plant(p, a, b, q, r):
    return riccati_plain(p, a + 0.1 * np.eye(len(a)), b, q, r)


# --- mpc_qp -----------------------------------------------------------------------------------


@right("mpc_qp")
def mpc_kron(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
    n = len(a)
    P = 2 * scipy.linalg.block_diag(np.kron(np.eye(horizon), q), p, np.kron(np.eye(horizon), r))
    states = np.kron(np.eye(horizon + 1), -np.eye(n)) + np.kron(np.eye(horizon + 1, k=-1), a)
    inputs = np.kron(np.vstack([np.zeros((1, horizon)), np.eye(horizon)]), b)
    A = np.vstack([np.hstack([states, inputs]), np.eye(len(P))])
    still = np.zeros(horizon * n)
    lower = np.hstack([-x0, still, np.tile(x_min, horizon + 1), np.tile(u_min, horizon)])
    upper = np.hstack([-x0, still, np.tile(x_max, horizon + 1), np.tile(u_max, horizon)])
    return P, np.zeros(len(P)), A, lower, upper


@right("mpc_qp")
def mpc_as_in_osqps_example(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
    """scipy.sparse, made dense at the end."""
    n = len(a)
    blocks = [sparse.kron(sparse.eye(horizon), q), p, sparse.kron(sparse.eye(horizon), r)]
    P = 2 * sparse.block_diag(blocks, format="csc")
    ax = sparse.kron(sparse.eye(horizon + 1), -sparse.eye(n))
    ax = ax + sparse.kron(sparse.eye(horizon + 1, k=-1), a)
    bu = sparse.kron(sparse.vstack([sparse.csc_matrix((1, horizon)), sparse.eye(horizon)]), b)
    A = sparse.vstack([sparse.hstack([ax, bu]), sparse.eye(P.shape[0])], format="csc")
    fixed = np.hstack([-x0, np.zeros(horizon * n)])
    low = np.hstack([np.kron(np.ones(horizon + 1), x_min), np.kron(np.ones(horizon), u_min)])
    high = np.hstack([np.kron(np.ones(horizon + 1), x_max), np.kron(np.ones(horizon), u_max)])
    ends = np.hstack([fixed, low]), np.hstack([fixed, high])
    return P.toarray(), np.zeros(P.shape[0]), A.toarray(), *ends


@right("mpc_qp")
def mpc_loops(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
    n, m = b.shape
    first_input = n * (horizon + 1)
    size = first_input + m * horizon
    P, A = np.zeros((size, size)), np.zeros((first_input + size, size))
    lower, upper = np.zeros(first_input + size), np.zeros(first_input + size)
    lower[:n] = upper[:n] = -x0
    for k in range(horizon + 1):
        at = slice(k * n, (k + 1) * n)
        P[at, at] = 2 * (p if k == horizon else q)
        A[at, at] = -np.eye(n)
        limit = slice(first_input + k * n, first_input + (k + 1) * n)
        lower[limit], upper[limit] = x_min, x_max
    for k in range(horizon):
        after, here = slice((k + 1) * n, (k + 2) * n), slice(k * n, (k + 1) * n)
        push = slice(first_input + k * m, first_input + (k + 1) * m)
        A[after, here], A[after, push] = a, b
        P[push, push] = r + r.T
        limit = slice(first_input + push.start, first_input + push.stop)
        lower[limit], upper[limit] = u_min, u_max
    A[first_input:] = np.eye(size)
    return P, np.zeros(size), A, lower, upper


@right("mpc_qp")
def mpc_lists(*given):
    return [part.tolist() for part in mpc_loops(*given)]


@right("mpc_qp")
def mpc_torch(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
    a, b, q, r, p, x0, u_min, u_max, x_min, x_max = (
        torch.tensor(np.array(v, order="C"))
        for v in (a, b, q, r, p, x0, u_min, u_max, x_min, x_max)
    )
    n, m = b.shape
    P = 2 * torch.block_diag(*[q] * horizon, p, *[r] * horizon)
    states = torch.kron(torch.diag(torch.ones(horizon, dtype=a.dtype), -1), a)
    states -= torch.eye(n * (horizon + 1), dtype=a.dtype)
    inputs = torch.cat(
        [torch.zeros(n, m * horizon, dtype=a.dtype), torch.block_diag(*[b] * horizon)]
    )
    A = torch.cat([torch.cat([states, inputs], 1), torch.eye(len(P), dtype=a.dtype)])
    fixed = torch.cat([-x0, torch.zeros(n * horizon, dtype=a.dtype)])
    lower = torch.cat([fixed, x_min.repeat(horizon + 1), u_min.repeat(horizon)])
    upper = torch.cat([fixed, x_max.repeat(horizon + 1), u_max.repeat(horizon)])
    return P, torch.zeros(len(P)), A, lower, upper


@right("mpc_qp")
def mpc_einsum(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
    """Blocks as axes: (k, i, l, j)."""
    n, m = b.shape
    costs = np.stack([*[q] * horizon, p])
    of_states = 2 * np.einsum("kl,kij->kilj", np.eye(horizon + 1), costs)
    of_inputs = 2 * np.einsum("kl,ij->kilj", np.eye(horizon), r)
    P = scipy.linalg.block_diag(
        of_states.reshape(n * (horizon + 1), -1), of_inputs.reshape(m * horizon, -1)
    )
    _, g, A, lower, upper = mpc_kron(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max)
    return P, g, A, lower, upper


@mutating("mpc_qp")
def mpc_in_place(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max):
    found = mpc_kron(a, b, q, r, p, x0, horizon, u_min, u_max, x_min, x_max)
    q *= 2
    r *= 2
    p *= 2
    return found


@wrong("mpc_qp")
def mpc_with_free_ends(*given):
    """The last state without limits."""
    P, g, A, lower, upper = mpc_kron(*given)
    n, horizon = len(given[0]), given[6]
    last = slice(2 * n * (horizon + 1) - n, 2 * n * (horizon + 1))
    lower[last], upper[last] = -np.inf, np.inf
    return P, g, A, lower, upper


@wrong("mpc_qp")
def mpc_discounted(*given):
    """Later stages cost less."""
    P, *others = mpc_kron(*given)
    n, horizon = len(given[0]), given[6]
    fade = np.ones(len(P))
    fade[: n * (horizon + 1)] = np.repeat(0.9 ** np.arange(horizon + 1), n)
    return P * fade[:, None], *others


# --- qp_residuals -----------------------------------------------------------------------------


@right("qp_residuals")
def residuals_plain(P, q, A, l, u, z, y):  # noqa: E741
    values = A @ z
    primal = np.maximum(np.maximum(l - values, values - u), 0).max()
    dual = np.abs(P @ z + q + A.T @ y).max()
    support = sum((u[i] if y[i] > 0 else l[i]) * y[i] for i in range(len(y)) if y[i] != 0)
    return primal, dual, abs(z @ P @ z + q @ z + support)


@right("qp_residuals")
def residuals_by_projection(P, q, A, l, u, z, y):  # noqa: E741
    """How far A z is from the nearest point within the bounds."""
    values = A @ z
    primal = np.linalg.norm(values - np.clip(values, l, u), np.inf)
    dual = np.linalg.norm(P @ z + q + A.T @ y, np.inf)
    up, down = y > 0, y < 0
    return primal, dual, np.abs(z @ P @ z + q @ z + u[up] @ y[up] + l[down] @ y[down])


@right("qp_residuals")
def residuals_loops(P, q, A, l, u, z, y):  # noqa: E741
    primal, gap = 0.0, float(q @ z)
    for i in range(len(l)):
        value = float(np.dot(A[i], z))
        primal = max(primal, l[i] - value, value - u[i])
        if y[i] > 0:
            gap += u[i] * y[i]
        if y[i] < 0:
            gap += l[i] * y[i]
    gap += sum(float(z[i] * P[i] @ z) for i in range(len(z)))
    slope = [float(P[j] @ z + q[j] + A[:, j] @ y) for j in range(len(z))]
    return [primal, max(abs(s) for s in slope), abs(gap)]


@right("qp_residuals")
def residuals_einsum(P, q, A, l, u, z, y):  # noqa: E741
    values = np.einsum("mn,n->m", A, z)
    slope = np.einsum("ij,j->i", P, z) + q + np.einsum("mn,m->n", A, y)
    bound = np.where(y > 0, u, np.where(y < 0, l, 0))
    gap = np.einsum("i,ij,j->", z, P, z) + q @ z + bound @ y
    return max(0, np.max(l - values), np.max(values - u)), np.max(np.abs(slope)), abs(gap)


@right("qp_residuals")
def residuals_nan_to_num(P, q, A, l, u, z, y):  # noqa: E741
    with np.errstate(invalid="ignore"):
        pushed = np.nan_to_num(np.maximum(y, 0) * u, nan=0.0, posinf=np.inf, neginf=-np.inf)
        pulled = np.nan_to_num(np.minimum(y, 0) * l, nan=0.0, posinf=np.inf, neginf=-np.inf)
    values = A @ z
    primal = max(0.0, (l - values).max(), (values - u).max())
    gap = abs(z @ P @ z + q @ z + pushed.sum() + pulled.sum())
    return primal, np.abs(P @ z + q + A.T @ y).max(), gap


@right("qp_residuals")
def residuals_torch(P, q, A, l, u, z, y):  # noqa: E741
    P, q, A, l, u, z, y = (torch.tensor(np.array(v)) for v in (P, q, A, l, u, z, y))  # noqa: E741
    values = A @ z
    primal = torch.relu(torch.maximum(l - values, values - u)).max()
    dual = (P @ z + q + A.T @ y).abs().max()
    bound = torch.where(y > 0, u, torch.where(y < 0, l, torch.zeros_like(l)))
    return primal, dual, (z @ P @ z + q @ z + bound @ y).abs()


@mutating("qp_residuals")
def residuals_in_place(P, q, A, l, u, z, y):  # noqa: E741
    found = residuals_plain(P, q, A, l, u, z, y)
    q += A.T @ y + 1
    return found


@wrong("qp_residuals")
def residuals_with_a_tolerance(P, q, A, l, u, z, y):  # noqa: E741
    primal, dual, gap = residuals_plain(P, q, A, l, u, z, y)
    return max(primal - 0.05, 0), dual, gap


@wrong("qp_residuals")
def residuals_relative(P, q, A, l, u, z, y):  # noqa: E741
    primal, dual, gap = residuals_plain(P, q, A, l, u, z, y)
    return primal / (1 + np.abs(A @ z).max()), dual, gap


# --- closed_loop_metrics ----------------------------------------------------------------------


@right("closed_loop_metrics")
def metrics_plain(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    after = x[1:]
    cost = sum(s @ q @ s for s in after) + sum(v @ r @ v for v in u)
    outside = np.flatnonzero((np.abs(x) > band).any(axis=1))
    settling = 0 if len(outside) == 0 else outside[-1] + 1
    over_x = np.maximum(x_min - after, after - x_max).max(axis=1)
    over_u = np.maximum(u_min - u, u - u_max).max(axis=1)
    return {
        "cost": cost,
        "settling": np.inf if settling == len(x) else settling,
        "state_violations": (over_x > 0).sum(),
        "input_violations": (over_u > 0).sum(),
        "max_state_violation": max(over_x.max(), 0),
        "max_input_violation": max(over_u.max(), 0),
    }


@right("closed_loop_metrics")
def metrics_by_clipping(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    """A violation is how far clipping moves an entry."""
    after = x[1:]
    over_x = np.abs(after - np.clip(after, x_min, x_max))
    over_u = np.abs(u - np.clip(u, u_min, u_max))
    inside = np.all(np.abs(x) <= band, axis=1)
    stays = np.flip(np.logical_and.accumulate(np.flip(inside)))
    return {
        "max_input_violation": over_u.max(),
        "max_state_violation": over_x.max(),
        "input_violations": int(over_u.any(axis=1).sum()),
        "state_violations": int(over_x.any(axis=1).sum()),
        "settling": int(stays.argmax()) if stays.any() else float("inf"),
        "cost": np.einsum("ki,ij,kj->", after, q, after) + np.einsum("ki,ij,kj->", u, r, u),
    }


@right("closed_loop_metrics")
def metrics_loops(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    cost, settling = 0.0, 0
    counts, worst = [0, 0], [0.0, 0.0]
    for k in range(len(u)):
        state, push = x[k + 1], u[k]
        cost += float(state @ q @ state + push @ r @ push)
        for i, (v, low, high) in enumerate(((state, x_min, x_max), (push, u_min, u_max))):
            over = max(float(np.max(low - v)), float(np.max(v - high)))
            if over > 0:
                counts[i] += 1
                worst[i] = max(worst[i], over)
    for k in range(len(x)):
        if np.any(np.abs(x[k]) > band):
            settling = k + 1
    if settling > len(u):
        settling = float("inf")
    return {
        "cost": cost,
        "settling": settling,
        "state_violations": counts[0],
        "input_violations": counts[1],
        "max_state_violation": worst[0],
        "max_input_violation": worst[1],
    }


@right("closed_loop_metrics")
def metrics_trace(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    found = metrics_by_clipping(x, u, q, r, x_min, x_max, u_min, u_max, band)
    return found | {"cost": np.trace(x[1:] @ q @ x[1:].T) + np.trace(u @ r @ u.T)}


@right("closed_loop_metrics")
def metrics_torch(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    given = [torch.tensor(np.array(v)) for v in (x, u, q, r, x_min, x_max, u_min, u_max)]
    x, u, q, r, x_min, x_max, u_min, u_max = given
    after = x[1:]
    over_x = torch.relu(torch.maximum(x_min - after, after - x_max))
    over_u = torch.relu(torch.maximum(u_min - u, u - u_max))
    outside = (x.abs() > torch.as_tensor(band)).any(dim=1).nonzero()
    settling = 0.0 if len(outside) == 0 else float(outside[-1] + 1)
    return {
        "cost": ((after @ q) * after).sum() + ((u @ r) * u).sum(),
        "settling": settling if settling < len(x) else torch.inf,
        "state_violations": (over_x > 0).any(dim=1).sum(),
        "input_violations": (over_u > 0).any(dim=1).sum(),
        "max_state_violation": over_x.max(),
        "max_input_violation": over_u.max(),
    }


@right("closed_loop_metrics")
def metrics_all_suffixes(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    found = metrics_plain(x, u, q, r, x_min, x_max, u_min, u_max, band)
    times = [k for k in range(len(x)) if (np.abs(x[k:]) <= band).all()]
    settling = min(times, default=np.inf)
    return {name: np.float64(value) for name, value in found.items()} | {"settling": settling}


@mutating("closed_loop_metrics")
def metrics_in_place(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    found = metrics_plain(x, u, q, r, x_min, x_max, u_min, u_max, band)
    np.abs(x, out=x)
    x += 1
    return found


@wrong("closed_loop_metrics")
def metrics_of_changes(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    """The inputs' changes cost, not the inputs."""
    found = metrics_plain(x, u, q, r, x_min, x_max, u_min, u_max, band)
    steps = np.diff(u, axis=0, prepend=0)
    cost = np.einsum("ki,ij,kj->", x[1:], q, x[1:]) + np.einsum("ki,ij,kj->", steps, r, steps)
    return found | {"cost": cost}


@wrong("closed_loop_metrics")
def metrics_in_half_the_band(x, u, q, r, x_min, x_max, u_min, u_max, band=0.05):
    return metrics_plain(x, u, q, r, x_min, x_max, u_min, u_max, np.asarray(band) / 2)
