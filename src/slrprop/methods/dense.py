"""The dense weight itself, in few bits or refitted."""

from slrprop.fit.regression import Regression
from slrprop.forms import Dense, Table
from slrprop.methods.base import WholeSettings
from slrprop.methods.calibrated import CalibratedSettings
from slrprop.operators import Lookup


class DenseSettings(WholeSettings, CalibratedSettings):
    """Dense weight in 8 or 4 bits, rounded so that errors compensate each other on the data."""

    source = "Frantar, Ashkboos, Hoefler, Alistarh, GPTQ, ICLR 2023"

    def fit(self, task: Regression) -> Dense:
        """The layer's least-squares weight."""
        return (Table if isinstance(task.operator, Lookup) else Dense)(task.weight)
