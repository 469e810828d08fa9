"""Every public name has a docstring, and an entry in the API reference."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import smallgain_jax as sg
from smallgain_jax.tools import demo
from smallgain_jax.tools.cli import main

pytestmark = pytest.mark.once
DOCS = Path(__file__).parents[1] / "docs"
MODULES = (
    "hard",
    "io",
    "live",
    "penalties",
    "plots",
    "presets",
    "report",
    "scenarios",
    "suites",
    "sweep",
    "telemetry",
    "validation",
)
# shared between modules of the package, or names of types: nothing that a user calls
INTERNAL = {
    "io.Columns",
    "io.PathLike",
    "io.optional_module",
    "suites.Generator",
    "validation.METHODS",
    "validation.as_table",
    "validation.check_common",
    "validation.to_stderr",
}
ENTRY = re.compile(
    r"^\.\. auto(?:class|data|function):: smallgain_jax\.(?:tools\.)?([\w.]+)$", re.MULTILINE
)


def defined_in(module):
    """Names that a module defines, or that the package `penalties` hands on."""
    home = Path(inspect.getfile(module))
    for node in ast.parse(home.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets)
        elif isinstance(node, ast.ImportFrom) and home.name == "__init__.py":
            yield from (alias.name for alias in node.names)


def public_names():
    """`name` for those of the package itself, `module.name` for those of its modules."""
    for name in sg.__all__:
        if not inspect.ismodule(getattr(sg, name)):
            yield name
    for module in MODULES:
        for name in defined_in(getattr(sg, module)):
            if not name.startswith("_"):
                yield f"{module}.{name}"


def thing_named(name):
    module, _, last = name.rpartition(".")
    return getattr(getattr(sg, module) if module else sg, last)


def entries():
    return [name for page in sorted(DOCS.rglob("*.md")) for name in ENTRY.findall(page.read_text())]


def test_every_public_name_is_in_the_reference():
    found = entries()
    # what the package hands on has its entry there
    known = {*found, *INTERNAL, *(f"live.{name}" for name in found)}
    assert sorted(set(public_names()) - known) == []


def test_entries_exist_once_and_have_docstrings():
    found = entries()
    assert len(found) > 100
    assert sorted({name for name in found if found.count(name) > 1}) == []
    for name in found:
        thing = thing_named(name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            # a NamedTuple's own docstring is only its signature
            text = inspect.getdoc(thing) or ""
            assert text, name
            assert not text.startswith(f"{thing.__name__}("), name


def test_pages_name_nothing_that_is_missing():
    for page in DOCS.rglob("*.md"):
        for path in re.findall(r"`sg\.([\w.]+)", page.read_text()):
            thing = sg
            for part in path.split("."):
                thing = getattr(thing, part, None)
            assert thing is not None, f"{page.name}: sg.{path}"


def test_the_formulas_have_the_modules_and_tests_that_their_table_names():
    page = (DOCS / "mathematics.md").read_text()
    table = page.partition("## Where each formula lives")[2]
    modules = set(re.findall(r"`([\w/]+\.py)`", table))
    tests = re.findall(r"`(test_\w+\.py)::(\w+)`", table)
    assert len(tests) > 30
    for path in modules:
        assert (DOCS.parent / "smallgain_jax" / path).is_file(), path
    for path, name in tests:
        text = (DOCS.parent / "tests" / path).read_text()
        assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"{path}::{name}"


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / line).resolve() for line in lines}
    pages = {page.with_suffix("").resolve() for page in DOCS.rglob("*.md")}
    assert sorted(pages - listed) == [(DOCS / "index").resolve()]


PRIVATE = re.compile(
    r"\bseed[s']* (?:document|setting|score)|the seeds\b|published scenario|F90|\bAGM\b|delta_f90"
    r"|small.gain allocator|\badapted\b|-\d\.\d+e-1[4-6]",
    re.IGNORECASE,
)
"""Words of the notes that the library grew from, and digits that are rounding."""


def test_front_texts_speak_to_strangers(capsys):
    texts = {name: (DOCS.parent / name).read_text() for name in ("README.md", "docs/index.md")}
    for command in ("demo", "relax", "bench", "sweep", "plot"):
        assert main([command, "--help"]) == 0
        texts[command] = capsys.readouterr().out
    main([])
    texts["smallgain"] = capsys.readouterr().out + demo.OPENING + demo.COLUMNS
    for name, text in texts.items():
        found = PRIVATE.findall(text)
        assert not found, f"{name} says {found}"


def test_words_of_the_glossary_lead_the_front_texts():
    """What the README and the index use in a sense of their own is explained, or says itself."""
    explained = (DOCS / "glossary.md").read_text().lower()
    own = ("sharpness", "margin", "limit", "share", "price", "hinge", "guard", "box", "metric")
    for word in own:
        assert f"**{word}" in explained or f", {word}" in explained, word
