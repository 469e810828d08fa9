"""Figures: what they show, and that they need neither a display nor pyplot."""

import io
import subprocess
import sys

import numpy as np
import pytest

from smallgain_jax.tools import plots, scenarios
from smallgain_jax.tools.telemetry import Table

pytestmark = pytest.mark.once

CURVES = {f"method {k}": np.geomspace(1, 10.0**-k, 61) for k in range(1, 10)}


def test_lines_are_gaps_as_fractions_of_the_drop():
    axes = plots.energy({"a": [3.0, 2.0, 1.5], "b": [3.0, 1.0, 1.0]}, minimum=1.0)
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_allclose(drawn["a"], [1.0, 0.5, 0.25])
    # a logarithmic axis has no zero
    np.testing.assert_allclose(drawn["b"], [1.0, 1e-16, 1e-16])
    assert axes.get_yscale() == "log"
    assert "step" in axes.get_xlabel()
    assert "fraction of the drop" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_missing_minimum_is_the_lowest_energy():
    lines = plots.energy({"a": [3.0, 2.0], "b": [3.0, 1.0]}).get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), [1.0, 0.5])


def test_line_at_90_percent_of_the_drop():
    assert any(
        set(np.asarray(line.get_ydata(), float)) == {0.1}
        for line in plots.energy(CURVES, 0.0).get_lines()
    )


def test_methods_differ_in_more_than_colour():
    lines = [line for line in plots.energy(CURVES, 0.0).get_lines() if line.get_marker() != "None"]
    assert len(lines) == len(CURVES)
    assert len({line.get_marker() for line in lines}) == len(CURVES)
    styles = {(line.get_color(), str(line._dash_pattern)) for line in lines}
    assert len(styles) == len(CURVES)


def test_margin_draws_margin_and_spend():
    table = Table(
        {
            "step": np.arange(3),
            "margin:global": np.array([2.0, -1.0, 0.5]),
            "spent:global": np.array([0.0, 0.1, 0.2]),
        }
    )
    axes = plots.margin(table)
    drawn = [line.get_ydata() for line in axes.get_lines()[:2]]
    np.testing.assert_array_equal(drawn[0], table["margin:global"])
    np.testing.assert_array_equal(drawn[1], table["spent:global"])
    assert "curvature" in axes.get_ylabel()
    assert len(axes.get_legend().get_texts()) == 3


def test_given_axes_are_used():
    axes = plots.new_figure(3, 2).subplots()
    assert plots.energy(CURVES, 0.0, axes) is axes


def test_figures_are_saved_without_pyplot():
    file = io.BytesIO()
    plots.energy(CURVES, 0.0).figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_library_imports_without_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from smallgain_jax.tools import cli, plots\n"
        "try: plots.new_figure(1, 1)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("pip install 'smallgain_jax[plot]'")


ROWS = {
    "step": np.arange(3),
    "margin:row:0": np.array([2.0, 1.0, 4.0]),
    "margin:row:1": np.array([1.0, -1.0, 0.0]),
    "spent:row:0": np.array([0.5, 0.25, 0.0]),
    "spent:row:1": np.array([0.5, 0.25, 0.5]),
    "share:a": np.array([0.25, 0.5, 1.0]),
    "share:b": np.array([0.75, 0.5, 0.0]),
    "alloc:coup:a": np.array([1.0, 1.1, 1.2]),
    "alloc:coup:b": np.array([1.0, 0.9, 0.8]),
}


def test_budget_is_its_part_of_the_margin():
    lines = plots.budget(Table(ROWS), 0.5).get_lines()
    np.testing.assert_allclose(lines[0].get_ydata(), [3, 1, 4])
    np.testing.assert_allclose(lines[1].get_ydata(), [1.5, 0.5, 2])
    np.testing.assert_allclose(lines[2].get_ydata(), [1, 0.5, 0.5])


def test_families_are_drawn_by_name():
    axes = plots.allocation_by_family(Table(ROWS))
    drawn = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    np.testing.assert_array_equal(drawn["a"], ROWS["alloc:coup:a"])
    np.testing.assert_array_equal(drawn["b"], ROWS["alloc:coup:b"])


def test_heat_maps_hold_the_values_and_centre_their_colours():
    weights = np.array([[1.0, 1.5, 0.9], [1.0, 1.2, 0.8]])
    axes = plots.allocation_by_edge(weights, [0, 0, 1], ["a", "b"])
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), weights.T)
    np.testing.assert_allclose(image.get_clim(), (0.5, 1.5))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    (image,) = plots.row_margins(Table(ROWS)).get_images()
    np.testing.assert_array_equal(image.get_array()[1], ROWS["margin:row:1"])
    np.testing.assert_allclose(image.get_clim(), (-4, 4))


def test_many_terms_are_pooled():
    weights = np.repeat(np.arange(1000.0), 10)[None, :]
    (image,) = plots.allocation_by_edge(weights).get_images()
    pooled = np.asarray(image.get_array())[:, 0]
    assert pooled.shape == (400,)
    np.testing.assert_allclose(pooled.mean(), weights.mean())


def test_shares_are_stacked():
    axes = plots.shares(Table(ROWS))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    top = axes.collections[1].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(1)


def test_score_and_cost_are_where_they_belong():
    axes = plots.score_cost([0.5, -0.1, 3.0], [2.0, 4.0, 0.0], [0, 0, 1], ["a", "b"])
    first, second = axes.get_lines()[:2]
    np.testing.assert_array_equal(first.get_xydata(), [[2.0, 0.5], [4.0, -0.1]])
    # what costs nothing stands left of all that does
    assert second.get_xdata()[0] < 2


def test_graph_shows_weights_and_margins():
    graph = scenarios.dense().graph
    weights = np.linspace(0.5, 1.25, graph.num_edges)
    axes = plots.network(graph, weights, np.linspace(-1, 2, 16))
    lines = [c for c in axes.collections if c.get_array() is not None and len(c.get_array()) == 48]
    np.testing.assert_array_equal(lines[0].get_array(), weights)
    np.testing.assert_allclose(lines[0].get_clim(), (0.5, 1.5))
    dots = next(c for c in axes.collections if len(c.get_offsets()) == 16)
    np.testing.assert_allclose(np.linalg.norm(dots.get_offsets(), axis=1), 1)
    assert dots.get_clim() == (-2, 2)


def test_pareto_draws_each_group_and_its_front():
    axes = plots.pareto([3, 1, 2, np.nan], [1e-9, 1e-2, 1e-1, 0.5], ["a"] * 4)
    points, front = axes.get_lines()
    assert len(points.get_xdata()) == 3
    np.testing.assert_array_equal(front.get_xdata(), [1, 3])


def test_each_function_draws_where_it_is_told():
    graph, table = scenarios.baseline().graph, Table(ROWS)
    calls = [
        lambda ax: plots.budget(table, ax=ax),
        lambda ax: plots.allocation_by_family(table, ax),
        lambda ax: plots.allocation_by_edge(np.ones((2, 2)), ax=ax),
        lambda ax: plots.row_margins(table, ax),
        lambda ax: plots.shares(table, ax),
        lambda ax: plots.score_cost([1.0], [1.0], ax=ax),
        lambda ax: plots.network(graph, ax=ax),
        lambda ax: plots.pareto([1.0], [1.0], ax=ax),
    ]
    for call in calls:
        axes = plots.new_figure(3, 2).subplots()
        assert call(axes) is axes


def test_tables_without_the_columns_are_refused():
    bare = Table({"step": np.arange(2)})
    for draw, column in (
        (plots.budget, "margin:row:"),
        (plots.row_margins, "margin:row:"),
        (plots.shares, "share:"),
        (plots.allocation_by_family, "alloc:coup:"),
    ):
        with pytest.raises(ValueError, match=f"table has no column {column}"):
            draw(bare)
    graph = scenarios.baseline().graph
    for call, message in (
        (lambda: plots.network(graph, np.ones(3)), r"weights has shape \(3,\)"),
        (lambda: plots.network(graph, margins=np.ones(3)), r"margins has shape \(3,\)"),
        (lambda: plots.network(graph, positions=np.ones(3)), r"positions has shape \(3,\)"),
        (lambda: plots.score_cost([1.0], [1.0, 2.0]), r"cost has shape \(2,\)"),
        (lambda: plots.pareto([1.0], [1.0, 2.0]), r"gap has shape \(2,\)"),
        (lambda: plots.allocation_by_edge(np.ones(3)), r"weights has shape \(3,\)"),
        (lambda: plots.allocation_by_edge(np.ones((2, 3)), [0]), r"families has shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="results must hold"):
        plots.energy({})
    with pytest.raises(ValueError, match=r"results\['a'\] has shape \(1, 2\)"):
        plots.energy({"a": np.ones((1, 2))})
    with pytest.raises(ValueError, match="table has no column 'margin:global'"):
        plots.margin(Table({"step": np.arange(2)}))


def test_one_column_is_drawn_as_it_is_or_smoothed():
    values = np.array([4.0, 2.0, 6.0, np.nan])
    table = Table({"step": np.arange(4), "contraction_margin": values})
    (line,) = plots.metric(table, "contraction_margin").get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[0, 4], [1, 2], [2, 6]])
    raw, smooth = plots.metric(table, "contraction_margin", smooth=2).get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), values[:3])
    np.testing.assert_allclose(smooth.get_ydata(), [4, 3, 4])
    with pytest.raises(ValueError, match=r"no column 'x': choose from contraction_margin"):
        plots.metric(table, "x")
    with pytest.raises(ValueError, match=r"smooth = 0 must be at least 1"):
        plots.metric(table, "contraction_margin", smooth=0)


def test_the_axis_says_what_the_gap_is_against():
    assert "to the minimum" in plots.energy(CURVES, 0.0).get_ylabel()
    assert "to the lowest energy seen" in plots.energy(CURVES).get_ylabel()


def test_the_last_state_leaves_no_hole():
    last = {name: np.append(values.astype(float), np.nan) for name, values in ROWS.items()}
    last["step"] = np.append(ROWS["step"], ROWS["step"][-1] + 1)
    told, whole = Table(ROWS), Table(last)
    for draw in (plots.row_margins, plots.shares, plots.allocation_by_family, plots.budget):
        assert draw(told).get_xlim() == draw(whole).get_xlim()
