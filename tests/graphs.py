"""Graphs and oracles shared by the tests."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import smallgain_jax as sg
from smallgain_jax.graphs.build import term_order
from smallgain_jax.tools.scenarios import random_graph

SLACK = 8
"""Rounding of an energy evaluated by two programs, in units of its eps."""

RECORDED = json.loads((Path(__file__).parent / "data" / "original.json").read_text())
FAMILY_OF = {
    "QuadraticCoupling": "quadratic",
    "DirectedHingeCoupling": "directed_hinge",
    "AsymmetricHingeCoupling": "asymmetric_hinge",
    "GateBenefitCoupling": "gate_benefit",
    "DampedGateBenefitCoupling": "damped_gate_benefit",
}


def recorded_graph(case):
    """A graph of the recorded original, and the recorded position of each of its terms."""
    records = []
    for edge in case["edges"]:
        record = dict(edge, family=FAMILY_OF[edge["family"]])
        if "gate" in record["family"] and "delta" in case:
            record.setdefault("delta", case["delta"])
        records.append(record)
    local = {key: [node.get(key, 0.0) for node in case["local"]] for key in ("a", "b", "target")}
    return sg.from_edge_list(records, sg.Landau(**local)), term_order(records)


def fixed_shape_graph(kind, seed, num_nodes=20, num_edges=60):
    """`random_graph` with every family padded by edges of weight zero to one size."""
    graph = random_graph(kind, num_nodes, num_edges, seed=seed).graph
    size = num_nodes * (num_nodes - 1) // 2 if kind == "dense" else num_edges

    def pad(family):
        missing = size - family.num_edges
        fill = {"i": 0, "j": 1, "weight": 0.0}

        def padded(name):
            array = np.asarray(getattr(family, name))
            return np.append(array, np.full(missing, fill.get(name, 1.0), array.dtype))

        names = list(vars(family))
        return type(family)(**{name: padded(name) for name in names})

    return sg.EnergyGraph(graph.local, [pad(family) for family in graph.edges])


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


def dense_matrix(local_rows, blocks, weights, i, j):
    """diag(local_rows) + sum of the weighted 2x2 blocks, assembled by NumPy."""
    matrix = np.diag(np.asarray(local_rows, float))
    blocks = np.asarray(blocks, float) * np.asarray(weights, float)[:, None, None]
    for row, a in ((0, i), (1, j)):
        for column, b in ((0, i), (1, j)):
            np.add.at(matrix, (np.asarray(a), np.asarray(b)), blocks[:, row, column])
    return matrix


def steps_to(energy, minimum, share):
    """First index at which the energy has made all but `share` of its drop; None if never."""
    energy = np.asarray(energy, float)
    reached = np.flatnonzero(energy <= minimum + share * (energy[0] - minimum))
    return int(reached[0]) if reached.size else None


__all__ = [
    "RECORDED",
    "SLACK",
    "dense_matrix",
    "fixed_shape_graph",
    "recorded_graph",
    "stack",
    "steps_to",
]
