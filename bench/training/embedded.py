"""A tanh network behind random Fourier features with factored weights, and causal residuals.

Architecture and weighting of Wang, Sankaran, Wang and Perdikaris, *An expert's guide to training
physics-informed neural networks* (arXiv 2308.08468, sections 4 and 5, and their code jaxpi).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bench.training.network import glorot

Params = dict[str, Any]
TOLERANCE = 1.0
"""Of the causal weights: the residual of a time counts once those before it are below 1 / this."""


class Size(NamedTuple):
    """Of a network and of a batch."""

    width: int
    layers: int
    features: int
    points: int
    chunks: int


PUBLISHED = Size(width=256, layers=4, features=256, points=4096, chunks=32)
REDUCED = Size(width=48, layers=3, features=48, points=512, chunks=16)


def init(key: jax.Array, coordinates: int, size: Size, mean: float = 1.0) -> Params:
    """Features from N(0, 1); Glorot weights W = V diag(exp(s)), s from N(mean, 0.1^2)."""
    for_features, for_layers, for_factors = jax.random.split(key, 3)
    sizes = (size.features, *[size.width] * size.layers, 1)

    def layer(key: jax.Array, weight: jax.Array, bias: jax.Array) -> dict[str, jax.Array]:
        factor = jnp.exp(mean + 0.1 * jax.random.normal(key, bias.shape))
        return {"factor": factor, "direction": weight / factor[None], "bias": bias}

    keys = jax.random.split(for_factors, len(sizes) - 1)
    plain = glorot(for_layers, sizes)
    return {
        "features": jax.random.normal(for_features, (coordinates, size.features // 2)),
        "layers": [layer(key, *pair) for key, pair in zip(keys, plain, strict=True)],
    }


def network(params: Params, coordinates: jax.Array) -> jax.Array:
    """u [N] at coordinates [N, C]."""
    phase = coordinates @ params["features"]
    h = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)
    *inner, last = params["layers"]
    for layer in inner:
        h = jnp.tanh(_affine(layer, h))
    return _affine(last, h)[:, 0]


def _affine(layer: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    return h @ (layer["direction"] * layer["factor"][None]) + layer["bias"][None]


def causal(residuals: jax.Array, chunks: int) -> jax.Array:
    """Mean square of residuals [N] in order of time, in chunks that wait for earlier ones."""
    chunk = jnp.mean(jnp.square(residuals).reshape(chunks, -1), axis=1)
    before = jnp.cumsum(chunk) - chunk
    return jnp.mean(jax.lax.stop_gradient(jnp.exp(-TOLERANCE * before)) * chunk)


def decay(rate: Any) -> optax.Schedule:
    """The rate falls by a tenth in every 2,000 steps."""
    return optax.exponential_decay(rate, 2000, 0.9)
