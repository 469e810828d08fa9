r"""The validation plan: methods, KPIs, ablations and sweeps over suites.

Every KPI is on the *reference* energy F(x; 1), whatever weights a method holds. A plan runs each
method at every learning rate of one grid and shows it at its own best: fewest steps to 90 %, then
smallest final gap. Numbers repeat bitwise in one environment; run times stand in a table apart.

| column | what |
|---|---|
| `delta_f90` | updates until F(x; 1) has made 90 % of the drop to the true minimum |
| `delta_f90_own` | as the original counts: to the method's own lowest F(x; w) |
| `steps` | updates made before the tolerance was met |
| `backtracks` | halvings in all; for optax's searches, evaluations beyond the first |
| `acceptance` | accepted updates over updates made |
| `margin_min`, `margin_median` | 2/L less the step, L the reference bound at every state |
| `final_reference`, `final_adapted` | F(x; 1) and F(x; w) at the end |
| `gap` | fraction of the drop left at the end |
| `diverged` | runs, over all learning rates, that ended above their start or not finite |
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

from smallgain_jax import presets
from smallgain_jax.graphs.descent import DescentInfo
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.relaxation import RelaxResult, relax
from smallgain_jax.limits.closed_forms import gradient_descent_limit, heavy_ball_limit
from smallgain_jax.tools import telemetry
from smallgain_jax.tools.phase import AgmState, agm_phase
from smallgain_jax.tools.scenarios import Scenario
from smallgain_jax.tools.suites import Suite, true_minimum
from smallgain_jax.tools.telemetry import Table
from smallgain_jax.transform import auto_cap, gradnorm, small_gain

RATES = np.outer([0.01, 0.1, 1.0], [1.0, 1.6, 2.5, 4.0, 6.3]).ravel()
"""Learning rates that every method with one is tried at; the best of them is shown."""

MOMENTUM = 0.5
"""Of the base optimizer under `small_gain, momentum`."""

FLOOR = 1e-14
"""Fraction of the drop that double precision does not resolve."""

Numbers = Mapping[str, Any]
"""Settings that are data: the learning rate, and what a method's variant changes."""


class Maker(Protocol):
    """How a method is made; equal makers share one compiled program. Hashable."""

    def __call__(
        self, graph: EnergyGraph, numbers: Numbers
    ) -> optax.GradientTransformation | None: ...


class Method(NamedTuple):
    """One row of a plan: a maker, and the numbers in which it differs from others of its maker."""

    make: Maker
    numbers: Mapping[str, float] = {}
    rate: bool = True  # whether it has a learning rate, tried at every one of the grid
    capped: bool = False  # whether its rate may not exceed 1/L at the start


class WatchedState(NamedTuple):
    """State of an optimizer that keeps nothing of its parameters, with a copy of them."""

    inner: Any
    params: Any  # those before the update


def _watched(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, with the state in which it found the parameters: curvature is read there."""
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> WatchedState:
        return WatchedState(inner.init(params), jnp.array(params, copy=True))

    def update(
        updates: Any, state: WatchedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, WatchedState]:
        step, held = inner.update(updates, state.inner, params, **extra_args)
        return step, WatchedState(held, jnp.array(params, copy=True))

    return optax.GradientTransformationExtraArgs(init, update)


def _fixed(graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
    return _watched(optax.sgd(numbers["learning_rate"]))


def _line_search(graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
    rate = numbers["learning_rate"]
    search = optax.scale_by_backtracking_linesearch(30, max_learning_rate=rate)
    return _watched(optax.chain(optax.sgd(1.0), search))


def _auto_cap(graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
    rate = numbers["learning_rate"]
    return auto_cap(optax.sgd(rate), graph, limit=gradient_descent_limit(rate))


def _gradnorm(graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
    return gradnorm(optax.sgd(numbers["learning_rate"]), graph)


def _agm(graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
    return _watched(agm_phase(optax.sgd(numbers["learning_rate"]), graph))


def _lbfgs(graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
    return optax.lbfgs()


def _default(graph: EnergyGraph, numbers: Numbers) -> None:
    return None


@dataclass(frozen=True)
class SmallGain:
    """Maker of `small_gain` over gradient descent; static settings are given, others are data.

    Attributes:
      momentum: of the base optimizer.
      static: names and values of the settings that shape the program.

    >>> make = SmallGain(static=(("policy", "fair"),))
    >>> graph = Suite(generator="baseline").build().graph
    >>> make(graph, {"learning_rate": 0.1, "budget_fraction": 0.5}).init is not None
    True
    """

    momentum: float = 0.0
    static: tuple[tuple[str, Any], ...] = ()

    def __call__(self, graph: EnergyGraph, numbers: Numbers) -> optax.GradientTransformation:
        settings = dict(numbers)
        rate = settings.pop("learning_rate")
        # a traced rate cannot be measured
        limit = heavy_ball_limit(rate, self.momentum)
        base = optax.sgd(rate, self.momentum or None)
        return small_gain(base, graph, limit=limit, **dict(self.static), **settings)


_OWN: dict[str, float] = {"budget_fraction": 0.7, "max_step_change": 0.1}
"""The two numbers that the ablations vary, at `small_gain`'s own defaults: data in its program."""


def _static(**static: Any) -> Method:
    return Method(SmallGain(static=tuple(sorted(static.items()))), _OWN)


def _preset(settings: dict[str, Any]) -> Method:
    static = tuple((name, settings[name]) for name in ("smoothing", "value"))
    numbers = {name: float(v) for name, v in settings.items() if name not in dict(static)}
    return Method(SmallGain(static=static), numbers)


BASELINES: dict[str, Method] = {
    "fixed step": Method(_fixed),
    "capped step": Method(_fixed, capped=True),
    "auto-cap": Method(_auto_cap),
    "GradNorm": Method(_gradnorm),
    "AGM phase": Method(_agm),
    "line search": Method(_line_search),
    "L-BFGS": Method(_lbfgs, rate=False),
}
"""What users have without this library, and the original's own baselines."""

OURS: dict[str, Method] = {
    "small_gain": Method(SmallGain(), _OWN),
    "small_gain, momentum": Method(SmallGain(momentum=MOMENTUM), _OWN),
    "default": Method(_default, rate=False),
}
"""The library's own: `small_gain` over SGD, the same with momentum, and the default of `relax`."""

ABLATIONS: dict[str, Method] = {
    **{
        f"{policy}, {value}": _static(policy=policy, value=value)
        for policy in ("greedy", "fair")
        for value in ("alignment", "grad_norm", "peek")
    },
    "row gains off": _static(row_gains=False),
    "smoothing off": _static(smoothing=None),
    "scaling on": _static(scaling_iterations=10),
    **{f"rho {rho}": Method(SmallGain(), _OWN | {"budget_fraction": rho}) for rho in (0.5, 0.9)},
    **{f"eta {eta}": Method(SmallGain(), _OWN | {"max_step_change": eta}) for eta in (0.05, 0.2)},
    "small_gain, default preset": _preset(presets.default()),
    "small_gain, speed preset": _preset(presets.speed()),
    "small_gain, safety preset": _preset(presets.safety()),
}
"""Variants of `small_gain`, which itself has policy greedy, value alignment, row gains and
smoothing on, scaling off, rho 0.7 and eta 0.10."""

METHODS: dict[str, Method] = BASELINES | OURS | ABLATIONS


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `smallgain bench` runs.

    Attributes:
      suites: the problems.
      methods: keys of `METHODS`, or the names of its parts: "baselines", "ours", "ablations".
      steps: updates of each method at most.
      tol: a run stops once its optimality is at most this, as in `relax`.
      rates: learning rates to try; those of `rate_grid` when not given.
      repeats: timed runs of each method at its best rate, of which the median counts; 0 for none.
    """

    suites: tuple[Suite, ...]
    methods: tuple[str, ...] = ("baselines", "ours")
    steps: int = 60
    tol: float = 1e-8
    rates: tuple[float, ...] | None = None
    repeats: int = 3

    def check(self) -> None:
        """Raise a ValueError that names the first setting that cannot be."""
        check_common(self.suites, self.steps, self.tol)
        for name in self.methods:
            if name not in METHODS and name not in _PARTS:
                known = ", ".join([*_PARTS, *METHODS])
                raise ValueError(f"methods: {name!r} is unknown: choose from {known}")
        if not self.methods:
            raise ValueError("methods must name at least one")
        if self.rates is not None and not (self.rates and all(r > 0 for r in self.rates)):
            raise ValueError(f"rates = {list(self.rates)} must be positive, at least one")
        if self.repeats < 0:
            raise ValueError(f"repeats = {self.repeats} must not be negative")

    @property
    def selected(self) -> dict[str, Method]:
        """The methods, parts written out, each once."""
        names = itertools.chain.from_iterable(_PARTS.get(name, (name,)) for name in self.methods)
        return {name: METHODS[name] for name in names}


_PARTS = {"baselines": (*BASELINES,), "ours": (*OURS,), "ablations": (*ABLATIONS,)}


def check_common(suites: Sequence[Suite], steps: int, tol: float) -> None:
    if not suites:
        raise ValueError("suites must hold at least one")
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"suites: {name} appears twice")
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    if not tol >= 0:
        raise ValueError(f"tol = {tol} must be at least 0")


def rate_grid(lipschitz: float) -> np.ndarray:
    """The 15 learning rates of the demo, moved down by whole decades on stiffer problems.

    Where 1/L would lie below the lowest decade, the grid moves until it is inside: no method may
    lose because the grid has no rate at which it is stable.

    Args:
      lipschitz: L at the start.

    >>> rate_grid(8.0).tolist() == RATES.tolist(), rate_grid(300.0).max().round(6).item()
    (True, 0.063)
    """
    if not lipschitz > 10:
        return RATES.copy()
    return RATES * 10.0 ** np.floor(np.log10(10 / lipschitz))


class Outcome(NamedTuple):
    """What one run tells; NumPy arrays, histories [steps] or [steps + 1]."""

    energy: np.ndarray  # [steps + 1] F(x; 1)
    adapted: np.ndarray  # [steps + 1] F(x; w)
    steps: int  # updates made
    accepted: np.ndarray  # [steps] bool
    backtracks: np.ndarray  # [steps]
    margin: np.ndarray  # [steps] 2/L - step; NaN for methods without a step in units of 1/L


def _record(state: Any) -> dict[str, jax.Array]:
    """What an `Outcome` needs of an optimizer's state, a few numbers a step."""
    kept = {}
    if isinstance(state, WatchedState):
        kept["params"] = state.params
    agm = [part for part in jax.tree.leaves(state, is_leaf=_is_agm) if _is_agm(part)]
    if agm:
        info = agm[0].info
        return kept | info._asdict()
    found = telemetry.record(state)
    if isinstance(found, telemetry.WeightsRecord):
        return {
            "adapted": found.info.energy_adapted,
            "accepted": found.info.accepted,
            "backtracks": found.info.last_step_backtracks,
            "lipschitz": found.info.lipschitz,
        }
    if isinstance(found, DescentInfo):
        return {"accepted": found.accepted, "backtracks": found.last_step_backtracks}
    if isinstance(found, telemetry.SearchRecord):
        kept["backtracks"] = found.backtracks
        searches = optax.tree.get_all_with_path(state, "learning_rate")
        if isinstance(state, WatchedState) and searches:
            kept["step"] = searches[0][1]
    return kept


def _is_agm(part: Any) -> bool:
    return isinstance(part, AgmState)


def traced_run(
    make: Maker, steps: int, graph: EnergyGraph, x0: jax.Array, tol: jax.Array, numbers: Numbers
) -> dict[str, jax.Array]:
    """One run, for `jit`: what `outcome_of` takes."""
    return told_of(graph, relaxed(make, steps, graph, x0, tol, numbers))


def relaxed(
    make: Maker,
    steps: int,
    graph: EnergyGraph,
    x0: jax.Array,
    tol: jax.Array | float,
    numbers: Numbers,
) -> RelaxResult:
    """A method's run, with the history that `told_of` reads."""
    return relax(graph, x0, make(graph, numbers), steps, tol=tol, record=_record)


def told_of(graph: EnergyGraph, result: RelaxResult) -> dict[str, jax.Array]:
    """What a run tells of each step."""
    history = dict(result.info.history)
    found = telemetry.record(result.state)
    if isinstance(found, telemetry.WeightsRecord):
        last = graph.energy(result.x, found.weights)
        history["adapted"] = jnp.append(history["adapted"], last)
    elif "adapted" in history:
        history["adapted"] = jnp.append(history["adapted"], history.pop("adapted_after")[-1])
    return {**history, "energy": result.energy, "made": result.info.steps}


def outcome_of(
    found: Mapping[str, Any], rate: float, lipschitz: Callable[[Any], np.ndarray]
) -> Outcome:
    """An `Outcome` on the host; `lipschitz` prices states [steps, n]."""
    host = {name: np.asarray(a) for name, a in found.items() if name != "params"}
    steps = host["energy"].size - 1
    made = int(host["made"])
    bound = host.get("lipschitz")
    if bound is None and "params" in found:
        bound = lipschitz(found["params"])
    if bound is None:
        margin = np.full(steps, np.nan)
    else:
        with np.errstate(divide="ignore"):
            margin = 2 / bound - host.get("step", np.full(steps, rate))
    return Outcome(
        host["energy"],
        host.get("adapted", host["energy"]),
        made,
        host.get("accepted", np.ones(steps, bool)).astype(bool),
        host.get("backtracks", np.zeros(steps, np.int32)),
        margin,
    )


def gaps(energy: np.ndarray, minimum: float) -> np.ndarray:
    """Fractions of the drop that are left, shaped like `energy` [..., steps + 1].

    >>> gaps(np.array([3.0, 2.0, 1.0]), 1.0).tolist()
    [1.0, 0.5, 0.0]
    """
    drop = energy[..., :1] - minimum
    return (energy - minimum) / np.where(drop > 0, drop, 1)


def first(reached: np.ndarray) -> float:
    """Position of the first true entry; NaN where there is none.

    >>> first(np.array([False, True, True]))
    1.0
    """
    return float(np.argmax(reached)) if reached.any() else np.nan


def best_run(energies: np.ndarray, minimum: float) -> int:
    """The run [runs, steps + 1] of fewest steps to 90 % of the true drop, then smallest final gap.

    Gaps below `FLOOR` are alike, so that rounding decides nothing.

    >>> best_run(np.array([[1.0, 0.5, 0.0], [1.0, 0.05, 0.04]]), 0.0)
    1
    """
    left = gaps(np.where(np.isfinite(energies), energies, np.inf), minimum)
    steps = np.array([first(gap <= 0.1) for gap in left])
    return int(np.lexsort((np.maximum(left[:, -1], FLOOR), steps))[0])


def own_count(adapted: np.ndarray) -> float:
    """The original's Delta F90: to 90 % of the drop to the method's own lowest F(x; w) [steps + 1].

    It logs from the state after the first update on, its start is not among them.

    >>> own_count(np.array([5.0, 1.0, 0.5, 0.0]))
    3.0
    """
    logged = adapted[1:]
    return first(logged <= logged[0] - 0.9 * (logged[0] - logged.min())) + 1


def kpis(outcome: Outcome, minimum: float) -> dict[str, float | int]:
    """The columns of one run, as told at the top of this module; `diverged` is the plan's."""
    made = outcome.steps
    gap = gaps(outcome.energy, minimum)
    margin = outcome.margin[:made]
    known = made > 0 and bool(np.isfinite(margin).all())
    return {
        "delta_f90": first(gap <= 0.1),
        "delta_f90_own": own_count(outcome.adapted[: max(made, 1) + 1]),
        "steps": made,
        "backtracks": int(outcome.backtracks[:made].sum()),
        "acceptance": float(outcome.accepted[:made].mean()) if made else np.nan,
        "margin_min": float(margin.min()) if known else np.nan,
        "margin_median": float(np.median(margin)) if known else np.nan,
        "final_reference": float(outcome.energy[-1]),
        "final_adapted": float(outcome.adapted[-1]),
        "gap": float(gap[-1]),
    }


def _diverged(energy: np.ndarray) -> bool:
    resolution = 1e-12 * abs(energy[0])
    return not np.isfinite(energy).all() or bool(energy[-1] > energy[0] + resolution)


@dataclass(frozen=True, eq=False)
class PlanResult:
    """What `run_plan` found.

    Attributes:
      plan: the plan.
      numbers: a row for every suite and method; repeats bitwise in one environment.
      times: run times in seconds and what follows from them; these do not repeat.
      curves: reference energies [steps + 1] by suite and method, each at its best rate.
      minima: F* by suite.
    """

    plan: Plan
    numbers: Table
    times: Table
    curves: dict[str, dict[str, np.ndarray]]
    minima: dict[str, float]


class _Cell(NamedTuple):
    """One method on one suite, over its learning rates."""

    rates: np.ndarray
    outcomes: list[Outcome]
    run: Callable[[float], Any]  # a whole run at a rate, for timing
    compile_seconds: float


def run_plan(
    plan: Plan,
    progress: Callable[[str], None] | None = None,
    checkpoint: Callable[[PlanResult], object] = lambda result: None,
) -> PlanResult:
    """Run every method of a plan on every suite, in double precision.

    Args:
      plan: what to run.
      progress: called with a line of text after each method; standard error when not given.
      checkpoint: called after each suite with what is known so far, so that a long run which is cut
        off leaves something.

    Returns:
      Tables of KPIs and times, and the energies.

    Raises:
      ValueError: a plan that cannot be run; the message starts with the setting's name.
    """
    plan.check()
    say = progress or to_stderr
    rows: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    curves: dict[str, dict[str, np.ndarray]] = {}
    minima: dict[str, float] = {}
    with jax.enable_x64(True):
        for suite in plan.suites:
            problem = suite.build()
            start = time.perf_counter()
            solved = true_minimum(problem)
            say(f"{suite.name}: minimum {solved:.10g}, {time.perf_counter() - start:.1f} s")
            cells = {}
            for name, cell in _cells(plan, problem):
                cells[name] = cell
                say(f"{suite.name}: {name}: compiled in {cell.compile_seconds:.1f} s")
            # a method that got lower than the solver has shown where the minimum is
            seen = (o.energy.min() for c in cells.values() for o in c.outcomes)
            minima[suite.name] = minimum = min([solved, *(e for e in seen if np.isfinite(e))])
            curves[suite.name] = {}
            for name, cell in cells.items():
                best = best_run(np.stack([o.energy for o in cell.outcomes]), minimum)
                outcome, rate = cell.outcomes[best], float(cell.rates[best])
                curves[suite.name][name] = outcome.energy
                facts = {
                    "suite": suite.name,
                    "nodes": problem.graph.num_nodes,
                    "edges": problem.graph.num_edges,
                    "method": name,
                }
                told = kpis(outcome, minimum)
                diverged = sum(_diverged(o.energy) for o in cell.outcomes)
                rows.append({**facts, "learning_rate": rate, **told, "diverged": diverged})
                times.append(facts | _timed(plan.repeats, cell, rate, told))
            result = PlanResult(plan, as_table(rows), as_table(times), curves, minima)
            checkpoint(result)
    return result


def to_stderr(line: str) -> None:
    sys.stderr.write(f"smallgain: {line}\n")
    sys.stderr.flush()


def as_table(rows: list[dict[str, Any]]) -> Table:
    return Table({name: np.array([row[name] for row in rows]) for name in rows[0]})


def _cells(plan: Plan, problem: Scenario) -> Iterator[tuple[str, _Cell]]:
    bound = start_bound(problem)
    grid = rate_grid(bound) if plan.rates is None else np.array(plan.rates)
    tol = jnp.asarray(plan.tol, float)
    programs: dict[Any, tuple[Callable[..., Any], float]] = {}
    lipschitz = _lipschitz_of(problem.graph)
    for name, method in plan.selected.items():
        rates = grid if method.rate else np.array([np.nan])
        if method.capped:
            rates = np.unique(np.minimum(grid, 1 / bound))
        key = (method.make, tuple(method.numbers))
        compile_seconds = 0.0
        if key not in programs:
            start = time.perf_counter()
            lowered = jax.jit(partial(traced_run, method.make, plan.steps)).lower(
                problem.graph, problem.x0, tol, _numbers(method, rates[0])
            )
            programs[key] = lowered.compile(), time.perf_counter() - start
        program, compile_seconds = programs[key]

        def run(rate: float, method: Method = method, program: Any = program) -> Any:
            return program(problem.graph, problem.x0, tol, _numbers(method, rate))

        outcomes = [outcome_of(run(float(rate)), float(rate), lipschitz) for rate in rates]
        yield name, _Cell(rates, outcomes, run, compile_seconds)


def start_bound(problem: Scenario) -> float:
    """L at the start of a problem."""
    return float(eqx.filter_jit(EnergyGraph.curvature)(problem.graph, problem.x0).lipschitz)


def _numbers(method: Method, rate: float) -> dict[str, jax.Array]:
    given = {**method.numbers, "learning_rate": rate}
    return {name: jnp.asarray(value, float) for name, value in given.items()}


def _lipschitz_of(graph: EnergyGraph) -> Callable[[Any], np.ndarray]:
    """Reference bounds of states [steps, n], compiled at the first call."""

    @jax.jit
    def bounds(graph: EnergyGraph, states: jax.Array) -> jax.Array:
        return jax.lax.map(lambda x: graph.curvature(x, smoothing=1e-3).lipschitz, states)

    return lambda states: np.asarray(bounds(graph, states))


def _timed(repeats: int, cell: _Cell, rate: float, told: Mapping[str, Any]) -> dict[str, float]:
    """Median run time at a rate, and the part of it to 90 %."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(cell.run(rate))
        seconds.append(time.perf_counter() - start)
    run = statistics.median(seconds) if seconds else np.nan
    per_step = run / told["steps"] if told["steps"] else np.nan
    return {
        "compile_s": cell.compile_seconds,
        "run_s": run,
        "step_s": per_step,
        "to_90_s": per_step * told["delta_f90"],
    }


def claims(result: PlanResult) -> Table:
    """The design notes' claims, and those against L-BFGS, as measured over the suites of a plan.

    Each of `small_gain` and `default` that ran stands against GradNorm and L-BFGS: median ratio of
    steps to 90 % (a method that never got there counts as one step more than the plan allows),
    ratio of final gaps (below 1e-12 nothing is told apart), backtracks, runs that diverged, and
    times.

    >>> suites = (Suite(generator="baseline"),)
    >>> plan = Plan(suites=suites, methods=("fixed step",), steps=2, repeats=0)
    >>> claims(run_plan(plan, lambda line: None)).num_rows
    0
    """
    numbers = result.numbers
    never = result.plan.steps + 1.0
    rows: list[dict[str, Any]] = []

    def of(method: str, name: str, table: Table = numbers) -> np.ndarray:
        return table[name][table["method"] == method].astype(float)

    def steps(method: str) -> np.ndarray:
        return np.nan_to_num(of(method, "delta_f90"), nan=never)

    def add(ours: str, peer: str, claim: str, figure: float, holds: bool | None) -> None:
        said = "-" if holds is None else "yes" if holds else "no"
        rows.append(
            {"method": ours, "against": peer, "claim": claim, "figure": figure, "holds": said}
        )

    ran = set(numbers["method"].tolist())
    for ours in ("default", "small_gain"):
        if ours not in ran:
            continue
        if "GradNorm" in ran:
            ratio = float(np.median(steps(ours) / np.maximum(steps("GradNorm"), 1)))
            add(ours, "GradNorm", "median ratio of steps to 90 % <= 0.5", ratio, ratio <= 0.5)
            floor = np.maximum(of(ours, "gap"), 1e-12)
            gap = np.maximum(of("GradNorm", "gap"), 1e-12) / floor
            add(
                *(ours, "GradNorm", "median ratio of final gaps >= 10"),
                *(float(np.median(gap)), float(np.median(gap)) >= 10),
            )
            share = float(np.mean(gap >= 10))
            add(ours, "GradNorm", "share of suites with a gap 10 times smaller", share, share == 1)
            fewer = float(np.mean(of(ours, "backtracks") <= of("GradNorm", "backtracks")))
            add(ours, "GradNorm", "share of suites with no more backtracks", fewer, fewer == 1)
            total = of(ours, "backtracks").sum() / max(of("GradNorm", "backtracks").sum(), 1)
            add(ours, "GradNorm", "ratio of backtracks in all < 1", float(total), total < 1)
        lost = float(of(ours, "diverged").sum())
        add(ours, "-", "runs that diverged, all rates", lost, lost == 0)
        if "L-BFGS" in ran:
            share = float(np.mean(steps(ours) <= steps("L-BFGS")))
            add(
                *(ours, "L-BFGS", "share of suites with no more steps to 90 % >= 0.8"),
                *(share, share >= 0.8),
            )
            if result.plan.repeats:
                for column, said in (("to_90_s", "to 90 %"), ("run_s", "to the end")):
                    mine, theirs = (of(m, column, result.times) for m in (ours, "L-BFGS"))
                    # who never reaches 90 % has no time to it
                    less = float(np.mean((mine < theirs) | (np.isnan(theirs) & ~np.isnan(mine))))
                    add(
                        *(ours, "L-BFGS", f"share of suites with less time {said} = 1"),
                        *(less, less == 1),
                    )
    names = ("method", "against", "claim", "figure", "holds")
    return Table({name: np.array([row[name] for row in rows]) for name in names})
