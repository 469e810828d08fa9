"""`small_gain` around the losses of a model: observe, price, decide, mix, guard."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import isfunction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from optax.experimental import aggregating

from smallgain_jax._checks import (
    cast_like,
    check_bounds,
    check_call,
    check_count,
    check_fraction,
    check_optimizer,
    check_positive,
    check_scalar,
    check_target,
    float_dtype,
    is_concrete,
    warn_caller,
)
from smallgain_jax._compiling import is_data
from smallgain_jax._tree import norm, select, vdot, when
from smallgain_jax.limits.probe import Probe, probe_optimizer
from smallgain_jax.losses.balance import balance_residual, interaction_ratio
from smallgain_jax.losses.incoming import (
    Given,
    Incoming,
    held_foreign,
    host_report,
    is_foreign,
    observe,
    report,
    report_off,
)
from smallgain_jax.losses.losses import Batch, Losses, check_params, check_real
from smallgain_jax.losses.policies import POLICIES, WORTHS, decide
from smallgain_jax.losses.prices import (
    Measured,
    Sight,
    inverse_root_of,
    known_prices,
    limit_of,
    measure,
    unseen,
)
from smallgain_jax.losses.sharpness import PRODUCTS
from smallgain_jax.losses.state import (
    Limit,
    Priorities,
    Settings,
    TrainingInfo,
    TrainingState,
    highest,
    initial_state,
)
from smallgain_jax.losses.units import Units, find_units, plain_weight
from smallgain_jax.losses.watch import (
    LEARNING,
    Verdict,
    WatchState,
    anchored,
    arrived,
    at_anchor,
    judge,
    regrown,
    way_back,
)
from smallgain_jax.spectral.power import Blocks, label_blocks

ARGUMENTS = ("term_args", "term_grads", "term_values", "curvature_args", "weighted")
"""What `update` reads besides its first three arguments."""
STATIC = ("blocks", "metric", "anneal", "rounds")
"""Functions and shapes, no hyperparameters: `static_args` of `optax.inject_hyperparams`."""

READING = 20
"""Looks among which one prices a loss where no decision rests on prices: they are for reading."""

ADAPTIVE_WARMUP = 100
"""Updates before second moments mean anything; with beta_2 = 0.999 they average a tenth then."""


def loss_small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: Losses,
    *,
    policy: str = "reference",
    guard: str | float | None = "divergence",
    every: int = 10,
    limit: Limit = None,
    target: ArrayLike = 0.9,
    metric: Callable[[Any, Any], Any] | None = None,
    priorities: Priorities = None,
    floor: ArrayLike = 1e-4,
    ceiling: ArrayLike = 1e4,
    ema: ArrayLike = 0.1,
    anneal: Callable[[jax.Array], Any] | None = None,
    warmup: int | None = None,
    curvature: str = "hessian",
    iterations: int = 1,
    blocks: Blocks = None,
    row_gains: bool = False,
    max_gain: ArrayLike = 3.0,
    value: str = "alignment",
    budget_fraction: ArrayLike = 0.7,
    max_step_change: ArrayLike = 0.1,
    rounds: int | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap a base optimizer so that the losses of a model share the stability margin.

    Every so many updates the curvature $\lambda_k$ of each loss, and that of the weighted sum, is
    measured by power iteration on $P^{-1/2} H_k P^{-1/2}$ in the metric P of the base optimizer,
    and set against its limit there: $2/\alpha$ for gradient descent, $38/\alpha$ for Adam. These
    are estimates from below, no guarantees. Then the policy moves the weights:

    * "reference", the default, leaves them at 1: the objective is the one that the user wrote, and
      what is handed in goes to the base optimizer as it is. Prices are for reading, and measured at
      every twentieth look only.
    * "fair" starts from weights that make the losses cost alike at the first batch, so that a
      constant factor of a loss changes nothing (see `units`), and moves $\log w_k$ towards
      $p_k \sum_j w^0_j \lambda_j / (\lambda_k \sum_j p_j)$, proportional fairness (Kelly, Maulloo
      and Tan 1998) at the total cost under the first weights $w^0$: every loss gets its share of
      the margin. Under Adam, which feels no common factor, the total is that which the shares can
      reach: those that answer least set it (see `policies`). For losses in arbitrary units that can
      all vanish (physics-informed networks). Under an optimizer that feels a common factor, the
      learning rate is relative to the curvature at the first batch: gradient descent is stable
      there below 2, and beyond 1.8 shares cost no more than `target` times the limit.
      **It solves another problem** where weights are meant: a small regularizer is raised hundreds
      of times.
    * "greedy" raises and sheds by value over cost, where losses agree and the margin has slack.

    With weights other than 1 the gradient is this transformation's own, and takes over a common
    factor of what is handed in (clipping by norm, a mean, a frozen leaf); see `incoming` for what
    else may come.

    The guard compares the loss with that at an anchor some updates ago, on one batch. Where a rise
    beyond all proportion is confirmed by a second batch, parameters and base optimizer go back to
    the anchor, and steps are shorter for a while; see `watch`. It costs one evaluation of the
    losses at every `every` updates, and a copy of the parameters and of the base optimizer's state.

    Args:
      base_optimizer: any optax optimizer, line searches included, or an
        `optax.experimental.aggregating.Aggregator`, which sees each reweighted gradient.
      terms: the losses, made by `sg.terms`, or their function.
      policy: "reference", "fair" or "greedy".
      guard: "divergence" as above; a number in addition scales steps down wherever the sharpness is
        above that multiple of the limit (needs a known limit); None for neither.
      every: updates between measurements; the first follow closer.
      limit: curvature limit of the base optimizer, a scalar or a schedule of the count; None to
        measure it (`limits`).
      target: c in (0, 1), the fraction of the limit that a rewind and `row_gains` aim at.
      metric: P for optimizers that cannot be read: `metric(base_state, params)` gives a pytree like
        `params`, positive; or, where P is no diagonal (Shampoo, SOAP, natural gradients), a
        function that applies $P^{-1/2}$, symmetric, to a pytree like `params`.
      priorities: p_k, float [K] in the order of the losses, or a dict by their names, ones for
        those it leaves out, or a schedule: a function of the count that gives either; positive
        (traced ones that are not let every update be skipped); None for ones ("fair").
      floor, ceiling: bounds of every weight; for "fair" relative to its first one.
      ema: part of the way to its aim that a weight goes per measurement, in (0, 1]; for "greedy"
        the weight of the newest score.
      anneal: schedule a(count) in [0, 1]; $w_k^a s^{1-a}$ is in force, so that 0 is the reference,
        at s = 1 or, for "fair", at the common factor under which the plain sum costs as much.
      warmup: updates during which nothing is priced, and first weights hold; None for 100 with the
        Adam family, whose second moments mean nothing before, else 0.
      curvature: "hessian"; "gauss_newton" for terms made with `outputs`; or "difference" of two
        gradients, a third of the time and no memory of its own, for float32 or wider.
      iterations: of power iteration at each turn.
      blocks: rows of the parameters: None for one, "leaves", or a function of a leaf's key path.
      row_gains: whether the step of each block is multiplied by $T / \lambda_r(w)$.
      max_gain: bound on row gains and on their inverse.
      value, budget_fraction, max_step_change, rounds: of "greedy": what a unit of weight is worth
        ("alignment" or "grad_norm"), rho, eta, and rounds of
        `allocate` (None for 8), static.
      axis_name: of replicas under `pmap` or `shard_map(check_vma=False)`, whose measurements are
        averaged, so that they stay equal.

    Returns:
      An optax transformation with a `TrainingState`; its `update` needs `params` and reads
      `term_args`, what the losses take besides the parameters (a tuple, or a dict of named
      arguments; without it "reference" only hands on, and warns), `curvature_args` (another batch
      to measure on), `term_grads` (gradients of the losses, a leading axis K on each leaf) with
      `term_values` [K], and `weighted` (whether the updates are the gradient of the sum by
      `state.weights`, as `Losses.value_and_weighted_grad` gives it: one backward pass in all).

    Raises:
      ValueError: an unknown name, a concrete number outside its range.
      TypeError: parameters that are not floating, losses whose names must be given and are not, or
        that take a batch which `update` was not given.

    Warns, at `init`: where something that was asked for rests on the limit or on the metric of a
    base optimizer that has none (Lion, LAMB, Muon).

    >>> def losses(x):
    ...     return {"soft": jnp.sum((x - 1) ** 2), "stiff": 50 * jnp.sum(x**2)}
    >>> from smallgain_jax.losses.losses import terms
    >>> optimizer = loss_small_gain(optax.sgd(0.1), terms(losses), policy="fair", every=1)
    >>> x = jnp.ones(2)
    >>> state = optimizer.init(x)
    >>> @jax.jit
    ... def step(x, state):
    ...     gradient = jax.grad(lambda x: sum(losses(x).values()))(x)
    ...     updates, state = optimizer.update(gradient, state, x)
    ...     return optax.apply_updates(x, updates), state
    >>> for _ in range(100):
    ...     x, state = step(x, state)
    >>> state.info.share.round(2).tolist(), (1 / state.weights).round().tolist()
    ([0.5, 0.5], [4.0, 200.0])
    """
    check_optimizer("base_optimizer", base_optimizer)
    terms.check_countable()
    settings = Settings(
        limit=limit,
        metric=metric,
        target=target,
        policy=policy,
        value=value,
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
        axis_name=axis_name,
    )
    _check(settings)
    if terms.names is not None:
        settings.ordered(terms.names)
    return _transformation(base_optimizer, terms, settings)


class _Wiring(NamedTuple):
    """What one update needs besides its arguments."""

    losses: Losses
    settings: Settings
    base: Any
    probe: Callable[[Any], Probe]  # of the parameters
    per_term: bool
    aggregates: bool


class _Look(NamedTuple):
    """Where an update looks. K losses."""

    params: Any
    batch: Batch  # to measure curvature on
    own: Batch  # of the update itself
    appeared: jax.Array  # [K] bool, losses to be weighed that no batch held before
    updates: Any  # what was handed in, where that is the weighted gradient; or None


class _Decision(NamedTuple):
    """All that changes only where something is measured."""

    measured: Measured
    first_weights: jax.Array  # [K]
    log_weights: jax.Array  # [K]
    scores: jax.Array  # [K]
    balance_residual: jax.Array  # []
    interaction_ratio: jax.Array  # []
    reported: jax.Array  # [] bool
    updates: Any  # what was handed in, or the gradient by weights that are new; or None


class _Judgement(NamedTuple):
    """What the watch found."""

    watch: WatchState
    rewind: jax.Array  # [] bool
    losses: jax.Array  # [K] as last evaluated


def _transformation(
    base_optimizer: optax.GradientTransformation, losses: Losses, settings: Settings
) -> optax.GradientTransformationExtraArgs:
    aggregates = isinstance(base_optimizer, aggregating.Aggregator)
    wiring = _Wiring(
        losses=losses,
        settings=settings,
        base=base_optimizer if aggregates else optax.with_extra_args_support(base_optimizer),
        probe=_aggregator if aggregates else partial(probe_optimizer, base_optimizer),
        per_term=aggregates or settings.policy == "greedy",
        aggregates=aggregates,
    )
    compute = partial(_compute, wiring)
    compiled = jax.jit(compute, static_argnames="weighted")
    report_lost = host_report()

    def update(
        updates: Any, state: TrainingState, params: Any = None, **given: Any
    ) -> tuple[Any, TrainingState]:
        _check_arguments(given)
        weighted = bool(given.pop("weighted", False))
        operands = (updates, state, params, given)
        # branches on the state would compile anew at every call outside of a program
        ready = is_data(operands)
        run = compiled if ready else compute
        if ready and isinstance(state, TrainingState) and not settings.reweights:
            report_lost(state)
        try:
            found: tuple[Any, TrainingState] = run(
                updates, state, params, weighted=weighted, **given
            )
        except TypeError as error:
            if "manual axes" in str(error) or "{V:" in str(error):
                error.add_note(
                    "small_gain: replicas must agree on what they measure; name their axis, as in "
                    "small_gain(optimizer, losses, axis_name='batch')"
                )
            raise
        return found

    return optax.GradientTransformationExtraArgs(partial(_initial, wiring), update)


def _check_arguments(given: Iterable[str]) -> None:
    """Refuse what is nearly a name of ours: others are for the base optimizer, and stay unread."""
    for name in given:
        near = difflib.get_close_matches(name, ARGUMENTS, n=1, cutoff=0.85)
        if near and name not in ARGUMENTS:
            raise TypeError(f"{name} is no argument of update: did you mean {near[0]}?")


def _compute(
    wiring: _Wiring,
    updates: Any,
    state: TrainingState,
    params: Any = None,
    *,
    term_grads: Any = None,
    term_values: jax.Array | None = None,
    term_args: Any = (),
    curvature_args: Any = None,
    weighted: bool = False,
    **extra_args: Any,
) -> tuple[Any, TrainingState]:
    """An update: observe, price and decide, judge, mix, step, settle."""
    losses = wiring.losses
    batch = Batch.of(term_args)
    at = batch if curvature_args is None else Batch.of(curvature_args, "curvature_args")
    given = _checked(updates, params, state, Given(term_grads, term_values, weighted))
    settings = wiring.settings.ordered(state.info.names, state.count)
    wiring = wiring._replace(settings=settings)
    blind = _is_blind(wiring, params, at)

    seen = observe(losses, settings, updates, params, batch, given, wiring.per_term, state.weights)
    foreign = held_foreign(state.foreign, seen.fit)
    healthy = _healthy(updates, seen, extra_args.get("value"))
    priorities: Any = settings.priorities
    if priorities is not None and not is_concrete(priorities):
        # concrete ones were refused; by these every update is skipped, and counted
        healthy &= jnp.all(jnp.stack([jnp.asarray(p) > 0 for p in priorities]))
    appeared = _appeared(settings, state, seen.values)
    due = healthy & ((state.wait <= 0) | jnp.any(appeared))
    same = seen if curvature_args is None else seen._replace(gradients=None)
    own = batch if losses.lacks(batch) is None else at
    late = settings.unitless and given.weighted and given.term_grads is None
    look = _Look(params, at, own, appeared, updates if late else None)
    decision = _decide(wiring, state, look, same, due, blind)
    weights = _in_force(settings, state, decision, foreign)
    judged = _judge(wiring, state, params, at, weights, due | ~healthy, blind)

    gradient = _mixed(wiring, seen, decision, weights, late)
    gradient = jax.tree.map(lambda g: jnp.where(healthy, g, 0), gradient)
    if settings.reweights and not blind:
        extra_args = _weighted_args(losses, batch, weights, seen, gradient, extra_args)
    move, base_state = wiring.base.update(gradient, state.base_state, params, **extra_args)

    factors = _factors(settings, state, decision)
    move = _scaled(move, factors, params, settings.blocks)
    healthy = healthy & finite(jax.tree.map(jnp.add, params, move))
    judged = judged._replace(rewind=judged.rewind & bool(judged.watch.anchor))
    move, base_state = _settled(state, params, judged, healthy, move, base_state)
    info = _info(settings, state, seen, decision, judged, healthy, weights, factors)
    wait = _next_wait(settings, state, judged, decision.measured, healthy, due, blind)
    kept = state._replace(looks=state.looks + due, wait=wait, foreign=foreign)
    after = _advanced(kept, decision, judged, healthy, weights)
    return move, cast_like(after._replace(base_state=base_state, info=info), state)


def _mixed(
    wiring: _Wiring, seen: Incoming, decision: _Decision, weights: jax.Array, late: bool
) -> Any:
    """The gradient that the base optimizer is given."""
    if wiring.aggregates:
        return jax.tree.map(partial(_times, weights), seen.gradients)
    if late:
        return decision.updates
    return seen.reweighted(weights, plain_weight(wiring.settings, decision.first_weights))


def _advanced(
    state: TrainingState,
    decision: _Decision,
    judged: _Judgement,
    healthy: jax.Array,
    weights: jax.Array,
) -> TrainingState:
    """The state with what was decided and judged."""
    measured = decision.measured
    return state._replace(
        count=jnp.where(healthy, optax.safe_increment(state.count), state.count),
        weights=jnp.where(healthy, weights, state.weights),
        first_weights=decision.first_weights,
        log_weights=decision.log_weights,
        scores=decision.scores,
        turn=measured.turn,
        misses=measured.misses,
        reported=decision.reported,
        felt=measured.prices.felt,
        vectors=measured.vectors,
        watch=regrown(judged.watch),
    )


def _aggregator(params: Any) -> Probe:
    """What aggregates has no limit of its own."""
    del params
    return Probe(False, False, "it is an aggregator")


def _initial(wiring: _Wiring, params: Any) -> TrainingState:
    losses, settings = wiring.losses, wiring.settings
    blind = _sees_holes(losses, params)
    if blind and settings.reweights:
        raise TypeError(HOLES)
    if not has_holes(params):
        check_params(params)
    check_real(params)
    names = (losses.names or ()) if blind else losses.names_at(params)
    settings = settings.ordered(names)
    if not wiring.aggregates:
        _warn_of_no_limit(settings, wiring.probe(params))
    dtype = float_dtype(*(jnp.zeros((), jnp.result_type(x)) for x in jax.tree.leaves(params)))
    return initial_state(wiring.base, params, names, settings, dtype)


def _warn_of_no_limit(settings: Settings, probe: Probe) -> None:
    """Say what rests on a limit, or on a metric, and has none."""
    if probe.known:
        return
    off = []
    if settings.limit is None:
        off += ["the numeric guard does nothing"] * (not isinstance(settings.guard, str | None))
        off += ["row_gains does nothing"] * settings.row_gains
    if settings.metric is None and settings.reweights:
        off.append("losses are priced as under gradient descent, in the identity metric")
    if off:
        warn_caller(
            f"base_optimizer: no curvature limit was found ({probe.why}), so that "
            f"{', and '.join(off)}; give limit= and metric= if you know them"
        )


def _checked(updates: Any, params: Any, state: TrainingState, given: Given) -> Given:
    """What the caller gives, once it has been looked at."""
    check_call(TrainingState, updates, state, params)
    if given.term_grads is not None:
        _check_term_grads(given.term_grads, params, state.weights.shape[0])
    if given.term_values is None:
        return given
    values = jnp.asarray(given.term_values, state.weights.dtype)
    if values.shape != state.weights.shape:
        raise ValueError(f"term_values has shape {values.shape}, expected {state.weights.shape}")
    return given._replace(term_values=values)


HOLES = (
    "params has holes (optax.MaskedNode), as masked and partition leave them around small_gain, "
    "and the losses cannot be evaluated there: put the mask inside, as in "
    "small_gain(optax.masked(optax.adam(1e-3), mask), losses)"
)


def has_holes(params: Any) -> bool:
    """Whether a transformation around this one has masked leaves out."""
    return any(map(_is_hole, jax.tree.leaves(params, is_leaf=_is_hole)))


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _sees_holes(losses: Losses, params: Any) -> bool:
    """Whether there are holes, and the losses do not get along with them."""
    if not has_holes(params):
        return False
    try:
        losses.names_at(params)
        if losses.names is not None and losses.lacks(Batch()) is None:
            jax.eval_shape(losses.values, params)
    except Exception:  # whatever a loss may do to a hole
        return True
    return losses.lacks(Batch()) is not None


def _is_blind(wiring: _Wiring, params: Any, batch: Batch) -> bool:
    """Whether the losses cannot be evaluated at this update; a warning says why."""
    missing = wiring.losses.lacks(batch)
    if missing is None and not _sees_holes(wiring.losses, params):
        return False
    why = HOLES
    if missing is not None:
        why = (
            f"term_args: the losses take {missing!r} besides params, and update was not given it; "
            "hand the batch over, as in update(gradient, state, params, term_args=(batch,))"
        )
    if wiring.settings.reweights:
        raise TypeError(why)
    warn_caller(
        f"{why}. Until then small_gain hands updates on as they are: it measures nothing and "
        "guards against nothing"
    )
    return True


def _healthy(updates: Any, seen: Incoming, value: Any) -> jax.Array:
    """Whether every number that came in, or was evaluated, is finite."""
    healthy = finite(updates)
    if seen.gradients is not None:
        healthy = healthy & finite(seen.gradients)
    for known in (seen.values, value):
        if known is not None:
            healthy = healthy & jnp.all(jnp.isfinite(jnp.asarray(known)))
    return healthy


def finite(tree: Any) -> jax.Array:
    """Whether every entry is: a sum of zeros is one fused pass, a reduction of booleans is not."""
    zeros = (jnp.sum(0 * leaf) for leaf in jax.tree.leaves(tree))
    return sum(zeros, jnp.zeros(())) == 0


def _appeared(settings: Settings, state: TrainingState, values: Any) -> jax.Array:
    """Losses that were 0 so far, and have no weight for that, and are something now [K]."""
    if values is None or not settings.unitless:
        return jnp.zeros(state.weights.shape, bool)
    return (state.first_weights <= 0) & (state.info.losses == 0) & (values != 0)


def _decide(
    wiring: _Wiring,
    state: TrainingState,
    at: _Look,
    seen: Incoming,
    due: jax.Array,
    blind: bool,
) -> _Decision:
    """Price what is in turn, and move the weights, where that is due."""
    settings, params = wiring.settings, at.params
    info = state.info
    kept = _Decision(
        Measured(known_prices(state), state.vectors, state.turn, state.misses),
        state.first_weights,
        state.log_weights,
        state.scores,
        info.balance_residual,
        info.interaction_ratio,
        state.reported,
        at.updates,
    )
    if blind or not state.weights.size:
        return kept
    probe = wiring.probe(params)
    adaptive = settings.metric is not None or probe.adaptive
    warmup = settings.warmup
    if warmup is None:
        warmup = ADAPTIVE_WARMUP if adaptive else 0
    asked = due & (state.count >= warmup)
    early = jnp.zeros((), bool)
    if settings.unitless:
        early = (state.count < warmup) | (unseen(state) & adaptive)
        asked = asked | (due & jnp.any(state.first_weights <= 0))

    def look() -> _Decision:
        measured, units = _priced(wiring, state, at, seen, probe, early)
        prices, weighed = measured.prices, state._replace(first_weights=units.first_weights)
        log_weights, scores = decide(
            settings, adaptive or not probe.known, weighed, seen.gradients, prices
        )
        log_weights = jnp.where(early, state.log_weights, log_weights)
        prices = select(early, known_prices(state)._replace(limit=prices.limit), prices)
        foreign = is_foreign(seen.fit)
        if settings.reweights:
            new = foreign & ~state.reported
            jax.lax.cond(new, partial(jax.debug.callback, report, seen.fit, new), lambda: None)
        balance, ratio = info.balance_residual, info.interaction_ratio
        if seen.gradients is not None:
            balance, ratio = balance_residual(seen.gradients), interaction_ratio(seen.gradients)
        measured = measured._replace(prices=prices)
        reported = state.reported | foreign
        first, updates = units.first_weights, units.gradient
        found = (measured, first, log_weights, scores, balance, ratio, reported, updates)
        return cast_like(_Decision(*found), kept)

    if not settings.reweights and isinstance(settings.guard, str | None) and not settings.row_gains:
        first = ~(info.sharpness > 0) | (state.misses > 0)
        asked = asked & (first | (state.looks % READING == 0))
    found: _Decision = when(asked, look, lambda: kept)
    return found


def _priced(
    wiring: _Wiring,
    state: TrainingState,
    at: _Look,
    seen: Incoming,
    probe: Probe,
    early: jax.Array,
) -> tuple[Measured, Units]:
    """What the losses cost, and first weights for those that have none."""
    losses, settings, params = wiring.losses, wiring.settings, at.params
    adaptive = settings.metric is not None or probe.adaptive
    present = probe.present(state.base_state)
    root = inverse_root_of(settings, probe, state, params, present)
    if settings.unitless and adaptive:
        root = _later(root, early)
    new = jnp.any(at.appeared) & ~unseen(state)
    turn = jnp.where(new, jnp.argmax(at.appeared), state.turn).astype(jnp.int32)
    plain = seen.total(state.weights)
    sight = Sight(params, at.batch, root, adaptive, early, new, plain, seen.gradients)
    measured = measure(losses, settings, state._replace(turn=turn), sight)
    aside = select(early | new, (state.turn, state.misses), (measured.turn, measured.misses))
    measured = measured._replace(turn=aside[0], misses=aside[1])
    prices = measured.prices._replace(limit=limit_of(settings, probe, state, present))
    if not settings.unitless:
        known = Units(state.first_weights, jnp.ones_like(prices.sharpness), at.updates)
        return measured._replace(prices=prices), known
    units = find_units(
        losses,
        settings,
        state,
        prices.cost,
        (params, at.own),
        most=jnp.asarray(settings.target) * prices.limit if probe.known and not adaptive else None,
        updates=at.updates,
    )
    prices = prices._replace(
        sharpness=units.factor * prices.sharpness,
        row_sharpness=units.factor * prices.row_sharpness,
    )
    return measured._replace(prices=prices), units


def _later(root: Any, early: jax.Array) -> Any:
    """P^{-1/2}, or the identity while that is `early`."""
    if isfunction(root):
        return lambda v: select(early, v, root(v))
    return jax.tree.map(lambda r: jnp.where(early, 1, r).astype(r.dtype), root)


def _judge(
    wiring: _Wiring,
    state: TrainingState,
    params: Any,
    batch: Batch,
    weights: jax.Array,
    due: jax.Array,
    blind: bool,
) -> _Judgement:
    """Compare with the anchor, where that is due."""
    settings, watch = wiring.settings, state.watch
    kept = _Judgement(watch, jnp.zeros((), bool), state.info.losses)
    if blind or settings.guard is None:
        return kept

    def values(at: Any) -> jax.Array:
        found = settings.mean(wiring.losses.values(at, *batch.args, **batch.kwargs))
        return found.astype(state.weights.dtype)

    def look() -> _Judgement:
        anchor_params, _ = at_anchor(watch, (params, state.base_state))
        here, there = values(params), values(anchor_params)
        distance = way_back(params, anchor_params, state.weights.dtype)
        info = state.info
        known = (info.sharpness > 0) & (info.limit < highest(info.limit.dtype))
        safe = settings.target * info.limit / jnp.where(known, info.sharpness, 1)
        verdict: Verdict = judge(
            watch,
            vdot(weights, here),
            vdot(weights, there),
            jnp.where(known, jnp.minimum(safe, 1), 1),
        )
        size = norm(anchor_params, state.weights.dtype)
        verdict = select(watch.way > 0, arrived(watch, distance, size), verdict)
        rewind, after = verdict.rewind, verdict.watch
        way = jnp.where(rewind, distance, 0)
        anchor = select(verdict.advance, anchored((params, state.base_state)), watch.anchor)
        if settings.reweights:  # these programs hold a callback anyway, and start slower for it
            new = after.lost & ~watch.lost
            alarm = partial(jax.debug.callback, report_off, new, after.strikes)
            jax.lax.cond(new, alarm, lambda: None)
        here = jnp.where(jnp.isfinite(here), here, info.losses)
        found = _Judgement(after._replace(anchor=anchor, way=way), rewind, here)
        return cast_like(found, kept)

    found: _Judgement = when(due & (state.count > 0), look, lambda: kept)
    return found


def _in_force(
    settings: Settings, state: TrainingState, decision: _Decision, foreign: jax.Array
) -> jax.Array:
    """The weights by which this update descends: one for all where it cannot be reweighted."""
    first = decision.first_weights
    weights, plain = first * jnp.exp(decision.log_weights), plain_weight(settings, first)
    if settings.anneal is not None:
        known, keep = weights > 0, settings.anneal(state.count)
        over = jnp.log(jnp.where(known, weights / plain, 1))
        weights = jnp.where(known, plain * jnp.exp(keep * over), weights)
    return jnp.where(foreign > 0, plain, weights)


def _weighted_args(
    losses: Losses,
    batch: Batch,
    weights: jax.Array,
    seen: Incoming,
    gradient: Any,
    extra_args: dict[str, Any],
) -> dict[str, Any]:
    """What a line search inside is told, of the objective that is in force."""
    known: dict[str, Any] = {"grad": gradient}
    if seen.values is not None:
        known["value"] = vdot(weights, seen.values.astype(weights.dtype))

    def value_fn(params: Any) -> jax.Array:
        values = losses.values(params, *batch.args, **batch.kwargs)
        return vdot(weights.astype(values.dtype), values)

    known["value_fn"] = value_fn
    return extra_args | {name: what for name, what in known.items() if name in extra_args}


class _Factors(NamedTuple):
    guard: jax.Array  # []
    gains: jax.Array  # [R]
    sharpness: jax.Array  # [] under the weights in force
    rows: jax.Array  # [R]


def _factors(settings: Settings, state: TrainingState, decision: _Decision) -> _Factors:
    """What scales the step."""
    prices = decision.measured.prices
    # weights moved since the sum was measured: scale its sharpness with the total cost
    before, after = (
        vdot(decision.first_weights * jnp.exp(w), jnp.sum(prices.cost, axis=1))
        for w in (state.log_weights, decision.log_weights)
    )
    drift = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 1)
    sharpness, rows = prices.sharpness * drift, prices.row_sharpness * drift
    limited = (prices.limit < highest(prices.limit.dtype)) & (sharpness > 0)
    guard = state.watch.backoff
    if settings.guard is not None and not isinstance(settings.guard, str):
        over = settings.guard * prices.limit / jnp.where(limited, sharpness, 1)
        guard = guard * jnp.where(limited, jnp.minimum(1, over), 1)
    gains = jnp.ones_like(rows)
    if settings.row_gains:
        usable = limited & (rows > 0)
        gains = jnp.where(usable, settings.target * prices.limit / jnp.where(usable, rows, 1), 1)
        gains = jnp.clip(gains, 1 / settings.max_gain, settings.max_gain)
    return _Factors(guard, gains, sharpness, rows)


def _scaled(move: Any, factors: _Factors, params: Any, blocks: Blocks) -> Any:
    treedef: Any
    leaves, treedef = jax.tree.flatten(move)
    labels, _ = label_blocks(params, blocks)
    both = zip(leaves, labels, strict=True)
    scaled = [
        (leaf * (factors.guard * factors.gains[label]).astype(leaf.dtype)).astype(leaf.dtype)
        for leaf, label in both
    ]
    return treedef.unflatten(scaled)


def _settled(
    state: TrainingState,
    params: Any,
    judged: _Judgement,
    healthy: jax.Array,
    move: Any,
    base_state: Any,
) -> tuple[Any, Any]:
    """The update and the base optimizer's state: as they are, none, or back to the anchor."""
    nothing = jax.tree.map(jnp.zeros_like, move), state.base_state
    move, base_state = select(healthy, (move, base_state), nothing)
    if not judged.watch.anchor:
        return move, base_state
    there, base_there = at_anchor(judged.watch, (params, state.base_state))
    back = jax.tree.map(lambda a, p, u: (a - p).astype(u.dtype), there, params, move)
    base_there = _with_settings_of(base_there, base_state)
    settled: tuple[Any, Any] = select(judged.rewind, (back, base_there), (move, base_state))
    return settled


def _with_settings_of(there: Any, here: Any) -> Any:
    """The anchor's state, but a hyperparameter that was set since stays set."""

    def kept(old: Any, new: Any) -> Any:
        if not _is_injected(old):
            return old
        inner = _with_settings_of(old.inner_state, new.inner_state)
        return old._replace(hyperparams=new.hyperparams, inner_state=inner)

    return jax.tree.map(kept, there, here, is_leaf=_is_injected)


def _is_injected(node: Any) -> bool:
    return hasattr(node, "hyperparams") and hasattr(node, "inner_state")


def _next_wait(
    settings: Settings,
    state: TrainingState,
    judged: _Judgement,
    measured: Measured,
    healthy: jax.Array,
    due: jax.Array,
    blind: bool,
) -> jax.Array:
    """Updates until the next look: soon at first, and where the last one left something open."""
    watch = judged.watch
    interval = jnp.asarray(settings.every, jnp.int32)
    if settings.guard is not None and not blind:
        interval = jnp.minimum(interval, 2 ** jnp.minimum(watch.checks, 2 * LEARNING))
    open_ = (watch.suspect > 0) | (measured.misses > 0)
    wait = jnp.where(due, interval - 1, jnp.maximum(state.wait - healthy, 0))
    # after a rewind the next update looks where it led
    return jnp.where(judged.rewind | open_, 0, wait)


def _info(
    settings: Settings,
    state: TrainingState,
    seen: Incoming,
    decision: _Decision,
    judged: _Judgement,
    healthy: jax.Array,
    weights: jax.Array,
    factors: _Factors,
) -> TrainingInfo:
    prices = decision.measured.prices
    top = highest(prices.limit.dtype)
    limited = prices.limit < top
    paid = weights * jnp.sum(prices.cost, axis=1)
    everything = jnp.sum(paid)
    even = 1 / max(paid.size, 1)
    losses = judged.losses
    if seen.values is not None:
        losses = jnp.where(jnp.isfinite(seen.values), seen.values, losses)
    margin = settings.target * prices.limit - factors.rows
    return TrainingInfo(
        losses=losses,
        cost=prices.cost,
        share=jnp.where(everything > 0, paid / jnp.where(everything > 0, everything, 1), even),
        response=prices.response,
        sharpness=factors.sharpness,
        limit=prices.limit,
        sharpness_ratio=jnp.where(limited, factors.sharpness / prices.limit, 0),
        row_sharpness=factors.rows,
        margin_rows=jnp.where(limited, margin, top),
        guard=factors.guard,
        gains=factors.gains,
        fit=jnp.where(jnp.isfinite(seen.fit), seen.fit, state.info.fit),
        rewinds=state.info.rewinds + judged.rewind,
        balance_residual=decision.balance_residual,
        interaction_ratio=decision.interaction_ratio,
        accepted=healthy & ~judged.rewind,
        skipped=state.info.skipped + ~healthy,
        names=state.info.names,
    )


def _times(weights: jax.Array, stacked: jax.Array) -> jax.Array:
    return weights.astype(stacked.dtype).reshape(-1, *(1,) * (stacked.ndim - 1)) * stacked


def _check_term_grads(term_grads: Any, params: Any, num_terms: int) -> None:
    given: Any = jax.tree.structure(term_grads)
    if given != jax.tree.structure(params):
        raise ValueError("term_grads must have the tree structure of params")
    for (path, stacked), leaf in zip(
        jax.tree_util.tree_leaves_with_path(term_grads), jax.tree.leaves(params), strict=True
    ):
        if stacked.shape != (num_terms, *jnp.shape(leaf)):
            raise ValueError(
                f"term_grads{jax.tree_util.keystr(path)} has shape {stacked.shape}, expected "
                f"{(num_terms, *jnp.shape(leaf))}: one gradient for each of the {num_terms} losses"
            )


def _check(settings: Settings) -> None:
    for name, found, known in (
        ("policy", settings.policy, POLICIES),
        ("curvature", settings.curvature, PRODUCTS),
        ("value", settings.value, WORTHS),
    ):
        if found not in known:
            raise ValueError(f"{name} = {found!r} is unknown: choose from {', '.join(known)}")
    guard = settings.guard
    if isinstance(guard, str) and guard != "divergence":
        raise ValueError(
            f"guard = {guard!r} is not for losses: choose 'divergence', a multiple of the limit, "
            "or None"
        )
    if guard is not None and not isinstance(guard, str):
        check_positive("guard", guard)
    if settings.limit is not None and not callable(settings.limit):
        check_positive("limit", settings.limit)
    for name in ("every", "iterations"):
        if is_concrete(getattr(settings, name)) and getattr(settings, name) < 1:
            raise ValueError(f"{name} = {getattr(settings, name)} must be at least 1")
    if is_concrete(settings.warmup):
        check_count("warmup", settings.warmup, 0)
    for name in ("priorities", "anneal"):
        if getattr(settings, name) is not None and not settings.reweights:
            raise ValueError(f"{name} is for policy 'fair': policy 'reference' moves no weight")
    given = () if settings.priorities is None else settings.priorities
    if callable(given):
        given = given(0)
    for k, priority in given.items() if isinstance(given, Mapping) else enumerate(given):
        check_scalar(f"priorities[{k!r}]", priority)
        check_positive(f"priorities[{k!r}]", priority)
    check_positive("max_gain", settings.max_gain)
    check_bounds("floor", settings.floor, "ceiling", settings.ceiling)
    check_target(settings.target)
    for name in ("budget_fraction", "max_step_change", "ema"):
        check_fraction(name, getattr(settings, name))
