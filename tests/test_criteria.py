"""The criteria by which neurons are removed, against their definitions."""

import copy

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn
from torch.nn import functional

from slrprop.data import Data
from slrprop.methods import Problem
from slrprop.methods.apoz import APoZSettings
from slrprop.methods.lrp import LRPSettings
from slrprop.methods.nisp import NISPSettings, infinite_selection
from slrprop.methods.redundant import clusters
from slrprop.methods.taylor import TaylorSettings
from slrprop.network import TorchNetwork

PAIRS = {"0": "2", "2": "4"}


def problem_of(model, data):
    opened = Data(data)
    return Problem(TorchNetwork(model, opened), opened)


def test_taylor_is_autograd_on_the_plain_module(trained, calibration):
    x, y = calibration
    for labels, absolute in ((y, "sample"), (y, "mean"), (None, "sample")):
        found = TaylorSettings(absolute=absolute).scores(problem_of(trained, (x, labels)), PAIRS)
        for name, position in (("0", 2), ("2", 4)):
            z = trained[:position](x).detach().requires_grad_()
            outputs = trained[position:](z)
            functional.cross_entropy(
                outputs, outputs.argmax(1) if labels is None else labels, reduction="sum"
            ).backward()
            terms = (z.grad * z.detach()).double()
            want = terms.abs().mean(0) if absolute == "sample" else terms.mean(0).abs()
            torch.testing.assert_close(found[name], want / want.norm(), rtol=1e-3, atol=1e-6)


def test_taylor_is_a_finite_difference(trained, calibration):
    """The mean loss moves by -t times the signed score when a neuron is turned down by a share t."""
    model, x, y = copy.deepcopy(trained).double(), calibration[0].double(), calibration[1]
    found = TaylorSettings(absolute="mean").scores(problem_of(model, (x, y)), {"2": "4"})["2"]
    z = model[:4](x).detach()
    moved = []
    for neuron in range(z.shape[1]):
        ends = []
        for step in (1e-5, -1e-5):
            turned = z.clone()
            turned[:, neuron] *= 1 - step
            ends.append(functional.cross_entropy(model[4:](turned), y))
        moved.append((ends[0] - ends[1]).item() / 2e-5)
    want = torch.tensor(moved, dtype=torch.float64).abs()
    torch.testing.assert_close(found, want / want.norm(), rtol=1e-5, atol=1e-7)


def naive_z_plus(a, weight, relevance):
    """One sample, one pair of neurons after another."""
    back = torch.zeros_like(a)
    for j in range(weight.shape[1]):
        parts = [max(float(a[i] * weight[i, j]), 0.0) for i in range(len(a))]
        total = sum(parts)
        for i, part in enumerate(parts):
            back[i] += part / total * relevance[j] if total else 0
    return back


def test_lrp_is_the_z_plus_rule(trained, calibration):
    x, y = calibration[0][:4].double(), calibration[1][:4]
    model = copy.deepcopy(trained).double()
    found = LRPSettings().scores(problem_of(model, (x, y)), PAIRS)
    first, second = torch.zeros(96).double(), torch.zeros(80).double()
    for sample, label in zip(x, y, strict=True):
        with torch.no_grad():
            h1, h2, out = model[:2](sample), model[:4](sample), model(sample)
        start = torch.zeros_like(out)
        start[label] = out[label]
        r2 = naive_z_plus(h2, model[4].weight.detach().T, start)
        second += r2 / len(x)
        first += naive_z_plus(h1, model[2].weight.detach().T, r2) / len(x)
    torch.testing.assert_close(found["2"], second)
    torch.testing.assert_close(found["0"], first)


def test_lrp_conserves_relevance(trained, calibration):
    x, y = calibration
    found = LRPSettings().scores(problem_of(trained, (x, y)), PAIRS)
    with torch.no_grad():
        logits = trained(x).gather(1, y[:, None]).mean().double()
    for relevance in found.values():
        torch.testing.assert_close(relevance.sum(), logits, rtol=1e-4, atol=1e-4)


def test_lrp_sees_through_batch_norm(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10)
    )
    model[3].running_var.uniform_(0.5, 2)
    model[3].weight.data.uniform_(0.5, 2)
    model.eval()
    plain = nn.Sequential(model[0], nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), model[5]).eval()
    scale = (model[3].running_var + model[3].eps).rsqrt() * model[3].weight
    plain[2].weight.data = model[2].weight.data * scale[:, None]
    plain[2].bias.data = (model[2].bias - model[3].running_mean) * scale + model[3].bias
    for settings in (LRPSettings(), TaylorSettings()):
        folded = settings.scores(problem_of(plain, calibration), {"0": "2"})["0"]
        torch.testing.assert_close(settings.scores(problem_of(model, calibration), {"0": "2"})["0"], folded)


def test_apoz_counts_zeros(trained, calibration):
    x, _ = calibration
    found = APoZSettings().scores(problem_of(trained, calibration), PAIRS)
    with torch.no_grad():
        for name, end in (("0", 2), ("2", 4)):
            h = trained[:end](x)
            zeros = [sum(float(h[p, i]) == 0 for p in range(len(h))) / len(h) for i in range(h.shape[1])]
            torch.testing.assert_close(1 - found[name], torch.tensor(zeros, dtype=torch.float64))


def test_nisp_is_its_recursion(trained, calibration):
    weights = {name: trained.get_submodule(name).weight.detach().T.double() for name in ("2", "4")}
    problem = problem_of(trained, calibration)
    by_outputs = NISPSettings(start="outputs").scores(problem, PAIRS)
    want = [sum(abs(float(w)) for w in row) for row in weights["4"]]
    torch.testing.assert_close(by_outputs["2"], torch.tensor(want, dtype=torch.float64))
    by_responses = NISPSettings().scores(problem, PAIRS)
    with torch.no_grad():
        selected = infinite_selection(trained[:4](calibration[0]))
    torch.testing.assert_close(by_responses["2"], selected)
    for found in (by_outputs, by_responses):
        back = [sum(abs(float(w)) * float(s) for w, s in zip(row, found["2"], strict=True)) for row in weights["2"]]
        torch.testing.assert_close(found["0"], torch.tensor(back, dtype=torch.float64))


def test_infinite_selection_sums_paths_of_every_length():
    torch.manual_seed(0)
    x = torch.randn(200, 5, dtype=torch.float64)
    x[:, 4] = 1.0
    rank = x[:, :4].argsort(0).argsort(0).double()
    apart = torch.zeros(5, 5, dtype=torch.float64)
    apart[:4, :4] = 1 - torch.corrcoef(rank.T).abs()
    deviation = x.std(0)
    affinity = (torch.maximum(deviation[:, None], deviation) / deviation.max() + apart) / 2
    step = 0.9 / torch.linalg.eigvals(affinity).abs().max() * affinity
    power, total = torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(400):
        power = power @ step
        total += power.sum(1)
    torch.testing.assert_close(infinite_selection(x), total)
    assert infinite_selection(x).argmin() == 4


def test_redundant_clusters_are_scipys(trained):
    vectors = trained[2].weight.detach().double()
    made = clusters(vectors, 30)
    theirs = fcluster(linkage(vectors.numpy(), "complete", "cosine"), 30, "maxclust")
    together = made[:, None] == made
    assert len(made.unique()) == 30
    assert torch.equal(together, torch.from_numpy(theirs[:, None] == theirs))


def test_a_softmax_at_the_end_is_seen_through(trained, calibration):
    ended = nn.Sequential(*copy.deepcopy(trained), nn.Softmax(-1))
    for settings in (TaylorSettings(), LRPSettings()):
        plain, other = (settings.scores(problem_of(model, calibration), PAIRS) for model in (trained, ended))
        for name in PAIRS:
            torch.testing.assert_close(plain[name], other[name])


def test_taylor_of_networks_without_classes(calibration):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 2)).double(), calibration[0].double()
    goals = torch.randn(300, 2, dtype=torch.float64)
    found = TaylorSettings().scores(problem_of(model, (x, goals)), {"0": "2"})["0"]
    z = model[:2](x).detach().requires_grad_()
    (model[2](z) - goals).square().sum().backward()
    want = (z.grad * z.detach()).abs().mean(0)
    torch.testing.assert_close(found, want / want.norm())
