"""`small_gain`: one name for graphs and for losses; the baselines of the validation plan."""

from collections.abc import Callable
from inspect import signature
from typing import Any, overload

import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_fraction, check_optimizer, check_positive
from smallgain_jax.allocation.knapsack import POLICIES
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.small_gain import Limit, Settings, reweighted
from smallgain_jax.graphs.small_gain import SmallGainInfo as SmallGainInfo
from smallgain_jax.graphs.small_gain import SmallGainState as SmallGainState
from smallgain_jax.graphs.weights import VALUES, allocation_rule, cap_rule, gradnorm_rule
from smallgain_jax.losses.losses import Losses
from smallgain_jax.losses.losses import terms as make_terms
from smallgain_jax.losses.small_gain import loss_small_gain
from smallgain_jax.losses.state import TrainingInfo as TrainingInfo
from smallgain_jax.losses.state import TrainingState as TrainingState
from smallgain_jax.spectral.rows import Activity

STATIC = (
    "every",
    "scaling_iterations",
    "max_backtracks",
    "rounds",
)
"""Arguments of `graph_small_gain` that shape the program: `static_args` of `inject_hyperparams`."""


def graph_small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | None = None,
    *,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    policy: str = "greedy",
    value: str = "alignment",
    objective: str = "reference",
    every: int = 1,
    budget_fraction: ArrayLike = 0.7,
    global_budget: ArrayLike = np.inf,
    max_step_change: ArrayLike = 0.1,
    floor: ArrayLike = 0.1,
    ceiling: ArrayLike = 3.0,
    ema: ArrayLike = 0.3,
    row_gains: bool = True,
    guard: str | None = "measured",
    rounds: int = 8,
    smoothing: Activity | float | None = 1e-3,
    scaling_iterations: int = 0,
    min_cosine: ArrayLike = 1e-3,
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """See `small_gain`."""
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r} is unknown: choose from {', '.join(POLICIES)}")
    if value not in VALUES:
        raise ValueError(f"value = {value!r} is unknown: choose from {', '.join(VALUES)}")
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    _check_floor("floor", floor, "ceiling", ceiling)
    check_fraction("budget_fraction", budget_fraction)
    check_fraction("max_step_change", max_step_change)
    check_fraction("ema", ema)
    check_fraction("target", target)
    rule = allocation_rule(
        policy=policy,
        value=value,
        every=every,
        budget_fraction=budget_fraction,
        global_budget=global_budget,
        max_step_change=max_step_change,
        floor=floor,
        ceiling=ceiling,
        ema=ema,
        rounds=rounds,
    )
    settings = Settings(
        limit=limit,
        target=target,
        objective=objective,
        smoothing=smoothing,
        scaling_iterations=scaling_iterations,
        row_gains=row_gains,
        guard=guard,
        min_cosine=min_cosine,
        max_backtracks=max_backtracks,
    )
    return reweighted(base_optimizer, terms, rule, settings)


@overload
def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | None = None,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs: ...


@overload
def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: Losses | Callable[..., Any],
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs: ...


def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | Losses | Callable[..., Any] | None = None,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap a base optimizer so that the terms of its objective share the stability margin.

    One name for two functions: `graph_small_gain` where the terms are the edges of an energy graph,
    `loss_small_gain` where they are the losses of a model. Their keywords and defaults differ, and
    stand in their own signatures; `optax.inject_hyperparams` takes either of the two.

    Args:
      base_optimizer: any optax optimizer.
      terms: the objective as an `EnergyGraph`; or the losses of a model, as `sg.terms(fn)` or their
        function itself; None leaves the base optimizer's update as it is.
      **keywords: those of `graph_small_gain` or of `loss_small_gain`.

    Returns:
      An optax transformation; its state is a `SmallGainState` on graphs, a `TrainingState` on
      losses.

    Raises:
      TypeError: `terms` that are neither; a keyword that belongs to the other kind, or to none.
      ValueError: an unknown name, or a concrete number outside its range.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer = small_gain(optax.sgd(0.1), graph)
    >>> sg.relax(graph, jnp.array([1.0, 0.5]), optimizer, steps=30).x.round(3).tolist()
    [0.0, 0.0]
    >>> losses = sg.terms(lambda x: {"fit": jnp.sum((x - 1) ** 2), "size": jnp.sum(x**2)})
    >>> small_gain(optax.adam(0.1), losses).init(jnp.ones(2)).weights.tolist()
    [1.0, 1.0]
    """
    check_optimizer("base_optimizer", base_optimizer)
    if terms is None or isinstance(terms, EnergyGraph):
        _check_keywords(keywords, "an energy graph", graph_small_gain, loss_small_gain)
        return graph_small_gain(base_optimizer, terms, **keywords)
    _check_keywords(keywords, "losses", loss_small_gain, graph_small_gain)
    return loss_small_gain(base_optimizer, as_losses(terms), **keywords)


def as_losses(terms: Any) -> Losses:
    """`terms` as losses, or an error that says what would do."""
    if isinstance(terms, Losses):
        return terms
    if not callable(terms):
        raise TypeError(
            "terms must be an EnergyGraph, losses made by sg.terms(fn), or fn itself, "
            f"got {type(terms).__name__}"
        )
    return make_terms(terms)


def _check_keywords(
    keywords: dict[str, Any], kind: str, own: Callable[..., Any], other: Callable[..., Any]
) -> None:
    known, foreign = (set(signature(fn).parameters) for fn in (own, other))
    for name in keywords:
        if name in known:
            continue
        if name in foreign:
            where = "losses" if kind != "losses" else "energy graphs"
            raise TypeError(
                f"{name} is a keyword of small_gain for {where}, and terms are {kind}: "
                f"see {own.__name__}"
            )
        raise TypeError(f"{name} is no keyword of small_gain: see {own.__name__}")


def gradnorm(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | None = None,
    *,
    target_norm: ArrayLike = 1.0,
    alpha: ArrayLike = 1.5,
    update_rate: ArrayLike = 0.1,
    floor: ArrayLike = 0.5,
    ceiling: ArrayLike = 2.0,
    objective: str = "adapted",
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""The seeds' baseline: pull the gradient norms of all terms towards a common one.

    $w_k \leftarrow \operatorname{clip}((1 - \eta) w_k + \eta\, w_k\,
    \bar n\, r_k^\alpha / n_k)$, with $n_k = w_k \|\nabla e_k\|$, $\bar n$ = target_norm times their
    mean, and $r_k$ a term's energy relative to the mean of all (Chen et al., *GradNorm*, ICML 2018,
    equation 2, as a multiplicative update).

    Args:
      base_optimizer, terms, objective, max_backtracks: as in `small_gain`.
      target_norm: multiple of the mean norm aimed at.
      alpha: how much terms that lag behind are favoured.
      update_rate: eta in [0, 1].
      floor, ceiling: clamps of every weight.

    Returns:
      An optax transformation with the state of `small_gain`.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> state = gradnorm(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5]))
    >>> state.weights.tolist()
    [1.0]
    """
    _check_floor("floor", floor, "ceiling", ceiling)
    check_fraction("update_rate", update_rate)

    rule = gradnorm_rule(
        target_norm=target_norm, alpha=alpha, update_rate=update_rate, floor=floor, ceiling=ceiling
    )
    settings = Settings(objective=objective, max_backtracks=max_backtracks)
    return reweighted(base_optimizer, terms, rule, settings)


def auto_cap(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | None = None,
    *,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    objective: str = "adapted",
    smoothing: Activity | float | None = 1e-3,
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""The seeds' baseline: one common weight $w = \min(1, T / L)$ for all terms.

    Args:
      base_optimizer, terms, limit, target, objective, smoothing, max_backtracks: as in
        `small_gain`.

    Returns:
      An optax transformation with the state of `small_gain`.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> auto_cap(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5])).count.item()
    0
    """

    settings = Settings(
        limit=limit,
        target=target,
        objective=objective,
        smoothing=smoothing,
        max_backtracks=max_backtracks,
    )
    return reweighted(base_optimizer, terms, cap_rule, settings)


def _check_floor(low_name: str, low: ArrayLike, high_name: str, high: ArrayLike) -> None:
    check_positive(low_name, low)
    check_positive(high_name, high)
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"{low_name} = {low} must not exceed {high_name} = {high}")
