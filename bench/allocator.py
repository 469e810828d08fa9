"""The allocator at scale against its rivals: `python -m bench.allocator [--smoke] [--out FILE]`.

Every method serves the same random problem in one process, turn by turn. Wall time suffers from
whatever else the machine does; processor time (all threads) suffers less, so both are written.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np

import smallgain_jax as sg
from bench.run import about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/allocator.json"))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    terms, rows = (1000, 100) if arguments.smoke else (1_000_000, 100_000)
    report: dict[str, Any] = {"about": about(), "terms": terms, "rows": rows, "spreads": {}}
    for spread in (0.3, 1.0, 3.0):
        report["spreads"][spread] = compare(problem(terms, rows, spread), arguments.repeats)
        for name, row in report["spreads"][spread].items():
            print(f"spread {spread}  {name:28s} {row}", file=sys.stderr)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


Problem = tuple[np.ndarray, ...]


def problem(terms: int, num_rows: int, spread: float) -> Problem:
    """Edges of a uniform graph, log-normal values, budgets a random part of the full demand."""
    rng = np.random.default_rng(0)
    i = rng.integers(num_rows, size=terms)
    rows = np.stack([i, (i + rng.integers(1, num_rows, size=terms)) % num_rows], axis=1)
    weight, a, b = rng.uniform(0.1, 2, terms), *rng.uniform(0.5, 1.5, (2, terms))
    cost = 2 * weight[:, None] * np.stack([a * (a + b), b * (a + b)], axis=1)
    value, lower, upper = rng.lognormal(0, spread, terms), np.full(terms, 0.9), np.full(terms, 1.1)
    full = np.zeros(num_rows)
    np.add.at(full, rows, cost * 0.2)
    floats = [f.astype(np.float32) for f in (value, cost, lower, upper)]
    budget = (full * rng.random(num_rows)).astype(np.float32)
    return floats[0], floats[1], rows.astype(np.int32), floats[2], floats[3], budget


@numba.njit
def serve(
    order: np.ndarray, cost: np.ndarray, rows: np.ndarray, room: np.ndarray, budget: np.ndarray
) -> np.ndarray:
    """The sequential greedy, one term after the other."""
    left, taken = budget.copy(), np.zeros_like(room)
    for k in order:
        raised = room[k]
        for q in range(rows.shape[1]):
            if cost[k, q] > 0:
                raised = min(raised, left[rows[k, q]] / cost[k, q])
        taken[k] = raised
        for q in range(rows.shape[1]):
            left[rows[k, q]] -= cost[k, q] * raised
    return taken


def sequential(data: Problem) -> np.ndarray:
    value, cost, rows, lower, upper, budget = data
    order = np.argsort(-value / cost.sum(axis=1))
    return lower + serve(order, cost, rows, upper - lower, budget)


def scanned(data: tuple[jax.Array, ...]) -> jax.Array:
    """The sequential greedy as one `lax.scan`: a gather and a scatter a step."""
    value, cost, rows, lower, upper, budget = data
    order = jnp.argsort(-value / jnp.sum(cost, axis=1))

    def step(left: jax.Array, k: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        row, price, room = k
        raised = jnp.minimum(room, jnp.min(left[row] / price))
        return left.at[row].add(-price * raised, mode="promise_in_bounds"), raised

    entries = (rows[order], cost[order], (upper - lower)[order])
    taken = jax.lax.scan(step, budget, entries)[1]
    return lower.at[order].add(taken)


def packed_sort(data: tuple[jax.Array, ...]) -> jax.Array:
    """The yardstick's first part: one sort of score and index in a 64-bit key."""
    value, cost, *_ = data
    score = jax.lax.bitcast_convert_type(value / jnp.sum(cost, axis=1), jnp.uint32)
    with jax.enable_x64(True):
        index = jnp.arange(score.shape[0], dtype=jnp.uint64)
        return jax.lax.sort((score.astype(jnp.uint64) << 32) | index, is_stable=False)


def segmented_scan(data: tuple[jax.Array, ...]) -> jax.Array:
    """The yardstick's second part: one segmented associative scan."""
    value, _, rows, *_ = data
    starts = rows[:, 0] % 10 == 0

    def combine(left: Any, right: Any) -> Any:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(combine, (starts, value))[1]


def compare(host: Problem, repeats: int) -> dict[str, dict[str, float]]:
    data = tuple(jnp.asarray(field) for field in host)

    def ours(**settings: Any) -> Callable[[], jax.Array]:
        run = jax.jit(lambda *fields: sg.allocate(*fields, **settings).weights)
        return lambda: run(*data)

    methods: dict[str, Callable[[], Any]] = {
        "numba greedy, numpy argsort": lambda: sequential(host),
        "packed sort": partial(jax.jit(packed_sort), data),
        "segmented scan": partial(jax.jit(segmented_scan), data),
        "bins=16 rounds=2": ours(bins=16, rounds=2),
        "bins=16 rounds=3": ours(bins=16, rounds=3),
        "bins=32 rounds=3": ours(bins=32, rounds=3),
        "sorted rounds=2": ours(repricings=0, rounds=2),
        "sequential lax.scan": partial(jax.jit(scanned), data),
    }
    table: dict[str, dict[str, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for turn in range(1 + repeats):
        for name, method in methods.items():
            wall, processor = time.perf_counter(), time.process_time()
            weights = jax.block_until_ready(method())
            spent = time.perf_counter() - wall, time.process_time() - processor
            if turn:
                times[name].append(spent)
                continue
            table[name] = {"first_s": spent[0]}
            if name not in ("packed sort", "segmented scan"):
                table[name] |= quality(host, np.asarray(weights, float))
    reference = table["numba greedy, numpy argsort"]["value"]
    for name, row in table.items():
        if "value" in row:
            row["share_of_sequential"] = row["value"] / reference
        for k, kind in enumerate(("wall", "processor")):
            seconds = [pair[k] for pair in times[name]]
            row[f"{kind}_median_s"] = statistics.median(seconds)
            row[f"{kind}_least_s"] = min(seconds)
    return table


def quality(host: Problem, weights: np.ndarray) -> dict[str, float]:
    value, cost, rows, lower, _, budget = host
    raised = weights - lower
    spent = np.zeros(len(budget))
    np.add.at(spent, rows, cost * raised[:, None])
    # weights are float32 near 1: their last bit is what a spent budget is known to
    last_bit = np.zeros(len(budget))
    np.add.at(last_bit, rows, cost * np.spacing(weights.astype(np.float32))[:, None])
    return {
        "value": float(value @ raised),
        "worst_excess_in_last_bits": float(np.max((spent - budget) / last_bit)),
    }


if __name__ == "__main__":
    main()
