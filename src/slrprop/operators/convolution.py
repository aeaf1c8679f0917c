"""Convolutions: dense layers on patches. Stride, dilation and padding enter only where patches are gathered."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from slrprop.operators.base import Operator

POSITIONS = 32  # of a map that are looked at, spread over it; another set of them for every sample
CONVOLVED = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
Sides = tuple[int, ...]


@dataclass(frozen=True)
class Convolution(Operator):
    """A convolution of maps with zeros around; torch stores W as (n x C x kernel), so that m is C times the kernel's places.

    All sides are along the map's axes; ``padding`` has the zeros before and behind each. ``groups`` see channels of their own: C and
    n are those of all groups, and the matrix holds each column's own group. ``transposed``: the weight is (C x n x kernel), and
    ``wider`` are the places that the map is made larger by behind.
    """

    kernel: Sides
    stride: Sides
    padding: tuple[tuple[int, int], ...]
    dilation: Sides
    groups: int = 1
    transposed: bool = False
    wider: Sides = ()
    kind: ClassVar[str] = "convolution"

    @property
    def axis(self) -> int:
        return -1 - len(self.kernel)

    @property
    def unit(self) -> int:
        return math.prod(self.kernel)

    @property
    def bits_only(self) -> str:
        if self.transposed:
            return "a transposed convolution"
        if len(self.kernel) > 2:
            return "a convolution of three axes"
        return f"a convolution in {self.groups} groups" if self.groups > 1 else ""

    def matrix(self, stored: Tensor) -> Tensor:
        return (stored.movedim(1, 0) if self.transposed else stored).flatten(1).T

    def stored(self, matrix: Tensor) -> Tensor:
        weight = matrix.T.unflatten(1, (-1, *self.kernel))
        return weight.movedim(1, 0) if self.transposed else weight

    def along(self, axis: int) -> "Convolution":
        """The part of the convolution that goes along one axis."""

        def only(sides: tuple[Any, ...], nothing: Any) -> tuple[Any, ...]:
            return tuple(side if place == axis else nothing for place, side in enumerate(sides))

        return replace(
            self, kernel=only(self.kernel, 1), stride=only(self.stride, 1), padding=only(self.padding, (0, 0)),
            dilation=only(self.dilation, 1),
        )  # fmt: skip

    def padded(self, x: Tensor) -> Tensor:
        """The map with zeros around."""
        return functional.pad(x, [side for pair in reversed(self.padding) for side in pair])

    def enter(self, x: Tensor, weight: Tensor) -> Tensor:
        convolved = CONVOLVED[len(self.kernel)]
        if not weight.numel():
            return x.new_zeros(*x.shape[: self.axis], weight.shape[1], *self.made(tuple(x.shape[self.axis + 1 :])))
        sides = tuple(before for before, _ in self.padding)
        if self.transposed:
            turned = TRANSPOSED[len(self.kernel)]
            return turned(x, self.stored(weight), None, self.stride, sides, self.wider, self.groups, self.dilation)
        if all(before == behind for before, behind in self.padding):
            return convolved(x, self.stored(weight), None, self.stride, sides, self.dilation, self.groups)
        return convolved(self.padded(x), self.stored(weight), None, self.stride, 0, self.dilation, self.groups)

    def product(self, h: Tensor, weight: Tensor) -> Tensor:
        if not weight.numel():
            return h.new_zeros(*h.shape[: self.axis], weight.shape[1], *h.shape[self.axis + 1 :])
        return CONVOLVED[len(self.kernel)](h, weight.T.reshape(*weight.T.shape, *[1] * len(self.kernel)))

    def made(self, sides: Sides) -> Sides:
        """The sides of the map that is made of one."""
        return tuple(
            max(0, (side + sum(around) - reach * (places - 1) - 1) // step + 1)
            for side, around, reach, places, step in zip(sides, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )  # fmt: skip

    def read(self, made: Sides) -> Sides:
        """The least sides of a map that one of these sides is made of."""
        axes = zip(made, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        return tuple(
            max(1, step * (side - 1) + reach * (places - 1) + 1 - sum(around))
            for side, around, reach, places, step in axes
        )

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        """Patches at ``POSITIONS`` of each sample's map, each from a stretch of its own; the same for a sample whenever it comes."""
        x = x[None] if x.ndim == -self.axis else x
        sides = self.made(tuple(x.shape[2:]))
        places = positions(first, len(x), math.prod(sides))
        index = [torch.arange(len(x)).reshape(-1, *[1] * (1 + len(sides)))]
        for axis, spot in enumerate(np.unravel_index(places, sides) if places.size else [places] * len(sides)):
            reached = spot[:, :, None] * self.stride[axis] + np.arange(self.kernel[axis]) * self.dilation[axis]
            shape = [-1 if other == axis else 1 for other in range(len(sides))]
            index.append(torch.from_numpy(reached).reshape(*reached.shape[:2], *shape))
        # samples, positions, kernel, channels
        patches = self.padded(x).movedim(1, -1)[tuple(part.to(x.device) for part in index)]
        return patches.movedim(-1, 2).flatten(0, 1).flatten(1)

    def outputs(self, y: Tensor, first: int | None = None) -> Tensor:
        y = (y[None] if y.ndim == -self.axis else y).flatten(2)
        if first is None or y.shape[2] <= POSITIONS:
            return y.movedim(1, -1).flatten(0, 1)
        places = torch.from_numpy(positions(first, len(y), y.shape[2])).to(y.device)
        return y.gather(2, places[:, None].expand(-1, y.shape[1], -1)).movedim(1, -1).flatten(0, 1)


def positions(first: int, samples: int, size: int) -> np.ndarray:
    """Places (samples x p) among ``size``, ascending: one in each of equal stretches, where in it the sample's number says."""
    if size <= POSITIONS:
        return np.broadcast_to(np.arange(size), (samples, size))
    number = np.arange(first * POSITIONS, (first + samples) * POSITIONS, dtype=np.uint64).reshape(samples, -1)
    # multiples of the golden ratio: evenly spread
    part = (number * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) / 2.0**53
    return ((np.arange(POSITIONS) + part) * size / POSITIONS).astype(np.int64)
