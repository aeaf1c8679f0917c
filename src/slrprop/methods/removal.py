"""Removing neurons and channels between layers: smaller layers, the next layer's weights refitted.

A criterion scores the neurons between a layer and the one that reads them, of a convolution its channels. Those that stay are
given the next layer's weights anew, by least squares; what the removed ones gave on average goes into its bias.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slrprop.checks import Density
from slrprop.errors import SlrpropError
from slrprop.fit.regression import DAMPING, Regression
from slrprop.forms import Narrowed
from slrprop.losses import rows_of
from slrprop.methods.base import Decision, Problem
from slrprop.methods.calibrated import CalibratedMethod, CalibratedSettings, in_order
from slrprop.network.base import Flow, Network
from slrprop.network.chain import Chain
from slrprop.relevance.simple import by_channel, highest

Terms = Callable[[str, Tensor, Tensor, Flow], Tensor]
SHARES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class RemovalSettings(CalibratedSettings):
    """Settings of every method that removes neurons, or channels, between a layer and the next one.

    Args:
        keep: share of the layer's outputs that stay, above 0, at most 1.
        refit: fit the next layer's weights anew to the neurons that stay.
    """

    keep: Density = 0.5
    refit: bool = True

    coupled = True

    def stored_numbers(self, m: int, n: int) -> int:
        return m * kept_count(n, self.keep)

    @classmethod
    def ladder(cls, m: int, n: int) -> list[dict[str, Any]]:
        counts = {kept_count(n, keep): keep for keep in reversed(SHARES)}
        return [{"keep": counts[count]} for count in sorted(counts) if count < n]

    def eligible(self, network: Network) -> tuple[str, ...]:
        return tuple(first for first in network.order if self.reader(network, first) is not None)

    def obstacle(self, network: Network, name: str) -> str:
        return super().obstacle(network, name) or network.apart(name)

    def reader(self, network: Network, first: str) -> str | None:
        """The layer that reads a layer's outputs, where both can be changed."""
        following = network.next_layer(first)
        names = [name for name in (first, following) if name]
        free = all(network.layers[name].calls == 1 and not network.stays(name) for name in names)
        treated = free and all(self.treats(network.operator(name)) for name in names)
        return following if treated and following in network.order else None

    def decide(self, problem: Problem, layers: tuple[str, ...]) -> Iterator[Decision]:
        """The layers whose neurons are removed and those that read them, in order of execution."""
        network = problem.network
        pairs = {first: following for first in layers if (following := self.reader(network, first)) is not None}
        kept, read = dict[str, Tensor](), dict[str, Tensor]()
        for first, found in self.scores(problem, pairs).items():
            rows, count = network.shape(pairs[first])[0], network.shape(first)[1]
            kept[first] = highest(by_channel(found, count), kept_count(count, self.keep))
            read[pairs[first]] = kept[first].repeat_interleave(rows // count)
        made = {first: mask for first, mask in kept.items() if network.junction(first)}

        def method(layer: str) -> CalibratedMethod:
            fit = partial(narrowed, rows=read.get(layer), columns=made.get(layer))
            return CalibratedMethod(self.called(), type(self), fit)

        wide = replace(self, bits=32)  # for a layer that was not asked for
        touched = {layer: (method(layer), self if layer in layers else wide) for layer in (*read, *made)}
        for decision in in_order(problem, touched):
            asked = decision.name in layers or decision.settings is not None
            yield decision if asked else decision._replace(settings=wide)

    @abstractmethod
    def scores(self, problem: Problem, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """The criterion: for every layer's neurons a score (n,), or one for each row that reads them; larger is more relevant.

        Args:
            pairs: the layers whose neurons are scored, each with the layer that reads them.
        """


class ChainedSettings(RemovalSettings):
    """Settings of criteria that need the loss behind a layer: a chain of dense layers up to the outputs must follow."""

    def eligible(self, network: Network) -> tuple[str, ...]:
        return tuple(name for name in super().eligible(network) if network.chain(network.next_layer(name) or ""))

    def obstacle(self, network: Network, name: str) -> str:
        return super().obstacle(network, name) or "no chain of dense layers leads from what reads it to the outputs"


class Seen(NamedTuple):
    """A reading layer in one batch: its inputs (p x m) of so many channels, outputs (p x n), weight (m x n), and what follows it."""

    x: Tensor
    y: Tensor
    weight: Tensor
    chain: Chain
    channels: int


def averages(problem: Problem, names: Iterable[str], terms: Terms) -> dict[str, Tensor]:
    """Means over the samples of what ``terms(layer, inputs, outputs, flow)`` gives (p x n), float64 (n,), by layer."""
    sums, samples, layers = dict[str, Tensor](), Counter[str](), tuple(dict.fromkeys(names))
    for flow in problem.network.stream(layers, problem.data):
        for name in layers:
            for x, y in flow.calls[name]:
                found = terms(name, x, y, flow)
                sums[name] = sums.get(name, 0) + found.sum(0, dtype=torch.float64)
                samples[name] += len(found)
    return {name: total / samples[name] for name, total in sums.items()}


def averages_before(
    problem: Problem, pairs: Mapping[str, str], terms: Callable[[Seen, Tensor | None], Tensor]
) -> dict[str, Tensor]:
    """Means over the samples of what a criterion gives for every neuron, float64 (n,), by the neurons' own layer.

    Args:
        pairs: layers and the ones that read them.
        terms: of a reading layer in one batch, and that batch's labels or targets (p x n).

    Raises:
        SlrpropError: on some batch the network does something else than the chain behind a layer.
    """
    network, makers = problem.network, {following: first for first, following in pairs.items()}

    def seen(name: str, x: Tensor, y: Tensor, flow: Flow) -> Tensor:
        chain = network.chain(name)
        if chain is None or not network.reproduces(chain, y, flow.output):
            raise SlrpropError(
                f"what follows layer '{name}' is not the same for all of this data; choose another criterion, like 'apoz'"
            )
        x, y = (rows_of(value).to(chain.scale) for value in (x, y))
        return terms(Seen(x, y, problem.weight(name).to(x), chain, network.shape(makers[name])[1]), flow.batch.targets)

    found = averages(problem, makers, seen)
    return {first: found[following] for first, following in pairs.items()}


def kept_count(count: int, keep: float) -> int:
    """How many of ``count`` neurons stay: the nearest whole number, at least one."""
    return max(1, int(count * keep + 0.5))


def refitted(task: Regression, rows: Tensor) -> Tensor:
    """The weights (kept x n) for the inputs that stay, by least squares; a ridge pulls them towards the old ones."""
    damped = task.damped(DAMPING)[rows]
    return torch.cholesky_solve(damped @ task.weight, torch.linalg.cholesky(damped[:, rows]))


def narrowed(task: Regression, settings: RemovalSettings, rows: Tensor | None, columns: Tensor | None) -> Narrowed:
    """A layer without the inputs and outputs that the masks leave out (None: all stay)."""
    weight = task.weight if settings.refit else task.original
    if rows is not None:
        weight = weight.clone()
        weight[rows] = refitted(task, rows) if settings.refit else weight[rows]
    return Narrowed.cut(weight, rows, columns)
