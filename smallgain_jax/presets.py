"""Seed 001's three settings, as keyword arguments of `small_gain`.

>>> import optax
>>> import smallgain_jax as sg
>>> graph = sg.EnergyGraph(sg.Landau(a=[1.0, 1.0]), [sg.Quadratic([0], [1])])
>>> optimizer = sg.small_gain(optax.sgd(0.1), graph, **sg.presets.safety())
"""

from typing import Any


def default() -> dict[str, Any]:
    """The design note's production setting: rho 0.7, eta 0.10, weights in [0.1, 3]."""
    return {
        "budget_fraction": 0.7,
        "max_step_change": 0.10,
        "floor": 0.1,
        "ceiling": 3.0,
        "ema": 0.3,
        "value": "grad_norm",
        "smoothing": 1e-3,
    }


def speed() -> dict[str, Any]:
    """Larger changes of the weights: eta 0.20."""
    return default() | {"max_step_change": 0.20}


def safety() -> dict[str, Any]:
    """Smaller budgets and changes: rho 0.5, eta 0.05, weights in [0.2, 2]."""
    return default() | {
        "budget_fraction": 0.5,
        "max_step_change": 0.05,
        "floor": 0.2,
        "ceiling": 2.0,
    }
