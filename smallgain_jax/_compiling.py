"""How XLA is asked to compile: in a third of the time, where a program will run for milliseconds.

On CPU, most of what a first call waits for is spent on machine code that a small program never
pays back: 2.6 processor seconds for a graph of three nodes, where 0.7 suffice. Numbers differ by
rounding.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from smallgain_jax._checks import is_concrete

Given = ParamSpec("Given")
Found = TypeVar("Found")

SMALL = 1000
"""Numbers among the arguments up to which no machine code is worth waiting for: relaxing 30 nodes
takes 23 microseconds a step for 17, and two seconds less at the first call."""


@cache
def quick_options() -> dict[str, Any] | None:
    """Compiler options for small programs; None where XLA has none or is another version's.

    >>> quick = jax.jit(lambda x: 2 * x, compiler_options=quick_options())
    >>> float(quick(1.0))
    2.0
    """
    if jax.default_backend() != "cpu":
        return None
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    options["xla_cpu_use_fusion_emitters"] = False
    try:
        jax.jit(lambda: None).lower().compile(options)
    except jax.errors.JaxRuntimeError:  # flags come and go with versions
        return None
    return options


def quick_jit(fn: Callable[..., Any], most: float = SMALL, **settings: Any) -> Callable[..., Any]:
    """`jax.jit`, quick where arguments hold `most` numbers at most, and only as no part of another.

    The options are asked for at the first call: to import the library starts no backend.

    >>> double = quick_jit(lambda x: 2 * x)
    >>> float(double(1.0)), float(jax.jit(lambda: double(1.0))())
    (2.0, 2.0)
    """
    part = jax.jit(fn, **settings)

    @cache
    def alone() -> Callable[..., Any]:
        return jax.jit(fn, compiler_options=quick_options(), **settings)

    def call(*args: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((args, named))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        if not is_concrete(leaves) or sum(array.size for array in arrays) > most:
            return part(*args, **named)
        try:
            return alone()(*args, **named)
        except ValueError as error:  # nothing public tells that a program is being traced
            if "compiler_options" not in str(error):
                raise
            return part(*args, **named)

    return call


def at_once(
    static: str | None = None, own: Callable[[Any], bool] | None = None
) -> Callable[[Callable[Given, Found]], Callable[Given, Found]]:
    """A decorator: one program where a function is called outside of any, with numbers only.

    One by one its operations would be compiled each: ten times the wait, and that again at each
    call where there are branches on values. For functions whose code is all ours: what a program
    of somebody else's code once read, it does not read again. `static` names an argument that is
    no number; `own` tells of the first one whether its code is ours.

    >>> @at_once()
    ... def scaled(x, *, by):
    ...     return by * x
    >>> scaled(1.0, by=2.0).item()
    2.0
    """

    def decorate(fn: Callable[Given, Found]) -> Callable[Given, Found]:
        program = quick_jit(fn, static_argnames=static)

        @wraps(fn)
        def call(*args: Given.args, **named: Given.kwargs) -> Found:
            numbers = {key: value for key, value in named.items() if key != static}
            if not is_data((args, numbers)) or not (own is None or own(args[0])):
                return fn(*args, **named)
            found: Found = program(*args, **named)
            return found

        return call

    return decorate


def is_data(operands: Any) -> bool:
    """Whether all leaves are known numbers that a program may take as data.

    Integers and booleans of Python are not: a shape, a slice, a branch may depend on them.

    >>> is_data((jax.numpy.ones(2), np.float32(1), 0.5)), is_data(3), is_data(np.array("text"))
    (True, False, False)
    """
    return is_concrete(operands) and all(map(_is_number, jax.tree.leaves(operands)))


def _is_number(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.issubdtype(leaf.dtype, np.number) or leaf.dtype in (bool, jax.numpy.bfloat16)
    return isinstance(leaf, jax.Array | float | complex)
