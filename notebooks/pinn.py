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
# # A physics-informed network
#
# A network is trained on the residual of a differential equation and on its boundary values. Both
# losses are means of squares, but one has second derivatives in it: it is the stiffer one, and
# takes most of the stability margin. `small_gain` gives each loss an equal share.

# %%
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import smallgain_jax as sg

# %% [markdown]
# ## The problem
#
# $u_{xx} + u_{yy} + u = q$ on $[-1, 1]^2$ with $u = 0$ on the boundary, and $q$ such that
# $u = \sin(\pi x) \sin(2 \pi y)$. Points are drawn afresh at every update.

# %%
POINTS, STEPS, RATE, SEEDS = 64, 1200, 2e-3, 3


def exact(x):
    return jnp.sin(jnp.pi * x[..., 0]) * jnp.sin(2 * jnp.pi * x[..., 1])


def second_derivative(fn, x, along):
    """Forward mode over forward mode."""

    def slope(x):
        return jax.jvp(fn, (x,), (along,))[1]

    return jax.jvp(slope, (x,), (along,))[1]


def make_model(seed):
    return eqx.nn.MLP(2, "scalar", 32, 3, jnp.tanh, key=jax.random.key(seed))


# what has no gradient (the activation) stays outside of the parameters
_, STATIC = eqx.partition(make_model(0), eqx.is_inexact_array)


def losses_of(params, inside, boundary, units=(1.0, 1.0)):
    model = eqx.combine(params, STATIC)

    def residual(x):
        bent = jax.vmap(lambda along: second_derivative(model, x, along))(jnp.eye(2))
        return jnp.sum(bent) + model(x) - (1 - 5 * jnp.pi**2) * exact(x)

    return {
        "residual": units[0] * jnp.mean(jax.vmap(residual)(inside) ** 2),
        "boundary": units[1] * jnp.mean(jax.vmap(model)(boundary) ** 2),
    }


def draw(key):
    """Uniform points [64, 2] inside and [64, 2] on the four sides."""
    for_inside, for_boundary, for_side = jax.random.split(key, 3)
    inside, boundary = (
        jax.random.uniform(k, (POINTS, 2), minval=-1, maxval=1) for k in (for_inside, for_boundary)
    )
    side = jax.random.randint(for_side, (POINTS,), 0, 4)
    pinned = jnp.arange(2)[None, :] == (side // 2)[:, None]
    return inside, jnp.where(pinned, (2.0 * (side % 2) - 1)[:, None], boundary)


losses = sg.terms(losses_of, names=("residual", "boundary"))

# %% [markdown]
# ## Three ways to weigh the losses
#
# All are wrapped around the same Adam, at the same rate, with the same starts and points: equal
# weights; the learning-rate annealing of Wang, Teng and Perdikaris (SISC 2021, algorithm 1), which
# compares the largest gradient of the residual with the mean gradient of the boundary loss at every
# update; and shares of the margin.


# %%
class AnnealingState(NamedTuple):
    weights: jax.Array  # [2]
    base_state: Any


def annealing(base, decay=0.9):
    def init(params):
        return AnnealingState(jnp.ones(2), base.init(params))

    def update(updates, state, params=None, *, term_args):
        _, grads = losses.value_and_term_grads(params, *term_args)
        sizes = [jnp.abs(g).reshape(2, -1) for g in jax.tree.leaves(grads)]
        sizes = jnp.concatenate(sizes, axis=1)
        aim = sizes[0].max() / jnp.maximum(state.weights[1] * sizes[1].mean(), 1e-30)
        weights = decay * state.weights + (1 - decay) * jnp.stack([jnp.ones(()), aim])
        mixed = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads)
        updates, base_state = base.update(mixed, state.base_state, params)
        return updates, AnnealingState(weights, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


OPTIMIZERS = {
    "equal weights": optax.with_extra_args_support(optax.adam(RATE)),
    "annealing": annealing(optax.adam(RATE)),
    "small_gain": sg.small_gain(optax.adam(RATE), losses, policy="fair"),
}

# %% [markdown]
# The loop is the one that a single loss would have. The optimizer gets the gradient of the plain
# sum, and the batch as `term_args`.

# %%
side = np.linspace(-1, 1, 48)
grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).astype(np.float32)


def error_of(params):
    """Relative L2 error on the grid, and the error itself."""
    model = eqx.combine(params, STATIC)
    points = jnp.asarray(grid.reshape(-1, 2))
    error = jax.vmap(model)(points) - exact(points)
    return jnp.linalg.norm(error) / jnp.linalg.norm(exact(points)), error.reshape(48, 48)


def make_training(optimizer):
    def step(units, carry, key):
        params, state = carry
        batch = (*draw(key), units)
        values, pull = jax.vjp(lambda p: losses.values(p, *batch), params)
        (gradient,) = pull(jnp.ones(2))
        updates, state = optimizer.update(gradient, state, params, term_args=batch)
        record = {"losses": values, "weights": optax.tree.get(state, "weights", jnp.ones(2))}
        if isinstance(state, sg.TrainingState):
            record |= {"share": state.info.share, "ratio": state.info.sharpness_ratio}
        return (optax.apply_updates(params, updates), state), record

    def train(params, key, units):
        keys = jax.random.split(key, STEPS)
        start = params, optimizer.init(params)
        (params, _), history = jax.lax.scan(partial(step, units), start, keys)
        return params, error_of(params), history

    return jax.jit(train)


runs, trains = {}, {}
print(f"relative L2 error after {STEPS} updates, {SEEDS} seeds")
for name, optimizer in OPTIMIZERS.items():
    trains[name] = make_training(optimizer)
    runs[name] = [
        trains[name](
            eqx.filter(make_model(seed), eqx.is_inexact_array),
            jax.random.key(100 + seed),
            (1.0, 1.0),
        )
        for seed in range(SEEDS)
    ]
    errors = np.array([error for _, (error, _), _ in runs[name]])
    each = "  ".join(f"{error:.3f}" for error in errors)
    print(f"{name:14s} median {np.median(errors):.3f}   each {each}")

# %% [markdown]
# On this problem shares of the margin do what annealing does, without a gradient of each loss at
# every update, and both are clearly better than equal weights. Read the figures with care: the
# error of a single run varies by about a factor of two, even with the last digit of a weight
# (`bench/README.md`), so neither of the two is shown to be better here. There is one rate for all,
# which nobody tuned.
#
# ## In other units
#
# A loss in another unit is the same loss times a constant. Equal weights would solve another
# problem then. Shares do not notice: their first weights come from the curvatures on the first
# batch, and everything after is relative to them.

# %%
UNITS = (1e3, 1e-3)
start = eqx.filter(make_model(0), eqx.is_inexact_array)
_, (error, _), _ = trains["small_gain"](start, jax.random.key(100), UNITS)
before = runs["small_gain"][0][1][0]
print(f"seed 0, residual and boundary times {UNITS}: {error:.3f}, before {before:.3f}")

# %% [markdown]
# ## Where the margin goes
#
# Seed 0. The costs are curvatures in Adam's own metric, and the limit is 38 / rate; they are
# estimates from below. The first weights, from the curvatures on the first batch, are held for 100
# updates, until second moments mean something; then they move by shares, to a ratio like that of
# the annealing. Where the sharpness is well below the limit, a larger rate would be stable.

# %%
STYLES = {"equal weights": "C0-", "annealing": "C1--", "small_gain": "C2-."}
history = {name: found[0][2] for name, found in runs.items()}
ratio = np.asarray(history["small_gain"]["ratio"])
priced = ratio > 0  # the weights are held until second moments mean something
figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True, layout="constrained")
for k, loss in enumerate(losses.names):
    share = np.where(priced, history["small_gain"]["share"][:, k], np.nan)
    axes[0, 0].plot(share, "-" if k == 0 else "--", label=loss)
axes[0, 0].set(ylabel="share of the total cost", ylim=(0, 1), title="small_gain: shares")
axes[0, 0].legend()
axes[0, 1].semilogy(np.where(priced, ratio, np.nan), "C2", label="small_gain")
axes[0, 1].axhline(1, color="k", linestyle=":", label="limit")
axes[0, 1].set(ylabel="sharpness / limit", title="small_gain: margin")
axes[0, 1].legend()
for name in OPTIMIZERS:
    weights = history[name]["weights"]
    axes[1, 0].semilogy(weights[:, 1] / weights[:, 0], STYLES[name], label=name)
    smooth = np.stack(
        [np.convolve(history[name]["losses"][:, k], np.ones(50) / 50, "valid") for k in (0, 1)]
    )
    for k, width in ((0, 0.9), (1, 2.2)):
        axes[1, 1].semilogy(
            np.arange(smooth.shape[1]) + 50,
            smooth[k],
            STYLES[name],
            linewidth=width,
            label=f"{name}, {losses.names[k]}",
        )
axes[1, 0].set(xlabel="update", ylabel="weight of boundary / residual", title="weights")
axes[1, 0].legend()
axes[1, 1].set(xlabel="update", ylabel="unweighted loss, mean of 50", title="losses")
axes[1, 1].legend(fontsize="x-small", ncols=2)

# %% [markdown]
# ## Solution and error
#
# Seed 0 again, all errors on one scale.

# %%
figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
errors = {name: np.asarray(found[0][1][1]) for name, found in runs.items()}
most = max(np.abs(error).max() for error in errors.values())
extent = (-1, 1, -1, 1)
picture = axes[0].imshow(np.asarray(exact(grid)).T, origin="lower", extent=extent, cmap="cividis")
axes[0].set(title="exact solution u", xlabel="x", ylabel="y")
figure.colorbar(picture, ax=axes[0])
for axis, (name, error) in zip(axes[1:], errors.items(), strict=True):
    picture = axis.imshow(
        error.T, origin="lower", extent=extent, cmap="RdBu_r", vmin=-most, vmax=most
    )
    axis.set(title=f"error, {name}", xlabel="x")
figure.colorbar(picture, ax=axes[1:], label="network - u")

# %% [markdown]
# ## With what else is usual
#
# Three things that are often combined with weights of losses, on a wave that travels:
# $u_t + 5 u_x = 0$ for $t \in [0, 1]$, periodic in x, from $u = \sin x$.
#
# - **Causal weights** (Wang, Sankaran and Perdikaris 2022) stand inside of the residual's loss: the
#   residual at a time counts by $\exp(-\epsilon \cdot \text{residuals before it})$. They only ask
#   which times come first, not how the residual compares with the initial condition; that is what
#   shares do.
# - **Priorities over time**: a function of the number of updates. Here the initial condition
#   has nine tenths of the total cost at first, and half of it after 400 updates.
# - **A batch of its own for the curvature**: `curvature_args`, here a quarter of the points.

# %%
SLICES, SPEED, TRAVEL_STEPS = 8, 5.0, 1000


def make_wave(seed):
    return eqx.nn.MLP(3, "scalar", 32, 3, jnp.tanh, key=jax.random.key(seed))


_, WAVE = eqx.partition(make_wave(0), eqx.is_inexact_array)


def travelling(params, t, x, causal=0.0):
    """`t` and `x` are points [slices, points], slice by slice in time."""
    model = eqx.combine(params, WAVE)

    def u(t, x):
        return model(jnp.stack([t, jnp.cos(x), jnp.sin(x)]))

    def residual(t, x):
        along = jnp.ones(()), SPEED * jnp.ones(())
        return jax.jvp(u, (t, x), along)[1]

    by_slice = jnp.mean(jax.vmap(jax.vmap(residual))(t, x) ** 2, axis=1)
    before = jnp.cumsum(by_slice) - by_slice
    counts = jax.lax.stop_gradient(jnp.exp(-causal * before))
    start = jax.vmap(u)(jnp.zeros_like(x[0]), x[0]) - jnp.sin(x[0])
    return {"residual": jnp.mean(counts * by_slice), "start": jnp.mean(start**2)}


def start_first(count):
    return {"start": jnp.where(count < 400, 9.0, 1.0)}


def travel(priorities, causal, part):
    wave = sg.terms(partial(travelling, causal=causal), names=("residual", "start"))
    optimizer = sg.small_gain(optax.adam(RATE), wave, policy="fair", priorities=priorities)

    def step(carry, key):
        params, state = carry
        for_t, for_x = jax.random.split(key)
        within = jax.random.uniform(for_t, (SLICES, 16))
        t = (jnp.arange(SLICES)[:, None] + within) / SLICES
        x = jax.random.uniform(for_x, (SLICES, 16), maxval=2 * jnp.pi)
        gradient = jax.grad(lambda p: jnp.sum(wave.values(p, t, x)))(params)
        small = (t[:, :part], x[:, :part])
        updates, state = optimizer.update(
            gradient, state, params, term_args=(t, x), curvature_args=small
        )
        return (optax.apply_updates(params, updates), state), state.info.share

    @jax.jit
    def run(seed_params, key):
        carry = seed_params, optimizer.init(seed_params)
        (params, _), shares = jax.lax.scan(step, carry, jax.random.split(key, TRAVEL_STEPS))
        model = eqx.combine(params, WAVE)
        t, x = jnp.meshgrid(jnp.linspace(0, 1, 32), jnp.linspace(0, 2 * jnp.pi, 32))
        found = jax.vmap(jax.vmap(lambda t, x: model(jnp.stack([t, jnp.cos(x), jnp.sin(x)]))))(t, x)
        truth = jnp.sin(x - SPEED * t)
        return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth), shares

    return run


WAYS = {
    "shares alone": travel(None, causal=0.0, part=16),
    "with all three": travel(start_first, causal=1.0, part=4),
}
first = eqx.filter(make_wave(0), eqx.is_inexact_array)
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
for style, (name, run) in zip(("C0-", "C1--"), WAYS.items(), strict=True):
    error, shares = run(first, jax.random.key(7))
    print(f"{name:14s} relative L2 error {error:.3f}")
    axis.plot(np.arange(100, TRAVEL_STEPS), shares[100:, 1], style, label=name)  # priced by then
axis.set(xlabel="update", ylabel="share of the start", ylim=(0, 1), title="the start's share")
axis.legend()

# %% [markdown]
# The figure shows that the share follows its priority. One seed says nothing of which is better;
# all of it runs together.
