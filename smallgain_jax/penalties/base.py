"""What every penalty offers, derived from its value by autodiff."""

import abc
import math
import operator
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import as_float, check_finite, check_positive, is_concrete

Schedule = Callable[[Any], Any]


class Penalty(eqx.Module):
    r"""A penalty $p(x) \ge 0$ with a diagonal that majorizes its Hessian.

    Every penalty is a pytree and a pure function of x, so it passes through `jit`, `vmap` and
    `grad`; it is a local energy of an `EnergyGraph`, a term of a loss, or used on its own. Results
    have the dtype of x, at least float32: bfloat16 inputs are accumulated in float32.

    What is learnable is kept as logarithms in `log_parameters`, float [P], which
    `log_parameter_gradient` differentiates. Each enters as $e^{\mathrm{clip}(\rho, \pm c)}$, with c
    a quarter of the logarithm of the largest number of the dtype: a product of three of them
    (lambda / delta^2) is finite, and where the clamp is active the derivative is 0.

    Attributes:
      weight: float scalar, the fixed factor of the strength.
      log_parameters: rho, float [P]; see each penalty for their order.
      schedule: a function from a step count to a weight (any optax schedule), or None.
    """

    weight: eqx.AbstractVar[jax.Array]
    log_parameters: eqx.AbstractVar[jax.Array]
    schedule: eqx.AbstractVar[Schedule | None]

    @abc.abstractmethod
    def _value(self, x: jax.Array) -> jax.Array:
        """The penalty of an x that `_prepare` has seen."""

    @abc.abstractmethod
    def _majorizer(self, x: jax.Array) -> jax.Array:
        """The majorizing diagonal at an x that `_prepare` has seen."""

    def _prepare(self, x: ArrayLike) -> jax.Array:
        return wide("x", x)

    def _prepare_pair(self, x: ArrayLike, v: ArrayLike) -> tuple[jax.Array, jax.Array]:
        point = self._prepare(x)
        vector = as_float("v", v).astype(point.dtype)
        if vector.shape != point.shape:
            raise ValueError(f"v has shape {vector.shape}, expected that of x, {point.shape}")
        return point, vector

    def _weight(self, x: jax.Array) -> jax.Array:
        return self.weight.astype(x.dtype)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """p(x), a scalar."""
        return self._value(self._prepare(x))

    def gradient(self, x: ArrayLike) -> jax.Array:
        """dp/dx, shaped like x."""
        return jax.grad(self._value)(self._prepare(x))

    def hessian_diagonal(self, x: ArrayLike) -> jax.Array | None:
        """Diagonal of the Hessian, shaped like x; None where the Hessian is dense (Hoyer)."""
        point = self._prepare(x)
        # exact because the Hessian of a separable penalty is diagonal; the others override this
        return self._product(point, jnp.ones_like(point))

    def hvp(self, x: ArrayLike, v: ArrayLike) -> jax.Array:
        """Product of the exact Hessian at x with v, shaped like x.

        Args:
          x: point.
          v: direction, shaped like x.

        Raises:
          ValueError: v is not shaped like x.
        """
        return self._product(*self._prepare_pair(x, v))

    def _product(self, x: jax.Array, v: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(self._value), (x,), (v,))[1]

    def majorizer_diagonal(self, x: ArrayLike) -> jax.Array:
        """Non-negative diagonal D with D - H(x) positive semidefinite, shaped like x."""
        return self._majorizer(self._prepare(x))

    def majorizer_hvp(self, x: ArrayLike, v: ArrayLike) -> jax.Array:
        """Product of the majorizer at x with v, shaped like x."""
        point, vector = self._prepare_pair(x, v)
        return self._majorizer(point) * vector

    def value_gradient_majorizer(self, x: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`(p(x), gradient, majorizer_diagonal)` in one pass, for use under `jit`."""
        point = self._prepare(x)
        value, gradient = jax.value_and_grad(self._value)(point)
        return value, gradient, self._majorizer(point)

    def majorized_step(self, x: ArrayLike, step: ArrayLike = 1.0) -> jax.Array:
        r"""One step $x - \omega D(x)^{-1} \nabla p(x)$ that never increases the penalty.

        That the step descends is a theorem for each of the six (see its docstring), for every
        $0 < \omega \le 2$ and from every x. It holds in exact arithmetic; so that it holds in
        floating point too, a step whose computed value is larger, by rounding, is not taken.

        Args:
          x: point.
          step: omega in (0, 2].

        Returns:
          The next point, shaped like x, at least float32; x itself where the value is not finite.

        Raises:
          ValueError: a concrete step outside (0, 2].

        Source: Hunter and Lange (2004), A tutorial on MM algorithms, section 2.
        """
        if is_concrete(step) and not 0 < float(np.asarray(step)) <= 2:
            raise ValueError(f"step = {step} must lie in (0, 2]")
        point = self._prepare(x)
        candidate = self._descend(point, jnp.asarray(step, point.dtype))
        return jnp.where(self._value(candidate) <= self._value(point), candidate, point)

    def _descend(self, x: jax.Array, step: jax.Array) -> jax.Array:
        rows = self._majorizer(x)
        direction = jax.grad(self._value)(x) / jnp.where(rows > 0, rows, 1)
        return x - step * jnp.where(rows > 0, direction, 0)

    @property
    def num_log_parameters(self) -> int:
        """Number P of learnable log-parameters."""
        return int(self.log_parameters.shape[0])

    def log_parameter_gradient(self, x: ArrayLike) -> jax.Array:
        """dp/d(log_parameters) at x, [P]."""
        point = self._prepare(x)

        def value(log_parameters: jax.Array) -> jax.Array:
            return self._replace_log_parameters(log_parameters)._value(point)

        return jax.grad(value)(self.log_parameters)

    def with_log_parameters(self, log_parameters: ArrayLike) -> Self:
        """The same penalty at other log-parameters.

        Args:
          log_parameters: rho, float [P].

        Raises:
          ValueError: a wrong shape, or a concrete entry that is not finite.
        """
        array = as_float("log_parameters", log_parameters)
        if array.shape != self.log_parameters.shape:
            raise ValueError(
                f"log_parameters has shape {array.shape}, expected {self.log_parameters.shape}"
            )
        check_finite("log_parameters", array)
        return self._replace_log_parameters(array)

    def _replace_log_parameters(self, log_parameters: jax.Array) -> Self:
        return eqx.tree_at(lambda penalty: penalty.log_parameters, self, log_parameters)

    def at_step(self, count: ArrayLike) -> Self:
        """The same penalty with the weight that its schedule gives at a step.

        Args:
          count: number of steps taken, int; may be traced.

        Returns:
          The penalty itself where there is no schedule.
        """
        if self.schedule is None:
            return self
        weight = jnp.asarray(self.schedule(count)).astype(self.weight.dtype)
        return eqx.tree_at(lambda penalty: penalty.weight, self, weight)


class StrengthPenalty(Penalty):
    r"""A penalty whose first log-parameter is its strength, $\lambda = w e^{\rho_0}$."""

    @property
    def strength(self) -> jax.Array:
        """lambda = weight exp(log_parameters[0]), a scalar."""
        return self.weight * bounded_exp(self.log_parameters[0])

    def _strength(self, x: jax.Array) -> jax.Array:
        return self._weight(x) * bounded_exp(self.log_parameters[0].astype(x.dtype))


def bounded_exp(rho: jax.Array) -> jax.Array:
    """exp of rho clipped to a quarter of the dtype's range of exponents, so never 0 or infinite."""
    limit = 0.25 * math.log(float(np.finfo(rho.dtype).max))
    return jnp.exp(jnp.clip(rho, -limit, limit))


def positive(value: jax.Array, dtype: Any) -> jax.Array:
    """`value` in a narrower dtype without rounding to zero."""
    return jnp.maximum(value.astype(dtype), float(np.finfo(dtype).tiny))


def wide(name: str, value: ArrayLike) -> jax.Array:
    """`value` as a floating array of at least float32."""
    if any(isinstance(leaf, str | bytes) or leaf is None for leaf in _entries(value)):
        raise TypeError(f"{name} must be real numbers, got {value!r}")
    array = as_float(name, value)
    # by the dtype: a Python number is weakly typed, and would be rounded to float32 under x64
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


@jax.custom_jvp
def reciprocal(r: jax.Array) -> jax.Array:
    """1 / r, whose derivatives are products: those of a division square r, which underflows."""
    return 1 / r


@reciprocal.defjvp
def _reciprocal_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inverse = reciprocal(primals[0])
    return inverse, -(inverse * tangents[0]) * inverse


def shrinkage(size: jax.Array) -> jax.Array:
    """1, or a power of two below it where `size` is so large that sums or 1 / size leave the range.

    Compiled code divides by a scalar by way of its reciprocal, and takes numbers below the
    smallest normal one for 0.
    """
    return jnp.where(size > float(np.finfo(size.dtype).max) / 16, 1 / 16, 1).astype(size.dtype)


def over(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale for every normal scale, with derivatives that are products, in every order."""
    # by each entry, because two factors that are constants would be compiled to one again; beside
    # a scale that large what is below 1 is as good as 0
    shrunk = jnp.where(jnp.abs(jax.lax.stop_gradient(x)) > 1, shrinkage(scale), 1)
    shrunk = jax.lax.stop_gradient(shrunk)
    return (x * shrunk) * reciprocal(scale * shrunk)


def over_square(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale^2, cut at the largest number of the dtype; 0 where x is, whatever the scale.

    Two divisions would be compiled to one by the square, which underflows before the result does.
    """
    top = float(np.finfo(x.dtype).max)
    # an infinity that is cut afterwards would leave NaN in derivatives
    room = (1 + 8 * float(np.finfo(x.dtype).eps)) / top**0.5
    beyond = scale < room * jnp.sqrt(jnp.abs(jax.lax.stop_gradient(x)))
    safe = jnp.where(beyond, 1, scale)
    shrunk = shrinkage(jax.lax.stop_gradient(safe))
    inverse = reciprocal(safe * shrunk)
    return jnp.where(beyond, jnp.sign(x) * top, x * shrunk * inverse * shrunk * inverse)


def magnitude(x: jax.Array) -> jax.Array:
    """|x| with derivative sign(x), sign(0) = 0, where that of `jnp.abs` at 0 is 1."""
    return x * jnp.sign(x)


def _entries(value: Any) -> list[Any]:
    return jax.tree.leaves(value, is_leaf=lambda leaf: leaf is None)


def read_count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} = {value!r} must be an integer") from error
    if count < 1:
        raise ValueError(f"{name} = {count} must be 1 or above")
    return count


def read_weight(weight: ArrayLike | Schedule) -> tuple[jax.Array, Schedule | None]:
    """The weight to start with, and the schedule it comes from."""
    schedule = weight if callable(weight) else None
    array = wide("weight", schedule(0) if schedule is not None else weight)  # type: ignore[arg-type]
    if array.shape != ():
        raise ValueError(f"weight must be a scalar or a schedule, got shape {array.shape}")
    check_finite("weight", array, low=0.0)
    return array, schedule


def read_positive(name: str, value: ArrayLike) -> jax.Array:
    """A floating scalar, finite and above zero where it is concrete."""
    array = wide(name, value)
    if array.shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}")
    # the value as given: a tiny one may round to zero in the default dtype
    check_positive(name, value)
    return array
