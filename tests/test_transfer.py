"""Nothing crosses between host and device while a compiled step runs, and nothing calls back.

Steps are compiled and warmed up, then run twice under `jax.transfer_guard("disallow")`, each on the
state that the last one returned: a Python number or a NumPy array in that state, or in what the
program closes over, would have to be sent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from tests.test_precision import equations, graph_and_start, waves

pytestmark = pytest.mark.once


def relaxation():
    """A relaxation that goes on from the state of the last one."""
    graph, x0 = graph_and_start()

    def step(carry, graph):
        x, state = carry
        result = sg.relax(graph, x, steps=3, state=state)
        return result.x, result.state

    first = sg.relax(graph, x0, steps=3)
    return step, (first.x, first.state), (graph,)


def training(optimizer, fn=waves, params=None):
    """An update with the gradient of the sum, as most loops hand it over."""

    def step(carry):
        params, state = carry
        gradient = jax.grad(lambda p: sum(fn(p).values()))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(2) if params is None else params
    return step, (params, optimizer.init(params)), ()


def on_graph():
    graph, x0 = graph_and_start()
    optimizer = sg.small_gain(optax.sgd(0.1), graph)

    def step(carry, graph):
        x, state = carry
        updates, state = optimizer.update(graph.gradient(x), state, x, terms=graph)
        return optax.apply_updates(x, updates), state

    return step, (x0, optimizer.init(x0)), (graph,)


def matrices(params):
    return {"a": jnp.sum(jnp.cos(params["w"])), "b": jnp.sum(params["v"] ** 4)}


SMALL = {"w": jnp.ones((3, 2)), "v": jnp.ones((2, 3))}
STEPS = {
    "relax": relaxation,
    "small_gain graph": on_graph,
    "small_gain": lambda: training(sg.small_gain(optax.adam(0.1), waves, every=1, warmup=0)),
    "small_gain fair": lambda: training(
        sg.small_gain(optax.adam(0.1), waves, every=1, warmup=0, policy="fair")
    ),
    "throttle": lambda: training(sg.throttle(optax.sgd(0.1), 0.1)),
    "kappa_budget": lambda: training(
        optax.chain(optax.sgd(0.1), sg.kappa_budget(2.0)), matrices, SMALL
    ),
    "balance_flow": lambda: training(sg.balance_flow(waves, 0.1)),
    "two_phase": lambda: training(sg.two_phase(optax.sgd(0.1), optax.sgd(0.1), waves)),
}


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def callbacks(fn, arguments):
    program = jax.make_jaxpr(fn)(*arguments)
    return [e for e in equations(program.jaxpr) if "callback" in e.primitive.name]


def test_the_guard_sees_an_array_of_the_host():
    step = jax.jit(lambda x: x + 1)
    step(np.ones(2))
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed"):
        step(np.ones(2))


@pytest.mark.parametrize("name", STEPS)
def test_steps_run_under_the_guard(name):
    fn, carry, arguments = STEPS[name]()
    step = jax.jit(fn)
    carry, arguments = on_device((carry, arguments))
    carry = step(carry, *arguments)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            carry = step(carry, *arguments)
        jax.block_until_ready(carry)
    assert step._cache_size() == 1


SILENT = [name for name in STEPS if name != "small_gain fair"]


@pytest.mark.parametrize("name", SILENT)
def test_no_step_calls_back(name):
    fn, carry, arguments = STEPS[name]()
    assert not callbacks(fn, (carry, *arguments))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"guard": None}, 0),
        ({}, 0),
        ({"policy": "fair", "guard": None}, 1),
        ({"policy": "fair"}, 2),
    ],
)
def test_losses_call_back_only_where_there_may_be_something_to_report(settings, expected):
    """Two warnings: foreign updates that cannot be reweighted, and a way back that was missed.

    The default leaves the second one to the host, for a callback slows down every call.
    """
    fn, carry, arguments = training(sg.small_gain(optax.adam(0.1), waves, **settings))
    assert len(callbacks(fn, (carry, *arguments))) == expected
