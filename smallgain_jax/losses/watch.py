r"""Whether training has lost its way, told by the loss at two points on one batch.

Losses of different batches differ by noise, and their ratios mean nothing where a loss may be
negative or start at zero. So the present parameters are compared with an anchor, where training
stood a while ago, **on the same batch**: constants added to a loss, the noise of its batches and a
change of the objective cancel. What counts as a rise is measured by the typical difference between
the two, a moving average of $|F(\theta) - F(\theta_{anchor})|$.

A rise is a rout where it is more than `OUT` typical differences, more than a quarter of all the
progress so far (a network at the edge of stability has spikes that heal by themselves), more than
`BEYOND` times the loss at the anchor (a warm restart lifts a converged loss by less), and a second
batch confirms it. Parameters and base optimizer go back to the anchor, and steps are a quarter as
long from then on, which fades by 0.1 % an update. Momentum that was built up on the way out goes
with them, which no factor on the step can achieve.

What rises all the same is not unstable but means to rise (a multiplier by ascent, a sampler): after
`STRIKES` rewinds in a row that won nothing, the watch gives up, and steps are whole again. It gives
up, too, where a transformation that comes after this one changes its updates, and with them the way
back: whether the anchor was reached is looked at.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._show import shows
from smallgain_jax._tree import norm, select, zero_count

OUT = 10.0
"""Typical differences beyond which a rise is no ordinary one: losses have tails like exp(-x)."""
BEYOND = 10.0
"""Times the size of the loss at the anchor. This depends on constants in a loss, and only makes the
watch slower: what diverges exceeds any constant."""
LOST = 0.25
"""Part of the progress so far that must be lost: a spike over a loss near zero is no divergence."""
USUAL = 10.0
"""Typical differences beyond which one counts as so many: the scale may not follow a divergence."""
ROUNDING = 32
"""Units in the last place of the loss that a difference must exceed to be one."""
CONFIRMED = 2
"""Checks in a row that must find such a rise: one batch may be an outlier."""
LEARNING = 8
"""Checks that set the scale of differences. Where all of them find the loss beyond `BEYOND`, the
first update threw it out, and there is no scale to learn."""
STRIKES = 4
"""Rewinds in a row without a lower loss between them: steps are 256 times shorter by then."""
FOLLOW = 0.1
"""Weight of the newest difference in the typical one."""
ARRIVED = 0.05
"""Part of the way back that may be missing: parameters of few bits round it."""
LONG = 10.0
"""Sizes of the anchor beyond which a way back is rounded so much that it is gone again, from where
it led to."""
REGROWTH = 1.001
"""Per update: a quarter of a step is whole again after 1,387."""


@shows()
class WatchState(NamedTuple):
    """What is remembered between two checks."""

    anchor: Any  # leaves of (params, base_state) where training stood, see `at_anchor`; () for none
    typical: jax.Array  # [] difference of the total loss between anchor and now
    progress: jax.Array  # [] by which the loss has fallen from the first anchor to this one
    checks: jax.Array  # [] int32, since the scale was last learnt anew
    kicks: jax.Array  # [] int32, of these, how many found the loss far beyond that at the anchor
    strikes: jax.Array  # [] int32, rewinds since the loss was last lower than at the anchor
    suspect: jax.Array  # [] int32, checks in a row that found a rise beyond `OUT`
    backoff: jax.Array  # [] factor on steps, in (0, 1]
    way: jax.Array  # [] length of the way back that the last update asked for; 0 for none
    lost: jax.Array  # [] bool, whether the watch has given up


class Verdict(NamedTuple):
    """What a check concludes."""

    watch: WatchState  # with the anchor still where it was
    rewind: jax.Array  # [] bool, go back to the anchor
    advance: jax.Array  # [] bool, the anchor moves here


def first_watch(params: Any, base_state: Any, dtype: Any, on: bool) -> WatchState:
    """Before the first update; the anchor is a copy, for what it copies may be donated."""
    anchor = anchored(jax.tree.map(jnp.array, (params, base_state))) if on else ()
    zero = jnp.zeros((), dtype)
    return WatchState(
        anchor=anchor,
        typical=zero,
        progress=jnp.array(zero),
        checks=zero_count(),
        kicks=zero_count(),
        strikes=zero_count(),
        suspect=zero_count(),
        backoff=jnp.ones((), dtype),
        way=jnp.array(zero),
        lost=jnp.zeros((), bool),
    )


def anchored(point: Any) -> tuple[Any, ...]:
    """(params, base_state) as bare leaves, so that optax finds no name in a state twice."""
    return tuple(jax.tree.leaves(point))


def at_anchor(watch: WatchState, like: Any) -> Any:
    """(params, base_state) at the anchor, from a pair of their structure."""
    return jax.tree.unflatten(jax.tree.structure(like), watch.anchor)


def judge(watch: WatchState, here: jax.Array, there: jax.Array, safe: jax.Array) -> Verdict:
    """Compare the total loss here with that at the anchor, both on one batch.

    Args:
      watch: the state so far.
      here: F at the present parameters [], possibly not finite.
      there: F at the anchor [], on the same batch.
      safe: [] a factor at which the base optimizer is known to be stable; 1 where none is known.
    """
    known = jnp.isfinite(there)
    level = jnp.where(known, jnp.abs(there), 0)
    lost = known & ~jnp.isfinite(here)
    rise = jnp.where(known & ~lost, here - there, 0)
    ulp = ROUNDING * jnp.finfo(there.dtype).eps
    rise = jnp.where(jnp.abs(rise) > ulp * level, rise, 0)
    learning = watch.checks < LEARNING
    far = rise > BEYOND * level
    most = jnp.maximum(OUT * watch.typical, LOST * watch.progress)
    beyond = lost | ((watch.typical > 0) & ~learning & far & (rise > most))
    suspect = jnp.where(beyond, watch.suspect + 1, 0)
    kicks = watch.kicks + (far & (level > 0))
    thrown = (watch.checks == LEARNING - 1) & (kicks == LEARNING)
    rout = ((suspect >= CONFIRMED) | thrown) & known & ~watch.lost
    given_up = rout & (watch.strikes >= STRIKES)
    rewind = rout & ~given_up
    usual = known & ~beyond & ~rout

    size = jnp.abs(rise)
    followed = watch.typical + FOLLOW * (jnp.minimum(size, USUAL * watch.typical) - watch.typical)
    typical = jnp.where(learning, jnp.maximum(watch.typical, size), followed)
    shorter = jnp.where(given_up, 1, jnp.minimum(watch.backoff / 4, safe))
    advance = usual & ((rise <= 0) | (~learning & (rise <= watch.typical)))
    won = usual & (rise < 0)
    after = watch._replace(
        progress=jnp.where(advance, jnp.maximum(watch.progress - rise, 0), watch.progress),
        typical=jnp.where(rout, 0, jnp.where(usual, typical, watch.typical)),
        checks=jnp.where(rout, 0, watch.checks + usual),
        kicks=jnp.where(rout, 0, jnp.where(usual, kicks, watch.kicks)),
        strikes=jnp.where(won & ~watch.lost, 0, watch.strikes + rewind),
        suspect=jnp.where(rout, 0, jnp.where(known, suspect, watch.suspect)),
        backoff=jnp.where(rout, shorter, watch.backoff),
        lost=watch.lost | given_up,
    )
    after = select(known, after, watch)
    return Verdict(after, rewind, advance)


def regrown(watch: WatchState) -> WatchState:
    """One update later."""
    return watch._replace(backoff=jnp.minimum(REGROWTH * watch.backoff, 1))


def way_back(params: Any, anchor: Any, dtype: Any) -> jax.Array:
    """Distance [] of the parameters from the anchor's."""
    return norm(jax.tree.map(jnp.subtract, params, anchor), dtype)


def arrived(watch: WatchState, distance: jax.Array, size: jax.Array) -> Verdict:
    """What to make of the first look after a rewind: was the anchor missed?

    Args:
      watch: the state so far.
      distance: from the anchor [].
      size: of the anchor's parameters [].
    """
    missed = (watch.way > 0) & ~(distance <= ARRIVED * watch.way)
    after = watch._replace(way=jnp.zeros_like(watch.way), lost=watch.lost | missed)
    again = ~missed & (distance > 0) & (watch.way > LONG * size) & ~watch.lost
    return Verdict(after, again, missed)
