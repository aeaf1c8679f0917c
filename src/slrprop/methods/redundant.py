"""Neurons removed because another one has nearly the same weights."""

from collections.abc import Mapping

import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from slrprop.methods.base import Problem
from slrprop.methods.removal import RemovalSettings, kept_count


class RedundantSettings(RemovalSettings):
    """Redundant features: clusters neurons by the angles between their weights and keeps one of each cluster.

    Complete linkage of cosine distances, cut where as many clusters are left as neurons shall stay (the article cuts at a
    threshold); of each cluster the neuron with the longest weight vector stays (the article takes any; we choose).
    """

    source = "Ayinde, Inanc, Zurada, Neural Networks 118, 2019"

    def scores(self, problem: Problem, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """Scores (n,) in float64: the norm of a neuron's weights for the one that stands for its cluster; all others below 0, the longer the higher."""
        found = {}
        for first in pairs:
            vectors = problem.weight(first).T.cpu().double()
            length = vectors.norm(dim=1)
            member = clusters(vectors, kept_count(len(vectors), self.keep))
            best = torch.zeros(len(vectors), dtype=torch.bool)
            for cluster in member.unique():
                inside = (member == cluster).nonzero()[:, 0]
                best[inside[length[inside].argmax()]] = True
            found[first] = torch.where(best, length, length - length.max() - 1)
        return found


def clusters(vectors: Tensor, count: int) -> Tensor:
    """Which of ``count`` clusters each row of ``vectors`` (n x m) belongs to: complete linkage, cosine distance.

    Returns:
        int64 (n,), clusters numbered in no particular order.
    """
    n = len(vectors)
    if n <= count:
        return torch.arange(n)
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    distance = (1 - unit @ unit.T).clamp_min(0)
    return torch.from_numpy(
        AgglomerativeClustering(count, metric="precomputed", linkage="complete").fit_predict(distance)
    )
