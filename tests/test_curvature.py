import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import smallgain_jax as sg
from smallgain_jax.tools.scenarios import KINDS, random_graph
from tests.graphs import dense_matrix, fixed_shape_graph, stack

PER_KIND = 125  # times eight kinds: the thousand graphs of the bar
ITERATIONS = 10


def bounds_of(graph, x):
    """Bounds after 0..10 scaling iterations, and what the oracle needs."""
    bounds = [graph.curvature(x, scaling_iterations=k) for k in (0, 2, ITERATIONS)]
    blocks = graph.edge_blocks(x)
    hessian = jax.hessian(graph.energy)(x)
    rows = jnp.stack([bound.row_sums for bound in bounds])
    return jnp.stack([b.lipschitz for b in bounds]), rows, blocks, bounds[0].local_rows, hessian


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_and_tighten(kind, eps):
    graphs = [fixed_shape_graph(kind, seed) for seed in range(PER_KIND)]
    x = jnp.asarray(np.random.default_rng(1).random((PER_KIND, 20)), float)
    results = jax.jit(jax.vmap(bounds_of))(stack(graphs), x)
    looseness = []
    for graph, lipschitz, rows, blocks, local, hessian in zip(graphs, *map(np.asarray, results)):
        top = np.linalg.eigvalsh(hessian.astype(float)).max()
        scale = 100 * eps * lipschitz[0]
        assert (lipschitz >= top - scale).all()
        assert (np.diff(lipschitz) <= scale).all()
        for row_sums in rows:
            majorized = np.linalg.eigvalsh(np.diag(row_sums.astype(float)) - hessian)
            assert majorized.min() >= -scale
        absolute = dense_matrix(local, np.abs(blocks), np.ones(len(blocks)), graph.i, graph.j)
        perron = np.linalg.eigvalsh(absolute).max()
        assert lipschitz[-1] >= perron - scale
        looseness.append(lipschitz[-1] / perron - 1)
    assert np.median(looseness) <= 0.03


@pytest.mark.once
@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"weights": [-1.0, 1.0]}, "weights must not be negative"),
        ({"scaling": jnp.array([1.0, -1.0, 1.0])}, "scaling must be positive"),
        ({"scaling": jnp.ones(4)}, "scaling has shape"),
    ],
)
def test_no_bound_of_what_is_none(named, message):
    graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(3)), sg.Quadratic([0, 1], [1, 2], 0.5))
    with pytest.raises(ValueError, match=message):
        graph.curvature(jnp.zeros(3), **named)


@pytest.mark.once
def test_what_an_energy_of_ones_own_reads_is_read_at_each_call():
    stiffness = [1.0]
    pair = sg.PairTerm(lambda a, b: stiffness[0] * (a - b) ** 2, i=[0], j=[1])
    graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [pair])
    x = jnp.array([1.0, 0.0])
    soft = graph.energy(x), graph.curvature(x).lipschitz
    stiffness[0] = 100.0
    assert graph.energy(x) > 10 * soft[0]
    assert graph.curvature(x).lipschitz > 10 * soft[1]


def test_nearly_disconnected_parts_stay_certified(eps):
    # two stiff springs joined by almost nothing to soft ones, and one node joined to nothing
    i, j = np.array([0, 2, 1, 4]), np.array([1, 3, 2, 5])
    graph = sg.EnergyGraph(None, sg.Quadratic(i, j, [1e4, 1e-3, 1e-9, 1.0]), num_nodes=7)
    hessian = np.asarray(jax.hessian(graph.energy)(jnp.zeros(7)), float)
    for iterations in (0, 1, 30, 200):
        bound = graph.curvature(jnp.zeros(7), scaling_iterations=iterations)
        assert np.isfinite(bound.row_sums).all()
        slack = np.linalg.eigvalsh(np.diag(np.asarray(bound.row_sums, float)) - hessian).min()
        assert slack >= -100 * eps * float(bound.lipschitz)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_imprimitive_hessian_is_bounded_by_its_perron_root(seed, eps):
    # a star, and a bipartite graph: without a diagonal plain iterates take turns between two ends
    if seed:
        rng = np.random.default_rng(seed)
        i, j = rng.integers(20, size=60), 20 + rng.integers(30, size=60)
        couplings, num_nodes = rng.lognormal(0, 1, 60), 50
    else:
        i, j, couplings, num_nodes = np.zeros(99, int), np.arange(1, 100), np.ones(99), 100
    graph = sg.EnergyGraph(
        None, sg.PairTerm(lambda a, b: a * b, i, j, couplings), num_nodes=num_nodes
    )
    hessian = np.zeros((num_nodes, num_nodes))
    np.add.at(hessian, (i, j), couplings)
    perron = np.linalg.eigvalsh(hessian + hessian.T).max()
    bounds = [
        graph.curvature(jnp.zeros(num_nodes), scaling_iterations=k) for k in (0, 1, 3, 10, 30)
    ]
    found = np.array([float(bound.lipschitz) for bound in bounds])
    assert (np.diff(found) <= 100 * eps * found[0]).all()
    assert (found >= perron * (1 - 10 * eps)).all()
    assert found[3] <= 1.05 * perron
    assert found[4] <= 1.01 * perron


def test_quadratic_edge_pays_four_weights():
    graph = sg.EnergyGraph(None, sg.Quadratic([0, 1], [1, 2], [1.0, 2.0]), num_nodes=3)
    curvature = graph.curvature(jnp.zeros(3))
    np.testing.assert_allclose(curvature.edge_cost, [[4.0, 4.0], [8.0, 8.0]])
    np.testing.assert_allclose(curvature.row_sums, [4.0, 12.0, 8.0])
    np.testing.assert_allclose(
        graph.curvature(jnp.zeros(3), jnp.asarray([2.0, 0.0])).row_sums, [8, 8, 0]
    )


def test_hinges_by_activity():
    graph = sg.EnergyGraph(None, sg.DirectedHinge([0, 1], [1, 0]), num_nodes=2)
    x = jnp.asarray([1.0, 0.0])
    cost = lambda smoothing: graph.curvature(x, smoothing=smoothing).edge_cost.sum(axis=1)
    np.testing.assert_allclose(cost(None), [8.0, 8.0])
    np.testing.assert_allclose(cost(0.01), [0.0, 8.0], atol=1e-6)
    np.testing.assert_allclose(cost(sg.Ramp(2.0)), [4.0, 8.0])
    np.testing.assert_allclose(graph.hinge_activity(x, sg.Ramp(2.0)), [0.5, 1.0])


def test_vector_nodes_match_the_dense_hessian(eps):
    coupled = sg.PairTerm(lambda a, b: jnp.sum((a - b) ** 2) ** 2 + a[0] * b[1], [0, 1], [1, 2])
    graph = sg.EnergyGraph(sg.Landau(np.ones((3, 2))), coupled)
    x = jnp.asarray(np.random.default_rng(0).random((3, 2)), float)
    rows = graph.curvature(x).row_sums
    hessian = np.asarray(jax.hessian(graph.energy)(x)).reshape(6, 6)
    assert rows.shape == (3, 2)
    slack = np.linalg.eigvalsh(np.diag(np.asarray(rows).reshape(-1)) - hessian).min()
    assert slack >= -1000 * eps
    scaled = graph.curvature(x, scaling_iterations=20)
    assert np.linalg.eigvalsh(hessian).max() <= scaled.lipschitz * (1 + 10 * eps)


class TestGeneralFunction:
    def fn(self, tree, scale):
        chain = jnp.concatenate([tree["a"], tree["b"].reshape(-1)])
        return scale * jnp.sum((chain[1:] - chain[:-1]) ** 4) + jnp.sum(jnp.cos(chain))

    def tree(self):
        values = np.random.default_rng(0).random(10)
        return {
            "a": jnp.asarray(values[:4], float),
            "b": jnp.asarray(values[4:].reshape(2, 3), float),
        }

    def test_dense(self, eps):
        tree = self.tree()
        rows = sg.hessian_row_sums(self.fn, tree, 2.0)
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        hessian = jax.hessian(lambda z: self.fn(unravel(z), 2.0))(flat)
        expected = unravel(jnp.abs(hessian).sum(axis=1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=100 * eps), rows, expected)

    def test_compressed_equals_dense(self, eps):
        pytest.importorskip("asdex")
        pattern = scipy.sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(10, 10))
        sparse = sg.hessian_row_sums(self.fn, self.tree(), 2.0, sparsity=pattern)
        dense = sg.hessian_row_sums(self.fn, self.tree(), 2.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=100 * eps), sparse, dense)

    @pytest.mark.once
    def test_large_and_sparse(self):
        pytest.importorskip("asdex")
        n = 3000
        fn = lambda x: jnp.sum((x[1:] - x[:-1]) ** 2)
        with pytest.raises(ValueError, match="sparsity"):
            sg.hessian_row_sums(fn, jnp.zeros(n))
        pattern = scipy.sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(n, n))
        rows = sg.hessian_row_sums(fn, jnp.zeros(n), sparsity=pattern)
        np.testing.assert_allclose(rows[1:-1], 8.0)
        with pytest.raises(ValueError, match="sparsity has shape"):
            sg.hessian_row_sums(fn, jnp.zeros(n + 1), sparsity=pattern)


@pytest.mark.once
@pytest.mark.parametrize("activity", [sg.Sigmoid, sg.Ramp])
def test_widths_must_be_positive(activity):
    with pytest.raises(ValueError, match="eps"):
        activity(0.0)


@pytest.mark.once
def test_curvature_of_a_large_graph_is_one_program():
    graph = random_graph("uniform", 2000, 8000).graph
    lowered = jax.jit(lambda g, x: g.curvature(x, scaling_iterations=3)).lower(
        graph, jnp.zeros(2000)
    )
    assert lowered.compile().cost_analysis()["flops"] > 0
