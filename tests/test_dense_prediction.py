"""Outputs of more than two axes: classes are found wherever they stand, labels of positions count, some are ignored."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

import slrprop
from slrprop import SlrpropError, cli, compress
from slrprop.data import Data
from slrprop.linalg import truncated_svd
from slrprop.network import open_network
from slrprop.relevance import cost_scores
from slrprop.search.judge import Judge


class Dense(nn.Module):
    """Scores of each pixel (N, classes, H, W) by dense layers on the channels; positive and of unequal size along W."""

    def __init__(self, classes=5, after=lambda y: y):
        super().__init__()
        self.first, self.last, self.after = nn.Linear(6, 16), nn.Linear(16, classes), after

    def forward(self, x):
        y = self.last(torch.relu(self.first(x.permute(0, 2, 3, 1))))
        return self.after(y.permute(0, 3, 1, 2))


class Rows(Dense):
    """The same scores, pixel after pixel (N H W, classes)."""

    def forward(self, x):
        return super().forward(x).movedim(1, -1).flatten(0, -2)


@pytest.fixture(scope="module")
def pixels():
    torch.manual_seed(0)
    return torch.randn(30, 6, 3, 4) * torch.linspace(1, 4, 4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Dense().eval()


@pytest.fixture(scope="module")
def file(model, pixels, tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model.onnx"
    exported(model, path, pixels)
    return path


def exported(model, path, x):
    """By the exporter that takes a tenth of a second."""
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N"}})


def conv(*parts):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), *parts).eval()


FOUND = {
    "dense layers": (Dense(), -3),
    "softmax over classes": (Dense(after=lambda y: y.softmax(1)), -3),
    "softmax, then turned": (Dense(after=lambda y: y.softmax(1).movedim(1, -1)), -1),
    "upsampled": (Dense(after=lambda y: functional.interpolate(y, scale_factor=2, mode="bilinear")), -3),
    "one class": (Dense(1), -3),
    "one number a pixel": (Dense(1, after=lambda y: y[:, 0]), 0),
    "1 x 1 convolution": (conv(nn.Conv2d(8, 2, 1)), -3),
    "transposed convolution": (conv(nn.ConvTranspose2d(8, 3, 2, 2), nn.LogSoftmax(1)), -3),
    "classes last": (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), -1),
}


@pytest.mark.parametrize("kind", FOUND)
@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_the_class_axis_is_found(door, kind, pixels, tmp_path):
    model, axis = FOUND[kind]
    if door == "onnx":
        exported(model.eval(), tmp_path / "model.onnx", pixels)
    network = open_network(model if door == "torch" else tmp_path / "model.onnx", Data(pixels))
    assert network.reading.axis == axis
    with torch.no_grad():
        output = model(pixels)
    (flow,) = network.stream((), Data(pixels))
    want = output[..., None] if axis == 0 else output.movedim(axis, -1)
    torch.testing.assert_close(flow.output, want, rtol=1e-4, atol=1e-5)


def test_what_nothing_tells_is_asked_for(pixels):
    """One dense layer makes all pixels of all classes at once: labels tell, or the user."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 24), nn.Unflatten(1, (2, 3, 4))).eval()
    message = r"the network's output has shape \(30, 2, 3, 4\), and nothing tells which axis holds its classes; say it by class_axis \(--class-axis\), from 1 to 3"
    for ask in (
        lambda: slrprop.plan(model, pixels, method="low_rank"),
        lambda: slrprop.measure(model, pixels, against=model),
        lambda: Judge(model, Data(pixels), None),
    ):
        with pytest.raises(SlrpropError, match=message):
            ask()
    assert slrprop.plan(model, pixels, method="rtn", bits=8).layers  # for which outputs are of no interest
    assert Judge(model, Data(pixels, class_axis=1), None).original.shape == (30 * 12, 2)
    for labels in (torch.zeros(30, 3, 4).long(), torch.zeros(30, 1, 3, 4, dtype=torch.uint8)):
        assert Judge(model, Data((pixels, labels)), None).original.shape == (30 * 12, 2)
    with pytest.raises(SlrpropError, match="class_axis 4 was asked for, and the network's output has shape"):
        slrprop.plan(model, pixels, method="low_rank", class_axis=4)
    with pytest.raises(SlrpropError, match="class_axis must be a whole number, got 'one'"):
        slrprop.plan(model, pixels, method="low_rank", class_axis="one")


@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_agreement_is_that_of_pixels(door, model, file, pixels, tmp_path):
    given = model if door == "torch" else file
    found = compress(given, pixels, max_drop=2.0, methods={"low_rank": {"bits": 4}, "dense": {"bits": 8}})
    _, check = Data(pixels).split(0)
    x = torch.cat([batch.inputs[0] for batch in check])
    if door == "onnx":
        slrprop.apply(file, found.plan, tmp_path / "small.onnx")
        small = open_network(tmp_path / "small.onnx", Data(x))
        got = next(iter(small.stream((), Data(x)))).output.argmax(-1)
    else:
        got = found.model(x).argmax(1)
    alike = 100 * float((got == model(x).argmax(1)).double().mean())
    assert found.quality == (100, pytest.approx(alike)) and found.samples[1] == 15 and alike >= 98


def test_everything_sees_pixels_as_rows(model, file, pixels):
    """Gradients, costs and relevance of (N, classes, H, W) are those of the network that gives its pixels one after the other."""
    torch.manual_seed(1)
    rows, labels = Rows().eval(), torch.randint(0, 5, (30, 3, 4))
    labels[:, :, 0] = -100
    for targets in (None, labels):
        data = Data((pixels, targets))
        sums = []
        for network in (open_network(one, data) for one in (model, file, rows)):
            name = network.names[0]
            total = sum(y[name].T @ y[name] for _, y in network.gradients((name,), data, 16))
            svd = cost_scores(network, data, name, truncated_svd(network.weight(name), 6), 2)
            sums.append((total, svd.rows, svd.columns, torch.tensor(svd.baseline)))
        for got in sums[:2]:
            for one, want in zip(got, sums[2], strict=True):
                torch.testing.assert_close(one.double(), want.double(), rtol=1e-3, atol=1e-6)


def test_labels_of_positions_and_labels_to_ignore(model, pixels):
    random = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(30, 3, 4, generator=random) < 0.8, model(pixels).argmax(1), 2)
    kept = torch.rand(30, 3, 4, generator=random) < 0.7
    guess = model(pixels).argmax(1)[kept]
    for hole, ignore in ((-100, None), (255, 255)):
        holes = torch.where(kept, labels, hole)
        found = slrprop.measure(model, (pixels, holes), ignore_label=ignore)
        assert found.accuracy == pytest.approx(100 * sklearn.accuracy_score(labels[kept], guess))
        assert found.miou == pytest.approx(100 * sklearn.jaccard_score(labels[kept], guess, average="macro"))
        judge = Judge(model, Data((pixels, holes), ignore_label=ignore), "miou")
        assert judge.score("miou", judge.original).value == pytest.approx(found.miou)
        assert Judge(model, Data((pixels, holes), ignore_label=ignore), "agreement").original.shape == (
            int(kept.sum()),
            5,
        )
    with pytest.raises(SlrpropError, match="labels go from 0 to 255, but the network has 5 classes"):
        slrprop.measure(model, (pixels, torch.where(kept, labels, 255)))
    with pytest.raises(SlrpropError, match="all labels are to be ignored"):
        compress(model, (pixels, torch.full((30, 3, 4), -100)), max_drop=1)


def test_tokens(pixels):
    """Labels (N, L) of outputs (N, L, classes), where the axes are of one length too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    x = torch.randn(40, 5, 8)
    labels = model(x).argmax(-1)
    labels[:, 3:] = -100
    found = compress(model, (x, labels), max_drop=5.0, methods={"dense": {"bits": 8}})
    assert found.metric == "accuracy" and found.quality[0] == 100 and found.samples[1] == 20
    assert slrprop.measure(model, (x, labels)).accuracy == 100


def test_real_targets_turn_with_the_outputs(model, pixels):
    goal = model(pixels).detach() + torch.randn(30, 5, 3, 4)
    judge = Judge(model, Data((pixels, goal)), "mae")
    assert judge.score("mae", judge.original).value == pytest.approx(
        float((model(pixels) - goal).abs().mean().detach())
    )
    assert slrprop.measure(model, (pixels, goal)).mae == pytest.approx(judge.score("mae", judge.original).value)


def test_from_the_command_line(model, file, pixels, tmp_path):
    labels = np.where(np.arange(4) == 3, 255, model(pixels).argmax(1).numpy())
    np.savez(tmp_path / "data.npz", x=pixels.numpy(), targets=labels)
    options = ["--class-axis", "1", "--ignore-label", "255"]
    run = CliRunner()
    common = [str(file), "--calibration", str(tmp_path / "data.npz"), *options]
    done = run.invoke(cli.app, ["compress", *common, "--max-drop", "2", "--metric", "miou", "--method", "dense", "-o", str(tmp_path / "s.onnx")])  # fmt: skip
    assert done.exit_code == 0 and "miou: 100.00 -> " in done.output, done.output
    done = run.invoke(cli.app, ["measure", str(file), "--data", str(tmp_path / "data.npz"), *options])
    assert done.exit_code == 0 and "miou" in done.output and "100.00" in done.output
    done = run.invoke(cli.app, ["plan", *common, "--method", "low_rank", "--rank", "2", "-o", str(tmp_path / "p.json")])
    assert done.exit_code == 0, done.output
    done = run.invoke(cli.app, ["measure", str(file), "--data", str(tmp_path / "data.npz"), "--class-axis", "9"])
    assert isinstance(done.exception, SlrpropError) and "class_axis 9 was asked for" in str(done.exception)
