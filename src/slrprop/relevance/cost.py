"""Cost: how much the loss changes when one neuron is shortened, exactly and without re-running the network."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from slrprop.data import Data
from slrprop.forms import LowRank
from slrprop.linalg import SVD
from slrprop.losses import IGNORED, LossName, Point, check_labels, loss_point, require_labels, rows_of
from slrprop.network.base import Changing, Flow, Network
from slrprop.network.chain import Chain
from slrprop.operators import Operator
from slrprop.progress import Progress
from slrprop.relevance.changes import Walk, chain_changes

Baseline = Literal["truncated", "original"]
CANDIDATES_AT_ONCE = 32
Seen = tuple[
    Tensor, Tensor, Tensor | None
]  # a layer's inputs in one batch (p x m), the network's output (p x c) and the targets
HELD = 1 << 25  # numbers of one layer's inputs or outputs for which a chain is walked at once


class CostScores(NamedTuple):
    """Scores of the inputs (m,), or (0,) if they were not asked for, and outputs (n,) in float64; the mean loss they are measured from."""

    rows: Tensor
    columns: Tensor
    baseline: float


def cost_scores(
    network: Network,
    data: Data,
    name: str,
    svd: SVD,
    reduced_rank: int,
    baseline: Baseline = "truncated",
    loss: LossName | None = None,
    inputs: bool = True,
) -> CostScores:
    """``|c - c_i|`` for every neuron of a layer (of a convolution: every channel), over the calibration data.

    ``c_i`` is the mean loss when the layer is its truncated SVD and neuron i alone keeps only ``reduced_rank``
    ranks; ``c`` is the mean loss of the truncated network (``baseline="truncated"``, as in the authors' SLR code)
    or of the original one (``"original"``, as in Garmendia-Orbegozo et al. 2023).

    Args:
        inputs: False leaves the inputs' scores out; SLRProp has others for the layers before the last.
    """
    sums, held, chain = list[tuple[Tensor, Tensor, Tensor]](), list[Seen](), network.chain(name)
    original, samples, most = 0.0, 0, HELD // max(svd.vt.shape[1], svd.left.shape[0])
    for flow in Progress(network.stream((name,), data), desc=f"cost of {name}", unit="batch", leave=False):
        target = flow.batch.targets
        chosen = network.loss(target, rows_of(flow.output), loss)
        output = rows_of(flow.output if chosen == "squared" else network.scores(flow.output))
        counted: Any = slice(None)  # rows whose label is not to be ignored
        if chosen == "cross_entropy" and target is not None:
            labels = check_labels(target, output)
            counted = labels != IGNORED
            output, target = output[counted], labels[counted]
            if not len(output):
                continue
        original += float(loss_point(chosen, output, target, output).values.double().sum())
        samples += len(output)
        seen_through = not (network.ending and chosen == "squared")
        if chain is not None and seen_through and network.reproduces(chain, flow.calls[name][0][1], flow.output):
            held.append((flow.calls[name][0][0].to(svd.u)[counted], output, target))
            if sum(len(x) for x, _, _ in held) >= most:
                sums.append(_by_chain(chain, network.bias(name), held, svd, reduced_rank, chosen, inputs))
                held.clear()
        else:
            outputs = _changed_outputs(network, flow, name, svd, chosen, counted)
            base = outputs(
                lambda x, _: torch.zeros((), dtype=x.dtype, device=x.device), torch.zeros(1, dtype=torch.long)
            )[0]
            point = loss_point(chosen, base, target, output)
            changes = _general_changes(outputs, network.operator(name), svd, reduced_rank, base, point, inputs)
            sums.append((*changes, point.values.double().sum()))
    if chain is not None and held:
        sums.append(_by_chain(chain, network.bias(name), held, svd, reduced_rank, chosen, inputs))
    require_labels(samples)
    rows, columns, truncated = (sum(parts) / samples for parts in zip(*sums, strict=True))
    start = original / samples if baseline == "original" else float(truncated)
    shift = float(truncated) - start
    return CostScores((rows + shift).abs(), (columns + shift).abs(), start)


def _by_chain(
    chain: Chain, bias: Tensor | None, held: list[Seen], svd: SVD, reduced_rank: int, loss: LossName, inputs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The changes over several batches at once, and the loss of the truncated network: the more samples, the more of them are alike."""
    x, output = torch.cat([x for x, _, _ in held]), torch.cat([output for _, output, _ in held])
    targets = [target for _, _, target in held if target is not None]
    y = (x @ svd.left) @ svd.vt
    z = chain.values(y if bias is None else y + bias)
    point = loss_point(loss, z[-1], torch.cat(targets) if targets else None, output)
    return *chain_changes(x, svd, reduced_rank, Walk(chain, z, point), inputs), point.values.double().sum()


Outputs = Callable[[Changing, Tensor], Tensor]


def _changed_outputs(network: Network, flow: Flow, name: str, svd: SVD, loss: LossName, counted: Any) -> Outputs:
    """The network's outputs (c, p, classes), of the rows that count, when the layer is truncated and, on top, moved for each of c candidates."""
    bias, operator, truncated = network.bias(name), network.operator(name), LowRank.from_svd(svd)

    def outputs(move: Changing, candidates: Tensor) -> Tensor:
        def layer(x: Tensor, candidate: Tensor) -> Tensor:
            wide = x.to(svd.u)
            return (operator.compute(truncated, bias, wide) + move(wide, candidate)).to(x.dtype)

        found = network.outputs_with(name, flow, layer, candidates)
        return torch.stack(
            [rows_of(output if loss == "squared" else network.scores(output))[counted] for output in found]
        )

    return outputs


def _general_changes(
    outputs: Outputs, operator: Operator, svd: SVD, reduced_rank: int, base: Tensor, point: Point, inputs: bool
) -> tuple[Tensor, Tensor]:
    """The same sums for any network: what depends on the layer runs on batched candidates, the rest once a batch."""
    left, right = svd.left[:, reduced_rank:], svd.vt[reduced_rank:]
    n, axis = right.shape[1], operator.axis
    channels = left.unflatten(0, (-1, operator.unit))
    columns, tail = torch.arange(n, device=left.device).reshape(-1, *[1] * (-1 - axis)), LowRank(left, right)

    def row(x: Tensor, i: Tensor) -> Tensor:
        direction = channels.index_select(0, i.view(1))[0] @ right
        return -operator.enter(x.index_select(axis, i.view(1)), direction)

    def column(x: Tensor, j: Tensor) -> Tensor:
        return -operator.compute(tail, None, x) * (columns == j).to(left)

    def sums(move: Changing, count: int) -> Tensor:
        parts = []
        for candidates in torch.arange(count, device=left.device).split(CANDIDATES_AT_ONCE):
            moved = outputs(move, candidates)
            parts.append(point.change(moved - base, (None,)).double().sum(1))
        return torch.cat(parts)

    return sums(row, len(channels)) if inputs else left.new_zeros(0, dtype=torch.float64), sums(column, n)
