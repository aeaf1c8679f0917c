"""All batches on their way through a network at once, so that what lies before a layer is run once and not for every layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from slrprop.memory import give_back
from slrprop.network.base import Network


class Changed(Protocol):
    """What a layer computes instead of the original: its dense weight (m x n) and bias (n,)."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor: ...


class Lockstep(ABC):
    """The batches of a data set, all standing before one layer and then before a later one.

    A layer computes what is known of it when the batches pass it. For networks whose layers are all called once.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._order = network.order
        self._at = 0  # the position in ``order`` of the layer that is passed next
        self._passed: dict[str, Changed | None] = {}
        self._inputs: list[Tensor] = []

    def reaches(self, name: str, changed: Mapping[str, Changed]) -> bool:
        """Whether the layer lies ahead, or reads what the present one reads, and those behind computed what they should."""
        ahead = self._order.index(name) >= self._at or self._reads_this(name)
        return ahead and all(changed.get(layer) is form for layer, form in self._passed.items())

    def _reads_this(self, name: str) -> bool:
        here, network = self._order[self._at], self.network
        alike = network.operator(here) == network.operator(name)
        return bool(self._inputs) and alike and here in network.siblings(name)

    def inputs(self, name: str, changed: Mapping[str, Changed]) -> list[Tensor] | None:
        """What every batch hands to a layer (p x m), once :meth:`reaches` says so; None where a batch does not come by, or all take too much memory."""
        if self._reads_this(name):
            return self._inputs
        at = self._order.index(name)
        between = {layer: changed.get(layer) for layer in self._order[self._at : at]}
        self._passed |= between
        found = self._go(name, between)
        give_back()
        self._at, self._inputs = at, found or []
        return found

    @abstractmethod
    def _go(self, name: str, between: Mapping[str, Changed | None]) -> list[Tensor] | None:
        """On to a layer, past those between; None where a batch does not come by."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the batches."""
