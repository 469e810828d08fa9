"""Measure, and write JSON: `python -m bench.run [--smoke] [--out FILE] [--cases NAME ...]`.

Peers run in the same process on the same problem; compile time is apart from run time; times are
medians of repeated runs. Trust ratios within one file, never absolute times.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from scipy.sparse import csr_matrix

import smallgain_jax as sg
from smallgain_jax.tools.scenarios import KINDS, Scenario, random_graph

SHARES = (0.1, 1e-3, 1e-6)


def main() -> None:
    run_cases(CASES, __doc__, Path("bench/results.json"))


def run_cases(
    cases: dict[str, Callable[[bool], Any]], description: str | None, default: Path
) -> None:
    """A command line around cases, each called with whether sizes are tiny, written as it ends."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--cases", nargs="*", choices=sorted(cases), default=sorted(cases))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"about": about(), "smoke": arguments.smoke}
    with jax.enable_x64(True):
        for name in arguments.cases:
            report[name] = cases[name](arguments.smoke)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}", file=sys.stderr)


def about() -> dict[str, Any]:
    """Where and by which command a file of figures was made."""
    spec = sys.modules["__main__"].__spec__
    name = Path(sys.argv[0]).name if spec is None else f"-m {spec.name.removesuffix('.__main__')}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join(["python", *name.split(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def timed(
    run: Callable[..., Any], *arguments: Any, repeats: int = 3, **settings: Any
) -> tuple[Any, dict[str, float]]:
    """Result of a call, its first (compiling) time, and the median of later ones, in seconds."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(run(*arguments, **settings))
        seconds.append(time.perf_counter() - start)
    return result, {"first_s": seconds[0], "run_s": statistics.median(seconds[1:])}


def steps_to(energy: np.ndarray, minimum: float) -> list[int | None]:
    """Steps until all but each of `SHARES` of the drop is made."""
    reached = [np.flatnonzero(energy <= minimum + s * (energy[0] - minimum)) for s in SHARES]
    return [int(found[0]) if found.size else None for found in reached]


def lbfgsb(scenario: Scenario, iterations: int) -> tuple[np.ndarray, float]:
    """SciPy's L-BFGS-B with our jitted value and gradient: energies by iteration, seconds."""
    value_and_grad = jax.jit(lambda x: scenario.graph.value_and_gradient(x))

    def host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_grad(jnp.asarray(x))
        return float(value), np.asarray(gradient, float)

    energies = [host(np.asarray(scenario.x0))[0]]
    start = time.perf_counter()
    scipy.optimize.minimize(
        host,
        np.asarray(scenario.x0),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, 1.0)] * scenario.graph.num_nodes,
        options={"maxiter": iterations, "ftol": 0.0, "gtol": 1e-12},
        callback=lambda intermediate_result: energies.append(intermediate_result.fun),
    )
    return np.asarray(energies), time.perf_counter() - start


def relaxation(smoke: bool) -> list[dict[str, Any]]:
    """Steps to a share of the drop, against L-BFGS-B, L-BFGS and the first-order peers."""
    sizes = [("uniform", 30, 90)] if smoke else [(kind, 400, 1600) for kind in KINDS]
    sizes += [] if smoke else [("uniform", 100_000, 400_000)]
    table = []
    for kind, nodes, edges in sizes:
        nodes = min(nodes, 100) if kind == "dense" else nodes
        scenario = random_graph(kind, nodes, edges, seed=1)
        graph, x0 = scenario.graph, scenario.x0
        bound = float(graph.curvature(x0).lipschitz)
        methods: dict[str, optax.GradientTransformation | None] = {
            "smallgain default": None,
            "capped gradient descent": optax.sgd(1 / bound),
            "optax L-BFGS": optax.lbfgs(),
            "small_gain(sgd)": sg.small_gain(optax.sgd(0.1), graph),
        }
        if nodes > 10_000:
            # it closes over its graph, which XLA would then fold as constants
            del methods["small_gain(sgd)"]
        runs, seconds = {}, {}
        for name, optimizer in methods.items():
            steps = 20 if smoke else 100
            result, seconds[name] = timed(sg.relax, graph, x0, optimizer, steps, repeats=1)
            runs[name] = np.asarray(result.energy)
            seconds[name]["s_per_step"] = seconds[name]["run_s"] / steps
        runs["SciPy L-BFGS-B"], total = lbfgsb(scenario, 20 if smoke else 300)
        per_step = total / max(1, len(runs["SciPy L-BFGS-B"]) - 1)
        seconds["SciPy L-BFGS-B"] = {"run_s": total, "s_per_step": per_step}
        minimum = min(float(energy.min()) for energy in runs.values())
        for name, energy in runs.items():
            row = {"kind": kind, "nodes": nodes, "edges": graph.num_edges, "method": name}
            table.append(row | {"steps": steps_to(energy, minimum)} | seconds[name])
            print(f"{kind:12s} {nodes:7d}  {name:24s} {row | table[-1]}", file=sys.stderr)
    return table


def allocation(smoke: bool) -> list[dict[str, Any]]:
    """Value of the allocation against the linear program's optimum (HiGHS)."""
    table = []
    for kind in list(KINDS)[: 1 if smoke else None]:
        scenario = random_graph(kind, 60, 240, seed=2)
        graph, rng = scenario.graph, np.random.default_rng(0)
        rows = np.stack([graph.i, graph.j], axis=1)
        cost = np.asarray(graph.curvature(scenario.x0).edge_cost)
        value = np.square(np.asarray(graph.term_gradients(scenario.x0))).sum(axis=1)
        lower, upper = np.full(len(value), 0.9), np.full(len(value), 1.1)
        full = np.zeros(graph.num_nodes)
        np.add.at(full, rows, cost * 0.2)
        budget = full * rng.random(graph.num_nodes)
        entries = (cost.ravel(), (rows.ravel(), np.repeat(np.arange(len(value)), 2)))
        matrix = csr_matrix(entries, shape=(graph.num_nodes, len(value)))
        best = -scipy.optimize.linprog(-value, A_ub=matrix, b_ub=budget, bounds=(0, 0.2)).fun
        for rounds, bins in ((1, 0), (16, 0), (2, 16)):
            problem = (value, cost, rows, lower, upper, budget)
            spend, seconds = timed(_allocate, *problem, rounds=rounds, bins=bins)
            share = float(value @ (np.asarray(spend.weights) - lower) / best)
            row = {"kind": kind, "terms": len(value), "rounds": rounds, "bins": bins}
            table.append(row | {"share_of_optimum": share} | seconds)
            print(f"{kind:12s} {table[-1]}", file=sys.stderr)
    return table


_allocate = jax.jit(sg.allocate, static_argnames=("rounds", "bins"))

CASES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "allocation": allocation,
    "relaxation": relaxation,
}

if __name__ == "__main__":
    main()
