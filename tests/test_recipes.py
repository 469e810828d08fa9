"""What the recipes promise: restarts, switches of optimizer, wrappers, and kinds of parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import smallgain_jax as sg
from smallgain_jax.limits.probe import probe_optimizer
from smallgain_jax.losses.small_gain import STATIC

pytestmark = pytest.mark.once
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 8, 3)).astype(np.float32)
START = {
    "layer_0": {
        "w": (RNG.normal(size=(3, 6)) / 2).astype(np.float32),
        "b": np.zeros(6, np.float32),
    },
    "layer_1": {"w": (RNG.normal(size=(6, 1)) / 2).astype(np.float32)},
}
"""As Haiku nests them: module, then parameter."""


def output(params, x):
    first = params["layer_0"]
    hidden = jnp.tanh(x @ first["w"] + first["b"][None, :])
    return (hidden @ params["layer_1"]["w"])[:, 0]


def losses_of_output(y, x):
    return {"fit": jnp.mean((y - x[:, 0]) ** 2), "stiff": 20 * jnp.mean(y[:3] ** 2)}


LOSSES = sg.terms(lambda p, x: losses_of_output(output(p, x), x), names=("fit", "stiff"))


def make_step(optimizer, losses=LOSSES):
    """One update of `(params, state)` on a batch, and the state after it."""

    @jax.jit
    def step(carry, x):
        params, state = carry
        gradient = jax.grad(lambda p: jnp.sum(losses.values(p, x)))(params)
        updates, state = optimizer.update(gradient, state, params, term_args=(x,))
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer, carry, batches, losses=LOSSES):
    step = make_step(optimizer, losses)
    run = jax.jit(lambda carry, x: jax.lax.scan(lambda c, x: (step(c, x), None), carry, x)[0])
    return run(carry, jnp.asarray(batches))


def begin(optimizer, params=START):
    params = jax.tree.map(jnp.asarray, params)
    return params, optimizer.init(params)


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def orbax_round_trip(folder, carry, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "orbax", like)


def equinox_round_trip(folder, carry, like):
    eqx.tree_serialise_leaves(folder / "carry.eqx", carry)
    return eqx.tree_deserialise_leaves(folder / "carry.eqx", like)


def test_a_restart_continues_bit_for_bit(tmp_path):
    optimizer = sg.small_gain(optax.adam(1e-2), LOSSES, every=2, warmup=4, policy="fair")
    step = make_step(optimizer)
    carry = begin(optimizer)
    for x in X[:15]:
        carry = step(carry, x)
    assert not np.allclose(carry[1].weights, 1)
    restored = [
        trip(tmp_path, carry, begin(optimizer)) for trip in (orbax_round_trip, equinox_round_trip)
    ]
    for other in restored:
        assert_same(other, carry)
    for x in X[15:30]:
        carry = step(carry, x)
        restored = [step(other, x) for other in restored]
    for other in restored:
        assert_same(other, carry)


def test_a_new_base_optimizer_keeps_the_weights_of_the_old():
    first = sg.small_gain(optax.sgd(1e-2), LOSSES, every=2, policy="fair")
    second = sg.small_gain(optax.adam(1e-2), LOSSES, every=2, warmup=10, policy="fair")
    params, old = train(first, begin(first), X[:20])
    assert not np.allclose(old.weights, 1)
    # counter and measurements belong to the old metric and stay behind
    state = second.init(params)._replace(
        weights=old.weights, first_weights=old.first_weights, log_weights=old.log_weights
    )
    params, state = train(second, (params, state), X[20:30])
    np.testing.assert_array_equal(state.weights, old.weights)
    params, state = train(second, (params, state), X[30:])
    assert not np.array_equal(state.weights, old.weights)
    assert 0 < state.info.sharpness_ratio < np.inf


def test_accumulation_around_equals_a_step_on_the_mean_gradient_of_one_batch():
    """The same batch three times: its mean gradient is its gradient."""
    optimizer = sg.small_gain(optax.adam(1e-2), LOSSES, every=1, warmup=2, policy="fair")
    patient = optax.MultiSteps(optimizer, 3)
    direct = train(optimizer, begin(optimizer), X[:10])
    params, state = train(patient, begin(patient), np.repeat(X[:10], 3, axis=0))
    assert int(state.gradient_step) == 10
    close = dict(rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(state.inner_opt_state.weights, direct[1].weights, **close)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(direct[0]), strict=True):
        np.testing.assert_allclose(a, b, **close)


def two_batches_of_gradients():
    """Of each loss at the start, leaves [2 batches, 2 losses, ...]."""
    grads = jax.jit(jax.vmap(lambda x: LOSSES.value_and_term_grads(START, x)[1]))(X[:2])
    return jax.tree.map(np.asarray, grads)


def assert_stepped(params, rate, gradient):
    for p, start, g in zip(
        *(jax.tree.leaves(tree) for tree in (params, START, gradient)), strict=True
    ):
        np.testing.assert_allclose(p, start - rate * g, rtol=1e-4, atol=1e-6)


def test_accumulation_around_cannot_be_reweighted_and_says_so():
    """The mean over batches is no multiple of the last one's gradient: it is handed on."""
    optimizer = sg.small_gain(optax.sgd(0.1), LOSSES, guard=None, policy="fair")
    patient = optax.MultiSteps(optimizer, 2)
    step = make_step(patient)
    carry = begin(patient)
    with pytest.warns(UserWarning, match="no multiple of the gradient"):
        carry = jax.block_until_ready(step(step(carry, X[0]), X[1]))
    common, also = carry[1].inner_opt_state.weights
    assert common == also
    expected = jax.tree.map(
        lambda g: np.asarray(common) * g.sum(axis=1).mean(axis=0), two_batches_of_gradients()
    )
    assert_stepped(carry[0], 0.1, expected)


def test_accumulation_inside_weighs_every_batch():
    optimizer = sg.small_gain(optax.MultiSteps(optax.sgd(0.1), 2), LOSSES, warmup=10, policy="fair")
    step = make_step(optimizer)
    params, state = begin(optimizer)
    w = np.array([3.0, 0.5], np.float32)
    carry = params, state._replace(weights=jnp.asarray(w), first_weights=jnp.asarray(w))
    for x in X[:2]:
        carry = step(carry, x)
    expected = jax.tree.map(
        lambda g: np.tensordot(w, g.mean(axis=0), 1), two_batches_of_gradients()
    )
    assert_stepped(carry[0], 0.1, expected)


@pytest.mark.parametrize("k", [1, 3, lambda update: jnp.where(update < 5, 2, 4)])
@pytest.mark.parametrize(
    "base",
    [
        optax.sgd(optax.linear_schedule(0.0, 0.1, 30), momentum=0.9),
        optax.adam(1e-2),
        optax.amsgrad(1e-2),
    ],
    ids=["sgd", "adam", "amsgrad"],
)
def test_the_limit_under_accumulation_is_that_of_the_updates_made(base, k):
    """In the middle of an accumulation too, by the number of updates and not of gradients."""
    gradient = jnp.array([1.0, 2.0])
    direct, inside = base, optax.MultiSteps(base, k)
    plain, patient = probe_optimizer(direct, gradient), probe_optimizer(inside, gradient)
    state, waiting = direct.init(gradient), inside.init(gradient)
    step, wait = jax.jit(direct.update), jax.jit(inside.update)
    for _ in range(20):
        _, state = step(gradient, state, gradient)
    while waiting.gradient_step < 20 or (k != 1 and waiting.mini_step == 0):
        _, waiting = wait(gradient, waiting, gradient)
    expected = jax.jit(plain.limit)(state)
    np.testing.assert_allclose(jax.jit(patient.limit)(waiting), expected, rtol=1e-4)


def test_an_injected_rate_moves_the_limit():
    base = optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    optimizer = sg.small_gain(base, LOSSES, every=1, warmup=0, policy="fair")
    step = make_step(optimizer)
    params, state = step(begin(optimizer), X[0])
    low = jnp.float32(1e-3)
    slower = state._replace(base_state=optax.tree.set(state.base_state, learning_rate=low))
    (_, now), (_, then) = step((params, state), X[1]), step((params, slower), X[1])
    np.testing.assert_allclose(then.info.limit, 10 * now.info.limit, rtol=1e-5)
    # the metric has the rate in it, so that prices differ by its rounding
    np.testing.assert_allclose(now.weights, then.weights, rtol=1e-6)


def test_settings_injected_around():
    """`target` becomes a number in the state, and the margin follows it."""
    make = optax.inject_hyperparams(sg.loss_small_gain, static_args=STATIC)
    optimizer = make(optax.sgd(1e-2), LOSSES, policy="fair", every=1, ema=0.5)
    params, state = begin(optimizer)
    assert float(state.hyperparams["target"]) == pytest.approx(0.9)
    step = make_step(optimizer)
    lower = state._replace(hyperparams={**state.hyperparams, "target": jnp.float32(0.5)})
    (_, a), (_, b) = step((params, state), X[0]), step((params, lower), X[0])
    a, b = a.inner_state.info, b.inner_state.info
    np.testing.assert_allclose(b.margin_rows - a.margin_rows, -0.4 * 200, rtol=1e-4)


def test_lists_and_nested_dicts_are_trained_alike():
    def from_list(params):
        (b, w), (last,) = params
        return {"layer_0": {"w": w, "b": b}, "layer_1": {"w": last}}

    # leaves in the order of the dict, or power iteration would start from another vector
    listed = [list(layer.values()) for layer in jax.tree.map(jnp.asarray, START).values()]
    other = sg.terms(lambda p, x: LOSSES.fn(from_list(p), x), names=LOSSES.names)
    results = []
    for losses, params in ((LOSSES, START), (other, listed)):
        optimizer = sg.small_gain(optax.sgd(1e-2), losses, every=1, policy="fair")
        results.append(train(optimizer, begin(optimizer, params), X[:20], losses))
    assert_shares(results[0][1])
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def assert_shares(state):
    """Fair shares, as far as mini-batches allow, at finite prices."""
    assert np.all(np.isfinite(state.info.cost))
    assert state.weights[0] > state.weights[1] > 0
    np.testing.assert_allclose(state.info.share.sum(), 1, rtol=1e-5)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 6, rngs=rngs)
        self.second = nnx.Linear(6, 1, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))[:, 0]


def test_the_optimizer_of_flax_agrees_with_a_loop_over_its_state():
    graph, params = nnx.split(Network(nnx.Rngs(0)))
    losses = sg.terms(
        lambda p, x: losses_of_output(nnx.merge(graph, p)(x), x), names=("fit", "stiff")
    )
    wrapped = sg.small_gain(optax.adam(1e-2), losses, every=1, warmup=5, policy="fair")
    plain = nnx.as_pure(params)
    by_hand, state = train(wrapped, (plain, wrapped.init(plain)), X[:20], losses)

    model = nnx.merge(graph, params)
    joint, start = nnx.split((model, nnx.Optimizer(model, wrapped, wrt=nnx.Param)))

    def update(carry, x):
        model, optimizer = nnx.merge(joint, carry)

        def total(model):
            return sum(losses_of_output(model(x), x).values())

        optimizer.update(model, nnx.grad(total)(model), term_args=(x,))
        return nnx.state((model, optimizer)), None

    end, _ = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.asarray(X[:20])))(start)
    model, optimizer = nnx.merge(joint, end)
    close = dict(rtol=1e-3, atol=1e-5)
    assert_shares(state)
    np.testing.assert_allclose(optimizer.opt_state.weights[...], state.weights, **close)
    found = nnx.as_pure(nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, **close)


def test_complex_parameters_as_real_and_imaginary_parts():
    """Curvature 2 across real and imaginary part, and 100 in both: shares become equal."""

    def fn(parts):
        z = jax.lax.complex(parts["re"], parts["im"])
        return {
            "across": 0.5 * jnp.sum((z.real + z.imag) ** 2),
            "round": 50 * jnp.sum(jnp.abs(z - (1 + 1j)) ** 2),
        }

    optimizer = sg.small_gain(optax.sgd(0.2), fn, every=1, policy="fair")
    parts = {"re": jnp.ones(2), "im": -jnp.ones(2)}

    def step(carry, _):
        parts, state = carry
        gradient = jax.grad(lambda p: sum(fn(p).values()))(parts)
        updates, state = optimizer.update(gradient, state, parts)
        return (optax.apply_updates(parts, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200)[0])
    parts, state = run((parts, optimizer.init(parts)))
    np.testing.assert_allclose(state.info.cost[:, 0], [2, 100], rtol=1e-3)
    np.testing.assert_allclose(state.info.share, [0.5, 0.5], rtol=1e-3)
    minimum = state.weights[1] * 100 / (state.weights[1] * 100 + state.weights[0] * 2)
    np.testing.assert_allclose(parts["re"], minimum, rtol=1e-2)
    np.testing.assert_allclose(parts["im"], minimum, rtol=1e-2)
