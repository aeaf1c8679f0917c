"""The exact cost scores against their literal definition."""

import copy
import itertools

import pytest
import torch
from torch import nn

from slrprop import SlrpropError, relevance
from slrprop.data import Data
from slrprop.linalg import truncated_svd
from slrprop.losses import loss_point
from slrprop.network import TorchNetwork
from slrprop.relevance import alike, changes
from slrprop.relevance.cost import cost_scores
from tests.oracle import naive_cost

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "identity": nn.Identity}
POSITIONS = ("first", "second", "third", "last")
LOSSES = ("cross_entropy", "kl", "squared")


def normalised(width):
    norm = nn.BatchNorm1d(width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def chain(activation, dtype):
    """Four dense layers with batch norm before one activation and after another."""
    torch.manual_seed(3)
    act = ACTIVATIONS[activation]
    layers = {
        "first": nn.Linear(9, 22), "a": act(), "second": nn.Linear(22, 18), "norm": normalised(18), "b": act(),
        "third": nn.Linear(18, 14), "c": act(), "after": normalised(14), "drop": nn.Dropout(), "last": nn.Linear(14, 5),
    }  # fmt: skip
    model = nn.Sequential()
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 2
        model.add_module(name, layer)
    return model.to(dtype).eval(), torch.randn(40, 9, dtype=dtype), torch.randint(0, 5, (40,))


def compare(model, x, y, name, loss="cross_entropy", rank=4, reduced=1, baseline="truncated"):
    """Largest difference to the oracle, relative to the largest loss that is compared where that is above 1."""
    labels = y if loss == "cross_entropy" else None
    data = Data((x, labels), batch_size=17)
    network = TorchNetwork(model, data)
    svd = truncated_svd(network.weight(name), min(rank, *network.weight(name).shape))
    fast = cost_scores(network, data, name, svd, reduced, baseline, loss)
    alone = cost_scores(network, data, name, svd, reduced, baseline, loss, inputs=False)
    assert torch.equal(alone.columns, fast.columns) and alone.rows.shape == (0,) and alone.baseline == fast.baseline
    rows, columns = naive_cost(model, network.modules[name], svd, reduced, x, labels, loss, baseline=baseline)
    assert fast.rows.dtype == fast.columns.dtype == torch.float64
    scale = max(1.0, fast.baseline + max(float(rows.max()), float(columns.max())))
    return max(float((fast.rows - rows).abs().max()), float((fast.columns - columns).abs().max())) / scale


KERNELS = ("compiled kernels", "wide kernels", "pairs kernel")
WAYS = [("relu", kernels) for kernels in KERNELS] + [
    (other, "pairs kernel") for other in ACTIVATIONS if other != "relu"
]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    monkeypatch.setattr(changes, "WIDE", 10**9 if request.param == "pairs kernel" else 2)
    monkeypatch.setattr(alike, "usable", lambda x: request.param == "compiled kernels")
    monkeypatch.setattr(alike, "PER_REFERENCE", 8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize(("activation", "kernels"), WAYS, indirect=["kernels"])
def test_equals_the_definition(activation, name, loss, kernels):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        assert compare(*chain(activation, dtype), name, loss) < tolerance


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", POSITIONS)
def test_any_suffix_equals_the_definition(name, loss, monkeypatch):
    """The way for networks that are no chain, on one where the oracle's answer is known."""
    monkeypatch.setattr(TorchNetwork, "chain", lambda self, name: None)
    for activation in ("relu", "tanh"):
        assert compare(*chain(activation, torch.float64), name, loss) < 1e-12
        assert compare(*chain(activation, torch.float32), name, loss) < 1e-6


@pytest.mark.parametrize("baseline", ["truncated", "original"])
@pytest.mark.parametrize("name", POSITIONS)
def test_baselines(name, baseline):
    assert compare(*chain("relu", torch.float64), name, baseline=baseline) < 1e-12


@pytest.mark.parametrize("rank", [1, 5])
def test_reduced_rank_zero_removes_the_neuron(rank, kernels):
    assert compare(*chain("relu", torch.float64), "third", rank=rank, reduced=0) < 1e-12


@pytest.mark.parametrize("scale", [1e-6, 30.0])
def test_tiny_and_huge_changes(scale, kernels):
    """Changes of the loss near rounding, and logits that saturate the softmax."""
    model, x, y = chain("relu", torch.float64)
    model.get_submodule("last").weight.data *= scale
    for name in POSITIONS:
        assert compare(model, x, y, name) < 1e-12


def test_many_sign_flips(kernels):
    """Pre-activations around zero: most units are corrected, or the wide kernel gives up its linear form."""
    model, x, y = chain("relu", torch.float64)
    for name in POSITIONS[:3]:
        model.get_submodule(name).bias.data.zero_()
    assert compare(model, x * 1e-3, y, "first") < 1e-12
    assert compare(model, x * 1e-3, y, "second") < 1e-12


@pytest.mark.parametrize("rows", [10, alike.ROWS])
@pytest.mark.parametrize("widths", [(300, 200, 7), (130, 65, 64, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_loops_equal_one_neuron_after_the_other(widths, dtype, rows, monkeypatch):
    """Several references, alone and together, tiles and groups of units; inputs that are zero, or all are."""
    monkeypatch.setattr(alike, "ROWS", rows)
    torch.manual_seed(1)
    x = torch.randn(150, 140, dtype=dtype).relu()
    x[:, 3] = 0
    left, right = torch.randn(140, 3, dtype=dtype) / 3, torch.randn(3, widths[0], dtype=dtype) / 3
    weights = [torch.randn(m, n, dtype=dtype) / m**0.5 for m, n in itertools.pairwise(widths)]
    z = [torch.randn(150, widths[0], dtype=dtype)]
    z.append(z[0].relu() @ weights[0])

    def changed(parts, outputs):
        found = torch.zeros(150, 140, outputs, dtype=dtype)
        for samples, candidates, d in parts:
            found.index_put_((samples[:, None], candidates), d, accumulate=True)
        return found

    moved = z[0][:, None] + x[:, :, None] * (left @ right)
    one = (moved.relu() - z[0][:, None].relu()) @ weights[0]
    two = ((z[1][:, None] + one).relu() - z[1][:, None].relu()) @ weights[1]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    found = changed(alike.behind_one(z[0], x, left @ right, weights[0]), widths[1])
    torch.testing.assert_close(found, one, rtol=0, atol=tolerance)
    found = changed(alike.behind_one_low_rank(z[0], x, left, right, weights[0]), widths[1])
    torch.testing.assert_close(found, one, rtol=0, atol=tolerance)
    found = changed(alike.behind_two(*z, x, left, right, *weights[:2]), widths[2])
    torch.testing.assert_close(found, two, rtol=0, atol=tolerance)
    assert not list(alike.behind_one(z[0], 0 * x, left @ right, weights[0]))


@pytest.mark.skipif(alike.loops() is None, reason="needs numba")
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_loops_leave_torch_its_threads(threads):
    """Numba's pool may be torch's own: with more threads than it asked for, small products take many times longer."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        x, weight = torch.randn(40, 30).relu(), torch.randn(20, 5)
        assert list(alike.behind_one(torch.randn(40, 20), x, torch.randn(30, 20), weight))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_samples_are_near_their_reference():
    """Every sample is in one group, and differs from its reference in fewer units than from one reference for all."""
    torch.manual_seed(1)
    masks = torch.rand(6, 40).gt(0.5).repeat_interleave(100, 0) ^ torch.rand(600, 40).gt(0.95)
    masks = masks[torch.randperm(600)]
    groups = alike.alike(masks)
    assert sorted(torch.cat([samples for samples, _ in groups]).tolist()) == list(range(600))
    apart = sum(int((masks[samples] ^ reference).sum()) for samples, reference in groups)
    assert apart < 0.5 * int((masks ^ (masks.float().mean(0) > 0.5)).sum())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7)])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.3, 1.0])
def test_changes_along_a_direction_are_those_of_each_alone(size, dtype, tolerance, loss):
    """The series against one exponential for every sample, candidate and class; relative to the largest of a sample."""
    torch.manual_seed(1)
    logits, original = 4 * torch.randn(2, 30, 12, dtype=dtype)
    y = torch.randint(0, 12, (30,)) if loss == "cross_entropy" else None
    point = loss_point(loss, logits, y, original)
    direction = torch.randn(50, 12, dtype=dtype)
    s = size * (2 * torch.rand(30, 50, dtype=dtype) - 1) / direction.abs().amax(1)
    s[:, ::3] = 0
    part = slice(7, 25)
    found, want = point.change_along(s[part], direction, part), point.change(s[part, :, None] * direction, (part, None))
    assert torch.equal(found[:, ::3], torch.zeros_like(found[:, ::3]))
    assert ((found - want).abs() <= 30 * tolerance * want.abs().amax(1, keepdim=True)).all()


def test_what_is_no_number_ends():
    """Samples that overflowed give changes that are no numbers, and no endless series."""
    point = loss_point("cross_entropy", torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(3, 4))
    assert point.change_along(torch.full((3, 2), torch.nan), torch.randn(2, 4), slice(None)).isnan().all()


def test_sparse_inputs_and_real_data(trained, digits):
    x, y = digits
    model = copy.deepcopy(trained).double()
    for name in ("0", "2", "4"):
        assert compare(model, x[:200].double(), y[:200], name, rank=8, reduced=4) < 1e-12


@pytest.mark.parametrize("ending", [nn.Softmax(-1), nn.LogSoftmax(-1)])
def test_a_final_softmax_is_seen_through(ending):
    model, x, y = chain("relu", torch.float64)
    data = (x, y)
    want = relevance.cost(model, "third", data, rank=4)
    got = relevance.cost(nn.Sequential(model, ending), "0.third", data, rank=4)
    torch.testing.assert_close(got.rows, want.rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(got.columns, want.columns, rtol=0, atol=1e-12)


def test_the_batches_do_not_matter():
    model, x, y = chain("gelu", torch.float64)
    whole, parts = (relevance.cost(model, "second", Data((x, y), size), rank=4) for size in (40, 7))
    torch.testing.assert_close(whole.rows, parts.rows, rtol=0, atol=1e-14)
    assert abs(whole.baseline - parts.baseline) < 1e-14


def test_losses_are_found_from_the_data():
    model, x, y = chain("relu", torch.float64)
    for data, loss in (((x, y), "cross_entropy"), (x, "kl"), ((x, model(x).detach()), "squared")):
        assert torch.equal(
            relevance.cost(model, "third", data, rank=4).rows,
            relevance.cost(model, "third", data, rank=4, loss=loss).rows,
        )
    with pytest.raises(SlrpropError, match="needs labels, and the data has none"):
        relevance.cost(model, "third", x, rank=4, loss="cross_entropy")
