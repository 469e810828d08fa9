"""optax's own test bodies, unmodified, on our transformations."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax._src import alias, alias_test

import smallgain_jax as sg

pytestmark = pytest.mark.once
CASES = [
    ("sg_sgd", {"learning_rate": 1e-3, "momentum": 0.9}),
    ("sg_adam", {"learning_rate": 1e-1}),
    ("sg_throttle", {"learning_rate": 1e-3, "momentum": 0.9}),
    ("sg_kappa", {"learning_rate": 1e-3, "momentum": 0.9}),
]


def losses(params):
    """Some objective of any parameters: the tests bring their own gradients."""
    squares = [jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(params)]
    return {"all": sum(squares, jnp.zeros(())).astype(jnp.float32)}


TERMS = sg.terms(losses, names=("all",))


@pytest.fixture(autouse=True)
def factories(monkeypatch):
    """optax looks its optimizers up by name in `alias`."""

    def sg_sgd(learning_rate, momentum=None):
        return sg.small_gain(optax.sgd(learning_rate, momentum), TERMS, guard=None)

    def sg_adam(learning_rate):
        return sg.small_gain(optax.adam(learning_rate), TERMS, guard=None)

    def sg_throttle(learning_rate, momentum=None):
        return sg.throttle(optax.sgd(learning_rate, momentum), learning_rate)

    def sg_kappa(learning_rate, momentum=None):
        # optax's parameters have three axes, and no name that tells a layout
        layers = lambda path, leaf: sg.Layer() if leaf.ndim > 1 else None
        rail = sg.kappa_budget(1e6, layers=layers)
        return optax.chain(optax.sgd(learning_rate, momentum), rail)

    for factory in (sg_sgd, sg_adam, sg_throttle, sg_kappa):
        monkeypatch.setattr(alias, factory.__name__, factory, raising=False)
    with jax.numpy_rank_promotion("allow"):
        yield


def body(name):
    return inspect.unwrap(getattr(alias_test.AliasTest, name + "0"))


def case():
    return alias_test.AliasTest("run")


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("target", ["_setup_parabola", "_setup_rosenbrock"])
def test_optimization(name, settings, target):
    body("test_optimization")(case(), name, settings, getattr(alias_test, target), jnp.float32)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_extra_args(name, settings):
    body("test_optimizers_accept_extra_args")(case(), name, settings)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_inject_hyperparams(name, settings):
    body("test_optimizers_can_be_wrapped_in_inject_hyperparams")(case(), name, settings)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_preserve_dtype(name, settings, dtype):
    body("test_preserve_dtype")(case(), name, settings, dtype)


@pytest.fixture
def global_precision():
    """optax's body sets the precision of the process, and restores this thread's in its place."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("global_precision")
@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_stability(name, settings, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        body("test_state_shape_dtype_shard_stability")(case(), name, settings, dtype)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_accumulation(name, settings, dtype):
    body("test_gradient_accumulation")(case(), name, settings, dtype)


@pytest.mark.parametrize("base", [optax.sgd(0.1), optax.adam(0.1)])
def test_apply_if_finite_and_masked(base):
    optimizer = optax.apply_if_finite(sg.small_gain(base, TERMS), 3)
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    grads = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    updates, state = update(grads, state, params)
    assert np.all(np.asarray(updates["a"]) < 0)
    updates, state = update(jax.tree.map(lambda g: g * jnp.nan, grads), state, params)
    np.testing.assert_array_equal(updates["a"], 0)

    def on_a(params):
        return {"a": jnp.sum(params["a"] ** 2)}

    masked = optax.masked(sg.small_gain(base, sg.terms(on_a)), {"a": True, "b": False})
    updates, _ = jax.jit(masked.update)(grads, masked.init(params), params)
    assert np.all(np.asarray(updates["a"]) < 0)
    np.testing.assert_array_equal(updates["b"], 1)
