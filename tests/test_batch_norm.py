"""Batch norm between layers: put into the layer before it only where that changes nothing."""

import pytest
import torch
from torch import nn

import slrprop
from slrprop import Plan, SlrpropError
from slrprop.data import Data
from slrprop.network import TorchNetwork
from slrprop.network.torch.fold import folded


def norm(kind, channels, **settings):
    """A batch norm that has seen data."""
    made = kind(channels, **settings)
    for name, tensor in made.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data.uniform_(*((0.5, 2.0) if name in ("weight", "running_var") else (-1.0, 1.0)))
    return made


class Net(nn.Module):
    """Modules by name, and a function that runs them."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)
        self.eval()

    def forward(self, x):
        return self.run(self, x)


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


FOLDS = {
    "affine alone is missing": (lambda n, x: n.norm(n.a(x)), nn.Linear(6, 8), nn.BatchNorm1d, {"affine": False}, (6,)),
    "no bias": (lambda n, x: n.norm(n.a(x)), nn.Linear(6, 8, bias=False), nn.BatchNorm1d, {}, (6,)),
    "groups": (lambda n, x: n.norm(n.a(x)), nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d, {}, (4, 6, 6)),
    "transposed": (lambda n, x: n.norm(n.a(x)), nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d, {}, (3, 6, 6)),
}
STAYS = {
    "called twice": (lambda n, x: n.norm(n.norm(n.a(x))), nn.Linear(6, 8), nn.BatchNorm1d, {}, (6,)),
    "called on the input": (lambda n, x: n.norm(n.a(n.norm(x))), nn.Linear(8, 8), nn.BatchNorm1d, {}, (8,)),
    "layer called twice": (lambda n, x: n.norm(n.a(n.a(x))), nn.Linear(8, 8), nn.BatchNorm1d, {}, (8,)),
    "shared": (lambda n, x: n.norm(n.a(x)) + n.norm(n.b(x)), nn.Linear(6, 8), nn.BatchNorm1d, {}, (6,)),
    "read elsewhere": (lambda n, x: n.norm(n.a(x)) + n.a(x), nn.Linear(6, 8), nn.BatchNorm1d, {}, (6,)),
    "read beside": (lambda n, x: n.norm(h := n.a(x)) + h, nn.Linear(6, 8), nn.BatchNorm1d, {}, (6,)),
    "returned": (lambda n, x: (n.norm(h := n.a(x)), h), nn.Linear(6, 8), nn.BatchNorm1d, {}, (6,)),
    "no statistics": (lambda n, x: n.norm(n.a(x)), nn.Linear(6, 8), nn.BatchNorm1d, {"track_running_stats": False}, (6,)),
    "over tokens": (lambda n, x: n.norm(n.a(x)), nn.Linear(6, 8), nn.BatchNorm1d, {}, (8, 6)),
    "with a function of its own": (lambda n, x: n.norm(n.a(x)), nn.Linear(6, 8), Activated, {}, (6,)),
    "behind an embedding": (lambda n, x: n.norm(n.a(x.long()[:, 0])), nn.Embedding(6, 8), nn.BatchNorm1d, {}, (6,)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS | STAYS)
def test_batch_norm_goes_into_a_layer_only_where_nothing_changes(case):
    torch.manual_seed(0)
    run, layer, kind, settings, shape = (FOLDS | STAYS)[case]
    model = Net(run, a=layer, b=nn.Linear(6, 8), norm=norm(kind, 8, **settings))
    x = torch.rand(5, *shape)
    norms = TorchNetwork(model, Data(x)).norms
    assert norms == ({"a": "norm"} if case in FOLDS else {})
    with torch.no_grad():
        torch.testing.assert_close(folded(model, norms)(x), model(x))


@pytest.mark.parametrize(
    "names, told",
    [
        ({"norm": "norm"}, "folds the batch norm 'norm' into 'norm', which this model does not have"),
        ({"": "norm"}, "folds the batch norm 'norm' into '', which this model does not have"),
        ({"a": "a"}, "folds the batch norm 'a' into 'a', which this model does not have"),
        ({"a": "free"}, "folds the batch norm 'free' into 'a', which this model does not have"),
        ({"b": "norm"}, "folds the batch norm 'norm' of 8 channels into 'b', which makes 3"),
        ({"table": "norm"}, "folds the batch norm 'norm' into 'table', which this model does not have"),
    ],
)
def test_a_plan_that_folds_what_is_not_there(names, told):
    model = Net(
        lambda n, x: n.b(n.norm(n.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 3), norm=norm(nn.BatchNorm1d, 8),
        free=nn.BatchNorm1d(8, track_running_stats=False), table=nn.Embedding(4, 8),
    )  # fmt: skip
    with pytest.raises(SlrpropError, match=told):
        slrprop.apply(model, Plan((), folded=names))
