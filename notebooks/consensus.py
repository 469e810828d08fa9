# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Consensus on a sensor network
#
# 1500 sensors in a square want to agree on a field. One in ten, an anchor, has measured it; the
# others know only their links. Wired links are stiff (weight 100), radio links soft (weight 0.1): a
# spread of 1000 that makes plain gradient descent crawl. Three anchors of twenty are broken and
# read anything.
#
# First all energies are quadratic, which is one sparse linear system, against the solvers for
# those. Then readings count less the further they are off, which no linear solve minimizes.

# %%
# %matplotlib inline
import tempfile
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
from scipy.sparse.linalg import LinearOperator, cg, spsolve
from scipy.spatial import cKDTree

import smallgain_jax as sg
from smallgain_jax.tools import cli, plots
from smallgain_jax.tools.io import read_columns, write_table
from smallgain_jax.tools.telemetry import Table

jax.config.update("jax_enable_x64", True)

SENSORS, NEAREST = 1500, 6
rng = np.random.default_rng(0)
place = rng.random((SENSORS, 2))
_, near = cKDTree(place).query(place, NEAREST + 1)
pairs = np.unique(
    np.sort(np.stack([np.repeat(near[:, 0], NEAREST), near[:, 1:].ravel()], axis=1)), axis=0
)
i, j = pairs.T
weight = np.where(rng.random(i.size) < 0.5, 100.0, 0.1)
over_the_wall = place[:, 1] > 0.5 + 0.2 * np.sin(6 * place[:, 0])
field = 0.15 + 0.3 * place[:, 0] + 0.4 * over_the_wall
# no wire crosses the wall
weight[over_the_wall[i] != over_the_wall[j]] = 0.1
anchor = rng.random(SENSORS) < 0.1
broken = anchor & (rng.random(SENSORS) < 0.15)
readings = np.where(broken, rng.random(SENSORS), field + 0.02 * rng.normal(size=SENSORS))
measured = np.where(anchor, readings, 0.0)
a = 10.0 * anchor
links = scipy.sparse.coo_array((np.ones(i.size), (i, j)), shape=(SENSORS, SENSORS))
assert scipy.sparse.csgraph.connected_components(links, directed=False)[0] == 1
print(f"{i.size} links, {(weight > 1).mean():.0%} of them stiff")
print(f"{anchor.sum()} anchors, {broken.sum()} of them broken")

# %% [markdown]
# ## The quadratic energy
#
# $F(x) = \sum_i a_i (x_i - t_i)^2 + \sum_k w_k (x_{i_k} - x_{j_k})^2$. Everybody starts at 1/2.
# Counted are updates until the energy has made all but 1e-8 of its drop to the minimum, which the
# direct solve finds; timed is a run of just so many. Gradient descent has its step at 1/L, L the
# certified bound, and at 2/(L + mu), the best fixed step, from the extreme eigenvalues.

# %%
NEAR, MOST = 1e-8, 2000
start = np.full(SENSORS, 0.5)
right = 2 * a * measured
incidence = scipy.sparse.coo_array(
    (np.r_[np.ones(i.size), -np.ones(i.size)], (np.r_[: i.size, : i.size], np.r_[i, j])),
    shape=(i.size, SENSORS),
).tocsr()
laplacian = (incidence.T @ scipy.sparse.diags_array(weight) @ incidence).tocsc()


def direct(a=a):
    """Minimum of the quadratic energy with anchors of weights a."""
    return spsolve((2 * (scipy.sparse.diags_array(a) + laplacian)).tocsc(), 2 * a * measured)


def seconds(run):
    """Median time of a call: up to nine of them, but no more than a second's worth."""
    times = []
    while len(times) < 9 and sum(times) < 1:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


hessian = (2 * (scipy.sparse.diags_array(a) + laplacian)).tocsc()
solution = direct()
largest, smallest = np.linalg.eigvalsh(hessian.toarray())[[-1, 0]]
drop = 0.5 * (start - solution) @ (hessian @ (start - solution))
print(f"condition number {largest / smallest:.2g}")


def gap(x):
    """Fraction of the drop that is left."""
    return 0.5 * (x - solution) @ (hessian @ (x - solution)) / drop


def first(gaps):
    """Updates until the gap is small enough; None if it never is."""
    there = np.flatnonzero(np.asarray(gaps) <= NEAR)
    return int(there[0]) if there.size else None


def conjugate_gradients(preconditioned, most, keep=None):
    inverse = 1 / hessian.diagonal()
    scale = LinearOperator(hessian.shape, matvec=lambda r: inverse * r) if preconditioned else None
    return cg(hessian, right, start, rtol=1e-13, atol=0, maxiter=most, M=scale, callback=keep)[0]


def quadratic(x):
    product = hessian @ x
    return 0.5 * x @ product - right @ x, product - right


def lbfgs(objective, most, keep=None):
    options = {"maxiter": most, "maxfun": 10 * most, "gtol": 0, "ftol": 0, "maxcor": 10}
    return scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", options=options, callback=keep
    ).x


def counted(run):
    """Updates that a run needs, from the states that it hands to `keep`."""
    gaps = [gap(start)]
    run(MOST, lambda x: gaps.append(gap(x)))
    return first(gaps), gaps[-1]


graph = sg.EnergyGraph(sg.Landau(a, target=measured), sg.Quadratic(i, j, weight))
bound = float(eqx.filter_jit(graph.curvature)(jnp.asarray(start)).lipschitz)


def relaxed(optimizer, steps):
    return sg.relax(graph, start, optimizer, steps=steps)


rows = {"spsolve": (None, 0.0, seconds(direct))}
scipy_methods = {
    "SciPy cg": partial(conjugate_gradients, False),
    "SciPy cg, diagonal preconditioner": partial(conjugate_gradients, True),
    "SciPy L-BFGS-B": partial(lbfgs, quadratic),
}
for name, run in scipy_methods.items():
    needed, left = counted(run)
    rows[name] = needed, left, seconds(partial(run, needed or MOST))
optimizers = {
    "gradient descent at 1/L": (optax.sgd(1 / bound), MOST),
    "gradient descent at 2/(L + mu)": (optax.sgd(2 / (largest + smallest)), MOST),
    "relax": (None, 1000),
}
for name, (optimizer, most) in optimizers.items():
    energies = np.asarray(relaxed(optimizer, most).energy)
    gaps = (energies - float(graph.energy(solution))) / drop
    needed = first(gaps)
    run = partial(relaxed, optimizer, needed or most)
    jax.block_until_ready(run().x)
    rows[name] = needed, gaps[-1], seconds(lambda run=run: jax.block_until_ready(run().x))
print(
    Table(
        {
            "method": np.array(list(rows)),
            "updates to 1e-8": np.array([str(n or "-") for n, _, _ in rows.values()]),
            "gap at the end": np.array([f"{max(left, 0):.0e}" for _, left, _ in rows.values()]),
            "ms": np.array([1e3 * t for _, _, t in rows.values()]).round(1),
        }
    )
)
ratio = rows["relax"][2] / rows["spsolve"][2]
print(f"\nrelax takes {ratio:.1f} times as long as the direct solve")

# %% [markdown]
# A direct solve is what such a system wants. Among the iterations, `relax` does what SciPy's
# conjugate gradients with a diagonal preconditioner do, in about as many updates, and each costs
# more: it prices rows, keeps a box and tests every decrease, where conjugate gradients multiply by
# a matrix. Plain gradient descent, which lets all rows wait for the stiffest, does not get there.
#
# ## Broken anchors
#
# A reading that is off by more than $\delta = 0.05$ should count by its distance, no longer by its
# square: $2 a \delta^2 (\sqrt{1 + ((x - t) / \delta)^2} - 1)$. Any local energy will do that has a
# value and the diagonal of a majorizer. Against iteratively reweighted least squares, which makes a
# sparse solve an update, and L-BFGS-B with the gradient by hand.

# %%
DELTA = 0.05


class Reading(eqx.Module):
    """Readings whose pull is bounded."""

    a: jax.Array
    target: jax.Array

    def _root(self, x):
        return jnp.sqrt(1 + ((x - self.target) / DELTA) ** 2)

    def __call__(self, x):
        return 2 * DELTA**2 * jnp.sum(self.a * (self._root(x) - 1))

    def majorizer_diagonal(self, x):
        return 2 * self.a / self._root(x)


robust = sg.EnergyGraph(
    Reading(jnp.asarray(a), jnp.asarray(measured)),
    sg.Quadratic(i, j, weight),
    num_nodes=SENSORS,
)


def objective(x):
    pulled, off = laplacian @ x, x - measured
    root = np.sqrt(1 + (off / DELTA) ** 2)
    return x @ pulled + 2 * DELTA**2 * (a @ (root - 1)), 2 * pulled + 2 * a * off / root


def reweighted_solves(most, keep=lambda x: None):
    x = start
    for _ in range(most):
        x = direct(a / np.sqrt(1 + ((x - measured) / DELTA) ** 2))
        keep(x)
    return x


def relaxed_robust(steps):
    return sg.relax(robust, start, steps=steps)


LONG = {"reweighted solves": 100, "SciPy L-BFGS-B": MOST, "relax": 1000}
states = {"reweighted solves": [start], "SciPy L-BFGS-B": [start]}
reweighted_solves(LONG["reweighted solves"], states["reweighted solves"].append)
lbfgs(objective, LONG["SciPy L-BFGS-B"], lambda x: states["SciPy L-BFGS-B"].append(x.copy()))
energies = {name: np.array([objective(x)[0] for x in found]) for name, found in states.items()}
result = relaxed_robust(LONG["relax"])
energies["relax"] = np.asarray(result.energy)
minimum = min(values.min() for values in energies.values())
needed = {
    name: first((values - minimum) / (values[0] - minimum)) for name, values in energies.items()
}
runs = {
    "reweighted solves": reweighted_solves,
    "SciPy L-BFGS-B": partial(lbfgs, objective),
    "relax": lambda steps: jax.block_until_ready(relaxed_robust(steps).x),
}
columns = {"method": [], "updates to 1e-8": [], "ms": []}
for name, run in runs.items():
    steps = needed[name] or LONG[name]
    run(steps)
    columns["method"].append(name)
    columns["updates to 1e-8"].append(str(needed[name] or "-"))
    columns["ms"].append(round(1e3 * seconds(partial(run, steps)), 1))
print(Table({name: np.array(values) for name, values in columns.items()}))

# %% [markdown]
# The pull of a broken anchor is bounded, and the agreed field is better for it. A few sparse solves
# find it; `relax` and L-BFGS-B take some hundred updates, of which none writes a system down.

# %%
figure = plots.new_figure(10.5, 4.2)
left, right_panel = figure.subplots(1, 2)
plots.energy(energies, minimum, left)
left.set_xscale("symlog")
left.set_xlim(0, MOST)
left.set_ylim(1e-10, 2)
left.set_title("readings of bounded pull")
error = {
    "quadratic": np.abs(solution - field),
    "bounded pull": np.abs(np.asarray(result.x) - field),
    "quadratic, told which are broken": np.abs(direct(a * ~broken) - field),
}
for (name, values), style in zip(error.items(), ("-", "--", "-."), strict=True):
    level = np.arange(1, SENSORS + 1) / SENSORS
    color = plots.OKABE_ITO[list(error).index(name)]
    right_panel.plot(np.sort(values), level, style, color=color, label=name)
right_panel.set(
    xlabel="absolute error of a sensor (units of the field)",
    ylabel="fraction of the sensors below (1)",
    xscale="log",
    xlim=(1e-4, 1),
)
right_panel.legend(fontsize="small", loc="lower right")
right_panel.grid(True, color="0.9")
for name, values in error.items():
    print(f"{name:32s} root mean square error {np.sqrt(np.mean(values**2)):.4f}, "
          f"median {np.median(values):.4f}")  # fmt: skip
assert np.linalg.norm(error["bounded pull"]) < np.linalg.norm(error["quadratic"])
figure

# %% [markdown]
# ## From the command line
#
# The quadratic network as tables, and the same consensus by `smallgain relax`.

# %%
folder = Path(tempfile.mkdtemp())
write_table(folder / "links.csv", {"source": i, "target": j, "weight": weight})
write_table(
    folder / "sensors.csv",
    {"node": np.arange(SENSORS), "a": a, "target": measured, "start": start},
)
# the configuration is in the repository, of which this may run in any folder
places = [Path.cwd(), *Path.cwd().parents, Path(sg.__file__).parents[1]]
configs = next(p / "configs" for p in places if (p / "configs/relax-consensus.toml").is_file())
command = [
    *("relax", str(folder / "links.csv"), "--nodes", str(folder / "sensors.csv")),
    *("--config", str(configs / "relax-consensus.toml"), "--out", str(folder / "agreed")),
]
print("smallgain", *command)
assert cli.main(command) == 0
state = read_columns(folder / "agreed" / "state.csv")["x"]
apart = np.abs(state - solution).max()
print(f"\nthe command's state and the direct solve differ by at most {apart:.1e}")
assert apart < 1e-3
