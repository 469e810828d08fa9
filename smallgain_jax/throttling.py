r"""A global throttle: one scalar on the base optimizer's update, from the gradient's own secant.

Training $\theta \mapsto \theta - \eta\, G(\theta)$ is stable while $\eta$ times the Lipschitz
constant of the gradient field stays below two. The throttle watches that constant along the path
and multiplies the update by $0 < \alpha \le 1$: the direction is the base optimizer's, always.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, check_fraction, check_positive
from smallgain_jax._tree import dot, norm, select, stat_dtype

STATIC = ("order", "curvature", "loss", "same_batch", "power_steps")
"""Arguments of `throttle` that shape the program: `static_args` of `inject_hyperparams`."""

CURVATURES = ("secant", "hvp", "power")


class ThrottleState(NamedTuple):
    """State of `throttle`. Fields that a setting does not need are empty tuples."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates that were not skipped
    alpha: jax.Array  # [] factor on the last update, in [alpha_min, alpha_max]; a probe's below
    velocity: jax.Array  # [] of alpha, order 2
    gradient_lipschitz: jax.Array  # [] C_t, in units of curvature; 0 before the first secant
    gradient_lipschitz_ema: jax.Array  # [] its moving average
    quiet_norm: jax.Array  # [] ||G||, averaged as it falls and never rising; for `tolerance`
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
    tolerance: ArrayLike | None = None,
    probe: ArrayLike = 1e-3,
    quantum: ArrayLike | None = None,
    curvature: str = "secant",
    loss: Callable[..., jax.Array] | None = None,
    same_batch: bool = False,
    power_steps: int = 1,
    eps: ArrayLike = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply the base optimizer's update by a scalar that keeps $\alpha\,\eta\,C$ near chi.

    With $C_t = \|G_t - G_{t-1}\| / (\|\theta_t - \theta_{t-1}\| + \epsilon)$ over the whole tree
    and the control signal $C = \max(C_t, \mathrm{EMA})$,

    - order 0: $\alpha = \min(1, \chi / (\eta\,(C + \epsilon)))$;
    - order 1: $\alpha \leftarrow \alpha + k\,(\chi - \eta\,\alpha\,C)$;
    - order 2: $v \leftarrow 0.8\,v + k\,(\chi - \eta\,\alpha\,C)$, $\alpha \leftarrow \alpha + v$,

    within [alpha_min, alpha_max]. Orders 1 and 2 smooth the way up only: alpha never exceeds what
    order 0 allows, and $k = \mathrm{gain} / \max(1, \eta C)$, without which the controller is
    itself an unstable iteration as soon as $\mathrm{gain}\,\eta\,C > 2$.

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
    shorter than the best fixed one (Roulet et al., *Stepping on the edge*, 2024). With `tolerance`
    alpha gives way only when the gradient's norm has grown to that multiple of its quiet level, and
    holds otherwise. chi = 1.75 and tolerance = 5 suit full-batch training of networks; chi = 2
    with a tolerance does not recover from what it tolerated. The price: a growth that never
    reaches the tolerance is never answered. The default, None, is the formula above, for objectives
    whose curvature does not follow the step.

    Mini-batches: the difference of two batches' gradients is noise that does not shrink with the
    step. Where it exceeds chi times the gradient, alpha falls geometrically, to alpha_min. Use
    `same_batch`, or "hvp", there.

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
      tolerance: None, or how many times the quiet gradient norm counts as unstable, above 1.
      probe: before the first secant there is nothing to go by, and the first update is cut to a
        norm of at most probe (1 + ||params||), below alpha_min if need be.
      quantum: smallest norm of an update worth making; alpha is raised to quantum / ||u|| (up to
        alpha_max), and steps where that exceeds the control are counted as `infeasible`. None
        takes half a unit of rounding of the leaves below 32 bits, and no floor for the others.
      curvature: "secant"; "hvp", the Rayleigh quotient |<u, H u>| / <u, u> along the step about to
        be taken; or "power", an estimate of ||H|| from below by warm-started power iteration.
      loss: `loss(params, *term_args)`, scalar; for "hvp", "power" and `same_batch`. Its further
        arguments are given to `update` as the extra argument `term_args`, a tuple.
      same_batch: evaluate the new batch's gradient at the old parameters too, so that the secant
        holds no batch noise; one more gradient a step.
      power_steps: Hessian-vector products per update with "power", static.
      eps: added to lengths and curvatures that are divided by.

    Returns:
      An optax transformation whose `update` needs `params`; its state is a `ThrottleState`. A
      non-finite gradient, update, curvature or extra argument `value` gives a zero update and
      leaves all but `skipped` as it was. With leaves below 32 bits alpha is rounded down to a power
      of two: the scaled update is then exact, and its direction too.

    Raises:
      ValueError: an unknown name or order, a concrete number outside its range, a loss that is
        needed and missing, or `update` without params.

    >>> optimizer = throttle(optax.sgd(100.0), 100.0)  # a hundred times the limit 2/L = 1
    >>> x = jnp.array([1.0, -2.0])
    >>> state = optimizer.init(x)
    >>> for _ in range(20):
    ...     updates, state = optimizer.update(2 * x, state, x)
    ...     x = optax.apply_updates(x, updates)
    >>> bool(jnp.linalg.norm(x) < 1e-4), round(state.alpha.item(), 4)
    (True, 0.0075)
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order = {order} is unknown: choose from 0, 1, 2")
    if curvature not in CURVATURES:
        raise ValueError(
            f"curvature = {curvature!r} is unknown: choose from {', '.join(CURVATURES)}"
        )
    if loss is None and (curvature != "secant" or same_batch):
        needs = "same_batch" if same_batch else f"curvature = {curvature!r}"
        raise ValueError(f"loss must be given: {needs} needs it")
    if same_batch and curvature != "secant":
        raise ValueError("same_batch belongs to curvature = 'secant'; the others use one batch")
    if power_steps < 1:
        raise ValueError(f"power_steps = {power_steps} must be at least 1")
    if learning_rate is not None and not callable(learning_rate):
        check_fraction("learning_rate", learning_rate, high=np.inf)
    for name, number in (("chi", chi), ("probe", probe), ("alpha_min", alpha_min)):
        check_positive(name, number)
    check_fraction("alpha_max", alpha_max)
    for name, number in (("ema", ema), ("gain", gain), ("damping", damping)):
        check_fraction(name, number)
    if isinstance(alpha_min, float | int) and isinstance(alpha_max, float | int):
        check_fraction("alpha_min", alpha_min, high=alpha_max)
    check_fraction("eps", eps, high=np.inf)
    if quantum is not None:
        check_fraction("quantum", quantum, high=np.inf)
    if tolerance is not None:
        check_fraction("tolerance", tolerance, low=1.0, high=np.inf)
    base = optax.with_extra_args_support(base_optimizer)
    secant = curvature == "secant"

    def init(params: Any) -> ThrottleState:
        dtype = stat_dtype(params)

        # every field its own buffer: a donated state may not alias itself, nor the parameters
        def scalar(fill: float = 0.0) -> jax.Array:
            return jnp.full((), fill, dtype)

        def zeros() -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)

        return ThrottleState(
            count=jnp.zeros((), jnp.int32),
            alpha=scalar(1.0),
            velocity=scalar(),
            gradient_lipschitz=scalar(),
            gradient_lipschitz_ema=scalar(),
            quiet_norm=scalar(),
            infeasible=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            previous_params=zeros() if secant else (),
            previous_grad=zeros() if secant and not same_batch else (),
            direction=_start_direction(params) if curvature == "power" else (),
            base_state=base.init(params),
        )

    def update(
        updates: Any, state: ThrottleState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ThrottleState]:
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        grads, dtype = updates, state.alpha.dtype
        raw, base_state = base.update(grads, state.base_state, params, **extra_args)
        args = tuple(extra_args.get("term_args") or ())
        length = norm(raw, dtype)
        direction = state.direction

        def hessian_product(vector: Any) -> Any:
            assert loss is not None
            gradient = jax.grad(lambda at: loss(at, *args))
            return jax.jvp(gradient, (params,), (_like(vector, params),))[1]

        if curvature == "hvp":
            product = dot(raw, hessian_product(raw), dtype)
            measured = jnp.abs(product) / jnp.maximum(length**2, jnp.finfo(dtype).tiny)
            seen = length > 0
        elif curvature == "power":
            measured = jnp.zeros((), dtype)
            for _ in range(power_steps):
                image = hessian_product(direction)
                stretched = norm(image, dtype)
                measured = stretched / norm(direction, dtype)
                direction = _scale(image, 1 / jnp.where(stretched > 0, stretched, 1))
            seen = jnp.ones((), bool)
            # a vector that H annihilates says nothing more: keep the old one
            direction = select(measured > 0, direction, state.direction)
        else:
            old = state.previous_grad
            if same_batch:
                assert loss is not None
                old = jax.grad(loss)(state.previous_params, *args)
            step = norm(_subtract(params, state.previous_params), dtype)
            change = norm(_subtract(grads, old), dtype)
            measured = change / (step + eps)
            # below the resolution of the parameters, or eps, a difference is no step to go by
            resolution = jnp.maximum(jnp.finfo(dtype).eps * norm(params, dtype), 100 * eps)
            seen = (state.count > 0) & (step > resolution)

        lipschitz = jnp.where(seen, measured, state.gradient_lipschitz)
        known = state.gradient_lipschitz_ema
        average = jnp.where(known > 0, known + ema * (lipschitz - known), lipschitz)
        average = jnp.where(seen, average, known)
        signal = jnp.maximum(lipschitz, average)

        size = norm(grads, dtype)
        if learning_rate is None:
            rate = jnp.where(size > 0, length / jnp.where(size > 0, size, 1), 0)
        else:
            now = learning_rate(state.count) if callable(learning_rate) else learning_rate
            rate = jnp.asarray(now, dtype)
        allowed = jnp.clip(chi / (rate * (signal + eps) + jnp.finfo(dtype).tiny), 0, 1)
        allowed = jnp.clip(allowed, alpha_min, alpha_max)
        velocity = state.velocity
        if order == 0:
            alpha = allowed
        else:
            # the integrator starts from what is allowed as soon as something is known
            start = jnp.where(known > 0, state.alpha, allowed)
            push = gain / jnp.maximum(1, rate * signal) * (chi - rate * start * signal)
            velocity = jnp.asarray((damping * velocity if order == 2 else 0) + push, dtype)
            wanted = start + velocity
            alpha = jnp.clip(wanted, alpha_min, allowed)
            # no winding up against a bound
            velocity = jnp.where(wanted == alpha, velocity, 0)
        quiet = jnp.where(state.count > 0, state.quiet_norm, size)
        if tolerance is not None:
            holds = (known > 0) & (size <= tolerance * quiet)
            alpha = jnp.where(holds, jnp.clip(state.alpha, alpha, alpha_max), alpha)
        if secant:
            reach = probe * (1 + norm(params, dtype))
            blind = (state.count == 0) & (length > 0)
            shortened = jnp.minimum(1, reach / jnp.where(length > 0, length, 1))
            alpha = jnp.where(blind, jnp.minimum(alpha, shortened), alpha)
        coarse = _has_low_precision(raw)
        smallest = _rounding(params, dtype) if quantum is None else jnp.asarray(quantum, dtype)
        floor = jnp.where(length > 0, smallest / jnp.where(length > 0, length, 1), 0)
        short = floor > alpha
        alpha = jnp.maximum(alpha, jnp.minimum(floor, alpha_max))
        if coarse:
            alpha = _power_of_two(alpha)

        # norms of what is not finite, or would overflow, are not finite either
        usable = jnp.isfinite(length) & jnp.isfinite(measured) & jnp.isfinite(size)
        if extra_args.get("value") is not None:
            usable &= jnp.all(jnp.isfinite(extra_args["value"]))
        next_state = ThrottleState(
            count=optax.safe_increment(state.count),
            alpha=alpha,
            velocity=velocity,
            gradient_lipschitz=lipschitz,
            gradient_lipschitz_ema=average,
            quiet_norm=jnp.where(size < quiet, quiet + ema * (size - quiet), quiet),
            infeasible=jnp.where(short, optax.safe_increment(state.infeasible), state.infeasible),
            skipped=state.skipped,
            previous_params=params if secant else (),
            previous_grad=grads if secant and not same_batch else (),
            direction=direction,
            base_state=base_state,
        )
        kept = select(usable, cast_like(next_state, state), state)
        skipped = jnp.where(usable, state.skipped, optax.safe_increment(state.skipped))
        scaled = select(usable, _scale(raw, alpha), jax.tree.map(jnp.zeros_like, raw))
        return scaled, kept._replace(skipped=skipped)

    return optax.GradientTransformationExtraArgs(init, update)


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
    total = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(params):
        if leaf.dtype.itemsize < 4:
            total += dot(leaf, leaf, dtype) * (float(jnp.finfo(leaf.dtype).eps) / 2) ** 2
    return jnp.sqrt(total)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two that is at most x; exact, which exp2 is not."""
    return jnp.ldexp(jnp.ones_like(x), jnp.frexp(x)[1] - 1)


def _start_direction(params: Any) -> Any:
    """A unit vector with every coordinate different, so that no symmetry hides an eigenvector."""
    leaves, structure = jax.tree.flatten(params)
    size = max(1, sum(leaf.size for leaf in leaves))
    rng = np.random.default_rng(0)
    start = [
        jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(size), leaf.dtype) for leaf in leaves
    ]
    return jax.tree.unflatten(structure, start)
