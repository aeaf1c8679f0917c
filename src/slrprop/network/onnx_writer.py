"""Nodes and initializers of an ONNX model that take the place of layers."""

import itertools
import string
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx import GraphProto, NodeProto, helper
from torch import Tensor

from slrprop.factors import Factors, Quantized, span
from slrprop.network.onnx_graph import Graph
from slrprop.network.onnx_tensors import graphs_of

SHARED = 16  # numbers at most of a constant that is stored once
FEW = 24  # numbers up to which the nodes that unpack them would take more bytes than few bits save
FOUR_BITS = 21  # the first operator set with whole numbers of 4 bits


def _names(graph: GraphProto) -> set[str]:
    """All names of tensors, those inside bodies of nodes included."""
    sparse = (tensor.values for tensor in graph.sparse_initializer)
    found = {tensor.name for tensor in (*graph.initializer, *sparse, *graph.input, *graph.output)}
    return found.union(*({*node.input, *node.output}.union(*map(_names, graphs_of(node))) for node in graph.node))


class Additions:
    """What a file gets for all of its new layers together: short names, initializers, and what unpacking needs once."""

    def __init__(self, graph: GraphProto, opset: int) -> None:
        self.opset = opset
        self.tensors: dict[str, np.ndarray] = {}
        taken, letters = _names(graph), string.ascii_lowercase
        words = (word for size in itertools.count(1) for word in itertools.product(letters, repeat=size))
        self.names = (name for name in map("".join, words) if name not in taken)  # short: in a small file names weigh
        self.halves: dict[np.dtype[Any], list[tuple[str, np.ndarray]]] = {}  # to be unpacked, by what they become

    def tensor(self, array: np.ndarray) -> str:
        """A new initializer; a bound, a shape or an axis is stored once for all layers."""
        for name, other in self.tensors.items() if array.size <= SHARED else ():
            if other.dtype == array.dtype and other.shape == array.shape and np.array_equal(other, array):
                return name
        name = next(self.names)
        self.tensors[name] = array
        return name


class Writer:
    """Nodes and initializers that take the place of one layer.

    Args:
        integers: let the runtime multiply whole numbers where that is the faster way.
    """

    def __init__(self, graph: Graph, name: str, additions: Additions, integers: bool = False) -> None:
        self.graph, self.name, self.layer = graph, name, graph.layers[name]
        self.node = self.graph.nodes[self.layer.index]
        self.dtype = self.graph.constants[self.layer.weight].dtype
        # the runtime computes nothing of float16 before it runs a file, it would unpack the weight at every run
        self.unpacks = np.dtype(np.float32) if self.dtype == np.float16 else self.dtype
        self.additions, self.opset, self.integers = additions, additions.opset, integers
        self.nodes: list[NodeProto] = []
        self.adds = "Add"  # what adds the bias
        self.bits = 32  # of the form being written
        self.scales: dict[str, Tensor] = {}  # of its matrices by name, spread over them; none where all are one
        self._turned: dict[str, str] = {}  # tensors whose transpose is there already
        self.rank = 2 if self.node.op_type == "Gemm" else self.graph.rank(self.layer.x)
        self.last_axis = -1 if self.opset >= 11 or self.rank is None else self.rank - 1

    def tensor(self, value: Tensor | np.ndarray, exact: bool = False) -> str:
        """A new initializer; real numbers take the layer's type unless they must stay ``exact``."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        array = array.astype(self.dtype, copy=False) if array.dtype.kind == "f" and not exact else array
        return self.additions.tensor(array)

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """A new node; the name of its output."""
        output = output or next(self.additions.names)
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def slice(self, x: str, part: slice, axis: int | None = None) -> str:
        """``x[..., part]``, or a part along another axis."""
        axis = self.last_axis if axis is None else axis
        if self.opset < 10:
            return self.add("Slice", [x], axes=[axis], starts=[part.start], ends=[part.stop])
        return self.add("Slice", [x, *(self.tensor(np.array([number])) for number in (part.start, part.stop, axis))])

    def split(self, x: str, sizes: list[int], names: list[str] | None = None) -> list[str]:
        """Parts of a tensor along its first axis."""
        names = names or [next(self.additions.names) for _ in sizes]
        old: dict[str, Any] = {"split": sizes} if self.opset < 13 else {}
        inputs = [x] if old else [x, self.tensor(np.array(sizes))]
        self.nodes.append(helper.make_node("Split", inputs, names, **old))
        return names

    def gather(self, x: str, index: Tensor, output: str | None = None) -> str:
        """``x[..., index]``; by whole rows of the transpose where the axes are known: the runtime copies those far faster."""
        places = self.places(index)
        if self.rank is None:
            return self.add("Gather", [x, places], output, axis=self.last_axis)
        axes = range(self.rank)
        if x not in self._turned:
            self._turned[x] = self.add("Transpose", [x], perm=[axes[-1], *axes[:-1]])
        picked = self.add("Gather", [self._turned[x], places], axis=0)
        return self.add("Transpose", [picked], output, perm=[*axes[1:], 0])

    def some(self, x: str, index: Tensor, count: int, axis: int | None = None) -> str:
        """Some of ``count`` features, ascending: all, a slice, or gathered."""
        piece = span(index)
        if len(index) == count:
            return x
        return self.gather(x, index) if piece is None else self.slice(x, piece, axis)

    def join(self, parts: list[str], output: str | None = None) -> str:
        return (
            parts[0] if len(parts) == 1 and output is None else self.add("Concat", parts, output, axis=self.last_axis)
        )

    def product(self, x: str, weight: str, output: str | None = None) -> str:
        return self.add("MatMul", [x, weight], output)

    def bias_tensor(self, form: Factors, bias: Tensor | None) -> str:
        """The name of the layer's bias: a new one where given (the form's own, if it carries that), else the old one."""
        if isinstance(form, Quantized) and form.bias_codes is not None and form.bias_scale is not None:
            return self.settled(self.scaled(form.bias_codes, form.bias_scale, 8))
        if bias is not None:
            return self.tensor(bias)
        name = self.layer.bias
        assert name is not None
        if self.layer.beta == 1:
            return name
        value = self.graph.constants[name].load()
        return self.tensor(value * np.asarray(self.layer.beta, value.dtype))

    def number(self, value: Tensor, *names: str) -> str:
        """A matrix of the form being written, by its name, or several stacked; where that is quantised, through their scales."""
        return (
            self.tensor(value) if self.bits == 32 else self.settled(self.scaled(value, self.scale(*names), self.bits))
        )

    def scale(self, *names: str) -> Tensor | None:
        """The scales of matrices, one after the other; None where all are one."""
        return torch.cat([self.scales[name] for name in names]) if names[0] in self.scales else None

    def scaled(self, codes: Tensor, scale: Tensor | None, bits: int) -> str:
        """Whole numbers times scales that spread over them, in the type that unpacking computes in.

        The nodes have constant inputs only, so the runtime runs them once, when it loads the file. DequantizeLinear would be
        merged into its product instead, which rounds the inputs to 8 bits too: see :meth:`integer_product`.
        """
        if codes.numel() <= FEW:
            real = codes if scale is None else codes.float() * scale.float()
            return self.tensor(real.cpu().numpy().astype(self.unpacks), exact=True)
        return self.times(self.whole(codes, bits), scale)

    def whole(self, codes: Tensor, bits: int, dtype: np.dtype[Any] | None = None) -> str:
        """Whole numbers out of a constant of 8 or 4 ``bits``, as numbers of a type (the one that unpacking computes in)."""
        array, dtype = codes.cpu().numpy().astype(np.int8), dtype or self.unpacks
        if bits == 8 or self.opset >= FOUR_BITS:
            return self.cast(self.tensor(array.astype(ml_dtypes.int4) if bits == 4 else array), dtype)
        name = next(self.additions.names)
        self.additions.halves.setdefault(self.unpacks, []).append((name, array.reshape(-1)))
        name = name if codes.ndim == 1 else self.add("Reshape", [name, self.tensor(np.array(array.shape))])
        return name if dtype == self.unpacks else self.cast(name, dtype)

    def unpacked(self) -> list[NodeProto]:
        """Nodes that go before all others: two numbers of 4 bits in one byte, taken apart by arithmetic, once for a file."""
        for dtype, parts in self.additions.halves.items():
            parts += [(next(self.additions.names), np.zeros(1, np.int8))] * (sum(len(codes) for _, codes in parts) % 2)
            low, high = np.split((np.concatenate([codes for _, codes in parts]) + 8).view(np.uint8), 2)
            both = self.cast(self.tensor(low | high << 4), dtype)
            sixteen, eight = (self.tensor(np.array(value, dtype), exact=True) for value in (16, 8))
            above = self.add("Floor", [self.add("Div", [both, sixteen])])
            below = self.add("Sub", [both, self.add("Mul", [above, sixteen])])
            joined = self.add("Sub", [self.add("Concat", [below, above], axis=0), eight])
            self.split(joined, [len(codes) for _, codes in parts], [name for name, _ in parts])
        return self.nodes

    def times(self, whole: str, scale: Tensor | None) -> str:
        """Whole numbers times their scales: divided by the inverse ones, which every runtime computes once.

        OpenVINO takes a Mul for weights that are to stay whole numbers: it rounds the inputs too, and crashes in 4 bits where a
        scale goes with an input (docs/quantisation.md).
        """
        if scale is None:
            return whole
        half = scale.half()
        if scale.numel() > FEW and bool((half == scale).all()):  # float16 takes fewer bytes, two more nodes included
            inverse = self.add("Reciprocal", [self.cast(self.tensor(half, exact=True), self.unpacks)])
        else:
            inverse = self.tensor((1 / scale.double()).cpu().numpy().astype(self.unpacks), exact=True)
        return self.add("Div", [whole, inverse])

    def raised(self, numbers: str) -> str:
        """Constants of the layer's type in the type that unpacking computes in."""
        return numbers if self.unpacks == self.dtype else self.cast(numbers, self.unpacks)

    def settled(self, unpacked: str) -> str:
        """Unpacked numbers in the layer's type."""
        return unpacked if self.unpacks == self.dtype else self.cast(unpacked, self.dtype)

    def cast(self, x: str, dtype: np.dtype[Any]) -> str:
        return self.add("Cast", [x], to=helper.np_dtype_to_tensor_dtype(dtype))

    def integer_product(self, x: str, codes: Tensor, scale: Tensor, bits: int, y: str | None = None) -> str:
        """``x`` times whole numbers (r x c), the runtime's own: it rounds ``x`` to 8 bits, row by row.

        A bias is added by Sum then: with Add the runtime would make a Gemm of both, and real numbers at every run.

        Args:
            scale: one for all (), or one for each column (c,).
        """
        whole = self.tensor(codes.cpu().numpy().astype(ml_dtypes.int4 if bits == 4 else np.int8))
        axis: dict[str, Any] = {"axis": 1} if scale.ndim else {}
        self.adds = "Sum"
        real = self.add("DequantizeLinear", [whole, self.tensor(scale.float())], **axis)
        return self.product(x, real, y)

    def places(self, index: Tensor, dtype: type = np.int64) -> str:
        """Whole numbers from 0 as a constant of few bytes, cast when the runtime loads the file."""
        kinds = (np.uint8, np.uint16, dtype)
        small = next(kind for kind in kinds if len(index) == 0 or int(index.max()) <= np.iinfo(kind).max)
        name = self.tensor(index.cpu().numpy().astype(small))
        return name if small == dtype else self.cast(name, np.dtype(dtype))
