import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallgain_jax._tree import matmul
from smallgain_jax.networks.certificate import (
    ACTIVATIONS,
    lipschitz_certificate,
    lipschitz_lower_bound,
)
from smallgain_jax.networks.layers import Layer
from smallgain_jax.spectral.norms import coarse_bound, spectral_bound

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


def norm(matrix):
    """Spectral norm in 80 bits: of the matrix in its own unit."""
    top = np.abs(matrix).max(initial=0)
    if not (np.isfinite(top) and top > 0):
        return top
    # the smallest numbers have no reciprocal
    inside = (matrix.astype(np.longdouble) / np.longdouble(top)).astype(float)
    return np.longdouble(top) * np.linalg.norm(inside, 2)


def test_no_entry_takes_a_certificate_below_the_norm(x64):
    dtype = np.float64 if x64 else np.float32
    least, most = np.finfo(dtype).tiny, np.finfo(dtype).max
    eye, ones = np.eye(3), np.ones((3, 3))
    hurt = ones.copy()
    hurt[0, 1] = np.nan
    fits = [0 * eye, most / 3.5 * eye, most / 2 * eye, most / 7 * ones, -most / 40 * ones]
    fits += [2 * least * ones, least / 4 * eye, least / 1e3 * ones, eye + least / 4]
    rest = [hurt, np.where(np.isnan(hurt), np.inf, 1), -np.where(np.isnan(hurt), np.inf, 0)]
    rest += [most / 2 * ones]
    cases = np.stack([case.astype(dtype) for case in [*fits, *rest]])
    every = lambda m: (lipschitz_certificate({"w": m}).upper, *spectral_bound(m)[:2])
    upper, bound, lower = map(np.asarray, jax.jit(jax.vmap(every))(cases))
    coarse = np.asarray(jax.jit(jax.vmap(coarse_bound))(cases))
    assert np.asarray(lipschitz_certificate({"w": cases[0]}).upper) == 0
    for k, case in enumerate(fits):
        exact = norm(case.astype(dtype))
        for side in (upper[k], bound[k], coarse[k]):
            assert exact * (1 - 1e-12) <= side <= 1.74 * exact + 4 * least
        assert lower[k] <= exact
    assert bound[1] <= 1.01 * norm(fits[1])
    # no number at least as large: NaN or infinity
    assert not np.isfinite([side[len(fits) :] for side in (upper, bound, coarse)]).any()


@pytest.mark.once
def test_products_do_not_depend_on_the_order():
    chains = np.array(
        [
            [1e30, 1e30, 1e-30, 1e-30],
            [1e-30, 1e-30, 1e30, 1e30],
            [1e-30, 1e30, 3.0, 0.5],
            [1e-30, 1e-30, 1.0, 1.0],
            [1e30, 1e30, 1e30, 1e-30],
            [0.0, 1e30, 1e30, 1.0],
        ],
        np.float32,
    )
    eye = jnp.eye(2)[None]
    certify = lambda norms: lipschitz_certificate(list(norms[:, None, None] * eye)).upper
    found = np.asarray(jax.jit(jax.vmap(certify))(chains)).astype(np.longdouble)
    exact = np.prod(chains.astype(np.longdouble), axis=1)
    assert (found >= exact).all()
    np.testing.assert_allclose(found[:3], exact[:3], rtol=1e-4)
    assert found[3] <= 1.2e-38
    assert found[4] == np.inf
    assert found[5] == 0
    # a constant that float32 has no number for
    slow = lipschitz_certificate([jnp.eye(2)] * 2, activations=[1e-50])
    assert slow.upper >= np.finfo(np.float32).tiny


@pytest.mark.once
def test_convolutions_of_equinox_count_without_their_biases():
    keys = iter(jax.random.split(jax.random.key(0), 3))
    for layer, shape in [
        (eqx.nn.Conv1d(3, 4, 3, padding=1, key=next(keys)), (3, 5)),
        (eqx.nn.Conv2d(1, 2, 3, key=next(keys)), (1, 5, 5)),
        (eqx.nn.ConvTranspose2d(2, 1, 2, key=next(keys)), (2, 3, 3)),
    ]:
        small = eqx.tree_at(lambda c: c.bias, layer, 1e-3 * layer.bias)
        jacobian = jax.jacobian(layer)(jnp.zeros(shape))
        exact = np.linalg.norm(np.asarray(jacobian, float).reshape(-1, np.prod(shape)), 2)
        upper = lipschitz_certificate(small).upper
        assert exact <= upper <= 3 * exact * np.sqrt(9)
        assert upper == lipschitz_certificate(layer).upper


@pytest.mark.once
def test_dense_maps_onto_several_axes_as_flax_stores_them():
    rng = np.random.default_rng(0)
    for shape, out in [((1, 1, 3, 4), 2), ((5, 3, 4), 2), ((3, 2, 2, 4), 3)]:
        kernel = rng.standard_normal(shape).astype(np.float32)
        params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(shape[-out:])}
        exact = np.linalg.norm(kernel.reshape(int(np.prod(shape[:-out])), -1), 2)
        np.testing.assert_allclose(lipschitz_certificate(params).upper, exact, rtol=6e-3)
    # a kernel for each of 2 x 3 positions, of windows with 4 entries
    kernel = rng.standard_normal((2, 3, 4, 2)).astype(np.float32)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((2, 3, 2))}
    each = np.linalg.norm(kernel.reshape(6, 4, 2), 2, axis=(1, 2)).max()
    assert lipschitz_certificate(params).upper >= 2 * each
    # read one way or the other the norm differs
    for bias, axes in [((4, 4, 2), (4, 4, 4, 2)), ((5, 2), (3, 3, 4, 2))]:
        with pytest.raises(ValueError, match=r"layers must be given: .*kernel"):
            lipschitz_certificate({"kernel": jnp.ones(axes), "bias": jnp.ones(bias)})


def test_names_that_tell_and_dtypes():
    two = 2 * jnp.eye(2)
    for other in ({"bias": two}, {"scale": two}, {"bias_hh": two}, {"b": two}, {"f": jax.nn.relu}):
        assert len(lipschitz_certificate({"w": two, **other}).layers) == 1
    # alone, a letter tells nothing
    assert len(lipschitz_certificate({"a": two, "b": two}).layers) == 2
    rng = np.random.default_rng(0)
    turned = rng.standard_normal((4, 3)) + 1j * rng.standard_normal((4, 3))
    exact = np.linalg.norm(turned, 2)
    upper = lipschitz_certificate({"w": jnp.asarray(turned)}).upper
    assert exact <= upper <= 1.01 * exact
    whole = {"a": np.ones((4, 4), np.int8), "b": 2 * np.eye(4)}
    with pytest.raises(ValueError, match=r"layers must be given: .*\['a'\].*int8"):
        lipschitz_certificate(whole)
    certificate = lipschitz_certificate(whole, layers=lambda path, leaf: Layer())
    np.testing.assert_allclose(certificate.upper, 8, rtol=6e-3)
    # NumPy's doubles, in float32 too, and without a warning
    for scale, low, high in [(1, 1, 1.01), (1e-300, 1e-300, 1e-37), (1e300, 1e300, np.inf)]:
        upper = lipschitz_certificate({"w": scale * np.eye(2)}).upper
        assert low <= upper <= high or np.isnan(upper)
    # without entries, a map onto 0
    for shape in [(0, 3), (3, 0), (0, 0)]:
        certificate = lipschitz_certificate({"a": jnp.zeros(shape), "b": jnp.eye(2)})
        assert certificate.upper == certificate.layers[0] == 0


@pytest.mark.once
@pytest.mark.parametrize("activations", [1.0, None, ["relu"], jnp.ones(())])
def test_constants_that_are_none(activations):
    with pytest.raises(TypeError, match=r"^activations"):
        lipschitz_certificate([jnp.eye(2), jnp.eye(2)], activations=activations)


@pytest.mark.once
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_lower_bound_of_gains_whose_squares_leave_float32(scale):
    matrix = jnp.asarray([[3.0, 1.0], [0.0, 1.0]], jnp.float32)
    exact = scale * np.linalg.norm(np.asarray(matrix), 2)
    find = jax.jit(lambda s, x: lipschitz_lower_bound(lambda x: s * (matrix @ x), x, steps=20))
    found = find(jnp.float32(scale), jnp.ones((2, 2)))
    assert 0.999 * exact <= found.lower <= exact * (1 + 1e-5)
    # nothing stretched is nothing proven
    assert find(jnp.float32(0), jnp.ones((2, 2))).lower == 0


@pytest.mark.once
def test_sharded_matrices():
    mesh = jax.make_mesh((2, 2), ("r", "c"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    plain = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    exact = np.linalg.norm(plain, 2)
    specs = [jax.P(), jax.P("r"), jax.P(None, "r"), jax.P("r", "c"), jax.P(("r", "c"))]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(plain, spec) for spec in specs]
        for one in placed:
            for other in placed:
                np.testing.assert_allclose(matmul(one, other), plain @ plain, rtol=1e-4, atol=1e-5)
        row = jax.device_put(plain[0], jax.P("r"))
        for one in placed[:4]:
            np.testing.assert_allclose(matmul(one, row), plain @ plain[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(matmul(row, one), plain[0] @ plain, rtol=1e-4, atol=1e-5)
            for upper in (spectral_bound(one).upper, lipschitz_certificate({"w": one}).upper):
                assert exact <= upper <= 1.01 * exact
