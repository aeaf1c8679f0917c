"""Relevance: a score for every neuron of a layer; of a convolution, costs are those of whole input channels. These functions take a module or an ONNX file; larger is more relevant."""

from pathlib import Path
from typing import Any

from torch import nn

from slrprop.checks import require_choice, require_count, require_rate, share
from slrprop.data import open_data
from slrprop.errors import SlrpropError
from slrprop.fit.statistics import QUANTITIES, collect
from slrprop.linalg import Solver, truncated_svd
from slrprop.losses import LossName
from slrprop.network import open_network
from slrprop.operators import Lookup
from slrprop.relevance.cost import Baseline, CostScores, cost_scores
from slrprop.relevance.simple import Scores, combined, propagated, weight_scores

__all__ = ["CostScores", "Scores", "activation", "combined", "cost", "propagated", "weight"]


def weight(model: nn.Module | str | Path, layer: str) -> Scores:
    """Sums of ``|W|`` per input and output of the layer."""
    network = open_network(model, None)
    network.require(layer)
    return weight_scores(network.weight(layer))


def activation(model: nn.Module | str | Path, layer: str, data: Any) -> Scores:
    """Sums over the data of ``|x|`` per input and ``|y|`` per output, y after the layer's nonlinearity."""
    opened = open_data(data)
    network = open_network(model, opened)
    network.require(layer)
    if told := network.operator(layer).bits_only:
        raise SlrpropError(f"layer '{layer}' is {told}, of which no activations are taken; ask for weight scores")
    statistics = collect(network, (layer,), opened, QUANTITIES)
    return Scores(*(statistics[layer, need] for need in QUANTITIES))


def cost(
    model: nn.Module | str | Path,
    layer: str,
    data: Any,
    rank: int = 16,
    reduction_rate: float = 0.5,
    baseline: Baseline = "truncated",
    loss: LossName | None = None,
    solver: Solver = "auto",
) -> CostScores:
    """Change of the mean loss when one neuron of the layer's rank-``rank`` SVD keeps ``int(rank * reduction_rate)`` ranks.

    Exact, without re-evaluating the network per neuron (Swaminathan et al. 2020, Algorithm 1, computed as
    described in docs/architecture.md).

    Args:
        baseline: ``"truncated"`` measures from the rank-k network, ``"original"`` from the original one.
        loss: ``cross_entropy`` (labels), ``kl`` or ``squared`` (to the original's outputs); found by default.

    Returns:
        ``rows`` (m,), of a convolution one for each channel, ``columns`` (n,) in float64, and ``baseline``, the mean loss they are measured from.

    Raises:
        SlrpropError: unknown layer, one without costs, rank or rate out of range, unusable data.
    """
    require_count("rank", rank, 1)
    require_rate("reduction_rate", reduction_rate)
    require_choice("baseline", baseline, ("truncated", "original"))
    opened = open_data(data)
    network = open_network(model, opened)
    network.require(layer)
    operator = network.operator(layer)
    if told := operator.bits_only or ("an embedding" if isinstance(operator, Lookup) else ""):
        raise SlrpropError(f"layer '{layer}' is {told}, whose neurons have no cost; ask for weight scores")
    svd = truncated_svd(network.weight(layer), rank, solver)
    return cost_scores(network, opened, layer, svd, share(rank, reduction_rate), baseline, loss)
