"""Batches go through networks in parts that fit into memory, with the same outputs; peaks are bounded."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import slrprop
from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.fit.calibration import Calibration
from slrprop.fit.quantize import quantised, rounded
from slrprop.fit.regression import Spread
from slrprop.forms import Dense, Form, LowRank
from slrprop.forms.quantized import CODES
from slrprop.linalg import between, mirrored
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
plan = slrprop.plan  # loads what it needs
before = status("VmRSS")
plan(model, torch.rand(200, 1, 128, 128), method="low_rank", rank=8)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells the peak")
def test_the_peak_of_convolutions_on_large_maps():
    """200 samples at once would take 210 MB for the first map alone, as much behind its ReLU."""
    run = [sys.executable, "-c", PEAK]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert float(done.stdout.split()[-1]) < 320


def held(form):
    """Bytes of all tensors of a form, those without any memory aside."""
    values = [*vars(form).values()]
    values += [value for inner in values if isinstance(inner, dict) for value in inner.values()]
    own = sum(value.nbytes for value in values if isinstance(value, torch.Tensor) and not value.is_meta)
    return own + sum(held(value) for value in values if isinstance(value, Form))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", [LowRank(torch.randn(64, 8), torch.randn(8, 32)), Dense(torch.randn(65, 33))])
def test_forms_in_few_bits_hold_no_more_than_is_stored(form, bits):
    """A search keeps hundreds of them."""
    packed = quantised(form, bits)
    assert held(packed) == sum(array.nbytes for array in packed.arrays().values()) == packed.bytes
    low, high = CODES[bits]
    for name, codes in packed.codes.matrices().items():
        assert codes.dtype == torch.int8 and codes.min() >= low and codes.max() <= high
        torch.testing.assert_close(codes * packed.scales[name].float().unsqueeze(packed.scale_axes()[name]), packed.plain().matrices()[name], rtol=0, atol=0)  # fmt: skip


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                self.bytes = max(self.bytes, value.numel() * value.itemsize)
        return made


@pytest.mark.parametrize("settings", [{"method": "low_rank", "rank": 20}, {"method": "dense"}])
def test_an_embedding_is_fitted_without_a_wider_copy_of_it(settings, monkeypatch):
    """In float64 a table of words would take as much as a network: no tensor is larger than the table itself."""
    torch.manual_seed(0)
    monkeypatch.setattr("slrprop.linalg.TOGETHER", 1 << 12)
    model = nn.Sequential(nn.Embedding(4000, 32), nn.Flatten(), nn.Linear(3 * 32, 4)).eval()
    with Largest() as largest:
        slrprop.plan(model, torch.randint(0, 4000, (50, 3)), layers="0", bits=4, **settings)
    assert largest.bytes <= model[0].weight.nbytes


class Residual(nn.Module):
    """Dense layers of which none stands in a chain."""

    def __init__(self):
        super().__init__()
        self.layers, self.last = nn.ModuleList(nn.Linear(40, 40) for _ in range(6)), nn.Linear(40, 5)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.last(x)


def test_regressions_are_let_go_of_once_the_next_is_asked_for(monkeypatch):
    """Where all do not fit: of six layers two or three at once."""
    torch.manual_seed(0)
    monkeypatch.setattr("slrprop.fit.calibration.bound", lambda: 600_000)
    data = Data(torch.randn(300, 40))
    network = open_network(Residual().eval(), data)
    calibration = Calibration(network, data)
    names = network.order[:6]
    calibration.prepare(names)
    before, means = None, []
    for name in names:
        task = calibration.regression(name, {})
        means.append(task.mean)
        assert before is None or before() is None
        before = weakref.ref(task)
        del task
    monkeypatch.undo()
    for name, mean in zip(names, means, strict=True):
        torch.testing.assert_close(mean, Calibration(network, data).regression(name, {}).mean)


def test_a_search_that_keeps_no_plan_finds_the_same(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    data, asked = torch.randn(60, 60), {"max_bytes": "60%", "methods": {"low_rank": {"bits": 8}, "dense": {"bits": 8}}}
    want = slrprop.compress(model, data, **asked)
    monkeypatch.setattr("slrprop.search.shares.bound", lambda: 0)
    found = slrprop.compress(model, data, **asked)
    assert found.plan.to_json() == want.plan.to_json() and found.evaluations == want.evaluations


def test_what_is_done_a_part_at_a_time_is_the_same(monkeypatch):
    torch.manual_seed(0)
    upper = torch.randn(300, 300, dtype=torch.float64)
    symmetric = upper.triu() + upper.triu(1).T
    assert torch.equal(mirrored(upper), symmetric)
    matrix, x = torch.randn(50, 30, dtype=torch.float64), torch.randn(200, 50, dtype=torch.float64)
    want = rounded(matrix, 0, 4, Spread.of(x.T @ x)), rounded(matrix, 1, 4)
    monkeypatch.setattr("slrprop.fit.quantize.COLUMNS", 200)
    monkeypatch.setattr("slrprop.linalg.TOGETHER", 100)
    found = rounded(matrix, 0, 4, Spread.of(x.T @ x)), rounded(matrix, 1, 4)
    for one, other in zip(want, found, strict=True):
        assert all(map(torch.equal, one, other))
    diagonal = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(between(matrix, diagonal, matrix), matrix.T @ diagonal.diag() @ matrix)
