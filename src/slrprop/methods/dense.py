"""The dense weight itself, in few bits or refitted."""

from dataclasses import dataclass
from typing import Any, ClassVar

from slrprop.factors import Dense, Table
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.operators import Lookup, Operator
from slrprop.regression import Regression


@dataclass(frozen=True, kw_only=True)
class DenseSettings(CalibratedSettings):
    """Dense weight in 8 or 4 bits, rounded so that errors compensate each other on the data."""

    bits: int = 8

    source: ClassVar[str] = "Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023"

    def stored_numbers(self, m: int, n: int) -> int:
        return m * n

    def treats(self, operator: Operator) -> bool:
        return True

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        return [{}]


def fit(task: Regression, settings: DenseSettings) -> Dense:
    """The layer's least-squares weight."""
    return (Table if isinstance(task.operator, Lookup) else Dense)(task.weight)


METHOD = calibrated("dense", DenseSettings, fit)
