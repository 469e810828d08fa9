"""A physics-informed network for u_xx + u_yy + u = q on [-1, 1]^2 with u = 0 on the boundary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training.network import Params, derivatives, glorot, tanh_network
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

SIZES = (2, 50, 50, 50, 1)
POINTS = 128
GRID = 64


def exact(x: jax.Array) -> jax.Array:
    """The solution sin(pi x) sin(4 pi y) at points [..., 2]."""
    return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(4 * jnp.pi * x[..., 1])


def residual(params: Params, x: jax.Array) -> jax.Array:
    """u_xx + u_yy + u - q at points [N, 2]."""
    u = derivatives(params, x, second=(1.0, 1.0))[..., 0]
    return u[3] + u[0] - (1 - 17 * jnp.pi**2) * exact(x)


def losses_of(params: Params, inside: jax.Array, boundary: jax.Array) -> dict[str, jax.Array]:
    """Mean squares of the residual and of u on the boundary (where the solution is 0)."""
    return {
        "residual": jnp.mean(jnp.square(residual(params, inside))),
        "boundary": jnp.mean(jnp.square(tanh_network(params, boundary))),
    }


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fresh uniform points [128, 2] inside and [128, 2] on the four sides."""
    for_inside, for_place, for_side = jax.random.split(key, 3)
    inside = jax.random.uniform(for_inside, (POINTS, 2), minval=-1, maxval=1)
    place = jax.random.uniform(for_place, (POINTS,), minval=-1, maxval=1)
    side = jax.random.randint(for_side, (POINTS,), 0, 4)
    fixed = jnp.where(side % 2 == 0, -1.0, 1.0).astype(place.dtype)
    pair = jnp.stack([fixed, place], axis=1)
    return inside, jnp.where((side < 2)[:, None], pair, pair[:, ::-1])


def problem() -> Problem:
    """Tanh 2-50-50-50-1, Adam, 6000 steps; the metric is the relative L2 error, 64 x 64 grid."""
    side = np.linspace(-1, 1, GRID)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)

    def metrics(params: Params) -> dict[str, jax.Array]:
        points = jnp.asarray(grid, params[0][0].dtype)
        truth = exact(points)
        error = tanh_network(params, points)[:, 0] - truth
        return {"relative_l2": jnp.linalg.norm(error) / jnp.linalg.norm(truth)}

    def traces(params: Params, inside: jax.Array, boundary: jax.Array) -> jax.Array:
        inner = kernel_trace(lambda p, x: residual(p, x[None])[0], params, inside)
        outer = kernel_trace(lambda p, x: tanh_network(p, x)[0], params, boundary)
        return jnp.stack([inner, outer])

    def init(seed: jax.Array) -> Any:
        return glorot(jax.random.key(seed), SIZES)

    return Problem(
        name="helmholtz",
        losses=terms(losses_of, names=("residual", "boundary")),
        init=init,
        batch=batch,
        metrics=metrics,
        ranked="relative_l2",
        traces=traces,
        optimizer=optax.adam,
        steps=6000,
        rates=(3e-4, 1e-3, 3e-3),
    )
