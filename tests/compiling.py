"""Programs that compute for seconds, compiled better than the many that run for milliseconds."""

from functools import partial

import jax

jit_well = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
