"""Quadratic graphs without a box: plain conjugate gradients, preconditioned by rows or a hierarchy.

Where the energy is quadratic the minimum along a line is known, so nothing has to be tried, and the
gradient follows by recurrence. The iterates are those of the general method. A recurrence forgets
what rounding does to x: where it says that the end is reached, the gradient is taken anew, and the
iteration begins again from there as long as that halves it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import as_float, is_concrete
from smallgain_jax._show import shows
from smallgain_jax.graphs.choice import MetricChoice, chosen
from smallgain_jax.graphs.families import GateBenefit, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau
from smallgain_jax.graphs.multilevel import Hierarchy
from smallgain_jax.spectral.conjugate import Conjugate
from smallgain_jax.spectral.conjugate import conjugate_gradients as krylov

ROUNDING = 4
"""A gradient of so many roundings of a row times its state is no longer told from 0."""


@shows()
class QuadraticResult(NamedTuple):
    """Outcome of `conjugate_gradients`."""

    x: jax.Array  # [n] or [n, d]
    steps: jax.Array  # [] int32
    gradient_norm: jax.Array  # [] max |g| at x
    converged: jax.Array  # [] bool


def is_quadratic(graph: EnergyGraph) -> bool:
    """Whether the families say that the energy is a convex quadratic: springs, linear rewards, and
    `Landau` without a quartic part or a negative coefficient. False where that is traced.

    >>> is_quadratic(EnergyGraph(Landau(a=[1.0, 1.0]), Quadratic([0], [1])))
    True
    """
    if not all(type(family) in (Quadratic, GateBenefit) for family in graph.edges):
        return False
    if not all(type(local) is Landau for local in graph.local) or not is_concrete(graph.local):
        return False
    return all(
        not np.any(np.asarray(local.b)) and bool(np.all(np.asarray(local.a) >= 0))  # type: ignore[attr-defined]
        for local in graph.local
    )


def conjugate_gradients(
    graph: EnergyGraph,
    x0: ArrayLike,
    metric: Hierarchy | MetricChoice | str | None = None,
    *,
    steps: int = 1000,
    tol: float | jax.Array = 1e-6,
) -> QuadraticResult:
    r"""Minimize a quadratic graph, without a box (Hestenes and Stiefel 1952).

    Args:
      graph: of which `is_quadratic` holds; not checked where it is traced.
      x0: start, [n] or [n, d].
      metric: a hierarchy, or what `choose_metric` took; "auto" to let it choose, None or "rows" for
        the rows.
      steps: at most so many products, static or not.
      tol: of max |g|, against its value at the start. Entries no larger than the rounding of a row
        times its state count as 0.

    Returns:
      A `QuadraticResult`.

    Raises:
      ValueError: a graph that is not quadratic.
      TypeError: another metric.

    >>> graph = EnergyGraph(Landau(a=[1.0, 1.0], target=1.0), Quadratic([0], [1], 0.5))
    >>> conjugate_gradients(graph, [1.0, 0.0]).x.round(4).tolist()
    [1.0, 1.0]
    """
    if is_concrete(graph) and not is_quadratic(graph):
        raise ValueError("graph must be quadratic: springs, linear rewards, Landau with b = 0")
    x0 = as_float("x0", x0)
    metric = chosen(metric, graph, x0)
    if isinstance(metric, str) and metric == "rows":
        metric = None
    if not isinstance(metric, Hierarchy | None):
        raise TypeError(f'metric = {metric!r} must be a hierarchy, "auto", "rows" or None')
    return _conjugate_gradients(graph, x0, metric, steps, tol)


class _Pass(NamedTuple):
    """Where a recurrence ended, and what the gradient is there."""

    x: jax.Array
    gradient: jax.Array
    steps: jax.Array  # [] int32, in all
    falls: jax.Array  # [] bool, the last pass halved it


@jax.jit
def _conjugate_gradients(
    graph: EnergyGraph,
    x0: jax.Array,
    metric: Hierarchy | None,
    steps: int | jax.Array,
    tol: float | jax.Array,
) -> QuadraticResult:
    rows = graph.curvature(x0).row_sums
    precondition: Callable[[jax.Array], jax.Array]
    if metric is None:
        product = jax.linearize(graph.gradient, x0)[1]
        inverse = jnp.where(rows > 0, 1 / jnp.where(rows > 0, rows, 1), 1)
        precondition = partial(jnp.multiply, inverse)
    else:
        # springs: what the hierarchy stands for is the Hessian
        cycle = metric.precondition(graph, x0, rows, jnp.ones(x0.shape, bool))
        product, precondition = cycle.product, cycle.__call__
    gradient = graph.gradient(x0)
    wanted = tol * _largest(gradient)

    def going(before: _Pass, c: Conjugate) -> jax.Array:
        least = jnp.maximum(wanted, jnp.finfo(x0.dtype).eps * _largest(before.gradient))
        return (_largest(c.residual) > least) & (c.norm > 0) & (before.steps + c.steps < steps)

    def curved(bend: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        # a linear reward on a node that nothing bends has no minimum: stay
        return bend, bend > 0

    def reached(at: _Pass) -> jax.Array:
        rounding = ROUNDING * jnp.finfo(x0.dtype).eps * rows * jnp.abs(at.x)
        return jnp.all(jnp.abs(at.gradient) <= jnp.maximum(wanted, rounding))

    def unfinished(at: _Pass) -> jax.Array:
        return at.falls & ~reached(at) & (at.steps < steps)

    def one(at: _Pass) -> _Pass:
        right, start = -at.gradient, at.x
        end = krylov(product, right, precondition, partial(going, at), curved, start=start)
        found = graph.gradient(end.solution)
        # steps lower the energy, not each gradient; a pass that follows another mends rounding only
        better = (at.steps == 0) | (_largest(found) < _largest(at.gradient))
        x, g = (jnp.where(better, *pair) for pair in ((end.solution, at.x), (found, at.gradient)))
        falls = _largest(found) < 0.5 * _largest(at.gradient)
        return _Pass(x, g, at.steps + end.steps, falls)

    begin = _Pass(x0, gradient, jnp.zeros((), jnp.int32), jnp.ones((), bool))
    at = jax.lax.while_loop(unfinished, one, begin)
    return QuadraticResult(at.x, at.steps, _largest(at.gradient), reached(at))


def _largest(gradient: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(gradient), initial=0.0)


__all__ = ["QuadraticResult", "conjugate_gradients", "is_quadratic"]
