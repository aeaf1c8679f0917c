"""Neurons removed by the first-order Taylor term of the loss."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from slrprop.losses import check_labels, goal_of, pick_loss
from slrprop.methods.base import Problem
from slrprop.methods.removal import ChainedSettings, Seen, averages_before


class TaylorSettings(ChainedSettings):
    """Taylor: removes the neurons whose removal changes the loss least, to first order.

    A neuron's score is ``|dC/dz * z|``, z being what the next layer reads of it, averaged over the calibration samples and
    scaled to l2 norm 1 in each layer. C is the cross-entropy of the labels; without labels that of the network's own answers
    (the class it puts first: the gradient of the divergence from itself is zero everywhere; we choose), for outputs that
    are no classes the squared distance from the targets, and without them from zero.

    Args:
        absolute: the absolute value is taken of each ``sample``, as in the article, or of the ``mean`` over them.
    """

    absolute: Literal["sample", "mean"] = "sample"

    source = "Molchanov, Tyree, Karras, Aila, Kautz, ICLR 2017"

    def scores(self, problem: Problem, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """Mean ``|dC/dz * z|`` of every neuron between the layers of a pair, float64 (n,), of norm 1."""

        def terms(seen: Seen, targets: Tensor | None) -> Tensor:
            y = seen.y.detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss_of(seen.chain.values(y)[-1], targets), y)
            found = ((gradient @ seen.weight.T) * seen.x).unflatten(1, (seen.channels, -1)).sum(2)  # of all its places
            return found.abs() if self.absolute == "sample" else found

        return {
            first: functional.normalize(mean.abs(), dim=0)
            for first, mean in averages_before(problem, pairs, terms).items()
        }


def loss_of(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """The loss C summed over samples, for outputs (p x c)."""
    loss = pick_loss(targets, outputs)
    if loss == "squared":
        return (outputs if targets is None else outputs - goal_of(targets, outputs)).square().sum()
    labels = outputs.argmax(1) if targets is None else check_labels(targets, outputs)
    return functional.cross_entropy(outputs, labels, reduction="sum")
