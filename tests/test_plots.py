"""Figures: what they show, and that they need neither a display nor pyplot."""

import io
import subprocess
import sys

import numpy as np
import pytest

from smallgain_jax import plots
from smallgain_jax.telemetry import Table

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
        "from smallgain_jax import cli, plots\n"
        "try: plots.new_figure(1, 1)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("pip install 'smallgain_jax[plot]'")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="results must hold"):
        plots.energy({})
    with pytest.raises(ValueError, match=r"results\['a'\] has shape \(1, 2\)"):
        plots.energy({"a": np.ones((1, 2))})
    with pytest.raises(ValueError, match="table has no column 'margin:global'"):
        plots.margin(Table({"step": np.arange(2)}))
