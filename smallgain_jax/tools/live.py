"""Telemetry while a relaxation runs: to files, TensorBoard, logging, and warnings with advice.

The loop is cut into a few equal parts on the host. Each part is one call of the compiled program
that `relax` itself would run, and while the next part computes, the rows of the last one are
written: nothing is called back from inside the loop.
"""

import csv
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from smallgain_jax.graphs.descent import majorized_descent
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.relaxation import RelaxResult, relax
from smallgain_jax.search.box import Box
from smallgain_jax.search.stopping import RelaxStatus
from smallgain_jax.tools.io import write_table
from smallgain_jax.tools.tables import PARTS, PathLike, optional_module
from smallgain_jax.tools.telemetry import CUMULATIVE, Table, table

CHUNKS = 20
"""Parts of a relaxation between which telemetry is written."""


class MarginWarning(UserWarning):
    """The stability margin is used up; the message says what to do about it."""


class Sink(Protocol):
    """Where telemetry goes: called with the rows of every part, in order, then closed."""

    def write(self, rows: Table) -> None:
        """Take the rows of one part; columns are the same every time."""

    def close(self) -> None:
        """Nothing more will come."""


class CsvSink:
    """One CSV file that grows: every part is on disk as soon as it is written.

    Args:
      path: what is there is replaced.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = CsvSink(f"{folder}/live.csv")
    ...     sink.write(Table({"step": np.arange(2)}))
    ...     sink.close()
    ...     Path(folder, "live.csv").read_text()
    'step\\n0\\n1\\n'
    """

    def __init__(self, path: PathLike) -> None:
        # open until `close`
        self._file = Path(path).open("w", newline="", encoding="utf-8")  # noqa: SIM115
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._started = False

    def write(self, rows: Table) -> None:
        if not self._started:
            self._writer.writerow(rows.columns)
            self._started = True
        self._writer.writerows(_plain_rows(rows, ""))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JsonLinesSink:
    """One JSON object a row, a file that grows; NaN is null.

    Args:
      path: what is there is replaced.
    """

    def __init__(self, path: PathLike) -> None:
        # open until `close`
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115

    def write(self, rows: Table) -> None:
        names = list(rows.columns)
        for row in _plain_rows(rows, None):
            self._file.write(json.dumps(dict(zip(names, row, strict=True))) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ParquetSink:
    """A folder of Parquet files, one a part: `polars.read_parquet("folder/*.parquet")`.

    A Parquet file cannot grow; whole parts can be read while the run goes on.

    Args:
      folder: made where it is missing; its earlier parts are removed.

    Raises:
      ImportError: polars is missing.
    """

    def __init__(self, folder: PathLike) -> None:
        optional_module("polars", "parquet")
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob(PARTS):
            old.unlink()
        self._parts = 0

    def write(self, rows: Table) -> None:
        write_table(self._folder / f"part-{self._parts:05d}.parquet", rows.columns)
        self._parts += 1

    def close(self) -> None:
        pass


class TensorBoardSink:
    """Scalars for TensorBoard, every column but `step`; NaN is left out.

    Args:
      folder: of the run, as `tensorboard --logdir` takes it.

    Raises:
      ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: PathLike) -> None:
        module = optional_module("tensorboardX", "tensorboard")
        self._writer = module.SummaryWriter(str(folder))

    def write(self, rows: Table) -> None:
        now = time.time()
        steps = rows["step"].tolist()
        for name, values in rows.columns.items():
            if name == "step":
                continue
            tag = name.replace(":", "/")
            for step, value in zip(steps, values.tolist(), strict=True):
                if value == value:
                    self._writer.add_scalar(tag, value, step, walltime=now)

    def close(self) -> None:
        self._writer.close()


class LoggingSink:
    """One line a part for Python's logging.

    Args:
      logger: None for the logger "smallgain_jax".
      level: of the lines.
    """

    def __init__(self, logger: logging.Logger | None = None, level: int = logging.INFO) -> None:
        self._logger = logging.getLogger("smallgain_jax") if logger is None else logger
        self._level = level

    def write(self, rows: Table) -> None:
        shown = ("step", "energy:reference", "margin:global", "total_backtracks")
        known = [(name, rows[name][-1]) for name in shown if name in rows.columns]
        told = (f"{name}={value:.6g}" for name, value in known if value == value)
        self._logger.log(self._level, " ".join(told))

    def close(self) -> None:
        pass


class WarningSink:
    """Python warnings, a `MarginWarning` once for each kind of trouble, with the advice that fits.

    | trouble | advice |
    |---|---|
    | the curvature bound is above the optimizer's limit | a smaller learning rate, by how much |
    | it is below the limit, but above the target | a smaller ceiling or a larger target |
    | most steps are halved | a smaller learning rate |

    >>> sink = WarningSink()
    >>> rows = {"step": [0], "margin:global": [-1.0], "sharpness_ratio": [2.0]}
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     sink.write(Table({name: np.array(values) for name, values in rows.items()}))
    >>> "2.22 times smaller" in str(caught[0].message)
    True
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def write(self, rows: Table) -> None:
        if "margin:global" in rows.columns:
            over = rows["margin:global"] < 0
            ratio = rows["sharpness_ratio"]
            beyond = over & (ratio > 1)
            if beyond.any():
                worst = float(ratio[beyond].max())
                self._warn(
                    "limit",
                    f"step {_first_step(rows, beyond)}: the curvature bound is {worst:.3g} times "
                    "what the base optimizer is stable up to; a learning rate "
                    f"{worst / 0.9:.3g} times smaller restores a margin (row gains or the line "
                    "search may be carrying the run)",
                )
            elif over.any():
                self._warn(
                    "target",
                    f"step {_first_step(rows, over)}: some row is over its target, though below "
                    "the base optimizer's limit; a smaller ceiling for the weights, a smaller "
                    "budget_fraction or a larger target gives it its margin back",
                )
        if "last_step_backtracks" in rows.columns and rows.num_rows >= 4:
            halved = rows["last_step_backtracks"] > 0
            if halved.mean() > 0.5:
                self._warn(
                    "backtracks",
                    f"step {_first_step(rows, halved)}: the line search halves "
                    f"{halved.mean():.0%} of the steps; a smaller learning rate saves those "
                    "evaluations, and near convergence a larger tol ends the run",
                )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, MarginWarning, stacklevel=3)

    def close(self) -> None:
        pass


def _first_step(rows: Table, where: np.ndarray) -> int:
    return int(rows["step"][where][0])


def _plain_rows(rows: Table, missing: Any) -> Iterable[tuple[Any, ...]]:
    """Rows as Python numbers, NaN as `missing`."""
    columns = (
        [missing if value != value else value for value in column.tolist()]
        for column in rows.columns.values()
    )
    return zip(*columns, strict=True)


def open_sink(target: PathLike) -> Sink:
    """The sink that a path asks for.

    Args:
      target: `.csv`, `.jsonl`, `.parquet` (a folder of parts); anything else is a folder for
        TensorBoard.

    Raises:
      ImportError: Parquet without polars, TensorBoard without tensorboardX.
      OSError: a file that cannot be written.
    """
    kinds: dict[str, Callable[[PathLike], Sink]] = {
        ".csv": CsvSink,
        ".jsonl": JsonLinesSink,
        ".parquet": ParquetSink,
    }
    return kinds.get(Path(target).suffix.lower(), TensorBoardSink)(target)


def relax_in_chunks(
    graph: EnergyGraph,
    x0: jax.Array,
    optimizer: optax.GradientTransformation | None,
    steps: int,
    bounds: tuple[float, float],
    *,
    tol: float,
    record: Callable[[Any], Any],
    progress: Callable[[int, float], None] = lambda made, energy: None,
    sinks: Sequence[Sink] = (),
    margin_threshold: float = 0.0,
) -> RelaxResult:
    """`relax` in parts, so that the host can tell how far it is; the result is that of one call.

    Args:
      graph, x0, optimizer, steps, bounds, tol, record: as in `relax`; with sinks, `record` is of
        `telemetry`.
      progress: called with the steps made and the energy, at the start and after every part.
      sinks: where the rows of every part go while the next one runs; closed at the end, whatever
        happens. The state after the last update is a row of its own.
      margin_threshold: as in `telemetry.table`.

    Returns:
      The `RelaxResult` of one call, except that its histories are NumPy arrays and end at the part
      in which the tolerance was met.
    """
    x = Box(*bounds).project(x0)
    state = _initial_state(graph, x, optimizer)
    parts: list[RelaxResult] = []
    size, made = max(1, -(-steps // CHUNKS)), 0
    sizes = [size] * (steps // size) + [steps % size] * (steps % size > 0)
    rows = _Rows(graph, sinks, margin_threshold)
    progress(0, math.nan)
    try:
        for now in sizes or [0]:
            part = relax(graph, x, optimizer, now, bounds, tol=tol, record=record, state=state)
            # the device is busy with this part: the time to write the last one's rows
            rows.flush()
            # on the host from here on: a slice of an array on the device is a program of its own
            part = part._replace(energy=jax.device_get(part.energy), info=jax.device_get(part.info))
            parts.append(part)
            x, state, made = part.x, part.state, made + int(part.info.steps)
            rows.hold(part)
            ended = part.info.status != RelaxStatus.STEPS
            progress(steps if ended else made, float(part.energy[-1]))
            if ended:
                break
        rows.flush(final=True)
    finally:
        for sink in sinks:
            sink.close()
    history = jax.tree.map(lambda *a: np.concatenate(a), *(part.info.history for part in parts))
    energy = np.concatenate([parts[0].energy[:1], *(part.energy[1:] for part in parts)])
    last = parts[-1]
    info = last.info._replace(steps=jnp.asarray(made, jnp.int32), history=history)
    return RelaxResult(x, jnp.asarray(energy), info, state)


class _Rows:
    """The rows of a part between its end and their writing, numbered from the run's start."""

    def __init__(self, graph: EnergyGraph, sinks: Sequence[Sink], margin_threshold: float) -> None:
        self._graph, self._sinks, self._threshold = graph, sinks, margin_threshold
        self._held: RelaxResult | None = None
        self._steps = 0
        self._sums: dict[str, Any] = {}

    def hold(self, part: RelaxResult) -> None:
        self._held = part

    def flush(self, final: bool = False) -> None:
        if self._held is None or not self._sinks:
            return
        part, self._held = self._held, None
        told = table(self._graph, part, margin_threshold=self._threshold, final=final)
        if not told.num_rows:
            return
        columns = dict(told.columns, step=told["step"] + self._steps)
        # what the optimizer itself counts runs on from part to part
        for name in set(CUMULATIVE) & columns.keys() - (part.info.history or {}).keys():
            columns[name] = columns[name] + self._sums.get(name, 0)
            self._sums[name] = columns[name][-1]
        self._steps += told.num_rows
        for sink in self._sinks:
            sink.write(Table(columns))


def _initial_state(
    graph: EnergyGraph, x: jax.Array, optimizer: optax.GradientTransformation | None
) -> Any:
    """A state to continue from before the first step: with None, the first part compiles alone."""
    state = (majorized_descent(graph) if optimizer is None else optimizer).init(x)
    # weak types would compile once more
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), state)
