r"""Backtracking until the decrease is sufficient (Armijo 1966)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from smallgain_jax._tree import closed


class Trial(NamedTuple):
    """A candidate of a line search."""

    value: jax.Array  # []  the declared objective there
    slope: jax.Array  # []  <gradient, candidate - params>: the decrease that first order promises
    aux: Any  # whatever the caller wants from the accepted candidate
    end_slope: Any = None  # [] <gradient there, candidate - params>, where the caller knows it


class Search(NamedTuple):
    """Outcome of `armijo`."""

    trial: Trial  # the last candidate, accepted or not
    step: jax.Array  # [] its step length
    accepted: jax.Array  # [] bool
    backtracks: jax.Array  # [] int32, evaluations beyond the first


def armijo(
    trial: Callable[[jax.Array], Trial],
    value: jax.Array,
    *,
    decrease: float = 1e-4,
    shrink: float = 0.5,
    max_backtracks: int = 20,
    resolution: jax.Array | None = None,
) -> Search:
    r"""Backtrack from step 1 until `value` has decreased by `decrease` times the promised slope.

    (Armijo 1966; Nocedal and Wright, Numerical Optimization, algorithm 3.1.) Values that differ by
    less than their rounding say nothing. A trial that brings its `end_slope` is judged by the
    slopes there: the change $(\varphi'(0) + \varphi'(1)) / 2$ of the trapezoidal rule, exact on
    quadratics, has to be sufficient (the approximate condition of Hager and Zhang 2005, section 3).

    Differentiable in both modes: the derivative is that of `trial` at the step found, because how
    often to shrink is piecewise constant. That, and a failure that is reported rather than taken,
    is why optax's line search does not serve. Without derivatives each candidate is evaluated once,
    in a batch too.

    Args:
      trial: candidate at a step length.
      value: the declared objective at the parameters, scalar.
      decrease: fraction of the slope that must be realized, in (0, 1).
      shrink: factor per backtrack, in (0, 1).
      max_backtracks: the search fails beyond these.
      resolution: differences of the objective below this are rounding, scalar; None is eps times
        the value, which is too little where terms cancel in it.

    Returns:
      A `Search`; `accepted` is False when no candidate was good enough, `value` is not finite, or
      the promised decrease is lost in its rounding and no `end_slope` tells.
    """
    one = jnp.ones((), value.dtype)
    # what a trial closes over must be an argument of the search, which has a derivative of its own
    converted = closed(trial, one)
    rule = _Rule(decrease, shrink, max_backtracks)
    if resolution is None:
        resolution = jnp.finfo(value.dtype).eps * jnp.abs(value)
    last, step, accepted, backtracks = _search(converted, value, resolution, one, rule)
    return Search(last, step, accepted, backtracks)


class _Rule(NamedTuple):
    decrease: float
    shrink: float
    max_backtracks: int


_Found = tuple[Trial, jax.Array, jax.Array, jax.Array]  # trial, step, accepted, backtracks


@eqx.filter_custom_jvp
def _search(
    trial: Callable[[jax.Array], Trial],
    value: jax.Array,
    resolution: jax.Array,
    start: jax.Array,
    rule: _Rule,
) -> _Found:
    def searching(carry: tuple[_Found, jax.Array]) -> jax.Array:
        (last, step, accepted, backtracks), slope = carry
        # a promise below the rounding of `value` can be neither kept nor broken by values
        audible = -slope * step > resolution
        if last.end_slope is not None:
            audible |= last.slope < 0
        return (backtracks < 0) | (~accepted & audible & (backtracks < rule.max_backtracks))

    def attempt(carry: tuple[_Found, jax.Array]) -> tuple[_Found, jax.Array]:
        (_, step, _, backtracks), slope = carry
        step = jnp.where(backtracks < 0, step, step * rule.shrink)
        candidate = trial(step)
        promised = rule.decrease * jnp.minimum(candidate.slope, 0)
        sufficient = candidate.value <= value + promised
        if candidate.end_slope is not None:
            level = candidate.value <= value + resolution
            falls = (candidate.slope < 0) & (candidate.slope + candidate.end_slope <= 2 * promised)
            # a decrease within the rounding is believed to the slopes alone
            sufficient = jnp.where(value - candidate.value > resolution, sufficient, level & falls)
        accepted = jnp.isfinite(candidate.value) & sufficient
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
    trial, value, resolution, start, rule = primals
    _, step, accepted, backtracks = _search(trial, value, resolution, start, rule)
    last, moves = eqx.filter_jvp(lambda at: at(step), (trial,), tangents[:1])
    return (last, step, accepted, backtracks), (moves, None, None, None)
