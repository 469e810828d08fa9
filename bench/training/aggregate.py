"""Gradient surgery by published rules, as weights of the terms.

Each rule's direction lies in the span of the terms' gradients $g_k$, so each rule is a function of
their inner products $G_{kl} = \\langle g_k, g_l \\rangle$ alone: it returns $w$ [K], and the
direction is $\\sum_k w_k g_k$. Scales are those of the papers, and of TorchJD: PCGrad and ConFIG
are sums over the terms, MGDA is a convex combination, and CAGrad starts from the mean.
"""

import itertools

import jax
import jax.numpy as jnp

BISECTIONS = 40


def mgda(gram: jax.Array) -> jax.Array:
    r"""Weights [K] of the shortest vector in the convex hull of the gradients.

    $\min_w \|\sum_k w_k g_k\|^2$ over the simplex (Sener and Koltun, *Multi-task learning as
    multi-objective optimization*, NeurIPS 2018, equation 3). Exact: the minimum over each face of
    the simplex solves a linear system, and there are $2^K - 1$ faces.

    >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> direction = mgda(jacobian @ jacobian.T) @ jacobian
    >>> jnp.allclose(direction, jnp.array([0, 1, 1]), atol=1e-6).item()
    True
    """
    constant, _ = _face_minima(gram, jnp.zeros_like(gram[0]))
    return _best_point(gram, jnp.zeros_like(gram[0]), constant)


def cagrad(gram: jax.Array, c: float = 0.5) -> jax.Array:
    r"""Weights [K] of conflict-averse gradient descent.

    $d = g_0 + c \|g_0\| g_w / \|g_w\|$, $g_0$ the mean gradient, and $w$ in the simplex minimizing
    $\langle g_w, g_0 \rangle + c \|g_0\| \|g_w\|$ (Liu et al., *Conflict-averse gradient descent*,
    NeurIPS 2021, algorithm 1). With $\|g_w\| = \min_t (\|g_w\|^2 / t + t) / 2$ the inner
    problem is quadratic, and t is found by bisection.

    >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> direction = cagrad(jacobian @ jacobian.T) @ jacobian
    >>> [round(float(x), 4) for x in direction]
    [0.1835, 1.2041, 1.2041]
    """
    scale = _positive(jnp.max(jnp.diagonal(gram)))
    gram = gram / scale
    mean = jnp.full_like(gram[0], 1 / gram.shape[0])
    linear = gram @ mean
    radius = c * jnp.sqrt(jnp.maximum(mean @ linear, 0))
    faces = _face_minima(gram, linear)

    def point(t: jax.Array) -> jax.Array:
        slope = t / _positive(radius)
        return _best_point(gram, slope * linear, faces[0] + slope * faces[1])

    def halve(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        w = point(middle)
        longer = w @ gram @ w > middle**2
        return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

    start = (jnp.zeros_like(scale), jnp.ones_like(scale))
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, start)
    w = point((low + high) / 2)
    return mean + radius * w / _positive(jnp.sqrt(jnp.maximum(w @ gram @ w, 0)))


def config(gram: jax.Array) -> jax.Array:
    r"""Weights [K] of the conflict-free direction.

    $u$ is the unit vector that makes the same cosine with every gradient,
    $u \propto \hat{J}^+ 1$ with $\hat{J}$ the matrix of unit gradients, and
    $d = (\sum_k \langle g_k, u \rangle) u$ (Liu, Chu and Thuerey, *ConFIG*, ICLR 2025, arXiv
    2408.11104, section 3).

    >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> direction = config(jacobian @ jacobian.T) @ jacobian
    >>> [round(float(x), 4) for x in direction]
    [0.1588, 2.0706, 2.0706]
    """
    norms = _positive(jnp.sqrt(jnp.diagonal(gram)))
    cosines = gram / jnp.outer(norms, norms)
    w = jnp.linalg.pinv(cosines, hermitian=True) @ jnp.ones_like(norms) / norms
    projected = gram @ w
    return jnp.sum(projected) / _positive(w @ projected) * w


def upgrad(gram: jax.Array) -> jax.Array:
    r"""Weights [K] of the mean of the gradients, each projected so that no loss rises.

    The projection of $g_k$ onto $\{d : \langle g_l, d \rangle \ge 0\}$ is $\sum_l v_l g_l$ with
    the least $v^\top G v$ over $v \ge e_k$ (Quinton and Rey, *Jacobian descent for multi-objective
    optimization*, arXiv 2406.16232, proposition 1). Exact: the minimum with each set of entries at
    their bounds solves a linear system, and there are $2^K$ sets.

    >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> direction = upgrad(jacobian @ jacobian.T) @ jacobian
    >>> [round(float(x), 4) for x in direction]
    [0.2924, 1.9006, 1.9006]

    (TorchJD has 0.2929 and 1.9004: it adds 1e-4 to the diagonal of the normalized matrix.)
    """
    terms = gram.shape[0]
    gram = gram / _positive(jnp.max(jnp.diagonal(gram)))
    free = jnp.array(list(itertools.product((False, True), repeat=terms)))
    both = free[:, :, None] & free[:, None, :]
    block = jnp.where(both, gram[None], jnp.eye(terms)[None])

    def projected(bound: jax.Array) -> jax.Array:
        held = jnp.where(free, 0, bound[None])
        right = jnp.where(free, -held @ gram, held)
        points = jnp.linalg.solve(block, right[:, :, None])[:, :, 0]
        eps = jnp.finfo(gram.dtype).eps
        # of dependent gradients some systems are singular; a smaller set holds the same minimum
        inside = jnp.all(jnp.isfinite(points) & (points >= bound[None] - 8 * eps), axis=1)
        points = jnp.where(inside[:, None], points, bound[None])
        energy = jnp.sum((points @ gram) * points, axis=1)
        return points[jnp.argmin(jnp.where(inside, energy, jnp.inf))]

    return jax.vmap(projected)(jnp.eye(terms, dtype=gram.dtype)).mean(axis=0)


def pcgrad(gram: jax.Array, key: jax.Array) -> jax.Array:
    r"""Weights [K] of projected conflicting gradients, summed.

    Each gradient in turn loses its component along every other that it conflicts with, taken in a
    random order; the results are added (Yu et al., *Gradient surgery for multi-task learning*,
    NeurIPS 2020, algorithm 1).

    >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> direction = pcgrad(jacobian @ jacobian.T, jax.random.key(0)) @ jacobian
    >>> [round(float(x), 4) for x in direction]
    [0.5848, 3.8012, 3.8012]
    """
    terms = gram.shape[0]

    def project(own: jax.Array, key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, terms)
        w = jnp.where(jnp.arange(terms) == own, 1, 0).astype(gram.dtype)
        for place in range(terms):
            other = order[place]
            inner = gram[other] @ w
            loss = jnp.where((other != own) & (inner < 0), inner / _positive(gram[other, other]), 0)
            w = w - jnp.where(jnp.arange(terms) == other, loss, 0)
        return w

    return jax.vmap(project)(jnp.arange(terms), jax.random.split(key, terms)).sum(axis=0)


def _face_minima(gram: jax.Array, linear: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stationary points of w'Gw/2 + s w'l on each face, affine in s: parts [F, K], [F, K]."""
    terms = gram.shape[0]
    subsets = [
        [k in face for k in range(terms)]
        for size in range(1, terms + 1)
        for face in itertools.combinations(range(terms), size)
    ]
    inside = jnp.array(subsets)
    # equal entries on the diagonal and the border keep the system as well scaled as the matrix is
    scale = _positive(jnp.max(jnp.diagonal(gram)))
    both = inside[:, :, None] & inside[:, None, :]
    block = jnp.where(both, gram / scale, jnp.where(inside[:, :, None], 0, jnp.eye(terms)))
    border = inside.astype(gram.dtype)
    corner = jnp.zeros((len(subsets), 1, 1), gram.dtype)
    system = jnp.concatenate(
        [
            jnp.concatenate([block, border[:, :, None]], axis=2),
            jnp.concatenate([border[:, None, :], corner], axis=2),
        ],
        axis=1,
    )
    zeros, ones = jnp.zeros_like(border), jnp.ones_like(corner[:, 0])
    constant = jnp.concatenate([zeros, ones], axis=1)
    slope = jnp.concatenate([-border * (linear / scale)[None, :], 0 * ones], axis=1)
    solved = jnp.linalg.solve(system, jnp.stack([constant, slope], axis=2))
    return solved[:, :terms, 0], solved[:, :terms, 1]


def _best_point(gram: jax.Array, linear: jax.Array, candidates: jax.Array) -> jax.Array:
    """The candidate inside the simplex with the least w'Gw/2 + w'l; vertices always are inside."""
    eps = jnp.finfo(gram.dtype).eps
    # a face of dependent gradients has a singular system; a smaller face holds the same minimum
    inside = jnp.all(jnp.isfinite(candidates) & (candidates >= -8 * eps), axis=1)
    points = jnp.where(inside[:, None], jnp.maximum(candidates, 0), 1)
    points = points / points.sum(axis=1, keepdims=True)
    energy = 0.5 * jnp.sum((points @ gram) * points, axis=1) + points @ linear
    return points[jnp.argmin(jnp.where(inside, energy, jnp.inf))]


def _positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
