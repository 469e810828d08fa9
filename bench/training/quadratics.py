"""Two convex quadratics with exact Hessians, so that every bound can be checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training.problems import Problem
from smallgain_jax.losses.losses import terms

MATRICES = np.array([[2.0, -1.0], [-1.0, 2.0]]) * np.array([1.0, 10.0])[:, None, None]  # [2, 2, 2]
CENTRES = np.array([[1.0, 0.0], [-10.0, 0.0]])  # [2, 2]
STARTS = np.array([[-6.0, 4.0], [-3.0, -1.5], [1.5, 2.0], [2.5, 5.5]])  # [4, 2]
HESSIANS = 2 * MATRICES


def minimum() -> np.ndarray:
    """Where f_1 + f_2 is least, [2]."""
    return np.linalg.solve(MATRICES.sum(axis=0), np.einsum("kij,kj->i", MATRICES, CENTRES))


def losses_of(x: jax.Array) -> dict[str, jax.Array]:
    """f_k = (x - u_k)' A_k (x - u_k)."""
    offset = x[None, :] - jnp.asarray(CENTRES, x.dtype)
    values = jnp.einsum("ki,kij,kj->k", offset, jnp.asarray(MATRICES, x.dtype), offset)
    return {"first": values[0], "second": values[1]}


def metrics(x: jax.Array) -> dict[str, jax.Array]:
    """Excess of f_1 + f_2 over its minimum; distance to the Pareto set, the segment of the centres.

    The matrices are multiples of each other, so the minima of all weighted sums lie on the segment.
    """
    offset = x - jnp.asarray(minimum(), x.dtype)
    first, second = jnp.asarray(CENTRES, x.dtype)
    along = second - first
    place = jnp.clip((x - first) @ along / (along @ along), 0, 1)
    return {
        "excess": offset @ jnp.asarray(MATRICES.sum(axis=0), x.dtype) @ offset,
        "pareto_distance": jnp.linalg.norm(x - first - place * along),
    }


def problem() -> Problem:
    """SGD, 100 steps; the seed is the number of the start, modulo 4."""

    def init(seed: jax.Array) -> Any:
        return jnp.asarray(STARTS)[seed % len(STARTS)]

    def traces(x: jax.Array) -> jax.Array:
        # f_k is the square of L_k'(x - u_k) with A_k = L_k L_k'
        return jnp.asarray(np.trace(MATRICES, axis1=1, axis2=2), x.dtype)

    return Problem(
        name="quadratics",
        losses=terms(losses_of, names=("first", "second")),
        init=init,
        batch=lambda key: (),
        metrics=metrics,
        ranked="excess",
        traces=traces,
        optimizer=optax.sgd,
        steps=100,
        rates=(0.005,),
    )
