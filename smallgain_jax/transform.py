"""One name for graphs and for losses: `small_gain`, and the baselines of the validation plan."""

import difflib
from collections.abc import Callable
from inspect import signature
from typing import Any, overload

import optax

from smallgain_jax._checks import check_optimizer
from smallgain_jax.graphs import baselines as graphs
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.graphs.small_gain import SmallGainInfo as SmallGainInfo
from smallgain_jax.graphs.small_gain import SmallGainState as SmallGainState
from smallgain_jax.graphs.small_gain import graph_small_gain as graph_small_gain
from smallgain_jax.losses import baselines as losses
from smallgain_jax.losses.losses import Losses
from smallgain_jax.losses.losses import terms as make_terms
from smallgain_jax.losses.small_gain import loss_small_gain as loss_small_gain
from smallgain_jax.losses.state import TrainingInfo as TrainingInfo
from smallgain_jax.losses.state import TrainingState as TrainingState


@overload
def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | None = None,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs: ...


@overload
def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: Losses | Callable[..., Any],
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs: ...


def small_gain(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | Losses | Callable[..., Any] | None = None,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap a base optimizer so that the terms of its objective share the stability margin.

    One name for two functions: `graph_small_gain` where the terms are the edges of an energy graph,
    `loss_small_gain` where they are the losses of a model. Their keywords and defaults differ, and
    stand in their own signatures; `optax.inject_hyperparams` takes either of the two.

    Args:
      base_optimizer: any optax optimizer.
      terms: the objective as an `EnergyGraph`; or the losses of a model, as `sg.terms(fn)` or their
        function itself; None leaves the base optimizer's update as it is.
      **keywords: those of `graph_small_gain` or of `loss_small_gain`.

    Returns:
      An optax transformation; its state is a `SmallGainState` on graphs, a `TrainingState` on
      losses.

    Raises:
      TypeError: `terms` that are neither; a keyword that belongs to the other kind, or to none.
      ValueError: an unknown name, or a concrete number outside its range.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> optimizer = small_gain(optax.sgd(0.1), graph)
    >>> sg.relax(graph, jnp.array([1.0, 0.5]), optimizer, steps=30).x.round(3).tolist()
    [0.0, 0.0]
    >>> losses = sg.terms(lambda x: {"fit": jnp.sum((x - 1) ** 2), "size": jnp.sum(x**2)})
    >>> small_gain(optax.adam(0.1), losses).init(jnp.ones(2)).weights.tolist()
    [1.0, 1.0]
    """
    return _dispatched(
        "small_gain", (graph_small_gain, loss_small_gain), base_optimizer, terms, keywords
    )


def gradnorm(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | Losses | Callable[..., Any] | None = None,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs:
    """The baseline that pulls the gradient norms of all terms together.

    On graphs as the design note this library grew from has it (`graphs.baselines.gradnorm`), on
    losses as Chen et al. (*GradNorm*, ICML 2018) do (`losses.baselines.loss_gradnorm`).

    Args:
      base_optimizer, terms: as in `small_gain`.
      **keywords: those of the function for that kind of terms.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as in `small_gain`.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> gradnorm(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5])).weights.tolist()
    [1.0]
    >>> optimizer = gradnorm(optax.sgd(0.1), lambda x: {"a": x**2, "b": x**4})
    >>> optimizer.init(jnp.ones(())).weights.tolist()
    [1.0, 1.0]
    """
    return _dispatched(
        "gradnorm", (graphs.gradnorm, losses.loss_gradnorm), base_optimizer, terms, keywords
    )


def auto_cap(
    base_optimizer: optax.GradientTransformation,
    terms: EnergyGraph | Losses | Callable[..., Any] | None = None,
    **keywords: Any,
) -> optax.GradientTransformationExtraArgs:
    """The baseline of one common factor min(1, T / L).

    On graphs one weight for all terms (`graphs.baselines.auto_cap`), on losses one factor on the
    step (`losses.baselines.loss_auto_cap`).

    Args:
      base_optimizer, terms: as in `small_gain`.
      **keywords: those of the function for that kind of terms.

    Returns:
      An optax transformation.

    Raises:
      TypeError, ValueError: as in `small_gain`.

    >>> import jax.numpy as jnp
    >>> import smallgain_jax as sg
    >>> graph = sg.EnergyGraph(sg.Landau(a=jnp.ones(2)), [sg.Quadratic([0], [1], 0.5)])
    >>> auto_cap(optax.sgd(0.1), graph).init(jnp.array([1.0, 0.5])).count.item()
    0
    """
    return _dispatched(
        "auto_cap", (graphs.auto_cap, losses.loss_auto_cap), base_optimizer, terms, keywords
    )


def _dispatched(
    name: str,
    kinds: tuple[Callable[..., Any], Callable[..., Any]],
    base_optimizer: optax.GradientTransformation,
    terms: Any,
    keywords: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    """The function for graphs or that for losses, once the keywords are known to be its own."""
    check_optimizer("base_optimizer", base_optimizer)
    on_graph = terms is None or isinstance(terms, EnergyGraph)
    own, other = kinds if on_graph else kinds[::-1]
    _check_keywords(name, keywords, own, other, ("an energy graph", "losses")[not on_graph])
    if terms is None:
        return optax.with_extra_args_support(base_optimizer)
    found: optax.GradientTransformationExtraArgs = own(
        base_optimizer, terms if on_graph else as_losses(terms), **keywords
    )
    return found


def as_losses(terms: Any) -> Losses:
    """`terms` as losses, or an error that says what would do."""
    if isinstance(terms, Losses):
        return terms
    if not callable(terms):
        raise TypeError(
            "terms must be an EnergyGraph, losses made by sg.terms(fn), or fn itself, "
            f"got {type(terms).__name__}"
        )
    return make_terms(terms)


def _check_keywords(
    name: str,
    keywords: dict[str, Any],
    own: Callable[..., Any],
    other: Callable[..., Any],
    kind: str,
) -> None:
    known, foreign = (set(signature(fn).parameters) for fn in (own, other))
    for keyword in keywords:
        if keyword in known:
            continue
        if keyword in foreign:
            where = "energy graphs" if kind == "losses" else "losses"
            raise TypeError(
                f"{keyword} is a keyword of {name} for {where}, and terms are {kind}: "
                f"see {own.__name__}"
            )
        near = difflib.get_close_matches(keyword, known, n=1)
        guess = f", did you mean {near[0]}?" if near else ":"
        raise TypeError(f"{keyword} is no keyword of {name}{guess} see {own.__name__}")
