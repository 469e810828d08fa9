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
from bench.training.language import Params, Shape, cross_entropy, init, logits, text, windows

SHAPE = Shape(width=64, heads=4, layers=2, context=64)
BATCH = 16
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


def loss(params: Params, x: jax.Array) -> jax.Array:
    """Cross entropy in nats a character at windows [B, T + 1]."""
    return cross_entropy(logits(params, x[:, :-1], SHAPE), x[:, 1:])


def run(
    optimizer: optax.GradientTransformationExtraArgs,
    train: np.ndarray,
    valid: np.ndarray,
    size: int,
    seed: int,
    steps: int,
) -> dict[str, Any]:
    """Losses in nats a character at the end, and time."""
    data, held_out = jnp.asarray(train), jnp.asarray(valid)
    length = SHAPE.context + 1

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        params, state = carry
        x = windows(key, data, BATCH, length)
        value, gradient = jax.value_and_grad(loss)(params, x)
        alone = jax.tree.map(lambda g: g[None], gradient)
        given = {"term_grads": alone, "term_values": value[None], "term_args": (x,)}
        updates, state = optimizer.update(gradient, state, params, **given)
        return (optax.apply_updates(params, updates), state), value

    params = init(jax.random.key(seed), size, SHAPE)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
    start = (params, optimizer.init(params))
    train_all = jax.jit(lambda c, k: jax.lax.scan(step, c, k)).lower(start, keys).compile()
    before = time.perf_counter()
    (params, state), values = jax.block_until_ready(train_all(start, keys))
    seconds = time.perf_counter() - before
    checked = jax.jit(loss)(params, windows(jax.random.key(0), held_out, 256, length))
    row = {"train": float(values[-50:].mean()), "valid": float(checked), "seconds": seconds}
    if hasattr(state, "info"):
        row |= {"gains": np.asarray(state.info.gains).round(3).tolist()}
        row |= {"sharpness_over_limit": (state.info.row_sharpness / state.info.limit).tolist()}
    print(f"{seconds / steps * 1e3:.1f} ms a step", file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
