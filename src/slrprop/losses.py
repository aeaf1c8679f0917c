"""The losses that costs are measured by, and their exact changes.

A change of the loss is computed from the change of the outputs, never as the difference of two nearly equal losses:
for softmax cross-entropy with base probabilities P and change d of the logits,
``log1p(sum_c P_c expm1(d_c)) - sum_c q_c d_c`` with q the (one-hot or soft) target.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from slrprop.errors import SlrpropError

LossName = Literal["cross_entropy", "kl", "squared"]
LOSSES = get_args(LossName)
LARGE = 1.0  # beyond a change of this size the log-sum-exp form is the more accurate one
IGNORED = -100  # a label that leaves its row out, as in torch's cross-entropy
MOST_TERMS = 20  # of a series for smaller ones: 18 are float64's last digit


def rows_of(output: Tensor) -> Tensor:
    """A network's output as (p, c), at least in single precision.

    All but the last axis are rows (:meth:`slrprop.network.Network.classes_last`); a flat output has one column.
    """
    wide = output if output.dtype == torch.float64 else output.float()
    return wide.reshape(-1, output.shape[-1] if output.ndim > 1 else 1)


def check_labels(labels: Tensor, outputs: Tensor) -> Tensor:
    """Flat int64 labels for outputs (p, classes); some may be ``IGNORED``.

    Raises:
        SlrpropError: not whole numbers, not one per row of the outputs, or out of range.
    """
    classes = outputs.shape[-1]
    if labels.is_floating_point() or labels.is_complex():
        raise SlrpropError(f"labels must be whole numbers for a classification measure, got dtype {labels.dtype}")
    flat = labels.reshape(-1).long()
    if len(flat) != len(outputs):
        raise SlrpropError(f"got {len(flat)} labels for {len(outputs)} rows of outputs; give one label per output row")
    valid = flat[flat != IGNORED]
    low, high = (int(valid.min()), int(valid.max())) if len(valid) else (0, 0)
    if low < 0 or high >= classes:
        raise SlrpropError(
            f"labels go from {low} to {high}, but the network has {classes} classes; use 0 to {classes - 1}"
        )
    return flat


def require_labels(count: int) -> None:
    """Refuse data all of whose labels are to be ignored."""
    if not count:
        raise SlrpropError(
            f"all labels are to be ignored ({IGNORED} or ignore_label); give some of the network's classes"
        )


def pick_loss(targets: Tensor | None, outputs: Tensor, asked: LossName | None = None) -> LossName:
    """The loss that was asked for; else cross-entropy for labels, squared distance for real targets.

    Without targets: KL divergence to the original's outputs if there are two or more, else squared distance.
    """
    if asked is not None:
        if asked not in LOSSES:
            raise SlrpropError(f"no loss is called '{asked}'; choose one of {', '.join(LOSSES)}")
        if asked == "cross_entropy" and targets is None:
            raise SlrpropError("loss 'cross_entropy' needs labels, and the data has none; use loss='kl' or give labels")
        return asked
    if targets is None:
        return "kl" if outputs.shape[-1] > 1 else "squared"
    return "squared" if targets.is_floating_point() else "cross_entropy"


def at(values: Tensor, sample: Any) -> Tensor:
    """``values[sample]``, by the fast way where ``sample`` is a list of rows."""
    return values.index_select(0, sample) if isinstance(sample, Tensor) else values[sample]


@dataclass(frozen=True, eq=False)
class SoftmaxPoint:
    """Cross-entropy or KL divergence at base logits (p x c)."""

    log_p: Tensor
    p: Tensor
    target: Tensor  # labels (p,) or a distribution (p x c)
    values: Tensor

    def change(self, d: Tensor, sample: Any) -> Tensor:
        """Change of the loss when the logits of the samples change by ``d`` (..., c): the shape of ``d`` less c.

        ``sample`` indexes the samples so that the result broadcasts against ``d``.
        """
        moved = torch.expm1(d).mul_(at(self.p, sample)).sum(-1).log1p_()
        if not d.numel():  # no sample changes
            return moved
        low, high = torch.aminmax(d)
        if high > LARGE or low < -LARGE:
            large = (d.abs().amax(-1) > LARGE).nonzero(as_tuple=True)
            log_p = at(self.log_p, sample).expand_as(d)
            moved[large] = torch.logsumexp(d[large] + log_p[large], -1)
        target = at(self.target, sample)
        if self.target.ndim == 1:
            return moved.sub_(d.gather(-1, target.expand(d.shape[:-1])[..., None])[..., 0])
        return moved.sub_((target * d).sum(-1))

    def change_along(self, s: Tensor, direction: Tensor, sample: slice) -> Tensor:
        """Change of the loss when the samples' logits change by ``s[p, i] * direction[i]``, none by more than ``LARGE``, for every i (p x m).

        ``sum_c P_c expm1(s w_c)`` as its series in s, to the last digit: the coefficients ``P @ (w ** k)`` are products of matrices, so that
        there is no exponential for every sample, i and class.
        """
        peaks = direction.abs().amax(1).clamp_min(torch.finfo(s.dtype).tiny)
        unit, steps = direction / peaks[:, None], s * peaks
        reach, p = float(steps.abs().max()) if steps.numel() else 0.0, self.p[sample]
        terms = (k for k in range(1, MOST_TERMS) if reach**k / math.factorial(k + 1) < torch.finfo(s.dtype).eps)
        last = next(terms, MOST_TERMS)
        moved = torch.zeros_like(steps)
        for k in range(last, 0, -1):
            moved = torch.addcmul(p @ (unit**k).T, moved, steps, value=1 / (k + 1))
        target = self.target[sample]
        wanted = unit.T[target] if target.ndim == 1 else target @ unit.T
        return moved.mul_(steps).log1p_().sub_(steps.mul_(wanted))

    def single_change(self, d: Tensor) -> Tensor:
        """Change of the loss when output c alone changes by ``d[:, c]``, for every sample and c (p x c)."""
        moved = torch.log1p(self.p * torch.expm1(d))
        top = self.p.argmax(-1, keepdim=True)  # the only class whose complement may cancel
        others = self.log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
        rest = torch.log1p(-self.p).scatter(-1, top, others)  # log of the other classes' share
        moved = torch.where(d.abs() > LARGE, torch.logaddexp(self.log_p + d, rest), moved)
        q = self.target if self.target.ndim == 2 else one_hot(self.target, d.shape[1])
        return moved - q * d


@dataclass(frozen=True, eq=False)
class SquaredPoint:
    """Squared distance, summed over outputs, at base residuals (p x c)."""

    residual: Tensor
    values: Tensor

    def change(self, d: Tensor, sample: Any) -> Tensor:
        """See :meth:`SoftmaxPoint.change`."""
        return (d * (2 * at(self.residual, sample) + d)).sum(-1)

    def change_along(self, s: Tensor, direction: Tensor, sample: slice) -> Tensor:
        """See :meth:`SoftmaxPoint.change_along`."""
        return s * (2 * self.residual[sample] @ direction.T + s * direction.square().sum(1))

    def single_change(self, d: Tensor) -> Tensor:
        """See :meth:`SoftmaxPoint.single_change`."""
        return d * (2 * self.residual + d)


Point = SoftmaxPoint | SquaredPoint


def goal_of(targets: Tensor, outputs: Tensor) -> Tensor:
    """Real targets as outputs (p x c) are.

    Raises:
        SlrpropError: they are not one number per output.
    """
    if targets.numel() != outputs.numel():
        raise SlrpropError(
            f"targets of shape {tuple(targets.shape)} can't be compared with outputs of shape {tuple(outputs.shape)}; "
            "give class labels as integers, or one real target per output"
        )
    return targets.to(outputs).reshape(outputs.shape)


def loss_point(loss: LossName, outputs: Tensor, targets: Tensor | None, original: Tensor) -> Point:
    """The loss at ``outputs`` (p x c), per sample, against labels, real targets, or the ``original`` outputs (p x c)."""
    if loss == "squared":
        residual = outputs - (original if targets is None else goal_of(targets, outputs))
        return SquaredPoint(residual, residual.square().sum(-1))
    log_p = outputs.log_softmax(-1)
    if loss == "cross_entropy":
        assert targets is not None
        labels = check_labels(targets, outputs)
        return SoftmaxPoint(log_p, log_p.exp(), labels, -log_p.gather(-1, labels[:, None])[:, 0])
    log_q = original.log_softmax(-1)
    q = log_q.exp()
    return SoftmaxPoint(log_p, log_p.exp(), q, (q * (log_q - log_p)).sum(-1))
