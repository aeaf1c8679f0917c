"""Net-Trim: the sparsest weight, by its convex relaxation, that keeps a layer's response."""

from slrprop.fit.admm import soft_threshold
from slrprop.fit.regression import Regression
from slrprop.forms import Fit, Sparse
from slrprop.methods.constrained import ConstrainedSettings, constrained


class NetTrimSettings(ConstrainedSettings):
    """Net-Trim: the least sum of magnitudes under a bound on the change of the outputs (size only: no faster)."""

    source = "Aghasi, Abdi, Nguyen, Romberg, NIPS 2017; SIAM J. Math. Data Sci. 2, 2020"

    def fit(self, task: Regression) -> Fit:
        """The weights that the soft threshold left."""
        return constrained(task, self, soft_threshold, Sparse.of)
