"""What the methods that keep single weights share: the density, and its ladder."""

from typing import Any

from slrprop.checks import Density
from slrprop.fit.sparsity import whole_share
from slrprop.methods.base import Settings


class DensitySettings(Settings):
    """Settings of methods that keep single weights.

    Args:
        density: share of the weights kept.
    """

    density: Density = 0.1

    def stored_numbers(self, m: int, n: int) -> int:
        return whole_share(m * n, self.density)

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        """1/2, 3/8, 1/4, 3/16, ... down to one weight for two outputs, ascending."""
        halves = (0.5**power * share for power in range(1, 40) for share in (1.0, 0.75))
        return [{"density": density} for density in sorted(halves) if density * m * n >= n / 2]
