import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.limits.closed_forms import row_budgets


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (optax.sgd(0.1), sg.gradient_descent_limit(0.1)),
        (optax.sgd(0.1, momentum=0.9), sg.heavy_ball_limit(0.1, 0.9)),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), sg.nesterov_limit(0.1, 0.9)),
        (
            optax.chain(optax.scale(2.0), optax.sgd(0.05, momentum=0.5)),
            sg.heavy_ball_limit(0.1, 0.5),
        ),
    ],
    ids=["descent", "heavy ball", "nesterov", "chain"],
)
def test_limits_agree_with_experiment_and_with_quadratics(optimizer, limit):
    np.testing.assert_allclose(sg.measured_limit(optimizer), limit, rtol=1e-3)

    def size_after(curvature):
        def step(carry, _):
            x, state = carry
            update, state = optimizer.update(curvature * x, state, x)
            return (x + update, state), None

        start = (jnp.asarray(1.0), optimizer.init(jnp.asarray(1.0)))
        return abs(jax.lax.scan(step, start, length=2000)[0][0])

    assert size_after(0.98 * limit) < 1
    assert not size_after(1.02 * limit) <= 1  # may have overflowed


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.lion(0.1),
        optax.sgd(optax.linear_schedule(0.1, 0.2, 1500)),
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    ],
    ids=["adam", "lion", "schedule", "line search"],
)
def test_no_limit_where_there_is_none(optimizer):
    assert sg.measured_limit(optimizer) is None


def test_measurable_while_tracing():
    def traced(x):
        return x * sg.measured_limit(optax.sgd(0.5))

    np.testing.assert_allclose(jax.jit(traced)(1.0), 4.0, rtol=1e-5)


def test_a_traced_rate_is_not_measured():
    def traced(rate):
        assert sg.measured_limit(optax.sgd(rate)) is None
        return rate

    jax.jit(traced)(0.1)


def test_row_budgets_are_never_negative():
    budgets = row_budgets(2.0, jnp.asarray([1.0, 2.0, 3.0]), 0.5)
    np.testing.assert_array_equal(budgets, [0.5, 0.0, 0.0])


@pytest.mark.once
@pytest.mark.parametrize("rate", [0.0, -1.0, np.nan, np.inf])
def test_rates_must_be_positive(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        sg.gradient_descent_limit(rate)


@pytest.mark.once
def test_momentum_must_be_a_fraction():
    with pytest.raises(ValueError, match="momentum"):
        sg.heavy_ball_limit(0.1, 1.5)
