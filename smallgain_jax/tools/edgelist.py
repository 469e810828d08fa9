"""Edge lists of NetworkX: two ends and a dictionary of Python on every line."""

import ast
import gzip
import lzma
import re
from pathlib import Path
from typing import Any

from smallgain_jax.tools.tables import (
    DELIMITED,
    FileFormatError,
    Sheet,
    as_format_error,
    opened,
    read_lines,
    stripped,
    suffix_of,
)

_LINE = re.compile(r"([^{]*[^\s,;|{])[\s,;|]+(\{.*\})\s*")
_NUMPY_SCALAR = re.compile(r"\bnp\.\w+\(([^()]*)\)")
"""How NumPy 2 shows its numbers inside a dictionary: np.float64(0.5)."""
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
        if line.strip() and not line.startswith("#")
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
    with as_format_error(path, EOFError, gzip.BadGzipFile, lzma.LZMAError), opened(path) as file:
        for raw in file:
            line = raw.decode("utf-8-sig", errors="replace")
            if line.strip() and not line.startswith("#"):
                return _LINE.fullmatch(line) is not None
    return False


def _edge(path: Path, k: int, line: str) -> tuple[list[str], dict[str, Any]]:
    match = _LINE.fullmatch(line)
    pair = _SEPARATOR.split(match[1].strip()) if match else []
    if match is None or len(pair) != 2:
        problem = "expected two ends and a dictionary, as in a b {'weight': 0.5}"
        raise FileFormatError(path, k, None, problem)
    try:
        attributes = ast.literal_eval(_NUMPY_SCALAR.sub(r"\1", match[2]))
    except (ValueError, SyntaxError) as error:
        problem = f"{match[2]} is not a dictionary of numbers and text"
        raise FileFormatError(path, k, None, problem) from error
    return pair, {str(key): value for key, value in attributes.items()}
