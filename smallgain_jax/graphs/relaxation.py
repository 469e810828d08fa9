"""Relaxation of an energy graph or a function over a box, and the minimizer's derivative."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from smallgain_jax._canonical import canonical
from smallgain_jax._checks import check_optimizer, check_scalar, is_concrete
from smallgain_jax._compiling import quick_jit
from smallgain_jax._show import shows
from smallgain_jax._tree import still
from smallgain_jax.graphs import iteration
from smallgain_jax.graphs.adjoint import AdjointReport, Solution, minimizer, minimum, reported
from smallgain_jax.graphs.choice import chosen
from smallgain_jax.graphs.descent import Metric
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.objective import Function
from smallgain_jax.graphs.problem import Problem, posed, run_of, settled, tolerance, walls_of
from smallgain_jax.search.stopping import RelaxStatus, length_scale, projected_step

ADJOINTS = ("implicit", "unrolled")


def _status(code: Any) -> str:
    return RelaxStatus(int(code)).name


@shows(words={"status": _status})
class RelaxInfo(NamedTuple):
    """What happened during a relaxation."""

    steps: jax.Array  # [] int32, updates made
    converged: jax.Array  # [] bool, the tolerance was met
    status: jax.Array  # [] int32, why it ended: a `RelaxStatus`
    optimality: jax.Array  # [] max |clip(-g/D, l - x, u - x)| at the end, relative to the box
    history: Any  # what `record` took from the optimizer's state, each leaf [steps, ...]


@shows(curve="energy")
class RelaxResult(NamedTuple):
    """Outcome of `relax`."""

    x: Any  # like x0, the last accepted state
    energy: jax.Array  # [steps + 1] reference energy of each accepted state, start included
    info: RelaxInfo
    state: Any  # the optimizer's state, to continue from


def relax(
    objective: EnergyGraph | Callable[..., jax.Array],
    x0: Any,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    bounds: tuple[Any, Any] | str | None = "default",
    *,
    args: tuple[Any, ...] = (),
    rows: Any = None,
    tol: float | jax.Array | None = None,
    adjoint: str = "implicit",
    metric: str | Metric = "rows",
    record: Any = None,
    state: Any = None,
) -> RelaxResult:
    r"""Minimize a graph's reference energy, or any function of a pytree, over a box.

    `relax(graph, x0)` or `relax(fn, x0, args=...)`. Steps $x \leftarrow P(x + u)$, u the
    optimizer's update for the gradient on the free coordinates (those not held at a bound), until
    the tolerance is met, the optimizer says that it is stalled, or the steps are used up; after
    that nothing is computed. Jittable; `vmap` relaxes a batch, which goes on until its last member
    has ended; inside `shard_map` give `check_vma=False`. Line searches inside an optimizer see the
    energy of the projected state.

    **Optimality** is the largest step that the rows D of the Hessian still favour, $\max_r
    |\mathrm{clip}(-g_r / D_r,\; l_r - x_r,\; u_r - x_r)|$, relative to the width of the box, or
    without one to the largest entry of the start or of the first such step. It is a number without
    unit, and does not change when the energy is multiplied by one. On badly conditioned problems
    the distance to the minimizer may be larger by up to the condition number; so a function's own
    method also waits until its value falls by no more than `tol` of itself.

    **Functions** are minimized by projected, truncated Newton steps (`graphs.newton`): they must be
    differentiable twice, in reverse and then forwards. D is what the caller gives as `rows`, the
    absolute row sums of the Hessian up to 64 unknowns, and beyond that a stochastic estimate, which
    certifies nothing: it only conditions steps and scales optimality. The line search sees to it
    that accepted values do not rise.

    **Derivatives.** With `adjoint="implicit"`, `x` has the derivative of the minimizer by every
    float of the graph (of `args`, and of what a function closes over) and the bounds, whichever
    optimizer found it: one linear solve with the Hessian on the free nodes, forwards or in reverse,
    at the memory of one gradient; the last energy has that of the minimum. Start, `info`, `state`
    and earlier energies have none. This is right where `info.converged` holds, and only there;
    where the minimizer has no derivative the result is NaN (`graphs.adjoint` states the rules,
    `adjoint_report` says how the solve goes). With `adjoint="unrolled"`, everything is
    differentiated through the steps that were made, start included: for runs that are meant to stop
    early. It has no early exit, its memory grows with the square root of the steps, and optimizers
    with loops of their own, such as optax's line searches, are differentiated only forwards.

    Args:
      objective: an `EnergyGraph`, or a function `fn(x, *args)` with a real scalar value.
      x0: start [n] or [n, d] of a graph, any pytree of arrays for a function; taken in the dtype of
        its value, and projected onto the box first.
      optimizer: any optax transformation (it sees a function's x as one vector); None is the
        library's best, `majorized_descent` for graphs and Newton steps for functions.
      steps: most updates to make. Programs are shared between up to twice as many, unless
        something is recorded.
      bounds: (lower, upper), each a scalar or like x0 (for a pytree, leaves may be scalars); None
        for no box. The default is (0, 1) for a graph and no box for a function.
      args: further arguments of a function.
      rows: D of a function where it is known: a tree like x0 (leaves may be scalars), non-negative,
        or a function `rows(x, *args)` that gives one. It need not bound anything.
      tol: the optimality to reach; None is eps^(2/3) of the dtype (4e-11 in double precision, 2e-5
        in single), and less on graphs that are known to be so soft against their rows that this
        would prove nothing (`graphs.conditioning`); 0 goes on until stalled. Entries of `energy`
        after the end repeat the last.
      adjoint: "implicit" or "unrolled".
      metric: what conditions the gradient of a graph, in the steps of the default optimizer and in
        the implicit adjoint: "rows"; an object with a method
        `precondition(graph, x, rows, free) -> (g -> z)`, as `multilevel(graph)`, with which a step
        goes to the minimum of a quadratic model over the box (`graphs.contact`); or "auto", which
        asks `choose_metric` (on the host, at every call: keep its answer for many).
      record: `record(optimizer_state) -> pytree`, taken after every update into `info.history`.
      state: optimizer state to continue from, as in `RelaxResult.state`. What it stored of another
        graph, or of other parameters, is forgotten.

    Returns:
      `RelaxResult(x, energy [steps + 1], info, state)`, x like x0. A value or gradient that is not
      finite at an iterate ends the run, `info.status` says so; so do traced bounds that cross, and
      traced weights below zero, with NaN in `energy`.

    Raises:
      TypeError: arguments in another order, an optimizer's factory in place of an optimizer, x0
        with leaves that are no arrays, or a function whose value is none.
      ValueError: x0 does not fit the graph or is not finite (concrete), lower > upper, bounds or
        rows of another tree, or an unknown `adjoint` or `metric`.

    Warns where targets of a graph lie outside the default box.

    >>> from smallgain_jax import Landau, Quadratic
    >>> graph = EnergyGraph(Landau(a=jnp.array([1.0, 1.0])), [Quadratic([0], [1], 0.5)])
    >>> result = relax(graph, jnp.array([1.0, 0.5]))
    >>> result.x.round(4).tolist(), RelaxStatus(int(result.info.status)).name
    ([0.0, 0.0], 'CONVERGED')
    >>> valley = lambda x, a: (1 - x["u"]) ** 2 + a * (x["v"] - x["u"] ** 2) ** 2
    >>> found = relax(valley, {"u": -1.2, "v": 1.0}, args=(100.0,), bounds=(-2.0, 0.5))
    >>> {name: round(float(leaf), 4) for name, leaf in found.x.items()}
    {'u': 0.5, 'v': 0.25}
    """
    metric = chosen(metric, objective, x0)
    _check(objective, optimizer, steps, tol, adjoint, metric)
    steps = int(steps)
    better = None if isinstance(metric, str) else metric
    optimizer = canonical(optimizer)
    problem = Problem(*posed(objective, x0, bounds, args, rows), optimizer, better, record, state)
    data, rest = eqx.partition(problem, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    leaves, structure = jax.tree.flatten(rest)
    # history has a static size: of a power of two, so that other steps need no other program
    shared = record is None and adjoint == "implicit"
    capacity = max(64, 1 << (steps - 1).bit_length()) if shared else steps
    limit = np.int32(steps)
    # not `filter_jit`, which waits for the device: the host has telemetry to write meanwhile
    # what a function computes does not show in its arguments
    run = _small_quickly if isinstance(objective, EnergyGraph) else _well
    result = run(data, tol, limit, tuple(leaves), structure, capacity, adjoint)
    return result if capacity == steps else result._replace(energy=result.energy[: steps + 1])


def _check(
    objective: Any, optimizer: Any, steps: int, tol: Any, adjoint: str, metric: str | Metric
) -> None:
    if optimizer is not None:
        check_optimizer("optimizer", optimizer)
    if not isinstance(optimizer, optax.GradientTransformation | None):
        raise TypeError(
            f"optimizer is {type(optimizer).__name__}, no transformation: "
            "call its gradient_transformation(), as of optax.MultiSteps"
        )
    if not isinstance(steps, int | np.integer):
        raise TypeError(f"steps = {steps!r} must be an int: it bounds the length of the history")
    if steps < 0:
        raise ValueError(f"steps = {steps} must not be negative")
    if tol is not None:
        check_scalar("tol", tol)
        if is_concrete(tol) and not np.asarray(tol) >= 0:
            raise ValueError(
                f"tol = {tol} must be at least 0, which goes on until nothing descends"
            )
    if adjoint not in ADJOINTS:
        raise ValueError(f"adjoint = {adjoint!r} is unknown: choose from {', '.join(ADJOINTS)}")
    known = metric == "rows" if isinstance(metric, str) else hasattr(metric, "precondition")
    if not known:
        raise ValueError(
            f"metric = {metric!r} is unknown: 'rows', 'auto', or an object with a method "
            "precondition, as sg.multilevel(graph)"
        )
    if not isinstance(metric, str) and not isinstance(objective, EnergyGraph):
        raise ValueError("metric is for graphs: what conditions a function is given as rows")


def _relaxed(
    data: Any,
    tol: float | jax.Array | None,
    limit: jax.Array,
    leaves: tuple[Any, ...],
    structure: Any,
    capacity: int,
    adjoint: str,
) -> RelaxResult:
    problem = Problem(*eqx.combine(data, jax.tree.unflatten(structure, leaves)))
    problem = settled(problem)
    tol = tolerance(problem, tol)
    if adjoint == "unrolled":
        run = run_of(problem, tol, adjoint)
        first = iteration.start(run, problem.x0, problem.state)
        path = iteration.unrolled(run, first, capacity)
        return _result(problem, path, path.end.x, path.energies)
    # no derivative by anything that it closes over, an optimizer's closures included
    path = still(eqx.filter_closure_convert(partial(_looped, problem, tol, limit, capacity)))()
    end = path.end
    solution = Solution(
        end.x, tol * end.scale, problem.objective, walls_of(problem), problem.metric
    )
    value = minimum(end.here.value, solution)
    energies = jnp.where(jnp.arange(capacity + 1) >= end.steps, value, path.energies)
    return _result(problem, path, minimizer(solution), energies)


_well = jax.jit(_relaxed, static_argnums=(3, 4, 5, 6))
_small_quickly = quick_jit(_relaxed, static_argnums=(3, 4, 5, 6))


def _looped(problem: Problem, tol: jax.Array, limit: jax.Array, capacity: int) -> iteration.Path:
    run = run_of(problem, tol)
    first = iteration.start(run, problem.x0, problem.state)
    return iteration.loop(run, first, limit, capacity)


def _result(
    problem: Problem, path: iteration.Path, x: jax.Array, energies: jax.Array
) -> RelaxResult:
    end, objective = path.end, problem.objective
    if isinstance(objective, Function):
        x = objective.layout.unravel(x)
    converged = end.status == RelaxStatus.CONVERGED
    info = RelaxInfo(end.steps, converged, end.status, end.optimality, path.history)
    return RelaxResult(x, energies, info, end.state)


def adjoint_report(
    objective: EnergyGraph | Callable[..., jax.Array],
    x: Any,
    cotangent: Any = None,
    bounds: tuple[Any, Any] | str | None = "default",
    *,
    args: tuple[Any, ...] = (),
    rows: Any = None,
    metric: str | Metric = "rows",
    tol: float | jax.Array | None = None,
) -> AdjointReport:
    r"""Whether the minimizer x has a derivative, and what its linear solve costs.

    A derivative carries no report: where its solve fails it is NaN, and that is all that `grad` can
    say. This makes the same solve, $H_{AA} u = c_A$ on the free coordinates A, and reports it.

    Args:
      objective, bounds, args, rows, metric, tol: as they were given to `relax`.
      x: the minimizer that `relax` found.
      cotangent: c, like x: the gradient of the outer loss by x. None is a vector of normal random
        numbers, which meets every direction.

    Returns:
      An `AdjointReport`. `sound` False means NaN: the free Hessian is singular or indefinite, or so
      badly conditioned that `iterations` did not suffice for a `residual` of sqrt(eps).

    Raises:
      TypeError, ValueError: as `relax` does.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau([1.0, 1.0], target=[-1.0, 0.5]), sg.Quadratic([0], [1]))
    >>> box = (0.0, 1.0)
    >>> report = adjoint_report(graph, relax(graph, jnp.ones(2), bounds=box).x, bounds=box)
    >>> bool(report.sound), int(report.free), int(report.iterations)
    (True, 1, 1)
    """
    metric = chosen(metric, objective, x)
    _check(objective, None, 0, tol, "implicit", metric)
    whole, flat, box = posed(objective, x, bounds, args, rows)
    if cotangent is None:
        cotangent = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    elif isinstance(whole, Function):
        cotangent = whole.layout.spread("cotangent", cotangent)
    better = None if isinstance(metric, str) else metric
    return _reported(Problem(whole, flat, box, None, better, None, None), cotangent, tol)


@eqx.filter_jit
def _reported(problem: Problem, cotangent: Any, tol: Any) -> AdjointReport:
    problem = still(settled(problem))
    x, objective, walls = problem.x0, problem.objective, walls_of(problem)
    tol = tolerance(problem, tol)
    step = projected_step(x, objective.gradient(x), objective.rows(x), walls)
    slack = tol * length_scale(x, step, walls)
    solution = Solution(x, slack, objective, walls, problem.metric)
    return reported(solution, jnp.asarray(cotangent, x.dtype))
