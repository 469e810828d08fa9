"""Do the units of losses matter? `python -m bench.training.units --out FILE.json`

Every loss is multiplied by a constant of its own, and training with `policy="fair"` starts from the
same seed with the same batches. Reported is the final error over that of the same seed at factors
of 1: for draws of 10^U(-3, 3), for powers of two, which change no digit, and for 1e25 and 1e-25.
"rounding" is what chaos makes of factors within 1e-6 of 1, where there is no unit to speak of.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import smallgain_jax as sg
from bench.run import about
from bench.training.problems import Problem, make
from bench.training.run import BATCHES

CASES = {
    "helmholtz": (1e-3, 3000),
    "advection": (1e-3, 1000),
    "digits": (1.0, 1000),
}
"""Learning rate and steps, reduced from 6,000 and 20,000 for the two networks with physics. Digits
takes gradient descent, which feels a common factor; its rate is relative to the curvature at the
first batch."""
KINDS = ("units", "powers of two", "extreme", "rounding")


def trainer(problem: Problem, rate: float, steps: int) -> Callable[..., dict[str, jax.Array]]:
    """A compiled (seed, factors [K]) -> final error, weights in the units of factors 1, shares."""
    assert problem.losses.names is not None

    def scaled(params: Any, factors: jax.Array, *args: Any) -> dict[str, jax.Array]:
        values = problem.losses.fn(params, *args)
        return {name: factors[k] * value for k, (name, value) in enumerate(values.items())}

    losses = sg.terms(scaled, names=problem.losses.names)
    optimizer = sg.small_gain(problem.optimizer(rate), losses, policy="fair")

    def run(seed: jax.Array, factors: jax.Array) -> dict[str, jax.Array]:
        stream = jax.random.fold_in(jax.random.key(seed), BATCHES)

        def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
            params, state = carry
            args = (factors, *problem.batch(jax.random.fold_in(stream, index)))
            values, gradient = losses.value_and_weighted_grad(state.weights, params, *args)
            updates, state = optimizer.update(
                gradient, state, params, term_args=args, term_values=values, weighted=True
            )
            return (optax.apply_updates(params, updates), state), None

        params = problem.init(seed)
        start = params, optimizer.init(params)
        (params, state), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return {
            "error": problem.metrics(params)[problem.ranked],
            "weights": state.weights * factors,
            "share": state.info.share,
            "rewinds": state.info.rewinds,
        }

    return jax.jit(run)


def factors_of(kind: str, terms: int, draws: int) -> np.ndarray:
    """Factors [draws, terms] of the kind, from a seed of their own."""
    random = np.random.default_rng(18)
    if kind == "units":
        return 10 ** random.uniform(-3, 3, (draws, terms))
    if kind == "powers of two":
        return 2.0 ** random.integers(-10, 11, (draws, terms))
    if kind == "extreme":
        return np.resize([1e25, 1e-25], (draws, terms))
    return 1 + random.uniform(-1e-6, 1e-6, (draws, terms))


def measure(name: str, steps: int | None, seeds: int, draws: int) -> dict[str, Any]:
    """Errors at factors 1 by seed, and ratios to them by kind."""
    rate, usual = CASES[name]
    problem = make(name)
    run = trainer(problem, rate, steps or usual)
    terms = len(problem.losses.names or ())
    ones = np.ones(terms)
    plain = [jax.device_get(run(jnp.int32(seed), jnp.asarray(ones))) for seed in range(seeds)]
    row: dict[str, Any] = {"case": name, "rate": rate, "steps": steps or usual}
    row |= {"errors": [float(p["error"]) for p in plain], "ratios": {}}
    row["weights"] = [p["weights"].tolist() for p in plain]
    print(f"{name}: errors at factors 1 {np.round(row['errors'], 4)}", file=sys.stderr, flush=True)
    few = min(draws, seeds)
    for kind, count in zip(KINDS, (draws, few, few, draws // 2), strict=True):
        ratios = []
        for k, factors in enumerate(factors_of(kind, terms, count)):
            found = run(jnp.int32(k % seeds), jnp.asarray(factors, jnp.float32))
            ratios.append(float(found["error"]) / row["errors"][k % seeds])
        row["ratios"][kind] = ratios
        print(f"{name}, {kind}: {summary(ratios)}", flush=True)
    return row


def summary(ratios: list[float]) -> str:
    """The median of the deviation, and the extremes, of final errors over those at factors 1."""
    off = np.maximum(ratios, 1 / np.asarray(ratios)) - 1
    return (
        f"median deviation {np.median(off):.1%}, ratios {min(ratios):.3f} to {max(ratios):.3f} "
        f"({len(ratios)} draws)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="of every case; its own if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    rows = []
    for name in options.cases:
        rows.append(measure(name, options.steps, options.seeds, options.draws))
        if options.out:
            options.out.write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
