"""Every point a term: `python -m bench.training.pointwise --out FILE [--seeds N] [--steps N]`.

The Helmholtz network under Adam on points that stay, its two losses weighed by shares in each
run. Inside the residual's loss each of the 1024 points has a weight of its own:

- equal: 1;
- attention: lambda <- 0.999 lambda + 0.01 |r| / max |r|, squared (Anagnostopoulos et al.,
  *Residual-based attention in physics-informed neural networks*, 2024);
- self-adaptive: lambda climbs the loss by Adam at 0.005, squared (McClenny and Braga-Neto,
  *Self-adaptive physics-informed neural networks*, 2023);
- knapsack: bounded by 0.1 and 3, filled by `allocate` in the order of r^2 over price, at the total
  price that weights of 1 have. The price of a point is the squared norm of its residual's gradient
  in Adam's metric, taken anew every 10 steps;
- fair: one over the price, so that all points take as much.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import smallgain_jax as sg
from bench.run import about
from bench.training import helmholtz
from bench.training.network import tanh_network
from bench.training.second_order import points

EVERY = 10
"""Steps between prices."""
LOW, HIGH = 0.1, 3.0


class Weighing(NamedTuple):
    """What a rule keeps. N points."""

    weights: jax.Array  # [N] of the squared residuals
    memory: Any


class Sight(NamedTuple):
    """What a rule may look at."""

    residuals: jax.Array  # [N]
    prices: Callable[[], jax.Array]  # [N]
    count: jax.Array  # type: ignore[assignment]


Rule = Callable[[Sight, Weighing], Weighing]


def equal(sight: Sight, old: Weighing) -> Weighing:
    return old


def attention(sight: Sight, old: Weighing) -> Weighing:
    size = jnp.abs(sight.residuals)
    found = 0.999 * old.memory + 0.01 * size / jnp.max(size)
    return Weighing(found**2, found)


def self_adaptive(sight: Sight, old: Weighing) -> Weighing:
    (values, state), ascent = old.memory, optax.adam(5e-3)
    slope = 2 * values * sight.residuals**2 / values.size
    move, state = ascent.update(-slope, state)
    values = values + move
    return Weighing(values**2, (values, state))


def _now_and_then(sight: Sight, old: Weighing, decide: Callable[[], jax.Array]) -> Weighing:
    weights = jax.lax.cond(sight.count % EVERY == 0, decide, lambda: old.weights)
    return Weighing(weights, old.memory)


def knapsack(sight: Sight, old: Weighing) -> Weighing:
    def decide() -> jax.Array:
        price, ones = sight.prices(), jnp.ones_like(sight.residuals)
        price = price / jnp.sum(price)
        rows = jnp.zeros((price.size, 1), jnp.int32)
        bounds = LOW * ones, HIGH * ones
        budget = jnp.full(1, 1 - LOW)
        return sg.allocate(sight.residuals**2, price[:, None], rows, *bounds, budget).weights

    return _now_and_then(sight, old, decide)


def fair(sight: Sight, old: Weighing) -> Weighing:
    def decide() -> jax.Array:
        price = sight.prices()
        return jnp.mean(price) / price

    return _now_and_then(sight, old, decide)


RULES: dict[str, Rule] = {
    "equal": equal,
    "attention": attention,
    "self-adaptive": self_adaptive,
    "knapsack": knapsack,
    "fair": fair,
}


def _memory(name: str, ones: jax.Array) -> Any:
    if name == "attention":
        return ones
    return (ones, optax.adam(5e-3).init(ones)) if name == "self-adaptive" else ()


def _prices(params: Any, inside: jax.Array, state: Any) -> jax.Array:
    """Squared norm [N] of each residual's gradient in Adam's metric."""
    adam = optax.tree.get_all_with_path(state.base_state, "nu")[0][1]
    age = optax.tree.get_all_with_path(state.base_state, "count")[0][1]
    debt = 1 - 0.999 ** jnp.maximum(age, 1)
    gradients = jax.vmap(
        jax.grad(lambda p, x: helmholtz.residual(p, x[None])[0]), in_axes=(None, 0)
    )(params, inside)

    def of(gradient: jax.Array, second: jax.Array) -> jax.Array:
        metric = jnp.where(age > 0, jnp.sqrt(second / debt) + 1e-8, 1)
        return jnp.sum((gradient**2 / metric[None]).reshape(gradient.shape[0], -1), axis=1)

    return sum(jax.tree.leaves(jax.tree.map(of, gradients, adam)))


def run(name: str, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """One run; relative L2 error at twenty places."""
    inside, outside = (jnp.asarray(side, jnp.float32) for side in points())

    def losses_of(params: Any, weights: jax.Array) -> dict[str, jax.Array]:
        return {
            "residual": jnp.mean(weights * helmholtz.residual(params, inside) ** 2),
            "boundary": jnp.mean(tanh_network(params, outside) ** 2),
        }

    losses = sg.terms(losses_of, names=("residual", "boundary"))
    optimizer = sg.small_gain(optax.adam(rate), losses, policy="fair")
    problem = helmholtz.problem()

    def step(carry: Any, count: jax.Array) -> tuple[Any, None]:
        params, state, weighing = carry
        residuals = helmholtz.residual(params, inside)
        sight = Sight(residuals, partial(_prices, params, inside, state), count)
        weighing = RULES[name](sight, weighing)
        args = (weighing.weights,)
        values, grads = losses.value_and_weighted_grad(state.weights, params, *args)
        updates, state = optimizer.update(
            grads, state, params, term_args=args, term_values=values, weighted=True
        )
        return (optax.apply_updates(params, updates), state, weighing), None

    @jax.jit
    def advance(carry: Any, first: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, first + jnp.arange(steps // 20))
        return carry, problem.metrics(carry[0])["relative_l2"]

    params, ones = problem.init(jnp.int32(seed)), jnp.ones(inside.shape[0])
    carry = (params, optimizer.init(params), Weighing(ones, _memory(name, ones)))
    errors, before = [], time.perf_counter()
    for first in range(0, steps, steps // 20):
        carry, error = advance(carry, jnp.int32(first))
        errors.append(float(error))
    seconds = time.perf_counter() - before
    spread = np.asarray(carry[2].weights)
    print(f"{name} seed {seed}: {errors[-1]:.4g}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "method": name,
        "seed": seed,
        "relative_l2": errors[-1],
        "seconds": seconds,
        "weights, largest over mean": float(spread.max() / spread.mean()),
        "errors": errors,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"about": about(), "runs": []}
    for seed in range(options.seeds):
        for name in options.methods:
            report["runs"].append(run(name, seed, options.steps, options.rate))
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
