"""What an operation that multiplies a weight is asked for; tensors are torch's, and no graph is known."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms import Form, Index, Quantized, express


class Operator(ABC):
    """How an operation multiplies one weight, seen as a matrix m x n: rows belong to what it reads, columns to what it makes.

    What it does from ``number`` on is what forms are expressed in (:func:`slrprop.forms.express`); here of tensors.
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
        """A matrix of the form, by its name, or a part of several of them."""
        return value

    def together(self, form: Form) -> Tensor:
        """The matrix of a form whose numbers are put together before they are multiplied."""
        return form.dense()

    def opened(self, form: Quantized) -> tuple[Self, Form]:
        """What unpacks the numbers of a form in few bits, and that form."""
        return self, form.plain()

    def along(self, axis: int) -> "Operator":
        """The part of a convolution that goes along one axis of the map."""
        raise SlrpropError(f"a {self.kind} has no axes to go along")

    @abstractmethod
    def enter(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operation itself, with other outputs."""

    def product(self, h: Tensor, weight: Tensor) -> Tensor:
        """Channels times a matrix, at every position."""
        return h @ weight

    def some(self, x: Tensor, rows: Index) -> Tensor:
        """The channels that these rows of the matrix (ascending, whole channels) belong to."""
        return rows.every(self.unit).taken(x, self.axis)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Channels beside each other."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)

    def pick(self, y: Tensor, order: Tensor) -> Tensor:
        """Channels in another order."""
        return y.index_select(self.axis, order.to(y.device))

    def nothing(self, h: Tensor, count: int) -> Tensor:
        """So many channels of zeros, at the positions of others."""
        shape = list(h.shape)
        shape[self.axis] = count
        return h.new_zeros(shape)

    def add_up(self, one: Tensor, other: Tensor) -> Tensor:
        """A sum."""
        return one + other

    def merged(self, form: Form, x: Tensor) -> Tensor | None:
        """What nested blocks make, where there is a better way than block by block."""
        return None
