"""Group LASSO: inputs are removed as a whole, at a price on the norm of each input's weights."""

import torch
from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import damped, largest, whole_share
from slrprop.forms import Narrowed
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.methods.density import DensitySettings
from slrprop.operators import Operator

BISECTIONS = 30
STEPS = 300


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


def shrunk(rows: Tensor, price: float) -> Tensor:
    """The proximal step of the group norm: each row's norm less ``price * sqrt(n)``, at least 0."""
    norms = rows.norm(dim=1, keepdim=True)
    cut = price * rows.shape[1] ** 0.5
    return torch.where(norms > cut, 1 - cut / norms.clamp_min(torch.finfo(rows.dtype).tiny), 0) * rows


def group_lasso(
    weight: Tensor, hessian: Tensor, price: float, size: float, start: Tensor | None = None, steps: int = STEPS
) -> Tensor:
    """``min_S 1/2 tr((W - S)^T H (W - S)) + price * sqrt(n) * sum_i |S_i|_2`` over rows (inputs), by proximal gradient.

    Accelerated, with restarts where a step goes uphill (Beck and Teboulle 2009; O'Donoghue and Candes 2015). ``size`` is
    that of a step: at most one over the largest eigenvalue of H.
    """
    found = point = weight if start is None else start
    momentum = 1.0
    for _ in range(steps):
        new = shrunk(point - size * (hessian @ (point - weight)), price * size)
        if float(((point - new) * (new - found)).sum()) > 0:
            momentum = 1.0
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = new + (momentum - 1) / after * (new - found)
        if float((new - found).abs().max()) <= 1e-9 * float(new.abs().max()):
            return new
        found, momentum = new, after
    return found


def step_size(hessian: Tensor) -> float:
    """One over the largest eigenvalue of a symmetric matrix."""
    return 1 / float(torch.linalg.eigvalsh(hessian)[-1])


def kept_inputs(weight: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The weight (m, n) at the highest price, found by bisection, that leaves ``count`` inputs; and their mask (m,)."""
    low, high = 0.0, float((hessian @ weight).norm(dim=1).max()) / weight.shape[1] ** 0.5
    found, denser, size = torch.zeros_like(weight), weight, step_size(hessian)
    for _ in range(BISECTIONS):
        if int(denser.any(1).sum()) == count:
            break
        price = (low + high) / 2
        found = group_lasso(weight, hessian, price, size, found)
        if int(found.any(1).sum()) >= count:
            low, denser = price, found
        else:
            high = price
    kept = largest(denser.norm(dim=1), count)
    return denser * kept[:, None], kept


def fit(task: Regression, settings: GroupLassoSettings) -> Narrowed:
    """The inputs that are worth their price."""
    hessian = damped(task.covariance)
    weight, kept = kept_inputs(task.weight, hessian, whole_share(len(hessian), settings.density))
    if settings.refit:
        weight = torch.zeros_like(weight)
        inner = hessian[kept]
        weight[kept] = torch.linalg.solve(inner[:, kept], inner @ task.weight)
    return Narrowed.cut(weight, rows=kept)


METHOD = calibrated("group_lasso", GroupLassoSettings, fit)
