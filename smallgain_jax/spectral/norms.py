r"""Certified bounds on the spectral norm of a matrix, above and below."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._compiling import at_once
from smallgain_jax._show import shows
from smallgain_jax._tree import matmul, unit_of, vdot

CERTAINTY = 0.01
"""By how much the square of a certified bound first tries to exceed its estimate."""


@shows()
class SpectralBound(NamedTuple):
    """Two sides of a matrix's spectral norm."""

    upper: jax.Array  # [] at least the norm, up to rounding that it is inflated for
    lower: jax.Array  # [] at most the norm: power iteration
    vector: jax.Array  # [min(m, n)] unit vector, where the next power iteration may start


def in_unit(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`array` over its `unit_of`, and that unit: magnitudes of at most 8 where they are finite."""
    unit = unit_of(array)
    # a second division of the same array may not be merged with this one: the product of the two
    # divisors leaves the range, and a matrix of large entries would count as 0 (seen on a GPU)
    return jax.lax.optimization_barrier(array / unit), unit


def _flushed(matrix: jax.Array) -> jax.Array:
    """A bound of what compiled code leaves out: it takes numbers below the normal ones for 0."""
    tiny = jnp.finfo(matrix.dtype).tiny
    integer = np.dtype(f"int{8 * matrix.dtype.itemsize}")
    # by the bits, because a comparison takes them for 0, too
    bits = jax.lax.bitcast_convert_type(matrix, integer) & jnp.iinfo(integer).max
    normal = np.asarray(tiny, matrix.dtype).view(integer)
    lost = jnp.any((bits > 0) & (bits < normal))
    return jnp.where(lost, tiny * float(np.sqrt(matrix.size)), 0).astype(matrix.dtype)


def _real(matrix: jax.Array) -> jax.Array:
    """The matrix itself, or the real one of twice its size that has the same norm."""
    if not jnp.iscomplexobj(matrix):
        return matrix
    real, imag = jnp.real(matrix), jnp.imag(matrix)
    return jnp.block([[real, -imag], [imag, real]])


def coarse_bound(matrix: jax.Array) -> jax.Array:
    r"""Upper bound $\min(\|A\|_F, \sqrt{\|A\|_1 \|A\|_\infty})$ of the spectral norm, in O(mn).

    (Golub and Van Loan, *Matrix Computations*, section 2.3.) Inflated for the rounding of its sums;
    infinite where it exceeds the largest number, not finite where an entry is not.

    >>> round(coarse_bound(jnp.eye(4)).item(), 4)
    1.0
    """
    matrix = _real(matrix)
    inside, unit = in_unit(matrix)
    return _coarse(inside) * unit + _flushed(matrix)


def _coarse(inside: jax.Array) -> jax.Array:
    """`coarse_bound` of a matrix in its unit."""
    size = jnp.abs(inside)
    frobenius = jnp.sqrt(jnp.sum(size**2))
    columns = jnp.max(jnp.sum(size, axis=0), initial=0.0)
    rows = jnp.max(jnp.sum(size, axis=1), initial=0.0)
    return jnp.minimum(frobenius, jnp.sqrt(columns * rows)) * inflation(inside)


@at_once("power_steps")
def spectral_bound(
    matrix: jax.Array, vector: jax.Array | None = None, power_steps: int = 12
) -> SpectralBound:
    r"""Certify an upper bound of $\|A\|_2$ close above a power iteration's estimate from below.

    With G the smaller Gram matrix of A, power iteration gives $\lambda \le \lambda_{\max}(G)$, and
    a Cholesky factorization of $(1 + \delta)\lambda I - G$ that succeeds proves
    $\lambda_{\max}(G) \le (1 + \delta)\lambda$ (Rump, *Verification of positive definiteness*, BIT
    2006). $\delta$ starts at 1 % and is quadrupled until it does, or until Gershgorin's bound of G,
    its Frobenius norm, or `coarse_bound` of A is reached. So upper^2 is at most the larger of
    1.01 lower^2 and 4 ||A||^2 - 3 lower^2: within 0.5 % once the vector has converged.

    Args:
      matrix: A, float or complex [m, n]. A complex one counts as the real one of twice its size,
        [[Re, -Im], [Im, Re]], which has the same norm.
      vector: start of the power iteration, [min(m, n)]; None takes a fixed one.
      power_steps: products with G, static.

    Returns:
      A `SpectralBound`; a matrix of zeros, or without entries, has bounds 0. The upper bound is
      infinite where it exceeds the largest number, and NaN or infinite where an entry of A is not
      finite. Entries below the smallest normal number, which compiled code takes for 0, count in
      the upper bound by what they may be at most.

    >>> bound = spectral_bound(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
    >>> bool(bound.lower <= 3.0 <= bound.upper <= 3.02)
    True
    """
    matrix = _real(jax.lax.stop_gradient(matrix))
    size = min(matrix.shape)
    start = start_vector(size, matrix.dtype) if vector is None else vector
    if size == 0:
        nothing = jnp.zeros((), matrix.dtype)
        return SpectralBound(nothing, nothing, start)
    inside, unit = in_unit(matrix)
    coarse = _coarse(inside)
    inside = inside / jnp.where(coarse > 0, coarse, 1)
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matmul(inside.T, inside) if tall else matmul(inside, inside.T)

    vector = gram_power(gram, start, power_steps)
    image = matmul(gram, vector)
    estimate = jnp.minimum(vdot(vector, image) / vdot(vector, vector), 1)
    certain = jnp.minimum(jnp.max(jnp.sum(jnp.abs(gram), axis=1)), jnp.sqrt(jnp.sum(gram**2)))
    square = _proven(gram, estimate, jnp.minimum(certain, 1))
    largest = jnp.finfo(matrix.dtype).max
    upper = jnp.minimum(jnp.sqrt(square) * inflation(matrix), 1) * coarse * unit
    lower = jnp.sqrt(jnp.maximum(estimate, 0)) / inflation(matrix) * coarse * unit
    # numbers below the smallest normal one are rounded by more than `inflation` covers
    lower = jnp.where(lower < jnp.finfo(matrix.dtype).tiny, 0, lower)
    return SpectralBound(upper + _flushed(matrix), jnp.minimum(lower, largest), vector)


def _proven(gram: jax.Array, estimate: jax.Array, certain: jax.Array) -> jax.Array:
    """A bound of the largest eigenvalue, above `estimate` and at most `certain`."""

    def unproven(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        delta, proven = carry
        return ~proven & ((1 + delta) * estimate < certain)

    def prove(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta = 4 * carry[0]
        shifted = (1 + delta) * estimate * jnp.eye(gram.shape[0], dtype=gram.dtype) - gram
        factor = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)
        return delta, jnp.all(jnp.isfinite(jnp.diagonal(factor)))

    first = (jnp.asarray(CERTAINTY / 4, gram.dtype), jnp.zeros((), bool))
    delta, proven = jax.lax.while_loop(unproven, prove, first)
    return jnp.where(proven, jnp.minimum((1 + delta) * estimate, certain), certain)


def start_vector(size: int, dtype: Any, seed: int = 0) -> jax.Array:
    """A fixed unit vector without symmetry."""
    start = np.random.default_rng(seed).standard_normal(size)
    return jnp.asarray(start / np.linalg.norm(start), dtype)


def inflation(matrix: jax.Array) -> float:
    """Covers, to first order, the rounding of sums over a matrix's rows and columns."""
    return 1 + float(jnp.finfo(matrix.dtype).eps) * (8 + sum(matrix.shape))


def gram_power(gram: jax.Array, start: jax.Array, steps: int) -> jax.Array:
    """Power iteration; a vector that `gram` annihilates stays."""

    def multiply(_: int, v: jax.Array) -> jax.Array:
        image = matmul(gram, v)
        norm = jnp.sqrt(jnp.sum(image**2))
        return jnp.where(norm > 0, image / jnp.where(norm > 0, norm, 1), v)

    return jax.lax.fori_loop(0, steps, multiply, start)
