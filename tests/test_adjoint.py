"""The derivative of the minimizer, against differences of an independent dense solver."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallgain_jax as sg
from tests.compiling import in_turn, jit_well

NODES, EDGES = 10, 6


def pair_energy(a, b, p):
    return jnp.sum(jnp.cosh(p["stiff"] * (a - b)) - 1)


def random_problem(seed, dim):
    """All families, a start, and a box at which about a third of the coordinates end."""
    rng = np.random.default_rng(seed)
    shape = (NODES,) if dim == 0 else (NODES, dim)

    def ends():
        i = rng.integers(0, NODES, EDGES)
        return i, (i + rng.integers(1, NODES, EDGES)) % NODES, rng.uniform(0.1, 1, EDGES)

    u = partial(rng.uniform, size=EDGES)
    graph = sg.EnergyGraph(
        sg.Landau(
            rng.uniform(0.5, 2, shape), rng.uniform(0, 1, shape), rng.uniform(-1.3, 2.3, shape)
        ),
        [
            sg.Quadratic(*ends()),
            sg.DirectedHinge(*ends()),
            sg.AsymmetricHinge(*ends(), u(0.5, 1.5), u(0.5, 1.5)),
            sg.GateBenefit(*ends(), u(-0.2, 0.2)),
            sg.DampedGateBenefit(*ends(), u(-0.1, 0.1), u(0.3, 1), u(2, 3), u(0.5, 1), u(0.5, 1)),
            sg.PairTerm(pair_energy, *ends(), params={"stiff": u(0.5, 2)}),
        ],
    )
    bounds = rng.uniform(-0.05, 0.05, shape), rng.uniform(0.95, 1.05, shape)
    return graph, bounds, rng.uniform(0.2, 0.8, shape)


def stacked(count, dim):
    problems = [random_problem(seed, dim) for seed in range(count)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *problems)


def sides_of(graph, bounds, x):
    gradient = jax.grad(graph.energy)(x)
    return (x <= bounds[0]) & (gradient > 0), (x >= bounds[1]) & (gradient < 0)


def dense_minimizer(graph, bounds, x, sides):
    """Newton's method from x with dense linear algebra; `sides` tells what stays at its bound."""
    free = ~(sides[0] | sides[1]).ravel()
    x = jnp.where(sides[0], bounds[0], jnp.where(sides[1], bounds[1], x))

    def step(x, _):
        gradient = jax.grad(graph.energy)(x).ravel()
        hessian = jax.hessian(graph.energy)(x).reshape(x.size, x.size)
        hessian = jnp.where(free[:, None] & free[None, :], hessian, jnp.eye(x.size))
        move = jnp.linalg.solve(hessian, jnp.where(free, gradient, 0))
        return x - move.reshape(x.shape), None

    return jax.lax.scan(step, x, length=3)[0]


def solve(problem):
    graph, bounds, x0 = problem
    return sg.relax(graph, x0, steps=400, bounds=bounds)


def split(problem):
    theta, rest = eqx.partition(problem[:2], eqx.is_inexact_array)
    return theta, lambda theta: solve((*eqx.combine(theta, rest), problem[2])).x


def along(directions, k):
    """The directions with all leaves but the k-th at rest."""
    leaves, structure = jax.tree.flatten(directions)
    return jax.tree.unflatten(structure, [d * (n == k) for n, d in enumerate(leaves)])


def reverse(problem, cotangent, directions):
    """<c, dx*> for each leaf of graph and bounds along its direction, in reverse mode."""
    theta, ours = split(problem)
    (pulled,) = jax.vjp(ours, theta)[1](cotangent)
    products = jax.tree.map(lambda a, d: jnp.sum(a * d), pulled, directions)
    return jnp.stack(jax.tree.leaves(products))


def forward(problem, cotangent, directions):
    theta, ours = split(problem)
    moved = lambda k: jnp.vdot(cotangent, jax.jvp(ours, (theta,), (along(directions, k),))[1])
    return jax.lax.map(moved, jnp.arange(len(jax.tree.leaves(theta))))


def differences(problem, x, cotangent, directions, step=1e-5):
    theta, rest = eqx.partition(problem[:2], eqx.is_inexact_array)
    sides = sides_of(*problem[:2], x)

    def difference(k):
        way = along(directions, k)

        def moved(by):
            theta_there = jax.tree.map(lambda a, d: a + by * d, theta, way)
            return dense_minimizer(*eqx.combine(theta_there, rest), x, sides)

        return jnp.vdot(cotangent, moved(step) - moved(-step)) / (2 * step)

    return jax.lax.map(difference, jnp.arange(len(jax.tree.leaves(theta))))


def smooth_at(problem, x):
    """Whether the minimizer has a derivative: no hinge and no bound within 1e-3 of switching."""
    graph, (lower, upper), _ = problem
    gaps = [jax.vmap(lambda f: f.gap(x[f.i], x[f.j]))(f) for f in graph.edges[1:3]]
    gradient = graph.gradient(x)
    bound = (x <= lower) | (x >= upper)
    clear = jnp.where(bound, jnp.abs(gradient), jnp.minimum(x - lower, upper - x)) > 1e-3
    return jnp.all(clear) & jnp.all(jnp.stack([jnp.abs(g).min() for g in gaps]) > 1e-3)


@pytest.mark.x64
@pytest.mark.parametrize("dim", [0, 2], ids=["scalars", "vectors"])
def test_derivative_is_that_of_a_dense_solve(dim):
    problem = stacked(150, dim)
    rng = np.random.default_rng(0)
    result = jax.jit(in_turn(solve))(problem)
    assert result.info.converged.all()
    smooth = np.asarray(jax.jit(jax.vmap(smooth_at))(problem, result.x))
    assert smooth.sum() >= 100
    (lower, upper), x = problem[1], result.x
    assert 0.2 < ((x <= lower) | (x >= upper)).mean() < 0.5

    theta, _ = eqx.partition(problem[:2], eqx.is_inexact_array)
    data = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (x, theta))
    expected = jit_well(in_turn(differences))(problem, x, *data)
    scale = np.abs(expected).max(axis=1, keepdims=True)

    def wrong(found):
        return (np.abs(found - np.asarray(expected)) / scale)[smooth].max()

    for mode in (reverse, forward):
        assert wrong(jax.jit(in_turn(mode))(problem, *data)) < 1e-7
    with jax.enable_x64(False):
        cast = partial(jax.tree.map, lambda a: a.astype(jnp.float32) if a.dtype == float else a)
        assert wrong(jax.jit(in_turn(reverse))(cast(problem), *cast(data))) < 1e-3


def pair(a=1.0, weight=0.5, target=(0.2, 0.8)):
    return sg.EnergyGraph(sg.Landau([a, a], target=list(target)), [sg.Quadratic([0], [1], weight)])


@pytest.mark.x64
def test_every_transformation_of_the_derivative():
    x0 = jnp.array([0.5, 0.5])
    solution = lambda w: sg.relax(pair(weight=w), x0, bounds=None).x
    # x = 1/2 -+ 0.3 / (1 + 2 w)
    w, known = 0.5, np.array([0.3, -0.3])
    first, second = 2 / (1 + 2 * w) ** 2, -8 / (1 + 2 * w) ** 3
    for derivative in (jax.jacfwd, jax.jacrev, lambda f: jax.jit(jax.jacrev(f))):
        np.testing.assert_allclose(derivative(solution)(w), known * first, rtol=1e-9)
    for derivative in (
        jax.hessian,
        lambda f: jax.jacrev(jax.jacrev(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
    ):
        np.testing.assert_allclose(derivative(solution)(w), known * second, rtol=1e-9)
    batch = jax.vmap(jax.grad(lambda w: solution(w)[0]))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(batch, 0.6 / (1 + 2 * jnp.array([0.5, 1.0])) ** 2, rtol=1e-9)


@pytest.mark.x64
def test_minimum_has_the_envelope_derivative():
    energy = lambda w: sg.relax(pair(weight=w), jnp.array([0.5, 0.5]), bounds=None).energy
    # F* = 0.18 * 2 w / (1 + 2 w)
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(derivative(lambda w: energy(w)[-1])(0.5), 0.36 / 4, rtol=1e-9)
    second = jax.grad(jax.grad(lambda w: energy(w)[-1]))(0.5)
    np.testing.assert_allclose(second, -4 * 0.36 / 8, rtol=1e-9)
    # the way there is not differentiated
    assert jax.grad(lambda w: energy(w)[0])(0.5) == 0


@pytest.mark.x64
def test_derivative_by_bounds_and_not_by_the_start():
    graph = pair(target=(-0.5, 0.8))

    def outcome(lower, x0):
        return sg.relax(graph, x0, bounds=(lower, 1.0)).x

    by_lower, by_start = jax.jacrev(outcome, argnums=(0, 1))(0.1, jnp.array([0.5, 0.5]))
    # x_0 rests at the lower bound, and x_1 = (1.6 + x_0) / 3 follows
    np.testing.assert_allclose(by_lower, [1, 1 / 3], rtol=1e-9)
    np.testing.assert_array_equal(by_start, 0)


@pytest.mark.x64
def test_a_multiplier_that_vanishes_counts_as_held():
    x0 = jnp.array([0.5, 0.5])
    # without the wall the minimizer would be at 0 exactly: the derivative is that from the wall
    outcome = lambda t: sg.relax(sg.EnergyGraph(sg.Landau([1.0, 1.0], target=t), []), x0).x
    np.testing.assert_array_equal(jax.jacrev(outcome)(jnp.array([0.0, 0.5])), [[0, 0], [0, 1]])


@pytest.mark.x64
def test_no_derivative_is_not_a_number():
    chain = lambda w: sg.EnergyGraph(None, [sg.Quadratic([0, 1], [1, 2], w)], num_nodes=3)
    outcome = lambda w: sg.relax(chain(w), jnp.array([0.2, 0.4, 0.9])).x
    # nothing anchors the chain: every constant is a minimizer
    assert jnp.isnan(jax.jacrev(outcome)(jnp.ones(2))).any()
    # a node that nothing touches stays where it is, and spoils nothing
    apart = lambda w: sg.EnergyGraph(
        sg.Landau([1.0, 1.0, 0.0], target=[0.2, 0.8, 0.0]), [sg.Quadratic([0], [1], w)]
    )
    outcome = lambda w: sg.relax(apart(w), jnp.array([0.5, 0.5, 0.7])).x
    np.testing.assert_allclose(jax.jacrev(outcome)(0.5), [0.15, -0.15, 0], rtol=1e-9)


def grid(side, anchor):
    index = np.arange(side * side).reshape(side, side)
    i = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    j = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    target = np.random.default_rng(0).random(side * side)
    return sg.EnergyGraph(
        sg.Landau(np.full(side * side, anchor), target=target), [sg.Quadratic(i, j)]
    )


@pytest.mark.x64
def test_weakly_anchored_grid():
    # derivatives of the iterates were 159 % off here, where x itself was right to 4e-10
    graph, x0 = grid(32, 1e-3), jnp.full(1024, 0.5)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=1024))

    def outcome(weight):
        moved = eqx.tree_at(lambda g: g.edges[0].weight, graph, weight)
        # with a condition number of 8e3, the default tolerance leaves 3e-7 of the derivative
        return jnp.vdot(cotangent, sg.relax(moved, x0, steps=1000, tol=1e-13).x)

    weight, edge = graph.edges[0].weight, graph.edges[0]
    found = jax.jit(jax.grad(outcome))(weight)
    hessian = np.diag(2 * np.asarray(graph.local[0].a))
    for a, b in zip(np.asarray(edge.i), np.asarray(edge.j)):
        hessian[[a, b], [a, b]] += 2
        hessian[[a, b], [b, a]] -= 2
    x = np.linalg.solve(hessian, 2 * np.asarray(graph.local[0].a * graph.local[0].target))
    adjoint = np.linalg.solve(hessian, cotangent)
    expected = -2 * (x[edge.i] - x[edge.j]) * (adjoint[edge.i] - adjoint[edge.j])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.once
def test_memory_does_not_grow_with_the_steps():
    graph, x0 = grid(20, 1e-2), jnp.full(400, 0.5)

    def mebibytes(steps):
        loss = lambda g: jnp.sum(sg.relax(g, x0, steps=steps).x ** 2)
        program = eqx.filter_jit(eqx.filter_grad(loss)).lower(graph).compile()
        return program.compiled.memory_analysis().temp_size_in_bytes

    few, many = mebibytes(50), mebibytes(4000)
    # what grows is the list of energies, of which there are two
    assert many - few <= 4 * 4 * 4096
