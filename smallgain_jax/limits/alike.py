"""Which leaves of a tree an optimizer treats alike, by the program it makes for them.

Value numbering: every variable of a jaxpr gets a number that stands for the whole computation
behind it, so that variables of one number hold one value. If all leaves start alike and get the
same gradient, then those with the same number for their update are moved by the same
transformation, and one experiment answers for all of them. Nothing is run or compiled.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_LARGE = 4096
_ROUNDS = 8


class Numbering:
    """Numbers for computations; the same from one jaxpr to the next."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._alive: list[Any] = []  # what is known by its address must not move away

    def of(self, *key: Any) -> int:
        """The number of whatever `key` describes."""
        return self._numbers.setdefault(key, len(self._numbers))

    def value(self, value: Any) -> int:
        """The number of a constant."""
        if isinstance(value, jax.core.Tracer) or _is_opaque(value) or np.size(value) > _LARGE:
            self._alive.append(value)
            return self.of("constant", id(value))
        host = np.asarray(value)
        return self.of("constant", host.shape, str(host.dtype), host.tobytes())

    def run(self, closed: core.ClosedJaxpr, inputs: Sequence[int]) -> list[int]:
        """Numbers of the outputs of a jaxpr, from those of its inputs."""
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.constvars, map(self.value, closed.consts), strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return self.value(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(
                zip(eqn.outvars, self._equation(eqn, [*map(read, eqn.invars)]), strict=True)
            )
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[int]) -> list[int]:
        name, params = eqn.primitive.name, eqn.params
        if name == "cond":
            cases = [self.run(branch, inputs[1:]) for branch in params["branches"]]
            return [self.of(name, inputs[0], *case) for case in zip(*cases, strict=True)]
        if name == "while":
            return self._while(params, inputs)
        if name == "scan":
            return self._scan(params, inputs)
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(inner, core.ClosedJaxpr) and len(inner.jaxpr.invars) == len(inputs):
            return self.run(inner, inputs)
        settings = tuple((key, self._setting(value)) for key, value in sorted(params.items()))
        what = (name, settings, *inputs)
        return [self.of(what, k, str(out.aval)) for k, out in enumerate(eqn.outvars)]

    def _while(self, params: Any, inputs: list[int]) -> list[int]:
        n, m = params["cond_nconsts"], params["body_nconsts"]
        test, body, carry = inputs[:n], inputs[n : n + m], inputs[n + m :]
        tokens = self._settle(carry, lambda now: self.run(params["body_jaxpr"], [*body, *now]))
        (ends,) = self.run(params["cond_jaxpr"], [*test, *tokens])
        return [self.of("while", ends, token) for token in tokens]

    def _scan(self, params: Any, inputs: list[int]) -> list[int]:
        n, m = params["num_consts"], params["num_carry"]
        consts, carry = inputs[:n], inputs[n : n + m]
        each = [self.of("each", number) for number in inputs[n + m :]]
        how = (params["length"], params["reverse"])

        def step(now: list[int]) -> list[int]:
            return self.run(params["jaxpr"], [*consts, *now, *each])

        tokens = self._settle(carry, lambda now: step(now)[:m])
        stacked = step(tokens)[m:]
        return [self.of("scan", *how, token) for token in [*tokens, *stacked]]

    def _settle(self, carry: list[int], step: Any) -> list[int]:
        """Numbers that hold for every turn of a loop: split until turns split no more."""
        tokens = [self.of("start", number) for number in carry]
        for _ in range(_ROUNDS):
            moved = [self.of("turn", *pair) for pair in zip(tokens, step(tokens), strict=True)]
            if len(set(moved)) == len(set(tokens)):
                return moved
            tokens = moved
        # not settled: everything apart
        return [self.of("apart", k, token) for k, token in enumerate(tokens)]

    def _setting(self, value: Any) -> Any:
        if isinstance(value, str | int | float | bool | type(None) | np.dtype):
            return value
        if isinstance(value, tuple):
            return tuple(self._setting(item) for item in value)
        text = str(value)
        if "0x" in text or len(text) > _LARGE or isinstance(value, jax.Array | np.ndarray):
            self._alive.append(value)
            return id(value)
        return text


def _is_opaque(value: Any) -> bool:
    """Whether NumPy cannot hold it, as random keys."""
    return jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended)
