"""ONNX models whose chosen layers compute with factors, as plain standard nodes."""

import itertools
from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto, helper
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors import Dense, Factors, LowRank, Narrowed, Quantized, SparseLowRank, members, span
from slrprop.network.onnx_file import OnnxFile
from slrprop.network.onnx_graph import Graph

MERGED = 40_000  # zeros that may be multiplied to save nodes: python -m benchmarks.quantisation
GATHERED = 50  # zeros more for every number that blocks would gather
SHARED = 4  # numbers at most of a constant that is stored once
INTEGER = (
    100_000  # numbers from which the runtime's integer products are the faster ones: python -m benchmarks.wide_layers
)
INTEGER_FACTORS = 1_000_000  # the same of low-rank layers
INTEGER_OPSET = 21  # the first with whole numbers of 4 bits
CAST = 24  # scales from which float16 and a node to cast them take fewer bytes than float32


class Writer:
    """Nodes and initializers that take the place of one layer.

    Args:
        integers: let the runtime multiply whole numbers where that is the faster way.
    """

    def __init__(
        self, graph: Graph, name: str, opset: int, taken: set[str], new: dict[str, np.ndarray], integers: bool = False
    ) -> None:
        self.graph, self.name, self.layer = graph, name, graph.layers[name]
        self.node = self.graph.nodes[self.layer.index]
        self.dtype = self.graph.constants[self.layer.weight].dtype
        self.opset, self.integers = opset, integers
        self.nodes: list[NodeProto] = []
        self.adds = "Add"  # what adds the bias
        self.quantized: Quantized | None = None  # the form being written, if its numbers are in few bits
        self._taken, self._new = taken, new
        self._turned: dict[str, str] = {}  # tensors whose transpose is there already
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

    def tensor(self, what: str, value: Tensor | np.ndarray, exact: bool = False) -> str:
        """A new initializer; real numbers take the layer's type unless they must stay ``exact``."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        array = array.astype(self.dtype, copy=False) if array.dtype.kind == "f" and not exact else array
        if array.size > SHARED:
            name = self.fresh(what)
            self._new[name] = array
            return name
        for name, other in self._new.items():  # a bound or an axis is stored once for all layers
            if other.dtype == array.dtype and other.shape == array.shape and np.array_equal(other, array):
                return name
        name = self.passing()
        self._new[name] = array
        return name

    def passing(self) -> str:
        """A short name that nothing has yet, for what is only passed on: in a small file names weigh."""
        name = next(name for number in itertools.count(len(self._taken)) if (name := f"_{number:x}") not in self._taken)
        self._taken.add(name)
        return name

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """A new node; the name of its output."""
        output = output or self.passing()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def slice(self, x: str, part: slice, axis: int | None = None) -> str:
        """``x[..., part]``, or a part along another axis."""
        axis = self.last_axis if axis is None else axis
        if self.opset < 10:
            return self.add("Slice", [x], axes=[axis], starts=[part.start], ends=[part.stop])
        numbers = (("start", part.start), ("stop", part.stop), ("axis", axis))
        return self.add("Slice", [x, *(self.tensor(what, np.array([number])) for what, number in numbers)])

    def gather(self, x: str, index: Tensor, output: str | None = None) -> str:
        """``x[..., index]``; by whole rows of the transpose where the axes are known: the runtime copies those far faster."""
        places = self.places(index)
        if self._rank is None:
            return self.add("Gather", [x, places], output, axis=self.last_axis)
        axes = range(self._rank)
        if x not in self._turned:
            self._turned[x] = self.add("Transpose", [x], perm=[axes[-1], *axes[:-1]])
        picked = self.add("Gather", [self._turned[x], places], axis=0)
        return self.add("Transpose", [picked], output, perm=[*axes[1:], 0])

    def some(self, x: str, index: Tensor, count: int) -> str:
        """Some of ``count`` features, ascending: all, a slice, or gathered."""
        piece = span(index)
        if len(index) == count:
            return x
        return self.gather(x, index) if piece is None else self.slice(x, piece)

    def join(self, parts: list[str], output: str | None = None) -> str:
        return (
            parts[0] if len(parts) == 1 and output is None else self.add("Concat", parts, output, axis=self.last_axis)
        )

    def product(self, x: str, weight: str, output: str | None = None) -> str:
        return self.add("MatMul", [x, weight], output)

    def dense(self, form: Dense, bias: Tensor | None) -> None:
        """The same node with another weight, and another bias where its own is replaced."""
        node = NodeProto()
        node.CopyFrom(self.node)
        weight = form.weight.T if self.layer.trans_b else form.weight
        node.input[1] = self.tensor("weight", weight.contiguous())
        if self.layer.alpha != 1:
            next(item for item in node.attribute if item.name == "alpha").f = 1.0
        if bias is not None and self.node.op_type == "Gemm":
            self._gemm_bias(node, bias)
        elif bias is not None and self.layer.bias is None:
            node.output[0] = self.fresh("product")
            self.nodes.append(node)
            self.add("Add", [node.output[0], self.tensor("bias", bias)], self.node.output[0])
            return
        self.nodes.append(node)

    def _gemm_bias(self, node: NodeProto, bias: Tensor) -> None:
        """Put a bias into a Gemm."""
        inputs = [*node.input[:2], self.tensor("bias", bias)]
        del node.input[:]
        node.input.extend(inputs)
        for item in node.attribute:
            if item.name == "beta":
                item.f = 1.0

    def factored(self, form: Factors, bias: Tensor | None) -> None:
        """Smaller products in the place of the node; a Gemm's bias becomes an Add."""
        out, layer = self.node.output[0], self.layer
        x = self.add("Transpose", [layer.x], perm=[1, 0]) if layer.trans_a else layer.x
        has_adder = layer.adder is not None and layer.adder != layer.index
        added = "" if has_adder or (bias is None and layer.bias is None) else self.bias_tensor(form, bias)
        y = self.fresh("product") if added else out
        product_of(form, self, x, y)
        if added:
            self.add(self.adds, [y, added], out)

    def bias_tensor(self, form: Factors, bias: Tensor | None) -> str:
        """The name of the layer's bias: a new one where given (the form's own, if it carries that), else the old one."""
        if isinstance(form, Quantized) and form.bias_codes is not None and form.bias_scale is not None:
            return self.scaled("bias", form.bias_codes, form.bias_scale, 8, None)
        if bias is not None:
            return self.tensor("bias", bias)
        name = self.layer.bias
        assert name is not None
        if self.layer.beta == 1:
            return name
        value = self.graph.constants[name].load()
        return self.tensor("bias", value * np.asarray(self.layer.beta, value.dtype))

    def number(self, what: str, value: Tensor, parts: tuple[str, ...] = ()) -> str:
        """A matrix of the form being written; where that is quantised, through its scales.

        Args:
            parts: names of the form's matrices that ``value`` stacks along its first axis; ``what`` itself by default.
        """
        if self.quantized is None:
            return self.tensor(what, value)
        names, axes = parts or (what,), self.quantized.codes.scale_axes()
        scale = torch.cat([self.quantized.scales[name] for name in names])
        axis = None if value.ndim == 1 else 1 - axes[names[0]]
        return self.scaled(what, value, scale, self.quantized.bits, axis)

    def scaled(self, what: str, codes: Tensor, scale: Tensor, bits: int, axis: int | None) -> str:
        """Whole numbers as an initializer of ``bits`` bits, and the nodes that make real numbers of them.

        The nodes have constant inputs only, so the runtime runs them once, when it loads the file. DequantizeLinear would be
        merged into its product instead, which rounds the inputs to 8 bits too: see :meth:`integer_product`.

        Args:
            scale: float16, one for all (axis None) or one for each entry along ``axis``.
        """
        whole = codes.cpu().numpy().astype(np.int8)
        to = helper.np_dtype_to_tensor_dtype(self.dtype)
        if bits == 4 and self.opset < 21:
            number = self._halves(what, whole)
        else:
            number = self.add(
                "Cast", [self.tensor(what, whole.astype(ml_dtypes.int4 if bits == 4 else np.int8))], to=to
            )
        wide = scale if axis is None or axis == codes.ndim - 1 else scale[:, None]
        short = wide.numel() > CAST  # fewer scales take less than the node that casts them
        factor = self.tensor(f"{what}_scale", wide.cpu().numpy(), exact=short)
        if short and self.dtype != np.float16:
            factor = self.add("Cast", [factor], to=to)
        return self.add("Mul", [number, factor])

    def integer_product(self, x: str, what: str, codes: Tensor, scale: Tensor, bits: int, y: str | None = None) -> str:
        """``x`` times whole numbers (r x c), the runtime's own: it rounds ``x`` to 8 bits, row by row.

        A bias is added by Sum then: with Add the runtime would make a Gemm of both, and real numbers at every run.

        Args:
            scale: one for all (), or one for each column (c,).
        """
        whole = self.tensor(what, codes.cpu().numpy().astype(ml_dtypes.int4 if bits == 4 else np.int8))
        axis: dict[str, Any] = {"axis": 1} if scale.ndim else {}
        self.adds = "Sum"
        real = self.add("DequantizeLinear", [whole, self.tensor(f"{what}_scale", scale.float())], **axis)
        return self.product(x, real, y)

    def _halves(self, what: str, whole: np.ndarray) -> str:
        """Whole numbers of 4 bits for operator sets that have none: two in one byte, taken apart by arithmetic."""
        flat = whole.reshape(-1) + 8
        count = -(-len(flat) // 2)
        later = np.concatenate([flat[count:], np.zeros(2 * count - len(flat), np.int8)])
        stored = self.tensor(what, (flat[:count] | later << 4).view(np.uint8))
        both = self.add("Cast", [stored], to=helper.np_dtype_to_tensor_dtype(self.dtype))
        sixteen, eight = (self.tensor(str(value), np.array(value, self.dtype)) for value in (16, 8))
        high = self.add("Floor", [self.add("Div", [both, sixteen])])
        low = self.add("Sub", [both, self.add("Mul", [high, sixteen])])
        if len(later) > len(flat) - count:
            high = self.slice(high, slice(0, len(flat) - count), axis=0)
        joined = self.add("Concat", [low, high], axis=0)
        shaped = self.add("Reshape", [joined, self.tensor("shape", np.array(whole.shape, np.int64))])
        return self.add("Sub", [shaped, eight])

    def merged(self, form: SparseLowRank, x: str, y: str) -> None:
        """Two products (one, where that is less work) of matrices that the runtime puts together when it loads the file.

        The blocks are stored as they are; padded with zeros, side by side, and brought into the neurons' order, they are
        the factors of one product. Zeros are multiplied, but that takes less time than more nodes on a small layer, or
        than gathering (docs/quantisation.md).
        """
        orders = [
            levels.long().argsort(descending=True, stable=True) for levels in (form.row_levels, form.column_levels)
        ]
        ordered = form.permuted(*orders)
        sides = []
        for axis, (name, blocks) in enumerate((("left", ordered.left), ("right", ordered.right))):
            parts = []
            for level, block in enumerate(blocks):
                part, missing = self.number(f"{name}_{level}", block), form.shape[axis] - block.shape[axis]
                pads = np.array([0, 0, *((missing, 0) if axis == 0 else (0, missing))])
                parts.append(self.add("Pad", [part, self.tensor("pads", pads)]) if missing else part)
            whole = parts[0] if len(parts) == 1 else self.add("Concat", parts, axis=1 - axis)
            back = orders[axis].argsort()
            if not bool((back.diff() == 1).all()):
                whole = self.add("Gather", [whole, self.places(back)], axis=axis)
            sides.append(whole)
        if form.spread_numbers > form.shape[0] * form.shape[1]:
            self.product(x, self.product(*sides), y)
        else:
            self.product(self.product(x, sides[0]), sides[1], y)

    def places(self, index: Tensor) -> str:
        """Whole numbers from 0 as a constant of few bytes, cast when the runtime loads the file."""
        kinds = (np.uint8, np.uint16, np.int32, np.int64)
        small = next(kind for kind in kinds if len(index) == 0 or int(index.max()) <= np.iinfo(kind).max)
        name = self.tensor("order", index.cpu().numpy().astype(small))
        return self.add("Cast", [name], to=TensorProto.INT64) if small in (np.uint8, np.uint16) else name

    def blocks(self, form: SparseLowRank, x: str, y: str) -> None:
        """One product per row set, one per segment of columns."""
        hidden = []
        for level, left in enumerate(form.left):
            index = members(form.row_levels, level)
            hidden.append(self.product(self.some(x, index, form.shape[0]), self.number(f"left_{level}", left)))
        segments, order = form.segments()
        parts = []
        only = len(segments) == 1 and order is None
        for segment in segments:
            if segment.level:
                names = tuple(f"right_{level}" for level in range(segment.level))
                source, right = self.join(hidden[: segment.level]), self.number("right", segment.right, names)
            else:
                source = self.slice(hidden[0], slice(0, 1))
                right = self.tensor("right", form.left[0].new_zeros(1, len(segment.columns)))
            parts.append(self.product(source, right, y if only else None))
        if not only:
            joined = self.join(parts, y if order is None else None)
            if order is not None:
                self.gather(joined, order, y)


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
        writer.merged(form, x, y)
    else:
        writer.blocks(form, x, y)


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
                writer.dense(form, bias)
            else:
                writer.factored(form, bias)
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
