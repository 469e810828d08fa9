"""The losses of a model as terms: named scalars of any pytree of parameters."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from smallgain_jax._checks import missing_argument
from smallgain_jax._tree import vdot

UNROLLED = 8
"""Terms up to which each has a backward pass of its own."""


class Batch(NamedTuple):
    """What the losses take besides the parameters."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    @classmethod
    def of(cls, given: Any, name: str = "term_args") -> "Batch":
        """From a tuple of positional arguments, or a dict of named ones."""
        if isinstance(given, Batch):
            return given
        if isinstance(given, Mapping):
            return cls((), dict(given))
        if isinstance(given, tuple | list):
            return cls(tuple(given), {})
        raise TypeError(
            f"{name} must be a tuple, as (x,), or a dict of named arguments: what the losses "
            f"take besides params; got {type(given).__name__}"
        )


class Losses(eqx.Module):
    """The K losses of a model; made by `terms`."""

    fn: Callable[..., Any] = eqx.field(static=True)
    names: tuple[str, ...] | None = eqx.field(static=True)
    outputs: Callable[..., Any] | None = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True, default=False)

    def values(self, params: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Losses [K], in the order of `names`."""
        return jnp.stack(self.parts(params, *args, **kwargs))

    def values_and_aux(self, params: Any, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """Losses [K], and what `fn` returns beside them; None without `has_aux`."""
        _, parts, aux = self._named(self._of(params, args, kwargs))
        return jnp.stack(parts), aux

    def parts(self, params: Any, *args: Any, **kwargs: Any) -> list[jax.Array]:
        """Losses one by one: what is differentiated alone must not pass through a common array."""
        return self._named(self._of(params, args, kwargs))[1]

    def parts_of_outputs(self, outputs: Any, *args: Any, **kwargs: Any) -> list[jax.Array]:
        """Losses from the model's outputs, for terms made with `outputs`."""
        return self._named(self.fn(outputs, *args, **kwargs))[1]

    def value_and_term_grads(self, params: Any, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        """Losses [K] and their gradients: one forward pass, one backward pass through each term.

        Up to eight terms are differentiated one by one, so that each passes only through what it
        depends on (two to six times cheaper than a batched pass where terms share little, as in
        bench/training); XLA merges what their forward passes share. Beyond, the program would grow
        with K, and one batched vector-Jacobian product serves all.

        Args:
          params: pytree of floating arrays.
          args, kwargs: whatever else the losses take.

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
        num_terms = len(self.names_at(params, *args, **kwargs))
        if num_terms <= UNROLLED:
            alone = [
                jax.value_and_grad(lambda p, k=k: self.parts(p, *args, **kwargs)[k])(params)
                for k in range(num_terms)
            ]
            stacked: tuple[jax.Array, Any] = jax.tree.map(lambda *parts: jnp.stack(parts), *alone)
            return stacked
        return self.batched_value_and_term_grads(params, *args, **kwargs)

    def value_and_weighted_grad(
        self, weights: jax.Array, params: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        r"""Losses [K] and the gradient of $\sum_k w_k e_k$: one forward and one backward pass.

        With `weights` from the state of `small_gain`, and `weighted=True` for its `update`, a step
        costs no pass more than that of the plain sum. `train_step` does so.

        Args:
          weights: w [K], as in `TrainingState.weights`.
          params: pytree of floating arrays.
          args, kwargs: whatever else the losses take.

        Returns:
          `(values [K], gradient)`, `gradient` shaped like `params`; for terms made with `has_aux`
          `((values, aux), gradient)`, as `jax.value_and_grad` has it.

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

        def total(p: Any) -> tuple[jax.Array, Any]:
            values, aux = self.values_and_aux(p, *args, **kwargs)
            if weights.shape != values.shape:
                raise ValueError(
                    f"weights has shape {weights.shape}, expected {values.shape}: one per loss"
                )
            return vdot(weights.astype(values.dtype), values), (values, aux)

        gradient, (values, aux) = jax.grad(total, has_aux=True)(params)
        return ((values, aux) if self.has_aux else values), gradient

    def batched_value_and_term_grads(
        self, params: Any, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Any]:
        """The same by one batched vector-Jacobian product: the cheaper one to differentiate."""
        values: jax.Array
        pull: Any
        values, pull = jax.vjp(lambda p: self.values(p, *args, **kwargs), params)
        (grads,) = jax.vmap(pull)(jnp.eye(values.shape[0], dtype=values.dtype))
        return values, grads

    def lacks(self, batch: Batch) -> str | None:
        """The name of an argument that the function needs and `batch` has not; None for none."""
        for fn in (self.fn, self.outputs):
            missing = None if fn is None else missing_argument(fn, batch.args, batch.kwargs)
            if missing is not None:
                return missing
        return None

    def names_at(self, params: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Names of the terms, from the names given or by tracing the function once."""
        if self.names is not None:
            return self.names
        self.check_countable(Batch(args, kwargs))
        return self.names_of_batch(params, *args, **kwargs)

    def check_countable(self, batch: Batch = Batch()) -> None:  # noqa: B008
        """Raise where neither names nor all arguments are known."""
        missing = None if self.names is not None else self.lacks(batch)
        if missing is not None:
            raise TypeError(
                "names must be given, as in terms(fn, names=('residual', 'boundary')): fn takes "
                f"{missing!r} besides the parameters, so its terms cannot be counted beforehand"
            )

    def names_of_batch(self, params: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Names of the terms where all arguments are known."""
        if self.names is not None:
            return self.names
        found: list[tuple[str, ...]] = []

        def trace(p: Any) -> list[jax.Array]:
            names, parts, _ = self._named(self._of(p, args, kwargs))
            found.append(names)
            return parts

        jax.eval_shape(trace, params)
        return found[0]

    def _of(self, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `fn` returns; an error of the model's own says what may be the matter."""
        try:
            at = params if self.outputs is None else self.outputs(params, *args, **kwargs)
            return self.fn(at, *args, **kwargs)
        except (TypeError, AttributeError) as error:
            holes = any(leaf is None for leaf in jax.tree.leaves(params, is_leaf=_is_none))
            if holes and "None" in str(error):
                error.add_note(
                    "terms: params has None where a filter left out what is not trained; put it "
                    "back inside the losses, as in model = eqx.combine(params, static)"
                )
            raise

    def _named(self, result: Any) -> tuple[tuple[str, ...], list[jax.Array], Any]:
        aux = None
        if self.has_aux:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError("terms: with has_aux fn must return (losses, aux)")
            result, aux = result
        if isinstance(result, Mapping):
            found = dict(_flat(result))
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
        return names, [part.astype(dtype) for part in parts], aux


def _is_none(node: Any) -> bool:
    return node is None


def _flat(losses: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, jax.Array]]:
    """Names and losses of a dict, those of a dict inside it as `outer/inner`."""
    for name, part in losses.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", jnp.asarray(part)


def terms(
    fn: Callable[..., Any],
    names: tuple[str, ...] | list[str] | None = None,
    *,
    outputs: Callable[..., Any] | None = None,
    has_aux: bool = False,
) -> Losses:
    r"""Take the losses of a model as the terms of an objective $F(\theta; w) = \sum_k w_k e_k$.

    Args:
      fn: pure function `fn(params, *args, **kwargs) -> {name: scalar}`, or a vector [K]; losses of
        a dict inside the dict are named `outer/inner`. With `outputs` it takes what that returns
        in place of `params`.
      names: of the terms, in their order. Needed when `fn` takes arguments besides `params`:
        an optimizer's state is made before the first batch is seen.
      outputs: `outputs(params, *args, **kwargs)`, the model itself, where losses are to be split
        into model and loss of its outputs: that is what Gauss-Newton products need.
      has_aux: whether `fn` returns `(losses, aux)`, aux any pytree (batch statistics, metrics);
        `value_and_weighted_grad` and `train_step` hand it on.

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
    if isinstance(names, str):
        raise TypeError(f"names must be a tuple of names, as in names=({names!r},)")
    if names is not None:
        names = tuple(names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names = {names} must be distinct, at least one")
    return Losses(fn, names, outputs, has_aux)


def check_params(params: Any) -> None:
    """Raise unless every leaf can be differentiated."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None:
            floating = isinstance(leaf, float | complex)
        else:
            floating = bool(jnp.issubdtype(dtype, jnp.inexact))
        if not floating:
            what = str(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf).__name__
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {what}, which has no gradient: split the "
                "model first, as in params, static = eqx.partition(model, eqx.is_inexact_array)"
            )


def check_real(params: Any) -> None:
    """Raise for complex leaves: JAX's gradient there is conjugated, and power iteration is not."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.complexfloating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is complex: give its real and imaginary parts "
                "as two leaves"
            )
