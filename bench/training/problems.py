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
    schedule: Callable[[Any], Any] = lambda rate: rate  # what the optimizer makes of its rate


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
    rows = [of_one(params, *args) for of_one in each_value_and_grad(problem, params, *args)]
    values, grads = zip(*rows, strict=True)
    return jnp.stack(values), jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)


def each_value_and_grad(problem: Problem, params: Any, *args: Any) -> list[Callable[..., Any]]:
    """For each loss, (params, *args) -> its value and gradient."""

    def of_one(name: str) -> Callable[..., Any]:
        return jax.value_and_grad(lambda p, *given: problem.losses.fn(p, *given)[name])

    return [of_one(name) for name in problem.losses.names_at(params, *args)]


def make(name: str) -> Problem:
    """The problem of that name."""
    from bench.training import (
        advection,
        allen_cahn,
        burgers,
        digits,
        equations,
        helmholtz,
        large,
        quadratics,
    )

    makers = {
        "advection": advection.problem,
        "allen_cahn": allen_cahn.problem,
        "wave": equations.wave,
        "heat": equations.heat,
        "flow": equations.flow,
        "helmholtz": helmholtz.problem,
        "burgers": burgers.problem,
        "quadratics": quadratics.problem,
        "digits": digits.problem,
        "large": large.problem,
    }
    return makers[name]()


PHYSICS = ("helmholtz", "burgers", "advection", "allen_cahn", "wave", "heat", "flow")
"""Physics-informed networks: losses in units that nobody chose."""
NAMES = (*PHYSICS, "quadratics", "digits")
"""Those on which methods are compared; the large one is there for times."""
