"""OBD, optimal brain damage: weights are judged by the diagonal of the Hessian."""

from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import largest
from slrprop.forms import Sparse
from slrprop.methods.base import DensitySettings
from slrprop.methods.calibrated import CalibratedSettings


class OBDSettings(DensitySettings, CalibratedSettings):
    """OBD: the weights whose removal costs most by the Hessian's diagonal stay (size only: no faster).

    The Hessian of the loss is taken as input covariance x metric of the outputs (Kronecker), per layer.

    Args:
        sensitivity: weigh outputs by their effect on the network's outputs; without it the layer's own squared error counts.
    """

    sensitivity: bool = True

    source = "LeCun, Denker, Solla, NIPS 1989, Eq 5"

    def fit(self, task: Regression) -> Sparse:
        """The chosen weights as they are."""
        costs = saliency(task.weight, task.covariance, task.metric)
        return Sparse.of(task.weight, largest(costs, self.stored_numbers(*costs.shape)))


def saliency(weight: Tensor, hessian: Tensor, metric: Tensor | None = None) -> Tensor:
    """``h_kk w_k^2 / 2`` of every weight (m, n), h_kk the product of both diagonals."""
    return hessian.diagonal()[:, None] * weight**2 / 2 * (1 if metric is None else metric.diagonal())
