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
# # Several tasks on one trunk, with Flax NNX
#
# One network reads a digit, says whether it is odd, and draws it again. The three losses have
# different units: two cross entropies, and a squared error per pixel. `small_gain` gives each the
# same share of the stability margin. Whether that pays is measured below.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import smallgain_jax as sg

# %%
digits = load_digits()
pixels = (digits.data / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
TRAINED, BATCH, STEPS, SEEDS = 1200, 128, 500, 3
RATES = (1e-3, 3e-3, 1e-2)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(64, 32, rngs=rngs)
        self.digit = nnx.Linear(32, 10, rngs=rngs)
        self.odd = nnx.Linear(32, 1, rngs=rngs)
        self.image = nnx.Linear(32, 64, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.trunk(x))
        return self.digit(h), self.odd(h)[:, 0], self.image(h)


def losses_of(model, x, label):
    digit, odd, image = model(x)
    return {
        "digit": jnp.mean(optax.softmax_cross_entropy_with_integer_labels(digit, label)),
        "parity": jnp.mean(optax.sigmoid_binary_cross_entropy(odd, label % 2)),
        "image": jnp.mean((image - x) ** 2),
    }


# %% [markdown]
# ## The change to a training loop
#
# The losses of a model are a function of it. `small_gain` needs them as a function of the
# parameters, which `nnx.merge` makes, and the batch. Nothing else in an NNX loop changes:
# `nnx.Optimizer` takes the wrapped optimizer, and passes `term_args` on.

# %%
GRAPH, _ = nnx.split(Network(nnx.Rngs(0)))
losses = sg.terms(
    lambda params, *batch: losses_of(nnx.merge(GRAPH, params), *batch),
    names=("digit", "parity", "image"),
)


def train_step(model, optimizer, *batch):
    def total(model):
        return sum(losses_of(model, *batch).values())

    value, gradient = nnx.value_and_grad(total)(model)
    optimizer.update(model, gradient, term_args=batch)
    return value


adam = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
METHODS = {"equal weights": adam, "fair shares": sg.small_gain(adam, losses, policy="fair")}
model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, METHODS["fair shares"], wrt=nnx.Param)
print("weights, in the optimizer's state:", optimizer.opt_state.weights[...])

# %% [markdown]
# ## Against equal weights
#
# The same step for both, as one scan. Adam with and without `small_gain`, each at every rate of one
# grid, and every run from the same starts with the same batches. What counts is measured on images
# not trained on.

# %%
held_out = jnp.asarray(pixels[TRAINED:]), jnp.asarray(labels[TRAINED:])


def outcome(model):
    """Percent of wrong digits, percent of wrong parities, root mean square error per pixel."""
    x, label = held_out
    digit, odd, image = model(x)
    return jnp.stack(
        [
            100 * jnp.mean(jnp.argmax(digit, axis=1) != label),
            100 * jnp.mean((odd > 0) != (label % 2 == 1)),
            jnp.sqrt(jnp.mean((image - x) ** 2)),
        ]
    )


def start(base, seed):
    model = Network(nnx.Rngs(seed))
    return nnx.split((model, nnx.Optimizer(model, base, wrt=nnx.Param)))


def make_training(graph):

    def one_update(state, chosen):
        model, optimizer = nnx.merge(graph, state)
        batch = jnp.asarray(pixels)[chosen], jnp.asarray(labels)[chosen]
        record = {"losses": losses.values(nnx.state(model), *batch)}
        train_step(model, optimizer, *batch)
        found = nnx.as_pure(optimizer.opt_state)
        if isinstance(found, sg.TrainingState):
            info = found.info
            record |= {
                "weights": found.weights,
                "share": info.share,
                "ratio": info.sharpness_ratio,
            }
        return nnx.state((model, optimizer)), record

    @jax.jit
    def train(state, rows, rate):
        model, optimizer = nnx.merge(graph, state)
        adam_state = getattr(optimizer.opt_state, "base_state", optimizer.opt_state)
        adam_state.hyperparams["learning_rate"][...] = rate
        state, history = jax.lax.scan(one_update, nnx.state((model, optimizer)), rows)
        return outcome(nnx.merge(graph, state)[0]), history

    return train


rows = [np.random.default_rng(k).integers(TRAINED, size=(STEPS, BATCH)) for k in range(SEEDS)]
runs = {}
print(f"held out, {SEEDS} seeds, median (lowest to highest)")
for name, base in METHODS.items():
    graphs, states = zip(*(start(base, seed) for seed in range(SEEDS)), strict=True)
    train = make_training(graphs[0])
    for rate in RATES:
        runs[name, rate] = [train(*each, rate) for each in zip(states, rows, strict=True)]
        found = np.array([result for result, _ in runs[name, rate]])
        low, middle, high = found.min(axis=0), np.median(found, axis=0), found.max(axis=0)
        print(
            f"{name:14s} rate {rate:<5g}  "
            f"digits wrong {middle[0]:4.1f} % ({low[0]:.1f} to {high[0]:.1f})  "
            f"parities wrong {middle[1]:4.1f} % ({low[1]:.1f} to {high[1]:.1f})  "
            f"pixel error {middle[2]:.3f} ({low[2]:.3f} to {high[2]:.3f})"
        )

# %% [markdown]
# It does not pay here: it trades. The shares take from the drawing and give to the parities, and
# what is gained there is lost in the image; for the digits the difference is within the spread of
# the seeds, and the plain Adam at its best rate is hard to beat. Where the three losses are wanted
# as they stand, leave the weights alone or tune them.
#
# The reason is in the figure (seed 0, Adam at 3e-3): a cross entropy that is being fitted loses its
# curvature, and its weight runs after it for as long as training lasts. The sharpness stays below
# the limit: margin was never scarce.

# %%
SHOWN = 3e-3
STYLES = {"digit": "C0-", "parity": "C1--", "image": "C2-."}
history = {name: runs[name, SHOWN][0][1] for name in METHODS}
mine = history["fair shares"]
priced = np.asarray(mine["ratio"]) > 0  # weights are held until second moments mean something
figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True, layout="constrained")
for k, loss in enumerate(losses.names):
    style = STYLES[loss]
    axes[0, 0].plot(np.where(priced, mine["share"][:, k], np.nan), style, label=loss)
    axes[1, 0].semilogy(mine["weights"][:, k], style, label=loss)
    for name, shade in (("equal weights", 0.45), ("fair shares", 1.0)):
        smooth = np.convolve(history[name]["losses"][:, k], np.ones(20) / 20, "valid")
        axes[1, 1].semilogy(
            np.arange(len(smooth)) + 20, smooth, style, alpha=shade, label=f"{loss}, {name}"
        )
axes[0, 0].set(ylabel="share of the total cost", ylim=(0, 1), title="shares")
axes[0, 1].semilogy(np.where(priced, mine["ratio"], np.nan), "k", label="fair shares")
axes[0, 1].axhline(1, color="k", linestyle=":", label="limit")
axes[0, 1].set(ylabel="sharpness / limit", title="margin")
axes[1, 0].set(xlabel="update", ylabel="weight", title="weights")
axes[1, 1].set(xlabel="update", ylabel="unweighted loss, mean of 20", title="losses")
for axis in axes.flat[:3]:
    axis.legend()
axes[1, 1].legend(fontsize="x-small", ncols=3)
