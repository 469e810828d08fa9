r"""The objective around the parameters, and the step of a base optimizer under some weights.

The base optimizer is fed the gradient of $F(x; w)$, its rows multiplied by their gains; what it
answers is cut to the box and guarded, before its length is settled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from smallgain_jax._tree import fold_columns, vdot
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.weights import Snapshot, rows_at, scaled
from smallgain_jax.search.box import Box
from smallgain_jax.search.guard import cosine, directional_curvature, guard_scale, trusted_curvature
from smallgain_jax.spectral.rows import Activity

Limit = float | jax.Array | Callable[[jax.Array], Any] | None


class Settings(NamedTuple):
    """Static and numeric settings of the skeleton; `graph_small_gain` documents each."""

    limit: Limit = None
    target: ArrayLike = 0.9
    objective: str = "reference"
    smoothing: Activity | float | None = 1e-3
    scaling_iterations: int = 0
    row_gains: bool = False
    guard: str | None = None
    min_cosine: ArrayLike = 1e-3
    max_backtracks: int = 20


class Mixture(NamedTuple):
    """The objective under some weights, to first and second order: affine in the weights."""

    weights: jax.Array  # [K]
    gradient: jax.Array  # [n] of F(x; w)
    rows: jax.Array  # [n] R(w)

    def towards(self, other: "Mixture", part: ArrayLike) -> "Mixture":
        """That under the weights a `part` of the way to the other's."""
        return Mixture(*(a + part * (b - a) for a, b in zip(self, other, strict=True)))


class Place(eqx.Module):
    """The objective around the parameters: everything a step under some weights needs."""

    graph: EnergyGraph
    snapshot: Snapshot
    value: jax.Array  # [] F(x; 1)
    local_energy: jax.Array  # []
    box: Box
    reference: bool = eqx.field(static=True)

    def energy(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        """The declared objective."""
        return self.graph.energy(x, None if self.reference else weights)

    def adapted_energy(self, weights: jax.Array) -> jax.Array:
        """F(x; w) at the parameters."""
        return self.local_energy + vdot(weights, self.snapshot.term_energies)

    def declared_energy(self, weights: jax.Array) -> jax.Array:
        """The declared objective at the parameters."""
        return self.value if self.reference else self.adapted_energy(weights)

    @property
    def plain(self) -> Mixture:
        """The objective as the user wrote it: w = 1."""
        snapshot = self.snapshot
        ones = jnp.ones_like(snapshot.term_energies)
        return Mixture(ones, snapshot.gradient, snapshot.curvature.row_sums)

    def mixed(self, weights: jax.Array) -> Mixture:
        """The objective under any weights: two passes over the edges."""
        extra = self.graph.scatter(scaled(weights - 1, self.snapshot.term_gradients))
        return Mixture(weights, self.snapshot.gradient + extra, self.rows(weights))

    def rows(self, weights: jax.Array) -> jax.Array:
        """R(w)."""
        return rows_at(self.graph, self.snapshot.curvature, weights)

    def free(self, gradient: jax.Array) -> jax.Array:
        """A gradient on the nodes that the box lets move, 0 on the others."""
        return jnp.where(self.box.blocks(self.snapshot.x, -gradient), 0, gradient)

    @property
    def dearest(self) -> jax.Array:
        """Cost of each term at unit weight on its dearest row, [K]."""
        return fold_columns(jnp.maximum, self.snapshot.curvature.edge_cost)

    @property
    def finite(self) -> jax.Array:
        snapshot = self.snapshot
        return (
            jnp.isfinite(self.value)
            & jnp.all(jnp.isfinite(snapshot.gradient))
            & jnp.all(jnp.isfinite(snapshot.term_gradients))
            & jnp.isfinite(snapshot.curvature.lipschitz)
        )


class Proposal(NamedTuple):
    """A step under given weights, before its length is settled."""

    move: jax.Array  # [n] feasible and guarded
    base_state: Any
    reached: jax.Array  # [] declared objective after it
    slope: jax.Array  # [] <declared gradient, move>
    cosine: jax.Array  # [] with the declared descent direction
    guard: jax.Array  # []


def look(
    graph: EnergyGraph,
    settings: Settings,
    updates: jax.Array,
    count: jax.Array,
    dtype: Any,
    params: jax.Array,
    bounds: tuple[Any, Any] | None,
) -> Place:
    x = params.astype(dtype)
    curvature = graph.curvature(
        x, None, smoothing=settings.smoothing, scaling_iterations=settings.scaling_iterations
    )
    limit = curvature.lipschitz if settings.limit is None else settings.limit
    limit = jnp.asarray(limit(count) if callable(limit) else limit, dtype)
    energies, local_energy = graph.term_energies(x), graph.local_energy(x)
    snapshot = Snapshot(
        x=x,
        gradient=updates.astype(dtype),
        term_gradients=graph.term_gradients(x),
        term_energies=energies,
        curvature=curvature,
        limit=limit,
        target=jnp.asarray(settings.target * limit),
        count=count,
    )
    box = Box(-jnp.inf, jnp.inf) if bounds is None else Box(*bounds)
    value = local_energy + jnp.sum(energies)
    return Place(graph, snapshot, value, local_energy, box, settings.objective == "reference")


def propose(
    here: Place,
    settings: Settings,
    base: optax.GradientTransformationExtraArgs,
    mixture: Mixture,
    dtype: Any,
    base_state: Any,
    params: jax.Array,
    extra_args: dict[str, Any],
) -> Proposal:
    snapshot = here.snapshot
    x = snapshot.x
    free = here.free(mixture.gradient)
    gained = free
    if settings.row_gains:
        # rows without curvature have no limit of their own; Armijo settles them
        rows = jnp.maximum(mixture.rows, 1e-6 * jnp.max(mixture.rows, initial=0.0))
        # the quotient first: gradient times target leaves float32 in small units of the energy
        gained = gained * (snapshot.target / jnp.where(rows > 0, rows, snapshot.target))
    gained = jnp.where(here.finite, gained, 0).astype(dtype)
    move, base_state = base.update(gained, base_state, params, **extra_args)
    move = here.box.project(x + move.astype(x.dtype)) - x
    gradient, rows = free, mixture.rows
    if here.reference:
        gradient, rows = snapshot.gradient, snapshot.curvature.row_sums
    factor = jnp.ones((), x.dtype)
    if settings.guard is not None:
        bend = vdot(rows * move, move)
        if settings.guard == "measured":
            measured = directional_curvature(partial(here.energy, mixture.weights), x, move)
            # negative or vanishing curvature promises nothing: fall back on the bound
            bend = trusted_curvature(measured, bend)
        factor = guard_scale(gradient, move, bend, settings.target)
    move = jnp.where(factor > 0, factor * move, 0)
    return Proposal(
        move=move,
        base_state=base_state,
        reached=here.energy(mixture.weights, x + move),
        slope=vdot(gradient, move),
        cosine=cosine(move, -gradient),
        guard=factor,
    )
