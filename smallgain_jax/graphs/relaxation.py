"""Relaxation of an energy graph or a function over a box, and the minimizer's derivative."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import as_float, check_finite, check_optimizer, is_concrete
from smallgain_jax._tree import still
from smallgain_jax.graphs import iteration
from smallgain_jax.graphs.adjoint import Solution, minimizer, minimum
from smallgain_jax.graphs.choice import MetricChoice, choose_metric
from smallgain_jax.graphs.descent import Metric, majorized_descent
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.newton import truncated_newton
from smallgain_jax.graphs.objective import Function, function
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import RelaxStatus, default_tolerance

ADJOINTS = ("implicit", "unrolled")

UNIT = (0.0, 1.0)
"""The default box of a graph."""


class RelaxInfo(NamedTuple):
    """What happened during a relaxation."""

    steps: jax.Array  # [] int32, updates made
    converged: jax.Array  # [] bool, the tolerance was met
    status: jax.Array  # [] int32, why it ended: a `RelaxStatus`
    optimality: jax.Array  # [] max |clip(-g/D, l - x, u - x)| at the end, relative to the box
    history: Any  # what `record` took from the optimizer's state, each leaf [steps, ...]


class RelaxResult(NamedTuple):
    """Outcome of `relax`."""

    x: jax.Array  # [n] or [n, d], the last accepted state
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
    r"""Minimize a graph's reference energy over a box.

    Steps $x \leftarrow P(x + u)$, u the optimizer's update for the gradient on the free nodes
    (those not held at a bound), until the tolerance is met, the optimizer says that it is stalled,
    or the steps are used up; after that nothing is computed. Jittable; `vmap` relaxes a batch,
    which goes on until its last member has ended. Line searches inside an optimizer see the energy
    of the projected state.

    **Optimality** is the largest step that the rows D of the Hessian still favour,
    $\max_r |\mathrm{clip}(-g_r / D_r,\; l_r - x_r,\; u_r - x_r)|$, relative to the width of the
    box, or without one to the largest entry of the start or of the first such step. It is a number
    without unit, and does not change when the energy is multiplied by one. On badly conditioned
    graphs the distance to the minimizer may be larger by up to the condition number.

    **Derivatives.** With `adjoint="implicit"`, `x` has the derivative of the minimizer by every
    float of the graph and the bounds, whichever optimizer found it: one linear solve with the
    Hessian on the free nodes, forwards or in reverse, at the memory of one gradient; the last
    energy has that of the minimum. Start, `info`, `state` and earlier energies have none. This is
    right where `info.converged` holds, and only there; where the minimizer has no derivative the
    result is NaN (`graphs.adjoint` states the rules). With `adjoint="unrolled"`, everything is
    differentiated through the steps that were made, start included: for runs that are meant to
    stop early. It has no early exit, its memory grows with the square root of the steps, and
    optimizers with loops of their own, such as optax's line searches, are differentiated only
    forwards.

    Args:
      graph: the energy.
      x0: start [n] or [n, d], taken in the dtype of its energy; projected onto the box first.
      optimizer: any optax transformation; None is `majorized_descent`, the library's best.
      steps: most updates to make. Programs are shared between up to twice as many, unless
        something is recorded.
      bounds: (lower, upper), scalars or shaped like x0; None for no box.
      tol: the optimality to reach; None is eps^(2/3) of the dtype (4e-11 in double precision, 2e-5
        in single), 0 goes on until stalled. Entries of `energy` after the end repeat the last.
      adjoint: "implicit" or "unrolled".
      metric: what conditions the gradient, in the steps of the default optimizer and in the
        implicit adjoint: "rows"; an object with a method
        `precondition(graph, x, rows, free) -> (g -> z)`, as `multilevel(graph)`; or "auto", which
        asks `choose_metric` (on the host, at every call: keep its answer for many).
      record: `record(optimizer_state) -> pytree`, taken after every update into `info.history`.
      state: optimizer state to continue from, as in `RelaxResult.state`. What it stored of another
        graph, or of other parameters, is forgotten.

    Returns:
      `RelaxResult(x, energy [steps + 1], info, state)`.

    Raises:
      TypeError: arguments in another order, or an optimizer's factory in place of an optimizer.
      ValueError: x0 does not fit the graph or is not finite (concrete), lower > upper, or an
        unknown `adjoint` or `metric`.

    >>> from smallgain_jax import Landau, Quadratic
    >>> graph = EnergyGraph(Landau(a=jnp.array([1.0, 1.0])), [Quadratic([0], [1], 0.5)])
    >>> result = relax(graph, jnp.array([1.0, 0.5]))
    >>> result.x.round(4).tolist(), RelaxStatus(int(result.info.status)).name
    ([0.0, 0.0], 'CONVERGED')
    """
    metric = _chosen(metric, objective, x0)
    _check(objective, optimizer, steps, tol, adjoint, metric)
    objective, x0, box = _posed(objective, x0, bounds, args, rows)
    metric = None if isinstance(metric, str) else metric
    problem = _Problem(objective, x0, optimizer, box, metric, record, state)
    data, rest = eqx.partition(problem, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    leaves, structure = jax.tree.flatten(rest)
    # history has a static size: of a power of two, so that other steps need no other program
    shared = record is None and adjoint == "implicit"
    capacity = max(64, 1 << (steps - 1).bit_length()) if shared else steps
    limit = np.int32(steps)
    # not `filter_jit`, which waits for the device: the host has telemetry to write meanwhile
    result = _compiled(data, tol, limit, tuple(leaves), structure, capacity, adjoint)
    return result if capacity == steps else result._replace(energy=result.energy[: steps + 1])


class _Problem(NamedTuple):
    objective: EnergyGraph | Function
    x0: jax.Array
    optimizer: optax.GradientTransformation | None
    box: Box | None
    metric: Metric | None
    record: Any
    state: Any


def _posed(
    objective: Any, x0: Any, bounds: Any, args: Any, rows: Any
) -> tuple[EnergyGraph | Function, jax.Array, Box | None]:
    """What is minimized over one array, where from, and over which box."""
    if not isinstance(objective, EnergyGraph):
        posed, x0 = function(objective, x0, args, rows)
        return posed, x0, None if bounds == "default" else _spread_box(bounds, posed)
    if args or rows is not None:
        raise TypeError("args and rows go with a function: a graph holds all that it depends on")
    x0, nodes = as_float("x0", x0), objective.num_nodes
    if x0.ndim not in (1, 2) or x0.shape[0] != nodes:
        raise ValueError(f"x0 has shape {x0.shape}, expected [{nodes}] or [{nodes}, d]")
    check_finite("x0", x0)
    return objective, x0, _box(UNIT if bounds == "default" else bounds, x0.shape)


def _spread_box(bounds: Any, posed: Function) -> Box | None:
    """The box of a function, each end one array like x0's."""
    if bounds is not None:
        _check_pair(bounds)
        names = ("bounds: lower", "bounds: upper")
        bounds = [posed.layout.spread(*end) for end in zip(names, bounds, strict=True)]
    return _box(bounds, (posed.layout.size,))


def _chosen(metric: Any, graph: Any, x0: Any) -> Any:
    """The metric that "auto" or a `MetricChoice` stands for."""
    if isinstance(metric, str) and metric == "auto" and isinstance(graph, EnergyGraph):
        metric = choose_metric(graph, x0)
    if isinstance(metric, MetricChoice):
        metric = metric.hierarchy
    return "rows" if metric is None else metric


def _check(
    objective: Any, optimizer: Any, steps: int, tol: Any, adjoint: str, metric: str | Metric
) -> None:
    if not isinstance(objective, EnergyGraph) and not callable(objective):
        raise TypeError(
            "objective must be an EnergyGraph or a function, got "
            f"{type(objective).__name__}: relax(objective, x0, ...)"
        )
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
    if tol is not None and is_concrete(tol) and np.isnan(np.asarray(tol, float)).any():
        raise ValueError(f"tol = {tol} must be a number: 0 goes on until nothing descends")
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


def _check_pair(bounds: Any) -> None:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError("bounds must be a pair (lower, upper) or None")
    if isinstance(bounds, list) and all(isinstance(end, tuple) for end in bounds):
        raise TypeError(
            "bounds is a list of pairs, one a node: give the pair (lower, upper), each a number "
            "or shaped like x0"
        )


def _box(bounds: Any, shape: tuple[int, ...]) -> Box | None:
    if bounds is None:
        return None
    _check_pair(bounds)
    for name, end in zip(("lower", "upper"), bounds, strict=True):
        if jnp.shape(end) not in ((), shape):
            raise ValueError(f"bounds: {name} has shape {jnp.shape(end)}, expected () or {shape}")
        # on the host: inside jit, an operation on known arrays gives an unknown one
        if is_concrete(end) and np.isnan(np.asarray(end, float)).any():
            raise ValueError(f"bounds: {name} must not be NaN")
    lower, upper = bounds
    if is_concrete((lower, upper)) and not np.all(np.asarray(lower) <= np.asarray(upper)):
        raise ValueError("bounds: lower must not exceed upper")
    return Box(jnp.asarray(lower), jnp.asarray(upper))


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _compiled(
    data: Any,
    tol: float | jax.Array | None,
    limit: jax.Array,
    leaves: tuple[Any, ...],
    structure: Any,
    capacity: int,
    adjoint: str,
) -> RelaxResult:
    problem = _Problem(*eqx.combine(data, jax.tree.unflatten(structure, leaves)))
    problem = _settled(problem)
    box, dtype = problem.box, problem.x0.dtype
    tol = jax.lax.stop_gradient(
        jnp.asarray(default_tolerance(dtype) if tol is None else tol, dtype)
    )
    if adjoint == "unrolled":
        run = _run(problem, tol, adjoint)
        first = iteration.start(run, problem.x0, problem.state)
        path = iteration.unrolled(run, first, capacity)
        return _result(problem, path, path.end.x, path.energies)
    # none by anything that it closes over, an optimizer's closures included
    path = still(eqx.filter_closure_convert(lambda: _looped(problem, tol, limit, capacity)))()
    end = path.end
    walls = Box(jnp.asarray(-jnp.inf, dtype), jnp.asarray(jnp.inf, dtype)) if box is None else box
    solution = Solution(end.x, tol * end.scale, problem.objective, walls, problem.metric)
    value = minimum(end.here.value, solution)
    energies = jnp.where(jnp.arange(capacity + 1) >= end.steps, value, path.energies)
    return _result(problem, path, minimizer(solution), energies)


def _settled(problem: _Problem) -> _Problem:
    """The problem in the dtype of its value, all that it depends on among its leaves.

    Inside the program: tracing an objective at every call would cost more than many a relaxation.
    """
    objective, x0, box = problem.objective, problem.x0, problem.box
    dtype = jax.eval_shape(objective.energy, x0).dtype
    x0 = x0.astype(dtype)
    if isinstance(objective, Function):
        objective = objective.closed(x0)
    sound = jnp.ones((), bool)
    if box is not None:
        box = Box(*(end.astype(dtype) for end in box))
        sound &= jnp.all(box.lower <= box.upper)
    if isinstance(objective, EnergyGraph):
        for family in objective.edges:
            sound &= jnp.all(family.weight >= 0)
    # what would have been an error had it been known before
    x0 = jnp.where(sound, x0, jnp.nan)
    return problem._replace(objective=objective, x0=x0, box=box)


def _default(problem: _Problem, adjoint: str) -> optax.GradientTransformation:
    """The best that the library has for it; Newton's inner loop has no reverse mode."""
    if isinstance(problem.objective, Function) and adjoint == "implicit":
        return truncated_newton(problem.objective)
    return majorized_descent(problem.objective, metric=problem.metric)


def _run(problem: _Problem, tol: jax.Array, adjoint: str = "implicit") -> iteration.Run:
    optimizer = problem.optimizer
    if optimizer is None:
        optimizer = _default(problem, adjoint)
    record = problem.record or (lambda _: None)
    optimizer = optax.with_extra_args_support(optimizer)
    return iteration.Run(problem.objective, optimizer, problem.box, tol, record)


def _looped(problem: _Problem, tol: jax.Array, limit: jax.Array, capacity: int) -> iteration.Path:
    run = _run(problem, tol)
    first = iteration.start(run, problem.x0, problem.state)
    return iteration.loop(run, first, limit, capacity)


def _result(
    problem: _Problem, path: iteration.Path, x: jax.Array, energies: jax.Array
) -> RelaxResult:
    end, objective = path.end, problem.objective
    if isinstance(objective, Function):
        x = objective.layout.unravel(x)
    converged = end.status == RelaxStatus.CONVERGED
    info = RelaxInfo(end.steps, converged, end.status, end.optimality, path.history)
    return RelaxResult(x, energies, info, end.state)
