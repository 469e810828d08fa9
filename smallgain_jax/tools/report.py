"""Reports of plans and sweeps: CSV, Markdown, and HTML that opens from disk without a network."""

import base64
import html
import io
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from smallgain_jax.graphs.relaxation import relax
from smallgain_jax.limits.closed_forms import gradient_descent_limit
from smallgain_jax.tools import plots, telemetry, training
from smallgain_jax.tools.io import write_atomic
from smallgain_jax.tools.scenarios import Scenario
from smallgain_jax.tools.suites import true_minimum
from smallgain_jax.tools.sweep import SweepResult
from smallgain_jax.tools.tables import PathLike
from smallgain_jax.tools.telemetry import Table
from smallgain_jax.tools.validation import BASELINES, OURS, PlanResult, claims, start_bound
from smallgain_jax.transform import small_gain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN_NODES = 300
"""A larger graph is not drawn: its lines would be a blot."""

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem;"
    "color:#111;background:#fff}table{border-collapse:collapse;font-size:13px;"
    "font-variant-numeric:tabular-nums}th,td{padding:.2rem .6rem;border-bottom:1px solid #ddd;"
    "text-align:right;white-space:nowrap}th{white-space:normal;vertical-align:bottom}"
    "th{border-bottom:2px solid #444}tbody tr:nth-child(even){background:#f6f6f6}"
    "img{max-width:100%}.wide{overflow-x:auto}nav a{margin-right:1rem}"
)

_NOTES = (
    "Energies and gaps are those of the reference objective F(x; 1). delta_f90 counts updates "
    "until 90 % of the drop to the true minimum is made, the same threshold for every method; "
    "delta_f90_own is the original's count, to the method's own lowest F(x; w). Every method with "
    "a learning rate is shown at its own best of one grid. margin is 2/L less the step. diverged "
    "counts runs, over all learning rates, that ended above their start. A - means never, or that "
    "the method has none. Run times do not repeat; everything else does, bitwise, in one "
    "environment."
)


def about() -> Table:
    """Versions and device that figures depend on.

    >>> about()["what"].tolist()[:2]
    ['smallgain_jax', 'jax']
    """
    facts = {name: version(name) for name in ("smallgain_jax", "jax", "optax", "numpy", "scipy")}
    facts |= {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    return Table({"what": np.array(list(facts)), "which": np.array(list(facts.values()))})


def anatomy(
    problem: Scenario, steps: int = 60, learning_rate: float | None = None
) -> dict[str, "Figure"]:
    """Figures of one run of `small_gain` over SGD: where the stability margin goes.

    Args:
      problem: what to relax.
      steps: updates.
      learning_rate: of SGD; 1/L at the start when not given.

    Returns:
      Figures by name: energy, budget, margin, allocation by family and by edge, margins by row,
      shares, score against cost, and the graph where it has at most `DRAWN_NODES` nodes.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: JAX runs in single precision.
    """
    graph = problem.graph
    rate = learning_rate or 1 / max(start_bound(problem), 1e-12)
    optimizer = small_gain(optax.sgd(rate), graph, limit=gradient_descent_limit(rate))
    result = relax(graph, problem.x0, optimizer, steps, record=telemetry.record)
    table = telemetry.table(graph, result, rows=True)
    history = jax.tree.map(np.asarray, result.info.history)
    energies = {"small_gain over SGD": np.asarray(result.energy)}
    scores, cost, of = history.scores[0], history.info.cost[0], graph.family_index
    drawn = {
        "energy": plots.energy(energies, true_minimum(problem)),
        "margin": plots.margin(table),
        "budget": plots.budget(table),
        "allocation-by-family": plots.allocation_by_family(table),
        "allocation-by-edge": plots.allocation_by_edge(history.weights, of, graph.keys),
        "margins-by-row": plots.row_margins(table),
        "shares": plots.shares(table),
        "score-cost": plots.score_cost(scores, cost, of, graph.keys),
    }
    # weights return to the reference in time: the first few updates move them
    early = min(2, steps - 1)
    if graph.num_nodes <= DRAWN_NODES:
        drawn["graph"] = plots.network(
            graph, history.weights[early], history.info.margin_rows[early]
        )
    figures = {}
    for name, axes in drawn.items():
        when = f", update {early + 1}" if name == "graph" else ""
        axes.set_title(f"{problem.name}, learning rate {rate:.3g}{when}", fontsize="medium")
        figures[name] = plots.figure_of(axes)
    return figures


_FROM_COLUMNS: dict[str, tuple[str, Callable[[Table], Any]]] = {
    "margin": ("margin:global", plots.margin),
    "budget": ("spent:row:", plots.budget),
    "allocation-by-family": ("alloc:coup:", plots.allocation_by_family),
    "margins-by-row": ("margin:row:", plots.row_margins),
    "shares": ("share:", plots.shares),
}


def figures_of(table: Table) -> "dict[str, Figure]":
    """Every figure that the columns of a telemetry table allow.

    Args:
      table: as `telemetry.table` or `training.table` makes it, or read back from its file.

    Returns:
      Figures by name.

    Raises:
      ValueError: no column of telemetry at all.
      ImportError: matplotlib is missing.

    >>> list(figures_of(Table({"step": np.arange(2), "energy:reference": np.array([1.0, 0.5])})))
    ['energy']
    """
    if {"step", "loss:total"} <= table.columns.keys():
        return {"training": training.figure(table)}
    if not {"step", "energy:reference"} <= table.columns.keys():
        raise ValueError(
            "table has no column step, or neither energy:reference nor loss:total: it is no "
            "telemetry of `smallgain relax` or of sg.training"
        )
    # the energy itself: a table does not know the minimum, and a gap to the run's own lowest energy
    # makes every run look converged
    shown = {"energy": plots.metric(table, "energy:reference")}
    for name, (prefix, draw) in _FROM_COLUMNS.items():
        found = sum(column.startswith(prefix) for column in table.columns)
        # one family alone has the whole cost, always
        if found > (1 if name == "shares" else 0):
            shown[name] = draw(table)
    return {name: plots.figure_of(axes) for name, axes in shown.items()}


def write_figures(figures: "Mapping[str, Figure]", directory: PathLike) -> list[Path]:
    """Write each figure as `<name>.png`.

    Args:
      figures: by name.
      directory: where to write; made where it is missing.

    Returns:
      The files written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_bytes(folder / f"{name}.png", _png(fig)) for name, fig in figures.items()]


def _write_bytes(path: Path, content: bytes) -> Path:
    write_atomic(path, lambda temporary: temporary.write_bytes(content))
    return path


def write_tables(result: PlanResult, directory: PathLike) -> list[Path]:
    """Write `numbers.csv`, `times.csv` and `claims.csv` of a plan, or of as much as has run.

    Args:
      result: of `run_plan`, or what it hands to its `checkpoint`.
      directory: where to write; made where it is missing.

    Returns:
      The files written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"numbers": result.numbers, "times": result.times, "claims": claims(result)}
    for name, table in tables.items():
        table.write(folder / f"{name}.csv")
    return [folder / f"{name}.csv" for name in tables]


def write_plan(result: PlanResult, directory: PathLike) -> list[Path]:
    """Write what a plan found.

    `numbers.csv` holds what repeats bitwise, `times.csv` what does not, `claims.csv` what follows
    from both; `report.md` and `report.html` show all of it, with an energy plot for every suite.

    Args:
      result: of `run_plan`.
      directory: where to write; made where it is missing.

    Returns:
      The files written.

    Raises:
      ImportError: matplotlib is missing.
    """
    told = claims(result)
    figures: dict[str, Figure] = {}
    compared = (*BASELINES, *OURS)
    for suite, curves in result.curves.items():
        shown = {name: curve for name, curve in curves.items() if name in compared} or curves
        axes = plots.energy(shown, result.minima[suite])
        axes.set_title(suite, fontsize="medium")
        figures[f"energy-{suite}"] = plots.figure_of(axes)
        axes.legend(fontsize="small", framealpha=0.9, handlelength=4)
    sections: dict[str, Any] = {"Claims": told} if told.num_rows else {}
    for suite in result.curves:
        rows = result.numbers["suite"] == suite
        size = f"{result.numbers['nodes'][rows][0]} nodes, {result.numbers['edges'][rows][0]} edges"
        heading = f"{suite} ({size}, minimum {result.minima[suite]:.12g})"
        left_out = ("suite", "nodes", "edges")
        sections[heading] = [
            _part(result.numbers, rows, left_out),
            f"energy-{suite}",
            _part(result.times, rows, left_out),
        ]
    tables = write_tables(result, directory)
    return tables + _write(directory, "Validation of smallgain_jax", sections, figures, {})


def write_sweep(result: SweepResult, directory: PathLike) -> list[Path]:
    """Write what a sweep found: `designs.csv`, `summary.csv`, `report.md` and `report.html`.

    Args:
      result: of `run_sweep`.
      directory: where to write; made where it is missing.

    Returns:
      The files written.

    Raises:
      ImportError: matplotlib is missing.
    """
    table = result.table
    axes = plots.pareto(table["delta_f90"], table["gap"], table["suite"].tolist())
    sections: dict[str, Any] = {
        "Best designs": result.summary,
        "Pareto front": "pareto",
        f"All designs, by {result.sweep.sort_by}": table,
    }
    tables = {"designs": table, "summary": result.summary}
    return _write(
        directory, "Sweep of small_gain", sections, {"pareto": plots.figure_of(axes)}, tables
    )


def _part(table: Table, rows: np.ndarray, left_out: tuple[str, ...]) -> Table:
    columns = {name: values[rows] for name, values in table.columns.items() if name not in left_out}
    return Table(columns)


def _write(
    directory: PathLike,
    title: str,
    sections: Mapping[str, Any],
    figures: "Mapping[str, Figure]",
    tables: Mapping[str, Table],
) -> list[Path]:
    """Tables and figures as files; a section is a table, a figure's name, or a list of them."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: _png(figure) for name, figure in figures.items()}
    written = []
    for name, table in tables.items():
        table.write(folder / f"{name}.csv")
        written.append(folder / f"{name}.csv")
    full = {**sections, "Environment": about()}
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    files["report.md"] = _markdown(title, full).encode()
    files["report.html"] = _html(title, full, pictures).encode()
    return written + [_write_bytes(folder / name, content) for name, content in files.items()]


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    # without the writer's name and version: the same picture is the same file
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _markdown(title: str, sections: Mapping[str, Any]) -> str:
    parts = [f"# {title}", _NOTES]
    for heading, content in sections.items():
        parts.append(f"## {heading}")
        parts += [
            item.markdown() if isinstance(item, Table) else f"![{item}]({item}.png)"
            for item in _listed(content)
        ]
    return "\n\n".join(parts) + "\n"


def _html(title: str, sections: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    def shown(item: Any) -> str:
        if isinstance(item, Table):
            return f'<div class="wide">{item.html()}</div>'
        data = base64.b64encode(pictures[item]).decode("ascii")
        return f'<p><img alt="{html.escape(item)}" src="data:image/png;base64,{data}"></p>'

    names = [html.escape(heading) for heading in sections]
    links = "".join(f'<a href="#s{k}">{name}</a>' for k, name in enumerate(names))
    body = "".join(
        f'<h2 id="s{k}">{name}</h2>{"".join(map(shown, _listed(content)))}'
        for k, (name, content) in enumerate(zip(names, sections.values(), strict=True))
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(_NOTES)}</p><nav>{links}</nav>{body}"
        "</body></html>\n"
    )
