"""Penalties: oracles are extended-precision formulas, finite differences, autodiff and eigvalsh."""

import functools
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smallgain_jax import EnergyGraph, LocalEnergy, Quadratic
from smallgain_jax.penalties import (
    Hoyer,
    JumpReLU,
    LogSparsity,
    SmoothedL1,
    SoftmaxEntropy,
    TopK,
    jumprelu,
)
from tests import products

POINTS = 10_000
D = 5
EPS, DELTA, TAU = 0.3, 0.7, 0.8
THETA = np.array([0.2, 0.5, 1.0, 1.5, 2.0])
WIDTH = 0.25
WEIGHT = 1.3
# 80-bit floats: a range of 1e4932, so that no formula below needs care
L = np.longdouble

SIX = {
    "smoothed_l1": lambda: SmoothedL1(EPS, weight=WEIGHT, learn_eps=True),
    "log": lambda: LogSparsity(DELTA, weight=WEIGHT, learn_delta=True),
    "hoyer": lambda: Hoyer(weight=WEIGHT),
    "entropy": lambda: SoftmaxEntropy(D, TAU, weight=WEIGHT),
    "top_k": lambda: TopK(2, weight=WEIGHT),
    "jumprelu": lambda: JumpReLU(THETA.tolist(), WIDTH, weight=WEIGHT),
}
every = pytest.mark.parametrize("name", SIX)


@pytest.fixture
def dtype(x64):
    return jnp.dtype("float64" if x64 else "float32")


def batch(fn):
    return jax.jit(jax.vmap(fn))


@functools.cache
def everything(name, x64):
    """All that a penalty computes for rows x and directions v, [N, D] each, compiled once."""
    del x64  # only a key of the cache

    def one(x, v):
        penalty = SIX[name]()
        hessian = jax.hessian(penalty)(x)
        return {
            "value": penalty(x),
            "gradient": penalty.gradient(x),
            "by_rho": penalty.log_parameter_gradient(x),
            "hvp": penalty.hvp(x, v),
            "hessian": hessian,
            "hessian_diagonal": penalty.hessian_diagonal(x),
            "rows": penalty.majorizer_diagonal(x),
            "rows_v": penalty.majorizer_hvp(x, v),
        }

    compiled = batch(one)
    return lambda x, v: jax.tree.map(np.asarray, compiled(x, v))


def directions():
    v = np.random.default_rng(1).normal(size=(POINTS, D))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


# --- the formulas once more, in extended precision -----------------------------------------------
#
# Each maps (x [N, D], parameters) to (value [N], gradient [N, D], Hessian [N, D, D],
# derivative by the log-parameters [N, P]).


def diagonal(h):
    return h[:, :, None] * np.eye(h.shape[1], dtype=L)


def ref_smoothed_l1(x):
    w, eps = L(WEIGHT), L(EPS)
    r = np.sqrt(x * x + eps * eps)
    value = w * r.sum(1)
    by_rho = np.stack([value, w * (eps * eps / r).sum(1)], 1)
    return value, w * x / r, diagonal(w * eps**2 / r**3), by_rho


def ref_log(x):
    w, delta = L(WEIGHT), L(DELTA)
    s = delta**2 + x**2
    value = w * np.log1p((x / delta) ** 2).sum(1)
    by_rho = np.stack([value, w * (-2 * x * x / s).sum(1)], 1)
    return value, w * 2 * x / s, diagonal(w * 2 * (delta**2 - x**2) / s**2), by_rho


def ref_hoyer(x):
    n = x.shape[1]
    factor = L(WEIGHT) / (np.sqrt(L(n)) - 1)
    s, l1 = np.sign(x), np.abs(x).sum(1)[:, None]
    l2 = np.sqrt((x * x).sum(1))[:, None]
    zero = l2 == 0
    l2 = np.where(zero, 1, l2)
    value = np.where(zero, 0, factor * (l1 / l2 - 1))[:, 0]
    gradient = factor * (s / l2 - l1 * x / l2**3)
    mixed = s[:, :, None] * x[:, None, :]
    a, b = l1[:, :, None], l2[:, :, None]
    hessian = factor * (
        -(mixed + mixed.swapaxes(1, 2)) / b**3
        - a * np.eye(n, dtype=L) / b**3
        + 3 * a * x[:, :, None] * x[:, None, :] / b**5
    )
    return value, gradient, hessian, value[:, None]


def ref_entropy(x):
    w, tau = L(WEIGHT), L(TAU)
    z = (x - x.max(1, keepdims=True)) / tau
    log_a = z - np.log(np.exp(z).sum(1, keepdims=True))
    a = np.exp(log_a)
    ell = np.where(a > 0, log_a, 0) + 1
    m = (a * ell).sum(1, keepdims=True)
    value = -w * (a * (ell - 1)).sum(1)
    gradient = -w / tau * a * (ell - m)
    pairs = a[:, None, :] * (ell[:, :, None] + ell[:, None, :] + 1 - 2 * m[:, :, None])
    hessian = w / tau**2 * a[:, :, None] * (diagonal(m - ell - 1) + pairs)
    return value, gradient, hessian, value[:, None]


def ref_top_k(x, k=2):
    w = L(WEIGHT)
    order = np.argsort(-np.abs(x), axis=1, kind="stable")[:, :k]
    mask = np.zeros(x.shape, L)
    np.put_along_axis(mask, order, 1, axis=1)
    value = w / 2 * (mask * x * x).sum(1)
    return value, w * mask * x, diagonal(w * mask), np.zeros((len(x), 0), L)


def ref_jumprelu(x):
    w, tau, eps = L(WEIGHT), THETA.astype(L), L(WIDTH)
    u = (x - tau) / eps
    small = np.exp(-np.abs(u))
    g = np.where(u >= 0, 1, small) / (1 + small)
    other = np.where(u >= 0, small, 1) / (1 + small)
    s = g * other
    value = w * (tau * g).sum(1)
    hessian = diagonal(w * tau * s * (other - g) / eps**2)
    return value, w * tau * s / eps, hessian, w * tau * (g - tau * s / eps)


REFERENCE = {
    "smoothed_l1": ref_smoothed_l1,
    "log": ref_log,
    "hoyer": ref_hoyer,
    "entropy": ref_entropy,
    "top_k": ref_top_k,
    "jumprelu": ref_jumprelu,
}


def awkward_rows(name, extreme=300):
    """10,000 rows [N, D], the last thousand awkward: zeros, ties, thresholds, extremes."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(POINTS, D)) * 10 ** rng.uniform(-2, 1, (POINTS, 1))
    special = np.array(
        [0.0, -0.0, EPS, -EPS, DELTA, -DELTA, 1.0, -1.0, 2.0]
        + [sign * 10.0**power for sign in (1, -1) for power in (-extreme, extreme)]
    )
    x[-1000:] = rng.choice(special, (1000, D))
    x[-1000:-900] = x[-1000:-900, :1]  # all entries tie
    if name == "jumprelu":
        x[-900:-800] = THETA
    x[-1] = 0
    return x


def close(actual, expected, tolerance=1e-10):
    expected = np.asarray(expected).astype(L)
    actual = np.asarray(actual).astype(L)
    error = np.abs(actual - expected) / np.maximum(1, np.abs(expected))
    # an infinity where the exact result is beyond the range is right
    beyond = np.abs(expected) > np.finfo(np.float64).max
    error = np.where(beyond, np.where(np.abs(actual) >= 1e300, 0, np.inf), error)
    assert np.all(error <= tolerance), (error.max(), np.argwhere(~(error <= tolerance))[:3])


# --- closed form, autodiff, finite differences -------------------------------------------------


def natural_scale(name, x):
    """What a derivative is measured in: Hoyer's grow as the row shrinks."""
    largest = np.abs(x.astype(L)).max(1)
    return np.where((name == "hoyer") & (largest > 0), np.minimum(largest, 1), 1)


@every
@pytest.mark.x64
def test_agrees_with_the_formulas_at_ten_thousand_points(name):
    x, v = awkward_rows(name), directions()
    value, gradient, hessian, by_rho = REFERENCE[name](x.astype(L))
    ours = everything(name, True)(x, v)
    close(ours["value"], value)
    close(ours["by_rho"], by_rho)
    scale = natural_scale(name, x)
    close(scale[:, None] * ours["gradient"], scale[:, None] * gradient)
    # a Hoyer row of nothing but 1e-300 has a Hessian of 1e600, and at 0 the Hessian counts as 0
    largest = np.abs(x).max(1)
    keep = (largest > 1e-100) if name == "hoyer" else np.full(POINTS, True)
    product = (hessian * v[:, None, :].astype(L)).sum(2)
    scale = scale[keep, None] ** 2
    close(scale * np.asarray(ours["hvp"])[keep], scale * product[keep])
    if name == "hoyer":
        assert ours["hessian_diagonal"] is None
        assert np.all(np.asarray(ours["hvp"])[largest == 0] == 0)
    else:
        close(ours["hessian_diagonal"], np.diagonal(hessian, axis1=1, axis2=2))


@every
@pytest.mark.x64
def test_agrees_with_finite_differences(name):
    """Fourth-order differences in 80 bits along a random direction, away from kinks."""
    v = directions()
    x = np.random.default_rng(2).normal(size=(POINTS, D))
    # no kink (a zero for Hoyer, a tie for TopK) within the stencil
    x = np.sign(x) * (np.abs(x) + 0.1)
    smooth = np.min(np.diff(np.sort(np.abs(x), axis=1), axis=1), axis=1) > 0.02
    h = L(1) / 8192

    differences = [0, 0]
    for i, c in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        shifted = REFERENCE[name](x.astype(L) + i * h * v)
        differences = [
            total + c / (12 * h) * y for total, y in zip(differences, shifted[:2], strict=True)
        ]
    ours = everything(name, True)(x, v)
    slope = np.sum(np.asarray(ours["gradient"]) * v, axis=1)
    close(slope[smooth], differences[0][smooth])
    close(np.asarray(ours["hvp"])[smooth], differences[1][smooth])


@every
@pytest.mark.x64
def test_log_parameters_agree_with_finite_differences(name):
    penalty = SIX[name]()
    count = {"hoyer": 1, "entropy": 1, "top_k": 0, "jumprelu": D}.get(name, 2)
    assert penalty.num_log_parameters == count
    x = np.random.default_rng(3).normal(size=(50, D))
    x[0] = 0
    gradient = batch(penalty.log_parameter_gradient)(x)
    assert gradient.shape == (50, count)
    if not count:
        return
    h = 2.5e-4
    offsets = h * np.array([-2, -1, 1, 2])[:, None, None] * np.eye(count)
    at = jax.vmap(lambda rho: jax.vmap(penalty.with_log_parameters(rho))(jnp.asarray(x)))
    values = jax.jit(jax.vmap(at))(np.asarray(penalty.log_parameters) + offsets)
    close(gradient.T, np.einsum("i,ikn->kn", np.array([1, -8, 8, -1]) / (12 * h), values))


@every
@pytest.mark.x64
def test_agrees_with_autodiff_of_the_plain_formula(name):
    plain = {
        "smoothed_l1": lambda x: WEIGHT * jnp.sum(jnp.sqrt(x**2 + EPS**2)),
        "log": lambda x: WEIGHT * jnp.sum(jnp.log(1 + x**2 / DELTA**2)),
        "hoyer": lambda x: WEIGHT * (jnp.sum(jnp.abs(x)) / jnp.linalg.norm(x) - 1) / (D**0.5 - 1),
        "entropy": lambda x: (
            -WEIGHT * jnp.sum(jax.nn.softmax(x / TAU) * jax.nn.log_softmax(x / TAU))
        ),
        "top_k": lambda x: WEIGHT / 2 * jnp.sum(jnp.sort(x**2)[-2:]),
        "jumprelu": lambda x: (
            WEIGHT * jnp.sum(jnp.array(THETA) * jax.nn.sigmoid((x - jnp.array(THETA)) / WIDTH))
        ),
    }[name]
    x = np.random.default_rng(4).normal(size=(POINTS, D)) * 1.5
    ours = everything(name, True)(x, directions())
    theirs = batch(lambda x: (plain(x), jax.grad(plain)(x), jax.hessian(plain)(x)))(x)
    theirs = jax.tree.map(np.asarray, theirs)
    scale = natural_scale(name, x)
    close(ours["value"], theirs[0])
    close(scale[:, None] * ours["gradient"], scale[:, None] * theirs[1])
    scale = scale[:, None, None] ** 2
    close(scale * ours["hessian"], scale * theirs[2])


@every
@pytest.mark.once
def test_float32_agrees_to_its_own_precision(name):
    x = awkward_rows(name, extreme=15).astype(np.float32)
    value, gradient, _, by_rho = REFERENCE[name](x.astype(L))
    ours = everything(name, False)(x, directions().astype(np.float32))
    assert ours["gradient"].dtype == jnp.float32
    scale = natural_scale(name, x)[:, None]
    close(ours["value"], value, 2e-5)
    close(ours["by_rho"], by_rho, 2e-5)
    close(scale * ours["gradient"], scale * gradient, 2e-5)


# --- majorizers --------------------------------------------------------------------------------


@every
def test_majorizer_bounds_the_hessian(name, dtype):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(POINTS, D)) * 10 ** rng.uniform(-0.5, 1, (POINTS, 1))
    x[:200] = np.round(x[:200])  # zeros, ties
    if name == "hoyer":
        # at 0 Hoyer has no Hessian, and near 0 one that no absolute tolerance fits
        x[:200, 0] = 1
        x /= np.maximum(1e-300, np.minimum(1, np.linalg.norm(x, axis=1, keepdims=True)))
    x, v = jnp.asarray(x, dtype), jnp.asarray(directions(), dtype)
    ours = everything(name, dtype == jnp.float64)(x, v)
    rows = np.asarray(ours["rows"])
    assert rows.dtype == dtype
    assert rows.shape == x.shape
    assert np.all(rows >= 0)
    np.testing.assert_allclose(ours["rows_v"], rows * v, rtol=1e-6)
    gap = rows[:, :, None] * np.eye(D) - np.asarray(ours["hessian"])
    tolerance = 1e-12 if dtype == jnp.float64 else 1e-5
    assert np.linalg.eigvalsh((gap + gap.swapaxes(1, 2)) / 2).min() >= -tolerance


@pytest.mark.x64
def test_which_majorizer():
    x = np.random.default_rng(6).normal(size=(POINTS, D))
    ours = {name: everything(name, True)(x, directions()) for name in SIX}
    rows = {name: np.asarray(result["rows"]) for name, result in ours.items()}
    hessian = {name: np.asarray(result["hessian"]) for name, result in ours.items()}
    close(rows["smoothed_l1"], WEIGHT / np.sqrt(x**2 + EPS**2))
    close(rows["log"], 2 * WEIGHT / (DELTA**2 + x**2))
    close(rows["top_k"], np.diagonal(hessian["top_k"], axis1=1, axis2=2))
    g = 1 / (1 + np.exp(-(x - THETA) / WIDTH))
    square = WEIGHT * THETA * (g * (1 - g)) ** 2 / WIDTH**2
    exact = np.diagonal(hessian["jumprelu"], axis1=1, axis2=2)
    close(rows["jumprelu"], np.maximum(square, np.abs(exact)))
    close(rows["entropy"], np.abs(hessian["entropy"]).sum(2))
    largest = np.abs(np.linalg.eigvalsh(hessian["hoyer"])).max(1, keepdims=True)
    close(rows["hoyer"], np.broadcast_to(largest, x.shape))


@pytest.mark.x64
def test_entropy_majorizer_of_long_rows():
    """The row sums are accumulated in blocks; 70 atoms are not a whole number of them."""
    penalty = SoftmaxEntropy(70, 1.4)
    row = jnp.asarray(np.random.default_rng(8).normal(size=70) * 3)
    expected = jnp.diag(penalty.row_majorizer(row))
    close(penalty.majorizer_diagonal(row), expected)
    close(jnp.diag(penalty.row_hessian(row)), penalty.hessian_diagonal(row))


@pytest.mark.x64
@pytest.mark.parametrize("name", ["smoothed_l1", "log"])
def test_reweighted_squares_bound_the_penalty_everywhere(name):
    penalty = SIX[name]()
    rng = np.random.default_rng(9)
    x, y = 10 ** rng.uniform(-2, 2, (2, POINTS, 1)) * rng.normal(size=(2, POINTS, D))
    value, gradient, rows = batch(penalty.value_gradient_majorizer)(x)
    bound = value + jnp.sum(gradient * (y - x) + rows * (y - x) ** 2 / 2, axis=1)
    excess = np.asarray(batch(penalty)(y) - bound)
    assert np.all(excess <= 1e-12 * np.abs(bound))


@pytest.mark.x64
def test_fisher_times_kappa_bounds_the_entropy():
    """The diagonal that the docstring of SoftmaxEntropy claims for `majorized_step`."""
    penalty = SIX["entropy"]()
    x = np.random.default_rng(10).normal(size=(POINTS, D)) * 3
    z = x / TAU
    a = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    c = -np.log(a) + (a * np.log(a)).sum(1, keepdims=True)
    kappa = np.maximum(c.max(1, keepdims=True) - 1, 1)
    rows = WEIGHT / TAU**2 * kappa * a
    gap = rows[:, :, None] * np.eye(D) - everything("entropy", True)(x, directions())["hessian"]
    assert np.linalg.eigvalsh(gap).min() >= -1e-12
    stepped = np.asarray(batch(lambda x: penalty.majorized_step(x, 0.5))(x))
    close(stepped, x - 0.5 * WEIGHT / TAU * a * c / rows)
    cooled = np.exp((1 + 0.5 / kappa) * z)
    stepped = np.exp(stepped / TAU)
    close(stepped / stepped.sum(1, keepdims=True), cooled / cooled.sum(1, keepdims=True))


# --- softmax entropy: pinned figures, derivatives ------------------------------------------------


@pytest.mark.x64
def test_pinned_figures_of_the_entropy():
    penalty = SoftmaxEntropy(2, 1.0)
    row = jnp.log(jnp.array([0.95, 0.05]))
    operators = (penalty.row_hessian, penalty.row_fisher, penalty.row_majorizer)
    h, g, m, autodiff = jax.tree.map(
        np.asarray, jax.jit(lambda row: [f(row) for f in (*operators, jax.hessian(penalty))])(row)
    )
    assert h[0, 0].item() == pytest.approx(0.0783747664, abs=1e-9)
    assert g[0, 0].item() == pytest.approx(0.0475, abs=1e-12)
    assert g[0, 0] - h[0, 0] < -1e-3
    assert np.linalg.eigvalsh(g - h).min() < -1e-9
    assert np.linalg.eigvalsh(m - h).min() >= -1e-12
    assert np.linalg.eigvalsh(g).min() >= -1e-12
    close(h, autodiff)


@pytest.mark.x64
def test_derivatives_of_the_row_operators():
    penalty = SoftmaxEntropy(4, 0.8, weight=1.1)
    row = jnp.array([0.3, -0.6, 0.9, 0.2])
    step = 1e-6

    @jax.jit
    @jax.vmap
    def all_of(atom):
        pairs = (
            (penalty.row_hessian, penalty.row_hessian_derivative),
            (penalty.row_majorizer, penalty.row_majorizer_derivative),
            (penalty.row_fisher, penalty.row_fisher_derivative),
        )
        moved = step * jax.nn.one_hot(atom, 4)
        return [
            (by(row, atom), (of(row + moved) - of(row - moved)) / (2 * step)) for of, by in pairs
        ]

    results = jax.tree.map(np.asarray, all_of(jnp.arange(4)))
    for derivative, difference in results:
        np.testing.assert_allclose(derivative, difference, atol=1e-6)
        np.testing.assert_allclose(derivative, derivative.swapaxes(1, 2), atol=1e-12)
    by_atom, sign = results[1][0], np.sign(penalty.row_hessian(row))
    close(np.diagonal(by_atom, axis1=1, axis2=2), np.sum(sign * results[0][0], axis=2))
    assert np.all(by_atom[:, ~np.eye(4, dtype=bool)] == 0)
    # one atom: no entropy, so every entry is 0 and sign(0) = 0 leaves the derivative at 0
    assert SoftmaxEntropy(1).row_majorizer_derivative(jnp.array([0.4]), 0).tolist() == [[0.0]]


# --- descent -------------------------------------------------------------------------------------


def starts(name, dtype):
    rng = np.random.default_rng(11)
    x = rng.normal(size=(1000, D)) * 10 ** rng.uniform(-1, 1, (1000, 1))
    x[:50] = np.round(x[:50])
    if name == "jumprelu":
        x = np.abs(x)
    return jnp.asarray(x, dtype), jnp.asarray(rng.uniform(0.01, 2, (1000, 30)), dtype)


@every
def test_majorized_descent_never_increases(name, dtype):
    penalty = SIX[name]()
    x, steps = starts(name, dtype)

    @jax.jit
    @jax.vmap
    def descend(x, steps):
        def one(x, step):
            y = penalty.majorized_step(x, step)
            # without the guard: what the theorem in the docstring says, up to rounding
            return y, (penalty(y), penalty(penalty._descend(x, step)) - penalty(x))

        end, (values, unguarded) = jax.lax.scan(one, x, steps)
        return end, jnp.concatenate([penalty(x)[None], values]), unguarded

    end, values, unguarded = descend(x, steps)
    assert end.dtype == dtype
    assert np.all(np.diff(np.asarray(values), axis=1) <= 0)
    rounding = 40 * np.finfo(dtype).eps * (np.asarray(values)[:, :-1] + WEIGHT)
    assert np.all(np.asarray(unguarded) <= rounding)
    # the guard must not be what makes it monotone: nearly every start goes down
    assert np.mean(np.asarray(values[:, -1] < values[:, 0])) > 0.95


@pytest.mark.x64
def test_newton_would_not_descend():
    """Why the majorizer of the smoothed L1 is not its Hessian."""
    penalty, x = SmoothedL1(0.1), jnp.array([1.0])

    @jax.jit
    def values(x):
        newton = x - penalty.gradient(x) / penalty.hessian_diagonal(x)
        return penalty(newton), penalty(x), penalty(penalty.majorized_step(x))

    newton, start, ours = values(x)
    assert newton > 10 * start
    assert ours < start


@pytest.mark.once
def test_hoyer_step_stops_at_a_sign_change():
    penalty = Hoyer()
    x = jnp.array([1.0, -0.01, 0.5, 0.0])
    y = eqx.filter_jit(penalty.majorized_step)(x, 2.0)
    assert np.all(np.asarray(y * x) >= 0)
    assert y[1] == 0
    assert y[3] == 0
    assert eqx.filter_jit(penalty.majorized_step)(jnp.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.once
def test_figures_in_the_docstring_of_jumprelu():
    g = np.linspace(0, 1, 1_000_001)[1:-1]
    slope = g * (1 - g)
    largest = np.max(slope * np.abs(1 - 2 * g))
    assert largest == pytest.approx(1 / (6 * 3**0.5), rel=1e-9)
    assert 4.23 < np.max(1 / np.maximum(slope, np.abs(1 - 2 * g))) < 4.24


@pytest.mark.parametrize("name", ["smoothed_l1", "log"])
@pytest.mark.parametrize("omega", [0.5, 1.0, 1.9])
def test_reweighted_least_squares_is_monotone(name, omega, dtype):
    """0.5 ||A x - b||^2 + p(x): row sums of |A^T A| and the reweighted squares bound the sum."""
    penalty = SIX[name]()
    rng = np.random.default_rng(12)
    a, b = jnp.asarray(rng.normal(size=(20, 8)), dtype), jnp.asarray(rng.normal(size=20), dtype)
    rows = jnp.sum(jnp.abs(products.exact(jnp.matmul)(a.T, a)), axis=1)

    @products.exact
    def loss(x):
        return 0.5 * jnp.sum((a @ x - b) ** 2) + penalty(x)

    def one(x, _):
        y = x - omega * jax.grad(loss)(x) / (rows + penalty.majorizer_diagonal(x))
        return y, loss(x)

    x = jnp.asarray(rng.normal(size=8) * 3, dtype)
    values = np.asarray(jax.lax.scan(one, x, length=200)[1])
    assert np.all(np.diff(values) <= 20 * np.finfo(dtype).eps * values[:-1])
    assert values[-1] < 0.9 * values[0]


# --- in an energy graph --------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("delta", [2e-38, 1e-25, 1e-19, 1e19, 1e38])
def test_log_sparsity_is_finite_over_the_range_of_float32(delta):
    delta = np.float32(delta)
    x = np.concatenate([2 * np.float32(10.0) ** np.arange(-38, 38, 1, np.float32), [0, delta]])
    x = np.clip(x, 0, np.finfo(np.float32).max).astype(np.float32)
    penalty, top = LogSparsity(delta), float(np.finfo(np.float32).max)
    d, z = L(delta), x.astype(L)
    bound = 2 / (d**2 + z**2)
    hessian = bound * (d - z) * (d + z) / (d**2 + z**2)
    for found, exact in (
        (penalty.hessian_diagonal(x), hessian),
        (penalty.hvp(x, np.ones_like(x)), hessian),
        (penalty.majorizer_diagonal(x), bound),
        (penalty.gradient(x), bound * z),
    ):
        assert np.isfinite(found).all()
        # what cancels near |x| = delta is known to the rounding of its terms
        error = np.abs(np.asarray(found).astype(L) - np.clip(exact, -top, top))
        assert (error <= 2e-5 * np.abs(exact) + 1e-6 * bound + 1e-37).all()
    # and by autodiff of the value, wherever the exact one and its two terms fit
    fits = bound < 1e37
    bent = jax.jvp(jax.grad(lambda x: penalty(x)), (x,), (np.ones_like(x),))[1]
    error = np.abs(np.asarray(bent).astype(L) - hessian)
    assert (error <= 1e-6 * bound + 1e-37)[fits].all()


@pytest.mark.once
@pytest.mark.parametrize(
    ("penalty", "x", "expected"),
    [
        (SmoothedL1(1.0, weight=1e-10), np.full(100, 3e38), 100 * 3e38 * 1e-10),
        (TopK(2, weight=1e-10), np.full(4, 2e20), 1e-10 * (2e20) ** 2),
        (JumpReLU([2e38] * 4, 1.0, weight=1e-10), np.full(4, 3e38), 1e-10 * 4 * 2e38),
    ],
    ids=["smoothed_l1", "top_k", "jumprelu"],
)
def test_a_penalty_overflows_no_sooner_than_it_must(penalty, x, expected):
    np.testing.assert_allclose(penalty(x.astype(np.float32)), expected, rtol=1e-5)
    assert np.isfinite(penalty.gradient(x.astype(np.float32))).all()


def ref_hoyer_rows(x):
    size = np.sqrt(np.sum(x**2))
    f = np.sum(np.abs(x)) / size
    t = np.sum(np.sign(x) ** 2) - f * f
    return (f + np.sqrt(f * f + 4 * t)) / 2 / size**2 / (np.sqrt(L(x.size)) - 1)


ENDS = [
    (LogSparsity(1e-19, weight=0.0), [0.0, 1.0, 1e-19]),
    (LogSparsity(1e-25), [1e-25, 0.0, 1.0]),
    (LogSparsity(2e38, weight=1e10), [3e38, 1.0, -2e38]),
    (SmoothedL1(2e38, weight=0.0), [3e38, 1.0]),
    (SmoothedL1(2e38, weight=0.1), [3e38, 1.0]),
    (SmoothedL1(2e-38, weight=1e-10), [3e-38, 1.0, 0.0]),
    (Hoyer(), [3e38, -1e38, 5e37, 0.0]),
    (Hoyer(weight=0.0), [3e-30, -1e-30, 5e-31, 0.0]),
    (Hoyer(), [3e-18, -1e-18, 5e-19, 0.0]),
    (Hoyer(), [3e-30, -1e-30, 5e-31, 0.0]),
    (JumpReLU([1.0, 1.0], 1e-20), [5.0, 1.0]),
    (JumpReLU([1.0, 1.0], 1e-20, weight=0.0), [5.0, 1.0]),
    (JumpReLU([1.0, 1e38], 2e38), [3e38, -1e38]),
]


def at_the_ends(penalty, x):
    """Value, gradient, majorizer and diagonal of the Hessian, in 80 bits."""
    w, z = L(penalty.weight), np.asarray(x, np.float32).astype(L)
    if isinstance(penalty, LogSparsity):
        d = L(penalty.delta)
        bound = 2 * w / (d**2 + z**2)
        bend = bound * (d - z) * (d + z) / (d**2 + z**2)
        return w * np.log1p((z / d) ** 2).sum(), bound * z, bound, bend
    if isinstance(penalty, SmoothedL1):
        r = np.sqrt(z**2 + L(penalty.eps) ** 2)
        return (w * r).sum(), w * z / r, w / r, w * L(penalty.eps) ** 2 / r**3
    if isinstance(penalty, JumpReLU):
        tau, eps = np.asarray(penalty.thresholds).astype(L), L(penalty.eps)
        g, u = 1 / (1 + np.exp((tau - z) / eps)), (z - tau) / eps
        slope = np.exp(-np.abs(u)) / (1 + np.exp(-np.abs(u))) ** 2
        bend = w * tau * slope * (1 - 2 * g) / eps**2
        rows = w * tau * slope * np.maximum(slope, np.abs(1 - 2 * g)) / eps**2
        return (w * tau * g).sum(), w * tau * slope / eps, rows, bend
    f, size = np.abs(z).sum() / np.sqrt((z**2).sum()), np.sqrt((z**2).sum())
    factor = w / (np.sqrt(L(z.size)) - 1)
    rows = np.full(z.shape, w * ref_hoyer_rows(z))
    return factor * (f - 1), factor * (np.sign(z) - f * z / size) / size, rows, None


@pytest.mark.once
@pytest.mark.parametrize(("penalty", "x"), ENDS)
@pytest.mark.parametrize("jit", [True, False])
def test_formulas_at_the_ends_of_float32(penalty, x, jit):
    def ask(x):
        bend = None if isinstance(penalty, Hoyer) else penalty.hessian_diagonal(x)
        return penalty(x), penalty.gradient(x), penalty.majorizer_diagonal(x), bend

    found = (jax.jit(ask) if jit else ask)(jnp.asarray(x, jnp.float32))
    top = float(np.finfo(np.float32).max)
    for name, one, exact in zip(["p", "gradient", "rows", "bend"], found, at_the_ends(penalty, x)):
        if exact is None:
            continue
        # below the smallest normal number there is nothing
        np.testing.assert_allclose(
            np.asarray(one).astype(L), np.clip(exact, -top, top), rtol=2e-5, atol=2e-38,
            err_msg=name,
        )  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("exact_rows", [True, False])
def test_entropy_at_a_temperature_whose_square_underflows(exact_rows):
    penalty = SoftmaxEntropy(3, 1e-30, exact_rows=exact_rows)
    ask = lambda z: (penalty(z), penalty.majorizer_diagonal(z), penalty.hessian_diagonal(z))
    # one atom has all the weight: e^(-1e30) is 0 in every unit
    for value in (*ask(jnp.arange(3.0)), *jax.jit(ask)(jnp.arange(3.0))):
        np.testing.assert_array_equal(value, 0)
    # H = -(diag(a) - a a') / tau^2 with a = 1/3, beyond float32
    top = float(np.finfo(np.float32).max)
    value, rows, bend = ask(jnp.zeros(3))
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_array_equal(rows, top)
    np.testing.assert_array_equal(bend, -top)


@pytest.mark.once
@pytest.mark.parametrize("penalty", [TopK(1, weight=0.0), JumpReLU([1.0, 1.0], 0.1, weight=0.0)])
def test_a_weight_of_zero_switches_a_penalty_off(penalty):
    x = jnp.array([1.0, -2.0])
    assert penalty(x) == 0
    np.testing.assert_array_equal(penalty.gradient(x), 0)
    np.testing.assert_array_equal(penalty.majorizer_diagonal(x), 0)


@every
def test_is_a_local_energy(name):
    penalty = SIX[name]()
    assert isinstance(penalty, LocalEnergy)
    graph = EnergyGraph(penalty, [Quadratic([0, 1], [1, 2], 0.5)], num_nodes=D)

    @jax.jit
    def all_of(x):
        curvature = graph.curvature(x)
        hessian = jax.hessian(graph.energy)(x)
        return curvature, hessian, graph.local_energy(x) - penalty(x), penalty.majorizer_diagonal(x)

    x = jnp.asarray(np.random.default_rng(13).normal(size=D))
    curvature, hessian, difference, rows = all_of(x)
    assert difference == 0
    np.testing.assert_allclose(curvature.local_rows, rows, rtol=1e-5)
    assert curvature.lipschitz >= np.linalg.eigvalsh(hessian)[-1] - 1e-5


@pytest.mark.x64
@pytest.mark.parametrize("name", ["smoothed_l1", "log"])
def test_graph_descent_with_its_row_sums_is_monotone(name):
    rng = np.random.default_rng(14)
    i = rng.integers(0, 30, 60)
    edges = Quadratic(i, (i + rng.integers(1, 30, 60)) % 30, rng.uniform(0.1, 2, 60))
    graph = EnergyGraph(SIX[name](), [edges], num_nodes=30)

    def one(x, _):
        y = x - graph.gradient(x) / graph.curvature(x).row_sums
        return y, graph.energy(x)

    x = jnp.asarray(rng.normal(size=30) * 3)
    values = np.asarray(jax.lax.scan(one, x, length=100)[1])
    assert np.all(np.diff(values) <= 1e-13 * values[:-1])
    assert values[-1] < 0.5 * values[0]


# --- the gate ------------------------------------------------------------------------------------


def smooth_gate(z, tau, eps=WIDTH):
    return z * jax.nn.sigmoid((z - tau) / eps)


@pytest.mark.x64
def test_jumprelu_is_hard_forward_and_smooth_backward():
    z = jnp.concatenate([jnp.linspace(-3, 3, 61), jnp.array([0.5, 1e300, -1e300, 1e-300])])
    tau = jnp.full(z.shape, 0.5)
    out = jumprelu(z, 0.5, WIDTH)
    np.testing.assert_array_equal(out, np.where(z > 0.5, z, 0))
    for argnum in (0, 1):
        ours = batch(jax.grad(lambda z, t: jumprelu(z, t, WIDTH), argnum))(z, tau)
        close(ours, batch(jax.grad(smooth_gate, argnum))(z, tau))
    g = jax.nn.sigmoid((z - tau) / WIDTH)
    slope = jnp.where(jnp.abs(z) > 1e10, 0, z * g * (1 - g) / WIDTH)
    close(batch(jax.grad(lambda z: jumprelu(z, 0.5, WIDTH)))(z), g + slope)
    assert jax.grad(lambda e: jumprelu(0.6, 0.5, e))(WIDTH) == 0


@pytest.mark.x64
@pytest.mark.parametrize(
    "second",
    [
        jax.hessian,
        lambda f, argnums: jax.jacrev(jax.jacrev(f, argnums), argnums),
        lambda f, argnums: jax.jacrev(jax.jacfwd(f, argnums), argnums),
        lambda f, argnums: jax.jacfwd(jax.jacfwd(f, argnums), argnums),
    ],
    ids=["forward-reverse", "reverse-reverse", "reverse-forward", "forward-forward"],
)
def test_jumprelu_has_second_derivatives_in_every_mode(second):
    z, tau = jnp.linspace(-2, 2, 40), jnp.linspace(0.1, 1, 40)

    def ours(z, tau):
        return jumprelu(z, tau, WIDTH)

    actual = jax.vmap(second(ours, argnums=(0, 1)))(z, tau)
    expected = batch(jax.hessian(smooth_gate, argnums=(0, 1)))(z, tau)
    jax.tree.map(close, actual, expected)


@pytest.mark.once
def test_jumprelu_broadcasts_and_keeps_dtype():
    z = jnp.ones((3, D), jnp.bfloat16)
    assert jumprelu(z, THETA.astype(np.float32), 0.1).dtype == jnp.bfloat16
    by_threshold = jax.grad(lambda t: jnp.sum(jumprelu(jnp.ones((3, D)), t, 0.1)))(
        jnp.asarray(THETA)
    )
    assert by_threshold.shape == (D,)
    assert jnp.isnan(jumprelu(jnp.nan, 0.5, 0.1))


# --- transformations, dtypes, schedules, learnable parameters ------------------------------------


@pytest.mark.once
@every
def test_one_pass_jit_and_vmap_agree(name, dtype):
    penalty = SIX[name]()
    x = jnp.asarray(np.random.default_rng(15).normal(size=(7, D)), dtype)
    # a penalty is a pytree: it goes through jit and vmap as an argument
    one_pass = eqx.filter_jit(lambda p, x: jax.vmap(lambda row: p.value_gradient_majorizer(row))(x))
    value, gradient, rows = one_pass(penalty, x)
    np.testing.assert_allclose(value[3], penalty(x[3]), rtol=1e-5)
    np.testing.assert_allclose(gradient[3], penalty.gradient(x[3]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rows[3], penalty.majorizer_diagonal(x[3]), rtol=1e-4, atol=1e-6)
    weights = jnp.arange(1.0, 4.0)
    many = jax.vmap(lambda w: eqx.tree_at(lambda p: p.weight, penalty, w))(weights)
    totals = batch(lambda p: p(x[0]))(many)
    np.testing.assert_allclose(totals, weights * penalty(x[0]) / WEIGHT, rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("name", ["smoothed_l1", "log", "entropy", "top_k", "jumprelu"])
def test_rows_of_a_batch_add_up(name, dtype):
    penalty = SIX[name]()
    x = jnp.asarray(np.random.default_rng(16).normal(size=(2, 3, D)), dtype)
    rows = x.reshape(6, D)
    np.testing.assert_allclose(penalty(x), jnp.sum(batch(penalty)(rows)), rtol=1e-5)
    methods = [penalty.gradient, penalty.hessian_diagonal, penalty.majorizer_diagonal]
    whole = jax.jit(lambda x: [method(x) for method in methods])(x)
    by_row = batch(lambda x: [method(x) for method in methods])(rows)
    for one, other in zip(whole, by_row, strict=True):
        np.testing.assert_allclose(one.reshape(6, D), other, rtol=1e-5, atol=1e-6)


@pytest.mark.once
@every
def test_bfloat16_accumulates_in_float32(name):
    penalty = SIX[name]()
    x = jnp.asarray(np.random.default_rng(17).normal(size=(2000, D)), jnp.bfloat16)
    value = jax.jit(lambda x: penalty(x))(x)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, penalty(x.astype(jnp.float32)), rtol=1e-6)
    assert jax.eval_shape(jax.grad(penalty), x).dtype == jnp.bfloat16
    for result in jax.eval_shape(penalty.value_gradient_majorizer, x):
        assert result.dtype == jnp.float32


@pytest.mark.once
@every
def test_traced_nan_propagates(name):
    penalty = SIX[name]()
    x = jnp.ones(D).at[2].set(jnp.nan)
    assert jnp.isnan(jax.jit(lambda x: penalty(x))(x))
    step = jax.jit(lambda x: penalty.majorized_step(x))(x)
    np.testing.assert_array_equal(step, x)


@pytest.mark.once
@every
def test_schedule_gives_the_weight(name):
    schedule = optax.linear_schedule(0.0, 2.0, 10)
    arguments = {
        "smoothed_l1": lambda w: SmoothedL1(EPS, weight=w),
        "log": lambda w: LogSparsity(DELTA, weight=w),
        "hoyer": lambda w: Hoyer(weight=w),
        "entropy": lambda w: SoftmaxEntropy(D, TAU, weight=w),
        "top_k": lambda w: TopK(2, weight=w),
        "jumprelu": lambda w: JumpReLU(THETA.tolist(), WIDTH, weight=w),
    }[name]
    x = jnp.asarray(np.random.default_rng(18).normal(size=D), jnp.float32)
    scheduled = arguments(schedule)
    assert scheduled(x) == 0
    at = jax.jit(lambda count: scheduled.at_step(count)(x))
    np.testing.assert_allclose(at(5), arguments(1.0)(x), rtol=1e-6)
    np.testing.assert_allclose(at(99), arguments(2.0)(x), rtol=1e-6)
    assert arguments(1.0).at_step(3)(x) == arguments(1.0)(x)


@every
def test_log_parameters_are_clamped(name, dtype):
    penalty = SIX[name]()
    x = jnp.array([0.0, 0.3, -1.0, 2.0, 1e-3], dtype)

    @jax.jit
    @jax.vmap
    def all_of(rho):
        extreme = penalty.with_log_parameters(jnp.full(penalty.log_parameters.shape, rho))
        product = extreme.hvp(x, jnp.ones(D, dtype))
        return *extreme.value_gradient_majorizer(x), extreme.log_parameter_gradient(x), product

    for result in all_of(jnp.array([-1e6, -50.0, 50.0, 1e6], dtype)):
        assert np.all(np.isfinite(np.asarray(result)))


@pytest.mark.once
def test_effective_parameters():
    rho = jnp.array([np.log(2.0), np.log(0.25)])
    assert SmoothedL1(1.0, learn_eps=True).with_log_parameters(rho).effective_eps == pytest.approx(
        0.25
    )
    log = LogSparsity(1.0, learn_delta=True, weight=3.0).with_log_parameters(rho)
    assert log.effective_delta == pytest.approx(0.25)
    assert log.strength == pytest.approx(6.0)
    assert SmoothedL1(0.5).effective_eps == 0.5
    jump = JumpReLU([1.0, 2.0], 0.1).with_log_parameters(rho)
    np.testing.assert_allclose(jump.effective_thresholds, [2.0, 0.5], rtol=1e-6)
    # constants that round to zero in a narrower dtype stay positive
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tiny = SmoothedL1(1e-300)
    assert jnp.isfinite(tiny.gradient(jnp.zeros(2, jnp.float32))).all()


@pytest.mark.x64
def test_invariances():
    x = jnp.asarray(np.random.default_rng(19).normal(size=D))
    hoyer = jax.jit(lambda x: Hoyer()(x))
    for scale in (1e-200, 1e-3, 1e200):
        close(hoyer(scale * x), hoyer(x))
    close(SoftmaxEntropy(D)(x + 1e3), SoftmaxEntropy(D)(x))
    close(SoftmaxEntropy(D)(jnp.zeros(D)), np.log(D))
    assert Hoyer()(jnp.zeros(3)) == 0
    assert Hoyer()(jnp.array([0.0, -7.0, 0.0])) == 0
    close(Hoyer()(jnp.array([[2.0, -2.0], [2.0, 2.0]])), 1.0)


@pytest.mark.once
@pytest.mark.parametrize("k", [1, 3, D])
def test_top_k_breaks_ties_by_the_lower_index(k):
    x = np.random.default_rng(20).integers(-2, 3, (500, D)).astype(np.float32)
    _, gradient, _, _ = ref_top_k(x.astype(L), k)
    np.testing.assert_allclose(
        eqx.filter_jit(TopK(k, weight=WEIGHT).gradient)(x), gradient, rtol=1e-6
    )
    mask = np.asarray(eqx.filter_jit(TopK(k).mask)(x))
    assert np.all(mask.sum(axis=1) == k)


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    ("eps", lambda: SmoothedL1(0.0)),
    ("eps", lambda: SmoothedL1(-1.0)),
    ("eps", lambda: SmoothedL1(jnp.nan)),
    ("eps", lambda: SmoothedL1(jnp.ones(2))),
    ("delta", lambda: LogSparsity(0)),
    ("delta", lambda: LogSparsity(np.inf)),
    ("weight", lambda: Hoyer(weight=-1.0)),
    ("weight", lambda: Hoyer(weight=jnp.ones(2))),
    ("x", lambda: Hoyer()(jnp.ones(1))),
    ("x", lambda: Hoyer().majorizer_diagonal(jnp.ones(()))),
    ("num_atoms", lambda: SoftmaxEntropy(0)),
    ("temperature", lambda: SoftmaxEntropy(3, 0.0)),
    ("logits", lambda: SoftmaxEntropy(2)(jnp.array([jnp.nan, 0.0]))),
    ("logits", lambda: SoftmaxEntropy(2).gradient(jnp.array([[0.0, 1.0], [jnp.inf, 0.0]]))),
    ("logits", lambda: SoftmaxEntropy(2).row_hessian(jnp.array([0.0, -jnp.inf]))),
    ("logits", lambda: SoftmaxEntropy(3)(jnp.ones(4))),
    ("logits", lambda: SoftmaxEntropy(3).row_fisher(jnp.ones((2, 3)))),
    ("atom", lambda: SoftmaxEntropy(3).row_hessian_derivative(jnp.ones(3), 3)),
    ("k", lambda: TopK(0)),
    ("k", lambda: TopK(4)(jnp.ones(3))),
    ("x", lambda: TopK(1)(jnp.ones(()))),
    ("thresholds", lambda: JumpReLU(jnp.ones(3), 0.1)(jnp.ones(4))),
    ("thresholds", lambda: JumpReLU(1.0, 0.1)),
    (r"thresholds\[1\]", lambda: JumpReLU([1.0, 0.0], 0.1)),
    (r"thresholds\[0\]", lambda: JumpReLU([jnp.inf, 1.0], 0.1)),
    ("eps", lambda: JumpReLU([1.0], 0.0)),
    ("eps", lambda: jumprelu(1.0, 0.5, 0.0)),
    ("threshold", lambda: jumprelu(jnp.ones(3), jnp.ones(2), 0.1)),
    ("threshold", lambda: jumprelu(1.0, jnp.nan, 0.1)),
    ("v", lambda: Hoyer().hvp(jnp.ones(3), jnp.ones(2))),
    ("step", lambda: Hoyer().majorized_step(jnp.ones(3), 2.5)),
    ("log_parameters", lambda: Hoyer().with_log_parameters(jnp.ones(2))),
    ("log_parameters", lambda: Hoyer().with_log_parameters([jnp.nan])),
]


@pytest.mark.once
@pytest.mark.parametrize(("argument", "call"), BAD)
def test_bad_input_is_named(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument}\b" if argument[-1] != "]" else argument):
        call()


@pytest.mark.once
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("delta", lambda: LogSparsity("1")),
        ("eps", lambda: SmoothedL1(None)),
        ("weight", lambda: Hoyer(weight="a")),
        ("weight", lambda: Hoyer(weight=None)),
        ("x", lambda: Hoyer()([None, 1.0])),
        ("k", lambda: TopK(1.5)),
        ("k", lambda: TopK("2")),
        ("num_atoms", lambda: SoftmaxEntropy(2.5)),
    ],
)
def test_what_is_no_number_is_named(argument, call):
    with pytest.raises(TypeError, match=rf"^{argument}\b"):
        call()


@pytest.mark.once
def test_complex_input_is_refused():
    with pytest.raises(TypeError, match=r"^x must be real"):
        Hoyer()(jnp.ones(3, jnp.complex64))


@pytest.mark.once
def test_constructors_accept_traced_parameters():
    def value(eps, x):
        return SmoothedL1(eps)(x)

    np.testing.assert_allclose(jax.jit(value)(3.0, jnp.array([4.0])), 5.0, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(value)(3.0, jnp.array([4.0])), 0.6, rtol=1e-6)
