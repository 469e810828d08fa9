"""Many relaxations at once, each for as long as it takes."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import check_finite
from smallgain_jax._tree import select, still
from smallgain_jax.graphs import iteration
from smallgain_jax.graphs.adjoint import Solution, minimizer, minimum
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.objective import Function
from smallgain_jax.graphs.problem import Problem, posed, run_of, settled, tolerance, walls_of
from smallgain_jax.graphs.relaxation import RelaxInfo
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import RelaxStatus

LANES = {"cpu": 128}
"""Members that go on side by side, by backend: on a CPU what fits its caches."""

MANY = 4096
"""Elsewhere: enough to hide what a step costs to launch."""

IDLE = 0.125
"""Share of lanes that may wait before all that have ended are given new members."""


class BatchResult(NamedTuple):
    """Outcome of `relax_batch`, B members."""

    x: Any  # like x0, [B, ...]
    energy: jax.Array  # [B] at the end
    info: RelaxInfo  # each field [B]; no history
    computed: jax.Array  # [] int32, steps computed in all lanes, those of idle lanes included


class _Ends(NamedTuple):
    """What is kept of members that have ended."""

    x: jax.Array  # [B, ...]
    scale: jax.Array  # [B, ...]
    value: jax.Array  # [B]
    steps: jax.Array  # [B] int32
    status: jax.Array  # [B] int32
    optimality: jax.Array  # [B]


class _Carry(NamedTuple):
    member: jax.Array  # [W] int32, who is in each lane; B where nobody is
    iterate: iteration.Iterate  # [W, ...]
    following: jax.Array  # [] int32, the next member to begin
    ends: _Ends
    computed: jax.Array  # [] int32


def relax_batch(
    objective: Any,
    x0: Any,
    steps: int = 100,
    bounds: tuple[Any, Any] | str | None = "default",
    *,
    args: tuple[Any, ...] = (),
    in_axes: Any = 0,
    tol: float | jax.Array | None = None,
    lanes: int | None = None,
) -> BatchResult:
    r"""Relax thousands of graphs, or minimize a function for thousands of arguments.

    Under `vmap` all members go on until the last has ended. Here W *lanes* go on side by side, and
    a member that has ended makes room for the next: with $k_b$ steps needed by member b, about
    $\sum_b k_b$ steps are computed where `vmap` computes $B \max_b k_b$. One program, jittable;
    each member goes as `relax` would, and the minimizers and minima have the same derivatives
    (`relax`, `adjoint="implicit"`), by one solve for all.

    Args:
      objective: an `EnergyGraph` whose arrays have a leading axis B, as
        `jax.tree.map(lambda *a: jnp.stack(a), *graphs)` makes it of graphs of one shape; or a
        function `fn(x, *args)`.
      x0: starts, each leaf with a leading axis B.
      steps: most updates to make for a member.
      bounds: (lower, upper) as for `relax`, the same for all members; by default (0, 1) for graphs
        and none for functions.
      args: further arguments of a function, arrays with a leading axis B.
      in_axes: 0, or as for `jax.vmap` a prefix of the graph (of `args` for a function) with 0 where
        arrays are by member and None where all members share them.
      tol: the optimality to reach, as for `relax`.
      lanes: W, 128 on a CPU and 4096 elsewhere by default, at most B.

    Returns:
      `BatchResult(x, energy [B], info, computed)`; with `computed / info.steps.sum()` one sees what
      the lanes have cost.

    Raises:
      TypeError, ValueError: as `relax` does; or leading axes that differ.

    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau([1.0, 1.0]), [sg.Quadratic([0], [1], 0.5)])
    >>> result = relax_batch(graph, jnp.ones((5, 2)), in_axes=None)
    >>> result.x.shape, bool(result.info.converged.all())
    ((5, 2), True)
    """
    size, first = _first(x0)
    whole, _, box = posed(objective, first, bounds, args, None)
    starts = jax.tree.map(jnp.asarray, x0)
    if isinstance(whole, Function):
        starts = jax.vmap(whole.layout.ravel)(starts)
    check_finite("x0", starts)
    own, shared = eqx.partition(whole, _batched(whole, in_axes))
    _check_axes(own, size)
    if steps < 0:
        raise ValueError(f"steps = {steps} must not be negative")
    width = LANES.get(jax.default_backend(), MANY) if lanes is None else lanes
    if width < 1:
        raise ValueError(f"lanes = {width} must be at least 1")
    data, rest = eqx.partition((shared, box), lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
    leaves, structure = jax.tree.flatten(rest)
    limit, width = np.int32(steps), min(int(width), size)
    return _compiled(own, starts, data, tol, limit, tuple(leaves), structure, width)


def _first(x0: Any) -> tuple[int, Any]:
    """B, and the start of the first member."""
    sizes = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(x0)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"x0 must have one leading axis B > 0 on every leaf, got {sizes}")
    return sizes.pop(), jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], x0)


def _batched(whole: EnergyGraph | Function, in_axes: Any) -> Any:
    """For every leaf of the objective whether each member has its own."""

    def spread(tree: Any) -> Any:
        axes = jax.tree.broadcast(in_axes, tree, is_leaf=lambda leaf: leaf is None)
        return jax.tree.map(lambda _, axis: axis is not None, tree, axes)

    if isinstance(whole, EnergyGraph):
        return spread(whole)
    none = jax.tree.map(lambda _: False, whole)
    return eqx.tree_at(lambda f: f.args, none, spread(whole.args))


def _check_axes(own: Any, size: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"objective{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, and x0 is of "
                f"{size} members: in_axes tells what they share"
            )


@partial(jax.jit, static_argnums=(5, 6, 7))
def _compiled(
    own: Any,
    starts: jax.Array,
    data: Any,
    tol: Any,
    limit: jax.Array,
    leaves: tuple[Any, ...],
    structure: Any,
    width: int,
) -> BatchResult:
    shared, box = eqx.combine(data, jax.tree.unflatten(structure, leaves))
    make = partial(_problem, shared, box)
    tols = jax.vmap(lambda own, start: tolerance(make(own, start), tol))(own, starts)
    loop = partial(_loop, make, own, starts, tols, limit, width)
    ends, computed = still(eqx.filter_closure_convert(loop))()

    def solved(own: Any, start: jax.Array, tol: jax.Array, end: _Ends) -> tuple[Any, jax.Array]:
        problem = make(own, start)
        solution = Solution(end.x, tol * end.scale, problem.objective, walls_of(problem), None)
        x, value = minimizer(solution), minimum(end.value, solution)
        return (shared.layout.unravel(x) if isinstance(shared, Function) else x), value

    x, value = jax.vmap(solved)(own, starts, tols, ends)
    converged = ends.status == RelaxStatus.CONVERGED
    info = RelaxInfo(ends.steps, converged, ends.status, ends.optimality, None)
    return BatchResult(x, value, info, computed)


def _problem(shared: Any, box: Box | None, own: Any, start: jax.Array) -> Problem:
    """That of one member."""
    return settled(Problem(eqx.combine(own, shared), start, box, None, None, None, None))


def _loop(
    make: Any, own: Any, starts: jax.Array, tols: jax.Array, limit: jax.Array, width: int
) -> tuple[_Ends, jax.Array]:
    size = starts.shape[0]

    def begun(own: Any, start: jax.Array, tol: jax.Array) -> iteration.Iterate:
        problem = make(own, start)
        return iteration.start(run_of(problem, tol), problem.x0, None)

    def advanced(
        own: Any, start: jax.Array, tol: jax.Array, it: iteration.Iterate
    ) -> iteration.Iterate:
        over = it.ended | (it.steps >= limit)
        return select(over, it, iteration.advance(run_of(make(own, start), tol), it))

    def of(member: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        return jax.tree.map(lambda leaf: leaf[jnp.minimum(member, size - 1)], (own, starts, tols))

    def running(c: _Carry) -> jax.Array:
        return (c.member < size) & ~c.iterate.ended & (c.iterate.steps < limit)

    def round_(c: _Carry) -> _Carry:
        """Put away who has ended, begin with who is next, and go on until enough have ended."""
        idle = ~running(c)
        ends = _kept(c.ends, jnp.where(idle, c.member, size), c.iterate)
        member = jnp.where(idle, c.following + jnp.cumsum(idle) - 1, c.member)
        member = jnp.minimum(member, size).astype(jnp.int32)
        following = jnp.minimum(c.following + jnp.sum(idle), size).astype(jnp.int32)
        here = of(member)
        fresh = jax.vmap(begun)(*here)
        iterate = jax.vmap(select)(idle, fresh, c.iterate)
        c = _Carry(member, iterate, following, ends, c.computed)

        def going(c: _Carry) -> jax.Array:
            count = jnp.sum(running(c))
            enough = (count > (1 - IDLE) * width) | (c.following >= size)
            return (count > 0) & enough

        def step(c: _Carry) -> _Carry:
            iterate = jax.vmap(advanced)(*here, c.iterate)
            return c._replace(iterate=iterate, computed=c.computed + width)

        return jax.lax.while_loop(going, step, c)

    nobody = jnp.full(width, size, jnp.int32)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(jax.vmap(begun), *of(nobody))
    )
    zero = jnp.zeros((), jnp.int32)
    nothing = jax.tree.map(lambda a: jnp.zeros((size, *a.shape[1:]), a.dtype), _taken(zeros))
    end = jax.lax.while_loop(
        lambda c: (c.following < size) | jnp.any(running(c)),
        round_,
        _Carry(nobody, zeros, zero, nothing, zero),
    )
    # the last to end have not been put away yet
    return _kept(end.ends, end.member, end.iterate), end.computed


def _taken(it: iteration.Iterate) -> _Ends:
    return _Ends(it.x, it.scale, it.here.value, it.steps, it.status, it.optimality)


def _kept(ends: _Ends, member: jax.Array, it: iteration.Iterate) -> _Ends:
    """With the iterates of these members; B stands for nobody."""
    put = partial(jax.tree.map, lambda all_, one: all_.at[member].set(one, mode="drop"))
    return put(ends, _taken(it))
