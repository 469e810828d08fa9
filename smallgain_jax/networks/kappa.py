r"""A budget for the gain of a network: matrices whose spectral norms multiply to at most l_max.

For a chain of layers with 1-Lipschitz activations,
$\|f(x) - f(y)\| \le \prod_l \|W_l\|_2 \|x - y\|$. The product is kept below l_max by a rail behind
the optimizer. Log-gains are the budget, $\sum_l \log \kappa_l \le \log l_{\max}$, and `allocate`
decides which layer gives way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, check_fraction, check_positive
from smallgain_jax._tree import HIGHEST, dot, stat_dtype
from smallgain_jax.allocation.knapsack import POLICIES, allocate
from smallgain_jax.networks.layers import Layer, Rule, find_layers
from smallgain_jax.spectral.norms import (
    CERTAINTY,
    coarse_bound,
    gram_power,
    inflation,
    spectral_bound,
    start_vector,
)

STATIC = ("layers", "policy", "projection", "every")
"""Arguments of `kappa_budget` that shape the program: `static_args` of `inject_hyperparams`."""

PROJECTIONS = ("scale", "clip", "soft")
DIRECTIONS = 4
"""Singular directions that a clip cuts per update; scaling takes the rest."""
CLIP_POWER_STEPS = 6
SHARPNESS = 8
"""Power of the soft cap: a layer at half its kappa is scaled by 1 - 5e-4."""
TINY = 1e-30
"""Stands for the norm of a zero matrix where a logarithm is taken."""


class KappaInfo(NamedTuple):
    """What a reader of one update wants to know. n layers, in the chain's order."""

    kappas: jax.Array  # [n] caps of the operator norms; their product is l_max
    bounds: jax.Array  # [n] certified upper bounds of the norms after the update
    norms: jax.Array  # [n] estimates from below at the last certification
    pressure: jax.Array  # [n] averaged share of each layer's wish to grow, mean 1
    acted: jax.Array  # [n] bool, layers that were projected
    cosine: jax.Array  # [] between the raw and the projected update, all leaves


class KappaState(NamedTuple):
    """State of `kappa_budget`. n layers."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates that were not skipped
    skipped: jax.Array  # [] int32, non-finite updates
    age: jax.Array  # [] int32, updates since the last certification
    samples: tuple[jax.Array, ...]  # n arrays of entries of the matrices left behind
    vectors: tuple[jax.Array, ...]  # n blocks of unit vectors, warm starts of power iterations
    info: KappaInfo


_Projected = tuple[list[jax.Array], jax.Array, tuple[jax.Array, ...], jax.Array]
"""Updates, bounds, vectors, and the cosine with the raw update."""


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
      layers: rule (path, leaf) -> `Layer` or None; None takes `matrix_layers`. One chain: heads in
        parallel do not multiply, so leave them out or stack them.
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
      Its state is a `KappaState`. A non-finite update gives a zero update, counted in `skipped`.

    Raises:
      ValueError: an unknown name, a number outside its range, or `update` without params.

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
    if policy not in (*POLICIES, "uniform"):
        names = ", ".join((*POLICIES, "uniform"))
        raise ValueError(f"policy = {policy!r} is unknown: choose from {names}")
    if projection not in PROJECTIONS:
        names = ", ".join(PROJECTIONS)
        raise ValueError(f"projection = {projection!r} is unknown: choose from {names}")
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1")
    check_positive("l_max", l_max)
    check_positive("floor", floor)
    check_fraction("floor", floor)
    check_fraction("ceiling", ceiling, low=1.0, high=np.inf)
    check_fraction("ema", ema)
    directions = DIRECTIONS if projection == "clip" else 1

    def init(params: Any) -> KappaState:
        leaves, found = jax.tree.leaves(params), find_layers(params, layers)
        dtype = stat_dtype(params)
        n = len(found)

        def filled(fill: float) -> jax.Array:
            return jnp.full(n, fill, dtype)

        return KappaState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            age=jnp.full((), every, jnp.int32),
            samples=tuple(jnp.zeros_like(jax.eval_shape(_sample, leaves[k])) for k, _ in found),
            vectors=tuple(_first_vectors(leaves[k], layer, directions) for k, layer in found),
            info=KappaInfo(
                kappas=jnp.broadcast_to(jnp.asarray(l_max, dtype) ** (1 / max(n, 1)), (n,)).copy(),
                bounds=filled(0.0),
                norms=filled(0.0),
                pressure=filled(1.0),
                acted=jnp.zeros(n, bool),
                cosine=jnp.ones((), dtype),
            ),
        )

    def update(
        updates: Any, state: KappaState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KappaState]:
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        chain = _Chain(find_layers(params, layers))
        if not chain.found:
            return updates, state._replace(count=optax.safe_increment(state.count))
        dtype = state.info.bounds.dtype
        raw_leaves, structure = jax.tree.leaves(updates), jax.tree.structure(updates)
        old_leaves = jax.tree.leaves(params)
        length = jnp.sqrt(dot(raw_leaves, raw_leaves, dtype))
        usable = jnp.isfinite(length)
        # a poisoned update stands for none until the end, so that nothing below sees a NaN
        safe = [jnp.where(usable, u, 0) for u in raw_leaves]
        stored = {k: _stored(old_leaves[k], safe[k]) for k, _ in chain.found}
        before = chain.matrices(old_leaves)
        after = [layer.matrix(stored[k]) for k, layer in chain.found]
        held = jax.lax.stop_gradient((before, after))
        bounds, norms, vectors, certified = _bounds(
            state, chain, jax.lax.stop_gradient(old_leaves), *held, l_max, every
        )

        grads = jax.tree.leaves(extra_args["grad"]) if "grad" in extra_args else None
        wish = [
            _wish(old_leaves[k], safe[k] if grads is None else -grads[k], dtype)
            for k, _ in chain.found
        ]
        pressure = _average(state.info.pressure, jnp.maximum(jnp.stack(wish), 0), ema)
        gains = chain.gains(dtype)
        kappas, over = _share(bounds * gains, pressure, l_max, floor, ceiling, policy)
        caps = kappas / gains
        soft = projection == "soft"

        def project() -> _Projected:
            out, new_bounds, blocks = list(safe), [], []
            for index, (k, layer) in enumerate(chain.found):
                out[k], bound, block = _project(
                    projection,
                    layer,
                    old_leaves[k],
                    safe[k],
                    after[index],
                    vectors[index],
                    bounds[index],
                    caps[index],
                    jnp.ones((), bool) if soft else over[index],
                )
                new_bounds.append(bound)
                blocks.append(block)
            norms_of = length * jnp.sqrt(dot(out, out, dtype))
            cosine = dot(safe, out, dtype) / jnp.where(norms_of > 0, norms_of, 1)
            cosine = jnp.where(norms_of > 0, cosine, 1)
            return out, jnp.stack(new_bounds).astype(dtype), tuple(blocks), cosine

        def leave() -> _Projected:
            return list(safe), bounds, vectors, jnp.ones((), dtype)

        # a loose rail costs what watching it costs
        projected = project() if soft else jax.lax.cond(jnp.any(over), project, leave)
        out, new_bounds, blocks, cosine = projected
        out = [jnp.where(usable, u, 0) for u in out]
        left = jax.lax.stop_gradient([_stored(old_leaves[k], out[k]) for k, _ in chain.found])
        info = KappaInfo(
            kappas=kappas,
            bounds=new_bounds * gains,
            norms=norms * gains,
            pressure=pressure,
            acted=jnp.ones_like(over) if soft else over,
            cosine=cosine,
        )
        new_state = KappaState(
            count=optax.safe_increment(state.count),
            skipped=state.skipped,
            age=jnp.where(certified, 1, optax.safe_increment(state.age)),
            samples=tuple(_sample(leaf) for leaf in left),
            vectors=blocks,
            info=info,
        )
        kept = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old), cast_like(new_state, state), state
        )
        skipped = jnp.where(usable, state.skipped, optax.safe_increment(state.skipped))
        return jax.tree.unflatten(structure, out), kept._replace(skipped=skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def _first_vectors(leaf: Any, layer: Layer, count: int) -> jax.Array:
    rows = int(np.prod([leaf.shape[axis] for axis in layer.outputs]))
    columns = int(np.prod(leaf.shape)) // max(rows, 1)
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    return jnp.stack([start_vector(min(rows, columns), dtype, seed) for seed in range(count)])


def _stored(params: jax.Array, update: jax.Array) -> jax.Array:
    """What `optax.apply_updates` leaves."""
    return (params + update).astype(params.dtype)


def _frobenius(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(matrix**2))


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
    added = [_frobenius(new - old) * inflation(new) for new, old in zip(after, before, strict=True)]
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
    return jnp.log(jnp.maximum(x, TINY))


def _wish(params: jax.Array, growth: jax.Array, dtype: Any) -> jax.Array:
    return jnp.sum(params.astype(dtype) * growth.astype(dtype))


def _average(old: jax.Array, wish: jax.Array, ema: ArrayLike) -> jax.Array:
    """Moving average of the wishes' shares, in units of their mean."""
    wish = jax.lax.stop_gradient(wish)
    mean = jnp.mean(wish)
    good = jnp.isfinite(mean) & (mean > 0)
    shares = jnp.where(good, wish / jnp.where(good, mean, 1), 1)
    return jnp.where(good, old + ema * (shares - old), old)


def _share(
    gains: jax.Array,
    pressure: jax.Array,
    l_max: ArrayLike,
    floor: ArrayLike,
    ceiling: ArrayLike,
    policy: str,
) -> tuple[jax.Array, jax.Array]:
    """Kappas whose product is l_max, and which layers of gain `gains` are above theirs."""
    n, dtype = gains.shape[0], gains.dtype
    budget = jnp.log(jnp.asarray(l_max, dtype)) - SLACK * n
    wanted, share = _log(gains), budget / n
    if policy == "uniform":
        kappas = jnp.full_like(gains, jnp.exp(share))
        return kappas, gains > kappas
    top = jnp.minimum(wanted, share + jnp.log(jnp.asarray(ceiling, dtype)))
    bottom = jnp.minimum(top, share + jnp.log(jnp.asarray(floor, dtype)))
    fits = jnp.sum(top) <= budget

    def spent() -> jax.Array:
        granted = allocate(
            value=jnp.maximum(pressure, PRIOR),
            cost=jnp.ones((n, 1), dtype),
            rows=jnp.zeros((n, 1), jnp.int32),
            lower=jnp.zeros_like(top),
            upper=top - bottom,
            row_budget=(budget - jnp.sum(bottom))[None],
            policy=policy,
        )
        return jnp.minimum(bottom + granted.weights, top)

    log_kappas = jax.lax.cond(fits, lambda: top, spent)
    over = wanted > log_kappas + SLACK / 2
    # what nobody asked for is shared out, so that the product of the kappas is the budget
    spare = jnp.maximum(budget - jnp.sum(log_kappas), 0) / n
    return jnp.exp(jnp.where(over, log_kappas, log_kappas + spare)), over


PRIOR = 1e-3
"""Pressure, in units of the mean, that a layer always has."""


def _project(
    projection: str,
    layer: Layer,
    params: jax.Array,
    update: jax.Array,
    raw: jax.Array,
    vectors: jax.Array,
    bound: jax.Array,
    cap: jax.Array,
    act: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The update that leaves a matrix within its cap as stored; its bound and vectors."""
    ratio = bound / cap
    matrix, reached = raw, bound
    if projection == "clip":
        matrix, reached, vectors = jax.lax.cond(act, _clipped, _unclipped, raw, bound, cap, vectors)
    if projection == "soft":
        # the value is the certified bound's, the derivative that of the norm
        norm = _smooth_norm(raw, vectors[0])
        ratio = ratio * norm / jnp.where(norm > 0, jax.lax.stop_gradient(norm), 1)
        wanted = (1 + ratio**SHARPNESS) ** (-1 / SHARPNESS)
    else:
        # less the rounding of the leaf's dtype, as it is on average
        rounding = float(jnp.finfo(params.dtype).eps) / 4 * _frobenius(raw)
        wanted = jnp.minimum(cap / jnp.maximum(reached + rounding, TINY), 1)
    held, old = jax.lax.stop_gradient((matrix, params))

    def stored_bound(factor: jax.Array) -> jax.Array:
        """Bound of the matrix as stored: rounding is measured, not assumed."""
        stored = _stored(old, _move(layer, factor, held, old, update.dtype))
        return factor * reached + coarse_bound(layer.matrix(stored) - factor * held)

    def too_long(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return act & (carry[0] > 0) & (carry[1] > cap)

    def shorten(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        factor, size, tries = carry
        factor = factor * jnp.where(tries < 4, (1 - 1e-6) * cap / size, 0.5)
        # the zero matrix fits every cap
        factor = jnp.where(tries < 30, factor, 0)
        return factor, stored_bound(factor), tries + 1

    first = jax.lax.stop_gradient(wanted).astype(raw.dtype)
    start = (first, stored_bound(first), jnp.zeros((), jnp.int32))
    factor, size, _ = jax.lax.while_loop(too_long, shorten, start)
    if projection == "soft":
        factor = factor * wanted / jnp.where(first > 0, first, 1)
    moved = _move(layer, factor, matrix, params, update.dtype)
    return jnp.where(act, moved, update), jnp.where(act, size, bound), vectors


def _move(
    layer: Layer, factor: jax.Array, matrix: jax.Array, params: jax.Array, dtype: Any
) -> jax.Array:
    """The update that turns `params` into `factor * matrix`, before rounding."""
    target = layer.leaf(factor * matrix, params)
    return (target - params.astype(target.dtype)).astype(dtype)


_Clip = tuple[jax.Array, jax.Array, jax.Array]  # matrix, its bound, singular vectors


def _unclipped(matrix: jax.Array, bound: jax.Array, cap: jax.Array, vectors: jax.Array) -> _Clip:
    del cap
    return matrix, bound, vectors


def _clipped(matrix: jax.Array, bound: jax.Array, cap: jax.Array, vectors: jax.Array) -> _Clip:
    r"""The matrix with singular values above `cap` cut to it, its bound, the directions cut.

    One direction after the other: $(I - (1 - \kappa/\sigma) v v^\top) A$ sets the value $\sigma$ of
    the singular vector v to kappa, and increases no singular value whatever v is. What is left
    above the cap, by more directions or by vectors that have not converged, the scaling takes.
    """
    del bound
    tall = matrix.shape[0] > matrix.shape[1]
    small = matrix.T if tall else matrix
    held = jax.lax.stop_gradient(small)
    # so that the certificate, which is 0.5 % above the norm, finds it within the cap
    target = cap * (1 - 1e-2 * CERTAINTY) / (1 + CERTAINTY / 2)
    gram = jnp.matmul(held, held.T, precision=HIGHEST)
    keep = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def cut(carry: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[Any, jax.Array]:
        gram, keep = carry
        vector = gram_power(gram, start, CLIP_POWER_STEPS)
        image = jnp.matmul(gram, vector, precision=HIGHEST)
        square = jnp.vdot(vector, image, precision=HIGHEST)
        value = jnp.sqrt(jnp.maximum(square, TINY))
        excess = jnp.maximum(1 - target / value, 0)
        # both sides of the Gram matrix, expanded: no product of matrices
        outer = jnp.outer(vector, image)
        gram = gram - excess * (outer + outer.T) + excess**2 * square * jnp.outer(vector, vector)
        along = jnp.matmul(vector, keep, precision=HIGHEST)
        return (gram, keep - excess * jnp.outer(vector, along)), vector

    (_, keep), vectors = jax.lax.scan(cut, (gram, keep), vectors)
    kept = jnp.matmul(keep, small, precision=HIGHEST)
    reached = spectral_bound(kept, vectors[0]).upper
    return kept.T if tall else kept, reached, vectors


def _smooth_norm(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Spectral norm along a singular vector that counts as constant, as its derivative is."""
    tall = matrix.shape[0] > matrix.shape[1]
    image = jnp.matmul(matrix, vector) if tall else jnp.matmul(vector, matrix)
    return jnp.sqrt(jnp.maximum(jnp.sum(image**2), TINY))
