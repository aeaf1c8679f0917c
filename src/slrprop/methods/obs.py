"""OBS: weights are removed by what their removal costs once the others have made up for it."""

from functools import partial
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from slrprop.checks import require_choice
from slrprop.errors import SlrpropError
from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import ITERATIONS, SupportedSquares, damped, largest, least_squares, whole_share
from slrprop.forms import Sparse
from slrprop.linalg import passed_on
from slrprop.methods.base import DensitySettings
from slrprop.methods.calibrated import CalibratedSettings

STEPS = 10
DEAR = 1 << 27  # numbers of all outputs' Hessians, beyond which their least squares take minutes
BLOCK = 128
ROUGHLY = 4  # iterations of the least squares between two steps

VARIANTS = ("gradual", "one_shot", "sparsegpt")


class OBSSettings(DensitySettings, CalibratedSettings):
    """OBS: the weights that the others can't make up for stay, and the others do (size only: no faster).

    Args:
        variant: ``gradual`` removes in steps, with least squares on what is left after each; ``one_shot`` removes once;
            ``sparsegpt`` goes once over the inputs in blocks of 128 (the layer's own squared error only).
        sensitivity: weigh outputs by their effect on the network's outputs; without it the layer's own squared error counts.
    """

    variant: Annotated[str, partial(require_choice, choices=VARIANTS)] = "gradual"
    sensitivity: bool = True

    source = "Hassibi, Stork, NIPS 1992, Eq 5; layer-wise: Dong, Chen, Pan, NIPS 2017; sparsegpt: Frantar, Alistarh, ICML 2023"

    @property
    def weighted(self) -> bool:
        return self.sensitivity and self.variant != "sparsegpt"

    def fit(self, task: Regression) -> Sparse:
        """The kept weights, moved to make up for the others."""
        hessian, count = damped(task.covariance), self.stored_numbers(*task.weight.shape)
        if self.variant == "sparsegpt":
            return Sparse.of(*sparsegpt(task.weight, hessian, self.density))
        prune = gradual if self.variant == "gradual" else one_shot
        return Sparse.of(*prune(task.weight, hessian, count, task.metric))


def saliency(weight: Tensor, hessian: Tensor, metric: Tensor | None = None) -> Tensor:
    """``w_q^2 / (2 [H^-1]_qq)`` of every weight (m, n) with all others present, times the metric's diagonal."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).diagonal()
    return weight**2 / (2 * inverse[:, None]) * (1 if metric is None else metric.diagonal())


def one_shot(weight: Tensor, hessian: Tensor, count: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Remove all but ``count`` weights at once, and solve for those; (weight, support)."""
    support = largest(saliency(weight, hessian, metric), count)
    return least_squares(hessian, weight, support, metric), support


def gradual(
    weight: Tensor, hessian: Tensor, count: int, metric: Tensor | None = None, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Remove weights in ``steps`` steps of equal factors, solve for the others after each; (weight, support).

    Where the n least squares on all the inputs would be dear (such as 1057 inputs for each of 120 outputs, 183 of 4000), the
    first step goes straight to supports that are not.
    """
    m, n = weight.shape
    first = min(1.0, (DEAR / n) ** 0.5 / m)
    support = torch.ones_like(weight, dtype=torch.bool)
    found, costs = weight, saliency(weight, hessian, metric)
    for step in range(1, steps + 1):
        share = count if step == steps else round(m * n * first * (count / (m * n * first)) ** (step / steps))
        support = largest(torch.where(support, costs, -1), max(count, min(share, m * n)))
        squares = SupportedSquares(hessian, support)
        found = squares.solve(weight, metric, ROUGHLY if step < steps else ITERATIONS, found)
        if step < steps:
            costs = squares.removal_costs(found) * (1 if metric is None else metric.diagonal())
        del squares  # before there is another
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

    def kept(i: int, row: np.ndarray) -> np.ndarray:
        if i % block == 0:
            stop = min(m, i + block)
            costs = found[i:stop] ** 2 / upper.diagonal()[i:stop, None] ** 2
            support[i:stop] = largest(costs, whole_share(stop * n, density) - whole_share(i * n, density))
        return row * support[i].numpy()

    passed_on(found.numpy(), upper.numpy(), kept, block)
    return found, support
