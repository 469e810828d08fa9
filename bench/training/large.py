"""A transformer of ten million parameters with three losses, for accelerators.

The next character, the one after it (Gloeckle et al., *Better & faster large language models via
multi-token prediction*, ICML 2024), and the squared log partition, which keeps scores from
drifting (Chowdhery et al., *PaLM*, 2022, section 5).
"""

import jax
import jax.numpy as jnp
import optax

from bench.training.language import Params, Shape, cross_entropy, hidden, init, text, windows
from bench.training.problems import Problem
from smallgain_jax.losses.losses import terms

SHAPE = Shape(width=384, heads=6, layers=6, context=256)
BATCH = 32
MEASURED = 256
"""Windows that the metric is of: over four of them it swings by a tenth with the text."""


def problem(shape: Shape = SHAPE, batch_size: int = BATCH) -> Problem:
    """Adam; the metric is the cross entropy of the next character on held-out text."""
    train, valid, size = text()
    data, held_out = jnp.asarray(train), jnp.asarray(valid)
    length = shape.context + 2

    def losses_of(params: Params, x: jax.Array) -> dict[str, jax.Array]:
        states = hidden(params, x[:, :-2], shape)
        scores = states @ params["embedding_token"].T
        after = states @ params["head_after"] @ params["embedding_token"].T
        partition = jax.nn.logsumexp(scores, axis=-1)
        return {
            "next": cross_entropy(scores, x[:, 1:-1]),
            "after": cross_entropy(after, x[:, 2:]),
            "partition": 1e-2 * jnp.mean(jnp.square(partition)),
        }

    def start(seed: jax.Array) -> Params:
        for_body, for_head = jax.random.split(jax.random.key(seed))
        head = jax.random.normal(for_head, (shape.width, shape.width)) / jnp.sqrt(shape.width)
        body = init(for_body, size, shape)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *body["layers"])
        return body | {"layers": stacked, "head_after": head}

    def batch(key: jax.Array) -> tuple[jax.Array]:
        return (windows(key, data, batch_size, length),)

    def metrics(params: Params) -> dict[str, jax.Array]:
        x = windows(jax.random.key(0), held_out, max(batch_size, MEASURED), length)
        return {"loss": losses_of(params, x)["next"]}

    return Problem(
        name="large",
        losses=terms(losses_of, names=("next", "after", "partition")),
        init=start,
        batch=batch,
        metrics=metrics,
        ranked="loss",
        traces=None,
        optimizer=optax.adam,
        steps=1000,
        rates=(1e-4, 3e-4, 1e-3),
    )
