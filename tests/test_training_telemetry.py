"""Telemetry of training: every column against the loop's own numbers."""

import io
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.losses.state import Names


def quadratics(x):
    return {"soft": jnp.sum((x - 1) ** 2), "stiff": 50 * jnp.sum(x**2)}


LOSSES = sg.terms(quadratics)


def start(optimizer):
    return jnp.full(2, 2.0), optimizer.init(jnp.full(2, 2.0))


def test_a_scan_becomes_a_table(eps):
    optimizer = optax.chain(sg.small_gain(optax.sgd(0.1), LOSSES, policy="fair", every=1))

    def step(carry, _):
        x, state = carry
        values, gradient = LOSSES.value_and_weighted_grad(jnp.ones(2), x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), (sg.training.record(state), values)

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=20))
    _, (history, values) = run(start(optimizer))
    table = sg.training.table(history)
    np.testing.assert_array_equal(table["step"], np.arange(20))
    np.testing.assert_allclose(table["loss:soft"], values[:, 0], rtol=10 * eps)
    np.testing.assert_allclose(table["loss:total"], values.sum(axis=1), rtol=10 * eps)
    np.testing.assert_allclose(table["share:soft"] + table["share:stiff"], 1, rtol=10 * eps)
    np.testing.assert_allclose(table["weight:stiff"], 1 / 200, rtol=1e-3)
    # curvature 1 in all, of a limit of 2 / 0.1
    np.testing.assert_allclose(table["sharpness"], 1, rtol=1e-3)
    np.testing.assert_allclose(table["sharpness_ratio"], 1 / 20, rtol=1e-3)
    assert table["rewinds"].dtype == np.int32
    with pytest.raises(ValueError, match="one run of a batch"):
        sg.training.table(jax.tree.map(lambda leaf: leaf[None], history))


@pytest.mark.once
def test_what_is_not_known_is_left_out():
    """Lion has no limit, and a weighted update that is told no values evaluates no loss."""
    optimizer = sg.small_gain(optax.lion(0.1), LOSSES, guard=None)
    x, state = start(optimizer)
    table = sg.training.table([state, optimizer.update(x, state, x)[1]])
    for name in ("limit", "sharpness_ratio", "loss:total"):
        assert np.all(np.isnan(table[name])), name
    assert np.isnan(table["share:soft"][0])
    np.testing.assert_array_equal(table["guard"], 1)
    with pytest.raises(ValueError, match="no TrainingState"):
        sg.training.record(optax.adam(0.1).init(x))
    with pytest.raises(ValueError, match="empty"):
        sg.training.table([])


@pytest.mark.once
def test_a_loop_on_the_host_is_written_while_it_runs(tmp_path):
    optimizer = sg.small_gain(optax.adam(0.01), LOSSES, policy="fair", warmup=4, every=2)
    step = sg.train_step(LOSSES, optimizer)
    x, state = start(optimizer)
    stream, kept = io.StringIO(), []
    targets = tmp_path / "run.jsonl", sg.training.ProgressSink(10, stream)
    with sg.training.log(*targets, every=3) as told:
        for _ in range(9):
            x, state, metrics = step(x, state)
            kept.append(jax.device_get(metrics))
            told(state)
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6, 8]
    for row in rows:
        for name in ("soft", "stiff", "total"):
            np.testing.assert_allclose(row[f"loss:{name}"], kept[row["step"]][name], rtol=1e-6)
    assert rows[0]["share:soft"] is None, "nothing is priced before the warm-up's end"
    assert 0 < rows[-1]["share:soft"] < 1
    shown = stream.getvalue().split("\r")[-1]
    assert "9/10" in shown
    assert "sharpness/limit" in shown
    with pytest.raises(ValueError, match="every = 0"), sg.training.log(every=0):
        pass


@pytest.mark.once
def test_sinks_are_closed_when_the_loop_breaks(tmp_path):
    class Closed(sg.live.CsvSink):
        def close(self):
            super().close()
            self.closed = True

    sink = Closed(tmp_path / "run.csv")
    with pytest.raises(ValueError, match="no TrainingState"), sg.training.log(sink) as told:
        told(optax.sgd(0.1).init(jnp.ones(2)))
    assert sink.closed


@pytest.mark.once
def test_figures_of_a_run():
    pytest.importorskip("matplotlib")
    optimizer = sg.small_gain(optax.sgd(0.1), LOSSES, policy="fair", every=1)
    x, state = start(optimizer)
    step, kept = sg.train_step(LOSSES, optimizer), []
    for _ in range(6):
        x, state, _ = step(x, state)
        kept.append(jax.device_get(sg.training.record(state)))
    table = sg.training.table(kept)
    panels = sg.training.figure(table).get_axes()
    assert [axes.get_ylabel() for axes in panels][:2] == ["loss", "weight"]
    drawn = {line.get_label(): line.get_ydata() for line in panels[0].get_lines()}
    np.testing.assert_array_equal(drawn["stiff"], table["loss:stiff"])
    assert panels[0].get_yscale() == "log"
    ratio = panels[3].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(ratio, table["sharpness_ratio"])
    for draw in (sg.training.losses, sg.training.weights, sg.training.sharpness):
        with pytest.raises(ValueError, match="no column"):
            draw(sg.telemetry.Table({"step": np.arange(2)}))


@pytest.mark.once
def test_states_know_the_names_of_their_losses():
    optimizer = sg.small_gain(optax.sgd(0.1), LOSSES, policy="fair")
    x, state = start(optimizer)
    _, state = jax.jit(optimizer.update)(x, state, x)
    assert state.info.names == ("soft", "stiff")
    text = repr(state)
    assert "weights: soft 0.25, stiff 0.005" in text
    assert "losses: soft 2, stiff 400" in repr(state.info)
    assert "names: soft, stiff" in repr(state.info)
    # no leaf, so that nothing which maps over states meets a string
    assert not any(isinstance(leaf, str) for leaf in jax.tree.leaves(state))
    assert jax.tree.map(lambda leaf: leaf, state).info.names == state.info.names
    assert pickle.loads(pickle.dumps(state.info.names)) == Names(("soft", "stiff"))
    many = jax.vmap(optimizer.init)(jnp.ones((3, 2)))
    assert many.info.names == ("soft", "stiff")
    assert "weights: [[1, 1], [1, 1], [1, 1]]" in repr(many)
