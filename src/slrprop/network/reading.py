"""How a network's main output is read: on which axis its classes are, and whether it holds classes at all."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slrprop.errors import SlrpropError

SCORES = ("logit", "prob", "score", "class", "label")  # in the name of an output of classes
EMBEDDED = ("embed", "pool", "hidden", "feature")  # in the name of one that has none
LAST = 4  # products that may be the last before the output
WIDTHS = 64, 4096  # embeddings have a multiple of the first, up to the second


class Reading(NamedTuple):
    """``axis`` of the classes, counted from the end, 0 where each position has one number alone.

    ``embedding`` says why the numbers are taken for no classes where there are no labels; empty where they are classes.
    """

    axis: int = -1
    embedding: str = ""

    def classes_last(self, output: Tensor) -> Tensor:
        """The output with its classes on the last axis."""
        return output if self.axis == -1 else output.movedim(self.axis, -1) if self.axis else output[..., None]


class Raised(NamedTuple):
    """A main output once one unit of a product is raised; how many units and how many numbers that product has."""

    output: Tensor
    units: int
    numbers: int


def class_axis(
    output: Tensor,
    targets: Tensor | None,
    asked: int | None,
    products: Sequence[Any],
    raised: Callable[[Any, int], Raised],
) -> int | None:
    """Where the classes are, see :class:`Reading`; None where nothing tells.

    As asked; else by the shape of the labels, which lack that axis; else where one unit of the last product shows in the output.

    Args:
        products: what may be raised, the last one first.
        raised: the network with a unit, the first or the last one, of a product raised.

    Raises:
        SlrpropError: the output has no such axis.
    """
    count, shape = output.ndim, tuple(output.shape)
    if asked is not None:
        if not -count <= asked < count:
            raise SlrpropError(
                f"class_axis {asked} was asked for, and the network's output has shape {shape}; name one of its axes"
            )
        return asked - count if asked >= 0 else asked
    axes = list(range(1 - count, 0)) if count > 2 else [-1]
    if targets is not None and not targets.is_floating_point():
        labels = [size for size in targets.shape if size > 1]
        axes = [at for at in axes if labels == [n for n in (*shape[:at], *shape[count + at + 1 :]) if n > 1]] or axes
    if len(axes) == 1:
        return axes[0]
    for product, unit in itertools.product(products, (0, -1)):
        found = raised(product, unit)
        if found.output.shape != output.shape or torch.equal(found.output, output):
            continue  # it does not lead to this output
        if found.units == 1 and (1 in shape[1:] or found.numbers == output.numel()):
            return next((axis for axis in axes if shape[axis] == 1), 0)
        axis = risen(output, found.output)
        if axis in axes:
            return axis
        if unit:
            break
    real = targets is not None and targets.is_floating_point()
    return -1 if real else None  # each number is compared with its own target, wherever it stands


def risen(output: Tensor, raised: Tensor) -> int | None:
    """The axis along which one index rose and the others did not; None where that is none, or several.

    A softmax or a norm behind the product lowers the others, or moves them less.
    """
    rise = (raised - output).double().clamp_min(0)
    shares = []  # by how much the second rose, of the first
    for axis in range(1 - output.ndim, 0):
        if output.shape[axis] > 1:
            first, second = rise.movedim(axis, 0).flatten(1).sum(1).topk(2).values.tolist()
            shares.append((second / first if first else 1.0, axis))
    (least, axis), *others = sorted(shares) or [(1.0, 0)]
    return axis if least < 0.5 * min([1.0, *(share for share, _ in others)]) else None


def embedding(rows: Tensor, name: str) -> str:
    """Why outputs (p x c) without labels are numbers of an embedding and no scores of classes; empty where they are scores.

    Its name tells, or that all rows are of one length, or the width: people give embeddings a multiple of 64 numbers.
    """
    width, called = rows.shape[1], name.lower()
    if width < 2 or not len(rows) or any(word in called for word in SCORES):
        return ""
    if any(word in called for word in EMBEDDED):
        return f"the output is called '{name}'"
    values = rows.double()
    lengths = values.norm(dim=1)
    if len(rows) > 2 and values.std(0).norm() > 0.01 * lengths.mean() and lengths.std() < 1e-3 * lengths.mean():
        return "all outputs are of the same length"
    if float(values.min()) >= 0 and float(values.max()) <= 1:
        return ""  # probabilities
    multiple, most = WIDTHS
    return f"{width} outputs are a multiple of {multiple}" if width % multiple == 0 and width <= most else ""
