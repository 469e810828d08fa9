import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallgain_jax.networks.certificate import (
    ACTIVATIONS,
    lipschitz_certificate,
    lipschitz_lower_bound,
)
from smallgain_jax.networks.layers import Layer

HIDDEN, INPUTS, OUTPUTS, NETWORKS = 6, 2, 2, 200


def networks():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((NETWORKS, *shape))
    return [draw(HIDDEN, INPUTS), draw(OUTPUTS, HIDDEN)], draw(HIDDEN)


def exact_relu(first, second, bias):
    """Largest gain over the activation patterns that inputs in the plane realize.

    Lines a_i x + b_i = 0 cut the plane into regions, each touching a crossing of two of them (or
    lying far out): small moves around every crossing, and a large circle, visit them all.
    """
    points = []
    for i, j in itertools.combinations(range(HIDDEN), 2):
        corner = np.linalg.solve(first[[i, j]], -bias[[i, j]])
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points += [corner + 1e-6 * (1 + np.abs(corner).max()) * around]
    angles = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    points += [1e6 * np.stack([np.cos(angles), np.sin(angles)], axis=1)]
    active = np.concatenate(points) @ first.T + bias > 0
    patterns = np.unique(active, axis=0)
    return max(np.linalg.norm((second * pattern) @ first, 2) for pattern in patterns)


def test_relu_networks_lie_between_their_bounds(x64, eps):
    (first, second), bias = networks()
    exact = np.array([exact_relu(*layers) for layers in zip(first, second, bias)])
    upper = jax.jit(jax.vmap(lambda *p: lipschitz_certificate(p).upper))(first, second)

    def lower(first, second, bias, starts):
        fn = lambda x: second @ jax.nn.relu(first @ x + bias)
        return lipschitz_lower_bound(fn, starts, steps=60).lower

    starts = 2 * np.random.default_rng(1).standard_normal((NETWORKS, 16, INPUTS))
    arrays = [jnp.asarray(a, float) for a in (first, second, bias, starts)]
    found = np.asarray(jax.jit(jax.vmap(lower))(*arrays))
    assert (np.asarray(upper) >= exact * (1 - eps)).all()
    assert (found <= exact * (1 + 100 * eps)).all()
    # the product is loose by what the activations and misaligned singular vectors take away
    assert np.median(np.asarray(upper) / exact) < 2
    assert np.median(found / exact) > 0.95


def test_linear_networks_are_exact_from_below():
    (first, second), _ = networks()
    exact = np.linalg.norm(second @ first, 2, axis=(1, 2))

    def lower(first, second):
        start = jnp.ones((1, INPUTS), first.dtype)
        return lipschitz_lower_bound(lambda x: second @ (first @ x), start, steps=60).lower

    found = jax.jit(jax.vmap(lower))(jnp.asarray(first, float), jnp.asarray(second, float))
    assert (found <= exact * (1 + 1e-5)).all()
    assert np.median(found / exact) > 0.9999


def test_smooth_network_is_climbed_to_its_steepest_point():
    # tanh is steepest at 0, and so is this product of one unit
    fn = lambda x: 2 * jnp.tanh(3 * x - 1)
    found = jax.jit(lambda x: lipschitz_lower_bound(fn, x))(jnp.array([[1.5], [-1.0]]))
    np.testing.assert_allclose(found.lower, 6, rtol=1e-3)
    assert found.lower <= 6
    np.testing.assert_allclose(found.x, 1 / 3, atol=1e-2)
    np.testing.assert_allclose(
        lipschitz_certificate([3 * jnp.eye(1), 2 * jnp.eye(1)]).upper, 6, 1e-2
    )


@pytest.mark.once
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_constants(name):
    known = {"abs": jnp.abs, "identity": lambda x: x}
    fn = known.get(name) or getattr(jax.nn, name)
    x = jnp.linspace(-8, 8, 20001)
    slope = jnp.abs(jax.jit(jax.vmap(jax.grad(fn)))(x)).max()
    assert slope <= ACTIVATIONS[name] * (1 + 1e-6)
    assert slope >= 0.99 * ACTIVATIONS[name]


def test_rules_constants_and_errors():
    params = {
        "conv": {"weight": jnp.ones((2, 1, 3, 3))},
        "head": 2 * jnp.eye(2),
        "bias": jnp.ones(2),
    }
    certificate = lipschitz_certificate(params)
    np.testing.assert_allclose(certificate.layers, [3 * np.sqrt(18), 2], rtol=6e-3)
    half = lipschitz_certificate(params, activations=[0.5])
    np.testing.assert_allclose(half.upper, certificate.upper / 2, rtol=1e-6)
    only = lipschitz_certificate(
        params, layers=lambda path, leaf: Layer() if leaf.ndim == 2 else None
    )
    np.testing.assert_allclose(only.upper, 2, rtol=6e-3)
    assert lipschitz_certificate({}).upper == 1
    with pytest.raises(ValueError, match="activations"):
        lipschitz_certificate(params, activations="x")
    with pytest.raises(ValueError, match="activations"):
        lipschitz_certificate(params, activations=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"activations\[0\]"):
        lipschitz_certificate(params, activations=[-1.0])
    with pytest.raises(ValueError, match="x0"):
        lipschitz_lower_bound(jnp.tanh, jnp.ones(2))
    with pytest.raises(ValueError, match="steps"):
        lipschitz_lower_bound(jnp.tanh, jnp.ones((1, 2)), steps=0)


def test_circular_convolutions_as_flax_stores_them(eps):
    rng = np.random.default_rng(0)
    params = {k: {"kernel": jnp.asarray(rng.standard_normal((5, 5, 1, 1)), float)} for k in "ab"}
    # exact norms: the largest of the kernel's Fourier transform
    exact = np.prod(
        [
            np.abs(np.fft.fft2(np.asarray(p["kernel"])[:, :, 0, 0], (64, 64))).max()
            for p in params.values()
        ]
    )
    upper = float(lipschitz_certificate(params).upper)
    assert exact * (1 - 100 * eps) <= upper <= 25 * exact
