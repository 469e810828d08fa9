r"""What each loss costs: its curvature in the base optimizer's metric, one measurement in turn.

With P the metric, $\lambda_k = \lambda_{\max}(P^{-1/2} \nabla^2 e_k P^{-1/2})$ by power iteration,
from below. A turn prices one loss, or the weighted sum, at about one product with a Hessian; the
first prices all of them.

Under the metric of the Adam family $P = \sqrt{\hat\nu}$ holds the weights already: where a loss is
alone with its parameters, $P \propto w_k$ there, and its share $w_k \lambda_k$ does not depend on
$w_k$ at all. With $\varphi_k = \partial \log P / \partial \log w_k = w_k g_k g / g^2$ by coordinate
(g the weighted gradient) and v the unit vector of $\lambda_k$, the share answers to the weight by

$$ \frac{\partial \log (w_k \lambda_k)}{\partial \log w_k} = 1 - \langle v^2, \varphi_k \rangle, $$

the `response`; a weight is moved by no more than that part of the way.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import HIGHEST
from smallgain_jax.losses.losses import Batch, Losses
from smallgain_jax.losses.sharpness import PRODUCTS, mixture
from smallgain_jax.losses.state import Settings, TrainingState, Vectors
from smallgain_jax.spectral.power import label_blocks, power_iteration, random_vector

FIRST_ITERATIONS = 20
"""Of power iteration from its random start; other calls go on from the last one's vector."""
AFRESH = 5
"""The least from a start that no last call left: where losses have no vectors of their own, that of
the sum, which may be orthogonal to all that one loss bends, with as much of a random one."""
SWITCHED = 4
"""Losses up to which each has a branch of its own, which passes only through what it depends on;
beyond, one branch takes a mixture that is data, and the program does not grow with K."""


class Prices(NamedTuple):
    """The losses to second order, in the metric, as last measured."""

    cost: jax.Array  # [K, R]
    response: jax.Array  # [K]
    sharpness: jax.Array  # [] of the weighted sum
    row_sharpness: jax.Array  # [R] of its diagonal blocks
    limit: jax.Array  # []


class Measured(NamedTuple):
    """Outcome of a turn."""

    prices: Prices
    vectors: Vectors
    turn: jax.Array  # [] int32, the next one
    misses: jax.Array  # [] int32, more than 0 where nothing was found and the turn is repeated


_Known = tuple[Prices, Vectors, jax.Array]  # and whether all that was looked for was found


class Sight(NamedTuple):
    """Where the losses are looked at."""

    params: Any
    batch: Batch
    inverse_root: Any  # P^{-1/2}; None for the identity
    adaptive: bool  # whether it comes from the gradients, and so from the weights
    early: jax.Array  # [] bool, whether the metric means nothing yet; the identity stands for it
    new: jax.Array  # [] bool, whether the loss in turn has no weight yet
    gradient: Any  # of the weighted sum, as far as it is known
    term_gradients: Any  # [K, ...] on this batch; None where they are not known


def unseen(state: TrainingState) -> jax.Array:
    """Whether no loss has a first weight yet []."""
    return jnp.all(state.first_weights <= 0)


def known_prices(state: TrainingState) -> Prices:
    """What the last measurement said."""
    info = state.info
    return Prices(info.cost, info.response, info.sharpness, info.row_sharpness, info.limit)


def measure(losses: Losses, settings: Settings, state: TrainingState, sight: Sight) -> Measured:
    """Price what is in turn; at first, everything.

    A price of zero or none is no measurement (a task that this batch does not hold): the last one
    stays, and the turn is tried again at the next updates, K of them at most.
    """
    num_terms = state.weights.shape[0]
    eye = jnp.eye(num_terms, dtype=state.weights.dtype)
    afresh = None
    if state.vectors.each is None:
        random = random_vector(1, state.vectors.total)
        afresh = jax.tree.map(jnp.add, state.vectors.total, random)
    price = partial(_price_of_one, losses, settings, state, sight, afresh)
    unit = jnp.where(state.first_weights > 0, state.first_weights, 1)
    total = partial(_price_of_sum, losses, settings, state, sight)

    def look(turn: jax.Array, known: _Known) -> _Known:
        if num_terms <= SWITCHED:
            each = [
                partial(price, [unit[k] if j == k else 0 for j in range(num_terms)], unit[k], k)
                for k in range(num_terms)
            ]
            found: _Known = jax.lax.switch(turn, [*each, total], known)
            return found
        one = lambda known: price(eye[turn] * unit, unit[turn], turn, known)  # noqa: E731
        return jax.lax.cond(turn < num_terms, one, total, known)

    everything = ~(state.info.sharpness > 0)
    first = jnp.where(everything & ~sight.new, 0, state.turn)
    stop = jnp.where(everything, num_terms + 1, state.turn + 1)
    # too early for the metric: only what it takes to have units
    stop = jnp.where(sight.early, jnp.where(unseen(state), num_terms, first), stop)
    stop = jnp.where(sight.new, state.turn + 1, stop)
    prices, vectors, found = jax.lax.fori_loop(
        first,
        stop,
        look,
        (known_prices(state), state.vectors, jnp.ones((), bool)),
    )
    again = ~found & (state.misses < num_terms)
    unpriced = jnp.all(prices.cost <= 0, axis=1)
    repeated = jnp.where(everything, jnp.argmax(jnp.append(unpriced, True)), state.turn)
    next_turn = jnp.where(everything, 0, (state.turn + 1) % (num_terms + 1))
    return Measured(
        prices,
        vectors,
        jnp.where(again, repeated, next_turn).astype(jnp.int32),
        jnp.where(again, state.misses + 1, 0),
    )


def _iterations(settings: Settings, state: TrainingState) -> jax.Array:
    return jnp.where(state.info.sharpness > 0, settings.iterations, FIRST_ITERATIONS)


def _curvature(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    sight: Sight,
    mix: Any,
    start: Any,
    labels: list[int],
    iterations: jax.Array,
) -> tuple[jax.Array, Any]:
    gradient = None
    if sight.term_gradients is not None:
        gradient = jax.tree.map(partial(mixed, jnp.asarray(mix)), sight.term_gradients)
    product = PRODUCTS[settings.curvature](losses, mix, sight.params, sight.batch, gradient)
    found, vector = power_iteration(
        lambda v: settings.mean(product(v)),
        start,
        sight.inverse_root,
        labels,
        iterations,
    )
    return found.astype(state.info.cost.dtype), vector


def _price_of_one(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    sight: Sight,
    afresh: Any,
    mix: Any,
    unit: jax.Array,
    k: Any,
    known: _Known,
) -> _Known:
    prices, vectors, found = known
    labels, _ = label_blocks(sight.params, settings.blocks)
    own = vectors.each is not None
    iterations = _iterations(settings, state)
    if own:
        start = jax.tree.map(lambda v: v[k], vectors.each)
    else:
        start = afresh
        iterations = jnp.maximum(iterations, AFRESH)
    cost, vector = _curvature(losses, settings, state, sight, mix, start, labels, iterations)
    cost = cost / unit
    seen = jnp.isfinite(cost) & (cost > 0)
    cost = jnp.where(seen, cost, prices.cost[k])
    prices = prices._replace(cost=prices.cost.at[k].set(cost))
    if settings.policy == "fair" and sight.adaptive:
        answers = _response(losses, settings, state, sight, mix, state.weights[k] / unit, vector)
        prices = prices._replace(response=prices.response.at[k].set(answers))
    if own:
        each = jax.tree.map(lambda all_, v: all_.at[k].set(v), vectors.each, vector)
        vectors = vectors._replace(each=each)
    return prices, vectors, found & jnp.any(seen)


def _price_of_sum(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    sight: Sight,
    known: _Known,
) -> _Known:
    prices, vectors, found = known
    labels, names = label_blocks(sight.params, settings.blocks)
    weights = state.weights
    if settings.unitless:
        weights = jnp.where(unseen(state), first_shares(settings, prices.cost), weights)
    look = partial(
        _curvature,
        losses,
        settings,
        state,
        sight,
        weights,
        iterations=_iterations(settings, state),
    )
    (total,), vector = look(vectors.total, [0] * len(labels))
    vectors = vectors._replace(total=vector)
    rows = total[None]
    if len(names) > 1:
        rows, vector = look(vectors.by_block, labels)
        vectors = vectors._replace(by_block=vector)
    total = jnp.where(jnp.isfinite(total) & (total > 0), total, prices.sharpness)
    rows = jnp.where(jnp.isfinite(rows) & (rows > 0), rows, prices.row_sharpness)
    return prices._replace(sharpness=total, row_sharpness=rows), vectors, found


def first_shares(settings: Settings, cost: jax.Array) -> jax.Array:
    """Weights [K] at which costs are as priorities say, and 1 in all; 0 without a cost."""
    price = jnp.sum(cost, axis=1)
    parts = settings.parts(price.shape[0], price.dtype)
    return jnp.where(price > 0, parts / jnp.where(price > 0, price, 1), 0)


def _response(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    sight: Sight,
    mix: Any,
    weight: jax.Array,
    vector: Any,
) -> jax.Array:
    """1 - <v^2, phi_k>: what is left of a change of w_k in the share of loss k.

    `weight` is w_k over its entry in `mix`.
    """
    if sight.term_gradients is not None:
        own = jax.tree.map(partial(mixed, jnp.asarray(mix)), sight.term_gradients)
    else:
        slope = jax.grad(mixture(losses.parts, mix))
        own = settings.mean(slope(sight.params, *sight.batch.args, **sight.batch.kwargs))
    dtype = state.info.cost.dtype

    def parts(g: jax.Array, whole: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        g, whole, v = (x.astype(dtype) for x in (g, whole, v))
        phi = jnp.where(whole != 0, weight * g / jnp.where(whole != 0, whole, 1), 0)
        phi = jnp.clip(phi, 0, 1)
        return jnp.sum(v**2 * phi), jnp.sum(v**2)

    pairs = jax.tree.map(parts, own, sight.gradient, vector)
    inside = jax.tree.leaves(pairs)
    felt, whole = sum(inside[::2]), sum(inside[1::2])
    return jnp.clip(1 - felt / jnp.where(whole > 0, whole, 1), 0, 1)


def mixed(mix: jax.Array, stacked: jax.Array) -> jax.Array:
    """sum_k m_k of the leading axis."""
    mix = mix.astype(stacked.dtype)
    if stacked.shape[0] > 2 * SWITCHED:
        return jnp.tensordot(mix, stacked, axes=1, precision=HIGHEST)
    # unlike a product of matrices this fuses with what comes next
    parts = [mix[k] * stacked[k] for k in range(stacked.shape[0])]
    return sum(parts[1:], parts[0])


def limit_of(settings: Settings, probe: Any, state: TrainingState, present: Any) -> jax.Array:
    """Curvature limit of the base optimizer at this update, at most the largest float."""
    if callable(settings.limit):
        found = settings.limit(state.count)
    elif settings.limit is not None:
        found = settings.limit
    else:
        found = probe.limit(state.base_state, present)
    dtype = state.info.limit.dtype
    return jnp.minimum(jnp.asarray(found, dtype), jnp.finfo(dtype).max)


def inverse_root_of(
    settings: Settings, probe: Any, state: TrainingState, params: Any, present: Any
) -> Any:
    """P^{-1/2} of the base optimizer at this update; None for the identity."""
    if settings.metric is not None:
        metric = settings.metric(state.base_state, params)
        return jax.tree.map(lambda p: 1 / jnp.sqrt(p), metric)
    return probe.inverse_root(state.base_state, params, present) if probe.known else None
