r"""Rules for the weights of losses, from their prices.

`reference` leaves them at 1. `fair` moves them towards equal (or prioritized) shares of the total
cost, proportional fairness (Kelly, Maulloo and Tan 1998). `greedy` raises and sheds by score.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from smallgain_jax._tree import matmul
from smallgain_jax.allocation.knapsack import allocate
from smallgain_jax.limits.closed_forms import row_budgets
from smallgain_jax.losses.prices import Prices
from smallgain_jax.losses.state import Settings, TrainingState

POLICIES = ("reference", "fair", "greedy")
UNMOVED = 0.02
"""A response below this is noise: such a weight stays, and so is what a share feels of another."""


def decide(
    settings: Settings, scale_free: bool, state: TrainingState, gradients: Any, prices: Prices
) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the new weights [K], and scores [K]."""
    if settings.policy == "fair":
        return _fair(settings, scale_free, state, prices), state.scores
    if settings.policy == "greedy":
        return _greedy(settings, scale_free, state, gradients, prices)
    return state.log_weights, state.scores


def _spend(settings: Settings, cost: jax.Array) -> Callable[..., Any]:
    touched = jnp.broadcast_to(jnp.arange(cost.shape[1]), cost.shape)
    return partial(allocate, cost=cost, rows=touched, rounds=settings.rounds)


def _fair(settings: Settings, scale_free: bool, state: TrainingState, prices: Prices) -> jax.Array:
    # in the unit of each loss, so that no constant factor of one is felt
    cost = state.first_weights[:, None] * prices.cost
    num_terms = cost.shape[0]
    lower = jnp.full(num_terms, settings.floor, cost.dtype)
    upper = jnp.full(num_terms, settings.ceiling, cost.dtype)
    # without a common factor only ratios count: an aim beyond a bound is one for the others
    least, most = (lower / upper, upper / lower) if scale_free else (lower, upper)
    # shares of what the first weights cost, so that mostly ratios move
    budget = jnp.sum(cost, axis=0)
    if not scale_free:  # a loss that outgrows its first batch must not lift the sum beyond it
        budget = jnp.minimum(budget, settings.target * prices.limit)
    budget -= matmul(least, cost)
    target = _spend(settings, cost)(
        settings.parts(num_terms, cost.dtype),
        lower=least,
        upper=most,
        row_budget=jnp.maximum(budget, 0),
        policy="fair",
    ).weights
    priced = jnp.sum(cost, axis=1) > 0
    gap = jnp.where(priced, jnp.log(target) - state.log_weights, 0)
    # a share that does not answer to its weight asks for more of it for ever
    answers = jnp.where(priced & (prices.response >= UNMOVED), prices.response, 0)
    if scale_free:  # whether the base optimizer feels no common factor of the gradient
        felt = None if prices.felt is None else jnp.where(priced[None, :], prices.felt, 0)
        gap -= _levels(gap, answers, felt)
    moved = state.log_weights + jnp.asarray(settings.ema, cost.dtype) * answers * gap
    return jnp.clip(moved, jnp.log(lower), jnp.log(upper))


def _levels(gap: jax.Array, answers: jax.Array, felt: jax.Array | None) -> jax.Array:
    r"""c, [K] or [], of $c = (1 - \gamma) (I - \gamma M)^{-1} g$: the shares that can be reached.

    In logarithms, gaps g of shares to their aims. Changes d of weights change shares by
    $(I - M) d$, where $M_{kj}$ is how much share k feels weight j (off the diagonal `felt`) and
    $1 - M_{kk}$ is what k answers. An optimizer that feels no common factor has rows of M that sum
    to 1, so that $(I - M) d = g - c$ has a solution only at the levels $c = M^\infty g$: M is a
    Markov chain, and a loss takes its level from those that the chain ends at. These are the ones
    whose shares answer least: the others come to theirs. One that is felt by nobody, with
    parameters of its own, sets no level but its own. With $\gamma = 1 -$ `UNMOVED`, what is felt
    by less than that is noise. A loss of which it is not known whom it feels, as where the metric
    is not one of Adam's, feels all that answer alike; where `felt` is None, that goes for all, and
    c is their mean by one over the response.
    """
    if felt is None:
        trust = jnp.where(answers > 0, 1 / jnp.where(answers > 0, answers, 1), 0)
        return jnp.sum(gap * trust) / jnp.maximum(jnp.sum(trust), 1)
    itself = jnp.eye(gap.size, dtype=bool)
    others = jnp.where(itself, 0, felt)
    alike = jnp.where(itself | (answers <= 0)[None, :], 0, jnp.ones_like(others))
    others = jnp.where(jnp.any(others > 0, axis=1, keepdims=True), others, alike)
    whole = jnp.sum(others, axis=1, keepdims=True)
    others = answers[:, None] * others / jnp.where(whole > 0, whole, 1)
    chain = others + jnp.diag(1 - jnp.sum(others, axis=1))
    walk = jnp.eye(gap.size, dtype=gap.dtype) - (1 - UNMOVED) * chain
    return jnp.linalg.solve(walk, UNMOVED * gap)


def _greedy(
    settings: Settings, scale_free: bool, state: TrainingState, gradients: Any, prices: Prices
) -> tuple[jax.Array, jax.Array]:
    weights = jnp.exp(state.log_weights)
    price = jnp.sum(prices.cost, axis=1)
    worth = worth_of(settings.value, gradients)
    fresh = jnp.where(jnp.all(state.scores == 0), 1, settings.ema)
    scores = fresh * worth / jnp.where(price > 0, price, 1) + (1 - fresh) * state.scores
    lower = jnp.maximum(settings.floor, (1 - settings.max_step_change) * weights)
    upper = jnp.minimum(settings.ceiling, (1 + settings.max_step_change) * weights)
    upper = jnp.maximum(upper, lower)
    if scale_free:
        budget = jnp.maximum(jnp.sum(prices.cost, axis=0) - matmul(lower, prices.cost), 0)
    else:
        # the sum over terms over-counts the sharpness of the sum
        claimed = matmul(weights, prices.cost)
        true_share = prices.row_sharpness / jnp.where(claimed > 0, claimed, 1)
        at_lower = true_share * matmul(lower, prices.cost)
        target = settings.target * prices.limit
        budget = row_budgets(target, at_lower, settings.budget_fraction)
        budget = budget / jnp.where(true_share > 0, true_share, 1)
    spent = _spend(settings, prices.cost)(
        scores * price, lower=lower, upper=upper, row_budget=budget, policy="greedy"
    )
    return jnp.log(spent.weights), scores


def _grad_norm(stacked: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(stacked) ** 2, axis=1)


def _alignment(stacked: jax.Array) -> jax.Array:
    return jnp.real(matmul(stacked, jnp.conj(jnp.sum(stacked, axis=0))))


WORTHS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "grad_norm": _grad_norm,
    "alignment": _alignment,
}
"""What a unit of a loss's weight is worth, from its gradients [K, size], leaf by leaf."""


def worth_of(value: str, gradients: Any) -> jax.Array:
    """Value [K] of a unit of each weight, from the gradients [K, ...] of the losses."""
    parts = [WORTHS[value](g.reshape(g.shape[0], -1)) for g in jax.tree.leaves(gradients)]
    return jnp.sum(jnp.stack(parts), axis=0)
