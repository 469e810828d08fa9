"""`small_gain` and the baselines of the validation plan, as optax transformations."""

import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_fraction, check_positive
from smallgain_jax.allocate import POLICIES
from smallgain_jax.curvature import Activity
from smallgain_jax.energy import EnergyGraph
from smallgain_jax.reweight import Limit, Settings, reweighted
from smallgain_jax.reweight import SmallGainInfo as SmallGainInfo
from smallgain_jax.reweight import SmallGainState as SmallGainState
from smallgain_jax.weighting import VALUES, allocation_rule, cap_rule, gradnorm_rule

STATIC = ("every", "scaling_iterations", "max_backtracks", "rounds")
"""Arguments of `small_gain` that shape the program: `static_args` of `inject_hyperparams`."""


def small_gain(
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
    smoothing: Activity | float | None = 1e-3,
    scaling_iterations: int = 0,
    row_gains: bool = True,
    guard: str | None = "measured",
    min_cosine: ArrayLike = 1e-3,
    max_backtracks: int = 20,
    rounds: int = 8,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap a base optimizer so that the terms of its objective share the stability margin.

    At each update, with $R_r(w)$ the row sums of the Hessian's bound and $T = c \times$ limit:

    1. prices: $C_{kr}$ from the terms' Hessian blocks; values $v_k$ from their gradients; scores
       are moving averages of value over cost;
    2. allocation: weights start at $l_k = \max(\mathrm{floor}, (1 - \eta) w_k)$ and are raised
       towards $u_k = \min(\mathrm{ceiling}, (1 + \eta) w_k)$ by score, within the budgets
       $b_r = \rho \max(0, T - R_r(l))$;
    3. row gains: row r of the gradient of $F(x; w)$ is multiplied by $T / R_r(w)$;
    4. the base optimizer answers with u, which the guard scales by
       $\min(1, 2c\langle -g, u\rangle / \sum_r R_r u_r^2)$;
    5. acceptance: Armijo backtracking on the declared objective. For the reference objective also
       an angle test, and the step must reach no higher than the one that w = 1 gives, which is
       taken instead where it wins. A failed step leaves the parameters where they were; weights
       that failed or lost go halfway back to 1.

    In the mode "reference" weights choose directions, never the problem: an accepted step does not
    increase $F(x; 1)$, and since weights return to 1 wherever their direction fails the test,
    limits are stationary points of what the user wrote (Zoutendijk; Nocedal and Wright, theorem
    3.2). In the mode "adapted" they are hyperparameters, and $F(x; w)$ is what decreases.

    Derivatives through an update take the allocated weights as constants.

    Args:
      base_optimizer: any optax optimizer, line searches included.
      terms: the objective as an `EnergyGraph`; None leaves the base optimizer's update as it is.
      limit: curvature limit of the base optimizer, a scalar or a schedule of the step count; None
        measures it (`measured_limit`), and where there is none (Adam, schedules) takes the
        reference bound L itself, so that only shares move.
      target: c in (0, 1), the fraction of the limit to use.
      policy: of `allocate`; "greedy".
      value: "alignment" for <grad F(x; 1), grad e_k>; "grad_norm" for ||grad e_k||^2 (the seeds'
        proxy, which depends on the units of a term); or "peek", the measured decrease, for at most
        5 % of the terms (16 at most) every 10 steps.
      objective: "reference" or "adapted".
      every: allocate at every so many updates, static.
      budget_fraction: rho in [0, 1].
      global_budget: limit on what all terms together may spend, in curvature.
      max_step_change: eta in [0, 1), largest relative change of a weight per allocation.
      floor, ceiling: bounds of every weight.
      ema: weight of the newest score in its average, in (0, 1].
      smoothing: hinge pricing, as in `EnergyGraph.curvature`; None prices hinges as active, under
        which the guard is a guarantee wherever the bound holds along the step.
      scaling_iterations: power iterations that tighten the rows, static.
      row_gains: whether step 3 is taken.
      guard: "measured" takes the curvature along u in place of the sum over rows, which admits
        longer steps (momentum needs them) and leaves the proof to step 5; "majorized" is the
        formula above; None leaves u as it is.
      min_cosine: smallest cosine between a step and the reference descent direction.
      max_backtracks: halvings before a step counts as failed, static.
      rounds: of `allocate`.

    Returns:
      An optax transformation; `update` needs `params`. Its state is a `SmallGainState`. It reads
      the extra argument `bounds` (lower, upper), which `relax` passes, to keep steps feasible.

    Raises:
      ValueError: an unknown name, or a concrete number outside its range.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer = small_gain(optax.sgd(0.1), graph)
    >>> sg.relax(graph, jnp.array([1.0, 0.5]), optimizer, steps=30).x.round(3).tolist()
    [0.0, 0.0]
    """
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
