"""Factors of losses, which are units, change nothing under fair shares; what does is written."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.losses.policies import decide
from smallgain_jax.losses.prices import known_prices
from smallgain_jax.losses.state import Settings
from smallgain_jax.losses.units import plain_weight

X = np.linspace(-1, 1, 16)[:, None]


def network_losses(params, factors):
    """A fit, a stiff one on few points, and a small one of a single layer, times factors [3]."""
    dtype = params["in"].dtype
    y = jnp.tanh(jnp.asarray(X, dtype) @ params["in"]) @ params["out"]
    factors = factors.astype(dtype)
    return {
        "fit": factors[0] * jnp.mean((y - jnp.asarray(np.sin(3 * X[:, 0]), dtype)) ** 2),
        "stiff": factors[1] * 50 * jnp.mean(y[:4] ** 2),
        "size": factors[2] * 1e-2 * jnp.sum(params["in"] ** 2),
    }


def trained(optimizer, fn, params, batches):
    """Parameters and state after an update for each batch, a tuple, by the plain sum's gradient."""

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: sum(fn(p, *batch).values()))(params)
        updates, state = optimizer.update(gradient, state, params, term_args=batch)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0]


START = {
    "in": np.linspace(-1, 1, 6, dtype=np.float32)[None, :],
    "out": np.linspace(-0.5, 1, 6, dtype=np.float32),
}
LOSSES = sg.terms(network_losses, names=("fit", "stiff", "size"))
BASES = {
    "adam": lambda: optax.adam(1e-2),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
}


@lru_cache
def training(base, weighted, x64):
    """A compiled run of 60 updates: factors [3] -> parameters, weights times factors, shares."""
    del x64
    optimizer = sg.small_gain(BASES[base](), LOSSES, policy="fair", warmup=20, every=4)

    def step(factors, carry, _):
        params, state = carry
        given = {"term_args": (factors,)}
        if weighted:
            values, gradient = LOSSES.value_and_weighted_grad(state.weights, params, factors)
            given |= {"term_values": values, "weighted": True}
        else:
            gradient = jax.grad(lambda p: LOSSES.values(p, factors).sum())(params)
        updates, state = optimizer.update(gradient, state, params, **given)
        return (optax.apply_updates(params, updates), state), None

    def run(factors):
        params = jax.tree.map(jnp.asarray, START)
        start = params, optimizer.init(params)
        (params, state), _ = jax.lax.scan(partial(step, factors), start, length=60)
        return params, state.weights * factors, state.info.share

    return jax.jit(run)


FACTORS = [
    2.0 ** np.array([10, -20, 5]),
    2.0 ** np.array([80, -80, 0]),
    2.0 ** np.array([-82, -82, -82]),
    2.0 ** np.array([82, 82, 82]),
]


@pytest.mark.filterwarnings("ignore:base_optimizer")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_factors_change_nothing(base, weighted, x64):
    run = training(base, weighted, x64)
    plain = run(jnp.ones(3, jnp.float32))
    assert np.ptp(plain[1]) > 1
    for factors in FACTORS:
        found = run(jnp.asarray(factors, jnp.float32))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(a, b)
    for factors in ([1e-25, 1e25, 1.0], [1e25] * 3, [1e-25] * 3, [1e3, 1e-3, 30.0]):
        found = run(jnp.asarray(factors, jnp.float32))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def quadratics(x):
    return {"soft": jnp.sum(x**2), "stiff": 50 * jnp.sum((x - 1) ** 2)}


def first_update(base, losses, x, **settings):
    optimizer = sg.small_gain(base, losses, policy="fair", **settings)
    gradient = jax.grad(lambda x: sum(losses(x).values()))(x)
    return jax.jit(optimizer.update)(gradient, optimizer.init(x), x)


@pytest.mark.parametrize("priorities", [None, (3.0, 1.0)])
def test_gradient_descent_has_a_total_cost_of_one(priorities):
    """Curvatures 2 and 100: weights p_k / lambda_k from the first update on, stable below 2."""
    parts = np.array([0.5, 0.5] if priorities is None else [0.75, 0.25])
    updates, state = first_update(optax.sgd(1.0), quadratics, jnp.ones(3), priorities=priorities)
    np.testing.assert_allclose(state.weights, parts / [2, 100], rtol=1e-4)
    np.testing.assert_allclose(state.info.share, parts, rtol=1e-4)
    np.testing.assert_allclose(state.info.sharpness_ratio, 1 / 2, rtol=1e-3)
    # one Newton step of the weighted sum: its minimum is the mean by the parts
    np.testing.assert_allclose(1 + updates, parts[1], rtol=1e-3)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:base_optimizer")
def test_whom_no_factor_moves_gets_entries_of_one():
    """The identity hands on what it is given: a gradient of 1 in the root mean square."""
    start = jnp.array([1.0, 2.0, 5.0])
    gradient, state = first_update(optax.identity(), quadratics, start)
    np.testing.assert_allclose(np.mean(gradient**2), 1, rtol=1e-5)
    np.testing.assert_allclose(state.weights[0] / state.weights[1], 50, rtol=1e-4)
    expected = 2 * start / 2 + 100 * (start - 1) / 100
    np.testing.assert_allclose(gradient, expected / np.sqrt(np.mean(expected**2)), rtol=1e-4)


@pytest.mark.once
def test_a_loss_that_does_not_bend_is_weighed_by_its_slope():
    slope = jnp.array([3.0, 4.0])
    losses = lambda x: {"bowl": jnp.sum((x - 1) ** 2), "line": 1e6 * slope @ x}
    _, state = first_update(optax.sgd(0.1), losses, jnp.array([1.0, 2.0]))
    # lambda = 2 of priority 1/2; its weighted gradient has length 2 / 4, the line's 5e6
    np.testing.assert_allclose(state.weights, [1 / 4, 0.5 / 5e6], rtol=1e-4)


@pytest.mark.once
@pytest.mark.parametrize("base", ["adam", "sgd"])
def test_a_loss_that_comes_later_is_weighed_then(base):
    """Each batch holds one of two tasks; their factors do not matter either."""
    optimizer = sg.small_gain(
        BASES[base](),
        sg.terms(
            lambda x, on: {
                "a": on[0] * jnp.sum((x - 1) ** 2),
                "b": on[1] * 50 * jnp.sum((x - 2) ** 2),
            },
            names=("a", "b"),
        ),
        policy="fair",
        warmup=10,
    )

    @jax.jit
    def run(factors):
        def step(carry, i):
            x, state = carry
            on = jnp.where(i % 2 == jnp.arange(2), factors, 0)
            gradient = jax.grad(
                lambda x: on[0] * jnp.sum((x - 1) ** 2) + 50 * on[1] * jnp.sum((x - 2) ** 2)
            )(x)
            updates, state = optimizer.update(gradient, state, x, term_args=(on,))
            return (optax.apply_updates(x, updates), state), state.first_weights

        start = jnp.zeros(3), optimizer.init(jnp.zeros(3))
        (x, state), first = jax.lax.scan(step, start, jnp.arange(400))
        return x, state.weights * factors, first[5] * factors

    plain = run(jnp.ones(2))
    assert np.all(plain[1] > 0)
    assert np.all(plain[2] > 0), "known within a few batches"
    assert np.all((plain[0] > 1) & (plain[0] < 2))
    for factors in ([2.0**30, 2.0**-40], [2.0**-60, 2.0**-60]):
        for a, b in zip(run(jnp.asarray(factors)), plain, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_the_plain_sum_at_the_scale_of_fair_shares():
    settings = Settings(*(None,) * len(Settings._fields))
    fair = settings._replace(policy="fair")
    # costs p / w = 1/3 and 6.67e-1 ... in all what the parts add up to
    first = jnp.array([1.5, 0.005])
    np.testing.assert_allclose(plain_weight(fair, first), 1 / (0.5 / 1.5 + 0.5 / 0.005), rtol=1e-6)
    np.testing.assert_allclose(plain_weight(fair, jnp.array([2.0, 0.0])), 2, rtol=1e-6)
    assert plain_weight(fair, jnp.zeros(2)) == 1
    assert plain_weight(settings._replace(policy="greedy"), first) == 1


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("scale_free", [True, False])
def test_a_share_that_hardly_answers_keeps_its_weight(scale_free, known, eps):
    """Shares s_k = a_k w_k^r_k: they become equal; one with r = 0.01 has no say and no part."""
    answers, sizes = np.array([0.05, 0.6, 1.0, 0.01]), np.array([1.0, 3.0, 2.0, 50.0])
    blank = Settings(*(None,) * len(Settings._fields))
    settings = blank._replace(policy="fair", floor=1e-4, ceiling=1e4, ema=0.1, rounds=8)
    settings = settings._replace(target=0.9)
    start = sg.small_gain(
        optax.adam(1e-3), sg.terms(lambda x: dict.fromkeys("abcd", jnp.sum(x**2)))
    ).init(jnp.ones(2))
    # who feels whom: nobody feels the last
    felt = np.random.default_rng(0).uniform(0.1, 1, (4, 4)) * [1, 1, 1, 0]
    prices = known_prices(start)._replace(
        response=jnp.asarray(answers, start.weights.dtype),
        felt=jnp.asarray(felt, start.weights.dtype) if known else None,
    )
    start = start._replace(first_weights=jnp.ones(4))

    @jax.jit
    def play(state):
        def turn(state, _):
            weights = jnp.exp(state.log_weights)
            cost = (jnp.asarray(sizes) * weights**answers / weights)[:, None]
            cost = cost.astype(weights.dtype)
            moved, _ = decide(settings, scale_free, state, None, prices._replace(cost=cost))
            return state._replace(log_weights=moved), moved

        return jax.lax.scan(turn, state, length=1000)[1]

    logs = np.asarray(play(start), float)
    shares = np.log(sizes) + answers * logs[-1]
    np.testing.assert_array_equal(logs[:, 3], 0)
    if scale_free:
        gap, r = (np.log(sizes.mean()) - np.log(sizes))[:3], answers[:3]
        level = (gap / r).sum() / (1 / r).sum()
        if known:
            # a walk along what is felt, that ends with a chance of 0.02 at each step
            others = felt[:3, :3] * (1 - np.eye(3))
            chain = np.diag(1 - r) + r[:, None] * others / others.sum(axis=1, keepdims=True)
            level, reached = np.zeros(3), gap
            for _ in range(2000):
                level, reached = level + 0.02 * reached, 0.98 * chain @ reached
        np.testing.assert_allclose(logs[0, :3], 0.1 * r * (gap - level), rtol=1e-3, atol=4 * eps)
        np.testing.assert_allclose(shares[:3], shares[0], atol=1e-3)
        assert np.abs(logs[:, 0]).max() < 0.1
    else:
        # a common factor is felt: the total is kept, and the rigid weight climbs, slowly
        assert logs[-1, 0] > 3


def beside_its_own(power):
    """A program: 400 updates of two losses of a network, and of one of parameters of its own."""

    def losses(params, index):
        parts = network_losses(params["network"], jnp.ones(3))
        own = jnp.sum(params["own"] ** power)
        return {"fit": parts["fit"], "stiff": parts["stiff"], "own": own}

    terms = sg.terms(losses, names=("fit", "stiff", "own"))
    optimizer = sg.small_gain(optax.adam(1e-3), terms, policy="fair")
    keys = jax.random.split(jax.random.key(0))
    network = {"in": jax.random.normal(keys[0], (1, 8)), "out": jax.random.normal(keys[1], (8,))}
    index = (jnp.arange(400.0),)
    return jax.jit(lambda own: trained(optimizer, losses, {"network": network, "own": own}, index))


@pytest.mark.once
def test_a_loss_with_parameters_of_its_own_moves_no_other():
    """Its share answers to nothing, and is nobody's aim, however far from its optimum it starts."""
    run = beside_its_own(4)
    near, far = run(jnp.array([2.0, -3.0])), run(jnp.array([200.0, -300.0]))
    networks = [jax.tree.leaves(params["network"]) for params, _ in (near, far)]
    for one, other in zip(*networks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for _, state in (near, far):
        moved = state.weights / state.first_weights
        assert moved[2] == 1
        assert np.abs(np.log(moved)).max() < np.log(10)


BY_METRIC = {
    "no known limit": lambda: (optax.lion(1e-4), {"limit": 1e6}),
    "a map": lambda: (optax.adam(1e-4), {"metric": lambda state, params: lambda v: v}),
    "adam": lambda: (optax.adam(1e-4), {}),
}


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:base_optimizer")
@pytest.mark.parametrize("kind", BY_METRIC)
@pytest.mark.parametrize("count", [2, 9])
def test_shares_become_equal_in_any_metric(kind, count):
    """Bends that change after the first batch: weights follow, few losses or many."""

    def losses(x, late):
        bends = 1 + late * 10 * jnp.arange(count)
        wave = jnp.sum((x[None, :] - jnp.arange(count)[:, None] / count) ** 2, axis=1)
        return {f"{k}": bends[k] * wave[k] for k in range(count)}

    base, settings = BY_METRIC[kind]()
    names = [f"{k}" for k in range(count)]
    optimizer = sg.small_gain(
        base, sg.terms(losses, names=names), policy="fair", warmup=2, every=1, **settings
    )

    late = jnp.minimum(jnp.arange(800.0), 1)
    _, state = jax.jit(lambda x: trained(optimizer, losses, x, (late,)))(3 * jnp.ones(4))
    np.testing.assert_allclose(state.info.share, 1 / count, rtol=0.1)
    assert np.ptp(np.log(state.weights / state.first_weights)) > 1


@pytest.mark.once
@pytest.mark.parametrize("rate", [0.5, 5.0, 500.0])
def test_shares_cost_no_more_than_gradient_descent_is_stable_at(rate):
    optimizer = sg.small_gain(optax.sgd(rate), quadratics, policy="fair", every=1, guard=None)
    x = jnp.ones(3)
    state = optimizer.init(x)
    step = sg.train_step(quadratics, optimizer)
    for _ in range(200):
        x, state, _ = step(x, state)
    total = np.vdot(state.weights, state.info.cost[:, 0])
    np.testing.assert_allclose(total, min(1, 0.9 * 2 / rate), rtol=1e-2)
    np.testing.assert_allclose(x, 0.5, atol=1e-3)


@pytest.mark.once
def test_a_loss_that_is_small_at_first_does_not_keep_the_say():
    """A ramp begins at 2e-6 of its loss, whose first weight is for that: shares become equal."""

    def net(params, x):
        return jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"]

    def losses(params, x, ramp):
        wave = net(params, x[:, None])
        late = jnp.mean((wave - jnp.sin(3 * x + 0.5)) ** 2)
        return {"fit": jnp.mean((wave - jnp.sin(3 * x)) ** 2), "late": ramp * late}

    terms = sg.terms(losses, names=("fit", "late"))
    optimizer = sg.small_gain(optax.adam(1e-3), terms, policy="fair")
    keys = jax.random.split(jax.random.key(0))
    inner, outer = jax.random.normal(keys[0], (1, 32)), jax.random.normal(keys[1], (32,))
    params = {"in": inner, "bias": jnp.zeros(32), "out": 0.05 * outer}

    @jax.jit
    def run(params):
        def step(carry, index):
            params, state = carry
            ramp = (1 - jnp.cos(jnp.pi * jnp.minimum(index / 1000, 1))) / 2
            x = jax.random.uniform(jax.random.key(index), (64,), minval=-1.0)
            args = (x, ramp)
            values, grads = terms.value_and_weighted_grad(state.weights, params, *args)
            updates, state = optimizer.update(
                grads, state, params, term_args=args, term_values=values, weighted=True
            )
            return (optax.apply_updates(params, updates), state), values

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(3000))

    (_, state), values = run(params)
    assert state.first_weights[1] > 1e4 * state.first_weights[0]
    np.testing.assert_allclose(state.info.share, 0.5, atol=0.2)
    # half way between two curves that differ by a phase of 0.5 both losses are near 0.03
    np.testing.assert_allclose(np.asarray(values[-300:]).mean(axis=0), 0.03, atol=0.006)


@pytest.mark.once
def test_a_loss_at_its_optimum_from_the_start_moves_no_other():
    """Its second moments are 0, its price that over eps: shares would raise all others to it."""
    _, state = beside_its_own(2)(jnp.zeros(2))
    moved = state.weights / state.first_weights
    assert state.info.response[2] == 0
    assert moved[2] == 1
    assert np.abs(np.log(moved)).max() < np.log(10)


@pytest.mark.x64
def test_a_response_is_the_derivative_of_a_share():
    """d log(w_k lambda_k) / d log w_k by differences, P the size of the weighted gradient."""
    rng = np.random.default_rng(3)
    roots = rng.standard_normal((2, 5, 5))
    bends = roots @ np.swapaxes(roots, 1, 2)
    # of one sign, so that no part of phi is clipped
    at, slopes = rng.standard_normal(5), rng.uniform(0.1, 2, (2, 5))
    centres = at - np.linalg.solve(bends, slopes[:, :, None])[:, :, 0]

    def losses(x, index):
        parts = [(x - c) @ jnp.asarray(h) @ (x - c) / 2 for c, h in zip(centres, bends)]
        return dict(zip("ab", parts))

    # of a gradient that stays, Adam's metric is the size; the parameters hardly move
    base = optax.adam(1e-9, b1=0.0, b2=0.5, eps=1e-12)
    settings = {"policy": "fair", "warmup": 0, "every": 1, "iterations": 400, "ema": 1e-9}
    optimizer = sg.small_gain(base, sg.terms(losses, names=("a", "b")), guard=None, **settings)

    index = (jnp.arange(60),)
    _, state = jax.jit(lambda x: trained(optimizer, losses, x, index))(jnp.asarray(at))
    weights = np.asarray(state.weights, float)

    def share(k, logs):
        scale = np.abs(np.exp(logs) @ slopes) ** -0.5
        return logs[k] + np.log(np.linalg.eigvalsh(scale[:, None] * bends[k] * scale)[-1])

    for k in range(2):
        h = 1e-5 * np.eye(2)[k]
        logs = np.log(weights)
        expected = (share(k, logs + h) - share(k, logs - h)) / 2e-5
        np.testing.assert_allclose(state.info.response[k], np.clip(expected, 0, 1), atol=1e-3)
        cost = np.exp(share(k, logs) - logs[k])
        np.testing.assert_allclose(state.info.cost[k, 0], cost, rtol=1e-3)
