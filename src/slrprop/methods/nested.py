"""Nested sparse low rank: every neuron has one of several ranks, every block is refitted."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from slrprop.checks import require_choice, require_count
from slrprop.factors import SparseLowRank
from slrprop.linalg import balanced, principal, projected
from slrprop.methods.base import RankSettings, grid
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.regression import Regression

WIDE, WIDEST = 512, 1536
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
        require_count("sweeps", self.sweeps, 0)
        object.__setattr__(self, "sweeps", int(self.sweeps))  # numpy's numbers are no JSON

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
        """Coarse for layers of more than ``WIDE`` neurons on a side, empty beyond ``WIDEST``: a fit there takes minutes."""
        if max(m, n) > WIDEST:
            return []
        wide = max(m, n) > WIDE
        ranks = [2**k for k in range(2, 12)] if wide else grid(4 * min(m, n))
        most = m * n // 4 if wide else m * n - 1
        return [{"rank": rank} for rank in ranks if cls(rank=rank).stored_numbers(m, n) <= most]


class Frame:
    """Where a block stands, and how what is to be fitted is projected onto it in the metric of inputs and outputs.

    ``rows`` and ``columns`` are ascending.
    """

    def __init__(self, task: Regression, covariance: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns
        metric, self.root, self.weigh = task.metric, task.root, None
        self.narrow, self.low = len(columns) < len(task.target_mean), len(rows) < len(covariance)
        if self.narrow and metric is not None:
            own = metric[columns][:, columns]
            self.root = torch.linalg.cholesky(own)
            self.weigh = torch.cholesky_solve(metric[columns], self.root).T.contiguous()
        self.across = covariance[rows] if self.low else covariance
        self.covariance = self.across[:, rows] if self.low else covariance
        self.factor = torch.linalg.cholesky(self.covariance) if self.low else None
        self.directions: Tensor | None = None  # of the weighed output, of the last fit

    def fitted(self, rest: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors for a rest (m x n): its projection onto the block, then reduced rank."""
        target = rest if not self.narrow else rest[:, self.columns] if self.weigh is None else rest @ self.weigh
        if self.factor is not None:
            target = torch.cholesky_solve(self.across @ target, self.factor)
        self.directions = principal(target, self.covariance, self.root, rank, self.directions)
        return projected(target, self.root, self.directions)


class Refit:
    """Blocks fitted one after the other to what the rest leaves."""

    def __init__(self, task: Regression) -> None:
        self.task = task
        self.covariance = task.damped(BLOCK_DAMPING)
        self.rest = task.weight.clone()
        self.blocks: list[tuple[Frame, Tensor, Tensor]] = []

    def add(self, rows: Tensor, columns: Tensor, rank: int) -> None:
        """One more block."""
        frame = Frame(self.task, self.covariance, rows, columns)
        whole = not self.blocks and not frame.narrow and not frame.low
        self._place(frame, *(self.task.low_rank(rank) if whole else frame.fitted(self.rest, rank)))

    def _place(self, frame: Frame, left: Tensor, right: Tensor) -> None:
        self.blocks.append((frame, left, right))
        self.rest[frame.rows[:, None], frame.columns] -= left @ right

    def sweep(self) -> None:
        """Fit every block anew, the others fixed."""
        blocks, self.blocks = self.blocks, []
        for frame, left, right in blocks:
            self.rest[frame.rows[:, None], frame.columns] += left @ right
            self._place(frame, *frame.fitted(self.rest, left.shape[1]))

    def factors(self) -> SparseLowRank:
        """The blocks as one form."""
        m, n = self.rest.shape
        row_levels, column_levels = torch.zeros(m, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        for frame, _, _ in self.blocks:
            row_levels[frame.rows] += 1
            column_levels[frame.columns] += 1
        pairs = [balanced(left, right) for _, left, right in self.blocks]
        return SparseLowRank(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), row_levels, column_levels)


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
