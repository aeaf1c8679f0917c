"""Training that is killed and goes on, its images moved and mirrored; data sets of colour images."""

import csv
import dataclasses
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from slrprop import SlrpropError, cli
from slrprop.research import bench, datasets, training
from slrprop.research.bench import Bench
from slrprop.research.datasets import Dataset, cifar
from slrprop.research.experiments import EXPERIMENTS, TRAINED, train_missing, trained, weights_of
from slrprop.research.networks import VGG16, Convolution, Headed
from slrprop.research.training import Recipe, Trainer, cropped, cut_out, device_of, digest

needs_cifar = pytest.mark.skipif(
    not any((Path(os.environ.get("SLRPROP_DATA", "-")) / f"cifar10.npz{end}").exists() for end in ("", ".xz")),
    reason="SLRPROP_DATA names no folder with cifar10.npz",
)


class Tiny(Headed):
    """Two convolutions with batch norm and a dense end with dropout."""

    dense = ("fc6", "fc7", "fc8")
    between = VGG16.between

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.fc6, self.fc7, self.fc8 = nn.Linear(128, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def front(self, x):
        return self.features(x)


@pytest.fixture(scope="module")
def images(digits):
    x, y = digits
    x = nn.functional.interpolate(x.view(-1, 1, 8, 8), 32)
    return Dataset(x[:300], y[:300], x[300:400], y[300:400])


def tiny(momentum=0.9, **changes):
    recipe = Recipe(epochs=3, batch=64, learning_rate=0.05, momentum=momentum, augment=cropped, convolutional=True)
    return dataclasses.replace(
        EXPERIMENTS["vgg16-cifar10"],
        name="tiny",
        network=Tiny,
        trainings=None,
        recipe=dataclasses.replace(recipe, **changes),
    )


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_training_goes_on_to_the_same_weights(images, tmp_path, monkeypatch, momentum, killed):
    experiment = tiny(momentum)
    whole = trained(experiment, 3, images, tmp_path / "whole")
    kept, epochs = Trainer.keep, list[int]()

    def dies(self):
        kept(self)
        epochs.append(len(self.log))
        if len(epochs) == killed:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(experiment, 3, images, tmp_path / "killed")
    monkeypatch.setattr(Trainer, "keep", kept)
    torch.manual_seed(99)  # what happens between does not matter
    again = trained(experiment, 3, images, tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not again.training and all(p.is_contiguous() for p in again.parameters())
    names = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert names == ["tiny-seed3.csv", "tiny-seed3.safetensors"]  # no checkpoint stays
    logs = [list(csv.DictReader((tmp_path / name / "tiny-seed3.csv").open())) for name in ("whole", "killed")]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert [int(line["epoch"]) for line in logs[0]] == [1, 2, 3]


def test_a_checkpoint_of_other_settings_is_refused(images, tmp_path, monkeypatch):
    kept = Trainer.keep
    monkeypatch.setattr(Trainer, "keep", lambda self: kept(self) or (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trained(tiny(), 0, images, tmp_path)
    with pytest.raises(SlrpropError, match=r"tiny-seed0.part' is of a training with other settings; remove it"):
        trained(tiny(epochs=2), 0, images, tmp_path)
    checkpoint = tmp_path / "tiny-seed0.part"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(SlrpropError, match=r"can't be read .*; remove it to begin anew"):
        trained(tiny(), 0, images, tmp_path)
    assert not weights_of(tiny(), 0, tmp_path).exists()


def test_it_learns(images, tmp_path):
    model = trained(tiny(0.0, epochs=8, learning_rate=1e-2, augment=None), 0, images, tmp_path)
    log = list(csv.DictReader((tmp_path / "tiny-seed0.csv").open()))
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.3
    with torch.no_grad():
        assert (model(images.x_test).argmax(1) == images.y_test).float().mean() > 0.3


def test_seeds_may_share_a_training_and_its_features(images, tmp_path, monkeypatch):
    """The convolutions run once over the data, and again only for other weights."""
    experiment = dataclasses.replace(tiny(0.0), trainings=1, calibration=40)
    train_missing(experiment, range(3), images, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-seed0.csv", "tiny-seed0.safetensors"]
    passes, real = [], bench.in_parts
    monkeypatch.setattr(bench, "in_parts", lambda *given: passes.append(1) or real(*given))
    one, two = (Bench(experiment, seed, images, tmp_path) for seed in (1, 2))
    assert len(passes) == 2 + 2  # training and test samples once, and the head of each
    with torch.no_grad():
        torch.testing.assert_close(one.logits, one.model(images.x_test), rtol=1e-4, atol=1e-5)
    assert torch.equal(one.logits, two.logits)
    (drawn, _), (other, _) = ((batch.inputs[0], batch.targets) for made in (one, two) for batch in made.calibration)
    assert len(drawn) == 40 and not torch.equal(drawn, other)
    trained(dataclasses.replace(experiment, trainings=2), 1, images, tmp_path)
    weights_of(experiment, 0, tmp_path).write_bytes((tmp_path / "tiny-seed1.safetensors").read_bytes())
    assert not torch.equal(Bench(experiment, 0, images, tmp_path).logits, one.logits) and len(passes) == 4 + 3


def test_crops_are_whole_shifts_and_mirrors():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 12, 10) + 1
    moved = cropped(x)
    assert moved.shape == x.shape
    padded = nn.functional.pad(x, (4,) * 4)
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        found = [
            (top, left, mirrored)
            for top in range(9) for left in range(9) for mirrored in (False, True)
            if torch.equal(before[:, top : top + 12, left : left + 10].flip(-1) if mirrored else before[:, top : top + 12, left : left + 10], after)
        ]  # fmt: skip
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 40 and {mirrored for *_, mirrored in seen} == {False, True}


def test_vgg16_is_the_articles_network():
    model = VGG16(100)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 13 and [tuple(model.get_submodule(name).weight.shape) for name in model.dense] == [
        (4096, 512), (4096, 4096), (100, 4096),
    ]  # fmt: skip
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.head()(model.front(x)), model(x))
        model.train()
        hidden = torch.ones(4, 4096)
        assert (model.between(hidden) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def archive_of(folder, classes):
    """A CIFAR archive in the published binary form, with random images."""
    random = np.random.default_rng(0)
    arrays, files = {}, {}
    for split, count in (("train", 50_000), ("test", 10_000)):
        y = np.repeat(np.arange(classes, dtype=np.uint8), count // classes)
        x = np.broadcast_to(random.integers(0, 256, (100, 3072), np.uint8), (count // 100, 100, 3072)).reshape(
            count, 3072
        )
        rows = (
            np.concatenate([y[:, None], x], 1) if classes == 10 else np.concatenate([y[:, None] // 5, y[:, None], x], 1)
        )
        arrays[split] = x.reshape(-1, 3, 32, 32), y
        files[split] = rows.tobytes()
    name, _, train, test, _ = datasets.CIFAR_FILES[classes]
    with tarfile.open(folder / name, "w:gz", compresslevel=0) as archive:
        size = len(files["train"]) // len(train)
        parts = {file: files["train"][i * size : (i + 1) * size] for i, file in enumerate(train)} | {
            test[0]: files["test"]
        }
        for file, content in parts.items():
            info = tarfile.TarInfo(f"cifar-binary/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / name, arrays


@pytest.mark.parametrize("classes", [10, 100])
def test_the_published_archives_are_read(tmp_path, monkeypatch, classes):
    path, arrays = archive_of(tmp_path, classes)
    monkeypatch.delenv("SLRPROP_DATA", raising=False)
    monkeypatch.setattr(datasets, "_download", lambda url, known: path)
    found = cifar(classes)
    assert found.x_train.shape == (50_000, 3, 32, 32) and found.x_train.dtype == torch.float32
    assert torch.equal(found.y_test, torch.from_numpy(arrays["test"][1].astype(np.int64)))
    mean, std = torch.tensor(datasets.CIFAR_MEAN), torch.tensor(datasets.CIFAR_STD)
    want = (torch.from_numpy(arrays["test"][0][7].copy()).float() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(found.x_test[7], want)


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    import pooch

    def fails(*_, **__):
        raise ConnectionError("no such host")

    monkeypatch.delenv("SLRPROP_DATA", raising=False)
    monkeypatch.setattr(pooch, "retrieve", fails)
    for dataset in datasets.DATASETS.values():
        with pytest.raises(
            SlrpropError, match=r"can't be downloaded \(ConnectionError\); .*SLRPROP_DATA: no such host"
        ):
            dataset()


def test_another_file_than_the_room_archive_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "room.zip"
    monkeypatch.delenv("SLRPROP_DATA", raising=False)
    monkeypatch.setattr(datasets, "_download", lambda url, known: path)
    path.write_text("<html>log in first</html>")
    with pytest.raises(
        SlrpropError, match=r"room\.zip is not the room-occupancy archive: .*; delete it, and try again"
    ):
        datasets.room()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.csv", "")
    with pytest.raises(SlrpropError, match=r"no item named 'Occupancy_Estimation\.csv'"):
        datasets.room()


def test_a_local_file_with_other_images_is_refused(tmp_path):
    blank, labels = np.zeros((10, 3, 32, 32), np.uint8), np.zeros(10, np.int64)
    np.savez(tmp_path / "cifar10.npz", x_train=blank, y_train=labels, x_test=blank, y_test=labels)
    with pytest.raises(SlrpropError, match=r"cifar10.npz holds train images of shape \(10, 3, 32, 32\)"):
        cifar(10, tmp_path)


def test_devices():
    assert device_of("cpu") == "cpu" and device_of("auto") in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(SlrpropError, match="torch sees none here; use --device cpu"):
            device_of("cuda")


def test_the_command_trains_and_tells_the_digest(images, tmp_path, monkeypatch):
    experiment = tiny()
    monkeypatch.setitem(TRAINED, "tiny", experiment)
    monkeypatch.setattr(type(experiment), "load_data", lambda self, folder: images)
    called = ["paper", "train", "tiny", "--run-dir", str(tmp_path), "--device", "cpu", "--json"]
    first, second = (json.loads(CliRunner().invoke(cli.app, called).stdout) for _ in range(2))
    assert first == second and first[0]["sha256"] == training.digest(tmp_path / "tiny-seed0.safetensors")
    wrong = CliRunner().invoke(cli.app, [*called[:-2], "tpu"])
    assert "device must be one of auto, cpu, cuda, got 'tpu'" in str(wrong.exception)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 8])
def test_small_images_are_convolved_as_products(side):
    torch.manual_seed(0)
    own = Convolution(6, 5)
    usual = nn.Conv2d(6, 5, 3, padding=1, bias=False)
    usual.load_state_dict(own.state_dict())
    found = []
    for layer in (own, usual):
        x = torch.randn(3, 6, side, side + 1, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append((y, x.grad, layer.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    x = torch.randn(2, 6, side, side)
    assert torch.equal(own.eval()(x), usual(x))


@needs_cifar
def test_the_real_images():
    found = cifar(10)
    assert found.x_train.mean().abs() < 0.01 and found.x_train.std() == pytest.approx(1, abs=0.01)


def test_a_cut_out_square_is_zero_and_the_rest_is_the_crop():
    x = nn.functional.pad(torch.rand(64, 3, 14, 12) + 1, (4,) * 4, value=1.0)  # no crop has zeros inside 4 pixels
    torch.manual_seed(0)
    holed = cut_out(x)
    torch.manual_seed(0)
    for size in x.shape[2:]:
        torch.randint(0, size, (64, 1))  # the squares' centres
    assert torch.equal(holed[holed != 0], cropped(x)[holed != 0])
    black = (holed == 0)[:, :, 4:-4, 4:-4]
    assert torch.equal(black.any(1), black.all(1))  # one place for all colours
    areas = {image.sum().item() for image in black.all(1)}
    assert max(areas) == 64 and len(areas) > 5


def test_the_committed_network_is_the_experiment_s():
    """Its log ends where the recipe does, and its numbers fit the network that the command trains."""
    path = Path(__file__).parents[1] / "benchmarks" / "data" / "resnet20-cifar10.safetensors"
    experiment = TRAINED["resnet20-cifar10"]
    model = experiment.network()
    model.load_state_dict(load_file(path))
    assert digest(path) == "a9ccafeca8c4b41d9b9f8078be991e0a1aadac8467b8a38232f8031861e41753"
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == 1 + experiment.recipe.epochs
    assert sum(p.numel() for p in model.parameters()) == 272_474
    x = torch.randn(4, 3, 32, 32)
    assert model.eval()(x).shape == (4, 10)
