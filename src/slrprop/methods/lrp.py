"""Neurons removed by layer-wise relevance propagation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slrprop.losses import check_labels, pick_loss
from slrprop.methods.base import Problem
from slrprop.methods.removal import ChainedSettings, Seen, averages_before
from slrprop.network.chain import ACTIVATIONS


class LRPSettings(ChainedSettings):
    """LRP: removes the neurons that receive the least relevance, handed back from the true class's output.

    The z+ rule: ``R_i = sum_j (a_i w_ij)^+ / sum_i' (a_i' w_i'j)^+ R_j``, averaged over the calibration samples. It starts
    from the logit of the label, without labels from that of the class the network puts first, for outputs that are no
    classes from all of them by magnitude. Activations and batch norm pass relevance through.
    """

    source = "Bach et al., PLoS ONE 10(7), 2015; Yeom et al., Pattern Recognition 115, 2021"

    def scores(self, problem: Problem, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """Mean relevance of every neuron between the layers of a pair, float64 (n,)."""

        def received(seen: Seen, targets: Tensor | None) -> Tensor:
            z = seen.chain.values(seen.y)
            relevance = at_outputs(z[-1], targets)
            for step, before in zip(reversed(seen.chain.steps), reversed(z[:-1]), strict=True):
                relevance = z_plus(ACTIVATIONS[step.activation](before), step.weight, relevance)
            return z_plus(seen.x, seen.weight * seen.chain.scale, relevance)

        return averages_before(problem, pairs, received)


def z_plus(a: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """The relevance (p x m) of a layer's inputs ``a`` (p x m) from that of its outputs (p x n); ``weight`` is m x n.

    An output that no input speaks for hands nothing back; all others hand back what they have.
    """
    ups = [(a.clamp_min(0), weight.clamp_min(0)), (a.clamp_max(0), weight.clamp_max(0))]
    total = sum((part @ up for part, up in ups), torch.zeros_like(relevance))
    share = torch.where(total > 0, relevance / total, 0.0)
    return sum((part * (share @ up.T) for part, up in ups), torch.zeros_like(a))


def at_outputs(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """The relevance (p x c) that the outputs (p x c) start with."""
    if pick_loss(targets, outputs) == "squared":
        return outputs.abs()
    labels = outputs.argmax(1) if targets is None else check_labels(targets, outputs)
    at = labels.clamp_min(0)[:, None]  # rows whose label is to be ignored start with nothing
    return torch.zeros_like(outputs).scatter(1, at, outputs.gather(1, at) * (labels >= 0)[:, None])
