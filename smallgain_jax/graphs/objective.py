r"""What can be relaxed: an energy graph, or any function of a pytree.

`relax` asks an objective for its value, its gradient, and *rows*: a positive diagonal that prices
each coordinate. A graph knows rows that bound its Hessian. Of a function they are what the caller
knows, or the absolute row sums of the Hessian where it is small enough to be formed, or else an
estimate: for standard normal v, $(Hv)_r$ is normal with the variance $\|H_r\|_2^2$, so that

$$ D_r = \Big( \frac1k \sum_{l=1}^k (H v_l)_r^2 \Big)^{1/2} $$

scatters about the Euclidean norm of row r as the root of a chi square with k degrees of freedom.
(Hutchinson 1989; Bekas, Kokiopoulou and Saad 2007, who take signs for v: sums of signs may cancel
to 0.) An estimate bounds nothing and certifies nothing. It serves as a metric: it conditions steps
and scales the measure of optimality. What carries descent is the line search.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import as_float, check_finite, is_concrete
from smallgain_jax._tree import closed, gathered
from smallgain_jax.graphs.graph import Evaluation
from smallgain_jax.spectral.rows import Activity

ARRAYS = (jax.Array, np.ndarray, np.generic, float, int)
"""What counts as a leaf. (An isinstance of `ArrayLike` is blind to tracers.)"""

FORMED = 64
"""Unknowns up to which the rows are those of the Hessian itself: as many products."""

PROBES = 8
"""Products with normal vectors beyond that: a row falls short tenfold once in 1e7."""


class Objective(Protocol):
    """What `relax`, its optimizers and its adjoint ask of what they minimize.

    Implementations are pytrees, and what they depend on is in their leaves.
    """

    def energy(self, x: jax.Array) -> jax.Array:
        """The value, a scalar, differentiable three times by x and once by the leaves."""

    def gradient(self, x: jax.Array) -> jax.Array:
        """Its gradient by x."""

    def evaluate(self, x: jax.Array) -> Evaluation:
        """Value, gradient and the size of what the value is the sum of."""

    def rows(self, x: jax.Array, smoothing: Activity | float | None = None) -> jax.Array:
        """A non-negative diagonal in units of the Hessian, shaped like x."""


class Layout(NamedTuple):
    """How a pytree of arrays lies in one vector."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))

    def ravel(self, tree: Any) -> jax.Array:
        """The leaves end to end, [n]."""
        leaves = [jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]
        if len(leaves) == 1:
            return leaves[0]
        return jnp.concatenate(leaves) if leaves else jnp.zeros(0)

    def unravel(self, flat: jax.Array) -> Any:
        """The tree whose leaves lie in `flat`, all of its dtype."""
        leaves, start = [], 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            leaves.append(flat[start:stop].reshape(shape))
            start = stop
        return jax.tree.unflatten(self.structure, leaves)

    def spread(self, name: str, tree: Any) -> Any:
        """[n] of a scalar, or of a tree like ours whose leaves are scalars or shaped like ours.

        On the host where it can be: inside jit, an operation on known arrays gives an unknown one.
        """
        xp: Any = np if is_concrete(tree) else jnp
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure:
            if not jax.tree_util.treedef_is_leaf(structure) or jnp.shape(leaves[0]) != ():
                raise ValueError(
                    f"{name} must be a number or have the tree structure of x0, {self.structure}; "
                    f"got {structure}"
                )
            leaves = leaves * len(self.shapes)
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if jnp.shape(leaf) not in ((), shape):
                raise ValueError(f"{name} has shape {jnp.shape(leaf)}, expected () or {shape}")
        flat = [
            xp.broadcast_to(xp.asarray(leaf), shape).ravel()
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]
        return xp.concatenate(flat) if flat else np.zeros(0)


def laid_out(x0: Any) -> tuple[jax.Array, Layout]:
    """The leaves of x0 as one vector, and how they lie there; TypeError for other leaves."""
    leaves: list[jax.Array] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(x0):
        name = f"x0{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, ARRAYS):
            raise TypeError(
                f"{name} is {type(leaf).__name__}, not an array: keep what is not to be "
                "minimized out of x0, as by equinox.partition(model, equinox.is_inexact_array)"
            )
        leaves.append(gathered(as_float(name, jnp.asarray(leaf))))
        check_finite(name, leaves[-1])
    layout = Layout(jax.tree.structure(x0), tuple(leaf.shape for leaf in leaves))
    return layout.ravel(leaves), layout


class Function(eqx.Module):
    """A function of a pytree as an objective over one vector [n]."""

    fn: Callable[..., jax.Array]
    args: Any
    given: Any  # rows: a function like `fn`, an array [n], or None
    layout: Layout = eqx.field(static=True)

    def energy(self, x: jax.Array) -> jax.Array:
        return _scalar(self.fn(self.layout.unravel(x), *self.args))

    def gradient(self, x: jax.Array) -> jax.Array:
        return jax.grad(self.energy)(x)

    def evaluate(self, x: jax.Array) -> Evaluation:
        value, gradient = jax.value_and_grad(self.energy)(x)
        return Evaluation(value, gradient, jnp.abs(value))

    def rows(self, x: jax.Array, smoothing: Activity | float | None = None) -> jax.Array:
        """What the caller knows, row sums, or an estimate; `smoothing` is for hinges of graphs."""
        del smoothing
        if callable(self.given):
            given = self.given(self.layout.unravel(x), *self.args)
            return jnp.asarray(self.layout.spread("rows", given), x.dtype)
        if self.given is not None:
            return jnp.asarray(self.given, x.dtype)
        probes = self._probes(x)
        # the products share one linearization, and the Hessian need not be formed on the way
        product = jax.linearize(self.gradient, x)[1]
        images = jax.vmap(product)(probes)
        if x.size <= FORMED:
            return jnp.sum(jnp.abs(images), axis=0)
        return jnp.sqrt(jnp.mean(images**2, axis=0))

    def closed(self, x: jax.Array) -> "Function":
        """The same with all that the functions close over among its leaves, traced at x.

        What a caller differentiates may be in a closure; here it becomes data.
        """
        data, rest = eqx.partition(self.args, eqx.is_array)
        tree = self.layout.unravel(x)

        def close(fn: Callable[..., Any]) -> Callable[..., Any]:
            whole = lambda tree, data: fn(tree, *eqx.combine(data, rest))  # noqa: E731
            return closed(whole, tree, data)

        given = close(self.given) if callable(self.given) else self.given
        return Function(close(self.fn), (data,), given, self.layout)

    def _probes(self, x: jax.Array) -> jax.Array:
        if x.size <= FORMED:
            return jnp.eye(x.size, dtype=x.dtype)
        # always the same ones: a relaxation is a function of its arguments
        return jax.random.normal(jax.random.key(0), (PROBES, x.size), x.dtype)


def _scalar(value: Any) -> jax.Array:
    """The value of a function, which must be a real scalar."""
    if not isinstance(value, ARRAYS):
        raise TypeError(f"fn must return a scalar, got {type(value).__name__}")
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"fn must return a real scalar, got {value.dtype}{list(value.shape)}")
    return value


def function(fn: Any, x0: Any, args: Any, rows: Any) -> tuple["Function", jax.Array]:
    """`fn` as an objective, and x0 as one vector; errors where they are none."""
    if not isinstance(args, tuple):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}: fn(x, *args)")
    # a Python float is data as well: another value needs no other program
    args = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, float) else a, args)
    flat, layout = laid_out(x0)
    if rows is not None and not callable(rows):
        rows = layout.spread("rows", rows)
        check_finite("rows", rows, low=0.0)
    return Function(fn, args, rows, layout), flat
