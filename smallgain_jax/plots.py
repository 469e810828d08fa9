"""Figures of relaxations: energies by method, and the stability margin as a budget.

Matplotlib is imported when a figure is drawn, and pyplot never: figures work without a display and
leave nothing behind in a global list.
"""

import importlib
from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from smallgain_jax.telemetry import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Colours that the usual colour blindnesses keep apart (Okabe and Ito 2008); no yellow on white."""

_LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LOWEST_GAP = 1e-16


def energy(
    results: Mapping[str, ArrayLike], minimum: float | None = None, ax: "Axes | None" = None
) -> "Axes":
    r"""Gap of the reference energy against the step, one line a method, on a logarithmic scale.

    The gap is $(F - F^*) / (F_0 - F^*)$, the fraction of the drop that is left; a dotted line marks
    10 %, where 90 % of the drop is made. Gaps below 1e-16 are drawn there.

    Args:
      results: reference energies [steps + 1] by method, as in `RelaxResult.energy`.
      minimum: F*; None takes the lowest energy of all, which flatters its own method.
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
    axes = _axes(ax, 6.4, 4.4)
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
    axes.set_ylabel("reference energy gap (fraction of the drop)")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize="small", framealpha=0.9)
    return axes


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
    axes = _axes(ax, 6.4, 3.6)
    step, left, spent = (table[name] for name in ("step", "margin:global", "spent:global"))
    every = max(1, step.size // 10)
    lines: list[tuple[str, Any, dict[str, Any]]] = [
        ("margin of the tightest row", left, {"color": OKABE_ITO[0], "marker": "o"}),
        ("spent by all terms", spent, {"color": OKABE_ITO[1], "marker": "s", "linestyle": "--"}),
    ]
    for label, values, style in lines:
        axes.plot(step, values, label=label, markevery=every, markersize=4.5, **style)
    axes.fill_between(
        step, left, 0, where=left < 0, color=OKABE_ITO[4], alpha=0.3, label="over the target"
    )
    axes.axhline(0, color="0.35", linewidth=1)
    axes.set_xlabel("step (updates)")
    axes.set_ylabel("curvature (energy per unit of x squared)")
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
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


def _axes(ax: "Axes | None", width: float, height: float) -> "Axes":
    return new_figure(width, height).subplots() if ax is None else ax
