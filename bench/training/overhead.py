"""Time of a step of small_gain over fixed weights: `python -m bench.training.overhead`.

All loops are compiled and run in turns, with the same rate, start and sequence of batches. "fixed
weights" evaluates the gradient of each term, and `small_gain` is given these. "plain" evaluates
that of the sum; `small_gain` "of the sum" is given it and evaluates the losses itself; "weighted"
is given that of the sum by its own weights. `--cases large` is for a GPU.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import smallgain_jax as sg
from bench.run import about
from bench.training import problems
from bench.training.problems import Problem, value_and_term_grads

CHUNKS = {"quadratics": 1000, "digits": 100, "helmholtz": 120, "burgers": 30, "large": 20}
Curvature = Literal["hessian", "difference"]
VARIANTS: list[tuple[int, Curvature]] = [(10, "hessian"), (10, "difference"), (20, "hessian")]
Given = Literal["terms", "sum", "weighted"]
SUFFIX: dict[Given, str] = {"terms": "", "sum": ", of the sum", "weighted": ", weighted"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=CHUNKS, default=["helmholtz", "digits"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    rows = [row for name in options.cases for row in measure(name, options.rounds)]
    if options.out:
        options.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """Median and least time of a step, in ms and over fixed weights'."""
    return compare(problems.make(name), CHUNKS[name], rounds)


def compare(
    problem: Problem,
    chunk: int,
    rounds: int,
    variants: Sequence[tuple[int, Curvature]] | None = None,
    given: Sequence[Given] = ("terms", "sum", "weighted"),
    policy: str = "fair",
) -> list[dict[str, Any]]:
    """Rows of `small_gain` measured in each variant and handed each kind of gradient."""
    rate = problem.rates[min(1, len(problem.rates) - 1)]
    bare = optax.with_extra_args_support(problem.optimizer(rate))
    runs = {"plain": loop(problem, bare, chunk, given="sum")}
    if "terms" in given:
        runs["fixed weights"] = loop(problem, bare, chunk, given="terms")
    for every, curvature in VARIANTS if variants is None else variants:
        optimizer = sg.small_gain(
            problem.optimizer(rate),
            problem.losses,
            policy=policy,
            every=every,
            curvature=curvature,
        )
        label = f"every={every}, {curvature}"
        for kind in given:
            runs[label + SUFFIX[kind]] = loop(problem, optimizer, chunk, given=kind)
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, (run, carry) in runs.items():
            before = time.perf_counter()
            jax.block_until_ready(run(carry, jnp.int32(1000)))
            times[label].append(1e3 * (time.perf_counter() - before) / chunk)
    rows = []
    for label, found in times.items():
        median, least = statistics.median(found), min(found)
        row = {"case": problem.name, "method": label, "ms": median, "least_ms": least}
        if "fixed weights" in times:
            row["over_fixed"] = median / statistics.median(times["fixed weights"])
            row["least_over_fixed"] = least / min(times["fixed weights"])
        row["over_plain"] = median / statistics.median(times["plain"])
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def loop(
    problem: Problem,
    optimizer: optax.GradientTransformationExtraArgs,
    chunk: int,
    *,
    given: Given,
) -> Any:
    """A compiled loop of `chunk` steps, and a state past every warm-up."""
    losses = problem.losses

    def gradient(params: Any, state: Any, args: Any) -> tuple[Any, dict[str, Any]]:
        if given == "sum":
            return jax.grad(lambda p: losses.values(p, *args).sum())(params), {}
        if given == "weighted":
            values, total = losses.value_and_weighted_grad(state.weights, params, *args)
            return total, {"term_values": values, "weighted": True}
        values, grads = value_and_term_grads(problem, params, *args)
        total = jax.tree.map(lambda g: g.sum(axis=0), grads)
        return total, {"term_values": values, "term_grads": grads}

    def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
        params, state = carry
        args = problem.batch(jax.random.fold_in(jax.random.key(0), index))
        total, extra = gradient(params, state, args)
        updates, state = optimizer.update(total, state, params, term_args=args, **extra)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(carry: Any, first: jax.Array) -> Any:
        return jax.lax.scan(step, carry, first + jnp.arange(chunk))[0]

    params = problem.init(jnp.int32(0))
    carry = (params, optimizer.init(params))
    print(f"{problem.name}: compiling, and warming up", file=sys.stderr)
    for k in range(3 + 200 // chunk):
        carry = run(carry, jnp.int32(k * chunk))
    return run, jax.block_until_ready(carry)


if __name__ == "__main__":
    main()
