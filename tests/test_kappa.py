from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.networks.certificate import lipschitz_certificate
from smallgain_jax.networks.kappa import STATIC, kappa_budget
from smallgain_jax.networks.layers import Layer, convolution, find_layers, matrix_layers
from smallgain_jax.spectral.norms import coarse_bound, spectral_bound

SHAPES = {"a": (12, 8), "b": (12, 12), "c": (5, 12)}
NETWORK = {"in": (6, 8), "out": (8, 2)}


def weights(seed=0, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    make = lambda shape: (scale * rng.standard_normal(shape)).astype(dtype)
    return {name: {"w": make(shape), "bias": make(shape[:1])} for name, shape in SHAPES.items()}


def exact_product(params):
    """Product of spectral norms by SVD in float64; leaves may have leading axes."""
    values = [np.asarray(layer["w"], np.float64) for layer in params.values()]
    return np.prod([np.linalg.svd(w, compute_uv=False)[..., 0] for w in values], axis=0)


@pytest.mark.parametrize("shape", [(8, 8), (5, 17), (17, 5), (1, 6), (1, 1)])
def test_bounds_enclose_the_spectral_norm(shape):
    rng = np.random.default_rng(1)
    plain = rng.standard_normal((40, *shape))
    low = rng.standard_normal((40, shape[0], 1)) * rng.standard_normal((40, 1, shape[1]))
    scales = 10.0 ** rng.uniform(-12, 12, (80, 1, 1))
    matrices = jnp.asarray(np.concatenate([plain, low]) * scales)
    norms = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)[:, 0]
    bound = jax.jit(jax.vmap(spectral_bound))(matrices)
    assert (np.asarray(bound.upper, np.float64) >= norms).all()
    assert (np.asarray(bound.lower, np.float64) <= norms).all()
    # a factorization that failed is itself a proof that the norm is larger
    lower, upper = (np.asarray(side, np.float64) for side in (bound.lower, bound.upper))
    proven = np.maximum(1.01 * lower**2, 4 * norms**2 - 3 * lower**2)
    assert (upper**2 <= 1.0001 * proven).all()
    assert np.median(np.asarray(bound.upper) / norms) < 1.006
    assert (np.asarray(jax.jit(jax.vmap(coarse_bound))(matrices), np.float64) >= norms).all()


def test_bounds_of_degenerate_matrices():
    cases = jnp.stack([jnp.zeros((4, 4)), jnp.eye(4), jnp.ones((4, 4)), -3 * jnp.eye(4)])
    bound = jax.jit(jax.vmap(spectral_bound))(cases)
    assert bound.upper[0] == bound.lower[0] == 0
    np.testing.assert_allclose(bound.upper[1:], [1, 4, 3], rtol=6e-3)
    # a start without a share in the top direction proves nothing, and the bound still holds
    blind = jax.jit(spectral_bound)(jnp.diag(jnp.array([5.0, 1.0])), jnp.array([0.0, 1.0]))
    assert blind.upper >= 5
    assert blind.lower <= 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("dtype", "projection", "policy", "every"),
    [
        ("float32", "clip", "fair", 1),
        ("bfloat16", "clip", "fair", 1),
        ("float32", "scale", "greedy", 7),
        ("bfloat16", "soft", "uniform", 1),
    ],
)
def test_product_of_exact_norms_stays_below_the_budget(dtype, projection, policy, every):
    steps = 250  # bench/throttle.py goes to 2,000
    start = jax.tree.map(lambda w: w.astype(dtype), weights())
    targets = jax.tree.map(lambda w: w.astype(dtype), weights(1, scale=3.0))

    def run(l_max, start):
        optimizer = optax.chain(
            optax.sgd(0.1, momentum=0.8),
            kappa_budget(l_max, projection=projection, policy=policy, every=every),
        )

        def step(carry, key):
            params, state = carry
            noise = jax.tree.map(lambda w: jax.random.normal(key, w.shape, w.dtype), params)
            grads = jax.tree.map(lambda w, t, n: w - t + n, params, targets, noise)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, state[1].info)

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (start, optimizer.init(start)), keys)[1]

    budgets = np.array([1.0, 4.0, 16.0], np.float32)
    train = jax.jit(run)
    history, info = jax.tree.map(lambda *a: np.stack(a), *[train(b, start) for b in budgets])
    product = exact_product(history)
    assert product.shape == (3, steps)
    assert (product <= budgets[:, None] * (1 + 1e-4)).all()
    bounds = np.asarray(info.bounds, np.float64)
    assert (product <= bounds.prod(-1) * (1 + 1e-5)).all()
    assert (bounds <= np.asarray(info.kappas, np.float64) * (1 + 1e-6)).all()
    assert (np.asarray(info.kappas, np.float64).prod(-1) <= budgets[:, None] * (1 + 1e-5)).all()
    if projection != "soft" and every == 1:
        # the budget is used, not merely respected; between certifications every step costs some
        assert (np.median(product[:, -100:], axis=1) > 0.6 * budgets).all()


@pytest.mark.parametrize("projection", ["scale", "clip"])
def test_what_is_allowed_passes_bit_for_bit(projection):
    params = jax.tree.map(jnp.asarray, weights(scale=0.1))
    updates = jax.tree.map(jnp.asarray, weights(2, scale=0.01))
    optimizer = kappa_budget(1e3, projection=projection)
    state = optimizer.init(params)
    for _ in range(2):
        passed, state = jax.jit(optimizer.update)(updates, state, params)
        jax.tree.map(np.testing.assert_array_equal, passed, updates)
        assert not state.info.acted.any()
        np.testing.assert_allclose(state.info.cosine, 1, rtol=1e-5)


def test_clip_cuts_only_what_exceeds():
    params = {"w": jnp.zeros((6, 4))}
    left, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 4)))
    right, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))
    raw = {"w": jnp.asarray(left @ np.diag([8.0, 3.0, 1.0, 0.5]) @ right.T, jnp.float32)}
    optimizer = kappa_budget(2.0, projection="clip")
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    # the singular vectors converge over the updates
    for _ in range(4):
        cut, state = update(raw, state, params)
    expected = left @ np.diag([2.0, 2.0, 1.0, 0.5]) @ right.T
    np.testing.assert_allclose(cut["w"], expected, atol=0.03)
    assert state.info.acted.all()
    assert 0 < state.info.cosine < 1


def test_allocation_follows_the_pressure():
    params = {k: jnp.eye(4) for k in "abc"}
    optimizer = kappa_budget(1.0, ema=1.0, projection="scale")
    state = optimizer.init(params)
    raw = jax.tree.map(lambda w: 2 * w, params)
    grad = {"a": -10 * jnp.eye(4), "b": -jnp.eye(4), "c": jnp.eye(4)}
    _, state = jax.jit(optimizer.update)(raw, state, params, grad=grad)
    kappas = np.asarray(state.info.kappas)
    assert kappas[0] > kappas[1] > kappas[2]
    assert kappas[2] >= 0.25 * (1 - 1e-4)
    np.testing.assert_allclose(kappas.prod(), 1, rtol=1e-4)
    assert (np.asarray(state.info.pressure) >= 0).all()


def test_convolution_bound_holds_for_the_operator():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 2, 3, 3))
    layer = matrix_layers((jax.tree_util.GetAttrKey("weight"),), kernel)
    assert layer.gain == 3
    size, operator = 6, np.zeros((3, 6, 6, 2, 6, 6))
    for dy in range(3):
        for dx in range(3):
            for y in range(size):
                for x in range(size):
                    operator[:, y, x, :, (y + dy) % size, (x + dx) % size] += kernel[:, :, dy, dx]
    exact = np.linalg.norm(operator.reshape(3 * 36, 2 * 36), 2)
    bound = layer.gain * spectral_bound(layer.matrix(jnp.asarray(kernel))).upper
    assert exact <= bound <= 3 * exact
    # the same operator as Flax stores it
    flax = kernel.transpose(2, 3, 1, 0)
    known = matrix_layers((jax.tree_util.DictKey("kernel"),), flax)
    assert known.gain == 3
    same = known.gain * spectral_bound(known.matrix(jnp.asarray(flax))).upper
    np.testing.assert_allclose(same, bound, rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(("name", "shape"), [("w", (5, 5, 1, 4)), ("kernel", (8, 2, 4))])
def test_a_layout_that_nothing_tells_is_refused(name, shape):
    params = {"layer": {name: jnp.ones(shape)}}
    for ask in (kappa_budget(1.0).init, lipschitz_certificate):
        with pytest.raises(ValueError, match=rf"layers must be given: .*{name}"):
            ask(params)
    told = lambda path, leaf: convolution(leaf, "HWIO")
    assert kappa_budget(1.0, layers=told).init(params).info.bounds.shape == (1,)


@pytest.mark.parametrize("projection", ["scale", "clip", "soft"])
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_squares_that_leave_float32(projection, scale):
    params = {"a": scale * jnp.eye(2, dtype=jnp.float32), "b": jnp.eye(2, dtype=jnp.float32)}
    optimizer = kappa_budget(1.0, projection=projection)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for fill in (0, 1e19, 1.0):
        raw = {key: jnp.full_like(leaf, fill) for key, leaf in params.items()}
        cut, state = update(raw, state, params)
        params = optax.apply_updates(params, cut)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        norms = [np.linalg.norm(np.asarray(leaf, float), 2) for leaf in params.values()]
        assert np.prod(norms) <= 1 + 1e-5
        assert np.isfinite(state.info.cosine)
    assert state.skipped == 0
    # what cancels against 1e25 is gone; the next update of ordinary size is not
    assert np.prod(norms) >= 0.9


@pytest.mark.once
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_meshes(kind):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    rng = np.random.default_rng(0)
    plain = {"w": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32), "b": jnp.ones(8)}
    raw = {"w": 0.1 * plain["w"], "b": plain["b"]}
    optimizer = kappa_budget(1.0)
    update = jax.jit(optimizer.update)
    expected, after = update(raw, optimizer.init(plain), plain)
    with jax.set_mesh(mesh):
        rows = jax.sharding.PartitionSpec("rows")
        params, grown = (jax.device_put(tree, rows) for tree in (plain, raw))
        found, state = update(grown, optimizer.init(params), params)
        update(grown, state, params)
        assert found["w"].sharding.spec[0] == "rows"
        # prices of losses over a mesh: products of two arrays sharded along what is summed
        losses = sg.terms(lambda p: {"u": jnp.sum((p["w"] - 1) ** 2), "v": jnp.sum(p["w"] ** 4)})
        greedy = sg.small_gain(optax.sgd(0.01), losses, policy="greedy")
        shares = [
            jax.jit(greedy.update)(raw, greedy.init(at), at)[1].weights
            for at, raw in ((params, grown), (plain, raw))
        ]
    np.testing.assert_allclose(*shares, rtol=1e-5)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.info.bounds, after.info.bounds, rtol=1e-5)


@pytest.mark.once
def test_no_nan_and_no_infinity_on_the_way():
    params = {k: 3 * jnp.eye(3) for k in "ab"}
    optimizer = kappa_budget(1.0)
    with jax.debug_nans(True), jax.debug_infs(True):
        state = optimizer.init(params)
        for update in (optimizer.update, jax.jit(optimizer.update)):
            cut, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    assert np.isfinite(cut["a"]).all()


@pytest.mark.parametrize("projection", ["scale", "clip", "soft"])
def test_updates_at_the_end_of_the_range(projection, x64):
    most = float(np.finfo(np.float64 if x64 else np.float32).max)
    optimizer = kappa_budget(1.0, projection=projection)
    update = jax.jit(optimizer.update)
    params = {"a": jnp.eye(2), "none": jnp.zeros((0, 2))}
    state = optimizer.init(params)

    def step(params, state, raw):
        raw, state = update({"a": jnp.asarray(raw), "none": params["none"]}, state, params)
        return optax.apply_updates(params, raw), state

    for _ in range(3):
        params, state = step(params, state, most / 3 * np.eye(2))
        assert np.linalg.norm(np.asarray(params["a"], np.float64), 2) <= 1
        assert state.info.bounds[0] <= 1
    assert state.count == 3
    # a norm beyond the largest number is not known: nothing is done, and nothing learnt
    after, skipped = step(params, state, np.full((2, 2), most / 1.5))
    np.testing.assert_array_equal(after["a"], params["a"])
    assert skipped.skipped == 1
    jax.tree.map(np.testing.assert_array_equal, skipped.info, state.info)
    # and as the parameters, which the sampled entries notice
    for entry in (np.nan, np.inf):
        hurt = {**params, "a": params["a"].at[0, 1].set(entry)}
        zero, skipped = update(jax.tree.map(jnp.ones_like, hurt), state, hurt)
        assert not np.any(zero["a"])
        assert skipped.skipped == 1


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_only_floating_matrices_are_projected(dtype):
    params = {"a": jnp.ones((2, 2), dtype)}
    optimizer = kappa_budget(1.0, layers=lambda path, leaf: Layer())
    with pytest.raises(ValueError, match=rf"^layers must be floating.*{dtype}"):
        optimizer.init(params)


def test_layers_by_rule_round_trip():
    leaf = jnp.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    for outputs in ((0,), (1, 2), (-1,), (2, 0)):
        layer = Layer(outputs=outputs)
        np.testing.assert_array_equal(layer.leaf(layer.matrix(leaf), leaf), leaf)
    rule = lambda path, leaf: Layer(order=-path[0].idx) if leaf.ndim == 2 else None
    found = find_layers([jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros((3, 3))], rule)
    assert [index for index, _ in found] == [2, 0]


def test_bad_input_leaves_the_state():
    params = {"w": 3 * jnp.eye(3), "bias": jnp.ones(3)}
    optimizer = kappa_budget(2.0)
    update = jax.jit(optimizer.update)
    _, state = update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for poison in (np.nan, np.inf):
        bad = jax.tree.map(jnp.zeros_like, params)
        bad["w"] = bad["w"].at[0, 0].set(poison)
        zero, after = update(bad, state, params)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(zero))
        assert after.skipped == state.skipped + 1
        jax.tree.map(
            np.testing.assert_array_equal, after._replace(skipped=0), state._replace(skipped=0)
        )
        state = after


def test_foreign_change_is_certified_anew():
    params = {"w": jnp.eye(4)}
    optimizer = kappa_budget(2.0, every=1000)
    update = jax.jit(optimizer.update)
    zero = {"w": jnp.zeros((4, 4))}
    _, state = update(zero, optimizer.init(params), params)
    back, state = update(zero, state, {"w": 10 * jnp.eye(4)})
    assert np.linalg.norm(10 * np.eye(4) + np.asarray(back["w"]), 2) <= 2


@pytest.mark.once
@pytest.mark.parametrize("projection", ["scale", "clip", "soft"])
def test_optax_wrappers(projection):
    params = {"w": jnp.eye(3), "bias": jnp.ones(3)}
    make = partial(kappa_budget, projection=projection)
    mask = {"w": True, "bias": False}
    for wrapped in (
        optax.masked(make(2.0), mask),
        optax.MultiSteps(make(2.0), 2),
        optax.apply_if_finite(make(2.0), 3),
        optax.inject_hyperparams(make, static_args=STATIC)(l_max=2.0),
    ):
        state = wrapped.init(params)
        updates, after = jax.jit(wrapped.update)(params, state, params)
        shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        assert shapes(after) == shapes(state)
        assert shapes(updates) == shapes(params)


@pytest.mark.x64
def test_soft_cap_is_differentiable():
    params = {"w": jnp.eye(3), "v": 2 * jnp.eye(3)}
    optimizer = kappa_budget(2.0, projection="soft")
    state = jax.jit(optimizer.update)(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )[1]

    def after(t):
        raw = jax.tree.map(lambda w: t * w, params)
        updates, _ = optimizer.update(raw, state, params)
        return jnp.sum(optax.apply_updates(params, updates)["w"])

    slope = jax.jit(jax.grad(after))(-0.6)
    assert np.isfinite(slope)
    assert slope > 0


def test_empty_tree_abstract_init_and_errors():
    optimizer = kappa_budget(2.0)
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, weights()))
    optimizer.init(shapes)
    params = {"w": jnp.eye(2)}
    with pytest.raises(ValueError, match="params"):
        optimizer.update(params, optimizer.init(params))
    for bad in (
        dict(l_max=0.0),
        dict(l_max=1.0, policy="x"),
        dict(l_max=1.0, projection="x"),
        dict(l_max=1.0, every=0),
        dict(l_max=1.0, floor=2.0),
        dict(l_max=1.0, ceiling=0.5),
    ):
        with pytest.raises(ValueError, match=next(reversed(bad))):
            kappa_budget(**bad)


@pytest.mark.once
def test_updates_keep_their_dtype():
    params = {"w": jnp.eye(3, dtype=ml_dtypes.bfloat16), "bias": jnp.ones(3, ml_dtypes.bfloat16)}
    updates, state = jax.jit(kappa_budget(1.0).update)(
        params, kappa_budget(1.0).init(params), params
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    assert state.info.bounds.dtype == jnp.float32


@pytest.mark.once
def test_together_with_throttle_and_small_gain():
    rng = np.random.default_rng(4)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in NETWORK.items()}
    x = jnp.asarray(rng.normal(size=(40, 6)), jnp.float32)

    def losses(p, x):
        y = jnp.tanh(x @ p["in"]) @ p["out"]
        return {"fit": jnp.mean((y - jnp.sin(x[:, :2])) ** 2), "stiff": 30 * jnp.mean(y[:5] ** 2)}

    named = sg.terms(losses, names=("fit", "stiff"))
    rate, l_max = 20.0, 2.0

    def run(params, throttled):
        # a wrong limit, for shares within the right one need no throttle
        inner = sg.small_gain(optax.sgd(rate), named, policy="fair", guard=None, limit=1e6)
        inner = sg.throttle(inner, rate) if throttled else inner
        optimizer = optax.chain(inner, kappa_budget(l_max))

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(lambda p: named.values(p, x).sum())(params)
            updates, state = optimizer.update(grads, state, params, term_args=(x,))
            params = optax.apply_updates(params, updates)
            alpha = optax.tree.get(state, "alpha", jnp.ones(()))
            return (params, state), (params, value, alpha, optax.tree.get(state, "weights"))

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[1]

    train = jax.jit(run, static_argnums=1)
    history, value, alpha, weights = train(params, True)
    norms = [np.linalg.norm(np.asarray(w, np.float64), 2, (1, 2)) for w in history.values()]
    assert (np.prod(norms, axis=0) <= l_max * (1 + 1e-4)).all()
    assert np.isfinite(value).all()
    assert (alpha < 1).any()
    assert ((weights[-1] > 0) & np.isfinite(weights[-1])).all()
    assert weights[-1, 0] > weights[-1, 1]
    # without the throttle the rail holds too, but the loss does not come down as far
    assert value[-1] < min(0.5 * value[0], train(params, False)[1][-1])
