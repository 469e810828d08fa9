"""Quadratic graphs without a box: plain conjugate gradients, preconditioned by rows or a hierarchy.

Where the energy is quadratic the minimum along a line is known, so nothing has to be tried, and the
gradient follows by recurrence. The iterates are those of the general method.
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
from smallgain_jax.graphs.families import GateBenefit, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau
from smallgain_jax.graphs.multilevel import Hierarchy
from smallgain_jax.spectral.conjugate import Conjugate
from smallgain_jax.spectral.conjugate import conjugate_gradients as krylov


@shows()
class QuadraticResult(NamedTuple):
    """Outcome of `conjugate_gradients`."""

    x: jax.Array  # [n] or [n, d]
    steps: jax.Array  # [] int32
    gradient_norm: jax.Array  # [] max |g| at x, by recurrence
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
    metric: Hierarchy | None = None,
    *,
    steps: int = 1000,
    tol: float | jax.Array = 1e-6,
) -> QuadraticResult:
    r"""Minimize a quadratic graph, without a box (Hestenes and Stiefel 1952).

    Args:
      graph: of which `is_quadratic` holds; not checked where it is traced.
      x0: start, [n] or [n, d].
      metric: a hierarchy; None for the rows.
      steps: at most so many products, static or not.
      tol: of max |g|, against its value at the start.

    Returns:
      A `QuadraticResult`.

    Raises:
      ValueError: a graph that is not quadratic.

    >>> graph = EnergyGraph(Landau(a=[1.0, 1.0], target=1.0), Quadratic([0], [1], 0.5))
    >>> conjugate_gradients(graph, [1.0, 0.0]).x.round(4).tolist()
    [1.0, 1.0]
    """
    if is_concrete(graph) and not is_quadratic(graph):
        raise ValueError("graph must be quadratic: springs, linear rewards, Landau with b = 0")
    x0 = as_float("x0", x0)
    return _conjugate_gradients(graph, x0, metric, steps, tol)


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
    wanted = tol * jnp.max(jnp.abs(gradient), initial=0.0)

    def going(c: Conjugate) -> jax.Array:
        left = jnp.max(jnp.abs(c.residual), initial=0.0)
        return (left > wanted) & (c.norm > 0) & (c.steps < steps)

    def curved(bend: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        # a linear reward on a node that nothing bends has no minimum: stay
        return bend, bend > 0

    end = krylov(product, -gradient, precondition, going, curved, start=x0)
    left = jnp.max(jnp.abs(end.residual), initial=0.0)
    return QuadraticResult(end.solution, end.steps, left, left <= wanted)


__all__ = ["QuadraticResult", "conjugate_gradients", "is_quadratic"]
