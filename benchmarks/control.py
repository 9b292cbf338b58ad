"""Predictive control: a step beside the bare solver, and all controllers in one table.

``step``: the quadcopter of OSQP's documentation in closed loop at horizons 10 and 40. ``LinearMPC``
and a bare OSQP with the same settings take every state in turn, so that both meet the same machine;
reported is the median over steps of the ratio of their times. All of them run in one thread, and
what is compared is that thread's processor time: a step of 0.2 ms that another program interrupts
says nothing on the clock; the clock's times stand beside. Clarabel and PIQP solve the same programs
from cold, through qpsolvers, their set-up included.

``table``: lane keeping and cart-pole under the same 100 seeds. A seed draws the start and the
noise, and every controller meets the same ones. Four scenarios: starts as the demonstrations had
them; starts further out; another plant than the model; inputs that arrive late. The policies are
trained here, from demonstrations of the plant's own best controller. An episode that is lost (off
the road, fallen) is counted, and left out of cost and settling, not out of anything else. Times are
the clock's, since a deadline is; on a machine with other work they are that work's too.

``processor``: what a decision of each controller costs in processor time, under the table's first
two scenarios and its first 20 seeds, and how many of them would pass the deadline with a core of
their own. Policies are timed on the states of the regulator's episodes: their time does not depend
on their weights.

Run as ``python benchmarks/control.py step table processor``; each part keeps the others' numbers in
results/control.json. ``--quick`` does little and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import machine
import numpy as np
import osqp
import qpsolvers
from scipy import sparse

from attn_lessons.control import (
    ClippedPolicy,
    LinearMPC,
    NonlinearMPC,
    Plant,
    Rollout,
    cart_pole,
    closed_loop,
    closed_loop_metrics,
    demonstrations,
    imitate,
    lane_keeping,
    latency,
    lqr,
    mpc_qp,
    quadcopter,
    status_counts,
)

PARTS = ("step", "table", "processor")
HORIZONS = (10, 40)
STEPS = 100  # of an episode: 5 seconds
SEEDS = 100
TOLERANCE = 1e-6  # what a limit may be passed by before it is a violation


# --- a step beside the bare solver ---------------------------------------------------------------


def quadcopter_program(horizon: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
    plant, height = quadcopter(), np.zeros(12)
    height[2] = 1
    return mpc_qp(
        *(plant.a, plant.b, plant.q, plant.r, plant.q, x, horizon),
        *(plant.u_min, plant.u_max, plant.x_min, plant.x_max),
        reference=height,
    )


def bare_solver(horizon: int) -> Callable[[np.ndarray], np.ndarray]:
    """The loop of OSQP's documentation: new bounds, solve, take the first input."""
    hessian, gradient, rows, lower, upper = quadcopter_program(horizon, np.zeros(12))
    solver = osqp.OSQP()
    upper_half = sparse.triu(sparse.csc_matrix(hessian), format="csc")
    settings = {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 4000, "verbose": False}
    solver.setup(upper_half, gradient, sparse.csc_matrix(rows), lower, upper, **settings)
    first = 12 * (horizon + 1)

    def step(x: np.ndarray) -> np.ndarray:
        lower[:12] = upper[:12] = -x
        solver.update(l=lower, u=upper)
        return solver.solve(raise_error=False).x[first : first + 4]

    return step


def through_qpsolvers(horizon: int, name: str) -> Callable[[np.ndarray], np.ndarray]:
    _, gradient, rows, lower, upper = quadcopter_program(horizon, np.zeros(12))
    hessian = sparse.csc_matrix(quadcopter_program(horizon, np.zeros(12))[0])
    motion, first = 12 * (horizon + 1), 12 * (horizon + 1)
    equalities = sparse.csc_matrix(rows[:motion])
    limits = lower[motion:], upper[motion:]

    def step(x: np.ndarray) -> np.ndarray:
        fixed = lower[:motion].copy()
        fixed[:12] = -x
        problem = qpsolvers.Problem(hessian, gradient, None, None, equalities, fixed, *limits)
        return qpsolvers.solve_problem(problem, solver=name).x[first : first + 4]

    return step


def timed(step: Callable[[np.ndarray], Any], x: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Processor time, time on the clock, and the input."""
    begun = time.thread_time(), time.perf_counter()
    answer = step(x)
    took = time.thread_time() - begun[0], time.perf_counter() - begun[1]
    return *took, np.asarray(getattr(answer, "u", answer))


def one_step(horizon: int, rounds: int) -> dict[str, Any]:
    plant, height = quadcopter(), np.zeros(12)
    height[2] = 1
    solvers = ("mpc", "bare", "clarabel", "piqp")
    busy: dict[str, list[float]] = {name: [] for name in solvers}
    clock: dict[str, list[float]] = {name: [] for name in solvers}
    costs, first = [], None
    for number in range(rounds):
        mpc = LinearMPC(plant, horizon, terminal=plant.q, reference=height)
        steps: dict[str, Callable[[np.ndarray], Any]] = {"mpc": mpc, "bare": bare_solver(horizon)}
        if number == 0:
            steps |= {name: through_qpsolvers(horizon, name) for name in ("clarabel", "piqp")}
        x, cost = np.zeros(12), 0.0
        for k in range(100):
            # Another one goes first each time: none always meets a warm cache.
            names = list(steps)[k % len(steps) :] + list(steps)[: k % len(steps)]
            found = {name: timed(steps[name], x) for name in names}
            for name, (processor, wall, _) in found.items():
                busy[name].append(processor)
                clock[name].append(wall)
            u = found["mpc"][2]
            assert all(np.abs(other - u).max() <= 1e-5 for _, _, other in found.values())
            first = u if first is None else first
            x = plant.step(x, u)
            cost += (x - height) @ plant.q @ (x - height) + u @ plant.r @ u
        costs.append(cost)
    assert first is not None
    ratios = [m / b for m, b in zip(busy["mpc"], busy["bare"], strict=True)]
    return {
        "horizon": horizon,
        "steps": len(ratios),
        "cost_of_100_steps": round(costs[0], 6),
        "first_input": [round(float(v), 6) for v in first],
        "processor_ms": {name: in_ms(times) for name, times in busy.items()},
        "clock_ms": {name: in_ms(times) for name, times in clock.items()},
        "mpc_over_bare": round(statistics.median(ratios), 3),
    }


def in_ms(seconds: list[float] | np.ndarray) -> dict[str, float]:
    found = latency(np.asarray(seconds), np.inf)
    return {key: float(f"{1e3 * found[key]:.3g}") for key in ("p50", "p99", "max")}


# --- all controllers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A plant, where its episodes start, what disturbs it, and what is changed about it."""

    plant: Plant
    other: Plant
    """What moves under mismatch."""
    starts: np.ndarray
    """Half the width of the box that starts are drawn from."""
    far: float
    """How many times as wide it is out of distribution."""
    noise: np.ndarray
    delay: int
    band: np.ndarray
    """Where an entry of the state counts as settled."""
    horizon: int
    settings: dict[str, Any]
    """OSQP's."""

    def scenarios(self) -> dict[str, dict[str, Any]]:
        return {
            "in distribution": {},
            "out of distribution": {"far": self.far},
            "mismatch": {"mismatch": self.other},
            "delay": {"delay": self.delay},
        }

    def planners(self) -> dict[str, Any]:
        plant, n = self.plant, self.horizon
        return {
            "LQR, clipped": lqr(plant),
            "linear MPC": LinearMPC(plant, n, **self.settings),
            "soft MPC": LinearMPC(plant, n, soft=100.0, **self.settings),
            "non-linear MPC": NonlinearMPC(plant, n, soft=100.0, **self.settings),
        }


TASKS = {
    "lane keeping": Task(
        lane_keeping(),
        lane_keeping(40.0, stiffness=56000.0),  # a third faster, on tyres 30 % softer
        starts=np.array([0.75, 1.2, 0.03, 0.05]),
        far=1.3,
        noise=np.array([0.0, 0.05, 0.0, 0.01]),
        delay=3,
        band=np.array([0.25, 0.5, 0.05, 0.3]),
        horizon=20,
        # The step size that OSQP finds by itself makes a step take ten times as long.
        settings={"rho": 1.0, "adaptive_rho": 0},
    ),
    "cart-pole": Task(
        cart_pole(),
        cart_pole(pole=0.4, length=0.6),  # a pole twice as heavy and a fifth longer
        starts=np.array([0.8, 0.45, 0.5, 0.5]),
        far=1.5,
        noise=np.array([0.0, 0.0, 0.02, 0.05]),
        delay=1,
        band=np.array([0.15, 0.1, 0.5, 0.5]),
        horizon=16,
        settings={},
    ),
}


def learned(task: Task, episodes: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The policies with and without clipping, and how they were trained."""
    plant, rng = task.plant, np.random.default_rng(2026)
    expert = task.planners()["soft MPC" if plant.motion is None else "non-linear MPC"]
    starts = rng.uniform(-task.starts, task.starts, (episodes, len(task.starts)))
    shown = demonstrations(plant, expert, starts, STEPS, rng=rng, noise=task.noise, explore=0.05)
    policies, told = {}, {"episodes": len(shown[0]), "steps_an_episode": STEPS, "training": {}}
    for kind, lr in (("LSTM", 1e-2), ("attention", 3e-3)):
        begun = time.perf_counter()
        policy, records = imitate(*shown, kind.lower(), steps=steps, lr=lr)  # type: ignore[arg-type]
        told["training"][kind] = {
            "steps": steps,
            "seconds": round(time.perf_counter() - begun, 1),
            "loss_first_50": round(float(np.mean([r.loss for r in records[:50]])), 4),
            "loss_last_50": round(float(np.mean([r.loss for r in records[-50:]])), 5),
        }
        policies[kind] = policy
        policies[f"{kind}, clipped"] = ClippedPolicy(policy, plant.u_min, plant.u_max)
    return policies, told


def episode(task: Task, controller: Any, seed: int, far: float = 1.0, **changed: Any) -> Rollout:
    rng = np.random.default_rng(seed)
    start = far * rng.uniform(-task.starts, task.starts)
    return closed_loop(task.plant, controller, start, STEPS, rng=rng, noise=task.noise, **changed)


def row(task: Task, name: str, controller: Any, rollouts: list[Rollout]) -> dict[str, Any]:
    plant = task.plant
    limits = (plant.x_min, plant.x_max, plant.u_min, plant.u_max)
    metrics = [
        closed_loop_metrics(r.x, r.u, plant.q, plant.r, *limits, task.band, tolerance=TOLERANCE)
        for r in rollouts
    ]
    kept = [m for m, r in zip(metrics, rollouts, strict=True) if r.lost is None]
    settled = [m["settling"] * plant.dt for m in kept if np.isfinite(m["settling"])]
    times = latency(np.concatenate([r.seconds for r in rollouts]), plant.dt)
    n_parameters = getattr(controller, "n_parameters", plant.b.size)
    return {
        "controller": name,
        "parameters": int(n_parameters),
        "episodes": len(rollouts),
        "lost": [seed for seed, r in enumerate(rollouts) if r.lost is not None],
        "cost_mean": rounded(np.mean([m["cost"] for m in kept])) if kept else None,
        "cost_median": rounded(np.median([m["cost"] for m in kept])) if kept else None,
        "cost_worst": rounded(np.max([m["cost"] for m in kept])) if kept else None,
        "settled": len(settled),
        "settling_s_median": rounded(np.median(settled)) if settled else None,
        "steps_outside_state_limits": int(sum(m["state_violations"] for m in metrics)),
        "steps_outside_input_limits": int(sum(m["input_violations"] for m in metrics)),
        "episodes_outside_state_limits": sum(m["state_violations"] > 0 for m in metrics),
        "max_state_violation": rounded(max(m["max_state_violation"] for m in metrics)),
        "max_input_violation": rounded(max(m["max_input_violation"] for m in metrics)),
        "statuses": status_counts(rollouts),
        "ms": {key: rounded(1e3 * times[key]) for key in ("p50", "p99", "max")},
        "deadline_ms": 1e3 * plant.dt,
        "deadline_misses": int(times["misses"]),
    }


def decided(controller: Any, states: Iterable[np.ndarray]) -> list[float]:
    """Processor time of each decision on some states in their order."""
    if hasattr(controller, "reset"):
        controller.reset()
    times = []
    for x in states:
        begun = time.thread_time()
        controller(x)
        times.append(time.thread_time() - begun)
    return times


def on_the_processor(task: Task, seeds: int) -> dict[str, Any]:
    plant, rng = task.plant, np.random.default_rng(0)
    few = rng.normal(size=(2, 12, len(plant.a))), rng.normal(size=(2, 12, plant.b.shape[1]))
    timed = task.planners() | {
        kind: imitate(*few, kind.lower(), steps=1).policy  # type: ignore[arg-type]
        for kind in ("LSTM", "attention")
    }
    found: dict[str, Any] = {}
    for scenario, changed in list(task.scenarios().items())[:2]:
        for name, controller in timed.items():
            driver = controller if name.endswith("MPC") else timed["LQR, clipped"]
            times: list[float] = []
            for seed in range(seeds):
                seen: list[np.ndarray] = []
                busy: list[float] = []

                def driven(
                    x: np.ndarray, driver: Any = driver, seen: Any = seen, busy: Any = busy
                ) -> Any:
                    seen.append(x)
                    begun = time.thread_time()
                    decision = driver(x)
                    busy.append(time.thread_time() - begun)
                    return decision

                if hasattr(driver, "reset"):
                    driver.reset()
                episode(task, driven, seed, **changed)
                times += busy if driver is controller else decided(controller, seen)
            late = int((np.array(times) > plant.dt).sum())
            row = {"decisions": len(times), "ms": in_ms(times), "over_the_deadline": late}
            found.setdefault(scenario, {})[name] = row
    return found


def rounded(value: float) -> float:
    return float(f"{float(value):.4g}")


def compared(name: str, task: Task, seeds: int, episodes: int, steps: int) -> dict[str, Any]:
    policies, told = learned(task, episodes, steps)
    controllers = task.planners() | policies
    scenarios = {}
    for scenario, changed in task.scenarios().items():
        rollouts: dict[str, list[Rollout]] = {each: [] for each in controllers}
        for seed in range(seeds):
            for each, controller in controllers.items():
                rollouts[each].append(episode(task, controller, seed, **changed))
        rows = [row(task, each, controllers[each], r) for each, r in rollouts.items()]
        scenarios[scenario] = rows
        print(name, scenario, *(json.dumps(r) for r in rows), sep="\n  ", flush=True)
    far = {"far": task.far}
    shown = {n: episode(task, c, 3, **far).x[:, 0] for n, c in controllers.items()}
    return {
        "horizon": task.horizon,
        "starts": task.starts.tolist(),
        "far": task.far,
        "noise": task.noise.tolist(),
        "delay_steps": task.delay,
        "band": task.band.tolist(),
        "imitation": told,
        "scenarios": scenarios,
        # Offset or place, step by step.
        "episode_3_out_of_distribution": {n: x.round(3).tolist() for n, x in shown.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="step, table, processor (all without)")
    parser.add_argument("--quick", action="store_true", help="little, nothing written")
    given = parser.parse_args()
    parts, quick = given.parts or list(PARTS), given.quick
    where = machine.machine()
    result: dict[str, Any] = {}
    if "step" in parts:
        result["step"] = [one_step(n, 1 if quick else 10) for n in HORIZONS]
    if "table" in parts:
        sizes = (3, 4, 20) if quick else (SEEDS, 150, 1500)
        result["table"] = {
            "seeds": sizes[0],
            "steps": STEPS,
            "plants": {name: compared(name, task, *sizes) for name, task in TASKS.items()},
        }
    if "processor" in parts:
        seeds = 2 if quick else 20
        plants = {name: on_the_processor(task, seeds) for name, task in TASKS.items()}
        result["processor"] = {"seeds": seeds, "plants": plants}
    if quick:
        print(json.dumps(result, indent=2))
        return
    for part in result.values():
        for each in part if isinstance(part, list) else [part]:
            each["measured"] = {"load_before": where["load_before"]}
    path = machine.RESULTS / "control.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: before[key] for key in PARTS if key in before}
    packages = ("attn-lessons", "numpy", "scipy", "osqp", "clarabel", "piqp", "qpsolvers")
    machine.write("control", kept | result, *packages, where=where)


if __name__ == "__main__":
    main()
