"""Preconditioned conjugate gradients (Hestenes and Stiefel 1952), one loop for every caller.

What differs among callers is when they have enough, and what they make of a direction along which
there is no curvature: the graph's minimum lies nowhere, a linear system is not one of a minimum, a
Newton step may leave a saddle along it. Both are arguments.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import vdot

Product = Callable[[jax.Array], jax.Array]


class Conjugate(NamedTuple):
    """An iterate of conjugate gradients for $A s = b$ under a preconditioner M."""

    solution: jax.Array  # [n] s
    residual: jax.Array  # [n] b - A s
    direction: jax.Array  # [n]
    norm: jax.Array  # [] <r, M r>
    first: jax.Array  # [] the same at the start
    steps: jax.Array  # [] int32, products so far
    sound: jax.Array  # [] bool, what `curved` said of the last direction


def conjugate_gradients(
    product: Product,
    right: jax.Array,
    precondition: Product,
    going: Callable[[Conjugate], jax.Array],
    curved: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array | None = None,
) -> Conjugate:
    """Iterate while `going` says so and the last direction was sound.

    Args:
      product: v -> A v, symmetric.
      right: the residual at the start, [n].
      precondition: r -> M r, symmetric and positive definite.
      going: whether an iterate is not good enough yet.
      curved: of <d, A d> and d: the curvature to divide by, where 0 means stay, and whether to go
        on from there.
      start: solution that `right` is the residual of; zeros by default.

    >>> a, b = jnp.array([[2.0, 1.0], [1.0, 3.0]]), jnp.array([1.0, 0.0])
    >>> found = conjugate_gradients(
    ...     lambda v: a @ v, b, lambda r: r, lambda c: c.steps < 2, lambda bend, d: (bend, bend > 0)
    ... )
    >>> bool(jnp.allclose(a @ found.solution, b))
    True
    """

    def proceeding(c: Conjugate) -> jax.Array:
        return c.sound & going(c)

    def step(c: Conjugate) -> Conjugate:
        image = product(c.direction)
        bend, sound = curved(vdot(c.direction, image), c.direction)
        length = jnp.where(bend > 0, c.norm / jnp.where(bend > 0, bend, 1), 0)
        residual = c.residual - length * image
        scaled = precondition(residual)
        norm = vdot(residual, scaled)
        direction = scaled + (norm / c.norm) * c.direction
        solution = c.solution + length * c.direction
        return Conjugate(solution, residual, direction, norm, c.first, c.steps + 1, sound)

    scaled = precondition(right)
    norm = vdot(right, scaled)
    begin = Conjugate(
        jnp.zeros_like(right) if start is None else start,
        right,
        scaled,
        norm,
        norm,
        jnp.zeros((), jnp.int32),
        jnp.ones((), bool),
    )
    return jax.lax.while_loop(proceeding, step, begin)


__all__ = ["Conjugate", "Product", "conjugate_gradients"]
