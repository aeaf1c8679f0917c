"""Tensors of an ONNX graph that are known without data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from slrprop.network.onnx.file import FLOATS, OnnxFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor known without data: its shape and dtype, and a way to its numbers. ``root`` is what stores them."""

    root: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], np.ndarray]


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def standard(node: NodeProto) -> str:
    """The node's operator where it is a standard one, else an empty text."""
    return node.op_type if node.domain in ("", "ai.onnx") else ""


def constants_of(file: OnnxFile) -> dict[str, Constant]:
    """Initializers, Constant nodes, and what Identity, Transpose, Cast and Reshape make of them."""
    found: dict[str, Constant] = {}

    def from_tensor(tensor: TensorProto, name: str, load: Callable[[], np.ndarray]) -> None:
        if tensor.data_type not in (TensorProto.STRING, TensorProto.UNDEFINED):
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            found[name] = Constant(name, tuple(tensor.dims), dtype, load)

    for tensor in file.proto.graph.initializer:
        from_tensor(tensor, tensor.name, partial(file.array, tensor.name))
    for node in file.proto.graph.node:
        op = standard(node)
        if op == "Constant" and node.output:
            value = attribute(node, "value")
            if isinstance(value, TensorProto):
                from_tensor(value, node.output[0], partial(numpy_helper.to_array, value))
            elif (plain := next((attribute(node, key) for key in ("value_float", "value_floats", "value_int", "value_ints") if attribute(node, key) is not None), None)) is not None:  # fmt: skip
                array = np.array(plain, np.float32 if "float" in node.attribute[0].name else np.int64)
                found[node.output[0]] = Constant(node.output[0], array.shape, array.dtype, array.copy)
        elif op in ("Identity", "Transpose", "Cast", "Reshape") and node.input and node.input[0] in found:
            made = _derived(op, node, found)
            if made is not None:
                found[node.output[0]] = made
    return found


def _derived(op: str, node: NodeProto, found: dict[str, Constant]) -> Constant | None:
    base = found[node.input[0]]
    if op == "Identity":
        return base
    if op == "Transpose":
        axes = tuple(attribute(node, "perm", range(len(base.shape))[::-1]))
        if sorted(axes) != list(range(len(base.shape))):
            return None
        return Constant(
            base.root, tuple(base.shape[axis] for axis in axes), base.dtype, lambda: base.load().transpose(axes)
        )
    if op == "Cast":
        to = FLOATS.get(attribute(node, "to"))
        return None if to is None else Constant(base.root, base.shape, np.dtype(to), lambda: base.load().astype(to))
    target = found.get(node.input[1]) if len(node.input) > 1 else None
    if target is None or len(target.shape) != 1 or target.shape[0] > 8:
        return None
    sides = [base.shape[i] if side == 0 and i < len(base.shape) else int(side) for i, side in enumerate(target.load())]
    count = int(np.prod(base.shape, dtype=object))
    rest = int(np.prod([side for side in sides if side != -1], dtype=object))
    shape = tuple(count // max(rest, 1) if side == -1 else side for side in sides)
    if int(np.prod(shape, dtype=object)) != count:
        return None
    return Constant(base.root, shape, base.dtype, lambda: base.load().reshape(shape))


def tensor_of(array: np.ndarray) -> "Tensor":
    """Numbers to compute with: a contiguous copy, half precision as float32."""
    import torch

    return torch.from_numpy(np.array(array, np.float32 if array.dtype == np.float16 else array.dtype, order="C"))
