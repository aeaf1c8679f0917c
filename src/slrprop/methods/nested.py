"""Nested sparse low rank: every neuron has one of several ranks, every block is refitted."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from slrprop.checks import require_choice
from slrprop.errors import SlrpropError
from slrprop.factors import SparseLowRank
from slrprop.linalg import reduced_rank
from slrprop.methods.base import RankSettings, grid
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.regression import Regression

WIDEST = 1536
BLOCK_DAMPING = 1e-6  # of the covariance, times its mean variance: a block's own part of it is inverted


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


@dataclass(frozen=True, kw_only=True)
class NestedSettings(RankSettings, CalibratedSettings):
    """Nested sparse low rank: several ranks per neuron, sets chosen by the residual, blocks refitted in turn.

    Args:
        rank: of a neuron that takes part in every block; a level has at least rank 1.
        shape: the levels' shares of inputs, outputs and rank, see ``slrprop.methods.nested.SHAPES``.
        sweeps: how often every block is refitted with the others fixed.
    """

    shape: str = "four"
    sweeps: int = 6

    source: ClassVar[str] = "slrprop, 2026; from SLR (Swaminathan et al. 2020) and reduced-rank regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("shape", self.shape, SHAPES)
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise SlrpropError(f"sweeps must be a whole number from 0, got {self.sweeps!r}")

    @property
    def weighted(self) -> bool:
        return True

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
        """Empty for layers of more than ``WIDEST`` neurons on a side: a fit there takes minutes."""
        ranks = grid(4 * min(m, n)) if max(m, n) <= WIDEST else []
        return [{"rank": rank} for rank in ranks if cls(rank=rank).stored_numbers(m, n) < m * n]


class Block(NamedTuple):
    """Rows and columns of a block (ascending), and its factors."""

    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor


class Refit:
    """Blocks fitted one after the other to what the rest leaves, in the metric of inputs and outputs."""

    def __init__(self, task: Regression) -> None:
        self.task = task
        self.covariance = task.damped(BLOCK_DAMPING)
        self.rest = task.weight.clone()
        self.blocks: list[Block] = []

    def fitted(self, rows: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of one block for the present rest: its projection onto the block, then reduced rank."""
        m, n = self.rest.shape
        metric, target, covariance = self.task.metric, self.rest, self.covariance
        if len(columns) < n:
            weigh = None if metric is None else torch.linalg.solve(metric[columns][:, columns], metric[columns])
            target = target[:, columns] if weigh is None else target @ weigh.T
            metric = None if metric is None else metric[columns][:, columns]
        if len(rows) < m:
            target = covariance[rows] @ target
            covariance = covariance[rows][:, rows]
            target = torch.cholesky_solve(target, torch.linalg.cholesky(covariance))
        if metric is not None:
            metric = self.task.root if len(columns) == n else torch.linalg.cholesky(metric)
        return reduced_rank(target, covariance, metric, rank)

    def add(self, rows: Tensor, columns: Tensor, rank: int) -> None:
        """One more block."""
        whole = not self.blocks and (len(rows), len(columns)) == tuple(self.rest.shape)
        left, right = self.task.low_rank(rank) if whole else self.fitted(rows, columns, rank)
        self.blocks.append(Block(rows, columns, left, right))
        self.rest[rows[:, None], columns] -= left @ right

    def sweep(self) -> None:
        """Fit every block anew, the others fixed."""
        for index, (rows, columns, left, right) in enumerate(self.blocks):
            self.rest[rows[:, None], columns] += left @ right
            left, right = self.fitted(rows, columns, left.shape[1])
            self.blocks[index] = Block(rows, columns, left, right)
            self.rest[rows[:, None], columns] -= left @ right

    def factors(self) -> SparseLowRank:
        """The blocks as one form."""
        m, n = self.rest.shape
        row_levels, column_levels = torch.zeros(m, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        for block in self.blocks:
            row_levels[block.rows] += 1
            column_levels[block.columns] += 1
        return SparseLowRank(
            tuple(b.left for b in self.blocks), tuple(b.right for b in self.blocks), row_levels, column_levels
        )


def largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` neurons of highest score among some, ascending; ties fall to the lower index."""
    return among[scores[among].argsort(descending=True, stable=True)[:count]].sort().values


def fit(task: Regression, settings: NestedSettings) -> SparseLowRank:
    """Levels from the widest to the narrowest; sets by the residual; then sweeps."""
    m, n = task.weight.shape
    refit = Refit(task)
    rows, columns = torch.arange(m), torch.arange(n)
    root, freedom = task.root, task.freedom
    for index, (row_count, column_count, rank) in enumerate(settings.sizes(m, n)):
        if index:
            rest = refit.rest
            row_scores = (rest if root is None else rest @ root).square().sum(1) / freedom
            column_scores = (rest * (task.covariance @ rest)).sum(0)
            if task.metric is not None:
                column_scores = column_scores * task.metric.diagonal()
            rows, columns = largest(row_scores, rows, row_count), largest(column_scores, columns, column_count)
        refit.add(rows, columns, rank)
    for _ in range(settings.sweeps if len(refit.blocks) > 1 else 0):
        refit.sweep()
    return refit.factors()


METHOD = calibrated("nested", NestedSettings, fit)
