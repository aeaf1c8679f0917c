"""Scores that need no evaluation of the network. All are float64, one per neuron, larger is more relevant."""

from typing import NamedTuple

import torch
from torch import Tensor

from slrprop.linalg import in_parts


class Scores(NamedTuple):
    """Scores of a layer's inputs (rows, m) and outputs (columns, n)."""

    rows: Tensor
    columns: Tensor


def weight_scores(weight: Tensor) -> Scores:
    """Sums of ``|W|`` over each row and column of the original weight, m x n (Swaminathan et al. 2020)."""
    wide = torch.float64
    parts = [(part.abs().sum(1, dtype=wide), part.abs().sum(0, dtype=wide)) for (part,) in in_parts(weight)]
    return Scores(torch.cat([rows for rows, _ in parts]), torch.stack([columns for _, columns in parts]).sum(0))


def combined(first: Scores, second: Scores) -> Scores:
    """The sum of two scores, each scaled to sum 1 (the article names the sums; the scaling is our choice)."""

    def scaled(scores: Tensor) -> Tensor:
        return scores / scores.sum().clamp_min(torch.finfo(torch.float64).tiny)

    return Scores(scaled(first.rows) + scaled(second.rows), scaled(first.columns) + scaled(second.columns))


def highest(scores: Tensor, count: int) -> Tensor:
    """Mask of so many neurons of the highest scores; of equal ones the lower index goes."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.cpu().argsort(stable=True)[len(scores) - count :]] = True
    return mask


def by_channel(scores: Tensor, count: int) -> Tensor:
    """Scores of so many channels (count,) from those of rows, which stand in a block for each."""
    return scores.unflatten(0, (count, -1)).sum(1)


def propagated(weight: Tensor, scores: Tensor) -> Tensor:
    """``|W| @ scores``: scores of a layer's inputs (m,) from those of its outputs (n,), W being m x n.

    Garmendia-Orbegozo et al. 2023, Eq 6, the propagation of Yu et al. 2018 (NISP). Element-wise activations and
    batch norm pass relevance through unchanged.
    """
    return weight.abs().double() @ scores.double()
