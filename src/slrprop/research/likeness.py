"""What a collapsed network resembles: correlations, logistic regression and permutation importance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import pad

from slrprop.data import Data, open_data
from slrprop.errors import SlrpropError
from slrprop.losses import IGNORED, check_labels, rows_of
from slrprop.network import Network, open_network
from slrprop.research.matrix import Model, input_of, samples_of


@dataclass(frozen=True)
class Likeness:
    """Correlations (-1 to 1) of a collapsed network's entries with other answers to the same question; NaN where one is constant.

    ``correlation``: with the correlations of inputs and targets. ``logistic``: with the coefficients of a logistic regression. ``permutation``: of
    the inputs' mean absolute entries with the loss of accuracy when an input is shuffled.
    """

    correlation: float
    logistic: float
    permutation: float


@dataclass(frozen=True, eq=False)
class References:
    """What a data set says by itself: ``correlations`` of inputs and targets, ``logistic`` coefficients (both m x c), and ``permutation`` importance (m,).

    All are for inputs in units of their ``deviation`` (m,).
    """

    deviation: Tensor
    correlations: Tensor
    logistic: Tensor
    permutation: Tensor

    @classmethod
    def of(cls, data: Any, model: Model | None = None, repeats: int = 5) -> "References":
        """From labelled data; permutation importance is of ``model``, or of the logistic regression where none is given.

        Raises:
            SlrpropError: the data has no class numbers as targets, or fewer than two classes.
        """
        opened = open_data(data)
        network = None if model is None else open_network(model, opened)
        batches = list(opened)
        targets = [network.numbered(batch.targets) if network else batch.targets for batch in batches]
        if not all(isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point() for y in targets):
            raise SlrpropError("comparing needs the class number of each sample as 'targets', and the data has none")
        counted = torch.cat(targets).long() != IGNORED
        given, labels = samples_of(batches)[counted], torch.cat(targets).long()[counted]
        x, y = given.flatten(1).double().numpy(), labels.numpy()
        if len(set(y)) < 2 or y.min() < 0:
            seen = ", ".join(map(str, sorted(set(y))[:5])) or "none"
            raise SlrpropError(f"comparing needs samples of two classes or more, numbered from 0, and the data has {seen}; give others, or leave the targets out")  # fmt: skip
        deviation, hot = x.std(0), np.eye(int(y.max()) + 1)[y]
        scaled, hot = ((a - a.mean(0)) / np.where(a.std(0) > 0, a.std(0), 1) for a in (x, hot))
        fitted = LogisticRegression(max_iter=1000).fit(scaled, y)
        logistic = np.zeros((x.shape[1], hot.shape[1]))
        logistic[:, fitted.classes_] = fitted.coef_.T if len(fitted.classes_) > 2 else fitted.coef_.T * [-0.5, 0.5]
        answer = fitted.predict
        if network is not None:
            answer = _answers(network, given, input_of(batches[0])[1], labels)
        shuffled = permutation_importance(
            fitted, scaled if model is None else x, y, n_repeats=repeats, random_state=0,
            scoring=lambda _, values, truth: float((answer(values) == truth).mean()),
        )  # fmt: skip
        arrays = deviation, scaled.T @ hot / len(y), logistic, shuffled.importances_mean
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))

    def compare(self, collapsed: Tensor) -> Likeness:
        """How alike a collapsed network (m x c) is; one output stands for class 1 of two."""
        m, classes = self.correlations.shape
        if collapsed.shape == (m, 1) and classes == 2:
            collapsed = torch.cat([-collapsed, collapsed], 1)
        unseen = collapsed.shape[1] - classes  # classes of which the data has no sample
        if len(collapsed) != m or unseen < 0:
            raise SlrpropError(
                f"the collapsed network is {tuple(collapsed.shape)}, and the data has {m} inputs and {classes} classes"
            )
        entries = _centred(collapsed.double().cpu() * self.deviation[:, None])
        return Likeness(
            correlation(entries, _centred(pad(self.correlations, (0, unseen)))),
            correlation(entries, _centred(pad(self.logistic, (0, unseen)))),
            correlation(entries.abs().mean(1), self.permutation),
        )


def compare(collapsed: Tensor, data: Any, model: Model | None = None) -> Likeness:
    """How alike a collapsed network (m x c) is to what labelled data says by itself.

    Entries are those for inputs in units of their standard deviation, less each input's mean over the outputs, which no softmax sees.

    Args:
        data: anything :class:`slrprop.data.Data` takes, targets being class numbers.
        model: the network whose permutation importance is asked for; without it, the logistic regression's.

    Raises:
        SlrpropError: no class numbers, or another number of inputs or classes than the network's.
    """
    return References.of(data, model).compare(collapsed)


def effects(collapsed: Tensor, data: Any) -> Tensor:
    """A collapsed network (m x c) for inputs in units of their standard deviation on the data; refused where no input varies."""
    deviation = samples_of(open_data(data)).flatten(1).double().std(0, correction=0)
    if not deviation.any():
        raise SlrpropError("effects are those of one standard deviation, and no input varies in the data; give samples that differ")  # fmt: skip
    return collapsed.double().cpu() * deviation[:, None]


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, over all entries; NaN where one is constant."""
    a, b = one.flatten() - one.mean(), other.flatten() - other.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-300 else float("nan")


def _centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(1, keepdim=True)


def _answers(network: Network, like: Tensor, axis: int, labels: Tensor) -> Callable[[Any], Any]:
    """The network's classes (p,) for rows (p, m) of what its inputs ``like`` (p, ...) are when flattened; it takes samples on ``axis``."""

    def answers(x: Any) -> Any:
        rows = torch.from_numpy(x).to(like).reshape(like.shape).movedim(0, axis)
        scores = rows_of(torch.cat([flow.output for flow in network.stream((), Data(rows, batch_axis=axis))]).cpu())
        if scores.shape[1] > 1:
            check_labels(labels, scores)
            return scores.argmax(-1).numpy()
        middle = 0.5 if scores.min() >= 0 and scores.max() <= 1 else 0  # a probability of class 1, or its logit
        return (scores[:, 0] > middle).long().numpy()

    return answers
