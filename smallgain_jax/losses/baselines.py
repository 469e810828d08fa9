"""Baselines for losses: gradient norms pulled together, and one common cap."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import (
    cast_like,
    check_call,
    check_fraction,
    check_optimizer,
    check_positive,
    check_target,
)
from smallgain_jax._show import shows
from smallgain_jax._tree import all_finite, select, stat_dtype, zero_count
from smallgain_jax.losses.losses import Batch, Losses, check_params
from smallgain_jax.losses.prices import mixed
from smallgain_jax.losses.small_gain import loss_small_gain


@shows(bars="weights")
class GradNormState(NamedTuple):
    """State of `loss_gradnorm`. K losses."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates that were not skipped
    weights: jax.Array  # [K], mean 1
    first: jax.Array  # [K] losses at the first update; 0 before
    skipped: jax.Array  # [] int32, updates in which something was not finite
    base_state: Any


def loss_gradnorm(
    base_optimizer: optax.GradientTransformation,
    terms: Losses,
    *,
    target_norm: ArrayLike = 1.0,
    alpha: ArrayLike = 1.5,
    update_rate: ArrayLike = 0.1,
    floor: ArrayLike = 1e-4,
    ceiling: ArrayLike = 1e4,
) -> optax.GradientTransformationExtraArgs:
    r"""GradNorm on the losses of a model: pull the norms of their weighted gradients together.

    With $n_k = w_k \|\nabla e_k\|$, their mean $\bar n$, and $r_k$ the part of its first value at
    which loss k still stands, over the mean of these parts,

    $$ w_k \leftarrow w_k \left(1 + \eta \left(\tau \bar n\, r_k^\alpha / n_k - 1\right)\right), $$

    scaled to a mean of 1 and clipped (Chen et al., *GradNorm*, ICML 2018, equation 2, as a
    multiplicative update). Each loss is differentiated by itself; what is handed in is not used.

    Args:
      base_optimizer: any optax optimizer.
      terms: made by `sg.terms`; meant for losses that are positive.
      target_norm: tau, multiple of the mean norm aimed at.
      alpha: how much losses that lag behind are favoured.
      update_rate: eta in [0, 1].
      floor, ceiling: clamps of every weight.

    Returns:
      An optax transformation with a `GradNormState`; `update` needs `params`, and `term_args`
      where the losses take more.

    >>> from smallgain_jax.losses.losses import terms
    >>> losses = terms(lambda x: {"a": jnp.sum(x**2), "b": 100 * jnp.sum(x**2)})
    >>> optimizer = loss_gradnorm(optax.sgd(1e-4), losses, alpha=0.0)
    >>> x = jnp.ones(2)
    >>> state = optimizer.init(x)
    >>> for _ in range(100):
    ...     updates, state = optimizer.update(x, state, x)
    >>> round(float(state.weights[0] / state.weights[1]))
    100
    """
    check_optimizer("base_optimizer", base_optimizer)
    check_fraction("update_rate", update_rate)
    check_positive("floor", floor)
    check_positive("ceiling", ceiling)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> GradNormState:
        check_params(params)
        ones = jnp.ones(len(terms.names_at(params)), stat_dtype(params))
        return GradNormState(
            zero_count(), ones, jnp.zeros_like(ones), zero_count(), base.init(params)
        )

    def update(
        updates: Any, state: GradNormState, params: Any = None, *, term_args: Any = (), **extra: Any
    ) -> tuple[Any, GradNormState]:
        check_call(GradNormState, updates, state, params)
        batch = Batch.of(term_args)
        values, grads = terms.value_and_term_grads(params, *batch.args, **batch.kwargs)
        healthy = all_finite((values, grads))
        dtype = state.weights.dtype
        values = values.astype(dtype)
        first = jnp.where(state.count == 0, values, state.first)
        sizes = jax.tree.leaves(jax.tree.map(partial(_squares, dtype), grads))
        norms = state.weights * jnp.sqrt(sum(sizes, jnp.zeros_like(values)))
        part = jnp.abs(values) / jnp.where(first != 0, jnp.abs(first), 1)
        ratio = _aim_over(norms, part, target_norm, alpha)
        moved = state.weights * (1 + update_rate * (ratio - 1))
        moved = jnp.clip(moved / jnp.mean(moved), floor, ceiling)
        weights = jnp.where(healthy, moved, state.weights)

        gradient = jax.tree.map(partial(mixed, jax.lax.stop_gradient(weights)), grads)
        gradient = jax.tree.map(lambda g: jnp.where(healthy, g, 0), gradient)
        move, base_state = base.update(gradient, state.base_state, params, **extra)
        nothing = jax.tree.map(jnp.zeros_like, move), state.base_state
        move, base_state = select(healthy, (move, base_state), nothing)
        new_state = GradNormState(
            state.count + healthy,
            weights,
            jnp.where(healthy, first, state.first),
            state.skipped + ~healthy,
            base_state,
        )
        return move, cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_auto_cap(
    base_optimizer: optax.GradientTransformation,
    terms: Losses,
    *,
    target: ArrayLike = 0.9,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""One common factor $\min(1, T / \lambda)$ on the step, $\lambda$ the measured sharpness.

    That is `loss_small_gain` at the reference weights with `guard=target`; `keywords` are its own.

    >>> from smallgain_jax.losses.losses import terms
    >>> losses = terms(lambda x: {"a": jnp.sum(x**2)})
    >>> loss_auto_cap(optax.sgd(0.1), losses).init(jnp.ones(2)).weights.tolist()
    [1.0]
    """
    check_target(target)
    guard: Any = target
    return loss_small_gain(base_optimizer, terms, target=target, guard=guard, **keywords)


def _aim_over(
    norms: jax.Array, part: jax.Array, target_norm: ArrayLike, alpha: ArrayLike
) -> jax.Array:
    """What each norm [K] is to be, more where a loss lags behind, over what it is; 1 for none."""
    lag = part / jnp.where(jnp.mean(part) > 0, jnp.mean(part), 1)
    aim = target_norm * jnp.mean(norms) * lag**alpha
    return jnp.where(norms > 0, aim / jnp.where(norms > 0, norms, 1), 1)


def _squares(dtype: Any, stacked: jax.Array) -> jax.Array:
    """Squared norm of each gradient of the leading axis, [K]."""
    return jnp.sum(stacked.astype(dtype).reshape(stacked.shape[0], -1) ** 2, axis=1)
