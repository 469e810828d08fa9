import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax.search.armijo import Trial, armijo


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


def rounded(value, slope, end_slope):
    """A trial whose value is lost in rounding: what it does is in its slopes."""

    def trial(step):
        one = jnp.ones((), step.dtype)
        return Trial(value * one, slope * step, None, (slope + (end_slope - slope) * step) * step)

    return trial


def test_slopes_judge_where_values_are_rounding(eps):
    one, noise = jnp.asarray(1.0), jnp.asarray(10 * eps)
    promise = 1e-3 * eps
    # half an ulp above: to the minimum along the step, the slope vanishes there
    good = armijo(rounded(1 + 2 * eps, -promise, 0.0), one, resolution=noise)
    assert good.accepted
    assert good.backtracks == 0
    # twice as far as the other side's equal height: half of that is the minimum
    far = armijo(rounded(1 + 2 * eps, -promise, 2 * promise), one, resolution=noise)
    assert far.accepted
    assert far.backtracks == 1
    uphill = armijo(rounded(1.0, promise, promise), one, resolution=noise)
    assert not uphill.accepted
    # a real rise is no rounding, whatever the slopes say
    rise = armijo(rounded(1 + 100 * eps, -promise, 0.0), one, resolution=noise, max_backtracks=3)
    assert not rise.accepted
