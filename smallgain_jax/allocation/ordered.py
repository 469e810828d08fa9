"""Serving terms in order of score: sorted once, claims added up row by row by segmented sums."""

import jax
import jax.numpy as jnp

from smallgain_jax.allocation.problem import Shares


def fill(problem: Shares, charge: jax.Array, starts: jax.Array, rounds: int) -> jax.Array:
    """Raise each of several feasible shares, terms of the highest worth over charge first.

    In each round terms claim what they lack, rows grant the claims in the terms' order until their
    budget is spent, and a term takes the least of what its rows grant; the next round hands on what
    was granted in vain. Every round is feasible (theorem 7). Where each term touches one row, a
    round from zero at that row's prices is exact (Dantzig 1957).

    Args:
      problem: K terms that touch m rows each.
      charge: what a full raise of each term is charged, float [K].
      starts: feasible shares to start from, float [S, K].
      rounds: passes, static.

    Returns:
      The filled shares, [S, K].
    """
    worth, load, rows, _ = problem
    width = load.shape[1]
    score = jnp.where(charge > 0, worth / jnp.where(charge > 0, charge, 1), jnp.inf)
    order = jnp.argsort(-score, stable=True)

    # entries (term, row), by row and then by score: one layout for all rounds
    entry_rows = rows[order].reshape(-1)
    by_row = jnp.argsort(entry_rows, stable=True)
    entry_rows = entry_rows[by_row]
    entry_terms, slot = order[by_row // width], by_row % width
    entry_load = load[entry_terms, slot]
    begins = jnp.concatenate([jnp.ones(1, bool), entry_rows[1:] != entry_rows[:-1]])

    def one_round(share: jax.Array, _: None) -> tuple[jax.Array, None]:
        left = jnp.maximum(1 - problem.used(share), 0)
        # no claim on what another row of the term cannot give: it would only block the others
        reach = jnp.where(load > 0, left[rows] / jnp.where(load > 0, load, 1), jnp.inf)
        want = jnp.minimum(1 - share, jnp.min(reach, axis=1))
        claim = entry_load * want[entry_terms]
        before = _segmented_exclusive_sum(claim, begins)
        granted = _affordable(claim, before, left[entry_rows])
        granted = jnp.ones_like(load).at[entry_terms, slot].set(granted)
        return share + jnp.min(granted, axis=1) * want, None

    return jax.vmap(lambda share: jax.lax.scan(one_round, share, length=rounds)[0])(starts)


def _affordable(claim: jax.Array, before: jax.Array, budget: jax.Array) -> jax.Array:
    """Fraction of each claim that a budget still covers once `before` has been served."""
    fits = (before + claim <= budget) | (claim <= 0)
    part = jnp.maximum(budget - before, 0) / jnp.where(fits, 1, claim)
    return jnp.where(fits, 1, part)


def _segmented_exclusive_sum(x: jax.Array, begins: jax.Array) -> jax.Array:
    """Sum of the earlier entries of the same segment; segments begin where `begins`.

    Differences of one global cumulative sum would lose three digits in float32.
    """

    def combine(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    shifted = jnp.where(begins, 0, jnp.concatenate([jnp.zeros(1, x.dtype), x[:-1]]))
    return jax.lax.associative_scan(combine, (begins, shifted))[1]
