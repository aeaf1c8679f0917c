"""The ONNX front door on files that others wrote, against the torch front door and against the factors' mathematics."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.neural_network import MLPClassifier
from torch import nn
from typer.testing import CliRunner

import slrprop
from slrprop import cli
from slrprop.data import Data
from slrprop.forms import SparseLowRank
from slrprop.network import OnnxNetwork, TorchNetwork
from slrprop.network.onnx.file import OnnxFile
from slrprop.operators import Lookup
from tests.onnx_models import KINDS, export, made, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="session", params=[(kind, dynamo) for kind in KINDS for dynamo in (True, False)], ids=str)
def exported(request, folder):
    """A file by one of torch's exporters: (path, module, data for ONNX, data for torch)."""
    kind, dynamo = request.param
    model, inputs, labels = made(kind)
    path = export(model, inputs, folder / f"{kind}_{dynamo}.onnx", dynamo)
    named = {f"in{i}": value for i, value in enumerate(inputs)} | {"targets": labels}
    return path, model, named, [(*inputs, labels)]


def same_layers(network, twin):
    """Names in the file and in the module of the same layers, by their weights."""
    return {
        name: other
        for name in network.names
        for other in twin.names
        if network.shape(name) == twin.shape(other) and torch.equal(network.weight(name), twin.weight(other))
    }


# layers that exporters fold: a batch norm into them, or an embedding at constant places into a constant
FOLDED = {"convnet_True": {"body.0", "head.1"}, "convnet_False": {"body.0"}, "encoder_True": {"places"}}


def test_scores_equal_the_torch_front_door(exported):
    path, model, named, data = exported
    network, twin = OnnxNetwork(path, None), TorchNetwork(model, Data(data))
    pairs = same_layers(network, twin)
    folded = FOLDED.get(path.stem, set())
    assert set(pairs.values()) == set(twin.names) - folded
    for name, other in pairs.items():
        if "head.1" not in folded:
            assert pairs.get(network.next_layer(name)) == twin.next_layer(other)
            assert (network.chain(name) is None) == (twin.chain(other) is None)
        if isinstance(twin.operator(other), Lookup):
            for door, layer, given in ((path, name, named), (model, other, data)):
                with pytest.raises(
                    slrprop.SlrpropError, match=f"layer '{layer}' is an embedding, whose neurons have no cost"
                ):
                    slrprop.relevance.cost(door, layer, given, rank=3)
        else:
            got = slrprop.relevance.cost(path, name, named, rank=3)
            want = slrprop.relevance.cost(model, other, data, rank=3)
            for side in ("rows", "columns"):
                torch.testing.assert_close(getattr(got, side), getattr(want, side), rtol=0, atol=1e-5)
            assert abs(got.baseline - want.baseline) < 1e-5
        got, want = slrprop.relevance.activation(path, name, named), slrprop.relevance.activation(model, other, data)
        torch.testing.assert_close(got.rows, want.rows, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got.columns, want.columns, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "slr"])
def test_compressed_files_run_and_equal_the_factors(exported, method, tmp_path):
    path, _, named, _ = exported
    plan = slrprop.plan(path, named, method=method, rank=3)
    small = tmp_path / "small.onnx"
    parity = slrprop.apply(path, plan, small)
    assert parity.outputs.keys() == {value.name for value in onnx.load(path).graph.output}
    assert max(slrprop.apply(path, plan, small, named).outputs.values()) <= parity.tolerance == 1e-4
    onnx.checker.check_model(str(small), full_check=True)
    dense = OnnxNetwork(path, None).with_fits({layer.name: layer.fit.multiplied() for layer in plan.layers}, None)
    feed = {name: np.asarray(value) for name, value in named.items() if name != "targets"}
    want = dense.file.session([value.name for value in onnx.load(path).graph.output]).run(feed)
    for one, other in zip(run(small, named), want.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    before, after = slrprop.measure(path, named), slrprop.measure(small, named)
    saved = sum(layer.shape[0] * layer.shape[1] - layer.numbers for layer in plan.layers)
    assert before.numbers - after.numbers == saved and after.bytes == small.stat().st_size
    for samples in (1, 5):
        run(small, {name: value[:samples] for name, value in named.items()})


def test_what_was_not_chosen_stays_byte_for_byte(exported, tmp_path):
    path, _, named, _ = exported
    raw = onnx.load(path)
    raw.metadata_props.add(key="owner", value="me")
    raw.producer_name, raw.doc_string = "somebody", "a model"
    onnx.save(raw, tmp_path / "model.onnx")
    network = OnnxNetwork(tmp_path / "model.onnx", None)
    name = network.names[-1]
    plan = slrprop.plan(tmp_path / "model.onnx", named, method="svd", layers=name, rank=1)
    slrprop.apply(tmp_path / "model.onnx", plan, tmp_path / "small.onnx")
    before, after = onnx.load(tmp_path / "model.onnx"), onnx.load(tmp_path / "small.onnx")
    assert not after.graph.value_info and not any(node.metadata_props or node.doc_string for node in after.graph.node)
    for file in (before, after):  # what exporters note, and the shapes between nodes, say nothing to a runtime
        del file.graph.value_info[:], file.graph.metadata_props[:]
        for part in (file.graph, *file.graph.node, *file.graph.initializer, *file.graph.input, *file.graph.output):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    layer = network.layer(name)
    old = {tensor.name: tensor.SerializeToString() for tensor in before.graph.initializer}
    new = {tensor.name: tensor.SerializeToString() for tensor in after.graph.initializer}
    assert set(old) - set(new) <= {layer.weight} and all(old[key] == new[key] for key in old.keys() & new.keys())
    nodes = [node.SerializeToString() for node in after.graph.node]
    kept = [node.SerializeToString() for i, node in enumerate(before.graph.node) if i != layer.index]
    assert [node for node in nodes if node in set(kept)] == kept
    for graph in (before.graph, after.graph):
        del graph.node[:], graph.initializer[:]
    assert before.SerializeToString() == after.SerializeToString()


def test_a_file_is_written_back_as_it_was(exported, tmp_path):
    path = exported[0]
    OnnxFile.open(path).save(tmp_path / "same.onnx", lambda file: None)
    canonical = onnx.load(path).SerializeToString()
    assert (tmp_path / "same.onnx").read_bytes() in (path.read_bytes(), canonical)


def test_a_scikit_learn_classifier(digits, tmp_path):
    from skl2onnx import to_onnx

    x, y = (value.numpy() for value in digits)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        model = MLPClassifier((60, 40), max_iter=30, random_state=0).fit(x[:1200], y[:1200])
    for zipmap in (False, True):
        path = tmp_path / f"{zipmap}.onnx"
        path.write_bytes(to_onnx(model, x[:1], options={"zipmap": zipmap}).SerializeToString())
        assert slrprop.measure(path, (x[1200:], y[1200:])).accuracy == pytest.approx(
            100 * model.score(x[1200:], y[1200:])
        )
        for method in ("svd", "slr", "slrprop"):
            plan = slrprop.plan(path, (x[:300], y[:300]), method=method, rank=10)
            slrprop.apply(path, plan, tmp_path / "small.onnx")
            onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
            assert slrprop.measure(tmp_path / "small.onnx", (x[1200:], y[1200:])).accuracy > 50
    weights = [nn.Linear(*coefficients.shape) for coefficients in model.coefs_]
    for linear, coefficients, intercepts in zip(weights, model.coefs_, model.intercepts_, strict=True):
        linear.weight.data = torch.from_numpy(coefficients.T).float()
        linear.bias.data = torch.from_numpy(intercepts).float()
    twin = nn.Sequential(weights[0], nn.ReLU(), weights[1], nn.ReLU(), weights[2]).eval()
    for name, other in zip(OnnxNetwork(path, None).names, ("0", "2", "4"), strict=True):
        got, want = (slrprop.relevance.cost(m, n, (x[:99], y[:99]), rank=3) for m, n in ((path, name), (twin, other)))
        torch.testing.assert_close(got.rows, want.rows, rtol=0, atol=1e-5)


def test_a_model_that_ships_in_a_package(tmp_path):
    """Google's Magika: JAX to ONNX by way of tf2onnx, 2048 bytes of a file in, its type out."""
    spec = importlib.util.find_spec("magika")
    (path,) = Path(spec.submodule_search_locations[0]).glob("models/standard_*/model.onnx")
    data = {"bytes": np.random.default_rng(0).integers(0, 257, (6, 2048))}
    assert [layer.shape for layer in slrprop.inspect(path)] == [(257, 64), (1280, 512), (512, 214)]
    for method in ("svd", "slr"):
        plan = slrprop.plan(path, data, method=method, layers="*Dense_1*", rank=16, criterion="weight") if method == "slr" else slrprop.plan(path, data, method=method, rank=16)  # fmt: skip
        slrprop.apply(path, plan, tmp_path / "small.onnx", data)
        onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
        assert run(tmp_path / "small.onnx", {"bytes": data["bytes"].astype(np.int32)})[0].shape == (6, 214)


@pytest.mark.parametrize("kind", ["lenet5", "vit", "encoder"])
def test_a_fixed_batch(kind, tmp_path):
    """Fed in batches of its size, the last one filled up: the same scores as with an open batch."""
    model, inputs, labels = made(kind)
    path = export(model, inputs, tmp_path / "fixed.onnx", False, batch=4)
    named = {f"in{i}": value for i, value in enumerate(inputs)} | {"targets": labels}
    network = OnnxNetwork(path, None)
    assert network.fixed_batch(next(iter(Data(named)))) == 4
    pairs = {name: other for name, other in same_layers(network, TorchNetwork(model, None)).items() if not isinstance(network.operator(name), Lookup)}  # fmt: skip
    for name, other in list(pairs.items())[:2]:
        got, want = slrprop.relevance.cost(path, name, named, rank=2), slrprop.relevance.cost(model, other, [(*inputs, labels)], rank=2)  # fmt: skip
        torch.testing.assert_close(got.rows, want.rows, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.columns, want.columns, rtol=0, atol=1e-5)
    assert slrprop.measure(path, named).accuracy == slrprop.measure(model, [(*inputs, labels)]).accuracy


def test_sequential_order_with_compressed_layers(exported):
    path, _, named, _ = exported
    if "mlp" in path.name:
        plan = slrprop.plan(path, named, method="slr", rank=3, order="sequential")
        assert isinstance(plan.layers[0].factors, SparseLowRank)


def test_the_command_line(folder, tmp_path):
    model, inputs, labels = made("lenet5")
    path = export(model, inputs, tmp_path / "m.onnx", False)
    np.savez(tmp_path / "data.npz", in0=inputs[0], targets=labels)
    np.save(tmp_path / "x.npy", inputs[0])
    runner = CliRunner()

    def call(*words):
        result = runner.invoke(cli.app, [str(word) for word in words])
        assert result.exit_code == 0, result.exception
        return result.stdout

    assert [layer["shape"] for layer in json.loads(call("inspect", path, "--json"))] == [
        [25, 6],
        [150, 16],
        [400, 120],
        [120, 84],
        [84, 10],
    ]
    assert "400 x 120" in call("inspect", path)
    plan, small = tmp_path / "plan.json", tmp_path / "small.onnx"
    made_plan = json.loads(call("plan", path, "--calibration", tmp_path / "data.npz", "--method", "slrprop", "--rank", 8, "-o", plan, "--json"))  # fmt: skip
    assert [layer["method"] for layer in made_plan["layers"]] == ["slrprop"] * 3
    written = json.loads(call("apply", path, plan, "-o", small, "--json"))
    assert written["bytes"] == small.stat().st_size < written["bytes_before"]
    assert "of" in call("apply", path, plan, "-o", small, "--calibration", tmp_path / "x.npy")
    found = json.loads(call("measure", small, "--data", tmp_path / "data.npz", "--against", path, "--json"))
    assert list(found) == [str(small), str(path)] and found[str(path)]["numbers"] == 61706
    assert "accuracy" in call("measure", small, "--data", tmp_path / "data.npz")
    unlabelled = call("measure", small, "--data", tmp_path / "x.npy", "--against", path)
    assert "agreement" in unlabelled and "accuracy" not in unlabelled
