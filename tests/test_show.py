"""Results show themselves on a screen, at any size, wherever their arrays are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax import _show

pytestmark = pytest.mark.once
MANY = 1_000_000


def chain(n):
    springs = sg.Quadratic(np.arange(n - 1), np.arange(1, n), 0.5)
    return sg.EnergyGraph(sg.Landau(a=np.ones(n, np.float32)), [springs])


@pytest.fixture(scope="module")
def results():
    graph, x = chain(MANY), jnp.full(MANY, 0.5)
    layers = {"w": jnp.eye(3)}
    losses = {"a": lambda p: jnp.sum(p["w"] ** 2), "b": lambda p: jnp.sum(p["w"])}
    wrapped = sg.small_gain(
        optax.adam(0.1), lambda p: {name: loss(p) for name, loss in losses.items()}
    )
    return {
        "RelaxResult": sg.relax(graph, x, steps=2),
        "Curvature": graph.curvature(x),
        "Allocation": sg.allocate(
            jnp.ones(MANY),
            jnp.ones((MANY, 1)),
            jnp.zeros((MANY, 1), int),
            lower=jnp.zeros(MANY),
            upper=jnp.ones(MANY),
            row_budget=jnp.ones(1),
        ),
        "TrainingState": wrapped.init({"w": jnp.ones((1000, 1000))}),
        "KappaState": sg.kappa_budget(2.0).init(layers),
        "ThrottleState": sg.throttle(optax.sgd(0.1), learning_rate=0.1).init(x),
    }


def test_a_screen_at_any_size(results):
    for name, value in results.items():
        shown = repr(value)
        assert shown.startswith(f"{name}("), name
        assert len(shown) <= 4000, name
        assert shown.count("\n") < 40, name
        assert len(value._repr_html_()) <= 40_000, name


def test_what_is_drawn(results):
    page = results["RelaxResult"]._repr_html_()
    assert all(part in page for part in ("energy", "polyline", "info.converged"))
    assert results["TrainingState"]._repr_html_().count("<rect") == 2


def test_numbers_are_shown_as_they_are():
    assert _show.short(jnp.array([1.0, jnp.nan])) == "[1, nan]"
    assert _show.short(np.array([np.inf, *range(9)])) == "float64[10], 0 to 8, 1 not finite"
    assert _show.short(np.zeros((0, 3), np.float32)) == "float32[0,3]"
    assert _show.short(jax.random.key(0)) == "key<fry>[]"
    assert _show.short(np.arange(9) > 3) == "bool[9], 5 true"


def test_traced_results_show_their_shapes():
    graph = chain(8)
    said = []

    @jax.jit
    def run(x):
        result = sg.relax(graph, x, steps=2)
        said.extend([repr(result), result._repr_html_()])
        return result.x

    run(jnp.ones(8))
    assert "x: float32[8]" in said[0]
    assert "polyline" not in said[1]
