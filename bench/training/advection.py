"""A physics-informed network for u_t + c u_x = 0 on [0, 2] x [0, 2 pi], u(0, x) = sin x.

The published setting is that of Wang, Sankaran, Wang and Perdikaris, *An expert's guide to training
physics-informed neural networks* (arXiv 2308.08468, section 7.2, and their code jaxpi): c = 50,
coordinates by their sines and cosines, the one of time with a trainable frequency, random Fourier
features, factored weights, causal weights of the residual, 4,096 fresh points a step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training.network import glorot
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

Params = dict[str, Any]
TIME, LENGTH = 2.0, 2 * np.pi
TIMES, PLACES = 200, 128
TOLERANCE = 1.0
"""Of the causal weights: the residual of a time counts once those before it are below 1 / this."""


class Setting(NamedTuple):
    """Speed of the wave, and size of network and batch."""

    speed: float
    width: int
    layers: int
    features: int
    points: int
    chunks: int


PUBLISHED = Setting(speed=50.0, width=256, layers=4, features=256, points=4096, chunks=32)
REDUCED = Setting(speed=10.0, width=48, layers=3, features=48, points=512, chunks=16)


def init(seed: jax.Array, setting: Setting) -> Params:
    """Glorot weights W = diag(exp(s)) V, s from N(1, 0.1^2), as column factors; normal features."""
    for_features, for_layers, for_factors = jax.random.split(jax.random.key(seed), 3)
    sizes = (setting.features, *[setting.width] * setting.layers, 1)

    def layer(key: jax.Array, weight: jax.Array, bias: jax.Array) -> dict[str, jax.Array]:
        factor = jnp.exp(1 + 0.1 * jax.random.normal(key, bias.shape))
        return {"factor": factor, "direction": weight / factor[None], "bias": bias}

    keys = jax.random.split(for_factors, len(sizes) - 1)
    plain = glorot(for_layers, sizes)
    return {
        "frequency": jnp.asarray(2 * jnp.pi),
        "features": jax.random.normal(for_features, (4, setting.features // 2)),
        "layers": [layer(key, *pair) for key, pair in zip(keys, plain, strict=True)],
    }


def network(params: Params, at: jax.Array) -> jax.Array:
    """u [N] at points (t, x) [N, 2]."""
    t, x = params["frequency"] * at[:, 0], at[:, 1]
    round_ = jnp.stack([jnp.cos(t), jnp.sin(t), jnp.cos(x), jnp.sin(x)], axis=1)
    phase = round_ @ params["features"]
    h = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)
    *inner, last = params["layers"]
    for layer in inner:
        h = jnp.tanh(_affine(layer, h))
    return _affine(last, h)[:, 0]


def _affine(layer: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    return h @ (layer["direction"] * layer["factor"][None]) + layer["bias"][None]


def residual(params: Params, at: jax.Array, speed: float) -> jax.Array:
    """u_t + c u_x [N]: the derivative along the characteristic."""
    along = jnp.broadcast_to(jnp.asarray([1.0, speed], at.dtype), at.shape)
    return jax.jvp(lambda z: network(params, z), (at,), (along,))[1]


def exact(at: np.ndarray, speed: float) -> np.ndarray:
    """The solution sin(x - c t) at points (t, x) [..., 2]."""
    return np.sin(at[..., 1] - speed * at[..., 0])


def problem(setting: Setting = REDUCED) -> Problem:
    """Adam with its rate falling by a tenth every 2,000 steps; relative L2 error, 200 x 128."""
    axes = np.linspace(0, TIME, TIMES), np.linspace(0, LENGTH, PLACES)
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    truth = exact(grid, setting.speed)
    start = np.stack([np.zeros(PLACES), axes[1]], axis=1)

    def initial_error(params: Params, at: jax.Array) -> jax.Array:
        return network(params, at) - jnp.sin(at[:, 1])

    def losses_of(params: Params, inside: jax.Array) -> dict[str, jax.Array]:
        squares = jnp.square(residual(params, inside, setting.speed))
        chunk = jnp.mean(squares.reshape(setting.chunks, -1), axis=1)
        before = jnp.cumsum(chunk) - chunk
        causal = jax.lax.stop_gradient(jnp.exp(-TOLERANCE * before))
        error = initial_error(params, jnp.asarray(start, inside.dtype))
        return {"residual": jnp.mean(causal * chunk), "initial": jnp.mean(jnp.square(error))}

    def batch(key: jax.Array) -> tuple[jax.Array]:
        """Uniform points (t, x) [N, 2], in the order of their times."""
        t, x = jax.random.uniform(key, (2, setting.points))
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
        optimizer=lambda rate: optax.adam(optax.exponential_decay(rate, 2000, 0.9)),
        steps=200_000 if setting == PUBLISHED else 20_000,
        rates=(3e-4, 1e-3, 3e-3),
    )
