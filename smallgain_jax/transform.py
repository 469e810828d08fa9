"""`small_gain` and the baselines of the validation plan, as optax transformations."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_bounds, check_fraction
from smallgain_jax.allocation.knapsack import POLICIES
from smallgain_jax.graphs.baselines import auto_cap as auto_cap
from smallgain_jax.graphs.baselines import gradnorm as gradnorm
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.small_gain import Limit, graph_small_gain
from smallgain_jax.graphs.small_gain import SmallGainInfo as SmallGainInfo
from smallgain_jax.graphs.small_gain import SmallGainState as SmallGainState
from smallgain_jax.graphs.weights import VALUES
from smallgain_jax.losses.losses import Losses
from smallgain_jax.losses.losses import terms as make_terms
from smallgain_jax.losses.small_gain import TrainingInfo as TrainingInfo
from smallgain_jax.losses.small_gain import TrainingSettings, trained
from smallgain_jax.losses.small_gain import TrainingState as TrainingState
from smallgain_jax.spectral.power import Blocks
from smallgain_jax.spectral.rows import Activity

STATIC = (
    "every",
    "scaling_iterations",
    "max_backtracks",
    "rounds",
    "iterations",
    "warmup",
    "terms",
    "blocks",
    "metric",
    "anneal",
)
"""Arguments of `small_gain` that shape the program: `static_args` of `inject_hyperparams`."""

_GRAPH: dict[str, Any] = dict(
    policy="greedy",
    objective="reference",
    every=1,
    floor=0.1,
    ceiling=3.0,
    ema=0.3,
    row_gains=True,
    guard="measured",
)
_LOSSES: dict[str, Any] = dict(
    policy="fair",
    objective="adapted",
    every=10,
    floor=1e-4,
    ceiling=1e4,
    ema=0.1,
    row_gains=False,
    guard="sharpness",
)
"""What None stands for, by the kind of terms."""


def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | Losses | Callable[..., Any] | None = None,
    *,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    policy: str | None = None,
    value: str = "alignment",
    objective: str | None = None,
    every: int | None = None,
    budget_fraction: ArrayLike = 0.7,
    global_budget: ArrayLike = np.inf,
    max_step_change: ArrayLike = 0.1,
    floor: ArrayLike | None = None,
    ceiling: ArrayLike | None = None,
    ema: ArrayLike | None = None,
    row_gains: bool | None = None,
    guard: str | float | None = "default",
    rounds: int | None = None,
    smoothing: Activity | float | None = 1e-3,
    scaling_iterations: int = 0,
    min_cosine: ArrayLike = 1e-3,
    max_backtracks: int = 20,
    metric: Callable[[Any, Any], Any] | None = None,
    priorities: Sequence[float] | None = None,
    curvature: str = "hessian",
    iterations: int = 1,
    blocks: Blocks = None,
    max_gain: ArrayLike = 3.0,
    warmup: int | None = None,
    anneal: Callable[[jax.Array], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap a base optimizer so that the terms of its objective share the stability margin.

    **Terms of an energy graph.** At each update, with $R_r(w)$ the row sums of the Hessian's bound
    and $T = c \times$ limit:

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

    **Losses of a model** (`sg.terms(fn)`, or the function itself). Weights are hyperparameters
    there. The updates handed in are the gradient of the plain sum, or, told by `weighted=True`, of
    the sum by `state.weights`, which saves a backward pass. Every so many updates:

    1. prices: the curvature $\lambda_k$ of each loss, and of the weighted sum, by power iteration
       on $P^{-1/2} H_k P^{-1/2}$ in the metric P of the base optimizer, from where it stopped last;
    2. limit: what the base optimizer is stable up to in that metric, at its present rate:
       $2/\alpha$ for gradient descent, $38/\alpha$ for Adam (`limits`);
    3. shares: policy "fair" moves $\log w_k$ towards that of
       $p_k \sum_j \lambda_j / (\lambda_k \sum_j p_j)$, proportional fairness (Kelly, Maulloo and
       Tan 1998) at the total cost of the reference, so that only ratios move; "greedy" raises and
       sheds by score, as above;
    4. guard: while the sharpness of the weighted sum is too far above the limit, or the loss is on
       its way out, steps are scaled down.

    Power iteration estimates **from below**: these are measurements, no guarantees. An update with
    a loss or gradient that is not finite is skipped, and nothing moves.

    Which policy: "fair" where losses differ by orders of magnitude in scale or stiffness
    (physics-informed networks, terms in different units); `priorities` if one should get more than
    its share. "greedy" where the losses agree on what matters and the margin has slack. Neither
    where the weights are part of the problem, or one loss is all there is: then `anneal`, or
    `sg.throttle`.

    Derivatives through an update take the allocated weights as constants.

    Args:
      base_optimizer: any optax optimizer, line searches included; with losses also an
        `optax.experimental.aggregating.Aggregator`, which then sees the reweighted gradient of
        each loss.
      terms: the objective as an `EnergyGraph`, or the losses of a model; None leaves the base
        optimizer's update as it is.
      limit: curvature limit of the base optimizer, a scalar or a schedule of the step count; None
        measures it. Graphs: where there is none (Adam, schedules) the reference bound L itself is
        taken, so that only shares move. Losses: where there is none, no guard.
      target: c in (0, 1), the fraction of the limit to use.
      policy: "greedy" or "fair"; None for greedy on graphs, fair on losses.
      value: "alignment" for <grad F(x; 1), grad e_k>; "grad_norm" for ||grad e_k||^2 (the seeds'
        proxy, which depends on the units of a term); or "peek" (graphs), the measured decrease, for
        at most 5 % of the terms (16 at most) every 10 steps. For policy "greedy".
      objective: "reference" (graphs only) or "adapted"; None for reference on graphs.
      every: allocate at every so many updates, static; None for 1 on graphs, 10 on losses.
      budget_fraction: rho in [0, 1].
      global_budget: limit on what all terms together may spend, in curvature (graphs).
      max_step_change: eta in [0, 1), largest relative change of a weight per allocation ("greedy").
      floor, ceiling: bounds of every weight; None for 0.1 and 3 on graphs, 1e-4 and 1e4 on losses.
      ema: weight of the newest score (of the newest share, in log space) in its average, in (0, 1];
        None for 0.3 on graphs, 0.1 on losses.
      row_gains: graphs: whether step 3 is taken, which is the default. Losses: whether the step of
        each block is multiplied by $T / \lambda_r(w)$, within `max_gain`; not by default.
      guard: graphs: "measured" takes the curvature along u in place of the sum over rows, which
        admits longer steps (momentum needs them) and leaves the proof to step 5; "majorized" is the
        formula above. Losses: "sharpness" scales steps down where the sharpness is above twice
        the limit (at the edge of stability networks mostly flatten by themselves), and above c
        times the limit as soon as the total loss has doubled over its average, until it is back; a
        number in place of "sharpness" is that multiple. None leaves u as it is.
      rounds: of `allocate`.
      smoothing: hinge pricing, as in `EnergyGraph.curvature` (graphs); None prices hinges as
        active, under which the guard is a guarantee wherever the bound holds along the step.
      scaling_iterations: power iterations that tighten the rows, static (graphs).
      min_cosine: smallest cosine between a step and the reference descent direction (graphs).
      max_backtracks: halvings before a step counts as failed, static (graphs).
      metric: P for optimizers that `probe` cannot read: `metric(base_state, params)` gives a
        pytree like `params`, positive (losses).
      priorities: p_k, float [K], positive; None for ones (losses, "fair").
      curvature: "hessian"; "gauss_newton" for terms made with `outputs`; or "difference" of two
        gradients, which takes a third of the time and no memory of its own, where parameters and
        products of matrices are float32 or wider. With `term_grads` it starts from those, which
        then must be of these very losses on `term_args`: no averages over devices (losses).
      iterations: of power iteration at each turn, static (losses).
      blocks: rows of the parameters: None for one, "leaves", or a function of a leaf's key path
        that names its block; each costs K + 1 Hessian-vector products more (losses).
      max_gain: bound on row gains and on their inverse (losses).
      warmup: updates during which weights are held; None for 100 with the Adam family, whose second
        moments mean nothing before, else 0 (losses).
      anneal: schedule a(count) in [0, 1]; $w_k^{a}$ is in force, so that 0 is the reference
        objective: for weights that belong to the problem (losses).

    Returns:
      An optax transformation; `update` needs `params`. On graphs its state is a `SmallGainState`,
      and it reads the extra arguments `bounds` (lower, upper), to keep steps feasible, and `graph`,
      one that differs from `terms` in numbers alone and takes its place: as data of the program,
      where `terms` are constants of it. `relax` passes both. On losses it is a `TrainingState`, and
      it reads `term_args` (what the losses take besides the parameters), `term_grads` (their
      gradients, if the caller has them: a leading axis K on each leaf, with `term_values` [K], or
      the plain sum as `value`: without either the guard cannot watch the loss, and stays at c times
      the limit), `weighted` (whether the updates are the gradient of the sum by `state.weights`, as
      `Losses.value_and_weighted_grad` gives it with the `term_values`; else the losses are
      evaluated and differentiated here once more), and `curvature_args` (another batch to measure
      curvature on).

    Raises:
      ValueError: an unknown name, or a concrete number outside its range.
      TypeError: `terms` that are neither; losses whose names must be given and are not.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer = small_gain(optax.sgd(0.1), graph)
    >>> sg.relax(graph, jnp.array([1.0, 0.5]), optimizer, steps=30).x.round(3).tolist()
    [0.0, 0.0]
    >>> def losses(x):
    ...     return {"soft": jnp.sum((x - 1) ** 2), "stiff": 50 * jnp.sum(x**2)}
    >>> optimizer = small_gain(optax.sgd(0.01), losses, every=1)
    >>> x = jnp.ones(2)
    >>> state = optimizer.init(x)
    >>> @jax.jit
    ... def step(x, state):
    ...     gradient = jax.grad(lambda x: sum(losses(x).values()))(x)
    ...     updates, state = optimizer.update(gradient, state, x)
    ...     return optax.apply_updates(x, updates), state
    >>> for _ in range(100):
    ...     x, state = step(x, state)
    >>> state.info.share.round(2).tolist(), state.weights.round(1).tolist()
    ([0.5, 0.5], [25.5, 0.5])
    """
    if terms is not None and not isinstance(terms, EnergyGraph | Losses):
        if not callable(terms):
            raise TypeError(
                "terms must be an EnergyGraph, losses made by sg.terms(fn), or fn itself, "
                f"got {type(terms).__name__}"
            )
        terms = make_terms(terms)
    kind = _LOSSES if isinstance(terms, Losses) else _GRAPH
    policy = kind["policy"] if policy is None else policy
    objective = kind["objective"] if objective is None else objective
    every = int(kind["every"]) if every is None else every
    floor = kind["floor"] if floor is None else floor
    ceiling = kind["ceiling"] if ceiling is None else ceiling
    ema = kind["ema"] if ema is None else ema
    row_gains = bool(kind["row_gains"]) if row_gains is None else row_gains
    guard = kind["guard"] if guard == "default" else guard
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r} is unknown: choose from {', '.join(POLICIES)}")
    if value not in VALUES:
        raise ValueError(f"value = {value!r} is unknown: choose from {', '.join(VALUES)}")
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    check_bounds("floor", floor, "ceiling", ceiling)
    check_fraction("budget_fraction", budget_fraction)
    check_fraction("max_step_change", max_step_change)
    check_fraction("ema", ema)
    check_fraction("target", target)
    if isinstance(terms, Losses):
        return trained(
            base_optimizer,
            terms,
            TrainingSettings(
                limit=limit,
                metric=metric,
                target=target,
                policy=policy,
                value=value,
                objective=objective,
                every=every,
                priorities=priorities,
                budget_fraction=budget_fraction,
                max_step_change=max_step_change,
                floor=floor,
                ceiling=ceiling,
                ema=ema,
                curvature=curvature,
                iterations=iterations,
                blocks=blocks,
                row_gains=row_gains,
                max_gain=max_gain,
                guard=guard,
                warmup=warmup,
                anneal=anneal,
                rounds=8 if rounds is None else rounds,
            ),
        )
    if terms is None:
        return optax.with_extra_args_support(base_optimizer)
    return graph_small_gain(
        base_optimizer,
        terms,
        limit=limit,
        target=target,
        policy=policy,
        value=value,
        objective=objective,
        every=every,
        budget_fraction=budget_fraction,
        global_budget=global_budget,
        max_step_change=max_step_change,
        floor=floor,
        ceiling=ceiling,
        ema=ema,
        row_gains=row_gains,
        guard=guard,  # type: ignore[arg-type]
        rounds=rounds,
        smoothing=smoothing,
        scaling_iterations=scaling_iterations,
        min_cosine=min_cosine,
        max_backtracks=max_backtracks,
    )
