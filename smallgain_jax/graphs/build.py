"""Energy graphs from edge lists, NetworkX graphs and SciPy sparse matrices."""

import difflib
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy  # its `sparse` is loaded where it is first used: 0.2 s

from smallgain_jax.graphs.families import FAMILIES, EdgeFamily, Quadratic
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import LocalEnergy

Record = Mapping[str, Any] | tuple[int, int] | tuple[int, int, float]
"""One edge: a mapping with i, j and optionally family, weight and parameters; or a tuple."""

FamilyMaker = Callable[..., EdgeFamily]
"""A family, or anything called as one: `make(i=..., j=..., weight=..., **parameters)`."""

Fail = Callable[[int, str | None, str], Exception]
"""The error for a problem at an edge's position and field; no field blames the whole edge."""

LOWEST = {"weight": 0.0, "eta_power": 1.0}
"""Bounds the families put on their fields, checked here to blame the caller's own record."""


class EdgeColumns(NamedTuple):
    """Edges of several families as columns, in the order they were given.

    `parameters` holds NaN wherever the family's default is meant.
    """

    i: np.ndarray  # int64 [E]
    j: np.ndarray  # int64 [E]
    weight: np.ndarray  # float64 [E]
    code: np.ndarray  # int [E], position in `makers`, numbered by first appearance
    makers: tuple[FamilyMaker, ...]
    parameters: Mapping[str, np.ndarray]  # float64 [E] each

    def order(self) -> np.ndarray:
        """Position of each term's edge, int [E]."""
        return np.argsort(self.code, kind="stable")

    def check(self, fail: Fail) -> None:
        """Raise `fail(position, field, problem)` for the first edge that no family accepts."""
        for field, ends in (("i", self.i), ("j", self.j)):
            for k in _first((ends < 0) | (ends > np.iinfo(np.int32).max)):
                raise fail(
                    k, field, f"= {ends[k]} is not a node index: it must lie in 0..2147483647"
                )
        for k in _first(self.i == self.j):
            raise fail(k, None, "is a self loop: an edge must join two distinct nodes")
        for field, values in {"weight": self.weight, **self.parameters}.items():
            # NaN stands for the default, so only the other non-finite values can be wrong
            low = LOWEST.get(field, -np.inf)
            for k in _first(np.isinf(to_default_dtype(values)) | (values < low)):
                bound = f" and at least {low:g}" if field in LOWEST else ""
                raise fail(k, field, f"= {values[k]} must be finite{bound}")

    def families(self) -> list[EdgeFamily]:
        """The families in order of first appearance."""
        order = self.order()
        ends = np.cumsum(np.bincount(self.code, minlength=len(self.makers)))[:-1]
        parts = np.split(order, ends) if self.makers else []
        return [self._family(maker, part) for maker, part in zip(self.makers, parts, strict=True)]

    def _family(self, maker: FamilyMaker, rows: np.ndarray) -> EdgeFamily:
        given = {}
        for name, default in family_parameters(maker).items():
            values = self.parameters[name][rows] if name in self.parameters else np.empty(0)
            missing = np.isnan(values)
            # a parameter nobody gave is left to the family: its default need not be a number
            if missing.all():
                continue
            if missing.any() and not isinstance(default, int | float):
                raise ValueError(f"{name} has no default, so every edge of its family must give it")
            values[missing] = default if missing.any() else np.nan
            given[name] = values
        return maker(i=self.i[rows], j=self.j[rows], weight=self.weight[rows], **given)


@functools.cache
def family_parameters(maker: FamilyMaker) -> dict[str, Any]:
    """Parameters of a family beyond i, j and weight, with their defaults.

    >>> family_parameters(FAMILIES["asymmetric_hinge"])
    {'alpha_i': 1.0, 'beta_j': 1.0}
    """
    parameters = inspect.signature(maker).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("i", "j", "weight")}


def family_name(text: str) -> str | None:
    """The key of `FAMILIES` that a text spells, in any case, with or without what joins words.

    >>> family_name("Directed Hinge"), family_name("DirectedHinge"), family_name("spring")
    ('directed_hinge', 'directed_hinge', None)
    """
    return next((name for name in FAMILIES if _letters(name) == _letters(text)), None)


def unknown_family(text: str) -> str:
    """What to say of a text that spells no family.

    >>> unknown_family("directed_hing")
    "is unknown: did you mean 'directed_hinge'?"
    """
    letters = {_letters(name): name for name in FAMILIES}
    near = difflib.get_close_matches(_letters(text), letters, n=1)
    if near:
        return f"is unknown: did you mean {letters[near[0]]!r}?"
    return f"is unknown: choose from {', '.join(FAMILIES)}"


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def known_parameters() -> tuple[str, ...]:
    """Every parameter of the built-in families.

    >>> known_parameters()[:3]
    ('alpha_i', 'beta_j', 'delta')
    """
    return tuple(dict.fromkeys(name for f in FAMILIES.values() for name in family_parameters(f)))


def to_default_dtype(values: np.ndarray) -> np.ndarray:
    """`values` as the families will hold them: what overflows there becomes infinite."""
    with np.errstate(over="ignore"):
        return values.astype(jnp.result_type(float))


def from_edge_list(
    records: Iterable[Record],
    local: LocalEnergy | Sequence[LocalEnergy] | None = None,
    *,
    num_nodes: int | None = None,
) -> EnergyGraph:
    r"""The graph $\sum_l f_l(x) + \sum_k w_k e_k(x_{i_k}, x_{j_k})$ of a list of edges.

    Terms are grouped by family, families in order of first appearance; `term_order` tells which
    record each term came from.

    Args:
      records: per edge a mapping with integers `i` and `j` and optionally `family` (a key of
        `FAMILIES`, quadratic by default), `weight` (float, 1 by default) and the family's
        parameters (floats); or a tuple (i, j) or (i, j, weight), which is quadratic. None stands
        for the default.
      local: local energies as for `EnergyGraph`.
      num_nodes: n; only needed when no local energy tells it.

    Raises:
      ValueError: an unknown family or field, a missing end, a self loop, a value that is not a
        finite number, negative weight, or n unknown. The message names the record and the field.
      TypeError: a record that is neither a mapping nor such a tuple.

    >>> graph = from_edge_list(
    ...     [(0, 1), {"i": 1, "j": 2, "family": "gate_benefit", "delta": 0.1}, (0, 2, 0.5)],
    ...     num_nodes=3,
    ... )
    >>> graph.keys, graph.i.tolist()
    (('Quadratic', 'GateBenefit'), [0, 0, 1])
    """
    if not isinstance(records, Iterable) or hasattr(records, "nodes"):
        raise TypeError(f"records must be edges, got {type(records).__name__}{_hint(records)}")
    columns = _columns((_as_mapping(k, r) for k, r in enumerate(records)), _record_error)
    return EnergyGraph(local, columns.families(), num_nodes=num_nodes)


def term_order(records: Iterable[Record]) -> np.ndarray:
    """Position in `records` of each term of `from_edge_list(records)`, int [E].

    Args:
      records: as for `from_edge_list`.

    Raises:
      ValueError, TypeError: as for `from_edge_list`.

    >>> term_order([(0, 1), {"i": 1, "j": 2, "family": "gate_benefit"}, (0, 2)]).tolist()
    [0, 2, 1]
    """
    return _columns((_as_mapping(k, r) for k, r in enumerate(records)), _record_error).order()


def from_networkx(
    graph: Any,
    local: LocalEnergy | Sequence[LocalEnergy] | None = None,
    *,
    weight: str | None = "weight",
    family: FamilyMaker | str = Quadratic,
) -> EnergyGraph:
    r"""The graph $\sum_l f_l(x) + \sum_{uv} w_{uv} e(x_u, x_v)$ of a NetworkX graph.

    Nodes are numbered as they stand in `graph.nodes`. An edge u -> v has i = u and j = v; an
    undirected one is taken as `graph.edges` reports it, so give directed families a directed graph.

    Args:
      graph: any NetworkX graph, directed, undirected or multi. An edge's attribute `family` (a key
        of `FAMILIES`) overrides `family`; attributes named like a parameter of its family are used,
        others are ignored. An edge without an attribute has that of
        `graph.graph["edge_default"]`, where `networkx.read_graphml` keeps a file's defaults.
      local: local energies as for `EnergyGraph`, n nodes.
      weight: the attribute that holds w (1 where an edge has none), or None for all ones.
      family: of the edges that do not say; a family, or a key of `FAMILIES`.

    Raises:
      ValueError: a self loop, an unknown family, a value that is not a finite number, negative
        weight. The message names the edge.

    >>> import networkx
    >>> from_networkx(networkx.path_graph(4)).j.tolist()
    [1, 2, 3]
    """
    if not (hasattr(graph, "nodes") and hasattr(graph, "edges")):
        raise TypeError(f"graph must be a NetworkX graph, got {type(graph).__name__}{_hint(graph)}")
    default = _maker(family, Quadratic, _argument_error)
    number = {node: k for k, node in enumerate(graph.nodes)}
    edges = list(graph.edges(data=True))
    defaults = graph.graph.get("edge_default", {})

    def fail(k: int, field: str | None, problem: str) -> Exception:
        return ValueError(f"graph.edges[{edges[k][0]!r}, {edges[k][1]!r}]{_key(field)} {problem}")

    def record(k: int) -> dict[str, Any]:
        u, v, own = edges[k]
        attributes = {**defaults, **own}
        maker = _maker(attributes.get("family"), default, lambda *problem: fail(k, *problem))
        wanted = {name: attributes.get(name) for name in family_parameters(maker)}
        scale = None if weight is None else attributes.get(weight)
        return {**wanted, "i": number[u], "j": number[v], "family": maker, "weight": scale}

    columns = _columns(map(record, range(len(edges))), fail)
    return EnergyGraph(local, columns.families(), num_nodes=len(number))


SYMMETRIZE = {"mean": 0.5, "sum": 1.0}
"""How `from_scipy` makes one entry of two: their sum times this; "max" takes the larger."""


def from_scipy(
    matrix: Any,
    local: LocalEnergy | Sequence[LocalEnergy] | None = None,
    *,
    family: FamilyMaker | str = Quadratic,
    symmetrize: str | bool | None = None,
) -> EnergyGraph:
    r"""The graph $\sum_l f_l(x) + \sum_{rc} M_{rc} e(x_r, x_c)$ of a sparse matrix.

    When M is symmetric, to the rounding of its entries, the sum runs over its upper triangle, one
    edge per pair, otherwise over every entry, i = r and j = c. Entries that are stored count even
    where they are zero, and stand in order of rows, then columns.

    Args:
      matrix: SciPy sparse array or matrix [n, n] of real numbers, finite and non-negative, zero on
        the diagonal.
      local: local energies as for `EnergyGraph`, n nodes.
      family: of all edges; a family, or a key of `FAMILIES`.
      symmetrize: "mean", "sum" or "max" make one edge i < j of the two entries of every pair, one
        that is not stored counting as 0; False takes every entry as an edge even where M is
        symmetric. None is as said above, with a warning where a pair that is stored twice, with
        different values, becomes two edges of an undirected family (`Quadratic`).

    Raises:
      ValueError: a matrix that is not square, an entry on the diagonal, or one that is negative or
        not finite; another `symmetrize`.
      TypeError: something that is not a sparse matrix of real numbers.

    >>> import scipy.sparse
    >>> from_scipy(scipy.sparse.csr_array([[0.0, 2.0], [2.0, 0.0]])).edges[0].weight.tolist()
    [2.0]
    >>> lopsided = scipy.sparse.csr_array([[0.0, 2.0], [1.0, 0.0]])
    >>> from_scipy(lopsided, symmetrize="mean").edges[0].weight.tolist()
    [1.5]
    """
    maker = _maker(family, Quadratic, _argument_error)
    edges = matrix_edges(matrix, symmetrize)
    if edges.note is not None and maker is Quadratic:
        warnings.warn(f"matrix {edges.note}", stacklevel=2)
    terms = maker(i=edges.i, j=edges.j, weight=edges.value)
    return EnergyGraph(local, terms, num_nodes=edges.num_nodes)


class MatrixEdges(NamedTuple):
    """The edges of a sparse matrix, in order of rows, then columns."""

    i: np.ndarray  # int [E]
    j: np.ndarray  # int [E]
    value: np.ndarray  # float64 [E]
    num_nodes: int
    note: str | None  # how the entries of a matrix that is not symmetric count


def matrix_edges(matrix: Any, symmetrize: str | bool | None = None, first: int = 0) -> MatrixEdges:
    """What `from_scipy` makes of a matrix.

    Args:
      matrix, symmetrize: as there.
      first: number of the first row in messages.

    Raises:
      ValueError, TypeError: as there.

    >>> import scipy.sparse
    >>> matrix_edges(scipy.sparse.csr_array([[0.0, 2.0], [2.0, 0.0]])).j.tolist()
    [1]
    """
    if symmetrize not in (None, False, "max", *SYMMETRIZE):
        raise ValueError(
            f"symmetrize = {symmetrize!r} is unknown: choose mean, sum, max, False or None"
        )
    rows = _checked_rows(matrix, first)
    # beside the stored entries, so that a pair stored once keeps its stored zero
    turned = rows.T.tocsr()
    apart = abs(rows - turned)
    rounding = 8 * np.finfo(matrix.dtype if matrix.dtype.kind == "f" else np.float64).eps
    symmetric = not (apart > rounding * rows.maximum(turned)).nnz
    note = None
    if symmetrize == "max":
        rows = rows.maximum(turned)
    elif isinstance(symmetrize, str):
        rows = SYMMETRIZE[symmetrize] * (rows + turned)
    elif symmetrize is None and symmetric and apart.nnz:
        rows = 0.5 * (rows + turned)
    elif symmetrize is None and not symmetric:
        note = _two_ways(rows, turned, apart, first)
    n, j, value = rows.shape[0], rows.indices, rows.data
    i = np.repeat(np.arange(n), np.diff(rows.indptr))
    both = symmetrize is False or (symmetrize is None and not symmetric)
    edge = i != j if both else i < j
    return MatrixEdges(i[edge], j[edge], value[edge], n, note)


def _checked_rows(matrix: Any, first: int) -> Any:
    is_sparse: bool = scipy.sparse.issparse(matrix)
    if not is_sparse:
        raise TypeError(
            f"matrix must be a SciPy sparse array, got {type(matrix).__name__}{_hint(matrix)}"
        )
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix has shape {matrix.shape}, expected [n, n]")
    if matrix.dtype.kind not in "biuf":
        raise TypeError(f"matrix must be real numbers, got dtype {matrix.dtype}")
    rows = scipy.sparse.csr_array(matrix, dtype=np.float64, copy=True)
    rows.sum_duplicates()
    for k in _first(rows.diagonal() != 0):
        raise ValueError(
            f"matrix[{k + first}, {k + first}] = {rows.diagonal()[k]} must be 0: "
            "an edge joins two distinct nodes"
        )
    value = rows.data
    i = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    for k in _first(~np.isfinite(to_default_dtype(value)) | (value < 0)):
        hint = ": a Laplacian's couplings are its negative entries" if (value <= 0).all() else ""
        raise ValueError(
            f"matrix[{i[k] + first}, {rows.indices[k] + first}] = {value[k]} "
            f"must be finite and at least 0{hint}"
        )
    return rows


def _two_ways(rows: Any, turned: Any, apart: Any, first: int) -> str | None:
    """How the pairs count that are stored in both directions, with different values."""
    twice = scipy.sparse.triu(apart.multiply(rows.astype(bool)).multiply(turned.astype(bool)))
    if not twice.nnz:
        return None
    i, j = (int(ends[0]) for ends in twice.nonzero())
    one, other = float(rows[i, j]), float(rows[j, i])
    return (
        f"is not symmetric: [{i + first}, {j + first}] = {one:g} and [{j + first}, {i + first}] = "
        f"{other:g} are two edges, which weigh {one + other:g} together ({twice.nnz} such pairs); "
        "symmetrize='mean', 'sum' or 'max' makes one edge of them, symmetrize=False says that two "
        "are meant"
    )


def _first(bad: np.ndarray) -> list[int]:
    """Position of the first true entry, or nothing."""
    return [int(k) for k in np.flatnonzero(bad)[:1]]


def _hint(given: Any) -> str:
    """Which function takes what was given to another."""
    is_sparse: bool = scipy.sparse.issparse(given)
    if is_sparse:
        return ": from_scipy takes sparse matrices"
    if hasattr(given, "nodes") and hasattr(given, "edges"):
        return ": from_networkx takes graphs"
    if hasattr(given, "ndim"):
        return ": from_scipy takes scipy.sparse.csr_array(matrix)"
    return ": from_edge_list takes edges" if isinstance(given, Sequence) else ""


def _argument_error(field: str | None, problem: str) -> Exception:
    return ValueError(f"{field} {problem}")


def _key(field: str | None) -> str:
    return "" if field is None else f"[{field!r}]"


def _record_error(k: int, field: str | None, problem: str) -> Exception:
    return ValueError(f"records[{k}]{_key(field)} {problem}")


def _as_mapping(k: int, record: Record) -> Mapping[str, Any]:
    if isinstance(record, Mapping):
        return record
    if isinstance(record, Sequence) and not isinstance(record, str) and len(record) in (2, 3):
        return dict(zip(("i", "j", "weight"), record, strict=False))
    raise TypeError(f"records[{k}] must be a mapping, (i, j) or (i, j, weight), got {record!r}")


def _maker(
    name: Any, default: FamilyMaker, fail: Callable[[str | None, str], Exception]
) -> FamilyMaker:
    if name is None:
        return default
    if callable(name):
        return name
    found = family_name(name) if isinstance(name, str) else None
    if found is None:
        raise fail("family", f"= {name!r} {unknown_family(str(name))}")
    return FAMILIES[found]


def _columns(records: Iterable[Mapping[str, Any]], fail: Fail) -> EdgeColumns:
    ends: dict[str, list[int]] = {"i": [], "j": []}
    weight: list[float] = []
    code: list[int] = []
    makers: dict[FamilyMaker, int] = {}
    given: dict[str, list[tuple[int, float]]] = {}
    for k, record in enumerate(records):
        maker = _maker(record.get("family"), Quadratic, functools.partial(fail, k))
        code.append(makers.setdefault(maker, len(makers)))
        for field, column in ends.items():
            column.append(_integer(record.get(field), functools.partial(fail, k, field)))
        weight.append(1.0)
        for field, value in record.items():
            if field in ("i", "j", "family"):
                continue
            _check_field(field, value, maker, functools.partial(fail, k, field))
            if value is None:
                continue
            number = _number(value, functools.partial(fail, k, field))
            if field == "weight":
                weight[k] = number
            else:
                given.setdefault(field, []).append((k, number))
    columns = EdgeColumns(
        np.array(ends["i"], np.int64),
        np.array(ends["j"], np.int64),
        np.array(weight, np.float64),
        np.array(code, np.int64),
        tuple(makers),
        {field: _sparse_column(len(code), entries) for field, entries in given.items()},
    )
    columns.check(fail)
    return columns


def _sparse_column(size: int, entries: list[tuple[int, float]]) -> np.ndarray:
    column = np.full(size, np.nan)
    positions, values = zip(*entries, strict=True)
    column[list(positions)] = values
    return column


def _check_field(
    field: str, value: Any, maker: FamilyMaker, fail: Callable[[str], Exception]
) -> None:
    if field == "weight" or field in family_parameters(maker):
        return
    # rows of a table carry the other families' parameters too, as None
    if value is None and field in known_parameters():
        return
    name = getattr(maker, "__name__", repr(maker))
    choices = ", ".join(("weight", *family_parameters(maker)))
    raise fail(f"is unknown: the fields of {name} are {choices}")


def _integer(value: Any, fail: Callable[[str], Exception]) -> int:
    if value is None:
        raise fail("is missing: every edge needs i and j")
    try:
        number = operator.index(value)
    except TypeError:
        raise fail(
            f"= {value!r} is not an integer: nodes count from 0; sg.io.read_graph takes names"
        ) from None
    # the column holds int64; what is cut here is refused as a node index anyway
    limits = np.iinfo(np.int64)
    return max(int(limits.min), min(number, int(limits.max)))


def _number(value: Any, fail: Callable[[str], Exception]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise fail(f"= {value!r} is not a number") from None
    if np.isnan(number):
        raise fail("= nan must be finite")
    return number
