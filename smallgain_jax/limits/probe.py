r"""Limit and metric of a base optimizer, found by experiment on its own update function.

On a quadratic, instability sets in as an oscillation of period two. So an optimizer is fed the
gradient $g_t = (-1)^t s$ on one scalar parameter until its memory has settled; it then answers with
$u_t = -H(s)\,g_t$. If H does not depend on the scale s the optimizer is linear and stable up to the
curvature $2/H$. If $s H(s)$ does not, and the state holds second moments $\nu = s^2$, it is of the
Adam family: with $P = \sqrt{\hat\nu} + \epsilon$ it is stable up to
$\lambda_{\max}(P^{-1/2} \nabla^2 F P^{-1/2}) = 2/(H P)$, which is $38/\alpha$ at $\beta_1 = 0.9$
(Cohen et al., *Adaptive Gradient Methods at the Edge of Stability*, 2022, section 3).

The scalar copy takes counters and hyperparameters from the real state, so that schedules and
`optax.inject_hyperparams` count as what they are at this very step. What accumulates gradients
(`optax.MultiSteps`) is given each one until it moves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_SCALES = (1e-2, 2e-2, 1e-12)
_COUNTS = (1, 10, 100, 1000, 10_000)
_MOST_CALLS = 10_000


class Metric(NamedTuple):
    """How to read P off the second moments in an optimizer's state."""

    field: str  # "nu", or "nu_max" (AMSGrad)
    decay: float | jax.Array  # beta_2
    epsilon: float
    corrected: bool  # whether the optimizer corrects their bias


class Probe(NamedTuple):
    """A base optimizer as its stability sees it; made by `probe_optimizer`."""

    optimizer: optax.GradientTransformationExtraArgs
    settled: Any  # its state on one scalar parameter, after an even number of answers
    metric: Metric | None  # None for a linear optimizer, whose metric is the identity

    def limit(self, base_state: Any) -> jax.Array:
        """Curvature limit [] in the optimizer's metric at the next update from `base_state`."""
        state = _with_settings_of(self.optimizer, self.settled, base_state)
        response = _answer(self.optimizer, state)
        if self.metric is not None:
            response = response * self.root(state) ** 2
        return 2 / jnp.maximum(response, jnp.finfo(response.dtype).tiny)

    def root(self, base_state: Any) -> Any:
        """P^{1/2}, shaped like the parameters; for an optimizer of the Adam family only."""
        if self.metric is None:
            raise TypeError("a linear optimizer has the identity for its metric")
        metric = self.metric
        moments, count = _second_moments(base_state, metric.field)
        correction = jnp.ones(())
        if metric.corrected and count is not None:
            correction = 1 - jnp.asarray(metric.decay) ** jnp.maximum(count, 1)

        def root(nu: jax.Array) -> jax.Array:
            wide = nu.astype(jnp.promote_types(nu.dtype, jnp.float32))
            return jnp.sqrt(jnp.sqrt(wide / correction.astype(wide.dtype)) + metric.epsilon)

        return jax.tree.map(root, moments)


def probe_optimizer(optimizer: optax.GradientTransformation, steps: int = 2000) -> Probe | None:
    """Learn an optimizer's limit and metric from its answers to an alternating gradient.

    Args:
      optimizer: any optax optimizer; it is run on one scalar parameter.
      steps: long enough for its memory to fade; even.

    Where hyperparameters are traced (`inject_hyperparams` around a whole transformation), the
    experiment becomes part of the program, 200 steps of it, and second moments in the state are
    what tells the Adam family from linear optimizers.

    Returns:
      A `Probe`; or None for an optimizer that has no such limit (sign descent, Adagrad, line
      searches), whose metric this module cannot read (Adabelief), or that several parameters share
      through labels or masks.

    >>> adam = optax.adam(1e-3)
    >>> probe = probe_optimizer(adam)
    >>> state = adam.init(jnp.zeros(3))
    >>> state = jax.tree.map(lambda a: a + 1000, state)  # long after the start
    >>> round(float(probe.limit(state)), -2)
    38000.0
    """
    concrete = _is_concrete(optimizer)
    optimizer = _accumulated(optax.with_extra_args_support(optimizer))
    if not concrete:
        return _traced_probe(optimizer)
    try:
        # concrete even while the caller is being traced: the answer is about `optimizer` alone
        with jax.ensure_compile_time_eval():
            settled, first = _settle(optimizer, steps)
            # one program for a dozen answers
            answer = jax.jit(partial(_answer, optimizer))
            linear, scale_free = _classify(optimizer, answer, settled)
            one = _member(settled, 0)
            if linear and float(answer(one)) > 0:
                return Probe(optimizer, one, None)
            metric = _read_metric(optimizer, answer, settled, first) if scale_free else None
            return None if metric is None else Probe(optimizer, one, metric)
    except (TypeError, ValueError):
        return None


def _accumulated(
    optimizer: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer whose update is a whole accumulation of the same gradient."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        def give(carry: tuple[Any, Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            total, state, calls = carry
            move, state = optimizer.update(updates, state, params, **extra_args)
            return jax.tree.map(jnp.add, total, move), state, calls + 1

        def waits(carry: tuple[Any, Any, jax.Array]) -> jax.Array:
            _, state, calls = carry
            # an update that is skipped is never made
            return (_accumulators(state)[0].mini_step != 0) & (calls < _MOST_CALLS)

        nothing = jax.tree.map(jnp.zeros_like, updates)
        once = give((nothing, _rewound(state), jnp.zeros((), jnp.int32)))
        return (jax.lax.while_loop(waits, give, once) if _accumulators(state) else once)[:2]

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _accumulates(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState)


def _accumulators(state: Any) -> list[Any]:
    nodes = jax.tree.leaves(state, is_leaf=_accumulates)
    return [node for node in nodes if _accumulates(node)]


def _rewound(state: Any) -> Any:
    """The state with no gradient waiting: counters may come from the middle of an accumulation."""

    def rewound(node: Any) -> Any:
        if not _accumulates(node):
            return node
        return node._replace(mini_step=jnp.zeros_like(node.mini_step))

    return jax.tree.map(rewound, state, is_leaf=_accumulates)


def _is_concrete(optimizer: optax.GradientTransformation) -> bool:
    """Whether its answers are numbers now; not so where `inject_hyperparams` traces its rate."""
    try:
        with jax.ensure_compile_time_eval():
            zero = jnp.zeros(())
            answer = optimizer.update(zero, optimizer.init(zero), zero)
            return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(answer))
    except (TypeError, ValueError):
        return True


def _traced_probe(optimizer: optax.GradientTransformationExtraArgs) -> Probe | None:
    """A probe that is part of the program: the kind of optimizer is told by its state."""
    settled, first = _settle(optimizer, 200)
    one, fresh = _member(settled, 0), _member(first, 0)
    for field in ("nu_max", "nu"):
        if optax.tree.get_all_with_path(one, field):
            _, count = _second_moments(one, field)
            (_, moment), *_ = optax.tree.get_all_with_path(fresh, "nu")
            decay = 1 - moment / _SCALES[0] ** 2
            return Probe(optimizer, one, Metric(field, decay, 1e-8, count is not None))
    return Probe(optimizer, one, None)


def _settle(optimizer: optax.GradientTransformation, steps: int) -> tuple[Any, Any]:
    """States after `steps` alternating gradients, and after one; a leading axis for the scales."""

    def run(scale: jax.Array) -> tuple[Any, Any]:
        def step(state: Any, sign: jax.Array) -> tuple[Any, None]:
            return optimizer.update(scale * sign, state, jnp.zeros_like(scale))[1], None

        start = optimizer.init(jnp.zeros_like(scale))
        first, _ = step(start, jnp.ones_like(scale))
        signs = jnp.asarray(np.tile([1.0, -1.0], steps // 2), scale.dtype)
        return jax.lax.scan(step, start, signs)[0], first

    settled, first = jax.vmap(run)(jnp.asarray(_SCALES, float))
    return settled, first


def _member(state: Any, k: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[k], state)


def _answer(
    optimizer: optax.GradientTransformation, state: Any, scale: jax.typing.ArrayLike = _SCALES[0]
) -> jax.Array:
    """H: minus the update over the gradient, at the next gradient +scale."""
    gradient = jnp.asarray(scale, float)
    move, _ = optimizer.update(gradient, state, jnp.zeros_like(gradient))
    return -move / gradient


def _at_count(optimizer: Any, state: Any, count: int) -> Any:
    def counted(leaf: Any) -> Any:
        counts = jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
        return jnp.full_like(leaf, count) if counts else leaf

    return optax.tree.map_params(optimizer, _same, state, transform_non_params=counted)


def _classify(optimizer: Any, answer: Callable[..., jax.Array], settled: Any) -> tuple[bool, bool]:
    """Whether the answer is proportional to the gradient, and whether it ignores its scale."""
    answers = [
        [
            float(answer(_at_count(optimizer, _member(settled, k), count), scale))
            for k, scale in enumerate(_SCALES[:2])
        ]
        for count in _COUNTS
    ]
    # schedules may start or end at zero: judge by the liveliest moment
    one, two = max(answers)
    if not (np.isfinite(one) and one > 0):
        return False, False
    return abs(two / one - 1) < 1e-3, abs(2 * two / one - 1) < 1e-3


def _read_metric(
    optimizer: Any, answer: Callable[..., jax.Array], settled: Any, first: Any
) -> Metric | None:
    base = _member(settled, 0)
    for field in ("nu_max", "nu"):
        found = optax.tree.get_all_with_path(base, field)
        if len(found) != 1:
            continue
        moment = found[0][1]
        if field == "nu" and not np.isclose(float(moment), _SCALES[0] ** 2, rtol=0.2):
            return None
        fresh = optax.tree.get_all_with_path(_member(first, 0), "nu")[0][1]
        decay = 1 - float(fresh) / _SCALES[0] ** 2
        _, count = _second_moments(base, field)
        corrected = count is not None and field == "nu"
        late = [_at_count(optimizer, _member(settled, k), _COUNTS[-1]) for k in (0, 2)]
        large, tiny = (
            float(answer(state, scale))
            for state, scale in zip(late, (_SCALES[0], _SCALES[2]), strict=True)
        )
        epsilon = _SCALES[0] * large / tiny if tiny > 0 else 1e-8
        return Metric(field, decay, epsilon, corrected)
    return None


def _second_moments(state: Any, field: str) -> tuple[Any, Any]:
    """The tree of second moments in a state, and the counter beside it."""
    found = optax.tree.get_all_with_path(state, field)
    if len(found) != 1:
        raise ValueError(
            f"metric: the base optimizer's state has {len(found)} trees named {field!r}; "
            "give limit= and metric= explicitly"
        )
    path, moments = found[0]
    counts = [c for p, c in optax.tree.get_all_with_path(state, "count") if p[:-1] == path[:-1]]
    return moments, (counts[0] if counts else None)


def _with_settings_of(optimizer: Any, settled: Any, base_state: Any) -> Any:
    """`settled` with the counters, rates and hyperparameters of the real state."""
    mine: list[Any] = []
    optax.tree.map_params(optimizer, _same, base_state, transform_non_params=mine.append)
    rest = iter(mine)
    return optax.tree.map_params(
        optimizer, _same, settled, transform_non_params=lambda _: next(rest)
    )


def _same(leaf: Any) -> Any:
    return leaf


class _Shim(NamedTuple):
    known: bool
    adaptive: bool
    why: str
    inner: Any

    def limit(self, base_state: Any) -> jax.Array:
        return self.inner.limit(base_state) if self.known else jnp.asarray(jnp.inf)

    def inverse_root(self, base_state: Any, params: Any) -> Any:
        if not self.adaptive:
            return None
        m = self.inner.metric
        moments, count = _second_moments(base_state, m.field)
        root = self.inner.root(base_state)
        return jax.tree.map(lambda r, nu: jnp.where(r**2 > 2 * m.epsilon, 1 / r, 0), root, moments)


_old_probe = probe_optimizer


def probe_optimizer(optimizer: Any, params: Any) -> Any:
    inner = _old_probe(optimizer)
    return _Shim(inner is not None, inner is not None and inner.metric is not None, "", inner)
