r"""Families of edges: terms $w_k e_k(x_i, x_j)$ that couple two nodes.

A family holds many edges of one kind as arrays over its edges [E], and describes one edge by a pure
function of its two node states. Gradients and Hessian blocks follow by autodiff under `vmap`.
On vector nodes [n, d] the built-in families act on each coordinate and sum.
"""

import abc
import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import Numbers, as_float, as_index, broadcast, check_finite, is_concrete


class EdgeFamily(eqx.Module):
    """Edges of one kind. Subclasses add parameters [E] and say what one edge costs.

    Args:
      i, j: ends of each edge, int [E], i != j.
      weight: the user's own weight of each edge, float [E] or scalar, finite and non-negative.
    """

    i: eqx.AbstractVar[jax.Array]
    j: eqx.AbstractVar[jax.Array]
    weight: eqx.AbstractVar[jax.Array]

    @abc.abstractmethod
    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        """Energy of one edge at unit weight; `self` holds that edge's parameters as scalars."""

    def gap(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array | None:
        """A hinge's gap, active where positive; None for families without a hinge."""
        return None

    def priced_energy(
        self, x_i: jax.Array, x_j: jax.Array, activity: jax.Array | None
    ) -> jax.Array:
        """What is differentiated twice to price an edge: a hinge counts by its activity.

        `activity` is shaped like the gap, a constant under that differentiation; None where the
        family has no gap.
        """
        return self.pair_energy(x_i, x_j)

    @property
    def num_edges(self) -> int:
        return self.i.shape[0]

    @property
    def key(self) -> str:
        """Name of the family in tables and telemetry."""
        return type(self).__name__


def _edges(i: Numbers, j: Numbers, weight: Numbers) -> tuple[jax.Array, ...]:
    i, j = as_index("i", i), as_index("j", j)
    if i.shape != j.shape:
        raise ValueError(f"i and j must have the same shape, got {i.shape} and {j.shape}")
    if is_concrete((i, j)):
        loops = np.flatnonzero(np.asarray(i) == np.asarray(j))
        if loops.size:
            k = int(loops[0])
            raise ValueError(f"i[{k}] = j[{k}] = {int(i[k])}: an edge must join two distinct nodes")
    weight = per_term("weight", weight, i.shape, low=0.0)
    return i, j, weight


def per_term(
    name: str, value: Numbers, shape: tuple[int, ...], *, low: float | None = None
) -> jax.Array:
    """A parameter of every term; below `low` an error, or NaN where it is traced."""
    array = as_float(name, value)
    if array.shape not in ((), shape):
        raise ValueError(f"{name} has shape {array.shape}, expected () or {shape}, one per edge")
    check_finite(name, array, low=low)
    if low is not None and not is_concrete(array):
        # what would have been an error had it been known before
        array = jnp.where(array >= low, array, jnp.nan)
    return broadcast(array, shape)


def per_term_params(params: Any, count: int, what: str) -> Any:
    """The parameters of a function of every term: arrays with a leading axis of `count`."""
    params = jax.tree.map(jnp.asarray, params)
    for leaf in jax.tree.leaves(params):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"params has a leaf of shape {leaf.shape}: its leading axis must be {count}, "
                f"one per {what}"
            )
    return params


def _relu_squared(gap: jax.Array) -> jax.Array:
    # `where` rather than `maximum`: its second derivative at gap = 0 is 0, not a half
    return jnp.sum(jnp.where(gap > 0, gap, 0) ** 2)


def _priced_hinge(gap: jax.Array, activity: jax.Array | None) -> jax.Array:
    return jnp.sum(gap**2 if activity is None else activity * gap**2)


class Quadratic(EdgeFamily):
    """Springs: w |x_i - x_j|^2. Each of its two rows pays 4 w.

    >>> edge = Quadratic(i=[0], j=[1], weight=0.5)
    >>> edge.num_edges, edge.key
    (1, 'Quadratic')
    """

    i: jax.Array
    j: jax.Array
    weight: jax.Array

    def __init__(self, i: Numbers, j: Numbers, weight: Numbers = 1.0) -> None:
        self.i, self.j, self.weight = _edges(i, j, weight)

    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return jnp.sum((x_i - x_j) ** 2)


class DirectedHinge(EdgeFamily):
    """Order: w max(0, x_j - x_i)^2 costs whenever node j stands above node i.

    >>> DirectedHinge(i=[0], j=[1]).weight.tolist()
    [1.0]
    """

    i: jax.Array
    j: jax.Array
    weight: jax.Array

    def __init__(self, i: Numbers, j: Numbers, weight: Numbers = 1.0) -> None:
        self.i, self.j, self.weight = _edges(i, j, weight)

    def gap(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return x_j - x_i

    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return _relu_squared(self.gap(x_i, x_j))

    def priced_energy(
        self, x_i: jax.Array, x_j: jax.Array, activity: jax.Array | None
    ) -> jax.Array:
        return _priced_hinge(self.gap(x_i, x_j), activity)


class AsymmetricHinge(EdgeFamily):
    """Scaled order: w max(0, beta_j x_j - alpha_i x_i)^2.

    Args:
      alpha_i, beta_j: gains on the two ends, float [E] or scalar.

    >>> AsymmetricHinge([0], [1], weight=2.0, alpha_i=1.0, beta_j=0.5).beta_j.tolist()
    [0.5]
    """

    i: jax.Array
    j: jax.Array
    weight: jax.Array
    alpha_i: jax.Array
    beta_j: jax.Array

    def __init__(
        self,
        i: Numbers,
        j: Numbers,
        weight: Numbers = 1.0,
        alpha_i: Numbers = 1.0,
        beta_j: Numbers = 1.0,
    ) -> None:
        self.i, self.j, self.weight = _edges(i, j, weight)
        self.alpha_i = per_term("alpha_i", alpha_i, self.i.shape)
        self.beta_j = per_term("beta_j", beta_j, self.i.shape)

    def gap(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return self.beta_j * x_j - self.alpha_i * x_i

    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return _relu_squared(self.gap(x_i, x_j))

    def priced_energy(
        self, x_i: jax.Array, x_j: jax.Array, activity: jax.Array | None
    ) -> jax.Array:
        return _priced_hinge(self.gap(x_i, x_j), activity)


class GateBenefit(EdgeFamily):
    """Reward for opening gate i by the benefit delta its partner sees: -w x_i delta.

    Linear in x, so it costs no curvature; only the bound on one step's change limits its weight.

    Args:
      delta: benefit of the open gate, float [E] or scalar, of either sign.

    >>> GateBenefit([1], [0], weight=0.8, delta=0.08).key
    'GateBenefit'
    """

    i: jax.Array
    j: jax.Array
    weight: jax.Array
    delta: jax.Array

    def __init__(self, i: Numbers, j: Numbers, weight: Numbers = 1.0, delta: Numbers = 0.0) -> None:
        self.i, self.j, self.weight = _edges(i, j, weight)
        self.delta = per_term("delta", delta, self.i.shape)

    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return -jnp.sum(x_i) * self.delta


@jax.custom_jvp
def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    """`base ** exponent` for base >= 0, with finite derivatives of every order at 0."""
    tiny = jnp.finfo(base.dtype).tiny ** 0.25
    # a negative exponent only arises in a derivative: clamping the base keeps it finite
    return jnp.where(exponent < 0, jnp.maximum(base, tiny), jnp.maximum(base, 0)) ** exponent


@_power.defjvp
def _power_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    base, exponent = primals
    value = _power(base, exponent)
    by_base = jnp.where(exponent == 0, 0, exponent * _power(base, exponent - 1))
    by_exponent = jnp.where(value > 0, value * jnp.log(jnp.where(base > 0, base, 1)), 0)
    return value, by_base * tangents[0] + by_exponent * tangents[1]


class DampedGateBenefit(EdgeFamily):
    r"""Gate benefit with diminishing effect: $-w\, \mathrm{damping}\, s\, x_i^p\, \delta$.

    The scale s is `positive_scale` where delta >= 0, else `negative_scale`; p is `eta_power`. The
    state counts as 0 below 0. For 1 < p < 2 the curvature is unbounded at x_i = 0; it is
    evaluated at a small positive state there, finite and huge.

    Args:
      delta: benefit, float [E] or scalar.
      damping: float [E] or scalar.
      eta_power: p >= 1, float [E] or scalar.
      positive_scale, negative_scale: float [E] or scalar.

    >>> gate = DampedGateBenefit([0], [1], delta=0.1, damping=0.5, eta_power=2.0)
    >>> gate.positive_scale.tolist()
    [1.0]
    """

    i: jax.Array
    j: jax.Array
    weight: jax.Array
    delta: jax.Array
    damping: jax.Array
    eta_power: jax.Array
    positive_scale: jax.Array
    negative_scale: jax.Array

    def __init__(
        self,
        i: Numbers,
        j: Numbers,
        weight: Numbers = 1.0,
        delta: Numbers = 0.0,
        damping: Numbers = 1.0,
        eta_power: Numbers = 1.0,
        positive_scale: Numbers = 1.0,
        negative_scale: Numbers = 1.0,
    ) -> None:
        self.i, self.j, self.weight = _edges(i, j, weight)
        shape = self.i.shape
        self.delta = per_term("delta", delta, shape)
        self.damping = per_term("damping", damping, shape)
        self.eta_power = per_term("eta_power", eta_power, shape, low=1.0)
        self.positive_scale = per_term("positive_scale", positive_scale, shape)
        self.negative_scale = per_term("negative_scale", negative_scale, shape)

    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        scale = jnp.where(self.delta >= 0, self.positive_scale, self.negative_scale)
        opened = jnp.sum(_power(x_i, jnp.broadcast_to(self.eta_power, x_i.shape)))
        return -opened * self.damping * scale * self.delta


def _check_arity(name: str, fn: Callable[..., Any] | None, has_params: bool) -> None:
    """Raise unless a function can be called with two node states, and parameters where given."""
    if fn is None:
        return
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        # some callables of C do not tell
        return
    needed = ("x_i", "x_j", "p") if has_params else ("x_i", "x_j")
    try:
        signature.bind(*needed)
    except TypeError as error:
        why = "with params" if has_params else "without params"
        raise TypeError(
            f"{name} is called as {name}({', '.join(needed)}) {why}, and takes {signature}"
        ) from error


class PairTerm(EdgeFamily):
    """Edges of any pure function of two node states.

    Args:
      fn: `fn(x_i, x_j)` or, with `params`, `fn(x_i, x_j, p)`, giving a scalar; node states are
        scalars or vectors [d]. Twice differentiable wherever curvature is asked for.
      i, j: ends of each edge, int [E].
      weight: float [E] or scalar, non-negative.
      params: pytree of arrays with a leading axis E; `p` above is one edge's slice.
      gap: for energies with a kink in their slope, `gap(x_i, x_j)` or `gap(x_i, x_j, p)`, a scalar:
        the energy is `fn` where the gap is positive, and 0 elsewhere. It is priced by its activity,
        as the hinges are. Without it, curvature that jumps is seen only where x is.

    Raises:
      TypeError: `fn` or `gap` is not callable, or not with these arguments.
      ValueError: as for every family; a leaf of `params` without the leading axis E; or, where it
        is used, a `fn` or `gap` that does not give a scalar.

    >>> term = PairTerm(lambda a, b: jnp.cosh(a - b) - 1, i=[0], j=[1], weight=2.0)
    >>> term.num_edges
    1
    >>> ahead = lambda a, b: 1 - (a - b)
    >>> margin = PairTerm(lambda a, b: ahead(a, b) ** 2, [0], [1], gap=ahead)
    >>> margin.pair_energy(jnp.array(3.0), jnp.array(0.0)).item()
    0.0
    """

    fn: Callable[..., jax.Array] = eqx.field(static=True)
    hinge: Callable[..., jax.Array] | None = eqx.field(static=True)
    i: jax.Array
    j: jax.Array
    weight: jax.Array
    params: Any

    def __init__(
        self,
        fn: Callable[..., jax.Array],
        i: Numbers,
        j: Numbers,
        weight: Numbers = 1.0,
        params: Any = None,
        *,
        gap: Callable[..., jax.Array] | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable as fn(x_i, x_j), got {type(fn).__name__}")
        if gap is not None and not callable(gap):
            raise TypeError(f"gap must be callable as gap(x_i, x_j), got {type(gap).__name__}")
        self.fn, self.hinge = fn, gap
        self.i, self.j, self.weight = _edges(i, j, weight)
        _check_arity("fn", fn, params is not None)
        _check_arity("gap", gap, params is not None)
        self.params = per_term_params(params, self.num_edges, "edge")

    def _of(self, fn: Callable[..., jax.Array], x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        value = fn(x_i, x_j) if self.params is None else fn(x_i, x_j, self.params)
        if jnp.shape(value) != ():
            name = "gap" if fn is self.hinge else "fn"
            raise ValueError(
                f"{name} must give a scalar, got shape {jnp.shape(value)} of two nodes of shape "
                f"{x_i.shape}: sum over the coordinates"
            )
        return value

    def gap(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array | None:
        return None if self.hinge is None else self._of(self.hinge, x_i, x_j)

    def pair_energy(self, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        energy, gap = self._of(self.fn, x_i, x_j), self.gap(x_i, x_j)
        return energy if gap is None else jnp.where(gap > 0, energy, 0)

    def priced_energy(
        self, x_i: jax.Array, x_j: jax.Array, activity: jax.Array | None
    ) -> jax.Array:
        # a robust kernel bends down beyond its scale: it is priced by what majorizes it
        energy = self._of(getattr(self.fn, "majorizer", self.fn), x_i, x_j)
        return energy if activity is None else activity * energy

    @property
    def key(self) -> str:
        return getattr(self.fn, "__name__", type(self).__name__).replace("<lambda>", "PairTerm")


FAMILIES: dict[str, type[EdgeFamily]] = {
    "quadratic": Quadratic,
    "directed_hinge": DirectedHinge,
    "asymmetric_hinge": AsymmetricHinge,
    "gate_benefit": GateBenefit,
    "damped_gate_benefit": DampedGateBenefit,
}
"""The built-in families by the name that edge tables use."""
