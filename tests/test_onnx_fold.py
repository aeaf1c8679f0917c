"""Batch norm in ONNX files is put into the layer before it, where that changes nothing that is computed."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import slrprop
from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.network import OnnxNetwork, folded
from slrprop.network.onnx.file import OnnxFile

RANDOM = np.random.default_rng(0)


def norm(x: str, y: str, name: str, **attributes: object) -> onnx.NodeProto:
    parts = [f"{name}_{part}" for part in ("gain", "shift", "mean", "var")]
    return helper.make_node("BatchNormalization", [x, *parts], [y], name, **attributes)


def written(path, nodes, inputs, outputs, shapes, dtype=np.float32):
    """A file of these nodes; ``shapes`` are those of its constants, those of batch norms by their name."""
    arrays = {}
    for name, shape in shapes.items():
        if isinstance(shape, int):
            arrays |= {f"{name}_{part}": RANDOM.uniform(0.5, 2, shape) for part in ("gain", "shift", "mean", "var")}
        else:
            arrays[name] = RANDOM.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array.astype(dtype), name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def outputs_of(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.fixture
def net(tmp_path):
    """Convolutions with and without a bias, in groups, transposed; a Gemm and two MatMuls; every one before a batch norm."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["a_y"], "conv", pads=[1, 1, 1, 1]),
        norm("a_y", "n_a", "norm_a"),
        helper.make_node("Relu", ["n_a"], ["r_a"]),
        helper.make_node("Conv", ["r_a", "b", "b_b"], ["b_y"], pads=[1, 1, 1, 1], group=2),
        norm("b_y", "n_b", "norm_b", epsilon=1e-3),
        helper.make_node("Relu", ["n_b"], ["r_b"]),
        helper.make_node("ConvTranspose", ["r_b", "c", "c_b"], ["c_y"], "up", strides=[2, 2]),
        norm("c_y", "n_c", "norm_c"),
        helper.make_node("GlobalAveragePool", ["n_c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "d", "d_b"], ["d_y"], "gemm", transB=1, alpha=0.5, beta=2.0),
        norm("d_y", "n_d", "norm_d"),
        helper.make_node("Relu", ["n_d"], ["r_d"]),
        helper.make_node("MatMul", ["r_d", "e"], ["e_y"]),
        norm("e_y", "n_e", "norm_e"),
        helper.make_node("Tanh", ["n_e"], ["r_e"]),
        helper.make_node("MatMul", ["r_e", "g"], ["g_m"]),
        helper.make_node("Add", ["g_m", "g_b"], ["g_y"]),
        norm("g_y", "y", ""),
    ]  # fmt: skip
    nodes[-1].CopyFrom(helper.make_node("BatchNormalization", ["g_y", *nodes[1].input[1:]], ["y"]))
    for index, part in enumerate(("gain", "shift", "mean", "var"), 1):
        nodes[-1].input[index] = f"last_{part}"
    shapes = {
        "a": (8, 3, 3, 3), "norm_a": 8, "b": (12, 4, 3, 3), "b_b": (12,), "norm_b": 12, "c": (12, 6, 2, 2), "c_b": (6,),
        "norm_c": 6, "d": (20, 6), "d_b": (20,), "norm_d": 20, "e": (20, 16), "norm_e": 16, "g": (16, 5), "g_b": (5,),
        "last": 5,
    }  # fmt: skip
    return written(tmp_path / "net.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 5]}, shapes)


NORMS = {"conv": "norm_a", "b_y": "norm_b", "up": "norm_c", "gemm": "norm_d", "e_y": "norm_e", "g_y": "y"}


def test_every_layer_takes_in_the_batch_norm_behind_it(net, tmp_path):
    """Outputs stay to 1e-5, layers keep their names, and no batch norm is left."""
    network = OnnxNetwork(net, None)
    assert network.norms == NORMS
    file = folded(OnnxFile.open(net), network.norms)
    file.write(tmp_path / "folded.onnx")
    graph = onnx.load(tmp_path / "folded.onnx").graph
    assert all(node.op_type != "BatchNormalization" for node in graph.node)
    assert file.numbers == network.numbers - 4 * (8 + 12 + 6 + 20 + 16 + 5) + 8 + 16
    onnx.checker.check_model(onnx.load(tmp_path / "folded.onnx"), full_check=True)
    again = OnnxNetwork(file, None)
    assert again.names == network.names and again.norms == {}
    for size in (1, 4):
        x = RANDOM.standard_normal((size, 3, 8, 8)).astype(np.float32)
        (want,), (got,) = outputs_of(net, x), outputs_of(tmp_path / "folded.onnx", x)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def conv(**changes):
    """One convolution and one batch norm, and what of both is asked for."""
    nodes = [helper.make_node("Conv", ["x", "a"], ["a_y"], "conv"), norm("a_y", "y", "norm")]
    return {"nodes": nodes, "inputs": {"x": ["n", 3, 4, 4]}, "outputs": {"y": ["n", 8, 4, 4]},
            "shapes": {"a": (8, 3, 1, 1), "norm": 8}} | changes  # fmt: skip


STAYS = {
    "its output is the model's too": conv(outputs={"y": ["n", 8, 4, 4], "a_y": ["n", 8, 4, 4]}),
    "its output is read elsewhere": conv(
        nodes=[*conv()["nodes"], helper.make_node("Relu", ["a_y"], ["z"])],
        outputs={"y": ["n", 8, 4, 4], "z": ["n", 8, 4, 4]},
    ),
    "its weight is another layer's too": conv(
        nodes=[*conv()["nodes"], helper.make_node("Conv", ["x", "a"], ["z"], "twin")],
        outputs={"y": ["n", 8, 4, 4], "z": ["n", 8, 4, 4]},
    ),
    "the statistics are an input": conv(
        inputs={"x": ["n", 3, 4, 4], "norm_mean": [8], "norm_var": [8]},
        nodes=[conv()["nodes"][0], helper.make_node("BatchNormalization", ["a_y", "gain", "gain", "norm_mean", "norm_var"], ["y"])],
        shapes={"a": (8, 3, 1, 1), "gain": (8,)},
    ),
    "something stands between": conv(
        nodes=[conv()["nodes"][0], helper.make_node("Relu", ["a_y"], ["r"]), norm("r", "y", "norm")]
    ),
    "half precision would be rounded anew": conv(dtype=np.float16),
    "features are not on the norm's axis": conv(
        nodes=[helper.make_node("MatMul", ["x", "a"], ["a_y"], "product"), norm("a_y", "y", "norm")],
        inputs={"x": ["n", 5, 3]}, outputs={"y": ["n", 5, 5]}, shapes={"a": (3, 5), "norm": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", STAYS)
def test_a_batch_norm_stays(why, tmp_path):
    assert OnnxNetwork(written(tmp_path / "net.onnx", **STAYS[why]), None).norms == {}


def test_the_plain_case_of_those_does_not_stay(tmp_path):
    assert OnnxNetwork(written(tmp_path / "net.onnx", **conv()), None).norms == {"conv": "norm"}


def test_compress_folds_and_the_plan_says_so(net, tmp_path):
    """The plan of the original file carries the folding out again; one option leaves the batch norms."""
    x = RANDOM.standard_normal((120, 3, 8, 8)).astype(np.float32)
    found = slrprop.compress(net, x, max_bytes="70%", level="weights")
    assert found.plan.folded == NORMS and found.met and found.bytes[0] == net.stat().st_size
    found.plan.save(tmp_path / "plan.json")
    slrprop.apply(net, slrprop.Plan.load(tmp_path / "plan.json"), tmp_path / "small.onnx", x)
    assert (tmp_path / "small.onnx").stat().st_size <= 0.7 * net.stat().st_size
    batch = next(iter(Data(x)))
    want = OnnxNetwork(found.model, None).outputs_of([batch])[0]
    got = OnnxNetwork(tmp_path / "small.onnx", None).outputs_of([batch])[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    kept = slrprop.compress(net, x, max_bytes="80%", level="weights", keep_batch_norm=True)
    assert kept.plan.folded == {}
    assert sum(node.op_type == "BatchNormalization" for node in kept.model.proto.graph.node) == len(NORMS)


def test_external_data_of_a_folded_model(net, tmp_path):
    """What is left of the external data stays beside the new file, and the original's is counted as it is."""
    model = onnx.load(net)
    path = tmp_path / "apart.onnx"
    onnx.save(model, path, save_as_external_data=True, location="apart.data", size_threshold=0)
    plan = slrprop.Plan((), folded=NORMS)
    slrprop.apply(path, plan, tmp_path / "new.onnx")
    x = RANDOM.standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(outputs_of(tmp_path / "new.onnx", x)[0], outputs_of(net, x)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(SlrpropError, match="is the model's external data"):
        slrprop.apply(path, plan, tmp_path / "apart.data")


@pytest.mark.parametrize("door", ["module", "file"])
def test_a_plan_that_folds_is_tuned_on_the_folded_model(door, tmp_path):
    """What tuning sees is what is carried out: the error does not grow in either door."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    model[1].running_mean, model[1].running_var = torch.rand(8), 0.2 + torch.rand(8)
    x, path = torch.randn(160, 3, 4, 4), tmp_path / "net.onnx"
    if door == "file":
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], "0"), norm("c", "n", "1"), helper.make_node("Relu", ["n"], ["r"]),
            helper.make_node("Flatten", ["r"], ["f"]), helper.make_node("Gemm", ["f", "v", "a"], ["y"], "4", transB=1),
        ]  # fmt: skip
        shapes = {"w": (8, 3, 3, 3), "b": (8,), "1": 8, "v": (4, 32), "a": (4,)}
        written(path, nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 4]}, shapes)
    given = model if door == "module" else path
    plan = slrprop.compress(given, x, max_bytes="80%", methods={"low_rank": {"rank": 2}}, layers="0").plan
    assert plan.folded == {"0": "1"}

    def error(plan):
        if door == "module":
            return float((slrprop.apply(model, plan)(x) - model(x)).detach().square().mean())
        slrprop.apply(path, plan, tmp_path / "new.onnx", x)
        return float(np.square(outputs_of(tmp_path / "new.onnx", x.numpy())[0] - outputs_of(path, x.numpy())[0]).mean())

    assert error(slrprop.tune(given, x, plan)) <= error(plan)


def test_a_plan_that_folds_another_models_batch_norm_is_refused(net, tmp_path):
    for folds in ({"conv": "norm_b"}, {"other": "norm_a"}):
        with pytest.raises(SlrpropError, match="which this model does not have"):
            slrprop.apply(net, slrprop.Plan((), folded=folds), tmp_path / "new.onnx")
