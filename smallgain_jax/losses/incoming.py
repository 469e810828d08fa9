r"""What an optimizer is handed, set against the gradient of the plain sum.

A transformation does not know what was done to its updates u before. Only what it computed itself
may be combined with the gradients of the terms. Leaf by leaf, u is set against the gradient
$g = \sum_k \nabla e_k$ that is computed here. What is a multiple of it (clipping by norm, scaling,
a mean over K, a frozen leaf) hands its factor $c = \langle u, g \rangle / \langle g, g \rangle$ on,

$$ c \sum_k w_k \nabla e_k + s (u - c g) , $$

and where u is something else (clipped entry by entry, averaged over steps, another loss), it goes
on as s u: no reweighting, no harm, and a report. Here s is the `plain_weight`, 1 but for losses in
arbitrary units, at which the plain sum is as large as the weighted one. What lies within rounding
counts as nothing: where one loss is 1e25 times the others, the rounding of its gradient is larger
than all of theirs.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smallgain_jax._checks import is_concrete
from smallgain_jax.losses.losses import Batch, Losses, check_params
from smallgain_jax.losses.prices import mixed
from smallgain_jax.losses.state import Settings, TrainingState
from smallgain_jax.losses.watch import STRIKES

FOREIGN = 0.05
"""Part of the updates that may be no multiple of the gradient: rounding, a little weight decay."""

HELD = 100
"""Updates that must fit in a row before foreign ones are forgotten: momentum is parallel to the
gradient now and then."""


class Given(NamedTuple):
    """What the caller knows of the losses."""

    term_grads: Any
    term_values: Any
    weighted: bool


class Incoming(NamedTuple):
    """The losses at the parameters to first order, and what was handed in."""

    values: jax.Array | None  # [K]; None where nothing evaluated them
    gradients: Any  # [K, ...]; None unless needed
    total: Callable[[jax.Array], Any]  # weights [K] -> gradient of the weighted sum, if known
    reweighted: Callable[..., Any]  # weights [K], s [] -> gradient for the base optimizer
    fit: jax.Array  # [] cosine between what was handed in and the plain gradient


def observe(
    losses: Losses,
    settings: Settings,
    updates: Any,
    params: Any,
    batch: Batch,
    given: Given,
    per_term: bool,
    weights: jax.Array,
) -> Incoming:
    """Look at the losses to first order, with as few passes as the policy needs."""
    values = given.term_values
    one = jnp.ones(())
    grads = given.term_grads
    own = per_term or (settings.reweights and not (given.weighted and grads is None))
    if not own:
        # the weights it was handed move too slowly for one update to matter
        return Incoming(values, grads, lambda _: updates, lambda *_: updates, one)
    if grads is None:
        check_params(params)
    if grads is None and per_term:
        values, grads = settings.mean(
            losses.value_and_term_grads(params, *batch.args, **batch.kwargs)
        )
    total: Callable[[jax.Array], Any]
    if grads is not None:
        total = lambda mix: jax.tree.map(partial(mixed, mix), grads)  # noqa: E731
    else:
        # one backward pass for the mixture, however many losses there are; that of the plain sum
        # is the caller's own, which the compiler does not evaluate twice
        found: Any
        pull: Any
        found, pull = jax.vjp(lambda p: losses.values(p, *batch.args, **batch.kwargs), params)
        values = settings.mean(found)
        total = lambda mix: settings.mean(pull(mix.astype(found.dtype))[0])  # noqa: E731
    handed = weights if given.weighted else jnp.ones_like(weights)
    plain = total(handed)
    factors, fit = compare(updates, plain)

    def reweighted(weights: jax.Array, scale: jax.Array) -> Any:
        def leaf(u: jax.Array, c: jax.Array, g: jax.Array, whole: jax.Array) -> jax.Array:
            rest = u - c.astype(g.dtype) * g
            top = jnp.max(jnp.abs(u), initial=0.0)
            noise = jnp.max(jnp.abs(rest), initial=0.0) <= _rounding(u.dtype) * top
            rest = scale.astype(rest.dtype) * jnp.where(noise, 0, rest)
            return (c.astype(whole.dtype) * whole + rest).astype(u.dtype)

        return jax.tree.map(leaf, updates, factors, plain, total(weights))

    return Incoming(values, grads, total, reweighted, fit)


def _rounding(dtype: Any) -> float:
    """Within it two programs for one gradient agree, sums that cancel included."""
    return float(jnp.finfo(dtype).eps) ** 0.5


def compare(updates: Any, plain: Any) -> tuple[Any, jax.Array]:
    """The factor [] of each leaf (0 for all where `updates` are foreign), and the cosine.

    >>> factors, fit = compare([jnp.array([1.0, 2.0])], [jnp.array([2.0, 4.0])])
    >>> factors[0].item(), round(fit.item(), 6)
    (0.5, 1.0)
    """
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(plain)))

    def leaf(u: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        rounded = u.dtype
        u, g = u.astype(dtype), g.astype(dtype)
        # relative to the largest entry: squares of gradients of 1e20 leave the range of float32
        top = jnp.max(jnp.abs(g), initial=0.0)
        scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        size = jnp.sum((g / scale) ** 2)
        factor = jnp.sum((g / scale) * (u / scale)) / jnp.where(size > 0, size, 1)
        factor = jnp.where(jnp.abs(factor - 1) <= _rounding(rounded), 1, factor)
        return (
            factor,
            jnp.max(jnp.abs(u - factor * g), initial=0.0),
            jnp.max(jnp.abs(u), initial=0.0),
        )

    structure = jax.tree.structure(plain)
    parts = [
        leaf(*pair) for pair in zip(jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True)
    ]
    if not parts:
        return plain, jnp.ones((), dtype)
    factors = [part[0] for part in parts]
    largest = jnp.max(jnp.stack([jnp.maximum(part[1], part[2]) for part in parts]))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)

    def rest(u: jax.Array, g: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.sum(((u.astype(dtype) - factor * g.astype(dtype)) / unit) ** 2)

    pairs = list(zip(jax.tree.leaves(updates), jax.tree.leaves(plain), factors, strict=True))
    foreign = sum(rest(*pair) for pair in pairs)
    whole = sum(jnp.sum((u.astype(dtype) / unit) ** 2) for u, _, _ in pairs)
    share = foreign / jnp.where(whole > 0, whole, 1)
    fits = share <= FOREIGN**2
    kept = [jnp.where(fits, factor, 0) for factor in factors]
    return jax.tree.unflatten(structure, kept), jnp.sqrt(jnp.clip(1 - share, 0, 1))


def is_foreign(fit: jax.Array) -> jax.Array:
    """Whether `compare` found something else than a multiple of the gradient."""
    return fit < (1 - FOREIGN**2) ** 0.5


def held_foreign(held: jax.Array, fit: jax.Array) -> jax.Array:
    """For how many updates what comes in still counts as foreign."""
    return jnp.where(is_foreign(fit), HELD, jnp.maximum(held - 1, 0)).astype(jnp.int32)


def report(fit: Any, new: Any) -> None:
    """Warn, from the host; under `vmap` a branch is taken by all members if by one."""
    if not new:
        return
    warnings.warn(
        f"small_gain was handed updates that are no multiple of the gradient of the plain sum of "
        f"its losses (cosine {float(fit):.3f}), so that it cannot reweight them and hands them on "
        "as they are. Put whatever comes before it inside, as in "
        "small_gain(optax.chain(optax.clip(1.0), optax.adam(1e-3)), losses); hand over the "
        "gradient of the sum of these very losses on term_args; or say weighted=True for the "
        "gradient of the sum by state.weights.",
        stacklevel=2,
    )


def host_report() -> Callable[[TrainingState], None]:
    """What warns once of a guard that is off, from states whose numbers the host holds already.

    A callback would do it inside of a user's program, too, but slows down the start of each call.
    """
    told = False

    def tell(state: TrainingState) -> None:
        nonlocal told
        lost: Any = state.watch.lost
        if told or not is_concrete(lost) or not getattr(lost, "is_ready", lambda: True)():
            return
        told = bool(np.all(lost))
        report_off(told, np.max(state.watch.strikes))

    return tell


def report_off(off: Any, strikes: Any) -> None:
    """Warn of a guard that went off, from the host."""
    if not off:
        return
    if strikes >= STRIKES:
        warnings.warn(
            "small_gain took parameters back to where the loss was lower, again and again, with "
            "shorter steps each time, and the loss rose all the same: it means to rise (min-max, "
            "ascent, sampling, weight decay of the optimizer), or something else is wrong. The "
            "guard is off from now on; guard=None says so from the start.",
            stacklevel=2,
        )
        return
    warnings.warn(
        "small_gain took parameters back to where the loss was lower, and they did not arrive: a "
        "transformation after it changes its updates, so that its guard is off from now on. Put "
        "what comes after it inside, as in small_gain(optax.chain(optax.scale_by_adam(), "
        "optax.scale(-1e-3)), losses).",
        stacklevel=2,
    )
