"""Sparse weights in an ONNX file: packed places and values as initializers, decoded by standard nodes.

All inputs of these nodes are constants, so ONNX Runtime computes the weight once, when it loads the file. It does so for
operators whose output's shape it can tell beforehand only; that is why codes that mark nothing are not left out (NonZero, Compress)
but written to a place of their own, in front of the weight.
"""

import numpy as np
from onnx import TensorProto, helper

from slrprop.errors import SlrpropError
from slrprop.factors import LowRankPlusSparse, Sparse
from slrprop.network.onnx_rewrite import product_of
from slrprop.network.onnx_writer import Writer
from slrprop.positions import packed_codes

OPSET = 11  # CumSum and ScatterElements


class Decoder:
    """The nodes that make the m x n weight of a sparse form, for one layer."""

    def __init__(self, writer: Writer, form: Sparse) -> None:
        if writer.opset < OPSET:
            raise SlrpropError(f"layer '{writer.name}': sparse weights need an ONNX file of opset {OPSET} or later, and this one has {writer.opset}; convert it")  # fmt: skip
        self.writer, self.form = writer, form
        self.kind = helper.np_dtype_to_tensor_dtype(writer.dtype)
        self._constants: dict[tuple[str, str], str] = {}

    def constant(self, value: int | list[int], dtype: type = np.int64) -> str:
        """A constant, stored once."""
        key = (repr(value), dtype.__name__)
        if key not in self._constants:
            self._constants[key] = self.writer.tensor("c", np.array(value, dtype))
        return self._constants[key]

    def codes(self, what: str, stored: np.ndarray, bits: int) -> str:
        """Packed whole numbers of ``bits`` bits as a row of int32 numbers; what fills up the last bytes reads as all ones."""
        add = self.writer.add
        filled = np.append(stored, np.full(-len(stored) % bits, 255, np.uint8))
        whole = add("Cast", [self.writer.tensor(what, filled[:, None])], to=TensorProto.INT32)
        powers = [1 << place for place in range(15, -1, -1)]
        spread = add("Div", [whole, self.constant(powers[8:], np.int32)])
        spread = add("Mod", [spread, self.constant(2, np.int32)])  # (bytes, 8) bits
        grouped = add("Reshape", [spread, self.constant([-1, bits])])
        return add("MatMul", [grouped, self.constant(powers[16 - bits :], np.int32)])

    def values(self) -> str:
        """The values (nnz or more,); from few bits by Cast and Mul: ONNX Runtime leaves DequantizeLinear to every run."""
        add, quantized = self.writer.add, self.writer.quantized
        if quantized is None:
            return self.writer.tensor("entries", self.form.entries)
        whole = self.form.entries.cpu().numpy().astype(np.int64)
        if quantized.bits == 8:
            codes = self.writer.tensor("entries", whole.astype(np.int8))
        else:
            middle = 1 << (quantized.bits - 1)
            codes = self.codes("entries", packed_codes(whole + middle, quantized.bits), quantized.bits)
            codes = add("Sub", [codes, self.constant(middle, np.int32)])
        to = helper.np_dtype_to_tensor_dtype(self.writer.unpacks)
        factor = add("Cast", [self.writer.tensor("scale", quantized.scales["entries"], exact=True)], to=to)
        return self.writer.settled(add("Mul", [add("Cast", [codes], to=to), factor]))

    def weight(self) -> str:
        """The m x n weight; its nodes go without names and its tensors with short ones, which would outweigh the numbers."""
        name, start = self.writer.name, len(self.writer.nodes)
        self.writer.name = "s"
        try:
            return self._weight()
        finally:
            self.writer.name = name
            for node in self.writer.nodes[start:]:
                node.ClearField("name")

    def _weight(self) -> str:
        add, (m, n) = self.writer.add, self.form.shape
        zero = helper.make_tensor("value", self.kind, [1], [0])
        if not len(self.form.entries):
            return add("ConstantOfShape", [self.constant([m, n])], value=zero)
        codes = self.codes("gaps", self.form.gaps.cpu().numpy(), self.form.gap_bits)
        marks = add("Less", [codes, self.constant((1 << self.form.gap_bits) - 1, np.int32)])
        marks = add("Cast", [marks], to=TensorProto.INT32)
        first = self.constant(0)
        ends = add("CumSum", [add("Add", [codes, marks]), first])  # one behind a marked place
        places = add("Mul", [ends, marks])
        order = add("Mul", [add("CumSum", [marks, first], exclusive=1), marks])
        values = add("Gather", [self.values(), order])
        empty = add("ConstantOfShape", [self.constant([m * n + 1])], value=zero)
        flat = add("ScatterElements", [empty, places, values])
        flat = add("Slice", [flat, self.constant([1]), self.constant([m * n + 1])])
        return add("Reshape", [flat, self.constant([m, n])])


@product_of.register
def _(form: Sparse, writer: Writer, x: str, y: str) -> None:
    writer.product(x, Decoder(writer, form).weight(), y)


@product_of.register
def _(form: LowRankPlusSparse, writer: Writer, x: str, y: str) -> None:
    low = writer.fresh("low_rank")
    product_of(form.low_rank, writer, x, low)
    writer.add("Add", [low, writer.product(x, Decoder(writer, form.sparse).weight())], y)
