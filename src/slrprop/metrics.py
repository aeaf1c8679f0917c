"""What networks are judged by. Every metric is a function of samples' weights, so that one rule gives every interval.

The derivative of a metric by a sample's weight is that sample's *influence*. The influences' squares add up to the
metric's variance (the infinitesimal jackknife), whatever the metric is a quotient of. Positions of one sample share its weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from slrprop.errors import SlrpropError

SOME = 1.96  # standard errors on each side of an interval of 95 % that is looked at once


class Score(NamedTuple):
    """A metric's value, each sample's influence on it (g,), and what one answer moves it by (0 where it has no answers).

    ``influence`` is None where only the value is known.
    """

    value: float
    influence: Tensor | None = None
    step: float = 0.0


def interval_of(
    differences: Tensor, step: float = 0.0, errors: float = SOME, count: int | None = None
) -> tuple[float, float]:
    """Interval of the mean of paired differences (g,), in the metric's unit: ``errors`` standard errors on each side.

    For answers that are right or wrong: Agresti and Min, Statistics in Medicine 24, 2005 (half an observation added to
    each cell), which does not collapse where both networks agree. Otherwise the normal interval.

    Args:
        step: the difference that one answer makes; 0 for metrics that have none.
        count: of how many samples like these it is to be; None: of these.
    """
    n, mean = count or len(differences), float(differences.mean())
    if not step:
        half = errors * (float(differences.std()) if len(differences) > 1 else torch.inf) / n**0.5
        return mean - half, mean + half
    mean, squares = mean * n / (n + 2), n * float(differences.square().mean())
    half = errors * max(squares + step**2 - (n + 2) * mean**2, 0.0) ** 0.5 / (n + 2)
    return mean - half, mean + half


def interval_between(
    before: Score, after: Score, errors: float = SOME, count: int | None = None
) -> tuple[float, float]:
    """Interval of ``after - before``, both scores of the same samples, see :func:`interval_of`; NaN where a score has no influences.

    Raises:
        SlrpropError: they are of unequal numbers of samples.
    """
    if before.influence is None or after.influence is None:
        return torch.nan, torch.nan
    if before.influence.shape != after.influence.shape:
        raise SlrpropError(
            f"evaluate gave {len(before.influence)} values for the original and {len(after.influence)} for a smaller "
            "network; give one value a sample, always of the same samples"
        )
    moved = len(before.influence) * (after.influence - before.influence)
    return interval_of(moved + (after.value - before.value), max(before.step, after.step), errors, count)


def over(part: Tensor, whole: Tensor) -> Tensor:
    """The quotients of classes (c,) that occur."""
    return part[whole > 0] / whole[whole > 0]


def r2(outputs: Tensor, goal: Tensor, weights: Tensor) -> Tensor:
    """Share of the targets' variance that is explained, mean over the outputs that vary."""
    total = (goal - (weights @ goal) / weights.sum()).square()
    varying = (goal != goal[:1]).any(0)
    if not varying.any():
        raise SlrpropError("metric 'r2' needs targets that differ, and all are the same; use metric='mae'")
    return 1 - ((weights @ (outputs - goal).square())[varying] / (weights @ total)[varying]).mean()


def auc(outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Area under the curve of each class that occurs against all others, by its probability; the mean over classes.

    The chance that a sample of the class has the higher probability; ties count half.
    """
    areas = []
    for name in labels.unique():
        truth, (values, place) = labels == name, outputs[:, name].unique(return_inverse=True)
        if truth.all():
            raise SlrpropError("metric 'auc' needs labels of two classes or more, and all are the same")
        others = weights.new_zeros(len(values)).index_add(0, place, weights * ~truth)
        below = others.cumsum(0) - others / 2
        areas.append((weights * truth * below[place]).sum() / ((weights * truth).sum() * others.sum()))
    return torch.stack(areas).mean()


Counts = Callable[[Tensor, Tensor, Tensor], Tensor]  # of every class's hits, labels and guesses (c,)
Rows = Callable[[Tensor, Tensor], Tensor]  # outputs and goals (p x c) to (p,)
Whole = Callable[[Tensor, Tensor, Tensor], Tensor]  # outputs (p x c), goals or labels, weights (p,)
COUNTS: dict[str, Counts] = {
    "accuracy": lambda hits, true, guessed: hits.sum() / true.sum(),
    "agreement": lambda hits, true, guessed: hits.sum() / true.sum(),
    "balanced_accuracy": lambda hits, true, guessed: over(hits, true).mean(),
    "worst_recall": lambda hits, true, guessed: over(hits, true).min(),
    "f1": lambda hits, true, guessed: over(2 * hits, true + guessed).mean(),
    "miou": lambda hits, true, guessed: over(hits, true + guessed - hits).mean(),
}
ROWS: dict[str, Rows] = {
    "squared_error": lambda outputs, goal: (outputs - goal).square().sum(1),
    "mae": lambda outputs, goal: (outputs - goal).abs().mean(1),
    "cosine": lambda outputs, goal: cosine_similarity(outputs, goal),
}
WHOLE: dict[str, Whole] = {"auc": auc, "r2": r2}
MEANING = {
    "accuracy": "share of right answers",
    "agreement": "share of answers equal to the original's",
    "balanced_accuracy": "mean over classes of the share of right answers",
    "f1": "harmonic mean of precision and recall, mean over classes",
    "miou": "intersection over union of labels and answers, mean over classes",
    "auc": "area under the curve, mean of each class against the others",
    "cosine": "cosine similarity of outputs and targets, or the original's outputs",
    "squared_error": "mean squared error summed over outputs, smaller is better",
    "mae": "mean absolute error, smaller is better",
    "r2": "share of the targets' variance that is explained, 1 at best",
}
METRICS = tuple(MEANING)
NUMBERS = ("squared_error", "mae", "r2", "cosine")  # of outputs that are no scores of classes
LABELLED = ("accuracy", "balanced_accuracy", "f1", "miou", "auc")
PERCENT = (*COUNTS, "auc", "cosine")
LOWER = ("squared_error", "mae")  # smaller is better


def score(name: str, outputs: Tensor, goal: Tensor, sample: Tensor) -> Score:
    """A metric of outputs (p x c).

    Args:
        goal: real targets (p x c), or the labels (p,) that answers are compared with; for ``auc`` outputs are probabilities.
        sample: to which sample (from 0) each row belongs (p,).
    """
    percent = 100.0 if name in PERCENT else 1.0
    ones = torch.ones(int(sample.max()) + 1, dtype=torch.float64, device=sample.device, requires_grad=True)
    outputs, step = outputs.detach(), 0.0
    with torch.enable_grad():
        weights = ones[sample]
        if name in COUNTS:
            right = (outputs.argmax(1) == goal).double().requires_grad_()
            sums = [(goal, weights * right), (goal, weights), (outputs.argmax(1), weights)]
            zeros = weights.new_zeros(outputs.shape[1])
            value = percent * COUNTS[name](*(zeros.index_add(0, at, part) for at, part in sums))
            (by_answer,) = torch.autograd.grad(value, right, retain_graph=True)
            step = len(ones) * float(by_answer.square().mean()) ** 0.5
        elif name in ROWS:
            value = percent * (weights @ ROWS[name](outputs, goal).double()) / weights.sum()
        else:
            value = percent * WHOLE[name](outputs.double(), goal if name == "auc" else goal.double(), weights)
        (influence,) = torch.autograd.grad(value, ones)
    return Score(float(value.detach()), influence, step)
