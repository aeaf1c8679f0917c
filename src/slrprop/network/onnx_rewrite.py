"""ONNX models whose chosen layers compute with factors, as plain standard nodes."""

import math
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
from slrprop.network.onnx_writer import FOUR_BITS, Additions, Writer

OWN = "slrprop"
MERGED = 40_000  # zeros that may be multiplied to save nodes: python -m benchmarks.quantisation
GATHERED = 50  # zeros more for every number that blocks would gather
SPREAD = 380  # bytes of the nodes that put zeros between numbers
INTEGER = (
    100_000  # numbers from which the runtime's integer products are the faster ones: python -m benchmarks.wide_layers
)
INTEGER_FACTORS = 1_000_000  # the same of low-rank layers


@singledispatch
def product_of(form: Factors, writer: Writer, x: str, y: str) -> None:
    """Write the nodes that make ``y`` of ``x`` by a form, the last one making ``y``. A new form registers its own."""
    raise SlrpropError(f"no ONNX nodes compute with {type(form).__name__} factors")


@product_of.register
def _(form: Dense, writer: Writer, x: str, y: str) -> None:
    writer.product(x, writer.number(form.weight, "weight"), y)


@product_of.register
def _(form: LowRank, writer: Writer, x: str, y: str) -> None:
    writer.product(writer.product(x, writer.number(form.left, "left")), writer.number(form.right, "right"), y)


@product_of.register
def _(form: SparseLowRank, writer: Writer, x: str, y: str) -> None:
    few, ranks = form.merged_zeros <= MERGED + GATHERED * form.gathered, sum(left.shape[1] for left in form.left)
    if few and ranks <= form.numbers and len(form.left) < 16 and writer.opset >= 11:
        _merged(form, writer, x, y)
    else:
        _blocks(form, writer, x, y)


@product_of.register
def _(form: Narrowed, writer: Writer, x: str, y: str) -> None:
    seen = writer.some(x, form.rows.nonzero()[:, 0], form.shape[0])
    if form.columns.all():
        writer.product(seen, writer.number(form.block, "block"), y)
        return
    made = writer.product(seen, writer.number(form.block, "block"))
    zero = writer.product(writer.slice(made, slice(0, 1)), writer.tensor(torch.zeros(1, 1)))
    count = form.block.shape[1]
    writer.gather(writer.join([made, zero]), torch.where(form.columns, form.columns.cumsum(0) - 1, count), y)


@product_of.register
def _(form: Quantized, writer: Writer, x: str, y: str) -> None:
    codes, scales = form.codes, form.scales
    whole = writer.integers and writer.dtype == np.float32
    if whole and isinstance(codes, Dense) and form.numbers >= INTEGER:
        writer.integer_product(x, codes.weight, scales["weight"], form.bits, y)
    elif whole and isinstance(codes, LowRank) and form.numbers >= INTEGER_FACTORS:
        # the first product has both scales of a component but for one number: another for every layer, because the runtime
        # lets equal constants be shared, and merges a shared one into no product
        rest = torch.tensor(1 + writer.layer.index / 1024)
        joined = scales["left"].float() * scales["right"].float() / rest
        hidden = writer.integer_product(x, codes.left, joined, form.bits)
        writer.integer_product(hidden, codes.right, rest, form.bits, y)
    else:
        axes = codes.scale_axes()
        writer.bits, writer.scales = form.bits, {name: s[:, None] if axes[name] else s for name, s in scales.items()}
        for right in [name for name in scales if name.startswith("right") and writer.dtype != np.float16]:
            left = right.replace("right", "left")  # both scales of a component at once; float16 does not reach so far
            writer.scales[left] = scales[left].float() * writer.scales.pop(right).flatten().float()
        product_of(codes, writer, x, y)


def _merged(form: SparseLowRank, writer: Writer, x: str, y: str) -> None:
    """Two products (one, where that is less work) of matrices that the runtime puts together when it loads the file.

    These are the factors with zeros where a neuron takes no part in a block. Zeros are multiplied, but that takes less time than
    more nodes on a small layer, or than gathering (docs/quantisation.md); a few are stored, where nodes would take more bytes.
    """
    (m, n), add = form.shape, writer.add
    left, right = form.padded()
    names = [[f"{side}_{level}" for level in range(len(form.left))] for side in ("left", "right")]
    if writer.bits < 32 and (form.spread_numbers - form.numbers) * writer.bits <= 8 * SPREAD + (m + n):
        sides = [writer.number(left, *names[0]), writer.number(right, *names[1])]
    else:  # both, one below the other (m + n, k): a row begins with as many numbers as its neuron's level says
        width, widths = _widths(form, writer)
        rows, component = torch.cat([left, right.T]), torch.arange(left.shape[1])
        packed = rows.flip(0)[(component < widths[:, None]).flip(0).to(rows.device)]  # as places count from the end
        numbers = writer.raised(writer.tensor(packed)) if writer.bits == 32 else writer.whole(packed, writer.bits)
        column = writer.places(component, np.int32)
        place = add("Sub", [column, add("CumSum", [width, writer.tensor(np.array(0, np.int32))])])
        mask = writer.cast(add("Less", [column, width]), writer.unpacks)
        both = writer.split(add("Mul", [add("Gather", [numbers, place], axis=0), mask]), [m, n])
        both[1] = add("Transpose", [both[1]], perm=[1, 0])
        scaled = [writer.times(side, writer.scale(*parts)) for side, parts in zip(both, names, strict=True)]
        sides = list(map(writer.settled, scaled))
    if form.spread_numbers > m * n:
        writer.product(x, writer.product(*sides), y)
    else:
        writer.product(writer.product(x, sides[0]), sides[1], y)


def _widths(form: SparseLowRank, writer: Writer) -> tuple[str, Tensor]:
    """How many numbers each row of both factors begins with: nodes (m + n, 1) and the numbers (m + n,).

    A whole number of 4 bits says that of one to four neighbours, through a table.
    """
    sums = torch.tensor([0, *(block.shape[1] for block in form.left)]).cumsum(0)
    kinds, levels = torch.cat([form.row_levels, form.column_levels]).cpu().long().unique(return_inverse=True)
    base = max(2, len(kinds))
    powers = base ** torch.arange(int(math.log(16, base)))
    filled = torch.cat([levels, levels.new_zeros(-len(levels) % len(powers))])
    codes = (filled.reshape(-1, len(powers)) * powers).sum(1) - 8
    table = sums[kinds][(torch.arange(16)[:, None] // powers % base).clamp(max=len(kinds) - 1)].roll(8, 0)
    few = 4 if writer.opset >= FOUR_BITS or writer.bits == 4 else 8
    width = writer.add("Gather", [writer.places(table, np.int32), writer.whole(codes, few, np.dtype(np.int32))], axis=0)
    width = writer.add("Reshape", [width, writer.tensor(np.array([-1, 1]))])
    return writer.some(width, torch.arange(len(levels)), len(filled), 0), sums[kinds][levels]


def _blocks(form: SparseLowRank, writer: Writer, x: str, y: str) -> None:
    """One product per row set, one per segment of columns."""
    hidden = []
    for level, left in enumerate(form.left):
        index = members(form.row_levels, level)
        hidden.append(writer.product(writer.some(x, index, form.shape[0]), writer.number(left, f"left_{level}")))
    segments, order = form.segments()
    parts = []
    only = len(segments) == 1 and order is None
    for segment in segments:
        if segment.level:
            names = tuple(f"right_{level}" for level in range(segment.level))
            source, right = writer.join(hidden[: segment.level]), writer.number(segment.right, *names)
        else:
            source = writer.slice(hidden[0], slice(0, 1))
            right = writer.tensor(torch.zeros(1, len(segment.columns)))
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
    node.input[1] = writer.tensor(weight.contiguous())
    for item in node.attribute:
        if item.name == "alpha" or (item.name == "beta" and bias is not None):
            item.f = 1.0
    if bias is not None and writer.node.op_type == "Gemm":
        del node.input[2:]
        node.input.append(writer.tensor(bias))
    elif bias is not None and writer.layer.bias is None:
        node.output[0] = next(writer.additions.names)
        writer.nodes.append(node)
        writer.add("Add", [node.output[0], writer.tensor(bias)], writer.node.output[0])
        return
    writer.nodes.append(node)


def _factored(form: Factors, writer: Writer, bias: Tensor | None) -> None:
    """Smaller products in the place of the node; a Gemm's bias becomes an Add."""
    out, layer = writer.node.output[0], writer.layer
    x = writer.add("Transpose", [layer.x], perm=[1, 0]) if layer.trans_a else layer.x
    has_adder = layer.adder is not None and layer.adder != layer.index
    added = "" if has_adder or (bias is None and layer.bias is None) else writer.bias_tensor(form, bias)
    y = next(writer.additions.names) if added else out
    product_of(form, writer, x, y)
    last = writer.nodes[-1]
    last.name = writer.node.name
    if added and writer.rank == 2 and last.op_type == "MatMul" and writer.adds == "Add":
        last.op_type, last.output[0] = "Gemm", out  # which adds, too
        last.input.append(added)
    elif added:
        writer.add(writer.adds, [y, added], out)


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
    if integers and file.opset < FOUR_BITS:
        raise SlrpropError(
            f"integer products need an ONNX file of opset {FOUR_BITS} or later, and '{file.path}' has {file.opset}; convert it, or leave them out"
        )

    def edit(graph: GraphProto) -> dict[str, np.ndarray]:
        additions = Additions(graph, file.opset)
        nodes: dict[int, list[NodeProto]] = {}
        for name, form in forms.items():
            writer, bias = Writer(layers, name, additions, integers), biases.get(name)
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
        first = Writer(layers, next(iter(forms)), additions).unpacked() if forms else []
        unnamed = [node for written in nodes.values() for node in written if not node.name]
        if unnamed and not is_own(graph):
            unnamed[0].name = OWN  # so that the file is known again: in float a form looks like any two layers
        result = [new_node for i, node in enumerate(graph.node) for new_node in nodes.get(i, [node])]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in (*first, *result)]
        del graph.node[:]
        graph.node.extend(copies)
        return additions.tensors

    return file.edited(edit)


def is_own(graph: GraphProto) -> bool:
    """Whether slrprop wrote layers of a graph."""
    return any(node.name == OWN for node in graph.node)
