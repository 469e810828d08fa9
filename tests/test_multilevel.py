"""The hierarchy of aggregates: positive definite, near the inverse of M, on odd graphs too."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallgain_jax as sg
from smallgain_jax.graphs import multilevel as module
from smallgain_jax.graphs.aggregation import aggregate, packed_rows, simple_graph
from smallgain_jax.graphs.choice import TRIAL_STEPS
from smallgain_jax.graphs.multilevel import multilevel, priced_couplings
from smallgain_jax.graphs.quadratic import is_quadratic
from smallgain_jax.spectral.rows import Sigmoid
from smallgain_jax.tools import hard
from smallgain_jax.tools.scenarios import random_graph

from .graphs import fixed_shape_graph, stack


@pytest.fixture
def small_bottom(monkeypatch):
    """Several levels on graphs small enough for dense oracles."""
    monkeypatch.setattr(module, "BOTTOM", 6)


def grid(side):
    k = np.arange(side * side).reshape(side, side)
    i = np.concatenate([k[:, :-1].ravel(), k[:-1].ravel()])
    return i, np.concatenate([k[:, 1:].ravel(), k[1:].ravel()])


def spring_graph(i, j, num_nodes, local, weight=1.0):
    return sg.EnergyGraph(
        sg.Landau(a=np.broadcast_to(local, num_nodes)), sg.Quadratic(i, j, weight)
    )


@eqx.filter_jit
def solve(hierarchy, graph, x, rows, free, g):
    return hierarchy.precondition(graph, x, rows, free)(g)


@eqx.filter_jit
def cycle_matrix(hierarchy, graph, x, rows, free):
    """The cycle as a matrix over the raveled state, column by column."""
    cycle = hierarchy.precondition(graph, x, rows, free)
    basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    return jax.vmap(cycle)(basis).reshape(x.size, x.size).T


@eqx.filter_jit
def parts(graph, x):
    return graph.edge_blocks(x, 0.05), graph.curvature(x, smoothing=0.05).row_sums


def model(i, j, blocks, rows):
    """M assembled by NumPy from blocks: Laplacian of the attractive couplings, rest of the rows."""
    coupling = np.maximum(-np.asarray(blocks, float)[:, 0, 1], 0)
    matrix = np.diag(np.asarray(rows, float))
    for at, value in [((i, i), -1), ((j, j), -1), ((i, j), -1), ((j, i), -1)]:
        np.add.at(matrix, at, value * coupling)
    beyond = matrix.sum(axis=1)
    return matrix + np.diag(np.maximum(beyond, 0) - beyond)


def model_of(graph, x):
    return model(np.asarray(graph.i), np.asarray(graph.j), *parts(graph, x))


def held_out(matrix, free):
    keep = np.asarray(free)
    return matrix[np.ix_(keep, keep)]


# -------------------------------------------------------------------------------- positive definite


@pytest.mark.x64
@pytest.mark.parametrize("kind", ["uniform", "scale_free", "hub", "small_world"])
def test_cycle_is_symmetric_and_positive_definite_on_random_graphs(kind, small_bottom):
    """250 graphs of each of four kinds: one structure, weights over six decades, states, holds."""
    rng = np.random.default_rng(0)
    smallest, worst, largest = np.inf, 0.0, 0.0

    @eqx.filter_jit
    def matrices(hierarchy, graphs, xs, frees):
        def one(graph, x, free):
            blocks, rows = parts(graph, x)
            return cycle_matrix(hierarchy, graph, x, rows, free), blocks, rows

        return jax.vmap(one)(graphs, xs, frees)

    base = fixed_shape_graph(kind, 0, 20, 40)
    hierarchy = multilevel(base)
    assert len(hierarchy.sizes) > 1

    def varied(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.broadcast_to(leaf, (250, *leaf.shape))
        return jnp.asarray(np.asarray(leaf) * rng.uniform(0, 2, (250, *leaf.shape)) ** 3)

    graphs = jax.tree.map(varied, base)
    xs, frees = jnp.asarray(rng.random((250, 20))), jnp.asarray(rng.random((250, 20)) < 0.8)
    i, j = np.asarray(base.i), np.asarray(base.j)
    found = map(np.asarray, (*matrices(hierarchy, graphs, xs, frees), frees))
    for matrix, blocks, rows, free in zip(*found):
        assert np.all(matrix[~free] == 0)
        assert np.all(matrix[:, ~free] == 0)
        assert np.abs(matrix - matrix.T).max() <= 1e-10 * np.abs(matrix).max()
        operator = held_out(model(i, j, blocks, rows), free)
        roots = np.linalg.eigvals(held_out(matrix, free) @ operator).real
        assert np.linalg.eigvalsh(held_out(matrix, free))[0] > 0
        smallest, largest = min(smallest, roots.min()), max(largest, roots.max())
        worst = max(worst, roots.max() / roots.min())
    print(f"\n{kind}: spectrum of B M in [{smallest:.3f}, {largest:.3f}], condition {worst:.1f}")
    bound = 1 + module.VISIT_GROWTH
    assert largest <= bound + 1e-9
    assert smallest > 0


def test_polynomial_of_the_visits_stays_where_it_is_positive():
    low, high = module.VISIT
    t = np.linspace(0, 1 + module.VISIT_GROWTH, 1001)
    z = move = np.zeros_like(t)
    left = np.ones_like(t)
    for keep, take in module._chebyshev(2, low, high):
        move = keep * move + take * left
        z, left = z + move, left - t * move
    inside = t * z
    assert inside[1:].min() > 0
    np.testing.assert_allclose(inside.max(), 1 + module.VISIT_GROWTH, rtol=1e-5)
    assert low + high > 1 + module.VISIT_GROWTH


def test_smoother_contracts_on_the_whole_spectrum():
    t = np.linspace(0, 1, 1001)[1:]
    left, move = np.ones_like(t), np.zeros_like(t)
    for keep, take in module._chebyshev(module.DEGREE, *module.SMOOTH):
        move = keep * move + take * left
        left = left - t * move
    assert np.abs(left).max() < 1


# ------------------------------------------------------------------------------- the operator it is


def test_operator_is_the_hessian_of_springs(x64, eps):
    rng = np.random.default_rng(1)
    i, j = grid(4)
    graph = spring_graph(i, j, 16, rng.uniform(0.1, 1, 16), rng.uniform(0.1, 2, i.size))
    x = jnp.asarray(rng.random(16), float)
    np.testing.assert_allclose(model_of(graph, x), jax.hessian(graph.energy)(x), atol=20 * eps)


@pytest.mark.x64
@pytest.mark.parametrize("seed", range(5))
def test_operator_majorizes_the_hessian(seed):
    """Where hinges count as they are: the Hessian with its activities is below M."""
    graph = random_graph("uniform", 30, 90, seed=seed).graph
    x = jnp.asarray(np.random.default_rng(seed).random(30))
    blocks = np.asarray(parts(graph, x)[0])
    hessian = np.diag(np.asarray(graph.local_rows(x)))
    for k, (a, b) in enumerate(zip(np.asarray(graph.i), np.asarray(graph.j))):
        hessian[np.ix_([a, b], [a, b])] += blocks[k]
    assert np.linalg.eigvalsh(model_of(graph, x) - hessian)[0] > -1e-12


def test_couplings_and_rows_agree_with_the_curvature(eps):
    graph = random_graph("uniform", 40, 160, seed=3).graph
    x = jnp.asarray(np.random.default_rng(3).random(40), float)
    couplings, local = eqx.filter_jit(priced_couplings)(graph, x, Sigmoid(0.05))
    expected = parts(graph, x)[1]
    blocks = np.asarray(parts(graph, x)[0])
    mixed = np.maximum(-blocks[:, 0, 1], 0)
    gates = np.asarray(graph.family_index) == 3
    np.testing.assert_allclose(couplings, mixed[~gates], rtol=50 * eps)
    twice = np.zeros(40)
    np.add.at(twice, np.asarray(graph.i), 2 * mixed)
    np.add.at(twice, np.asarray(graph.j), 2 * mixed)
    np.testing.assert_allclose(local, expected - twice, atol=200 * eps)


def test_weak_anchors_survive_rounding():
    """Rows of 8 minus couplings of 8 would lose an anchor of 1e-7 in single precision."""
    i, j = grid(5)
    graph = spring_graph(i, j, 25, 5e-8)
    _, local = eqx.filter_jit(priced_couplings)(graph, jnp.zeros(25), Sigmoid(0.05))
    np.testing.assert_allclose(local, 1e-7, rtol=1e-5)


@pytest.mark.x64
def test_bottom_alone_is_the_inverse():
    rng = np.random.default_rng(2)
    i, j = grid(5)
    graph = spring_graph(i, j, 25, rng.uniform(0.1, 1, 25), rng.uniform(0.1, 2, i.size))
    free = jnp.asarray(rng.random(25) < 0.7)
    rows = graph.curvature(jnp.zeros(25)).row_sums
    found = cycle_matrix(multilevel(graph), graph, jnp.zeros(25), rows, free)
    inverse = np.linalg.inv(held_out(model_of(graph, jnp.zeros(25)), free))
    np.testing.assert_allclose(held_out(np.asarray(found), free), inverse, rtol=1e-10, atol=1e-10)


@pytest.mark.x64
def test_rows_beyond_the_graphs_count_as_local_curvature():
    i, j = grid(5)
    graph = spring_graph(i, j, 25, 0.1)
    x, free = jnp.zeros(25), jnp.ones(25, bool)
    rows = graph.curvature(x).row_sums
    found = cycle_matrix(multilevel(graph), graph, x, rows + 3.0, free)
    inverse = np.linalg.inv(model_of(graph, x) + 3.0 * np.eye(25))
    np.testing.assert_allclose(found, inverse, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------- does it do what it is for


def condition_number(side):
    """Of the preconditioned Hessian of a grid; dense."""
    graph = spring_graph(*grid(side), side * side, 1e-4)
    x, free = jnp.zeros(side * side), jnp.ones(side * side, bool)
    rows = graph.curvature(x).row_sums
    cycle = np.asarray(cycle_matrix(multilevel(graph), graph, x, rows, free))
    lower = np.linalg.cholesky(model_of(graph, x))
    roots = np.linalg.eigvalsh(lower.T @ cycle @ lower)
    return roots[-1] / roots[0]


@pytest.mark.x64
def test_condition_number_hardly_grows_with_the_grid(small_bottom):
    """With rows alone it is multiplied by nine from one of these grids to the other."""
    small, large = condition_number(8), condition_number(24)
    print(f"\ncondition number {small:.2f} at 8 x 8, {large:.2f} at 24 x 24")
    assert large < 2 * small


@pytest.mark.x64
def test_long_chain_takes_few_iterations():
    n = 4096
    here = np.arange(n - 1)
    graph = spring_graph(here, here + 1, n, np.where(np.arange(n) % 100, 1e-6, 1e-4))
    x = jnp.zeros(n)
    cycle = eqx.filter_jit(multilevel(graph).precondition)(
        graph, x, graph.curvature(x).row_sums, jnp.ones(n, bool)
    )
    target = jnp.asarray(np.random.default_rng(0).standard_normal(n))
    count = iterations(graph, cycle, target)
    assert count < iterations(graph, lambda g: g / graph.curvature(x).row_sums, target) / 10


def iterations(graph, precondition, target, tolerance=1e-6):
    """Conjugate gradients on the Hessian of a quadratic graph."""
    product = jax.jit(lambda v: jax.jvp(graph.gradient, (jnp.zeros_like(v),), (v,))[1])
    precondition = eqx.filter_jit(precondition)
    left, x = target, jnp.zeros_like(target)
    move = z = precondition(left)
    slope = jnp.vdot(left, z)
    for count in range(1, 5000):
        bent = product(move)
        length = slope / jnp.vdot(move, bent)
        x, left = x + length * move, left - length * bent
        if jnp.linalg.norm(left) <= tolerance * jnp.linalg.norm(target):
            return count
        z = precondition(left)
        slope, old = jnp.vdot(left, z), slope
        move = z + slope / old * move
    raise AssertionError("not converged")


# ------------------------------------------------------------------------------ states and batches


@pytest.mark.x64
def test_vector_nodes_are_coordinates_beside_each_other(small_bottom):
    rng = np.random.default_rng(4)
    i, j = grid(5)
    graph = spring_graph(i, j, 25, 0.01)
    hierarchy = multilevel(graph)
    x = jnp.asarray(rng.random((25, 3)))
    free = jnp.asarray(rng.random((25, 3)) < 0.8)
    g = jnp.asarray(rng.random((25, 3)))
    rows = graph.curvature(x).row_sums
    found = solve(hierarchy, graph, x, rows, free, g)
    for k in range(3):
        alone = solve(hierarchy, graph, x[:, k], rows[:, k], free[:, k], g[:, k])
        np.testing.assert_allclose(found[:, k], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.x64
def test_vector_nodes_that_mix_coordinates_stay_positive_definite(small_bottom):
    """Distances: curvature of both signs, and coordinates that feel each other."""
    rng = np.random.default_rng(5)
    i, j = grid(4)

    def stress(a, b, length):
        return (jnp.sqrt(jnp.sum((a - b) ** 2) + 1e-6) - length) ** 2

    family = sg.PairTerm(stress, i, j, params=rng.uniform(0.1, 1, i.size))
    graph = sg.EnergyGraph(None, family, num_nodes=16)
    x = jnp.asarray(rng.random((16, 2)))
    rows = graph.curvature(x).row_sums
    matrix = cycle_matrix(multilevel(graph, x), graph, x, rows, jnp.ones((16, 2), bool))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix)[0] > 0


def test_batch_of_weights_is_one_by_one(eps, small_bottom):
    rng = np.random.default_rng(6)
    i, j = grid(5)
    graphs = [spring_graph(i, j, 25, 0.1, rng.uniform(0.1, 1, i.size)) for _ in range(3)]
    hierarchy = multilevel(graphs[0])
    x, g = jnp.zeros(25), jnp.asarray(rng.random(25), float)

    def one(graph):
        return solve(hierarchy, graph, x, graph.curvature(x).row_sums, jnp.ones(25, bool), g)

    found = jax.vmap(one)(stack(graphs))
    expected = np.stack([one(graph) for graph in graphs])
    np.testing.assert_allclose(found, expected, rtol=2000 * eps, atol=2000 * eps)


def test_values_are_renewed_only_when_they_moved(small_bottom):
    i, j = grid(5)
    graph = spring_graph(i, j, 25, 0.1)
    x, free, g = jnp.zeros(25), jnp.ones(25, bool), jnp.ones(25)
    hierarchy = multilevel(graph)

    def rows(graph):
        return graph.curvature(x).row_sums

    fresh = eqx.filter_jit(lambda graph: hierarchy.precondition(graph, x, rows(graph), free))
    renewed = eqx.filter_jit(lambda c, graph, free: c.renewed(graph, x, rows(graph), free)(g))
    cycle, apply = fresh(graph), eqx.filter_jit(lambda c: c(g))
    near, far = (spring_graph(i, j, 25, 0.1, scale) for scale in (1.01, 2.0))
    np.testing.assert_allclose(renewed(cycle, near, free), apply(cycle), rtol=1e-5)
    np.testing.assert_allclose(renewed(cycle, far, free), apply(fresh(far)), rtol=1e-5)
    assert not np.allclose(apply(fresh(near)), apply(cycle), rtol=1e-5)
    assert renewed(cycle, graph, free.at[3].set(False))[3] == 0


@pytest.mark.x64
def test_descent_renews_what_moved_from_the_blank(small_bottom):
    """The values in the state, blank at first, are those of the last step's surroundings."""
    i, j = grid(5)
    graph = spring_graph(i, j, 25, 0.1)
    hierarchy = multilevel(graph)
    x0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (25, 2)))
    blank = sg.majorized_descent(graph, metric=hierarchy).init(x0).metric_values
    kept = sg.relax(graph, x0, bounds=None, metric=hierarchy).state.metric_values
    fresh = eqx.filter_jit(hierarchy.precondition)(
        graph, x0, graph.curvature(x0).row_sums, jnp.ones(x0.shape, bool)
    )
    assert jax.tree.structure(blank) == jax.tree.structure(kept)
    for nothing, one, other in zip(*map(jax.tree.leaves, (blank, kept, fresh.values))):
        assert not np.any(nothing)
        assert nothing.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-12)


# --------------------------------------------------------------------------------------- odd graphs

ODD = {
    "empty": (np.zeros(0, int), np.zeros(0, int), 5),
    "one node": (np.zeros(0, int), np.zeros(0, int), 1),
    "isolated nodes": (np.array([0, 5]), np.array([5, 9]), 40),
    "disconnected": (np.arange(0, 400, 2), np.arange(1, 400, 2), 400),
    "duplicate edges": (np.tile(np.arange(300), 3), np.tile(np.arange(1, 301), 3), 301),
    "both directions": (
        np.r_[np.arange(300), np.arange(1, 301)],
        np.r_[np.arange(1, 301), np.arange(300)],
        301,
    ),
    "star": (np.zeros(2000, int), np.arange(1, 2001), 2001),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_graphs_give_a_finite_descent(name):
    i, j, n = ODD[name]
    hierarchy = multilevel(spring_graph(i, j, n, 1.0))
    for local, weight in [(0.0, 0.0), (0.0, 1.0), (0.3, 0.0), (0.3, 1.0)]:
        check_descent(hierarchy, spring_graph(i, j, n, local, weight))


def check_descent(hierarchy, graph):
    n = graph.num_nodes
    x = jnp.zeros(n)
    g = jnp.asarray(np.random.default_rng(0).standard_normal(n), float)
    rows = graph.curvature(x).row_sums
    z = solve(hierarchy, graph, x, rows, jnp.ones(n, bool), g)
    assert bool(jnp.all(jnp.isfinite(z)))
    assert float(jnp.vdot(z, g)) > 0
    nothing = solve(hierarchy, graph, x, rows, jnp.zeros(n, bool), g)
    assert np.array_equal(nothing, np.zeros(n))


@pytest.mark.x64
@pytest.mark.parametrize("name", ODD)
def test_odd_graphs_are_solved(name):
    """Parts that a diagonal or the bottom solves are exact; the rest converges."""
    i, j, n = ODD[name]
    graph = spring_graph(i, j, n, 1e-3)
    x = jnp.zeros(n)
    cycle = eqx.filter_jit(multilevel(graph).precondition)(
        graph, x, graph.curvature(x).row_sums, jnp.ones(n, bool)
    )
    target = jnp.asarray(np.random.default_rng(0).standard_normal(n))
    assert iterations(graph, cycle, target, 1e-8) <= 25


@pytest.mark.once
def test_star_of_many_leaves_is_built_and_packed():
    n = 100_001
    graph = spring_graph(np.zeros(n - 1, int), np.arange(1, n), n, 1e-3)
    hierarchy = multilevel(graph)
    assert hierarchy.sizes == (n, 1)
    held = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(hierarchy, eqx.is_array)))
    # two ends, neighbours and edges to them, aggregates, and the rows of what sticks out
    assert held <= 13 * n


@pytest.mark.x64
def test_star_of_many_leaves_is_solved():
    """By elimination: every leaf hangs on the hub alone."""
    n, a = 100_001, 1e-3
    target = np.random.default_rng(0).random(n)
    graph = sg.EnergyGraph(
        sg.Landau(a=np.full(n, a), target=target),
        sg.Quadratic(np.zeros(n - 1, int), np.arange(1, n)),
    )
    found = sg.conjugate_gradients(graph, jnp.zeros(n), multilevel(graph), tol=1e-10)
    kept = 1 / (1 + a)  # share of the hub that a leaf takes on
    hub = (a * target[0] + a * kept * target[1:].sum()) / (a + (n - 1) * a * kept)
    leaves = kept * (hub + a * target[1:])
    assert bool(found.converged)
    np.testing.assert_allclose(found.x, np.r_[hub, leaves], atol=1e-8)


@pytest.fixture(scope="module")
def islands():
    """A chain with edges twice and both ways, a star, lone nodes, and edges without weight."""
    chain, star, _, loose = np.split(np.arange(400), [150, 300, 330])
    i = np.r_[chain[:-1], chain[:-1], chain[1:], np.full(149, star[0]), loose[:-1]]
    j = np.r_[chain[1:], chain[1:], chain[:-1], star[1:], loose[1:]]
    weight = np.where(i < loose[0], 1.0, 0.0)
    island = np.repeat([0, 1, 2, 3], [150, 150, 30, 70])
    return i, j, weight, island


@pytest.mark.x64
def test_islands_are_relaxed_inside_a_box(islands):
    """Targets inside the box: the solution of the linear system is, too."""
    i, j, weight, _ = islands
    target = np.random.default_rng(0).random(400)
    x = relaxed_islands(islands, np.full(400, 0.01), target)
    matrix = np.diag(np.full(400, 0.01))
    for at, value in [((i, i), 1), ((j, j), 1), ((i, j), -1), ((j, i), -1)]:
        np.add.at(matrix, at, value * weight)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, 0.01 * target), atol=1e-8)


@pytest.mark.x64
def test_islands_end_at_their_bounds(islands):
    """Every node is pushed beyond the box, each island to one side: nothing is left free."""
    up = islands[-1] % 2 == 0
    x = relaxed_islands(islands, np.ones(400), np.where(up, 5.0, -4.0))
    assert np.array_equal(x, up)


def relaxed_islands(islands, a, target):
    i, j, weight, _ = islands
    graph = sg.EnergyGraph(sg.Landau(a=a, target=target), sg.Quadratic(i, j, weight))
    x0 = jnp.full(400, 0.5)
    found = sg.relax(graph, x0, metric=multilevel(graph), tol=1e-10)
    assert bool(found.info.converged)
    assert np.all(np.diff(found.energy) <= 1e-12)
    return np.asarray(found.x)


@pytest.mark.once
def test_traced_edges_are_refused():
    graph = spring_graph([0], [1], 2, 1.0)
    with pytest.raises(ValueError, match="graph must be concrete"):
        jax.jit(lambda graph: multilevel(graph).term)(graph)


# -------------------------------------------------------------------------------------- aggregation


@pytest.mark.once
@pytest.mark.parametrize("seed", range(3))
def test_every_node_with_a_neighbour_is_merged(seed):
    rng = np.random.default_rng(seed)
    i, j = rng.integers(0, 500, (2, 900))
    keep = i != j
    graph, _ = simple_graph(i[keep], j[keep], rng.random(keep.sum()), 500)
    merged = aggregate(graph, 1, rng)
    count = merged.graph.num_nodes
    alone = np.setdiff1d(np.arange(500), np.r_[graph.i, graph.j])
    assert np.array_equal(np.flatnonzero(merged.node == count), alone)
    assert np.bincount(merged.node, minlength=count)[:count].min() >= 2
    inside = merged.node[graph.i] == merged.node[graph.j]
    assert np.array_equal(merged.edge == merged.graph.i.size, inside)
    # what is between two aggregates is summed onto the edge between them
    total = np.bincount(merged.edge[~inside], graph.strength[~inside], merged.graph.i.size)
    np.testing.assert_allclose(merged.graph.strength, total)


@pytest.mark.once
def test_weights_that_rise_along_a_chain_are_merged_evenly():
    """One heaviest edge at a time: handshakes by strength alone would merge the rest into one."""
    n = 4000
    graph, _ = simple_graph(np.arange(n - 1), np.arange(1, n), np.arange(1.0, n), n)
    merged = aggregate(graph, 1, np.random.default_rng(0))
    assert np.bincount(merged.node).max() <= 4


@pytest.mark.once
def test_packed_rows_hold_every_entry_once():
    rng = np.random.default_rng(0)
    row = np.r_[rng.integers(0, 50, 200), np.full(500, 7), np.full(3, 50)]
    packed = packed_rows(row, 50)
    rectangle = packed.columns[packed.columns < row.size]
    assert np.array_equal(np.sort(np.r_[rectangle, packed.tail]), np.flatnonzero(row < 50))
    _, at = np.nonzero(packed.columns < row.size)
    assert np.array_equal(row[rectangle], at)
    assert np.array_equal(row[packed.tail], packed.tail_row)


def test_hierarchy_is_a_pytree_of_indices():
    hierarchy = multilevel(random_graph("uniform", 300, seed=0).graph)
    leaves = [leaf for leaf in jax.tree.leaves(hierarchy) if hasattr(leaf, "dtype")]
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    assert dataclasses.is_dataclass(hierarchy)


# ------------------------------------------------------------------------- choice, quadratic graphs


@pytest.mark.once
@pytest.mark.parametrize("kind", ["uniform", "grid", "hub", "ring"])
def test_rows_are_chosen_where_they_suffice(kind):
    scenario = random_graph(kind, 2000, seed=1)
    choice = sg.choose_metric(scenario.graph, scenario.x0)
    assert choice.hierarchy is None
    steps = int(re.match(r"rows: (\d+) steps", choice.reason)[1])
    assert steps < TRIAL_STEPS  # and no more than it took


@pytest.mark.once
@pytest.mark.parametrize("name", ["grid", "chain", "large_hole"])
def test_a_hierarchy_is_chosen_where_rows_do_not_suffice(name):
    build = {"grid": hard.grid, "chain": hard.chain, "large_hole": hard.large_hole}[name]
    problem = build(1000 if name == "chain" else 40)
    choice = sg.choose_metric(problem.graph, problem.x0)
    assert choice.hierarchy.sizes[0] == problem.graph.num_nodes
    assert choice.reason.startswith("hierarchy of ")


@pytest.mark.once
def test_nothing_is_chosen_for_traced_graphs():
    graph = spring_graph([0], [1], 2, 1.0)
    reasons = []
    jax.jit(lambda graph: reasons.append(sg.choose_metric(graph)))(graph)
    assert reasons[0].hierarchy is None
    assert "traced" in reasons[0].reason


@pytest.mark.x64
@pytest.mark.parametrize("with_metric", [False, True])
def test_conjugate_gradients_solve_the_linear_system(with_metric):
    problem = hard.grid(20, 1e-2)
    graph = problem.graph
    metric = multilevel(graph) if with_metric else None
    found = sg.conjugate_gradients(graph, problem.x0, metric, tol=1e-10)
    matrix = jax.jit(jax.hessian(graph.energy))(problem.x0)
    exact = np.linalg.solve(matrix, -np.asarray(graph.gradient(problem.x0)))
    assert bool(found.converged)
    np.testing.assert_allclose(found.x, exact, atol=1e-8)


@pytest.mark.x64
def test_conjugate_gradients_need_vector_nodes_no_other_way():
    rng = np.random.default_rng(0)
    target = rng.random((30, 2))
    local = sg.Landau(a=np.full((30, 2), 0.1), target=target)
    graph = sg.EnergyGraph(local, sg.Quadratic(np.arange(29), np.arange(1, 30)))
    found = sg.conjugate_gradients(graph, np.zeros((30, 2)), multilevel(graph), tol=1e-10)
    assert float(jnp.abs(graph.gradient(found.x)).max()) < 1e-8


@pytest.mark.once
def test_quadratic_graphs_are_recognized_by_their_families():
    springs = sg.Quadratic([0], [1])
    gate = sg.GateBenefit([0], [1], delta=0.1)
    assert is_quadratic(sg.EnergyGraph(sg.Landau(a=[1.0, 1.0]), [springs, gate]))
    assert not is_quadratic(sg.EnergyGraph(sg.Landau(a=[1.0, 1.0], b=0.1), springs))
    assert not is_quadratic(sg.EnergyGraph(sg.Landau(a=[-1.0, 1.0]), springs))
    hinged = sg.EnergyGraph(sg.Landau(a=[1.0, 1.0]), sg.DirectedHinge([0], [1]))
    assert not is_quadratic(hinged)
    with pytest.raises(ValueError, match="graph must be quadratic"):
        sg.conjugate_gradients(hinged, [0.0, 1.0])


@pytest.mark.parametrize("start", [0.0, 1e4])
@pytest.mark.parametrize("unit", [1.0, 1e-12])
def test_converged_is_said_of_the_gradient_itself(start, unit, eps):
    """Far from the minimum the recurrence runs ahead of what x can hold."""
    rng = np.random.default_rng(0)
    i, j = hard.grid_edges(24)
    target = rng.integers(0, 64, 576) / 64
    local = sg.Landau(a=np.full(576, unit * 2.0**-10), target=target)
    graph = sg.EnergyGraph(local, sg.Quadratic(i, j, np.full(i.size, unit)))
    x0 = jnp.full(576, start) * (-1.0) ** jnp.arange(576)
    for metric in ("rows", "auto", sg.choose_metric(graph), multilevel(graph)):
        found = sg.conjugate_gradients(graph, x0, metric)
        norms = [float(jnp.max(jnp.abs(graph.gradient(x)))) for x in (found.x, x0)]
        np.testing.assert_allclose(found.gradient_norm, norms[0], rtol=1e-2, atol=4 * eps * unit)
        rounding = 4 * eps * 16.1 * unit * float(jnp.abs(found.x).max())
        assert found.converged
        assert norms[0] <= max(1e-6 * norms[1], rounding)


@pytest.mark.once
def test_metrics_of_other_graphs_are_refused():
    here = np.arange(11)
    long = sg.EnergyGraph(sg.Landau(a=np.ones(12)), sg.Quadratic(here, here + 1))
    short = sg.EnergyGraph(sg.Landau(a=np.ones(12)), sg.Quadratic(here[:9], here[:9] + 1))
    with pytest.raises(ValueError, match="the hierarchy is of 9 edges, the graph has 11"):
        sg.relax(long, np.zeros(12), metric=multilevel(short))
    with pytest.raises(TypeError, match="metric = 'row' must be a hierarchy"):
        sg.conjugate_gradients(long, np.zeros(12), "row")
    with pytest.raises(ValueError, match=r"x0\[0\] = nan must be finite"):
        sg.choose_metric(long, np.full(12, np.nan))
    with pytest.raises(ValueError, match=r"x\[0\] = nan must be finite"):
        multilevel(long, np.full(12, np.nan))
    state = sg.relax(long, np.ones(12), steps=1).state
    with pytest.raises(ValueError, match="state was made with another metric"):
        sg.relax(long, np.ones(12), metric=multilevel(long), state=state)


# ---------------------------------------------------------------------------------------- the suite

SMALL = {
    "grid": lambda seed: hard.grid(8, seed=seed),
    "chain": lambda seed: hard.chain(50, seed=seed),
    "geometric": lambda seed: hard.geometric(80, seed=seed),
    "road": lambda seed: hard.road(8, seed=seed),
    "wild": lambda seed: hard.wild(8, seed=seed),
    "obstacle": lambda seed: hard.obstacle(8, seed=seed),
    "ranking": lambda seed: hard.ranking(20, 60, seed=seed),
    "isotonic": lambda seed: hard.isotonic(20, seed=seed),
    "phase_field": lambda seed: hard.phase_field(8, seed=seed),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", SMALL)
def test_a_seed_is_a_problem(name):
    one, again, other = (SMALL[name](seed) for seed in (1, 1, 2))

    def numbers(problem):
        return [np.asarray(leaf) for leaf in jax.tree.leaves((problem.graph, problem.x0))]

    assert all(np.array_equal(a, b) for a, b in zip(numbers(one), numbers(again)))
    pairs = zip(numbers(one), numbers(other))
    assert not all(np.array_equal(a, b) for a, b in pairs)
    assert bool(jnp.all(jnp.isfinite(one.graph.gradient(one.x0))))


@pytest.mark.x64
def test_pictures_and_digits_are_built():
    pytest.importorskip("sklearn")
    assert hard.digits_labels().graph.num_nodes == 1797
    pytest.importorskip("skimage")
    problem = hard.missing_pixels(16)
    known = np.asarray(problem.graph.local[0].a) > 0
    assert 0.02 < known.mean() < 0.25
    assert np.all((hard.picture(16) >= 0) & (hard.picture(16) <= 1))
