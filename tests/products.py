"""Products of float32 matrices as accelerators take them, on a CPU.

A CPU multiplies float32 exactly whatever `jax_default_matmul_precision` says, so a test that only
sets it tests nothing. Here operands are rounded first: to bfloat16 where the precision is DEFAULT,
as TPUs do; to the ten bits of TF32 where it is HIGH, as NVIDIA GPUs do; not where it is HIGHEST.
Accumulation is in float32, as on all of these.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import jax
import numpy as np
from jax.interpreters import mlir

SETTINGS = ("default", "tensorfloat32", "bfloat16")
MANTISSA = {jax.lax.Precision.DEFAULT: 7, jax.lax.Precision.HIGH: 10}
_registered = mlir._platform_specific_lowerings["cpu"]


@contextmanager
def coarse_products(setting: str) -> Iterator[None]:
    """Inside, `setting` is the default precision of products, and what they are rounded to.

    Programs are remembered by their setting: what is compiled inside serves nobody outside, as long
    as nobody outside sets the same.
    """
    exact = _registered[jax.lax.dot_general_p]
    rule = getattr(exact, "rule", exact)
    mlir.register_lowering(jax.lax.dot_general_p, _rounded(rule), platform="cpu")
    try:
        with jax.default_matmul_precision(setting):
            yield
    finally:
        _registered[jax.lax.dot_general_p] = exact


def exact(fn: Callable) -> Callable:
    """`fn` with products in all bits: an oracle, or a user's function (its precision is theirs)."""

    @wraps(fn)
    def run(*arguments, **keywords):
        with jax.default_matmul_precision("highest"):
            return fn(*arguments, **keywords)

    return run


def _rounded(exact):
    def lower(ctx, lhs, rhs, **params):
        given = params["precision"]
        pair = given if isinstance(given, tuple) else (jax.lax.Precision.DEFAULT,) * 2
        coarse = [aval.dtype == np.float32 and p in MANTISSA for aval, p in zip(ctx.avals_in, pair)]
        if not any(coarse):
            return exact(ctx, lhs, rhs, **params)

        def product(*sides):
            # a conversion there and back would be simplified away
            sides = (
                jax.lax.reduce_precision(x, 8, MANTISSA[p]) if less else x
                for x, p, less in zip(sides, pair, coarse)
            )
            highest = (jax.lax.Precision.HIGHEST,) * 2
            return jax.lax.dot_general_p.bind(*sides, **params | {"precision": highest})

        return mlir.lower_fun(product, multiple_results=False)(ctx, lhs, rhs)

    return lower
