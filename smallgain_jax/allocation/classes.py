"""Greedy allocation of very many terms: served by classes of score, without sorting them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._tree import fold_columns
from smallgain_jax.allocation.problem import Knapsack, in_shares

SAMPLE = 1 << 15
"""Terms, at most, whose scores decide where classes begin."""
CELL_BITS = 18
"""Bits of a float32 score that its class ignores: 32 cells an octave remain."""
UNROLLED = 8
"""Classes that one kernel serves, at most."""
FIRST_CAUTION = 0.9
"""Part of a claim on the worst class that the first exchange leaves out where budgets are empty;
in proportion to what they fall short of the demand otherwise. Chosen by measurement."""


def by_classes(problem: Knapsack, rounds: int, bins: int) -> jax.Array:
    """Shares [K] of each term's room, by `2 rounds - 1` exchanges of claims between rows.

    A row with threshold T serves the classes below T in full and class floor(T) in part. Terms
    claim on each row what the other rows would serve; every exchange turns claims into thresholds
    and those into claims. What a row serves is a share of what was claimed from it, so it fits
    after any number of exchanges; odd ones waste least, because high thresholds breed few claims
    and few claims low thresholds (an antitone map, whose odd iterates rise to the fixed point).
    What is left at the end is granted in proportion.
    """
    worth, load, rows, num_rows = in_shares(problem)
    # columns rather than [K, m] arrays: a minor axis of two defeats vectorization
    paid = [(load[:, q], rows[:, q]) for q in range(load.shape[1])]
    charge = fold_columns(jnp.add, problem.cost) * problem.room
    score = jnp.where(charge > 0, worth / jnp.where(charge > 0, charge, 1), 0)
    level = _levels(score, jnp.sqrt(worth), bins)
    cell = level.astype(rows.dtype)

    def served(threshold: jax.Array) -> list[jax.Array]:
        return [
            jnp.where(part > 0, jnp.clip(_at(threshold, row) - level, 0, 1), 1)
            for part, row in paid
        ]

    def exchange(share: list[jax.Array]) -> jax.Array:
        claims = _written([part * _others(share, q) for q, (part, _) in enumerate(paid)])
        where = _written([cell * num_rows + row for _, row in paid])
        demand = jnp.zeros(bins * num_rows, load.dtype)
        for claim, index in zip(claims, where, strict=True):
            demand = demand.at[index].add(claim, mode="promise_in_bounds")
        return _thresholds(demand.reshape(bins, num_rows))

    # no threshold is known yet, but worse classes are refused oftener: claiming all would set the
    # first thresholds too low (where they are the last ones too, what is not claimed is lost)
    short = jnp.clip(1 - num_rows / jnp.maximum(jnp.sum(load), 1), 0, 1)
    caution = FIRST_CAUTION * short if rounds > 1 else 0.0
    claimed = [1 - caution * ((level + 0.5) / bins) ** 2 for _ in paid]
    threshold = exchange(claimed)
    for _ in range(2 * rounds - 2):
        claimed = _written(served(threshold))
        threshold = exchange(claimed)
    # a threshold is a sum of up to `bins` shares: its rounding must not be spent
    share = served(threshold - bins * jnp.finfo(load.dtype).eps)
    granted = [share[q] * _others(claimed, q) for q in range(len(paid))]
    return _topped_up(paid, _least(granted), num_rows)


def _thresholds(demand: jax.Array) -> jax.Array:
    """How many classes each row serves, the last in part, [R]; of claims [bins, R] on a budget."""

    def serve(carry: tuple[jax.Array, jax.Array], claimed: jax.Array) -> tuple[Any, None]:
        served, left = carry
        part = jnp.clip(left / jnp.where(claimed > 0, claimed, 1), 0, 1)
        part = jnp.where(claimed > 0, part, (left > 0).astype(part.dtype))
        return (served + part, left - claimed), None

    none, all_of_it = jnp.zeros_like(demand[0]), jnp.ones_like(demand[0])
    # twice round at least: what is no loop is fused into the gathers, and done anew in each
    unroll = min(UNROLLED, demand.shape[0] // 2)
    served, _ = jax.lax.scan(serve, (none, all_of_it), demand, unroll=unroll)[0]
    return served


_Paid = list[tuple[jax.Array, jax.Array]]  # load [K] and row [K] of each column


def _topped_up(paid: _Paid, share: jax.Array, num_rows: int) -> jax.Array:
    """`share` and what the rows have left, in proportion to what the terms lack."""

    def used(share: jax.Array) -> jax.Array:
        total = jnp.zeros(num_rows, share.dtype)
        loads = _written([part * share for part, _ in paid])
        for load, (_, row) in zip(loads, paid, strict=True):
            total = total.at[row].add(load, mode="promise_in_bounds")
        return total

    # sums of shares are rounded: what is left only by rounding is not
    left = jnp.maximum(1 - used(share) - 8 * jnp.finfo(share.dtype).eps, 0)
    want = 1 - share
    for part, row in paid:
        reach = _at(left, row) / jnp.where(part > 0, part, 1)
        want = jnp.where(part > 0, jnp.minimum(want, reach), want)
    claimed = used(want)
    grant = jnp.minimum(left / jnp.where(claimed > 0, claimed, 1), 1)
    grants = [jnp.where(part > 0, _at(grant, row), 1) for part, row in paid]
    return share + want * _least(grants)


def _levels(score: jax.Array, weight: jax.Array, bins: int) -> jax.Array:
    """Class 0 (best) to bins - 1 of each score, classes holding equal sums of `weight`.

    By a histogram over the leading bits of the scores of a sample.
    """
    top = jnp.max(score, initial=0.0)
    relative = (score / jnp.where(top > 0, top, 1)).astype(jnp.float32)
    cell = jax.lax.bitcast_convert_type(relative, jnp.int32) >> CELL_BITS
    (cell,) = _written([cell])
    some_cells, some_weights = cell, weight
    terms = score.shape[0]
    if terms > SAMPLE:
        # multiples of an odd constant: no period of the terms' order aligns with them
        index = (np.arange(SAMPLE, dtype=np.uint64) * 2654435761) % np.uint64(terms)
        some_cells, some_weights = cell[index.astype(np.int32)], weight[index.astype(np.int32)]
    held = jnp.zeros(1 << (31 - CELL_BITS), weight.dtype)
    held = held.at[some_cells].add(some_weights, mode="promise_in_bounds")
    total = jnp.sum(held)
    above = (total - jnp.cumsum(held) + held / 2) / jnp.where(total > 0, total, 1)
    level = jnp.floor(jnp.clip(above * bins, 0, bins - 1))
    return _at(level, cell)


def _others(share: list[jax.Array], q: int) -> jax.Array:
    """The least of the other columns; ones where there is none."""
    rest = share[:q] + share[q + 1 :]
    return _least(rest) if rest else jnp.ones_like(share[q])


def _least(columns: list[jax.Array]) -> jax.Array:
    least = columns[0]
    for column in columns[1:]:
        least = jnp.minimum(least, column)
    return least


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _written(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, in memory: a fused gather or scatter would compute them once more per access."""
    return list(jax.lax.optimization_barrier(tuple(arrays)))
