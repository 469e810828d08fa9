"""Telemetry of training on losses: a row for every update, tables, sinks and figures.

Row k belongs to update k: the losses before it, by their names, and what `small_gain` knew and did.

| column | what |
|---|---|
| `step` | the update, from 0 |
| `loss:<name>`, `loss:total` | each loss as last evaluated, and their plain sum |
| `weight:<name>` | the weight in force |
| `share:<name>` | the loss's part of the total cost |
| `response:<name>` | by how much its share follows its weight |
| `sharpness`, `limit`, `sharpness_ratio` | of the weighted sum; of the optimizer; their ratio |
| `guard` | factor on the step |
| `fit` | cosine between what was handed in and the gradient of the plain sum |
| `rewinds`, `skipped` | how often so far |

What is not known yet is NaN: a loss that nothing has evaluated, shares and sharpness before the
first measurement, a limit where there is none.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike as PathLikeOf
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._show import shows
from smallgain_jax.losses.state import Names, TrainingState
from smallgain_jax.tools.live import Sink, open_sink
from smallgain_jax.tools.plots import figure_of, new_figure, shares
from smallgain_jax.tools.tables import PathLike
from smallgain_jax.tools.telemetry import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = 24
"""Characters of the progress bar."""


@shows(bars="share", labels="names", labelled=("losses", "weights", "share", "response"))
class TrainingRecord(NamedTuple):
    """One update of `small_gain` on losses, in a few numbers. K losses."""

    losses: jax.Array  # [K]
    weights: jax.Array  # [K]
    share: jax.Array  # [K]
    response: jax.Array  # [K]
    sharpness: jax.Array  # []
    limit: jax.Array  # []
    sharpness_ratio: jax.Array  # []
    guard: jax.Array  # []
    fit: jax.Array  # []
    rewinds: jax.Array  # [] int32
    skipped: jax.Array  # [] int32
    names: Names  # of the losses; static


def record(state: Any) -> TrainingRecord:
    """What telemetry needs of an optimizer's state: for the output of a scan, or a list.

    Args:
      state: of `small_gain` on losses, or of anything around it (chains, `MultiSteps`).

    Raises:
      ValueError: there is no such state in it.

    >>> import optax
    >>> import smallgain_jax as sg
    >>> losses = sg.terms(lambda x: {"a": x**2, "b": 3 * x**2})
    >>> record(sg.small_gain(optax.sgd(0.1), losses).init(jnp.ones(()))).names
    ('a', 'b')
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_training) if _is_training(s)]
    if not found:
        raise ValueError(
            "state holds no TrainingState: record takes that of small_gain on losses, or of a "
            "transformation around it"
        )
    ours, info = found[0], found[0].info
    same = {name: getattr(info, name) for name in TrainingRecord._fields if name != "weights"}
    return TrainingRecord(weights=ours.weights, **same)


def _is_training(node: Any) -> bool:
    return isinstance(node, TrainingState)


def table(history: TrainingRecord | Sequence[Any], first: int = 0, every: int = 1) -> Table:
    """Records as a table.

    Args:
      history: records of one run: stacked by a scan, with an axis of updates before all others; or
        a sequence of records or of optimizer states.
      first: the update of the first row.
      every: updates between rows.

    Returns:
      A `Table`; its columns are listed at the top of this module. Each is a float or int32 [rows].

    Raises:
      ValueError: a batch of runs, or no record.

    >>> import optax
    >>> import smallgain_jax as sg
    >>> losses = sg.terms(lambda x: {"a": x**2, "b": 3 * x**2})
    >>> optimizer = sg.small_gain(optax.sgd(0.1), losses)
    >>> step, x, state = sg.train_step(losses, optimizer), jnp.ones(()), None
    >>> state, kept = optimizer.init(x), []
    >>> for _ in range(3):
    ...     x, state, _ = step(x, state)
    ...     kept.append(jax.device_get(record(state)))
    >>> print(Table({name: table(kept)[name] for name in ("step", "loss:b", "loss:total")}))
    step  loss:b  loss:total
       0       3           4
       1    0.12        0.16
       2  0.0048      0.0064
    """
    found = history if isinstance(history, TrainingRecord) else _stacked(history)
    found = jax.tree.map(np.asarray, jax.device_get(found))
    if found.guard.ndim != 1:
        raise ValueError(
            f"history has records of shape {found.guard.shape}: give table one run of a batch"
        )
    columns = {"step": first + every * np.arange(found.guard.size)}
    return Table(columns | _columns(found))


def _stacked(history: Sequence[Any]) -> TrainingRecord:
    rows = [row if isinstance(row, TrainingRecord) else record(row) for row in history]
    if not rows:
        raise ValueError("history is empty: there is no row to make")
    stacked: TrainingRecord = jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(rows))
    return stacked


def _columns(history: Any) -> dict[str, np.ndarray]:
    names = history.names or tuple(map(str, range(history.weights.shape[-1])))
    priced, none = history.sharpness > 0, np.finfo(history.limit.dtype).max
    limited = priced & (history.limit < none)
    # 0 in all is what stands in a state before anything was evaluated
    seen = np.cumsum(np.any(history.losses != 0, axis=1)) > 0
    losses = np.where(seen[:, None], history.losses, np.nan)
    columns: dict[str, np.ndarray] = {f"loss:{name}": losses[:, k] for k, name in enumerate(names)}
    columns["loss:total"] = losses.sum(axis=1)
    known: dict[str, np.ndarray] = {
        "weight": history.weights,
        "share": np.where(priced[:, None], history.share, np.nan),
        "response": np.where(priced[:, None], history.response, np.nan),
    }
    for what, values in known.items():
        columns |= {f"{what}:{name}": values[:, k] for k, name in enumerate(names)}
    return columns | {
        "sharpness": np.where(priced, history.sharpness, np.nan),
        "limit": np.where(limited, history.limit, np.nan),
        "sharpness_ratio": np.where(limited, history.sharpness_ratio, np.nan),
        "guard": history.guard,
        "fit": history.fit,
        "rewinds": history.rewinds,
        "skipped": history.skipped,
    }


class ProgressSink:
    """A bar in one line of a terminal: how far training is, its loss, and what is out of the way.

    Args:
      total: updates in all.
      stream: where to; None for `sys.stderr`.

    >>> import io
    >>> stream = io.StringIO()
    >>> sink = ProgressSink(200, stream)
    >>> sink.write(Table({"step": np.array([99]), "loss:total": np.array([0.25])}))
    >>> stream.getvalue().strip()
    '############............  100/200  loss 0.25'
    """

    def __init__(self, total: int, stream: IO[str] | None = None) -> None:
        self._total, self._stream = total, sys.stderr if stream is None else stream
        self._width = 0

    def write(self, rows: Table) -> None:
        """Take the rows of one part; the last one is shown."""
        now = {name: column[-1] for name, column in rows.columns.items()}
        made = int(now["step"]) + 1
        full = min(BAR, BAR * made // max(self._total, 1))
        told = [f"{'#' * full}{'.' * (BAR - full)}", f"{made}/{self._total}"]
        told.append(f"loss {now['loss:total']:.4g}")
        if now.get("sharpness_ratio", np.nan) > 0:
            told.append(f"sharpness/limit {now['sharpness_ratio']:.2g}")
        if now.get("guard", 1) < 1:
            told.append(f"guard {now['guard']:.2g}")
        told += [f"{name} {now[name]}" for name in ("rewinds", "skipped") if now.get(name, 0)]
        line = "  ".join(told)
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)

    def close(self) -> None:
        """End the line."""
        self._stream.write("\n")


@contextmanager
def log(*targets: Sink | PathLike, every: int = 100) -> Iterator[Callable[[Any], None]]:
    """Write a row now and then while a loop on the host trains, without making it wait.

    A row is fetched when the next one is due: by then it has long been computed. Its numbers are
    copied, so that `train_step` may overwrite the state.

    Args:
      targets: sinks of `live`, a `ProgressSink`, or paths for `live.open_sink` (`.csv`, `.jsonl`,
        `.parquet`, or a folder for TensorBoard). All are closed at the end, whatever happens.
      every: calls between rows, at least 1; the first call is a row, and so is the last.

    Yields:
      `told(state)`, to be called after every update with the optimizer's state.

    Raises:
      ValueError: `every` below 1; a state without that of `small_gain` on losses.

    >>> import tempfile, pathlib, optax
    >>> import smallgain_jax as sg
    >>> losses = sg.terms(lambda x: {"a": x**2, "b": 3 * x**2})
    >>> optimizer = sg.small_gain(optax.sgd(0.1), losses)
    >>> step, x = sg.train_step(losses, optimizer), jnp.ones(())
    >>> state = optimizer.init(x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "run.csv")
    ...     with log(path, every=2) as told:
    ...         for _ in range(4):
    ...             x, state, _ = step(x, state)
    ...             told(state)
    ...     [line.split(",")[0] for line in path.read_text().splitlines()]
    ['step', '0', '2', '3']
    """
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    sinks = [open_sink(t) if isinstance(t, str | PathLikeOf) else t for t in targets]
    held: list[tuple[int, TrainingRecord]] = []
    calls = 0

    def flush() -> None:
        while held:
            at, row = held.pop(0)
            rows = table([row], first=at)
            for sink in sinks:
                sink.write(rows)

    last: list[Any] = []

    def told(state: Any) -> None:
        nonlocal calls
        last[:] = [state]
        if calls % every == 0:
            flush()
            held.append((calls, jax.tree.map(jnp.copy, record(state))))
        calls += 1

    try:
        yield told
        flush()
        if last and (calls - 1) % every:
            held.append((calls - 1, record(last[0])))
            flush()
    finally:
        for sink in sinks:
            sink.close()


def losses(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Each loss and their sum against the update, logarithmic where all are positive.

    Args:
      table: of `training.table`, or read back from its file.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Raises:
      ValueError: `table` has no losses.
      ImportError: matplotlib is missing.
    """
    return _lines(table, "loss:", "loss", ax)


def weights(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Each loss's weight against the update.

    Args:
      table, ax: as in `losses`.

    Raises:
      ValueError: `table` has no weights.
      ImportError: matplotlib is missing.
    """
    return _lines(table, "weight:", "weight", ax)


def sharpness(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Sharpness over the limit, and the guard's factor on the step, against the update.

    Above the line at 1 the optimizer is past what it is stable up to; networks live there for a
    while.

    Args:
      table, ax: as in `losses`.

    Raises:
      ValueError: `table` has no `sharpness_ratio`.
      ImportError: matplotlib is missing.
    """
    if "sharpness_ratio" not in table.columns:
        raise ValueError("table has no column sharpness_ratio: make it by training.table")
    axes = new_figure(6, 3.6).subplots() if ax is None else ax
    axes.plot(table["step"], table["sharpness_ratio"], color="C0", label="sharpness / limit")
    axes.plot(table["step"], table["guard"], color="C1", linestyle="--", label="guard")
    axes.axhline(1, color="0.4", linestyle=":", linewidth=1)
    rewound = np.flatnonzero(np.diff(table["rewinds"], prepend=table["rewinds"][:1]) > 0)
    for k, at in enumerate(rewound):
        axes.axvline(
            table["step"][at], color="C3", linewidth=1, label=None if k else "back to the anchor"
        )
    return _finished(axes, "factor")


def figure(table: Table) -> "Figure":
    """Losses, weights, shares and sharpness of a run, in four panels.

    Args:
      table: of `training.table`, or read back from its file.

    Raises:
      ValueError: a column is missing.
      ImportError: matplotlib is missing.
    """
    panels = new_figure(10, 6.4).subplots(2, 2, sharex=True)
    losses(table, panels[0, 0])
    weights(table, panels[0, 1])
    sharpness(table, panels[1, 1])
    if any(np.any(np.isfinite(v)) for n, v in table.columns.items() if n.startswith("share:")):
        shares(table, panels[1, 0])
    else:
        empty = panels[1, 0]
        empty.text(0.5, 0.5, "not measured in this run", ha="center", transform=empty.transAxes)
        empty.set_axis_off()
    titles = "Losses", "Weights", "Shares of the cost", "Sharpness over the limit, and the guard"
    for axes, title in zip(panels.flat, titles, strict=True):
        axes.set_title(title, loc="left", fontsize="medium")
    return figure_of(panels[0, 0])


def _lines(table: Table, prefix: str, label: str, ax: "Axes | None") -> "Axes":
    found = {n.removeprefix(prefix): v for n, v in table.columns.items() if n.startswith(prefix)}
    if not found:
        raise ValueError(f"table has no column {prefix}<name>: make it by training.table")
    axes = new_figure(6, 3.6).subplots() if ax is None else ax
    for name, values in found.items():
        total = name == "total"
        axes.plot(
            table["step"],
            values,
            label=name,
            color="0.3" if total else None,
            alpha=0.9,
            linestyle=":" if total else "-",
        )
    whole = np.concatenate(list(found.values()))
    if np.all(whole[np.isfinite(whole)] > 0):
        axes.set_yscale("log")
    return _finished(axes, label)


def _finished(axes: "Axes", label: str) -> "Axes":
    axes.set_xlabel("step (updates)")
    axes.set_ylabel(label)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", framealpha=0.9)
    return axes
