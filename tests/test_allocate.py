import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

import smallgain_jax as sg
from smallgain_jax.scenarios import KINDS, random_graph

allocate = jax.jit(sg.allocate, static_argnames=("policy", "rounds", "repricings"))


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
    spend = jax.jit(jax.vmap(sg.allocate))(*(jnp.asarray(field) for field in batch))
    violations = 0
    for k, (value, cost, rows, lower, upper, budget, total) in enumerate(problems):
        weights = np.asarray(spend.weights[k], float)
        slack = rounding(cost, rows, upper, 10) * eps
        spent = np.zeros(10)
        np.add.at(spent, rows, cost * (weights - lower)[:, None])
        everything = np.sum(cost.max(axis=1) * (weights - lower))
        violations += int((spent > budget + slack).any() or everything > total + slack.sum())
        violations += int(
            (weights < lower * (1 - eps)).any() or (weights > upper * (1 + eps)).any()
        )
        worthless = (value <= 0) & (cost.sum(axis=1) > 0)
        violations += int((weights[worthless] > lower[worthless] * (1 + eps)).any())
    assert violations == 0


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


@pytest.mark.x64
def test_value_against_the_linear_program():
    quality = []
    pad = 1800
    for seed in range(160):
        value, cost, rows, lower, upper, budget = graph_problem(seed)
        best = optimum(value, cost, rows, upper - lower, budget)
        extra = pad - len(value)  # one compiled shape: terms that are worth nothing
        grown = [
            np.pad(f, [(0, extra)] + [(0, 0)] * (f.ndim - 1))
            for f in (value, cost, rows, lower, upper)
        ]
        weights = np.asarray(allocate(*grown, budget).weights)[: len(value)]
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
        spend = sg.allocate(value, cost, rows, lower, upper, budget, total)
        assert spend.spent_global <= total * (1 + 1e-12)
        assert value @ (np.asarray(spend.weights) - lower) >= 0.98 * best


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


GOOD = dict(
    value=[1.0], cost=[[1.0, 1.0]], rows=[[0, 1]], lower=[0.0], upper=[1.0], row_budget=[1.0, 1.0]
)
BAD = [
    (dict(policy="best"), "policy"),
    (dict(rounds=0), "rounds"),
    (dict(repricings=-1), "repricings"),
    (dict(value=[[1.0]]), "value must"),
    (dict(lower=[0.0, 0.0]), "lower has shape"),
    (dict(lower=[2.0]), r"lower\[0\] = 2.0 exceeds"),
    (dict(cost=[1.0]), "cost has shape"),
    (dict(cost=[[-1.0, 1.0]]), "cost must be finite"),
    (dict(cost=[[np.nan, 1.0]]), "cost must be finite"),
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
