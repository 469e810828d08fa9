"""The ordinary tasks are what they say, and the comparison compares."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from bench.training import ordinary
from bench.training.tasks import TASKS, make

pytestmark = pytest.mark.once
NEEDS = {"posterior": "numpyro", "flow": "flowjax"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_its_losses_and_a_measure_that_training_lowers(name):
    for module in ("sklearn", NEEDS.get(name, "jax")):
        pytest.importorskip(module)
    task = make(name)
    params, data, held = ordinary._start(task, 0)
    batch = task.batch(data, jax.random.key(1))
    losses = task.losses(params, *batch)
    assert tuple(losses) == task.names
    assert all(np.shape(loss) == () and np.isfinite(loss) for loss in losses.values())
    found = ordinary.run(task, ordinary.POLICIES["plain"], task.rate, 100, seeds=1)
    assert 0 < found["final"][0] < task.measure(params, held)


def test_a_wrapper_that_does_nothing_has_ratio_one_and_weights_are_reported():
    task = make("regression")
    none = ordinary.run(task, lambda base, _: optax.chain(base), 1e-2, 50, seeds=2)
    plain = ordinary.run(task, ordinary.POLICIES["plain"], 1e-2, 50, seeds=2)
    assert none["final"] == plain["final"]
    held = ordinary.parsed("greedy:warmup=1000,guard=None")
    found = ordinary.run(task, held, 1e-2, 50, seeds=2)
    assert found["weights"] == [[1.0, 1.0, 1.0]] * 2
    np.testing.assert_allclose(found["final"], plain["final"], rtol=1e-4)


def test_policies_take_keyword_arguments():
    losses = sg.terms(lambda x: {"all": jnp.sum(x**2)})
    state = ordinary.parsed("fair:every=5,floor=0.5")(optax.sgd(0.1), losses).init(jnp.ones(2))
    assert state.weights.tolist() == [1.0]
    with pytest.raises(ValueError, match="every = 0 must be at least 1"):
        ordinary.parsed("fair:every=0")(optax.sgd(0.1), losses)
    with pytest.raises(ValueError, match="policy 'nice' is unknown"):
        ordinary.parsed("nice")


def test_a_file_is_resumed_and_a_run_that_diverged_is_null(tmp_path, capsys):
    out = tmp_path / "ordinary.json"
    command = ["--tasks", "regression", "--seeds", "1", "--steps", "50", "--out", str(out)]
    ordinary.main([*command, "--rates", "1e25", "--policies"])
    ordinary.main([*command, "--policies", "fair"])
    first = out.read_text()
    ordinary.main([*command, "--policies", "fair"])
    assert out.read_text() == first
    cells = json.loads(first)["cells"]
    far = cells.pop("regression 1e+25 plain")
    assert far["final"] == [None]
    assert set(cells) == {"regression 0.003 plain", "regression 0.003 fair"}
    assert "| regression | fair |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ordinary.main([*command, "--seeds", "2"])
