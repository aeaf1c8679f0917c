"""Nested sparse low rank: every neuron has one of several ranks, every block is refitted."""

from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from slrprop.checks import Times, require_choice
from slrprop.fit.regression import Regression
from slrprop.fit.sparsity import largest
from slrprop.forms import SparseLowRank
from slrprop.methods.base import WIDEST, RankSettings, grid
from slrprop.methods.calibrated import CalibratedSettings
from slrprop.methods.refit import Refit, thin

WIDE = 512


class Level(NamedTuple):
    """A block: the shares of all inputs and outputs that take part in it, and its share of the rank."""

    rows: float
    columns: float
    rank: float


SHAPES: dict[str, tuple[Level, ...]] = {
    "half": (Level(1, 1, 0.25), Level(0.5, 0.5, 0.75)),
    "half-late": (Level(1, 1, 0.1), Level(0.5, 0.5, 0.9)),
    "third": (Level(1, 1, 0.2), Level(0.3, 0.3, 0.8)),
    "quarter": (Level(1, 1, 0.2), Level(0.25, 0.5, 0.8)),
    "three": (Level(1, 1, 0.2), Level(0.5, 0.5, 0.3), Level(0.25, 0.25, 0.5)),
    "three-wide": (Level(1, 1, 0.1), Level(0.5, 0.7, 0.4), Level(0.25, 0.35, 0.5)),
    "four": (Level(1, 1, 0.1), Level(0.5, 0.5, 0.2), Level(0.25, 0.25, 0.3), Level(0.125, 0.125, 0.4)),
}


class NestedSettings(RankSettings, CalibratedSettings):
    """Nested sparse low rank: several ranks per neuron, sets chosen by the residual, blocks refitted in turn.

    Args:
        rank: of a neuron that takes part in every block; a level has at least rank 1.
        shape: the levels' shares of inputs, outputs and rank, see ``slrprop.methods.nested.SHAPES``.
        sweeps: how often every block is refitted with the others fixed.
    """

    shape: Annotated[str, partial(require_choice, choices=SHAPES)] = "four"
    sweeps: Times = 6

    source = "slrprop, 2026; from SLR (Swaminathan et al. 2020) and reduced-rank regression"
    weighs = True

    def sizes(self, m: int, n: int) -> list[tuple[int, int, int]]:
        """Inputs, outputs and rank of every level of an m x n weight."""
        sides = [
            (max(1, int(level.rows * m)), max(1, int(level.columns * n)), level.rank) for level in SHAPES[self.shape]
        ]
        return [(r, c, min(max(1, round(share * self.rank)), r, c)) for r, c, share in sides]

    def stored_numbers(self, m: int, n: int) -> int:
        return sum(rank * (rows + columns) for rows, columns, rank in self.sizes(m, n))

    def refusal(self, m: int, n: int) -> str:
        return ""  # a level's rank is cut where its block is smaller

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        """Coarse for layers of more than ``WIDE`` neurons on a side; beyond ``WIDEST`` only of few numbers."""
        if max(m, n) <= WIDE:
            ranks, most = grid(4 * min(m, n)), m * n - 1
        else:
            ranks, most = [2**k for k in range(2, 12)], m * n // 4
        if max(m, n) > WIDEST:
            ranks, most = [rank for rank in ranks if thin(rank, m, n)], m * n // 32
        return [{"rank": rank} for rank in ranks if cls(rank=rank).stored_numbers(m, n) <= most]

    def fit(self, task: Regression) -> SparseLowRank:
        """Levels from the widest to the narrowest; sets by the residual; then sweeps."""
        m, n = task.weight.shape
        refit = Refit(task, self.rank)
        rows, columns = torch.arange(m), torch.arange(n)
        for index, (row_count, column_count, rank) in enumerate(self.sizes(m, n)):
            if index:
                row_scores, column_scores = refit.scores()
                rows = chosen(row_scores, rows, row_count, task.operator.unit)
                columns = chosen(column_scores, columns, column_count)
            refit.add(rows, columns, rank)
        return refit.factors(self.sweeps)


def chosen(scores: Tensor, among: Tensor, count: int, unit: int = 1) -> Tensor:
    """The ``count`` neurons of highest score among some, ascending, in whole channels of ``unit`` rows, one at least; ties fall to the lower index."""
    channels = among[::unit] // unit
    kept = channels[largest(scores.unflatten(0, (-1, unit)).sum(1)[channels], max(1, count // unit))]
    return (kept[:, None] * unit + torch.arange(unit)).flatten()
