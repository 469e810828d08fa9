"""A physics-informed network for u_t - 1e-4 u_xx + 5 u^3 - 5 u = 0 on [0, 1] x [-1, 1], periodic.

u(0, x) = x^2 cos(pi x). The published setting is that of Wang, Sankaran, Wang and Perdikaris, *An
expert's guide to training physics-informed neural networks* (arXiv 2308.08468, section 7.1, and the
ablation in their code jaxpi): t, cos pi x and sin pi x as coordinates, random Fourier features,
factored weights, causal weights of the residual, 4,096 fresh points a step.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.integrate import solve_ivp

from bench.training import embedded
from bench.training.embedded import Params, Size
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

DIFFUSION, RATE = 1e-4, 5.0
TIMES, PLACES = 101, 512
"""On which errors are measured."""
MODES = 1024
"""Of the reference solution; 2,048 change it by 5e-6 in relative L2."""


def initial(x: jax.Array) -> jax.Array:
    return x**2 * jnp.cos(jnp.pi * x)


@cache
def reference(modes: int = MODES) -> np.ndarray:
    """The solution [101, 512] by Fourier modes in space and an adaptive Runge-Kutta method."""
    x = 2 * np.arange(modes) / modes - 1
    wave = np.pi * np.fft.rfftfreq(modes, 1 / modes)

    def slope(_: float, u: np.ndarray) -> np.ndarray:
        bent = np.fft.irfft(-(wave**2) * np.fft.rfft(u), modes)
        return DIFFUSION * bent + RATE * (u - u**3)

    times = np.linspace(0, 1, TIMES)
    start = np.asarray(x**2 * np.cos(np.pi * x))
    found = solve_ivp(slope, (0, 1), start, method="DOP853", t_eval=times, rtol=1e-9, atol=1e-9)
    return found.y.T[:, :: modes // PLACES]


def network(params: Params, at: jax.Array) -> jax.Array:
    """u [N] at points (t, x) [N, 2]."""
    t, x = at[:, 0], jnp.pi * at[:, 1]
    return embedded.network(params, jnp.stack([t, jnp.cos(x), jnp.sin(x)], axis=1))


def residual(params: Params, at: jax.Array) -> jax.Array:
    """u_t - 1e-4 u_xx + 5 u^3 - 5 u [N], derivatives by forward mode."""
    along_t, along_x = (jnp.broadcast_to(row[None], at.shape) for row in jnp.eye(2, dtype=at.dtype))

    def slope(z: jax.Array) -> jax.Array:
        return jax.jvp(lambda z: network(params, z), (z,), (along_x,))[1]

    u, u_t = jax.jvp(lambda z: network(params, z), (at,), (along_t,))
    u_xx = jax.jvp(slope, (at,), (along_x,))[1]
    return u_t - DIFFUSION * u_xx + RATE * (u**3 - u)


def problem(size: Size = embedded.REDUCED) -> Problem:
    """Adam with a decaying rate; the metric is the relative L2 error on the reference's points."""
    truth = reference()
    places = 2 * np.arange(PLACES) / PLACES - 1
    axes = np.linspace(0, 1, TIMES), places
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    start = np.stack([np.zeros(PLACES), places], axis=1)

    def initial_error(params: Params, at: jax.Array) -> jax.Array:
        return network(params, at) - initial(at[:, 1])

    def losses_of(params: Params, inside: jax.Array) -> dict[str, jax.Array]:
        error = initial_error(params, jnp.asarray(start, inside.dtype))
        inner = embedded.causal(residual(params, inside), size.chunks)
        return {"residual": inner, "initial": jnp.mean(jnp.square(error))}

    def batch(key: jax.Array) -> tuple[jax.Array]:
        """Uniform points (t, x) [N, 2], in the order of their times."""
        t, x = jax.random.uniform(key, (2, size.points))
        return (jnp.stack([jnp.sort(t), 2 * x - 1], axis=1),)

    def metrics(params: Params) -> dict[str, jax.Array]:
        dtype = params["features"].dtype
        error = network(params, jnp.asarray(grid, dtype)) - jnp.asarray(truth.ravel(), dtype)
        return {"relative_l2": jnp.linalg.norm(error) / np.linalg.norm(truth)}

    def traces(params: Params, inside: jax.Array) -> jax.Array:
        line = jnp.asarray(start[:: PLACES // 128], inside.dtype)
        first = kernel_trace(lambda p, z: initial_error(p, z[None])[0], params, line)
        inner = kernel_trace(lambda p, z: residual(p, z[None])[0], params, inside)
        return jnp.stack([inner, first])

    return Problem(
        name="allen_cahn",
        losses=terms(losses_of, names=("residual", "initial")),
        init=lambda seed: embedded.init(jax.random.key(seed), 3, size, mean=0.5),
        batch=batch,
        metrics=metrics,
        ranked="relative_l2",
        traces=traces,
        optimizer=lambda rate: optax.adam(embedded.decay(rate)),
        steps=200_000 if size == embedded.PUBLISHED else 10_000,
        rates=(3e-4, 1e-3, 3e-3),
        schedule=embedded.decay,
    )
