"""Quality on data, and size."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from slrprop.data import open_data
from slrprop.errors import SlrpropError
from slrprop.losses import check_labels, rows_of
from slrprop.network import Network, OnnxNetwork, TorchNetwork, open_network
from slrprop.storage import size_of

LABELLED = ("accuracy", "auc", "recall", "precision", "specificity")


@dataclass(frozen=True)
class Measurement:
    """Quality in percent, size in bytes of the saved file and in floating-point numbers (codes of few bits are none).

    ``agreement``: share of samples with the same largest output as the other network, ``deviation``: root mean square of the
    outputs' difference over that of the other's, both in percent; NaN where there is none to compare with. What needs labels is NaN without.
    ``accuracy``: share of samples whose largest output is the label. ``auc``, ``recall``, ``precision`` and
    ``specificity`` are micro averages over all (sample, class) pairs; the last three count a class as predicted
    where its probability is at least 0.5 (Garmendia-Orbegozo et al. 2023, tables A1 to A4; specificity is
    TN / (TN + FP)). ``precision`` is NaN where nothing is predicted.
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


def measure(model: nn.Module | str | Path, data: Any, against: nn.Module | str | Path | None = None) -> Measurement:
    """Measure a classifier on labelled data, or any network against another.

    Args:
        model: a module, or the path of an ONNX file, which runs on ONNX Runtime.
        data: anything :class:`slrprop.data.Data` takes, with integer labels; without labels only ``against`` says something.
        against: another network for the same inputs, as a rule the original.

    Raises:
        SlrpropError: neither labels nor ``against``, labels out of range, or outputs that are no class scores.
    """
    opened = open_data(data)
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
    labelled = len(targets) == len(parts)
    if labelled and (against is None or (outputs.shape[1] > 1 and not targets[0].is_floating_point())):
        if outputs.shape[1] < 2:
            raise SlrpropError(f"measure needs one output per class, and the network gives {outputs.shape[1]}")
        labels = [check_labels(target, part) for target, part in zip(targets, parts, strict=True)]
        probabilities = network.scores(outputs).double().softmax(-1)
        found = quality(probabilities.cpu().numpy(), torch.cat(labels).cpu().numpy())
    if against is not None:
        found |= compared(
            outputs, torch.cat([rows_of(flow.output) for flow in open_network(against, None).stream((), opened)])
        )
    return Measurement(**found, bytes=file_bytes(network), numbers=network.numbers)


def compared(outputs: Tensor, other: Tensor) -> dict[str, float]:
    """Agreement and deviation of outputs (p x c) from another network's."""
    if outputs.shape != other.shape:
        raise SlrpropError(f"the networks give outputs of shapes {tuple(outputs.shape)} and {tuple(other.shape)} for the same data; measure networks of the same task")  # fmt: skip
    one, two = outputs.double(), other.double()
    alike = 100 * float((one.argmax(1) == two.argmax(1)).double().mean()) if one.shape[1] > 1 else math.nan
    size = float(two.square().mean())
    return {
        "agreement": alike,
        "deviation": 100 * (float((one - two).square().mean()) / size) ** 0.5 if size else math.nan,
    }


def file_bytes(network: Network) -> int:
    """Size of the model's file: as :func:`slrprop.save` writes it, or of the ONNX file and its external data."""
    if isinstance(network, OnnxNetwork):
        return network.file.bytes
    assert isinstance(network, TorchNetwork)
    return size_of(network.model)
