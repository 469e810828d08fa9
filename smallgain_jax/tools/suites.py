r"""Suites of the validation plan: order parameters, gates, and the problems built from them.

An *order parameter* is a score in [0, 1] of how ordered a part of a system is; a node carries it,
with local energy $a (1 - \eta)^2 + b (1 - \eta)^4$. A *gate* decides whether to expand that part:
its node opens with the hazard's probability, costs $a \eta^2 + b \eta^4$, and is rewarded by
$-w\, \eta\, \delta$ for the order $\delta$ that expansion would gain (seeds 000 and 001).
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special
from numpy.typing import ArrayLike

from smallgain_jax.graphs.families import DirectedHinge, GateBenefit, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau
from smallgain_jax.tools.scenarios import KINDS, Scenario, baseline, dense, random_graph


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One problem of a plan, told by its generator: the same words give the same problem.

    Attributes:
      generator: a key of `GENERATORS`.
      nodes: number of nodes; the published scenarios have their own.
      edges: number of couplings where the generator leaves it open; about 4 a node if not given.
      seed: of NumPy's default generator.

    >>> Suite(generator="ring", nodes=10, seed=1).name
    'ring-10-1'
    """

    generator: str
    nodes: int | None = None
    edges: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What tables and files call it."""
        if self.generator in PUBLISHED:
            return self.generator
        sizes = [self.nodes] if self.edges is None else [self.nodes, self.edges]
        return "-".join(map(str, [self.generator, *sizes, self.seed]))

    def build(self) -> Scenario:
        """The problem, in JAX's default precision.

        Raises:
          ValueError: an unknown generator, or a size that it does not take.

        >>> Suite(generator="ring", nodes=10).build().graph.num_edges
        20
        """
        if self.generator not in GENERATORS:
            known = ", ".join(GENERATORS)
            raise ValueError(f"generator = {self.generator!r} is unknown: choose from {known}")
        if self.generator in PUBLISHED:
            if self.nodes is not None or self.edges is not None or self.seed:
                raise ValueError(
                    f"nodes, edges and seed must be left out: {self.generator} has its own"
                )
        elif self.nodes is None:
            raise ValueError(f"nodes must be given for the generator {self.generator}")
        elif self.edges is not None and self.generator not in OPEN:
            raise ValueError(f"edges must be left out: {self.generator} has its own number")
        problem = GENERATORS[self.generator](self.nodes or 0, self.edges, self.seed)
        return problem._replace(name=self.name)


def monotonicity_score(values: ArrayLike) -> float:
    """Order parameter of a sequence: the fraction of its pairs i < j with v_i <= v_j.

    The original estimates it from 512 random pairs; this counts all of them.

    Args:
      values: float [m], m >= 2.

    Raises:
      ValueError: fewer than two values, or not a vector.

    >>> monotonicity_score([1.0, 3.0, 2.0])
    0.6666666666666666
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(f"values has shape {array.shape}, expected [m] with m of at least 2")
    first, second = np.triu_indices(array.size, 1)
    return float(np.mean(array[first] <= array[second]))


def largest_component_fraction(open_bonds: np.ndarray) -> float:
    """Order parameter of a diluted grid: the fraction of its sites in the largest component.

    Args:
      open_bonds: bool [2, side, side]; entry [0, r, c] opens the bond from site (r, c) to
        (r, c + 1), entry [1, r, c] that to (r + 1, c). Bonds that leave the grid are ignored.

    Raises:
      ValueError: another shape.

    >>> largest_component_fraction(np.zeros((2, 4, 4), bool))
    0.0625
    """
    if open_bonds.ndim != 3 or open_bonds.shape[0] != 2 or len(set(open_bonds.shape[1:])) > 1:
        raise ValueError(f"open_bonds has shape {open_bonds.shape}, expected [2, side, side]")
    site = np.arange(open_bonds[0].size).reshape(open_bonds.shape[1:])
    right, down = open_bonds[0, :, :-1], open_bonds[1, :-1]
    i = np.concatenate([site[:, :-1][right], site[:-1][down]])
    j = np.concatenate([site[:, 1:][right], site[1:][down]])
    shape = (site.size, site.size)
    links = scipy.sparse.coo_array((np.ones(i.size), (i, j)), shape=shape)
    _, label = scipy.sparse.csgraph.connected_components(links, directed=False)
    return float(np.bincount(label).max() / site.size)


def hazard_gate(gain: ArrayLike, cost: ArrayLike, sharpness: float = 10.0) -> np.ndarray:
    r"""State in which a gate starts: $\eta = 1 - \exp(-\mathrm{softplus}(k (\mathrm{gain} -
    \mathrm{cost})))$, the chance that an event of that hazard happens within one unit of time.

    Since $\exp(-\mathrm{softplus}(z)) = 1 - \sigma(z)$ this is the logistic function, and is
    computed as such: it loses nothing at either end.

    Args:
      gain: order that opening would gain, any shape.
      cost: what it costs, broadcast against `gain`.
      sharpness: k.

    >>> hazard_gate(0.1, 0.1).item()
    0.5
    """
    opened: np.ndarray = scipy.special.expit(
        sharpness * (np.asarray(gain, np.float64) - np.asarray(cost, np.float64))
    )
    return opened


def ring(num_nodes: int, seed: int = 0) -> Scenario:
    """A ring of quadratic and hinge couplings, one of each between neighbours.

    Args:
      num_nodes: n >= 3.
      seed: of NumPy's default generator.

    >>> ring(8).graph.keys
    ('Quadratic', 'DirectedHinge')
    """
    _check_least("num_nodes", num_nodes, 3)
    rng = np.random.default_rng(seed)
    i = np.arange(num_nodes)
    j = (i + 1) % num_nodes
    edges = [
        Quadratic(i, j, rng.uniform(0.1, 1.0, num_nodes)),
        DirectedHinge(i, j, rng.uniform(0.1, 2.0, num_nodes)),
    ]
    local = Landau(
        a=rng.uniform(0.05, 0.5, num_nodes),
        b=rng.uniform(0.0, 0.4, num_nodes),
        target=rng.integers(0, 2, num_nodes),
    )
    return Scenario("ring", EnergyGraph(local, edges), _start(rng.random(num_nodes)), None)


def sequence_gate(num_nodes: int, seed: int = 0, *, length: int = 64) -> Scenario:
    """Noisy sequences, each with a gate that may repair it.

    Half of the nodes are windows of a noisy ramp that start at their monotonicity score; the others
    are their gates, whose gain is the score after a running mean of five less the score before.

    Args:
      num_nodes: even, at least 4.
      seed: of NumPy's default generator.
      length: values in a window.

    >>> sequence_gate(8).graph.keys
    ('Quadratic', 'Quadratic:2', 'GateBenefit')
    """
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0.1, 2.0, _pairs(num_nodes))
    before, after = np.empty(noise.size), np.empty(noise.size)
    for k, scale in enumerate(noise):
        values = np.linspace(0, 1, length) + scale * rng.standard_normal(length)
        before[k] = monotonicity_score(values)
        after[k] = monotonicity_score(np.convolve(values, np.ones(5) / 5, mode="valid"))
    return _gated("sequence_gate", before, after - before, rng)


def connectivity_gate(num_nodes: int, seed: int = 0, *, side: int = 12) -> Scenario:
    """Diluted grids near percolation, each with a gate that may open more of its bonds.

    Half of the nodes are grids that start at the fraction of their largest component; the others
    are their gates, whose gain is what opening a tenth more of all bonds adds to that fraction.

    Args:
      num_nodes: even, at least 4.
      seed: of NumPy's default generator.
      side: sites on a side of each grid.

    >>> connectivity_gate(8).graph.num_nodes
    8
    """
    rng = np.random.default_rng(seed)
    kept = rng.uniform(0.35, 0.6, _pairs(num_nodes))
    before, after = np.empty(kept.size), np.empty(kept.size)
    for k, share in enumerate(kept):
        draw = rng.random((2, side, side))
        before[k] = largest_component_fraction(draw < share)
        after[k] = largest_component_fraction(draw < share + 0.1)
    return _gated("connectivity_gate", before, after - before, rng)


def _gated(name: str, order: np.ndarray, gain: np.ndarray, rng: np.random.Generator) -> Scenario:
    """Order parameters 0..m-1 in a ring, their gates m..2m-1; constants as in seed 001."""
    m = order.size
    part, gate = np.arange(m), np.arange(m, 2 * m)
    cost = rng.uniform(0.02, 0.1, m)
    edges = [
        Quadratic(part, (part + 1) % m, rng.uniform(0.1, 1.0, m)),
        Quadratic(part, gate, 0.7),
        GateBenefit(gate, part, 0.8, delta=gain),
    ]
    local = Landau(
        a=np.repeat([0.2, 0.25], m), b=np.repeat([0.3, 0.35], m), target=np.repeat([1.0, 0.0], m)
    )
    x0 = np.concatenate([order, hazard_gate(gain, cost)])
    return Scenario(name, EnergyGraph(local, edges), _start(x0), None)


def _start(x0: np.ndarray) -> jax.Array:
    return jnp.asarray(x0, float)


def _pairs(num_nodes: int) -> int:
    _check_least("num_nodes", num_nodes, 4)
    if num_nodes % 2:
        raise ValueError(f"num_nodes = {num_nodes} must be even: a gate for every order parameter")
    return num_nodes // 2


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} = {value} must be at least {least}")


Generator: TypeAlias = Callable[[int, int | None, int], Scenario]

PUBLISHED = ("baseline", "dense16")
"""Seed 001's two scenarios, which have one size."""

OPEN = ("uniform", "small_world", "scale_free", "hub", "clusters")
"""Random families whose number of couplings may be chosen."""


def _random(kind: str) -> Generator:
    return lambda nodes, edges, seed: random_graph(kind, nodes, edges, seed=seed)


GENERATORS: dict[str, Generator] = {
    "baseline": lambda nodes, edges, seed: baseline(),
    "dense16": lambda nodes, edges, seed: dense(),
    "sequence_gate": lambda nodes, edges, seed: sequence_gate(nodes, seed),
    "connectivity_gate": lambda nodes, edges, seed: connectivity_gate(nodes, seed),
    "random_ring": _random("ring"),
    **{kind: _random(kind) for kind in KINDS},
    "ring": lambda nodes, edges, seed: ring(nodes, seed),
}
"""Problems by name: `(nodes, edges or None, seed) -> Scenario`. `ring` is the validation plan's
(quadratic and hinge); `random_ring` is the ring of the random families."""


def true_minimum(problem: Scenario, *, bounds: tuple[float, float] = (0.0, 1.0)) -> float:
    """F* of a problem over a box, by SciPy's L-BFGS-B in double precision.

    Every suite here is convex, so the minimum is one. None of the methods that a plan compares is
    this solver.

    Args:
      problem: the scenario; where it knows its minimum over [0, 1]^n, that is the answer there.
      bounds: lower and upper bound of every coordinate.

    Returns:
      The lowest energy found, good to about the rounding of the energy.

    Raises:
      ValueError: JAX runs in single precision.

    >>> with jax.enable_x64(True):
    ...     round(true_minimum(baseline()._replace(minimum=None)), 12)
    -0.002507612086
    """
    if problem.minimum is not None and tuple(bounds) == (0.0, 1.0):
        return problem.minimum
    if jnp.result_type(float) != np.float64:
        raise ValueError("jax_enable_x64 must be on: single precision cannot tell small gaps")
    value_and_grad = jax.jit(lambda graph, x: graph.value_and_gradient(x))

    def host(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = value_and_grad(problem.graph, x)
        return float(value), np.asarray(gradient)

    x, best = np.asarray(problem.x0, np.float64), np.inf
    # a restart drops the memory of a search that rounding has stopped
    for _ in range(3):
        found = scipy.optimize.minimize(
            host,
            x,
            jac=True,
            method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(*(np.full(x.shape, end) for end in bounds)),
            options={"maxiter": 5000, "maxfun": 20000, "maxcor": 20, "ftol": 0.0, "gtol": 1e-11},
        )
        x, best = found.x, min(best, float(found.fun))
    return best
