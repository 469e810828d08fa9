r"""What each loss costs: its curvature in the base optimizer's metric, one measurement in turn.

With P the metric, $\lambda_k = \lambda_{\max}(P^{-1/2} \nabla^2 e_k P^{-1/2})$ by power iteration,
from below. A turn prices one loss, or the weighted sum, at about one product with a Hessian; the
first prices all of them.

Under the metric of the Adam family $P = \sqrt{\hat\nu}$ holds the weights already: where a loss is
alone with its parameters, $P \propto w_k$ there, and its share $w_k \lambda_k$ does not depend on
$w_k$ at all. With $\varphi_k = \partial \log P / \partial \log w_k = w_k g_k g / g^2$ by coordinate
(g the weighted gradient) and v the unit vector of $\lambda_k$, the share answers to the weight by

$$ \frac{\partial \log (w_k \lambda_k)}{\partial \log w_k} = 1 - \langle v^2, \varphi_k \rangle, $$

the `response`; a weight is moved by no more than that part of the way. In the same way
$\langle v_k^2, \varphi_j \rangle$ is what share k loses as the weight of loss j rises.
"""

from collections.abc import Callable
from functools import partial
from inspect import isfunction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._tree import HIGHEST, matmul, select
from smallgain_jax.losses.losses import Batch, Losses
from smallgain_jax.losses.sharing import passes
from smallgain_jax.losses.sharpness import PRODUCTS, mixture
from smallgain_jax.losses.state import Settings, TrainingState, Vectors
from smallgain_jax.spectral.power import Product, label_blocks, power_iteration, random_vector

FIRST_ITERATIONS = 20
"""Of power iteration from its random start; other calls go on from the last one's vector."""
AFRESH = 5
"""The least from a start that no last call left: where losses have no vectors of their own, that of
the sum, which may be orthogonal to all that one loss bends, with as much of a random one."""
SWITCHED = 4
"""Losses up to which each has a product of its own, which passes only through what it depends on;
beyond, one product takes a mixture that is data, and the program does not grow with K."""
SPARED = 0.2
"""Share of a round of turns that products of their own must spare: heads on one network spare
next to nothing, and make the program K + 1 times as large."""


class Prices(NamedTuple):
    """The losses to second order, in the metric, as last measured."""

    cost: jax.Array  # [K, R]
    response: jax.Array  # [K]
    felt: Any  # [K, K] what share k feels of weight j; None where vectors are not kept
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
    inverse_root: Any  # P^{-1/2}, or a map that applies it; None for the identity
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
    known = info.sharpness, info.row_sharpness, info.limit
    return Prices(info.cost, info.response, state.felt, *known)


def measure(losses: Losses, settings: Settings, state: TrainingState, sight: Sight) -> Measured:
    """Price what is in turn; at first, everything.

    A price of zero or none is no measurement (a task that this batch does not hold): the last one
    stays, and the turn is tried again at the next updates, K of them at most.
    """
    num_terms = state.weights.shape[0]
    afresh = None
    if state.vectors.each is None:
        random = random_vector(1, state.vectors.total)
        afresh = jax.tree.map(jnp.add, state.vectors.total, random)
    apart = _pays_apart(losses, sight, num_terms)
    look = partial(_look, losses, settings, state, sight, afresh, apart)

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


class _Turn(NamedTuple):
    """One loss, or the weighted sum."""

    number: jax.Array  # [] int32, K for the sum
    mix: jax.Array  # [K]
    unit: jax.Array  # [] weight of the loss in the mixture
    apart: bool  # whether each has a program of its own

    @property
    def is_sum(self) -> jax.Array:
        return self.number == self.mix.shape[0]

    @property
    def loss(self) -> jax.Array:
        """Index of the loss; of the last one where it is the turn of the sum."""
        return jnp.minimum(self.number, self.mix.shape[0] - 1)

    def of(self, make: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
        """`make(mix)`; where turns are `apart`, through nothing but the losses in the mixture."""
        if not self.apart:
            return make(self.mix)
        count = self.mix.shape[0]
        alone = [make([self.mix[k] if j == k else 0 for j in range(count)]) for k in range(count)]
        return lambda *args: jax.lax.switch(self.number, [*alone, make(self.mix)], *args)


def _turn(
    settings: Settings, state: TrainingState, prices: Prices, number: jax.Array, apart: bool
) -> _Turn:
    weights = state.weights
    if settings.unitless:
        weights = jnp.where(unseen(state), first_shares(settings, prices.cost), weights)
    units = jnp.where(state.first_weights > 0, state.first_weights, 1)
    here = jnp.arange(weights.shape[0]) == number
    alone = jnp.where(here, units, 0).astype(weights.dtype)
    mix = jnp.where(jnp.any(here), alone, weights)
    return _Turn(number, mix, jnp.where(jnp.any(here), jnp.sum(alone), 1), apart)


def _pays_apart(losses: Losses, sight: Sight, num_terms: int) -> bool:
    """Whether a product of its own for each loss spares passes enough to be worth its program."""
    if num_terms > SWITCHED:
        return False
    args, kwargs = sight.batch
    alone = passes(lambda p: losses.parts(p, *args, **kwargs), sight.params)
    return alone + 1 < (1 - SPARED) * (num_terms + 1)


def _look(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    sight: Sight,
    afresh: Any,
    apart: bool,
    number: jax.Array,
    known: _Known,
) -> _Known:
    """The price of one loss, or of the sum."""
    prices, vectors, found = known
    turn = _turn(settings, state, prices, number, apart)
    labels, names = label_blocks(sight.params, settings.blocks)
    one_row = len(names) == 1
    # what a share answers is known where P has the weights in each entry by itself
    diagonal = not isfunction(sight.inverse_root)
    responds = settings.policy == "fair" and sight.adaptive and diagonal
    gradient = _gradient(losses, settings, sight, turn, responds)

    def product_by(mix: Any) -> Product:
        make = PRODUCTS[settings.curvature]
        return make(losses, mix, sight.params, sight.batch, gradient)

    iterations = jnp.where(state.info.sharpness > 0, settings.iterations, FIRST_ITERATIONS)
    start = afresh
    if vectors.each is not None:
        start = jax.tree.map(lambda v: v[turn.loss], vectors.each)
    start = select(turn.is_sum, vectors.total if one_row else vectors.by_block, start)
    some = iterations
    if vectors.each is None:
        some = jnp.where(turn.is_sum, iterations, jnp.maximum(iterations, AFRESH))
    product = turn.of(product_by)
    rows, vector = power_iteration(
        lambda v: settings.mean(product(v)), start, sight.inverse_root, labels, some
    )
    total, whole = rows, vector
    if not one_row:
        total, whole = jax.lax.cond(
            turn.is_sum,
            lambda: power_iteration(
                lambda v: settings.mean(product_by(turn.mix)(v)),
                vectors.total,
                sight.inverse_root,
                [0] * len(labels),
                iterations,
            ),
            lambda: (jnp.zeros(1, rows.dtype), vectors.total),
        )
    dtype = prices.cost.dtype
    prices, seen = _priced(prices, turn, rows.astype(dtype), total[0].astype(dtype))
    vectors = _kept(vectors, turn, vector, whole, one_row)
    if responds:
        prices = _answered(prices, turn, state, sight, gradient, vectors.each, vector)
    return prices, vectors, found & (turn.is_sum | seen)


def _gradient(losses: Losses, settings: Settings, sight: Sight, turn: _Turn, responds: bool) -> Any:
    """That of the mixture, where something needs it; of a loss alone, where only responses do."""
    if sight.term_gradients is not None:
        return jax.tree.map(partial(mixed, turn.mix), sight.term_gradients)
    differs = settings.curvature == "difference"
    if not (differs or responds):
        return None
    slope = turn.of(
        lambda mix: (
            lambda: jax.grad(mixture(losses.parts, mix))(
                sight.params, *sight.batch.args, **sight.batch.kwargs
            )
        )
    )
    if not differs:
        zeros = jax.tree.map(jnp.zeros_like, sight.params)
        return settings.mean(jax.lax.cond(turn.is_sum, lambda: zeros, slope))
    return settings.mean(slope())


def _priced(
    prices: Prices, turn: _Turn, rows: jax.Array, total: jax.Array
) -> tuple[Prices, jax.Array]:
    """Prices with what a turn found [R], and whether that was anything."""
    found = jnp.where(turn.is_sum, rows, rows / turn.unit)
    usable = jnp.isfinite(found) & (found > 0)
    before = prices.cost[turn.loss]
    cost = jnp.where(usable & ~turn.is_sum, found, before)
    row_sharpness = jnp.where(usable & turn.is_sum, found, prices.row_sharpness)
    known = turn.is_sum & jnp.isfinite(total) & (total > 0)
    prices = prices._replace(
        cost=prices.cost.at[turn.loss].set(cost),
        sharpness=jnp.where(known, total, prices.sharpness),
        row_sharpness=row_sharpness,
    )
    return prices, jnp.any(usable)


def _kept(vectors: Vectors, turn: _Turn, vector: Any, whole: Any, one_row: bool) -> Vectors:
    """Where the next calls go on from."""
    total = select(turn.is_sum, whole, vectors.total)
    by_block = vectors.by_block
    if not one_row:
        by_block = select(turn.is_sum, vector, by_block)
    each = vectors.each
    if each is not None:
        each = jax.tree.map(
            lambda all_, v: all_.at[turn.loss].set(jnp.where(turn.is_sum, all_[turn.loss], v)),
            each,
            vector,
        )
    return vectors._replace(total=total, by_block=by_block, each=each)


def first_shares(settings: Settings, cost: jax.Array) -> jax.Array:
    """Weights [K] at which costs are as priorities say, and 1 in all; 0 without a cost."""
    price = jnp.sum(cost, axis=1)
    parts = settings.parts(price.shape[0], price.dtype, first=True)
    return jnp.where(price > 0, parts / jnp.where(price > 0, price, 1), 0)


def _answered(
    prices: Prices,
    turn: _Turn,
    state: TrainingState,
    sight: Sight,
    gradient: Any,
    each: Any,
    vector: Any,
) -> Prices:
    """Prices with the response of the loss in turn, and with what all shares feel of its weight."""
    loss, dtype = turn.loss, prices.cost.dtype
    weight = state.weights[loss] / turn.unit
    alone = each is None
    vectors = jax.tree.map(lambda v: v[None], vector) if alone else each

    def parts(g: jax.Array, whole: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        g, whole, v = (x.astype(dtype) for x in (g, whole, v))
        phi = jnp.where(whole != 0, weight * g / jnp.where(whole != 0, whole, 1), 0)
        squares = (v**2).reshape(v.shape[0], -1)
        return matmul(squares, jnp.clip(phi, 0, 1).reshape(-1)), jnp.sum(squares, axis=1)

    inside = jax.tree.leaves(jax.tree.map(parts, gradient, sight.gradient, vectors))
    none = jnp.zeros((), dtype)
    felt, size = sum(inside[::2], none), sum(inside[1::2], none)
    felt = jnp.clip(felt / jnp.where(size > 0, size, 1), 0, 1)
    slopes = sum((jnp.sum(g != 0) for g in jax.tree.leaves(gradient)), jnp.zeros((), jnp.int32))
    # a weight that moves nothing: second moments that run dry in parameters of its own would make
    # its loss the dearest of all
    answer = jnp.where(slopes > 0, 1 - felt[0 if alone else loss], 0)
    prices = prices._replace(
        response=jnp.where(turn.is_sum, prices.response, prices.response.at[loss].set(answer))
    )
    if prices.felt is None:
        return prices
    known = prices.felt.at[:, loss].set(felt)
    return prices._replace(felt=jnp.where(turn.is_sum, prices.felt, known))


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
    """P^{-1/2} of the base optimizer at this update, or a map; None for the identity."""
    if settings.metric is not None:
        metric = settings.metric(state.base_state, params)
        # a model in Equinox is callable too, and a pytree like itself
        like: Any = jax.tree.structure(params)
        found: Any = jax.tree.structure(metric)
        if callable(metric) and (found != like or jax.tree_util.treedef_is_leaf(found)):
            return lambda v: metric(v)
        return jax.tree.map(lambda p: 1 / jnp.sqrt(p), metric)
    return probe.inverse_root(state.base_state, params, present) if probe.known else None
