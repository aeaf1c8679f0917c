"""Batch norm put into the layer before it, which then computes the same with fewer numbers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from slrprop.errors import SlrpropError
from slrprop.factors import Dense
from slrprop.layers import layer_from, note_shape
from slrprop.network.chain import Affine
from slrprop.network.torch import swapped
from slrprop.network.torch_modules import binding, is_norm, layer_modules, named_modules, operator_of, weight_and_bias


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
        shift = affine.shift if bias is None else bias * affine.scale + affine.shift
        new = layer_from(Dense(matrix * affine.scale), shift, operator)
        note_shape(new, matrix.shape)  # a file says that it has a bias now
        swaps |= {name: new.to(weight.dtype), norm_name: Folded()}
    return swapped(model, swaps)
