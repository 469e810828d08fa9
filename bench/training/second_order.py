"""Do weights of losses matter to second order? `python -m bench.training.second_order --out FILE`.

The Helmholtz network in float64 on points that stay, by Gauss-Newton steps and by L-BFGS, from
weights of 1, from the first weights of shares, and with the boundary's loss times 1000 or over it.
A Gauss-Newton step solves $(J J^\\top + \\mu I) z = r$ for the weighted residuals r of N points
and moves by $-J^\\top z$ (Levenberg 1944, Marquardt 1963; in the space of residuals as in Guzman-
Cordero et al., *Improving energy natural gradient descent through Woodbury, momentum and
randomization*, 2025), and by the acceleration along it (Transtrum and Sethna, *Improvements to the
Levenberg-Marquardt algorithm*, 2012) where that is lower. One Gram matrix serves every mu that is
tried: a factor of 3 up or down for as long as the weighted sum falls.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import qmc

import smallgain_jax as sg
from bench.run import about
from bench.training import helmholtz
from bench.training.network import tanh_network

INSIDE, EACH_SIDE = 1024, 32
TRIALS = 8
"""Changes of the damping by 3, at most, from step to step."""
BOUNDARY = {"1": 1.0, "times 1000": 1e3, "over 1000": 1e-3, "shares": None}
"""Weight of the boundary's loss over that of the residual's."""


class Solver(NamedTuple):
    """A method: a state from parameters, a compiled step, parameters from a state."""

    init: Callable[[Any], Any]
    step: Callable[[Any], Any]
    params: Callable[[Any], Any]


def points() -> tuple[jax.Array, jax.Array]:
    """Points of a Sobol sequence [1024, 2] inside, and evenly spaced ones [128, 2] on the sides."""
    inside = 2 * qmc.Sobol(2, rng=0).random(INSIDE) - 1
    place = (np.arange(EACH_SIDE) + 0.5) / EACH_SIDE * 2 - 1
    sides = [
        np.stack([np.full(EACH_SIDE, end), place][::turn], axis=1)
        for end in (-1.0, 1.0)
        for turn in (1, -1)
    ]
    return jnp.asarray(inside), jnp.asarray(np.concatenate(sides))


def shares(params: Any) -> float:
    """The boundary's weight over the residual's that equal shares of curvature start with."""
    losses = helmholtz.problem().losses
    optimizer = sg.small_gain(optax.sgd(1.0), losses, policy="fair", iterations=20)
    gradient = jax.grad(lambda p: losses.values(p, *points()).sum())(params)
    _, state = optimizer.update(gradient, optimizer.init(params), params, term_args=points())
    residual, boundary = state.first_weights.tolist()
    return boundary / residual


def gauss_newton(boundary: float, start: Any) -> Solver:
    """Accelerated Gauss-Newton steps on the weighted sum of squares; factors by LAPACK."""
    _, unravel = ravel_pytree(start)
    inside, outside = points()

    def inner(flat: jax.Array, x: jax.Array) -> jax.Array:
        return helmholtz.residual(unravel(flat), x[None])[0] / jnp.sqrt(INSIDE)

    def outer(flat: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sqrt(boundary / outside.shape[0]) * tanh_network(unravel(flat), x)[0]

    def rows(make: Callable[..., Any], flat: jax.Array) -> jax.Array:
        found = [
            jax.vmap(make(f), (None, 0))(flat, x) for f, x in ((inner, inside), (outer, outside))
        ]
        return jnp.concatenate(found)

    residuals = jax.jit(partial(rows, lambda f: f))
    jacobian = jax.jit(partial(rows, jax.grad))

    def slope(flat: jax.Array, along: jax.Array) -> jax.Array:
        return jax.jvp(residuals, (flat,), (along,))[1]

    bend = jax.jit(lambda flat, along: jax.jvp(lambda x: slope(x, along), (flat,), (along,))[1])

    def total(flat: np.ndarray) -> float:
        found = float(np.sum(np.square(residuals(flat))))
        return found if math.isfinite(found) else math.inf

    def step(state: tuple[np.ndarray, float]) -> tuple[np.ndarray, float]:
        flat, damping = state
        r, matrix = np.asarray(residuals(flat)), np.asarray(jacobian(flat))
        gram = matrix @ matrix.T

        @cache
        def trial(mu: float) -> tuple[float, np.ndarray]:
            damped = gram.T.copy(order="F")  # symmetric; LAPACK's order spares its own copy
            damped[np.diag_indices(r.size)] += mu
            try:
                factor = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
            except np.linalg.LinAlgError:  # mu is below the rounding of the Gram matrix
                return math.inf, flat
            first = -matrix.T @ cho_solve(factor, r, check_finite=False)
            bent = np.asarray(bend(flat, first))
            second = -matrix.T @ cho_solve(factor, bent, check_finite=False) / 2
            ends = flat + first, flat + first + second
            return min(((total(end), end) for end in ends), key=lambda pair: pair[0])

        for _ in range(TRIALS):
            nearby = (damping / 3, damping * 3)
            lower = next((mu for mu in nearby if trial(mu)[0] < trial(damping)[0]), None)
            if lower is None:
                break
            damping = lower
        found, moved = trial(damping)
        return (moved, damping) if found < float(r @ r) else (flat, 9 * damping)

    return Solver(
        lambda params: (np.asarray(ravel_pytree(params)[0]), 1.0), step, lambda s: unravel(s[0])
    )


def lbfgs(boundary: float, start: Any) -> Solver:
    """`optax.lbfgs` with its line search, on the weighted sum."""
    optimizer, args = optax.lbfgs(memory_size=50), points()

    def total(params: Any) -> jax.Array:
        found = helmholtz.losses_of(params, *args)
        return found["residual"] + boundary * found["boundary"]

    value_and_grad = optax.value_and_grad_from_state(total)

    @jax.jit
    def step(state: Any) -> Any:
        params, inner = state
        value, grad = value_and_grad(params, state=inner)
        updates, inner = optimizer.update(
            grad, inner, params, value=value, grad=grad, value_fn=total
        )
        return optax.apply_updates(params, updates), inner

    return Solver(lambda params: (params, optimizer.init(params)), step, lambda state: state[0])


METHODS = {"gauss_newton": gauss_newton, "lbfgs": lbfgs}


def run(method: str, weight: str, seed: int, seconds: float) -> dict[str, Any]:
    """Errors by seconds, compilation apart, until the time is up."""
    problem = helmholtz.problem()
    start = problem.init(jnp.int32(seed))
    boundary = BOUNDARY[weight]
    boundary = shares(start) if boundary is None else boundary
    solver, error = METHODS[method](boundary, start), jax.jit(problem.metrics)
    state = solver.init(start)
    jax.block_until_ready(solver.step(state))
    history: list[tuple[int, float, float]] = []
    spent, steps, due = 0.0, 0, 0.0
    while spent < seconds:
        before = time.perf_counter()
        state = jax.block_until_ready(solver.step(state))
        spent, steps = spent + time.perf_counter() - before, steps + 1
        if spent >= due or spent >= seconds:
            found = float(error(solver.params(state))["relative_l2"])
            history.append((steps, round(spent, 1), found))
            print(
                f"{method} {weight} seed {seed}: step {steps}, {spent:.0f} s, {found:.3g}",
                file=sys.stderr,
                flush=True,
            )
            due += max(seconds / 40, 1e-9)
    best = min(found for _, _, found in history)
    return {
        "method": method,
        "boundary": weight,
        "weight": boundary,
        "seed": seed,
        "steps": steps,
        "relative_l2": history[-1][2],
        "best": best,
        "history": history,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--boundary", nargs="*", choices=BOUNDARY, default=list(BOUNDARY))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600.0, help="for each run")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    report: dict[str, Any] = {"about": about(), "seconds": options.seconds, "runs": []}
    for seed in range(options.seeds):
        for method in options.methods:
            for weight in options.boundary:
                report["runs"].append(run(method, weight, seed, options.seconds))
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
