"""What makes a step acceptable: the majorizer's guard, sufficient decrease, and the angle.

All functions take pytrees shaped like the parameters and scalars; nothing here keeps state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from smallgain_jax._tree import unit_of


def guard_scale(gradient: Any, update: Any, bend: jax.Array, target: ArrayLike) -> jax.Array:
    r"""Factor $\min(1,\; 2c\,\langle -g, u\rangle / b)$ that makes an update descend.

    With $b = \sum_r R_r u_r^2$ and $\operatorname{diag}(R)$ a majorizer of the Hessian on the
    segment, the scaled update decreases the objective by at least $(1 - c)\,\langle -g, u\rangle$
    times the factor, whatever optimizer it comes from. With $b = u^\top H u$, as measured by
    `directional_curvature`, the same holds as far as the objective is quadratic along u. An ascent
    direction is scaled to zero.

    Args:
      gradient, update: g and u, pytrees of the same shapes.
      bend: b, scalar, non-negative.
      target: c in (0, 1).

    Returns:
      A scalar in [0, 1]; 0 for a non-finite update.

    >>> guard_scale(jnp.array([1.0]), jnp.array([-1.0]), jnp.array(4.0), 0.5).item()
    0.25
    """
    descent = -optax.tree.vdot(gradient, update)
    usable = jnp.isfinite(descent) & jnp.isfinite(bend) & (descent > 0)
    bent = usable & (bend > 0)
    ratio = 2 * target * jnp.where(bent, descent, 1) / jnp.where(bent, bend, 1)
    return jnp.where(usable, jnp.where(bent, jnp.minimum(ratio, 1), 1), 0)


def directional_curvature(fn: Callable[[Any], jax.Array], x: Any, direction: Any) -> jax.Array:
    """Second derivative of `fn` along `direction` at x: two nested forward passes, no Hessian.

    >>> directional_curvature(lambda x: jnp.sum(x**2), jnp.array([1.0, 2.0]), jnp.ones(2)).item()
    4.0
    """

    def slope(at: Any) -> jax.Array:
        return jax.jvp(fn, (at,), (direction,))[1]

    return jax.jvp(slope, (x,), (direction,))[1]


def trusted_curvature(measured: jax.Array, majorized: jax.Array) -> jax.Array:
    """A curvature measured along a direction, or the majorizer's where it is lost in rounding.

    Second derivatives are sums over terms as large as the majorizer's: below 100 eps of that they
    are noise, or negative. Nothing else is a reason to distrust a small one: the smooth directions
    of a large graph are as much softer than its rows as its condition number says.

    >>> trusted_curvature(jnp.array(2**-10), jnp.array(4.0)).item()
    0.0009765625
    >>> trusted_curvature(jnp.array(-1.0), jnp.array(4.0)).item()
    4.0
    """
    noise = 100 * jnp.finfo(jnp.result_type(measured)).eps * majorized
    return jnp.where(measured > noise, measured, majorized)


def cosine(a: Any, b: Any) -> jax.Array:
    """Cosine of the angle between two pytrees, a scalar; 0 where either vanishes.

    >>> round(cosine(jnp.array([3.0, 0.0]), jnp.array([3.0, 4.0])).item(), 6)
    0.6
    """
    # squares leave the range of numbers long before what is squared does
    a, b = _in_its_unit(a), _in_its_unit(b)
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return jnp.where(norms > 0, optax.tree.vdot(a, b) / jnp.where(norms > 0, norms, 1), 0)


def _in_its_unit(tree: Any) -> Any:
    """A pytree divided by its `unit_of`."""
    unit = unit_of(*jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), tree)
