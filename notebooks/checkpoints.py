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
# # Checkpoints, a change of optimizer, a change of rate, accumulation
#
# The weights of the losses live in the optimizer's state, a NamedTuple of arrays. So whatever saves
# an optax state saves them, and whatever wraps an optax optimizer wraps `small_gain`.

# %%
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp

import smallgain_jax as sg

rng = np.random.default_rng(0)
CHUNK, BATCH = 150, 32
chunks = jnp.asarray(rng.normal(size=(6, CHUNK, BATCH, 3)), jnp.float32)
start = {
    "in": jnp.asarray(rng.normal(size=(3, 16)) / 2, jnp.float32),
    "out": jnp.asarray(rng.normal(size=16) / 4, jnp.float32),
}


def losses_of(params, x):
    y = jnp.tanh(x @ params["in"]) @ params["out"]
    return {
        "fit": jnp.mean((y - jnp.sin(x[:, 0])) ** 2),
        "odd": 30 * jnp.mean((y + jnp.tanh(-x @ params["in"]) @ params["out"][::-1]) ** 2),
    }


losses = sg.terms(losses_of, names=("fit", "odd"))


def make_training(optimizer):
    """150 updates of `(params, state)`, and what happened."""

    def step(carry, x):
        params, state = carry
        values, pull = jax.vjp(lambda p: losses.values(p, x), params)
        updates, state = optimizer.update(pull(jnp.ones(2))[0], state, params, term_args=(x,))
        info = state.info
        record = (values, state.weights, info.sharpness_ratio, info.limit, info.guard)
        return (optax.apply_updates(params, updates), state), record

    return jax.jit(lambda carry, x: jax.lax.scan(step, carry, x))


history = []

# %% [markdown]
# ## Saved and restored
#
# 150 updates of gradient descent; then the parameters and the state go to disk, once by Equinox and
# once by Orbax, and come back into a freshly made state. All three copies go on for another 150.

# %%
sgd = sg.small_gain(optax.sgd(1e-2), losses, policy="fair")
advance_sgd = make_training(sgd)
carry, record = advance_sgd((start, sgd.init(start)), chunks[0])
history.append(record)

folder = Path(tempfile.mkdtemp())
fresh = (start, sgd.init(start))
eqx.tree_serialise_leaves(folder / "run.eqx", carry)
copies = {"Equinox": eqx.tree_deserialise_leaves(folder / "run.eqx", fresh)}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "run", carry)
    checkpointer.wait_until_finished()
    copies["Orbax"] = checkpointer.restore(folder / "run", fresh)

carry, record = advance_sgd(carry, chunks[1])
history.append(record)
print("weights of the run that was not interrupted:", carry[1].weights)
for name, copy in copies.items():
    copy, _ = advance_sgd(jax.tree.map(np.asarray, copy), chunks[1])
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *jax.device_get((copy, carry)))
    print(f"{name:8s} every bit of parameters and state the same: {all(jax.tree.leaves(same))}")

# %% [markdown]
# ## Another base optimizer
#
# The weights are worth keeping; costs, vectors and the counter of the warm-up belong to the metric
# of the old optimizer, and stay behind. So a new state is made, and gets the weights. The warm-up
# then holds them until Adam's second moments mean something.

# %%
RATE = 1e-2
base = optax.inject_hyperparams(optax.adam)(learning_rate=RATE)
adam = sg.small_gain(base, losses, policy="fair")
advance_adam = make_training(adam)

params, old = carry
new = adam.init(params)._replace(
    weights=old.weights, first_weights=old.first_weights, log_weights=old.log_weights
)
carry, record = advance_adam((params, new), chunks[2])
print(
    f"weights carried over {new.weights}, largest sharpness / limit {record[2].max():.2g}, "
    f"smallest guard {record[4].min():.2g}"
)
history.append(record)

# %% [markdown]
# ## Another rate
#
# `inject_hyperparams` inside of `small_gain` puts the rate into the state. The limit is read from
# there, so it follows.

# %%
carry, record = advance_adam(carry, chunks[3])
history.append(record)
params, state = carry
lower = jnp.float32(RATE / 10)
state = state._replace(base_state=optax.tree.set(state.base_state, learning_rate=lower))
carry, slower = advance_adam((params, state), chunks[4])
history.append(slower)
print(f"limit at rate {RATE:g}: {record[3][-1]:.0f}, at rate {RATE / 10:g}: {slower[3][-1]:.0f}")

# %%
values, weights, ratio, _, _ = (
    np.concatenate([np.asarray(record[k]) for record in history]) for k in range(5)
)
events = {150: "restart", 300: "Adam", 600: "rate / 10"}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
for k, (name, style) in enumerate(zip(losses.names, ("C0-", "C1--"), strict=True)):
    smooth = np.convolve(values[:, k], np.ones(10) / 10, "valid")
    axes[0].semilogy(np.arange(len(smooth)) + 10, smooth, style, label=name)
    axes[1].semilogy(weights[:, k], style, label=name)
# the measurements of gradient descent stay in no state while Adam warms up
axes[2].semilogy(np.where(ratio > 0, ratio, np.nan), "k", label="sharpness")
axes[2].axhline(1, color="k", linestyle=":", label="limit")
axes[0].set(ylabel="unweighted loss, mean of 10")
axes[1].set(ylabel="weight")
axes[2].set(ylabel="sharpness / limit", ylim=(3e-3, 5))
for axis in axes:
    axis.set(xlabel="update")
    axis.legend(loc="center left" if axis is axes[1] else "lower left")
    for at, event in events.items():
        axis.axvline(at, color="0.7", zorder=0)
        axis.text(at + 5, 1.01, event, transform=axis.get_xaxis_transform(), fontsize="small")

# %% [markdown]
# ## Accumulated gradients
#
# `MultiSteps(small_gain(...), k)` hands over a mean over k batches, which is no multiple of the
# last one's gradient: it cannot be reweighted. `small_gain(MultiSteps(...))` weighs every batch.
# The limit is that of the update it makes after k of them. Counts are of batches there, so `every`
# is k times as large.

# %%
K = 4
accumulating = optax.MultiSteps(optax.sgd(RATE), K)
patient = sg.small_gain(accumulating, losses, policy="fair", every=10 * K)
(_, state), record = make_training(patient)((start, patient.init(start)), chunks[5])
print(
    f"after {CHUNK} batches: {int(state.base_state.gradient_step)} updates, weights "
    f"{record[1][-1]}, sharpness / limit {record[2][-1]:.2f}"
)
