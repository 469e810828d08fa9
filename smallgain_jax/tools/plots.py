"""Figures of relaxations: energies, budgets, allocations, margins, shares, graphs, sweeps.

Every function takes the axes to draw in, or makes a figure, and returns the axes. Colours are those
of Okabe and Ito or diverging maps without green; lines differ in dashes and markers too.

Matplotlib is imported when a figure is drawn, and pyplot never: figures work without a display and
leave nothing behind in a global list.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.tools.telemetry import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Colours that the usual colour blindnesses keep apart (Okabe and Ito 2008); no yellow on white."""

_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LOWEST_GAP = 1e-16
_MOST_ENTRIES = 400
_NAMED = 60


def energy(
    results: Mapping[str, ArrayLike], minimum: float | None = None, ax: "Axes | None" = None
) -> "Axes":
    r"""Gap of the reference energy against the step, one line a method, on a logarithmic scale.

    The gap is $(F - F^*) / (F_0 - F^*)$, the fraction of the drop that is left; a dotted line marks
    10 %, where 90 % of the drop is made. Gaps below 1e-16 are drawn there.

    Args:
      results: reference energies [steps + 1] by method, as in `RelaxResult.energy`.
      minimum: F*; None takes the lowest energy of all, which flatters its own method, and the axis
        says so.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `results` is empty or an entry is not a vector.
      ImportError: matplotlib is missing.

    >>> axes = energy({"ours": [1.0, 0.1, 0.0], "theirs": [1.0, 0.5, 0.2]}, minimum=0.0)
    >>> axes.get_yscale()
    'log'
    """
    curves = {name: np.asarray(values, np.float64) for name, values in results.items()}
    if not curves:
        raise ValueError("results must hold at least one method")
    for name, values in curves.items():
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"results[{name!r}] has shape {values.shape}, expected [steps + 1]")
    axes = _axes(ax, 6.4, 4.4, "What is left of the descent")
    lowest = min(values.min() for values in curves.values()) if minimum is None else minimum
    styles = zip(cycle(OKABE_ITO), cycle(_LINES), cycle(_MARKERS), strict=False)
    for k, ((name, values), (color, line, marker)) in enumerate(
        zip(curves.items(), styles, strict=False)
    ):
        drop = values[0] - lowest
        gap = (values - lowest) / drop if drop > 0 else np.ones_like(values)
        # markers are staggered: lines that coincide still show both
        every = max(1, values.size // 8)
        axes.semilogy(
            np.arange(values.size),
            np.maximum(gap, _LOWEST_GAP),
            label=name,
            color=color,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            markevery=(k % every, every),
            linewidth=1.5,
        )
    axes.axhline(0.1, color="0.35", linewidth=1, linestyle=":")
    axes.annotate(
        "90 % of the drop",
        (1, 0.1),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="0.25",
        fontsize="small",
    )
    axes.set_xlabel("step (updates)")
    against = "the minimum" if minimum is not None else "the lowest energy seen"
    axes.set_ylabel(f"reference energy gap to {against}\n(fraction of the drop)")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", framealpha=0.9)
    return axes


def metric(table: Table, name: str, smooth: int = 1, ax: "Axes | None" = None) -> "Axes":
    r"""One column of telemetry against the step, as it is or smoothed.

    Args:
      table: of `telemetry.table`, or read back from its file.
      name: of the column, such as "contraction_margin" or "alloc:coup:Quadratic".
      smooth: K of the mean of the last K values, drawn over the values themselves; of as many as
        there are, before K.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `table` has no such column, or `smooth` is below 1.
      ImportError: matplotlib is missing.

    >>> table = Table({"step": np.arange(3), "energy:reference": np.array([4.0, 2.0, 0.0])})
    >>> metric(table, "energy:reference", smooth=2).get_lines()[1].get_ydata().tolist()
    [4.0, 3.0, 1.0]
    """
    for needed in ("step", name):
        if needed not in table.columns:
            there = ", ".join(column for column in table.columns if column != "step")
            raise ValueError(f"metric: table has no column {needed!r}: choose from {there}")
    if smooth < 1:
        raise ValueError(f"smooth = {smooth} must be at least 1")
    known = ~np.isnan(table[name].astype(np.float64))
    step, values = table["step"][known], table[name][known].astype(np.float64)
    axes = _axes(ax, 6.4, 3.6, _TITLES.get(name, ""))
    every = max(1, step.size // 10)
    style: dict[str, Any] = {"marker": "o", "markevery": every, "markersize": 4.5}
    if smooth > 1:
        axes.plot(step, values, label="value", color="0.7", linewidth=1)
        values = _trailing_mean(values, smooth)
        style["label"] = f"mean of the last {smooth}"
    axes.plot(step, values, color=OKABE_ITO[0], **style)
    axes.locator_params(axis="x", integer=True)
    return _finish(axes, name, legend=smooth > 1)


_TITLES = {
    "energy:reference": "Energy as it was given",
    "energy:adapted": "Energy under the weights",
    "margin:global": "Margin of the tightest row",
    "spent:global": "Spent by all terms",
    "contraction_margin": "Distance to the stability limit",
}
"""Titles of columns whose names do not say enough."""


def _trailing_mean(values: np.ndarray, size: int) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, values.size + 1)
    start = np.maximum(end - size, 0)
    return (sums[end] - sums[start]) / (end - start)


def margin(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Margin and spend of the tightest row against the step, from telemetry.

    Args:
      table: of `telemetry.table`, recorded from `small_gain` or a baseline.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `table` has no margin: the optimizer knows none.
      ImportError: matplotlib is missing.

    >>> columns = {"step": [0, 1], "margin:global": [2.0, 1.0], "spent:global": [0.0, 0.5]}
    >>> axes = margin(Table({name: np.array(values) for name, values in columns.items()}))
    >>> axes.get_xlabel()
    'step (updates)'
    """
    for name in ("step", "margin:global", "spent:global"):
        if name not in table.columns:
            raise ValueError(f"table has no column {name!r}: only optimizers with weights have it")
    table = _measured(table, "margin:global")
    axes = _axes(ax, 6.4, 3.6, "Margin left, and spent")
    step, left, spent = (table[name] for name in ("step", "margin:global", "spent:global"))
    every = max(1, step.size // 10)
    lines: list[tuple[str, Any, dict[str, Any]]] = [
        ("margin of the tightest row", left, {"color": OKABE_ITO[0], "marker": "o"}),
        ("spent by all terms", spent, {"color": OKABE_ITO[1], "marker": "s", "linestyle": "--"}),
    ]
    for label, values, style in lines:
        axes.plot(step, values, label=label, markevery=every, markersize=4.5, **style)
    over = left < 0
    if over.any():
        axes.fill_between(
            step, left, 0, where=over, color=OKABE_ITO[4], alpha=0.3, label="over the target"
        )
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set_xlabel("step (updates)")
    axes.set_ylabel("curvature (energy per unit of x squared)")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", framealpha=0.9)
    return axes


def budget(table: Table, budget_fraction: float = 0.7, ax: "Axes | None" = None) -> "Axes":
    r"""Budget against spend, summed over the rows, with the margin that the budget is part of.

    The margin is $\sum_r \max(0, T - R_r(w))$ at the weights held, the budget its fraction rho. The
    spend counts from the lower ends $l$ of the weights, whose rows are lower, and may therefore
    exceed the budget drawn here by what lowering the weights to $l$ sets free.

    Args:
      table: of `telemetry.table(..., rows=True)`, recorded from `small_gain`.
      budget_fraction: rho of the optimizer.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `table` has no rows.
      ImportError: matplotlib is missing.

    >>> columns = {"step": [0, 1], "margin:row:0": [2.0, -1.0], "spent:row:0": [0.0, 0.5]}
    >>> axes = budget(Table({name: np.array(values) for name, values in columns.items()}))
    >>> axes.get_lines()[1].get_ydata().tolist()
    [1.4, 0.0]
    """
    table = _measured(table, "margin:row:")
    left = np.maximum(_rows_of(table, "margin:row:"), 0).sum(axis=1)
    spent = _rows_of(table, "spent:row:").sum(axis=1)
    axes = _axes(ax, 6.4, 3.6, "What the rows may spend, and spend")
    step = table["step"]
    every = max(1, step.size // 10)
    lines: list[tuple[str, Any, dict[str, Any]]] = [
        ("margin", left, {"color": OKABE_ITO[0], "marker": "o"}),
        (f"budget, {budget_fraction:g} of it", budget_fraction * left, {"color": OKABE_ITO[2]}),
        ("spent", spent, {"color": OKABE_ITO[1], "marker": "s", "linestyle": "--"}),
    ]
    for label, values, style in lines:
        axes.plot(step, values, label=label, markevery=every, markersize=4.5, **style)
    return _finish(axes, "curvature, summed over rows\n(energy per unit of x squared)")


def allocation_by_family(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Mean weight of each family's terms against the step; 1 is the reference objective.

    Args:
      table: of `telemetry.table`, recorded from an optimizer with weights.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `table` has no weights.
      ImportError: matplotlib is missing.

    >>> table = Table({"step": np.arange(2), "alloc:coup:Quadratic": np.array([1.0, 1.1])})
    >>> allocation_by_family(table).get_ylabel()
    'weight of a term (mean of the family)'
    """
    table = _measured(table, "alloc:coup:")
    axes = _axes(ax, 6.4, 3.6, "Weights by family")
    for (key, values), style in zip(
        _families(table, "alloc:coup:").items(), _styles(), strict=False
    ):
        every = max(1, values.size // 10)
        axes.plot(table["step"], values, label=key, markevery=every, markersize=4.5, **style)
    axes.axhline(1, color="0.35", linewidth=1, linestyle=":")
    return _finish(axes, "weight of a term (mean of the family)")


def allocation_by_edge(
    weights: ArrayLike,
    families: ArrayLike | None = None,
    keys: Sequence[str] = (),
    ax: "Axes | None" = None,
) -> "Axes":
    """Heat map of every term's weight over time; white is the reference, 1.

    More than 400 terms are drawn as means of neighbours.

    Args:
      weights: float [steps, K], as `telemetry.record` keeps them.
      families: position of each term's family, int [K], as `EnergyGraph.family_index`.
      keys: names of the families, as `EnergyGraph.keys`; lines part them.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `weights` is not a matrix, or `families` does not fit it.
      ImportError: matplotlib is missing.

    >>> allocation_by_edge(np.ones((3, 2)), [0, 1], ["Quadratic", "GateBenefit"]).get_ylabel()
    'term, by family'
    """
    values = _matrix("weights", weights)
    axes = _axes(ax, 6.4, 4.0, "Weight of every term")
    reach = max(float(np.max(np.abs(values - 1), initial=0.0)), 1e-3)
    _heat(axes, values, (1 - reach, 1 + reach), "PuOr", "weight (1 is the reference)")
    axes.set_ylabel("term")
    if families is not None:
        of = np.asarray(families)
        if of.shape != (values.shape[1],):
            raise ValueError(f"families has shape {of.shape}, expected ({values.shape[1]},)")
        ends = np.flatnonzero(np.diff(of)) + 1
        for end in ends:
            axes.axhline(end - 0.5, color="black", linewidth=0.8)
        starts = [0, *ends.tolist()]
        middles = [(a + b - 1) / 2 for a, b in pairwise([*starts, of.size])]
        axes.set_yticks(middles, [keys[of[start]] for start in starts])
        axes.set_ylabel("term, by family")
    return axes


def row_margins(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Heat map of every row's margin over time: blue has margin left, red is over its target.

    Args:
      table: of `telemetry.table(..., rows=True)`, recorded from an optimizer with weights.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `table` has no rows.
      ImportError: matplotlib is missing.

    >>> table = Table({"step": np.arange(2), "margin:row:0": np.array([1.0, -1.0])})
    >>> row_margins(table).get_ylabel()
    'row (coordinate of x)'
    """
    values = _rows_of(_measured(table, "margin:row:"), "margin:row:")
    axes = _axes(ax, 6.4, 4.0, "Margin of every row")
    reach = max(float(np.max(np.abs(values), initial=0.0)), 1e-12)
    _heat(axes, values, (-reach, reach), "RdBu", "margin T - R (energy per unit of x squared)")
    axes.set_ylabel("row (coordinate of x)")
    return axes


def shares(table: Table, ax: "Axes | None" = None) -> "Axes":
    """Part of the cost of all terms that each family, or each loss of a model, has over time.

    Args:
      table: with columns `share:<Key>`, as telemetry makes them.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: `table` has no shares.
      ImportError: matplotlib is missing.

    >>> table = Table({"step": np.arange(2), "share:a": np.ones(2)})
    >>> shares(table).get_ylabel()
    'share of the cost of all terms (1)'
    """
    table = _measured(table, "spent:global" if "spent:global" in table.columns else "share:")
    parts = _families(table, "share:")
    axes = _axes(ax, 6.4, 3.6, "Who takes what part of the margin")
    bands = axes.stackplot(
        table["step"],
        np.nan_to_num(np.stack(list(parts.values()))),
        labels=list(parts),
        colors=[color for _, color in zip(parts, cycle(OKABE_ITO), strict=False)],
        edgecolor="white",
        linewidth=0.5,
    )
    # hatches tell the bands apart in black and white
    for band, hatch in zip(bands, cycle(("", "//", "..", "\\\\", "xx"))):
        band.set_hatch(hatch)
    axes.set_xlim(table["step"].min(initial=0), max(table["step"].max(initial=0), 1))
    axes = _finish(axes, "share of the cost of all terms (1)")
    axes.set_ylim(0, 1)
    return axes


def score_cost(
    scores: ArrayLike,
    cost: ArrayLike,
    families: ArrayLike | None = None,
    keys: Sequence[str] = (),
    ax: "Axes | None" = None,
) -> "Axes":
    """Score of every term against its cost: what the allocation ranks, against what it pays.

    Args:
      scores: float [K], of one update.
      cost: float [K], curvature of each term's dearest row; terms without a cost are drawn at the
        left edge.
      families: position of each term's family, int [K].
      keys: names of the families.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: shapes that do not match.
      ImportError: matplotlib is missing.

    >>> score_cost([0.5, 0.1], [2.0, 4.0]).get_xlabel()
    'cost of a term (energy per unit of x squared)'
    """
    y, x = np.asarray(scores, np.float64), np.asarray(cost, np.float64)
    if y.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"cost has shape {x.shape}, expected that of scores, {y.shape}, as [K]")
    of = np.zeros(y.shape, int) if families is None else np.asarray(families)
    axes = _axes(ax, 6.4, 4.0, "What terms are worth, and cost")
    # what is below rounding beside the dearest term is no price: exponents would fill the axis
    x = np.where(x > np.finfo(x.dtype).eps * np.max(x, initial=0.0), x, 0)
    priced = x[x > 0]
    wide = bool(priced.size) and priced.max() > 30 * priced.min()
    lowest = priced.min() / 3 if wide else 0.0
    for family, style in zip(np.unique(of), _styles(), strict=False):
        here = of == family
        style.pop("linestyle")
        label = keys[family] if len(keys) else None
        axes.plot(
            np.maximum(x[here], lowest), y[here], label=label, linestyle="", markersize=5, **style
        )
    if wide:
        axes.set_xscale("log")
    # terms without a cost score by orders of magnitude above the others: linear up to those
    reach = float(np.max(np.abs(y[x > 0]), initial=0.0))
    axes.set_yscale("symlog", linthresh=reach or 1.0, linscale=3)
    axes.axhline(0, color="0.35", linewidth=1)
    axes = _finish(axes, "score (value over cost)", legend=bool(len(keys)))
    axes.set_xlabel("cost of a term (energy per unit of x squared)")
    return axes


def state(labels: Sequence[str], x: ArrayLike, ax: "Axes | None" = None) -> "Axes":
    """The value of every node: a dot beside its name, or a histogram of more than 60 nodes.

    Args:
      labels: names of the nodes, [n].
      x: float [n], their values.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: as many names as values are not given.
      ImportError: matplotlib is missing.

    >>> [tick.get_text() for tick in state(["a", "b"], [0.2, 0.7]).get_yticklabels()]
    ['a', 'b']
    """
    values = np.asarray(x, np.float64)
    if values.shape != (len(labels),):
        raise ValueError(f"x has shape {values.shape}, expected ({len(labels)},), that of labels")
    few = values.size <= _NAMED
    axes = _axes(ax, 6.4, max(2.4, 0.8 + 0.2 * values.size) if few else 3.6, "Values of the nodes")
    if few:
        axes.plot(values, np.arange(values.size), "o", color=OKABE_ITO[0])
        axes.set_yticks(np.arange(values.size), labels)
        axes.invert_yaxis()
    else:
        axes.hist(values[np.isfinite(values)], bins="auto", color=OKABE_ITO[0])
        axes.set_ylabel("nodes")
    axes.set_xlabel("x")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    return axes


def network(
    graph: EnergyGraph,
    weights: ArrayLike | None = None,
    margins: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """The graph, edges coloured by their terms' weights and nodes by their rows' margins.

    Several terms on one pair of nodes are drawn beside each other as arcs.

    Args:
      graph: to draw; up to a few hundred nodes can be read.
      weights: float [K]; None for ones.
      margins: float [n], in curvature; None draws the nodes plain.
      positions: float [n, 2]; None puts the nodes on a circle.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: shapes that do not match the graph.
      ImportError: matplotlib is missing.

    >>> from smallgain_jax.tools.scenarios import dense
    >>> axes = network(dense().graph)
    >>> axes.get_aspect()
    1.0
    """
    n, terms = graph.num_nodes, graph.num_edges
    values = np.ones(terms) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (terms,):
        raise ValueError(f"weights has shape {values.shape}, expected ({terms},)")
    around = 2 * np.pi * np.arange(n) / n
    at = np.stack([np.cos(around), np.sin(around)], axis=1) if positions is None else positions
    at = np.asarray(at, np.float64)
    if at.shape != (n, 2):
        raise ValueError(f"positions has shape {at.shape}, expected ({n}, 2)")
    axes = _axes(ax, 6.8, 5.4, "Weights of the terms, margins of the nodes")
    paths = _arcs(at, np.asarray(graph.i), np.asarray(graph.j))
    reach = max(float(np.max(np.abs(values - 1), initial=0.0)), 1e-3)
    collections = importlib.import_module("matplotlib.collections")
    lines = collections.LineCollection(
        paths, cmap="PuOr", clim=(1 - reach, 1 + reach), linewidths=2.0, zorder=1
    )
    lines.set_array(values)
    # the middle of the map is white: a dark line beneath keeps weights of 1 visible
    under = collections.LineCollection(paths, colors="0.4", linewidths=3.0, zorder=0)
    axes.add_collection(under)
    axes.add_collection(lines)
    axes.figure.colorbar(lines, ax=axes, label="weight of a term (1 is the reference)", pad=0.02)
    dots: dict[str, Any] = {"s": 90, "edgecolors": "black", "linewidths": 0.8, "zorder": 2}
    if margins is None:
        axes.scatter(at[:, 0], at[:, 1], color="white", **dots)
    else:
        left = np.asarray(margins, np.float64)
        if left.shape != (n,):
            raise ValueError(f"margins has shape {left.shape}, expected ({n},)")
        far = max(float(np.max(np.abs(left), initial=0.0)), 1e-12)
        drawn = axes.scatter(at[:, 0], at[:, 1], c=left, cmap="RdBu", vmin=-far, vmax=far, **dots)
        axes.figure.colorbar(
            drawn, ax=axes, label="margin of a row (energy per unit of x squared)", pad=0.02
        )
    axes.set_aspect("equal")
    axes.autoscale_view()
    axes.set_axis_off()
    return axes


def pareto(
    delta_f90: ArrayLike,
    gap: ArrayLike,
    groups: Sequence[str] = (),
    ax: "Axes | None" = None,
) -> "Axes":
    """Final gap against Delta F90 of many runs, with the front that no other run beats.

    Args:
      delta_f90: steps to 90 % [runs]; runs that never got there (NaN) are left out.
      gap: fraction of the drop left at the end [runs]; gaps below 1e-16 are drawn there.
      groups: name of each run's group, such as its problem, [runs]; a front for each.
      ax: where to draw; None makes a new figure, `ax.figure`.

    Returns:
      The axes.

    Raises:
      ValueError: shapes that do not match.
      ImportError: matplotlib is missing.

    >>> pareto([1.0, 2.0], [0.01, 1e-9]).get_xlabel()
    'steps to 90 % of the drop (updates)'
    """
    x, y = np.asarray(delta_f90, np.float64), np.asarray(gap, np.float64)
    if x.ndim != 1 or y.shape != x.shape:
        raise ValueError(f"gap has shape {y.shape}, expected that of delta_f90, {x.shape}")
    y = np.maximum(y, _LOWEST_GAP)
    of = np.array(groups) if len(groups) else np.full(x.shape, "")
    axes = _axes(ax, 6.4, 4.4, "Fast at first, or close in the end")
    for name, style in zip(dict.fromkeys(of.tolist()), _styles(), strict=False):
        here = (of == name) & np.isfinite(x)
        line = style.pop("linestyle")
        label = name or None
        axes.plot(x[here], y[here], linestyle="", markersize=4.5, alpha=0.6, label=label, **style)
        front = np.flatnonzero(here)[pareto_front(x[here], y[here])]
        front = front[np.argsort(x[front])]
        axes.step(x[front], y[front], where="post", color=style["color"], linestyle=line)
    axes.set_yscale("log")
    axes = _finish(axes, "final gap (fraction of the drop)", legend=bool(len(groups)))
    axes.set_xlabel("steps to 90 % of the drop (updates)")
    axes.locator_params(axis="x", integer=True)
    return axes


def pareto_front(cost: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which points no other point beats in both coordinates, bool [points]; NaN is never one.

    >>> pareto_front(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 1.0])).tolist()
    [True, True, False]
    """
    known = np.isfinite(cost) & np.isfinite(other)
    front = np.zeros(cost.shape, bool)
    lowest = np.inf
    for k in np.lexsort((other, np.where(known, cost, np.inf))):
        if known[k] and other[k] < lowest:
            front[k], lowest = True, other[k]
    return front


def _styles() -> Iterator[dict[str, Any]]:
    for color, line, marker in zip(cycle(OKABE_ITO), cycle(_LINES), cycle(_MARKERS)):
        yield {"color": color, "linestyle": line, "marker": marker}


def _measured(table: Table, prefix: str) -> Table:
    """The rows in which some column of that prefix has a value: the last state has none."""
    found = [values for name, values in table.columns.items() if name.startswith(prefix)]
    if not found:
        return table
    known = ~np.isnan(np.stack(found).astype(np.float64)).all(axis=0)
    return Table({name: np.asarray(values)[known] for name, values in table.columns.items()})


def _families(table: Table, prefix: str) -> dict[str, np.ndarray]:
    found = {n.removeprefix(prefix): v for n, v in table.columns.items() if n.startswith(prefix)}
    if not found:
        raise ValueError(f"table has no column {prefix}<Key>: only optimizers with weights have it")
    return found


def _rows_of(table: Table, prefix: str) -> np.ndarray:
    """The columns of all rows, [steps, rows]."""
    found = [values for name, values in table.columns.items() if name.startswith(prefix)]
    if not found:
        raise ValueError(f"table has no column {prefix}<i>: record it with rows=True")
    return np.stack(found, axis=1).astype(np.float64)


def _matrix(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}, expected [steps, K]")
    return array


def _heat(
    axes: "Axes", values: np.ndarray, limits: tuple[float, float], colors: str, label: str
) -> None:
    """Steps across, entries down; many entries as means of neighbours."""
    steps, entries = values.shape
    shown = values
    if entries > _MOST_ENTRIES:
        parts = np.array_split(values, _MOST_ENTRIES, axis=1)
        shown = np.stack([part.mean(axis=1) for part in parts], axis=1)
    image = axes.imshow(
        shown.T,
        aspect="auto",
        interpolation="nearest",
        cmap=colors,
        vmin=limits[0],
        vmax=limits[1],
        extent=(-0.5, steps - 0.5, entries - 0.5, -0.5),
    )
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    axes.set_xlabel("step (updates)")


def _arcs(at: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[np.ndarray]:
    """A curve for every edge, those on one pair of nodes bent apart."""
    low, high = np.minimum(i, j), np.maximum(i, j)
    seen: dict[tuple[int, int], int] = {}
    curves = []
    along = np.linspace(0, 1, 12)[:, None]
    for a, b in zip(low.tolist(), high.tolist(), strict=True):
        k = seen[a, b] = seen.get((a, b), -1) + 1
        start, end = at[a], at[b]
        across = np.array([end[1] - start[1], start[0] - end[0]])
        bend = 0.12 * ((k + 1) // 2) * (1 if k % 2 else -1)
        curves.append(start + along * (end - start) + 4 * bend * along * (1 - along) * across)
    return curves


def _finish(axes: "Axes", ylabel: str, *, legend: bool = True) -> "Axes":
    axes.set_xlabel("step (updates)")
    axes.set_ylabel(ylabel)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    if legend:
        axes.legend(fontsize="small", framealpha=0.9)
    return axes


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, outside pyplot.

    Raises:
      ImportError: matplotlib is missing.

    >>> new_figure(4, 3).get_size_inches().tolist()
    [4.0, 3.0]
    """
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "matplotlib is needed for figures: pip install 'smallgain_jax[plot]'"
        ) from error
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def figure_of(axes: "Axes") -> "Figure":
    """The figure that axes belong to, that of a subfigure included.

    >>> figure = new_figure(4, 3)
    >>> figure_of(figure.subplots()) is figure
    True
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("axes have been removed from their figure")
    return figure


def _axes(ax: "Axes | None", width: float, height: float, title: str) -> "Axes":
    """Axes of a new figure with a title, or the caller's, who has one of his own."""
    if ax is not None:
        return ax
    axes: Axes = new_figure(width, height).subplots()
    axes.set_title(title, loc="left", fontsize="medium")
    return axes
