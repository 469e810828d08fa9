"""What must hold at any size: cheap paths equal the plain ones, and nothing large is a constant."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import smallgain_jax as sg
from smallgain_jax.search.armijo import Trial, armijo
from smallgain_jax.spectral.rows import block_curvature
from smallgain_jax.tools.scenarios import KINDS, random_graph
from tests.graphs import fixed_shape_graph, stack


def rows_both_ways(graph, x):
    """Row sums and costs from columns, and from the blocks of two by two."""
    columns = graph.curvature(x, smoothing=0.05)
    blocks = block_curvature(
        graph.local_rows(x),
        graph.edge_blocks(x, 0.05),
        jnp.ones(graph.num_edges),
        graph.i,
        graph.j,
    )
    by_terms = graph.local_energy(x) + jnp.sum(graph.term_energies(x))
    return columns, blocks, graph.energy(x), by_terms


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "dense"])
def test_columns_equal_blocks_and_families_sum_to_the_terms(kind, eps):
    graphs = stack([fixed_shape_graph(kind, seed) for seed in range(20)])
    x = jnp.asarray(np.random.default_rng(0).random((20, 20)), float)
    columns, blocks, energy, by_terms = jax.jit(jax.vmap(rows_both_ways))(graphs, x)
    for name in ("row_sums", "edge_cost", "lipschitz", "local_rows"):
        ours, oracle = getattr(columns, name), getattr(blocks, name)
        np.testing.assert_allclose(ours, oracle, rtol=50 * eps, atol=50 * eps)
    np.testing.assert_allclose(energy, by_terms, rtol=50 * eps, atol=50 * eps)


def test_weighted_rows_have_the_derivative_of_their_costs():
    graph = random_graph("uniform", 12, 30).graph
    x = jnp.linspace(0.1, 0.9, 12)
    weights = jnp.linspace(0.5, 1.5, graph.num_edges)
    rows, pull = jax.vjp(lambda w: graph.curvature(x, w).row_sums, weights)
    cost = graph.curvature(x).edge_cost
    np.testing.assert_allclose(pull(jnp.ones_like(rows))[0], cost.sum(axis=1), rtol=1e-5)


@pytest.mark.once
def test_a_graph_is_an_argument_of_the_program_not_a_constant():
    scenario = random_graph("uniform", 5000, 20_000)
    step = jax.jit(lambda graph, x: sg.relax(graph, x, steps=2).x)
    text = step.lower(scenario.graph, scenario.x0).as_text()
    # one array of the graph written into the program would be 80 kB of hexadecimal digits
    assert len(text) < 400_000
    assert max(map(len, text.splitlines())) < 20_000


def test_classes_of_score_do_not_depend_on_the_order_of_terms(eps):
    rng = np.random.default_rng(0)
    rows = rng.integers(50, size=(1000, 2))
    value, cost = rng.lognormal(0, 1, 1000), rng.lognormal(0, 1, (1000, 2))
    lower, upper, budget = np.zeros(1000), np.ones(1000), rng.uniform(1, 40, 50)
    run = jax.jit(lambda *fields: sg.allocate(*fields, bins=16, rounds=2).weights)
    shuffle = rng.permutation(1000)
    straight = run(value, cost, rows, lower, upper, budget)
    terms = (field[shuffle] for field in (value, cost, rows, lower, upper))
    np.testing.assert_allclose(run(*terms, budget), straight[shuffle], atol=1e4 * eps)
    scaled = run(value * 2.0**30, cost, rows, lower, upper, budget)
    np.testing.assert_allclose(scaled, straight, atol=1e4 * eps)


def test_a_search_in_a_batch_evaluates_once_and_differentiates_at_its_step(eps):
    calls = []

    def search(scale):
        def trial(step):
            calls.append(step)
            return Trial((1 - step * scale) ** 2, -2 * scale * step, None)

        found = armijo(trial, jnp.ones(()), max_backtracks=5)
        return found.trial.value, (found.step, found.accepted, found.backtracks)

    scales = jnp.asarray([0.5, 3.9, 9.0, -1.0])
    _, (step, accepted, backtracks) = jax.jit(jax.vmap(search))(scales)
    assert len(calls) == 1
    assert accepted.tolist() == [True, True, True, False]
    assert backtracks.tolist() == [0, 1, 3, 0]
    by_hand = -2 * step * (1 - step * scales)
    forwards = jax.jit(jax.vmap(jax.jacfwd(search, has_aux=True)))(scales)[0]
    backwards = jax.jit(jax.vmap(jax.grad(search, has_aux=True)))(scales)[0]
    np.testing.assert_allclose(forwards, by_hand, rtol=8 * eps)
    np.testing.assert_allclose(backwards, by_hand, rtol=8 * eps)


def split_over(devices):
    """Energies of a batch split by graphs, and of one graph split by edges: [16, 7] and [7]."""
    mesh = jax.make_mesh((len(devices),), ("parts",), (AxisType.Auto,), devices=devices)

    def place(leaf, spec):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, spec), lambda part: host[part]
        )

    def run(solve, graph, x0, specs):
        # every process gets the whole answer
        program = jax.jit(solve, out_shardings=NamedSharding(mesh, P()))
        program = program.lower(*jax.tree.map(place, (graph, x0), specs)).compile()
        collectives = program.as_text().count("all-reduce")
        return np.asarray(program(*jax.tree.map(place, (graph, x0), specs))), collectives

    def solve(graph, x0):
        return sg.relax(graph, x0, steps=6).energy

    rng = np.random.default_rng(0)
    graphs = stack([fixed_shape_graph("ring", seed, 8, 8) for seed in range(16)])
    batch = graphs, rng.random((16, 8))
    large = fixed_shape_graph("uniform", 0, 1000, 4000), rng.random(1000)
    by_edge = jax.tree.map(lambda _: P(), large)
    by_edge = eqx.tree_at(lambda tree: tree[0].edges, by_edge, replace_fn=by_parts)
    many, _ = run(jax.vmap(solve), *batch, by_parts(batch))
    one, collectives = run(solve, *large, by_edge)
    # a graph split by its edges needs sums over the devices
    assert (collectives > 0) == (len(devices) > 1)
    return many, one


def by_parts(tree):
    return jax.tree.map(lambda _: P("parts"), tree)


PROCESS = """
import sys
import jax
import numpy as np
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process, file = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process), initialization_timeout=60)
assert jax.process_count() == 2 and len(jax.devices()) == 4 and len(jax.local_devices()) == 2
from tests.test_scale import split_over
many, one = split_over(jax.devices())
np.savez(file, many=many, one=one)
jax.distributed.shutdown()
"""


@pytest.mark.x64
def test_devices_and_processes_equal_one_device(tmp_path, eps):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    files = [tmp_path / f"{process}.npz" for process in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process), file],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        )
        for process, file in enumerate(files)
    ]
    try:
        alone = split_over(jax.devices()[:1])
        found = [split_over(jax.devices())]
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found += [(saved["many"], saved["one"]) for saved in map(np.load, files)]
    for energies in found:
        for ours, single in zip(energies, alone, strict=True):
            np.testing.assert_allclose(ours, single, rtol=1e3 * eps, atol=1e3 * eps)
