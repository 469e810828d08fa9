# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Dense graphs and the honest table
#
# The design note that this library grew from has a graph of 16 nodes on a ring and 48 couplings,
# and the headline that its allocator reaches a far lower energy there than plain descent, in fewer
# steps. This notebook repeats the comparison with one yardstick for all, then shows where the
# headline came from.
#
# Two energies are in play. $F(x; 1)$, the reference, is what the user wrote. $F(x; w)$, the adapted
# one, is the same state priced at the weights that a method happens to hold.

# %%
# %matplotlib inline
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import smallgain_jax as sg
from smallgain_jax.limits.closed_forms import gradient_descent_limit
from smallgain_jax.tools import plots, scenarios, telemetry
from smallgain_jax.tools.telemetry import Table
from smallgain_jax.tools.validation import RATES, best_run, first, gaps, own_count

jax.config.update("jax_enable_x64", True)

problem = scenarios.dense()
graph, x0, minimum = problem.graph, problem.x0, problem.minimum
curvature = eqx.filter_jit(graph.curvature)(x0, scaling_iterations=10)
plain = eqx.filter_jit(graph.curvature)(x0)
top = np.linalg.eigvalsh(jax.jit(jax.hessian(graph.energy))(x0)).max()
print(f"{graph.num_nodes} nodes, {graph.num_edges} couplings: {', '.join(graph.keys)}")
print(f"bound {plain.lipschitz:.3f}, scaled {curvature.lipschitz:.3f}, lambda_max {top:.3f}")

# %% [markdown]
# ## The table
#
# Every method that has a learning rate is shown at the best of the same 15, all of them in one
# program. `delta_f90` counts updates until the reference energy has made 90 % of the drop to the
# true minimum, the same threshold for all; `delta_f90_own` is the original's count, against the
# method's own lowest adapted energy. `smallgain demo` prints the same with more methods, and the
# baseline scenario.

# %%
STEPS = 60


def line_search(rate):
    search = optax.scale_by_backtracking_linesearch(30, max_learning_rate=rate)
    return optax.chain(optax.sgd(1.0), search)


def seeds(rate):
    limit = gradient_descent_limit(rate)
    return sg.small_gain(optax.sgd(rate), graph, limit=limit, **sg.presets.default())


METHODS = {
    "fixed step": (optax.sgd, RATES),
    "line search": (line_search, RATES),
    "GradNorm": (lambda rate: sg.gradnorm(optax.sgd(rate), graph), RATES),
    "small_gain, the note's settings": (seeds, RATES),
    "L-BFGS": (lambda rate: optax.lbfgs(), np.full(1, np.nan)),
    "default of relax": (lambda rate: None, np.full(1, np.nan)),
}


def relaxed(make, rate):
    """Reference and adapted energy of every state, [STEPS + 1] each."""
    result = sg.relax(graph, x0, make(rate), steps=STEPS, record=telemetry.record)
    history = result.info.history
    if not isinstance(history, telemetry.WeightsRecord):
        return result.energy, result.energy
    last = graph.energy(result.x, history.weights[-1])
    return result.energy, jnp.append(history.info.energy_adapted, last)


rows, energies = [], {}
for name, (make, rates) in METHODS.items():
    every = jax.jit(jax.vmap(lambda rate, make=make: relaxed(make, rate)))
    references, adapteds = map(np.asarray, every(jnp.asarray(rates)))
    best = best_run(references, minimum)
    energies[name], adapted = references[best], adapteds[best]
    gap = gaps(energies[name], minimum)
    rows.append(
        {
            "method": name,
            "rate": rates[best],
            "delta_f90": first(gap <= 0.1),
            "delta_f90_own": own_count(adapted),
            "final_reference": energies[name][-1],
            "final_adapted": adapted[-1],
            "gap": max(gap[-1], 0.0),
        }
    )
table = Table({name: np.array([row[name] for row in rows]) for name in rows[0]})
table

# %%
axes = plots.energy(energies, minimum)
axes.figure

# %% [markdown]
# The two columns of final energies differ for the methods that move weights. Sorted by the adapted
# one, the order is another:

# %%
order = np.argsort(table["final_adapted"])
shown = ("method", "final_adapted", "final_reference", "gap")
print(Table({name: table[name][order] for name in shown}))
print(f"\ntrue minimum of the reference energy {minimum:.6f}")
below = table["final_adapted"] < minimum - 1e-9
print("below it, which no state of this problem can be:", ", ".join(table["method"][below]))
assert below.any()
assert (table["final_reference"] >= minimum - 1e-9).all()

# %% [markdown]
# ## Where the headline came from
#
# The original looks its couplings' costs up under keys that never match. Every cost is therefore
# nothing, no budget is ever spent, and every coupling's weight climbs to the ceiling, 3. A gate's
# energy is negative when it is open, so tripling its weight lowers the adapted energy by itself.
# Here is the lowest adapted energy when all couplings have a common weight, and what the reference
# energy is at that very state.

# %%
scales = np.linspace(0.25, 3.0, 12)


@jax.jit
def at_scale(scale):
    """Minimum of F(x; w) over the box at a common weight, and F(x; 1) there."""
    weights = jnp.full(graph.num_edges, scale)
    families = [
        sg.Quadratic(*(getattr(graph.edges[k], end) for end in "ij"), scale * graph.edges[k].weight)
        for k in range(2)
    ]
    gate = graph.edges[2]
    families.append(sg.GateBenefit(gate.i, gate.j, scale * gate.weight, gate.delta))
    x = sg.relax(sg.EnergyGraph(graph.local, families), x0, steps=100).x
    return graph.energy(x, weights), graph.energy(x)


adapted, reference = (np.asarray(values) for values in jax.vmap(at_scale)(jnp.asarray(scales)))
print(
    Table(
        {
            "weight of all couplings": scales,
            "lowest adapted energy": adapted.round(6),
            "reference energy there": reference.round(6),
        }
    )
)
at_one = int(np.argmin(np.abs(scales - 1)))
assert abs(reference[at_one] - minimum) < 1e-9
assert reference.argmin() == at_one
assert (np.diff(adapted) < 0).all()

# %%
figure = plots.new_figure(6.4, 4.0)
axes = figure.subplots()
axes.plot(scales, adapted, "o-", color=plots.OKABE_ITO[0], label="lowest adapted energy")
axes.plot(scales, reference, "s--", color=plots.OKABE_ITO[1], label="reference energy there")
axes.axhline(minimum, color="0.35", linestyle=":", label="true minimum")
axes.set_xlabel("weight of all couplings (1 is the problem)")
axes.set_ylabel("energy (dimensionless)")
axes.legend(fontsize="small")
axes.grid(True, color="0.9")
figure

# %% [markdown]
# The adapted energy falls with the weight, whatever a method does; the reference energy of its
# minimizer is best at 1, and only there. An allocator that raises all weights to the ceiling and is
# judged by the adapted energy cannot but win, and solves another problem.
#
# ## The original's own runs
#
# Recorded from the original implementation, and judged here by both energies. "published" is its
# own count of Delta F90; "honest" is that on the reference energy, from the states that it
# accepted.

# %%
places = [Path.cwd(), *Path.cwd().parents, Path(sg.__file__).parents[1]]
recorded = next(p / "tests/data/original.json" for p in places if (p / "tests/data").is_dir())
runs = json.loads(recorded.read_text())["scenarios"]["dense"]
start = runs["reference_energy_x0"]
rows = []
for name, run in runs["configs"].items():
    recorded_energies = np.array([start, *run["reference_energy"]])
    accepted = recorded_energies[: len(run["adapted_energy"]) + 1]
    gap = gaps(accepted, minimum)
    rows.append(
        {
            "configuration": name,
            "final adapted": run["adapted_energy"][-1],
            "final reference": run["reference_energy_returned"],
            "gap": gap[-1],
            "published": run["delta_f90_as_published"],
            "honest": first(gap <= 0.1),
        }
    )
    assert np.isnan(rows[-1]["honest"]) == (run["honest_delta_f90"] is None)
print(Table({name: np.array([row[name] for row in rows]) for name in rows[0]}))
spent = runs["configs"]["smallgain"]["max_budget_spent"]
print(f"\nmost that the original's allocator ever spent: {spent}")
assert spent == 0
final = runs["configs"]["smallgain"]["adapted_energy"][-1]
print(f"its final adapted energy {final:.6f}; lowest with all weights at 3 {adapted[-1]:.6f}")
assert abs(final - adapted[-1]) < 1e-4

# %% [markdown]
# The original's allocator has the lowest adapted energy of its five configurations and the highest
# reference energy: it never makes 90 % of the drop. What it was meant to do, spend a margin where
# it buys descent, is what the first table measures, on the user's own energy: `small_gain` with the
# note's settings is about as good as a tuned fixed step, and the default of `relax`, which lets
# every row spend its own margin, and L-BFGS are ahead.
