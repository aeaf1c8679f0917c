"""Layers without some of their neurons, and the removal of neurons that nobody reads, for every form."""

import copy
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

import slrprop
from slrprop import SlrpropError
from slrprop.api import planned_layer
from slrprop.arrange import arranged
from slrprop.data import Data
from slrprop.fit.quantize import quantised
from slrprop.forms import Dense, Fit, Form, LowRank, Narrowed, Quantized, SparseLowRank, express, restored
from slrprop.forms.base import KINDS
from slrprop.linalg import truncated_svd
from slrprop.methods import Decision, Problem, find_method
from slrprop.network import TorchNetwork
from slrprop.network.junction import Junction
from slrprop.network.torch.modules import layer_from
from slrprop.operators import MatMul
from slrprop.plan import Plan

A_TO_B = [Junction(("a",), (), {"b": 1})]


def forms(m=9, n=7) -> dict[str, Form]:
    """One of each kind that may lose neurons."""
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    rows, columns = torch.arange(m) % 3 != 1, torch.arange(n) % 2 == 0
    svd = truncated_svd(weight, 4)
    plain = {
        "dense": Dense(weight),
        "low_rank": LowRank.from_svd(svd),
        "sparse_low_rank": SparseLowRank.shorten(svd, 2, ~rows, ~columns),
        "without_rank": SparseLowRank.shorten(svd, 0, ~rows, ~columns),
        "narrowed": Narrowed.cut(weight, rows, columns),
    }
    return plain | {f"{name}_8": quantised(form, 8) for name, form in plain.items()}


@pytest.mark.parametrize("name", forms())
def test_neurons_can_be_left_out(name):
    form = forms()[name]
    rows, columns = torch.tensor([8, 0, 5, 4]), torch.tensor([3, 6, 0])
    assert form.selects
    torch.testing.assert_close(form.permuted(rows, columns).dense(), form.dense()[rows][:, columns])
    torch.testing.assert_close(form.permuted(columns=columns).dense(), form.dense()[:, columns])
    everything = torch.randperm(9)
    torch.testing.assert_close(form.permuted(rows=everything).dense(), form.dense()[everything])
    assert not form.dense()[~form.read()].any()
    x = torch.randn(3, 5, 9)
    torch.testing.assert_close(express(form, MatMul(), x), x @ form.dense())


@pytest.mark.parametrize("name", forms())
def test_modules_of_every_form_with_neurons_left_out(name):
    form, x = forms()[name].permuted(torch.tensor([8, 0, 5, 4, 1]), torch.tensor([3, 6, 1, 0])), torch.randn(11, 5)
    bias = torch.randn(4)
    torch.testing.assert_close(layer_from(Fit(form).over(bias))(x), x @ form.dense() + bias, rtol=1e-4, atol=1e-4)


def test_narrowed_is_its_block():
    weight = torch.arange(12.0).reshape(4, 3)
    form = Narrowed.cut(weight, torch.tensor([True, False, True, True]), torch.tensor([False, True, True]))
    assert torch.equal(form.dense(), weight * torch.tensor([1, 0, 1, 1])[:, None] * torch.tensor([0, 1, 1]))
    assert (form.numbers, form.multiplications, form.bytes) == (6, 6, 24 + 2)
    again = restored(form.description(), form.arrays())
    assert torch.equal(again.dense(), form.dense()) and torch.equal(again.rows, form.rows)
    assert torch.equal(form.with_matrices({"block": 2 * form.block}).dense(), 2 * form.dense())
    with pytest.raises(SlrpropError, match="the block must have shape 3 x 2, got"):
        form.with_matrices({"block": weight})
    with pytest.raises(SlrpropError, match="a row mask takes one bool per neuron"):
        Narrowed(weight, torch.ones(4), form.columns)
    with pytest.raises(SlrpropError, match="4 neurons take 1 bytes, got"):
        restored(form.description(), form.arrays() | {"rows": torch.zeros(2, dtype=torch.uint8)})


@pytest.mark.parametrize("second", ["narrowed", "narrowed_8", "without_rank", "without_rank_8"])
@pytest.mark.parametrize("first", [None, *forms()])
def test_what_nobody_reads_goes(first, second):
    before, reading = forms(5, 9)[first or "dense"], forms()[second]
    made, orders = arranged({"b": reading} | ({"a": before} if first else {}), A_TO_B, lambda name: {"a": before}[name])
    assert made["a"].shape == (5, 6) and made["b"].shape == (6, 7)
    assert sorted(orders["a"].tolist()) == reading.read().nonzero()[:, 0].tolist()
    x = torch.randn(20, 5)
    torch.testing.assert_close(
        (x @ made["a"].dense()).relu() @ made["b"].dense(),
        (x @ before.dense()).relu() @ reading.dense(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_forms_that_cannot_lose_neurons_stay():
    class Stiff(Dense):
        kind = "stiff"
        selects = False

    reading = forms()["narrowed"]
    made, orders = arranged({"a": Stiff(torch.randn(5, 9)), "b": reading}, A_TO_B, lambda name: reading)
    assert made["a"].shape == (5, 9)
    assert made["b"].rows.tolist() == [False] * 3 + [True] * 6  # what is read is a slice now
    assert torch.equal(made["b"].dense(), reading.dense()[orders["a"]])
    del KINDS["stiff"]


def test_one_neuron_stays_where_none_is_read():
    reading = Narrowed(torch.zeros(0, 7), torch.zeros(9, dtype=torch.bool), torch.ones(7, dtype=torch.bool))
    made, _ = arranged({"b": reading}, A_TO_B, lambda name: Dense(torch.randn(5, 9)))
    assert made["a"].shape == (5, 1) and made["b"].shape == (1, 7)


def planned(model, data, factors, biases=None):
    """A plan of given forms by layer."""
    opened = Data(data)
    problem = Problem(TorchNetwork(model, opened), opened)
    method = find_method("taylor")
    layers = [
        planned_layer(problem, Decision(name, Fit(form).over((biases or {}).get(name))), method, method.settings())
        for name, form in factors.items()
    ]
    return Plan(tuple(layers), {}, problem.network.junctions(problem.network.order))


def reading_half(model, name):
    """A layer that reads every other input."""
    weight = model.get_submodule(name).weight.detach().T
    return Narrowed.cut(weight, torch.arange(len(weight)) % 2 == 0)


def check(model, plan, x, path):
    """The small network equals the one with zeros, in torch, exported and rewritten; gives the module."""
    twin = copy.deepcopy(model)
    for layer in plan.layers:
        twin.get_submodule(layer.name).weight.data = layer.factors.dense().T.contiguous()
    small = slrprop.apply(model, plan)
    want = twin(x)
    torch.testing.assert_close(small(x), want, rtol=1e-4, atol=1e-4)
    assert slrprop.export_onnx(small, path, x) < 1e-4
    return small


class Between(nn.Module):
    """Two dense layers and a function between."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.BatchNorm1d(8)
        self.between = between
        self.eval()

    def forward(self, x):
        return self.b(self.between(self, self.a(x)))


@pytest.mark.parametrize(
    "between, goes",
    [
        (lambda net, h: h.relu(), True),
        (lambda net, h: torch.flatten(h.tanh(), 1), True),
        (lambda net, h: h.relu().view(-1, 8), False),
        (lambda net, h: h.relu().squeeze(), False),
        (lambda net, h: net.norm(h).relu(), True),
        (lambda net, h: functional.silu(net.norm(h)).view(len(h), -1), True),
        (lambda net, h: net.norm(h.view(-1, 8)).relu(), False),
    ],
)
def test_neurons_stay_where_their_number_is_known(between, goes, tmp_path):
    model, x = Between(between), torch.randn(20, 6)
    small = check(model, planned(model, x, {"b": reading_half(model, "b")}), x, tmp_path / "small.onnx")
    assert (small.a.out_features, type(small.b) is nn.Linear) == ((4, True) if goes else (8, False))


def test_inputs_of_the_network_are_gathered(trained, calibration, tmp_path):
    small = check(trained, planned(trained, calibration, {"0": reading_half(trained, "0")}), calibration[0], tmp_path / "a.onnx")  # fmt: skip
    assert small[0].block.shape == (32, 96) and small[0].in_features == 64
    slrprop.save(small, tmp_path / "small.safetensors")
    loaded = slrprop.load(trained, tmp_path / "small.safetensors")
    assert torch.equal(loaded(calibration[0]), small(calibration[0]))


def test_outputs_that_are_still_read_are_the_bias(trained, calibration, tmp_path):
    weight = trained[4].weight.detach().T
    form = Narrowed.cut(weight, None, torch.arange(10) % 3 > 0)
    small = check(trained, planned(trained, calibration, {"4": form}), calibration[0], tmp_path / "small.onnx")
    assert torch.equal(small(calibration[0])[:, 0], trained[4].bias[:1].expand(300))


def onnx_chain(path, gemm, opset=17):
    """A 6-8-3 chain as a file that says the shape of everything, with Gemm nodes or MatMul and Add."""
    random = torch.Generator().manual_seed(0)
    tensors = {"w1": (6, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    values = {name: torch.randn(shape, generator=random) for name, shape in tensors.items()}
    if gemm:
        nodes = [helper.make_node("Gemm", ["x", "w1", "b1"], ["z"], "one"), helper.make_node("Relu", ["z"], ["h"]),
                 helper.make_node("Gemm", ["h", "w2", "b2"], ["y"], "two")]  # fmt: skip
    else:
        nodes = [helper.make_node("MatMul", ["x", "w1"], ["p"], "one"), helper.make_node("Add", ["p", "b1"], ["z"]),
                 helper.make_node("Relu", ["z"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["q"], "two"),
                 helper.make_node("Add", ["q", "b2"], ["y"])]  # fmt: skip
    hidden = [name for name in ("p", "z", "h") if any(name in node.output for node in nodes)]
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in values.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in hidden],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return values


@pytest.mark.parametrize("gemm", [True, False])
@pytest.mark.parametrize("bits", [32, 8])
def test_files_lose_neurons_and_what_they_said_of_them(gemm, bits, tmp_path):
    values, x = onnx_chain(tmp_path / "full.onnx", gemm), torch.rand(30, 6)
    made = slrprop.plan(tmp_path / "full.onnx", x, method="apoz", keep=0.5, bits=bits)
    slrprop.apply(tmp_path / "full.onnx", made, tmp_path / "small.onnx")
    small = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(small, full_check=True)
    assert sorted(tuple(t.dims) for t in small.graph.initializer if len(t.dims) == 2) == [(4, 3), (6, 4)]
    assert not small.graph.value_info
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (got,) = session.run(None, {"x": x.numpy()})
    one, two = made.layers
    assert isinstance(one.factors, Quantized) == (bits == 8) and isinstance(two.factors, Narrowed)
    want = (x @ one.factors.dense() + one.bias).relu() @ two.factors.dense() + two.bias
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)
    assert values["w1"].shape == one.factors.shape


def test_slr_without_a_reduced_rank_lets_the_layer_before_shrink(trained, calibration):
    made = slrprop.plan(
        trained, calibration, method="slr", criterion="weight", layers=["2"], rank=6, reduction_rate=0.0
    )
    small = slrprop.apply(trained, made)
    assert (small[0].out_features, small[2].in_features) == (48, 48)
    twin = copy.deepcopy(trained)
    twin[2].weight.data = made.layers[0].factors.dense().T.contiguous()
    torch.testing.assert_close(small(calibration[0]), twin(calibration[0]), rtol=1e-4, atol=1e-4)


def test_a_plan_for_other_sizes_is_refused(trained, calibration):
    made = slrprop.plan(trained, calibration, method="apoz", layers=["2"], keep=0.5)
    with pytest.raises(SlrpropError, match="whose sizes differ in this model"):
        slrprop.apply(trained, replace(made, junctions=(Junction(("0",), (), {"4": 1}),)))
