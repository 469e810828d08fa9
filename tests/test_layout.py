"""The house: floors import downwards only, and every public name is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import smallgain_jax as sg

pytestmark = pytest.mark.once
PACKAGE = Path(sg.__file__).parent
FLOORS = [
    {"_checks", "_show"},
    {"_tree", "_compiling", "_canonical"},
    {"spectral", "search"},
    {"allocation", "limits", "penalties", "presets"},
    {"graphs", "losses", "networks", "throttling"},
    {"transform"},
    {"tools"},
    {"__init__", "__main__"},
]
"""From the ground up. Rooms of one floor never import each other."""


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smallgain_jax"):
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]


def floor_of(room):
    (found,) = [k for k, rooms in enumerate(FLOORS) if room in rooms]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_floors_import_downwards(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for other in imported_rooms(path):
        assert other == room or floor_of(other) < floor_of(room), f"{path} imports {other}"


def test_public_names_are_documented():
    for name in sg.__all__:
        assert inspect.getdoc(getattr(sg, name)), f"{name} has no docstring"


def test_importing_loads_no_tool():
    found = subprocess.run(
        [sys.executable, "-c", "import smallgain_jax, sys; print(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not [name for name in found if name.startswith("smallgain_jax.tools.")]
    assert not {"scipy.optimize", "scipy.sparse", "matplotlib", "tyro", "msgspec"} & set(found)
