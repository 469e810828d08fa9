"""What a training problem is, and the ones we have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from smallgain_jax.losses.losses import Losses


class Problem(NamedTuple):
    """A training problem, in float32 unless x64 is on."""

    name: str
    losses: Losses
    init: Callable[[jax.Array], Any]  # params from the seed, an int32 scalar
    batch: Callable[[jax.Array], tuple[Any, ...]]  # args of the losses from a key
    metrics: Callable[[Any], dict[str, jax.Array]]  # of params
    ranked: str  # the metric that ranks methods, low is good
    traces: Callable[..., jax.Array] | None  # (params, *args) -> [K], see `kernel_trace`
    optimizer: Callable[[Any], optax.GradientTransformation]  # the base optimizer at a rate
    steps: int
    rates: tuple[float, ...]


def kernel_trace(
    residual: Callable[[Any, Any], jax.Array], params: Any, points: Any, most: int = 128
) -> jax.Array:
    """Mean over points of |d residual(params, point) / d params|^2, summed over outputs.

    It is the trace of the term's neural tangent kernel over its number of points; where there are
    more than `most` points, the first `most` of them are taken.
    """
    jacobian = jax.vmap(jax.jacrev(residual), in_axes=(None, 0))
    some = jax.tree.map(lambda p: p[:most], points)
    count = jax.tree.leaves(some)[0].shape[0]
    return sum(jnp.sum(jnp.square(j)) for j in jax.tree.leaves(jacobian(params, some))) / count


def value_and_term_grads(problem: Problem, params: Any, *args: Any) -> tuple[jax.Array, Any]:
    """Losses [K] and their gradients, one backward pass through each term alone.

    The numbers are those of `Losses.value_and_term_grads`, whose batched pass goes through all
    terms K times; terms that share no computation are cheaper apart.
    """
    names = problem.losses.names_at(params, *args)

    def term(name: str) -> Callable[[Any], jax.Array]:
        return lambda p: problem.losses.fn(p, *args)[name]

    values, grads = zip(*(jax.value_and_grad(term(name))(params) for name in names), strict=True)
    return jnp.stack(values), jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)


def make(name: str) -> Problem:
    """The problem of that name."""
    from bench.training import advection, burgers, digits, helmholtz, large, quadratics

    makers = {
        "advection": advection.problem,
        "helmholtz": helmholtz.problem,
        "burgers": burgers.problem,
        "quadratics": quadratics.problem,
        "digits": digits.problem,
        "large": large.problem,
    }
    return makers[name]()


NAMES = ("helmholtz", "burgers", "quadratics", "digits", "advection")
"""Those on which methods are compared; the large one is there for times."""
