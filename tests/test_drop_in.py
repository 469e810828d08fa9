"""`small_gain` in anybody's loop: whatever stands before it, inside it, after it, around it."""

import functools
import warnings
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.losses.watch import STRIKES, at_anchor

RATE = 1e-2


def soft_and_stiff(x):
    return {"soft": jnp.sum((x - 1) ** 2), "stiff": 50 * jnp.sum(x**2)}


INPUTS = np.random.default_rng(0).normal(size=(32, 3))
TARGETS = np.stack([np.sin(INPUTS.sum(1)), 0.1 * INPUTS[:, 0]], axis=1)


def two_heads(params):
    """A small network with a head of its own for each of two losses."""
    x = jnp.asarray(INPUTS, params["w"].dtype)
    y = jnp.asarray(TARGETS, params["w"].dtype)
    out = jnp.tanh(x @ params["w"]) @ params["heads"] - y
    return {"first": jnp.mean(out[:, 0] ** 2), "second": 30 * jnp.mean(out[:, 1] ** 2)}


def network():
    rng = np.random.default_rng(1)
    return {
        "w": jnp.asarray(0.5 * rng.normal(size=(3, 16)), float),
        "heads": jnp.asarray(0.3 * rng.normal(size=(16, 2)), float),
    }


PROBLEMS = {"quadratics": (soft_and_stiff, lambda: jnp.ones(3)), "network": (two_heads, network)}


def total(fn, x):
    return sum(fn(x).values())


def train(optimizer, fn, x, steps, of=lambda g: g):
    """Parameters and state after training on `of` the gradient of the plain sum."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        x, state = carry
        value, gradient = jax.value_and_grad(lambda x: total(fn, x))(x)
        updates, state = optimizer.update(
            of(gradient), state, x, value=value, grad=gradient, value_fn=lambda x: total(fn, x)
        )
        return (optax.apply_updates(x, updates), state), None

    start = (x, optimizer.init(x))
    return jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0])(start)


BEFORE = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "clip": lambda: optax.clip(0.01),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.1),
    "normalize": optax.normalize_by_update_norm,
    "mean": lambda: optax.scale(0.5),
    "trace": lambda: optax.trace(0.9),
    "centralize": optax.centralize,
    "decay": lambda: optax.add_decayed_weights(1e-3),
    "scale_by_adam": optax.scale_by_adam,
    "zero_nans": optax.zero_nans,
}


@pytest.mark.once
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("before", BEFORE)
def test_the_default_behind_anything_is_the_plain_chain(problem, before):
    """Side by side on one path: apart, clipped signs would make rounding grow into another path."""
    fn, start = PROBLEMS[problem]
    plain = optax.chain(BEFORE[before](), optax.adam(RATE))
    ours = optax.chain(BEFORE[before](), sg.small_gain(optax.adam(RATE), fn))

    def step(carry, _):
        x, state, state_ours = carry
        gradient = jax.grad(lambda x: total(fn, x))(x)
        wanted, state = plain.update(gradient, state, x)
        found, state_ours = ours.update(gradient, state_ours, x)
        return (optax.apply_updates(x, found), state, state_ours), (wanted, found)

    x = start()
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200)[1])
    wanted, found = run((x, plain.init(x), ours.init(x)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * RATE), found, wanted
    )


@functools.cache
def inside(problem):
    """The plain sum after fair shares with nothing around them."""
    fn, start = PROBLEMS[problem]
    optimizer = sg.small_gain(optax.adam(RATE / 5), fn, policy="fair", warmup=10)
    return float(total(fn, train(optimizer, fn, start(), 1500)[0]))


@pytest.mark.once
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("before", BEFORE)
def test_fair_shares_behind_anything_descend(problem, before):
    """By its own objective, the weighted sum, and as far as the same chain put inside."""
    fn, start = PROBLEMS[problem]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        base = optax.adam(RATE / 5)  # at the full rate momentum before Adam never settles
        behind = sg.small_gain(base, fn, policy="fair", warmup=10)
        x, state = train(optax.chain(BEFORE[before](), behind), fn, start(), 1500)
        jax.effects_barrier()
    state = state[1]
    weights = state.weights
    here, there = (weights @ jnp.stack(list(fn(at).values())) for at in (x, start()))
    assert here < there
    plain, _ = train(optax.chain(BEFORE[before](), base), fn, start(), 1500)
    # what cannot be reweighted is the plain chain's, what can be is that of fair shares
    assert total(fn, x) <= 1.1 * max(inside(problem), total(fn, plain)) + 1e-6


@pytest.mark.once
def test_a_common_factor_is_taken_over_and_foreign_updates_are_reported():
    def after(of, steps=1500):
        optimizer = sg.small_gain(optax.sgd(0.1), soft_and_stiff, policy="fair")
        x, state = train(optimizer, soft_and_stiff, jnp.ones(2), steps, of)
        jax.effects_barrier()
        return x, state

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain, _ = after(lambda g: g)
        half, state = after(lambda g: 0.5 * g, 3000)
    np.testing.assert_allclose(half, plain, rtol=1e-3)
    np.testing.assert_allclose(state.weights, [1 / 4, 1 / 200], rtol=1e-2)
    np.testing.assert_allclose(state.info.fit, 1, rtol=1e-5)
    with pytest.warns(UserWarning, match=r"no multiple of the gradient.*inside"):
        x, state = after(lambda g: g + jnp.array([5.0, -5.0]))
    assert state.info.fit < 0.9
    # left as it is but for a common factor: the minimum of what was handed in
    np.testing.assert_allclose(state.weights, 1 / 102, rtol=1e-2)
    np.testing.assert_allclose(x, [-3 / 102, 7 / 102], atol=1e-4)


@pytest.mark.once
def test_frozen_leaves_stay_frozen():
    fn, start = PROBLEMS["network"]
    frozen = lambda g: {**g, "w": jnp.zeros_like(g["w"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer = sg.small_gain(optax.adam(RATE), fn, policy="fair", warmup=5)
        x, _ = train(optimizer, fn, start(), 100, frozen)
        jax.effects_barrier()
    np.testing.assert_array_equal(x["w"], start()["w"])
    assert np.any(np.asarray(x["heads"] != start()["heads"]))


@pytest.mark.once
@pytest.mark.parametrize("policy", ["reference", "fair"])
def test_a_loss_at_its_minimum_does_not_stop_training(policy):
    def fn(p):
        return {"fit": jnp.sum((p["a"] - 3) ** 2), "l2": 1e-2 * jnp.sum(p["b"] ** 2)}

    start = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    x, state = train(sg.small_gain(optax.adam(RATE), fn, policy=policy), fn, start, 2000)
    assert total(fn, x) < 1e-2
    assert np.all(np.abs(state.log_weights) < np.log(3))


@pytest.mark.once
def test_shares_that_do_not_answer_do_not_wind_up():
    """Disjoint parameters under Adam, one loss noisier: no weight changes any share."""

    def fn(p, z):
        near, far = 0.1 * z[0].astype(p["a"].dtype), 3 * z[1].astype(p["a"].dtype)
        return {
            "a": 0.5 * jnp.mean(jnp.sum((p["a"] - near) ** 2, axis=-1)),
            "b": 0.5 * jnp.mean(jnp.sum((p["b"] - far) ** 2, axis=-1)),
        }

    losses = sg.terms(lambda p, z: fn({k: v[None] for k, v in p.items()}, z), names=("a", "b"))
    optimizer = sg.small_gain(optax.adam(RATE), losses, policy="fair")
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}

    def step(carry, key):
        params, state = carry
        z = jax.random.normal(key, (2, 16, 4))
        gradient = jax.grad(lambda p: losses.values(p, z).sum())(params)
        updates, state = optimizer.update(gradient, state, params, term_args=(z,))
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 8000)
    run = jax.jit(lambda c: jax.lax.scan(step, c, keys)[0])
    _, state = run((params, optimizer.init(params)))
    assert np.max(state.weights) < 3 * np.min(state.weights)
    np.testing.assert_allclose(state.info.response, 0, atol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("policy", ["reference", "fair"])
def test_constants_change_nothing(policy):
    def trained(c):
        def fn(p):
            fit = jnp.mean(
                (jnp.asarray(INPUTS, p.dtype) @ p - jnp.asarray(TARGETS[:, 0], p.dtype)) ** 2
            )
            return {"fit": fit + c, "l2": 0.1 * jnp.sum(p**2)}

        x, state = train(sg.small_gain(optax.adam(RATE), fn, policy=policy), fn, jnp.ones(3), 1500)
        return x, state.weights, state.info.rewinds

    x, weights, rewinds = jax.lax.map(trained, jnp.array([0.0, 10.0, 1e3, -1e3]))
    np.testing.assert_allclose(x, jnp.broadcast_to(x[0], x.shape), atol=1e-4)
    np.testing.assert_allclose(weights, jnp.broadcast_to(weights[0], weights.shape), rtol=1e-3)
    assert not np.any(rewinds)


@pytest.mark.once
def test_a_loss_that_is_switched_on_later_is_no_alarm():
    losses = sg.terms(
        lambda x, on: {"a": jnp.sum((x - 1) ** 2), "b": on * (5 + jnp.sum(x**2))}, names=("a", "b")
    )
    optimizer = sg.small_gain(optax.adam(RATE), losses)

    def step(carry, on):
        x, state = carry
        gradient = jax.grad(lambda x: losses.values(x, on).sum())(x)
        updates, state = optimizer.update(gradient, state, x, term_args=(on,))
        return (optax.apply_updates(x, updates), state), None

    on = jnp.asarray(np.arange(3000) > 1500, float)
    run = jax.jit(lambda c: jax.lax.scan(step, c, on)[0])
    x, state = run((jnp.zeros(2), optimizer.init(jnp.zeros(2))))
    assert state.info.rewinds == 0
    np.testing.assert_allclose(x, 0.5, atol=1e-2)


TOP = 2 * np.linalg.eigvalsh(INPUTS.T @ INPUTS / len(INPUTS))[-1] + 0.2
BASES = {
    "sgd": (lambda rate: optax.sgd(rate), 2 / TOP),
    "heavy ball": (lambda rate: optax.sgd(rate, 0.9), 3.8 / TOP),
    "nesterov": (lambda rate: optax.sgd(rate, 0.9, nesterov=True), 3.8 / 2.8 / TOP),
    "adam": (optax.adam, 0.3),
    "lion": (optax.lion, 0.03),
}


@pytest.mark.once
@pytest.mark.parametrize("base", BASES)
def test_no_rate_diverges(base):
    make, rate = BASES[base]

    def fn(p):
        x, y = jnp.asarray(INPUTS, p.dtype), jnp.asarray(10 * TARGETS[:, 0], p.dtype)
        return {"fit": jnp.mean((x @ p - y) ** 2), "l2": 0.1 * jnp.sum(p**2)}

    def final(times):
        return total(fn, train(sg.small_gain(make(times * rate), fn), fn, jnp.zeros(3), 1000)[0])

    found = jax.lax.map(final, jnp.array([1.02, 3, 10, 100]))
    assert np.all(found <= total(fn, jnp.zeros(3)))


@pytest.mark.once
def test_one_task_a_batch_is_measured_all_the_same():
    """Measuring at fixed multiples must not alias with the data: each task is seen in its turn."""
    losses = sg.terms(
        lambda x, on: {"soft": on[0] * jnp.sum((x - 1) ** 2), "stiff": on[1] * 50 * jnp.sum(x**2)},
        names=("soft", "stiff"),
    )
    optimizer = sg.small_gain(optax.sgd(0.5), losses, policy="fair")

    def step(carry, i):
        x, state = carry
        on = jnp.where(i % 2 == jnp.arange(2), 1.0, 0.0)
        gradient = jax.grad(lambda x: losses.values(x, on).sum())(x)
        updates, state = optimizer.update(gradient, state, x, term_args=(on,))
        return (optax.apply_updates(x, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(2000))[0])
    x, state = run((jnp.ones(2), optimizer.init(jnp.ones(2))))
    np.testing.assert_allclose(state.info.cost[:, 0], [2, 100], rtol=1e-3)
    np.testing.assert_allclose(state.weights, [1 / 4, 1 / 200], rtol=0.02)
    assert np.all(np.abs(x) < 2)


@pytest.mark.once
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_curvatures_of_any_size_are_seen(scale):
    def fn(x):
        return {"a": jnp.sum(x**2), "b": scale * jnp.sum(x**2)}

    optimizer = sg.small_gain(optax.sgd(0.1 / max(scale, 1)), fn, policy="fair")
    x, state = train(optimizer, fn, jnp.ones(3), 30)
    np.testing.assert_allclose(state.info.cost[:, 0], [2, 2 * scale], rtol=1e-3)
    assert np.all(np.abs(x) <= 1)


@pytest.mark.once
def test_without_a_batch_it_says_so_and_hands_on():
    losses = sg.terms(
        lambda x, y: {"a": jnp.sum((x - y) ** 2), "b": jnp.sum(x**2)}, names=("a", "b")
    )
    x = jnp.ones(2)
    optimizer = sg.small_gain(optax.sgd(0.1), losses)
    with pytest.warns(UserWarning, match=r"term_args.*'y'.*guards against nothing"):
        updates, _state = optimizer.update(x, optimizer.init(x), x)
    np.testing.assert_allclose(updates, -0.1)
    fair = sg.small_gain(optax.sgd(0.1), losses, policy="fair")
    with pytest.raises(TypeError, match="term_args"):
        fair.update(x, fair.init(x), x)


@pytest.mark.once
def test_masks_and_partitions_around_it():
    fn, start = PROBLEMS["network"]
    params = start()
    for around in (
        lambda inner: optax.chain(
            optax.masked(inner, {"w": True, "heads": False}),
            optax.masked(optax.set_to_zero(), {"w": False, "heads": True}),
        ),
        lambda inner: optax.partition({"a": inner, "b": optax.sgd(RATE)}, {"w": "a", "heads": "b"}),
    ):
        with pytest.warns(UserWarning, match=r"holes.*inside"):
            found, _ = train(around(sg.small_gain(optax.adam(RATE), fn)), fn, params, 50)
        plain, _ = train(around(optax.adam(RATE)), fn, params, 50)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, plain)
        with pytest.raises(TypeError, match="put the mask inside"):
            around(sg.small_gain(optax.adam(RATE), fn, policy="fair")).init(params)


@pytest.mark.once
def test_what_optax_takes_for_parameters():
    fn = lambda p: {"a": (p["x"] - 1) ** 2, "b": p["y"] ** 2}
    floats = {"x": 0.5, "y": 1.0}
    for policy in ("reference", "fair"):
        optimizer = sg.small_gain(optax.adam(RATE), fn, policy=policy)
        state = optimizer.init(floats)
        gradient = jax.grad(lambda p: total(fn, p))(floats)
        updates, _ = optimizer.update(gradient, state, floats)
        np.testing.assert_allclose(updates["x"], RATE, rtol=1e-3)
    for bad in (
        {"x": jax.random.key(0), "y": 1.0},
        {"x": jnp.arange(3), "y": 1.0},
        {"x": jnp.sin, "y": 1.0},
    ):
        with pytest.raises(TypeError, match=r"params\['x'\].*no gradient"):
            sg.small_gain(optax.adam(RATE), fn).init(bad)


@pytest.mark.once
def test_nested_losses_keywords_and_aux():
    def fn(x, *, shift):
        return {"fit": {"near": jnp.sum((x - shift) ** 2)}, "size": jnp.sum(x**2)}, {
            "mean": x.mean()
        }

    losses = sg.terms(fn, names=("fit/near", "size"), has_aux=True)
    optimizer = sg.small_gain(optax.sgd(0.1), losses, policy="fair", every=1)
    step = sg.train_step(losses, optimizer)
    x = jnp.zeros(2)
    state = optimizer.init(x)
    for _ in range(100):
        x, state, metrics = step(x, state, shift=1.0)
    assert set(metrics) == {"fit/near", "size", "total", "aux"}
    np.testing.assert_allclose(x, 0.5, rtol=1e-3)
    np.testing.assert_allclose(metrics["aux"]["mean"], 0.5, rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize(
    "base", [optax.adam(RATE), optax.lbfgs(), optax.chain(optax.clip(1.0), optax.sgd(RATE))]
)
@pytest.mark.parametrize("policy", [None, "reference", "fair", "greedy"])
def test_one_line_trains_with_anything(base, policy):
    fn, start = PROBLEMS["network"]
    losses = sg.terms(fn)
    optimizer = base if policy is None else sg.small_gain(base, losses, policy=policy)
    step = sg.train_step(losses, optimizer)
    params = start()
    state = optimizer.init(params)
    first = float(total(fn, params))
    for _ in range(60):
        params, state, _ = step(params, state)
    assert total(fn, params) < first


@pytest.mark.once
def test_a_rewind_takes_the_momentum_back_too():
    """After a rout parameters and momentum are those of the anchor, at a quarter of the step."""
    fn = lambda x: {"a": 50 * jnp.sum(x**2)}
    optimizer = sg.small_gain(optax.sgd(0.05, 0.9), fn, limit=None)
    x, state = jnp.ones(2), optimizer.init(jnp.ones(2))

    @jax.jit
    def step(x, state):
        gradient = jax.grad(lambda x: total(fn, x))(x)
        updates, state = optimizer.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    for _ in range(100):
        before = state
        x, state = step(x, state)
        if state.info.rewinds > before.info.rewinds:
            break
    anchor, base_state = at_anchor(before.watch, (x, before.base_state))
    jax.tree.map(np.testing.assert_array_equal, state.base_state, base_state)
    # from as far out as this the way back is rounded, and gone a second time
    x, state = step(x, state)
    np.testing.assert_allclose(x, anchor, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.base_state, base_state)
    assert state.watch.backoff <= 0.26
    assert not state.info.accepted


@pytest.mark.once
def test_a_rate_that_was_set_by_hand_survives_a_rewind():
    fn = lambda x: {"a": 50 * jnp.sum(x**2)}
    base = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3)
    optimizer = sg.small_gain(base, fn)
    x, state = jnp.ones(2), optimizer.init(jnp.ones(2))
    update = jax.jit(optimizer.update)
    for _ in range(100):
        rate = optax.tree.set(state.base_state, learning_rate=jnp.float32(0.05))
        updates, state = update(100 * x, state._replace(base_state=rate), x)
        x = optax.apply_updates(x, updates)
        if state.info.rewinds:
            break
    assert state.info.rewinds == 1
    assert state.base_state.hyperparams["learning_rate"] == jnp.float32(0.05)


@pytest.mark.once
def test_hyperparameters_are_injected_around_it():
    optimizer = optax.inject_hyperparams(sg.loss_small_gain)(
        optax.sgd(1e-3), sg.terms(soft_and_stiff), policy="fair", ema=optax.constant_schedule(0.5)
    )
    _, state = train(optimizer, soft_and_stiff, jnp.ones(2), 400)
    np.testing.assert_allclose(state.inner_state.weights, [1 / 4, 1 / 200], rtol=1e-2)
    assert float(state.hyperparams["ema"]) == 0.5


@pytest.mark.once
def test_keywords_of_graphs_are_refused():
    for name in ("objective", "smoothing", "min_cosine", "max_backtracks", "global_budget"):
        with pytest.raises(TypeError, match=f"{name} is a keyword of small_gain for energy graphs"):
            sg.small_gain(optax.sgd(0.1), soft_and_stiff, **{name: 1})
    with pytest.raises(TypeError, match="smooothing is no keyword"):
        sg.small_gain(optax.sgd(0.1), soft_and_stiff, smooothing=1)
    with pytest.raises(TypeError, match=r"function sgd, not an optimizer"):
        sg.small_gain(optax.sgd, soft_and_stiff)


@pytest.mark.once
@pytest.mark.parametrize("policy", ["reference", "fair"])
def test_replicas_stay_equal(policy):
    """Each device sees its own part of the batch; named, all decide alike."""
    losses = sg.terms(
        lambda x, y: {"a": jnp.mean((y @ x - 1) ** 2), "b": 10 * jnp.mean((y @ x) ** 2)},
        names=("a", "b"),
    )
    y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 3)), jnp.float32)
    x = jnp.ones(3)

    def trained(optimizer, mean):
        def steps(x, y):
            state = optimizer.init(x)

            def step(carry, _):
                x, state = carry
                gradient = mean(jax.grad(lambda x: losses.values(x, y).sum())(x))
                updates, state = optimizer.update(gradient, state, x, term_args=(y,))
                return (optax.apply_updates(x, updates), state), None

            (x, state), _ = jax.lax.scan(step, (x, state), length=60)
            return x, state.weights, state.info.cost

        return steps

    named = sg.small_gain(optax.sgd(1e-3), losses, policy=policy, every=3, axis_name="replicas")
    mean = lambda g: jax.lax.pmean(g, "replicas")
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    found = jax.jit(
        jax.shard_map(
            lambda x, y: jax.tree.map(lambda a: a[None], trained(named, mean)(x, y[0])),
            mesh=mesh,
            in_specs=(spec(), spec("replicas")),
            out_specs=spec("replicas"),
            check_vma=False,
        )
    )(x, y)
    alone = sg.small_gain(optax.sgd(1e-3), losses, policy=policy, every=3)
    expected = jax.jit(trained(alone, lambda g: g))(x, y.reshape(-1, 3))
    for many, one in zip(found, expected, strict=True):
        np.testing.assert_array_equal(many, jnp.broadcast_to(many[0], many.shape))
        np.testing.assert_allclose(many[0], one, rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("policy", ["reference", "fair"])
def test_parameters_sharded_over_an_explicit_mesh(policy):
    """`jax.make_mesh` has explicit axes by default: state lies where its parameter lies."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    fn = lambda p: {"a": jnp.sum((p["w"] - 1) ** 2), "b": 5 * jnp.sum(p["w"] ** 2)}
    optimizer = sg.small_gain(optax.adam(RATE), fn, policy=policy, warmup=2, every=2)
    start = {"w": jnp.linspace(0, 1, 32).reshape(16, 2)}

    def trained(params):
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            gradient = jax.grad(lambda p: total(fn, p))(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(12):
            params, state = step(params, state)
        return params, state

    plain, _ = trained(start)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", None))
    # the arrays' own mesh is enough
    for context in (jax.set_mesh(mesh), nullcontext()):
        with context:
            found, state = trained(jax.tree.map(lambda x: jax.device_put(x, rows), start))
        np.testing.assert_allclose(found["w"], plain["w"], rtol=1e-4)
        assert state.vectors.total["w"].sharding.spec == rows.spec


@pytest.mark.once
def test_nothing_that_is_not_a_number_rests_in_a_state():
    with jax.debug_nans(True), jax.debug_infs(True):
        for policy in ("reference", "fair", "greedy"):
            optimizer = sg.small_gain(optax.adam(RATE), soft_and_stiff, policy=policy, warmup=2)
            x = jnp.ones(2)
            state = optimizer.init(x)
            for _ in range(12):
                updates, state = jax.jit(optimizer.update)(
                    jax.grad(lambda x: total(soft_and_stiff, x))(x), state, x
                )
                x = optax.apply_updates(x, updates)
            assert all(
                bool(jnp.all(jnp.isfinite(leaf)))
                for leaf in jax.tree.leaves(state)
                if jnp.issubdtype(leaf.dtype, jnp.floating)
            )


@pytest.mark.once
def test_skipped_updates_move_nothing_and_are_measured_later():
    losses = sg.terms(
        lambda x, bad: {"a": jnp.sum(x**2) + bad, "b": 10 * jnp.sum(x**2)}, names=("a", "b")
    )
    optimizer = sg.small_gain(optax.sgd(1e-3), losses, policy="fair", every=2)
    x = jnp.ones(2)
    state = optimizer.init(x)
    update = jax.jit(optimizer.update)
    for i in range(40):
        bad = jnp.where(i % 2 == 0, jnp.nan, 0.0)
        gradient = jax.grad(lambda x, bad=bad: losses.values(x, bad).sum())(x)
        updates, new = update(gradient, state, x, term_args=(bad,))
        if i % 2 == 0:
            assert new.count == state.count
        state, x = new, optax.apply_updates(x, updates)
    assert state.info.skipped == 20
    np.testing.assert_allclose(state.info.cost[:, 0], [2, 20], rtol=1e-3)


@pytest.mark.once
@pytest.mark.parametrize("factor", [-3.0, 0.5])
def test_what_comes_after_it_turns_the_guard_off_and_is_reported(factor):
    """The way back is an update like another: scaled, it leads elsewhere, once."""
    fn = lambda x: {"a": 50 * jnp.sum(x**2)}
    inner = sg.small_gain(optax.sgd(0.04 / factor), fn)

    optimizer = optax.chain(inner, optax.scale(factor))
    x, state = train(optimizer, fn, jnp.ones(2), 60)
    assert state[0].info.rewinds == 1
    assert state[0].watch.lost
    # a compiled loop says nothing; the host does, where it holds the state
    with pytest.warns(UserWarning, match=r"did not arrive.*inside"):
        inner.update(jnp.ones(2), state[0], x)
    step = sg.train_step(fn, optimizer)
    with pytest.warns(UserWarning, match=r"did not arrive.*inside"):
        x, state, _ = step(x, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(x, state)
    # a wrong limit, for shares cost no more than the right one
    shares = sg.small_gain(optax.sgd(4 / factor), fn, policy="fair", limit=1e6)

    def behind():
        train(optax.chain(shares, optax.scale(factor)), fn, jnp.ones(2), 60)
        jax.effects_barrier()

    with pytest.warns(UserWarning, match=r"did not arrive.*inside"):
        behind()


@pytest.mark.once
def test_accumulation_around_it_keeps_the_batch_in_one_line():
    losses = sg.terms(lambda p, x: {"f": jnp.mean((x * p - x) ** 2)}, names=("f",))
    optimizer = optax.MultiSteps(sg.small_gain(optax.sgd(0.1), losses), 2)
    step = sg.train_step(losses, optimizer)
    params = jnp.zeros(())
    state = optimizer.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(40):
            params, state, _ = step(params, state, jnp.ones(4))
    np.testing.assert_allclose(params, 1, atol=0.05)


@jax.custom_vjp
def ascended(m):
    """m, whose gradient is turned around, so that descent climbs in it."""
    return m


ascended.defvjp(lambda m: (m, None), lambda _, g: (-g,))

MEANT = {
    "a multiplier by ascent": (
        lambda p: {"f": p[0] ** 2, "c": ascended(p[1]) * (1 - p[0])},
        lambda: optax.sgd(0.01),
        np.zeros(2),
    ),
    "a sampler from the mode": (
        lambda p: {"a": 0.25 * jnp.sum(p**2), "b": 0.25 * jnp.sum(p**2)},
        lambda: optax.noisy_sgd(0.01, eta=200.0, gamma=0.0, key=0),
        np.zeros(2),
    ),
    "decay by the optimizer": (
        lambda p: {"fit": jnp.sum(jax.nn.softplus(-p))},
        lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.5)),
        np.full(2, 9.0),
    ),
    "ascent": (
        lambda p: {"a": -jnp.sum((p - 1) ** 2), "b": -jnp.sum(p**2)},
        lambda: optax.chain(optax.scale(-1.0), optax.adam(0.02)),
        np.full(2, 3.0),
    ),
    "a warm restart": (
        lambda p: {"a": jnp.sum(jnp.abs(p)), "b": 0.05 + jnp.sum(p**2)},
        lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-2, 100, 1000)),
        np.full(2, 1e-3),
    ),
}
"""Sums that are meant to rise, for a while or for good."""


@pytest.mark.once
@pytest.mark.parametrize("case", MEANT)
def test_what_means_to_rise_is_let_rise(case):
    fn, make, start = MEANT[case]
    wanted, _ = train(make(), fn, jnp.asarray(start), 1000)
    found, state = train(sg.small_gain(make(), fn), fn, jnp.asarray(start), 1000)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert state.info.rewinds == 0


@pytest.mark.once
def test_a_rise_that_no_shorter_step_cures_ends_the_guard_with_a_word():
    """Ascent of exp: every rewind wins nothing."""
    fn = lambda x: {"a": 1e-3 * jnp.exp(30 * x)}
    optimizer = sg.small_gain(optax.sgd(-1.0), fn)
    x, state = train(optimizer, fn, jnp.zeros(()), 4000)
    assert state.watch.lost
    assert state.info.rewinds == STRIKES
    with pytest.warns(UserWarning, match=r"means to rise.*guard=None"):
        optimizer.update(jnp.zeros(()), state, x)


@pytest.mark.once
def test_optax_finds_each_name_in_the_state_once():
    fn = lambda x: {"a": jnp.sum((x - 1) ** 2), "b": jnp.sum(x**2)}
    total_of = lambda x: total(fn, x)
    optimizer = sg.small_gain(optax.lbfgs(), fn)
    x = jnp.zeros(2)
    state = optimizer.init(x)
    for _ in range(3):
        value, gradient = optax.value_and_grad_from_state(total_of)(x, state=state)
        updates, state = optimizer.update(
            gradient, state, x, value=value, grad=gradient, value_fn=total_of
        )
        x = optax.apply_updates(x, updates)
    np.testing.assert_allclose(x, 0.5, rtol=1e-5)
    injected = sg.small_gain(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), fn)
    assert np.isclose(optax.tree_utils.tree_get(injected.init(x), "learning_rate"), 0.1)


@pytest.mark.once
def test_what_rests_on_a_limit_that_nobody_knows_says_so():
    fn, x = soft_and_stiff, jnp.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sg.small_gain(optax.lion(0.1), fn).init(x)
        sg.small_gain(optax.adam(0.1), fn, policy="fair", guard=0.9).init(x)
        known = {"limit": 2.0, "metric": lambda state, x: x}
        sg.small_gain(optax.lion(0.1), fn, policy="fair", guard=0.9, **known).init(x)
    for given, what in (
        ({"policy": "fair"}, "identity metric"),
        ({"guard": 0.9}, "guard does nothing"),
        ({"row_gains": True}, "row_gains does nothing"),
    ):
        with pytest.warns(UserWarning, match=f"not proportional to the gradient.*{what}"):
            sg.small_gain(optax.lion(0.1), fn, **given).init(x)


@pytest.mark.once
def test_mistakes_are_named():
    losses = sg.terms(
        lambda p, x: {"total": jnp.sum(p * x), "b": jnp.sum(p**2)}, names=("total", "b")
    )
    optimizer = sg.small_gain(optax.sgd(0.1), losses)
    x = jnp.ones(2)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match=r"'total' and 'aux' are keys"):
        sg.train_step(losses, optimizer)(x, state, x)
    with pytest.raises(TypeError, match=r"order is step\(params, state"):
        sg.train_step(losses, optimizer)(state, x, x)
    with pytest.raises(TypeError, match=r"order is\s+update\(gradient, state, params\)"):
        optimizer.update(x, x, state)
    with pytest.raises(TypeError, match="names must be given"):
        sg.small_gain(optax.sgd(0.1), lambda p, x: {"a": jnp.sum(p)})
    with pytest.raises(TypeError, match=r"names=\('fit',\)"):
        sg.terms(lambda p: {"fit": p}, names="fit")
    for wrong in ({"warmup": -5}, {"priorities": (1.0, 2.0)}, {"anneal": lambda count: 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sg.small_gain(optax.sgd(0.1), losses, **wrong)
