"""Penalties and activations that select: the k largest entries, or those above a threshold."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smallgain_jax._checks import as_float, check_finite, check_positive, is_concrete
from smallgain_jax.penalties.base import (
    Penalty,
    Schedule,
    bounded_exp,
    over,
    over_square,
    positive,
    read_count,
    read_positive,
    read_weight,
    wide,
)


class TopK(Penalty):
    r"""Half squares of the largest entries, $p(x) = \frac{w}{2} \sum_i \sum_{j \in T_i} x_{ij}^2$.

    Rows are the last axis, of length d; T_i holds the k largest magnitudes of row i, ties to the
    lower index. Convex, with a kink where the k-th and the next magnitude tie. Away from ties its
    Hessian is w on the selected entries and 0 elsewhere, and the majorizer is the Hessian itself.

    The bound is one at x only: no diagonal bounds p across a tie. When p stands alone, a step
    $x - \omega D^{-1} \nabla p$ still descends for $0 < \omega \le 2$, because it scales the
    selected entries by $1 - \omega$ and p never grows when magnitudes shrink.

    Args:
      k: number of entries counted in a row, int in 1..d.
      weight: w, float scalar >= 0, or an optax schedule (see `at_step`). 0 switches the penalty
        off, so that schedules may start there (seed 003 refuses it).

    Log-parameters: none.

    Raises:
      TypeError: k that is no integer.
      ValueError: k below 1, weight negative or not finite; on use, k above d.

    Source: Makhzani and Frey (2014), k-sparse autoencoders, for the selection; Argyriou, Foygel and
    Srebro (2012), Sparse prediction with the k-support norm, section 2: 2 p / w is the square of
    its dual norm, hence convex.

    >>> p = TopK(k=2)
    >>> p.gradient(jnp.array([1.0, -3.0, 1.0, 0.5])).tolist()
    [1.0, -3.0, 0.0, 0.0]
    """

    weight: jax.Array
    log_parameters: jax.Array
    schedule: Schedule | None = eqx.field(static=True)
    k: int = eqx.field(static=True)

    def __init__(self, k: int, *, weight: ArrayLike | Schedule = 1.0) -> None:
        self.k = read_count("k", k)
        self.weight, self.schedule = read_weight(weight)
        self.log_parameters = jnp.zeros((0,), self.weight.dtype)

    def _prepare(self, x: ArrayLike) -> jax.Array:
        array = super()._prepare(x)
        if array.ndim < 1:
            raise ValueError("x is a scalar, but the rows of TopK are its last axis")
        if self.k > array.shape[-1]:
            raise ValueError(f"k = {self.k} is outside 1..{array.shape[-1]}, the length of a row")
        return array

    def mask(self, x: ArrayLike) -> jax.Array:
        """Which entries are counted, bool, shaped like x."""
        return self._mask(self._prepare(x))

    def _mask(self, x: jax.Array) -> jax.Array:
        integer = jnp.int64 if x.dtype.itemsize == 8 else jnp.int32
        # the bits of non-negative floats are ordered as the floats are, and a NaN's come last,
        # so that a NaN is selected and reaches the value instead of vanishing
        size = jax.lax.bitcast_convert_type(jnp.abs(jax.lax.stop_gradient(x)), integer)
        last = _kth_largest(size, self.k)
        larger = size > last
        tied = size == last
        places = self.k - jnp.sum(larger, axis=-1, keepdims=True)
        return larger | (tied & (jnp.cumsum(tied, axis=-1) <= places))

    def _value(self, x: jax.Array) -> jax.Array:
        counted = jnp.where(self._mask(x), x, 0)
        # weighted before it is squared, which may overflow where the penalty does not
        return jnp.sum(self._weight(x) / 2 * counted * counted)

    def hessian_diagonal(self, x: ArrayLike) -> jax.Array:
        """w on the entries that are counted, 0 on the others, shaped like x."""
        return self.majorizer_diagonal(x)

    def _majorizer(self, x: jax.Array) -> jax.Array:
        return jnp.where(self._mask(x), self._weight(x), 0)


class JumpReLU(Penalty):
    r"""Smoothed jumps, $p(x) = w \sum_{ij} \tau_j \, \sigma((x_{ij} - \tau_j)/\epsilon)$.

    The last axis of x is the latent axis, of length d. With $g = \sigma((x - \tau)/\epsilon)$ the
    Hessian is diagonal, $w \tau g(1-g)(1-2g)/\epsilon^2$, negative above the threshold. The
    majorizer is $w \tau \max([g(1-g)]^2, g(1-g)|1-2g|)/\epsilon^2$: |Hessian|, and near the
    threshold, where that vanishes, the reweighted square; cut at the largest number of the dtype.

    The bound is one at x only; $w \tau / (6\sqrt3 \epsilon^2)$ bounds every x. A step
    $x - \omega D^{-1} \nabla p$ still descends for every omega > 0 when p stands alone, because p
    grows with each entry and no entry of the step is positive; its length is at most
    $4.24 \omega \epsilon$.

    Args:
      thresholds: theta, float [d], > 0, in the unit of x; $\tau_j = \theta_j e^{\rho_j}$.
      eps: width of the smoothed step, float scalar > 0, in the unit of x.
      weight: w, float scalar >= 0, or an optax schedule (see `at_step`). 0 switches the penalty
        off, so that schedules may start there (seed 003 refuses it).

    Log-parameters: rho, one per threshold, [d].

    Raises:
      ValueError: thresholds that are not [d] or not positive and finite, eps not positive and
        finite, weight negative or not finite; on use, rows that are not of length d.

    Source: Rajamanoharan et al. (2024), Jumping ahead: improving reconstruction fidelity with
    JumpReLU sparse autoencoders, section 3 (its L0 penalty, each count priced by its threshold and
    the step smoothed by a logistic).

    >>> p = JumpReLU(thresholds=jnp.array([0.5, 2.0]), eps=0.1)
    >>> p(jnp.array([0.5, 2.0])).item()
    1.25
    """

    weight: jax.Array
    thresholds: jax.Array
    eps: jax.Array
    log_parameters: jax.Array
    schedule: Schedule | None = eqx.field(static=True)

    def __init__(
        self, thresholds: ArrayLike, eps: ArrayLike, *, weight: ArrayLike | Schedule = 1.0
    ) -> None:
        self.weight, self.schedule = read_weight(weight)
        self.thresholds = wide("thresholds", thresholds)
        if self.thresholds.ndim != 1:
            raise ValueError(f"thresholds has shape {self.thresholds.shape}, expected [d]")
        check_finite("thresholds", self.thresholds)
        if is_concrete(self.thresholds):
            for j, threshold in enumerate(self.thresholds.tolist()):
                check_positive(f"thresholds[{j}]", threshold)
        self.eps = read_positive("eps", eps)
        self.log_parameters = jnp.zeros_like(self.thresholds)

    def _prepare(self, x: ArrayLike) -> jax.Array:
        array = super()._prepare(x)
        if array.ndim < 1 or array.shape[-1] != self.thresholds.shape[0]:
            raise ValueError(
                f"thresholds has length {self.thresholds.shape[0]}, "
                f"but the last axis of x, of shape {array.shape}, has another"
            )
        return array

    @property
    def effective_thresholds(self) -> jax.Array:
        """tau = thresholds exp(log_parameters), [d]."""
        return self.thresholds * bounded_exp(self.log_parameters)

    def _gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """tau, eps and (x - tau)/eps, the first and last shaped like x."""
        dtype = x.dtype
        tau = self.thresholds.astype(dtype) * bounded_exp(self.log_parameters.astype(dtype))
        tau = jnp.broadcast_to(tau, x.shape)
        eps = positive(self.eps, dtype)
        return tau, eps, over(x - tau, eps)

    def _value(self, x: jax.Array) -> jax.Array:
        tau, _, u = self._gate(x)
        return jnp.sum(self._weight(x) * tau * logistic(u))

    def _majorizer(self, x: jax.Array) -> jax.Array:
        tau, eps, u = self._gate(x)
        slope = logistic(u) * logistic(-u)
        rows = slope * jnp.maximum(slope, jnp.abs(jnp.tanh(u / 2)))
        return over_square(self._weight(x) * tau * rows, eps)


def _kth_largest(size: jax.Array, k: int) -> jax.Array:
    """The k-th largest of non-negative integers along the last axis, [..., 1]."""
    # bit by bit, largest first: a count per bit is 5 to 10 times faster than `top_k` on a CPU
    highest = 8 * size.dtype.itemsize - 2

    def set_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.ones((), size.dtype) << (highest - i).astype(size.dtype))
        enough = jnp.sum(size >= tried, axis=-1, keepdims=True) >= k
        return jnp.where(enough, tried, found)

    start = jnp.zeros((*size.shape[:-1], 1), size.dtype)
    return jax.lax.fori_loop(0, highest + 1, set_bit, start)


@jax.custom_jvp
def logistic(u: jax.Array) -> jax.Array:
    """The logistic function, whose derivatives keep their relative accuracy for large u."""
    return jax.nn.sigmoid(u)


@logistic.defjvp
def _logistic_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (u,), (du,) = primals, tangents
    value = logistic(u)
    # 1 - value would cancel
    return value, value * logistic(-u) * du


def jumprelu(z: ArrayLike, threshold: ArrayLike, eps: ArrayLike) -> jax.Array:
    r"""Hard gate $z \cdot 1[z > \tau]$ with the derivatives of $z \, \sigma((z - \tau)/\epsilon)$.

    With $g = \sigma((z - \tau)/\epsilon)$ the partial derivatives are $g + z g(1-g)/\epsilon$ by
    z and $-z g(1-g)/\epsilon$ by the threshold; second and higher ones are those of the smoothed
    gate. eps only shapes the derivatives, so the derivative by eps is 0. Forward and reverse mode,
    and any composition of them, are defined.

    Args:
      z: pre-activations, float [..., d].
      threshold: tau, float, of a shape that broadcasts to that of z.
      eps: width of the smoothed gate, float scalar > 0, in the unit of z.

    Returns:
      Activations, shaped like z, in its dtype.

    Raises:
      ValueError: eps not positive and finite, a threshold that is not finite or does not broadcast.

    Source: Erichson, Yao and Mahoney (2019), JumpReLU, for the gate; Rajamanoharan et al. (2024),
    section 3, for straight-through derivatives by the threshold (ours have a logistic kernel).

    >>> jumprelu(jnp.array([0.4, 0.6]), 0.5, 0.1).tolist() == jnp.array([0.0, 0.6]).tolist()
    True
    """
    array = as_float("z", z)
    z = wide("z", array)
    tau = wide("threshold", threshold)
    check_finite("threshold", tau)
    width = positive(read_positive("eps", eps), z.dtype)
    try:
        tau = jnp.broadcast_to(tau.astype(z.dtype), z.shape)
    except ValueError as error:
        raise ValueError(
            f"threshold has shape {tau.shape}, which does not broadcast to that of z, {z.shape}"
        ) from error
    return _jumprelu(z, tau, width).astype(array.dtype)


@jax.custom_jvp
def _jumprelu(z: jax.Array, tau: jax.Array, eps: jax.Array) -> jax.Array:
    # compared this way round, a NaN comes through
    return jnp.where(z <= tau, 0, z)


@_jumprelu.defjvp
def _jumprelu_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    z, tau, eps = primals
    dz, dtau, _ = tangents
    u = over(z - tau, eps)
    slope = over(z * logistic(u) * logistic(-u), eps)
    return _jumprelu(z, tau, eps), logistic(u) * dz + slope * (dz - dtau)
