"""What Net-Trim and DDLR share: settings, and the fit of one layer under constraints on its response."""

from typing import Any, ClassVar

from slrprop.checks import Count, Positive
from slrprop.fit.admm import Programme, solve
from slrprop.fit.regression import Regression
from slrprop.forms import Bias, Fit
from slrprop.methods.calibrated import CalibratedSettings


class ConstrainedSettings(CalibratedSettings):
    """Settings of methods that bound the change of a layer's outputs and let the data decide the size.

    Args:
        gain: the bound, as a share of the outputs' Frobenius norm.
        rho: where the penalty of the iteration starts, see :func:`slrprop.fit.admm.solve`.
        iterations: limit of the iteration.
        sequential: False is the articles' parallel scheme, every layer on the original inputs; True is Net-Trim's cascade:
            layers behind compressed ones are held to 1.05 times the error that the original weight makes there.
        bias_correction: off, since the programme has its own bias: behind a ReLU the mean pre-activation means nothing.
    """

    gain: Positive = 0.2
    rho: Positive = 1.0
    iterations: Count = 1000
    sequential: bool = False
    bias_correction: bool = False
    refit_head: bool = False

    rungs = ("gain", (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02))
    proximal: ClassVar[Any]  # a :data:`slrprop.fit.admm.Proximal`
    form_of: ClassVar[Any]  # what makes a form of the weight that the programme ends with

    def stored_numbers(self, m: int, n: int) -> None:
        """Not known before the data are seen."""

    def fit(self, task: Regression) -> Fit:
        """The solution of a layer's programme as a form with its bias.

        Its notes say how far they are outside the constraints (shares of ``||Y||_F``), before any rounding to few bits.
        """
        x, z = task.samples()
        if self.sequential:
            programme = Programme.cascade(x, z, task.relu, self.gain, x @ task.original + task.bias)
        else:
            programme = Programme.parallel(x, z, task.relu, self.gain)
        solution = solve(programme, self.proximal, self.rho, self.iterations)
        form = self.form_of(solution.weight)
        error, ceiling = programme.violation(form.dense(), solution.bias)
        notes = {
            "error_violation": error,
            "ceiling_violation": ceiling,
            "iterations": float(solution.iterations),
            "converged": float(solution.converged),
        }
        return Fit(form, Bias(solution.bias), notes)
