"""Wanda: weights are judged by magnitude times the size of their input, each output by itself."""

from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import largest_per_output, whole_share
from slrprop.forms import Sparse
from slrprop.methods.base import DensitySettings
from slrprop.methods.calibrated import CalibratedSettings


class WandaSettings(DensitySettings, CalibratedSettings):
    """Wanda: of every output the weights of largest magnitude times input norm stay (size only: no faster).

    As published with ``sequential=False, bias_correction=False, refit_head=False``.
    """

    source = "Sun, Liu, Bair, Kolter, ICLR 2024, Eq 1"

    def stored_numbers(self, m: int, n: int) -> int:
        return n * whole_share(m, self.density)

    def fit(self, task: Regression) -> Sparse:
        """The chosen weights as they are."""
        norms = (task.covariance.diagonal().clamp_min(0) + task.mean**2).sqrt()
        return Sparse.of(task.weight, support(task.weight, norms, whole_share(len(norms), self.density)))


def support(weight: Tensor, norms: Tensor, per_output: int) -> Tensor:
    """Mask (m, n) of the ``per_output`` largest ``|w_ij| * |x_i|_2`` of each output j; ``norms`` is (m,)."""
    return largest_per_output(weight.abs() * norms[:, None], per_output)
