"""What every transformation does with pytrees: choose, measure, test for finiteness."""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import jax.extend.core
import jax.numpy as jnp

from smallgain_jax._checks import float_dtype

HIGHEST = jax.lax.Precision.HIGHEST


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """`yes` where the scalar `condition` holds, else `no`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def still(tree: Any) -> Any:
    """`tree` with no derivative; leaves that are no floating arrays may be anything."""
    return jax.tree.map(
        lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


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


def vdot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner product of two arrays in all bits of their dtype.

    Accelerators round float32 to bfloat16 or TF32 before they multiply matrices, vectors included,
    unless told otherwise: what is claimed or compared by a product has to say so.
    """
    return jnp.vdot(a, b, precision=HIGHEST)


FEW_COLUMNS = 8


def fold_columns(fold: Any, array: jax.Array, empty: float = 0.0) -> jax.Array:
    """`array` [K, ...] folded by `jnp.add` or its like over all axes but the first, [K].

    `empty` where there is no column.

    Few columns one by one: a reduction over a minor axis of two is not vectorized.
    """
    flat = array.reshape(array.shape[0], math.prod(array.shape[1:]))
    width = flat.shape[1]
    if not width:
        return jnp.full(flat.shape[:1], empty, flat.dtype)
    if width > FEW_COLUMNS:
        return fold.reduce(flat, axis=1)
    return reduce(fold, (flat[:, q] for q in range(width)))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of two arrays in all bits of their dtype, as in `vdot`.

    Over a mesh with explicit axes it is sharded as the arrays' own axes are; where those do not say
    how (both sides sharded along what is summed, or twice along the same), it is on every device.
    """
    ours, theirs = (jax.typeof(x).sharding.spec for x in (a, b))
    summed = -1 if b.ndim == 1 else -2
    free = [*ours[:-1], *theirs[:summed], *theirs[b.ndim + summed + 1 :]]
    axes = [name for axis in free for name in (axis if isinstance(axis, tuple) else (axis,))]
    names = [name for name in axes if name is not None]
    if None in (ours[-1], theirs[summed]) and len(set(names)) == len(names):
        return jnp.matmul(a, b, precision=HIGHEST)
    everywhere = jax.sharding.NamedSharding(
        jax.typeof(a).sharding.mesh, jax.sharding.PartitionSpec()
    )
    return jnp.matmul(a, b, precision=HIGHEST, out_sharding=everywhere)


def unit_of(*arrays: jax.Array) -> jax.Array:
    """The largest entry of all, in whose unit no square leaves the range; 1 for none that serves.

    Squares leave float32 from 2e19 on and below 1e-19. A constant to derivatives.
    """
    tops = [jnp.max(jnp.abs(array), initial=0.0) for array in arrays]
    top = jax.lax.stop_gradient(jnp.max(jnp.stack(tops))) if tops else jnp.zeros(())
    # the reciprocal, by which compiled code may divide, must not underflow
    unit = jnp.minimum(top, 0.5 / jnp.finfo(top.dtype).tiny)
    return jnp.where((top > 0) & jnp.isfinite(top), unit, 1)


def norm(tree: Any, dtype: Any) -> jax.Array:
    """Euclidean norm of a pytree of real or complex arrays, summed in `dtype`, in its `unit_of`."""
    leaves = [
        (jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf).astype(dtype)
        for leaf in jax.tree.leaves(tree)
    ]
    scale = unit_of(*leaves).astype(dtype)
    squares = [jnp.sum((leaf / scale) ** 2) for leaf in leaves]
    return scale * jnp.sqrt(sum(squares, jnp.zeros((), dtype)))


def zero_count() -> jax.Array:
    """A counter at 0, in a buffer of its own: a state is donated field by field."""
    return jnp.zeros((), jnp.int32)


def _is_explicit(sharding: Any) -> bool:
    """Whether a sharding is over a mesh with explicit axes."""
    return not sharding.mesh.empty and sharding.mesh._any_axis_explicit


def placed_like(array: jax.Array, leaf: Any) -> jax.Array:
    """`array` sharded as `leaf` is, where meshes have explicit axes; else as it is."""
    sharding = getattr(jax.typeof(leaf), "sharding", None) if hasattr(leaf, "dtype") else None
    if sharding is None or not _is_explicit(sharding):
        return array
    # the type's mesh names no devices: an array's own does, and then no context is needed
    return _resharded(array, leaf.sharding if _is_placed(leaf) else sharding)


def gathered(array: jax.Array) -> jax.Array:
    """`array` whole on every device, where meshes have explicit axes; else as it is."""
    if not _is_explicit(jax.typeof(array).sharding):
        return array
    sharding: Any = array.sharding if _is_placed(array) else jax.typeof(array).sharding
    return _resharded(
        array, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    )


def _is_placed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _resharded(array: jax.Array, sharding: Any) -> jax.Array:
    if isinstance(sharding.mesh, jax.sharding.AbstractMesh) or not _is_placed(array):
        return jax.sharding.reshard(array, sharding)
    return jax.device_put(array, sharding)


class Closed(eqx.Module):
    """A function of arrays as a pytree, what it closes over among its leaves."""

    program: Any
    constants: list[Any]
    structure: Any = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        program = jax.extend.core.ClosedJaxpr(self.program, self.constants)
        out = jax.extend.core.jaxpr_as_fun(program)(*jax.tree.leaves(args))
        # what the program knows without computing comes out as a number of Python
        arrays = [
            jnp.asarray(one, aval.dtype) for one, aval in zip(out, program.out_avals, strict=True)
        ]
        return jax.tree.unflatten(self.structure, arrays)


def closed(fn: Callable[..., Any], *args: Any) -> Closed:
    """`fn`, traced at `args`: pytrees of arrays, and so is what it returns.

    As `eqx.filter_closure_convert`, which on an explicit mesh takes its own arguments for others.
    """
    program, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return Closed(program.jaxpr, program.consts, jax.tree.structure(out))


def when(
    condition: jax.Array, yes: Callable[..., Any], no: Callable[..., Any], *operands: Any
) -> Any:
    """`lax.cond` that stays a branch under `vmap`: taken by all as soon as one member asks.

    A plain `cond` with a batched condition becomes a select, which computes the dear branch at
    every update of every member. `yes` and `no` are functions of the operands alone.
    """
    # what the functions close over may be batched too: it has to come in as data
    branches = tuple(eqx.filter_closure_convert(fn, *operands) for fn in (yes, no))
    data, static = eqx.partition((branches, operands), eqx.is_array)
    data = jax.lax.stop_gradient(data)

    def branch(index: int) -> Callable[..., Any]:
        def fn(data: Any) -> Any:
            branches, operands = eqx.combine(data, static)
            return branches[index](*operands)

        return fn

    return _branch(branch(0), branch(1), condition, data)


def _branch(yes: Callable[..., Any], no: Callable[..., Any], condition: Any, data: Any) -> Any:
    @jax.custom_batching.custom_vmap
    def choose(condition: jax.Array, data: Any) -> Any:
        return jax.lax.cond(condition, yes, no, data)

    @choose.def_vmap
    def rule(size: int, batched: Any, condition: jax.Array, data: Any) -> Any:
        condition_batched, data_batched = batched
        axes = jax.tree.map(lambda on: 0 if on else None, data_batched)

        def over(fn: Callable[..., Any]) -> Callable[..., Any]:
            return jax.vmap(fn, in_axes=(axes,), axis_size=size)

        if condition_batched:

            def some(pair: Any) -> Any:
                condition, data = pair
                return jax.vmap(select)(condition, over(yes)(data), over(no)(data))

            out = _branch(
                some, lambda pair: over(no)(pair[1]), jnp.any(condition), (condition, data)
            )
        else:
            out = _branch(over(yes), over(no), condition, data)
        return out, jax.tree.map(lambda _: True, out)

    return choose(condition, data)
