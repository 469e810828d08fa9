"""The methods compared: a base optimizer at a learning rate, and what weighs the terms."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optax

from bench.training import aggregate, momentum, peers
from bench.training.peers import Peer
from bench.training.problems import Problem


class Method(NamedTuple):
    """How to make an optimizer, and how to run it.

    Without a rival, the optimizer weighs the terms itself: its update is given the sum of the
    gradients, `term_grads`, `term_values` and `term_args`.
    """

    make: Callable[[Problem, Any], tuple[optax.GradientTransformation, Peer | None]]
    traced_rate: bool = True  # one program for all rates
    lanes: bool = True  # seeds may run side by side: no branch depends on the state
    one_by_one: bool = False  # a step is K updates, each by the gradient of one loss, its `turn`


def small_gain(problem: Problem, rate: Any, **settings: Any) -> tuple[Any, None]:
    """The library's transformation over the problem's base optimizer; fair shares if not told."""
    import smallgain_jax as sg

    settings = {"policy": "fair"} | settings
    return sg.small_gain(problem.optimizer(rate), terms=problem.losses, **settings), None


def annealed(problem: Problem, rate: Any) -> tuple[Any, None]:
    """The same, with weights that are back at the reference half way through."""
    return small_gain(
        problem, rate, anneal=optax.linear_schedule(1.0, 0.0, max(1, problem.steps // 2))
    )


def _against(peer: Peer) -> Method:
    return Method(lambda problem, rate: (problem.optimizer(rate), peer))


def _uncertainty(problem: Problem, rate: Any) -> tuple[Any, Peer]:
    return problem.optimizer(rate), peers.uncertainty(problem.optimizer(rate))


def _momentum_config(problem: Problem, rate: Any) -> tuple[Any, None]:
    """K updates a step, so that the rate falls by steps and not by updates."""
    terms, scheduled = len(problem.losses.names or ()), problem.schedule(rate)
    falling = callable(scheduled)
    by_steps = (lambda count: scheduled(count // terms)) if falling else scheduled
    direction = momentum.scale_by_momentum_config(terms)
    return optax.chain(direction, optax.scale_by_learning_rate(by_steps)), None


METHODS: dict[str, Method] = {
    "equal": _against(peers.fixed()),
    "gradient_norms": _against(peers.gradient_norms()),
    "gradient_norms_100": _against(peers.gradient_norms(every=100)),
    "gradient_norms_1000": _against(peers.gradient_norms(every=1000)),
    "annealing": _against(peers.annealing()),
    "tangent_kernel": _against(peers.tangent_kernel()),
    "relobralo": _against(peers.relative_lookback()),
    "softadapt": _against(peers.softadapt()),
    "uncertainty": Method(_uncertainty),
    "famo": _against(peers.fast_adaptive()),
    "dual_balancing": _against(peers.dual_balancing()),
    "upgrad": _against(peers.surgery(aggregate.upgrad)),
    "pcgrad": _against(peers.surgery(aggregate.pcgrad)),
    "cagrad": _against(peers.surgery(aggregate.cagrad)),
    "config": _against(peers.surgery(aggregate.config)),
    "mgda": _against(peers.surgery(aggregate.mgda)),
    "momentum_config": Method(_momentum_config, one_by_one=True),
    "small_gain": Method(small_gain, traced_rate=False, lanes=False),
    "small_gain_anneal": Method(annealed, traced_rate=False, lanes=False),
    "small_gain_reference": Method(
        partial(small_gain, policy="reference"), traced_rate=False, lanes=False
    ),
    "small_gain_gains": Method(partial(small_gain, row_gains=True), traced_rate=False, lanes=False),
    "small_gain_greedy": Method(
        partial(small_gain, policy="greedy"), traced_rate=False, lanes=False
    ),
}
