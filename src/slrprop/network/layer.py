"""A weight that can be replaced, whatever holds it, and what else a model holds."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slrprop.operators import Operator


@dataclass(frozen=True)
class Layer:
    """One weight of a network, as a matrix m x n.

    ``positions`` are the products for one sample (1, tokens, height times width; 1 where that is not known), ``calls`` how often the
    layer is run, 0 where the data does not reach it. ``tied`` says what else uses the weight, ``held`` why nothing can take its place.
    """

    name: str
    operator: "Operator"
    shape: tuple[int, int]
    positions: int = 1
    tied: tuple[str, ...] = ()
    calls: int = 1
    held: str = ""


class Contents(ABC):
    """Layers by name, and the numbers beside their weights."""

    layers: Mapping[str, Any]  # Layer, or what has a layer's shape and tied

    @property
    def names(self) -> tuple[str, ...]:
        """All layers."""
        return tuple(self.layers)

    @abstractmethod
    def elsewhere(self) -> Mapping[str, int]:
        """Bytes of numbers beside the layers' weights, by the kind of module or node that uses them."""

    @abstractmethod
    def itemsize(self, name: str) -> int:
        """Bytes that the model stores a number of the layer's weight in."""

    def shape(self, name: str) -> tuple[int, int]:
        """(m, n) of a layer's weight."""
        return self.layers[name].shape

    def other_numbers(self, treated: Collection[str] | None = None) -> str:
        """:meth:`elsewhere` in words, what is 1 % of all and more; layers that are not ``treated`` are part of it."""
        left = {name for name in self.names if treated is not None and name not in treated}
        found = {**self.elsewhere(), "layers that stay": self._dense_bytes(left)}
        parts, total = sorted(found.items(), key=lambda part: -part[1]), self.number_bytes
        return ", ".join(f"{kind} {100 * size / total:.0f} %" for kind, size in parts if size and 100 * size >= total)

    @property
    def number_bytes(self) -> int:
        """Bytes of all numbers."""
        return self._dense_bytes(self.names) + sum(self.elsewhere().values())

    def _dense_bytes(self, names: Iterable[str]) -> int:
        return sum(math.prod(self.shape(name)) * self.itemsize(name) for name in names)
