"""Is it safe to wrap the optimizer? `python -m bench.training.ordinary --out FILE.json`.

Ten ordinary tasks (`bench.training.tasks`), plain Adam against Adam wrapped: the same starts, the
same batches, and the loop that anybody would write. The table gives the held-out measure of both by
seed, its ratio (above 1 where wrapping does harm), and the median of the plain sum on what is
trained on, each as the mean of the last tenth of the run. `again` is plain Adam on other
mini-batches: what a ratio says by chance. A policy is one of the register, or
`name:key=value,key=value` for other keyword arguments of it (`fair:every=20,guard=None`). A
finished (task, policy) is written at once, and skipped when the same command runs again.
"""

import argparse
import ast
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import smallgain_jax as sg
from bench.run import about
from bench.training.tasks import TASKS, Task, make

MEASUREMENTS = 50
"""Held-out measures along a run; the last tenth of them is averaged."""
HARM = 1.05
"""A ratio above this is harm (issue 14)."""

Wrap = Callable[..., optax.GradientTransformation]


def _throttle(base: optax.GradientTransformation, _: sg.Losses, **settings: Any) -> Any:
    # Adam's update is not proportional to its gradient: the throttle measures the rate
    return sg.throttle(base, None, **settings)


def _with(**defaults: Any) -> Wrap:
    return lambda base, losses, **settings: sg.small_gain(base, losses, **(defaults | settings))


POLICIES: dict[str, Wrap] = {
    "plain": lambda base, _: base,
    "again": lambda base, _: base,
    "default": _with(),
    "fair": _with(policy="fair"),
    "greedy": _with(policy="greedy"),
    "throttle": _throttle,
}
"""(base optimizer, losses, keyword arguments) -> what trains."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--policies", nargs="*", default=["default"], metavar="NAME[:KEY=VALUE,..]")
    parser.add_argument("--rates", nargs="*", type=float, help="in place of each task's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="in place of each task's own")
    parser.add_argument("--out", type=Path, help="where to write; nothing is kept without")
    options = parser.parse_args(argv)
    policies = {spec: parsed(spec) for spec in ["plain", *options.policies]}

    settings = {"seeds": options.seeds, "steps": options.steps}
    report: dict[str, Any] = {"about": about(), "settings": settings, "cells": {}}
    if options.out is not None and options.out.exists():
        report = json.loads(options.out.read_text())
        if report["settings"] != settings:
            parser.error(f"{options.out} holds other settings, {report['settings']}: name another")
    cells = report["cells"]
    for name in options.tasks:
        task = make(name)
        steps = options.steps or task.steps
        for rate in options.rates or [task.rate]:
            for spec, wrap in policies.items():
                key = f"{name} {rate:g} {spec}"
                if key not in cells:
                    known = {"task": name, "rate": rate, "policy": spec, "measure": task.what}
                    order = int(spec == "again")
                    cells[key] = known | run(task, wrap, rate, steps, options.seeds, order)
                    print(f"{key}: {cells[key]['final']}", file=sys.stderr, flush=True)
                report["rows"] = summary(list(cells.values()))
                if options.out is not None:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(list(cells.values())))


def parsed(spec: str) -> Wrap:
    """The policy `name`, or `name:key=value,...` with Python's literals as values."""
    name, _, rest = spec.partition(":")
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown: choose from {', '.join(POLICIES)}")
    call = ast.parse(f"f({rest})", mode="eval").body
    assert isinstance(call, ast.Call)
    settings = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    return lambda base, losses: POLICIES[name](base, losses, **settings)


def run(
    task: Task, wrap: Wrap, rate: float, steps: int, seeds: int, order: int = 0
) -> dict[str, Any]:
    """Final held-out measures by seed, weights, and seconds; `order` picks other mini-batches."""
    optimizer = wrap(optax.adam(rate), sg.terms(task.losses, names=task.names))
    train = jax.jit(trainer(task, optimizer, max(1, steps // MEASUREMENTS)))
    before = time.perf_counter()
    compiled = train.lower(*_start(task, 0), jax.random.key(0)).compile()
    compile_s = time.perf_counter() - before
    curves, objectives, weights = [], [], []
    before = time.perf_counter()
    for seed in range(seeds):
        stream = jax.random.fold_in(jax.random.key(seed), 2 + order)
        curve, values, last = jax.device_get(compiled(*_start(task, seed), stream))
        curves.append(_numbers(curve))
        objectives.append(_numbers(values))
        weights.append(None if last is None else _numbers(last))
    seconds = time.perf_counter() - before
    return {
        "final": [_late(curve) for curve in curves],
        "objective": [_late(curve) for curve in objectives],
        "weights": weights,
        "curves": curves,
        "compile_s": compile_s,
        "ms_per_step": 1e3 * seconds / steps / seeds,
    }


def _start(task: Task, seed: int) -> tuple[Any, Any, Any]:
    """Parameters, data to train on, and data held out."""
    key = jax.random.key(seed)
    return task.init(jax.random.fold_in(key, 0)), *task.data(jax.random.fold_in(key, 1))


def trainer(task: Task, optimizer: optax.GradientTransformation, every: int) -> Any:
    """`train(params, data, held_out, key)`: what a user writes, measured now and then."""
    optimizer = optax.with_extra_args_support(optimizer)

    def total(params: Any, batch: Any) -> jax.Array:
        return sum(task.losses(params, *batch).values(), jnp.zeros(()))

    def train(params: Any, data: Any, held_out: Any, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            batch = task.batch(data, key)
            value, grads = jax.value_and_grad(total)(params, batch)
            updates, state = optimizer.update(grads, state, params, term_args=batch)
            return (optax.apply_updates(params, updates), state), value

        def measured(carry: Any, keys: jax.Array) -> tuple[Any, Any]:
            carry, values = jax.lax.scan(step, carry, keys)
            return carry, (task.measure(carry[0], held_out), jnp.mean(values))

        keys = jax.random.split(key, (MEASUREMENTS, every))
        carry = params, optimizer.init(params)
        (_, state), curves = jax.lax.scan(measured, carry, keys)
        return *curves, optax.tree.get(state, "weights")

    return train


def table(cells: list[dict[str, Any]]) -> str:
    """Every policy against plain Adam, or plain Adam alone, in Markdown."""
    plain = {(c["task"], c["rate"]): c for c in cells if c["policy"] == "plain"}
    wrapped = [c for c in cells if c["policy"] != "plain"]
    if wrapped:
        head = ["task", "policy", "measure", "plain", "wrapped", "ratio by seed", "median"]
        head += ["objective", "ms a step"]
        body = [_compared(c, plain[c["task"], c["rate"]]) for c in wrapped]
    else:
        head = ["task", "rate", "measure", "plain", "median"]
        body = [
            [c["task"], f"{c['rate']:g}", c["measure"], _several(c["final"]), f"{_median(c):.4g}"]
            for c in cells
        ]
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a task and rate: the median ratio of each policy's measure to the plain optimizer's."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for cell in cells:
        key = cell["task"], cell["rate"]
        if cell["policy"] == "plain":
            rows[key] = {"task": cell["task"].replace("_", " "), "measure": cell["measure"]}
            plain = cell
        else:
            middle = statistics.median(_ratios(cell, plain))
            rows[key][cell["policy"]] = middle if math.isfinite(middle) else "not finite"
    return list(rows.values())


def _ratios(cell: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    """By seed."""
    pairs = zip(cell["final"], plain["final"], strict=True)
    return [math.inf if one is None else one / other for one, other in pairs]


def _compared(cell: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    ratios = _ratios(cell, plain)
    middle = statistics.median(ratios)
    return [
        cell["task"],
        cell["policy"],
        cell["measure"],
        _several(plain["final"]),
        _several(cell["final"]),
        ", ".join(f"{ratio:.3f}" for ratio in ratios),
        f"{middle:.3f}" if middle <= HARM else f"**{middle:.3f}**",
        f"{_median(plain, 'objective'):.4g}, {_median(cell, 'objective'):.4g}",
        f"{plain['ms_per_step']:.2f}, {cell['ms_per_step']:.2f}",
    ]


def _median(cell: dict[str, Any], name: str = "final") -> float:
    return statistics.median(math.inf if x is None else x for x in cell[name])


def _several(numbers: list[float | None]) -> str:
    return ", ".join("inf" if x is None else f"{x:.4g}" for x in numbers)


def _late(curve: list[float | None]) -> float | None:
    """Mean of the last tenth; None where the run diverged."""
    tail = [x for x in curve[-MEASUREMENTS // 10 :] if x is not None]
    return statistics.fmean(tail) if len(tail) == MEASUREMENTS // 10 else None


def _numbers(array: np.ndarray) -> list[float | None]:
    """For JSON, where what is not finite is null."""
    return [float(x) if math.isfinite(x) else None for x in array]


if __name__ == "__main__":
    main()
