"""Block gains on a small transformer against a tuned rate: `python -m bench.training.transformer`.

A character-level language model on this project's own documentation, Adam, one grid of rates for
every method: the plain optimizer, every block's step multiplied by what its own sharpness leaves of
the limit (`small_gain(..., blocks=..., row_gains=True)`), and the same with all parameters in one
block. Blocks are those of Wang et al., *The sharpness disparity principle in transformers* (2025):
embeddings, norms, queries and keys, values and outputs, feed-forward.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import smallgain_jax as sg
from bench.run import about

ROOT = Path(__file__).parents[2]
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 16
RATES = (1e-3, 3e-3, 1e-2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    train, valid, size = text()
    rows = []
    for method in options.methods:
        for rate in options.rates:
            for seed in range(options.seeds):
                row = {"method": method, "rate": rate, "seed": seed}
                row |= run(METHODS[method](rate), train, valid, size, seed, options.steps)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


def text() -> tuple[np.ndarray, np.ndarray, int]:
    """Characters of README and docs as int32, the first nine tenths and the rest, and how many
    different ones there are."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    raw = "\n".join(file.read_text(encoding="utf-8") for file in files)
    letters, coded = np.unique(np.array(list(raw)), return_inverse=True)
    cut = len(coded) * 9 // 10
    return coded[:cut].astype(np.int32), coded[cut:].astype(np.int32), len(letters)


def block_of(path: tuple[Any, ...]) -> str:
    """The block of a parameter, from its name."""
    name = path[-1].key
    kinds = {"query": "query-key", "key": "query-key", "value": "value-out", "out": "value-out"}
    return kinds.get(name, "feed-forward" if name.startswith("mlp") else name.split("_")[0])


def adam(rate: float) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.adam(rate))


def gained(rate: float, blocks: Any) -> optax.GradientTransformationExtraArgs:
    losses = sg.terms(lambda p, x: {"loss": loss(p, x)}, names=("loss",))
    return sg.small_gain(
        optax.adam(rate), losses, floor=1, ceiling=1, every=50, blocks=blocks, row_gains=True
    )


METHODS = {
    "adam": adam,
    "gains by block": partial(gained, blocks=block_of),
    "one gain": partial(gained, blocks=None),
}


def init(key: jax.Array, size: int) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 2 + 6 * LAYERS))

    def dense(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / jnp.sqrt(rows)

    def layer() -> dict[str, jax.Array]:
        square = {name: dense(WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
        wide = {"mlp_in": dense(WIDTH, 4 * WIDTH), "mlp_out": dense(4 * WIDTH, WIDTH)}
        return square | wide | {"norm_1": jnp.ones(WIDTH), "norm_2": jnp.ones(WIDTH)}

    return {
        "embedding_token": 0.1 * jax.random.normal(next(keys), (size, WIDTH)),
        "embedding_place": 0.1 * jax.random.normal(next(keys), (CONTEXT, WIDTH)),
        "norm_last": jnp.ones(WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
    }


def logits(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Scores [B, T, size] of the next character at characters [B, T]; embeddings are tied."""
    h = params["embedding_token"][x] + params["embedding_place"][None]
    mask = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))[None, None]
    for layer in params["layers"]:
        n = normed(h, layer["norm_1"])
        q, k, v = (
            (n @ layer[name]).reshape(*n.shape[:2], HEADS, -1) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(WIDTH // HEADS)
        mixing = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
        h = h + jnp.einsum("bhts,bshd->bthd", mixing, v).reshape(h.shape) @ layer["out"]
        n = normed(h, layer["norm_2"])
        h = h + jax.nn.gelu(n @ layer["mlp_in"]) @ layer["mlp_out"]
    return normed(h, params["norm_last"]) @ params["embedding_token"].T


def normed(h: jax.Array, scale: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + 1e-6)
    return h / size * scale.reshape(1, 1, -1)


def loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Cross entropy in nats a character at windows [B, T + 1]."""
    scores = logits(params, x[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, x[:, 1:]))


def run(
    optimizer: optax.GradientTransformationExtraArgs,
    train: np.ndarray,
    valid: np.ndarray,
    size: int,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """Losses in nats a character at the end, and time."""
    window = jnp.arange(CONTEXT + 1)
    data, held_out = jnp.asarray(train), jnp.asarray(valid)

    def windows(key: jax.Array, of: jax.Array, number: int) -> jax.Array:
        starts = jax.random.randint(key, (number,), 0, of.shape[0] - CONTEXT - 1)
        return of[starts[:, None] + window[None]]

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        x = windows(key, data, BATCH)
        value, gradient = jax.value_and_grad(loss)(params, x)
        alone = jax.tree.map(lambda g: g[None], gradient)
        given = {"term_grads": alone, "term_values": value[None], "term_args": (x,)}
        updates, state = optimizer.update(gradient, state, params, **given)
        return (optax.apply_updates(params, updates), state), value

    params = init(jax.random.key(seed), size)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
    start = (params, optimizer.init(params))
    train_all = jax.jit(lambda c, k: jax.lax.scan(step, c, k)).lower(start, keys).compile()
    before = time.perf_counter()
    (params, state), values = jax.block_until_ready(train_all(start, keys))
    seconds = time.perf_counter() - before
    checked = jax.jit(loss)(params, windows(jax.random.key(0), held_out, 256))
    row = {"train": float(values[-50:].mean()), "valid": float(checked), "seconds": seconds}
    if hasattr(state, "info"):
        row |= {"gains": np.asarray(state.info.gains).round(3).tolist()}
        row |= {"sharpness_over_limit": (state.info.row_sharpness / state.info.limit).tolist()}
    print(f"{seconds / steps * 1e3:.1f} ms a step", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
