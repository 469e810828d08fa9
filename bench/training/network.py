"""A tanh network with Glorot weights, and its derivatives in the inputs by forward mode."""

import jax
import jax.numpy as jnp

Params = list[tuple[jax.Array, jax.Array]]


def glorot(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Normal weights [in, out] of variance 2 / (in + out) (Glorot and Bengio 2010), zero biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / (m + n)), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def tanh_network(params: Params, x: jax.Array) -> jax.Array:
    """Outputs [..., out] at inputs [..., in]; the last layer is linear."""
    for layer, (weight, bias) in enumerate(params):
        x = jnp.dot(x, weight) + jnp.reshape(bias, (1,) * (x.ndim - 1) + bias.shape)
        x = jnp.tanh(x) if layer + 1 < len(params) else x
    return x


def derivatives(params: Params, x: jax.Array, second: tuple[float, ...]) -> jax.Array:
    r"""Values, first derivatives, and a weighted sum of second ones, of a network.

    Forward mode over forward mode, written out: the value, the derivative along each input, and
    $\sum_k c_k \partial^2 / \partial x_k^2$ go through the layers side by side (Li et al., *A
    computational framework for neural network-based variational Monte Carlo with forward
    Laplacian*, Nature Machine Intelligence 2024).

    Args:
      params: of a network with m outputs.
      x: inputs [N, d].
      second: the factors c [d] of the second derivatives.

    Returns:
      [2 + d, N, m]: the values, d first derivatives, the sum of second derivatives.
    """
    (weight, bias), *rest = params
    # the first layer is affine in x: its derivatives are its rows, and its second ones are 0
    value, second_sum = jnp.dot(x, weight) + bias[None, :], None
    firsts = [jnp.broadcast_to(row[None, :], value.shape) for row in weight]
    for weight, bias in rest:
        t = jnp.tanh(value)
        slope = 1 - t * t
        bent = -2 * t * sum(c * f * f for c, f in zip(second, firsts, strict=True) if c)
        bent = slope * (bent if second_sum is None else bent + second_sum)
        value = t @ weight + bias[None, :]
        firsts = [(slope * first) @ weight for first in firsts]
        second_sum = bent @ weight
    if second_sum is None:
        second_sum = jnp.zeros_like(value)
    return jnp.stack([value, *firsts, second_sum])
