"""Rows or a hierarchy: the choice behind `metric="auto"`."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import as_float, check_finite, is_concrete
from smallgain_jax.graphs.graph import EnergyGraph, _as_activity
from smallgain_jax.graphs.multilevel import UNCOUPLED, Hierarchy, multilevel, priced_couplings
from smallgain_jax.spectral.rows import Activity

TRIAL_STEPS = 24
"""Most steps of conjugate gradients in the metric of the rows that the choice looks at.

With a hierarchy a relaxation takes about as many in all, each two to four times as long.
"""

TRIAL_DROP = 1e-2
"""Rows suffice where the trial brings the residual below this: a third of the way to 1e-6."""


class MetricChoice(NamedTuple):
    """What `choose_metric` took, and why."""

    hierarchy: Hierarchy | None  # None for the rows
    reason: str


def chosen(metric: Any, objective: Any, x0: ArrayLike) -> Any:
    """The metric that "auto", a `MetricChoice` or None stands for: "rows", or an object."""
    if isinstance(metric, str) and metric == "auto":
        metric = choose_metric(objective, x0) if isinstance(objective, EnergyGraph) else None
    if isinstance(metric, MetricChoice):
        metric = metric.hierarchy
    return "rows" if metric is None else metric


def choose_metric(
    graph: EnergyGraph,
    x0: ArrayLike | None = None,
    *,
    smoothing: Activity | float | None = 0.05,
) -> MetricChoice:
    r"""A hierarchy where rows alone do not condition the graph; on the host, before compiling.

    The measure is the thing itself: a few steps of conjugate gradients, in the metric of the rows,
    on the M that a hierarchy would stand for (see `graphs.multilevel`), in NumPy. Anchors that are
    strong everywhere, or couplings that mix quickly (a random graph), leave nothing to do after
    them; a long-range graph has hardly begun. What is held at bounds is not known yet: all counts
    as free.

    Args:
      graph: the energy. Where any of it is traced, rows are taken.
      x0: state at which the couplings are taken, [n] or [n, d]; zeros [n] by default.
      smoothing: how hinges count.

    Returns:
      A `MetricChoice`: the hierarchy or None, and the reason as text.

    >>> from smallgain_jax import Landau, Quadratic
    >>> here = np.arange(2999)
    >>> choose_metric(EnergyGraph(Landau(a=np.ones(3000)), Quadratic(here, here + 1))).hierarchy
    >>> chain = EnergyGraph(Landau(a=np.full(3000, 1e-5)), Quadratic(here, here + 1))
    >>> choose_metric(chain).hierarchy.sizes[0]
    3000
    """
    if not is_concrete((graph, x0)):
        return MetricChoice(None, "rows: the graph is traced, and a hierarchy is built on the host")
    x = jnp.zeros(graph.num_nodes, float) if x0 is None else as_float("x0", x0)
    check_finite("x0", x)
    left, steps = _trial(graph, x, _as_activity(smoothing))
    if left <= TRIAL_DROP:
        return MetricChoice(None, f"rows: {steps} steps of conjugate gradients leave {left:.0e}")
    hierarchy = multilevel(graph, x, smoothing=smoothing)
    return MetricChoice(
        hierarchy,
        f"hierarchy of {' + '.join(map(str, hierarchy.sizes))} nodes: "
        f"with rows, {steps} steps of conjugate gradients leave {left:.0e}",
    )


def _trial(graph: EnergyGraph, x: jax.Array, activity: Activity) -> tuple[float, int]:
    """Norm of the residual, in the metric of the rows, against its start's; after how many steps.

    No more of them than it takes to bring it below `TRIAL_DROP`.
    """
    from scipy.sparse import coo_array

    couplings, local = eqx.filter_jit(priced_couplings)(graph, x, activity)
    coupled = [family for family in graph.edges if not isinstance(family, UNCOUPLED)]
    i, j = (
        np.concatenate([np.zeros(0, np.int64), *(np.asarray(end) for end in ends)])
        for ends in ([family.i for family in coupled], [family.j for family in coupled])
    )
    n = graph.num_nodes
    # coordinates of vector nodes are graphs beside each other
    width = 1 if x.ndim == 1 else x.shape[1]
    i, j = ((width * end[:, None] + np.arange(width)).ravel() for end in (i, j))
    c = np.asarray(couplings, np.float64).ravel()
    e = np.maximum(np.asarray(local, np.float64).ravel(), 0)
    total = np.bincount(i, c, n * width) + np.bincount(j, c, n * width)
    d = e + 2 * total
    scale = 1 / np.sqrt(np.where(d > 0, d, 1))
    off = coo_array((c * scale[i] * scale[j], (i, j)), shape=(n * width, n * width)).tocsr()
    off = off + off.T
    diagonal = np.where(d > 0, (e + total) * scale**2, 1)

    left = np.random.default_rng(0).standard_normal(n * width)
    start = slope = float(left @ left)
    move = left.copy()
    steps = 0
    while steps < TRIAL_STEPS and slope > TRIAL_DROP**2 * start:
        bent = diagonal * move - off @ move
        curvature = float(move @ bent)
        if not curvature > 0:
            break
        steps += 1
        left = left - slope / curvature * bent
        slope, before = float(left @ left), slope
        move = left + slope / before * move
    return (float(np.sqrt(slope / start)) if start else 0.0), steps


__all__ = ["MetricChoice", "choose_metric", "chosen"]
