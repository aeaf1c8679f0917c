"""Embeddings: a number picks a row of the weight."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slrprop.operators.base import Operator


@dataclass(frozen=True)
class Lookup(Operator):
    """``y = W[x]``; torch stores W as it is (m x n), a row for each of the m numbers.

    As a product it is that of rows with a single one, of which only the numbers are handed on (p,): what reads a row never reads another.
    """

    kind: ClassVar[str] = "embedding"
    kernel: ClassVar[tuple[int, ...]] = ()  # type: ignore[misc]

    def matrix(self, stored: Tensor) -> Tensor:
        return stored

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        return x.reshape(-1)

    def enter(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight[x]
