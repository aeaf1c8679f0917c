import numpy as np
import onnx
import pytest
import torch
from torch import nn

import slrprop
from slrprop import SlrpropError
from slrprop.export import session
from slrprop.latency import latencies


@pytest.fixture
def small(trained, calibration):
    return slrprop.apply(trained, slrprop.plan(trained, calibration, method="slr", layers=["0", "2"], rank=6))


def test_the_file_runs_at_any_batch_size(small, digits, tmp_path):
    path = tmp_path / "small.onnx"
    slrprop.export_onnx(small, path, digits[0][:3])
    runtime = session(path)
    for batch in (1, 2, 40):
        x = digits[0][:batch]
        (got,) = runtime.run(None, {runtime.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, small(x).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_graph_holds_blocks_and_no_zeros(small, trained, digits, tmp_path):
    """Stored numbers are the factors', biases and the last layer; nothing is stored twice or padded."""
    slrprop.export_onnx(small, tmp_path / "small.onnx", digits[0][:3])
    graph = onnx.load(tmp_path / "small.onnx").graph
    numbers = sum(int(np.prod(i.dims)) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT)
    factored = small[0].factors().numbers + small[2].factors().numbers
    assert numbers == factored + 96 + 80 + 80 * 10 + 10
    assert not {node.op_type for node in graph.node} & {
        "ScatterND",
        "ScatterElements",
        "Pad",
        "Expand",
        "ConstantOfShape",
    }
    assert {node.domain for node in graph.node} == {""} and len(onnx.load(tmp_path / "small.onnx").opset_import) == 1


def test_a_reduced_rank_of_zero_exports(trained, calibration, tmp_path):
    made = slrprop.plan(trained, calibration, method="slr", layers=["0", "2"], rank=4, reduction_rate=0.1)
    assert slrprop.export_onnx(slrprop.apply(trained, made), tmp_path / "zero.onnx", calibration[0][:3]) < 1e-4


def test_a_fixed_batch(small, digits, tmp_path):
    slrprop.export_onnx(small, tmp_path / "one.onnx", digits[0][:1], dynamic_batch=False)
    assert session(tmp_path / "one.onnx").get_inputs()[0].shape == [1, 64]
    with pytest.raises(SlrpropError, match="has one sample; give two or more, or dynamic_batch=False"):
        slrprop.export_onnx(small, tmp_path / "two.onnx", digits[0][:1])


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_what_can_not_be_exported_leaves_no_file(tmp_path):
    slrprop.export_onnx(nn.Linear(3, 2), tmp_path / "kept.onnx", torch.ones(2, 3))
    before = (tmp_path / "kept.onnx").read_bytes()
    with pytest.raises(SlrpropError, match="can't be exported to ONNX: "):
        slrprop.export_onnx(Branching(), tmp_path / "kept.onnx", torch.ones(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.onnx"]
    assert (tmp_path / "kept.onnx").read_bytes() == before


def test_a_file_that_differs_is_refused(small, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(slrprop.export, "ABSOLUTE", -1.0)
    monkeypatch.setattr(slrprop.export, "RELATIVE", 0.0)
    with pytest.raises(SlrpropError, match="output 0 of the ONNX file differs"):
        slrprop.export_onnx(small, tmp_path / "small.onnx", digits[0][:3])
    assert not list(tmp_path.iterdir())


def test_latencies_are_measured_together(small, trained, digits, tmp_path):
    files = {"original": tmp_path / "a.onnx", "small": tmp_path / "b.onnx"}
    for path, model in zip(files.values(), (trained, small), strict=True):
        slrprop.export_onnx(model, path, digits[0][:3])
    times = latencies(files, [digits[0][:1].numpy()], repetitions=3)
    assert times.keys() == files.keys() and all(0 < seconds < 1 for seconds in times.values())
