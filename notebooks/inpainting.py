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
# # Inpainting: where rows do not suffice
#
# Nine pixels in ten of a picture are missing; then its whole middle is. Every pixel is a node,
# springs join neighbours, and only known pixels have a local energy. What is known has to travel
# across the hole, and the metric decides how fast.

# %%
# %matplotlib inline
import jax
import matplotlib.pyplot as plt
import numpy as np
from skimage.restoration import inpaint_biharmonic

import smallgain_jax as sg
from smallgain_jax.tools import hard

jax.config.update("jax_enable_x64", True)
SIDE = 96
picture = hard.picture(SIDE)

# %% [markdown]
# ## The problems
#
# `choose_metric` tries a few steps with rows and says what it thinks of them.

# %%
holes = {"90 % missing": hard.missing_pixels(SIDE), "a hole": hard.large_hole(SIDE)}
for name, problem in holes.items():
    print(f"{name}: {sg.choose_metric(problem.graph, problem.x0).reason}")

# %% [markdown]
# ## Rows and a hierarchy
#
# The same conjugate gradients, until the gradient is 1e-8 of its start.

# %%
solved = {}
for name, problem in holes.items():
    hierarchy = sg.multilevel(problem.graph)
    runs = {
        metric: sg.conjugate_gradients(problem.graph, problem.x0, given, steps=5000, tol=1e-8)
        for metric, given in [("rows", None), ("hierarchy", hierarchy)]
    }
    solved[name] = np.asarray(runs["hierarchy"].x).reshape(SIDE, SIDE)
    print(name, {metric: int(run.steps) for metric, run in runs.items()}, "steps")

# %% [markdown]
# ## Stopped after eight steps
#
# The energy hardly tells the two apart; the picture does.

# %%
problem = holes["a hole"]
hierarchy = sg.multilevel(problem.graph)
after = {
    metric: sg.conjugate_gradients(problem.graph, problem.x0, given, steps=8, tol=0.0).x
    for metric, given in [("rows", None), ("hierarchy", hierarchy)]
}
best = float(problem.graph.energy(solved["a hole"].ravel()))
drop = float(problem.graph.energy(problem.x0)) - best
for metric, x in after.items():
    gap = (float(problem.graph.energy(x)) - best) / drop
    error = np.abs(np.asarray(x) - solved["a hole"].ravel()).max()
    print(f"{metric}: gap {gap:.1e} of the drop, error {error:.1e}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4))
known = np.asarray(problem.graph.local[0].a).reshape(SIDE, SIDE) > 0
shown = {
    "known": np.where(known, picture, np.nan),
    "rows, 8 steps": np.asarray(after["rows"]).reshape(SIDE, SIDE),
    "hierarchy, 8 steps": np.asarray(after["hierarchy"]).reshape(SIDE, SIDE),
    "the membrane": solved["a hole"],
}
for axis, (title, image) in zip(axes, shown.items(), strict=True):
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])
figure

# %% [markdown]
# ## Against biharmonic inpainting
#
# scikit-image minimizes bending rather than stretching: another objective, with another answer.
# For scattered pixels, the mean error against the true picture:

# %%
known = np.asarray(holes["90 % missing"].graph.local[0].a).reshape(SIDE, SIDE) > 0
rival = inpaint_biharmonic(np.where(known, picture, 0), ~known)
for name, image in [("membrane", solved["90 % missing"]), ("biharmonic", rival)]:
    print(f"{name}: {np.abs(image - picture)[~known].mean():.4f}")
