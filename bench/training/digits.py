"""Two heads on the first thousand of scikit-learn's digits, in full batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training.network import glorot, tanh_network
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

ROWS, WIDTH = 1000, 64


def network(params: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    """Outputs of the heads, digit [..., 10] and parity [..., 2], on a tanh trunk 64-64-64."""
    trunk = jnp.tanh(tanh_network(params["trunk"], x))
    return {name: tanh_network(params[name], trunk) for name in ("digit", "parity")}


def losses_of(params: dict[str, Any], x: jax.Array, targets: dict[str, Any]) -> dict[str, Any]:
    """Half the squared error of each head, summed over its outputs, mean over rows."""
    outputs = network(params, x)
    return {
        name: 0.5 * jnp.mean(jnp.sum(jnp.square(outputs[name] - targets[name]), axis=-1))
        for name in ("digit", "parity")
    }


def data() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pixels x/16 - 0.3 [1000, 64] and one-hot targets [1000, 10], [1000, 2]."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    labels = labels[:ROWS]
    targets = {"digit": np.eye(10)[labels], "parity": np.eye(2)[labels % 2]}
    return pixels[:ROWS] / 16 - 0.3, targets


def problem() -> Problem:
    """Gradient descent at 0.05, 0.2 and 0.4; the metric is the sum of both losses."""
    x, targets = data()

    def batch(key: jax.Array) -> tuple[Any, ...]:
        return jnp.asarray(x), {name: jnp.asarray(target) for name, target in targets.items()}

    def metrics(params: dict[str, Any]) -> dict[str, jax.Array]:
        inputs, wanted = batch(jax.random.key(0))
        outputs = network(params, inputs)
        hits = {n: jnp.argmax(outputs[n], -1) == jnp.argmax(wanted[n], -1) for n in outputs}
        return {
            "loss": sum(losses_of(params, inputs, wanted).values()),
            "digit_error": 1 - jnp.mean(hits["digit"]),
            "parity_error": 1 - jnp.mean(hits["parity"]),
        }

    def traces(params: dict[str, Any], x: jax.Array, targets: dict[str, Any]) -> jax.Array:
        return jnp.stack(
            [
                kernel_trace(lambda p, row, name=name: network(p, row)[name], params, x)
                for name in ("digit", "parity")
            ]
        )

    def init(seed: jax.Array) -> dict[str, Any]:
        for_trunk, for_digit, for_parity = jax.random.split(jax.random.key(seed), 3)
        return {
            "trunk": glorot(for_trunk, (WIDTH, WIDTH, WIDTH)),
            "digit": glorot(for_digit, (WIDTH, 10)),
            "parity": glorot(for_parity, (WIDTH, 2)),
        }

    return Problem(
        name="digits",
        losses=terms(losses_of, names=("digit", "parity")),
        init=init,
        batch=batch,
        metrics=metrics,
        ranked="loss",
        traces=traces,
        optimizer=optax.sgd,
        steps=1000,
        rates=(0.05, 0.2, 0.4),
    )
