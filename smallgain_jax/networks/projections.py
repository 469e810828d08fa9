"""Projections of a matrix onto those whose norm is within a cap: scaled, clipped, softly capped."""

from typing import Any

import jax
import jax.numpy as jnp

from smallgain_jax._tree import matmul, vdot
from smallgain_jax.networks.layers import Layer
from smallgain_jax.spectral.norms import (
    CERTAINTY,
    coarse_bound,
    gram_power,
    in_unit,
    spectral_bound,
)

PROJECTIONS = ("scale", "clip", "soft")
DIRECTIONS = 4
"""Singular directions that a clip cuts per update; scaling takes the rest."""
CLIP_POWER_STEPS = 6
SHARPNESS = 8
"""Power of the soft cap: a layer at half its kappa is scaled by 1 - 5e-4."""


def stored(params: jax.Array, update: jax.Array) -> jax.Array:
    """What `optax.apply_updates` leaves."""
    return (params + update).astype(params.dtype)


def frobenius(matrix: jax.Array) -> jax.Array:
    """Frobenius' norm, in units of the largest entry first: squares overflow before it does."""
    inside, unit = in_unit(matrix)
    return unit * jnp.sqrt(jnp.sum(inside**2))


def tiny(array: jax.Array) -> float:
    """The smallest normal number: stands for 0 where a logarithm or a quotient is taken."""
    return float(jnp.finfo(array.dtype).tiny)


def project(
    projection: str,
    layer: Layer,
    params: jax.Array,
    update: jax.Array,
    raw: jax.Array,
    vectors: jax.Array,
    bound: jax.Array,
    cap: jax.Array,
    act: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The update that leaves a matrix within its cap as stored; its bound and vectors."""
    ratio = bound / cap
    matrix, reached = raw, bound
    if projection == "clip":
        matrix, reached, vectors = jax.lax.cond(act, _clipped, _unclipped, raw, bound, cap, vectors)
    if projection == "soft":
        # the value is the certified bound's, the derivative that of the norm
        norm = _smooth_norm(raw, vectors[0])
        ratio = ratio * norm / jnp.where(norm > 0, jax.lax.stop_gradient(norm), 1)
        wanted = _soft(ratio)
    else:
        # less the rounding of the leaf's dtype, as it is on average
        rounding = float(jnp.finfo(params.dtype).eps) / 4 * frobenius(raw)
        size = jnp.maximum(reached + rounding, cap)
        wanted = cap / jnp.where(size > 0, size, 1)
    held, old = jax.lax.stop_gradient((matrix, params))

    def stored_bound(factor: jax.Array) -> jax.Array:
        """Bound of the matrix as stored: rounding is measured, not assumed."""
        left = stored(old, _move(layer, factor, held, old, update.dtype))
        return factor * reached + coarse_bound(layer.matrix(left) - factor * held)

    def too_long(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return act & (carry[0] > 0) & (carry[1] > cap)

    def shorten(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        factor, size, tries = carry
        factor = factor * jnp.where(tries < 4, (1 - 1e-6) * cap / size, 0.5)
        # the zero matrix fits every cap
        factor = jnp.where(tries < 30, factor, 0)
        return factor, stored_bound(factor), tries + 1

    first = jax.lax.stop_gradient(wanted).astype(raw.dtype)
    start = (first, stored_bound(first), jnp.zeros((), jnp.int32))
    factor, size, _ = jax.lax.while_loop(too_long, shorten, start)
    if projection == "soft":
        # the ratio first: the product of two tiny factors is flushed to zero
        factor = factor * (wanted / jnp.where(first > 0, first, 1))
    moved = _move(layer, factor, matrix, params, update.dtype)
    return jnp.where(act, moved, update), jnp.where(act, size, bound), vectors


def _soft(ratio: jax.Array) -> jax.Array:
    """(1 + ratio^8)^(-1/8) without the overflow of a power."""
    above = ratio > 1
    small = jnp.where(above, 1 / jnp.where(above, ratio, 1), ratio)
    bend = (1 + small**SHARPNESS) ** (-1 / SHARPNESS)
    return jnp.where(above, small * bend, bend)


def _move(
    layer: Layer, factor: jax.Array, matrix: jax.Array, params: jax.Array, dtype: Any
) -> jax.Array:
    """The update that turns `params` into `factor * matrix`, before rounding."""
    target = layer.leaf(factor * matrix, params)
    return (target - params.astype(target.dtype)).astype(dtype)


_Clip = tuple[jax.Array, jax.Array, jax.Array]  # matrix, its bound, singular vectors


def _unclipped(matrix: jax.Array, bound: jax.Array, cap: jax.Array, vectors: jax.Array) -> _Clip:
    del cap
    return matrix, bound, vectors


def _clipped(matrix: jax.Array, bound: jax.Array, cap: jax.Array, vectors: jax.Array) -> _Clip:
    r"""The matrix with singular values above `cap` cut to it, its bound, the directions cut.

    One direction after the other: $(I - (1 - \kappa/\sigma) v v^\top) A$ sets the value $\sigma$ of
    the singular vector v to kappa, and increases no singular value whatever v is. What is left
    above the cap, by more directions or by vectors that have not converged, the scaling takes.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    small = matrix.T if tall else matrix
    # in units of the bound: the squares of a Gram matrix leave float32 sooner than its root
    held, unit = in_unit(jax.lax.stop_gradient(small))
    size = bound / unit
    size = jnp.where(size > 0, size, 1)
    held = held / size
    # so that the certificate, which is 0.5 % above the norm, finds it within the cap
    target = cap / unit / size
    target = target * (1 - 1e-2 * CERTAINTY) / (1 + CERTAINTY / 2)
    gram = matmul(held, held.T)
    keep = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def cut(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, jax.Array]:
        gram, keep = carry
        vector = gram_power(gram, start, CLIP_POWER_STEPS)
        image = matmul(gram, vector)
        square = vdot(vector, image)
        value = jnp.sqrt(jnp.maximum(square, tiny(square)))
        excess = jnp.maximum(1 - target / value, 0)
        # both sides of the Gram matrix, expanded: no product of matrices
        outer = jnp.outer(vector, image)
        gram = gram - excess * (outer + outer.T) + excess**2 * square * jnp.outer(vector, vector)
        along = matmul(vector, keep)
        return (gram, keep - excess * jnp.outer(vector, along)), vector

    (_, keep), vectors = jax.lax.scan(cut, (gram, keep), vectors)
    kept = matmul(keep, small)
    reached = spectral_bound(kept, vectors[0]).upper
    return kept.T if tall else kept, reached, vectors


def _smooth_norm(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Spectral norm, in the unit of the matrix, along a singular vector.

    The unit and the vector count as constant, as the norm's derivative is along it.
    """
    inside, _ = in_unit(matrix)
    tall = matrix.shape[0] > matrix.shape[1]
    image = matmul(inside, vector) if tall else matmul(vector, inside)
    return jnp.maximum(frobenius(image), tiny(image))
