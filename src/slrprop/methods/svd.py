"""Truncated SVD."""

from torch import Tensor

from slrprop.forms import LowRank
from slrprop.linalg import truncated_svd
from slrprop.methods.base import Problem, SVDBasedSettings
from slrprop.operators import Operator
from slrprop.plan import LayerPlan


class SVDSettings(SVDBasedSettings):
    """Truncated SVD: the best rank-k approximation of the weight itself."""

    source = "Eckart and Young, Psychometrika 1, 1936"
    rebuilt = True

    def treats(self, operator: Operator) -> bool:
        return not operator.bits_only

    def alone(self, problem: Problem, name: str) -> LowRank:
        return LowRank.from_svd(problem.svd(name, self.rank, self.solver))

    def build(self, weight: Tensor, layer: LayerPlan) -> LowRank:
        return LowRank.from_svd(truncated_svd(weight, self.rank, self.solver))
