r"""Balance of the gradients of several losses, and descent on what they lack of it.

With $g_i$ the gradients of K losses (each times its weight), $s = \sum_i g_i$ and
$G = \sum_i \|g_i\|^2$, the balance residual is $B = \|s\|^2 / G$, the interaction ratio
$I = \sum_{i<j} g_i \cdot g_j / G$, and $B = 1 + 2I$. Both are pure numbers: $0 \le B \le K$, and
$B = 0$, $I = -1/2$ exactly where the gradients cancel. That is so at every stationary point of the
sum, saddles and maxima included: see `two_phase`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import cast_like, check_call, check_finite
from smallgain_jax._compiling import at_once
from smallgain_jax._show import shows
from smallgain_jax._tree import all_finite, matmul, select, stat_dtype, zero_count
from smallgain_jax.losses.losses import Losses, terms


@shows()
class Balance(NamedTuple):
    """The gradients of K losses and their sum, divided by a power of two: it keeps squares in
    range and changes no digit."""

    residual: jax.Array  # [] B
    total: Any  # s / scale, shaped like the parameters
    term_grads: Any  # w_i g_i / scale, leading axis K
    squares: jax.Array  # [] G / scale^2
    inverse_scale: jax.Array  # [] 1 / scale
    weights: jax.Array  # [K] w over its largest entry

    @property
    def interaction(self) -> jax.Array:
        """I = (B - 1) / 2."""
        return (self.residual - 1) / 2


def balance_residual(term_grads: Any, *, weights: ArrayLike | None = None) -> jax.Array:
    r"""Balance residual $B = \|\sum_i w_i g_i\|^2 / \sum_i \|w_i g_i\|^2$, in [0, K].

    Sums over terms are compensated (Neumaier 1974), so that B is accurate where the gradients
    cancel to rounding; gradients as small or as large as their dtype holds do no harm. Common
    factors and orthogonal maps of all gradients leave B as it is.

    Args:
      term_grads: pytree of floating arrays with a leading axis K on each leaf.
      weights: w [K], non-negative; None for ones.

    Returns:
      B, a scalar of at least float32; 0 where all gradients vanish: that is an equilibrium.

    Raises:
      ValueError: leaves without a common leading axis; weights that are no finite, non-negative
        vector [K].
      TypeError: a leaf that is not real and floating.

    Source: seed 004 (balance residual).

    >>> balance_residual(jnp.array([[1.0, 0.0], [-1.0, 0.0]])).item()
    0.0
    >>> balance_residual(jnp.array([[1.0, 0.0], [0.0, 1.0]])).item()
    1.0
    """
    return balance_of(term_grads, weights).residual


def interaction_ratio(term_grads: Any, *, weights: ArrayLike | None = None) -> jax.Array:
    r"""Interaction ratio $I = \sum_{i<j} w_i w_j\, g_i \cdot g_j / \sum_i \|w_i g_i\|^2$.

    It is computed as $(B - 1) / 2$, which is the same number without the K (K - 1) / 2 products:
    -1/2 at equilibrium, 0 for orthogonal gradients, (K - 1) / 2 for equal ones.

    Args:
      term_grads, weights: as in `balance_residual`.

    Returns:
      I, a scalar of at least float32; -1/2 where all gradients vanish.

    Raises:
      ValueError, TypeError: as `balance_residual`.

    Source: seed 004.

    >>> interaction_ratio(jnp.array([[1.0, 0.0], [-1.0, 0.0]])).item()
    -0.5
    """
    return balance_of(term_grads, weights).interaction


def cosine_matrix(term_grads: Any) -> jax.Array:
    r"""Cosines $g_i \cdot g_j / (\|g_i\| \|g_j\|)$ of all pairs of terms.

    Positive weights do not change them.

    Args:
      term_grads: as in `balance_residual`, with at least one leaf.

    Returns:
      [K, K], symmetric, in [-1, 1], 1 on the diagonal; a vanishing gradient has cosine 0 with
      everything, itself included.

    Raises:
      ValueError, TypeError: as `balance_residual`.

    >>> cosine_matrix(jnp.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    num_terms, dtype = _num_terms(term_grads), stat_dtype(term_grads)
    flat = [leaf.reshape(num_terms, -1).astype(dtype) for leaf in jax.tree.leaves(term_grads)]
    rows = jnp.concatenate(flat, axis=1)
    rows = rows * _inverse_power_of_two(jnp.max(jnp.abs(rows), axis=1, initial=0.0))[:, None]
    norms = jnp.linalg.norm(rows, axis=1)
    rows = rows / jnp.where(norms > 0, norms, 1)[:, None]
    cosines = jnp.clip(matmul(rows, rows.T), -1, 1)
    exact = jnp.where(norms > 0, 1.0, 0.0).astype(dtype)
    return jnp.where(jnp.eye(num_terms, dtype=bool), exact[:, None], cosines)


def balance_gradient(
    losses: Losses | Callable[..., Any],
    params: Any,
    *args: Any,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, Any]:
    r"""Balance residual and its exact gradient $\nabla B = \frac{2}{G} \sum_i H_i (s - B g_i)$.

    The derivative of $\|s\|^2 / G$ with respect to $g_i$ is $2 (s - B g_i) / G$; pulled back
    through the batched backward pass that made the $g_i$, it becomes the sum of Hessian-vector
    products, for all terms at once and without forming a Hessian. That reverse pass runs twice the
    K backward passes, so the whole costs at most three gradient passes (one
    `value_and_term_grads`); a reverse pass over K forward ones needs (7K + 4) / (2K + 1).

    Args:
      losses: a `Losses`, or a function that `terms` would take.
      params: pytree of floating arrays.
      *args: whatever else the losses take.
      weights: w [K], non-negative; None for ones. The $g_i$ above are then $w_i \nabla f_i$.

    Returns:
      `(B, gradient)`: B a scalar, the gradient shaped like `params` with its dtypes, per unit of
      the parameters. Both are 0 where all gradients vanish.

    Raises:
      ValueError, TypeError: as `balance_residual` and `Losses.value_and_term_grads`.

    Source: seed 004; Pearlmutter, *Fast exact multiplication by the Hessian*, Neural Computation
    1994.

    >>> pair = terms(lambda t: {"a": (t - 3) ** 2, "b": (t + 2) ** 2})
    >>> residual, gradient = balance_gradient(pair, jnp.array(0.5))
    >>> residual.item(), gradient.item()
    (0.0, 0.0)
    """
    _, balance, gradient = value_balance_gradient(as_losses(losses), params, args, weights)
    return balance.residual, gradient


@shows()
class BalanceInfo(NamedTuple):
    """What a reader of one update of `balance_flow` wants to know; zeros before the first."""

    balance: jax.Array  # [] B at the parameters before this update
    interaction: jax.Array  # [] I there
    losses: jax.Array  # [K] their values there, unweighted


@shows()
class BalanceFlowState(NamedTuple):
    """State of `balance_flow`. K losses."""

    count: jax.Array  # type: ignore[assignment]  # [] int32
    nonfinite: jax.Array  # [] int32, updates withheld for a value that was not finite
    carry: Any  # like params: what rounding the parameters has lost of the steps; or None
    base_state: Any
    info: BalanceInfo


def balance_flow(
    terms: Losses | Callable[..., Any],
    base_optimizer: optax.GradientTransformation | optax.ScalarOrSchedule,
    *,
    weights: ArrayLike | None = None,
    compensated: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Descend on the balance residual: the base optimizer is fed $\nabla B$.

    The incoming updates are replaced. B is 0 at every stationary point of the sum of the losses,
    so on its own this may settle at a saddle or a maximum: `two_phase` does not. Near an
    equilibrium the Hessian of B is $2 H^2 / G$ with H that of the sum, so its condition number is
    the square of the loss's: `balance_newton` is for that.

    The base optimizer receives B, its gradient and B as a function of the parameters as `value`,
    `grad` and `value_fn`, since that is what it descends on; line searches and L-BFGS work. All
    other extra arguments are forwarded.

    Args:
      terms: the K losses, a `Losses` or a function that `terms` would take. Arguments besides the
        parameters come to `update` as keyword `term_args`, a tuple.
      base_optimizer: any optax optimizer; a learning rate or a schedule stands for gradient
        descent. B has no unit, so the rate is in squared units of the parameters.
      weights: w [K], non-negative; None for ones.
      compensated: carry what `optax.apply_updates` rounds off into the next step (Kahan 1965), at
        the price of one copy of the parameters. Otherwise descent at a fixed rate stalls where its
        steps fall below half a unit of rounding of the parameters. Static.

    Returns:
      A `GradientTransformationExtraArgs` with state `BalanceFlowState`. Where a loss, a gradient,
      the incoming updates or the answer is not finite the update is zero, the base optimizer's
      state stays, and `nonfinite` counts it.

    Raises:
      ValueError: weights out of range; on use, `params` not given.
      TypeError: `terms` is no function.

    Source: seed 004 (B-flow).

    >>> flow = balance_flow(lambda t: {"a": (t - 3) ** 2, "b": (t + 2) ** 2}, 0.5)
    >>> t = jnp.array(-3.0)
    >>> state = flow.init(t)
    >>> update = jax.jit(flow.update)
    >>> for _ in range(60):
    ...     updates, state = update(t, state, t)
    ...     t = optax.apply_updates(t, updates)
    >>> round(t.item(), 5), round(state.info.interaction.item(), 5)
    (0.5, -0.5)
    """
    losses = as_losses(terms)
    check_weights(weights)
    if not isinstance(base_optimizer, optax.GradientTransformation):
        base_optimizer = optax.sgd(base_optimizer)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> BalanceFlowState:
        carry = optax.tree.zeros_like(params) if compensated else None
        info = empty_info(losses, params)
        return BalanceFlowState(zero_count(), zero_count(), carry, base.init(params), info)

    def update(
        updates: Any,
        state: BalanceFlowState,
        params: Any = None,
        *,
        term_args: tuple[Any, ...] = (),
        **extra_args: Any,
    ) -> tuple[Any, BalanceFlowState]:
        check_call(BalanceFlowState, updates, state, params)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=optax.safe_increment(state.count))
        values, balance, gradient = value_balance_gradient(losses, params, term_args, weights)

        def value_fn(at: Any, *_: Any, **__: Any) -> jax.Array:
            grads = losses.value_and_term_grads(at, *term_args)[1]
            return balance_of(grads, weights).residual

        search = {"value": balance.residual, "grad": gradient, "value_fn": value_fn}
        answer, base_state = base.update(
            gradient, state.base_state, params, **(extra_args | search)
        )
        answer, carry = _carried(cast_like(answer, params), state.carry, params)
        fine = all_finite((updates, values, balance.residual, gradient, answer))
        info = BalanceInfo(balance.residual, balance.interaction, values)
        return (
            select(fine, answer, optax.tree.zeros_like(params)),
            BalanceFlowState(
                optax.safe_increment(state.count),
                jnp.where(fine, state.nonfinite, optax.safe_increment(state.nonfinite)),
                select(fine, carry, state.carry),
                select(fine, base_state, state.base_state),
                select(fine, cast_like(info, state.info), state.info),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _carried(step: Any, carry: Any, params: Any) -> tuple[Any, Any]:
    """`step` with what rounding has cost so far, and what it will cost this time.

    The carry stays below the rounding of the parameters, so it does no harm where somebody scales
    or drops the step before it is applied.
    """
    if carry is None:
        return step, None
    step = jax.tree.map(jnp.add, step, carry)
    return step, jax.tree.map(lambda u, p: u - ((p + u) - p), step, params)


def balance_of(term_grads: Any, weights: ArrayLike | None = None) -> Balance:
    """Everything that B is made of; `balance_residual` documents the arguments."""
    check_weights(weights)
    return _balance_of(term_grads, weights)


@at_once()
def _balance_of(term_grads: Any, weights: ArrayLike | None) -> Balance:
    num_terms, dtype = _num_terms(term_grads), stat_dtype(term_grads)
    shares = _shares(weights, num_terms, dtype)
    weighted = jax.tree.map(lambda g: g.astype(dtype) * _along(shares, g), term_grads)
    leaves = jax.tree.leaves(weighted)
    largest = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves]
    inverse_scale = _inverse_power_of_two(jnp.max(jnp.stack([*largest, jnp.zeros((), dtype)])))
    weighted = jax.tree.map(lambda g: g * inverse_scale, weighted)
    total = jax.tree.map(_compensated_sum, weighted)
    squares = optax.tree.norm(weighted, squared=True) if leaves else jnp.zeros((), dtype)
    square = optax.tree.norm(total, squared=True) if leaves else jnp.zeros((), dtype)
    ratio = square / jnp.where(squares == 0, 1, squares)
    # Cauchy and Schwarz bound B by K, rounding does not
    residual = jnp.minimum(ratio, num_terms).astype(dtype)
    return Balance(residual, total, weighted, squares, inverse_scale, shares)


def value_balance_gradient(
    losses: Losses, params: Any, args: tuple[Any, ...], weights: ArrayLike | None
) -> tuple[jax.Array, Balance, Any]:
    """Values [K], `Balance`, and the gradient of B: one batched backward pass, and one back."""

    def term_grads(at: Any) -> tuple[Any, jax.Array]:
        values, grads = losses.batched_value_and_term_grads(at, *args)
        return grads, values

    grads, pull, values = jax.vjp(term_grads, params, has_aux=True)
    balance = balance_of(grads, weights)
    factor = 2 / jnp.where(balance.squares == 0, 1, balance.squares)

    def lack(total: jax.Array, weighted: jax.Array) -> jax.Array:
        return (
            factor
            * (total[None] - balance.residual * weighted)
            * _along(balance.weights, total[None])
        )

    (pulled,) = pull(cast_like(jax.tree.map(lack, balance.total, balance.term_grads), grads))
    dtype = balance.residual.dtype
    gradient = jax.tree.map(lambda leaf: leaf.astype(dtype) * balance.inverse_scale, pulled)
    return values, balance, cast_like(gradient, params)


def as_losses(fn: Losses | Callable[..., Any]) -> Losses:
    """`fn` itself, or wrapped by `terms`."""
    return fn if isinstance(fn, Losses) else terms(fn)


def check_weights(weights: ArrayLike | None) -> None:
    """Raise unless concrete weights are a finite, non-negative vector."""
    if weights is None:
        return
    if np.ndim(weights) != 1:
        raise ValueError(f"weights must be a vector [K], got shape {np.shape(weights)}")
    check_finite("weights", weights, low=0.0)


def empty_info(losses: Losses, params: Any) -> BalanceInfo:
    """The info before the first update: its shapes and dtypes are those of every later one."""
    leaves = jax.tree.leaves(params)
    dtype = stat_dtype(params)
    num_terms = len(losses.names_at(params) if leaves else losses.names or ())
    return BalanceInfo(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros(num_terms, dtype))


def _num_terms(term_grads: Any) -> int:
    """K, from leaves that must agree on it."""
    count: int | None = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(term_grads):
        where = f"term_grads{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{where} must be real and floating, got {jnp.result_type(leaf)}")
        if np.ndim(leaf) == 0 or count not in (None, leaf.shape[0]):
            raise ValueError(
                f"{where} has shape {np.shape(leaf)}: every leaf needs the same leading axis K, "
                "one gradient per term"
            )
        count = leaf.shape[0]
    return count or 0


def _shares(weights: ArrayLike | None, num_terms: int, dtype: jnp.dtype) -> jax.Array:
    """Weights [K] over their largest: B and its gradient do not feel a common factor."""
    if weights is None:
        return jnp.ones(num_terms, dtype)
    shares = jnp.asarray(weights, dtype)
    if num_terms and shares.shape != (num_terms,):
        raise ValueError(f"weights have shape {shares.shape}, but there are {num_terms} terms")
    largest = jnp.max(shares, initial=0.0)
    return shares / jnp.where(largest > 0, largest, 1)


def _along(vector: jax.Array, leaf: jax.Array) -> jax.Array:
    """`vector` [K] as [K, 1, ...] of the rank of `leaf`."""
    return vector.reshape((-1,) + (1,) * (leaf.ndim - 1))


def _inverse_power_of_two(largest: jax.Array) -> jax.Array:
    """2^-e with `largest` in [2^(e-1), 2^e), within the dtype's range; 1 where it is 0."""
    largest = jax.lax.stop_gradient(largest)
    limits = jnp.finfo(largest.dtype)
    usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 0.5))
    exponent = jnp.clip(exponent, limits.minexp + 1, limits.maxexp - 3)
    return jnp.ldexp(jnp.ones_like(largest), -exponent)


def _compensated_sum(rows: jax.Array) -> jax.Array:
    """Sum over the leading axis, with the rounding of each addition carried along."""

    def add(carry: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[Any, None]:
        total, lost = carry
        longer = total + row
        taken = longer - total
        return (longer, lost + ((total - (longer - taken)) + (row - taken))), None

    zero = jnp.zeros_like(rows[0])  # sharded as the rows are
    (total, lost), _ = jax.lax.scan(add, (zero, zero), rows)
    return total + lost
