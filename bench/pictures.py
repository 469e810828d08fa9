"""The two figures of the README and their numbers: `python -m bench.pictures`.

Writes docs/_static/losses.png and docs/_static/inpainting.png, and prints the table that the README
quotes. About two minutes on two cores.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import smallgain_jax as sg
from bench.training import helmholtz
from bench.training.network import glorot, tanh_network
from bench.training.problems import Problem
from smallgain_jax.losses.losses import terms
from smallgain_jax.tools import hard

RATE, STEPS, EVERY, SEEDS = 1e-3, 4000, 50, 5
WILD = 1.0
SIDE = 96
BLUE, ORANGE = "#0072B2", "#D55E00"


def two_heads() -> Problem:
    """Regression of two targets in different units by a network with one hidden layer."""

    def losses_of(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        out = tanh_network(params, x)
        targets = jnp.stack([jnp.sin(x.sum(axis=1)), 10 * x[:, 0]], axis=1)
        first, second = jnp.mean(jnp.square(out - targets), axis=0)
        return {"first": first, "second": second}

    def batch(key: jax.Array) -> tuple[jax.Array]:
        return (jax.random.normal(key, (64, 3)),)

    losses = terms(losses_of, names=("first", "second"))
    return helmholtz.problem()._replace(
        losses=losses,
        init=lambda seed: glorot(jax.random.key(seed), (3, 32, 2)),
        batch=batch,
        metrics=lambda params: {"sum": losses.values(params, *batch(jax.random.key(0))).sum()},
        ranked="sum",
    )


def train(problem: Problem, optimizer: Any) -> np.ndarray:
    """The metric that ranks, [SEEDS, STEPS / EVERY + 1]."""
    optimizer = optax.with_extra_args_support(optimizer)

    def look(params: Any) -> jax.Array:
        return problem.metrics(params)[problem.ranked]

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        batch = problem.batch(key)
        gradient = jax.grad(lambda p: problem.losses.values(p, *batch).sum())(params)
        updates, state = optimizer.update(gradient, state, params, term_args=batch)
        return (optax.apply_updates(params, updates), state), None

    def chunk(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, look(carry[0])

    def run(seed: jax.Array) -> jax.Array:
        params = problem.init(seed)
        keys = jax.random.split(jax.random.key(1000 + seed), (STEPS // EVERY, EVERY))
        _, seen = jax.lax.scan(chunk, (params, optimizer.init(params)), keys)
        return jnp.append(look(params), seen)

    return np.asarray(jax.lax.map(jax.jit(run), jnp.arange(SEEDS)))


def draw_losses(path: Path) -> None:
    """Left: what shares of the margin do; right: what the guard does."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    waves, heads = helmholtz.problem(), two_heads()
    adam, momentum = optax.adam(RATE), optax.sgd(WILD, momentum=0.9)
    fair = sg.small_gain(adam, waves.losses, policy="fair")
    guarded = sg.small_gain(momentum, heads.losses)
    steps = EVERY * np.arange(STEPS // EVERY + 1)
    for axis, problem, name, optimizer, color in (
        (left, waves, "Adam", adam, ORANGE),
        (left, waves, 'small_gain(Adam, policy="fair")', fair, BLUE),
        (right, heads, "SGD with momentum", momentum, ORANGE),
        (right, heads, "small_gain(SGD with momentum)", guarded, BLUE),
    ):
        found = train(problem, optimizer)
        for line in found:
            axis.semilogy(steps, line, color=color, alpha=0.25, linewidth=0.8)
        lost = steps[np.argmax(np.isnan(found), axis=1)] * np.isnan(found[:, -1])
        label = f"{name}: NaN within {lost.max()} updates" if np.all(lost) else name
        axis.semilogy(steps, np.median(found, axis=0), color=color, label=label)
        ends = ", ".join(f"{value:.2g}" for value in np.sort(found[:, -1]))
        print(f"{name}: {problem.ranked} after {STEPS} updates, {SEEDS} seeds: {ends}", flush=True)
    left.set(title="a network for Helmholtz' equation", ylabel="relative error of the solution")
    right.set(title="at a rate that is far too high", ylabel="sum of the losses")
    for axis in (left, right):
        axis.set_xlabel("update")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_inpainting(path: Path) -> None:
    """What is known of a picture, what eight steps make of it, and the minimizer."""
    problem = hard.missing_pixels(SIDE)
    hierarchy = sg.multilevel(problem.graph)
    known = np.asarray(problem.graph.local[0].a).reshape(SIDE, SIDE) > 0
    shown: dict[str, Any] = {"10 % of the pixels": np.where(known, hard.picture(SIDE), np.nan)}
    for name, metric in (("rows, 8 steps", "rows"), ("multilevel, 8 steps", hierarchy)):
        result = sg.relax(problem.graph, problem.x0, steps=8, metric=metric)
        shown[name] = np.asarray(result.x).reshape(SIDE, SIDE)
    for metric in ("rows", hierarchy):
        result = sg.relax(problem.graph, problem.x0, steps=2000, metric=metric)
        name = metric if metric == "rows" else "multilevel"
        print(f"inpainting, {SIDE} x {SIDE}, {name}: {int(result.info.steps)} steps", flush=True)
    shown["the minimizer"] = np.asarray(result.x).reshape(SIDE, SIDE)
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 4))
    for axis, (title, image) in zip(axes, shown.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/_static"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw_losses(out / "losses.png")
    with jax.enable_x64(True):
        draw_inpainting(out / "inpainting.png")


if __name__ == "__main__":
    main()
