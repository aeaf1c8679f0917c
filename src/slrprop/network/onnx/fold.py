"""Batch norm put into the layer before it in an ONNX graph, which then computes the same with fewer numbers and nodes."""

from collections.abc import Mapping

import numpy as np
from onnx import GraphProto, helper

from slrprop.errors import SlrpropError
from slrprop.network.chain import Affine
from slrprop.network.onnx.constants import tensor_of
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.graph import Graph
from slrprop.network.onnx.tensors import refill
from slrprop.network.onnx.writer import Additions
from slrprop.operators import Lookup


def norms_of(graph: Graph) -> dict[str, tuple[int, Affine]]:
    """The batch norms that alone take what a layer makes, by the layer's name: their nodes, and what they compute.

    Numbers of half precision are left alone: the product would be rounded anew.
    """
    found = {}
    for name, layer in graph.layers.items():
        readers, axes = graph.readers[layer.y], graph.rank(layer.x)
        maps = layer.operator.axis != -1  # channels on axis 1, as a batch norm takes them
        alone = len(readers) == 1 and layer.y not in graph.outputs and not isinstance(layer.operator, Lookup)
        if alone and (maps or axes == 2) and graph.constants[layer.weight].dtype != np.float16:
            affine = graph.affine(graph.nodes[readers[0]])
            if affine and len(affine.scale) == layer.shape[1] and graph.nodes[readers[0]].input[0] == layer.y:
                found[name] = readers[0], affine
    return found


def folded(file: OnnxFile, norms: Mapping[str, str]) -> OnnxFile:
    """The model whose batch norms are in the layers before them, by these layers' names, which the layers keep.

    Raises:
        SlrpropError: the model has no such layer or no such batch norm.
    """
    graph, known = file.graph, norms_of(file.graph)
    for name, norm in norms.items():
        if name not in known or graph.label(known[name][0]) != norm:
            raise SlrpropError(
                f"the plan folds the batch norm '{norm}' into '{name}', which this model does not have; it was made for another model"
            )

    def edit(proto: GraphProto) -> dict[str, np.ndarray]:
        additions, gone = Additions(proto, file.opset), set[int | None]()
        for name in norms:
            layer, (index, affine) = graph.layers[name], known[name]
            node, norm, dtype = proto.node[layer.index], proto.node[index], graph.constants[layer.weight].dtype
            weight, bias = tensor_of(graph.weight(layer)) * affine.scale, graph.bias(layer)
            shift = affine.shift if bias is None else affine.shift + affine.scale * tensor_of(bias)
            added = additions.tensor(shift.numpy().astype(dtype))
            node.name = name
            node.input[layer.port] = additions.tensor(layer.stored(weight).contiguous().numpy().astype(dtype))
            if node.op_type == "MatMul":
                norm.CopyFrom(helper.make_node("Add", [node.output[0], added], norm.output))
                gone.add(layer.adder)
                continue
            refill(node.input, [*node.input[:2], added])
            refill(node.attribute, [item for item in node.attribute if item.name not in ("alpha", "beta")])
            node.output[0] = norm.output[0]
            gone.add(index)
        refill(proto.node, [node for index, node in enumerate(proto.node) if index not in gone])
        return additions.tensors

    return file.edited(edit)
