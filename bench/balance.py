"""Balance residual: `python -m bench.balance [--smoke] [--out FILE] [--cases NAME ...]`.

Precision on the problems of seed 004, two phases from 100 starts, cost in gradient passes, and the
two-head digits network after Adam.
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
import numpy as np
import optax

from bench.run import about
from smallgain_jax.losses.balance import balance_flow, balance_gradient, balance_residual
from smallgain_jax.losses.losses import Losses, terms
from smallgain_jax.losses.newton import balance_newton
from smallgain_jax.losses.two_phase import two_phase

TRIPLE = np.array([[3.0, 1.0], [-1.0, 4.0], [1.0, -2.0]])
WAVES = np.array([[2.0, 1.0], [-1.0, 3.0], [0.0, -2.0]])
Fn = Callable[[jax.Array], jax.Array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, default=Path("bench/balance.json"))
    parser.add_argument("--cases", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    arguments = parser.parse_args()
    report: dict[str, Any] = {"about": about(), "smoke": arguments.smoke}
    for name in arguments.cases:
        report[name] = CASES[name](arguments.smoke)
        for row in report[name]:
            print(f"{name:10s} {row}", file=sys.stderr)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.out}", file=sys.stderr)


def pair(t: jax.Array) -> jax.Array:
    return (t - jnp.array([3.0, -2.0], t.dtype)) ** 2


def triple(x: jax.Array) -> jax.Array:
    return jnp.sum((x[None] - jnp.asarray(TRIPLE, x.dtype)) ** 2, axis=1)


def waves(x: jax.Array) -> jax.Array:
    gap = x[None] - jnp.asarray(WAVES, x.dtype)
    return jnp.sum(gap**2 + 5 * (1 - jnp.cos(2 * np.pi * gap)), axis=1)


def residual(fn: Fn, x: jax.Array) -> jax.Array:
    return balance_residual(terms(fn).value_and_term_grads(x)[1])


@partial(jax.jit, static_argnums=(0, 1, 3))
def descend(fn: Fn, optimizer: Any, starts: jax.Array, steps: int) -> tuple[Any, Any, Any]:
    """Parameters, state and B at each step, from every start at once."""

    def run(x: jax.Array) -> tuple[Any, Any, Any]:
        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            x, state = carry
            gradient = jax.grad(lambda p: jnp.sum(fn(p)))(x)
            updates, state = optimizer.update(gradient, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), residual(fn, x)

        (x, state), path = jax.lax.scan(step, (x, optimizer.init(x)), None, length=steps)
        return x, state, path

    return jax.vmap(run)(starts)


def precision(smoke: bool) -> list[dict[str, Any]]:
    """Final B of each method on each problem, with the seed's starts, rates and steps."""
    problems = {
        "1D": (pair, -3.0, 0.5, 0.01, 200),
        "2D": (triple, [-3.0, -3.0], 0.5, 0.01 / 3, 500),
        "non-convex": (waves, [3.0, 3.0], 0.01, 0.001 / 3, 1000),
    }
    table = []
    for x64 in (True, False):
        with jax.enable_x64(x64):
            for name, (fn, start, rate, loss_rate, steps) in problems.items():
                methods = {
                    "loss flow": optax.sgd(loss_rate),
                    "B-flow": balance_flow(fn, rate),
                    "B-flow, uncompensated": balance_flow(fn, rate, compensated=False),
                    "Newton": balance_newton(fn),
                    "two phases": two_phase(optax.sgd(loss_rate), balance_newton(fn), fn),
                }
                for method, optimizer in methods.items():
                    count = 10 if method == "Newton" else min(steps, 20) if smoke else steps
                    x, _, path = descend(fn, optimizer, jnp.array([start]), count)
                    row = {"problem": name, "bits": 64 if x64 else 32, "method": method}
                    row |= {"steps": count, "x": x[0].tolist(), "B": float(path[0, -1])}
                    below = np.flatnonzero(np.asarray(path[0]) <= 4.7e-34)
                    row["first_below_4.7e-34"] = int(below[0]) + 1 if below.size else None
                    table.append(row | {"loss": float(jnp.sum(fn(x[0])))})
    return table


def starts(smoke: bool) -> list[dict[str, Any]]:
    """Loss flow and two phases on the non-convex problem from random starts."""
    table = []
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).uniform(-5, 5, size=(5 if smoke else 100, 2))
        first, steps = jnp.asarray(draw), 40 if smoke else 1000
        loss = optax.sgd(0.001 / 3)
        methods = {
            "loss flow": loss,
            "two phases, Newton": two_phase(loss, balance_newton(waves), waves),
            "two phases, B-flow 5e-5": two_phase(loss, balance_flow(waves, 5e-5), waves),
            "two phases, B-flow 0.01": two_phase(loss, balance_flow(waves, 0.01), waves),
            "B-flow 0.01": balance_flow(waves, 0.01),
            "Newton": balance_newton(waves),
        }
        reference = None
        for name, optimizer in methods.items():
            x, state, path = descend(waves, optimizer, first, steps)
            value = np.asarray(jax.vmap(lambda v: jnp.sum(waves(v)))(x))
            reference = value if reference is None else reference
            hessian = jax.vmap(jax.hessian(lambda v: jnp.sum(waves(v))))(x)
            smallest = np.linalg.eigvalsh(hessian)[:, 0]
            settled = np.asarray(path) <= 1e-20
            at = np.where(settled.any(axis=1), settled.argmax(axis=1) + 1, steps + 1)
            row = {"method": name, "starts": len(value), "steps": steps}
            row["largest_rise_over_loss_flow"] = float((value / reference - 1).max())
            row |= {"largest_B": float(path[:, -1].max()), "not_minima": int((smallest < 0).sum())}
            row |= {
                "median_step_to_1e-20": float(np.median(at)),
                "worst_step_to_1e-20": int(at.max()),
            }
            for field in ("returns", "refused", "rejected"):
                row[field] = int(getattr(state, field, np.zeros(1)).sum())
            table.append(row)
    return table


def network(num_terms: int, width: int, depth: int, rows: int) -> tuple[Losses, Any, Any]:
    rng = np.random.default_rng(0)
    shapes = [(width, width)] * depth + [(width, num_terms * 4)]
    params = [jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, jnp.float32) for s in shapes]
    x = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(rows, num_terms, 4)), jnp.float32)

    def losses(p: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for w in p[:-1]:
            x = jnp.tanh(x @ w)
        return 0.5 * jnp.mean(jnp.square((x @ p[-1]).reshape(y.shape) - y), axis=(0, 2))

    return terms(losses, names=tuple(map(str, range(num_terms)))), params, (x, y)


def cost(smoke: bool) -> list[dict[str, Any]]:
    """Operations (as the compiler counts them) and time, in gradient passes."""
    table = []
    sizes = [(2, 16, 2, 32)] if smoke else [(k, 256, 3, 1024) for k in (2, 3, 5, 10, 20)]
    for num_terms, width, depth, rows in sizes:
        losses, params, args = network(num_terms, width, depth, rows)
        flow = balance_flow(losses, 0.1)
        state = flow.init(params)

        def measured(p: Any, args: Any, losses: Losses = losses) -> Any:
            values, grads = losses.value_and_term_grads(p, *args)
            return values, grads, balance_residual(grads)

        calls = {
            "gradient pass": lambda p, args, losses=losses: losses.value_and_term_grads(p, *args),
            "with B": measured,
            "gradient of B": lambda p, args, losses=losses: balance_gradient(losses, p, *args),
            "B-flow step": lambda p, args, flow=flow, state=state: flow.update(
                p, state, p, term_args=args
            ),
        }
        programs = {name: jax.jit(f).lower(params, args).compile() for name, f in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        # interleaved, so that other work on the machine falls on all alike
        for _ in range(2 if smoke else 8):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(params, args))
                seconds[name].append(time.perf_counter() - start)
        one = programs["gradient pass"].cost_analysis()["flops"]
        base = statistics.median(seconds["gradient pass"][1:])
        for name, program in programs.items():
            row = {"terms": num_terms, "width": width, "depth": depth, "rows": rows, "what": name}
            row["flops"] = program.cost_analysis()["flops"] / one
            row["time"] = statistics.median(seconds[name][1:]) / base
            row["fastest"] = min(seconds[name]) / min(seconds["gradient pass"])
            table.append(row)
    return table


def digits(smoke: bool) -> list[dict[str, Any]]:
    """Two-head digits network: 1,000 steps of Adam, then Newton's second phase or more Adam."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = jnp.asarray(data.data / 16 - 0.3, jnp.float32)
    label = np.asarray(data.target)
    y = (
        jnp.asarray(np.eye(10)[label], jnp.float32),
        jnp.asarray(np.eye(2)[label % 2], jnp.float32),
    )
    train = (x[:1000], y[0][:1000], y[1][:1000])
    rng = np.random.default_rng(0)
    shapes = {"a": (64, 64), "b": (64, 64), "digit": (64, 10), "parity": (64, 2)}
    params = {k: jnp.asarray(rng.normal(size=s) / 8, jnp.float32) for k, s in shapes.items()}
    params |= {f"{k}0": jnp.zeros(s[1]) for k, s in shapes.items()}

    def outputs(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.tanh(x @ p["a"] + p["a0"][None])
        x = jnp.tanh(x @ p["b"] + p["b0"][None])
        return x @ p["digit"] + p["digit0"][None], x @ p["parity"] + p["parity0"][None]

    def losses(p: Any, x: jax.Array, digit: jax.Array, parity: jax.Array) -> dict[str, jax.Array]:
        of_digit, of_parity = outputs(p, x)
        half = lambda a, b: 0.5 * jnp.mean(jnp.sum((a - b) ** 2, axis=1))  # noqa: E731
        return {"digit": half(of_digit, digit), "parity": half(of_parity, parity)}

    model = terms(losses, names=("digit", "parity"))

    def run(optimizer: Any, params: Any, steps: int) -> tuple[Any, Any, float]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            gradient = jax.grad(lambda p: jnp.sum(model.values(p, *train)))(params)
            updates, state = optimizer.update(gradient, state, params, term_args=train)
            return (optax.apply_updates(params, updates), state), None

        go = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=steps)[0])
        compiled = go.lower(params).compile()
        start = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params))
        return params, state, time.perf_counter() - start

    def measured(name: str, params: Any, seconds: float, steps: int) -> dict[str, Any]:
        values, grads = jax.jit(model.value_and_term_grads)(params, *train)
        right = [jnp.argmax(o, 1) for o in jax.jit(outputs)(params, x[1000:])]
        row = {"method": name, "steps": steps, "seconds": seconds, "loss": float(jnp.sum(values))}
        row |= {"B": float(balance_residual(grads))}
        row["digit_accuracy"] = float(np.mean(np.asarray(right[0]) == label[1000:]))
        row["parity_accuracy"] = float(np.mean(np.asarray(right[1]) == label[1000:] % 2))
        return row

    adam = optax.with_extra_args_support(optax.adam(1e-3))
    first, more, few = (20, 20, 2) if smoke else (1000, 3000, 20)
    params, _, seconds = run(adam, params, first)
    table = [measured("Adam", params, seconds, first)]
    rest = {
        "then Adam": (adam, more),
        "then Newton alone": (balance_newton(model), few),
        "then two phases": (two_phase(adam, balance_newton(model), model, patience=3), few),
        "then two phases, any plateau": (
            two_phase(adam, balance_newton(model), model, patience=1, plateau=1.0),
            few,
        ),
    }
    for name, (optimizer, steps) in rest.items():
        end, state, seconds = run(optimizer, params, steps)
        row = measured(name, end, seconds, steps)
        if hasattr(state, "refused"):
            row["smallest_curvature"] = float(state.info.smallest_curvature)
            row |= {k: int(getattr(state, k)) for k in ("returns", "refused", "rejected")}
            row["phase"] = int(state.info.phase)
        table.append(row)
    return table


CASES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "cost": cost,
    "digits": digits,
    "precision": precision,
    "starts": starts,
}

if __name__ == "__main__":
    main()
