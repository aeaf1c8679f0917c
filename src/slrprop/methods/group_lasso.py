"""Group LASSO: inputs are removed as a whole, at a price on the norm of each input's weights."""

import torch

from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import damped, whole_share
from slrprop.forms import Narrowed
from slrprop.methods.base import DensitySettings
from slrprop.methods.calibrated import CalibratedSettings
from slrprop.methods.lasso import lasso
from slrprop.operators import Operator


class GroupLassoSettings(DensitySettings, CalibratedSettings):
    """Group LASSO: inputs are removed as a whole by a price on the norm of their weights.

    Args:
        density: share of the inputs kept.
        refit: least squares on the inputs that are left, free of the price.
    """

    refit: bool = True

    source = "Yuan, Lin, J. Royal Statistical Society B 68, 2006"

    def treats(self, operator: Operator) -> bool:
        return super().treats(operator) and operator.unit == 1

    def stored_numbers(self, m: int, n: int) -> int:
        return n * whole_share(m, self.density)

    def fit(self, task: Regression) -> Narrowed:
        """The inputs that are worth their price."""
        hessian = damped(task.covariance)
        weight, kept = lasso(task.weight, hessian, whole_share(len(hessian), self.density), grouped=True)
        if self.refit:
            weight = torch.zeros_like(weight)
            inner = hessian[kept]
            weight[kept] = torch.linalg.solve(inner[:, kept], inner @ task.weight)
        return Narrowed.cut(weight, rows=kept)
