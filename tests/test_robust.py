"""Robust kernels and terms of any number of nodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallgain_jax as sg
from smallgain_jax.graphs.robust import KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_lie_below_their_majorizer(kernel, eps):
    term = sg.Robust(lambda a, b: a - b, kernel, scale=0.7)
    apart = jnp.linspace(-4, 4, 201)
    energy = jax.vmap(lambda r: term(r, 0.0))(apart)
    known = {
        "huber": lambda s: np.where(s > 1, 2 * np.sqrt(s) - 1, s),
        "cauchy": np.log1p,
        "geman_mcclure": lambda s: s / (1 + s),
    }[kernel]
    np.testing.assert_allclose(energy, 0.49 * known(np.asarray(apart) ** 2 / 0.49), rtol=1e-4)
    for at in (0.0, 0.3, 1.5, -3.0):
        weight = jax.hessian(lambda r: term.majorizer(r, 0.0))(at)
        above = term(at, 0.0) + weight / 2 * (apart**2 - at**2)
        assert (energy <= above + 20 * eps * (1 + above)).all()
        # and so do the rows of a graph: they are those of the majorizer
        graph = sg.EnergyGraph(None, [sg.PairTerm(term, [0], [1], 2.0)], num_nodes=2)
        rows = graph.rows(jnp.array([at, 0.0]))
        np.testing.assert_allclose(rows, 2 * 2 * weight, rtol=1e-5)
        top = jnp.linalg.eigvalsh(jax.hessian(graph.energy)(jnp.array([at, 0.0]))).max()
        assert top <= rows.max() * (1 + 1e-5)


@pytest.mark.x64
def test_an_outlier_is_forgiven():
    # a ring of ten, each link measured twice, and once the last one, wrongly
    truth = np.random.default_rng(0).normal(size=10)
    i = np.r_[np.arange(9), np.arange(10)]
    j = (i + 1) % 10
    seen = truth[j] - truth[i]
    seen[-1] += 5
    anchor = sg.Landau(np.r_[1e3, np.zeros(9)], target=np.r_[truth[0], np.zeros(9)])

    def found(kernel):
        residual = lambda a, b, z: b - a - z
        fn = sg.Robust(residual, kernel, 0.1) if kernel else lambda *e: residual(*e) ** 2
        graph = sg.EnergyGraph(anchor, [sg.PairTerm(fn, i, j, params=jnp.asarray(seen))])
        result = sg.relax(graph, jnp.zeros(10), steps=500, bounds=None)
        assert result.info.converged
        return np.abs(np.asarray(result.x) - truth).max()

    # the pull T on nine pairs of links: T (9 / 2 + 1) = 5; or no more than the scale
    np.testing.assert_allclose(found(None), 9 / 2 * 5 / 5.5, rtol=1e-6)
    np.testing.assert_allclose(found("huber"), 9 / 2 * 0.1, rtol=1e-6)
    assert found("geman_mcclure") < 0.01


@pytest.mark.x64
@pytest.mark.parametrize("shape", [(7,), (7, 2)], ids=["scalars", "vectors"])
def test_terms_of_three_nodes(shape):
    rng = np.random.default_rng(1)
    nodes = np.array([rng.permutation(7)[:3] for _ in range(9)])
    stiff = jnp.asarray(rng.random(9))
    bend = lambda a, b, c, p: p * jnp.sum((a - 2 * b + c) ** 2) + jnp.sum(a * b * c)
    term = sg.HyperTerm(bend, nodes, 7, rng.random(9), stiff)
    graph = sg.EnergyGraph([sg.Landau(np.full(shape, 3.0), target=0.5), term])
    x = jnp.asarray(rng.normal(size=shape))
    expected = sum(
        float(w * bend(*(x[n] for n in row), p))
        for row, w, p in zip(nodes, np.asarray(term.weight), np.asarray(stiff))
    )
    np.testing.assert_allclose(term(x), expected, rtol=1e-12)
    hessian = jax.hessian(lambda x: term(x))(x).reshape(x.size, x.size)
    rows = jnp.diag(term.majorizer_diagonal(x).ravel())
    assert jnp.linalg.eigvalsh(rows - hessian).min() > -1e-12
    result = sg.relax(graph, x, steps=200, bounds=(-1.0, 1.0), tol=1e-12)
    assert result.info.converged
    slope = jax.grad(lambda w: jnp.sum(_weighted(graph, w, x) ** 2))(term.weight)
    step, way = 1e-6, rng.normal(size=9)
    moved = lambda by: jnp.sum(_weighted(graph, term.weight + by * way, x) ** 2)
    np.testing.assert_allclose(
        slope @ way, (moved(step) - moved(-step)) / (2 * step), rtol=1e-5, atol=1e-7
    )


def _weighted(graph, weight, x):
    import equinox as eqx

    graph = eqx.tree_at(lambda g: g.local[1].weight, graph, weight)
    return sg.relax(graph, x, steps=200, bounds=(-1.0, 1.0), tol=1e-12).x


@pytest.mark.once
def test_mistakes_are_named():
    fn = lambda a, b: a - b
    cases = (
        (TypeError, "residual must be callable", lambda: sg.Robust(1.0)),
        (ValueError, "kernel = 'tukey' is unknown", lambda: sg.Robust(fn, "tukey")),
        (ValueError, "scale = 0", lambda: sg.Robust(fn, scale=0)),
        (TypeError, "fn must be callable", lambda: sg.HyperTerm(1, [[0]], 1)),
        (ValueError, r"lie in 0\.\.1", lambda: sg.HyperTerm(fn, [[0, 2]], 2)),
        (ValueError, r"\[K, m\]", lambda: sg.HyperTerm(fn, [0, 1], 2)),
        (ValueError, "at least 0", lambda: sg.HyperTerm(fn, [[0, 1]], 2, -1.0)),
        (ValueError, "leading axis", lambda: sg.HyperTerm(fn, [[0, 1]], 2, params=np.ones(2))),
    )
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
