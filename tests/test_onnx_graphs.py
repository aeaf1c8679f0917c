"""The ONNX front door on graphs written by hand: rare forms, external data, damaged files."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import slrprop
from slrprop import SlrpropError, cli
from slrprop.data import Data
from slrprop.network import OnnxNetwork
from slrprop.network.junction import Junction
from slrprop.network.onnx import rewrite as onnx_rewrite
from tests.onnx_models import run


def graph_file(path, nodes, tensors, shape, opset=17, outputs=("y",), kind=TensorProto.FLOAT, ir_version=8, axes=2):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kind, shape)],
        [value(name, kind, [f"{name}{axis}" for axis in range(axes)]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.save(model, path)
    return path


def numbers(*shape, kind=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(kind)


def compress(path, output, data=None, rank=3, **settings):
    """By slr on the weights, so that no data are needed; the parity is checked inside."""
    plan = slrprop.plan(path, None, method="slr", criterion="weight", rank=rank, **settings)
    parity = slrprop.apply(path, plan, output, data)
    onnx.checker.check_model(str(output), full_check=True)
    return plan, parity


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 21])
@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_with_every_attribute(opset, trans, tmp_path, monkeypatch):
    """Scaled factors and biases, transposed inputs, old operator sets; as blocks."""
    monkeypatch.setattr(onnx_rewrite, "MERGED", -(10**12))
    a, b, c = numbers(20, 16), numbers(16, 24), numbers(24, 12)
    nodes = [
        helper.make_node("Gemm", ["x", "a", "p"], ["h"], "one", alpha=0.5, beta=2.0, transA=trans),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b", "q"], ["s"], "two", transB=1, alpha=1.5, beta=0.25),
        helper.make_node("Tanh", ["s"], ["t"]),
        helper.make_node("Gemm", ["t", "c", "o"], ["y"], "three"),
    ]
    tensors = {"a": a, "b": np.ascontiguousarray(b.T), "c": c, "p": numbers(16), "q": numbers(1, 24), "o": numbers(12)}
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, [20, "b"] if trans else ["b", 20], opset, ir_version=4)
    network = OnnxNetwork(path, None)
    np.testing.assert_allclose(network.weight("one"), 0.5 * a, rtol=1e-6)
    np.testing.assert_allclose(network.bias("two"), 0.25 * tensors["q"][0], rtol=1e-6)
    plan, _ = compress(path, tmp_path / "s.onnx", layers=["one", "two"])
    assert plan.junctions == (Junction(("one",), (), {"two": 1}), Junction(("two",), (), {"three": 1}))
    assert [node.op_type for node in onnx.load(tmp_path / "s.onnx").graph.node].count("Gather") == 1
    compress(path, tmp_path / "s.onnx", layers="two")  # only its neighbours are put in another order


def test_products_of_many_axes_and_derived_weights(tmp_path):
    """MatMul on three axes; weights behind Transpose, Reshape, Cast, Identity and in a Constant node."""
    third = numpy_helper.from_array(numbers(24, 14))
    nodes = [
        helper.make_node("Transpose", ["a"], ["a_t"], perm=[1, 0]),
        helper.make_node("Identity", ["a_t"], ["a_i"]),
        helper.make_node("MatMul", ["x", "a_i"], ["h"], "one"),
        helper.make_node("Add", ["bias", "h"], ["h2"]),
        helper.make_node("Sigmoid", ["h2"], ["r"]),
        helper.make_node("Cast", ["b"], ["b_c"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["b_c", "shape"], ["b_r"]),
        helper.make_node("MatMul", ["r", "b_r"], ["s"]),
        helper.make_node("Constant", [], ["third"], value=third),
        helper.make_node("MatMul", ["s", "third"], ["y"], "three"),
    ]
    tensors = {"a": numbers(16, 20), "bias": numbers(16), "b": numbers(16 * 24).astype(np.float64), "shape": np.array([16, -1])}  # fmt: skip
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, ["b", 5, 20], axes=3)
    infos = slrprop.inspect(path)
    assert [(info.name, info.shape) for info in infos] == [("one", (20, 16)), ("s", (16, 24)), ("three", (24, 14))]
    plan, _ = compress(path, tmp_path / "s.onnx")
    assert plan.junctions == (Junction(("one",), (), {"s": 1}), Junction(("s",), (), {"three": 1}))
    left = onnx.load(tmp_path / "s.onnx")
    assert not {"a_t", "a_i", "b_c", "b_r", "third"} & {name for node in left.graph.node for name in node.output}
    assert not {"a", "b", "third"} & {tensor.name for tensor in left.graph.initializer}


def test_shared_weights_are_named_and_left_dense(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "a"], ["i"], "two"),
        helper.make_node("MatMul", ["i", "b"], ["j"], "three"),
        helper.make_node("Add", ["b", "j"], ["y"], "adder"),
    ]
    path = graph_file(tmp_path / "m.onnx", nodes, {"a": numbers(20, 20), "b": numbers(20, 20)}, [20, 20])
    assert {info.name: info.tied_to for info in slrprop.inspect(path)} == {
        "one": ("two",),
        "two": ("one",),
        "three": ("adder",),
    }
    plan = slrprop.plan(path, None, method="svd", rank=2)
    assert not plan.layers and plan.left_dense["one"] == "its weight is also two"
    with pytest.raises(SlrpropError, match="layer 'three' can't be factored: its weight is also adder"):
        slrprop.plan(path, None, method="svd", rank=2, layers="three")


def test_bodies_of_if_are_left_alone_and_their_reads_are_seen(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["h", "b"], ["z"])], "body", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "b"], ["i"], "two"),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["true"], to=TensorProto.BOOL),
        helper.make_node("If", ["true"], ["j"], "choice", then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["i", "j"], ["y"]),
    ]
    path = graph_file(tmp_path / "m.onnx", nodes, {"a": numbers(18, 20), "b": numbers(20, 20)}, ["b", 18])
    network = OnnxNetwork(path, None)
    assert network.names == ("one", "two") and network.layers["two"].tied == ("choice",)
    assert network.junction("one") is None
    data = numbers(6, 18)
    plan = slrprop.plan(path, data, method="slr", layers="one", rank=2, loss="squared")
    slrprop.apply(path, plan, tmp_path / "s.onnx", data)


def test_a_layer_that_makes_another_output(tmp_path):
    """It costs nothing of the main output; its values are compared all the same, and its order stays."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["y"], "one"),
        helper.make_node("MatMul", ["x", "b"], ["z"], "two"),
        helper.make_node("MatMul", ["z", "c"], ["w"], "three"),
    ]
    tensors = {"a": numbers(20, 30), "b": numbers(20, 31), "c": numbers(31, 19)}
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, ["b", 20], outputs=("y", "z", "w"))
    data = numbers(5, 20)
    scores = slrprop.relevance.cost(path, "two", data, rank=3)
    assert scores.rows.shape == (20,) and not scores.rows.any() and not scores.columns.any()
    plan, parity = compress(path, tmp_path / "s.onnx", data)
    assert not plan.junctions and parity.outputs.keys() == {"y", "z", "w"}


def test_inputs_without_axes_and_with_samples_elsewhere(tmp_path):
    """A loader of batches by name; candidates then run one at a time."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "one"),
        helper.make_node("Mul", ["h", "gain"], ["i"]),
        helper.make_node("Add", ["i", "state"], ["j"]),
        helper.make_node("Tanh", ["j"], ["t"]),
        helper.make_node("MatMul", ["t", "b"], ["y"], "two"),
    ]
    inputs = [value("x", 1, ["b", 20]), value("gain", 1, []), value("state", 1, [1, 30])]
    tensors = [numpy_helper.from_array(numbers(20, 30), "a"), numpy_helper.from_array(numbers(30, 9), "b")]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", 1, ["b", 9])], tensors)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    x, gain, state = numbers(7, 20), np.float32(0.5), numbers(1, 30)
    batches = [{"x": x, "gain": np.array(gain), "state": state}]
    first, last = nn.Linear(20, 30), nn.Linear(30, 9, bias=False)
    first.weight.data, first.bias.data = torch.from_numpy(gain * numbers(20, 30).T), torch.from_numpy(state[0])
    last.weight.data = torch.from_numpy(numbers(30, 9).T.copy())
    got = slrprop.relevance.cost(path, "one", batches, rank=3, loss="squared")
    want = slrprop.relevance.cost(nn.Sequential(first, nn.Tanh(), last).eval(), "0", x, rank=3, loss="squared")
    torch.testing.assert_close(got.columns, want.columns, rtol=1e-5, atol=1e-5)
    plan = slrprop.plan(path, batches, method="slr", rank=3)
    slrprop.apply(path, plan, tmp_path / "s.onnx", batches)


def test_a_model_behind_a_link(tmp_path):
    """As caches of downloaded models keep them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "named").mkdir()
    graph_file(tmp_path / "blobs" / "f00", [helper.make_node("MatMul", ["x", "a"], ["y"])], {"a": numbers(40, 30)}, ["b", 40])  # fmt: skip
    (tmp_path / "named" / "m.onnx").symlink_to(tmp_path / "blobs" / "f00")
    compress(tmp_path / "named" / "m.onnx", tmp_path / "s.onnx")


def test_half_precision_stays_half(tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "a", "p"], ["h"], "one"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"], "two"),
    ]
    half = {"a": numbers(20, 30, kind=np.float16), "p": numbers(30, kind=np.float16), "b": numbers(30, 20, kind=np.float16)}  # fmt: skip
    path = graph_file(tmp_path / "m.onnx", nodes, half, ["b", 20], kind=TensorProto.FLOAT16)
    data = numbers(9, 20)
    for method in ("svd", "slr"):
        plan = slrprop.plan(path, data, method=method, rank=4)
        slrprop.apply(path, plan, tmp_path / "s.onnx", data)
        tensors = onnx.load(tmp_path / "s.onnx").graph.initializer
        kinds = {t.data_type for t in tensors}
        assert TensorProto.FLOAT16 in kinds and not {TensorProto.FLOAT, TensorProto.DOUBLE} & kinds
        assert plan.layers[0].bytes == 2 * plan.layers[0].numbers + sum(
            i.nbytes for i in plan.layers[0].factors.indices().values()
        )
        assert slrprop.relevance.cost(path, "two", data, rank=3).rows.shape == (30,)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(
    "method, settings",
    [
        ("dense", {"bits": 8}), ("dense", {"bits": 4}), ("svd", {"bits": 4}), ("nested", {}), ("nested", {"bits": 4}),
        ("magnitude", {"bits": 4}), ("low_rank_plus_sparse", {"bits": 8}), ("permuted", {"bits": 8}),
    ],
)  # fmt: skip
def test_half_precision_is_unpacked_when_the_runtime_loads_the_file(method, settings, opset, tmp_path):
    nodes = [helper.make_node("Gemm", ["x", "a", "p"], ["y"], "one")]
    half = {"a": numbers(64, 48, kind=np.float16), "p": numbers(48, kind=np.float16)}
    path = graph_file(tmp_path / "m.onnx", nodes, half, ["b", 64], opset, kind=TensorProto.FLOAT16)
    plan = slrprop.plan(path, numbers(80, 64), method=method, **({"rank": 4} if method != "dense" else {}), **settings)
    slrprop.apply(path, plan, tmp_path / "s.onnx", numbers(9, 64))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "s.onnx", options)
    assert {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node} <= {
        "MatMul",
        "Gemm",
        "Add",
        "Cast",
    }


def test_where_other_numbers_are_is_told(tmp_path):
    value, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    inner = helper.make_graph([helper.make_node("MatMul", ["h", "b"], ["i"])], "then", [], [value("i", kind, None)])
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["h"], "quantised"),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    tensors = {"a": numbers(20, 30).astype(np.int8), "s": np.float32(0.1), "b": numbers(30, 10), "c": np.array(True)}
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, ["b", 20])
    told = "MatMul in If 67 %, MatMul behind DequantizeLinear 33 %"
    assert slrprop.inspect(path) == [] and slrprop.inspect(path).other == told
    with pytest.raises(SlrpropError, match=f"no layer .* on this data; its numbers are elsewhere: {told}"):
        slrprop.plan(path, None, method="svd")
    printed = CliRunner().invoke(cli.app, ["inspect", str(path)]).stdout
    assert printed.startswith("no layer: no Gemm, MatMul, convolution or Gather ") and printed.endswith(
        f"by what uses them: {told}\n"
    )
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(24, 10))
    assert [info.shape for info in slrprop.inspect(model)] == [(12, 8), (24, 10)]
    assert slrprop.inspect(model).other == "Linear 3 %, Conv 2 %"  # what is beside the weights


def test_numbers_in_bodies_of_the_same_names_are_all_counted(tmp_path):
    value, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    then, other = (
        helper.make_graph([helper.make_node("MatMul", ["x", "b"], ["i"])], name, [], [value("i", kind, None)], [numpy_helper.from_array(numbers(20, width), "b")])
        for name, width in (("then", 10), ("else", 10))
    )  # fmt: skip
    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=then, else_branch=other),
        helper.make_node("Mul", ["h", "m"], ["y"]),
    ]
    tensors = {"m": numbers(100, 10), "c": np.array(True)}
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, ["b", 20])
    assert slrprop.inspect(path).other == "Mul 71 %, MatMul in If 29 %"


def test_initializers_are_inputs_too_where_the_format_wants_that(tmp_path):
    nodes = [helper.make_node("Gemm", ["x", "a", "p"], ["y"], "one")]
    tensors = {"a": numbers(64, 48), "p": numbers(48)}
    path = graph_file(tmp_path / "m.onnx", nodes, tensors, ["b", 64], 9, ir_version=3)
    model = onnx.load(path)
    model.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in tensors.items())  # fmt: skip
    onnx.save(model, path)
    for settings in ({}, {"bits": 4}):
        slrprop.apply(path, slrprop.plan(path, None, method="svd", rank=4, **settings), tmp_path / "s.onnx")
        small = onnx.load(tmp_path / "s.onnx")
        onnx.checker.check_model(small, full_check=True)
        assert {tensor.name for tensor in small.graph.initializer} < {value.name for value in small.graph.input}
        assert len(slrprop.inspect(tmp_path / "s.onnx")) == (2 if not settings else 0)


def big_file(folder, **where):
    nodes = [helper.make_node("Gemm", ["x", "a", "p"], ["h"], "one"), helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "b"], ["y"], "two")]  # fmt: skip
    tensors = {"a": numbers(40, 50), "p": numbers(50), "b": numbers(50, 30)}
    path = graph_file(folder / "m.onnx", nodes, tensors, ["b", 40])
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = big_file(tmp_path / "in")
    before = slrprop.measure(path, (numbers(9, 40), np.arange(9)))
    for method in ("slr", "svd"):
        plan = slrprop.plan(path, numbers(9, 40), method=method, layers="one", rank=4)
        slrprop.apply(path, plan, tmp_path / "out" / "small.onnx")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"small.onnx", "small.onnx.data"}
    small = {tensor.name: tensor for tensor in onnx.load(tmp_path / "out" / "small.onnx").graph.initializer}
    assert sorted(tuple(tensor.dims) for name, tensor in small.items() if name not in ("p", "b")) == [(4, 50), (40, 4)]
    np.testing.assert_array_equal(numpy_helper.to_array(small["b"]), numbers(50, 30))
    assert run(tmp_path / "out" / "small.onnx", {"x": numbers(3, 40)})[0].shape == (3, 30)
    assert slrprop.measure(tmp_path / "out" / "small.onnx", (numbers(9, 40), np.arange(9))).bytes < before.bytes


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "link.bin", "missing.bin", ""])
def test_external_data_stay_in_the_folder(location, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(40 * 50 * 4))
    (tmp_path / "in").mkdir()
    path = big_file(tmp_path / "in")
    (tmp_path / "in" / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(path, load_external_data=False)
    entry = next(e for e in model.graph.initializer[0].external_data if e.key == "location")
    entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SlrpropError, match=r"outside its folder|is not there"):
        slrprop.inspect(path)


# Bad input


@pytest.fixture
def small_file(tmp_path):
    path = graph_file(tmp_path / "m.onnx", [helper.make_node("MatMul", ["x", "a"], ["y"], "one")], {"a": numbers(20, 30)}, ["b", 20])  # fmt: skip
    return path


def test_bad_input_ends_in_one_sentence(small_file, tmp_path):
    def refused(match, function, *args, **settings):
        with pytest.raises(SlrpropError, match=match) as found:
            function(*args, **settings)
        assert "\n" not in str(found.value)

    for name, content in {"empty": b"", "text": b"hello world", "half": small_file.read_bytes()[:1500]}.items():
        (tmp_path / name).write_bytes(content)
        refused("can't be read|no file with|not an ONNX model|is no ONNX model", slrprop.inspect, tmp_path / name)
    refused("can't be read: No such file", slrprop.inspect, tmp_path / "nothing.onnx")
    refused("'tmp'|no file with|can't be read", slrprop.inspect, tmp_path)
    refused("data of shape x \\(4, 21\\)", slrprop.plan, small_file, numbers(4, 21), method="slr", rank=2)
    refused("the model's inputs are x, and the data holds a, b", slrprop.plan, small_file, {"a": numbers(4, 20), "b": numbers(4, 20)}, rank=2)  # fmt: skip
    refused("no layer is called 'on'; did you mean one", slrprop.plan, small_file, None, method="svd", layers="on")
    plan = slrprop.plan(small_file, None, method="svd", rank=2)
    refused("needs the path of the file to write", slrprop.apply, small_file, plan)
    refused("could not be written", slrprop.apply, small_file, plan, tmp_path / "no" / "s.onnx")
    other = graph_file(tmp_path / "o.onnx", [helper.make_node("MatMul", ["x", "a"], ["y"], "one")], {"a": 2 * numbers(20, 30)}, ["b", 20])  # fmt: skip
    refused("the weights of layer 'one' differ", slrprop.apply, other, slrprop.Plan(plan.layers), tmp_path / "s.onnx")
    assert not (tmp_path / "s.onnx").exists()
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "lie.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 9999), }".ljust(117) + b"\n")  # fmt: skip
    for name in ("object.npy", "lie.npy", "m.onnx"):
        refused("too small or wrong|can't be read", Data, tmp_path / name)


def test_a_result_that_differs_is_not_kept(small_file, tmp_path, monkeypatch):
    plan = slrprop.plan(small_file, None, method="svd", rank=2)
    monkeypatch.setattr("slrprop.network.onnx.parity.FLOAT_TOLERANCE", -1.0)
    with pytest.raises(SlrpropError, match="output 'y' of the new file differs from the factors' values by"):
        slrprop.apply(small_file, plan, tmp_path / "s.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_mutated_files_end_in_an_error_or_a_result(small_file, tmp_path):
    raw, random = bytearray(small_file.read_bytes()), np.random.default_rng(0)
    header = [i for i in range(len(raw)) if i < 60 or i > len(raw) - 120]  # not the weight's numbers
    for _ in range(300):
        broken = bytearray(raw)
        for place in random.choice(header, random.integers(1, 4)):
            broken[place] = random.integers(0, 256)
        if random.random() < 0.2:
            broken = broken[: random.integers(1, len(broken))]
        (tmp_path / "b.onnx").write_bytes(broken)
        try:
            plan = slrprop.plan(tmp_path / "b.onnx", numbers(3, 20), method="slr", rank=2)
            slrprop.apply(tmp_path / "b.onnx", plan, tmp_path / "s.onnx")
        except SlrpropError as error:
            assert "\n" not in str(error)
