"""The recorded original: energies, gradients, row sums and edge costs to 1e-10."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallgain_jax as sg
from smallgain_jax.tools import scenarios
from tests.graphs import RECORDED, recorded_graph

pytestmark = pytest.mark.x64
TOLERANCE = dict(rtol=0, atol=1e-10)


@eqx.filter_jit
def evaluate(graph, x, weights):
    energy, gradient = jax.value_and_grad(graph.energy)(x, weights)
    return energy, gradient, graph.curvature(x, weights, smoothing=sg.Ramp(1e-3))


@pytest.mark.parametrize("number", range(12))
def test_random_case(number):
    case = RECORDED["parity"][number]
    graph, order = recorded_graph(case)
    x = jnp.asarray(case["x"])
    names = [case["edges"][k]["family"] for k in order]
    weights = jnp.asarray([case["term_weights"].get(f"coup:{name}", 1.0) for name in names])
    energy, gradient, curvature = evaluate(graph, x, weights)
    np.testing.assert_allclose(energy, case["energy"], **TOLERANCE)
    np.testing.assert_allclose(gradient, case["gradient"], **TOLERANCE)
    # the original prices every gate at zero; ours prices damped gates by their curvature
    priced = jnp.asarray(["Gate" not in name for name in names])
    charged = jnp.where(priced, weights, 0)[:, None] * curvature.edge_cost
    np.testing.assert_allclose(graph.scatter(charged), case["coupling_row_sums"], **TOLERANCE)
    recorded = np.zeros(len(order))
    for position, cost in case["edge_costs"].items():
        recorded[list(order).index(int(position))] = cost
    np.testing.assert_allclose(charged.max(axis=1), recorded, **TOLERANCE)


@pytest.mark.parametrize("make", [scenarios.baseline, scenarios.dense])
def test_published_scenario(make):
    scenario = make()
    case = RECORDED["scenarios"][scenario.name]
    graph, _ = recorded_graph(case)
    x0 = jnp.asarray(case["x0"])
    np.testing.assert_allclose(scenario.x0, x0, **TOLERANCE)
    ones = jnp.ones(graph.num_edges)
    energy, gradient, _ = evaluate(graph, x0, ones)
    ours, our_gradient, _ = evaluate(scenario.graph, x0, ones)
    np.testing.assert_allclose(energy, case["reference_energy_x0"], **TOLERANCE)
    np.testing.assert_allclose(ours, energy, **TOLERANCE)
    np.testing.assert_allclose(our_gradient, gradient, **TOLERANCE)
    assert scenario.minimum == case["reference_minimum"]
