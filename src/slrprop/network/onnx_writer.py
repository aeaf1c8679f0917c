"""Nodes and initializers of an ONNX model that take the place of one layer."""

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from slrprop.factors import Factors, Quantized, span
from slrprop.network.onnx_graph import Graph

SHARED = 4  # numbers at most of a constant that is stored once
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
        # the runtime computes nothing of float16 before it runs a file, it would unpack the weight at every run
        self.unpacks = np.dtype(np.float32) if self.dtype == np.float16 else self.dtype
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
        to = helper.np_dtype_to_tensor_dtype(self.unpacks)
        if bits == 4 and self.opset < 21:
            number = self._halves(what, whole)
        else:
            number = self.add(
                "Cast", [self.tensor(what, whole.astype(ml_dtypes.int4 if bits == 4 else np.int8))], to=to
            )
        wide = scale if axis is None or axis == codes.ndim - 1 else scale[:, None]
        short = wide.numel() > CAST  # fewer scales take less than the node that casts them
        factor = self.tensor(
            f"{what}_scale", wide.cpu().numpy().astype(np.float16 if short else self.unpacks), exact=True
        )
        if short:
            factor = self.add("Cast", [factor], to=to)
        return self.settled(self.add("Mul", [number, factor]))

    def raised(self, numbers: str) -> str:
        """Constants of the layer's type in the type that unpacking computes in."""
        return numbers if self.unpacks == self.dtype else self._cast(numbers, self.unpacks)

    def settled(self, unpacked: str) -> str:
        """Unpacked numbers in the layer's type."""
        return unpacked if self.unpacks == self.dtype else self._cast(unpacked, self.dtype)

    def _cast(self, x: str, dtype: np.dtype[Any]) -> str:
        return self.add("Cast", [x], to=helper.np_dtype_to_tensor_dtype(dtype))

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
        both = self.add("Cast", [stored], to=helper.np_dtype_to_tensor_dtype(self.unpacks))
        sixteen, eight = (self.tensor(str(value), np.array(value, self.unpacks), exact=True) for value in (16, 8))
        high = self.add("Floor", [self.add("Div", [both, sixteen])])
        low = self.add("Sub", [both, self.add("Mul", [high, sixteen])])
        if len(later) > len(flat) - count:
            high = self.slice(high, slice(0, len(flat) - count), axis=0)
        joined = self.add("Concat", [low, high], axis=0)
        shaped = self.add("Reshape", [joined, self.tensor("shape", np.array(whole.shape, np.int64))])
        return self.add("Sub", [shaped, eight])

    def places(self, index: Tensor) -> str:
        """Whole numbers from 0 as a constant of few bytes, cast when the runtime loads the file."""
        kinds = (np.uint8, np.uint16, np.int32, np.int64)
        small = next(kind for kind in kinds if len(index) == 0 or int(index.max()) <= np.iinfo(kind).max)
        name = self.tensor("order", index.cpu().numpy().astype(small))
        return self.add("Cast", [name], to=TensorProto.INT64) if small in (np.uint8, np.uint16) else name
