"""Modules import one way only, and every public name is documented."""

import ast
import inspect
from pathlib import Path

import pytest

import smallgain_jax as sg

pytestmark = pytest.mark.once
PACKAGE = Path(sg.__file__).parent
ORDER = [
    "_checks",
    "curvature",
    "penalties",
    "energy",
    "margin",
    "allocate",
    "acceptance",
    "probe",
    "sharpness",
    "throttle",
    "kappa",
    "certificate",
    "balance",
    "two_phase",
    "weighting",
    "reweight",
    "training",
    "transform",
    "phase",
    "descent",
    "relax",
    "presets",
    "scenarios",
    "suites",
    "io",
    "telemetry",
    "plots",
    "live",
    "validation",
    "demo",
    "sweep",
    "report",
    "cli",
    "__main__",
]
PACKAGES = {
    "energy": ["local", "families", "graph", "build", "losses"],
    "penalties": ["base", "separable", "hoyer", "entropy", "gates", "nodes", "least_squares"],
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smallgain_jax"):
            parts = node.module.split(".")[1:]
            yield from [parts] if parts else [[alias.name] for alias in node.names]


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts
        if module[-1] in ("__init__", "__main__"):
            continue
        assert module[0] in ORDER, f"{module[0]} has no place in the order"
        for parts in imported_modules(path):
            if parts[0] == module[0]:
                order = PACKAGES[module[0]]
                assert order.index(parts[1]) < order.index(module[1]), f"{module} imports {parts}"
            else:
                assert ORDER.index(parts[0]) < ORDER.index(module[0]), f"{module} imports {parts}"


def test_public_names_are_documented():
    public = [name for name in vars(sg) if not name.startswith("_")]
    for name in public:
        thing = getattr(sg, name)
        assert inspect.getdoc(thing), f"{name} has no docstring"
