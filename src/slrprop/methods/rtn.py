"""The dense weight in few bits, every number by itself."""

from slrprop.forms import Dense, Table
from slrprop.methods.base import Problem, WholeSettings
from slrprop.operators import Lookup


class RTNSettings(WholeSettings):
    """Round to nearest: the dense weight in 8 or 4 bits, without data (``dense`` makes errors compensate on the data)."""

    source = "the baseline of Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023"

    def alone(self, problem: Problem, name: str) -> Dense:
        """The numbers are rounded when the decision becomes a plan."""
        return (Table if isinstance(problem.network.operator(name), Lookup) else Dense)(problem.weight(name))
