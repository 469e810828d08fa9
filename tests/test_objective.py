"""Functions of a pytree under `relax`: their minima, derivatives, rows, and mistakes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import smallgain_jax as sg
from bench.problems import MGH, Problem, chain, factorization, logistic
from smallgain_jax.graphs.objective import FORMED, PROBES, function
from smallgain_jax.tools.scenarios import random_graph
from tests.test_relax import is_monotone

Status = sg.RelaxStatus


def lowest(problem, bounds):
    """Value and place by SciPy's L-BFGS-B."""
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, problem.x0))
    value = jax.jit(jax.value_and_grad(lambda x: problem.fn(unravel(x), *problem.args)))
    box = None if bounds is None else np.broadcast_to(np.stack(bounds).T, (flat.size, 2))
    options = dict(maxiter=10_000, maxfun=20_000, ftol=0, gtol=1e-11)
    found = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(part, float) for part in value(x)),
        np.asarray(flat),
        jac=True,
        method="L-BFGS-B",
        bounds=box,
        options=options,
    )
    return found.fun, found.x


def cut(problem):
    """A box around the start that leaves the minimizer out."""
    half = np.abs(lowest(problem, None)[1] - problem.x0).max() / 2
    return problem.x0 - half, problem.x0 + half


# a valley, a saddle on the way, conditions of 1e16, scales of 1e12, a singular Hessian
HARD = ("Rosenbrock", "Wood", "Powell badly scaled", "Brown badly scaled", "Powell singular")


@pytest.mark.x64
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("boxed", [False, True], ids=["free", "box"])
def test_values_of_hard_problems(name, boxed, eps):
    problem = MGH[name]
    bounds = cut(problem) if boxed else None
    result = sg.relax(problem.fn, problem.x0, steps=500, bounds=bounds)
    best = lowest(problem, bounds)[0]
    assert result.energy[-1] <= best + 1e-8 * max(abs(best), 1e-12)
    assert is_monotone(result.energy, eps)
    assert result.info.converged


@pytest.mark.x64
@pytest.mark.parametrize(
    "problem",
    [chain(30), chain(30, (-2.0, 0.8)), logistic(200, 80), factorization(12, 9, 2)],
    ids=["chain", "chain in a box", "logistic", "factorization"],
)
def test_values_of_larger_problems(problem, eps):
    result = sg.relax(problem.fn, problem.x0, args=problem.args, steps=500, bounds=problem.bounds)
    best = lowest(problem, problem.bounds)[0]
    assert result.energy[-1] <= best + 1e-8 * max(abs(best), 1e-12)
    assert is_monotone(result.energy, eps)
    if problem.bounds is not None:
        for leaf in jax.tree.leaves(result.x):
            assert ((leaf >= problem.bounds[0]) & (leaf <= problem.bounds[1])).all()


def ridge(p, a, t):
    """Minimized at u = t / (1 + a), v = 2 u."""
    return (p["u"] - t) ** 2 + a * p["u"] ** 2 + jnp.sum((p["v"] - 2 * p["u"]) ** 2)


START = {"u": 0.0, "v": np.zeros(2)}


@pytest.mark.x64
def test_derivative_by_arguments_closures_and_bounds():
    by_args = lambda a, t: sg.relax(ridge, START, args=(a, t)).x["v"][0]
    closed = lambda a, t: sg.relax(lambda p: ridge(p, a, t), START).x["v"][0]
    a, t = 0.5, 3.0
    first = -2 * t / (1 + a) ** 2, 2 / (1 + a)
    second = 4 * t / (1 + a) ** 3
    for found in (by_args, closed):
        for derivative in (jax.grad, jax.jacfwd):
            np.testing.assert_allclose(derivative(found, (0, 1))(a, t), first, rtol=1e-9)
    np.testing.assert_allclose(jax.jit(jax.hessian(closed))(a, t), second, rtol=1e-9)
    many = jnp.array([0.5, 1.0])
    batch = jax.vmap(jax.grad(by_args), (0, None))(many, t)
    np.testing.assert_allclose(batch, -2 * t / (1 + many) ** 2, rtol=1e-9)
    # u rests at the upper bound, and v follows
    upper = lambda b: (
        sg.relax(ridge, START, args=(a, t), bounds=({"u": -1.0, "v": -9.0}, {"u": b, "v": 9.0})).x
    )
    moved = jax.jacrev(upper)(1.5)
    np.testing.assert_allclose([moved["u"], *moved["v"]], [1, 2, 2], rtol=1e-9)


@pytest.mark.x64
def test_derivative_of_a_boxed_regression_is_that_of_a_dense_solve():
    problem = logistic(300, 12)
    features, labels = (jnp.asarray(a) for a in problem.args)
    outcome = lambda features: (
        sg.relax(problem.fn, problem.x0, args=(features, labels), bounds=problem.bounds).x
    )
    x = outcome(features)
    free = np.abs(x) < 0.5
    assert 0 < free.sum() < free.size
    hessian = jax.hessian(problem.fn)(x, features, labels)[np.ix_(free, free)]
    mixed = jax.jacfwd(jax.grad(problem.fn), argnums=1)(x, features, labels)[free]
    expected = np.zeros((x.size, *features.shape))
    expected[free] = -np.tensordot(np.linalg.inv(hessian), mixed, 1)
    found = jax.jacrev(outcome)(features)
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())


def test_a_graph_is_a_function_too(x64):
    scenario = random_graph("grid", 49, seed=3)
    graph = scenario.graph
    whole = sg.relax(graph, scenario.x0, steps=200)
    energy = lambda x, graph: graph.energy(x)
    as_function = sg.relax(energy, scenario.x0, args=(graph,), bounds=(0.0, 1.0))
    assert as_function.info.converged
    tolerance = 1e-8 if x64 else 1e-3
    np.testing.assert_allclose(as_function.x, whole.x, atol=tolerance)


def test_any_optimizer_and_any_tree():
    fn = lambda x: jnp.sum((x[0] - 0.3) ** 2) + jnp.sum((x[1] + x[0][:, None] - 1) ** 2)
    start = (np.zeros(3), np.ones((3, 2)))
    for optimizer in (None, optax.adam(0.05), optax.lbfgs()):
        found = sg.relax(fn, start, optimizer, steps=600).x
        np.testing.assert_allclose(found[0], 0.3, atol=2e-3)
        np.testing.assert_allclose(found[1], 0.7, atol=2e-3)


def test_rows_are_given_formed_or_estimated(x64, eps):
    rng = np.random.default_rng(0)

    def square(n):
        half = rng.normal(size=(n, n))
        return jnp.asarray(half @ half.T)

    fn = lambda x, a: x @ a @ x / 2
    small = square(FORMED)
    objective, x = function(fn, jnp.ones(FORMED), (small,), None)
    np.testing.assert_allclose(
        objective.rows(x), sg.hessian_row_sums(fn, x, small), rtol=100 * eps * FORMED
    )
    n = 400
    large = square(n)
    objective, x = function(fn, jnp.ones(n), (large,), None)
    ratio = objective.rows(x) ** 2 / jnp.sum(large**2, axis=1)
    # a chi square over its degrees of freedom; rows share the probes, so the mean has few of them
    assert 0.4 < ratio.mean() < 2
    assert ratio.min() > 0
    np.testing.assert_allclose(
        sg.relax(fn, jnp.ones(n), args=(large + n * jnp.eye(n),), steps=50).x, 0, atol=1e-3
    )
    assert n > PROBES
    diagonal = jnp.diagonal(small)
    for rows in (diagonal, lambda x, a: jnp.diagonal(a)):
        objective, x = function(fn, jnp.ones(FORMED), (small,), rows)
        np.testing.assert_array_equal(objective.rows(x), diagonal)


@pytest.mark.x64
def test_given_rows_are_used():
    scale = np.geomspace(1, 1e6, 100)
    fn = lambda x: jnp.sum(scale * (jnp.cosh(x - 1) - 1))
    steps = [
        int(sg.relax(fn, np.zeros(100), rows=rows, steps=300).info.steps)
        for rows in (lambda x: scale * jnp.cosh(x - 1), np.ones(100))
    ]
    assert steps[0] < 10
    np.testing.assert_allclose(sg.relax(fn, np.zeros(100), rows=scale).x, 1, atol=1e-9)


@pytest.mark.x64
def test_unrolled_functions_know_their_start():
    fn = lambda x: jnp.sum((x - 1) ** 2 * (1 + x**2))
    outcome = lambda x0, steps: sg.relax(fn, x0, steps=steps, adjoint="unrolled").x.sum()
    x0 = jnp.array([0.3, -0.2])
    found = jax.grad(outcome)(x0, 1)
    step = 1e-6
    moved = lambda by: outcome(x0 + by, 1)
    expected = [(moved(step * e) - moved(-step * e)) / (2 * step) for e in np.eye(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.once
def test_other_values_need_no_other_program():
    traced = []

    def fn(x, a):
        traced.append(1)
        return jnp.sum((x - a) ** 2)

    assert sg.relax(fn, np.zeros(2), args=(1.0,), steps=10).x[0] == 1
    once = len(traced)
    assert sg.relax(fn, np.zeros(2), args=(2.0,), steps=30).x[0] == 2
    assert len(traced) == once


def test_what_is_no_number_is_told():
    bad = sg.relax(lambda x: jnp.sum(jnp.log(x)), np.array([-1.0, 1.0]))
    assert bad.info.status == Status.NOT_FINITE
    assert not bad.info.converged
    # concrete bounds raise; of traced ones NaN tells
    crossed = jax.jit(lambda low: sg.relax(jnp.sum, np.ones(2), bounds=(low, 0.0)).x)
    assert jnp.isnan(crossed(1.0)).all()
    np.testing.assert_array_equal(crossed(-1.0), -1)
    graph = lambda w: sg.EnergyGraph(sg.Landau([1.0, 1.0]), [sg.Quadratic([0], [1], w)])
    weighted = jax.jit(lambda w: sg.relax(graph(w), jnp.ones(2)))
    assert jnp.isnan(weighted(-1.0).energy).all()
    assert weighted(-1.0).info.status == Status.NOT_FINITE
    assert jnp.isfinite(weighted(0.0).energy).all()
    # past the constructor
    moved = eqx.tree_at(lambda g: g.edges[0].weight, graph(1.0), jnp.array([-1.0]))
    assert sg.relax(moved, jnp.ones(2)).info.status == Status.NOT_FINITE


@pytest.mark.once
def test_mistakes_are_named():
    x0, fn = np.zeros(2), lambda x: jnp.sum(x**2)
    graph = sg.EnergyGraph(sg.Landau([1.0, 1.0]), [sg.Quadratic([0], [1])])
    cases = (
        (TypeError, "EnergyGraph or a function", lambda: sg.relax(x0, graph)),
        (TypeError, "got GradientTransformation", lambda: sg.relax(optax.sgd(0.1), x0)),
        (TypeError, "function sgd, not an optimizer", lambda: sg.relax(fn, x0, optax.sgd)),
        (ValueError, r"real scalar, got float32\[2\]", lambda: sg.relax(lambda x: x, x0)),
        (TypeError, "return a scalar, got dict", lambda: sg.relax(lambda x: {"a": x[0]}, x0)),
        (TypeError, r"x0\['b'\] is function", lambda: sg.relax(fn, {"a": x0, "b": fn})),
        (ValueError, r"x0\[0\] = nan", lambda: sg.relax(fn, np.full(2, np.nan))),
        (TypeError, "args must be a tuple", lambda: sg.relax(fn, x0, args=x0)),
        (TypeError, "args and rows go with a function", lambda: sg.relax(graph, x0, args=(1,))),
        (ValueError, "tree structure of x0", lambda: sg.relax(fn, x0, bounds=({"a": 1}, 2))),
        (ValueError, r"lower has shape \(3,\)", lambda: sg.relax(fn, x0, bounds=(np.ones(3), 2))),
        (ValueError, "lower must not exceed", lambda: sg.relax(fn, x0, bounds=(1.0, 0.0))),
        (TypeError, "must be a pair", lambda: sg.relax(fn, x0, bounds=1.0)),
        (TypeError, "must be a pair", lambda: sg.relax(fn, x0, bounds="unit")),
        (ValueError, r"rows\[0\] = -1\.0", lambda: sg.relax(fn, x0, rows=-np.ones(2))),
        (ValueError, "metric is for graphs", lambda: sg.relax(fn, x0, metric=_Metric())),
    )
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


class _Metric:
    def precondition(self, graph, x, rows, free):
        return lambda g: g


@pytest.mark.x64
def test_adjoint_report():
    fn = lambda x, a: jnp.sum(a * (x - 1) ** 2)
    sound = sg.adjoint_report(fn, np.ones(5), args=(np.arange(1.0, 6),), bounds=(0.0, 2.0))
    assert sound.sound
    assert sound.residual < 1e-12
    assert sound.free == 5
    assert sound.iterations == 1
    assert sound.optimality == 0
    held = sg.adjoint_report(fn, np.full(5, 0.5), args=(1.0,), bounds=(0.0, 0.5))
    assert held.free == 0
    assert held.sound
    # nothing fixes the sum
    chain = sg.EnergyGraph(None, [sg.Quadratic([0, 1], [1, 2])], num_nodes=3)
    assert not sg.adjoint_report(chain, jnp.full(3, 0.5)).sound
    # but a difference is fixed
    assert sg.adjoint_report(chain, jnp.full(3, 0.5), jnp.array([1.0, 0, -1])).sound
    far = sg.adjoint_report(fn, np.zeros(5), args=(1.0,))
    assert far.optimality > 0.1


@pytest.mark.once
def test_problem_names_are_unique():
    assert len(MGH) >= 20
    assert all(isinstance(problem, Problem) for problem in MGH.values())
