"""SLRProp: sparse low rank with relevance propagated from the final response layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Factors
from slrprop.methods.base import Decision, Method, Problem
from slrprop.methods.slr import ShortenSettings, build, cost_of, shortened
from slrprop.network.base import Network
from slrprop.operators import MatMul
from slrprop.relevance.simple import Scores, propagated


@dataclass(frozen=True, kw_only=True)
class SLRPropSettings(ShortenSettings):
    """SLRProp: costs at the final response layer, propagated back to the inputs of the layers before it.

    The final response layer (FRL) is the last dense layer before the classifier's own.

    Args:
        frl: the FRL's name; None finds it.
        propagate: over the ``original`` weights (Eq 6) or the rank-k ``truncated`` ones.
    """

    frl: str | None = None
    propagate: Literal["original", "truncated"] = "original"

    source: ClassVar[str] = "Garmendia-Orbegozo, Nunez-Gonzalez, Anton, Sensors 23(5):2718, 2023"

    def eligible(self, network: Network) -> tuple[str, ...]:
        return tuple(name for name in response_layers(network, self.frl) if self.treats(network.operator(name)))


def response_layers(network: Network, frl: str | None) -> tuple[str, ...]:
    """The FRL and the dense layers that lead to it through element-wise functions and batch norm, in order.

    Raises:
        SlrpropError: the FRL is not named and can't be found.
    """
    dense = (name for name in network.order if isinstance(network.operator(name), MatMul) and network.next_layer(name))
    before = {network.next_layer(name): name for name in dense}
    if frl is None:
        last = next((name for name in network.order if network.is_last(name)), None)
        frl = before.get(last) if last else None
        if frl is None:
            raise SlrpropError(
                "no final response layer was found: no dense layer leads straight to the one that makes the outputs "
                f"(traced dense layers: {', '.join(network.order) or 'none'}); name it with frl='...', or use method='slr'"
            )
    network.require(frl)
    names = [frl]
    while (previous := before.get(names[0])) is not None and previous not in names:
        names.insert(0, previous)
    return tuple(names)


def decide(problem: Problem, layers: tuple[str, ...], settings: SLRPropSettings) -> Iterator[Decision]:
    """From the FRL back: columns by cost; rows by cost at the FRL and by propagated relevance before it."""
    path = settings.eligible(problem.network)
    compressed: dict[str, Factors] = {}
    relevance: Tensor | None = None  # of the current layer's outputs
    for name in reversed(path[path.index(layers[0]) :]):
        if relevance is None or name in layers:
            rows, columns, _ = cost_of(problem, name, settings, compressed, inputs=relevance is None)
        if relevance is not None:
            weight = problem.weight(name)
            if settings.propagate == "truncated":
                svd = problem.svd(name, min(settings.rank, *weight.shape), settings.solver)
                weight = svd.left @ svd.vt
            rows = propagated(weight, relevance)
        relevance = rows
        if name in layers:
            decision = shortened(problem, name, settings, Scores(rows, columns))
            compressed[name] = decision.fit.form
            yield decision


METHOD = Method("slrprop", SLRPropSettings, decide, build)
