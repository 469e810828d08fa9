"""How much of a program the losses share: whether one alone is cheaper than all together."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

_WHOLE = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call"}
"""Primitives that do nothing but what the program inside does, result for result."""


def passes(fn: Callable[[Any], Sequence[jax.Array]], params: Any) -> float:
    """Arithmetic of every loss alone, added up, over that of all losses at once.

    1 where no loss needs anything of another's (each evaluates the network at points of its own),
    K where all go through the same (heads on one network). An operation counts as its results have
    entries, times what each sums over in a product of matrices; a `while` loop as one turn.

    >>> import jax.numpy as jnp
    >>> passes(lambda x: [jnp.sin(jnp.cos(x)), jnp.tan(jnp.exp(x))], 1.0)
    1.0
    >>> passes(lambda x: (lambda y: [2 * y, 3 * y])(jnp.sin(jnp.cos(jnp.tan(x)))), 1.0)
    1.6
    """
    program = jax.make_jaxpr(lambda p: list(fn(p)))(params).jaxpr
    count = len(program.outvars)
    alone = sum(_needed(program, [k == j for j in range(count)])[0] for k in range(count))
    return alone / max(_needed(program, [True] * count)[0], 1)


def _needed(program: core.Jaxpr, wanted: Sequence[bool]) -> tuple[float, list[bool]]:
    """Arithmetic that the wanted results need, and which arguments."""
    live = {
        v
        for v, on in zip(program.outvars, wanted, strict=True)
        if on and not isinstance(v, core.Literal)
    }
    work = 0.0
    for eqn in reversed(program.eqns):
        on = [v in live for v in eqn.outvars]
        if not any(on):
            continue
        inner = list(_inside(eqn))
        if eqn.primitive.name in _WHOLE and len(inner) == 1:
            some, used = _needed(inner[0], on)
        else:
            some = sum(_needed(j, [True] * len(j.outvars))[0] for j in inner)
            some = some * eqn.params.get("length", 1) if inner else _arithmetic(eqn)
            used = [True] * len(eqn.invars)
        work += some
        live |= {
            v
            for v, use in zip(eqn.invars, used, strict=True)
            if use and not isinstance(v, core.Literal)
        }
    return work, [v in live for v in program.invars]


def _arithmetic(eqn: core.JaxprEqn) -> float:
    entries = sum(math.prod(_shape(v)) for v in eqn.outvars)
    if eqn.primitive.name != "dot_general":
        return entries
    (summed, _), _ = eqn.params["dimension_numbers"]
    return entries * math.prod(_shape(eqn.invars[0])[axis] for axis in summed)


def _shape(v: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = getattr(v.aval, "shape", ())
    return shape


def _inside(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part
