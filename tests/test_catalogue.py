"""Every transformation of optax as the base of `small_gain` on losses, or before it in a chain.

The table of docs/guide/catalogue.md is made here: `SMALLGAIN_WRITE=1 pytest
tests/test_catalogue.py` writes it anew, and the test fails where it is out of date.
"""

import os
import warnings
from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import smallgain_jax as sg
from smallgain_jax.limits.probe import probe_optimizer
from tests.catalogue import catalogue, parameters_of

pytestmark = pytest.mark.once
PAGE = Path(__file__).parents[1] / "docs" / "guide" / "catalogue.md"
CATALOGUE = {name: cache(make) for name, make in catalogue().items()}
"""One object each: what was found out about it is remembered."""
START = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.array([0.5, -0.5])}
BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
STEPS = 12


def fn(params, x):
    y = x @ params["w"] + params["b"][None, :]
    return {"fit": jnp.mean((y - 1) ** 2), "size": 0.1 * jnp.sum(params["w"] ** 2)}


LOSSES = sg.terms(fn, names=("fit", "size"))


def total(params):
    return float(LOSSES.values(params, BATCH).sum())


def run(optimizer, **given):
    """Parameters after some updates, as plain a loop as there is."""
    step, start = loop(optimizer, **given)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=STEPS))(start)
    jax.effects_barrier()
    return params


def loop(optimizer, **given):
    """One update of that loop, and where it starts."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        params, state = carry
        total = lambda p: LOSSES.values(p, BATCH).sum()
        value, gradient = jax.value_and_grad(total)(params)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=total, **given
        )
        return (optax.apply_updates(params, updates), state), None

    return step, (START, optimizer.init(START))


def same(found, plain):
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, plain)


REFUSED = {
    "dpsgd": "needs a gradient of each example",
    "sam": "takes no extra arguments",
    "sophia": "needs obj_fn",
}
"""What refuses this loop by itself."""
# a part like scale_by_adam is run within its optimizer, and before others below
BASES = [name for name in CATALOGUE if name not in REFUSED and not name.startswith("scale_by_")]


def finite(params):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", BASES)
def test_as_the_base(name):
    plain = run(CATALOGUE[name]())
    found = run(sg.small_gain(CATALOGUE[name](), LOSSES), term_args=(BATCH,))
    if total(plain) <= total(START):
        same(found, plain)
    else:  # parts that hand the gradient on climb: there the guard engages
        assert total(found) <= total(plain)
    fair = sg.small_gain(CATALOGUE[name](), LOSSES, policy="fair", warmup=2, every=2)
    if probe_optimizer(CATALOGUE[name](), START).known:
        assert finite(run(fair, term_args=(BATCH,))) or not finite(plain)
    else:  # prices in the metric of gradient descent, whatever the base: no program of its own
        step, start = loop(fair, term_args=(BATCH,))
        after, _ = jax.eval_shape(step, start, None)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, start)


@pytest.mark.parametrize("name", REFUSED)
def test_what_refuses_this_loop_does_so_by_itself(name):
    with pytest.raises((TypeError, ValueError)):
        run(CATALOGUE[name]())


@pytest.mark.parametrize("name", ["adam", "lion", "lbfgs", "prodigy"])
def test_without_a_batch_each_step_is_that_of_the_base(name):
    with pytest.warns(UserWarning, match="term_args"):
        found = run(sg.small_gain(CATALOGUE[name](), LOSSES))
    same(found, run(CATALOGUE[name]()))


# what takes a learning rate is an optimizer of its own, which nobody puts before another
PARTS = [
    name for name in CATALOGUE if "learning_rate" not in parameters_of(name) and name not in REFUSED
]


@pytest.mark.parametrize("name", PARTS)
def test_before_it_in_a_chain(name):
    """With the default the updates pass as they are: tests/test_drop_in.py; here with shares."""
    fair = sg.small_gain(optax.sgd(1e-2), LOSSES, policy="fair", every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = run(optax.chain(CATALOGUE[name](), fair), term_args=(BATCH,))
    assert finite(found) or not finite(run(optax.chain(CATALOGUE[name](), optax.sgd(1e-2))))


HEAD = """# optax's catalogue

Every transformation of optax and `optax.contrib`, as the base of `sg.small_gain` on losses.
With the default policy each takes the very steps that it takes alone. With `policy="fair"` prices
are in its metric where one is known, else in the metric of gradient descent. Where a limit is
known, `guard=1.0` keeps the sharpness below it; the default guard against divergence needs none.
`tests/test_catalogue.py` makes this table and runs every row.

| base | limit and metric |
|---|---|
"""


def row(name):
    probe = probe_optimizer(CATALOGUE[name](), START)
    if not probe.known:
        return f"| `{name}` | not known: {' '.join(probe.why.split())} |"
    metric = "of its second moments" if probe.adaptive else "the identity"
    return f"| `{name}` | known; the metric is {metric} |"


def test_the_table_is_up_to_date():
    page = HEAD + "\n".join(row(name) for name in sorted(CATALOGUE)) + "\n"
    if os.environ.get("SMALLGAIN_WRITE"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page
