"""Hoyer's scale-invariant sparsity."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smallgain_jax.penalties.base import (
    Schedule,
    StrengthPenalty,
    over,
    over_square,
    read_weight,
)


class Hoyer(StrengthPenalty):
    r"""Hoyer sparsity, $p(x) = \lambda (\|x\|_1/\|x\|_2 - 1) / (\sqrt{n} - 1)$, and 0 at x = 0.

    Between 0 (one entry left) and lambda (all magnitudes equal), at every scale of x; n counts all
    entries of x. Derivatives take sign(0) = 0. The Hessian is dense; with $u = x/\|x\|_2$, s the
    signs of x, $f = s \cdot u$ and $t = s - f u$ it is
    $-\frac{A}{\|x\|_2^2} (f (I - u u^T) + t u^T + u t^T)$, $A = \lambda/(\sqrt n - 1)$, whose
    extreme eigenvalues lie in the plane of u and t. The majorizer is its spectral norm in each row,
    $\frac{A}{2 \|x\|_2^2} (f + \sqrt{f^2 + 4 \|t\|^2})$, in O(n), cut at the largest number of the
    dtype.

    The bound is one at x only: across a sign change p has a kink, which no quadratic bounds.
    `majorized_step` therefore stops an entry that would change its sign at 0. Then it descends
    whatever the diagonal, hence for every omega: inside an orthant p is a linear function over a
    norm, so quasi-concave, and $\nabla p(x) \cdot (y - x) \le 0$ gives $p(y) \le p(x)$.

    Args:
      weight: factor of the strength, float scalar >= 0, or an optax schedule (see `at_step`).

    Log-parameters: strength.

    Raises:
      ValueError: weight negative or not finite; on use, an x with fewer than two entries.

    Source: Hoyer (2004), Non-negative matrix factorization with sparseness constraints, section 3
    (one minus his measure); Boyd and Vandenberghe (2004), Convex optimization, section 3.4.3, for
    the condition on quasi-concave functions.

    >>> p = Hoyer()
    >>> p(jnp.array([1.0, -1.0, 1.0, 1.0])).item(), p(jnp.array([0.0, 5.0])).item()
    (1.0, 0.0)
    """

    weight: jax.Array
    log_parameters: jax.Array
    schedule: Schedule | None = eqx.field(static=True)

    def __init__(self, *, weight: ArrayLike | Schedule = 1.0) -> None:
        self.weight, self.schedule = read_weight(weight)
        self.log_parameters = jnp.zeros((1,), self.weight.dtype)

    def _prepare(self, x: ArrayLike) -> jax.Array:
        array = super()._prepare(x)
        if array.size < 2:
            raise ValueError(f"x has {array.size} entries, but Hoyer needs n > 1")
        return array

    def _factor(self, x: jax.Array) -> jax.Array:
        return self._strength(x) / (x.size**0.5 - 1)

    def _value(self, x: jax.Array) -> jax.Array:
        shape = _shape(x)
        ratio = jnp.sum(shape.x * shape.sign) / jnp.sqrt(jnp.sum(shape.x**2))
        return self._factor(x) * jnp.where(shape.is_zero, 0, ratio - 1)

    def hessian_diagonal(self, x: ArrayLike) -> None:
        """None: the Hessian is dense, and its diagonal alone says little about it; use `hvp`."""
        self._prepare(x)

    def _majorizer(self, x: jax.Array) -> jax.Array:
        shape = _shape(x)
        norm = jnp.sqrt(jnp.sum(shape.x**2))
        f = jnp.sum(shape.x * shape.sign) / norm
        t_square = jnp.maximum(jnp.sum(shape.sign**2) - f * f, 0)
        top = (f + jnp.sqrt(f * f + 4 * t_square)) / 2
        rows = over_square(self._factor(x) * top, norm * shape.scale)
        return jnp.broadcast_to(jnp.where(shape.is_zero, 0, rows), x.shape)

    def _descend(self, x: jax.Array, step: jax.Array) -> jax.Array:
        moved = super()._descend(x, step)
        return jnp.where(jnp.sign(moved) * jnp.sign(x) < 0, 0, moved)


class _Shape(NamedTuple):
    x: jax.Array
    sign: jax.Array
    scale: jax.Array
    is_zero: jax.Array


def _shape(x: jax.Array) -> _Shape:
    """x over its largest magnitude, so that no square overflows or vanishes."""
    # p does not change with the scale, so neither do its derivatives if the scale is held fixed
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    is_zero = largest == 0
    scale = jnp.where(is_zero, 1, largest)
    # both branches stay finite at x = 0, or its gradient would be NaN
    scaled = jnp.where(is_zero, 1, over(x, scale))
    # the signs of x, because beside a large entry a small one may have been scaled to 0; and
    # x times its sign has derivative 0 at 0, where that of `jnp.abs` is 1
    return _Shape(scaled, jnp.where(is_zero, 1, jnp.sign(x)), scale, is_zero)
