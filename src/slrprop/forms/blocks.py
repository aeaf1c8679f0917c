"""Sparse low rank as nested dense blocks."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Form, require_matrix
from slrprop.linalg import SVD


def members(levels: Tensor, level: int) -> Tensor:
    """Indices of the neurons that take part in block ``level``, ascending."""
    return (levels > level).nonzero()[:, 0]


def reordered(block: Tensor, members: Tensor, order: Tensor, axis: int) -> Tensor:
    """A block whose neurons along ``axis`` are those of the bool mask ``members``, once the neurons are ``order``."""
    place = members.cumsum(0) - 1
    index = place[order[members[order]]]
    return block[index] if axis == 0 else block[:, index]


def pack_levels(levels: Tensor, blocks: int, lowest: int) -> Tensor:
    """Levels (uint8, from ``lowest`` to ``blocks``) in as few bits each as they need, as uint8 bytes."""
    base, bits = _level_bits(lowest, blocks)
    spread = (levels.cpu()[:, None] - base) >> torch.arange(bits) & 1
    return torch.from_numpy(np.packbits(spread.to(torch.uint8).numpy()))


def unpack_levels(stored: Tensor, count: int, lowest: int, blocks: int) -> Tensor:
    """The levels of ``count`` neurons that :func:`pack_levels` packed; the lowest of them is ``lowest``."""
    base, bits = _level_bits(lowest, blocks)
    if stored.dtype != torch.uint8 or stored.shape != (-(-count * bits // 8),):
        raise SlrpropError(f"the levels of {count} neurons take {-(-count * bits // 8)} bytes, got {stored.dtype} {tuple(stored.shape)}")  # fmt: skip
    spread = torch.from_numpy(np.unpackbits(stored.cpu().numpy(), count=count * bits)).reshape(count, bits)
    levels = base + (spread.long() << torch.arange(bits)).sum(1)
    if len(levels) and int(levels.max()) > blocks:
        raise SlrpropError(f"a neuron's level is {int(levels.max())}, but there are {blocks} blocks")
    return levels.to(torch.uint8)


def _level_bits(lowest: int, blocks: int) -> tuple[int, int]:
    """What is subtracted from levels before they are packed, and the bits each then takes."""
    base = min(lowest, 1)
    return base, (blocks - base).bit_length()


class Index(NamedTuple):
    """Ascending places, and the same as a slice where they are neighbours: nothing is looked up when a graph is traced."""

    places: Tensor
    part: slice | None

    @classmethod
    def of(cls, places: Tensor) -> "Index":
        first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -2)
        return cls(places, slice(first, last + 1) if last - first == len(places) - 1 else None)

    @classmethod
    def where(cls, mask: Tensor) -> "Index":
        """The places that are marked."""
        return cls.of(mask.nonzero()[:, 0])

    def every(self, unit: int) -> "Index":
        """The channels that places in whole channels of so many rows belong to."""
        part = None if self.part is None else slice(self.part.start // unit, self.part.stop // unit)
        return Index(self.places[::unit] // unit, part) if unit > 1 else self

    def taken(self, x: Tensor, axis: int) -> Tensor:
        """What stands at these places, without a copy where they are neighbours."""
        if self.part is None:
            return x.index_select(axis, self.places.to(x.device))
        return x.narrow(axis, self.part.start, self.part.stop - self.part.start)


@dataclass(frozen=True, eq=False)
class Sets:
    """Which neurons take part in each block, and the outputs as neighbouring pieces, one per level.

    ``pieces`` are their columns, with the places of these among those of each block; ``order`` brings the columns back, None where
    the pieces, one after the other, are the columns already.
    """

    rows: list[Index]
    columns: list[Tensor]
    pieces: list[tuple[Tensor, list[Index]]]
    order: Tensor | None

    @classmethod
    def of(cls, row_levels: Tensor, column_levels: Tensor, blocks: int) -> "Sets":
        columns = [members(column_levels, g) for g in range(blocks)]
        groups = [((column_levels == level).nonzero()[:, 0], level) for level in column_levels.unique().tolist()]
        groups.sort(key=lambda group: int(group[0][0]))
        pieces = [
            (index, [Index.of(torch.searchsorted(columns[g], index)) for g in range(level)]) for index, level in groups
        ]
        order = torch.cat([index for index, _ in pieces]) if pieces else column_levels.long()
        rows = [Index.of(members(row_levels, g)) for g in range(blocks)]
        return cls(rows, columns, pieces, None if bool((order.diff() == 1).all()) else order.argsort())


@dataclass(frozen=True, eq=False)
class SparseLowRank(Form):
    """Low rank with fewer ranks for some neurons, as dense blocks: ``W = sum_g E(R_g) left_g right_g E(C_g)``.

    Neuron i belongs to blocks 0 .. levels[i] - 1, so the row sets R_g (and column sets C_g) are nested, and
    a neuron at level 0 has no weight at all. ``left[g]`` is |R_g| x k_g and ``right[g]`` is k_g x |C_g|, rows and
    columns in ascending order of the neurons. No zero is stored or multiplied. SLR (Swaminathan et al. 2020)
    has two blocks: everyone at rank rk, the kept neurons at the other k - rk. Its numbers are then
    ``k (m - r_m + n - r_n) + rk (r_m + r_n)``: the article's formula less the k singular values.

    ``row_levels`` (m,) and ``column_levels`` (n,) are uint8; stored they take as few bits as their number needs.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    row_levels: Tensor
    column_levels: Tensor
    beside: ClassVar[tuple[str, ...]] = ("row_levels", "column_levels")
    kind: ClassVar[str] = "sparse_low_rank"
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.left or len(self.left) != len(self.right):
            raise SlrpropError(
                f"sparse low rank takes as many left as right blocks, at least one; got {len(self.left)} and {len(self.right)}"
            )
        for side, levels in (("row", self.row_levels), ("column", self.column_levels)):
            if levels.ndim != 1 or levels.dtype != torch.uint8 or (len(levels) and int(levels.max()) > len(self.left)):
                raise SlrpropError(
                    f"{side} levels must be one uint8 per neuron, at most {len(self.left)}; got {levels.dtype} {tuple(levels.shape)}"
                )
        for level, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            require_matrix(f"left block {level}", left, (len(self.sets.rows[level].places), None))
            require_matrix(f"right block {level}", right, (left.shape[1], len(self.sets.columns[level])))

    @classmethod
    def shorten(cls, svd: SVD, reduced_rank: int, short_rows: Tensor, short_columns: Tensor) -> "SparseLowRank":
        """Cut the tails of the masked neurons beyond ``reduced_rank`` (SLR, Algorithm 1).

        Args:
            short_rows: bool (m,), the input neurons that keep only ``reduced_rank`` ranks.
            short_columns: bool (n,), the same for output neurons.
        """
        left, right = svd.left, svd.vt
        tail = (left[~short_rows, reduced_rank:], right[reduced_rank:, ~short_columns])
        rows, columns = (~short_rows).to(torch.uint8), (~short_columns).to(torch.uint8)
        if reduced_rank == 0:
            return cls((tail[0],), (tail[1],), rows, columns)
        return cls((left[:, :reduced_rank], tail[0]), (right[:reduced_rank], tail[1]), rows + 1, columns + 1)

    @cached_property
    def sets(self) -> Sets:
        """Which neurons take part in each block."""
        return Sets.of(self.row_levels, self.column_levels, len(self.left))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.row_levels), len(self.column_levels)

    def matrices(self) -> dict[str, Tensor]:
        named = [(f"left_{level}", block) for level, block in enumerate(self.left)]
        return dict(named + [(f"right_{level}", block) for level, block in enumerate(self.right)])

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> "SparseLowRank":
        levels = range(len(self.left))
        left, right = (tuple(matrices[f"{side}_{level}"] for level in levels) for side in ("left", "right"))
        return self.like(left=left, right=right)

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "SparseLowRank":
        levels = range(next(level for level in itertools.count() if f"left_{level}" not in arrays))
        left, right = (tuple(arrays[f"{side}_{level}"] for level in levels) for side in ("left", "right"))
        counts, lowest = description["shape"], description["lowest"]
        if not all(isinstance(value, int) and value >= 0 for value in (*counts, *lowest)):
            raise SlrpropError(f"the shape {counts!r} or the lowest levels {lowest!r} of a layer are no whole numbers")
        sides = zip(("row_levels", "column_levels"), counts, lowest, strict=True)
        rows, columns = (unpack_levels(arrays[name], count, low, len(levels)) for name, count, low in sides)
        return cls(left, right, rows, columns)

    def indices(self) -> dict[str, Tensor]:
        sides = zip(("row_levels", "column_levels"), self.description()["lowest"], strict=True)
        return {name: pack_levels(getattr(self, name), len(self.left), lowest) for name, lowest in sides}

    def description(self) -> dict[str, Any]:
        lowest = [int(levels.min()) if len(levels) else 0 for levels in (self.row_levels, self.column_levels)]
        return {"kind": self.kind, "shape": list(self.shape), "lowest": lowest}

    def dense(self) -> Tensor:
        left, right = self.padded()
        return left @ right

    def padded(self) -> tuple[Tensor, Tensor]:
        """The blocks side by side with zeros where a neuron takes no part: factors (m x K) and (K x n)."""
        m, n = self.shape
        left, right = [], []
        for level, (a, b) in enumerate(zip(self.left, self.right, strict=True)):
            left.append(a.new_zeros(m, a.shape[1]).index_copy(0, self.sets.rows[level].places.to(a.device), a))
            right.append(b.new_zeros(b.shape[0], n).index_copy(1, self.sets.columns[level].to(b.device), b))
        return torch.cat(left, 1), torch.cat(right)

    def read(self) -> Tensor:
        return self.row_levels.cpu() > 0

    @property
    def spread_numbers(self) -> int:
        """Numbers of the factors that :meth:`padded` gives, zeros included."""
        return sum(self.shape) * sum(left.shape[1] for left in self.left)

    @property
    def merged_zeros(self) -> int:
        """Multiplications for one sample that one or two merged products take more than the blocks."""
        return min(self.spread_numbers, self.shape[0] * self.shape[1]) - self.numbers

    @property
    def gathered(self) -> int:
        """Inputs and outputs, for one sample, that the blocks pick one by one because no slice gives them."""
        picked = sum(len(index.places) for index in self.sets.rows if index.part is None)
        return picked + (self.shape[1] if self.sets.order is not None else 0)

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "SparseLowRank":
        made = vars(self) | {}
        for side, levels, order in (("left", "row_levels", rows), ("right", "column_levels", columns)):
            if order is not None:
                members, axis = made[levels], int(side == "right")
                made[side] = tuple(reordered(block, members > g, order, axis) for g, block in enumerate(made[side]))
                made[levels] = members[order]
        return SparseLowRank(*(made[field.name] for field in fields(self)))
