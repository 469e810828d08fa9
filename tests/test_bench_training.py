"""The rivals against published values and oracles; the problems against their exact solutions."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import smallgain_jax as sg
from bench.training import (
    advection,
    aggregate,
    allen_cahn,
    burgers,
    digits,
    edge,
    embedded,
    equations,
    grid,
    helmholtz,
    large,
    momentum,
    overhead,
    peers,
    problems,
    quadratics,
    second_order,
    units,
)
from bench.training import report as reporting
from bench.training import run as running
from bench.training.embedded import Size
from bench.training.language import Shape
from bench.training.methods import METHODS
from bench.training.network import derivatives, glorot, tanh_network

# three gradients in the plane and in space: plain, conflicting, repeated, Pareto stationary
JACOBIANS = np.concatenate(
    [
        np.random.default_rng(0).normal(size=(12, 3, 4)),
        np.random.default_rng(1).normal(size=(12, 3, 2)) @ np.eye(2, 4),
        [[[1, 2, 0, 0], [1, 2, 0, 0], [-1, 1, 3, 0]], [[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]]],
    ]
)
GOLDEN = {
    "mgda": (0.0, 1.0),
    "cagrad": (0.1835, 1.2041),
    "config": (0.1588, 2.0706),
    "pcgrad": (0.5848, 3.8012),
    # g1 + g2 22/38 and g2 + g1 22/18, by hand; TorchJD's regularized 0.2929, 1.9004 is near
    "upgrad": ((-4 + 6 * 22 / 38 + 6 - 4 * 22 / 18) / 2, (2 + 22 / 38 + 22 / 18) / 2),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_directions(name, eps):
    jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    rule = getattr(aggregate, name)
    extra = (jax.random.key(0),) if name == "pcgrad" else ()
    direction = np.asarray(jax.jit(rule)(jacobian @ jacobian.T, *extra) @ jacobian)
    first, rest = GOLDEN[name]
    np.testing.assert_allclose(direction, [first, rest, rest], atol=6e-5 + 50 * eps)


def weights_of(rule):
    """Weights [N, K] of a rule on all of the Jacobians."""
    jacobians = jnp.asarray(JACOBIANS, jnp.result_type(float))
    return np.asarray(jax.jit(jax.vmap(lambda j: rule(j @ j.T)))(jacobians), float)


def least_on_simplex(energy, terms=3):
    """Least value on the simplex, by a solver started at several points."""
    starts = [*np.eye(terms), np.full(terms, 1 / terms)]
    sum_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = [
        scipy.optimize.minimize(
            energy,
            0.9 * start + 0.1 / terms,
            method="SLSQP",
            bounds=[(0, 1)] * terms,
            constraints=[sum_to_one],
            options={"ftol": 1e-14, "maxiter": 200},
        ).fun
        for start in starts
    ]
    return min(found)


def test_mgda_is_the_shortest_vector_of_the_hull(eps):
    weights = weights_of(aggregate.mgda)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=10 * eps)
    assert weights.min() >= 0
    for w, jacobian in zip(weights, JACOBIANS):
        best = least_on_simplex(lambda w, j=jacobian: np.sum((w @ j) ** 2))
        assert np.sum((w @ jacobian) ** 2) <= best + 1e-9 + 1e3 * eps


def test_cagrad_reaches_the_best_worst_decrease(eps):
    # strong duality: the least inner product of the primal is the least value of the dual
    weights = weights_of(aggregate.cagrad)
    for w, jacobian in zip(weights, JACOBIANS):
        mean = jacobian.mean(axis=0)
        radius = 0.5 * np.linalg.norm(mean)

        def dual(w, jacobian=jacobian, mean=mean, radius=radius):
            return w @ jacobian @ mean + radius * np.sqrt(np.sum((w @ jacobian) ** 2) + 1e-16)

        direction = w @ jacobian
        assert np.linalg.norm(direction - mean) <= radius * (1 + 1e3 * eps)
        assert np.min(jacobian @ direction) >= least_on_simplex(dual) - 1e-6 - 1e4 * eps


def test_config_makes_one_cosine_with_all(eps):
    # independent gradients, for which such a direction exists
    weights, independent = weights_of(aggregate.config)[:12], JACOBIANS[:12]
    for w, jacobian in zip(weights, independent):
        direction = w @ jacobian
        unit = direction / np.linalg.norm(direction)
        cosines = jacobian @ unit / np.linalg.norm(jacobian, axis=1)
        tolerance = 100 * eps * np.linalg.cond(jacobian @ jacobian.T)
        np.testing.assert_allclose(cosines, cosines[0], atol=tolerance)
        assert cosines[0] > 0
        length = np.linalg.norm(direction)
        np.testing.assert_allclose(length, np.sum(jacobian @ unit), rtol=tolerance)


def test_pcgrad_is_some_order_of_projections(eps):
    # every two conflict, so that the order matters
    jacobian = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-0.5, -1.0, 1.0]])

    def projected(own, order):
        g = jacobian[own]
        for h in jacobian[list(order)]:
            g = g - min(0, g @ h) / (h @ h) * h
        return g

    others = [[k for k in range(3) if k != own] for own in range(3)]
    rows = [[projected(i, order) for order in (o, o[::-1])] for i, o in enumerate(others)]
    possible = [sum(choice) for choice in itertools.product(*rows)]
    keys = jax.random.split(jax.random.key(3), 16)
    gram = jnp.asarray(jacobian @ jacobian.T)
    weights = np.asarray(jax.jit(jax.vmap(aggregate.pcgrad, (None, 0)))(gram, keys), float)
    for direction in weights @ jacobian:
        assert min(np.abs(direction - p).max() for p in possible) < 100 * eps
    assert len({tuple(w.round(4)) for w in weights}) > 1, "the order is random"


def test_upgrad_projects_each_gradient():
    jacobians = JACOBIANS[:8]
    found = np.asarray(
        jax.jit(jax.vmap(lambda j: aggregate.upgrad(j @ j.T)))(jnp.asarray(jacobians, float)), float
    )
    for jacobian, weights in zip(jacobians, found):
        projections = [
            scipy.optimize.minimize(
                lambda d, g=g: ((d - g) ** 2).sum(),
                g,
                jac=lambda d, g=g: 2 * (d - g),
                method="SLSQP",
                constraints={
                    "type": "ineq",
                    "fun": lambda d, j=jacobian: j @ d,
                    "jac": lambda d, j=jacobian: j,
                },
                options={"ftol": 1e-14, "maxiter": 300},
            ).x
            for g in jacobian
        ]
        size = np.linalg.norm(jacobian)
        np.testing.assert_allclose(
            weights @ jacobian, np.mean(projections, axis=0), atol=1e-3 * size
        )


def test_weights_follow_their_formulas(eps):
    values = np.array([[4.0, 0.5, 0.1], [3.0, 0.6, 0.1], [2.0, 0.4, 0.2]])
    rng = np.random.default_rng(5)
    small, large = rng.normal(size=(3, 3, 2)), rng.normal(size=(3, 3, 2, 4))
    flat = np.concatenate([small, large.reshape(3, 3, -1)], axis=2)
    traces = np.array([9.0, 3.0, 0.0])
    rate = 0.1
    rivals = {
        "equal": peers.fixed(),
        "norms": peers.gradient_norms(),
        "slow norms": peers.gradient_norms(every=2),
        "annealing": peers.annealing(),
        "kernel": peers.tangent_kernel(every=2),
        "lookback": peers.relative_lookback(decay=0.9, temperature=2.0, memory=1.0),
        "forgetful": peers.relative_lookback(decay=0.9, temperature=2.0, memory=0.0),
        "softadapt": peers.softadapt(),
        "uncertainty": peers.uncertainty(optax.sgd(rate)),
        "famo": peers.fast_adaptive(rate=0.2, decay=0.1),
        "dual": peers.dual_balancing(),
    }

    @jax.jit
    def play(values, small, large):
        states = {name: peer.init(3) for name, peer in rivals.items()}
        rows = []
        for step in range(3):
            grads = {"a": small[step], "b": large[step]}
            row = {}
            for name, peer in rivals.items():
                sight = peers.Sight(
                    values[step],
                    grads,
                    jnp.int32(step),
                    jax.random.key(step),
                    lambda: jnp.asarray(traces),
                )
                row[name], states[name] = peer.weigh(sight, states[name])
            rows.append(row)
        return jax.tree.map(lambda *x: jnp.stack(x), *rows)

    played = {k: np.asarray(v, float) for k, v in play(values, small, large).items()}

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    def share(x):
        return x.mean() / (x + 1e-5 * x.mean())

    wanted = {name: [] for name in rivals}
    weights = {name: np.ones(3) for name in rivals}
    log_variance = np.zeros(3)
    logits, first, second = np.zeros(3), np.zeros(3), np.zeros(3)
    for step in range(3):
        g, last = flat[step], values[max(step - 1, 0)]
        norms = np.linalg.norm(g, axis=1)
        weights["norms"] = 0.9 * weights["norms"] + 0.1 * share(norms)
        largest = np.abs(g[0]).max() / (weights["annealing"] * np.abs(g).mean(axis=1))
        largest[0] = 1
        weights["annealing"] = 0.9 * weights["annealing"] + 0.1 * largest
        if step % 2 == 0:
            weights["slow norms"] = 0.9 * weights["slow norms"] + 0.1 * share(norms)
            weights["kernel"] = 0.9 * weights["kernel"] + 0.1 * share(traces)
        recent = 3 * softmax(values[step] / (2 * last))
        start = 3 * softmax(values[step] / (2 * values[0]))
        weights["lookback"] = 0.9 * weights["lookback"] + 0.1 * recent
        weights["forgetful"] = 0.9 * start + 0.1 * recent
        change = values[step] - last
        weights["softadapt"] = 3 * softmax(0.1 * change / max(np.abs(change).sum(), 1e-30))
        weights["uncertainty"] = np.exp(-log_variance)
        log_variance = log_variance - rate * (1 - weights["uncertainty"] * values[step])
        if step:
            z = softmax(logits)
            slope = (np.diag(z) - np.outer(z, z)) @ np.log(last / values[step]) + 0.1 * logits
        else:
            slope = np.zeros(3)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        means = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        logits = logits - 0.2 * means[0] / (np.sqrt(means[1]) + 1e-8)
        paces = softmax(logits) / values[step]
        weights["famo"] = paces / paces.sum()
        weights["dual"] = (norms / values[step]).max() / norms
        for name in rivals:
            wanted[name].append(weights[name])
    for name in rivals:
        np.testing.assert_allclose(played[name], wanted[name], rtol=200 * eps, err_msg=name)


def test_momenta_one_loss_at_a_time(eps):
    """M-ConFIG against a transcription with the pseudo-inverse in the space of parameters."""
    rng = np.random.default_rng(2)
    gradients, params = rng.normal(size=(11, 5)), {"a": jnp.zeros(2), "b": jnp.zeros((3, 1))}
    rule = momentum.scale_by_momentum_config(3, b1=0.8, b2=0.95)

    def split(g):
        return {"a": g[:2], "b": g[2:].reshape(3, 1)}

    @jax.jit
    def play(gradients):
        state, found = rule.init(params), []
        for step, g in enumerate(gradients):
            updates, state = rule.update(split(g), state, params, turn=jnp.int32(step % 3))
            found.append(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)]))
        return jnp.stack(found)

    found = np.asarray(play(jnp.asarray(gradients, jnp.result_type(float))), float)
    momenta, last, second = np.zeros((3, 5)), np.zeros(5), np.zeros(5)
    for step, g in enumerate(gradients):
        momenta[step % 3] = 0.8 * momenta[step % 3] + 0.2 * g
        if step < 2:
            np.testing.assert_array_equal(found[step], 0)
            continue
        turns = np.array([(step - k) // 3 + 1 for k in range(3)])
        unbiased = momenta / (1 - 0.8**turns)[:, None]
        units = unbiased / np.linalg.norm(unbiased, axis=1, keepdims=True)
        along = np.linalg.pinv(units) @ np.ones(3)
        along /= np.linalg.norm(along)
        direction = (unbiased @ along).sum() * along
        count = step - 1
        pseudo = direction * (1 - 0.8**count)
        second = 0.95 * second + 0.05 * ((pseudo - 0.8 * last) / 0.2) ** 2
        last = pseudo
        wanted = direction / (np.sqrt(second / (1 - 0.95**count)) + 1e-8)
        np.testing.assert_allclose(found[step], wanted, rtol=2e4 * eps, atol=2e3 * eps)


def test_combination_is_the_weighted_sum(eps):
    grads = {"a": np.arange(6.0).reshape(3, 2), "b": np.ones((3, 2, 2), np.float16)}
    out = jax.jit(peers.combine)(jnp.array([1.0, 2.0, 0.5]), grads)
    np.testing.assert_allclose(out["a"], [0 + 4 + 2, 1 + 6 + 2.5])
    assert out["b"].dtype == jnp.float16


def test_forward_derivatives(eps):
    @jax.jit
    def both():
        params = glorot(jax.random.key(0), (2, 7, 6, 1))
        x = jax.random.uniform(jax.random.key(1), (5, 2), minval=-1)

        def u(point):
            return tanh_network(params, point)[0]

        hessian = jax.vmap(jax.hessian(u))(x)
        oracle = jnp.concatenate([jax.vmap(u)(x)[None], jax.vmap(jax.grad(u))(x).T])
        along_t, along_x = hessian[:, 0, 0], hessian[:, 1, 1]
        sums = along_t + along_x, along_x, 2 * along_t - 3 * along_x
        mine = [derivatives(params, x, c)[..., 0] for c in ((1.0, 1.0), (0.0, 1.0), (2.0, -3.0))]
        return mine, [jnp.concatenate([oracle, s[None]]) for s in sums]

    for mine, oracle in zip(*both()):
        np.testing.assert_allclose(mine, oracle, atol=200 * eps)


@pytest.mark.x64
def test_helmholtz_solution():
    # the source term is what the exact solution leaves: a network of zeros has residual -q
    params = [(np.zeros((m, n)), np.zeros(n)) for m, n in itertools.pairwise(helmholtz.SIZES)]
    points = np.random.default_rng(0).uniform(-1, 1, (20, 2))
    h = 1e-3
    moved = points + h * np.array([[[0, 0]], [[1, 0]], [[-1, 0]], [[0, 1]], [[0, -1]]])

    @jax.jit
    def measure(params, points, moved):
        _, boundary = helmholtz.batch(jax.random.key(0))
        metrics = helmholtz.problem().metrics(params)
        exact = helmholtz.exact(moved), helmholtz.exact(boundary)
        return helmholtz.residual(params, points), *exact, boundary, metrics

    residual, exact, on_boundary, boundary, metrics = measure(params, points, moved)
    laplacian = (exact[1:].sum(axis=0) - 4 * exact[0]) / h**2
    # the second differences are off by h^2 / 12 of the fourth derivatives, 2.5e4 / 12 * 1e-6
    np.testing.assert_allclose(-residual, laplacian + exact[0], atol=3e-3)
    assert np.abs(on_boundary).max() < 1e-12
    sides = [boundary[:, axis] == side for axis in (0, 1) for side in (-1, 1)]
    assert np.all(np.sum(sides, axis=0) >= 1)
    assert min(np.sum(side) for side in sides) >= 16, "32 of 128 are expected on each side"
    np.testing.assert_allclose(metrics["relative_l2"], 1.0)


@pytest.mark.once
def test_burgers_solution():
    x = np.linspace(-1, 1, 41)
    np.testing.assert_allclose(burgers.solution(0, x), -np.sin(np.pi * x), atol=1e-14)
    t = np.linspace(0.01, 1, 12)
    np.testing.assert_allclose(burgers.solution(t, -1.0), 0, atol=1e-12)
    grid = np.meshgrid(t, np.linspace(-1, 1, 101))
    np.testing.assert_allclose(
        burgers.solution(*grid), burgers.solution(*grid, nodes=240), atol=1e-8
    )
    # the equation itself, away from the shock, by central differences
    h, (t, x) = 1e-4, np.meshgrid(np.linspace(0.1, 0.9, 7), [-0.8, -0.5, -0.25, 0.3, 0.7])
    u = burgers.solution
    u_t = (u(t + h, x) - u(t - h, x)) / (2 * h)
    u_x = (u(t, x + h) - u(t, x - h)) / (2 * h)
    u_xx = (u(t, x + h) - 2 * u(t, x) + u(t, x - h)) / h**2
    np.testing.assert_allclose(u_t + u(t, x) * u_x - burgers.VISCOSITY * u_xx, 0, atol=1e-5)
    # Basdevant et al. 1986: the steepest slope at x = 0 is 152.00516, at t = 1.6037 / pi
    t = np.linspace(1.55, 1.65, 201) / np.pi
    slope = -u(t, 1e-6) / 1e-6
    np.testing.assert_allclose(slope.max(), 152.00516, rtol=1e-6)
    np.testing.assert_allclose(np.pi * t[slope.argmax()], 1.6037, atol=6e-4)


def test_burgers_batch():
    inside, initial, boundary = map(np.asarray, jax.jit(burgers.batch)(jax.random.key(0)))
    assert inside.shape == (2000, 2)
    assert initial.shape == (50,)
    assert boundary.shape == (50, 2)
    assert np.all((inside >= [0, -1]) & (inside <= 1))
    assert abs(inside.mean(axis=0) - [0.5, 0]).max() < 0.06
    assert np.sum(boundary[:, 1] == 1) == np.sum(boundary[:, 1] == -1) == 25


def test_quadratics(eps):
    x = jnp.array([0.3, -2.0])
    hessians = jax.jit(jax.jacfwd(jax.jacrev(lambda x: quadratics.problem().losses.values(x))))(x)
    np.testing.assert_allclose(hessians, quadratics.HESSIANS, rtol=10 * eps)
    np.testing.assert_allclose(np.linalg.eigvalsh(quadratics.HESSIANS), [[2, 6], [20, 60]])
    losses = quadratics.problem().losses
    values, grads = losses.value_and_term_grads(jnp.asarray(quadratics.minimum()))
    np.testing.assert_allclose(grads.sum(axis=0), 0, atol=1e3 * eps)
    excess = losses.values(x).sum() - values.sum()
    measured = quadratics.metrics(x)
    np.testing.assert_allclose(measured["excess"], excess, rtol=100 * eps)
    np.testing.assert_allclose(measured["pareto_distance"], 2.0, rtol=10 * eps)
    assert np.isclose(quadratics.metrics(jnp.array([-13.0, 4.0]))["pareto_distance"], 5.0)
    starts = jax.vmap(quadratics.problem().init)(jnp.arange(5))
    np.testing.assert_allclose(starts, quadratics.STARTS[[0, 1, 2, 3, 0]])


def test_digits(eps):
    problem = digits.problem()
    x, targets = digits.data()
    assert x.shape == (1000, 64)
    assert (x.min(), x.max()) == (-0.3, 0.7)
    np.testing.assert_array_equal(targets["digit"].sum(axis=1), 1)
    np.testing.assert_array_equal(targets["digit"].argmax(axis=1) % 2, targets["parity"].argmax(1))
    shapes = jax.eval_shape(problem.init, 0)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes["trunk"])] == [(64, 64), (64,)] * 2
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    values = jax.jit(problem.losses.values)(zeros, *problem.batch(None))
    np.testing.assert_allclose(values, 0.5, rtol=1e3 * eps)


@pytest.mark.x64
@pytest.mark.parametrize("name", ["helmholtz", "burgers"])
def test_term_gradients_and_traces(name):
    problem = problems.make(name)
    residual = {"helmholtz": helmholtz, "burgers": burgers}[name].residual

    @jax.jit
    def measure():
        params = problem.init(0)
        args = jax.tree.map(lambda a: a[:3], problem.batch(jax.random.key(0)))
        apart = problems.value_and_term_grads(problem, params, *args)
        together = problem.losses.value_and_term_grads(params, *args)
        jacobian = jax.jacrev(residual)(params, args[0])
        squares = sum(jnp.sum(j**2) for j in jax.tree.leaves(jacobian))
        return apart, together, problem.traces(params, *args), squares

    apart, together, traces, squares = measure()
    for mine, oracle in zip(jax.tree.leaves(apart), jax.tree.leaves(together)):
        np.testing.assert_allclose(mine, oracle, rtol=1e-9, atol=1e-9)
    assert traces.shape == apart[0].shape
    np.testing.assert_allclose(traces[0], squares / 3)


@pytest.mark.once
def test_runner_resumes_and_lanes_agree(tmp_path, capsys):
    common = ["--case", "quadratics", "--seeds", "2", "--steps", "20", "--rates", "0.005", "0.002"]
    methods = ["--methods", "equal", "tangent_kernel", "pcgrad"]
    tables = {}
    for lanes in ("loop", "vmap"):
        out = tmp_path / f"{lanes}.json"
        running.main([*common, *methods, "--lanes", lanes, "--out", str(out)])
        tables[lanes] = json.loads(out.read_text())
    cells = tables["loop"]["cells"]
    assert len(cells) == 6
    for key, cell in cells.items():
        assert np.shape(cell["metrics"]["excess"]) == (3, 2)
        other = tables["vmap"]["cells"][key]["metrics"]["excess"]
        np.testing.assert_allclose(cell["metrics"]["excess"], other, rtol=1e-4)
    # gradient descent on x'Ax in closed form
    a = quadratics.MATRICES.sum(axis=0)
    left = np.linalg.matrix_power(np.eye(2) - 2 * 0.005 * a, 20)
    left = left @ (quadratics.STARTS[1] - quadratics.minimum())
    np.testing.assert_allclose(
        cells["equal 0.005"]["metrics"]["excess"][-1][1], left @ a @ left, rtol=1e-3
    )
    capsys.readouterr()
    out = str(tmp_path / "loop.json")
    running.main([*common, "--methods", "equal", "uncertainty", "--out", out])
    printed = capsys.readouterr().err
    assert printed.count("already there") == 2
    assert len(json.loads((tmp_path / "loop.json").read_text())["cells"]) == 8
    with pytest.raises(SystemExit):
        running.main([*common[:5], "40", "--methods", "equal", "--out", out])
    assert "other settings" in capsys.readouterr().err


@pytest.mark.once
def test_a_grid_is_its_runs(tmp_path):
    common = ["--case", "quadratics", "--seeds", "2", "--steps", "4", "--every", "2"]
    common += ["--rates", "0.005", "0.002", "--methods", "equal", "uncertainty", "pcgrad"]
    common += ["momentum_config", "small_gain"]
    for run in (running, grid):
        run.main([*common, "--out", str(tmp_path / f"{run.__name__}.json")])
    one, other = (
        json.loads((tmp_path / f"{r.__name__}.json").read_text()) for r in (running, grid)
    )
    assert one["settings"] == other["settings"]
    assert one["cells"].keys() == other["cells"].keys()
    for key, cell in one["cells"].items():
        found = other["cells"][key]
        assert found["steps"] == cell["steps"] == [0, 2, 4]
        for name, values in cell["metrics"].items():
            np.testing.assert_allclose(found["metrics"][name], values, rtol=1e-4, err_msg=key)
        np.testing.assert_allclose(found["weights"], cell["weights"], rtol=1e-4, err_msg=key)
    assert reporting.table(other).count("\n") == reporting.table(one).count("\n")


@pytest.mark.once
def test_runner_feeds_a_transformation(tmp_path, monkeypatch):
    seen = []

    def update(updates, state, params=None, *, term_grads, term_args, **extra):
        seen.append((term_grads.shape, len(term_args)))
        return jax.tree.map(lambda g: -0.005 * g.sum(axis=0), term_grads), state

    def init(params):
        return {"weights": jnp.array([2.0, 3.0])}

    rule = optax.GradientTransformationExtraArgs(init, update)
    method = running.Method(lambda problem, rate: (rule, None), traced_rate=False, lanes=False)
    result = running.Trainer(quadratics.problem(), method, 10, "vmap").run(0.005, [0, 1], 20)
    plain = running.Trainer(quadratics.problem(), METHODS["equal"], 10).run(0.005, [0, 1], 20)
    assert seen == [((2, 2), 0)]
    assert result["lanes"] == "loop"
    assert result["weights"] == [[2.0, 3.0], [2.0, 3.0]]
    np.testing.assert_allclose(result["metrics"]["excess"], plain["metrics"]["excess"], rtol=1e-4)


@pytest.mark.once
def test_runner_writes_divergence_as_null(tmp_path):
    out = tmp_path / "diverged.json"
    options = ["--case", "quadratics", "--seeds", "1", "--rates", "1e9", "--every", "100"]
    running.main([*options, "--methods", "equal", "--out", str(out)])
    cell = json.loads(out.read_text())["cells"]["equal 1e+09"]
    assert cell["metrics"]["excess"][-1] == [None]


@pytest.mark.once
def test_report_marks_the_best():
    def cell(method, rate, *final):
        metrics = {"error": [[1.0] * len(final), list(final)]}
        return {"method": method, "rate": rate, "metrics": metrics, "ms_per_step": 1.0}

    cells = {
        "0": cell("a", 0.1, 1.0, 2.0, 3.0, 4.0, 5.0),
        "1": cell("a", 0.2, 0.5, None, None, None, 1.0),
        "2": cell("b", 0.1, 2.0, 3.0, 4.0, 5.0, 6.0),
        "3": cell("c", 0.1, 9.0, 9.0, 9.0, 9.0, 9.0),
        "4": cell("d", 0.1, None, None, None, None, None),
    }
    settings = {"case": "toy", "metric": "error", "steps": 10, "seeds": [0, 1, 2, 3, 4]}
    lines = reporting.table({"settings": settings, "cells": cells}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["a", "b", "c", "d"]
    assert lines[4].startswith("| a | 0.1 | 3 | 2 to 4 | 1 to 5 | 0 |")
    assert lines[4].endswith("| best |")
    assert lines[5].endswith("| within one spread |")
    assert lines[6].endswith("|  |")
    assert "| inf | inf to inf | inf to inf | 5 |" in lines[7]
    assert lines[7].endswith("|  |")
    facts = {"problem": "toy", "measure": "error", "steps": 10, "seeds": 5}
    found = reporting.medians({"settings": settings, "cells": cells})
    assert found == facts | {"a": 3.0, "b": 4.0, "c": 9.0, "d": None}


@pytest.mark.once
def test_report_compares_at_the_last_common_step():
    def cell(method, rate, *errors):
        return {
            "method": method,
            "rate": rate,
            "metrics": {"error": [[e, e] for e in errors]},
            "steps": [0, 5, 10][: len(errors)],
            "ms_per_step": 1.0,
        }

    def report(case, *cells):
        settings = {"case": case, "metric": "error"}
        keyed = {f"{c['method']} {c['rate']}": c for c in cells}
        return {"settings": settings, "cells": keyed}

    ours, theirs = cell("small_gain", 1, 9.0, 2.0, 1.0), cell("equal", 1, 9.0, 4.0)
    reports = [
        report("one", ours, theirs),
        report("one", cell("equal", 2, 9.0, 3.0)),
        report("two", cell("small_gain", 1, 9.0, None), cell("equal", 1, 9.0, 8.0)),
        report("two", cell("small_gain", 1, 9.0, 4.0)),
    ]
    rows = reporting.compared(reporting.together(reports), "small_gain")
    assert rows == [
        {"method": "fair", "one 5": 2.0, "two 5": 4.0, "median over fair": 1.0, "least": 1.0},
        {
            "method": "equal weights",
            "one 5": 3.0,
            "two 5": 8.0,
            "median over fair": 1.75,
            "least": 1.5,
        },
    ]


@pytest.mark.once
def test_factors_of_losses_are_what_their_kind_says():
    drawn = {kind: units.factors_of(kind, 3, 40) for kind in units.KINDS}
    assert {factors.shape for factors in drawn.values()} == {(40, 3)}
    assert np.all(np.abs(np.log10(drawn["units"])) <= 3)
    assert np.ptp(np.log10(drawn["units"])) > 4
    np.testing.assert_array_equal(np.frexp(drawn["powers of two"])[0], 0.5)
    np.testing.assert_array_equal(np.unique(drawn["extreme"]), [1e-25, 1e25])
    assert 0 < np.abs(drawn["rounding"] - 1).max() <= 1e-6
    assert units.summary([1.0, 0.5, 1.1]).startswith("median deviation 10.0%, ratios 0.500 to 1.1")


@pytest.mark.once
def test_overhead_is_measured(monkeypatch):
    monkeypatch.setattr(overhead, "CHUNKS", {"quadratics": 5})
    monkeypatch.setattr(overhead, "VARIANTS", [(2, "difference")])
    plain, fixed, *ours = overhead.measure("quadratics", 2)
    assert plain["over_plain"] == fixed["over_fixed"] == 1
    assert [row["method"].split(", ")[2:] for row in ours] == [[], ["of the sum"], ["weighted"]]
    assert all(row["ms"] >= row["least_ms"] > 0 for row in ours)


@pytest.mark.once
def test_gradient_descent_on_digits_comes_to_the_edge():
    """It is there, within a tenth, after a few hundred of the benchmark's 6,000 steps."""
    row = edge.measure("gradient descent, 0.1", 1000)
    assert 0.9 <= row["median"] <= 1.1
    assert row["low"] <= row["median"] <= row["high"] <= row["largest"]


@pytest.mark.once
def test_the_large_network_has_ten_million_parameters_and_learns():
    whole = jax.eval_shape(large.problem().init, jnp.int32(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(whole)) >= 10_000_000
    problem = large.problem(Shape(width=32, heads=2, layers=1, context=16), batch_size=4)
    fair = sg.small_gain(optax.adam(3e-3), problem.losses, policy="fair")
    run, start = overhead.loop(problem, fair, 5, given="weighted")
    losses = [problem.metrics(params)["loss"] for params in (problem.init(0), start[0])]
    assert losses[1] < losses[0] - 1
    assert run(start, jnp.int32(0))[1].info.accepted


def test_advection_at_its_solution(eps, x64):
    """Residual by differences, losses of the exact wave, and weights of the published scheme."""
    setting = advection.REDUCED._replace(size=Size(6, 2, 6, 32, 4))
    problem = advection.problem(setting)
    params = problem.init(0)
    (inside,) = problem.batch(jax.random.key(0))
    assert (np.diff(inside[:, 0]) >= 0).all()
    h = 1e-5 if x64 else 1e-2
    ahead, behind = (inside + s * jnp.array([[h, h * setting.speed]]) for s in (1, -1))
    measure = jax.jit(advection.network)
    slope = (measure(params, ahead) - measure(params, behind)) / (2 * h)
    found = jax.jit(lambda p, z: advection.residual(p, z, setting.speed))(params, inside)
    np.testing.assert_allclose(found, slope, atol=(1e-6 if x64 else 0.1) * np.abs(slope).max())
    # the causal weight of a time is exp(-tolerance * residuals before it)
    chunk = np.square(np.asarray(found, float)).reshape(4, -1).mean(axis=1)
    causal = np.exp(-embedded.TOLERANCE * (np.cumsum(chunk) - chunk))
    values = jax.jit(problem.losses.values)(params, inside)
    np.testing.assert_allclose(values[0], (causal * chunk).mean(), rtol=1e4 * eps)
    along = np.linspace(0, 1, 5)[:, None] * [1, setting.speed] + [0, 0.3]
    np.testing.assert_allclose(advection.exact(along, setting.speed), np.sin(0.3))


@pytest.mark.x64
@pytest.mark.parametrize("name", ["wave", "heat", "flow"])
def test_equations_and_their_solutions(name):
    """What is left of an equation, of a network and of the exact solution, by autodiff."""
    problem = problems.make(name)
    decay = equations.REYNOLDS / 2 - np.sqrt(equations.REYNOLDS**2 / 4 + 4 * np.pi**2)

    def exact(z):
        if name == "flow":
            pressure = 0.5 * (1 - jnp.exp(2 * decay * z[:1]))
            return jnp.concatenate([equations.velocities(z[None])[0], pressure])
        return {"wave": equations.vibration, "heat": equations.warmth}[name](z[None])

    def left(u, z):
        """The residuals of a field [m] at a point, those of a loss in a row."""
        value, slope, bent = u(z), jax.jacfwd(u)(z), jax.hessian(u)(z)
        if name == "wave":
            return [bent[:, 0, 0] - 4 * bent[:, 1, 1]]
        laplacian = bent[:, 0, 0] + bent[:, 1, 1]
        if name == "heat":
            source = 50 * (4 * np.pi**2 + 9) * exact(z)
            return [50 * laplacian + source]
        carried = slope[:2] @ value[:2]
        continuity = slope[0, 0] + slope[1, 1]
        return [carried + slope[2] - laplacian[:2] / equations.REYNOLDS, continuity[None]]

    @jax.jit
    def measure():
        params = problem.init(0)
        points = problem.batch(jax.random.key(0))
        few = tuple(p[:7] for p in points)
        scale = equations.HOTTEST if name == "heat" else 1.0

        def field(z):
            return scale * tanh_network(params, z)

        def squares(u, at):
            rows = jax.vmap(lambda z: left(u, z))(at)
            return jnp.stack([jnp.mean(row**2) for row in rows])

        losses = problem.losses.values(params, *few)
        inside = squares(field, few[0])
        return losses[: inside.size], inside, squares(exact, points[0]), points, losses

    mine, oracle, solution, points, losses = measure()
    np.testing.assert_allclose(mine, oracle, rtol=1e-9)
    assert np.all(np.asarray(solution) < 1e-18 * np.asarray(losses[0]) + 1e-20)
    # what is given on the edges lies on them
    ends = {"wave": (points[2][:, 0], [0]), "heat": (points[2][:, 1], [1])}
    if name in ends:
        np.testing.assert_array_equal(np.unique(ends[name][0]), ends[name][1])
    else:
        x, y = points[2].T
        assert np.all((x == -0.5) | (x == 1) | (y == -0.5) | (y == 1.5))


@pytest.mark.x64
def test_allen_cahn_and_its_solution():
    """The residual by second derivatives; the reference by half as many modes."""
    problem = allen_cahn.problem(Size(6, 2, 6, 32, 4))

    @jax.jit
    def measure():
        params = problem.init(0)
        at = problem.batch(jax.random.key(0))[0][:5]

        def u(z):
            return allen_cahn.network(params, z[None])[0]

        slope, bent = jax.vmap(jax.grad(u))(at), jax.vmap(jax.hessian(u))(at)
        value = jax.vmap(u)(at)
        wanted = slope[:, 0] - 1e-4 * bent[:, 1, 1] + 5 * value**3 - 5 * value
        return allen_cahn.residual(params, at), wanted

    found, wanted = measure()
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    truth = allen_cahn.reference()
    x = 2 * np.arange(512) / 512 - 1
    np.testing.assert_allclose(truth[0], x**2 * np.cos(np.pi * x), atol=1e-12)
    coarse = allen_cahn.reference(512)
    assert np.linalg.norm(coarse - truth) < 2e-5 * np.linalg.norm(truth)


@pytest.mark.x64
def test_an_accelerated_gauss_newton_step(monkeypatch):
    """The lowest of the ends that dense Jacobians and Hessians give, at the damping it chose."""
    monkeypatch.setattr(second_order, "INSIDE", 16)
    monkeypatch.setattr(second_order, "EACH_SIDE", 2)
    start = glorot(jax.random.key(0), (2, 4, 1))
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    inside, outside = second_order.points()

    def residuals(flat):
        parts = (
            helmholtz.residual(unravel(flat), inside),
            tanh_network(unravel(flat), outside)[:, 0],
        )
        return jnp.concatenate([parts[0] / 4, parts[1] * jnp.sqrt(10 / 8)])

    def total(flat):
        return float(jnp.sum(residuals(flat) ** 2))

    r, jacobian = residuals(flat), jax.jacfwd(residuals)(flat)
    hessians = jax.hessian(residuals)(flat)

    def ends(mu):
        normal = jacobian.T @ jacobian + mu * jnp.eye(flat.size)
        first = -jnp.linalg.solve(normal, jacobian.T @ r)
        bent = jnp.einsum("kij,i,j->k", hessians, first, first)
        return flat + first, flat + first - jnp.linalg.solve(normal, jacobian.T @ bent) / 2

    solver = second_order.gauss_newton(10.0, start)
    moved, mu = solver.step(solver.init(start))
    best = min(ends(mu), key=total)
    np.testing.assert_allclose(moved, best, rtol=1e-7, atol=1e-9)
    assert total(moved) < total(flat)
    assert all(total(end) >= total(moved) for near in (mu / 3, mu * 3) for end in ends(near))
