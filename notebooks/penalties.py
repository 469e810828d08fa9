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
# # Sparsity penalties in use
#
# A penalty has a value, derivatives, and a diagonal that majorizes its Hessian. That makes it a
# local energy of a graph, a partner for least squares, and a loss of a model.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import smallgain_jax as sg
from smallgain_jax.penalties import (
    JumpReLU,
    LogSparsity,
    OnNodes,
    SmoothedL1,
    SoftmaxEntropy,
    TopK,
    jumprelu,
    reweighted_least_squares,
)

rng = np.random.default_rng(0)

# %% [markdown]
# ## A local energy
#
# A noisy signal with few jumps, on a chain. Edges couple neighbours, the penalty acts on the nodes;
# rows of `curvature` contain its majorizer. `OnNodes` says which scalar nodes make up a row.

# %%
n = 60
clean = np.where((np.arange(n) // 10) % 3 == 1, 1.0, 0.0)
noisy = clean + 0.25 * rng.normal(size=n)
chain = sg.Quadratic(np.arange(n - 1), np.arange(1, n), 0.3)
data = sg.Landau(a=np.full(n, 0.5), target=noisy)
penalties = {
    "log": LogSparsity(0.3, weight=0.05),
    "top 3 of each 10": OnNodes(TopK(3, weight=1.0), np.arange(n).reshape(-1, 10)),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
axes[0].plot(noisy, ".", color="0.6", label="data")
for name, penalty in penalties.items():
    graph = sg.EnergyGraph([data, penalty], chain)
    x0 = jnp.asarray(noisy, jnp.float32)
    result = sg.relax(graph, x0, steps=40, bounds=None)
    rows = graph.curvature(x0)
    print(
        f"{name:17s} lipschitz {rows.lipschitz:.2f}, penalty's rows up to "
        f"{penalty.majorizer_diagonal(x0).max():.2f}, largest rise "
        f"{max(0.0, float(jnp.diff(result.energy).max())):.1e}"
    )
    axes[0].plot(result.x, label=name)
    axes[1].plot(result.energy - result.energy.min() + 1e-8, label=name)
axes[0].legend()
axes[0].set(xlabel="node", ylabel="x")
axes[1].set(yscale="log", xlabel="update", ylabel="energy above its last")

# %% [markdown]
# ## Iteratively reweighted least squares
#
# 40 measurements of 100 unknowns, 6 of them not zero. The penalties are concave in the squares, so
# solving with the majorizer in their place never increases the objective.

# %%
matrix = rng.normal(size=(40, 100)) / 40**0.5
truth = np.zeros(100)
truth[rng.choice(100, 6, replace=False)] = rng.normal(size=6) * 2
target = matrix @ truth + 0.02 * rng.normal(size=40)
start = np.linalg.pinv(matrix) @ target
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
axes[1].stem(truth, linefmt="0.7", markerfmt="ko", basefmt=" ", label="truth")
for name, penalty in {
    "smoothed L1": SmoothedL1(1e-2, weight=0.05),
    "log": LogSparsity(5e-2, weight=0.01),
}.items():
    result = reweighted_least_squares(penalty, matrix, target, start, steps=60)
    values = np.asarray(result.values)
    print(
        f"{name:12s} largest rise {max(0.0, np.diff(values).max()):.1e}, error "
        f"{np.linalg.norm(result.x - truth) / np.linalg.norm(truth):.3f}, entries above 0.01: "
        f"{int((np.abs(result.x) > 0.01).sum())}"
    )
    axes[0].plot(np.arange(len(values)), values, label=name)
    axes[1].plot(result.x, "x", label=name)
axes[0].set(xlabel="solve", ylabel="objective", yscale="log", xscale="symlog", xlim=(0, None))
axes[1].set(xlabel="unknown")
axes[1].legend()

# %% [markdown]
# ## A sparse autoencoder on the digits
#
# One hidden layer of 48 codes. Either JumpReLU codes with learnable thresholds, priced by the
# JumpReLU penalty, or 12 rows of four softmax codes priced by their entropy. Decoder rows have norm
# one, or the penalty would be evaded by scaling. 400 images, full batch, Adam at 3e-3, 300 updates,
# the same start for all; figures are on 600 images not trained on.
#
# "Active" counts the codes above their threshold; for softmax codes it is the sum over rows of
# exp(entropy), between 12 and 48.

# %%
CODES, STEPS = 48, 300
JUMP = JumpReLU(np.full(CODES, 0.3), 0.1)
ENTROPY = SoftmaxEntropy(4, 0.5)
NAMES = ("reconstruction", "sparsity")
images = (load_digits().data / 16).astype(np.float32)
mean_image = images[:400].mean(axis=0)
train, held_out = jnp.asarray(images[:400]), jnp.asarray(images[600:1200])


def codes_of(kind, params, x):
    """Codes, their price per image, and how many are active per image."""
    z = (x - params["mean"]) @ params["encoder"] + params["bias"]
    if kind == "JumpReLU":
        penalty = JUMP.with_log_parameters(params["log_thresholds"])
        tau = penalty.effective_thresholds
        return jumprelu(z, tau, JUMP.eps), penalty(z) / len(x), jnp.sum(z > tau) / len(x)
    rows = z.reshape(len(x), -1, ENTROPY.num_atoms)
    a = jax.nn.softmax(rows / ENTROPY.temperature)
    number = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(a, a), axis=-1))
    return a.reshape(z.shape), ENTROPY(rows) / len(x), jnp.sum(number) / len(x)


def measured(kind, params, x):
    codes, price, active = codes_of(kind, params, x)
    decoder = params["decoder"] / jnp.linalg.norm(params["decoder"], axis=1, keepdims=True)
    scale = 1.0 if kind == "JumpReLU" else params["scale"]
    error = jnp.sum((scale * codes @ decoder + params["mean"] - x) ** 2) / len(x)
    return {"reconstruction": error, "sparsity": price}, active


def initial():
    draw = np.random.default_rng(1).normal(size=(64, CODES)) / 8
    params = {
        "encoder": draw,
        "decoder": draw.T,
        "bias": np.zeros(CODES),
        "mean": mean_image,
        "log_thresholds": np.zeros(CODES),
        "scale": np.ones(()),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def outcome(kind, params):
    losses, active = measured(kind, params, held_out)
    return losses["reconstruction"], active


def fit(kind, optimizer, weights):
    """Adam, wrapped or not, on the sum of the losses under `weights`."""
    model = sg.terms(lambda p, x: measured(kind, p, x)[0], names=NAMES)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: weights @ model.values(p, train))(params)
        updates, state = optimizer.update(gradient, state, params, term_args=(train,))
        return (optax.apply_updates(params, updates), state), None

    params = initial()
    (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    return params, state


def fixed_weights(kind, strengths):
    """Reconstruction and active codes for each fixed weight of the penalty."""

    def one(strength):
        params, _ = fit(kind, optax.adam(3e-3), jnp.stack([jnp.ones(()), strength]))
        return outcome(kind, params)

    return jax.jit(jax.vmap(one))(jnp.asarray(strengths, jnp.float32))


def shares(kind, priorities):
    """The same for shares of the margin that are each of `priorities` to one, and the weights."""
    model = sg.terms(lambda p, x: measured(kind, p, x)[0], names=NAMES)

    def one(priority):
        optimizer = sg.small_gain(
            *(optax.adam(3e-3), model),
            policy="fair",
            priorities=jnp.stack([jnp.ones(()), priority]),
            warmup=50,
        )
        params, state = fit(kind, optimizer, jnp.ones(2))
        return *outcome(kind, params), state.weights[1] / state.weights[0]

    # in turn: one program for all
    return jax.jit(lambda p: jax.lax.map(one, p))(jnp.asarray(priorities, jnp.float32))


SWEEPS = {
    "JumpReLU": ((0.03, 0.1, 0.3, 1.0), (0.003, 0.03, 0.1)),
    "softmax entropy": ((0.01, 0.1, 0.3, 1.0), (0.01, 0.1, 1.0)),
}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for axis, (kind, (strengths, priorities)) in zip(axes, SWEEPS.items(), strict=True):
    error, active = fixed_weights(kind, strengths)
    for row in zip(strengths, active, error, strict=True):
        print("{}: weight {:<5g}           active {:5.2f}  error {:.3f}".format(kind, *row))
    axis.plot(active, error, "o-", label="fixed weight")
    error, active, ratio = shares(kind, priorities)
    for row in zip(priorities, active, error, ratio, strict=True):
        print(
            "{}: priority {:<5g}         active {:5.2f}  error {:.3f}  "
            "(weight became {:.3g})".format(kind, *row)
        )
    axis.plot(active, error, "s--", label="small_gain")
    axis.set(title=kind, xlabel="mean active codes of 48", ylabel="squared error per image")
axes[0].legend()
