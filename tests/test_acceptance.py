import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax.search.armijo import Trial, armijo
from smallgain_jax.search.box import Box
from smallgain_jax.search.guard import cosine, directional_curvature, guard_scale


def test_guard_makes_any_update_descend(eps):
    rng = np.random.default_rng(0)

    def one(key):
        a, b = jax.random.split(key)
        root = jax.random.normal(a, (6, 6))
        hessian = root @ root.T
        x, update = jax.random.normal(b, (2, 6))
        rows = jnp.sum(jnp.abs(hessian), axis=1)
        gradient = hessian @ x
        factor = guard_scale(gradient, update, jnp.vdot(rows * update, update), 0.9)
        before, after = (jnp.vdot(z, hessian @ z) / 2 for z in (x, x + factor * update))
        promised = 0.1 * factor * -jnp.vdot(gradient, update)
        return factor, (before - after - promised) / before

    keys = jax.random.split(jax.random.key(int(rng.integers(100))), 2000)
    factor, decrease = jax.jit(jax.vmap(one))(keys)
    assert (decrease >= -100 * eps).all()
    assert ((factor >= 0) & (factor <= 1)).all()
    assert (factor == 0).any()  # ascent directions occur, and are refused


def test_guard_refuses_what_is_not_finite():
    g = jnp.asarray([1.0, 1.0])
    for update in ([jnp.nan, 0.0], [-jnp.inf, 0.0]):
        assert guard_scale(g, jnp.asarray(update), jnp.asarray(1.0), 0.5) == 0
    assert guard_scale(g, -g, jnp.asarray(jnp.nan), 0.5) == 0
    assert guard_scale(g, -g, jnp.asarray(0.0), 0.5) == 1


def quadratic(scale):
    def trial(step):
        x = 1 - step * scale
        return Trial(x**2, -2 * scale * step, x)

    return trial


def test_armijo_backtracks_until_the_decrease_is_real():
    search = armijo(quadratic(jnp.asarray(3.9)), jnp.asarray(1.0))
    assert search.accepted
    assert search.backtracks == 1
    assert search.trial.value < 1
    np.testing.assert_allclose(search.trial.aux, 1 - 3.9 / 2, rtol=1e-6)


def test_armijo_reports_failure():
    search = armijo(quadratic(jnp.asarray(-1.0)), jnp.asarray(1.0), max_backtracks=3)
    assert not search.accepted
    nothing = armijo(lambda step: Trial(jnp.asarray(jnp.nan), -step, None), jnp.asarray(1.0))
    assert not nothing.accepted


def test_armijo_stops_at_the_rounding_of_the_value():
    flat = armijo(lambda step: Trial(jnp.asarray(1.1), -1e-30 * step, None), jnp.asarray(1.0))
    assert not flat.accepted
    assert flat.backtracks == 0


def test_armijo_is_reverse_differentiable():
    def best(scale):
        return armijo(quadratic(scale), jnp.asarray(1.0)).trial.value

    np.testing.assert_allclose(jax.grad(best)(jnp.asarray(3.9)), -(1 - 1.95), rtol=1e-5)


def test_directional_curvature_is_that_of_the_hessian():
    fn = lambda x: jnp.sum(jnp.cos(x) * x[::-1])
    x, d = jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([1.0, -1.0, 2.0])
    np.testing.assert_allclose(
        directional_curvature(fn, x, d), d @ jax.hessian(fn)(x) @ d, rtol=1e-4
    )


def test_cosine_and_box():
    assert cosine(jnp.zeros(2), jnp.ones(2)) == 0
    box = Box(jnp.zeros(2), jnp.asarray([1.0, 2.0]))
    np.testing.assert_array_equal(box.project(jnp.asarray([-1.0, 3.0])), [0.0, 2.0])
    blocked = box.blocks(jnp.asarray([0.0, 2.0]), jnp.asarray([-1.0, -1.0]))
    np.testing.assert_array_equal(blocked, [True, False])
