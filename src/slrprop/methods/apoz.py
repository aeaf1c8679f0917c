"""Neurons removed by how often they are silent."""

from collections.abc import Mapping

from torch import Tensor

from slrprop.methods.base import Problem
from slrprop.methods.removal import RemovalSettings, averages
from slrprop.network.base import Network


class APoZSettings(RemovalSettings):
    """APoZ: removes the neurons whose activation is zero for the largest share of the calibration samples.

    For layers that a ReLU follows: no other activation is zero.
    """

    source = "Hu, Peng, Tai, Tang, arXiv 1607.03250, 2016"

    def eligible(self, network: Network) -> tuple[str, ...]:
        return tuple(name for name in super().eligible(network) if network.activation(name) == "relu")

    def scores(self, problem: Problem, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """``1 - APoZ``: the share of samples for which a neuron is not zero, float64 (n,)."""
        return averages(problem, pairs, lambda first, _, y, flow: problem.network.activated(first, y) != 0)
