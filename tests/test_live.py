"""Live telemetry: every sink tells what the whole run tells, and warnings give advice."""

import json
import logging
import re
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from tensorboardX.proto.event_pb2 import Event

from smallgain_jax import EnergyGraph, Landau, Quadratic, small_gain
from smallgain_jax.tools import live, telemetry
from smallgain_jax.tools.live import MarginWarning, WarningSink, open_sink, relax_in_chunks
from smallgain_jax.tools.telemetry import Table

pytestmark = pytest.mark.once

STEPS = 43


class Kept:
    """A sink that keeps all it is given."""

    def __init__(self):
        self.parts, self.closed = [], 0

    def write(self, rows):
        assert not self.closed
        self.parts.append(rows)

    def close(self):
        self.closed += 1

    @property
    def table(self):
        names = self.parts[0].columns
        return {name: np.concatenate([part[name] for part in self.parts]) for name in names}


@pytest.fixture(scope="module")
def graph():
    return EnergyGraph(
        Landau(a=jnp.ones(2), b=1.0, target=jnp.array([0.3, 0.6])), [Quadratic([0], [1], 0.5)]
    )


def run(graph, sinks):
    search = optax.scale_by_backtracking_linesearch(5, max_learning_rate=4.0)
    optimizer = optax.chain(optax.sgd(1.0), search)
    return relax_in_chunks(
        *(graph, jnp.array([1.0, 0.5]), optimizer, STEPS, (0.0, 1.0)),
        # never met: a quadratic may arrive exactly
        tol=0.0,
        record=telemetry.family_record(graph),
        sinks=sinks,
    )


@pytest.fixture(scope="module")
def outcome(graph, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    paths = [folder / name for name in ("l.csv", "l.jsonl", "l.parquet", "board")]
    kept = Kept()
    result = run(graph, [kept, *map(open_sink, paths)])
    return telemetry.table(graph, result).columns, kept, paths


def test_parts_are_the_whole(outcome):
    whole, kept, _ = outcome
    assert kept.closed == 1
    assert len(kept.parts) > 10
    assert list(kept.table) == list(whole)
    assert whole["total_backtracks"][-1] > 0
    for name, values in whole.items():
        np.testing.assert_array_equal(kept.table[name], values, err_msg=name)


def test_files_hold_every_row(outcome):
    whole, _, (csv, jsonl, parquet, _) = outcome
    frames = [pl.read_csv(csv), pl.read_parquet(f"{parquet}/*.parquet")]
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    frames.append(pl.DataFrame(rows))
    for frame in frames:
        assert frame.columns == list(whole)
        np.testing.assert_array_equal(frame["step"], whole["step"])
        np.testing.assert_allclose(frame["energy:reference"], whole["energy:reference"], rtol=1e-6)


def test_tensorboard_reads_what_was_written(outcome):
    whole, _, (*_, board) = outcome
    (path,) = board.iterdir()
    data, at, told = path.read_bytes(), 0, {}
    # TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        for value in event.summary.value:
            told.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(told) == {name.replace(":", "/") for name in whole if name != "step"}
    energies = told["energy/reference"]
    assert sorted(energies) == whole["step"].tolist()
    np.testing.assert_allclose([*energies.values()], whole["energy:reference"], rtol=1e-6)


def test_sums_run_on_from_part_to_part(graph):
    optimizer = small_gain(optax.sgd(0.3), graph)
    keep = telemetry.family_record(graph)
    sink = Kept()
    result = relax_in_chunks(
        *(graph, jnp.array([1.0, 0.5]), optimizer, STEPS, (0.0, 1.0)),
        **dict(tol=0.0, record=keep, sinks=[sink], margin_threshold=1.0),
    )
    whole = telemetry.table(graph, result, margin_threshold=1.0).columns
    assert list(sink.table) == list(whole)
    for name, values in whole.items():
        np.testing.assert_allclose(sink.table[name], values, rtol=1e-6, err_msg=name)
        assert {part[name].dtype for part in sink.parts} == {values.dtype}
    assert whole["spent:cumulative"][-1] > 0


def test_log_has_a_line_a_part(graph, caplog):
    with caplog.at_level(logging.INFO, logger="smallgain_jax"):
        run(graph, [live.LoggingSink()])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("step=2 energy:reference=")
    assert lines[-1].startswith(f"step={STEPS} ")


def test_sinks_are_closed_when_one_fails(graph):
    kept, failing = Kept(), Kept()

    def fail(rows):
        raise OSError("disk full")

    failing.write = fail
    with pytest.raises(OSError, match="disk full"):
        run(graph, [kept, failing])
    assert kept.closed == failing.closed == 1


def warned(*parts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sink = WarningSink()
        for part in parts:
            sink.write(Table({name: np.array(values) for name, values in part.items()}))
    assert all(issubclass(w.category, MarginWarning) for w in caught)
    return [str(w.message) for w in caught]


def margins(margin, ratio):
    return {"step": [7, 8], "margin:global": margin, "sharpness_ratio": ratio}


def halvings(*counts):
    return {"step": np.arange(len(counts)), "last_step_backtracks": counts}


@pytest.mark.parametrize(
    ("part", "advice"),
    [
        (margins([1.0, 2.0], [0.1, 0.1]), None),
        (margins([1.0, -1.0], [0.5, 1.8]), "step 8: .* 2 times smaller"),
        (margins([-0.1, 1.0], [0.95, 0.5]), "step 7: .*smaller ceiling"),
        (halvings(0, 1, 2, 1), "halves 75% of the steps; a smaller learning rate"),
        (halvings(0, 0, 0, 1), None),
        ({"step": [0], "energy:reference": [1.0]}, None),
    ],
)
def test_advice_fits(part, advice):
    told = warned(part, part)
    # once for each kind
    assert len(told) == (advice is not None)
    if advice:
        assert re.search(advice, told[0])


def test_paths_choose_the_sink(tmp_path):
    kinds = {"a.CSV": live.CsvSink, "a.jsonl": live.JsonLinesSink, "a.parquet": live.ParquetSink}
    for name, kind in kinds.items():
        sink = open_sink(tmp_path / name)
        assert isinstance(sink, kind)
        sink.close()
    # earlier parts go
    folder = tmp_path / "a.parquet"
    (folder / "part-00000.parquet").write_bytes(b"old")
    open_sink(folder).close()
    assert list(folder.iterdir()) == []
