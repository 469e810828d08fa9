"""Telemetry: the recorded history of a relaxation as a table.

Row k belongs to step k, the state after k updates: what was measured there, and what the update
that leaves it did. No update leaves the last state: its row has an energy, sums so far, and NaN.

| column | what | design note |
|---|---|---|
| `energy:reference`, `energy:adapted` | F(x; 1) and F(x; w), w the weights chosen there | ours |
| `margin:global`, `margin:row:<i>` | target less the row sum, the smallest and each | the same |
| `spent:global`, `spent:row:<i>` | budget spent by the allocation of this update | cumulates |
| `spent:cumulative` | sum of `spent:global` so far | its `spent:global` |
| `alloc:coup:<Key>` | mean weight of a family's terms after the update | the total |
| `cost:coup:<Key>` | sum of weight times cost over the family, in curvature | the same |
| `grad_norm:coup:<Key>` | root of the sum of the terms' squared gradient norms | norm of the sum |
| `score:coup:<Key>`, `hinge_activity:<Key>` | means over the family | the same |
| `share:<Key>` | the family's part of the cost of all | ours |
| `contraction_margin` | 2/L less the step, the step being 2/limit | the same |
| `margin_warn` | 1 where `margin:global` is below `margin_threshold` | the same |
| `sharpness_ratio` | L over the limit | ours |
| `last_step_backtracks`, `total_backtracks` | halvings of the line search | the same |

The last column compares with the design note this library grew from, whose names these are. Two
things of it are declared as different: `grad_norm` has couplings only, none of
local energies; and its optional weak Wolfe test after a large change of the weights does not exist,
because Armijo's test and the angle test run at every step.

A key is a family of edges, as in `EnergyGraph.keys`; rows of vector nodes are `<i>:<component>`. An
optimizer that knows less has fewer columns: majorized descent has no weights and no limit.
"""

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from smallgain_jax.graphs.descent import DescentInfo, MajorizedDescentState
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.relaxation import RelaxResult
from smallgain_jax.tools.io import write_table
from smallgain_jax.tools.tables import PathLike
from smallgain_jax.transform import SmallGainInfo, SmallGainState

SHOWN_ROWS = 20
"""A longer table is shown by its first and last rows."""
_LEFT = ' style="text-align:left"'


class WeightsRecord(NamedTuple):
    """One update of `small_gain`, `gradnorm` or `auto_cap`, as it was. K terms."""

    weights: jax.Array  # [K]
    scores: jax.Array  # [K]
    info: SmallGainInfo


class SearchRecord(NamedTuple):
    """One update of an optimizer of optax with a line search."""

    backtracks: jax.Array  # [] int32


def record(state: Any) -> WeightsRecord | DescentInfo | SearchRecord | None:
    """What telemetry needs of an optimizer's state, for `relax(..., record=record)`.

    Finds the state of `small_gain`, `gradnorm`, `auto_cap`, `majorized_descent` or of optax's line
    searches inside any other, chains and injected hyperparameters included. Everything is kept, K
    terms and n rows at every step: for a large graph take `family_record`.

    Args:
      state: any optimizer's state.

    Returns:
      A pytree of arrays, or None where nothing is known.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> state = optax.chain(sg.small_gain(optax.sgd(0.1), graph)).init(jnp.ones(2))
    >>> record(state).weights.tolist()
    [1.0]
    """
    found = jax.tree.leaves(state, is_leaf=_is_known)
    found = [part for part in found if _is_known(part)]
    for part in sorted(found, key=_preference)[:1]:
        if isinstance(part, SmallGainState):
            return WeightsRecord(part.weights, part.scores, part.info)
        if isinstance(part, MajorizedDescentState):
            return part.info
        # optax counts evaluations, the first of which is no backtrack
        return SearchRecord((part.info.num_linesearch_steps - 1).clip(0))
    return None


_KNOWN = (
    SmallGainState,
    MajorizedDescentState,
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)


def _is_known(part: Any) -> bool:
    return isinstance(part, _KNOWN)


def _preference(part: Any) -> int:
    return next(k for k, kind in enumerate(_KNOWN) if isinstance(part, kind))


@dataclass(frozen=True)
class FamilyRecord:
    """A `record` that keeps families instead of terms; made by `family_record`.

    Equal ones hash equal, so that a second `relax` does not compile again.
    """

    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: bool = False

    def __call__(self, state: Any) -> dict[str, Any]:
        return _columns(record(state), self)


def family_record(graph: EnergyGraph, rows: bool = False) -> FamilyRecord:
    """A `record` for large graphs: a few numbers a family at every step, whatever their size.

    Args:
      graph: whose families to tell apart.
      rows: whether to keep every row's margin and spend too.

    >>> from smallgain_jax import relax, scenarios
    >>> problem = scenarios.dense()
    >>> keep = family_record(problem.graph)
    >>> table(problem.graph, relax(problem.graph, problem.x0, steps=5, record=keep)).num_rows
    6
    """
    return FamilyRecord(graph.keys, tuple(family.num_edges for family in graph.edges), rows)


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Named columns of equal length, shown as text or HTML and written to files.

    Attributes:
      columns: one-dimensional arrays by name. NaN is shown as "-".

    >>> print(Table({"step": np.array([0, 1]), "energy": np.array([0.5, 0.25])}))
    step  energy
       0     0.5
       1    0.25
    """

    columns: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        sizes = {name: np.shape(column) for name, column in self.columns.items()}
        if any(len(size) != 1 for size in sizes.values()) or len(set(sizes.values())) > 1:
            raise ValueError(f"columns must be one-dimensional and equally long, got {sizes}")

    @property
    def num_rows(self) -> int:
        """Rows in every column."""
        return max((column.size for column in self.columns.values()), default=0)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __str__(self) -> str:
        body = list(self._shown(SHOWN_ROWS))
        cells = [list(self.columns), *body]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        # text reads from the left, numbers line up on the right
        left = [column.dtype.kind not in "fiub" for column in self.columns.values()]
        lines = (
            "  ".join(
                cell.ljust(width) if at_left else cell.rjust(width)
                for cell, width, at_left in zip(row, widths, left, strict=True)
            ).rstrip()
            for row in cells
        )
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.html(SHOWN_ROWS)

    def html(self, most: int | None = None) -> str:
        """The table as HTML.

        Args:
          most: rows to show, the first and the last; None for all.

        >>> Table({"a": np.array([1])}).html()
        '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>1</td></tr></tbody></table>'
        """

        # Jupyter puts every cell at the right, where text is hard to read
        sides = ["" if c.dtype.kind in "fiub" else _LEFT for c in self.columns.values()]

        def row(tag: str, cells: Iterable[str]) -> str:
            pairs = zip(cells, sides, strict=True)
            return f"<tr>{''.join(f'<{tag}{side}>{cell}</{tag}>' for cell, side in pairs)}</tr>"

        body = "".join(row("td", map(html.escape, cells)) for cells in self._shown(most))
        # long names may break where their parts meet
        names = [html.escape(name).replace("_", "_<wbr>") for name in self.columns]
        head = row("th", [name.replace(":", ":<wbr>") for name in names])
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"

    def markdown(self) -> str:
        """The whole table as Markdown, numbers at the right.

        >>> print(Table({"a|b": np.array([1, 2])}).markdown())
        | a\\|b |
        |---:|
        | 1 |
        | 2 |
        """

        def row(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        numeric = [column.dtype.kind in "fiub" for column in self.columns.values()]
        rule = "|" + "|".join("---:" if number else "---" for number in numeric) + "|"
        return "\n".join([row(self.columns), rule, *map(row, self._shown(None))])

    def _shown(self, most: int | None) -> Iterator[list[str]]:
        most = self.num_rows if most is None else most
        half = most // 2
        for k in range(self.num_rows):
            if self.num_rows <= most or not half <= k < self.num_rows - half:
                yield [_cell(column[k]) for column in self.columns.values()]
            elif k == half:
                yield ["..."] * len(self.columns)

    def write(self, path: PathLike) -> None:
        """Write the whole table, or nothing.

        Args:
          path: `.csv`, `.parquet` or `.npz`. NaN is an empty cell in CSV.

        Raises:
          ValueError: another suffix.
          ImportError: Parquet without polars.
        """
        write_table(path, self.columns, _csv_cell)


def _cell(value: Any) -> str:
    if isinstance(value, np.floating):
        return "-" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def _csv_cell(value: Any) -> str:
    return "" if isinstance(value, np.floating) and np.isnan(value) else str(value)


def table(
    graph: EnergyGraph,
    result: RelaxResult,
    *,
    rows: bool = False,
    margin_threshold: float = 0.0,
    final: bool = True,
) -> Table:
    """Telemetry of one relaxation, a row for every state: each update's, and the last.

    Updates that a tolerance made unnecessary have no row. Without a record, or for an optimizer of
    which nothing is known, the table is `step` and `energy:reference`.

    Args:
      graph: the graph that was relaxed.
      result: of `relax(..., record=record)` or `record=family_record(graph)`, one start.
      rows: whether to add each row's margin and spend, two columns a node.
      margin_threshold: `margin_warn` is 1 where the smallest margin is below it, in curvature.
      final: whether the state after the last update is a row; without it, there is one an update.

    Returns:
      A `Table`; its columns are listed at the top of this module.

    Raises:
      ValueError: `result` is a batch, or what it recorded is not telemetry.

    >>> from smallgain_jax import relax, scenarios
    >>> problem = scenarios.dense()
    >>> result = relax(problem.graph, problem.x0, steps=5, record=record)
    >>> table(problem.graph, result)["step"].tolist()
    [0, 1, 2, 3, 4, 5]
    """
    energy = np.asarray(result.energy)
    if energy.ndim != 1:
        raise ValueError(
            f"result has energies of shape {energy.shape}: give telemetry one relaxation of a batch"
        )
    history = jax.tree.map(np.asarray, result.info.history)
    if not isinstance(history, dict):
        if not isinstance(history, WeightsRecord | DescentInfo | SearchRecord | None):
            raise ValueError("result was not recorded by telemetry: relax(..., record=record)")
        history = _columns(history, family_record(graph, rows))
    made = int(result.info.steps)
    columns: dict[str, np.ndarray] = {
        "step": np.arange(made),
        "energy:reference": energy[:made],
    }
    for name, values in history.items():
        if name.endswith(":row"):
            if rows:
                columns |= _row_columns(name, values[:made])
        else:
            columns[name] = values[:made]
    if "last_step_backtracks" in columns and "total_backtracks" not in columns:
        columns["total_backtracks"] = np.cumsum(columns["last_step_backtracks"])
    if "margin:global" in columns:
        columns["spent:cumulative"] = np.cumsum(columns["spent:global"], dtype=np.float64)
        columns["margin_warn"] = (columns["margin:global"] < margin_threshold).astype(np.int32)
    if not final:
        return Table(columns)
    last = {"step": made, "energy:reference": energy[made]}
    return Table(
        {name: np.append(c, _last(name, c, last)).astype(c.dtype) for name, c in columns.items()}
    )


CUMULATIVE = ("total_backtracks", "spent:cumulative")
"""Columns that count from the start of a run."""


def _last(name: str, column: np.ndarray, known: dict[str, Any]) -> Any:
    """What a column says of the state that no update left."""
    if name in known:
        return known[name]
    if name in CUMULATIVE:
        return column[-1] if column.size else 0
    return 0 if column.dtype.kind in "iub" else np.nan


def _row_columns(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    places = np.ndindex(values.shape[1:])
    flat = values.reshape(len(values), -1)
    return {f"{name}:{':'.join(map(str, at))}": flat[:, k] for k, at in enumerate(places)}


def _columns(
    found: WeightsRecord | DescentInfo | SearchRecord | None, families: FamilyRecord
) -> dict[str, Any]:
    """Columns from what was recorded, of one step (traced) or of all (NumPy, steps first)."""
    if found is None:
        return {}
    if isinstance(found, SearchRecord):
        return {"last_step_backtracks": found.backtracks}
    if isinstance(found, DescentInfo):
        return {
            "last_step_backtracks": found.last_step_backtracks,
            "total_backtracks": found.total_backtracks,
        }
    return _weight_columns(found, families)


def _weight_columns(found: WeightsRecord, families: FamilyRecord) -> dict[str, Any]:
    info = found.info
    priced = found.weights * info.cost
    total = priced.sum(-1)
    # a graph without a bound (no curvature, no limit) divides 0 by 0
    with np.errstate(divide="ignore", invalid="ignore"):
        columns: dict[str, Any] = {
            "energy:adapted": info.energy_adapted,
            "margin:global": info.margin_global,
            "spent:global": info.spent_global,
            "contraction_margin": 2 / info.lipschitz - 2 / info.limit,
            "sharpness_ratio": info.lipschitz / info.limit,
            "last_step_backtracks": info.last_step_backtracks,
            "total_backtracks": info.total_backtracks,
        }
        if families.rows:
            columns |= {"margin:row": info.margin_rows, "spent:row": info.spent_rows}
        start = 0
        for key, size in zip(families.keys, families.sizes, strict=True):
            here = (..., slice(start, start + size))
            start += size
            if not size:
                continue
            cost = priced[here].sum(-1)
            columns |= {
                f"alloc:coup:{key}": found.weights[here].mean(-1),
                f"cost:coup:{key}": cost,
                f"grad_norm:coup:{key}": (info.gradient_norms[here] ** 2).sum(-1) ** 0.5,
                f"score:coup:{key}": found.scores[here].mean(-1),
                f"hinge_activity:{key}": info.hinge_activity[here].mean(-1),
                f"share:{key}": cost / total,
            }
    return columns
