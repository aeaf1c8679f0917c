import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

import slrprop
from slrprop.measure import quality
from slrprop.network.torch.network import stored_numbers


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


def test_another_network_stands_in_for_labels(trained, digits):
    x, labels = digits
    worse = nn.Sequential(nn.Linear(64, 10))
    against = slrprop.measure(worse, x, trained)
    with torch.no_grad():
        one, two = worse(x), trained(x)
    assert against.agreement == pytest.approx(100 * float((one.argmax(1) == two.argmax(1)).double().mean()))
    assert against.deviation == pytest.approx(100 * float((one - two).norm() / two.norm()), rel=1e-4)
    assert math.isnan(against.accuracy) and against.numbers == 650
    both = slrprop.measure(worse, (x, labels), trained)
    assert both.accuracy == slrprop.measure(worse, (x, labels)).accuracy and both.agreement == against.agreement
    one_output = slrprop.measure(nn.Linear(64, 1), (x, labels.float()), nn.Linear(64, 1))
    assert math.isnan(one_output.agreement) and one_output.deviation > 0
    with pytest.raises(slrprop.SlrpropError, match="the data has none; or give another network"):
        slrprop.measure(trained, x)
    with pytest.raises(slrprop.SlrpropError, match="outputs of shapes"):
        slrprop.measure(nn.Linear(64, 3), x, trained)
