"""SLRProp: sparse low rank with relevance propagated from the final response layer."""

from collections.abc import Callable, Iterator
from typing import Literal

from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms import Form
from slrprop.methods.base import Decision, Problem
from slrprop.methods.slr import ShortenSettings, channels_of, shortened
from slrprop.network.base import Network
from slrprop.operators import Operator
from slrprop.relevance.simple import Scores, by_channel, propagated


class SLRPropSettings(ShortenSettings):
    """SLRProp: costs at the final response layer, propagated back to the inputs of the layers before it.

    The final response layer (FRL) is the last layer before the classifier's own. Of a convolution, neurons are its channels.

    Args:
        frl: the FRL's name; None finds it.
        propagate: over the ``original`` weights (Eq 6) or the rank-k ``truncated`` ones.
    """

    frl: str | None = None
    propagate: Literal["original", "truncated"] = "original"

    source = "Garmendia-Orbegozo, Nunez-Gonzalez, Anton, Sensors 23(5):2718, 2023"

    def eligible(self, network: Network) -> tuple[str, ...]:
        layers = response_layers(network, self.frl, self.treats)
        return layers if self.treats(network.operator(layers[-1])) else ()

    def obstacle(self, network: Network, name: str) -> str:
        leads = network.next_layer(name) or network.is_last(name)
        return super().obstacle(network, name) or ("" if leads else network.apart(name))

    def decide(self, problem: Problem, layers: tuple[str, ...]) -> Iterator[Decision]:
        """From the FRL back: columns by cost; rows by cost at the FRL and by propagated relevance before it."""
        path = self.eligible(problem.network)
        compressed: dict[str, Form] = {}
        relevance: Tensor | None = None  # of the current layer's outputs
        for name in reversed(path[path.index(layers[0]) :]):
            settings = self.at(problem.network.operator(name), problem.network.shape(name))
            if relevance is None or name in layers:
                rows, columns, _ = problem.cost(name, settings, compressed, inputs=relevance is None)
            if relevance is not None:
                weight = problem.weight(name)
                if self.propagate == "truncated":
                    svd = problem.svd(name, min(settings.rank, *weight.shape), self.solver)
                    weight = svd.left @ svd.vt
                rows = propagated(weight, by_channel(relevance, weight.shape[1]))
                rows = by_channel(rows, channels_of(problem, name))
            relevance = rows
            if name in layers:
                decision = shortened(problem, name, settings, Scores(rows, columns))
                compressed[name] = decision.fit.form
                yield decision


def response_layers(network: Network, frl: str | None, treats: Callable[[Operator], bool]) -> tuple[str, ...]:
    """The FRL and the layers that lead to it, of kinds that are treated, through functions of each channel alone, in order.

    Raises:
        SlrpropError: the FRL is not named and can't be found.
    """
    before = {network.next_layer(name): name for name in network.order if treats(network.operator(name))}
    if frl is None:
        last = next((name for name in network.order if network.is_last(name)), None)
        frl = before.get(last) if last else None
        if frl is None:
            raise SlrpropError(
                "no final response layer was found: no layer leads straight to the one that makes the outputs "
                f"(traced layers: {', '.join(network.order) or 'none'}); name it with frl='...', or use method='slr'"
            )
    network.require(frl)
    names = [frl]
    while (previous := before.get(names[0])) is not None and previous not in names:
        names.insert(0, previous)
    return tuple(names)
