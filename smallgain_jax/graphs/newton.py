r"""Truncated Newton steps over a box: how `relax` minimizes a function.

Rows price every coordinate on its own, which is what a graph's local couplings want. A function
may couple everything with everything, and then its Hessian has to be asked. One step holds two
kinds of coordinates apart (the two-metric projection of Bertsekas 1982, section 2):

- *going*: those that the priced step $-D^{-1} g$ takes to a bound, or keeps there. They take it;
- *free*: all others. They take the Newton step for what the going ones leave,
  $H_{FF}\, p_F = -(g_F + H_{FG}\, p_G)$, by conjugate gradients on Hessian-vector products,
  preconditioned by D (Dembo and Steihaug 1983). These stop at a residual of
  $\min(1/2, \|g\| / \|g_-\|)$ of the start's, which makes convergence superlinear (Eisenstat and
  Walker 1996), or after a direction d of negative curvature, which is followed as far as
  $|d^\top H d|$ says: to leave it out would end at saddles.

The move is $P(x + t p) - x$, t = 1 halved until Armijo's condition holds. Where the coupling of the
two kinds, or a curvature, has made p no direction of descent, it is $-D^{-1} g$.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import cast_like, float_dtype
from smallgain_jax._show import shows
from smallgain_jax._tree import vdot
from smallgain_jax.graphs.graph import Evaluation
from smallgain_jax.graphs.objective import Objective
from smallgain_jax.graphs.step import Here, prices_of, searched
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import projected_step
from smallgain_jax.spectral.conjugate import Conjugate, conjugate_gradients

LEAST_ANGLE = 1e-12
"""A Newton direction must keep this share of the priced step's slope: beyond it rounding rules."""

STRAIGHT = 1e-3
"""Where the objective does not bend up, curvatures count as at least this share of the rows'."""

BACKTRACKS = 40


@shows()
class NewtonInfo(NamedTuple):
    """What a reader of one step may want to know."""

    accepted: jax.Array  # [] bool
    products: jax.Array  # [] int32, Hessian-vector products for the direction
    total_products: jax.Array  # [] int32
    last_step_backtracks: jax.Array  # [] int32
    total_backtracks: jax.Array  # [] int32


@shows()
class NewtonState(NamedTuple):
    """State of `truncated_newton`. Shapes are those of x."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates so far
    value: jax.Array  # [] objective at the parameters
    grad: jax.Array  # [n] its gradient there
    magnitude: jax.Array  # [] what the rounding of the value scales with
    rows: jax.Array  # [n] D there
    fallen: jax.Array  # [] by how much the value has fallen since the start
    decrease: jax.Array  # [] by how much at the last step, relative to the value
    norm: jax.Array  # [] of the free gradient one step ago, in the metric; 0 at the start
    plain: jax.Array  # [] bool, a Newton step was refused: the next one is priced only
    stalled: jax.Array  # [] bool, the next step would stay here as well
    info: NewtonInfo


def truncated_newton(objective: Objective) -> optax.GradientTransformationExtraArgs:
    """The steps of this module as an optax transformation, for `relax`.

    `update` takes the bounds and what is known at the parameters as extra arguments, as
    `majorized_descent` does.
    """

    def init(params: jax.Array) -> NewtonState:
        dtype = float_dtype(params)

        def scalar(fill: float = 0.0) -> jax.Array:
            return jnp.full((), fill, dtype)

        def counter() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        return NewtonState(
            count=counter(),
            value=scalar(jnp.inf),
            grad=jnp.zeros(params.shape, dtype),
            magnitude=scalar(),
            rows=objective.rows(params.astype(dtype)),
            fallen=scalar(),
            decrease=scalar(),
            norm=scalar(),
            plain=jnp.zeros((), bool),
            stalled=jnp.zeros((), bool),
            info=NewtonInfo(jnp.ones((), bool), counter(), counter(), counter(), counter()),
        )

    def update(
        updates: jax.Array,
        state: NewtonState,
        params: jax.Array,
        *,
        evaluation: Evaluation,
        bounds: tuple[Any, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, NewtonState]:
        del extra_args
        box = Box(-jnp.inf, jnp.inf) if bounds is None else Box(*bounds)
        here = Here(objective, params, *evaluation, state.rows, box)
        step, new_state = _step(here, state)
        new_state = new_state._replace(rows=objective.rows(params + step))
        return step.astype(updates.dtype), cast_like(new_state, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(here: Here, state: NewtonState) -> tuple[jax.Array, NewtonState]:
    prices = prices_of(here, here.free_gradient)
    priced = projected_step(here.x, here.gradient, prices, here.box)
    going = (here.x + priced <= here.box.lower) | (here.x + priced >= here.box.upper)
    inside = jnp.where(going, 0, here.gradient)
    norm = jnp.sqrt(vdot(inside, inside / prices))

    known = state.norm > 0
    precision = jnp.minimum(0.5, jnp.where(known, norm / jnp.where(known, state.norm, 1), 1))
    newton, products = _newton(here, priced, going, prices, jnp.where(state.plain, 1, precision))
    newton = jnp.where(here.box.blocks(here.x, newton), 0, newton)
    slope, steepest = (vdot(move, here.gradient) for move in (newton, priced))
    descends = ~state.plain & (slope <= LEAST_ANGLE * steepest)
    search = searched(here, jnp.where(descends, newton, priced), BACKTRACKS)

    moved, reached = search.trial.aux
    accepted = search.accepted
    step = jnp.where(accepted, moved, 0)
    rounding = jnp.finfo(step.dtype).eps * jnp.abs(here.x)
    unmoved = jnp.all(jnp.abs(step) <= rounding)
    drop = jnp.where(accepted, here.value - reached.value, 0)
    # what has fallen to nothing beside the start is small however it goes on falling
    least = jnp.finfo(step.dtype).eps ** (4 / 3) * (state.fallen + drop)
    size = jnp.maximum(jnp.abs(reached.value), least)
    info = NewtonInfo(
        accepted,
        products,
        state.info.total_products + products,
        search.backtracks,
        state.info.total_backtracks + search.backtracks,
    )
    return step, NewtonState(
        count=optax.safe_increment(state.count),
        value=jnp.where(accepted, reached.value, here.value),
        grad=jnp.where(accepted, reached.gradient, here.gradient),
        magnitude=jnp.where(accepted, reached.magnitude, here.magnitude),
        rows=state.rows,
        fallen=state.fallen + drop,
        decrease=jnp.where(size > 0, drop / jnp.where(size > 0, size, 1), 0),
        norm=norm,
        plain=~accepted,
        stalled=jnp.where(accepted, unmoved, ~descends),
        info=info,
    )


def _newton(
    here: Here, priced: jax.Array, going: jax.Array, prices: jax.Array, precision: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The step, and the Hessian-vector products that it took."""
    product = jax.linearize(here.objective.gradient, here.x)[1]
    left = jnp.where(going, priced, 0)
    right = jnp.where(going, 0, -here.gradient - product(left))
    limit, eps = 2 * here.x.size + 9, jnp.finfo(here.x.dtype).eps

    def proceeding(c: Conjugate) -> jax.Array:
        return (c.norm > precision**2 * c.first) & (c.steps < limit)

    def curved(bend: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        majorized = vdot(direction, prices * direction)
        convex = bend > eps * majorized
        # where it bends down, as far as if it bent up; and not without end where it is straight
        return jnp.where(convex, bend, jnp.maximum(jnp.abs(bend), STRAIGHT * majorized)), convex

    end = conjugate_gradients(
        lambda v: jnp.where(going, 0, product(v)), right, lambda r: r / prices, proceeding, curved
    )
    return end.solution + left, end.steps + 1  # and that with `left`
