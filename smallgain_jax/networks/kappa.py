r"""A budget for the gain of a network: matrices whose spectral norms multiply to at most l_max.

For a chain of layers with 1-Lipschitz activations,
$\|f(x) - f(y)\| \le \prod_l \|W_l\|_2 \|x - y\|$. The product is kept below l_max by a rail behind
the optimizer. Log-gains are the budget, $\sum_l \log \kappa_l \le \log l_{\max}$, and `allocate`
decides which layer gives way.
"""

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
    check_positive,
    is_concrete,
)
from smallgain_jax._compiling import at_once
from smallgain_jax._show import shows
from smallgain_jax._tree import dot, norm, placed_like, select, stat_dtype
from smallgain_jax.allocation.knapsack import POLICIES, allocate
from smallgain_jax.networks.layers import Layer, Rule, find_layers, whole
from smallgain_jax.networks.projections import (
    DIRECTIONS,
    PROJECTIONS,
    frobenius,
    project,
    stored,
    tiny,
)
from smallgain_jax.spectral.norms import in_unit, inflation, spectral_bound, start_vector

STATIC = ("layers", "policy", "projection", "every")
"""Arguments of `kappa_budget` that shape the program: `static_args` of `inject_hyperparams`."""


@shows()
class KappaInfo(NamedTuple):
    """What a reader of one update wants to know. n layers, in the chain's order."""

    kappas: jax.Array  # [n] caps of the operator norms; their product is l_max
    bounds: jax.Array  # [n] certified upper bounds of the norms after the update
    norms: jax.Array  # [n] estimates from below at the last certification
    pressure: jax.Array  # [n] averaged share of each layer's wish to grow, mean 1
    acted: jax.Array  # [n] bool, layers that were projected
    cosine: jax.Array  # [] between the raw and the projected update, all leaves


@shows()
class KappaState(NamedTuple):
    """State of `kappa_budget`. n layers."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates that were not skipped
    skipped: jax.Array  # [] int32, non-finite updates
    age: jax.Array  # [] int32, updates since the last certification
    samples: tuple[jax.Array, ...]  # n arrays of entries of the matrices left behind
    vectors: tuple[jax.Array, ...]  # n blocks of unit vectors, warm starts of power iterations
    info: KappaInfo


class _Chain(NamedTuple):
    """The layers of one tree, and one vector operation over all of them."""

    found: list[tuple[int, Layer]]

    def matrices(self, leaves: list[Any]) -> list[jax.Array]:
        return [layer.matrix(leaves[k]) for k, layer in self.found]

    def gains(self, dtype: Any) -> jax.Array:
        return jnp.asarray([layer.gain for _, layer in self.found], dtype)


def kappa_budget(
    l_max: ArrayLike,
    *,
    layers: Rule | None = None,
    policy: str = "fair",
    projection: str = "clip",
    floor: ArrayLike = 0.25,
    ceiling: ArrayLike = np.inf,
    ema: ArrayLike = 0.1,
    every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Change updates so that the layers' norms multiply to at most l_max, whatever the optimizer.

    The last link of a chain: it returns u' with params + u' projected, as stored in the leaf's
    dtype. With $b_l \ge \|W_l\|_2$ the certified bounds after the raw update and $z_l = \log b_l$:

    1. while $\sum_l z_l \le \log l_{\max}$ (and no layer is above the ceiling) the update passes
       bit for bit;
    2. otherwise log-gains are allocated anew, between the floor and $z_l$, within the budget
       $\log l_{\max}$, to the layers whose growth the loss presses for: the value of a unit of
       log-gain is the average of $\langle -\nabla_l F, W_l\rangle$ (or $\langle u_l, W_l\rangle$);
    3. layers above their $\kappa_l$ are projected: "clip" cuts singular values at $\kappa_l$, up to
       four a step; "scale" multiplies the matrix by $\kappa_l / b_l$; "soft" multiplies every
       matrix by the smooth $(1 + (b_l/\kappa_l)^8)^{-1/8}$, whose derivative the update carries.

    Bounds: `spectral_bound` where the budget binds, at most every so many updates; in between
    $\|W + \Delta\| \le b + \|\Delta\|$ with Frobenius' norm of what was added. Both are certified
    up to the rounding that they are inflated for, so the norms' product after every update is at
    most l_max. That rests on the parameters being those that the last update left: apply nothing to
    updates behind this link. A change from outside is noticed by 4,096 entries of each matrix, and
    certified anew.

    Args:
      l_max: bound of the product, positive.
      layers: rule (path, leaf) -> `Layer` or None; None takes `matrix_layers`: matrices, and
        convolutions whose layout the leaf's name tells. One chain: heads in parallel do not
        multiply, so leave them out or stack them.
      policy: of `allocate` in log space: "fair" (log-gains above the floor in proportion to the
        pressure), "greedy" (to the highest pressure first); or "uniform", l_max^(1/n) each.
      projection: "clip", "scale" or "soft".
      floor, ceiling: bounds of every kappa that the allocation respects, in units of l_max^(1/n);
        floor in (0, 1], ceiling at least 1.
      ema: weight of the newest pressure in its average, in (0, 1].
      every: updates between certifications, static, at least 1. Between them the bounds grow by the
        length of every step, and the rail takes that out of the matrices: with steps that are not
        small against kappa it costs more than it saves.

    Returns:
      An optax transformation whose `update` needs `params`, and takes the extra argument `grad`.
      Its state is a `KappaState`. A non-finite update, or one after which a norm is not known to be
      finite, gives a zero update, counted in `skipped`.

    Raises:
      ValueError: an unknown name, a number outside its range, `update` without params, a leaf
        with more than two axes whose layout is not known, or a layer of complex numbers or
        integers.

    >>> optimizer = optax.chain(optax.sgd(1.0), kappa_budget(2.0))
    >>> params = {"a": jnp.eye(2), "b": jnp.eye(2)}
    >>> update, state = optimizer.update(
    ...     {"a": -jnp.eye(2), "b": jnp.zeros((2, 2))}, optimizer.init(params), params
    ... )
    >>> after = optax.apply_updates(params, update)
    >>> product = jnp.linalg.norm(after["a"], 2) * jnp.linalg.norm(after["b"], 2)
    >>> bool(1.9 < product <= 2.0), round(state[1].info.cosine.item(), 4)
    (True, 1.0)
    """
    settings = _Settings(l_max, policy, projection, floor, ceiling, ema, every)
    _check(settings)
    plain = partial(_stepped, settings, layers)
    # a rule of somebody's is asked at each update
    step = at_once()(plain) if layers is None else plain

    def init(params: Any) -> KappaState:
        return _initial_state(params, _real_layers(params, layers), settings)

    def update(
        updates: Any, state: KappaState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KappaState]:
        check_call(KappaState, updates, state, params)
        return step(updates, state, params, extra_args.get("grad"))

    return optax.GradientTransformationExtraArgs(init, update)


class _Settings(NamedTuple):
    l_max: ArrayLike
    policy: str
    projection: str
    floor: ArrayLike
    ceiling: ArrayLike
    ema: ArrayLike
    every: int


def _stepped(
    settings: _Settings,
    layers: Rule | None,
    updates: Any,
    state: KappaState,
    params: Any,
    grad: Any,
) -> tuple[Any, KappaState]:
    """Updates that keep the budget."""
    chain = _Chain(_real_layers(params, layers))
    if not chain.found:
        return updates, state._replace(count=optax.safe_increment(state.count))
    raw, structure = jax.tree.flatten(updates)
    usable = jnp.isfinite(norm(raw, state.info.bounds.dtype))
    # a poisoned update stands for none until the end, so that nothing below sees a NaN
    safe = [jnp.where(usable, whole(u), 0) for u in raw]
    old = [whole(leaf) for leaf in jax.tree.leaves(params)]
    growth = safe if grad is None else [-whole(g) for g in jax.tree.leaves(grad)]
    seen = _observe(state, chain, old, safe, growth, settings)
    # of parameters that are not finite, or would not be, no norm is known
    usable &= jnp.all(jnp.isfinite(seen.bounds))
    out, bounds, vectors = _projected(seen, chain, old, safe, settings)
    out = [jnp.where(usable, u, 0) for u in out]
    left = jax.lax.stop_gradient([stored(old[k], out[k]) for k, _ in chain.found])
    cosine = _cosine(safe, out, bounds.dtype)
    info = _info(seen, chain, bounds, settings.projection, cosine)
    new_state = KappaState(
        count=optax.safe_increment(state.count),
        skipped=state.skipped,
        age=jnp.where(seen.certified, 1, optax.safe_increment(state.age)),
        samples=tuple(_sample(leaf) for leaf in left),
        vectors=vectors,
        info=info,
    )
    kept = select(usable, cast_like(new_state, state), state)
    skipped = jnp.where(usable, state.skipped, optax.safe_increment(state.skipped))
    placed = [placed_like(u, leaf) for u, leaf in zip(out, raw, strict=True)]
    return jax.tree.unflatten(structure, placed), kept._replace(skipped=skipped)


def _check(settings: _Settings) -> None:
    policies = (*POLICIES, "uniform")
    if settings.policy not in policies:
        raise ValueError(
            f"policy = {settings.policy!r} is unknown: choose from {', '.join(policies)}"
        )
    if settings.projection not in PROJECTIONS:
        raise ValueError(
            f"projection = {settings.projection!r} is unknown: choose from {', '.join(PROJECTIONS)}"
        )
    if settings.every < 1:
        raise ValueError(f"every = {settings.every} must be at least 1")
    check_positive("l_max", settings.l_max)
    check_positive("floor", settings.floor)
    check_fraction("floor", settings.floor)
    check_fraction("ceiling", settings.ceiling, low=1.0, high=np.inf)
    check_fraction("ema", settings.ema)


def _real_layers(params: Any, layers: Rule | None) -> list[tuple[int, Layer]]:
    """The layers with entries, whose matrices have to be floating: others cannot be projected."""
    leaves = jax.tree.leaves(params)
    # a map without inputs or outputs has norm 0, which would leave the others without a bound
    found = [(k, layer) for k, layer in find_layers(params, layers) if 0 not in leaves[k].shape]
    for k, _ in found:
        if not jnp.issubdtype(leaves[k].dtype, jnp.floating):
            raise ValueError(
                f"layers must be floating matrices, got one of dtype {leaves[k].dtype} and shape "
                f"{leaves[k].shape}: leave it out by a rule (path, leaf) -> None"
            )
    return found


def _initial_state(params: Any, found: list[tuple[int, Layer]], settings: _Settings) -> KappaState:
    leaves, dtype, n = jax.tree.leaves(params), stat_dtype(params), len(found)
    directions = DIRECTIONS if settings.projection == "clip" else 1

    def filled(fill: float) -> jax.Array:
        return jnp.full(n, fill, dtype)

    shapes = [jax.ShapeDtypeStruct(leaves[k].shape, leaves[k].dtype) for k, _ in found]
    return KappaState(
        count=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        age=jnp.full((), settings.every, jnp.int32),
        samples=tuple(jnp.zeros_like(jax.eval_shape(_sample, shape)) for shape in shapes),
        vectors=tuple(_first_vectors(leaves[k], layer, directions) for k, layer in found),
        info=KappaInfo(
            kappas=filled(1.0) * jnp.asarray(settings.l_max, dtype) ** (1 / max(n, 1)),
            bounds=filled(0.0),
            norms=filled(0.0),
            pressure=filled(1.0),
            acted=jnp.zeros(n, bool),
            cosine=jnp.ones((), dtype),
        ),
    )


class _Seen(NamedTuple):
    """The layers behind the raw update, and what they may be. n layers."""

    after: list[jax.Array]  # their matrices
    bounds: jax.Array  # [n] of their norms
    norms: jax.Array  # [n]
    vectors: tuple[jax.Array, ...]
    certified: jax.Array  # [] bool
    pressure: jax.Array  # [n]
    caps: jax.Array  # [n]
    over: jax.Array  # [n] bool


def _info(
    seen: _Seen, chain: _Chain, bounds: jax.Array, projection: str, cosine: jax.Array
) -> KappaInfo:
    gains = chain.gains(bounds.dtype)
    return KappaInfo(
        kappas=seen.caps * gains,
        bounds=bounds * gains,
        norms=seen.norms * gains,
        pressure=seen.pressure,
        acted=jnp.ones_like(seen.over) if projection == "soft" else seen.over,
        cosine=cosine,
    )


def _observe(
    state: KappaState,
    chain: _Chain,
    old: list[jax.Array],
    safe: list[jax.Array],
    growth: list[jax.Array],
    settings: _Settings,
) -> _Seen:
    before = chain.matrices(old)
    after = [layer.matrix(stored(old[k], safe[k])) for k, layer in chain.found]
    held = jax.lax.stop_gradient((old, before, after))
    bounds, norms, vectors, certified = _bounds(state, chain, *held, settings.l_max, settings.every)
    wish = _wishes([(old[k], growth[k]) for k, _ in chain.found], bounds.dtype)
    pressure = _average(state.info.pressure, jnp.maximum(wish, 0), settings.ema)
    gains = chain.gains(bounds.dtype)
    kappas, over = _share(bounds * gains, pressure, settings)
    return _Seen(after, bounds, norms, vectors, certified, pressure, kappas / gains, over)


_Projected = tuple[list[jax.Array], jax.Array, tuple[jax.Array, ...]]
"""Updates, bounds and vectors."""


def _projected(
    seen: _Seen,
    chain: _Chain,
    old: list[jax.Array],
    safe: list[jax.Array],
    settings: _Settings,
) -> _Projected:
    soft = settings.projection == "soft"

    def act() -> _Projected:
        out, new_bounds, blocks = list(safe), [], []
        for index, (k, layer) in enumerate(chain.found):
            out[k], bound, block = project(
                settings.projection,
                layer,
                old[k],
                safe[k],
                seen.after[index],
                seen.vectors[index],
                seen.bounds[index],
                seen.caps[index],
                jnp.ones((), bool) if soft else seen.over[index],
            )
            new_bounds.append(bound)
            blocks.append(block)
        return out, jnp.stack(new_bounds).astype(seen.bounds.dtype), tuple(blocks)

    def leave() -> _Projected:
        return list(safe), seen.bounds, seen.vectors

    # a loose rail costs what watching it costs
    projected: _Projected = act() if soft else jax.lax.cond(jnp.any(seen.over), act, leave)
    return projected


def _cosine(a: list[jax.Array], b: list[jax.Array], dtype: Any) -> jax.Array:
    """Cosine of two updates, each in units of its own norm; 1 where one vanishes."""
    norms = norm(a, dtype), norm(b, dtype)
    there = (norms[0] > 0) & (norms[1] > 0)

    def unit(leaves: list[jax.Array], length: jax.Array) -> list[jax.Array]:
        return [leaf.astype(dtype) / jnp.where(length > 0, length, 1) for leaf in leaves]

    return jnp.where(there, dot(unit(a, norms[0]), unit(b, norms[1]), dtype), 1)


def _first_vectors(leaf: Any, layer: Layer, count: int) -> jax.Array:
    rows = int(np.prod([leaf.shape[axis] for axis in layer.outputs]))
    columns = int(np.prod(leaf.shape)) // max(rows, 1)
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    return jnp.stack([start_vector(min(rows, columns), dtype, seed) for seed in range(count)])


SAMPLES = 4096
"""Entries of a matrix, at most, that tell whether somebody else has changed it."""


def _sample(leaf: jax.Array) -> jax.Array:
    """A grid of entries."""
    most = round(SAMPLES ** (1 / leaf.ndim))
    return leaf[tuple(slice(None, None, -(-size // most)) for size in leaf.shape)]


def _differs(leaf: jax.Array, known: jax.Array) -> jax.Array:
    # the same sum may be rounded otherwise where the compiler has fused it with something else
    resolution = 4 * float(jnp.finfo(leaf.dtype).eps) * jnp.max(jnp.abs(known), initial=0.0)
    return ~jnp.all(jnp.abs(_sample(leaf) - known) <= resolution)


def _bounds(
    state: KappaState,
    chain: _Chain,
    leaves: list[jax.Array],
    before: list[jax.Array],
    after: list[jax.Array],
    l_max: ArrayLike,
    every: int,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Bounds, estimates and vectors of the matrices `after`, and whether they were certified."""
    dtype = state.info.bounds.dtype
    gains = chain.gains(dtype)
    changed = [_differs(leaves[k], s) for (k, _), s in zip(chain.found, state.samples, strict=True)]
    foreign = jnp.any(jnp.stack(changed))
    # one pass, where `coarse_bound` takes four and is seldom the sharper on an update
    added = [frobenius(new - old) * inflation(new) for new, old in zip(after, before, strict=True)]
    grown = state.info.bounds / gains + jnp.stack(added).astype(dtype)
    grown *= 1 + 4 * float(jnp.finfo(dtype).eps)
    binding = jnp.sum(_log(grown * gains)) > jnp.log(jnp.asarray(l_max, dtype)) - SLACK * len(after)
    due = foreign | (state.count == 0) | (binding & (state.age >= every))

    def certify() -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        found = [
            spectral_bound(matrix, vectors[0])
            for matrix, vectors in zip(after, state.vectors, strict=True)
        ]
        upper = jnp.stack([bound.upper for bound in found]).astype(dtype)
        lower = jnp.stack([bound.lower for bound in found]).astype(dtype)
        # the triangle inequality may be the sharper of the two, unless it starts from nothing
        known = ~foreign & (state.count > 0)
        upper = jnp.where(known, jnp.minimum(upper, grown), upper)
        fresh = tuple(
            vectors.at[0].set(bound.vector)
            for vectors, bound in zip(state.vectors, found, strict=True)
        )
        return upper, lower, fresh

    def keep() -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        return grown, state.info.norms / gains, state.vectors

    return (*jax.lax.cond(due, certify, keep), due)


SLACK = 2e-6
"""Left of every log-gain: the rounding of logarithms and shares."""


def _log(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(x, tiny(x)))


def _wishes(pairs: list[tuple[jax.Array, jax.Array]], dtype: Any) -> jax.Array:
    """Inner product of each layer with its growth, [n], all in one unit that cannot overflow."""

    def largest(leaves: list[jax.Array]) -> jax.Array:
        tops = [jnp.max(jnp.abs(leaf), initial=0.0).astype(dtype) for leaf in leaves]
        return in_unit(jnp.stack(tops))[1]

    layers, growths = ([pair[side] for pair in pairs] for side in (0, 1))
    a, b = largest(layers), largest(growths)
    return jnp.stack([jnp.sum((x.astype(dtype) / a) * (y.astype(dtype) / b)) for x, y in pairs])


def _average(old: jax.Array, wish: jax.Array, ema: ArrayLike) -> jax.Array:
    """Moving average of the wishes' shares, in units of their mean."""
    wish = jax.lax.stop_gradient(wish)
    mean = jnp.mean(wish)
    good = jnp.isfinite(mean) & (mean > 0)
    shares = jnp.where(good, wish / jnp.where(good, mean, 1), 1)
    return jnp.where(good, old + ema * (shares - old), old)


def _share(
    gains: jax.Array, pressure: jax.Array, settings: _Settings
) -> tuple[jax.Array, jax.Array]:
    """Kappas whose product is l_max, and which layers of gain `gains` are above theirs."""
    n, dtype = gains.shape[0], gains.dtype
    budget = jnp.log(jnp.asarray(settings.l_max, dtype)) - SLACK * n
    wanted, share = _log(gains), budget / n
    if settings.policy == "uniform":
        kappas = jnp.full_like(gains, jnp.exp(share))
        return kappas, gains > kappas
    top, ceiling = wanted, settings.ceiling
    # an infinity written into the program would stop `debug_infs`
    if not (is_concrete(ceiling) and bool(np.isinf(np.asarray(ceiling)))):
        top = jnp.minimum(wanted, share + jnp.log(jnp.asarray(ceiling, dtype)))
    bottom = jnp.minimum(top, share + jnp.log(jnp.asarray(settings.floor, dtype)))
    fits = jnp.sum(top) <= budget

    def spent() -> jax.Array:
        granted = allocate(
            value=jnp.maximum(pressure, PRIOR),
            cost=jnp.ones((n, 1), dtype),
            rows=jnp.zeros((n, 1), jnp.int32),
            lower=jnp.zeros_like(top),
            upper=top - bottom,
            row_budget=(budget - jnp.sum(bottom))[None],
            policy=settings.policy,
        )
        return jnp.minimum(bottom + granted.weights, top)

    log_kappas = jax.lax.cond(fits, lambda: top, spent)
    over = wanted > log_kappas + SLACK / 2
    # what nobody asked for is shared out, so that the product of the kappas is the budget
    spare = jnp.maximum(budget - jnp.sum(log_kappas), 0) / n
    return jnp.exp(jnp.where(over, log_kappas, log_kappas + spare)), over


PRIOR = 1e-3
"""Pressure, in units of the mean, that a layer always has."""
