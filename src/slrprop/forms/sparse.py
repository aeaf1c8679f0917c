"""Weights of which only some values are stored: smaller files, no faster computation."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Form, LowRank, require_matrix
from slrprop.forms.positions import decoded, encoded


def _side(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SlrpropError(f"a side of a sparse weight must be a whole number, got {value!r}")
    return value


@dataclass(frozen=True, eq=False)
class Sparse(Form):
    """An m x n weight with the values that are not zero, and where they stand.

    ``entries`` (nnz,) go along the rows (inputs), one after another; ``gaps`` holds their places ``i * n + j`` as
    packed codes of ``gap_bits`` bits (uint8, see :mod:`slrprop.forms.positions`): a bitmap or the distances between the
    places, whatever takes fewest bytes. Size only: it is multiplied out to compute, so it is no faster than dense.
    """

    entries: Tensor
    gaps: Tensor
    gap_bits: int
    sides: tuple[int, int]
    beside: ClassVar[tuple[str, ...]] = ("gaps", "places")
    kind: ClassVar[str] = "sparse"
    faster: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.entries.ndim != 1 or len(self.entries) != len(self.places):
            raise SlrpropError(f"a sparse weight with {len(self.places)} marked places takes as many values, got shape {tuple(self.entries.shape)}")  # fmt: skip

    @classmethod
    def of(cls, weight: Tensor, support: Tensor | None = None) -> "Sparse":
        """The values of an m x n weight on a support (bool, m x n; where it is not zero, if None)."""
        require_matrix("a sparse weight", weight, (None, None))
        places = (weight != 0 if support is None else support).reshape(-1).nonzero()[:, 0]
        gaps, bits = encoded(places)
        return cls(weight.reshape(-1)[places], gaps.to(weight.device), bits, (weight.shape[0], weight.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.sides

    @cached_property
    def places(self) -> Tensor:
        """``i * n + j`` of every value, ascending (nnz,) int64."""
        return decoded(self.gaps, self.gap_bits, self.shape[0] * self.shape[1])

    def support(self) -> Tensor:
        """Where values are stored (bool, m x n)."""
        marked = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.entries.device)
        marked[self.places] = True
        return marked.reshape(self.shape)

    def indices(self) -> dict[str, Tensor]:
        return {"gaps": self.gaps}

    def description(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "gap_bits": self.gap_bits}

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "Sparse":
        m, n = description["shape"]
        return cls(arrays["entries"], arrays["gaps"], description["gap_bits"], (_side(m), _side(n)))

    def dense(self) -> Tensor:
        flat = self.entries.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.places,), self.entries).reshape(self.shape)

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "Sparse":
        weight, support = self.dense(), self.support()
        for axis, order in enumerate((rows, columns)):
            if order is not None:
                weight, support = weight.index_select(axis, order), support.index_select(axis, order)
        return Sparse.of(weight, support)


@dataclass(frozen=True, eq=False)
class LowRankPlusSparse(Form):
    """``W = left @ right + S`` with :class:`LowRank` factors and a :class:`Sparse` rest. Size only: no faster."""

    low_rank: LowRank
    sparse: Sparse
    kind: ClassVar[str] = "low_rank_plus_sparse"
    faster: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.low_rank.shape != self.sparse.shape:
            raise SlrpropError(f"the low rank part is {self.low_rank.shape[0]} x {self.low_rank.shape[1]}, the sparse part {self.sparse.shape[0]} x {self.sparse.shape[1]}")  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        return self.low_rank.shape

    def matrices(self) -> dict[str, Tensor]:
        return self.low_rank.matrices() | self.sparse.matrices()

    def indices(self) -> dict[str, Tensor]:
        return self.sparse.indices()

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> "LowRankPlusSparse":
        return LowRankPlusSparse(self.low_rank.with_matrices(matrices), self.sparse.with_matrices(matrices))

    def description(self) -> dict[str, Any]:
        return self.sparse.description() | {"kind": self.kind}

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "LowRankPlusSparse":
        return cls(LowRank.restored(description, arrays), Sparse.restored(description, arrays))

    @property
    def multiplications(self) -> int:
        return self.low_rank.multiplications + self.sparse.multiplications

    def dense(self) -> Tensor:
        return self.low_rank.dense() + self.sparse.dense()

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "LowRankPlusSparse":
        return LowRankPlusSparse(self.low_rank.permuted(rows, columns), self.sparse.permuted(rows, columns))
