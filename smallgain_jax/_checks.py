"""Validation of concrete arguments: every message starts with the argument's name."""

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

Numbers: TypeAlias = ArrayLike | Sequence[Any]
"""What users may pass for an array: JAX or NumPy arrays, scalars, (nested) lists."""


def is_concrete(value: Any) -> bool:
    """Whether every leaf of `value` is known now, that is, not traced and not abstract."""
    return all(
        not isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)
        for leaf in jax.tree.leaves(value)
    )


def float_dtype(*values: Any) -> jnp.dtype:
    """The common floating dtype of `values`, at least float32."""
    return jnp.promote_types(jnp.result_type(*values, jnp.float32), jnp.float32)


def cast_like(tree: Any, like: Any) -> Any:
    """`tree` with the dtypes of `like`, whatever the graph's own precision made of it."""
    return jax.tree.map(lambda leaf, old: jnp.asarray(leaf, jnp.asarray(old).dtype), tree, like)


def as_float(name: str, value: Numbers) -> jax.Array:
    """`value` as a floating array; integers take JAX's default float dtype."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be real numbers, got {_shown(value)}") from error
    if jnp.issubdtype(array.dtype, jnp.floating):
        _warn_of_nothing(name, value, array.dtype)
        return array
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_:
        return array.astype(jnp.result_type(float))
    raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | None) else type(value).__name__


def check_scalar(name: str, value: Any) -> None:
    """Raise unless `value` is one real number, traced or not."""
    if as_float(name, value).shape != ():
        raise ValueError(f"{name} must be one number, got an array of shape {jnp.shape(value)}")


def _warn_of_nothing(name: str, value: Numbers, dtype: jnp.dtype) -> None:
    """Warn where numbers that are not 0 are all so small that compiled code takes them for 0."""
    if not is_concrete(value):
        return
    # before the conversion, which may have made them 0 already
    largest, tiny = np.max(np.abs(np.asarray(value)), initial=0.0), jnp.finfo(dtype).tiny
    if 0 < largest < tiny:
        warnings.warn(
            f"{name} is at most {largest:.3g}: {dtype} computes with nothing below {tiny:.3g}, so "
            "all of it counts as 0; choose another unit, or float64",
            stacklevel=4,
        )


def missing_argument(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """The name of what `fn(params, *args, **kwargs)` lacks; None for none, or if it cannot be told.

    >>> missing_argument(lambda params, x, y=0: x, (), {})
    'x'
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return None  # a builtin or a C function: calling it will tell
    try:
        bound = signature.bind_partial(None, *args, **kwargs)
    except TypeError:
        return None  # too many, or of another name: calling it will tell
    for name, parameter in signature.parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and name not in bound.arguments:
            return name
    return None


def warn_caller(message: str) -> None:
    """Warn at the line of the caller's own file, beneath whatever traces his function."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_LIBRARIES = (
    contextlib.__file__,
    *(os.path.dirname(str(module.__file__)) + os.sep for module in (jax, eqx, optax)),
    os.path.dirname(__file__) + os.sep,
)


def as_index(name: str, value: Numbers) -> jax.Array:
    """`value` as an int32 vector of node indices."""
    if is_concrete(value):
        host = np.asarray(value)
        if host.size == 0:
            host = host.astype(np.int32)
        if host.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers (node indices), got dtype {host.dtype}")
        if host.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional [E], got shape {host.shape}")
        if host.size and (host.min() < 0 or host.max() > np.iinfo(np.int32).max):
            bad = int(np.flatnonzero((host < 0) | (host > np.iinfo(np.int32).max))[0])
            raise ValueError(
                f"{name}[{bad}] = {host[bad]} is not a node index: it must lie in 0..2^31 - 1"
            )
        return jnp.asarray(host, dtype=jnp.int32)
    return jnp.asarray(value).astype(jnp.int32)


def broadcast(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`array` at `shape`; on the host where it can be, which spares a compilation per shape."""
    if array.shape == shape:
        return array
    if is_concrete(array):
        return jnp.asarray(np.broadcast_to(np.asarray(array), shape))
    return jnp.broadcast_to(array, shape)


PARAMS_NEEDED = "params must be given to update: the step depends on where it is taken"


def check_finite(name: str, value: ArrayLike, *, low: float | None = None) -> None:
    """Raise unless every concrete entry is finite and, where given, at least `low`."""
    if not is_concrete(value):
        return
    host = np.asarray(value)
    bad = ~np.isfinite(host)
    reason = "finite"
    if low is not None:
        bad |= host < low
        reason = f"finite and at least {low:g}"
    if bad.any():
        where = tuple(int(k) for k in np.argwhere(bad)[0])
        index = "[" + ", ".join(map(str, where)) + "]" if where else ""
        raise ValueError(f"{name}{index} = {host[where]!s} must be {reason}")


def check_fraction(name: str, value: Any, *, low: float = 0.0, high: float = 1.0) -> None:
    """Raise unless a concrete scalar lies in [low, high]."""
    if is_concrete(value) and not low <= float(value) <= high:
        raise ValueError(f"{name} = {value} must lie in [{low:g}, {high:g}]")


def check_target(value: Any) -> None:
    """Raise unless a concrete fraction of a limit is above 0 and below 1."""
    if is_concrete(value) and not 0 < float(value) < 1:
        raise ValueError(f"target = {value} must lie in (0, 1): a fraction of the limit")


def check_call(kind: type, updates: Any, state: Any, params: Any) -> None:
    """Raise unless `update` was given params, a state of this `kind`, and updates that fit."""
    if params is None:
        raise ValueError(PARAMS_NEEDED)
    if not isinstance(state, kind):
        raise TypeError(
            f"state is {type(state).__name__}, not a {kind.__name__}: the order is "
            "update(gradient, state, params)"
        )
    check_updates(updates, params)


def check_updates(updates: Any, params: Any) -> None:
    """Raise unless updates have the structure and the shapes of the parameters."""
    ours: Any = jax.tree.structure(params)
    if jax.tree.structure(updates) != ours:
        raise ValueError(
            f"updates must have the tree structure of params, {ours}, got "
            f"{jax.tree.structure(updates)}"
        )
    for (path, update), leaf in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(update) != jnp.shape(leaf):
            raise ValueError(
                f"updates{jax.tree_util.keystr(path)} has shape {jnp.shape(update)}, and params "
                f"there {jnp.shape(leaf)}"
            )


def check_count(name: str, value: int | None, least: int) -> None:
    """Raise unless a static number, where there is one, is an integer of at least `least`."""
    if value is None:
        return
    # arrays too: inject_hyperparams makes them of numbers
    if not np.issubdtype(getattr(value, "dtype", type(value)), np.integer):
        raise TypeError(f"{name} = {value!r} must be an int")
    if value < least:
        raise ValueError(f"{name} = {value} must be at least {least}")


def check_bounds(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raise unless two concrete scalars are positive, finite and in order."""
    check_positive(low_name, low)
    check_positive(high_name, high)
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"{low_name} = {low} must not exceed {high_name} = {high}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless a concrete scalar is finite and above zero."""
    if is_concrete(value) and not (np.isfinite(float(value)) and float(value) > 0):
        raise ValueError(f"{name} = {value} must be positive and finite")


def check_optimizer(name: str, value: Any) -> None:
    """Raise unless `value` has an optimizer's `init` and `update`."""
    if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return
    if callable(value):
        called = getattr(value, "__name__", type(value).__name__)
        kind = "class" if isinstance(value, type) else "function"
        raise TypeError(
            f"{name} is the {kind} {called}, not an optimizer: call it, as in {called}(...)"
        )
    raise TypeError(
        f"{name} must be an optax optimizer, with init and update; got {type(value).__name__}"
    )
