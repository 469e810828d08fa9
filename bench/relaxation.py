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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import smallgain_jax as sg
from bench.run import about
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.tools.scenarios import KINDS, Scenario, random_graph

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


def lbfgsb(scenario: Scenario, steps: int) -> tuple[np.ndarray, Callable[[int], Any]]:
    """SciPy's L-BFGS-B with our jitted value and gradient."""
    graph, energies = scenario.graph, []
    value_and_grad = jax.jit(lambda g, x: g.value_and_gradient(x))

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
    import jaxopt

    @jax.jit
    def solve(graph: EnergyGraph, x0: jax.Array, count: jax.Array) -> jax.Array:
        solver = jaxopt.LBFGSB(lambda x, g: g.energy(x), maxiter=steps, tol=0.0)
        bounds = (jnp.zeros_like(x0), jnp.ones_like(x0))
        state = solver.init_state(x0, bounds=bounds, g=graph)

        def step(k: Any, carry: Any) -> Any:
            x, state, energies = carry
            x, state = solver.update(x, state, bounds=bounds, g=graph)
            return x, state, energies.at[k + 1].set(state.value)

        energies = jnp.full(steps + 1, jnp.inf).at[0].set(graph.energy(x0))
        return jax.lax.fori_loop(0, count, step, (x0, state, energies))[2]

    return counted(solve, scenario, steps)


def optimistix_lbfgs(scenario: Scenario, steps: int) -> tuple[np.ndarray, Callable[[int], Any]]:
    """Unconstrained L-BFGS on the energy of the projected state; a step is one evaluation."""
    import optimistix

    solver = optimistix.LBFGS(rtol=1e-12, atol=1e-12)

    def fn(x: jax.Array, g: EnergyGraph) -> tuple[jax.Array, None]:
        return g.energy(jnp.clip(x, 0.0, 1.0)), None

    @jax.jit
    def solve(graph: EnergyGraph, x0: jax.Array, count: jax.Array) -> jax.Array:
        value = jax.eval_shape(lambda: fn(x0, graph)[0])
        start, static = eqx.partition(
            solver.init(fn, x0, graph, {}, value, None, frozenset()), eqx.is_array
        )

        def step(k: Any, carry: Any) -> Any:
            x, state, energies = carry
            state = eqx.combine(state, static)
            x, state, _ = solver.step(fn, x, graph, {}, state, frozenset())
            # the accepted state's energy; the candidate x of a rejected step is not one
            energies = energies.at[k + 1].set(state.f_info.f)
            return x, eqx.filter(state, eqx.is_array), energies

        energies = jnp.full(steps + 1, jnp.inf).at[0].set(graph.energy(x0))
        return jax.lax.fori_loop(0, count, step, (x0, start, energies))[2]

    return counted(solve, scenario, steps)


def counted(
    solve: Callable[..., jax.Array], scenario: Scenario, steps: int
) -> tuple[np.ndarray, Callable[[int], Any]]:
    """A solver whose number of steps is data: one program for the curve and for the time."""

    def run(count: int) -> Any:
        return solve(scenario.graph, scenario.x0, count)

    return np.minimum.accumulate(run(steps)), run


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
            "SciPy L-BFGS-B": (lbfgsb, 100),
            "optax L-BFGS": (partial(relaxed, optax.lbfgs()), 100),
            "jaxopt L-BFGS-B": (jaxopt_lbfgsb, 60),
            "optimistix L-BFGS": (optimistix_lbfgs, 150),
            "capped gradient descent": (partial(relaxed, optax.sgd(1 / bound)), 300),
        }
        runs, prepared_s = {}, {}
        for name, (prepare, most) in methods.items():
            started = time.perf_counter()
            runs[name] = prepare(scenario, most)
            prepared_s[name] = time.perf_counter() - started
        best = min(float(np.min(energies)) for energies, _ in runs.values())
        for name, (energies, run) in runs.items():
            reached = np.flatnonzero(energies <= best + SHARE * (energies[0] - best))
            row: dict[str, Any] = {"kind": kind, "nodes": size, "method": name}
            row |= {"edges": scenario.graph.num_edges, "most_steps": methods[name][1]}
            row |= {"prepared_s": prepared_s[name]}
            row |= {"steps": int(reached[0]) if reached.size else None}
            # who does not arrive is timed once, at the most steps it was given
            row |= measure(partial(run, row["steps"] or methods[name][1]), 3 if reached.size else 1)
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
    """Time of a step and peak memory against edges, and the exponents of fitted power laws."""
    del kinds
    rows = []
    for edges in (400, 4000) if smoke else (10_000, 100_000, 1_000_000, 10_000_000):
        scenario = random_graph("uniform", edges // 4, edges, seed=1)
        row: dict[str, Any] = {"edges": edges, "graph_mib": mebibytes(scenario.graph)}
        row["resident_before_mib"] = resident("VmRSS", forget_peak=True)
        few, many = (
            measure(partial(sg.relax, scenario.graph, scenario.x0, None, steps), 2)
            for steps in (2, 6)
        )
        row["peak_mib"] = resident("VmHWM")
        for key in ("wall_least_s", "processor_least_s"):
            row[key.replace("_least_s", "_per_step_s")] = (many[key] - few[key]) / 4
        rows.append(row)
        print(row, file=sys.stderr)
    exponents = {
        name: exponent(rows, name)
        for name in ("wall_per_step_s", "processor_per_step_s", "graph_mib")
    }
    return {"rows": rows, "exponents": exponents}


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    x = np.log([row["edges"] for row in rows])
    return float(np.polyfit(x, np.log([max(row[name], 1e-9) for row in rows]), 1)[0])


def mebibytes(tree: Any) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)) / 2**20


def resident(field: str, *, forget_peak: bool = False) -> float:
    """Memory of this process as Linux counts it, in MiB; its peak can start anew."""
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def small_graphs(count: int) -> tuple[EnergyGraph, jax.Array]:
    """Graphs of 16 nodes and 48 edges with other numbers each, and starts, along a first axis."""
    rng = np.random.default_rng(0)
    graph = random_graph("uniform", 16, 48, seed=0).graph

    def varied(leaf: jax.Array) -> jax.Array:
        host = np.broadcast_to(np.asarray(leaf), (count, *leaf.shape))
        if np.issubdtype(host.dtype, np.floating):
            host = host * rng.uniform(0.5, 1.5, host.shape).astype(host.dtype)
        return jnp.asarray(host)

    return jax.tree.map(varied, graph), jnp.asarray(rng.random((count, 16)))


def batch(smoke: bool, kinds: list[str]) -> dict[str, Any]:
    """Graphs of 16 nodes and 48 edges, 60 steps, in one compiled call."""
    del kinds
    count = 50 if smoke else 10_000
    graphs, x0 = small_graphs(count)

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
