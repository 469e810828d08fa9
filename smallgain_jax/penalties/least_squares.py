"""Iteratively reweighted least squares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smallgain_jax._checks import check_finite
from smallgain_jax._show import shows
from smallgain_jax._tree import matmul
from smallgain_jax.penalties.base import wide
from smallgain_jax.penalties.separable import LogSparsity, SmoothedL1

_Pair = tuple[jax.Array, jax.Array]


@shows()
class LeastSquaresResult(NamedTuple):
    """Outcome of `reweighted_least_squares`. n unknowns."""

    x: jax.Array  # [n]
    values: jax.Array  # [steps + 1] the objective, start included; never increases
    stationarity: jax.Array  # [] largest entry of |gradient| at x


def reweighted_least_squares(
    penalty: SmoothedL1 | LogSparsity,
    matrix: ArrayLike,
    target: ArrayLike,
    x0: ArrayLike,
    steps: int = 50,
) -> LeastSquaresResult:
    r"""Minimize $\tfrac12 \|A x - b\|^2 + p(x)$ by solving with the majorizer of p in its place.

    Both penalties have $\nabla p(x) = D(x) x$ and are concave in the squares, so that
    $p(y) \le p(x) + \tfrac12 (y \cdot D(x) y - x \cdot D(x) x)$ for every y. The minimizer of
    this bound plus the squares, $x \leftarrow (A^T A + D(x))^{-1} A^T b$, therefore never
    increases the objective, and where it stays is a stationary point. As the objective of
    `LogSparsity` is not convex, which one depends on the start. A step whose computed value is
    larger, by rounding, is not taken.

    Args:
      penalty: p, of positive weight. The bound of the other penalties is one at x only.
      matrix: A, float [m, n].
      target: b, float [m].
      x0: start, float [n].
      steps: number of solves, static; each costs O(mn min(m, n)).

    Returns:
      `LeastSquaresResult(x [n], values [steps + 1], stationarity)`.

    Raises:
      TypeError: another penalty.
      ValueError: shapes that do not match, concrete entries that are not finite, negative steps.

    Source: Daubechies, DeVore, Fornasier and Güntürk (2010), Iteratively reweighted least squares
    minimization for sparse recovery; Chartrand and Yin (2008), Iteratively reweighted algorithms
    for compressive sensing, for the logarithm.

    >>> penalty = SmoothedL1(eps=1e-6)
    >>> result = reweighted_least_squares(penalty, jnp.eye(2), [3.0, 0.5], jnp.ones(2))
    >>> result.x.round(3).tolist()
    [2.0, 0.0]
    """
    if not isinstance(penalty, SmoothedL1 | LogSparsity):
        raise TypeError(f"penalty must be SmoothedL1 or LogSparsity, got {type(penalty).__name__}")
    a, b, start = wide("matrix", matrix), wide("target", target), wide("x0", x0)
    if a.ndim != 2:
        raise ValueError(f"matrix has shape {a.shape}, expected [m, n]")
    for name, array, length in (("target", b, a.shape[0]), ("x0", start, a.shape[1])):
        if array.shape != (length,):
            raise ValueError(f"{name} has shape {array.shape}, expected ({length},)")
    for name, array in (("matrix", a), ("target", b), ("x0", start)):
        check_finite(name, array)
    if steps < 0:
        raise ValueError(f"steps = {steps} must not be negative")
    dtype = jnp.result_type(a, b, start)
    a, b, start = a.astype(dtype), b.astype(dtype), start.astype(dtype)

    def objective(x: jax.Array) -> jax.Array:
        return jnp.sum((matmul(a, x) - b) ** 2) / 2 + penalty(x)

    def step(carry: _Pair, _: None) -> tuple[_Pair, jax.Array]:
        x, value = carry
        candidate = _solve(a, b, penalty.majorizer_diagonal(x))
        reached = objective(candidate)
        down = reached <= value
        value = jnp.where(down, reached, value)
        return (jnp.where(down, candidate, x), value), value

    first = objective(start)
    (x, _), values = jax.lax.scan(step, (start, first), length=steps)
    gradient = jax.grad(objective)(x)
    return LeastSquaresResult(
        x, jnp.concatenate([first[None], values]), jnp.max(jnp.abs(gradient), initial=0.0)
    )


def _solve(a: jax.Array, b: jax.Array, rows: jax.Array) -> jax.Array:
    """(A^T A + D)^-1 A^T b; D spans many orders, but scaled by its root no pivot is below 1."""
    root = jnp.sqrt(rows)
    scaled = a / root[None]
    m, n = a.shape
    if m < n:
        inner = matmul(scaled, scaled.T) + jnp.eye(m, dtype=a.dtype)
        return matmul(scaled.T, jax.scipy.linalg.solve(inner, b, assume_a="pos")) / root
    inner = matmul(scaled.T, scaled) + jnp.eye(n, dtype=a.dtype)
    return jax.scipy.linalg.solve(inner, matmul(scaled.T, b), assume_a="pos") / root
