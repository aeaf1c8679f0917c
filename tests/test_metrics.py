"""Metrics are scikit-learn's, their intervals those of resampling, and what is judged is said."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import nn
from typer.testing import CliRunner

import slrprop
from slrprop import BudgetError, SlrpropError, cli, compress
from slrprop.data import Data
from slrprop.metrics import METRICS, Score, interval_between, score
from slrprop.report import write_report
from slrprop.search.judge import Judge

QUICK = {"dense": {"bits": 8}}


def samples(count=400, classes=4):
    """Outputs, labels of unequal classes, and another network's outputs."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (count,), generator=random)
    labels[torch.rand(count, generator=random) < 0.4] = 0
    outputs = torch.randn(count, classes, generator=random)
    outputs[torch.arange(count), labels] += 1
    return outputs, labels, outputs + 0.7 * torch.randn(count, classes, generator=random)


def test_values_are_scikit_learns():
    outputs, labels, goal = samples()
    each, guess, chance = torch.arange(len(labels)), outputs.argmax(1), outputs.double().softmax(1)
    wanted = {
        "accuracy": 100 * sklearn.accuracy_score(labels, guess),
        "balanced_accuracy": 100 * sklearn.balanced_accuracy_score(labels, guess),
        "worst_recall": 100 * min(sklearn.recall_score(labels, guess, average=None)),
        "f1": 100 * sklearn.f1_score(labels, guess, average="macro"),
        "miou": 100 * sklearn.jaccard_score(labels, guess, average="macro"),
        "auc": 100 * sklearn.roc_auc_score(labels, chance, multi_class="ovr"),
        "mae": sklearn.mean_absolute_error(goal, outputs),
        "r2": sklearn.r2_score(goal, outputs),
        "squared_error": 4 * sklearn.mean_squared_error(goal, outputs),
        "cosine": 100 * np.diag(sklearn.pairwise.cosine_similarity(outputs, goal)).mean(),
    }
    assert set(METRICS) <= {*wanted, "agreement"}
    for name, value in wanted.items():
        real = name in ("mae", "r2", "squared_error", "cosine")
        assert score(name, chance if name == "auc" else outputs, goal if real else labels, each).value == pytest.approx(
            value, rel=1e-5
        ), name
    ties, two = chance[:, 1].round(decimals=1), (labels == 1).long()
    found = score("auc", torch.stack([1 - ties, ties], 1), two, each).value
    assert found == pytest.approx(100 * sklearn.roc_auc_score(two, ties))


@pytest.mark.parametrize("name", ["balanced_accuracy", "f1", "miou", "auc", "r2", "mae", "cosine"])
def test_intervals_are_as_wide_as_resampling_finds(name):
    outputs, labels, other = samples()
    goal = labels if name in ("balanced_accuracy", "f1", "miou", "auc") else outputs + 0.5 * other.roll(1, 0)
    made = [one.double().softmax(1) if name == "auc" else one for one in (outputs, other)]
    each = torch.arange(len(labels))
    low, high = interval_between(*(score(name, one, goal, each) for one in made))
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, len(labels), (len(labels),), generator=random) for _ in range(100)]
    differences = [
        score(name, made[1][rows], goal[rows], each).value - score(name, made[0][rows], goal[rows], each).value
        for rows in drawn
    ]
    assert (high - low) / (2 * 1.96) == pytest.approx(np.std(differences), rel=0.25)


def test_positions_of_one_sample_are_no_samples_of_their_own():
    """50 images of 100 pixels, in 5 of which all changed: the interval is that of 50 images, not of 5 000 pixels."""
    labels, sample = torch.zeros(5000, dtype=torch.long), torch.arange(5000) // 100
    right = torch.tensor([[1.0, 0.0]]).expand(5000, 2)
    wrong = torch.where((sample < 5)[:, None], 1 - right, right)
    low, high = interval_between(*(score("accuracy", one, labels, sample) for one in (wrong, right)))
    images = [score("accuracy", one[::100], labels[::100], torch.arange(50)) for one in (wrong, right)]
    assert high - low == pytest.approx(np.subtract(*interval_between(*images)[::-1]), rel=0.12) and high - low > 15
    same = score("accuracy", right, labels, sample)
    low, high = interval_between(same, same)
    assert low < 0 < high  # no collapse where nothing changed


@pytest.fixture(scope="module")
def rare():
    """A network of two classes, one of which is rare, and its data."""
    torch.manual_seed(0)
    x = torch.randn(1200, 16)
    s = x[:, :4].sum(1)
    y = (s > s.quantile(0.94)).long()
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:600]), y[:600]).backward()
        optimizer.step()
    return model.eval(), (x[600:], y[600:])


def test_what_imbalance_hides_is_printed(rare, tmp_path):
    model, (x, y) = rare
    found = compress(model, (x, y), max_bytes="50%", methods={"low_rank": {"bits": 4}})
    _, check = Data((x, y)).split(0)
    with torch.no_grad():
        guesses = [net(torch.cat([b.inputs[0] for b in check])).argmax(1) for net in (model, found.model)]
    truth = torch.cat([b.targets for b in check])
    for value, guess in zip(found.beside["balanced_accuracy"], guesses, strict=True):
        assert value == pytest.approx(100 * sklearn.balanced_accuracy_score(truth, guess))
    worst = [100 * min(sklearn.recall_score(truth, guess, average=None)) for guess in guesses]
    assert found.beside["worst_recall"] == pytest.approx(worst)
    write_report(found, tmp_path / "r.md", command="")
    for text in (str(found), (tmp_path / "r.md").read_text(), json.dumps(found.summary())):
        assert "balanced_accuracy" in text and "worst_recall" in text
    measured = slrprop.measure(model, (x, y))
    whole = model(x).argmax(1)
    assert measured.balanced_accuracy == pytest.approx(100 * sklearn.balanced_accuracy_score(y, whole))
    kept = compress(model, (x, y), max_drop=1.0, metric="balanced_accuracy", methods=QUICK)
    assert kept.metric == "balanced_accuracy" and kept.drop <= 1 and "balanced_accuracy" not in kept.beside


def test_labels_or_inputs_that_do_not_fit_are_noted(trained, digits):
    x, y = digits[0][1200:1400], digits[1][1200:1400]

    def notes(data):
        return " ".join(Judge(trained, Data(data), None).notes)

    assert notes((x, y)) == ""
    assert "always naming the most frequent class would be on" in notes((x, y.flip(0)))
    assert "all 200 samples are the same" in notes((torch.ones(200, 64), y))
    assert "all labels are 3" in notes((x, torch.full((200,), 3)))
    torch.manual_seed(0)
    assert "no better than their mean" in notes((x, 100 + torch.randn(200, 10)))
    shown = str(compress(trained, (torch.ones(40, 64), y[:40]), max_bytes="60%", methods=QUICK))
    assert "note: all 20 samples are the same" in shown and "metric: accuracy, since the data has labels" in shown


class Ending(nn.Module):
    def __init__(self, width, called="", function=lambda y: y):
        super().__init__()
        self.body, self.called, self.function = nn.Linear(8, width), called, function

    def forward(self, x):
        y = self.function(self.body(x))
        return {self.called: y} if self.called else y


@pytest.mark.parametrize(
    ("model", "metric"),
    [
        (Ending(256), "cosine"),
        (Ending(1000), "agreement"),
        (Ending(10), "agreement"),
        (Ending(256, "logits"), "agreement"),
        (Ending(256, function=lambda y: y.softmax(-1)), "agreement"),
        (Ending(50, function=lambda y: nn.functional.normalize(y, dim=-1)), "cosine"),
        (Ending(30, "embedding"), "cosine"),
        (Ending(1), "squared_error"),
    ],
)
def test_embeddings_are_told_from_classes(model, metric):
    torch.manual_seed(0)
    judge = Judge(model.eval(), Data(torch.randn(40, 8)), None)
    assert judge.metric == metric and judge.reason
    assert judge.network.real_valued(None, judge.original) == (metric in ("cosine", "squared_error"))
    if metric == "cosine":
        assert "embedding" in judge.reason and judge.score("cosine", judge.original).value == pytest.approx(100)
        asked = Judge(model, Data(torch.randn(40, 8)), "agreement")
        assert not asked.reason and not asked.network.real_valued(None, asked.original)


def test_an_embedding_from_the_command_line(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 256)).eval()
    axes = {"dynamic_axes": {"input": {0: "N"}}, "input_names": ["input"]}
    torch.onnx.export(model, (torch.randn(4, 8),), tmp_path / "m.onnx", dynamo=False, **axes)
    np.save(tmp_path / "x.npy", torch.randn(60, 8).numpy())
    common = ["compress", str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "x.npy"), "-o", str(tmp_path / "s.onnx"), "--method", "dense"]  # fmt: skip
    done = CliRunner().invoke(cli.app, [*common, "--max-drop", "0.5"])
    assert done.exit_code == 0, done.output
    assert "cosine: 100.00 -> " in done.output and "since the data has no labels and 256 outputs" in done.output
    asked = CliRunner().invoke(cli.app, [*common, "--max-drop", "50", "--metric", "agreement", "--json"])
    assert json.loads(asked.stdout)["metric"] == "agreement"


def test_an_error_grows_and_never_drops(digits, tmp_path):
    torch.manual_seed(0)
    x, model = digits[0][:200], nn.Sequential(nn.Linear(64, 60), nn.Tanh(), nn.Linear(60, 1)).eval()
    for metric in ("squared_error", "mae"):
        found = compress(model, (x, model(x).detach() + 0.1), max_drop=0.5, metric=metric, methods=QUICK)
        write_report(found, tmp_path / "r.html", command="")
        write_report(found, tmp_path / "r.md", command="")
        page = (tmp_path / "r.html").read_text().split('<script type="application/json"')[0]
        for text in (str(found), page, (tmp_path / "r.md").read_text()):
            assert "growth" in text and "drop" not in text.replace("max_drop", "").replace("max-drop", "")
    for budget, nearest in (
        ({"max_drop": 0}, "is the original"),
        ({"max_drop": 0.5, "max_latency": "0.1%"}, "has a growth of"),
    ):
        told = rf"a growth of at most {budget['max_drop']}, at most [0-9,]+ bytes.*; the nearest {nearest}"
        with pytest.raises(BudgetError, match=told) as error:
            compress(model, x, max_bytes="40%", methods=QUICK, **budget)
        assert "drop" not in str(error.value)


def test_ones_own_measure_of_every_sample(trained, digits):
    """With the part of the data as its second argument, and one value a sample, it has an interval and a check."""
    parts = []

    def right(model, data):
        parts.append(data)
        with torch.no_grad():
            return torch.cat([model(*batch.inputs).argmax(1) == batch.targets for batch in data])

    fresh = digits[0][1200:1500], digits[1][1200:1500]
    found = compress(trained, fresh, max_drop=0.02, evaluate=right, confident=False, methods=QUICK)
    built_in = compress(trained, fresh, max_drop=2.0, methods=QUICK)
    assert found.metric == "evaluate" and found.plan.to_json() == built_in.plan.to_json()
    assert [100 * value for value in found.quality] == pytest.approx(built_in.quality)
    assert [100 * end for end in found.interval] == pytest.approx(built_in.interval)
    searched, checked = (torch.cat([b.inputs[0] for b in part]) for part in (parts[0], parts[-1]))
    assert len(checked) == 150 and not (searched[:, None] == checked).all(-1).any()
    one_number = compress(trained, fresh, max_drop=0.1, evaluate=lambda model: 0.5, methods=QUICK)
    assert np.isnan(one_number.interval).all()
    for given, message in (
        (lambda model, data: np.ones(3), r"one for each of the samples, got values of shape \(3,\)"),
        (lambda model: "good", "evaluate must give a finite number"),
        (lambda model: np.ones((5, 2)), r"got values of shape \(5, 2\)"),
    ):
        with pytest.raises(SlrpropError, match=message):
            compress(trained, fresh, max_drop=1, evaluate=given, methods=QUICK)
    with pytest.raises(SlrpropError, match="only where it gives one value a sample"):
        compress(trained, fresh, max_drop=1, evaluate=lambda model: 1.0, confident=True, methods=QUICK)
    with pytest.raises(SlrpropError, match="evaluate gave 5 values for the original and 6"):
        interval_between(Score(0, torch.zeros(5)), Score(0, torch.zeros(6)))
