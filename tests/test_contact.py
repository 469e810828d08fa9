"""The minimum of a hierarchy's model over a box, and `relax` on obstacles: against dense solves."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import smallgain_jax as sg
from smallgain_jax.graphs import multilevel as module
from smallgain_jax.graphs.contact import ROUNDS, minimum
from smallgain_jax.search.box import Box
from smallgain_jax.tools import hard


@pytest.fixture
def small_bottom(monkeypatch):
    """Several levels on graphs small enough for dense oracles."""
    monkeypatch.setattr(module, "BOTTOM", 6)


@eqx.filter_jit
def minimized(hierarchy, graph, x, box, precision):
    values = hierarchy.blank(x)
    model, values = hierarchy.model(values, graph, x, graph.rows(x))
    limits = {"resolution": jnp.zeros_like(x), "most": jnp.asarray(ROUNDS)}
    return minimum(model, x, graph.gradient(x), box, values, precision=precision, **limits)[0]


def springs(rng, side, pushed=0.3, anchor=1e-3):
    i, j = hard.grid_edges(side)
    n = side * side
    node = np.arange(n)
    waves = np.sin(6 * node / n) * np.sin(3 * (node % side) / side) + rng.normal(0, 0.3, n)
    push = sg.GateBenefit(node, (node + 1) % n, delta=pushed * waves)
    local = sg.Landau(a=np.full(n, anchor), target=rng.random(n))
    return sg.EnergyGraph(local, [sg.Quadratic(i, j, rng.uniform(0.2, 2, i.size)), push])


def oracle(graph, low, high):
    """Bounded least squares over a factor of the dense Hessian (SciPy's active sets, BVLS)."""
    n = graph.num_nodes
    matrix = np.asarray(jax.hessian(graph.energy)(jnp.zeros(n)), float)
    gradient = np.asarray(graph.gradient(jnp.zeros(n)), float)
    factor = np.linalg.cholesky(matrix)
    right = np.linalg.solve(factor, -gradient)
    bounds = (np.broadcast_to(low, n), np.broadcast_to(high, n))
    return scipy.optimize.lsq_linear(factor.T, right, bounds, method="bvls", tol=1e-14).x


@pytest.mark.parametrize("seed", range(3))
def test_model_is_minimized_over_the_box(seed, eps, small_bottom):
    rng = np.random.default_rng(seed)
    graph = springs(rng, 9)
    low, high = rng.uniform(0, 0.4, 81), rng.uniform(0.6, 1, 81)
    x = jnp.asarray(rng.uniform(low, high), float)
    box = Box(jnp.asarray(low, float), jnp.asarray(high, float))
    found = minimized(sg.multilevel(graph), graph, x, box, jnp.asarray(100 * eps))
    expected = oracle(graph, low, high)
    at = (expected <= low) | (expected >= high)
    assert 0.1 < at.mean() < 0.9
    np.testing.assert_allclose(found.y, expected, atol=1e5 * eps)
    # what is left is minus the gradient there
    np.testing.assert_allclose(found.left, -graph.gradient(found.y), atol=1e3 * eps)


@pytest.mark.x64
def test_ends_may_be_equal_or_infinite(small_bottom):
    rng = np.random.default_rng(3)
    graph = springs(rng, 8)
    low, high = np.full(64, -np.inf), np.full(64, np.inf)
    low[::3], high[::4], low[5], high[5] = 0.2, 0.6, 0.4, 0.4
    x0 = jnp.asarray(np.clip(rng.random(64), low, high))
    found = sg.relax(graph, x0, bounds=(low, high), metric=sg.multilevel(graph), tol=1e-12)
    near = np.clip(low, -1e3, None), np.clip(high, None, 1e3 + 1e-9)
    free = low < high
    expected = np.array(x0)
    # the node between equal ends is eliminated: the oracle wants ends apart
    matrix = np.asarray(jax.hessian(graph.energy)(x0))
    rest = np.asarray(graph.gradient(x0)) - matrix @ x0
    factor = np.linalg.cholesky(matrix[np.ix_(free, free)])
    right = -(rest + matrix[:, ~free] @ expected[~free])[free]
    bounds = (near[0][free], near[1][free])
    expected[free] = scipy.optimize.lsq_linear(
        factor.T, np.linalg.solve(factor, right), bounds, method="bvls", tol=1e-14
    ).x
    assert bool(found.info.converged)
    np.testing.assert_allclose(found.x, expected, atol=1e-8)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_pinned_nodes_lift_nobody(share, eps):
    """Equal bounds here and there, pulled hard, beside nodes in contact."""
    rng = np.random.default_rng(1)
    side, n = 24, 576
    i, j = hard.grid_edges(side)
    local = sg.Landau(a=np.full(n, 1e-3), target=rng.standard_normal(n) * 300)
    graph = sg.EnergyGraph(local, [sg.Quadratic(i, j)])
    low, high = rng.uniform(-1, 0, n), rng.uniform(0, 1, n)
    pinned = rng.random(n) < share
    high = np.where(pinned, low, high)
    found = sg.relax(graph, np.zeros(n), bounds=(low, high), metric=sg.multilevel(graph))
    assert found.info.status == sg.RelaxStatus.CONVERGED
    assert found.info.steps <= 4
    matrix = np.asarray(jax.hessian(graph.energy)(jnp.zeros(n)), float)
    slope = np.asarray(graph.gradient(jnp.zeros(n)), float)
    expected = scipy.optimize.minimize(
        lambda x: ((matrix @ x / 2 + slope) @ x, matrix @ x + slope),
        np.clip(0, low, high),
        jac=True,
        bounds=list(zip(low, high)),
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-12},
    )
    np.testing.assert_allclose(found.x, expected.x, atol=1e-5 + 1e3 * eps)


def test_obstacle_takes_few_more_rounds_on_a_finer_grid(eps):
    """One layer of nodes a round would be four times as many."""
    rounds = []
    for side in (48, 192):
        problem = hard.obstacle(side)
        x0 = jnp.asarray(np.asarray(problem.x0), float)
        box = Box(jnp.zeros(()), jnp.ones(()))
        precision = jnp.asarray(max(1e-6, 1e3 * eps), x0.dtype)
        found = minimized(sg.multilevel(problem.graph), problem.graph, x0, box, precision)
        rounds.append(int(found.rounds))
    assert rounds[1] <= 1.6 * rounds[0]
    assert max(rounds) <= 25


@pytest.mark.x64
def test_obstacle_is_solved_in_a_few_steps():
    problem = hard.obstacle(64)
    graph, x0 = problem.graph, jnp.asarray(np.asarray(problem.x0))
    found = sg.relax(graph, x0, metric=sg.multilevel(graph))
    plain = sg.relax(graph, x0, steps=1000, tol=1e-13)
    assert bool(found.info.converged)
    assert int(found.info.steps) <= 4
    assert np.all(np.diff(found.energy) <= 1e-15 * np.abs(found.energy[0]))
    np.testing.assert_allclose(found.x, plain.x, atol=1e-9)


def test_descent_ends_where_the_gradient_is_rounding(eps):
    """Beyond it soft modes drift for ever: the slopes by which steps are accepted are noise."""
    problem = hard.obstacle(32)
    x0 = jnp.asarray(np.asarray(problem.x0), float)
    found = sg.relax(problem.graph, x0, metric=sg.multilevel(problem.graph), tol=0.0)
    assert sg.RelaxStatus(int(found.info.status)).name == "STALLED"
    assert found.info.steps <= 20
    assert found.info.optimality <= 10 * eps


def test_lifted_nodes_are_those_of_aggregates_that_are_pulled(small_bottom):
    """By sums over the members of each aggregate, one after the other."""
    rng = np.random.default_rng(4)
    graph = springs(rng, 7)
    hierarchy = sg.multilevel(graph)
    x = jnp.full(49, 0.5)
    model, _ = hierarchy.model(hierarchy.blank(x), graph, x, graph.rows(x))
    pull = rng.normal(-0.3, 1, 49).astype(np.float32)
    member, expected = np.arange(49), pull > 0
    for level in hierarchy.levels[:-1]:
        member = np.asarray(level.node)[member]
        for aggregate in range(level.num_aggregates):
            inside = member == aggregate
            expected = expected | (inside & (pull[inside].astype(float).sum() > 0))
    assert len(hierarchy.sizes) > 2
    assert np.array_equal(jax.jit(type(model).lifts)(model, jnp.asarray(pull)), expected)
    assert not expected.all()
    pair = jnp.asarray(np.stack([pull, -pull], axis=1))
    both = np.stack([model.lifts(pair[:, 0]), model.lifts(pair[:, 1])], axis=1)
    assert np.array_equal(model.lifts(pair), both)


HINGES = {
    "hinges": lambda i, j, n: [sg.DirectedHinge(i, j, 1.0)],
    "hinges and springs": lambda i, j, n: [sg.Quadratic(i, j, 0.1), sg.DirectedHinge(i, j, 1.0)],
    "repulsion": lambda i, j, n: [
        sg.Quadratic(i, j),
        sg.PairTerm(lambda a, b: -0.2 * (a - b) ** 2, i[::3], j[::3]),
    ],
}


@pytest.mark.x64
@pytest.mark.parametrize("name", HINGES)
def test_where_the_model_is_wrong_descent_stays_monotone(name):
    rng = np.random.default_rng(5)
    i, j = hard.grid_edges(16)
    local = sg.Landau(a=np.full(256, 1e-2), target=rng.normal(0.5, 2, 256))
    graph = sg.EnergyGraph(local, HINGES[name](i, j, 256))
    x0 = jnp.asarray(rng.random(256))
    found = sg.relax(graph, x0, bounds=(0.2, 0.7), metric=sg.multilevel(graph), steps=300)
    plain = sg.relax(graph, x0, bounds=(0.2, 0.7), steps=3000)
    assert np.all(np.diff(found.energy) <= 1e-14 * np.abs(found.energy[0]))
    assert found.energy[-1] <= plain.energy[-1] + 1e-7 * (plain.energy[0] - plain.energy[-1])


@pytest.mark.x64
def test_vector_nodes_are_coordinates_beside_each_other(small_bottom):
    rng = np.random.default_rng(6)
    i, j = hard.grid_edges(8)
    target = rng.normal(0.5, 2, (64, 2))

    def solved(target, x0):
        local = sg.Landau(a=np.full(target.shape, 0.1), target=target)
        graph = sg.EnergyGraph(local, sg.Quadratic(i, j))
        return sg.relax(graph, x0, bounds=(0.0, 1.0), metric=sg.multilevel(graph), tol=1e-12)

    x0 = jnp.asarray(rng.random((64, 2)))
    together = solved(target, x0)
    apart = [solved(target[:, k], x0[:, k]).x for k in range(2)]
    assert bool(together.info.converged)
    np.testing.assert_allclose(together.x, np.stack(apart, axis=1), atol=1e-9)


@pytest.mark.x64
def test_batches_and_both_derivatives(small_bottom):
    """Implicit, and through the steps, against finite differences of the minimizer."""
    rng = np.random.default_rng(7)
    i, j = hard.grid_edges(6)
    base = rng.normal(0.5, 1.5, 36)

    def posed(target):
        return sg.EnergyGraph(sg.Landau(a=np.full(36, 0.1), target=target), sg.Quadratic(i, j))

    hierarchy = sg.multilevel(posed(base))
    weight, x0 = jnp.asarray(rng.random(36)), jnp.full(36, 0.5)

    def outcome(target, adjoint="implicit", steps=40):
        settings = {"metric": hierarchy, "tol": 1e-13, "bounds": (0.0, 1.0)}
        found = sg.relax(posed(target), x0, steps=steps, adjoint=adjoint, **settings)
        return jnp.vdot(weight, found.x)

    along = rng.normal(size=36)
    difference = (outcome(base + 1e-5 * along) - outcome(base - 1e-5 * along)) / 2e-5
    for adjoint in ("implicit", "unrolled"):
        slope = jax.grad(outcome)(jnp.asarray(base), adjoint)
        np.testing.assert_allclose(slope @ along, difference, rtol=1e-5)
    batch = jnp.asarray(base + rng.normal(0, 0.5, (3, 36)))
    one_by_one = [outcome(target) for target in batch]
    np.testing.assert_allclose(jax.vmap(outcome)(batch), one_by_one, atol=1e-9)


def test_a_box_that_is_none_is_known():
    assert Box(-jnp.inf, jnp.inf).absent
    assert not Box(0.0, jnp.inf).absent
    assert not Box(jnp.asarray(-jnp.inf), jnp.asarray(jnp.inf)).absent
    np.testing.assert_array_equal(
        Box(0.0, 1.0).touches(jnp.array([0.0, 0.5, 1.0])), [True, False, True]
    )
