"""Files of `smallgain relax`: graphs in, states out.

An edge table has the columns `source` and `target` and may have `family` (quadratic by default),
`weight` (1 by default) and the parameters of the families; a node table has `node` and may have
`a`, `b` and `target` of the `Landau` energies and the `start` of the state (each 0 by default). An
empty cell means the default: null in Parquet, NaN for a parameter in NPZ.
"""

import csv
import gc
import importlib
import itertools
import os
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from xml.etree.ElementTree import ParseError

import jax
import jax.numpy as jnp
import numpy as np
import scipy.io
import scipy.sparse

from smallgain_jax.graphs.build import (
    LOWEST,
    EdgeColumns,
    family_parameters,
    from_scipy,
    known_parameters,
    to_default_dtype,
)
from smallgain_jax.graphs.families import FAMILIES
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau

PathLike = str | os.PathLike[str]

_LOWEST = {**LOWEST, "b": 0.0}
_LARGEST_NODE = np.iinfo(np.int32).max
_LANDAU = ("a", "b", "target")
_NODE_COLUMNS = ("node", *_LANDAU, "start")


class FileFormatError(ValueError):
    """A file that is not what it should be; the message names the file, the line and the column.

    Attributes:
      path: the file.
      line: from 1; in a CSV file the line as an editor shows it, in Parquet and NPZ the row. None
        where the problem has no line.
      column: name of the column, or None.

    >>> raise FileFormatError("edges.csv", 3, "weight", "-1 must be at least 0")
    Traceback (most recent call last):
    smallgain_jax.io.FileFormatError: edges.csv, line 3, column 'weight': -1 must be at least 0
    """

    def __init__(
        self,
        path: PathLike,
        line: int | None,
        column: str | None,
        problem: str,
        *,
        place: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.line = line
        self.column = column
        if place is None and line is not None:
            place = f"line {line}"
        where = [str(path), place, column and f"column {column!r}"]
        super().__init__(f"{', '.join(filter(None, where))}: {problem}")


class GraphFile(NamedTuple):
    """A graph as it was read.

    `labels[r]` is what the file calls node r; `edges[k]` is the row of the edge table, from 0, that
    term k of the graph came from.
    """

    graph: EnergyGraph
    x0: jax.Array | None  # [n], where the nodes tell a start
    labels: tuple[str, ...]  # n of them
    edges: np.ndarray  # int [E]


@contextmanager
def _collector_paused() -> Iterator[None]:
    # a million rows are a million small lists: with JAX loaded, collecting doubles the time
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def read_graph(path: PathLike, nodes: PathLike | None = None) -> GraphFile:
    """Read a graph from an edge table and an optional node table, or from a graph file.

    Nodes are named by integers or by any text. Integers from 0 are node numbers; a node table whose
    integers are not exactly 0..n-1 makes them names. Names are numbered in order of first
    appearance, in the node table where there is one. Matrix Market nodes are numbers from 0, as in
    `from_scipy`, whose reading of symmetric and other matrices applies.

    Args:
      path: `.csv`, `.parquet`, `.npz` (one array per column), `.graphml` (attributes named like the
        columns, of nodes too) or `.mtx`.
      nodes: node table, `.csv`, `.parquet` or `.npz`. Without one (and without attributes a, b or
        target) the graph has no local energy.

    Returns:
      `GraphFile(graph, x0 [n] or None, labels, edges int [E])`.

    Raises:
      FileFormatError: a malformed file, by its line and column.
      OSError: a file that cannot be opened.
      ImportError: Parquet without polars, GraphML without networkx.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "edges.csv")
    ...     _ = path.write_text("source,target,weight\\nann,bob,0.5\\nbob,eve,\\n")
    ...     graph, x0, labels, edges = read_graph(path)
    >>> labels, graph.edges[0].weight.tolist()
    (('ann', 'bob', 'eve'), [0.5, 1.0])
    """
    path = Path(path)
    node_table = None if nodes is None else _read_table(Path(nodes))
    if path.suffix.lower() == ".mtx":
        return _read_matrix_market(path, node_table)
    if path.suffix.lower() == ".graphml":
        edge_table, own_nodes = _read_graphml(path)
        node_table = own_nodes if node_table is None else node_table
    else:
        edge_table = _read_table(path, extra=(".graphml", ".mtx"))
    return _assemble(edge_table, node_table)


def write_atomic(path: PathLike, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all.

    Args:
      path: where the file belongs; what is there stays until the new file is complete.
      write: writes the file at the path it is given, in the same folder and of the same suffix.

    Raises:
      Exception: whatever `write` raises, with nothing left behind.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(f"{folder}/a.txt", lambda path: path.write_text("whole"))
    ...     pathlib.Path(folder, "a.txt").read_text()
    'whole'
    """
    path = Path(path)
    # not tempfile, whose files only their owner may read; the suffix stays for writers that add it
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_state(path: PathLike, x: jax.Array | np.ndarray, labels: Sequence[str]) -> None:
    """Write a state as a table: `node` and `x`, or `x0`, ..., `x{d-1}` for vector nodes.

    Args:
      path: `.csv`, `.parquet` or `.npz`.
      x: state, float [n] or [n, d].
      labels: names of the n nodes; written as integers where all of them are.

    Raises:
      ValueError: an unknown suffix, or labels that do not match x.
      ImportError: Parquet without polars.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(f"{folder}/x.csv", np.array([0.5, 1.0]), ("ann", "bob"))
    ...     pathlib.Path(folder, "x.csv").read_text()
    'node,x\\nann,0.5\\nbob,1.0\\n'
    """
    path, state = Path(path), np.asarray(x)
    _check_suffix(path)
    if state.ndim not in (1, 2):
        raise ValueError(f"x has shape {state.shape}, expected [n] or [n, d]")
    if len(labels) != state.shape[0]:
        raise ValueError(f"labels has {len(labels)} entries, expected {state.shape[0]}, one a node")
    values = {"x": state} if state.ndim == 1 else {f"x{c}": v for c, v in enumerate(state.T)}
    write_table(path, {"node": _node_column(labels), **values})


def write_table(
    path: PathLike, columns: dict[str, np.ndarray], text: Callable[[Any], str] = str
) -> None:
    """Write columns of one length as a table, or nothing.

    Args:
      path: `.csv`, `.parquet` or `.npz`.
      columns: arrays [rows] by name.
      text: how a CSV cell prints a value.

    Raises:
      ValueError: another suffix.
      ImportError: Parquet without polars.
    """
    path = Path(path)
    _check_suffix(path)
    writer = _WRITERS[path.suffix.lower()]
    write_atomic(path, lambda temporary: writer(temporary, columns, text))


def read_columns(path: PathLike) -> dict[str, np.ndarray]:
    """Read a table of numbers, as `write_table` and `Table.write` leave it.

    Args:
      path: `.csv`, `.parquet` or `.npz`.

    Returns:
      Columns by name; an empty cell is NaN.

    Raises:
      FileFormatError: a malformed file or a cell that is not a number.
      OSError: a file that cannot be opened.
      ImportError: Parquet without polars.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(f"{folder}/t.csv", {"step": np.arange(2)})
    ...     read_columns(f"{folder}/t.csv")["step"].tolist()
    [0.0, 1.0]
    """
    table = _read_table(Path(path))
    columns = {}
    for name, cells in table.columns.items():
        values = np.empty(len(cells))
        for k, cell in enumerate(cells):
            try:
                values[k] = np.nan if cell is None else float(cell)
            except (TypeError, ValueError):
                table.fail(k, name, f"{cell!r} is not a number")
        columns[name] = values
    return columns


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"path = {path} must end in one of {', '.join(_WRITERS)}")


def _node_column(labels: Sequence[str]) -> np.ndarray:
    names = np.array(labels, dtype=np.str_)
    if _all_decimal(labels) and max(map(len, labels), default=0) < 19:
        numbers = names.astype(np.int64)
        if np.array_equal(numbers.astype(np.str_), names):
            return numbers
    return names


Columns = dict[str, np.ndarray]


def _write_csv(path: Path, columns: Columns, text: Callable[[Any], str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        # numpy's own scalars print the shortest text that reads back the same in their dtype
        writer.writerows(zip(*(map(text, column) for column in columns.values()), strict=True))


def _write_parquet(path: Path, columns: Columns, text: Callable[[Any], str]) -> None:
    optional_module("polars", "parquet").DataFrame(columns).write_parquet(path)


def _write_npz(path: Path, columns: Columns, text: Callable[[Any], str]) -> None:
    arrays: dict[str, Any] = columns
    np.savez(path, **arrays)


_WRITERS: dict[str, Callable[[Path, Columns, Callable[[Any], str]], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".npz": _write_npz,
}


class _Table(NamedTuple):
    """Columns of cells: text, numbers, or None where a cell is empty."""

    path: Path
    columns: dict[str, list[Any]]
    place: Callable[[int], tuple[int | None, str]]  # a row's line, and how to call it

    @property
    def num_rows(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def fail(self, row: int, column: str | None, problem: str) -> NoReturn:
        line, place = self.place(row)
        raise FileFormatError(self.path, line, column, problem, place=place) from None

    def check_columns(self, required: Sequence[str], optional: Sequence[str]) -> None:
        # only a CSV file has its header on a line
        line = 1 if self.path.suffix.lower() == ".csv" else None
        for name in required:
            if name not in self.columns:
                found = ", ".join(map(repr, self.columns))
                raise FileFormatError(
                    self.path, line, name, f"the column is missing: there are {found or 'none'}"
                )
        for name in self.columns:
            if name not in (*required, *optional):
                known = ", ".join((*required, *optional))
                raise FileFormatError(
                    self.path, line, name, f"the column is unknown: choose from {known}"
                )
        if not self.num_rows:
            raise FileFormatError(self.path, None, None, "the file is empty: it holds no rows")

    def numbers(self, column: str, default: float) -> np.ndarray:
        """A column as float64 [rows], `default` where it is absent or a cell is empty."""
        cells = self.columns.get(column)
        if cells is None:
            return np.full(self.num_rows, default)
        try:
            values = np.array([np.nan if c is None else float(c) for c in cells])
        except (ValueError, TypeError, OverflowError):
            self._fail_number(column, cells)
        empty = np.array([c is None for c in cells], dtype=bool)
        # the first column in doubt is blamed with its own text, "1e999" rather than "inf"
        for k in np.flatnonzero(~empty & ~np.isfinite(to_default_dtype(values)))[:1]:
            self.fail(int(k), column, f"{cells[k]} must be finite")
        low = _LOWEST.get(column)
        if low is not None:
            for k in np.flatnonzero(~empty & (values < low))[:1]:
                self.fail(int(k), column, f"{cells[k]} must be at least {low:g}")
        values[empty] = default
        return values

    def _fail_number(self, column: str, cells: list[Any]) -> NoReturn:
        for k, cell in enumerate(cells):
            try:
                float(0 if cell is None else cell)
            except (ValueError, TypeError, OverflowError):
                self.fail(k, column, f"{cell!r} is not a number")
        raise AssertionError("unreachable")

    def names(self, column: str) -> list[str]:
        """A column of node names as text; whole numbers without their fraction."""
        cells = self.columns[column]
        if set(map(type, cells)) <= {str, int}:
            return list(map(str, cells))
        names = []
        for k, cell in enumerate(cells):
            if isinstance(cell, float) and cell.is_integer():
                cell = int(cell)
            if cell is None:
                self.fail(k, column, "the cell is empty: it must name a node")
            if isinstance(cell, bool) or not isinstance(cell, str | int):
                self.fail(k, column, f"{cell!r} is neither an integer nor text")
            names.append(str(cell))
        return names


class _Nodes(NamedTuple):
    labels: tuple[str, ...]
    source: np.ndarray  # int64 [E]
    target: np.ndarray  # int64 [E]
    rows: np.ndarray  # row of the node table of every node, int64 [n]


def _read_table(path: Path, extra: tuple[str, ...] = ()) -> _Table:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join((*_READERS, *extra))
        raise FileFormatError(
            path, None, None, f"unknown suffix {path.suffix!r}: known are {known}"
        )
    return reader(path)


@contextmanager
def _as_format_error(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except FileFormatError:
        raise
    except errors as error:
        raise FileFormatError(path, None, None, f"the file cannot be read: {error}") from error


def _read_csv(path: Path) -> _Table:
    with _as_format_error(path, UnicodeDecodeError), _csv_rows(path) as reader:
        try:
            return _csv_table(path, filter(None, reader))
        except csv.Error as error:
            raise FileFormatError(path, reader.line_num, None, str(error)) from error


def _csv_table(path: Path, rows: Iterator[list[str]]) -> _Table:
    def place(row: int) -> tuple[int, str]:
        line = _csv_line(path, row + 1)
        return line, f"line {line}"

    header = [name.strip() for name in next(rows, [])]
    if not header:
        raise FileFormatError(path, None, None, "the file is empty: it has no header")
    for c, name in enumerate(header):
        if not name or name in header[:c]:
            problem = "the column appears twice" if name else f"column {c + 1} has no name"
            raise FileFormatError(path, _csv_line(path, 0), name or None, problem)
    columns: list[list[str | None]] = [[] for _ in header]
    while block := list(itertools.islice(rows, 4096)):
        if set(map(len, block)) != {len(header)}:
            _fail_ragged(path, header, block, len(columns[0]))
        for column, cells in zip(columns, zip(*block, strict=True), strict=True):
            column.extend([cell.strip() or None for cell in cells])
    return _Table(path, dict(zip(header, columns, strict=True)), place)


def _fail_ragged(path: Path, header: list[str], block: list[list[str]], before: int) -> NoReturn:
    row, size = next((k, len(c)) for k, c in enumerate(block) if len(c) != len(header))
    # a short row lacks its next column; a long one has no name for the rest
    column = header[size] if size < len(header) else None
    problem = f"the row has {size} cells, the header {len(header)}"
    raise FileFormatError(path, _csv_line(path, before + row + 1), column, problem)


@contextmanager
def _csv_rows(path: Path) -> Iterator[Any]:
    # utf-8-sig: spreadsheets put a byte order mark first
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield csv.reader(file)


def _csv_line(path: Path, row: int) -> int:
    """Line on which a row starts, from 1; blank lines and line breaks in quotes count as lines."""
    with _csv_rows(path) as reader:
        start, seen = 1, -1
        for cells in reader:
            seen += bool(cells)
            if seen == row:
                break
            start = reader.line_num + 1
    return start


def _row(row: int) -> tuple[int, str]:
    return row + 1, f"row {row + 1}"


def _read_parquet(path: Path) -> _Table:
    polars = optional_module("polars", "parquet")
    with open(path, "rb") as file, _as_format_error(path, polars.exceptions.PolarsError):
        frame = polars.read_parquet(file)
    return _Table(path, {series.name: _cells(series.to_list()) for series in frame}, _row)


def _read_npz(path: Path) -> _Table:
    with _as_format_error(path, ValueError, EOFError, zipfile.BadZipFile):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it holds one array without a name")
        with arrays:
            # each look-up reads the archive anew
            columns = {name: arrays[name] for name in arrays.files}
    size = max((a.shape[0] for a in columns.values() if a.ndim == 1), default=0)
    for name, array in columns.items():
        if array.shape != (size,):
            problem = f"the array has shape {array.shape}, expected ({size},), one entry a row"
            raise FileFormatError(path, None, name, problem)
    return _Table(path, {name: _npz_cells(name, array) for name, array in columns.items()}, _row)


def _npz_cells(name: str, array: np.ndarray) -> list[Any]:
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    cells = _cells(array.tolist())
    if array.dtype.kind == "f" and name in (*known_parameters(), *_NODE_COLUMNS[1:]):
        # an array has no empty cells
        return [None if cell != cell else cell for cell in cells]
    return cells


def _cells(cells: list[Any]) -> list[Any]:
    if not any(isinstance(cell, str) for cell in cells):
        return cells
    return [(cell.strip() or None) if isinstance(cell, str) else cell for cell in cells]


_READERS: dict[str, Callable[[Path], _Table]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}


def _read_graphml(path: Path) -> tuple[_Table, _Table]:
    networkx = optional_module("networkx", "graph")
    try:
        with _as_format_error(path, networkx.NetworkXError, ValueError, KeyError, AttributeError):
            graph = networkx.read_graphml(path)
    except ParseError as error:
        raise FileFormatError(path, error.position[0], None, str(error)) from error
    names, edges = list(graph.nodes), list(graph.edges(data=True))

    def edge_place(k: int) -> tuple[None, str]:
        return None, f"edge {edges[k][0]!r} - {edges[k][1]!r}"

    def node_place(k: int) -> tuple[None, str]:
        return None, f"node {names[k]!r}"

    # other attributes, such as a drawing's, are none of our business
    attributes = [data for _, _, data in edges]
    edge_columns = {"source": [e[0] for e in edges], "target": [e[1] for e in edges]}
    edge_columns |= _attributes(attributes, ("family", "weight", *known_parameters()))
    node_columns = {"node": names, **_attributes(list(graph.nodes.values()), _NODE_COLUMNS[1:])}
    return _Table(path, edge_columns, edge_place), _Table(path, node_columns, node_place)


def _attributes(items: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    return {
        name: _cells([item.get(name) for item in items])
        for name in names
        if any(name in item for item in items)
    }


def _read_matrix_market(path: Path, node_table: _Table | None) -> GraphFile:
    try:
        with open(path, "rb") as file:
            matrix = scipy.sparse.coo_array(scipy.io.mmread(file))
        bare = from_scipy(matrix)
    except (ValueError, TypeError, OverflowError) as error:
        # SciPy's own messages start so
        line = re.match(r"Line (\d+): ", str(error))
        raise FileFormatError(
            path,
            int(line[1]) if line else None,
            None,
            f"the file cannot be read: {str(error).removeprefix(line[0] if line else '')}",
        ) from error
    family, i, j = bare.edges[0], np.asarray(bare.i), np.asarray(bare.j)
    entries = _Table(
        path,
        {"source": i.tolist(), "target": j.tolist(), "weight": np.asarray(family.weight).tolist()},
        lambda k: (None, f"entry [{i[k]}, {j[k]}]"),
    )
    return _assemble(entries, node_table, at_least=bare.num_nodes)


def _assemble(edges: _Table, nodes: _Table | None, at_least: int = 0) -> GraphFile:
    edges.check_columns(("source", "target"), ("family", "weight", *known_parameters()))
    if nodes is None:
        numbered = _number_ends(edges, at_least)
    else:
        nodes.check_columns(("node",), _NODE_COLUMNS[1:])
        numbered = _number_by_table(edges, nodes)
    columns = _edge_columns(edges, numbered)
    local, x0 = (None, None) if nodes is None else _node_energies(nodes, numbered.rows)
    graph = EnergyGraph(local, columns.families(), num_nodes=len(numbered.labels))
    return GraphFile(graph, x0, numbered.labels, columns.order())


def _number_ends(edges: _Table, at_least: int) -> _Nodes:
    source, target = edges.names("source"), edges.names("target")
    if _all_decimal(source) and _all_decimal(target):
        i, j = _node_numbers(edges, "source", source), _node_numbers(edges, "target", target)
        size = max(at_least, 1 + int(max(i.max(), j.max())))
        return _Nodes(tuple(map(str, range(size))), i, j, np.arange(size))
    _refuse_negative(edges, {"source": source, "target": target})
    both = itertools.chain.from_iterable(zip(source, target, strict=True))
    return _number_by_name(edges, source, target, tuple(dict.fromkeys(both)))


def _number_by_table(edges: _Table, nodes: _Table) -> _Nodes:
    source, target, names = edges.names("source"), edges.names("target"), nodes.names("node")
    if all(map(_all_decimal, (source, target, names))):
        # 7 and 007 are the same number, though not the same name
        source, target, names = ([c.lstrip("0") or "0" for c in x] for x in (source, target, names))
    _refuse_negative(nodes, {"node": names})
    first: dict[str, int] = {}
    for k, name in enumerate(names):
        if first.setdefault(name, k) != k:
            nodes.fail(k, "node", f"{name!r} is already on {nodes.place(first[name])[1]}")
    by_row = _number_by_name(edges, source, target, tuple(names))
    numbers = _as_numbers(names)
    if not np.array_equal(np.sort(numbers), np.arange(len(names))):
        return by_row
    labels = tuple(map(str, range(len(names))))
    return _Nodes(labels, numbers[by_row.source], numbers[by_row.target], np.argsort(numbers))


def _number_by_name(
    edges: _Table, source: list[str], target: list[str], labels: tuple[str, ...]
) -> _Nodes:
    number = {name: k for k, name in enumerate(labels)}
    ends = []
    for column, names in (("source", source), ("target", target)):
        end = np.array([number.get(name, -1) for name in names], np.int64)
        for k in np.flatnonzero(end < 0)[:1]:
            edges.fail(int(k), column, f"node {names[k]!r} is not in the node table")
        ends.append(end)
    return _Nodes(labels, ends[0], ends[1], np.arange(len(labels)))


def _all_decimal(names: Sequence[str]) -> bool:
    return all(map(str.isdecimal, names))


def _as_numbers(names: Sequence[str]) -> np.ndarray:
    """Names as int64, -1 for what is no node number."""
    longest = len(str(_LARGEST_NODE))
    # a length first: text may spell a number of any size
    if not (_all_decimal(names) and max(map(len, names)) <= longest):
        names = [c if len(c) <= longest and c.isdecimal() else "-1" for c in names]
    array = np.fromiter(map(int, names), np.int64, len(names))
    return np.where(array > _LARGEST_NODE, -1, array)


def _node_numbers(table: _Table, column: str, names: list[str]) -> np.ndarray:
    numbers = _as_numbers(names)
    for k in np.flatnonzero(numbers < 0)[:1]:
        problem = f"{names[k]} is too large for a node number: a node table would make it a name"
        table.fail(int(k), column, problem)
    return numbers


def _refuse_negative(table: _Table, columns: dict[str, list[str]]) -> None:
    if not all(re.fullmatch(r"-?\d+", name) for names in columns.values() for name in names):
        return
    for column, names in columns.items():
        for k, name in enumerate(names):
            if name.startswith("-"):
                table.fail(k, column, f"{name} is not a node number: it must be 0 or above")


def _edge_columns(table: _Table, numbered: _Nodes) -> EdgeColumns:
    for k in np.flatnonzero(numbered.source == numbered.target)[:1]:
        label = numbered.labels[numbered.source[k]]
        problem = f"{label!r} is also the source: an edge must join two distinct nodes"
        table.fail(int(k), "target", problem)
    families, code = _families(table)
    weight = table.numbers("weight", 1.0)
    parameters = {
        name: table.numbers(name, np.nan) for name in known_parameters() if name in table.columns
    }
    makers = tuple(FAMILIES[name] for name in families)
    for name, values in parameters.items():
        fits = np.array([name in family_parameters(maker) for maker in makers])[code]
        for k in np.flatnonzero(~fits & ~np.isnan(values))[:1]:
            table.fail(
                int(k), name, f"{families[code[k]]} has no such parameter: leave the cell empty"
            )
    return EdgeColumns(numbered.source, numbered.target, weight, code, makers, parameters)


def _families(table: _Table) -> tuple[tuple[str, ...], np.ndarray]:
    """Families in order of first appearance, and each row's position among them."""
    cells = table.columns.get("family") or [None] * table.num_rows
    names = ["quadratic" if cell is None else str(cell) for cell in cells]
    code = {name: k for k, name in enumerate(dict.fromkeys(names))}
    for name in code:
        if name not in FAMILIES:
            problem = f"{name!r} is unknown: choose from {', '.join(FAMILIES)}"
            table.fail(names.index(name), "family", problem)
    return tuple(code), np.array([code[name] for name in names], np.int64)


def _node_energies(table: _Table, rows: np.ndarray) -> tuple[Landau | None, jax.Array | None]:
    values = {name: table.numbers(name, 0.0)[rows] for name in _NODE_COLUMNS[1:]}
    told = [name in table.columns for name in _LANDAU]
    local = Landau(**{name: values[name] for name in _LANDAU}) if any(told) else None
    return local, jnp.asarray(values["start"]) if "start" in table.columns else None


def optional_module(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for this file: pip install 'smallgain_jax[{extra}]'"
        ) from error
