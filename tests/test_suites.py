"""Order parameters, gates and suites against their definitions, and minima against a second way."""

import jax
import networkx as nx
import numpy as np
import pytest

from smallgain_jax.tools import scenarios, suites
from smallgain_jax.tools.suites import Suite

pytestmark = pytest.mark.once


def test_monotonicity_is_the_fraction_of_ordered_pairs():
    values = np.random.default_rng(0).integers(0, 5, 9)
    pairs = [values[i] <= values[j] for i in range(9) for j in range(i + 1, 9)]
    assert suites.monotonicity_score(values) == pytest.approx(np.mean(pairs), rel=1e-15)
    assert suites.monotonicity_score(np.arange(5)) == 1
    assert suites.monotonicity_score(-np.arange(5)) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_largest_component_is_that_of_networkx(share):
    side = 7
    bonds = np.random.default_rng(1).random((2, side, side)) < share
    graph = nx.Graph()
    graph.add_nodes_from((r, c) for r in range(side) for c in range(side))
    for r in range(side):
        for c in range(side):
            if bonds[0, r, c] and c + 1 < side:
                graph.add_edge((r, c), (r, c + 1))
            if bonds[1, r, c] and r + 1 < side:
                graph.add_edge((r, c), (r + 1, c))
    largest = max(map(len, nx.connected_components(graph)))
    assert suites.largest_component_fraction(bonds) == largest / side**2


def test_hazard_gate_is_its_formula():
    gain = np.linspace(-0.5, 0.5, 11)
    softplus = np.logaddexp(0, 10 * (gain - 0.1))
    np.testing.assert_allclose(suites.hazard_gate(gain, 0.1), -np.expm1(-softplus), rtol=1e-14)


@pytest.mark.parametrize(
    ("generator", "nodes", "edges"),
    [("ring", 8, 16), ("sequence_gate", 8, 12), ("connectivity_gate", 8, 12)],
)
def test_plans_have_their_families_and_starts(generator, nodes, edges):
    problem = Suite(generator=generator, nodes=nodes, seed=3).build()
    assert problem.name == f"{generator}-{nodes}-3"
    assert (problem.graph.num_nodes, problem.graph.num_edges) == (nodes, edges)
    start = np.asarray(problem.x0)
    assert start.min() >= 0
    assert start.max() <= 1
    if generator == "ring":
        assert problem.graph.keys == ("Quadratic", "DirectedHinge")
    else:
        # order parameters are drawn to 1, gates to 0
        np.testing.assert_array_equal(problem.graph.local[0].target, [1] * 4 + [0] * 4)


@pytest.mark.parametrize("generator", suites.GENERATORS)
def test_same_words_give_the_same_problem(generator):
    nodes = None if generator in suites.PUBLISHED else 12
    first, second = (Suite(generator=generator, nodes=nodes).build() for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(a, b)
    if nodes:
        other = Suite(generator=generator, nodes=nodes, seed=1).build()
        assert not np.array_equal(first.x0, other.x0)


@pytest.mark.x64
@pytest.mark.parametrize("generator", ["baseline", "dense16"])
def test_minimum_is_the_recorded_one(generator):
    problem = Suite(generator=generator).build()
    assert suites.true_minimum(problem) == problem.minimum
    solved = suites.true_minimum(problem._replace(minimum=None))
    np.testing.assert_allclose(solved, problem.minimum, rtol=0, atol=1e-13)


@pytest.mark.x64
def test_minimum_is_that_of_the_box_asked_for():
    problem = Suite(generator="baseline").build()
    wide, narrow = (suites.true_minimum(problem, bounds=box) for box in ((-2.0, 2.0), (0.25, 0.75)))
    assert wide < problem.minimum < narrow
    # two coordinates: a grid is an oracle
    ticks = np.linspace(0.25, 0.75, 101)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    lowest = jax.vmap(problem.graph.energy)(grid).min()
    assert narrow <= lowest <= narrow + 1e-5


def test_minimum_needs_double_precision():
    problem = scenarios.baseline()._replace(minimum=None)
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match="jax_enable_x64 must be on"),
    ):
        suites.true_minimum(problem)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(generator="magic"), "generator = 'magic' is unknown"),
        (dict(generator="ring"), "nodes must be given"),
        (dict(generator="dense16", nodes=16), "nodes, edges and seed must be left out"),
        (dict(generator="grid", nodes=9, edges=3), "edges must be left out"),
        (dict(generator="ring", nodes=2), "num_nodes = 2 must be at least 3"),
        (dict(generator="sequence_gate", nodes=5), "num_nodes = 5 must be even"),
        (dict(generator="connectivity_gate", nodes=2), "num_nodes = 2 must be at least 4"),
    ],
)
def test_impossible_suites_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Suite(**given).build()


def test_malformed_parts_are_refused():
    with pytest.raises(ValueError, match=r"values has shape \(1,\)"):
        suites.monotonicity_score([1.0])
    with pytest.raises(ValueError, match=r"open_bonds has shape \(2, 3, 4\)"):
        suites.largest_component_fraction(np.zeros((2, 3, 4), bool))
