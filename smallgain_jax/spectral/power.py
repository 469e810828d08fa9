r"""Power iteration on an operator given by its products, by blocks of the parameters.

Estimates **from below**: they converge to the largest magnitude of an eigenvalue as the iteration
goes on, and certify nothing; only the Gershgorin and Perron bounds of `rows` do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import isfunction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import float_dtype
from smallgain_jax._tree import norm, placed_like

Product = Callable[[Any], Any]
"""v -> H v, on pytrees shaped like the parameters."""


_Swept = tuple[list[jax.Array], jax.Array]  # leaves of the vector, curvature [R]


Blocks = str | Callable[[tuple[Any, ...]], str] | None


def power_iteration(
    product: Product,
    vector: Any,
    inverse_root: Any,
    labels: Sequence[int],
    iterations: jax.Array | int,
) -> tuple[jax.Array, Any]:
    r"""Largest curvature of every block of parameters, from below, and the vector for next time.

    Norms are taken relative to the largest entry, so that curvatures from 1e-30 to 1e30 neither
    vanish nor overflow in float32.

    Args:
      product: v -> H v.
      vector: pytree like the parameters, each block of unit norm; start from the last call's.
      inverse_root: $P^{-1/2}$, shaped like the parameters or by scalars; 0 where a parameter does
        not move and must not count; a symmetric map of such pytrees, a
        function; None for the identity.
      labels: the block 0..R-1 of each leaf.
      iterations: how many, int >= 1; may be traced.

    Returns:
      `(curvature [R], vector)`; the vector is kept where the curvature vanishes or is not finite.

    >>> curvature, _ = power_iteration(
    ...     lambda v: [2 * v[0], -3 * v[1]], [jnp.ones(1), jnp.ones(1)], None, [0, 1], 1)
    >>> curvature.tolist()
    [2.0, 3.0]
    """
    rows = max(labels) + 1 if labels else 1
    leaves: list[jax.Array]
    treedef: Any
    leaves, treedef = jax.tree.flatten(vector)
    dtype = float_dtype(*leaves)
    diagonal = inverse_root is not None and not isfunction(inverse_root)
    roots = treedef.flatten_up_to(inverse_root) if diagonal else [None] * len(leaves)

    def scaled(tree: list[jax.Array]) -> list[jax.Array]:
        if isfunction(inverse_root):
            image = jax.tree.leaves(inverse_root(treedef.unflatten(tree)))
            return [y.astype(leaf.dtype) for y, leaf in zip(image, tree, strict=True)]
        return [
            leaf if r is None else leaf * jnp.asarray(r, leaf.dtype)
            for leaf, r in zip(tree, roots, strict=True)
        ]

    def one_block(r: jax.Array, now: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        inside = [jnp.asarray(label) == r for label in labels]
        own = [jnp.where(here, leaf, 0) for here, leaf in zip(inside, now, strict=True)]
        image = jax.tree.leaves(product(treedef.unflatten(scaled(own))))
        image = scaled([y.astype(leaf.dtype) for y, leaf in zip(image, now, strict=True)])
        image = [jnp.where(here, y, 0) for here, y in zip(inside, image, strict=True)]
        length, size = norm(own, dtype), norm(image, dtype)
        curvature = size / jnp.where(length > 0, length, 1)
        usable = jnp.isfinite(curvature) & (curvature > 0)
        whole = jnp.where(usable, size, 1)
        moved = [
            jnp.where(here & usable, y / whole.astype(y.dtype), leaf)
            for here, y, leaf in zip(inside, image, now, strict=True)
        ]
        return moved, curvature

    def sweep(
        _: Any, carry: tuple[list[jax.Array], jax.Array]
    ) -> tuple[list[jax.Array], jax.Array]:
        now, _ = carry
        if rows == 1:
            moved, curvature = one_block(jnp.zeros((), jnp.int32), now)
            return moved, curvature[None]
        return jax.lax.scan(lambda v, r: one_block(r, v), now, jnp.arange(rows))

    start = (leaves, jnp.zeros(rows, dtype))
    leaves, curvature = jax.lax.fori_loop(0, iterations, sweep, start)
    return curvature, treedef.unflatten(leaves)


def random_vector(seed: int, params: Any) -> Any:
    """A start for `power_iteration`, of about unit norm: uniform around 0, at least float32.

    Each leaf lies where the parameter of its place lies. The entries are scrambled indices: they
    are the same on every backend and every mesh, and take a tenth of the program that
    `jax.random.normal` would take for each leaf.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    size = sum(int(np.prod(np.shape(leaf))) for leaf in leaves) or 1
    keys = np.random.default_rng(seed).integers(1 << 32, size=len(leaves), dtype=np.uint32)

    def start(key: np.uint32, leaf: Any) -> jax.Array:
        dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
        entries = _scrambled(key, np.shape(leaf)).astype(dtype)
        return placed_like(entries * np.asarray(2**-31 * np.sqrt(3 / size), dtype), leaf)

    return treedef.unflatten([start(*pair) for pair in zip(keys, leaves, strict=True)])


@partial(jax.jit, static_argnums=1)
def _scrambled(key: Any, shape: tuple[int, ...]) -> jax.Array:
    """An int32 for each index, without a pattern that a Hessian could know.

    The mixing is that of Wellons, *Prospecting for hash functions* (2018), "lowbias32".
    """
    strides = np.cumprod([1, *shape[:0:-1]], dtype=np.uint64).astype(np.uint32)[::-1]
    x = jnp.full(shape, key, jnp.uint32)
    for axis in range(len(shape)):
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * strides[axis]
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return jax.lax.bitcast_convert_type(x ^ (x >> 16), jnp.int32)


def label_blocks(params: Any, blocks: Blocks) -> tuple[list[int], list[str]]:
    """Block of each leaf, and the names of the blocks.

    Args:
      params: pytree.
      blocks: None for one block, "leaves" for one per leaf, or a function of a leaf's key path
        (`jax.tree_util.KeyPath`) that names its block.

    >>> label_blocks({"a": 1.0, "b": [2.0, 3.0]}, lambda path: path[0].key)
    ([0, 1, 1], ['a', 'b'])
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if blocks is None:
        return [0] * len(paths), ["all"]
    if isinstance(blocks, str):
        if blocks != "leaves":
            raise ValueError(f"blocks = {blocks!r} must be None, 'leaves' or a function of a path")
        blocks = jax.tree_util.keystr
    given = [str(blocks(path)) for path in paths]
    names = list(dict.fromkeys(given))
    return [names.index(name) for name in given], names or ["all"]
