"""Local energies: what a node pays on its own."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from smallgain_jax._checks import Numbers, as_float, broadcast, check_finite


@runtime_checkable
class LocalEnergy(Protocol):
    """What an `EnergyGraph` asks of a local energy: a value, and a bound on its Hessian's rows."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """The energy of the whole state, a scalar."""

    def majorizer_diagonal(self, x: jax.Array) -> jax.Array:
        """Non-negative rows, shaped like x, whose diagonal matrix majorizes the Hessian at x."""


class Landau(eqx.Module):
    r"""Local energies $\sum_r a_r (x_r - t_r)^2 + b_r (x_r - t_r)^4$ (seed 000's local term).

    Args:
      a: quadratic coefficients, float [n] (or [n, d] for vector nodes). May be negative: with
        b > 0 that is a double well.
      b: quartic coefficients, float [n] or scalar, non-negative.
      target: t, float [n] or scalar.

    Raises:
      ValueError: a coefficient that is not finite, negative b, or shapes that do not match `a`.

    >>> Landau(a=[0.25, 0.5], b=0.25)(jnp.array([1.0, 0.0])).item()
    0.5
    """

    a: jax.Array
    b: jax.Array
    target: jax.Array

    def __init__(self, a: Numbers, b: Numbers = 0.0, target: Numbers = 0.0) -> None:
        self.a = as_float("a", a)
        if self.a.ndim not in (1, 2):
            raise ValueError(f"a must have shape [n] or [n, d], got {self.a.shape}")
        self.b = self._like_a("b", b)
        self.target = self._like_a("target", target)
        check_finite("a", self.a)
        check_finite("b", self.b, low=0.0)
        check_finite("target", self.target)

    def _like_a(self, name: str, value: Numbers) -> jax.Array:
        array = as_float(name, value)
        if array.shape not in ((), self.a.shape):
            raise ValueError(f"{name} has shape {array.shape}, expected () or {self.a.shape}")
        return broadcast(array, self.a.shape)

    @property
    def num_nodes(self) -> int:
        return self.a.shape[0]

    def _powers(self, x: jax.Array) -> tuple[Any, ...]:
        a, b, target = self.a, self.b, self.target
        if x.ndim > a.ndim:
            a, b, target = a[:, None], b[:, None], target[:, None]
        return a, b, (x - target) ** 2

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b, square = self._powers(x)
        return jnp.sum((a + b * square) * square)

    def majorizer_diagonal(self, x: jax.Array) -> jax.Array:
        """Absolute second derivatives |2 a + 12 b (x - t)^2|, shaped like x."""
        a, b, square = self._powers(x)
        return jnp.abs(2 * a + 12 * b * square)
