"""DDLR, data-driven low rank: the lowest rank, by its convex relaxation, that keeps a layer's response."""

import torch
from torch import Tensor

from slrprop.fit.admm import TOLERANCE, singular_value_threshold
from slrprop.forms import Dense, LowRank
from slrprop.linalg import truncated_svd
from slrprop.methods.constrained import ConstrainedSettings


def numerical_rank(weight: Tensor) -> int:
    """Singular values above the solver's tolerance, relative to the largest; at least 1.

    The threshold's own zeros are zeros to rounding (1e-15 of the largest); what the iteration left below its tolerance can't
    be told from zero either, and takes no more than the solver's own error with it.
    """
    s = torch.linalg.svdvals(weight)
    return max(1, int((s > TOLERANCE * s[0]).sum()))


def factored(weight: Tensor) -> LowRank | Dense:
    """A weight as two factors; as one matrix where they would hold more numbers."""
    (m, n), rank = weight.shape, numerical_rank(weight)
    return Dense(weight) if rank * (m + n) >= m * n else LowRank.from_svd(truncated_svd(weight, rank))


class DDLRSettings(ConstrainedSettings):
    """DDLR: the least nuclear norm under a bound on the change of the outputs."""

    source = "Papadimitriou, Jain, arXiv 2107.05787, 2021"
    proximal, form_of = staticmethod(singular_value_threshold), staticmethod(factored)
