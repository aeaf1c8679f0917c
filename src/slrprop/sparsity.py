"""Which weights to keep, and what the kept ones should be: what the sparse methods share.

A weight W is m x n (inputs x outputs), C the m x m covariance of its inputs. A method's error is ``tr((W - S)^T C (W - S) G)``,
the mean squared error of the layer's outputs (G = 1), or their effect on the loss (G, n x n, the Gauss-Newton metric).
Singular covariances are the normal case: every Hessian here is ``C + damping * mean(diag C) * I``, so of all weights with the
same error the one nearest to W is taken. A covariance of zero (inputs that never vary) counts as the identity.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slrprop.errors import SlrpropError

DAMPING = 1e-3


def damped(matrix: Tensor, damping: float = DAMPING) -> Tensor:
    """``C + damping * mean(diag C) * I`` in float64, exactly symmetric."""
    full = matrix.double()
    middle = float(full.diagonal().mean()) if len(full) else 0.0
    eye = torch.eye(len(full), dtype=torch.float64, device=full.device)
    return (full + full.T) / 2 + damping * middle * eye if middle > 0 else eye


def whole_share(count: int, density: float) -> int:
    """How many of ``count`` are kept at a density; at least one, unless the density is 0."""
    return min(count, max(1, round(count * density))) if density > 0 else 0


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores; ties fall to the lower index."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.reshape(-1).argsort(descending=True, stable=True)[:count]] = True
    return mask.reshape(scores.shape)


def largest_per_output(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores in each column (output)."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(0, scores.argsort(dim=0, descending=True, stable=True)[:count], True)


class SupportedSquares:
    """Least squares of every output on its own support: the factorised Hessians, to solve and to judge by.

    Args:
        hessian: positive definite (m, m).
        support: bool (m, n).
    """

    def __init__(self, hessian: Tensor, support: Tensor) -> None:
        self.hessian, self.support = hessian, support
        self._parts: list[tuple[Tensor, Tensor]] = []
        for column in support.unbind(1):
            index = column.nonzero()[:, 0]
            factor, failed = torch.linalg.cholesky_ex(hessian[index[:, None], index])
            if int(failed):
                raise SlrpropError("the Hessian of the layer's inputs is not positive definite; use more damping")
            self._parts.append((index, factor))

    def _outputs(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        return ((j, index, factor) for j, (index, factor) in enumerate(self._parts) if len(index))

    def solve(self, weight: Tensor, metric: Tensor | None = None, sweeps: int = 1, start: Tensor | None = None) -> Tensor:  # fmt: skip
        """The m x n weight on the support with the least error against ``weight``.

        Args:
            metric: positive definite (n, n) coupling of the outputs. Then each output is solved for in turn with the others held
                (block Gauss-Seidel, which descends to the optimum), ``sweeps`` times from ``start``; exact at once without.
        """
        found = torch.zeros_like(weight) if start is None else torch.where(self.support, start, 0)
        coupled = metric is not None and bool((metric - metric.diagonal().diag()).any())
        rest = weight - found
        for _ in range(sweeps if coupled else 1):
            for j, index, factor in self._outputs():
                wanted = rest @ (metric[:, j] / metric[j, j]) + found[:, j] if metric is not None and coupled else weight[:, j]  # fmt: skip
                right = self.hessian[index] @ wanted
                found[index, j] = torch.cholesky_solve(right[:, None], factor)[:, 0]
                rest[:, j] = weight[:, j] - found[:, j]
        return found

    def removal_costs(self, weight: Tensor) -> Tensor:
        """The error that removing one supported weight adds, the others moved to make up for it: ``w^2 / (2 [H^-1]_qq)``.

        H is the Hessian on that output's support (OBS, Hassibi and Stork 1993, Eq 5); 0 off the support.
        """
        costs = torch.zeros_like(weight)
        for j, index, factor in self._outputs():
            costs[index, j] = weight[index, j] ** 2 / (2 * torch.cholesky_inverse(factor).diagonal())
        return costs


def least_squares(hessian: Tensor, weight: Tensor, support: Tensor, metric: Tensor | None = None, sweeps: int = 10) -> Tensor:  # fmt: skip
    """The m x n weight on a support with the least error against ``weight``, see :class:`SupportedSquares`."""
    return SupportedSquares(hessian, support).solve(weight, metric, sweeps)


def squared_error(weight: Tensor, other: Tensor, hessian: Tensor, metric: Tensor | None = None) -> float:
    """``tr((W - S)^T H (W - S) G)``."""
    apart = weight - other
    return float(((hessian @ apart) * (apart if metric is None else apart @ metric)).sum())
