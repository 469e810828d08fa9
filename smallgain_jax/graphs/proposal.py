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

from smallgain_jax._tree import vdot
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.weights import Snapshot, scaled
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

    def gradient(self, weights: jax.Array) -> jax.Array:
        """Of F(x; w), on the nodes that the box lets move."""
        extra = self.graph.scatter(scaled(weights - 1, self.snapshot.term_gradients))
        gradient = self.snapshot.gradient + extra
        return jnp.where(self.box.blocks(self.snapshot.x, -gradient), 0, gradient)

    def rows(self, weights: jax.Array) -> jax.Array:
        """R(w)."""
        curvature = self.snapshot.curvature
        return curvature.local_rows + self.graph.scatter(scaled(weights, curvature.edge_cost))

    def declared(self, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradient and rows of the declared objective."""
        if self.reference:
            return self.snapshot.gradient, self.snapshot.curvature.row_sums
        return self.gradient(weights), self.rows(weights)

    @property
    def dearest(self) -> jax.Array:
        """Cost of each term at unit weight on its dearest row, [K]."""
        cost = self.snapshot.curvature.edge_cost
        return jnp.max(cost, axis=tuple(range(1, cost.ndim)), initial=0.0)

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
    weights: jax.Array,
    dtype: Any,
    base_state: Any,
    params: jax.Array,
    extra_args: dict[str, Any],
) -> Proposal:
    x = here.snapshot.x
    gained = here.gradient(weights)
    if settings.row_gains:
        rows = here.rows(weights)
        # rows without curvature have no limit of their own; Armijo settles them
        rows = jnp.maximum(rows, 1e-6 * jnp.max(rows, initial=0.0))
        # the quotient first: gradient times target leaves float32 in small units of the energy
        gained = gained * (here.snapshot.target / jnp.where(rows > 0, rows, here.snapshot.target))
    gained = jnp.where(here.finite, gained, 0).astype(dtype)
    move, base_state = base.update(gained, base_state, params, **extra_args)
    move = here.box.project(x + move.astype(x.dtype)) - x
    gradient, declared_rows = here.declared(weights)
    factor = jnp.ones((), x.dtype)
    if settings.guard is not None:
        bend = vdot(declared_rows * move, move)
        if settings.guard == "measured":
            measured = directional_curvature(partial(here.energy, weights), x, move)
            # negative or vanishing curvature promises nothing: fall back on the bound
            bend = trusted_curvature(measured, bend)
        factor = guard_scale(gradient, move, bend, settings.target)
    move = jnp.where(factor > 0, factor * move, 0)
    return Proposal(
        move=move,
        base_state=base_state,
        reached=here.energy(weights, x + move),
        slope=vdot(gradient, move),
        cosine=cosine(move, -gradient),
        guard=factor,
    )
