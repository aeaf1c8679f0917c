"""Embeddings through both doors: counts, forms, files, refusals."""

import pytest
import torch
from torch import Tensor, nn

import slrprop
from slrprop import SlrpropError
from slrprop.data import Data
from slrprop.fit.quantize import quantised
from slrprop.fit.statistics import Counts, moments
from slrprop.forms import LowRank, Quantized, Table
from slrprop.methods import Problem
from slrprop.network import open_network
from tests.onnx_models import run

WORDS, LENGTH = 200, 12


class Text(nn.Module):
    """Words and places, averaged through a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 24, padding_idx=0), nn.Embedding(LENGTH, 24)
        self.inner, self.head = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.inner(x).relu().mean(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Text().eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Some words often, many never."""
    torch.manual_seed(1)
    return (torch.rand(60, LENGTH) ** 3 * 150).long()


@pytest.fixture(scope="module")
def path(net, ids, tmp_path_factory):
    target = tmp_path_factory.mktemp("text") / "text.onnx"
    slrprop.export_onnx(net, target, ids[:3])
    return target


@pytest.mark.parametrize(
    ("method", "given"),
    [("svd", {"rank": 6}), ("low_rank", {"rank": 6}), ("low_rank", {"rank": 8, "bits": 4}), ("dense", {"bits": 8}), ("dense", {"bits": 4}), ("rtn", {"bits": 8})],
)  # fmt: skip
def test_both_doors_carry_out_plans(method, given, net, path, ids, tmp_path):
    plan = slrprop.plan(net, ids, method=method, layers="words", refit_head=False, **given) if method in ("low_rank", "dense") else slrprop.plan(net, ids, method=method, layers="words", **given)  # fmt: skip
    small = slrprop.apply(net, plan)
    words = next(layer for layer in plan.layers if layer.name == "words").factors.dense()
    twin = slrprop.apply(net, plan)
    twin.words = nn.Embedding.from_pretrained(words.detach())
    torch.testing.assert_close(small(ids), twin(ids))
    assert slrprop.export_onnx(small, tmp_path / "small.onnx", ids[:3]) < 1e-4
    (got,) = run(tmp_path / "small.onnx", {"ids": ids})
    torch.testing.assert_close(torch.from_numpy(got), small(ids).detach(), rtol=1e-3, atol=1e-4)
    slrprop.save(small, tmp_path / "small.safetensors")
    assert torch.equal(slrprop.load(net, tmp_path / "small.safetensors")(ids), small(ids))
    name = next(layer.name for layer in slrprop.inspect(path) if layer.shape == (WORDS, 24))
    filed = slrprop.plan(path, ids, method=method, layers=name, **given)
    assert max(slrprop.apply(path, filed, tmp_path / "file.onnx", data=ids).outputs.values()) < 1e-4
    other = next(layer for layer in filed.layers if layer.name == name).factors.dense()
    assert float((other - words).norm() / words.norm()) < 1e-3


def test_rows_share_a_scale_and_round_by_themselves():
    torch.manual_seed(0)
    weight = torch.randn(50, 16) * torch.logspace(-3, 1, 50)[:, None]
    form = quantised(Table(weight), 8)
    assert isinstance(form, Quantized) and form.scales["weight"].shape == (50,)
    error = (form.dense() - weight).abs().amax(1) / weight.abs().amax(1)
    assert float(error.max()) < 0.01  # small rows keep their digits
    assert form.bytes == 50 * 16 + 2 * 50


def test_counts_are_those_of_the_words(net, ids):
    problem = Problem(open_network(net, data := Data(ids)), data)
    task = problem.calibration.regression("words", {})
    counted = ids.flatten().bincount(minlength=WORDS).double()
    covariance = task.covariance
    torch.testing.assert_close(covariance - covariance.min(), counted / counted.sum(), atol=1e-12, rtol=0)
    assert covariance.min() > 0  # a word never seen counts a little
    parts = moments(net, ("words", "inner"), [ids[:20], ids[20:]])
    assert isinstance(parts["words"], Counts) and torch.equal(parts["words"].rows, counted)


def test_a_row_is_as_active_as_it_is_often_read(net, path, ids):
    for door, name in ((net, "words"), (path, slrprop.inspect(path)[0].name)):
        scores = slrprop.relevance.activation(door, name, ids)
        assert torch.equal(scores.rows, ids.flatten().bincount(minlength=WORDS).double())
        torch.testing.assert_close(scores.columns, net.words(ids).abs().flatten(0, 1).sum(0, dtype=torch.float64))


def test_low_rank_is_the_best_for_the_words_that_are_read(net, ids):
    """As the same fit on rows with a single one; rows never read stay near to what their words were."""
    problem = Problem(open_network(net, data := Data(ids)), data)
    task = problem.calibration.regression("words", {})
    left, right = task.low_rank(6)
    weight, spread = task.weight.double(), torch.diag(task.covariance)
    rest = weight - left @ right
    error = (rest.T @ spread @ rest @ task.metric).trace()
    square = spread.sqrt() @ weight @ task.root
    best = torch.linalg.svdvals(square)[6:].square().sum()
    assert float(error) == pytest.approx(float(best), rel=1e-6)
    unseen = task.covariance == task.covariance.min()
    fitted = slrprop.plan(net, ids, method="low_rank", layers="words", rank=20).layers[0].factors
    assert isinstance(fitted, LowRank)
    change = (fitted.dense() - net.words.weight.detach())[unseen].norm() / net.words.weight.detach()[unseen].norm()
    assert unseen.sum() > 40 and float(change) < 0.5


def test_compress_takes_the_table_too(net, path, ids):
    for door in (net, path):
        found = slrprop.compress(door, ids, max_bytes="30%")
        assert found.met and (WORDS, 24) in {layer.shape for layer in found.plan.layers}


def test_a_tied_table_stays_and_says_why(ids):
    class Tied(Text):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(24, WORDS, bias=False)
            self.inner = nn.Linear(24, 24)
            self.head.weight = self.words.weight

    torch.manual_seed(0)
    tied = Tied().eval()
    plan = slrprop.plan(tied, ids, method="dense", bits=8)
    assert plan.left_dense["words"] == "its weight is also head.weight" and plan.left_dense["head"] == "its weight is also words.weight"  # fmt: skip
    with pytest.raises(SlrpropError, match=r"layer .words. can.t be factored: its weight is also head\.weight"):
        slrprop.plan(tied, ids, method="dense", bits=8, layers="words")


def test_refusals_in_one_sentence(net, path, ids):
    beyond = ids.clone()
    beyond[3, 4] = WORDS + 7
    for door in (net, path):
        with pytest.raises(SlrpropError, match="the model can't take data of shape"):
            slrprop.plan(door, beyond, method="low_rank", rank=4)
    with pytest.raises(
        SlrpropError,
        match=r"treats none of the layers words \(it is an embedding\), places \(.*\), inner \('mean' stands behind it\), head of",
    ):
        slrprop.plan(net, ids, method="slrprop", frl="words")
    with pytest.raises(SlrpropError, match="method 'nested' can't treat layer 'words'"):
        slrprop.plan(net, ids, method="nested", layers="words")
    scaled = nn.Sequential(nn.Embedding(WORDS, 8, max_norm=1.0), nn.Flatten(), nn.Linear(8 * LENGTH, 3)).eval()
    assert "max_norm" in slrprop.plan(scaled, ids, method="dense", bits=8).left_dense["0"]
