"""Forms in 8 or 4 bits: scales by clip search, rounding that compensates its own error on the calibration data.

Rounding one row of a matrix leaves an error; the rows not rounded yet take up what they can of it, as the covariance of
the inputs says (Frantar et al., GPTQ, ICLR 2023, after optimal brain surgery). Between the two factors of a product the
second is fitted anew once the first is rounded. Of sparse values those of an output make up for each other, and the outputs to come for
those of others.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, singledispatch

import numpy as np
import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.fit.regression import Regression, Spread, level
from slrprop.fit.sparsity import damped
from slrprop.forms import (
    Bias,
    Dense,
    Form,
    LowRank,
    LowRankPlusSparse,
    Narrowed,
    Quantized,
    Sparse,
    SparseLowRank,
)
from slrprop.forms.quantized import CODES
from slrprop.linalg import balanced, between, in_parts, passed_on

CLIPS = torch.arange(1.0, 0.39, -0.05)  # shares of the largest magnitude that may become the largest code
BLOCK = 32  # rows whose errors are passed on together
COLUMNS = 1 << 22  # numbers of the columns that are rounded together
SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive float16
TINY = 2.0**-10  # a left component smaller than that is scaled up, its right one down


class TooLargeError(SlrpropError):
    """Numbers that few bits can't store: the scales are no float16."""


def scales_of(matrix: Tensor, axis: int, bits: int) -> Tensor:
    """For every component the float16 scale of least squared rounding error, in the dtype of ``matrix``.

    Args:
        axis: the axis along which numbers share a scale; a vector has one scale.

    Raises:
        TooLargeError: not finite, or so large that its scale is no float16.
    """
    whole = matrix.reshape(1, -1) if matrix.ndim == 1 else matrix.movedim(axis, 1)
    (low, high), scales = CODES[bits], []
    for (part,) in in_parts(whole):
        flat = part.double()
        top = (flat.abs().amax(1, keepdim=True) if flat.shape[1] else flat.new_zeros(len(flat), 1)) / high
        if not (top <= LARGEST).all():  # nor if it is NaN
            raise TooLargeError(f"a matrix with numbers up to {float(whole.abs().max()):.3g} can't be stored in {bits} bits; leave its layer out, or use bits=32")  # fmt: skip
        best, error = torch.ones_like(top), torch.full_like(top, torch.inf)
        for clip in CLIPS.tolist():
            scale = (top * clip).clamp(SMALLEST, LARGEST).half().double()
            lost = (flat / scale).round_().clamp_(low, high).mul_(scale).sub_(flat)
            found = lost.square_().sum(1, keepdim=True)
            best = torch.where(found < error, scale, best)
            error = torch.minimum(found, error)
        scales.append(best[:, 0])
    return torch.cat(scales).to(matrix)


def rounded(matrix: Tensor, axis: int, bits: int, spread: Spread | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales of a matrix (r x c).

    Args:
        axis: along which numbers share a scale.
        spread: of what the r rows are multiplied with; without it every number is rounded to the nearest.

    Returns:
        codes (r x c) and scales, both in the dtype of ``matrix``.
    """
    scale = scales_of(matrix, axis, bits)
    low, high = CODES[bits]
    wide = (scale if matrix.ndim == 1 else scale.unsqueeze(axis)).expand_as(matrix)
    if spread is not None and matrix.ndim == 2:
        return compensating(matrix, wide, bits, spread), scale
    codes = torch.empty_like(matrix)
    for into, part, by in in_parts(codes, matrix, wide):
        into.copy_((part.double() / by).round_().clamp_(low, high))
    return codes, scale


def compensating(matrix: Tensor, scale: Tensor, bits: int, spread: Spread) -> Tensor:
    """Codes of a matrix (r x c) with scales of its shape, row after row, later rows taking up earlier ones' errors."""
    (low, high), order, upper = CODES[bits], spread.order.numpy(), spread.upper.numpy()
    found = torch.empty(matrix.shape, dtype=matrix.dtype)
    for into, part, by in in_parts(found.T, matrix.T, scale.T, together=COLUMNS):  # columns know nothing of each other
        rest, wide = part.T.numpy()[order], by.T.numpy()[order]  # numpy: its overhead per row is a fraction of torch's
        codes = np.empty_like(rest)

        def nearest(i: int, row: np.ndarray, wide: np.ndarray = wide, codes: np.ndarray = codes) -> np.ndarray:
            np.minimum(np.maximum(np.rint(row / wide[i]), low), high, out=codes[i])
            return codes[i] * wide[i]

        passed_on(rest, upper, nearest, BLOCK)
        into.T[spread.order] = torch.from_numpy(codes)
    return found


def quantised(form: Form, bits: int, task: Regression | None = None) -> Quantized:
    """A form in 4 or 8 bits a number.

    Args:
        task: the layer's regression; rounding errors are compensated on its data. Without it every number is rounded to
            the nearest.
    """
    dtype = torch.float64 if task is None else task.weight.dtype
    form = form.with_matrices({name: matrix.to(dtype) for name, matrix in form.matrices().items()})
    return _plainly(form, bits) if task is None else compensated(form, bits, task)


def bias_in_few_bits(bias: Tensor) -> Bias:
    """A layer's bias (n,) in 8 bits."""
    codes, scale = rounded(bias.double(), 0, 8)
    return Bias(codes.float(), scale.half())


def form_of(form: Form, bits: int, found: dict[str, tuple[Tensor, Tensor]]) -> Quantized:
    """A form of these codes and scales, by its matrices' names."""
    codes = form.with_matrices({name: codes.to(torch.int8).contiguous() for name, (codes, _) in found.items()})
    return Quantized(codes, {name: scale.half() for name, (_, scale) in found.items()}, bits)


def _plainly(form: Form, bits: int) -> Quantized:
    axes, matrices = form.scale_axes(), form.matrices()
    for left in [name for name in matrices if name.startswith("left")]:
        right = left.replace("left", "right")
        matrices |= dict(zip((left, right), balanced(matrices[left], matrices[right]), strict=True))
    return form_of(form, bits, {name: rounded(matrix, axes[name], bits) for name, matrix in matrices.items()})


@singledispatch
def compensated(form: Form, bits: int, task: Regression) -> Quantized:
    """A form (float64) in few bits, its rounding errors compensated on the data; a form that can't is rounded plainly."""
    return _plainly(form, bits)


@compensated.register
def _(form: Dense, bits: int, task: Regression) -> Quantized:
    spread = (
        None if task.covariance.ndim == 1 else task.spread
    )  # no row of an embedding can take up what another's rounding leaves
    return form_of(form, bits, {"weight": rounded(form.weight, form.scale_axes()["weight"], bits, spread)})


@compensated.register
def _(form: Narrowed, bits: int, task: Regression) -> Quantized:
    spread = task.spread if form.rows.all() else Spread.of(task.covariance[form.rows][:, form.rows])
    return form_of(form, bits, {"block": rounded(form.block, 0, bits, spread)})


@compensated.register
def _(form: LowRank, bits: int, task: Regression) -> Quantized:
    wanted = partial(between, covariance=task.covariance, right=task.weight)
    spread = None if task.covariance.ndim == 1 else task.spread
    left, right = _pair(form.left, form.right, bits, task.covariance, spread, wanted)
    return form_of(form, bits, {"left": left, "right": right})


def _pair(
    left: Tensor,
    right: Tensor,
    bits: int,
    covariance: Tensor,
    spread: Spread | None,
    wanted: Callable[[Tensor], Tensor],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Round the left factor, fit the right one, round it too: codes and scales of both.

    Args:
        wanted: of the left factor A: ``A.T @ covariance @ target``.
    """
    left, right = balanced(left, right)
    size = left.abs().amax(0)
    grown = torch.where((size > 0) & (size < TINY), size, 1.0)  # float16 scales and what is fitted to them reach so far
    left, right = left / grown, right * grown[:, None]
    codes, scale = rounded(left, 0, bits, spread)
    left = codes * scale
    inner = between(left, covariance, left)
    mean = level(inner)
    damped = inner + 1e-8 * mean * torch.eye(len(inner), dtype=inner.dtype)
    fitted = torch.linalg.solve(damped, wanted(left) + 1e-8 * mean * right)
    return (codes, scale), rounded(fitted, 1, bits, Spread.of(inner))


@compensated.register
def _(form: SparseLowRank, bits: int, task: Regression) -> Quantized:
    sets, found = form.sets, dict[str, tuple[Tensor, Tensor]]()
    parts = [(left, right) for left, right in zip(form.left, form.right, strict=True)]  # the first ones rounded already

    def wanted(left: Tensor, index: int, across: Tensor) -> Tensor:
        """``left.T @ covariance`` times what the other blocks leave, projected, in the outputs' metric, onto the block's columns."""
        covered, columns, metric = left.T @ across, sets.columns[index], task.metric
        rest = covered @ task.weight
        for other, (one, two) in enumerate(parts):
            if other != index:
                rest[:, sets.columns[other]] -= (covered[:, sets.rows[other].places] @ one) @ two
        if metric is None or len(columns) == len(metric):
            return rest[:, columns]
        there = metric[:, columns]
        return torch.cholesky_solve((rest @ there).T, torch.linalg.cholesky(there[columns])).T

    for index, (left, right) in enumerate(parts):
        rows = sets.rows[index].places
        across = task.covariance[rows]
        own = across[:, rows]
        spread = task.spread if len(rows) == len(task.covariance) else Spread.of(own)
        one, other = _pair(left, right, bits, own, spread, partial(wanted, index=index, across=across))
        found |= {f"left_{index}": one, f"right_{index}": other}
        parts[index] = one[0] * one[1], other[0] * other[1][:, None]
    return form_of(form, bits, found)


def rounded_values(form: Sparse, weight: Tensor, covariance: Tensor, metric: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes (nnz,) and the one scale (1,) of a sparse form's values, rounded one output after the other.

    Each output's values are first fitted anew to what the rounded outputs before leave of ``weight`` (m x n) in the metric
    (n x n; without it outputs do not help each other), then rounded from the input of most variance down, the rest made to take up the
    error (Frantar et al., GPTQ, ICLR 2023, here on each output's own support).
    """
    scale = scales_of(form.entries, 0, bits)
    hessian = damped(covariance)
    couple = torch.eye(weight.shape[1], dtype=torch.float64) if metric is None else metric
    found, support = form.dense(), form.support()
    rest, step, (low, high) = weight - found, float(scale[0]), CODES[bits]

    def nearest(_: int, row: np.ndarray) -> float:
        return step * min(max(round(row[0] / step), low), high)

    for j in couple.diagonal().argsort(descending=True).tolist():
        index = support[:, j].nonzero()[:, 0]
        if not len(index):
            continue
        index = index[hessian.diagonal()[index].argsort(descending=True)]
        wanted = rest @ (couple[:, j] / couple[j, j]) + found[:, j]
        inner = torch.linalg.cholesky(hessian[index[:, None], index])
        values = torch.cholesky_solve((hessian[index] @ wanted)[:, None], inner)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(inner), upper=True)
        passed_on(values.numpy(), upper.numpy(), nearest, BLOCK)
        found[index, j] = values[:, 0]
        rest[:, j] = weight[:, j] - found[:, j]
    return (found.reshape(-1)[form.places] / step).round(), scale


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
