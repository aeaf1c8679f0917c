"""What follows a layer, as long as every channel goes its own way, and where that is a chain of dense layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slrprop.forms import Bias, Dense, Fit

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True, eq=False)
class Step:
    """``z -> activation(z) @ weight + bias`` with ``weight`` (m x n); ``name`` of the dense layer."""

    activation: str
    weight: Tensor
    bias: Tensor
    name: str | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return torch.addmm(self.bias, ACTIVATIONS[self.activation](z), self.weight)


@dataclass(frozen=True, eq=False)
class Chain:
    """From a dense layer's output y (p x n) to the network's outputs: ``z = y * scale + shift``, then the steps.

    Batch norm in evaluation mode is folded into ``scale`` and ``shift`` or into the steps.
    """

    scale: Tensor
    shift: Tensor
    steps: tuple[Step, ...]

    def is_plain(self, weight: Callable[[str], Tensor]) -> bool:
        """Whether the steps are the layers themselves: no batch norm is folded into them."""
        if not ((self.scale == 1).all() and (self.shift == 0).all()):
            return False
        return all(
            step.name is not None and torch.equal(step.weight, weight(step.name).to(step.weight)) for step in self.steps
        )

    def values(self, y: Tensor) -> list[Tensor]:
        """The pre-activation of every layer from this one on; the last is the network's output."""
        z = [y * self.scale + self.shift]
        for step in self.steps:
            z.append(step(z[-1]))
        return z


@dataclass(frozen=True, eq=False)
class Affine:
    """``z * scale + shift`` per feature; ``name`` of the batch norm, where it has numbers for these features alone."""

    scale: Tensor
    shift: Tensor
    name: str | None = None

    @classmethod
    def of(
        cls, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, name: str | None = None
    ) -> "Affine":
        """What a batch norm does in evaluation mode."""
        scale = (var + eps).rsqrt() * (1 if weight is None else weight.detach())
        return cls(scale, (0 if bias is None else bias.detach()) - mean * scale, name)

    def behind(self, weight: Tensor, bias: Tensor | None) -> Fit:
        """A layer (m x n) that does this to its outputs, too."""
        return Fit(Dense(weight * self.scale), Bias(self.shift if bias is None else bias * self.scale + self.shift))


@dataclass(frozen=True, eq=False)
class Linear:
    """``a @ weight + bias``; of a convolution, ``a`` are patches."""

    weight: Tensor
    bias: Tensor
    name: str | None


Element = Affine | Linear | str  # a str names an activation, or another function of each channel alone


class Path(NamedTuple):
    """What happens to a layer's output, as far as it can be followed.

    ``whole``: up to the network's main output, a final softmax aside. ``stop``: why the values before the next layer must stay as
    many as they are, in words; empty where nobody else sees them, and nothing but ``carriers`` before it knows how many there are.
    """

    elements: list[Element]
    whole: bool
    stop: str
    carriers: tuple[str, ...] = ()

    @property
    def norm(self) -> Affine | None:
        """The batch norm right behind the layer, where it has numbers for these channels alone."""
        first = next(iter(self.elements), None)
        return first if isinstance(first, Affine) and first.name else None


class Walk:
    """A path while it is followed: ``width`` channels, which are on axis 1 of ``maps``, else on the last.

    ``ended``: the rest is of no use, what convolutions lead to is not computed from their outputs.
    """

    def __init__(self, width: int, maps: bool) -> None:
        self.elements: list[Element] = []
        self.carriers: list[str] = []
        self.width, self.maps, self.from_maps, self.stop = width, maps, maps, ""
        self.read = self.ended = False  # by a layer

    def hold(self, why: str) -> None:
        """Let nothing change the channels before the next layer."""
        self.stop = self.stop or ("" if self.read else why)

    def carry(self, name: str) -> None:
        """Let this change together with the channels before the next layer."""
        self.carriers += [] if self.read else [name]

    def take(self, element: Element) -> None:
        """Go on over an element; ``"same"`` changes nothing."""
        if isinstance(element, Affine) and element.name:
            self.carry(element.name)
        elif isinstance(element, Affine):
            self.hold("a batch norm behind it has other uses, or more numbers than one a channel")
        if isinstance(element, Linear):
            self.read, self.ended, self.width = True, self.from_maps, element.weight.shape[1]
        self.elements += [] if element == "same" else [element]

    def end(self, whole: bool, why: str = "no layer reads its outputs") -> Path:
        self.hold(why)
        return Path(self.elements, whole, self.stop, tuple(self.carriers))


def fold(elements: list[Element], like: Tensor) -> Chain | None:
    """The elements as a chain; None where two activations stand in a row or one stands at the end, or another function anywhere.

    Args:
        like: any tensor of the layer's output width n, on its device, in the dtype to compute with.
    """
    scale, shift = torch.ones_like(like), torch.zeros_like(like)
    steps: list[Step] = []
    activation: str | None = None
    pending = [scale, shift]  # the affine map waiting for the next dense layer: after an activation
    for element in elements:
        if isinstance(element, Affine):
            element = Affine(element.scale.to(like), element.shift.to(like))
            if activation is not None:
                pending = [pending[0] * element.scale, pending[1] * element.scale + element.shift]
            elif steps:
                last = steps[-1]
                bias = last.bias * element.scale + element.shift
                steps[-1] = replace(last, weight=last.weight * element.scale, bias=bias)
            else:
                scale, shift = scale * element.scale, shift * element.scale + element.shift
        elif isinstance(element, Linear):
            weight, bias = element.weight.to(like), element.bias.to(like)
            if activation is not None:
                weight, bias = pending[0][:, None] * weight, bias + pending[1] @ weight
            steps.append(Step(activation or "identity", weight.contiguous(), bias, element.name))
            activation = None
        elif activation is not None or element not in ACTIVATIONS:
            return None
        else:
            activation = element
            width = steps[-1].bias if steps else like
            pending = [torch.ones_like(width), torch.zeros_like(width)]
    return None if activation is not None else Chain(scale, shift, tuple(steps))
