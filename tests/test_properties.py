"""The properties of `tests.properties`, for each transformation of the library."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from tests import properties
from tests.properties import Case

MATRICES = {"v": jnp.linspace(-1, 1, 6).reshape(2, 3), "w": jnp.linspace(0.5, 1.5, 6).reshape(3, 2)}


def losses_of(params, scale):
    both = params["v"] @ params["w"]
    return {"fit": scale * jnp.sum((both - 1) ** 2), "size": scale * jnp.sum(params["w"] ** 2)}


LOSSES = sg.terms(losses_of, names=("fit", "size"))


def on_losses(make):
    def case():
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), MATRICES)
        gradient = jax.grad(lambda p, scale: sum(losses_of(p, scale).values()))
        return Case(make(), params, gradient, lambda scale: {"term_args": (jnp.asarray(scale),)})

    return case


def on_a_graph(make):
    def case():
        i, j = np.arange(4), np.arange(1, 5)
        local = sg.Landau(a=np.full(5, 0.3), target=np.linspace(0, 1, 5))
        graph = sg.EnergyGraph(local, [sg.Quadratic(i, j, 0.5)])
        return Case(
            make(graph), jnp.linspace(1.0, 0.0, 5), lambda x, scale: scale * graph.gradient(x)
        )

    return case


CASES = {
    "small_gain": on_losses(lambda: sg.small_gain(optax.adam(0.01), LOSSES)),
    "small_gain, fair": on_losses(lambda: sg.small_gain(optax.adam(0.01), LOSSES, policy="fair")),
    "gradnorm": on_losses(lambda: sg.gradnorm(optax.adam(0.01), LOSSES)),
    "auto_cap": on_losses(lambda: sg.auto_cap(optax.sgd(0.01), LOSSES)),
    "throttle": on_losses(lambda: sg.throttle(optax.sgd(0.1), 0.1)),
    "kappa_budget": on_losses(lambda: optax.chain(optax.sgd(0.1), sg.kappa_budget(2.0))),
    "balance_flow": on_losses(lambda: sg.balance_flow(LOSSES, optax.sgd(0.01))),
    "balance_newton": on_losses(lambda: sg.balance_newton(LOSSES)),
    "two_phase": on_losses(
        lambda: sg.two_phase(optax.sgd(0.01), sg.balance_newton(LOSSES), LOSSES)
    ),
    "small_gain on a graph": on_a_graph(lambda graph: sg.small_gain(optax.sgd(0.1), graph)),
    "gradnorm on a graph": on_a_graph(lambda graph: sg.gradnorm(optax.sgd(0.1), graph)),
    "auto_cap on a graph": on_a_graph(lambda graph: sg.auto_cap(optax.sgd(0.1), graph)),
    "majorized_descent": on_a_graph(sg.majorized_descent),
}


@cache
def case_of(name):
    """One case for all tests in one precision: they share its programs."""
    return CASES[name]()


each = pytest.mark.parametrize("name", CASES)


@each
def test_state_is_stable(name):
    properties.assert_state_is_stable(CASES[name]())


@pytest.mark.once
@pytest.mark.parametrize("name", [name for name in CASES if name != "majorized_descent"])
def test_skips_nonfinite(name):
    properties.assert_skips_nonfinite(case_of(name))


@pytest.mark.once
@each
def test_recovers(name):
    properties.assert_recovers(case_of(name))


@pytest.mark.once
@each
def test_resumes_bitwise(name):
    properties.assert_resumes_bitwise(case_of(name))


@pytest.mark.once
@each
def test_same_outside_of_a_program(name):
    properties.assert_same_outside_of_a_program(case_of(name), 1e-4)


@pytest.mark.once
@each
def test_needs_params(name):
    properties.assert_needs_params(case_of(name))


@pytest.mark.once
@each
def test_names_a_wrong_shape(name):
    properties.assert_names_a_wrong_shape(case_of(name))
