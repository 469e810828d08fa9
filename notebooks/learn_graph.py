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
# # Learning a graph
#
# A relaxation can be a layer of a model: what goes in holds the nodes, what comes out is the
# minimizer of an energy, and the energy is learned. `sg.relax` gives the minimizer's derivative by
# one linear solve, so the outer problem is plain optax.
#
# Here scikit-learn's digits (8 x 8, intensities in [0, 1]) with noise of standard deviation 0.25
# are denoised by a graph over their pixels. Learned are the couplings of neighbours, the contrast
# beyond which a coupling lets go, the pull of every pixel to a level of its own, and that level.
# Against it: the same energy with one coupling, one contrast and one pull for all, chosen as well
# as possible; what scikit-image offers; and the best linear filter, which knows how every pixel
# goes with every other.

# %%
# %matplotlib inline
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from skimage.filters import median
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle
from sklearn.datasets import load_digits

import smallgain_jax as sg
from smallgain_jax.tools import plots
from smallgain_jax.tools.telemetry import Table

NOISE = 0.25
images = load_digits().data.astype(np.float32) / 16
rng = np.random.default_rng(0)
order = rng.permutation(len(images))
train, validation, test = (images[order[a:b]] for a, b in ((0, 1200), (1200, 1400), (1400, 1797)))


def noisy(images, seed):
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=images.shape)
    return (images + noise).astype(np.float32)


seen = {"train": noisy(train, 1), "validation": noisy(validation, 2), "test": noisy(test, 3)}
mean = train.mean(axis=0)

# %% [markdown]
# ## The layer
#
# Neighbours are coupled along rows, columns and diagonals by
# $w_k c_k^2 \rho((x_i - x_j)^2 / c_k^2)$ with Huber's kernel: quadratic up to c, linear
# beyond, so that edges of a stroke cost less. A pixel is drawn to what was seen by $(x - y)^2$ and
# to its level $m$ by $p (x - m)^2$. What has to be positive is the exponential of a parameter.

# %%
pixel = np.arange(64).reshape(8, 8)
pairs = [
    (pixel[:, :-1], pixel[:, 1:]),
    (pixel[:-1], pixel[1:]),
    (pixel[:-1, :-1], pixel[1:, 1:]),
    (pixel[:-1, 1:], pixel[1:, :-1]),
]
i, j = (np.concatenate([pair[end].ravel() for pair in pairs]) for end in (0, 1))


huber = sg.Robust(lambda a, b, contrast: (a - b) / contrast, "huber")


class Denoiser(eqx.Module):
    """A picture in, the minimizer of a learned energy out."""

    log_coupling: jax.Array  # [E]
    log_contrast: jax.Array  # [E]
    log_pull: jax.Array  # [64]
    level: jax.Array  # [64]

    def graph(self, picture):
        coupling, contrast, pull = map(
            jnp.exp, (self.log_coupling, self.log_contrast, self.log_pull)
        )
        # the sum of the two Landau energies, completed to one square
        local = sg.Landau(1 + pull, target=(picture + pull * self.level) / (1 + pull))
        edges = sg.PairTerm(huber, i, j, coupling * contrast**2, params=contrast)
        return sg.EnergyGraph(local, edges)

    def __call__(self, picture):
        return sg.relax(self.graph(picture), jnp.clip(picture, 0, 1)).x


@eqx.filter_jit
def denoised(model, pictures):
    return jax.vmap(model)(pictures)


def rmse(found, truth):
    """Root mean square error, in units of the intensity."""
    return float(np.sqrt(np.mean((np.asarray(found) - truth) ** 2)))


# %% [markdown]
# ## Fixed: the best of a grid of settings
#
# One coupling, one contrast, one pull, the level the mean of the training images; chosen on the
# validation images, with and without the pull.


# %%
def fixed(coupling, contrast, pull):
    def full(size, value):
        return jnp.full(size, np.log(value), jnp.float32)

    return Denoiser(
        full(i.size, coupling), full(i.size, contrast), full(64, pull), jnp.asarray(mean)
    )


def error(settings):
    return rmse(denoised(fixed(*settings), seen["validation"]), validation)


NONE = 1e-6
grid = [(w, c) for w in (NONE, 0.03, 0.1, 0.3, 1.0, 3.0) for c in (0.03, 0.1, 0.3)]
plain = min(((*one, NONE) for one in grid), key=error)
best = min(((*one, pull) for one in grid for pull in (0.1, 0.3, 0.6)), key=error)
print(f"no pull: coupling {plain[0]:g}, contrast {plain[1]:g}: {error(plain):.4f}")
print(f"pull {best[2]:g}: coupling {best[0]:g}, contrast {best[1]:g}: {error(best):.4f}")

# %% [markdown]
# ## Learned
#
# The loss is the mean square error of 100 training images with new noise at every update. Adam
# outside, the relaxation inside; the gradient goes through the minimizer, not through the steps.

# %%
optimizer = optax.adam(0.1)


def loss(model, pictures, truth):
    return jnp.mean((jax.vmap(model)(pictures) - truth) ** 2)


@eqx.filter_jit
def step(model, state, pictures, truth):
    value, slope = eqx.filter_value_and_grad(loss)(model, pictures, truth)
    updates, state = optimizer.update(slope, state)
    return eqx.apply_updates(model, updates), state, value


start = time.perf_counter()
# from a coupling that is felt: one that is next to nothing has next to no derivative
model = fixed(max(best[0], 0.1), best[1], best[2])
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
history = []
for update in range(80):
    batch = rng.choice(len(train), 100, replace=False)
    model, state, value = step(model, state, noisy(train[batch], 100 + update), train[batch])
    history.append(float(value))
assert np.isfinite(history).all()
print(f"{len(history)} updates in {time.perf_counter() - start:.1f} s, compilation included")
first, last = np.sqrt(history[0]), np.sqrt(history[-1])
print(f"root mean square error {first:.4f} at the first, {last:.4f} at the last")

# %% [markdown]
# Whether those derivatives can be trusted: the adjoint system's solve, for one picture.

# %%
picture = jnp.asarray(seen["test"][0])
report = sg.adjoint_report(model.graph(picture), model(picture))
print(f"{int(report.free)} of 64 pixels free, {int(report.iterations)} iterations, "
      f"relative residual {float(report.residual):.0e}")  # fmt: skip
assert report.sound

# %% [markdown]
# ## Against what one would take today
#
# Each of scikit-image's methods with the best of five settings on the validation images. The linear
# filter is $\mu + \Sigma (\Sigma + \sigma^2 I)^{-1} (y - \mu)$ with the training images' covariance
# $\Sigma$, clipped to [0, 1]: the best that any linear method can do.

# %%
covariance = np.cov(train.T)
gain = covariance @ np.linalg.inv(covariance + NOISE**2 * np.eye(64))


def each(method, pictures):
    return np.stack([np.clip(method(p.reshape(8, 8)), 0, 1).ravel() for p in pictures])


def total_variation(weight, pictures):
    return each(partial(denoise_tv_chambolle, weight=weight), pictures)


def non_local_means(h, pictures):
    return each(partial(denoise_nl_means, h=h, patch_size=3, patch_distance=4), pictures)


def tuned(method, settings):
    errors = [rmse(method(s, seen["validation"]), validation) for s in settings]
    return partial(method, settings[int(np.argmin(errors))])


methods = {
    "noisy": lambda pictures: np.clip(pictures, 0, 1),
    "total variation": tuned(total_variation, (0.05, 0.1, 0.2, 0.3, 0.5)),
    "median of 3 x 3": partial(each, partial(median, mode="nearest")),
    "non-local means": tuned(non_local_means, (0.1, 0.2, 0.3, 0.4, 0.6)),
    "graph, one coupling": partial(denoised, fixed(*plain)),
    "graph, one coupling and pull": partial(denoised, fixed(*best)),
    "graph, learned": partial(denoised, model),
    "linear filter": lambda pictures: np.clip(mean + (pictures - mean) @ gain, 0, 1),
}
found = {name: np.asarray(method(seen["test"])) for name, method in methods.items()}
scores = {name: rmse(x, test) for name, x in found.items()}
ranked = sorted(scores, key=scores.get)
print(Table({"method": np.array(ranked), "rmse": np.round([scores[n] for n in ranked], 4)}))
assert scores["graph, learned"] < scores["graph, one coupling and pull"]
assert scores["graph, one coupling and pull"] < scores["noisy"]

# %% [markdown]
# Learning pays against the fixed graph and against methods that know nothing of digits. Against the
# linear filter it does not: 210 couplings of neighbours are not 2016 of all pairs, and neither is
# much work for 64 pixels. What a graph adds are the box, energies that no linear filter minimizes,
# and sizes at which a covariance does not fit.

# %%
figure = plots.new_figure(10, 4.2)
left, right = figure.subplots(1, 2)
weight = np.exp(np.asarray(model.log_coupling))
left.imshow(mean.reshape(8, 8), cmap="gray_r", alpha=0.35)
norm = weight / weight.max()
for a, b, width in zip(i, j, norm, strict=True):
    left.plot([a % 8, b % 8], [a // 8, b // 8], color="#0072B2", linewidth=4 * width, alpha=0.8)
left.set(xticks=[], yticks=[], title="learned couplings, over the mean digit")
right.plot(np.sqrt(history), color="#0072B2")
right.set(xlabel="update", ylabel="root mean square error", title="learning")
figure

# %%
shown = {"truth": test, "noisy": seen["test"], **{n: found[n] for n in list(methods)[1:]}}
figure = plots.new_figure(11, 5.2)
axes = figure.subplots(4, len(shown))
for row, number in zip(axes, range(4), strict=True):
    for axis, (name, batch) in zip(row, shown.items(), strict=True):
        axis.imshow(batch[number].reshape(8, 8), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        if number == 0:
            axis.set_title(name.replace(", ", ",\n"), fontsize="x-small")
figure
