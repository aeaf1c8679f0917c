"""Where the numbers of an ONNX file's initializers are: cut out of the file's bytes, or in other files beside it.

With just enough of the protobuf wire format to cut large fields out of a message, and to put them back.
"""

import contextlib
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from slrprop.errors import SlrpropError, first_line

LARGE = 1024  # bytes from which an initializer stays on disk
CHUNK = 1 << 24
OURS = b"slrprop\n"  # ends our files of external data, which are told apart by that
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # field numbers of ModelProto, GraphProto, TensorProto


Field = tuple[int, int, int, int]  # of a protobuf message: number, start, start of the payload, end


def _varint(buffer: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a length in the file is cut off")


def fields(buffer: Any, start: int, end: int) -> Iterator[Field]:
    """The fields of one protobuf message."""
    at = start
    while at < end:
        first = at
        key, at = _varint(buffer, at, end)
        if (kind := key & 7) == 0:
            payload, (_, at) = at, _varint(buffer, at, end)
        elif kind == 2:
            length, payload = _varint(buffer, at, end)
            at = payload + length
        elif kind in (1, 5):
            payload, at = at, at + (8 if kind == 1 else 4)
        else:
            raise ValueError("it is no protobuf message")
        if at > end:
            raise ValueError("it ends in the middle of a field; the file is cut off")
        yield key >> 3, first, payload, at


def head(number: int, length: int) -> bytes:
    """Key and length of a field of bytes."""
    out = bytearray()
    for value in (number << 3 | 2, length):
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def around(message: bytes, number: int) -> tuple[bytes, bytes]:
    """A serialised message in two parts, between which field ``number`` belongs."""
    place = next((start for found, start, _, _ in fields(message, 0, len(message)) if found > number), len(message))
    return message[:place], message[place:]


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a damaged or hostile file makes the libraries raise becomes one sentence."""
    try:
        yield
    except SlrpropError:
        raise
    except OSError as error:
        raise SlrpropError(f"'{path}' can't be read: {error.strerror or error}") from error
    except Exception as error:
        raise SlrpropError(f"'{path}' is not an ONNX model that slrprop can use: {first_line(error)}") from error


@dataclass(frozen=True, eq=False)
class Stored:
    """Where an initializer's numbers are: ``length`` bytes at ``offset`` of a file, or an ``array`` in memory.

    ``message`` is where the whole initializer stands in the model's file; None for external data and new tensors.
    """

    length: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    path: Path = Path()
    offset: int = 0
    message: tuple[int, int] | None = None
    external: bool = False
    array: np.ndarray | None = None

    @property
    def stored_length(self) -> int:
        """Bytes that :func:`copy` writes."""
        return self.length if self.message is None or self.array is not None else self.message[1] - self.message[0]


def mark(tensor: TensorProto, stored: Stored, location: str = "*", offset: int = 0) -> None:
    """Make the tensor refer to data elsewhere."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", stored.length)):
        tensor.external_data.add(key=key, value=str(value))


def bytes_of(tensor: TensorProto) -> int | None:
    """The length of the tensor's numbers as raw data; None for types that are not whole bytes of a NumPy type."""
    if tensor.data_type in (TensorProto.STRING, TensorProto.UNDEFINED) or min(tensor.dims, default=0) < 0:
        return None
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if dtype.kind not in "fiub" or dtype.isbuiltin != 1:
        return None
    return math.prod(tensor.dims) * dtype.itemsize


def split(path: Path, buffer: Any, size: int) -> tuple[bytes, dict[str, Stored]]:
    """The model without the raw data of its large initializers, and where those are."""
    graphs = [found for found in fields(buffer, 0, size) if found[0] == GRAPH]
    if len(graphs) != 1:
        raise ValueError("it holds no graph")
    _, first, start, end = graphs[0]
    pieces, stored, done = [], {}, start
    for number, begin, payload, stop in fields(buffer, start, end):
        if number != INITIALIZER or stop - payload < LARGE:
            continue
        raw = [found for found in fields(buffer, payload, stop) if found[0] == RAW_DATA]
        if len(raw) != 1 or raw[0][3] - raw[0][2] < LARGE:
            continue
        _, cut, offset, until = raw[0]
        tensor = TensorProto()
        tensor.ParseFromString(buffer[payload:cut] + buffer[until:stop])
        length = until - offset
        if tensor.data_location == TensorProto.EXTERNAL or bytes_of(tensor) is None:
            continue
        if bytes_of(tensor) != length:
            raise ValueError(f"tensor '{tensor.name}' of shape {tuple(tensor.dims)} holds {length} bytes")
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        item = stored[tensor.name] = Stored(length, tuple(tensor.dims), dtype, path.resolve(), offset, (payload, stop))
        mark(tensor, item)
        content = tensor.SerializeToString()
        pieces += [buffer[done:begin], head(INITIALIZER, len(content)), content]
        done = stop
    graph = b"".join([*pieces, buffer[done:end]])
    return buffer[:first] + head(GRAPH, len(graph)) + graph + buffer[end:size], stored


def external(tensor: TensorProto, path: Path) -> Stored:
    """Where external data of an initializer is; nothing outside the model's folder is touched."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    folder, location = path.parent.resolve(), entries.get("location", "")
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not target.is_relative_to(folder) or target == folder:
        raise SlrpropError(f"'{path}' keeps tensor '{tensor.name}' at {location!r}, which is outside its folder")
    if not target.is_file():
        raise SlrpropError(f"'{path}' keeps tensor '{tensor.name}' in {location!r}, which is not there")
    want = bytes_of(tensor)
    if want is None:
        raise SlrpropError(
            f"'{path}' keeps tensor '{tensor.name}' of an unusual type outside the file; store it inside"
        )
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", want))
    if offset < 0 or length != want or offset + length > target.stat().st_size:
        raise SlrpropError(f"tensor '{tensor.name}' of '{path}' does not fit its external data; the file is damaged")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Stored(length, tuple(tensor.dims), dtype, target, offset, external=True)


def graphs_of(node: NodeProto) -> list[GraphProto]:
    """The bodies of If, Loop and Scan."""
    return [
        graph for item in node.attribute for graph in ([item.g] if item.type == AttributeProto.GRAPH else item.graphs)
    ]


def refuse_hidden_external(graph: GraphProto, path: Path, top: bool = True) -> None:
    """External data is read from the graph's own initializers only."""
    tensors = [] if top else list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                refuse_hidden_external(inner, path, False)
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors):
        raise SlrpropError(f"'{path}' keeps tensors of a node or a subgraph in other files; store them inside")


def copy(item: Stored, out: BinaryIO) -> None:
    """Write an initializer's numbers, or its whole message where it stands in a model's file."""
    if item.array is not None:
        out.write(item.array.view(np.uint8).data)
        return
    start, end = item.message or (item.offset, item.offset + item.length)
    with open(item.path, "rb") as file:
        file.seek(start)
        while start < end:
            part = file.read(min(CHUNK, end - start))
            if not part:
                raise SlrpropError(f"'{item.path}' became shorter while it was read; nothing was written")
            out.write(part)
            start += len(part)


def no_model(path: Path) -> str:
    """Why a file is no model that another may replace."""
    try:
        with reading(path), open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            split(path, buffer, len(buffer))
    except SlrpropError:
        return "is no ONNX model"
    return ""


def no_data(path: Path) -> str:
    """Why a file is not external data of ours, of the model that is replaced with it and of no other one in its folder."""
    owner = path.with_suffix("")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        ours = buffer[-len(OURS) :] == OURS
    if not ours or not owner.exists():
        return f"is not the external data that slrprop wrote for '{owner.name}'"
    for other in path.parent.glob("*.onnx"):
        if other.name != owner.name and other.is_file() and other.stat().st_size:
            with open(other, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                if buffer.find(path.name.encode()) >= 0:
                    return f"is read by '{other.name}' too"
    return ""


def bare(graph: GraphProto) -> None:
    """Take out what means nothing to a runtime: exporters' notes on nodes and tensors (stack traces, paths) and the shapes between nodes."""
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    for body in (body for node in graph.node for body in graphs_of(node)):
        bare(body)


def refill(part: Any, items: Iterable[Any]) -> None:
    """Leave these items alone in a repeated field."""
    items = list(items)
    del part[:]
    part.extend(items)
