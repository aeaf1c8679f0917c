"""The dense weight in few bits, every number by itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from slrprop.factors import Dense, Table
from slrprop.methods.base import Decision, Method, Problem, Settings
from slrprop.operators import Lookup, Operator


@dataclass(frozen=True, kw_only=True)
class RTNSettings(Settings):
    """Round to nearest: the dense weight in 8 or 4 bits, without data (``dense`` makes errors compensate on the data)."""

    bits: int = 8

    source: ClassVar[str] = "the baseline of Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023"

    def stored_numbers(self, m: int, n: int) -> int:
        return m * n

    def treats(self, operator: Operator) -> bool:
        return True

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        return [{}]


def decide(problem: Problem, layers: tuple[str, ...], settings: RTNSettings) -> Iterator[Decision]:
    """Every layer by itself; the numbers are rounded when the decision becomes a plan."""
    for name in layers:
        form = Table if isinstance(problem.network.operator(name), Lookup) else Dense
        yield Decision(name, form(problem.weight(name)))


METHOD = Method("rtn", RTNSettings, decide)
