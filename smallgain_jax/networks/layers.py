r"""Which leaves of a network's parameters are layers, and the matrices they stand for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._tree import gathered


class Layer(NamedTuple):
    """How a leaf acts as a linear map: which axes are its outputs, and what its matrix omits."""

    order: int = 0
    """Place in the chain, for reports; ties stay in the order of the tree."""
    outputs: tuple[int, ...] = (0,)
    """Axes of the leaf that index rows; the others, in order, index columns."""
    gain: float = 1.0
    """`gain` times the matrix's spectral norm bounds the operator's norm."""

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The leaf as a matrix [outputs, inputs], in at least float32; complex stays complex."""
        rows = len(self.outputs)
        array = held(leaf)
        moved = jnp.moveaxis(array, self.outputs, tuple(range(rows)))
        shape = tuple(int(np.prod(part)) for part in (moved.shape[:rows], moved.shape[rows:]))
        return moved.reshape(shape).astype(jnp.promote_types(array.dtype, jnp.float32))

    def leaf(self, matrix: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of `matrix`, in its dtype."""
        rows = len(self.outputs)
        outputs = [axis % like.ndim for axis in self.outputs]
        shape = [like.shape[axis] for axis in outputs]
        shape += [like.shape[axis] for axis in range(like.ndim) if axis not in outputs]
        return jnp.moveaxis(matrix.reshape(shape), tuple(range(rows)), self.outputs)


Rule = Callable[[tuple[Any, ...], Any], Layer | None]


def matrix_layers(path: tuple[Any, ...], leaf: Any) -> Layer | None:
    r"""The default rule: every matrix is a layer, and convolutions whose layout is known.

    A leaf whose last name is `bias` or `scale`, as Equinox and Flax name them, or starts with
    `bias_`, is no layer whatever its shape: biases of convolutions have as many axes as images.
    Neither are leaves with fewer than two axes, and those of booleans.

    A matrix, real or complex, is [outputs, inputs] or its transpose, which has the same norm. A
    leaf with four axes or more named `kernel`, as Flax names them, is a convolution
    [*window, inputs, outputs] (with three it may as well be an attention's projection); one with
    three or more named `weight`, as Equinox and PyTorch do, is [outputs, inputs, *window]. It is
    reshaped to [outputs, inputs x window] and given the gain $\sqrt{|\mathrm{window}|}$: the
    operator first copies each input into at most |window| patches, so for any stride, dilation and
    padding with zeros or by wrapping, its norm is at most that times the matrix's (Tsuzuku, Sato
    and Sugiyama, NeurIPS 2018; Singla and Feizi, *Fantastic Four*, ICLR 2021).

    Two things only a leaf's neighbours tell, and `lipschitz_certificate` and `kappa_budget` ask
    them: a `b` beside a `w` is its bias, as Haiku names it (alone it may be any matrix); and a
    `kernel` whose `bias` has the shape of its last axes, two or more, is a dense map
    [*inputs, *outputs] onto those axes, as of Flax's `DenseGeneral`. Such a kernel of four axes
    without a bias cannot be told from a convolution's, and is read as one: give a rule.

    Any other leaf with more than two axes is refused: read in the wrong layout its norm would not
    bound the operator's; and so are integers with two axes or more, which may be quantized in a
    unit of their own, or no matrix at all. Give a rule as `layers`: `convolution(leaf, "HWIO")` or
    `convolution(leaf, "OIHW")` for a convolution, `Layer(outputs=(1, 2))` for projections of
    attention with split heads [features, heads, size], None for what is no layer.

    Args:
      path: key path of the leaf, as in `jax.tree_util.tree_map_with_path`.
      leaf: array or ShapeDtypeStruct.

    Returns:
      A `Layer`, or None for leaves that are none.

    Raises:
      ValueError: more than two axes under another name, or integers.

    >>> matrix_layers((jax.tree_util.GetAttrKey("weight"),), jnp.zeros((8, 3, 2, 2)))
    Layer(order=0, outputs=(0,), gain=2.0)
    >>> matrix_layers((jax.tree_util.DictKey("kernel"),), jnp.zeros((2, 2, 3, 8)))
    Layer(order=0, outputs=(3,), gain=2.0)
    >>> matrix_layers((jax.tree_util.GetAttrKey("bias"),), jnp.zeros((4, 1))) is None
    True
    """
    return _default(path, leaf, {})


def _default(path: tuple[Any, ...], leaf: Any, beside: Mapping[str, Any]) -> Layer | None:
    """`matrix_layers`, which knows the leaves `beside` this one by their names."""
    name, dtype = _name(path), getattr(leaf, "dtype", None)
    other = name in OTHERS or name.startswith("bias_") or (name == "b" and "w" in beside)
    # an Equinox module's leaves may be functions
    if dtype is None or other or leaf.ndim < 2 or not jnp.issubdtype(dtype, jnp.number):
        return None
    where = f"layers must be given: the leaf params{jax.tree_util.keystr(path)} of shape"
    if jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{where} {leaf.shape} is of {dtype}, and nothing says whether it is a matrix, and in "
            "which unit. A rule (path, leaf) -> Layer, or None, says it"
        )
    if leaf.ndim == 2:
        return Layer()
    layout, axes = LAYOUTS.get(name, ("", 0))
    known, bias = leaf.ndim >= axes, getattr(beside.get("bias"), "shape", ())
    if name == "kernel" and len(bias) > 1:
        inputs = leaf.ndim - len(bias)
        dense = inputs > 0 and leaf.shape[inputs:] == bias
        # a window of its own for each position, of which a convolution's reading is a bound, too
        local = (*leaf.shape[:-2], leaf.shape[-1]) == bias
        if dense and not local:
            return Layer(outputs=tuple(range(inputs, leaf.ndim)))
        known = known and local and not dense
    if not layout or not known:
        raise ValueError(
            f"{where} {leaf.shape} has {leaf.ndim} axes, and nothing says which are outputs. A "
            "rule (path, leaf) -> Layer says it, as in smallgain_jax.networks.layers.convolution"
        )
    return convolution(leaf, layout)


OTHERS = ("bias", "scale")
"""Names that Equinox and Flax give to leaves that are no layers."""

LAYOUTS = {"kernel": ("HWIO", 4), "weight": ("OIHW", 3)}
"""Layouts of convolutions, and from how many axes on they are certain, by the names that Flax, and
Equinox and PyTorch, give their leaves."""


def convolution(leaf: Any, layout: str) -> Layer:
    r"""The layer of a convolution kernel, any number of window axes included.

    Args:
      leaf: array or ShapeDtypeStruct with at least three axes.
      layout: "HWIO" for [*window, inputs, outputs] (Flax, Haiku, TensorFlow), or "OIHW" for
        [outputs, inputs, *window] (Equinox, PyTorch).

    Raises:
      ValueError: an unknown layout.

    >>> convolution(jnp.zeros((3, 3, 16, 32)), "HWIO")
    Layer(order=0, outputs=(3,), gain=3.0)
    """
    if layout not in ("HWIO", "OIHW"):
        raise ValueError(f"layout = {layout!r} is unknown: choose from HWIO, OIHW")
    last = layout == "HWIO"
    window = leaf.shape[:-2] if last else leaf.shape[2:]
    return Layer(outputs=(leaf.ndim - 1 if last else 0,), gain=float(np.sqrt(np.prod(window))))


def _name(path: tuple[Any, ...]) -> str:
    """The last name on a key path: a dict's key or an attribute."""
    if not path:
        return ""
    key = path[-1]
    return str(getattr(key, "key", getattr(key, "name", "")))


def find_layers(params: Any, layers: Rule | None = None) -> list[tuple[int, Layer]]:
    """Index of each layer among the leaves of `params`, and its `Layer`, in the chain's order.

    By `layers`, or by `matrix_layers` and what a leaf's neighbours tell.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    beside: dict[Any, dict[str, Any]] = {}
    for path, leaf in leaves:
        beside.setdefault(path[:-1], {})[_name(path)] = leaf

    def rule(path: tuple[Any, ...], leaf: Any) -> Layer | None:
        return _default(path, leaf, beside[path[:-1]]) if layers is None else layers(path, leaf)

    found = [(k, rule(path, leaf)) for k, (path, leaf) in enumerate(leaves)]
    return sorted(
        ((k, layer) for k, layer in found if layer is not None), key=lambda pair: pair[1].order
    )


def held(leaf: Any) -> jax.Array:
    """The leaf as JAX holds it; a number that its dtype would take for 0 becomes a small one."""
    if not isinstance(leaf, np.ndarray):
        return jnp.asarray(leaf)
    if leaf.dtype.kind in "iu":
        return jnp.asarray(leaf.astype(float))
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if dtype == leaf.dtype:
        return jnp.asarray(leaf)
    least = np.finfo(dtype).smallest_subnormal
    # one that is too large becomes infinite, and its matrix's norm with it
    with np.errstate(over="ignore", under="ignore"):
        lost = (leaf != 0) & (np.abs(leaf) < least)
        return jnp.asarray(np.where(lost, least, leaf).astype(dtype))


def whole(leaf: Any) -> jax.Array:
    """The leaf on every device, where it is sharded over an explicit mesh; else as it is.

    A norm is one of the whole matrix: products of sharded ones would ask how to shard the result.
    """
    return gathered(held(leaf))
