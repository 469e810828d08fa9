from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize
from scipy.sparse import csr_matrix, vstack

import smallgain_jax as sg
from smallgain_jax.tools.scenarios import KINDS, random_graph
from tests.compiling import jit_well

allocate_many = jit_well(sg.allocate)
allocate = jax.jit(sg.allocate, static_argnames=("policy", "rounds", "bins"))


def random_problem(rng, terms=24, rows=10):
    """A hard mixture: ties, free terms, empty and infinite budgets, parallel edges, no value."""
    ends = np.stack([rng.integers(rows, size=terms), rng.integers(rows, size=terms)], axis=1)
    cost = rng.lognormal(0, 2, (terms, 2)) * (rng.random((terms, 1)) > 0.1)
    value = np.where(rng.random(terms) > 0.1, rng.lognormal(0, 2, terms), rng.normal(size=terms))
    lower = rng.random(terms)
    upper = lower + rng.random(terms) * (rng.random(terms) > 0.05)
    full = np.zeros(rows)
    np.add.at(full, ends, cost * (upper - lower)[:, None])
    budget = full * rng.random(rows) * (rng.random(rows) > 0.1)
    budget[rng.random(rows) < 0.05] = np.inf
    total = rng.random() * np.sum(cost.max(axis=1) * (upper - lower))
    return value, cost, ends, lower, upper, budget, total


def rounding(cost, rows, upper, num_rows):
    """What summing the full cost of a row may lose, in units of its dtype's eps."""
    scale = np.zeros(num_rows)
    np.add.at(scale, rows, cost * upper[:, None])
    return 8 * scale


def test_no_budget_is_ever_exceeded(eps):
    rng = np.random.default_rng(0)
    problems = [random_problem(rng) for _ in range(10_000)]
    batch = [np.stack(field) for field in zip(*problems)]
    solve = jit_well(jax.vmap(sg.allocate))
    spend = solve(*(jnp.asarray(field) for field in batch))
    value, cost, rows, lower, upper, budget, total = batch
    weights = np.asarray(spend.weights, float)
    raised = cost * (weights - lower)[..., None]
    spent = np.zeros_like(budget)
    np.add.at(spent, (np.arange(len(problems))[:, None, None], rows), raised)
    slack = eps * np.stack([rounding(*fields, 10) for fields in zip(cost, rows, upper)])
    everything = np.sum(cost.max(axis=2) * (weights - lower), axis=1)
    assert not (spent > budget + slack).any()
    assert not (everything > total + slack.sum(axis=1)).any()
    assert not (weights < lower * (1 - eps)).any()
    assert not (weights > upper * (1 + eps)).any()
    worthless = (value <= 0) & (cost.sum(axis=2) > 0)
    assert not (weights > lower * (1 + eps))[worthless].any()


def optimum(value, cost, rows, room, budget, total=np.inf):
    """The linear program's optimal value, by HiGHS."""
    terms, width = cost.shape
    entries = (cost.ravel(), (rows.ravel(), np.repeat(np.arange(terms), width)))
    matrix = csr_matrix(entries, shape=(len(budget), terms))
    if np.isfinite(total):
        matrix, budget = vstack([matrix, csr_matrix(cost.max(axis=1))]), np.append(budget, total)
    solved = linprog(-value, A_ub=matrix, b_ub=budget, bounds=np.stack([0 * room, room], axis=1))
    return -solved.fun


def graph_problem(seed):
    """Costs and values of a random graph's edges, budgets a random part of what is asked for."""
    rng = np.random.default_rng(seed)
    scenario = random_graph(list(KINDS)[seed % len(KINDS)], 60, 240, seed=seed)
    graph = scenario.graph
    # closed forms here, so that the 160 graphs need no compilation: cost of w (b x_j - a x_i)^2
    cost, value = [], []
    x = np.asarray(scenario.x0, float)
    for family in graph.edges:
        w, i, j = (np.asarray(field) for field in (family.weight, family.i, family.j))
        a, b = (
            np.asarray(getattr(family, "alpha_i", 1.0)),
            np.asarray(getattr(family, "beta_j", 1.0)),
        )
        if family.key == "GateBenefit":
            cost.append(np.zeros((len(w), 2)))
            value.append((w * np.asarray(family.delta)) ** 2)
            continue
        cost.append(2 * w[:, None] * np.stack([a * (a + b) + 0 * w, b * (a + b) + 0 * w], axis=1))
        gap = b * x[j] - a * x[i]
        gap = gap if family.key == "Quadratic" else np.maximum(gap, 0)
        value.append((2 * w * gap) ** 2 * (a**2 + b**2))
    cost, value = np.concatenate(cost), np.concatenate(value)
    rows = np.stack([graph.i, graph.j], axis=1)
    weights = rng.uniform(0.5, 1.5, len(value))
    lower, upper = 0.9 * weights, 1.1 * weights
    full = np.zeros(graph.num_nodes)
    np.add.at(full, rows, cost * (upper - lower)[:, None])
    return value, cost, rows, lower, upper, full * rng.random(graph.num_nodes)


def padded(value, cost, rows, lower, upper, *budgets):
    """Weights and outcome with terms added that are worth nothing: one compiled shape."""
    extra = 1800 - len(value)
    grown = [
        np.pad(f, [(0, extra)] + [(0, 0)] * (f.ndim - 1)) for f in (value, cost, rows, lower, upper)
    ]
    spend = allocate_many(*grown, *budgets)
    return np.asarray(spend.weights)[: len(value)], spend


@pytest.mark.x64
def test_value_against_the_linear_program():
    quality = []
    for seed in range(160):
        value, cost, rows, lower, upper, budget = graph_problem(seed)
        best = optimum(value, cost, rows, upper - lower, budget)
        weights = padded(value, cost, rows, lower, upper, budget)[0]
        quality.append(value @ (weights - lower) / best)
    assert np.median(quality) >= 0.995
    assert np.min(quality) >= 0.98
    assert np.max(quality) <= 1 + 1e-9


@pytest.mark.x64
def test_global_budget_against_the_linear_program():
    rng = np.random.default_rng(5)
    for seed in range(0, 40, 5):
        value, cost, rows, lower, upper, budget = graph_problem(seed)
        total = rng.uniform(0.1, 0.5) * np.sum(cost.max(axis=1) * (upper - lower))
        best = optimum(value, cost, rows, upper - lower, budget, total)
        weights, spend = padded(value, cost, rows, lower, upper, budget, total)
        assert spend.spent_global <= total * (1 + 1e-12)
        assert value @ (weights - lower) >= 0.98 * best


def test_one_budget_is_dantzigs_knapsack(eps):
    rng = np.random.default_rng(1)
    value, cost = rng.random(50), rng.random((50, 1)) + 0.1
    lower, upper = np.zeros(50), rng.random(50) + 0.5
    budget = np.array([0.4 * np.sum(cost[:, 0] * upper)])
    spend = allocate(value, cost, np.zeros((50, 1), int), lower, upper, budget)
    best = optimum(value, cost, np.zeros((50, 1), int), upper, budget)
    np.testing.assert_allclose(value @ np.asarray(spend.weights, float), best, rtol=100 * eps)
    np.testing.assert_allclose(spend.spent_rows, budget, rtol=100 * eps)


def test_segments_do_not_leak_in_float32():
    # a huge row first: differences of one global cumulative sum would lose the small one
    cost = np.array([[1e7], [1.0], [1.0]])
    rows = np.array([[0], [1], [1]])
    spend = allocate(np.ones(3), cost, rows, np.zeros(3), np.ones(3), np.array([1e7, 1.5]))
    np.testing.assert_allclose(np.sort(np.asarray(spend.weights)), [0.5, 1.0, 1.0], rtol=1e-6)


def test_order_of_terms_does_not_matter(eps):
    rng = np.random.default_rng(2)
    value, cost, rows, lower, upper, budget, total = random_problem(rng)
    budget = np.where(np.isfinite(budget), budget, 1e3)
    shuffle = rng.permutation(len(value))
    straight = allocate(value, cost, rows, lower, upper, budget, total).weights
    args = (field[shuffle] for field in (value, cost, rows, lower, upper))
    shuffled = allocate(*args, budget, total).weights
    np.testing.assert_allclose(straight[shuffle], shuffled, rtol=1e4 * eps, atol=1e4 * eps)


def test_scale_of_values_does_not_matter(eps):
    value, cost, rows, lower, upper, budget, _ = random_problem(np.random.default_rng(3))
    budget = np.where(np.isfinite(budget), budget, 1e3)
    small = allocate(value * 2.0**-20, cost, rows, lower, upper, budget).weights
    large = allocate(value * 2.0**20, cost, rows, lower, upper, budget).weights
    np.testing.assert_allclose(small, large, rtol=1e3 * eps)


def test_awkward_inputs():
    nothing = sg.allocate(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2), int), [], [], [1.0])
    assert nothing.weights.shape == (0,)
    np.testing.assert_array_equal(nothing.spent_rows, [0.0])
    bad = sg.allocate([np.nan, 1.0], [[1.0], [1.0]], [[0], [0]], [0.0, 0.0], [1.0, 1.0], [5.0])
    np.testing.assert_array_equal(bad.weights, [0.0, 1.0])
    owing = sg.allocate([1.0], [[1.0]], [[0]], [0.5], [1.0], [-2.0])
    np.testing.assert_array_equal(owing.weights, [0.5])
    free = sg.allocate([1.0], [[0.0]], [[0]], [0.5], [1.0], [0.0], 0.0)
    np.testing.assert_array_equal(free.weights, [1.0])


def shares_problem(rng, terms=20, num_rows=1):
    """Costs on every row, budgets from a twentieth of what all would take to more than that."""
    value = rng.lognormal(0, 2, terms)
    cost = rng.lognormal(0, 1, (terms, num_rows)) * (rng.random((terms, num_rows)) > 0.2)
    lower = rng.uniform(0.1, 1, terms)
    upper = lower + rng.uniform(0, 3, terms)
    full = np.sum(cost * (upper - lower)[:, None], axis=0)
    rows = np.broadcast_to(np.arange(num_rows), cost.shape)
    return value, cost, rows, lower, upper, full * rng.uniform(0.05, 1.1, num_rows)


fair = jax.jit(partial(sg.allocate, policy="fair"))


def test_fair_shares_of_one_budget_meet_the_kkt_conditions(eps):
    rng = np.random.default_rng(0)
    problems = [shares_problem(rng) for _ in range(200)]
    batch = [jnp.asarray(np.stack(field)) for field in zip(*problems)]
    spend = jax.jit(jax.vmap(partial(sg.allocate, policy="fair")))(*batch)
    for problem, weights in zip(problems, np.asarray(spend.weights, float)):
        value, cost, _, lower, upper, budget = problem
        cost = cost[:, 0]
        # rounding of w - l relative to what the budget buys
        slack = 200 * eps * np.sum(cost * weights)
        spent = np.sum(cost * (weights - lower))
        assert spent <= budget[0] + slack
        inside = (
            (weights > lower * (1 + 10 * eps)) & (weights < upper * (1 - 10 * eps)) & (cost > 0)
        )
        if budget[0] < np.sum(cost * (upper - lower)):
            assert spent >= budget[0] - slack
        else:
            np.testing.assert_allclose(weights, upper, rtol=10 * eps)
        if inside.any():
            # one price for all: v / (c w) is mu inside, no more at the top, no less at the bottom
            price = value[inside] / (cost[inside] * weights[inside])
            np.testing.assert_allclose(price, price[0], rtol=1e-5 if eps > 1e-10 else 1e-9)
            at_lower = (weights <= lower * (1 + eps)) & (cost > 0)
            at_upper = (weights >= upper * (1 - eps)) & (cost > 0)
            marginal = value / (np.where(cost > 0, cost, 1) * weights)
            assert (marginal[at_lower & (upper > lower)] <= price[0] * (1 + 1e-5)).all()
            assert (marginal[at_upper & (upper > lower)] >= price[0] * (1 - 1e-5)).all()


def largest_mean_log(value, matrix, limits, lower, upper):
    """The optimum of the fair problem by SciPy's SLSQP."""
    budgets = {
        "type": "ineq",
        "fun": lambda w: 1 - matrix.T @ (w - lower) / limits,
        "jac": lambda w: -matrix.T / limits[:, None],
    }
    solved = minimize(
        lambda w: -value @ np.log(w),
        lower,
        jac=lambda w: -value / w,
        bounds=list(zip(lower, upper)),
        constraints=budgets,
        method="SLSQP",
        options=dict(maxiter=1000, ftol=1e-14),
    )
    return -solved.fun


@pytest.mark.parametrize("num_rows", [2, 6])
def test_fair_shares_of_many_budgets_against_slsqp(num_rows, eps):
    rng = np.random.default_rng(num_rows)
    for _ in range(6):
        problem = shares_problem(rng, 16, num_rows)
        value, cost, _, lower, upper, budget = problem
        value = value / value.sum()
        total = 0.5 * np.sum(cost.max(axis=1) * (upper - lower))
        matrix = np.concatenate([cost, cost.max(axis=1)[:, None]], axis=1)
        limits = np.append(budget, total)
        best = largest_mean_log(value, matrix, limits, lower, upper)
        weights = np.asarray(fair(*problem, total).weights, float)
        assert value @ np.log(weights) >= best - (1e-7 if eps < 1e-10 else 1e-5)
        assert (matrix.T @ (weights - lower) <= limits + 200 * eps * (matrix.T @ weights)).all()


def test_fair_shares_of_a_graph_are_feasible_and_close_to_the_optimum(eps):
    # many rows: all priced at once; the optimum by ten times the rounds
    rng = np.random.default_rng(4)
    rows = rng.integers(50, size=(200, 2))
    value, cost = rng.lognormal(0, 2, 200), rng.lognormal(0, 1, (200, 2))
    lower = rng.uniform(0.1, 1, 200)
    upper = lower + rng.uniform(0, 3, 200)
    full = np.zeros(50)
    np.add.at(full, rows, cost * (upper - lower)[:, None])
    problem = value, cost, rows, lower, upper, full * rng.uniform(0.05, 1.1, 50)
    spend, best = (allocate(*problem, policy="fair", rounds=rounds).weights for rounds in (8, 80))
    spent, whole = np.zeros(50), np.zeros(50)
    np.add.at(spent, rows, cost * (np.asarray(spend, float) - lower)[:, None])
    np.add.at(whole, rows, cost * upper[:, None])
    assert (spent <= problem[-1] + 20 * eps * whole).all()
    utility = lambda w: value @ np.log(np.asarray(w, float)) / value.sum()
    assert utility(spend) >= utility(best) - 1e-3
    assert utility(spend) > utility(allocate(*problem).weights)


def test_fair_shares_of_awkward_budgets():
    one, two = np.ones(2), np.zeros((2, 1), int)
    free = fair(one, [[0.0], [1.0]], two, 0.1 * one, one, [0.0])
    np.testing.assert_allclose(free.weights, [1.0, 0.1], rtol=1e-6)
    worthless = fair([0.0, np.nan], np.ones((2, 1)), two, 0.1 * one, one, [5.0])
    np.testing.assert_allclose(worthless.weights, [0.1, 0.1], rtol=1e-6)
    unlimited = fair(one, np.ones((2, 1)), two, 0 * one, one, [np.inf])
    np.testing.assert_allclose(unlimited.weights, one)
    from_zero = fair([3.0, 1.0], np.ones((2, 1)), two, 0 * one, one, [0.4])
    np.testing.assert_allclose(from_zero.weights, [0.3, 0.1], rtol=1e-6)
    nothing = sg.allocate(
        np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2), int), [], [], [1.0], policy="fair"
    )
    assert nothing.weights.shape == (0,)


def test_fair_gives_no_gradient_of_its_prices():
    problem = shares_problem(np.random.default_rng(0), 4)
    slope = jax.jit(
        jax.grad(lambda v: jnp.sum(sg.allocate(v, *problem[1:], policy="fair").weights))
    )
    np.testing.assert_array_equal(slope(jnp.asarray(problem[0], float)), np.zeros(4))


def in_sequence(value, cost, rows, room, budget):
    """The greedy that serves one term after the other, in order of value over cost."""
    taken, left = np.zeros_like(room), budget.copy()
    paid = cost.sum(axis=1)
    for k in np.argsort(-value / np.where(paid > 0, paid, 1e-300), kind="stable"):
        reach = [left[r] / c for r, c in zip(rows[k], cost[k]) if c > 0]
        taken[k] = max(0.0, min([room[k], *reach])) if value[k] > 0 else 0.0
        np.subtract.at(left, rows[k], cost[k] * taken[k])
    return taken


def test_classes_of_score_are_worth_the_sequential_greedy(eps):
    for seed in range(8):
        value, cost, rows, lower, upper, budget = graph_problem(seed)
        room = upper - lower
        best = value @ in_sequence(value, cost, rows, room, budget)
        pad = 1800 - len(value)
        grown = [
            np.pad(f, [(0, pad)] + [(0, 0)] * (f.ndim - 1))
            for f in (value, cost, rows, lower, upper)
        ]
        spend = allocate(*grown, budget, bins=32, rounds=3)
        weights = np.asarray(spend.weights, float)[: len(value)]
        slack = rounding(cost, rows, upper, len(budget)) * eps
        spent = np.zeros(len(budget))
        np.add.at(spent, rows, cost * (weights - lower)[:, None])
        assert (spent <= budget + slack).all()
        assert value @ (weights - lower) >= 0.98 * best


def test_classes_of_score_never_exceed_a_budget(eps):
    rng = np.random.default_rng(7)
    problems = [random_problem(rng) for _ in range(1000)]
    batch = [jnp.asarray(np.stack(field)) for field in zip(*problems)]
    spend = jax.jit(jax.vmap(partial(sg.allocate, bins=8, rounds=2)))(*batch)
    for problem, weights in zip(problems, np.asarray(spend.weights, float)):
        value, cost, rows, lower, upper, budget, total = problem
        slack = rounding(cost, rows, upper, 10) * eps
        spent = np.zeros(10)
        np.add.at(spent, rows, cost * (weights - lower)[:, None])
        assert (spent <= budget + slack).all()
        assert np.sum(cost.max(axis=1) * (weights - lower)) <= total + slack.sum()
        free = (cost.sum(axis=1) == 0) & (value > 0)
        np.testing.assert_allclose(weights[free], upper[free], rtol=10 * eps)


@pytest.mark.parametrize("policy", ["greedy", "fair"])
def test_a_row_that_a_term_names_twice_is_paid_twice(policy, eps):
    # beside a term on two rows, so that more than one budget is at stake
    value, lower, upper = np.ones(2), np.full(2, 0.1), np.full(2, 2.1)
    cost, rows = np.ones((2, 2)), np.array([[0, 0], [1, 2]])
    spend = allocate(value, cost, rows, lower, upper, [1.0, 1.0, 5.0], policy=policy)
    np.testing.assert_allclose(spend.weights, [0.6, 1.1], rtol=100 * eps)
    np.testing.assert_allclose(spend.spent_rows, [1.0, 1.0, 1.0], rtol=100 * eps)
    assert np.isclose(spend.spent_global, 1.0 + 1.0)


@pytest.mark.parametrize("policy", ["greedy", "fair"])
def test_units_may_leave_the_range_of_products(policy):
    top = float(jnp.finfo(jnp.result_type(float)).max)
    big, room = top ** (0.8), top ** (0.4)
    one, rows = np.ones(2), np.array([[0], [0]])
    # cost times room overflows; what the budget of one row buys does not
    spend = allocate(one, big * one[:, None], rows, 0 * one, room * one, [big], policy=policy)
    assert np.isfinite(spend.weights).all()
    np.testing.assert_allclose(np.sum(spend.weights), 1.0, rtol=1e-5)
    several = allocate(
        one, big * np.ones((2, 2)), np.array([[0, 1], [1, 2]]), 0 * one, room * one, 3 * [big],
        policy=policy,
    )  # fmt: skip
    np.testing.assert_allclose(np.sum(several.weights), 1.0, rtol=1e-3)
    # under a transformation nothing can refuse an infinite bound: it takes no more than there is
    endless = allocate([2.0, 1.0], np.ones((2, 1)), rows, 0 * one, [np.inf, 1.0], [3.0])
    np.testing.assert_allclose(endless.weights, [3.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"bins": 4}, {"policy": "fair"}], ids=str)
def test_terms_that_touch_no_row_go_to_their_upper_weight(settings):
    spend = sg.allocate(
        np.ones(3), np.zeros((3, 0)), np.zeros((3, 0), int), 0.1 * np.ones(3), np.ones(3), [1.0],
        **settings,
    )  # fmt: skip
    np.testing.assert_allclose(spend.weights, 1.0)
    np.testing.assert_array_equal(spend.spent_rows, [0.0])


def spread_problem(rng, terms=48, num_rows=16, width=2):
    """Costs and values spread over two decades, which a fixed price per row misjudges."""
    rows = np.stack([rng.permutation(num_rows)[:width] for _ in range(terms)])
    value, cost = 10 ** rng.uniform(-1, 1, terms), 10 ** rng.uniform(-1, 1, (terms, width))
    room = rng.uniform(0.1, 1, terms)
    full = np.zeros(num_rows)
    np.add.at(full, rows, cost * room[:, None])
    return value, cost, rows, np.zeros(terms), room, full * rng.random(num_rows)


def test_costs_of_two_decades_against_the_linear_program():
    rng = np.random.default_rng(0)
    quality = []
    for _ in range(60):
        problem = spread_problem(rng)
        value, cost, rows, _, room, budget = problem
        weights = np.asarray(allocate(*problem).weights, float)
        quality.append(value @ weights / optimum(value, cost, rows, room, budget))
    assert np.median(quality) >= 0.999
    assert np.min(quality) >= 0.99
    assert np.max(quality) <= 1 + 1e-5


def test_more_budget_is_never_worth_less_than_stated():
    rng = np.random.default_rng(1)
    problems = [spread_problem(rng, 24, 10) for _ in range(2000)]
    batch = [np.stack(field) for field in zip(*problems)]
    more = batch[-1] * (1 + rng.random(batch[-1].shape) * (rng.random(batch[-1].shape) < 0.3))
    run = jit_well(jax.vmap(lambda *problem: sg.allocate(*problem).weights))
    before, after = (
        np.sum(batch[0] * np.asarray(run(*batch[:-1], budget), float), axis=1)
        for budget in (batch[-1], more)
    )
    assert np.quantile(after / before, 0.001) >= 1 - 1e-3
    assert np.min(after / before) >= 0.99


@pytest.mark.once
def test_many_terms_are_served_by_classes():
    rng = np.random.default_rng(0)
    terms, num_rows = 20_000, 2_000
    rows = rng.integers(num_rows, size=(terms, 2))
    value, cost = rng.lognormal(0, 1, terms), rng.uniform(0.5, 2, (terms, 2))
    room = np.ones(terms)
    full = np.zeros(num_rows)
    np.add.at(full, rows, cost)
    budget = full * rng.random(num_rows)
    weights = np.asarray(allocate(value, cost, rows, 0 * room, room, budget).weights, float)
    named = allocate(value, cost, rows, 0 * room, room, budget, bins=24, rounds=3).weights
    np.testing.assert_array_equal(weights, np.asarray(named, float))
    both = np.where(rows[:, :1] == rows[:, 1:], np.stack([cost.sum(1), 0 * room], 1), cost)
    best = value @ in_sequence(value, both, rows, room, budget)
    assert value @ weights >= 0.995 * best
    spent = np.zeros(num_rows)
    np.add.at(spent, rows, cost * weights[:, None])
    assert (spent <= budget * (1 + 1e-5)).all()


GOOD = dict(
    value=[1.0], cost=[[1.0, 1.0]], rows=[[0, 1]], lower=[0.0], upper=[1.0], row_budget=[1.0, 1.0]
)
BAD = [
    (dict(policy="best"), "policy"),
    (dict(rounds=0), "rounds"),
    (dict(bins=1), "bins = 1"),
    (dict(bins=-1), "bins = -1"),
    (dict(upper=[np.inf]), r"upper\[0\] = inf must be finite"),
    (dict(lower=[-np.inf]), r"lower\[0\] = -inf must be finite"),
    (dict(bins=8, policy="fair"), "bins = 8"),
    (dict(lower=[-1.0], policy="fair"), r"lower\[0\] = -1.0 must be finite and at least 0"),
    (dict(value=[[1.0]]), "value must"),
    (dict(lower=[0.0, 0.0]), "lower has shape"),
    (dict(lower=[2.0]), r"lower\[0\] = 2.0 exceeds"),
    (dict(cost=[1.0]), "cost has shape"),
    (dict(cost=[[-1.0, 1.0]]), r"cost\[0, 0\] = .* must be finite and at least 0"),
    (dict(cost=[[np.nan, 1.0]]), r"cost\[0, 0\] = .* must be finite and at least 0"),
    (dict(rows=[[0, 2]]), r"rows must lie in 0\.\.1"),
    (dict(rows=[[0.0, 1.0]]), "rows must be int"),
    (dict(row_budget=1.0), "row_budget must have shape"),
    (dict(row_budget=[np.nan, 1.0]), "must not be NaN"),
    (dict(global_budget=[1.0]), "global_budget must be a scalar"),
]


@pytest.mark.once
@pytest.mark.parametrize(("change", "message"), BAD, ids=range(len(BAD)))
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sg.allocate(**GOOD | change)


def test_what_a_program_closes_over_is_checked_too():
    fields = {name: jnp.asarray(field) for name, field in GOOD.items()}
    inside = jax.jit(lambda: sg.allocate(**fields))()
    chex.assert_trees_all_close(inside, sg.allocate(**fields))
    outside = fields | {"rows": jnp.array([[0, 2]])}
    with pytest.raises(ValueError, match=r"rows must lie in 0\.\.1"):
        jax.jit(lambda: sg.allocate(**outside))()
