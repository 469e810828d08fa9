"""Penalties: `python -m bench.penalties [--smoke] [--out FILE]`.

A value-gradient-majorizer pass over 1e7 entries against one fused value-and-gradient pass of the
same penalty, float32; and how far the cheap rows of SoftmaxEntropy lie above the exact ones.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.run import about
from smallgain_jax.penalties import (
    Hoyer,
    JumpReLU,
    LogSparsity,
    Penalty,
    SmoothedL1,
    SoftmaxEntropy,
    TopK,
)

ATOMS = (8, 32, 64, 128, 256, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/penalties.json"))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"about": about(), "smoke": arguments.smoke}
    report["passes"] = list(passes(arguments.smoke))
    report["tightness"] = list(tightness(arguments.smoke))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}", file=sys.stderr)


def penalties() -> dict[str, tuple[Penalty, int]]:
    """Each with the length of a row; 0 for one row of everything."""
    cases: dict[str, tuple[Penalty, int]] = {
        "smoothed L1": (SmoothedL1(0.3), 0),
        "log": (LogSparsity(0.7), 0),
        "Hoyer": (Hoyer(), 0),
        "top 16 of 512": (TopK(16), 512),
        "JumpReLU": (JumpReLU(np.linspace(0.5, 2, 512), 0.25), 512),
    }
    for atoms in ATOMS:
        cases[f"entropy, {atoms} atoms"] = (SoftmaxEntropy(atoms), atoms)
    for atoms in ATOMS:
        cheap = SoftmaxEntropy(atoms, exact_rows=False)
        cases[f"entropy, {atoms} atoms, cheap rows"] = (cheap, atoms)
    return cases


def passes(smoke: bool) -> Any:
    entries = 10_240 if smoke else 10_000_000
    draw = np.random.default_rng(0).normal(size=entries).astype(np.float32)
    for name, (penalty, length) in penalties().items():
        x = jnp.asarray(draw[: entries // max(length, 1) * max(length, 1)])
        x = x.reshape(-1, length) if length else x
        programs: dict[str, Callable[..., Any]] = {
            "gradient": jax.jit(lambda p, x: jax.value_and_grad(lambda x: p(x))(x)),
            "majorizer": jax.jit(lambda p, x: p.value_gradient_majorizer(x)),
        }
        programs = {k: f.lower(penalty, x).compile() for k, f in programs.items()}
        wall: dict[str, list[float]] = {k: [] for k in programs}
        cpu: dict[str, list[float]] = {k: [] for k in programs}
        # interleaved, so that other work on the machine falls on both alike
        for _ in range(2 if smoke else 5):
            for k, program in programs.items():
                start, used = time.perf_counter(), time.process_time()
                jax.block_until_ready(program(penalty, x))
                wall[k].append(time.perf_counter() - start)
                cpu[k].append(time.process_time() - used)
        row = {"penalty": name, "entries": x.size}
        row |= {f"{k}_s": min(wall[k]) for k in programs}
        row["ratio"] = min(wall["majorizer"]) / min(wall["gradient"])
        # processor seconds: what a busy machine cannot distort
        row["cpu_ratio"] = min(cpu["majorizer"]) / min(cpu["gradient"])
        row["within_2"] = bool(row["cpu_ratio"] <= 2)
        print(row, file=sys.stderr, flush=True)
        yield row


def tightness(smoke: bool) -> Any:
    """Cheap rows over exact rows, weighted by the exact ones, and the largest quotient."""
    for atoms in (8, 64, 512):
        for spread in (0.3, 1.0, 3.0):
            draw = np.random.default_rng(1).normal(size=(20 if smoke else 500, atoms)) * spread
            x = jnp.asarray(draw, jnp.float32)
            exact = np.asarray(SoftmaxEntropy(atoms).majorizer_diagonal(x))
            cheap = np.asarray(SoftmaxEntropy(atoms, exact_rows=False).majorizer_diagonal(x))
            quotient = cheap / exact
            row = {"atoms": atoms, "logits_std": spread, "total": float(cheap.sum() / exact.sum())}
            row["largest"] = float(quotient.max())
            print(row, file=sys.stderr, flush=True)
            yield row


if __name__ == "__main__":
    main()
