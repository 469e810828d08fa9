"""What the columns of a table mean: their names, their numbers, their node ids.

The one place that knows how people call things. A column is found by its name in any case, by a
usual other name, or by the name that the caller gives; every other column is ignored, and a note
says so. Notes are collected on the way, for whoever shows them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from smallgain_jax.graphs.build import LOWEST, known_parameters, to_default_dtype
from smallgain_jax.tools.tables import (
    NO_NUMBER,
    NOT_ZERO,
    Cells,
    FileFormatError,
    Sheet,
    shown_separator,
    suffix_of,
)

LANDAU = ("a", "b", "target")
LOWEST_CELL = {**LOWEST, "b": 0.0}

_ENDS = (
    ("source", "target"),
    ("src", "dst"),
    ("src", "tgt"),
    ("from", "to"),
    ("source_id", "target_id"),
    ("from_id", "to_id"),
    ("fromnodeid", "tonodeid"),
    ("from_node", "to_node"),
    ("source_node", "target_node"),
    ("node1", "node2"),
    ("node_1", "node_2"),
    ("u", "v"),
    ("i", "j"),
    ("row", "col"),
    ("tail", "head"),
)
"""How the two ends of an edge are called, the first that a table has both of."""
_OTHER_NAMES = {
    "weight": ("w", "weights", "wt", "edge_weight", "value", "val"),
    "node": ("node_id", "nodeid", "id", "name", "label", "vertex"),
}
_MISSING = frozenset(("", "na", "n/a", "#n/a", "nan", "-nan", "null", "none"))
_NUMBER = re.compile(rf"(?!{NO_NUMBER})-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
"""An id that is a number: neither 007 nor 1e5."""
_WHOLE = re.compile(r"(-?\d+)(\.0*)?")
_SUSPECT = re.compile(r"\n([-.0-9]|[-#nN][^\n]{0,3}(\n|\Z))")
"""Where ids one a line may hold a number, or the spelling of a missing value."""
_NOT_ZERO = re.compile(NOT_ZERO)
_SMALLEST = np.nextafter(0.0, 1.0)
_SHOWN = 5


class Column(NamedTuple):
    """One column of a table, by what it means."""

    sheet: Sheet
    name: str  # in the file
    cells: Cells

    def fail(self, row: int, problem: str) -> NoReturn:
        """Raise the error for a cell."""
        self.sheet.fail(row, self.name, problem)

    def shown(self, row: int) -> str:
        """A cell as the file has it, as nearly as it was kept."""
        cell = self.cells[row]
        return f"{cell:.15g}" if isinstance(cell, float) else str(cell)


class Meaning(NamedTuple):
    """The columns of a table by role, and how many rows they have."""

    sheet: Sheet
    columns: Mapping[str, Column]
    notes: list[str]

    def numbers(self, role: str, default: float) -> np.ndarray:
        """A column as float64 [rows], `default` where it is absent or a cell is missing."""
        column = self.columns.get(role)
        if column is None:
            return np.full(self.sheet.num_rows, default)
        values, missing = numbers(column)
        _check_range(column, values, missing, LOWEST_CELL.get(role))
        if role == "weight" and (count := int(missing.sum())):
            self.notes.append(
                f"{self.sheet.path.name}: {count} of {missing.size} cells of column "
                f"{column.name!r} hold no value and mean the default, {default:g}"
            )
        too_small = (values != 0) & (np.abs(values) < jnp.finfo(jnp.result_type(float)).tiny)
        if count := int(too_small.sum()):
            self.notes.append(
                f"{self.sheet.path.name}: {count} of {missing.size} cells of column "
                f"{column.name!r} are too small for {jnp.result_type(float)} and count as 0"
            )
            values[too_small] = 0
        values[missing] = default
        return values


def edge_meaning(sheet: Sheet, named: Mapping[str, str | None]) -> Meaning:
    """The roles source, target, family, weight and the families' parameters.

    Args:
      sheet: an edge table.
      named: the file's names for roles, as the caller gives them; None where it does not.

    Raises:
      FileFormatError: no column for an end, one that appears twice or looks misspelled, no rows.
    """
    roles = ("source", "target", "weight", "family", *known_parameters())
    if sheet.header and not any(named.get(role) for role in roles[:2]):
        sheet = _edges_first(sheet, roles)
    if not sheet.header and 2 <= len(sheet.cells) <= 3:
        header = roles[: len(sheet.cells)]
        sheet = sheet._replace(header=header)
        note = f"{sheet.path.name} has no header: its columns are read as {', '.join(header)}"
        sheet = sheet._replace(notes=(*sheet.notes, note, *_first_line(sheet)))
    return _meaning(sheet, roles, ("source", "target"), named)


def _edges_first(sheet: Sheet, roles: Sequence[str]) -> Sheet:
    """The sheet, without its header where that is none: a mere comment, or the first edge."""
    plain = [_plain(name) for name in sheet.header]
    if {"source", "target"} & _found(sheet, plain, roles, {}).keys():
        return sheet
    if sheet.commented:
        return sheet._replace(header=())
    if suffix_of(sheet.path) not in (".edges", ".edgelist") or len(plain) > 3:
        return sheet
    line = sheet.header_line
    cells = [[name or None, *rest] for name, rest in zip(sheet.header, sheet.cells, strict=True)]
    place = sheet.place
    return sheet._replace(
        header=(),
        cells=tuple(cells),
        place=lambda row: place(row - 1) if row else (line, f"line {line}"),
    )


def _first_line(sheet: Sheet) -> list[str]:
    """A note where the first row may be none: counts of nodes and edges, or numbers of columns."""
    if sheet.num_rows < 2:
        return []
    first = [
        f"{cells[0]:g}" if isinstance(cells[0], float) else str(cells[0]) for cells in sheet.cells
    ]
    meant = ""
    if len(first) == 2 and first[1] == str(sheet.num_rows - 1):
        meant = f"it says that there are {first[0]} nodes and {first[1]} edges"
    elif first == [str(c) for c in range(len(first))] and not _again(sheet):
        meant = "it numbers the columns, as pandas does where they have no names"
    line = (", " if sheet.separator == "," else " ").join(first)
    return [f"its first line, {line}, is read as an edge: remove it if {meant}"] if meant else []


def _again(sheet: Sheet) -> bool:
    """Whether the first id of a table without weights, 0, occurs in another row."""
    ends = [cells[1:] for cells in sheet.cells]
    found = [bool(np.any(e == 0)) if isinstance(e, np.ndarray) else "0" in e for e in ends]
    return len(found) == 2 and any(found)


def may_mean(name: str, named: Mapping[str, str | None]) -> bool:
    """Whether an edge or node table may have a column of this name for something that is read."""
    roles = ("source", "target", "weight", "family", "node", "start", *LANDAU, *known_parameters())
    others = [other for names in (*_ENDS, *_OTHER_NAMES.values()) for other in names]
    return _plain(name) in (*roles, *others) or name.strip() in named.values()


def node_meaning(sheet: Sheet, named: Mapping[str, str | None]) -> Meaning:
    """The roles node, a, b, target and start, as `edge_meaning`."""
    own = {"node": named.get("node")}
    return _meaning(sheet, ("node", *LANDAU, "start"), ("node",), own)


def _meaning(
    sheet: Sheet, roles: Sequence[str], required: Sequence[str], named: Mapping[str, str | None]
) -> Meaning:
    if not sheet.header and sheet.cells:
        first = ", ".join(str(cells[0]) for cells in sheet.cells)
        problem = f"the file has no header: its first line is {first}"
        raise FileFormatError(sheet.path, sheet.header_line, None, problem)
    plain = [_plain(name) for name in sheet.header]
    found = _found(sheet, plain, roles, named)
    missing = [role for role in required if role not in found]
    if missing:
        _fail_missing(sheet, missing)
    rest = [c for c in range(len(sheet.header)) if c not in found.values()]
    _refuse_misspelled(sheet, rest, [role for role in roles if role not in found])
    if not sheet.num_rows:
        raise FileFormatError(sheet.path, None, None, sheet.empty)
    columns = {role: Column(sheet, sheet.header[c], sheet.cells[c]) for role, c in found.items()}
    notes = [
        note if sheet.path.name in note else f"{sheet.path.name}, {note}" for note in sheet.notes
    ]
    unweighted = "weight" in roles and "weight" not in found
    return Meaning(sheet, columns, notes + _ignored(sheet, rest, unweighted))


def _plain(name: str) -> str:
    return re.sub(r"[\s\-]+", "_", name.strip().casefold())


def _found(
    sheet: Sheet, plain: Sequence[str], roles: Sequence[str], named: Mapping[str, str | None]
) -> dict[str, int]:
    """Position of the column for every role that has one."""
    found: dict[str, int] = {}
    for role, name in named.items():
        if name is not None and role in roles:
            found[role] = _position(sheet, [h.strip() for h in sheet.header], name.strip())
            if found[role] < 0:
                _fail_missing(sheet, [name])
    pairs = [pair for pair in _ENDS if all(end in plain for end in pair)]
    ends = dict(zip(("source", "target"), pairs[0], strict=True)) if pairs else {}
    for role in roles:
        if role in found:
            continue
        names = (role, *_OTHER_NAMES.get(role, ()))
        if role in ends and "source" in roles:
            # a pair, even where one of its ends has a column of the usual name beside it
            names = (ends[role],)
        for name in names:
            position = _position(sheet, plain, name)
            if position >= 0 and position not in found.values():
                found[role] = position
                break
    return found


def _position(sheet: Sheet, names: Sequence[str], name: str) -> int:
    if names.count(name) > 1:
        raise FileFormatError(sheet.path, sheet.header_line, name, "the column appears twice")
    return names.index(name) if name in names else -1


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _fail_missing(sheet: Sheet, names: Sequence[str]) -> NoReturn:
    name, *others = names
    there = ", ".join(repr(h) for h in sheet.header) or "none"
    how = f", separated by {shown_separator(sheet.separator)}" if sheet.separator else ""
    if how and len(sheet.header) == 1 and " " in sheet.header[0]:
        # nothing parts this line, and a list of neighbours has lines of all lengths
        how = " alone, as white space parts cells only where all lines have as many"
    roles = ("source", "target", "node")
    flags = " and ".join(f"--{role}" for role in names)
    flag = f"; name the column that it is with {flags}" if name in roles else ""
    if any(map(_is_number, sheet.header)):
        # naming columns after a first edge would lose that edge
        example = "node,a,target" if name == "node" else "source,target,weight"
        flag = f"; this line looks like data: put a line of names before it, as {example}"
    what = "the column is missing"
    if others:
        what = f"this column and {' and '.join(map(repr, others))} are missing"
    problem = f"{what}: there are {there}{how}{flag}"
    raise FileFormatError(sheet.path, sheet.header_line, name, problem)


def _refuse_misspelled(sheet: Sheet, rest: Sequence[int], absent: Sequence[str]) -> None:
    for c in rest:
        for role in absent:
            if len(role) > 3 and _one_slip(_plain(sheet.header[c]), role):
                raise FileFormatError(
                    sheet.path,
                    sheet.header_line,
                    sheet.header[c],
                    f"the column is unknown: if it is meant to be {role!r}, rename it",
                )


def _one_slip(name: str, role: str) -> bool:
    """Whether one letter is missing, too many, or two neighbours have changed places."""
    short, long = sorted((name, role), key=len)
    if len(long) == len(short) + 1:
        return any(long[:k] + long[k + 1 :] == short for k in range(len(long)))
    swaps = (name[:k] + name[k + 1] + name[k] + name[k + 2 :] for k in range(len(name) - 1))
    return len(long) == len(short) and name != role and role in swaps


def _ignored(sheet: Sheet, rest: Sequence[int], unweighted: bool) -> list[str]:
    named = [repr(sheet.header[c]) for c in rest if sheet.header[c].strip()]
    # a separator at the end of every line makes a column of nothing
    bare = [
        str(c + 1) for c in rest if not sheet.header[c].strip() and not _is_blank(sheet.cells[c])
    ]
    parts = [f"column{'s' * (len(named) > 1)} {listed(named)}"] if named else []
    parts += [f"column {' and '.join(bare)}, which has no name"] if bare else []
    parts += [listed(sheet.left_out)] if sheet.left_out else []
    if not parts:
        return []
    note = f"{sheet.path.name}: ignored {' and '.join(parts)}"
    if unweighted and named:
        note += "; every weight is 1 (if one of them is the weight, say so with --weight)"
    elif unweighted and sheet.left_out:
        note += "; every weight is 1 (a weight is an array of one number an edge)"
    return [note]


def _is_blank(cells: Cells) -> bool:
    return all(cell is None or cell != cell for cell in cells)


def listed(names: Sequence[str], most: int = _SHOWN) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def numbers(column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Values of a column, float64 [rows], and where it has none, bool [rows].

    No value is a blank cell, null, NaN, or text that spells one of these (NA, None, ...), in every
    format alike. A comma may stand for the decimal point wherever it does not part the cells.

    Raises:
      FileFormatError: a cell that is not a number.
    """
    if isinstance(column.cells, np.ndarray):
        values = column.cells.astype(np.float64)
        return values, np.isnan(values)
    comma = column.sheet.separator not in (None, ",")
    values = np.empty(len(column.cells))
    for k, cell in enumerate(column.cells):
        try:
            values[k] = float(np.nan if cell is None else cell)
            if isinstance(cell, str) and "_" in cell:
                # Python reads 1_000, which no file means
                column.fail(k, f"{cell!r} is not a number")
            if values[k] == 0 and isinstance(cell, str) and _NOT_ZERO.match(cell):
                # 1e-400 is too small, and not 0
                values[k] = np.copysign(_SMALLEST, values[k])
        except FileFormatError:
            raise
        except (ValueError, TypeError, OverflowError):
            values[k] = _spelled(column, k, comma)
    return values, np.isnan(values)


def _spelled(column: Column, row: int, comma: bool) -> float:
    cell = column.cells[row]
    if isinstance(cell, str):
        if is_missing(cell):
            return float("nan")
        if comma and re.fullmatch(r"[-+]?\d*,\d+([eE][-+]?\d+)?", cell):
            # where a semicolon parts the cells a comma is decimal; elsewhere 1,234 may be either
            if column.sheet.separator != ";" and re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", cell):
                column.fail(row, f"{cell!r} may be a fraction or thousands: write a decimal point")
            return float(cell.replace(",", "."))
    hint = ": write a decimal point" if re.fullmatch(r"[-+]?\d+,\d+", str(cell)) else ""
    column.fail(row, f"{cell!r} is not a number{hint}")


def _check_range(
    column: Column, values: np.ndarray, missing: np.ndarray, low: float | None
) -> None:
    # a cell is blamed with its own text, "1e999" rather than "inf"
    for k in np.flatnonzero(~missing & ~np.isfinite(to_default_dtype(values)))[:1]:
        column.fail(int(k), f"{column.shown(int(k))} must be finite")
    if low is not None:
        for k in np.flatnonzero(~missing & (values < low))[:1]:
            column.fail(int(k), f"{column.shown(int(k))} must be at least {low:g}")


Names = np.ndarray | list[str]
"""Node ids: int64 where all of them are whole numbers, else text."""


def node_names(columns: Sequence[Column], notes: list[str]) -> list[Names]:
    """Node ids of columns that name the same nodes: all of them int64, or all of them text.

    Each id is spelled in one way, whatever stands beside it: 2.0 and 2.000e+00 are 2, while 007 and
    1e5 are names. Text that spells a missing value is a name among names, with a note, and no id
    among numbers.

    Raises:
      FileFormatError: a missing cell, a fraction, or a cell that is neither a number nor text.
    """
    own = [_own_ids(column) for column in columns]
    for k, ids in enumerate(own):
        if not ids.words:
            continue
        row = next(row for row, name in enumerate(ids.names) if name in ids.words)
        word = columns[k].shown(row)
        if all(other.numbers for other in own):
            columns[k].fail(row, f"{word!r} stands for no value: the cell must name a node")
        notes.append(
            f"{columns[k].sheet.path.name}: {word!r} in column {columns[k].name!r} is the name of "
            "a node, as other ids are text: no end of an edge may be missing"
        )
    for column, ids in zip(columns, own, strict=True):
        # beside a word that is a name, a fraction is one too
        if ids.numbers and not ids.whole and not ids.words and isinstance(ids.names, list):
            _refuse_fraction(column, ids.names)
    if all(ids.whole for ids in own):
        return [np.asarray(ids.names, np.int64) for ids in own]
    return [as_text(ids.names) for ids in own]


def is_missing(cell: str) -> bool:
    """Whether text spells a missing value.

    >>> is_missing("NaN"), is_missing("0")
    (True, False)
    """
    # most ids are longer than all of these
    return len(cell) <= _LONGEST and cell.casefold() in _MISSING


_EMPTY = "the cell is empty: it must name a node"
_NO_ID = "is neither an integer nor text: it cannot name a node"
_LONGEST = max(map(len, _MISSING))


def could_name(ids: Sequence[str]) -> bool:
    """Whether these ids tell as many nodes apart: none is a fraction, negative or missing.

    >>> could_name(["1", "2"]), could_name(["0.5", "1.5"]), could_name(["a", "0.5"])
    (True, False, True)
    """
    numbers = [name for name in map(_id, ids) if _NUMBER.fullmatch(name)]
    whole = [name for name in numbers if _WHOLE.fullmatch(name) and name[0] != "-"]
    fits = len(numbers) < len(ids) or len(whole) == len(ids)
    return fits and len(set(map(_id, ids))) == len(ids) and not any(map(is_missing, ids))


class _Ids(NamedTuple):
    """The ids of one column, each as `_id` spells it."""

    names: Names
    words: frozenset[str] = frozenset()  # those that spell a missing value
    numbers: bool = False  # whether all others are numbers
    whole: bool = False  # whether all are whole numbers that int64 holds


def _own_ids(column: Column) -> _Ids:
    cells = column.cells
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind == "i":
            return _Ids(cells, numbers=True, whole=True)
        for k in np.flatnonzero(~(np.isfinite(cells) & (cells == np.round(cells))))[:1]:
            empty = np.isnan(cells[k])
            column.fail(int(k), _EMPTY if empty else f"{column.shown(int(k))} {_NO_ID}")
        if not cells.size or np.abs(cells).max() < 2**53:
            return _Ids(cells.astype(np.int64), numbers=True, whole=True)
        return _Ids([f"{cell:.0f}" for cell in cells], numbers=True)
    if set(map(type, cells)) == {str}:
        return _text_ids(cells)
    for k, cell in enumerate(cells):
        if cell is None:
            column.fail(k, _EMPTY)
        if isinstance(cell, bool) or not isinstance(cell, str | int | float):
            column.fail(k, f"{cell!r} {_NO_ID}")
    return _text_ids(list(map(str, cells)))


def _text_ids(names: list[str]) -> _Ids:
    # most text has neither numbers nor such words, which one search tells
    if not _SUSPECT.search("\n" + "\n".join(names)):
        return _Ids(names)
    # each id once: there are fewer of them than cells
    distinct = set(names)
    other = {name: spelled for name in distinct if (spelled := _id(name)) != name}
    if other:
        names = [other.get(name, name) for name in names]
        distinct = {other.get(name, name) for name in distinct}
    words = frozenset(filter(is_missing, distinct))
    numbers = all(name in words or _NUMBER.fullmatch(name) for name in distinct)
    # text may spell a number of any size
    whole = numbers and all(len(name) < 19 and _WHOLE.fullmatch(name) for name in distinct)
    return _Ids(names, words, numbers, whole)


def _id(name: str) -> str:
    """A whole number without point, exponent or sign of zero; all else as it is."""
    if name[:1] not in "-.0123456789" or not _NUMBER.fullmatch(name):
        return name
    if plain := _WHOLE.fullmatch(name):
        return "0" if plain[1] == "-0" else plain[1]
    value = float(name)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 2**53 else name


def _refuse_fraction(column: Column, names: list[str]) -> None:
    for k, name in enumerate(names):
        if not _WHOLE.fullmatch(name):
            column.fail(k, f"{name} {_NO_ID}")


def as_text(names: Names) -> list[str]:
    """Node ids as text."""
    texts: list[str] = names if isinstance(names, list) else names.astype(np.str_).tolist()
    return texts
