"""Quality on data, and size."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from slrprop.data import open_data
from slrprop.errors import SlrpropError
from slrprop.losses import check_labels, rows_of
from slrprop.network import Network, OnnxNetwork, TorchNetwork, open_network
from slrprop.storage import to_bytes


@dataclass(frozen=True)
class Measurement:
    """Quality in percent, size in bytes of the saved file and in floating-point numbers (codes of few bits are none).

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


def measure(model: nn.Module | str | Path, data: Any) -> Measurement:
    """Measure a classifier on labelled data.

    Args:
        model: a module, or the path of an ONNX file, which runs on ONNX Runtime.
        data: anything :class:`slrprop.data.Data` takes, with integer labels.

    Raises:
        SlrpropError: no labels, labels out of range, or outputs that are no class scores.
    """
    opened = open_data(data)
    network = open_network(model, opened)
    probabilities, labels = [], []
    for flow in network.stream((), opened):
        if flow.batch.targets is None:
            raise SlrpropError("measure needs labels, and the data has none; give (inputs, labels)")
        output = rows_of(network.scores(flow.output))
        if output.shape[1] < 2:
            raise SlrpropError(f"measure needs one output per class, and the network gives {output.shape[1]}")
        labels.append(check_labels(flow.batch.targets, output))
        probabilities.append(output.double().softmax(-1))
    found = quality(torch.cat(probabilities).cpu().numpy(), torch.cat(labels).cpu().numpy())
    return Measurement(**found, bytes=file_bytes(network), numbers=network.numbers)


def file_bytes(network: Network) -> int:
    """Size of the model's file: as :func:`slrprop.save` writes it, or of the ONNX file and its external data."""
    if isinstance(network, OnnxNetwork):
        return network.file.bytes
    assert isinstance(network, TorchNetwork)
    return len(to_bytes(network.model))
