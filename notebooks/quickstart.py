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
# # Quickstart: an energy graph, its margin, and its relaxation
#
# An energy graph has nodes with local energies and edges that couple them. Every edge costs
# curvature on the two rows it touches; an optimizer tolerates only so much of it. smallgain_jax
# measures that margin, and spends it.

# %%
# %matplotlib inline
import jax
import optax

import smallgain_jax as sg
from smallgain_jax.tools import plots, telemetry
from smallgain_jax.tools.scenarios import dense

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# 16 nodes on a ring, each coupled to its next two neighbours, and
# gates that pay for being open.

# %%
scenario = dense()
graph, x0 = scenario.graph, scenario.x0
graph.num_nodes, graph.num_edges, graph.keys

# %% [markdown]
# ## Where the margin goes
#
# Row sums bound the Hessian from above; ten scalings bring the bound to the Perron root. The
# largest eigenvalue is what it stands for.

# %%
plain = graph.curvature(x0)
scaled = graph.curvature(x0, scaling_iterations=10)
top = jax.numpy.linalg.eigvalsh(jax.hessian(graph.energy)(x0)).max()
print(f"Gershgorin {plain.lipschitz:.3f}, scaled {scaled.lipschitz:.3f}, lambda_max {top:.3f}")
print("an edge of the first family costs", plain.edge_cost[0], "on its two rows")

# %% [markdown]
# ## Relax it
#
# `relax` without an optimizer is the library's best method; any optax optimizer fits in its place.

# %%
rate = float(1 / plain.lipschitz)
results = {
    "default": sg.relax(graph, x0, steps=60),
    "small_gain(sgd)": sg.relax(graph, x0, sg.small_gain(optax.sgd(rate), graph), steps=60),
    "L-BFGS": sg.relax(graph, x0, optax.lbfgs(), steps=60),
    "gradient descent at 1/L": sg.relax(graph, x0, optax.sgd(rate), steps=60),
}
axes = plots.energy(
    {name: result.energy for name, result in results.items()}, minimum=scenario.minimum
)
axes.figure

# %% [markdown]
# ## What the allocator did
#
# Telemetry is recorded inside the compiled loop and becomes a table.

# %%
optimizer = sg.small_gain(optax.sgd(rate), graph)
result = sg.relax(graph, x0, optimizer, steps=60, record=telemetry.record)
table = telemetry.table(graph, result)
table
