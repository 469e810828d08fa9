"""Graph builders against hand-made graphs, NetworkX and SciPy."""

import functools

import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
import scipy.sparse

from smallgain_jax.graphs.build import (
    family_parameters,
    from_edge_list,
    from_networkx,
    from_scipy,
    known_parameters,
    term_order,
)
from smallgain_jax.graphs.families import (
    FAMILIES,
    AsymmetricHinge,
    DirectedHinge,
    GateBenefit,
    PairTerm,
    Quadratic,
)
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau

RECORDS = [
    {"i": 0, "j": 1, "family": "gate_benefit", "weight": 0.5, "delta": -0.1},
    (1, 2),
    {"i": 2, "j": 3, "family": "asymmetric_hinge", "beta_j": 0.5, "alpha_i": None},
    {"i": 3, "j": 0, "family": "gate_benefit", "weight": None},
    (np.int64(0), 2, 2.0),
    {"i": 1, "j": 3, "family": "asymmetric_hinge", "alpha_i": 2, "delta": None},
]


def ends(graph):
    return list(zip(np.asarray(graph.i).tolist(), np.asarray(graph.j).tolist(), strict=True))


def weights(graph):
    return np.concatenate([np.asarray(family.weight) for family in graph.edges])


def random_records(seed, size=200, n=30):
    rng = np.random.default_rng(seed)
    records = []
    for name in rng.choice(list(FAMILIES), size):
        i, j = (int(k) for k in rng.choice(n, 2, replace=False))
        record = {"i": i, "j": j, "family": str(name)}
        for field in ("weight", *family_parameters(FAMILIES[name])):
            if rng.random() < 0.6:
                record[field] = float(rng.uniform(1, 2))
        records.append(record)
    return records


class TestEdgeList:
    def test_groups_by_family_in_order_of_appearance(self):
        graph = from_edge_list(RECORDS, num_nodes=4)
        assert graph.keys == ("GateBenefit", "Quadratic", "AsymmetricHinge")
        assert ends(graph) == [(0, 1), (3, 0), (1, 2), (0, 2), (2, 3), (1, 3)]
        assert term_order(RECORDS).tolist() == [0, 3, 1, 4, 2, 5]
        gate, quadratic, hinge = graph.edges
        np.testing.assert_allclose(gate.weight, [0.5, 1.0])
        np.testing.assert_allclose(gate.delta, [-0.1, 0.0])
        np.testing.assert_allclose(quadratic.weight, [1.0, 2.0])
        np.testing.assert_allclose(hinge.alpha_i, [1.0, 2.0])
        np.testing.assert_allclose(hinge.beta_j, [0.5, 1.0])

    @pytest.mark.parametrize("seed", range(5))
    def test_every_term_is_its_record(self, seed):
        records = random_records(seed)
        graph = from_edge_list(iter(records), num_nodes=30)
        order = term_order(records)
        assert sorted(order.tolist()) == list(range(len(records)))
        k = 0
        for family in graph.edges:
            columns = {
                name: np.asarray(getattr(family, name))
                for name in ("i", "j", "weight", *family_parameters(type(family)))
            }
            for row in range(family.num_edges):
                record = records[order[k]]
                assert FAMILIES[record["family"]] is type(family)
                expected = {**family_parameters(type(family)), "weight": 1.0, **record}
                for name, values in columns.items():
                    assert values[row] == pytest.approx(expected[name])
                k += 1
        assert k == len(records)

    @pytest.mark.once
    def test_records_keep_their_order_within_a_family(self):
        order = term_order(random_records(7))
        codes = [random_records(7)[k]["family"] for k in order]
        for name in set(codes):
            rows = [k for k in order if random_records(7)[k]["family"] == name]
            assert rows == sorted(rows)

    def test_local_energies_tell_the_number_of_nodes(self):
        local = Landau(a=jnp.ones(4))
        assert from_edge_list([(0, 1)], local).num_nodes == 4
        assert from_edge_list([(0, 1)], local).local == (local,)
        with pytest.raises(ValueError, match="num_nodes"):
            from_edge_list([(0, 1)])

    def test_no_edges(self):
        graph = from_edge_list([], num_nodes=3)
        assert (graph.num_edges, graph.edges, graph.num_nodes) == (0, (), 3)
        assert term_order([]).tolist() == []

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            (
                {"i": 0, "j": 1, "family": "spring"},
                r"records\[1\]\['family'\].*'spring'.*quadratic",
            ),
            ({"i": 0, "j": 1, "family": 3}, r"records\[1\]\['family'\]"),
            ({"i": 0, "j": 1, "colour": 3}, r"records\[1\]\['colour'\] is unknown"),
            ({"i": 0, "j": 1, "colour": None}, r"records\[1\]\['colour'\] is unknown"),
            ({"i": 0, "j": 1, "delta": 3.0}, r"records\[1\]\['delta'\].*Quadratic"),
            ({"i": 0}, r"records\[1\]\['j'\] is missing"),
            ({"i": 0.5, "j": 1}, r"records\[1\]\['i'\] = 0.5 is not an integer"),
            ({"i": 0, "j": 1, "weight": "heavy"}, r"records\[1\]\['weight'\].*not a number"),
            ({"i": 0, "j": 1, "weight": 10**400}, r"records\[1\]\['weight'\]"),
            ((0, 1, -1.0), r"records\[1\]\['weight'\] = -1.0 must be finite and at least 0"),
            ((0, 1, np.nan), r"records\[1\]\['weight'\] = nan must be finite"),
            ((0, 1, np.inf), r"records\[1\]\['weight'\] = inf must be finite"),
            ((2, 2), r"records\[1\] is a self loop"),
            ((0, -5), r"records\[1\]\['j'\] = -5 is not a node index"),
            ((2**70, 1), r"records\[1\]\['i'\].*is not a node index"),
            (
                {"i": 0, "j": 1, "family": "gate_benefit", "delta": -np.inf},
                r"records\[1\]\['delta'\] = -inf must be finite",
            ),
            (
                {"i": 0, "j": 1, "family": "damped_gate_benefit", "eta_power": 0.5},
                r"records\[1\]\['eta_power'\] = 0.5 must be finite and at least 1",
            ),
        ],
    )
    def test_names_the_record_and_the_field(self, record, message):
        with pytest.raises(ValueError, match="^" + message):
            from_edge_list([(0, 1), record], num_nodes=3)
        with pytest.raises(ValueError, match="^" + message):
            term_order([(0, 1), record])

    @pytest.mark.parametrize("record", [5, "01", (1,), (1, 2, 3, 4)])
    def test_refuses_other_records(self, record):
        with pytest.raises(TypeError, match=r"^records\[0\] must be"):
            from_edge_list([record], num_nodes=3)

    def test_refuses_a_node_outside(self):
        with pytest.raises(ValueError, match="outside the graph"):
            from_edge_list([(0, 3)], num_nodes=3)


class TestNetworkx:
    @pytest.mark.parametrize("kind", [nx.Graph, nx.DiGraph, nx.MultiGraph, nx.MultiDiGraph])
    def test_edges_and_weights_are_the_graphs(self, kind):
        rng = np.random.default_rng(0)
        network = kind()
        network.add_nodes_from("zyxwvuts")
        for _ in range(20):
            u, v = rng.choice(list("zyxwvuts"), 2, replace=False)
            network.add_edge(str(u), str(v), weight=float(rng.uniform(0, 2)))
        graph = from_networkx(network)
        nodes = list(network.nodes)
        expected = [(nodes.index(u), nodes.index(v)) for u, v in network.edges()]
        assert ends(graph) == expected
        assert graph.num_nodes == 8
        np.testing.assert_allclose(
            weights(graph), [w for _, _, w in network.edges(data="weight")], rtol=1e-6
        )

    def test_energy_is_the_laplacian_form(self):
        network = nx.karate_club_graph()
        x = np.random.default_rng(0).random(network.number_of_nodes())
        laplacian = nx.laplacian_matrix(network).toarray()
        energy = float(from_networkx(network).energy(jnp.asarray(x)))
        assert energy == pytest.approx(float(x @ laplacian @ x), rel=1e-5)

    def test_attributes_choose_families_and_parameters(self):
        network = nx.DiGraph()
        network.add_edge("b", "a", colour="red")
        network.add_edge("a", "c", family="gate_benefit", delta=0.5, weight=2, alpha_i=9)
        network.add_edge("c", "b", family="directed_hinge")
        network.add_edge("a", "b", alpha_i=3.0)
        graph = from_networkx(network, family=AsymmetricHinge)
        hinge, gate, order = graph.edges
        assert graph.keys == ("AsymmetricHinge", "GateBenefit", "DirectedHinge")
        np.testing.assert_allclose(hinge.alpha_i, [1.0, 3.0])
        np.testing.assert_allclose(hinge.weight, 1.0)
        assert (gate.delta.item(), gate.weight.item()) == (0.5, 2.0)
        assert (order.i.item(), order.j.item()) == (2, 0)

    def test_defaults_of_a_file_that_networkx_read(self):
        network = nx.DiGraph([(0, 1)], edge_default={"weight": 5.0, "family": "gate_benefit"})
        network.add_edge(1, 2, weight=0.5, family="quadratic")
        graph = from_networkx(network)
        assert graph.keys == ("GateBenefit", "Quadratic")
        assert weights(graph).tolist() == [5.0, 0.5]

    def test_a_named_family_joins_the_default_one(self):
        network = nx.DiGraph([(0, 1), (1, 2)])
        network.add_edge(2, 3, family="quadratic")
        assert from_networkx(network).keys == ("Quadratic",)

    def test_other_weight_attribute_or_none(self):
        network = nx.Graph()
        network.add_edge(0, 1, weight=5.0, cost=3.0)
        assert weights(from_networkx(network, weight="cost")).tolist() == [3.0]
        assert weights(from_networkx(network, weight=None)).tolist() == [1.0]

    def test_a_partial_pair_term_is_a_family(self):
        family = functools.partial(PairTerm, lambda a, b: jnp.cosh(a - b))
        assert from_networkx(nx.path_graph(3), family=family).num_edges == 2

    def test_isolated_nodes_count(self):
        assert from_networkx(nx.empty_graph(4)).num_nodes == 4

    def test_local_energies_must_agree(self):
        local = Landau(a=jnp.ones(3))
        assert from_networkx(nx.path_graph(3), local).local == (local,)
        with pytest.raises(ValueError, match="disagree"):
            from_networkx(nx.path_graph(4), local)

    @pytest.mark.parametrize(
        ("attributes", "message"),
        [
            ({"family": "spring"}, r"\['family'\] = 'spring' is unknown"),
            ({"weight": -1}, r"\['weight'\] = -1.0 must be finite and at least 0"),
            ({"weight": "x"}, r"\['weight'\] = 'x' is not a number"),
            ({"family": "gate_benefit", "delta": np.inf}, r"\['delta'\] = inf must be finite"),
        ],
    )
    def test_names_the_edge(self, attributes, message):
        network = nx.Graph([("a", "b")])
        network.add_edge("b", "c", **attributes)
        with pytest.raises(ValueError, match=r"^graph.edges\['b', 'c'\]" + message):
            from_networkx(network)

    def test_refuses_self_loops(self):
        with pytest.raises(ValueError, match=r"^graph.edges\['a', 'a'\] is a self loop"):
            from_networkx(nx.Graph([("a", "b"), ("a", "a")]))


def random_matrix(seed, *, symmetric, n=20):
    dense = scipy.sparse.random_array((n, n), density=0.2, rng=seed).toarray()
    np.fill_diagonal(dense, 0)
    return dense + dense.T if symmetric else dense


class TestScipy:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil"])
    def test_symmetric_matrices_give_each_pair_once(self, seed, kind):
        dense = random_matrix(seed, symmetric=True)
        graph = from_scipy(scipy.sparse.coo_array(dense).asformat(kind))
        i, j = np.nonzero(np.triu(dense))
        assert ends(graph) == list(zip(i.tolist(), j.tolist(), strict=True))
        np.testing.assert_allclose(weights(graph), dense[i, j], rtol=1e-6)
        x = np.random.default_rng(seed).random(20)
        expected = float(x @ (np.diag(dense.sum(1)) - dense) @ x)
        assert float(graph.energy(jnp.asarray(x))) == pytest.approx(expected, rel=1e-5)

    def test_other_matrices_give_every_entry(self):
        dense = random_matrix(1, symmetric=False)
        graph = from_scipy(scipy.sparse.csc_matrix(dense), family=DirectedHinge)
        i, j = np.nonzero(dense)
        assert graph.keys == ("DirectedHinge",)
        assert ends(graph) == list(zip(i.tolist(), j.tolist(), strict=True))
        np.testing.assert_allclose(weights(graph), dense[i, j], rtol=1e-6)

    def test_symmetric_to_rounding_is_symmetric(self):
        dense = random_matrix(3, symmetric=True) + 0.1 * np.diag(np.ones(19), 1)
        dense = (dense + dense.T) / 2
        root = np.sqrt(dense.sum(1))
        # as D^-1/2 K D^-1/2 comes out of two products that round differently
        lopsided = scipy.sparse.csr_array(dense / root[:, None] / root)
        pairs = np.count_nonzero(np.triu(dense))
        assert abs(lopsided - lopsided.T).max() > 0
        graph = from_scipy(lopsided)
        assert graph.num_edges == pairs
        i, j = np.nonzero(np.triu(dense))
        np.testing.assert_allclose(weights(graph), dense[i, j] / (root[i] * root[j]), rtol=1e-6)
        single = scipy.sparse.csr_array((dense / root[:, None] / root).astype(np.float32))
        single.data *= 1 + 1e-7 * np.random.default_rng(0).random(single.nnz, np.float32)
        assert from_scipy(single).num_edges == pairs

    def test_a_truly_asymmetric_one_is_told_and_can_be_symmetrized(self):
        matrix = scipy.sparse.csr_array([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
        with pytest.warns(UserWarning, match=r"matrix is not symmetric: \[0, 1\] = 3 and"):
            graph = from_scipy(matrix)
        assert (ends(graph), weights(graph).tolist()) == ([(0, 1), (1, 0), (2, 0)], [3, 1, 4])
        expected = {"mean": [2.0, 2.0], "sum": [4.0, 4.0], "max": [3.0, 4.0]}
        for how, values in expected.items():
            graph = from_scipy(matrix, symmetrize=how)
            assert (ends(graph), weights(graph).tolist()) == ([(0, 1), (0, 2)], values)
        assert ends(from_scipy(matrix, symmetrize=False)) == [(0, 1), (1, 0), (2, 0)]
        symmetric = scipy.sparse.csr_array([[0.0, 3.0], [3.0, 0.0]])
        directed = from_scipy(symmetric, family=DirectedHinge, symmetrize=False)
        assert ends(directed) == [(0, 1), (1, 0)]
        with pytest.raises(ValueError, match=r"^symmetrize = 'min' is unknown"):
            from_scipy(matrix, symmetrize="min")

    def test_a_pair_stored_once_needs_no_word(self):
        matrix = scipy.sparse.csr_array([[0.0, 3.0], [0.0, 0.0]])
        assert weights(from_scipy(matrix)).tolist() == [3.0]

    def test_agrees_with_networkx(self):
        network = nx.les_miserables_graph()
        one, other = from_networkx(network), from_scipy(nx.to_scipy_sparse_array(network))
        x = jnp.linspace(0, 1, one.num_nodes)
        assert float(one.energy(x)) == pytest.approx(float(other.energy(x)), rel=1e-5)
        assert one.num_edges == other.num_edges

    def test_duplicates_are_summed_and_the_matrix_is_left_alone(self):
        rows, columns = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])
        matrix = scipy.sparse.coo_array(([1.0, 2.0, 3.0, 0.0], (rows, columns)), shape=(3, 3))
        graph = from_scipy(matrix)
        assert (ends(graph), weights(graph).tolist()) == ([(0, 1)], [3.0])
        assert matrix.nnz == 4
        csr = scipy.sparse.csr_array(([1.0, 2.0], [2, 1], [0, 2, 2, 2]), shape=(3, 3))
        from_scipy(csr)
        assert csr.indices.tolist() == [2, 1]

    def test_stored_zeros_are_edges_off_the_diagonal(self):
        matrix = scipy.sparse.coo_array(([0.0, 0.0], ([0, 1], [0, 2])), shape=(3, 3))
        assert (ends(from_scipy(matrix)), from_scipy(matrix).num_nodes) == ([(1, 2)], 3)

    @pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
    def test_other_dtypes(self, dtype):
        dense = np.array([[0, 1], [1, 0]], dtype)
        assert weights(from_scipy(scipy.sparse.coo_array(dense))).tolist() == [1.0]

    def test_empty(self):
        graph = from_scipy(scipy.sparse.coo_array((3, 3)), Landau(a=jnp.ones(3)))
        assert (graph.num_edges, graph.num_nodes) == (0, 3)

    @pytest.mark.parametrize(
        ("dense", "message"),
        [
            ([[0.0, 1.0], [1.0, 2.0]], r"matrix\[1, 1\] = 2.0 must be 0"),
            ([[np.nan, 1.0], [1.0, 0.0]], r"matrix\[0, 0\] = nan must be 0"),
            ([[0.0, -1.0], [-1.0, 0.0]], r"matrix\[0, 1\] = -1.0 must be finite and at least 0"),
            ([[0.0, 1.0], [np.inf, 0.0]], r"matrix\[1, 0\] = inf must be finite"),
            ([[0.0, 1.0, 0.0]], r"matrix has shape \(1, 3\)"),
        ],
    )
    def test_names_the_entry(self, dense, message):
        with pytest.raises(ValueError, match="^" + message):
            from_scipy(scipy.sparse.csr_array(np.array(dense)))

    @pytest.mark.parametrize(
        "matrix", [np.zeros((2, 2)), scipy.sparse.csr_array(np.eye(2, k=1) * 1j)]
    )
    def test_refuses_other_types(self, matrix):
        with pytest.raises(TypeError, match=r"^matrix must be"):
            from_scipy(matrix)


def test_parameters_follow_the_families():
    assert family_parameters(Quadratic) == {}
    assert family_parameters(GateBenefit) == {"delta": 0.0}
    assert set(known_parameters()) == {
        name for family in FAMILIES.values() for name in family_parameters(family)
    }


def test_a_parameter_without_default_is_given_by_all_or_refused():
    class Shifted(Quadratic):
        shift: jnp.ndarray

        def __init__(self, i, j, weight, shift):
            super().__init__(i, j, weight)
            self.shift = jnp.asarray(shift)

    network = nx.DiGraph()
    network.add_edge(0, 1, shift=2.0)
    assert from_networkx(network, family=Shifted).edges[0].shift.tolist() == [2.0]
    network.add_edge(1, 2)
    with pytest.raises(ValueError, match=r"^shift has no default"):
        from_networkx(network, family=Shifted)


def test_equals_the_graph_made_by_hand():
    made = from_edge_list([(0, 1, 0.7), (1, 2, 0.2)], Landau(a=jnp.ones(3)))
    by_hand = EnergyGraph(Landau(a=jnp.ones(3)), Quadratic([0, 1], [1, 2], jnp.array([0.7, 0.2])))
    x = jnp.array([0.1, 0.5, 0.9])
    assert float(made.energy(x)) == float(by_hand.energy(x))


@pytest.mark.once
@pytest.mark.parametrize("spelling", ["directed_hinge", "DirectedHinge", "Directed Hinge"])
def test_a_family_may_be_spelled_in_other_ways(spelling):
    matrix = scipy.sparse.csr_array([[0.0, 2.0], [0.0, 0.0]])
    for graph in (
        from_edge_list([{"i": 0, "j": 1, "family": spelling}], num_nodes=2),
        from_networkx(nx.DiGraph([(0, 1)]), family=spelling),
        from_scipy(matrix, family=spelling),
    ):
        assert graph.keys == ("DirectedHinge",)


@pytest.mark.once
@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda m, n: from_scipy(m, family="directedhing"), ValueError, "mean 'directed_hinge'"),
        (lambda m, n: from_networkx(n, family="spring"), ValueError, "choose from quadratic"),
        (lambda m, n: from_networkx(m), TypeError, "got csr_array: from_scipy takes"),
        (lambda m, n: from_networkx([(0, 1)]), TypeError, "got list: from_edge_list takes"),
        (lambda m, n: from_scipy(n), TypeError, "got Graph: from_networkx takes"),
        (lambda m, n: from_scipy(m.toarray()), TypeError, "got ndarray: from_scipy takes scipy"),
        (lambda m, n: from_edge_list(n, num_nodes=2), TypeError, "got Graph: from_networkx"),
        (lambda m, n: from_edge_list(3, num_nodes=2), TypeError, "records must be edges, got int"),
    ],
)
def test_what_another_function_takes_is_named(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake(scipy.sparse.csr_array([[0.0, 2.0], [2.0, 0.0]]), nx.path_graph(2))
