"""Information control, and networks collapsed into one matrix."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from typer.testing import CliRunner

import slrprop
from slrprop import SlrpropError, cli
from slrprop import export as export_module
from slrprop.data import Data
from slrprop.network import OnnxNetwork
from slrprop.research import interpret
from slrprop.research import interpret_study as study
from slrprop.research.figures import heatmaps
from slrprop.research.interpret import InformationControl, References, collapse, compare
from slrprop.research.store import Store
from tests.onnx_models import export

runner = CliRunner()


def test_potentiality_information_and_cost():
    weight = torch.tensor([[1.0, -4.0], [0.0, 2.0]])
    assert interpret.potentiality(weight).tolist() == [[0.25, 1.0], [0.0, 0.5]]
    assert interpret.selective_information(weight) == 1.75
    assert interpret.selective_information(weight, complement=True) == 2.25
    assert interpret.cost(weight) == 7.0
    assert interpret.selective_information(torch.zeros(2, 2)) == 0.0


def test_control_raises_lowers_alternates_and_forces_the_cost_down():
    def weights(**options):
        model = nn.Sequential(nn.Linear(2, 2))
        model[0].weight.data = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
        control = InformationControl(model, **options)
        return model[0].weight, control, [control.step() for _ in range(4)]

    raised, _, done = weights(schedule="raise", every=4)
    torch.testing.assert_close(raised.detach(), torch.tensor([[0.25, -4.0], [0.0625, 1.0]]))
    assert done == ["none", "none", "none", "raise"]
    lowered, control, _ = weights(schedule="lower", every=4, theta=0.9)
    want = torch.tensor([[0.75, 0.0], [0.4375, 1.0]])
    torch.testing.assert_close(lowered.detach(), want * 0.9 * 7.5 / want.sum())
    assert math.isclose(control.cost(), 0.9 * 7.5, rel_tol=1e-6)
    assert weights(schedule="alternate", every=2)[2] == ["none", "raise", "none", "lower"]
    assert weights(schedule=lambda turn: "none" if turn else "lower")[2] == ["lower", "none", "none", "none"]
    gentle, _, _ = weights(schedule="raise", every=4, strength=0.5)
    torch.testing.assert_close(gentle.detach(), torch.tensor([[0.5, -4.0], [0.5 * 0.125**0.5, 2 * 0.5**0.5]]))


WRAPPED = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by hooks": nn.utils.weight_norm,
    "pruning mask": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("schedule", ["raise", "lower"])
def test_control_changes_what_a_weight_is_computed_from(kind, schedule):
    torch.manual_seed(0)
    layer, x = WRAPPED[kind](nn.Linear(5, 4, bias=False)), torch.eye(5)
    before, parameters = layer(x).T.detach(), list(layer.parameters())
    g = before.abs() / before.abs().max()
    want = before * (g if schedule == "raise" else (1 - g) * before.abs().sum() / (before * (1 - g)).abs().sum())
    control = InformationControl(nn.Sequential(layer), schedule, theta=0.5)
    control.step()
    torch.testing.assert_close(layer(x).T.detach(), 0.5 * want)
    assert control.cost() == pytest.approx(float(0.5 * want.abs().sum()), rel=1e-5)
    assert all(one is other and one.requires_grad for one, other in zip(parameters, layer.parameters(), strict=True))


def test_control_of_shared_equal_and_bound_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    want = model[0].weight.detach() * interpret.potentiality(model[0].weight)
    InformationControl(model, "raise").step()
    torch.testing.assert_close(model[0].weight.detach(), want)  # once, though two layers share it
    mixed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    filters = mixed[0].weight.detach().clone()
    InformationControl(mixed, "raise").step()
    assert torch.equal(mixed[0].weight, filters)  # dense layers alone are changed
    equal = nn.Sequential(nn.Linear(3, 2))
    equal[0].weight.data.fill_(0.5)
    InformationControl(equal, "lower", theta=0.5).step()
    assert (equal[0].weight == 0.25).all()  # no connection can be lowered for another
    for bound in (parametrizations.spectral_norm, nn.utils.spectral_norm, parametrizations.orthogonal):
        layer = bound(nn.Linear(4, 6)).eval()
        before = layer(torch.eye(4))
        with pytest.raises(SlrpropError, match="layer '0' computes its weight, and can't be given another one"):
            InformationControl(nn.Sequential(layer), "raise").step()
        torch.testing.assert_close(layer(torch.eye(4)), before)


def test_control_fits_into_a_training_loop(digits):
    x, y = digits
    information = {}
    for schedule in ("none", "raise", "lower"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        control = InformationControl(model, lambda turn, what=schedule: what, every=20)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:500]), y[:500]).backward()
            optimizer.step()
            control.step()
        information[schedule] = control.selective_information()
    assert information["raise"] < information["none"] < information["lower"]


def normed():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.GELU(), nn.Linear(5, 3)
    )
    model(3 * torch.randn(50, 6) + 1)
    return model.eval()


def test_product_of_a_chain_through_both_doors(tmp_path):
    model = normed()
    norm = model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    want = (model[5].weight @ model[3].weight @ (scale[:, None] * model[0].weight)).T.detach()
    torch.testing.assert_close(collapse(model), want)
    torch.testing.assert_close(collapse(nn.Sequential(nn.Flatten(), model, nn.Softmax(-1)), torch.randn(4, 2, 3)), want)
    export(model, (torch.randn(4, 6),), tmp_path / "model.onnx", False)
    torch.testing.assert_close(collapse(tmp_path / "model.onnx"), want, rtol=1e-4, atol=1e-5)


def test_mean_gradients_through_both_doors(tmp_path):
    model, x = normed(), torch.randn(40, 6)
    want = torch.stack([torch.autograd.functional.jacobian(lambda v: model(v[None])[0], row) for row in x]).mean(0).T
    torch.testing.assert_close(collapse(model, x, by="gradients"), want)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    export(model, (x[:4],), tmp_path / "model.onnx", False)
    torch.testing.assert_close(collapse(tmp_path / "model.onnx", x, by="gradients"), want, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_linear_network_are_its_product():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    torch.testing.assert_close(collapse(model, torch.randn(9, 5), by="gradients"), collapse(model))


class Net(nn.Module):
    """What a test wants a forward to be."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out, self.rule = nn.Linear(6, 6), nn.Linear(6, 3), forward

    def forward(self, x):
        return self.rule(self, x)


@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_the_product_of_a_network_with_a_skip_is_the_sum_over_paths(door, tmp_path):
    model, x = Net(lambda net, x: net.out(x + torch.sigmoid(net.inner(2 * x))).softmax(-1)), torch.randn(20, 6)
    want = (model.out.weight @ (torch.eye(6) + 2 * model.inner.weight)).T.detach()
    if door == "onnx":
        export(model, (x[:4],), tmp_path / "model.onnx", False)
    torch.testing.assert_close(
        collapse(model if door == "torch" else tmp_path / "model.onnx", x), want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_no_chain_goes_by_gradients_and_says_so(door, tmp_path):
    model, x = Net(lambda net, x: net.out(x * torch.sigmoid(net.inner(x)))), torch.randn(20, 6)
    want = torch.stack([torch.autograd.functional.jacobian(lambda v: model(v[None])[0], row) for row in x]).mean(0).T
    if door == "onnx":
        export(model, (x[:4],), tmp_path / "model.onnx", False)
        model = tmp_path / "model.onnx"
    torch.testing.assert_close(collapse(model, x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        SlrpropError, match=r"more than its activations keeps it from being one matrix; ask for by='gradients'"
    ):
        collapse(model, x, by="product")
    with pytest.raises(SlrpropError, match="which need data"):
        collapse(model)


@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_samples_on_another_axis(door, tmp_path, monkeypatch):
    model = Net(lambda net, x: net.out(net.inner(8 * x.T).sigmoid()).T)
    x = torch.randn(6, 20)
    same = Net(lambda net, x: net.out(net.inner(8 * x).sigmoid()))
    targets = same(x.T).argmax(-1)
    if door == "onnx":
        model = tmp_path / "model.onnx"
        axes = {"x": {1: "n"}, "y": {1: "n"}}
        net = Net(lambda net, x: net.out(net.inner(8 * x.T).sigmoid()).T)
        with export_module._quiet():
            torch.onnx.export(net, (x,), model, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes)
    data, runs, run = Data({"x": x, "targets": targets}, batch_axis={"x": 1}), [], OnnxNetwork.run
    for way in ("product", "gradients"):
        want = collapse(same, x.T, way)
        monkeypatch.setattr(OnnxNetwork, "run", lambda *args: runs.append(1) or run(*args))
        torch.testing.assert_close(collapse(model, data, way), want, rtol=1e-4, atol=1e-6)
    assert len(runs) < 40  # looking for the axis went around in circles
    torch.testing.assert_close(interpret.effects(want, data), interpret.effects(want, x.T))
    one, other = compare(want, data, model), compare(want, (x.T, targets), same)
    assert vars(one) == pytest.approx(vars(other), rel=1e-4)
    if door == "onnx":
        np.savez(tmp_path / "data.npz", x=x.numpy())
        command = ["interpret", str(model), "--data", str(tmp_path / "data.npz"), "--batch-axis", "x=1", "--json"]
        told = json.loads(runner.invoke(cli.app, command, catch_exceptions=False).stdout)
        torch.testing.assert_close(
            torch.tensor(told["effects"][0]), interpret.effects(collapse(same, x.T), x.T).float(), rtol=1e-4, atol=1e-5
        )


def test_a_file_of_fixed_batch_size_is_collapsed_without_its_padding(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 6)
    path = export(model, (torch.randn(16, 6),), tmp_path / "model.onnx", False, batch=16)
    for way in ("product", "gradients"):
        torch.testing.assert_close(collapse(path, x, way), collapse(model, x, way), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "act", [nn.SELU(), nn.CELU(2.0), nn.Hardsigmoid(), nn.PReLU()], ids=lambda act: type(act).__name__
)
def test_activations_are_known_through_both_doors(act, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 3)).eval(), torch.randn(20, 6)
    path = export(model, (x,), tmp_path / "model.onnx", False)
    torch.testing.assert_close(collapse(model, by="product"), (model[2].weight @ model[0].weight).T.detach())
    for way in ("product", "gradients"):
        torch.testing.assert_close(collapse(path, x, way), collapse(model, x, way), rtol=1e-4, atol=1e-6)


def test_a_network_that_is_nothing_without_its_activations_has_no_product(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanhshrink(), nn.Linear(8, 3)), torch.randn(20, 6)
    path = export(model, (x,), tmp_path / "model.onnx", False)  # as x - tanh(x)
    torch.testing.assert_close(collapse(path, x), collapse(model, x, "gradients"), rtol=1e-4, atol=1e-6)


def test_neither_is_one_sentence(tmp_path):
    model = Net(lambda net, x: net.out(net.inner(x).relu().cumsum(1)))
    x = torch.randn(6, 6)
    assert collapse(model, x).shape == (6, 3)
    export(model, (x,), tmp_path / "model.onnx", False)
    with pytest.raises(SlrpropError, match="no gradient is known of here; interpret the torch module"):
        collapse(tmp_path / "model.onnx", x)

    class Choice(nn.Module):
        def forward(self, x):
            return x.argmax(-1, keepdim=True).float()

    with pytest.raises(SlrpropError, match="no gradient tells which input drives it"):
        collapse(Choice(), torch.randn(6, 4))
    with pytest.raises(SlrpropError, match="no input varies in the data"):
        interpret.effects(torch.ones(4, 2), torch.ones(3, 4))
    with pytest.raises(SlrpropError, match=r"one input of real numbers, and the data has 1 \(torch.int64\); store"):
        collapse(nn.Sequential(nn.Embedding(5, 4)), torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(SlrpropError, match="by must be one of auto, product, gradients"):
        collapse(model, x, by="jacobian")
    with pytest.raises(SlrpropError, match=r"schedule must be one of raise, lower, alternate"):
        InformationControl(model, "up")
    with pytest.raises(SlrpropError, match=r"no nn.Linear layer"):
        InformationControl(nn.ReLU())


def test_compare_knows_what_the_data_says():
    torch.manual_seed(0)
    x = torch.randn(600, 4) * torch.tensor([1.0, 10.0, 1.0, 1.0])  # input 1 in other units
    y = (x[:, 0] + 0.1 * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    model[0].weight.data = torch.tensor([[-1.0, -0.1, 0.0, 0.0], [1.0, 0.1, 0.0, 0.0]])
    alike = compare(collapse(model), (x, y), model)
    assert min(alike.correlation, alike.logistic, alike.permutation) > 0.99
    opposite = compare(-collapse(model), (x, y))
    assert opposite.correlation < -0.99 and opposite.logistic < -0.99 and opposite.permutation > 0.99
    assert compare(collapse(model)[:, 1:] * 2, (x, y)) == compare(collapse(model), (x, y))  # one logit of class 1
    references = References.of((x, y))
    assert references.correlations.shape == references.logistic.shape == (4, 2) and references.permutation[0] > 0.2
    some, ignored = (x[:40], y[:40]), (x[:60], torch.cat([y[:40], torch.full((20,), -100)]))
    assert compare(collapse(model), some, model) == compare(collapse(model), ignored, model)
    three = torch.cat([collapse(model), torch.zeros(4, 1)], 1)  # of a third class there is no sample
    known = torch.cat([references.correlations, torch.zeros(4, 1)], 1)
    assert compare(three, (x, y)).correlation == pytest.approx(
        interpret.correlation(
            *(m - m.mean(1, keepdim=True) for m in (three.double() * x.double().std(0)[:, None], known))
        ),
        abs=1e-6,
    )
    for bad, text in (
        ((x, None), "'targets'"),
        ((x, 0 * y), "two classes or more, numbered from 0, and the data has 0; give others, or leave"),
        ((x[:, :3], y), r"is \(4, 2\)"),
        ((x, y + 1), r"is \(4, 2\), and the data has 4 inputs and 3 classes"),
    ):
        with pytest.raises(SlrpropError, match=text):
            compare(collapse(model), bad)


def test_interpret_command_before_and_after_compression(trained, digits, tmp_path):
    x, y = digits
    slrprop.export_onnx(trained, tmp_path / "model.onnx", x[:4])
    np.savez(tmp_path / "data.npz", x=x[:80].numpy(), targets=y[:80].numpy())
    for options in (
        {"method": "svd", "bits": 8},
        {"method": "slr", "criterion": "weight"},
    ):  # numbers that are unpacked; blocks
        plan = slrprop.plan(tmp_path / "model.onnx", (x[:300], y[:300]), rank=8, **options)
        slrprop.apply(tmp_path / "model.onnx", plan, tmp_path / "small.onnx")
        small = slrprop.apply(trained, slrprop.plan(trained, (x[:300], y[:300]), rank=8, **options))
        command = [
            "interpret",
            str(tmp_path / "model.onnx"),
            "--data",
            str(tmp_path / "data.npz"),
            "--against",
            str(tmp_path / "small.onnx"),
        ]
        for way in ("product", "gradients") if "bits" in options else ("product",):
            told = json.loads(runner.invoke(cli.app, [*command, "--by", way, "--json"], catch_exceptions=False).stdout)
            assert told["by"] == way and 0.5 < told["alike"] < 1 and len(told["likeness"]) == 2
            want = collapse(small, x[:80], by=way).double() * x[:80].double().std(0, correction=0)[:, None]
            torch.testing.assert_close(torch.tensor(told["effects"][1]).double(), want, rtol=1e-3, atol=1e-3)
    done = runner.invoke(cli.app, [*command, "--output", str(tmp_path / "drawn.png")])
    assert "product of the layers" in done.stdout and "Both files: correlation of all effects" in done.stdout
    assert (tmp_path / "drawn.png").stat().st_size > 5000
    bad = runner.invoke(cli.app, [*command, "--output", str(tmp_path / "drawn.pdf")])
    assert isinstance(bad.exception, SlrpropError) and "must end in .png or .svg" in str(bad.exception)


@pytest.mark.parametrize("shape", [(1, 1), (5, 60), (784, 3)])
def test_all_that_a_picture_says_is_in_it(shape):
    canvas = heatmaps(["one.onnx", "other.onnx"], [torch.randn(shape)] * 2)
    canvas.draw_without_rendering()
    ticks = canvas.axes[1].get_yticks()  # both share the axis
    assert all(tick == int(tick) for tick in ticks) and (shape[0] > 40 or ticks.tolist() == list(range(shape[0])))
    label = canvas.axes[-1].yaxis.label.get_window_extent()
    assert label.y0 >= 0 and label.y1 <= canvas.bbox.height and label.x1 <= canvas.bbox.width


def test_the_study_goes_on_where_it_stopped_and_writes_its_page(tmp_path, monkeypatch):
    for name, value in {"BATCH": {"breast cancer": 64}, "EPOCHS": 3, "LAST": 2, "RECORDED": (1, 3)}.items():
        monkeypatch.setattr(study, name, value)
    controls = {name: study.CONTROLS[name] for name in ("none", "raise")}
    monkeypatch.setattr(study, "CONTROLS", controls)
    room, store = study.breast_cancer(0), Store(tmp_path / "results.sqlite", study.ROW, study.KEYS)
    assert study.run(room, tmp_path, 1, store, methods=["none"]) == 2
    assert study.run(room, tmp_path, 2, store) == 6 and study.run(room, tmp_path, 2, store) == 0
    rows = store.results()
    assert len(rows) == 8 and all(row.table == "breast cancer" for row in rows)
    last = {row.control: row for row in rows if row.seed == 1 and row.epoch == 3}
    assert last["raise"].selectivity > last["none"].selectivity and last["raise"].cost < last["none"].cost
    assert len(study.network(16, 4)) == 21 and collapse(study.network(16, 4)).shape == (16, 4)
    command = ["paper", "table", "interpret-room", "--run-dir", str(tmp_path), "--output", str(tmp_path / "docs")]
    page = CliRunner().invoke(cli.app, command, catch_exceptions=False).stdout
    assert "| raise | 2 |" in page and "(" in page.split("less no control")[1]
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {
        f"interpret-room.{kind}" for kind in ("csv", "md", "png", "svg")
    }
    with pytest.raises(SlrpropError, match="method must be one of none, raise"):
        study.run(room, tmp_path, 1, store, methods=["up"])
