"""A character-level language model on this project's own documentation."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).parents[2]
Params = dict[str, Any]


class Shape(NamedTuple):
    """Size of a transformer."""

    width: int
    heads: int
    layers: int
    context: int


def text() -> tuple[np.ndarray, np.ndarray, int]:
    """Characters of README and docs as int32, the first nine tenths and the rest, and how many
    different ones there are."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    raw = "\n".join(file.read_text(encoding="utf-8") for file in files)
    letters, coded = np.unique(np.array(list(raw)), return_inverse=True)
    cut = len(coded) * 9 // 10
    return coded[:cut].astype(np.int32), coded[cut:].astype(np.int32), len(letters)


def init(key: jax.Array, size: int, shape: Shape) -> Params:
    """Parameters for `size` characters, as `block_of` in the transformer benchmark names them."""
    width, _, layers, context = shape
    keys = iter(jax.random.split(key, 2 + 6 * layers))

    def dense(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / jnp.sqrt(rows)

    def layer() -> dict[str, jax.Array]:
        square = {name: dense(width, width) for name in ("query", "key", "value", "out")}
        wide = {"mlp_in": dense(width, 4 * width), "mlp_out": dense(4 * width, width)}
        return square | wide | {"norm_1": jnp.ones(width), "norm_2": jnp.ones(width)}

    return {
        "embedding_token": 0.1 * jax.random.normal(next(keys), (size, width)),
        "embedding_place": 0.1 * jax.random.normal(next(keys), (context, width)),
        "norm_last": jnp.ones(width),
        "layers": [layer() for _ in range(layers)],
    }


def hidden(params: Params, x: jax.Array, shape: Shape) -> jax.Array:
    """States [B, T, width] at characters [B, T], each of which sees those before it.

    `params["layers"]` is a list, or a dict of arrays with the layers along the first axis: these
    are scanned, and the program does not grow with their number.
    """
    h = params["embedding_token"][x] + params["embedding_place"][None]
    layers = params["layers"]
    if isinstance(layers, dict):
        h, _ = jax.lax.scan(lambda h, layer: (block(h, layer, shape), None), h, layers)
    else:
        for layer in layers:
            h = block(h, layer, shape)
    return normed(h, params["norm_last"])


def block(h: jax.Array, layer: Params, shape: Shape) -> jax.Array:
    """Attention and a feed-forward network, each added to what came in."""
    n = normed(h, layer["norm_1"])
    q, k, v = (
        (n @ layer[name]).reshape(*n.shape[:2], shape.heads, -1)
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    mask = jnp.tril(jnp.ones((shape.context, shape.context), bool))[None, None]
    mixing = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
    h = h + jnp.einsum("bhts,bshd->bthd", mixing, v).reshape(h.shape) @ layer["out"]
    n = normed(h, layer["norm_2"])
    return h + jax.nn.gelu(n @ layer["mlp_in"]) @ layer["mlp_out"]


def logits(params: Params, x: jax.Array, shape: Shape) -> jax.Array:
    """Scores [B, T, size] of the next character; embeddings are tied."""
    return hidden(params, x, shape) @ params["embedding_token"].T


def cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy in nats a character."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def windows(key: jax.Array, of: jax.Array, number: int, length: int) -> jax.Array:
    """Windows [number, length] of a text, from anywhere in it."""
    starts = jax.random.randint(key, (number,), 0, of.shape[0] - length)
    return of[starts[:, None] + jnp.arange(length)[None]]


def normed(h: jax.Array, scale: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)
    return h / size * scale.reshape(1, 1, -1)
