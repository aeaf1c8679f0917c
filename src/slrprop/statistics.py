"""What calibration measured of a layer: one streamed pass, accumulated in float64."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from slrprop.data import Data
from slrprop.network.base import Network


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over ``samples`` calibration samples (each call and token of the layer is one).

    ``input_abs`` (m,) is the sum of ``|x|``; ``output_abs`` (n,) the sum of ``|y|`` after the layer's nonlinearity.
    Only what was asked for is there.
    """

    samples: int
    sums: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name]


QUANTITIES = ("input_abs", "output_abs")


def collect(network: Network, names: tuple[str, ...], data: Data, needs: Collection[str]) -> dict[str, Statistics]:
    """Collect the needed ``QUANTITIES`` of the named layers in one pass over the data."""
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    samples = dict.fromkeys(names, 0)
    for flow in network.stream(names, data):
        for name, calls in flow.calls.items():
            for x, y in calls:
                samples[name] += len(x)
                for need in needs:
                    values = x if need == "input_abs" else network.activated(name, y)
                    total = values.abs().sum(0, dtype=torch.float64)
                    sums[name][need] = sums[name][need] + total if need in sums[name] else total
    return {name: Statistics(samples[name], sums[name]) for name in names}
