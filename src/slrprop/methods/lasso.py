"""LASSO: the least error of the layer's outputs with a price on the sum of the weights' magnitudes."""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import lasso_path
from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import damped, largest, least_squares
from slrprop.forms import Sparse
from slrprop.methods.base import DensitySettings
from slrprop.methods.calibrated import CalibratedSettings

BISECTIONS = 30


class LassoSettings(DensitySettings, CalibratedSettings):
    """LASSO: a price on the magnitude of the weights leaves only some (size only: no faster).

    Args:
        refit: least squares on the weights that are left, free of the price.
    """

    refit: bool = True

    source = "Tibshirani, J. Royal Statistical Society B 58, 1996"

    def fit(self, task: Regression) -> Sparse:
        """The weights that are worth their price."""
        hessian = damped(task.covariance)
        weight, support = lasso(task.weight, hessian, self.stored_numbers(*task.weight.shape))
        return Sparse.of(least_squares(hessian, task.weight, support) if self.refit else weight, support)


def lasso(weight: Tensor, hessian: Tensor, count: int, grouped: bool = False) -> tuple[Tensor, Tensor]:
    """``min_s 1/2 (w - s)^T H (w - s) + price * |s|_1`` for every output, by coordinate descent on H (scikit-learn's).

    All outputs pay one price: by bisection the highest with ``count`` non-zero weights or more; if there are more, those of
    least magnitude are dropped. Returns the weight (m, n) and its support.

    Args:
        grouped: the price is on the norm of each input's weights instead, ``count`` is of inputs, and the support (m,).
    """
    m, n = weight.shape
    # scikit-learn divides by the number of samples
    root = np.asfortranarray(torch.linalg.cholesky(hessian, upper=True).numpy() * np.sqrt(m))
    targets, given = root @ weight.numpy(), (hessian @ weight).numpy() * m
    gram: Any = False if grouped else np.ascontiguousarray(hessian.numpy() * m)

    def sizes(some: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.linalg.norm(some, axis=1) if grouped else np.abs(some)
        return found

    low, high = 0.0, float(sizes(given).max()) / m
    found, denser = np.zeros(weight.shape), weight.numpy()
    for _ in range(BISECTIONS):
        if np.count_nonzero(sizes(denser)) == count or not high > low:
            break
        price = (low + high) / 2 if low else high / 4
        for j in [slice(None)] if grouped else range(n):
            _, path, _ = lasso_path(
                root, targets[:, j], alphas=[price], precompute=gram, Xy=given[:, j], coef_init=np.asfortranarray(found[:, j].T),
                tol=1e-6, max_iter=10_000,
            )  # fmt: skip
            found[:, j] = path[..., 0].T
        if np.count_nonzero(sizes(found)) >= count:
            low, denser = price, found.copy()
        else:
            high = price
    support = largest(torch.from_numpy(sizes(denser)), count)
    return torch.where(support[:, None] if grouped else support, torch.from_numpy(denser), 0), support
