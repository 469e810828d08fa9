r"""The allocator: a fractional knapsack over many budgets, as a jittable kernel.

Terms k start at their lower weights and are raised where a unit of budget buys the most:

$$ \max_w \sum_k v_k w_k \quad\text{s.t.}\quad l \le w \le u,\quad
   \sum_{k} C_{kr}\,(w_k - l_k) \le b_r \;\;\forall r,\quad \sum_k c_k (w_k - l_k) \le b . $$

With one budget, filling by $v_k / c_k$ is optimal (Dantzig, *Discrete-Variable Extremum Problems*,
1957). With one budget per row the rows need prices: `primal_dual` finds them, `classes` does
without for very many terms, `fair` solves the problem with logarithms of weights for utility.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import Numbers, check_finite, float_dtype, is_concrete
from smallgain_jax._compiling import quick_jit
from smallgain_jax._show import shows
from smallgain_jax.allocation.classes import by_classes
from smallgain_jax.allocation.fair import fair_raises
from smallgain_jax.allocation.ordered import fill
from smallgain_jax.allocation.primal_dual import best_filling
from smallgain_jax.allocation.problem import (
    Knapsack,
    dearest,
    in_shares,
    pose,
    scatter,
)

POLICIES = ("greedy", "fair")
MANY_TERMS = 10_000
"""Beyond these the default serves classes of score."""
MANY_BINS = 24
ROUNDS_OF = {"fair": 8, "prices": 16, "classes": 3}
"""What `rounds=None` stands for."""


@shows(bars="weights")
class Allocation(NamedTuple):
    """What `allocate` decided. K terms, R rows."""

    weights: jax.Array  # [K]    between lower and upper
    spent_rows: jax.Array  # [R] budget used on each row
    spent_global: jax.Array  # [] budget used in all, a term's cost being its dearest row's


def allocate(
    value: Numbers,
    cost: Numbers,
    rows: Numbers,
    lower: Numbers,
    upper: Numbers,
    row_budget: Numbers,
    global_budget: Numbers = np.inf,
    policy: str = "greedy",
    rounds: int | None = None,
    bins: int | None = None,
) -> Allocation:
    r"""Raise weights from `lower` towards `upper` where a unit of budget buys the most.

    Terms without value stay at `lower`; terms without cost go to `upper`. "greedy" chooses by the
    number of terms how it fills, and says how good that is:

    - one row, up to 10,000 terms: by value over cost, which is exact;
    - up to 10,000 terms: at prices of the rows, by primal-dual sweeps that stop when the value is
      proved within 1e-4 of the linear program's optimum, or after `rounds` restarts. With costs and
      values spread over 10^-1..10^1, on 5,000 problems of each of four sizes from 24 terms to 240
      (`python -m bench.allocator --quality 5000`): above 99.99 % of the optimum in the median,
      99.9 % in all but one of a thousand, 99.8 % at worst;
    - beyond: by 24 classes of value over cost, without sorting. On random graphs, against serving
      one term after the other, 99.9 % where budgets are half of the demand, 99.6 % at a tenth; 16
      classes and `rounds=2`, half the time, 99.7 and 98.6 % (`python -m bench.allocator`). The more
      rows a term touches, the less: 94 % with ten.

    Up to 10,000 terms a larger budget never lowers the value by more than what the value may lack.
    Classes promise no such thing.

    Args:
      value: utility of a unit of weight, float [K]; negative or non-finite counts as none.
      cost: price of a unit of weight on each row touched, float [K, m], non-negative. A row that
        a term names twice is paid twice.
      rows: which rows, int [K, m], in 0..R-1; m = 2 for an edge.
      lower, upper: bounds of each weight, finite floats [K], lower <= upper.
      row_budget: b_r, float [R], in units of cost times weight: what raising weights above `lower`
        may cost row r, $\sum_k C_{kr} (w_k - l_k) \le b_r$. What the lower weights themselves cost
        is not part of it. Negative counts as 0, inf as no budget.
      global_budget: b, float scalar, for all raises together; a term's price is its dearest row's.
      policy: "greedy" (linear utility, as above), or "fair": maximize $\sum_k v_k \log w_k$ under
        the same bounds and budgets, so that every term gets a share of the margin (proportional
        fairness: Kelly, Maulloo and Tan 1998). Needs lower >= 0.
      rounds: effort, static int >= 1; None for what the table was measured with. Of the sweeps
        restarts (16), of classes pairs of exchanges (3). Under "fair" (8) one pass is exact where
        no term touches two rows that bind; otherwise eight are typically within 1e-6 of the optimum
        in mean log weight with up to 32 rows; beyond, within 1e-4 where terms touch two rows, as
        edges do, and farther where they touch more.
      bins: how many classes of score, "greedy" only, static int: 0 for prices at any number of
        terms, at least 2 for classes at any number; None chooses by it.

    Returns:
      `Allocation(weights [K], spent_rows [R], spent_global [])`, at least float32. No budget is
      exceeded by more than the rounding of a sum of its terms in that dtype. A decision: for
      derivatives the weights are constants.

    Inside `shard_map` give `check_vma=False`.

    Raises:
      ValueError: an unknown policy, rounds < 1, bins of 1 or below 0, bins with a policy other
        than "greedy", shapes that do not fit, or (concrete arguments) a bound that is not finite,
        lower > upper, a negative or non-finite cost, a row outside 0..R-1, a negative lower bound
        under "fair".

    >>> spend = allocate(
    ...     value=[3.0, 2.0], cost=[[1.0], [1.0]], rows=[[0], [0]],
    ...     lower=[0.0, 0.0], upper=[1.0, 1.0], row_budget=[1.5],
    ... )
    >>> spend.weights.round(6).tolist(), spend.spent_rows.round(6).tolist()
    ([1.0, 0.5], [1.5])
    """
    _check_settings(policy, rounds, bins)
    unlimited = is_concrete(global_budget) and bool(np.all(np.asarray(global_budget) == np.inf))
    arrays = [jnp.asarray(array) for array in (value, cost, lower, upper, row_budget)]
    dtype = float_dtype(*arrays)
    value, cost, lower, upper, row_budget = (array.astype(dtype) for array in arrays)
    # an infinity would stop `debug_infs`
    everything = None if unlimited else jnp.asarray(global_budget, dtype)
    rows = jnp.asarray(rows)
    given = _Given(value, cost, rows, lower, upper, row_budget, everything)
    _check(given)
    if policy == "fair":
        check_finite("lower", lower, low=0.0)
    found: Allocation = _compiled(given, policy, rounds, bins)
    return found


class _Given(NamedTuple):
    """What `allocate` was given, as arrays."""

    value: jax.Array
    cost: jax.Array
    rows: jax.Array
    lower: jax.Array
    upper: jax.Array
    row_budget: jax.Array
    global_budget: jax.Array | None


def _allocated(given: _Given, policy: str, rounds: int | None, bins: int | None) -> Allocation:
    value, cost, rows, lower, upper, row_budget, everything = given
    # a decision, not a function to differentiate: sorting and sweeping have no useful slope
    merged = pose(value, cost, rows, lower, upper, row_budget, everything)
    posed = jax.lax.stop_gradient(merged)
    weights = jnp.clip(posed.lower + _raises(posed, policy, rounds, bins), posed.lower, upper)
    raised = weights - lower
    spent_rows = scatter(cost * raised[:, None], rows, row_budget.shape[0])
    return Allocation(weights, spent_rows, jnp.sum(dearest(merged.cost) * raised))


_compiled = quick_jit(_allocated, static_argnums=(1, 2, 3))


def _raises(problem: Knapsack, policy: str, rounds: int | None, bins: int | None) -> jax.Array:
    """How far each term is raised, [K]."""
    terms, width = problem.cost.shape
    if not terms or not width:
        return problem.room
    if policy == "fair":
        return fair_raises(problem, rounds or ROUNDS_OF["fair"])
    if bins is None:
        bins = MANY_BINS if terms > MANY_TERMS else 0
    if bins:
        return problem.room * by_classes(problem, rounds or ROUNDS_OF["classes"], bins)
    shares = in_shares(problem)
    if shares.num_rows == 1:
        (share,) = fill(shares, shares.charge(jnp.ones(1)), jnp.zeros((1, terms)), rounds=1)
    else:
        share = best_filling(shares, rounds or ROUNDS_OF["prices"])
    return problem.room * share


def _check_settings(policy: str, rounds: int | None, bins: int | None) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r} is unknown: choose from {', '.join(POLICIES)}")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds = {rounds} must be at least 1")
    if bins is not None and (bins < 0 or bins == 1 or policy != "greedy"):
        raise ValueError(
            f"bins = {bins} must be 0 or at least 2, and policy 'greedy' (got {policy!r})"
        )


def _check(given: _Given) -> None:
    value, cost, rows, lower, upper, row_budget, global_budget = given
    if value.ndim != 1:
        raise ValueError(f"value must have shape [K], got {value.shape}")
    for name, array in (("lower", lower), ("upper", upper)):
        if array.shape != value.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {value.shape}")
    if cost.ndim != 2 or cost.shape[0] != value.shape[0]:
        raise ValueError(f"cost has shape {cost.shape}, expected [{value.shape[0]}, m]")
    if rows.shape != cost.shape or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(f"rows must be int {cost.shape}, got {rows.dtype} {rows.shape}")
    if row_budget.ndim != 1:
        raise ValueError(f"row_budget must have shape [R], got {row_budget.shape}")
    if global_budget is not None and global_budget.ndim != 0:
        raise ValueError(f"global_budget must be a scalar, got shape {global_budget.shape}")
    check_finite("lower", lower)
    check_finite("upper", upper)
    # on the host: inside jit, an operation on known arrays gives an unknown one
    if is_concrete((lower, upper)):
        low, high = np.asarray(lower), np.asarray(upper)
        crossed = np.flatnonzero(low > high)
        if crossed.size:
            k = int(crossed[0])
            raise ValueError(f"lower[{k}] = {low[k]} exceeds upper[{k}] = {high[k]}")
    check_finite("cost", cost, low=0.0)
    for budget in (row_budget, global_budget):
        if budget is not None and is_concrete(budget) and np.isnan(np.asarray(budget)).any():
            raise ValueError("row_budget and global_budget must not be NaN")
    if is_concrete(rows) and rows.size:
        first, last = int(np.min(np.asarray(rows))), int(np.max(np.asarray(rows)))
        if first < 0 or last >= row_budget.shape[0]:
            raise ValueError(f"rows must lie in 0..{row_budget.shape[0] - 1}, got {first}..{last}")
