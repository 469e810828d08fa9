"""Docstrings as they are written in the package, made into reStructuredText.

They hold formulas between dollars, code between single backticks, tables as in Markdown, and the
fields of a NamedTuple as comments beside them. On every page, code that is a public name becomes a
link to its entry.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import smallgain_jax

PACKAGE = "smallgain_jax"
MODULES = ("io", "live", "penalties", "plots", "presets", "report", "scenarios", "suites", "sweep")
MODULES += ("telemetry", "training", "validation")

_SPAN = re.compile(
    r"^(?P<indent>[ ]*)\$\$(?P<display>.+?)\$\$(?P<tail>[.,;]?)$"
    r"|\$(?P<inline>[^$]+)\$"
    r"|``.+?``"
    r"|(?<![`\w:])`(?P<code>[^`]+)`",
    re.MULTILINE | re.DOTALL,
)
_FIELD = re.compile(r"^    (?P<name>[a-z]\w*): (?P<type>[^#\n]+?)(?:\s*#(?P<comment>.*))?$")


def restructured(text: str) -> str:
    """Prose of a docstring as reStructuredText."""
    parts, end = [], 0
    for span in _SPAN.finditer(text):
        parts.append(_prose(text[end : span.start()]))
        parts.append(_converted(span, text[span.end() : span.end() + 1]))
        end = span.end()
    return "".join([*parts, _prose(text[end:])])


def _prose(text: str) -> str:
    # bars are magnitudes and norms here, never substitutions
    return text.replace("|", r"\|")


def _converted(span: re.Match[str], following: str) -> str:
    glue = "\\ " if following.isalnum() else ""
    if (tex := span["display"]) is not None:
        body = f"{' '.join(tex.split())} {span['tail']}".rstrip()
        return f"\n{span['indent']}.. math:: {body}\n"
    if (tex := span["inline"]) is not None:
        return f":math:`{' '.join(tex.split())}`{glue}"
    if (code := span["code"]) is not None:
        code = " ".join(code.split())
        target = public_name(code)
        return f":py:obj:`{code} <{target}>`{glue}" if target else f"``{code}``{glue}"
    return span[0]


def public_name(code: str) -> str | None:
    """The full name of what `sg.relax` or `relax` stands for, or None."""
    name = re.sub(r"^(sg|smallgain_jax)\.", "", code)
    if name.startswith("__") or not re.fullmatch(r"\w+(\.\w+)?", name):
        return None
    first, *rest = name.split(".")
    known = getattr(smallgain_jax, first, None)
    if known is None or (inspect.ismodule(known) and (first not in MODULES or not rest)):
        return None
    if rest and not hasattr(known, rest[0]):
        return None
    # constants are documented where they stand: their comments are read from the source there
    room = "tools." if rest and rest[0].isupper() else ""
    return f"{PACKAGE}.{room}{name}"


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _table(block: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in block]
    head, _, *body = rows
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in [head, *body]:
        first, *others = (restructured(cell.removesuffix("|").strip()) for cell in row)
        out += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return out


def convert(lines: list[str]) -> list[str]:
    """A whole docstring; examples stay as they are."""
    out: list[str] = []
    for block in _paragraphs(lines):
        first = block[0].lstrip()
        if first.startswith(">>>"):
            out += block
        elif first.startswith("| "):
            out += _table(block)
        elif first == "Returns:":
            # an empty line of prose, or napoleon takes what is before a colon for a type
            out += [block[0], "  \\", *restructured("\n".join(block[1:])).split("\n")]
        else:
            out += restructured("\n".join(block)).split("\n")
        out.append("")
    return out


def fields(cls: type) -> list[str]:
    """Fields of a NamedTuple with the comments beside them, as a section of its docstring."""
    out = []
    for line in inspect.getsource(cls).splitlines():
        found = _FIELD.match(line)
        if found and found["name"] in cls._fields:
            comment = (found["comment"] or "").replace("type: ignore[assignment]", "").lstrip(" #")
            out.append(f"  {found['name']}: {comment.strip() or found['type'].strip()}")
    return ["", "Attributes:", *out] if out else []


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "class" and isinstance(obj, type) and hasattr(obj, "_fields"):
        lines += fields(obj)
    lines[:] = convert(lines)


class LinkPublicNames(SphinxTransform):
    """`sg.name` in the text of a page links to the entry of that name."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            name = text.partition("(")[0]
            if not re.fullmatch(r"sg\.\w+(\.\w+)*", name) or isinstance(
                literal.parent, nodes.reference | addnodes.pending_xref
            ):
                continue
            target = public_name(name)
            if target is None:
                continue
            link = addnodes.pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refwarn=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, bool]:
    # before napoleon, which makes field lists of the sections
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.add_transform(LinkPublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
