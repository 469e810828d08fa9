"""The loop of `relax`: optax updates inside a box until converged, stalled, or out of steps."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import cast_like
from smallgain_jax._tree import still
from smallgain_jax.graphs.descent import SMOOTHING
from smallgain_jax.graphs.graph import Evaluation
from smallgain_jax.graphs.objective import Objective
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import RelaxStatus, length_scale, optimality, projected_step

SAME = 64
"""Units in the last place by which a stored gradient may differ from the present one."""


@runtime_checkable
class Informed(Protocol):
    """A state that knows the objective where its optimizer went, as `MajorizedDescentState` does.

    The update that returned it must have been the last to touch the parameters. An infinite
    `value` says that nothing is known yet.
    """

    value: jax.Array
    grad: jax.Array
    magnitude: jax.Array
    rows: jax.Array
    stalled: jax.Array


class Run(NamedTuple):
    """What stays the same from step to step."""

    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    box: Box | None
    tol: jax.Array  # []
    record: Callable[[Any], Any]

    @property
    def walls(self) -> Box:
        return Box(-jnp.inf, jnp.inf) if self.box is None else self.box


class Iterate(NamedTuple):
    """A state of the loop."""

    x: jax.Array
    here: Evaluation
    rows: jax.Array  # like x, what the measure of optimality divides by
    scale: jax.Array  # like x, what it is relative to
    state: Any
    steps: jax.Array  # [] int32
    status: jax.Array  # [] int32, STEPS while it goes on
    optimality: jax.Array  # []

    @property
    def ended(self) -> jax.Array:
        return self.status != RelaxStatus.STEPS


class Path(NamedTuple):
    """Where a run ended and what it left on the way."""

    end: Iterate
    energies: jax.Array  # [capacity + 1]
    history: Any  # each leaf [capacity, ...]


def start(run: Run, x0: jax.Array, state: Any) -> Iterate:
    """The first iterate, at x0 or where `state` left off."""
    x = run.walls.project(x0)
    if state is None:
        state, here = run.optimizer.init(x), run.objective.evaluate(x)
    elif isinstance(state, Informed):
        here, state = _continued(run, x, state)
    else:
        here = _evaluate(run, x, state)
    here = _cast(here, x)
    informed = isinstance(state, Informed)
    rows = state.rows if informed else run.objective.rows(x, SMOOTHING)
    rows = jax.lax.stop_gradient(rows.astype(x.dtype))
    step = projected_step(*jax.lax.stop_gradient((x, here.gradient)), rows, run.walls)
    zero = jnp.zeros((), jnp.int32)
    first = Iterate(
        x,
        here,
        rows,
        length_scale(jax.lax.stop_gradient(x), step, run.walls),
        state,
        zero,
        zero,
        here.value,
    )
    return _judged(run, first)


def _continued(run: Run, x: jax.Array, state: Any) -> tuple[Evaluation, Any]:
    """What a state knows, if it is of this graph at these parameters; else a new start.

    Who relaxes again with other targets, weights or parameters hands over a state that knows
    another objective; what it stored agrees with the present one to rounding, or is forgotten.
    """
    if state.grad.shape != x.shape:
        raise ValueError(
            f"state is of parameters of shape {state.grad.shape}, not {x.shape}: it goes on with "
            "the graph and the x that it was made for"
        )
    fresh = _cast(run.objective.evaluate(x), x)
    rows = run.objective.rows(x, SMOOTHING).astype(x.dtype)
    rounding = SAME * jnp.finfo(x.dtype).eps * (jnp.abs(fresh.gradient) + rows * (1 + jnp.abs(x)))
    same = jnp.isfinite(state.value) & jnp.all(jnp.abs(state.grad - fresh.gradient) <= rounding)
    stored = _cast(Evaluation(state.value, state.grad, state.magnitude), x)
    begun = run.optimizer.init(x)
    made: Any = jax.tree.structure(state)
    if made != jax.tree.structure(begun):
        raise ValueError("state was made with another metric or optimizer: it goes on with its own")
    found: tuple[Evaluation, Any] = jax.lax.cond(
        same, lambda: (stored, state), lambda: (fresh, cast_like(begun, state))
    )
    return found


def loop(run: Run, first: Iterate, limit: jax.Array, capacity: int) -> Path:
    """At most `limit` steps; no reverse mode, and nothing is computed after the end."""
    energies = jnp.zeros(capacity + 1, first.x.dtype).at[0].set(first.here.value)
    kept = jax.eval_shape(run.record, first.state)
    history = jax.tree.map(lambda a: jnp.zeros((capacity, *a.shape), a.dtype), kept)
    if not capacity:
        # nothing could be written into an empty history, not even in a step that is never made
        return Path(first, energies, history)

    def going(path: Path) -> jax.Array:
        return ~path.end.ended & (path.end.steps < limit)

    def step(path: Path) -> Path:
        end = advance(run, path.end)
        energies = path.energies.at[end.steps].set(end.here.value)
        keep = partial(jax.tree.map, lambda all_, one: all_.at[end.steps - 1].set(one))
        return Path(end, energies, keep(path.history, run.record(end.state)))

    path = jax.lax.while_loop(going, step, Path(first, energies, history))
    return _filled(run, path, capacity)


def unrolled(run: Run, first: Iterate, steps: int) -> Path:
    """The same under `scan`, for reverse mode through the steps.

    Segments of about sqrt(steps) are computed again on the way back, so that memory grows with the
    square root of the steps (Griewank 1992).
    """
    length = max(1, math.isqrt(steps))
    segments = -(-steps // length)

    def step(iterate: Iterate, _: None) -> tuple[Iterate, Any]:
        over = iterate.ended | (iterate.steps >= steps)
        iterate = jax.lax.cond(over, lambda it: it, partial(advance, run), iterate)
        return iterate, (iterate.here.value, run.record(iterate.state))

    @partial(jax.checkpoint, prevent_cse=False)
    def segment(iterate: Iterate, _: None) -> tuple[Iterate, Any]:
        return jax.lax.scan(step, iterate, length=length)

    end, kept = jax.lax.scan(segment, first, length=segments)
    kept = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:steps], kept)
    energies, history = kept
    return Path(end, jnp.concatenate([first.here.value[None], energies]), history)


def _filled(run: Run, path: Path, capacity: int) -> Path:
    """Entries after the end repeat the last."""
    made, last = path.end.steps, run.record(path.end.state)
    after = jnp.arange(capacity + 1) > made

    def fill(all_: jax.Array, one: jax.Array) -> jax.Array:
        return jnp.where(after[1:].reshape(-1, *(1,) * one.ndim), one, all_)

    energies = jnp.where(after, path.end.here.value, path.energies)
    return Path(path.end, energies, jax.tree.map(fill, path.history, last))


def advance(run: Run, it: Iterate) -> Iterate:
    """One update of the optimizer, projected, and what is known there."""
    free = jnp.where(run.walls.blocks(it.x, -it.here.gradient), 0, it.here.gradient)
    updates, state = run.optimizer.update(
        free,
        it.state,
        it.x,
        value=it.here.value,
        grad=free,
        value_fn=partial(_projected_energy, run),
        bounds=None if run.box is None else tuple(run.box),
        # as an argument: what an optimizer closes over would be folded in as constants
        graph=run.objective,
        evaluation=it.here,
    )
    x = run.walls.project(optax.apply_updates(it.x, updates))
    here = _cast(_evaluate(run, x, state), x)
    return _judged(run, it._replace(x=x, here=here, state=state, steps=it.steps + 1))


def _projected_energy(
    run: Run, x: jax.Array, bounds: Any = None, graph: Any = None, evaluation: Any = None
) -> jax.Array:
    # optax's line searches insist that value_fn names every extra argument of update
    del bounds, graph, evaluation
    return run.objective.energy(run.walls.project(x))


def _evaluate(run: Run, x: jax.Array, state: Any) -> Evaluation:
    if isinstance(state, Informed):
        return _cast(Evaluation(state.value, state.grad, state.magnitude), x)
    if run.box is None and _stores_gradient(state):
        energy = optax.value_and_grad_from_state(partial(_projected_energy, run))
        value, gradient = energy(x, state=state)
        return Evaluation(value, gradient, jnp.abs(value))
    # a stored gradient would be that of the projected objective, blind beyond the bound
    return run.objective.evaluate(x)


def _cast(here: Evaluation, x: jax.Array) -> Evaluation:
    return Evaluation(*(part.astype(x.dtype) for part in here))


def _stores_gradient(state: Any) -> bool:
    """Whether the optimizer kept value and gradient of where it went, as L-BFGS does."""
    found = [optax.tree.get_all_with_path(state, name) for name in ("value", "grad")]
    return all(len(hits) == 1 and hits[0][1] is not None for hits in found)


def _judged(run: Run, it: Iterate) -> Iterate:
    """Whether it has ended here, and why."""
    x, gradient = jax.lax.stop_gradient((it.x, it.here.gradient))
    walls, objective = still((run.walls, run.objective))

    def measure(rows: jax.Array) -> jax.Array:
        return optimality(projected_step(x, gradient, rows, walls), it.scale)

    if isinstance(it.state, Informed):
        rows = jax.lax.stop_gradient(it.state.rows.astype(x.dtype))
        stalled = it.state.stalled
        # a small priced step may be the foot of a long valley: the value must rest as well
        rests = stalled | (getattr(it.state, "decrease", 0.0) <= run.tol)
    else:
        # new rows cost as much as a step: those known serve until it has converged by them
        rows = jax.lax.cond(
            measure(it.rows) <= run.tol,
            lambda: objective.rows(x, SMOOTHING).astype(x.dtype),
            lambda: it.rows,
        )
        stalled, rests = jnp.zeros((), bool), jnp.ones((), bool)
    reached = measure(rows)
    finite = jnp.isfinite(it.here.value) & jnp.all(jnp.isfinite(gradient))
    status = jnp.where(stalled, RelaxStatus.STALLED, RelaxStatus.STEPS)
    status = jnp.where((reached <= run.tol) & rests, RelaxStatus.CONVERGED, status)
    status = jnp.where(finite, status, RelaxStatus.NOT_FINITE).astype(jnp.int32)
    return it._replace(rows=rows, status=status, optimality=reached)
