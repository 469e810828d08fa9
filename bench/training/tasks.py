"""Ten ordinary tasks whose losses are weighted as their author means them.

A reconstruction and its KL, a fit and its prior: their sum is the objective itself, in units that
fit each other, and an optimizer that moves the weights solves another problem. Each task is small,
trained by Adam at the best rate of the grid 1e-3, 3e-3, 1e-2, 3e-2 (by the median over three seeds,
`python -m bench.training.ordinary --policies plain --rates 1e-3 3e-3 1e-2 3e-2`; the Gaussian
process at the smallest that converges, the digits at one where other mini-batches change little),
and judged on held-out data by a positive figure, low is good.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bench.training.network import glorot, tanh_network

Batch = tuple[Any, ...]


class Task(NamedTuple):
    """A training task; everything random comes from the key of the seed."""

    losses: Callable[..., dict[str, jax.Array]]  # (params, *batch), summed as they are
    names: tuple[str, ...]
    data: Callable[[jax.Array], tuple[Any, Any]]  # key -> what is trained on, what is held out
    init: Callable[[jax.Array], Any]  # key -> params
    batch: Callable[[Any, jax.Array], Batch]  # data, key -> args of the losses at one step
    measure: Callable[[Any, Any], jax.Array]  # params, held out -> positive, low is good
    what: str  # the measure in words
    rate: float
    steps: int


def make(name: str) -> Task:
    """The task of that name."""
    return TASKS[name]()


def vae() -> Task:
    """Variational autoencoder on digits: Bernoulli reconstruction and KL, in nats per image."""

    def split(params: Any, x: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        mean, spread = jnp.split(tanh_network(params["encoder"], x), 2, axis=-1)
        z = mean + jnp.exp(spread) * jax.random.normal(key, mean.shape)
        logits = tanh_network(params["decoder"], z)
        kl = 0.5 * (mean**2 + jnp.exp(2 * spread) - 1) - spread
        fit = jax.nn.softplus(logits) - x * logits
        return {"reconstruction": jnp.sum(fit) / len(x), "kl": jnp.sum(kl) / len(x)}

    def init(key: jax.Array) -> Any:
        one, two = jax.random.split(key)
        return {"encoder": glorot(one, (64, 128, 16)), "decoder": glorot(two, (8, 128, 64))}

    def batch(data: Any, key: jax.Array) -> Batch:
        for_rows, for_noise = jax.random.split(key)
        return (_rows(for_rows, 64, data[0])[0], for_noise)

    return Task(
        losses=split,
        names=("reconstruction", "kl"),
        data=lambda _: _digits(),
        init=init,
        batch=batch,
        measure=lambda params, held: _total(split(params, held[0], jax.random.key(0))),
        what="negative evidence bound, nats",
        rate=3e-3,
        steps=3000,
    )


def heads_raw() -> Task:
    """One network for impedance (ohm) and phase (radian) of a circuit, in those units."""
    return _heads(scale=(1.0, 1.0), rate=1e-2)


def heads_scaled() -> Task:
    """The same heads, each in units of its own deviation."""
    return _heads(scale=(375.0, 0.32), rate=3e-3)


def _heads(scale: tuple[float, float], rate: float) -> Task:
    """Friedman 2 and 3 (*Multivariate adaptive regression splines*, 1991), noise a tenth."""

    def split(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        error = jnp.square(tanh_network(params, x) - y)
        return {"impedance": jnp.mean(error[:, 0]), "phase": jnp.mean(error[:, 1])}

    def sample(key: jax.Array) -> Batch:
        for_x, for_noise = jax.random.split(key)
        low = jnp.array([0.0, 40 * jnp.pi, 0.0, 1.0])
        high = jnp.array([100.0, 560 * jnp.pi, 1.0, 11.0])
        u = jax.random.uniform(for_x, (4000, 4))
        r, frequency, inductance, capacitance = (low[None] + (high - low)[None] * u).T
        reactance = frequency * inductance - 1 / (frequency * capacitance)
        y = jnp.stack([jnp.hypot(r, reactance), jnp.arctan2(reactance, r)], axis=1)
        noise = jnp.array([37.5, 0.032])[None] * jax.random.normal(for_noise, y.shape)
        return (2 * u - 1, (y + noise) / jnp.array(scale)[None])

    return Task(
        losses=split,
        names=("impedance", "phase"),
        data=lambda key: tuple(map(sample, jax.random.split(key))),
        init=lambda key: glorot(key, (4, 64, 64, 2)),
        batch=lambda data, key: _rows(key, 256, *data),
        measure=lambda params, held: _total(split(params, *held)),
        what="sum of squared errors",
        rate=rate,
        steps=3000,
    )


def gru() -> Task:
    """Next value of a noisy oscillation by a GRU; its slope as auxiliary task; weight decay."""

    def split(params: Any, path: jax.Array) -> dict[str, jax.Array]:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jax.vmap(params["cell"])(x, h)
            return h, tanh_network(params["heads"], h)

        start = jnp.zeros((path.shape[0], 32))
        seen = jnp.swapaxes(path, 0, 1)[:, :, None]
        _, outputs = jax.lax.scan(step, start, seen[:-1])
        # the state has nothing to go by before it has seen a few values
        error = (outputs - jnp.concatenate([seen[1:], seen[1:] - seen[:-1]], axis=-1))[5:]
        return {
            "next": jnp.mean(error[..., 0] ** 2),
            "slope": 0.1 * jnp.mean(error[..., 1] ** 2),
            "l2": 1e-5 * _squares(params),
        }

    def sample(key: jax.Array, rows: int) -> Batch:
        for_rate, for_phase, for_size, for_noise = jax.random.split(key, 4)
        rate = jax.random.uniform(for_rate, (rows, 2), minval=0.2, maxval=1.0)
        phase = jax.random.uniform(for_phase, (rows, 2), maxval=2 * jnp.pi)
        size = jax.random.uniform(for_size, (rows, 2), minval=0.3, maxval=1.0)
        time = jnp.arange(33.0)[None, :, None]
        path = jnp.sum(size[:, None] * jnp.sin(rate[:, None] * time + phase[:, None]), axis=-1)
        return (path + 0.05 * jax.random.normal(for_noise, path.shape),)

    def init(key: jax.Array) -> Any:
        one, two = jax.random.split(key)
        return {"cell": eqx.nn.GRUCell(1, 32, key=one), "heads": glorot(two, (32, 2))}

    def data(key: jax.Array) -> tuple[Any, Any]:
        one, two = jax.random.split(key)
        return sample(one, 512), sample(two, 256)

    return Task(
        losses=split,
        names=("next", "slope", "l2"),
        data=data,
        init=init,
        batch=lambda data, key: _rows(key, 32, *data),
        measure=lambda params, held: split(params, *held)["next"],
        what="squared error of the next value",
        rate=3e-2,
        steps=1500,
    )


def posterior() -> Task:
    """A numpyro model, schools of pupils, at its most probable point: likelihood and prior."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.util import log_density, transform_fn

    schools, rows = 12, 240

    def model(x: Any, school: Any, passed: Any = None) -> None:
        slope = numpyro.sample("slope", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        spread = numpyro.sample("spread", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("schools", schools):
            level = numpyro.sample("level", dist.Normal(0.0, spread))
        logits = x @ slope + level[school]
        with numpyro.plate("pupils", len(x)):
            numpyro.sample("passed", dist.Bernoulli(logits=logits), obs=passed)

    transforms = {"spread": dist.biject_to(dist.LogNormal(0.0, 0.5).support)}

    def split(params: Any, x: jax.Array, school: jax.Array, passed: jax.Array) -> dict[str, Any]:
        latent = transform_fn(transforms, params)
        _, trace = log_density(model, (x, school, passed), {}, latent)
        found = {
            name: jnp.sum(site["fn"].log_prob(site["value"]))
            for name, site in trace.items()
            if site["type"] == "sample"
        }
        likelihood = found.pop("passed")
        volume = transforms["spread"].log_abs_det_jacobian(params["spread"], latent["spread"])
        return {"likelihood": -likelihood, "prior": -sum(found.values()) - volume}

    def data(key: jax.Array) -> tuple[Any, Any]:
        for_x, for_level, for_slope, for_passed = jax.random.split(key, 4)
        x = jax.random.normal(for_x, (2 * rows, 4))
        school = jnp.arange(2 * rows) % schools
        level = jax.random.normal(for_level, (schools,))
        logits = x @ jax.random.normal(for_slope, (4,)) + level[school]
        passed = jax.random.bernoulli(for_passed, jax.nn.sigmoid(logits)).astype(x.dtype)
        everything = (x, school, passed)
        return tuple(a[:rows] for a in everything), tuple(a[rows:] for a in everything)

    def init(key: jax.Array) -> Any:
        one, two = jax.random.split(key)
        return {
            "slope": jax.random.uniform(one, (4,), minval=-2, maxval=2),
            "level": jax.random.uniform(two, (schools,), minval=-2, maxval=2),
            "spread": jnp.zeros(()),
        }

    return Task(
        losses=split,
        names=("likelihood", "prior"),
        data=data,
        init=init,
        batch=lambda data, _: data,
        measure=lambda params, held: jnp.exp(split(params, *held)["likelihood"] / len(held[0])),
        what="perplexity",
        rate=1e-2,
        steps=2000,
    )


def gaussian_process() -> Task:
    """Hyperparameters of a Gaussian process: data fit and log-determinant, per point."""

    def kernel(params: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        distance = (x[:, None] - z[None, :]) / jnp.exp(params["length"])
        return jnp.exp(2 * params["amplitude"] - 0.5 * distance**2)

    def factor(params: Any, x: jax.Array) -> jax.Array:
        noise = jnp.exp(2 * params["noise"]) + 1e-5
        return jnp.linalg.cholesky(kernel(params, x, x) + noise * jnp.eye(len(x)))

    def split(params: Any, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        root = factor(params, x)
        white = jax.scipy.linalg.solve_triangular(root, y, lower=True)
        constant = 0.5 * jnp.log(2 * jnp.pi)
        return {
            "fit": 0.5 * jnp.mean(white**2),
            "determinant": jnp.mean(jnp.log(jnp.diag(root))) + constant,
        }

    def measure(params: Any, held: Any) -> jax.Array:
        x, y, at, wanted = held
        root = factor(params, x)
        white = jax.scipy.linalg.solve_triangular(root, y, lower=True)
        cross = jax.scipy.linalg.solve_triangular(root, kernel(params, x, at), lower=True)
        variance = jnp.exp(2 * params["amplitude"]) - jnp.sum(cross**2, axis=0)
        variance = variance + jnp.exp(2 * params["noise"]) + 1e-5
        error = wanted - white @ cross
        density = -0.5 * (error**2 / variance + jnp.log(2 * jnp.pi * variance))
        return jnp.exp(-jnp.mean(density))

    def data(key: jax.Array) -> tuple[Any, Any]:
        for_x, for_noise = jax.random.split(key)
        x = jax.random.uniform(for_x, (160,), minval=-3, maxval=3)
        y = jnp.sin(3 * x) + 0.5 * x + 0.1 * jax.random.normal(for_noise, x.shape)
        return (x[:80], y[:80]), (x[:80], y[:80], x[80:], y[80:])

    return Task(
        losses=split,
        names=("fit", "determinant"),
        data=data,
        init=lambda _: {name: jnp.zeros(()) for name in ("length", "amplitude", "noise")},
        batch=lambda data, _: data,
        measure=measure,
        what="perplexity",
        rate=1e-2,
        steps=1000,
    )


def flow() -> Task:
    """A coupling flow of flowjax on two moons: negative log likelihood and weight decay."""
    from flowjax.bijections import Affine
    from flowjax.distributions import StandardNormal
    from flowjax.flows import coupling_flow
    from paramax import unwrap

    def whole(key: jax.Array) -> Any:
        return coupling_flow(
            key,
            base_dist=StandardNormal((2,)),
            transformer=Affine(),
            flow_layers=4,
            nn_width=32,
            nn_depth=1,
        )

    static = eqx.partition(whole(jax.random.key(0)), eqx.is_inexact_array)[1]

    def split(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        density = unwrap(eqx.combine(params, static)).log_prob(x)
        return {"likelihood": -jnp.mean(density), "decay": 1e-4 * _squares(params)}

    def sample(key: jax.Array) -> Batch:
        for_angle, for_noise = jax.random.split(key)
        angle = jax.random.uniform(for_angle, (4000,), maxval=jnp.pi)
        moon = jnp.arange(4000) % 2
        x = jnp.where(moon == 0, jnp.cos(angle), 1 - jnp.cos(angle)) - 0.5
        y = jnp.where(moon == 0, jnp.sin(angle), 0.5 - jnp.sin(angle)) - 0.25
        return (jnp.stack([x, y], axis=1) + 0.1 * jax.random.normal(for_noise, (4000, 2)),)

    return Task(
        losses=split,
        names=("likelihood", "decay"),
        data=lambda key: tuple(map(sample, jax.random.split(key))),
        init=lambda key: eqx.filter(whole(key), eqx.is_inexact_array),
        batch=lambda data, key: _rows(key, 256, *data),
        measure=lambda params, held: jnp.exp(split(params, *held)["likelihood"] / 2),
        what="perplexity per dimension",
        rate=3e-3,
        steps=2000,
    )


def autoencoder() -> Task:
    """Digits through an overcomplete code with an absolute-value penalty."""

    def split(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        code = jax.nn.relu(tanh_network(params["encoder"], x))
        error = tanh_network(params["decoder"], code) - x
        return {
            "reconstruction": jnp.mean(jnp.sum(error**2, axis=-1)),
            "sparsity": 0.02 * jnp.mean(jnp.sum(code, axis=-1)),
        }

    def init(key: jax.Array) -> Any:
        one, two = jax.random.split(key)
        return {"encoder": glorot(one, (64, 128)), "decoder": glorot(two, (128, 64))}

    return Task(
        losses=split,
        names=("reconstruction", "sparsity"),
        data=lambda _: _digits(),
        init=init,
        batch=lambda data, key: _rows(key, 64, data[0]),
        measure=lambda params, held: _total(split(params, held[0])),
        what="error and penalty",
        rate=3e-3,
        steps=3000,
    )


def regression() -> Task:
    """A sparse linear model by mini-batches, with both penalties of the elastic net."""

    def split(params: jax.Array, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
        return {
            "fit": 0.5 * jnp.mean(jnp.square(x @ params - y)),
            "l1": 0.05 * jnp.sum(jnp.abs(params)),
            "l2": 0.005 * jnp.sum(params**2),
        }

    def data(key: jax.Array) -> tuple[Any, Any]:
        for_x, for_truth, for_noise = jax.random.split(key, 3)
        x = jax.random.normal(for_x, (800, 100))
        truth = jnp.where(jnp.arange(100) < 10, jax.random.normal(for_truth, (100,)), 0)
        y = x @ truth + jax.random.normal(for_noise, (800,))
        return (x[:400], y[:400]), (x[400:], y[400:])

    return Task(
        losses=split,
        names=("fit", "l1", "l2"),
        data=data,
        init=lambda key: 0.1 * jax.random.normal(key, (100,)),
        batch=lambda data, key: _rows(key, 32, *data),
        measure=lambda params, held: split(params, *held)["fit"],
        what="half the squared error",
        rate=3e-3,
        steps=3000,
    )


def digits() -> Task:
    """Classification of digits, with weight decay as a loss."""

    def split(params: Any, x: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        scores = jax.nn.log_softmax(tanh_network(params, x))
        right = jnp.take_along_axis(scores, label[:, None], axis=1)
        return {"cross_entropy": -jnp.mean(right), "decay": 1e-3 * _squares(params)}

    return Task(
        losses=split,
        names=("cross_entropy", "decay"),
        data=lambda _: _digits(),
        init=lambda key: glorot(key, (64, 64, 10)),
        batch=lambda data, key: _rows(key, 256, *data),
        measure=lambda params, held: split(params, *held)["cross_entropy"],
        what="cross entropy",
        rate=3e-3,
        steps=2000,
    )


@cache
def _digits() -> tuple[Batch, Batch]:
    """Pixels in [0, 1] and labels, 1,400 to train on and 397 held out."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    both = (pixels[order].astype(np.float32) / 16, labels[order].astype(np.int32))
    return tuple(a[:1400] for a in both), tuple(a[1400:] for a in both)


def _rows(key: jax.Array, size: int, *arrays: Any) -> Batch:
    """The same `size` rows of each array, drawn with replacement."""
    rows = jax.random.randint(key, (size,), 0, len(arrays[0]))
    return tuple(jnp.asarray(a)[rows] for a in arrays)


def _squares(params: Any) -> jax.Array:
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def _total(losses: dict[str, jax.Array]) -> jax.Array:
    return sum(losses.values(), jnp.zeros(()))


TASKS: dict[str, Callable[[], Task]] = {
    "vae": vae,
    "heads_raw": heads_raw,
    "heads_scaled": heads_scaled,
    "gru": gru,
    "posterior": posterior,
    "gaussian_process": gaussian_process,
    "flow": flow,
    "autoencoder": autoencoder,
    "regression": regression,
    "digits": digits,
}
