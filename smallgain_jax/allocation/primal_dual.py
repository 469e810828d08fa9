r"""Greedy allocation with rows at their right prices: the linear program by primal-dual sweeps.

At prices $\mu \ge 0$ of the rows, $\sum_r \mu_r + \sum_k \max(0, u_k - \sum_r A_{kr} \mu_r)$ is at
least the optimal value (weak duality): the difference from what a feasible allocation is worth is a
proof of how much it can lack. Sweeps raise terms whose worth exceeds their charge and prices of
rows whose budget is exceeded (Chambolle and Pock 2011), each in its own scale (Pock and Chambolle
2011), over-relaxed and drawn back to the last start (Halpern's iteration; Lu and Yang, *Restarted
Halpern PDHG for linear programming*, 2024), which starts anew every so many sweeps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import vdot
from smallgain_jax.allocation.ordered import fill
from smallgain_jax.allocation.problem import Shares

SWEEPS = 20
"""Sweeps between restarts."""
GAP = 1e-4
"""Part of the optimal value that may be lacking where sweeps stop early."""
FILLING_ROUNDS = 4
SMALLEST_LOAD = 1e-2
"""Of a term in all, as far as its step is concerned: lighter ones must not set the scale of all."""
SCALES = (1e-6, 1e6)


class _Prices(NamedTuple):
    rounds: jax.Array  # [] int32, restarts made
    share: jax.Array  # [K]
    prices: jax.Array  # [R]
    scale: jax.Array  # [] step of the prices over that of the shares
    best: jax.Array  # [K]  the best feasible shares so far
    reached: jax.Array  # [] what they are worth
    bound: jax.Array  # [] least dual value so far, at least the optimum


def best_filling(problem: Shares, rounds: int) -> jax.Array:
    """Shares [K] worth at least `1 - GAP` of the optimum, or the best after `rounds` restarts.

    The better one of two fillings, both at the prices found: from the shares that the sweeps left,
    and from zero, which is exact where every term touches one row.
    """
    found = _sweep(problem, rounds)
    starts = jnp.stack([jnp.zeros_like(found.best), found.best])
    # a row with slack still has its say between terms of equal score
    prices = jnp.maximum(found.prices, 1e-6 * jnp.max(found.prices, initial=0.0))
    prices = jnp.where(jnp.max(prices, initial=0.0) > 0, prices, 1)
    in_order, swept = fill(problem, problem.charge(prices), starts, FILLING_ROUNDS)
    # of equals the one that serves terms one after the other
    least = (1 + 16 * jnp.finfo(swept.dtype).eps) * vdot(problem.worth, in_order)
    return jnp.where(vdot(problem.worth, swept) > least, swept, in_order)


def _sweep(problem: Shares, rounds: int) -> _Prices:
    """Prices and shares by restarted primal-dual sweeps."""
    worth, dtype = problem.worth, problem.worth.dtype
    asked = problem.used(jnp.ones_like(worth))
    # a row that could serve everything never has a price
    scarce = asked > 1
    problem = problem._replace(load=jnp.where(scarce[problem.rows], problem.load, 0))
    paid = jnp.sum(problem.load, axis=1)
    step = 1 / jnp.maximum(paid, SMALLEST_LOAD)
    push = jnp.where(scarce, 1 / jnp.where(scarce, asked, 1), 0)

    def improve(now: _Prices) -> _Prices:
        share, prices = _halpern(problem, now, step, push)
        moved = jnp.sqrt(jnp.sum((share - now.share) ** 2 / step))
        repriced = jnp.where(scarce, (prices - now.prices) ** 2 * asked, 0)
        scale = _balanced(now.scale, moved, jnp.sqrt(jnp.sum(repriced)))
        feasible = _feasible(problem, share)
        reached = vdot(worth, feasible)
        bound = jnp.sum(prices) + jnp.sum(jnp.maximum(worth - problem.charge(prices), 0))
        better = reached > now.reached
        return _Prices(
            now.rounds + 1,
            share,
            prices,
            scale,
            jnp.where(better, feasible, now.best),
            jnp.where(better, reached, now.reached),
            jnp.minimum(bound, now.bound),
        )

    def unsettled(now: _Prices) -> jax.Array:
        return (now.rounds < rounds) & (now.reached < (1 - GAP) * now.bound)

    # norms of worths and of budgets in the scales of the steps: the ratio that prices will have
    paying = jnp.where(paid > 0, worth, 0)
    scale = jnp.sqrt(jnp.sum(paying**2 * step) / jnp.maximum(jnp.sum(push), 1))
    everything = jnp.sum(worth)
    start = _Prices(
        jnp.zeros((), jnp.int32),
        jnp.zeros_like(worth),
        jnp.zeros(problem.num_rows, dtype),
        jnp.clip(scale, *SCALES),
        jnp.zeros_like(worth),
        jnp.full((), -1, dtype),
        everything,
    )
    return jax.lax.while_loop(unsettled, improve, start)


def _halpern(
    problem: Shares, start: _Prices, step: jax.Array, push: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Shares and prices after `SWEEPS` reflected steps, each drawn back towards the start."""

    def sweep(k: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        share, prices = carry
        rise = step / start.scale * (problem.worth - problem.charge(prices))
        moved = jnp.clip(share + rise, 0, 1)
        excess = problem.used(2 * moved - share) - 1
        priced = jnp.maximum(prices + push * start.scale * excess, 0)
        away = jnp.asarray((k + 1) / (k + 2), share.dtype)
        return (
            start.share + away * (2 * moved - share - start.share),
            start.prices + away * (2 * priced - prices - start.prices),
        )

    share, prices = jax.lax.fori_loop(0, SWEEPS, sweep, (start.share, start.prices))
    return jnp.clip(share, 0, 1), jnp.maximum(prices, 0)


def _balanced(scale: jax.Array, moved: jax.Array, repriced: jax.Array) -> jax.Array:
    """The geometric mean of `scale` and of the ratio of how far prices and shares went."""
    known = (moved > 0) & (repriced > 0)
    ratio = jnp.where(known, repriced, scale) / jnp.where(known, moved, 1)
    # who has not moved at all needs the longer steps
    ratio = jnp.where(known, ratio, scale * jnp.where(moved > 0, 0.01, 100))
    return jnp.clip(jnp.sqrt(scale) * jnp.sqrt(ratio), *SCALES)


def _feasible(problem: Shares, share: jax.Array) -> jax.Array:
    """`share` divided by the worst overload among each term's rows."""
    over = jnp.maximum(problem.used(share), 1)
    return share / jnp.max(jnp.where(problem.load > 0, over[problem.rows], 1), axis=1, initial=1.0)
