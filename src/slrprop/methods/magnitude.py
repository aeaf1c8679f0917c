"""Magnitude pruning."""

from collections.abc import Iterator

from torch import Tensor

from slrprop.fit.sparsity import largest
from slrprop.forms import Fit, Sparse
from slrprop.methods.base import Decision, DensitySettings, Method, Problem
from slrprop.plan import LayerPlan


class MagnitudeSettings(DensitySettings):
    """Magnitude: the largest weights stay (size only: no faster)."""

    source = "Han, Pool, Tran, Dally, NIPS 2015"


def pruned(weight: Tensor, count: int) -> Sparse:
    """The ``count`` weights of largest magnitude."""
    return Sparse.of(weight, largest(weight.abs(), count))


def decide(problem: Problem, layers: tuple[str, ...], settings: MagnitudeSettings) -> Iterator[Decision]:
    """Every layer by itself."""
    for name in layers:
        weight = problem.weight(name)
        yield Decision(name, Fit(pruned(weight, settings.stored_numbers(*weight.shape))))


def build(weight: Tensor, layer: LayerPlan, settings: MagnitudeSettings) -> Sparse:
    """The factors of a planned layer from its m x n weight."""
    return pruned(weight, settings.stored_numbers(*weight.shape))


METHOD = Method("magnitude", MagnitudeSettings, decide, build)
