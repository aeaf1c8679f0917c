"""What each form computes, written once: for torch tensors and for the nodes of a file, for products and for convolutions."""

from functools import singledispatch
from typing import Any, Protocol, TypeVar

from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Dense, Form, LowRank
from slrprop.forms.blocks import Index, SparseLowRank
from slrprop.forms.narrowed import Narrowed
from slrprop.forms.quantized import Quantized
from slrprop.forms.shared import Shared
from slrprop.forms.sparse import LowRankPlusSparse, Sparse
from slrprop.forms.spatial import Spatial, Tucker

T = TypeVar("T")


class Builder(Protocol[T]):
    """What puts an expression together: ``T`` is a tensor, or the name of one in a file."""

    def number(self, value: Tensor, *names: str) -> T:
        """A matrix of the form, by its name, or a part of several of them."""

    def together(self, form: Any) -> T:
        """The matrix of a form whose numbers are put together before they are multiplied."""

    def opened(self, form: Quantized) -> tuple[Any, Form]:
        """The form of a quantised one, and what unpacks the numbers of that."""

    def enter(self, x: T, weight: T) -> T:
        """The operation itself, with other outputs."""

    def along(self, axis: int) -> Any:
        """The part of a convolution that goes along one axis of the map."""

    def product(self, h: T, weight: T) -> T:
        """Channels times a matrix, at every position."""

    def some(self, x: T, rows: Index) -> T:
        """The channels that these rows of the matrix (ascending, whole channels) belong to."""

    def join(self, parts: list[T]) -> T:
        """Channels beside each other."""

    def pick(self, y: T, order: Tensor) -> T:
        """Channels in another order."""

    def nothing(self, h: T, count: int) -> T:
        """So many channels of zeros, at the positions of others."""

    def add_up(self, one: T, other: T) -> T:
        """A sum."""

    def merged(self, form: SparseLowRank, x: T) -> T | None:
        """What nested blocks make, where there is a better way than block by block."""


@singledispatch
def express(form: Form, to: Builder[T], x: T) -> T:
    """What a form makes of an input, without the bias. A new form registers its own.

    Args:
        to: an :class:`slrprop.operators.Operator` for tensors, or what writes the nodes of a file.
    """
    raise SlrpropError(f"nothing computes with {type(form).__name__} forms")


@express.register
def _(form: Dense, to: Any, x: Any) -> Any:
    return to.enter(x, to.number(form.weight, "weight"))


@express.register
def _(form: LowRank, to: Any, x: Any) -> Any:
    return to.product(to.enter(x, to.number(form.left, "left")), to.number(form.right, "right"))


@express.register
def _(form: Spatial, to: Any, x: Any) -> Any:
    h = to.along(0).enter(x, to.number(form.first, "first"))
    return to.along(1).enter(h, to.number(form.second, "second"))


@express.register
def _(form: Tucker, to: Any, x: Any) -> Any:
    h = to.enter(to.product(x, to.number(form.first, "first")), to.number(form.core, "core"))
    return to.product(h, to.number(form.last, "last"))


@express.register
def _(form: SparseLowRank, to: Any, x: Any) -> Any:
    if (y := to.merged(form, x)) is not None:
        return y
    sets, parts = form.sets, []
    hidden = {
        level: to.enter(to.some(x, sets.rows[level]), to.number(left, f"left_{level}"))
        for level, left in enumerate(form.left)
        if left.shape[1] or not level
    }
    for segment in form.segments():
        if segment.level:
            right = to.number(segment.right, *(f"right_{level}" for level in range(segment.level)))
            parts.append(to.product(to.join([h for level, h in hidden.items() if level < segment.level]), right))
        else:
            parts.append(to.nothing(hidden[0], len(segment.columns)))
    y = to.join(parts)
    return y if sets.order is None else to.pick(y, sets.order)


@express.register
def _(form: Narrowed, to: Any, x: Any) -> Any:
    read, places = form.sides
    y = to.enter(to.some(x, read), to.number(form.block, "block"))
    return y if places is None else to.pick(to.join([y, to.nothing(y, 1)]), places)


@express.register(Sparse)
@express.register(Shared)
def _(form: Form, to: Any, x: Any) -> Any:
    return to.enter(x, to.together(form))


@express.register
def _(form: LowRankPlusSparse, to: Any, x: Any) -> Any:
    return to.add_up(express(form.low_rank, to, x), express(form.sparse, to, x))


@express.register
def _(form: Quantized, to: Any, x: Any) -> Any:
    builder, plain = to.opened(form)
    return express(plain, builder, x)
