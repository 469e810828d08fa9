"""Stability margins of optimizers as a budget: measured, priced, and spent where it pays."""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from smallgain_jax import penalties as penalties
from smallgain_jax import presets as presets
from smallgain_jax.allocation.knapsack import Allocation as Allocation
from smallgain_jax.allocation.knapsack import allocate as allocate
from smallgain_jax.graphs.adjoint import AdjointReport as AdjointReport
from smallgain_jax.graphs.batch import BatchResult as BatchResult
from smallgain_jax.graphs.batch import relax_batch as relax_batch
from smallgain_jax.graphs.build import from_edge_list as from_edge_list
from smallgain_jax.graphs.build import from_networkx as from_networkx
from smallgain_jax.graphs.build import from_scipy as from_scipy
from smallgain_jax.graphs.choice import MetricChoice as MetricChoice
from smallgain_jax.graphs.choice import choose_metric as choose_metric
from smallgain_jax.graphs.descent import MajorizedDescentState as MajorizedDescentState
from smallgain_jax.graphs.descent import majorized_descent as majorized_descent
from smallgain_jax.graphs.families import AsymmetricHinge as AsymmetricHinge
from smallgain_jax.graphs.families import DampedGateBenefit as DampedGateBenefit
from smallgain_jax.graphs.families import DirectedHinge as DirectedHinge
from smallgain_jax.graphs.families import EdgeFamily as EdgeFamily
from smallgain_jax.graphs.families import GateBenefit as GateBenefit
from smallgain_jax.graphs.families import PairTerm as PairTerm
from smallgain_jax.graphs.families import Quadratic as Quadratic
from smallgain_jax.graphs.graph import EnergyGraph as EnergyGraph
from smallgain_jax.graphs.local import Landau as Landau
from smallgain_jax.graphs.local import LocalEnergy as LocalEnergy
from smallgain_jax.graphs.multilevel import Cycle as Cycle
from smallgain_jax.graphs.multilevel import Hierarchy as Hierarchy
from smallgain_jax.graphs.multilevel import multilevel as multilevel
from smallgain_jax.graphs.quadratic import QuadraticResult as QuadraticResult
from smallgain_jax.graphs.quadratic import conjugate_gradients as conjugate_gradients
from smallgain_jax.graphs.relaxation import RelaxInfo as RelaxInfo
from smallgain_jax.graphs.relaxation import RelaxResult as RelaxResult
from smallgain_jax.graphs.relaxation import adjoint_report as adjoint_report
from smallgain_jax.graphs.relaxation import relax as relax
from smallgain_jax.graphs.robust import HyperTerm as HyperTerm
from smallgain_jax.graphs.robust import Robust as Robust
from smallgain_jax.limits.closed_forms import gradient_descent_limit as gradient_descent_limit
from smallgain_jax.limits.closed_forms import heavy_ball_limit as heavy_ball_limit
from smallgain_jax.limits.closed_forms import nesterov_limit as nesterov_limit
from smallgain_jax.limits.probe import measured_limit as measured_limit
from smallgain_jax.losses.balance import BalanceFlowState as BalanceFlowState
from smallgain_jax.losses.balance import BalanceInfo as BalanceInfo
from smallgain_jax.losses.balance import balance_flow as balance_flow
from smallgain_jax.losses.balance import balance_gradient as balance_gradient
from smallgain_jax.losses.balance import balance_residual as balance_residual
from smallgain_jax.losses.balance import cosine_matrix as cosine_matrix
from smallgain_jax.losses.balance import interaction_ratio as interaction_ratio
from smallgain_jax.losses.losses import Losses as Losses
from smallgain_jax.losses.losses import terms as terms
from smallgain_jax.losses.newton import BalanceNewtonInfo as BalanceNewtonInfo
from smallgain_jax.losses.newton import BalanceNewtonState as BalanceNewtonState
from smallgain_jax.losses.newton import SmallestCurvature as SmallestCurvature
from smallgain_jax.losses.newton import balance_newton as balance_newton
from smallgain_jax.losses.newton import smallest_curvature as smallest_curvature
from smallgain_jax.losses.sharpness import sharpness as sharpness
from smallgain_jax.losses.training import train_step as train_step
from smallgain_jax.losses.two_phase import TwoPhaseInfo as TwoPhaseInfo
from smallgain_jax.losses.two_phase import TwoPhaseState as TwoPhaseState
from smallgain_jax.losses.two_phase import two_phase as two_phase
from smallgain_jax.networks.certificate import Certificate as Certificate
from smallgain_jax.networks.certificate import LowerBound as LowerBound
from smallgain_jax.networks.certificate import lipschitz_certificate as lipschitz_certificate
from smallgain_jax.networks.certificate import lipschitz_lower_bound as lipschitz_lower_bound
from smallgain_jax.networks.kappa import KappaInfo as KappaInfo
from smallgain_jax.networks.kappa import KappaState as KappaState
from smallgain_jax.networks.kappa import kappa_budget as kappa_budget
from smallgain_jax.networks.layers import Layer as Layer
from smallgain_jax.search.stopping import RelaxStatus as RelaxStatus
from smallgain_jax.spectral.rows import AlwaysActive as AlwaysActive
from smallgain_jax.spectral.rows import Curvature as Curvature
from smallgain_jax.spectral.rows import Ramp as Ramp
from smallgain_jax.spectral.rows import Sigmoid as Sigmoid
from smallgain_jax.spectral.rows import hessian_row_sums as hessian_row_sums
from smallgain_jax.throttling import ThrottleState as ThrottleState
from smallgain_jax.throttling import throttle as throttle
from smallgain_jax.transform import SmallGainInfo as SmallGainInfo
from smallgain_jax.transform import SmallGainState as SmallGainState
from smallgain_jax.transform import TrainingInfo as TrainingInfo
from smallgain_jax.transform import TrainingState as TrainingState
from smallgain_jax.transform import auto_cap as auto_cap
from smallgain_jax.transform import gradnorm as gradnorm
from smallgain_jax.transform import graph_small_gain as graph_small_gain
from smallgain_jax.transform import loss_small_gain as loss_small_gain
from smallgain_jax.transform import small_gain as small_gain

if TYPE_CHECKING:
    from smallgain_jax.tools import hard as hard
    from smallgain_jax.tools import io as io
    from smallgain_jax.tools import live as live
    from smallgain_jax.tools import plots as plots
    from smallgain_jax.tools import report as report
    from smallgain_jax.tools import scenarios as scenarios
    from smallgain_jax.tools import suites as suites
    from smallgain_jax.tools import sweep as sweep
    from smallgain_jax.tools import telemetry as telemetry
    from smallgain_jax.tools import training as training
    from smallgain_jax.tools import validation as validation
    from smallgain_jax.tools.live import relax_in_chunks as relax_in_chunks

__version__ = _version("smallgain_jax")

_TOOLS = (
    "hard",
    "io",
    "live",
    "plots",
    "report",
    "scenarios",
    "suites",
    "sweep",
    "telemetry",
    "training",
    "validation",
)
"""Loaded when first asked for: they bring SciPy and matplotlib, which training does not need."""

__all__ = [
    "AdjointReport",
    "Allocation",
    "AlwaysActive",
    "AsymmetricHinge",
    "BalanceFlowState",
    "BalanceInfo",
    "BalanceNewtonInfo",
    "BalanceNewtonState",
    "BatchResult",
    "Certificate",
    "Curvature",
    "Cycle",
    "DampedGateBenefit",
    "DirectedHinge",
    "EdgeFamily",
    "EnergyGraph",
    "GateBenefit",
    "Hierarchy",
    "HyperTerm",
    "KappaInfo",
    "KappaState",
    "Landau",
    "Layer",
    "LocalEnergy",
    "Losses",
    "LowerBound",
    "MajorizedDescentState",
    "MetricChoice",
    "PairTerm",
    "Quadratic",
    "QuadraticResult",
    "Ramp",
    "RelaxInfo",
    "RelaxResult",
    "RelaxStatus",
    "Robust",
    "Sigmoid",
    "SmallGainInfo",
    "SmallGainState",
    "SmallestCurvature",
    "ThrottleState",
    "TrainingInfo",
    "TrainingState",
    "TwoPhaseInfo",
    "TwoPhaseState",
    "adjoint_report",
    "allocate",
    "auto_cap",
    "balance_flow",
    "balance_gradient",
    "balance_newton",
    "balance_residual",
    "choose_metric",
    "conjugate_gradients",
    "cosine_matrix",
    "from_edge_list",
    "from_networkx",
    "from_scipy",
    "gradient_descent_limit",
    "gradnorm",
    "graph_small_gain",
    "heavy_ball_limit",
    "hessian_row_sums",
    "interaction_ratio",
    "io",
    "kappa_budget",
    "lipschitz_certificate",
    "lipschitz_lower_bound",
    "live",
    "loss_small_gain",
    "majorized_descent",
    "measured_limit",
    "multilevel",
    "nesterov_limit",
    "penalties",
    "plots",
    "presets",
    "relax",
    "relax_batch",
    "relax_in_chunks",
    "report",
    "scenarios",
    "sharpness",
    "small_gain",
    "smallest_curvature",
    "suites",
    "sweep",
    "telemetry",
    "terms",
    "throttle",
    "train_step",
    "training",
    "two_phase",
    "validation",
]


def __getattr__(name: str) -> Any:
    if name in _TOOLS:
        return import_module(f"smallgain_jax.tools.{name}")
    if name == "relax_in_chunks":
        return import_module("smallgain_jax.tools.live").relax_in_chunks
    raise AttributeError(f"module 'smallgain_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
