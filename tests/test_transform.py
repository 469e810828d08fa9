from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import smallgain_jax as sg
from smallgain_jax.graphs.small_gain import STATIC
from smallgain_jax.tools import scenarios
from smallgain_jax.tools.scenarios import random_graph
from tests.compiling import in_turn
from tests.graphs import SLACK, steps_to

BASES = {
    "sgd": partial(optax.sgd, 0.3),
    "momentum": partial(optax.sgd, 0.3, momentum=0.9),
    "nesterov": partial(optax.sgd, 0.3, momentum=0.9, nesterov=True),
    "adam": partial(optax.adam, 0.1),
    "adagrad": partial(optax.adagrad, 0.3),
    "rmsprop": partial(optax.rmsprop, 0.1),
    "lion": partial(optax.lion, 0.05),
}
GRAPH = {}


def problem():
    """One small graph with every family but the damped gate, built once per precision."""
    key = bool(jax.config.jax_enable_x64)
    if key not in GRAPH:
        GRAPH[key] = random_graph("uniform", 12, 40, seed=4)
    return GRAPH[key]


def history_of(state):
    return state.info, state.weights


@pytest.mark.parametrize("base", BASES)
def test_accepted_steps_never_raise_the_reference_objective(base, eps):
    check_accepted_steps(base, "reference", eps)


@pytest.mark.once
@pytest.mark.parametrize("base", BASES)
def test_accepted_steps_never_raise_the_adapted_objective(base, eps):
    check_accepted_steps(base, "adapted", eps)


def check_accepted_steps(base, objective, eps):
    scenario = problem()
    graph = scenario.graph
    optimizer = sg.small_gain(BASES[base](), graph, objective=objective)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(graph.gradient(x), state, x, bounds=(0.0, 1.0))
        after = optax.apply_updates(x, updates)
        # the weights that the step was declared under: adapted keeps them, reference has none
        declared = None if objective == "reference" else state.weights
        energies = graph.energy(x, declared), graph.energy(after, declared)
        return (after, state), (*energies, state.info.accepted, state.weights, after)

    start = (scenario.x0, optimizer.init(scenario.x0))
    run = jax.jit(lambda start: jax.lax.scan(step, start, length=40)[1])
    before, after, accepted, weights, states = map(np.asarray, run(start))
    assert (after <= before + SLACK * eps * np.abs(before)).all()
    assert accepted.any()
    if objective == "reference":
        assert after[-1] < before[0]
    assert ((weights >= 0.1 - eps) & (weights <= 3 + 3 * eps)).all()
    assert ((states >= 0) & (states <= 1)).all()


@pytest.mark.x64
@pytest.mark.parametrize("make", [scenarios.baseline, scenarios.dense], ids=["baseline", "dense"])
def test_published_scenarios(make):
    scenario = make()
    graph, x0, best = scenario.graph, scenario.x0, scenario.minimum
    ours = sg.relax(graph, x0, sg.small_gain(optax.sgd(0.1, momentum=0.5), graph), steps=60)
    rates = jnp.asarray([0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0])
    peer = lambda rate: sg.relax(graph, x0, sg.gradnorm(optax.sgd(rate), graph), 60).energy
    peers = jax.vmap(peer)(rates)
    theirs = [steps for energy in peers if (steps := steps_to(energy, best, 0.1)) is not None]
    assert steps_to(ours.energy, best, 0.1) <= min(theirs)
    assert steps_to(ours.energy, best, 1e-6) <= 60


@pytest.mark.once
@pytest.mark.parametrize("value", ["grad_norm", "alignment", "peek"])
def test_values_move_weights_both_ways(value):
    scenario = problem()
    optimizer = sg.small_gain(
        optax.sgd(0.05), scenario.graph, value=value, objective="adapted", budget_fraction=0.5
    )
    result = sg.relax(scenario.graph, scenario.x0, optimizer, steps=15, record=history_of)
    info, weights = result.info.history
    assert (weights[-1] > 1).any()
    assert (weights[-1] < 1).any()
    assert info.spent_global.max() > 0
    budgets = 0.5 * np.maximum(info.limit[:, None] * 0.9, 0)
    assert (info.spent_rows <= budgets + 1e-3).all()


@pytest.mark.x64
def test_peek_agrees_with_alignment_to_first_order():
    scenario = problem()
    states = []
    for value in ("peek", "alignment"):
        optimizer = sg.small_gain(optax.sgd(1e-3), scenario.graph, value=value, objective="adapted")
        x = scenario.x0
        states.append(
            jax.jit(optimizer.update)(scenario.graph.gradient(x), optimizer.init(x), x)[1]
        )
    # the few that were measured include what first order leaves out; the others are equal
    assert np.isclose(states[0].scores, states[1].scores, rtol=1e-6).mean() >= 0.9
    assert np.isfinite(states[0].scores).all()


@pytest.mark.once
def test_budget_of_zero_only_sheds():
    scenario = problem()
    optimizer = sg.small_gain(
        optax.sgd(0.05), scenario.graph, objective="adapted", budget_fraction=0.0, smoothing=None
    )
    state = sg.relax(scenario.graph, scenario.x0, optimizer, steps=3).state
    costly = state.info.cost > 0
    np.testing.assert_allclose(state.weights[costly], 0.9**3, rtol=1e-5)
    assert state.info.spent_global == 0


@pytest.mark.once
def test_every_allocates_now_and_then():
    scenario = problem()
    optimizer = sg.small_gain(optax.sgd(0.05), scenario.graph, objective="adapted", every=3)
    weights = sg.relax(
        scenario.graph, scenario.x0, optimizer, steps=6, record=lambda state: state.weights
    ).info.history
    moved = [bool((weights[k] != weights[k - 1]).any()) for k in range(1, 6)]
    assert moved == [False, False, True, False, False]


def test_without_terms_the_base_is_untouched():
    base = optax.adam(0.1)
    params = {"a": jnp.ones(3)}
    optimizer = sg.small_gain(base)
    expected = base.update(params, base.init(params), params)
    actual = optimizer.update(params, optimizer.init(params), params, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, expected, actual)


def test_baselines_move_weights_as_they_say():
    scenario = problem()
    graph, x0 = scenario.graph, scenario.x0
    state = sg.relax(graph, x0, sg.gradnorm(optax.sgd(0.02), graph), steps=30).state
    assert (state.weights > 1).any()
    assert ((state.weights >= 0.5) & (state.weights <= 2)).all()
    bound = graph.curvature(x0, smoothing=1e-3).lipschitz
    capped = sg.auto_cap(optax.sgd(0.02), graph, limit=bound / 3, target=0.9)
    first = jax.jit(capped.update)(graph.gradient(x0), capped.init(x0), x0)[1]
    np.testing.assert_allclose(first.weights, 0.3, rtol=1e-5)
    loose = sg.auto_cap(optax.sgd(0.02), graph, limit=2 * bound)
    np.testing.assert_array_equal(
        jax.jit(loose.update)(graph.gradient(x0), loose.init(x0), x0)[1].weights, 1.0
    )


class TestContract:
    """The optax contract of the design."""

    def optimizer(self, **settings):
        return sg.small_gain(optax.sgd(0.1, momentum=0.5), problem().graph, **settings)

    def step(self, optimizer, x, state):
        @jax.jit
        def step(x, state):
            updates, state = optimizer.update(problem().graph.gradient(x), state, x)
            return optax.apply_updates(x, updates), state

        return step(x, state)

    def test_state_is_stable_and_compiles_once(self):
        optimizer = self.optimizer()
        traces = []

        @jax.jit
        def step(x, state):
            traces.append(1)
            return self.step(optimizer, x, state)

        x, state = problem().x0, optimizer.init(problem().x0)
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
        for _ in range(3):
            x, state = step(x, state)
        after = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)
        assert before == after
        assert len(traces) == 1

    @pytest.mark.once
    def test_state_may_be_donated(self):
        optimizer = self.optimizer()
        step = jax.jit(partial(self.step, optimizer), donate_argnums=(0, 1))
        x, state = jnp.copy(problem().x0), optimizer.init(problem().x0)
        for _ in range(2):
            x, state = step(x, state)
        assert jnp.isfinite(x).all()

    def test_init_takes_shapes(self):
        shape = jax.ShapeDtypeStruct((12,), jnp.float32)
        state = jax.eval_shape(self.optimizer().init, shape)
        assert state.weights.shape == (problem().graph.num_edges,)

    def test_weights_are_found_in_the_state(self):
        state = optax.chain(optax.identity(), self.optimizer()).init(problem().x0)
        assert optax.tree.get(state, "weights").shape == (problem().graph.num_edges,)

    @pytest.mark.once
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_updates_keep_their_dtype(self, dtype):
        x = problem().x0.astype(dtype)
        optimizer = self.optimizer()
        gradient = problem().graph.gradient(x.astype(float)).astype(dtype)
        updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(x), x)
        assert updates.dtype == dtype
        assert state.weights.dtype == jnp.float32

    def test_inject_hyperparams(self):
        graph = problem().graph
        make = optax.inject_hyperparams(
            sg.graph_small_gain, static_args=("base_optimizer", *STATIC)
        )
        optimizer = make(
            base_optimizer=optax.sgd(0.1),
            terms=graph,
            limit=20.0,
            smoothing=1e-3,
            max_step_change=optax.linear_schedule(0.1, 0.0, 10),
        )
        x = problem().x0
        state = optimizer.init(x)
        updates, state = jax.jit(optimizer.update)(graph.gradient(x), state, x)
        assert jnp.isfinite(updates).all()
        np.testing.assert_allclose(state.hyperparams["max_step_change"], 0.1, rtol=1e-6)

    @pytest.mark.once
    def test_inside_other_wrappers(self):
        graph, x = problem().graph, problem().x0
        params = {"x": x, "other": jnp.ones(2)}
        gradient = {"x": graph.gradient(x), "other": jnp.ones(2)}
        inside = optax.partition(
            {"ours": self.optimizer(), "rest": optax.sgd(0.1)}, {"x": "ours", "other": "rest"}
        )
        with pytest.raises((AttributeError, ValueError)):
            # a graph's state is one array: partition hands over a tree with holes
            inside.update(gradient, inside.init(params), params)
        for wrapped in (
            optax.apply_if_finite(self.optimizer(), 3),
            optax.MultiSteps(self.optimizer(), 2),
            optax.chain(self.optimizer(), optax.scale(0.5)),
        ):
            state, update = wrapped.init(x), jax.jit(wrapped.update)
            for _ in range(2):
                updates, state = update(graph.gradient(x), state, x)
            assert jnp.isfinite(updates).all()
            assert jnp.abs(updates).max() > 0

    @pytest.mark.once
    def test_scan_and_vmap(self):
        optimizer = self.optimizer()

        def run(x):
            step = lambda carry, _: (self.step(optimizer, *carry), None)
            return jax.lax.scan(step, (x, optimizer.init(x)), length=5)[0][0]

        xs = jnp.stack([problem().x0, problem().x0[::-1]])
        together = jax.jit(jax.vmap(run))(xs)
        np.testing.assert_allclose(together[0], jax.jit(run)(xs[0]), rtol=1e-4, atol=1e-5)

    @pytest.mark.once
    def test_line_search_inside(self):
        base = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
        scenario = problem()
        optimizer = sg.small_gain(base, scenario.graph, row_gains=False)
        result = sg.relax(scenario.graph, scenario.x0, optimizer, steps=5)
        assert result.energy[-1] < result.energy[0]

    @pytest.mark.once
    @pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
    def test_what_is_not_finite_leaves_the_state_intact(self, poison):
        optimizer = self.optimizer()
        x = problem().x0
        x, state = self.step(optimizer, x, optimizer.init(x))
        gradient = problem().graph.gradient(x).at[0].set(poison)
        updates, after = jax.jit(optimizer.update)(gradient, state, x)
        np.testing.assert_array_equal(updates, 0.0)
        np.testing.assert_array_equal(after.weights, state.weights)
        np.testing.assert_array_equal(after.scores, state.scores)
        assert after.info.skipped == state.info.skipped + 1
        assert not after.info.accepted
        marks = dict(accepted=state.info.accepted, skipped=state.info.skipped)
        unmarked = after._replace(info=after.info._replace(**marks))
        jax.tree.map(np.testing.assert_array_equal, unmarked, state)
        moved, _ = self.step(optimizer, x, after)
        assert jnp.isfinite(moved).all()
        assert (moved != x).any()

    def test_a_rise_is_rolled_back(self):
        optimizer = self.optimizer(objective="adapted")
        x = problem().x0
        x, state = self.step(optimizer, x, optimizer.init(x))
        assert (state.weights != state.previous_weights).any()
        # somebody else moved the parameters uphill
        _, after = self.step(optimizer, jnp.ones(12) - x, state)
        np.testing.assert_array_equal(after.previous_weights, state.previous_weights)

    @pytest.mark.x64
    def test_gradient_through_an_update(self):
        scenario = problem()

        @jax.jit
        def outcome(weight):
            graph = eqx.tree_at(lambda g: g.edges[0].weight, scenario.graph, weight)
            optimizer = sg.small_gain(optax.sgd(0.1), graph, max_step_change=0.0)
            unrolled = sg.relax(graph, scenario.x0, optimizer, steps=4, adjoint="unrolled")
            return jnp.sum(unrolled.x**2)

        weight = scenario.graph.edges[0].weight
        check_grads(outcome, (weight,), order=1, modes=["rev"], atol=1e-4, rtol=1e-4)


@pytest.mark.x64
@pytest.mark.parametrize("policy", ["greedy", "fair"])
def test_budgets_hold_for_the_weights_in_force(policy):
    scenario = random_graph("uniform", 30, 90, seed=0)
    graph, x0 = scenario.graph, scenario.x0
    top = graph.curvature(x0).lipschitz

    @jax.jit
    @in_turn
    def run(rate):
        optimizer = sg.small_gain(
            optax.sgd(rate), graph, limit=2 / rate, policy=policy, smoothing=None,
            global_budget=500.0,
        )  # fmt: skip

        def step(carry, _):
            x, state = carry
            curvature = graph.curvature(x)
            updates, after = optimizer.update(graph.gradient(x), state, x, bounds=(0.0, 1.0))
            out = curvature.local_rows, curvature.edge_cost, state.weights, after.weights
            return (optax.apply_updates(x, updates), after), (out, after.info)

        return jax.lax.scan(step, (x0, optimizer.init(x0)), length=25)[1]

    (local, cost, held, weights), info = jax.tree.map(
        np.asarray, run(jnp.array([0.5, 1.2, 1.9, 3.0]) / top)
    )

    def rows(w):
        sums, (runs, steps) = local.copy(), np.indices(local.shape[:2])
        for side, ends in enumerate((graph.i, graph.j)):
            at = runs[..., None], steps[..., None], np.asarray(ends)
            np.add.at(sums, at, w * cost[..., side])
        return sums

    lower = np.maximum(0.1, 0.9 * held)
    budget = 0.7 * np.maximum(0.9 * info.limit[..., None] - rows(lower), 0)
    assert (rows(weights) - rows(lower) <= budget + 1e-9).all()
    # and what is reported is what is in force
    spent = np.maximum(rows(weights) - rows(lower), 0)
    np.testing.assert_allclose(info.spent_rows, spent, atol=1e-9)
    everything = np.sum(cost.max(axis=-1) * np.maximum(weights - lower, 0), axis=-1)
    np.testing.assert_allclose(info.spent_global, everything, rtol=1e-9, atol=1e-9)
    assert (everything <= 500 + 1e-6).all()
    assert (weights != held).any(axis=(1, 2)).all()
    assert info.accepted.any(axis=1).all()


@pytest.mark.once
def test_a_bad_batch_at_every_turn_is_measured_at_the_next_good_one():
    scenario = problem()
    optimizer = sg.small_gain(optax.sgd(0.05), scenario.graph, objective="adapted", every=2)
    x = scenario.x0
    state, update = optimizer.init(x), jax.jit(optimizer.update)
    gradient = scenario.graph.gradient(x)
    _, skipped = update(gradient * jnp.nan, state, x)
    np.testing.assert_array_equal(skipped.weights, 1.0)
    assert skipped.count == 0
    _, after = update(gradient, skipped, x)
    _, fresh = update(gradient, state, x)
    assert (after.weights != 1).any()
    np.testing.assert_array_equal(after.weights, fresh.weights)


@pytest.mark.once
def test_no_infinity_rests_in_a_state():
    optimizer = sg.small_gain(optax.sgd(0.1), problem().graph)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(optimizer.init(problem().x0)))


BAD = [
    (dict(policy="best"), "policy"),
    (dict(value="best"), "value"),
    (dict(objective="best"), "objective"),
    (dict(guard="best"), "guard"),
    (dict(every=0), "every"),
    (dict(target=1.5), "target"),
    (dict(budget_fraction=-0.1), "budget_fraction"),
    (dict(max_step_change=2.0), "max_step_change"),
    (dict(floor=0.0), "floor"),
    (dict(floor=2.0, ceiling=1.0), "floor = 2.0 must not exceed ceiling"),
    (dict(ema=1.5), "ema"),
    (dict(limit=-1.0), "limit = -1.0 must be positive"),
    (dict(guard=-1), "guard = -1"),
    (dict(rounds=0), "rounds = 0"),
    (dict(max_backtracks=-1), "max_backtracks = -1"),
    (dict(min_cosine=2.0), "min_cosine"),
]


@pytest.mark.once
@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sg.small_gain(optax.sgd(0.1), problem().graph, **change)


@pytest.mark.once
@pytest.mark.parametrize("wrap", [sg.small_gain, sg.gradnorm, sg.auto_cap])
def test_a_factory_is_no_optimizer(wrap):
    with pytest.raises(
        TypeError, match=r"base_optimizer is the function sgd, not an optimizer: call it"
    ):
        wrap(optax.sgd, problem().graph)


@pytest.mark.once
def test_params_are_required():
    optimizer = sg.small_gain(optax.sgd(0.1), problem().graph)
    x = problem().x0
    with pytest.raises(ValueError, match="params"):
        optimizer.update(x, optimizer.init(x))


@pytest.mark.once
@pytest.mark.parametrize("preset", ["default", "speed", "safety"])
def test_presets_are_accepted(preset):
    settings = getattr(sg.presets, preset)()
    optimizer = sg.small_gain(optax.sgd(0.1), problem().graph, **settings)
    assert optimizer.init(problem().x0).weights.shape == (problem().graph.num_edges,)


@pytest.mark.once
def test_a_graph_passed_on_is_data_not_constants(eps):
    def lowered(num_edges):
        scenario = random_graph("uniform", 40, num_edges, seed=2)
        optimizer = sg.small_gain(optax.sgd(0.01), scenario.graph)
        run = partial(sg.relax, optimizer=optimizer, steps=1)
        return len(jax.jit(run).lower(scenario.graph, scenario.x0).as_text())

    # ends of 8000 edges more are 128 kB of constants more
    assert lowered(9000) < lowered(1000) + 20_000


@pytest.mark.once
def test_a_graph_passed_on_takes_the_place_of_its_like(eps):
    mine = problem()
    graph = jax.tree.map(
        lambda leaf: 0.5 * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, mine.graph
    )
    other = random_graph("uniform", 12, 30, seed=5)
    base = optax.sgd(0.05)
    expected = sg.relax(graph, mine.x0, sg.small_gain(base, graph), steps=5)
    found = sg.relax(graph, mine.x0, sg.small_gain(base, mine.graph), steps=5)
    np.testing.assert_allclose(found.x, expected.x, rtol=100 * eps)
    np.testing.assert_allclose(found.state.weights, expected.state.weights, rtol=100 * eps)
    # of another shape it cannot: the optimizer keeps its own terms
    assert sg.relax(
        other.graph, mine.x0, sg.small_gain(base, mine.graph), steps=5
    ).state.weights.shape == (40,)


@pytest.mark.once
@pytest.mark.parametrize("value", ["alignment", "grad_norm", "peek"])
def test_units_of_the_energy_do_not_matter(value):
    def run(scale):
        graph = sg.EnergyGraph(
            sg.Landau(a=jnp.full(3, scale), target=jnp.array([0.0, 1.0, 0.0])),
            sg.Quadratic([0, 1], [1, 2], jnp.full(2, scale)),
        )
        optimizer = sg.small_gain(optax.sgd(0.1 / scale), graph, limit=20 * scale, value=value)
        result = sg.relax(graph, jnp.full(3, 0.5), optimizer, steps=12)
        return result.x, result.state.weights

    x, weights = jax.jit(jax.vmap(run))(jnp.array([1.0, 1e-30, 1e-20, 1e20, 1e30]))
    np.testing.assert_allclose(x[0], [0.25, 0.5, 0.25], atol=1e-3)
    np.testing.assert_allclose(x, jnp.broadcast_to(x[0], x.shape), atol=1e-4)
    np.testing.assert_allclose(weights, jnp.broadcast_to(weights[0], weights.shape), rtol=0.05)
