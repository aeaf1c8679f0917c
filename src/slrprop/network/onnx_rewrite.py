"""ONNX models whose chosen layers compute with factors, as plain standard nodes."""

from collections.abc import Mapping
from functools import singledispatch

import numpy as np
import torch
from onnx import GraphProto, NodeProto
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Dense, Factors, LowRank, Narrowed, Quantized, SparseLowRank, members
from slrprop.network.onnx_file import OnnxFile
from slrprop.network.onnx_graph import Graph
from slrprop.network.onnx_writer import Writer

MERGED = 40_000  # zeros that may be multiplied to save nodes: python -m benchmarks.quantisation
GATHERED = 50  # zeros more for every number that blocks would gather
INTEGER = (
    100_000  # numbers from which the runtime's integer products are the faster ones: python -m benchmarks.wide_layers
)
INTEGER_FACTORS = 1_000_000  # the same of low-rank layers
INTEGER_OPSET = 21  # the first with whole numbers of 4 bits


@singledispatch
def product_of(form: Factors, writer: Writer, x: str, y: str) -> None:
    """Write the nodes that make ``y`` of ``x`` by a form, the last one making ``y``. A new form registers its own."""
    raise SlrpropError(f"no ONNX nodes compute with {type(form).__name__} factors")


@product_of.register
def _(form: Dense, writer: Writer, x: str, y: str) -> None:
    writer.product(x, writer.number("weight", form.weight), y)


@product_of.register
def _(form: LowRank, writer: Writer, x: str, y: str) -> None:
    writer.product(writer.product(x, writer.number("left", form.left)), writer.number("right", form.right), y)


@product_of.register
def _(form: SparseLowRank, writer: Writer, x: str, y: str) -> None:
    if writer.opset >= 11 and form.merged_zeros <= MERGED + GATHERED * form.gathered:
        _merged(form, writer, x, y)
    else:
        _blocks(form, writer, x, y)


@product_of.register
def _(form: Narrowed, writer: Writer, x: str, y: str) -> None:
    seen = writer.some(x, form.rows.nonzero()[:, 0], form.shape[0])
    if form.columns.all():
        writer.product(seen, writer.number("block", form.block), y)
        return
    made = writer.product(seen, writer.number("block", form.block))
    zero = writer.product(writer.slice(made, slice(0, 1)), writer.tensor("zero", form.block.new_zeros(1, 1)))
    count = form.block.shape[1]
    writer.gather(writer.join([made, zero]), torch.where(form.columns, form.columns.cumsum(0) - 1, count), y)


@product_of.register
def _(form: Quantized, writer: Writer, x: str, y: str) -> None:
    codes, scales = form.codes, form.scales
    whole = writer.integers and writer.dtype == np.float32
    if whole and isinstance(codes, Dense) and form.numbers >= INTEGER:
        writer.integer_product(x, "weight", codes.weight, scales["weight"], form.bits, y)
    elif whole and isinstance(codes, LowRank) and form.numbers >= INTEGER_FACTORS:
        # the first product has both scales of a component but for one number: another for every layer, because the runtime
        # lets equal constants be shared, and merges a shared one into no product
        rest = torch.tensor(1 + writer.layer.index / 1024)
        joined = scales["left"].float() * scales["right"].float() / rest
        hidden = writer.integer_product(x, "left", codes.left, joined, form.bits)
        writer.integer_product(hidden, "right", codes.right, rest, form.bits, y)
    else:
        writer.quantized = form
        product_of(codes, writer, x, y)


def _merged(form: SparseLowRank, writer: Writer, x: str, y: str) -> None:
    """Two products (one, where that is less work) of matrices that the runtime puts together when it loads the file.

    The blocks are stored as they are; padded with zeros, side by side, and brought into the neurons' order, they are
    the factors of one product. Zeros are multiplied, but that takes less time than more nodes on a small layer, or
    than gathering (docs/quantisation.md).
    """
    orders = [levels.long().argsort(descending=True, stable=True) for levels in (form.row_levels, form.column_levels)]
    ordered = form.permuted(*orders)
    sides = []
    for axis, (name, blocks) in enumerate((("left", ordered.left), ("right", ordered.right))):
        parts = []
        for level, block in enumerate(blocks):
            part = writer.raised(writer.number(f"{name}_{level}", block))
            missing = form.shape[axis] - block.shape[axis]
            pads = np.array([0, 0, *((missing, 0) if axis == 0 else (0, missing))])
            parts.append(writer.add("Pad", [part, writer.tensor("pads", pads)]) if missing else part)
        whole = parts[0] if len(parts) == 1 else writer.add("Concat", parts, axis=1 - axis)
        back = orders[axis].argsort()
        if not bool((back.diff() == 1).all()):
            whole = writer.add("Gather", [whole, writer.places(back)], axis=axis)
        sides.append(writer.settled(whole))
    if form.spread_numbers > form.shape[0] * form.shape[1]:
        writer.product(x, writer.product(*sides), y)
    else:
        writer.product(writer.product(x, sides[0]), sides[1], y)


def _blocks(form: SparseLowRank, writer: Writer, x: str, y: str) -> None:
    """One product per row set, one per segment of columns."""
    hidden = []
    for level, left in enumerate(form.left):
        index = members(form.row_levels, level)
        hidden.append(writer.product(writer.some(x, index, form.shape[0]), writer.number(f"left_{level}", left)))
    segments, order = form.segments()
    parts = []
    only = len(segments) == 1 and order is None
    for segment in segments:
        if segment.level:
            names = tuple(f"right_{level}" for level in range(segment.level))
            source, right = writer.join(hidden[: segment.level]), writer.number("right", segment.right, names)
        else:
            source = writer.slice(hidden[0], slice(0, 1))
            right = writer.tensor("right", form.left[0].new_zeros(1, len(segment.columns)))
        parts.append(writer.product(source, right, y if only else None))
    if not only:
        joined = writer.join(parts, y if order is None else None)
        if order is not None:
            writer.gather(joined, order, y)


def _dense(form: Dense, writer: Writer, bias: Tensor | None) -> None:
    """The same node with another weight, and another bias where its own is replaced."""
    node = NodeProto()
    node.CopyFrom(writer.node)
    weight = form.weight.T if writer.layer.trans_b else form.weight
    node.input[1] = writer.tensor("weight", weight.contiguous())
    if writer.layer.alpha != 1:
        next(item for item in node.attribute if item.name == "alpha").f = 1.0
    if bias is not None and writer.node.op_type == "Gemm":
        _gemm_bias(writer, node, bias)
    elif bias is not None and writer.layer.bias is None:
        node.output[0] = writer.fresh("product")
        writer.nodes.append(node)
        writer.add("Add", [node.output[0], writer.tensor("bias", bias)], writer.node.output[0])
        return
    writer.nodes.append(node)


def _gemm_bias(writer: Writer, node: NodeProto, bias: Tensor) -> None:
    """Put a bias into a Gemm."""
    inputs = [*node.input[:2], writer.tensor("bias", bias)]
    del node.input[:]
    node.input.extend(inputs)
    for item in node.attribute:
        if item.name == "beta":
            item.f = 1.0


def _factored(form: Factors, writer: Writer, bias: Tensor | None) -> None:
    """Smaller products in the place of the node; a Gemm's bias becomes an Add."""
    out, layer = writer.node.output[0], writer.layer
    x = writer.add("Transpose", [layer.x], perm=[1, 0]) if layer.trans_a else layer.x
    has_adder = layer.adder is not None and layer.adder != layer.index
    added = "" if has_adder or (bias is None and layer.bias is None) else writer.bias_tensor(form, bias)
    y = writer.fresh("product") if added else out
    product_of(form, writer, x, y)
    if added:
        writer.add(writer.adds, [y, added], out)


def _forget_sizes(graph: GraphProto, layers: Graph, forms: Mapping[str, Factors]) -> None:
    """Drop what the file says about the shapes of tensors behind layers that lose outputs."""
    smaller = [layers.layers[name] for name, form in forms.items() if form.shape[1] != layers.layers[name].shape[1]]
    starts = {layers.nodes[layer.index].output[0] for layer in smaller}
    changed = starts | {name for index in layers.after(starts) for name in layers.nodes[index].output}
    kept = [value for value in graph.value_info if value.name not in changed]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def rewritten(
    file: OnnxFile, layers: Graph, forms: Mapping[str, Factors], biases: Mapping[str, Tensor], integers: bool = False
) -> OnnxFile:
    """The model with the layers' factors in the place of their weights; the rest stays as it is.

    Args:
        biases: for layers whose bias is another one, or in another order, that bias (n,).
        integers: let the runtime multiply whole numbers in large layers of few bits.

    Raises:
        SlrpropError: ``integers``, and the file's operator set has no whole numbers of 4 bits.
    """
    if integers and file.opset < INTEGER_OPSET:
        raise SlrpropError(
            f"integer products need an ONNX file of opset {INTEGER_OPSET} or later, and '{file.path}' has {file.opset}; convert it, or leave them out"
        )

    def edit(graph: GraphProto) -> dict[str, np.ndarray]:
        taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
        taken |= {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        new: dict[str, np.ndarray] = {}
        nodes: dict[int, list[NodeProto]] = {}
        for name, form in forms.items():
            writer, bias = Writer(layers, name, file.opset, taken, new, integers), biases.get(name)
            if isinstance(form, Dense):
                _dense(form, writer, bias)
            else:
                _factored(form, writer, bias)
            nodes[writer.layer.index] = writer.nodes
            adder = writer.layer.adder
            if adder is not None and adder != writer.layer.index and (bias is not None or writer.adds != "Add"):
                added, count = NodeProto(), len(writer.nodes)
                added.CopyFrom(writer.graph.nodes[adder])
                added.op_type = writer.adds
                if bias is not None:
                    place = list(added.input).index(writer.layer.bias or "")
                    added.input[place] = writer.bias_tensor(form, bias)
                nodes[adder] = [*writer.nodes[count:], added]
                del writer.nodes[count:]
        _forget_sizes(graph, layers, forms)
        result = [new_node for i, node in enumerate(graph.node) for new_node in nodes.get(i, [node])]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in result]
        del graph.node[:]
        graph.node.extend(copies)
        return new

    return file.edited(edit)
