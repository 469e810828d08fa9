"""One step's surroundings: what is known where it starts, its prices, its line search."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import vdot
from smallgain_jax.graphs.objective import Objective
from smallgain_jax.search.armijo import Search, Trial, armijo
from smallgain_jax.search.box import Box

SUFFICIENT_ANGLE = 0.1
"""A direction must keep this share of the steepest one's slope, in the metric, or it restarts."""


class Here(NamedTuple):
    """The objective around the parameters."""

    objective: Objective
    x: jax.Array
    value: jax.Array  # []
    gradient: jax.Array  # like x, on held nodes too
    magnitude: jax.Array  # []
    rows: jax.Array  # like x
    box: Box

    @property
    def held(self) -> jax.Array:
        return self.box.blocks(self.x, -self.gradient)

    @property
    def free_gradient(self) -> jax.Array:
        return jnp.where(self.held, 0, self.gradient)


def prices_of(here: Here, gradient: jax.Array) -> jax.Array:
    """D, kept away from zero: no row asks for more than the width of the box."""
    rows, box = here.rows, here.box
    width = jnp.asarray(box.upper, rows.dtype) - jnp.asarray(box.lower, rows.dtype)
    reach = jnp.abs(gradient) / jnp.where(width > 0, width, 1)
    # only what has no curvature at all is measured by the others'
    floor = jnp.where(rows > 0, 0, jnp.finfo(rows.dtype).eps * jnp.max(rows, initial=0.0))
    prices = jnp.maximum(jnp.maximum(rows, reach), floor)
    return jnp.where(prices > 0, prices, 1)


def searched(here: Here, move: jax.Array, max_backtracks: int) -> Search:
    def trial(step: jax.Array) -> Trial:
        candidate = here.box.project(here.x + step * move)
        reached = here.objective.evaluate(candidate)
        finite = jnp.all(jnp.isfinite(reached.gradient))
        reached = reached._replace(value=jnp.where(finite, reached.value, jnp.inf))
        moved = candidate - here.x
        slope, end_slope = (vdot(g, moved) for g in (here.gradient, reached.gradient))
        return Trial(reached.value, slope, (moved, reached), end_slope)

    eps = jnp.finfo(here.value.dtype).eps
    resolution = eps * jnp.maximum(here.magnitude, jnp.abs(here.value))
    return armijo(trial, here.value, max_backtracks=max_backtracks, resolution=resolution)
