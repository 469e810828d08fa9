"""The command line: `smallgain demo`, `relax FILE`, `bench`, `sweep` and `plot SOURCE`."""

import csv
import difflib
import importlib.metadata
import logging
import math
import re
import shutil
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import tyro

from smallgain_jax._checks import check_fraction, check_positive
from smallgain_jax.graphs.conditioning import graph_tolerance
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.local import Landau
from smallgain_jax.search.stopping import RelaxStatus
from smallgain_jax.tools import demo, plots, report, telemetry, validation
from smallgain_jax.tools.io import GraphFile, read_columns, read_graph, write_state
from smallgain_jax.tools.live import LoggingSink, Sink, WarningSink, open_sink, relax_in_chunks
from smallgain_jax.tools.sweep import Sweep, run_sweep
from smallgain_jax.tools.tables import FileFormatError, refuse_folder, suffix_of
from smallgain_jax.tools.validation import Plan, run_plan
from smallgain_jax.transform import auto_cap, gradnorm, small_gain

Method: TypeAlias = Literal[
    "default", "sgd", "momentum", "lbfgs", "small_gain", "gradnorm", "auto_cap"
]

TOLERANCE = 1e-8
"""Share of the box's width by which a state may be off, unless told."""

Symmetrize: TypeAlias = Literal["mean", "sum", "max", "none"]

_Config = TypeVar("_Config", bound=msgspec.Struct)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a TOML file given by --config may say, by these names; flags override it."""

    nodes: Path | None = None
    source: str | None = None
    target: str | None = None
    weight: str | None = None
    node: str | None = None
    symmetrize: Symmetrize | None = None
    method: Method = "default"
    steps: int = 200
    tol: float | None = None
    lower: float = 0.0
    upper: float = 1.0
    learning_rate: float | None = None
    momentum: float | None = None
    x64: bool = True
    rows: bool = False
    margin_threshold: float = 0.0
    live: tuple[Path, ...] = ()
    log: bool = False
    out: Path | None = None


class Relax(Settings, frozen=True, kw_only=True):
    """Relax the energy graph of a file.

    An edge table (.csv, .tsv, .txt, .parquet, .npz) has the columns source and target and, as
    needed, weight, family and the parameters of the families:

      quadratic            weight (x_i - x_j)^2
      directed_hinge       weight max(0, x_j - x_i)^2
      asymmetric_hinge     weight max(0, beta_j x_j - alpha_i x_i)^2
      gate_benefit         -weight delta x_i
      damped_gate_benefit  the same, damped by delta, damping, eta_power, positive_scale and
                           negative_scale

    with i the source and j the target, quadratic and weight 1 where nothing is said. .graphml has
    the same as attributes; .mtx and scipy.sparse.save_npz are matrices of weights. Text tables may
    be compressed (.gz, .bz2, .xz), and comma, semicolon, tab, bar or white space part their cells.
    A missing value (blank, NaN, NA, null) means the default.

    Writes state.csv, telemetry.csv, summary.json and summary.txt, all of them or none. The exit
    code is 1 where the energy at the end is higher than at the start, or not finite.

    Attributes:
      file: the graph.
      nodes: node table: node and, as needed, a, b and target of the energy a (x - target)^2 +
        b (x - target)^4, and start. Each is 0 where it is not given, but a is 1 where a target is
        and no column a or b. Without a start the state starts in the middle of the box.
      source: name of the edge table's column of that kind, where it is none of the usual.
      target: the same.
      weight: the same.
      node: name of the node table's column of that kind.
      symmetrize: make one edge of the two entries of a matrix's pair; "none" keeps both as edges.
      method: "default" is majorized descent, the library's best.
      steps: number of updates at most.
      tol: stop once no coordinate is drawn farther than this share of the box's width; 1e-8 unless
        told, and less where edges are so stiff that this would prove nothing.
      lower: lower bound of every coordinate; -inf for none.
      upper: upper bound of every coordinate; inf for none.
      learning_rate: of sgd, momentum and the methods that wrap sgd; 1 over the certified bound on
        the curvature at the start when not given.
      momentum: coefficient of the method of that name; 0.9 when not given.
      x64: double precision.
      rows: also write to the telemetry how much of its stability limit each node has left, and
        what was spent there: two columns a node.
      margin_threshold: margin_warn in the telemetry is 1 where the smallest margin is below it.
      live: telemetry to write while it runs: .csv, .jsonl, .parquet (a folder of parts); anything
        else is a folder for TensorBoard.
      log: a line of telemetry on standard error for every twentieth of the steps.
      out: folder to write to; FILE's name and "-relaxed" when not given.
      config: TOML file of these settings; flags override it.
    """

    file: tyro.conf.Positional[Path]
    config: Path | None = None


class Demo(msgspec.Struct, frozen=True, kw_only=True):
    """Relax two small graphs by every method; write tables and a figure.

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
    """Draw a run's energy, its result, and where the method has them, margins; write PNG files.

    Attributes:
      source: the folder that `smallgain relax` wrote; telemetry of it or of sg.training.log (.csv,
        .parquet, .npz, .jsonl, a folder of Parquet parts), from which every figure is drawn that
        its columns allow (margins and weights those of --method small_gain, with --rows each
        node's); or the TOML file of a plan, of which small_gain relaxes one suite for all figures.
      out: folder to write to.
      suite: name of the plan's suite; its first when not given.
      steps: updates, for a plan.
      metric: draw these columns of the telemetry only, each in a file of its name.
      smooth: draw the mean of the last so many values over each metric.
    """

    source: tyro.conf.Positional[Path]
    out: Path = Path("smallgain-plots")
    metric: tuple[str, ...] = ()
    smooth: int = 1
    suite: str | None = None
    steps: int = 60


Command: TypeAlias = Relax | Demo | Bench | SweepOver | Plot

_COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "relax": Relax,
    "bench": Bench,
    "sweep": SweepOver,
    "plot": Plot,
}
_HELP = """usage: smallgain COMMAND ...

Relax graphs from files, compare methods of minimizing, and draw what runs recorded.

commands:
{commands}

`smallgain COMMAND --help` lists the options of a command; `smallgain --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; None takes the process's own.

    Returns:
      The exit code: 0; 1 where a relaxation ended higher than it began or is not finite; 2 after a
      message on standard error that says what was wrong; 130 when interrupted.

    >>> main(["relax", "missing.csv"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"smallgain {_version()}")
        return 0
    if name in ("--help", "-h"):
        print(_help(), end="")
        return 0
    if name not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        return _complain(f"{name!r} is no command: choose from {known} (see smallgain --help)")
    try:
        return _run(_parse(name, arguments[1:]))
    except SystemExit as stop:
        # the parser has shown its help, or what it does not understand
        return int(stop.code or 0)
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (FileFormatError, ImportError) as error:
        return _complain(str(error))
    except ValueError as error:
        return _complain(f"{error} (see smallgain {name} --help)")
    except KeyboardInterrupt:
        _complain("interrupted, nothing was written")
        return 130


def _run(command: Command) -> int:
    if isinstance(command, Relax):
        return _run_relax(command)
    if isinstance(command, Demo):
        _run_demo(command)
    elif isinstance(command, Bench):
        _run_bench(command)
    elif isinstance(command, SweepOver):
        _run_sweep(command)
    else:
        _run_plot(command)
    return 0


def _help() -> str:
    abouts = {name: str(kind.__doc__).splitlines()[0] for name, kind in _COMMANDS.items()}
    return _HELP.format(commands="\n".join(f"  {n:<6} {about}" for n, about in abouts.items()))


def _complain(problem: str) -> int:
    print(f"smallgain: error: {' '.join(problem.split())}", file=sys.stderr)
    return 2


def _version() -> str:
    try:
        return importlib.metadata.version("smallgain_jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _parse(name: str, arguments: list[str]) -> Command:
    _refuse_twice(name, arguments)
    command = _parsed(name, arguments, Settings())
    if isinstance(command, Relax) and command.config is not None:
        # once more, with the file's settings as the defaults that flags override
        command = _parsed(name, arguments, _decoded(command.config, Settings))
    return command


def _refuse_twice(name: str, arguments: list[str]) -> None:
    """An option of several values takes them all at once: the last would win without a word."""
    for field in msgspec.structs.fields(_COMMANDS[name]):
        flag = f"--{field.encode_name}"
        given = [argument for argument in arguments if argument.partition("=")[0] == flag]
        if len(given) > 1 and typing.get_origin(field.type) is tuple:
            raise ValueError(f"{flag} is given {len(given)} times: put all values after one {flag}")


def _parsed(name: str, arguments: list[str], settings: Settings) -> Command:
    kind: Any = _COMMANDS[name]
    default: Any = tyro.MISSING_NONPROP
    if kind is Relax:
        # a positional that is missing stays missing: the parser asks for it
        default = Relax(file=tyro.MISSING, **msgspec.structs.asdict(settings))
    command: Command = tyro.cli(kind, args=arguments, prog=f"smallgain {name}", default=default)
    return command


def _decoded(path: Path, kind: type[_Config]) -> _Config:
    """A TOML file as one of the typed configurations."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind, dec_hook=_decode_path)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"{path}: {_explained(str(error), kind)}") from error


_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
"""What msgspec calls a type, in words of TOML."""


def _explained(problem: str, kind: type[msgspec.Struct]) -> str:
    """msgspec's message with the key in front: `steps: expected an integer, got text`."""
    said, _, where = problem.partition(" - at `$.")
    said = said.replace("Object contains unknown field", "unknown key").replace(" | null", "")
    for name, words in _KINDS.items():
        said = said.replace(f"`{name}`", words)
    key = f"{where.rstrip('`')}: " if where else ""
    return f"{key}{said[:1].lower()}{said[1:]}{_known_keys(problem, kind)}"


def _known_keys(problem: str, kind: type[msgspec.Struct]) -> str:
    """What may stand where msgspec found an unknown key; it says where as `$.suites[0]`."""
    if not problem.startswith("Object contains unknown field"):
        return ""
    at: Any = msgspec.inspect.type_info(kind)
    where = problem.partition("`$.")[2].rstrip("`")
    for part in re.findall(r"[^.\[\]]+", re.sub(r"\[[^\]]*\]", "", where)):
        at = next(field.type for field in at.fields if field.encode_name == part)
        while not isinstance(at, msgspec.inspect.StructType):
            # a list or a tuple of tables
            at = at.item_type
    known = [field.encode_name for field in at.fields]
    near = difflib.get_close_matches(problem.split("`")[1], known, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{guess}: known are {', '.join(known)}"


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
    planned = command.source.suffix.lower() == ".toml"
    if planned and command.metric:
        raise ValueError("metric: a plan has no telemetry yet, give its telemetry.csv")
    if command.suite is not None and not planned:
        raise ValueError("suite: only a plan has suites, give its TOML file")
    if command.smooth != 1 and not command.metric:
        raise ValueError("smooth: there is no metric to smooth, name one with --metric")
    if planned:
        figures = _anatomy_of(command)
    else:
        table = _telemetry_of(command.source)
        figures = _metrics(table, command) if command.metric else report.figures_of(table)
        if not command.metric and (command.source / "state.csv").is_file():
            figures["state"] = _state_of(command.source / "state.csv")
    command.out.mkdir(parents=True, exist_ok=True)
    written = report.write_figures(figures, command.out)
    print("written: " + ", ".join(map(str, written)))


def _state_of(path: Path) -> Any:
    """The values of the nodes, of a vector its first coordinate."""
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    axes = plots.state([row[0] for row in rows], np.array([float(row[1]) for row in rows]))
    return plots.figure_of(axes)


def _telemetry_of(source: Path) -> telemetry.Table:
    try:
        return telemetry.Table(read_columns(source))
    except FileFormatError as error:
        raise ValueError(
            f"{error}: this is no telemetry; plot takes the folder that relax wrote, its "
            "telemetry.csv, or a file of sg.training.log"
        ) from error


def _metrics(table: telemetry.Table, command: Plot) -> dict[str, Any]:
    return {
        re.sub(r"\W+", "-", name): plots.figure_of(plots.metric(table, name, command.smooth))
        for name in command.metric
    }


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


def _run_relax(command: Relax) -> int:
    _check(command)
    refuse_folder(command.file)
    out = command.out or command.file.with_name(f"{_stem(command.file)}-relaxed")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out = {out} is a file, expected a folder")
    _refuse_to_overwrite(command, out)
    with jax.enable_x64(command.x64):
        began = time.perf_counter()
        problem = read_graph(
            command.file,
            command.nodes,
            source=command.source,
            target=command.target,
            weight=command.weight,
            node=command.node,
            symmetrize=False if command.symmetrize == "none" else command.symmetrize,
        )
        reading = time.perf_counter() - began
        outcome = _relaxed(command, problem, reading)
    _write_all(out, problem, outcome)
    print(outcome.summary)
    print(f"\nwritten to {out}/: {', '.join(sorted(path.name for path in _outputs(out)))}")
    for note in outcome.facts["notes"]:
        print(f"smallgain: note: {note}", file=sys.stderr)
    return int(_rose(outcome.facts) or _overflowed(outcome.facts))


def _rose(facts: dict[str, Any]) -> bool:
    start = facts["start_energy"]
    return math.isfinite(start) and not facts["final_energy"] <= start


def _overflowed(facts: dict[str, Any]) -> bool:
    told = (facts["start_energy"], facts["final_energy"], facts["optimality"])
    return facts["status"] == _NOT_FINITE or not all(map(math.isfinite, told))


def _refuse_to_overwrite(command: Relax, out: Path) -> None:
    """Nothing may be written over what is read."""
    read = {"the graph": command.file, "the node table": command.nodes, "config": command.config}
    for what, path in read.items():
        for written in () if path is None else (*command.live, *_outputs(out)):
            if path is not None and path.resolve() == written.resolve():
                raise ValueError(f"{written} is {what}: it would be overwritten")


def _stem(path: Path) -> str:
    return path.name[: path.name.lower().rindex(suffix_of(path))] if suffix_of(path) else path.stem


def _check(command: Relax) -> None:
    if command.steps < 0:
        raise ValueError(f"steps = {command.steps} must not be negative")
    if command.tol is not None and not command.tol >= 0:
        raise ValueError(f"tol = {command.tol} must be at least 0")
    if not command.lower <= command.upper:
        raise ValueError(f"lower = {command.lower} must not exceed upper = {command.upper}")
    for name, end in (("lower", math.inf), ("upper", -math.inf)):
        if getattr(command, name) == end:
            raise ValueError(f"{name} = {end} leaves no number between the bounds")
    if command.momentum is not None:
        check_fraction("momentum", command.momentum)
        if command.momentum == 1:
            raise ValueError("momentum = 1.0 must be below 1: nothing would ever come to rest")
        if command.method != "momentum":
            raise ValueError(f"momentum: method {command.method} has none")
    _check_files(command)
    if command.learning_rate is not None:
        check_positive("learning_rate", command.learning_rate)
        if command.method in ("default", "lbfgs"):
            raise ValueError(f"learning_rate: method {command.method} has none")


def _check_files(command: Relax) -> None:
    """What the file that is given has no use for would be lost without a word."""
    suffix = suffix_of(command.file)
    if command.symmetrize is not None and suffix not in (".mtx", ".npz"):
        raise ValueError("symmetrize: only a matrix has two entries for a pair (.mtx, .npz)")
    if command.node is not None and command.nodes is None:
        raise ValueError("node: there is no node table, give one with --nodes")
    if suffix in (".mtx", ".graphml"):
        for name in ("source", "target"):
            if getattr(command, name) is not None:
                raise ValueError(f"{name}: a {suffix} file has no such column")


_NOT_FINITE = RelaxStatus.NOT_FINITE.name.lower()


class _Outcome(NamedTuple):
    x: np.ndarray
    table: telemetry.Table
    facts: dict[str, Any]

    @property
    def summary(self) -> telemetry.Table:
        told = {k: v for k, v in self.facts.items() if v is not None and k != "notes"}
        shown = {name: _shown(value) for name, value in told.items()}
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


def _relaxed(command: Relax, problem: GraphFile, reading: float) -> _Outcome:
    graph = problem.graph
    bounds = (command.lower, command.upper)
    given = _start(graph, bounds) if problem.x0 is None else problem.x0
    start = jnp.clip(given, *bounds)
    bound = _bound(graph, start)
    rate = command.learning_rate or (1 / bound if bound > 0 else 1.0)
    momentum = 0.9 if command.momentum is None else command.momentum
    optimizer = _OPTIMIZERS[command.method](graph, rate, momentum)
    tol = command.tol
    if tol is None:
        tol = float(graph_tolerance(graph, start, TOLERANCE))
    began = time.perf_counter()
    result = relax_in_chunks(
        graph,
        start,
        optimizer,
        command.steps,
        bounds,
        tol=tol,
        record=telemetry.family_record(graph, command.rows),
        progress=progress_bar(command.steps),
        sinks=_sinks(command),
        margin_threshold=command.margin_threshold,
    )
    relaxing = time.perf_counter() - began
    table = telemetry.table(
        graph, result, rows=command.rows, margin_threshold=command.margin_threshold
    )
    facts: dict[str, Any] = {
        "file": str(command.file),
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "method": command.method,
        "learning_rate": None if command.method in ("default", "lbfgs") else rate,
        "precision": str(result.x.dtype),
        "bounds": bounds,
        "tol": tol,
        "start_energy": float(result.energy[0]),
        "final_energy": float(result.energy[-1]),
        "steps": int(result.info.steps),
        "converged": bool(result.info.converged),
        "status": RelaxStatus(int(result.info.status)).name.lower(),
        "optimality": float(result.info.optimality),
        "curvature_bound": _bound(graph, result.x),
        "backtracks": None,
        "reading_seconds": round(reading, 3),
        "relaxing_seconds": round(relaxing, 3),
    }
    if "total_backtracks" in table.columns:
        facts["backtracks"] = int(table["total_backtracks"][-1])
    clipped = _clipped(problem, np.asarray(given), np.asarray(start), bounds)
    clipped += _drawn_out(graph, bounds)
    facts["notes"] = [*problem.notes, *clipped, *_surprises(command, problem, table, facts)]
    return _Outcome(np.asarray(result.x), table, facts)


def _clipped(
    problem: GraphFile, given: np.ndarray, start: np.ndarray, bounds: tuple[float, float]
) -> list[str]:
    moved = np.flatnonzero(given != start)
    if not moved.size:
        return []
    first = f"{given[moved[0]]:g} of node {problem.labels[moved[0]]!r}"
    box = f"[{bounds[0]:g}, {bounds[1]:g}]"
    return [
        f"start: {moved.size} of {given.size} values lie outside {box} and were moved to its ends, "
        f"such as {first}"
    ]


def _drawn_out(graph: EnergyGraph, bounds: tuple[float, float]) -> list[str]:
    """A note where nodes are drawn to where the box does not let them."""
    targets = [np.ravel(local.target) for local in graph.local if isinstance(local, Landau)]
    every = np.concatenate([*targets, np.zeros(0)])
    outside = every[(every < bounds[0]) | (every > bounds[1])]
    if not outside.size:
        return []
    return [
        f"target: {outside.size} of {every.size} lie outside the box [{bounds[0]:g}, "
        f"{bounds[1]:g}], such as {outside[0]:g}; --lower and --upper set the box"
    ]


def _surprises(
    command: Relax, problem: GraphFile, table: telemetry.Table, facts: dict[str, Any]
) -> list[str]:
    """What came out otherwise than somebody who asked for it may think."""
    notes = []
    if command.margin_threshold and "margin_warn" not in table.columns:
        notes.append(f"margin_threshold: method {command.method} has no margins to warn of")
    if command.rows and not any(name.startswith("margin:row:") for name in table.columns):
        notes.append(f"rows: method {command.method} has no margins by row, none were written")
    if command.steps and facts["converged"] and not facts["steps"]:
        why = (
            "the edges alone hold every node where it is: a node table (--nodes) says what each "
            "node wants, by a, b and target, and where it starts"
            if not problem.graph.local
            else _already_there(command, facts["tol"])
        )
        notes.append(f"nothing to do, no update was made: {why}")
    if _overflowed(facts) and not _rose(facts):
        notes.append(_overflow(facts))
    elif _rose(facts):
        rise = f"from {facts['start_energy']:.6g} to {facts['final_energy']:.6g}"
        advice = ""
        if facts["learning_rate"] is not None:
            bound = facts["curvature_bound"]
            advice = f"; a learning rate of at most {1 / bound:.3g} would descend" if bound else ""
        notes.append(f"the energy rose {rise}{advice}")
    return notes


def _overflow(facts: dict[str, Any]) -> str:
    """What to do about an energy or a gradient that is beyond the precision."""
    wider = "; without --no-x64 there is more room" if facts["precision"] == "float32" else ""
    return (
        f"the energy or its gradient is not finite in {facts['precision']}, and x is no minimum: "
        "divide all weights, a and b by one number, which moves no minimum, or choose nearer "
        f"bounds, start and targets{wider}"
    )


def _already_there(command: Relax, tol: float) -> str:
    width = command.upper - command.lower
    if not math.isfinite(width):
        return "the start is a minimum already"
    return (
        f"the start is a minimum already, to {tol:g} (tol) of the box, which is {width:g} "
        "wide; a bound that is meant for none is written as inf"
    )


def _start(graph: EnergyGraph, bounds: tuple[float, float]) -> jax.Array:
    middle = sum(bounds) / 2
    # not a weak type, which would give way to float32
    return jnp.full(graph.num_nodes, middle if math.isfinite(middle) else 0.0, float)


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
