r"""Majorized descent: the library's own way to relax an energy graph.

Every row spends its own margin. The diagonal $D$ of (smoothed) Gershgorin row sums prices each
node, $z = D^{-1} g$ is the step that a diagonal majorizer favours most, and conjugate directions
accelerate it (Polak and Ribière 1969, with restart; preconditioned as in Nocedal and Wright,
*Numerical Optimization*, section 5.2). The length comes from the measured curvature along the
direction, $\alpha = -\langle g, p\rangle / p^\top H p$: two forward passes, no Hessian.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import cast_like, check_call, float_dtype
from smallgain_jax._show import shows
from smallgain_jax._tree import vdot
from smallgain_jax.graphs.contact import ROUNDS, Model, minimum
from smallgain_jax.graphs.graph import Evaluation, alike
from smallgain_jax.graphs.objective import Objective
from smallgain_jax.graphs.step import SUFFICIENT_ANGLE, Here, prices_of, searched
from smallgain_jax.search.box import Box
from smallgain_jax.search.guard import directional_curvature, trusted_curvature
from smallgain_jax.spectral.rows import Activity

SMOOTHING = 0.05
"""How hinges count in the default metric: the sigmoid of gap/eps, which suits states in [0, 1]."""

MEMORY = 0.9
"""Share of the last step's rows below which rows do not fall: across a kink they would jump."""

SETTLED = 3
"""So many steps in a row inside the box after one that it clipped, and conjugacy is looked at.

Before, nodes still go to their bounds: to restart at every clipped step would be too often.
"""

OVERLAP = 0.2
"""Share of a gradient, in the metric, that may lie along the one before (Powell 1977).

They are orthogonal where directions are conjugate. A direction conjugate to one that was not
followed spoils all that come after it: without a restart conjugate gradients converge no faster
than steepest descent (Crowder and Wolfe 1972).
"""

FORCING = 1e-2
"""To what part of its start a model in a box is minimized before anything is known of it."""

LOOSEST = 0.1
"""A model that missed the last gradient by this part of the one before is not minimized."""


class Metric(Protocol):
    """What conditions a gradient better than the rows alone, such as a hierarchy of aggregates."""

    def precondition(
        self, graph: Any, x: jax.Array, rows: jax.Array, free: jax.Array
    ) -> Callable[[jax.Array], jax.Array]:
        """A linear map g -> z, symmetric and positive definite on the free coordinates.

        Args:
          graph: the energy.
          x: state [n] or [n, d].
          rows: positive diagonal D that prices each coordinate, shaped like x.
          free: bool like x, False on coordinates held at a bound; g is 0 there, z is ignored.
        """


@runtime_checkable
class Renewable(Metric, Protocol):
    """A metric whose values are kept from step to step, and renewed where they changed.

    What `renewed` returns is a linear map as `Metric.precondition` gives, with its `values`.
    """

    def blank(self, x: jax.Array) -> Any:
        """A pytree of the values' shapes, from which the first are made."""

    def renewed(
        self, values: Any, graph: Any, x: jax.Array, rows: jax.Array, free: jax.Array
    ) -> Any:
        """The map for these arguments, made from `values` where those still serve."""


@runtime_checkable
class Modelled(Renewable, Protocol):
    """A renewable metric that is the inverse of a quadratic model which it can also multiply by."""

    def model(self, values: Any, graph: Any, x: jax.Array, rows: jax.Array) -> tuple[Model, Any]:
        """The model at x, and `values` as far as its cycle may start from them."""


class Linear(eqx.Module):
    """A metric without its model: a fixed number of operations, which reverse mode can follow."""

    metric: Renewable

    def precondition(
        self, graph: Any, x: jax.Array, rows: jax.Array, free: jax.Array
    ) -> Callable[[jax.Array], jax.Array]:
        return self.metric.precondition(graph, x, rows, free)

    def blank(self, x: jax.Array) -> Any:
        return self.metric.blank(x)

    def renewed(
        self, values: Any, graph: Any, x: jax.Array, rows: jax.Array, free: jax.Array
    ) -> Any:
        return self.metric.renewed(values, graph, x, rows, free)


@shows()
class DescentInfo(NamedTuple):
    """What a reader of one step may want to know."""

    accepted: jax.Array  # [] bool
    restarted: jax.Array  # [] bool, the direction was steepest descent in the metric
    step_size: jax.Array  # [] length taken along the direction
    last_step_backtracks: jax.Array  # [] int32
    total_backtracks: jax.Array  # [] int32
    lipschitz: jax.Array  # [] max_r D_r, the bound as priced


@shows()
class MajorizedDescentState(NamedTuple):
    """State of `majorized_descent`. Shapes are those of the graph's state x."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates so far
    value: jax.Array  # [] objective at the parameters, for optax.value_and_grad_from_state
    grad: jax.Array  # [n] its gradient there, on held nodes too
    magnitude: jax.Array  # [] sum of the absolute values of the terms there
    rows: jax.Array  # [n] D there
    prices: jax.Array  # [n] what the last step divided by: D, with a memory
    descent_gradient: jax.Array  # [n] gradient on the free nodes, one step ago
    scaled_norm: jax.Array  # [] <g, z> one step ago; 0 asks for a restart
    direction: jax.Array  # [n]
    unclipped: jax.Array  # [] int32, steps since the box clipped one, up to SETTLED
    stalled: jax.Array  # [] bool, the next step would stay here as well
    forcing: jax.Array  # [] to what part of its start a model in a box is minimized next
    metric_values: Any  # of a metric that keeps them, such as a hierarchy; else None
    info: DescentInfo


def majorized_descent(
    graph: Objective,
    *,
    smoothing: Activity | float | None = SMOOTHING,
    bounds: tuple[Any, Any] | None = None,
    max_backtracks: int = 30,
    metric: Metric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Conjugate, majorized descent on a graph's reference energy, as an optax transformation.

    One step: $z = D^{-1} g$ on the free nodes, or what another `metric` makes of g (a hierarchy in
    a box: the way back from the minimum of its quadratic model over the box, `graphs.contact`);
    $p = -z + \beta p$ with
    $\beta = \max(0, \langle z, g - g_{-}\rangle / \langle z_{-}, g_{-}\rangle)$, restarted where
    $p$ is not a direction of descent; $x \leftarrow P(x + t\,\alpha\,p)$ with $P$ the projection
    onto the box and t = 1, halved until Armijo's condition holds, or, where energies differ by no
    more than their rounding, the same condition on slopes (`search.armijo`). To that rounding, an
    accepted step never increases the energy; a failed search leaves the state where it was. No
    guarantee rests on the smoothing or the metric: they only choose directions.

    Args:
      graph: the energy to minimize.
      smoothing: how hinges count in D: a float eps for the sigmoid of gap/eps (units of the gap;
        0.05 suits states in [0, 1]), an activity, or None for always active.
      bounds: (lower, upper), scalars or shaped like x; None for no box. `relax` passes its own.
      max_backtracks: halvings before a search counts as failed.
      metric: an object with `precondition(graph, x, rows, free) -> (g -> z)`, symmetric and
        positive definite on the free nodes; None divides by the rows. The model of a hierarchy in a
        box is minimized by a loop, which has no reverse mode.

    Returns:
      An optax transformation whose `update` needs `params`; give it `value` to save an evaluation,
      or use `optax.value_and_grad_from_state`. A graph given to `update` as `graph`, alike in all
      but its numbers, takes the place of this one.

    Raises:
      ValueError: `update` without params.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.array([1.0, 1.0])), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer, x = majorized_descent(graph), jnp.array([1.0, -1.0])
    >>> updates, _ = optimizer.update(graph.gradient(x), optimizer.init(x), x)
    >>> graph.energy(optax.apply_updates(x, updates)).round(6).item()
    0.0
    """
    own, own_box = graph, Box(*bounds) if bounds is not None else Box(-jnp.inf, jnp.inf)

    def init(params: jax.Array) -> MajorizedDescentState:
        state = _zero_state(params, metric)
        if isinstance(params, jax.ShapeDtypeStruct):
            return state
        # compiled: the first rows of a run on the host would otherwise go operation by operation
        return state._replace(rows=_rows(own, jnp.asarray(params, state.grad.dtype), smoothing))

    def update(
        updates: jax.Array,
        state: MajorizedDescentState,
        params: jax.Array | None = None,
        *,
        value: jax.Array | None = None,
        bounds: tuple[Any, Any] | None = None,
        graph: Objective | None = None,
        evaluation: Evaluation | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, MajorizedDescentState]:
        del extra_args
        check_call(MajorizedDescentState, updates, state, params)
        graph = own if graph is None or not alike(graph, own) else graph
        x = jnp.asarray(params, state.grad.dtype)
        if evaluation is None:
            value = graph.energy(x) if value is None else jnp.asarray(value, x.dtype)
            evaluation = Evaluation(value, updates.astype(x.dtype), jnp.abs(value))
        box = own_box if bounds is None else Box(*bounds)
        # rows that have never misled a step need none
        memory = jnp.where(state.info.total_backtracks > 0, MEMORY, 0.0)
        rows = jnp.maximum(state.rows, memory.astype(x.dtype) * state.prices)
        here = Here(graph, x, *evaluation, rows, box)
        step, new_state = _step(here, state, metric, max_backtracks)
        new_state = new_state._replace(rows=graph.rows(x + step, smoothing))
        return step.astype(updates.dtype), cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


@eqx.filter_jit
def _rows(graph: Objective, x: jax.Array, smoothing: Activity | float | None) -> jax.Array:
    return graph.rows(x, smoothing)


def _zero_state(params: Any, metric: Metric | None) -> MajorizedDescentState:
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
        magnitude=scalar(),
        rows=like(),
        prices=like(),
        descent_gradient=like(),
        scaled_norm=scalar(),
        direction=like(),
        unclipped=jnp.full((), SETTLED, jnp.int32),
        stalled=jnp.zeros((), bool),
        forcing=scalar(FORCING),
        metric_values=metric.blank(like()) if isinstance(metric, Renewable) else None,
        info=info,
    )


def _step(
    here: Here, state: MajorizedDescentState, metric: Metric | None, max_backtracks: int
) -> tuple[jax.Array, MajorizedDescentState]:
    free = here.free_gradient
    prices = prices_of(here, free)
    aim = _aimed(here, state, free, prices, metric)
    direction, restarted = _direction(here, state, free, aim.scaled)
    # directions are conjugate on free nodes only: a new contact begins anew
    direction = jnp.where(aim.touches, -aim.scaled, direction)
    restarted |= aim.touches
    length = _length(here, aim, free, direction, prices)
    search = searched(here, direction * length, max_backtracks)

    moved, reached = search.trial.aux
    accepted = search.accepted
    forcing = _forcing(here, state.forcing, aim, moved, reached.gradient)
    step = jnp.where(accepted, moved, 0)
    end = here.x + search.step * length * direction
    clipped = jnp.any(here.box.project(end) != end)
    # the same step would be tried again, or x cannot hold so small a one
    rounding = jnp.finfo(step.dtype).eps * jnp.abs(here.x)
    stalled = jnp.where(accepted, jnp.all(jnp.abs(step) <= rounding), restarted)
    info = DescentInfo(
        accepted,
        restarted,
        jnp.where(accepted, search.step * length, 0),
        search.backtracks,
        state.info.total_backtracks + search.backtracks,
        jnp.max(here.rows, initial=0.0),
    )
    new_state = MajorizedDescentState(
        count=optax.safe_increment(state.count),
        value=jnp.where(accepted, reached.value, here.value),
        grad=jnp.where(accepted, reached.gradient, here.gradient),
        magnitude=jnp.where(accepted, reached.magnitude, here.magnitude),
        rows=state.rows,
        prices=here.rows,
        descent_gradient=free,
        scaled_norm=jnp.where(accepted & ~aim.touches, vdot(aim.scaled, free), 0),
        direction=direction,
        unclipped=jnp.where(clipped, 0, jnp.minimum(state.unclipped + 1, SETTLED)),
        stalled=stalled | aim.rests,
        forcing=jnp.where(accepted, forcing, state.forcing),
        metric_values=aim.kept,
        info=info,
    )
    return step, new_state


class _Aim(NamedTuple):
    """Where a metric would go."""

    scaled: jax.Array  # like x, z: the way back from there
    kept: Any  # the metric's values
    touches: Any = False  # [] bool, z is a model's and ends with other nodes at bounds
    bend: Any = 0.0  # [] z^T M z, where it touches
    product: Callable[[jax.Array], jax.Array] | None = None  # v -> M v, of a model
    rests: Any = False  # [] bool, a model sees nothing but rounding in the gradient


def _aimed(
    here: Here,
    state: MajorizedDescentState,
    free: jax.Array,
    prices: jax.Array,
    metric: Metric | None,
) -> _Aim:
    if isinstance(metric, Modelled) and not here.box.absent:
        return _modelled(here, state, free, prices, metric)
    return _Aim(*_scaled(here, free, prices, metric, state.metric_values))


def _modelled(
    here: Here, state: MajorizedDescentState, free: jax.Array, prices: jax.Array, metric: Modelled
) -> _Aim:
    """The minimum of the metric's model over the box; where it misled, its first direction only."""
    x, box, eps = here.x, here.box, jnp.finfo(here.x.dtype).eps
    # the box itself is in the model: only rows without curvature need its price
    rows = jnp.where(here.rows > 0, here.rows, prices)
    model, values = metric.model(state.metric_values, here.objective, x, rows)
    trusted = state.forcing < LOOSEST
    found, kept = minimum(
        model,
        x,
        here.gradient,
        box,
        values,
        precision=state.forcing,
        resolution=eps * (jnp.abs(here.gradient) + rows * jnp.max(jnp.abs(x), initial=0.0)),
        most=jnp.where(trusted, ROUNDS, 1),
    )
    step = found.y - x
    scaled = jnp.where(trusted, -step, jnp.where(here.held, 0, -found.direction))
    falls = vdot(scaled, here.gradient) > 0
    moves = jnp.any(box.touches(found.y) != box.touches(x))
    return _Aim(
        scaled=jnp.where(falls, scaled, free / prices),
        kept=kept,
        touches=trusted & falls & moves,
        bend=-vdot(step, here.gradient + found.left),
        product=model.product,
        rests=found.rounds == 0,
    )


def _forcing(
    here: Here, before: jax.Array, aim: _Aim, moved: jax.Array, reached: jax.Array
) -> jax.Array:
    """By how much the model missed the gradient (Eisenstat and Walker 1996, choice 1)."""
    if aim.product is None:
        return before
    missed = jnp.max(jnp.abs(reached - here.gradient - aim.product(moved)), initial=0.0)
    norm = jnp.max(jnp.abs(here.free_gradient), initial=0.0)
    least = jnp.sqrt(jnp.finfo(norm.dtype).eps)
    return jnp.clip(missed / jnp.where(norm > 0, norm, 1), least, LOOSEST)


def _scaled(
    here: Here, free: jax.Array, prices: jax.Array, metric: Metric | None, kept: Any
) -> tuple[jax.Array, Any]:
    """z, the gradient on the free nodes as the metric sees it, and the metric's values."""
    divided = free / prices
    if metric is None:
        return divided, kept
    where = (here.objective, here.x, prices, ~here.held)
    if isinstance(metric, Renewable):
        apply = metric.renewed(kept, *where)
        kept = apply.values
    else:
        apply = metric.precondition(*where)
    scaled = jnp.where(here.held, 0, apply(free))
    # where curvature is negative a metric built from it need not descend
    return jnp.where(vdot(scaled, free) > 0, scaled, divided), kept


def _direction(
    here: Here, state: MajorizedDescentState, gradient: jax.Array, scaled: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Polak-Ribiere direction, and whether it had to restart."""
    steepest = vdot(scaled, gradient)
    change = vdot(scaled, gradient - state.descent_gradient)
    spoiled = jnp.abs(steepest - change) > OVERLAP * steepest
    known = (state.scaled_norm > 0) & ~(spoiled & (state.unclipped >= SETTLED))
    beta = jnp.where(known, change / jnp.where(known, state.scaled_norm, 1), 0)
    direction = jnp.maximum(beta, 0) * state.direction - scaled
    direction = jnp.where(here.box.blocks(here.x, direction), 0, direction)
    descends = vdot(direction, gradient) <= -SUFFICIENT_ANGLE * steepest
    return jnp.where(descends, direction, -scaled), ~descends | (beta <= 0)


def _length(
    here: Here, aim: _Aim, gradient: jax.Array, direction: jax.Array, prices: jax.Array
) -> jax.Array:
    """Minimizer of the quadratic model along the direction."""
    measured = directional_curvature(here.objective.energy, here.x, direction)
    # rows without curvature of their own count by what the box lends them
    measured += vdot((prices - here.rows) * direction, direction)
    majorized = vdot(prices * direction, direction)
    curvature = trusted_curvature(measured, majorized)
    curvature = jnp.where(curvature > 0, curvature, 1)
    # what the model takes to a bound has to arrive: the whole way at least, and a rounding more
    whole = jnp.maximum(aim.bend / curvature, 1) * (1 + 8 * jnp.finfo(curvature.dtype).eps)
    return jnp.where(aim.touches, whole, -vdot(gradient, direction) / curvature)
