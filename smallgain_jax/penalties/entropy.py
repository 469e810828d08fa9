"""Entropy of softmax rows."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smallgain_jax._checks import check_finite, is_concrete
from smallgain_jax.penalties.base import (
    Schedule,
    StrengthPenalty,
    magnitude,
    over,
    over_square,
    positive,
    read_count,
    read_positive,
    read_weight,
    wide,
)

UNROLL = 16


def atoms(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities a and centred surprisals c of rows of logits that are at most 0."""
    log_a = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    a = jnp.exp(log_a)
    return a, jnp.sum(a * log_a, axis=-1, keepdims=True) - log_a


@jax.custom_jvp
def entropy(logits: jax.Array) -> jax.Array:
    """Sum of the entropies of softmax rows; the gradient a c is twice as fast as reverse mode."""
    log_a = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    return -jnp.sum(jnp.exp(log_a) * log_a)


@entropy.defjvp
def _entropy_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    a, c = atoms(primals[0])
    return entropy(primals[0]), jnp.sum(a * c * tangents[0])


class SoftmaxEntropy(StrengthPenalty):
    r"""Row entropies, $p(z) = -\lambda \sum_i \sum_k a_{ik} \log a_{ik}$, a = softmax(z / tau).

    Rows are the last axis. With $S$ a row's entropy and $c_k = -\log a_k - S$ the centred
    surprisals (weighted mean 0), its gradient is $\frac{\lambda}{\tau} a_k c_k$ and its Hessian

    $$H_{kj} = \frac{\lambda}{\tau^2} (\delta_{kj} a_k (c_k - 1) + a_k a_j (1 - c_k - c_j)),$$

    dense in a row, indefinite, with $H 1 = 0$. The majorizer is its absolute row sums
    $\sum_j |H_{kj}|$ (Gershgorin). The Fisher metric $G = \frac{\lambda}{\tau^2}(\mathrm{diag}(a) -
    a a^T)$ is positive semidefinite but does *not* majorize H. For long rows `exact_rows=False`
    bounds each sum by Cauchy and Schwarz, with $v = \sum_j a_j c_j^2$:

    $$\sum_{j \ne k} a_j |1 - c_k - c_j|
      \le \sqrt{(1 - a_k) ((1 - c_k)^2 + v - a_k (1 - 2 c_k)^2)}.$$

    The majorizer bounds the Hessian at z only. `majorized_step` uses another diagonal that also
    does, $D_k = \frac{\lambda}{\tau^2} \kappa a_k$ with $\kappa = \max(1, \max_k c_k - 1)$, because
    $v \cdot H v = \frac{\lambda}{\tau^2} E_a[(c - 1)(v - E_a v)^2]$. Its step multiplies a row's
    logits by $1 + \omega/\kappa$, up to a constant. That lowers the temperature $1/\beta$, and
    $dS/d\beta = -\beta \, \mathrm{Var}_a(z) \le 0$: it descends for every omega > 0.

    Args:
      num_atoms: K, length of a row, int >= 1.
      temperature: tau, float scalar > 0, in the unit of the logits.
      weight: factor of the strength, float scalar >= 0, or an optax schedule (see `at_step`).
      exact_rows: whether `majorizer_diagonal` is the absolute row sums themselves, K operations for
        each entry, or the bound above, a few; `row_majorizer` is always exact.

    Log-parameters: strength.

    Raises:
      TypeError: num_atoms that is no integer.
      ValueError: num_atoms below 1, temperature not positive and finite, weight negative or not
        finite; on use, rows that are not of length K, or concrete logits that are not finite
        (traced ones propagate).

    Source: Grandvalet and Bengio (2005), Semi-supervised learning by entropy minimization, for the
    penalty; Horn and Johnson, Matrix analysis, theorem 6.1.10 (diagonal dominance), for the
    majorizer. The step is ours; its derivation is above.

    >>> p = SoftmaxEntropy(num_atoms=2, temperature=1.0)
    >>> row = jnp.log(jnp.array([0.95, 0.05]))
    >>> bool(p.row_fisher(row)[0, 0] < p.row_hessian(row)[0, 0] < p.row_majorizer(row)[0, 0])
    True
    """

    weight: jax.Array
    temperature: jax.Array
    log_parameters: jax.Array
    schedule: Schedule | None = eqx.field(static=True)
    num_atoms: int = eqx.field(static=True)
    exact_rows: bool = eqx.field(static=True)

    def __init__(
        self,
        num_atoms: int,
        temperature: ArrayLike = 1.0,
        *,
        weight: ArrayLike | Schedule = 1.0,
        exact_rows: bool = True,
    ) -> None:
        self.num_atoms = read_count("num_atoms", num_atoms)
        self.weight, self.schedule = read_weight(weight)
        self.temperature = read_positive("temperature", temperature)
        self.log_parameters = jnp.zeros((1,), self.weight.dtype)
        self.exact_rows = bool(exact_rows)

    def _prepare(self, x: ArrayLike) -> jax.Array:
        array = wide("logits", x)
        if array.ndim < 1 or array.shape[-1] != self.num_atoms:
            raise ValueError(
                f"logits has shape {array.shape}, expected rows of num_atoms = {self.num_atoms}"
            )
        check_finite("logits", array)
        return array

    def _prepare_row(self, logits: ArrayLike) -> jax.Array:
        row = self._prepare(logits)
        if row.ndim != 1:
            raise ValueError(f"logits has shape {row.shape}, expected one row, ({self.num_atoms},)")
        return row

    def _temperature(self, x: jax.Array) -> jax.Array:
        return positive(self.temperature, x.dtype)

    def _scaled(self, rows: jax.Array) -> jax.Array:
        """lambda / tau^2 times what depends on the logits over tau only, cut at the largest number.

        One after the other: lambda / tau^2 alone overflows where probabilities make up for it.
        """
        return over_square(self._strength(rows) * rows, self._temperature(rows))

    def _shifted(self, x: jax.Array) -> jax.Array:
        """Logits over the temperature, shifted to at most 0."""
        largest = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
        # an atom whose probability underflows keeps a finite logarithm, so 0 log 0 is 0
        floor = math.log(float(np.finfo(x.dtype).tiny))
        return jnp.maximum(over(x - largest, self._temperature(x)), floor)

    def _value(self, x: jax.Array) -> jax.Array:
        return self._strength(x) * entropy(self._shifted(x))

    def _atoms(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return atoms(self._shifted(x))

    def hessian_diagonal(self, x: ArrayLike) -> jax.Array:
        """Diagonal of the Hessian by the logits, shaped like x; its rows are dense (see `hvp`)."""
        logits = self._prepare(x)
        a, c = self._atoms(logits)
        return self._scaled(a * (c * (1 - 2 * a) - (1 - a)))

    def _majorizer(self, x: jax.Array) -> jax.Array:
        a, c = self._atoms(x)
        above = 1 - c
        own = a * jnp.abs(above - c)
        if self.exact_rows:
            # the sum over all atoms includes the atom itself, and without it may round below zero
            others = jnp.maximum(self._distances(a, c, above) - own, 0)
        else:
            square = above**2 + jnp.sum(a * c**2, axis=-1, keepdims=True) - own * jnp.abs(above - c)
            square = (1 - a) * square
            # one atom that has all the weight: no derivative of a root at 0
            others = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        diagonal = jnp.abs(c * (1 - 2 * a) - (1 - a))
        return self._scaled(a * (diagonal + others))

    def _distances(self, a: jax.Array, c: jax.Array, t: jax.Array) -> jax.Array:
        """sum_j a_j |t_k - c_j| for each k, as 2 sum_j a_j max(t_k, c_j) - t_k: c has mean 0."""

        def add(j: jax.Array, total: jax.Array) -> jax.Array:
            a_j, c_j = (jax.lax.dynamic_slice_in_dim(y, j, 1, axis=-1) for y in (a, c))
            # two instructions; `jnp.maximum` would take more, to pass on a NaN that a_j has anyway
            return total + a_j * jnp.where(t > c_j, t, c_j)

        # a loop over blocks of atoms, because [..., K, K] would not fit
        start = jnp.zeros_like(t)
        unroll = min(self.num_atoms, UNROLL)
        return 2 * jax.lax.fori_loop(0, self.num_atoms, add, start, unroll=unroll) - t

    def _descend(self, x: jax.Array, step: jax.Array) -> jax.Array:
        _, c = self._atoms(x)
        factor = jnp.maximum(jnp.max(c, axis=-1, keepdims=True) - 1, 1)
        return x - step * self._temperature(x) * c / factor

    def row_hessian(self, logits: ArrayLike) -> jax.Array:
        """Exact Hessian H of one row's entropy by its logits, [K, K].

        Args:
          logits: one row, float [K].
        """
        return self._row_hessian(self._prepare_row(logits))

    def row_hessian_derivative(self, logits: ArrayLike, atom: ArrayLike) -> jax.Array:
        """dH/dz_atom, symmetric [K, K].

        Args:
          logits: one row, float [K].
          atom: index of the logit, int in 0..K-1; may be traced.
        """
        return self._by_logit(self._row_hessian, logits, atom)

    def row_majorizer(self, logits: ArrayLike) -> jax.Array:
        """Gershgorin majorizer diag(sum_j |H_kj|) of one row, [K, K].

        Args:
          logits: one row, float [K].
        """
        return self._row_majorizer(self._prepare_row(logits))

    def row_majorizer_derivative(self, logits: ArrayLike, atom: ArrayLike) -> jax.Array:
        """Its derivative diag(sum_j sign(H_kj) dH_kj/dz_atom) with sign(0) = 0, [K, K].

        Args:
          logits: one row, float [K].
          atom: index of the logit, int in 0..K-1; may be traced.
        """
        return self._by_logit(self._row_majorizer, logits, atom)

    def row_fisher(self, logits: ArrayLike) -> jax.Array:
        """Fisher metric G = lambda/tau^2 (diag(a) - a a^T) of one row, [K, K]; not a majorizer.

        Args:
          logits: one row, float [K].
        """
        return self._row_fisher(self._prepare_row(logits))

    def row_fisher_derivative(self, logits: ArrayLike, atom: ArrayLike) -> jax.Array:
        """dG/dz_atom, symmetric [K, K].

        Args:
          logits: one row, float [K].
          atom: index of the logit, int in 0..K-1; may be traced.
        """
        return self._by_logit(self._row_fisher, logits, atom)

    def _row_hessian(self, row: jax.Array) -> jax.Array:
        a, c = self._atoms(row)
        pairs = jnp.outer(a, a) * (1 - c[:, None] - c[None, :])
        return self._scaled(jnp.diag(a * (c - 1)) + pairs)

    def _row_majorizer(self, row: jax.Array) -> jax.Array:
        return jnp.diag(jnp.sum(magnitude(self._row_hessian(row)), axis=1))

    def _row_fisher(self, row: jax.Array) -> jax.Array:
        a, _ = self._atoms(row)
        return self._scaled(jnp.diag(a) - jnp.outer(a, a))

    def _by_logit(
        self, fn: Callable[[jax.Array], jax.Array], logits: ArrayLike, atom: ArrayLike
    ) -> jax.Array:
        row = self._prepare_row(logits)
        if is_concrete(atom) and not 0 <= int(np.asarray(atom)) < self.num_atoms:
            raise ValueError(f"atom = {atom} is outside 0..{self.num_atoms - 1}")
        direction = jax.nn.one_hot(atom, self.num_atoms, dtype=row.dtype)
        return jax.jvp(fn, (row,), (direction,))[1]
