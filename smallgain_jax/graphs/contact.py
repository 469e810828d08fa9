r"""Which bounds hold: the minimum of a quadratic model over a box, before the objective is asked.

A step that is cut off at the box after the fact takes far too many nodes to a bound, and they come
back one layer of neighbours a step: only nodes next to free ones feel a pull. So steps grow with
the diameter of the contact. Here the contact is looked for on the model
$q(y) = -r^\top (y - x) + \frac12 (y - x)^\top M (y - x)$, whose products cost a small part of a
gradient, by conjugate directions on the free nodes, projected (GPCG; Moré and Toraldo 1991). Who is
let go from a bound is decided on every level at once: a node is, if it is pulled into the box, or
if an aggregate that it is in is, as a whole. That is the test by which a coarse level of a
projected full approximation scheme moves its contact (Brandt and Cryer 1983), and frees as many
layers as the pull can lift.

The model may be wrong: whoever takes its minimum for a step has to look at the objective along it.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from smallgain_jax._tree import vdot
from smallgain_jax.graphs.step import SUFFICIENT_ANGLE
from smallgain_jax.search.box import Box

ROUNDS = 60
"""At most so many directions in one model: as a rule, 25 to 30 gain eight digits."""

HALVINGS = 30
"""Of a direction, before the search for the model's minimum ends where it is."""

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
    held: jax.Array  # bool like x, at a bound and to stay there
    direction: jax.Array  # like x
    before: jax.Array  # like x, what was left on the free nodes one round ago
    norm: jax.Array  # [] <before, z>, 0 asks for a restart
    rounds: jax.Array  # [] int32
    descends: jax.Array  # [] bool, the last direction did


def minimum(
    model: Model,
    x: jax.Array,
    gradient: jax.Array,
    box: Box,
    values: Any,
    *,
    precision: jax.Array,
    resolution: jax.Array,
    most: jax.Array,
) -> tuple[Minimum, Any]:
    """Directions until the projected gradient of the model is `precision` of that at x.

    Args:
      model: M, with its cycle.
      x: state in the box, [n] or [n, d].
      gradient: of the objective at x.
      box: of x.
      values: of an earlier cycle, or blank ones.
      precision: in (0, 1), scalar.
      resolution: what of a gradient is rounding, like x.
      most: directions, at most; the first is what the cycle makes of the gradient.

    Returns:
      The `Minimum`, and the values of the last cycle.
    """

    def remaining(y: jax.Array, left: jax.Array) -> jax.Array:
        settled = box.blocks(y, left) | (jnp.abs(left) <= resolution)
        return jnp.max(jnp.abs(jnp.where(settled, 0, left)), initial=0.0)

    wanted = precision * remaining(x, -gradient)

    def going(c: Minimum) -> jax.Array:
        return c.descends & (c.rounds < most) & (remaining(c.y, c.left) > wanted)

    def face(carry: tuple[Minimum, Any]) -> tuple[Minimum, Any]:
        """As long as the same nodes are held, the cycle is the same."""
        c, values = carry
        cycle = model.cycle(values, ~c.held)

        def staying(now: Minimum) -> jax.Array:
            return going(now) & jnp.all(now.held == c.held)

        return jax.lax.while_loop(staying, partial(_round, model, box, cycle), c), cycle.values

    zero, held = jnp.zeros_like(x), _held(model, box, x, -gradient)
    nothing, never = jnp.zeros((), x.dtype), jnp.zeros((), jnp.int32)
    begin = Minimum(x, -gradient, held, zero, zero, nothing, never, jnp.ones((), bool))
    return jax.lax.while_loop(lambda carry: going(carry[0]), face, (begin, values))


def _held(model: Model, box: Box, y: jax.Array, left: jax.Array) -> jax.Array:
    low, high = y <= box.lower, y >= box.upper
    # a node between two equal bounds is at both, and lifts nobody along
    fixed = low & high
    pull = jnp.where(fixed, 0, jnp.where(low, left, jnp.where(high, -left, 0)))
    return fixed | ((low | high) & ~model.lifts(pull))


def _round(model: Model, box: Box, cycle: Any, c: Minimum) -> Minimum:
    """One conjugate direction (Polak and Ribiere 1969) on the nodes that are not held."""
    free = jnp.where(c.held, 0, c.left)
    scaled = jnp.where(c.held, 0, cycle(free))
    norm = vdot(scaled, free)
    known = c.norm > 0
    beta = jnp.where(known, vdot(scaled, free - c.before) / jnp.where(known, c.norm, 1), 0)
    direction = scaled + jnp.maximum(beta, 0) * jnp.where(c.held, 0, c.direction)
    direction = jnp.where(box.blocks(c.y, direction), 0, direction)
    direction = jnp.where(vdot(direction, free) >= SUFFICIENT_ANGLE * norm, direction, scaled)
    y, left, descends = _along(model, box, c, direction, vdot(direction, free))
    held = _held(model, box, y, left)
    return Minimum(y, left, held, direction, free, norm, c.rounds + 1, descends)


def _along(
    model: Model, box: Box, c: Minimum, direction: jax.Array, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The minimum along a direction, cut to the box; halved until the model decreases enough."""
    bend = vdot(direction, model.product(direction))
    length = slope / jnp.where(bend > 0, bend, 1)

    def failing(carry: _Tried) -> jax.Array:
        return ~carry.good & (carry.halvings < HALVINGS)

    def shorter(carry: _Tried) -> _Tried:
        halvings = carry.halvings + 1
        y = box.project(c.y + length * 0.5 ** halvings.astype(length.dtype) * direction)
        move = y - c.y
        image = model.product(move)
        promised = vdot(c.left, move)
        gain = promised - vdot(move, image) / 2
        return _Tried(halvings, y, c.left - image, (gain > 0) & (gain >= SUFFICIENT * promised))

    start = _Tried(jnp.full((), -1, jnp.int32), c.y, c.left, jnp.zeros((), bool))
    _, y, left, good = jax.lax.while_loop(failing, shorter, start)
    return jnp.where(good, y, c.y), jnp.where(good, left, c.left), good


class _Tried(NamedTuple):
    """A point along a direction."""

    halvings: jax.Array  # [] int32
    y: jax.Array
    left: jax.Array
    good: jax.Array  # [] bool, the model decreases enough


__all__ = ["Minimum", "Model", "minimum"]
