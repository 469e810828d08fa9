r"""The one experiment on an optimizer: is it linear, what does it remember, where is its limit?

Turn the sign of every gradient and an optimizer's answers turn their sign with them. First moments,
traces and buffers turn too (they are *odd*); second moments do not (*even*); whatever gradients do
not reach is a *setting*. To first order about a gradient of zero and odd parts of zero, even parts
do not move: so the linearization there is the optimizer with its second moments frozen, exactly,
and no state has to be known by its name. This is the metric that Cohen et al. (*Adaptive Gradient
Methods at the Edge of Stability*, 2022) hold fixed.

So the copy is run on a few gradients, then on tiny ones about that point with all second moments
at one value. If the answers are proportional to the gradients and each entry's depend on its own
only, the motion of (x, odd state) is one small matrix for each kind of leaf, and its limit a root
(`crossing`). Several counts are tried, for schedules may start or end at zero.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from smallgain_jax._compiling import quick_jit
from smallgain_jax.limits.copies import Copy, NoLimitError, accumulates
from smallgain_jax.limits.crossing import first_unstable

COUNTS = (0, 10, 100, 1000, 10_000)
LATE = 500_000_000
"""Age of moments whose bias is forgotten, as it must be at a fifth of it already."""
SETTLED = 1e4
"""Second moments at which answers are taken: of gradients of 100, far above any eps."""
TINY = 1e-6
_GRADIENTS = (1.0, -0.7, 0.9, 0.6, -1.1, 0.8)
_RATIO = 4.0
_TOLERANCE = 1e-2
_BELOW = (1e-3, 0.03, 0.3, 0.97)
_SLACK = 1e-4
"""Above 1, for eigenvalues of a matrix measured in single precision."""
PROPORTIONAL = "proportional to the gradient"
"""The first thing that is asked of an update."""
_CLOCKS = ("ScheduleFreeState",)
"""States whose counter drives a schedule although memory lies beside it."""


class Slots(NamedTuple):
    """Where the state keeps what belongs to the first entry of a leaf: (leaf, flat index) pairs."""

    odd: list[tuple[int, int]]
    even: list[tuple[int, int]]


class Present(NamedTuple):
    """Each kind of leaf at the settings of a run."""

    limit: Any  # [kinds] in the metric
    unit: Any  # [kinds] P times the answer to a gradient
    fading: list[Any]  # [] of each leaf of the copy's state: factor by update, if even


class Findings(NamedTuple):
    """What the experiment says of each representative leaf."""

    roles: list[str]  # of each leaf of the state: "odd", "even", "age" or "setting"
    template: list[Any]  # the state with odd parts 0, even parts settled, ages late
    slots: list[Slots]
    moves: list[bool]
    powers: list[float]  # of the even parts in the metric; 0 for the identity
    scale: float  # of the gradients at which answers are taken
    limits: np.ndarray  # [counts, kinds] in the metric; inf where nothing moves, NaN if traced
    always: Present | None  # in double precision; None where a state may hold other settings


def experiment(copy: Copy, own_types: frozenset[type]) -> Findings:
    """Run a copy, whose leaves are all of different kinds, and judge its answers.

    Raises:
      NoLimitError: with the reason.
    """
    bench = _Bench(copy)
    memory = _find_memory(bench)
    ages = _ages(copy, memory.responds, own_types)
    roles = [
        "age" if k in ages else "even" if e else "odd" if r else "setting"
        for k, (r, e) in enumerate(zip(memory.responds, memory.even, strict=True))
    ]
    scale = 1.0 if memory.noisy else TINY
    bases = [_rest(state, roles) for state in memory.later]
    moves, powers = _judge(bench, bases, roles, memory.slots, scale)
    limits, always = np.full((len(COUNTS), len(moves)), np.nan), None
    if not copy.traced:
        by_count = _limits(bench, bases, roles, memory.slots, moves, powers, scale)
        limits = np.stack([present.limit for present in by_count])
        if "setting" not in roles:
            always = by_count[0]
    return Findings(roles, bases[0], memory.slots, moves, powers, scale, limits, always)


class _Row(NamedTuple):
    """One run: where it starts and what it is given."""

    state: list[Any]
    params: list[np.ndarray]
    gradients: list[np.ndarray]  # leading axis T
    value: float = 1.0


class _Bench:
    """A copy, ready to be run on many rows by one compiled program."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.size = len(COUNTS) * max(len(_TRIALS), 3 + len(copy.shapes))
        zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in copy.shapes]
        if copy.traced:
            self.copy = copy.with_stand_ins()
        start = core.jaxpr_as_fun(self.copy.init)(*zeros)
        self.start = [leaf if _is_opaque(leaf) else np.asarray(leaf) for leaf in start]
        self._run = quick_jit(jax.vmap(self._one), most=np.inf)

    def _one(self, state: Any, params: Any, gradients: Any, value: Any) -> tuple[Any, Any]:
        step = core.jaxpr_as_fun(self.copy.step)
        n = len(self.copy.shapes)

        def turn(state: list[Any], gradient: list[Any]) -> tuple[list[Any], tuple[Any, Any]]:
            out = step(*state, *params, *gradient, value)
            return out[n:], (out[:n], out[n:])

        return jax.lax.scan(turn, state, gradients)[1]

    def fill(self, value: float, like: Sequence[Any] = ()) -> list[np.ndarray]:
        """Arrays shaped like the parameters; whole numbers stay zero, for nothing moves them."""
        return [
            np.full(
                leaf.shape, value if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, leaf.dtype
            )
            for leaf in self.copy.shapes
        ]

    def sequence(self, scale: Any) -> list[np.ndarray]:
        """The gradients of a run, times a number or an array for each leaf."""
        factors = self.fill(1.0)
        given = scale if isinstance(scale, list) else [scale] * len(factors)
        return [
            np.stack([(g * s * f).astype(f.dtype) for g in _GRADIENTS])
            for f, s in zip(factors, given, strict=True)
        ]

    def run(self, rows: list[_Row]) -> tuple[list[np.ndarray], list[Any]]:
        """Updates [rows, T, ...] and states [rows, T, ...] of every leaf."""
        batch = rows + [rows[-1]] * (-len(rows) % self.size)

        def stacked(leaves: tuple[Any, ...]) -> Any:
            return jnp.stack(leaves) if _is_opaque(leaves[0]) else np.stack(leaves)

        state, params, gradients = (
            [stacked(leaves) for leaves in zip(*(row[part] for row in batch), strict=True)]
            for part in range(3)
        )
        values = np.asarray([row.value for row in batch], jnp.result_type(float))
        with jax.debug_nans(False), jax.debug_infs(False):
            moves, states = self._run(state, params, gradients, values)
        return [np.asarray(u, np.float64)[: len(rows)] for u in moves], [
            s if _is_opaque(s) else np.asarray(s)[: len(rows)] for s in states
        ]


def _is_opaque(leaf: Any) -> bool:
    """Whether NumPy cannot hold it, as random keys."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.extended)


def _is_count(leaf: Any) -> bool:
    return leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)


class _Memory(NamedTuple):
    responds: list[bool]  # of each leaf of the state: gradients reach it
    even: list[bool]  # and it does not turn its sign with them
    slots: list[Slots]
    noisy: bool  # whether it moves without gradients
    later: list[list[Any]]  # the state after two updates without gradients, for each count


@np.errstate(invalid="ignore")
def _find_memory(bench: _Bench) -> _Memory:
    """What gradients leave in the state: run on some, on their opposites, on none, and alone."""
    copy = bench.copy
    n = len(copy.shapes)
    still = bench.fill(0.0)
    alone = []
    for k in range(n):
        first = [np.zeros(leaf.shape) for leaf in copy.shapes]
        first[k].flat[0] = 1.0
        alone.append(bench.sequence(first))
    gradients = [bench.sequence(1.0), bench.sequence(-1.0), bench.sequence(0.0), *alone]
    starts = [
        [np.full_like(leaf, c) if c and _is_count(leaf) else leaf for leaf in bench.start]
        for c in COUNTS
    ]
    moves, states = bench.run([_Row(s, still, g) for s in starts for g in gradients])

    def by_kind(array: Any) -> np.ndarray:
        """[counts, kinds, T, entries]"""
        return np.asarray(array, np.float64).reshape(len(COUNTS), n + 3, len(_GRADIENTS), -1)

    responds, even, reached = [], [], []
    for leaf in states:
        if _is_opaque(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            responds.append(False)
            even.append(False)
            reached.append(np.zeros((n, 1), bool))
            continue
        plus, minus, none = (by_kind(leaf)[:, k] for k in range(3))
        size = np.max(np.abs([plus, minus, none]), initial=0.0)
        moved = np.abs(by_kind(leaf)[:, 3:] - none[:, None]) > 1e-6 * size
        responds.append(bool(np.any(np.abs([plus - none, minus - none]) > 1e-6 * size)))
        even.append(bool(np.any(np.abs((plus + minus) / 2 - none) > 1e-3 * size)))
        reached.append(np.any(moved, axis=(0, 2)))
    slots = [_slots_of(k, responds, even, reached) for k in range(n)]
    idle, busy = (np.max([np.abs(by_kind(u)[:, k]).max(initial=0) for u in moves]) for k in (2, 0))
    row = [(n + 3) * c + 2 for c in range(len(COUNTS))]
    later = [[leaf[r, 1] for leaf in states] for r in row]
    return _Memory(responds, even, slots, bool(idle > 1e-3 * busy), later)


def _slots_of(k: int, responds: list[bool], even: list[bool], reached: list[np.ndarray]) -> Slots:
    found: list[list[tuple[int, int]]] = [[], []]
    for leaf, touched in enumerate(reached):
        for entry in np.flatnonzero(touched[k]) if responds[leaf] else ():
            found[even[leaf]].append((leaf, int(entry)))
    return Slots(*found)


def _ages(copy: Copy, responds: list[bool], own_types: frozenset[type]) -> set[int]:
    """Counters and flags beside moments in one named tuple: they tell how long these averaged.

    Bias corrections go by them, where other counters drive schedules.
    """
    ages: set[int] = set()

    def tells(k: Any) -> bool:
        if not isinstance(k, int):
            return False
        aval = copy.init.out_avals[k]
        return _is_count(aval) or (aval.ndim == 0 and aval.dtype == bool)

    def foreign(node: Any) -> bool:
        named = isinstance(node, tuple) and hasattr(node, "_fields")
        return named and type(node) not in own_types and not isinstance(node, optax.MaskedNode)

    def holds_memory(field: Any) -> bool:
        parts = jax.tree.leaves(field, is_leaf=foreign)
        return not any(map(foreign, parts)) and any(responds[k] for k in parts)

    def visit(node: Any) -> None:
        clock = accumulates(node) or type(node).__name__ in _CLOCKS
        if foreign(node) and not clock and any(map(holds_memory, node)):
            ages.update(k for k in node if isinstance(k, int) and _is_count(copy.init.out_avals[k]))
        for child in jax.tree.leaves(node, is_leaf=lambda other: other is not node):
            if not isinstance(child, int):
                visit(child)

    visit(copy.treedef.unflatten(range(len(responds))))
    return ages


def _rest(state: list[Any], roles: list[str], even: float = SETTLED, age: int = LATE) -> list[Any]:
    """The point about which to linearize: odd parts 0, even parts settled, ages late."""
    fills = {"odd": 0.0, "even": even, "age": age}
    return [
        # a flag beside moments says that they began, as they have by now
        leaf
        if role == "setting" or leaf.dtype == bool
        else np.full(np.shape(leaf), fills[role]).astype(leaf.dtype)
        for leaf, role in zip(state, roles, strict=True)
    ]


_TRIALS = (
    "plain",
    "mixed",
    "none",
    "at +1",
    "at +1, back",
    "at -1",
    "triple",
    "value",
    "age",
    "x4",
    "x?",
)


def _judge(
    bench: _Bench, bases: list[list[Any]], roles: list[str], slots: list[Slots], scale: float
) -> tuple[list[bool], list[float]]:
    """Which representatives move, and with what power of their even parts.

    Raises:
      NoLimitError: if an answer is not what a linear, elementwise transformation would give.
    """
    rng = np.random.default_rng(0)
    copy, still = bench.copy, bench.fill(0.0)
    mixture = [rng.uniform(0.5, 2, leaf.shape) for leaf in copy.shapes]
    plain, back = bench.sequence(scale), bench.sequence(-scale)
    one, minus = bench.fill(1.0), bench.fill(-1.0)
    rows = []
    for base in bases:
        larger = _rest(base, roles, _RATIO * SETTLED)
        uneven = [
            leaf * np.asarray(rng.uniform(1, _RATIO), leaf.dtype) if role == "even" else leaf
            for leaf, role in zip(base, roles, strict=True)
        ]
        rows += [
            _Row(base, still, plain),
            _Row(base, still, bench.sequence([scale * m for m in mixture])),
            _Row(base, still, bench.sequence(0.0)),
            _Row(base, one, plain),
            _Row(base, one, back),
            _Row(base, minus, plain),
            _Row(base, still, bench.sequence(3 * scale)),
            _Row(base, still, plain, value=-1e3),
            _Row(_rest(base, roles, age=LATE // 5), still, plain),
            _Row(larger, still, plain),
            _Row(uneven, still, plain),
        ]
    answers, _ = bench.run(rows)
    shape = (len(bases), len(_TRIALS), len(_GRADIENTS), -1)
    eps = [
        float(jnp.finfo(leaf.dtype).eps) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0.0
        for leaf in copy.shapes
    ]
    found = [
        _judge_leaf(answer.reshape(shape), m.ravel(), s, e)
        for answer, m, s, e in zip(answers, mixture, slots, eps, strict=True)
    ]
    return [moves for moves, _ in found], [power for _, power in found]


def _judge_leaf(
    answer: np.ndarray, mixture: np.ndarray, slots: Slots, eps: float
) -> tuple[bool, float]:
    """Whether a leaf moves, and its power; from its answers [counts, trials, T, entries]."""
    trial = dict(zip(_TRIALS, np.moveaxis(answer, 1, 0), strict=True))
    if not np.all(np.isfinite(answer)):
        raise NoLimitError("its update is not finite for gradients near zero")
    if not np.any(answer):
        return False, 0.0
    offset = trial["none"]
    plain = trial["plain"] - offset
    size = np.max(np.abs(plain), axis=(1, 2), keepdims=True)
    decay = np.max(np.abs(trial["at +1"] - offset), axis=(1, 2), keepdims=True)

    def agree(one: np.ndarray, other: np.ndarray, unit: np.ndarray = size) -> bool:
        return bool(np.all(np.abs(one - other) <= _TOLERANCE * unit))

    rounding = 8 * eps * decay / _TOLERANCE
    there = (trial["at +1"] - trial["at +1, back"]) / 2
    opposite = trial["at +1, back"] - offset + trial["at -1"] - offset
    unlike = {
        "of the gradient alone": agree(trial["value"] - offset, plain),
        "the same at every age": agree(trial["age"] - offset, plain),
        PROPORTIONAL: agree(trial["triple"] - offset, 3 * plain, 3 * size)
        and agree(there, plain, size + rounding)
        and agree(opposite, np.zeros_like(plain), np.maximum(size, decay)),
        "elementwise": agree(trial["mixed"] - offset, mixture * plain, 2 * size),
    }
    for what, holds in unlike.items():
        if not holds:
            raise NoLimitError(f"its update is not {what}")
    liveliest = int(np.argmax(size))
    before, after, uneven = (
        trial[name][liveliest, 0, 0] - offset[liveliest, 0, 0] for name in ("plain", "x4", "x?")
    )
    if not slots.even or abs(uneven - before) <= _TOLERANCE * abs(before):
        return True, 0.0
    power = float(np.log(before / after) / np.log(_RATIO)) if before * after > 0 else 0.0
    if power < 0.1:
        raise NoLimitError("its second moments do not make a metric")
    nearest = round(6 * power) / 6
    return True, nearest if abs(power - nearest) < 0.02 else power


def seeds(slots: list[Slots], state: list[Any], params: list[Any], scale: float) -> list[_Row]:
    """Runs that give the columns of every representative's matrix at once.

    In turn: nothing, a gradient, a displacement, and each odd slot.
    """
    still = [np.zeros(p.shape, p.dtype) for p in params]
    one = [
        np.full(p.shape, scale if jnp.issubdtype(p.dtype, jnp.floating) else 0).astype(p.dtype)
        for p in params
    ]
    rows = [_Row(state, still, still), _Row(state, still, one), _Row(state, one, still)]
    for j in range(max((len(s.odd) for s in slots), default=0)):
        seeded = list(state)
        for s in slots:
            if j < len(s.odd):
                leaf, entry = s.odd[j]
                seeded[leaf] = np.array(seeded[leaf])
                seeded[leaf].flat[entry] = scale
        rows.append(_Row(seeded, still, still))
    return rows


class System(NamedTuple):
    r"""Motion of s = (x, odd state) of one entry: s <- s + M s + b * gradient."""

    drift: Any  # M [n, n]
    drive: Any  # b [n]; minus its first entry is the answer to a gradient
    moment: Any  # [] largest even part in use


def systems(
    moves: list[Any], state: list[Any], slots: list[Slots], scale: float, xp: Any
) -> System:
    """The system of each representative (a leading axis), from the answers to `seeds`.

    Args:
      moves, state: updates and states after one update, with the seeds as a leading axis.
      slots, scale: as in `seeds`.
      xp: `jax.numpy` or `numpy`.
    """
    width = max(len(s.odd) for s in slots)

    def answers(leaf: Any, entry: int, kept: int) -> Any:
        column = xp.reshape(leaf, (leaf.shape[0], -1))[:, entry]
        column = (column[1:] - column[0]) / scale
        # what this leaf has no slot for was not seeded in it
        return xp.where(np.arange(len(column)) < kept, column, 0)

    def one(k: int) -> tuple[Any, Any]:
        odd, kept = slots[k].odd, 2 + len(slots[k].odd)
        rows = [answers(moves[k], 0, kept)]
        rows += [answers(state[leaf], entry, kept) for leaf, entry in odd]
        rows += [0 * rows[0]] * (width - len(odd))
        even = [
            xp.reshape(state[leaf], (state[leaf].shape[0], -1))[0, e] for leaf, e in slots[k].even
        ]
        return xp.stack(rows), xp.max(xp.stack(even)) if even else xp.ones((), rows[0].dtype)

    parts = [one(k) for k in range(len(slots))]
    everything = xp.stack([part[0] for part in parts])
    # the update is already a difference; the odd state is not
    was = np.diag([0.0] + [1.0] * width)
    drift = everything[:, :, 1:] - xp.asarray(was[None], everything.dtype)
    return System(drift, everything[:, :, 0], xp.stack([part[1] for part in parts]))


def _limits(
    bench: _Bench,
    bases: list[list[Any]],
    roles: list[str],
    slots: list[Slots],
    moves: list[bool],
    powers: list[float],
    scale: float,
) -> list[Present]:
    """What holds at each count, every limit checked by eigenvalues."""
    rows = []
    for base in bases:
        for row in seeds(slots, base, bench.fill(0.0), scale):
            first = [np.stack([g] + [0 * g] * (len(_GRADIENTS) - 1)) for g in row.gradients]
            rows.append(row._replace(gradients=first))
    each = len(rows) // len(bases)
    answers, states = bench.run(rows)
    found = []
    for c in range(len(bases)):
        here = slice(each * c, each * (c + 1))
        first = [u[here, 0] for u in answers]
        after = [s if _is_opaque(s) else np.asarray(s[here, 0], np.float64) for s in states]
        system = systems(first, after, slots, scale, np)
        limits = [first_unstable(*pair, np) for pair in zip(*system[:2], strict=True)]
        for k in np.flatnonzero(moves):
            _check(system.drift[k], system.drive[k], limits[k])
        found.append(present_of(system, np.stack(limits), after, roles, moves, powers, np))
    finite = np.stack([np.isfinite(present.limit) for present in found])
    if not np.all(np.any(finite, axis=0)[np.asarray(moves)]):
        raise NoLimitError("no curvature makes it unstable")
    return found


def present_of(
    system: System,
    limits: Any,
    after: list[Any],
    roles: list[str],
    moves: list[bool],
    powers: list[float],
    xp: Any,
) -> Present:
    """The answers to `seeds`, in the optimizer's metric.

    Args:
      system, limits: of each kind; the limits with second moments as they are in `after`.
      after: the state after one update, with the seeds as a leading axis.
      roles, moves, powers: as in `Findings`.
      xp: `jax.numpy` or `numpy`.
    """
    metric = system.moment ** np.asarray(powers, system.moment.dtype)
    limits = xp.where(np.asarray(moves), limits / metric, xp.inf)
    fading = [
        xp.reshape(leaf[0], -1)[0] / SETTLED if role == "even" else xp.ones(())
        for leaf, role in zip(after, roles, strict=True)
    ]
    return Present(limits, -metric * system.drive[:, 0], fading)


def _check(drift: np.ndarray, drive: np.ndarray, limit: float) -> None:
    """The optimizer is stable below its limit and not above, by eigenvalues."""

    def radius(curvature: float) -> float:
        matrix = np.eye(len(drive)) + drift
        matrix[:, 0] += curvature * drive
        return float(np.max(np.abs(np.linalg.eigvals(matrix))))

    size = np.max(np.abs(drive))
    if size == 0:
        return
    reach = limit if np.isfinite(limit) else 1 / size
    if any(radius(part * reach) > 1 + _SLACK for part in _BELOW):
        raise NoLimitError("it is unstable at every curvature")
    if np.isfinite(limit) and radius(1.05 * limit) < 1:
        raise NoLimitError("its limit is not where it turns unstable")
