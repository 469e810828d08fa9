"""Energy graphs: nodes with local energies, edges with couplings."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import check_count, is_concrete
from smallgain_jax._compiling import at_once
from smallgain_jax._tree import gathered
from smallgain_jax.graphs.families import EdgeFamily
from smallgain_jax.graphs.local import LocalEnergy
from smallgain_jax.spectral.rows import (
    Activity,
    AlwaysActive,
    Curvature,
    Sigmoid,
    block_curvature,
    scatter_pairs,
)


def is_ours(graph: Any) -> bool:
    """Whether all energies of a graph are the library's own, with no function of somebody's."""
    package = __name__.split(".")[0]
    parts = (*graph.local, *graph.edges)
    ours = all(type(part).__module__.split(".")[0] == package for part in parts)
    return ours and not any(callable(value) for part in parts for value in vars(part).values())


class Evaluation(NamedTuple):
    """An objective at one state."""

    value: jax.Array  # []
    gradient: jax.Array  # like x
    magnitude: jax.Array  # [] sum of the absolute values of the terms: what rounding scales with


class EnergyGraph(eqx.Module):
    r"""The objective $F(x; w) = \sum_l f_l(x) + \sum_k w_k e_k(x_{i_k}, x_{j_k})$ of a graph.

    A pytree: every array in it is data, so graphs pass through `jit`, `vmap` and `grad`. The state
    x is [n] (scalar nodes) or [n, d] (vector nodes). $e_k$ includes the edge's own weight; the
    `weights` of the methods multiply it, and `weights=None` is the reference objective, all ones.
    Terms are ordered as the families are given, edges within a family as they stand in it.

    Args:
      local: a local energy (`Landau`, a penalty, or anything with its two methods), a sequence of
        them, which are summed, or None.
      edges: a family of edges or a sequence of families.
      num_nodes: n; only needed when no local energy tells it.

    Raises:
      ValueError: n unknown, or an edge that ends outside 0..n-1.
      TypeError: something that is not a local energy or not a family.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=[1.0, 1.0]), [sg.Quadratic([0], [1], 0.5)])
    >>> graph.energy(jnp.array([1.0, 0.0])).item()
    1.5
    """

    local: tuple[LocalEnergy, ...]
    edges: tuple[EdgeFamily, ...]
    num_nodes: int = eqx.field(static=True)

    def __init__(
        self,
        local: LocalEnergy | Sequence[LocalEnergy] | None,
        edges: EdgeFamily | Sequence[EdgeFamily] = (),
        *,
        num_nodes: int | None = None,
    ) -> None:
        self.local = _as_tuple(local)
        self.edges = _as_tuple(edges)
        for energy in self.local:
            if isinstance(energy, EdgeFamily):
                raise TypeError(
                    f"local is the edge family {type(energy).__name__}: the order is "
                    "EnergyGraph(local, edges), with None where there is no local energy"
                )
            if not isinstance(energy, LocalEnergy):
                raise TypeError(
                    "local must be callable and have majorizer_diagonal, "
                    f"got {type(energy).__name__}"
                )
        for family in self.edges:
            if not isinstance(family, EdgeFamily):
                raise TypeError(
                    f"edges must be edge families such as Quadratic, got {type(family).__name__}"
                )
        check_count("num_nodes", num_nodes, 0)
        self.num_nodes = _common_num_nodes(self.local, num_nodes)
        for family in self.edges:
            _check_ends(family, self.num_nodes)

    @property
    def num_edges(self) -> int:
        """Number of terms E."""
        return sum(family.num_edges for family in self.edges)

    @property
    def i(self) -> jax.Array:
        """First end of every term, int32 [E]."""
        return self._concatenate([family.i for family in self.edges], (0,), jnp.int32)

    @property
    def j(self) -> jax.Array:
        """Second end of every term, int32 [E]."""
        return self._concatenate([family.j for family in self.edges], (0,), jnp.int32)

    @property
    def keys(self) -> tuple[str, ...]:
        """Name of each family; a second family of the same kind is called `Quadratic:2`."""
        names: list[str] = []
        for family in self.edges:
            seen = sum(name.split(":")[0] == family.key for name in names)
            names.append(family.key if not seen else f"{family.key}:{seen + 1}")
        return tuple(names)

    @property
    def family_index(self) -> np.ndarray:
        """Position in `edges` of every term's family, int32 [E]."""
        sizes = [family.num_edges for family in self.edges]
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    def local_energy(self, x: jax.Array) -> jax.Array:
        """Sum of the local energies, a scalar."""
        x = self._state(x)
        return sum((energy(x) for energy in self.local), start=jnp.zeros((), self._dtype(x)))

    @at_once(own=is_ours)
    def term_energies(self, x: jax.Array) -> jax.Array:
        """Energy of each term at the reference weights, [E]."""
        x = self._state(x)
        return self._per_term(lambda f, x_i, x_j: f.pair_energy(x_i, x_j), x, ())

    @at_once(own=is_ours)
    def energy(self, x: jax.Array, weights: ArrayLike | None = None) -> jax.Array:
        """F(x; w), a scalar.

        Args:
          x: state [n] or [n, d].
          weights: w [E]; None is the reference objective.
        """
        if weights is not None:
            terms = self._weights(weights, x) * self.term_energies(x)
            return self.local_energy(x) + jnp.sum(terms)
        x = self._state(x)
        # family by family: gathering all terms into one array first is a pass over memory
        parts = self._map_parts(lambda f, x_i, x_j: f.weight * f.pair_energy(x_i, x_j), x)
        return sum((jnp.sum(part) for part in parts), start=self.local_energy(x))

    def gradient(self, x: jax.Array, weights: ArrayLike | None = None) -> jax.Array:
        """dF(x; w)/dx, shaped like x."""
        return self.value_and_gradient(x, weights)[1]

    def value_and_gradient(
        self, x: jax.Array, weights: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        r"""$(F(x; w), \partial F(x; w) / \partial x)$ in one pass over the edges.

        What `jax.value_and_grad(graph.energy)` gives, in two thirds of its time on CPU: the edges'
        gradients are added to the nodes family by family, onto one array.

        Args:
          x: state [n] or [n, d], floating.
          weights: w [E]; None is the reference objective.

        Returns:
          `(value [], gradient)`, the gradient shaped like x.

        Raises:
          ValueError: `x` or `weights` of another shape.

        >>> import smallgain_jax as sg
        >>> graph = sg.EnergyGraph(sg.Landau(a=[1.0, 1.0]), [sg.Quadratic([0], [1], 0.5)])
        >>> value, gradient = graph.value_and_gradient(jnp.array([1.0, 0.0]))
        >>> value.item(), gradient.tolist()
        (1.5, [3.0, -1.0])
        """
        return self.evaluate(x, weights)[:2]

    @at_once(own=is_ours)
    def evaluate(self, x: jax.Array, weights: ArrayLike | None = None) -> Evaluation:
        r"""`value_and_gradient`, and the size of the terms that the value is the sum of.

        The magnitude $\sum_l |f_l| + \sum_k |w_k e_k|$ is what rounding scales with: where terms
        of both signs cancel, the value is small and its error is not.
        """
        x = self._state(x)

        def one(family: EdgeFamily, x_i: jax.Array, x_j: jax.Array) -> tuple[jax.Array, ...]:
            value, slopes = jax.value_and_grad(family.pair_energy, argnums=(0, 1))(x_i, x_j)
            return family.weight * value, family.weight * slopes[0], family.weight * slopes[1]

        value, gradient = jax.value_and_grad(self.local_energy)(x)
        magnitude = jnp.abs(value)
        parts = self._map_parts(one, x)
        scales = self._by_family(weights, x)
        for scale, part in zip(scales, parts, strict=True):
            terms = part[0] if scale is None else scale * part[0]
            value, magnitude = value + jnp.sum(terms), magnitude + jnp.sum(jnp.abs(terms))
        gradient = self._scattered(gradient, [part[1:] for part in parts], scales)
        return Evaluation(value, gradient, magnitude)

    def rows(self, x: jax.Array, smoothing: Activity | float | None = None) -> jax.Array:
        """Row sums of the reference objective's Hessian, shaped like x; see `curvature`."""
        return self.curvature(x, smoothing=smoothing).row_sums

    @at_once(own=is_ours)
    def term_gradients(self, x: jax.Array) -> jax.Array:
        """Gradient of each term by its two ends at the reference weights, [E, 2] or [E, 2, d]."""
        x = self._state(x)

        def one(family: EdgeFamily, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
            return jnp.stack(jax.grad(family.pair_energy, argnums=(0, 1))(x_i, x_j))

        return self._per_term(one, x, (2, *x.shape[1:]))

    def scatter(self, pairs: jax.Array) -> jax.Array:
        """Sum per-edge values [E, 2, ...] onto the nodes, [n, ...]."""
        return scatter_pairs(pairs, self.i, self.j, self.num_nodes)

    def hinge_activity(self, x: jax.Array, smoothing: Activity | float | None = None) -> jax.Array:
        """Mean activity of each term's hinge over its coordinates, [E]; 1 where there is none."""
        return self._hinge_activity(x, _as_activity(smoothing))

    @at_once(own=is_ours)
    def _hinge_activity(self, x: jax.Array, activity: Activity) -> jax.Array:
        x = self._state(x)
        dtype = self._dtype(x)

        def one(family: EdgeFamily, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
            gap = family.gap(x_i, x_j)
            return jnp.ones((), dtype) if gap is None else jnp.mean(activity(gap))

        return self._map_terms(one, x, ())

    def edge_blocks(self, x: jax.Array, smoothing: Activity | float | None = None) -> jax.Array:
        """Hessian block of each term, [E, 2, 2] or [E, 2, d, 2, d], hinges by their activity."""
        return self._edge_blocks(x, _as_activity(smoothing))

    @at_once(own=is_ours)
    def _edge_blocks(self, x: jax.Array, activity: Activity) -> jax.Array:
        x = self._state(x)

        def one(family: EdgeFamily, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
            gap = family.gap(x_i, x_j)
            active = None if gap is None else activity(gap)

            def priced(ends: jax.Array) -> jax.Array:
                return family.priced_energy(ends[0], ends[1], active)

            return jax.hessian(priced)(jnp.stack([x_i, x_j]))

        return self._per_term(one, x, (2, *x.shape[1:], 2, *x.shape[1:]))

    def _scalar_costs(self, x: jax.Array, activity: Activity) -> list[tuple[jax.Array, jax.Array]]:
        """Row sums of |block| on both ends of each term with scalar nodes, by family."""

        def one(family: EdgeFamily, x_i: jax.Array, x_j: jax.Array) -> tuple[jax.Array, ...]:
            gap = family.gap(x_i, x_j)
            active = None if gap is None else activity(gap)
            unit, zero = jnp.ones_like(x_i), jnp.zeros_like(x_i)

            def priced(x_i: jax.Array, x_j: jax.Array) -> jax.Array:
                return family.priced_energy(x_i, x_j, active)

            def slope(*along: jax.Array) -> Callable[..., jax.Array]:
                return lambda *ends: jax.jvp(priced, ends, along)[1]

            def bend(of: Callable[..., jax.Array], *along: jax.Array) -> jax.Array:
                return jnp.abs(family.weight * jax.jvp(of, (x_i, x_j), along)[1])

            mixed = bend(slope(unit, zero), zero, unit)
            own_i = bend(slope(unit, zero), unit, zero)
            own_j = bend(slope(zero, unit), zero, unit)
            return own_i + mixed, own_j + mixed

        # separate columns: a block of two by two per edge is one memory pass each
        return self._map_parts(one, x)

    def local_rows(self, x: jax.Array) -> jax.Array:
        """Majorizing rows of the local energies' Hessian, B, shaped like x."""
        x = self._state(x)
        zero = jnp.zeros(x.shape, self._dtype(x))
        return sum((energy.majorizer_diagonal(x) for energy in self.local), start=zero)

    def curvature(
        self,
        x: jax.Array,
        weights: ArrayLike | None = None,
        smoothing: Activity | float | None = None,
        scaling_iterations: int = 0,
        scaling: jax.Array | None = None,
    ) -> Curvature:
        r"""Row bounds $R_r(w) = B_r + \sum_k w_k C_{kr}$ of the Hessian at x, and each term's cost.

        Per-edge Hessian blocks come from `jax.hessian` under `vmap`.

        Args:
          x: state [n] or [n, d].
          weights: w [E], non-negative; None is the reference objective.
          smoothing: how hinges are priced: None as active, under which `lipschitz` is a guaranteed
            bound at x; a float eps by the sigmoid of gap/eps; or an activity (`Sigmoid`, `Ramp`).
          scaling_iterations: power iterations on |H| (static int); each is a certified, tighter
            bound (Varga 2004; Collatz-Wielandt).
          scaling: positive vector to start them from, shaped like x.

        Returns:
          `Curvature(row_sums [n], local_rows [n], edge_cost [E, 2], lipschitz, scaling [n])`.

        Raises:
          TypeError: x is not floating.
          ValueError: `x`, `weights` or `scaling` of another shape; concrete weights that are
            negative, or a scaling that is not positive.

        >>> import smallgain_jax as sg
        >>> graph = sg.EnergyGraph(sg.Landau(a=[0.0, 0.0]), [sg.Quadratic([0], [1], 0.5)])
        >>> graph.curvature(jnp.array([1.0, 0.0])).edge_cost.tolist()
        [[2.0, 2.0]]
        """
        x = self._state(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating, got {x.dtype}: jnp.asarray(x, float)")
        check_count("scaling_iterations", scaling_iterations, 0)
        if weights is not None:
            weights = self._weights(weights, x)
            if is_concrete(weights) and np.any(np.asarray(weights) < 0):
                raise ValueError("weights must not be negative: what they bound would be no bound")
        if scaling is not None:
            scaling = jnp.asarray(scaling)
            if scaling.shape != x.shape:
                raise ValueError(f"scaling has shape {scaling.shape}, expected {x.shape}, as x")
            if is_concrete(scaling) and not np.all(np.asarray(scaling) > 0):
                raise ValueError("scaling must be positive: it divides the rows of a bound")
        activity = _as_activity(smoothing)
        return _bounded(self, x, weights, scaling, activity, iterations=int(scaling_iterations))

    def _weights(self, weights: ArrayLike | None, x: jax.Array) -> jax.Array:
        if weights is None:
            return jnp.ones(self.num_edges, self._dtype(x))
        array = jnp.asarray(weights)
        if array.shape != (self.num_edges,):
            raise ValueError(f"weights has shape {array.shape}, expected ({self.num_edges},)")
        return array

    def _by_family(self, weights: ArrayLike | None, x: jax.Array) -> list[Any]:
        """The weights of each family; None for those of the reference objective."""
        if weights is None:
            return [None for _ in self.edges]
        array = self._weights(weights, x)
        ends = np.cumsum([family.num_edges for family in self.edges])[:-1]
        return jnp.split(array, ends) if self.edges else []

    def _scattered(
        self, start: jax.Array, parts: Sequence[tuple[jax.Array, ...]], scales: list[Any]
    ) -> jax.Array:
        """`start` with what each family's edges put on their two ends, scaled, added to it."""
        out = start
        for family, (at_i, at_j), scale in zip(self.edges, parts, scales, strict=True):
            if scale is not None:
                factor = scale.reshape(-1, *(1,) * (at_i.ndim - 1))
                at_i, at_j = factor * at_i, factor * at_j
            at_i, at_j = _apart(at_i, at_j)
            out = out.at[family.i].add(at_i, mode="promise_in_bounds")
            out = out.at[family.j].add(at_j, mode="promise_in_bounds")
        return out

    def _dtype(self, x: jax.Array) -> jnp.dtype:
        # of x as it is: a weak type would give way to float32
        return jnp.promote_types(x.dtype, jnp.float32)

    def _state(self, x: jax.Array) -> jax.Array:
        """x, checked; whole on every device, since edges reach across any division of the nodes."""
        if not hasattr(x, "ndim"):
            raise TypeError(f"x must be an array, got {type(x).__name__}: jnp.asarray(x)")
        if x.ndim not in (1, 2) or x.shape[0] != self.num_nodes:
            raise ValueError(
                f"x has shape {x.shape}, expected [{self.num_nodes}] or [{self.num_nodes}, d]"
            )
        return gathered(x)

    def _per_term(
        self, fn: Callable[..., jax.Array], x: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """`weight * fn(edge, x_i, x_j)` for every term, [E, *shape]."""

        def weighted(family: EdgeFamily, x_i: jax.Array, x_j: jax.Array) -> jax.Array:
            return family.weight * fn(family, x_i, x_j)

        return self._map_terms(weighted, x, shape)

    def _map_terms(
        self, fn: Callable[..., jax.Array], x: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """`fn(edge, x_i, x_j)` of one edge mapped over every term, [E, *shape]."""
        return self._concatenate(self._map_parts(fn, x), (0, *shape), self._dtype(x))

    def _map_parts(self, fn: Callable[..., Any], x: jax.Array) -> list[Any]:
        """`fn(edge, x_i, x_j)` mapped over the edges of each family."""
        return [jax.vmap(fn)(f, *_apart(_ends(x, f.i), _ends(x, f.j))) for f in self.edges]

    @staticmethod
    def _concatenate(parts: list[jax.Array], empty: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.concatenate(parts) if parts else jnp.zeros(empty, dtype)


@at_once("iterations", own=is_ours)
def _bounded(
    graph: EnergyGraph,
    x: jax.Array,
    weights: jax.Array | None,
    scaling: jax.Array | None,
    activity: Activity,
    *,
    iterations: int,
) -> Curvature:
    """What `EnergyGraph.curvature` returns."""
    local = graph.local_rows(x)
    if x.ndim == 1 and scaling is None and not iterations:
        parts = graph._scalar_costs(x, activity)
        row_sums = graph._scattered(local, parts, graph._by_family(weights, x))
        # costs nothing where nobody reads it
        columns = [jnp.stack(part, axis=1) for part in parts]
        cost = graph._concatenate(columns, (0, 2), graph._dtype(x))
        top = jnp.max(row_sums, initial=0.0)
        return Curvature(row_sums, local, cost, top, jnp.ones_like(local))
    return block_curvature(
        *(local, graph.edge_blocks(x, activity), graph._weights(weights, x), graph.i, graph.j),
        scaling_iterations=iterations,
        scaling=scaling,
    )


def alike(a: Any, b: Any) -> bool:
    """Whether two graphs, or other objectives, differ in numbers alone."""
    ours: Any = jax.tree.structure(a)

    def kind(leaf: Any) -> Any:
        # leaves that are no arrays, such as the program of a function, are the same or not
        return (jnp.shape(leaf), jnp.result_type(leaf)) if eqx.is_array_like(leaf) else leaf

    kinds = partial(jax.tree.map, kind)
    return bool(ours == jax.tree.structure(b)) and bool(kinds(a) == kinds(b))


def _ends(x: jax.Array, index: jax.Array) -> jax.Array:
    """States at one end of every edge; ends were checked when the graph was built."""
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds")


def _apart(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays as they are, written to memory first where that pays.

    On CPU a gather or a scatter that XLA merges with the arithmetic beside it is not vectorized,
    and takes two to three times as long.
    """
    if jax.default_backend() != "cpu":
        return arrays
    found: tuple[jax.Array, ...] = jax.lax.optimization_barrier(arrays)
    return found


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _as_activity(smoothing: Activity | float | None) -> Activity:
    if smoothing is None:
        return AlwaysActive()
    return smoothing if callable(smoothing) else Sigmoid(smoothing)


def _common_num_nodes(local: tuple[Any, ...], num_nodes: int | None) -> int:
    sizes = {energy.num_nodes for energy in local if hasattr(energy, "num_nodes")}
    if num_nodes is not None:
        sizes.add(int(num_nodes))
    if not sizes:
        raise ValueError("num_nodes must be given when no local energy tells the number of nodes")
    if len(sizes) > 1:
        raise ValueError(f"num_nodes and the local energies disagree: {sorted(sizes)}")
    return sizes.pop()


def _counted_from_one(ends: jax.Array, num_nodes: int) -> str:
    host = np.asarray(ends)
    return "; do yours count from 1?" if host.min() >= 1 and host.max() == num_nodes else ""


def _check_ends(family: EdgeFamily, num_nodes: int) -> None:
    for name, ends in (("i", family.i), ("j", family.j)):
        if not is_concrete(ends):
            continue
        outside = np.flatnonzero(np.asarray(ends) >= num_nodes)
        if outside.size:
            k = int(outside[0])
            raise ValueError(
                f"{name}[{k}] = {int(ends[k])} of {family.key} is outside the graph: "
                f"nodes are 0..{num_nodes - 1}{_counted_from_one(ends, num_nodes)}"
            )
