r"""First weights of losses whose units mean nothing, found on the first batch.

A loss times a constant is the same loss in another unit. Weights that are found from the losses
themselves take the constant out again, before an optimizer has felt it:

$$ w_k = S \, \frac{p_k}{\lambda_k \sum_j p_j}, \qquad
   \lambda_k = \lambda_{\max}(\nabla^2 e_k) \text{ at the first batch,} $$

p the priorities. The curvature is that in the identity metric, for second moments are not there
yet. A loss that does not bend (a linear one), or that only a later batch holds, is made as large as
the others are on the average, in its cost where that is known, else in the length of its gradient:
$w_k \|\nabla e_k\| / p_k = \mathrm{mean}_j\, w_j \|\nabla e_j\| / p_j$.

The common factor S is a rule, too, for the unit of the sum is as arbitrary:

* An optimizer that feels it (gradient descent, momentum: one with a limit in the identity metric)
  gets S = 1, or `target` times its limit where that is less. The costs of the losses then add up
  to S at the first batch, and the learning rate is relative to that: at S = 1 gradient descent is
  stable below 2 there, heavy ball below 2 (1 + beta); above, S falls as the rate rises.
* For any other, the first gradient has entries of 1 in the root mean square: far from every eps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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

    cost: jax.Array  # [K, R] as last measured, 0 before
    sizes: jax.Array  # [K] norms of the gradients, 0 for what is not finite
    one: float  # cost of all losses where none with a weight has a cost; 0 for none
    usual: float  # norm of a gradient where none with a weight has one


def find_units(
    losses: Losses,
    settings: Settings,
    state: TrainingState,
    cost: jax.Array,
    sight: tuple[Any, Batch],
    most: jax.Array | None,
    updates: Any,
) -> Units:
    """Weigh the losses that have no weight yet; nothing is evaluated where there are none.

    Args:
      cost: [K, R] as last measured.
      sight: parameters, and the batch of the update.
      most: the largest total cost [] for the base optimizer; None where it feels no common factor.
      updates: what was handed in, for `gradient` where no weight is new; None for no gradient.
    """
    params, batch = sight
    num_terms = state.weights.size
    dtype = state.weights.dtype
    first = unseen(state)
    # the rule for the common factor, for a loss that shares no batch with any other
    usual = (1.0, 0.0) if most is not None else (0.0, _entries(params) ** 0.5)

    def slope(mix: jax.Array) -> Any:
        found = jax.grad(mixture(losses.parts, mix))(params, *batch.args, **batch.kwargs)
        return settings.mean(found)

    def find() -> Units:
        def look(k: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            sizes, _ = carry
            alone = jnp.arange(num_terms) == k
            weights = weigh(settings, state, Looked(cost, sizes, *usual))
            weights = weights * jnp.exp(state.log_weights)
            gradient = slope(jnp.where(k < num_terms, alone.astype(dtype), weights))
            size = norm(gradient, dtype)
            return jnp.where(alone & jnp.isfinite(size), size, sizes), gradient

        nothing = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.result_type(x)), params)
        carry = (jnp.zeros(num_terms, dtype), nothing)
        sizes, gradient = jax.lax.fori_loop(0, num_terms + 1, look, carry)
        weights = weigh(settings, state, Looked(cost, sizes, *usual))
        factor = jnp.where(first, _common_factor(cost, gradient, most, dtype), 1)
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
    cost, sizes, one, usual = looked
    parts = settings.parts(sizes.size, sizes.dtype, first=True)
    fresh = unseen(state)
    weights = jnp.where(fresh, first_shares(settings, cost), state.first_weights)
    # by what it costs, of those that only a later batch held
    weights = _as_the_others(weights, jnp.sum(cost, axis=1), parts, one)
    return _as_the_others(weights, sizes, parts, jnp.where(fresh & ~jnp.any(weights > 0), 1, usual))


def _as_the_others(
    weights: jax.Array, sizes: jax.Array, parts: jax.Array, usual: jax.Array | float
) -> jax.Array:
    """Weights at which the sizes of new losses are those of the known ones on the average.

    `usual` stands for the average where there is none; 0 to leave new ones without a weight.
    """
    known, there = weights > 0, sizes > 0
    both = known & there
    average = jnp.sum(jnp.where(both, weights * sizes / parts, 0)) / jnp.maximum(jnp.sum(both), 1)
    average = jnp.where(jnp.any(both), average, usual)
    found = jnp.where(there, parts * average / jnp.where(there, sizes, 1), 0)
    return jnp.where(known, weights, found)


def plain_weight(settings: Settings, first_weights: jax.Array) -> jax.Array:
    """One weight [] for all losses at which their sum costs what it costs by their first weights.

    With it the plain sum goes on at the scale of fair shares: no jump for second moments.
    """
    if not settings.unitless:
        return jnp.ones((), first_weights.dtype)
    parts = settings.parts(first_weights.size, first_weights.dtype, first=True)
    known = first_weights > 0
    price = jnp.where(known, parts / jnp.where(known, first_weights, 1), 0)
    paid = jnp.sum(jnp.where(known, parts, 0))
    return jnp.where(jnp.any(known), paid / jnp.where(jnp.any(known), jnp.sum(price), 1), 1)


def _common_factor(cost: jax.Array, gradient: Any, most: jax.Array | None, dtype: Any) -> jax.Array:
    """S, from the gradient at S = 1."""
    length = norm(gradient, dtype)
    factor = jnp.where(length > 0, _entries(gradient) ** 0.5 / jnp.where(length > 0, length, 1), 1)
    if most is None:
        return factor
    return jnp.where(jnp.any(cost > 0), jnp.minimum(most.astype(dtype), 1), factor)


def _entries(tree: Any) -> int:
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))
