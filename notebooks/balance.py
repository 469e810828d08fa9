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
# # Balance of gradients: B-flow, Newton's second phase, and what they are good for
#
# For K losses with gradients $g_i$, $B = \|\sum_i g_i\|^2 / \sum_i \|g_i\|^2$ measures how far the
# gradients are from cancelling. B is 0 at every stationary point of the sum: minima, saddles and
# maxima alike.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from smallgain_jax.losses.balance import balance_flow, balance_residual
from smallgain_jax.losses.losses import terms
from smallgain_jax.losses.newton import balance_newton
from smallgain_jax.losses.two_phase import two_phase

jax.config.update("jax_enable_x64", True)


def descend(fn, optimizer, x, steps, args=()):
    """Parameters, state, and (loss, B) before each step."""
    losses = terms(fn, names=NAMES.get(fn))

    def step(carry, _):
        x, state = carry
        values, grads = losses.value_and_term_grads(x, *args)
        total = jax.tree.map(lambda g: g.sum(axis=0), grads)
        updates, state = optimizer.update(total, state, x, term_args=args)
        return (optax.apply_updates(x, updates), state), (values.sum(), balance_residual(grads))

    optimizer = optax.with_extra_args_support(optimizer)
    run = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), None, length=steps))
    (x, state), path = run(x)
    return x, state, path


NAMES = {}

# %% [markdown]
# ## The three problems
#
# Two parabolas, three paraboloids, and three Rastrigin losses whose sum has a grid of minima,
# saddles and maxima. Rates and steps are those of the seed. On the third, B has curvature about
# 1e4 at a minimum, so that gradient descent on it at the rate 0.01 is fifty times past its limit.


# %%
def pair(t):
    return (t - jnp.array([3.0, -2.0])) ** 2


def triple(x):
    return jnp.sum((x - jnp.array([[3.0, 1.0], [-1.0, 4.0], [1.0, -2.0]])) ** 2, axis=1)


def waves(x):
    gap = x - jnp.array([[2.0, 1.0], [-1.0, 3.0], [0.0, -2.0]])
    return jnp.sum(gap**2 + 5 * (1 - jnp.cos(2 * jnp.pi * gap)), axis=1)


problems = {
    "1D": (pair, jnp.array(-3.0), 0.5, 0.01, 200),
    "2D": (triple, jnp.array([-3.0, -3.0]), 0.5, 0.01 / 3, 500),
    "non-convex": (waves, jnp.array([3.0, 3.0]), 0.01, 0.001 / 3, 1000),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
for axis, (name, (fn, start, rate, loss_rate, steps)) in zip(axes, problems.items(), strict=True):
    loss = optax.sgd(loss_rate)
    methods = {
        "loss flow": loss,
        "B-flow": balance_flow(fn, rate),
        "Newton": balance_newton(fn),
        "two phases": two_phase(loss, balance_newton(fn), fn),
    }
    for method, optimizer in methods.items():
        x, state, (total, residual) = descend(fn, optimizer, start, steps)
        print(f"{name:11s} {method:11s} loss {total[-1]:9.4f}  B {residual[-1]:.1e}  at {x}")
        axis.plot(np.arange(1, steps + 1), np.maximum(residual, 1e-36), label=method)
    axis.set(xscale="log", yscale="log", title=name, xlabel="update")
axes[0].set_ylabel("B (zeros drawn at 1e-36)")
axes[0].legend()

# %% [markdown]
# ## A spurious zero
#
# At a maximum of the sum B is 0. Newton and B-flow stay; the two phases look for negative
# curvature, refuse, and leave along it.

# %%
top, _, _ = descend(waves, balance_newton(waves), jnp.array([0.49, 0.49]), 30)
optimizer = two_phase(optax.sgd(0.001 / 3), balance_newton(waves), waves)
for steps in (11, 100):
    x, state, (total, _) = descend(waves, optimizer, top, steps)
    info = state.info
    print(
        f"after {steps:3d}: at {x}, loss {waves(x).sum():.3f} (from {total[0]:.3f}), refused "
        f"{state.refused}, smallest curvature {info.smallest_curvature:.1f}, "
        f"certified {info.certified}"
    )

# %% [markdown]
# ## In use: the two-head digits network after Adam
#
# A tanh network 64-64-64 with a head for the digit and one for its parity, half squared errors, the
# first 1,000 images, full batch, float32. After 500 steps of Adam: more Adam, Newton on s = 0 by
# itself, or two phases. One Newton update costs about a hundred gradient passes.

# %%
data = load_digits()
label = data.target
x = jnp.asarray(data.data / 16 - 0.3, jnp.float32)
onehot = [jnp.asarray(np.eye(n, dtype=np.float32)[label % n]) for n in (10, 2)]
train = (x[:1000], onehot[0][:1000], onehot[1][:1000])
rng = np.random.default_rng(0)
widths = {"a": (64, 64), "b": (64, 64), "digit": (64, 10), "parity": (64, 2)}
params = {
    k: (jnp.asarray(rng.normal(size=s) / 8, jnp.float32), jnp.zeros(s[1], jnp.float32))
    for k, s in widths.items()
}


def outputs(p, x):
    def layer(name, x):
        return x @ p[name][0] + p[name][1]

    hidden = jnp.tanh(layer("b", jnp.tanh(layer("a", x))))
    return layer("digit", hidden), layer("parity", hidden)


def heads(p, x, digit, parity):
    of_digit, of_parity = outputs(p, x)
    squares = [jnp.sum((of_digit - digit) ** 2, axis=1), jnp.sum((of_parity - parity) ** 2, axis=1)]
    return 0.5 * jnp.mean(jnp.stack(squares), axis=1)


NAMES[heads] = ("digit", "parity")
losses = terms(heads, names=NAMES[heads])
adam = optax.adam(1e-3)
trained, _, (first, first_residual) = descend(heads, adam, params, 500, train)
newton = balance_newton(losses, iterations=20)
after = {
    "Adam": (adam, 1000),
    "Newton": (newton, 10),
    "two phases": (two_phase(adam, newton, losses, iterations=20, patience=3), 10),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for method, (optimizer, steps) in after.items():
    end, state, (total, residual) = descend(heads, optimizer, trained, steps, train)
    final = heads(end, *train)
    right = np.mean(np.argmax(outputs(end, x[1000:])[0], axis=1) == label[1000:])
    print(
        f"{method:10s} {steps:4d} updates: loss {first[-1]:.5f} -> {final.sum():.5f}, "
        f"B {residual[0]:.1e} -> {residual[-1]:.1e}, digits right on the rest {right:.3f}"
    )
    updates = np.arange(1, steps + 1)
    axes[0].plot(updates, total, label=method)
    axes[1].plot(updates, residual, label=method)
for axis, name in zip(axes, ("loss", "B"), strict=True):
    axis.set(xscale="log", yscale="log", xlabel="update after Adam's 500", ylabel=name)
axes[0].legend()
