"""Truncated SVD."""

from collections.abc import Iterator

from torch import Tensor

from slrprop.forms import Fit, LowRank
from slrprop.linalg import truncated_svd
from slrprop.methods.base import Decision, Method, Problem, SVDBasedSettings
from slrprop.operators import Operator
from slrprop.plan import LayerPlan


class SVDSettings(SVDBasedSettings):
    """Truncated SVD: the best rank-k approximation of the weight itself."""

    source = "Eckart and Young, Psychometrika 1, 1936"

    def treats(self, operator: Operator) -> bool:
        return not operator.bits_only


def decide(problem: Problem, layers: tuple[str, ...], settings: SVDSettings) -> Iterator[Decision]:
    """Every layer by itself."""
    for name in layers:
        rank = settings.at(problem.network.operator(name), problem.network.shape(name)).rank
        yield Decision(name, Fit(LowRank.from_svd(problem.svd(name, rank, settings.solver))))


def build(weight: Tensor, layer: LayerPlan, settings: SVDSettings) -> LowRank:
    """The factors of a planned layer from its m x n weight."""
    return LowRank.from_svd(truncated_svd(weight, settings.rank, settings.solver))


METHOD = Method("svd", SVDSettings, decide, build)
