"""A physics-informed network for Burgers' equation, and its solution by Cole-Hopf quadrature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training.network import Params, derivatives, glorot, tanh_network
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

VISCOSITY = 0.01 / np.pi
SIZES = (2, 50, 50, 50, 50, 50, 1)
INSIDE, INITIAL, BOUNDARY = 2000, 50, 50
TIMES, PLACES = 100, 256


def solution(t: np.ndarray, x: np.ndarray, nodes: int = 120) -> np.ndarray:
    r"""The solution of u_t + u u_x = nu u_xx, u(0, x) = -sin(pi x), at times and places.

    $u = -\int \sin(\pi(x - \eta)) f(x - \eta) e^{-\eta^2 / 4 \nu t} d\eta /
    \int f(x - \eta) e^{-\eta^2 / 4 \nu t} d\eta$, $f(y) = \exp(-\cos(\pi y) / 2 \pi \nu)$ (Cole
    1951; Basdevant et al., Computers and Fluids 14, 1986), by Gauss-Hermite quadrature with
    $\eta = 2 z \sqrt{\nu t}$, in double precision.
    """
    node, weight = np.polynomial.hermite.hermgauss(nodes)
    t, x = np.broadcast_arrays(np.asarray(t, float)[..., None], np.asarray(x, float)[..., None])
    y = np.pi * (x - 2 * np.sqrt(VISCOSITY * t) * node)
    exponent = -np.cos(y) / (2 * np.pi * VISCOSITY)
    kernel = weight * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -np.sum(np.sin(y) * kernel, axis=-1) / np.sum(kernel, axis=-1)


def residual(params: Params, x: jax.Array) -> jax.Array:
    """u_t + u u_x - nu u_xx at points (t, x) [N, 2]."""
    u, u_t, u_x, u_xx = derivatives(params, x, second=(0.0, 1.0))[..., 0]
    return u_t + u * u_x - VISCOSITY * u_xx


def initial_error(params: Params, x: jax.Array) -> jax.Array:
    """u(0, x) + sin(pi x) at places [N]."""
    return tanh_network(params, jnp.stack([jnp.zeros_like(x), x], axis=1))[:, 0] + jnp.sin(
        jnp.pi * x
    )


def losses_of(
    params: Params, inside: jax.Array, initial: jax.Array, boundary: jax.Array
) -> dict[str, jax.Array]:
    """Mean squares of the residual, of the initial values' error, and of u at x = -1 and 1."""
    return {
        "residual": jnp.mean(jnp.square(residual(params, inside))),
        "initial": jnp.mean(jnp.square(initial_error(params, initial))),
        "boundary": jnp.mean(jnp.square(tanh_network(params, boundary))),
    }


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fresh uniform points: inside [2000, 2], x at t = 0 [50], half a side at x = -1, 1 [50, 2]."""
    for_inside, for_initial, for_boundary = jax.random.split(key, 3)
    low = jnp.array([[0.0, -1.0]])
    inside = jax.random.uniform(for_inside, (INSIDE, 2), minval=low, maxval=1.0)
    initial = jax.random.uniform(for_initial, (INITIAL,), minval=-1, maxval=1)
    t = jax.random.uniform(for_boundary, (BOUNDARY,))
    side = jnp.where(jnp.arange(BOUNDARY) % 2 == 0, -1.0, 1.0).astype(t.dtype)
    return inside, initial, jnp.stack([t, side], axis=1)


def problem() -> Problem:
    """Tanh 2 - 5 x 50 - 1, Adam, 5000 steps; the metric is the MSE on a 100 x 256 grid.

    The grid is that of ConFIG's notebook: 100 times from 0 to 1, 256 cell centres in [-1, 1].
    """
    times = np.linspace(0, 1, TIMES)
    places = np.linspace(-1 + 1 / PLACES, 1 - 1 / PLACES, PLACES)
    grid = np.stack(np.meshgrid(times, places, indexing="ij"), axis=-1).reshape(-1, 2)
    truth = solution(grid[:, 0], grid[:, 1])

    def metrics(params: Params) -> dict[str, jax.Array]:
        dtype = params[0][0].dtype
        u = tanh_network(params, jnp.asarray(grid, dtype))[:, 0]
        return {"mse": jnp.mean(jnp.square(u - jnp.asarray(truth, dtype)))}

    def traces(
        params: Params, inside: jax.Array, initial: jax.Array, boundary: jax.Array
    ) -> jax.Array:
        return jnp.stack(
            [
                kernel_trace(lambda p, x: residual(p, x[None])[0], params, inside),
                kernel_trace(lambda p, x: initial_error(p, x[None])[0], params, initial),
                kernel_trace(lambda p, x: tanh_network(p, x)[0], params, boundary),
            ]
        )

    def init(seed: jax.Array) -> Any:
        return glorot(jax.random.key(seed), SIZES)

    return Problem(
        name="burgers",
        losses=terms(losses_of, names=("residual", "initial", "boundary")),
        init=init,
        batch=batch,
        metrics=metrics,
        ranked="mse",
        traces=traces,
        optimizer=optax.adam,
        steps=5000,
        rates=(1e-4, 3e-4, 1e-3),
    )
