"""The losses of a model as terms: named scalars of any pytree of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

UNROLLED = 8
"""Terms up to which each has a backward pass of its own."""


class Losses(eqx.Module):
    """The K losses of a model; made by `terms`."""

    fn: Callable[..., Any] = eqx.field(static=True)
    names: tuple[str, ...] | None = eqx.field(static=True)
    outputs: Callable[..., Any] | None = eqx.field(static=True)

    def values(self, params: Any, *args: Any) -> jax.Array:
        """Losses [K], in the order of `names`."""
        return jnp.stack(self.parts(params, *args))

    def parts(self, params: Any, *args: Any) -> list[jax.Array]:
        """Losses one by one: what is differentiated alone must not pass through a common array."""
        at = params if self.outputs is None else self.outputs(params, *args)
        return self.parts_of_outputs(at, *args)

    def parts_of_outputs(self, outputs: Any, *args: Any) -> list[jax.Array]:
        """Losses from the model's outputs, for terms made with `outputs`."""
        return self._named(self.fn(outputs, *args))[1]

    def value_and_term_grads(self, params: Any, *args: Any) -> tuple[jax.Array, Any]:
        """Losses [K] and their gradients: one forward pass, one backward pass through each term.

        Up to eight terms are differentiated one by one, so that each passes only through what it
        depends on (two to six times cheaper than a batched pass where terms share little, as in
        bench/training); XLA merges what their forward passes share. Beyond, the program would grow
        with K, and one batched vector-Jacobian product serves all.

        Args:
          params: pytree of floating arrays.
          *args: whatever else the losses take.

        Returns:
          `(values [K], grads)`, `grads` shaped like `params` with a leading axis K on each leaf.

        Raises:
          TypeError: a leaf of `params` is not floating.

        >>> losses = terms(lambda x: {"a": x**2, "b": 3 * x})
        >>> values, grads = losses.value_and_term_grads(jnp.array(2.0))
        >>> values.tolist(), grads.tolist()
        ([4.0, 6.0], [4.0, 3.0])
        """
        check_params(params)
        num_terms = len(self.names_at(params, *args))
        if num_terms <= UNROLLED:
            alone = [
                jax.value_and_grad(lambda p, k=k: self.parts(p, *args)[k])(params)
                for k in range(num_terms)
            ]
            stacked: tuple[jax.Array, Any] = jax.tree.map(lambda *parts: jnp.stack(parts), *alone)
            return stacked
        return self.batched_value_and_term_grads(params, *args)

    def value_and_weighted_grad(
        self, weights: jax.Array, params: Any, *args: Any
    ) -> tuple[jax.Array, Any]:
        r"""Losses [K] and the gradient of $\sum_k w_k e_k$: one forward and one backward pass.

        With `weights` from the state of `small_gain`, and `weighted=True` for its `update`, a step
        costs no pass more than that of the plain sum.

        Args:
          weights: w [K], as in `TrainingState.weights`.
          params: pytree of floating arrays.
          *args: whatever else the losses take.

        Returns:
          `(values [K], gradient)`, `gradient` shaped like `params`.

        Raises:
          TypeError: a leaf of `params` is not floating.
          ValueError: `weights` of another shape.

        >>> losses = terms(lambda x: {"a": x**2, "b": 3 * x})
        >>> values, grad = losses.value_and_weighted_grad(jnp.array([1.0, 2.0]), jnp.array(2.0))
        >>> values.tolist(), grad.item()
        ([4.0, 6.0], 10.0)
        """
        check_params(params)
        weights = jnp.asarray(weights)

        def total(p: Any) -> tuple[jax.Array, jax.Array]:
            values = self.values(p, *args)
            if weights.shape != values.shape:
                raise ValueError(
                    f"weights has shape {weights.shape}, expected {values.shape}: one per loss"
                )
            return jnp.vdot(weights.astype(values.dtype), values), values

        gradient, values = jax.grad(total, has_aux=True)(params)
        return values, gradient

    def batched_value_and_term_grads(self, params: Any, *args: Any) -> tuple[jax.Array, Any]:
        """The same by one batched vector-Jacobian product: the cheaper one to differentiate."""
        values: jax.Array
        pull: Any
        values, pull = jax.vjp(lambda p: self.values(p, *args), params)
        (grads,) = jax.vmap(pull)(jnp.eye(values.shape[0], dtype=values.dtype))
        return values, grads

    def names_at(self, params: Any, *args: Any) -> tuple[str, ...]:
        """Names of the terms, from the names given or by tracing the function once."""
        if self.names is not None:
            return self.names
        found: list[tuple[str, ...]] = []

        def trace(p: Any) -> list[jax.Array]:
            at = p if self.outputs is None else self.outputs(p, *args)
            names, parts = self._named(self.fn(at, *args))
            found.append(names)
            return parts

        try:
            jax.eval_shape(trace, params)
        except TypeError as error:
            if args or found:
                raise
            raise TypeError(
                "names must be given, as in terms(fn, names=('residual', 'boundary')): fn takes "
                f"more than the parameters, so its terms cannot be counted beforehand ({error})"
            ) from error
        return found[0]

    def _named(self, result: Any) -> tuple[tuple[str, ...], list[jax.Array]]:
        if isinstance(result, Mapping):
            found = {str(name): jnp.asarray(part) for name, part in result.items()}
            if not found:
                raise ValueError("terms: fn returned an empty dict, so there is nothing to train")
            for name, part in found.items():
                if part.ndim != 0:
                    raise ValueError(f"terms: loss {name!r} has shape {part.shape}, not a scalar")
            names = tuple(found) if self.names is None else self.names
            if set(names) != set(found):
                raise ValueError(f"names = {names} do not match the losses of fn: {tuple(found)}")
            parts = [found[name] for name in names]
        else:
            vector = jnp.asarray(result)
            if vector.ndim != 1 or vector.shape[0] == 0:
                raise ValueError(
                    f"terms: fn must return {{name: scalar}} or a vector [K], not {vector.shape}"
                )
            parts = list(vector)
            names = self.names or tuple(map(str, range(len(parts))))
            if len(names) != len(parts):
                raise ValueError(f"names = {names} do not match the {len(parts)} losses of fn")
        dtype = jnp.result_type(*parts)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"terms: losses must be real floating numbers, got {dtype}")
        return names, [part.astype(dtype) for part in parts]


def terms(
    fn: Callable[..., Any],
    names: tuple[str, ...] | list[str] | None = None,
    *,
    outputs: Callable[..., Any] | None = None,
) -> Losses:
    r"""Take the losses of a model as the terms of an objective $F(\theta; w) = \sum_k w_k e_k$.

    Args:
      fn: pure function `fn(params, *args) -> {name: scalar}`, or a vector [K]. With `outputs` it
        takes what that returns in place of `params`.
      names: of the terms, in their order. Needed when `fn` takes arguments besides `params`:
        an optimizer's state is made before the first batch is seen.
      outputs: `outputs(params, *args)`, the model itself, where losses are to be split into model
        and loss of its outputs: that is what Gauss-Newton products need.

    Returns:
      A `Losses` with `values`, `value_and_term_grads`, `value_and_weighted_grad` and `names_at`.

    Raises:
      TypeError: `fn` cannot be called.
      ValueError: names that repeat or are empty; on use, a loss that is no scalar, an empty dict, a
        set of losses that is not the named one.

    >>> losses = terms(lambda w, x, y: {"fit": jnp.mean((x @ w - y) ** 2), "size": w @ w},
    ...                names=("fit", "size"))
    >>> losses.values(jnp.ones(2), jnp.eye(2), jnp.zeros(2)).tolist()
    [1.0, 2.0]
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of the parameters, got {type(fn).__name__}")
    if names is not None:
        names = tuple(names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names = {names} must be distinct, at least one")
    return Losses(fn, names, outputs)


def check_params(params: Any) -> None:
    """Raise unless every leaf can be differentiated."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        numeric = hasattr(leaf, "dtype") or isinstance(leaf, float | complex)
        if not numeric or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            what = str(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf).__name__
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {what}, which has no gradient: split the "
                "model first, as in params, static = eqx.partition(model, eqx.is_inexact_array)"
            )


def check_real(params: Any) -> None:
    """Raise for complex leaves: JAX's gradient there is conjugated, and power iteration is not."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is complex: give its real and imaginary parts "
                "as two leaves"
            )
