import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallgain_jax.search.guard import (
    cosine,
    directional_curvature,
    guard_scale,
    trusted_curvature,
)
from tests.products import exact


def test_guard_makes_any_update_descend(eps):
    rng = np.random.default_rng(0)

    @exact
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


def test_directional_curvature_is_that_of_the_hessian():
    fn = lambda x: jnp.sum(jnp.cos(x) * x[::-1])
    x, d = jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([1.0, -1.0, 2.0])
    oracle = np.asarray(d) @ np.asarray(jax.hessian(fn)(x)) @ np.asarray(d)
    np.testing.assert_allclose(directional_curvature(fn, x, d), oracle, rtol=1e-4)


def test_cosine_of_nothing_is_zero():
    assert cosine(jnp.zeros(2), jnp.ones(2)) == 0


def test_small_curvature_is_trusted_down_to_rounding(eps):
    # a smooth direction of a chain of a million nodes
    assert trusted_curvature(jnp.asarray(200 * eps), jnp.asarray(1.0)) < 0.5
    assert trusted_curvature(jnp.asarray(50 * eps), jnp.asarray(1.0)) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_angle_has_no_unit(scale):
    a, b = jnp.asarray([3.0, 0.0]) * scale, jnp.asarray([3.0, 4.0]) / scale
    np.testing.assert_allclose(cosine(a, b), 0.6, rtol=1e-5)
