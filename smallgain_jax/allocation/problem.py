r"""The allocation problem in the units that every rule works in.

A raise $t_k = s_k\,\mathrm{room}_k$ is a share $s_k \in [0, 1]$ of the room that its bounds and its
rows' budgets leave a term by itself, and a load is a fraction of a row's budget:

$$ \max_s \sum_k u_k s_k \quad\text{s.t.}\quad 0 \le s \le 1,\quad
   \sum_k A_{kr} s_k \le 1 \;\;\forall r, \qquad 0 \le A, u \le 1 . $$

No number leaves [0, 1] on the way in, so nothing overflows whatever the units of costs and budgets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import FEW_COLUMNS, fold_columns


class Knapsack(NamedTuple):
    """The problem as posed. K terms that touch m rows each, R rows."""

    value: jax.Array  # [K]   utility of a unit of weight, non-negative and finite
    cost: jax.Array  # [K, m] price of a unit of weight, no row twice
    rows: jax.Array  # [K, m]
    lower: jax.Array  # [K]
    room: jax.Array  # [K]    largest raise within the upper bound and within every single budget
    budget: jax.Array  # [R]  non-negative


class Shares(NamedTuple):
    """The problem in shares of the room. K terms that touch m rows each."""

    worth: jax.Array  # [K]   u: what a full raise is worth, the largest being 1
    load: jax.Array  # [K, m] A: what it takes of each row's budget
    rows: jax.Array  # [K, m]
    num_rows: int

    def used(self, share: jax.Array) -> jax.Array:
        """Fraction of each budget that `share` [K] takes, [R]."""
        return scatter(self.load * share[:, None], self.rows, self.num_rows)

    def charge(self, prices: jax.Array) -> jax.Array:
        """What a full raise of each term costs at `prices` [R], [K]."""
        return fold_columns(jnp.add, self.load * prices[self.rows])


def pose(
    value: jax.Array,
    cost: jax.Array,
    rows: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    budget: jax.Array,
    everything: jax.Array | None,
) -> Knapsack:
    """The problem of these terms; `everything` is the global budget, None for no limit."""
    cost = merge_rows(cost, rows)
    budget = jnp.maximum(budget, 0)
    if everything is not None:
        # the global budget is one more row, which every term touches at its dearest cost
        last = jnp.full((*value.shape, 1), budget.shape[0], rows.dtype)
        cost = jnp.concatenate([cost, dearest(cost)[:, None]], axis=1)
        rows = jnp.concatenate([rows, last], axis=1)
        budget = jnp.append(budget, jnp.maximum(everything, 0))
    value = jnp.where((value > 0) & jnp.isfinite(value), value, 0)
    room = jnp.minimum(upper - lower, jnp.finfo(lower.dtype).max)
    alone = fold_columns(jnp.minimum, reach(cost, rows, budget), jnp.inf)
    room = jnp.minimum(room, alone)
    return Knapsack(value, cost, rows, lower, jnp.where(value > 0, room, 0), budget)


def in_shares(problem: Knapsack) -> Shares:
    """The problem in shares of each term's room."""
    value, cost, rows, _, room, budget = problem
    limit = reach(cost, rows, budget)
    load = jnp.where(limit > 0, room[:, None] / jnp.where(limit > 0, limit, 1), 0)
    worth = _unit(value) * _unit(room)
    return Shares(_unit(worth), load, rows, budget.shape[0])


def reach(cost: jax.Array, rows: jax.Array, budget: jax.Array) -> jax.Array:
    """How far each row's whole budget would raise each term alone, [K, m]; inf where free."""
    paid = cost > 0
    return jnp.where(paid, budget[rows] / jnp.where(paid, cost, 1), jnp.inf)


def merge_rows(cost: jax.Array, rows: jax.Array) -> jax.Array:
    """Costs with what a term pays twice on one row added up where the row comes first."""
    width = cost.shape[1]
    if width < 2:
        return cost
    if width == 2:  # as edges do: in one pass
        again = rows[:, :1] == rows[:, 1:]
        return jnp.where(again, (cost + cost[:, ::-1]) * jnp.array([[1, 0]], cost.dtype), cost)
    first = jnp.argmax(rows[:, :, None] == rows[:, None, :], axis=2)
    here = first[:, None, :] == jnp.arange(width)[None, :, None]
    return jnp.sum(jnp.where(here, cost[:, None, :], 0), axis=2)


def scatter(pairs: jax.Array, rows: jax.Array, num_rows: int) -> jax.Array:
    """Sum of `pairs` [K, m] by row, [R]."""
    total = jnp.zeros(num_rows, pairs.dtype)
    if pairs.shape[1] > FEW_COLUMNS:
        return total.at[rows].add(pairs)
    for q in range(pairs.shape[1]):
        total = total.at[rows[:, q]].add(pairs[:, q])
    return total


def dearest(cost: jax.Array) -> jax.Array:
    """Cost of each term on its dearest row, [K]."""
    return fold_columns(jnp.maximum, cost)


def _unit(x: jax.Array) -> jax.Array:
    top = jnp.max(x, initial=0.0)
    return x / jnp.where(top > 0, top, 1)
