r"""Proportional fairness: every term a share of the margin (Kelly, Maulloo and Tan 1998)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax.allocation.problem import Knapsack, scatter

ROWS_ONE_BY_ONE = 32
"""Up to here prices are found row by row, beyond it all rows at once."""


def fair_raises(problem: Knapsack, rounds: int) -> jax.Array:
    r"""Proportional fairness: at prices mu the weights are $p_k / \sum_r C_{kr} \mu_r$, clipped.

    The prices minimize the convex dual $\sum_r b_r \mu_r + \sum_k h_k(\sum_r C_{kr} \mu_r)$ one row
    at a time, each exactly; with many rows all at once, under the separable majorizer that
    convexity gives, $h(q) \le \frac{1}{m} \sum_r h(q + m C_r (\mu'_r - \mu_r))$. Either way the
    dual never rises.
    """
    value, price, rows, lower, room, num_rows = _priced(problem)
    dtype, upper = room.dtype, lower + room
    one_by_one = num_rows <= ROWS_ONE_BY_ONE
    spread = 1 if one_by_one else jnp.sum(price > 0, axis=1, keepdims=True).astype(dtype)

    def raised(charge: jax.Array) -> jax.Array:
        column = (slice(None), *(None,) * (charge.ndim - 1))
        p, low, high = value[column], lower[column], upper[column]
        wanted = p / jnp.where(charge > 0, charge, 1)
        return jnp.where(charge > 0, jnp.clip(wanted, low, high), high) - low

    def load(prices: jax.Array) -> jax.Array:
        taken = raised(jnp.sum(price * prices[rows], axis=1))
        return scatter(price * taken[:, None], rows, num_rows)

    def reprice(prices: jax.Array) -> jax.Array:
        own = prices[rows]
        charge = jnp.sum(price * own, axis=1, keepdims=True)

        def within(candidate: jax.Array) -> jax.Array:
            moved = charge + spread * price * (candidate[rows] - own)
            return scatter(price * raised(moved), rows, num_rows) <= 1

        # at this price even unclipped shares fit: sum_k p_k / (mu' - mu) <= b
        return _least(within, prices + scatter(value[:, None] * (price > 0), rows, num_rows))

    def unsettled(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        step, idle, prices = carry
        excess = load(prices) - 1
        off = jnp.where(prices > 0, jnp.abs(excess), excess)
        settled = jnp.max(off, initial=0.0) <= max(1e-8, float(jnp.finfo(dtype).eps) ** 0.75)
        return (step < turn * 8 * rounds) & (idle < turn) & ~settled

    def improve(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        step, idle, prices = carry
        better = reprice(prices)
        if one_by_one:
            better = jnp.where(jnp.arange(num_rows) == step % turn, better, prices)
        return step + 1, jnp.where(jnp.all(better == prices), idle + 1, 0), better

    turn = max(1, num_rows) if one_by_one else 1
    zero = jnp.zeros((), jnp.int32)
    prices = jax.lax.while_loop(unsettled, improve, (zero, zero, jnp.zeros(num_rows, dtype)))[2]
    taken = raised(jnp.sum(price * prices[rows], axis=1))
    over = jnp.maximum(scatter(price * taken[:, None], rows, num_rows), 1)
    return taken / jnp.max(jnp.where(price > 0, over[rows], 1), axis=1, initial=1.0)


class _Priced(NamedTuple):
    """The problem with budgets of one."""

    value: jax.Array  # [K]    the largest being 1
    price: jax.Array  # [K, m] cost over budget, 0 on rows that never need a price
    rows: jax.Array
    lower: jax.Array
    room: jax.Array  # [K]    0 where a row of the term has no budget
    num_rows: int


def _priced(problem: Knapsack) -> _Priced:
    value, cost, rows, lower, room, budget = problem
    paid, num_rows = cost > 0, budget.shape[0]
    price = jnp.where(paid, cost / jnp.where(budget > 0, budget, 1)[rows], 0)
    shut = jnp.any((paid & (budget[rows] <= 0)) | ~jnp.isfinite(price), axis=1)
    room = jnp.where(shut, 0, room)
    # a row that could pay for everything never needs a price
    scarce = scatter(jnp.where(shut[:, None], 0, price) * room[:, None], rows, num_rows) > 1
    price = jnp.where(scarce[rows] & ~shut[:, None], price, 0)
    top = jnp.max(value, initial=0.0)
    return _Priced(value / jnp.where(top > 0, top, 1), price, rows, lower, room, num_rows)


def _least(holds: Callable[[jax.Array], jax.Array], high: jax.Array) -> jax.Array:
    """The least x in [0, high] at which a monotone predicate holds, to the last bit.

    Non-negative floats stand in the order of their bit patterns, so halving those is exact and
    needs no scale. `holds(high)` is taken for granted.
    """
    bits = jnp.int64 if high.dtype == jnp.float64 else jnp.int32

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends  # holds at high, not below low
        middle = low + (high - low) // 2
        good = holds(jax.lax.bitcast_convert_type(middle, x_dtype))
        return jnp.where(good, low, middle + 1), jnp.where(good, middle, high)

    x_dtype = high.dtype
    start = (jnp.zeros(high.shape, bits), jax.lax.bitcast_convert_type(high, bits))
    _, least = jax.lax.fori_loop(0, 8 * x_dtype.itemsize - 1, halve, start)
    return jax.lax.bitcast_convert_type(least, x_dtype)
