"""Blocks of a weight, ``sum_g E(R_g) A_g B_g E(C_g)``, each fitted to what the others leave."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from slrprop.fit.regression import Regression, level
from slrprop.forms import SparseLowRank
from slrprop.linalg import balanced, top_eigenvectors

THIN = 256  # neurons on a side, from where on only the principal part of a weight is fitted
COMPONENTS = 4  # times the rank: what is fitted of a wide weight
BLOCK_DAMPING = 1e-6  # of the covariance, times its mean variance: a block's own part of it is inverted


def thin(rank: int, m: int, n: int) -> bool:
    """Whether blocks of a rank in all are fitted to the principal part of a wide weight, ``COMPONENTS`` times that rank of it."""
    return max(m, n) > THIN and 2 * COMPONENTS * rank < min(m, n)


class Term(NamedTuple):
    """A product that is a part of a weight, and both its factors in the metrics of inputs and outputs."""

    left: Tensor  # (m, j)
    covered: Tensor  # covariance @ left (m, j)
    right: Tensor  # (j, n)
    weighed: Tensor  # metric @ right.T (n, j)


class Seen(NamedTuple):
    """A term projected onto a block of r inputs and c outputs."""

    left: Tensor  # (r, j)
    covered: Tensor  # the block's covariance @ left (r, j)
    turned: Tensor  # root.T @ right.T (c, j), root: the Cholesky factor of the block's metric


class Block:
    """Factors ``left`` (r x k) and ``right`` (k x c), where they stand, and how what is to be fitted is projected onto that in both metrics.

    ``rows`` and ``columns`` are ascending; ``wanted`` is the part of the weight that all blocks together come near to, ``taken`` what this
    one takes off it.
    """

    left: Tensor
    right: Tensor
    taken: Term

    def __init__(self, task: Regression, covariance: Tensor, wanted: Term, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns, self.wanted, self.shape = rows, columns, wanted, task.weight.shape
        self.root, self.weigh = task.root, task.metric
        self.narrow, self.low = len(columns) < len(task.target_mean), len(rows) < len(covariance)
        if self.narrow and task.metric is not None:
            self.weigh = task.metric[:, columns]
            self.root = torch.linalg.cholesky(self.weigh[columns])
        self.across = covariance[rows] if self.low else covariance
        self.factor = torch.linalg.cholesky(self.across[:, rows]) if self.low else None
        self.directions: Tensor | None = None  # of the weighed output, of the last fit

    def seen(self, term: Term) -> Seen:
        """A term's projection onto the block, of no more components than the block has outputs."""
        covered, turned = term.covered[self.rows], term.weighed[self.columns]
        left = term.left if self.factor is None else torch.cholesky_solve(covered, self.factor)
        if self.root is not None:
            turned = torch.linalg.solve_triangular(self.root, turned, upper=False)
        if turned.shape[1] < len(turned):
            return Seen(left, covered, turned)
        return Seen(left @ turned.T, covered @ turned.T, torch.eye(len(turned), dtype=turned.dtype))

    @cached_property
    def seen_wanted(self) -> Seen:
        """The projection of what is wanted."""
        return self.seen(self.wanted)

    def fitted(self, taken: list[Term], rank: int) -> tuple[Tensor, Tensor]:
        """The best factors for what is wanted and what other blocks take off it: its projection onto the block, then reduced rank."""
        parts = zip(self.seen_wanted, *map(self.seen, taken), strict=True)
        left, covered, turned = (torch.cat(part, 1) for part in parts)

        def apply(v: Tensor) -> Tensor:
            return turned @ (covered.T @ (left @ (turned.T @ v)))

        self.directions = top_eigenvectors(apply, len(self.columns), rank, left.dtype, self.directions)
        right = self.directions.T
        if self.root is not None:
            right = torch.linalg.solve_triangular(self.root, right, upper=False, left=False)
        return left @ (turned.T @ self.directions), right

    def put(self, left: Tensor, right: Tensor) -> None:
        """Set the factors."""
        wide = left.new_zeros(self.shape[0], len(right)).index_copy(0, self.rows, left)
        high = right.new_zeros(len(right), self.shape[1]).index_copy(1, self.columns, -right)
        weighed = high.T if self.weigh is None else self.weigh @ -right.T
        self.left, self.right, self.taken = left, right, Term(wide, self.across.T @ left, high, weighed)


class Refit:
    """Blocks fitted one after the other to what the others leave of a weight; of a wide one for a low ``rank`` of its principal part alone.

    Then no step multiplies two wide matrices.
    """

    def __init__(self, task: Regression, rank: int) -> None:
        self.task, self.blocks = task, list[Block]()
        self.covariance = task.damped(BLOCK_DAMPING)
        self.damping = BLOCK_DAMPING * level(task.covariance)
        if thin(rank, *task.weight.shape):
            part = task.components(COMPONENTS * rank)
            covered = task.covered(COMPONENTS * rank) + self.damping * part.left
            weighed = part.vectors if task.root is None else task.root @ part.vectors
            self.wanted = Term(part.left, covered, part.right, weighed)
        else:
            same = torch.eye(task.weight.shape[1], dtype=task.weight.dtype)
            weighed = same if task.metric is None else task.metric
            self.wanted = Term(task.weight, self.covariance @ task.weight, same, weighed)

    def add(self, rows: Tensor, columns: Tensor, rank: int) -> None:
        """One more block."""
        new = Block(self.task, self.covariance, self.wanted, rows, columns)
        whole = not self.blocks and not new.narrow and not new.low
        new.put(*(self.task.low_rank(rank) if whole else new.fitted([block.taken for block in self.blocks], rank)))
        self.blocks.append(new)

    def sweep(self) -> None:
        """Fit every block anew, the others fixed."""
        for block in self.blocks:
            taken = [other.taken for other in self.blocks if other is not block]
            block.put(*block.fitted(taken, block.left.shape[1]))

    def scores(self) -> tuple[Tensor, Tensor]:
        """Of inputs (m,) and outputs (n,): the weighed square of what the blocks leave there, inputs over what they vary by alone."""
        left, covered, right, weighed = zip(self.wanted, *(block.taken for block in self.blocks), strict=True)
        rows, columns, metric = torch.cat(left, 1), torch.cat(right), self.task.metric
        inputs = (rows @ (columns @ torch.cat(weighed, 1))) * rows
        undamped = torch.cat(covered, 1) - self.damping * rows
        outputs = (((rows.T @ undamped) @ columns) * columns).sum(0)
        return inputs.sum(1) / self.task.freedom, outputs if metric is None else outputs * metric.diagonal()

    def factors(self, sweeps: int = 0) -> SparseLowRank:
        """The blocks, where they are several after some sweeps, as one form."""
        for _ in range(sweeps if len(self.blocks) > 1 else 0):
            self.sweep()
        m, n = self.task.weight.shape
        row_levels, column_levels = torch.zeros(m, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        for block in self.blocks:
            row_levels[block.rows] += 1
            column_levels[block.columns] += 1
        pairs = [balanced(block.left, block.right) for block in self.blocks]
        return SparseLowRank(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), row_levels, column_levels)
