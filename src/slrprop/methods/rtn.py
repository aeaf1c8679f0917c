"""The dense weight in few bits, every number by itself."""

from collections.abc import Iterator

from slrprop.forms import Dense, Fit, Table
from slrprop.methods.base import Decision, Method, Problem, WholeSettings
from slrprop.operators import Lookup


class RTNSettings(WholeSettings):
    """Round to nearest: the dense weight in 8 or 4 bits, without data (``dense`` makes errors compensate on the data)."""

    source = "the baseline of Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023"


def decide(problem: Problem, layers: tuple[str, ...], settings: RTNSettings) -> Iterator[Decision]:
    """Every layer by itself; the numbers are rounded when the decision becomes a plan."""
    for name in layers:
        form = Table if isinstance(problem.network.operator(name), Lookup) else Dense
        yield Decision(name, Fit(form(problem.weight(name))))


METHOD = Method("rtn", RTNSettings, decide)
