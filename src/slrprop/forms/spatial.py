"""Convolutions as a sequence of smaller ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Form, require_matrix


@dataclass(frozen=True, eq=False)
class Sequence(Form):
    """What sequences of convolutions share: ``kernel`` is the whole one's size; rows of the matrix go in whole channels."""

    kernel: tuple[int, ...]

    def description(self) -> dict[str, Any]:
        return {"kind": self.kind, "kernel": list(self.kernel)}

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "Sequence":
        kernel = description["kernel"]
        if not kernel or not all(isinstance(side, int) and side > 0 for side in kernel):
            raise SlrpropError(f"the sides {kernel!r} of a kernel are no whole numbers from 1")
        return super().restored(description, {**arrays, "kernel": tuple(kernel)})  # type: ignore[dict-item]

    def picked(self, first: Tensor, rows: Tensor) -> Tensor:
        unit = math.prod(self.kernel)
        return first.unflatten(0, (self.shape[0] // unit, -1))[rows[::unit] // unit].flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Spatial(Sequence):
    """A k x l convolution of C channels as a k x 1 one to r channels and a 1 x l one of these (Jaderberg et al., BMVC 2014).

    ``W[(c, i, j), o] = sum_r first[(c, i), r] second[(r, j), o]``: ``first`` is (C k x r), ``second`` (r l x n).
    """

    first: Tensor
    second: Tensor
    kind: ClassVar[str] = "spatial"

    def __post_init__(self) -> None:
        if len(self.kernel) != 2 or self.first.ndim != 2 or len(self.first) % self.kernel[0]:
            raise SlrpropError(f"a spatial form takes a kernel of two sides and so many rows for each channel, got {self.kernel} and {tuple(self.first.shape)}")  # fmt: skip
        require_matrix("the second factor", self.second, (self.first.shape[1] * self.kernel[1], None))

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape[0] * self.kernel[1], self.second.shape[1]

    def dense(self) -> Tensor:
        first, second = self.first.unflatten(0, (-1, self.kernel[0])), self.second.unflatten(0, (-1, self.kernel[1]))
        return torch.einsum("cir,rjo->cijo", first, second).flatten(0, 2)


@dataclass(frozen=True, eq=False)
class Tucker(Sequence):
    """A convolution of C channels as a 1 x 1 one to s, one with the kernel to r, and a 1 x 1 one (Tucker-2; Kim et al., ICLR 2016).

    ``first`` is (C x s), ``core`` (s k l x r), ``last`` (r x n).
    """

    first: Tensor
    core: Tensor
    last: Tensor
    kind: ClassVar[str] = "tucker"

    def __post_init__(self) -> None:
        require_matrix("the first factor", self.first, (None, None))
        require_matrix("the core", self.core, (self.first.shape[1] * math.prod(self.kernel), None))
        require_matrix("the last factor", self.last, (self.core.shape[1], None))

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape[0] * math.prod(self.kernel), self.last.shape[1]

    def dense(self) -> Tensor:
        inner = (self.core @ self.last).unflatten(0, (self.first.shape[1], -1))
        return torch.einsum("cs,sko->cko", self.first, inner).flatten(0, 1)
