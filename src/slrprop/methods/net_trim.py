"""Net-Trim: the sparsest weight, by its convex relaxation, that keeps a layer's response."""

from slrprop.fit.admm import soft_threshold
from slrprop.forms import Sparse
from slrprop.methods.constrained import ConstrainedSettings


class NetTrimSettings(ConstrainedSettings):
    """Net-Trim: the least sum of magnitudes under a bound on the change of the outputs (size only: no faster)."""

    source = "Aghasi, Abdi, Nguyen, Romberg, NIPS 2017; SIAM J. Math. Data Sci. 2, 2020"
    proximal, form_of = staticmethod(soft_threshold), staticmethod(Sparse.of)
