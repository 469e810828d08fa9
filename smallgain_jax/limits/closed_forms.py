r"""Stability limits of base optimizers, and the margin left below them.

On a quadratic with largest curvature $\lambda$, an optimizer is stable up to a limit on $\lambda$:
gradient descent $2/\alpha$, heavy ball $2(1+\beta)/\alpha$, Nesterov's
$2(1+\beta)/((1+2\beta)\alpha)$ (Cohen et al., *Gradient Descent on Neural Networks Typically
Occurs at the Edge of Stability*, ICLR 2021, appendix B). The target row is a fraction of it, and
the margin of a row is what its curvature leaves of that target.
"""

import jax
import jax.numpy as jnp
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
