"""Rivals for training with several losses, from their papers.

Each weighs the terms: at a step it sees the losses [K] and their gradients, and answers with $w$
[K]; the base optimizer is given $\\sum_k w_k g_k$. All are jittable and map over seeds; a rule that
works only at every n-th step tests the step number, which all seeds share: `vmap` keeps the branch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bench.training import aggregate


class Sight(NamedTuple):
    """What a rival sees at a step."""

    values: jax.Array  # [K]
    grads: Any  # a leading axis K on each leaf
    step: jax.Array  # int32, 0 at the first
    key: jax.Array  # a fresh one at each step
    traces: Callable[[], jax.Array]  # [K], traces of the terms' tangent kernels over their points


class Peer(NamedTuple):
    """`init(K)` is the state, `weigh(sight, state)` the weights [K] and the next state."""

    init: Callable[[int], Any]
    weigh: Callable[[Sight, Any], tuple[jax.Array, Any]]


def combine(weights: jax.Array, grads: Any) -> Any:
    """The tree sum_k w_k g_k, in each leaf's own dtype."""
    return jax.tree.map(lambda g: jnp.tensordot(weights.astype(g.dtype), g, 1), grads)


def gram(grads: Any) -> jax.Array:
    """Inner products [K, K] of the terms' gradients."""
    rows = [g.reshape(g.shape[0], -1) for g in jax.tree.leaves(grads)]
    return sum(r @ r.T for r in rows)


def fixed() -> Peer:
    """The objective as the user wrote it: every weight is 1."""
    return Peer(lambda terms: (), lambda sight, state: (jnp.ones_like(sight.values), state))


def gradient_norms(every: int = 1, decay: float = 0.9) -> Peer:
    r"""Mean gradient norm over the term's own, averaged over steps.

    $\hat w_k = \bar n / n_k$ with $n_k = \|g_k\|$ (Wang et al., *An expert's guide to training
    physics-informed neural networks*, arXiv 2308.08468, algorithm 1, with the factor 1/K and the
    floor 1e-5 of their code, jaxpi), in the manner of GradNorm (Chen et al. 2018) with alpha = 0.
    `every` steps lie between two measurements; jaxpi takes hundreds.
    """

    def weigh(sight: Sight, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        norms = jnp.sqrt(jnp.diagonal(gram(sight.grads)))
        moved = _averaged(weights, _inverse_share(norms), decay)
        return 2 * (jnp.where(sight.step % every == 0, moved, weights),)

    return Peer(jnp.ones, weigh)


def annealing(decay: float = 0.9) -> Peer:
    r"""Learning-rate annealing.

    $\hat w_k = \max |g_0| / \operatorname{mean} |w_k g_k|$, averaged over steps; the first term,
    which is the residual in the physics-informed problems, keeps weight 1 (Wang, Teng and
    Perdikaris, *Understanding and mitigating gradient pathologies*, SISC 2021, algorithm 1). The
    mean is that of the weighted gradient, as in the authors' code: without $w_k$ in it the weights
    run away (5e6 at the end of Helmholtz), since a term that has been fitted has a small gradient.
    """

    def weigh(sight: Sight, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaves = [jnp.abs(g).reshape(g.shape[0], -1) for g in jax.tree.leaves(sight.grads)]
        largest = jnp.max(jnp.stack([leaf[0].max() for leaf in leaves]))
        means = sum(leaf.sum(axis=1) for leaf in leaves) / sum(leaf.shape[1] for leaf in leaves)
        target = jnp.where(jnp.arange(means.size) == 0, 1, largest / _positive(weights * means))
        return 2 * (_averaged(weights, target, decay),)

    return Peer(jnp.ones, weigh)


def tangent_kernel(every: int = 10, decay: float = 0.9) -> Peer:
    r"""Weights by the traces of the neural tangent kernel.

    $\hat w_k = \bar \tau / \tau_k$, $\tau_k = \operatorname{Tr}(K_{kk}) / N_k$ the mean over a
    term's points of $\|\partial r_k(x_i) / \partial \theta\|^2$, $r_k$ its residual (Wang, Yu and
    Perdikaris, *When and why PINNs fail to train*, JCP 2022, algorithm 1; the traces per
    point and the floor are those of their code, jaxpi). Measured at every `every` steps from the
    residuals' Jacobians, as `kernel_trace` defines them, and averaged over the measurements.
    """

    def weigh(sight: Sight, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        def measured(w: jax.Array) -> jax.Array:
            return _averaged(w, _inverse_share(sight.traces()), decay)

        return 2 * (jax.lax.cond(sight.step % every == 0, measured, lambda w: w, weights),)

    return Peer(jnp.ones, weigh)


class LookbackState(NamedTuple):
    weights: jax.Array  # [K]
    first: jax.Array  # [K], losses at the first step
    last: jax.Array  # [K], losses at the last step


def relative_lookback(
    decay: float = 0.999, temperature: float = 0.1, memory: float = 0.999
) -> Peer:
    r"""ReLoBRaLo, relative loss balancing with random lookback.

    $w(t) = \alpha (\rho w(t-1) + (1 - \rho) \hat w(t; 0)) + (1 - \alpha) \hat w(t; t-1)$ with
    $\hat w(t; t') = K \operatorname{softmax}(L(t) / (T L(t')))$ and $\rho$ drawn as
    Bernoulli(memory) (Bischof and Kraus, *Multi-objective loss balancing for physics-informed deep
    learning*, arXiv 2110.09813, section 3).
    """

    def init(terms: int) -> LookbackState:
        return LookbackState(jnp.ones(terms), jnp.ones(terms), jnp.ones(terms))

    def weigh(sight: Sight, state: LookbackState) -> tuple[jax.Array, LookbackState]:
        first = jnp.where(sight.step == 0, sight.values, state.first)
        last = jnp.where(sight.step == 0, sight.values, state.last)

        def balance(since: jax.Array) -> jax.Array:
            ratio = sight.values / (temperature * _positive(since))
            return since.size * jax.nn.softmax(ratio)

        keep = jax.random.bernoulli(sight.key, memory)
        history = jnp.where(keep, state.weights, balance(first))
        weights = decay * history + (1 - decay) * balance(last)
        return weights, LookbackState(weights, first, sight.values)

    return Peer(init, weigh)


def softadapt(beta: float = 0.1) -> Peer:
    r"""SoftAdapt: more weight for terms that fall more slowly.

    $w = K \operatorname{softmax}(\beta s)$, $s_k = \Delta L_k / \sum_l |\Delta L_l|$ the normalized
    change since the last step (Heydari, Thompson and Mehmood, *SoftAdapt*, arXiv 1912.12355, the
    normalized variant, beta = 0.1), scaled to a mean of 1.
    """

    def weigh(sight: Sight, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        change = jnp.where(sight.step == 0, 0, sight.values - last)
        rate = change / _positive(jnp.sum(jnp.abs(change)))
        return rate.size * jax.nn.softmax(beta * rate), sight.values

    return Peer(jnp.zeros, weigh)


def uncertainty(optimizer: optax.GradientTransformation) -> Peer:
    r"""Homoscedastic uncertainty, log variances trained along by the same optimizer.

    $\min \sum_k L_k / (2 \sigma_k^2) + \log \sigma_k$ (Kendall, Gal and Cipolla, *Multi-task
    learning using uncertainty to weigh losses*, CVPR 2018, equation 7), taken twice so that it
    starts at weight 1: with $s_k = \log \sigma_k^2$, $\sum_k e^{-s_k} L_k + s_k$, from $s = 0$.
    """

    def init(terms: int) -> tuple[jax.Array, Any]:
        return jnp.zeros(terms), optimizer.init(jnp.zeros(terms))

    def weigh(sight: Sight, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        log_variance, inner = state
        weights = jnp.exp(-log_variance)
        updates, inner = optimizer.update(1 - weights * sight.values, inner, log_variance)
        return weights, (optax.apply_updates(log_variance, updates), inner)

    return Peer(init, weigh)


class FastState(NamedTuple):
    logits: jax.Array  # [K]
    inner: Any
    last: jax.Array  # [K], losses at the last step


def fast_adaptive(rate: float = 0.025, decay: float = 1e-3) -> Peer:
    r"""FAMO: all log losses are to fall at one pace.

    $w_k = c\, z_k / L_k$, $z = \operatorname{softmax}(\xi)$, $1/c = \sum_k z_k / L_k$; the logits
    move by Adam along the fall of the log losses, $\sum_k \nabla z_k (\log L_k(t) - \log L_k(t+1))$
    (Liu, Feng, Stone and Liu, *FAMO: Fast adaptive multitask optimization*, NeurIPS 2023,
    algorithm 1, with the rate and the weight decay of their code). Their fall is measured on one
    batch, by another evaluation of the losses; here it is that from batch to batch.
    """
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(rate))

    def init(terms: int) -> FastState:
        zeros = jnp.zeros(terms)
        return FastState(zeros, optimizer.init(zeros), jnp.ones(terms))

    def weigh(sight: Sight, state: FastState) -> tuple[jax.Array, FastState]:
        losses = _positive(sight.values)
        fall = jnp.where(sight.step == 0, 0, jnp.log(state.last) - jnp.log(losses))
        slope = jax.vjp(jax.nn.softmax, state.logits)[1](fall)[0]
        updates, inner = optimizer.update(slope, state.inner, state.logits)
        logits = jnp.where(sight.step == 0, state.logits, state.logits + updates)
        share = jax.nn.softmax(logits) / losses
        return share / jnp.sum(share), FastState(logits, inner, losses)

    return Peer(init, weigh)


def dual_balancing() -> Peer:
    r"""DB-MTL: gradients of the log losses, all as long as the longest.

    $w_k = \max_l (n_l / L_l) / n_k$ with $n_k = \|g_k\|$ (Lin et al., *Dual-balancing for
    multi-task learning*, arXiv 2308.12029, section 3), without its average of gradients over steps.
    """

    def weigh(sight: Sight, state: Any) -> tuple[jax.Array, Any]:
        norms = jnp.sqrt(jnp.diagonal(gram(sight.grads)))
        longest = jnp.max(norms / _positive(sight.values))
        return longest / _positive(norms), state

    return Peer(lambda terms: (), weigh)


def surgery(rule: Callable[..., jax.Array]) -> Peer:
    """A rule of `bench.training.aggregate`, which keeps no state."""
    random = rule is aggregate.pcgrad

    def weigh(sight: Sight, state: Any) -> tuple[jax.Array, Any]:
        products = gram(sight.grads)
        return rule(products, sight.key) if random else rule(products), state

    return Peer(lambda terms: (), weigh)


def _averaged(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    return decay * old + (1 - decay) * new.astype(old.dtype)


def _inverse_share(x: jax.Array) -> jax.Array:
    mean = jnp.mean(x)
    return mean / _positive(x + 1e-5 * mean)


def _positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
