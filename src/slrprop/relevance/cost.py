"""Cost: how much the loss changes when one neuron is shortened, exactly and without re-running the network."""

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.linalg import SVD
from slrprop.losses import LossName, Point, loss_point, pick_loss, rows_of
from slrprop.network.torch import Flow, TorchNetwork
from slrprop.relevance.changes import Walk, chain_changes

Baseline = Literal["truncated", "original"]
CANDIDATES_AT_ONCE = 32


class CostScores(NamedTuple):
    """Scores of the inputs (m,) and outputs (n,) in float64, and the mean loss they are measured from."""

    rows: Tensor
    columns: Tensor
    baseline: float


def cost_scores(
    network: TorchNetwork,
    data: Data,
    name: str,
    svd: SVD,
    reduced_rank: int,
    baseline: Baseline = "truncated",
    loss: LossName | None = None,
) -> CostScores:
    """``|c - c_i|`` for every neuron of a layer, over the calibration data.

    ``c_i`` is the mean loss when the layer is its truncated SVD and neuron i alone keeps only ``reduced_rank``
    ranks; ``c`` is the mean loss of the truncated network (``baseline="truncated"``, as in the authors' SLR code)
    or of the original one (``"original"``, as in Garmendia-Orbegozo et al. 2023).
    """
    if baseline not in ("truncated", "original"):
        raise SlrpropError(f"no baseline is called '{baseline}'; choose 'truncated' or 'original'")
    rows = columns = torch.zeros((), dtype=torch.float64)
    truncated = original = 0.0
    samples = 0
    for flow in tqdm(network.stream((name,), data), desc=f"cost of {name}", unit="batch", disable=None, leave=False):
        target = flow.batch.targets
        chosen = pick_loss(target, rows_of(flow.output), loss)
        output = rows_of(flow.output if chosen == "squared" else network.scores(flow.output))
        original += float(loss_point(chosen, output, target, output).values.double().sum())
        chain = network.chain(name)
        seen_through = chain is not None and not (network.ending and chosen == "squared")
        if chain is not None and seen_through and network.reproduces(chain, flow.calls[name][0][1], flow.output):
            x = flow.calls[name][0][0].to(svd.u)
            bias = network.bias(name)
            y = (x @ svd.left) @ svd.vt
            z = chain.values(y if bias is None else y + bias)
            walk = Walk(chain, z, loss_point(chosen, z[-1], target, output))
            parts = chain_changes(x, svd, reduced_rank, walk)
            point = walk.point
        else:
            run = _changed_outputs(network, flow, name, svd, chosen)
            point = loss_point(chosen, run(None), target, output)
            parts = _general_changes(run, svd, reduced_rank, point)
        rows, columns = rows + parts[0], columns + parts[1]
        truncated += float(point.values.double().sum())
        samples += len(output)
    rows, columns = rows / samples, columns / samples
    if baseline == "original":
        shift = (truncated - original) / samples
        return CostScores((rows + shift).abs(), (columns + shift).abs(), original / samples)
    return CostScores(rows.abs(), columns.abs(), truncated / samples)


Run = Callable[[Callable[[Tensor], Tensor] | None], Tensor]


def _changed_outputs(network: TorchNetwork, flow: Flow, name: str, svd: SVD, loss: LossName) -> Run:
    """The network's output (p x c) when the layer is truncated and, on top, moved by a function of its input."""
    bias = network.bias(name)

    def run(move: Callable[[Tensor], Tensor] | None) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            wide = x.to(svd.u)
            y = (wide @ svd.left) @ svd.vt
            y = y if bias is None else y + bias
            return (y if move is None else y + move(wide)).to(x.dtype)

        output = network.outputs_with(name, flow.batch, layer)
        return rows_of(output if loss == "squared" else network.scores(output))

    return run


def _general_changes(run: Run, svd: SVD, reduced_rank: int, point: Point) -> tuple[Tensor, Tensor]:
    """The same sums for any network: what depends on the layer runs on batched candidates, the rest once a batch.

    Vectorised with ``torch.vmap``: what comes before the layer does not depend on the candidate and is not
    repeated. A network that ``vmap`` can't batch runs one candidate at a time.
    """
    left, right = svd.left[:, reduced_rank:], svd.vt[reduced_rank:]
    base = run(None)
    m, n = left.shape[0], right.shape[1]
    outputs = torch.arange(n, device=left.device)

    def row(i: Tensor) -> Tensor:
        direction = left.index_select(0, i.view(1)) @ right
        return run(lambda x: -x.index_select(-1, i.view(1)) * direction[0])

    def column(j: Tensor) -> Tensor:
        only = (outputs == j).to(left)
        return run(lambda x: -((x @ left) @ right) * only)

    def sums(candidate: Callable[[Tensor], Tensor], count: int) -> Tensor:
        parts = []
        for index in torch.arange(count, device=left.device).split(CANDIDATES_AT_ONCE):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*batching rule")  # slower, but right
                    moved = torch.vmap(candidate)(index)
            except RuntimeError:
                moved = torch.stack([candidate(i) for i in index])
            parts.append(point.change(moved - base, (None,)).double().sum(1))
        return torch.cat(parts)

    return sums(row, m), sums(column, n)
