"""Inside other people's training loops. What does not work yet is marked, with the reason.

Each loop is the one of the library's own tutorial. `fair` is the policy, since it leaves a trace:
weights that moved by prices of the very batch, which the transformation must have been given.
"""

from copy import copy
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.losses.small_gain import STATIC

pytestmark = pytest.mark.once
STEPS = 30
X = np.linspace(-2, 2, 32, dtype=np.float32)[:, None]
Y = np.sin(2 * X[:, 0])
NAMES = ("fit", "stiff")


def losses_of(y, x):
    return {"fit": jnp.mean((y - jnp.sin(2 * x[:, 0])) ** 2), "stiff": 30 * jnp.mean(y[:3] ** 2)}


def linear(params, x):
    """Losses of a model small enough for the loops that are not about models."""
    return losses_of(x @ params["w"] + params["b"], x)


START = {"w": jnp.ones(1), "b": jnp.zeros(())}
LINEAR = sg.terms(linear, names=NAMES)


def fair(losses, **settings):
    return sg.small_gain(
        optax.adam(1e-2), losses, **(dict(policy="fair", warmup=3, every=1) | settings)
    )


def total(losses, *args):
    return sum(losses(*args).values())


def weights_in(state):
    found = optax.tree.get(state, "weights")
    return np.asarray(found)


def assert_weighed(state):
    """The terms were seen: their weights moved, and stayed finite."""
    weights = weights_in(state)
    assert np.all(np.isfinite(weights))
    assert not np.allclose(weights, 1)


def assert_trained(state, before, after):
    assert_weighed(state)
    assert np.isfinite(after)
    assert after < before


# Equinox


def mlp():
    return eqx.nn.MLP(1, "scalar", 8, 1, key=jax.random.key(0))


def losses_of_model(model, x):
    return losses_of(jax.vmap(model)(x), x)


def test_equinox_with_the_model_split():
    params, static = eqx.partition(mlp(), eqx.is_inexact_array)

    def split(params, x):
        return losses_of_model(eqx.combine(params, static), x)

    optimizer = fair(sg.terms(split, names=NAMES))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: total(split, p, x))(params)
        updates, state = optimizer.update(grads, state, params, term_args=(x,))
        return eqx.apply_updates(params, updates), state

    before = total(split, params, X)
    for _ in range(STEPS):
        params, state = step(params, state, X)
    assert_trained(state, before, total(split, params, X))


def test_equinox_as_in_its_tutorial_with_the_losses_made_in_the_step():
    """`filter` leaves holes for what is no array; the losses fill them from the model at hand."""
    model = mlp()

    def make(model, x):
        _, static = eqx.partition(model, eqx.is_inexact_array)
        return fair(lambda params: losses_of_model(eqx.combine(params, static), x))

    state = make(model, X).init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x):
        grads = eqx.filter_grad(lambda m: total(losses_of_model, m, x))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = make(model, x).update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    before = total(losses_of_model, model, X)
    for _ in range(STEPS):
        model, state = step(model, state, X)
    assert_trained(state, before, total(losses_of_model, model, X))


def test_equinox_with_the_whole_model_as_params_says_what_to_do():
    optimizer = fair(sg.terms(losses_of_model, names=NAMES))
    with pytest.raises(TypeError, match=r"no gradient.*eqx\.partition"):
        optimizer.init(mlp())


def test_equinox_losses_of_a_model_with_holes_say_what_to_do():
    model = mlp()
    params = eqx.filter(model, eqx.is_inexact_array)
    optimizer = fair(sg.terms(losses_of_model, names=NAMES))
    state = optimizer.init(params)
    with pytest.raises(TypeError, match=r"eqx\.combine"):
        optimizer.update(params, state, params, term_args=(X,))


def test_a_counter_among_the_parameters_is_named():
    """`eqx.filter(model, eqx.is_array)`, as many tutorials have it, keeps integers."""
    with pytest.raises(TypeError, match=r"params\['calls'\] is int32.*eqx\.is_inexact_array"):
        fair(LINEAR).init(START | {"calls": jnp.int32(0)})


# Flax


def test_flax_nnx_passes_the_batch_on():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(1, 8, rngs=rngs)
            self.second = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))[:, 0]

    model = Network(nnx.Rngs(0))
    graph, _ = nnx.split(model)
    losses = sg.terms(lambda p, x: losses_of(nnx.merge(graph, p)(x), x), names=NAMES)
    optimizer = nnx.Optimizer(model, fair(losses), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: sum(losses_of(m(x), x).values()))(model)
        optimizer.update(model, grads, term_args=(x,))

    before = sum(losses_of(model(X), X).values())
    for _ in range(STEPS):
        step(model, optimizer, jnp.asarray(X))
    weights = optimizer.opt_state.weights[...]
    assert np.all(np.isfinite(weights))
    assert not np.allclose(weights, 1)
    assert sum(losses_of(model(X), X).values()) < before


def test_flax_nnx_with_batch_statistics():
    """They go to the losses as a further argument; the model's own pass moves them."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(1, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.second = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(jnp.tanh(self.norm(self.first(x))))[:, 0]

    model = Network(nnx.Rngs(0))
    graph, _, _ = nnx.split(model, nnx.Param, ...)

    def split(params, rest, x):
        return losses_of(nnx.merge(graph, params, rest, copy=True)(x), x)

    optimizer = nnx.Optimizer(model, fair(sg.terms(split, names=NAMES)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        _, _, rest = nnx.split(model, nnx.Param, ...)
        rest = nnx.as_pure(rest)
        grads = nnx.grad(lambda m: sum(losses_of(m(x), x).values()))(model)
        optimizer.update(model, grads, term_args=(rest, x))

    mean = np.asarray(model.norm.mean[...])
    for _ in range(STEPS):
        step(model, optimizer, jnp.asarray(X))
    assert not np.allclose(optimizer.opt_state.weights[...], 1)
    assert not np.allclose(model.norm.mean[...], mean)


def linen_state(tx):
    """A `TrainState`, the losses of its parameters, and its class."""
    nn = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(jnp.tanh(nn.Dense(8)(x)))[:, 0]

    model = Network()

    def split(params, x):
        return losses_of(model.apply({"params": params}, x), x)

    params = model.init(jax.random.key(0), X)["params"]
    create = partial(train_state.TrainState.create, apply_fn=model.apply, params=params)
    return create(tx=tx(sg.terms(split, names=NAMES))), split


def test_flax_linen_with_the_optimizer_made_in_the_step():
    """`apply_gradients` takes no batch: the losses close over it. Making it costs tracing only."""
    train, split = linen_state(fair)

    @jax.jit
    def step(train, x):
        grads = jax.grad(lambda p: total(split, p, x))(train.params)
        here = train.replace(tx=fair(lambda p: split(p, x)))
        return here.apply_gradients(grads=grads).replace(tx=train.tx)

    before = total(split, train.params, X)
    for _ in range(STEPS):
        train = step(train, X)
    assert_trained(train.opt_state, before, total(split, train.params, X))


def test_flax_linen_agrees_with_a_loop_of_ones_own():
    train, split = linen_state(fair)
    optimizer = fair(sg.terms(split, names=NAMES))
    params, state = train.params, optimizer.init(train.params)

    @jax.jit
    def both(train, params, state, x):
        grads = jax.grad(lambda p: total(split, p, x))(params)
        here = train.replace(tx=fair(lambda p: split(p, x)))
        updates, state = optimizer.update(grads, state, params, term_args=(x,))
        train = here.apply_gradients(grads=grads).replace(tx=train.tx)
        return train, optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        train, params, state = both(train, params, state, X)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, train.params, params)
    close(train.opt_state.weights, state.weights)


def test_flax_linen_without_a_batch_says_what_to_do():
    train, _ = linen_state(fair)
    with pytest.raises(TypeError, match="term_args"):
        train.apply_gradients(grads=train.params)


# Physics and probability


def test_jinns_computes_the_batch_argument():
    jinns = pytest.importorskip("jinns")

    class Decay(jinns.loss.ODE):
        def equation(self, t, u, params):
            return jax.jacrev(u)(t, params)[:, 0] + params.eq_params.rate * u(t, params)

    network, nn_params = jinns.nn.PINN_MLP.create(
        key=jax.random.key(0),
        eqx_list=((eqx.nn.Linear, 1, 8), (jax.nn.tanh,), (eqx.nn.Linear, 8, 1)),
        eq_type="ODE",
    )
    start = jinns.parameters.Params(nn_params=nn_params, eq_params={"rate": jnp.ones(())})
    data = jinns.data.DataGeneratorODE(
        key=jax.random.key(1), nt=32, tmin=0.0, tmax=1.0, temporal_batch_size=16
    )
    loss = jinns.loss.LossODE(
        u=network,
        dynamic_loss=Decay(),
        initial_condition=(0.0, 1.0),
        loss_weights=jinns.loss.LossWeightsODE(dyn_loss=1.0, initial_condition=10.0),
        params=start,
    )

    def split(params, batch):
        parts = loss.evaluate(params, batch)[1]
        return {"equation": parts.dyn_loss[0], "start": 10.0 * parts.initial_condition}

    def get_term_args(batch):
        return (batch,)

    params, history, *_, state = jinns.solve(
        n_iter=STEPS,
        init_params=start,
        data=data,
        loss=loss,
        optimizer=fair(sg.terms(split, names=("equation", "start"))),
        extra_optax_args_and_kwargs={"term_args": get_term_args},
        verbose=False,
    )[:6]
    assert_trained(state, history[0], history[-1])
    assert params.eq_params.rate == 1


@pytest.mark.filterwarnings("ignore::UserWarning:gpjax", "ignore::UserWarning:beartype")
def test_gpjax_with_losses_closed_over_the_data():
    gpjax = pytest.importorskip("gpjax")
    data = gpjax.Dataset(X=jnp.asarray(X), y=jnp.asarray(Y)[:, None])
    prior = gpjax.gps.Prior(
        mean_function=gpjax.mean_functions.Constant(), kernel=gpjax.kernels.RBF()
    )
    model = prior * gpjax.likelihoods.Gaussian()
    _, static = eqx.partition(model, eqx.is_array)

    def split(model, data):
        return {
            "likelihood": -gpjax.objectives.conjugate_mll(model, data),
            "decay": sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model)),
        }

    optimizer = fair(lambda params: split(eqx.combine(params, static), data))
    fitted, history = gpjax.fit(
        model=model,
        objective=lambda model, data: total(split, model, data),
        train_data=data,
        optim=optimizer,
        num_iters=STEPS,
        verbose=False,
    )
    assert np.all(np.isfinite(history))
    plain, _ = gpjax.fit(
        model=model,
        objective=lambda model, data: total(split, model, data),
        train_data=data,
        optim=optax.adam(1e-2),
        num_iters=STEPS,
        verbose=False,
    )
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (fitted, plain)))]
    assert max(moved) > 1e-4


def numpyro_regression():
    """A model, its guide, and the two losses of the guide's parameters."""
    numpyro = pytest.importorskip("numpyro")
    import numpyro.distributions as dist
    from numpyro.infer.autoguide import AutoDelta
    from numpyro.infer.util import log_density

    def model(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0.0, 0.1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Normal(slope * x[:, 0], 0.3), obs=y)

    def split(params, x, y):
        latent = {"slope": params["slope_auto_loc"]}
        _, trace = log_density(model, (x, y), {}, latent)
        found = {name: trace[name] for name in ("y", "slope")}
        density = {n: jnp.sum(s["fn"].log_prob(s["value"])) for n, s in found.items()}
        return {"likelihood": -density["y"], "prior": -density["slope"]}

    return model, AutoDelta(model), split


def test_numpyro_with_losses_closed_over_the_data():
    model, guide, split = numpyro_regression()
    import numpyro

    x, y = jnp.asarray(X), jnp.asarray(Y)
    optimizer = numpyro.optim.optax_to_numpyro(fair(lambda p: split(p, x, y)))
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    result = svi.run(jax.random.key(0), STEPS, x, y, progress_bar=False)
    _, (_, state) = result.state.optim_state
    assert_trained(state, result.losses[0], result.losses[-1])


def test_numpyro_by_mini_batches_with_the_optimizer_made_in_the_step():
    model, guide, split = numpyro_regression()
    import numpyro

    x, y = jnp.asarray(X), jnp.asarray(Y)
    convert = numpyro.optim.optax_to_numpyro
    optimizer = convert(fair(lambda p: split(p, x, y)))
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    carry = svi.init(jax.random.key(0), x, y)

    @jax.jit
    def step(carry, x, y):
        here = copy(svi)
        here.optim = convert(fair(lambda p: split(p, x, y)))
        return here.update(carry, x, y)

    for index in range(STEPS):
        rows = slice(16 * (index % 2), 16 * (index % 2) + 16)
        carry, _ = step(carry, x[rows], y[rows])
    _, (_, state) = carry.optim_state
    assert_weighed(state)


@pytest.mark.filterwarnings("ignore:.*enable_x64.*")
def test_flowjax_with_losses_closed_over_the_data():
    pytest.importorskip("flowjax")
    import flowjax.bijections as bijections
    from flowjax.distributions import Normal, Transformed
    from flowjax.train import fit_to_data
    from paramax import NonTrainable, non_trainable, unwrap

    flow = Transformed(Normal(jnp.zeros(2)), bijections.Affine(jnp.zeros(2), jnp.ones(2)))
    flow = eqx.tree_at(lambda f: f.base_dist, flow, replace_fn=non_trainable)
    points = 2 + 0.1 * jax.random.normal(jax.random.key(0), (200, 2))

    def split(params, static, points):
        density = unwrap(eqx.combine(params, static)).log_prob(points)
        size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return {"likelihood": -jnp.mean(density), "decay": 1e-2 * size}

    is_leaf = lambda leaf: isinstance(leaf, NonTrainable)
    _, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_leaf)
    fit = partial(
        fit_to_data,
        jax.random.key(1),
        flow,
        points,
        loss_fn=lambda params, static, points, key: total(split, params, static, points),
        max_epochs=10,
        show_progress=False,
    )
    # this trainer's gradient is that of a mini-batch, the losses' that of all points
    _, losses = fit(optimizer=sg.small_gain(optax.adam(1e-2), lambda p: split(p, static, points)))
    assert losses["train"][-1] < losses["train"][0]


@pytest.fixture
def broadcasting():
    """Not everybody spells out how ranks broadcast."""
    with jax.numpy_rank_promotion("allow"):
        yield


def gaussian_chain():
    """A dynamax model with its sequence, and its two losses of unconstrained parameters."""
    pytest.importorskip("dynamax")
    from dynamax.hidden_markov_model import GaussianHMM
    from dynamax.parameters import from_unconstrained, log_det_jac_constrain, to_unconstrained

    model = GaussianHMM(2, 1)
    path = jnp.concatenate([jnp.zeros(20), jnp.ones(20)])[:, None]
    path = path + 0.1 * jax.random.normal(jax.random.key(0), path.shape)
    params, props = model.initialize(jax.random.key(1), emissions=path, method="prior")

    def split(free):
        params = from_unconstrained(free, props)
        return {
            "likelihood": -model.marginal_log_prob(params, path) / path.size,
            "prior": -(model.log_prior(params) + log_det_jac_constrain(params, props)) / path.size,
        }

    return model, params, props, path, split, to_unconstrained(params, props)


def test_dynamax_in_a_loop_of_ones_own(broadcasting):
    *_, split, free = gaussian_chain()
    optimizer = fair(split)

    @jax.jit
    def step(carry, _):
        free, state = carry
        value, grads = jax.value_and_grad(lambda p: total(split, p))(free)
        updates, state = optimizer.update(grads, state, free)
        return (optax.apply_updates(free, updates), state), value

    (_, state), values = jax.lax.scan(step, (free, optimizer.init(free)), length=STEPS)
    assert values[-1] < values[0]
    np.testing.assert_allclose(state.info.fit, 1, rtol=1e-5)
    # each loss rules the direction of its own curvature: a weight hardly changes its share
    assert np.all(state.info.cost > 0)
    np.testing.assert_allclose(state.info.response, 0, atol=0.05)


def remembering(optimizer):
    """For trainers that call `update(grads, state)`: the parameters travel in the state."""

    def init(params):
        return jax.tree.map(jnp.copy, params), optimizer.init(params)

    def update(grads, state, params=None):
        params, inner = state
        updates, inner = optimizer.update(grads, inner, params)
        return updates, (optax.apply_updates(params, updates), inner)

    # this trainer's step is not compiled
    return optax.GradientTransformation(init, jax.jit(update))


def test_dynamax_whose_trainer_passes_no_parameters(broadcasting):
    model, params, props, path, split, _ = gaussian_chain()
    fit = partial(model.fit_sgd, params, props, path, num_epochs=STEPS)
    with pytest.raises(ValueError, match="params must be given to update"):
        fit(optimizer=fair(split))
    ours, losses = fit(optimizer=remembering(fair(split)))
    assert losses[-1] < losses[0]
    plain, _ = fit(optimizer=optax.adam(1e-2))
    # as in the loop above, shares do not answer
    np.testing.assert_allclose(ours.emissions.means, plain.emissions.means, rtol=1e-2)


# optax's own wrappers


def run(optimizer, params=START):
    """The loop of optax's tutorial, with the batch as `term_args`."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: total(linear, p, X))(params)
        updates, state = optimizer.update(grads, state, params, term_args=(X,))
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "chain": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": lambda tx: optax.partition({"all": tx}, {"w": "all", "b": "all"}),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_optax_pass_the_batch_on(name):
    params, state = run(WRAPPERS[name](fair(LINEAR)))
    assert_trained(state, total(linear, START, X), total(linear, params, X))


def inside_multi_steps(losses):
    return optax.chain(optax.MultiSteps(fair(losses), 2).gradient_transformation())


def inside_lookahead(losses):
    return optax.lookahead(fair(losses), 5, 0.5)


def test_what_drops_the_batch_says_what_to_do():
    for make, start in (
        (inside_multi_steps, START),
        (inside_lookahead, optax.LookaheadParams.init_synced(START)),
    ):
        optimizer = make(LINEAR)
        with pytest.raises(TypeError, match="term_args"):
            optimizer.update(START, optimizer.init(start), start)


def test_what_drops_the_batch_with_the_optimizer_made_in_the_step():
    assert_in_step(inside_multi_steps)
    start = optax.LookaheadParams.init_synced(START)
    assert_in_step(inside_lookahead, start, look=lambda params: params.fast)


def assert_in_step(make, params=START, look=lambda params: params):
    """`make(losses)` inside the step, around losses that close over the batch."""

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: total(linear, p, x))(look(params))
        updates, state = make(lambda p: linear(p, x)).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = make(LINEAR).init(params)
    for _ in range(STEPS):
        params, state = step(params, state, X)
    assert_trained(state, total(linear, START, X), total(linear, look(params), X))


def test_hyperparameters_injected_inside_and_around():
    inside = sg.small_gain(
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        LINEAR,
        policy="fair",
        warmup=3,
        every=1,
    )
    around = optax.inject_hyperparams(sg.loss_small_gain, static_args=STATIC)(
        optax.adam(1e-2), LINEAR, policy="fair", warmup=3, every=1
    )
    (inner, one), (outer, two) = run(inside), run(around)
    assert_weighed(one)
    assert_weighed(two)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), inner, outer)


def test_hyperparameters_injected_around_without_more_ado():
    around = optax.inject_hyperparams(sg.loss_small_gain)(optax.adam(1e-2), LINEAR, policy="fair")
    run(around)


# Losses and trainers of any kind


def test_a_trainer_that_passes_no_batch_with_losses_that_need_none():
    optimizer = fair(lambda params: linear(params, X))
    params, state = START, optimizer.init(START)
    update = jax.jit(optimizer.update)
    for _ in range(STEPS):
        grads = jax.grad(lambda p: total(linear, p, X))(params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert_weighed(state)


def test_a_trainer_that_passes_no_batch_with_losses_that_need_one():
    optimizer = fair(LINEAR)
    with pytest.raises(TypeError, match="term_args"):
        optimizer.update(START, optimizer.init(START), START)


def test_losses_with_keyword_arguments():
    losses = sg.terms(lambda params, *, x: linear(params, x), names=NAMES)
    optimizer = fair(losses)
    grads = jax.grad(lambda p: total(linear, p, X))(START)
    _, state = optimizer.update(grads, optimizer.init(START), START, term_args={"x": X})
    np.testing.assert_allclose(state.info.losses, LINEAR.values(START, X), rtol=1e-6)


def test_losses_in_nested_dicts():
    def nested(params):
        flat = linear(params, X)
        return {"data": {"fit": flat["fit"]}, "stiff": flat["stiff"]}

    optimizer = fair(nested)
    grads = jax.grad(lambda p: total(linear, p, X))(START)
    _, state = optimizer.update(grads, optimizer.init(START), START)
    np.testing.assert_allclose(state.info.losses, LINEAR.values(START, X), rtol=1e-6)
    assert sg.terms(nested).names_at(START) == ("data/fit", "stiff")


def test_losses_with_something_beside_them():
    def with_aux(params, x):
        return linear(params, x), {"mean": jnp.mean(x)}

    losses = sg.terms(with_aux, names=NAMES, has_aux=True)
    optimizer = fair(losses)
    state = optimizer.init(START)
    (values, aux), grads = losses.value_and_weighted_grad(state.weights, START, X)
    np.testing.assert_allclose(aux["mean"], X.mean(), atol=1e-6)
    given = dict(term_args=(X,), term_values=values, weighted=True)
    _, state = optimizer.update(grads, state, START, **given)
    np.testing.assert_allclose(state.info.losses, values, rtol=1e-6)


def test_parameters_that_are_floats_of_python():
    params = {"w": 1.0, "b": 0.0}
    optimizer = fair(lambda p: linear({"w": jnp.reshape(p["w"], (1,)), "b": p["b"]}, X))
    state = optimizer.init(params)
    _, state = optimizer.update({"w": 0.1, "b": 0.1}, state, params)
    assert np.all(np.isfinite(state.weights))
