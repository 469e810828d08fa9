r"""Newton's method on the sum of the losses' gradients, and the smallest curvature of that sum.

Both stand on the Krylov space of the Hessian H of the (weighted) sum of the losses, which costs one
Hessian-vector product per dimension and never the matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from smallgain_jax._checks import cast_like, check_call, check_fraction
from smallgain_jax._show import shows
from smallgain_jax._tree import all_finite, matmul, select, stat_dtype, zero_count
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
    check_iterations(iterations)
    if not jax.tree.leaves(params):
        raise ValueError("params has no leaves, so there is no curvature")
    return lowest_curvature(losses, params, args, weights, iterations, seed)


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
    check_iterations(iterations)
    check_fraction("decrease", decrease)

    def update(
        updates: Any,
        state: BalanceNewtonState,
        params: Any = None,
        *,
        term_args: tuple[Any, ...] = (),
        **extra_args: Any,
    ) -> tuple[Any, BalanceNewtonState]:
        del extra_args
        check_call(BalanceNewtonState, updates, state, params)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=optax.safe_increment(state.count))

        def gradients(at: Any) -> tuple[jax.Array, Balance]:
            values, grads = losses.value_and_term_grads(at, *term_args)
            return values, balance_of(grads, weights)

        values, here = gradients(params)
        # weights over their largest, as in `here`: the step does not feel a common factor
        product, total = _hessian_product(losses, params, term_args, here.weights), here.total
        direction, left = _least_residual(product, ravel_pytree(total)[0], iterations)
        unravel = ravel_pytree(total)[1]
        direction = unravel(direction / here.inverse_scale)

        def trial(step: jax.Array) -> Trial:
            moved = cast_like(optax.tree.scale(step, direction), params)
            _, there = gradients(optax.tree.add(params, moved))
            return Trial(_square_over(there, here), -2 * (1 - left**2) * step, moved)

        one = jnp.ones((), left.dtype)
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

    return optax.GradientTransformationExtraArgs(partial(_initial, losses), update)


def _initial(losses: Losses, params: Any) -> BalanceNewtonState:
    info = empty_info(losses, params)
    more = (jnp.zeros_like(info.balance), jnp.zeros_like(info.balance))
    return BalanceNewtonState(zero_count(), zero_count(), BalanceNewtonInfo(*info, *more))


def _square_over(there: Balance, here: Balance) -> jax.Array:
    """|s|^2 at one place over that at another."""
    before = optax.tree.norm(here.total, squared=True)
    scales = here.inverse_scale / there.inverse_scale
    after = optax.tree.norm(there.total, squared=True) * scales**2
    return after / jnp.where(before > 0, before, 1)


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


def lowest_curvature(
    losses: Losses,
    params: Any,
    args: tuple[Any, ...],
    weights: ArrayLike | None,
    iterations: int,
    seed: ArrayLike,
) -> SmallestCurvature:
    """`smallest_curvature` of arguments that were checked."""
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
    gradient = jax.grad(objective_of(losses, args, weights, dtype))
    at, pull = jax.vjp(gradient, params)

    def product(vector: jax.Array) -> jax.Array:
        (image,) = pull(cast_like(unravel(vector), at))
        return ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), image))[0]

    return product


def objective_of(
    losses: Losses, args: tuple[Any, ...], weights: ArrayLike | None, dtype: jnp.dtype
) -> Callable[..., jax.Array]:
    """F as a function of the parameters."""

    def objective(params: Any, *_: Any, **__: Any) -> jax.Array:
        return sum_and_resolution(losses.values(params, *args), weights, dtype)[0]

    return objective


def sum_and_resolution(
    values: jax.Array, weights: ArrayLike | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """F from the losses, and how closely it can be known: 8 units of rounding."""
    weighted = values.astype(dtype) * (1 if weights is None else jnp.asarray(weights, dtype))
    return jnp.sum(weighted), 8 * jnp.finfo(dtype).eps * jnp.sum(jnp.abs(weighted))


def check_iterations(iterations: int) -> None:
    """Raise unless there is one at least."""
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations = {iterations} must be an integer of at least 1")
