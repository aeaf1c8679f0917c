"""Sparse forms: stored, computed with in torch, decoded in ONNX files."""

import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from slrprop import SlrpropError
from slrprop.export import session
from slrprop.fit.quantize import quantised
from slrprop.forms import Fit, LowRank, LowRankPlusSparse, Sparse, restored
from slrprop.forms.positions import decoded, encoded
from slrprop.network import OnnxNetwork
from slrprop.network.onnx.rewrite import rewritten
from slrprop.network.torch.modules import layer_from
from tests.oracle import permuted_as_the_weight


@st.composite
def sparse_forms(draw):
    """A weight, its support, and the sparse form alone or with a low rank."""
    m, n, rank = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    support = torch.rand(m, n, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    low = torch.randn(m, rank, generator=generator).double(), torch.randn(rank, n, generator=generator).double()
    sparse = Sparse.of(weight, support)
    return weight, support, LowRankPlusSparse(LowRank(*low), sparse) if rank else sparse


def wanted(weight, support, form):
    low = form.low_rank.dense() if isinstance(form, LowRankPlusSparse) else 0
    return torch.where(support, weight, 0) + low


@given(st.integers(0, 400), st.floats(0, 1), st.integers(0, 99))
@settings(deadline=None)
def test_positions_come_back(places, density, seed):
    marked = torch.rand(places, generator=torch.Generator().manual_seed(seed)) < density
    positions = marked.nonzero()[:, 0]
    stored, bits = encoded(positions)
    assert torch.equal(decoded(stored, bits, places), positions)
    assert len(stored) <= -(-places // 8)  # never more than a bitmap


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.3])
def test_positions_come_near_to_their_entropy(density):
    marked = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < density
    stored, _ = encoded(marked.nonzero()[:, 0])
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert len(stored) < 1.15 * len(marked) * entropy / 8


@given(sparse_forms())
@settings(deadline=None)
def test_forms_are_stored_without_loss(case):
    weight, support, form = case
    torch.testing.assert_close(form.dense(), wanted(*case))
    again = restored(form.description(), form.arrays())
    assert torch.equal(again.dense(), form.dense()) and again.bytes == form.bytes
    assert form.numbers == int(support.sum()) + (form.numbers - form.matrices()["entries"].numel())
    assert form.bytes == sum(array.nbytes for array in form.arrays().values())
    doubled = form.with_matrices({name: 2 * matrix for name, matrix in form.matrices().items()})
    factor = 2 if isinstance(form, Sparse) else None
    if factor:
        assert torch.equal(doubled.dense(), factor * form.dense())
    assert not form.faster and form.multiplications >= weight.numel()


@given(sparse_forms(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuted_forms_are_the_permuted_weight(case, random):
    form = case[2]
    moved, rows, columns = permuted_as_the_weight(form, random)
    back = moved.permuted(rows.argsort(), columns.argsort())
    assert all(torch.equal(value, back.arrays()[name]) for name, value in form.arrays().items())


@given(sparse_forms(), st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
@settings(deadline=None)
def test_layers_compute_with_the_forms(case, has_bias, batch):
    form = case[2]
    bias = torch.arange(form.shape[1], dtype=torch.float64) if has_bias else None
    layer = layer_from(Fit(form).over(bias))
    x = torch.randn(*batch, form.shape[0], dtype=torch.float64)
    want = x @ wanted(*case) + (0 if bias is None else bias)
    torch.testing.assert_close(layer(x), want)
    assert sum(p.numel() for p in layer.parameters()) == form.numbers + (form.shape[1] if has_bias else 0)
    layer(x).sum().backward()
    assert layer.entries.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gap_bits": 0}, "codes of 1 to 16 bits"),
        ({"gap_bits": "x"}, "codes of 1 to 16 bits"),
        ({"shape": [2, 2]}, "is marked among 4 places"),
        ({"shape": [-3, 4]}, "a side of a sparse weight must be a whole number"),
        ({"shape": [3]}, "make no layer"),
    ],
)
def test_damaged_descriptions_are_refused(change, message):
    form = Sparse.of(torch.eye(5))
    with pytest.raises(SlrpropError, match=message):
        restored(form.description() | change, form.arrays())
    with pytest.raises(SlrpropError, match="takes as many values"):
        restored(form.description(), form.arrays() | {"entries": torch.ones(4)})


def gemm(path, weight, bias, opset, op="Gemm"):
    """A one-layer ONNX file."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    nodes = [helper.make_node("Gemm", ["x", "W", "b"], ["y"], "fc")]
    if op == "MatMul":
        nodes = [helper.make_node("MatMul", ["x", "W"], ["z"], "fc"), helper.make_node("Add", ["z", "b"], ["y"])]
    x, y = (
        helper.make_tensor_value_info(name, kind, ["n", side]) for name, side in zip("xy", weight.shape, strict=True)
    )
    constants = [numpy_helper.from_array(weight, "W"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize(("opset", "bits"), [(11, 32), (13, 32), (18, 32), (21, 32), (13, 4), (18, 8), (21, 4)])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 0.7])
@pytest.mark.parametrize("rank", [0, 3])
def test_onnx_files_are_as_small_as_the_form_and_decoded_at_load(op, opset, bits, density, rank, tmp_path):
    import onnxruntime

    if bits < 32 and density == 0:
        pytest.skip("no values to round")
    random = np.random.default_rng(0)
    weight, bias = random.standard_normal((400, 120), np.float32), random.standard_normal(120, np.float32)
    gemm(tmp_path / "model.onnx", weight, bias, opset, op)
    network = OnnxNetwork(tmp_path / "model.onnx", None)
    form = Sparse.of(torch.from_numpy(weight), torch.from_numpy(random.random((400, 120)) < density))
    if rank:
        form = LowRankPlusSparse(LowRank(torch.randn(400, rank), torch.randn(rank, 120)), form)
    form = form if bits == 32 else quantised(form, bits)
    small = tmp_path / "small.onnx"
    rewritten(network.file, {"fc": Fit(form)}).save(small, lambda _: None)
    onnx.checker.check_model(str(small), full_check=True)
    x = random.standard_normal((7, 400), np.float32)
    want = x.astype(np.float64) @ form.dense().double().numpy() + bias
    got = session(small).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
    assert small.stat().st_size - form.bytes - bias.nbytes < 4500  # nodes, names and small constants
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 3
    onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    assert left <= {"Gemm", "MatMul", "Add", "DequantizeLinear", "Cast"}


def test_old_onnx_files_are_refused(tmp_path):
    weight = np.eye(6, dtype=np.float32)
    gemm(tmp_path / "model.onnx", weight, np.zeros(6, np.float32), 10)
    network = OnnxNetwork(tmp_path / "model.onnx", None)
    with pytest.raises(SlrpropError, match="layer 'fc': sparse weights need an ONNX file of opset 11 or later, and this one has 10"):  # fmt: skip
        rewritten(network.file, {"fc": Fit(Sparse.of(torch.from_numpy(weight)))})
