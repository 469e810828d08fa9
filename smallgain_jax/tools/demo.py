"""Two small graphs relaxed by the library and its peers, each at its best learning rate.

They are those of the design note that the library grew from. `delta_f90` counts updates until the
*reference* energy F(x; 1) has made 90 % of the drop to the true minimum, the same threshold for
every method. `delta_f90_own` counts as the note did: there a method that lowers its weights lowers
its own threshold too.
"""

import itertools
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._compiling import quick_options
from smallgain_jax.tools import plots, scenarios, telemetry, validation
from smallgain_jax.tools.io import write_atomic
from smallgain_jax.tools.scenarios import Scenario
from smallgain_jax.tools.tables import PathLike
from smallgain_jax.tools.telemetry import Table
from smallgain_jax.tools.validation import (
    FLOOR,
    RATES,
    Maker,
    best_run,
    first,
    gaps,
    own_count,
    relaxed,
    start_bound,
    to_stderr,
    told_of,
)

METHODS = (
    "fixed step",
    "capped step",
    "line search",
    "GradNorm",
    "auto-cap",
    "small_gain, default preset",
    "small_gain, momentum",
    "L-BFGS",
    "default",
)
"""Those of `validation.METHODS` that the demo shows, in this order."""

TOL = 1e-8
"""Optimality at which a run ends, as in a plan."""

NEAR = 1e-6
"""Fraction of the drop that is left where a method counts as arrived."""

OPENING = (
    "Two small graphs, relaxed by every method. A method with a learning rate is shown at the best "
    f"of {len(RATES)}."
)
COLUMNS = (
    "to 90 %, to 1e-6: updates until 90 % of the possible descent was made, and until a millionth "
    "of it was left.\n"
    'left: the part that was left at the end. A "-" means not in this run, or no learning rate.'
)


@dataclass(frozen=True, eq=False)
class MethodResult:
    """One method on one scenario, at its best learning rate.

    Attributes:
      method: its name.
      learning_rate: the best of `validation.RATES`; NaN where the method has none.
      energy: reference energy of every state, [steps + 1].
      adapted: F(x; w) of every state at the weights in force there, [steps + 1].
      x: the last state, [n].
      weights: the last weights, [K].
      backtracks: halvings (for optax's line searches, evaluations beyond the first) in all.
    """

    method: str
    learning_rate: float
    energy: np.ndarray
    adapted: np.ndarray
    x: np.ndarray
    weights: np.ndarray
    backtracks: int


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What `run` found, by the name of the scenario.

    Attributes:
      tables: a row a method, best first: by `delta_f90`, then by `gap`.
      results: the methods in a fixed order, with their energies and last states.
      minima: the true minima F*.
    """

    tables: dict[str, Table]
    results: dict[str, tuple[MethodResult, ...]]
    minima: dict[str, float]

    def __str__(self) -> str:
        parts = [f"{self._heading(name)}\n{self._shown(name)}" for name in self.tables]
        return "\n\n".join([OPENING, *parts, COLUMNS, self.conclusion()])

    def _repr_html_(self) -> str:
        parts = (
            f"<h4>{self._heading(name)}</h4>{self._shown(name)._repr_html_()}"
            for name in self.tables
        )
        closing = f"<p>{COLUMNS}</p><p>{self.conclusion()}</p>"
        return f"<p>{OPENING}</p>" + "".join(parts) + closing

    def _heading(self, name: str) -> str:
        first_of = self.results[name][0]
        return f"{name}: {first_of.x.size} nodes, {first_of.weights.size} couplings"

    def _shown(self, name: str) -> Table:
        """The columns that answer the question, in words."""
        table = self.tables[name]
        left = [f"{gap:.1e}" if gap > FLOOR else f"< {FLOOR:.0e}" for gap in table["gap"]]
        return Table(
            {
                "method": table["method"],
                "learning rate": table["learning_rate"],
                "to 90 %": table["delta_f90"],
                "to 1e-6": table["steps_to_1e-6"],
                "left": np.array(left),
            }
        )

    def conclusion(self) -> str:
        """Who was first at a millionth, graph by graph, in a sentence each."""
        sentences = []
        for name, table in self.tables.items():
            arrived = np.nan_to_num(table["steps_to_1e-6"], nan=np.inf)
            best = arrived.min()
            if np.isinf(best):
                sentences.append(f"On {name!r} no method left less than a millionth.")
                continue
            winners = " and ".join(table["method"][arrived == best])
            sentences.append(
                f"On {name!r} {winners} came to a millionth first, after {best:.0f} updates; "
                f"{np.sum(np.isinf(arrived))} of {arrived.size} methods did not come there."
            )
        return "\n".join(sentences)

    def figure(self) -> Any:
        """Reference energy gaps of all methods, both scenarios side by side: a matplotlib Figure.

        Raises:
          ImportError: matplotlib is missing.
        """
        figure = plots.new_figure(6.0 * len(self.results), 5.6)
        panels = figure.subplots(1, len(self.results), sharey=True, squeeze=False)[0]
        for axes, (name, results) in zip(panels, self.results.items(), strict=True):
            plots.energy({r.method: r.energy for r in results}, self.minima[name], axes)
            axes.set_title(
                f"{name}: {results[0].x.size} nodes, {results[0].weights.size} couplings"
            )
            axes.get_legend().remove()
        for axes in panels[1:]:
            axes.set_ylabel("")
        handles, labels = panels[0].get_legend_handles_labels()
        # dashes and markers have to fit into the samples of the legend
        figure.legend(handles, labels, loc="outside lower center", ncols=5, handlelength=4)
        return figure

    def save(self, directory: PathLike) -> list[Path]:
        """Write a CSV table a scenario and the figure; make the directory where it is missing.

        Args:
          directory: where to write `<scenario>.csv` and `energy.png`.

        Returns:
          The files written.

        Raises:
          ImportError: matplotlib is missing; the tables are written before.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, table in self.tables.items():
            paths.append(folder / f"{name}.csv")
            table.write(paths[-1])
        figure = self.figure()
        paths.append(folder / "energy.png")
        write_atomic(paths[-1], lambda temporary: figure.savefig(temporary, dpi=150))
        return paths


def run(steps: int = 60) -> DemoResult:
    """Relax both graphs by every method, in double precision.

    A line of progress for every method goes to standard error.

    Args:
      steps: updates of each method.

    Returns:
      Tables, energies and last states.

    Raises:
      ValueError: `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    with jax.enable_x64(True):
        problems = (scenarios.baseline(), scenarios.dense())
        bounds = [start_bound(problem) for problem in problems]
    groups = _together()
    places = list(zip(problems, bounds, strict=True))
    jobs = [(*place, names, steps) for place in places for names in groups]
    # most of the time is compilation, which lets go of the interpreter
    with ThreadPoolExecutor(2) as pool:
        competed = list(pool.map(_compete, *zip(*jobs, strict=True)))
    tables, results, minima = {}, {}, {}
    for k, problem in enumerate(problems):
        part = competed[k * len(groups) : (k + 1) * len(groups)]
        by_name = {r.method: r for r in itertools.chain.from_iterable(part)}
        name, minima[problem.name] = problem.name, _minimum(problem)
        results[name] = tuple(by_name[method] for method in METHODS)
        tables[name] = _table(results[name], minima[name])
    return DemoResult(tables, results, minima)


def _together() -> list[tuple[str, ...]]:
    """The methods, those together that differ in numbers only: one program serves them."""
    groups: dict[Any, list[str]] = {}
    for name in METHODS:
        method = validation.METHODS[name]
        groups.setdefault((method.make, tuple(method.numbers)), []).append(name)
    # the largest programs first, so that none is waited for at the end
    return [tuple(names) for names in reversed(groups.values())]


def _compete(
    scenario: Scenario, bound: float, names: tuple[str, ...], steps: int
) -> list[MethodResult]:
    """Every learning rate of some methods in one program, and of each method the best."""
    started = time.perf_counter()
    # the precision is a setting of this thread
    with jax.enable_x64(True):
        numbers = [_numbers(name, bound) for name in names]
        flat = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *numbers)
        make = validation.METHODS[names[0]].make
        # in turn: side by side would be traced three times, and be no faster on such graphs
        every = partial(jax.lax.map, partial(_relaxed, scenario, make, steps))
        found = jax.jit(every).lower(flat).compile(quick_options())(flat)
    each = {name: np.split(np.asarray(a), len(names)) for name, a in found.items()}
    results = []
    for k, name in enumerate(names):
        best = best_run(each["energy"][k], _minimum(scenario))
        mine = {field: values[k][best] for field, values in each.items()}
        rate = float(numbers[k]["learning_rate"][best])
        backtracks = int(mine.pop("backtracks"))
        results.append(MethodResult(name, rate, backtracks=backtracks, **mine))
    seconds = time.perf_counter() - started
    to_stderr(f"{scenario.name}: {', '.join(names)}: {seconds:.1f} s")
    return results


def _numbers(name: str, bound: float) -> dict[str, jax.Array]:
    """A method's numbers at each of its learning rates, [rates] each; NaN where it has none."""
    method = validation.METHODS[name]
    rates = RATES if method.rate else np.array([np.nan])
    rates = np.minimum(rates, 1 / bound) if method.capped else rates
    given = {**method.numbers, "learning_rate": rates}
    return {key: jnp.broadcast_to(jnp.asarray(v, float), rates.shape) for key, v in given.items()}


def _relaxed(
    scenario: Scenario, make: Maker, steps: int, numbers: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """What `MethodResult` keeps of one relaxation, traced."""
    graph = scenario.graph
    result = relaxed(make, steps, graph, scenario.x0, TOL, numbers)
    told = told_of(graph, result)
    found, weights = telemetry.record(result.state), jnp.ones(graph.num_edges, result.x.dtype)
    if isinstance(found, telemetry.WeightsRecord):
        weights = found.weights
    return {
        "energy": result.energy,
        "adapted": told.get("adapted", result.energy),
        "x": result.x,
        "weights": weights,
        "backtracks": jnp.sum(told.get("backtracks", jnp.zeros(1, int))),
    }


def _minimum(scenario: Scenario) -> float:
    assert scenario.minimum is not None, "both graphs have a known minimum"
    return scenario.minimum


def _table(results: tuple[MethodResult, ...], minimum: float) -> Table:
    rows = []
    for result in results:
        gap = gaps(result.energy, minimum)
        row: Mapping[str, Any] = {
            "method": result.method,
            "learning_rate": result.learning_rate,
            "delta_f90": first(gap <= 0.1),
            "delta_f90_own": own_count(result.adapted),
            "steps_to_1e-6": first(gap <= NEAR),
            "final_reference": result.energy[-1],
            "final_adapted": result.adapted[-1],
            "gap": gap[-1],
            "backtracks": result.backtracks,
        }
        rows.append(row)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    order = np.lexsort((columns["gap"], columns["delta_f90"]))
    return Table({name: values[order] for name, values in columns.items()})
