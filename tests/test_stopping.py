"""When relaxations end, and that they say why."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.graphs.conditioning import softness
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import (
    default_tolerance,
    length_scale,
    optimality,
    projected_step,
)
from smallgain_jax.tools import scenarios
from smallgain_jax.tools.scenarios import random_graph

Status = sg.RelaxStatus


def test_projected_step():
    box = Box(jnp.asarray([0.0, -jnp.inf, 0.0, 0.0]), jnp.asarray([1.0, jnp.inf, 1.0, 1.0]))
    x = jnp.asarray([0.5, 3.0, 0.0, 0.25])
    # held, free, held at its bound, and without curvature: as far as the box goes
    step = projected_step(
        x, jnp.asarray([9.0, -2.0, 1.0, -1.0]), jnp.asarray([2.0, 4.0, 1.0, 0.0]), box
    )
    np.testing.assert_array_equal(step, [-0.5, 0.5, 0.0, 0.75])
    scale = length_scale(x, step, box)
    np.testing.assert_array_equal(scale, [1.0, 3.0, 1.0, 1.0])
    assert optimality(step, scale) == 0.75


def three_nodes(scale=1.0):
    return sg.EnergyGraph(
        sg.Landau(scale * np.array([0.2, 0.25, 0.3]), target=[0.0, 1.0, 0.5]),
        [sg.Quadratic([0, 1], [1, 2], scale * np.array([0.7, 0.5]))],
    )


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None], ids=["box", "no box"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_convergence_means_the_same_at_every_scale_of_the_energy(scale, bounds, eps):
    x0 = jnp.asarray([1.0, 0.0, 0.2], float)
    result = sg.relax(three_nodes(scale), x0, bounds=bounds)
    hessian = np.array([[1.8, -1.4, 0], [-1.4, 2.9, -1.0], [0, -1.0, 1.6]])
    expected = np.linalg.solve(hessian, [0, 0.5, 0.3])
    np.testing.assert_allclose(result.x, expected, atol=10 * default_tolerance(x0.dtype))
    assert result.info.converged
    assert result.info.status == Status.CONVERGED
    assert 0 < result.info.steps < 20


SOFT = {
    "a stiff pair": (sg.Landau([1.0, 1.0], target=[0.0, 0.5]), [1e6], [0.25, 0.25]),
    "a stiff pair and a third": (
        sg.Landau([1.0, 1.0, 1.0], target=[0.0, 0.5, 1.0]),
        [1e4, 1.0],
        [0.39998, 0.40002, 0.70001],
    ),
    "one weak anchor": (sg.Landau([1e-6, 0.0, 0.0], target=0.3), [1.0, 1.0], [0.3, 0.3, 0.3]),
}


@pytest.mark.parametrize("case", SOFT)
def test_a_small_step_where_rows_are_far_too_stiff_is_not_convergence(case):
    """In single precision these may end unsolved, but then they say so."""
    local, weights, expected = SOFT[case]
    here = np.arange(len(weights))
    graph = sg.EnergyGraph(local, sg.Quadratic(here, here + 1, weights))
    for bounds in ((0.0, 1.0), None):
        result = sg.relax(graph, jnp.full(len(expected), 0.5), bounds=bounds)
        assert not result.info.converged or np.allclose(result.x, expected, atol=1e-2)
    if result.x.dtype == jnp.float64:
        assert result.info.converged


def test_softness_bounds_the_smallest_eigenvalue():
    for kind in scenarios.KINDS:
        problem = scenarios.random_graph(kind, 24, 60, seed=3)
        graph, x = problem.graph, problem.x0
        springs = sg.EnergyGraph(graph.local, sg.Quadratic(graph.i, graph.j))
        rows = np.asarray(eqx.filter_jit(sg.EnergyGraph.curvature)(springs, x).row_sums)
        hessian = np.asarray(jax.jit(jax.hessian(springs.energy))(x))
        smallest = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(rows, rows)))[0]
        assert smallest <= eqx.filter_jit(softness)(springs, x) * (1 + 1e-5)


@pytest.mark.once
def test_a_gradient_below_the_rounding_of_x_is_not_convergence():
    graph = sg.EnergyGraph(sg.Landau([1e-8, 1e-8]), [sg.Quadratic([0], [1], 1e-8)])
    result = sg.relax(graph, jnp.ones(2))
    np.testing.assert_allclose(result.x, 0, atol=1e-6)


@pytest.mark.x64
def test_every_end_has_its_status():
    scenario = scenarios.dense()
    run = lambda **more: sg.relax(scenario.graph, scenario.x0, **more).info
    assert run().status == Status.CONVERGED
    assert run(steps=3).status == Status.STEPS
    assert run(steps=3).steps == 3
    stalled = run(steps=1000, tol=0.0)
    assert stalled.status == Status.STALLED
    assert not stalled.converged
    assert stalled.steps < 100
    assert stalled.optimality < 1e-14
    broken = sg.EnergyGraph(sg.Landau([1.0], target=[0.3]), [])
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, broken)
    failed = sg.relax(broken, jnp.asarray([0.5]))
    assert failed.info.status == Status.NOT_FINITE
    assert failed.info.steps == 0
    assert failed.x == 0.5


def test_other_optimizers_converge_too():
    # the rows of the start are forty times those at the end
    graph = sg.EnergyGraph(sg.Landau([0.1, 0.1], b=1.0), [sg.Quadratic([0], [1], 0.1)])
    x0 = jnp.asarray([1.0, 0.9], float)
    result = sg.relax(graph, x0, optax.sgd(0.1), steps=5000, tol=1e-4, bounds=(-1.0, 1.0))
    assert result.info.converged
    assert result.info.steps < 5000
    rows = graph.rows(result.x)
    step = jnp.abs(graph.gradient(result.x) / rows).max() / 2
    assert step <= 1.01e-4


def test_single_precision_descends_below_the_rounding_of_energies(eps):
    problem = random_graph("uniform", 200, 800, seed=1)
    result = sg.relax(problem.graph, problem.x0, steps=200, tol=0.0)
    assert result.info.status == Status.STALLED
    # energies alone stop at the square root of eps
    assert result.info.optimality < 30 * eps


@pytest.mark.x64
def test_a_measured_curvature_far_below_the_rows_is_used():
    n = 1000
    local = sg.Landau(np.full(n, 1e-3), target=0.7)
    graph = sg.EnergyGraph(local, [sg.Quadratic(np.arange(n - 1), np.arange(1, n))])
    result = sg.relax(graph, jnp.zeros(n), steps=1000)
    np.testing.assert_allclose(result.x, 0.7, atol=1e-8)


@pytest.mark.x64
@pytest.mark.parametrize("known", [False, True], ids=["as it is", "with its gap"])
def test_kinks_do_not_stall(known):
    rng = np.random.default_rng(0)
    n, m = 300, 1500
    truth, i = rng.normal(size=n), rng.integers(0, n, m)
    j = (i + rng.integers(1, n, m)) % n
    better = truth[i] + 0.3 * rng.normal(size=m) > truth[j]
    gap = lambda a, b: 1 - (a - b)
    energy = (
        (lambda a, b: gap(a, b) ** 2) if known else (lambda a, b: jnp.maximum(0, gap(a, b)) ** 2)
    )
    ends = np.where(better, i, j), np.where(better, j, i)
    term = sg.PairTerm(energy, *ends, gap=gap if known else None)
    graph = sg.EnergyGraph(sg.Landau(np.full(n, 1e-3)), [term])
    result = sg.relax(graph, jnp.zeros(n), steps=2000, bounds=None)
    assert result.info.converged
    assert jnp.abs(graph.gradient(result.x)).max() < 1e-7


@pytest.mark.once
def test_other_steps_need_no_other_program():
    scenario = scenarios.baseline()
    traced = []

    def energy(a, b):
        traced.append(1)
        return jnp.sum((a - b) ** 2)

    graph = sg.EnergyGraph(scenario.graph.local, [sg.PairTerm(energy, [0], [1])])
    assert sg.relax(graph, scenario.x0, steps=20).energy.shape == (21,)
    once = len(traced)
    assert sg.relax(graph, scenario.x0, steps=30).energy.shape == (31,)
    assert len(traced) == once


@pytest.mark.once
def test_a_slope_without_curvature_and_without_a_wall_is_no_minimum():
    graph = sg.EnergyGraph(None, [sg.GateBenefit([0], [1], delta=0.5)], num_nodes=2)
    for bounds in (None, (0, jnp.inf)):
        result = sg.relax(graph, jnp.zeros(2), steps=4, bounds=bounds)
        assert not result.info.converged
    assert sg.relax(graph, jnp.zeros(2), steps=4).x.tolist() == [1.0, 0.0]


def test_no_steps_are_as_many_as_asked_for():
    graph = sg.EnergyGraph(sg.Landau(a=[1.0, 1.0]), [sg.Quadratic([0], [1])])
    result = sg.relax(graph, jnp.ones(2), steps=0, record=lambda state: state.rows)
    assert (result.info.steps, result.info.history.shape) == (0, (0, 2))
    assert result.energy.tolist() == [2.0]


def test_nothing_is_computed_after_the_end():
    scenario, calls = scenarios.baseline(), []

    def energy(a, b):
        jax.debug.callback(lambda _: calls.append(1), a)
        return jnp.sum((a - b) ** 2)

    graph = sg.EnergyGraph(scenario.graph.local, [sg.PairTerm(energy, [0], [1])])
    made = int(sg.relax(graph, scenario.x0, steps=60).info.steps)
    jax.effects_barrier()
    few = len(calls)
    calls.clear()
    sg.relax(graph, scenario.x0, steps=5000)
    jax.effects_barrier()
    assert 0 < made < 60
    assert len(calls) == few


def test_bounds_closed_over_under_jit():
    graph, x0 = three_nodes(), jnp.asarray([1.0, 0.0, 0.2], float)
    lower, upper = jnp.zeros(3), jnp.ones(3)
    inside = jax.jit(lambda x: sg.relax(graph, x, bounds=(lower, upper)).x)(x0)
    np.testing.assert_allclose(inside, sg.relax(graph, x0).x, rtol=1e-6)


@pytest.mark.x64
def test_the_default_is_its_optimizer():
    scenario = random_graph("grid", 49, seed=3)
    ours = sg.relax(scenario.graph, scenario.x0, steps=10)
    named = sg.relax(scenario.graph, scenario.x0, sg.majorized_descent(scenario.graph), steps=10)
    # the graph is a constant of one program, and data of the other
    np.testing.assert_allclose(named.x, ours.x, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(named.info.steps, ours.info.steps)
    assert jax.tree.structure(named) == jax.tree.structure(ours)


class Exact:
    """A metric that inverts the Hessian of the free part."""

    def precondition(self, graph, x, rows, free):
        hessian = jax.hessian(graph.energy)(x)
        hessian = jnp.where(free[:, None] & free[None, :], hessian, jnp.diag(rows))
        return lambda g: jnp.linalg.solve(hessian, g)


@pytest.mark.x64
def test_another_metric():
    n = 60
    local = sg.Landau(np.full(n, 1e-3), target=np.random.default_rng(0).uniform(-0.2, 1.2, n))
    graph = sg.EnergyGraph(local, [sg.Quadratic(np.arange(n - 1), np.arange(1, n))])
    # one object: another instance would be another program
    metric, x0 = Exact(), jnp.full(n, 0.5)
    rows, exact = (sg.relax(graph, x0, metric=m, bounds=None) for m in ("rows", metric))
    assert exact.info.steps <= 2 < 10 < rows.info.steps
    np.testing.assert_allclose(exact.x, rows.x, atol=1e-6)
    # the adjoint takes it as well
    loss = lambda m: (
        lambda a: jnp.sum(
            sg.relax(sg.EnergyGraph(sg.Landau(a), graph.edges), x0, metric=m, bounds=(0.1, 1)).x
            ** 2
        )
    )
    by_rows, by_exact = (jax.grad(loss(m))(jnp.full(n, 1e-1)) for m in ("rows", metric))
    np.testing.assert_allclose(by_exact, by_rows, atol=1e-7)


CHANGES = {
    "targets": lambda: (dict(target=[1.0, 1.0]), {}, None),
    "weights": lambda: (dict(weight=3.0), {}, None),
    "bounds": lambda: ({}, dict(bounds=(0.0, 0.4)), None),
    "start": lambda: ({}, {}, [0.9, 0.1]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [1, 100])
def test_a_state_of_another_problem_is_forgotten(change, steps):
    """Whoever relaxes again with something changed hands over a state that knows the old."""

    def graph(target=(0.0, 1.0), weight=1.0):
        local = sg.Landau(a=[1.0, 1.0], target=jnp.asarray(target, float))
        return sg.EnergyGraph(local, [sg.Quadratic([0], [1], weight)])

    changed, given, start = CHANGES[change]()
    first = sg.relax(graph(), jnp.zeros(2), steps=steps)
    x0 = first.x if start is None else jnp.asarray(start, float)
    again = sg.relax(graph(**changed), x0, state=first.state, **given)
    fresh = sg.relax(graph(**changed), x0, **given)
    assert again.info.converged
    np.testing.assert_allclose(again.x, fresh.x, atol=1e-4)


@pytest.mark.once
def test_more_mistakes_are_named():
    graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1])])
    larger = sg.EnergyGraph(sg.Landau(a=jnp.ones(40)), [sg.Quadratic(range(39), range(1, 40))])
    x = jnp.zeros(2)
    with pytest.raises(TypeError, match="one a node"):
        sg.relax(graph, x, bounds=[(0, 1), (0, 1)])
    with pytest.raises(TypeError, match=r"steps = 10\.0 must be an int"):
        sg.relax(graph, x, steps=10.0)
    with pytest.raises(ValueError, match=r"state is of parameters of shape \(2,\)"):
        sg.relax(larger, jnp.zeros(40), state=sg.relax(graph, x).state)
    with pytest.raises(ValueError, match="hierarchy is of 40 nodes"):
        sg.relax(graph, x, metric=sg.multilevel(larger))
    with pytest.raises(TypeError, match=r"gradient_transformation\(\)"):
        sg.relax(graph, x, optax.MultiSteps(optax.sgd(0.1), 2))
    with pytest.raises(TypeError, match="function majorized_descent"):
        sg.relax(graph, x, sg.majorized_descent)
    plain = sg.relax(graph, x).x
    for metric in ("auto", None, sg.choose_metric(graph)):
        np.testing.assert_array_equal(sg.relax(graph, x, metric=metric).x, plain)
