r"""Hard problems: graphs that couple over long distances, on which rows alone do not suffice.

Each generator gives a `Problem` by its size and seed: weakly anchored grids, chains and roads,
pictures with missing pixels, obstacles, rankings, and what nothing solves well yet. Here errors and
gradients measure success: on a weakly anchored grid a gap of 4e-5 can hide an answer that is
entirely wrong.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

from smallgain_jax.graphs.families import DirectedHinge, GateBenefit, PairTerm, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau


class Problem(NamedTuple):
    """A problem to relax: the graph, the start, and the box."""

    name: str
    graph: EnergyGraph
    x0: jax.Array  # [n]
    bounds: tuple[float, float] | None

    @property
    def quadratic(self) -> bool:
        """Whether a linear system is all there is to it."""
        springs = all(type(family) is Quadratic for family in self.graph.edges)
        return springs and self.bounds is None


def grid_edges(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends (i, j) of the edges of a square grid, its nodes numbered row by row.

    >>> [ends.tolist() for ends in grid_edges(2)]
    [[0, 2, 0, 1], [1, 3, 2, 3]]
    """
    node = np.arange(side * side).reshape(side, side)
    i = np.concatenate([node[:, :-1].ravel(), node[:-1].ravel()])
    return i, np.concatenate([node[:, 1:].ravel(), node[1:].ravel()])


def _anchors(num_nodes: int, a: float, rng: np.random.Generator) -> Landau:
    """One node in a hundred is anchored with a; the others a hundred times less."""
    anchored = rng.random(num_nodes) < 0.01
    return Landau(a=np.where(anchored, a, 0.01 * a), target=rng.random(num_nodes))


def _zeros(num_nodes: int) -> jax.Array:
    return jnp.zeros(num_nodes, float)


def grid(side: int = 256, a: float = 1e-4, seed: int = 0) -> Problem:
    """A grid of springs, anchored weakly at one node in a hundred.

    >>> grid(4).graph.num_edges
    24
    """
    local = _anchors(side * side, a, np.random.default_rng(seed))
    graph = EnergyGraph(local, Quadratic(*grid_edges(side)))
    return Problem(f"grid {side}, {a:g}", graph, _zeros(side * side), None)


def wild(side: int = 256, seed: int = 0) -> Problem:
    """A grid whose weights run from 1e-4 to 1e4, each drawn by itself.

    >>> wild(4).name
    'wild weights 4'
    """
    rng = np.random.default_rng(seed)
    i, j = grid_edges(side)
    springs = Quadratic(i, j, 10.0 ** rng.uniform(-4, 4, i.size))
    graph = EnergyGraph(_anchors(side * side, 1e-2, rng), springs)
    return Problem(f"wild weights {side}", graph, _zeros(side * side), None)


def chain(num_nodes: int = 100_000, a: float = 1e-4, seed: int = 0) -> Problem:
    """A chain of springs, anchored weakly.

    >>> chain(5).graph.num_edges
    4
    """
    here = np.arange(num_nodes - 1)
    local = _anchors(num_nodes, a, np.random.default_rng(seed))
    graph = EnergyGraph(local, Quadratic(here, here + 1))
    return Problem(f"chain {num_nodes}, {a:g}", graph, _zeros(num_nodes), None)


def geometric(num_nodes: int = 100_000, a: float = 1e-4, seed: int = 0) -> Problem:
    """Points in a square, joined to those within a radius: eight neighbours on average.

    >>> geometric(50).graph.num_nodes
    50
    """
    rng = np.random.default_rng(seed)
    radius = np.sqrt(8 / (np.pi * num_nodes))
    i, j = cKDTree(rng.random((num_nodes, 2))).query_pairs(radius, output_type="ndarray").T
    springs = Quadratic(i, j, rng.uniform(0.1, 2.0, i.size))
    graph = EnergyGraph(_anchors(num_nodes, a, rng), springs)
    return Problem(f"geometric {num_nodes}", graph, _zeros(num_nodes), None)


def road(side: int = 362, a: float = 1e-4, seed: int = 0) -> Problem:
    """A grid of which four edges in ten are closed: detours, dead ends, islands.

    >>> road(5).graph.num_nodes
    25
    """
    rng = np.random.default_rng(seed)
    i, j = grid_edges(side)
    kept = rng.random(i.size) < 0.6
    springs = Quadratic(i[kept], j[kept], rng.uniform(0.1, 2.0, int(kept.sum())))
    graph = EnergyGraph(_anchors(side * side, a, rng), springs)
    return Problem(f"road {side * side}", graph, _zeros(side * side), None)


def inpainting(
    picture: np.ndarray, known: np.ndarray, *, fidelity: float = 10.0, smoothness: float = 1.0
) -> EnergyGraph:
    r"""The membrane over a picture: $f \sum_{known} (x - p)^2 + s \sum_{edges} (x_i - x_j)^2$.

    Args:
      picture: float [h, w], in [0, 1].
      known: bool [h, w]; other pixels have no local energy at all.
      fidelity: f, positive.
      smoothness: s, positive.

    >>> inpainting(np.zeros((2, 3)), np.ones((2, 3), bool)).num_edges
    7
    """
    node = np.arange(picture.size).reshape(picture.shape)
    i = np.concatenate([node[:, :-1].ravel(), node[:-1].ravel()])
    j = np.concatenate([node[:, 1:].ravel(), node[1:].ravel()])
    local = Landau(a=np.where(known, fidelity, 0.0).ravel(), target=picture.ravel())
    return EnergyGraph(local, Quadratic(i, j, smoothness))


def picture(side: int = 256) -> np.ndarray:
    """The cameraman of scikit-image at this size, float [side, side] in [0, 1].

    Raises:
      ImportError: scikit-image is missing.
    """
    from skimage import data, transform

    found: np.ndarray = transform.resize(data.camera() / 255.0, (side, side), anti_aliasing=True)
    return found


def missing_pixels(side: int = 256, share: float = 0.9, seed: int = 0) -> Problem:
    """The picture with this share of its pixels missing, in the box [0, 1]."""
    known = np.random.default_rng(seed).random((side, side)) >= share
    graph = inpainting(picture(side), known)
    return Problem(f"inpainting {side}, {share:.0%} missing", graph, _zeros(side**2), (0.0, 1.0))


def large_hole(side: int = 256) -> Problem:
    """The picture with its middle missing: a square of six tenths of its side."""
    known = np.ones((side, side), bool)
    edge = side // 5
    known[edge : side - edge, edge : side - edge] = False
    graph = inpainting(picture(side), known)
    return Problem(f"inpainting {side}, a hole", graph, _zeros(side**2), (0.0, 1.0))


def obstacle(side: int = 256, load: float = 4.0, seed: int = 0) -> Problem:
    """A membrane in the box [0, 1], pushed by waves of local energies: much of it rests on a bound.

    Args:
      side: of the grid.
      load: how hard it is pushed; 4 leaves about four nodes in ten at a bound, 1000 nineteen in
        twenty.
      seed: of the phases.

    >>> obstacle(4).bounds
    (0.0, 1.0)
    """
    rng = np.random.default_rng(seed)
    u, v = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    phase = rng.uniform(0, 2 * np.pi, 2)
    wave = np.sin(6 * np.pi * u + phase[0]) * np.sin(4 * np.pi * v + phase[1])
    force = 0.25 * load * (64 / side) ** 2 * wave
    i, j = grid_edges(side)
    force = (0.25 * load * (64 / side) ** 2 * wave).ravel()
    # a linear reward of a node is a force on it, whoever its partner is
    node = np.arange(side**2)
    push = GateBenefit(node, (node + 1) % side**2, delta=force)
    local = Landau(a=np.full(side**2, 1e-6), target=0.5)
    graph = EnergyGraph(local, [Quadratic(i, j), push])
    return Problem(f"obstacle {side}, load {load:g}", graph, jnp.full(side**2, 0.5), (0.0, 1.0))


def margin(x_i: jax.Array, x_j: jax.Array) -> jax.Array:
    """Node i should stand above node j by one: max(0, 1 - (x_i - x_j))^2."""
    short = 1 - (x_i - x_j)
    return jnp.where(short > 0, short, 0) ** 2


def ranking(num_nodes: int = 10_000, num_edges: int = 60_000, seed: int = 0) -> Problem:
    """Scores from pairwise comparisons with a margin, a tenth of them wrong, and weak anchors.

    >>> ranking(10, 20).graph.num_edges
    20
    """
    rng = np.random.default_rng(seed)
    skill = rng.standard_normal(num_nodes)
    i = rng.integers(num_nodes, size=num_edges)
    j = (i + rng.integers(1, num_nodes, size=num_edges)) % num_nodes
    swap = (skill[i] < skill[j]) ^ (rng.random(num_edges) < 0.1)
    i, j = np.where(swap, j, i), np.where(swap, i, j)
    graph = EnergyGraph(Landau(a=np.full(num_nodes, 1e-3)), PairTerm(margin, i, j))
    return Problem(f"ranking {num_nodes}", graph, _zeros(num_nodes), None)


def isotonic(num_nodes: int = 10_000, weight: float = 1e4, seed: int = 0) -> Problem:
    """Isotonic regression of a noisy ramp by stiff hinges.

    >>> isotonic(5).graph.keys
    ('DirectedHinge',)
    """
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, num_nodes) + 0.3 * rng.standard_normal(num_nodes)
    here = np.arange(num_nodes - 1)
    graph = EnergyGraph(
        Landau(a=np.ones(num_nodes), target=ramp), DirectedHinge(here + 1, here, weight)
    )
    return Problem(f"isotonic {num_nodes}, {weight:g}", graph, _zeros(num_nodes), None)


def phase_field(side: int = 128, width: float = 8.0, seed: int = 0) -> Problem:
    """A double well at every node and springs between them: interfaces that are `width` wide.

    >>> phase_field(4).graph.num_nodes
    16
    """
    rng = np.random.default_rng(seed)
    n = side * side
    # (x^2 - 1)^2 / 4 less a constant is -x^2 / 2 + x^4 / 4
    graph = EnergyGraph(
        Landau(a=np.full(n, -0.5), b=0.25), Quadratic(*grid_edges(side), width**2 / 8)
    )
    return Problem(f"phase field {side}", graph, jnp.asarray(0.1 * rng.standard_normal(n)), None)


def digits_labels(neighbors: int = 10, labelled: int = 5, seed: int = 0) -> Problem:
    """Is it an even digit? Labels spread over scikit-learn's digits, few of which have one.

    Args:
      neighbors: edges that each picture sends to its nearest pictures.
      labelled: pictures of each digit whose label is known.
      seed: of their choice.

    Raises:
      ImportError: scikit-learn is missing.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(seed)
    pixels, n = data.data / 16.0, data.target.size
    found = cKDTree(pixels).query(pixels, neighbors + 1)
    distance, nearest = (np.asarray(values)[:, 1:] for values in found)
    i, j = np.repeat(np.arange(n), neighbors), nearest.ravel()
    closeness = np.exp(-((distance.ravel() / np.median(distance)) ** 2))
    known = np.zeros(n, bool)
    for digit in range(10):
        known[rng.choice(np.flatnonzero(data.target == digit), labelled, replace=False)] = True
    local = Landau(a=np.where(known, 10.0, 0.0), target=(data.target % 2 == 0).astype(float))
    graph = EnergyGraph(local, Quadratic(i, j, closeness))
    return Problem("labels on digits", graph, _zeros(n), None)


HARD: dict[str, Callable[[], Problem]] = {
    "grid": grid,
    "chain": chain,
    "geometric": geometric,
    "road": road,
    "wild": wild,
    "missing_pixels": missing_pixels,
    "large_hole": large_hole,
    "obstacle": obstacle,
    "obstacle_95": lambda: obstacle(load=1000.0),
    "ranking": ranking,
    "isotonic": isotonic,
    "phase_field": phase_field,
    "digits_labels": digits_labels,
}
"""Hard problems by name, each at its own size."""
