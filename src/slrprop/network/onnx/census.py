"""Where an ONNX model's numbers are that are no layer's weight."""

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from onnx import GraphProto, TensorProto, helper

from slrprop.network.onnx.constants import attribute, standard
from slrprop.network.onnx.tensors import graphs_of

OWN = "slrprop"  # the name of a node that slrprop made
REAL = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
FOUR_BITS = {TensorProto.INT4, TensorProto.UINT4}
FEW_BITS = {TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN} | FOUR_BITS
PASSED_ON = ("Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear")


class Kept(NamedTuple):
    """A tensor that is made of stored numbers alone."""

    # what stores them: an initializer's name, in a body an object of its own, since names there may repeat
    root: object
    bytes: int
    by: str = ""  # what is done to it before it is used


def elsewhere(graph: GraphProto, dense: set[str]) -> Counter[str]:
    """Bytes of stored numbers by the operator that uses them first, layers' weights (``dense``: their initializers) left out."""
    found: Counter[str] = Counter()
    seen: set[object] = set(dense)

    def visit(graph: GraphProto, outer: Mapping[str, Kept], where: str) -> None:
        known = dict(outer)
        for tensor in graph.initializer:
            keep(known, tensor, tensor.name, where)
        for node in graph.node:
            value = attribute(node, "value") if standard(node) == "Constant" else None
            if isinstance(value, TensorProto) and node.output:
                keep(known, value, node.output[0], where)
            source = known.get(node.input[0]) if node.input else None
            if source is not None and standard(node) in PASSED_ON and node.output:
                by = f" behind {node.op_type}" if node.op_type == "DequantizeLinear" else source.by
                known[node.output[0]] = source._replace(by=by)
                continue
            for name in node.input:
                part = known.get(name)
                if part is not None and part.root not in seen:
                    seen.add(part.root)
                    word = node.op_type.replace("Normalization", "Norm")  # as torch modules are called
                    found[f"{'Embedding' if word == 'Gather' else word}{part.by}{where}"] += part.bytes
            for inner in graphs_of(node):
                visit(inner, known, f" in {node.op_type}")

    def keep(known: dict[str, Kept], tensor: TensorProto, name: str, where: str) -> None:
        if tensor.data_type in REAL | FEW_BITS:
            itemsize = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            bits = 4 if tensor.data_type in FOUR_BITS else 8 * itemsize
            known[name] = Kept(object() if where else name, math.prod(tensor.dims) * bits // 8)

    visit(graph, {}, "")
    return found


def forms_of(graph: GraphProto) -> dict[str, str]:
    """Products with stored numbers that are compressed already: in 8 or 4 bits, or as two factors in a row."""
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}

    @cache
    def made_of(name: str, steps: int = 32) -> frozenset[Any] | None:
        """The kinds of numbers and operators that a tensor is made of; None where it depends on an input."""
        if name in stored:
            return frozenset([stored[name]])
        node = makers.get(name)
        parts = [made_of(part, steps - 1) for part in node.input] if node is not None and steps else [None]
        if node is None or None in parts:
            return None
        return frozenset([node.op_type]).union(*(part or () for part in parts))

    found: dict[str, str] = {}
    for node in graph.node:
        place = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "QLinearMatMul": 3}.get(node.op_type, len(node.input))
        kinds = made_of(node.input[place]) if place < len(node.input) else None
        if kinds is not None:
            four = kinds & {TensorProto.INT4, TensorProto.UINT4, "Floor"}
            bits = "4 bits" if four else "8 bits" if kinds & FEW_BITS else ""
            before = found.pop(node.input[0], None)
            found[node.output[0]] = ", ".join(filter(None, [bits, "" if before is None else "two factors"]))
    return {name: form for name, form in found.items() if form}


def is_own(graph: GraphProto) -> bool:
    """Whether slrprop wrote layers of a graph."""
    return any(node.name == OWN for node in graph.node)
