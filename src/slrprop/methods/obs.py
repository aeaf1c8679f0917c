"""OBS: weights are removed by what their removal costs once the others have made up for it."""

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.sparsity import SupportedSquares, damped, largest, least_squares, whole_share

STEPS = 10
BLOCK = 128
AFFORDABLE = 1024  # inputs per output for which a Hessian is factorised in the first step of the gradual form


def saliency(weight: Tensor, hessian: Tensor, metric: Tensor | None = None) -> Tensor:
    """``w_q^2 / (2 [H^-1]_qq)`` of every weight (m, n) with all others present, times the metric's diagonal."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).diagonal()
    return _weighted(weight**2 / (2 * inverse[:, None]), metric)


def _weighted(costs: Tensor, metric: Tensor | None) -> Tensor:
    return costs if metric is None else costs * metric.diagonal()


def one_shot(weight: Tensor, hessian: Tensor, count: int, metric: Tensor | None = None, sweeps: int = 10) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Remove all but ``count`` weights at once, and solve for those; (weight, support)."""
    support = largest(saliency(weight, hessian, metric), count)
    return least_squares(hessian, weight, support, metric, sweeps), support


def gradual(
    weight: Tensor, hessian: Tensor, count: int, metric: Tensor | None = None, steps: int = STEPS, sweeps: int = 2
) -> tuple[Tensor, Tensor]:
    """Remove weights in ``steps`` steps of equal factors, solve for the others after each; (weight, support).

    Time: least squares on n supports per step. So where that is dear, the first step goes straight to 1024 weights per output.
    """
    m, n = weight.shape
    first = min(1.0, AFFORDABLE / max(m, 1))
    support = torch.ones_like(weight, dtype=torch.bool)
    found, costs = weight, saliency(weight, hessian, metric)
    for step in range(1, steps + 1):
        share = count if step == steps else round(m * n * first * (count / (m * n * first)) ** (step / steps))
        support = largest(torch.where(support, costs, -1), max(count, min(share, m * n)))
        squares = SupportedSquares(hessian, support)
        found = squares.solve(weight, metric, sweeps if step < steps else 5 * sweeps, found)
        if step < steps:
            costs = _weighted(squares.removal_costs(found), metric)
    return found, support


def sparsegpt(weight: Tensor, hessian: Tensor, density: float, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """One pass over the inputs; what is removed there is made up for by the inputs not yet visited; (weight, support).

    Frantar and Alistarh 2023, Algorithm 1: the Cholesky factor of the inverse Hessian, supports chosen block by block.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper, failed = torch.linalg.cholesky_ex((inverse + inverse.T) / 2, upper=True)
    if int(failed):
        raise SlrpropError("the inverse Hessian of the layer's inputs is not positive definite; use more damping")
    found, support = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    m, n = weight.shape
    for start in range(0, m, block):
        stop = min(m, start + block)
        costs = found[start:stop] ** 2 / upper.diagonal()[start:stop, None] ** 2
        support[start:stop] = largest(costs, whole_share(stop * n, density) - whole_share(start * n, density))
        errors = torch.zeros_like(found[start:stop])
        for i in range(start, stop):
            kept = torch.where(support[i], found[i], 0)
            errors[i - start] = (found[i] - kept) / upper[i, i]
            found[i] = kept
            found[i + 1 : stop] -= torch.outer(upper[i, i + 1 : stop], errors[i - start])
        found[stop:] -= upper[start:stop, stop:].T @ errors
    return found, support
