"""What a promise covers: samples that nothing was chosen by, every look at them, and budgets that can or can't be met at all."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import slrprop
from slrprop import BudgetError, SlrpropError, TuneSettings, cli, compress
from slrprop.data import Data
from slrprop.metrics import interval_of
from slrprop.network import open_network
from slrprop.search import shares
from slrprop.search.check import LOOKS, RISK, errors, samples_for
from slrprop.search.shares import Shares

FEW = [("low_rank", {"bits": 4}), ("dense", {"bits": 4})]


@pytest.fixture(scope="module")
def fresh(digits):
    x, y = digits
    return x[1200:], y[1200:]


@pytest.fixture
def idle(monkeypatch):
    """No layer may be explored: what is refused must be so before any work."""

    def work(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(Shares, "explore", work)


def differences(lost, won, count, random):
    u = torch.rand(count, generator=random)
    return 100 * ((u < lost).double() - (u > 1 - won).double())


def test_intervals_of_several_looks_cover_together():
    """Plans that lose less and less are looked at until one seems to hold; the interval of that one is kept."""
    assert errors(only=True) == pytest.approx(1.96, abs=1e-3) and errors(1) < errors(2) < errors(LOOKS)
    assert sum(RISK * 0.8 * 0.2**look for look in range(LOOKS)) < RISK
    random, inside, usual = torch.Generator().manual_seed(0), 0, 0
    for _ in range(1500):
        for look, lost in enumerate((0.012, 0.010, 0.009, 0.008), 1):
            found = differences(lost, 0.003, 600, random)
            if found.mean() <= 0.3 or look == LOOKS:
                break
        truth = 100 * (lost - 0.003)
        low, high = interval_of(found, 100.0, errors(look))
        inside += low <= truth <= high
        low, high = interval_of(found, 100.0)
        usual += low <= truth <= high
    assert inside / 1500 >= 0.95 > usual / 1500


@pytest.mark.parametrize("binary", [True, False])
def test_enough_samples_are_enough(binary):
    found = differences(0.02, 0.015, 300, torch.Generator().manual_seed(1))

    def upper(count):
        return interval_of(found, 100.0 * binary, errors(), count)[1]

    limit = float(found.mean()) + 1
    count = samples_for(limit, upper)
    assert upper(int(1.06 * count)) <= limit < upper(int(0.9 * count))
    assert samples_for(float(found.mean()), upper) is None


def test_what_is_tuned_on_does_not_choose_or_check(trained, fresh, monkeypatch):
    """Every sample carries its number in a pixel that the network does not see."""
    x, y = fresh
    blind = nn.Sequential(OrderedDict(cut=nn.Identity(), **{f"n{i}": part for i, part in enumerate(trained)})).eval()
    blind.cut.forward = lambda x: x[:, :64]
    numbered = torch.cat([x, torch.arange(float(len(x)))[:, None]], 1)
    seen, of_layers = {}, []

    def kept(run):
        def noted(data):
            return {int(n) for batch in data for n in batch.inputs[0][:, 64]}

        seen["fits"], seen["chooses"] = noted(run.problem.data), noted(run.trials.judge.part)

    real, explore = shares.distilled, Shares.explore
    monkeypatch.setattr(shares, "distilled", lambda *given: of_layers.append(given[1]) or real(*given))
    monkeypatch.setattr(Shares, "explore", lambda self, layers: kept(self) or explore(self, layers))
    found = compress(blind, (numbered, y), max_bytes="20%", level="tuned", methods=FEW, tuning=TuneSettings(epochs=1))
    assert all(data is of_layers[0] for data in of_layers) and of_layers
    assert {int(n) for batch in of_layers[0] for n in batch.inputs[0][:, 64]} == seen["fits"]
    search, check = Data((numbered, y)).split(0)
    checks = {int(n) for batch in check for n in batch.inputs[0][:, 64]}
    assert not seen["fits"] & seen["chooses"] and not checks & (seen["fits"] | seen["chooses"])
    assert len(seen["fits"]) == len(x) // 2 * 2 // 3 and len(seen["chooses"]) == len(x) // 2 - len(seen["fits"])
    assert found.samples == (len(seen["chooses"]), len(checks)) and sum(1 for _ in search) == 1


def test_samples_for_the_check_apart(trained, digits, fresh, tmp_path):
    """The others may be those that the network was trained on, and nothing is said of that; where they are checked on, it is."""
    x, y = digits
    seen, other = (x[:400], y[:400]), (fresh[0][:301], fresh[1][:301])
    found = compress(trained, seen, check=other, max_drop=2, methods=FEW)
    assert found.samples == (134, 301) and not found.learnt
    assert found.quality[0] == pytest.approx(slrprop.measure(trained, other).accuracy)
    assert found.quality[1] == pytest.approx(slrprop.measure(found.model, other).accuracy)
    assert "for samples like the 301 that the search did not see" in str(found) and "other data may lose more" in str(found)  # fmt: skip
    without = compress(trained, seen, max_drop=2, methods=FEW)
    assert without.quality[0] == 100 and "it was probably trained on them" in str(without)
    with pytest.raises(SlrpropError, match="check names the very samples that the search sees"):
        compress(trained, seen, check=seen, max_drop=2)
    model, data, check = (tmp_path / name for name in ("m.onnx", "data.npz", "check.npz"))
    slrprop.export_onnx(trained, model, x[:4])
    for path, (inputs, targets) in ((data, seen), (check, other)):
        np.savez(path, x=inputs.numpy(), targets=targets.numpy())
    run = ["compress", str(model), "--calibration", str(data), "--max-drop", "2", "--method", "svd", "-o", str(tmp_path / "s.onnx")]  # fmt: skip
    told = CliRunner().invoke(cli.app, [*run, "--check", str(check), "--json"])
    assert json.loads(told.stdout)["samples"] == [400, 301]  # what is made of weights alone fits nothing
    words = CliRunner().invoke(cli.app, ["compress", "--help"], terminal_width=200).stdout.replace("│", " ").split()
    assert "must be unseen by training" in " ".join(words)


def test_few_batches_are_cut_by_samples(trained, fresh):
    found = compress(trained, DataLoader(TensorDataset(*fresh), 1000), max_drop=5, methods=FEW)
    assert found.samples == (100, 299)


@pytest.mark.parametrize("confident", [False, True])
def test_a_drop_alone_is_met_by_a_copy_at_worst(confident, fresh):
    """An untrained network's answers are all near to one another, and no form of it keeps all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 200)).eval()
    found = compress(model, fresh[0][:80], max_drop=0, methods={"svd": {}}, confident=confident)
    assert found.met and not found.plan.layers and found.bytes[0] == found.bytes[1]
    assert found.drop == 0 and found.interval == (0, 0)
    assert "every layer stays as it is" in str(found)


def test_how_many_samples_it_would_take_is_said(trained, fresh):
    with pytest.raises(
        BudgetError, match=r"bytes \(about [\d,]+ samples to check on might do, here are 45\); the nearest"
    ):
        compress(trained, (fresh[0][:90], fresh[1][:90]), max_drop=1, max_bytes="20%", methods=FEW, confident=True)
    strict = compress(trained, (fresh[0][:90], fresh[1][:90]), max_drop=1.0, methods=FEW, confident=True)
    assert not strict.plan.layers and strict.needed > 45
    assert f"a copy (about {strict.needed:,} samples to check on might do, here are 45)" in str(strict)
    loose = compress(trained, (fresh[0][:90], fresh[1][:90]), max_drop=3.0, methods=FEW)
    assert loose.interval[
        1
    ] > 3 and f"beyond 3 (about {loose.needed:,} samples to check on might do, here are 45)" in str(loose)


class Mixed(nn.Module):
    """Most of its numbers are in an embedding, an LSTM and a convolution; an LSTM is no layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.conv = nn.Embedding(300, 16), nn.LSTM(16, 24, batch_first=True), nn.Conv1d(24, 40, 3)  # fmt: skip
        self.norm, self.head, self.out = nn.LayerNorm(40), nn.Linear(40, 40), nn.Linear(40, 4)

    def forward(self, x):
        h = self.conv(self.lstm(self.embed(x))[0].transpose(1, 2)).mean(2)
        return self.out(self.norm(h + self.head(h)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """It as a module and as a file, and inputs."""
    torch.manual_seed(0)
    model, x, path = Mixed().eval(), torch.randint(300, (40, 8)), tmp_path_factory.mktemp("mixed") / "m.onnx"
    slrprop.export_onnx(model, path, x[:4])
    return {"torch": model, "onnx": path}, x


@pytest.mark.parametrize("door", ["torch", "onnx"])
@pytest.mark.parametrize("level", ["weights", "calibrated", "tuned"])
def test_bytes_out_of_reach_are_refused_at_once(door, level, idle, mixed):
    model, x = mixed[0][door], mixed[1]
    with pytest.raises(BudgetError, match=r"no plan can be within at most 10,000 bytes.* LSTM [23]\d %") as error:
        compress(model, x, max_bytes=10_000, level=level)
    assert error.value.best is None
    network = open_network(model, Data(x))
    untouched = int(str(error.value).split(" bytes: of the original's ")[1].split(" bytes ")[1].split()[0].replace(",", ""))  # fmt: skip
    layers = (
        1600 + 40 + 160 + 4 + 4800 + 2880 + 40
    )  # with their biases: the head, the output, the embedding, the convolution
    assert untouched > 4 * (network.numbers - layers) >= 4 * (4032 + 80) > 10_000  # the LSTM and the norm
    assert str(slrprop.inspect(model)).splitlines()[-1].startswith("other numbers, by what uses them: ")


def test_a_level_that_can_not_run_is_refused_at_once(idle, mixed):
    files, x = mixed
    names = open_network(files["onnx"], Data(x)).order
    told = rf"tuning needs the gradients of all nodes, .* some without \(LSTM\); name the layers that only dense ones follow \({names[-1]}\)"
    with pytest.raises(SlrpropError, match=told):
        compress(files["onnx"], x, max_drop=5, level="tuned")
    with pytest.raises(SlrpropError, match="tuning needs 10 samples or more"):
        compress(files["torch"], x[:9], max_drop=5, level="tuned")


def test_the_nearest_is_never_larger_than_the_original_and_worse():
    """Every form of so small a network takes more in the file than its dense weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(60, 10)
    found = compress(model, x, max_drop=50)
    assert found.met and found.bytes[1] <= found.bytes[0]
    with pytest.raises(BudgetError, match=r"the nearest .*; of the original's 1,320 bytes 536 are in nothing") as error:
        compress(model, x, max_bytes=found.bytes[0] // 2)
    best = error.value.best
    assert best.bytes[1] < best.bytes[0] or (best.bytes[1] == best.bytes[0] and best.drop == 0)
