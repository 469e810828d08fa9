"""The stages of `bench.device`: each notes rows, the most telling first."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import smallgain_jax as sg
from bench import allocator as allocating
from bench import relaxation as relaxing
from bench.training import advection as advecting
from bench.training import allen_cahn, embedded, grid, large, overhead, problems
from bench.training.embedded import Size
from bench.training.language import Shape
from bench.training.methods import METHODS
from bench.training.problems import Problem
from bench.training.run import Trainer
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.spectral.norms import spectral_bound
from smallgain_jax.tools.scenarios import random_graph

Row = dict[str, Any]


class Job(NamedTuple):
    """In which size, and until when."""

    dry: bool
    end: float  # on `time.monotonic`
    out: Path

    def size(self, full: Any, dry: Any) -> Any:
        return dry if self.dry else full


Run = Callable[[Job, Callable[[Row], None]], None]
PRECISIONS = (None, "tensorfloat32", "bfloat16", "highest")
"""Values of `jax_default_matmul_precision`; None is what the device does when nobody says."""


def seconds_of(run: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """First call, with compilation, then the least and the median of later ones."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return {
        "first_s": times[0],
        "least_s": min(times[1:]),
        "median_s": statistics.median(times[1:]),
    }


def bandwidth(job: Job) -> float:
    """Bytes a second that this device reads and writes in a long pass over an array."""
    x = jnp.ones(job.size(1 << 28, 1 << 22), jnp.float32)
    run = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_of(lambda: run(x))["least_s"]


def numerics(job: Job, note: Callable[[Row], None]) -> None:
    """What must hold at every precision of products, against NumPy in double precision.

    `product_error` is the device's own, relative to the norms, of a plain product: the figure that
    says whether a setting did anything.
    """
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((4, 48, 64)).astype(np.float32)
    norms = np.linalg.norm(matrices.astype(float), 2, axis=(1, 2))
    scenario = random_graph("uniform", 60, 240, seed=0)
    graph, x0 = scenario.graph, jnp.asarray(scenario.x0, jnp.float32)
    terms = allocating.problem(job.size(100_000, 2_000), job.size(10_000, 200), 1.0)
    for setting in job.size(PRECISIONS, ("bfloat16",)):
        with jax.default_matmul_precision(setting):
            a = jnp.asarray(matrices)
            plain = jax.jit(lambda a: jnp.einsum("kij,klj->kil", a, a))(a)
            exact = np.einsum("kij,klj->kil", matrices.astype(float), matrices.astype(float))
            bound = jax.jit(jax.vmap(lambda m: spectral_bound(m)[:2]))(a)
            upper, lower = (np.asarray(side, float) / norms for side in bound)
            rows = jax.jit(lambda g, x: g.curvature(x, scaling_iterations=10))(graph, x0)
            relaxed = sg.relax(graph, x0, steps=60)
            spent = jax.jit(lambda *fields: sg.allocate(*fields).weights)(*terms)
            note(
                {
                    "precision": setting,
                    "product_error": float(np.abs(plain - exact).max() / (norms**2).max()),
                    "certified_over_norm_least": float(upper.min()),
                    "certified_over_norm_most": float(upper.max()),
                    "lower_over_norm_most": float(lower.max()),
                    "perron_over_largest_eigenvalue": float(rows.lipschitz) / largest(graph, x0),
                    "energy_rises": float(np.diff(np.asarray(relaxed.energy)).max()),
                    "converged": bool(relaxed.info.converged),
                    "optimality": float(relaxed.info.optimality),
                    "implicit_derivative_error": derivative_error(graph, x0),
                    "allocation": allocating.quality(terms, np.asarray(spent, float)),
                }
            )


def largest(graph: EnergyGraph, x: jax.Array) -> float:
    """The largest eigenvalue of the Hessian with every hinge active, by LAPACK in double."""
    curvature = graph.curvature(x)
    matrix = np.diag(np.asarray(curvature.local_rows, float))
    blocks = np.asarray(graph.edge_blocks(x), float)
    ends = np.stack([graph.i, graph.j], axis=1)
    for row in (0, 1):
        for column in (0, 1):
            np.add.at(matrix, (ends[:, row], ends[:, column]), blocks[:, row, column])
    return float(np.linalg.eigvalsh(matrix)[-1])


def derivative_error(graph: EnergyGraph, x0: jax.Array) -> float:
    """Of d sum(c x*) / d x_target of a quadratic chain, against a dense solve in double."""
    del graph
    n = x0.shape[0]
    weight = np.linspace(0.5, 1.5, n - 1)
    target = np.linspace(0.2, 0.8, n)
    cotangent = np.cos(np.arange(n))

    def total(t: jax.Array) -> jax.Array:
        chain = sg.Quadratic(np.arange(n - 1), np.arange(1, n), weight)
        chain_graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(n), target=t), chain)
        return jnp.sum(jnp.asarray(cotangent, x0.dtype) * sg.relax(chain_graph, x0, bounds=None).x)

    found = jax.jit(jax.grad(total))(jnp.asarray(target, x0.dtype))
    hessian = 2 * np.eye(n)
    for k, w in enumerate(weight):
        hessian[k : k + 2, k : k + 2] += 2 * w * np.array([[1, -1], [-1, 1]])
    exact = 2 * np.linalg.solve(hessian, cotangent)
    return float(np.abs(np.asarray(found, float) - exact).max() / np.abs(exact).max())


def step_bytes(graph: EnergyGraph) -> int:
    """Bytes that a step of `relax` in float32 cannot avoid to move, if no line is wasted.

    Two passes over the edges' own arrays; states and direction gathered at both ends for the
    curvature along the direction (16 an edge), states for the trial (8), gradient and rows read and
    written at both ends (32); twenty vectors of nodes. A gather or scatter of four bytes moves a
    line of 32 or more where neighbours in memory are not neighbours in the graph, so that the share
    of the bandwidth found by these bytes is a lower bound of what the memory does.
    """
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(graph))
    return 2 * own + 56 * graph.num_edges + 20 * 4 * graph.num_nodes


def relaxation(job: Job, note: Callable[[Row], None]) -> None:
    """Seconds a step against edges, bytes a step, and their share of what a copy reaches."""
    peak = bandwidth(job)
    note({"copy_bytes_a_second": peak})
    for edges in job.size((1_000_000, 10_000_000, 100_000), (4_000,)):
        note(relaxation_row(edges) | {"copy_bytes_a_second": peak})


def relaxation_row(edges: int) -> Row:
    scenario = random_graph("uniform", edges // 4, edges, seed=1)
    graph, x0 = jax.device_put((scenario.graph, scenario.x0))
    runs = {}
    for steps in (2, 8):
        result = sg.relax(graph, x0, steps=steps, tol=0)
        made = int(result.info.steps)
        runs[steps] = made, relaxing.measure(partial(sg.relax, graph, x0, None, steps, tol=0), 3)
    (few, short), (many, long) = runs.values()
    step = (long["wall_least_s"] - short["wall_least_s"]) / max(many - few, 1)
    least = step_bytes(graph)
    return {
        "edges": edges,
        "steps": [few, many],
        "first_s": short["first_s"],
        "step_s": step,
        "step_bytes_least": least,
        "bytes_a_second_least": least / step if step > 0 else None,
    }


def allocator(job: Job, note: Callable[[Row], None]) -> None:
    """Milliseconds of an allocation, its bytes at least, and the worst excess of a budget."""
    peak = bandwidth(job)
    for terms in job.size((1_000_000, 10_000_000, 100_000), (10_000,)):
        note(allocator_row(terms) | {"copy_bytes_a_second": peak})


def allocator_row(terms: int) -> Row:
    host = allocating.problem(terms, max(terms // 10, 3), 1.0)
    data = tuple(jnp.asarray(field) for field in host)
    run = jax.jit(lambda *fields: sg.allocate(*fields).weights)
    row = {"terms": terms} | seconds_of(lambda: run(*data), 3)
    least = sum(field.nbytes for field in host) + 4 * terms
    row |= {"bytes_least": least, "bytes_a_second_least": least / row["least_s"]}
    return row | allocating.quality(host, np.asarray(run(*data), float))


def two_cores(job: Job, note: Callable[[Row], None]) -> None:
    """The same on two cores of the host, for the ratio."""
    edges = job.size(10_000_000, 4_000)
    note({"what": "allocator"} | allocator_row(edges))
    note({"what": "relaxation"} | relaxation_row(edges))


def batch(job: Job, note: Callable[[Row], None]) -> None:
    """Graphs of 16 nodes and 48 edges a second, and how many come to 1e-6 of their drop."""

    def one(graph: EnergyGraph, x0: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        result = sg.relax(graph, x0, steps=60)
        return result.x, result.info.steps, result.info.converged

    checked = job.size(1_000, 50)
    for count in job.size((10_000, 1_000_000, 100_000), (50,)):
        graphs, x0 = jax.device_put(relaxing.small_graphs(count))
        run = jax.jit(jax.vmap(one))
        row: Row = {"graphs": count} | seconds_of(partial(run, graphs, x0), 3)
        x, steps, converged = jax.device_get(run(graphs, x0))
        gap = gaps(*jax.device_get(jax.tree.map(lambda a: a[:checked], (graphs, x0, x))))
        row |= {
            "graphs_a_second": count / row["least_s"],
            "steps_most": int(steps.max()),
            "converged_share": float(converged.mean()),
            "checked": checked,
            "within_1e-6_share": float(np.mean(gap <= 1e-6)),
            "gap_median": float(np.median(gap)),
            "gap_most": float(gap.max()),
        }
        note(row)


def gaps(graphs: Any, x0: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What is left of each drop at states x, against a relaxation in double precision."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: a.astype(float) if np.issubdtype(a.dtype, np.floating) else a,
            (graphs, x0, x),
        )

        def one(graph: EnergyGraph, x0: jax.Array, x: jax.Array) -> jax.Array:
            best = jax.lax.stop_gradient(sg.relax(graph, x0, steps=300, tol=1e-11).energy[-1])
            return (graph.energy(x) - best) / (graph.energy(x0) - best)

        return np.asarray(jax.jit(jax.vmap(one))(*wide))


def training(job: Job, note: Callable[[Row], None]) -> None:
    """A step of `small_gain` over plain Adam's, at 10.8 and at 100 million parameters."""
    tiny, chunk, rounds = Shape(16, 2, 1, 8), job.size(20, 2), job.size(10, 2)
    shapes = (
        ("ten million", job.size(large.SHAPE, tiny), job.size(large.BATCH, 2)),
        ("hundred million", job.size(Shape(768, 12, 14, 256), tiny), job.size(8, 2)),
    )
    for policy in ("reference", "fair")[: job.size(2, 1)]:
        for name, shape, batch_size in shapes[: job.size(2, 1)]:
            problem = large.problem(shape, batch_size)
            whole = jax.eval_shape(problem.init, jnp.int32(0))
            parameters = sum(leaf.size for leaf in jax.tree.leaves(whole))
            size = {"network": name, "parameters": parameters}
            rows = overhead.compare(
                problem, chunk, rounds, [(10, "hessian")], ("weighted",), policy=policy
            )
            for row in rows:
                note(size | {"policy": policy, "peak_bytes": peak_bytes()} | row)


def peak_bytes() -> int | None:
    """The most memory of the device that this process has held; None where it does not tell."""
    found = jax.devices()[0].memory_stats()
    return found.get("peak_bytes_in_use") if found else None


def layouts(job: Job, note: Callable[[Row], None]) -> None:
    """Ways to sum the values of edges onto nodes, on this backend.

    "scatter" is what the library does, edges in the order in which they are given. "sorted"
    permutes by node first. "in order" has the edges in that order already, summed by a scatter that
    is told nothing or by one that is told. "padded" gathers each node's edges by a table [n, most].
    """
    for edges in job.size((1_000_000, 10_000_000), (20_000,)):
        nodes = edges // 4
        rng = np.random.default_rng(0)
        index = rng.integers(nodes, size=edges).astype(np.int32)
        value = rng.standard_normal(edges).astype(np.float32)
        reference = np.bincount(index, value.astype(float), nodes)
        for name, (run, arguments) in reductions(value, index, nodes).items():
            on_device = jax.device_put(arguments)
            error = float(np.abs(np.asarray(run(*on_device), float) - reference).max())
            row = seconds_of(partial(run, *on_device), 5)
            note({"edges": edges, "nodes": nodes, "way": name, "error": error} | row)


def reductions(value: np.ndarray, index: np.ndarray, nodes: int) -> dict[str, tuple[Any, Any]]:
    """Functions to the sums [n] of values [E] at nodes [E], and their arguments."""
    order = np.argsort(index, kind="stable").astype(np.int32)
    ranked = index[order]
    counts = np.bincount(index, minlength=nodes)
    slot = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((nodes, counts.max()), len(index), np.int32)
    table[ranked, slot] = order
    told = jax.jit(partial(jax.ops.segment_sum, num_segments=nodes, indices_are_sorted=True))

    @jax.jit
    def scatter(value: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.zeros(nodes, value.dtype).at[index].add(value, mode="promise_in_bounds")

    @jax.jit
    def permuted(value: jax.Array, ranked: jax.Array, order: jax.Array) -> jax.Array:
        return told(value[order], ranked)

    @jax.jit
    def padded(value: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.sum(value.at[table].get(mode="fill", fill_value=0), axis=1)

    return {
        "scatter": (scatter, (value, index)),
        "sorted": (permuted, (value, ranked, order)),
        "in order": (scatter, (value[order], ranked)),
        "in order, told": (told, (value[order], ranked)),
        "padded": (padded, (value, table)),
    }


SOUND = (
    "certificate",
    "curvature",
    "kappa",
    "armijo",
    "guard",
    "precision",
    "allocate",
    "relax",
    "energy",
    "adjoint",
)
"""Test modules that claims rest on, in the order in which they run."""
ELSEWHERE = "not mesh and not devices and not sharded and not coarse_products"
"""Several devices, and the rounding of an accelerator emulated on a CPU."""
OUTCOME = re.compile(
    r"^(?:\[gw\d+\] *\[ *\d+%\] (?P<kind>PASSED|FAILED|ERROR) (?P<name>\S+)"
    r"|(?P<alone>\S+::.*?) (?P<ended>PASSED|FAILED|ERROR)\b)",
    re.MULTILINE,
)
"""A line of pytest, of several processes or of one."""


def tests(job: Job, note: Callable[[Row], None]) -> None:
    """The tests of soundness on the device, in float32; what was not reached is not counted."""
    root = Path(__file__).parents[1]
    names = job.size(SOUND, ("guard",))
    files = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-p", "no:cacheprovider"]
    command += ["-n", str(job.size(8, 0)), "-k", f"x32 and {ELSEWHERE}", *files]
    # the flags of tests/conftest.py are for CPUs; and several processes share the device's memory
    # and equal calls give equal numbers only where sums over edges have an order
    flags = {} if job.dry else {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=true"}
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | flags
    log = job.out / "tests.pytest.log"
    with log.open("w") as sink:
        try:
            code = subprocess.run(
                command,
                cwd=root,
                env=environment,
                stdout=sink,
                stderr=sink,
                timeout=max(job.end - time.monotonic(), 1),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    matches = OUTCOME.finditer(log.read_text())
    found = [(m["kind"] or m["ended"], m["name"] or m["alone"]) for m in matches]
    outcomes = {
        what: [name for kind, name in found if kind == what] for what in ("FAILED", "ERROR")
    }
    note(
        {
            "modules": names,
            "code": code,
            "passed": sum(kind == "PASSED" for kind, _ in found),
            "failed": sorted(set(outcomes["FAILED"])),
            "errors": sorted(set(outcomes["ERROR"])),
        }
    )


def published(job: Job, note: Callable[[Row], None]) -> None:
    """Advection and Allen-Cahn as published: fair shares, gradient norms, equal weights in turn."""
    tiny = Size(width=8, layers=2, features=8, points=32, chunks=4)
    cases = (
        advecting.problem(job.size(advecting.PUBLISHED, advecting.REDUCED._replace(size=tiny))),
        allen_cahn.problem(job.size(embedded.PUBLISHED, tiny)),
    )
    names = ("small_gain", "gradient_norms_1000", "equal")
    names = job.size(names, names[-1:])
    every, rate, seed = job.size(2000, 10), 1e-3, jnp.zeros(1, jnp.int32)
    number = jnp.asarray(rate)

    def ready(problem: Problem, name: str) -> Any:
        start, advance = Trainer(problem, METHODS[name], every).programs(rate, 1)
        return advance, start(seed, number)[0]

    keys = [(problem, name) for problem in cases for name in names]
    with ThreadPoolExecutor(len(keys)) as pool:  # what takes long is the compiler, on one core each
        runs = list(pool.map(lambda key: ready(*key), keys))
    for first in range(0, job.size(cases[0].steps, 2 * every), every):
        for place, (problem, name) in enumerate(keys):
            advance, carry = runs[place]
            before = time.perf_counter()
            carry, measured = jax.block_until_ready(advance(carry, seed, jnp.int32(first), number))
            spent = time.perf_counter() - before
            runs[place] = advance, carry
            row = {"case": problem.name, "method": name, "steps": first + every}
            row |= {"ms_a_step": 1e3 * spent / every}
            row |= {"relative_l2": float(measured["relative_l2"][0])}
            note(row | {"weights": np.asarray(measured["weights"])[0].tolist()})
        # two turns are as long as the last two: stop before they would be cut
        if time.monotonic() > job.end:
            return


LENGTHS = {"advection": 5_000, "allen_cahn": 6_000}
"""Steps where not the problem's own."""


def rivals(job: Job, note: Callable[[Row], None]) -> None:
    """All methods, rates and seeds on every network with physics; ours and others side by side."""
    cases = job.size(problems.PHYSICS, ("flow",))
    quick = ("--steps", "4", "--every", "2", "--seeds", "1", "--rates", "1e-3")
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    ours = (*grid.OURS, "momentum_config")
    sides = {"ours": ours, "rivals": tuple(name for name in grid.RIVALS if name not in ours)}
    started = {}
    for case in cases:
        steps = LENGTHS.get(case, problems.make(case).steps)
        for side, methods in sides.items():
            out = job.out / f"rivals_{case}_{side}.json"
            command = [sys.executable, "-m", "bench.training.grid", "--case", case]
            command += ["--out", str(out), "--steps", str(steps), *job.size((), quick)]
            command += ["--methods", *job.size(methods, methods[:1])]
            started[out] = subprocess.Popen(command, env=environment)
    for process in started.values():
        try:
            process.wait(timeout=max(job.end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
    for out in started:
        if out.exists():
            note(json.loads(out.read_text()))
            out.unlink()
