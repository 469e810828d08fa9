r"""`small_gain` and the baselines: optax transformations that reweight the terms of an objective.

One skeleton serves all three. A *rule* moves the weights w; the base optimizer is fed the gradient
of $F(x; w)$; what it answers is scaled, tested and accepted on the declared objective.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_fraction, check_positive, float_dtype
from smallgain_jax.acceptance import Box, Trial, armijo, cosine, directional_curvature, guard_scale
from smallgain_jax.allocate import allocate
from smallgain_jax.curvature import Activity, Curvature
from smallgain_jax.energy import EnergyGraph
from smallgain_jax.margin import measured_limit, row_budgets

Limit = float | jax.Array | Callable[[jax.Array], Any] | None


class SmallGainInfo(NamedTuple):
    """What a reader of one update wants to know; `telemetry` turns it into columns.

    K terms, x of shape [n] (or [n, d]); energies in the objective's unit, curvatures in energy per
    squared unit of x.
    """

    energy_reference: jax.Array  # [] F(x; 1) at the parameters before this update
    energy_adapted: jax.Array  # [] F(x; w) there, w after the rule
    lipschitz: jax.Array  # [] max_r R_r(1)
    limit: jax.Array  # [] curvature limit of the base optimizer; inf where there is none
    margin_rows: jax.Array  # [n] T_r - R_r(w), before spending
    margin_global: jax.Array  # [] the smallest of them
    spent_rows: jax.Array  # [n] budget used on each row
    spent_global: jax.Array  # []
    cost: jax.Array  # [K] dearest row of each term at unit weight
    hinge_activity: jax.Array  # [K]
    guard: jax.Array  # [] factor on the base optimizer's update
    cosine: jax.Array  # [] between the step and the reference descent direction
    accepted: jax.Array  # [] bool
    last_step_backtracks: jax.Array  # [] int32
    total_backtracks: jax.Array  # [] int32


class SmallGainState(NamedTuple):
    """State of `small_gain`, `gradnorm` and `auto_cap`. K terms."""

    count: jax.Array  # [] int32
    weights: jax.Array  # [K] current weights; 1 is the reference objective
    previous_weights: jax.Array  # [K] those before the last accepted step
    scores: jax.Array  # [K] moving averages of value over cost
    last_value: jax.Array  # [] declared objective after the last accepted step; inf at first
    base_state: Any
    info: SmallGainInfo


class Snapshot(NamedTuple):
    """What a rule may look at: the terms at the parameters, to first and second order."""

    x: jax.Array
    gradient: jax.Array  # of the reference objective, shaped like x
    term_gradients: jax.Array  # [K, 2] or [K, 2, d]
    term_energies: jax.Array  # [K]
    curvature: Curvature
    target: jax.Array  # [] T
    count: jax.Array  # [] int32


class Move(NamedTuple):
    """What a rule decided."""

    weights: jax.Array  # [K]
    scores: jax.Array  # [K]
    spent_rows: jax.Array  # [n]
    spent_global: jax.Array  # []


class Rule(Protocol):
    """How weights move: pure, from a snapshot and the present weights and scores."""

    def __call__(
        self, graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move: ...


def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | None = None,
    *,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    policy: str = "greedy",
    value: str = "grad_norm",
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
    5. acceptance: Armijo backtracking on the declared objective, and for the reference objective
       an angle test. When a step fails, the parameters stay, and weights shrink towards 1.

    In the mode "reference" weights choose directions, never the problem: an accepted step does not
    increase $F(x; 1)$, and since weights return to 1 wherever their direction fails the test,
    limits are stationary points of what the user wrote (Zoutendijk; Nocedal and Wright, theorem
    3.2). In the mode "adapted" they are hyperparameters, and $F(x; w)$ is what decreases.

    Args:
      base_optimizer: any optax optimizer, line searches included.
      terms: the objective as an `EnergyGraph`; None leaves the base optimizer's update as it is.
      limit: curvature limit of the base optimizer, a scalar or a schedule of the step count; None
        measures it (`measured_limit`), and where there is none (Adam, schedules) takes the
        reference bound itself, so that only shares move.
      target: c in (0, 1), the fraction of the limit to use.
      policy: of `allocate`; "greedy".
      value: "grad_norm" for ||grad e_k||^2, "alignment" for <grad F(x; 1), grad e_k>, or "peek",
        which measures the decrease for at most 5 % of the terms (16 at most) every 10 steps.
      objective: "reference" or "adapted".
      every: allocate at every so many updates, static.
      budget_fraction: rho in [0, 1].
      global_budget: limit on what all terms together may spend, in curvature.
      max_step_change: eta in [0, 1), largest relative change of a weight per allocation.
      floor, ceiling: bounds of every weight.
      ema: weight of the newest score in its average, in (0, 1].
      smoothing: hinge pricing, as in `EnergyGraph.curvature`; None prices hinges as active, under
        which the guard is a guarantee wherever the bound holds along the step.
      scaling_iterations: power iterations that tighten the rows.
      row_gains, guard: switches for steps 3 and 4.
      min_cosine: smallest cosine between a step and the reference descent direction.
      max_backtracks: halvings before a step counts as failed.
      rounds: of `allocate`.

    Returns:
      An optax transformation; `update` needs `params`. Its state is a `SmallGainState`. It reads
      the extra argument `bounds` (lower, upper), which `relax` passes, to keep steps feasible.

    Raises:
      ValueError: an unknown name, or a concrete number outside its range.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer = small_gain(optax.sgd(0.1), graph)
    >>> sg.relax(graph, jnp.array([1.0, 0.5]), optimizer, steps=30).x.round(3).tolist()
    [0.0, 0.0]
    """
    if value not in VALUES:
        raise ValueError(f"value = {value!r} is unknown: choose from {', '.join(VALUES)}")
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    _check_floor("floor", floor, "ceiling", ceiling)
    check_fraction("budget_fraction", budget_fraction)
    check_fraction("max_step_change", max_step_change)
    check_fraction("ema", ema)

    def rule(
        graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move:
        def move() -> Move:
            rows, cost = _rows_and_cost(graph, snapshot)
            price = jnp.sum(cost, axis=1)
            # linear terms cost nothing; a floor keeps their scores finite
            price = jnp.maximum(price, 1e-6 * jnp.max(price, initial=0.0))
            price = jnp.where(price > 0, price, 1)
            measured, known = VALUES[value](graph, snapshot, weights)
            fresh = jnp.where(snapshot.count == 0, 1, ema)
            score = jnp.where(known, fresh * measured / price + (1 - fresh) * scores, scores)
            lower = jnp.maximum(floor, (1 - max_step_change) * weights)
            upper = jnp.maximum(jnp.minimum(ceiling, (1 + max_step_change) * weights), lower)
            local = snapshot.curvature.local_rows.reshape(-1)
            base = local + jnp.zeros_like(local).at[rows].add(lower[:, None] * cost)
            budgets = row_budgets(snapshot.target, base, budget_fraction)
            spend = allocate(
                score * price,
                cost,
                rows,
                lower,
                upper,
                budgets,
                global_budget,
                policy=policy,
                rounds=rounds,
            )
            spent = spend.spent_rows.reshape(snapshot.x.shape)
            return Move(spend.weights, score, spent, spend.spent_global)

        if every == 1:
            return move()
        idle = Move(
            weights, scores, jnp.zeros_like(snapshot.x), jnp.zeros((), snapshot.x.dtype)
        )
        return jax.lax.cond(snapshot.count % every == 0, move, lambda: idle)

    return _reweighted(
        base_optimizer,
        terms,
        rule,
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
    \bar n\, r_k^\alpha / n_k)$, with $n_k = w_k \|\nabla e_k\|$, $\bar n$ = target_norm times their mean,
    and $r_k$ a term's energy relative to the mean of all (Chen et al., *GradNorm*, ICML 2018,
    equation 2, as a multiplicative update).

    Args:
      base_optimizer, terms, objective, max_backtracks: as in `small_gain`.
      target_norm: multiple of the mean norm aimed at.
      alpha: how much terms that lag behind are favoured.
      update_rate: eta in [0, 1].
      floor, ceiling: clamps of every weight.

    Returns:
      An optax transformation with the state of `small_gain`.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> state = gradnorm(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5]))
    >>> state.weights.tolist()
    [1.0]
    """
    _check_floor("floor", floor, "ceiling", ceiling)
    check_fraction("update_rate", update_rate)

    def rule(
        graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move:
        norms = weights * jnp.sqrt(_squared_norms(snapshot.term_gradients))
        size = jnp.abs(snapshot.term_energies)
        rate = size / jnp.maximum(jnp.mean(size), jnp.finfo(size.dtype).tiny)
        aim = target_norm * jnp.mean(norms) * rate**alpha
        ratio = jnp.where(norms > 0, aim / jnp.where(norms > 0, norms, 1), 1)
        moved = jnp.clip(weights * (1 + update_rate * (ratio - 1)), floor, ceiling)
        zero = jnp.zeros_like(snapshot.x)
        return Move(moved, ratio, zero, jnp.zeros((), zero.dtype))

    return _reweighted(
        base_optimizer, terms, rule, objective=objective, max_backtracks=max_backtracks
    )


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
      base_optimizer, terms, limit, target, objective, smoothing, max_backtracks: as in `small_gain`.

    Returns:
      An optax transformation with the state of `small_gain`.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> auto_cap(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5])).count.item()
    0
    """

    def rule(
        graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array, scores: jax.Array
    ) -> Move:
        lipschitz = snapshot.curvature.lipschitz
        scale = jnp.minimum(1, snapshot.target / jnp.where(lipschitz > 0, lipschitz, 1))
        zero = jnp.zeros_like(snapshot.x)
        return Move(jnp.full_like(weights, scale), scores, zero, jnp.zeros((), zero.dtype))

    return _reweighted(
        base_optimizer,
        terms,
        rule,
        limit=limit,
        target=target,
        objective=objective,
        smoothing=smoothing,
        max_backtracks=max_backtracks,
    )


def _check_floor(low_name: str, low: ArrayLike, high_name: str, high: ArrayLike) -> None:
    check_positive(low_name, low)
    check_positive(high_name, high)
    if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
        raise ValueError(f"{low_name} = {low} must not exceed {high_name} = {high}")


def _squared_norms(term_gradients: jax.Array) -> jax.Array:
    return jnp.sum(term_gradients**2, axis=tuple(range(1, term_gradients.ndim)))


def _rows_and_cost(graph: EnergyGraph, snapshot: Snapshot) -> tuple[jax.Array, jax.Array]:
    """Rows [K, m] that each term touches among the raveled coordinates, and its cost there."""
    width = int(np.prod(snapshot.x.shape[1:], dtype=int))
    ends = jnp.stack([graph.i, graph.j], axis=1)
    rows = (ends[:, :, None] * width + jnp.arange(width)[None, None, :]).reshape(-1, 2 * width)
    return rows, snapshot.curvature.edge_cost.reshape(-1, 2 * width)


# Values: (graph, snapshot, weights) -> (value [K], whether it is known now [K])


def _grad_norm_value(
    graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    value = _squared_norms(snapshot.term_gradients)
    return value, jnp.ones(value.shape, bool)


def _alignment_value(
    graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    ends = jnp.stack([snapshot.gradient[graph.i], snapshot.gradient[graph.j]], axis=1)
    value = jnp.sum(ends * snapshot.term_gradients, axis=tuple(range(1, ends.ndim)))
    return value, jnp.ones(value.shape, bool)


PEEK_EVERY = 10
PEEK_SHARE = 0.05
PEEK_MOST = 16


def _peek_value(
    graph: EnergyGraph, snapshot: Snapshot, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Measured decrease of F(x - g(w)/L; 1) per unit of weight and of step, for a few terms."""
    num_terms = weights.shape[0]
    if num_terms == 0:
        return weights, jnp.ones(0, bool)
    few = min(max(1, int(PEEK_SHARE * num_terms)), PEEK_MOST)
    lipschitz = snapshot.curvature.lipschitz
    step = 1 / jnp.where(lipschitz > 0, lipschitz, 1)
    nudge = jnp.asarray(jnp.finfo(weights.dtype).eps ** (1 / 3), weights.dtype)
    mixed = graph.scatter(_per_term(weights - 1, snapshot.term_gradients) * snapshot.term_gradients)
    at = snapshot.x - step * (snapshot.gradient + mixed)
    turn = snapshot.count // PEEK_EVERY
    chosen = (turn * few + jnp.arange(few)) % num_terms

    def measure(k: jax.Array) -> jax.Array:
        moved = step * nudge * snapshot.term_gradients[k]
        up = at.at[graph.i[k]].add(-moved[0]).at[graph.j[k]].add(-moved[1])
        down = at.at[graph.i[k]].add(moved[0]).at[graph.j[k]].add(moved[1])
        return (graph.energy(down) - graph.energy(up)) / (2 * nudge * step)

    first_order, _ = _alignment_value(graph, snapshot, weights)
    start = snapshot.count == 0
    peeking = snapshot.count % PEEK_EVERY == 0

    def look() -> jax.Array:
        return first_order.at[chosen].set(jax.lax.map(measure, chosen))

    value = jax.lax.cond(peeking, look, lambda: first_order)
    seen = jnp.zeros(num_terms, bool).at[chosen].set(True)
    return value, start | (peeking & seen)


VALUES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "grad_norm": _grad_norm_value,
    "alignment": _alignment_value,
    "peek": _peek_value,
}
"""What a unit of a term's weight is worth, by name."""


def _per_term(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


OBJECTIVES = ("reference", "adapted")
GUARDS = ("measured", "majorized", None)


def _reweighted(
    base_optimizer: optax.GradientTransformation,
    graph: EnergyGraph | None,
    rule: Rule,
    *,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    objective: str,
    smoothing: Activity | float | None = 1e-3,
    scaling_iterations: int = 0,
    row_gains: bool = False,
    guard: str | None = None,
    min_cosine: ArrayLike = 1e-3,
    max_backtracks: int,
) -> optax.GradientTransformationExtraArgs:
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective = {objective!r} is unknown: choose from {', '.join(OBJECTIVES)}"
        )
    check_fraction("target", target)
    base = optax.with_extra_args_support(base_optimizer)
    if graph is None:
        return base
    reference = objective == "reference"
    if guard not in GUARDS:
        raise ValueError(f"guard = {guard!r} is unknown: choose from measured, majorized, None")
    if limit is None:
        limit = measured_limit(base_optimizer)

    def init(params: jax.Array) -> SmallGainState:
        dtype = float_dtype(params)
        ones = jnp.ones(graph.num_edges, dtype)
        zero, rows = jnp.zeros((), dtype), jnp.zeros(params.shape, dtype)
        count = jnp.zeros((), jnp.int32)
        info = SmallGainInfo(
            energy_reference=zero,
            energy_adapted=zero,
            lipschitz=zero,
            limit=zero,
            margin_rows=rows,
            margin_global=zero,
            spent_rows=rows,
            spent_global=zero,
            cost=jnp.zeros_like(ones),
            hinge_activity=jnp.zeros_like(ones),
            guard=zero,
            cosine=zero,
            accepted=jnp.ones((), bool),
            last_step_backtracks=count,
            total_backtracks=count,
        )
        # one buffer each: a donated state may not alias itself
        return SmallGainState(
            count,
            ones,
            jnp.ones_like(ones),
            jnp.zeros_like(ones),
            jnp.full((), jnp.inf, dtype),
            base.init(params),
            info,
        )

    def update(
        updates: jax.Array,
        state: SmallGainState,
        params: jax.Array | None = None,
        *,
        bounds: tuple[Any, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, SmallGainState]:
        if params is None:
            raise ValueError(optax.base.NO_PARAMS_MSG)
        box = Box(-jnp.inf, jnp.inf) if bounds is None else Box(*bounds)
        dtype = state.weights.dtype
        x, gradient = params.astype(dtype), updates.astype(dtype)

        energies, term_gradients = graph.term_energies(x), graph.term_gradients(x)
        local_energy = graph.local_energy(x)
        curvature = graph.curvature(
            x, None, smoothing=smoothing, scaling_iterations=scaling_iterations
        )
        ceiling = _limit_now(limit, state.count, curvature.lipschitz)
        snapshot = Snapshot(
            x, gradient, term_gradients, energies, curvature, target * ceiling, state.count
        )
        value = local_energy + jnp.sum(energies)

        # a step that was accepted and yet raised the objective: take its weights back
        declared = value if reference else local_energy + jnp.vdot(state.weights, energies)
        resolution = 4 * jnp.finfo(dtype).eps * jnp.abs(declared)
        rose = declared > state.last_value + resolution
        weights = jnp.where(rose, state.previous_weights, state.weights)
        moved = state.weights != state.previous_weights
        scores = jnp.where(rose & moved, state.scores / 2, state.scores)

        finite = (
            jnp.isfinite(value)
            & jnp.all(jnp.isfinite(gradient))
            & jnp.all(jnp.isfinite(term_gradients))
            & jnp.isfinite(curvature.lipschitz)
        )
        held = Move(weights, scores, jnp.zeros_like(x), jnp.zeros((), dtype))
        decided = rule(graph, snapshot, weights, scores)
        decided = jax.tree.map(lambda new, old: jnp.where(finite, new, old), decided, held)

        def mixed(w: jax.Array) -> jax.Array:
            extra = graph.scatter(_per_term(w - 1, term_gradients) * term_gradients)
            return jnp.where(box.blocks(x, -(gradient + extra)), 0, gradient + extra)

        def rows_of(w: jax.Array) -> jax.Array:
            costs = _per_term(w, curvature.edge_cost) * curvature.edge_cost
            return curvature.local_rows + graph.scatter(costs)

        new_weights = decided.weights
        if reference:
            new_weights = _shrink_to_angle(
                new_weights, gradient, mixed, curvature.row_sums, min_cosine
            )
        adapted_gradient, adapted_rows = mixed(new_weights), rows_of(new_weights)
        declared_gradient = gradient if reference else adapted_gradient
        declared_rows = curvature.row_sums if reference else adapted_rows
        gained = adapted_gradient
        if row_gains:
            tiny = 1e-6 * jnp.max(adapted_rows, initial=0.0)
            safe = jnp.maximum(adapted_rows, tiny)
            gained = adapted_gradient * snapshot.target / jnp.where(safe > 0, safe, 1)
            gained = jnp.where(jnp.isfinite(gained), gained, adapted_gradient)

        proposed, base_state = base.update(
            gained.astype(updates.dtype), state.base_state, params, **extra_args
        )
        proposed = box.project(x + proposed.astype(dtype)) - x

        def energy(at: jax.Array) -> jax.Array:
            return graph.energy(at, None if reference else new_weights)

        factor = jnp.ones((), dtype)
        if guard is not None:
            majorized = jnp.vdot(declared_rows * proposed, proposed)
            bend = majorized
            if guard == "measured":
                measured = directional_curvature(energy, x, proposed)
                # negative or vanishing curvature promises nothing: fall back on the bound
                bend = jnp.where(measured > 1e-3 * majorized, measured, majorized)
            factor = guard_scale(declared_gradient, proposed, bend, target)
        proposed = jnp.where(factor > 0, factor * proposed, 0)

        def trial(step: jax.Array) -> Trial:
            slope = step * jnp.vdot(declared_gradient, proposed)
            return Trial(energy(x + step * proposed), slope, None)

        now = value if reference else local_energy + jnp.vdot(new_weights, energies)
        search = armijo(trial, now, max_backtracks=max_backtracks)
        angle = cosine(proposed, -declared_gradient)
        accepted = search.accepted & (angle >= min_cosine) & finite
        step = jnp.where(accepted, search.step * proposed, 0)

        total = state.info.total_backtracks + search.backtracks
        info = SmallGainInfo(
            energy_reference=value,
            energy_adapted=local_energy + jnp.vdot(new_weights, energies),
            lipschitz=curvature.lipschitz,
            limit=ceiling,
            margin_rows=snapshot.target - rows_of(weights),
            margin_global=snapshot.target - jnp.max(rows_of(weights), initial=0.0),
            spent_rows=decided.spent_rows,
            spent_global=decided.spent_global,
            cost=jnp.max(curvature.edge_cost, axis=tuple(range(1, x.ndim + 1)), initial=0.0),
            hinge_activity=graph.hinge_activity(x, smoothing),
            guard=factor,
            cosine=angle,
            accepted=accepted,
            last_step_backtracks=search.backtracks,
            total_backtracks=total,
        )
        # a step that failed leaves the state where it was, and half the reweighting with it
        kept = new_weights if not reference else jnp.where(accepted, new_weights, 1 + (new_weights - 1) / 2)
        kept = jnp.where(finite, kept, weights)
        new_state = SmallGainState(
            optax.safe_increment(state.count),
            kept,
            weights,
            decided.scores,
            jnp.where(accepted, search.trial.value, jnp.where(finite, now, state.last_value)),
            base_state,
            info,
        )
        return step.astype(updates.dtype), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _limit_now(limit: Limit, count: jax.Array, lipschitz: jax.Array) -> jax.Array:
    if limit is None:
        return lipschitz
    return jnp.asarray(limit(count) if callable(limit) else limit, lipschitz.dtype)


def _shrink_to_angle(
    weights: jax.Array,
    gradient: jax.Array,
    mixed: Callable[[jax.Array], jax.Array],
    rows: jax.Array,
    min_cosine: ArrayLike,
) -> jax.Array:
    """Largest of w, 1 + (w - 1)/2, ..., 1 whose gradient still agrees with the reference one.

    The angle is taken in D's metric, in which the row gains will step.
    """
    scale = jnp.where(rows > 0, rows, 1)
    fractions = jnp.append(0.5 ** jnp.arange(8, dtype=weights.dtype), 0)

    def agreement(fraction: jax.Array) -> jax.Array:
        candidate = mixed(1 + fraction * (weights - 1))
        root = jnp.sqrt(scale)
        return cosine(candidate / root, gradient / root)

    agrees = jax.lax.map(agreement, fractions) >= AGREEMENT
    fraction = fractions[jnp.argmax(agrees.at[-1].set(True))]
    return 1 + fraction * (weights - 1)


AGREEMENT = 0.5
"""Smallest cosine, in D's metric, between the reweighted gradient and the reference one."""
