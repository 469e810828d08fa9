"""Throttle and kappa: `python -m bench.throttle [--smoke] [--out FILE] [--cases NAME ...]`.

Every rate and rival runs in the same process, from the same starts, for the same number of steps.
Costs are medians of interleaved repetitions; trust ratios within one file, never absolute times.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from bench.run import about
from smallgain_jax.networks.certificate import lipschitz_certificate
from smallgain_jax.networks.kappa import kappa_budget
from smallgain_jax.throttling import throttle

GRID = (0.05, 0.1, 0.2, 0.4)
"""Rates for plain gradient descent on the digits; factors of two."""


class MalitskyMishchenkoState(NamedTuple):
    """State of `malitsky_mishchenko`."""

    count: jax.Array  # type: ignore[assignment]
    rate: jax.Array
    ratio: jax.Array
    params: Any
    grad: Any


def malitsky_mishchenko(first_rate: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive gradient descent without descent (Malitsky and Mishchenko 2020, algorithm 1).

    $\lambda_k = \min(\sqrt{1 + \theta_{k-1}}\,\lambda_{k-1},
    \|x_k - x_{k-1}\| / (2 \|g_k - g_{k-1}\|))$, $\theta_k = \lambda_k / \lambda_{k-1}$.
    """

    def init(params: Any) -> MalitskyMishchenkoState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        zero = jnp.zeros((), jnp.int32)
        rate = jnp.asarray(first_rate, jnp.result_type(float))
        return MalitskyMishchenkoState(zero, rate, jnp.zeros_like(rate), zeros, zeros)

    def update(
        updates: Any, state: MalitskyMishchenkoState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MalitskyMishchenkoState]:
        del extra_args
        step = optax.tree.norm(optax.tree.sub(params, state.params))
        change = optax.tree.norm(optax.tree.sub(updates, state.grad))
        secant = jnp.where(change > 0, step / (2 * jnp.where(change > 0, change, 1)), jnp.inf)
        rate = jnp.minimum(jnp.sqrt(1 + state.ratio) * state.rate, secant)
        rate = jnp.where(state.count > 0, rate, state.rate)
        # theta_0 is infinite: the second step is the secant's alone
        rate = jnp.where((state.count == 1) & jnp.isfinite(secant), secant, rate)
        moved = jax.tree.map(lambda g: -rate * g, updates)
        count = optax.safe_increment(state.count)
        return moved, MalitskyMishchenkoState(count, rate, rate / state.rate, params, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def quadratics(smoke: bool) -> list[dict[str, Any]]:
    """Share of random quadratics on which ||g|| falls by 1e-3, and in how many steps."""
    num, dim, steps = (20, 12, 2000) if smoke else (1000, 12, 10_000)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((num, dim, dim)))[0]
    cond, top = 10 ** rng.uniform(0, 4, num), 10 ** rng.uniform(-2, 2, num)
    exponents = rng.uniform(0, 1, (num, dim))
    exponents[:, :2] = [0, 1]
    values = top[:, None] * cond[:, None] ** -exponents
    hessian = (basis * values[:, None, :]) @ basis.transpose(0, 2, 1)
    rate = 2 / top * 10 ** rng.uniform(0, 3, num)
    problems = [np.asarray(a, np.float32) for a in (hessian, rng.standard_normal((num, dim)), rate)]
    methods: dict[str, Callable[[Any], Any]] = {
        "plain": optax.sgd,
        "throttle": lambda r: throttle(optax.sgd(r), r),
        "throttle, chi 1": lambda r: throttle(optax.sgd(r), r, chi=1.0),
        "formula": lambda r: throttle(optax.sgd(r), r, tolerance=None),
        "formula, order 1": lambda r: throttle(optax.sgd(r), r, order=1, tolerance=None),
        "formula, order 2": lambda r: throttle(optax.sgd(r), r, order=2, tolerance=None),
        "formula, chi 1": lambda r: throttle(optax.sgd(r), r, chi=1.0, tolerance=None),
        "Malitsky-Mishchenko": lambda r: malitsky_mishchenko(1e-3),
    }
    table = []
    for name, make in methods.items():

        def run(hessian: Any, x: Any, rate: Any, make: Callable[[Any], Any] = make) -> jax.Array:
            optimizer = make(rate)

            def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
                x, state = carry
                updates, state = optimizer.update(hessian @ x, state, x)
                return (optax.apply_updates(x, updates), state), jnp.linalg.norm(hessian @ x)

            return jax.lax.scan(step, (x, optimizer.init(x)), length=steps)[1]

        norms = np.asarray(jax.jit(jax.vmap(run))(*problems))
        below = norms <= 1e-3 * norms[:, :1]
        solved = below.any(axis=1)
        taken = below.argmax(axis=1)[solved]
        rise = float(np.nanmax(norms / norms[:, :1]))
        table.append(
            {
                "method": name,
                "converged": float(solved.mean()),
                "median steps": float(np.median(taken)) if solved.any() else None,
                "most steps": int(taken.max()) if solved.any() else None,
                "largest rise": rise if math.isfinite(rise) else None,
            }
        )
        print(table[-1], file=sys.stderr)
    return table


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs x/16 - 0.3 [1797, 64], digits one-hot [1797, 10], parities one-hot [1797, 2]."""
    data = load_digits()
    label = data.target
    return (
        (data.data / 16 - 0.3).astype(np.float32),
        np.eye(10, dtype=np.float32)[label],
        np.eye(2, dtype=np.float32)[label % 2],
    )


def dense(rng: np.random.Generator, outputs: int, inputs: int) -> dict[str, np.ndarray]:
    weight = rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)
    return {"w": weight.astype(np.float32), "b": np.zeros(outputs, np.float32)}


def network(seed: int, width: int = 64, heads: tuple[int, ...] = (10, 2)) -> dict[str, Any]:
    """Parameters of a tanh trunk 64-width-width-width with linear heads."""
    rng = np.random.default_rng(seed)
    trunk = [dense(rng, width, 64), dense(rng, width, width), dense(rng, width, width)]
    return {"trunk": trunk, "heads": [dense(rng, size, width) for size in heads]}


def outputs(params: Any, x: jax.Array) -> list[jax.Array]:
    for layer in params["trunk"]:
        x = jnp.tanh(x @ layer["w"].T + layer["b"])
    return [x @ head["w"].T + head["b"] for head in params["heads"]]


def objective(params: Any, x: jax.Array, *targets: jax.Array) -> jax.Array:
    """Half squared error, summed over outputs and heads, mean over rows."""
    pairs = zip(outputs(params, x), targets, strict=True)
    return sum(0.5 * jnp.mean(jnp.sum((out - t) ** 2, axis=1)) for out, t in pairs)


def train(make: Callable[[], Any], seed: int, steps: int, disturb: Any = None) -> np.ndarray:
    """Losses [steps] on clean data; `disturb(x, t)` changes what the gradient sees at step t."""
    x, digit, parity = (array[:1000] for array in digits())
    optimizer = make()

    def run(params: Any, x: Any, digit: Any, parity: Any) -> jax.Array:
        def step(carry: Any, t: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            seen = x if disturb is None else disturb(x, t)
            value, grads = jax.value_and_grad(objective)(params, seen, digit, parity)
            updates, state = optimizer.update(
                grads, state, params, term_args=(seen, digit, parity), grad=grads
            )
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[1]

    return np.asarray(jax.jit(run)(network(seed), x, digit, parity))


def networks(smoke: bool) -> list[dict[str, Any]]:
    """Final loss on the digits over the best of the grid, by method and rate."""
    seeds, steps = (1, 30) if smoke else (5, 2000)
    best = []
    for seed in range(seeds):
        last = [
            train(lambda r=r: optax.with_extra_args_support(optax.sgd(r)), seed, steps)[-1]
            for r in GRID
        ]
        best.append(float(np.nanmin(last)))
        print(seed, dict(zip(GRID, map(float, last), strict=True)), file=sys.stderr)
    table = [{"method": "plain, best of grid", "loss": best}]
    settings = {
        "throttle": {},
        "throttle, chi 1.75": {"chi": 1.75},
        "formula": {"tolerance": None},
        "formula, chi 2": {"chi": 2.0, "tolerance": None},
        "formula, chi 2, hvp": {
            **{"chi": 2.0, "tolerance": None},
            **{"curvature": "hvp", "loss": objective},
        },
    }
    makers: dict[str, Callable[[], Any]] = {"Malitsky-Mishchenko": malitsky_mishchenko}
    for rate in (0.4, 4.0):
        for name, options in settings.items():
            makers[f"{name}, rate {rate}"] = partial(throttle, optax.sgd(rate), rate, **options)
    for name, make in makers.items():
        last = [float(train(make, seed, steps)[-1]) for seed in range(seeds)]
        over_best = statistics.median(a / b for a, b in zip(last, best, strict=True))
        row = {"method": name, "loss": last, "over the best plain": over_best}
        table.append(row)
        print(row, file=sys.stderr)
    return table


def disturbances(smoke: bool) -> list[dict[str, Any]]:
    """An input shift and a 1,000-fold corrupted batch in mid-training, at rate 4."""
    steps = 60 if smoke else 1500
    middle = steps // 2
    cases = {
        "shift": lambda x, t: jnp.where(t >= middle, 1.5 * x + 0.5, x),
        "corrupted batch": lambda x, t: jnp.where(t == middle, 1000 * x, x),
    }
    methods = {
        "plain, 0.1": lambda: optax.with_extra_args_support(optax.sgd(0.1)),
        "throttle, 4": lambda: throttle(optax.sgd(4.0), 4.0),
        "formula, 4": lambda: throttle(optax.sgd(4.0), 4.0, tolerance=None),
    }
    table = []
    for case, disturb in cases.items():
        for name, make in methods.items():
            loss = train(make, 0, steps, disturb)
            row = {
                "case": case,
                "method": name,
                "before": float(loss[middle - 1]),
                "worst": float(loss[middle:].max()),
                "after": float(loss[-1]),
                "finite": bool(np.isfinite(loss).all()),
            }
            table.append(row)
            print(row, file=sys.stderr)
    return table


def spectral_normalization(scale: float) -> optax.GradientTransformationExtraArgs:
    """Every matrix rescaled to spectral norm `scale` after each update, by SVD."""

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> tuple[Any, Any]:
        del extra

        def leaf(p: jax.Array, u: jax.Array) -> jax.Array:
            moved = p + u
            return u if p.ndim < 2 else moved * scale / jnp.linalg.norm(moved, 2) - p

        return jax.tree.map(leaf, params, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def kappa(smoke: bool) -> list[dict[str, Any]]:
    """Test accuracy at l_max = 4 on the digits (one head; rows after the first 1000)."""
    seeds, steps = (1, 20) if smoke else (5, 1000)
    x, digit, _ = digits()
    limits = {
        "none": optax.identity(),
        "fair, clip": kappa_budget(4.0),
        "greedy, clip": kappa_budget(4.0, policy="greedy"),
        "uniform, clip": kappa_budget(4.0, policy="uniform"),
        "fair, scale": kappa_budget(4.0, projection="scale"),
        "uniform, scale": kappa_budget(4.0, policy="uniform", projection="scale"),
        "spectral normalization to 1": spectral_normalization(1.0),
        "spectral normalization to 4^(1/4)": spectral_normalization(4**0.25),
    }
    table = []
    for base, make in {"adam 3e-3": optax.adam(3e-3), "sgd 0.1, 0.9": optax.sgd(0.1, 0.9)}.items():
        for name, limit in limits.items():
            optimizer = optax.chain(make, limit)

            def run(params: Any, x: Any, y: Any, optimizer: Any = optimizer) -> Any:
                def step(carry: Any, _: Any) -> tuple[Any, None]:
                    params, state = carry
                    grads = jax.grad(objective)(params, x, y)
                    updates, state = optimizer.update(grads, state, params, grad=grads)
                    return (optax.apply_updates(params, updates), state), None

                return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

            compiled = jax.jit(run)
            accuracy, product = [], []
            for seed in range(seeds):
                params = compiled(network(seed, heads=(10,)), x[:1000], digit[:1000])
                guess = np.argmax(outputs(params, x[1000:])[0], axis=1)
                accuracy.append(float((guess == digit[1000:].argmax(axis=1)).mean()))
                product.append(float(lipschitz_certificate(params, activations="tanh").upper))
            row = {"base": base, "limit": name, "accuracy": accuracy, "certificate": product}
            table.append(row | {"mean": statistics.mean(accuracy)})
            print(table[-1], file=sys.stderr)
    return table


def budget(smoke: bool) -> list[dict[str, Any]]:
    """Largest product of exact norms (SVD, float64) over 2,000 steps, in units of l_max."""
    steps = 20 if smoke else 2000
    x, digit, _ = (array[:1000] for array in digits())
    table = []
    for dtype in ("float32", "bfloat16"):
        for projection in ("clip", "scale"):

            def run(l_max: Any, params: Any, x: Any, y: Any, projection: str = projection) -> Any:
                base = optax.adam(3e-3)
                optimizer = optax.chain(base, kappa_budget(l_max, projection=projection))

                def step(carry: Any, _: Any) -> tuple[Any, list[jax.Array]]:
                    params, state = carry
                    grads = jax.grad(objective)(params, x, y)
                    updates, state = optimizer.update(grads, state, params)
                    params = optax.apply_updates(params, updates)
                    layers = [*params["trunk"], *params["heads"]]
                    return (params, state), [layer["w"] for layer in layers]

                return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]

            compiled = jax.jit(run)
            data = optax.tree.cast((network(0, heads=(10,)), x, digit), dtype)
            for l_max in (1.0, 4.0, 16.0):
                history = compiled(jnp.asarray(l_max, jnp.float32), *data)
                norms = [np.linalg.norm(np.asarray(w, np.float64), 2, (1, 2)) for w in history]
                worst = float(np.prod(norms, axis=0).max() / l_max)
                row = {"dtype": dtype, "projection": projection, "l_max": l_max}
                table.append(row | {"worst_over_l_max": worst})
                print(table[-1], file=sys.stderr)
    return table


def cost(smoke: bool) -> list[dict[str, Any]]:
    """Seconds per training step over those of the bare optimizer, interleaved.

    In a compiled loop, and one call a step, where handing over the state's arrays counts too. The
    rate is one at which the wide network is stable: a diverging one makes every rail bind.
    """
    sizes = {"digits": (64, 1000, 50)}
    if not smoke:
        sizes["10M parameters"] = (2236, 1024, 1)
    table = []
    for name, (width, rows, inner) in sizes.items():
        params = network(0, width, heads=(10,))
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        x, digit, _ = (array[:rows] for array in digits())
        rate = 1e-3
        base = optax.sgd(rate, momentum=0.9)
        variants = {
            "bare": base,
            "throttle": throttle(base, rate),
            "kappa slack": optax.chain(base, kappa_budget(1e9)),
            "kappa binding": optax.chain(base, kappa_budget(4.0)),
            "kappa binding, scale, every 20": optax.chain(
                base, kappa_budget(4.0, projection="scale", every=20)
            ),
        }
        repeats = 3 if smoke else 8 if width > 64 else 40
        for way, length in {"loop": inner, "calls": 1}.items():
            if inner == 1 and way == "calls":
                continue
            runs = {}
            for variant, optimizer in variants.items():
                optimizer = optax.with_extra_args_support(optimizer)

                def steps(carry: Any, x: Any, y: Any, opt: Any = optimizer, n: int = length) -> Any:
                    def step(carry: Any, _: Any) -> tuple[Any, None]:
                        params, state = carry
                        grads = jax.grad(objective)(params, x, y)
                        updates, state = opt.update(grads, state, params)
                        return (optax.apply_updates(params, updates), state), None

                    # a loop of one would add copies of its own
                    once = step(carry, None)[0] if n == 1 else None
                    return once or jax.lax.scan(step, carry, length=n)[0]

                compiled = jax.jit(steps, donate_argnums=0)
                own = jax.tree.map(jnp.array, params)
                start = (own, jax.jit(optimizer.init)(own))
                runs[variant] = [compiled, compiled(start, x, digit), []]
            for _ in range(repeats):
                for run in runs.values():
                    start_s = time.perf_counter()
                    run[1] = jax.block_until_ready(run[0](run[1], x, digit))
                    run[2].append((time.perf_counter() - start_s) / length)
            bare = {f.__name__: f(runs["bare"][2]) for f in (statistics.median, min)}
            for variant, (_, _, seconds) in runs.items():
                row = {"network": name, "parameters": count, "variant": variant, "way": way}
                row |= {"step_s": statistics.median(seconds)}
                row |= {"median_over_bare": row["step_s"] / bare["median"]}
                table.append(row | {"least_over_bare": min(seconds) / bare["min"]})
                print(table[-1], file=sys.stderr)
    return table


CASES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "quadratics": quadratics,
    "networks": networks,
    "disturbances": disturbances,
    "kappa": kappa,
    "budget": budget,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/throttle.json"))
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"about": about(), "smoke": arguments.smoke}
    for name in arguments.cases:
        report[name] = CASES[name](arguments.smoke)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
