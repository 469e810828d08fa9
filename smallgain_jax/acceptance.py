"""What makes a step acceptable: the majorizer's guard, sufficient decrease, and the angle.

All functions take pytrees shaped like the parameters and scalars; nothing here keeps state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
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


def armijo(
    trial: Callable[[jax.Array], Trial],
    value: jax.Array,
    *,
    decrease: float = 1e-4,
    shrink: float = 0.5,
    max_backtracks: int = 20,
) -> Search:
    """Backtrack from step 1 until `value` has decreased by `decrease` times the promised slope.

    (Armijo 1966; Nocedal and Wright, Numerical Optimization, algorithm 3.1.) Differentiable in both
    modes: the derivative is that of `trial` at the step found, because how often to shrink is
    piecewise constant. That, and a failure that is reported rather than taken, is why optax's line
    search does not serve. Without derivatives each candidate is evaluated once, in a batch too.

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
    one = jnp.ones((), value.dtype)
    # what a trial closes over must be an argument of the search, which has a derivative of its own
    closed = eqx.filter_closure_convert(trial, one)
    rule = _Rule(decrease, shrink, max_backtracks)
    last, step, accepted, backtracks = _search(closed, value, one, rule)
    return Search(last, step, accepted, backtracks)


class _Rule(NamedTuple):
    decrease: float
    shrink: float
    max_backtracks: int


_Found = tuple[Trial, jax.Array, jax.Array, jax.Array]  # trial, step, accepted, backtracks


@eqx.filter_custom_jvp
def _search(
    trial: Callable[[jax.Array], Trial], value: jax.Array, start: jax.Array, rule: _Rule
) -> _Found:
    resolution = jnp.finfo(value.dtype).eps * jnp.abs(value)

    def searching(carry: tuple[_Found, jax.Array]) -> jax.Array:
        (_, step, accepted, backtracks), slope = carry
        # a promise below the rounding of `value` can be neither kept nor broken
        audible = -slope * step > resolution
        return (backtracks < 0) | (~accepted & audible & (backtracks < rule.max_backtracks))

    def attempt(carry: tuple[_Found, jax.Array]) -> tuple[_Found, jax.Array]:
        (_, step, _, backtracks), slope = carry
        step = jnp.where(backtracks < 0, step, step * rule.shrink)
        candidate = trial(step)
        promised = rule.decrease * jnp.minimum(candidate.slope, 0)
        accepted = jnp.isfinite(candidate.value) & (candidate.value <= value + promised)
        slope = jnp.where(backtracks < 0, candidate.slope, slope)
        return (candidate, step, accepted, backtracks + 1), slope

    # the loop makes the first attempt too: a program holds `trial` once
    nothing = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), eqx.filter_eval_shape(trial, start)
    )
    none_yet = (nothing, start, jnp.zeros((), bool), jnp.full((), -1, jnp.int32))
    return jax.lax.while_loop(searching, attempt, (none_yet, nothing.slope))[0]


@_search.def_jvp  # type: ignore[untyped-decorator]
def _search_jvp(primals: Any, tangents: Any) -> tuple[_Found, Any]:
    """The derivative of the trial at the step that was found."""
    trial, value, start, rule = primals
    _, step, accepted, backtracks = _search(trial, value, start, rule)
    last, moves = eqx.filter_jvp(lambda at: at(step), (trial,), tangents[:1])
    return (last, step, accepted, backtracks), (moves, None, None, None)
