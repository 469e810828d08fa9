r"""Settle where the gradients of several losses cancel: loss flow, and balance once in a basin.

An update reads: look, follow loss flow, inspect whether this is a basin or a spurious zero, try a
step of the balance optimizer, escape from saddles.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import cast_like, check_call, check_fraction, check_positive
from smallgain_jax._show import shows
from smallgain_jax._tree import HIGHEST, all_finite, select, stat_dtype, zero_count
from smallgain_jax.losses.balance import Balance, as_losses, balance_of, check_weights, empty_info
from smallgain_jax.losses.losses import Losses
from smallgain_jax.losses.newton import (
    SmallestCurvature,
    check_iterations,
    lowest_curvature,
    objective_of,
    sum_and_resolution,
)
from smallgain_jax.search.armijo import Trial, armijo

LOSS, BALANCE = 0, 1
"""Phases of `two_phase`, as its info gives them."""


@shows()
class TwoPhaseInfo(NamedTuple):
    """What a reader of one update of `two_phase` wants to know; zeros before the first.

    Everything is at the parameters before the update, except `phase`.
    """

    phase: jax.Array  # [] int32, LOSS = 0 or BALANCE = 1, in which this update leaves
    residual: jax.Array  # [] B
    ratio: jax.Array  # [] I
    values: jax.Array  # [K] the losses, unweighted
    smallest_curvature: jax.Array  # [] smallest Ritz value of H when last measured
    spurious: jax.Array  # [] bool: B is 0 here and H has negative curvature, so it was refused
    certified: jax.Array  # [] bool: B is 0 here and no negative curvature was found


@shows()
class TwoPhaseState(NamedTuple):
    """State of `two_phase`. K losses."""

    count: jax.Array  # type: ignore[assignment]  # [] int32
    quiet_steps: jax.Array  # [] int32, consecutive steps of loss flow that looked settled
    previous_loss: jax.Array  # [] weighted sum of the losses one update ago; inf at first
    loss_flow: Any  # like params: where loss flow alone would be
    loss_state: Any
    balance_state: Any
    returns: jax.Array  # [] int32, times the balance phase gave way to loss flow
    refused: jax.Array  # [] int32, spurious zeros
    rejected: jax.Array  # [] int32, balance steps that would have raised the loss
    nonfinite: jax.Array  # [] int32, updates withheld for a value that was not finite
    info: TwoPhaseInfo


def two_phase(
    loss_optimizer: optax.GradientTransformation,
    balance_optimizer: optax.GradientTransformation,
    terms: Losses | Callable[..., Any],
    *,
    weights: ArrayLike | None = None,
    switch: ArrayLike = -0.3,
    patience: ArrayLike = 10,
    plateau: ArrayLike = 1e-6,
    tolerance: ArrayLike | None = None,
    escape: ArrayLike = 0.1,
    iterations: int = 30,
) -> optax.GradientTransformationExtraArgs:
    r"""Loss flow into a basin, then descent on the balance residual to its bottom.

    1. Loss flow: the loss optimizer on $F = \sum_i w_i f_i$, until for `patience` consecutive steps
       I lay below `switch` or F changed by less than `plateau` of itself. Then Lanczos looks for
       negative curvature of F. Without any, the balance phase begins; with it, loss flow goes on.
    2. Balance: steps of the balance optimizer, of which only those are taken that do not raise F.
       Loss flow is continued beside it, one gradient of F per update; where it gets lower than the
       balance phase, the parameters return to it.
    3. Zeros: B is 0 at saddles and maxima too. When B falls to `tolerance`, Lanczos looks again.
       A spurious zero reached by the balance phase is left for loss flow's iterate; one where loss
       flow itself rests is escaped along the negative curvature, with a step that lowers F.

    Hence, for losses that are the same at every update: F is never above that of the loss optimizer
    alone after as many updates, up to the rounding of F (8 units), for any balance optimizer. After
    an escape that is so with respect to loss flow from there.

    The incoming updates are replaced: the loss optimizer is fed $\nabla F$ where it stands, with F,
    its gradient and F as a function of the parameters as `value`, `grad` and `value_fn`. All other
    extra arguments go to both.

    Args:
      loss_optimizer: any optax optimizer.
      balance_optimizer: `balance_flow` or `balance_newton` of the same terms and weights.
      terms: the K losses, as for `balance_flow`; arguments come as keyword `term_args`. Gradients
        at the parameters that the caller already has may come as `term_grads`, leading axis K.
      weights: w [K], non-negative; None for ones.
      switch: threshold on I, in [-1/2, 0].
      patience: consecutive updates.
      plateau: relative change of F per update.
      tolerance: B that counts as zero; None for the dtype's unit of rounding.
      escape: longest step along negative curvature, in units of the parameters.
      iterations: Hessian-vector products per look at the curvature, static. Fewer than there are
        parameters can miss negative curvature, as `smallest_curvature` says.

    Returns:
      A `GradientTransformationExtraArgs` with state `TwoPhaseState`. Where a loss, a gradient or
      the incoming updates are not finite the update is zero and the state stays, but for
      `nonfinite`, which counts it.

    Raises:
      ValueError: an argument out of range; on use, `params` not given.
      TypeError: `terms` is no function.

    Source: seed 004 (two-phase strategy).

    >>> from smallgain_jax.losses.newton import balance_newton
    >>> pair = lambda t: {"a": (t - 3) ** 2, "b": (t + 2) ** 2}
    >>> optimizer = two_phase(optax.sgd(0.1), balance_newton(pair), pair, patience=3)
    >>> t = jnp.array(-3.0)
    >>> state = optimizer.init(t)
    >>> update = jax.jit(optimizer.update)
    >>> for _ in range(8):
    ...     updates, state = update(t, state, t)
    ...     t = optax.apply_updates(t, updates)
    >>> t.item(), state.info.phase.item(), state.info.certified.item()
    (0.5, 1, True)
    """
    losses = as_losses(terms)
    check_weights(weights)
    check_fraction("switch", switch, low=-0.5, high=0.0)
    check_fraction("plateau", plateau)
    check_positive("patience", patience)
    check_positive("escape", escape)
    if tolerance is not None:
        check_fraction("tolerance", tolerance)
    check_iterations(iterations)
    wiring = _Wiring(
        losses,
        weights,
        optax.with_extra_args_support(loss_optimizer),
        optax.with_extra_args_support(balance_optimizer),
        _Settings(switch, patience, plateau, tolerance, escape, iterations),
    )
    update = partial(_update, wiring)
    return optax.GradientTransformationExtraArgs(partial(_initial, wiring), update)


class _Settings(NamedTuple):
    switch: ArrayLike
    patience: ArrayLike
    plateau: ArrayLike
    tolerance: ArrayLike | None
    escape: ArrayLike
    iterations: int


class _Wiring(NamedTuple):
    """What an update is made of."""

    losses: Losses
    weights: ArrayLike | None
    loss_base: optax.GradientTransformationExtraArgs
    balance_base: optax.GradientTransformationExtraArgs
    settings: _Settings


class _Here(NamedTuple):
    """The losses where the parameters are."""

    params: Any
    term_args: tuple[Any, ...]
    objective: Callable[..., jax.Array]
    values: jax.Array  # [K]
    term_grads: Any  # [K, ...]
    balance: Balance
    value: jax.Array  # [] F
    resolution: jax.Array  # [] below which two F are the same


class _Flow(NamedTuple):
    """Loss flow after one more step."""

    step: Any  # zero where it is not finite
    state: Any
    at: Any


class _Basin(NamedTuple):
    """Whether this is a basin, and this zero its bottom."""

    quiet_steps: jax.Array  # [] int32
    arriving: jax.Array  # [] bool, whether the balance phase may begin
    zero: jax.Array  # [] bool, whether B is 0
    certified: jax.Array  # [] bool, and no negative curvature is there
    negative: jax.Array  # [] bool, negative curvature was found now
    curvature: SmallestCurvature


class _Tried(NamedTuple):
    """A step of the balance optimizer."""

    step: Any
    state: Any
    taken: jax.Array  # [] bool, whether it does not raise F
    holding: jax.Array  # [] bool, whether loss flow is no lower after it


def _initial(wiring: _Wiring, params: Any) -> TwoPhaseState:
    residual, ratio, values = empty_info(wiring.losses, params)
    return TwoPhaseState(
        count=zero_count(),
        quiet_steps=zero_count(),
        previous_loss=jnp.full_like(residual, jnp.inf),
        loss_flow=jax.tree.map(_copied, params),
        loss_state=wiring.loss_base.init(params),
        balance_state=wiring.balance_base.init(params),
        returns=zero_count(),
        refused=zero_count(),
        rejected=zero_count(),
        nonfinite=zero_count(),
        info=TwoPhaseInfo(
            phase=zero_count(),
            residual=residual,
            ratio=ratio,
            values=values,
            smallest_curvature=jnp.zeros_like(residual),
            spurious=jnp.zeros((), bool),
            certified=jnp.zeros((), bool),
        ),
    )


def _update(
    wiring: _Wiring,
    updates: Any,
    state: TwoPhaseState,
    params: Any = None,
    *,
    term_args: tuple[Any, ...] = (),
    term_grads: Any = None,
    **extra_args: Any,
) -> tuple[Any, TwoPhaseState]:
    check_call(TwoPhaseState, updates, state, params)
    if not jax.tree.leaves(params):
        return updates, state._replace(count=optax.safe_increment(state.count))
    here = _look(wiring, state, params, term_args, term_grads)
    settled = state.info.phase == BALANCE
    flow = _followed(wiring, state, here, extra_args)
    basin = _inspected(wiring, state, here)
    tried = _tried(wiring, state, here, flow, basin, updates, extra_args)
    spurious = basin.negative & basin.zero
    escaped, leap = jax.lax.cond(
        spurious & ~settled,
        lambda: _escape(here, basin.curvature, wiring.settings.escape),
        lambda: (jnp.array(False), optax.tree.zeros_like(params)),
    )
    loss_flow = select(escaped, optax.tree.add(params, leap), flow.at)
    home = select(settled, optax.tree.sub(loss_flow, params), flow.step)
    answer = select(tried.holding, tried.step, select(escaped, leap, home))

    fine = all_finite((updates, here.value, here.balance.residual))
    info = TwoPhaseInfo(
        phase=jnp.where(tried.holding, BALANCE, LOSS),
        residual=here.balance.residual,
        ratio=here.balance.interaction,
        values=here.values,
        smallest_curvature=basin.curvature.value,
        spurious=spurious,
        certified=basin.certified,
    )
    nonfinite = _counted(state.nonfinite, ~fine)
    moved = state._replace(
        quiet_steps=jnp.where(basin.arriving, 0, basin.quiet_steps),
        previous_loss=here.value,
        loss_flow=loss_flow,
        loss_state=flow.state,
        balance_state=tried.state,
        returns=_counted(state.returns, settled & ~tried.holding),
        refused=_counted(state.refused, spurious),
        rejected=_counted(state.rejected, ~tried.taken),
        info=cast_like(info, state.info),
    )
    after = select(fine, moved, state)
    return (
        select(fine, answer, optax.tree.zeros_like(params)),
        after._replace(count=optax.safe_increment(state.count), nonfinite=nonfinite),
    )


def _look(
    wiring: _Wiring,
    state: TwoPhaseState,
    params: Any,
    term_args: tuple[Any, ...],
    term_grads: Any,
) -> _Here:
    losses, weights, dtype = wiring.losses, wiring.weights, state.previous_loss.dtype
    if term_grads is None:
        values, term_grads = losses.value_and_term_grads(params, *term_args)
    else:
        values = losses.values(params, *term_args)
    return _Here(
        params,
        term_args,
        objective_of(losses, term_args, weights, dtype),
        values,
        term_grads,
        balance_of(term_grads, weights),
        *sum_and_resolution(values, weights, dtype),
    )


def _followed(
    wiring: _Wiring, state: TwoPhaseState, here: _Here, extra_args: dict[str, Any]
) -> _Flow:
    """Loss flow goes on in either phase: from where it is, in the balance phase beside it."""
    settled = state.info.phase == BALANCE
    start = select(settled, state.loss_flow, here.params)
    value, gradient = jax.lax.cond(
        settled,
        lambda: jax.value_and_grad(here.objective)(state.loss_flow),
        lambda: (here.value, _weighted_sum(here.term_grads, wiring.weights, here.params)),
    )
    search = {"value": value, "grad": gradient, "value_fn": here.objective}
    step, after = wiring.loss_base.update(
        gradient, state.loss_state, start, **(extra_args | search)
    )
    step = cast_like(step, here.params)
    going = all_finite((value, gradient, step))
    step = select(going, step, optax.tree.zeros_like(here.params))
    return _Flow(step, select(going, after, state.loss_state), optax.tree.add(start, step))


def _inspected(wiring: _Wiring, state: TwoPhaseState, here: _Here) -> _Basin:
    settings, dtype = wiring.settings, here.value.dtype
    settled = state.info.phase == BALANCE
    change = jnp.abs(state.previous_loss - here.value)
    still = jnp.isfinite(change) & (change <= settings.plateau * jnp.abs(here.value))
    quiet = ~settled & ((here.balance.interaction < settings.switch) | still)
    quiet_steps = jnp.where(quiet, optax.safe_increment(state.quiet_steps), 0)
    arriving = quiet & (quiet_steps >= settings.patience)
    tolerance = jnp.finfo(dtype).eps if settings.tolerance is None else settings.tolerance
    zero = here.balance.residual <= tolerance
    known = settled & zero & state.info.certified
    looking = arriving | (settled & zero & ~known)
    curvature = jax.lax.cond(
        looking,
        lambda: lowest_curvature(
            wiring.losses,
            here.params,
            here.term_args,
            wiring.weights,
            settings.iterations,
            state.count,
        ),
        lambda: SmallestCurvature(
            state.info.smallest_curvature,
            jnp.zeros((), dtype),
            optax.tree.zeros_like(here.balance.total),
        ),
    )
    # products are known to their rounding only, and flat directions are no saddle
    flat = jnp.sqrt(jnp.finfo(dtype).eps) * curvature.largest
    negative = looking & ~(curvature.value >= -flat)
    certified = zero & (known | (looking & ~negative))
    return _Basin(quiet_steps, arriving, zero, certified, negative, curvature)


def _tried(
    wiring: _Wiring,
    state: TwoPhaseState,
    here: _Here,
    flow: _Flow,
    basin: _Basin,
    updates: Any,
    extra_args: dict[str, Any],
) -> _Tried:
    """The balance optimizer's step, where it may be made and does not raise F."""
    params = here.params
    none = optax.tree.zeros_like(params)

    def attempt() -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
        step, after = wiring.balance_base.update(
            updates, state.balance_state, params, term_args=here.term_args, **extra_args
        )
        step = cast_like(step, params)
        reached = here.objective(optax.tree.add(params, step))
        taken = all_finite((reached, step)) & (reached <= here.value + here.resolution)
        step = select(taken, step, none)
        reached = jnp.where(taken, reached, here.value)
        # a state that is not finite would never recover
        after = select(all_finite(step), after, state.balance_state)
        return step, after, taken, reached, here.objective(flow.at)

    def rest() -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
        return none, state.balance_state, jnp.array(True), here.value, here.value

    trying = ((state.info.phase == BALANCE) | basin.arriving) & ~basin.negative
    step, after, taken, reached, elsewhere = jax.lax.cond(trying, attempt, rest)
    lower = elsewhere < reached - here.resolution
    return _Tried(step, after, taken, trying & ~lower)


def _escape(here: _Here, curvature: SmallestCurvature, longest: ArrayLike) -> tuple[jax.Array, Any]:
    """A step along negative curvature that realizes half the decrease it promises, if any does."""
    slope = optax.tree.vdot(here.balance.total, curvature.direction)
    sign = jnp.where(slope > 0, -1, 1)
    direction = optax.tree.scale(sign * longest, curvature.direction)

    def trial(step: jax.Array) -> Trial:
        leap = cast_like(optax.tree.scale(step, direction), here.params)
        promised = 0.5 * curvature.value * (longest * step) ** 2
        return Trial(here.objective(optax.tree.add(here.params, leap)), promised, leap)

    search = armijo(trial, here.value, decrease=0.5, max_backtracks=40)
    leap = select(search.accepted, search.trial.aux, optax.tree.zeros_like(here.params))
    return search.accepted & (search.trial.value < here.value), leap


def _weighted_sum(term_grads: Any, weights: ArrayLike | None, params: Any) -> Any:
    def combined(leaf: jax.Array) -> jax.Array:
        vector = jnp.ones(leaf.shape[0]) if weights is None else jnp.asarray(weights)
        dtype = stat_dtype(leaf)
        return jnp.tensordot(vector.astype(dtype), leaf.astype(dtype), 1, precision=HIGHEST)

    return cast_like(jax.tree.map(combined, term_grads), params)


def _counted(count: jax.Array, event: jax.Array) -> jax.Array:
    return jnp.where(event, optax.safe_increment(count), count)


def _copied(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jnp.array(leaf, copy=True)
