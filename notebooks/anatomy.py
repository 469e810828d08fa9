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
# # Anatomy of an allocation
#
# One small graph, and every quantity on the way from its Hessian to new weights: rows, costs,
# limit, margin, value, score, budget, spend. Then the same over a whole relaxation, drawn with
# `smallgain_jax.plots`.

# %%
# %matplotlib inline
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import smallgain_jax as sg
from smallgain_jax.limits.closed_forms import gradient_descent_limit, row_budgets
from smallgain_jax.tools import plots, telemetry
from smallgain_jax.tools.telemetry import Table

jax.config.update("jax_enable_x64", True)

graph = sg.EnergyGraph(
    sg.Landau(a=[0.2, 0.3, 0.2, 0.4, 0.3, 0.2], b=0.1, target=[0.0, 1.0, 0.2, 1.0, 0.0, 0.6]),
    [
        sg.Quadratic([0, 1, 2, 3, 0], [1, 2, 3, 4, 3], [0.8, 0.5, 1.2, 0.3, 0.6]),
        sg.DirectedHinge([4, 5, 2], [5, 0, 5], [1.0, 0.7, 0.9]),
        sg.GateBenefit([1, 4], [3, 2], [0.5, 0.8], delta=[0.3, -0.2]),
    ],
)
x0 = jnp.array([0.9, 0.1, 0.7, 0.3, 0.2, 0.4])
family = np.array(graph.keys)[graph.family_index]
edge = np.array([f"{a}-{b}" for a, b in zip(graph.i.tolist(), graph.j.tolist(), strict=True)])

# %% [markdown]
# ## Rows and costs
#
# A term costs, on each of its two rows, the absolute row sum of its Hessian: 4 w for a spring,
# nothing for a gate, whose energy is linear. A hinge counts by how active it is. Row sums are the
# local energies' curvature plus the costs, and no eigenvalue exceeds the largest of them.

# %%
curvature = eqx.filter_jit(graph.curvature)(x0, smoothing=1e-3)
gradient = eqx.filter_jit(graph.gradient)(x0)
cost = np.asarray(curvature.edge_cost)
by_hand = np.asarray(curvature.local_rows)
by_hand = by_hand + np.bincount(graph.i, cost[:, 0], 6) + np.bincount(graph.j, cost[:, 1], 6)
assert np.allclose(by_hand, curvature.row_sums)
top = np.linalg.eigvalsh(jax.jit(jax.hessian(graph.energy))(x0)).max()
print(f"row sums {np.round(by_hand, 2)}: largest {by_hand.max():.3f}, lambda_max {top:.3f}")
assert top <= by_hand.max()

# %% [markdown]
# ## Limit, target, margin
#
# Gradient descent at rate 0.22 is stable up to a curvature of 2/0.22. The target is 0.9 of that; a
# row's margin is what its sum leaves of the target.

# %%
RATE, TARGET, FRACTION, CHANGE = 0.22, 0.9, 0.7, 0.3
limit = float(gradient_descent_limit(RATE))
target = TARGET * limit
margin = target - by_hand
print(f"limit {limit:.3f}, target {target:.3f}, margins {np.round(margin, 2)}")

# %% [markdown]
# ## Values and scores
#
# The value of a term is $\langle\nabla F(x; 1), \nabla e_k\rangle$: by how much faster $F(x; 1)$
# falls per unit of its weight. A negative value says that raising it would work against the whole.
# The score is value over cost; a term without a cost counts as one of a millionth of the dearest.

# %%
ends = jnp.stack([gradient[graph.i], gradient[graph.j]], axis=1)
value = np.asarray(jnp.sum(ends * eqx.filter_jit(graph.term_gradients)(x0), axis=1))
price = np.maximum(cost.sum(axis=1), 1e-6 * cost.sum(axis=1).max())
score = value / price

# %% [markdown]
# ## Budget, spend, weights
#
# Weights may move by 30 % of themselves. They start at the lower end, and what that leaves of the
# target, times 0.7, is the budget of each row.

# %%
weights = np.ones(graph.num_edges)
lower, upper = (1 - CHANGE) * weights, (1 + CHANGE) * weights
at_lower = np.asarray(curvature.local_rows)
at_lower = at_lower + np.bincount(graph.i, lower * cost[:, 0], 6)
at_lower = at_lower + np.bincount(graph.j, lower * cost[:, 1], 6)
budget = np.asarray(row_budgets(target, jnp.asarray(at_lower), FRACTION))
rows = np.stack([graph.i, graph.j], axis=1)
spend = jax.jit(sg.allocate)(value, cost, rows, lower, upper, budget)
print(
    Table(
        {
            "term": edge,
            "family": family,
            "cost i": cost[:, 0].round(3),
            "cost j": cost[:, 1].round(3),
            "value": value.round(3),
            "score": np.array([f"{s:.3g}" for s in score]),
            "weight": np.asarray(spend.weights).round(3),
        }
    )
)
print()
print(
    Table(
        {
            "row": np.arange(6),
            "row sum": by_hand.round(3),
            "margin": margin.round(3),
            "budget": budget.round(3),
            "spent": np.asarray(spend.spent_rows).round(3),
        }
    )
)
assert (spend.spent_rows <= budget + 1e-12).all()

# %% [markdown]
# The highest scores are served first; a term stops where one of its rows has nothing left, and a
# term without value stays at its lower end.
#
# ## Is that the best spend?
#
# The allocation is a linear program, which SciPy's HiGHS solves exactly.

# %%
touches = np.zeros((6, graph.num_edges))
np.add.at(touches, (rows.T, np.arange(graph.num_edges)), cost.T)
program = scipy.optimize.linprog(
    -np.maximum(value, 0),
    touches,
    budget + touches @ lower,
    bounds=np.stack([lower, upper], axis=1),
)
gain = np.maximum(value, 0) @ (np.asarray(spend.weights) - lower)
best = -program.fun - np.maximum(value, 0) @ lower
print(f"value of the allocation {gain:.6f}, of the linear program {best:.6f}: {gain / best:.4%}")
assert 0.99 * best <= gain <= best + 1e-9

# %% [markdown]
# ## The same inside the optimizer
#
# `small_gain` does all of this in one compiled update, in the mode "adapted" to the same weights.
# In its default mode, "reference", weights choose a direction only; ones that bring no lower energy
# than the user's own go half of their way back.


# %%
def optimizer(objective):
    return sg.small_gain(optax.sgd(RATE), graph, max_step_change=CHANGE, objective=objective)


adapted = sg.relax(graph, x0, optimizer("adapted"), steps=1, record=telemetry.record)
apart = np.abs(adapted.info.history.weights[0] - spend.weights).max()
print(f"weights by hand and inside differ by at most {apart:.1e}")
assert apart < 1e-9
assert np.allclose(adapted.info.history.info.spent_rows[0], spend.spent_rows)
result = sg.relax(graph, x0, optimizer("reference"), steps=30, record=telemetry.record)
table = telemetry.table(graph, result, rows=True)
shown = ("step", "energy:reference", "margin:global", "spent:global", "alloc:coup:Quadratic",
         "alloc:coup:DirectedHinge", "alloc:coup:GateBenefit", "total_backtracks")  # fmt: skip
Table({name: table[name] for name in shown})

# %% [markdown]
# ## In pictures
#
# The first update, term by term: what the allocation ranks, against what it pays.

# %%
dearest = np.where(cost.max(axis=1) > 1e-9, cost.max(axis=1), 0)  # an inactive hinge costs nothing
score_cost = plots.score_cost(score, dearest, graph.family_index, graph.keys)
score_cost.figure

# %% [markdown]
# The graph at the first update: edges by the weight kept, nodes by the margin they had.

# %%
history = result.info.history
network = plots.network(graph, history.weights[0], history.info.margin_rows[0])
network.figure

# %% [markdown]
# Weights of every term, and margins of every row, update by update.

# %%
figure = plots.new_figure(11, 4)
left, right = figure.subplots(1, 2)
plots.allocation_by_edge(history.weights, graph.family_index, graph.keys, left)
plots.row_margins(table, right)
figure

# %% [markdown]
# Families: mean weight, and share of the cost of all terms. Then the tightest row, and the budget
# of all rows together. The budget drawn is a part of the margin at the weights held, while the
# spend counts from their lower ends, so it may be the larger.

# %%
figure = plots.new_figure(11, 7)
(above_left, above_right), (below_left, below_right) = figure.subplots(2, 2)
plots.allocation_by_family(table, above_left)
plots.shares(table, above_right)
plots.margin(table, below_left)
plots.budget(table, FRACTION, below_right)
figure

# %% [markdown]
# What came of it: the reference energy, against the same gradient descent without weights and
# against the default of `relax`.

# %%
best = sg.relax(graph, x0, steps=200)
energies = {
    "small_gain": result.energy,
    "gradient descent": sg.relax(graph, x0, optax.sgd(RATE), steps=30).energy,
    "default of relax": best.energy[:31],
}
axes = plots.energy(energies, float(best.energy[-1]))
axes.figure
