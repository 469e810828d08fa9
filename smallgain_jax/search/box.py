r"""The box of admissible states."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Box(NamedTuple):
    """The set lower <= x <= upper; either end may be infinite, a scalar, or shaped like x."""

    lower: Any
    upper: Any

    @property
    def absent(self) -> bool:
        """Whether both ends are numbers and infinite, so that a program can leave it out."""
        ends = (self.lower, self.upper)
        return all(isinstance(end, float) for end in ends) and ends == (-jnp.inf, jnp.inf)

    def project(self, x: Any) -> Any:
        """The nearest point of the box, leaf by leaf in the leaf's dtype."""
        return jax.tree.map(
            lambda leaf: jnp.clip(
                leaf, jnp.asarray(self.lower, leaf.dtype), jnp.asarray(self.upper, leaf.dtype)
            ),
            x,
        )

    def touches(self, x: jax.Array) -> jax.Array:
        """Where x is at a bound, bool like x."""
        return (x <= self.lower) | (x >= self.upper)

    def blocks(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        """Where a bound holds and `direction` points out of it, bool like x."""
        return ((x <= self.lower) & (direction < 0)) | ((x >= self.upper) & (direction > 0))
