"""The skeleton for losses of a model: price, share, mix, update, guard."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax.experimental import aggregating

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, float_dtype
from smallgain_jax._tree import select
from smallgain_jax.allocation.knapsack import allocate
from smallgain_jax.limits.closed_forms import row_budgets
from smallgain_jax.limits.probe import Probe, probe_optimizer
from smallgain_jax.losses.balance import balance_residual, interaction_ratio
from smallgain_jax.losses.losses import UNROLLED, Losses, check_params, check_real
from smallgain_jax.losses.sharpness import PRODUCTS
from smallgain_jax.spectral.power import Blocks, label_blocks, power_iteration, random_vector

Limit = float | jax.Array | Callable[[jax.Array], Any] | None

FIRST_ITERATIONS = 20
"""Of power iteration from its random start, and when the loss leaves its level; other calls go on
from the last one's vector."""
ADAPTIVE_WARMUP = 100
"""Updates before second moments mean anything; with beta_2 = 0.999 they average a tenth then."""
GUARD = 2.0
"""Multiple of the limit. Networks live at the edge and sharpness recedes from it by itself; up to
twice the limit such catapults end well (Lewkowycz et al., *The large learning rate phase of deep
learning*, 2020)."""
ALARM = 2.0
"""A total loss this many times its average is on its way out: see `_Watch`."""
ALARM_MEMORY = 0.99
"""By which the loss of the last alarm is forgotten at each update: its half-life is 69."""


class TrainingInfo(NamedTuple):
    """What a reader of one update wants to know. K losses, R rows (blocks of parameters).

    Curvatures are in the base optimizer's metric, in loss per squared unit of that metric.
    """

    losses: jax.Array  # [K] at the parameters before this update; NaN if they were not evaluated
    cost: jax.Array  # [K, R] curvature of each loss in each row at unit weight, from below
    share: jax.Array  # [K] of each loss in the total cost under the weights
    sharpness: jax.Array  # [] curvature of the weighted sum, from below
    limit: jax.Array  # [] what the base optimizer is stable up to; inf where there is none
    sharpness_ratio: jax.Array  # [] sharpness over limit
    row_sharpness: jax.Array  # [R] of its diagonal blocks
    margin_rows: jax.Array  # [R] T - row_sharpness
    guard: jax.Array  # [] factor on the base optimizer's update
    gains: jax.Array  # [R] factors on its rows
    balance_residual: jax.Array  # [] B as last measured; NaN without per-term gradients
    interaction_ratio: jax.Array  # [] I likewise
    accepted: jax.Array  # [] bool; False for an update skipped as not finite
    skipped: jax.Array  # [] int32, how many so far


class TrainingState(NamedTuple):
    """State of `small_gain` around the losses of a model. K losses."""

    count: jax.Array  # type: ignore[assignment]  # [] int32
    weights: jax.Array  # [K] in force at this update; 1 is the reference objective
    log_weights: jax.Array  # [K] as allocated, before any return to the reference
    scores: jax.Array  # [K] moving averages of value over cost
    level: jax.Array  # [] moving average of the total loss
    peak: jax.Array  # [] total loss at the last alarm, fading
    recovering: jax.Array  # [] bool, from a loss that left its level until it is back
    headroom: jax.Array  # [] multiple of the limit at which the guard engages
    vectors: tuple[Any, ...]  # of power iteration: one per loss, one for the sum, one by block
    base_state: Any
    info: TrainingInfo


class TrainingSettings(NamedTuple):
    """Static and numeric settings of the skeleton; `small_gain` documents each."""

    limit: Limit
    metric: Callable[[Any, Any], Any] | None
    target: ArrayLike
    policy: str
    value: str
    objective: str
    every: int
    priorities: Sequence[float] | None
    budget_fraction: ArrayLike
    max_step_change: ArrayLike
    floor: ArrayLike
    ceiling: ArrayLike
    ema: ArrayLike
    curvature: str
    iterations: int
    blocks: Blocks
    row_gains: bool
    max_gain: ArrayLike
    guard: str | ArrayLike | None
    warmup: int | None
    anneal: Callable[[jax.Array], Any] | None
    rounds: int


class _Terms(NamedTuple):
    """The losses at the parameters, to first order."""

    values: jax.Array  # [K]; NaN where nothing evaluated them
    gradients: Any | None  # leading axis K; None unless needed
    reweighted: Callable[[Any, jax.Array], Any]  # updates, weights -> sum_k w_k grad e_k


class _Watch(NamedTuple):
    """How the total loss stands against its average.

    Sharpness above the limit is no harm while the loss holds. When it has left its level, the
    guard engages below the limit until it is back, and every such excursion halves the headroom
    above the limit, which then grows back by 0.1 % an update. The sharpness is measured at once,
    unless the loss stood as high at an alarm not long ago: mini-batches may leave the level every
    other update and be back at the next, where a divergence goes from one record to another.
    """

    level: jax.Array  # []
    peak: jax.Array  # []
    alarmed: jax.Array  # [] bool, by this very loss
    recovering: jax.Array  # [] bool
    unwatched: jax.Array  # [] bool, where no loss is known
    headroom: jax.Array  # []


class _Prices(NamedTuple):
    """The losses to second order, in the metric, as last measured."""

    cost: jax.Array  # [K, R]
    sharpness: jax.Array  # [] of the weighted sum
    row_sharpness: jax.Array  # [R] of its diagonal blocks
    limit: jax.Array  # []


_Measured = tuple[_Prices, tuple[Any, ...]]  # and the vectors of power iteration


class _Decision(NamedTuple):
    """All that changes only where something is measured."""

    prices: _Prices
    vectors: tuple[Any, ...]
    log_weights: jax.Array  # [K]
    scores: jax.Array  # [K]
    balance_residual: jax.Array  # []
    interaction_ratio: jax.Array  # []


def trained(
    base_optimizer: optax.GradientTransformation, losses: Losses, settings: TrainingSettings
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base optimizer by shares of the stability margin for `losses`; see `small_gain`."""
    _check(settings)
    aggregates = isinstance(base_optimizer, aggregating.Aggregator)
    base = base_optimizer if aggregates else optax.with_extra_args_support(base_optimizer)
    per_term = aggregates or settings.policy == "greedy"
    if settings.guard == "sharpness":
        settings = settings._replace(guard=GUARD)

    def init(params: Any) -> TrainingState:
        check_real(params)
        num_terms = len(losses.names_at(params))
        priorities = settings.priorities
        if priorities is not None and len(priorities) != num_terms:
            raise ValueError(f"priorities has {len(priorities)} entries for {num_terms} losses")
        return _initial_state(base, params, num_terms, settings)

    def update(
        updates: Any,
        state: TrainingState,
        params: Any = None,
        *,
        term_grads: Any = None,
        term_values: jax.Array | None = None,
        term_args: tuple[Any, ...] = (),
        curvature_args: tuple[Any, ...] | None = None,
        weighted: bool = False,
        **extra_args: Any,
    ) -> tuple[Any, TrainingState]:
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        if weighted and (per_term or term_grads is not None):
            raise ValueError(
                "weighted: aggregators and policy 'greedy' look at the gradient of each loss, so "
                "give the gradient of the plain sum; and never weighted together with term_grads"
            )
        if not isinstance(term_args, tuple | list):
            raise TypeError("term_args must be a tuple: what the losses take besides params")
        args = tuple(term_args)
        given = _Given(term_grads, term_values, weighted)
        terms = _first_order(losses, params, args, given, per_term, state.weights)
        healthy = _finite(updates, terms.gradients)
        total = jnp.vdot(state.weights, terms.values)
        if term_values is not None or (term_grads is None and not weighted):
            healthy = healthy & jnp.all(jnp.isfinite(terms.values))
        elif extra_args.get("value") is not None:
            # the sum, as optax's own line searches are given it: enough to watch
            total = jnp.asarray(extra_args["value"], total.dtype)
            healthy = healthy & jnp.isfinite(total)
        watch = _watch(settings, state, total)

        probe = None if aggregates else probe_optimizer(base_optimizer, params)
        adaptive = settings.metric is not None or (probe is not None and probe.adaptive)
        scale_free = adaptive or probe is None or not probe.known
        warmup = settings.warmup
        if warmup is None:
            warmup = ADAPTIVE_WARMUP if adaptive else 0
        due = (state.count % settings.every == 0) | watch.alarmed
        due = due & (state.count >= warmup)
        at = tuple(args if curvature_args is None else curvature_args)
        same_batch = terms.gradients if curvature_args is None else None

        def look() -> _Decision:
            prices, vectors = _second_order(
                losses, settings, probe, state, params, at, same_batch, watch.alarmed
            )
            log_weights, scores = _decide(settings, scale_free, state, terms, prices)
            decision = _Decision(
                prices,
                vectors,
                log_weights,
                scores,
                _of_gradients(balance_residual, terms.gradients),
                _of_gradients(interaction_ratio, terms.gradients),
            )
            return cast_like(decision, rest())

        def rest() -> _Decision:
            info = state.info
            return _Decision(
                _known_prices(state),
                state.vectors,
                state.log_weights,
                state.scores,
                info.balance_residual,
                info.interaction_ratio,
            )

        # a decision, not a function to differentiate
        decision = jax.lax.stop_gradient(jax.lax.cond(due & healthy, look, rest))
        prices, log_weights = decision.prices, decision.log_weights
        keep = 1.0 if settings.anneal is None else settings.anneal(state.count)
        weights = jnp.exp(keep * log_weights)

        if aggregates:
            gradient = jax.tree.map(partial(_times, weights), terms.gradients)
        else:
            gradient = terms.reweighted(updates, weights)
        gradient = jax.tree.map(lambda g: jnp.where(healthy, g, 0), gradient)
        move, base_state = base.update(gradient, state.base_state, params, **extra_args)
        base_state = select(healthy, base_state, state.base_state)

        target = settings.target * prices.limit
        # weights moved since the sum was measured: scale its sharpness with the total cost
        before, after = (_total(jnp.exp(w), prices.cost) for w in (state.log_weights, log_weights))
        drift = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 1)
        now = prices.sharpness * drift
        guard, gains = jax.lax.stop_gradient(_factors(settings, prices, now, drift, watch))
        labels, _ = label_blocks(params, settings.blocks)
        move = _scale(move, guard, gains, labels, healthy)

        ratio = jnp.where(jnp.isfinite(prices.limit), now / prices.limit, 0)
        paid = weights * jnp.sum(prices.cost, axis=1)
        everything = jnp.sum(paid)
        info = TrainingInfo(
            losses=terms.values,
            cost=prices.cost,
            share=paid / jnp.where(everything > 0, everything, 1),
            sharpness=now,
            row_sharpness=prices.row_sharpness * drift,
            limit=prices.limit,
            sharpness_ratio=ratio,
            margin_rows=target - prices.row_sharpness * drift,
            guard=guard,
            gains=gains,
            balance_residual=decision.balance_residual,
            interaction_ratio=decision.interaction_ratio,
            accepted=healthy,
            skipped=state.info.skipped + (1 - healthy.astype(jnp.int32)),
        )
        new_state = TrainingState(
            count=optax.safe_increment(state.count),
            weights=jnp.where(healthy, weights, state.weights),
            log_weights=log_weights,
            scores=decision.scores,
            level=jnp.where(healthy, watch.level, state.level),
            peak=jnp.where(healthy, watch.peak, state.peak),
            recovering=jnp.where(healthy, watch.recovering, state.recovering),
            headroom=jnp.where(healthy, watch.headroom, state.headroom),
            vectors=decision.vectors,
            base_state=base_state,
            info=info,
        )
        return move, cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(settings: TrainingSettings) -> None:
    if settings.objective != "adapted":
        raise ValueError(
            f"objective = {settings.objective!r}: the weights of losses are hyperparameters, "
            "'adapted'; to return to the reference objective give anneal"
        )
    if settings.curvature not in PRODUCTS:
        raise ValueError(
            f"curvature = {settings.curvature!r} is unknown: choose from {', '.join(PRODUCTS)}"
        )
    if settings.value not in WORTHS:
        raise ValueError(
            f"value = {settings.value!r} is not for losses: choose from {', '.join(WORTHS)}"
        )
    if isinstance(settings.guard, str) and settings.guard != "sharpness":
        raise ValueError(
            f"guard = {settings.guard!r} is not for losses: choose 'sharpness', a multiple of the "
            "limit, or None"
        )
    if settings.iterations < 1:
        raise ValueError(f"iterations = {settings.iterations} must be at least 1")
    if settings.priorities is not None and any(not p > 0 for p in settings.priorities):
        raise ValueError(f"priorities = {settings.priorities} must be positive")


def _initial_state(
    base: optax.GradientTransformation, params: Any, num_terms: int, settings: TrainingSettings
) -> TrainingState:
    dtype = float_dtype(*(jnp.zeros((), leaf.dtype) for leaf in jax.tree.leaves(params)))
    rows = len(label_blocks(params, settings.blocks)[1])

    # every field its own buffer: a donated state may not alias itself
    def full(fill: float, *shape: int) -> jax.Array:
        return jnp.full(shape, fill, dtype)

    info = TrainingInfo(
        losses=full(0, num_terms),
        cost=full(0, num_terms, rows),
        share=full(1 / num_terms, num_terms),
        sharpness=full(0),
        limit=full(jnp.inf),
        sharpness_ratio=full(0),
        row_sharpness=full(0, rows),
        margin_rows=full(jnp.inf, rows),
        guard=full(1),
        gains=full(1, rows),
        balance_residual=full(jnp.nan),
        interaction_ratio=full(jnp.nan),
        accepted=jnp.ones((), bool),
        skipped=jnp.zeros((), jnp.int32),
    )
    num_vectors = num_terms + (1 if rows == 1 else 2)
    return TrainingState(
        count=jnp.zeros((), jnp.int32),
        weights=full(1, num_terms),
        log_weights=full(0, num_terms),
        scores=full(0, num_terms),
        level=full(0),
        peak=full(0),
        recovering=jnp.zeros((), bool),
        headroom=full(jnp.inf),
        vectors=tuple(random_vector(k, params) for k in range(num_vectors)),
        base_state=base.init(params),
        info=info,
    )


class _Given(NamedTuple):
    """What the caller knows of the losses."""

    term_grads: Any | None
    term_values: jax.Array | None
    weighted: bool


def _first_order(
    losses: Losses,
    params: Any,
    args: tuple[Any, ...],
    given: _Given,
    per_term: bool,
    weights: jax.Array,
) -> _Terms:
    num_terms = weights.shape[0]
    names = losses.names_at(params, *args)
    if len(names) != num_terms:
        raise ValueError(f"terms: {len(names)} losses now, {num_terms} at init")
    known = jnp.full(num_terms, jnp.nan, weights.dtype)
    if given.term_values is not None:
        known = jnp.asarray(given.term_values, weights.dtype)
        if known.shape != (num_terms,):
            raise ValueError(f"term_values has shape {known.shape}, expected ({num_terms},)")
    if given.weighted:
        # by the weights it was handed, which move too slowly for one update to matter
        return _Terms(known, None, lambda updates, _: updates)
    values, grads = known, given.term_grads
    if grads is not None:
        _check_term_grads(grads, params, num_terms)
    else:
        check_params(params)
        if per_term:
            values, grads = losses.value_and_term_grads(params, *args)
    if grads is not None:
        mixed = lambda mix: jax.tree.map(partial(_mixed, mix), grads)  # noqa: E731
    else:
        # one backward pass for the mixture, however many losses there are
        values, pull = jax.vjp(lambda p: losses.values(p, *args), params)
        mixed = lambda mix: pull(mix.astype(values.dtype))[0]  # noqa: E731
    return _Terms(values.astype(weights.dtype), grads, partial(_reweighted, mixed))


def _reweighted(mixed: Callable[[jax.Array], Any], updates: Any, weights: jax.Array) -> Any:
    """The gradient of the weighted sum, from that of the plain one."""
    return jax.tree.map(lambda g, more: (g + more).astype(g.dtype), updates, mixed(weights - 1))


def _second_order(
    losses: Losses,
    settings: TrainingSettings,
    probe: Probe | None,
    state: TrainingState,
    params: Any,
    args: tuple[Any, ...],
    gradients: Any | None,
    alarmed: jax.Array,
) -> _Measured:
    """Measure one loss, or the sum, in turn: about one product with a Hessian.

    At first all of them; at an alarm the sum, which is what the guard goes by.
    """
    num_terms = state.weights.shape[0]
    labels, names = label_blocks(params, settings.blocks)
    root = _root(settings, probe, state, params)
    everything = ~(state.info.sharpness > 0)
    iterations = jnp.where(everything | alarmed, FIRST_ITERATIONS, settings.iterations)

    def measure(mix: Any, vector: Any, by_block: list[int]) -> tuple[jax.Array, Any]:
        gradient = None
        if gradients is not None:
            gradient = jax.tree.map(partial(_mixed, jnp.asarray(mix)), gradients)
        product = PRODUCTS[settings.curvature](losses, mix, params, args, gradient)
        curvature, vector = power_iteration(product, vector, root, by_block, iterations)
        return curvature.astype(state.info.cost.dtype), vector

    def one_loss(k: int, known: _Measured) -> _Measured:
        prices, vectors = known
        cost, vector = measure(np.eye(num_terms)[k], vectors[k], labels)
        cost = jnp.where(jnp.isfinite(cost), cost, prices.cost[k])
        prices = prices._replace(cost=prices.cost.at[k].set(cost))
        return prices, (*vectors[:k], vector, *vectors[k + 1 :])

    def the_sum(known: _Measured) -> _Measured:
        prices, vectors = known
        (total,), vector = measure(state.weights, vectors[num_terms], [0] * len(labels))
        vectors = (*vectors[:num_terms], vector, *vectors[num_terms + 1 :])
        rows = total[None]
        if len(names) > 1:
            rows, vector = measure(state.weights, vectors[-1], labels)
            vectors = (*vectors[:-1], vector)
        total = jnp.where(jnp.isfinite(total), total, prices.sharpness)
        rows = jnp.where(jnp.isfinite(rows), rows, prices.row_sharpness)
        return prices._replace(sharpness=total, row_sharpness=rows), vectors

    turns = [partial(one_loss, k) for k in range(num_terms)] + [the_sum]
    turn = (state.count // settings.every) % len(turns)
    turn = jnp.where(alarmed, num_terms, turn)
    prices = _known_prices(state)._replace(limit=_limit(settings, probe, state))
    return jax.lax.fori_loop(
        jnp.where(everything, 0, turn),
        jnp.where(everything, len(turns), turn + 1),
        lambda t, known: jax.lax.switch(t, turns, known),
        (cast_like(prices, _known_prices(state)), state.vectors),
    )


def _root(
    settings: TrainingSettings, probe: Probe | None, state: TrainingState, params: Any
) -> Any | None:
    """P^{1/2} shaped like the parameters; None for the identity."""
    if settings.metric is not None:
        return jax.tree.map(jnp.sqrt, settings.metric(state.base_state, params))
    if probe is None or not probe.known:
        return None
    inverse = probe.inverse_root(state.base_state, params)
    return jax.tree.map(lambda r: jnp.where(r > 0, 1 / jnp.where(r > 0, r, 1), jnp.inf), inverse)


def _limit(settings: TrainingSettings, probe: Probe | None, state: TrainingState) -> jax.Array:
    if callable(settings.limit):
        return jnp.asarray(settings.limit(state.count))
    if settings.limit is not None:
        return jnp.asarray(settings.limit)
    return jnp.asarray(jnp.inf) if probe is None else probe.limit(state.base_state)


def _known_prices(state: TrainingState) -> _Prices:
    """What the last measurement said."""
    info = state.info
    return _Prices(info.cost, info.sharpness, info.row_sharpness, info.limit)


def _total(weights: jax.Array, cost: jax.Array) -> jax.Array:
    return jnp.vdot(weights, jnp.sum(cost, axis=1))


def _watch(settings: TrainingSettings, state: TrainingState, total: jax.Array) -> _Watch:
    known = jnp.isfinite(total)
    started = known & (state.level != 0)
    left = started & (total > ALARM * state.level)
    alarmed = left & (total > ALARM * state.peak)
    recovering = left | (state.recovering & (total > state.level))
    # while the loss is away its average all but rests: following it would excuse the next excursion
    follow = jnp.where(recovering, 1e-3, 0.1)
    level = (1 - follow) * state.level + follow * jnp.minimum(total, ALARM * state.level)
    level = jnp.where(known, jnp.where(started, level, total), state.level)
    peak = jnp.where(alarmed, total, ALARM_MEMORY * state.peak)
    loose: Any = jnp.inf if settings.guard is None else settings.guard
    grown = jnp.minimum(loose, jnp.where(left & ~state.recovering, 0.5, 1.001) * state.headroom)
    headroom = jnp.maximum(grown, jnp.minimum(loose, settings.target))
    return _Watch(level, peak, alarmed, recovering, ~known, headroom)


def _decide(
    settings: TrainingSettings,
    scale_free: bool,
    state: TrainingState,
    terms: _Terms,
    prices: _Prices,
) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the new weights, and scores."""
    num_terms, rows = prices.cost.shape
    touched = jnp.broadcast_to(jnp.arange(rows), (num_terms, rows))
    weights = jnp.exp(state.log_weights)
    price = jnp.sum(prices.cost, axis=1)
    spend = partial(allocate, cost=prices.cost, rows=touched, rounds=settings.rounds)
    if settings.policy == "fair":
        given = (1.0,) * num_terms if settings.priorities is None else settings.priorities
        lower = jnp.full(num_terms, settings.floor, weights.dtype)
        upper = jnp.full(num_terms, settings.ceiling, weights.dtype)
        # shares of what the reference weights cost: no common factor, only ratios, move
        budget = jnp.sum(prices.cost, axis=0) - lower @ prices.cost
        shares = spend(
            jnp.asarray(given, weights.dtype),
            lower=lower,
            upper=upper,
            row_budget=jnp.maximum(budget, 0),
            policy="fair",
        ).weights
        aim = jnp.where(price > 0, jnp.log(shares), state.log_weights)
        ema = jnp.asarray(settings.ema, weights.dtype)
        return (1 - ema) * state.log_weights + ema * aim, state.scores
    worth = _worth(settings.value, terms.gradients)
    fresh = jnp.where(jnp.all(state.scores == 0), 1, settings.ema)
    scores = fresh * worth / jnp.where(price > 0, price, 1) + (1 - fresh) * state.scores
    lower = jnp.maximum(settings.floor, (1 - settings.max_step_change) * weights)
    upper = jnp.minimum(settings.ceiling, (1 + settings.max_step_change) * weights)
    upper = jnp.maximum(upper, lower)
    target = settings.target * prices.limit
    if scale_free:
        budget = jnp.maximum(jnp.sum(prices.cost, axis=0) - lower @ prices.cost, 0)
    else:
        # the sum over terms over-counts the sharpness of the sum
        claimed = weights @ prices.cost
        true_share = prices.row_sharpness / jnp.where(claimed > 0, claimed, 1)
        at_lower = true_share * (lower @ prices.cost)
        budget = row_budgets(target, at_lower, settings.budget_fraction)
        budget = budget / jnp.where(true_share > 0, true_share, 1)
    spent = spend(scores * price, lower=lower, upper=upper, row_budget=budget, policy="greedy")
    return jnp.log(spent.weights), scores


def _grad_norm(stacked: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(stacked) ** 2, axis=1)


def _alignment(stacked: jax.Array) -> jax.Array:
    return jnp.real(stacked @ jnp.conj(jnp.sum(stacked, axis=0)))


WORTHS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "grad_norm": _grad_norm,
    "alignment": _alignment,
}
"""What a unit of a loss's weight is worth, from its gradients [K, size], leaf by leaf."""


def _worth(value: str, gradients: Any) -> jax.Array:
    parts = [WORTHS[value](g.reshape(g.shape[0], -1)) for g in jax.tree.leaves(gradients)]
    return jnp.sum(jnp.stack(parts), axis=0)


def _factors(
    settings: TrainingSettings,
    prices: _Prices,
    sharpness: jax.Array,
    drift: jax.Array,
    watch: _Watch,
) -> tuple[jax.Array, jax.Array]:
    """Guard [] and row gains [R]."""
    guard = jnp.ones_like(sharpness)
    known = jnp.isfinite(prices.limit) & (sharpness > 0) & jnp.isfinite(sharpness)
    if settings.guard is not None:
        tight = jnp.minimum(watch.headroom, settings.target)
        multiple = jnp.where(watch.recovering | watch.unwatched, tight, watch.headroom)
        over = multiple * prices.limit / jnp.where(known, sharpness, 1)
        guard = jnp.where(known, jnp.minimum(1, over), 1)
    gains = jnp.ones_like(prices.row_sharpness)
    if settings.row_gains:
        rows = prices.row_sharpness * drift
        usable = known & (rows > 0)
        gains = jnp.where(usable, settings.target * prices.limit / jnp.where(usable, rows, 1), 1)
        gains = jnp.clip(gains, 1 / settings.max_gain, settings.max_gain)
    return guard, gains


def _scale(
    move: Any, guard: jax.Array, gains: jax.Array, labels: list[int], healthy: jax.Array
) -> Any:
    treedef: Any
    leaves, treedef = jax.tree.flatten(move)
    factors = [guard * gains[label] for label in labels]
    scaled = [
        jnp.where(healthy, leaf * factor.astype(jnp.real(leaf).dtype), 0).astype(leaf.dtype)
        for leaf, factor in zip(leaves, factors, strict=True)
    ]
    return treedef.unflatten(scaled)


def _mixed(mix: jax.Array, stacked: jax.Array) -> jax.Array:
    mix = mix.astype(stacked.dtype)
    if stacked.shape[0] > UNROLLED:
        return jnp.tensordot(mix, stacked, axes=1)
    # unlike a product of matrices this fuses with what comes next
    parts = [mix[k] * stacked[k] for k in range(stacked.shape[0])]
    return sum(parts[1:], parts[0])


def _times(weights: jax.Array, stacked: jax.Array) -> jax.Array:
    return weights.astype(stacked.dtype).reshape(-1, *(1,) * (stacked.ndim - 1)) * stacked


def _of_gradients(measure: Callable[[Any], jax.Array], gradients: Any) -> jax.Array:
    return jnp.asarray(jnp.nan) if gradients is None else measure(gradients)


def _finite(updates: Any, stacked: Any) -> jax.Array:
    """Whether every number is; what overflows in their sum counts as infinite."""
    total = updates
    if stacked is not None:
        total = jax.tree.map(lambda u, g: u + _mixed(jnp.ones(g.shape[0]), g), updates, stacked)
    # zeros, or NaN: a sum of floats is one fused pass, which a reduction of booleans is not
    return sum((jnp.sum(0 * leaf) for leaf in jax.tree.leaves(total)), jnp.zeros(())) == 0


def _check_term_grads(term_grads: Any, params: Any, num_terms: int) -> None:
    given: Any = jax.tree.structure(term_grads)
    if given != jax.tree.structure(params):
        raise ValueError("term_grads must have the tree structure of params")
    for (path, stacked), leaf in zip(
        jax.tree_util.tree_leaves_with_path(term_grads), jax.tree.leaves(params), strict=True
    ):
        if stacked.shape != (num_terms, *leaf.shape):
            raise ValueError(
                f"term_grads{jax.tree_util.keystr(path)} has shape {stacked.shape}, expected "
                f"{(num_terms, *leaf.shape)}: one gradient for each of the {num_terms} losses"
            )
