"""Functions under `relax` against SciPy, jaxopt and optimistix: `python -m bench.objectives`.

`[--smoke] [--cases mgh ...] [--out FILE]`; double precision, one process.

- `mgh`: problems of Moré, Garbow and Hillstrom from their starts, free and in a box around the
  start that leaves the minimizer out; the value reached against L-BFGS-B's, and evaluations;
- `larger`: chains of Rosenbrock's valley, a logistic regression in a box, a nonnegative matrix
  factorization, with times;
- `batch`: ten thousand small graphs by `relax_batch`, `vmap` and `lax.map`.

Evaluations are of value and gradient together; ours count Hessian-vector products beside, of which
each costs about two. SciPy goes on until nothing falls (ftol = 0, gtol = 1e-12), the peers in JAX
have 2,000 iterations and a tolerance of 1e-10; ours has its default.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import smallgain_jax as sg
from bench.problems import MGH, Problem, chain, factorization, logistic
from bench.run import run_cases
from bench.solver import least

ROUNDING = 1e-12
"""Of the value at the start: below that two values are the same."""


def main() -> None:
    run_cases(CASES, __doc__, Path("bench/objectives.json"))


def ours(problem: Problem, bounds: Any, steps: int = 1000) -> dict[str, Any]:
    result = sg.relax(problem.fn, problem.x0, args=problem.args, steps=steps, bounds=bounds)
    energy, made, info = np.asarray(result.energy), int(result.info.steps), result.state.info
    return {
        "value": float(energy[-1]),
        "start": float(energy[0]),
        "evaluations": 1 + made + int(info.total_backtracks),
        "products": int(info.total_products),
        "steps": made,
        "status": sg.RelaxStatus(int(result.info.status)).name,
        "rises": int((np.diff(energy) > 4 * np.finfo(float).eps * np.abs(energy[:-1])).sum()),
    }


def scipys(problem: Problem, bounds: Any) -> Callable[[], Any]:
    """A run of L-BFGS-B; its program is compiled once."""
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, problem.x0))
    value = jax.jit(jax.value_and_grad(lambda x, args: problem.fn(unravel(x), *args)))
    args = jax.tree.map(jnp.asarray, problem.args)
    box = None if bounds is None else np.broadcast_to(np.stack(bounds).T, (flat.size, 2))

    def host(x: np.ndarray) -> tuple[float, np.ndarray]:
        found, gradient = value(x, args)
        return float(found), np.asarray(gradient)

    return lambda: scipy.optimize.minimize(
        host,
        np.asarray(flat),
        jac=True,
        method="L-BFGS-B",
        bounds=box,
        options=dict(maxiter=20_000, maxfun=40_000, ftol=0.0, gtol=1e-12),
    )


def jaxopts(problem: Problem, bounds: Any) -> Callable[[], Any]:
    import jaxopt

    start = jax.tree.map(jnp.asarray, problem.x0)
    args = jax.tree.map(jnp.asarray, problem.args)
    kind = jaxopt.LBFGS if bounds is None else jaxopt.LBFGSB
    solver = kind(problem.fn, maxiter=2000, tol=1e-10)
    box = ()
    if bounds is not None:
        ends = [jax.tree.map(lambda a, e=e: jnp.broadcast_to(e, a.shape), start) for e in bounds]
        box = (tuple(ends),)
    run = jax.jit(lambda start, args: solver.run(start, *box, *args))
    return lambda: run(start, args)


def optimistixs(problem: Problem) -> dict[str, Any]:
    import optimistix

    solver = optimistix.BFGS(rtol=1e-10, atol=1e-10)
    start = jax.tree.map(jnp.asarray, problem.x0)
    found = optimistix.minimise(
        lambda x, args: problem.fn(x, *args),
        solver,
        start,
        args=problem.args,
        max_steps=2000,
        throw=False,
    )
    steps = int(found.stats["num_steps"])
    return {"value": float(problem.fn(found.value, *problem.args)), "evaluations": steps}


def reached(row: dict[str, Any], best: float) -> bool:
    """The value of SciPy's to 1e-8, or a lower one."""
    start = row["ours"]["start"]
    return bool(row["ours"]["value"] <= best + 1e-8 * max(abs(best), ROUNDING * abs(start)))


def compared(name: str, problem: Problem, bounds: Any) -> dict[str, Any]:
    row = {"problem": name, "box": bounds is not None, "ours": ours(problem, bounds)}
    found = scipys(problem, bounds)()
    row["scipy"] = {"value": float(found.fun), "evaluations": int(found.nfev)}
    x, state = jaxopts(problem, bounds)()
    value = float(problem.fn(x, *problem.args))
    row["jaxopt"] = {"value": value, "evaluations": int(state.num_fun_eval)}
    if bounds is None:
        row["optimistix"] = optimistixs(problem)
    row["reached"] = reached(row, row["scipy"]["value"])
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def mgh(smoke: bool) -> list[dict[str, Any]]:
    table = []
    for name, problem in list(MGH.items())[: 2 if smoke else None]:
        half = np.abs(scipys(problem, None)().x - problem.x0).max() / 2
        for bounds in (None, (problem.x0 - half, problem.x0 + half)):
            table.append(compared(name, problem, bounds))
    return table


def larger(smoke: bool) -> list[dict[str, Any]]:
    n = 10 if smoke else 100
    problems = {
        f"chain of {n}": chain(n),
        f"chain of {n} in [-2, 0.8]": chain(n, (-2.0, 0.8)),
        f"chain of {n} in [0, 0.95]": chain(n, (0.0, 0.95)),
        f"chain of {10 * n} in [-2, 0.8]": chain(10 * n, (-2.0, 0.8)),
        "logistic regression": logistic(*((200, 20) if smoke else (2000, 200))),
        "factorization": factorization(*((12, 9, 2) if smoke else (60, 80, 5))),
    }
    table = []
    for name, problem in problems.items():
        row = compared(name, problem, problem.bounds)
        data = jax.tree.map(jnp.asarray, problem.args)
        settings = dict(steps=1000, bounds=problem.bounds)
        runs = {
            "ours": lambda p=problem, s=settings, d=data: sg.relax(p.fn, p.x0, args=d, **s).x,
            "scipy": scipys(problem, problem.bounds),
            "jaxopt": jaxopts(problem, problem.bounds),
        }
        row["seconds"] = least(runs, repeats=2)
        table.append(row)
    return table


def batch(smoke: bool) -> dict[str, Any]:
    """Anchors from 1e-3 to 1, so that members need from a few steps to well over a hundred."""
    count, n, edges = 100 if smoke else 10_000, 16, 48
    rng = np.random.default_rng(0)
    i = rng.integers(0, n, (count, edges))
    j = (i + rng.integers(1, n, (count, edges))) % n
    weight, anchor = rng.random((count, edges)), 10 ** rng.uniform(-3, 0, (count, n))
    data = anchor, rng.uniform(-0.2, 1.2, (count, n)), i, j, weight

    def graph(anchor: Any, target: Any, i: Any, j: Any, weight: Any) -> sg.EnergyGraph:
        return sg.EnergyGraph(sg.Landau(anchor, target=target), [sg.Quadratic(i, j, weight)])

    graphs = jax.jit(jax.vmap(graph))(*data)
    starts = jnp.asarray(rng.random((count, n)))
    one = lambda g, x: sg.relax(g, x, steps=1000).x  # noqa: E731
    in_turn = jax.jit(
        lambda g, x: jax.lax.map(lambda a: one(*a), (g, x), batch_size=min(count, 128))
    )
    at_once = jax.jit(jax.vmap(one))
    result = sg.relax_batch(graphs, starts, steps=1000)
    needed, most = int(result.info.steps.sum()), int(result.info.steps.max())
    runs = {
        "relax_batch": lambda: sg.relax_batch(graphs, starts, steps=1000).x,
        "vmap": lambda: at_once(graphs, starts),
        "lax.map, 128": lambda: in_turn(graphs, starts),
    }
    report = {"graphs": count, "needed": needed, "most": most}
    report |= {"computed": int(result.computed), "ratio": int(result.computed) / needed}
    report |= {"lockstep ratio": most * count / needed}
    start = time.perf_counter()
    report |= {"seconds": least(runs), "took": time.perf_counter() - start}
    print(json.dumps(report), file=sys.stderr)
    return report


CASES = {"batch": batch, "larger": larger, "mgh": mgh}

if __name__ == "__main__":
    main()
