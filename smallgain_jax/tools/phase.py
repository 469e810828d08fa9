r"""The original's AGM-phase reweighting, a baseline of the validation plan."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from smallgain_jax._checks import PARAMS_NEEDED, cast_like, float_dtype
from smallgain_jax.graphs.graph import EnergyGraph
from smallgain_jax.search.armijo import Trial, armijo
from smallgain_jax.search.box import Box


class AgmInfo(NamedTuple):
    """What a reader of one update wants to know."""

    adapted: jax.Array  # [] F(x; w) before the update
    adapted_after: jax.Array  # [] after it
    accepted: jax.Array  # [] bool
    backtracks: jax.Array  # [] int32


class Phase(NamedTuple):
    """Running statistics of the rates between consecutive energies."""

    last_energy: jax.Array  # []
    energies: jax.Array  # [] int32, how many were seen
    rates: jax.Array  # [5] the newest last
    rate_sum: jax.Array  # []
    jump_sum: jax.Array  # [] of |difference of consecutive rates|
    jump_squares: jax.Array  # []


class AgmState(NamedTuple):
    """State of `agm_phase`."""

    phase: Phase
    couplings: jax.Array  # [] factor on all couplings
    local: jax.Array  # [] factor on the local energies
    base_state: Any
    info: AgmInfo


AGM_BOOST, AGM_TAME = 1.05, 0.97
"""Factors of one update, up and down."""


def agm_step(phase: Phase, energy: jax.Array) -> tuple[Phase, jax.Array, jax.Array]:
    r"""The original's phase metrics, and the factors they call for.

    A rate between consecutive energies is $r = 1 - |a - h| / (|a| + |h|)$. With their mean, the
    slope of the last five, and the variance of their absolute differences ("oscillation"),
    couplings gain 5 % and local energies lose 3 % where the mean is above 0.7, the slope positive
    and the oscillation below 0.05. Where the mean is below 0.3, as that of a history of one energy
    counts, or the oscillation above 0.1, couplings lose 3 % and local energies gain 5 %.

    Args:
      phase: statistics so far.
      energy: F(x; w) now, scalar.

    Returns:
      The new statistics, the factor on couplings and that on local energies.

    >>> zero = jnp.zeros(())
    >>> phase = Phase(zero, jnp.zeros((), jnp.int32), jnp.zeros(5), zero, zero, zero)
    >>> [round(factor.item(), 2) for factor in agm_step(phase, jnp.ones(()))[1:]]
    [0.97, 1.05]
    """
    count = phase.energies
    change = jnp.abs(phase.last_energy - energy)
    rate = 1 - change / (jnp.abs(phase.last_energy) + jnp.abs(energy) + 1e-8)
    rate = jnp.clip(rate, 0, 1)
    known = count >= 1
    jumped = count >= 2
    jump = jnp.where(jumped, jnp.abs(rate - phase.rates[-1]), 0)
    new = Phase(
        energy,
        optax.safe_increment(count),
        jnp.where(known, jnp.append(phase.rates[1:], rate), phase.rates),
        phase.rate_sum + jnp.where(known, rate, 0),
        phase.jump_sum + jump,
        phase.jump_squares + jump**2,
    )
    mean = new.rate_sum / jnp.maximum(count, 1)
    slope = jnp.vdot(jnp.arange(-2, 3, dtype=new.rates.dtype), new.rates) / 10
    trend = jnp.where(count >= 5, slope, 0)
    jumps = jnp.maximum(count - 1, 1)
    oscillation = new.jump_squares / jumps - (new.jump_sum / jumps) ** 2
    exploit = (mean > 0.7) & (trend > 0) & (oscillation < 0.05)
    explore = ~exploit & ((mean < 0.3) | (oscillation > 0.1))

    def factor(exploiting: float, exploring: float) -> jax.Array:
        return jnp.where(exploit, exploiting, jnp.where(explore, exploring, 1.0))

    return new, factor(AGM_BOOST, AGM_TAME), factor(AGM_TAME, AGM_BOOST)


def agm_phase(
    base_optimizer: optax.GradientTransformation,
    graph: EnergyGraph,
    *,
    max_backtracks: int = 20,
) -> optax.GradientTransformationExtraArgs:
    """The original's baseline that moves weights by the phase of the descent, with Armijo's test.

    One factor for all couplings and one for all local energies, by `agm_step`; the step is accepted
    on the adapted objective, as for the original's other baselines. In the runs recorded from the
    original only the factor on the local energies moved, because its table of weights held no
    coupling; here both move, as its documentation says.

    Args:
      base_optimizer: any optax optimizer.
      graph: the objective.
      max_backtracks: halvings before a step counts as failed.

    Returns:
      An optax transformation whose `update` needs `params`.

    >>> graph = EnergyGraph(None, [], num_nodes=2)
    >>> agm_phase(optax.sgd(0.1), graph).init(jnp.ones(2)).local.item()
    1.0
    """
    base = optax.with_extra_args_support(base_optimizer)

    def init(params: jax.Array) -> AgmState:
        dtype = float_dtype(params)

        # every field its own buffer: a donated state may not alias itself
        def scalar(fill: float = 0.0) -> jax.Array:
            return jnp.full((), fill, dtype)

        counter = jnp.zeros((), jnp.int32)
        phase = Phase(scalar(), counter, jnp.zeros(5, dtype), scalar(), scalar(), scalar())
        info = AgmInfo(scalar(), scalar(), jnp.ones((), bool), jnp.zeros((), jnp.int32))
        return AgmState(phase, scalar(1.0), scalar(1.0), base.init(params), info)

    def update(
        updates: jax.Array,
        state: AgmState,
        params: jax.Array | None = None,
        *,
        bounds: tuple[Any, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[jax.Array, AgmState]:
        if params is None:
            raise ValueError(PARAMS_NEEDED)
        box = Box(-jnp.inf, jnp.inf) if bounds is None else Box(*bounds)

        def energy(x: jax.Array, couplings: jax.Array, local: jax.Array) -> jax.Array:
            own = graph.local_energy(x)
            return local * own + couplings * (graph.energy(x) - own)

        before = energy(params, state.couplings, state.local)
        phase, gain, relief = agm_step(state.phase, before)
        couplings, local = state.couplings * gain, state.local * relief
        now, gradient = jax.value_and_grad(energy)(params, couplings, local)
        free = jnp.where(box.blocks(params, -gradient), 0, gradient).astype(updates.dtype)
        move, base_state = base.update(free, state.base_state, params, **extra_args)
        move = box.project(params + move) - params

        def trial(step: jax.Array) -> Trial:
            slope = step * jnp.vdot(gradient, move)
            return Trial(energy(params + step * move, couplings, local), slope, None)

        search = armijo(trial, now, max_backtracks=max_backtracks)
        finite = jnp.isfinite(now) & jnp.all(jnp.isfinite(gradient))
        accepted = search.accepted & finite
        step = jnp.where(accepted, search.step * move, 0)
        after = jnp.where(accepted, search.trial.value, now)
        info = AgmInfo(now, after, accepted, search.backtracks)
        new = AgmState(phase, couplings, local, base_state, info)
        kept = jax.tree.map(partial(jnp.where, finite), new, state._replace(info=info))
        return step.astype(updates.dtype), cast_like(kept, state)

    return optax.GradientTransformationExtraArgs(init, update)
