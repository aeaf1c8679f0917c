"""Sparse values in few bits: the values of an output not rounded yet, and the outputs to come, make up for rounding errors."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from slrprop.fit.quantize import compensated, scales_of
from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import damped
from slrprop.forms import LowRankPlusSparse, Quantized, Sparse
from slrprop.forms.quantized import CODES


def rounded_values(form: Sparse, weight: Tensor, covariance: Tensor, metric: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (nnz,) and the one scale (1,) of a sparse form's values, rounded one output after the other.

    Each output's values are first fitted anew to what the rounded outputs before leave of ``weight`` (m x n) in the metric
    (n x n; without it outputs do not help each other), then rounded from the input of most variance down, the rest made to take up the
    error (Frantar et al., GPTQ, ICLR 2023, here on each output's own support).
    """
    scale = scales_of(form.entries, 0, bits)
    step, (low, high) = float(scale[0]), CODES[bits]
    hessian = damped(covariance)
    couple = torch.eye(weight.shape[1], dtype=torch.float64) if metric is None else metric
    found, support = form.dense(), form.support()
    codes, rest = torch.zeros_like(found), weight - found
    for j in couple.diagonal().argsort(descending=True).tolist():
        index = support[:, j].nonzero()[:, 0]
        if not len(index):
            continue
        index = index[hessian.diagonal()[index].argsort(descending=True)]
        wanted = rest @ (couple[:, j] / couple[j, j]) + found[:, j]
        inner = torch.linalg.cholesky(hessian[index[:, None], index])
        values = torch.cholesky_solve((hessian[index] @ wanted)[:, None], inner)[:, 0]
        upper = torch.linalg.cholesky(torch.cholesky_inverse(inner), upper=True)
        codes[index, j] = torch.from_numpy(_passed_on(values.numpy(), upper.numpy(), step, low, high))
        found[:, j] = codes[:, j] * step
        rest[:, j] = weight[:, j] - found[:, j]
    return codes.reshape(-1)[form.places], scale


def _passed_on(values: np.ndarray, upper: np.ndarray, step: float, low: int, high: int) -> np.ndarray:
    """Codes (s,) of values (s,), rounded one after the other, the errors taken up by those to come; values are overwritten."""
    codes = np.empty_like(values)
    for i in range(len(values)):
        codes[i] = min(max(round(values[i] / step), low), high)
        values[i + 1 :] -= upper[i, i + 1 :] * ((values[i] - codes[i] * step) / upper[i, i])
    return codes


@compensated.register
def _(form: Sparse, bits: int, task: Regression) -> Quantized:
    codes, scale = rounded_values(form, task.weight, task.covariance, task.metric, bits)
    return Quantized(form.with_matrices({"entries": codes.float()}), {"entries": scale.half()}, bits)


@compensated.register
def _(form: LowRankPlusSparse, bits: int, task: Regression) -> Quantized:
    """The low rank first, then the sparse values against what it really leaves."""
    low = compensated(form.low_rank, bits, replace(task, weight=task.weight - form.sparse.dense()))
    left = task.weight - low.dense().double()
    codes, scale = rounded_values(form.sparse, left, task.covariance, task.metric, bits)
    whole = form.with_matrices(low.codes.matrices() | {"entries": codes.float()})
    return Quantized(whole, low.scales | {"entries": scale.half()}, bits)
