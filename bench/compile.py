"""What a person waits for: the first call of each public entry, and a second with other numbers.

`python -m bench.compile` prints processor seconds, each entry in a process of its own and imports
apart.
`--against DIR` measures another checkout of the library in the same run, `--out FILE` keeps the
figures. About three minutes for each checkout.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.run import about

ROUNDS = 3

PRELUDE = """
import json, time
import jax, jax.numpy as jnp, numpy as np, optax
import smallgain_jax as sg
start = time.process_time()
marks = []
def mark(value):
    jax.block_until_ready(value)
    marks.append(time.process_time() - start)
def chain(n):
    springs = sg.Quadratic(np.arange(n - 1), np.arange(1, n), np.full(n - 1, 0.5))
    return sg.EnergyGraph(sg.Landau(a=jnp.ones(n)), [springs])
def losses(p):
    y = jnp.tanh(p["x"])
    return {"a": jnp.sum((y - 1) ** 2), "b": 50 * jnp.sum(y ** 2)}
gradient = jax.grad(lambda p: sum(losses(p).values()))
x, p = jnp.full(3, 0.5), {"x": jnp.full(3, 0.3)}
named = sg.terms(losses, names=("a", "b"))
"""

ENTRIES = {
    "relax, 3 nodes": "g = chain(3)\nmark(sg.relax(g, x).x)\nmark(sg.relax(g, x, steps=70).x)",
    "relax, its gradient": (
        "g = chain(3)\nf = jax.grad(lambda w: sg.relax(sg.EnergyGraph(g.local, "
        "[sg.Quadratic([0, 1], [1, 2], w)]), x).x.sum())\n"
        "mark(f(jnp.ones(2)))\nmark(f(2 * jnp.ones(2)))"
    ),
    "small_gain on a graph, update": (
        "g = chain(3)\no = sg.small_gain(optax.sgd(0.1), g)\ns = o.init(x)\nu = jax.jit(o.update)\n"
        "mark(u(g.gradient(x), s, x))\nmark(u(g.gradient(2 * x), s, 2 * x))"
    ),
    "small_gain on losses, init": (
        "o = sg.small_gain(optax.adam(0.1), named)\nmark(o.init(p))\nmark(o.init(p))"
    ),
    "small_gain on losses, update": (
        "o = sg.small_gain(optax.adam(0.1), named)\ns = o.init(p)\nu = jax.jit(o.update)\n"
        "start = time.process_time()\nmark(u(gradient(p), s, p))\nmark(u(gradient(p), s, p))"
    ),
    "curvature, 10 scalings": (
        "g = chain(3)\nmark(g.curvature(x, scaling_iterations=10))\n"
        "mark(g.curvature(2 * x, scaling_iterations=10))"
    ),
    "allocate, 100 terms": (
        "c = jnp.ones((100, 1)) + jnp.arange(100.0)[:, None]\nr = jnp.zeros((100, 1), int)\n"
        "run = lambda c: sg.allocate(jnp.ones(100), c, r, lower=jnp.zeros(100), "
        "upper=jnp.ones(100), row_budget=jnp.ones(1))\nmark(run(c))\nmark(run(2 * c))"
    ),
    "throttle, update": (
        "o = sg.throttle(optax.sgd(0.1), learning_rate=0.1)\ns = o.init(p)\nu = jax.jit(o.update)\n"
        "mark(u(gradient(p), s, p))\nmark(u(gradient(p), s, p))"
    ),
    "kappa_budget, update": (
        "o = sg.kappa_budget(2.0)\nm = {'w': jnp.eye(3)}\ns = o.init(m)\nu = jax.jit(o.update)\n"
        "mark(u(m, s, m))\nmark(u(m, s, m))"
    ),
}


def measure(entry: str, checkout: Path) -> list[float] | None:
    """Processor seconds of the first and of the second call; the least of a few processes."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    program = f"{PRELUDE}\n{ENTRIES[entry]}\nprint(json.dumps(marks))"
    found = []
    for _ in range(ROUNDS):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=checkout,  # `-c` puts the working directory first on the path
            capture_output=True,
            text=True,
        )
        if run.returncode:
            print(f"{entry}: {run.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return None
        first, second = json.loads(run.stdout.splitlines()[-1])
        found.append([first, second - first])
    return [min(column) for column in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    against, rows = options.against, []
    here = Path(__file__).parents[1]
    for entry in ENTRIES:
        row: dict[str, Any] = {"entry": entry}
        for suffix, checkout in (
            [("", here)] if against is None else [("", here), (" before", against.resolve())]
        ):
            first, second = measure(entry, checkout) or (None, None)
            row |= {f"first{suffix}": first, f"second{suffix}": second}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out is not None:
            report = {"about": about(), "rows": rows}
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
