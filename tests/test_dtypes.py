"""Networks in other number formats, of real-valued outputs, of outputs over time, of one output, without biases."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import slrprop
from slrprop import SlrpropError, compress
from slrprop.data import Data
from slrprop.fit.calibration import Calibration
from slrprop.network import open_network
from slrprop.tune import TuneSettings, distilled

SHORT = TuneSettings(epochs=4, batch=64, learning_rate=2e-3)


@pytest.mark.parametrize("level", ["weights", "calibrated", "tuned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_is_compressed_in_its_own_dtype(dtype, level, trained, digits):
    x, y = digits
    model = copy.deepcopy(trained).to(dtype)
    found = compress(model, (x[1200:].to(dtype), y[1200:]), max_bytes="30%", level=level, tuning=SHORT)
    assert found.met and found.drop < 20
    with torch.no_grad():
        assert found.model(x[:3].to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("bits", [32, 4])
def test_tuning_comes_nearer_in_any_dtype(dtype, bits, trained, digits):
    x = digits[0][:600].to(dtype)
    model = copy.deepcopy(trained).to(dtype)
    before = slrprop.plan(model, x, method="low_rank", rank=4, bits=bits, layers=["0", "2"])
    after = slrprop.tune(model, x, before, SHORT)
    notes = after.layers[0].notes
    assert notes["divergence_after"] < notes["divergence_before"]
    for one, other in zip(before.layers, after.layers, strict=True):
        assert {key: array.dtype for key, array in one.fit.arrays().items()} == {
            key: array.dtype for key, array in other.fit.arrays().items()
        }


@pytest.mark.parametrize(
    ("method", "settings"), [("svd", {}), ("slr", {"criterion": "weight"}), ("low_rank", {"refit_head": False})]
)
def test_half_precision_factors_take_half_the_bytes(method, settings):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).half(), torch.randn(40, 64).half()
    (layer,) = slrprop.plan(model, x, method=method, rank=20, layers=["0"], **settings).layers
    assert layer.bytes <= 2 * 2 * 20 * 64 + 32
    made = slrprop.apply(model, slrprop.Plan((layer,)))
    assert sum(p.nbytes for p in made[0].state_dict().values()) < model[0].weight.nbytes + model[0].bias.nbytes


def test_half_precision_numbers_of_a_file_are_counted_as_two_bytes(trained, digits, tmp_path):
    x, y = digits
    model, path = copy.deepcopy(trained).half(), tmp_path / "half.onnx"
    slrprop.export_onnx(trained, path, x[:4])
    file = onnx.load(path)
    for tensor in file.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*file.graph.input, *file.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(file, path)
    assert [layer.share for layer in slrprop.inspect(path)] == [layer.share for layer in slrprop.inspect(model)]
    own = [2 * layer.numbers for layer in slrprop.inspect(path)]
    found = compress(path, (x[1200:], y[1200:]), max_bytes="50%", methods={"svd": {}, "dense": {"bits": 8}})
    biases = [2 * module.out_features for module in model if isinstance(module, nn.Linear)]
    assert [curve[0].bytes for curve in found.curves.values()] == [sum(pair) for pair in zip(own, biases, strict=True)]
    for point in found.points:
        if point.measured is not None:
            assert point.measured.bytes == pytest.approx(point.predicted_bytes, rel=0.05)


def test_shares_are_of_the_bytes_where_numbers_are_of_several_kinds():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, bias=False).double(), nn.Flatten(), nn.Linear(24, 8, bias=False))
    first, second = slrprop.inspect(model)
    assert (first.shape, second.shape) == ((12, 8), (24, 8))
    assert first.share == 8 * 96 / (4 * 192 + 8 * 96) and second.share == 4 * 192 / (4 * 192 + 8 * 96)


def test_a_layer_whose_new_bias_makes_it_larger_stays_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 1000, bias=False), nn.ReLU(), nn.Linear(1000, 4))
    found = slrprop.plan(model, torch.randn(50, 9), method="low_rank", rank=8, layers=["0"], refit_head=False)
    assert found.left_dense == {"0": "low_rank would store 36,288 bytes instead of 36,000"}


def test_a_layer_of_one_output_is_rounded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 1))
    found = compress(model, torch.randn(64, 600), max_bytes="50%")
    assert found.met and [layer.method for layer in found.plan.layers] == ["dense"]


def test_a_layer_that_no_method_has_a_form_of_is_named():
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    tied[2].weight = tied[0].weight
    for model, told in (
        (nn.Sequential(nn.Linear(600, 1)), "0: no form of it is smaller"),
        (tied, "0: its weight is also 2"),
    ):
        width = model[0].in_features
        with pytest.raises(SlrpropError, match=f"no layer can be made smaller .{told}"):
            compress(model, torch.randn(64, width), max_bytes="50%", methods={"svd": {}})


def test_outputs_over_time_are_tuned_without_a_chain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 5)).eval()
    data = Data(torch.randn(40, 7, 12), 16)
    network = open_network(model, data)
    before = slrprop.plan(model, data, method="svd", rank=3, layers=["0"])
    notes = distilled(network, data, before, SHORT, quiet=True).layers[0].notes
    assert notes["divergence_after"] < notes["divergence_before"]


class Doubled(nn.Module):
    """Twice a network's outputs: a function that no chain has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return torch.stack([y, y]).cumsum(0)[1]


class TestRealValuedOutputs:
    """Two outputs that are numbers, not classes: what both have in common counts as much as their difference."""

    @pytest.fixture
    def regressor(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2)).eval()

    @pytest.mark.parametrize("chained", [True, False])
    def test_the_metric_is_that_of_squares(self, regressor, chained):
        """Along a chain and by automatic differentiation."""
        model = regressor if chained else Doubled(regressor)
        x, of = torch.randn(30, 10), {}
        for kind, targets in (("real", torch.randn(30, 2)), ("classes", torch.randint(0, 2, (30,)))):
            data = Data((x, targets))
            of[kind] = Calibration(open_network(model, data), data).regression("2" if chained else "inner.2", {}).metric
        together = torch.ones(2, dtype=torch.float64)
        scale = 1 if chained else 4
        assert together @ of["real"] @ together == pytest.approx(scale * 2 * 1.05)
        assert together @ of["classes"] @ together == pytest.approx(scale * 2 * 0.05 / 2)

    def test_tuning_takes_back_a_common_shift(self, regressor):
        x = torch.randn(400, 10)
        data = Data((x, torch.randn(400, 2)))
        network = open_network(regressor, data)
        before = slrprop.plan(regressor, (x, None), method="low_rank", rank=4, layers=["0"], refit_head=False)
        moved = copy.deepcopy(before)
        moved.layers[0].bias.add_(0.3)
        after = distilled(network, data, moved, TuneSettings(batch=64, learning_rate=1e-2), quiet=True)
        wanted = regressor(x)
        far, near = ((slrprop.apply(regressor, plan)(x) - wanted).square().mean() for plan in (moved, after))
        assert near < 0.5 * far
        assert after.layers[0].notes["divergence_after"] < 0.5 * after.layers[0].notes["divergence_before"]
