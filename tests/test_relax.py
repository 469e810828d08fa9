import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.test_util import check_grads

import smallgain_jax as sg
from smallgain_jax.tools import scenarios
from smallgain_jax.tools.scenarios import random_graph
from tests.graphs import SLACK, fixed_shape_graph, stack, steps_to


def minimum_of(scenario):
    """F* over the box by an independent solver."""
    value_and_grad = jax.jit(jax.value_and_grad(scenario.graph.energy))

    def host(x):
        value, gradient = value_and_grad(jnp.asarray(x))
        return float(value), np.asarray(gradient, float)

    bounds = [(0, 1)] * scenario.graph.num_nodes
    options = dict(maxiter=5000, maxfun=50000, ftol=0, gtol=1e-13)
    solved = scipy.optimize.minimize(
        host, np.asarray(scenario.x0), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return solved.fun, solved.x


def is_monotone(energy, eps):
    energy = np.asarray(energy, float)
    return (np.diff(energy) <= SLACK * eps * np.abs(energy[:-1])).all()


@pytest.mark.x64
@pytest.mark.parametrize(
    ("make", "most"), [(scenarios.baseline, 4), (scenarios.dense, 8)], ids=["baseline", "dense"]
)
def test_published_scenarios_by_the_default(make, most, eps):
    scenario = make()
    result = sg.relax(scenario.graph, scenario.x0, steps=60)
    assert steps_to(result.energy, scenario.minimum, 0.1) <= most
    assert steps_to(result.energy, scenario.minimum, 1e-8) <= 60
    assert is_monotone(result.energy, eps)
    np.testing.assert_allclose(minimum_of(scenario)[0], scenario.minimum, atol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize("kind", ["uniform", "grid", "hub", "scale_free"])
def test_random_graphs_reach_the_independent_minimum(kind, eps):
    scenario = random_graph(kind, 400, seed=7)
    best, at = minimum_of(scenario)
    result = sg.relax(scenario.graph, scenario.x0, steps=150)
    drop = result.energy[0] - best
    assert result.energy[-1] - best <= 1e-10 * drop
    assert is_monotone(result.energy, eps)
    assert steps_to(result.energy, best, 1e-6) <= 38  # the prototype's figure
    np.testing.assert_allclose(result.x, at, atol=1e-4)


def test_float32_descends_to_its_rounding(eps):
    scenario = random_graph("small_world", 200, seed=1)
    result = sg.relax(scenario.graph, scenario.x0, steps=60)
    assert is_monotone(result.energy, eps)
    assert result.info.optimality < max(1e4 * eps, 1e-6)


def test_tolerance_stops_early():
    scenario = scenarios.dense()
    result = sg.relax(scenario.graph, scenario.x0, steps=60, tol=1e-3)
    steps = int(result.info.steps)
    assert result.info.converged
    assert 0 < steps < 60
    assert result.info.optimality <= 1e-3
    assert (result.energy[steps:] == result.energy[steps]).all()


@pytest.mark.once
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.05),
        optax.adam(0.05),
        optax.lbfgs(),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
    ],
    ids=["sgd", "adam", "lbfgs", "line search"],
)
def test_any_optax_optimizer_inside(optimizer):
    scenario = scenarios.baseline()
    result = sg.relax(scenario.graph, scenario.x0, optimizer, steps=80)
    assert result.energy[-1] < scenario.minimum + 0.01 * (result.energy[0] - scenario.minimum)
    assert ((result.x >= 0) & (result.x <= 1)).all()
    free = sg.relax(scenario.graph, scenario.x0, optimizer, steps=80, bounds=None)
    assert free.energy[-1] < free.energy[0]


@pytest.mark.x64
def test_box_is_respected_and_optimal():
    graph = random_graph("uniform", 60, seed=3).graph
    lower = jnp.where(jnp.arange(60) % 3 == 0, 0.4, 0.0)
    upper = jnp.where(jnp.arange(60) % 5 == 0, 0.45, 1.0)
    result = sg.relax(graph, jnp.full(60, 0.9), steps=150, bounds=(lower, upper))
    assert ((result.x >= lower) & (result.x <= upper)).all()
    gradient = graph.gradient(result.x)
    held = ((result.x <= lower) & (gradient >= 0)) | ((result.x >= upper) & (gradient <= 0))
    assert held.any()
    assert jnp.where(held, 0, jnp.abs(gradient)).max() < 1e-6
    assert result.info.optimality < 1e-6


def test_unbounded_and_vector_nodes():
    coupled = sg.PairTerm(lambda a, b: jnp.sum((a - b) ** 2) ** 2, [0, 1], [1, 2])
    graph = sg.EnergyGraph(sg.Landau(np.ones((3, 2)), target=2.0), [coupled])
    result = sg.relax(graph, jnp.arange(6.0).reshape(3, 2), steps=40, bounds=None)
    np.testing.assert_allclose(result.x, 2.0, atol=2e-3)


def test_rows_without_curvature_reach_the_wall():
    # a gate and nothing else: linear, so only the box stops it
    graph = sg.EnergyGraph(None, [sg.GateBenefit([0], [1], delta=0.1)], num_nodes=2)
    result = sg.relax(graph, jnp.asarray([0.2, 0.5]), steps=5)
    np.testing.assert_allclose(result.x, [1.0, 0.5], atol=1e-6)


@pytest.mark.x64
def test_gradient_through_the_steps():
    scenario = random_graph("uniform", 30, seed=1)

    @jax.jit
    def outcome(weight, x0):
        graph = eqx.tree_at(lambda g: g.edges[0].weight, scenario.graph, weight)
        return jnp.sum(sg.relax(graph, x0, steps=12, adjoint="unrolled").x ** 2)

    arguments = (scenario.graph.edges[0].weight, scenario.x0)
    check_grads(outcome, arguments, order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_batch_equals_one_by_one(eps):
    graphs = [fixed_shape_graph("uniform", seed, 12, 30) for seed in range(4)]
    x0 = jnp.asarray(np.random.default_rng(0).random((4, 12)), float)
    together = jax.vmap(lambda g, x: sg.relax(g, x, steps=10).energy)(stack(graphs), x0)
    for k, graph in enumerate(graphs):
        alone = sg.relax(graph, x0[k], steps=10).energy
        np.testing.assert_allclose(together[k], alone, rtol=1e4 * eps, atol=1e4 * eps)


RESUME = """
import sys
import equinox as eqx, jax, numpy as np, optax
import smallgain_jax as sg
scenario = sg.scenarios.dense()
graph = scenario.graph
for optimizer in (None, sg.small_gain(optax.sgd(0.1, momentum=0.5), graph)):
    whole = sg.relax(graph, scenario.x0, optimizer, steps=20)
    half = sg.relax(graph, scenario.x0, optimizer, steps=10)
    eqx.tree_serialise_leaves(sys.argv[1], (half.x, half.state))
    x, state = eqx.tree_deserialise_leaves(sys.argv[1], (whole.x, whole.state))
    rest = sg.relax(graph, x, optimizer, steps=10, state=state)
    np.testing.assert_array_equal(whole.x, rest.x)
    np.testing.assert_array_equal(whole.energy[11:], rest.energy[1:])
    jax.tree.map(np.testing.assert_array_equal, whole.state, rest.state)
"""


@pytest.mark.x64
def test_resumes_bit_for_bit_from_a_checkpoint(tmp_path):
    # three programs: equal to the last bit with the fusions that the flags of these tests turn off
    environment = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_ENABLE_X64": "1"}
    subprocess.run(
        [sys.executable, "-c", RESUME, tmp_path / "half.eqx"],
        env=os.environ | environment,
        check=True,
    )


@pytest.mark.once
def test_state_of_the_default_may_be_donated():
    scenario = scenarios.baseline()
    optimizer = sg.majorized_descent(scenario.graph)
    step = jax.jit(lambda g, s, x: optimizer.update(g, s, x), donate_argnums=1)
    state = optimizer.init(scenario.x0)
    for _ in range(2):
        updates, state = step(scenario.graph.gradient(scenario.x0), state, scenario.x0)
    assert jnp.isfinite(updates).all()


def test_sharded_batch_equals_one_device(eps):
    devices = jax.devices()
    assert len(devices) == 8
    axis = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    graphs = stack([fixed_shape_graph("ring", seed, 8, 8) for seed in range(8)])
    x0 = jnp.asarray(np.random.default_rng(0).random((8, 8)), float)
    solve = jax.jit(jax.vmap(lambda g, x: sg.relax(g, x, steps=8).energy))
    single = solve(graphs, x0)
    sharded = solve(*jax.device_put((graphs, x0), split))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(single, sharded, rtol=1e3 * eps, atol=1e3 * eps)


@pytest.mark.once
@pytest.mark.parametrize("objective", ["graph", "function"])
def test_explicit_meshes(objective):
    """`jax.make_mesh` has explicit axes by default; a start that is sharded is gathered."""
    scenario = scenarios.baseline()
    graph = scenario.graph
    whole = graph if objective == "graph" else lambda x: jnp.sum((x - 0.3) ** 2) + x[0] * x[1]
    plain = sg.relax(whole, scenario.x0)
    mesh = jax.make_mesh((2,), ("nodes",))
    with jax.set_mesh(mesh):
        found = sg.relax(whole, scenario.x0)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("nodes"))
        sharded = sg.relax(whole, jax.device_put(scenario.x0, rows))
        slope = jax.grad(lambda x: sg.relax(whole, scenario.x0, bounds=(x, 1.0)).x.sum())(0.0)
    np.testing.assert_allclose(found.x, plain.x, rtol=1e-5)
    np.testing.assert_allclose(sharded.x, plain.x, rtol=1e-5)
    assert np.isfinite(slope)
    # an array's own mesh is enough
    placed = jax.device_put(scenario.x0, rows)
    np.testing.assert_allclose(sg.relax(whole, placed).x, plain.x, rtol=1e-5)
    for method in (graph.energy, graph.term_energies, graph.rows, graph.gradient):
        expected = method(scenario.x0)
        np.testing.assert_allclose(method(placed), expected, rtol=1e-5)
        np.testing.assert_allclose(
            jax.jit(lambda x, method=method: method(x))(placed), expected, rtol=1e-5
        )


@pytest.mark.once
@pytest.mark.parametrize("ends", [(0, 7), (-1, 0), (1, 1)])
def test_traced_ends_that_are_none_give_no_answer(ends):
    def relaxed(i):
        springs = sg.Quadratic(i, jnp.array([1, 2]), 1.0)
        return sg.relax(sg.EnergyGraph(sg.Landau(jnp.ones(3)), springs), jnp.full(3, 0.5))

    result = jax.jit(relaxed)(jnp.array(ends))
    assert np.all(np.isnan(result.x))
    assert not result.info.converged


def test_a_start_that_is_not_finite_stays_where_it_was():
    scenario = scenarios.baseline()
    poisoned = eqx.tree_at(lambda g: g.edges[0].weight, scenario.graph, jnp.asarray([jnp.nan]))
    result = sg.relax(poisoned, scenario.x0, steps=3)
    np.testing.assert_array_equal(result.x, scenario.x0)
    assert not result.info.converged


BAD = [
    (dict(x0=[0.0, 0.0, 0.0]), "x0 has shape"),
    (dict(x0=[0.0, np.nan]), r"x0\[1\] = nan"),
    (dict(steps=-1), "steps"),
    (dict(bounds=(1.0, 0.0)), "bounds"),
    (dict(bounds=(np.zeros(3), 1.0)), "bounds: lower has shape"),
    (dict(bounds=(np.nan, 1.0)), "bounds: lower must not be NaN"),
    (dict(bounds=1.0), "bounds must be a pair"),
    (dict(bounds=(None, 1.0)), "bounds: lower is None: infinity"),
    (dict(bounds=(0.0, {"a": 1.0})), "bounds: upper must be a number"),
    (dict(bounds=(np.inf, np.inf)), "bounds: lower must be below infinity"),
    (dict(x0={"a": [0.1, 0.2]}), "x0 must be real numbers, got dict"),
    (dict(steps=5.0), "steps = 5.0 must be an int"),
    (dict(tol=np.nan), "tol = nan"),
    (dict(tol=-1.0), "tol = -1.0 must be at least 0"),
    (dict(tol="1e-3"), "tol must be real numbers, got '1e-3'"),
    (dict(tol=np.ones(3)), "tol must be one number"),
    (dict(adjoint="magic"), "adjoint = 'magic'"),
    (dict(metric="magic"), "metric = 'magic'"),
    (dict(optimizer=optax.adam), r"optimizer is the function adam.*call it"),
    (dict(objective=[0.1, 0.2], x0=scenarios.baseline().graph), "must be an EnergyGraph or a fun"),
]


@pytest.mark.once
@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_mistakes_are_named(change, message):
    good = dict(objective=scenarios.baseline().graph, x0=[0.1, 0.2], steps=1)
    with pytest.raises((TypeError, ValueError), match=message):
        sg.relax(**good | change)
