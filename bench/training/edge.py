"""Sharpness at the edge of stability against the stated limit: `python -m bench.training.edge`.

Full-batch training of the digits network with fixed weights and no guard. Where a network sharpens
until its optimizer is unstable, the sharpness hovers at the limit (Cohen et al., ICLR 2021, and
2022 for Adam): what `small_gain` measures and what `probe` states should agree there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import smallgain_jax as sg
from bench.run import about
from bench.training import digits

OPTIMIZERS = {
    "gradient descent, 0.05": optax.sgd(0.05),
    "gradient descent, 0.1": optax.sgd(0.1),
    "heavy ball, 0.05, 0.9": optax.sgd(0.05, momentum=0.9),
    "heavy ball, 0.1, 0.9": optax.sgd(0.1, momentum=0.9),
    "Nesterov, 0.05, 0.9": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "Adam, 1e-3": optax.adam(1e-3),
    "Adam, 3e-3": optax.adam(3e-3),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--methods", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    rows = [measure(name, options.steps) for name in options.methods]
    if options.out:
        options.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


def measure(name: str, steps: int) -> dict[str, Any]:
    """Sharpness over the limit: at its largest, and over the last fifth of the run."""
    problem = digits.problem()
    optimizer = sg.small_gain(
        OPTIMIZERS[name],
        problem.losses,
        policy="greedy",
        floor=1,
        ceiling=1,
        guard=None,
        every=5,
        iterations=3,
    )

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        params, state = carry
        args = problem.batch(jax.random.key(0))
        values, grads = problem.losses.value_and_weighted_grad(state.weights, params, *args)
        updates, state = optimizer.update(
            grads, state, params, term_args=args, term_values=values, weighted=True
        )
        seen = (state.info.sharpness_ratio, values.sum())
        return (optax.apply_updates(params, updates), state), seen

    params = problem.init(jnp.int32(0))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    _, (ratio, loss) = jax.device_get(run((params, optimizer.init(params))))
    low, middle, high = np.percentile(ratio[-steps // 5 :], [10, 50, 90])
    row = {"method": name, "steps": steps, "largest": float(ratio.max()), "median": float(middle)}
    row |= {"low": float(low), "high": float(high), "loss": float(loss[-1])}
    print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    return row


if __name__ == "__main__":
    main()
