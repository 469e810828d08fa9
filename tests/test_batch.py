"""Many relaxations at once: each ends as alone, and who has ended makes room."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smallgain_jax as sg

NODES, EDGES = 8, 16


def graph(seed):
    rng = np.random.default_rng(seed)
    i = rng.integers(0, NODES, EDGES)
    j = (i + rng.integers(1, NODES, EDGES)) % NODES
    anchor = 10.0 ** rng.uniform(-3, 1)
    return sg.EnergyGraph(
        sg.Landau(np.full(NODES, anchor), target=rng.uniform(-0.2, 1.2, NODES)),
        [sg.Quadratic(i, j, rng.random(EDGES))],
    )


def stacked(count):
    graphs = [jax.tree.map(np.asarray, graph(seed)) for seed in range(count)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *graphs)


@pytest.mark.x64
def test_members_go_as_alone_and_cost_what_they_need():
    count = 300
    graphs, x0 = stacked(count), jnp.asarray(np.random.default_rng(0).random((count, NODES)))
    alone = jax.jit(jax.vmap(lambda g, x: sg.relax(g, x, steps=300)))(graphs, x0)
    result = sg.relax_batch(graphs, x0, steps=300, lanes=16)
    np.testing.assert_array_equal(result.info.status, alone.info.status)
    np.testing.assert_allclose(result.x, alone.x, atol=1e-8)
    np.testing.assert_allclose(result.energy, alone.energy[:, -1], atol=1e-12)
    needed = int(result.info.steps.sum())
    # what lockstep would cost, and the bar
    assert int(result.info.steps.max()) * count > 1.5 * needed
    assert result.computed <= 1.5 * needed
    np.testing.assert_allclose(needed, int(alone.info.steps.sum()), rtol=0.02)


@pytest.mark.x64
@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_number_in_any_number_of_lanes(count):
    graphs, x0 = stacked(count), jnp.full((count, NODES), 0.5)
    expected = jax.vmap(lambda g, x: sg.relax(g, x).x)(graphs, x0)
    found = sg.relax_batch(graphs, x0, lanes=2)
    np.testing.assert_allclose(found.x, expected, atol=1e-9)
    few = sg.relax_batch(graphs, x0, steps=1, lanes=2).info
    assert (few.steps <= 1).all()
    assert (few.status[few.steps == 1] != sg.RelaxStatus.NOT_FINITE).all()


@pytest.mark.x64
def test_derivatives_are_those_of_the_members():
    graphs, x0 = stacked(5), jnp.full((5, NODES), 0.5)

    def total(relaxed):
        def loss(graphs):
            x, energy = relaxed(graphs)
            return jnp.sum(x**2) + jnp.sum(energy)

        return eqx.filter_jit(eqx.filter_grad(loss))(graphs)

    def one(g, x):
        result = sg.relax(g, x)
        return result.x, result.energy[-1]

    def lanes(graphs):
        result = sg.relax_batch(graphs, x0, lanes=2)
        return result.x, result.energy

    expected = total(lambda graphs: jax.vmap(one)(graphs, x0))
    found = total(lanes)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.x64
def test_functions_and_shared_data():
    fn = lambda p, a, b: jnp.sum((p["u"] - a) ** 2) + (p["v"] - b) ** 2
    start = {"u": jnp.zeros((6, 2)), "v": jnp.zeros(6)}
    a, b = jnp.arange(12.0).reshape(6, 2), 3.0
    found = sg.relax_batch(fn, start, args=(a, jnp.asarray(b)), in_axes=(0, None), lanes=4)
    np.testing.assert_allclose(found.x["u"], a)
    np.testing.assert_allclose(found.x["v"], 3)
    by_b = lambda b: sg.relax_batch(fn, start, args=(a, b), in_axes=(0, None)).x["v"]
    np.testing.assert_allclose(jax.jacfwd(by_b)(b), 1)
    one = graph(0)
    both = sg.relax_batch(one, jnp.full((2, NODES), 0.5), in_axes=None, bounds=None)
    np.testing.assert_allclose(
        both.x[1], sg.relax(one, jnp.full(NODES, 0.5), bounds=None).x, atol=1e-9
    )


@pytest.mark.once
def test_mistakes_are_named():
    graphs, x0 = stacked(3), jnp.zeros((3, NODES))
    with pytest.raises(ValueError, match=r"objective\.local\[0\]\.a has shape \(3, 8\)"):
        sg.relax_batch(graphs, jnp.zeros((4, NODES)))
    with pytest.raises(ValueError, match="leading axis"):
        sg.relax_batch(lambda x: x, 1.0)
    with pytest.raises(ValueError, match="lanes = 0"):
        sg.relax_batch(graphs, x0, lanes=0)
    with pytest.raises(ValueError, match="lower must not exceed"):
        sg.relax_batch(graphs, x0, bounds=(1.0, 0.0))
    with pytest.raises(TypeError, match="EnergyGraph or a function"):
        sg.relax_batch(x0, graphs)
