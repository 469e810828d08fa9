r"""Sweeps: `small_gain` at many settings, all designs of a problem in one vmapped program."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.tools.scenarios import Scenario
from smallgain_jax.tools.suites import Suite, true_minimum
from smallgain_jax.tools.telemetry import Table
from smallgain_jax.tools.validation import (
    Maker,
    Outcome,
    SmallGain,
    as_table,
    check_common,
    kpis,
    outcome_of,
    start_bound,
    to_stderr,
    traced_run,
)


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A setting to draw at random: uniformly in [low, high], or in its logarithm."""

    low: float
    high: float
    log: bool = False


SWEPT = ("learning_rate", "budget_fraction", "max_step_change", "floor", "ceiling", "ema", "target")
"""Settings of `small_gain` that are data: every value runs in the same compiled program."""

_SWEPT_DEFAULTS = {
    "learning_rate": 0.1,
    "budget_fraction": 0.7,
    "max_step_change": 0.1,
    "floor": 0.1,
    "ceiling": 3.0,
    "ema": 0.3,
    "target": 0.9,
}


class Sweep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `smallgain sweep` runs: `small_gain` over SGD at many settings.

    Attributes:
      suites: the problems.
      settings: by a name of `SWEPT`, a list of values, or a range {low, high, log} for a random
        design; settings not named keep `small_gain`'s defaults, and the learning rate is in units
        of 1/L at the start.
      structure: settings that shape the program (policy, value, row_gains, smoothing, ...), each
        with the values to try: every combination is a program of its own.
      momentum: of the base optimizer.
      design: "grid" takes every combination of values, "random" draws `size` designs.
      size: number of random designs.
      seed: of NumPy's default generator, for the draw.
      steps: updates at most.
      tol: as in `Plan`.
      chunk: designs in one call of the compiled program.
      sort_by: KPI to sort by, smallest first.
    """

    suites: tuple[Suite, ...]
    settings: dict[str, tuple[float, ...] | Range]
    structure: dict[str, tuple[str | bool | int | float, ...]] = {}
    momentum: float = 0.0
    design: Literal["grid", "random"] = "grid"
    size: int = 64
    seed: int = 0
    steps: int = 60
    tol: float = 1e-8
    chunk: int = 64
    sort_by: str = "delta_f90"

    def check(self) -> None:
        """Raise a ValueError that names the first setting that cannot be."""
        check_common(self.suites, self.steps, self.tol)
        for name, values in self.settings.items():
            if name not in SWEPT:
                raise ValueError(f"settings: {name!r} is unknown: choose from {', '.join(SWEPT)}")
            if isinstance(values, Range):
                if self.design == "grid":
                    raise ValueError(f"settings: {name} is a range, which is for a random design")
                if not values.low <= values.high or (values.log and values.low <= 0):
                    raise ValueError(f"settings: {name} has no range from {values.low} up")
            elif not values:
                raise ValueError(f"settings: {name} must list at least one value")
        for name, choices in self.structure.items():
            if not choices:
                raise ValueError(f"structure: {name} must list at least one value")
        for count in ("size", "chunk"):
            if getattr(self, count) < 1:
                raise ValueError(f"{count} = {getattr(self, count)} must be at least 1")
        if self.sort_by not in KPIS:
            raise ValueError(
                f"sort_by = {self.sort_by!r} is unknown: choose from {', '.join(KPIS)}"
            )

    @property
    def designs(self) -> np.ndarray:
        """Every design, float [designs, len(SWEPT)], columns in the order of `SWEPT`."""
        given: dict[str, Any] = {name: (value,) for name, value in _SWEPT_DEFAULTS.items()}
        given |= self.settings
        if self.design == "grid":
            return np.array(list(itertools.product(*(given[name] for name in SWEPT))))
        rng = np.random.default_rng(self.seed)
        return np.stack([_drawn(given[name], self.size, rng) for name in SWEPT], axis=1)


KPIS = (
    *("delta_f90", "delta_f90_own", "steps", "backtracks", "acceptance", "margin_min"),
    *("margin_median", "final_reference", "final_adapted", "gap"),
)
"""Columns to sort a sweep by."""


def _drawn(values: Any, size: int, rng: np.random.Generator) -> np.ndarray:
    if not isinstance(values, Range):
        return rng.choice(np.asarray(values, np.float64), size)
    if values.log:
        return np.exp(rng.uniform(np.log(values.low), np.log(values.high), size))
    return rng.uniform(values.low, values.high, size)


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What `run_sweep` found.

    Attributes:
      sweep: the sweep.
      table: a row for every suite, structure and design, sorted by `sort_by` within each suite.
      summary: the best design of each suite and structure, and its median over designs.
    """

    sweep: Sweep
    table: Table
    summary: Table


def run_sweep(sweep: Sweep, progress: Callable[[str], None] | None = None) -> SweepResult:
    """Run `small_gain` at every design, all designs of a suite in one vmapped program.

    Args:
      sweep: what to run.
      progress: called with a line of text after each chunk; standard error when not given.

    Returns:
      A row a design, sorted.

    Raises:
      ValueError: a sweep that cannot be run; the message starts with the setting's name.
    """
    sweep.check()
    say = progress or to_stderr
    designs = sweep.designs
    rows: list[dict[str, Any]] = []
    choices = list(itertools.product(*sweep.structure.values()))
    with jax.enable_x64(True):
        for suite in sweep.suites:
            problem = suite.build()
            bound = start_bound(problem)
            scaled = designs / np.where(np.array(SWEPT) == "learning_rate", bound, 1.0)
            found = []
            for choice in choices:
                static = tuple(sorted(zip(sweep.structure, choice, strict=True)))
                outcomes = _swept(sweep, problem, SmallGain(sweep.momentum, static), scaled, say)
                found += [(dict(static), *pair) for pair in zip(designs, outcomes, strict=True)]
            seen = [o.energy.min() for _, _, o in found if np.isfinite(o.energy).all()]
            minimum = min([true_minimum(problem), *seen])
            mine = [
                {"suite": suite.name, **static, **dict(zip(SWEPT, design, strict=True))}
                | kpis(outcome, minimum)
                for static, design, outcome in found
            ]
            # stable, and never-arrived last
            mine.sort(key=lambda row: (np.nan_to_num(row[sweep.sort_by], nan=np.inf), row["gap"]))
            rows += mine
    table = as_table(rows)
    return SweepResult(sweep, table, _summary(sweep, table))


def _swept(
    sweep: Sweep, problem: Scenario, make: Maker, designs: np.ndarray, say: Callable[[str], None]
) -> list[Outcome]:
    tol = jnp.asarray(sweep.tol, float)
    size = min(sweep.chunk, len(designs))

    @jax.jit
    def program(graph: EnergyGraph, x0: jax.Array, block: jax.Array) -> dict[str, jax.Array]:
        def one(design: jax.Array) -> dict[str, jax.Array]:
            numbers = dict(zip(SWEPT, design, strict=True))
            return traced_run(make, sweep.steps, graph, x0, tol, numbers)

        return jax.vmap(one)(block)

    outcomes: list[Outcome] = []
    for start in range(0, len(designs), size):
        block = designs[start : start + size]
        # the last chunk is filled up: one shape, one compilation
        full = np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])
        found = jax.tree.map(np.asarray, program(problem.graph, problem.x0, jnp.asarray(full)))
        for k in range(len(block)):
            one = {name: values[k] for name, values in found.items()}
            outcomes.append(outcome_of(one, float(block[k, 0]), _no_states))
        say(f"{problem.name}: {min(start + size, len(designs))}/{len(designs)} designs")
    return outcomes


def _no_states(states: Any) -> np.ndarray:
    raise AssertionError("small_gain keeps its own bound")


def _summary(sweep: Sweep, table: Table) -> Table:
    rows = []
    groups = list(zip(*(table[name] for name in ("suite", *sweep.structure)), strict=True))
    for group in dict.fromkeys(groups):
        here = np.array([other == group for other in groups])
        row: dict[str, Any] = dict(zip(("suite", *sweep.structure), group, strict=True))
        row["designs"] = int(here.sum())
        best = int(np.flatnonzero(here)[0])
        varied = [name for name, values in sweep.settings.items() if not _constant(values)]
        row |= {f"best {name}": table[name][best] for name in varied}
        row |= {f"best {name}": table[name][best] for name in ("delta_f90", "gap", "backtracks")}
        reached = np.nan_to_num(table["delta_f90"][here].astype(float), nan=sweep.steps + 1.0)
        row["median delta_f90"] = float(np.median(reached))
        row["median gap"] = float(np.median(table["gap"][here]))
        rows.append(row)
    return as_table(rows)


def _constant(values: Any) -> bool:
    return not isinstance(values, Range) and len(values) == 1
