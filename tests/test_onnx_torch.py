"""Gradients of ONNX graphs: every operation against ONNX Runtime, metrics against those of the torch module."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

import slrprop
from slrprop.data import Data
from slrprop.fit.calibration import Calibration
from slrprop.network import OnnxNetwork, TorchNetwork
from slrprop.network.onnx import network as onnx_network
from slrprop.network.onnx.gradients import OPS, _computable
from tests.test_regression import Block

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype("f")
Y = np.random.default_rng(1).standard_normal((2, 3, 4)).astype("f")
SHORT = np.linspace(0.5, 2, 4).astype("f")
MATRIX = np.random.default_rng(2).standard_normal((4, 5)).astype("f")


def ints(*values):
    return np.array(values, np.int64)


UNARY = [
    "Ceil",
    "Cos",
    "Erf",
    "Exp",
    "Floor",
    "HardSwish",
    "Identity",
    "Mish",
    "Neg",
    "Relu",
    "Sigmoid",
    "Sin",
    "Softplus",
    "Softsign",
    "Tanh",
    "Abs",
]
BINARY = ["Add", "Mul", "Sub", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Sum"]
MAP = np.random.default_rng(3).standard_normal((2, 4, 9, 7)).astype("f")
LINE = np.random.default_rng(4).standard_normal((2, 4, 9)).astype("f")
KERNEL = np.random.default_rng(5).standard_normal((6, 4, 3, 2)).astype("f")
GROUPED = np.random.default_rng(6).standard_normal((8, 2, 3, 3)).astype("f")
TURNED = np.random.default_rng(7).standard_normal((4, 3, 3, 2)).astype("f")
SIX = np.linspace(-1, 1, 6).astype("f")
WINDOW = {"kernel_shape": [3, 2], "strides": [2, 1]}
MAPS = [
    ("Conv", {}, [MAP, KERNEL, SIX]),
    ("Conv", {"pads": [0, 1, 2, 0], "strides": [2, 1], "dilations": [1, 2]}, [MAP, KERNEL]),
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, [MAP, KERNEL]),
    ("Conv", {"auto_pad": "SAME_LOWER"}, [MAP, KERNEL]),
    ("Conv", {"group": 2, "pads": [1, 1, 1, 1]}, [MAP, GROUPED]),
    ("Conv", {"auto_pad": "VALID"}, [LINE, KERNEL[..., 0].copy(), SIX]),
    ("ConvTranspose", {}, [MAP, TURNED, SIX[:3].copy()]),
    ("ConvTranspose", {"pads": [1, 0, 0, 1], "strides": [2, 3], "output_padding": [1, 2]}, [MAP, TURNED]),
    ("ConvTranspose", {"group": 2, "dilations": [2, 1]}, [MAP, TURNED]),
    ("AveragePool", WINDOW, [MAP]),
    ("AveragePool", {**WINDOW, "pads": [1, 0, 1, 1]}, [MAP]),
    ("AveragePool", {**WINDOW, "pads": [1, 1, 1, 0], "count_include_pad": 1}, [MAP]),
    ("AveragePool", {**WINDOW, "auto_pad": "SAME_UPPER"}, [MAP]),
    ("MaxPool", WINDOW, [MAP]),
    ("MaxPool", {**WINDOW, "pads": [1, 0, 1, 1], "dilations": [2, 1]}, [MAP]),
    ("MaxPool", {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}, [LINE[..., :8].copy()]),
    ("GlobalAveragePool", {}, [MAP]),
    ("GlobalMaxPool", {}, [MAP]),
    ("HardSigmoid", {"alpha": 0.3}, [MAP]),
    ("InstanceNormalization", {"epsilon": 0.01}, [MAP, SIX[:4].copy(), SIX[2:].copy()]),
    ("PRelu", {}, [MAP, SIX[:4].reshape(4, 1, 1).copy()]),
    ("Pad", {}, [MAP, ints(0, 0, 1, 2, 0, 1, 0, 3), np.array(0.5, "f")]),
    ("Pad", {"mode": "reflect"}, [MAP, ints(0, 0, 1, 2, 0, 0, 2, 1)]),
    ("Pad", {"mode": "edge"}, [MAP, ints(0, 0, 1, 0, 0, 0, 2, 1)]),
    ("Pad", {}, [MAP, ints(1, 2), None, ints(3)]),
    (
        "Resize",
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        [MAP, None, np.array([1, 1, 2, 3], "f")],
    ),
    ("Resize", {"mode": "linear"}, [MAP, None, None, ints(2, 4, 18, 14)]),
    (
        "Resize",
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        [MAP, None, None, ints(2, 4, 17, 13)],
    ),
    ("DepthToSpace", {"blocksize": 2}, [MAP]),
    ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, [MAP]),
]
CASES = [
    *MAPS,
    *((op, {}, [X]) for op in UNARY),
    *((op, {}, [np.abs(X) + 0.1]) for op in ("Log", "Sqrt", "Reciprocal")),
    *((op, {}, [X, Y]) for op in BINARY),
    *((op, {}, [X, SHORT]) for op in ("Add", "Div", "Max")),
    ("Sum", {}, [X, Y, SHORT]),
    ("Max", {}, [X]),
    ("Div", {}, [ints(7, -7), ints(2, 2)]),
    *((op, {}, [X > 0, Y > 0]) for op in ("And", "Or")),
    ("Not", {}, [X > 0]),
    ("Pow", {}, [np.abs(X), np.array(2.5, "f")]),
    ("Pow", {}, [X, ints(2)]),
    ("Where", {}, [X > 0, X, SHORT]),
    ("MatMul", {}, [X, MATRIX]),
    ("Gemm", {}, [X[0], MATRIX]),
    ("Gemm", {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}, [X[0].T.copy(), MATRIX.T.copy(), np.ones(5, "f")]),
    ("BatchNormalization", {"epsilon": 0.1}, [X, *(np.array([1, 2, 3], "f") + i for i in range(4))]),
    ("LayerNormalization", {}, [X, SHORT, SHORT + 1]),
    ("LayerNormalization", {"axis": 1, "epsilon": 0.1}, [X, Y[0]]),
    ("Cast", {"to": onnx.TensorProto.INT64}, [X]),
    ("Cast", {"to": onnx.TensorProto.BOOL}, [X]),
    ("Clip", {}, [X, np.array(-0.5, "f"), np.array(0.7, "f")]),
    ("Clip", {}, [X, None, np.array(0.7, "f")]),
    ("Concat", {"axis": 1}, [X, Y]),
    ("Dropout", {}, [X]),
    ("Elu", {"alpha": 0.7}, [X]),
    ("Celu", {"alpha": 0.7}, [X]),
    ("Selu", {}, [X]),
    ("Selu", {"alpha": 1.5, "gamma": 1.2}, [X]),
    ("LeakyRelu", {"alpha": 0.2}, [X]),
    ("LeakyRelu", {}, [X]),
    *(("Flatten", {"axis": axis}, [X]) for axis in (0, 1, 2, -1)),
    ("Gather", {"axis": 1}, [X, np.array([[0, -1], [2, 1]])]),
    ("Gather", {}, [X, np.array(1)]),
    ("Gelu", {}, [X]),
    ("Gelu", {"approximate": "tanh"}, [X]),
    ("Expand", {}, [X[:, :1], ints(5, 2, 3, 1)]),
    ("Softmax", {}, [X]),
    ("Softmax", {"axis": 1}, [X]),
    ("LogSoftmax", {"axis": -2}, [X]),
    *(
        (op, settings, [X, *axes])
        for op in ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
        for settings, axes in (({}, [ints(1)]), ({"keepdims": 0}, [ints(0, -1)]), ({}, []))
    ),
    ("Reshape", {}, [X, ints(0, -1)]),
    ("Reshape", {}, [X, ints(4, 6)]),
    ("Shape", {}, [X]),
    ("Shape", {"start": 1, "end": -1}, [X]),
    ("Slice", {}, [X, ints(1), ints(1 << 40), ints(2)]),
    ("Slice", {}, [X, ints(0, -1), ints(2, -(1 << 40)), ints(1, 2), ints(1, -2)]),
    ("Slice", {}, [X, ints(-3, 0), ints(-1, 1)]),
    ("Slice", {}, [X, ints(3), ints(0), ints(-1), ints(-1)]),
    ("Split", {"axis": 2, "num_outputs": 2}, [X]),
    ("Split", {"axis": -1}, [X, ints(1, 3)]),
    ("Squeeze", {}, [X[:, :1], ints(1)]),
    ("Squeeze", {}, [X[:1, :, :1]]),
    ("Unsqueeze", {}, [X, ints(-1, 0)]),
    ("Transpose", {"perm": [1, 2, 0]}, [X]),
    ("Transpose", {}, [X]),
]  # fmt: skip


def test_every_operation_is_tested():
    assert {op for op, *_ in CASES} == set(OPS)


@pytest.mark.parametrize(("op", "settings", "values"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_operations_are_those_of_the_runtime(op, settings, values):
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(values)]
    outputs = ["y0", "y1"] if op == "Split" else ["y0"]
    node = helper.make_node(op, names, outputs, **settings)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in zip(names, values, strict=True)
        if value is not None
    ]
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wants = session.run(None, {name: value for name, value in zip(names, values, strict=True) if name})
    assert _computable(node, 20)
    made = OPS[op](node, *(None if value is None else torch.from_numpy(value) for value in values))
    for got, want in zip(made if isinstance(made, list) else [made], wants, strict=True):
        assert got.numpy().dtype == want.dtype
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_what_training_needs_is_not_computed():
    for op, settings, outputs in (
        ("Dropout", {}, 2), ("BatchNormalization", {"training_mode": 1}, 3), ("LayerNormalization", {}, 2), ("Einsum", {}, 1)
    ):  # fmt: skip
        assert not _computable(helper.make_node(op, ["x"], list("abc")[:outputs], **settings), 20)
    assert not _computable(helper.make_node("Softmax", ["x"], ["y"]), 12)
    assert not _computable(helper.make_node("ReduceL2", ["x"], ["y"], noop_with_empty_axes=1), 20)


def metrics(network, data):
    found = Calibration(network, data)
    found.prepare(network.order)
    return [found.regression(name, {}).metric for name in network.order]


@pytest.fixture
def block(tmp_path):
    torch.manual_seed(5)
    model, x = Block().eval(), torch.randn(50, 6, 8)
    slrprop.export_onnx(model, tmp_path / "block.onnx", x[:2])
    return model, x, tmp_path / "block.onnx"


@pytest.mark.parametrize("batch", [None, 8])
@pytest.mark.parametrize("labelled", [False, True])
def test_metrics_are_those_of_the_module(block, batch, labelled):
    model, x, path = block
    if batch:
        proto = onnx.load(path)
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
        onnx.save(proto, path)
    data = Data((x, torch.randn(50, 3) if labelled else None), 17)
    for one, other in zip(
        metrics(TorchNetwork(model, data), data), metrics(OnnxNetwork(path, data), data), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_graph_that_is_computed_otherwise_has_none(block, monkeypatch):
    """All outputs weigh alike then, but for the last layer's, which a chain follows."""
    _, x, path = block
    data = Data((x, None))
    assert all(metric is not None for metric in metrics(OnnxNetwork(path, data), data))
    with monkeypatch.context() as patch:
        patch.setattr(onnx_network, "alike", lambda one, other: False)
        assert [metric is None for metric in metrics(OnnxNetwork(path, data), data)] == [True] * 6 + [False]
    with monkeypatch.context() as patch:
        patch.setitem(OPS, "Softmax", lambda node, x: x[0].reshape(3, 7))
        assert [metric is None for metric in metrics(OnnxNetwork(path, data), data)] == [True] * 6 + [False]
    monkeypatch.delitem(OPS, "Softmax")
    assert [metric is None for metric in metrics(OnnxNetwork(path, data), data)].count(True) == 2  # queries and keys
