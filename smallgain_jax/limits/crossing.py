r"""Where a linear system driven by its own first coordinate leaves the unit circle.

The state s of an optimizer on a quadratic of curvature $\lambda$, parameter first, moves by
$s \leftarrow (A + \lambda\, b\, e_0^T) s$. It has an eigenvalue z exactly where
$\lambda = D(z) / N(z)$, with $D(z) = \det(z I - A)$ and $N(z) = e_0^T\, \mathrm{adj}(z I - A)\, b$.
So the curvatures at which an eigenvalue is on the unit circle are the real positive values of
$D / N$ on it (Nyquist 1932). The smallest is the limit of an optimizer that is stable below.

The polynomials are in $w = z - 1$: slow memory has its roots near z = 1, where powers of z cancel.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

_CELLS = 1024
_SLOWEST = 1e-4
"""Radians for each update; slower oscillations than one in 60,000 updates are not looked for."""


def first_unstable(drift: Any, drive: Any, xp: Any = jnp) -> Any:
    r"""Smallest curvature at which $I + M + \lambda\, b\, e_0^T$ has an eigenvalue on the circle.

    Args:
      drift: $M = A - I$, [n, n], real.
      drive: b, [n], real.
      xp: `jax.numpy`, or `numpy` for the same in double precision on the host.

    Returns:
      The curvature, []; inf where there is none.

    Gradient descent, x <- x - 0.5 g:

    >>> first_unstable(jnp.zeros((1, 1)), jnp.array([-0.5])).item()
    4.0
    """
    size = xp.max(xp.abs(drive))
    usable = (size > 0) & xp.isfinite(size)
    size = xp.where(usable, size, 1)
    determinant, adjugate = _polynomials(drift, drive / size, xp)

    def ratio(angle: Any) -> tuple[Any, Any]:
        """D times the conjugate of N, which is real where D / N is, and |N|^2."""
        half = xp.sin(angle / 2)
        w = 2 * half * (-half + 1j * xp.cos(angle / 2))
        numerator = _horner(adjugate, w)
        return _horner(determinant, w) * xp.conj(numerator), xp.abs(numerator) ** 2

    angles = xp.asarray(np.geomspace(_SLOWEST, np.pi, _CELLS + 1)[:-1], drift.dtype)
    phase = ratio(angles)[0].imag
    low, high, below, above = angles[:-1], angles[1:], phase[:-1], phase[1:]
    crosses = below * above < 0

    def between() -> Any:
        gap = xp.where(below == above, 1, below - above)
        return xp.clip(low + (high - low) * below / gap, low, high)

    for _ in range(2):  # regula falsi: a cell is a hundredth wide, and the function smooth
        middle = between()
        value = ratio(middle)[0].imag
        left = value * below > 0
        low, below = xp.where(left, middle, low), xp.where(left, value, below)
        high, above = xp.where(left, high, middle), xp.where(left, above, value)
    # z = -1 is on the circle too, and D / N always real there
    product, square = ratio(xp.concatenate([between(), xp.full((1,), np.pi, drift.dtype)]))
    crosses = xp.concatenate([crosses, xp.ones((1,), bool)])
    crosses = crosses & (product.real > 0) & (square > 0)
    curvature = xp.where(crosses, product.real / xp.where(crosses, square, 1), xp.inf)
    return xp.where(usable, xp.min(curvature) / size, xp.inf)


def _polynomials(drift: Any, drive: Any, xp: Any) -> tuple[list[Any], list[Any]]:
    """Coefficients, lowest first, of D and N (Faddeev and LeVerrier)."""
    n = drift.shape[0]
    identity = xp.eye(n, dtype=drift.dtype)
    determinant, adjugate = [xp.ones((), drift.dtype)], []
    factor = identity
    for k in range(1, n + 1):
        adjugate.append(xp.sum(factor[0] * drive))
        # products by hand: accelerators round the operands of a matrix product
        product = xp.sum(drift[:, :, None] * factor[None], axis=1)
        determinant.append(-xp.sum(product * identity) / k)
        factor = product + determinant[-1] * identity
    return determinant[::-1], adjugate[::-1]


def _horner(coefficients: list[Any], w: Any) -> Any:
    """A polynomial at w."""
    value = coefficients[-1] + 0 * w
    for c in coefficients[-2::-1]:
        value = value * w + c
    return value
