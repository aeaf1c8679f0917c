"""Sparse weights in an ONNX file: packed places and values as initializers, decoded by standard nodes.

All inputs of these nodes are constants, so ONNX Runtime computes the weight once, when it loads the file. It does so for
operators whose output's shape it can tell beforehand only; that is why codes that mark nothing are not left out (NonZero, Compress)
but written to a place of their own, in front of the weight.
"""

import numpy as np
from onnx import helper

from slrprop.errors import SlrpropError
from slrprop.forms import Sparse
from slrprop.network.onnx.writer import Number, Writer, matrix_of

OPSET = 11  # CumSum and ScatterElements


@matrix_of.register
def weight_of(form: Sparse, writer: Writer) -> str:
    """The nodes that make the m x n weight of a sparse form.

    Its places are packed whole numbers; what fills up the last byte reads as all ones, which marks nothing.
    """
    if writer.opset < OPSET:
        raise SlrpropError(f"layer '{writer.name}': sparse weights need an ONNX file of opset {OPSET} or later, and this one has {writer.opset}; convert it")  # fmt: skip
    add, (m, n), bits, whole = writer.add, form.shape, form.gap_bits, np.dtype(np.int32)
    zero = helper.make_tensor("value", helper.np_dtype_to_tensor_dtype(writer.dtype), [1], [0])

    def constant(value: int | list[int], dtype: type = np.int64) -> str:
        return writer.tensor(np.array(value, dtype))

    if not len(form.entries):
        return add("ConstantOfShape", [constant([m, n])], value=zero)
    stored = form.gaps.cpu().numpy()
    filled = np.append(stored, np.full(-len(stored) % bits, 255, np.uint8))
    powers = [1 << place for place in range(15, -1, -1)]
    spread = add("Div", [writer.cast(writer.tensor(filled[:, None]), whole), constant(powers[8:], np.int32)])
    spread = add("Mod", [spread, constant(2, np.int32)])  # (bytes, 8) bits
    grouped = add("Reshape", [spread, constant([-1, bits])])
    codes = add("MatMul", [grouped, constant(powers[16 - bits :], np.int32)])
    marks = writer.cast(add("Less", [codes, constant((1 << bits) - 1, np.int32)]), whole)
    first = constant(0)
    ends = add("CumSum", [add("Add", [codes, marks]), first])  # one behind a marked place
    order = add("Mul", [add("CumSum", [marks, first], exclusive=1), marks])
    values = add("Gather", [writer.laid(Number(form.entries, ("entries",))), order])
    empty = add("ConstantOfShape", [constant([m * n + 1])], value=zero)
    flat = add("ScatterElements", [empty, add("Mul", [ends, marks]), values])
    flat = add("Slice", [flat, constant([1]), constant([m * n + 1])])
    return add("Reshape", [flat, constant([m, n])])
