import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

import slrprop
from slrprop.measure import quality
from slrprop.network.torch import stored_numbers


def test_metrics_are_scikit_learns():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(4, 0.4), 300)
    labels = random.integers(0, 4, 300)
    labels[:200] = probabilities[:200].argmax(1)
    truth, guess = np.eye(4)[labels], probabilities >= 0.5
    found = quality(probabilities, labels)
    assert found["accuracy"] == pytest.approx(100 * metrics.accuracy_score(labels, probabilities.argmax(1)))
    assert found["recall"] == pytest.approx(100 * metrics.recall_score(truth, guess, average="micro"))
    assert found["precision"] == pytest.approx(100 * metrics.precision_score(truth, guess, average="micro"))
    assert found["auc"] == pytest.approx(100 * metrics.roc_auc_score(truth, probabilities, average="micro"))
    true_negative, false_positive, _, _ = metrics.confusion_matrix(truth.ravel(), guess.ravel()).ravel()
    assert found["specificity"] == pytest.approx(100 * true_negative / (true_negative + false_positive))


def test_precision_without_a_guess_is_undefined():
    found = quality(np.full((3, 4), 0.25), np.array([0, 1, 2]))
    assert math.isnan(found["precision"]) and found["recall"] == 0 and found["specificity"] == 100


def test_shared_numbers_count_once():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    model = nn.Sequential(first, second, first)
    assert stored_numbers(model) == 25 + 10
    measured = slrprop.measure(model, (torch.randn(8, 5), torch.arange(8) % 5))
    assert measured.numbers == 35 and 35 * 4 < measured.bytes < 35 * 4 + 500


def test_a_network_that_ends_in_softmax_measures_the_same(trained, digits):
    assert slrprop.measure(trained, digits).auc == pytest.approx(
        slrprop.measure(nn.Sequential(trained, nn.Softmax(-1)), digits).auc
    )
