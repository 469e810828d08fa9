"""Sparsity penalties with curvature majorizers."""

from smallgain_jax.penalties.base import Penalty as Penalty
from smallgain_jax.penalties.entropy import SoftmaxEntropy as SoftmaxEntropy
from smallgain_jax.penalties.gates import JumpReLU as JumpReLU
from smallgain_jax.penalties.gates import TopK as TopK
from smallgain_jax.penalties.gates import jumprelu as jumprelu
from smallgain_jax.penalties.hoyer import Hoyer as Hoyer
from smallgain_jax.penalties.least_squares import LeastSquaresResult as LeastSquaresResult
from smallgain_jax.penalties.least_squares import (
    reweighted_least_squares as reweighted_least_squares,
)
from smallgain_jax.penalties.nodes import OnNodes as OnNodes
from smallgain_jax.penalties.separable import LogSparsity as LogSparsity
from smallgain_jax.penalties.separable import SmoothedL1 as SmoothedL1
