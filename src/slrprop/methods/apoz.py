"""Neurons removed by how often they are silent."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slrprop.methods.base import Problem
from slrprop.methods.removal import RemovalSettings, removal
from slrprop.network.base import Network


class APoZSettings(RemovalSettings):
    """APoZ: removes the neurons whose activation is zero for the largest share of the calibration samples.

    For layers that a ReLU follows: no other activation is zero.
    """

    source = "Hu, Peng, Tai, Tang, arXiv 1607.03250, 2016"

    def eligible(self, network: Network) -> tuple[str, ...]:
        return tuple(name for name in super().eligible(network) if network.activation(name) == "relu")


def shares_active(problem: Problem, pairs: Mapping[str, str], settings: APoZSettings) -> dict[str, Tensor]:
    """``1 - APoZ``: the share of samples for which a neuron is not zero, float64 (n,)."""
    active: dict[str, Tensor] = {}
    samples = dict.fromkeys(pairs, 0)
    for flow in problem.network.stream(tuple(pairs), problem.data):
        for first, calls in flow.calls.items():
            for _, y in calls:
                count = (problem.network.activated(first, y) != 0).sum(0, dtype=torch.float64)
                active[first] = active[first] + count if first in active else count
                samples[first] += len(y)
    return {first: count / samples[first] for first, count in active.items()}


METHOD = removal("apoz", APoZSettings, shares_active)
