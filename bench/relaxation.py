"""Relaxation at scale against its rivals: `python -m bench.relaxation [--smoke] [--out FILE]`.

Time and steps to 1e-6 of the drop from the start to the best energy that any method found. Every
method runs in one process on the same problem in double precision; compile time is apart. Also
the time per step against the number of edges, and a batch of small graphs in one program.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import optimistix
import scipy.optimize

import smallgain_jax as sg
from bench.run import about
from smallgain_jax.energy import EnergyGraph
from smallgain_jax.scenarios import KINDS, Scenario, random_graph

SHARE = 1e-6
ORIGINAL_SECONDS_PER_GRAPH = 0.17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/relaxation.json"))
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), default=["uniform"])
    arguments = parser.parse_args()
    report: dict[str, Any] = {"about": about(), "smoke": arguments.smoke}
    with jax.enable_x64(True):
        for name in arguments.cases:
            report[name] = CASES[name](arguments.smoke, arguments.kinds)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


Run = tuple[np.ndarray, np.ndarray]  # energies and seconds since the start, one per step


def ours(scenario: Scenario, steps: int) -> tuple[np.ndarray, Callable[[int], Any]]:
    return relaxed(None, scenario, steps)


def relaxed(
    optimizer: optax.GradientTransformation | None, scenario: Scenario, steps: int
) -> tuple[np.ndarray, Callable[[int], Any]]:
    """Energies of a run through `relax`, and the run of a given number of steps."""

    def run(count: int) -> Any:
        return sg.relax(scenario.graph, scenario.x0, optimizer, count).energy

    return np.asarray(run(steps)), run


def packaged(
    solve: Callable[[Scenario, int], np.ndarray | None], scenario: Scenario, steps: int
) -> tuple[np.ndarray, Callable[[int], Any]]:
    """A foreign solver that reports one state: its energies at growing iteration limits.

    Every fourth limit is tried, the others count as the one before: steps are known to within four.
    """
    energy = jax.jit(lambda graph, x: graph.energy(jnp.clip(x, 0.0, 1.0)))
    energies = [float(energy(scenario.graph, scenario.x0))]
    for count in range(4, steps + 1, 4):
        energies += [energies[-1]] * 3
        energies.append(float(energy(scenario.graph, solve(scenario, count))))
    return np.minimum.accumulate(energies), partial(solve, scenario)


def lbfgsb(scenario: Scenario, steps: int) -> tuple[np.ndarray, Callable[[int], Any]]:
    """SciPy's L-BFGS-B with our jitted value and gradient."""
    graph, energies = scenario.graph, []
    value_and_grad = jax.jit(lambda g, x: jax.value_and_grad(g.energy)(x))

    def host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_grad(graph, x)
        return float(value), np.asarray(gradient)

    bounds = scipy.optimize.Bounds(np.zeros(graph.num_nodes), np.ones(graph.num_nodes))

    def run(count: int) -> Any:
        energies.clear()
        energies.append(host(np.asarray(scenario.x0))[0])
        return scipy.optimize.minimize(
            host,
            np.asarray(scenario.x0),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": count, "ftol": 0.0, "gtol": 0.0},
            callback=lambda intermediate_result: energies.append(intermediate_result.fun),
        ).x

    run(steps)
    return np.array(energies), run


def jaxopt_lbfgsb(scenario: Scenario, steps: int) -> tuple[np.ndarray, Callable[[int], Any]]:
    @jax.jit
    def solve(graph: EnergyGraph, x0: jax.Array, count: jax.Array) -> jax.Array:
        solver = jaxopt.LBFGSB(lambda x, g: g.energy(x), maxiter=steps, tol=0.0)
        bounds = (jnp.zeros_like(x0), jnp.ones_like(x0))
        state = solver.init_state(x0, bounds=bounds, g=graph)

        def step(_: Any, carry: Any) -> Any:
            return tuple(solver.update(*carry, bounds=bounds, g=graph))

        return jax.lax.fori_loop(0, count, step, (x0, state))[0]

    return packaged(lambda s, count: solve(s.graph, s.x0, count), scenario, steps)


def optimistix_lbfgs(scenario: Scenario, steps: int) -> tuple[np.ndarray, Callable[[int], Any]]:
    """Unconstrained L-BFGS: its energies are those of the projected states."""

    # a limit must be a Python integer there: one program for each
    @partial(jax.jit, static_argnums=2)
    def solve(graph: EnergyGraph, x0: jax.Array, count: int) -> jax.Array:
        return optimistix.minimise(
            lambda x, g: g.energy(jnp.clip(x, 0.0, 1.0)),
            optimistix.LBFGS(rtol=1e-12, atol=1e-12),
            x0,
            args=graph,
            max_steps=count,
            throw=False,
        ).value

    return packaged(lambda s, count: solve(s.graph, s.x0, count), scenario, steps)


def compare(smoke: bool, kinds: list[str]) -> list[dict[str, Any]]:
    """Steps and seconds to 1e-6 of the drop."""
    nodes, edges = (100, 400) if smoke else (100_000, 400_000)
    table = []
    for kind in kinds:
        size = min(nodes, 900) if kind == "dense" else nodes
        scenario = random_graph(kind, size, edges, seed=1)
        bound = float(scenario.graph.curvature(scenario.x0).lipschitz)
        methods = {
            "smallgain default": (ours, 40),
            "SciPy L-BFGS-B": (lbfgsb, 200),
            "optax L-BFGS": (partial(relaxed, optax.lbfgs()), 120),
            "jaxopt L-BFGS-B": (jaxopt_lbfgsb, 60),
            "optimistix L-BFGS": (optimistix_lbfgs, 48),
            "capped gradient descent": (partial(relaxed, optax.sgd(1 / bound)), 400),
        }
        runs = {name: prepare(scenario, most) for name, (prepare, most) in methods.items()}
        best = min(float(np.min(energies)) for energies, _ in runs.values())
        for name, (energies, run) in runs.items():
            reached = np.flatnonzero(energies <= best + SHARE * (energies[0] - best))
            row: dict[str, Any] = {"kind": kind, "nodes": size, "method": name}
            row |= {"edges": scenario.graph.num_edges}
            row |= {"steps": int(reached[0]) if reached.size else None}
            row |= measure(partial(run, row["steps"] or methods[name][1]))
            table.append(row)
            print(row, file=sys.stderr)
    return table


def measure(run: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """First (compiling) call, then medians and least values of wall and processor time."""
    wall, processor = [], []
    for _ in range(1 + repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "first_s": wall[0],
        "wall_median_s": statistics.median(wall[1:]),
        "wall_least_s": min(wall[1:]),
        "processor_least_s": min(processor[1:]),
    }


def scaling(smoke: bool, kinds: list[str]) -> dict[str, Any]:
    """Processor time of a step against edges, and the exponent of the fitted power law."""
    del kinds
    rows = []
    for edges in (400, 4000) if smoke else (10_000, 100_000, 1_000_000, 10_000_000):
        scenario = random_graph("uniform", edges // 4, edges, seed=1)
        few, many = (
            measure(partial(sg.relax, scenario.graph, scenario.x0, None, steps), 2)
            for steps in (2, 6)
        )
        row = {"edges": edges}
        for key in ("wall_least_s", "processor_least_s"):
            row[key.replace("_least_s", "_per_step_s")] = (many[key] - few[key]) / 4
        rows.append(row)
        print(row, file=sys.stderr)
    x = np.log([row["edges"] for row in rows])
    y = np.log([max(row["processor_per_step_s"], 1e-9) for row in rows])
    return {"rows": rows, "exponent": float(np.polyfit(x, y, 1)[0])}


def batch(smoke: bool, kinds: list[str]) -> dict[str, Any]:
    """Graphs of 16 nodes and 48 edges, 60 steps, in one compiled call."""
    del kinds
    count = 50 if smoke else 10_000
    rng = np.random.default_rng(0)
    graph = random_graph("uniform", 16, 48, seed=0).graph

    def varied(leaf: jax.Array) -> jax.Array:
        host = np.broadcast_to(np.asarray(leaf), (count, *leaf.shape))
        if np.issubdtype(host.dtype, np.floating):
            host = host * rng.uniform(0.5, 1.5, host.shape)
        return jnp.asarray(host)

    graphs, x0 = jax.tree.map(varied, graph), jnp.asarray(rng.random((count, 16)))

    def one(pair: tuple[EnergyGraph, jax.Array]) -> jax.Array:
        return sg.relax(*pair, steps=60).energy[-1]

    # chunks stay in the cache, and wait for the longest search of their own graphs only
    ways = {
        "vmap": jax.vmap(one),
        "chunks of 128": partial(jax.lax.map, one, batch_size=128),
    }
    table = {}
    for name, way in ways.items():
        row: dict[str, Any] = {"graphs": count} | measure(partial(jax.jit(way), (graphs, x0)))
        for clock in ("wall", "processor"):
            row[f"times_the_original_{clock}"] = (
                ORIGINAL_SECONDS_PER_GRAPH * count / row[f"{clock}_least_s"]
            )
        table[name] = row
        print(name, row, file=sys.stderr)
    return table


CASES: dict[str, Callable[[bool, list[str]], Any]] = {
    "batch": batch,
    "compare": compare,
    "scaling": scaling,
}

if __name__ == "__main__":
    main()
