r"""Limit and metric of a base optimizer, found by one experiment on its own update function.

An optimizer that is linear in the gradient is stable on a quadratic up to the smallest curvature at
which the spectral radius of the Jacobian of (x, state) exceeds 1. One of the Adam family is linear
as long as its second moments stand still, with $P = \sqrt{\hat\nu} + \epsilon$ in its way: it is
stable up to $\lambda_{\max}(P^{-1/2} \nabla^2 F P^{-1/2}) = 38/\alpha$ at $\beta_1 = 0.9$ (Cohen et
al., *Adaptive Gradient Methods at the Edge of Stability*, 2022, section 3). `experiment` finds out
which, on a small copy of the parameters; here the answer is brought to the state of a run: its
rates, schedules and hyperparameters for the limit, its second moments for the metric.

P is not read off the state by a formula but off the answer to a small gradient: an entry that
answers half as much has twice the P.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from smallgain_jax._canonical import canonical
from smallgain_jax._checks import check_optimizer
from smallgain_jax._compiling import quick_jit
from smallgain_jax.limits.copies import (
    Alike,
    Copy,
    NoLimitError,
    accumulated,
    find_alike,
    same_programs,
    small_copy,
    trace,
    trace_any,
    without,
)
from smallgain_jax.limits.crossing import first_unstable
from smallgain_jax.limits.experiment import (
    PROPORTIONAL,
    Findings,
    Present,
    experiment,
    present_of,
    seeds,
    systems,
)

_FAINT = 1e-13
"""A gradient too small to add to any second moment that counts."""
_ASLEEP = 2.0
"""An entry is at rest up to this multiple of the smallest P, eps: where sqrt(nu) <= eps."""
_KEPT = 64


_first_unstable = quick_jit(jax.vmap(first_unstable), most=np.inf)


class _Metric(NamedTuple):
    """How to read P off answers at the ages of a run, for each kind of leaf."""

    unit: jax.Array  # [kinds] P times the answer to a gradient
    floor: jax.Array  # [kinds] the smallest P


@dataclass(frozen=True)
class _Known:
    """An optimizer whose limit is known, with all that brings it to the state of a run."""

    optimizer: optax.GradientTransformationExtraArgs
    copy: Copy  # of one leaf of each kind
    alike: Alike
    findings: Findings
    paths: tuple[str, ...]  # of the whole state's leaves
    twins: tuple[int | None, ...]  # of each: the leaf of the copy's state that is computed alike

    def present(self, leaves: dict[str, Any]) -> Present:
        """Every kind of leaf at the settings of a run, second moments settled."""
        found = self.findings
        if found.always is not None:
            return jax.tree.map(partial(jnp.asarray, dtype=jnp.result_type(float)), found.always)
        state = self._copied(leaves, "setting")
        still = [np.zeros(leaf.shape, leaf.dtype) for leaf in self.copy.shapes]
        moves, after = self._answers(seeds(found.slots, state, still, found.scale))
        system = systems(moves, after, found.slots, found.scale, jnp)
        limits = _first_unstable(*system[:2])
        return present_of(system, limits, after, found.roles, found.moves, found.powers, jnp)

    def _metric(self, now: Present, leaves: dict[str, Any]) -> _Metric:
        """P from answers at second moments of 0: its floor, and the first moment's bias."""
        state = self._copied(leaves, "setting")
        still = [np.zeros(leaf.shape, leaf.dtype) for leaf in self.copy.shapes]
        roles = self.findings.roles
        empty = [0 * np.asarray(a) if r == "even" else a for a, r in zip(state, roles, strict=True)]
        fresh = self._copied(leaves, "setting", "age")
        fresh = [
            e if r == "even" else _earlier(a) if r == "age" else a
            for e, a, r in zip(empty, fresh, roles, strict=True)
        ]
        sizes = [_FAINT, 2 * _FAINT]
        given = {size: [np.full_like(leaf, size) for leaf in still] for size in sizes}
        moves, _ = self._answers([(at, still, given[f]) for at in (empty, fresh) for f in sizes])
        first = jnp.stack([move.reshape(4, -1)[:, 0] for move in moves])
        late, late_too, young, young_too = (first / -np.asarray([2 * sizes], first.dtype)).T
        # without an eps the answer depends on the gradient's size, and tells nothing of the bias
        linear = jnp.abs(late_too - late) < 1e-2 * late
        linear = linear & (jnp.abs(young_too - young) < 1e-2 * young)
        usable = jnp.where(late > 0, late, 1)
        floor = jnp.where(late > 0, now.unit / usable, 0)
        # a correction of the first moment's bias lengthens; what shortens (RAdam) stays in P
        bias = jnp.where(linear, jnp.maximum(young / usable, 1), 1)
        return _Metric(now.unit * bias, floor)

    def inverse_root(self, base_state: Any, params: Any, now: Present) -> Any:
        leaves: list[Any]
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        by_path = self.leaves(base_state)
        live = jnp.isfinite(now.limit)
        # at a rate of 0, now, nothing moves
        least = jnp.min(jnp.where(live, now.limit, jnp.finfo(now.limit.dtype).max))
        shares = jnp.where(live, least / jnp.where(live, now.limit, 1), 0)
        answers = leaves
        if any(self.findings.powers):
            metric = self._metric(now, by_path)
            answers = self._answers_now(base_state, now.fading, leaves, treedef)
        roots = []
        for leaf, answer, k in zip(leaves, answers, self.alike.members, strict=True):
            dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
            inverse = shares[k]
            if self.findings.powers[k]:
                unit = metric.unit[k]
                entries = answer.astype(shares.dtype) / jnp.where(unit > 0, unit, 1)
                moves = (unit > 0) & (entries > 0) & jnp.isfinite(entries)
                moves = moves & (_ASLEEP * metric.floor[k] * entries < 1)
                inverse = jnp.where(moves, inverse * entries, 0)
            roots.append(jnp.sqrt(inverse).astype(dtype))
        return treedef.unflatten(roots)

    def _answers_now(
        self, base_state: Any, fading: list[jax.Array], leaves: list[Any], treedef: Any
    ) -> list[jax.Array]:
        """Minus the update over the gradient, for a faint one, of every parameter.

        One update earlier and with larger second moments, so that the update uses them as they are.
        """
        state_def: Any
        flat, state_def = jax.tree.flatten(base_state)

        def before(leaf: Any, twin: int | None) -> Any:
            role = "setting" if twin is None else self.findings.roles[twin]
            if role == "even":
                factor = fading[twin or 0]
                return (leaf / jnp.where(factor > 0, factor, 1)).astype(leaf.dtype)
            if role == "age":
                return _earlier(leaf)
            return jnp.zeros_like(leaf) if role == "odd" else leaf

        rest = [before(leaf, twin) for leaf, twin in zip(flat, self.twins, strict=True)]
        still = [jnp.zeros_like(leaf) for leaf in leaves]
        faint = [jnp.full_like(leaf, _faint(leaf)) for leaf in leaves]
        moves, _ = self.optimizer.update(
            treedef.unflatten(faint),
            state_def.unflatten(rest),
            treedef.unflatten(still),
            **({"value": jnp.ones(())} if self.copy.extra else {}),
        )
        wide = [jnp.promote_types(jnp.result_type(leaf), jnp.float32) for leaf in leaves]
        return [
            -move.astype(dtype) / (_faint(leaf) or 1)
            for move, leaf, dtype in zip(jax.tree.leaves(moves), leaves, wide, strict=True)
        ]

    def leaves(self, base_state: Any) -> dict[str, Any]:
        """Leaves of a state by their paths."""
        found, _ = jax.tree_util.tree_flatten_with_path(base_state)
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in found}
        if tuple(leaves) != self.paths:
            raise ValueError(
                "base_state: not a state of this optimizer at the parameters it was probed with"
            )
        return leaves

    def _copied(self, leaves: dict[str, Any], *roles: str) -> list[Any]:
        """The copy's state, where settings (or ages) are those of the run."""
        return [
            leaves[path] if role in roles and np.shape(leaves[path]) == np.shape(mine) else mine
            for path, role, mine in zip(
                self.copy.paths, self.findings.roles, self.findings.template, strict=True
            )
        ]

    def _answers(self, rows: Sequence[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Updates and states of the copy after one update from each row (a leading axis)."""
        columns = [*zip(*(row[0] for row in rows), strict=True)]
        for part in (1, 2):
            columns += zip(*(row[part] for row in rows), strict=True)
        same = [all(leaf is column[0] for leaf in column) for column in columns]
        given = [
            column[0] if s else jnp.stack(column) for s, column in zip(same, columns, strict=True)
        ]
        axes = [None if s else 0 for s in same]
        step = jax.vmap(
            core.jaxpr_as_fun(self.copy.step), in_axes=(*axes, None), axis_size=len(rows)
        )
        out = step(*given, jnp.ones((), float))
        return out[: len(self.copy.shapes)], out[len(self.copy.shapes) :]


def _earlier(age: jax.Array) -> jax.Array:
    return age if age.dtype == bool else jnp.maximum(age - 1, 0)


def _faint(leaf: Any) -> float:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return 0.0
    return max(_FAINT, 64 * float(jnp.finfo(dtype).tiny))


@dataclass(frozen=True)
class Probe:
    """A base optimizer as its stability sees it; made by `probe_optimizer`.

    Attributes:
      known: whether it has a limit that the experiment found.
      adaptive: whether its metric comes from second moments.
      why: in words, why there is no limit; "" where it is known.
      details: what brings the limit and the metric to the state of a run; None if not known.
    """

    known: bool
    adaptive: bool
    why: str
    details: _Known | None = None

    @property
    def proportional(self) -> bool:
        """Whether its update may be a rate times the gradient, as no sign and no Adam's is."""
        return not self.adaptive and PROPORTIONAL not in self.why

    def present(self, base_state: Any) -> Present | None:
        """What `limit` and `inverse_root` both need, for a caller who asks for both."""
        if self.details is None:
            return None
        return self.details.present(self.details.leaves(base_state))

    def limit(self, base_state: Any, present: Present | None = None) -> jax.Array:
        """Curvature limit in the optimizer's metric at the settings of a state.

        Args:
          base_state: the optimizer's state. Schedules, injected hyperparameters and accumulations
            count as what they are at its next update; corrections of a bias count as faded.
          present: `self.present(base_state)`, where it is at hand.

        Returns:
          The limit [], the smallest of all leaves; inf where it is not known or nothing moves.
        """
        now = present or self.present(base_state)
        return jnp.asarray(jnp.inf) if now is None else jnp.min(now.limit)

    def inverse_root(self, base_state: Any, params: Any, present: Present | None = None) -> Any:
        r"""Entries of $P^{-1/2}$, with leaves of larger limits brought to the smallest.

        A leaf l whose own limit is $L_l$ counts with $P\, L_l / \min L$, so that the whole is
        stable while $\lambda_{\max}(P^{-1/2} \nabla^2 F P^{-1/2})$ is below `limit`.

        Args:
          base_state: the optimizer's state.
          params: the parameters, or their shapes.
          present: `self.present(base_state)`, where it is at hand.

        Returns:
          A pytree like params; of scalars where the metric is the identity. 0 where nothing moves:
          at frozen leaves, and where second moments are at eps or below ($P \le 2 \epsilon$). Never
          NaN or infinite.
        """
        now = present or self.present(base_state)
        if self.details is None or now is None:
            return jax.tree.map(lambda _: jnp.ones(()), params)
        return self.details.inverse_root(base_state, params, now)


_probes: dict[Any, Probe] = {}


def probe_optimizer(optimizer: optax.GradientTransformation, params: Any) -> Probe:
    """Learn an optimizer's limit and metric by an experiment on a small copy of the parameters.

    Args:
      optimizer: any optax optimizer.
      params: the parameters, or their `jax.ShapeDtypeStruct`s; only structure and shapes count.

    Where hyperparameters are traced (`inject_hyperparams` around a whole transformation), numbers
    stand in for them to learn what kind of optimizer it is; the limit itself is then traced.

    Returns:
      A `Probe`. It is not `known` for an optimizer that has no such limit (sign descent, trust
      ratios, orthogonalized updates), that needs more than a gradient (line searches), or if that
      holds for any group of parameters.

    Raises:
      Whatever the optimizer raises at `params`, but for missing extra arguments.

    >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    >>> adam = optax.adam(1e-3)
    >>> probe = probe_optimizer(adam, params)
    >>> round(float(probe.limit(adam.init(params))), -1)
    38000.0
    """
    check_optimizer("optimizer", optimizer)
    optimizer = canonical(optimizer)
    leaves: list[Any]
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple((np.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)
    key = (optimizer, treedef, shapes, jnp.result_type(float))
    try:
        if key in _probes:
            return _probes[key]
    except TypeError:  # an optimizer or a tree that cannot be hashed is not remembered
        return _probe(optimizer, params)
    probe = _probe(optimizer, params)
    if probe.details is None or not probe.details.copy.traced:
        while len(_probes) >= _KEPT:
            _probes.pop(next(iter(_probes)))
        _probes[key] = probe
    return probe


def _probe(optimizer: optax.GradientTransformation, params: Any) -> Probe:
    whole = accumulated(optax.with_extra_args_support(optimizer))
    try:
        small = small_copy(params)
        if not jax.tree.leaves(small):
            raise NoLimitError("there are no parameters")
        full = trace_any(whole, params, small)
        state = jax.eval_shape(whole.init, params)
        paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
        if paths != full.paths:
            raise NoLimitError("its state is built by the sizes of the parameters")
        alike = find_alike(full)
        copy, alike = _representatives(whole, small, full, alike)
        # numbers even while the caller is being traced: the answer is about the optimizer alone
        with jax.ensure_compile_time_eval():
            findings = experiment(copy, _named_tuples(small))
        if not any(findings.moves):
            raise NoLimitError("it moves nothing")
    except NoLimitError as error:
        return Probe(False, False, str(error))
    details = _Known(whole, copy, alike, findings, tuple(full.paths), _twins(full, copy, alike))
    return Probe(True, any(findings.powers), "", details)


def _twins(full: Copy, copy: Copy, alike: Alike) -> tuple[int | None, ...]:
    """For each leaf of the whole state: the leaf of the copy's state that is computed alike.

    Itself if it is there; else one at the same place but for names, for all counters are computed
    alike; else any.
    """

    def unnamed(path: str) -> str:
        return re.sub(r"\['[^']*'\]", "[]", path)

    number_of = dict(zip(full.paths, alike.state, strict=True))
    place: dict[Any, int] = {}
    for k, path in enumerate(copy.paths):
        for key in (path, (number_of[path], unnamed(path)), number_of[path]):
            place.setdefault(key, k)
    twins = []
    for path, number in number_of.items():
        keys = (path, (number, unnamed(path)), number)
        twins.append(next((place[key] for key in keys if key in place), None))
    return tuple(twins)


def _representatives(
    optimizer: optax.GradientTransformationExtraArgs, small: Any, full: Copy, alike: Alike
) -> tuple[Copy, Alike]:
    """A copy of one leaf of each kind where that is possible, else of all."""
    n = len(full.shapes)
    everybody = Alike(list(range(n)), alike.state, list(range(n)))
    if len(alike.first) == n:
        return full, everybody
    try:
        hollow = trace(optimizer, without(small, alike.first), full.extra)
    except Exception:  # whatever it does with holes, the whole tree is an answer
        return full, everybody
    return (hollow, alike) if same_programs(full, hollow, alike) else (full, everybody)


def _named_tuples(tree: Any) -> frozenset[type]:
    """Types of the named tuples that the user's own tree is made of."""
    types: set[type] = set()

    def visit(node: Any) -> None:
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            types.add(type(node))
        for child in jax.tree.leaves(node, is_leaf=lambda other: other is not node):
            if child is not node:
                visit(child)

    visit(tree)
    return frozenset(types)


def measured_limit(optimizer: optax.GradientTransformation) -> float | None:
    r"""Curvature limit of any linear, time-invariant optimizer, by experiment.

    The smallest curvature $\lambda$ at which the spectral radius of the Jacobian of (x, state)
    under the gradient $\lambda x$ exceeds 1. That reproduces the closed forms above, and holds for
    every chain of linear transformations.

    Args:
      optimizer: the base optimizer; it is run on two parameters.

    Returns:
      The limit, in units of curvature; or None when there is no such limit to measure: the update
      is not proportional to the gradient (Adam, Lion), changes with time (schedules), needs an
      objective (line searches), or is being traced.

    Raises:
      Whatever the optimizer itself raises.

    >>> round(measured_limit(optax.sgd(0.1, momentum=0.9)), 3)
    38.0
    >>> measured_limit(optax.adam(0.1)) is None
    True
    """
    probe = probe_optimizer(optimizer, np.zeros(2, jnp.result_type(float)))
    if probe.details is None or probe.adaptive or probe.details.copy.traced:
        return None
    limits = probe.details.findings.limits.min(axis=1)
    limit = float(limits[0])
    return limit if np.allclose(limits, limit, rtol=1e-3) and np.isfinite(limit) else None
