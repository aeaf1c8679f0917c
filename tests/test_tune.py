"""Fine-tuning of factors on the original's outputs: nearer, never worse, repeatable, and nothing else touched."""

import copy
import sys

import onnx
import pytest
import torch
from torch import nn

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.network import open_network
from slrprop.tune import Tunable, TuneSettings, distance, distilled

FAST = TuneSettings(epochs=3, learning_rate=2e-3, batch=128)


def tuned(model, data, plan, settings=FAST):
    opened = Data(data)
    return distilled(open_network(model, opened), opened, plan, settings, quiet=True)


def divergence(model, original, x):
    """Mean divergence of a network's outputs from the original's."""
    with torch.no_grad():
        return float(distance(model(x), original(x), 1.0))


@pytest.fixture(scope="module")
def plans(trained, calibration):
    """Plans of low rank, by bits."""
    return {
        bits: slrprop.plan(trained, calibration, method="low_rank", layers=["0", "2"], rank=5, bits=bits)
        for bits in (32, 8, 4)
    }


class TestDivergence:
    @pytest.mark.parametrize("bits", [32, 8, 4])
    def test_falls_on_data_it_did_not_see(self, bits, plans, trained, digits):
        x, _ = digits
        found = tuned(trained, x[:1000], plans[bits], TuneSettings(batch=128))
        before, after = (divergence(slrprop.apply(trained, plan), trained, x[1200:]) for plan in (plans[bits], found))
        assert after < 0.8 * before
        notes = found.layers[0].notes
        assert notes["divergence_after"] < notes["divergence_before"] and 1 <= notes["tuned_epochs"] <= 125
        assert [layer.bytes for layer in found.layers] == [layer.bytes for layer in plans[bits].layers]

    @pytest.mark.parametrize("bits", [32, 8, 4])
    @pytest.mark.parametrize("rate", [1e-3, 0.05])
    def test_told_is_that_of_the_plan(self, bits, rate, plans, trained, calibration):
        """What is measured while it learns is what is stored in the end: scales and biases are rounded on the way."""
        x = calibration[0]
        settings = TuneSettings(epochs=2, learning_rate=rate, batch=32, mixup=False)
        found = tuned(trained, x, plans[bits], settings)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        aside = x[order[: len(x) // 10]]
        for plan, key in ((plans[bits], "divergence_before"), (found, "divergence_after")):
            told = found.layers[0].notes[key]
            assert divergence(slrprop.apply(trained, plan), trained, aside) == pytest.approx(told, rel=1e-4)

    @pytest.mark.parametrize("bits", [32, 8, 4])
    def test_never_rises(self, bits, plans, trained, calibration):
        """Steps far too large: the start is kept, to the bit."""
        settings = TuneSettings(epochs=2, learning_rate=30.0)
        found = tuned(trained, calibration[0], plans[bits], settings)
        assert found.layers[0].notes["tuned_epochs"] == 0
        x = calibration[0]
        got, want = (slrprop.apply(trained, plan)(x) for plan in (found, plans[bits]))
        assert torch.equal(got, want)

    def test_falls_after_steps_too_large(self, plans, trained, digits):
        """The first epochs lead away; it goes on to the small steps at the schedule's end."""
        settings = TuneSettings(epochs=60, learning_rate=0.05, batch=64)
        x = digits[0]
        found = tuned(trained, x[:1000], plans[4], settings)
        before, after = (divergence(slrprop.apply(trained, plan), trained, x[1200:]) for plan in (plans[4], found))
        assert found.layers[0].notes["tuned_epochs"] > 20 and after < 0.9 * before


def test_labels_do_not_matter(plans, trained, calibration):
    x, y = calibration
    one, other, none = (tuned(trained, data, plans[8]) for data in ((x, y), (x, y.flip(0)), (x, None)))
    assert one == other == none


def test_same_seed_same_plan(plans, trained, calibration):
    state = torch.random.get_rng_state()
    first, second = (tuned(trained, calibration, plans[4]) for _ in range(2))
    assert first.to_json() == second.to_json() and torch.equal(torch.random.get_rng_state(), state)
    other = tuned(trained, calibration, plans[4], TuneSettings(epochs=3, seed=1))
    assert other.to_json() != first.to_json()


def test_the_original_and_its_plan_stay(plans, trained, calibration):
    model = copy.deepcopy(trained)
    before, text = {key: value.clone() for key, value in model.state_dict().items()}, plans[8].to_json()
    arrays = {key: value.clone() for key, value in plans[8].layers[0].fit.arrays().items()}
    tuned(model, calibration, plans[8])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert plans[8].to_json() == text
    assert all(torch.equal(arrays[key], value) for key, value in plans[8].layers[0].fit.arrays().items())


@pytest.mark.parametrize("bits", [32, 4])
def test_plans_from_files(bits, plans, trained, calibration, tmp_path):
    plans[bits].save(tmp_path / "plan.json")
    loaded = slrprop.Plan.load(tmp_path / "plan.json")
    mine = tuned(trained, calibration, loaded)
    assert mine.to_json() == tuned(trained, calibration, plans[bits]).to_json()
    mine.save(tmp_path / "tuned.json")
    again = slrprop.apply(trained, slrprop.Plan.load(tmp_path / "tuned.json"))
    assert torch.equal(again(calibration[0]), slrprop.apply(trained, mine)(calibration[0]))


def test_tuned_plans_can_be_tuned_again(plans, trained, calibration):
    first = tuned(trained, calibration, plans[8])
    second = tuned(trained, calibration, first)
    before, after = (plan.layers[0].notes["divergence_after"] for plan in (first, second))
    assert second.layers[0].notes["divergence_before"] == pytest.approx(before, rel=1e-4) and after <= before


class Normed(nn.Module):
    """Not a chain; batch norm and dropout do something else in training mode."""

    def __init__(self, softmax=False):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.inner, self.last, self.softmax = nn.Linear(32, 32), nn.Linear(32, 10), softmax

    def forward(self, x):
        h = self.drop(self.norm(self.first(x)).relu())
        scores = self.last(h + self.inner(h).tanh())
        return scores.softmax(-1) if self.softmax else scores


def normed(softmax=False):
    torch.manual_seed(0)
    model = Normed(softmax)
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.last.weight.data *= 4
    return model.eval()


class TestWholeModules:
    @pytest.mark.parametrize("bits", [32, 4])
    def test_fall_too(self, bits, calibration, digits):
        model = normed()
        made = slrprop.plan(model, calibration, method="low_rank", layers=["first", "inner"], rank=4, bits=bits)
        settings = TuneSettings(epochs=20, learning_rate=5e-3)
        found = tuned(model, digits[0][:1000], made, settings)
        before, after = (divergence(slrprop.apply(model, plan), model, digits[0][1200:]) for plan in (made, found))
        assert after < before

    def test_whole_numbers_are_never_mixed(self, digits):
        """Token ids have nothing between them; pixels as floats have."""

        class Casting(Normed):
            def forward(self, x):
                return super().forward(x.float() / 16)

        torch.manual_seed(0)
        x, model = (digits[0][:1000] * 16).round(), Casting().eval()
        made = slrprop.plan(model, x, method="low_rank", layers=["first", "inner"], rank=2)
        whole, plain, mixed = (
            tuned(model, data, made, TuneSettings(epochs=20, learning_rate=1e-3, mixup=mixup)).to_json()
            for data, mixup in ((x.long(), True), (x.long(), False), (x, True))
        )
        assert whole == plain != mixed

    def test_ask_the_original_once_for_each_mixture(self, digits, monkeypatch):
        """Epochs after those cost it nothing, unless its answers would take too much memory."""

        class Counting(Normed):
            seen = 0

            def forward(self, x):
                self.seen += len(x)
                return super().forward(x)

        torch.manual_seed(0)
        x, model = digits[0][:1000], Counting().eval()
        made = slrprop.plan(model, x, method="low_rank", layers=["first", "inner"], rank=2)

        def asked(epochs, mixup):
            model.seen = 0
            found = tuned(model, x, made, TuneSettings(epochs=epochs, mixup=mixup)).layers[0].notes
            return model.seen, found["divergence_after"]

        (once, _), (again, divergence) = asked(1, False), asked(8, False)
        assert once == again < 4000
        # 900 samples in 37 mixtures are more than 2**15
        assert asked(60, True)[0] == asked(37, True)[0] > asked(36, True)[0]
        monkeypatch.setattr(sys.modules["slrprop.tune"], "KEPT", 1000)
        assert asked(8, False) == (again + 7 * 900, divergence)

    def test_in_training_mode_are_tuned_as_they_are_used(self, calibration):
        """Batch statistics are neither used nor moved, nothing is dropped, and the mode stays."""
        model, training = normed(), normed().train()
        made = slrprop.plan(model, calibration, method="low_rank", layers=["first", "inner"], rank=4)
        before = {key: value.clone() for key, value in training.state_dict().items()}
        found = tuned(training, calibration, made)
        assert all(torch.equal(before[key], value) for key, value in training.state_dict().items())
        assert all(module.training for module in training.modules())
        assert found.to_json() == tuned(model, calibration, made).to_json()

    def test_probabilities_are_compared_as_scores(self, calibration):
        plain, ending = normed(), normed(softmax=True)
        made = slrprop.plan(plain, calibration, method="svd", layers=["first", "inner"], rank=4)
        one, other = (tuned(model, calibration, made).layers[0].notes for model in (plain, ending))
        assert one == pytest.approx(other, rel=1e-2)

    def test_with_several_inputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

            def forward(self, x, y):
                return self.b(x + self.a(x).tanh()) + y

        model, data = Two(), {"x": torch.randn(400, 8), "y": torch.randn(400, 3)}
        made = slrprop.plan(model, data, method="svd", layers=["a"], rank=1)
        notes = tuned(model, data, made).layers[0].notes
        assert notes["divergence_after"] < notes["divergence_before"] and notes["tuned_epochs"] > 0


class TestErrors:
    def test_nothing_to_tune(self, trained, calibration):
        with pytest.raises(SlrpropError, match="there is nothing to tune: the plan treats no layer"):
            tuned(trained, calibration, slrprop.Plan(()))

    def test_a_plan_without_its_factors(self, trained, calibration, tmp_path):
        slrprop.plan(trained, calibration, method="svd", layers=["0"], rank=3).save(tmp_path / "plan.json")
        with pytest.raises(SlrpropError, match="or was read without its factors"):
            tuned(trained, calibration, slrprop.Plan.load(tmp_path / "plan.json"))

    def test_too_few_samples(self, plans, trained, calibration):
        with pytest.raises(
            SlrpropError,
            match=r"tuning needs 10 samples or more \(compress tunes on a third of the data\), got 9; give more data",
        ):
            tuned(trained, calibration[0][:9], plans[32])
        assert tuned(trained, calibration[0][:10], plans[32]).layers

    def test_files_without_a_chain(self, calibration, tmp_path):
        """Are tuned by torch operations for their nodes, and refused where there is none for one."""
        slrprop.export_onnx(normed(), tmp_path / "model.onnx", calibration[0][:4])
        network = open_network(tmp_path / "model.onnx", Data(calibration))
        made = slrprop.plan(tmp_path / "model.onnx", calibration, method="svd", layers=list(network.order[:2]), rank=4)
        done = tuned(tmp_path / "model.onnx", calibration, made)
        assert done.layers[0].notes["divergence_after"] < 0.9 * done.layers[0].notes["divergence_before"]
        assert max(slrprop.apply(tmp_path / "model.onnx", done, tmp_path / "tuned.onnx").outputs.values()) < 1e-4
        model = onnx.load(tmp_path / "model.onnx")
        last = model.graph.node[-1]
        kept, last.output[0] = last.output[0], "before"
        model.graph.node.append(onnx.helper.make_node("Shrink", ["before"], [kept], lambd=0.0))
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(
            SlrpropError, match=r"some without \(Shrink\); tune the torch module, or use the calibrated level"
        ):
            tuned(tmp_path / "model.onnx", calibration, made)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"epochs": 0}, "epochs must be a whole number from 1, got 0"),
            ({"batch": 2.5}, "batch must be a whole number from 1, got 2.5"),
            ({"seed": True}, r"seed must be a whole number from 0 to 2\^63 - 1, got True"),
            ({"mixup": 1}, "mixup must be True or False, got 1"),
            ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
            ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
            ({"temperature": "2"}, "temperature must be a number above 0, got '2'"),
            ({"seed": "a"}, r"seed must be a whole number from 0 to 2\^63 - 1, got 'a'"),
            ({"seed": -1}, r"seed must be a whole number from 0 to 2\^63 - 1, got -1"),
            ({"seed": 10**5000}, r"seed must be a whole number from 0 to 2\^63 - 1, got a longer one"),
        ],
    )
    def test_settings(self, given, message):
        with pytest.raises(SlrpropError, match=message):
            TuneSettings(**given)


def test_files_are_tuned_like_modules(plans, trained, calibration, tmp_path):
    """Where a chain leads to the output, an ONNX file is tuned on it."""
    slrprop.export_onnx(trained, tmp_path / "model.onnx", calibration[0][:4])
    path = tmp_path / "model.onnx"
    first, second = open_network(path, Data(calibration)).order[:2]
    made = slrprop.plan(path, calibration, method="low_rank", layers=[first, second], rank=5)
    found = tuned(path, calibration, made)
    mine = tuned(trained, calibration, plans[32]).layers[0].notes
    assert found.layers[0].notes["divergence_after"] == pytest.approx(mine["divergence_after"], rel=1e-2)
    slrprop.apply(path, found, tmp_path / "small.onnx", calibration)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_layer_that_learns_starts_as_it_was(bits, plans, trained):
    """Its first output is the plan's, and before any step it ends as it began."""
    for layer in plans[bits].layers:
        module = Tunable(layer, trained.get_submodule(layer.name).bias.detach())
        assert torch.equal(module.now().dense(), layer.factors.dense())
        done = module.finished()
        assert done.fitted == layer.fitted or torch.equal(done.factors.dense(), layer.factors.dense())
        if bits < 32 and layer.method != "dense":
            assert done.fit.bias.scale is not None and torch.equal(done.bias, layer.bias)
            assert done.fit.bytes(4) == layer.fit.bytes(4)


def test_distance_is_the_divergence():
    p, q = torch.randn(7, 5), torch.randn(7, 5)
    want = nn.functional.kl_div(p.log_softmax(-1), q.log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(distance(p, q, 1.0), want)
    torch.testing.assert_close(distance(p, q, 3.0), 9 * distance(p / 3, q / 3, 1.0))
    torch.testing.assert_close(distance(p[:, :1], q[:, :1], 3.0), (p - q)[:, 0].square().mean())
    assert distance(p, p + 4, 1.0).abs() < 1e-6
