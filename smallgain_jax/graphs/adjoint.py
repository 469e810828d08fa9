r"""The derivative of a minimizer over a box, by the implicit function theorem.

At a minimizer $x^*$ of $F(x; \theta)$ over the box, let A be its *free* coordinates. There
$\partial F/\partial x_A = 0$, hence

$$ dx_A = -H_{AA}^{-1} \left( \frac{\partial^2 F}{\partial x_A \partial \theta}\, d\theta
   + H_{AB}\, dx_B \right), \qquad dx_B = d(\text{bound}) , $$

one linear solve with the free Hessian, forwards or in reverse, by conjugate gradients on
Hessian-vector products. The minimum itself has $dF^* = \partial F/\partial\theta\, d\theta
+ \partial F/\partial x_B\, dx_B$ (envelope theorem): no solve.

Held, and so not free, is a coordinate on a bound unless its gradient pulls it inside by more than
the tolerance of the relaxation. Where the multiplier vanishes the minimizer has one-sided
derivatives only; this rule gives the one on the side of the bound. A coordinate whose Hessian row
is zero is held too: the objective does not determine it, and it stays where it started.

Where the Hessian on the free coordinates is singular or indefinite there is no derivative, and the
result is NaN, as it is wherever the solve does not reach a relative residual of sqrt(eps). A
derivative has no place for more than that; `adjoint_report` makes the solve and says how it went.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from smallgain_jax._tree import still, vdot
from smallgain_jax.graphs.descent import Metric
from smallgain_jax.graphs.objective import Objective
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import length_scale, optimality, projected_step
from smallgain_jax.spectral.conjugate import Conjugate, Product, conjugate_gradients


class Solution(eqx.Module):
    """A minimizer as found, and what it is the minimizer of."""

    x: jax.Array
    slack: jax.Array  # like x: moves below this are rounding, in units of x
    objective: Objective
    box: Box
    metric: Metric | None


class _Sides(NamedTuple):
    """Where each coordinate stands, bool like x."""

    lower: jax.Array
    upper: jax.Array
    free: jax.Array
    rows: jax.Array  # like x, of the Hessian at x


def _acting(gap: jax.Array) -> jax.Array:
    """Hinges as the Hessian at x sees them: there or not."""
    return jnp.where(gap > 0, 1, 0).astype(gap.dtype)


def _sides(solution: Solution) -> _Sides:
    x, objective, box = solution.x, solution.objective, solution.box
    rows = objective.rows(x, _acting)
    inside = projected_step(x, objective.gradient(x), rows, box)
    lower = (x <= box.lower) & (inside <= solution.slack)
    upper = (x >= box.upper) & (inside >= -solution.slack) & ~lower
    return _Sides(lower, upper, ~(lower | upper) & (rows > 0), rows)


def _placed(x: jax.Array, box: Box, sides: _Sides) -> jax.Array:
    """x, which is its bound where it is held at one."""
    upper = jnp.where(sides.upper, jnp.asarray(box.upper, x.dtype), x)
    return jnp.where(sides.lower, jnp.asarray(box.lower, x.dtype), upper)


@eqx.filter_custom_jvp
def minimizer(solution: Solution) -> jax.Array:
    """`solution.x`, with the derivative of the minimizer by every float of objective and box."""
    return solution.x


@minimizer.def_jvp  # type: ignore[untyped-decorator]
def _minimizer_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (solution,), (change,) = primals, tangents
    # once more through this rule: so it has derivatives of its own
    x = minimizer(solution)
    fixed = still(solution)
    sides = _sides(fixed)
    objective = solution.objective

    def conditions(objective: Objective, box: Box) -> tuple[jax.Array, jax.Array]:
        at = _placed(x, box, sides)
        return jnp.where(sides.free, objective.gradient(at).astype(x.dtype), 0), at

    product = partial(_bent, objective, x, sides)

    def solve(product: Product, right: jax.Array) -> jax.Array:
        answer = solved(product, right, _preconditioner(fixed, sides), _positive(sides.rows))
        return jnp.where(answer.sound, answer.solution, jnp.nan)

    right, bound = _change(conditions, (objective, solution.box), (change.objective, change.box))
    move = jax.lax.custom_linear_solve(product, right, solve, symmetric=True)
    return x, jnp.where(sides.free, -move, bound)


def _bent(objective: Objective, x: jax.Array, sides: _Sides, v: jax.Array) -> jax.Array:
    """The free Hessian times v; on held coordinates the rows, so that it is regular."""
    bent = jax.jvp(objective.gradient, (x,), (jnp.where(sides.free, v, 0),))[1]
    return jnp.where(sides.free, bent.astype(x.dtype), _positive(sides.rows) * v)


@eqx.filter_custom_jvp
def minimum(value: jax.Array, solution: Solution) -> jax.Array:
    """`value`, the energy at the solution, with the derivative of the minimum."""
    return value


@minimum.def_jvp  # type: ignore[untyped-decorator]
def _minimum_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (value, solution), (_, change) = primals, tangents
    x = minimizer(solution)
    sides = _sides(still(solution))

    def energy(objective: Objective, box: Box) -> jax.Array:
        return objective.energy(_placed(x, box, sides)).astype(value.dtype)

    moved = _change(energy, (solution.objective, solution.box), (change.objective, change.box))
    return minimum(value, solution), moved


def _change(fn: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """The tangent of `fn`, zeros where nothing that it depends on moves."""
    found, moved = eqx.filter_jvp(fn, primals, tangents)
    return jax.tree.map(
        lambda a, da: jnp.zeros_like(a) if da is None else da,
        found,
        moved,
        is_leaf=lambda leaf: leaf is None,
    )


def _positive(rows: jax.Array) -> jax.Array:
    return jnp.where(rows > 0, rows, 1)


def _preconditioner(solution: Solution, sides: _Sides) -> Product:
    rows = _positive(sides.rows)
    if solution.metric is None:
        return lambda r: r / rows
    apply = solution.metric.precondition(solution.objective, solution.x, rows, sides.free)
    return lambda r: jnp.where(sides.free, apply(jnp.where(sides.free, r, 0)), r / rows)


class Answer(NamedTuple):
    """What conjugate gradients found."""

    solution: jax.Array
    steps: jax.Array  # [] int32
    residual: jax.Array  # [] of the solution, relative, in the norm of the preconditioner
    sound: jax.Array  # [] bool, it is small enough


def solved(product: Product, right: jax.Array, precondition: Product, rows: jax.Array) -> Answer:
    """The solution of a system whose matrix is that of a minimum.

    Conjugate gradients until the residual, in the preconditioner's norm, is eps^(3/4) of the right
    side; what is asked of the answer, by a residual computed afresh, is sqrt(eps).
    """
    eps, limit = jnp.finfo(right.dtype).eps, 10 * right.size + 100

    def going(c: Conjugate) -> jax.Array:
        return (c.norm > eps**1.5 * c.first) & (c.steps < limit)

    def curved(bend: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        # below the rounding of its own terms a curvature is none
        sound = bend > eps * vdot(direction, rows * direction)
        return jnp.where(sound, bend, 0), sound

    end = conjugate_gradients(product, right, precondition, going, curved)
    rest = right - product(end.solution)
    left = vdot(rest, precondition(rest))
    relative = jnp.sqrt(left / jnp.where(end.first > 0, end.first, 1))
    # not >: a NaN on the way must not pass
    return Answer(end.solution, end.steps, relative, left <= eps * end.first)


class AdjointReport(NamedTuple):
    """How the linear solve behind a derivative of the minimizer goes."""

    sound: jax.Array  # [] bool; where False, derivatives that need this solve are NaN
    residual: jax.Array  # [] relative to the right side, in the norm of the preconditioner
    iterations: jax.Array  # [] int32, Hessian-vector products
    free: jax.Array  # [] int32, coordinates that no bound holds
    optimality: jax.Array  # [] of x as `RelaxInfo` has it: the derivative is that of a minimizer


def reported(solution: Solution, cotangent: jax.Array) -> AdjointReport:
    """The solve of the adjoint system for one cotangent, as reverse mode makes it."""
    sides = _sides(solution)
    right = jnp.where(sides.free, cotangent, 0)
    product = partial(_bent, solution.objective, solution.x, sides)
    answer = solved(product, right, _preconditioner(solution, sides), _positive(sides.rows))
    gradient = solution.objective.gradient(solution.x)
    step = projected_step(solution.x, gradient, sides.rows, solution.box)
    return AdjointReport(
        answer.sound,
        answer.residual,
        answer.steps,
        jnp.sum(sides.free),
        optimality(step, length_scale(solution.x, step, solution.box)),
    )
