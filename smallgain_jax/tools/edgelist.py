"""Edge lists of NetworkX: two ends and a dictionary of Python on every line."""

import ast
import math
import re
from pathlib import Path
from typing import Any

from smallgain_jax.tools.tables import (
    COMMENTS,
    DELIMITED,
    FileFormatError,
    Sheet,
    opened,
    read_lines,
    stripped,
    suffix_of,
)

_LINE = re.compile(r"([^{]*[^\s,;|{])[\s,;|]+(\{.*\})\s*")
_WORDS = {"nan": math.nan, "inf": math.inf, "True_": True, "False_": False}
"""What Python and NumPy print for a number that is no literal."""
_SEPARATOR = re.compile(r"\s*[,;|\t]\s*|\s+")


def read_edgelist(path: Path) -> Sheet | None:
    """What `networkx.write_edgelist` wrote, a column for each key; None for any other file.

    Raises:
      FileFormatError: a line that does not have that form, or whose dictionary is not of numbers,
        text and the like.
      OSError: a file that cannot be opened.
    """
    if suffix_of(path) not in DELIMITED or not _begins_like_one(path):
        return None
    content = [
        (k, line)
        for k, line in enumerate(read_lines(path), 1)
        if line.strip() and not line.lstrip().startswith(COMMENTS)
    ]
    ends: dict[str, list[Any]] = {"source": [], "target": []}
    data = []
    for k, line in content:
        pair, attributes = _edge(path, k, line)
        for end, name in zip(ends.values(), pair, strict=True):
            end.append(name)
        data.append(attributes)
    # what the file calls as we call the ends is only an attribute there
    names = dict.fromkeys(key for own in data for key in own if key.casefold() not in ends)
    columns = ends | {name: stripped([own.get(name) for own in data]) for name in names}
    at = [k for k, _ in content]
    return Sheet(
        path, tuple(columns), tuple(columns.values()), lambda row: (at[row], f"line {at[row]}")
    )


def _begins_like_one(path: Path) -> bool:
    """By the first line that says something: other files, however long, are not read here."""
    with opened(path) as file:
        for raw in file:
            line = raw.decode("utf-8-sig", errors="replace")
            if line.strip() and not line.lstrip().startswith(COMMENTS):
                return _LINE.fullmatch(line) is not None
    return False


def _edge(path: Path, k: int, line: str) -> tuple[list[str], dict[str, Any]]:
    match = _LINE.fullmatch(line)
    pair = _SEPARATOR.split(match[1].strip()) if match else []
    if match is None or len(pair) != 2:
        problem = "expected two ends and a dictionary, as in a b {'weight': 0.5}"
        raise FileFormatError(path, k, None, problem)
    try:
        attributes = _literal(match[2])
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        problem = f"{match[2]} is not a dictionary of numbers and text"
        raise FileFormatError(path, k, None, problem) from error
    return pair, {str(key): value for key, value in attributes.items()}


def _literal(text: str) -> dict[Any, Any]:
    """A dictionary as Python prints it, with numbers of NumPy, NaN and infinity.

    >>> _literal("{'weight': nan, 'w': -np.inf, 'c': np.float64(0.5), 'b': np.True_}")
    {'weight': nan, 'w': -inf, 'c': 0.5, 'b': True}
    """
    try:
        value = ast.literal_eval(text)
    except ValueError:
        # names and calls, of which only a few mean a number: nothing is run
        value = ast.literal_eval(_Printed().visit(ast.parse(text, mode="eval")))
    if not isinstance(value, dict):
        raise ValueError("no dictionary")
    return value


class _Printed(ast.NodeTransformer):
    """Literals in place of `nan`, `np.inf`, `np.True_` and `np.float64(0.5)`."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        known = _of_numpy(node) and node.attr in _WORDS
        return ast.Constant(_WORDS[node.attr]) if known else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if _of_numpy(node.func) and len(node.args) == 1 and not node.keywords:
            return self.visit(node.args[0])
        return node


def _of_numpy(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("np", "numpy")
    )
