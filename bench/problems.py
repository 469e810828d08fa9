"""Functions to minimize: those of Moré, Garbow and Hillstrom (1981), and three with a use.

Each is a value over one array, its start, and its data; numbers in comments are those of the paper.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """A function `fn(x, *args)`, a start, and a box or None."""

    fn: Callable[..., jax.Array]
    x0: Any
    args: tuple[Any, ...] = ()
    bounds: tuple[Any, Any] | None = None


def squares(residuals: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.sum(residuals(x) ** 2)


def stack(*values: Any) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, values)))


def rosenbrock(x):  # 1
    return stack(10 * (x[1] - x[0] ** 2), 1 - x[0])


def freudenstein_roth(x):  # 2
    a, b = x
    return stack(-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b)


def powell_badly_scaled(x):  # 3
    return stack(1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001)


def brown_badly_scaled(x):  # 4
    return stack(x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2)


def beale(x):  # 5
    return jnp.asarray([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** jnp.arange(1, 4))


def jennrich_sampson(x):  # 6
    i = jnp.arange(1, 11)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def helical_valley(x):  # 7
    turn = jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)
    turn = jnp.where(turn < -0.25, turn + 1, turn)
    radius = jnp.sqrt(x[0] ** 2 + x[1] ** 2)
    return stack(10 * (x[2] - 10 * turn), 10 * (radius - 1), x[2])


BARD = np.array(
    [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]
)


def bard(x):  # 8
    u = jnp.arange(1, 16)
    v, w = 16 - u, jnp.minimum(u, 16 - u)
    return BARD - (x[0] + u / (v * x[1] + w * x[2]))


GAUSSIAN = np.array([9, 44, 175, 540, 1295, 2420, 3521, 3989, 3521, 2420, 1295, 540, 175, 44, 9])


def gaussian(x):  # 9
    t = (8 - jnp.arange(1, 16)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - GAUSSIAN / 1e4


def gulf(x):  # 11
    t = jnp.arange(1, 100) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x):  # 12
    t = 0.1 * jnp.arange(1, 11)
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x):  # 13
    a, b, c, d = x.reshape(-1, 4).T
    root5, root10 = np.sqrt(5), np.sqrt(10)
    return stack(a + 10 * b, root5 * (c - d), (b - 2 * c) ** 2, root10 * (a - d) ** 2)


def wood(x):  # 14
    a, b, c, d = x
    root10, root90 = np.sqrt(10), np.sqrt(90)
    last = (b + d - 2) * root10, (b - d) / root10
    return stack(10 * (b - a**2), 1 - a, root90 * (d - c**2), 1 - c, *last)


KOWALIK = np.array(
    [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
)


def kowalik_osborne(x):  # 15
    u = 1 / jnp.asarray([0.25, 0.5, 1, 2, 4, 6, 8, 10, 12, 14, 16])
    return KOWALIK - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x):  # 16
    t = jnp.arange(1, 21) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


def biggs(x):  # 18
    t = 0.1 * jnp.arange(1, 14)
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    found = x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4])
    return found - y


def watson(x):  # 20
    t, j = jnp.arange(1, 30)[:, None] / 29, jnp.arange(x.size)[None, :]
    slope = (t ** jnp.maximum(j - 1, 0)) @ (jnp.arange(x.size) * x)
    rest = slope - (t**j @ x) ** 2 - 1
    return jnp.concatenate([rest, stack(x[0], x[1] - x[0] ** 2 - 1)])


def extended_rosenbrock(x):  # 21
    return stack(10 * (x[1::2] - x[::2] ** 2), 1 - x[::2])


def penalty_1(x):  # 23
    return jnp.concatenate([np.sqrt(1e-5) * (x - 1), stack(jnp.sum(x**2) - 0.25)])


def penalty_2(x):  # 24
    n, e = x.size, jnp.exp(x / 10)
    i = jnp.arange(2, n + 1)
    y = jnp.exp(i / 10) + jnp.exp((i - 1) / 10)
    a = np.sqrt(1e-5)
    last = jnp.sum((n - jnp.arange(n)) * x**2) - 1
    return jnp.concatenate(
        [stack(x[0] - 0.2), a * (e[1:] + e[:-1] - y), a * (e[1:] - np.exp(-0.1)), stack(last)]
    )


def variably_dimensioned(x):  # 25
    far = jnp.sum(jnp.arange(1, x.size + 1) * (x - 1))
    return jnp.concatenate([x - 1, stack(far, far**2)])


def trigonometric(x):  # 26
    i = jnp.arange(1, x.size + 1)
    return x.size - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x):  # 27
    return jnp.concatenate([x[:-1] + jnp.sum(x) - (x.size + 1), stack(jnp.prod(x) - 1)])


def broyden_tridiagonal(x):  # 30
    around = jnp.pad(x, 1)
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


MGH: dict[str, Problem] = {
    name: Problem(squares(residuals), np.asarray(start, float))
    for name, residuals, start in (
        ("Rosenbrock", rosenbrock, [-1.2, 1]),
        ("Freudenstein and Roth", freudenstein_roth, [0.5, -2]),
        ("Powell badly scaled", powell_badly_scaled, [0, 1]),
        ("Brown badly scaled", brown_badly_scaled, [1, 1]),
        ("Beale", beale, [1, 1]),
        ("Jennrich and Sampson", jennrich_sampson, [0.3, 0.4]),
        ("helical valley", helical_valley, [-1, 0, 0]),
        ("Bard", bard, [1, 1, 1]),
        ("Gaussian", gaussian, [0.4, 1, 0]),
        ("Gulf", gulf, [5, 2.5, 0.15]),
        ("Box", box, [0, 10, 20]),
        ("Powell singular", powell_singular, [3, -1, 0, 1]),
        ("Wood", wood, [-3, -1, -3, -1]),
        ("Kowalik and Osborne", kowalik_osborne, [0.25, 0.39, 0.415, 0.39]),
        ("Brown and Dennis", brown_dennis, [25, 5, -5, -1]),
        ("Biggs", biggs, [1, 2, 1, 1, 1, 1]),
        ("Watson, 6", watson, np.zeros(6)),
        ("extended Rosenbrock, 20", extended_rosenbrock, np.tile([-1.2, 1], 10)),
        ("extended Powell, 20", powell_singular, np.tile([3, -1, 0, 1], 5)),
        ("penalty I, 10", penalty_1, np.arange(1, 11)),
        ("penalty II, 10", penalty_2, np.full(10, 0.5)),
        ("variably dimensioned, 10", variably_dimensioned, 1 - np.arange(1, 11) / 10),
        ("trigonometric, 10", trigonometric, np.full(10, 0.1)),
        ("Brown almost linear, 10", brown_almost_linear, np.full(10, 0.5)),
        ("Broyden tridiagonal, 30", broyden_tridiagonal, -np.ones(30)),
    )
}


def chain(n: int, bounds: tuple[Any, Any] | None = None) -> Problem:
    """Rosenbrock's valley from link to link."""

    def fn(x: jax.Array) -> jax.Array:
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    return Problem(fn, np.tile([-1.2, 1.0], n // 2), (), bounds)


def logistic(rows: int = 2000, columns: int = 200) -> Problem:
    """Logistic regression with a small ridge, coefficients between -1/2 and 1/2."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(rows, columns)) * 10 ** rng.uniform(-1, 1, columns)
    truth = rng.normal(size=columns) / 3
    labels = np.sign(features @ truth + rng.logistic(size=rows))

    def fn(x: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
        margin = labels * (features @ x)
        return jnp.mean(jax.nn.softplus(-margin)) + 1e-4 * jnp.sum(x**2)

    return Problem(fn, np.zeros(columns), (features, labels), (-0.5, 0.5))


def factorization(rows: int = 60, columns: int = 80, rank: int = 5) -> Problem:
    """Nonnegative factors of a noisy nonnegative matrix, as a pytree."""
    rng = np.random.default_rng(0)
    w, h = rng.gamma(1.0, size=(rows, rank)), rng.gamma(1.0, size=(rank, columns))
    matrix = np.maximum(w @ h + 0.1 * rng.normal(size=(rows, columns)), 0)

    def fn(x: dict[str, jax.Array], matrix: jax.Array) -> jax.Array:
        return jnp.sum((x["w"] @ x["h"] - matrix) ** 2) / 2

    start = {"h": rng.random((rank, columns)), "w": rng.random((rows, rank))}
    return Problem(fn, start, (matrix,), (0.0, np.inf))
