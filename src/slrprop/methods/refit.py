"""Blocks of a weight, ``sum_g E(R_g) A_g B_g E(C_g)``, each fitted to what the others leave."""

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from slrprop.fit.regression import Regression, level
from slrprop.forms import SparseLowRank
from slrprop.linalg import balanced, principal, projected, top_eigenvectors

THIN = 256  # neurons on a side, from where on only the principal part of a weight is fitted
COMPONENTS = 4  # times the rank: what is fitted of a wide weight
BLOCK_DAMPING = 1e-6  # of the covariance, times its mean variance: a block's own part of it is inverted


def thin(rank: int, m: int, n: int) -> bool:
    """Whether blocks of a rank in all are fitted to the principal part of a wide weight, ``COMPONENTS`` times that rank of it."""
    return max(m, n) > THIN and 2 * COMPONENTS * rank < min(m, n)


class Term(NamedTuple):
    """A product of thin matrices that is a part of a wide weight, and both in the metrics of inputs and outputs."""

    left: Tensor  # (m, j)
    covered: Tensor  # covariance @ left (m, j)
    right: Tensor  # (j, n)
    weighed: Tensor  # metric @ right.T (n, j)


class Seen(NamedTuple):
    """A term projected onto a block of r inputs and c outputs."""

    left: Tensor  # (r, j)
    covered: Tensor  # the block's covariance @ left (r, j)
    turned: Tensor  # root.T @ right.T (c, j), root: the Cholesky factor of the block's metric


class Frame:
    """Where a block stands, and how what is to be fitted is projected onto it in the metric of inputs and outputs.

    ``rows`` and ``columns`` are ascending.
    """

    def __init__(self, task: Regression, covariance: Tensor, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns
        self.root, self.weigh = task.root, task.metric
        self.narrow, self.low = len(columns) < len(task.target_mean), len(rows) < len(covariance)
        if self.narrow and task.metric is not None:
            self.weigh = task.metric[:, columns]
            self.root = torch.linalg.cholesky(self.weigh[columns])
        self.across = covariance[rows] if self.low else covariance
        self.covariance = self.across[:, rows] if self.low else covariance
        self.factor = torch.linalg.cholesky(self.covariance) if self.low else None
        self.directions: Tensor | None = None  # of the weighed output, of the last fit

    def fitted(self, rest: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors for a rest (m x n): its projection onto the block, then reduced rank."""
        if self.narrow and self.weigh is not None:
            assert self.root is not None  # times the inverse of the metric among the block's columns
            rest = torch.cholesky_solve((rest @ self.weigh).T, self.root).T
        elif self.narrow:
            rest = rest[:, self.columns]
        if self.factor is not None:
            rest = torch.cholesky_solve(self.across @ rest, self.factor)
        self.directions = principal(rest, self.covariance, self.root, rank, self.directions)
        return projected(rest, self.root, self.directions)

    def seen(self, term: Term) -> Seen:
        """A term's projection onto the block."""
        covered, turned = term.covered[self.rows], term.weighed[self.columns]
        left = term.left if self.factor is None else torch.cholesky_solve(covered, self.factor)
        if self.root is not None:
            turned = torch.linalg.solve_triangular(self.root, turned, upper=False)
        return Seen(left, covered, turned)

    def fitted_to_sum(self, seen: list[Seen], rank: int) -> tuple[Tensor, Tensor]:
        """The best factors for a sum of terms, as :meth:`fitted` but without a product of two wide matrices."""
        left, covered, turned = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))

        def apply(v: Tensor) -> Tensor:
            return turned @ (covered.T @ (left @ (turned.T @ v)))

        self.directions = top_eigenvectors(apply, len(self.columns), rank, left.dtype, self.directions)
        right = self.directions.T
        if self.root is not None:
            right = torch.linalg.solve_triangular(self.root, right, upper=False, left=False)
        return left @ (turned.T @ self.directions), right


@dataclass(eq=False)
class Block:
    """Form (r x k) and (k x c), and where they stand."""

    frame: Frame
    left: Tensor
    right: Tensor


class Refit:
    """Blocks fitted one after the other to what the others leave of a weight."""

    def __init__(self, task: Regression) -> None:
        self.task = task
        self.covariance = task.damped(BLOCK_DAMPING)
        self.blocks: list[Block] = []

    def add(self, rows: Tensor, columns: Tensor, rank: int) -> None:
        """One more block."""
        frame = Frame(self.task, self.covariance, rows, columns)
        whole = not self.blocks and not frame.narrow and not frame.low
        self.blocks.append(Block(frame, *(self.task.low_rank(rank) if whole else self._fitted(frame, rank))))

    def sweep(self) -> None:
        """Fit every block anew, the others fixed."""
        for index, block in enumerate(self.blocks):
            self.blocks[index] = Block(block.frame, *self._fitted(block.frame, block.left.shape[1]))

    def scores(self) -> tuple[Tensor, Tensor]:
        """Of inputs (m,) and outputs (n,): the weighed square of what the blocks leave there, inputs over what they vary by alone."""
        rest, metric = self._rest(), self.task.metric
        rows = rest.square() if metric is None else rest * (rest @ metric)
        columns = (rest * (self.task.covariance @ rest)).sum(0)
        return rows.sum(1) / self.task.freedom, columns if metric is None else columns * metric.diagonal()

    def factors(self) -> SparseLowRank:
        """The blocks as one form."""
        m, n = self.task.weight.shape
        row_levels, column_levels = torch.zeros(m, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        for block in self.blocks:
            row_levels[block.frame.rows] += 1
            column_levels[block.frame.columns] += 1
        pairs = [balanced(block.left, block.right) for block in self.blocks]
        return SparseLowRank(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), row_levels, column_levels)

    def _fitted(self, frame: Frame, rank: int) -> tuple[Tensor, Tensor]:
        return frame.fitted(self._rest(frame), rank)

    def _rest(self, but: Frame | None = None) -> Tensor:
        """What the blocks leave, or all but one of them."""
        rest = self.task.weight.clone()
        for block in self.blocks:
            if block.frame is not but:
                rest[block.frame.rows[:, None], block.frame.columns] -= block.left @ block.right
        return rest


class WideRefit(Refit):
    """The same for a wide weight, of which only the principal part is fitted: no step multiplies two wide matrices."""

    def __init__(self, task: Regression, rank: int) -> None:
        super().__init__(task)
        part = task.components(COMPONENTS * rank)
        covered = task.covered(COMPONENTS * rank) + BLOCK_DAMPING * level(task.covariance) * part.left
        weighed = part.vectors if task.root is None else task.root @ part.vectors
        self.principal = Term(part.left, covered, part.right, weighed)
        self._seen: dict[Frame, Seen] = {}  # the principal part by the blocks' frames
        self._terms: WeakKeyDictionary[Block, Term] = WeakKeyDictionary()  # what the blocks take off it

    def scores(self) -> tuple[Tensor, Tensor]:
        left, covered, right, weighed = zip(*self._sum(), strict=True)
        rows, columns, metric = torch.cat(left, 1), torch.cat(right), self.task.metric
        inputs = (rows @ (columns @ torch.cat(weighed, 1))) * rows
        outputs = (((rows.T @ torch.cat(covered, 1)) @ columns) * columns).sum(0)
        return inputs.sum(1) / self.task.freedom, outputs if metric is None else outputs * metric.diagonal()

    def _fitted(self, frame: Frame, rank: int) -> tuple[Tensor, Tensor]:
        if frame not in self._seen:
            self._seen[frame] = frame.seen(self.principal)
        return frame.fitted_to_sum([self._seen[frame], *map(frame.seen, self._sum(frame)[1:])], rank)

    def _sum(self, but: Frame | None = None) -> list[Term]:
        """The principal part and what the blocks, or all but one of them, take off it."""
        return [self.principal, *(self._term(block) for block in self.blocks if block.frame is not but)]

    def _term(self, block: Block) -> Term:
        if block not in self._terms:
            m, n = self.task.weight.shape
            frame, taken = block.frame, -block.right
            left = taken.new_zeros(m, len(taken)).index_copy(0, frame.rows, block.left)
            right = taken.new_zeros(len(taken), n).index_copy(1, frame.columns, taken)
            weighed = right.T if frame.weigh is None else frame.weigh @ taken.T
            self._terms[block] = Term(left, frame.across.T @ block.left, right, weighed)
        return self._terms[block]


def refit_of(task: Regression, rank: int) -> Refit:
    """What fits blocks of a rank in all to a layer."""
    return WideRefit(task, rank) if thin(rank, *task.weight.shape) else Refit(task)
