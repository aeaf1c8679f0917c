"""Nested sparse low rank: every neuron has one of several ranks, every block is refitted."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from slrprop.checks import require_choice, require_count
from slrprop.factors import SparseLowRank
from slrprop.linalg import Product, balanced, principal, projected
from slrprop.methods.base import WIDEST, RankSettings, grid
from slrprop.methods.calibrated import CalibratedSettings, calibrated
from slrprop.regression import Regression

WIDE = 512
COMPONENTS = 4  # times the rank: what is fitted of a wide layer
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
        """Coarse for layers of more than ``WIDE`` neurons on a side; beyond ``WIDEST`` only of few numbers."""
        if max(m, n) <= WIDE:
            ranks, most = grid(4 * min(m, n)), m * n - 1
        else:
            ranks, most = [2**k for k in range(2, 12)], m * n // 4
        if max(m, n) > WIDEST:
            ranks, most = [rank for rank in ranks if thin(rank, m, n)], m * n // 32
        return [{"rank": rank} for rank in ranks if cls(rank=rank).stored_numbers(m, n) <= most]


def thin(rank: int, m: int, n: int) -> bool:
    """Whether blocks of a rank in all are fitted to the principal part of a very wide weight, ``COMPONENTS`` times that rank of it."""
    return max(m, n) > WIDEST and 2 * COMPONENTS * rank < min(m, n)


class Frame:
    """Where a block stands, and how what is to be fitted is projected onto it in the metric of inputs and outputs.

    ``rows`` and ``columns`` are ascending.
    """

    def __init__(self, task: Regression, covariance: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns
        self.root, self.weigh = task.root, None
        self.narrow, self.low = len(columns) < len(task.target_mean), len(rows) < len(covariance)
        if self.narrow and task.metric is not None:
            self.weigh = task.metric[:, columns]
            self.root = torch.linalg.cholesky(self.weigh[columns])
        self.across = covariance[rows] if self.low else covariance
        self.covariance = self.across[:, rows] if self.low else covariance
        self.factor = torch.linalg.cholesky(self.covariance) if self.low else None
        self.directions: Tensor | None = None  # of the weighed output, of the last fit

    def fitted(self, rest: Product, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors for a rest (m x n): its projection onto the block, then reduced rank."""
        *before, last = rest
        if self.narrow:
            last = last[:, self.columns] if self.weigh is None else self._solved(last @ self.weigh)
        first, *after = (*before, last)
        if self.factor is not None:
            first = torch.cholesky_solve(self.across @ first, self.factor)
        target = (first, *after)
        self.directions = principal(target, self.covariance, self.root, rank, self.directions)
        return projected(target, self.root, self.directions)

    def _solved(self, weighed: Tensor) -> Tensor:
        """Times the inverse of the metric among the block's columns."""
        assert self.root is not None
        return torch.cholesky_solve(weighed.T, self.root).T


class Refit:
    """Blocks fitted one after the other to what the others leave.

    Of a wide weight only the principal part is fitted, if the blocks' ``rank`` is a small part of it (:func:`thin`): no step
    multiplies two wide matrices then.
    """

    def __init__(self, task: Regression, rank: int) -> None:
        self.task = task
        self.covariance = task.damped(BLOCK_DAMPING)
        self.target: Product = (task.weight,)
        if thin(rank, *task.weight.shape):
            self.target = task.low_rank(COMPONENTS * rank)
        self.blocks: list[tuple[Frame, Tensor, Tensor]] = []

    def rest(self, but: int | None = None) -> Product:
        """What the blocks leave, or all but one of them."""
        blocks = [block for index, block in enumerate(self.blocks) if index != but]
        if len(self.target) == 1:
            rest = self.target[0].clone()
            for frame, left, right in blocks:
                rest[frame.rows[:, None], frame.columns] -= left @ right
            return (rest,)
        (left, right), (m, n) = self.target, self.task.weight.shape
        lefts = [left, *(-left.new_zeros(m, a.shape[1]).index_copy(0, frame.rows, a) for frame, a, _ in blocks)]
        rights = [right, *(right.new_zeros(len(b), n).index_copy(1, frame.columns, b) for frame, _, b in blocks)]
        return torch.cat(lefts, 1), torch.cat(rights)

    def add(self, rows: Tensor, columns: Tensor, rank: int) -> None:
        """One more block."""
        frame = Frame(self.task, self.covariance, rows, columns)
        whole = not self.blocks and not frame.narrow and not frame.low
        self.blocks.append((frame, *(self.task.low_rank(rank) if whole else frame.fitted(self.rest(), rank))))

    def sweep(self) -> None:
        """Fit every block anew, the others fixed."""
        for index, (frame, left, _) in enumerate(self.blocks):
            self.blocks[index] = (frame, *frame.fitted(self.rest(index), left.shape[1]))

    def factors(self) -> SparseLowRank:
        """The blocks as one form."""
        m, n = self.task.weight.shape
        row_levels, column_levels = torch.zeros(m, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        for frame, _, _ in self.blocks:
            row_levels[frame.rows] += 1
            column_levels[frame.columns] += 1
        pairs = [balanced(left, right) for _, left, right in self.blocks]
        return SparseLowRank(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), row_levels, column_levels)


def largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` neurons of highest score among some, ascending; ties fall to the lower index."""
    return among[scores[among].argsort(descending=True, stable=True)[:count]].sort().values


def energies(product: Product, metric: Tensor) -> Tensor:
    """``t^T M t`` of every column t of a matrix."""
    *before, last = product
    for factor in before:
        metric = factor.T @ metric @ factor
    return (last * (metric @ last)).sum(0)


def fit(task: Regression, settings: NestedSettings) -> SparseLowRank:
    """Levels from the widest to the narrowest; sets by the residual; then sweeps."""
    m, n = task.weight.shape
    refit = Refit(task, settings.rank)
    rows, columns = torch.arange(m), torch.arange(n)
    weighing = torch.eye(n, dtype=torch.float64) if task.metric is None else task.metric
    for index, (row_count, column_count, rank) in enumerate(settings.sizes(m, n)):
        if index:
            rest = refit.rest()
            row_scores = energies(tuple(factor.T for factor in reversed(rest)), weighing) / task.freedom
            column_scores = energies(rest, task.covariance) * weighing.diagonal()
            rows, columns = largest(row_scores, rows, row_count), largest(column_scores, columns, column_count)
        refit.add(rows, columns, rank)
    for _ in range(settings.sweeps if len(refit.blocks) > 1 else 0):
        refit.sweep()
    return refit.factors()


METHOD = calibrated("nested", NestedSettings, fit)
