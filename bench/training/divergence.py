"""Does the default keep a run from diverging at rates that are too high? `python -m
bench.training.divergence --out FILE.json`

Each optimizer trains two heads on digits in full batches. Its largest stable rate is the largest of
a grid, a factor of 2 apart, at which the plain optimizer ends below its start. At 1 to 100 times
that rate the plain optimizer and `small_gain` with its defaults run side by side: the loss at the
end over that at the start. About five minutes on two cores.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.run import about
from bench.training.problems import Problem, make
from smallgain_jax.losses.small_gain import loss_small_gain

TIMES = (1, 3, 10, 30, 100)
BASES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "SGD": optax.sgd,
    "heavy ball": partial(optax.sgd, momentum=0.9),
    "Nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "Adam": optax.adam,
    "Lion": optax.lion,
}


def ends(problem: Problem, optimizer_at: Any, rates: Any, steps: int) -> np.ndarray:
    """Loss at the end over loss at the start, for each rate; inf where it is not finite."""
    args = problem.batch(jax.random.key(0))

    def value(params: Any) -> jax.Array:
        return problem.losses.values(params, *args).sum()

    def run(rate: jax.Array) -> jax.Array:
        optimizer = optax.with_extra_args_support(optimizer_at(rate))
        params = problem.init(jnp.int32(0))

        def step(carry: Any, _: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = optimizer.update(
                jax.grad(value)(params), state, params, term_args=args
            )
            return (optax.apply_updates(params, updates), state), None

        (last, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return value(last) / value(params)

    found = np.asarray(jax.jit(partial(jax.lax.map, run))(jnp.asarray(rates, float)))
    return np.where(np.isfinite(found), found, np.inf)


def measure(name: str, steps: int, problem_name: str = "digits") -> dict[str, Any]:
    """A row: the largest stable rate, and how both end at multiples of it."""
    problem, base = make(problem_name), BASES[name]
    grid = 2.0 ** np.arange(-14, 6)
    stable = float(grid[ends(problem, base, grid, steps) < 1].max())
    rates = stable * np.asarray(TIMES)

    def wrapped(rate: Any) -> optax.GradientTransformation:
        return loss_small_gain(base(rate), problem.losses)

    plain, ours = (ends(problem, make_at, rates, steps) for make_at in (base, wrapped))
    return {"optimizer": name, "stable": stable, "plain": plain.tolist(), "ours": ours.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name in BASES:
        print(f"{name}: compiling, and running", file=sys.stderr)
        rows.append(measure(name, options.steps))
        report = {"about": about(), "times": TIMES, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        for who in ("plain", "ours"):
            shown = "  ".join(f"{value:9.2g}" for value in rows[-1][who])
            print(f"{name:10s} {rows[-1]['stable']:9.2g} {who:5s} {shown}", flush=True)


if __name__ == "__main__":
    main()
