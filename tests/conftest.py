"""Every test runs in float32 and in float64, with silent broadcasting across ranks an error."""

import gc
import os
from contextlib import nullcontext
from importlib.metadata import version

# eight devices for the sharding tests; and programs here run for milliseconds, so that optimizing
# their machine code costs more than it saves: the emitters alone take half of the compilation's
# time (XLA dies of flags that it does not know, so they go where this one is known)
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if version("jaxlib").startswith("0.10.")
        else ""
    ),
)

import jax
import numpy as np
import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.products import SETTINGS, coarse_products

jax.config.update("jax_numpy_rank_promotion", "raise")
# tracing makes objects by the million, and a full collection looks at every compiled program
gc.set_threshold(50_000, 10, 10)

DIVIDED = ("test_balance", "test_catalogue", "test_clients", "test_drop_in")
"""Modules of minutes: each of their functions may go to another process."""


class Scheduling(LoadScopeScheduling):
    """A module stays in one process: its tests share thousands of the smallest programs."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        divided = module.endswith(tuple(f"{name}.py" for name in DIVIDED))
        return nodeid.split("[")[0] if divided else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> Scheduling:
    return Scheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--products",
        choices=SETTINGS,
        help="round the operands of float32 products as this default precision does",
    )


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


@pytest.fixture(autouse=True)
def products(request):
    """Under `--products`, every test runs with coarse products."""
    setting = request.config.getoption("--products")
    with coarse_products(setting) if setting else nullcontext():
        yield setting


PROGRAMS = 100
"""Tests after which a process forgets its compiled programs: thousands of them fill the memory, and
every pass of the garbage collector looks at each."""
_seen = 0


@pytest.fixture(autouse=True)
def forgets():
    """Memory that does not grow with the number of tests."""
    global _seen
    yield
    _seen += 1
    if _seen % PROGRAMS == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def eps(x64) -> float:
    """Unit of rounding of the default dtype."""
    return float(np.finfo(np.float64 if x64 else np.float32).eps)
