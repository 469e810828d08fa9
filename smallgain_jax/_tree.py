"""What every transformation does with pytrees: choose, measure, test for finiteness."""

from typing import Any

import jax
import jax.numpy as jnp

from smallgain_jax._checks import float_dtype

HIGHEST = jax.lax.Precision.HIGHEST


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """`yes` where the scalar `condition` holds, else `no`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every floating leaf is finite."""
    leaves = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)


def stat_dtype(tree: Any) -> jnp.dtype:
    """The dtype of statistics: the leaves' common one, at least float32.

    Asked of dtypes rather than leaves: a weakly typed float64 scalar would give way to float32.
    """
    return float_dtype(*(jnp.result_type(leaf.dtype) for leaf in jax.tree.leaves(tree)))


def dot(a: Any, b: Any, dtype: Any) -> jax.Array:
    """Inner product of two pytrees, summed in `dtype`."""
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros((), dtype))


def norm(tree: Any, dtype: Any) -> jax.Array:
    """Euclidean norm of a pytree, summed in `dtype`.

    In units of the largest entry: squares leave float32 from 2e19 on and below 1e-19.
    """
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(tree)]
    tops = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves]
    top = jax.lax.stop_gradient(jnp.max(jnp.stack(tops))) if tops else jnp.zeros((), dtype)
    scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    squares = [jnp.sum((leaf / scale) ** 2) for leaf in leaves]
    return scale * jnp.sqrt(sum(squares, jnp.zeros((), dtype)))


def zero_count() -> jax.Array:
    """A counter at 0, in a buffer of its own: a state is donated field by field."""
    return jnp.zeros((), jnp.int32)
