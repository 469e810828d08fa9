"""What is asked of a relaxation: objective, start and box, checked and made one array."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smallgain_jax._checks import as_float, check_finite, is_concrete
from smallgain_jax._tree import gathered, still
from smallgain_jax.graphs import iteration
from smallgain_jax.graphs.conditioning import graph_tolerance
from smallgain_jax.graphs.descent import Linear, Metric, Modelled, majorized_descent
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau
from smallgain_jax.graphs.newton import truncated_newton
from smallgain_jax.graphs.objective import Function, function
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import default_tolerance

UNIT = (0.0, 1.0)
"""The default box of a graph."""


class Problem(NamedTuple):
    """Data of a relaxation."""

    objective: EnergyGraph | Function
    x0: jax.Array
    box: Box | None
    optimizer: optax.GradientTransformation | None
    metric: Metric | None
    record: Any
    state: Any


def posed(
    objective: Any, x0: Any, bounds: Any, args: Any, rows: Any
) -> tuple[EnergyGraph | Function, jax.Array, Box | None]:
    """What is minimized over one array, where from, and over which box."""
    if not isinstance(objective, EnergyGraph) and not callable(objective):
        raise TypeError(
            "objective must be an EnergyGraph or a function, got "
            f"{type(objective).__name__}: relax(objective, x0, ...)"
        )
    default = isinstance(bounds, str) and bounds == "default"
    if not isinstance(objective, EnergyGraph):
        whole, x0 = function(objective, x0, args, rows)
        return whole, x0, None if default else _spread_box(bounds, whole)
    if args or rows is not None:
        raise TypeError("args and rows go with a function: a graph holds all that it depends on")
    x0, nodes = gathered(as_float("x0", x0)), objective.num_nodes
    if x0.ndim not in (1, 2) or x0.shape[0] != nodes:
        raise ValueError(f"x0 has shape {x0.shape}, expected [{nodes}] or [{nodes}, d]")
    check_finite("x0", x0)
    if default:
        _warn_of_targets(objective)
    return objective, x0, _box(UNIT if default else bounds, x0.shape)


def _warn_of_targets(graph: EnergyGraph) -> None:
    """Warn where nodes want values that the box which nobody asked for keeps them from."""
    for energy in graph.local:
        target = getattr(energy, "target", None)
        if not isinstance(energy, Landau) or not is_concrete(target):
            continue
        host = np.asarray(target)
        outside = (host < UNIT[0]) | (host > UNIT[1])
        if outside.any():
            warnings.warn(
                f"target: {outside.sum()} of {host.size} lie outside the box [0, 1], such as "
                f"{host[outside][0]:g}: the box is the default one, give bounds=(lower, upper), or "
                "None for no box",
                stacklevel=4,
            )


def _spread_box(bounds: Any, whole: Function) -> Box | None:
    """The box of a function, each end one array like x0's."""
    if bounds is not None:
        _check_pair(bounds)
        names = ("bounds: lower", "bounds: upper")
        bounds = [whole.layout.spread(*end) for end in zip(names, bounds, strict=True)]
    return _box(bounds, (whole.layout.size,))


def _check_pair(bounds: Any) -> None:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError("bounds must be a pair (lower, upper) or None")
    for name, end in zip(("lower", "upper"), bounds, strict=True):
        if end is None:
            raise TypeError(f"bounds: {name} is None: infinity stands for no bound")
    if isinstance(bounds, list) and all(isinstance(end, tuple) for end in bounds):
        raise TypeError(
            "bounds is a list of pairs, one a node: give the pair (lower, upper), each a number "
            "or shaped like x0"
        )


def _box(bounds: Any, shape: tuple[int, ...]) -> Box | None:
    if bounds is None:
        return None
    _check_pair(bounds)
    bounds = [_end(name, end) for name, end in zip(("lower", "upper"), bounds, strict=True)]
    for name, end in zip(("lower", "upper"), bounds, strict=True):
        if jnp.shape(end) not in ((), shape):
            raise ValueError(f"bounds: {name} has shape {jnp.shape(end)}, expected () or {shape}")
        # on the host: inside jit, an operation on known arrays gives an unknown one
        if is_concrete(end) and np.isnan(np.asarray(end, float)).any():
            raise ValueError(f"bounds: {name} must not be NaN")
    lower, upper = bounds
    if is_concrete((lower, upper)):
        low, high = np.asarray(lower), np.asarray(upper)
        if not np.all(low <= high):
            raise ValueError("bounds: lower must not exceed upper")
        if np.any(low == np.inf) or np.any(high == -np.inf):
            raise ValueError("bounds: lower must be below infinity, and upper above -infinity")
    return Box(jnp.asarray(lower), jnp.asarray(upper))


def _end(name: str, end: Any) -> Any:
    """One end of a box as an array, on the host where it is known."""
    if isinstance(end, jax.Array):
        return end
    try:
        return np.asarray(end, float)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"bounds: {name} must be a number or shaped like x0, got {type(end).__name__}; "
            "infinity stands for no bound"
        ) from error


def settled(problem: Problem) -> Problem:
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
            sound &= ~jnp.any(family.weight < 0) & jnp.all(family.i != family.j)
            for ends in (family.i, family.j):
                sound &= jnp.all((ends >= 0) & (ends < objective.num_nodes))
    # what would have been an error had it been known before
    x0 = jnp.where(sound, x0, jnp.nan)
    return problem._replace(objective=objective, x0=x0, box=box)


def tolerance(problem: Problem, tol: Any) -> jax.Array:
    """The optimality to reach of a settled problem, where `tol` is None what fits it."""
    x = jax.lax.stop_gradient(walls_of(problem).project(problem.x0))
    if tol is not None:
        return jax.lax.stop_gradient(jnp.asarray(tol, x.dtype))
    if isinstance(problem.objective, EnergyGraph):
        return graph_tolerance(still(problem.objective), x)
    return jnp.asarray(default_tolerance(x.dtype), x.dtype)


def walls_of(problem: Problem) -> Box:
    """The box, infinite where there is none."""
    if problem.box is not None:
        return problem.box
    far = jnp.asarray(jnp.inf, problem.x0.dtype)
    return Box(-far, far)


def _default(problem: Problem, adjoint: str) -> optax.GradientTransformation:
    """The best that the library has for it; inner loops have no reverse mode."""
    if isinstance(problem.objective, Function) and adjoint == "implicit":
        return truncated_newton(problem.objective)
    metric = problem.metric
    if isinstance(metric, Modelled) and adjoint == "unrolled":
        metric = Linear(metric)
    return majorized_descent(problem.objective, metric=metric)


def run_of(problem: Problem, tol: jax.Array, adjoint: str = "implicit") -> iteration.Run:
    optimizer = problem.optimizer
    if optimizer is None:
        optimizer = _default(problem, adjoint)
    record = problem.record or (lambda _: None)
    optimizer = optax.with_extra_args_support(optimizer)
    return iteration.Run(problem.objective, optimizer, problem.box, tol, record)
