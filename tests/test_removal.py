"""Neurons removed between dense layers: the criteria against their definitions, the removal against zeros."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.methods import METHODS, Problem
from slrprop.methods.removal import kept_count, refitted
from slrprop.network import TorchNetwork
from slrprop.relevance.simple import highest
from slrprop.tune import distilled

REMOVAL = ("apoz", "lrp", "nisp", "redundant", "taylor")
PAIRS = {"0": "2", "2": "4"}


def problem_of(model, data):
    opened = Data(data)
    return Problem(TorchNetwork(model, opened), opened)


def kept_of(plan):
    """The neurons that stay between the layers of each pair, as the reading layers say."""
    return {layer.name: layer.factors.read() for layer in plan.layers}


def with_zeros(model, plan):
    """The original network with the plan's weights multiplied out, zeros and all."""
    twin = copy.deepcopy(model)
    for layer in plan.layers:
        linear = twin.get_submodule(layer.name)
        linear.weight.data = layer.factors.dense().T.contiguous()
        if layer.bias is not None:
            linear.bias.data = layer.bias.to(linear.bias)
    return twin


@pytest.mark.parametrize("method", REMOVAL)
class TestEveryCriterion:
    @pytest.fixture
    def plan(self, method, trained, calibration):
        return slrprop.plan(trained, calibration, method=method, layers=["0", "2"], keep=0.25)

    def test_neurons_are_really_gone(self, plan, trained, digits):
        small = slrprop.apply(trained, plan)
        shapes = [tuple(small[i].weight.shape) for i in (0, 2, 4)]
        assert shapes == [(24, 64), (20, 24), (10, 20)]
        assert all(type(small[i]) is nn.Linear for i in (0, 2, 4))
        assert [layer.numbers for layer in plan.layers] == [small[i].weight.numel() for i in (0, 2, 4)]
        torch.testing.assert_close(small(digits[0]), with_zeros(trained, plan)(digits[0]), rtol=1e-4, atol=1e-4)

    def test_the_next_layer_is_named_though_not_asked_for(self, method, trained, calibration):
        made = slrprop.plan(trained, calibration, method=method, layers=["0"], keep=0.25, refit_head=False)
        assert [(layer.name, layer.factors.shape) for layer in made.layers] == [("0", (64, 96)), ("2", (96, 80))]
        small = slrprop.apply(trained, made)
        assert [small[i].weight.shape for i in (0, 2, 4)] == [(24, 64), (80, 24), (10, 80)]

    def test_keeping_all_gives_the_original(self, method, trained, calibration, digits):
        made = slrprop.plan(trained, calibration, method=method, keep=1.0)
        assert not made.layers and set(made.left_dense) == {"0", "2"}
        assert torch.equal(slrprop.apply(trained, made)(digits[0]), trained(digits[0]))

    def test_refit_lowers_the_output_error(self, method, trained, calibration):
        x, _ = calibration
        with torch.no_grad():
            want = trained[:3](x)
            errors = []
            for refit in (True, False):
                made = slrprop.plan(trained, calibration, method=method, layers=["0"], keep=0.3, refit=refit)
                errors.append((slrprop.apply(trained, made)[:3](x) - want).square().mean())
        assert errors[0] < 0.8 * errors[1]

    def test_the_mean_output_stays(self, plan, trained, calibration):
        small, (x, _) = slrprop.apply(trained, plan), calibration
        with torch.no_grad():
            torch.testing.assert_close(small[:3](x).mean(0), trained[:3](x).mean(0)[kept_of(plan)["4"]], rtol=1e-4, atol=1e-4)  # fmt: skip

    def test_onnx_file_is_really_smaller(self, plan, method, trained, calibration, digits, tmp_path):
        slrprop.export_onnx(trained, tmp_path / "full.onnx", calibration[0][:4])
        made = slrprop.plan(tmp_path / "full.onnx", calibration, method=method, keep=0.25)
        slrprop.apply(tmp_path / "full.onnx", made, tmp_path / "small.onnx")
        graph = onnx.load(tmp_path / "small.onnx").graph
        sizes = sorted(int(np.prod(tensor.dims)) for tensor in graph.initializer if len(tensor.dims) == 2)
        assert sizes == sorted([64 * 24, 24 * 20, 20 * 10])
        assert not any(node.op_type in ("Gather", "Slice") for node in graph.node)
        assert (tmp_path / "small.onnx").stat().st_size < 0.3 * (tmp_path / "full.onnx").stat().st_size
        session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
        x = digits[0][:50]
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), with_zeros(trained, made_like(made, plan))(x), rtol=1e-3, atol=1e-3)  # fmt: skip

    def test_small_networks_save_and_load(self, plan, trained, digits, tmp_path):
        small = slrprop.apply(trained, plan)
        slrprop.save(small, tmp_path / "small.safetensors")
        loaded = slrprop.load(trained, tmp_path / "small.safetensors")
        assert torch.equal(loaded(digits[0]), small(digits[0]))
        slrprop.save(loaded, tmp_path / "again.safetensors")
        assert torch.equal(slrprop.load(trained, tmp_path / "again.safetensors")(digits[0]), small(digits[0]))
        with pytest.raises(SlrpropError, match="is 64 x 24 in this model, but 64 x 96 in the file"):
            slrprop.load(small, tmp_path / "small.safetensors")

    def test_bad_settings_are_named(self, method, trained, calibration):
        for keep in (0, 1.5, "half", True):
            with pytest.raises(SlrpropError, match="keep must be above 0 and at most 1, got"):
                slrprop.plan(trained, calibration, method=method, keep=keep)
        with pytest.raises(SlrpropError, match="refit must be True or False, got"):
            slrprop.plan(trained, calibration, method=method, keep=0.5, refit="yes")
        with pytest.raises(SlrpropError, match=f"method '{method}' can't treat layer '4'"):
            slrprop.plan(trained, calibration, method=method, layers=["4"], keep=0.5)

    def test_ladder_goes_up(self, method):
        settings = METHODS[method].settings
        numbers = [settings(**rung).stored_numbers(100, 50) for rung in settings.ladder(100, 50)]
        assert numbers == sorted(set(numbers)) and numbers[-1] < 5000


def made_like(plan, other):
    """A plan of an ONNX file's layers under the module's names."""
    from dataclasses import replace

    layers = tuple(replace(mine, name=theirs.name) for mine, theirs in zip(plan.layers, other.layers, strict=True))
    return replace(plan, layers=layers)


def test_apoz_is_for_relu_layers(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    made = slrprop.plan(model, calibration, method="apoz", keep=0.5)
    assert [layer.name for layer in made.layers] == ["2", "4"]


def test_redundant_keeps_one_of_each_cluster(trained):
    """Copies of a neuron at another length: only the longest stays, and nothing is lost."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        for linear in (model[0],):
            linear.weight[48:] = 0.5 * linear.weight[:48]
            linear.bias[48:] = 0.5 * linear.bias[:48]
    x = torch.rand(400, 64, generator=torch.Generator().manual_seed(0))
    made = slrprop.plan(model, x, method="redundant", layers=["0"], keep=0.5, refit_head=False)
    assert kept_of(made)["2"].nonzero()[:, 0].tolist() == list(range(48))
    torch.testing.assert_close(slrprop.apply(model, made)(x), model(x), rtol=1e-2, atol=1e-2)


def test_most_relevant_and_ties():
    assert [kept_count(10, keep) for keep in (0.01, 0.25, 0.5, 1.0)] == [1, 3, 5, 10]
    assert highest(torch.tensor([1.0, 3.0, 1.0, 2.0]), 2).tolist() == [False, True, False, True]
    assert highest(torch.zeros(4), 2).tolist() == [False, False, True, True]


def test_the_head_is_refitted_where_it_is_not_touched(trained, calibration):
    """Removing neurons before the first hidden layer leaves the last one dense, with other weights."""
    errors = []
    for head in (True, False):
        made = slrprop.plan(trained, calibration, method="lrp", layers=["0"], keep=0.1, refit_head=head)
        assert [layer.name for layer in made.layers] == ["0", "2", "4"][: 3 if head else 2]
        with torch.no_grad():
            small = slrprop.apply(trained, made)
            errors.append((small(calibration[0]) - trained(calibration[0])).square().mean())
    assert errors[0] < errors[1]


def test_least_squares_on_the_inputs_that_stay(trained, calibration):
    """The refit is numpy's, up to the ridge; inputs that are dead or say the same do no harm."""
    model = copy.deepcopy(trained).double()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = -1
        model[0].weight[4], model[0].bias[4] = model[0].weight[5], model[0].bias[5]
    x = calibration[0].double()
    task = problem_of(model, (x, None)).calibration.regression("2", {}, weighted=False)
    rows = torch.arange(96) < 40
    with torch.no_grad():
        hidden, want = model[:2](x), model[:3](x)
    found = refitted(task, rows)
    fitted = (hidden[:, rows] - hidden[:, rows].mean(0)) @ found + want.mean(0)
    design = torch.cat([hidden[:, rows], torch.ones(len(x), 1).double()], 1).numpy()
    best = design @ np.linalg.lstsq(design, want.numpy(), rcond=1e-9)[0]
    least = np.square(best - want.numpy()).sum()
    assert least <= (fitted - want).square().sum().item() < 1.01 * least
    torch.testing.assert_close(refitted(task, torch.ones(96, dtype=torch.bool)), task.weight)


@pytest.mark.parametrize("method", REMOVAL)
def test_in_few_bits(method, trained, calibration, digits):
    plain, small = (slrprop.plan(trained, calibration, method=method, keep=0.5, bits=bits) for bits in (32, 8))
    assert sum(layer.bytes for layer in small.layers) < 0.4 * sum(layer.bytes for layer in plain.layers)
    with torch.no_grad():
        a, b = (slrprop.apply(trained, made)(digits[0]) for made in (plain, small))
    assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.97


@pytest.mark.parametrize("method", REMOVAL)
def test_the_search_refuses(method, trained, calibration):
    with pytest.raises(SlrpropError, match=f"method '{method}' treats layers together"):
        slrprop.compress(trained, calibration, max_bytes="25%", methods={method: {}})


class Block(nn.Module):
    """A residual block on tokens, as in transformers: no chain leads from it to the outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)
        self.eval()

    def forward(self, x):
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))


@pytest.mark.parametrize("method", ["nisp", "redundant"])
def test_inside_residual_blocks(method, tmp_path):
    model, x = Block(), torch.rand(50, 4, 8, generator=torch.Generator().manual_seed(0))
    made = slrprop.plan(model, x, method=method, layers="up", keep=0.5, refit_head=False)
    assert [layer.name for layer in made.layers] == ["up", "down"]
    small = slrprop.apply(model, made)
    assert (small.up.out_features, small.down.in_features) == (16, 16)
    torch.testing.assert_close(small(x), with_zeros(model, made)(x), rtol=1e-4, atol=1e-4)
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", x[:5]) < 1e-4
    for criterion in ("taylor", "lrp"):
        with pytest.raises(SlrpropError, match=f"method '{criterion}' can't treat layer 'up'"):
            slrprop.plan(model, x, method=criterion, layers=["up"], keep=0.5)


def test_batch_norm_between_gets_smaller_too(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)).eval()
    made = slrprop.plan(model, calibration, method="lrp", keep=0.5)
    assert [(layer.name, layer.numbers) for layer in made.layers] == [("0", 640), ("3", 100)]
    small = slrprop.apply(model, made)
    assert (small[0].out_features, small[1].num_features, small[3].in_features) == (10, 10, 10)
    torch.testing.assert_close(small(calibration[0]), with_zeros(model, made)(calibration[0]), rtol=1e-4, atol=1e-4)


def test_distillation_takes_what_is_left(trained, calibration):
    """The smaller layers learn from the original's outputs; no removed neuron comes back."""
    data = Data(calibration)
    network = TorchNetwork(trained, data)
    made = slrprop.plan(trained, calibration, method="lrp", keep=0.15)
    tuned = distilled(network, data, made, quiet=True)
    before, after = (slrprop.apply(trained, plan) for plan in (made, tuned))
    assert [before[i].weight.shape for i in (0, 2, 4)] == [after[i].weight.shape for i in (0, 2, 4)]
    with torch.no_grad():
        want = trained(calibration[0]).log_softmax(1)
        worse, better = (
            functional.kl_div(small(calibration[0]).log_softmax(1), want, reduction="batchmean", log_target=True)
            for small in (before, after)
        )
    assert better < worse
