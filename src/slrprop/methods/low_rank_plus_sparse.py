"""Low rank plus sparse: a few directions for all weights, and single weights where those are not enough."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from slrprop.checks import Count, Rate, require_choice
from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import (
    DAMPING,
    SupportedSquares,
    damped,
    largest,
    largest_per_output,
    squared_error,
    whole_share,
)
from slrprop.forms import LowRank, LowRankPlusSparse, Sparse
from slrprop.linalg import reduced_rank
from slrprop.methods import obs
from slrprop.methods.base import RankSettings, ranks_for
from slrprop.methods.calibrated import CalibratedSettings

Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # left (m, k), right (k, n), sparse weight (m, n), its support


VARIANTS = ("hassle", "grebdec", "oats")


class LowRankPlusSparseSettings(RankSettings, CalibratedSettings):
    """Low rank plus sparse: factors for what all weights share, single weights for the rest (size only: no faster).

    Args:
        density: share of the weights that the sparse part keeps.
        variant: ``hassle``: gradual OBS and the best low rank in turn; ``grebdec``: the largest entries of the rest; ``oats``:
            truncated SVD and thresholding of the weight scaled by its inputs (the layer's own squared error only).
        sensitivity: weigh outputs by their effect on the network's outputs; without it the layer's own squared error counts.
    """

    rank: Count = 2
    density: Rate = 0.02
    variant: Annotated[str, partial(require_choice, choices=VARIANTS)] = "hassle"
    sensitivity: bool = True

    source = "hassle: Makni, Behdin, Xu, Ponomareva, Mazumder, ICML 2025; grebdec: Yu, Liu, Wang, Tao, CVPR 2017; oats: Zhang, Papyan, ICLR 2025"

    @property
    def weighted(self) -> bool:
        return self.sensitivity and self.variant != "oats"

    def stored_numbers(self, m: int, n: int) -> int:
        kept = n * whole_share(m, self.density) if self.variant == "oats" else whole_share(m * n, self.density)
        return self.rank * (m + n) + kept

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        """Both parts with about as many numbers."""
        return [
            {"rank": rank, "density": rank * (m + n) / (m * n)}
            for rank in ranks_for(m, n)
            if 2 * rank * (m + n) < m * n
        ]

    def fit(self, task: Regression) -> LowRank | LowRankPlusSparse:
        """Both parts; the low rank alone at density 0."""
        weight, hessian = task.weight, damped(task.covariance)
        m, n = weight.shape
        count = self.stored_numbers(m, n) - self.rank * (m + n)
        metric = torch.eye(n, dtype=torch.float64) if task.metric is None else task.metric
        if self.variant == "oats":
            squares = task.covariance.diagonal().clamp_min(0) + task.mean**2
            norms = damped(squares.diag(), DAMPING).diagonal().sqrt()
            parts = oats(weight, norms, self.rank, count // n)
        elif self.variant == "grebdec":
            parts = grebdec(weight, hessian, metric, self.rank, count)
        else:
            parts = hassle(weight, hessian, metric, self.rank, count)
        left, right, sparse, support = parts
        return LowRankPlusSparse(LowRank(left, right), Sparse.of(sparse, support)) if count else LowRank(left, right)


def _alternated(
    weight: Tensor,
    hessian: Tensor,
    metric: Tensor,
    rank: int,
    rounds: int,
    fit_sparse: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Parts:
    """The best low rank of what the sparse part leaves, the sparse part of what that leaves, and so on; the best round."""
    root, sparse, best = torch.linalg.cholesky(metric), torch.zeros_like(weight), None
    left, right = weight[:, :0], weight[:0]
    for step in range(rounds):
        if rank:
            left, right = reduced_rank(weight - sparse, hessian, root, rank)
        rest = weight - left @ right
        sparse, support = fit_sparse(rest, step)
        error = squared_error(rest, sparse, hessian, metric)
        if best is None or error < best[0]:
            best = error, (left, right, sparse, support)
        if not support.any():  # nothing that the next round could start from
            break
    assert best is not None
    return best[1]


def grebdec(weight: Tensor, hessian: Tensor, metric: Tensor, rank: int, count: int, rounds: int = 20) -> Parts:
    """Alternate the best low rank for the outputs and the largest entries of the rest (Yu, Liu, Wang, Tao 2017).

    Their objective, ``min |Y - (L + S) X|``, with the low rank in closed form where they take greedy bilateral steps. An entry's size is
    what dropping it adds to the error, ``r^2 H_ii G_jj``.
    """
    sizes = hessian.diagonal()[:, None] * metric.diagonal()

    def sparse(rest: Tensor, step: int) -> tuple[Tensor, Tensor]:
        support = largest(rest**2 * sizes, count)
        return torch.where(support, rest, 0), support

    return _alternated(weight, hessian, metric, rank, rounds, sparse)


def oats(weight: Tensor, norms: Tensor, rank: int, per_output: int, rounds: int = 80) -> Parts:
    """Alternate truncated SVD and thresholding of ``D W``, D the inputs' root mean squares (Zhang and Papyan 2025, Algorithm 1).

    Args:
        norms: positive (m,), the diagonal of D.
        per_output: entries kept of each output.
    """
    scaled, sparse = weight * norms[:, None], torch.zeros_like(weight)
    left, right = sparse[:, :0], sparse[:0]
    support = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(rounds):
        u, s, vt = torch.linalg.svd(scaled - sparse, full_matrices=False)
        left, right = u[:, :rank] * s[:rank], vt[:rank]
        rest = scaled - left @ right
        support = largest_per_output(rest.abs(), per_output)
        sparse = torch.where(support, rest, 0)
    return left / norms[:, None], right, sparse / norms[:, None], support


def hassle(weight: Tensor, hessian: Tensor, metric: Tensor, rank: int, count: int, rounds: int = 8, refits: int = 12) -> Parts:  # fmt: skip
    """OBS for the sparse part, its values by least squares, and the best low rank of the rest, in turn.

    In the manner of HASSLE-free (Makni, Behdin, Xu, Ponomareva, Mazumder 2025), with gradual OBS as the sparse step, and the
    outputs weighed too. After ``rounds`` the places stay, and both parts are refitted in turn ``refits`` times.
    """
    found, support = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    squares: SupportedSquares | None = None
    rounds, refits = (rounds, refits) if rank else (1, 0)

    def sparse(rest: Tensor, step: int) -> tuple[Tensor, Tensor]:
        nonlocal found, support, squares
        if step < rounds:
            found, support = obs.gradual(rest, hessian, count, metric, obs.STEPS if step == rounds - 1 else 4)
        else:
            squares = squares or SupportedSquares(hessian, support)
            found = squares.solve(rest, metric, obs.ROUGHLY, found)
        return found, support

    return _alternated(weight, hessian, metric, rank, rounds + refits, sparse)
