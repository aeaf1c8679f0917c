"""ONNX models whose chosen layers compute with factors, as plain standard nodes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Dense, Factors, LowRank, SparseLowRank, members, span
from slrprop.network.onnx_file import OnnxFile
from slrprop.network.onnx_graph import Graph


class _Writer:
    """Nodes and initializers that take the place of one layer."""

    def __init__(self, graph: Graph, name: str, opset: int, taken: set[str], new: dict[str, np.ndarray]) -> None:
        self.graph, self.name, self.layer = graph, name, graph.layers[name]
        self.node = self.graph.nodes[self.layer.index]
        self.dtype = self.graph.constants[self.layer.weight].dtype
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self._taken, self._new = taken, new
        self._rank = 2 if self.node.op_type == "Gemm" else self.graph.rank(self.layer.x)
        self.last_axis = -1 if self.opset >= 11 or self._rank is None else self._rank - 1

    def fresh(self, what: str) -> str:
        """A name that nothing has yet."""
        base = name = f"{self.name}/{what}"
        count = 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def tensor(self, what: str, value: Tensor | np.ndarray) -> str:
        """A new initializer; real numbers take the layer's type."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        name = self.fresh(what)
        self._new[name] = array.astype(self.dtype, copy=False) if array.dtype.kind == "f" else array
        return name

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """A new node; the name of its output."""
        output = output or self.fresh(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [output], self.fresh(f"{op}_node"), **attributes))
        return output

    def slice(self, x: str, part: slice) -> str:
        if self.opset < 10:
            return self.add("Slice", [x], axes=[self.last_axis], starts=[part.start], ends=[part.stop])
        numbers = (("start", part.start), ("stop", part.stop), ("axis", self.last_axis))
        return self.add("Slice", [x, *(self.tensor(what, np.array([number])) for what, number in numbers)])

    def gather(self, x: str, index: Tensor, output: str | None = None) -> str:
        """``x[..., index]``; by whole rows of the transpose where the axes are known: the runtime copies those far faster."""
        places = self.tensor("order", index.long())
        if self._rank is None:
            return self.add("Gather", [x, places], output, axis=self.last_axis)
        axes = range(self._rank)
        turned = self.add("Transpose", [x], perm=[axes[-1], *axes[:-1]])
        picked = self.add("Gather", [turned, places], axis=0)
        return self.add("Transpose", [picked], output, perm=[*axes[1:], 0])

    def join(self, parts: list[str], output: str | None = None) -> str:
        return (
            parts[0] if len(parts) == 1 and output is None else self.add("Concat", parts, output, axis=self.last_axis)
        )

    def product(self, x: str, weight: str, output: str | None = None) -> str:
        return self.add("MatMul", [x, weight], output)

    def dense(self, form: Dense, moved: Tensor | None) -> None:
        """The same node with another weight."""
        node = NodeProto()
        node.CopyFrom(self.node)
        weight = form.weight.T if self.layer.trans_b else form.weight
        node.input[1] = self.tensor("weight", weight.contiguous())
        if self.layer.alpha != 1:
            next(item for item in node.attribute if item.name == "alpha").f = 1.0
        if moved is not None and self.layer.bias is not None and self.layer.adder == self.layer.index:
            node.input[2] = self.bias(moved, 1.0)
        self.nodes.append(node)

    def bias(self, moved: Tensor | None, beta: float) -> str:
        """The bias times beta in the new order of the outputs; the old one where nothing changes."""
        name = self.layer.bias
        assert name is not None
        value = self.graph.constants[name].load()
        if (moved is None or value.size == 1) and beta == 1:
            return name
        value = value if moved is None or value.size == 1 else value[..., moved.numpy()]
        return self.tensor("bias", value * np.asarray(beta, value.dtype))

    def factored(self, form: Factors, moved: Tensor | None) -> None:
        """Smaller products in the place of the node; a Gemm's bias becomes an Add."""
        out, layer = self.node.output[0], self.layer
        x = self.add("Transpose", [layer.x], perm=[1, 0]) if layer.trans_a else layer.x
        with_bias = layer.bias is not None and layer.adder == layer.index
        y = self.fresh("product") if with_bias else out
        if isinstance(form, LowRank):
            self.product(self.product(x, self.tensor("left", form.left)), self.tensor("right", form.right), y)
        elif isinstance(form, SparseLowRank):
            self._blocks(form, x, y)
        else:
            raise SlrpropError(f"no ONNX nodes compute with {type(form).__name__} factors")
        if with_bias:
            self.add("Add", [y, self.bias(moved, layer.beta)], out)

    def _blocks(self, form: SparseLowRank, x: str, y: str) -> None:
        hidden = []
        for level, left in enumerate(form.left):
            index = members(form.row_levels, level)
            piece = span(index)
            whole = len(index) == form.shape[0]
            seen = x if whole else self.gather(x, index) if piece is None else self.slice(x, piece)
            hidden.append(self.product(seen, self.tensor(f"left_{level}", left)))
        segments, order = form.segments()
        parts = []
        only = len(segments) == 1 and order is None
        for segment in segments:
            if segment.level:
                source, right = self.join(hidden[: segment.level]), segment.right
            else:
                source, right = self.slice(hidden[0], slice(0, 1)), form.left[0].new_zeros(1, len(segment.columns))
            parts.append(self.product(source, self.tensor("right", right), y if only else None))
        if not only:
            joined = self.join(parts, y if order is None else None)
            if order is not None:
                self.gather(joined, order, y)


def rewritten(file: OnnxFile, layers: Graph, forms: Mapping[str, Factors], orders: Mapping[str, Tensor]) -> OnnxFile:
    """The model with the layers' factors in the place of their weights; the rest stays as it is.

    Args:
        orders: for layers whose outputs were put in another order, that order (n,).
    """

    def edit(graph: GraphProto) -> dict[str, np.ndarray]:
        taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
        taken |= {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        new: dict[str, np.ndarray] = {}
        nodes: dict[int, list[NodeProto]] = {}
        for name, form in forms.items():
            writer, moved = _Writer(layers, name, file.opset, taken, new), orders.get(name)
            if isinstance(form, Dense):
                writer.dense(form, moved)
            else:
                writer.factored(form, moved)
            nodes[writer.layer.index] = writer.nodes
            adder = writer.layer.adder
            if moved is not None and adder is not None and adder != writer.layer.index:
                added = NodeProto()
                added.CopyFrom(writer.graph.nodes[adder])
                place = list(added.input).index(writer.layer.bias or "")
                added.input[place] = writer.bias(moved, 1.0)
                nodes[adder] = [added]
        result = [new_node for i, node in enumerate(graph.node) for new_node in nodes.get(i, [node])]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in result]
        del graph.node[:]
        graph.node.extend(copies)
        return new

    return file.edited(edit)
