"""Literal definitions: of the cost scores, which run the whole network once per neuron, and of neurons in another order."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slrprop.linalg import SVD
from slrprop.network.torch.find import operator_of


def mean_loss(model: nn.Module, x: Tensor, y: Tensor | None, original: Tensor, loss: str) -> float:
    """Mean cross-entropy, KL divergence or squared distance of the model's outputs."""
    output = model(x).double()
    output, original = output.reshape(-1, output.shape[-1]), original.double().reshape(-1, output.shape[-1])
    if loss == "cross_entropy":
        assert y is not None
        return functional.cross_entropy(output, y.reshape(-1)).item()
    if loss == "kl":
        return functional.kl_div(
            output.log_softmax(-1), original.log_softmax(-1), reduction="batchmean", log_target=True
        ).item()
    return (output - original).square().sum(-1).mean().item()


@torch.no_grad()
def naive_cost(
    model: nn.Module,
    layer: nn.Module,
    svd: SVD,
    reduced_rank: int,
    x: Tensor,
    y: Tensor | None,
    loss: str = "cross_entropy",
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    baseline: str = "truncated",
    tick: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """``|c - c_i|`` for the named rows (of a convolution input channels) and columns (all by default); the weight is put back afterwards."""
    before, operator = layer.weight.detach().clone(), operator_of(layer)
    unit = operator.unit
    original = model(x)

    def measured(left: Tensor, right: Tensor) -> float:
        layer.weight.copy_(operator.stored(left @ right))
        tick()
        return mean_loss(model, x, y, original, loss)

    try:
        c = mean_loss(model, x, y, original, loss) if baseline == "original" else measured(svd.left, svd.vt)
        row_scores, column_scores = [], []
        for i in range(len(svd.u) // unit) if rows is None else rows:
            left = svd.left.clone()
            left[i * unit : (i + 1) * unit, reduced_rank:] = 0
            row_scores.append(abs(c - measured(left, svd.vt)))
        for j in range(svd.vt.shape[1]) if columns is None else columns:
            right = svd.vt.clone()
            right[reduced_rank:, j] = 0
            column_scores.append(abs(c - measured(svd.left, right)))
    finally:
        layer.weight.copy_(before)
    return torch.tensor(row_scores, dtype=torch.float64), torch.tensor(column_scores, dtype=torch.float64)


def permuted_as_the_weight(form, random):
    """Check a form with its neurons in a random order against its weight; that form, and the order of inputs and outputs."""
    rows, columns = (torch.tensor(random.sample(range(side), side), dtype=torch.long) for side in form.shape)
    moved = form.permuted(rows, columns)
    torch.testing.assert_close(moved.dense(), form.dense()[rows][:, columns])
    assert moved.numbers == form.numbers
    return moved, rows, columns
