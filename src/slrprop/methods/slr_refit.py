"""SLR's pattern with refitted factors: the two-level case of nested sparse low rank."""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from slrprop.checks import Times
from slrprop.fit.regression import Regression
from slrprop.forms import Quantized, SparseLowRank
from slrprop.methods.base import Decision, Problem
from slrprop.methods.calibrated import CalibratedMethod, CalibratedSettings, Fitting, in_order
from slrprop.methods.refit import Refit
from slrprop.methods.slr import SLRSettings, kept_of, scores_of
from slrprop.plan import LayerPlan


class SLRRefitSettings(SLRSettings, CalibratedSettings):
    """SLR with its factors refitted to the data: neurons are shortened as in SLR, then both blocks fit in turn.

    Args:
        sweeps: how often both blocks are refitted.
    """

    order: Literal["independent"] = "independent"  # costs are of the original network
    sweeps: Times = 10

    source = "Swaminathan, Garg, Kannan, Andres, Neurocomputing 398, 2020, for the pattern; refit: slrprop, 2026"
    weighs = True
    rebuilt = False
    by_settings = False

    def needs(self) -> tuple[str, ...]:
        return (*SLRSettings.needs(self), *CalibratedSettings.needs(self))

    def decide(self, problem: Problem, layers: tuple[str, ...]) -> Iterator[Decision]:
        """Patterns by the criterion on the original network, then factors in order of execution."""
        chosen = {}
        for name in layers:
            rows, columns = kept_of(problem, name, self, scores_of(problem, name, self))
            chosen[name] = (
                CalibratedMethod(self.called(), type(self), partial(refitted, rows=rows, columns=columns)),
                self,
            )
        yield from in_order(problem, chosen)

    @classmethod
    def fit_of(cls, layer: LayerPlan) -> Fitting:
        """The fit with the pattern of a planned layer."""
        form = layer.factors.codes if isinstance(layer.factors, Quantized) else layer.factors
        assert isinstance(form, SparseLowRank)
        rows, columns = (levels == len(form.left) for levels in (form.row_levels, form.column_levels))
        return partial(refitted, rows=rows, columns=columns)


def refitted(task: Regression, settings: SLRRefitSettings, rows: Tensor, columns: Tensor) -> SparseLowRank:
    """Factors of SLR's pattern; masks (m,) and (n,) say who keeps the full rank."""
    m, n = task.weight.shape
    refit, short = Refit(task, settings.rank), settings.reduced_rank
    sets = [(torch.arange(m), torch.arange(n), short)] if short else []
    kept_rows, kept_columns = (mask.nonzero()[:, 0] for mask in (rows, columns))
    rest = min(settings.rank - short, len(kept_rows), len(kept_columns))
    for block in [*sets, (kept_rows, kept_columns, rest)]:
        refit.add(*block)
    return refit.factors(settings.sweeps)
