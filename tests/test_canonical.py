"""Equal optimizers are one: what was compiled for the first serves the others."""

import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import monitoring

import smallgain_jax as sg
from smallgain_jax import _canonical
from smallgain_jax._canonical import canonical

GRAPH = sg.EnergyGraph(sg.Landau(a=np.ones(3)), [sg.Quadratic([0, 1], [1, 2], [0.5, 0.5])])
MADE = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": lambda rate: optax.adam(rate),
    "lbfgs": lambda rate: optax.lbfgs(rate),
    "schedule": lambda rate: optax.sgd(optax.exponential_decay(rate, 10, 0.9)),
    "array": lambda rate: optax.sgd(lambda count: rate * jnp.ones(())),
    "chain": lambda rate: optax.chain(optax.clip(1.0), optax.sgd(rate)),
    "small_gain": lambda rate: sg.small_gain(optax.sgd(rate), GRAPH),
    "noise": lambda rate: optax.noisy_sgd(rate, key=jax.random.key(3)),
    "partial": lambda rate: optax.sgd(partial(jnp.multiply, rate)),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MADE)
def test_equal_optimizers_are_one(name):
    make = MADE[name]
    first = canonical(make(0.1))
    assert canonical(make(0.1)) is first
    assert canonical(make(0.2)) is not first


@pytest.mark.once
def test_a_second_equal_optimizer_compiles_nothing():
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    x0 = jnp.full(3, 0.5)
    for make in (MADE["momentum"], MADE["small_gain"]):
        sg.relax(GRAPH, x0, make(0.1))
        before = len(compiled)
        sg.relax(GRAPH, x0, make(0.1))
        assert len(compiled) == before


@pytest.mark.once
def test_what_differs_stays_apart():
    def scaled(factor):
        return optax.stateless(lambda updates, _: jax.tree.map(lambda u: factor * u, updates))

    different = [1, 1.0, True, "1", np.float32(1), np.ones(1), jnp.ones(2), None, [1], (1,)]
    found = [canonical(scaled(factor)) for factor in different]
    assert len({id(one) for one in found}) == len(different)
    # objects of others are compared by identity, and what is large is not read
    for thing in (object(), np.ones(5000)):
        assert canonical(scaled(thing)) is canonical(scaled(thing))
    assert canonical(scaled(np.ones(5000))) is not canonical(scaled(np.ones(5000)))


@pytest.mark.once
def test_a_closure_that_changed_stands_for_no_other():
    def made(rates):
        return optax.stateless(lambda u, _: jax.tree.map(lambda leaf: rates[0] * leaf, u))

    rates = [0.5]
    first, second = made(rates), made([0.5])
    assert canonical(first) is first
    assert canonical(second) is first
    rates[0] = -0.125
    assert canonical(second) is second
    assert canonical(made([0.5])) is second


@pytest.mark.once
def test_a_traced_rate_is_left_alone():
    def relaxed(rate):
        optimizer = optax.sgd(rate)
        assert canonical(optimizer) is optimizer
        return sg.relax(GRAPH, jnp.full(3, 0.5), optimizer, steps=3, adjoint="unrolled").x.sum()

    assert np.isfinite(jax.jit(jax.grad(relaxed))(0.1))


@pytest.mark.once
def test_only_so_many_are_kept():
    class Large:
        pass

    thing = Large()
    gone = weakref.ref(thing)
    canonical(optax.stateless(lambda updates, _, thing=thing: updates))
    del thing
    for rate in range(_canonical.KEPT + 1):
        canonical(optax.sgd(1.0 + rate))
    gc.collect()
    assert gone() is None
    assert len(_canonical._known) == _canonical.KEPT
