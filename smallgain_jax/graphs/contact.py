r"""Which bounds hold: the minimum of a quadratic model over a box, before the objective is asked.

A step that is cut off at the box after the fact takes far too many nodes to a bound, and they come
back one layer of neighbours a step: only nodes next to free ones feel a pull. So steps grow with
the diameter of the contact. Here the contact is looked for on the model
$q(y) = -r^\top (y - x) + \frac12 (y - x)^\top M (y - x)$, whose products cost a small part of a
gradient, by conjugate directions on the free nodes, projected (GPCG; Moré and Toraldo 1991). Who is
let go from a bound is decided on every level at once: a node is, if it is pulled into the box, or
if an aggregate that it is in is, as a whole. That is the test by which a coarse level of a projected
full approximation scheme moves its contact (Brandt and Cryer 1983), and frees as many layers as the
pull can lift.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from smallgain_jax._tree import vdot
from smallgain_jax.search.box import Box

ROUNDS = 60
"""At most so many directions in one model: as a rule, 25 to 30 gain eight digits."""

HALVINGS = 30

SUFFICIENT = 1e-4
"""Share of the decrease promised by the slope that a projected direction has to keep (Armijo)."""


class Model(Protocol):
    """A convex quadratic, and what conditions it on some of the nodes."""

    def product(self, v: jax.Array) -> jax.Array:
        """M v, on all nodes."""

    def cycle(self, values: Any, free: jax.Array) -> Any:
        """A map r -> z near the inverse of M on the free nodes, with its `values`.

        It is made from `values` where those are of the same free nodes.
        """

    def lifts(self, pull: jax.Array) -> jax.Array:
        """Which nodes are in an aggregate whose pulls, the node's own included, sum above 0."""


class Minimum(NamedTuple):
    """An approximate minimum of a model over a box."""

    y: jax.Array  # like x, in the box
    left: jax.Array  # like x, -grad q(y)
    direction: jax.Array  # like x
    before: jax.Array  # like x, what was left on the free nodes one round ago
    norm: jax.Array  # [] <before, z>, 0 asks for a restart
    values: Any  # of the model's cycle
    rounds: jax.Array  # [] int32
    descends: jax.Array  # [] bool, the last direction did


def minimum(
    model: Model,
    x: jax.Array,
    gradient: jax.Array,
    box: Box,
    values: Any,
    precision: jax.Array,
    resolution: jax.Array,
    most: jax.Array,
) -> Minimum:
    """Directions until the projected gradient of the model is `precision` of that at x.

    Args:
      model: M, with its cycle.
      x: state in the box, [n] or [n, d].
      gradient: of the objective at x.
      box: of x.
      values: of an earlier cycle, or blank ones.
      precision: in (0, 1), scalar.
      resolution: a gradient below this is rounding, scalar.
      most: directions, at most; the first is what the cycle makes of the gradient.
    """

    def remaining(y: jax.Array, left: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(jnp.where(box.blocks(y, left), 0, left)), initial=0.0)

    wanted = jnp.maximum(precision * remaining(x, -gradient), resolution)

    def going(c: Minimum) -> jax.Array:
        return c.descends & (c.rounds < most) & (remaining(c.y, c.left) > wanted)

    def follow(c: Minimum) -> Minimum:
        return _round(model, box, c)

    zero = jnp.zeros_like(x)
    nothing, yes = jnp.zeros((), x.dtype), jnp.ones((), bool)
    begin = Minimum(x, -gradient, zero, zero, nothing, values, jnp.zeros((), jnp.int32), yes)
    return jax.lax.while_loop(going, follow, begin)


def _round(model: Model, box: Box, c: Minimum) -> Minimum:
    low, high = c.y <= box.lower, c.y >= box.upper
    pull = jnp.where(low, c.left, jnp.where(high, -c.left, 0))
    # a node between two equal bounds is at both
    held = (low & high) | ((low | high) & ~model.lifts(pull))
    cycle = model.cycle(c.values, ~held)
    free = jnp.where(held, 0, c.left)
    scaled = jnp.where(held, 0, cycle(free))
    norm = vdot(scaled, free)
    known = c.norm > 0
    beta = jnp.where(known, vdot(scaled, free - c.before) / jnp.where(known, c.norm, 1), 0)
    direction = scaled + jnp.maximum(beta, 0) * jnp.where(held, 0, c.direction)
    direction = jnp.where(box.blocks(c.y, direction), 0, direction)
    direction = jnp.where(vdot(direction, free) >= 0.1 * norm, direction, scaled)
    y, left, descends = _along(model, box, c, direction, vdot(direction, free))
    return Minimum(y, left, direction, free, norm, cycle.values, c.rounds + 1, descends)


def _along(
    model: Model, box: Box, c: Minimum, direction: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The minimum along a direction, cut to the box; halved until the model decreases enough."""
    bend = vdot(direction, model.product(direction))
    length = slope / jnp.where(bend > 0, bend, 1)

    def tried(t: jax.Array) -> tuple[jax.Array, ...]:
        y = box.project(c.y + t * direction)
        move = y - c.y
        image = model.product(move)
        promised = vdot(c.left, move)
        gain = promised - vdot(move, image) / 2
        return y, c.left - image, (gain > 0) & (gain >= SUFFICIENT * promised)

    def failing(carry: tuple[jax.Array, ...]) -> jax.Array:
        halvings, _, _, good = carry
        return ~good & (halvings < HALVINGS)

    def shorter(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        halvings = carry[0] + 1
        return halvings, *tried(length * 0.5 ** halvings.astype(length.dtype))

    start = (jnp.full((), -1, jnp.int32), c.y, c.left, jnp.zeros((), bool))
    _, y, left, good = jax.lax.while_loop(failing, shorter, start)
    return jnp.where(good, y, c.y), jnp.where(good, left, c.left), good


__all__ = ["Minimum", "Model", "minimum"]
