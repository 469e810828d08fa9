"""Three more physics-informed networks, of our own choice: a wave, a heated plate, a flow.

Each has an exact solution, from which data and errors are taken, and each of its losses is the mean
square of one kind of residual in its own unit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.training.network import Params, derivatives, glorot, tanh_network
from bench.training.problems import Problem, kernel_trace
from smallgain_jax.losses.losses import terms

Residual = Callable[[Params, jax.Array], jax.Array]
"""Of parameters and points [N, 2]: [N] or [N, m]."""
Edges = tuple[tuple[float, float], tuple[float, float]]
"""Low and high of the first coordinate, and of the second."""
INSIDE, OUTSIDE = 512, 128
GRID = 64
SPEED = 2.0
CONDUCTIVITY, HOTTEST = 50.0, 100.0
REYNOLDS = 40.0


def vibration(at: jax.Array) -> jax.Array:
    """u [N] of the wave at points (t, x) [N, 2]."""
    t, x = at[:, 0], at[:, 1]
    low = jnp.sin(jnp.pi * x) * jnp.cos(SPEED * jnp.pi * t)
    return low + 0.5 * jnp.sin(4 * jnp.pi * x) * jnp.cos(4 * SPEED * jnp.pi * t)


def warmth(at: jax.Array) -> jax.Array:
    """T - T_0 [N] of the plate, in K, at points (x, y) [N, 2] in m."""
    return HOTTEST * jnp.sin(2 * jnp.pi * at[:, 0]) * jnp.sin(3 * at[:, 1])


def velocities(at: jax.Array) -> jax.Array:
    """u and v [N, 2] of the flow at points (x, y) [N, 2]."""
    decay = REYNOLDS / 2 - np.sqrt(REYNOLDS**2 / 4 + 4 * np.pi**2)
    size, turn = jnp.exp(decay * at[:, 0]), 2 * jnp.pi * at[:, 1]
    across = decay / (2 * np.pi) * size * jnp.sin(turn)
    return jnp.stack([1 - size * jnp.cos(turn), across], axis=1)


def wave() -> Problem:
    """u_tt = 4 u_xx on [0, 1]^2, both ends held, from a shape of two modes at rest.

    The solution is sin(pi x) cos(2 pi t) + sin(4 pi x) cos(8 pi t) / 2 (Wang, Yu and Perdikaris,
    *When and why PINNs fail to train*, JCP 2022, section 7.2).
    """

    def residual(params: Params, at: jax.Array) -> jax.Array:
        return derivatives(params, at, second=(1.0, -(SPEED**2)))[3, :, 0]

    def displacement(params: Params, at: jax.Array) -> jax.Array:
        return tanh_network(params, at)[:, 0] - vibration(at)

    def velocity(params: Params, at: jax.Array) -> jax.Array:
        return derivatives(params, at, second=(0.0, 0.0))[1, :, 0]

    def batch(key: jax.Array) -> tuple[jax.Array, ...]:
        for_inside, for_ends, for_start = jax.random.split(key, 3)
        x = jax.random.uniform(for_start, (OUTSIDE,))
        start = jnp.stack([jnp.zeros_like(x), x], axis=1)
        place, end = jax.random.uniform(for_ends, (2, OUTSIDE))
        ends = jnp.stack([place, jnp.round(end)], axis=1)
        inside = jax.random.uniform(for_inside, (INSIDE, 2))
        return inside, jnp.concatenate([start, ends]), start

    parts = {"residual": residual, "displacement": displacement, "velocity": velocity}
    unit = ((0.0, 1.0), (0.0, 1.0))
    metrics = _error(vibration, unit, lambda params, at: tanh_network(params, at)[:, 0])
    return _problem("wave", parts, batch, metrics, (2, 64, 64, 64, 1), 10_000)


def heat() -> Problem:
    """A steel plate in SI units: -k (T_xx + T_yy) = q, T on three sides, the flux on the fourth.

    k is 50 W/(m K), the plate 1 m wide, T - T_0 = 100 K sin(2 pi x) sin(3 y). The network's output
    is in units of 100 K, the residuals are in W/m^3, K and W/m^2, as a user has them.
    """

    def temperature(params: Params, at: jax.Array) -> jax.Array:
        return HOTTEST * tanh_network(params, at)

    def residual(params: Params, at: jax.Array) -> jax.Array:
        laplacian = HOTTEST * derivatives(params, at, second=(1.0, 1.0))[3, :, 0]
        return CONDUCTIVITY * (laplacian + (4 * jnp.pi**2 + 9) * warmth(at))

    def sides(params: Params, at: jax.Array) -> jax.Array:
        return temperature(params, at)[:, 0] - warmth(at)

    def flux(params: Params, at: jax.Array) -> jax.Array:
        slope = HOTTEST * derivatives(params, at, second=(0.0, 0.0))[2, :, 0]
        given = HOTTEST * 3 * jnp.cos(3.0) * jnp.sin(2 * jnp.pi * at[:, 0])
        return CONDUCTIVITY * (slope - given)

    def batch(key: jax.Array) -> tuple[jax.Array, ...]:
        for_inside, for_sides, for_top = jax.random.split(key, 3)
        place, side = jax.random.uniform(for_sides, (2, OUTSIDE))
        side = jnp.floor(3 * side)
        upright = jnp.stack([side, place], axis=1)
        bottom = jnp.stack([place, jnp.zeros_like(place)], axis=1)
        x = jax.random.uniform(for_top, (OUTSIDE,))
        return (
            jax.random.uniform(for_inside, (INSIDE, 2)),
            jnp.where((side < 2)[:, None], upright, bottom),
            jnp.stack([x, jnp.ones_like(x)], axis=1),
        )

    parts = {"residual": residual, "sides": sides, "flux": flux}
    unit = ((0.0, 1.0), (0.0, 1.0))
    metrics = _error(warmth, unit, lambda params, at: temperature(params, at)[:, 0])
    return _problem("heat", parts, batch, metrics, (2, 50, 50, 50, 1), 5_000)


def flow() -> Problem:
    """The steady flow behind a grid at Reynolds number 40: momentum, continuity, walls.

    $u = 1 - e^{\\lambda x} \\cos 2\\pi y$, $v = \\lambda e^{\\lambda x} \\sin(2\\pi y) / 2\\pi$,
    $\\lambda = R/2 - \\sqrt{R^2/4 + 4\\pi^2}$ (Kovasznay, *Laminar flow behind a two-dimensional
    grid*, 1948), on [-1/2, 1] x [-1/2, 3/2]; the pressure is known up to a constant only, and the
    error is that of the velocities.
    """
    edges = ((-0.5, 1.0), (-0.5, 1.5))

    def momentum(params: Params, at: jax.Array) -> jax.Array:
        value, along_x, along_y, laplacian = derivatives(params, at, second=(1.0, 1.0))
        pressure = jnp.stack([along_x[:, 2], along_y[:, 2]], axis=1)
        carried = value[:, :1] * along_x[:, :2] + value[:, 1:2] * along_y[:, :2]
        return carried + pressure - laplacian[:, :2] / REYNOLDS

    def continuity(params: Params, at: jax.Array) -> jax.Array:
        _, along_x, along_y, _ = derivatives(params, at, second=(1.0, 1.0))
        return along_x[:, 0] + along_y[:, 1]

    def walls(params: Params, at: jax.Array) -> jax.Array:
        return tanh_network(params, at)[:, :2] - velocities(at)

    def batch(key: jax.Array) -> tuple[jax.Array, ...]:
        for_inside, for_walls, for_side = jax.random.split(key, 3)
        low, high = (jnp.array([row]) for row in zip(*edges, strict=True))
        inside = low + (high - low) * jax.random.uniform(for_inside, (INSIDE, 2))
        place = jax.random.uniform(for_walls, (OUTSIDE,))
        side = jax.random.randint(for_side, (OUTSIDE,), 0, 4)
        end = (side % 2).astype(place.dtype)
        pair = jnp.stack([end, place], axis=1)
        outside = low + (high - low) * jnp.where((side < 2)[:, None], pair, pair[:, ::-1])
        return inside, inside, outside

    parts = {"momentum": momentum, "continuity": continuity, "walls": walls}
    metrics = _error(velocities, edges, lambda params, at: tanh_network(params, at)[:, :2])
    return _problem("flow", parts, batch, metrics, (2, 50, 50, 50, 50, 3), 5_000)


def _error(
    exact: Callable[[jax.Array], jax.Array], edges: Edges, found: Residual
) -> Callable[[Params], dict[str, jax.Array]]:
    """The relative L2 error on 64 x 64 points of the domain."""
    axes = [np.linspace(low, high, GRID) for low, high in edges]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)

    def metrics(params: Params) -> dict[str, jax.Array]:
        at = jnp.asarray(grid, params[0][0].dtype)
        truth = exact(at)
        error = found(params, at) - truth
        return {"relative_l2": jnp.linalg.norm(error) / jnp.linalg.norm(truth)}

    return metrics


def _problem(
    name: str,
    parts: dict[str, Residual],
    batch: Callable[[jax.Array], tuple[jax.Array, ...]],
    metrics: Callable[[Params], dict[str, jax.Array]],
    sizes: tuple[int, ...],
    steps: int,
) -> Problem:
    """A loss for each part, the mean square of its residual on its own points, under Adam."""

    def losses_of(params: Params, *points: jax.Array) -> dict[str, jax.Array]:
        rows = zip(parts.items(), points, strict=True)
        return {name: jnp.mean(jnp.square(part(params, at))) for (name, part), at in rows}

    def traces(params: Params, *points: jax.Array) -> jax.Array:
        def at_one(part: Residual) -> Callable[[Any, jax.Array], jax.Array]:
            return lambda params, at: part(params, at[None])[0]

        rows = zip(parts.values(), points, strict=True)
        return jnp.stack([kernel_trace(at_one(part), params, at) for part, at in rows])

    return Problem(
        name=name,
        losses=terms(losses_of, names=tuple(parts)),
        init=lambda seed: glorot(jax.random.key(seed), sizes),
        batch=batch,
        metrics=metrics,
        ranked="relative_l2",
        traces=traces,
        optimizer=optax.adam,
        steps=steps,
        rates=(3e-4, 1e-3, 3e-3),
    )
