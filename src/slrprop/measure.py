"""Quality on data, and size."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from slrprop.data import Axes, open_data
from slrprop.errors import SlrpropError
from slrprop.losses import IGNORED, check_labels, goal_of, require_labels, rows_of
from slrprop.metrics import score
from slrprop.network import Network, OnnxNetwork, TorchNetwork, open_network
from slrprop.storage import size_of

LABELLED = ("accuracy", "auc", "recall", "precision", "specificity")
FURTHER = ("balanced_accuracy", "worst_recall", "f1", "miou")  # from labels


@dataclass(frozen=True)
class Measurement:
    """Quality in percent, size in bytes of the saved file and in floating-point numbers (codes of few bits are none).

    ``agreement``: share of samples with the same largest output as the other network, ``deviation``: root mean square of the
    outputs' difference over that of the other's, both in percent; NaN where there is none to compare with. What needs labels is NaN without.
    ``accuracy``: share of samples whose largest output is the label. ``auc``, ``recall``, ``precision`` and
    ``specificity`` are micro averages over all (sample, class) pairs; the last three count a class as predicted
    where its probability is at least 0.5 (Garmendia-Orbegozo et al. 2023, tables A1 to A4; specificity is
    TN / (TN + FP)). ``precision`` is NaN where nothing is predicted. ``balanced_accuracy``, ``f1`` and ``miou`` (intersection over
    union) are means over classes, ``worst_recall`` is that of the class that is worst off. ``mae`` and ``r2`` are of real targets, in
    their own unit. ``cosine`` is the mean cosine similarity with the other network's outputs, in percent.
    """

    accuracy: float
    auc: float
    recall: float
    precision: float
    specificity: float
    bytes: int
    numbers: int
    agreement: float = math.nan
    deviation: float = math.nan
    cosine: float = math.nan
    balanced_accuracy: float = math.nan
    worst_recall: float = math.nan
    f1: float = math.nan
    miou: float = math.nan
    mae: float = math.nan
    r2: float = math.nan


def quality(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of :class:`Measurement` from class probabilities (p x c) and labels (p,), in percent."""
    truth = np.eye(probabilities.shape[1], dtype=bool)[labels]
    guess = probabilities >= 0.5
    hits, guesses, positives = int((guess & truth).sum()), int(guess.sum()), int(truth.sum())
    negatives = truth.size - positives
    return {
        "accuracy": 100 * float((probabilities.argmax(1) == labels).mean()),
        "auc": 100 * float(roc_auc_score(truth.ravel(), probabilities.ravel())),
        "recall": 100 * hits / positives,
        "precision": 100 * hits / guesses if guesses else math.nan,
        "specificity": 100 * (negatives - (guesses - hits)) / negatives,
    }


def measure(
    model: nn.Module | str | Path,
    data: Any,
    against: nn.Module | str | Path | None = None,
    class_axis: int | None = None,
    ignore_label: int | None = None,
    batch_axis: Axes = None,
) -> Measurement:
    """Measure a network on labels or real targets, or against another.

    Args:
        model: a module, or the path of an ONNX file, which runs on ONNX Runtime.
        data: anything :class:`slrprop.data.Data` takes, with labels or real targets; without them only ``against`` says something.
        against: another network for the same inputs, as a rule the original.
        class_axis: the axis of the networks' outputs that holds the classes; found by default.
        ignore_label: a label that leaves its sample or position out; -100 always does.
        batch_axis: where samples stand in the data, see :class:`slrprop.data.Data`.

    Raises:
        SlrpropError: neither labels nor ``against``, labels out of range, or outputs that are no class scores.
    """
    opened = open_data(data, class_axis, ignore_label, batch_axis)
    network = open_network(model, opened)
    parts, targets = [], []
    for flow in network.stream((), opened):
        if flow.batch.targets is None and against is None:
            raise SlrpropError(
                "measure needs labels ('targets' in a file), and the data has none; or give another network, against which to measure"
            )
        parts.append(rows_of(flow.output))
        targets += [] if flow.batch.targets is None else [flow.batch.targets]
    outputs, found = torch.cat(parts), dict.fromkeys(LABELLED, math.nan)
    counted: Any = slice(None)
    pairs = list(zip(targets, parts, strict=True)) if len(targets) == len(parts) else []
    if pairs and targets[0].is_floating_point():
        goal = torch.cat([goal_of(target, part) for target, part in pairs])
        rows = torch.arange(len(goal), device=goal.device)
        found |= {name: score(name, outputs, goal, rows).value for name in ("mae", "r2")}
    elif pairs and (against is None or outputs.shape[1] > 1):
        if outputs.shape[1] < 2:
            raise SlrpropError(f"measure needs one output per class, and the network gives {outputs.shape[1]}")
        labels = torch.cat([check_labels(target, part) for target, part in pairs])
        counted = labels != IGNORED
        outputs, labels = outputs[counted], labels[counted]
        require_labels(len(labels))
        rows = torch.arange(len(labels), device=labels.device)
        found = quality(network.scores(outputs).double().softmax(-1).cpu().numpy(), labels.cpu().numpy())
        found |= {name: score(name, outputs, labels, rows).value for name in FURTHER}
    if against is not None:
        other = open_network(against, None, network.reading).stream((), opened)
        found |= compared(outputs, torch.cat([rows_of(flow.output) for flow in other])[counted])
    return Measurement(**found, bytes=file_bytes(network), numbers=network.numbers)


def compared(outputs: Tensor, other: Tensor) -> dict[str, float]:
    """Agreement, cosine similarity and deviation of outputs (p x c) from another network's."""
    if outputs.shape != other.shape:
        raise SlrpropError(f"the networks give outputs of shapes {tuple(outputs.shape)} and {tuple(other.shape)} for the same data; measure networks of the same task")  # fmt: skip
    one, two = outputs.double(), other.double()
    alike = 100 * float((one.argmax(1) == two.argmax(1)).double().mean()) if one.shape[1] > 1 else math.nan
    size = float(two.square().mean())
    return {
        "agreement": alike,
        "cosine": 100 * float(cosine_similarity(one, two).mean()) if one.shape[1] > 1 else math.nan,
        "deviation": 100 * (float((one - two).square().mean()) / size) ** 0.5 if size else math.nan,
    }


def file_bytes(network: Network) -> int:
    """Size of the model's file: as :func:`slrprop.save` writes it, or of the ONNX file and its external data."""
    if isinstance(network, OnnxNetwork):
        return network.file.bytes
    assert isinstance(network, TorchNetwork)
    return size_of(network.model)
