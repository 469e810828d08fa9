"""One line for those who want no loop of their own: a compiled step of training on losses."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import check_optimizer
from smallgain_jax._tree import vdot
from smallgain_jax.losses.incoming import host_report
from smallgain_jax.losses.losses import Batch, Losses, check_params
from smallgain_jax.losses.state import TrainingState

Step = Callable[..., tuple[Any, Any, dict[str, Any]]]


def train_step(
    losses: Losses | Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    donate: bool = True,
) -> Step:
    r"""A compiled step of training: one forward and one backward pass, whatever the optimizer.

    The gradient is that of $\sum_k w_k e_k$ with the weights in the state of `small_gain`, where
    there is one in `optimizer` (chains and wrappers included), else that of the plain sum.

    Args:
      losses: made by `sg.terms`, or their function.
      optimizer: `sg.small_gain(...)`, or any optax optimizer; line searches and L-BFGS are given
        what they ask for.
      donate: whether parameters and state of a call are overwritten by those it returns, which
        saves their memory; the old ones cannot be used again.

    Returns:
      `step(params, state, *args, **kwargs) -> (params, state, metrics)`, the arguments being what
      the losses take besides the parameters. `metrics` holds each loss by its name, at the
      parameters before the step, their plain sum as `total`, and with `has_aux` also `aux`.

    Raises:
      TypeError: an optimizer that is none; parameters that are not floating.

    >>> import smallgain_jax as sg
    >>> losses = sg.terms(lambda w, x, y: {"fit": jnp.mean((x @ w - y) ** 2), "size": w @ w},
    ...                   names=("fit", "size"))
    >>> optimizer = sg.small_gain(optax.adam(0.1), losses)
    >>> step = train_step(losses, optimizer)
    >>> w = jnp.zeros(2)
    >>> state = optimizer.init(w)
    >>> for _ in range(200):
    ...     w, state, metrics = step(w, state, jnp.eye(2), jnp.ones(2))
    >>> [round(float(x), 2) for x in w], round(metrics["total"].item(), 3)
    ([0.33, 0.33], 0.667)
    """
    check_optimizer("optimizer", optimizer)
    own = losses if isinstance(losses, Losses) else Losses(losses, None, None)
    update = _with_extra_args(optimizer)

    def step(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
        names = _checked_names(own, params, Batch(args, kwargs))
        weights = _weights(state, len(names))
        found, gradient = own.value_and_weighted_grad(weights, params, *args, **kwargs)
        values, aux = found if own.has_aux else (found, None)

        def value_fn(
            at: Any, term_args: Any = None, term_values: Any = None, weighted: Any = None
        ) -> jax.Array:
            # optax's line searches insist that value_fn names every extra argument of update
            del term_args, term_values, weighted
            return vdot(weights.astype(values.dtype), own.values(at, *args, **kwargs))

        updates, state = update(
            gradient,
            state,
            params,
            value=vdot(weights.astype(values.dtype), values),
            grad=gradient,
            value_fn=value_fn,
            term_args=Batch(args, kwargs),
            term_values=values,
            weighted=True,
        )
        metrics: dict[str, Any] = dict(zip(names, values, strict=True))
        metrics["total"] = jnp.sum(values)
        if own.has_aux:
            metrics["aux"] = aux
        return optax.apply_updates(params, updates), state, metrics

    compiled = jax.jit(step, donate_argnums=(0, 1) if donate else ())
    report_lost = host_report()

    def train(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        if ours := _ours(state):
            report_lost(ours[0])
        if donate:
            params, state = _unaliased((params, state))
        found: tuple[Any, Any, Any] = compiled(params, state, *args, **kwargs)
        return found

    return train


def _checked_names(losses: Losses, params: Any, batch: Batch) -> tuple[str, ...]:
    """Names of the losses, where a step can be made of these arguments."""
    if isinstance(params, TrainingState):
        raise TypeError("params is a state: the order is step(params, state, *args)")
    check_params(params)
    missing = losses.lacks(batch)
    if missing is not None:
        raise TypeError(
            f"step: the losses take {missing!r} besides params, and step was not given it; "
            "hand the batch over, as in step(params, state, batch)"
        )
    names = losses.names_of_batch(params, *batch.args, **batch.kwargs)
    if {"total", "aux"} & set(names):
        raise ValueError(
            f"names = {names}: 'total' and 'aux' are keys of the metrics, name it otherwise"
        )
    return names


def _with_extra_args(optimizer: Any) -> Callable[..., Any]:
    """An `update` that takes extra arguments: `optax.MultiSteps` does, and is no transformation."""
    parameters = signature(optimizer.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        found: Callable[..., Any] = optimizer.update
        return found
    return optax.with_extra_args_support(optimizer).update


def _unaliased(tree: Any) -> Any:
    """The tree with every array in a buffer of its own: `optax.lbfgs` starts with shared ones."""
    structure: Any
    leaves, structure = jax.tree.flatten(tree)
    seen: set[int] = set()
    own = []
    for leaf in leaves:
        own.append(jnp.array(leaf) if id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return structure.unflatten(own)


def _weights(state: Any, num_terms: int) -> jax.Array:
    """Those in the state of `small_gain`, wherever it stands; else ones."""
    found = _ours(state)
    return found[0].weights if found else jnp.ones(num_terms)


def _ours(state: Any) -> list[TrainingState]:
    return [node for node in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(node)]


def _is_ours(node: Any) -> bool:
    return isinstance(node, TrainingState)
