"""Penalties where they are used: in energy graphs, in least squares, as losses of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import smallgain_jax as sg
from smallgain_jax.penalties import (
    Hoyer,
    JumpReLU,
    LogSparsity,
    OnNodes,
    SmoothedL1,
    SoftmaxEntropy,
    TopK,
    jumprelu,
    reweighted_least_squares,
)

N, E = 12, 30
ROWS = np.arange(N).reshape(3, 4)
NON_CONVEX = {
    "log": lambda: LogSparsity(0.7, weight=0.8),
    "hoyer": lambda: Hoyer(weight=3.0),
    "top_k": lambda: OnNodes(TopK(2), ROWS),
    "entropy": lambda: OnNodes(SoftmaxEntropy(4, 0.8), ROWS),
    "jumprelu": lambda: JumpReLU(np.linspace(0.2, 2, 4), 0.25),
}
each = pytest.mark.parametrize("name", NON_CONVEX)
RATE, TARGET, RHO, ETA, FLOOR = 0.1, 0.9, 0.7, 0.1, 0.1


def problem(name, starts, dtype):
    """Denoising on a random graph under a penalty, and starts; vector nodes for JumpReLU."""
    rng = np.random.default_rng(20)
    shape = ROWS.shape if name == "jumprelu" else (N,)
    i = rng.integers(0, shape[0], E)
    j = (i + rng.integers(1, shape[0], E)) % shape[0]
    edges = [
        sg.Quadratic(i[:20], j[:20], rng.uniform(0.05, 0.5, 20)),
        sg.DirectedHinge(i[20:], j[20:], rng.uniform(0.05, 0.5, 10)),
    ]
    data = sg.Landau(a=np.full(shape, 0.5), target=rng.normal(size=shape))
    graph = sg.EnergyGraph([data, NON_CONVEX[name]()], edges, num_nodes=shape[0])
    return graph, jnp.asarray(rng.normal(size=(starts, *shape)) * 1.5, dtype)


@pytest.fixture
def dtype(x64):
    return jnp.dtype("float64" if x64 else "float32")


def never_increases(values, eps):
    values = np.asarray(values)
    assert np.all(np.diff(values, axis=1) <= 4 * eps * np.abs(values[:, :-1]))
    assert np.all(values[:, -1] < values[:, 0])


# --- in an energy graph --------------------------------------------------------------------------


@each
@pytest.mark.x64
def test_row_sums_contain_the_majorizer(name, dtype):
    graph, x = problem(name, 300, dtype)

    @jax.jit
    @jax.vmap
    def at(x):
        curvature = graph.curvature(x)
        edges = graph.scatter(curvature.edge_cost)
        rows = [local.majorizer_diagonal(x) for local in graph.local]
        return curvature, edges, rows, jax.hessian(graph.energy)(x)

    curvature, edges, (data, penalty), hessian = at(x)
    np.testing.assert_allclose(curvature.local_rows, data + penalty, rtol=1e-12)
    np.testing.assert_allclose(curvature.row_sums, data + penalty + edges, rtol=1e-12)
    assert np.all(np.asarray(penalty) >= 0)
    assert np.any(np.asarray(penalty) > 0)
    rows = np.asarray(curvature.row_sums).reshape(300, -1)
    hessian = np.asarray(hessian).reshape(300, rows.shape[1], rows.shape[1])
    gap = rows[:, :, None] * np.eye(rows.shape[1]) - hessian
    assert np.linalg.eigvalsh(gap).min() >= -1e-12 * rows.max()
    assert np.all(np.asarray(curvature.lipschitz) >= np.linalg.eigvalsh(hessian)[:, -1])


@pytest.mark.x64
def test_some_of_these_energies_are_not_convex(dtype):
    """Otherwise nothing here would be about non-convex penalties."""
    for name in ("log", "hoyer", "entropy", "jumprelu"):
        rng = np.random.default_rng(21)
        shape = ROWS.shape if name == "jumprelu" else (N,)
        x = jnp.asarray(rng.normal(size=(50, *shape)), dtype)
        hessian = np.asarray(jax.jit(jax.vmap(jax.hessian(NON_CONVEX[name]())))(x))
        assert np.linalg.eigvalsh(hessian.reshape(50, N, N)).min() < -0.05


@each
def test_relax_never_increases(name, dtype, eps):
    graph, x = problem(name, 6, dtype)
    result = jax.jit(jax.vmap(lambda x: sg.relax(graph, x, steps=30, bounds=(-3.0, 3.0))))(x)
    assert result.x.dtype == dtype
    never_increases(result.energy, eps)


@pytest.mark.once
@each
def test_small_gain_never_increases_and_keeps_its_budgets(name, dtype, eps):
    check_small_gain(name, "measured", dtype, eps)


@each
@pytest.mark.x64
def test_so_does_small_gain_with_the_majorizer_as_guard(name, dtype, eps):
    check_small_gain(name, "majorized", dtype, eps)


def check_small_gain(name, guard, dtype, eps):
    graph, x = problem(name, 6, dtype)
    optimizer = sg.small_gain(
        optax.sgd(RATE),
        graph,
        guard=guard,
        target=TARGET,
        budget_fraction=RHO,
        max_step_change=ETA,
        floor=FLOOR,
        smoothing=None,
    )

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(graph.gradient(x), state, x)
        lower = jnp.maximum(FLOOR, (1 - ETA) * state.previous_weights)
        least = graph.curvature(x, lower).row_sums
        out = graph.energy(x), state.info.spent_rows, least, state.info.limit, state.info.accepted
        return (optax.apply_updates(x, updates), state), out

    @jax.jit
    @jax.vmap
    def run(x):
        (end, _), path = jax.lax.scan(step, (x, optimizer.init(x)), length=25)
        return graph.energy(end), path

    end, (values, spent, least, limit, accepted) = jax.tree.map(np.asarray, run(x))
    never_increases(np.concatenate([values, end[:, None]], axis=1), eps)
    assert np.all(accepted[:, 0])
    np.testing.assert_allclose(limit, 2 / RATE, rtol=1e-6)
    budget = RHO * np.maximum(TARGET * 2 / RATE - least, 0)
    assert np.all(spent <= budget + 100 * eps * 2 / RATE)
    assert np.any(spent > 0)


# --- on some nodes -------------------------------------------------------------------------------


@pytest.mark.x64
def test_nodes_may_be_left_out_and_shared():
    """Rows 0..3, 2..5 of ten nodes: against the Hessian, and against the rows one by one."""
    nodes = np.array([[0, 1, 2, 3], [2, 3, 4, 5]])
    penalty = SoftmaxEntropy(4, 0.8)
    local = OnNodes(penalty, nodes)
    assert isinstance(local, sg.LocalEnergy)
    x = np.random.default_rng(22).normal(size=(200, 10))
    one = jax.jit(
        jax.vmap(lambda x: (local(x), local.majorizer_diagonal(x), jax.hessian(local)(x)))
    )
    value, rows, hessian = jax.tree.map(np.asarray, one(x))
    a = np.exp(x[:, nodes] / 0.8)
    a /= a.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(value, -(a * np.log(a)).sum(axis=(1, 2)), rtol=1e-12)
    assert np.all(rows[:, 6:] == 0)
    gap = rows[:, :, None] * np.eye(10) - hessian
    assert np.linalg.eigvalsh(gap).min() >= -1e-12


@pytest.mark.once
def test_nodes_of_vectors_and_none():
    x = jnp.asarray(np.random.default_rng(23).normal(size=(4, 3)), jnp.float32)
    local = OnNodes(TopK(1), [1, 3])
    expected = np.zeros((4, 3), bool)
    expected[[1, 3]] = np.asarray(TopK(1).mask(x[jnp.array([1, 3])]))
    empty = OnNodes(LogSparsity(1.0), np.zeros((0,), np.int32))
    rows, value, none = jax.jit(
        lambda x: (local.majorizer_diagonal(x), empty(x), empty.majorizer_diagonal(x))
    )(x)
    np.testing.assert_array_equal(np.asarray(rows) > 0, expected)
    assert value == 0
    assert np.all(np.asarray(none) == 0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        ("penalty", TypeError, lambda: OnNodes(lambda x: x, [0])),
        ("nodes", TypeError, lambda: OnNodes(TopK(1), [0.5])),
        ("nodes", ValueError, lambda: OnNodes(TopK(1), [-1])),
        ("nodes", ValueError, lambda: OnNodes(TopK(1), [3])(jnp.ones(3))),
        ("num_atoms", ValueError, lambda: SoftmaxEntropy(0, exact_rows=False)),
        (
            "penalty",
            TypeError,
            lambda: reweighted_least_squares(TopK(1), jnp.eye(2), jnp.ones(2), jnp.ones(2)),
        ),
        (
            "matrix",
            ValueError,
            lambda: reweighted_least_squares(LogSparsity(1.0), jnp.ones(2), [1.0], [1.0]),
        ),
        (
            "target",
            ValueError,
            lambda: reweighted_least_squares(LogSparsity(1.0), jnp.eye(2), [1.0], [1.0, 1.0]),
        ),
        (
            "x0",
            ValueError,
            lambda: reweighted_least_squares(
                LogSparsity(1.0), jnp.eye(2), [1.0, 1.0], [1.0, np.nan]
            ),
        ),
        (
            "steps",
            ValueError,
            lambda: reweighted_least_squares(
                LogSparsity(1.0), jnp.eye(2), [1.0, 1.0], [1.0, 1.0], steps=-1
            ),
        ),
    ],
)
def test_bad_input_is_named(argument, error, call):
    with pytest.raises(error, match=f"^{argument}"):
        call()


# --- cheap rows for many atoms -------------------------------------------------------------------


@pytest.mark.x64
@pytest.mark.parametrize("atoms", [1, 2, 5, 33])
def test_cheap_entropy_rows_bound_the_exact_ones(atoms):
    rng = np.random.default_rng(24)
    x = rng.normal(size=(2000, atoms)) * 10 ** rng.uniform(-2, 2, (2000, 1))
    x[:20] = np.round(x[:20])
    exact, cheap = SoftmaxEntropy(atoms, 0.8), SoftmaxEntropy(atoms, 0.8, exact_rows=False)
    rows, above, dense = jax.jit(
        jax.vmap(
            lambda x: (
                exact.majorizer_diagonal(x),
                cheap.majorizer_diagonal(x),
                jnp.diag(cheap.row_majorizer(x)),
            )
        )
    )(x)
    np.testing.assert_allclose(rows, dense, atol=1e-12)
    assert np.all(np.asarray(above) >= np.asarray(rows) - 1e-12)
    if atoms <= 2:
        np.testing.assert_allclose(above, rows, atol=1e-7)


# --- iteratively reweighted least squares --------------------------------------------------------

LEAST_SQUARES = {
    "smoothed_l1": lambda: SmoothedL1(0.01, weight=0.5),
    "log": lambda: LogSparsity(0.1, weight=0.1),
}
SIZES = {"tall": (20, 8), "wide": (8, 20)}


def least_squares(size, count, dtype):
    rng = np.random.default_rng(25)
    m, n = SIZES[size]
    a = rng.normal(size=(count, m, n)) / m**0.5
    truth = rng.normal(size=(count, n)) * (rng.uniform(size=(count, n)) < 0.3)
    b = np.einsum("kmn,kn->km", a, truth) + 0.05 * rng.normal(size=(count, m))
    start = rng.normal(size=(count, n))
    return tuple(jnp.asarray(array, dtype) for array in (a, b, start))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_reweighted_least_squares_never_increases(name, size, dtype, eps):
    penalty = LEAST_SQUARES[name]()
    a, b, start = least_squares(size, 40, dtype)
    result = jax.jit(
        jax.vmap(lambda a, b, x: reweighted_least_squares(penalty, a, b, x, steps=60))
    )(a, b, start)
    values = np.asarray(result.values)
    assert values.dtype == dtype
    assert np.all(np.diff(values, axis=1) <= 0)
    # the guard is not what makes it monotone: the plain solves are, up to rounding
    rows = jax.jit(jax.vmap(penalty.majorizer_diagonal))(start)
    normal = np.einsum("kmi,kmj->kij", a, a) + np.asarray(rows)[:, :, None] * np.eye(a.shape[2])
    moved = np.linalg.solve(normal, np.einsum("kmn,km->kn", a, b)[..., None])[..., 0]
    residual = np.einsum("kmn,kn->km", a, moved) - np.asarray(b)
    first = 0.5 * np.sum(residual**2, axis=1) + jax.jit(jax.vmap(penalty))(moved.astype(dtype))
    np.testing.assert_allclose(values[:, 1], first, rtol=2000 * eps)


@functools.cache
def scipy_objective(name):
    penalty = LEAST_SQUARES[name]()

    def objective(x, a, b):
        return 0.5 * jnp.sum((a @ x - b) ** 2) + penalty(x)

    return jax.jit(jax.value_and_grad(objective))


@pytest.mark.x64
@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_reweighted_least_squares_against_scipy(name, dtype):
    penalty, count = LEAST_SQUARES[name](), 20
    a, b, start = least_squares("tall", count, dtype)
    solve = jax.jit(
        jax.vmap(lambda a, b, x: reweighted_least_squares(penalty, a, b, x, steps=2000))
    )
    result = solve(a, b, start)
    assert np.max(np.asarray(result.stationarity)) <= 1e-6
    fun = scipy_objective(name)

    def scipy_from(x, k):
        return scipy.optimize.minimize(
            lambda x: jax.tree.map(np.asarray, fun(x, a[k], b[k])),
            np.asarray(x),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9},
        )

    ours = np.asarray(result.values)[:, -1]
    theirs = [scipy_from(start[k], k) for k in range(count)]
    polished = [scipy_from(result.x[k], k).fun for k in range(count)]
    # there is no way down from where we stop
    np.testing.assert_allclose(polished, ours, rtol=1e-8)
    if name == "smoothed_l1":
        # convex: both find the minimum
        np.testing.assert_allclose([found.fun for found in theirs], ours, rtol=1e-8)
    else:
        # not convex: they may end at different minima, but theirs is one of ours too
        again = solve(a, b, jnp.asarray([found.x for found in theirs]))
        np.testing.assert_allclose(again.values[:, -1], again.values[:, 0], rtol=1e-8)


# --- as a loss of a model ------------------------------------------------------------------------

PIXELS, CODES = 16, 12
JUMP = JumpReLU(np.full(CODES, 0.1), 0.05)
ENTROPY = SoftmaxEntropy(4, 0.5)


def autoencoder(kind):
    """Losses of a sparse autoencoder with one hidden layer, decoder rows of norm one."""

    def losses(params, x):
        z = x @ params["encoder"] + params["bias"][None]
        if kind == "jumprelu":
            penalty = JUMP.with_log_parameters(params["log_thresholds"])
            codes, priced = jumprelu(z, penalty.effective_thresholds, JUMP.eps), penalty(z)
        else:
            rows = z.reshape(x.shape[0], -1, ENTROPY.num_atoms)
            codes = jax.nn.softmax(rows / ENTROPY.temperature).reshape(z.shape)
            priced = ENTROPY(rows)
        decoder = params["decoder"] / jnp.linalg.norm(params["decoder"], axis=1, keepdims=True)
        error = jnp.sum((codes @ decoder + params["mean"][None] - x) ** 2)
        return {"reconstruction": error / x.shape[0], "sparsity": priced / x.shape[0]}

    return sg.terms(losses, names=("reconstruction", "sparsity"))


@pytest.mark.once
@pytest.mark.parametrize("kind", ["jumprelu", "entropy"])
def test_sparse_autoencoder_trains(kind, dtype):
    rng = np.random.default_rng(26)
    atoms = rng.normal(size=(CODES, PIXELS)) / PIXELS**0.5
    x = (rng.uniform(size=(64, CODES)) < 0.2) * rng.uniform(0.5, 1, (64, CODES)) @ atoms
    x = jnp.asarray(x, dtype)
    start = {
        "encoder": atoms.T,
        "decoder": atoms + 0.1 * rng.normal(size=atoms.shape),
        "bias": np.zeros(CODES),
        "mean": np.zeros(PIXELS),
        "log_thresholds": np.zeros(CODES),
    }
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), start)
    model = autoencoder(kind)
    optimizer = sg.small_gain(
        optax.adam(3e-3), model, policy="fair", priorities=(1.0, 1.0), warmup=10, iterations=1
    )

    @jax.jit
    def run(params):
        _, grads = model.value_and_term_grads(params, x)

        def step(carry, _):
            params, state = carry
            gradient = jax.grad(lambda p: jnp.sum(model.values(p, x)))(params)
            updates, state = optimizer.update(gradient, state, params, term_args=(x,))
            return (optax.apply_updates(params, updates), state), model.values(params, x)

        end, values = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
        return end, values, grads

    (params, state), values, grads = run(start)
    values = np.asarray(values)
    assert np.all(np.isfinite(values))
    assert np.all(values[-1] < values[0])
    assert state.info.skipped == 0
    assert np.all(np.asarray(state.weights) > 0)
    by_threshold = np.abs(np.asarray(grads["log_thresholds"]))
    if kind == "jumprelu":
        # both losses reach every threshold
        assert np.all(by_threshold > 0)
        assert np.all(np.asarray(params["log_thresholds"]) != 0)
    else:
        assert np.all(by_threshold == 0)
