"""Low rank fitted to calibration data."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from slrprop.checks import require_choice
from slrprop.factors import LowRank
from slrprop.methods.base import Check, RankSettings
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.operators import Operator
from slrprop.regression import Regression


@dataclass(frozen=True, kw_only=True)
class LowRankSettings(RankSettings, CalibratedSettings):
    """Low rank of least error on the data, outputs weighed by what they do to the network's.

    Args:
        metric: ``two_sided`` weighs inputs by their covariance and outputs by the Gauss-Newton metric; ``inputs`` all
            outputs alike (whitened SVD).
    """

    metric: str = "two_sided"

    source: ClassVar[str] = (
        "Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM, ICLR 2025; Hsu et al., FWSVD, ICLR 2022"
    )

    checks: ClassVar[dict[str, Check]] = {"metric": partial(require_choice, choices=("two_sided", "inputs"))}

    def treats(self, operator: Operator) -> bool:
        return not operator.bits_only

    @property
    def weighted(self) -> bool:
        return self.metric == "two_sided"

    def stored_numbers(self, m: int, n: int) -> int:
        return self.rank * (m + n)


def fit(task: Regression, settings: LowRankSettings) -> LowRank:
    """Reduced-rank regression in both metrics."""
    return LowRank(*task.low_rank(settings.rank, settings.weighted))


METHOD = calibrated("low_rank", LowRankSettings, fit)
