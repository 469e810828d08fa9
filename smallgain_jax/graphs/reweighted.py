r"""The skeleton of every reweighting optimizer on graphs: look, decide, propose, search, keep.

A rule moves the weights; the base optimizer proposes a step under them, which is accepted on the
declared objective. In the mode "reference" the weights stay within the rule's budgets on their way
back to 1, because those form a convex set and the way is a segment of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import (
    PARAMS_NEEDED,
    cast_like,
    check_call,
    check_optimizer,
    check_positive,
    check_target,
    float_dtype,
)
from smallgain_jax._compiling import at_once
from smallgain_jax._show import shows
from smallgain_jax._tree import select, vdot
from smallgain_jax.graphs.graph import EnergyGraph, alike, is_ours
from smallgain_jax.graphs.proposal import Mixture, Place, Proposal, Settings, look, propose
from smallgain_jax.graphs.weights import Move, Rule, term_norms, unspent
from smallgain_jax.limits.closed_forms import row_budgets
from smallgain_jax.limits.probe import measured_limit
from smallgain_jax.search.armijo import Search, Trial, armijo

OBJECTIVES = ("reference", "adapted")
GUARDS = ("measured", "majorized", None)
AGREEMENT = 0.99
"""Smallest cosine, in D's metric, between the reweighted gradient and the reference one."""


@shows()
class SmallGainInfo(NamedTuple):
    """What a reader of one update wants to know; `telemetry` turns it into columns.

    K terms, x of shape [n] (or [n, d]); energies in the objective's unit, curvatures in energy per
    squared unit of x.
    """

    energy_reference: jax.Array  # [] F(x; 1) at the parameters before this update
    energy_adapted: jax.Array  # [] F(x; w) there, w the weights now in force
    lipschitz: jax.Array  # [] max_r R_r(1)
    limit: jax.Array  # [] curvature limit of the base optimizer; inf where there is none
    margin_rows: jax.Array  # [n] T_r - R_r(w), w before the rule
    margin_global: jax.Array  # [] the smallest of them
    spent_rows: jax.Array  # [n] what the weights in force add to each row at the lower weights
    spent_global: jax.Array  # [] the same by each term's dearest row
    cost: jax.Array  # [K] dearest row of each term at unit weight
    gradient_norms: jax.Array  # [K] Euclidean norm of each term's gradient
    hinge_activity: jax.Array  # [K]
    guard: jax.Array  # [] factor on the base optimizer's update
    cosine: jax.Array  # [] between the step and the reference descent direction
    accepted: jax.Array  # [] bool; False for an update skipped as not finite
    skipped: jax.Array  # [] int32, how many so far
    last_step_backtracks: jax.Array  # [] int32
    total_backtracks: jax.Array  # [] int32


@shows(bars="weights")
class SmallGainState(NamedTuple):
    """State of `small_gain`, `gradnorm` and `auto_cap`. K terms."""

    count: jax.Array  # type: ignore[assignment]  # [] int32
    weights: jax.Array  # [K] current weights; 1 is the reference objective
    previous_weights: jax.Array  # [K] those before the last accepted step
    scores: jax.Array  # [K] moving averages of value over cost
    last_value: jax.Array  # [] declared objective after the last accepted step; at first huge
    base_state: Any
    info: SmallGainInfo


def reweighted(
    base_optimizer: optax.GradientTransformation,
    graph: EnergyGraph,
    rule: Rule,
    settings: Settings,
) -> optax.GradientTransformationExtraArgs:
    """Wrap a base optimizer by a rule for the weights of `graph`'s terms."""
    _check(base_optimizer, graph, settings)
    base = optax.with_extra_args_support(base_optimizer)
    if settings.limit is None:
        settings = settings._replace(limit=measured_limit(base_optimizer))
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
        if params is None:  # which check_call refuses; said again for the type checker
            raise ValueError(PARAMS_NEEDED)
        check_call(SmallGainState, updates, state, params)
        used = own if graph is None or not alike(graph, own) else graph
        return step(used, updates, state, params, bounds, extra_args)

    @at_once(own=is_ours)
    def step(
        used: EnergyGraph,
        updates: jax.Array,
        state: SmallGainState,
        params: jax.Array,
        bounds: tuple[Any, Any] | None,
        extra_args: dict[str, Any],
    ) -> tuple[jax.Array, SmallGainState]:
        here = look(used, settings, updates, state.count, state.weights.dtype, params, bounds)
        decided = _decide(here, rule, state)

        def proposed(under: Mixture) -> Proposal:
            given = (state.base_state, params, extra_args)
            return propose(here, settings, base, under, updates.dtype, *given)

        chosen, lost = proposed(decided.mixture), jnp.zeros((), bool)
        if here.reference:
            # spending must pay: the reweighted step has to beat the one the user's weights give
            plain = proposed(here.plain)
            lost = ~(chosen.reached <= plain.reached)
            chosen = select(lost, plain, chosen)

        search = _search(here, decided.mixture.weights, chosen, settings)
        accepted = search.accepted & (chosen.cosine >= settings.min_cosine) & here.finite
        move = jnp.where(accepted, search.step * chosen.move, 0)
        new_state = _kept(here, settings, decided, chosen, search, accepted, lost, state)
        return move.astype(updates.dtype), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(base_optimizer: Any, graph: Any, settings: Settings) -> None:
    check_optimizer("base_optimizer", base_optimizer)
    if not isinstance(graph, EnergyGraph):
        raise TypeError(f"terms must be an EnergyGraph, got {type(graph).__name__}")
    if settings.objective not in OBJECTIVES:
        raise ValueError(
            f"objective = {settings.objective!r} is unknown: choose from {', '.join(OBJECTIVES)}"
        )
    if settings.guard not in GUARDS:
        raise ValueError(
            f"guard = {settings.guard!r} is unknown on graphs: "
            "choose from measured, majorized, None"
        )
    check_target(settings.target)
    if settings.limit is not None and not callable(settings.limit):
        check_positive("limit", settings.limit)


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
        gradient_norms=terms(0.0),
        hinge_activity=terms(0.0),
        guard=scalar(),
        cosine=scalar(),
        accepted=jnp.ones((), bool),
        skipped=counter(),
        last_step_backtracks=counter(),
        total_backtracks=counter(),
    )
    return SmallGainState(
        count=counter(),
        weights=terms(1.0),
        previous_weights=terms(1.0),
        scores=terms(0.0),
        last_value=scalar(float(jnp.finfo(dtype).max)),
        base_state=base.init(params),
        info=info,
    )


def _roll_back(here: Place, state: SmallGainState) -> tuple[jax.Array, jax.Array]:
    """Weights and scores to start from: the last move is undone if it let the objective rise."""
    declared = here.declared_energy(state.weights)
    resolution = 4 * jnp.finfo(declared.dtype).eps * jnp.abs(declared)
    rose = declared > state.last_value + resolution
    moved = state.weights != state.previous_weights
    weights = jnp.where(rose, state.previous_weights, state.weights)
    return weights, jnp.where(rose & moved, state.scores / 2, state.scores)


class _Decision(NamedTuple):
    """The rule's move, and what of it is in force for the step."""

    held: jax.Array  # [K] weights before
    move: Move
    lower_rows: jax.Array  # [n] R at the move's lower weights
    anchor: Mixture  # where weights shrink to
    mixture: Mixture  # in force


def _decide(here: Place, rule: Rule, state: SmallGainState) -> _Decision:
    held, scores = _roll_back(here, state)
    # a decision, not a function to differentiate: sorting and shrinking have no useful slope
    move = jax.lax.stop_gradient(rule(here.graph, here.snapshot, held, scores))
    move = select(here.finite, move, unspent(held, scores))
    lower_rows, moved = here.rows(move.lower), here.mixed(move.weights)
    if not here.reference:
        return _Decision(held, move, lower_rows, moved, moved)
    anchor = _anchor(here, move, lower_rows)
    return _Decision(held, move, lower_rows, anchor, _shrink_to_angle(here, anchor, moved))


def _kept(
    here: Place,
    settings: Settings,
    decided: _Decision,
    chosen: Proposal,
    search: Search,
    accepted: jax.Array,
    lost: jax.Array,
    state: SmallGainState,
) -> SmallGainState:
    """The state after the step; where something was not finite, as it was but for two marks."""
    kept = decided.mixture
    if here.reference:
        # weights that failed to pay go halfway back to the reference
        kept = select(accepted & ~lost, kept, decided.anchor.towards(kept, 0.5))
    now = here.declared_energy(decided.mixture.weights)
    moved = SmallGainState(
        count=optax.safe_increment(state.count),
        weights=kept.weights,
        previous_weights=decided.held,
        scores=decided.move.scores,
        last_value=jnp.where(accepted, search.trial.value, now),
        base_state=chosen.base_state,
        info=_report(here, settings, decided, kept, chosen, search, accepted, state.info),
    )
    marks = state.info._replace(
        accepted=jnp.zeros((), bool), skipped=optax.safe_increment(state.info.skipped)
    )
    return select(here.finite, cast_like(moved, state), state._replace(info=marks))


def _anchor(here: Place, move: Move, lower_rows: jax.Array) -> Mixture:
    """The weights nearest to 1, on the way up to it, that keep the budgets.

    They start from the lower weights, or 1 where those are above it, and climb together.
    """
    low, plain = here.mixed(jnp.minimum(move.lower, 1)), here.plain
    most = lower_rows + row_budgets(here.snapshot.target, lower_rows, move.part)
    climb, free = plain.rows - low.rows, most - low.rows
    short = climb > jnp.maximum(free, 0)
    part = jnp.where(short, jnp.maximum(free, 0) / jnp.where(short, climb, 1), 1)
    fraction = jnp.min(part, initial=1.0)
    everything = vdot(here.dearest, plain.weights - low.weights)
    short = everything > move.most_global
    limited = jnp.where(short, move.most_global, 1) / jnp.where(short, everything, 1)
    return low.towards(plain, jnp.minimum(fraction, limited))


def _shrink_to_angle(here: Place, anchor: Mixture, moved: Mixture) -> Mixture:
    """The first of w, a + (w - a)/2, a + (w - a)/4, ..., a whose gradient agrees with that at 1.

    a is the anchor. The angle is taken in D's metric, in which the row gains will step. Where not
    even a agrees, the plain step that it is compared with will be taken.
    """
    rows = here.snapshot.curvature.row_sums
    root = jnp.sqrt(jnp.where(rows > 0, rows, 1))
    # in the unit of the largest entry, since fourth powers follow
    largest = jnp.max(jnp.abs(here.snapshot.gradient / root), initial=0.0)
    root = root * jnp.where(largest > 0, largest, 1)
    plain, start = here.snapshot.gradient / root, anchor.gradient / root
    change = (moved.gradient - anchor.gradient) / root
    fractions = jnp.append(0.5 ** jnp.arange(8, dtype=root.dtype), 0)
    # |s + f c| and <s + f c, p> are polynomials in f: a few inner products serve all fractions
    pp, sp, cp = (vdot(plain, other) for other in (plain, start, change))
    ss, sc, cc = vdot(start, start), vdot(start, change), vdot(change, change)
    norms = jnp.sqrt(jnp.maximum(pp * (ss + 2 * fractions * sc + fractions**2 * cc), 0))
    agrees = (sp + fractions * cp >= AGREEMENT * norms).at[-1].set(True)
    return anchor.towards(moved, fractions[jnp.argmax(agrees)])


def _search(here: Place, weights: jax.Array, chosen: Proposal, settings: Settings) -> Search:
    """Armijo's search along the proposal, on the declared objective."""

    def trial(step: jax.Array) -> Trial:
        candidate = here.snapshot.x + step * chosen.move
        return Trial(here.energy(weights, candidate), step * chosen.slope, None)

    now = here.declared_energy(weights)
    return armijo(trial, now, max_backtracks=settings.max_backtracks)


def _report(
    here: Place,
    settings: Settings,
    decided: _Decision,
    kept: Mixture,
    chosen: Proposal,
    search: Search,
    accepted: jax.Array,
    before: SmallGainInfo,
) -> SmallGainInfo:
    """What happened, in terms of the weights that are now in force."""
    margin = here.snapshot.target - here.rows(decided.held)
    raised = jnp.maximum(kept.weights - decided.move.lower, 0)
    return SmallGainInfo(
        energy_reference=here.value,
        energy_adapted=here.adapted_energy(kept.weights),
        lipschitz=here.snapshot.curvature.lipschitz,
        limit=here.snapshot.limit,
        margin_rows=margin,
        margin_global=jnp.min(margin, initial=jnp.finfo(margin.dtype).max),
        spent_rows=jnp.maximum(kept.rows - decided.lower_rows, 0),
        spent_global=vdot(here.dearest, raised),
        cost=here.dearest,
        gradient_norms=term_norms(here.snapshot.term_gradients),
        hinge_activity=here.graph.hinge_activity(here.snapshot.x, settings.smoothing),
        guard=chosen.guard,
        cosine=chosen.cosine,
        accepted=accepted,
        skipped=before.skipped,
        last_step_backtracks=search.backtracks,
        total_backtracks=before.total_backtracks + search.backtracks,
    )
