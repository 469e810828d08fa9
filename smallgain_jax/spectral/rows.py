r"""Certified bounds on the largest Hessian eigenvalue, row by row.

For a symmetric matrix $H$ and any positive vector $s$,

$$ R_r(s) = \frac{1}{s_r} \sum_q |H_{rq}|\, s_q, \qquad
   \lambda_{\max}(H) \le \rho(|H|) \le \max_r R_r(s), \qquad
   \operatorname{diag}(R(s)) - H \succeq 0 . $$

With $s = 1$ the rows are Gershgorin's (1931); the scaled version is Varga's (*Gershgorin and His
Circles*, 2004, section 1.2). Under $s \leftarrow |H| s$ the bound $\max_r R_r(s)$ never rises
and, where $|H|$ is primitive, tends to the Perron root $\rho(|H|)$ (Collatz 1942, Wielandt 1950).
Where it is not (a star, any bipartite coupling without a diagonal) iterates may take turns for
ever; so the code iterates with $|H| + \sigma I$, which has the same vector and is primitive.

This module knows no energy: it works on Hessian blocks, or on any scalar function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from smallgain_jax._checks import check_positive
from smallgain_jax._show import shows
from smallgain_jax._tree import HIGHEST


class Activity(Protocol):
    """How far a hinge counts as active, in [0, 1], for its gap (active where gap > 0)."""

    def __call__(self, gap: jax.Array) -> jax.Array: ...


class AlwaysActive(eqx.Module):
    """Every hinge is priced as active: the choice under which bounds are guarantees.

    >>> AlwaysActive()(jnp.array([-1.0, 1.0])).tolist()
    [1.0, 1.0]
    """

    def __call__(self, gap: jax.Array) -> jax.Array:
        return jnp.ones_like(gap)


class Sigmoid(eqx.Module):
    r"""Smoothed activity $\sigma(\mathrm{gap}/\varepsilon)$ (design note, section 3).

    Args:
      eps: width of the transition, in units of the gap, positive scalar.

    >>> Sigmoid(1e-3)(jnp.array([-1.0, 0.0, 1.0])).tolist()
    [0.0, 0.5, 1.0]
    """

    eps: ArrayLike = 1e-3

    def __check_init__(self) -> None:
        check_positive("eps", self.eps)

    def __call__(self, gap: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(gap / self.eps)


class Ramp(eqx.Module):
    """Linear activity, 0 at gap = -eps and 1 from gap = 0 on: the recorded original's.

    Args:
      eps: width of the ramp, in units of the gap, positive scalar.

    >>> Ramp(1e-3)(jnp.array([-1.0, -0.0005, 0.0, 1.0])).tolist()
    [0.0, 0.5, 1.0, 1.0]
    """

    eps: ArrayLike = 1e-3

    def __check_init__(self) -> None:
        check_positive("eps", self.eps)

    def __call__(self, gap: jax.Array) -> jax.Array:
        return jnp.clip(1 + gap / self.eps, 0, 1)


@shows(bars="row_sums")
class Curvature(NamedTuple):
    """Row bounds of a Hessian and what each term pays into them.

    n nodes, E terms; for vector nodes of dimension d every `[n]` is `[n, d]` and `[E, 2]` is
    `[E, 2, d]`. Units: energy per squared unit of x.
    """

    row_sums: jax.Array  # [n]     R_r(w) = local_rows + sum_k w_k edge_cost[k, r]
    local_rows: jax.Array  # [n]   the local energies' share B_r
    edge_cost: jax.Array  # [E, 2] cost of a term on its rows i and j, per unit of weight
    lipschitz: jax.Array  # []     max_r R_r(w), an upper bound on lambda_max(H)
    scaling: jax.Array  # [n]      the vector s of the bound; ones for plain Gershgorin rows


def scatter_pairs(pairs: jax.Array, i: jax.Array, j: jax.Array, num_nodes: int) -> jax.Array:
    """Sum `pairs` [E, 2, ...] onto nodes: `[num_nodes, ...]`, column 0 at i, column 1 at j."""
    out = jnp.zeros((num_nodes, *pairs.shape[2:]), pairs.dtype)
    return out.at[i].add(pairs[:, 0]).at[j].add(pairs[:, 1])


def _pair_costs(blocks: jax.Array, scaling: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """`|block| s / s` on both ends of each edge: [E, 2, ...] from non-negative blocks."""
    ends = jnp.stack([scaling[i], scaling[j]], axis=1)
    if blocks.ndim == 3:
        return jnp.einsum("erq,eq->er", blocks, ends, precision=HIGHEST) / ends
    return jnp.einsum("ercqd,eqd->erc", blocks, ends, precision=HIGHEST) / ends


SHIFT = 0.1
"""sigma in units of the present bound."""


def block_curvature(
    local_rows: jax.Array,
    blocks: jax.Array,
    weights: jax.Array,
    i: jax.Array,
    j: jax.Array,
    *,
    scaling_iterations: int = 0,
    scaling: jax.Array | None = None,
) -> Curvature:
    r"""Row bounds of $H = \operatorname{diag}(B) + \sum_k w_k H_k$ from the blocks of its terms.

    Each scaling iteration is $s \leftarrow (|H| + \sigma I) s$ with a tenth of the present bound
    for $\sigma$; the bound of every iterate holds, and of those tried the tightest is returned.
    (In exact arithmetic that is the last; entries of $s$ are kept above 1e-9 of the largest, so
    that nearly disconnected parts do not underflow.)

    Args:
      local_rows: B [n] or [n, d], non-negative.
      blocks: Hessian block of each term at unit weight, [E, 2, 2] or [E, 2, d, 2, d].
      weights: w [E], non-negative.
      i, j: ends of each edge, int [E].
      scaling_iterations: number of power iterations, a static int.
      scaling: s to start from, positive, shaped like `local_rows`; ones by default.

    Returns:
      The `Curvature` under the best scaling found.
    """
    num_nodes = local_rows.shape[0]
    absolute = jnp.abs(blocks)
    per_edge = (slice(None), *(None,) * local_rows.ndim)

    def rows(s: jax.Array) -> tuple[jax.Array, jax.Array]:
        cost = _pair_costs(absolute, s, i, j)
        return cost, local_rows + scatter_pairs(weights[per_edge] * cost, i, j, num_nodes)

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        s, row_sums, best_s, best = carry
        s = s * (row_sums + SHIFT * jnp.max(row_sums, initial=0.0))
        top = jnp.max(s, initial=0.0)
        s = jnp.where(top > 0, jnp.maximum(s / jnp.where(top > 0, top, 1), 1e-9), 1)
        row_sums = rows(s)[1]
        bound = jnp.max(row_sums, initial=0.0)
        better = bound < best
        return (s, row_sums, jnp.where(better, s, best_s), jnp.minimum(bound, best)), None

    s = jnp.ones_like(local_rows) if scaling is None else scaling
    cost, row_sums = rows(s)
    if scaling_iterations:
        start = (s, row_sums, s, jnp.max(row_sums, initial=0.0))
        (_, _, s, _), _ = jax.lax.scan(iterate, start, length=scaling_iterations)
        cost, row_sums = rows(s)
    return Curvature(row_sums, local_rows, cost, jnp.max(row_sums, initial=0.0), s)


DENSE_LIMIT = 2048


def hessian_row_sums(fn: Callable[..., jax.Array], x: Any, *args: Any, sparsity: Any = None) -> Any:
    r"""Gershgorin rows $R_r = \sum_s |\partial^2 f / \partial x_r \partial x_s|$ of any function.

    Without `sparsity` the Hessian is formed by `jax.hessian`, for at most 2048 unknowns. With it,
    columns that share no row are compressed into one Hessian-vector product each (Curtis, Powell
    and Reid 1974), by the library asdex: the cost is one product per colour, not per unknown.

    Args:
      fn: scalar function `fn(x, *args)`, twice differentiable.
      x: pytree of floating arrays, n unknowns in all.
      *args: passed on to `fn`.
      sparsity: pattern of the Hessian over the raveled unknowns: a SciPy sparse matrix [n, n]
        whose stored entries are the possible non-zeros. Needs the extra `smallgain_jax[sparse]`.

    Returns:
      A pytree like `x` of row sums, in units of f per squared unit of x.

    Raises:
      ValueError: more than 2048 unknowns and no `sparsity`, or a pattern of the wrong shape.

    >>> hessian_row_sums(lambda x: (x[0] - x[1]) ** 2 + x[1] ** 3, jnp.array([1.0, 2.0])).tolist()
    [4.0, 16.0]
    """
    flat, unravel = ravel_pytree(x)

    def flat_fn(z: jax.Array) -> jax.Array:
        return fn(unravel(z), *args)

    if sparsity is None:
        if flat.size > DENSE_LIMIT:
            raise ValueError(
                f"x has {flat.size} unknowns, too many for a dense Hessian "
                f"(at most {DENSE_LIMIT}): give sparsity, the pattern of the Hessian"
            )
        hessian = jax.hessian(flat_fn)(flat) if flat.size else jnp.zeros((0, 0), flat.dtype)
        return unravel(jnp.sum(jnp.abs(hessian), axis=1))
    return unravel(_compressed_row_sums(flat_fn, flat, sparsity))


def _compressed_row_sums(fn: Callable[..., jax.Array], x: jax.Array, sparsity: Any) -> jax.Array:
    try:
        import asdex
    except ImportError as error:
        raise ImportError(
            "sparsity needs the library asdex: pip install 'smallgain_jax[sparse]'"
        ) from error
    if sparsity.shape != (x.size, x.size):
        raise ValueError(f"sparsity has shape {sparsity.shape}, expected {(x.size, x.size)}")
    stored = sparsity.tocoo()
    pattern = asdex.SparsityPattern.from_coo(stored.row, stored.col, sparsity.shape)
    coloring = asdex.hessian_coloring_from_sparsity(pattern, mode="fwd_over_rev")
    hessian = asdex.hessian_from_coloring(fn, coloring)(x)
    return jnp.zeros_like(x).at[hessian.indices[:, 0]].add(jnp.abs(hessian.data))


__all__ = [
    "Activity",
    "AlwaysActive",
    "Curvature",
    "Ramp",
    "Sigmoid",
    "block_curvature",
    "hessian_row_sums",
    "scatter_pairs",
]
