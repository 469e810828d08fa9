r"""The skeleton of every reweighting optimizer: gradient of F(x; w), base update, acceptance.

A rule moves the weights; the base optimizer is fed the gradient of $F(x; w)$, its rows multiplied
by their gains; what it answers is guarded, tested and accepted on the declared objective.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, check_fraction, float_dtype
from smallgain_jax._tree import select
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.weights import Rule, Snapshot, scaled, unspent
from smallgain_jax.limits.probe import measured_limit
from smallgain_jax.search.armijo import Trial, armijo
from smallgain_jax.search.box import Box
from smallgain_jax.search.guard import cosine, directional_curvature, guard_scale
from smallgain_jax.spectral.rows import Activity

Limit = float | jax.Array | Callable[[jax.Array], Any] | None

OBJECTIVES = ("reference", "adapted")
GUARDS = ("measured", "majorized", None)
AGREEMENT = 0.99
"""Smallest cosine, in D's metric, between the reweighted gradient and the reference one."""


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

    count: jax.Array  # type: ignore[assignment]  # [] int32
    weights: jax.Array  # [K] current weights; 1 is the reference objective
    previous_weights: jax.Array  # [K] those before the last accepted step
    scores: jax.Array  # [K] moving averages of value over cost
    last_value: jax.Array  # [] declared objective after the last accepted step; inf at first
    base_state: Any
    info: SmallGainInfo


class Settings(NamedTuple):
    """Static and numeric settings of the skeleton; `small_gain` documents each."""

    limit: Limit = None
    target: ArrayLike = 0.9
    objective: str = "reference"
    smoothing: Activity | float | None = 1e-3
    scaling_iterations: int = 0
    row_gains: bool = False
    guard: str | None = None
    min_cosine: ArrayLike = 1e-3
    max_backtracks: int = 20


class _Setting(eqx.Module):
    """The objective around the parameters: everything a step under some weights needs."""

    graph: EnergyGraph
    snapshot: Snapshot
    value: jax.Array  # [] F(x; 1)
    local_energy: jax.Array  # []
    box: Box
    reference: bool = eqx.field(static=True)

    def energy(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        """The declared objective."""
        return self.graph.energy(x, None if self.reference else weights)

    def adapted_energy(self, weights: jax.Array) -> jax.Array:
        """F(x; w) at the parameters."""
        return self.local_energy + jnp.vdot(weights, self.snapshot.term_energies)

    def declared_energy(self, weights: jax.Array) -> jax.Array:
        """The declared objective at the parameters."""
        return self.value if self.reference else self.adapted_energy(weights)

    def gradient(self, weights: jax.Array) -> jax.Array:
        """Of F(x; w), on the nodes that the box lets move."""
        extra = self.graph.scatter(scaled(weights - 1, self.snapshot.term_gradients))
        gradient = self.snapshot.gradient + extra
        return jnp.where(self.box.blocks(self.snapshot.x, -gradient), 0, gradient)

    def rows(self, weights: jax.Array) -> jax.Array:
        """R(w)."""
        curvature = self.snapshot.curvature
        return curvature.local_rows + self.graph.scatter(scaled(weights, curvature.edge_cost))

    def declared(self, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradient and rows of the declared objective."""
        if self.reference:
            return self.snapshot.gradient, self.snapshot.curvature.row_sums
        return self.gradient(weights), self.rows(weights)

    @property
    def finite(self) -> jax.Array:
        snapshot = self.snapshot
        return (
            jnp.isfinite(self.value)
            & jnp.all(jnp.isfinite(snapshot.gradient))
            & jnp.all(jnp.isfinite(snapshot.term_gradients))
            & jnp.isfinite(snapshot.curvature.lipschitz)
        )


class _Proposal(NamedTuple):
    """A step under given weights, before its length is settled."""

    move: jax.Array  # [n] feasible and guarded
    base_state: Any
    reached: jax.Array  # [] declared objective after it
    slope: jax.Array  # [] <declared gradient, move>
    cosine: jax.Array  # [] with the declared descent direction
    guard: jax.Array  # []


def reweighted(
    base_optimizer: optax.GradientTransformation,
    graph: EnergyGraph | None,
    rule: Rule,
    settings: Settings,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base optimizer by a rule for the weights of `graph`'s terms; see `small_gain`."""
    if settings.objective not in OBJECTIVES:
        raise ValueError(
            f"objective = {settings.objective!r} is unknown: choose from {', '.join(OBJECTIVES)}"
        )
    if settings.guard not in GUARDS:
        raise ValueError(
            f"guard = {settings.guard!r} is unknown: choose from measured, majorized, None"
        )
    check_fraction("target", settings.target)
    base = optax.with_extra_args_support(base_optimizer)
    if graph is None:
        return base
    if settings.limit is None:
        settings = settings._replace(limit=measured_limit(base_optimizer))
    reference = settings.objective == "reference"
    own = graph

    def init(params: jax.Array) -> SmallGainState:
        return _initial_state(own, base, params)

    def update(
        updates: jax.Array,
        state: SmallGainState,
        params: jax.Array | None = None,
        *,
        bounds: tuple[Any, Any] | None = None,
        graph: EnergyGraph | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, SmallGainState]:
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        graph = own if graph is None or not _alike(graph, own) else graph
        here = _look(graph, settings, updates, state, params, bounds)
        held, scores = _roll_back(here, state)
        # a decision, not a function to differentiate: sorting and shrinking have no useful slope
        decided = jax.lax.stop_gradient(rule(graph, here.snapshot, held, scores))
        decided = select(here.finite, decided, unspent(here.snapshot, held, scores))
        weights = _shrink_to_angle(here, decided.weights) if reference else decided.weights

        def propose(w: jax.Array) -> _Proposal:
            return _propose(here, settings, base, w, updates.dtype, state, params, extra_args)

        chosen, lost = propose(weights), jnp.zeros((), bool)
        if reference:
            # spending must pay: the reweighted step has to beat the one the user's weights give
            plain = propose(jnp.ones_like(weights))
            lost = ~(chosen.reached <= plain.reached)
            chosen = select(lost, plain, chosen)

        def trial(step: jax.Array) -> Trial:
            candidate = here.snapshot.x + step * chosen.move
            return Trial(here.energy(weights, candidate), step * chosen.slope, None)

        now = here.declared_energy(weights)
        search = armijo(trial, now, max_backtracks=settings.max_backtracks)
        accepted = search.accepted & (chosen.cosine >= settings.min_cosine) & here.finite
        step = jnp.where(accepted, search.step * chosen.move, 0)

        curvature = here.snapshot.curvature
        margin = here.snapshot.target - here.rows(held)
        per_term = tuple(range(1, curvature.edge_cost.ndim))
        info = SmallGainInfo(
            energy_reference=here.value,
            energy_adapted=here.adapted_energy(weights),
            lipschitz=curvature.lipschitz,
            limit=here.snapshot.limit,
            margin_rows=margin,
            margin_global=jnp.min(margin, initial=jnp.inf),
            spent_rows=decided.spent_rows,
            spent_global=decided.spent_global,
            cost=jnp.max(curvature.edge_cost, axis=per_term, initial=0.0),
            hinge_activity=graph.hinge_activity(here.snapshot.x, settings.smoothing),
            guard=chosen.guard,
            cosine=chosen.cosine,
            accepted=accepted,
            last_step_backtracks=search.backtracks,
            total_backtracks=state.info.total_backtracks + search.backtracks,
        )
        kept = weights
        if reference:
            # weights that failed to pay go halfway back to the reference
            kept = jnp.where(accepted & ~lost, weights, 1 + (weights - 1) / 2)
        value = jnp.where(accepted, search.trial.value, now)
        new_state = SmallGainState(
            count=optax.safe_increment(state.count),
            weights=jnp.where(here.finite, kept, held),
            previous_weights=held,
            scores=decided.scores,
            last_value=jnp.where(here.finite, value, state.last_value),
            base_state=select(here.finite, chosen.base_state, state.base_state),
            info=info,
        )
        return step.astype(updates.dtype), cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _alike(a: EnergyGraph, b: EnergyGraph) -> bool:
    """Whether they differ in numbers alone."""
    ours: Any = jax.tree.structure(a)
    same = ours == jax.tree.structure(b)
    shapes = partial(jax.tree.map, lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)))
    return bool(same) and shapes(a) == shapes(b)


def _initial_state(
    graph: EnergyGraph, base: optax.GradientTransformation, params: jax.Array
) -> SmallGainState:
    dtype = float_dtype(params)

    # every field its own buffer: a donated state may not alias itself
    def terms(fill: float) -> jax.Array:
        return jnp.full(graph.num_edges, fill, dtype)

    def rows() -> jax.Array:
        return jnp.zeros(params.shape, dtype)

    def scalar(fill: float = 0.0) -> jax.Array:
        return jnp.full((), fill, dtype)

    def counter() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    info = SmallGainInfo(
        energy_reference=scalar(),
        energy_adapted=scalar(),
        lipschitz=scalar(),
        limit=scalar(),
        margin_rows=rows(),
        margin_global=scalar(),
        spent_rows=rows(),
        spent_global=scalar(),
        cost=terms(0.0),
        hinge_activity=terms(0.0),
        guard=scalar(),
        cosine=scalar(),
        accepted=jnp.ones((), bool),
        last_step_backtracks=counter(),
        total_backtracks=counter(),
    )
    return SmallGainState(
        count=counter(),
        weights=terms(1.0),
        previous_weights=terms(1.0),
        scores=terms(0.0),
        last_value=scalar(jnp.inf),
        base_state=base.init(params),
        info=info,
    )


def _look(
    graph: EnergyGraph,
    settings: Settings,
    updates: jax.Array,
    state: SmallGainState,
    params: jax.Array,
    bounds: tuple[Any, Any] | None,
) -> _Setting:
    dtype = state.weights.dtype
    x = params.astype(dtype)
    curvature = graph.curvature(
        x, None, smoothing=settings.smoothing, scaling_iterations=settings.scaling_iterations
    )
    limit = curvature.lipschitz if settings.limit is None else settings.limit
    limit = jnp.asarray(limit(state.count) if callable(limit) else limit, dtype)
    energies, local_energy = graph.term_energies(x), graph.local_energy(x)
    snapshot = Snapshot(
        x=x,
        gradient=updates.astype(dtype),
        term_gradients=graph.term_gradients(x),
        term_energies=energies,
        curvature=curvature,
        limit=limit,
        target=jnp.asarray(settings.target * limit),
        count=state.count,
    )
    box = Box(-jnp.inf, jnp.inf) if bounds is None else Box(*bounds)
    value = local_energy + jnp.sum(energies)
    return _Setting(graph, snapshot, value, local_energy, box, settings.objective == "reference")


def _roll_back(here: _Setting, state: SmallGainState) -> tuple[jax.Array, jax.Array]:
    """Weights and scores to start from: the last move is undone if it let the objective rise."""
    declared = here.declared_energy(state.weights)
    resolution = 4 * jnp.finfo(declared.dtype).eps * jnp.abs(declared)
    rose = declared > state.last_value + resolution
    moved = state.weights != state.previous_weights
    weights = jnp.where(rose, state.previous_weights, state.weights)
    return weights, jnp.where(rose & moved, state.scores / 2, state.scores)


def _shrink_to_angle(here: _Setting, weights: jax.Array) -> jax.Array:
    """Largest of w, 1 + (w - 1)/2, ..., 1 whose gradient still agrees with the reference one.

    The angle is taken in D's metric, in which the row gains will step.
    """
    rows = here.snapshot.curvature.row_sums
    root = jnp.sqrt(jnp.where(rows > 0, rows, 1))
    plain = here.snapshot.gradient / root
    change = here.graph.scatter(scaled(weights - 1, here.snapshot.term_gradients)) / root
    fractions = jnp.append(0.5 ** jnp.arange(8, dtype=weights.dtype), 0)
    # |a + f b| and <a + f b, a> are polynomials in f: three inner products serve all fractions
    aa, ab, bb = jnp.vdot(plain, plain), jnp.vdot(plain, change), jnp.vdot(change, change)
    norms = jnp.sqrt(jnp.maximum(aa * (aa + 2 * fractions * ab + fractions**2 * bb), 0))
    agrees = (aa + fractions * ab >= AGREEMENT * norms).at[-1].set(True)
    return 1 + fractions[jnp.argmax(agrees)] * (weights - 1)


def _propose(
    here: _Setting,
    settings: Settings,
    base: optax.GradientTransformationExtraArgs,
    weights: jax.Array,
    dtype: Any,
    state: SmallGainState,
    params: jax.Array,
    extra_args: dict[str, Any],
) -> _Proposal:
    x = here.snapshot.x
    gained = here.gradient(weights)
    if settings.row_gains:
        rows = here.rows(weights)
        # rows without curvature have no limit of their own; Armijo settles them
        rows = jnp.maximum(rows, 1e-6 * jnp.max(rows, initial=0.0))
        gained = gained * here.snapshot.target / jnp.where(rows > 0, rows, here.snapshot.target)
    gained = jnp.where(here.finite, gained, 0).astype(dtype)
    move, base_state = base.update(gained, state.base_state, params, **extra_args)
    move = here.box.project(x + move.astype(x.dtype)) - x
    gradient, declared_rows = here.declared(weights)
    factor = jnp.ones((), x.dtype)
    if settings.guard is not None:
        bend = jnp.vdot(declared_rows * move, move)
        if settings.guard == "measured":
            measured = directional_curvature(partial(here.energy, weights), x, move)
            # negative or vanishing curvature promises nothing: fall back on the bound
            bend = jnp.where(measured > 1e-3 * bend, measured, bend)
        factor = guard_scale(gradient, move, bend, settings.target)
    move = jnp.where(factor > 0, factor * move, 0)
    return _Proposal(
        move=move,
        base_state=base_state,
        reached=here.energy(weights, x + move),
        slope=jnp.vdot(gradient, move),
        cosine=cosine(move, -gradient),
        guard=factor,
    )
