"""Everything worth measuring on an accelerator, in eight minutes: `python -m bench.device`.

    python -m bench.device --out FOLDER             on a GPU or TPU, all stages
    python -m bench.device --out FOLDER --dry       on a CPU, small sizes: does every stage run?
    python -m bench.device --out FOLDER --stages relaxation batch

Stages come in order of value. Each is a process of its own with its own budget of seconds, and
writes FOLDER/<stage>.json after every row: a run that is cut loses a row, a stage that crashes or
hangs loses itself. FOLDER/summary.json says how each ended, FOLDER/device.json holds the rows of
all, for the documentation. `--seconds` bounds them together; the last, which can use any amount of
time, gets what is left.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bench import stages
from bench.run import about


class Stage(NamedTuple):
    """What is run, for how long at most, and where."""

    run: stages.Run
    seconds: float  # on a device
    dry: float = 120.0  # in a dry run
    cores: int | None = None  # on so many cores of the host instead of the device


STAGES: dict[str, Stage] = {
    "numerics": Stage(stages.numerics, 40),
    "relaxation": Stage(stages.relaxation, 50),
    "allocator": Stage(stages.allocator, 30),
    "batch": Stage(stages.batch, 40),
    "training": Stage(stages.training, 150),
    "two_cores": Stage(stages.two_cores, 60, cores=2),
    "layouts": Stage(stages.layouts, 20),
    "tests": Stage(stages.tests, 70),
    "rivals": Stage(stages.rivals, 400, dry=200),
    "published": Stage(stages.published, 600),
}
SHORTEST = 5.0
"""Seconds below which a stage is not worth starting."""
DRY_AT_ONCE = 2
QUICK = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
)
FINE = {True: ("complete",), False: ("complete", "cut", "not started")}
"""Ends of a stage that are no failure, by whether the run is dry."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/device"))
    parser.add_argument("--dry", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=450, help="for all stages together")
    parser.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only:
        return one(options.only, options.out, options.dry, options.seconds)
    end = time.monotonic() + options.seconds
    summary: dict[str, Any] = {}

    def run(name: str) -> None:
        allowed = STAGES[name].dry if options.dry else STAGES[name].seconds
        summary[name] = apart(name, options.out, options.dry, min(allowed, end - time.monotonic()))
        print(f"{name}: {summary[name]['ended']}, {summary[name]['seconds']:.0f} s", flush=True)
        write(options.out / "summary.json", summary)

    # nothing is measured in a dry run: its stages may disturb each other
    with ThreadPoolExecutor(DRY_AT_ONCE if options.dry else 1) as pool:
        list(pool.map(run, options.stages))
    write(options.out / "device.json", together(options.out, list(summary)))
    bad = [name for name, row in summary.items() if row["ended"] not in FINE[options.dry]]
    print(f"not complete: {', '.join(bad)}" if bad else f"wrote {options.out}", file=sys.stderr)
    return int(bool(bad))


def apart(name: str, out: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """Run a stage in a process of its own, and how it ended."""
    if seconds < SHORTEST:
        return {"ended": "not started", "seconds": 0.0}
    environment = dict(os.environ)
    if STAGES[name].cores is not None:
        environment["JAX_PLATFORMS"] = "cpu"
    # what one stage compiled serves the next, and the next run on this machine
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.absolute() / "programs"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if dry:
        # programs of milliseconds: to optimize them costs more than it saves, as in the tests
        environment.setdefault("XLA_FLAGS", QUICK)
    command = [sys.executable, "-m", "bench.device", "--only", name, "--out", str(out)]
    command += ["--seconds", str(seconds), *["--dry"][: int(dry)]]
    before = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        print((out / f"{name}.log").read_text()[-2000:], file=sys.stderr)
    ended = "cut" if code is None else f"failed with {code}" if code else "complete"
    return {"ended": ended, "seconds": round(time.monotonic() - before, 2)}


def one(name: str, out: Path, dry: bool, seconds: float) -> int:
    """A stage, in this process; its table is written after every row."""
    stage = STAGES[name]
    if stage.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: stage.cores])
    table: dict[str, Any] = {"stage": name, "dry": dry, "about": about(), "rows": []}

    def note(row: dict[str, Any]) -> None:
        table["rows"].append(row)
        write(out / f"{name}.json", table)
        print(row, flush=True)

    stage.run(stages.Job(dry=dry, end=time.monotonic() + 0.95 * seconds, out=out), note)
    return 0


def together(out: Path, names: list[str]) -> dict[str, Any]:
    """The rows of these stages, by name."""
    files = [path for name in names if (path := out / f"{name}.json").exists()]
    tables = [json.loads(path.read_text()) for path in files]
    rows = {table["stage"]: table["rows"] for table in tables}
    return {"about": about(), "dry": any(table["dry"] for table in tables)} | rows


def write(path: Path, content: Any) -> None:
    """The whole file or none of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
