r"""Majorized descent: the library's own way to relax an energy graph.

Every row spends its own margin. The diagonal $D$ of (smoothed) Gershgorin row sums prices each
node, $z = D^{-1} g$ is the step that a diagonal majorizer favours most, and conjugate directions
accelerate it (Polak and Ribière 1969, with restart; preconditioned as in Nocedal and Wright,
*Numerical Optimization*, section 5.2). The length comes from the measured curvature along the
direction, $\alpha = -\langle g, p\rangle / p^\top H p$: two forward passes, no Hessian.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, float_dtype
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.search.armijo import Search, Trial, armijo
from smallgain_jax.search.box import Box
from smallgain_jax.search.guard import directional_curvature
from smallgain_jax.spectral.rows import Activity

SUFFICIENT_ANGLE = 0.1
"""A direction must keep this share of the steepest one's slope, in D's metric, or it restarts."""


class DescentInfo(NamedTuple):
    """What a reader of one step may want to know."""

    accepted: jax.Array  # [] bool
    restarted: jax.Array  # [] bool, the direction was steepest descent in D's metric
    step_size: jax.Array  # [] length taken along the direction
    last_step_backtracks: jax.Array  # [] int32
    total_backtracks: jax.Array  # [] int32
    lipschitz: jax.Array  # [] max_r D_r, the bound as priced


class MajorizedDescentState(NamedTuple):
    """State of `majorized_descent`. Shapes are those of the graph's state x."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates so far
    value: jax.Array  # [] objective at the parameters, for optax.value_and_grad_from_state
    grad: jax.Array  # [n] its gradient there
    descent_gradient: jax.Array  # [n] gradient on the free nodes, one step ago
    scaled_norm: jax.Array  # [] <g, D^-1 g> one step ago; 0 asks for a restart
    direction: jax.Array  # [n]
    info: DescentInfo


def majorized_descent(
    graph: EnergyGraph,
    *,
    smoothing: Activity | float | None = 0.05,
    bounds: tuple[Any, Any] | None = None,
    max_backtracks: int = 30,
) -> optax.GradientTransformationExtraArgs:
    r"""Conjugate, majorized descent on a graph's reference energy, as an optax transformation.

    One step: $z = D^{-1} g$ on the free nodes; $p = -z + \beta p$ with
    $\beta = \max(0, \langle z, g - g_{-}\rangle / \langle z_{-}, g_{-}\rangle)$, restarted where
    $p$ is not a direction of descent; $x \leftarrow P(x + t\,\alpha\,p)$ with $P$ the projection
    onto the box and t = 1, halved until Armijo's condition holds. An accepted step never increases
    the energy; a failed search leaves the state where it was. No guarantee rests on the smoothing:
    it only chooses the metric.

    Args:
      graph: the energy to minimize.
      smoothing: how hinges count in D: a float eps for the sigmoid of gap/eps (units of the gap;
        0.05 suits states in [0, 1]), an activity, or None for always active.
      bounds: (lower, upper), scalars or shaped like x; None for no box. `relax` passes its own.
      max_backtracks: halvings before a search counts as failed.

    Returns:
      An optax transformation whose `update` needs `params`; give it `value` to save an evaluation,
      or use `optax.value_and_grad_from_state`, as `relax` does.

    Raises:
      ValueError: `update` without params.

    >>> from smallgain_jax import Landau, Quadratic
    >>> graph = EnergyGraph(Landau(a=jnp.array([1.0, 1.0])), [Quadratic([0], [1], 0.5)])
    >>> optimizer, x = majorized_descent(graph), jnp.array([1.0, -1.0])
    >>> updates, _ = optimizer.update(graph.gradient(x), optimizer.init(x), x)
    >>> graph.energy(optax.apply_updates(x, updates)).round(6).item()
    0.0
    """
    own_box = None if bounds is None else Box(*bounds)

    def init(params: jax.Array) -> MajorizedDescentState:
        dtype = float_dtype(params)

        # every field its own buffer: a donated state may not alias itself
        def like() -> jax.Array:
            return jnp.zeros(params.shape, dtype)

        def scalar(fill: float = 0.0) -> jax.Array:
            return jnp.full((), fill, dtype)

        def counter() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        info = DescentInfo(
            accepted=jnp.ones((), bool),
            restarted=jnp.ones((), bool),
            step_size=scalar(),
            last_step_backtracks=counter(),
            total_backtracks=counter(),
            lipschitz=scalar(),
        )
        # an infinite value tells value_and_grad_from_state that nothing is stored yet
        return MajorizedDescentState(
            count=counter(),
            value=scalar(jnp.inf),
            grad=like(),
            descent_gradient=like(),
            scaled_norm=scalar(),
            direction=like(),
            info=info,
        )

    def update(
        updates: jax.Array,
        state: MajorizedDescentState,
        params: jax.Array | None = None,
        *,
        value: jax.Array | None = None,
        bounds: tuple[Any, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, MajorizedDescentState]:
        del extra_args
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        box = Box(*bounds) if bounds is not None else own_box or Box(-jnp.inf, jnp.inf)
        dtype = state.grad.dtype
        x, gradient = params.astype(dtype), updates.astype(dtype)
        value = graph.energy(x) if value is None else jnp.asarray(value, dtype)

        rows = graph.curvature(x, smoothing=smoothing).row_sums
        free = jnp.where(box.blocks(x, -gradient), 0, gradient)
        metric = _metric(rows, free, box)
        scaled = free / metric
        direction, restarted = _direction(state, x, free, scaled, box)
        length = _length(graph, x, free, direction, rows, metric)
        search = _search(graph, box, x, gradient, direction * length, value, max_backtracks)

        moved, new_gradient = search.trial.aux
        accepted = search.accepted
        step = jnp.where(accepted, moved, 0)
        info = DescentInfo(
            accepted,
            restarted,
            jnp.where(accepted, search.step * length, 0),
            search.backtracks,
            state.info.total_backtracks + search.backtracks,
            jnp.max(rows, initial=0.0),
        )
        new_state = MajorizedDescentState(
            optax.safe_increment(state.count),
            jnp.where(accepted, search.trial.value, value),
            jnp.where(accepted, new_gradient, gradient),
            free,
            jnp.where(accepted, optax.tree.vdot(scaled, free), 0),
            direction,
            info,
        )
        return step.astype(updates.dtype), cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _metric(rows: jax.Array, gradient: jax.Array, box: Box) -> jax.Array:
    """D, kept away from zero: no row asks for more than the width of the box."""
    floor = jnp.finfo(rows.dtype).eps * jnp.max(rows, initial=0.0)
    width = jnp.asarray(box.upper, rows.dtype) - jnp.asarray(box.lower, rows.dtype)
    reach = jnp.abs(gradient) / jnp.where(width > 0, width, 1)
    metric = jnp.maximum(jnp.maximum(rows, reach), floor)
    return jnp.where(metric > 0, metric, 1)


def _direction(
    state: MajorizedDescentState, x: jax.Array, gradient: jax.Array, scaled: jax.Array, box: Box
) -> tuple[jax.Array, jax.Array]:
    """Polak-Ribiere direction, and whether it had to restart."""
    steepest = jnp.vdot(scaled, gradient)
    known = state.scaled_norm > 0
    change = jnp.vdot(scaled, gradient - state.descent_gradient)
    beta = jnp.where(known, change / jnp.where(known, state.scaled_norm, 1), 0)
    direction = jnp.maximum(beta, 0) * state.direction - scaled
    direction = jnp.where(box.blocks(x, direction), 0, direction)
    descends = jnp.vdot(direction, gradient) <= -SUFFICIENT_ANGLE * steepest
    return jnp.where(descends, direction, -scaled), ~descends | (beta <= 0)


def _length(
    graph: EnergyGraph,
    x: jax.Array,
    gradient: jax.Array,
    direction: jax.Array,
    rows: jax.Array,
    metric: jax.Array,
) -> jax.Array:
    """Minimizer of the quadratic model along the direction."""

    measured = directional_curvature(graph.energy, x, direction)
    # rows without curvature of their own count by what the box lends them
    measured += jnp.vdot((metric - rows) * direction, direction)
    majorized = jnp.vdot(metric * direction, direction)
    curvature = jnp.where(measured > 1e-3 * majorized, measured, majorized)
    return -jnp.vdot(gradient, direction) / jnp.where(curvature > 0, curvature, 1)


def _search(
    graph: EnergyGraph,
    box: Box,
    x: jax.Array,
    gradient: jax.Array,
    move: jax.Array,
    value: jax.Array,
    max_backtracks: int,
) -> Search:
    def trial(step: jax.Array) -> Trial:
        candidate = box.project(x + step * move)
        new_value, new_gradient = graph.value_and_gradient(candidate)
        finite = jnp.all(jnp.isfinite(new_gradient))
        new_value = jnp.where(finite, new_value, jnp.inf)
        moved = candidate - x
        return Trial(new_value, jnp.vdot(gradient, moved), (moved, new_gradient))

    return armijo(trial, value, max_backtracks=max_backtracks)
