import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smallgain_jax.throttling import STATIC, throttle
from tests.compiling import jit_well
from tests.products import exact


def quadratics(num, dim=12, seed=0):
    """Random positive definite H [num, dim, dim]; starts; rates of 1 to 1,000 times 2/L; cond."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((num, dim, dim)))[0]
    cond, top = 10 ** rng.uniform(0, 4, num), 10 ** rng.uniform(-2, 2, num)
    exponents = rng.uniform(0, 1, (num, dim))
    exponents[:, :2] = [0, 1]
    values = top[:, None] * cond[:, None] ** -exponents
    hessian = (basis * values[:, None, :]) @ basis.transpose(0, 2, 1)
    rate = 2 / top * 10 ** rng.uniform(0, 3, num)
    return (hessian + hessian.transpose(0, 2, 1)) / 2, rng.standard_normal((num, dim)), rate, cond


def gradient_norms(make, hessian, start, rate, steps):
    """||g_t|| [steps] on x'Hx/2."""
    optimizer = make(rate)

    def step(carry, _):
        x, state = carry
        gradient = exact(jnp.matmul)(hessian, x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), jnp.linalg.norm(gradient)

    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[1]


@pytest.mark.once
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_quadratic_converges(order):
    problems = [jnp.asarray(array, float) for array in quadratics(1000)[:3]]
    cond = quadratics(1000)[3]
    make = lambda rate: throttle(optax.sgd(rate), rate, order=order, tolerance=None)
    run = jit_well(jax.vmap(partial(gradient_norms, make, steps=5000)))
    norms = np.asarray(run(*problems))
    relative = norms / norms[:, :1]
    assert np.isfinite(relative).all()
    reached = (relative <= 1e-3).any(axis=1)
    assert reached.all()
    # no more steps than gradient descent at 1.5/L takes in the flattest direction, and a start
    assert ((relative <= 1e-3).argmax(axis=1) <= 150 + np.log(1e3) / 1.5 * cond).all()
    # an underestimated curvature lets the gradient rise, by a factor and not without end
    assert relative.max() < 10


@pytest.mark.once
def test_by_default_hardly_a_quadratic_stays_above():
    problems = [jnp.asarray(array, float) for array in quadratics(1000)[:3]]
    make = lambda rate: throttle(optax.sgd(rate), rate)
    norms = np.asarray(jit_well(jax.vmap(partial(gradient_norms, make, steps=5000)))(*problems))
    relative = norms / norms[:, :1]
    assert np.isfinite(relative).all()
    # a growth that stays below the tolerance is never answered
    assert (relative <= 1e-3).any(axis=1).mean() >= 0.997
    assert relative.max() < 50


@pytest.mark.once
@pytest.mark.parametrize("base", [optax.sgd, optax.adam])
def test_noise_of_batches_costs_nothing(base):
    rng = np.random.default_rng(0)
    x, solution = jnp.asarray(rng.standard_normal((512, 8))), jnp.arange(8.0)
    y = x @ solution + jnp.asarray(rng.standard_normal(512))
    batches = jnp.asarray(rng.integers(0, 512, (1500, 8)))
    loss = lambda w, rows: jnp.mean((x[rows] @ w - y[rows]) ** 2)

    def end(optimizer):
        def step(carry, rows):
            w, state = carry
            updates, state = optimizer.update(jax.grad(loss)(w, rows), state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), jnp.linalg.norm(w - solution)

        start = jnp.zeros(8)
        distance = jax.lax.scan(step, (start, optimizer.init(start)), batches)[1]
        return float(distance[-300:].mean())

    rate = 0.03
    alone, throttled = end(base(rate)), end(throttle(base(rate), None))
    formula = end(throttle(base(rate), None, tolerance=None))
    assert throttled <= 1.05 * alone
    assert formula > 1.5 * alone  # what the tolerance is for


@pytest.mark.once
@pytest.mark.parametrize(
    ("rows", "unknowns", "base", "accumulated"),
    [(1, 20, "sgd", 1), (1, 1, "sgd", 1), (4, 20, "sgd", 4), (1, 20, "adam", 1)],
)
def test_noise_above_the_gradient_does_not_stop_training(rows, unknowns, base, accumulated):
    rng = np.random.default_rng(1)
    x = 1 + rng.standard_normal((4096, unknowns))
    y = x @ rng.standard_normal(unknowns) + 0.3 * rng.standard_normal(4096)
    x, y = jnp.asarray(x), jnp.asarray(y)
    batches = jnp.asarray(rng.integers(0, 4096, (2, 3000, rows)))
    loss = lambda w, rows: jnp.mean((x[rows] @ w - y[rows]) ** 2)
    rate = {"sgd": 0.01, "adam": 0.02}[base]
    inner = {"sgd": optax.sgd, "adam": optax.adam}[base](rate)
    if accumulated > 1:
        inner = optax.MultiSteps(inner, accumulated).gradient_transformation()

    def end(optimizer, batches):
        def step(carry, rows):
            w, state = carry
            updates, state = optimizer.update(jax.grad(loss)(w, rows), state, w)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.zeros(unknowns)
        w = jax.lax.scan(step, (start, optimizer.init(start)), batches)[0][0]
        return loss(w, jnp.arange(4096))

    measured = throttle(inner, rate if base == "sgd" else None)
    for part in batches:
        assert end(measured, part) <= 1.2 * end(inner, part)


@pytest.mark.once
def test_rare_large_gradients_do_not_stop_training():
    """One row in thirty is a positive: most gradients are near 0, and a few are large."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((256, 10))
    score = x @ rng.standard_normal(10)
    x, y = jnp.asarray(x), jnp.asarray(score > np.quantile(score, 0.97), float)
    rows = jnp.asarray(rng.integers(0, 256, (4000, 1)))

    def loss(w, x, y):
        return jnp.mean(optax.sigmoid_binary_cross_entropy(x @ w - 3, y))

    def end(optimizer):
        def step(carry, at):
            w, state = carry
            updates, state = optimizer.update(jax.grad(loss)(w, x[at], y[at]), state, w)
            return (optax.apply_updates(w, updates), state), None

        start = jnp.zeros(10)
        (w, state), _ = jax.lax.scan(step, (start, optimizer.init(start)), rows)
        return loss(w, x, y), state

    throttled, state = end(throttle(optax.sgd(0.3), 0.3))
    assert throttled <= 1.2 * end(optax.sgd(0.3))[0]
    assert state.alpha > 0.5


@pytest.mark.once
def test_gradients_of_zero_teach_nothing():
    """Nine updates in ten have none: the others go as if these had not been."""
    rng = np.random.default_rng(5)
    optimizer = throttle(optax.sgd(0.1), 0.1)
    x, step = jnp.ones(6), jax.jit(optimizer.update)
    states = {every: (x, optimizer.init(x)) for every in (1, 10)}
    for _ in range(200):
        noise = jnp.asarray(rng.standard_normal(6))
        for every, (x, state) in states.items():
            if every == 10:
                for _ in range(9):
                    updates, state = step(jnp.zeros(6), state, x)
                    assert (updates == 0).all()
            updates, state = step(x + noise, state, x)
            states[every] = (x + updates, state)
    (_, one), (_, other) = states.values()
    assert one.alpha > 0.1
    np.testing.assert_allclose(other.alpha, one.alpha, rtol=0.3)


@pytest.mark.once
@pytest.mark.parametrize("turns", [False, True])
def test_a_large_gradient_lasts_only_where_it_turns(turns):
    rng = np.random.default_rng(4)
    optimizer = throttle(optax.sgd(1.0), 1.0)
    update, x = jax.jit(optimizer.update), jnp.zeros(50)
    state = optimizer.init(x)
    way = jnp.asarray(rng.standard_normal(50))
    for t in range(60):
        noise = jnp.asarray(rng.standard_normal(50))
        updates, state = update((-1.0) ** t * way if turns else noise, state, x)
        x = x + updates
    alpha, quiet = state.alpha, state.quiet_norm
    large = 1000 * (way if turns else noise)
    updates, state = update(large, state, x)
    if turns:
        assert state.alpha < 0.01 * alpha
    else:
        assert alpha <= state.alpha <= 1.1 * alpha
        length = jnp.linalg.norm(updates)
        np.testing.assert_allclose(length, 5 * quiet * state.alpha, rtol=1e-4)


def test_growth_is_by_the_formula():
    rng = np.random.default_rng(2)
    grads = rng.standard_normal((40, 6))
    optimizer = throttle(optax.sgd(1.0), 1.0, growth=0.2, tolerance=1e6)
    update, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros(6))
    x, alphas, cosine = jnp.zeros(6), [], -1.0
    for t, gradient in enumerate(grads):
        updates, state = update(jnp.asarray(gradient), state, x)
        x = x + updates
        if t:
            a, b = grads[t - 1], gradient
            now = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            cosine += 0.1 * (now - cosine)
            room = (1 - cosine**2) * (cosine + 0.36) / 1.36 if min(now, cosine) > -0.36 else 0
            np.testing.assert_allclose(state.alignment, cosine, rtol=1e-4, atol=1e-5)
            secant = 1.5 / max(state.gradient_lipschitz, state.gradient_lipschitz_ema)
            if t > 1:
                expected = min(1, max(alphas[-1] * (1 + 0.2 * room), secant))
                np.testing.assert_allclose(state.alpha, expected, rtol=1e-4)
        alphas.append(float(state.alpha))
    assert max(alphas[2:]) > 1.5 * alphas[1]


@pytest.mark.once
def test_plain_descent_converges_on_no_quadratic_above_the_limit():
    problems = [jnp.asarray(array, float) for array in quadratics(1000)[:3]]
    run = jit_well(jax.vmap(partial(gradient_norms, optax.sgd, steps=5000)))
    norms = np.asarray(run(*problems))
    assert not (norms[:, -1] < norms[:, 0]).any()


def trees(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {"w": make(6, 5), "b": make(5)}


@pytest.mark.once
@pytest.mark.parametrize(
    ("dtype", "base"),
    [("float32", "sgd"), ("float32", "adam"), ("bfloat16", "momentum"), ("bfloat16", "adam")],
)
def test_direction_is_the_base_optimizers(dtype, base):
    rate = 3.0
    bases = {"sgd": optax.sgd(rate), "momentum": optax.sgd(rate, 0.9), "adam": optax.adam(rate)}
    inner = bases[base]
    optimizer = throttle(inner, rate)
    params = trees(dtype)
    both = jax.jit(
        lambda g, s, p: (inner.update(g, s.base_state, p)[0], *optimizer.update(g, s, p))
    )
    state = optimizer.init(params)
    for _ in range(12):
        grads = jax.tree.map(lambda leaf: (leaf**3).astype(leaf.dtype), params)
        raw, updates, state = both(grads, state, params)
        a, b = (
            np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
            for tree in (raw, updates)
        )
        assert 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) < 1e-6
        alpha = float(state.alpha)
        applied = 2.0 ** np.floor(np.log2(alpha)) if dtype == "bfloat16" else alpha
        # an update whose gradient does not turn may be clipped besides
        factor = a @ b / (a @ a)
        np.testing.assert_allclose(b, factor * a, rtol=1e-3, atol=1e-7)
        assert 0 < factor <= 1.001 * applied
        assert 0 < state.alpha <= 1
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)


def test_secant_and_control_against_numpy():
    rng = np.random.default_rng(0)
    params, grads = rng.standard_normal((2, 30, 4))
    rate, chi, ema = 0.7, 1.5, 0.05
    optimizer = throttle(optax.sgd(rate), rate, chi=chi, ema=ema, tolerance=None)
    update = jax.jit(optimizer.update)
    state = optimizer.init(jnp.zeros(4))
    average = None
    for t in range(30):
        _, state = update(jnp.asarray(grads[t]), state, jnp.asarray(params[t]))
        if t == 0:
            continue
        secant = np.linalg.norm(grads[t] - grads[t - 1]) / np.linalg.norm(params[t] - params[t - 1])
        average = secant if average is None else (1 - ema) * average + ema * secant
        np.testing.assert_allclose(state.gradient_lipschitz, secant, rtol=1e-4)
        np.testing.assert_allclose(state.gradient_lipschitz_ema, average, rtol=1e-4)
        np.testing.assert_allclose(
            state.alpha, min(1, chi / (rate * max(secant, average))), rtol=1e-4
        )


@pytest.mark.parametrize("order", [1, 2])
def test_integrating_orders_approach_the_set_point_from_below(order):
    rate, curvature, chi = 10.0, 3.0, 1.5
    optimizer = throttle(optax.sgd(rate), rate, chi=chi, order=order, ema=1.0, gain=0.2, growth=0.0)

    def step(carry, t):
        x, state = carry
        # one stiff secant, and a constant curvature ever after
        stiff = jnp.where(t == 3, 1e3, curvature)
        previous = state.previous_params
        grad = state.previous_grad + stiff * (x - previous)
        updates, state = optimizer.update(grad, state, x)
        return (x + updates, state), (state.alpha, state.gradient_lipschitz)

    start = jnp.array([1.0, 2.0])
    run = jax.jit(lambda s: jax.lax.scan(step, (start, s), jnp.arange(120))[1])
    state = optimizer.init(start)
    state = optimizer.update(start, state, start)[1]
    alpha, lipschitz = map(np.asarray, run(state))
    allowed = chi / (rate * np.maximum(lipschitz, 1e-9))
    assert (alpha <= allowed * (1 + 1e-3)).all()
    assert alpha[3] < 0.01 * allowed[10]
    assert alpha[5] < 0.9 * allowed[5]
    np.testing.assert_allclose(alpha[-1], chi / (rate * curvature), rtol=0.02)


def square(params, scale):
    return 0.5 * scale * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("curvature", ["hvp", "power"])
def test_curvature_of_a_given_loss(curvature):
    params = trees()
    optimizer = throttle(optax.sgd(10.0), 10.0, curvature=curvature, loss=square)
    grads = jax.grad(square)(params, 4.0)
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params, term_args=(4.0,))
    np.testing.assert_allclose(state.gradient_lipschitz, 4, rtol=1e-5)
    np.testing.assert_allclose(state.alpha, 1.5 / 40, rtol=1e-5)


def test_same_batch_holds_no_batch_noise():
    params = trees()
    curvatures = {}
    for same in (False, True):
        optimizer = throttle(
            optax.sgd(1e-3), 1e-3, same_batch=same, loss=square if same else None, ema=1.0
        )
        update, state, x = jax.jit(optimizer.update), optimizer.init(params), params
        for scale in (2.0, 5.0):
            grads = jax.grad(square)(x, scale)
            updates, state = update(grads, state, x, term_args=(jnp.asarray(scale),))
            x = optax.apply_updates(x, updates)
        curvatures[same] = float(state.gradient_lipschitz)
    np.testing.assert_allclose(curvatures[True], 5, rtol=1e-2)
    assert curvatures[False] > 100


def test_hold_lasts_until_the_gradient_grows():
    optimizer = throttle(optax.sgd(1.0), 1.0, tolerance=3.0, ema=1.0)
    update = jax.jit(optimizer.update)
    x = jnp.array([0.0])
    state = optimizer.init(x)
    alphas = []
    # secants 1, 1, 50, 50 ; the last gradient is beyond three times the first
    for position, gradient in ((0, 1.0), (2.1, -1.1), (4.4, 1.2), (4.458, -1.7), (4.576, 4.2)):
        _, state = update(jnp.array([gradient]), state, jnp.array([position]))
        alphas.append(float(state.alpha))
    assert alphas[1] == alphas[2] == alphas[3] == 1
    np.testing.assert_allclose(alphas[4], 1.5 / 50, rtol=1e-3)


def test_bad_input_leaves_the_state():
    params = trees()
    optimizer = throttle(optax.adam(0.1), None)
    update = jax.jit(optimizer.update)
    _, state = update(params, optimizer.init(params), params)
    bad_grads = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    infinite = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), params)
    for grads, extra in ((bad_grads, {}), (infinite, {}), (params, {"value": jnp.nan})):
        updates, after = update(grads, state, params, **extra)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
        assert after.skipped == state.skipped + 1
        same = after._replace(skipped=state.skipped)
        jax.tree.map(np.testing.assert_array_equal, same, state)
        state = after


@pytest.mark.once
def test_corrupted_batch_is_survived():
    hessian = jnp.asarray(np.diag([10.0, 3.0, 1.0, 0.3]))
    optimizer = throttle(optax.sgd(5.0), 5.0)

    def step(carry, t):
        x, state = carry
        grad = hessian @ x * jnp.where(t == 100, 1000.0, 1.0) + jnp.where(t > 250, 1.0, 0.0)
        updates, state = optimizer.update(grad, state, x)
        return (optax.apply_updates(x, updates), state), jnp.linalg.norm(grad)

    start = jnp.ones(4)
    run = jax.jit(lambda s: jax.lax.scan(step, (start, s), jnp.arange(900))[1])
    norms = np.asarray(run(optimizer.init(start)))
    assert np.isfinite(norms).all()
    assert norms[250] < 1e-2
    assert norms[-1] < 1e-2


def test_steps_below_the_rounding_are_raised_and_counted():
    params = trees(jnp.bfloat16)
    optimizer = throttle(optax.sgd(1.0), 1.0, chi=0.1, alpha_min=1e-9)
    update = jax.jit(optimizer.update)
    _, state = update(params, optimizer.init(params), params)
    moved = jax.tree.map(lambda leaf: leaf * 1.01, params)
    stiff = jax.tree.map(lambda leaf: leaf * 1e4, params)
    updates, state = update(stiff, state, moved)
    # the probe of the first step was shorter still
    assert state.infeasible == 2
    length = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates))
    size = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moved))
    quantum = float(jnp.finfo(jnp.bfloat16).eps) / 2 * size
    # rounded down to a power of two
    assert 0.5 * quantum <= length <= quantum * 1.01
    # 32-bit leaves have no floor of their own
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, moved, stiff))
    state = update(wide[0], optimizer.init(wide[0]), wide[0])[1]
    assert update(wide[2], state, wide[1])[1].infeasible == 0


def test_schedules_measured_rates_and_wrappers():
    params = trees()
    schedule = lambda count: 10.0 / (1 + count)
    make = lambda rate: throttle(optax.sgd(schedule), rate)
    for optimizer in (make(schedule), make(None)):
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        x = params
        for _ in range(3):
            updates, state = update(x, state, x)
            x = optax.apply_updates(x, updates)
        # gradient of |x|^2/2: curvature 1, and the third update has rate 10/3
        np.testing.assert_allclose(state.alpha, 1.5 / (10 / 3), rtol=1e-3)
    for wrapped in (
        optax.masked(throttle(optax.sgd(1.0), 1.0), {"w": True, "b": False}),
        optax.MultiSteps(throttle(optax.sgd(1.0), 1.0), 2),
        optax.apply_if_finite(throttle(optax.sgd(1.0), 1.0), 3),
        optax.inject_hyperparams(throttle, static_args=STATIC)(optax.sgd(1.0), learning_rate=1.0),
    ):
        state = wrapped.init(params)
        updates, after = jax.jit(wrapped.update)(params, state, params)
        shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert shapes(after) == shapes(state)
        assert shapes(updates) == shapes(params)


def test_zero_gradients_empty_trees_and_errors():
    optimizer = throttle(optax.sgd(1.0), 1.0)
    zero = jnp.zeros(3)
    state = optimizer.init(zero)
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(zero, state, zero)
    assert (updates == 0).all()
    assert state.alpha == 1
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}
    optimizer.init(jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(ValueError, match="params"):
        optimizer.update(zero, state)
    for bad in (
        dict(order=3),
        dict(curvature="x"),
        dict(chi=0.0),
        dict(ema=2.0),
        dict(alpha_min=0.5, alpha_max=0.1),
        dict(tolerance=0.5),
        dict(growth=-0.1),
        dict(quantum=-1.0),
        dict(power_steps=0),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            throttle(optax.sgd(1.0), 1.0, **bad)
    for bad in (dict(curvature="hvp"), dict(same_batch=True)):
        with pytest.raises(ValueError, match="loss"):
            throttle(optax.sgd(1.0), 1.0, **bad)


@pytest.mark.once
def test_state_survives_donation():
    params = trees()
    optimizer = throttle(optax.sgd(0.1), 0.1)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    donated = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        params, state = donated(params, state)
    assert state.count == 3


@pytest.mark.parametrize("curvature", ["secant", "hvp", "power"])
@pytest.mark.parametrize(
    ("scale", "unit"), [(1e-36, 1), (1e-30, 1e-5), (1e-16, 1e-16), (1e20, 1e-20), (1e36, 1)]
)
def test_any_scale_of_gradients_and_parameters(curvature, scale, unit):
    scale = jnp.asarray(scale, jnp.float32)
    # curvature `scale` at a rate of ten times its limit: after the first answers alpha = 1.5 / 20
    loss = lambda x: scale * jnp.sum(x**2) / 2
    optimizer = throttle(
        optax.sgd(20 / scale), 20 / scale, loss=None if curvature == "secant" else loss,
        curvature=curvature,
    )  # fmt: skip
    x = jnp.asarray([unit, -2 * unit], jnp.float32)
    state, update = optimizer.init(x), jax.jit(optimizer.update)
    for _ in range(3):
        before = x
        updates, state = update(jax.grad(loss)(x), state, x)
        x = optax.apply_updates(x, updates)
    assert state.skipped == 0
    np.testing.assert_allclose(state.gradient_lipschitz / scale, 1, rtol=1e-3)
    np.testing.assert_allclose(state.alpha, 0.075, rtol=1e-3)
    # 1 - 0.075 x 20: the update itself arrives, too
    np.testing.assert_allclose(x, -before / 2, rtol=1e-2)


@pytest.mark.once
def test_an_update_without_a_secant_leaves_the_next_one_a_probe():
    optimizer = throttle(optax.sgd(100.0), 100.0)
    update, x = jax.jit(optimizer.update), jnp.array([1.0, -2.0])
    state = optimizer.init(x)
    for gradient, length in [(0 * x, 0), (2 * x, 1e-3 * (1 + np.sqrt(5)))]:
        updates, state = update(gradient, state, x)
        np.testing.assert_allclose(jnp.linalg.norm(updates), length, rtol=1e-5)
    # and the curvature of a straight line is one that was seen: 0
    for _ in range(3):
        x = optax.apply_updates(x, updates)
        updates, state = update(gradient, state, x)
    assert state.alpha == 1


@pytest.mark.once
@pytest.mark.parametrize("curvature", ["secant", "power"])
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_meshes(kind, curvature):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    loss = lambda p: jnp.sum(p["w"] ** 2) + 3 * jnp.sum(p["b"] ** 2)
    plain = {"w": jnp.ones((8, 4)), "b": jnp.ones(8)}
    optimizer = throttle(optax.sgd(1.0, momentum=0.5), 1.0, curvature=curvature, loss=loss)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def run(params):
        state = optimizer.init(params)
        for _ in range(4):
            params, state = step(params, state)
        return params, state.alpha

    expected, alpha = run(plain)
    with jax.set_mesh(mesh):
        params, found = run(jax.device_put(plain, jax.sharding.PartitionSpec("rows")))
        assert params["w"].sharding.spec[0] == "rows"
    np.testing.assert_allclose(found, alpha, rtol=1e-5)
    np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("curvature", ["secant", "hvp", "power"])
def test_no_nan_and_no_infinity_on_the_way(curvature):
    optimizer = throttle(optax.sgd(1.0), 1.0, curvature=curvature, loss=lambda x: jnp.sum(x**2))
    x = jnp.ones(3)
    with jax.debug_nans(True), jax.debug_infs(True):
        state = optimizer.init(x)
        for update in (optimizer.update, jax.jit(optimizer.update)):
            updates, state = update(2 * x, state, x)
            x = optax.apply_updates(x, updates)
    assert np.isfinite(x).all()


@pytest.mark.once
@pytest.mark.parametrize("base", [optax.adam(0.1), optax.lion(0.1)], ids=["adam", "lion"])
def test_a_rate_that_is_none_is_told(base):
    with pytest.warns(UserWarning, match="learning_rate=None"):
        throttle(base, 0.1).init(trees())


@pytest.mark.once
def test_a_rate_behind_a_clip_is_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        throttle(optax.chain(optax.clip(1.0), optax.sgd(0.1, 0.9)), 0.1).init(trees())
        throttle(optax.adam(0.1), None).init(trees())


@pytest.mark.once
def test_a_batch_that_the_loss_lacks_is_named():
    params = trees()
    optimizer = throttle(
        optax.sgd(0.1), 0.1, loss=lambda p, x: jnp.sum(p["a"]) * x, same_batch=True
    )
    state = optimizer.init(params)
    with pytest.raises(TypeError, match=r"loss: .*'x'.*term_args="):
        optimizer.update(params, state, params)
