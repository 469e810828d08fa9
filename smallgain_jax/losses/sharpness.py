r"""Curvature of losses by Hessian-vector products: power iteration in an optimizer's metric.

For a loss with Hessian H and a metric P, one step of power iteration on
$M = P^{-1/2} H P^{-1/2}$ takes a vector v to $M v$ and yields $\|M v\| / \|v\| \le \|M\|_2$. These
are estimates **from below**: they converge to the largest magnitude of an eigenvalue as the
iteration goes on, and certify nothing; only the Gershgorin and Perron bounds of `curvature` do.

The product M v itself comes from automatic differentiation, from the Gauss-Newton approximation, or
from the difference of two gradients.

By block, the parameters are split into rows r, and the same is done with the diagonal block
$M_{rr}$: one Hessian-vector product per row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from smallgain_jax.losses.losses import Batch, Losses, check_params, check_real
from smallgain_jax.spectral.power import (
    Product,
    label_blocks,
    power_iteration,
    random_vector,
)


def hessian_product(
    losses: Losses, mix: Any, params: Any, batch: Batch, gradient: Any = None
) -> Product:
    r"""v -> $\sum_k m_k \nabla^2 e_k\, v$, forward over reverse.

    Args:
      losses: the terms.
      mix: m, float [K], an array or a list; zeros known at trace time cost nothing.
      params: where, a pytree of floating arrays.
      batch: what else the losses take.
      gradient: unused; it is what `difference_product` starts from.

    >>> from smallgain_jax.losses.losses import Batch, terms
    >>> losses = terms(lambda x: {"a": jnp.sum(x**2), "b": jnp.prod(x)})
    >>> hessian_product(losses, [1.0, 0.0], jnp.array([1.0, 2.0]), Batch())(jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """
    del gradient
    slope = jax.grad(mixture(losses.parts, mix))

    def product(v: Any) -> Any:
        tangent = optax.tree.cast_like(v, params)
        return jax.jvp(lambda p: slope(p, *batch.args, **batch.kwargs), (params,), (tangent,))[1]

    return product


def difference_product(
    losses: Losses, mix: Any, params: Any, batch: Batch, gradient: Any = None
) -> Product:
    r"""v -> $(g(\theta + h v) - g(\theta)) / h$, $g = \sum_k m_k \nabla e_k$.

    One gradient a product where `gradient` is $g(\theta)$, and no more memory than training takes;
    Hessian-vector products take two to three times as long. The step
    $h = \sqrt{\epsilon (1 + \|\theta\|)} / \|v\|$ weighs rounding against the change of the Hessian
    on the way (Knoll and Keyes, *Jacobian-free Newton-Krylov methods*, 2004, section 2.3): three
    digits or so in float32, none where matrices are multiplied in TF32 or bfloat16.

    Args:
      losses, mix, params, batch: as in `hessian_product`.
      gradient: $g(\theta)$ shaped like `params`, by the same program on the same batch; None to
        evaluate it.

    Raises:
      TypeError: parameters narrower than float32.

    >>> from smallgain_jax.losses.losses import Batch, terms
    >>> losses = terms(lambda x: {"a": jnp.sum(x**2), "b": jnp.prod(x)})
    >>> mix = [0.0, 1.0]
    >>> product = difference_product(losses, mix, jnp.array([1.0, 2.0]), Batch())
    >>> product(jnp.array([1.0, 0.0])).round(2)
    Array([0., 1.], dtype=float32)
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise TypeError(
                f"curvature = 'difference': params{jax.tree_util.keystr(path)} is {leaf.dtype}, "
                "too coarse for the difference of two gradients; choose 'hessian'"
            )
    slope = jax.grad(mixture(losses.parts, mix))
    start = slope(params, *batch.args, **batch.kwargs) if gradient is None else gradient
    eps = max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params)), default=0.0)
    reach = jnp.sqrt(eps * (1 + optax.tree.norm(params)))

    def product(v: Any) -> Any:
        length = optax.tree.norm(v)
        h = reach / jnp.where(length > 0, length, 1)
        moved = jax.tree.map(lambda p, d: p + (h * d).astype(p.dtype), params, v)
        return jax.tree.map(
            lambda there, here: (there - here) / h, slope(moved, *batch.args, **batch.kwargs), start
        )

    return product


def gauss_newton_product(
    losses: Losses, mix: Any, params: Any, batch: Batch, gradient: Any = None
) -> Product:
    r"""v -> $\sum_k m_k J^\top (\nabla^2_z e_k) J\, v$ with J the model's Jacobian, z its outputs.

    Positive semidefinite where the losses are convex in the outputs (Schraudolph, *Fast Curvature
    Matrix-Vector Products*, 2002). Needs `terms(..., outputs=...)`.
    """
    del gradient
    if losses.outputs is None:
        raise ValueError("terms: Gauss-Newton products need terms(fn, outputs=model)")
    outputs = losses.outputs

    def product(v: Any) -> Any:
        z, pull = jax.vjp(lambda p: outputs(p, *batch.args, **batch.kwargs), params)
        tangent = optax.tree.cast_like(v, params)
        _, forward = jax.jvp(
            lambda p: outputs(p, *batch.args, **batch.kwargs), (params,), (tangent,)
        )
        slope = jax.grad(mixture(losses.parts_of_outputs, mix))
        return pull(
            jax.jvp(lambda out: slope(out, *batch.args, **batch.kwargs), (z,), (forward,))[1]
        )[0]

    return product


def mixture(parts: Callable[..., list[jax.Array]], mix: Any) -> Callable[..., jax.Array]:
    """The weighted sum, without the terms whose weight is known to be zero: they cost nothing."""
    chosen = [k for k in range(len(mix)) if isinstance(mix, jax.Array) or not _is_zero(mix[k])]

    def mixture(at: Any, *args: Any, **kwargs: Any) -> jax.Array:
        found = parts(at, *args, **kwargs)
        terms = [found[k] * jnp.asarray(mix[k], found[k].dtype) for k in chosen]
        return sum(terms[1:], terms[0])

    return mixture


def _is_zero(number: Any) -> bool:
    return not isinstance(number, jax.Array) and number == 0


PRODUCTS: dict[str, Callable[..., Product]] = {
    "hessian": hessian_product,
    "gauss_newton": gauss_newton_product,
    "difference": difference_product,
}
"""Curvature products by name."""


def sharpness(
    losses: Losses,
    params: Any,
    *args: Any,
    weights: Any = None,
    root: Any = None,
    iterations: int = 50,
    curvature: str = "hessian",
    **kwargs: Any,
) -> jax.Array:
    r"""Largest magnitude of an eigenvalue of $P^{-1/2}\,\nabla^2 \sum_k w_k e_k\,P^{-1/2}$.

    Args:
      losses: made by `terms`.
      params: where.
      args, kwargs: what else the losses take.
      weights: float [K]; None for ones.
      root: $P^{1/2}$ shaped like `params`; None for the identity.
      iterations: of power iteration from a random start, static.
      curvature: "hessian", "gauss_newton" or "difference".

    Returns:
      A scalar, an estimate from below.

    Raises:
      TypeError: complex parameters; parameters too narrow for "difference".

    >>> from smallgain_jax.losses.losses import Batch, terms
    >>> losses = terms(lambda x: {"a": jnp.sum(x**2), "b": x[0] ** 2})
    >>> sharpness(losses, jnp.ones(2)).round(3).item()
    4.0
    """
    check_params(params)
    check_real(params)
    if curvature not in PRODUCTS:
        raise ValueError(f"curvature = {curvature!r} is unknown: choose from {', '.join(PRODUCTS)}")
    names = losses.names_at(params, *args, **kwargs)
    mix = jnp.ones(len(names)) if weights is None else jnp.asarray(weights)
    product = PRODUCTS[curvature](losses, mix, params, Batch(args, kwargs))
    labels, _ = label_blocks(params, None)
    inverse = None if root is None else jax.tree.map(jnp.reciprocal, root)
    return power_iteration(product, random_vector(0, params), inverse, labels, iterations)[0][0]
