"""Limits and metrics of optimizers: closed forms, eigenvalues, runs at 0.97 and 1.03 of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from optax.transforms import selective_transform

import smallgain_jax as sg
from smallgain_jax._checks import check_optimizer
from smallgain_jax.limits.closed_forms import row_budgets
from smallgain_jax.limits.crossing import first_unstable
from smallgain_jax.limits.probe import probe_optimizer
from tests.catalogue import catalogue

TREE = {
    "w": jax.ShapeDtypeStruct((3, 2), jnp.float32),
    "b": jax.ShapeDtypeStruct((2,), jnp.float32),
}


def ones(tree):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tree)


def trained(optimizer, gradients, steps):
    """The state after some updates at the same gradients."""
    update = optax.with_extra_args_support(optimizer).update
    params = jax.tree.map(jnp.zeros_like, gradients)
    step = jax.jit(lambda state: update(gradients, state, params, value=jnp.ones(()))[1])
    state = optimizer.init(params)
    for _ in range(steps):
        state = step(state)
    return state


# Linear optimizers: one quadratic


def remembers(decay):
    return optax.trace(decay)


LINEAR = {
    "descent": (optax.sgd(0.1), 20.0),
    "heavy ball": (optax.sgd(0.1, 0.9), 38.0),
    "nesterov": (optax.sgd(0.1, 0.9, nesterov=True), 2 * 1.9 / 2.8 / 0.1),
    "chain": (optax.chain(optax.scale(2.0), optax.sgd(0.05, 0.5)), 30.0),
    "decay": (optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), 19.5),
    "optimistic": (optax.optimistic_gradient_descent(0.1), 20.0 / 3),
    "accumulated": (optax.chain(optax.apply_every(4), optax.sgd(0.1)), 5.0),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 20.0),
    # unstable by slow oscillations, not by one of period two
    "two traces": (optax.chain(remembers(0.9), remembers(0.9), optax.scale(-0.01)), None),
    "ema before momentum": (optax.chain(optax.ema(0.9), optax.sgd(0.1, 0.5)), None),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_optimizer_turns_unstable_at_its_limit(name):
    optimizer, expected = LINEAR[name]
    limit = sg.measured_limit(optimizer)
    if expected is not None:
        np.testing.assert_allclose(limit, expected, rtol=1e-4)
    run = jax.jit(lambda curvature: grows(optimizer, curvature))
    assert not run(0.97 * limit)
    assert run(1.03 * limit)


def grows(optimizer, curvature, steps=4000):
    """Whether the iteration on a quadratic ends above where it began, or overflows."""

    def step(carry, _):
        x, state = carry
        update, state = optimizer.update(curvature * x, state, x)
        return (x + update, state), None

    start = jnp.full(2, 1e-3)
    (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return ~(jnp.max(jnp.abs(x)) <= 1e-3)


def random_chain(rng):
    """Up to three memories and a decay, as an optimizer and as the matrices of its state."""
    parts, rows, gains = [], [], []
    signal, gain = np.zeros(5), 1.0  # of (x, m1, m2, m3, unused), and of the gradient
    for k in range(rng.integers(0, 4)):
        beta, kind = rng.choice([0.3, 0.5, 0.9, 0.95]), rng.choice(["trace", "nesterov", "ema"])
        scale = 1 - beta if kind == "ema" else 1.0
        memory = scale * signal
        memory[1 + k] += beta
        rows.append(memory)
        gains.append(scale * gain)
        if kind == "ema":
            parts.append(optax.ema(beta, debias=False))
        else:
            parts.append(optax.trace(beta, nesterov=kind == "nesterov"))
        if kind == "nesterov":
            signal, gain = signal + beta * memory, gain + beta * scale * gain
        else:
            signal, gain = memory, gains[-1]
    decay, rate = rng.choice([0.0, 0.0, 0.3]), 10 ** rng.uniform(-3, 0)
    signal = signal.copy()
    signal[0] += decay
    n = 1 + len(rows)
    matrix = np.array([np.eye(5)[0] - rate * signal, *rows])[:, :n]
    drive = np.array([-rate * gain, *gains])
    parts += [optax.add_decayed_weights(decay)] if decay else []
    return optax.chain(*parts, optax.scale(-rate)), matrix, drive


def limit_by_eigenvalues(matrix, drive):
    """By a fine scan of curvatures and bisection."""
    first = np.eye(len(drive))[0]

    def radius(curvature):
        return np.abs(np.linalg.eigvals(matrix + curvature * np.outer(drive, first))).max()

    tried = np.geomspace(1e-5, 1e5, 4001) / np.abs(drive).max()
    above = next((k for k, c in enumerate(tried) if radius(c) > 1 + 1e-9), None)
    if not above:
        return None
    low, high = tried[above - 1], tried[above]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if radius(middle) > 1 + 1e-9 else (middle, high)
    return high


@pytest.mark.parametrize("seed", range(12))
def test_random_chains_by_eigenvalues(seed):
    optimizer, matrix, drive = random_chain(np.random.default_rng(seed))
    expected = limit_by_eigenvalues(matrix, drive)
    np.testing.assert_allclose(sg.measured_limit(optimizer), expected, rtol=1e-3)


@pytest.mark.once
def test_crossings_by_eigenvalues():
    rng = np.random.default_rng(1)
    compiled = jax.jit(first_unstable)
    for _ in range(150):
        _, matrix, drive = random_chain(rng)
        expected = limit_by_eigenvalues(matrix, drive)
        drift = matrix - np.eye(len(drive))
        np.testing.assert_allclose(first_unstable(drift, drive, np), expected, rtol=1e-4)
        single = compiled(jnp.asarray(drift, jnp.float32), jnp.asarray(drive, jnp.float32))
        np.testing.assert_allclose(single, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.lion(0.1),
        optax.sgd(optax.linear_schedule(0.1, 0.2, 1500)),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        optax.polyak_sgd(1.0),
        optax.scale(0.1),
        optax.chain(optax.trace(1.01), optax.scale(-0.1)),
        optax.set_to_zero(),
    ],
    ids=["adam", "lion", "schedule", "line search", "polyak", "ascent", "unstable", "none"],
)
def test_no_limit_where_there_is_none(optimizer):
    assert sg.measured_limit(optimizer) is None


def test_measurable_while_tracing():
    def traced(x):
        return x * sg.measured_limit(optax.sgd(0.5))

    np.testing.assert_allclose(jax.jit(traced)(1.0), 4.0, rtol=1e-5)


def test_a_traced_rate_is_not_measured():
    def traced(rate):
        assert sg.measured_limit(optax.sgd(rate)) is None
        return rate

    jax.jit(traced)(0.1)


# Every optimizer that optax has, by its own list


CATALOGUE = catalogue()
EXPECTED = {
    **dict.fromkeys(["adam", "adamax", "amsgrad", "adabelief", "radam", "yogi", "adopt"], 3800),
    **dict.fromkeys(["sgd", "rmsprop", "adagrad", "acprop", "reduce_on_plateau"], 200),
    "sm3": 3800,
    "novograd": 380,
    "noisy_sgd": 200,
    "apply_every": 200 / 3,
    "optimistic_gradient_descent": 200 / 3,
    "split_real_and_imaginary": 3800,
}
NO_LIMIT = {
    "lion": "proportional",
    "sign_sgd": "proportional",
    "signum": "proportional",
    "rprop": "proportional",
    "lars": "proportional",
    "lamb": "proportional",
    "fromage": "proportional",
    "adafactor": "proportional",
    "muon": "proportional",
    "prodigy": "finite",
    "lbfgs": "value_fn",
    "polyak_sgd": "of the gradient alone",
    "sophia": "more than gradients",
    "dpsgd": "shapes",
    "centralize": "elementwise",
    "set_to_zero": "moves nothing",
    "madgrad": "age",
    "adadelta": "metric",
}


@pytest.mark.once
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_optimizer_of_optax_is_right_or_unknown(name):
    """A quadratic with 0.97 or 1.03 of the limit in every coordinate of the metric."""
    optimizer = CATALOGUE[name]()
    probe = probe_optimizer(optimizer, TREE)
    if name in NO_LIMIT:
        assert not probe.known
        assert NO_LIMIT[name] in probe.why
    if not probe.known:
        assert name not in EXPECTED
        assert probe.why
        assert probe.limit(None) == np.inf
        return
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.1, 1, leaf.shape) * 10, leaf.dtype), TREE
    )
    state = trained(optimizer, gradients, 400)
    limit = float(jax.jit(probe.limit)(state))
    if name in EXPECTED:
        np.testing.assert_allclose(limit, EXPECTED[name], rtol=2e-3)
    if name == "noisy_sgd":
        return  # it never comes to rest
    inverse = jax.jit(probe.inverse_root)(state, gradients)
    metric = jax.tree.map(lambda g, r: jnp.broadcast_to(r, g.shape) ** -2, gradients, inverse)
    run = grows_with_frozen_moments(probe, optimizer, state)
    for factor, expected in ((0.97, False), (1.03, True)):
        grown = run(jax.tree.map(lambda p, scale=factor * limit: scale * p, metric))
        for leaf in jax.tree.leaves(grown):
            assert np.all(np.asarray(leaf) == expected), (name, factor, grown)


def grows_with_frozen_moments(probe, optimizer, state, steps=1200):
    """Whether each coordinate of x <- x + u grows, with even parts and ages of the state held."""
    update = optax.with_extra_args_support(optimizer).update
    twins, kinds = probe.details.twins, probe.details.findings.roles
    roles = ["setting" if twin is None else kinds[twin] for twin in twins]
    treedef = jax.tree.structure(state)
    still = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), TREE)

    def by_role(f, *states):
        columns = zip(roles, *map(jax.tree.leaves, states), strict=True)
        return treedef.unflatten([f(role, *leaves) for role, *leaves in columns])

    # moments that an update without gradient makes what they are
    state = by_role(lambda role, a: jnp.zeros_like(a) if role == "odd" else a, state)
    _, faded = update(still, state, still, value=jnp.ones(()))
    start = by_role(
        lambda role, a, b: jnp.where(b > 0, a * (a / b), a) if role == "even" else a, state, faded
    )

    @jax.jit
    def run(curvature):
        def step(carry, _):
            x, state = carry
            gradient = jax.tree.map(jnp.multiply, curvature, x)
            move, new = update(gradient, state, x, value=jnp.ones(()))
            held = by_role(lambda role, a, b: b if role in ("even", "age") else a, new, state)
            return (jax.tree.map(jnp.add, x, move), held), None

        tiny = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-9, leaf.dtype), TREE)
        (x, _), _ = jax.lax.scan(step, (tiny, start), length=steps)
        return jax.tree.map(lambda leaf: ~(jnp.abs(leaf) <= 1e-9), x)

    return run


@pytest.mark.parametrize("steps", [10, 100, 300])
@pytest.mark.parametrize("name", ["adam", "amsgrad"])
def test_the_answer_and_the_root_of_adam_are_of_the_same_moments(name, steps):
    """P = sqrt(nu_hat) + eps exactly, and one limit at every age."""
    optimizer = {"adam": optax.adam, "amsgrad": optax.amsgrad}[name](0.01)
    gradients = {"a": jnp.array([1.0, 0.1, 1e-5]), "b": jnp.array([[30.0]])}
    probe = probe_optimizer(optimizer, gradients)
    state = trained(optimizer, gradients, steps)
    np.testing.assert_allclose(probe.limit(state), 3800, rtol=1e-4)
    inverse = probe.inverse_root(state, gradients)
    for key, g in gradients.items():
        np.testing.assert_allclose(inverse[key], (np.abs(g) + 1e-8) ** -0.5, rtol=1e-3)


@pytest.mark.parametrize("inside", [True, False])
def test_an_eps_is_read_inside_the_root_and_outside(inside):
    optimizer = optax.rmsprop(0.01, eps=1e-2, eps_in_sqrt=inside)
    gradients = jnp.array([1.0, 0.5])
    probe = probe_optimizer(optimizer, gradients)
    state = trained(optimizer, gradients, 300)
    nu = np.asarray(gradients) ** 2
    metric = np.sqrt(nu + 1e-2) if inside else np.sqrt(nu) + 1e-2
    np.testing.assert_allclose(probe.limit(state), 200, rtol=1e-3)
    np.testing.assert_allclose(probe.inverse_root(state, gradients), metric**-0.5, rtol=1e-3)


def test_what_does_not_move_counts_for_nothing():
    optimizer = optax.adam(0.01)
    gradients = {"a": jnp.array([1.0, 0.0, 5e-9, 1e-6]), "b": jnp.zeros(())}
    probe = probe_optimizer(optimizer, gradients)
    inverse = probe.inverse_root(trained(optimizer, gradients, 200), gradients)
    np.testing.assert_allclose(inverse["a"], [1.0, 0.0, 0.0, (1.01e-6) ** -0.5], rtol=1e-3)
    np.testing.assert_array_equal(inverse["b"], 0)
    fresh = probe.inverse_root(optimizer.init(gradients), gradients)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(fresh))


# State, schedules, holes


VISCOSITY = {"net": jnp.ones(4), "nu": jnp.zeros(())}


@pytest.mark.parametrize(
    "name", ["adam", "rmsprop", "warm-up", "injected", "injected schedule", "accumulated"]
)
def test_names_of_parameters_do_not_matter(name):
    optimizer, limit = {
        "adam": (optax.adam(0.01), 3800),
        "rmsprop": (optax.rmsprop(0.01), 200),
        "warm-up": (optax.adam(optax.linear_schedule(0, 0.01, 10)), 38 / 0.004),
        "injected": (optax.inject_hyperparams(optax.adam)(learning_rate=0.01), 3800),
        "injected schedule": (
            optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0, 0.01, 10)),
            38 / 0.004,
        ),
        "accumulated": (optax.MultiSteps(optax.adam(0.01), 3), 3800),
    }[name]
    gradients = jax.tree.map(lambda leaf: 0.5 + 0 * leaf, VISCOSITY)
    probe = probe_optimizer(optimizer, VISCOSITY)
    state = optimizer.init(VISCOSITY)
    for _ in range(4):
        _, state = optimizer.update(gradients, state, VISCOSITY)
    np.testing.assert_allclose(probe.limit(state), limit, rtol=1e-3)
    inverse = probe.inverse_root(state, VISCOSITY)
    nu = 0.25 * (1 - 0.9**4) if name == "rmsprop" else 0.25
    for key in VISCOSITY:
        assert inverse[key].shape == VISCOSITY[key].shape
        np.testing.assert_allclose(inverse[key], nu**-0.25, rtol=1e-3)


def test_a_rate_of_zero_moves_nothing_yet():
    optimizer = optax.adam(optax.linear_schedule(0, 0.01, 10))
    probe = probe_optimizer(optimizer, VISCOSITY)
    state = optimizer.init(VISCOSITY)
    assert probe.known
    assert probe.limit(state) == np.inf
    assert all(
        np.all(np.isfinite(r)) for r in jax.tree.leaves(probe.inverse_root(state, VISCOSITY))
    )


@pytest.mark.once
@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
def test_holes_stay_holes(hole):
    params = {"a": jnp.ones(3), "b": hole}
    optimizer = optax.adam(0.01)
    probe = probe_optimizer(optimizer, params)
    state = trained(optimizer, params, 100)
    np.testing.assert_allclose(probe.limit(state), 3800, rtol=1e-3)
    inverse = probe.inverse_root(state, params)
    assert jax.tree.structure(inverse) == jax.tree.structure(params)
    np.testing.assert_allclose(inverse["a"], 1, rtol=1e-3)


@pytest.mark.once
def test_moments_of_another_shape():
    """Factored second moments still make a metric; the answer to a gradient is what it is."""
    optimizer = optax.adafactor(0.01, multiply_by_parameter_scale=False, clipping_threshold=None)
    params = {"w": jnp.ones((200, 130))}
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(0.1, 2, (200, 1)), rng.uniform(0.1, 2, (1, 130))
    gradients = {"w": jnp.asarray(rows * columns, jnp.float32)}
    probe = probe_optimizer(optimizer, params)
    state = trained(optimizer, gradients, 200)
    np.testing.assert_allclose(probe.limit(state), 200, rtol=1e-3)
    inverse = probe.inverse_root(state, params)["w"]
    # the factors of an outer product are exact, up to how the average decays
    np.testing.assert_allclose(inverse, (rows * columns) ** -0.5, rtol=0.02)


@pytest.mark.once
def test_shapes_suffice_and_low_precision_does():
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), TREE)
    optimizer = optax.adam(0.01, mu_dtype=jnp.bfloat16)
    probe = probe_optimizer(optimizer, jax.eval_shape(lambda: params))
    state = trained(optimizer, params, 20)
    np.testing.assert_allclose(probe.limit(state), 3800, rtol=0.01)
    inverse = probe.inverse_root(state, params)
    assert inverse["w"].dtype == jnp.float32
    np.testing.assert_allclose(inverse["w"], 1, rtol=0.02)


@pytest.mark.once
def test_no_number_that_is_none_rests_under_debug_nans():
    optimizer = optax.adam(0.01)
    params = ones(TREE)
    with jax.debug_nans(True):
        probe = probe_optimizer(optax.chain(optimizer, optax.scale(1.0)), params)
        state = optax.chain(optimizer, optax.scale(1.0)).init(params)
        jax.block_until_ready((probe.limit(state), probe.inverse_root(state, params)))
        assert not probe_optimizer(optax.contrib.normalize(), params).known


# Groups


def groups(name):
    labels = {"net": "a", "nu": "b"}
    frozen = optax.set_to_zero()
    two = {"a": optax.sgd(0.1), "b": optax.sgd(0.4)}
    half = {"net": 0.5, "nu": 1.0}
    return {
        "labels": (optax.multi_transform(two, labels), 5.0, half),
        "label function": (optax.partition(two, lambda _: labels), 5.0, half),
        "adam and sgd": (
            optax.partition({"a": optax.adam(0.01), "b": optax.sgd(0.1)}, labels),
            20.0,
            {"net": (20 / 3800 / 0.5) ** 0.5, "nu": 1.0},
        ),
        "frozen": (
            optax.partition({"a": optax.adam(0.01), "b": frozen}, labels),
            3800.0,
            {"net": 0.5**-0.5, "nu": 0.0},
        ),
        "selective": (
            selective_transform(optax.sgd(0.1), freeze_mask={"net": False, "nu": True}),
            20.0,
            {"net": 1.0, "nu": 0.0},
        ),
        "freeze": (
            optax.chain(optax.sgd(0.1, 0.9), optax.freeze({"net": False, "nu": True})),
            38.0,
            {"net": 1.0, "nu": 0.0},
        ),
        "decay mask": (
            optax.adamw(0.01, weight_decay=0.1, mask={"net": True, "nu": False}),
            3800 * (1 - 0.01 * 0.1 / 2),
            {"net": 0.5**-0.5, "nu": 0.5**-0.5 * (1 - 0.01 * 0.1 / 2) ** 0.5},
        ),
        "scaled part": (
            optax.chain(optax.sgd(0.1), optax.masked(optax.scale(0.5), {"net": True, "nu": False})),
            20.0,
            {"net": 0.5**0.5, "nu": 1.0},
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "labels",
        "label function",
        "adam and sgd",
        "frozen",
        "selective",
        "freeze",
        "decay mask",
        "scaled part",
    ],
)
def test_groups_make_one_limit_and_one_metric(name):
    optimizer, limit, roots = groups(name)
    gradients = jax.tree.map(lambda leaf: 0.5 + 0 * leaf, VISCOSITY)
    probe = probe_optimizer(optimizer, VISCOSITY)
    state = trained(optimizer, gradients, 100)
    np.testing.assert_allclose(probe.limit(state), limit, rtol=1e-3)
    inverse = probe.inverse_root(state, VISCOSITY)
    for key, root in roots.items():
        np.testing.assert_allclose(inverse[key], root, rtol=1e-3)


def test_two_groups_turn_unstable_at_their_limit():
    """A coupled quadratic in the metric of both: the sharpness in it against the one limit."""
    optimizer = optax.multi_transform(
        {"a": optax.sgd(0.1, 0.5), "b": optax.sgd(0.7, 0.5)}, {"a": "a", "b": "b"}
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    probe = probe_optimizer(optimizer, params)
    state = optimizer.init(params)
    inverse = probe.inverse_root(state, params)
    scale = np.diag(np.concatenate([np.broadcast_to(inverse[k], params[k].shape) for k in "ab"]))
    hessian = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, 1.0], [0.5, 1.0, 4.0]])
    sharpness = np.linalg.eigvalsh(scale @ hessian @ scale)[-1]
    limit = float(probe.limit(state))

    def grown(factor):
        matrix = jnp.asarray(hessian) * factor * limit / sharpness

        def step(carry, _):
            x, state = carry
            flat = matrix @ jnp.concatenate([x["a"], x["b"]])
            move, state = optimizer.update({"a": flat[:2], "b": flat[2:]}, state, x)
            return (optax.apply_updates(x, move), state), None

        (x, _), _ = jax.lax.scan(step, (params, state), length=2000)
        return ~(jnp.abs(x["b"][0]) <= 1)

    grown = jax.jit(grown)
    assert not grown(0.97)
    assert grown(1.03)


@pytest.mark.once
def test_one_group_without_a_limit_is_none_for_the_whole():
    labels = {"net": "a", "nu": "b"}
    mixed = optax.partition({"a": optax.adam(0.01), "b": optax.lion(0.01)}, labels)
    probe = probe_optimizer(mixed, VISCOSITY)
    assert not probe.known
    assert "proportional" in probe.why
    # a masked optimizer hands the raw gradient on, and that climbs
    assert not probe_optimizer(
        optax.masked(optax.adam(0.01), {"net": True, "nu": False}), VISCOSITY
    ).known


@pytest.mark.once
def test_leaves_that_are_alike_are_probed_once():
    params = {f"layer {k}": {"w": jnp.ones((3, 3)), "b": jnp.ones(3)} for k in range(60)}
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    for optimizer in (
        optax.adamw(1e-3, mask=decayed),
        optax.inject_hyperparams(optax.novograd)(1e-3),
        optax.MultiSteps(optax.sgd(1e-3, 0.9), 4),
    ):
        probe = probe_optimizer(optimizer, params)
        assert probe.known
        assert len(probe.details.copy.shapes) == 2
        inverse = probe.inverse_root(optimizer.init(params), params)
        assert jax.tree.structure(inverse) == jax.tree.structure(params)


# Errors


@pytest.mark.once
def test_errors_of_the_optimizer_come_through():
    def update(updates, state, params=None):
        raise ValueError("mine")

    broken = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(ValueError, match="mine"):
        probe_optimizer(broken, TREE)
    with pytest.raises(ValueError, match="mine"):
        sg.measured_limit(broken)


@pytest.mark.once
def test_what_fails_on_the_copy_alone_is_unknown():
    rates = jnp.linspace(0.1, 1, 6).reshape(3, 2)
    scaled = optax.stateless(lambda g, _: jax.tree.map(lambda leaf: -rates * leaf, g))
    probe = probe_optimizer(scaled, {"w": jnp.ones((3, 2))})
    assert not probe.known
    assert "small copy" in probe.why

    def update(updates, state, params=None):
        return (updates if updates["w"].sum() > 0 else params), state

    probe = probe_optimizer(optax.GradientTransformation(lambda _: (), update), TREE)
    assert "traced" in probe.why


@pytest.mark.once
def test_a_factory_is_not_an_optimizer():
    with pytest.raises(TypeError, match=r"base_optimizer is the function sgd, .*as in sgd\(...\)"):
        check_optimizer("base_optimizer", optax.sgd)
    with pytest.raises(TypeError, match="base_optimizer must be an optax optimizer"):
        check_optimizer("base_optimizer", 3.0)
    check_optimizer("base_optimizer", optax.sgd(0.1))


@pytest.mark.once
def test_a_state_of_another_optimizer_is_named():
    probe = probe_optimizer(optax.adam(0.1), TREE)
    with pytest.raises(ValueError, match="base_state"):
        probe.limit(optax.sgd(0.1, 0.9).init(ones(TREE)))


def test_hyperparameters_that_are_traced():
    """Everything around is injected: kind by stand-ins, numbers by what is traced."""

    def make(learning_rate, b1):
        base = optax.adam(learning_rate, b1)

        def update(updates, state, params=None):
            probe = probe_optimizer(base, params)
            assert probe.adaptive
            moves, new = base.update(updates, state[0], params)
            return moves, (new, probe.limit(new), probe.inverse_root(new, params))

        def init(params):
            scalars = jax.tree.map(jnp.zeros_like, params)
            return base.init(params), jnp.zeros(()), scalars

        return optax.GradientTransformation(init, update)

    optimizer = optax.inject_hyperparams(make)(learning_rate=0.01, b1=0.8)
    params = ones(TREE)
    state = optimizer.init(params)
    step = jax.jit(lambda state: optimizer.update(params, state, params)[1])
    for _ in range(20):
        state = step(state)
    _, limit, inverse = state.inner_state
    np.testing.assert_allclose(limit, 2 * 1.8 / 0.2 / 0.01, rtol=1e-3)
    np.testing.assert_allclose(inverse["w"], 1, rtol=1e-3)


# Closed forms


def test_closed_forms_are_where_roots_leave_the_unit_circle(eps):
    """Of the characteristic polynomials in z, by eigenvalues, just below and just above."""
    rng = np.random.default_rng(0)
    for rate, beta in zip(10 ** rng.uniform(-4, 2, 20), rng.uniform(0, 0.99, 20), strict=True):
        polynomials = [
            (sg.gradient_descent_limit(rate), lambda q: [1, -q]),
            (sg.heavy_ball_limit(rate, beta), lambda q, b=beta: [1, -(b + q), b]),
            (sg.nesterov_limit(rate, beta), lambda q, b=beta: [1, -(1 + b) * q, b * q]),
        ]
        for limit, polynomial in polynomials:
            near = 1e-3 + 100 * eps
            below, above = (
                np.abs(np.roots(polynomial(1 - rate * float(limit) * side))).max()
                for side in (1 - near, 1 + near)
            )
            assert below < 1 < above


def test_row_budgets_are_never_negative():
    budgets = row_budgets(2.0, jnp.asarray([1.0, 2.0, 3.0]), 0.5)
    np.testing.assert_array_equal(budgets, [0.5, 0.0, 0.0])


@pytest.mark.once
@pytest.mark.parametrize("rate", [0.0, -1.0, np.nan, np.inf])
def test_rates_must_be_positive(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        sg.gradient_descent_limit(rate)


@pytest.mark.once
def test_momentum_must_be_a_fraction():
    with pytest.raises(ValueError, match="momentum"):
        sg.heavy_ball_limit(0.1, 1.5)
