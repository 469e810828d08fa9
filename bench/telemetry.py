"""What live telemetry costs: `python -m bench.telemetry [--smoke] [--out FILE]`.

The same relaxation as one compiled call without any record, and in parts with a record of every
step that goes to CSV, Parquet, TensorBoard and logging while it runs. The two alternate in one
process; the figure is the ratio of their medians.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

import smallgain_jax as sg
from bench.run import about
from smallgain_jax.tools.live import (
    CsvSink,
    LoggingSink,
    ParquetSink,
    TensorBoardSink,
    relax_in_chunks,
)
from smallgain_jax.tools.scenarios import random_graph
from smallgain_jax.tools.telemetry import family_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/telemetry.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=("default", "small_gain"), default=None)
    arguments = parser.parse_args()
    edges, steps = (400, 40) if arguments.smoke else (100_000, 1000)
    report: dict[str, Any] = {"about": about(), "edges": edges, "steps": steps}
    for method in arguments.methods or ("default", "small_gain"):
        report[method] = overhead(method, edges, steps, arguments.repeats)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def overhead(method: str, edges: int, steps: int, repeats: int) -> dict[str, Any]:
    problem = random_graph("uniform", edges // 4, edges, seed=1)
    graph, x0 = problem.graph, problem.x0
    rate = 1 / float(graph.curvature(x0).lipschitz)
    optimizer = None if method == "default" else sg.small_gain(optax.sgd(rate), graph)
    record = family_record(graph)

    def silent() -> Any:
        return sg.relax(graph, x0, optimizer, steps)

    def live() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            sinks = [
                CsvSink(f"{folder}/live.csv"),
                ParquetSink(f"{folder}/live.parquet"),
                TensorBoardSink(f"{folder}/board"),
                LoggingSink(level=logging.INFO),
            ]
            # a tolerance of zero: every step is made, as in one call
            return relax_in_chunks(
                graph, x0, optimizer, steps, (0.0, 1.0), tol=0.0, record=record, sinks=sinks
            )

    seconds: dict[str, list[float]] = {"silent": [], "live": []}
    for turn in range(1 + repeats):
        for name, run in (("silent", silent), ("live", live)):
            spent = timed(run)
            if turn:
                seconds[name].append(spent)
            print(
                f"{method} {name}: {spent:.2f} s{'' if turn else ' (compiling)'}", file=sys.stderr
            )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    result = {
        "seconds": seconds,
        "overhead_median": medians["live"] / medians["silent"] - 1,
        "overhead_least": least["live"] / least["silent"] - 1,
    }
    print(result, file=sys.stderr)
    return result


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
