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

OPSET = 11  # CumSum and ScatterElements


class Decoder:
    """The nodes that make the m x n weight of a sparse form, for one layer."""

    def __init__(self, writer: Writer, form: Sparse) -> None:
        if writer.opset < OPSET:
            raise SlrpropError(f"layer '{writer.name}': sparse weights need an ONNX file of opset {OPSET} or later, and this one has {writer.opset}; convert it")  # fmt: skip
        self.writer, self.form = writer, form
        self.kind = helper.np_dtype_to_tensor_dtype(writer.dtype)

    def constant(self, value: int | list[int], dtype: type = np.int64) -> str:
        """A constant, stored once."""
        return self.writer.tensor(np.array(value, dtype))

    def codes(self, stored: np.ndarray, bits: int) -> str:
        """Packed whole numbers of ``bits`` bits as a row of int32 numbers; what fills up the last bytes reads as all ones."""
        add = self.writer.add
        filled = np.append(stored, np.full(-len(stored) % bits, 255, np.uint8))
        whole = add("Cast", [self.writer.tensor(filled[:, None])], to=TensorProto.INT32)
        powers = [1 << place for place in range(15, -1, -1)]
        spread = add("Div", [whole, self.constant(powers[8:], np.int32)])
        spread = add("Mod", [spread, self.constant(2, np.int32)])  # (bytes, 8) bits
        grouped = add("Reshape", [spread, self.constant([-1, bits])])
        return add("MatMul", [grouped, self.constant(powers[16 - bits :], np.int32)])

    def weight(self) -> str:
        """The m x n weight."""
        add, (m, n) = self.writer.add, self.form.shape
        zero = helper.make_tensor("value", self.kind, [1], [0])
        if not len(self.form.entries):
            return add("ConstantOfShape", [self.constant([m, n])], value=zero)
        codes = self.codes(self.form.gaps.cpu().numpy(), self.form.gap_bits)
        marks = add("Less", [codes, self.constant((1 << self.form.gap_bits) - 1, np.int32)])
        marks = add("Cast", [marks], to=TensorProto.INT32)
        first = self.constant(0)
        ends = add("CumSum", [add("Add", [codes, marks]), first])  # one behind a marked place
        places = add("Mul", [ends, marks])
        order = add("Mul", [add("CumSum", [marks, first], exclusive=1), marks])
        values = add("Gather", [self.writer.number("entries", self.form.entries), order])
        empty = add("ConstantOfShape", [self.constant([m * n + 1])], value=zero)
        flat = add("ScatterElements", [empty, places, values])
        flat = add("Slice", [flat, self.constant([1]), self.constant([m * n + 1])])
        return add("Reshape", [flat, self.constant([m, n])])


@product_of.register
def _(form: Sparse, writer: Writer, x: str, y: str) -> None:
    writer.product(x, Decoder(writer, form).weight(), y)


@product_of.register
def _(form: LowRankPlusSparse, writer: Writer, x: str, y: str) -> None:
    low = next(writer.additions.names)
    product_of(form.low_rank, writer, x, low)
    writer.add("Add", [low, writer.product(x, Decoder(writer, form.sparse).weight())], y)
