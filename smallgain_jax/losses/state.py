"""What `small_gain` on losses is told, remembers, and reports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from smallgain_jax._show import shows
from smallgain_jax._tree import zero_count
from smallgain_jax.losses.losses import UNROLLED
from smallgain_jax.losses.watch import WatchState, first_watch
from smallgain_jax.spectral.power import Blocks, label_blocks, random_vector

Limit = float | jax.Array | Callable[[jax.Array], Any] | None
Priorities = Sequence[float] | Mapping[str, float] | Callable[[Any], Any] | None
"""A schedule of them answers with one of the first two."""


class Settings(NamedTuple):
    """Static and numeric settings; `loss_small_gain` documents each."""

    limit: Limit
    metric: Callable[[Any, Any], Any] | None
    target: ArrayLike
    policy: str
    value: str
    every: int
    priorities: Priorities
    budget_fraction: ArrayLike
    max_step_change: ArrayLike
    floor: ArrayLike
    ceiling: ArrayLike
    ema: ArrayLike
    curvature: str
    iterations: int
    blocks: Blocks
    row_gains: bool
    max_gain: ArrayLike
    guard: str | ArrayLike | None
    warmup: int | None
    anneal: Callable[[jax.Array], Any] | None
    rounds: int
    axis_name: str | None
    first_priorities: Sequence[float] | None = None  # those of update 0, of a schedule

    def mean(self, tree: Any) -> Any:
        """`tree` averaged over the replicas, where there are any."""
        return tree if self.axis_name is None else jax.lax.pmean(tree, self.axis_name)

    @property
    def reweights(self) -> bool:
        """Whether weights may leave 1."""
        return self.policy != "reference"

    @property
    def unitless(self) -> bool:
        """Whether a constant factor of a loss must not change a run."""
        return self.policy == "fair"

    def ordered(self, names: Sequence[str], count: Any = 0) -> "Settings":
        """With priorities of this update in the order of the losses, where there are any."""
        given = self.priorities
        if given is None:
            return self
        if not callable(given):
            return self._replace(priorities=_in_order(given, names))
        first, now = _in_order(given(0), names), _in_order(given(count), names)
        return self._replace(priorities=now, first_priorities=first)

    def parts(self, num_terms: int, dtype: Any, first: bool = False) -> jax.Array:
        """What part [K] of the total cost each loss is to have, or had by its first weight."""
        given: Any = self.priorities
        if first and self.first_priorities is not None:
            given = self.first_priorities
        found = jnp.asarray((1.0,) * num_terms if given is None else tuple(given), dtype)
        return found / jnp.sum(found)


def _in_order(given: Any, names: Sequence[str]) -> tuple[Any, ...]:
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(
                f"priorities names {', '.join(map(repr, unknown))}: the losses are "
                f"{', '.join(map(repr, names))}"
            )
        return tuple(given.get(name, 1.0) for name in names)
    if len(given) != len(names):
        raise ValueError(f"priorities has {len(given)} entries for {len(names)} losses")
    return tuple(given)


class Vectors(NamedTuple):
    """Where power iteration goes on, in the base optimizer's metric. K losses."""

    total: Any  # shaped like the parameters, for the weighted sum
    by_block: Any  # likewise, each block of unit norm; None for one block
    each: Any  # [K, ...] for each loss; None where they start from `total`


@jax.tree_util.register_static
class Names(tuple[str, ...]):
    """Names of losses: part of a state's structure, no leaf of it."""

    __slots__ = ()

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:
        return (tuple(self),)


@shows(
    words={
        "sharpness": lambda found: f"{found:.4g}" if found > 0 else "not measured yet",
        "limit": lambda found: "none known" if found == highest(found.dtype) else f"{found:.4g}",
    },
    bars="share",
    labels="names",
    labelled=("losses", "share", "response"),
)
class TrainingInfo(NamedTuple):
    """What a reader of one update wants to know. K losses, R rows (blocks of parameters).

    Curvatures are in the base optimizer's metric, in loss per squared unit of that metric. All are
    finite: what is not known has the value that its line names.
    """

    losses: jax.Array  # [K] as last evaluated; 0 before
    cost: jax.Array  # [K, R] curvature of each loss in each row at unit weight, from below
    share: jax.Array  # [K] of each loss in the total cost under the weights
    response: jax.Array  # [K] by how much a loss's share follows its weight, in [0, 1]
    sharpness: jax.Array  # [] curvature of the weighted sum, from below
    limit: jax.Array  # [] what the base optimizer is stable up to; the largest float for no limit
    sharpness_ratio: jax.Array  # [] sharpness over limit
    row_sharpness: jax.Array  # [R] of its diagonal blocks
    margin_rows: jax.Array  # [R] T - row_sharpness; the largest float for no limit
    guard: jax.Array  # [] factor on the base optimizer's update
    gains: jax.Array  # [R] factors on its rows
    fit: jax.Array  # [] cosine between the updates handed in and the gradient of the plain sum
    rewinds: jax.Array  # [] int32, how often parameters went back to where the loss was lower
    balance_residual: jax.Array  # [] B as last measured; -1 without per-term gradients
    interaction_ratio: jax.Array  # [] I likewise
    accepted: jax.Array  # [] bool; False for an update skipped as not finite, or a rewind
    skipped: jax.Array  # [] int32, updates so far in which something was not finite
    names: Names  # of the losses, in the order of every [K]; static


@shows(
    bars="info.share",
    labels="info.names",
    labelled=("weights", "first_weights", "log_weights"),
    first=("count", "weights", "info"),
)
class TrainingState(NamedTuple):
    """State of `small_gain` around the losses of a model. K losses."""

    count: jax.Array  # type: ignore[assignment]  # [] int32, updates that were not skipped
    weights: jax.Array  # [K] in force at this update; 1 is the reference objective
    first_weights: jax.Array  # [K] by which losses have no units; 0 until a loss is seen; else 1
    log_weights: jax.Array  # [K] log of the weight as decided over the first, before `anneal`
    scores: jax.Array  # [K] moving averages of value over cost
    turn: jax.Array  # [] int32, the loss to be priced next; K for the sum
    wait: jax.Array  # [] int32, updates until the next look
    looks: jax.Array  # [] int32, looks so far
    misses: jax.Array  # [] int32, measurements in a row that found nothing at this turn
    reported: jax.Array  # [] bool, whether foreign updates have been reported
    foreign: jax.Array  # [] int32, updates for which what comes in still counts as foreign
    felt: Any  # [K, K] how much share k falls as weight j rises; None without `vectors.each`
    vectors: Vectors
    watch: WatchState
    base_state: Any
    info: TrainingInfo


def highest(dtype: Any) -> float:
    """Stands for "no limit": nothing infinite rests in a state."""
    return float(jnp.finfo(dtype).max)


def initial_state(
    base: optax.GradientTransformation,
    params: Any,
    names: Sequence[str],
    settings: Settings,
    dtype: Any,
) -> TrainingState:
    """The state before the first update, every field in a buffer of its own."""
    num_terms = len(names)
    rows = len(label_blocks(params, settings.blocks)[1])

    def full(fill: float, *shape: int) -> jax.Array:
        return jnp.full(shape, fill, dtype)

    info = TrainingInfo(
        losses=full(0, num_terms),
        cost=full(0, num_terms, rows),
        share=full(1 / max(num_terms, 1), num_terms),
        response=full(1, num_terms),
        sharpness=full(0),
        limit=full(highest(dtype)),
        sharpness_ratio=full(0),
        row_sharpness=full(0, rows),
        margin_rows=full(highest(dtype), rows),
        guard=full(1),
        gains=full(1, rows),
        fit=full(1),
        rewinds=zero_count(),
        balance_residual=full(-1),
        interaction_ratio=full(-1),
        accepted=jnp.ones((), bool),
        skipped=zero_count(),
        names=Names(names),
    )
    each = None
    if settings.reweights and num_terms <= UNROLLED:
        starts = [random_vector(2 + k, params) for k in range(num_terms)]
        each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    vectors = Vectors(
        random_vector(0, params), random_vector(1, params) if rows > 1 else None, each
    )
    base_state = base.init(params)
    return TrainingState(
        count=zero_count(),
        weights=full(1, num_terms),
        first_weights=full(0 if settings.unitless else 1, num_terms),
        log_weights=full(0, num_terms),
        scores=full(0, num_terms),
        turn=zero_count(),
        wait=zero_count(),
        looks=zero_count(),
        misses=zero_count(),
        reported=jnp.zeros((), bool),
        foreign=zero_count(),
        felt=None if each is None else full(0, num_terms, num_terms),
        vectors=vectors,
        watch=first_watch(params, base_state, dtype, settings.guard is not None),
        base_state=base_state,
        info=info,
    )
