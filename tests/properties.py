"""What every transformation promises, each as one assertion over a `Case`.

A case is an optimizer, parameters, and what its loop hands over at a scale of the objective: the
gradient, and further arguments of `update`. Nothing here knows which transformation it is.
"""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

COUNTERS = ("count", "skipped", "nonfinite", "accepted")
"""Names of what may differ after an update that was skipped."""


class Case:
    """One optimizer in its loop; two updates are one program, compiled once."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: Any,
        gradient: Callable[[Any, Any], Any],
        named: Callable[[Any], dict[str, Any]] = lambda scale: {},
    ) -> None:
        self.optimizer, self.params, self.gradient, self.named = optimizer, params, gradient, named
        self._two = jax.jit(
            lambda carry: jax.lax.scan(lambda c, _: (self.step(*c), None), carry, length=2)[0]
        )

    def update(self, params, state, scale=1.0):
        gradient = self.gradient(params, scale)
        return self.optimizer.update(gradient, state, params, **self.named(scale))

    def step(self, params, state):
        updates, state = self.update(params, state)
        return optax.apply_updates(params, updates), state

    def after_two(self, carry=None):
        """Parameters and state two updates on."""
        return self._two(
            (self.params, self.optimizer.init(self.params)) if carry is None else carry
        )


def assert_state_is_stable(case):
    """Structure, shapes and dtypes stay, or a loop would compile anew; parameters keep theirs."""
    carry = case.params, case.optimizer.init(case.params)
    after = jax.eval_shape(case.step, *carry)
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(carry)):
        assert (new.shape, new.dtype) == (jnp.shape(old), jnp.result_type(old))


def assert_skips_nonfinite(case):
    """An objective that is no number moves neither parameters nor state, but for its counters."""
    params, state = case.after_two()
    updates, after = jax.jit(case.update)(params, state, jnp.nan)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, 0)
    before = dict(jax.tree.leaves_with_path(state))
    for path, leaf in jax.tree.leaves_with_path(after):
        if getattr(path[-1], "name", None) not in COUNTERS:
            np.testing.assert_array_equal(leaf, before[path], jax.tree_util.keystr(path))


def assert_recovers(case):
    """The update after one whose objective was no number is as good as if it had not been."""
    params, state = case.after_two()
    _, spoiled = jax.jit(case.update)(params, state, jnp.nan)
    params, state = jax.jit(case.step)(params, spoiled)
    for leaf in jax.tree.leaves((params, state)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.isfinite(leaf).all()


def assert_resumes_bitwise(case):
    """A run from a state that was written and read is the run that was not interrupted."""
    read = pickle.loads(pickle.dumps(jax.device_get(case.after_two())))
    resumed, whole = (
        case.after_two(jax.tree.map(jnp.asarray, read)),
        case.after_two(case.after_two()),
    )
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(a, b)


def assert_same_outside_of_a_program(case, rtol):
    """An update that nobody compiled does what a compiled one does."""
    carry = case.after_two()
    alone, together = case.step(*carry), jax.jit(case.step)(*carry)
    for a, b in zip(jax.tree.leaves(alone[0]), jax.tree.leaves(together[0])):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def assert_needs_params(case):
    with pytest.raises(ValueError, match="params"):
        case.optimizer.update(case.params, case.optimizer.init(case.params))


def assert_names_a_wrong_shape(case):
    """A gradient of one row too many is refused, whether or not it would broadcast."""
    state = case.optimizer.init(case.params)
    wrong = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), case.params)
    with pytest.raises(ValueError, match=r"updates.* has shape"):
        case.optimizer.update(wrong, state, case.params, **case.named(1.0))
