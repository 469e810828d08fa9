r"""A hierarchy of aggregates: the metric of a relaxation where rows do not suffice.

Rows price every node alone, so what a graph couples over long distances takes as many steps as the
distance. Here the couplings count too. At a state, the Hessian $H$ of the energy is majorized by

$$ M = L(c) + \operatorname{diag}(e), \qquad M - H \succeq 0, $$

with $L(c)$ the Laplacian of the attractive couplings $c_k = \max(0, -h_{ij})$ and $e \ge 0$ what
the certified rows $R$ hold beyond them, $e_r = \max(0, R_r - 2 \sum_{k \ni r} c_k)$. For springs
with convex local energies $M = H$. A cycle over levels approximates $M^{-1}$ on the free nodes:
Chebyshev smoothing in the metric of the rows, which bound the spectrum by 1; sums over aggregates
as the coarser problem (Braess 1995), visited twice, with a polynomial that makes the number of
iterations independent of the number of levels (AMLI; Axelsson and Vassilevski 1990, Notay and
Vassilevski 2008); a factored matrix at the bottom.

The cycle $B$ is linear, symmetric, and positive definite. In the inner product of $M$ it is
$I - B M = S\,(I - P q(B_c M_c) P^\ast)\,S$, with $\|S\| < 1$ the error of the smoother and
$P^\ast$ the adjoint of the sum over aggregates, so $0 < q \le 1 + \varepsilon$ on the spectrum
of $B_c M_c$ gives $0 < B M \le 1 + \varepsilon$; `VISIT` says for which spectra that holds.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import check_finite, is_concrete
from smallgain_jax._tree import matmul
from smallgain_jax.graphs.aggregation import (
    Coupled,
    Merged,
    Packed,
    aggregate,
    neighbor_rows,
    packed_rows,
    simple_graph,
)
from smallgain_jax.graphs.families import (
    DampedGateBenefit,
    EdgeFamily,
    GateBenefit,
    Quadratic,
)
from smallgain_jax.graphs.graph import EnergyGraph, _as_activity
from smallgain_jax.spectral.rows import Activity

BOTTOM = 128
"""At most as many nodes are solved by a factored matrix."""

ROUNDS = 2
"""Rounds of matching from one level to the next: 4 to 5 nodes in an aggregate."""

THIN = 1.2
"""Edges a node below which a graph is near to a chain, where pairs are merged.

Long aggregates have soft modes of their own: a third of the steps for twice the levels.
"""

DEGREE = 2
"""Degree of the polynomial that smooths, before and after each coarser level."""

SMOOTH = (0.15, 1.0)
"""Part of the spectrum of rows^{-1} M, which lies in (0, 1], that smoothing has to reduce."""

VISIT = (0.3, 1.2)
"""Part [a, b] of the spectrum of B_c M_c for which the two visits of a coarser level are combined.

Their polynomial is 1 - T_2(y(t)) / T_2(y(0)) with y(t) = (a + b - 2 t) / (b - a): positive on
(0, a + b), and at most `1 + VISIT_GROWTH` there.
"""

VISIT_GROWTH = 1 / (2 * ((VISIT[1] + VISIT[0]) / (VISIT[1] - VISIT[0])) ** 2 - 1)
"""1 / T_2(y(0)): below a + b - 1, so no level leaves the interval on which the next is positive."""

NEAR = 0.1
"""Relative change of a coupling, or of local curvature, up to which old values serve."""

UNCOUPLED = (GateBenefit, DampedGateBenefit)
"""Families whose energy depends on one end only."""


class Rows(eqx.Module):
    """Sparse rows: columns of a rectangle that most rows fit in, and a tail for the longest.

    Gathers go column by column: one gather of the whole rectangle is ten times slower on CPU.
    """

    columns: tuple[jax.Array, ...]  # W times [n] int32
    tail_row: jax.Array  # [T] int32
    tail: jax.Array  # [T] int32


class Level(eqx.Module):
    """Structure of one level of n nodes and E edges, with m aggregates and F edges between them."""

    i: jax.Array  # [E] int32
    j: jax.Array  # [E] int32
    neighbor: Rows  # the node at the other end of each edge of a row
    through: Rows  # that edge; E in the padding
    members: Rows  # nodes of each aggregate; n in the padding; empty at the bottom
    node: jax.Array | None  # [n] int32 aggregate; m for nodes without a neighbour
    edge: jax.Array | None  # [E] int32 edge between aggregates; F for those inside one
    num_nodes: int = eqx.field(static=True)
    num_aggregates: int = eqx.field(static=True)
    num_coarse_edges: int = eqx.field(static=True)


class Operator(NamedTuple):
    """M on one level, restricted to its free nodes: zero rows and columns elsewhere."""

    near: tuple[jax.Array, ...]  # W times [n], couplings
    tail: jax.Array  # [T]
    diagonal: jax.Array  # [n]
    inverse_rows: jax.Array  # [n] 1 / (diagonal + couplings); 0 on held nodes


class Values(NamedTuple):
    """M on every level of a hierarchy, and what it was made from.

    Of vector nodes [n, d] the parts of `operators` and `factor` have d as a leading axis.
    """

    operators: tuple[Operator, ...]
    factor: jax.Array  # [m, m] F with F^T F = M^{-1} at the bottom
    coupling: jax.Array  # [E] or [E, d], of each edge of the finest level
    local: jax.Array  # like x, what the rows hold beyond the couplings
    free: jax.Array  # bool like x


def _moved(values: Values, coupling: jax.Array, local: jax.Array, tolerance: float) -> jax.Array:
    """Whether one of the numbers has changed by more than the tolerance, relative to itself."""
    changed = jnp.zeros((), bool)
    for old, new in ((values.coupling, coupling), (values.local, local)):
        changed |= jnp.any(jnp.abs(new - old) > tolerance * jnp.maximum(new, old))
    return changed


class Hierarchy(eqx.Module):
    """Aggregates of a graph, from the finest level to the coarsest, as `multilevel` builds them.

    Attributes:
      term: edge of the finest level that each coupled term of the graph belongs to, int32 [K].
      levels: structure of each level.
      activity: how hinges count.
    """

    term: jax.Array
    levels: tuple[Level, ...]
    activity: Activity

    @property
    def sizes(self) -> tuple[int, ...]:
        """Nodes on each level."""
        return tuple(level.num_nodes for level in self.levels)

    def precondition(
        self, graph: EnergyGraph, x: jax.Array, rows: jax.Array, free: jax.Array
    ) -> "Cycle":
        r"""$z(g) \approx M^{-1} g$ on the free nodes, with the couplings of the graph at x.

        Args:
          graph: the energy, of the structure that the hierarchy was built for.
          x: state, [n] or [n, d].
          rows: certified rows of the Hessian at x, shaped like x: `curvature(x).row_sums` with the
            same smoothing, or more. What exceeds them counts as local curvature.
          free: nodes that may move, bool, shaped like x.

        Returns:
          A `Cycle`: call it with g [n] or [n, d].
        """
        self._check(x)
        coupling, local = self._values(graph, x, rows)
        return Cycle(self, self._built(coupling, local, free))

    def renewed(
        self,
        values: Values,
        graph: EnergyGraph,
        x: jax.Array,
        rows: jax.Array,
        free: jax.Array,
        *,
        tolerance: float = NEAR,
    ) -> "Cycle":
        """`precondition` where it has become another; `values` where all of them are still near.

        Looking costs a pass over the edges, renewing several. (Under `vmap` both are paid.)

        Args:
          values: of an earlier cycle, or `blank`.
          graph, x, rows, free: as for `precondition`.
          tolerance: relative change of a coupling, or of local curvature, up to which the old
            values serve. Free nodes must be the same.
        """
        self._check(x)
        coupling, local = self._values(graph, x, rows)
        changed = _moved(values, coupling, local, tolerance) | jnp.any(free != values.free)
        new = jax.lax.cond(changed, lambda: self._built(coupling, local, free), lambda: values)
        return Cycle(self, new)

    def model(
        self, values: Values, graph: EnergyGraph, x: jax.Array, rows: jax.Array
    ) -> tuple["HierarchyModel", Values]:
        """M at x on all nodes, and the values that its first cycle may be made from.

        Args:
          values: of an earlier cycle, or `blank`; where they are no longer near, nothing is free
            in those returned.
          graph, x, rows: as for `precondition`.
        """
        self._check(x)
        coupling, local = self._values(graph, x, rows)
        restrict = partial(_restricted, self.levels[0])
        if x.ndim == 2:
            restrict = jax.vmap(restrict, in_axes=-1)
        whole = restrict(coupling, local, jnp.ones(x.shape, bool))[0]
        usable = values.free & ~_moved(values, coupling, local, NEAR)
        return HierarchyModel(self, whole, coupling, local), values._replace(free=usable)

    def blank(self, x: jax.Array) -> Values:
        """Values for states like x [n] or [n, d] from which `renewed` makes the first."""
        self._check(x)
        lead = x.shape[1:]

        def zeros(*shape: int) -> jax.Array:
            return jnp.zeros((*lead, *shape), x.dtype)

        def operator(level: Level) -> Operator:
            n, tail = level.num_nodes, level.neighbor.tail.shape[0]
            near = tuple(zeros(n) for _ in level.neighbor.columns)
            return Operator(near, zeros(tail), zeros(n), zeros(n))

        operators = tuple(map(operator, self.levels))
        edges, bottom = self.levels[0].i.shape[0], self.levels[-1].num_nodes
        coupling = jnp.zeros((edges, *lead), x.dtype)
        nothing_free = jnp.zeros(x.shape, bool)
        return Values(
            operators, zeros(bottom, bottom), coupling, jnp.zeros(x.shape, x.dtype), nothing_free
        )

    def _check(self, x: Any) -> None:
        if x.shape[0] != self.sizes[0]:
            raise ValueError(
                f"metric: the hierarchy is of {self.sizes[0]} nodes, the graph has {x.shape[0]}"
            )

    def _values(
        self, graph: EnergyGraph, x: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Coupling of each edge, [E] or [E, d], and what rows hold beyond them, shaped like x."""
        terms, local = priced_couplings(graph, x, self.activity)
        if terms.shape[0] != self.term.size:
            raise ValueError(
                f"metric: the hierarchy is of {self.term.size} edges, "
                f"the graph has {terms.shape[0]}"
            )
        finest = self.levels[0]
        coupling = jnp.zeros((finest.i.shape[0], *x.shape[1:]), terms.dtype)
        coupling = coupling.at[self.term].add(terms, mode="promise_in_bounds")
        sums = partial(_coupling_sums, finest)
        total = sums(coupling) if x.ndim == 1 else jax.vmap(sums, -1, -1)(coupling)
        own = local + 2 * total
        # two sums of one row, in different order, may differ by rounding
        resolution = jnp.finfo(own.dtype).eps * 2 * (2 + self.term.size / max(1, own.shape[0]))
        beyond = jnp.where(rows > own * (1 + resolution), rows - own, 0)
        return coupling, jnp.maximum(local, 0) + beyond

    def _built(self, coupling: jax.Array, local: jax.Array, free: jax.Array) -> Values:
        levels = self._levels if local.ndim == 1 else jax.vmap(self._levels, in_axes=-1)
        return Values(*levels(coupling, local, free), coupling, local, free)

    def _levels(
        self, coupling: jax.Array, local: jax.Array, free: jax.Array
    ) -> tuple[tuple[Operator, ...], jax.Array]:
        """M on every level, and the factor of the last."""
        operators = []
        for level in self.levels:
            operator, local, coupling = _restricted(level, coupling, local, free)
            operators.append(operator)
            if level.node is not None:
                local, coupling = _coarser(level, local, coupling)
                # an aggregate whose members are all held has nothing
                free = _sums(level.members, operator.diagonal) > 0
        return tuple(operators), _factor(self.levels[-1], operators[-1], coupling)


class HierarchyModel(eqx.Module):
    """The quadratic model that a hierarchy stands for: a `graphs.contact.Model`."""

    hierarchy: Hierarchy
    operator: Operator  # of the finest level, all nodes free
    coupling: jax.Array  # as in `Values`
    local: jax.Array

    def product(self, v: jax.Array) -> jax.Array:
        finest = self.hierarchy.levels[0]
        if v.ndim == 1:
            return _apply(finest, self.operator, _written(v))
        return jax.vmap(partial(_apply, finest), in_axes=(0, 1), out_axes=1)(self.operator, v)

    def cycle(self, values: Values, free: jax.Array) -> "Cycle":
        """The cycle on the free nodes, of `values` where those are of the same."""
        same = jnp.all(values.free == free)
        built = partial(self.hierarchy._built, self.coupling, self.local, free)
        return Cycle(self.hierarchy, jax.lax.cond(same, lambda: values, built))

    def lifts(self, pull: jax.Array) -> jax.Array:
        """Which nodes are in an aggregate, on any level, whose pulls sum above zero."""
        if pull.ndim == 2:
            return jax.vmap(self.lifts, -1, -1)(pull)
        finer = self.hierarchy.levels[:-1]
        sums = [pull]
        for level in finer:
            sums.append(_sums(level.members, sums[-1]))
        lifted = sums.pop() > 0
        for level, own in zip(reversed(finer), reversed(sums), strict=True):
            above = _get(jnp.append(lifted, False), level.node)  # type: ignore[arg-type]
            lifted = (own > 0) | above
        return lifted


class Cycle(eqx.Module):
    r"""An approximate inverse of M with its values: `cycle(g)` is z, shaped like g.

    Linear in g, symmetric, positive definite on the free nodes, and zero on the others. A pytree:
    keep it for as long as weights, activities and free nodes stay, or let `renewed` decide.
    """

    hierarchy: Hierarchy
    values: Values

    def __call__(self, gradient: jax.Array) -> jax.Array:
        values = self.values
        gradient = jnp.where(values.free, gradient, 0)
        if gradient.ndim == 1:
            return self._solve(0, values.operators, values.factor, gradient)
        solve = jax.vmap(partial(self._solve, 0), in_axes=(0, 0, 1), out_axes=1)
        return solve(values.operators, values.factor, gradient)

    def product(self, v: jax.Array) -> jax.Array:
        """M v on the free nodes, shaped like v; the Hessian's product where M is the Hessian."""
        finest, operator = self.hierarchy.levels[0], self.values.operators[0]
        v = jnp.where(self.values.free, v, 0)
        if v.ndim == 1:
            return _apply(finest, operator, _written(v))
        return jax.vmap(partial(_apply, finest), in_axes=(0, 1), out_axes=1)(operator, v)

    def renewed(
        self,
        graph: EnergyGraph,
        x: jax.Array,
        rows: jax.Array,
        free: jax.Array,
        *,
        tolerance: float = NEAR,
    ) -> "Cycle":
        """`Hierarchy.renewed` from the values of this one."""
        return self.hierarchy.renewed(self.values, graph, x, rows, free, tolerance=tolerance)

    def _solve(
        self, depth: int, operators: tuple[Operator, ...], factor: jax.Array, residual: jax.Array
    ) -> jax.Array:
        level, operator = self.hierarchy.levels[depth], operators[depth]
        if level.node is None:
            return matmul(factor.T, matmul(factor, residual))
        z, left = _smooth(level, operator, residual)
        found = self._visit(depth + 1, operators, factor, _sums(level.members, left))
        # the coarser problem is one of free nodes: an aggregate moves those of its members
        free = operator.inverse_rows > 0
        correction = _written(jnp.where(free, _get(_padded(found), level.node), 0))
        left = left - _apply(level, operator, correction)
        more, _ = _smooth(level, operator, left, last=True)
        return z + correction + more

    def _visit(
        self, depth: int, operators: tuple[Operator, ...], factor: jax.Array, residual: jax.Array
    ) -> jax.Array:
        """Two visits of a coarser level, combined; one of the bottom, which is exact."""
        level, operator = self.hierarchy.levels[depth], operators[depth]
        if level.node is None:
            return self._solve(depth, operators, factor, residual)
        keep, take = (
            jnp.asarray(c, residual.dtype) for c in zip(*_chebyshev(2, *VISIT), strict=True)
        )

        def visit(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            z, move, left = carry
            found = self._solve(depth, operators, factor, left)
            move = _written(keep[k] * move + take[k] * found)
            return z + move, move, left - _apply(level, operator, move)

        # a loop, so that the program holds each level once
        zero = jnp.zeros_like(residual)
        return jax.lax.fori_loop(0, 2, visit, (zero, zero, residual))[0]


def _chebyshev(degree: int, low: float, high: float) -> list[tuple[float, float]]:
    """Coefficients of `move = keep * move + take * residual` (Saad 2003, algorithm 12.1)."""
    center, radius = (high + low) / 2, (high - low) / 2
    ratio = radius / center
    found = [(0.0, 1 / center)]
    for _ in range(degree - 1):
        after = 1 / (2 * center / radius - ratio)
        found.append((after * ratio, 2 * after / radius))
        ratio = after
    return found


def _smooth(
    level: Level, operator: Operator, residual: jax.Array, *, last: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Polynomial in rows^{-1} M times the residual, and the residual left; not after the last."""
    z = move = jnp.zeros_like(residual)
    for step, (keep, take) in enumerate(_chebyshev(DEGREE, *SMOOTH)):
        move = _written(keep * move + take * operator.inverse_rows * residual)
        z = z + move
        if not (last and step == DEGREE - 1):
            residual = residual - _apply(level, operator, move)
    return z, residual


def _apply(level: Level, operator: Operator, x: jax.Array) -> jax.Array:
    """M x, for an x in memory."""
    out = operator.diagonal * x
    for coupling, neighbor in zip(operator.near, level.neighbor.columns, strict=True):
        out = out - coupling * _get(x, neighbor)
    out = _add_tail(out, level.neighbor, -operator.tail * _get(x, level.neighbor.tail))
    return _written(out)


def _sums(rows: Rows, x: jax.Array) -> jax.Array:
    """Sum of x over each row; the padding counts 0."""
    x = _written(_padded(x))
    return _total(rows, [_get(x, column) for column in rows.columns], _get(x, rows.tail))


def _total(rows: Rows, columns: list[jax.Array], tail: jax.Array) -> jax.Array:
    return _add_tail(sum(columns[1:], start=columns[0]), rows, tail)


def _coupling_sums(level: Level, coupling: jax.Array) -> jax.Array:
    """Sum of the couplings of each node, [n]."""
    padded = _written(_padded(coupling))
    columns = [_get(padded, k) for k in level.through.columns]
    return _total(level.through, columns, _get(padded, level.through.tail))


def _add_tail(out: jax.Array, rows: Rows, tail: jax.Array) -> jax.Array:
    if not rows.tail_row.shape[0]:
        return out
    return out.at[rows.tail_row].add(tail, mode="promise_in_bounds")


def _get(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _written(x: jax.Array) -> jax.Array:
    """x, in memory.

    On CPU XLA merges elementwise arithmetic and gathers into whatever uses them, and computes them
    anew for every use: two products in a row take ten times as long as one. (It drops an
    `optimization_barrier` before it merges.) A scatter of more than one element is never merged;
    this one adds zeros.
    """
    if jax.default_backend() != "cpu" or not x.size:
        return x
    first = jax.lax.optimization_barrier(jnp.zeros(2, jnp.int32))
    return x.at[first].add(jnp.zeros(2, x.dtype), mode="promise_in_bounds")


def _padded(x: jax.Array) -> jax.Array:
    return jnp.append(x, jnp.zeros((), x.dtype))


def _restricted(
    level: Level, coupling: jax.Array, local: jax.Array, free: jax.Array
) -> tuple[Operator, jax.Array, jax.Array]:
    """M on the free nodes of a level, with local curvature and couplings left among them."""
    is_free = free.astype(coupling.dtype)
    padded = _written(_padded(coupling))
    near = [_get(padded, k) for k in level.through.columns]
    other = [_get(is_free, k) for k in level.neighbor.columns]
    tail, tail_other = _get(padded, level.through.tail), _get(is_free, level.neighbor.tail)

    held = [c * (1 - there) for c, there in zip(near, other, strict=True)]
    near = [_written(is_free * c * there) for c, there in zip(near, other, strict=True)]
    # what is coupled to a held node is curvature of its own
    local = is_free * (local + _total(level.neighbor, held, tail * (1 - tail_other)))
    tail = _get(is_free, level.neighbor.tail_row) * tail * tail_other
    couplings = _total(level.neighbor, near, tail)
    # a node that nothing bends takes its gradient as it is
    local = jnp.where(free & ~(local + couplings > 0), 1, local)
    diagonal = local + couplings
    rows = diagonal + couplings
    inverse = jnp.where(free, 1 / jnp.where(free, rows, 1), 0)
    ends = _get(is_free, level.i) * _get(is_free, level.j)
    return Operator(tuple(near), tail, diagonal, inverse), local, coupling * ends


def _coarser(level: Level, local: jax.Array, coupling: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over aggregates: P^T M P of the piecewise constant P, without what cancels in it."""
    edges = jnp.zeros(level.num_coarse_edges + 1, coupling.dtype)
    edges = edges.at[level.edge].add(coupling, mode="promise_in_bounds")
    return _sums(level.members, local), edges[:-1]


def _factor(level: Level, operator: Operator, coupling: jax.Array) -> jax.Array:
    """F with F^T F = M^{-1} at the bottom, zero on held nodes."""
    n = level.num_nodes
    held = ~(operator.diagonal > 0)
    scale = jnp.where(held, 0, 1 / jnp.sqrt(jnp.where(held, 1, operator.diagonal)))
    entry = -scale[level.i] * coupling * scale[level.j]
    matrix = jnp.zeros((n, n), entry.dtype).at[level.i, level.j].add(entry)
    # parts without any local curvature are singular: rounding must not decide their sign
    shift = 1 + 8 * n * jnp.finfo(entry.dtype).eps
    lower = jnp.linalg.cholesky(matrix + matrix.T + shift * jnp.eye(n, dtype=entry.dtype))
    return _inverse(lower) * scale[None, :]


def _inverse(lower: jax.Array) -> jax.Array:
    """Of a lower triangular matrix.

    On CPU a solve goes to a library with threads of its own, which wait for each other by spinning:
    with other work on the machine it takes longer than all levels above together.
    """
    identity = jnp.eye(lower.shape[0], dtype=lower.dtype)
    if jax.default_backend() != "cpu":
        return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)

    def row(k: jax.Array, inverse: jax.Array) -> jax.Array:
        return inverse.at[k].set((identity[k] - matmul(lower[k], inverse)) / lower[k, k])

    return jax.lax.fori_loop(0, lower.shape[0], row, jnp.zeros_like(lower))


def priced_couplings(
    graph: EnergyGraph, x: jax.Array, activity: Activity
) -> tuple[jax.Array, jax.Array]:
    r"""Attractive couplings of a graph's Hessian at x, and what its rows R hold beyond them.

    Args:
      graph: the energy.
      x: state, [n] or [n, d].
      activity: how hinges count.

    Returns:
      `(couplings, local)`: $c_k = \max(0, -h_{ij})$ of each coupled term, [K] or [K, d]; and
      $R_r - 2 \sum_{k \ni r} c_k$ of each node, shaped like x, summed without what cancels in it.
    """
    local = graph.local_rows(x)
    couplings = [jnp.zeros((0, *x.shape[1:]), local.dtype)]
    for family in graph.edges:
        if type(family) is GateBenefit:
            continue  # linear
        if type(family) is Quadratic:
            # a spring's rows are twice its coupling, wherever its ends are
            weight = family.weight.astype(local.dtype)
            lead = weight.reshape(-1, *(1,) * (x.ndim - 1))
            couplings.append(jnp.broadcast_to(2 * lead, (*weight.shape, *x.shape[1:])))
            continue
        ends = (x.at[end].get(mode="promise_in_bounds") for end in (family.i, family.j))
        mixed, cost_i, cost_j = jax.vmap(partial(_bends, activity=activity))(family, *ends)
        attractive = jnp.maximum(-mixed, 0)
        for end, cost in ((family.i, cost_i), (family.j, cost_j)):
            local = local.at[end].add(cost - 2 * attractive, mode="promise_in_bounds")
        if not isinstance(family, UNCOUPLED):
            couplings.append(attractive)
    return jnp.concatenate(couplings), local


def _bends(
    family: EdgeFamily, x_i: jax.Array, x_j: jax.Array, activity: Activity
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixed second derivative of one edge, coordinate by coordinate, and the rows of both ends."""
    gap = family.gap(x_i, x_j)
    active = None if gap is None else activity(gap)

    def priced(x_i: jax.Array, x_j: jax.Array) -> jax.Array:
        return family.weight * family.priced_energy(x_i, x_j, active)

    (own_i, mixed), (_, own_j) = jax.hessian(priced, argnums=(0, 1))(x_i, x_j)
    if x_i.ndim == 0:
        return mixed, jnp.abs(own_i) + jnp.abs(mixed), jnp.abs(own_j) + jnp.abs(mixed)
    cost_i = jnp.sum(jnp.abs(own_i) + jnp.abs(mixed), axis=1)
    cost_j = jnp.sum(jnp.abs(own_j) + jnp.abs(mixed.T), axis=1)
    return jnp.diagonal(mixed), cost_i, cost_j


def multilevel(
    graph: EnergyGraph,
    x: ArrayLike | None = None,
    *,
    smoothing: Activity | float | None = 0.05,
    seed: int = 0,
) -> Hierarchy:
    r"""A hierarchy of aggregates for graphs of one structure, built on the host.

    Nodes are merged by rounds of heavy-edge matching, 4 to 5 into one, or 2 in chains and trees,
    until at most 128 are left. Only the structure is kept: weights, activities of hinges and free
    nodes enter when `Hierarchy.precondition` is called, inside `jit` and under `vmap`.

    Args:
      graph: the energy; its edges must be concrete.
      x: state at which the couplings are taken, [n] or [n, d]. They only decide who is merged with
        whom; without it the weights of the edges do.
      smoothing: how hinges count, as in `majorized_descent`; give both the same.
      seed: of the generator that breaks ties.

    Returns:
      A `Hierarchy`, a pytree.

    Raises:
      ValueError: edges that are traced, an x that is not finite.

    >>> from smallgain_jax import Landau, Quadratic
    >>> here = np.arange(999)
    >>> chain = EnergyGraph(Landau(a=np.full(1000, 1e-6)), Quadratic(here, here + 1))
    >>> hierarchy, x = multilevel(chain), jnp.zeros(1000)
    >>> rows, free = chain.curvature(x).row_sums, jnp.ones(1000, bool)
    >>> cycle = hierarchy.precondition(chain, x, rows, free)
    >>> gradient = chain.gradient(jnp.linspace(0.0, 1.0, 1000))
    >>> bool(jnp.vdot(gradient, cycle(gradient)) > 0)
    True
    """
    if not is_concrete(graph.edges):
        raise ValueError("graph must be concrete: build the hierarchy once, outside of jit")
    if x is not None:
        check_finite("x", x)
    activity = _as_activity(smoothing)
    coupled = [family for family in graph.edges if not isinstance(family, UNCOUPLED)]
    none = np.zeros(0, np.int64)
    i = np.concatenate([none, *(np.asarray(family.i) for family in coupled)])
    j = np.concatenate([none, *(np.asarray(family.j) for family in coupled)])
    strength = np.concatenate([np.zeros(0), *(np.asarray(family.weight) for family in coupled)])
    if x is not None:
        measured = eqx.filter_jit(priced_couplings)(graph, jnp.asarray(x), activity)[0]
        strength = np.asarray(measured, np.float64).reshape(i.size, -1).mean(axis=1)
    fine, term = simple_graph(i, j, strength, graph.num_nodes)
    rng = np.random.default_rng(seed)
    levels = []
    while fine.num_nodes > BOTTOM and fine.i.size:
        thin = fine.i.size < THIN * fine.num_nodes
        merged = aggregate(fine, 1 if thin else ROUNDS, rng)
        levels.append(_level(fine, merged))
        fine = merged.graph
    levels.append(_level(fine, None))
    return Hierarchy(_indices(term), tuple(levels), activity)


def _level(graph: Coupled, merged: Merged | None) -> Level:
    neighbor, through = (_rows(packed) for packed in neighbor_rows(graph))
    ends = _indices(graph.i), _indices(graph.j)
    if merged is None:
        members = _rows(packed_rows(np.zeros(0, np.int64), 0))
        return Level(*ends, neighbor, through, members, None, None, graph.num_nodes, 0, 0)
    count = merged.graph.num_nodes
    return Level(
        *ends,
        neighbor,
        through,
        _rows(packed_rows(merged.node, count)),
        _indices(merged.node),
        _indices(merged.edge),
        graph.num_nodes,
        count,
        merged.graph.i.size,
    )


def _rows(packed: Packed) -> Rows:
    return Rows(
        tuple(map(_indices, packed.columns)), _indices(packed.tail_row), _indices(packed.tail)
    )


def _indices(values: np.ndarray) -> jax.Array:
    return jax.device_put(np.asarray(values, np.int32))


__all__ = [
    "Cycle",
    "Hierarchy",
    "Level",
    "Operator",
    "Rows",
    "Values",
    "multilevel",
    "priced_couplings",
]
