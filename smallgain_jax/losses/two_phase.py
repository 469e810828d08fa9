r"""Settle where the gradients of several losses cancel: Newton's method, and loss flow before it.

Both stand on the Krylov space of the Hessian H of the (weighted) sum of the losses, which costs one
Hessian-vector product per dimension and never the matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, check_fraction, check_positive
from smallgain_jax._show import shows
from smallgain_jax._tree import HIGHEST, all_finite, matmul, select, stat_dtype, zero_count
from smallgain_jax.losses.balance import (
    Balance,
    as_losses,
    balance_of,
    check_weights,
    empty_info,
)
from smallgain_jax.losses.losses import Losses
from smallgain_jax.search.armijo import Trial, armijo
from smallgain_jax.spectral.lanczos import lanczos, tridiagonal

LOSS, BALANCE = 0, 1
"""Phases of `two_phase`, as its info gives them."""


@shows()
class SmallestCurvature(NamedTuple):
    """An extreme of the spectrum of H, from its Krylov space."""

    value: jax.Array  # [] smallest Ritz value, an upper bound on the smallest eigenvalue
    largest: jax.Array  # [] largest Ritz value in magnitude
    direction: Any  # unit vector of `value`, shaped like the parameters, sign arbitrary


def smallest_curvature(
    losses: Losses | Callable[..., Any],
    params: Any,
    *args: Any,
    weights: ArrayLike | None = None,
    iterations: int = 30,
    seed: ArrayLike = 0,
) -> SmallestCurvature:
    r"""Smallest eigenvalue of the Hessian of $\sum_i w_i f_i$, by Lanczos from a random start.

    It is exact to rounding when `iterations` reaches the number of parameters. With fewer it is an
    upper bound: a negative value proves negative curvature, a positive one is evidence only.

    Args:
      losses: a `Losses`, or a function that `terms` would take.
      params: pytree of floating arrays with at least one entry.
      *args: whatever else the losses take.
      weights: w [K], non-negative; None for ones.
      iterations: Hessian-vector products to spend, static.
      seed: integer of the random start.

    Returns:
      A `SmallestCurvature`.

    Raises:
      ValueError: weights out of range, no parameters, `iterations` below 1.

    >>> saddle = lambda x: {"a": x[0] ** 2, "b": -3 * x[1] ** 2}
    >>> round(smallest_curvature(saddle, jnp.zeros(2)).value.item(), 4)
    -6.0
    """
    losses = as_losses(losses)
    check_weights(weights)
    _check_iterations(iterations)
    if not jax.tree.leaves(params):
        raise ValueError("params has no leaves, so there is no curvature")
    return _smallest_curvature(losses, params, args, weights, iterations, seed)


@shows()
class BalanceNewtonInfo(NamedTuple):
    """What a reader of one update of `balance_newton` wants to know; zeros before the first."""

    balance: jax.Array  # [] B at the parameters before this update
    interaction: jax.Array  # [] I there
    losses: jax.Array  # [K] their values there, unweighted
    linear_residual: jax.Array  # [] |H d + s| / |s|
    step: jax.Array  # [] factor on d; 0 where none was accepted


@shows()
class BalanceNewtonState(NamedTuple):
    """State of `balance_newton`. K losses."""

    count: jax.Array  # type: ignore[assignment]  # [] int32
    nonfinite: jax.Array  # [] int32, updates withheld for a value that was not finite
    info: BalanceNewtonInfo


def balance_newton(
    terms: Losses | Callable[..., Any],
    *,
    weights: ArrayLike | None = None,
    iterations: int = 30,
    decrease: float = 1e-4,
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    r"""Newton's method on $s = \sum_i w_i \nabla f_i = 0$, the zeros of the balance residual.

    The direction minimizes $\|H d + s\|$ over the Krylov space of H and s, which is what MINRES
    computes: no definiteness is asked of H, singular ones included. It descends on $\|s\|^2$
    wherever it leaves less, $\nabla \|s\|^2 \cdot d = -2 (\|s\|^2 - \|Hd + s\|^2)$, and Armijo
    backtracking on $\|s\|^2$ makes that good (Newton-MR). Quadratic convergence near a
    nonsingular zero whose Krylov space is exhausted; the last step that would not decrease
    $\|s\|$ is not taken, so that it comes to rest.

    The incoming updates are replaced. Every zero of s attracts, saddles and maxima too: see
    `two_phase`.

    Args:
      terms: the K losses, as for `balance_flow`; arguments come as keyword `term_args`.
      weights: w [K], non-negative; None for ones.
      iterations: Hessian-vector products per update, static; as many vectors like the parameters
        are held in memory.
      decrease: fraction of the promised decrease to be realized, in [0, 1).
      max_backtracks: halvings of the step, each one gradient pass.

    Returns:
      A `GradientTransformationExtraArgs` with state `BalanceNewtonState`. The update is zero where
      no step is accepted or a value is not finite; `nonfinite` counts the latter.

    Raises:
      ValueError: an argument out of range; on use, `params` not given.
      TypeError: `terms` is no function.

    Source: Roosta, Liu, Xu, Mahoney, *Newton-MR: inexact Newton method with minimum residual
    sub-problem solver*, EURO Journal on Computational Optimization 2022.

    >>> newton = balance_newton(lambda t: {"a": (t - 3) ** 2, "b": (t + 2) ** 2})
    >>> t = jnp.array(-3.0)
    >>> updates, state = newton.update(t, newton.init(t), t)
    >>> (t + updates).item()
    0.5
    """
    losses = as_losses(terms)
    check_weights(weights)
    _check_iterations(iterations)
    check_fraction("decrease", decrease)

    def init(params: Any) -> BalanceNewtonState:
        info = empty_info(losses, params)
        more = (jnp.zeros_like(info.balance), jnp.zeros_like(info.balance))
        return BalanceNewtonState(zero_count(), zero_count(), BalanceNewtonInfo(*info, *more))

    def update(
        updates: Any,
        state: BalanceNewtonState,
        params: Any = None,
        *,
        term_args: tuple[Any, ...] = (),
        **extra_args: Any,
    ) -> tuple[Any, BalanceNewtonState]:
        del extra_args
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=optax.safe_increment(state.count))

        def gradients(at: Any) -> tuple[jax.Array, Balance]:
            values, grads = losses.value_and_term_grads(at, *term_args)
            return values, balance_of(grads, weights)

        values, here = gradients(params)
        square = optax.tree.norm(here.total, squared=True)
        # weights over their largest, as in `here`: the step does not feel a common factor
        product, total = _hessian_product(losses, params, term_args, here.weights), here.total
        direction, left = _least_residual(product, ravel_pytree(total)[0], iterations)
        unravel = ravel_pytree(total)[1]
        direction = unravel(direction / here.inverse_scale)

        def trial(step: jax.Array) -> Trial:
            moved = cast_like(optax.tree.scale(step, direction), params)
            _, there = gradients(optax.tree.add(params, moved))
            scales = here.inverse_scale / there.inverse_scale
            ratio = optax.tree.norm(there.total, squared=True) * scales**2
            slope = -2 * (1 - left**2) * step
            return Trial(ratio / jnp.where(square > 0, square, 1), slope, moved)

        one = jnp.ones((), square.dtype)
        search = armijo(trial, one, decrease=decrease, max_backtracks=max_backtracks)
        fine = all_finite((updates, values, here.residual, direction))
        step = jnp.where(fine & search.accepted, search.step, 0)
        info = BalanceNewtonInfo(here.residual, here.interaction, values, left, step)
        return (
            select(fine & search.accepted, search.trial.aux, optax.tree.zeros_like(params)),
            BalanceNewtonState(
                optax.safe_increment(state.count),
                jnp.where(fine, state.nonfinite, optax.safe_increment(state.nonfinite)),
                select(fine, cast_like(info, state.info), state.info),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


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
    _check_iterations(iterations)
    loss_base = optax.with_extra_args_support(loss_optimizer)
    balance_base = optax.with_extra_args_support(balance_optimizer)

    def init(params: Any) -> TwoPhaseState:
        residual, ratio, values = empty_info(losses, params)
        return TwoPhaseState(
            count=zero_count(),
            quiet_steps=zero_count(),
            previous_loss=jnp.full_like(residual, jnp.inf),
            loss_flow=jax.tree.map(_copied, params),
            loss_state=loss_base.init(params),
            balance_state=balance_base.init(params),
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

    def update(
        updates: Any,
        state: TwoPhaseState,
        params: Any = None,
        *,
        term_args: tuple[Any, ...] = (),
        term_grads: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, TwoPhaseState]:
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=optax.safe_increment(state.count))
        dtype = state.previous_loss.dtype
        objective = _objective(losses, term_args, weights, dtype)
        if term_grads is None:
            values, term_grads = losses.value_and_term_grads(params, *term_args)
        else:
            values = losses.values(params, *term_args)
        here = balance_of(term_grads, weights)
        value, resolution = _sum_and_resolution(values, weights, dtype)

        # loss flow, in either phase
        settled = state.info.phase == BALANCE
        start = select(settled, state.loss_flow, params)
        start_value, gradient = jax.lax.cond(
            settled,
            lambda: jax.value_and_grad(objective)(state.loss_flow),
            lambda: (value, _weighted_sum(term_grads, weights, params)),
        )
        search = {"value": start_value, "grad": gradient, "value_fn": objective}
        loss_step, loss_state = loss_base.update(
            gradient, state.loss_state, start, **(extra_args | search)
        )
        loss_step = cast_like(loss_step, params)
        going = all_finite((start_value, gradient, loss_step))
        loss_step = select(going, loss_step, optax.tree.zeros_like(params))
        loss_state = select(going, loss_state, state.loss_state)
        loss_flow = optax.tree.add(start, loss_step)

        # is this a basin, and is this zero its bottom?
        change = jnp.abs(state.previous_loss - value)
        still = jnp.isfinite(change) & (change <= plateau * jnp.abs(value))
        quiet = ~settled & ((here.interaction < switch) | still)
        quiet_steps = jnp.where(quiet, optax.safe_increment(state.quiet_steps), 0)
        arriving = quiet & (quiet_steps >= patience)
        zero = here.residual <= (jnp.finfo(dtype).eps if tolerance is None else tolerance)
        known = settled & zero & state.info.certified
        looking = arriving | (settled & zero & ~known)
        curvature = jax.lax.cond(
            looking,
            lambda: _smallest_curvature(
                losses, params, term_args, weights, iterations, state.count
            ),
            lambda: SmallestCurvature(
                state.info.smallest_curvature,
                jnp.zeros((), dtype),
                optax.tree.zeros_like(here.total),
            ),
        )
        # products are known to their rounding only, and flat directions are no saddle
        flat = jnp.sqrt(jnp.finfo(dtype).eps) * curvature.largest
        negative = looking & ~(curvature.value >= -flat)
        spurious = negative & zero

        # balance
        def balance_step() -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
            step, balance_state = balance_base.update(
                updates, state.balance_state, params, term_args=term_args, **extra_args
            )
            step = cast_like(step, params)
            reached = objective(optax.tree.add(params, step))
            taken = all_finite((reached, step)) & (reached <= value + resolution)
            step = select(taken, step, optax.tree.zeros_like(params))
            reached = jnp.where(taken, reached, value)
            # a state that is not finite would never recover
            balance_state = select(all_finite(step), balance_state, state.balance_state)
            return step, balance_state, taken, reached, objective(loss_flow)

        def no_step() -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
            none = optax.tree.zeros_like(params)
            return none, state.balance_state, jnp.array(True), value, value

        trying = (settled | arriving) & ~negative
        step, balance_state, taken, reached, flow_value = jax.lax.cond(
            trying, balance_step, no_step
        )
        lower = flow_value < reached - resolution
        holding = trying & ~lower

        # zeros that are no minima
        def escape_step() -> tuple[jax.Array, Any]:
            return _escape(objective, params, value, here, curvature, escape)

        def stay() -> tuple[jax.Array, Any]:
            return jnp.array(False), optax.tree.zeros_like(params)

        escaped, leap = jax.lax.cond(spurious & ~settled, escape_step, stay)
        loss_flow = select(escaped, optax.tree.add(params, leap), loss_flow)
        home = select(settled, optax.tree.sub(loss_flow, params), loss_step)
        answer = select(holding, step, select(escaped, leap, home))

        fine = all_finite((updates, value, here.residual))
        info = TwoPhaseInfo(
            phase=jnp.where(holding, BALANCE, LOSS),
            residual=here.residual,
            ratio=here.interaction,
            values=values,
            smallest_curvature=curvature.value,
            spurious=spurious,
            certified=zero & (known | (looking & ~negative)),
        )
        moved = state._replace(
            quiet_steps=jnp.where(arriving, 0, quiet_steps),
            previous_loss=value,
            loss_flow=loss_flow,
            loss_state=loss_state,
            balance_state=balance_state,
            returns=_counted(state.returns, settled & ~holding),
            refused=_counted(state.refused, spurious),
            rejected=_counted(state.rejected, ~taken),
            info=cast_like(info, state.info),
        )
        state = state._replace(nonfinite=_counted(state.nonfinite, ~fine))
        moved = moved._replace(nonfinite=state.nonfinite)
        after = select(fine, moved, state)
        return (
            select(fine, answer, optax.tree.zeros_like(params)),
            after._replace(count=optax.safe_increment(state.count)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _escape(
    objective: Callable[[Any], jax.Array],
    params: Any,
    value: jax.Array,
    here: Balance,
    curvature: SmallestCurvature,
    longest: ArrayLike,
) -> tuple[jax.Array, Any]:
    """A step along negative curvature that realizes half the decrease it promises, if any does."""
    slope = optax.tree.vdot(here.total, curvature.direction)
    sign = jnp.where(slope > 0, -1, 1)
    direction = optax.tree.scale(sign * longest, curvature.direction)

    def trial(step: jax.Array) -> Trial:
        leap = cast_like(optax.tree.scale(step, direction), params)
        promised = 0.5 * curvature.value * (longest * step) ** 2
        return Trial(objective(optax.tree.add(params, leap)), promised, leap)

    search = armijo(trial, value, decrease=0.5, max_backtracks=40)
    leap = select(search.accepted, search.trial.aux, optax.tree.zeros_like(params))
    return search.accepted & (search.trial.value < value), leap


def _least_residual(
    product: Callable[[jax.Array], jax.Array], total: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """d that minimizes |H d + s| over the Krylov space of s, and |H d + s| / |s| (1 if s = 0)."""
    space = lanczos(product, total, iterations)
    projected = tridiagonal(space, rows=space.diagonal.size + 1)
    length = jnp.linalg.norm(total)
    target = jnp.zeros(projected.shape[0], total.dtype).at[0].set(-1)
    scale = jnp.max(jnp.abs(projected))
    scale = jnp.where(scale > 0, scale, 1)
    coefficients = jnp.linalg.lstsq(projected / scale, target)[0]
    left = jnp.linalg.norm(matmul(projected / scale, coefficients) - target)
    return length / scale * matmul(coefficients, space.basis), jnp.minimum(left, 1)


def _smallest_curvature(
    losses: Losses,
    params: Any,
    args: tuple[Any, ...],
    weights: ArrayLike | None,
    iterations: int,
    seed: ArrayLike,
) -> SmallestCurvature:
    dtype = stat_dtype(params)
    flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    start = jax.random.normal(jax.random.key(seed), flat.shape, dtype)
    space = lanczos(_hessian_product(losses, params, args, weights), start, iterations)
    alive = jnp.any(space.basis != 0, axis=1)
    # past a breakdown, a value from within the spectrum leaves its ends as they are
    diagonal = jnp.where(alive, space.diagonal, space.diagonal[0])
    matrix = tridiagonal(space._replace(diagonal=diagonal), rows=diagonal.size)
    usable = jnp.all(jnp.isfinite(matrix))
    values, vectors = jnp.linalg.eigh(jnp.where(usable, matrix, 0))
    direction = matmul(vectors[:, 0], space.basis)
    norm = jnp.linalg.norm(direction)
    direction = direction / jnp.where(norm > 0, norm, 1)
    smallest = jnp.where(usable, values[0], jnp.nan)
    return SmallestCurvature(smallest, jnp.max(jnp.abs(values)), unravel(direction))


def _hessian_product(
    losses: Losses, params: Any, args: tuple[Any, ...], weights: ArrayLike | None
) -> Callable[[jax.Array], jax.Array]:
    """v [n] to H v [n], by reverse over reverse: no derivative but those a gradient needs."""
    dtype = stat_dtype(params)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    gradient = jax.grad(_objective(losses, args, weights, dtype))
    at, pull = jax.vjp(gradient, params)

    def product(vector: jax.Array) -> jax.Array:
        (image,) = pull(cast_like(unravel(vector), at))
        return ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), image))[0]

    return product


def _objective(
    losses: Losses, args: tuple[Any, ...], weights: ArrayLike | None, dtype: jnp.dtype
) -> Callable[..., jax.Array]:
    """F as a function of the parameters."""

    def objective(params: Any, *_: Any, **__: Any) -> jax.Array:
        return _sum_and_resolution(losses.values(params, *args), weights, dtype)[0]

    return objective


def _sum_and_resolution(
    values: jax.Array, weights: ArrayLike | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """F from the losses, and how closely it can be known: 8 units of rounding."""
    weighted = values.astype(dtype) * (1 if weights is None else jnp.asarray(weights, dtype))
    return jnp.sum(weighted), 8 * jnp.finfo(dtype).eps * jnp.sum(jnp.abs(weighted))


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


def _check_iterations(iterations: int) -> None:
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations = {iterations} must be an integer of at least 1")
