"""Quality on data, and size."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from slrprop.data import open_data
from slrprop.errors import SlrpropError
from slrprop.losses import check_labels, rows_of
from slrprop.network.torch import TorchNetwork
from slrprop.storage import to_bytes


@dataclass(frozen=True)
class Measurement:
    """Quality in percent, size in stored numbers and in bytes of the saved file.

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


def stored_numbers(model: nn.Module) -> int:
    """Floating-point numbers in parameters and buffers, shared ones once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.is_floating_point()}
    return sum(tensor.numel() for tensor in tensors.values())


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


def measure(model: nn.Module, data: Any) -> Measurement:
    """Measure a classifier on labelled data.

    Args:
        data: anything :class:`slrprop.data.Data` takes, with integer labels.

    Raises:
        SlrpropError: no labels, labels out of range, or outputs that are no class scores.
    """
    opened = open_data(data)
    network = TorchNetwork(model, opened)
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
    return Measurement(**found, bytes=len(to_bytes(model)), numbers=stored_numbers(model))
