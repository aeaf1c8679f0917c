"""Low rank fitted to calibration data."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from slrprop.fit.regression import Regression
from slrprop.forms import LowRank
from slrprop.methods.base import RankSettings
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.operators import Operator


@dataclass(frozen=True, kw_only=True)
class LowRankSettings(RankSettings, CalibratedSettings):
    """Low rank of least error on the data, outputs weighed by what they do to the network's.

    Args:
        metric: ``two_sided`` weighs inputs by their covariance and outputs by the Gauss-Newton metric; ``inputs`` all
            outputs alike (whitened SVD).
    """

    metric: Literal["two_sided", "inputs"] = "two_sided"

    source: ClassVar[str] = (
        "Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025; Hsu et al., FWSVD, ICLR 2022"
    )

    def treats(self, operator: Operator) -> bool:
        return not operator.bits_only

    @property
    def weighted(self) -> bool:
        return self.metric == "two_sided"

    def parts(self, task: Regression) -> tuple[Tensor, Tensor]:
        return task.components(self.rank, self.weighted)[:2]

    def stored_numbers(self, m: int, n: int) -> int:
        return self.rank * (m + n)


def fit(task: Regression, settings: LowRankSettings) -> LowRank:
    """Reduced-rank regression in both metrics."""
    return LowRank(*task.low_rank(settings.rank, settings.weighted))


METHOD = calibrated("low_rank", LowRankSettings, fit)
