"""Train, and write JSON: `python -m bench.training.run --case helmholtz --out FILE.json`.

Every method runs at every rate of one grid, with the same seeds, starts and batches. A finished
(method, rate) is written at once, and skipped when the same command runs again. Compile time is
apart from run time.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.run import about
from bench.training import problems
from bench.training.methods import METHODS, Method
from bench.training.peers import Sight, combine
from bench.training.problems import Problem, each_value_and_grad, value_and_term_grads

Step = Callable[[Any, jax.Array, jax.Array], Any]
"""(carry, seed, index of the step) -> (carry, weights [K])."""
LANES = ("loop", "vmap")
BATCHES = 1 << 20  # a child of the seed's key that no start uses


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=problems.NAMES, required=True)
    parser.add_argument("--methods", nargs="*", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--rates", nargs="*", type=float, help="one grid for every method")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--cosine", action="store_true", help="rates that fall to 0 by a cosine")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, help="steps between measurements, 500 or a tenth")
    parser.add_argument("--lanes", choices=LANES, default="loop", help="seeds in turn or at once")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="20 steps, 1 seed, 1 rate")
    options = parser.parse_args(argv)
    problem = problems.make(options.case)
    steps = 20 if options.smoke else options.steps or problem.steps
    every = options.every or (10 if options.smoke else min(500, max(1, problem.steps // 10)))
    if steps % every:
        parser.error(f"--steps {steps} must be a multiple of --every {every}")
    seeds = [options.first + k for k in range(1 if options.smoke else options.seeds)]
    rates = (options.rates or list(problem.rates))[: 1 if options.smoke else None]

    if options.cosine and callable(problem.schedule(1.0)):
        parser.error(f"--cosine: {problem.name} has falling rates of its own")
    if options.cosine:
        problem = falling(problem, steps)
    settings = {
        "case": problem.name + " (cosine)" * options.cosine,
        "metric": problem.ranked,
        "steps": steps,
        "every": every,
        "seeds": seeds,
    }
    report = {"about": about(), "settings": settings, "cells": {}}
    if options.out.exists():
        report = json.loads(options.out.read_text())
        if report["settings"] != settings:
            parser.error(f"{options.out} holds other settings, {report['settings']}: name another")
    for name in options.methods:
        trainer = Trainer(problem, METHODS[name], every, options.lanes)
        for rate in rates:
            key = f"{name} {rate:g}"
            if key in report["cells"]:
                print(f"{key}: already there", file=sys.stderr)
                continue
            report["cells"][key] = {"method": name, "rate": rate} | trainer.run(
                rate, seeds, steps, f"{problem.name} {key}"
            )
            partial = options.out.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            partial.replace(options.out)
    print(f"wrote {options.out}", file=sys.stderr)


class Trainer:
    """Runs one method on one problem; a program compiled for one rate serves the next."""

    def __init__(self, problem: Problem, method: Method, every: int, lanes: str = "loop") -> None:
        self.problem, self.method, self.every = problem, method, every
        self.lanes = lanes if method.lanes else "loop"
        self.compiled: dict[Any, Any] = {}

    def run(self, rate: float, seeds: list[int], steps: int, label: str = "") -> dict[str, Any]:
        """Metrics at every measurement [steps / every + 1, seeds], and seconds."""
        groups = [seeds] if self.lanes == "vmap" else [[seed] for seed in seeds]
        before = time.perf_counter()
        start, advance = self.programs(rate, len(groups[0]))
        compile_s = time.perf_counter() - before
        tables: list[list[dict[str, np.ndarray]]] = []
        seconds = 0.0
        for group in groups:
            before = time.perf_counter()
            rows = list(self._measured(start, advance, rate, group, steps, label))
            seconds += time.perf_counter() - before
            tables.append(rows)
        names = list(tables[0][0])
        metrics = {
            name: [
                [finite(x) for table in tables for x in np.atleast_1d(table[row][name])]
                for row in range(len(tables[0]))
            ]
            for name in names
        }
        weights = [x.tolist() for table in tables for x in table[-1].get("weights", [])]
        metrics.pop("weights", None)
        return {
            "steps": list(range(0, steps + 1, self.every)),
            "metrics": metrics,
            "weights": [[finite(w) for w in row] for row in weights],
            "lanes": self.lanes,
            "compile_s": compile_s,
            "run_s": seconds,
            "ms_per_step": 1e3 * seconds / steps / len(seeds),
        }

    def programs(self, rate: float, lanes: int) -> tuple[Any, Any]:
        """Compiled `start(seeds, rate)` and `advance(carry, seeds, first, rate)`."""
        key = (None if self.method.traced_rate else rate, lanes)
        if key not in self.compiled:
            traced = self.method.traced_rate

            def start(seeds: jax.Array, given: jax.Array) -> Any:
                return jax.vmap(lambda s: self.start(s, given if traced else rate))(seeds)

            def advance(carry: Any, seeds: jax.Array, first: jax.Array, given: jax.Array) -> Any:
                return self.advance(carry, seeds, first, given if traced else rate)

            seeds, number = jnp.zeros(lanes, jnp.int32), jnp.asarray(rate)
            compiled_start = jax.jit(start).lower(seeds, number).compile()
            carry, _ = jax.eval_shape(start, seeds, number)
            lowered = jax.jit(advance).lower(carry, seeds, jnp.int32(0), number)
            self.compiled[key] = compiled_start, lowered.compile()
        return self.compiled[key]

    def _measured(
        self, start: Any, advance: Any, rate: float, group: list[int], steps: int, label: str
    ) -> Iterator[dict[str, np.ndarray]]:
        seeds, number = jnp.array(group, jnp.int32), jnp.asarray(rate)
        before = time.perf_counter()
        carry, metrics = start(seeds, number)
        yield jax.device_get(metrics)
        for first in range(0, steps, self.every):
            carry, metrics = advance(carry, seeds, jnp.int32(first), number)
            metrics = jax.device_get(metrics)
            name = self.problem.ranked
            spent = time.perf_counter() - before
            figures = " ".join(f"{x:.4g}" for x in metrics[name])
            print(
                f"{label} seeds {group} step {first + self.every}: {name} {figures}, {spent:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            yield metrics

    def start(self, seed: jax.Array, rate: Any) -> Any:
        """What training carries from step to step, and the metrics at the start."""
        params = self.problem.init(seed)
        optimizer, peer = self.method.make(self.problem, rate)
        terms = len(self.problem.losses.names or ())
        state = () if peer is None else peer.init(terms)
        return (params, optimizer.init(params), state), self.problem.metrics(params)

    def advance(self, carry: Any, seeds: jax.Array, first: jax.Array, rate: Any) -> Any:
        """`every` steps from step `first` on, and the metrics after them, for each seed."""
        step = self._turns(rate) if self.method.one_by_one else self._step(rate)

        def together(carry: Any, index: jax.Array) -> Any:
            if self.lanes == "loop":
                # a batch of one would turn the branches on the state into selects
                one = jax.tree.map(lambda x: x[0], carry)
                one, weights = step(one, seeds[0], index)
                return jax.tree.map(lambda x: x[None], (one, weights))
            return jax.vmap(step, in_axes=(0, 0, None))(carry, seeds, index)

        carry, weights = jax.lax.scan(together, carry, first + jnp.arange(self.every))
        metrics = jax.vmap(self.problem.metrics)(carry[0])
        return carry, metrics | {"weights": weights[-1]}

    def _step(self, rate: Any) -> Step:
        """A step with the gradients of all losses."""
        optimizer, peer = self.method.make(self.problem, rate)

        def step(carry: Any, seed: jax.Array, index: jax.Array) -> Any:
            params, state, weighing = carry
            for_batch, for_peer = keys(seed, index)
            args = self.problem.batch(for_batch)
            values, grads = value_and_term_grads(self.problem, params, *args)
            if peer is None:
                total = jax.tree.map(lambda g: g.sum(axis=0), grads)
                given = {"term_grads": grads, "term_values": values, "term_args": args}
                updates, state = optimizer.update(total, state, params, **given)
                weights = optax.tree.get(state, "weights", jnp.ones_like(values))
            else:
                sight = seen(self.problem, params, args, values, grads, index, for_peer)
                weights, weighing = peer.weigh(sight, weighing)
                updates, state = optimizer.update(combine(weights, grads), state, params)
            return (optax.apply_updates(params, updates), state, weighing), weights

        return step

    def _turns(self, rate: Any) -> Step:
        """A step of one update for each loss, each by the gradient of that loss alone."""
        optimizer, _ = self.method.make(self.problem, rate)

        def step(carry: Any, seed: jax.Array, index: jax.Array) -> Any:
            args = self.problem.batch(keys(seed, index)[0])
            params, state, weighing = carry
            for turn, of_one in enumerate(each_value_and_grad(self.problem, params, *args)):
                _, gradient = of_one(params, *args)
                updates, state = optimizer.update(gradient, state, params, turn=jnp.int32(turn))
                params = optax.apply_updates(params, updates)
            return (params, state, weighing), jnp.ones(turn + 1)

        return step


def falling(problem: Problem, steps: int) -> Problem:
    """The problem with rates that fall to 0 by a cosine."""

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return problem.optimizer(optax.cosine_decay_schedule(rate, steps))

    return problem._replace(optimizer=optimizer)


def keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    """The keys of a step's batch and of its weights."""
    stream = jax.random.fold_in(jax.random.key(seed), BATCHES)
    return jax.random.split(jax.random.fold_in(stream, index))


def seen(
    problem: Problem, params: Any, args: Any, values: Any, grads: Any, index: Any, key: Any
) -> Sight:
    """What a rival sees at a step."""

    def traces() -> jax.Array:
        assert problem.traces is not None
        return problem.traces(params, *args)

    return Sight(values, grads, index, key, traces)


def finite(x: Any) -> float | None:
    """A number for JSON, where what diverged is null."""
    return float(x) if math.isfinite(x) else None


if __name__ == "__main__":
    main()
