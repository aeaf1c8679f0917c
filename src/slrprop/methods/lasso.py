"""LASSO: the least error of the layer's outputs with a price on the sum of the weights' magnitudes."""

import numpy as np
import torch
from sklearn.linear_model import lasso_path
from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import damped, largest, least_squares
from slrprop.forms import Sparse
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.methods.density import DensitySettings

BISECTIONS = 30


class LassoSettings(DensitySettings, CalibratedSettings):
    """LASSO: a price on the magnitude of the weights leaves only some (size only: no faster).

    Args:
        refit: least squares on the weights that are left, free of the price.
    """

    refit: bool = True

    source = "Tibshirani, J. Royal Statistical Society B 58, 1996"


def lasso(weight: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``min_s 1/2 (w - s)^T H (w - s) + price * |s|_1`` for every output, by coordinate descent on H (scikit-learn's).

    All outputs pay one price: by bisection the highest with ``count`` non-zero weights or more; if there are more, those of
    least magnitude are dropped. Returns the weight (m, n) and its support.
    """
    m = len(hessian)
    # scikit-learn divides by the number of samples
    root = torch.linalg.cholesky(hessian, upper=True).numpy() * np.sqrt(m)
    targets = root @ weight.numpy()
    gram, products = np.ascontiguousarray(hessian.numpy() * m), np.ascontiguousarray((hessian @ weight).numpy() * m)
    low, high = 0.0, float(np.abs(products).max()) / m
    found, denser = np.zeros(weight.shape), weight.numpy()
    for _ in range(BISECTIONS):
        if np.count_nonzero(denser) == count or not high > low:
            break
        price = (low + high) / 2 if low else high / 4
        for j in range(weight.shape[1]):
            _, path, _ = lasso_path(
                root, targets[:, j], alphas=[price], precompute=gram, Xy=products[:, j], coef_init=np.asfortranarray(found[:, j]),
                tol=1e-6, max_iter=10_000,
            )  # fmt: skip
            found[:, j] = path[:, 0]
        if np.count_nonzero(found) >= count:
            low, denser = price, found.copy()
        else:
            high = price
    kept = torch.from_numpy(denser)
    support = largest(kept.abs(), count)
    return torch.where(support, kept, 0), support


def fit(task: Regression, settings: LassoSettings) -> Sparse:
    """The weights that are worth their price."""
    hessian = damped(task.covariance)
    weight, support = lasso(task.weight, hessian, settings.stored_numbers(*task.weight.shape))
    return Sparse.of(least_squares(hessian, task.weight, support) if settings.refit else weight, support)


METHOD = calibrated("lasso", LassoSettings, fit)
