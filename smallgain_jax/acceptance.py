"""What makes a step acceptable: the majorizer's guard, sufficient decrease, and the angle.

All functions take pytrees shaped like the parameters and scalars; nothing here keeps state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class Box(NamedTuple):
    """The set lower <= x <= upper; either end may be infinite, a scalar, or shaped like x."""

    lower: Any
    upper: Any

    def project(self, x: Any) -> Any:
        """The nearest point of the box, leaf by leaf in the leaf's dtype."""
        return jax.tree.map(
            lambda leaf: jnp.clip(
                leaf, jnp.asarray(self.lower, leaf.dtype), jnp.asarray(self.upper, leaf.dtype)
            ),
            x,
        )

    def blocks(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        """Where a bound holds and `direction` points out of it, bool like x."""
        return ((x <= self.lower) & (direction < 0)) | ((x >= self.upper) & (direction > 0))


class Trial(NamedTuple):
    """A candidate of a line search."""

    value: jax.Array  # []  the declared objective there
    slope: jax.Array  # []  <gradient, candidate - params>: the decrease that first order promises
    aux: Any  # whatever the caller wants from the accepted candidate


class Search(NamedTuple):
    """Outcome of `armijo`."""

    trial: Trial  # the last candidate, accepted or not
    step: jax.Array  # [] its step length
    accepted: jax.Array  # [] bool
    backtracks: jax.Array  # [] int32, evaluations beyond the first


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


def cosine(a: Any, b: Any) -> jax.Array:
    """Cosine of the angle between two pytrees, a scalar; 0 where either vanishes.

    >>> round(cosine(jnp.array([3.0, 0.0]), jnp.array([3.0, 4.0])).item(), 6)
    0.6
    """
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return jnp.where(norms > 0, optax.tree.vdot(a, b) / jnp.where(norms > 0, norms, 1), 0)


_Shortening = tuple[jax.Array, jax.Array, jax.Array]  # step, backtracks, accepted


def armijo(
    trial: Callable[[jax.Array], Trial],
    value: jax.Array,
    *,
    decrease: float = 1e-4,
    shrink: float = 0.5,
    max_backtracks: int = 20,
) -> Search:
    """Backtrack from step 1 until `value` has decreased by `decrease` times the promised slope.

    (Armijo 1966; Nocedal and Wright, Numerical Optimization, algorithm 3.1.) Reverse-mode
    differentiable: the loop only chooses how often to shrink, which is piecewise constant. That,
    and a failure that is reported rather than taken, is why optax's line search does not serve.

    Args:
      trial: candidate at a step length.
      value: the declared objective at the parameters, scalar.
      decrease: fraction of the slope that must be realized, in (0, 1).
      shrink: factor per backtrack, in (0, 1).
      max_backtracks: the search fails beyond these.

    Returns:
      A `Search`; `accepted` is False when no candidate was good enough, `value` is not finite, or
      the promised decrease is lost in its rounding.
    """

    def good(candidate: Trial) -> jax.Array:
        promised = jnp.minimum(candidate.slope, 0)
        return jnp.isfinite(candidate.value) & (candidate.value <= value + decrease * promised)

    def shorten(carry: _Shortening) -> _Shortening:
        step, backtracks, _ = carry
        step = step * shrink
        return step, backtracks + 1, good(jax.lax.stop_gradient(trial(step)))

    first = trial(jnp.ones((), value.dtype))
    resolution = jnp.finfo(value.dtype).eps * jnp.abs(value)

    def searching(carry: _Shortening) -> jax.Array:
        step, backtracks, accepted = carry
        # a promise below the rounding of `value` can be neither kept nor broken
        audible = -first.slope * step > resolution
        return ~accepted & audible & (backtracks < max_backtracks)

    start = (jnp.ones((), value.dtype), jnp.zeros((), jnp.int32), good(first))
    step, backtracks, accepted = jax.lax.while_loop(searching, shorten, start)
    last = jax.lax.cond(backtracks > 0, lambda: trial(step), lambda: first)
    return Search(last, step, accepted, backtracks)
