"""A penalty on some of a graph's nodes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import is_concrete
from smallgain_jax.penalties.base import Penalty


class OnNodes(eqx.Module):
    r"""The local energy $f(x) = p(x[\mathrm{nodes}])$ of an `EnergyGraph`.

    A penalty by itself acts on the whole state: the rows of SoftmaxEntropy and TopK, and the latent
    axis of JumpReLU, are the last axis of x, and Hoyer sees one vector. With scalar nodes, x [n],
    this says which nodes make up a row, for example `nodes=np.arange(n).reshape(-1, 4)` for rows of
    four; with vector nodes, x [n, d], it restricts the penalty to some nodes. Nodes may be left
    out, and may appear in several rows: a sum of majorizers majorizes the sum.

    Args:
      penalty: any penalty.
      nodes: which nodes it acts on, int [...] >= 0; x[nodes] is what the penalty sees.

    Raises:
      TypeError: penalty is none, or nodes that are not integers.
      ValueError: a concrete node that is negative; on use, one that x does not have.

    >>> from smallgain_jax.penalties import TopK
    >>> local = OnNodes(TopK(1), [[0, 1], [2, 3]])
    >>> local.majorizer_diagonal(jnp.array([1.0, 2.0, 4.0, 3.0])).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """

    penalty: Penalty
    nodes: jax.Array

    def __init__(self, penalty: Penalty, nodes: ArrayLike) -> None:
        if not isinstance(penalty, Penalty):
            raise TypeError(f"penalty must be a Penalty, got {type(penalty).__name__}")
        self.penalty = penalty
        array = jnp.asarray(nodes)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"nodes must be integers, got {array.dtype}")
        if is_concrete(array) and np.any(np.asarray(array) < 0):
            raise ValueError("nodes must not be negative")
        self.nodes = array

    def _of(self, x: jax.Array) -> jax.Array:
        if x.ndim < 1:
            raise ValueError("x is a scalar, but its first axis is that of the nodes")
        if is_concrete(self.nodes):
            largest = int(np.max(np.asarray(self.nodes), initial=0))
            if largest >= x.shape[0]:
                raise ValueError(f"nodes: {largest} is outside 0..{x.shape[0] - 1}")
        return x[self.nodes]

    def __call__(self, x: jax.Array) -> jax.Array:
        """f(x), a scalar."""
        return self.penalty(self._of(x))

    def majorizer_diagonal(self, x: jax.Array) -> jax.Array:
        """Rows that majorize the Hessian at x, shaped like x; 0 on nodes left out."""
        rows = self.penalty.majorizer_diagonal(self._of(x))
        return jnp.zeros(x.shape, rows.dtype).at[self.nodes].add(rows)
