"""Stability margins of optimizers as a budget: measured, priced, and spent where it pays."""

from smallgain_jax.allocate import Allocation as Allocation
from smallgain_jax.allocate import allocate as allocate
from smallgain_jax.curvature import AlwaysActive as AlwaysActive
from smallgain_jax.curvature import Curvature as Curvature
from smallgain_jax.curvature import Ramp as Ramp
from smallgain_jax.curvature import Sigmoid as Sigmoid
from smallgain_jax.curvature import hessian_row_sums as hessian_row_sums
from smallgain_jax.energy import AsymmetricHinge as AsymmetricHinge
from smallgain_jax.energy import DampedGateBenefit as DampedGateBenefit
from smallgain_jax.energy import DirectedHinge as DirectedHinge
from smallgain_jax.energy import EdgeFamily as EdgeFamily
from smallgain_jax.energy import EnergyGraph as EnergyGraph
from smallgain_jax.energy import GateBenefit as GateBenefit
from smallgain_jax.energy import Landau as Landau
from smallgain_jax.energy import LocalEnergy as LocalEnergy
from smallgain_jax.energy import PairTerm as PairTerm
from smallgain_jax.energy import Quadratic as Quadratic
