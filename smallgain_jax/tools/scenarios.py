"""The two graphs of the design note, and random graphs of eight kinds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax.graphs.families import AsymmetricHinge, DirectedHinge, GateBenefit, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau


class Scenario(NamedTuple):
    """A problem to relax: the graph, where to start, and the true minimum where it is known."""

    name: str
    graph: EnergyGraph
    x0: jax.Array  # [n]
    minimum: float | None  # F* over the box [0, 1]^n, from an independent solver


def baseline() -> Scenario:
    """Seed 001's baseline scenario: 2 nodes, 2 couplings.

    >>> baseline().graph.num_edges
    2
    """
    graph = EnergyGraph(
        Landau(a=np.array([0.2, 0.25]), b=np.array([0.3, 0.35])),
        [Quadratic([0], [1], 0.7), GateBenefit([1], [0], 0.8, delta=0.08)],
    )
    x0 = jax.nn.sigmoid(jnp.array([-1.0, 0.5]))
    return Scenario("baseline", graph, x0, -0.0025076120861671977)


def dense() -> Scenario:
    """Seed 001's dense scenario: 16 nodes, 48 couplings.

    >>> dense().graph.num_edges
    48
    """
    n = 16
    here = np.arange(n)
    near, far = (here + 1) % n, (here + 2) % n
    edges = [
        Quadratic(here, near, 0.6),
        Quadratic(here, far, 0.3),
        GateBenefit(near, here, 0.4, delta=0.05),
    ]
    graph = EnergyGraph(Landau(a=np.full(n, 0.15), b=0.05), edges)
    x0 = jax.nn.sigmoid(jnp.tile(jnp.linspace(-1.0, -0.2, 5), 4)[:n])
    return Scenario("dense", graph, x0, -0.010650957018330935)


def _ring(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    i = np.arange(n)
    return i, (i + 1) % n


def _grid(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    side = max(2, int(np.sqrt(n)))
    k = np.arange(n)
    right = k[((k + 1) % side != 0) & (k + 1 < n)]
    down = k[k + side < n]
    return np.concatenate([right, down]), np.concatenate([right + 1, down + side])


def _uniform(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    i = rng.integers(n, size=m)
    return i, (i + rng.integers(1, n, size=m)) % n


def _small_world(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(m)
    i = k % n
    j = (i + 1 + (k // n) % (n - 1)) % n
    rewire = rng.random(m) < 0.1
    return i, np.where(rewire, (i + rng.integers(1, n, size=m)) % n, j)


def _scale_free(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # static model (Goh, Kahng and Kim 2001): ends drawn with probability ~ rank^-1/2
    weight = np.arange(1, n + 1) ** -0.5
    i, j = rng.choice(n, size=(2, m), p=weight / weight.sum())
    return i, np.where(i == j, (j + 1) % n, j)


def _hub(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    hubs = max(1, n // 100)
    j = rng.integers(hubs, n, size=m) if n > hubs else np.ones(m, int)
    return rng.integers(hubs, size=m), j


def _dense(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(n, 1)


def _clusters(n: int, m: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # parts of eight nodes, joined by almost nothing
    size = min(8, n)
    i = rng.integers(n, size=m)
    part = i // size * size
    width = np.minimum(size, n - part)
    j = part + (i - part + rng.integers(1, np.maximum(width, 2))) % np.maximum(width, 1)
    return i, np.where(i == j, (i + 1) % n, j)


KINDS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "ring": _ring,
    "grid": _grid,
    "uniform": _uniform,
    "small_world": _small_world,
    "scale_free": _scale_free,
    "hub": _hub,
    "dense": _dense,
    "clusters": _clusters,
}
"""Edge generators by kind: `(n, m, rng) -> (i, j)`; ring, grid and dense fix their own m."""


def random_graph(
    kind: str, num_nodes: int, num_edges: int | None = None, *, seed: int = 0
) -> Scenario:
    """A random problem on [0, 1]^n with quadratic, hinge and gate couplings in one graph.

    Local energies have a in [0.05, 0.5], b in [0, 0.4] and targets 0 or 1; weights are uniform
    in [0.1, 2]. Families are drawn with probabilities 0.4, 0.25, 0.2 and 0.15.

    Args:
      kind: a key of `KINDS`.
      num_nodes: n >= 2.
      num_edges: about 4 n by default; ring, grid and dense have their own number.
      seed: of NumPy's default generator.

    >>> random_graph("ring", 10).graph.num_edges
    10
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} is unknown: choose from {', '.join(KINDS)}")
    if num_nodes < 2:
        raise ValueError(f"num_nodes = {num_nodes} must be at least 2")
    rng = np.random.default_rng(seed)
    wanted = 4 * num_nodes if num_edges is None else num_edges
    i, j = KINDS[kind](num_nodes, wanted, rng)
    weight = rng.uniform(0.1, 2.0, i.size)
    family = rng.choice(4, size=i.size, p=[0.4, 0.25, 0.2, 0.15])
    quadratic, hinge, asymmetric, gate = (np.flatnonzero(family == k) for k in range(4))
    edges = [
        Quadratic(i[quadratic], j[quadratic], weight[quadratic]),
        DirectedHinge(i[hinge], j[hinge], weight[hinge]),
        AsymmetricHinge(
            i[asymmetric],
            j[asymmetric],
            weight[asymmetric],
            alpha_i=rng.uniform(0.5, 1.5, asymmetric.size),
            beta_j=rng.uniform(0.5, 1.5, asymmetric.size),
        ),
        GateBenefit(i[gate], j[gate], weight[gate], delta=rng.uniform(-0.1, 0.1, gate.size)),
    ]
    local = Landau(
        a=rng.uniform(0.05, 0.5, num_nodes),
        b=rng.uniform(0.0, 0.4, num_nodes),
        target=rng.integers(0, 2, num_nodes),
    )
    return Scenario(
        kind, EnergyGraph(local, edges), jnp.asarray(rng.random(num_nodes), float), None
    )
