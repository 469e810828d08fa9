"""small_gain on the losses of a model: prices, shares, guard, and what bad input does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from optax.experimental import aggregating

import smallgain_jax as sg
from smallgain_jax.losses import prices
from smallgain_jax.losses.sharing import passes
from tests.compiling import jit_well
from tests.products import exact

A = np.diag([1.0, 3.0])
B = 50 * np.array([[2.0, 1.0], [1.0, 2.0]])


@exact
def quadratics(x):
    """Curvatures 3 and 150; the sum's is the largest eigenvalue of A + B."""
    shifted = x - jnp.array([1.0, -1.0], x.dtype)
    return {
        "soft": 0.5 * x @ jnp.asarray(A, x.dtype) @ x,
        "stiff": 0.5 * shifted @ jnp.asarray(B, x.dtype) @ shifted,
    }


PRICED = {"policy": "reference", "guard": 1e9}
"""Weights of 1, and prices at every look: a guard that never acts asks for them."""


def total(fn):
    return lambda *args: sum(fn(*args).values())


def train(optimizer, fn, x, steps, keys=()):
    """Parameters, final state and the history of `info` fields."""

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(total(fn))(x), state, x)
        history = {key: getattr(state.info, key) for key in keys}
        return (optax.apply_updates(x, updates), state), history

    run = jax.jit(lambda c: jax.lax.scan(step, c, length=steps))
    (x, state), history = run((x, optimizer.init(x)))
    return x, state, history


@pytest.mark.parametrize("curvature", ["hessian", "difference"])
def test_prices_are_curvatures(curvature):
    optimizer = sg.small_gain(
        optax.sgd(1e-3),
        quadratics,
        every=1,
        floor=1,
        ceiling=1,
        curvature=curvature,
        policy="greedy",
    )
    _, state, _ = train(optimizer, quadratics, jnp.ones(2), 60)
    top = [np.linalg.eigvalsh(matrix)[-1] for matrix in (A, B, A + B)]
    np.testing.assert_allclose(state.info.cost[:, 0], top[:2], rtol=1e-3)
    np.testing.assert_allclose(state.info.sharpness, top[2], rtol=1e-3)
    np.testing.assert_allclose(state.info.limit, 2000, rtol=1e-5)
    np.testing.assert_allclose(state.info.sharpness_ratio, top[2] / 2000, rtol=1e-3)
    assert np.sum(state.info.cost[:, 0]) >= state.info.sharpness


@pytest.mark.once
@pytest.mark.parametrize("heads", [2, 3])
def test_losses_on_one_network_are_priced_by_one_program(heads, monkeypatch):
    """It is smaller; and one program or several, prices are the same."""
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(64, 8)) / 8, "out": rng.normal(size=(heads, 8))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(16, 64)), jnp.float32)

    def together(p):
        hidden = jnp.tanh(x @ p["in"])
        return {str(k): (k + 1) * jnp.mean((hidden @ p["out"][k]) ** 2) for k in range(heads)}

    def apart(p):
        return {str(k): together(p)[str(k)] for k in range(heads)}

    def look(losses):
        optimizer = sg.small_gain(optax.sgd(1e-3), losses, every=1, **PRICED)
        start, gradient = optimizer.init(params), jax.grad(total(losses))(params)
        program = jax.jit(optimizer.update).trace(gradient, start, params)
        _, state = program.lower().compile()(gradient, start, params)
        return str(program.jaxpr).count("dot_general"), state.info.cost

    assert passes(lambda p: list(together(p).values()), params) > 0.8 * heads
    assert passes(lambda p: list(apart(p).values()), params) == 1
    small, cost = look(together)
    monkeypatch.setattr(prices, "_pays_apart", lambda *_: True)
    large, each = look(together)
    np.testing.assert_allclose(each, cost, rtol=1e-4)
    assert large > 1.5 * small


@pytest.mark.once
def test_integers_of_a_batch_stay_integers():
    losses = sg.terms(
        lambda p, n: {"a": jnp.sum(p[:n] ** 2), "b": jnp.sum((p - 1) ** 2)}, names=("a", "b")
    )
    optimizer = sg.small_gain(optax.sgd(0.1), losses)
    params = jnp.ones(3)
    gradient = jax.grad(lambda p: jnp.sum(losses.values(p, 2)))(params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params, term_args=(2,))
    np.testing.assert_allclose(updates, [-0.2, -0.2, 0.0], atol=1e-6)


def test_priorities_may_be_data_of_a_program():
    def weights(priorities):
        optimizer = sg.small_gain(
            optax.sgd(1e-4), quadratics, every=1, priorities=priorities, policy="fair"
        )
        state = optimizer.init(jnp.ones(2))
        for _ in range(3):
            gradient = jax.grad(lambda x: sum(quadratics(x).values()))(jnp.ones(2))
            _, state = optimizer.update(gradient, state, jnp.ones(2))
        return state.weights

    given = jnp.array([[3.0, 1.0], [1.0, 1.0]])
    found = jax.jit(lambda p: jax.lax.map(weights, p))(given)
    for each, one in zip(found, given):
        np.testing.assert_allclose(each, weights(tuple(one.tolist())), rtol=1e-4)


@pytest.mark.once
def test_a_traced_priority_below_zero_moves_nothing():
    def moved(priority):
        optimizer = sg.small_gain(
            optax.sgd(0.1), quadratics, policy="fair", priorities={"soft": priority}
        )
        gradient = jax.grad(lambda x: sum(quadratics(x).values()))(jnp.ones(2))
        updates, state = optimizer.update(gradient, optimizer.init(jnp.ones(2)), jnp.ones(2))
        return updates, state.info.skipped

    updates, skipped = jax.jit(moved)(-2.0)
    assert not np.any(updates)
    assert skipped == 1
    assert np.all(jax.jit(moved)(2.0)[0])


@pytest.mark.parametrize("priorities", [None, (3.0, 1.0), {"soft": 3.0}])
def test_fair_shares_follow_priorities_at_a_total_cost_of_one(priorities):
    optimizer = sg.small_gain(
        optax.sgd(1e-4), quadratics, every=1, priorities=priorities, policy="fair"
    )
    _, state, _ = train(optimizer, quadratics, jnp.ones(2), 300)
    wanted = np.array([1.0, 1.0] if priorities is None else [3.0, 1.0])
    np.testing.assert_allclose(state.info.share, wanted / wanted.sum(), rtol=1e-3)
    cost = state.info.cost[:, 0]
    np.testing.assert_allclose(np.vdot(state.weights, cost), 1, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["vector", "names"])
def test_priorities_over_time(schedule):
    """Shares follow them; first weights are those of the first."""

    def priorities(count):
        soft = jnp.where(count < 100, 1.0, 3.0)
        return {"soft": soft} if schedule == "names" else jnp.stack([soft, jnp.ones_like(soft)])

    def after(steps, given):
        optimizer = sg.small_gain(
            optax.sgd(1e-4), quadratics, every=1, priorities=given, policy="fair"
        )
        return train(optimizer, quadratics, jnp.ones(2), steps)[1]

    for steps, wanted in ((100, [0.5, 0.5]), (400, [0.75, 0.25])):
        state = after(steps, priorities)
        np.testing.assert_allclose(state.info.share, wanted, rtol=2e-3)
        np.testing.assert_allclose(state.first_weights, after(1, None).first_weights, rtol=1e-6)


def test_greedy_stays_within_the_limit():
    optimizer = sg.small_gain(optax.sgd(0.01), quadratics, policy="greedy", every=1, ceiling=3.0)
    _, state, history = train(
        optimizer, quadratics, jnp.ones(2), 200, ("sharpness_ratio", "margin_rows")
    )
    assert history["sharpness_ratio"][20:].max() <= 0.9 + 1e-3
    assert np.all(np.asarray(history["margin_rows"])[20:] >= -1e-2 * 200)
    assert not np.allclose(state.weights, 1)


@pytest.mark.once
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("times", [0.1, 3.0, 10.0])
def test_no_rate_diverges_under_the_guard(times, momentum):
    top = np.linalg.eigvalsh(A + B)[-1]
    rate = times * 2 * (1 + (momentum or 0)) / top
    start = jnp.array([2.0, -3.0])
    optimizer = sg.small_gain(optax.sgd(rate, momentum), quadratics)
    x, _, _ = train(optimizer, quadratics, start, 1000)
    assert total(quadratics)(x) < total(quadratics)(start)


@pytest.mark.once
def test_outliers_among_the_batches_raise_no_alarm():
    """Losses of batches that differ by orders of magnitude: only a second batch can confirm."""
    optimizer = sg.small_gain(
        optax.sgd(1e-5), sg.terms(lambda x, size: {"a": size * jnp.sum(x**2)}, names=("a",))
    )
    sizes = jnp.asarray(10.0 ** np.random.default_rng(0).normal(0, 1, 2000), jnp.float32)

    def step(carry, size):
        x, state = carry
        updates, state = optimizer.update(2 * size * x, state, x, term_args=(size,))
        return (optax.apply_updates(x, updates), state), None

    start = (jnp.ones(2), optimizer.init(jnp.ones(2)))
    (x, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, sizes))(start)
    assert state.info.rewinds == 0
    assert jnp.all(x < 1)


@pytest.mark.once
def test_a_guard_below_the_limit_converges_at_any_rate():
    top = np.linalg.eigvalsh(A + B)[-1]
    optimizer = sg.small_gain(optax.sgd(20 / top), quadratics, guard=0.9)
    x, _, _ = train(optimizer, quadratics, jnp.array([2.0, -3.0]), 1000)
    np.testing.assert_allclose(x, np.linalg.solve(A + B, B @ [1.0, -1.0]), atol=1e-3)


def test_curvature_of_blocks_and_row_gains():
    def fn(p):
        return {"a": 2.0 * jnp.sum(p["u"] ** 2), "b": 20.0 * jnp.sum(p["v"] ** 2)}

    params = {"u": jnp.ones(2), "v": jnp.ones(3)}
    optimizer = sg.small_gain(
        optax.sgd(0.01),
        fn,
        every=1,
        blocks="leaves",
        row_gains=True,
        **PRICED,
    )
    _, state, _ = train(optimizer, fn, params, 20)
    np.testing.assert_allclose(state.info.cost, [[4, 0], [0, 40]], rtol=1e-3)
    np.testing.assert_allclose(state.info.row_sharpness, [4, 40], rtol=1e-3)
    # T = 0.9 * 200: gains 45 and 4.5, cut at 3
    np.testing.assert_allclose(state.info.gains, [3, 3])


def test_gauss_newton_product():
    data = np.random.default_rng(0).normal(size=(5, 3))

    @exact
    def model(w, x):
        return jnp.tanh(x @ w)

    losses = sg.terms(lambda z, x: {"fit": 0.5 * jnp.sum(z**2)}, names=("fit",), outputs=model)
    w = jnp.asarray([0.3, -0.2, 0.5])
    x = jnp.asarray(data, w.dtype)
    jacobian = jax.jit(jax.jacrev(model))(w, x)
    largest = np.linalg.norm(np.asarray(jacobian), 2) ** 2
    found = sg.sharpness(losses, w, x, curvature="gauss_newton", iterations=200)
    np.testing.assert_allclose(found, largest, rtol=1e-3)
    hessian = jax.jit(jax.hessian(lambda w: losses.values(w, x)[0]))(w)
    found = sg.sharpness(losses, w, x, iterations=300)
    np.testing.assert_allclose(found, np.abs(np.linalg.eigvalsh(hessian)).max(), rtol=1e-3)


@pytest.mark.parametrize("given", [False, True])
def test_differences_of_gradients_are_hessian_products(given):
    x, y = np.random.default_rng(0).normal(size=(2, 64, 8))

    @exact
    def fn(p):
        error = jnp.tanh(jnp.asarray(x, p[0].dtype) @ p[0]) @ p[1] - jnp.asarray(
            y[:, 0], p[0].dtype
        )
        return {"fit": jnp.mean(error**2), "size": jnp.sum(p[0] ** 4), "flat": jnp.sum(p[1])}

    from smallgain_jax.losses.losses import Batch
    from smallgain_jax.losses.sharpness import PRODUCTS
    from smallgain_jax.spectral.power import random_vector

    losses = sg.terms(fn)
    params = [jnp.asarray(0.3 * x[:8]), jnp.asarray(y[0])]
    vector = random_vector(0, params)

    @jax.jit
    def products(mix):
        gradient = None
        if given:
            _, grads = losses.value_and_term_grads(params)
            gradient = jax.tree.map(lambda g: jnp.tensordot(mix, g, 1, precision="highest"), grads)
        return [
            jax.flatten_util.ravel_pytree(
                PRODUCTS[name](losses, mix, params, Batch(), gradient)(vector)
            )[0]
            for name in ("difference", "hessian")
        ]

    for mix in ([1, 0, 0], [0, 1, 0], [2.0, 0.5, 1.0]):
        found, wanted = products(jnp.asarray(mix, float))
        np.testing.assert_allclose(found, wanted, atol=5e-3 * np.abs(wanted).max())
    # what is linear has none, and its weight is kept
    np.testing.assert_array_equal(products(jnp.array([0.0, 0.0, 1.0]))[0], 0)


def test_given_term_gradients_change_nothing():
    losses = sg.terms(quadratics)
    optimizer = sg.small_gain(optax.sgd(1e-3), losses, every=1, policy="greedy")
    x = jnp.array([2.0, 1.0])
    state = optimizer.init(x)

    @jax.jit
    def both(x, state):
        values, grads = losses.value_and_term_grads(x)
        summed = jnp.sum(grads, axis=0)
        own = optimizer.update(summed, state, x)
        given = optimizer.update(summed, state, x, term_grads=grads, term_values=values)
        return own, given

    own, given = both(x, state)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.once
def test_anneal_returns_to_the_reference():
    # optax's linear schedule may end a rounding away from 0
    optimizer = sg.small_gain(
        optax.sgd(1e-3),
        quadratics,
        every=1,
        anneal=lambda count: jnp.where(count < 200, 1 - count / 200, 0.0),
        policy="fair",
    )
    _, state, _ = train(optimizer, quadratics, jnp.ones(2), 300)
    # the plain sum, at the total cost that fair shares had
    np.testing.assert_allclose(state.weights, 1 / state.info.cost.sum(), rtol=1e-3)
    assert np.ptp(state.first_weights * jnp.exp(state.log_weights)) > 0.1


@pytest.mark.once
def test_aggregators_see_each_reweighted_gradient():
    mean = aggregating.Aggregator(
        init=lambda params: optax.EmptyState(),
        update=lambda gs, state, params=None: (
            jax.tree.map(lambda g: jnp.max(g, axis=0), gs),
            state,
        ),
    )
    optimizer = sg.small_gain(mean, quadratics, every=1, policy="fair")
    x = jnp.array([2.0, 1.0])
    updates, state = jax.jit(optimizer.update)(x, optimizer.init(x), x)
    _, grads = sg.terms(quadratics).value_and_term_grads(x)
    np.testing.assert_allclose(updates, jnp.max(state.weights[:, None] * grads, axis=0), rtol=1e-5)


@pytest.mark.once
def test_any_pytree_of_parameters():
    model = eqx.nn.MLP(2, "scalar", 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        y = jax.vmap(eqx.combine(params, static))(x)
        return {"fit": jnp.mean((y - 1) ** 2), "shape": 1e-3 * jnp.mean((y - 1) ** 4)}

    losses = sg.terms(fn, names=("fit", "shape"))
    optimizer = sg.small_gain(optax.adam(1e-2), losses, every=5, warmup=5, policy="fair")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum(losses.values(p, x)))(params)
        updates, state = optimizer.update(grads, state, params, term_args=(x,))
        return (optax.apply_updates(params, updates), state), state.info.losses[0]

    run = jax.jit(lambda c: jax.lax.scan(step, c, length=100))
    (_, state), fit = run((params, optimizer.init(params)))
    assert fit[-1] < 0.1 * fit[0]
    assert state.info.limit < np.inf


@pytest.mark.once
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped(poison):
    def fn(x, bad):
        return {"a": jnp.sum(x**2), "b": jnp.sum(x**4) + (bad if poison == "loss" else 0)}

    losses = sg.terms(fn, names=("a", "b"))
    optimizer = sg.small_gain(optax.sgd(0.01, 0.9), losses, every=1, policy="fair")
    x = jnp.ones(2)
    update = jax.jit(optimizer.update)
    state = optimizer.init(x)
    _, state = update(jnp.ones(2), state, x, term_args=(jnp.zeros(()),))
    gradient = jnp.full(2, jnp.inf if poison == "gradient" else 1.0)
    updates, after = update(gradient, state, x, term_args=(jnp.asarray(jnp.nan),))
    np.testing.assert_array_equal(updates, 0)
    assert after.info.skipped == 1
    assert not after.info.accepted
    for name in ("count", "weights", "log_weights", "scores", "vectors", "base_state"):
        for a, b in zip(
            jax.tree.leaves(getattr(after, name)),
            jax.tree.leaves(getattr(state, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("base", [optax.sgd(1e-3, momentum=0.9), optax.adam(1e-2)])
def test_weighted_gradients_give_the_run_that_plain_ones_give_one_update_late(base, eps):
    losses = sg.terms(quadratics)
    optimizer = sg.small_gain(base, losses, every=1, warmup=3, policy="fair")
    direct = optax.with_extra_args_support(base)

    def step(carry, _):
        x, state = carry
        values, gradient = losses.value_and_weighted_grad(state.weights, x)
        expected, _ = direct.update(gradient, state.base_state, x)
        updates, after = optimizer.update(gradient, state, x, term_values=values, weighted=True)
        seen = (jnp.max(jnp.abs(updates - after.info.guard * expected)), after.weights)
        return (optax.apply_updates(x, updates), after), seen

    start = (jnp.ones(2), optimizer.init(jnp.ones(2)))
    (x, state), (apart, weights) = jax.jit(lambda c: jax.lax.scan(step, c, length=60))(start)
    # the first gradient that is handed in knows no weights yet
    np.testing.assert_allclose(apart[1:], 0, atol=eps)
    there, plain, history = train(optimizer, quadratics, jnp.ones(2), 60, ("guard", "losses"))
    assert state.info.accepted
    assert np.all(weights[:, 0] > 10 * weights[:, 1])
    # another path through Adam's metric prices the losses a little differently
    np.testing.assert_allclose(state.weights, plain.weights, rtol=0.02)
    np.testing.assert_allclose(x, there, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(state.info.losses, history["losses"][-1], rtol=0.2)


@pytest.mark.parametrize("policy", ["fair", "greedy"])
def test_weighted_and_per_term_gradients_go_together(policy):
    losses = sg.terms(quadratics)
    optimizer = sg.small_gain(optax.sgd(1e-3), losses, every=1, policy=policy)
    x = jnp.array([2.0, 1.0])
    state = optimizer.init(x)._replace(weights=jnp.array([2.0, 0.5]))

    @jax.jit
    def both(x, state):
        values, grads = losses.value_and_term_grads(x)
        told = dict(term_grads=grads, term_values=values)
        plain = optimizer.update(grads.sum(0), state, x, **told)
        mixed = jnp.tensordot(state.weights, grads, 1)
        return plain, optimizer.update(mixed, state, x, **told, weighted=True)

    plain, weighted = both(x, state)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(weighted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_weighted_loss_that_is_not_finite_is_skipped():
    optimizer = sg.small_gain(optax.sgd(0.01), quadratics, policy="fair")
    x = jnp.ones(2)
    for values in ({"term_values": jnp.array([1.0, jnp.nan])}, {"value": jnp.asarray(jnp.inf)}):
        updates, state = optimizer.update(x, optimizer.init(x), x, weighted=True, **values)
        np.testing.assert_array_equal(updates, 0)
        assert state.info.skipped == 1


def test_a_term_without_gradient_has_no_weight():
    def fn(x):
        return {"a": jnp.sum(x**2), "constant": jnp.ones((), x.dtype)}

    _, state, _ = train(
        sg.small_gain(optax.sgd(0.01), fn, every=1, policy="fair"), fn, jnp.ones(2), 30
    )
    assert state.weights[1] == 0
    np.testing.assert_allclose(state.weights[0], 0.5 / 2, rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda x: {}, ValueError, "empty dict"),
        (lambda x: {"a": x}, ValueError, "'a' has shape"),
        (lambda x: {"a": jnp.array(1)}, TypeError, "floating"),
        (lambda x: jnp.sum(x), ValueError, "vector"),
        (lambda x, y: {"a": jnp.sum(x)}, TypeError, "names must be given"),
        (3.0, TypeError, "terms must be"),
    ],
)
def test_bad_losses_are_named(fn, error, message):
    with pytest.raises(error, match=message):
        sg.small_gain(optax.sgd(0.1), fn, policy="fair").init(jnp.ones(2))


@pytest.mark.once
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "other"}, "policy"),
        ({"value": "peek"}, "value"),
        ({"guard": -1.0}, "guard"),
        ({"limit": -1.0}, "limit"),
        ({"max_gain": 0.0}, "max_gain"),
        ({"guard": "measured"}, "guard"),
        ({"curvature": "other"}, "curvature"),
        ({"every": 0}, "every"),
        ({"iterations": 0}, "iterations"),
        ({"priorities": (1.0, -1.0)}, "priorities"),
        ({"policy": "fair", "priorities": {"soft": -1.0}}, r"priorities\['soft'\]"),
        ({"policy": "fair", "priorities": lambda _: {"soft": -1.0}}, r"priorities\['soft'\]"),
        ({"floor": 2.0, "ceiling": 1.0}, "floor"),
        ({"target": 2.0}, "target"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        sg.small_gain(optax.sgd(0.1), quadratics, **settings)


@pytest.mark.parametrize(
    ("priorities", "message"),
    [((1.0,), "1 entries for 2 losses"), ({"soft": 1.0, "hard": 2.0}, "'hard'.*'soft', 'stiff'")],
)
def test_priorities_must_fit_the_losses(priorities, message):
    optimizer = sg.small_gain(optax.sgd(0.1), quadratics, policy="fair", priorities=priorities)
    with pytest.raises(ValueError, match=message):
        optimizer.init(jnp.ones(2))


@pytest.mark.once
def test_bad_calls_are_named():
    optimizer = sg.small_gain(optax.sgd(0.1), quadratics, policy="fair")
    x = jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(x, state)
    with pytest.raises(TypeError, match="term_args must be a tuple"):
        optimizer.update(x, state, x, term_args=x)
    with pytest.raises(ValueError, match="term_grads"):
        optimizer.update(x, state, x, term_grads=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"term_values has shape \(3,\), expected \(2,\)"):
        optimizer.update(x, state, x, term_values=jnp.ones(3), weighted=True)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\)"):
        sg.terms(quadratics).value_and_weighted_grad(jnp.ones(3), x)
    with pytest.raises(TypeError, match="params is complex"):
        optimizer.init(jnp.ones(2, jnp.complex64))
    coarse = sg.small_gain(optax.sgd(0.1), quadratics, curvature="difference", policy="fair")
    half = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(TypeError, match="params is bfloat16"):
        coarse.update(half, coarse.init(half), half)
    with pytest.raises(TypeError, match="params is complex"):
        sg.sharpness(sg.terms(quadratics), jnp.ones(2, jnp.complex64))
    with pytest.raises(TypeError, match="params is int32"):
        sg.terms(quadratics).value_and_term_grads(jnp.ones(2, jnp.int32))


@pytest.mark.once
def test_weights_survive_a_restart_and_a_switch_of_optimizer(tmp_path):
    first = sg.small_gain(optax.sgd(1e-3), quadratics, every=1, policy="fair")
    x, state, _ = train(first, quadratics, jnp.ones(2), 20)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", state)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", first.init(x))
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    second = sg.small_gain(optax.adam(1e-3), quadratics, every=1, policy="fair")
    moved = second.init(x)._replace(
        weights=loaded.weights,
        first_weights=loaded.first_weights,
        log_weights=loaded.log_weights,
    )
    gradient = jax.grad(total(quadratics))(x)
    updates, moved = jax.jit(second.update)(gradient, moved, x)
    np.testing.assert_array_equal(moved.weights, state.weights)
    assert np.all(np.isfinite(updates))


@pytest.mark.once
def test_the_price_of_a_loss_beside_a_stiffer_one_is_seen_without_a_vector_of_its_own():
    """The vector of the sum is orthogonal to all that the softer loss bends."""
    stiff, soft = jnp.array([100.0, 90, 0, 0, 0]), jnp.array([0.0, 0, 3, 2, 1])
    losses = sg.terms(lambda x: {"stiff": stiff @ x**2 / 2, "soft": soft @ x**2 / 2})
    optimizer = sg.small_gain(optax.sgd(1e-3), losses)
    x = jnp.ones(5)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(lambda x: losses.values(x).sum())(x), state, x)
        return (optax.apply_updates(x, updates), state), state.info.cost[:, 0]

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2000)[1])
    cost = run((x, optimizer.init(x)))[-1]
    np.testing.assert_allclose(cost, [100, 3], rtol=0.1)


def priced_in(metric, losses, **settings):
    """Fair shares of losses that stay where they are, in a metric of the caller's."""
    settings |= {"policy": "fair", "every": 1, "warmup": 0, "metric": metric, "limit": 1.0}
    return sg.small_gain(optax.sgd(0.0), losses, **settings)


def test_a_metric_may_be_no_diagonal():
    """Kronecker factors as in Shampoo: prices are eigenvalues of P^{-1/2} H_k P^{-1/2}."""
    rng = np.random.default_rng(3)
    spd = [rng.normal(size=(n, n)) for n in (3, 2)]
    left, right = (a @ a.T + np.eye(len(a)) for a in spd)
    roots = [scipy.linalg.inv(scipy.linalg.sqrtm(a)).real for a in (left, right)]
    hessians = {name: (lambda a: a @ a.T)(rng.normal(size=(6, 6))) for name in ("a", "b")}

    @exact
    def losses(p):
        flat = p["w"].reshape(-1)
        return {
            name: 0.5 * flat @ jnp.asarray(h, flat.dtype) @ flat for name, h in hessians.items()
        }

    @exact
    def applied(v):
        low, high = (jnp.asarray(r, v["w"].dtype) for r in roots)
        return {"w": low @ v["w"] @ high}

    root = np.kron(*roots)
    tops = [np.linalg.eigvalsh(root @ h @ root)[-1] for h in hessians.values()]
    optimizer = priced_in(lambda state, params: applied, losses, iterations=40)
    params = {"w": jnp.ones((3, 2))}
    state, update = optimizer.init(params), jit_well(optimizer.update)
    gradient = jax.grad(lambda p: sum(losses(p).values()))(params)
    for _ in range(60):
        _, state = update(gradient, state, params)
    shared = state.weights * jnp.asarray(tops)
    np.testing.assert_allclose(shared / shared.sum(), [0.5, 0.5], atol=1e-2)
    np.testing.assert_allclose(state.info.share, [0.5, 0.5], atol=1e-2)


def test_a_metric_shaped_like_a_model_that_can_be_called_is_a_diagonal():
    model = eqx.nn.Linear(2, 1, key=jax.random.key(0))

    def losses(m):
        return {"a": jnp.sum(m.weight**2), "b": 50 * (jnp.sum(m.weight**2) + jnp.sum(m.bias**2))}

    optimizer = priced_in(
        lambda state, params: jax.tree.map(lambda p: 4 * jnp.ones_like(p), params), losses
    )
    state = optimizer.init(model)
    gradient = jax.grad(lambda m: sum(losses(m).values()))(model)
    for _ in range(3):
        _, state = optimizer.update(gradient, state, model)
    np.testing.assert_allclose(state.info.cost[:, 0], [0.5, 25.0], rtol=1e-3)


@pytest.mark.once
def test_an_argument_of_nearly_our_name_is_refused():
    optimizer = sg.small_gain(optax.sgd(0.1), quadratics)
    state = optimizer.init(jnp.ones(2))
    with pytest.raises(TypeError, match="did you mean term_args"):
        optimizer.update(jnp.ones(2), state, jnp.ones(2), term_arg=())
    optimizer.update(jnp.ones(2), state, jnp.ones(2), values=1.0)  # some base optimizer's


@pytest.mark.once
def test_warnings_point_at_the_line_of_the_caller():
    losses = sg.terms(lambda p, x: {"a": jnp.sum((p - x) ** 2)}, names=("a",))
    optimizer, params = sg.small_gain(optax.sgd(0.1), losses), jnp.ones(2)
    state = optimizer.init(params)
    with pytest.warns(UserWarning, match="term_args") as told:
        jax.jit(lambda p: optimizer.update(p, state, p))(params)
    assert told[0].filename == __file__
