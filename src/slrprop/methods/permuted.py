"""Permuted features fitted to a trained layer: every column a permutation of one sequence."""

from functools import partial

import torch
from torch import Tensor

from slrprop.checks import Times
from slrprop.fit.regression import Regression
from slrprop.forms import Shared
from slrprop.linalg import conjugate_gradients
from slrprop.methods.calibrated import CalibratedSettings

DAMPING = 1e-3  # of the inputs' mean variance: what the data does not see stays near the weight
STEPS = 8  # of conjugate gradients for the sequence, each round


class PermutedSettings(CalibratedSettings):
    """Permuted features: each column a permutation of one sequence, with a scale and an offset; size only, no faster.

    The permutations take ceil(log2 m) bits an entry, so that an m x n layer is stored in about as many bits: smaller
    than 32-bit numbers, not than 8-bit ones. To train such a layer from scratch, its permutations given by a seed, see
    :mod:`slrprop.research.permuted`.

    Args:
        refine: rounds of alternating least squares on the data after the fit to the weight; 0 for none.
    """

    refine: Times = 0

    source = (
        "Nagaraju, Chandrachoodan, IET Computers & Digital Techniques, 2023 (idea; scales, offsets and fit are ours)"
    )

    def stored_numbers(self, m: int, n: int) -> int:
        return m + 2 * n  # the packed permutations are bytes, not numbers

    def fit(self, task: Regression) -> Shared:
        """The sequence is the mean of the sorted columns, each column's places are its ranks (methods "fitted").

        Columns whose third central moment is negative are turned over first, and have a negative scale: two columns that are
        permutations of one sequence up to scales of different signs are then sorted alike.
        """
        form = fitted(task.weight)
        return refined(form, task.weight, task.damped(DAMPING), self.refine) if self.refine else form


def fitted(weight: Tensor) -> Shared:
    """The form of a weight (m x n) by the weight alone; exact where its columns are permutations of one sequence."""
    skew = (weight - weight.mean(0)).pow(3).sum(0)
    sign = torch.where(skew < 0, -1.0, 1.0).to(weight)
    turned = weight * sign
    order = turned.argsort(dim=0, stable=True)
    ordered = turned.gather(0, order)
    sequence, means = ordered.mean(1), ordered.mean(0)
    centred = sequence - sequence.mean()
    size = centred @ centred
    scale = centred @ ordered / size if size > 0 else torch.zeros_like(means)
    offset = means - scale * sequence.mean()
    return Shared.of(sequence, sign * scale, sign * offset, order.argsort(dim=0).T)


def refined(form: Shared, weight: Tensor, metric: Tensor, rounds: int) -> Shared:
    """Lower ``sum_j (w_j - W_j)^T metric (w_j - W_j)`` over sequence, scales and offsets, the permutations as they are.

    Each round minimises over the sequence by conjugate gradients, then over scales and offsets exactly; neither raises
    the sum.

    Args:
        metric: (m x m), symmetric, positive definite.
    """
    places = form.places.long().T  # m x n
    seen, ones = metric @ weight, metric.sum(1)
    sequence, scale, offset = form.sequence, form.scale, form.offset
    assert offset is not None

    def gathered(columns: Tensor) -> Tensor:
        """``sum_j P_j^T columns_j`` (m,)."""
        return sequence.new_zeros(len(weight)).scatter_add_(0, places.reshape(-1), columns.reshape(-1))

    def normal(scale: Tensor, s: Tensor) -> Tensor:
        """The matrix of the sequence's normal equations times s."""
        return gathered(metric @ (s[places] * scale) * scale)

    for _ in range(rounds):
        apply, right = partial(normal, scale), gathered((seen - torch.outer(ones, offset)) * scale)
        sequence = conjugate_gradients(apply, right - apply(sequence), sequence, STEPS)
        spread = sequence[places]
        a, b, c = (spread * (metric @ spread)).sum(0), ones @ spread, ones.sum()
        d, e = (spread * seen).sum(0), ones @ weight
        determinant = a * c - b * b
        solvable = determinant > 1e-12 * a * c
        safe = torch.where(solvable, determinant, 1.0)
        scale = torch.where(solvable, (d * c - b * e) / safe, scale)
        offset = torch.where(solvable, (a * e - b * d) / safe, offset)
    return Shared(sequence, scale, offset, form.packed)
