"""Where a network's samples stand, and how many of them go through it at once."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slrprop.data import Batch, Data
from slrprop.errors import SlrpropError
from slrprop.losses import IGNORED
from slrprop.memory import bound

TRIED = 3  # samples that are run to see what one takes: two together and one alone


class Sampled(ABC):
    """What takes batches of samples and gives one main output for each batch."""

    def __init__(self) -> None:
        self.at_once = 0  # samples that fit into memory together; 0 as long as that is not known
        self.standing = 0  # bytes that a sample's tensors take before a layer, where that was measured
        self.classes: tuple[str, ...] = ()  # their names in the order of the outputs, where the model holds them
        self._place: int | None = None

    @abstractmethod
    def outputs_of(self, batches: Iterable[Batch]) -> list[Tensor]:
        """The main output for each batch, as the model gives it."""

    def fixed_batch(self, batch: Batch) -> int | None:
        """How many samples the model insists on, which stand on the batch's axes; None where that is open."""
        return None

    def numbered(self, targets: Any) -> Any:
        """Labels by the names of classes as their numbers; others as they are.

        Raises:
            SlrpropError: text that is no class of the model's.
        """
        if targets is None or (isinstance(targets, Tensor) and (targets.is_floating_point() or not self.classes)):
            return targets
        words = [str(word) for word in (targets.long() if isinstance(targets, Tensor) else targets).flatten().tolist()]
        places = {str(IGNORED): IGNORED} | {name: place for place, name in enumerate(self.classes)}
        if foreign := set(words) - places.keys():
            if isinstance(targets, Tensor):
                return targets  # numbers already
            known = (
                f"the model's classes are {', '.join(self.classes)}" if self.classes else "the model names no classes"
            )
            raise SlrpropError(f"the label '{min(foreign)}' is text, and {known}; give class numbers")
        return torch.tensor([places[word] for word in words]).reshape(targets.shape)

    def place(self, batch: Batch) -> int:
        """The axis of the main output along which the samples stand.

        Raises:
            SlrpropError: the outputs have no axis of them.
        """
        if not batch.axes:
            return 0
        if self._place is None:
            self._place = self._samples_axis(batch)
        if self._place is None:  # they see each other
            self.at_once = self.at_once or sys.maxsize  # what is cut into parts has its place already
            shape = tuple(self.outputs_of([batch])[0].shape)
            if batch.samples not in shape:
                raise SlrpropError(f"the data has {batch.samples} samples along batch_axis, and the output has shape {shape}; give the axes on which samples stand (--batch-axis)")  # fmt: skip
            self._place = shape.index(batch.samples)
        return self._place

    def look(self, data: Data) -> None:
        """Try whether the samples stand on the first axis, where nothing was said of it.

        Raises:
            SlrpropError: the outputs show another axis, or labels are text that the model does not know.
        """
        batch = next(iter(data))
        self.numbered(batch.targets)
        if data.batch_axis is not None or self._samples_axis(batch) is not None:
            return
        values = {key: value for key, value in batch.values().items() if getattr(value, "ndim", 0)}
        for axis in range(1, max((value.ndim for value in values.values()), default=1)):
            other = batch._replace(axes={key: axis for key, value in values.items() if value.ndim > axis}, targets=None)
            sizes = {value.shape[other.axes.get(key, 0)] for key, value in values.items()}
            if len(sizes) == 1 and min(sizes) > 1 and self._samples_axis(other) is not None:
                shapes = ", ".join(str(tuple(value.shape)) for value in values.values())
                raise SlrpropError(
                    f"data of shape {shapes} was to be cut into samples along the first axis, but the outputs show that they stand on axis {axis}; "
                    f"say so with --batch-axis {axis} (batch_axis={axis}), or with 0 that it is the first after all"
                )

    def _samples_axis(self, batch: Batch) -> int | None:
        """The axis of the main output with an entry, or several, for each sample; None where samples see each other.

        Two samples are run in each other's company and in their own; axis 0 where there is one sample alone.
        """
        size = self.fixed_batch(batch) or 3
        if batch.samples < 2 or size < 2:
            return 0
        others = [0, *[1] * (size - 2), 0] if size > 2 else [0, 1]
        own = [place for place, sample in enumerate(others) if not sample]
        try:
            alone, among = (out.double() for out in self.outputs_of(map(batch.take, ([0] * size, others))))
        except SlrpropError:  # it takes no other number of samples
            try:
                shape = () if batch.axes else self.outputs_of([batch])[0].shape
            except SlrpropError:
                return None
            return 0 if shape and not shape[0] % batch.samples else None
        room = 1e-3 * float(alone.abs().max()) if alone.numel() else 0.0
        for axis in range(max(1, alone.ndim - 1)) if alone.ndim and alone.shape == among.shape else ():
            if not alone.shape[axis] % size:
                one, other = (value.movedim(axis, 0).reshape(size, -1) for value in (alone, among))
                if ((one - one[:1]).abs() <= room).all() and ((other - one)[own].abs() <= room).all():
                    return axis
        return None

    @abstractmethod
    def _tried(self, batch: Batch) -> tuple[Tensor, int]:
        """The main output for a few samples, and the bytes of all tensors that were made on the way."""

    def parts_of(self, batch: Batch) -> Iterator[Batch]:
        """A batch in equal parts, the bytes of whose tensors are a quarter of the bound (:mod:`slrprop.memory`); whole where the outputs show that parts mean something else."""
        count = batch.samples
        if not self.at_once and count > TRIED and batch.divisible:
            self.at_once = self._fitting(batch)
        parts = -(-count // self.at_once) if self.at_once and batch.divisible else 1
        if parts < 2:
            yield batch
            return
        for index in range(parts):
            yield batch.take(slice(count * index // parts, count * (index + 1) // parts))

    def batches(self, data: Data) -> Iterator[Batch]:
        """The data in such parts."""
        return (part for batch in data for part in self.parts_of(batch))

    def _fitting(self, batch: Batch) -> int:
        """How many samples fit into memory together, from a run of a few, in which it shows whether each has an output of its own."""
        try:
            whole, size = self._tried(batch.take(slice(TRIED)))
            parts = [self._tried(batch.take(slice(*ends)))[0] for ends in ((0, TRIED - 1), (TRIED - 1, TRIED))]
            apart = alike(torch.cat(parts, self.place(batch)), whole)
        except (SlrpropError, RuntimeError):  # a fixed number of samples, or outputs that can't be joined or compared
            apart = False
        return max(1, TRIED * bound() // (4 * max(size, 1))) if apart else sys.maxsize


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether outputs are the same but for rounding, in half precision too."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-2 * float(other.abs().max()))
