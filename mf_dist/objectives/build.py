"""From an objective's config to its loss."""

from mf_dist.config.objectives import AlphaFlowConfig, ImfConfig, MeanFlowConfig, Objective, SolutionFlowConfig
from mf_dist.models.imf_dit import ImfDiT
from mf_dist.models.network import Network
from mf_dist.objectives.alpha_flow import AlphaFlowLoss
from mf_dist.objectives.base import Loss
from mf_dist.objectives.imf import ImfLoss
from mf_dist.objectives.meanflow import MeanFlowLoss
from mf_dist.objectives.solution_flow import SolutionFlowLoss


def build_loss(net: Network, objective: Objective) -> Loss:
    match objective:
        case MeanFlowConfig():
            return MeanFlowLoss(net, objective)
        case SolutionFlowConfig():
            return SolutionFlowLoss(net, objective)
        case AlphaFlowConfig():
            return AlphaFlowLoss(net, objective)
        case ImfConfig():
            assert isinstance(net, ImfDiT)
            return ImfLoss(net, objective)
    raise AssertionError(f"no loss for {objective}")
