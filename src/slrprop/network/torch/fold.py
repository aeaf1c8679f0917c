"""Batch norm put into the layer before it, which then computes the same with fewer numbers, or cut with the channels it is between."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slrprop.errors import SlrpropError
from slrprop.network.chain import Affine
from slrprop.network.torch.find import binding, is_norm, layer_modules, named_modules, operator_of, weight_and_bias
from slrprop.network.torch.modules import layer_from, note_shape
from slrprop.network.torch.network import swapped


class Folded(nn.Identity):
    """In the place of a batch norm whose numbers are in the layer before it."""


def folded(model: nn.Module, norms: Mapping[str, str]) -> nn.Module:
    """A copy of the model whose batch norms are folded into the layers before them, by these layers' names.

    Raises:
        SlrpropError: the model has no such layer or no such batch norm, or they do not fit.
    """
    layers, modules, swaps = layer_modules(model), named_modules(model), dict[str, nn.Module]()
    for name, norm_name in norms.items():
        layer, norm = layers.get(name), modules.get(norm_name)
        if layer is None or isinstance(layer, nn.Embedding) or binding(layer) or not is_norm(norm):
            raise SlrpropError(f"the plan folds the batch norm '{norm_name}' into '{name}', which this model does not have; it was made for another model")  # fmt: skip
        (weight, bias), operator = weight_and_bias(layer), operator_of(layer)
        parts: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        matrix, affine = operator.matrix(weight), Affine.of(*parts)
        if len(affine.scale) != matrix.shape[1]:
            raise SlrpropError(f"the plan folds the batch norm '{norm_name}' of {len(affine.scale)} channels into '{name}', which makes {matrix.shape[1]}; it was made for another model")  # fmt: skip
        new = layer_from(affine.behind(matrix, bias), operator)
        note_shape(new, matrix.shape)  # a file says that it has a bias now
        swaps |= {name: new.to(weight.dtype), norm_name: Folded()}
    return swapped(model, swaps)


def resized(norm: _BatchNorm, channels: int) -> nn.Module:
    """A batch norm like this one for so many channels."""
    kind = next(kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(norm, kind))
    new = kind(channels, norm.eps, norm.momentum, norm.affine)
    note_shape(new, (norm.num_features, channels))
    return new.to(norm.running_mean)


def carried(model: nn.Module, widths: Mapping[str, int], orders: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Batch norms for those of so many channels (``widths``, by name) whose channels go or move: with those in ``orders``, in that order.

    Raises:
        SlrpropError: the model has no such batch norm.
    """
    modules, swaps = named_modules(model), dict[str, nn.Module]()
    for name, width in widths.items():
        norm = modules.get(name)
        if not is_norm(norm) or norm.num_features != width:
            raise SlrpropError(f"the plan says that '{name}' is a batch norm of {width} channels, which it is not in this model; it was made for another model")  # fmt: skip
        if name in orders:
            swaps[name] = new = resized(norm, len(orders[name]))
            for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                if (value := getattr(norm, key)) is not None:
                    getattr(new, key).data.copy_(value[orders[name]] if value.ndim else value)
    return swaps
