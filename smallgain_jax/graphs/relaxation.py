"""Relaxation of an energy graph: a scan over optax updates inside a box."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import as_float, check_finite, float_dtype, is_concrete
from smallgain_jax.graphs.descent import MajorizedDescentState, majorized_descent
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.search.box import Box


class RelaxInfo(NamedTuple):
    """What happened during a relaxation."""

    steps: jax.Array  # [] int32, updates made before the tolerance was met
    converged: jax.Array  # [] bool, the tolerance was met
    optimality: jax.Array  # [] max |P(x - g) - x| at the end
    history: Any  # what `record` took from the optimizer's state, each leaf [steps, ...]


class RelaxResult(NamedTuple):
    """Outcome of `relax`."""

    x: jax.Array  # [n] or [n, d], the last accepted state
    energy: jax.Array  # [steps + 1] reference energy of each accepted state, start included
    info: RelaxInfo
    state: Any  # the optimizer's state, to continue from


def relax(
    graph: EnergyGraph,
    x0: ArrayLike,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
    *,
    tol: float | jax.Array = 0.0,
    record: Any = None,
    state: Any = None,
) -> RelaxResult:
    r"""Minimize a graph's reference energy over a box.

    A `lax.scan` over $x \leftarrow P(x + u)$ with u the optimizer's update for the gradient on the
    free nodes (those not held at a bound). Jittable and differentiable in the graph and the start
    (optimizers with loops of their own, such as optax's line searches, only forwards); `vmap`
    relaxes a batch. Line searches inside an optimizer see the energy of the projected state.

    Args:
      graph: the energy.
      x0: start [n] or [n, d], taken in the dtype of its energy; projected onto the box first.
      optimizer: any optax transformation; None is `majorized_descent`, the library's best.
      steps: number of updates, static.
      bounds: (lower, upper), scalars or shaped like x0; None for no box.
      tol: stop once max |P(x - g) - x| is at most this (units of x, as for an update of size one);
        the remaining entries of `energy` repeat the last.
      record: `record(optimizer_state) -> pytree`, taken after every update into `info.history`.
      state: optimizer state to continue from, as in `RelaxResult.state`.

    Returns:
      `RelaxResult(x, energy [steps + 1], info, state)`.

    Raises:
      ValueError: x0 does not fit the graph or is not finite (concrete), or lower > upper.

    >>> from smallgain_jax import Landau, Quadratic
    >>> graph = EnergyGraph(Landau(a=jnp.array([1.0, 1.0])), [Quadratic([0], [1], 0.5)])
    >>> relax(graph, jnp.array([1.0, 0.5]), steps=5).x.round(4).tolist()
    [0.0, 0.0]
    """
    x0 = as_float("x0", x0)
    if x0.ndim not in (1, 2) or x0.shape[0] != graph.num_nodes:
        raise ValueError(
            f"x0 has shape {x0.shape}, expected [{graph.num_nodes}] or [{graph.num_nodes}, d]"
        )
    check_finite("x0", x0)
    if steps < 0:
        raise ValueError(f"steps = {steps} must not be negative")
    box = _box(bounds, x0)
    return _relax(graph, x0, optimizer, steps, box, tol, record, state)


def _box(bounds: tuple[ArrayLike, ArrayLike] | None, x0: jax.Array) -> Box | None:
    if bounds is None:
        return None
    lower, upper = (jnp.asarray(end) for end in bounds)
    for name, end in (("lower", lower), ("upper", upper)):
        if end.shape not in ((), x0.shape):
            raise ValueError(f"bounds: {name} has shape {end.shape}, expected () or {x0.shape}")
    if is_concrete((lower, upper)) and not bool(jnp.all(lower <= upper)):
        raise ValueError("bounds: lower must not exceed upper")
    return Box(lower, upper)


def _stores_gradient(state: Any) -> bool:
    """Whether the optimizer kept value and gradient of where it went, as L-BFGS does."""
    found = [optax.tree.get_all_with_path(state, name) for name in ("value", "grad")]
    return all(len(hits) == 1 and hits[0][1] is not None for hits in found)


class _Carry(NamedTuple):
    x: jax.Array
    value: jax.Array
    gradient: jax.Array
    state: Any
    steps: jax.Array
    done: jax.Array


def _relax(
    graph: EnergyGraph,
    x0: jax.Array,
    optimizer: optax.GradientTransformation | None,
    steps: int,
    box: Box | None,
    tol: float | jax.Array,
    record: Any,
    state: Any,
) -> RelaxResult:
    given = (graph, x0, optimizer, box, record, state)
    data, rest = eqx.partition(given, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    leaves, structure = jax.tree.flatten(rest)
    # not `filter_jit`, which waits for the device: the host has telemetry to write meanwhile
    return _compiled(data, tol, tuple(leaves), structure, steps)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _compiled(
    data: Any, tol: float | jax.Array, leaves: tuple[Any, ...], structure: Any, steps: int
) -> RelaxResult:
    rest = jax.tree.unflatten(structure, leaves)
    graph, x0, optimizer, box, record, state = eqx.combine(data, rest)
    # in here: tracing the energy at every call would cost more than many a relaxation
    x0 = x0.astype(jax.eval_shape(graph.energy, x0).dtype)
    box = None if box is None else Box(*(end.astype(x0.dtype) for end in box))
    ours = optimizer is None
    optimizer = optax.with_extra_args_support(
        majorized_descent(graph) if optimizer is None else optimizer
    )
    everything = Box(-jnp.inf, jnp.inf) if box is None else box
    record = record or (lambda _: None)

    def objective(x: jax.Array, bounds: Any = None, graph: EnergyGraph = graph) -> jax.Array:
        # optax's line searches insist that value_fn names every extra argument of update
        del bounds
        return graph.energy(everything.project(x))

    def evaluate(x: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
        if isinstance(state, MajorizedDescentState):
            return state.value, state.grad
        if box is None and _stores_gradient(state):
            return optax.value_and_grad_from_state(objective)(x, state=state)
        # a stored gradient would be that of the projected objective, blind beyond the bound
        return graph.value_and_gradient(x)

    def optimality(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(everything.project(x - gradient) - x), initial=0.0)

    def advance(carry: _Carry) -> _Carry:
        x, value, gradient = carry.x, carry.value, carry.gradient
        free = gradient if ours else jnp.where(everything.blocks(x, -gradient), 0, gradient)
        updates, state = optimizer.update(
            free,
            carry.state,
            x,
            value=value,
            grad=free,
            value_fn=objective,
            bounds=None if box is None else tuple(box),
            # as an argument: what an optimizer closes over would be folded in as constants
            graph=graph,
        )
        x = everything.project(optax.apply_updates(x, updates))
        value, gradient = evaluate(x, state)
        done = optimality(x, gradient) <= tol
        return _Carry(x, value, gradient, state, carry.steps + 1, done)

    def step(carry: _Carry, _: None) -> tuple[_Carry, Any]:
        carry = jax.lax.cond(carry.done, lambda c: c, advance, carry)
        return carry, (carry.value, record(carry.state))

    x = everything.project(x0)
    if state is None:
        state = optimizer.init(x)
        value, gradient = graph.value_and_gradient(x)
    elif isinstance(state, MajorizedDescentState):
        # an infinite value: nothing is stored yet, as `init` leaves it
        fresh = partial(graph.value_and_gradient, x)
        value, gradient = jax.lax.cond(
            jnp.isfinite(state.value), lambda: (state.value, state.grad), fresh
        )
    else:
        value, gradient = evaluate(x, state)
    start = _Carry(
        x,
        value,
        gradient.astype(float_dtype(x)) if ours else gradient,
        state,
        jnp.zeros((), jnp.int32),
        optimality(x, gradient) <= tol,
    )
    end, (energies, history) = jax.lax.scan(step, start, length=steps)
    info = RelaxInfo(end.steps, end.done, optimality(end.x, end.gradient), history)
    return RelaxResult(end.x, jnp.concatenate([value[None], energies]), info, end.state)
