"""Samples as a session takes them, padded to a batch of fixed size."""

from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper
from torch import Tensor

from slrprop.data import Batch
from slrprop.errors import SlrpropError
from slrprop.network.onnx.file import Feed


class Part(NamedTuple):
    """Samples as the session takes them: ``feed`` may be padded beyond the ``samples`` of the batch."""

    batch: Batch
    feed: Feed
    samples: int
    size: int


def input_dtype(value: ValueInfoProto) -> np.dtype[Any] | None:
    """The type of an input's numbers; None where it declares none, or text."""
    code = value.type.tensor_type.elem_type
    if code in (TensorProto.UNDEFINED, TensorProto.STRING):
        return None
    if code not in TensorProto.DataType.values():
        raise SlrpropError(f"input '{value.name}' has element type {code}, which ONNX does not know")
    if code == TensorProto.BFLOAT16:
        raise SlrpropError(f"input '{value.name}' is bfloat16, which ONNX Runtime does not take from NumPy; export the model in float32")  # fmt: skip
    return np.dtype(helper.tensor_dtype_to_np_dtype(code))


def unpadded(value: Tensor, part: Part) -> Tensor:
    """A tensor without what the padding samples gave: the end of the samples' axis, as far as that can be told."""
    axis = max(part.batch.axes.values(), default=0)
    if part.samples < part.size and axis < value.ndim - 1 and value.shape[axis] == part.size:
        return value.narrow(axis, 0, part.samples)
    if part.samples == part.size or not value.ndim or len(value) % part.size:
        return value
    return value[: len(value) // part.size * part.samples]
