import copy
import functools
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import slrprop

torch.set_num_threads(1)
QUICK = 0.1  # of the time that all tests took, what those of --quick took together
took = Counter()


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the fastest tests: a tenth of the time that all took")


def pytest_runtest_logreport(report):
    took[report.nodeid] += report.duration


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and getattr(session.config, "cache", None) is not None:
        session.config.cache.set("slrprop/seconds", session.config.cache.get("slrprop/seconds", {}) | took)


def pytest_collection_modifyitems(config, items):
    """With --quick the fastest tests, as they took when they last ran; of tests that never ran the first case."""
    if config.getoption("quick"):
        known, chosen, total = config.cache.get("slrprop/seconds", {}), set(), 0.0
        cases = {item.nodeid.partition("[")[0]: item.nodeid for item in reversed(items)}
        for item in sorted(items, key=lambda item: known.get(item.nodeid, 0.0)):
            total += known.get(item.nodeid, 0.0)
            if total <= QUICK * sum(known.values()) and (item.nodeid in known or item.nodeid in cases.values()):
                chosen.add(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def _translated_once(made):
    """torch's exporter translates its library of operators anew for every file, which takes half of its time; what it changes is a copy."""
    made = functools.cache(made)

    def registry(*given, **named):
        found = copy.copy(made(*given, **named))
        found.functions = {target: list(known) for target, known in found.functions.items()}
        return found

    return registry


ONNXRegistry.from_torchlib = staticmethod(_translated_once(ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session")
def digits():
    """Scikit-learn's 1797 handwritten digits as (x, y), shuffled."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order] / 16).float(), torch.from_numpy(y[order])


def fitted(model, digits, epochs):
    """The network, trained on 1200 digits."""
    x, y = digits
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(1200).split(64):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def trained_dense(digits):
    """A 64-96-80-10 network trained on 1200 digits; never changed by a test."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10))
    return fitted(model, digits, 15)


@pytest.fixture(scope="session")
def trained(trained_dense):
    return trained_dense


@pytest.fixture(scope="session")
def trained_convolutions(digits):
    """Convolutions called 0 and 2, of as many numbers as the dense layers of ``trained``, and a dense head; trained on 1200 digits."""
    torch.manual_seed(0)
    parts = {
        "map": nn.Unflatten(1, (1, 8, 8)), "channels": nn.PixelUnshuffle(4), "0": nn.Conv2d(16, 32, (4, 3), padding=(2, 1)), "1": nn.ReLU(),
        "2": nn.Conv2d(32, 40, (3, 2), (2, 1), (1, 0)), "3": nn.ReLU(), "flat": nn.Flatten(), "4": nn.Linear(80, 10),
    }  # fmt: skip
    return fitted(nn.Sequential(OrderedDict(parts)), digits, 5)


@pytest.fixture(scope="session")
def calibration(digits):
    """300 training samples."""
    x, y = digits
    return x[:300], y[:300]


@pytest.fixture(scope="session")
def exported(trained_dense, trained_convolutions, digits, tmp_path_factory):
    """The files of the trained networks, by the network; never changed by a test."""
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def file_of(model):
        path = folder / ("dense.onnx" if model is trained_dense else "convolutions.onnx")
        assert model in (trained_dense, trained_convolutions)
        slrprop.export_onnx(model, path, digits[0][:5])
        return path

    return file_of
