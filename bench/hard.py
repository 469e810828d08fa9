"""Hard graphs against their rivals: `python -m bench.hard [--smoke] [--out FILE] [--problems ..]`.

Steps, processor seconds and wall seconds until the projected gradient is 1e-6 of its start, in
double precision, in one process. Setup is counted (`setup_s`), compiling is not. Quadratic
problems: `conjugate_gradients` with rows and with the hierarchy, SciPy's CG with Jacobi, pyamg.
Others: `relax` with rows and with the hierarchy, and L-BFGS-B. On all: jaxopt's L-BFGS-B and
optax's L-BFGS.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg

import smallgain_jax as sg
from bench.run import about
from smallgain_jax.graphs.choice import choose_metric
from smallgain_jax.graphs.quadratic import conjugate_gradients
from smallgain_jax.search.box import Box
from smallgain_jax.tools import hard

TOLERANCE = 1e-6
MOST = 1500

SMOKE: dict[str, Callable[[], hard.Problem]] = {
    "grid": partial(hard.grid, 24),
    "chain": partial(hard.chain, 300),
    "obstacle": partial(hard.obstacle, 24),
    "ranking": partial(hard.ranking, 200, 800),
}
PROBLEMS: dict[str, Callable[[], hard.Problem]] = {
    **hard.HARD,
    "grid_128": partial(hard.grid, 128, 1e-6),
    "grid_512": partial(hard.grid, 512, 1e-6),
    "grid_1024": partial(hard.grid, 1024, 1e-6),
    "chain_1e-6": partial(hard.chain, a=1e-6),
    "obstacle_1000": partial(hard.obstacle, 1000),
    "missing_pixels_free": lambda: hard.missing_pixels()._replace(bounds=None),
    "large_hole_free": lambda: hard.large_hole()._replace(bounds=None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/hard.json"))
    parser.add_argument("--problems", nargs="*", choices=sorted(PROBLEMS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[])
    parser.add_argument("--skip", nargs="*", default=[], help="methods to leave out")
    arguments = parser.parse_args()
    chosen = SMOKE if arguments.smoke else PROBLEMS
    report: dict[str, Any] = {"about": about(), "tolerance": TOLERANCE, "rows": []}
    with jax.enable_x64(True):
        for name in arguments.problems or chosen:
            problem = chosen[name]()
            for method, run in (QUADRATIC if problem.quadratic else GENERAL).items():
                if method in arguments.skip or method not in (arguments.methods or METHODS):
                    continue
                row = {"problem": problem.name, "method": method, **run(problem)}
                report["rows"].append(row)
                print(row, file=sys.stderr, flush=True)
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The outcome, and wall and processor time of a second, compiled call: the lesser of two."""
    jax.block_until_ready(run())
    wall, processor = [], []
    for _ in range(2):
        start = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(run())
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return found, {"wall_s": min(wall), "processor_s": min(processor)}


def hierarchy_of(problem: hard.Problem) -> tuple[sg.Hierarchy, dict[str, float]]:
    sg.multilevel(problem.graph)
    start = time.process_time()
    hierarchy = sg.multilevel(problem.graph)
    return hierarchy, {"setup_s": time.process_time() - start}


def plain(problem: hard.Problem, *, hierarchy: bool) -> dict[str, Any]:
    """Conjugate gradients of the library."""
    metric, setup = hierarchy_of(problem) if hierarchy else (None, {"setup_s": 0.0})
    run = partial(
        conjugate_gradients, problem.graph, problem.x0, metric, steps=5 * MOST, tol=TOLERANCE
    )
    found, times = measured(run)
    return {"steps": int(found.steps), "converged": bool(found.converged)} | times | setup


def system(problem: hard.Problem) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Hessian and gradient at the start, as SciPy wants them."""
    graph, n = problem.graph, problem.graph.num_nodes
    i, j = np.asarray(graph.i), np.asarray(graph.j)
    w = 2 * np.concatenate([np.asarray(family.weight) for family in graph.edges])
    off = scipy.sparse.coo_array((w, (i, j)), shape=(n, n)).tocsr()
    off = off + off.T
    local = np.asarray(graph.local_rows(problem.x0))
    matrix = scipy.sparse.diags_array(local + off.sum(axis=1)) - off
    return matrix.tocsr(), np.asarray(graph.gradient(problem.x0))


def scipy_jacobi(problem: hard.Problem) -> dict[str, Any]:
    matrix, gradient = system(problem)
    inverse = 1 / matrix.diagonal()
    return counted(matrix, gradient, lambda g: inverse * g) | {"setup_s": 0.0}


def pyamg_solver(problem: hard.Problem, *, classical: bool = False) -> dict[str, Any]:
    import pyamg

    matrix, gradient = system(problem)
    matrix = scipy.sparse.csr_matrix(matrix)
    matrix.indices, matrix.indptr = (a.astype(np.int32) for a in (matrix.indices, matrix.indptr))
    start = time.process_time()
    build = pyamg.ruge_stuben_solver if classical else pyamg.smoothed_aggregation_solver
    solver = build(matrix)
    setup = {"setup_s": time.process_time() - start}
    return counted(matrix, gradient, solver.aspreconditioner().matvec) | setup


def counted(matrix: Any, gradient: np.ndarray, precondition: Any) -> dict[str, Any]:
    """SciPy's conjugate gradients until the largest entry of the gradient is small enough.

    SciPy stops by the Euclidean norm only: iterates are watched, with one more product a step, and
    that is taken off the time.
    """
    n = gradient.size
    operator = scipy.sparse.linalg.LinearOperator((n, n), precondition, dtype=float)
    wanted = TOLERANCE * np.abs(gradient).max()
    steps, watching = 0, 0.0

    class Reached(Exception):
        pass

    def watch(x: np.ndarray) -> None:
        nonlocal steps, watching
        begun = time.process_time()
        steps += 1
        if np.abs(gradient - matrix @ x).max() <= wanted:
            raise Reached
        watching += time.process_time() - begun

    start, converged = time.process_time(), False
    try:
        scipy.sparse.linalg.cg(
            matrix, gradient, rtol=1e-15, maxiter=5 * MOST, M=operator, callback=watch
        )
    except Reached:
        converged = True
    seconds = time.process_time() - start - watching
    return {"steps": steps, "converged": converged, "processor_s": seconds}


def box_of(problem: hard.Problem) -> Box:
    return Box(*(problem.bounds or (-np.inf, np.inf)))


def tolerance_of(problem: hard.Problem) -> float:
    """The part of its start that the projected gradient has to reach: two digits more at 1000^2."""
    return 1e-2 * TOLERANCE if problem.graph.num_nodes == 1000**2 else TOLERANCE


def relaxed(problem: hard.Problem, *, hierarchy: bool) -> dict[str, Any]:
    """`relax` as it is, with rows or with the hierarchy: its steps until the gradient is small.

    `relax` itself ends by its own measure, so the gradients are recorded, and the run that is timed
    is one of just as many steps. With a hierarchy in a box a step is the minimum of a model, so
    work is also told in gradients: the time of the run over that of one.
    """
    metric, setup = hierarchy_of(problem) if hierarchy else ("rows", {"setup_s": 0.0})
    run = partial(
        sg.relax, problem.graph, problem.x0, bounds=problem.bounds, tol=0.0, metric=metric
    )
    for most in (20, 200, MOST):
        # one more, because the record is of the state before a step
        found = run(steps=most + 1, record=looked)
        gradient, backtracks, held = (np.asarray(kept)[1:] for kept in found.info.history)
        ratio = gradient / np.asarray(found.info.history[0])[0]
        if ratio.min() <= tolerance_of(problem):
            break
    steps, converged = first(ratio <= tolerance_of(problem))
    steps += converged
    times = measured(partial(run, steps=steps))[1]
    return (
        {
            "steps": steps,
            "converged": converged,
            "gradient": float(ratio[steps - 1]) if converged else float(ratio.min()),
            "backtracks": int(backtracks[:steps].sum()),
            "held": float(held[steps - 1]),
            "status": sg.RelaxStatus(int(found.info.status)).name,
            "gradients": times["processor_s"] / seconds_of_gradient(problem),
        }
        | times
        | setup
    )


def seconds_of_gradient(problem: hard.Problem) -> float:
    """Processor seconds of one gradient inside a program: what work is told in.

    A call of its own takes up to four times as long, because its memory is new each time.
    """

    @jax.jit
    def several(graph: Any, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 20, lambda _, x: x - 1e-9 * graph.gradient(x), x)

    return measured(partial(several, problem.graph, problem.x0))[1]["processor_s"] / 20


def looked(state: Any) -> tuple[jax.Array, ...]:
    """Of the state before a step: gradient on the free nodes; trials of it, and who was held."""
    free = state.descent_gradient
    return jnp.max(jnp.abs(free)), state.info.last_step_backtracks, jnp.mean(free == 0)


def first(reached: np.ndarray) -> tuple[int, bool]:
    """The first step at which it holds, and whether there is one; else all of them."""
    at = np.flatnonzero(reached)
    return (int(at[0]), True) if at.size else (reached.size, False)


def lbfgsb(problem: hard.Problem) -> dict[str, Any]:
    """SciPy's L-BFGS-B with our jitted value and gradient, stopped where the others are."""
    graph, box = problem.graph, box_of(problem)
    value_and_gradient = jax.jit(lambda g, x: g.value_and_gradient(x))

    def host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_gradient(graph, x)
        return float(value), np.asarray(gradient)

    def projected(x: np.ndarray) -> float:
        gradient = host(x)[1]
        return float(np.abs(np.where(box.blocks(x, -gradient), 0, gradient)).max(initial=0.0))

    x0 = np.asarray(problem.x0)
    first, steps, converged = projected(x0), 0, False

    def watch(intermediate_result: Any) -> None:
        nonlocal steps, converged
        steps += 1
        converged = projected(intermediate_result.x) <= TOLERANCE * first
        if converged or steps >= MOST:
            raise StopIteration

    bounds = scipy.optimize.Bounds(*(np.full(x0.shape, end) for end in box))
    options = {"maxiter": MOST, "maxfun": 10 * MOST, "ftol": 0.0, "gtol": 0.0}
    start = time.process_time()
    scipy.optimize.minimize(
        host, x0, jac=True, method="L-BFGS-B", bounds=bounds, options=options, callback=watch
    )
    seconds = time.process_time() - start
    return {"steps": steps, "converged": converged, "processor_s": seconds, "setup_s": 0.0}


def projected_ratio(problem: hard.Problem) -> Callable[[Any, jax.Array], jax.Array]:
    """Largest entry of the projected gradient, against that of the start, of a graph at x."""
    box = box_of(problem)

    def largest(graph: Any, x: jax.Array) -> jax.Array:
        gradient = graph.gradient(x)
        return jnp.max(jnp.abs(jnp.where(box.blocks(x, -gradient), 0, gradient)))

    start = largest(problem.graph, problem.x0)
    return lambda graph, x: largest(graph, x) / start


def stepped(problem: hard.Problem, begin: Any, advance: Any) -> dict[str, Any]:
    """A solver inside one program, stopped where the others are; looking costs it a gradient."""
    ratio = projected_ratio(problem)

    @jax.jit
    def solve(graph: Any, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
        def going(carry: Any) -> jax.Array:
            steps, x, _ = carry
            return (ratio(graph, x) > TOLERANCE) & (steps < MOST)

        def step(carry: Any) -> Any:
            steps, x, state = carry
            return steps + 1, *advance(graph, x, state)

        steps, x, _ = jax.lax.while_loop(going, step, (jnp.zeros((), int), x0, begin(graph, x0)))
        return steps, ratio(graph, x)

    # weakly typed starts would change their type on the way
    x0 = jnp.asarray(np.asarray(problem.x0))
    (steps, left), times = measured(partial(solve, problem.graph, x0))
    return {"steps": int(steps), "converged": bool(left <= TOLERANCE), "setup_s": 0.0} | times


def jaxopt_lbfgsb(problem: hard.Problem) -> dict[str, Any]:
    import jaxopt

    solver = jaxopt.LBFGSB(lambda x, graph: graph.energy(x), maxiter=MOST, tol=0.0)
    low, high = problem.bounds or (-jnp.inf, jnp.inf)
    bounds = jnp.full(problem.x0.shape, low), jnp.full(problem.x0.shape, high)

    def begin(graph: Any, x: jax.Array) -> Any:
        return solver.init_state(x, bounds=bounds, graph=graph)

    def advance(graph: Any, x: jax.Array, state: Any) -> Any:
        return tuple(solver.update(x, state, bounds=bounds, graph=graph))

    return stepped(problem, begin, advance)


def optax_lbfgs(problem: hard.Problem) -> dict[str, Any]:
    """Its steps under `relax`, which holds nodes at the box: the transformation knows none."""
    box, optimizer = box_of(problem), optax.lbfgs()

    def begin(graph: Any, x: jax.Array) -> Any:
        return optimizer.init(x)

    def advance(graph: Any, x: jax.Array, state: Any) -> Any:
        value, gradient = graph.value_and_gradient(x)
        free = jnp.where(box.blocks(x, -gradient), 0, gradient)
        projected = lambda y: graph.energy(box.project(y))  # noqa: E731
        moves, state = optimizer.update(free, state, x, value=value, grad=free, value_fn=projected)
        return box.project(x + moves), state

    return stepped(problem, begin, advance)


def automatic(problem: hard.Problem) -> dict[str, Any]:
    """What `choose_metric` takes, and how long it looks; the hierarchy's setup included."""
    choose_metric(problem.graph, problem.x0)
    start = time.process_time()
    reason = choose_metric(problem.graph, problem.x0).reason
    return {"processor_s": time.process_time() - start, "reason": reason}


QUADRATIC: dict[str, Callable[[hard.Problem], dict[str, Any]]] = {
    "auto": automatic,
    "CG, rows": partial(plain, hierarchy=False),
    "CG, hierarchy": partial(plain, hierarchy=True),
    "SciPy CG, Jacobi": scipy_jacobi,
    "pyamg SA + CG": pyamg_solver,
    "pyamg Ruge-Stuben + CG": partial(pyamg_solver, classical=True),
    "SciPy L-BFGS-B": lbfgsb,
    "jaxopt L-BFGS-B": jaxopt_lbfgsb,
    "optax L-BFGS": optax_lbfgs,
}
GENERAL: dict[str, Callable[[hard.Problem], dict[str, Any]]] = {
    "auto": automatic,
    "relax, rows": partial(relaxed, hierarchy=False),
    "relax, hierarchy": partial(relaxed, hierarchy=True),
    "SciPy L-BFGS-B": lbfgsb,
    "jaxopt L-BFGS-B": jaxopt_lbfgsb,
    "optax L-BFGS": optax_lbfgs,
}

METHODS = sorted({*QUADRATIC, *GENERAL})

if __name__ == "__main__":
    main()
