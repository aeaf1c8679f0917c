"""Batch norm put into the layer before it, which then computes the same with fewer numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from slrprop.errors import SlrpropError
from slrprop.factors import Dense
from slrprop.layers import layer_from, note_shape
from slrprop.network.torch import NORMS, swapped
from slrprop.network.torch_modules import named_modules, operator_of, weight_and_bias


class Folded(nn.Identity):
    """In the place of a batch norm whose numbers are in the layer before it."""


def folded(model: nn.Module, norms: Mapping[str, str]) -> nn.Module:
    """A copy of the model whose batch norms are folded into the layers before them, by these layers' names.

    Raises:
        SlrpropError: the model has no such layer or no such batch norm.
    """
    modules, swaps = named_modules(model), dict[str, nn.Module]()
    for name, norm_name in norms.items():
        layer, norm = modules.get(name), modules.get(norm_name)
        if layer is None or not isinstance(norm, NORMS) or norm.running_mean is None:
            raise SlrpropError(f"the plan folds the batch norm '{norm_name}' into '{name}', which this model does not have; it was made for another model")  # fmt: skip
        (weight, bias), operator = weight_and_bias(layer), operator_of(layer)
        parts: tuple[Tensor | None, ...] = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)  # type: ignore[assignment]
        with torch.no_grad():
            if isinstance(layer, nn.Linear):
                made = fuse_linear_bn_weights(weight, bias, *parts)  # type: ignore[arg-type]
            else:
                made = fuse_conv_bn_weights(weight, bias, *parts, transpose=layer.transposed)  # type: ignore[arg-type,misc]
        new = layer_from(Dense(operator.matrix(made[0].detach())), made[1].detach(), operator)
        note_shape(new, operator.matrix(weight).shape)  # a file says that it has a bias now
        swaps |= {name: new.to(weight.dtype), norm_name: Folded()}
    return swapped(model, swaps)
