r"""Whether training has lost its way, told by the loss at two points on one batch.

Losses of different batches differ by noise, and their ratios mean nothing where a loss may be
negative or start at zero. So the present parameters are compared with an anchor, where training
stood a while ago, **on the same batch**: constants added to a loss, the noise of its batches and a
change of the objective cancel. What counts as a rise is measured by the typical difference between
the two, a moving average of $|F(\theta) - F(\theta_{anchor})|$.

A rise of more than `OUT` typical differences, and of more than a quarter of all the progress so far
(a network at the edge of stability has spikes that heal by themselves), is a rout when a second
batch confirms it: parameters
and base optimizer go back to the anchor, and steps are a quarter as long from then on, which fades
by 0.1 % an update. Momentum that was built up on the way out goes with them, which no factor on the
step can achieve. A transformation that comes after this one and changes its updates would change
the way back, too: whether the anchor was reached is looked at, and if not, nothing is rewound any
more.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._show import shows
from smallgain_jax._tree import safe_norm, select, zero_count

OUT = 10.0
"""Typical differences beyond which a rise is no ordinary one: losses have tails like exp(-x)."""
LOST = 0.25
"""Part of the progress so far that must be lost: a spike over a loss near zero is no divergence."""
USUAL = 3.0
"""Typical differences beyond which one counts as so many: the scale may not follow a divergence."""
ROUNDING = 32
"""Units in the last place of the loss that a difference must exceed to be one."""
CONFIRMED = 2
"""Checks in a row that must find such a rise: one batch may be an outlier."""
LEARNING = 5
"""Checks that set the scale of differences; where all of them rise, and the last one no less than
before, there is no scale to learn."""
PATIENCE = 20
"""Checks after which a kick should have died away: where not one of them has found the loss below
that at the start, nothing was ever won."""
FOLLOW = 0.1
"""Weight of the newest difference in the typical one."""
ARRIVED = 0.05
"""Part of the way back that may be missing: parameters of few bits round it."""
REGROWTH = 1.001
"""Per update: a quarter of a step is whole again after 1,387."""


@shows()
class WatchState(NamedTuple):
    """What is remembered between two checks."""

    anchor: Any  # (params, base_state) where training stood; () for none
    typical: jax.Array  # [] difference of the total loss between anchor and now
    progress: jax.Array  # [] by which the loss has fallen from the first anchor to this one
    checks: jax.Array  # [] int32, since the scale was last learnt anew
    rises: jax.Array  # [] int32, of these, how many found a higher loss than at the anchor
    suspect: jax.Array  # [] int32, checks in a row that found a rise beyond `OUT`
    backoff: jax.Array  # [] factor on steps, in (0, 1]
    way: jax.Array  # [] length of the way back that the last update asked for; 0 for none
    lost: jax.Array  # [] bool, whether such a way did not lead to the anchor


class Verdict(NamedTuple):
    """What a check concludes."""

    watch: WatchState  # with the anchor still where it was
    rewind: jax.Array  # [] bool, go back to the anchor
    advance: jax.Array  # [] bool, the anchor moves here


def first_watch(params: Any, base_state: Any, dtype: Any, on: bool) -> WatchState:
    """Before the first update; the anchor is a copy, for what it copies may be donated."""
    anchor = jax.tree.map(jnp.array, (params, base_state)) if on else ()
    zero = jnp.zeros((), dtype)
    return WatchState(
        anchor=anchor,
        typical=zero,
        progress=jnp.array(zero),
        checks=zero_count(),
        rises=zero_count(),
        suspect=zero_count(),
        backoff=jnp.ones((), dtype),
        way=jnp.array(zero),
        lost=jnp.zeros((), bool),
    )


def judge(watch: WatchState, here: jax.Array, there: jax.Array, safe: jax.Array) -> Verdict:
    """Compare the total loss here with that at the anchor, both on one batch.

    Args:
      watch: the state so far.
      here: F at the present parameters [], possibly not finite.
      there: F at the anchor [], on the same batch.
      safe: [] a factor at which the base optimizer is known to be stable; 1 where none is known.
    """
    known = jnp.isfinite(there)
    lost = known & ~jnp.isfinite(here)
    rise = jnp.where(known & ~lost, here - there, 0)
    ulp = ROUNDING * jnp.finfo(there.dtype).eps
    rise = jnp.where(jnp.abs(rise) > ulp * jnp.where(known, jnp.abs(there), 0), rise, 0)
    learning = watch.checks < LEARNING
    rises = watch.rises + (rise > 0)
    most = jnp.maximum(OUT * watch.typical, LOST * watch.progress)
    beyond = lost | ((watch.typical > 0) & (rise > most))
    suspect = jnp.where(beyond, watch.suspect + 1, 0)
    climbing = learning & (watch.checks == LEARNING - 1) & (rises == LEARNING)
    # a first kick that is dying away is none
    climbing = climbing & (rise >= watch.typical / 2)
    climbing = climbing | ((watch.checks == PATIENCE - 1) & (rises == PATIENCE))
    rewind = (suspect >= CONFIRMED) | climbing
    usual = known & ~beyond & ~rewind

    size = jnp.abs(rise)
    followed = watch.typical + FOLLOW * (jnp.minimum(size, USUAL * watch.typical) - watch.typical)
    typical = jnp.where(learning, jnp.maximum(watch.typical, size), followed)
    shorter = jnp.minimum(watch.backoff / 4, safe)
    advance = usual & ((rise <= 0) | (~learning & (rise <= watch.typical)))
    after = watch._replace(
        progress=jnp.where(advance, jnp.maximum(watch.progress - rise, 0), watch.progress),
        typical=jnp.where(rewind, 0, jnp.where(usual, typical, watch.typical)),
        checks=jnp.where(rewind, 0, watch.checks + usual),
        rises=jnp.where(rewind, 0, jnp.where(usual, rises, watch.rises)),
        suspect=jnp.where(rewind, 0, jnp.where(known, suspect, watch.suspect)),
        backoff=jnp.where(rewind, shorter, watch.backoff),
    )
    after = select(known, after, watch)
    return Verdict(after, known & rewind, advance)


def regrown(watch: WatchState) -> WatchState:
    """One update later."""
    return watch._replace(backoff=jnp.minimum(REGROWTH * watch.backoff, 1))


def way_back(params: Any, anchor: Any, dtype: Any) -> jax.Array:
    """Distance [] of the parameters from the anchor's."""
    return safe_norm(jax.tree.map(jnp.subtract, params, anchor), dtype)


def arrived(watch: WatchState, distance: jax.Array) -> tuple[Verdict, jax.Array]:
    """What to make of the first look after a rewind, and whether the anchor was missed."""
    missed = (watch.way > 0) & ~(distance <= ARRIVED * watch.way)
    after = watch._replace(way=jnp.zeros_like(watch.way), lost=watch.lost | missed)
    return Verdict(after, jnp.zeros((), bool), missed), missed
