"""Networks: find dense layers, stream their inputs, run what follows a layer, swap weights."""

from pathlib import Path

from torch import nn

import slrprop.network.onnx_sparse  # noqa: F401  (registers its nodes)
from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.network.base import Flow, Network
from slrprop.network.chain import Chain, Step
from slrprop.network.onnx import OnnxNetwork
from slrprop.network.onnx_file import OnnxFile
from slrprop.network.torch import TorchNetwork

__all__ = ["Chain", "Flow", "Network", "OnnxNetwork", "Step", "TorchNetwork", "open_network"]


def open_network(model: nn.Module | OnnxFile | str | Path, data: Data | None) -> Network:
    """A torch module, or the path of an ONNX file, as a network."""
    if isinstance(model, nn.Module):
        return TorchNetwork(model, data)
    if isinstance(model, (str, Path, OnnxFile)):
        return OnnxNetwork(model, data)
    raise SlrpropError(f"model must be a torch.nn.Module or the path of an .onnx file, got {type(model).__name__}")
