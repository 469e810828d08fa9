"""The command line: files in and out, settings, and one clear line for every mistake."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import polars as pl
import pytest

from smallgain_jax import EnergyGraph, Landau, Quadratic, relax
from smallgain_jax.tools import cli, scenarios, telemetry
from smallgain_jax.tools.io import read_graph
from smallgain_jax.tools.sweep import Sweep
from smallgain_jax.tools.validation import Plan

pytestmark = pytest.mark.once

OUTPUTS = ["state.csv", "summary.json", "summary.txt", "telemetry.csv"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "edges.csv").write_text(
        "source,target,weight\nann,bob,0.5\nbob,eve,1.0\neve,ann,\n", encoding="utf-8"
    )
    (tmp_path / "nodes.csv").write_text(
        "node,a,target,start\nann,1,0,0.3\nbob,0.2,1,0.9\neve,0.5,0.5,0.1\n", encoding="utf-8"
    )
    return tmp_path


def run(*arguments):
    return cli.main(["relax", "edges.csv", "--nodes", "nodes.csv", *map(str, arguments)])


def test_shipped_configs_are_valid():
    shipped = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
    kinds = {"relax": cli.Settings, "bench": Plan, "ablation": Plan, "sweep": Sweep}
    assert len(shipped) >= len(kinds)
    for path in shipped:
        config = msgspec.toml.decode(path.read_bytes(), type=kinds[path.stem.split("-")[0]])
        if not isinstance(config, cli.Settings):
            config.check()


def test_relax_writes_state_telemetry_and_summary(files, capsys):
    assert run() == 0
    out = files / "edges-relaxed"
    assert sorted(path.name for path in out.iterdir()) == OUTPUTS
    assert {path.name for path in files.iterdir()} == {"edges.csv", "nodes.csv", out.name}
    with jax.enable_x64(True):
        graph = read_graph("edges.csv", "nodes.csv").graph
        # quadratic: the minimum solves a linear system, and lies inside the box
        zero = jnp.zeros(3)
        solution = -np.linalg.solve(jax.hessian(graph.energy)(zero), graph.gradient(zero))
        energy = float(graph.energy(solution))
    state = pl.read_csv(out / "state.csv")
    assert state["node"].to_list() == ["ann", "bob", "eve"]
    np.testing.assert_allclose(state["x"], solution, atol=1e-7)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["final_energy"] == pytest.approx(energy, abs=1e-12)
    assert (summary["converged"], summary["status"]) == (True, "converged")
    assert summary["optimality"] <= summary["tol"]
    assert summary["precision"] == "float64"
    told = pl.read_csv(out / "telemetry.csv")
    assert told["step"].to_list() == list(range(summary["steps"] + 1))
    assert told["energy:reference"][0] == summary["start_energy"]
    assert told["energy:reference"][-1] == summary["final_energy"]
    assert min(summary["reading_seconds"], summary["relaxing_seconds"]) > 0
    printed = capsys.readouterr()
    assert (out / "summary.txt").read_text() in printed.out
    # standard error is no terminal here: no bar
    (note,) = summary["notes"]
    assert "1 of 3 cells of column 'weight' hold no value" in note
    assert printed.err == f"smallgain: note: {note}\n"


def test_weighted_methods_write_their_margins(files, caplog):
    flags = ("--method", "auto_cap", "--steps", 5, "--rows", "--no-x64", "--out", "o/p")
    with caplog.at_level("INFO", logger="smallgain_jax"):
        assert run(*flags, "--live", "l.csv", "l.jsonl", "l.parquet", "--log") == 0
    told = pl.read_csv(files / "o" / "p" / "telemetry.csv")
    assert {"margin:global", "share:Quadratic", "margin:row:2"} <= set(told.columns)
    assert told.height == 6
    # one row a step, without the rows' own columns
    for live in (pl.read_csv(files / "l.csv"), pl.read_ndjson(files / "l.jsonl")):
        assert set(live.columns) == {c for c in told.columns if ":row:" not in c}
        assert live["step"].to_list() == told["step"].to_list()
    assert len(caplog.records) == 5
    assert caplog.records[-1].getMessage().startswith("step=5 ")
    # all that was written live can be drawn
    for name in ("l.csv", "l.jsonl", "l.parquet"):
        assert cli.main(["plot", name, "--out", "drawn"]) == 0
        assert len(list((files / "drawn").iterdir())) > 1
        shutil.rmtree(files / "drawn")
    assert json.loads((files / "o/p/summary.json").read_text())["precision"] == "float32"


@pytest.mark.once
def test_stiff_edges_do_not_pass_for_a_minimum(files):
    """Far stiffer than what holds the nodes: a tiny step proves nothing there."""
    (files / "stiff.csv").write_text("source,target,weight\na,b,1e9\nb,c,1e-3\n")
    (files / "held.csv").write_text("node,a,target\na,1,0\nb,1,0.5\nc,1,0.25\n")
    assert cli.main(["relax", "stiff.csv", "--nodes", "held.csv", "--out", "stiff"]) == 0
    state = pl.read_csv(files / "stiff" / "state.csv")
    np.testing.assert_allclose(state["x"], 0.25, atol=1e-6)


def test_flags_override_the_configuration(files):
    (files / "c.toml").write_text('method = "sgd"\nsteps = 7\ntol = 0.0\nout = "here"\n')
    assert run("--config", "c.toml", "--steps", 4, "--learning-rate", 0.05) == 0
    summary = json.loads((files / "here" / "summary.json").read_text())
    assert (summary["method"], summary["steps"], summary["tol"]) == ("sgd", 4, 0.0)
    assert summary["learning_rate"] == 0.05
    # a second run takes the place of the first
    assert run("--config", "c.toml") == 0
    assert json.loads((files / "here" / "summary.json").read_text())["steps"] == 7
    assert sorted(path.name for path in (files / "here").iterdir()) == OUTPUTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["relax", "none.csv"], "none.csv: No such file"),
        (["relax", "bad.csv"], "bad.csv, line 3, column 'weight': 'x' is not a number"),
        (["relax", "edges.csv", "--nodes", "edges.csv"], "column 'node'"),
        (
            ["relax", "edges.csv", "--config", "bad.toml"],
            "bad.toml: unknown key `stepz` (did you mean 'steps'?): known are nodes, source",
        ),
        (
            ["relax", "edges.csv", "--config", "type.toml"],
            "type.toml: steps: expected an integer, got text",
        ),
        (["relax", "edges.csv", "--config", "syntax.toml"], "syntax.toml: "),
        (["relax", "edges.csv", "--config", "none.toml"], "none.toml: No such file"),
        (["relax", "edges.csv", "--steps", "-1"], "steps = -1 must not be negative"),
        (["relax", "edges.csv", "--tol", "nan"], "tol = nan must be at least 0"),
        (["relax", "edges.csv", "--lower", "2"], "lower = 2.0 must not exceed upper"),
        (["relax", "."], ".: Is a directory"),
        (["relax", "edges.csv", "--nodes", "."], ".: Is a directory"),
        (["relax", "e.csv.bz2"], "e.csv.bz2: the file cannot be read: Invalid data stream"),
        (
            ["relax", "edges.csv", "--lower", "inf", "--upper", "inf"],
            "lower = inf leaves no number between the bounds",
        ),
        (
            ["relax", "edges.csv", "--lower=-inf", "--upper=-inf"],
            "upper = -inf leaves no number between the bounds",
        ),
        (["plot", "head.csv"], "head.csv: the file is empty: it holds no rows"),
        (["plot", "head.csv", "--metric", "step"], "head.csv: the file is empty"),
        (["plot", "."], "the folder holds no part-*.parquet"),
        (["relax", "edges.csv", "--learning-rate", "1"], "learning_rate: method default has none"),
        (["relax", "edges.csv", "--method", "sgd", "--learning-rate", "-1"], "learning_rate = -1"),
        (["relax", "edges.csv", "--out", "nodes.csv"], "out = nodes.csv is a file"),
        (["relax", "edges.csv", "--momentum", "0.5"], "momentum: method default has none"),
        (["relax", "edges.csv", "--symmetrize", "sum"], "symmetrize: only a matrix has two"),
        (["relax", "edges.csv", "--node", "id"], "node: there is no node table"),
        (
            ["relax", "edges.csv", "--method", "momentum", "--momentum", "1"],
            "momentum = 1.0 must be below 1",
        ),
        (
            ["relax", "edges.csv", "--live", "a.csv", "--live", "b.csv"],
            "--live is given 2 times: put all values after one --live",
        ),
        (["relax", "edges.csv", "--live", "./edges.csv"], "edges.csv is the graph: it would be"),
        (["relax", "state.csv", "--out", "."], "state.csv is the graph: it would be overwritten"),
        (["relax", "m.mtx", "--source", "id"], "source: a .mtx file has no such column"),
        (["plot", "edges.csv", "--smooth", "3"], "smooth: there is no metric to smooth"),
        (["plot", "edges.csv", "--suite", "a"], "suite: only a plan has suites"),
        (["plot", "plan.toml", "--metric", "a"], "metric: a plan has no telemetry"),
        (["frobnicate"], "'frobnicate' is no command: choose from demo, relax, bench"),
        (["relax", "edges.csv", "--source", "ann"], "column 'ann': the column is missing"),
        (["bench", "--config", "plan.toml"], "suites[0]: unknown key `seeds`"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(files, capsys, arguments, message):
    (files / "e.csv.bz2").write_text("source,target\n0,1\n")
    (files / "head.csv").write_text("step,energy:reference\n")
    (files / "bad.csv").write_text("source,target,weight\n0,1,1\n1,2,x\n")
    (files / "bad.toml").write_text("stepz = 3\n")
    (files / "plan.toml").write_text('[[suites]]\ngenerator = "ring"\nseeds = 3\n')
    (files / "type.toml").write_text('steps = "many"\n')
    (files / "syntax.toml").write_text("steps = = 3\n")
    before = sorted(files.rglob("*"))
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("smallgain: error: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "--stepz"),
        (["--steps", "x"], "--steps"),
        (["--method", "magic"], "magic"),
    ],
)
def test_misused_options_point_to_the_help_of_the_command(files, capsys, arguments, message):
    assert cli.main(["relax", "edges.csv", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "smallgain relax --help" in said.err
    assert {path.name for path in files.iterdir()} == {"edges.csv", "nodes.csv"}


def test_a_missing_file_is_asked_for(capsys):
    assert cli.main(["relax"]) == 2
    assert "smallgain relax --help" in capsys.readouterr().err


def test_mistaken_values_point_to_the_help_of_the_command(files, capsys):
    assert run("--steps", -1) == 2
    assert capsys.readouterr().err.endswith("(see smallgain relax --help)\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_bare_command_lists_what_there_is(capsys, arguments):
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name in cli._COMMANDS:
        assert f"\n  {name} " in said.out


def notes(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("smallgain: note: ") for line in lines)
    return [line.removeprefix("smallgain: note: ") for line in lines]


def test_nothing_to_do_is_no_success_in_silence(files, capsys):
    (files / "bare.csv").write_text("source,target\nann,bob\n")
    assert cli.main(["relax", "bare.csv"]) == 0
    (note,) = notes(capsys)
    assert note.startswith("nothing to do")
    assert "a node table (--nodes)" in note


def test_no_steps_write_the_start(files):
    assert run("--steps", 0) == 0
    state = (files / "edges-relaxed" / "state.csv").read_text()
    assert state == "node,x\nann,0.3\nbob,0.9\neve,0.1\n"


def test_a_box_so_wide_that_any_start_is_within_the_tolerance_is_told(files, capsys):
    assert run("--lower", -1e30, "--upper", 1e30) == 0
    note = notes(capsys)[-1]
    assert "to 1e-08 (tol) of the box, which is 2e+30 wide" in note
    assert "a bound that is meant for none is written as inf" in note


@pytest.mark.parametrize("method", ["default", "sgd", "lbfgs", "small_gain"])
@pytest.mark.parametrize(("size", "flags"), [("1e308", ()), ("1e38", ("--no-x64",))])
def test_an_energy_that_overflows_is_told_and_fails(files, capsys, size, flags, method):
    (files / "edges.csv").write_text(f"source,target,weight\nann,bob,{size}\nbob,eve,{size}\n")
    (files / "nodes.csv").write_text("node,start\nann,0\nbob,1\neve,0\n")
    assert run("--upper", "1.5", "--method", method, *flags) == 1
    (note,) = [note for note in notes(capsys) if "is not finite in float" in note]
    assert "divide all weights, a and b by one number" in note
    assert ("without --no-x64" in note) == bool(flags)
    summary = json.loads((files / "edges-relaxed" / "summary.json").read_text())
    assert (summary["converged"], summary["status"]) == (False, "not_finite")


@pytest.mark.parametrize("size", ["1e-30", "1e30", "1e-300", "1e300"])
def test_units_of_the_energy_do_not_matter(files, size):
    (files / "edges.csv").write_text(f"source,target,weight\nann,bob,{size}\nbob,eve,{size}\n")
    (files / "nodes.csv").write_text(f"node,a,target\nann,{size},0\nbob,{size},1\neve,{size},0\n")
    assert run() == 0
    state = (files / "edges-relaxed" / "state.csv").read_text().split()[1:]
    np.testing.assert_allclose([float(row.split(",")[1]) for row in state], [0.25, 0.5, 0.25])


def test_numbers_too_small_for_the_precision_are_told(files, capsys):
    (files / "edges.csv").write_text("source,target,weight\nann,bob,1e-40\nbob,eve,1\n")
    assert run("--steps", 1, "--no-x64") == 0
    expected = "edges.csv: 1 of 2 cells of column 'weight' are too small for float32 and count as 0"
    assert expected in notes(capsys)
    assert run("--steps", 1) == 0
    assert expected not in notes(capsys)


def test_rows_that_a_method_does_not_have_are_told(files, capsys):
    assert run("--rows", "--steps", 2) == 0
    assert "rows: method default has no margins by row, none were written" in notes(capsys)


def test_a_start_outside_the_box_is_told(files, capsys):
    nodes = "node,a,start\nann,1,0.5\nbob,1,-3\neve,1,7\n"
    (files / "nodes.csv").write_text(nodes)
    assert run("--steps", 2) == 0
    told = "start: 2 of 3 values lie outside [0, 1] and were moved to its ends, such as -3 of node"
    assert any(note.startswith(f"{told} 'bob'") for note in notes(capsys))


def test_an_energy_that_rose_is_told_and_fails(files, capsys):
    assert run("--method", "sgd", "--learning-rate", 100, "--steps", 5) == 1
    summary = json.loads((files / "edges-relaxed" / "summary.json").read_text())
    assert summary["final_energy"] > summary["start_energy"]
    (note,) = [note for note in notes(capsys) if note.startswith("the energy rose")]
    rate = float(note.split("at most ")[1].split()[0])
    assert run("--method", "sgd", "--learning-rate", rate, "--steps", 5) == 0


def test_columns_by_name_and_a_compressed_table(files, capsys):
    text = "origin;goal;cost\nann;bob;0,5\nbob;eve;1\n"
    with gzip.open(files / "roads.csv.gz", "wt") as file:
        file.write(text)
    named = ["--source", "origin", "--target", "goal", "--weight", "cost"]
    command = ["relax", "roads.csv.gz", "--nodes", "nodes.csv", *named, "--steps", "2"]
    assert cli.main(command) == 0
    assert sorted(path.name for path in (files / "roads-relaxed").iterdir()) == OUTPUTS
    assert notes(capsys) == []


@pytest.mark.parametrize("flags", [[], ["--no-x64"]])
def test_nothing_warns_and_the_dtype_is_one(files, flags, recwarn):
    (files / "bare.csv").write_text("source,target\nann,bob\n")
    assert cli.main(["relax", "bare.csv", *flags]) == 0
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.x64
def test_curvature_has_the_dtype_of_a_weakly_typed_state():
    graph = EnergyGraph(None, [Quadratic([0], [1], 0.5)], num_nodes=3)
    curvature = graph.curvature(jnp.full(3, 0.5))
    assert {leaf.dtype for leaf in jax.tree.leaves(curvature)} == {jnp.dtype("float64")}
    assert graph.local_energy(jnp.full(3, 0.5)).dtype == jnp.float64


def test_failed_write_leaves_nothing(files, monkeypatch, capsys):
    def fail(self, path):
        raise OSError("disk full")

    monkeypatch.setattr(telemetry.Table, "write", fail)
    assert run("--method", "sgd", "--steps", 2) == 2
    assert "disk full" in capsys.readouterr().err
    assert {path.name for path in files.iterdir()} == {"edges.csv", "nodes.csv"}


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("smallgain ")
    assert cli.main(["relax", "--help"]) == 0
    assert "--learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "tol"), [("default", 0.0), ("default", 1e-3), ("lbfgs", 0.0), ("auto_cap", 0.0)]
)
def test_chunks_change_nothing(method, tol):
    # 23 steps make parts of two, and one of one
    problem, steps = scenarios.baseline(), 23
    optimizer = cli._OPTIMIZERS[method](problem.graph, 0.1, 0.9)
    keep = telemetry.family_record(problem.graph)
    whole = relax(problem.graph, problem.x0, optimizer, steps, tol=tol, record=keep)
    calls = []
    parts = cli.relax_in_chunks(
        *(problem.graph, problem.x0, optimizer, steps, (0.0, 1.0)),
        tol=tol,
        record=keep,
        progress=lambda made, energy: calls.append(made),
    )
    assert calls[0] == 0
    assert calls == sorted(calls)
    assert calls[-1] == steps
    np.testing.assert_array_equal(parts.x, whole.x)
    made = int(whole.info.steps)
    assert int(parts.info.steps) == made
    assert bool(parts.info.converged) == bool(whole.info.converged)
    np.testing.assert_array_equal(parts.energy[: made + 1], whole.energy[: made + 1])
    one, many = (telemetry.table(problem.graph, result) for result in (whole, parts))
    assert list(one.columns) == list(many.columns)
    for name, values in one.columns.items():
        np.testing.assert_array_equal(many[name], values, err_msg=name)


@pytest.mark.parametrize("method", cli._OPTIMIZERS)
def test_every_method_makes_an_optimizer(method):
    graph = EnergyGraph(Landau(a=jnp.ones(2)), [Quadratic([0], [1], 0.5)])
    optimizer = cli._OPTIMIZERS[method](graph, 0.1, 0.9)
    assert optimizer is None or isinstance(optimizer, optax.GradientTransformation)


def test_bar_is_drawn_on_a_terminal_only(monkeypatch, capsys):
    cli.progress_bar(10)(5, 1.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    draw = cli.progress_bar(10, width=10)
    draw(0, float("nan"))
    draw(5, 0.25)
    draw(10, 0.125)
    last = capsys.readouterr().err.split("\r")
    assert "compiling" in last[1]
    assert "[#####.....] 5/10 steps, energy 0.25" in last[2]
    assert last[3].endswith("energy 0.125\n")
