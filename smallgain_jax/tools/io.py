"""Files of `smallgain relax`: graphs in, states out.

An edge table has the columns `source` and `target` and may have `family` (quadratic by default),
`weight` (1 by default) and the parameters of the families; a node table has `node` and may have
`a`, `b` and `target` of the `Landau` energies and the `start` of the state (each 0 by default; but
a is 1 where there is a target, and no column a or b).

A missing value means the default, in every format: a blank cell or one that spells NaN, NA, null
or None in a delimited file or in GraphML, null or NaN in Parquet, NaN in NPZ. A node id or an end
of an edge must not be missing. Matrices have no missing entries: NaN there is refused.
"""

import codecs
import csv
import functools
import gc
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.io
import scipy.sparse

from smallgain_jax.graphs.build import (
    EdgeColumns,
    MatrixEdges,
    family_name,
    family_parameters,
    known_parameters,
    matrix_edges,
    unknown_family,
)
from smallgain_jax.graphs.families import FAMILIES
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau
from smallgain_jax.tools.columns import (
    LANDAU,
    Column,
    Meaning,
    Names,
    as_text,
    edge_meaning,
    listed,
    may_mean,
    node_meaning,
    node_names,
    numbers,
)
from smallgain_jax.tools.edgelist import read_edgelist
from smallgain_jax.tools.graphml import read_graphml
from smallgain_jax.tools.tables import (
    ARCHIVE_ERRORS,
    NOT_ZERO,
    PARTS,
    PathLike,
    Sheet,
    as_format_error,
    decoded,
    opened,
    optional_module,
    read_arrays,
    read_lines,
    read_sheet,
    suffix_of,
)
from smallgain_jax.tools.tables import FileFormatError as FileFormatError

_SPARSE = {"format", "shape", "data"}
"""Arrays that `scipy.sparse.save_npz` writes."""
_ENDS = ("source", "target")
Columns = dict[str, np.ndarray]


class GraphFile(NamedTuple):
    """A graph as it was read.

    Attributes:
      graph: the graph, n nodes and E terms.
      x0: float [n], where the nodes tell a start, else None.
      labels: what the file calls each node, n of them.
      edges: int [E], the row of the edge table, from 0, that each term came from.
      notes: a sentence for each thing about the file that a reader may not expect: columns that
        were ignored, ids that became names, values that were missing, nodes without an edge.
    """

    graph: EnergyGraph
    x0: jax.Array | None
    labels: tuple[str, ...]
    edges: np.ndarray
    notes: tuple[str, ...] = ()


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
def read_graph(
    path: PathLike,
    nodes: PathLike | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    weight: str | None = None,
    node: str | None = None,
    symmetrize: str | bool | None = None,
) -> GraphFile:
    """Read a graph from an edge table and an optional node table, or from a graph file.

    Columns are found by name, in any case and under usual other names (`from` and `to`, `w`); what
    else a table has is ignored, with a note. Nodes are called by integers or by any text. Integers
    that are exactly 0..n-1 number the nodes; all others are names, as text is. Without a node table
    integer names are numbered in increasing order, text in order of first appearance; with one, in
    the order of its rows. Matrix Market rows count from 1, those of SciPy from 0.

    Args:
      path: a delimited table (`.csv`, `.tsv`, `.txt`, ...; comma, semicolon, tab, bar or white
        space), `.parquet`, `.npz` (an array per column, or a matrix of `scipy.sparse.save_npz`),
        `.graphml` (attributes named like the columns, of nodes too) or `.mtx`; each but Parquet may
        be compressed (`.gz`, `.bz2`, `.xz`).
      nodes: node table. Without one (and without attributes a, b or target) the graph has no local
        energy, and nodes without an edge are not known.
      source, target, weight: names of these columns where the edge table calls them otherwise.
      node: the same for the node table.
      symmetrize: of matrices, as for `from_scipy`.

    Returns:
      `GraphFile(graph, x0 [n] or None, labels, edges int [E], notes)`.

    Raises:
      FileFormatError: a malformed file, by its line and column.
      OSError: a file that cannot be opened.
      ImportError: Parquet without polars.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "edges.csv")
    ...     _ = path.write_text("From;To;Weight\\nann;bob;0,5\\nbob;eve;2\\n")
    ...     read = read_graph(path)
    >>> read.labels, read.graph.edges[0].weight.tolist(), read.notes
    (('ann', 'bob', 'eve'), [0.5, 2.0], ())
    """
    path = Path(path)
    named = {"source": source, "target": target, "weight": weight, "node": node}
    wanted = functools.partial(may_mean, named=named)
    own_nodes = None
    if suffix_of(path) == ".mtx":
        edges, own_nodes = _matrix_sheets(path, *_read_matrix_market(path, symmetrize), first=1)
    elif suffix_of(path) == ".npz" and (arrays := read_arrays(path)).keys() >= _SPARSE:
        edges, own_nodes = _matrix_sheets(path, *_read_sparse(path, arrays, symmetrize), first=0)
    elif suffix_of(path) == ".graphml":
        edges, own_nodes = read_graphml(path)
    else:
        edges = read_edgelist(path) or read_sheet(path, (".graphml", ".mtx"), wanted)
    node_sheet = own_nodes if nodes is None else read_sheet(Path(nodes), (), wanted)
    from_one = suffix_of(path) == ".mtx" and nodes is not None
    read = _assemble(edges, node_sheet, named, from_one)
    own = read.graph.num_nodes if own_nodes is None else own_nodes.num_rows
    if own > read.graph.num_nodes:
        left_out = own - read.graph.num_nodes
        note = f"{path.name}: {left_out} of its {own} nodes are not in the node table: left out"
        return read._replace(notes=(*read.notes, note))
    return read


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
    """Read a table of numbers, as `write_table`, `Table.write` and the live sinks leave it.

    Args:
      path: `.csv` (and its kin, as for `read_graph`), `.parquet`, `.npz` or `.jsonl` (an object a
        row); or a folder of the parts of a Parquet table.

    Returns:
      Columns by name; a missing cell is NaN.

    Raises:
      FileFormatError: a malformed file, a cell that is not a number, or no rows.
      OSError: a file that cannot be opened.
      ImportError: Parquet without polars.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_table(f"{folder}/t.csv", {"step": np.arange(2)})
    ...     read_columns(f"{folder}/t.csv")["step"].tolist()
    [0.0, 1.0]
    """
    path = Path(path)
    parts = [_columns_of(part) for part in _parts(path)]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise FileFormatError(path, None, None, "the parts have different columns")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if not any(map(len, columns.values())):
        raise FileFormatError(path, None, None, "the file is empty: it holds no rows")
    return columns


def _parts(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if parts := sorted(path.glob(PARTS)):
        return parts
    if not (table := path / "telemetry.csv").is_file():
        problem = f"the folder holds no {PARTS}, and no telemetry.csv as `smallgain relax` writes"
        raise FileFormatError(path, None, None, problem)
    return [table]


def _columns_of(path: Path) -> Columns:
    sheet = _read_json_lines(path) if suffix_of(path) == ".jsonl" else read_sheet(path)
    found = zip(sheet.header, sheet.cells, strict=True)
    return {name: numbers(Column(sheet, name, cells))[0] for name, cells in found}


def _read_json_lines(path: Path) -> Sheet:
    rows = []
    for k, line in enumerate(read_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise FileFormatError(path, k, None, f"the line cannot be read: {error}") from error
        if not isinstance(rows[-1], dict):
            raise FileFormatError(path, k, None, "the line is no JSON object")
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = tuple([row.get(name) for row in rows] for name in names)
    return Sheet(path, names, cells, lambda row: (row + 1, f"line {row + 1}"))


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"path = {path} must end in one of {', '.join(_WRITERS)}")


def _node_column(labels: Sequence[str]) -> np.ndarray:
    names = np.array(labels, dtype=np.str_)
    if all(map(str.isdecimal, labels)) and max(map(len, labels), default=0) < 19:
        numbers = names.astype(np.int64)
        if np.array_equal(numbers.astype(np.str_), names):
            return numbers
    return names


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


def _read_matrix_market(path: Path, symmetrize: str | bool | None) -> tuple[MatrixEdges, list[str]]:
    with opened(path) as file:
        data = file.read()
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        # an editor's mark, which SciPy does not know
        data = decoded(path, data).encode()
    # SciPy 1.17 crashes at a NUL byte, and at what a last line without an end has left over
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise FileFormatError(path, line, None, "the line holds a NUL byte: this is no text")
    if not data.endswith(b"\n"):
        data += b"\n"
    # SciPy would read 0,5 as 0
    if comma := re.search(rb"^[^%\n][^\n]*,", data, re.MULTILINE):
        line = data.count(b"\n", 0, comma.start()) + 1
        raise FileFormatError(path, line, None, "there is a comma: write a decimal point")
    try:
        matrix = scipy.sparse.coo_array(scipy.io.mmread(BytesIO(data)))
        edges, notes = _matrix(path, matrix, symmetrize, 1)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        # SciPy's own messages start so
        at = re.match(r"Line (\d+): ", str(error))
        raise FileFormatError(
            path,
            int(at[1]) if at else None,
            None,
            f"the file cannot be read: {str(error).removeprefix(at[0] if at else '')}",
        ) from error
    if count := _vanished(data):
        entries = "1 entry is" if count == 1 else f"{count} entries are"
        notes.append(f"{path.name}: {entries} too small for float64 and count as 0")
    return edges, notes


def _vanished(data: bytes) -> int:
    """How many numbers of a matrix are 0 only because they are too small, as 1e-400 is."""
    if not re.search(rb"[eE]-\d{3}|\.0{300}", data):
        return 0
    written = re.findall(rb"(?:\d+\.?\d*|\.\d+)(?:[eE]-\d+)?(?=\s)", data)
    return sum(float(n) == 0 and re.match(NOT_ZERO, n.decode()) is not None for n in written)


def _read_sparse(
    path: Path, arrays: Mapping[str, np.ndarray], symmetrize: str | bool | None
) -> tuple[MatrixEdges, list[str]]:
    with opened(path) as file, as_format_error(path, *ARCHIVE_ERRORS):
        matrix = scipy.sparse.coo_array(scipy.sparse.load_npz(file))
        return _matrix(path, matrix, symmetrize, 0)


def _matrix(
    path: Path, matrix: Any, symmetrize: str | bool | None, first: int
) -> tuple[MatrixEdges, list[str]]:
    notes = []
    own = matrix.row == matrix.col
    if count := int(np.count_nonzero(matrix.data[own])):
        notes.append(
            f"{path.name}: ignored "
            + ("1 entry" if count == 1 else f"{count} entries")
            + " on the diagonal: "
            + ("it joins" if count == 1 else "they join")
            + " no two nodes"
        )
    rest = (matrix.data[~own], (matrix.row[~own], matrix.col[~own]))
    edges = matrix_edges(scipy.sparse.coo_array(rest, shape=matrix.shape), symmetrize, first)
    if edges.note is not None:
        notes.append(f"{path.name}: the matrix {edges.note}")
    return edges, notes


def _matrix_sheets(
    path: Path, matrix: MatrixEdges, notes: list[str], first: int
) -> tuple[Sheet, Sheet]:
    i, j = matrix.i.astype(np.int64) + first, matrix.j.astype(np.int64) + first
    edges = Sheet(
        path,
        ("source", "target", "weight"),
        (i, j, matrix.value),
        lambda k: (None, f"entry [{i[k]}, {j[k]}]"),
        notes=tuple(notes),
        empty="the matrix is empty: it has no entry off the diagonal, and so no edge",
    )
    ids = np.arange(first, first + matrix.num_nodes)
    return edges, Sheet(path, ("node",), (ids,), lambda k: (None, f"row {ids[k]}"))


class _Nodes(NamedTuple):
    labels: tuple[str, ...]
    source: np.ndarray  # int64 [E]
    target: np.ndarray  # int64 [E]
    rows: np.ndarray  # row of the node table of every node, int64 [n]


def _assemble(
    edge_sheet: Sheet,
    node_sheet: Sheet | None,
    named: Mapping[str, str | None],
    from_one: bool,
) -> GraphFile:
    edges = edge_meaning(edge_sheet, named)
    nodes = None if node_sheet is None else node_meaning(node_sheet, named)
    numbered = _number_ends(edges) if nodes is None else _number_by_table(edges, nodes, from_one)
    columns = _edge_columns(edges, numbered)
    local, x0 = (None, None) if nodes is None else _node_energies(nodes, numbered.rows)
    graph = EnergyGraph(local, columns.families(), num_nodes=len(numbered.labels))
    notes = [*edges.notes, *([] if nodes is None else nodes.notes), *_isolated(numbered)]
    return GraphFile(graph, x0, numbered.labels, columns.order(), tuple(dict.fromkeys(notes)))


def _isolated(nodes: _Nodes) -> list[str]:
    lone = np.ones(len(nodes.labels), bool)
    lone[nodes.source] = lone[nodes.target] = False
    if not lone.any():
        return []
    names = [repr(nodes.labels[k]) for k in np.flatnonzero(lone)]
    count = "1 node has" if len(names) == 1 else f"{len(names)} nodes have"
    return [f"{count} no edge: {listed(names)}"]


def _number_ends(edges: Meaning) -> _Nodes:
    source, target = node_names([edges.columns[end] for end in _ENDS], edges.notes)
    if isinstance(source, list) and isinstance(target, list):
        both = [name for pair in zip(source, target, strict=True) for name in pair]
        labels = tuple(dict.fromkeys(both))
        return _number_by_name(edges, None, source, target, labels)
    _refuse_negative(edges.columns["source"], source)
    _refuse_negative(edges.columns["target"], target)
    ids, ends = _numbered(np.concatenate([source, target]))
    if ids[-1] != len(ids) - 1:
        edges.notes.append(_about_ids(edges.sheet.path, ids))
    return _Nodes(
        tuple(map(str, ids.tolist())),
        ends[: len(source)],
        ends[len(source) :],
        np.arange(len(ids)),
    )


def _numbered(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `np.unique(ids, return_inverse=True)` gives, without sorting where ids are dense."""
    if ids.max() > 4 * len(ids):
        unique, inverse = np.unique(ids, return_inverse=True)
        return unique, inverse
    present = np.zeros(ids.max() + 1, bool)
    present[ids] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[ids]


def _about_ids(path: Path, ids: np.ndarray) -> str:
    low, high = int(ids[0]), int(ids[-1])
    between = high - low + 1 - len(ids)
    gaps = (
        f"; {between} numbers between are no nodes: a node table can name them" if between else ""
    )
    return f"{path.name}: node ids run from {low} to {high} and are kept as names{gaps}"


def _number_by_table(edges: Meaning, nodes: Meaning, from_one: bool) -> _Nodes:
    columns = [*(edges.columns[end] for end in _ENDS), nodes.columns["node"]]
    *ends, names = node_names(columns, edges.notes)
    if isinstance(names, list):
        _refuse_twice(nodes, names)
        source, target = map(as_text, ends)
        return _number_by_name(edges, nodes, source, target, tuple(names))
    _refuse_negative(nodes.columns["node"], names)
    _refuse_twice(nodes, names.tolist())
    order = np.argsort(names, kind="stable")
    ids, size = names[order], len(names)
    # nodes that are numbered 0..n-1 stand in the order of their numbers, others in their rows'
    plain = bool(size and ids[-1] == size - 1)
    if from_one and plain:
        # a table for a matrix may count from 0, as its readers do
        ends = [end - 1 for end in ends if not isinstance(end, list)]
    placed = []
    for role, end in zip(_ENDS, ends, strict=True):
        where = np.searchsorted(ids, end).clip(0, size - 1)
        for k in np.flatnonzero(ids[where] != end)[:1]:
            column = edges.columns[role]
            column.fail(int(k), _not_in_table(nodes, column.shown(int(k))))
        placed.append(where if plain else order[where])
    rows = order if plain else np.arange(size)
    return _Nodes(tuple(map(str, names[rows].tolist())), placed[0], placed[1], rows)


def _refuse_twice(nodes: Meaning, names: Sequence[Any]) -> None:
    first: dict[Any, int] = {}
    for k, name in enumerate(names):
        if first.setdefault(name, k) != k:
            place = nodes.sheet.place(first[name])[1]
            nodes.columns["node"].fail(k, f"'{name}' is already on {place}")


def _number_by_name(
    edges: Meaning,
    nodes: Meaning | None,
    source: list[str],
    target: list[str],
    labels: tuple[str, ...],
) -> _Nodes:
    number = {name: k for k, name in enumerate(labels)}
    ends = []
    for role, names in zip(_ENDS, (source, target), strict=True):
        end = np.array([number.get(name, -1) for name in names], np.int64)
        for k in np.flatnonzero(end < 0)[:1]:
            edges.columns[role].fail(int(k), _not_in_table(nodes, names[k]))
        ends.append(end)
    return _Nodes(labels, ends[0], ends[1], np.arange(len(labels)))


def _not_in_table(nodes: Meaning | None, name: str) -> str:
    called = "node" if nodes is None else nodes.columns["node"].name
    which = "" if called == "node" else f", whose nodes are called by its column {called!r}"
    todo = "add a line for it, with blank cells where nothing is known"
    return f"node {name!r} is not in the node table{which}: {todo}"


def _refuse_negative(column: Column, names: Names) -> None:
    if isinstance(names, np.ndarray):
        for k in np.flatnonzero(names < 0)[:1]:
            problem = (
                "negative numbers stand for no node in many files: give that node another name"
            )
            column.fail(int(k), f"{names[k]} is not a node number: {problem}")


def _edge_columns(edges: Meaning, numbered: _Nodes) -> EdgeColumns:
    for k in np.flatnonzero(numbered.source == numbered.target)[:1]:
        label = numbered.labels[numbered.source[k]]
        problem = f"{label!r} is also the source: an edge must join two distinct nodes"
        edges.columns["target"].fail(int(k), problem)
    families, code = _families(edges)
    weight = edges.numbers("weight", 1.0)
    parameters = {
        name: edges.numbers(name, np.nan) for name in known_parameters() if name in edges.columns
    }
    makers = tuple(FAMILIES[name] for name in families)
    for name, values in parameters.items():
        fits = np.array([name in family_parameters(maker) for maker in makers])[code]
        for k in np.flatnonzero(~fits & ~np.isnan(values))[:1]:
            problem = f"{families[code[k]]} has no such parameter: leave the cell empty"
            edges.columns[name].fail(int(k), problem)
    return EdgeColumns(numbered.source, numbered.target, weight, code, makers, parameters)


def _families(edges: Meaning) -> tuple[tuple[str, ...], np.ndarray]:
    """Families in order of first appearance, and each row's position among them."""
    column = edges.columns.get("family")
    if column is None:
        return ("quadratic",), np.zeros(edges.sheet.num_rows, np.int64)
    # a missing cell, NaN where no cell of the column is text
    names = ["quadratic" if c is None or c != c else str(c) for c in column.cells]
    known = {name: family_name(name) for name in dict.fromkeys(names)}
    for name, family in known.items():
        if family is None:
            k = names.index(name)
            column.fail(k, f"{column.shown(k)!r} {unknown_family(name)}")
    code = {family: k for k, family in enumerate(dict.fromkeys(known.values()))}
    rows = np.array([code[known[name]] for name in names], np.int64)
    return tuple(family for family in code if family is not None), rows


def _node_energies(nodes: Meaning, rows: np.ndarray) -> tuple[Landau | None, jax.Array | None]:
    values = {name: nodes.numbers(name, 0.0)[rows] for name in (*LANDAU, "start")}
    told = [name in nodes.columns for name in LANDAU]
    if told == [False, False, True]:
        # a target that nothing draws to would not count
        wanted = ~np.isnan(nodes.numbers("target", np.nan)[rows])
        values["a"] = wanted.astype(float)
        nodes.notes.append(
            f"{nodes.sheet.path.name}: a target is given and neither a nor b: a is 1 at the "
            f"{np.count_nonzero(wanted)} nodes that have one"
        )
    local = Landau(**{name: values[name] for name in LANDAU}) if any(told) else None
    return local, jnp.asarray(values["start"]) if "start" in nodes.columns else None
