r"""Stability limits of base optimizers, and the margin left below them.

On a quadratic with largest curvature $\lambda$, an optimizer is stable up to a limit on $\lambda$:
gradient descent $2/\alpha$, heavy ball $2(1+\beta)/\alpha$, Nesterov's
$2(1+\beta)/((1+2\beta)\alpha)$ (Cohen et al., *Gradient Descent on Neural Networks Typically
Occurs at the Edge of Stability*, ICLR 2021, appendix B). The target row is a fraction of it, and
the margin of a row is what its curvature leaves of that target.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import check_fraction, check_positive


def gradient_descent_limit(learning_rate: ArrayLike) -> jax.Array:
    r"""Curvature limit $2/\alpha$ of gradient descent.

    >>> gradient_descent_limit(0.5).item()
    4.0
    """
    check_positive("learning_rate", learning_rate)
    return 2 / jnp.asarray(learning_rate, float)


def heavy_ball_limit(learning_rate: ArrayLike, momentum: ArrayLike) -> jax.Array:
    r"""Curvature limit $2(1+\beta)/\alpha$ of heavy ball, $v \leftarrow \beta v + g$.

    >>> heavy_ball_limit(0.5, 0.5).item()
    6.0
    """
    check_fraction("momentum", momentum)
    return gradient_descent_limit(learning_rate) * (1 + jnp.asarray(momentum, float))


def nesterov_limit(learning_rate: ArrayLike, momentum: ArrayLike) -> jax.Array:
    r"""Curvature limit $2(1+\beta)/((1+2\beta)\alpha)$ of Nesterov's momentum, as in `optax.sgd`.

    >>> nesterov_limit(0.5, 0.5).item()
    3.0
    """
    return heavy_ball_limit(learning_rate, momentum) / (1 + 2 * jnp.asarray(momentum, float))


def measured_limit(optimizer: optax.GradientTransformation, steps: int = 2000) -> float | None:
    r"""Curvature limit of any linear, time-invariant optimizer, by experiment.

    Instability on a quadratic sets in as a period-two oscillation. Fed with the gradient
    $g_t = (-1)^t$, such an optimizer answers with $u_t \to -H (-1)^t$, and its limit is $2/H$: that
    reproduces the three closed forms above, and holds for every chain of linear transformations.

    Args:
      optimizer: the base optimizer, run on one scalar parameter for `steps` updates.
      steps: long enough for its memory to fade (momentum beta fades as beta^steps).

    Returns:
      The limit, in units of curvature; or None when there is no such limit to measure: the update
      is not proportional to the gradient (Adam, Lion), changes with time (schedules), or needs an
      objective (line searches).

    >>> round(measured_limit(optax.sgd(0.1, momentum=0.9)), 3)
    38.0
    >>> measured_limit(optax.adam(0.1)) is None
    True
    """

    def run(scale: float) -> np.ndarray:
        signs = jnp.where(jnp.arange(steps) % 2 == 0, 1.0, -1.0)

        def step(state: Any, sign: jax.Array) -> tuple[Any, jax.Array]:
            update, state = optimizer.update(scale * sign, state, jnp.zeros_like(sign))
            return state, -update * sign / scale

        return np.asarray(jax.lax.scan(step, optimizer.init(jnp.zeros_like(signs[0])), signs)[1])

    try:
        # concrete even while the caller is being traced: the answer is a number about `optimizer`
        with jax.ensure_compile_time_eval():
            response, doubled = run(1.0), run(2.0)
    except (TypeError, ValueError):
        return None
    settled, earlier = response[-2:].mean(), response[steps // 2 : steps // 2 + 2].mean()
    tolerance = 1e-3 * abs(settled)
    linear = np.allclose(response, doubled, rtol=1e-3, atol=tolerance)
    if not linear or not np.isfinite(settled) or settled <= 0 or abs(settled - earlier) > tolerance:
        return None
    return float(2 / settled)


def row_budgets(target: ArrayLike, row_sums: jax.Array, fraction: ArrayLike) -> jax.Array:
    r"""Budgets $b_r = \rho \max(0, T_r - R_r)$ that raising weights from here may spend.

    Args:
      target: T, scalar or shaped like `row_sums`.
      row_sums: R at the lower weights, any shape.
      fraction: rho in [0, 1], the share of the margin that may be spent.

    >>> row_budgets(10.0, jnp.array([4.0, 12.0]), 0.5).tolist()
    [3.0, 0.0]
    """
    return jnp.asarray(fraction * jnp.maximum(target - row_sums, 0))
