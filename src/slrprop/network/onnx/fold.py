"""Batch norm put into the layer before it in an ONNX graph, which then computes the same with fewer numbers and nodes."""

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto

from slrprop.errors import SlrpropError
from slrprop.forms import Fit
from slrprop.network.onnx.constants import tensor_of
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.rewrite import rewritten
from slrprop.network.onnx.tensors import refill


def folded(file: OnnxFile, norms: Mapping[str, str]) -> OnnxFile:
    """The model whose batch norms are in the layers before them, by these layers' names, which the layers keep.

    Raises:
        SlrpropError: the model has no such layer or no such batch norm.
    """
    graph, fits, gone = file.graph, dict[str, Fit](), dict[str, int]()
    for name, norm in norms.items():
        layer = graph.layers.get(name)
        affine = graph.follow(layer).norm if layer is not None and graph.foldable(layer) else None
        if layer is None or affine is None or graph.label(graph.maker[str(affine.name)]) != norm:
            raise SlrpropError(
                f"the plan folds the batch norm '{norm}' into '{name}', which this model does not have; it was made for another model"
            )
        gone[name], bias = graph.maker[str(affine.name)], graph.bias(layer)
        fits[name] = affine.behind(tensor_of(graph.weight(layer)), None if bias is None else tensor_of(bias))

    def edit(proto: GraphProto) -> dict[str, np.ndarray]:
        for name, index in gone.items():
            norm = proto.node[index]
            proto.node[graph.layers[name].index].name = name
            proto.node[graph.maker[norm.input[0]]].output[0] = norm.output[0]
        refill(proto.node, [node for index, node in enumerate(proto.node) if index not in gone.values()])
        return {}

    return rewritten(file.edited(edit), fits)
