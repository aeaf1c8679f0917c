"""Removing neurons between dense layers: smaller dense layers, the next layer's weights refitted.

A criterion scores the neurons between a layer and the dense layer that reads it. Those that stay, the inputs of the
next layer, get its weights anew by least squares; what the removed ones gave on average goes into its bias.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slrprop.checks import require_keep
from slrprop.errors import SlrpropError
from slrprop.factors import Narrowed
from slrprop.losses import rows_of
from slrprop.methods.base import Decision, Method, Problem
from slrprop.network.base import Network
from slrprop.network.chain import Chain
from slrprop.regression import DAMPING, Compressed, Regression

Score = Callable[[Problem, Mapping[str, str], Any], dict[str, Tensor]]


def kept_count(count: int, keep: float) -> int:
    """How many of ``count`` neurons stay: the nearest whole number, at least one."""
    return max(1, int(count * keep + 0.5))


def most_relevant(scores: Tensor, keep: float) -> Tensor:
    """Mask of the neurons that stay: the highest scores; of equal ones the lower index goes."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.cpu().argsort(stable=True)[len(scores) - kept_count(len(scores), keep) :]] = True
    return mask


def refitted(task: Regression, rows: Tensor) -> Tensor:
    """The layer's weights (kept x n) for the inputs that stay, by least squares; a ridge pulls them to the old ones."""
    left = task.damped(DAMPING)[rows][:, rows]
    pull = task.damped(DAMPING)[rows] - task.covariance[rows]
    right = task.covariance[rows] @ task.weight + pull @ task.weight
    return torch.cholesky_solve(right, torch.linalg.cholesky(left))
