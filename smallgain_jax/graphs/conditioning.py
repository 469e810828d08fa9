r"""How soft a graph is against its rows, by what can be read off without a solve.

In the metric of the rows D the error of a state is up to $1/\mu$ times the step $D^{-1} g$ that
the rows favour, with $\mu$ the smallest eigenvalue of $D^{-1/2} H D^{-1/2}$. Any vector v bounds it
from above, $\mu \le v^\top H v / v^\top D v$. Two kinds of vector show what makes real graphs soft:
all ones, which only the local energies resist, and the two ends of one edge moved together, which
that edge does not resist. A small quotient proves that a small step proves little; a large one
proves nothing.
"""

import jax
import jax.numpy as jnp

from smallgain_jax.graphs.descent import SMOOTHING
from smallgain_jax.graphs.families import AsymmetricHinge, DirectedHinge, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.search.stopping import default_tolerance

TRUST = 1e-2
"""Part of the box by which a state may be off along a direction that is known to be soft."""


def graph_tolerance(graph: EnergyGraph, x: jax.Array, usual: float | None = None) -> jax.Array:
    """The usual tolerance, or less where the graph is known to be soft at x, a scalar."""
    usual = default_tolerance(x.dtype) if usual is None else usual
    return jnp.minimum(jnp.asarray(usual, x.dtype), (TRUST * softness(graph, x)).astype(x.dtype))


def softness(graph: EnergyGraph, x: jax.Array) -> jax.Array:
    r"""An upper bound on $\mu$ at x, a scalar; 1 where the vectors tried tell nothing.

    >>> from smallgain_jax.graphs.local import Landau
    >>> stiff = EnergyGraph(Landau([1.0, 1.0]), [Quadratic([0], [1], 1e6)])
    >>> f"{float(softness(stiff, jnp.full(2, 0.5))):.1e}"
    '5.0e-07'
    """
    priced = graph.curvature(x, smoothing=SMOOTHING)
    together = _quotient(jnp.sum(priced.local_rows), jnp.sum(priced.row_sums))
    if not graph.num_edges:
        return together
    both = _over_ends(graph, priced.row_sums)
    # the local part by itself, which a stiff edge would round away
    apart = jnp.maximum(
        both - priced.edge_cost[:, 0] - priced.edge_cost[:, 1],
        _over_ends(graph, priced.local_rows),
    )
    pairs = jnp.where(_springs(graph)[(...,) + (None,) * (x.ndim - 1)], _quotient(apart, both), 1)
    return jnp.minimum(together, jnp.min(pairs))


def _quotient(above: jax.Array, below: jax.Array) -> jax.Array:
    """above / below; 1 where nothing is above, and so nothing pulls along that vector."""
    return jnp.where(above > 0, above / jnp.where(below > 0, below, 1), 1)


def _over_ends(graph: EnergyGraph, rows: jax.Array) -> jax.Array:
    return rows[graph.i] + rows[graph.j]


def _springs(graph: EnergyGraph) -> jax.Array:
    """Which edges do not resist when both of their ends move alike, bool [E]."""
    kinds = [
        jnp.full(family.num_edges, isinstance(family, Quadratic | DirectedHinge))
        if not isinstance(family, AsymmetricHinge)
        else jnp.broadcast_to(family.alpha_i == family.beta_j, (family.num_edges,))
        for family in graph.edges
    ]
    return jnp.concatenate(kinds)
