"""Networks: find dense layers, stream their inputs, run what follows a layer, swap weights."""

from slrprop.network.base import Flow, Network
from slrprop.network.chain import Chain, Step
from slrprop.network.torch import TorchNetwork

__all__ = ["Chain", "Flow", "Network", "Step", "TorchNetwork"]
