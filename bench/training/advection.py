"""A physics-informed network for u_t + c u_x = 0 on [0, 2] x [0, 2 pi], u(0, x) = sin x.

The published setting is that of Wang, Sankaran, Wang and Perdikaris, *An expert's guide to training
physics-informed neural networks* (arXiv 2308.08468, section 7.2, and their code jaxpi): c = 50,
coordinates by their sines and cosines, the one of time with a trainable frequency, random Fourier
features, factored weights, causal weights of the residual, 4,096 fresh points a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training import embedded
from bench.training.embedded import Params, Size
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

TIME, LENGTH = 2.0, 2 * np.pi
TIMES, PLACES = 200, 128


class Setting(NamedTuple):
    """Speed of the wave, and size of network and batch."""

    speed: float
    size: Size


PUBLISHED = Setting(speed=50.0, size=embedded.PUBLISHED)
REDUCED = Setting(speed=10.0, size=embedded.REDUCED)


def init(seed: jax.Array, setting: Setting) -> Params:
    """An embedded network of four coordinates, and the frequency of time."""
    params = embedded.init(jax.random.key(seed), 4, setting.size)
    return params | {"frequency": jnp.asarray(2 * jnp.pi)}


def network(params: Params, at: jax.Array) -> jax.Array:
    """u [N] at points (t, x) [N, 2]."""
    t, x = params["frequency"] * at[:, 0], at[:, 1]
    return embedded.network(
        params, jnp.stack([jnp.cos(t), jnp.sin(t), jnp.cos(x), jnp.sin(x)], axis=1)
    )


def residual(params: Params, at: jax.Array, speed: float) -> jax.Array:
    """u_t + c u_x [N]: the derivative along the characteristic."""
    along = jnp.broadcast_to(jnp.asarray([1.0, speed], at.dtype), at.shape)
    return jax.jvp(lambda z: network(params, z), (at,), (along,))[1]


def exact(at: np.ndarray, speed: float) -> np.ndarray:
    """The solution sin(x - c t) at points (t, x) [..., 2]."""
    return np.sin(at[..., 1] - speed * at[..., 0])


def problem(setting: Setting = REDUCED) -> Problem:
    """Adam with a decaying rate; the metric is the relative L2 error on 200 x 128 points."""
    axes = np.linspace(0, TIME, TIMES), np.linspace(0, LENGTH, PLACES)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    truth = exact(grid, setting.speed)
    start = np.stack([np.zeros(PLACES), axes[1]], axis=1)

    def initial_error(params: Params, at: jax.Array) -> jax.Array:
        return network(params, at) - jnp.sin(at[:, 1])

    def losses_of(params: Params, inside: jax.Array) -> dict[str, jax.Array]:
        error = initial_error(params, jnp.asarray(start, inside.dtype))
        inner = embedded.causal(residual(params, inside, setting.speed), setting.size.chunks)
        return {"residual": inner, "initial": jnp.mean(jnp.square(error))}

    def batch(key: jax.Array) -> tuple[jax.Array]:
        """Uniform points (t, x) [N, 2], in the order of their times."""
        t, x = jax.random.uniform(key, (2, setting.size.points))
        return (jnp.stack([TIME * jnp.sort(t), LENGTH * x], axis=1),)

    def metrics(params: Params) -> dict[str, jax.Array]:
        dtype = params["frequency"].dtype
        error = network(params, jnp.asarray(grid, dtype)) - jnp.asarray(truth, dtype)
        return {"relative_l2": jnp.linalg.norm(error) / np.linalg.norm(truth)}

    def traces(params: Params, inside: jax.Array) -> jax.Array:
        places = jnp.asarray(start, inside.dtype)
        first = kernel_trace(lambda p, z: initial_error(p, z[None])[0], params, places)
        inner = kernel_trace(lambda p, z: residual(p, z[None], setting.speed)[0], params, inside)
        return jnp.stack([inner, first])

    return Problem(
        name="advection",
        losses=terms(losses_of, names=("residual", "initial")),
        init=lambda seed: init(seed, setting),
        batch=batch,
        metrics=metrics,
        ranked="relative_l2",
        traces=traces,
        optimizer=lambda rate: optax.adam(embedded.decay(rate)),
        steps=200_000 if setting == PUBLISHED else 20_000,
        rates=(3e-4, 1e-3, 3e-3),
        schedule=embedded.decay,
    )
