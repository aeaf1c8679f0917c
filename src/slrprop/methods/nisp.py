"""NISP: neurons removed by importance propagated back from the network's final response."""

from collections.abc import Mapping
from typing import Literal

import torch
from scipy.stats import rankdata
from torch import Tensor

from slrprop.methods.base import Problem
from slrprop.methods.removal import RemovalSettings
from slrprop.relevance.simple import by_channel, propagated

RESPONSES = 2000  # samples that feature selection ranks


class NISPSettings(RemovalSettings):
    """NISP: removes the neurons with the least importance, propagated back from the final response by ``|W|``.

    ``s_k = |W_(k+1)| s_(k+1)``; activations and batch norm pass importance through.

    Args:
        start: what the recursion starts from: ``responses``, the neurons before the last dense layer ranked by
            infinite feature selection, as in the article; ``outputs``, importance 1 for each of its outputs.
    """

    start: Literal["responses", "outputs"] = "responses"

    source = "Yu et al., CVPR 2018; Roffo, Melzi, Cristani, ICCV 2015"

    def scores(self, problem: Problem, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """Importance of every neuron between the layers of a pair, float64 (n,), by the recursion of NISP."""
        known: dict[str, Tensor] = {}  # of a layer's inputs

        def of_inputs(name: str) -> Tensor:
            if name not in known:
                following = problem.network.next_layer(name)
                known[name] = torch.ones(
                    problem.network.shape(name)[0], dtype=torch.float64
                )  # for a network of circles
                if following is not None:
                    outputs = by_channel(of_inputs(following), problem.network.shape(name)[1])
                    known[name] = propagated(problem.weight(name).cpu(), outputs)
                elif self.start == "responses":
                    known[name] = infinite_selection(problem.calibration.pairs.samples(name, {})[0][:RESPONSES])
                else:
                    known[name] = problem.weight(name).cpu().double().abs().sum(1)
            return known[name]

        return {first: of_inputs(following) for first, following in pairs.items()}


def infinite_selection(x: Tensor) -> Tensor:
    """Infinite feature selection of the columns of x (p x m): their energies, float64 (m,), larger is more important.

    ``(I - r A)^-1 1 - 1`` with ``A = (max(s_i, s_j) + 1 - |rank correlation|) / 2`` and ``r = 0.9 / rho(A)``, s being
    standard deviations scaled to 1 at most. A constant column counts as known from the others.
    """
    ranks = torch.from_numpy(rankdata(x.cpu().double().numpy(), axis=0))
    apart = (1 - torch.corrcoef(ranks.T).abs()).nan_to_num(0).reshape(x.shape[1], -1)  # none where a column is constant
    deviation = x.cpu().double().std(0, correction=0)
    spread = torch.maximum(deviation[:, None], deviation) / deviation.max().clamp_min(1e-300)
    affinity = (spread + apart) / 2
    ones = torch.ones(len(affinity), dtype=torch.float64)
    radius = torch.linalg.eigvalsh(affinity)[-1].clamp_min(1e-300)  # of a matrix without negative entries
    return torch.linalg.solve(torch.eye(len(ones), dtype=torch.float64) - 0.9 / radius * affinity, ones) - 1
