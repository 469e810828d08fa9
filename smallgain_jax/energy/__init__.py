"""Energies as pure functions of a state: local energies, families of edges, graphs."""

from smallgain_jax.energy.families import FAMILIES as FAMILIES
from smallgain_jax.energy.families import AsymmetricHinge as AsymmetricHinge
from smallgain_jax.energy.families import DampedGateBenefit as DampedGateBenefit
from smallgain_jax.energy.families import DirectedHinge as DirectedHinge
from smallgain_jax.energy.families import EdgeFamily as EdgeFamily
from smallgain_jax.energy.families import GateBenefit as GateBenefit
from smallgain_jax.energy.families import PairTerm as PairTerm
from smallgain_jax.energy.families import Quadratic as Quadratic
from smallgain_jax.energy.graph import EnergyGraph as EnergyGraph
from smallgain_jax.energy.local import Landau as Landau
from smallgain_jax.energy.local import LocalEnergy as LocalEnergy
from smallgain_jax.energy.losses import Losses as Losses
from smallgain_jax.energy.losses import terms as terms
