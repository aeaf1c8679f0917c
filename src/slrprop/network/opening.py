"""A model as a network, with its batch norms folded, in lockstep: whichever door it comes in by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from slrprop.data import Data
from slrprop.network.base import Network
from slrprop.network.lockstep import Lockstep
from slrprop.network.onnx import fold as onnx_fold
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.lockstep import OnnxLockstep
from slrprop.network.onnx.network import OnnxNetwork
from slrprop.network.reading import Reading
from slrprop.network.torch import fold as torch_fold
from slrprop.network.torch.lockstep import TorchLockstep
from slrprop.network.torch.network import TorchNetwork


def open_network(
    model: nn.Module | OnnxFile | str | Path, data: Data | None, reading: Reading | None = None
) -> Network:
    """A torch module, or the path of an ONNX file, as a network; ``reading`` is that of another one for the same task."""
    if isinstance(model, (str, Path, OnnxFile)):
        return OnnxNetwork(model, data, reading)
    return TorchNetwork(model, data, reading)  # which refuses anything else


def folded(model: Any, norms: Mapping[str, str]) -> Any:
    """The module or file (an :class:`OnnxFile`) whose batch norms are folded into the layers before them, by these layers' names.

    Raises:
        SlrpropError: the model has no such layer or no such batch norm.
    """
    if not norms:
        return model
    if isinstance(model, nn.Module):
        return torch_fold.folded(model, norms)
    return onnx_fold.folded(model if isinstance(model, OnnxFile) else OnnxFile.open(model), norms)


def in_lockstep(network: Network, data: Data) -> Lockstep:
    """All batches at the network's beginning, to go through it together."""
    if isinstance(network, TorchNetwork):
        return TorchLockstep(network, data)
    assert isinstance(network, OnnxNetwork)
    return OnnxLockstep(network, data)
