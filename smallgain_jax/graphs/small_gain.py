r"""`small_gain` on energy graphs: the terms share the stability margin of the base optimizer."""

import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_bounds, check_count, check_fraction
from smallgain_jax.allocation.knapsack import POLICIES
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.proposal import Limit as Limit
from smallgain_jax.graphs.proposal import Settings
from smallgain_jax.graphs.reweighted import SmallGainInfo as SmallGainInfo
from smallgain_jax.graphs.reweighted import SmallGainState as SmallGainState
from smallgain_jax.graphs.reweighted import reweighted
from smallgain_jax.graphs.weights import VALUES, allocation_rule
from smallgain_jax.spectral.rows import Activity

STATIC = ("every", "scaling_iterations", "max_backtracks", "rounds", "terms")
"""Arguments that shape the program: `static_args` of `inject_hyperparams`."""


def graph_small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph,
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
    rounds: int | None = None,
    smoothing: Activity | float | None = 1e-3,
    scaling_iterations: int = 0,
    min_cosine: ArrayLike = 1e-3,
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap a base optimizer so that the terms of an energy graph share the stability margin.

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
       taken instead where it wins. A failed step leaves the parameters where they were.

    In the mode "reference" weights choose directions, never the problem: an accepted step does not
    increase $F(x; 1)$. Weights whose direction strays too far, fails or does not pay shrink towards
    1, or, where 1 itself is over a budget, towards the weights nearest to it on the segment from
    the lower weights: the budgets hold for the weights in force, which `state.weights` are and the
    info reports. The step with w = 1 may always be taken, so limits are stationary points of what
    the user wrote (Zoutendijk; Nocedal and Wright, theorem 3.2). In the mode "adapted" weights are
    hyperparameters, and $F(x; w)$ is what decreases.

    Args:
      base_optimizer: any optax optimizer, line searches included.
      terms: the objective.
      limit: curvature limit of the base optimizer, positive: a scalar, or a schedule of the step
        count; None measures it, and where there is none (Adam, schedules) takes the reference bound
        L itself, so that only shares move.
      target: c in (0, 1), the fraction of the limit to use.
      policy: "greedy" or "fair", of `allocate`.
      value: "alignment" for <grad F(x; 1), grad e_k>; "grad_norm" for ||grad e_k||^2 (the design
        note's proxy, which depends on the units of a term); or "peek", the measured decrease,
        for at most 5 % of the terms (16 at most) every 10 steps.
      objective: "reference" or "adapted".
      every: allocate at every so many updates, static.
      budget_fraction: rho in [0, 1].
      global_budget: limit on what all terms together may spend, in curvature.
      max_step_change: eta in [0, 1], largest relative change of a weight per allocation.
      floor, ceiling: bounds of every weight, positive.
      ema: weight of the newest score in its average, in [0, 1].
      row_gains: whether step 3 is taken.
      guard: "measured" takes the curvature along u in place of the sum over rows, which admits
        longer steps (momentum needs them) and leaves the proof to step 5; "majorized" is the
        formula above; None leaves u as it is.
      rounds: of `allocate`, static; None for its default, with many terms for half its effort.
      smoothing: hinge pricing, as in `EnergyGraph.curvature`; None prices hinges as active, under
        which the guard is a guarantee wherever the bound holds along the step.
      scaling_iterations: power iterations that tighten the rows, static.
      min_cosine: smallest cosine between a step and the reference descent direction.
      max_backtracks: halvings before a step counts as failed, static.

    Returns:
      An optax transformation with a `SmallGainState`; `update` needs `params`. It reads the extra
      arguments `bounds` (lower, upper), to keep steps feasible, and `graph`, one that differs from
      `terms` in numbers alone and takes its place: as data of the program, where `terms` are
      constants of it. `relax` passes both. An update whose gradient, energy or curvature is not
      finite moves nothing but `info.skipped` and `info.accepted`. For derivatives through an update
      the allocated weights are constants.

    Raises:
      ValueError: an unknown name, or a concrete number outside its range.
      TypeError: a factory in place of an optimizer, terms that are no graph.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer = graph_small_gain(optax.sgd(0.1), graph)
    >>> sg.relax(graph, jnp.array([1.0, 0.5]), optimizer, steps=30).x.round(3).tolist()
    [0.0, 0.0]
    """
    _check_names(policy, value)
    check_count("every", every, 1)
    check_count("rounds", rounds, 1)
    check_count("scaling_iterations", scaling_iterations, 0)
    check_count("max_backtracks", max_backtracks, 0)
    check_bounds("floor", floor, "ceiling", ceiling)
    check_fraction("budget_fraction", budget_fraction)
    check_fraction("max_step_change", max_step_change)
    check_fraction("ema", ema)
    check_fraction("min_cosine", min_cosine)
    check_fraction("global_budget", global_budget, high=np.inf)
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


def _check_names(policy: str, value: str) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r} is unknown: choose from {', '.join(POLICIES)}")
    if value not in VALUES:
        raise ValueError(f"value = {value!r} is unknown: choose from {', '.join(VALUES)}")
