import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import smallgain_jax as sg
from smallgain_jax.graphs.families import _power
from smallgain_jax.tools.scenarios import random_graph

FAMILIES = [
    lambda i, j, w: sg.Quadratic(i, j, w),
    lambda i, j, w: sg.DirectedHinge(i, j, w),
    lambda i, j, w: sg.AsymmetricHinge(i, j, w, alpha_i=0.7, beta_j=1.3),
    lambda i, j, w: sg.GateBenefit(i, j, w, delta=-0.2),
    lambda i, j, w: sg.DampedGateBenefit(i, j, w, delta=0.3, damping=0.8, eta_power=2.5),
    lambda i, j, w: sg.PairTerm(lambda a, b: jnp.sum(jnp.cosh(a - 2 * b)), i, j, w),
]
IDS = ["quadratic", "hinge", "asymmetric", "gate", "damped", "pair"]
i, j = np.array([0, 1, 3, 2]), np.array([1, 2, 0, 3])
weight = np.array([0.5, 1.0, 2.0, 0.0])


def graph_of(family, d=None):
    shape = (4,) if d is None else (4, d)
    local = sg.Landau(np.linspace(0.1, 0.4, 4 * (d or 1)).reshape(shape), b=0.2, target=0.5)
    return sg.EnergyGraph(local, [family(i, j, weight)])


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
@pytest.mark.parametrize("d", [None, 2])
class TestFamily:
    def state(self, d):
        return jnp.asarray(np.random.default_rng(0).random((4,) if d is None else (4, d)), float)

    def test_gradients_by_terms_sum_to_the_gradient(self, family, d, eps):
        graph, x = graph_of(family, d), self.state(d)
        weights = jnp.asarray([1.0, 0.5, 2.0, 3.0])
        by_terms = graph.term_gradients(x) * weights.reshape(-1, *(1,) * x.ndim)
        local = jax.grad(graph.local_energy)(x)
        total = local + graph.scatter(by_terms)
        np.testing.assert_allclose(total, graph.gradient(x, weights), atol=100 * eps)

    def test_value_and_gradient_are_those_of_the_energy(self, family, d, eps):
        graph, x = graph_of(family, d), self.state(d)
        graph = sg.EnergyGraph(graph.local, [*graph.edges, sg.Quadratic(j, i, weight)])
        for weights in (None, jnp.linspace(0.5, 2, 8)):
            value, gradient = graph.value_and_gradient(x, weights)
            expected = jax.value_and_grad(graph.energy)(x, weights)
            np.testing.assert_allclose(value, expected[0], rtol=10 * eps)
            np.testing.assert_allclose(gradient, expected[1], atol=100 * eps)

    def test_blocks_sum_to_the_hessian(self, family, d, eps):
        graph, x = graph_of(family, d), self.state(d)
        hessian = np.asarray(jax.hessian(lambda x: jnp.sum(graph.term_energies(x)))(x))
        # priced as they are: every hinge by whether it is active
        blocks = np.asarray(graph.edge_blocks(x, smoothing=lambda gap: jnp.where(gap > 0, 1.0, 0)))
        total = np.zeros_like(hessian)
        ends = np.stack([i, j], 1)
        for k in range(4):
            for a in range(2):
                for b in range(2):
                    if d is None:
                        total[ends[k, a], ends[k, b]] += blocks[k, a, b]
                    else:
                        total[ends[k, a], :, ends[k, b]] += blocks[k, a, :, b]
        np.testing.assert_allclose(total, hessian, atol=1000 * eps)

    def test_energy_is_linear_in_weights(self, family, d, eps):
        graph, x = graph_of(family, d), self.state(d)
        w = jnp.asarray([0.3, 2.0, 1.0, 0.5])
        expected = graph.local_energy(x) + np.vdot(w, graph.term_energies(x))
        np.testing.assert_allclose(graph.energy(x, w), expected, rtol=100 * eps)


@pytest.mark.x64
def test_finite_differences():
    graph, x = random_graph("uniform", 12, seed=3).graph, jnp.linspace(0.05, 0.95, 12)
    check_grads(graph.energy, (x,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
def test_power_has_finite_derivatives_at_zero(exponent):
    function = lambda x: _power(x, jnp.asarray(exponent))
    for order in range(3):
        assert jnp.isfinite(function(jnp.asarray(0.0))), order
        function = jax.grad(function)
    x = jnp.asarray(0.7)
    expected = jax.hessian(lambda x: x**exponent)(x)
    actual = jax.hessian(lambda x: _power(x, jnp.asarray(exponent)))(x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_double_well_and_targets():
    wells = sg.Landau(a=[-1.0, -1.0], b=0.5, target=[0.0, 1.0])
    x = jnp.asarray([1.0, 1.0])
    np.testing.assert_allclose(wells(x), -0.5)
    np.testing.assert_allclose(wells.majorizer_diagonal(x), [4.0, 2.0])


@pytest.mark.once
def test_whichever_coefficient_is_an_array_tells_the_number_of_nodes():
    x = jnp.array([1.0, 3.0])
    for local, expected in (
        (sg.Landau(a=2.0, target=[0.0, 1.0]), 2 * (1 + 4)),
        (sg.Landau(a=2.0, b=[1.0, 0.5]), 2 * (1 + 9) + 1 + 0.5 * 81),
        (sg.Landau(a=1.0, b=1.0, target=jnp.zeros((2, 1))), None),
    ):
        assert local.num_nodes == 2
        assert expected is None or local(x) == expected


@pytest.mark.once
def test_numbers_that_compiled_code_takes_for_zero_are_told():
    with pytest.warns(UserWarning, match="a is at most 1e-38: float32 computes with nothing below"):
        local = sg.Landau(a=jnp.full(2, 1e-38, jnp.float32))
    with pytest.warns(UserWarning, match="weight is at most 1e-40: float32"):
        edges = sg.Quadratic([0], [1], jnp.float32(1e-40))
    result = sg.relax(sg.EnergyGraph(local, edges), jnp.ones(2, jnp.float32))
    assert np.isfinite(result.x).all()
    # beside numbers that count it is a matter of course
    sg.Quadratic([0, 1], [1, 2], jnp.array([1e-40, 1.0], jnp.float32))


def test_empty_graph_and_graph_without_edges():
    nothing = sg.EnergyGraph(None, [], num_nodes=0)
    assert nothing.energy(jnp.zeros(0)) == 0
    assert nothing.curvature(jnp.zeros(0)).lipschitz == 0
    alone = sg.EnergyGraph(sg.Landau(a=[1.0, 2.0]))
    assert alone.curvature(jnp.zeros(2)).lipschitz == 4.0
    assert alone.term_energies(jnp.zeros(2)).shape == (0,)


def test_names_of_repeated_families():
    edges = [sg.Quadratic([0], [1]), sg.GateBenefit([0], [1]), sg.Quadratic([1], [0])]
    graph = sg.EnergyGraph(None, edges, num_nodes=2)
    assert graph.keys == ("Quadratic", "GateBenefit", "Quadratic:2")
    assert graph.family_index.tolist() == [0, 1, 2]


def test_pair_term_with_parameters():
    term = sg.PairTerm(
        lambda a, b, p: p["k"] * (a - b) ** 4, [0, 1], [1, 2], params={"k": jnp.arange(1.0, 3.0)}
    )
    graph = sg.EnergyGraph(None, term, num_nodes=3)
    np.testing.assert_allclose(graph.term_energies(jnp.asarray([1.0, 0.0, -1.0])), [1.0, 2.0])


def test_passes_through_transformations():
    graph = random_graph("ring", 6).graph
    xs = jnp.linspace(0, 1, 18).reshape(3, 6)
    batched = jax.jit(jax.vmap(graph.energy))(xs)
    np.testing.assert_allclose(batched, [graph.energy(x) for x in xs], rtol=1e-5)
    rebuilt = jax.tree.unflatten(jax.tree.structure(graph), jax.tree.leaves(graph))
    assert rebuilt.energy(xs[0]) == graph.energy(xs[0])


BAD = [
    (lambda: sg.Quadratic([0, 1], [1]), ValueError, "i and j"),
    (lambda: sg.Quadratic([0, 2], [1, 2]), ValueError, r"i\[1\] = j\[1\] = 2"),
    (lambda: sg.Quadratic([-1], [0]), ValueError, r"i\[0\] = -1"),
    (lambda: sg.Quadratic([0.5], [0]), TypeError, "i must be integers"),
    (lambda: sg.Quadratic([0], [1], [1.0, 2.0]), ValueError, "weight has shape"),
    (lambda: sg.Quadratic([0], [1], -1.0), ValueError, "weight = -1"),
    (lambda: sg.Quadratic([0], [1], np.nan), ValueError, "weight = nan"),
    (lambda: sg.AsymmetricHinge([0], [1], beta_j=np.inf), ValueError, "beta_j"),
    (lambda: sg.DampedGateBenefit([0], [1], eta_power=0.5), ValueError, "eta_power"),
    (lambda: sg.PairTerm(None, [0], [1]), TypeError, "fn must be callable"),
    (lambda: sg.PairTerm(max, [0], [1], params=jnp.ones(2)), ValueError, "params has a leaf"),
    (
        lambda: sg.PairTerm(lambda a: a, [0], [1]),
        TypeError,
        r"fn\(x_i, x_j\) without params.*\(a\)",
    ),
    (lambda: sg.PairTerm(lambda a, b, c: a, [0], [1]), TypeError, "without params.*a, b, c"),
    (
        lambda: sg.PairTerm(lambda a, b: a, [0], [1], params=jnp.ones(1)),
        TypeError,
        r"fn\(x_i, x_j, p\) with params",
    ),
    (
        lambda: sg.PairTerm(jnp.subtract, [0], [1], gap=lambda a: a),
        TypeError,
        r"gap is called as gap\(x_i, x_j\)",
    ),
    (
        lambda: sg.EnergyGraph(
            None, sg.PairTerm(lambda a, b: (a - b) ** 2, [0], [1]), num_nodes=2
        ).energy(jnp.zeros((2, 3))),
        ValueError,
        r"fn must give a scalar, got shape \(3,\)",
    ),
    (lambda: sg.Quadratic([0], [1], "weight"), TypeError, "weight must be real numbers, got 'we"),
    (lambda: sg.Landau(a=[1.0], target=None), TypeError, "target must be real numbers, got None"),
    (lambda: sg.EnergyGraph(None, [], num_nodes=-1), ValueError, "num_nodes = -1"),
    (lambda: random_graph("ring", 4).graph.curvature([0.5] * 4), TypeError, "x must be an array"),
    (
        lambda: random_graph("ring", 4).graph.curvature(np.array([0, 1, 0, 1])),
        TypeError,
        "x must be floating, got int64",
    ),
    (
        lambda: random_graph("ring", 4).graph.curvature(jnp.zeros(4), scaling_iterations=1.5),
        TypeError,
        "scaling_iterations = 1.5 must be an int",
    ),
    (lambda: sg.Landau(a=1.0), ValueError, "to tell the number of nodes"),
    (lambda: sg.Landau(a=jnp.ones((1, 1, 1))), ValueError, r"must have shape \[n\]"),
    (lambda: sg.Landau(a=[1.0, np.nan]), ValueError, r"a\[1\] = nan"),
    (lambda: sg.Landau(a=[1.0], b=-1.0), ValueError, r"b\[0\] = -1"),
    (lambda: sg.Landau(a=[1.0], target=[0.0, 1.0]), ValueError, "target has shape"),
    (lambda: sg.EnergyGraph(sg.Landau(a=[1.0]), sg.Quadratic([0], [1])), ValueError, r"j\[0\] = 1"),
    (lambda: sg.EnergyGraph(sg.Landau(a=[1.0]), num_nodes=2), ValueError, "disagree"),
    (lambda: sg.EnergyGraph(None, []), ValueError, "num_nodes"),
    (lambda: sg.EnergyGraph(jnp.sum, [], num_nodes=2), TypeError, "local must be"),
    (
        lambda: sg.EnergyGraph([sg.Quadratic([0], [1])], sg.Landau(a=[1.0, 1.0])),
        TypeError,
        r"local is the edge family Quadratic: the order is EnergyGraph\(local, edges\)",
    ),
    (lambda: sg.EnergyGraph(None, ["x"], num_nodes=2), TypeError, "edges must be"),
    (lambda: random_graph("ring", 4).graph.energy(jnp.zeros(5)), ValueError, "x has shape"),
    (
        lambda: random_graph("ring", 4).graph.energy(jnp.zeros(4), jnp.ones(3)),
        ValueError,
        "weights has shape",
    ),
    (
        lambda: sg.EnergyGraph(sg.Landau([1.0]), []).gradient(jnp.zeros(1), jnp.ones(3)),
        ValueError,
        "weights has shape",
    ),
    (lambda: random_graph("rung", 4), ValueError, "kind"),
]


@pytest.mark.once
@pytest.mark.parametrize(("mistake", "error", "message"), BAD, ids=range(len(BAD)))
def test_mistakes_are_named(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()
