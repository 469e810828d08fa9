r"""Lanczos: the Krylov space of a symmetric operator given by its products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import matmul, vdot


class Krylov(NamedTuple):
    """m steps of Lanczos: H V = V T, up to a last row; rows of `basis` past a breakdown are 0."""

    basis: jax.Array  # [m, n] V, orthonormal rows
    diagonal: jax.Array  # [m] of T
    off_diagonal: jax.Array  # [m] beside it; the last entry couples to what lies outside


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, iterations: int) -> Krylov:
    r"""Tridiagonalize a symmetric operator, with full reorthogonalization (twice is enough).

    Args:
      product: v [n] to H v [n].
      start: [n], in whose Krylov space the result lives.
      iterations: products to spend, static; n are enough.

    Returns:
      A `Krylov` with m = min(iterations, n).

    Source: Lanczos 1950; Parlett, *The Symmetric Eigenvalue Problem*, chapter 13.

    >>> space = lanczos(lambda v: jnp.array([1.0, 3.0]) * v, jnp.array([1.0, 1.0]), 2)
    >>> space.diagonal.round(3).tolist(), space.off_diagonal.round(3).tolist()
    ([2.0, 2.0], [1.0, 0.0])
    """
    count = min(iterations, start.size)
    rounding = 10 * jnp.finfo(start.dtype).eps

    def extend(j: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        basis, diagonal, off, scale = carry
        image = product(basis[j])
        scale = jnp.maximum(scale, jnp.linalg.norm(image))
        diagonal = diagonal.at[j].set(vdot(basis[j], image))
        for _ in range(2):
            inside = matmul(basis, image)
            image = image - matmul(inside, basis)
        length = jnp.linalg.norm(image)
        # what is left is rounding: the space is invariant, and zeros end the recurrence
        length = jnp.where(length <= rounding * scale, 0, length)
        follow = jnp.where(length > 0, image / jnp.where(length > 0, length, 1), 0)
        return basis.at[j + 1].set(follow), diagonal, off.at[j].set(length), scale

    norm = jnp.linalg.norm(start)
    basis = jnp.zeros((count + 1, start.size), start.dtype)
    basis = basis.at[0].set(start / jnp.where(norm > 0, norm, 1))
    empty = jnp.zeros(count, start.dtype)
    carry = (basis, empty, empty, jnp.zeros((), start.dtype))
    basis, diagonal, off, _ = jax.lax.fori_loop(0, count, extend, carry)
    return Krylov(basis[:count], diagonal, off)


def tridiagonal(space: Krylov, rows: int) -> jax.Array:
    """T [rows, m]; one row more than columns includes the coupling to the outside."""
    below = jnp.diag(space.off_diagonal)
    square = jnp.diag(space.diagonal) + jnp.diag(space.off_diagonal[:-1], 1)
    full = jnp.pad(square, ((0, 1), (0, 0))) + jnp.pad(below, ((1, 0), (0, 0)))
    return full[:rows]
