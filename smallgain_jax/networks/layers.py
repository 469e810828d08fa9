r"""Which leaves of a network's parameters are layers, and the matrices they stand for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Layer(NamedTuple):
    """How a leaf acts as a linear map: which axes are its outputs, and what its matrix omits."""

    order: int = 0
    """Place in the chain, for reports; ties stay in the order of the tree."""
    outputs: tuple[int, ...] = (0,)
    """Axes of the leaf that index rows; the others, in order, index columns."""
    gain: float = 1.0
    """`gain` times the matrix's spectral norm bounds the operator's norm."""

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as a matrix [outputs, inputs], in at least float32."""
        rows = len(self.outputs)
        moved = jnp.moveaxis(leaf, self.outputs, tuple(range(rows)))
        size = int(np.prod(moved.shape[:rows]))
        return moved.reshape(size, -1).astype(jnp.promote_types(leaf.dtype, jnp.float32))

    def leaf(self, matrix: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `matrix`, in its dtype."""
        rows = len(self.outputs)
        outputs = [axis % like.ndim for axis in self.outputs]
        shape = [like.shape[axis] for axis in outputs]
        shape += [like.shape[axis] for axis in range(like.ndim) if axis not in outputs]
        return jnp.moveaxis(matrix.reshape(shape), tuple(range(rows)), self.outputs)


Rule = Callable[[tuple[Any, ...], Any], Layer | None]


def matrix_layers(path: tuple[Any, ...], leaf: Any) -> Layer | None:
    r"""The default rule: every leaf with two axes or more is a layer, in the order of the tree.

    A matrix is [outputs, inputs] or its transpose, which has the same norm. A leaf with more axes
    is taken as a convolution kernel [outputs, inputs, *window] (Equinox, PyTorch), reshaped to
    [outputs, inputs x window] and given the gain $\sqrt{|\mathrm{window}|}$: the operator first
    copies each input into at most |window| patches, so for any stride, dilation and padding with
    zeros or by wrapping, its norm is at most that times the matrix's (Tsuzuku, Sato and Sugiyama,
    NeurIPS 2018; Singla and Feizi, *Fantastic Four*, ICLR 2021). Kernels [*window, inputs, outputs]
    (Flax) want `Layer(outputs=(-1,), gain=sqrt(|window|))`, and projections of attention with split
    heads [features, heads, size] want `Layer(outputs=(1, 2))`: give such a rule as `layers`.

    Args:
      path: key path of the leaf, as in `jax.tree_util.tree_map_with_path`.
      leaf: array or ShapeDtypeStruct.

    Returns:
      A `Layer`, or None for leaves that are none.

    >>> matrix_layers((), jnp.zeros((8, 3, 2, 2)))
    Layer(order=0, outputs=(0,), gain=2.0)
    """
    del path
    if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    return Layer(gain=float(np.sqrt(np.prod(leaf.shape[2:]))))


def find_layers(params: Any, layers: Rule | None = None) -> list[tuple[int, Layer]]:
    """Index of each layer among the leaves of `params`, and its `Layer`, in the chain's order."""
    rule = matrix_layers if layers is None else layers
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [(k, rule(path, leaf)) for k, (path, leaf) in enumerate(leaves)]
    return sorted(
        ((k, layer) for k, layer in found if layer is not None), key=lambda pair: pair[1].order
    )
