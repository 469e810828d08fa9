"""The demo: its columns recomputed from the states it returns, its files, its command."""

import jax
import numpy as np
import pytest

from smallgain_jax.tools import demo, scenarios
from smallgain_jax.tools.cli import main
from smallgain_jax.tools.validation import RATES

pytestmark = pytest.mark.x64

STEPS = 8
METHODS = [
    *("fixed step", "capped step", "line search", "GradNorm", "auto-cap"),
    *("small_gain, default preset", "small_gain, momentum", "L-BFGS", "default"),
]
PROBLEMS = {"baseline": scenarios.baseline, "dense": scenarios.dense}


@pytest.fixture(scope="module")
def outcome():
    return demo.run(STEPS)


def test_every_method_has_a_row(outcome):
    assert list(outcome.tables) == list(outcome.results) == list(outcome.minima) == [*PROBLEMS]
    for name, results in outcome.results.items():
        assert [result.method for result in results] == METHODS
        assert sorted(outcome.tables[name]["method"]) == sorted(METHODS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_energies_are_those_of_the_states(outcome, name):
    problem = PROBLEMS[name]()
    energy = jax.jit(lambda x, weights=None: problem.graph.energy(x, weights))
    start = energy(problem.x0)
    for result in outcome.results[name]:
        assert result.energy.shape == result.adapted.shape == (STEPS + 1,)
        assert result.energy.dtype == np.float64
        np.testing.assert_allclose(result.energy[0], start, rtol=1e-13)
        np.testing.assert_allclose(result.energy[-1], energy(result.x), atol=1e-14)
        np.testing.assert_allclose(result.adapted[-1], energy(result.x, result.weights), atol=1e-14)
        assert result.energy.min() >= problem.minimum - 1e-12
        assert ((result.x >= 0) & (result.x <= 1)).all()


def test_methods_without_weights_have_one_energy(outcome):
    for results in outcome.results.values():
        for result in results:
            if not result.method.startswith(("GradNorm", "auto-cap", "small_gain")):
                np.testing.assert_array_equal(result.weights, 1)
                np.testing.assert_array_equal(result.energy, result.adapted)


@pytest.mark.parametrize("name", PROBLEMS)
def test_columns_follow_from_the_energies(outcome, name):
    table, minimum = outcome.tables[name], outcome.minima[name]
    by_method = {result.method: result for result in outcome.results[name]}
    for k, method in enumerate(table["method"]):
        result = by_method[method]
        start = result.energy[0]
        # the threshold is the same for every method
        below = [n for n, e in enumerate(result.energy) if e <= start - 0.9 * (start - minimum)]
        np.testing.assert_equal(table["delta_f90"][k], below[0] if below else np.nan)
        logged = result.adapted[1:]
        aim = logged[0] - 0.9 * (logged[0] - logged.min())
        assert table["delta_f90_own"][k] == 1 + next(n for n, e in enumerate(logged) if e <= aim)
        gap = (result.energy[-1] - minimum) / (start - minimum)
        np.testing.assert_allclose(table["gap"][k], gap, atol=1e-15)
        assert table["final_reference"][k] == result.energy[-1]
        assert table["final_adapted"][k] == result.adapted[-1]
        assert table["backtracks"][k] == result.backtracks


def test_rows_are_sorted_and_nothing_else(outcome):
    for table in outcome.tables.values():
        steps = np.nan_to_num(table["delta_f90"], nan=np.inf)
        keys = list(zip(steps, table["gap"], strict=True))
        assert keys == sorted(keys)


def test_rates_are_tuned_on_the_same_grid(outcome):
    for name, results in outcome.results.items():
        problem = PROBLEMS[name]()
        bound = float(jax.jit(lambda p=problem: p.graph.curvature(p.x0).lipschitz)())
        for result in results:
            if result.method in ("L-BFGS", "default"):
                assert np.isnan(result.learning_rate)
            elif result.method == "capped step":
                assert result.learning_rate <= 1 / bound * (1 + 1e-12)
            else:
                assert result.learning_rate in RATES


def test_command_writes_tables_and_a_figure(outcome, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda steps: outcome)
    assert main(["demo", "--out", str(tmp_path / "a" / "b"), "--steps", str(STEPS)]) == 0
    files = {path.name: path for path in (tmp_path / "a" / "b").iterdir()}
    assert sorted(files) == ["baseline.csv", "dense.csv", "energy.png"]
    assert files["energy.png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(files["dense.csv"].read_text().splitlines()) == 1 + len(METHODS)
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert outcome._repr_html_().count("<table>") == 2


def test_steps_are_checked():
    with pytest.raises(ValueError, match="steps = 0 must be at least 1"):
        demo.run(0)
