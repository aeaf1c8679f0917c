"""A module on CUDA gives what it gives on the CPU; skipped where torch sees no CUDA."""

import copy

import pytest
import torch
from torch import nn

import slrprop
from slrprop.data import Data
from slrprop.linalg import SVD, truncated_svd
from slrprop.methods import METHODS
from slrprop.network import TorchNetwork
from slrprop.relevance.cost import cost_scores
from slrprop.tune import TuneSettings
from tests.test_training import images, tiny  # noqa: F401

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA")
LAYERS = ["0", "2"]


def there(model):
    return copy.deepcopy(model).to("cuda")


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, trained, calibration, digits, tmp_path):
    model, x = there(trained), digits[0]
    plans = [slrprop.plan(each, calibration, method=method, layers=LAYERS, rank=6) for each in (trained, model)]
    small, twin = (slrprop.apply(each, plan) for each, plan in zip((trained, model), plans, strict=True))
    assert all(value.is_cuda for value in twin.state_dict().values())
    assert [layer.bytes for layer in plans[0].layers] == [layer.bytes for layer in plans[1].layers]
    outputs = [small(x), twin(x.cuda()).cpu(), trained(x)]
    assert (outputs[0] - outputs[1]).norm() < 0.05 * (outputs[0] - outputs[2]).norm() + 1e-3 * outputs[2].norm()
    assert slrprop.export_onnx(twin, tmp_path / "small.onnx", x[:5]) < 1e-3
    assert abs(slrprop.measure(small, digits).accuracy - slrprop.measure(twin, digits).accuracy) < 1
    slrprop.save(twin, tmp_path / "small.safetensors")
    torch.testing.assert_close(
        slrprop.load(trained, tmp_path / "small.safetensors")(x), outputs[1], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("layer", ["0", "2", "4"])
@pytest.mark.parametrize("depth", [1, 2])
def test_costs(layer, depth, calibration):
    """Behind one and two wide ReLU layers, and at the outputs."""
    torch.manual_seed(depth)
    between = (nn.Linear(320, 300), nn.ReLU()) if depth == 2 else ()
    model = nn.Sequential(nn.Linear(64, 320), nn.ReLU(), *between, nn.Linear(300 if depth == 2 else 320, 10))
    if layer not in dict(model.named_modules()):
        pytest.skip("no such layer")
    networks = [TorchNetwork(each, Data(calibration)) for each in (model, there(model))]
    svd = truncated_svd(networks[0].weight(layer), 6)
    here = cost_scores(networks[0], Data(calibration), layer, svd, 3)
    other = cost_scores(networks[1], Data(calibration), layer, SVD(*(part.cuda() for part in svd)), 3)
    for one, two in zip(here[:2], other[:2], strict=True):
        torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-4 * float(one.max()))


@pytest.mark.parametrize("level", ["weights", "calibrated", "tuned"])
def test_compress(level, trained, digits):
    x, y = digits
    found = slrprop.compress(
        there(trained), (x[:600], y[:600]), max_bytes="40%", level=level, tuning=TuneSettings(epochs=10)
    )
    assert all(value.is_cuda for value in found.model.state_dict().values())
    assert slrprop.measure(found.model, (x[1200:], y[1200:])).accuracy > 90


def test_training(images, tmp_path, monkeypatch):  # noqa: F811
    """A killed training goes on, and its weights are the CPU's to read."""
    from slrprop.research.experiments import trained
    from slrprop.research.training import Trainer

    kept = Trainer.keep

    def dies(self):
        kept(self)
        if len(self.log) == 1:
            monkeypatch.setattr(Trainer, "keep", kept)
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny(), 0, images, tmp_path, "cuda")
    model = trained(tiny(), 0, images, tmp_path, "cuda")
    assert not any(value.is_cuda for value in model.state_dict().values())
    lines = (tmp_path / "tiny-seed0.csv").read_text().splitlines()
    assert len(lines) == 4 and all(line.endswith("cuda") for line in lines[1:])
