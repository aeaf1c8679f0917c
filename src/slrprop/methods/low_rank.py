"""Low rank fitted to calibration data."""

from typing import Literal

from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.forms import LowRank
from slrprop.methods.base import RankSettings
from slrprop.methods.calibrated import CalibratedSettings
from slrprop.operators import Operator


class LowRankSettings(RankSettings, CalibratedSettings):
    """Low rank of least error on the data, outputs weighed by what they do to the network's.

    Args:
        metric: ``two_sided`` weighs inputs by their covariance and outputs by the Gauss-Newton metric; ``inputs`` all
            outputs alike (whitened SVD).
    """

    metric: Literal["two_sided", "inputs"] = "two_sided"

    source = "Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025; Hsu et al., FWSVD, ICLR 2022"

    def treats(self, operator: Operator) -> bool:
        return not operator.bits_only

    @property
    def weighted(self) -> bool:
        return self.metric == "two_sided"

    def fit(self, task: Regression) -> LowRank:
        """Reduced-rank regression in both metrics."""
        return LowRank(*task.low_rank(self.rank, self.weighted))

    def parts(self, task: Regression) -> tuple[Tensor, Tensor]:
        return task.components(self.rank, self.weighted)[:2]
