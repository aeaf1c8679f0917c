"""What an operation that multiplies a weight is asked for; tensors are torch's, and no graph is known."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms import Form, Index, Quantized, express


class Operator(ABC):
    """How an operation multiplies one weight, seen as a matrix m x n: rows belong to what it reads, columns to what it makes.

    For tensors it is the :class:`slrprop.forms.expression.Builder` of every form.
    """

    kind: ClassVar[str]  # in words
    kernel: tuple[int, ...]  # sides of what a convolution sees; none for others

    @property
    def axis(self) -> int:
        """The axis of what it reads and makes that holds channels, counted from the last."""
        return -1

    @property
    def unit(self) -> int:
        """Rows of the matrix that belong to one channel of what it reads."""
        return 1

    @property
    def bits_only(self) -> str:
        """Why its weight can take fewer bits and no other form; empty where it can."""
        return ""

    @abstractmethod
    def matrix(self, stored: Tensor) -> Tensor:
        """The matrix (m x n) of a weight as torch stores it."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """The weight of a matrix (m x r) as torch stores it."""

    @abstractmethod
    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        """What the matrix is multiplied by (p x m), at all positions or some.

        Args:
            first: the number of the first sample among all of the data; it says which positions are taken.
        """

    def outputs(self, y: Tensor, first: int | None = None) -> Tensor:
        """What is made (p x n), at the positions that :meth:`inputs` takes; at all of them for None."""
        return y.movedim(self.axis, -1).reshape(-1, y.shape[self.axis])

    def compute(self, form: Form, bias: Tensor | None, x: Tensor) -> Tensor:
        """The operation with a form in the place of its weight, and a bias (n,)."""
        y = express(form, self, x)
        return y if bias is None else y + bias.to(y).reshape(-1, *[1] * (-1 - self.axis))

    def number(self, value: Tensor, *names: str) -> Tensor:
        return value

    def together(self, form: Form) -> Tensor:
        return form.dense()

    def opened(self, form: Quantized) -> tuple[Self, Form]:
        return self, form.plain()

    def along(self, axis: int) -> "Operator":
        raise SlrpropError(f"a {self.kind} has no axes to go along")

    @abstractmethod
    def enter(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def product(self, h: Tensor, weight: Tensor) -> Tensor:
        return h @ weight

    def some(self, x: Tensor, rows: Index) -> Tensor:
        return rows.every(self.unit).taken(x, self.axis)

    def join(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        return y.index_select(self.axis, order.to(y.device))

    def nothing(self, h: Tensor, count: int) -> Tensor:
        shape = list(h.shape)
        shape[self.axis] = count
        return h.new_zeros(shape)

    def add_up(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def merged(self, form: Form, x: Tensor) -> Tensor | None:
        return None
