"""Budgets on latency: what a sample is multiplied by how often, forms by what they measured, ranks in whole vector blocks."""

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import slrprop
from slrprop import SlrpropError, cli, compress
from slrprop.data import Data
from slrprop.fit.quantize import quantised
from slrprop.forms import Dense, LowRank, Quantized, Spatial, Tucker
from slrprop.latency import layer_latencies
from slrprop.methods import METHODS
from slrprop.network import open_network
from slrprop.operators import Convolution, MatMul
from slrprop.search import times
from slrprop.search.blocks import in_blocks
from slrprop.search.judge import Door, Log
from slrprop.search.times import Times


class Tokens(nn.Module):
    """A product for each of a sample's rows, then one for all of them."""

    def __init__(self):
        super().__init__()
        self.each, self.all = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.all(self.each(x).relu().mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return torch.randn(160, 3, 8, 12)


def test_both_doors_count_products_alike(net, images, tmp_path):
    """Of maps all places, of tokens all rows; whatever the number of samples."""
    for name, model, x, wanted in (
        ("maps", net, images[:7], [96, 24, 1]), ("tokens", Tokens().eval(), torch.randn(4, 9, 6), [9, 1])
    ):  # fmt: skip
        slrprop.export_onnx(model, tmp_path / f"{name}.onnx", x[:2])
        for network in (open_network(model, Data(x)), open_network(tmp_path / f"{name}.onnx", Data(x))):
            assert [layer.positions for layer in network.layers.values()] == wanted


def form(kind, m, n):
    return kind(*[torch.randn(sides) for sides in {LowRank: ((m, 4), (4, n)), Dense: ((m, n),)}[kind]])


@pytest.mark.parametrize("positions", [1, 30])
def test_a_layer_alone_is_timed_in_every_form(positions):
    """Times are positive, and a product of a quarter of the numbers takes less time where these are many."""
    square = (3, 3)
    operator = Convolution(square, (2, 2), ((1, 1), (0, 1)), (1, 1))
    spatial = Spatial(square, torch.randn(24, 2), torch.randn(6, 5))
    tucker = Tucker(square, torch.randn(8, 2), torch.randn(18, 3), torch.randn(3, 5))
    forms = {"": form(Dense, 72, 5), "low rank": form(LowRank, 72, 5), "spatial": spatial, "Tucker": tucker}
    forms |= {f"{name} in 4 bits": quantised(form, 4) for name, form in forms.items() if name}
    found = layer_latencies(forms, operator, positions, repetitions=2)
    assert found.keys() == forms.keys() and all(0 < seconds < 1 for seconds in found.values())
    wide = {"": Dense(torch.randn(1024, 1024)), "narrow": LowRank(torch.randn(1024, 64), torch.randn(64, 1024))}
    found = layer_latencies(wide, MatMul(), 64)
    assert found["narrow"] < 0.7 * found[""]


def test_maps_are_as_large_as_they_were_counted(net, images):
    operator = open_network(net, Data(images[:3])).operator("2")
    assert operator.read((4, 6)) == (7, 11) and operator.made((7, 11)) == (4, 6)


@pytest.mark.parametrize(
    ("method", "sides", "key", "wanted"),
    [
        ("low_rank", (9 * 64, 64), "rank", [48, 32, 16]),
        ("spatial", (9 * 64, 128), "rank", [128, 112, 96, 80, 64, 48, 32, 16]),
        ("tucker", (9 * 64, 128), "keep", [0.75, 0.5, 0.25]),
    ],
)
def test_ranks_are_whole_blocks(method, sides, key, wanted):
    """All multiples of 16 that the ladder comes near to; Tucker's channels are such on both sides."""
    operator = Convolution((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    ladder = METHODS[method].settings.ladder(*sides)
    assert [step[key] for step in in_blocks(ladder, operator, sides, 16)[::-1]] == wanted
    assert in_blocks(ladder, operator, sides, 1) == ladder
    narrow = METHODS[method].settings.ladder(9 * 24, 64)
    assert in_blocks(narrow, operator, (9 * 24, 64), 16) == narrow


def test_a_budget_on_latency_goes_by_what_was_measured(net, images, monkeypatch):
    """Spatial forms are timed fast and low-rank ones slow, whatever their numbers; ranks come in blocks, for bytes alone they don't."""

    def told(forms, operator, positions, integers=False):
        def share(form):
            plain = form.codes if isinstance(form, Quantized) else form
            return (
                0.2 + 1e-3 * plain.second.shape[0]
                if isinstance(plain, Spatial)
                else 1 + 0.1 * isinstance(plain, LowRank)
            )

        return {name: 1e-6 * positions * share(form) for name, form in forms.items()}

    def latencies(self, plans, repetitions=50):
        return {
            name: 1e-3 * (1 - 0.4 * sum(layer.method == "spatial" for layer in plan.layers)) for name, plan in plans.items()
        }  # fmt: skip

    monkeypatch.setattr(times, "layer_latencies", told)
    monkeypatch.setattr(Door, "latencies", latencies)
    methods = [("low_rank", {}), ("spatial", {})]
    found = compress(net, images, max_latency="70%", methods=methods, block=16)
    assert found.met and {layer.method for layer in found.plan.layers} - {"dense"} == {"spatial"}
    assert all(layer.settings["rank"] % 16 == 0 for layer in found.plan.layers if layer.name == "2")
    assert found.left_dense["6"] == "no form of it runs faster"
    assert all(c.layer.settings["rank"] % 16 == 0 for c in found.curves["2"][1:])
    free = compress(net, images, max_bytes="60%", methods=methods)
    assert any(c.layer.settings["rank"] % 16 for c in free.curves["2"][1:])
    assert all(math.isnan(c.seconds) for c in free.curves["2"])


def test_forms_of_equal_arrays_are_timed_once(net, images, monkeypatch, tmp_path):
    """Whatever their bits, and again not where a run goes on."""
    calls = []

    def told(forms, operator, positions, integers=False):
        calls.append(list(forms))
        return {name: 1e-6 * form.multiplications for name, form in forms.items()}

    monkeypatch.setattr(times, "layer_latencies", told)
    monkeypatch.setattr(Door, "latencies", lambda self, plans, repetitions=50: dict.fromkeys(plans, 1e-3))
    methods = [("low_rank", {"bits": bits}) for bits in (32, 8, 4)]
    first = compress(net, images, max_latency="100%", methods=methods, layers="2", run_dir=tmp_path)
    asked = [name for forms in calls for name in forms if name]
    assert len(asked) == len(set(asked)) == 3
    again = compress(net, images, max_latency="100%", methods=methods, layers="2", run_dir=tmp_path)
    assert len(calls) == 1 and [c.seconds for c in again.curves["2"]] == [c.seconds for c in first.curves["2"]]
    network = open_network(net, Data(images))
    assert [c.seconds for c in Times(network, Log(None)).of("2", again.curves["2"][:1])] == [1e-6 * 9 * 32 * 64]


def test_what_is_not_fitted_yet_stands_between_what_is(net, images, monkeypatch):
    """By its numbers, among forms of its own method and bits."""
    monkeypatch.setattr(
        times, "layer_latencies", lambda forms, *_: {name: 1e-9 * forms[name].numbers for name in forms}
    )
    monkeypatch.setattr(Door, "latencies", lambda self, plans, repetitions=50: dict.fromkeys(plans, 1e-3))
    found = compress(net, images, max_latency="100%", methods=[("low_rank", {"bits": 8})], layers="2")
    dense, large, middle, small = sorted(found.curves["2"], key=lambda candidate: -candidate.bytes)
    guess = replace(middle, layer=replace(middle.layer, fit=None), seconds=math.nan)
    told = Times(open_network(net, Data(images)), Log(None)).of("2", [dense, large, guess, small])
    assert told[2].seconds == pytest.approx((large.seconds + small.seconds) / 2) == pytest.approx(middle.seconds)


@pytest.mark.parametrize("block", [0, 2.5, True, "16"])
def test_a_block_is_a_whole_number(net, images, block):
    with pytest.raises(SlrpropError, match="block must be a whole number from 1, got"):
        compress(net, images, max_latency="50%", block=block)


def test_really_faster(tmp_path):
    """A wide convolution from the command line, nothing faked; its batch norm is put into it, or left where it is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 3),
    ).eval()  # fmt: skip
    x = torch.randn(90, 3, 8, 8)
    torch.onnx.export(
        model, (x[:2],), tmp_path / "model.onnx", dynamo=False, do_constant_folding=False, dynamic_axes={"x": {0: "n"}},
        input_names=["x"], training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    np.save(tmp_path / "x.npy", x.numpy())
    call = ["compress", "model.onnx", "--calibration", "x.npy", "--max-latency", "75%", "--method", "spatial", "-o", "small.onnx", "--json"]  # fmt: skip
    for given, left in ((["--block", "32"], 0), (["--keep-batch-norm"], 1)):
        with contextlib.chdir(tmp_path):
            result = CliRunner().invoke(cli.app, call + given)
        told = json.loads(result.stdout)
        assert told["met"] and told["latency"][1] <= 0.75 * told["latency"][0]
        (rank,) = (layer["settings"]["rank"] for layer in told["plan"]["layers"] if layer["method"] == "spatial")
        assert rank % (16 if left else 32) == 0 and ("folded" in told["plan"]) == (not left)
        graph = onnx.load(tmp_path / "small.onnx").graph
        assert [node.op_type for node in graph.node].count("BatchNormalization") == left
        (tmp_path / "small.onnx").unlink()
