"""Weights that are put together out of few numbers, as ONNX nodes over constants: those that share one sequence, and sparse ones.

The file is small; ONNX Runtime computes the weight once, when it loads the file (constant folding), and then one product, as for
a dense layer. It folds only operators whose output's shape it can tell beforehand; that is why codes of places that mark nothing
are not left out (NonZero, Compress) but written to a place of their own, in front of the weight.
"""

from functools import singledispatch
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms import Form, Shared, Sparse
from slrprop.forms.permutations import GOLDEN, MIX_1, MIX_2, entry_bits, pack, packed_bytes, windows
from slrprop.network.onnx.writer import Number, Writer

SEED_OPSET = 18  # the first that knows BitwiseXor
OPSET = 11  # the first with CumSum and ScatterElements


@singledispatch
def matrix_of(form: Form, writer: Writer) -> str:
    """Write the nodes that put a form's matrix (m x n) together, once, when the runtime loads the file. Such a form registers its own."""
    raise SlrpropError(f"no ONNX nodes compute with {type(form).__name__} forms")


def _zeros(writer: Writer, count: int, kind: int) -> str:
    return writer.add("Cast", [writer.add("ConstantOfShape", [writer.tensor(np.array([count]))])], to=kind)


def unpacked(writer: Writer, packed: str, m: int, n: int) -> str:
    """Nodes that unpack permutations (n x m, int32, or int64 from m = 131 073) from their bytes."""
    add, bits, count = writer.add, entry_bits(m), packed_bytes(m, n)
    if not bits:
        return writer.tensor(np.zeros((n, m), np.int32))
    where, shifts = windows(bits)
    kind, whole = (TensorProto.INT32, np.int32) if where.shape[1] < 4 else (TensorProto.INT64, np.int64)
    missing = bits - count % bits
    filled = add("Concat", [packed, _zeros(writer, missing, TensorProto.UINT8)], axis=0)
    stored = add("Reshape", [filled, writer.tensor(np.array([(count + missing) // bits, bits]))])
    base, value = writer.tensor(np.array(256, whole)), ""
    for column in where.T:
        part = add("Cast", [add("Gather", [stored, writer.tensor(column.astype(np.int64))], axis=1)], to=kind)
        value = add("Add", [add("Mul", [value, base]), part]) if value else part
    value = add("Div", [value, writer.tensor((1 << shifts).astype(whole))])
    value = add("Mod", [value, writer.tensor(np.array(1 << bits, whole))])
    value = add("Reshape", [value, writer.tensor(np.array([-1]))])
    value = add("Slice", [value, *(writer.tensor(np.array([at])) for at in (0, m * n, 0))])
    return add("Reshape", [value, writer.tensor(np.array([n, m]))])


def seeded(writer: Writer, seed: int, m: int, n: int) -> str:
    """Nodes that generate a seed's permutations (n x m, int64) as :func:`slrprop.forms.permutations.seeded` does.

    Like every runtime we know they take products of int64 modulo 2^64.
    """
    add, kind = writer.add, TensorProto.INT64

    def constant(value: Any) -> str:
        return writer.tensor(np.array(value, np.uint64).astype(np.int64))

    def mixed(z: str, shift: int) -> str:
        word = add("Cast", [z], to=TensorProto.UINT64)
        moved = add("BitShift", [word, writer.tensor(np.array(shift, np.uint64))], direction="RIGHT")
        return add("Cast", [add("BitwiseXor", [word, moved])], to=kind)

    z = add("Add", [_zeros(writer, m * n, kind), constant(1)])
    z = add("Mul", [add("CumSum", [z, writer.tensor(np.array(0))]), constant(GOLDEN)])
    z = mixed(add("Add", [z, writer.tensor(np.array([seed]))]), 30)
    z = mixed(add("Mul", [z, constant(MIX_1)]), 27)
    z = mixed(add("Mul", [z, constant(MIX_2)]), 31)
    words = add("Reshape", [z, writer.tensor(np.array([n, m]))])
    names = [next(writer.additions.names) for _ in range(2)]  # values, and their places
    writer.nodes.append(helper.make_node("TopK", [words, writer.tensor(np.array([m]))], names, axis=1, largest=0, sorted=1))  # fmt: skip
    return names[1]


@matrix_of.register
def _(form: Shared, writer: Writer) -> str:
    """Permutations of a seed are generated from it where the file's opset can, else they are packed."""
    if writer.opset < OPSET:
        raise SlrpropError(
            f"layer '{writer.name}': a shared weight needs an ONNX file of opset {OPSET} or later, and this one has {writer.opset}; convert it"
        )
    m, n = form.shape
    if form.seed is not None and writer.opset >= SEED_OPSET:
        places = seeded(writer, form.seed, m, n)
    else:
        packed = pack(form.places.cpu().numpy()) if form.packed is None else form.packed.cpu().numpy()
        places = unpacked(writer, writer.tensor(packed), m, n)

    def part(name: str, value: Tensor) -> str:
        return writer.raised(writer.laid(Number(value, (name,))))

    spread = writer.add("Gather", [part("sequence", form.sequence), places], axis=0)
    column = writer.tensor(np.array([n, 1]))
    weight = writer.add("Mul", [spread, writer.add("Reshape", [part("scale", form.scale), column])])
    if form.offset is not None:
        weight = writer.add("Add", [weight, writer.add("Reshape", [part("offset", form.offset), column])])
    return writer.settled(writer.add("Transpose", [weight], perm=[1, 0]))


@matrix_of.register
def _(form: Sparse, writer: Writer) -> str:
    """Places are packed whole numbers; what fills up the last byte reads as all ones, which marks nothing."""
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
