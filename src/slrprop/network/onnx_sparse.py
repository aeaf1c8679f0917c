"""Sparse weights in an ONNX file: packed places and values as initializers, decoded by standard nodes.

All inputs of these nodes are constants, so ONNX Runtime computes the weight once, when it loads the file.
"""

import numpy as np
from onnx import TensorProto, helper

from slrprop.errors import SlrpropError
from slrprop.factors import LowRankPlusSparse, Sparse
from slrprop.network.onnx_rewrite import Writer, product_of
from slrprop.positions import packed_codes

OPSET = 11  # CumSum and ScatterElements
REDUCTION_BY_INPUT = 13  # the opset from which ReduceSum takes its axes as an input


def _constant(writer: Writer, what: str, *values: int, dtype: type = np.int64) -> str:
    return writer.tensor(what, np.array(values, dtype))


def _codes(writer: Writer, what: str, stored: np.ndarray, bits: int) -> str:
    """Packed whole numbers of ``bits`` bits as one row of int32 numbers, with what fills up the last byte."""
    whole = writer.add("Cast", [writer.tensor(what, stored[:, None])], to=TensorProto.INT32)
    powers = _constant(writer, "powers", *(1 << np.arange(7, -1, -1)), dtype=np.int32)
    two = _constant(writer, "two", 2, dtype=np.int32)
    spread = writer.add("Mod", [writer.add("Div", [whole, powers]), two])  # (bytes, 8)
    flat = writer.add("Reshape", [spread, _constant(writer, "flat", -1)])
    used = len(stored) * 8 // bits * bits
    ends = (_constant(writer, "start", 0), _constant(writer, "stop", used))
    grouped = writer.add("Reshape", [writer.add("Slice", [flat, *ends]), _constant(writer, "groups", -1, bits)])
    values = _constant(writer, "values_of_bits", *(1 << np.arange(bits - 1, -1, -1)), dtype=np.int32)
    weighted = writer.add("Mul", [grouped, values])
    if writer.opset < REDUCTION_BY_INPUT:
        return writer.add("ReduceSum", [weighted], axes=[1], keepdims=0)
    return writer.add("ReduceSum", [weighted, _constant(writer, "axis", 1)], keepdims=0)


def _values(writer: Writer, form: Sparse) -> str:
    """The values (nnz,); from few bits by Cast and Mul, which ONNX Runtime computes at load, unlike DequantizeLinear."""
    if writer.quantized is None:
        return writer.tensor("values", form.values)
    bits, scale = writer.quantized.bits, writer.quantized.scales["values"]
    middle = 1 << (bits - 1)
    stored = packed_codes(form.values.cpu().numpy().astype(np.int64) + middle, bits)
    codes = _codes(writer, "values", stored, bits)
    ends = (_constant(writer, "start", 0), _constant(writer, "stop", len(form.values)))
    codes = writer.add("Sub", [writer.add("Slice", [codes, *ends]), _constant(writer, "middle", middle, dtype=np.int32)])  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype(writer.dtype)
    factor = writer.add("Cast", [writer.tensor("values_scale", scale, exact=True)], to=kind)
    return writer.add("Mul", [writer.add("Cast", [codes], to=kind), factor])


def weight_of(writer: Writer, form: Sparse) -> str:
    """The nodes that make the m x n weight.

    Raises:
        SlrpropError: the file's opset lacks an operator.
    """
    if writer.opset < OPSET:
        raise SlrpropError(f"layer '{writer.name}': sparse weights need an ONNX file of opset {OPSET} or later, and this one has {writer.opset}; convert it")  # fmt: skip
    m, n = form.shape
    codes = _codes(writer, "gaps", form.gaps.cpu().numpy(), form.gap_bits)
    skip = _constant(writer, "skip", (1 << form.gap_bits) - 1, dtype=np.int32)
    marks = writer.add("Less", [codes, skip])
    steps = writer.add("Add", [codes, writer.add("Cast", [marks], to=TensorProto.INT32)])
    ends = writer.add("CumSum", [writer.add("Cast", [steps], to=TensorProto.INT64), writer.tensor("axis", np.array(0))])
    places = writer.add("Sub", [writer.add("Compress", [ends, marks], axis=0), _constant(writer, "one", 1)])
    zero = helper.make_tensor("value", helper.np_dtype_to_tensor_dtype(writer.dtype), [1], [0])
    empty = writer.add("ConstantOfShape", [_constant(writer, "count", m * n)], value=zero)
    flat = writer.add("ScatterElements", [empty, places, _values(writer, form)], axis=0)
    return writer.add("Reshape", [flat, _constant(writer, "shape", m, n)])


@product_of.register
def _(form: Sparse, writer: Writer, x: str, y: str) -> None:
    writer.product(x, weight_of(writer, form), y)


@product_of.register
def _(form: LowRankPlusSparse, writer: Writer, x: str, y: str) -> None:
    low = writer.fresh("low_rank")
    product_of(form.low_rank, writer, x, low)
    writer.add("Add", [low, writer.product(x, weight_of(writer, form.sparse))], y)
