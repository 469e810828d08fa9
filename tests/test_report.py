"""Reports: every number of the tables, pictures inside the page, and no way out to a network."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from smallgain_jax.tools import cli, plots, report
from smallgain_jax.tools.suites import Suite
from smallgain_jax.tools.sweep import Sweep, SweepResult
from smallgain_jax.tools.telemetry import Table
from smallgain_jax.tools.validation import Plan, PlanResult

pytestmark = pytest.mark.once

PLAN = Plan(suites=(Suite(generator="baseline"),), methods=("fixed step",), repeats=0)
NUMBERS = {
    "suite": np.array(["a<b"] * 2),
    "nodes": np.array([2, 2]),
    "edges": np.array([1, 1]),
    "method": np.array(["fixed step", "default"]),
    "delta_f90": np.array([3.0, np.nan]),
    "gap": np.array([1.25e-5, 0.5]),
    "backtracks": np.array([0, 1]),
    "diverged": np.array([0, 0]),
}
TIMES = {name: NUMBERS[name] for name in ("suite", "nodes", "edges", "method")} | {
    "run_s": np.array([0.25, 0.125])
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    curves = {"a<b": {"fixed step": np.array([1.0, 0.5]), "default": np.array([1.0, 0.75])}}
    result = PlanResult(PLAN, Table(NUMBERS), Table(TIMES), curves, {"a<b": 0.0})
    folders = [tmp_path_factory.mktemp("report") / "deep" / "er" for _ in range(2)]
    for folder in folders:
        paths = report.write_plan(result, folder)
        assert sorted(paths) == sorted(folder.iterdir())
    return folders


def test_files_are_those_told(written):
    names = sorted(path.name for path in written[0].iterdir())
    csvs = ["claims.csv", "numbers.csv", "times.csv"]
    assert names == sorted([*csvs, "energy-a<b.png", "report.html", "report.md"])


def test_the_same_result_gives_the_same_bytes(written):
    for path in written[0].iterdir():
        assert path.read_bytes() == (written[1] / path.name).read_bytes(), path.name


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for name, v in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        if tag in ("td", "th", "h2"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "h2"):
            self.cells[-1] += data


def test_page_holds_everything_and_asks_no_network(written):
    text = (written[0] / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    for address in page.addresses:
        assert address.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?:|<script|@import|url\(", text)
    picture = next(a for a in page.addresses if a.startswith("data:"))
    data = base64.b64decode(picture.removeprefix("data:image/png;base64,"))
    assert data == (written[0] / "energy-a<b.png").read_bytes()
    assert {"fixed step", "default", "1.25e-05", "0.125", "-"} <= set(page.cells)
    assert any(cell.startswith("a<b (2 nodes, 1 edges") for cell in page.cells)


def test_markdown_has_the_tables(written):
    lines = (written[0] / "report.md").read_text().splitlines()
    assert "| fixed step | 3 | 1.25e-05 | 0 | 0 |" in lines
    assert "![energy-a<b](energy-a<b.png)" in lines


def test_sweep_is_written(tmp_path):
    table = Table(
        {
            "suite": np.array(["x", "x"]),
            "delta_f90": np.array([2.0, 3.0]),
            "gap": np.array([0.1, 0.01]),
        }
    )
    sweep = Sweep(suites=PLAN.suites, settings={"ema": (0.3,)})
    summary = Table({"suite": np.array(["x"]), "designs": np.array([2])})
    paths = report.write_sweep(SweepResult(sweep, table, summary), tmp_path)
    names = ["designs.csv", "pareto.png", "report.html", "report.md", "summary.csv"]
    assert sorted(path.name for path in paths) == names


TELEMETRY = {
    "step": np.arange(3),
    "energy:reference": np.array([1.0, 0.5, 0.25]),
    "margin:global": np.array([1.0, -1.0, 0.5]),
    "spent:global": np.array([0.0, 0.1, 0.2]),
    "margin:row:0": np.array([1.0, -1.0, 0.5]),
    "spent:row:0": np.array([0.0, 0.1, 0.2]),
    "alloc:coup:Quadratic": np.array([1.0, 1.1, 1.0]),
    "share:Quadratic": np.full(3, 0.25),
    "share:GateBenefit": np.full(3, 0.75),
}


def test_plot_command_draws_what_the_columns_allow(tmp_path, capsys):
    Table(TELEMETRY).write(tmp_path / "told.csv")
    assert cli.main(["plot", str(tmp_path / "told.csv"), "--out", str(tmp_path / "f")]) == 0
    drawn = sorted(path.stem for path in (tmp_path / "f").iterdir())
    assert drawn == sorted(
        ["energy", "margin", "budget", "allocation-by-family", "margins-by-row", "shares"]
    )
    assert "written" in capsys.readouterr().out
    one = {name: column for name, column in TELEMETRY.items() if name != "share:GateBenefit"}
    assert "shares" not in report.figures_of(Table(one))
    losses = {"step": np.arange(3), "loss:a": np.ones(3), "loss:total": np.ones(3)}
    losses |= {"weight:a": np.ones(3), "sharpness_ratio": np.ones(3)}
    losses |= {"guard": np.ones(3), "rewinds": np.zeros(3)}
    assert list(report.figures_of(Table(losses))) == ["training"]
    few = {name: TELEMETRY[name] for name in ("step", "energy:reference")}
    figures = report.figures_of(Table(few))
    assert list(figures) == ["energy"]
    # the energy itself: against its own lowest every run would look converged
    (line,) = figures["energy"].axes[0].get_lines()
    np.testing.assert_array_equal(line.get_ydata(), TELEMETRY["energy:reference"])


def test_one_metric_is_drawn_smoothed(tmp_path, capsys):
    Table(TELEMETRY).write(tmp_path / "told.csv")
    flags = ["--metric", "margin:global", "energy:reference", "--smooth", "2"]
    command = ["plot", str(tmp_path / "told.csv"), *flags, "--out", str(tmp_path / "f")]
    assert cli.main(command) == 0
    drawn = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert drawn == ["energy-reference.png", "margin-global.png"]
    assert cli.main([*command[:2], "--metric", "margin", "--out", str(tmp_path / "g")]) == 2
    assert "no column 'margin': choose from" in capsys.readouterr().err


@pytest.mark.x64
@pytest.mark.parametrize("name", ["bench", "bench-large", "ablation"])
def test_plans_in_configs_can_run(name):
    plan = cli._decoded(cli.Path(__file__).parents[1] / f"configs/{name}.toml", Plan)
    plan.check()
    for suite in plan.suites:
        # the rest of a large suite is the same generator at another size
        small = min(suite.nodes, 20) if suite.nodes else None
        assert Suite(generator=suite.generator, nodes=small, seed=suite.seed).build()


@pytest.mark.parametrize("name", ["sweep", "sweep-random"])
def test_sweeps_in_configs_can_run(name):
    sweep = cli._decoded(cli.Path(__file__).parents[1] / f"configs/{name}.toml", Sweep)
    sweep.check()
    assert len(sweep.designs) >= 36


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("steps = 3\n", ["bench"], "missing required field `suites`"),
        ('suites = [{ generator = "magic" }]\n', ["bench"], "generator = 'magic' is unknown"),
        ("suites = []\nstepz = 3\n", ["bench"], "unknown key"),
        ('suites = [{ generator = "baseline" }]\n', ["bench", "--steps", "0"], "steps = 0"),
        ('suites = [{ generator = "baseline" }]\n', ["bench", "--methods", "x"], "methods: 'x'"),
        (
            'suites = [{ generator = "baseline" }]\n[settings]\nx = [1.0]\n',
            ["sweep"],
            "settings: 'x' is unknown",
        ),
        ('suites = [{ generator = "baseline" }]\n', ["plot", "--suite", "x"], "suite = 'x'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(text)
    command, *flags = arguments
    source = ["c.toml"] if command == "plot" else ["--config", "c.toml"]
    assert cli.main([command, *source, *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("smallgain: error: ")
    assert said.count("\n") == 1
    assert message in said


def test_bench_command_hands_the_flags_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.toml").write_text('suites = [{ generator = "baseline" }]\nsteps = 9\n')
    seen = []

    def run(plan, checkpoint):
        seen.append(plan)
        return PlanResult(plan, Table(NUMBERS), Table(TIMES), {}, {})

    monkeypatch.setattr(cli, "run_plan", run)
    flags = ["--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "o"), "--repeats", "0"]
    assert cli.main(["bench", *flags, "--methods", "fixed step", "default"]) == 0
    assert seen[0].methods == ("fixed step", "default")
    assert (seen[0].steps, seen[0].repeats) == (9, 0)
    assert json.dumps(sorted(p.name for p in (tmp_path / "o").iterdir())).count("csv") == 3
    assert "1.25e-05" in capsys.readouterr().out


def test_plot_of_a_folder_draws_the_result(tmp_path, capsys):
    Table(TELEMETRY).write(tmp_path / "telemetry.csv")
    (tmp_path / "state.csv").write_text("node,x\nann,0.25\nbob,0.75\n")
    assert cli.main(["plot", str(tmp_path), "--out", str(tmp_path / "f")]) == 0
    assert (tmp_path / "f" / "state.png").is_file()
    capsys.readouterr()
    axes = plots.state([str(k) for k in range(100)], np.linspace(0, 1, 100))
    assert axes.get_ylabel() == "nodes"
    with pytest.raises(ValueError, match=r"x has shape \(1,\)"):
        plots.state(["a", "b"], [1.0])
