"""An optimizer on a small copy of the parameters, as a program without side effects.

The copy has the structure of the parameters and the rank of each leaf, but at most two entries
along an axis: enough to tell an elementwise transformation from others, and for masks and labels
that go by path or rank to fall as they do on the parameters. Leaves that are treated alike are
represented by one; the others are left out (`optax.MaskedNode`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from smallgain_jax.limits.alike import Numbering

_MOST_CALLS = 10_000
_STAND_IN = 1e-3
"""For hyperparameters that are traced: what kind of optimizer it is does not depend on them."""
_UPDATES = 3
"""Enough for a difference in a second memory to reach the update."""


class NoLimitError(Exception):
    """The experiment has no answer; its text says why."""


class Copy(NamedTuple):
    """Programs of an optimizer on a small tree of parameters. Flat lists of arrays in and out."""

    init: core.ClosedJaxpr  # [*params] -> [*state]
    step: core.ClosedJaxpr  # [*state, *params, *gradient, value] -> [*updates, *state]
    shapes: list[jax.ShapeDtypeStruct]  # of the parameters
    paths: list[str]  # of the state's leaves
    treedef: Any  # of the state
    extra: dict[str, Any]  # arguments of the update; None for the value at hand

    @property
    def traced(self) -> bool:
        """Whether hyperparameters are traced (`inject_hyperparams` around a transformation)."""
        consts = [*self.init.consts, *self.step.consts]
        return any(isinstance(const, jax.core.Tracer) for const in consts)

    def with_stand_ins(self) -> "Copy":
        """The same with numbers for what is traced."""

        def known(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
            return core.ClosedJaxpr(closed.jaxpr, [*map(_stand_in, closed.consts)])

        return self._replace(init=known(self.init), step=known(self.step))


def _like(leaf: Any, old: Any) -> Any:
    opaque = jnp.issubdtype(old.dtype, jax.dtypes.extended)
    return leaf if opaque else jnp.asarray(leaf, old.dtype)


def _stand_in(const: Any) -> Any:
    if not isinstance(const, jax.core.Tracer):
        return const
    fill = _STAND_IN if jnp.issubdtype(const.dtype, jnp.floating) else 1
    return np.full(const.shape, fill, const.dtype)


def small_copy(params: Any) -> Any:
    """Shapes of the copy: at most two entries along an axis, floats of at least 32 bits."""

    def small(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.promote_types(dtype, jnp.float32)
        elif not jnp.issubdtype(dtype, jnp.integer) and not jnp.issubdtype(dtype, bool):
            raise NoLimitError(f"it moves parameters that are {dtype}, not real")
        return jax.ShapeDtypeStruct(tuple(min(max(d, 1), 2) for d in np.shape(leaf)), dtype)

    return jax.tree.map(small, params)


def trace(optimizer: optax.GradientTransformationExtraArgs, params: Any, extra: Any = None) -> Copy:
    """Programs of an optimizer at parameters of these shapes; no number is computed.

    Args:
      optimizer: with support for extra arguments.
      params: tree of shapes.
      extra: extra arguments of its update; None stands for the gradient or the value at hand.
    """
    leaves: list[jax.ShapeDtypeStruct]
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    n = len(leaves)
    init, state = jax.make_jaxpr(
        lambda flat: optimizer.init(treedef.unflatten(flat)), return_shape=True
    )(leaves)
    state_def: Any
    found, state_def = jax.tree_util.tree_flatten_with_path(state)

    def step(flat: list[Any], value: Any) -> list[Any]:
        m = len(found)
        before, at, gradient = flat[:m], flat[m : m + n], flat[m + n :]
        known = {"value": value, "grad": treedef.unflatten(gradient)}
        more = {k: known[k] if v is None else v for k, v in (extra or {}).items()}
        updates, after = optimizer.update(
            treedef.unflatten(gradient), state_def.unflatten(before), treedef.unflatten(at), **more
        )
        if jax.tree.structure(after) != state_def:
            raise NoLimitError("its state changes its structure")
        moves = jax.tree.leaves(updates)
        if jax.tree.map(jnp.shape, moves) != [leaf.shape for leaf in leaves]:
            raise NoLimitError("its updates do not have the shapes of the parameters")
        kept = zip(jax.tree.leaves(after), found, strict=True)
        return [*moves, *(_like(leaf, old) for leaf, (_, old) in kept)]

    value = jax.ShapeDtypeStruct((), jnp.result_type(float))
    flat = [*(leaf for _, leaf in found), *leaves, *leaves]
    program = jax.make_jaxpr(step)(flat, value)
    paths = [jax.tree_util.keystr(path) for path, _ in found]
    return Copy(init, program, leaves, paths, state_def, extra or {})


def trace_any(optimizer: optax.GradientTransformationExtraArgs, params: Any, small: Any) -> Copy:
    """`trace` at the small copy; an error comes through if it is raised at `params` as well.

    Raises:
      NoLimitError: if the optimizer needs more than gradients and a value, cannot be traced, or
        fails for want of size.
    """
    try:
        return trace(optimizer, small)
    except NoLimitError:
        raise
    except Exception as error:
        what = _first_line(error)
        if isinstance(error, jax.errors.JAXTypeError):
            raise NoLimitError(f"it cannot be traced: {what}") from error
        if re.search(r"\w*update\w*\(\) missing \d+ required keyword-only", what):
            needs = what.partition("argument")[2].partition(":")[2].strip()
            if needs != "'value'":
                raise NoLimitError(f"its update needs {needs}") from error
            return trace(optimizer, small, {"value": None})
        if _passes(optimizer, small, extra=_EVERYTHING):
            raise NoLimitError(f"its update needs more than gradients: {what}") from error
        real = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), params)
        if _passes(optimizer, real):
            raise NoLimitError(f"it fails on a small copy: {what}") from error
        raise


def _passes(
    optimizer: optax.GradientTransformationExtraArgs, params: Any, extra: Any = None
) -> bool:
    """Whether it can be traced at these shapes."""
    try:
        trace(optimizer, params, extra)
    except NoLimitError:
        pass
    except Exception:  # whatever it is, it is raised again by the caller
        return False
    return True


def _square(params: Any, *_: Any, **__: Any) -> jax.Array:
    """An objective, for optimizers that ask for one."""
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


_EVERYTHING = {"value": None, "grad": None, "value_fn": _square, "obj_fn": _square}
"""Extra arguments that optax's own optimizers ask for; None where the experiment has an answer."""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class Alike(NamedTuple):
    """Leaves that are treated alike."""

    members: list[int]  # of each leaf of the parameters: its representative, by number
    state: list[int]  # of each leaf of the state: a number for what is computed there
    first: list[int]  # of each representative: its place among the leaves


def find_alike(copy: Copy) -> Alike:
    """Group the leaves by the programs that move them."""
    numbers = Numbering()
    moved, state = _numbered(numbers, copy)
    first: dict[Any, int] = {}
    for k, key in enumerate(zip(moved, copy.shapes, strict=True)):
        first.setdefault(key, k)
    order = list(first)
    members = [order.index(key) for key in zip(moved, copy.shapes, strict=True)]
    return Alike(members, state, list(first.values()))


def same_programs(copy: Copy, hollow: Copy, alike: Alike) -> bool:
    """Whether the representatives are moved as they are among all the leaves."""
    numbers = Numbering()
    full, state = _numbered(numbers, copy)
    alone, rest = _numbered(numbers, hollow)
    known = dict(zip(copy.paths, state, strict=True))
    same_state = all(known.get(p) == k for p, k in zip(hollow.paths, rest, strict=True))
    return same_state and alone == [full[k] for k in alike.first]


def _numbered(numbers: Numbering, copy: Copy) -> tuple[list[Any], list[int]]:
    """Numbers of the updates, a tuple for each leaf, and of the state after them."""

    def given(name: str) -> list[int]:
        return [numbers.of(name, leaf.shape, str(leaf.dtype)) for leaf in copy.shapes]

    at, value = given("params"), numbers.of("value")
    state = numbers.run(copy.init, at)
    moves = []
    for t in range(_UPDATES):
        out = numbers.run(copy.step, [*state, *at, *given(f"gradient {t}"), value])
        moves.append(out[: len(at)])
        state = out[len(at) :]
    return list(zip(*moves, strict=True)), state


def without(params: Any, kept: Sequence[int]) -> Any:
    """The tree with holes where leaves are not in `kept`."""
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    holes = [leaf if k in set(kept) else optax.MaskedNode() for k, leaf in enumerate(leaves)]
    return treedef.unflatten(holes)


def accumulated(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer whose update is a whole accumulation of the same gradient.

    What accumulates gradients (`optax.MultiSteps`, `optax.apply_every`) is given each one until it
    moves; counters that come from the middle of an accumulation are rewound.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        def give(carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            total, state, calls = carry
            move, state = optimizer.update(updates, state, params, **extra_args)
            return jax.tree.map(jnp.add, total, move), state, calls + 1

        def waits(carry: tuple[Any, Any, jax.Array]) -> jax.Array:
            _, state, calls = carry
            waiting = [getattr(node, _WAITING[type(node)][0]) != 0 for node in _accumulators(state)]
            # an update that is skipped is never made
            return waiting[0] & (calls < _MOST_CALLS)

        if not _accumulators(state):
            return optimizer.update(updates, state, params, **extra_args)
        nothing = jax.tree.map(jnp.zeros_like, updates)
        once = give((nothing, _rewound(state), jnp.zeros((), jnp.int32)))
        return jax.lax.while_loop(waits, give, once)[:2]

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


_WAITING = {
    optax.MultiStepsState: ("mini_step", "acc_grads"),
    optax.ApplyEvery: ("count", "grad_acc"),
}
"""Of each accumulator the counter that is zero when it has just moved, and what it holds back."""


def accumulates(node: Any) -> bool:
    """Whether a node of a state holds gradients back."""
    return type(node) in _WAITING


def _accumulators(state: Any) -> list[Any]:
    return [n for n in jax.tree.leaves(state, is_leaf=accumulates) if accumulates(n)]


def _rewound(state: Any) -> Any:
    """The state with no gradient waiting."""

    def rewound(node: Any) -> Any:
        if not accumulates(node):
            return node
        names = _WAITING[type(node)]
        return node._replace(
            **{name: jax.tree.map(jnp.zeros_like, getattr(node, name)) for name in names}
        )

    return jax.tree.map(rewound, state, is_leaf=accumulates)
