"""M-ConFIG: the conflict-free direction of momenta, one loss's gradient a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bench.training import aggregate
from bench.training.peers import combine, gram


class MomentumState(NamedTuple):
    turns: jax.Array  # [K], gradients of each loss so far
    count: jax.Array  # steps since every loss has had one
    momenta: Any  # a leading axis K on each leaf
    pseudo: Any  # momentum of the direction
    second: Any  # second moment of the pseudo-gradient


def scale_by_momentum_config(
    terms: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of M-ConFIG, for a rate to follow.

    The gradient of loss k moves $m_k = \beta_1 m_k + (1 - \beta_1) g_k$;
    $d = \mathrm{ConFIG}(\hat m_1, \dots, \hat m_K)$ of the bias-corrected momenta is read as the
    bias-corrected momentum of Adam, so that the pseudo-gradient
    $\tilde g = (d (1 - \beta_1^t) - \beta_1 \tilde m) / (1 - \beta_1)$ gives the second moment, and
    the step is $d / (\sqrt{\hat s} + \epsilon)$ (Liu, Chu and Thuerey, *ConFIG*, ICLR 2025, arXiv
    2408.11104, algorithm 1, with their code's zeros until every loss has been seen).

    `update` is given the gradient of loss `turn`.
    """

    def init(params: Any) -> MomentumState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        many = jax.tree.map(lambda p: jnp.zeros((terms, *p.shape), p.dtype), params)
        return MomentumState(jnp.zeros(terms, jnp.int32), jnp.int32(0), many, zeros, zeros)

    def update(
        gradient: Any, state: MomentumState, params: Any = None, *, turn: jax.Array, **extra: Any
    ) -> tuple[Any, MomentumState]:
        del params, extra
        turns = state.turns.at[turn].add(1)
        momenta = jax.tree.map(
            lambda m, g: m.at[turn].set(b1 * m[turn] + (1 - b1) * g), state.momenta, gradient
        )
        ready = jnp.all(turns > 0)
        count = state.count + ready
        seen = 1 - b1 ** jnp.maximum(turns, 1).astype(jnp.result_type(float))
        unbiased = jax.tree.map(lambda m: m / _like(seen, m), momenta)
        direction = combine(aggregate.config(gram(unbiased)), unbiased)
        steps = jnp.maximum(count, 1).astype(seen.dtype)
        pseudo = jax.tree.map(lambda d: d * (1 - b1**steps), direction)
        second = jax.tree.map(
            lambda s, new, old: b2 * s + (1 - b2) * ((new - b1 * old) / (1 - b1)) ** 2,
            state.second,
            pseudo,
            state.pseudo,
        )
        updates = jax.tree.map(
            lambda d, s: jnp.where(ready, d / (jnp.sqrt(s / (1 - b2**steps)) + eps), 0),
            direction,
            second,
        )
        kept = jax.tree.map(
            lambda new, old: jnp.where(ready, new, old),
            (pseudo, second),
            (state.pseudo, state.second),
        )
        return updates, MomentumState(turns, count, momenta, *kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _like(x: jax.Array, leaf: jax.Array) -> jax.Array:
    """x [K] with as many axes as the leaf, in its dtype."""
    return x.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)
