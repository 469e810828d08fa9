"""How tests compile: well what computes for seconds, and small what only compiles."""

from functools import partial

import jax

jit_well = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


def in_turn(fn):
    """`vmap`, one after the other: a loop inside is then traced once, where batching traces it
    three times, and a branch not taken costs nothing.
    """
    return lambda *args: jax.lax.map(lambda each: fn(*each), args)
