"""Convolutions as two of one side each, fitted to calibration data."""

from typing import Any

from slrprop.checks import Times
from slrprop.fit.regression import Regression
from slrprop.fit.sides import Sides
from slrprop.forms import Spatial
from slrprop.methods.base import RankSettings, grid
from slrprop.methods.calibrated import CalibratedSettings
from slrprop.operators import Convolution, Operator


class SpatialSettings(RankSettings, CalibratedSettings):
    """A k x l convolution as a k x 1 one and a 1 x l one, the second fitted to what the first really gives.

    Args:
        rank: channels between the two.
        sweeps: how often the first is fitted anew to the second, and the second to it.
    """

    sweeps: Times = 2
    kernel: tuple[int, ...] = (3, 3)

    source = "Jaderberg, Vedaldi, Zisserman, BMVC 2014; the refit: slrprop, 2026"
    weighs = True

    def treats(self, operator: Operator) -> bool:
        convolution = super().treats(operator) and isinstance(operator, Convolution) and len(operator.kernel) == 2
        return convolution and min(operator.kernel) > 1

    def stored_numbers(self, m: int, n: int) -> int:
        return self.rank * (m // self.kernel[1] + self.kernel[1] * n)

    def refusal(self, m: int, n: int) -> str:
        most = min(m // self.kernel[1], self.kernel[1] * n)
        return f"rank {self.rank} is above its smaller side {most}" if self.rank > most else ""

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        return [{"rank": rank} for rank in grid(int((m * n) ** 0.5 / 2))]

    def fit(self, task: Regression) -> Spatial:
        """From the principal rows of both sides, in turn."""
        high, wide = task.operator.kernel
        sides = Sides.of(task, high, wide)
        first = sides.start(self.rank)
        second = sides.second(first)
        for _ in range(self.sweeps):
            first = sides.first(first, second)
            second = sides.second(first)
        size = (first.norm(dim=0) / second.unflatten(0, (-1, wide)).flatten(1).norm(dim=1)).clamp(1e-8, 1e8).sqrt()
        return Spatial((high, wide), first / size, second * size.repeat_interleave(wide)[:, None])
