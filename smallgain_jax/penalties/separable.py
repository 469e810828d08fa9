"""Penalties that are a sum over entries: smoothed L1 and logarithmic."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smallgain_jax.penalties.base import (
    Schedule,
    StrengthPenalty,
    bounded_exp,
    over_square,
    positive,
    read_positive,
    read_weight,
    reciprocal,
    shrinkage,
)

_Pair = tuple[jax.Array, jax.Array]
_Triple = tuple[jax.Array, jax.Array, jax.Array]


@jax.custom_jvp
def polar(x: jax.Array, eps: jax.Array) -> _Triple:
    r"""$r = \sqrt{x^2 + \epsilon^2}$, $x/r$ and $\epsilon/r$ without squaring either argument.

    The rule is closed (the derivatives of the three are products of the three), so derivatives of
    every order neither cancel nor overflow before the result does.
    """
    larger = jnp.maximum(jnp.abs(x), eps)
    ratio = jnp.minimum(jnp.abs(x), eps) / larger
    r = larger * jnp.sqrt(1 + ratio * ratio)
    return r, x / r, eps / r


@polar.defjvp
def _polar_jvp(primals: _Pair, tangents: _Pair) -> tuple[_Triple, _Triple]:
    dx, deps = tangents
    r, cos, sin = polar(*primals)
    turn = (sin * dx - cos * deps) * reciprocal(r)
    return (r, cos, sin), (cos * dx + sin * deps, sin * turn, -cos * turn)


def polar_in_range(
    x: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A power of two s, and `polar` of s x and s eps, whose radius has a normal reciprocal."""
    shrunk = shrinkage(jax.lax.stop_gradient(jnp.maximum(jnp.abs(x), eps)))
    return shrunk, *polar(x * shrunk, eps * shrunk)


@jax.custom_jvp
def log_one_plus_square(x: jax.Array, delta: jax.Array) -> jax.Array:
    r"""$\log(1 + x^2/\delta^2)$ for every finite x, where the square alone would overflow."""
    larger = jnp.maximum(jnp.abs(x), delta)
    ratio = jnp.minimum(jnp.abs(x), delta) / larger
    return 2 * (jnp.log(larger) - jnp.log(delta)) + jnp.log1p(ratio * ratio)


@log_one_plus_square.defjvp
def _log_one_plus_square_jvp(primals: _Pair, tangents: _Pair) -> _Pair:
    x, delta = primals
    dx, ddelta = tangents
    shrunk, r, cos, _ = polar_in_range(x, delta)
    # not `over`, which is not linear in what it divides
    small = shrinkage(jax.lax.stop_gradient(delta))
    along = dx * shrunk * reciprocal(r) - cos * (ddelta * small) * reciprocal(delta * small)
    return log_one_plus_square(x, delta), 2 * cos * along


class SmoothedL1(StrengthPenalty):
    r"""Smoothed absolute values, $p(x) = \lambda \sum_i \sqrt{x_i^2 + \epsilon^2}$.

    Convex. Gradient $\lambda x/r$ and Hessian $\lambda \epsilon^2/r^3$ with
    $r = \sqrt{x^2 + \epsilon^2}$. The majorizer is the reweighted square $\lambda/r$, not the
    Hessian: p is concave in $x^2$, so with $D = \lambda/r$

    $$p(y) \le p(x) + \nabla p(x) \cdot (y - x) + \tfrac12 (y - x) \cdot D(x) (y - x)$$

    for *every* y, which is what makes a step $x - \omega D^{-1} \nabla p$ descend for
    $0 < \omega \le 2$, alone or added to any other bound of this kind. The Hessian bounds p at x
    only: with it the step is Newton's, $x \mapsto -x^3/\epsilon^2$, which diverges from
    $|x| > \epsilon$.

    Args:
      eps: smoothing scale, float scalar > 0, in the unit of x.
      weight: factor of the strength, float scalar >= 0, or an optax schedule (see `at_step`).
      learn_eps: whether eps is a log-parameter; `eps` is then its start.

    Log-parameters: strength; log eps if `learn_eps`.

    Raises:
      ValueError: eps not positive and finite, weight negative or not finite.

    Source: Daubechies, DeVore, Fornasier and Güntürk (2010), Iteratively reweighted least squares
    minimization for sparse recovery, section 1, for the weights; de Leeuw and Lange (2009), Sharp
    quadratic majorization in one dimension: no smaller D will do for even functions such as this.

    >>> p = SmoothedL1(eps=3.0)
    >>> p(jnp.array([4.0, 0.0])).item()
    8.0
    >>> round(p.majorizer_diagonal(jnp.array([4.0])).item(), 6)
    0.2
    """

    weight: jax.Array
    eps: jax.Array
    log_parameters: jax.Array
    schedule: Schedule | None = eqx.field(static=True)
    learn_eps: bool = eqx.field(static=True)

    def __init__(
        self, eps: ArrayLike, *, weight: ArrayLike | Schedule = 1.0, learn_eps: bool = False
    ) -> None:
        self.weight, self.schedule = read_weight(weight)
        self.eps = read_positive("eps", eps)
        self.learn_eps = learn_eps
        self.log_parameters = _start(self.eps, learn_eps)

    @property
    def effective_eps(self) -> jax.Array:
        """eps in use, exp(log_parameters[1]) where it is learnable."""
        return _scale(self.eps, self.log_parameters, self.learn_eps, self.eps)

    def _radius(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A power of two s, and s r."""
        eps = _scale(self.eps, self.log_parameters, self.learn_eps, x)
        shrunk, r, *_ = polar_in_range(x, eps)
        return shrunk, r

    def _value(self, x: jax.Array) -> jax.Array:
        shrunk, r = self._radius(x)
        factor = bounded_exp(self.log_parameters[0].astype(x.dtype))
        # weighted before they are summed: the sum may overflow where the penalty does not
        sizes = jax.lax.stop_gradient(factor) * self._weight(x) * r * (1 / shrunk)
        # the derivative by the logarithm of the factor is the value, which may fit where r does not
        return jnp.sum(sizes * (factor / jax.lax.stop_gradient(factor)))

    def _majorizer(self, x: jax.Array) -> jax.Array:
        shrunk, r = self._radius(x)
        return self._strength(x) * shrunk / r


class LogSparsity(StrengthPenalty):
    r"""Logarithmic sparsity, $p(x) = \lambda \sum_i \log(1 + x_i^2/\delta^2)$.

    Not convex: its Hessian $2\lambda(\delta^2 - x^2)/(\delta^2 + x^2)^2$ is negative beyond
    $|x| = \delta$; both are cut at the largest number of the dtype, which a tiny delta exceeds. The
    majorizer is the reweighted square $2\lambda/(\delta^2 + x^2)$. p is concave
    in $x^2$, so this is a bound of p for every y (the inequality of `SmoothedL1`), and a step
    $x - \omega D^{-1} \nabla p$ descends for $0 < \omega \le 2$, alone or added to any other bound
    of this kind.

    Args:
      delta: scale, float scalar > 0, in the unit of x.
      weight: factor of the strength, float scalar >= 0, or an optax schedule (see `at_step`).
      learn_delta: whether delta is a log-parameter; `delta` is then its start.

    Log-parameters: strength; log delta if `learn_delta`.

    Raises:
      ValueError: delta not positive and finite, weight negative or not finite.

    Source: Candès, Wakin and Boyd (2008), Enhancing sparsity by reweighted L1 minimization,
    section 2, for the penalty and its reweighting; Chartrand and Yin (2008), Iteratively reweighted
    algorithms for compressive sensing, whose weights at p = 0 these are.

    >>> p = LogSparsity(delta=1.0)
    >>> p.majorizer_diagonal(jnp.array([0.0, 1.0])).round(6).tolist()
    [2.0, 1.0]
    """

    weight: jax.Array
    delta: jax.Array
    log_parameters: jax.Array
    schedule: Schedule | None = eqx.field(static=True)
    learn_delta: bool = eqx.field(static=True)

    def __init__(
        self, delta: ArrayLike, *, weight: ArrayLike | Schedule = 1.0, learn_delta: bool = False
    ) -> None:
        self.weight, self.schedule = read_weight(weight)
        self.delta = read_positive("delta", delta)
        self.learn_delta = learn_delta
        self.log_parameters = _start(self.delta, learn_delta)

    @property
    def effective_delta(self) -> jax.Array:
        """delta in use, exp(log_parameters[1]) where it is learnable."""
        return _scale(self.delta, self.log_parameters, self.learn_delta, self.delta)

    def _delta(self, x: jax.Array) -> jax.Array:
        return _scale(self.delta, self.log_parameters, self.learn_delta, x)

    def _value(self, x: jax.Array) -> jax.Array:
        return self._strength(x) * jnp.sum(log_one_plus_square(x, self._delta(x)))

    def _majorizer(self, x: jax.Array) -> jax.Array:
        shrunk, r, *_ = polar_in_range(x, self._delta(x))
        return over_square(2 * self._strength(x) * shrunk * shrunk, r)

    def hessian_diagonal(self, x: ArrayLike) -> jax.Array:
        """Diagonal of the Hessian, shaped like x; cut at the largest number of the dtype."""
        return self._hessian(self._prepare(x))

    def _hessian(self, x: jax.Array) -> jax.Array:
        # factored: the two terms that autodiff subtracts may both overflow
        shrunk, r, cos, sin = polar_in_range(x, self._delta(x))
        bend = 2 * self._strength(x) * (sin - cos) * (sin + cos)
        return over_square(bend * shrunk * shrunk, r)

    def _product(self, x: jax.Array, v: jax.Array) -> jax.Array:
        return self._hessian(x) * v


def _start(scale: jax.Array, learnable: bool) -> jax.Array:
    strength = jnp.zeros((1,), scale.dtype)
    if not learnable:
        return strength
    return jnp.concatenate([strength, jnp.log(positive(scale, scale.dtype))[None]])


def _scale(
    fixed: jax.Array, log_parameters: jax.Array, learnable: bool, like: jax.Array
) -> jax.Array:
    if learnable:
        return bounded_exp(log_parameters[1].astype(like.dtype))
    return positive(fixed, like.dtype)
