r"""A global throttle: one scalar on the base optimizer's update, from the gradient's own secant.

Training $\theta \mapsto \theta - \eta\, G(\theta)$ is stable while $\eta$ times the Lipschitz
constant of the gradient field stays below two. The throttle watches that constant along the path
and multiplies the update by $0 < \alpha \le 1$: the direction is the base optimizer's, always.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import (
    cast_like,
    check_call,
    check_fraction,
    check_optimizer,
    check_positive,
    missing_argument,
    warn_caller,
)
from smallgain_jax._show import shows
from smallgain_jax._tree import dot, norm, select, stat_dtype
from smallgain_jax.limits.probe import probe_optimizer

STATIC = ("order", "curvature", "loss", "same_batch", "power_steps")
"""Arguments of `throttle` that shape the program: `static_args` of `inject_hyperparams`."""

CURVATURES = ("secant", "hvp", "power")

TURN = -0.36
"""Mean cosine between one gradient and the next, above which alpha may grow.

At the limit of stability it is -1. Where gradients are noise alone it is minus half the product of
rate and curvature, so that alpha grows to a third of the limit and not beyond."""

MEMORY = 0.1
"""Weight of the newest gradient in means: a longer memory sees the limit too late."""


@shows()
class ThrottleState(NamedTuple):
    """State of `throttle`. Fields that a setting does not need are empty tuples."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates that were not skipped
    alpha: jax.Array  # [] factor, in [alpha_min, alpha_max]; a probe's below. Unrounded, lasting
    velocity: jax.Array  # [] of alpha, order 2
    gradient_lipschitz: jax.Array  # [] C_t, in units of curvature; 0 before the first secant
    gradient_lipschitz_ema: jax.Array  # [] its moving average
    gradient_norm: jax.Array  # [] ||G||, the last that was not 0
    alignment: jax.Array  # [] mean cosine between one gradient and the next; secant across batches
    gradient_rms: jax.Array  # [] ||G||, root mean square of the last ten or so
    quiet_norm: jax.Array  # [] gradient_rms, rising only while the gradient does not turn
    infeasible: jax.Array  # [] int32, steps whose floor exceeded what the control allowed
    skipped: jax.Array  # [] int32, steps with a non-finite gradient, update or value
    previous_params: Any  # like params; secant
    previous_grad: Any  # like params; secant across batches
    direction: Any  # like params, of unit norm up to rounding; power iteration
    base_state: Any


def throttle(
    base_optimizer: optax.GradientTransformation,
    learning_rate: ArrayLike | Callable[[jax.Array], Any] | None,
    *,
    chi: ArrayLike = 1.5,
    ema: ArrayLike = 0.05,
    order: int = 0,
    gain: ArrayLike = 0.1,
    damping: ArrayLike = 0.8,
    alpha_min: ArrayLike = 1e-8,
    alpha_max: ArrayLike = 1.0,
    tolerance: ArrayLike | None = 5.0,
    growth: ArrayLike = 0.1,
    probe: ArrayLike = 1e-3,
    quantum: ArrayLike | None = None,
    curvature: str = "secant",
    loss: Callable[..., jax.Array] | None = None,
    same_batch: bool = False,
    power_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the base optimizer's update by a scalar that keeps $\alpha\,\eta\,C$ near chi.

    With $C_t = \|G_t - G_{t-1}\| / \|\theta_t - \theta_{t-1}\|$ over the whole tree and the control
    signal $C = \max(C_t, \mathrm{EMA})$,

    - order 0: $\alpha = \min(1, \chi / (\eta\,C))$;
    - order 1: $\alpha \leftarrow \alpha + k\,(\chi - \eta\,\alpha\,C)$;
    - order 2: $v \leftarrow 0.8\,v + k\,(\chi - \eta\,\alpha\,C)$, $\alpha \leftarrow \alpha + v$,

    within [alpha_min, alpha_max]. Orders 1 and 2 smooth the way up only: but for `growth` alpha
    never exceeds what order 0 allows, and $k = \mathrm{gain} / \max(1, \eta C)$, without which the
    controller is itself an unstable iteration as soon as $\mathrm{gain}\,\eta\,C > 2$.

    Alpha takes a smaller value only once the gradient's norm has grown to `tolerance` times its
    quiet level while gradients point against each other: c, the mean cosine between one and the
    next, and the last cosine are at most $c_0 = -0.36$ (below). A gradient that is as large and
    does not is one of a bad batch, or of a rare one: its own update is clipped to the tolerance,
    and alpha stays. Otherwise alpha holds, and grows by up to `growth` an update while there is
    room: by the part $(1 - c^2)(c - c_0) / (1 - c_0)$ of it.

    The secant reacts; it certifies nothing. $C_t$ is the stretch of the gradient along the last
    step, at most the Lipschitz constant between two iterates and often below it. A stiff direction
    that the last step did not touch is invisible until it has grown, so an objective may rise for
    a few steps. On quadratics such a step lets the stiff component dominate the next secant, and
    the iteration corrects itself, like that of Barzilai and Borwein (1988), whose two step lengths
    have $1 / C_t$ as their geometric mean. Malitsky and Mishchenko (*Adaptive gradient descent
    without descent*, ICML 2020) use the same secant with $\chi = 1/2$ and bounded growth, and prove
    convergence for convex objectives; that proof does not cover this rule.

    Networks sharpen until a fixed step is at its limit, and then stay there (Cohen et al. 2021). A
    rule that gives way whenever curvature rises chases it down instead, to a step several times
    shorter than the best fixed one (Roulet et al., *Stepping on the edge*, 2024). Hence the
    tolerance. Its price: a growth that never reaches it is never answered, and one that does has
    raised the gradient that much.

    The difference of two mini-batches' gradients is noise that does not shrink with the step, and
    a rule that divides by the step follows it down without end. The cosine tells noise from
    curvature without dividing. On a quadratic of curvature $\lambda$ without noise it is 1 or -1,
    there is no room, and the secant is right. Where noise is all, gradients of a stationary run
    have the cosine $-\alpha \eta \lambda / 2$ (that of an autoregression), so that alpha grows to
    about a third of the limit, $\alpha \eta \lambda = 0.72$, however small the first secants made
    it. From there on the run is the base optimizer's; before, it is slower by some hundred updates.
    On quadratics, whose curvature follows nothing, `tolerance=None` is the formula alone; chi
    = 2 does not recover from what a tolerance lets pass.

    Args:
      base_optimizer: any optax optimizer. Its update u is scaled, its state is untouched.
      learning_rate: eta of the base optimizer, a scalar or its schedule (called with the count of
        updates). None measures it as ||u|| / ||G||, for bases whose update is not proportional to
        the gradient (Adam).
      chi: aimed-at product of rate and curvature; stability of gradient descent ends at 2.
      ema: weight of the newest C_t in the average, in (0, 1].
      order: 0, 1 or 2, static.
      gain, damping: k and the velocity's decay, orders 1 and 2; in [0, 1].
      alpha_min, alpha_max: bounds, 0 < alpha_min <= alpha_max <= 1.
      tolerance: how many times the quiet gradient norm counts as unstable, above 1; None answers
        every rise of the curvature, that of mini-batches' noise too.
      growth: largest relative growth of alpha in one update, in [0, 1], where the last gradients
        leave room for it; the secant across batches has it, `tolerance=None` has not.
      probe: until there is a secant there is nothing to go by, and updates are cut to a norm of at
        most probe (1 + ||params||), below alpha_min if need be: the first, and those after updates
        too short to tell, or of 0.
      quantum: smallest norm of an update worth making; alpha is raised to quantum / ||u|| (up to
        alpha_max), and steps where that exceeds the control are counted as `infeasible`. None
        takes half a unit of rounding of the leaves below 32 bits, and no floor for the others.
      curvature: "secant"; "hvp", the Rayleigh quotient |<u, H u>| / <u, u> along the step about to
        be taken; or "power", an estimate of ||H|| from below by warm-started power iteration.
      loss: `loss(params, *term_args)`, scalar; for "hvp", "power" and `same_batch`. Its further
        arguments are given to `update` as the extra argument `term_args`, a tuple.
      same_batch: evaluate the new batch's gradient at the old parameters too, so that the secant
        holds no batch noise; one more gradient a step. For `tolerance=None` on mini-batches.
      power_steps: Hessian-vector products per update with "power", static.

    Returns:
      An optax transformation whose `update` needs `params`; its state is a `ThrottleState`. A
      non-finite gradient, update, curvature or extra argument `value` gives a zero update and
      leaves all but `skipped` as it was. With leaves below 32 bits the update is scaled by alpha
      rounded down to a power of two: it is then exact, and its direction too.

    Raises:
      ValueError: an unknown name or order, a concrete number outside its range, a loss that is
        needed and missing; `update` without params, or with a gradient of another structure or
        shape.
      TypeError: `update` with the state of another transformation.

    Warns, at `init`: a rate given where updates are no multiple of gradients (Adam, signs).

    >>> optimizer = throttle(optax.sgd(100.0), 100.0)  # a hundred times the limit 2/L = 1
    >>> x = jnp.array([1.0, -2.0])
    >>> state = optimizer.init(x)
    >>> for _ in range(20):
    ...     updates, state = optimizer.update(2 * x, state, x)
    ...     x = optax.apply_updates(x, updates)
    >>> bool(jnp.linalg.norm(x) < 1e-4), round(state.alpha.item(), 4)
    (True, 0.0075)
    """
    check_optimizer("base_optimizer", base_optimizer)
    settings = _Settings(
        learning_rate,
        chi,
        ema,
        order,
        gain,
        damping,
        alpha_min,
        alpha_max,
        tolerance,
        growth,
        probe,
        quantum,
        curvature,
        loss,
        same_batch,
        power_steps,
    )
    _check(settings)
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: Any) -> ThrottleState:
        if learning_rate is not None and _is_no_multiple(base_optimizer, params):
            warn_caller(
                "learning_rate is given, but the base optimizer's update is no rate times the "
                "gradient (second moments, signs): say learning_rate=None, which measures it"
            )
        return _initial_state(params, base.init(params), settings)

    return optax.GradientTransformationExtraArgs(init, partial(_throttled, base, settings))


class _Settings(NamedTuple):
    """The arguments of `throttle`, which documents each."""

    learning_rate: ArrayLike | Callable[[jax.Array], Any] | None
    chi: ArrayLike
    ema: ArrayLike
    order: int
    gain: ArrayLike
    damping: ArrayLike
    alpha_min: ArrayLike
    alpha_max: ArrayLike
    tolerance: ArrayLike | None
    growth: ArrayLike
    probe: ArrayLike
    quantum: ArrayLike | None
    curvature: str
    loss: Callable[..., jax.Array] | None
    same_batch: bool
    power_steps: int


def _throttled(
    base: optax.GradientTransformationExtraArgs,
    settings: _Settings,
    updates: Any,
    state: ThrottleState,
    params: Any = None,
    **extra_args: Any,
) -> tuple[Any, ThrottleState]:
    """The base optimizer's update times alpha."""
    check_call(ThrottleState, updates, state, params)
    raw, base_state = base.update(updates, state.base_state, params, **extra_args)
    args = tuple(extra_args.get("term_args") or ())
    missing = None if settings.loss is None else missing_argument(settings.loss, args, {})
    if missing is not None:
        raise TypeError(
            f"loss: it takes {missing!r} besides params, and update was not given it; hand the "
            "batch over, as in update(gradient, state, params, term_args=(batch,))"
        )
    moved, alpha, usable = _moved(settings, state, params, updates, raw, args)
    if extra_args.get("value") is not None:
        usable &= jnp.all(jnp.isfinite(extra_args["value"]))
    kept = select(usable, cast_like(moved._replace(base_state=base_state), state), state)
    skipped = jnp.where(usable, state.skipped, optax.safe_increment(state.skipped))
    # chosen first, then scaled: compiled code would multiply the base's own factor by alpha
    # before the gradient, a product that may fall below the normal numbers, to 0
    safe = select(usable, raw, jax.tree.map(jnp.zeros_like, raw))
    if _has_low_precision(raw):
        alpha = _power_of_two(alpha)
    scaled = _scale(safe, jnp.where(usable, alpha, 1))
    return scaled, kept._replace(skipped=skipped)


def _is_no_multiple(optimizer: optax.GradientTransformation, params: Any) -> bool:
    """Whether updates are known to be no rate times the gradient."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an experiment is no call of the user's
            return not probe_optimizer(optimizer, params).proportional
    except Exception:  # it wants what only an update of a run has
        return False


def _check(settings: _Settings) -> None:
    curvature, low, high = settings.curvature, settings.alpha_min, settings.alpha_max
    if settings.order not in (0, 1, 2):
        raise ValueError(f"order = {settings.order} is unknown: choose from 0, 1, 2")
    if curvature not in CURVATURES:
        raise ValueError(
            f"curvature = {curvature!r} is unknown: choose from {', '.join(CURVATURES)}"
        )
    if settings.loss is None and (curvature != "secant" or settings.same_batch):
        needs = "same_batch" if settings.same_batch else f"curvature = {curvature!r}"
        raise ValueError(f"loss must be given: {needs} needs it")
    if settings.same_batch and curvature != "secant":
        raise ValueError("same_batch belongs to curvature = 'secant'; the others use one batch")
    if settings.power_steps < 1:
        raise ValueError(f"power_steps = {settings.power_steps} must be at least 1")
    if settings.learning_rate is not None and not callable(settings.learning_rate):
        check_fraction("learning_rate", settings.learning_rate, high=np.inf)
    for name in ("chi", "probe", "alpha_min"):
        check_positive(name, getattr(settings, name))
    for name in ("alpha_max", "ema", "gain", "damping", "growth"):
        check_fraction(name, getattr(settings, name))
    if isinstance(low, float | int) and isinstance(high, float | int):
        check_fraction("alpha_min", low, high=high)
    if settings.quantum is not None:
        check_fraction("quantum", settings.quantum, high=np.inf)
    if settings.tolerance is not None:
        check_fraction("tolerance", settings.tolerance, low=1.0, high=np.inf)


def _initial_state(params: Any, base_state: Any, settings: _Settings) -> ThrottleState:
    dtype, secant = stat_dtype(params), settings.curvature == "secant"

    # every field its own buffer: a donated state may not alias itself, nor the parameters
    def scalar(fill: float = 0.0) -> jax.Array:
        return jnp.full((), fill, dtype)

    def zeros() -> Any:
        # from the leaf, not from its shape: it may be sharded
        return jax.tree.map(jnp.zeros_like, params)

    return ThrottleState(
        count=jnp.zeros((), jnp.int32),
        alpha=scalar(1.0),
        velocity=scalar(),
        gradient_lipschitz=scalar(),
        gradient_lipschitz_ema=scalar(),
        gradient_norm=scalar(),
        alignment=scalar(-1.0),
        gradient_rms=scalar(),
        quiet_norm=scalar(),
        infeasible=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        previous_params=zeros() if secant else (),
        previous_grad=zeros() if _compares_batches(settings) else (),
        direction=_start_direction(params) if settings.curvature == "power" else (),
        base_state=base_state,
    )


def _moved(
    settings: _Settings,
    state: ThrottleState,
    params: Any,
    grads: Any,
    raw: Any,
    args: tuple[Any, ...],
) -> tuple[ThrottleState, jax.Array, jax.Array]:
    """The state after an update `raw` of the base, its factor, and whether all of it is finite."""
    dtype, secant = state.alpha.dtype, settings.curvature == "secant"
    length, size = norm(raw, dtype), norm(grads, dtype)
    seen = _measure(settings, state, params, grads, raw, length, args)
    turning = _turning(settings, state, size, seen.change)
    control = _control(settings, state, params, raw, length, size, seen, turning)
    moved = ThrottleState(
        count=optax.safe_increment(state.count),
        alpha=control.kept,
        velocity=control.velocity,
        gradient_lipschitz=seen.lipschitz,
        gradient_lipschitz_ema=seen.average,
        gradient_norm=size,
        alignment=turning.alignment,
        gradient_rms=turning.mean,
        quiet_norm=turning.quiet,
        infeasible=jnp.where(
            control.short, optax.safe_increment(state.infeasible), state.infeasible
        ),
        skipped=state.skipped,
        previous_params=params if secant else (),
        previous_grad=grads if _compares_batches(settings) else (),
        direction=seen.direction,
        base_state=state.base_state,
    )
    # a gradient of 0 says nothing: what was last seen stays, to be compared with the next
    still = state._replace(count=moved.count)
    moved = select(size != 0, cast_like(moved, still), still)
    usable = jnp.isfinite(length) & jnp.isfinite(seen.now) & jnp.isfinite(size)
    return moved, control.applied, usable


class _Seen(NamedTuple):
    """Curvature along the path."""

    now: jax.Array  # [] measured in this update
    any: jax.Array  # [] bool, whether this or an update before said something
    lipschitz: jax.Array  # [] the last one that says something
    average: jax.Array  # []
    change: jax.Array  # [] ||G_t - G_{t-1}||
    direction: Any


def _measure(
    settings: _Settings,
    state: ThrottleState,
    params: Any,
    grads: Any,
    raw: Any,
    length: jax.Array,
    args: tuple[Any, ...],
) -> _Seen:
    """C_t by the chosen way, and its average; both as they were where C_t says nothing."""
    direction, change = state.direction, jnp.zeros_like(length)
    if settings.curvature == "secant":
        now, seen, change = _secant(settings, state, params, grads, args)
    else:
        assert settings.loss is not None
        gradient = jax.grad(partial(_with_args, settings.loss, args))

        def product(vector: Any) -> Any:
            return jax.jvp(gradient, (params,), (_like(vector, params),))[1]

        if settings.curvature == "hvp":
            seen = length > 0
            along = _scale(raw, 1 / jnp.where(seen, length, 1))
            now = jnp.abs(dot(along, product(along), length.dtype))
        else:
            now, direction = _power(product, direction, settings.power_steps, length.dtype)
            seen = jnp.ones((), bool)
    lipschitz = jnp.where(seen, now, state.gradient_lipschitz)
    known = state.gradient_lipschitz_ema
    average = jnp.where(known > 0, known + settings.ema * (lipschitz - known), lipschitz)
    return _Seen(
        now=now,
        any=seen | (known > 0),
        lipschitz=lipschitz,
        average=jnp.where(seen, average, known),
        change=change,
        direction=direction,
    )


def _compares_batches(settings: _Settings) -> bool:
    """Whether the gradients of one update and the next are compared, each of its own batch."""
    return settings.curvature == "secant" and not settings.same_batch


def _with_args(loss: Callable[..., jax.Array], args: tuple[Any, ...], at: Any) -> jax.Array:
    return loss(at, *args)


def _secant(
    settings: _Settings, state: ThrottleState, params: Any, grads: Any, args: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stretch of the gradient along the last step, whether there was one to go by, its change."""
    dtype, old = state.alpha.dtype, state.previous_grad
    if settings.same_batch:
        assert settings.loss is not None
        old = jax.grad(settings.loss)(state.previous_params, *args)
    step = norm(_subtract(params, state.previous_params), dtype)
    change = norm(_subtract(grads, old), dtype)
    # below the resolution of the parameters a difference is no step to go by
    resolution = jnp.finfo(dtype).eps * norm(params, dtype)
    seen = (state.gradient_norm > 0) & (step > resolution)
    return jnp.where(seen, change / jnp.where(seen, step, 1), 0), seen, change


class _Turning(NamedTuple):
    """How far the gradient turns from one update to the next."""

    alignment: jax.Array  # [] in [-1, 1]
    room: jax.Array  # [] in [0, 1], 0 where alpha must not grow
    certain: jax.Array  # [] bool, whether a growth of the gradient is that of an unstable step
    mean: jax.Array  # [] norm of the gradient, root mean square
    quiet: jax.Array  # [] norm to which a growth is compared


def _turning(
    settings: _Settings, state: ThrottleState, size: jax.Array, change: jax.Array
) -> _Turning:
    """The mean cosine c, and the room that it leaves: $(1 - c^2)(c - c_{min}) / (1 - c_{min})$.

    A cosine that is always 1 or -1 is that of a gradient without noise, whose secant is right.
    """
    alignment, room = state.alignment, jnp.zeros_like(size)
    calm, certain = jnp.zeros((), bool), jnp.ones((), bool)
    if _compares_batches(settings):
        told = jnp.minimum(state.gradient_norm, size) > 0
        cosine = _cosine(state.gradient_norm, size, change, told)
        alignment += jnp.where(told, MEMORY * (cosine - alignment), 0)
        alignment = jnp.clip(alignment, -1, 1)
        calm = told & (jnp.minimum(alignment, cosine) > TURN)
        certain = jnp.maximum(alignment, cosine) <= TURN
        room = jnp.where(calm, (1 - jnp.square(alignment)) * (alignment - TURN) / (1 - TURN), 0)
    first = state.gradient_norm == 0
    weight = jnp.maximum(MEMORY, jnp.where(first, 1, 1 / (1 + state.count.astype(size.dtype))))
    # of values whose squares may not exist
    mean = jnp.hypot(jnp.sqrt(1 - weight) * state.gradient_rms, jnp.sqrt(weight) * size)
    # a gradient that grows without turning was not made to by the step
    quiet = jnp.where(calm | first, mean, jnp.minimum(state.quiet_norm, mean))
    return _Turning(alignment, room, certain, mean, quiet)


def _cosine(a: jax.Array, b: jax.Array, difference: jax.Array, valid: jax.Array) -> jax.Array:
    """Of two vectors of these norms; (a^2 + b^2 - d^2) / 2ab without a square that overflows."""
    longer = jnp.where(valid, jnp.maximum(a, b), 1)
    shorter = jnp.where(valid, jnp.minimum(a, b), 1)
    excess = jnp.clip(longer - difference, -shorter, shorter) / shorter
    return (shorter / longer + excess * (1 + difference / longer)) / 2


def _power(
    product: Callable[[Any], Any], start: Any, steps: int, dtype: Any
) -> tuple[jax.Array, Any]:
    """Norm of the Hessian from below, and the vector where the next power iteration starts."""
    direction, stretch = start, jnp.zeros((), dtype)
    for _ in range(steps):
        image = product(direction)
        length = norm(image, dtype)
        stretch = length / norm(direction, dtype)
        direction = _scale(image, 1 / jnp.where(length > 0, length, 1))
    # a vector that H annihilates says nothing more: keep the old one
    return stretch, select(stretch > 0, direction, start)


class _Control(NamedTuple):
    """What the control law says."""

    applied: jax.Array  # [] factor on this update
    kept: jax.Array  # [] factor that the next one starts from
    velocity: jax.Array  # []
    short: jax.Array  # [] bool, whether the floor exceeded what the control allowed


def _control(
    settings: _Settings,
    state: ThrottleState,
    params: Any,
    raw: Any,
    length: jax.Array,
    size: jax.Array,
    seen: _Seen,
    turning: _Turning,
) -> _Control:
    """The law, what the tolerance holds, a probe where nothing is known, and the floor."""
    dtype, known = length.dtype, state.gradient_lipschitz_ema > 0
    allowed, velocity = _law(settings, state, length, size, seen)
    applied = kept = allowed
    if settings.tolerance is not None:
        quiet = jnp.where(state.gradient_norm > 0, state.quiet_norm, size)
        grown = state.alpha * (1 + settings.growth * turning.room)
        held = jnp.minimum(jnp.maximum(grown, allowed), settings.alpha_max)
        # a large gradient that does not turn against the last ones is that of a bad batch or a
        # rare one: it is clipped to the tolerance, and those that follow are not
        peak = settings.tolerance * quiet
        clipped = held * peak / jnp.maximum(size, jnp.where(peak > 0, peak, 1))
        lasting = known & ((size <= peak) | ~turning.certain)
        kept = jnp.where(lasting, held, allowed)
        applied = jnp.where(lasting, jnp.maximum(clipped, jnp.minimum(allowed, held)), allowed)
    if settings.curvature == "secant":
        reach = settings.probe * (1 + norm(params, dtype))
        # not only at first: an update of 0, or one too short, leaves no secant
        shortened = reach / jnp.maximum(length, reach)
        applied, kept = (
            jnp.where(seen.any, alpha, jnp.minimum(alpha, shortened)) for alpha in (applied, kept)
        )
    quantum = settings.quantum
    smallest = _rounding(params, dtype) if quantum is None else jnp.asarray(quantum, dtype)
    floor = jnp.where(length > 0, smallest / jnp.where(length > 0, length, 1), 0)
    short = floor > applied
    raised = jnp.minimum(floor, settings.alpha_max)
    return _Control(jnp.maximum(applied, raised), jnp.maximum(kept, raised), velocity, short)


def _law(
    settings: _Settings, state: ThrottleState, length: jax.Array, size: jax.Array, seen: _Seen
) -> tuple[jax.Array, jax.Array]:
    """The control law of the chosen order: alpha and its velocity."""
    dtype, known = length.dtype, state.gradient_lipschitz_ema
    signal = jnp.maximum(seen.lipschitz, seen.average)
    rate: Any = settings.learning_rate
    if rate is None:
        rate = jnp.where(size > 0, length / jnp.where(size > 0, size, 1), 0)
    rate = jnp.asarray(rate(state.count) if callable(rate) else rate, dtype)
    allowed = settings.chi / jnp.maximum(rate * signal, settings.chi)
    allowed = jnp.clip(allowed, settings.alpha_min, settings.alpha_max)
    if settings.order == 0:
        return allowed, state.velocity
    # the integrator starts from what is allowed as soon as something is known
    start = jnp.where(known > 0, state.alpha, allowed)
    push = settings.gain / jnp.maximum(1, rate * signal)
    push = push * (settings.chi - rate * start * signal)
    kept = settings.damping * state.velocity if settings.order == 2 else 0
    velocity = jnp.asarray(kept + push, dtype)
    wanted = start + velocity
    alpha = jnp.clip(wanted, settings.alpha_min, allowed)
    # no winding up against a bound
    return alpha, jnp.where(wanted == alpha, velocity, 0)


def _subtract(a: Any, b: Any) -> Any:
    """a - b, in at least float32: bfloat16 would round the difference once more."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return x.astype(dtype) - y.astype(dtype)

    return jax.tree.map(leaf, a, b)


def _scale(tree: Any, factor: jax.Array) -> Any:
    return jax.tree.map(lambda x: (x.astype(factor.dtype) * factor).astype(x.dtype), tree)


def _like(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, old: x.astype(old.dtype), tree, like)


def _has_low_precision(tree: Any) -> bool:
    return any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(tree))


def _rounding(params: Any, dtype: Any) -> jax.Array:
    """Half a unit of rounding of the leaves below 32 bits: shorter updates mostly vanish."""
    half = [
        leaf.astype(dtype) * (float(jnp.finfo(leaf.dtype).eps) / 2)
        for leaf in jax.tree.leaves(params)
        if leaf.dtype.itemsize < 4
    ]
    return norm(half, dtype)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is at most x; exact, which exp2 is not."""
    return jnp.ldexp(jnp.ones_like(x), jnp.frexp(x)[1] - 1)


def _start_direction(params: Any) -> Any:
    """A unit vector with every coordinate different, so that no symmetry hides an eigenvector."""
    leaves, structure = jax.tree.flatten(params)
    size = max(1, sum(leaf.size for leaf in leaves))
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(leaf.shape) / np.sqrt(size) for leaf in leaves]
    # added to zeros of the leaf, whose sharding they take
    placed = [
        jnp.zeros_like(leaf) + jnp.asarray(part, leaf.dtype)
        for leaf, part in zip(leaves, start, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)
