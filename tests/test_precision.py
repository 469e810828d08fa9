"""What accelerators round before they multiply is never what a claim rests on.

Two ways to tell, both on a CPU: every product in the programs of the public functions asks for all
bits, whatever `jax_default_matmul_precision` says; and all tests can be run with products as coarse
as an accelerator's (`pytest --products bfloat16`, see `tests.products`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core as jex_core

import smallgain_jax as sg
from smallgain_jax.tools.scenarios import random_graph
from tests.products import SETTINGS, coarse_products

pytestmark = pytest.mark.once
HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
JAXPRS = (jex_core.ClosedJaxpr, jex_core.Jaxpr)


def equations(jaxpr):
    """Every equation of a program, those of its loops, branches and rules included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: isinstance(v, JAXPRS)
        ):
            if isinstance(value, jex_core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, jex_core.Jaxpr):
                yield from equations(value)


def waves(x):
    """Losses without a product of matrices: every product in a program on them is the library's."""
    gap = x[None] - jnp.arange(6.0, dtype=x.dtype).reshape(3, 2)
    values = jnp.sum(gap**2 - jnp.cos(gap), axis=1)
    return dict(zip("abc", values, strict=True))


def updated(optimizer, params=None):
    """A program of one update; branches are in it, taken or not."""
    params = np.ones(2) if params is None else params
    return lambda p: optimizer.update(p, optimizer.init(p), p), (params,)


def on_losses(**settings):
    return updated(sg.small_gain(optax.adam(0.1), waves, every=1, **settings))


def on_graph(wrap):
    graph, x0 = graph_and_start()
    return updated(wrap(optax.sgd(0.1), graph), x0)


def on_matrices(**settings):
    params = {"w": np.ones((3, 2)), "v": np.ones((2, 3))}
    return updated(sg.kappa_budget(2.0, **settings), params)


def graph_and_start(kind="grid"):
    scenario = random_graph(kind, 36, 72, seed=0)
    return scenario.graph, scenario.x0


def allocation(policy, bins):
    rng = np.random.default_rng(0)
    rows = rng.integers(4, size=(12, 2))
    fields = (rng.random(12), rng.random((12, 2)), rows, np.zeros(12), np.ones(12), np.ones(4))
    return partial(sg.allocate, policy=policy, bins=bins), fields


def relaxed(**settings):
    def gradient(graph, x0):
        def total(x0):
            return jnp.sum(sg.relax(graph, x0, steps=5, **settings).x)

        return sg.relax(graph, x0, steps=5, **settings), jax.grad(total)(x0)

    return gradient, graph_and_start()


def derivative(metric):
    """The implicit adjoint, by the weights of the graph."""
    graph, x0 = graph_and_start()
    metric = sg.multilevel(graph) if metric == "hierarchy" else metric

    def total(graph):
        return jnp.sum(sg.relax(graph, x0, steps=5, metric=metric).x)

    return jax.grad(total, allow_int=True), (graph,)


def rows(**settings):
    return lambda graph, x: graph.curvature(x, **settings), graph_and_start()


def least_squares(shape):
    a = np.random.default_rng(0).normal(size=shape)
    penalty = sg.penalties.SmoothedL1(0.1)
    solve = partial(sg.penalties.reweighted_least_squares, penalty, steps=3)
    return solve, (a, np.ones(shape[0]), np.ones(shape[1]))


CHAIN = [np.eye(3, 4), np.ones((2, 3))]
PROGRAMS = {
    "relax": relaxed,
    "relax unrolled": partial(relaxed, adjoint="unrolled"),
    "relax derivative": partial(derivative, "rows"),
    "relax derivative, hierarchy": partial(derivative, "hierarchy"),
    "conjugate_gradients": lambda: (sg.conjugate_gradients, graph_and_start()),
    "curvature": rows,
    "curvature scaled": partial(rows, scaling_iterations=3),
    "small_gain graph": partial(on_graph, sg.small_gain),
    "gradnorm graph": partial(on_graph, sg.gradnorm),
    "auto_cap graph": partial(on_graph, sg.auto_cap),
    "small_gain": on_losses,
    "small_gain fair": partial(on_losses, policy="fair"),
    "small_gain greedy": partial(on_losses, policy="greedy"),
    "small_gain alignment": partial(on_losses, policy="greedy", value="alignment"),
    "allocate prices": partial(allocation, "greedy", 0),
    "allocate classes": partial(allocation, "greedy", 4),
    "allocate fair": partial(allocation, "fair", None),
    "throttle": lambda: updated(sg.throttle(optax.sgd(0.1), 0.1)),
    "kappa_budget": on_matrices,
    "kappa_budget clip": partial(on_matrices, projection="clip"),
    "lipschitz_certificate": lambda: (sg.lipschitz_certificate, (CHAIN,)),
    "lipschitz_lower_bound": lambda: (
        lambda w, x: sg.lipschitz_lower_bound(lambda z: jnp.tanh(w @ z), x, steps=3),
        (np.ones((2, 3)), np.ones((2, 3))),
    ),
    "balance_flow": lambda: updated(sg.balance_flow(waves, 0.1)),
    "balance_newton": lambda: updated(sg.balance_newton(waves)),
    "balance_gradient": lambda: (partial(sg.balance_gradient, waves), (np.ones(2),)),
    "cosine_matrix": lambda: (sg.cosine_matrix, (np.ones((3, 2)),)),
    "two_phase": lambda: updated(sg.two_phase(optax.sgd(0.1), optax.sgd(0.1), waves)),
    "smallest_curvature": lambda: (partial(sg.smallest_curvature, waves), (np.ones(2),)),
    "sharpness": lambda: (partial(sg.sharpness, sg.terms(waves)), (np.ones(2),)),
    "least squares, tall": partial(least_squares, (5, 3)),
    "least squares, wide": partial(least_squares, (3, 5)),
}


def products(program):
    """The precision that each product of a program asks for."""
    dots = (e for e in equations(program.jaxpr) if e.primitive is jax.lax.dot_general_p)
    return [equation.params["precision"] for equation in dots]


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_the_library_take_all_bits(name):
    fn, arguments = PROGRAMS[name]()
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(fn)(*arguments)
    assert set(products(program)) <= {HIGHEST}


def test_the_inspection_sees_products_in_loops_and_rules():
    """What is a product in a branch of a loop of a derivative is found."""

    def fn(x):
        return jax.lax.fori_loop(
            0, 3, lambda _, x: jax.lax.cond(x[0] > 0, lambda x: x * (x @ x), lambda x: x, x), x
        )

    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(jax.jit(jax.jacfwd(fn)))(jnp.ones(2))
    assert set(products(program)) - {HIGHEST}


@pytest.mark.parametrize("setting", SETTINGS)
def test_coarse_products_are_coarse_and_end(setting):
    a = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    exact = a.astype(float) @ a

    def error(precision):
        found = jax.jit(partial(jnp.matmul, precision=precision))(a, a)
        return np.abs(found - exact).max() / np.abs(exact).max()

    with coarse_products(setting):
        assert 1e-5 < error(None) < (1e-3 if setting == "tensorfloat32" else 1e-2)
        assert error("highest") < 1e-6
    assert error(None) < 1e-6
