"""The command line: `smallgain demo`, `relax FILE`, `bench`, `sweep` and `plot SOURCE`."""

import argparse
import contextlib
import importlib.metadata
import io
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import tyro

from smallgain_jax._checks import check_fraction, check_positive
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.tools import demo, report, telemetry, validation
from smallgain_jax.tools.io import GraphFile, read_columns, read_graph, write_state
from smallgain_jax.tools.live import LoggingSink, Sink, WarningSink, open_sink, relax_in_chunks
from smallgain_jax.tools.sweep import Sweep, run_sweep
from smallgain_jax.tools.validation import Plan, run_plan
from smallgain_jax.transform import auto_cap, gradnorm, small_gain

Method: TypeAlias = Literal[
    "default", "sgd", "momentum", "lbfgs", "small_gain", "gradnorm", "auto_cap"
]


_Config = TypeVar("_Config", bound=msgspec.Struct)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a TOML file given by --config may say, by these names; flags override it."""

    nodes: Path | None = None
    method: Method = "default"
    steps: int = 200
    tol: float = 1e-8
    lower: float = 0.0
    upper: float = 1.0
    learning_rate: float | None = None
    momentum: float = 0.9
    x64: bool = True
    rows: bool = False
    live: tuple[Path, ...] = ()
    log: bool = False
    out: Path | None = None


class Relax(Settings, frozen=True, kw_only=True):
    """Relax the energy graph of a file: an edge table (.csv, .parquet, .npz), .graphml or .mtx.

    Writes state.csv, telemetry.csv, summary.json and summary.txt, all of them or none.

    Attributes:
      file: the graph. The columns of an edge table are source, target and, as needed, family,
        weight and the parameters of the families.
      nodes: node table: node and, as needed, a, b, target and start. Without a start the state
        starts in the middle of the box.
      method: "default" is majorized descent, the library's best.
      steps: number of updates at most.
      tol: stop once the step that the Hessian's rows favour is this share of the box, or less.
      lower: lower bound of every coordinate; -inf for none.
      upper: upper bound of every coordinate; inf for none.
      learning_rate: of sgd, momentum and the methods that wrap sgd; 1 over the certified bound on
        the curvature at the start when not given.
      momentum: coefficient of the method of that name.
      x64: double precision.
      rows: also write every row's margin and spend to the telemetry.
      live: telemetry to write while it runs: .csv, .jsonl, .parquet (a folder of parts); anything
        else is a folder for TensorBoard.
      log: a line of telemetry on standard error for every twentieth of the steps.
      out: folder to write to; FILE's name and "-relaxed" when not given.
      config: TOML file of these settings; flags override it.
    """

    file: tyro.conf.Positional[Path]
    config: Path | None = None


class Demo(msgspec.Struct, frozen=True, kw_only=True):
    """Relax the two published scenarios by every method; write tables and a figure.

    Attributes:
      out: folder to write to.
      steps: updates of each method.
    """

    out: Path = Path("smallgain-demo")
    steps: int = 60


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """Run a plan of suites and methods; write tables and a report as Markdown and HTML.

    Attributes:
      config: TOML file of the plan, such as configs/bench.toml.
      out: folder to write to.
      steps: updates of each method, in place of the plan's.
      methods: names of methods or of "baselines", "ours", "ablations", in place of the plan's.
      repeats: timed runs of each method, in place of the plan's; 0 for none.
    """

    config: Path
    out: Path = Path("smallgain-bench")
    steps: int | None = None
    methods: tuple[str, ...] = ()
    repeats: int | None = None


class SweepOver(msgspec.Struct, frozen=True, kw_only=True):
    """Run small_gain at many settings, all in one program; write tables and a report.

    Attributes:
      config: TOML file of the sweep, such as configs/sweep.toml.
      out: folder to write to.
      steps: updates, in place of the sweep's.
      size: number of random designs, in place of the sweep's.
      sort_by: column to sort by, in place of the sweep's.
    """

    config: Path
    out: Path = Path("smallgain-sweep")
    steps: int | None = None
    size: int | None = None
    sort_by: str | None = None


class Plot(msgspec.Struct, frozen=True, kw_only=True):
    """Draw where the stability margin goes; write a PNG file for each figure.

    Attributes:
      source: telemetry of `smallgain relax` (.csv, .parquet, .npz), from which every figure is
        drawn that its columns allow; or the TOML file of a plan, of which small_gain relaxes one
        suite for all figures.
      out: folder to write to.
      suite: name of the plan's suite; its first when not given.
      steps: updates, for a plan.
    """

    source: tyro.conf.Positional[Path]
    out: Path = Path("smallgain-plots")
    suite: str | None = None
    steps: int = 60


Command: TypeAlias = Relax | Demo | Bench | SweepOver | Plot


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; None takes the process's own.

    Returns:
      The exit code: 0, or 2 after one line on standard error that says what was wrong.

    >>> main(["relax", "missing.csv"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"smallgain {_version()}")
        return 0
    try:
        command = _parse(arguments)
        if isinstance(command, Demo):
            _run_demo(command)
        elif isinstance(command, Bench):
            _run_bench(command)
        elif isinstance(command, SweepOver):
            _run_sweep(command)
        elif isinstance(command, Plot):
            _run_plot(command)
        else:
            _run_relax(command)
    except _HelpShown:
        return 0
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _complain(named)
    except (ValueError, ImportError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted, nothing was written")
        return 130
    return 0


def _complain(problem: str) -> int:
    print(f"smallgain: error: {' '.join(problem.split())}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return importlib.metadata.version("smallgain_jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


class _HelpShown(Exception):
    """The parser has answered by itself."""


def _parse(arguments: list[str]) -> Command:
    # a positional that is missing stays missing: the parser asks for it
    settings = msgspec.structs.asdict(_configured(arguments))
    relaxing = Relax(file=tyro.MISSING, **settings)
    commands: Any = (
        Annotated[Relax, tyro.conf.subcommand("relax", default=relaxing)]
        | Annotated[Demo, tyro.conf.subcommand("demo", default=Demo())]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[SweepOver, tyro.conf.subcommand("sweep")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
    )
    said = io.StringIO()
    about = "Stability margins as a budget. `smallgain --version` prints the version."
    try:
        with contextlib.redirect_stderr(said):
            command: Command = tyro.cli(
                commands, args=arguments, prog="smallgain", description=about
            )
            return command
    except SystemExit as stop:
        if not stop.code:
            raise _HelpShown from None
        _fail_usage(said.getvalue())


def _fail_usage(box: str) -> NoReturn:
    """The first paragraph of the parser's framed message, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    ends = (k for k, line in enumerate(lines) if not line or line[0] in "─╰")
    text = " ".join(lines[: next(ends, None)])
    raise ValueError(f"{text or 'wrong arguments'} (see smallgain --help)")


def _configured(arguments: list[str]) -> Settings:
    """The settings of the file that --config names, ahead of the flags that override them."""
    if arguments[:1] != ["relax"]:
        return Settings()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    try:
        path = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if path is None:
        return Settings()
    return _decoded(path, Settings)


def _decoded(path: Path, kind: type[_Config]) -> _Config:
    """A TOML file as one of the typed configurations."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind, dec_hook=_decode_path)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _overridden(config: _Config, **flags: Any) -> _Config:
    """A configuration with the flags that were given in its place."""
    return msgspec.structs.replace(config, **{k: v for k, v in flags.items() if v is not None})


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"Expected `str`, got `{type(value).__name__}`")


def _run_demo(command: Demo) -> None:
    # what cannot be written should be known before the work
    command.out.mkdir(parents=True, exist_ok=True)
    result = demo.run(command.steps)
    print(result)
    written = result.save(command.out)
    print("\nwritten: " + ", ".join(map(str, written)))


def _run_bench(command: Bench) -> None:
    plan = _overridden(
        _decoded(command.config, Plan),
        steps=command.steps,
        methods=command.methods or None,
        repeats=command.repeats,
    )
    plan.check()
    command.out.mkdir(parents=True, exist_ok=True)
    result = run_plan(plan, checkpoint=lambda partial: report.write_tables(partial, command.out))
    written = report.write_plan(result, command.out)
    print(result.numbers)
    told = validation.claims(result)
    if told.num_rows:
        print(f"\n{told}")
    print("\nwritten: " + ", ".join(map(str, written)))


def _run_sweep(command: SweepOver) -> None:
    plan = _overridden(
        _decoded(command.config, Sweep),
        steps=command.steps,
        size=command.size,
        sort_by=command.sort_by,
    )
    plan.check()
    command.out.mkdir(parents=True, exist_ok=True)
    result = run_sweep(plan)
    written = report.write_sweep(result, command.out)
    print(result.summary)
    print("\nwritten: " + ", ".join(map(str, written)))


def _run_plot(command: Plot) -> None:
    if command.source.suffix.lower() == ".toml":
        figures = _anatomy_of(command)
    else:
        figures = report.figures_of(telemetry.Table(read_columns(command.source)))
    command.out.mkdir(parents=True, exist_ok=True)
    written = report.write_figures(figures, command.out)
    print("written: " + ", ".join(map(str, written)))


def _anatomy_of(command: Plot) -> dict[str, Any]:
    plan = _decoded(command.source, Plan)
    plan.check()
    suites = {suite.name: suite for suite in plan.suites}
    name = next(iter(suites)) if command.suite is None else command.suite
    if name not in suites:
        raise ValueError(f"suite = {name!r} is not in the plan: choose from {', '.join(suites)}")
    if command.steps < 1:
        raise ValueError(f"steps = {command.steps} must be at least 1")
    with jax.enable_x64(True):
        return report.anatomy(suites[name].build(), command.steps)


def _run_relax(command: Relax) -> None:
    _check(command)
    out = command.out or command.file.with_name(f"{command.file.stem}-relaxed")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {out} is a file, expected a folder")
    with jax.enable_x64(command.x64):
        problem = read_graph(command.file, command.nodes)
        outcome = _relaxed(command, problem)
    _write_all(out, problem, outcome)
    print(outcome.summary)
    print(f"\nwritten to {out}/: {', '.join(sorted(path.name for path in _outputs(out)))}")


def _check(command: Relax) -> None:
    if command.steps < 0:
        raise ValueError(f"steps = {command.steps} must not be negative")
    if not command.tol >= 0:
        raise ValueError(f"tol = {command.tol} must be at least 0")
    if not command.lower <= command.upper:
        raise ValueError(f"lower = {command.lower} must not exceed upper = {command.upper}")
    check_fraction("momentum", command.momentum)
    if command.learning_rate is not None:
        check_positive("learning_rate", command.learning_rate)
        if command.method in ("default", "lbfgs"):
            raise ValueError(f"learning_rate: method {command.method} has none")


class _Outcome(NamedTuple):
    x: np.ndarray
    table: telemetry.Table
    facts: dict[str, Any]

    @property
    def summary(self) -> telemetry.Table:
        shown = {name: _shown(value) for name, value in self.facts.items() if value is not None}
        return telemetry.Table(
            {"quantity": np.array(list(shown)), "value": np.array(list(shown.values()))}
        )


def _sinks(command: Relax) -> list[Sink]:
    sinks: list[Sink] = [WarningSink(), *map(open_sink, command.live)]
    if command.log:
        logger = logging.getLogger("smallgain_jax")
        logging.basicConfig(format="smallgain: %(message)s")
        logger.setLevel(logging.INFO)
        sinks.append(LoggingSink(logger))
    return sinks


def _shown(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _relaxed(command: Relax, problem: GraphFile) -> _Outcome:
    graph = problem.graph
    bounds = (command.lower, command.upper)
    start = _start(graph, bounds) if problem.x0 is None else problem.x0
    start = jnp.clip(start, *bounds)
    bound = _bound(graph, start)
    rate = command.learning_rate or (1 / bound if bound > 0 else 1.0)
    optimizer = _OPTIMIZERS[command.method](graph, rate, command.momentum)
    result = relax_in_chunks(
        graph,
        start,
        optimizer,
        command.steps,
        bounds,
        tol=command.tol,
        record=telemetry.family_record(graph, command.rows),
        progress=progress_bar(command.steps),
        sinks=_sinks(command),
    )
    table = telemetry.table(graph, result, rows=command.rows)
    facts: dict[str, Any] = {
        "file": str(command.file),
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "method": command.method,
        "learning_rate": None if command.method in ("default", "lbfgs") else rate,
        "precision": str(result.x.dtype),
        "bounds": bounds,
        "tol": command.tol,
        "start_energy": float(result.energy[0]),
        "final_energy": float(result.energy[-1]),
        "steps": int(result.info.steps),
        "converged": bool(result.info.converged),
        "optimality": float(result.info.optimality),
        "curvature_bound": _bound(graph, result.x),
        "backtracks": None,
    }
    if "total_backtracks" in table.columns:
        facts["backtracks"] = int(table["total_backtracks"][-1]) if table.num_rows else 0
    return _Outcome(np.asarray(result.x), table, facts)


def _start(graph: EnergyGraph, bounds: tuple[float, float]) -> jax.Array:
    middle = sum(bounds) / 2
    return jnp.full(graph.num_nodes, middle if math.isfinite(middle) else 0.0)


def _bound(graph: EnergyGraph, x: jax.Array) -> float:
    return float(eqx.filter_jit(EnergyGraph.curvature)(graph, x).lipschitz)


_Optimizer: TypeAlias = optax.GradientTransformation | None
_OPTIMIZERS: dict[str, Callable[[EnergyGraph, float, float], _Optimizer]] = {
    "default": lambda graph, rate, momentum: None,
    "sgd": lambda graph, rate, momentum: optax.sgd(rate),
    "momentum": lambda graph, rate, momentum: optax.sgd(rate, momentum),
    "lbfgs": lambda graph, rate, momentum: optax.lbfgs(),
    "small_gain": lambda graph, rate, momentum: small_gain(optax.sgd(rate), graph),
    "gradnorm": lambda graph, rate, momentum: gradnorm(optax.sgd(rate), graph),
    "auto_cap": lambda graph, rate, momentum: auto_cap(optax.sgd(rate), graph),
}


def progress_bar(total: int, width: int = 30) -> Callable[[int, float], None]:
    """A bar on standard error, redrawn in place; silent unless it is a terminal.

    Args:
      total: number of steps.
      width: of the bar, in characters.

    Returns:
      A function of the steps made and the energy, as `relax_in_chunks` calls it.
    """
    stream = sys.stderr
    if not stream.isatty():
        return lambda made, energy: None

    def draw(made: int, energy: float) -> None:
        full = round(width * made / max(total, 1))
        note = "compiling" if math.isnan(energy) and not made else f"energy {energy:.6g}"
        bar = "#" * full + "." * (width - full)
        end = "\n" if made >= total else ""
        stream.write(f"\r\x1b[K[{bar}] {made}/{total} steps, {note}{end}")
        stream.flush()

    return draw


def _outputs(out: Path) -> list[Path]:
    return [out / name for name in ("state.csv", "telemetry.csv", "summary.json", "summary.txt")]


def _write_all(out: Path, problem: GraphFile, outcome: _Outcome) -> None:
    """Write every file beside its place, then move them there: all of them or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        state, table, facts, text = _outputs(staging)
        write_state(state, outcome.x, problem.labels)
        outcome.table.write(table)
        facts.write_bytes(msgspec.json.format(msgspec.json.encode(outcome.facts), indent=2) + b"\n")
        text.write_text(f"{outcome.summary}\n", encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in _outputs(staging):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
