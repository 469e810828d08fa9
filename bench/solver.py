"""What derivatives and early exit cost: `python -m bench.solver [--smoke] [--out FILE]`.

Ratios within one process, in double precision, least of several interleaved repeats:

- `gradient`: time of the minimizer's gradient against the forward solve, implicit and unrolled, and
  the memory that XLA plans for it, for several numbers of steps;
- `exit`: a run of 1,000 steps that converges early against one of just the steps it needs, alone
  and in a batch;
- `hard`: chains and grids that are weakly anchored, against SciPy's L-BFGS-B.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import scipy.optimize

import smallgain_jax as sg
from bench.run import run_cases
from smallgain_jax.tools.scenarios import random_graph


def main() -> None:
    run_cases(CASES, __doc__, Path("bench/solver.json"))


def least(runs: dict[str, Callable[[], Any]], repeats: int = 3) -> dict[str, float]:
    """Least wall time of each, interleaved, after one call that compiles."""
    seconds: dict[str, float] = dict.fromkeys(runs, np.inf)
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def gradient(smoke: bool) -> list[dict[str, Any]]:
    """Seconds of a gradient by every weight, beside those of the solve, and the memory it takes."""
    sizes = [1000] if smoke else [100_000, 1_000_000]
    return [row for edges in sizes for row in gradient_at(edges)]


def gradient_at(edges: int) -> list[dict[str, Any]]:
    problem = random_graph("uniform", edges // 4, edges, seed=1)
    graph, x0 = problem.graph, problem.x0

    def slope(steps: int, adjoint: str) -> Any:
        def loss(graph: sg.EnergyGraph) -> jax.Array:
            return jnp.sum(sg.relax(graph, x0, steps=steps, adjoint=adjoint).x ** 2)

        return eqx.filter_jit(eqx.filter_grad(loss)).lower(graph).compile()

    def mebibytes(compiled: Any) -> float:
        return compiled.compiled.memory_analysis().temp_size_in_bytes / 2**20

    implicit = slope(100, "implicit")
    runs = {
        "forward": lambda: sg.relax(graph, x0, steps=100).x,
        "implicit": lambda: implicit(graph),
    } | without_a_box(graph, x0)
    memory = {f"implicit, {n} steps": mebibytes(slope(n, "implicit")) for n in (50, 500, 5000)}
    if edges <= 100_000:
        # at a million edges this is more than the machine has
        unrolled = slope(100, "unrolled")
        runs["unrolled"] = lambda: unrolled(graph)
        memory["unrolled, 100 steps"] = mebibytes(unrolled)
    seconds = least(runs, 1 if edges > 100_000 else 3)
    return [
        {"edges": edges, "run": run, "seconds": seconds.get(run), "mebibytes": memory.get(run)}
        for run in [*seconds, *memory]
    ]


def without_a_box(graph: sg.EnergyGraph, x0: jax.Array) -> dict[str, Callable[[], Any]]:
    """The minimizer and its gradient by ours and by optimistix, which has no bounds."""
    # its default for the adjoint forms the Hessian as a dense matrix
    solver = optimistix.LBFGS(rtol=1e-9, atol=1e-9)
    adjoint = optimistix.ImplicitAdjoint(linear_solver=lineax.CG(rtol=1e-9, atol=1e-9))

    @eqx.filter_jit
    def theirs(graph: sg.EnergyGraph) -> jax.Array:
        found = optimistix.minimise(
            lambda x, graph: graph.energy(x),
            solver,
            x0,
            args=graph,
            max_steps=2000,
            adjoint=adjoint,
            tags=frozenset({lineax.positive_semidefinite_tag}),
            throw=False,
        )
        return found.value

    @eqx.filter_jit
    def ours(graph: sg.EnergyGraph) -> jax.Array:
        return sg.relax(graph, x0, steps=2000, bounds=None).x

    runs: dict[str, Callable[[], Any]] = {}
    for name, solve in {"ours, no box": ours, "optimistix L-BFGS": theirs}.items():
        slope = eqx.filter_grad(lambda graph, solve=solve: jnp.sum(solve(graph) ** 2))
        loss = eqx.filter_jit(slope)
        runs[f"{name}: forward"] = lambda solve=solve: solve(graph)
        runs[f"{name}: gradient"] = lambda loss=loss: loss(graph)
    return runs


def early_exit(smoke: bool) -> list[dict[str, Any]]:
    count = 20 if smoke else 1000
    problem = random_graph("uniform", 16, 48, seed=0)
    many = jax.vmap(lambda x: sg.relax(problem.graph, x, steps=1000).info.steps)
    starts = jnp.asarray(np.random.default_rng(0).random((count, 16)))
    needed = int(jax.jit(many)(starts).max())

    def batch(steps: int) -> Callable[[], Any]:
        run = jax.jit(jax.vmap(lambda x: sg.relax(problem.graph, x, steps=steps).x))
        return lambda: run(starts)

    large = random_graph("uniform", 250 if smoke else 25_000, 1000 if smoke else 100_000, seed=1)
    own = int(sg.relax(large.graph, large.x0, steps=1000).info.steps)
    runs = {
        "batch, 1000 steps": batch(1000),
        "batch, needed": batch(needed),
        "alone, 1000 steps": lambda: sg.relax(large.graph, large.x0, steps=1000).x,
        "alone, needed": lambda: sg.relax(large.graph, large.x0, steps=own).x,
    }
    counts = {"batch, 1000 steps": needed, "batch, needed": needed}
    return [
        {"run": run, "seconds": seconds, "steps needed": counts.get(run, own)}
        for run, seconds in least(runs).items()
    ]


def chain(n: int, anchor: float, weight: Any) -> sg.EnergyGraph:
    target = np.random.default_rng(0).random(n)
    local = sg.Landau(np.full(n, anchor), target=target)
    return sg.EnergyGraph(local, [sg.Quadratic(np.arange(n - 1), np.arange(1, n), weight)])


def hard(smoke: bool) -> list[dict[str, Any]]:
    """Steps to 1e-6 of the energy's drop from the start to the lowest found, and what is left."""
    n = 50 if smoke else 1000
    wild = 10 ** np.random.default_rng(1).uniform(-4, 4, 49)
    problems = {
        "chain, a = 1e-3": chain(n, 1e-3, 1.0),
        "chain of 50, weights 1e-4 to 1e4": chain(50, 1e-3, wild),
    }
    table = []
    for name, graph in problems.items():
        x0 = jnp.zeros(graph.num_nodes)
        ours = sg.relax(graph, x0, steps=3000)
        value = jax.jit(lambda x, graph=graph: graph.value_and_gradient(x))
        theirs = scipy.optimize.minimize(
            lambda x, value=value: tuple(map(np.asarray, value(x))),
            np.asarray(x0),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, 1)] * graph.num_nodes,
            options={"maxiter": 3000, "maxfun": 10_000, "ftol": 0.0, "gtol": 1e-12},
        )
        energy = np.asarray(ours.energy)
        best = min(energy.min(), theirs.fun)
        reached = np.flatnonzero(energy <= best + 1e-6 * (energy[0] - best))
        row: dict[str, Any] = {"problem": name, "steps": int(ours.info.steps)}
        row |= {"to_1e-6": int(reached[0]) if reached.size else None}
        row |= {"left": float((energy[-1] - best) / (energy[0] - best))}
        row |= {"status": sg.RelaxStatus(int(ours.info.status)).name}
        row |= {"L-BFGS-B iterations": int(theirs.nit)}
        row |= {"L-BFGS-B left": float((theirs.fun - best) / (energy[0] - best))}
        table.append(row)
    return table


CASES: dict[str, Callable[[bool], Any]] = {
    "exit": early_exit,
    "gradient": gradient,
    "hard": hard,
}

if __name__ == "__main__":
    main()
