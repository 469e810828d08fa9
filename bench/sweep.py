"""A sweep in one program against separate runs: `python -m bench.sweep [--smoke] [--out FILE]`.

A thousand settings of `small_gain` on each published scenario, 60 steps, through `run_sweep`: all
designs of a scenario are one call of one compiled program, compilation included in its time.
Separate runs take one setting each: in this process, where the setting is part of the program, so
that each compiles; or in a process of their own, which starts Python and JAX as well. Few of those
are timed, and the time of all is their median times the number of runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import smallgain_jax as sg
from bench.run import about
from smallgain_jax.tools.suites import Suite
from smallgain_jax.tools.sweep import Range, Sweep, run_sweep

STEPS = 60
SETTINGS = {
    "learning_rate": Range(0.05, 2.0, log=True),
    "budget_fraction": Range(0.3, 0.95),
    "max_step_change": Range(0.02, 0.5, log=True),
    "floor": Range(0.05, 0.9),
    "ceiling": Range(1.1, 5.0),
    "ema": Range(0.1, 1.0),
    "target": Range(0.5, 0.95),
}
SEPARATE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/sweep.json"))
    parser.add_argument("--one", nargs=2, metavar=("SCENARIO", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one[0], int(arguments.one[1]))
        return
    report = {"about": about(), **(measured(8, 1) if arguments.smoke else measured(1000))}
    print(json.dumps(report, indent=1))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def measured(size: int, separate: int = SEPARATE) -> dict[str, Any]:
    names = ("baseline", "dense16")
    sweep = Sweep(
        suites=tuple(Suite(generator=name) for name in names),
        settings=SETTINGS,
        design="random",
        size=size,
        chunk=size,
        steps=STEPS,
    )
    start = time.perf_counter()
    result = run_sweep(sweep, progress=lambda line: print(line, file=sys.stderr))
    whole = time.perf_counter() - start
    assert len(result.table["gap"]) == len(names) * size

    here, alone = [], []
    for seed in range(separate):
        for name in names:
            start = time.perf_counter()
            one(name, seed)
            here.append(time.perf_counter() - start)
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "bench.sweep", "--one", name, str(seed)], check=True
            )
            alone.append(time.perf_counter() - start)
    runs = len(names) * size
    return {
        "settings": size,
        "scenarios": list(names),
        "steps": STEPS,
        "sweep_s": whole,
        "run_in_this_process_s": here,
        "run_in_its_own_process_s": alone,
        "separate_runs_in_the_time_of_the_sweep": whole / statistics.median(here),
        "times_faster_than_one_process_each": runs * statistics.median(alone) / whole,
    }


def one(name: str, seed: int) -> None:
    """A single setting on a published scenario, as a user would write it."""
    with jax.enable_x64(True):
        scenario = Suite(generator=name).build()
        rng = np.random.default_rng(seed)
        setting = {key: drawn(given, rng) for key, given in SETTINGS.items()}
        bound = float(scenario.graph.curvature(scenario.x0).lipschitz)
        base = optax.sgd(setting.pop("learning_rate") / bound)
        optimizer = sg.small_gain(base, scenario.graph, **setting)
        result = sg.relax(scenario.graph, scenario.x0, optimizer, STEPS)
        jax.block_until_ready(result.energy)


def drawn(given: Range, rng: np.random.Generator) -> float:
    if given.log:
        return float(np.exp(rng.uniform(np.log(given.low), np.log(given.high))))
    return float(rng.uniform(given.low, given.high))


if __name__ == "__main__":
    main()
