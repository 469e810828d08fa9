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
    r"""Local energies $\sum_r a_r (x_r - t_r)^2 + b_r (x_r - t_r)^4$ (design note).

    Args:
      a: quadratic coefficients, float [n] (or [n, d] for vector nodes) or scalar. May be negative:
        with b > 0 that is a double well.
      b: quartic coefficients, float [n] or scalar, non-negative.
      target: t, float [n] or scalar. One of the three must be an array, which tells n.

    Raises:
      ValueError: a coefficient that is not finite, negative b, shapes that do not match, or scalars
        alone.

    >>> Landau(a=[0.25, 0.5], b=0.25)(jnp.array([1.0, 0.0])).item()
    0.5
    """

    a: jax.Array
    b: jax.Array
    target: jax.Array

    def __init__(self, a: Numbers, b: Numbers = 0.0, target: Numbers = 0.0) -> None:
        given = {"a": as_float("a", a), "b": as_float("b", b), "target": as_float("target", target)}
        shape = next((array.shape for array in given.values() if array.ndim), ())
        if len(shape) not in (1, 2):
            raise ValueError(
                "a, b or target must have shape [n] or [n, d], to tell the number of nodes; got "
                + ", ".join(str(array.shape) for array in given.values())
            )
        for name, array in given.items():
            if array.shape not in ((), shape):
                raise ValueError(f"{name} has shape {array.shape}, expected () or {shape}")
        self.a, self.b, self.target = (broadcast(array, shape) for array in given.values())
        check_finite("a", self.a)
        check_finite("b", self.b, low=0.0)
        check_finite("target", self.target)

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
