r"""First weights of losses whose units mean nothing, found on the first batch.

A loss times a constant is the same loss in another unit. Weights that are found from the losses
themselves take the constant out again, before an optimizer has felt it:

$$ w_k = S \, \frac{p_k}{\lambda_k \sum_j p_j}, \qquad
   \lambda_k = \lambda_{\max}(\nabla^2 e_k) \text{ at the first batch,} $$

p the priorities. The curvature is that in the identity metric, for second moments are not there
yet. A loss that does not bend (a linear one), or that only a later batch holds, is given a gradient
as long as those of the others are on the average:
$w_k \|\nabla e_k\| / p_k = \mathrm{mean}_j\, w_j \|\nabla e_j\| / p_j$.

The common factor S is a rule, too, for the unit of the sum is as arbitrary:

* An optimizer that feels it (gradient descent, momentum: one with a limit in the identity metric)
  gets S = 1. The costs of the losses then add up to 1 at the first batch, and the learning rate is
  relative to that: gradient descent is stable below 2 there, heavy ball below 2 (1 + beta).
* For any other, the first gradient has entries of 1 in the root mean square: far from every eps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smallgain_jax._checks import cast_like
from smallgain_jax._tree import norm, select, when
from smallgain_jax.losses.losses import Batch, Losses
from smallgain_jax.losses.prices import first_shares, unseen
from smallgain_jax.losses.sharpness import mixture
from smallgain_jax.losses.state import Settings, TrainingState


class Units(NamedTuple):
    """What makes losses comparable."""

    first_weights: jax.Array  # [K]; 0 for a loss that neither bent nor sloped so far
    factor: jax.Array  # [] S, where this is the first look; else 1
    gradient: Any  # of the sum by the new weights, on this batch; None if not asked for


class Looked(NamedTuple):
    """How the losses appear, in units of their own."""

    cost: jax.Array  # [K, R] as just measured, in the identity metric
    sizes: jax.Array  # [K] norms of the gradients, 0 for what is not finite


def find_units(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    cost: jax.Array,
    sight: tuple[Any, Batch],
    feels: bool,
    updates: Any,
) -> Units:
    """Weigh the losses that have no weight yet; nothing is evaluated where there are none.

    Args:
      cost: [K, R] as just measured.
      sight: parameters, and the batch of the update.
      feels: whether the base optimizer feels a common factor.
      updates: what was handed in, for `gradient` where no weight is new; None for no gradient.
    """
    params, batch = sight
    num_terms = state.weights.size
    dtype = state.weights.dtype
    first = unseen(state)

    def slope(mix: jax.Array) -> Any:
        found = jax.grad(mixture(losses.parts, mix))(params, *batch.args, **batch.kwargs)
        return settings.mean(found)

    def find() -> Units:
        def look(k: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            sizes, _ = carry
            alone = jnp.arange(num_terms) == k
            weights = weigh(settings, state, Looked(cost, sizes)) * jnp.exp(state.log_weights)
            gradient = slope(jnp.where(k < num_terms, alone.astype(dtype), weights))
            size = norm(gradient, dtype)
            return jnp.where(alone & jnp.isfinite(size), size, sizes), gradient

        nothing = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.result_type(x)), params)
        carry = (jnp.zeros(num_terms, dtype), nothing)
        sizes, gradient = jax.lax.fori_loop(0, num_terms + 1, look, carry)
        weights = weigh(settings, state, Looked(cost, sizes))
        factor = jnp.where(first, _common_factor(cost, gradient, feels, dtype), 1)
        weights = jnp.where(jnp.isfinite(factor * weights), factor * weights, 0)
        new = jnp.any(weights != state.first_weights)
        if updates is not None:
            gradient = jax.tree.map(lambda g: factor.astype(g.dtype) * g, gradient)
            gradient = select(new, gradient, updates)
        found = Units(weights, factor, None if updates is None else gradient)
        return cast_like(found, kept)

    kept = Units(state.first_weights, jnp.ones((), dtype), updates)
    found: Units = when(jnp.any(state.first_weights <= 0), find, lambda: kept)
    return found


def weigh(settings: Settings, state: TrainingState, looked: Looked) -> jax.Array:
    """First weights [K] up to their common factor; those that are known stay."""
    parts = settings.parts(looked.sizes.size, looked.sizes.dtype)
    weights = jnp.where(unseen(state), first_shares(settings, looked.cost), state.first_weights)
    known, slopes = weights > 0, looked.sizes > 0
    reach = jnp.where(known, weights * looked.sizes / parts, 0)
    usual = jnp.sum(reach) / jnp.maximum(jnp.sum(known), 1)
    usual = jnp.where(jnp.any(known), usual, 1)
    by_slope = parts * usual / jnp.where(slopes, looked.sizes, 1)
    return jnp.where(known, weights, jnp.where(slopes, by_slope, 0))


def _common_factor(cost: jax.Array, gradient: Any, feels: bool, dtype: Any) -> jax.Array:
    """S, from the gradient at S = 1."""
    entries = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    length = norm(gradient, dtype)
    factor = jnp.where(length > 0, entries**0.5 / jnp.where(length > 0, length, 1), 1)
    return jnp.where(jnp.any(cost > 0), 1, factor) if feels else factor
