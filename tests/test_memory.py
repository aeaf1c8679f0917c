"""Batches go through networks in parts that fit into memory, with the same outputs; peaks are bounded."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import slrprop
from slrprop.calibration import Calibration
from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.memory import bound
from slrprop.network import open_network


class Convolutions(nn.Module):
    """A map of 16 x 64 x 64 numbers, 256 kB, beside small ones; two dense layers."""

    def __init__(self):
        super().__init__()
        self.wide, self.first, self.last = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(256, 20), nn.Linear(20, 5)

    def forward(self, images):
        x = nn.functional.max_pool2d(self.wide(images).relu(), 16).flatten(1)
        return self.last(self.first(x).relu())


@pytest.fixture(params=["torch", "onnx"], scope="module")
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    network = Convolutions().eval()
    if request.param == "torch":
        return network
    path = tmp_path_factory.mktemp("memory") / "model.onnx"
    slrprop.export_onnx(network, path, torch.rand(2, 1, 64, 64))
    return path


IMAGES = torch.rand(50, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("source", [IMAGES, [IMAGES, IMAGES[:7], IMAGES[:1]]])
def test_parts_are_as_large_as_memory_allows_and_give_the_same(model, source, monkeypatch):
    """A map before and behind ReLU is half a megabyte of each sample, of which two or three fit into a quarter of 6 MB."""
    whole = open_network(model, Data(source))
    order = whole.order
    want = list(whole.stream(order, Data(source)))
    assert len(want) == len(list(Data(source)))
    monkeypatch.setenv("SLRPROP_MEMORY", "6")
    data = Data(source)
    network = open_network(model, data)
    found = list(network.stream(order, data))
    assert 2 <= network.at_once <= 3
    assert {flow.batch.samples for flow in found} <= {1, 2, 3}
    for take in (lambda flow: flow.output, lambda flow: flow.batch.inputs[0], lambda flow: flow.calls[order[0]][0][0]):
        torch.testing.assert_close(torch.cat(list(map(take, found))), torch.cat(list(map(take, want))))


class Sequences(nn.Module):
    """Samples on the second axis of what it reads and gives."""

    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.LSTM(6, 200), nn.Linear(200, 4)

    def forward(self, x):
        return self.last(self.cells(x)[0])


def test_what_sees_its_neighbours_stays_whole(monkeypatch):
    monkeypatch.setenv("SLRPROP_MEMORY", "1")
    data = Data([torch.randn(40, 50, 6)], batch_axis=0)
    network = open_network(Sequences().eval(), data)
    (flow,) = network.stream((), data)
    assert flow.batch.samples == 40 and network.at_once > 40


def test_what_all_samples_hold_before_a_layer_is_bounded(monkeypatch):
    """Then the network is run up to each layer instead, with the same regressions."""

    class Beside(Convolutions):
        def forward(self, images):
            x = self.wide(images).relu()
            seen = self.last(self.first(nn.functional.max_pool2d(x, 16).flatten(1)).relu())
            return seen + x.mean((1, 2, 3), keepdim=False)[:, None]

    torch.manual_seed(0)
    data = Data(IMAGES)
    network = open_network(Beside().eval(), data)
    assert network.standing > 16 * 64 * 64 * 4
    want, found = Calibration(network, data), Calibration(network, data)
    want.prepare(network.order)
    assert want.pairs.together
    monkeypatch.setenv("SLRPROP_MEMORY", "6")
    found.prepare(network.order)
    assert not found.pairs.together
    for name in network.order:
        one, other = (task.regression(name, {}) for task in (want, found))
        torch.testing.assert_close(one.covariance, other.covariance)
        torch.testing.assert_close(one.metric, other.metric)


@pytest.mark.parametrize("given", ["much", "0", "nan"])
def test_a_bound_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.setenv("SLRPROP_MEMORY", given)
    with pytest.raises(SlrpropError, match=f"^SLRPROP_MEMORY must be a number of megabytes from 1, .* got '{given}'$"):
        bound()


PEAK = """
import pathlib, torch, slrprop
from torch import nn
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3
maps = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten()]
model = nn.Sequential(*maps, nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
before = status("VmRSS")
slrprop.plan(model, torch.rand(200, 1, 128, 128), method="low_rank", rank=8)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells the peak")
def test_the_peak_of_convolutions_on_large_maps():
    """200 samples at once would take 210 MB for the first map alone, as much behind its ReLU."""
    run = [sys.executable, "-c", PEAK]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert float(done.stdout.split()[-1]) < 320
