"""Magnitude pruning."""

from torch import Tensor

from slrprop.fit.sparsity import largest
from slrprop.forms import Sparse
from slrprop.methods.base import DensitySettings, Problem
from slrprop.plan import LayerPlan


class MagnitudeSettings(DensitySettings):
    """Magnitude: the largest weights stay (size only: no faster)."""

    source = "Han, Pool, Tran, Dally, NIPS 2015"
    rebuilt = True

    def alone(self, problem: Problem, name: str) -> Sparse:
        return pruned(problem.weight(name), self.stored_numbers(*problem.network.shape(name)))

    def build(self, weight: Tensor, layer: LayerPlan) -> Sparse:
        return pruned(weight, self.stored_numbers(*layer.shape))


def pruned(weight: Tensor, count: int) -> Sparse:
    """The ``count`` weights of largest magnitude."""
    return Sparse.of(weight, largest(weight.abs(), count))
