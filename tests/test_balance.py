"""Balance residual, its gradient and flow, Newton's method on it, and the two phases."""

from fractions import Fraction
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from smallgain_jax.losses.balance import (
    balance_flow,
    balance_gradient,
    balance_residual,
    cosine_matrix,
    interaction_ratio,
)
from smallgain_jax.losses.losses import terms
from smallgain_jax.losses.newton import balance_newton, smallest_curvature
from smallgain_jax.losses.two_phase import BALANCE, LOSS, two_phase
from smallgain_jax.spectral.lanczos import lanczos
from tests.products import exact

# the problems of seed 004
PAIR = np.array([3.0, -2.0])
TRIPLE = np.array([[3.0, 1.0], [-1.0, 4.0], [1.0, -2.0]])
WAVES = np.array([[2.0, 1.0], [-1.0, 3.0], [0.0, -2.0]])


def pair(t):
    return (t - jnp.asarray(PAIR, t.dtype)) ** 2


def triple(x):
    return jnp.sum((x[None] - jnp.asarray(TRIPLE, x.dtype)) ** 2, axis=1)


def waves(x):
    gap = x[None] - jnp.asarray(WAVES, x.dtype)
    return jnp.sum(gap**2 + 5 * (1 - jnp.cos(2 * np.pi * gap)), axis=1)


def total(fn):
    return lambda x: jnp.sum(fn(x))


def residual_of(fn, x):
    return balance_residual(terms(fn).value_and_term_grads(x)[1])


def descend(fn, optimizer, x, steps):
    """Parameters and state after `steps` updates, and the parameters along the way."""

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(total(fn))(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    (x, state), path = jax.lax.scan(step, (x, optimizer.init(x)), None, length=steps)
    return x, state, path


def network(num_terms, dtype=float, seed=0):
    """Losses of a small network on one batch, curved in every parameter, as a pytree."""
    rng = np.random.default_rng(seed)
    params = {
        "first": jnp.asarray(rng.normal(size=(3, 4)), dtype),
        "bias": jnp.asarray(rng.normal(size=4), dtype),
        "heads": (jnp.asarray(rng.normal(size=(num_terms, 4)), dtype), jnp.asarray(0.3, dtype)),
    }
    x = jnp.asarray(rng.normal(size=(6, 3)), dtype)
    y = jnp.asarray(rng.normal(size=(num_terms, 6)), dtype)

    @exact
    def losses(p, x, y):
        hidden = jnp.tanh(x @ p["first"] + p["bias"][None])
        heads, gain = p["heads"]
        return jnp.mean((jnp.exp(gain) * (heads @ hidden.T) - y) ** 2, axis=1)

    return terms(losses, names=[str(k) for k in range(num_terms)]), params, (x, y)


class TestResidual:
    def gradients(self, num_terms=7, cases=200):
        rng = np.random.default_rng(1)
        scale = 10.0 ** rng.uniform(-3, 3, size=(cases, num_terms, 1))
        return rng.normal(size=(cases, num_terms, 12)) * scale

    def test_identity_range_and_pairs(self, eps):
        g = self.gradients()
        residual = np.asarray(jax.jit(jax.vmap(balance_residual))(jnp.asarray(g)), np.float64)
        ratio = np.asarray(jax.jit(jax.vmap(interaction_ratio))(jnp.asarray(g)), np.float64)
        gram = np.einsum("cin,cjn->cij", g, g)
        upper = np.triu(np.ones((7, 7)), 1)
        pairs = (gram * upper).sum(axis=(1, 2)) / np.trace(gram, axis1=1, axis2=2)
        np.testing.assert_allclose(ratio, pairs, atol=30 * eps)
        np.testing.assert_allclose(residual, 1 + 2 * pairs, atol=max(30 * eps, 1e-14))
        assert (residual >= 0).all()
        assert (residual <= 7).all()

    def test_equal_gradients_reach_k_and_no_more(self):
        g = np.random.default_rng(2).normal(size=(50, 1, 30)).repeat(9, axis=1)
        residual = jax.jit(jax.vmap(balance_residual))(jnp.asarray(g))
        assert float(residual.max()) <= 9
        np.testing.assert_allclose(residual, 9, rtol=1e-5)

    def test_common_factors_and_orthogonal_maps_leave_it(self, eps):
        g = self.gradients(cases=20)
        q = np.linalg.qr(np.random.default_rng(3).normal(size=(12, 12)))[0]
        measure = jax.jit(jax.vmap(balance_residual))
        plain = measure(jnp.asarray(g))
        np.testing.assert_allclose(measure(jnp.asarray(-7.3 * g)), plain, rtol=100 * eps)
        np.testing.assert_allclose(measure(jnp.asarray(g @ q)), plain, rtol=1e3 * eps)

    def test_weights_are_those_of_the_gradients(self, eps):
        g, w = self.gradients(cases=1)[0], np.array([0.0, 1, 2, 3, 4, 5, 6])
        tree = {"a": jnp.asarray(g[:, :5]), "b": jnp.asarray(g[:, 5:].reshape(7, 7, 1))}
        weighted = jax.jit(lambda t: balance_residual(t, weights=w))(tree)
        s = (w[:, None] * g).sum(axis=0)
        expected = s @ s / np.square(w[:, None] * g).sum()
        np.testing.assert_allclose(weighted, expected, rtol=100 * eps)

    def test_extreme_sizes(self, x64, eps):
        # squares of these neither fit nor survive
        tiny, huge = (1e-200, 1e200) if x64 else (1e-30, 1e30)
        g = self.gradients(cases=1)[0] / 1e3
        plain = balance_residual(jnp.asarray(g))
        for size in (tiny, huge):
            np.testing.assert_allclose(
                balance_residual(jnp.asarray(g * size)), plain, rtol=1e3 * eps
            )
            weighted = balance_residual(jnp.asarray(g), weights=np.full(7, size))
            np.testing.assert_allclose(weighted, plain, rtol=1e3 * eps)
            assert jnp.isfinite(cosine_matrix(jnp.asarray(g * size))).all()

    def test_cancellation_to_rounding_is_exact(self, x64, eps):
        # gradients that cancel in all but their last digits, against rational arithmetic
        rng = np.random.default_rng(4)
        dtype = np.float64 if x64 else np.float32
        g = rng.normal(size=(20, 10)).astype(dtype)
        order = rng.permutation(20)
        g = np.concatenate([g, -g[order] * (1 + 4 * dtype(eps)), 1e3 * g, -1e3 * g])
        s = [sum(Fraction(float(v)) for v in column) for column in g.T]
        squares = sum(Fraction(float(v)) ** 2 for v in g.ravel())
        expected = float(sum(v * v for v in s) / squares)
        measured = float(jax.jit(balance_residual)(jnp.asarray(g)))
        assert 0 < expected < 1e3 * eps**2
        np.testing.assert_allclose(measured, expected, rtol=1e-3)

    def test_no_gradient_is_an_equilibrium(self):
        for zero in (jnp.zeros((3, 4)), {}, {"a": jnp.zeros((2, 0))}):
            assert balance_residual(zero) == 0
            assert interaction_ratio(zero) == -0.5
        slope = jax.grad(lambda g: balance_residual(g))(jnp.zeros((3, 4)))
        assert (slope == 0).all()

    def test_not_finite_stays_so(self):
        for bad in (np.nan, np.inf):
            assert not jnp.isfinite(balance_residual(jnp.array([[1.0, bad], [2.0, 3.0]])))

    def test_low_precision_is_measured_in_float32(self):
        g = jnp.ones((4, 3), jnp.bfloat16)
        assert balance_residual(g).dtype == jnp.float32
        assert cosine_matrix(g).dtype == jnp.float32

    def test_cosines(self, eps):
        g = self.gradients(cases=1)[0]
        g[3] = 0
        cosines = np.asarray(
            jax.jit(cosine_matrix)({"a": jnp.asarray(g[:, :4]), "b": jnp.asarray(g[:, 4:])})
        )
        norms = np.linalg.norm(g, axis=1)
        expected = g @ g.T / np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), 1)
        np.testing.assert_allclose(cosines, expected, atol=20 * eps)
        assert (np.diag(cosines) == (norms > 0)).all()
        assert (cosines == cosines.T).all()

    @pytest.mark.once
    def test_bad_arguments(self):
        good = jnp.ones((3, 2))
        for measure in (balance_residual, interaction_ratio, cosine_matrix):
            with pytest.raises(ValueError, match=r"term_grads\['b'\]"):
                measure({"a": good, "b": jnp.ones((4, 2))})
            with pytest.raises(ValueError, match="term_grads"):
                measure(jnp.array(1.0))
            with pytest.raises(TypeError, match="term_grads"):
                measure(jnp.ones((3, 2), jnp.int32))
            with pytest.raises(TypeError, match="term_grads"):
                measure(jnp.ones((3, 2), jnp.complex64))
        for weights in (np.ones(4), np.ones((3, 1)), 1.0, [1, -1, 1], [1, np.nan, 1]):
            with pytest.raises(ValueError, match="weights"):
                balance_residual(good, weights=np.asarray(weights))


class TestGradient:
    @exact
    def dense(self, losses, params, args, weights):
        """B and its gradient from the Hessians themselves, raveled."""
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        fn = lambda v: weights * losses.values(unravel(v), *args)
        g, h = jax.jacrev(fn)(flat), jax.jacfwd(jax.jacrev(fn))(flat)
        s = g.sum(axis=0)
        squares = jnp.sum(g**2)
        residual = s @ s / squares
        lack = s[None] - residual * g
        return residual, 2 * jnp.einsum("kij,kj->i", h, lack) / squares

    @pytest.mark.parametrize("num_terms", [1, 2, 5, 20])
    def test_against_dense_hessians(self, num_terms, x64):
        losses, params, args = network(num_terms)
        w = np.random.default_rng(5).uniform(0, 3, num_terms)
        w[0] = 0 if num_terms > 1 else 1
        for weights in (None, w):
            ones = jnp.ones(num_terms) if weights is None else jnp.asarray(weights)
            residual, gradient = jax.jit(partial(balance_gradient, losses, weights=weights))(
                params, *args
            )
            expected, slope = jax.jit(partial(self.dense, losses))(params, args, weights=ones)
            chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
            got = jax.flatten_util.ravel_pytree(gradient)[0]
            tolerance = 1e-10 if x64 else 2e-4
            np.testing.assert_allclose(residual, expected, rtol=tolerance)
            atol = tolerance * max(float(jnp.abs(slope).max()), 0.1)
            np.testing.assert_allclose(got, slope, rtol=tolerance, atol=atol)

    def test_it_is_the_derivative_of_the_residual(self, x64):
        losses, params, args = network(4)

        def residual(p):
            return balance_residual(losses.value_and_term_grads(p, *args)[1])

        expected = jax.jit(jax.grad(residual))(params)
        gradient = jax.jit(partial(balance_gradient, losses))(params, *args)[1]
        chex.assert_trees_all_close(gradient, expected, rtol=1e-9 if x64 else 1e-3, atol=1e-5)

    def test_tiny_gradients(self, x64):
        # losses scaled down: B does not change, and neither does its gradient
        size = 1e-200 if x64 else 1e-25
        small = jax.jit(partial(balance_gradient, lambda x: size * waves(x)))
        plain = jax.jit(partial(balance_gradient, waves))
        x = jnp.array([0.3, 0.9])
        chex.assert_trees_all_close(small(x), plain(x), rtol=1e-4)

    def test_vanishing_gradients(self):
        flat = lambda x: jnp.stack([jnp.sum(x**4), jnp.sum(x**2)])
        residual, gradient = jax.jit(partial(balance_gradient, flat))(jnp.zeros(3))
        assert residual == 0
        assert (gradient == 0).all()

    @pytest.mark.parametrize("num_terms", [2, 10])
    @pytest.mark.once
    def test_operations_counted_by_the_compiler(self, num_terms):
        rng = np.random.default_rng(0)
        shapes = [(32, 32)] * 4 + [(32, num_terms)]
        params = [jnp.asarray(rng.normal(size=s) / 6, jnp.float32) for s in shapes]
        x = jnp.asarray(rng.normal(size=(128, 32)), jnp.float32)

        def losses(p, x):
            for w in p[:-1]:
                x = jnp.tanh(x @ w)
            return jnp.mean((x @ p[-1]) ** 2, axis=0)

        losses = terms(losses, names=[str(k) for k in range(num_terms)])

        def measured(p, x):
            grads = losses.value_and_term_grads(p, x)
            return grads, balance_residual(grads[1]), interaction_ratio(grads[1])

        def flops(fn):
            return jax.jit(fn).lower(params, x).compile().cost_analysis()["flops"]

        one_pass = flops(losses.value_and_term_grads)
        assert flops(measured) <= 1.03 * one_pass
        assert flops(partial(balance_gradient, losses)) <= 3 * one_pass


class TestProblems:
    def test_flow_on_one_dimension(self, x64):
        flow = jax.jit(lambda x: descend(pair, balance_flow(pair, 0.5), x, 200)[0])
        x = flow(jnp.array(-3.0))
        assert residual_of(pair, x) <= (1e-30 if x64 else 1e-12)
        np.testing.assert_allclose(x, 0.5, atol=4 * np.finfo(x.dtype).eps)

    def test_flow_on_two_dimensions(self, x64):
        flow = jax.jit(lambda x: descend(triple, balance_flow(triple, 0.5), x, 500)[0])
        x = flow(jnp.array([-3.0, -3.0]))
        assert residual_of(triple, x) <= (4.7e-34 if x64 else 1e-12)

    def test_newton_in_ten_steps(self, x64):
        for fn, start in ((pair, jnp.array(-3.0)), (triple, jnp.array([-3.0, -3.0]))):
            run = partial(descend, fn, balance_newton(fn), steps=10)
            x, state, _ = jax.jit(run)(x=start)
            assert residual_of(fn, x) <= (4.7e-34 if x64 else 1e-12)
            assert state.info.balance == residual_of(fn, x)

    def test_without_compensation_descent_stalls_above_rounding(self, x64):
        flow = balance_flow(triple, 0.5, compensated=False)
        x = jax.jit(lambda x: descend(triple, flow, x, 500)[0])(jnp.array([-3.0, -3.0]))
        stalled = float(residual_of(triple, x))
        assert 0 < stalled <= (1e-31 if x64 else 1e-12)

    def test_loss_flow_and_ratio_as_recorded(self, x64):
        flow = jax.jit(lambda x: descend(triple, optax.sgd(0.01 / 3), x, 500)[0])
        distance = jnp.linalg.norm(flow(jnp.array([-3.0, -3.0])) - 1)
        np.testing.assert_allclose(distance, 2.3e-4, rtol=0.1)
        grads = terms(triple).value_and_term_grads(jnp.array([1.5, 0.5]))[1]
        np.testing.assert_allclose(interaction_ratio(grads), -0.418, atol=5e-4)

    def test_loss_flow_on_the_non_convex_problem_as_recorded(self):
        flow = jax.jit(lambda x: descend(waves, optax.sgd(0.001 / 3), x, 1000)[0])
        np.testing.assert_allclose(total(waves)(flow(jnp.array([3.0, 3.0]))), 54.6, atol=0.05)


class TestFlow:
    @pytest.mark.parametrize(
        "base",
        [
            optax.adam(0.05),
            optax.lbfgs(),
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
            optax.linear_schedule(0.5, 0.1, 300),
        ],
    )
    def test_base_optimizers_descend_on_it(self, base):
        flow = balance_flow(triple, base)
        x, state, _ = jax.jit(lambda x: descend(triple, flow, x, 300))(jnp.array([-3.0, -3.0]))
        assert residual_of(triple, x) < 1e-6
        assert state.count == 300
        assert state.nonfinite == 0

    def test_weights_move_the_equilibrium(self):
        w = np.array([1.0, 3.0])
        flow = balance_flow(pair, 0.5, weights=w)
        x = jax.jit(lambda x: descend(pair, flow, x, 300)[0])(jnp.array(-3.0))
        np.testing.assert_allclose(x, w @ PAIR / w.sum(), rtol=1e-5)

    def test_info(self):
        x = jnp.array([1.5, 0.5])
        flow = balance_flow(triple, 0.5)
        state = jax.jit(flow.update)(x, flow.init(x), x)[1]
        np.testing.assert_allclose(state.info.losses, triple(x), rtol=1e-6)
        np.testing.assert_allclose(state.info.interaction, -0.41818, atol=1e-5)
        np.testing.assert_allclose(state.info.balance, residual_of(triple, x), rtol=1e-5)

    def test_steps_below_the_rounding_of_low_precision_add_up(self):
        # the first step is 0.3 units of rounding of bfloat16: 1e-3 times a slope of 2.4
        fn = lambda x: jnp.stack([x - 1, 2 - x]).astype(jnp.float32) ** 2
        start = jnp.array(1.1, jnp.bfloat16)
        run = lambda on: descend(fn, balance_flow(fn, 1e-3, compensated=on), start, 400)[0]
        plain, kept = jax.jit(lambda: (run(False), run(True)))()
        assert plain == start
        assert abs(float(kept) - 1.5) < abs(float(start) - 1.5) / 2


class TestKrylov:
    def matrix(self, n, seed=0):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(n, n))
        return (a + a.T) / 2

    def test_lanczos_is_orthonormal_and_tridiagonalizes(self, eps):
        a = jnp.asarray(self.matrix(20))
        space = jax.jit(lambda a: lanczos(exact(lambda v: a @ v), jnp.ones(20), 12))(a)
        v, a = np.asarray(space.basis), np.asarray(a)
        t = np.diag(space.diagonal) + np.diag(space.off_diagonal[:-1], 1)
        t = t + np.diag(space.off_diagonal[:-1], -1)
        np.testing.assert_allclose(v @ v.T, np.eye(12), atol=50 * eps)
        np.testing.assert_allclose(v @ a @ v.T, t, atol=500 * eps)

    @pytest.mark.parametrize("shift", [-3.0, 0.0, 40.0])
    def test_smallest_curvature_is_exact_for_few_parameters(self, shift, eps):
        a = self.matrix(8) + shift * np.eye(8)
        # the first loss is convex, the weighted sum need not be
        fn = lambda p, a: jnp.stack(
            [jnp.sum(p["x"] ** 2) + p["y"] ** 2, _quadratic(p, a)],
        )
        params = {"x": jnp.zeros((7, 1)), "y": jnp.zeros(())}
        losses = terms(fn, names=("a", "b"))
        found = jax.jit(
            lambda p, a: smallest_curvature(losses, p, a, weights=np.array([0.5, 1.0]))
        )(params, jnp.asarray(a))
        h = a + np.eye(8)
        top = np.abs(np.linalg.eigvalsh(h)).max()
        np.testing.assert_allclose(found.value, np.linalg.eigvalsh(h)[0], atol=100 * eps * top)
        np.testing.assert_allclose(found.largest, top, rtol=100 * eps)
        v = np.append(np.ravel(found.direction["x"]), found.direction["y"])
        np.testing.assert_allclose(h @ v, found.value * v, atol=2e3 * eps * top)

    def test_repeated_eigenvalues_break_down_cleanly(self, eps):
        fn = lambda x: jnp.stack([jnp.sum(x[:6] ** 2), jnp.sum(x[:2] ** 2), 0 * x[0]])
        found = jax.jit(lambda x: smallest_curvature(fn, x, iterations=30))(jnp.ones(9))
        np.testing.assert_allclose(found.value, 0, atol=100 * eps)
        np.testing.assert_allclose(found.largest, 4, rtol=100 * eps)

    @pytest.mark.once
    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="iterations"):
            smallest_curvature(triple, jnp.zeros(2), iterations=0)
        with pytest.raises(ValueError, match="params"):
            smallest_curvature(triple, {})


@exact
def _quadratic(p, a):
    v = jnp.append(jnp.ravel(p["x"]), p["y"])
    return 0.5 * v @ a @ v


class TestNewton:
    def test_indefinite_and_singular_sums(self, x64, eps):
        # eigenvalues of both signs, and one that is 0 with the right-hand side in the range
        values = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 8.0])
        q = np.linalg.qr(np.random.default_rng(6).normal(size=(6, 6)))[0]
        a = jnp.asarray(q @ np.diag(values) @ q.T)
        c = exact(jnp.matmul)(a, jnp.arange(6.0))
        fn = exact(lambda x: jnp.stack([0.5 * x @ a @ x - c @ x, c @ x, -c @ x]))
        x = jax.jit(lambda x: descend(fn, balance_newton(fn), x, 4)[0])(jnp.ones(6))
        assert residual_of(fn, x) < (1e-24 if x64 else 1e-9)
        assert jnp.isfinite(x).all()
        assert jnp.abs(x).max() < 1e3

    @pytest.mark.x64
    def test_settles_a_network_to_rounding(self, eps):
        # from near a minimum: three heads on one trunk, weight decay makes it nonsingular
        losses, params, args = network(3, seed=1)
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        closed = lambda v: losses.values(unravel(v), *args) + 0.01 * v @ v
        loss = jax.jit(jax.value_and_grad(total(closed)))
        near = scipy.optimize.minimize(
            lambda v: tuple(map(np.asarray, loss(v))), flat, jac=True, method="BFGS"
        )
        newton = balance_newton(closed, iterations=flat.size)
        x = jax.jit(lambda x: descend(closed, newton, x, 4)[0])(jnp.asarray(near.x))
        # rounding in s, some hundred units through three layers, squared
        assert residual_of(closed, x) < (1e3 * eps) ** 2 < residual_of(closed, near.x)

    def test_comes_to_rest(self):
        x = jnp.array([1.0, 1.0])
        newton = balance_newton(triple)
        updates, state = jax.jit(newton.update)(x, newton.init(x), x)
        assert (updates == 0).all()
        assert state.nonfinite == 0

    def test_no_zero_means_no_step(self):
        # s = 2 + 2x^2 never vanishes; at 0 it is smallest, and Newton has no direction
        fn = lambda x: jnp.stack([x + x**3 / 3, x + x**3 / 3])
        newton = balance_newton(fn)
        updates, state = jax.jit(newton.update)(
            jnp.zeros(()), newton.init(jnp.zeros(())), jnp.zeros(())
        )
        assert updates == 0
        assert state.info.linear_residual == 1


class TestTwoPhase:
    RATE = 0.001 / 3

    def zero_of_the_sum(self, low, high, axis):
        """A stationary coordinate of the waves' sum, by bisection."""
        mean = WAVES[:, axis].mean()
        slope = lambda v: 6 * (v - mean) + 30 * np.pi * np.sin(2 * np.pi * v)
        return scipy.optimize.brentq(slope, low, high, xtol=1e-15)

    @pytest.mark.x64
    @pytest.mark.parametrize("second", ["newton", "unstable flow"])
    def test_never_above_loss_flow(self, second, eps):
        starts = jnp.asarray(np.random.default_rng(0).uniform(-5, 5, size=(100, 2)))
        # B's curvature is 1e4 here: the seed's rate 0.01 is fifty times past its stability limit
        balance = balance_newton(waves) if second == "newton" else balance_flow(waves, 0.01)
        optimizer = two_phase(optax.sgd(self.RATE), balance, waves)
        run = jax.jit(jax.vmap(lambda x: descend(waves, optimizer, x, 1000)[:2]))
        alone = jax.jit(jax.vmap(lambda x: descend(waves, optax.sgd(self.RATE), x, 1000)[0]))
        x, state = run(starts)
        reached, loss = (np.asarray(jax.vmap(total(waves))(v)) for v in (x, alone(starts)))
        assert (reached <= loss + 8 * eps * np.abs(loss)).all()
        if second == "newton":
            residual = jax.vmap(partial(residual_of, waves))(x)
            assert residual.max() <= 1e-20
            curvature = np.linalg.eigvalsh(jax.vmap(jax.hessian(total(waves)))(x))
            assert curvature.min() > 0
            assert (state.info.phase == BALANCE).all()
            assert state.info.certified.all()
            np.testing.assert_allclose(state.info.smallest_curvature, curvature[:, 0], rtol=1e-6)
        else:
            assert state.rejected.sum() > 0

    @pytest.mark.x64
    def test_spurious_zeros_are_refused(self):
        # a maximum, two saddles and a minimum of the sum, to rounding
        top = [self.zero_of_the_sum(0.3, 0.7, axis) for axis in (0, 1)]
        low = [self.zero_of_the_sum(-0.2, 0.2, axis) for axis in (0, 1)]
        starts = jnp.asarray([[top[0], top[1]], [top[0], low[1]], [low[0], top[1]], low])
        optimizer = two_phase(optax.sgd(self.RATE), balance_newton(waves), waves)

        def measured(x):
            _, first, _ = descend(waves, optimizer, x, 11)
            end = descend(waves, optimizer, x, 300)[0]
            still = descend(waves, balance_newton(waves), x, 20)[0]
            hessian = jax.hessian(total(waves))(end)
            drop = total(waves)(x) - total(waves)(end)
            return first, still, hessian, drop, residual_of(waves, end)

        first, still, hessian, drop, residual = jax.jit(jax.vmap(measured))(starts)
        assert first.refused.tolist() == [1, 1, 1, 0]
        assert first.info.certified.tolist() == [False, False, False, True]
        # Newton alone stays where it is
        np.testing.assert_allclose(still, starts, atol=1e-12)
        assert np.linalg.eigvalsh(hessian).min() > 0
        assert (drop[:3] > 1).all()
        assert residual.max() <= 1e-20

    @pytest.mark.x64
    def test_a_spurious_zero_reached_by_the_balance_phase_is_left(self):
        # a balance optimizer that jumps to a saddle lower than the start
        fn = lambda x: jnp.stack([x[0] ** 2, 0.1 * x[1] ** 4 - x[1] ** 2 + 9 * x[0] ** 2])
        jump = optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda updates, state, params=None, **_: (-params, state),
        )
        optimizer = two_phase(optax.sgd(0.01), jump, fn, patience=1, plateau=1.0, switch=0.0)
        # beside the inflection of the second loss, H is definite and F above the saddle's
        start = jnp.array([2.0, 1.5])
        x, state, path = jax.jit(lambda x: descend(fn, optimizer, x, 300))(start)
        assert jnp.abs(path).sum(axis=1).min() == 0
        assert state.refused >= 1
        assert state.returns >= 1
        alone = descend(fn, optax.sgd(0.01), start, 300)[0]
        assert total(fn)(x) <= total(fn)(alone) + 1e-14

    def test_loss_flow_is_untouched_until_the_switch(self):
        optimizer = two_phase(optax.adam(0.01), balance_newton(triple), triple, patience=1000)
        start = jnp.array([-3.0, -3.0])
        both = jax.jit(
            lambda x: (
                descend(triple, optimizer, x, 30)[0],
                descend(triple, optax.adam(0.01), x, 30)[0],
            )
        )
        ours, alone = both(start)
        np.testing.assert_allclose(ours, alone, rtol=1e-6)

    def test_reaches_rounding_on_the_convex_problems(self, x64):
        for fn, rate, start in (
            (pair, 0.01, jnp.array(-3.0)),
            (triple, 0.01 / 3, jnp.array([-3.0, -3.0])),
        ):
            optimizer = two_phase(optax.sgd(rate), balance_newton(fn), fn)
            x, state, _ = jax.jit(partial(descend, fn, optimizer, steps=200))(x=start)
            assert residual_of(fn, x) <= (1e-30 if x64 else 1e-12)
            assert state.info.phase == BALANCE
            assert state.info.certified

    @pytest.mark.once
    def test_term_grads_of_the_caller(self):
        x = jnp.array([1.5, 0.5])
        optimizer = two_phase(optax.sgd(0.01), balance_newton(triple), triple)
        grads = terms(triple).value_and_term_grads(x)[1]
        update = jax.jit(optimizer.update)
        ours = update(x, optimizer.init(x), x)
        theirs = update(x, optimizer.init(x), x, term_grads=grads)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-6)

    @pytest.mark.once
    def test_line_searches_see_the_loss(self):
        for base in (optax.lbfgs(), optax.polyak_sgd(max_learning_rate=0.1, f_min=26.0)):
            optimizer = two_phase(base, balance_newton(triple), triple, patience=3)
            run = jax.jit(lambda x, o=optimizer: descend(triple, o, x, 40)[0])
            x = run(jnp.array([-3.0, 2.0]))
            np.testing.assert_allclose(x, 1, atol=1e-4)

    @pytest.mark.once
    def test_bad_arguments(self):
        make = partial(two_phase, optax.sgd(0.1), balance_newton(pair), pair)
        for name, value in {
            "switch": 0.1,
            "patience": 0,
            "plateau": -1.0,
            "escape": 0.0,
            "tolerance": 2.0,
            "iterations": 0,
            "weights": np.array([-1.0, 1.0]),
        }.items():
            with pytest.raises(ValueError, match=f"^{name}"):
                make(**{name: value})
        with pytest.raises(TypeError, match="fn"):
            two_phase(optax.sgd(0.1), balance_newton(pair), 3)


TRANSFORMATIONS = {
    "flow": lambda losses: balance_flow(losses, optax.adam(1e-2)),
    "newton": lambda losses: balance_newton(losses, iterations=4),
    "two_phase": lambda losses: two_phase(
        optax.adam(1e-2), balance_flow(losses, 1e-2), losses, patience=2, iterations=4
    ),
}


@pytest.mark.once
@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
class TestContract:
    def test_state_keeps_structure_shapes_and_types(self, make):
        losses, params, args = network(3, jnp.float32)
        params["bias"] = params["bias"].astype(jnp.bfloat16)
        optimizer = make(losses)
        state = optimizer.init(params)
        abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(optimizer.init(abstract), state)
        assert not any(a is b for a in jax.tree.leaves(state) for b in jax.tree.leaves(params))

        @partial(jax.jit, donate_argnums=(0, 1))
        def run(params, state, args):
            def step(carry, _):
                params, state = carry
                updates, state = optimizer.update(params, state, params, term_args=args)
                return (optax.apply_updates(params, updates), state), updates

            return jax.lax.scan(step, (params, state), None, length=4)

        (_, after), updates = run(params, state, args)
        shapes = jax.tree.map(lambda p: p[0], updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            shapes, network(3, jnp.float32)[1] | {"bias": shapes["bias"]}
        )
        assert shapes["bias"].dtype == jnp.bfloat16
        assert after.count == 4
        types = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
        first = jax.eval_shape(optimizer.init, abstract)
        assert types(after) == types(first)

    def test_not_finite_input_is_withheld_and_counted(self, make):
        losses, params, args = network(3)
        optimizer = make(losses)
        update = jax.jit(lambda u, s, p, a: optimizer.update(u, s, p, term_args=a))
        state = update(params, optimizer.init(params), params, args)[1]
        bad = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), params)
        batch = (args[0].at[0, 0].set(jnp.inf), args[1])
        for updates, at, data in (
            (params, bad, args),
            (params, params, batch),
            (bad, params, args),
        ):
            answer, after = update(updates, state, at, data)
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(answer))
            assert after.nonfinite == state.nonfinite + 1
            same = after._replace(count=state.count, nonfinite=state.nonfinite)
            chex.assert_trees_all_equal(same, state)

    def test_empty_tree_and_missing_params(self, make):
        optimizer = make(network(2)[0])
        updates, state = optimizer.update({}, optimizer.init({}), {})
        assert updates == {}
        assert state.count == 1
        with pytest.raises(ValueError, match="params"):
            optimizer.update({"a": jnp.ones(2)}, state)

    def test_wrappers(self, make):
        def closed(x):
            return triple(x)

        x = jnp.array([-3.0, 2.0])
        for wrapped in (
            optax.masked(make(closed), True),
            optax.MultiSteps(make(closed), 2),
            optax.apply_if_finite(make(closed), 3),
            optax.chain(make(closed), optax.scale(0.5)),
        ):
            end, _, _ = jax.jit(lambda x, o=wrapped: descend(triple, o, x, 4))(x)
            assert jnp.isfinite(end).all()
            assert (end != x).any()

    def test_vmap_is_a_loop(self, make):
        optimizer = make(triple)
        starts = jnp.array([[-3.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
        run = lambda x: descend(triple, optimizer, x, 6)[0]
        batched = jax.jit(jax.vmap(run))(starts)
        looped = jax.jit(lambda s: jax.lax.map(run, s))(starts)
        np.testing.assert_allclose(batched, looped, rtol=1e-5, atol=1e-6)


@pytest.mark.once
def test_inject_hyperparams():
    made = {
        "flow": optax.inject_hyperparams(balance_flow, static_args=("terms", "compensated"))(
            terms=triple, base_optimizer=optax.linear_schedule(0.5, 0.1, 10)
        ),
        "newton": optax.inject_hyperparams(
            balance_newton, static_args=("terms", "iterations", "max_backtracks")
        )(terms=triple, decrease=1e-3),
        "two_phase": optax.inject_hyperparams(
            two_phase, static_args=("loss_optimizer", "balance_optimizer", "terms", "iterations")
        )(
            loss_optimizer=optax.sgd(0.01),
            balance_optimizer=balance_newton(triple),
            terms=triple,
            switch=optax.linear_schedule(-0.3, -0.2, 10),
            patience=2,
            plateau=1e-6,
            escape=0.1,
        ),
    }
    for optimizer in made.values():
        end = jax.jit(lambda x, o=optimizer: descend(triple, o, x, 4)[0])(jnp.array([-3.0, 2.0]))
        assert jnp.isfinite(end).all()
        assert (end != jnp.array([-3.0, 2.0])).all()


@pytest.mark.once
def test_losses_with_arguments_need_names():
    losses = terms(lambda x, scale: scale * triple(x))
    for make in TRANSFORMATIONS.values():
        with pytest.raises(TypeError, match="names"):
            make(losses).init(jnp.zeros(2))


def test_phases_have_numbers():
    assert (LOSS, BALANCE) == (0, 1)


@pytest.mark.once
@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_meshes(kind, compensated):
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    fn = lambda p: {"a": jnp.sum((p["w"] - 1) ** 2) + p["b"] ** 2, "b": 3 * jnp.sum(p["w"] ** 2)}
    flow = balance_flow(fn, optax.sgd(0.1, momentum=0.5), compensated=compensated)
    start = {"w": jnp.linspace(-1, 2, 32).reshape(8, 4), "b": jnp.ones(())}

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = flow.update(params, state, params)
            return (optax.apply_updates(params, updates), state), state.info.balance

        return jax.lax.scan(step, (params, state), length=4)

    (expected, _), balance = run(start, flow.init(start))
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", None))
        params = start | {"w": jax.device_put(start["w"], rows)}
        (params, _), found = run(params, flow.init(params))
        assert params["w"].sharding.spec[0] == "rows"
    np.testing.assert_allclose(found, balance, rtol=1e-5)
    np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-5)
