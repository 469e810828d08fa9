"""Every test runs in float32 and in float64, with silent broadcasting across ranks an error."""

import os

# eight devices for the sharding tests; and programs here run for milliseconds, so that optimizing
# their machine code costs more than it saves
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "x64: needs double precision, runs in it alone")
    config.addinivalue_line("markers", "once: its outcome does not depend on the precision")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    x64 = [True] if "x64" in marks else [False] if "once" in marks else [False, True]
    metafunc.parametrize("x64", x64, indirect=True, ids=["x64" if on else "x32" for on in x64])


@pytest.fixture(autouse=True)
def x64(request):
    """Whether this test runs in double precision."""
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture
def eps(x64) -> float:
    """Unit of rounding of the default dtype."""
    return float(np.finfo(np.float64 if x64 else np.float32).eps)
