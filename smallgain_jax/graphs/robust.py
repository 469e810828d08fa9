r"""Kernels that forgive outliers, for terms of any number of nodes.

A squared residual grows without end, and one wrong measurement bends the whole answer. A robust
kernel replaces $\|r\|^2$ by $c^2 \rho(\|r\|^2 / c^2)$, the same near 0 and flatter beyond c.
Every $\rho$ here is concave in $s = \|r\|^2 / c^2$, hence lies below its tangent:

$$ c^2 \rho(\|r'\|^2 / c^2) \le c^2 \rho(s) + \rho'(s)\, (\|r'\|^2 - \|r\|^2) , $$

a squared residual of the weight $\rho'(s)$ (Geman and Reynolds 1992; iteratively reweighted least
squares). Rows are those of this majorizer: positive where the kernel itself bends down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import Numbers, check_positive, is_concrete
from smallgain_jax.graphs.families import per_term, per_term_params


def _huber(s: jax.Array) -> jax.Array:
    far = s > 1
    # the root has no derivative at 0, and `where` would hand on its NaN
    return jnp.where(far, 2 * jnp.sqrt(jnp.where(far, s, 1)) - 1, s)


def _geman_mcclure(s: jax.Array) -> jax.Array:
    return s / (1 + s)


KERNELS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "huber": _huber,
    "cauchy": jnp.log1p,
    "geman_mcclure": _geman_mcclure,
}
"""rho(s) by name: linear in |r| beyond the scale, logarithmic, bounded by 1."""


@dataclass(frozen=True)
class Robust:
    r"""The energy $c^2 \rho(\|r\|^2 / c^2)$ of a residual, for `PairTerm` and `HyperTerm`.

    | kernel | $\rho(s)$ |
    |---|---|
    | "huber" | s up to 1, $2 \sqrt s - 1$ beyond; convex if r is linear (Huber 1964) |
    | "cauchy" | $\log(1 + s)$ |
    | "geman_mcclure" | $s / (1 + s)$ (Geman and McClure 1987) |

    The last two are not convex: what they end at depends on the start.

    Args:
      residual: `residual(x_i, x_j)`, or with the term's `params` one argument more; a scalar or an
        array, twice differentiable.
      kernel: a name above.
      scale: c, in units of the residual, positive; a fixed number. A scale that is to be learned
        belongs into the residual, r / c, and the weight, w c^2.

    Raises:
      TypeError: `residual` is not callable.
      ValueError: another kernel, or a scale that is not positive.

    >>> from smallgain_jax import PairTerm
    >>> closure = Robust(lambda a, b, z: b - a - z, "cauchy", scale=0.1)
    >>> term = PairTerm(closure, [0, 1], [1, 0], params=jnp.array([1.0, 5.0]))
    >>> [round(e, 3) for e in jax.vmap(lambda t: t.pair_energy(0.0, 1.0))(term).tolist()]
    [0.0, 0.074]
    """

    residual: Callable[..., jax.Array]
    kernel: str = "huber"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.residual):
            raise TypeError(f"residual must be callable, got {type(self.residual).__name__}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel = {self.kernel!r} is unknown: {', '.join(KERNELS)}")
        check_positive("scale", self.scale)

    @property
    def __name__(self) -> str:
        return self.kernel

    def _square(self, *ends: Any) -> jax.Array:
        return jnp.sum(self.residual(*ends) ** 2) / self.scale**2

    def __call__(self, *ends: Any) -> jax.Array:
        """The energy of one term."""
        return self.scale**2 * KERNELS[self.kernel](self._square(*ends))

    def majorizer(self, *ends: Any) -> jax.Array:
        """The squared residual by its weight here, which prices the term."""
        square = self._square(*ends)
        weight = jax.grad(KERNELS[self.kernel])(jax.lax.stop_gradient(square))
        return self.scale**2 * weight * square


class HyperTerm(eqx.Module):
    r"""Terms over any number of nodes: $\sum_k w_k f(x_{n_{k1}}, x_{n_{k2}}, ...)$, a local energy.

    One node with a robust kernel is a measurement that may be an outlier; three make a bending
    energy, an angle, a factor of a factor graph. The weights of `small_gain` do not move these
    terms, and a hierarchy does not see their couplings.

    Args:
      fn: `fn(x_1, ..., x_m)`, or with `params` one argument more, giving a scalar; node states are
        scalars or vectors [d]. Twice differentiable.
      nodes: nodes of each term, int [K, m], distinct within a term.
      num_nodes: n of the graph.
      weight: w, float [K] or scalar, non-negative.
      params: pytree of arrays with a leading axis K.

    Raises:
      TypeError: `fn` is not callable.
      ValueError: nodes outside 0..n-1 or not [K, m], a negative weight, or `params` without K.

    >>> import smallgain_jax as sg
    >>> bend = HyperTerm(lambda a, b, c: (a - 2 * b + c) ** 2, [[0, 1, 2]], num_nodes=3)
    >>> graph = sg.EnergyGraph([sg.Landau([1.0, 0.0, 1.0], target=[0.0, 0.0, 1.0]), bend])
    >>> sg.relax(graph, jnp.zeros(3)).x.round(3).tolist()
    [0.0, 0.5, 1.0]
    """

    fn: Callable[..., jax.Array] = eqx.field(static=True)
    nodes: jax.Array
    weight: jax.Array
    params: Any
    num_nodes: int = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[..., jax.Array],
        nodes: Any,
        num_nodes: int,
        weight: Numbers = 1.0,
        params: Any = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable as fn(x_1, ...), got {type(fn).__name__}")
        self.fn, self.num_nodes = fn, int(num_nodes)
        self.nodes = jnp.asarray(nodes)
        if self.nodes.ndim != 2 or not jnp.issubdtype(self.nodes.dtype, jnp.integer):
            raise ValueError(f"nodes must be integers [K, m], got shape {self.nodes.shape}")
        if is_concrete(nodes):
            host = np.asarray(nodes)
            if host.size and (host.min() < 0 or host.max() >= self.num_nodes):
                raise ValueError(f"nodes must lie in 0..{self.num_nodes - 1}")
        self.weight = per_term("weight", weight, self.nodes.shape[:1], low=0.0)
        self.params = per_term_params(params, self.nodes.shape[0], "term")

    def _of(self, fn: Callable[..., jax.Array], states: jax.Array, params: Any) -> jax.Array:
        more = () if self.params is None else (params,)
        return fn(*states, *more)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The energy of the whole state, a scalar."""
        energies = jax.vmap(lambda s, p: self._of(self.fn, s, p))(x[self.nodes], self.params)
        return jnp.sum(self.weight * energies)

    def majorizer_diagonal(self, x: jax.Array) -> jax.Array:
        """Absolute row sums of the terms' Hessians, or of their majorizers', shaped like x."""
        priced = getattr(self.fn, "majorizer", self.fn)

        def rows(states: jax.Array, params: Any) -> jax.Array:
            hessian = jax.hessian(lambda s: self._of(priced, s, params))(states)
            return jnp.sum(jnp.abs(hessian), axis=tuple(range(states.ndim, 2 * states.ndim)))

        costs = jax.vmap(rows)(x[self.nodes], self.params)
        weight = self.weight.reshape(-1, *(1,) * (costs.ndim - 1))
        return jnp.zeros_like(x).at[self.nodes].add(weight * costs)


__all__ = ["HyperTerm", "Robust"]
