"""What a model is fed, in other layouts, types and forms than one array with its samples first."""

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import slrprop
from slrprop import cli
from slrprop.data import Data
from slrprop.errors import SlrpropError, SlrpropWarning, finite
from slrprop.export import session
from slrprop.measure import measure
from slrprop.methods import METHODS
from slrprop.search import compress

STEPS, SAMPLES, WIDTH, HIDDEN, CLASSES = 6, 20, 8, 80, 5
numbers = np.random.default_rng(0).standard_normal
W, V = numbers((WIDTH, HIDDEN)).astype(np.float32), numbers((HIDDEN, CLASSES)).astype(np.float32)


def saved(path: Path, nodes, inputs, outputs, tensors, opset=17) -> Path:
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)
    return path


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def mlp(x="x", between=(), y="y"):
    node = helper.make_node
    return [*between, node("MatMul", [x, "W"], ["a"], "fc"), node("Relu", ["a"], ["r"]), node("MatMul", ["r", "V"], [y], "head")]  # fmt: skip


class Recurrent(nn.Module):
    """Steps first, (T, N, F) to (T, N, C): sees all steps, and each sample by itself."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(WIDTH, 24), nn.Linear(24, CLASSES)

    def forward(self, x):
        return self.head(self.fc(x).cumsum(0).relu())


def time_major(path: Path, shape) -> Path:
    summed = helper.make_node("ReduceSum", ["x", "axes"], ["s"], keepdims=0)
    nodes, tensors = mlp("s", [summed]), {"W": W, "V": V, "axes": np.array([0])}
    return saved(path, nodes, [value("x", shape)], [value("y", None)], tensors)


@pytest.mark.parametrize("shape", [("T", "N", WIDTH), (STEPS, "N", WIDTH), (STEPS, 8, WIDTH)], ids=str)
@pytest.mark.parametrize("samples", [SAMPLES, STEPS, 2 * STEPS])
def test_samples_on_another_axis_of_an_onnx_file(shape, samples, tmp_path):
    path, x = time_major(tmp_path / "m.onnx", shape), numbers((STEPS, samples, WIDTH)).astype(np.float32)
    want = np.maximum(x.sum(0) @ W, 0) @ V
    with pytest.raises(SlrpropError, match="outputs show that they stand on axis 1; say so with --batch-axis 1"):
        compress(path, x, max_drop=1.0)
    with pytest.raises(SlrpropError, match="--batch-axis 1"):
        slrprop.plan(path, {"x": x}, method="svd", rank=2)
    data = Data({"x": x, "targets": want.argmax(1)}, batch_axis={"x": 1})
    assert measure(path, data).accuracy == 100.0  # every sample has its own label, the last batch's padding is none
    a, b = (slrprop.plan(path, data, method="slr", rank=2), slrprop.plan(path, x, method="slr", rank=2, batch_axis=1, loss="kl"))  # fmt: skip
    assert [layer.shape for layer in a.layers] == [layer.shape for layer in b.layers] != []
    parity = slrprop.apply(path, a, tmp_path / "small.onnx", data)
    assert parity.outputs["y"] <= parity.tolerance


def test_costs_do_not_depend_on_the_axis_of_samples():
    torch.manual_seed(0)
    steps_first = Recurrent()

    class SamplesFirst(Recurrent):
        def forward(self, x):
            return super().forward(x.movedim(0, 1)).movedim(1, 0)

    other = SamplesFirst()
    other.load_state_dict(steps_first.state_dict())
    x, labels = torch.randn(STEPS, SAMPLES, WIDTH), torch.randint(0, CLASSES, (SAMPLES, STEPS))
    one = slrprop.relevance.cost(steps_first, "fc", Data((x, labels), batch_axis=1), rank=4)
    two = slrprop.relevance.cost(other, "fc", (x.movedim(0, 1), labels), rank=4)
    three = slrprop.relevance.cost(
        steps_first, "fc", Data({"x": x, "labels": labels.T}, 7, batch_axis={"x": 1, "labels": 1}), rank=4
    )
    for found in (one, three):
        torch.testing.assert_close(found.rows, two.rows, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.columns, two.columns, rtol=1e-4, atol=1e-7)
    assert (
        measure(steps_first, (x, labels), batch_axis=1).accuracy == measure(other, (x.movedim(0, 1), labels)).accuracy
    )
    with pytest.raises(SlrpropError, match=r"\(6, 20, 8\), \(20, 6\)\]; if the 20 samples .* --batch-axis 1"):
        slrprop.plan(steps_first, (x, labels), method="svd")
    with pytest.raises(SlrpropError, match="outputs show that they stand on axis 1"):
        slrprop.plan(steps_first, x, method="svd")
    assert slrprop.plan(steps_first, x, method="svd", rank=2, batch_axis=0).layers  # said, so believed
    tuned = slrprop.tune(steps_first, Data(x, batch_axis=1), slrprop.plan(other, None, method="svd", rank=2), slrprop.TuneSettings(epochs=2))  # fmt: skip
    assert tuned.layers


@pytest.mark.parametrize(("axis", "match"), [
    (5, r"batch_axis says 5 of 'x', which is no axis of the inputs x \(20, 8\)"),
    ({"z": 1}, "batch_axis says 1 of 'z'"),
    ({"x": "1"}, "batch_axis says '1' of 'x'"),
    ({"targets": 3}, "batch_axis says 3 of 'x'|batch_axis says 3 of 'targets'"),
], ids=str)  # fmt: skip
def test_axes_that_are_none(axis, match):
    with pytest.raises(SlrpropError, match=match):
        Data({"x": np.zeros((SAMPLES, WIDTH)), "targets": np.zeros(SAMPLES, int)}, batch_axis=axis)


def test_square_targets_are_asked_for():
    with pytest.raises(SlrpropError, match="may have their samples on either axis"):
        Data((np.zeros((6, 6, 3)), np.zeros((6, 6), int)), batch_axis=1)


def test_batch_axis_on_the_command_line(tmp_path):
    path, x = time_major(tmp_path / "m.onnx", ("T", "N", WIDTH)), numbers((STEPS, SAMPLES, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, targets=(np.maximum(x.sum(0) @ W, 0) @ V).argmax(1))

    def call(*words):
        return CliRunner().invoke(cli.app, [*map(str, words)])

    called = ["measure", path, "--data", tmp_path / "d.npz", "--json"]
    for axis in ("1", "x=1"):
        assert json.loads(call(*called, "--batch-axis", axis).stdout)[str(path)]["accuracy"] == 100.0
    assert "--batch-axis 1" in str(call(*called).exception)
    assert "--batch-axis takes an axis, like 1" in str(call(*called, "--batch-axis", "first").exception)


def classifier(path: Path, zipmap: bool, names) -> Path:
    """As skl2onnx writes them: class names first, and scores or a map of them second."""
    node, text = helper.make_node, isinstance(names[0], str)
    labels = {"classlabels_strings" if text else "classlabels_int64s": names}
    nodes = [
        *mlp(), node("Softmax", ["y"], ["p"], axis=1), node("ArgMax", ["y"], ["i"], axis=1, keepdims=0),
        node("ArrayFeatureExtractor", ["classes", "i"], ["n"], domain="ai.onnx.ml"), node("Reshape", ["n", "flat"], ["l"]), node("Identity", ["l"], ["label"]),
        *([node("ZipMap", ["p"], ["probability"], domain="ai.onnx.ml", **labels)] if zipmap else [node("Identity", ["p"], ["probability"])]),
    ]  # fmt: skip
    kind = TensorProto.STRING if text else TensorProto.INT64
    scores = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    out = helper.make_value_info("probability", helper.make_sequence_type_proto(scores)) if zipmap else value("probability", None)  # fmt: skip
    tensors = {"W": W, "V": V, "classes": np.array(names, object if text else None), "flat": np.array([-1])}
    return saved(path, nodes, [value("x", ["N", WIDTH])], [value("label", None, kind), out], tensors)


@pytest.mark.parametrize("zipmap", [True, False])
@pytest.mark.parametrize("names", [["z", "a", "10", "b", "9"], [30, 1, 2, 7, 0]], ids=["text", "numbers"])
def test_labels_by_the_names_of_classes(zipmap, names, tmp_path):
    path, x = classifier(tmp_path / "m.onnx", zipmap, names), numbers((60, WIDTH)).astype(np.float32)
    (labels,) = session(path).run(["label"], {"x": x})
    np.savez(tmp_path / "d.npz", x=x, targets=labels.astype(str if isinstance(names[0], str) else int))
    assert measure(path, tmp_path / "d.npz").accuracy == 100.0
    assert compress(path, tmp_path / "d.npz", max_drop=100.0, methods={"svd": {}}).quality[0] == 100.0
    done = slrprop.plan(path, tmp_path / "d.npz", method="slr", rank=2)
    parity = slrprop.apply(path, done, tmp_path / "small.onnx")
    assert parity.outputs["p" if zipmap else "probability"] <= parity.tolerance
    if isinstance(names[0], str):
        with pytest.raises(
            SlrpropError, match="the label 'nobody' is text, and the model's classes are z, a, 10, b, 9"
        ):
            measure(path, (x, np.array(["nobody"] * 60)))


def test_text_and_numbers_without_axes_as_inputs(tmp_path):
    encoder = helper.make_node("LabelEncoder", ["c"], ["i"], domain="ai.onnx.ml", keys_strings=["a", "b"], values_int64s=[0, 1])  # fmt: skip
    scaled = helper.make_node("Mul", ["x", "t"], ["xt"])
    nodes = mlp("z", [encoder, scaled, helper.make_node("Gather", ["E", "i"], ["e"]), helper.make_node("Add", ["xt", "e"], ["z"])])  # fmt: skip
    inputs = [value("x", ["N", WIDTH]), value("c", ["N"], TensorProto.STRING), value("t", [])]
    path = saved(
        tmp_path / "m.onnx", nodes, inputs, [value("y", ["N", CLASSES])], {"W": W, "V": V, "E": W[:2, :WIDTH].copy()}
    )
    x, c = numbers((40, WIDTH)).astype(np.float32), np.array(["a", "b"] * 20)
    want = np.maximum((3 * x + W[[0, 1] * 20, :WIDTH]) @ W, 0) @ V
    np.savez(tmp_path / "d.npz", x=x, c=c, t=np.float32(3), targets=want.argmax(1))
    assert measure(path, tmp_path / "d.npz").accuracy == 100.0
    for data in (None, tmp_path / "d.npz", {"x": x, "c": c.astype(object), "t": np.array(3.0)}):
        done = slrprop.plan(path, data, method="svd" if data is None else "slr", rank=2)
        parity = slrprop.apply(path, done, tmp_path / "small.onnx", data)
        assert parity.outputs["y"] <= parity.tolerance
    np.savez(tmp_path / "o.npz", x=x, c=c.astype(object))
    with pytest.raises(SlrpropError, match=r"can't be read without pickle.*array\.astype\(str\)"):
        Data(tmp_path / "o.npz")
    bfloat = saved(tmp_path / "b.onnx", mlp("f", [helper.make_node("Cast", ["x"], ["f"], to=1)]), [value("x", ["N", WIDTH], TensorProto.BFLOAT16)], [value("y", None)], {"W": W, "V": V})  # fmt: skip
    with pytest.raises(SlrpropError, match="input 'x' is bfloat16, which ONNX Runtime does not take"):
        slrprop.plan(bfloat, x, method="svd")


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head, self.other = nn.Linear(WIDTH, 24), nn.Linear(24, CLASSES), nn.Linear(24, 12)

    def forward(self, x):
        r = self.fc(x).relu()
        return self.head(r), self.other(r), r


@pytest.fixture(params=["torch", "onnx"])
def two_heads(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "torch":
        return TwoHeads()
    nodes = [*mlp(), helper.make_node("MatMul", ["r", "U"], ["u"], "other")]
    outputs = [value("y", None), value("u", None), value("r", None)]
    return saved(tmp_path / "m.onnx", nodes, [value("x", ["N", WIDTH])], outputs, {"W": W[:, :24].copy(), "V": V[:24].copy(), "U": numbers((24, 12)).astype(np.float32)})  # fmt: skip


def test_a_layer_behind_no_judged_output(two_heads):
    x, y = torch.randn(60, WIDTH), torch.randint(0, CLASSES, (60,))
    name = next(layer.name for layer in slrprop.inspect(two_heads) if layer.shape == (24, 12))
    for method in METHODS:
        try:
            made = slrprop.plan(two_heads, (x, y), method=method, rank=2, layers=name, bits=8)
        except SlrpropError as error:
            assert "final response layer" in str(error) or "can't treat layer" in str(error)
        else:
            assert [layer.name for layer in made.layers] == [name] or name in made.left_dense
    found = compress(two_heads, (x, y), max_drop=100.0, methods={"low_rank": {"bits": 8}})
    assert found.left_dense == {name: "what it does shows in no output that is judged"}
    assert f"{name} stays as it is: what it does shows in no output that is judged" in found.reasons()
    with pytest.raises(SlrpropError, match=r"no layer can be made smaller .*shows in no output that is judged"):
        compress(two_heads, (x, y), max_drop=5.0, layers=name)


@pytest.mark.parametrize(("m", "n"), [(1, 30), (30, 1), (1, 1)])
def test_layers_of_one_row_or_column(m, n, tmp_path):
    model, x = nn.Sequential(nn.Linear(WIDTH, m), nn.Linear(m, n), nn.Linear(n, 3)), torch.randn(30, WIDTH)
    arrays = (layer.weight.detach().numpy().T.copy() for layer in model)
    nodes = [helper.make_node("MatMul", [a, w], [b]) for a, w, b in (("x", "A", "a"), ("a", "B", "b"), ("b", "C", "y"))]
    tensors = dict(zip("ABC", arrays, strict=True))
    path = saved(tmp_path / "m.onnx", nodes, [value("x", ["N", WIDTH])], [value("y", None)], tensors)
    for door, bits in itertools.product((model, path), (32, 4)):
        made = slrprop.plan(door, x, method="low_rank", rank=1, bits=bits)
        assert {layer.name for layer in made.layers} | made.left_dense.keys() == {i.name for i in slrprop.inspect(door)}


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, np.uint32, np.uint64, bool, torch.uint16, torch.int8])
def test_labels_of_any_integer_type(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, 2)), torch.randn(30, WIDTH)
    wide = model(x).argmax(1)
    labels = wide.to(kind) if isinstance(kind, torch.dtype) else wide.numpy().astype(kind)
    assert measure(model, (x, labels)).accuracy == 100.0
    a, b = (slrprop.plan(model, (x, y), method="slr", rank=2) for y in (labels, wide))
    assert a == b


def test_weights_too_large_for_a_form(tmp_path):
    x = torch.randn(40, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, CLASSES))
    with torch.no_grad():
        model[0].weight *= 1e7
    assert compress(
        model, x, max_drop=100.0, methods={"rtn": {"bits": 4}}, layers=["0", "2"]
    ).met  # that form is skipped
    wide, far = model.double(), x.double()
    with torch.no_grad():
        wide[0].weight *= 1e193
    made = slrprop.plan(wide, far, method="low_rank", rank=2)
    assert "beyond what can be squared" in made.left_dense["0"] and [layer.name for layer in made.layers] == ["2"]


def test_single_samples_are_no_batches():
    model, x, y = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(9, WIDTH), torch.arange(9)
    with pytest.raises(SlrpropError, match=r"one sample \(an input of shape \(8,\), and one target\) and no batch"):
        slrprop.plan(model, [(x[i], y[i]) for i in range(9)], method="svd")
    with pytest.raises(SlrpropError, match="was handed one sample without an axis of samples; give batches"):
        slrprop.plan(model, list(x), method="svd")


def test_a_fixed_batch_beyond_memory(tmp_path):
    path = saved(tmp_path / "m.onnx", mlp(), [value("x", [1 << 40, WIDTH])], [value("y", None)], {"W": W, "V": V})
    with pytest.raises(SlrpropError, match="insists on batches of 1,099,511,627,776 samples"):
        slrprop.plan(path, np.zeros((3, WIDTH), np.float32), method="svd")


def test_only_regular_files_are_read(tmp_path):
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    link = tmp_path / "link.npz"
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3)))
    link.symlink_to(tmp_path / "d.npz")
    assert next(iter(Data(link))).inputs[0].shape == (2, 3)
    for path in (pipe, Path("/dev/zero")):
        for read in (Data, slrprop.Plan.load, lambda path: slrprop.load(nn.Linear(2, 2), path)):
            with pytest.raises(SlrpropError, match="is no regular file"):
                read(path)
        with pytest.raises(SlrpropError, match="no file with an ONNX model"):
            slrprop.inspect(path)


@pytest.mark.parametrize("change", [
    lambda key, values: {key: {}},
    lambda key, values: {key: dict.fromkeys(values, 0)},
    lambda key, values: {key: values | {"quality": 1e9}},
    lambda key, values: {key: dict.fromkeys(values)},
    lambda key, values: [[[key]]],
], ids=["empty", "zeros", "another value", "null", "lists"])  # fmt: skip
def test_a_damaged_log_is_measured_anew(change, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, CLASSES)), torch.randn(60, WIDTH)

    def run():
        return compress(model, x, max_drop=5.0, methods={"svd": {}}, run_dir=tmp_path)

    first, log = run(), tmp_path / "measured.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line]
    log.write_text("[" * 5000 + "\n" + "\n".join(json.dumps(change(*item)) for line in lines for item in line.items()))
    again = run()
    assert again.summary() | {"seconds": 0} == first.summary() | {"seconds": 0}


def test_seeds():
    data = (np.zeros((9, 2)), np.zeros(9, int))
    for seed in (-1, 2**63, 10**40, True, 1.5):
        with pytest.raises(SlrpropError, match=r"seed must be a whole number from 0 to 2\^63 - 1, got"):
            Data(data).split(seed)
    assert Data(data).split(2**63 - 1)


def test_json_has_no_infinite_numbers():
    assert finite({"a": 1.5, "b": [float("nan"), 2], "c": {"d": float("-inf")}, "e": None}) == {
        "a": 1.5, "b": [None, 2], "c": {"d": None, "why_null": {"d": "infinite"}}, "e": None, "why_null": {"b": "not known"},
    }  # fmt: skip


def test_closed_streams(monkeypatch, tmp_path):
    path = saved(tmp_path / "m.onnx", mlp(), [value("x", ["N", WIDTH])], [value("y", None)], {"W": W, "V": V})
    out = tmp_path / "p.json"
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as Python does where they are closed
    for command, code in ((["plan", path, "--method", "svd", "--rank", "2", "-o", out], 0), (["inspect", out], 1), (["inspect", path], 0)):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["slrprop", *map(str, command)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    assert slrprop.Plan.load(out).layers


def test_a_path_that_is_not_utf8(tmp_path):
    path = saved(tmp_path / "m.onnx", mlp(), [value("x", ["N", WIDTH])], [value("y", None)], {"W": W, "V": V})
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.onnx"))
    path.rename(odd)
    with pytest.raises(SlrpropError, match="is not UTF-8, and ONNX Runtime opens no other; rename"):
        slrprop.inspect(odd)


@pytest.mark.parametrize(("method", "bits", "told"), [
    ("svd", 32, "two factors"), ("rtn", 8, "8 bits"), ("rtn", 4, "4 bits"), ("svd", 4, "4 bits, two factors"),
])  # fmt: skip
@pytest.mark.parametrize("opset", [17, 21])
def test_our_own_output_is_known_again(method, bits, told, opset, tmp_path):
    wide = {"W": numbers((WIDTH, 24)).astype(np.float32), "V": numbers((24, 20)).astype(np.float32)}
    path = saved(tmp_path / "m.onnx", mlp(), [value("x", ["N", WIDTH])], [value("y", None)], wide, opset)
    slrprop.apply(path, slrprop.plan(path, None, method=method, rank=2, bits=bits), tmp_path / "small.onnx")
    with pytest.warns(
        SlrpropWarning, match=rf"already by slrprop: give the original instead \(\S+: {told}; \S+: {told}\)"
    ):
        slrprop.inspect(tmp_path / "small.onnx")
    model = nn.Sequential(nn.Linear(30, 30))
    small = slrprop.apply(model, slrprop.plan(model, None, method=method, rank=2, bits=bits))
    with pytest.warns(SlrpropWarning, match=r"give the original instead \(0: (low_rank|quantized)\)"):
        slrprop.inspect(small)
