"""What must hold at any size: cheap paths equal the plain ones, and nothing large is a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallgain_jax as sg
from smallgain_jax.curvature import block_curvature
from smallgain_jax.scenarios import KINDS, random_graph
from tests.graphs import fixed_shape_graph, stack


def rows_both_ways(graph, x):
    """Row sums and costs from columns, and from the blocks of two by two."""
    columns = graph.curvature(x, smoothing=0.05)
    blocks = block_curvature(
        graph.local_rows(x),
        graph.edge_blocks(x, 0.05),
        jnp.ones(graph.num_edges),
        graph.i,
        graph.j,
    )
    by_terms = graph.local_energy(x) + jnp.sum(graph.term_energies(x))
    return columns, blocks, graph.energy(x), by_terms


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dense"])
def test_columns_equal_blocks_and_families_sum_to_the_terms(kind, eps):
    graphs = stack([fixed_shape_graph(kind, seed) for seed in range(20)])
    x = jnp.asarray(np.random.default_rng(0).random((20, 20)), float)
    columns, blocks, energy, by_terms = jax.jit(jax.vmap(rows_both_ways))(graphs, x)
    for name in ("row_sums", "edge_cost", "lipschitz", "local_rows"):
        ours, oracle = getattr(columns, name), getattr(blocks, name)
        np.testing.assert_allclose(ours, oracle, rtol=50 * eps, atol=50 * eps)
    np.testing.assert_allclose(energy, by_terms, rtol=50 * eps, atol=50 * eps)


def test_weighted_rows_have_the_derivative_of_their_costs():
    graph = random_graph("uniform", 12, 30).graph
    x = jnp.linspace(0.1, 0.9, 12)
    weights = jnp.linspace(0.5, 1.5, graph.num_edges)
    rows, pull = jax.vjp(lambda w: graph.curvature(x, w).row_sums, weights)
    cost = graph.curvature(x).edge_cost
    np.testing.assert_allclose(pull(jnp.ones_like(rows))[0], cost.sum(axis=1), rtol=1e-5)


@pytest.mark.once
def test_a_graph_is_an_argument_of_the_program_not_a_constant():
    scenario = random_graph("uniform", 5000, 20_000)
    step = jax.jit(lambda graph, x: sg.relax(graph, x, steps=2).x)
    text = step.lower(scenario.graph, scenario.x0).as_text()
    # one array of the graph written into the program would be 80 kB of hexadecimal digits
    assert len(text) < 400_000
    assert max(map(len, text.splitlines())) < 20_000


def test_classes_of_score_do_not_depend_on_the_order_of_terms(eps):
    rng = np.random.default_rng(0)
    rows = rng.integers(50, size=(1000, 2))
    value, cost = rng.lognormal(0, 1, 1000), rng.lognormal(0, 1, (1000, 2))
    lower, upper, budget = np.zeros(1000), np.ones(1000), rng.uniform(1, 40, 50)
    run = jax.jit(lambda *fields: sg.allocate(*fields, bins=16, rounds=2).weights)
    shuffle = rng.permutation(1000)
    straight = run(value, cost, rows, lower, upper, budget)
    terms = (field[shuffle] for field in (value, cost, rows, lower, upper))
    np.testing.assert_allclose(run(*terms, budget), straight[shuffle], atol=1e4 * eps)
    scaled = run(value * 2.0**30, cost, rows, lower, upper, budget)
    np.testing.assert_allclose(scaled, straight, atol=1e4 * eps)
