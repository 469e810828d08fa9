"""When a minimization has arrived, and why it ended."""

import enum

import jax
import jax.numpy as jnp

from smallgain_jax.search.box import Box


class RelaxStatus(enum.IntEnum):
    """Why a relaxation ended, as the int32 in `RelaxInfo.status`.

    >>> RelaxStatus(0).name
    'CONVERGED'
    """

    CONVERGED = 0
    """The tolerance is met."""
    STEPS = 1
    """The steps are used up."""
    STALLED = 2
    """No step descends any more, as the optimizer's state tells: rounding, or a kink."""
    NOT_FINITE = 3
    """The energy or its gradient is NaN or infinite."""


def projected_step(x: jax.Array, gradient: jax.Array, rows: jax.Array, box: Box) -> jax.Array:
    r"""$\mathrm{clip}(-D^{-1} g,\; l - x,\; u - x)$, the step that the rows D favour.

    In units of x. It vanishes exactly at stationary points over the box, and does not change when
    the energy is multiplied by a number. (`P(x - D^{-1} g) - x` is the same, but rounds small steps
    to 0.) A row without curvature goes as far as the box lets it.
    """
    priced = rows > 0
    # the reciprocal, by which compiled code may divide, must not underflow
    farthest = jnp.finfo(x.dtype).max / 8
    step = jnp.where(priced, -gradient / jnp.where(priced, rows, 1), -farthest * jnp.sign(gradient))
    return jnp.clip(step, box.lower - x, box.upper - x)


def length_scale(x: jax.Array, step: jax.Array, box: Box) -> jax.Array:
    """What a step is small against, shaped like x: the box, or the start and its first step.

    The width of the box where it has one; elsewhere the largest entry of the start x or of its
    `projected_step`, whichever is larger.
    """
    width = jnp.asarray(box.upper, x.dtype) - jnp.asarray(box.lower, x.dtype)
    largest = jnp.maximum(jnp.max(jnp.abs(x), initial=0.0), jnp.max(jnp.abs(step), initial=0.0))
    return jnp.where(jnp.isfinite(width), width, largest)


def optimality(step: jax.Array, scale: jax.Array) -> jax.Array:
    """The largest entry of a `projected_step` relative to its `length_scale`, a scalar."""
    relative = jnp.abs(step) / jnp.where(scale > 0, scale, 1)
    return jnp.max(jnp.where(step == 0, 0, relative), initial=0.0)


def default_tolerance(dtype: jnp.dtype) -> float:
    """eps^(2/3): 4e-11 in double precision, 2e-5 in single.

    Energies alone tell steps apart down to the square root of eps; gradients, by which the last
    steps are accepted, down to a few eps. This lies between with room on both sides.
    """
    return float(jnp.finfo(dtype).eps) ** (2 / 3)
