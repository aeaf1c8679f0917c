"""Which weights to keep, and what the kept ones should be: what the sparse methods share.

A weight W is m x n (inputs x outputs), C the m x m covariance of its inputs. A method's error is ``tr((W - S)^T C (W - S) G)``,
the mean squared error of the layer's outputs (G = 1), or their effect on the loss (G, n x n, the Gauss-Newton metric).
Singular covariances are the normal case: every Hessian here is ``C + damping * mean(diag C) * I``, so of all weights with the
same error the one nearest to W is taken. A covariance of zero (inputs that never vary) counts as the identity.
"""

import collections
from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import blas, lapack
from scipy.sparse import csr_array
from threadpoolctl import ThreadpoolController
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.linalg import conjugate_gradients
from slrprop.memory import bound

DAMPING = 1e-3
ITERATIONS = 30  # of conjugate gradients
THIN, SMALL, CHUNK = 0.02, 1 << 20, 4096
POOLS = ThreadpoolController()


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
    return largest_per_output(scores.reshape(-1, 1), count).reshape(scores.shape)


def largest_per_output(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores in each column (output); ties fall to the lower index. By selection, not by sorting."""
    m = len(scores)
    if not 0 < count < m:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    bound = scores.kthvalue(m - count + 1, dim=0).values
    above, level = scores > bound, scores == bound
    missing = count - above.sum(0)
    return above | (level & (level.cumsum(0) <= missing)) if (level.sum(0) > missing).any() else above | level


class SupportedSquares:
    """Least squares of every output on its own support: the factorised Hessians, to solve and to judge by.

    Time and memory: the sum over outputs of the cube, and of the square, of the weights kept (4 bytes each, up to the bound of
    :mod:`slrprop.memory`; beyond it time again).

    Args:
        hessian: positive definite (m, m).
        support: bool (m, n).
    """

    def __init__(self, hessian: Tensor, support: Tensor) -> None:
        self.hessian, self.support = hessian, support
        self._matrix = hessian.numpy()
        indices = [column.nonzero()[:, 0].numpy() for column in support.T]
        self._places = [(output, index) for output, index in enumerate(indices) if len(index)]
        self._packed: dict[int, np.ndarray] = {}
        self._room = bound()
        self._inverse: dict[int, np.ndarray] = {}  # the diagonal of each output's inverse Hessian

    def _factorised(self, index: np.ndarray) -> np.ndarray:
        """The inverse V of the upper Cholesky factor of the Hessian on a support (s, s): its inverse is ``V V^T``."""
        inner = self._matrix.take(index, 0).take(index, 1)
        upper, failed = lapack.dpotrf(inner.T, overwrite_a=True)
        if failed:
            raise SlrpropError("the Hessian of the layer's inputs is not positive definite; use more damping")
        return lapack.dtrtri(upper, overwrite_c=True)[0]

    def _outputs(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Every output with weights, its support and factor (packed by columns), those that are too many to keep made anew each time.

        On one thread: the matrices are too small to share, and SciPy's threads would wait for each other beside torch's.
        """
        with POOLS.limit(limits=1, user_api="blas"):
            for output, index in self._places:
                packed = self._packed.get(output)
                if packed is None:
                    factor = self._factorised(index)
                    self._inverse[output] = np.square(factor).sum(1)
                    packed = lapack.dtrttp(factor)[0]
                    self._room -= packed.nbytes
                    if self._room >= 0:
                        self._packed[output] = packed
                yield output, index, packed

    def _each(self, right: Tensor) -> Tensor:
        """``H^-1`` times a right side (m, n), of every output on its own support; 0 elsewhere."""
        found, rows = torch.zeros_like(right.T), right.T.contiguous().numpy()
        for output, index, packed in self._outputs():
            inner = blas.dtpmv(len(index), packed, rows[output, index], trans=1, overwrite_x=True)
            found.numpy()[output, index] = blas.dtpmv(len(index), packed, inner, overwrite_x=True)
        return found.T.contiguous()

    def solve(
        self, weight: Tensor, metric: Tensor | None = None, iterations: int = ITERATIONS, start: Tensor | None = None
    ) -> Tensor:
        """The m x n weight on the support with the least error against ``weight``.

        Args:
            metric: positive definite (n, n) coupling of the outputs; exact at once without. With it by conjugate gradients from
                ``start``, preconditioned by the exact solution of every output for itself: the error falls with every one of
                the ``iterations`` (fewer, if the residual is down to 1e-10).
        """
        if metric is None or not (metric - metric.diagonal().diag()).any():
            return self._each(self.hessian @ weight)
        found = torch.zeros_like(weight) if start is None else torch.where(self.support, start, 0)
        rest = torch.where(self.support, self.hessian @ (weight - found) @ metric, 0)
        least, diagonal = 1e-10 * float(rest.norm()), metric.diagonal()
        return conjugate_gradients(
            lambda step: self._curvature(step, metric), rest, found, iterations,
            lambda rest: self._each(rest) / diagonal, lambda rest, _: float(rest.norm()) <= least,
        )  # fmt: skip

    def _curvature(self, step: Tensor, metric: Tensor) -> Tensor:
        """``H step G`` on the support, 0 elsewhere; where that is thin, no other entry is computed."""
        rows, columns = self.support.nonzero(as_tuple=True)
        if len(rows) > THIN * step.numel() or step.numel() < SMALL:
            return torch.where(self.support, self.hessian @ step @ metric, 0)
        left = torch.from_numpy(np.ascontiguousarray((csr_array(step.T.numpy()) @ self.hessian.numpy()).T))
        found = torch.zeros_like(step)
        for some, others in zip(rows.split(CHUNK), columns.split(CHUNK), strict=True):
            found[some, others] = (left[some] * metric[others]).sum(1)
        return found

    def removal_costs(self, weight: Tensor) -> Tensor:
        """The error that removing one supported weight adds, the others moved to make up for it: ``w^2 / (2 [H^-1]_qq)``.

        H is the Hessian on that output's support (OBS, Hassibi and Stork 1993, Eq 5); 0 off the support.
        """
        costs = torch.zeros_like(weight)
        for output, index in self._places:
            if output not in self._inverse:
                collections.deque(self._outputs(), 0)
            costs[index, output] = weight[index, output] ** 2 / torch.from_numpy(2 * self._inverse[output])
        return costs


def least_squares(
    hessian: Tensor, weight: Tensor, support: Tensor, metric: Tensor | None = None, iterations: int = ITERATIONS
) -> Tensor:
    """The m x n weight on a support with the least error against ``weight``, see :class:`SupportedSquares`."""
    return SupportedSquares(hessian, support).solve(weight, metric, iterations)


def squared_error(weight: Tensor, other: Tensor, hessian: Tensor, metric: Tensor | None = None) -> float:
    """``tr((W - S)^T H (W - S) G)``."""
    apart = weight - other
    return float(((hessian @ apart) * (apart if metric is None else apart @ metric)).sum())
