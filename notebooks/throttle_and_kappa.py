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
# # Throttle and kappa: a learning rate far too high, a corrupted batch, a shift
#
# Two Lipschitz constants matter: that of the gradient field decides whether training is stable, and
# that of the network how far an input's error can travel. `throttle` watches the first, along
# the path; `kappa_budget` keeps a bound of the second below `l_max`. In one line, the step is
# a projection of $\theta - \alpha\,\eta\,G$.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

from smallgain_jax.networks.certificate import lipschitz_certificate, lipschitz_lower_bound
from smallgain_jax.networks.kappa import kappa_budget
from smallgain_jax.throttling import throttle

# %% [markdown]
# The digits of scikit-learn, a tanh network, half the squared error, the full batch of 1,000 rows.
# At step 200 one batch is a thousand times too large, and from step 350 on every input is shifted
# and stretched.

# %%
data = load_digits()
x = (data.data / 16 - 0.3).astype(np.float32)
y = np.eye(10, dtype=np.float32)[data.target]
STEPS, SPIKE, SHIFT = 600, 200, 350


def start(seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(64, 64), (64, 64), (64, 64), (10, 64)]

    def draw(shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)

    return [{"w": draw(shape), "b": np.zeros(shape[0], np.float32)} for shape in sizes]


def model(params, inputs):
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["w"].T + layer["b"])
    return inputs @ params[-1]["w"].T + params[-1]["b"]


def loss(params, inputs, targets):
    return 0.5 * jnp.mean(jnp.sum((model(params, inputs) - targets) ** 2, axis=1))


# %%
def train(optimizer, record):
    optimizer = optax.with_extra_args_support(optimizer)

    def run(params, x, y):
        def step(carry, t):
            params, state = carry
            inputs = jnp.where(t == SPIKE, 1000 * x, jnp.where(t >= SHIFT, 1.5 * x + 0.5, x))
            value, grads = jax.value_and_grad(loss)(params, inputs, y)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), (value, record(state))

        carry = (params, optimizer.init(params))
        (params, _), history = jax.lax.scan(step, carry, jnp.arange(STEPS))
        return params, history

    return jax.jit(run)(start(), x[:1000], y[:1000])


RATE = 4.0
both = optax.chain(throttle(optax.sgd(RATE), RATE), kappa_budget(4.0))
runs = {
    "plain, rate 0.1": train(optax.sgd(0.1), lambda state: ()),
    "plain, rate 4": train(optax.sgd(RATE), lambda state: ()),
    "throttle, rate 4": train(throttle(optax.sgd(RATE), RATE), lambda state: ()),
    "throttle and kappa, rate 4": train(both, lambda state: (state[0], state[1].info)),
}

# %%
params, (_, (control, info)) = runs["throttle and kappa, rate 4"]
figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
for name, (_, (value, _)) in runs.items():
    axes[0, 0].semilogy(np.where(np.isfinite(value), value, np.nan), label=name)
axes[0, 0].set(title="loss", ylim=(1e-2, 1e4))
axes[0, 0].legend()
axes[0, 1].semilogy(control.alpha)
axes[0, 1].set(title=r"$\alpha_t$")
axes[1, 0].semilogy(control.gradient_lipschitz, label=r"$C_t$")
axes[1, 0].semilogy(control.gradient_lipschitz_ema, label="its average")
axes[1, 0].set(title="secant", xlabel="step")
axes[1, 0].legend()
for layer in range(4):
    axes[1, 1].plot(info.bounds[:, layer], label=f"layer {layer + 1}")
axes[1, 1].plot(np.prod(info.bounds, axis=1), "k", label="product")
axes[1, 1].set(title=r"certified gains, $l_{\max} = 4$", xlabel="step")
axes[1, 1].legend()
for axis in axes.flat:
    for event in (SPIKE, SHIFT):
        axis.axvline(event, color="0.8", zorder=0)

# %% [markdown]
# The plain rate of 4 is lost within a few steps. The throttled one finds its factor in the first
# ten and keeps it until the gradient grows: at the corrupted batch, whose curvature shows in the
# secant, and at the shift, after which the network is stiffer. The gains stay below their budget
# throughout.
#
# What the certificate says of the trained network, and what a search over inputs finds:

# %%
certificate = lipschitz_certificate(params, activations="tanh")
found = jax.jit(lambda p, x: lipschitz_lower_bound(lambda one: model(p, one), x))(params, x[:16])
print(f"{found.lower:.3f} <= Lipschitz constant <= {certificate.upper:.3f}")
