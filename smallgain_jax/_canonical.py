"""One object for all that are equal: what is compiled for an optimizer serves its equals.

An optax optimizer is a pair of closures, and two that were made by the same call are different
objects. They do the same if their code is the same, and what it closes over is equal: numbers,
small arrays, containers and further closures by value, everything else by identity.
"""

from collections import OrderedDict
from functools import cache, partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import is_concrete

Thing = TypeVar("Thing")

KEPT = 64
SMALL = 1024
"""Entries of an array up to which its values are compared."""


_WRAPPERS = type(cache(int)), type(jax.jit(int))
"""What `functools.cache` and `jax.jit` make: as equal as what they wrap."""


class _UnknownError(Exception):
    """What is closed over is traced: it has no value yet."""


_known: OrderedDict[Any, tuple[Any, list[Any]]] = OrderedDict()


def canonical(thing: Thing) -> Thing:
    """The first of its equals, of the last 64 kinds; itself where that cannot be told.

    >>> import optax
    >>> canonical(optax.sgd(0.5)) is canonical(optax.sgd(0.5))
    True
    >>> canonical(optax.sgd(0.5)) is canonical(optax.sgd(0.25))
    False
    """
    by_identity: list[Any] = []  # kept alive: an address tells nothing of an object that is gone
    try:
        key = _key(thing, {}, by_identity)
        first: Thing = _known.get(key, (thing, []))[0]
        # what the first closes over may have changed since
        if first is thing or _key(first, {}, []) != key:
            first = thing
            _known[key] = first, by_identity
    except (_UnknownError, RecursionError):
        return thing
    _known.move_to_end(key)
    while len(_known) > KEPT:
        _known.popitem(last=False)
    return first


def _key(thing: Any, seen: dict[int, int], by_identity: list[Any]) -> Any:
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
        return type(thing), repr(thing)
    if id(thing) in seen:
        return "seen", seen[id(thing)]
    seen[id(thing)] = len(seen)

    def of(other: Any) -> Any:
        return _key(other, seen, by_identity)

    if isinstance(thing, FunctionType):
        named = sorted((thing.__kwdefaults__ or {}).items())
        by_identity.append(thing.__globals__)
        return (
            thing.__code__,
            id(thing.__globals__),
            of(thing.__defaults__),
            tuple((name, of(value)) for name, value in named),
            tuple(map(of, thing.__closure__ or ())),
        )
    if isinstance(thing, CellType):
        try:
            return "cell", of(thing.cell_contents)
        except ValueError:
            return "cell", "empty"
    if isinstance(thing, partial):
        return "partial", of(thing.func), of(thing.args), of(thing.keywords)
    if isinstance(thing, _WRAPPERS):
        wrapped: Any = thing
        return type(thing), of(wrapped.__wrapped__)
    if isinstance(thing, MethodType):
        return "method", of(thing.__func__), of(thing.__self__)
    if type(thing) is dict:
        return "dict", tuple((of(name), of(value)) for name, value in thing.items())
    if isinstance(thing, tuple) or type(thing) is list:
        return type(thing), tuple(map(of, thing))
    if not is_concrete(thing):
        raise _UnknownError
    if isinstance(thing, jax.Array) and jnp.issubdtype(thing.dtype, jax.dtypes.prng_key):
        return "key", str(thing.dtype), of(jax.random.key_data(thing))
    if isinstance(thing, np.ndarray | np.generic | jax.Array) and np.size(thing) <= SMALL:
        weak = getattr(thing, "weak_type", False)
        return "array", str(thing.dtype), np.shape(thing), weak, np.asarray(thing).tobytes()
    by_identity.append(thing)
    return "object", id(thing)


__all__ = ["canonical"]
