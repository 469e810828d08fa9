"""Telemetry: every column against what it is defined by, and tables in files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest

from smallgain_jax import EnergyGraph, Landau, Quadratic, auto_cap, gradnorm, relax, small_gain
from smallgain_jax.tools import scenarios, telemetry
from smallgain_jax.tools.telemetry import Table, family_record, record, table

STEPS = 6


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def problem():
    return scenarios.random_graph("uniform", 12, 30, seed=3)


@pytest.fixture(scope="module")
def states(problem):
    """A relaxation that recorded the optimizer's whole state, [steps, ...]."""
    optimizer = small_gain(optax.sgd(0.05), problem.graph)
    return relax(problem.graph, problem.x0, optimizer, STEPS, record=lambda state: state)


def recorded(states, keep):
    history = jax.vmap(keep)(states.info.history)
    return states._replace(info=states.info._replace(history=history))


@pytest.fixture(scope="module")
def result(states):
    return recorded(states, record)


def test_columns_carry_the_names_of_the_design(problem, result):
    named = table(problem.graph, result, rows=True).columns
    keys = problem.graph.keys
    families = (
        "alloc:coup:{}",
        "cost:coup:{}",
        "grad_norm:coup:{}",
        "score:coup:{}",
        "hinge_activity:{}",
        "share:{}",
    )
    rows = ("margin:row:{}", "spent:row:{}")
    expected = {
        *("step", "margin:global", "spent:global", "contraction_margin", "margin_warn"),
        *("last_step_backtracks", "total_backtracks", "energy:reference", "energy:adapted"),
        *("sharpness_ratio", "spent:cumulative"),
        *(name.format(key) for name in families for key in keys),
        *(name.format(row) for name in rows for row in range(problem.graph.num_nodes)),
    }
    assert set(named) == expected
    assert not any(":row:" in name for name in table(problem.graph, result).columns)


def test_columns_agree_with_their_definitions(problem, result):
    graph, told = problem.graph, table(problem.graph, result, rows=True, final=False)
    found = jax.tree.map(np.asarray, result.info.history)
    info, family = found.info, graph.family_index
    np.testing.assert_array_equal(told["step"], np.arange(STEPS))
    np.testing.assert_array_equal(told["energy:reference"], result.energy[:-1])
    np.testing.assert_allclose(told["energy:reference"], info.energy_reference, rtol=1e-6)
    np.testing.assert_allclose(told["sharpness_ratio"], info.lipschitz / info.limit, rtol=1e-6)
    np.testing.assert_allclose(
        told["contraction_margin"], 2 / info.lipschitz - 2 / info.limit, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(told["margin_warn"], told["margin:global"] < 0)
    np.testing.assert_allclose(
        told["spent:cumulative"], np.cumsum(info.spent_global, dtype=np.float64), rtol=1e-6
    )
    rows = np.stack([told[f"margin:row:{r}"] for r in range(graph.num_nodes)], axis=1)
    np.testing.assert_allclose(rows.min(axis=1), told["margin:global"], rtol=1e-5, atol=1e-6)
    spent = np.stack([told[f"spent:row:{r}"] for r in range(graph.num_nodes)], axis=1)
    np.testing.assert_array_equal(spent, info.spent_rows)
    for k, key in enumerate(graph.keys):
        mine = family == k
        priced = (found.weights * info.cost)[:, mine].sum(axis=1)
        for name, expected in {
            f"alloc:coup:{key}": found.weights[:, mine].mean(axis=1),
            f"cost:coup:{key}": priced,
            f"score:coup:{key}": found.scores[:, mine].mean(axis=1),
            f"hinge_activity:{key}": info.hinge_activity[:, mine].mean(axis=1),
            f"share:{key}": priced / (found.weights * info.cost).sum(axis=1),
        }.items():
            np.testing.assert_allclose(told[name], expected, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(sum(told[f"share:{key}"] for key in graph.keys), 1, rtol=1e-5)


def test_gradient_norms_are_those_of_the_terms(problem, states, result):
    graph = problem.graph
    # every state but the last, started from itself, is where an update measured
    xs = [problem.x0]
    for k in range(1, 3):
        optimizer = small_gain(optax.sgd(0.05), graph)
        xs.append(relax(graph, problem.x0, optimizer, k).x)
    told = table(graph, result)
    for k, x in enumerate(xs):
        gradients = np.asarray(graph.term_gradients(x))
        for f, key in enumerate(graph.keys):
            norm = np.linalg.norm(gradients[graph.family_index == f])
            np.testing.assert_allclose(told[f"grad_norm:coup:{key}"][k], norm, rtol=1e-4, atol=1e-7)


def test_the_last_state_is_a_row(problem, result):
    updates, told = (table(problem.graph, result, rows=True, final=f) for f in (False, True))
    assert told.num_rows == updates.num_rows + 1 == STEPS + 1
    assert told["energy:reference"][-1] == result.energy[-1]
    assert told["step"][-1] == STEPS
    for name, values in updates.columns.items():
        np.testing.assert_array_equal(told[name][:-1], values)
        assert told[name].dtype == values.dtype
    assert np.isnan(told["margin:global"][-1])
    for name in telemetry.CUMULATIVE:
        assert told[name][-1] == updates[name][-1]


def test_the_warning_has_a_threshold(problem, result):
    margins = table(problem.graph, result)["margin:global"][:-1]
    threshold = float(np.median(margins))
    told = table(problem.graph, result, margin_threshold=threshold)
    np.testing.assert_array_equal(told["margin_warn"][:-1], margins < threshold)
    assert 0 < told["margin_warn"].sum() < STEPS


def test_family_record_tells_the_same(problem, states, result):
    small = recorded(states, family_record(problem.graph, rows=True))
    told, expected = (table(problem.graph, r, rows=True) for r in (small, result))
    assert set(told.columns) == set(expected.columns)
    for name, values in expected.columns.items():
        np.testing.assert_allclose(told[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_equal_recorders_compile_once(problem):
    traces = []

    def counted(updates, state, params=None):
        traces.append(0)
        return jax.tree.map(lambda g: -0.01 * g, updates), state

    optimizer = optax.GradientTransformation(lambda params: (), counted)
    for _ in range(2):
        for keep in (record, family_record(problem.graph)):
            relax(problem.graph, problem.x0, optimizer, 2, record=keep)
    # a scan may trace its body more than once, but only in the two compilations
    before = len(traces)
    relax(problem.graph, problem.x0, optimizer, 2, record=family_record(problem.graph))
    assert len(traces) == before


def test_record_finds_states_inside_others(problem):
    graph, x = problem.graph, problem.x0
    nested = optax.chain(optax.identity(), small_gain(optax.sgd(0.1), graph))
    injected = optax.inject_hyperparams(lambda learning_rate: auto_cap(optax.sgd(0.1), graph))(0.1)
    for optimizer in (nested, injected, gradnorm(optax.sgd(0.1), graph)):
        assert isinstance(record(optimizer.init(x)), telemetry.WeightsRecord)
    # what is outside tells more than the line search it wraps
    wrapped = small_gain(optax.chain(optax.sgd(1.0)), graph)
    assert isinstance(record(wrapped.init(x)), telemetry.WeightsRecord)
    assert isinstance(record(optax.lbfgs().init(x)), telemetry.SearchRecord)
    assert record(optax.adam(0.1).init(x)) is None


def test_default_optimizer_has_backtracks_only(problem):
    result = relax(problem.graph, problem.x0, steps=STEPS, record=record)
    assert list(table(problem.graph, result).columns) == [
        *("step", "energy:reference", "last_step_backtracks", "total_backtracks")
    ]


@pytest.mark.parametrize("keep", [None, record])
def test_unknown_optimizer_has_energies(problem, keep):
    result = relax(problem.graph, problem.x0, optax.sgd(0.01), STEPS, record=keep)
    assert list(table(problem.graph, result).columns) == ["step", "energy:reference"]


def test_line_search_counts_add_up(problem):
    result = relax(problem.graph, problem.x0, optax.lbfgs(), STEPS, record=record)
    told = table(problem.graph, result)
    np.testing.assert_array_equal(told["total_backtracks"], np.cumsum(told["last_step_backtracks"]))
    assert (told["last_step_backtracks"] >= 0).all()


def test_steps_after_the_tolerance_have_no_row():
    graph = EnergyGraph(Landau(a=jnp.ones(2)), [Quadratic([0], [1], 0.5)])
    result = relax(graph, jnp.array([1.0, 0.5]), steps=50, tol=1e-5, record=record)
    assert result.info.converged
    assert table(graph, result).num_rows == int(result.info.steps) + 1 < 50


def test_vector_nodes_name_their_components():
    graph = EnergyGraph(None, [Quadratic([0], [1], 0.5)], num_nodes=2)
    optimizer = auto_cap(optax.sgd(0.1), graph)
    x0 = jnp.array([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    told = table(graph, relax(graph, x0, optimizer, 2, record=record), rows=True)
    margins = [name for name in told.columns if name.startswith("margin:row:")]
    assert margins == [f"margin:row:{n}:{c}" for n in range(2) for c in range(3)]


def test_batch_and_foreign_record_are_refused(problem):
    batch = jax.vmap(lambda x: relax(problem.graph, x, optax.sgd(0.01), 2))(
        jnp.stack([problem.x0, problem.x0])
    )
    with pytest.raises(ValueError, match="result has energies of shape"):
        table(problem.graph, batch)
    foreign = relax(problem.graph, problem.x0, optax.sgd(0.01), 2, record=lambda state: jnp.ones(3))
    with pytest.raises(ValueError, match="result was not recorded"):
        table(problem.graph, foreign)


@pytest.fixture
def small():
    return Table(
        {
            "step": np.arange(3),
            "a<b": np.array([0.5, np.nan, -1e-12], np.float32),
            "name": np.array(["x", "yy", "z"]),
        }
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
def test_tables_survive_files(small, tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    small.write(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".npz":
        with np.load(path) as file:
            columns = dict(file)
    else:
        frame = pl.read_csv(path) if suffix == ".csv" else pl.read_parquet(path)
        columns = {name: frame[name].to_numpy() for name in frame.columns}
    assert list(columns) == list(small.columns)
    np.testing.assert_array_equal(columns["a<b"].astype(np.float32), small["a<b"])
    assert columns["step"].tolist() == [0, 1, 2]
    assert columns["name"].tolist() == ["x", "yy", "z"]


def test_tables_are_shown(small):
    lines = str(small).splitlines()
    assert lines[0].split() == ["step", "a<b", "name"]
    assert lines[2].split() == ["1", "-", "yy"]
    assert "<th>a&lt;b</th>" in small._repr_html_()
    assert small._repr_html_().count("<tr>") == 4
    long = Table({"step": np.arange(1000)})
    assert len(str(long).splitlines()) == telemetry.SHOWN_ROWS + 2
    assert str(long).splitlines()[-1].strip() == "999"
    assert str(Table({})) == ""


def test_bad_tables_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match=r"path = .* must end in one of .csv"):
        small.write(tmp_path / "table.xlsx")
    with pytest.raises(ValueError, match="columns must be one-dimensional"):
        Table({"a": np.zeros(2), "b": np.zeros(3)})
    assert not list(tmp_path.iterdir())
