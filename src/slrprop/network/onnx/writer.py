"""Nodes and initializers of an ONNX model that take the place of layers."""

import copy
import itertools
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from onnx import GraphProto, NodeProto, helper
from torch import Tensor

from slrprop.forms import Bias, Form, Index, Quantized
from slrprop.network.onnx.graph import Graph
from slrprop.network.onnx.places import Place
from slrprop.network.onnx.tensors import graphs_of
from slrprop.operators import Convolution, Lookup

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


class Number(NamedTuple):
    """A matrix of the form being written, by its name, or parts of several below each other; what multiplies it lays it out."""

    value: Tensor
    names: tuple[str, ...]


class Writer:
    """Nodes and initializers that take the place of one layer: see :class:`slrprop.network.onnx.rewrite.LayerWriter`.

    Args:
        dtype: of the layer's numbers.
        integers: let the runtime multiply whole numbers where that is the faster way.
    """

    def __init__(
        self, graph: Graph, name: str, place: Place, dtype: np.dtype[Any], additions: Additions, integers: bool = False
    ) -> None:
        self.graph, self.name, self.place, self.operator, self.dtype = graph, name, place, place.operator, dtype
        self.node = graph.nodes[place.index]
        # the runtime computes nothing of float16 before it runs a file, it would unpack the weight at every run
        self.unpacks = np.dtype(np.float32) if self.dtype == np.float16 else self.dtype
        self.additions, self.opset, self.integers = additions, additions.opset, integers
        self.nodes: list[NodeProto] = []
        self.adds = "Add"  # what adds the bias
        self.bits = 32  # of the form being written
        self.scales: dict[str, Tensor] = {}  # of its matrices by name, spread over them; none where all are one
        self._turned: dict[str, str] = {}  # tensors whose transpose is there already
        self.flat = self.operator.axis == -1  # channels on the last axis
        self.rank = (2 if self.node.op_type == "Gemm" else graph.rank(place.x)) if self.flat else 1 - self.operator.axis
        self.axis = 1 if not self.flat else -1 if self.opset >= 11 or self.rank is None else self.rank - 1

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
        axis = self.axis if axis is None else axis
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

    def pick(self, x: str, index: Tensor) -> str:
        """Features by their places; by whole rows of the transpose where the axes are known: the runtime copies those far faster."""
        places = self.places(index)
        if self.rank is None or not self.flat:
            return self.add("Gather", [x, places], axis=self.axis)
        axes = range(self.rank)
        if x not in self._turned:
            self._turned[x] = self.add("Transpose", [x], perm=[axes[-1], *axes[:-1]])
        picked = self.add("Gather", [self._turned[x], places], axis=0)
        return self.add("Transpose", [picked], perm=[*axes[1:], 0])

    def some(self, x: str, rows: Index) -> str:
        channels = rows.every(self.operator.unit)
        if len(rows.places) == self.place.shape[0]:
            return x
        return self.pick(x, channels.places) if channels.part is None else self.slice(x, channels.part)

    def join(self, parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else self.add("Concat", parts, axis=self.axis)

    def nothing(self, h: str, count: int) -> str:
        return self.product(self.slice(h, slice(0, 1)), Number(torch.zeros(1, count), ()))

    def along(self, axis: int) -> "Writer":
        """The same for the part of a convolution along one axis."""
        assert isinstance(self.operator, Convolution)
        part = copy.copy(self)
        part.operator = self.operator.along(axis)
        return part

    def opened(self, form: Quantized) -> "tuple[Writer, Form]":
        self.bits, self.scales = form.bits, form.wide_scales()
        for right in [name for name in self.scales if name.startswith("right") and self.dtype != np.float16]:
            left = right.replace("right", "left")  # both scales of a component at once; float16 does not reach so far
            self.scales[left] = self.scales[left].float() * self.scales.pop(right).flatten().float()
        return self, form.codes

    def add_up(self, one: str, other: str) -> str:
        return self.add("Add", [one, other])

    def number(self, value: Tensor, *names: str) -> Number:
        return Number(value, names)

    def enter(self, x: str, weight: Number | str) -> str:
        operator = self.operator
        if isinstance(operator, Lookup):
            return self.add("Gather", [self.laid(weight) if isinstance(weight, Number) else weight, x], axis=0)
        if not isinstance(operator, Convolution):
            return self.product(x, weight)
        if isinstance(weight, Number):
            kernel = self.laid(weight, operator.stored)
        else:  # put together by nodes, m x n
            sides = [self.place.shape[1], self.place.shape[0] // operator.unit, *operator.kernel]
            kernel = self.add("Reshape", [self.add("Transpose", [weight], perm=[1, 0]), self.tensor(np.array(sides))])
        before, behind = zip(*operator.padding, strict=True)
        wider: dict[str, Any] = {"output_padding": operator.wider} if operator.transposed else {}
        return self.add(
            "ConvTranspose" if operator.transposed else "Conv", [x, kernel], kernel_shape=operator.kernel, strides=operator.stride,
            pads=[*before, *behind], dilations=operator.dilation, group=operator.groups, **wider,
        )  # fmt: skip

    def product(self, h: str, weight: Number | str) -> str:
        if self.flat:
            return self.add("MatMul", [h, self.laid(weight) if isinstance(weight, Number) else weight])
        assert isinstance(weight, Number)
        ones = [1] * (-1 - self.operator.axis)
        return self.add("Conv", [h, self.laid(weight, lambda matrix: matrix.T.reshape(*matrix.T.shape, *ones))])

    def laid(self, number: Number, layout: Callable[[Tensor], Tensor] = lambda matrix: matrix) -> str:
        """A matrix as a tensor of the file; where it is quantised, through its scales."""
        value, names = number
        if self.bits == 32 or not names:
            return self.tensor(layout(value).contiguous())
        scale = self.scale(*names)
        if scale is not None and value.ndim == 2:
            scale = layout(scale.expand_as(value))
            for axis in range(scale.ndim):
                first = scale.narrow(axis, 0, 1)
                scale = first if bool((scale == first).all()) else scale
        return self.settled(self.scaled(layout(value), scale, self.bits))

    def bias_tensor(self, bias: Bias | None) -> str:
        """The name of the layer's bias: a new one where given, else the old one."""
        if bias is not None:
            few = bias.scale is not None
            return self.settled(self.scaled(bias.numbers, bias.scale, 8)) if few else self.tensor(bias.numbers)
        name, beta = self.place.bias, self.place.beta
        assert name is not None
        if beta == 1:
            return name
        value = self.graph.constants[name].load()
        return self.tensor(value * np.asarray(beta, value.dtype))

    def scale(self, *names: str) -> Tensor | None:
        """The scales of matrices beside or below each other; None where all are one."""
        found = [self.scales[name] for name in names if name in self.scales]
        if not found:
            return None
        return torch.cat(found, 0 if found[0].ndim == 1 or names[0].startswith("right") else 1)

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

    def first(self) -> list[NodeProto]:
        """Nodes that go before those of all layers: two numbers of 4 bits in one byte, taken apart by arithmetic, once for a file."""
        self.nodes = []
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

    def integer_product(self, x: str, codes: Tensor, scale: Tensor, bits: int) -> str:
        """``x`` times whole numbers (r x c), the runtime's own: it rounds ``x`` to 8 bits, row by row.

        A bias is added by Sum then: with Add the runtime would make a Gemm of both, and real numbers at every run.

        Args:
            scale: one for all (), or one for each column (c,).
        """
        whole = self.tensor(codes.cpu().numpy().astype(ml_dtypes.int4 if bits == 4 else np.int8))
        axis: dict[str, Any] = {"axis": 1} if scale.ndim else {}
        self.adds = "Sum"
        real = self.add("DequantizeLinear", [whole, self.tensor(scale.float())], **axis)
        return self.product(x, real)

    def places(self, index: Tensor, dtype: type = np.int64) -> str:
        """Whole numbers from 0 as a constant of few bytes, cast when the runtime loads the file."""
        kinds = (np.uint8, np.uint16, dtype)
        small = next(kind for kind in kinds if len(index) == 0 or int(index.max()) <= np.iinfo(kind).max)
        name = self.tensor(index.cpu().numpy().astype(small))
        return name if small == dtype else self.cast(name, np.dtype(dtype))
