"""The allocator from 10 to 10^7 terms: `python -m bench.allocator [--smoke] [--out FILE]`.

At every size the default, the formulations it chooses among, and its rivals (numba's sequential
greedy with NumPy's argsort; HiGHS, up to 10^4 terms) serve the same random problem in one process,
turn by turn. Wall time suffers from whatever else the machine does; processor time (all threads)
suffers less, so both are written, least of all turns.

`--quality N` times nothing: it compares the default with HiGHS on N random problems of each of four
sizes, costs and values spread over 10^-1..10^1, and prints quantiles of the share of the optimum.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

import smallgain_jax as sg
from bench.run import about

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
TIGHTNESS = (1.0, 0.2)
"""Budgets are this times a random part, one half on average, of what all terms together ask for."""
SPREAD = ((24, 10, 2), (48, 16, 2), (48, 16, 3), (240, 60, 2))
"""Terms, rows, and rows that a term touches, of the problems that `--quality` asks about."""
GREEDY, LINEAR = "numba greedy, numpy argsort", "linear program, HiGHS"
"""The rivals."""
PRICED, SOLVED = 100_000, 10_000
"""Sizes up to which prices and HiGHS are run at all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/allocator.json"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--largest", type=float, default=SIZES[-1])
    parser.add_argument("--quality", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    if arguments.quality:
        for size in SPREAD:
            print(shares_of_optimum(*size, arguments.quality), flush=True)
        return
    largest = 1000 if arguments.smoke else arguments.largest
    report: dict[str, Any] = {"about": about(), "curve": []}
    for terms in (size for size in SIZES if size <= largest):
        for tightness in TIGHTNESS:
            host = problem(terms, max(terms // 10, 3), 1.0, tightness)
            for name, row in compare(host, arguments.repeats).items():
                case = {"terms": terms, "tightness": tightness, "method": name}
                report["curve"].append(case | row)
                print(case | row, file=sys.stderr, flush=True)
        report["rows"] = summary(report["curve"])
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def summary(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The default beside the greedy and the optimum, a row for each problem."""
    found: dict[tuple[int, float], dict[str, dict[str, Any]]] = {}
    for row in curve:
        found.setdefault((row["terms"], row["tightness"]), {})[row["method"]] = row
    return [
        {
            "terms": terms,
            "budgets, of demand": tightness / 2,
            "ms": 1e3 * by["default"]["wall_least_s"],
            "ms, greedy in numba": 1e3 * by[GREEDY]["wall_least_s"],
            "value over greedy's": by["default"][f"share_of {GREEDY}"],
            "value over optimum": by["default"].get(f"share_of {LINEAR}"),
        }
        for (terms, tightness), by in found.items()
    ]


Problem = tuple[np.ndarray, ...]


def problem(terms: int, num_rows: int, spread: float, tightness: float = 1.0) -> Problem:
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
    budget = (tightness * full * rng.random(num_rows)).astype(np.float32)
    return floats[0], floats[1], rows.astype(np.int32), floats[2], floats[3], budget


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


@cache
def compiled_serve() -> Callable[..., np.ndarray]:
    import numba

    return numba.njit(serve)


def sequential(data: Problem) -> np.ndarray:
    value, cost, rows, lower, upper, budget = data
    order = np.argsort(-value / cost.sum(axis=1))
    return lower + compiled_serve()(order, cost, rows, upper - lower, budget)


def optimal(data: Problem) -> np.ndarray:
    """The linear program, by HiGHS."""
    value, cost, rows, lower, upper, budget = (np.asarray(field, float) for field in data)
    terms, width = cost.shape
    entries = (cost.ravel(), (rows.ravel().astype(int), np.repeat(np.arange(terms), width)))
    matrix = csr_matrix(entries, shape=(len(budget), len(value)))
    bounds = np.stack([0 * value, upper - lower], axis=1)
    return lower + linprog(-value, A_ub=matrix, b_ub=budget, bounds=bounds).x


def spread_problem(rng: np.random.Generator, terms: int, num_rows: int, width: int) -> Problem:
    """Costs and values of two decades, which a fixed price per row misjudges."""
    rows = np.stack([rng.permutation(num_rows)[:width] for _ in range(terms)])
    value, cost = 10 ** rng.uniform(-1, 1, terms), 10 ** rng.uniform(-1, 1, (terms, width))
    room, full = rng.uniform(0.1, 1, terms), np.zeros(num_rows)
    np.add.at(full, rows, cost * room[:, None])
    return value, cost, rows, np.zeros(terms), room, full * rng.random(num_rows)


def shares_of_optimum(terms: int, num_rows: int, width: int, count: int) -> dict[str, float]:
    """Value of the default over HiGHS's on `count` problems: median, low quantiles, least."""
    rng = np.random.default_rng(7)
    solve = jax.jit(jax.vmap(lambda *fields: sg.allocate(*fields).weights))
    shares: list[float] = []
    while len(shares) < count:
        problems = [spread_problem(rng, terms, num_rows, width) for _ in range(100)]
        batch = [np.stack(field) for field in zip(*problems, strict=True)]
        for data, weights in zip(problems, np.asarray(solve(*batch), float), strict=True):
            shares.append(float(data[0] @ weights / (data[0] @ optimal(data))))
    low = {f"quantile_{q:g}": float(np.quantile(shares, q)) for q in (0.5, 0.01, 0.001)}
    size = {"terms": terms, "rows": num_rows, "width": width, "problems": len(shares)}
    return size | low | {"least": min(shares)}


def compare(host: Problem, repeats: int) -> dict[str, dict[str, float]]:
    data, terms = tuple(jnp.asarray(field) for field in host), len(host[0])

    def ours(**settings: Any) -> Callable[[], jax.Array]:
        run = jax.jit(lambda *fields: sg.allocate(*fields, **settings).weights)
        return lambda: run(*data)

    methods: dict[str, Callable[[], Any]] = {
        GREEDY: lambda: sequential(host),
        "default": ours(),
        "classes, bins=16 rounds=2": ours(bins=16, rounds=2),
        "classes, bins=32 rounds=3": ours(bins=32, rounds=3),
    }
    if terms <= PRICED:
        methods["prices, bins=0"] = ours(bins=0)
    if terms <= SOLVED:
        methods[LINEAR] = lambda: optimal(host)
    table: dict[str, dict[str, float]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for turn in range(1 + repeats):
        for name, method in methods.items():
            wall, processor = time.perf_counter(), time.process_time()
            weights = jax.block_until_ready(method())
            spent = time.perf_counter() - wall, time.process_time() - processor
            if turn:
                times[name].append(spent)
            else:
                table[name] = {"first_s": spent[0]} | quality(host, np.asarray(weights, float))
    for name, row in table.items():
        for rival in (GREEDY, LINEAR):
            if rival in table:
                row[f"share_of {rival}"] = row["value"] / table[rival]["value"]
        for k, kind in enumerate(("wall", "processor")):
            row[f"{kind}_least_s"] = min(pair[k] for pair in times[name])
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
