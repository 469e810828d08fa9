"""The baselines of the validation plan, on energy graphs: GradNorm, and one common cap."""

import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_bounds, check_fraction
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.proposal import Limit, Settings
from smallgain_jax.graphs.reweighted import reweighted
from smallgain_jax.graphs.weights import cap_rule, gradnorm_rule
from smallgain_jax.spectral.rows import Activity


def gradnorm(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph,
    *,
    target_norm: ArrayLike = 1.0,
    alpha: ArrayLike = 1.5,
    update_rate: ArrayLike = 0.1,
    floor: ArrayLike = 0.5,
    ceiling: ArrayLike = 2.0,
    objective: str = "adapted",
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""The design note's baseline: pull the gradient norms of all terms towards a common one.

    $w_k \leftarrow \operatorname{clip}((1 - \eta) w_k + \eta\, w_k\,
    \bar n\, r_k^\alpha / n_k)$, with $n_k = w_k \|\nabla e_k\|$, $\bar n$ = target_norm times their
    mean, and $r_k$ a term's energy relative to the mean of all (Chen et al., *GradNorm*, ICML 2018,
    equation 2, as a multiplicative update).

    Args:
      base_optimizer, terms, objective, max_backtracks: as in `graph_small_gain`.
      target_norm: multiple of the mean norm aimed at.
      alpha: how much terms that lag behind are favoured.
      update_rate: eta in [0, 1].
      floor, ceiling: clamps of every weight.

    Returns:
      An optax transformation with the state of `graph_small_gain`.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> state = gradnorm(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5]))
    >>> state.weights.tolist()
    [1.0]
    """
    check_bounds("floor", floor, "ceiling", ceiling)
    check_fraction("update_rate", update_rate)

    rule = gradnorm_rule(
        target_norm=target_norm, alpha=alpha, update_rate=update_rate, floor=floor, ceiling=ceiling
    )
    settings = Settings(objective=objective, max_backtracks=max_backtracks)
    return reweighted(base_optimizer, terms, rule, settings)


def auto_cap(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph,
    *,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    objective: str = "adapted",
    smoothing: Activity | float | None = 1e-3,
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""The design note's baseline: one common weight $w = \min(1, T / L)$ for all terms.

    Args:
      base_optimizer, terms, limit, target, objective, smoothing, max_backtracks: as in
        `graph_small_gain`.

    Returns:
      An optax transformation with the state of `graph_small_gain`.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> x = jnp.array([1.0, 0.5])
    >>> optimizer = auto_cap(optax.sgd(0.1), graph, limit=6.0, target=0.5)  # L = 4
    >>> optimizer.update(graph.gradient(x), optimizer.init(x), x)[1].weights.tolist()
    [0.75]
    """
    settings = Settings(
        limit=limit,
        target=target,
        objective=objective,
        smoothing=smoothing,
        max_backtracks=max_backtracks,
    )
    return reweighted(base_optimizer, terms, cap_rule, settings)
