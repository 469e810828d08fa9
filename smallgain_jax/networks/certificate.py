r"""Lipschitz constants of feed-forward networks, from both sides.

The upper bound multiplies certified spectral norms and the activations' constants; the lower one is
the largest gain of the Jacobian that a search over inputs has met.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from smallgain_jax._checks import check_positive
from smallgain_jax._compiling import at_once
from smallgain_jax._show import shows
from smallgain_jax.networks.layers import Rule, find_layers, whole
from smallgain_jax.networks.projections import frobenius
from smallgain_jax.spectral.norms import in_unit, spectral_bound

ACTIVATIONS: dict[str, float] = {
    "abs": 1.0,
    "elu": 1.0,
    "gelu": 1.129,
    "identity": 1.0,
    "leaky_relu": 1.0,
    "relu": 1.0,
    "sigmoid": 0.25,
    "silu": 1.1,
    "softplus": 1.0,
    "tanh": 1.0,
}
"""Lipschitz constants of activations, rounded up; gelu's holds for its tanh form as well."""


@shows()
class Certificate(NamedTuple):
    """An upper bound of a network's Lipschitz constant. n layers, in the chain's order."""

    upper: jax.Array  # [] certified up to rounding that it is inflated for
    layers: jax.Array  # [n] certified bounds of the layers' norms
    activations: jax.Array  # [n - 1] constants of the activations between them


def lipschitz_certificate(
    params: Any,
    *,
    layers: Rule | None = None,
    activations: str | Sequence[float] = "relu",
    power_steps: int = 50,
) -> Certificate:
    r"""Upper bound $\prod_l \|W_l\|_2 \prod_l L(\phi_l)$ for $W_n \phi_{n-1} \cdots \phi_1 W_1$.

    Biases do not count. Each norm is certified by `spectral_bound` (Szegedy et al., *Intriguing
    properties of neural networks*, ICLR 2014, section 4.3, for the product). An activation after
    the last layer multiplies `upper` by its own constant; softmax, normalization and attention
    between positions are not covered.

    Args:
      params: pytree of the network's parameters.
      layers: rule (path, leaf) -> `Layer` or None, as in `kappa_budget`; None takes
        `matrix_layers`: matrices, and convolutions whose layout the leaf's name tells, but nothing
        that is named as a bias or a scale.
      activations: a name of `ACTIVATIONS`, used between all layers, or one Lipschitz constant per
        gap, [n - 1].
      power_steps: of the power iteration behind each certificate, static.

    Returns:
      A `Certificate`; 1 for a network without layers. `upper` is never below the product: infinite
      where that exceeds the largest number, at least the smallest normal one where it is not 0, and
      NaN or infinite where a matrix has an entry that is not finite.

    Raises:
      ValueError: an unknown name, a constant that is not positive, a wrong number of them, a leaf
        with more than two axes whose layout is not known, or one of integers without a rule.
      TypeError: activations that are neither a name nor several numbers.

    >>> weights = [jnp.diag(jnp.array([2.0, 1.0])), jnp.diag(jnp.array([1.0, 3.0]))]
    >>> bool(6.0 <= lipschitz_certificate(weights).upper <= 6.1)
    True
    """
    leaves, found = jax.tree.leaves(params), find_layers(params, layers)
    constants = _constants(activations, max(len(found) - 1, 0))
    if not found:
        return Certificate(jnp.ones(()), jnp.zeros(0), jnp.zeros(0))
    matrices = [layer.matrix(whole(leaves[k])) for k, layer in found]
    gains = [layer.gain for _, layer in found]
    return _certified(matrices, gains, constants, power_steps=power_steps)


@at_once("power_steps")
def _certified(
    matrices: list[jax.Array], gains: list[Any], constants: list[Any], *, power_steps: int
) -> Certificate:
    norms = [spectral_bound(matrix, power_steps=power_steps).upper for matrix in matrices]
    bounds = _upward(
        jnp.stack([gain * n for gain, n in zip(gains, norms, strict=True)]), jnp.stack(norms)
    )
    between = _upward(jnp.asarray(constants, bounds.dtype), jnp.ones(()))
    return Certificate(_product(jnp.concatenate([bounds, between])), bounds, between)


def _upward(x: jax.Array, of: jax.Array) -> jax.Array:
    """x, at least the smallest normal number where what it comes `of` is not 0."""
    return jnp.where(of == 0, 0, jnp.maximum(x, jnp.finfo(x.dtype).tiny))


def _product(factors: jax.Array) -> jax.Array:
    """An upper bound of the product of numbers of at least 0, which alone may leave the range.

    Mantissas and exponents apart: the plain product depends on the order, 0 or infinite half way.
    """

    def times(carry: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[Any, None]:
        mantissa, shift = jnp.frexp(carry[0] * jnp.frexp(factor)[0])
        return (mantissa, carry[1] + shift + jnp.frexp(factor)[1]), None

    one = (jnp.ones_like(factors[0]), jnp.zeros((), jnp.int32))
    (mantissa, exponent), _ = jax.lax.scan(times, one, factors)
    # rounded once for each factor, and once when it was computed
    rounding = 1 + 2 * float(jnp.finfo(factors.dtype).eps) * (factors.size + 1)
    return _upward(jnp.ldexp(mantissa * rounding, exponent), mantissa)


def _constants(activations: str | Sequence[float], gaps: int) -> list[Any]:
    """One Lipschitz constant for each gap between layers."""
    if isinstance(activations, str):
        if activations not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"activations = {activations!r} is unknown: choose from {names}")
        return [ACTIVATIONS[activations]] * gaps
    expected = f"a name, or one constant for each of {gaps} gaps between the layers"
    if not isinstance(activations, Iterable) or getattr(activations, "ndim", 1) == 0:
        raise TypeError(f"activations must be {expected}, got {activations!r}")
    constants: list[Any] = list(activations)
    if len(constants) != gaps:
        raise ValueError(
            f"activations has {len(constants)} constants, but {gaps} lie between the layers"
        )
    for index, constant in enumerate(constants):
        if isinstance(constant, str):
            raise TypeError(f"activations[{index}] = {constant!r}: activations must be {expected}")
        check_positive(f"activations[{index}]", constant)
    return constants


@shows()
class LowerBound(NamedTuple):
    """A gain that a network attains, so that its Lipschitz constant is at least this."""

    lower: jax.Array  # [] best of all starts and steps
    x: jax.Array  # [d] input where it is attained
    direction: jax.Array  # [d] unit vector that is stretched by it


def lipschitz_lower_bound(
    fn: Callable[[jax.Array], jax.Array],
    x0: jax.Array,
    *,
    steps: int = 100,
    step_size: ArrayLike = 0.1,
) -> LowerBound:
    r"""Gradient ascent over inputs x and directions v on the gain $\|J(x) v\| / \|v\|$.

    Ascent moves x along the normalized gradient, with steps that shrink linearly to zero, and v by
    the power iteration $v \leftarrow J^\top J v$. Every gain met is one that the network attains
    where it is differentiable, so the largest is a lower bound, up to rounding; the network's own
    products are taken in all bits of float32, whatever `jax_default_matmul_precision` is. Piecewise
    linear networks have no slope in x to follow: there the spread of the starts searches, and steps
    of random direction stand in for the gradient.

    Args:
      fn: network of one input, [d] -> [k].
      x0: starts, float [starts, d]; all are searched at once.
      steps: static, at least 1.
      step_size: length of the first steps in x, in units of 1 + ||x0||.

    Returns:
      A `LowerBound`.

    Raises:
      ValueError: `x0` is not [starts, d], steps < 1, or a step size that is not positive.

    >>> bound = lipschitz_lower_bound(lambda x: jnp.tanh(3 * x), jnp.array([[0.7]]))
    >>> bool(2.9 < bound.lower <= 3.0)
    True
    """
    starts = jnp.asarray(x0)
    if starts.ndim != 2 or 0 in starts.shape:
        raise ValueError(f"x0 must be [starts, d], got shape {starts.shape}")
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    check_positive("step_size", step_size)
    dtype = jnp.promote_types(starts.dtype, jnp.float32)

    def network(x: jax.Array) -> jax.Array:
        # a gain of rounded weights may exceed every gain of the weights themselves
        with jax.default_matmul_precision("highest"):
            return fn(x)

    def log_gain(x: jax.Array, v: jax.Array) -> jax.Array:
        stretched, unit = in_unit(jax.jvp(network, (x,), (v,))[1])
        square = jnp.sum(stretched**2)
        # what stretches nothing proves nothing: its logarithm must not be that of a small number
        known = jnp.log(unit) + jnp.log(jnp.where(square > 0, square, 1)) / 2
        return jnp.where(square > 0, known, -jnp.inf)

    def search(x: jax.Array, key: jax.Array) -> LowerBound:
        reach = step_size * (1 + frobenius(x))
        key, first = jax.random.split(key)
        v = _unit(jax.random.normal(first, x.shape, dtype))

        def climb(carry: tuple[Any, ...], k: jax.Array) -> tuple[tuple[Any, ...], None]:
            x, v, best = carry
            outward, pull = jax.vjp(network, x)
            del outward
            (turned,) = pull(_unit(jax.jvp(network, (x,), (v,))[1]))
            v = jnp.where(frobenius(turned) > 0, _unit(turned), v)
            gain, slope = jax.value_and_grad(log_gain)(x, v)
            better = jnp.isfinite(gain) & (gain > best[0])
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (gain, x, v), best)
            noise = jax.random.normal(jax.random.fold_in(key, k), x.shape, dtype)
            flat = ~(frobenius(slope) > 0)
            heading = _unit(jnp.where(flat, noise, slope))
            return (x + reach * (1 - k / steps) * heading, v, best), None

        nothing = (jnp.full((), -jnp.inf, dtype), x, v)
        (_, _, best), _ = jax.lax.scan(climb, (x, v, nothing), jnp.arange(steps))
        return LowerBound(jnp.exp(best[0]), best[1], best[2])

    keys = jax.random.split(jax.random.key(0), starts.shape[0])
    found = jax.vmap(search)(starts.astype(dtype), keys)
    winner = jnp.argmax(found.lower)
    return LowerBound(found.lower[winner], found.x[winner], found.direction[winner])


def _unit(v: jax.Array) -> jax.Array:
    inside, _ = in_unit(v)
    length = jnp.sqrt(jnp.sum(inside**2))
    return inside / jnp.where(length > 0, length, 1)
