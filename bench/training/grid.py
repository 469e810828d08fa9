"""All rivals of a problem at once: `python -m bench.training.grid --case wave --out FILE.json`.

Every method that weighs the losses for the problem's own optimizer, at every rate, from every seed,
is a lane of one program; a method that is an optimizer of its own has a program for its rates and
seeds. That is how an accelerator trains hundreds of small networks in the time of a few. The file
is that of `bench.training.run`, for `bench.training.report`; it is written at each measurement.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.run import about
from bench.training import problems
from bench.training.methods import METHODS
from bench.training.peers import combine
from bench.training.problems import Problem, value_and_term_grads
from bench.training.run import Trainer, finite, keys, seen

RIVALS = tuple(name for name in METHODS if not name.startswith("small_gain"))
OURS = ("small_gain", "small_gain_reference")


class Program(NamedTuple):
    """Methods that are trained together, [M] of them at [R] rates from [S] seeds."""

    methods: tuple[str, ...]
    start: Callable[[], Any]  # carry, metrics [M, R, S]
    advance: Callable[[Any, jax.Array], Any]  # from a step on: carry, metrics and weights


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=problems.NAMES, required=True)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*RIVALS, *OURS])
    parser.add_argument("--rates", nargs="*", type=float, help="one grid for every method")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=500, help="steps between measurements")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    problem = problems.make(options.case)
    steps = options.steps or problem.steps
    if steps % options.every:
        parser.error(f"--steps {steps} must be a multiple of --every {options.every}")
    rates = options.rates or list(problem.rates)
    settings = {"case": problem.name, "metric": problem.ranked, "steps": steps}
    settings |= {"every": options.every, "seeds": list(range(options.seeds))}
    report: dict[str, Any] = {"about": about(), "settings": settings, "cells": {}}
    for program in programs(problem, options.methods, rates, options.seeds, options.every):
        for cells in train(program, rates, steps, options.every):
            report["cells"] |= cells
            partial = options.out.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            partial.replace(options.out)
            line = best(cells, problem.ranked)
            print(f"{problem.name} {line}", file=sys.stderr, flush=True)


def programs(
    problem: Problem, methods: list[str], rates: list[float], seeds: int, every: int
) -> list[Program]:
    """Ours first, each alone; then those with an optimizer of their own; then all rivals."""
    lanes = jnp.asarray(rates), jnp.arange(seeds, dtype=jnp.int32)
    own = [name for name in methods if METHODS[name].make(problem, rates[0])[1] is None]
    together = tuple(name for name in methods if name not in own)
    own.sort(key=lambda name: name not in OURS)
    found = [_alone(problem, name, *lanes, every) for name in own]
    return [*found, *([_together(problem, together, *lanes, every)] if together else [])]


def _alone(problem: Problem, name: str, rates: jax.Array, seeds: jax.Array, every: int) -> Program:
    trainer = Trainer(problem, METHODS[name], every)
    trainer.lanes = "vmap"

    def start() -> Any:
        return jax.vmap(lambda rate: jax.vmap(lambda seed: trainer.start(seed, rate))(seeds))(rates)

    def advance(carry: Any, first: jax.Array) -> Any:
        return jax.vmap(lambda carry, rate: trainer.advance(carry, seeds, first, rate))(
            carry, rates
        )

    def one(run: Callable[..., Any]) -> Callable[..., Any]:
        """With an axis of one method in the metrics."""

        def wrapped(*args: Any) -> Any:
            carry, metrics = run(*args)
            return carry, jax.tree.map(lambda x: x[None], metrics)

        return wrapped

    return Program((name,), jax.jit(one(start)), jax.jit(one(advance)))


def _together(
    problem: Problem, methods: tuple[str, ...], rates: jax.Array, seeds: jax.Array, every: int
) -> Program:
    """Gradients and optimizer of all lanes in one pass; each rule sees its own lanes."""
    terms = len(problem.losses.names or ())
    shape = (len(methods), len(rates), len(seeds))

    def over(fn: Callable[..., Any], *axes: tuple[int | None, ...]) -> Callable[..., Any]:
        for axis in axes:
            fn = jax.vmap(fn, axis)
        return fn

    def start() -> Any:
        def lane(seed: jax.Array, rate: jax.Array) -> Any:
            params = problem.init(seed)
            return (params, problem.optimizer(rate).init(params)), problem.metrics(params)

        def rule(name: str) -> Any:
            def init(rate: jax.Array) -> Any:
                return METHODS[name].make(problem, rate)[1].init(terms)  # type: ignore[union-attr]

            return over(lambda _, rate: init(rate), (0, None), (None, 0))(seeds, rates)

        (params, state), metrics = over(lane, (0, None), (None, 0))(seeds, rates)
        everywhere = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (len(methods), *x.shape)), (params, state, metrics)
        )
        return (*everywhere[:2], tuple(map(rule, methods))), everywhere[2]

    def step(carry: Any, index: jax.Array) -> Any:
        params, state, rules = carry
        pairs = jax.vmap(lambda seed: keys(seed, index))(seeds)
        args = jax.vmap(problem.batch)(pairs[:, 0])
        measure = over(
            lambda p, given: value_and_term_grads(problem, p, *given), (0, 0), (0, None), (0, None)
        )
        values, grads = measure(params, args)
        moved, weights = [], []
        for place, name in enumerate(methods):

            def weigh(
                given: Any, rule: Any, args: Any, key: Any, rate: Any, name: str = name
            ) -> Any:
                params, values, grads = given
                sight = seen(problem, params, args, values, grads, index, key)
                peer = METHODS[name].make(problem, rate)[1]
                assert peer is not None
                return peer.weigh(sight, rule)

            given = jax.tree.map(lambda x, place=place: x[place], (params, values, grads))
            run = over(weigh, (0, 0, 0, 0, None), (0, 0, None, None, 0))
            found, rule = run(given, rules[place], args, pairs[:, 1], rates)
            moved.append(rule)
            weights.append(found)

        def descend(params: Any, state: Any, grads: Any, weights: Any, rate: Any) -> Any:
            optimizer = problem.optimizer(rate)
            updates, state = optimizer.update(combine(weights, grads), state, params)
            return optax.apply_updates(params, updates), state

        weight = jnp.stack(weights)
        inner = (0, 0, 0, 0)
        descended = over(descend, (*inner, None), (*inner, 0), (*inner, None))
        params, state = descended(params, state, grads, weight, rates)
        return (params, state, tuple(moved)), weight

    def advance(carry: Any, first: jax.Array) -> Any:
        carry, weights = jax.lax.scan(step, carry, first + jnp.arange(every))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), carry[0])
        metrics = jax.lax.map(problem.metrics, flat, batch_size=16)
        metrics = jax.tree.map(lambda x: x.reshape(shape), metrics)
        return carry, metrics | {"weights": weights[-1]}

    return Program(methods, jax.jit(start), jax.jit(advance))


def train(program: Program, rates: list[float], steps: int, every: int) -> Any:
    """The cells so far, of every method and rate, at each measurement."""
    before = time.perf_counter()
    carry, metrics = jax.block_until_ready(program.start())
    run = program.advance.lower(carry, jnp.int32(0)).compile()  # type: ignore[attr-defined]
    compile_s = time.perf_counter() - before
    tables, seconds = [jax.device_get(metrics)], 0.0
    for first in range(0, steps, every):
        before = time.perf_counter()
        carry, metrics = run(carry, jnp.int32(first))
        metrics = jax.device_get(metrics)
        seconds += time.perf_counter() - before
        weights = metrics.pop("weights")
        tables.append(metrics)
        done = first + every
        lanes = weights[..., 0].size
        facts = {"steps": list(range(0, done + 1, every)), "lanes": "grid"}
        facts |= {"compile_s": compile_s, "run_s": seconds}
        facts |= {"ms_per_step": 1e3 * seconds / done / lanes}
        yield {
            f"{name} {rate:g}": {"method": name, "rate": rate}
            | facts
            | {
                "metrics": {
                    key: [[finite(x) for x in table[key][m, r]] for table in tables]
                    for key in tables[0]
                },
                "weights": [[finite(w) for w in row] for row in np.asarray(weights)[m, r]],
            }
            for m, name in enumerate(program.methods)
            for r, rate in enumerate(rates)
        }


def best(cells: dict[str, Any], metric: str) -> str:
    """A line for the log: steps, time, and the lowest median among the cells."""
    medians = {
        key: float(np.median([np.inf if x is None else x for x in cell["metrics"][metric][-1]]))
        for key, cell in cells.items()
    }
    key = min(medians, key=medians.__getitem__)
    cell = cells[key]
    return f"step {cell['steps'][-1]}, {cell['run_s']:.1f} s: {key} has {medians[key]:.4g}"


if __name__ == "__main__":
    main()
