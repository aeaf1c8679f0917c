"""Weights that share one sequence, as ONNX nodes over constants.

The file is small; the runtime puts the weight together when it loads the file (constant folding) and then computes one
product, as for a dense layer.
"""

from typing import Any, Protocol, TypeVar

import numpy as np
from onnx import TensorProto, helper
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.factors.shared import Shared
from slrprop.network.onnx_writer import Number, Writer, matrix_of
from slrprop.permutations import GOLDEN, MIX_1, MIX_2, entry_bits, pack, packed_bytes, windows

SEED_OPSET = 18  # the first that knows BitwiseXor
T = TypeVar("T")


class Nodes(Protocol[T]):
    """What adds nodes to a graph and returns what stands for their output, of the given type and shape."""

    def tensor(self, value: np.ndarray) -> T: ...

    def add(
        self, op: str, inputs: list[T], dtype: int, shape: tuple[int, ...], output: int = 0, **attributes: Any
    ) -> T: ...


def zeros(nodes: Nodes[T], count: int, kind: int) -> T:
    """Zeros that exporters do not work out before they write a file, as they would a small Range or constant."""
    found = nodes.add("ConstantOfShape", [nodes.tensor(np.array([count]))], TensorProto.FLOAT, (count,))
    return nodes.add("Cast", [found], kind, (count,), to=kind)


def unpacked_nodes(nodes: Nodes[T], packed: T, m: int, n: int) -> T:
    """Nodes that unpack permutations (n x m, int32, or int64 from m = 131 073) from their bytes."""
    bits, count = entry_bits(m), packed_bytes(m, n)
    if not bits:
        return nodes.tensor(np.zeros((n, m), np.int32))
    where, shifts = windows(bits)
    kind, whole = (TensorProto.INT32, np.int32) if where.shape[1] < 4 else (TensorProto.INT64, np.int64)
    missing = bits - count % bits
    packed = nodes.add("Concat", [packed, zeros(nodes, missing, TensorProto.UINT8)], TensorProto.UINT8, (count + missing,), axis=0)  # fmt: skip
    shape = ((count + missing) // bits, 8)
    sides = nodes.tensor(np.array([shape[0], bits]))
    stored = nodes.add("Reshape", [packed, sides], TensorProto.UINT8, (shape[0], bits))
    base, value = nodes.tensor(np.array(256, whole)), None
    for column in where.T:
        part = nodes.add("Gather", [stored, nodes.tensor(column.astype(np.int64))], TensorProto.UINT8, shape, axis=1)  # fmt: skip
        part = nodes.add("Cast", [part], kind, shape, to=kind)
        value = part if value is None else nodes.add("Add", [nodes.add("Mul", [value, base], kind, shape), part], kind, shape)  # fmt: skip
    assert value is not None
    value = nodes.add("Div", [value, nodes.tensor((1 << shifts).astype(whole))], kind, shape)
    value = nodes.add("Mod", [value, nodes.tensor(np.array(1 << bits, whole))], kind, shape)
    value = nodes.add("Reshape", [value, nodes.tensor(np.array([-1]))], kind, (8 * shape[0],))
    bounds = [nodes.tensor(np.array([at])) for at in (0, m * n, 0)]
    value = nodes.add("Slice", [value, *bounds], kind, (m * n,))
    return nodes.add("Reshape", [value, nodes.tensor(np.array([n, m]))], kind, (n, m))


def seeded_nodes(nodes: Nodes[T], seed: T, m: int, n: int) -> T:
    """Nodes that generate a seed's (int64, (1,)) permutations (n x m, int64) as :func:`slrprop.permutations.seeded` does.

    Like every runtime we know they take products of int64 modulo 2^64.
    """
    flat, kind = (m * n,), TensorProto.INT64

    def constant(value: Any) -> T:
        return nodes.tensor(np.array(value, np.uint64).astype(np.int64))

    def mixed(z: T, shift: int) -> T:
        word = nodes.add("Cast", [z], TensorProto.UINT64, flat, to=TensorProto.UINT64)
        count = nodes.tensor(np.array(shift, np.uint64))
        moved = nodes.add("BitShift", [word, count], TensorProto.UINT64, flat, direction="RIGHT")
        word = nodes.add("BitwiseXor", [word, moved], TensorProto.UINT64, flat)
        return nodes.add("Cast", [word], kind, flat, to=kind)

    z = nodes.add("Add", [zeros(nodes, m * n, kind), constant(1)], kind, flat)
    z = nodes.add("CumSum", [z, nodes.tensor(np.array(0))], kind, flat)
    z = nodes.add("Mul", [z, constant(GOLDEN)], kind, flat)
    z = mixed(nodes.add("Add", [z, seed], kind, flat), 30)
    z = mixed(nodes.add("Mul", [z, constant(MIX_1)], kind, flat), 27)
    z = mixed(nodes.add("Mul", [z, constant(MIX_2)], kind, flat), 31)
    words = nodes.add("Reshape", [z, nodes.tensor(np.array([n, m]))], kind, (n, m))
    return nodes.add("TopK", [words, nodes.tensor(np.array([m]))], kind, (n, m), output=1, axis=1, largest=0, sorted=1)  # fmt: skip


class _InFile:
    """Nodes in a rewritten file."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def tensor(self, value: np.ndarray) -> str:
        return self.writer.tensor(value)

    def add(
        self, op: str, inputs: list[str], dtype: int, shape: tuple[int, ...], output: int = 0, **attributes: Any
    ) -> str:
        if not output:
            return self.writer.add(op, inputs, **attributes)
        names = [next(self.writer.additions.names) for _ in range(output + 1)]
        self.writer.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[output]


@matrix_of.register
def _(form: Shared, writer: Writer) -> str:
    """Permutations of a seed are generated from it where the file's opset can, else they are packed."""
    if writer.opset < 11:
        raise SlrpropError(
            f"layer '{writer.name}': a shared weight needs an ONNX file of opset 11 or later, and this one has {writer.opset}; convert it"
        )
    (m, n), nodes = form.shape, _InFile(writer)
    if form.seed is not None and writer.opset >= SEED_OPSET:
        places = seeded_nodes(nodes, nodes.tensor(np.array([form.seed])), m, n)
    else:
        packed = pack(form.places.cpu().numpy()) if form.packed is None else form.packed.cpu().numpy()
        places = unpacked_nodes(nodes, nodes.tensor(packed), m, n)

    def part(name: str, value: Tensor) -> str:
        return writer.raised(writer.laid(Number(value, (name,))))

    spread = writer.add("Gather", [part("sequence", form.sequence), places], axis=0)
    column = writer.tensor(np.array([n, 1]))
    weight = writer.add("Mul", [spread, writer.add("Reshape", [part("scale", form.scale), column])])
    if form.offset is not None:
        weight = writer.add("Add", [weight, writer.add("Reshape", [part("offset", form.offset), column])])
    return writer.settled(writer.add("Transpose", [weight], perm=[1, 0]))
