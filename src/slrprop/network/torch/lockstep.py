"""Batches in lockstep through a torch module: a thread each, of which one runs at a time."""

import copy
import threading
from collections.abc import Mapping
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from slrprop.data import Batch, Data
from slrprop.forms import Dense
from slrprop.memory import give_back_buffers
from slrprop.network.lockstep import Changed, Lockstep
from slrprop.network.torch.find import undisturbed
from slrprop.network.torch.network import TorchNetwork, swapped
from slrprop.operators import Operator


class _Closed(BaseException):
    """Ends a forward pass that nobody waits for any more; no ``except Exception`` of a model swallows it."""


class _Stop(nn.Module):
    """A layer that its batches may be told to stand before, and that may compute something else by then."""

    def __init__(self, name: str, operator: Operator, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name, self.operator = name, operator
        self.weight, self.bias = weight, bias
        self.now: Changed | None = None

    def laid(self, form: Changed) -> tuple[Tensor, Tensor]:
        """Another matrix and bias, in memory as torch stores a weight: products round as those of its own layers."""
        stored = self.operator.stored(form.weight.to(self.weight)).contiguous()
        return self.operator.matrix(stored), form.bias.to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        traveller = threading.current_thread()
        if isinstance(traveller, _Traveller):  # not in a thread of the model's own
            traveller.arrive(self.name, x)
        weight, bias = (self.operator.matrix(self.weight), self.bias) if self.now is None else self.laid(self.now)
        return self.operator.compute(Dense(weight), bias, x)


class _Traveller(threading.Thread):
    """One batch's forward pass, which stops before the layer it was sent to."""

    def __init__(self, network: TorchNetwork, batch: Batch) -> None:
        super().__init__(daemon=True)
        self.network, self.batch = network, batch
        self.error: BaseException | None = None
        self.ended = False
        self._goals: SimpleQueue[str | None] = SimpleQueue()
        self._reached: SimpleQueue[Tensor | None] = SimpleQueue()

    def run(self) -> None:
        try:
            self._await()
            with torch.no_grad():
                self.network.call(self.batch)
        except _Closed:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._reached.put(None)

    def _await(self) -> None:
        self.goal = self._goals.get()
        if self.goal is None:
            raise _Closed

    def arrive(self, name: str, x: Tensor) -> None:
        """Called by every layer, in this thread."""
        if name == self.goal:
            give_back_buffers()
            self._reached.put(x)
            self._await()

    def send(self, goal: str | None) -> Tensor | None:
        """On to a layer, or None to end the pass: what is handed to that layer, None where the pass has ended."""
        if self.ended:
            return None
        self._goals.put(goal)
        return self._reached.get()


class TorchLockstep(Lockstep):
    """See :class:`Lockstep`; a copy of the module that shares all its tensors is run."""

    def __init__(self, network: TorchNetwork, data: Data) -> None:
        super().__init__(network)
        self._stops = {name: _Stop(name, network.operator(name), *network.arrays[name]) for name in network.order}
        running = copy.copy(network)
        running.model = swapped(network.model, self._stops, sharing=True).eval()
        self._travellers = [_Traveller(running, batch.to(network.device)) for batch in network.batches(data)]
        for traveller in self._travellers:
            traveller.start()

    def _go(self, name: str, between: Mapping[str, Changed | None]) -> list[Tensor] | None:
        for layer, form in between.items():
            self._stops[layer].now = form
        found, operator, first = [], self.network.operator(name), 0
        for traveller in self._travellers:
            with undisturbed(traveller.network.device):
                x = traveller.send(name)
            if traveller.error is not None:
                raise traveller.error
            if x is None:
                return None
            found.append(operator.inputs(x, first))
            first += traveller.batch.samples
        return found

    def close(self) -> None:
        for traveller in self._travellers:
            traveller.send(None)
        self._travellers, self._inputs = [], []
