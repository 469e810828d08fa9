r"""Rules that move the weights of terms: pure functions of a snapshot of the objective.

A rule sees the terms at the parameters to first and second order, and the present weights and
scores; it returns new ones. Values say what a unit of weight is worth:
`grad_norm` $\|\nabla e_k\|^2$, `alignment` $\langle\nabla F(x; 1), \nabla e_k\rangle$, and `peek`,
the decrease that was measured.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._tree import fold_columns, unit_of
from smallgain_jax.allocation.knapsack import MANY_TERMS, allocate
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.limits.closed_forms import row_budgets
from smallgain_jax.spectral.rows import Curvature


class Snapshot(NamedTuple):
    """What a rule may look at: the terms at the parameters, to first and second order."""

    x: jax.Array
    gradient: jax.Array  # of the reference objective, shaped like x
    term_gradients: jax.Array  # [K, 2] or [K, 2, d]
    term_energies: jax.Array  # [K]
    curvature: Curvature
    limit: jax.Array  # [] curvature limit of the base optimizer
    target: jax.Array  # [] T, a fraction of it
    count: jax.Array  # type: ignore[assignment]  # [] int32


class Move(NamedTuple):
    """What a rule decided."""

    weights: jax.Array  # [K]
    scores: jax.Array  # [K]
    lower: jax.Array  # [K] the weights that budgets are spent from
    part: jax.Array  # [] of each row's margin there, what may be spent
    most_global: jax.Array  # [] the most that terms may spend in all


class Rule(Protocol):
    """How weights move: pure, from a snapshot and the present weights and scores."""

    def __call__(
        self, graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move: ...


QUICK = {"bins": 16, "rounds": 2}
"""Of `allocate` with many terms: weights move by a tenth at most, and again at the next update."""


def allocation_rule(
    *,
    policy: str,
    value: str,
    every: int,
    budget_fraction: ArrayLike,
    global_budget: ArrayLike,
    max_step_change: ArrayLike,
    floor: ArrayLike,
    ceiling: ArrayLike,
    ema: ArrayLike,
    rounds: int | None,
) -> Rule:
    """Spend the rows' margins by score; the arguments are those of `small_gain`."""
    measure = VALUES[value]
    quick = policy == "greedy" and rounds is None

    def allocated(
        graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move:
        rows, cost = _rows_and_cost(graph, snapshot)
        price = fold_columns(jnp.add, cost)
        # linear terms cost nothing; a floor keeps their scores finite
        price = jnp.maximum(price, 1e-6 * jnp.max(price, initial=0.0))
        # in units of the bound on the curvature, as the worth: squares leave float32 otherwise
        price = jnp.where(price > 0, price, 1) / _unit(snapshot)
        worth, known = measure(graph, snapshot, weights)
        fresh = jnp.where(snapshot.count == 0, 1, ema)
        scores = jnp.where(known, fresh * worth / price + (1 - fresh) * scores, scores)
        lower = jnp.maximum(floor, (1 - max_step_change) * weights)
        upper = jnp.maximum(jnp.minimum(ceiling, (1 + max_step_change) * weights), lower)
        at_lower = rows_at(graph, snapshot.curvature, lower).reshape(-1)
        budgets = row_budgets(snapshot.target, at_lower, budget_fraction)
        spend = allocate(
            scores * price,
            cost,
            rows,
            lower,
            upper,
            budgets,
            global_budget,
            policy=policy,
            **(QUICK if quick and weights.size > MANY_TERMS else {"rounds": rounds}),
        )
        most = jnp.clip(jnp.asarray(global_budget, lower.dtype), 0, jnp.finfo(lower.dtype).max)
        part = jnp.asarray(budget_fraction, lower.dtype)
        return Move(spend.weights, scores, lower, part, most)

    return allocated if every == 1 else _now_and_then(allocated, every)


def _now_and_then(rule: Rule, every: int) -> Rule:
    """`rule` at every so many updates; in between weights stay."""

    def sometimes(
        graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move:
        moved: Move = jax.lax.cond(
            snapshot.count % every == 0,
            lambda: rule(graph, snapshot, weights, scores),
            lambda: unspent(weights, scores),
        )
        return moved

    return sometimes


def gradnorm_rule(
    *,
    target_norm: ArrayLike,
    alpha: ArrayLike,
    update_rate: ArrayLike,
    floor: ArrayLike,
    ceiling: ArrayLike,
) -> Rule:
    """Pull gradient norms together; the arguments are those of `gradnorm`."""

    def rule(graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array) -> Move:
        norms = weights * term_norms(snapshot.term_gradients)
        size = jnp.abs(snapshot.term_energies)
        lag = size / jnp.maximum(jnp.mean(size), jnp.finfo(size.dtype).tiny)
        aim = target_norm * jnp.mean(norms) * lag**alpha
        ratio = jnp.where(norms > 0, aim / jnp.where(norms > 0, norms, 1), 1)
        moved = jnp.clip(weights * (1 + update_rate * (ratio - 1)), floor, ceiling)
        return unspent(moved, ratio)

    return rule


def cap_rule(graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array) -> Move:
    """One common weight min(1, T / L)."""
    lipschitz = snapshot.curvature.lipschitz
    scale = jnp.minimum(1, snapshot.target / jnp.where(lipschitz > 0, lipschitz, 1))
    return unspent(jnp.full_like(weights, scale), scores)


def unspent(weights: jax.Array, scores: jax.Array) -> Move:
    """A move that spends nothing of all the margin."""
    most = jnp.asarray(jnp.finfo(weights.dtype).max, weights.dtype)
    return Move(weights, scores, weights, jnp.ones((), weights.dtype), most)


def rows_at(graph: EnergyGraph, curvature: Curvature, weights: jax.Array) -> jax.Array:
    """R(w), shaped like x."""
    return curvature.local_rows + graph.scatter(scaled(weights, curvature.edge_cost))


def scaled(values: jax.Array, pairs: jax.Array) -> jax.Array:
    """`values` [K] times what each term has on its two ends, [K, 2, ...]."""
    return values.reshape(-1, *(1,) * (pairs.ndim - 1)) * pairs


def term_norms(term_gradients: jax.Array) -> jax.Array:
    """Euclidean norm [K] of each term's gradient, [K, 2] or [K, 2, d]."""
    unit = unit_of(term_gradients)
    return unit * jnp.sqrt(_over_ends((term_gradients / unit) ** 2))


def _over_ends(values: jax.Array) -> jax.Array:
    """Sum over all axes [K, 2, ...] but the first."""
    return fold_columns(jnp.add, values)


def _unit(snapshot: Snapshot) -> jax.Array:
    """The bound on the curvature, or 1 where there is none, which energies are measured in."""
    lipschitz = snapshot.curvature.lipschitz
    return jnp.where((lipschitz > 0) & jnp.isfinite(lipschitz), lipschitz, 1)


def _rows_and_cost(graph: EnergyGraph, snapshot: Snapshot) -> tuple[jax.Array, jax.Array]:
    """Rows [K, m] that each term touches among the raveled coordinates, and its cost there."""
    width = int(np.prod(snapshot.x.shape[1:], dtype=int))
    ends = jnp.stack([graph.i, graph.j], axis=1)
    rows = (ends[:, :, None] * width + jnp.arange(width)[None, None, :]).reshape(-1, 2 * width)
    return rows, snapshot.curvature.edge_cost.reshape(-1, 2 * width)


# Values: (graph, snapshot, weights) -> (value [K] over `_unit`, whether it is known now [K])


def _grad_norm_value(
    graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    value = _over_ends((snapshot.term_gradients / jnp.sqrt(_unit(snapshot))) ** 2)
    return value, jnp.ones(value.shape, bool)


def _alignment_value(
    graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    ends = jnp.stack([snapshot.gradient[graph.i], snapshot.gradient[graph.j]], axis=1)
    root = jnp.sqrt(_unit(snapshot))
    value = _over_ends((ends / root) * (snapshot.term_gradients / root))
    return value, jnp.ones(value.shape, bool)


PEEK_EVERY = 10
PEEK_SHARE = 0.05
PEEK_MOST = 16


def _peek_value(
    graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Measured decrease of F(x - g(w)/L; 1) per unit of weight and of step, for a few terms."""
    num_terms = weights.shape[0]
    if num_terms == 0:
        return weights, jnp.ones(0, bool)
    few = min(max(1, int(PEEK_SHARE * num_terms)), PEEK_MOST)
    step = 1 / _unit(snapshot)
    nudge = jnp.asarray(jnp.finfo(weights.dtype).eps ** (1 / 3), weights.dtype)
    mixed = graph.scatter(scaled(weights - 1, snapshot.term_gradients))
    at = snapshot.x - step * (snapshot.gradient + mixed)
    turn = snapshot.count // PEEK_EVERY
    chosen = (turn * few + jnp.arange(few)) % num_terms

    def measure(k: jax.Array) -> jax.Array:
        moved = nudge * (step * snapshot.term_gradients[k])
        up = at.at[graph.i[k]].add(-moved[0]).at[graph.j[k]].add(-moved[1])
        down = at.at[graph.i[k]].add(moved[0]).at[graph.j[k]].add(moved[1])
        # per unit of weight and of step, over the unit, which is one over the step
        return (graph.energy(down) - graph.energy(up)) / (2 * nudge)

    first_order, _ = _alignment_value(graph, snapshot, weights)
    start = snapshot.count == 0
    peeking = snapshot.count % PEEK_EVERY == 0

    def look() -> jax.Array:
        return first_order.at[chosen].set(jax.lax.map(measure, chosen))

    value = jax.lax.cond(peeking, look, lambda: first_order)
    seen = jnp.zeros(num_terms, bool).at[chosen].set(True)
    return value, start | (peeking & seen)


VALUES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "grad_norm": _grad_norm_value,
    "alignment": _alignment_value,
    "peek": _peek_value,
}
"""What a unit of a term's weight is worth, by name."""
