"""Layers in few bits and sparse layers in ONNX files: the same product whichever nodes make it; the benchmark of both."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import slrprop
from benchmarks import quantisation
from slrprop import SlrpropError, cli
from slrprop.fit.quantize import bias_in_few_bits, quantised
from slrprop.forms import Dense, Fit, LowRank, SparseLowRank
from slrprop.network import OnnxNetwork
from slrprop.network.onnx import rewrite as onnx_rewrite


def outputs(path, x):
    return torch.from_numpy(quantisation.session(path).run(None, {"x": x.numpy()})[0])


def anywhere(m=30, n=22, ranks=(3, 2, 2), lowest=0):
    """Three levels with neurons anywhere, some in no block."""
    generator = torch.Generator().manual_seed(m + n)
    rows, columns = (torch.randint(lowest, 4, (side,), generator=generator).to(torch.uint8) for side in (m, n))
    left = [torch.randn(int((rows > level).sum()), rank, generator=generator) for level, rank in enumerate(ranks)]
    right = [torch.randn(rank, int((columns > level).sum()), generator=generator) for level, rank in enumerate(ranks)]
    return SparseLowRank(tuple(left), tuple(right), rows, columns)


@pytest.mark.parametrize("opset", [11, 18, 21])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("limit", [-(10**12), 10**12])
@pytest.mark.parametrize("ordered", [False, True])
def test_blocks_and_merged_products_compute_the_same(opset, bits, lowest, limit, ordered, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_rewrite, "MERGED", limit)
    form = anywhere(lowest=lowest)
    if ordered:
        form = form.permuted(*(levels.long().argsort(descending=True) for levels in (form.row_levels, form.column_levels)))  # fmt: skip
    form = form if bits == 32 else quantised(form, bits)
    quantisation.written(tmp_path / "layer.onnx", form, opset)
    x = torch.randn(5, 30)
    torch.testing.assert_close(outputs(tmp_path / "layer.onnx", x), x @ form.dense().float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_products_are_the_runtimes_own(bits, tmp_path, monkeypatch):
    """Of dense layers that are large enough; the inputs are rounded too, which costs about a hundredth."""
    few, x, path = quantised(Dense(torch.randn(64, 48)), bits), torch.randn(200, 64), tmp_path / "layer.onnx"
    quantisation.written(path, few, integers=True)
    assert quantisation.nodes((path, None)) == "1 MatMul"  # 3072 numbers
    monkeypatch.setattr(onnx_rewrite, "INTEGER", few.numbers)
    quantisation.written(path, few, integers=True)
    assert quantisation.nodes((path, None)) == "1 MatMulNBits"
    want = x @ few.dense().float()
    assert 1e-4 < (outputs(path, x) - want).norm() / want.norm() < 0.03
    with pytest.raises(SlrpropError, match=r"integer products need an ONNX file of opset 21 or later, and '.*' has 18"):
        quantisation.written(path, few, 18, integers=True)
    few = quantised(LowRank(torch.randn(64, 20), torch.randn(20, 48)), bits)
    quantisation.written(path, few, integers=True)
    assert quantisation.nodes((path, None)) == "2 MatMul"
    monkeypatch.setattr(onnx_rewrite, "INTEGER_FACTORS", few.numbers)
    quantisation.written(path, few, integers=True)
    assert quantisation.nodes((path, None)) == "2 MatMulNBits"
    want = x @ few.dense().float()
    assert 1e-4 < (outputs(path, x) - want).norm() / want.norm() < 0.03


@pytest.mark.parametrize("bits", [8, 4])
def test_no_integer_product_takes_another_ones_constants(bits, trained, digits, tmp_path, monkeypatch):
    """Constants that the runtime finds equal it would share, and leave their products in real numbers."""
    monkeypatch.setattr(onnx_rewrite, "INTEGER_FACTORS", 1)
    x = digits[0][1200:]
    slrprop.export_onnx(trained, tmp_path / "model.onnx", x[:4])
    plan = slrprop.plan(tmp_path / "model.onnx", x, "low_rank", rank=20, bits=bits)
    assert [layer.method for layer in plan.layers] == ["low_rank", "low_rank", "dense"]
    slrprop.apply(tmp_path / "model.onnx", plan, tmp_path / "small.onnx", x, integer_products=True)
    assert "4 MatMulNBits" in quantisation.nodes((tmp_path / "small.onnx", None))


def test_files_are_compressed_and_applied_with_integer_products(trained, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_rewrite, "INTEGER", 500)
    x, y = (part[1200:] for part in digits)
    slrprop.export_onnx(trained, tmp_path / "model.onnx", x[:4])
    found = slrprop.compress(
        tmp_path / "model.onnx", (x, y), max_drop=1.0, methods={"dense": {"bits": 8}}, integer_products=True
    )
    assert found.met and "DequantizeLinear" in {node.op_type for node in found.model.proto.graph.node}
    parity = slrprop.apply(tmp_path / "model.onnx", found.plan, tmp_path / "small.onnx", (x, y), integer_products=True)
    assert all(1e-5 < apart < parity.tolerance * 30 for apart in parity.outputs.values())
    assert "3 MatMulNBits" in quantisation.nodes((tmp_path / "small.onnx", None))
    plain = slrprop.apply(tmp_path / "model.onnx", found.plan, tmp_path / "plain.onnx", (x, y))
    assert max(plain.outputs.values()) < 1e-4
    found.plan.save(tmp_path / "plan.json")
    command = [
        "apply",
        tmp_path / "model.onnx",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "again.onnx",
        "--integer-products",
    ]
    assert CliRunner().invoke(cli.app, list(map(str, command))).exit_code == 0
    assert "3 MatMulNBits" in quantisation.nodes((tmp_path / "again.onnx", None))
    for call in (lambda: slrprop.apply(trained, found.plan, integer_products=True), lambda: slrprop.compress(trained, (x, y), max_drop=1.0, integer_products=True)):  # fmt: skip
        with pytest.raises(SlrpropError, match="integer products are ONNX Runtime's; give the path of an ONNX file"):
            call()


@pytest.mark.parametrize("ranks", [(3, 2, 2), (12, 9, 8)])
def test_merged_products_are_all_that_runs(ranks, tmp_path, monkeypatch):
    """Two products, or a single one where that is less work; what else is in the file runs when it is loaded."""
    monkeypatch.setattr(onnx_rewrite, "MERGED", 10**12)
    form = anywhere(ranks=ranks)
    quantisation.written(tmp_path / "layer.onnx", form)
    work = min(form.spread_numbers, 30 * 22)
    assert form.merged_zeros == work - form.numbers
    assert quantisation.nodes((tmp_path / "layer.onnx", None)) == f"{1 if work == 30 * 22 else 2} MatMul"


def test_gathered_are_the_numbers_that_the_nodes_gather(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_rewrite, "MERGED", -(10**12))
    for form in (anywhere(lowest=1), anywhere()):
        quantisation.written(tmp_path / "layer.onnx", form)
        file = onnx.load(tmp_path / "layer.onnx")
        sizes = {tensor.name: tensor.dims[0] for tensor in file.graph.initializer if tensor.dims}
        casts = {node.output[0]: node.input[0] for node in file.graph.node if node.op_type == "Cast"}
        picks = [casts[node.input[1]] for node in file.graph.node if node.op_type == "Gather"]
        assert form.gathered == sum(sizes[name] for name in picks) > 0


@pytest.mark.parametrize("more", [0, 1])
def test_the_limit_of_zeros_grows_with_what_blocks_gather(more, tmp_path, monkeypatch):
    form = anywhere()
    monkeypatch.setattr(onnx_rewrite, "GATHERED", 1)
    monkeypatch.setattr(onnx_rewrite, "MERGED", form.merged_zeros - form.gathered - more)
    quantisation.written(tmp_path / "layer.onnx", form)
    found = {node.op_type for node in onnx.load(tmp_path / "layer.onnx").graph.node}
    assert ("CumSum" in found) == (more == 0)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_dequantised_layers_stand_for_the_same_numbers(joined, bits, tmp_path):
    form = quantised(LowRank(torch.randn(20, 4), torch.randn(4, 12)), bits)
    quantisation.dequantizing(tmp_path / "layer.onnx", form, joined)
    x = torch.randn(6, 20)
    want = x @ form.dense().float()
    assert (outputs(tmp_path / "layer.onnx", x) - want).norm() < 0.03 * want.norm()  # inputs may be rounded to 8 bits


def test_the_benchmark_prints_its_tables(capsys, monkeypatch):
    sizes = ["--around", "20x20x4", "--layers", "20x12x4", "--sparse", "24x16x6", "--batches", "1", "3", "--turns", "1"]
    monkeypatch.setattr("sys.argv", ["quantisation", *sizes])
    quantisation.main()
    tables = [part.splitlines() for part in capsys.readouterr().out.strip().split("\n\n")]
    assert [len(table) - 2 for table in tables] == [9, 18, 2, len(quantisation.LIMITS), len(quantisation.SHARES)]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert all(np.isfinite(float(line.split("|")[-5])) for line in tables[1][2:])


def test_limits_tell_what_the_slower_way_costs():
    layers = [quantisation.Timed(10, 0, 1.0, 2.0), quantisation.Timed(5, 0, 4.0, 2.0)]
    assert quantisation.limits([4, 5, 10], [layers], lambda limit, _: limit) == ["| 4 | 41.4 % |", "| 5 | 0.0 % |", "| 10 | 41.4 % |"]  # fmt: skip


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("side", [64, 300])
def test_little_stands_around_the_numbers_of_a_layer(side, opset, tmp_path):
    """Names, shapes and nodes of layers in 4 bits; what unpacking needs is written once for the file."""
    layers = [quantisation.forms(side, side // 16) for _ in range(3)]
    for name, most in (("low rank", 400), ("nested (three-wide)", 700), ("SLR", 700)):
        one, three = (
            quantisation.around([forms[name] for forms in layers[:count]], 4, opset, tmp_path) for count in (1, 3)
        )
        assert three - one <= 2 * most and one <= most + 350


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("opset", [7, 9, 11, 13, 21])
def test_four_bits_are_unpacked_in_every_operator_set(opset, kind, tmp_path):
    """Two layers share the unpacking; with the rank of x unknown to none of them the bias goes into the product."""
    torch.manual_seed(0)
    value, element = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    nodes = [
        helper.make_node("Gemm", ["x", "v", "p"], ["a"], "one", alpha=0.5),
        helper.make_node("MatMul", ["a", "w"], ["y"], "two"),
    ]
    tensors = [numpy_helper.from_array(torch.randn(shape).numpy().astype(kind), name) for name, shape in (("v", (31, 30)), ("p", (30,)), ("w", (30, 29)))]  # fmt: skip
    graph = helper.make_graph(nodes, "g", [value("x", element, ["n", 31])], [value("y", element, ["n", 29])], tensors)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), tmp_path / "m.onnx"
    )
    network = OnnxNetwork(tmp_path / "m.onnx", None)
    low = LowRank(torch.randn(31, 5) / 6, torch.randn(5, 30))
    few = {"one": Fit(quantised(low, 4), bias_in_few_bits(torch.randn(30))), "two": Fit(quantised(anywhere(30, 29), 4))}
    onnx_rewrite.rewritten(network.file, network.graph, few).save(tmp_path / "s.onnx", lambda _: None)
    onnx.checker.check_model(str(tmp_path / "s.onnx"), full_check=True)
    x = torch.randn(6, 31)
    want = (x @ few["one"].form.dense() + few["one"].bias.value) @ few["two"].form.dense()
    got = OnnxNetwork(tmp_path / "s.onnx", None).file.session(["y"]).run({"x": x.numpy().astype(kind)})["y"]
    assert (
        got.dtype == kind
        and (torch.from_numpy(got) - want).norm() < (0.01 if kind == np.float16 else 1e-5) * want.norm()
    )
    made = onnx.load(tmp_path / "s.onnx").graph
    assert [node.name for node in made.node if node.name] == ["slrprop", "one", "two"]
    assert sum(node.op_type == "Floor" for node in made.node) == (opset < 21)


def test_new_names_are_taken_by_nothing_inside_a_body(tmp_path):
    value = helper.make_tensor_value_info
    inner = [helper.make_node("Relu", ["h"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    body = helper.make_graph(inner, "body", [], [value("b", TensorProto.FLOAT, None)], [], doc_string="a note")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "one", doc_string="torch/nn/modules/linear.py"),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body),
    ]
    tensors = [numpy_helper.from_array(np.random.rand(30, 30).astype(np.float32), "w")]
    ends = [value("x", TensorProto.FLOAT, ["n", 30]), value("c", TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "g", ends, [value("y", TensorProto.FLOAT, ["n", 30])], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    x = {"x": np.random.rand(4, 30).astype(np.float32), "c": np.array(True)}
    slrprop.apply(
        tmp_path / "m.onnx", slrprop.plan(tmp_path / "m.onnx", None, method="svd", rank=4), tmp_path / "s.onnx"
    )
    made = (tmp_path / "s.onnx").read_bytes()
    assert b"a note" not in made and b"linear.py" not in made
    assert onnxruntime.InferenceSession(made).run(None, x)[0].shape == (4, 30)
