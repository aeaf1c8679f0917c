"""Layers without some of their neurons."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Form, require_matrix
from slrprop.forms.blocks import Index, pack_levels, reordered, unpack_levels


@dataclass(frozen=True, eq=False)
class Narrowed(Form):
    """A dense ``block`` between some of the inputs and some of the outputs; all other weights are zero.

    ``rows`` (m,) and ``columns`` (n,) are bool: the neurons that the block's rows and columns serve, in ascending order.
    """

    block: Tensor
    rows: Tensor
    columns: Tensor
    beside: ClassVar[tuple[str, ...]] = ("rows", "columns")
    kind: ClassVar[str] = "narrowed"
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for side, mask in (("row", self.rows), ("column", self.columns)):
            if mask.ndim != 1 or mask.dtype != torch.bool:
                raise SlrpropError(f"a {side} mask takes one bool per neuron, got {mask.dtype} {tuple(mask.shape)}")
        require_matrix("the block", self.block, (int(self.rows.sum()), int(self.columns.sum())))
        _ = self.sides  # before anything is traced

    @cached_property
    def sides(self) -> tuple[Index, Tensor | None]:
        """The inputs that are read, and where among the block's outputs, and one of zeros behind them, each output is (None: all are made)."""
        places = torch.where(self.columns, self.columns.cumsum(0) - 1, self.block.shape[1])
        return Index.where(self.rows), None if self.columns.all() else places

    @classmethod
    def cut(cls, weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> "Narrowed":
        """A weight (m x n) without the neurons that the masks leave out."""
        m, n = weight.shape
        rows = torch.ones(m, dtype=torch.bool) if rows is None else rows.cpu()
        columns = torch.ones(n, dtype=torch.bool) if columns is None else columns.cpu()
        return cls(weight[rows][:, columns], rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def whole(self) -> bool:
        """Whether no neuron is left out: the block is the weight then."""
        return bool(self.rows.all() and self.columns.all())

    def indices(self) -> dict[str, Tensor]:
        return {"rows": pack_levels(self.rows.byte(), 1, 0), "columns": pack_levels(self.columns.byte(), 1, 0)}

    def description(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "Narrowed":
        sides = zip(("rows", "columns"), description["shape"], strict=True)
        return cls(arrays["block"], *(unpack_levels(arrays[name], count, 0, 1).bool() for name, count in sides))

    def dense(self) -> Tensor:
        weight = self.block.new_zeros(self.shape)
        weight[self.rows.nonzero(), self.columns.nonzero()[:, 0]] = self.block
        return weight

    def read(self) -> Tensor:
        return self.rows

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "Narrowed":
        block, row_mask, column_mask = self.block, self.rows, self.columns
        if rows is not None:
            block, row_mask = reordered(block, row_mask, rows.cpu(), 0), row_mask[rows.cpu()]
        if columns is not None:
            block, column_mask = reordered(block, column_mask, columns.cpu(), 1), column_mask[columns.cpu()]
        return Narrowed(block, row_mask, column_mask)
