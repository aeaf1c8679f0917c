"""ONNX files as a light graph beside large tensors that stay on disk, and back to a file byte for byte.

The protobuf library would hold a model several times over. Here the file is mapped; every large initializer's bytes
are cut out before parsing, read only when asked for, mapped by ONNX Runtime without a copy, and copied from the old
file to the new one as they are.
"""

import contextlib
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import ml_dtypes
import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from slrprop.errors import SlrpropError, first_line
from slrprop.files import Outputs, replacing, together
from slrprop.network.onnx import tensors

if TYPE_CHECKING:
    from slrprop.network.onnx.graph import Graph

INITIALIZERS_ALONE = 4  # the IR version from which initializers need not be listed as inputs
PAGE = 4096  # external tensors of many pages start at one, the others at a cache line
MANY, LINE = 1 << 20, 64
KINDS = ("FLOAT", "FLOAT16", "DOUBLE", "INT64", "INT32", "INT8", "UINT8", "BOOL")
ELEMENT_TYPES = {f"tensor({kind.lower()})": TensorProto.DataType.Value(kind) for kind in KINDS}
Chunk = bytes | tensors.Stored  # of a file
Feed = dict[str, np.ndarray]
FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64}


@dataclass(eq=False)
class OnnxFile:
    """A model: ``proto`` without its large tensors, which ``stored`` finds by the initializer's name.

    What is read from disk lives as long as someone uses it.
    """

    path: Path
    proto: ModelProto
    stored: dict[str, tensors.Stored]
    _read: "WeakValueDictionary[tensors.Stored, np.ndarray]" = field(default_factory=WeakValueDictionary)

    @classmethod
    def open(cls, path: str | Path) -> "OnnxFile":
        """Read a model without its large tensors.

        Raises:
            SlrpropError: no such file, no ONNX model, damaged, or external data that is missing or outside its folder.
        """
        path = Path(path)
        if str(path).encode(errors="replace") != os.fsencode(path):
            raise SlrpropError(
                f"the path '{path}' is not UTF-8, and ONNX Runtime opens no other; rename the file or its folder"
            )
        with tensors.reading(path):
            size = path.stat().st_size
            if not path.is_file() or size == 0:
                raise SlrpropError(f"'{path}' is no file with an ONNX model in it")
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                skeleton, stored = tensors.split(path, buffer, size)
            proto = ModelProto()
            proto.ParseFromString(skeleton)
            if not proto.opset_import or not proto.graph.output:
                raise SlrpropError(f"'{path}' is no ONNX model: it names no operator set or no output")
            tensors.refuse_hidden_external(proto.graph, path)
            for tensor in proto.graph.initializer:
                if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in stored:
                    stored[tensor.name] = tensors.external(tensor, path)
            words = {word for node in proto.graph.node for word in (node.name, node.op_type, node.domain, *node.output)}
            words |= {value.name for value in (*proto.graph.input, *proto.graph.output)} | _read_names(proto.graph)
            if not all(isinstance(word, str) for word in words):
                raise SlrpropError(f"'{path}' holds names that are no text; the file is damaged")
            names = [tensor.name for tensor in proto.graph.initializer]
            if len(set(names)) != len(names):
                raise SlrpropError(f"'{path}' holds two initializers of the same name; the file is damaged")
            for tensor in proto.graph.initializer:
                if tensor.name in stored:
                    tensors.mark(tensor, stored[tensor.name])
        return cls(path, proto, stored)

    @cached_property
    def graph(self) -> "Graph":
        """Who makes and reads each tensor."""
        from slrprop.network.onnx.graph import Graph  # which stands on files

        with tensors.reading(self.path):
            return Graph(self)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx")), 1)

    @property
    def numbers(self) -> int:
        """Floating-point numbers in initializers and constants."""
        constants = (a.t for node in self.proto.graph.node if node.op_type == "Constant" for a in node.attribute)
        found = (
            t for t in (*self.proto.graph.initializer, *constants) if t.data_type in (*FLOATS, TensorProto.BFLOAT16)
        )
        return sum(math.prod(tensor.dims) for tensor in found)

    @property
    def bytes(self) -> int:
        """Size of the file and of the files that it keeps tensors in."""
        return sum(path.stat().st_size for _, path in self.files)

    @property
    def files(self) -> list[tuple[str, Path]]:
        """What the model is read from, each file once, and what it is."""
        beside = {item.path for item in self.stored.values() if item.external and item.array is None}
        return [("the model itself", self.path), *(("the model's external data", path) for path in sorted(beside))]

    def array(self, name: str) -> np.ndarray:
        """The numbers of an initializer."""
        item = self.stored.get(name)
        with tensors.reading(self.path):
            if item is None:
                return numpy_helper.to_array(next(t for t in self.proto.graph.initializer if t.name == name))
            if item.array is not None:
                return item.array
            found = self._read.get(item)
            if found is None:
                count = item.length // item.dtype.itemsize
                found = np.fromfile(item.path, item.dtype, count, offset=item.offset)
                if len(found) != count:
                    raise SlrpropError(f"'{item.path}' ends before tensor '{name}' does; the file is cut off")
                found = self._read[item] = found.reshape(item.shape)
            return found

    def edited(self, edit: Callable[[GraphProto], dict[str, np.ndarray]]) -> "OnnxFile":
        """A copy whose graph was changed; ``edit`` returns new initializers by name.

        Initializers and nodes that nothing reads any more are left out.
        """
        proto = deepcopy(self.proto)
        before = _read_names(proto.graph)
        new = edit(proto.graph)
        tensors.bare(proto.graph)
        _drop_unread(proto.graph, before)
        gone = {tensor.name for tensor in proto.graph.initializer} & (before - _read_names(proto.graph))
        for part in (proto.graph.initializer, proto.graph.input):
            tensors.refill(part, [item for item in part if item.name not in gone])
        stored = {name: item for name, item in self.stored.items() if name not in gone}
        external = any(item.external for item in self.stored.values())
        for name, array in new.items():
            array = np.asarray(array, order="C")  # numbers without axes stay so
            tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
            if array.dtype == ml_dtypes.int4:
                tensor.raw_data = numpy_helper.from_array(array).raw_data
            elif array.nbytes < tensors.LARGE:
                tensor.raw_data = array.tobytes()
            else:
                stored[name] = tensors.Stored(
                    array.nbytes, tuple(tensor.dims), array.dtype, external=external, array=array
                )
                tensors.mark(tensor, stored[name])
            proto.graph.initializer.append(tensor)
            if proto.ir_version < INITIALIZERS_ALONE:
                proto.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        return OnnxFile(self.path, proto, stored, self._read)

    def session(
        self, outputs: Iterable[str], inputs: Iterable[onnx.ValueInfoProto] | None = None, nodes: set[int] | None = None
    ) -> "Session":
        """An ONNX Runtime session that gives any tensors of the graph.

        Args:
            outputs: names of tensors.
            inputs: what is fed; the model's own inputs by default.
            nodes: positions of the nodes to keep; all by default.
        """
        proto = deepcopy(self.proto)
        graph = proto.graph
        if nodes is not None:
            tensors.refill(graph.node, [node for index, node in enumerate(graph.node) if index in nodes])
        if inputs is not None:
            tensors.refill(graph.value_info, ())
            tensors.refill(graph.input, inputs)
        known = {value.name: value for value in graph.output}
        wanted = list(dict.fromkeys(outputs))
        tensors.refill(graph.output, [known.get(name, onnx.ValueInfoProto(name=name)) for name in wanted])
        needed = _read_names(graph)
        tensors.refill(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])
        return Session(self, proto, wanted)

    def flaw(self) -> str:
        """What ``onnx.checker`` finds wrong, if anything; large tensors stand as inputs, so that none is read."""
        proto = deepcopy(self.proto)
        declared = {value.name for value in proto.graph.input}
        small = [tensor for tensor in proto.graph.initializer if tensor.name not in self.stored]
        for tensor in proto.graph.initializer:
            if tensor.name in self.stored and tensor.name not in declared:
                proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        tensors.refill(proto.graph.initializer, small)
        try:
            onnx.checker.check_model(proto, full_check=True)
        except Exception as error:
            return first_line(error)
        return ""

    def _chunks(self, beside_name: str) -> tuple[list[Chunk], list[Chunk]]:
        """What the model's file is made of, and the one beside it (nothing where no tensor is external), one piece after the other."""
        main, beside, at = list[Chunk](), list[Chunk](), 0
        graph = deepcopy(self.proto.graph)
        for tensor in graph.initializer:
            item = self.stored.get(tensor.name)
            if item is not None and item.external and item.length >= tensors.LARGE:
                gap = bytes(-at % (PAGE if item.length >= MANY else LINE))
                tensors.mark(tensor, item, beside_name, at + len(gap))
                beside += [gap, item]
                at += len(gap) + item.length
                item = None
            if item is None:
                content = tensor.SerializeToString()
                main.append(tensors.head(tensors.INITIALIZER, len(content)) + content)
            elif item.message is not None:
                main += [tensors.head(tensors.INITIALIZER, item.stored_length), item]
            else:
                bare = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
                content = bare.SerializeToString() + tensors.head(tensors.RAW_DATA, item.length)
                main += [tensors.head(tensors.INITIALIZER, len(content) + item.length) + content, item]
        del graph.initializer[:]
        before, after = tensors.around(graph.SerializeToString(), tensors.INITIALIZER)
        proto = deepcopy(self.proto)
        proto.ClearField("graph")
        first, last = tensors.around(proto.SerializeToString(), tensors.GRAPH)
        total = len(before) + _length(main) + len(after)
        beside += [tensors.OURS] if beside else []
        return [first + tensors.head(tensors.GRAPH, total) + before, *main, after + last], beside

    def size(self, name: str) -> int:
        """Bytes of the model's file of that name, and of the one beside it; nothing is written."""
        return sum(map(_length, self._chunks(f"{name}.data")))

    def write(self, path: Path) -> int:
        """Write the model, and what is external beside it as ``NAME.data``; the bytes of both. Only large tensors are external."""
        data = path.with_name(path.name + ".data")
        parts = self._chunks(data.name)
        for target, chunks in zip((path, data), parts, strict=True):
            if chunks:
                with open(target, "wb") as out:
                    for chunk in chunks:
                        tensors.copy(chunk, out) if isinstance(chunk, tensors.Stored) else out.write(chunk)
        return sum(map(_length, parts))

    @property
    def external(self) -> bool:
        """Whether tensors are kept in other files."""
        return any(item.external for item in self.stored.values())

    def places(self, path: str | Path, outputs: Outputs) -> tuple[Path, Path]:
        """Where the model and its external data would be written.

        Raises:
            SlrpropError: see :meth:`slrprop.files.Outputs.place`; or the model would not find its data from the link that is the path.
        """
        target = outputs.place(path, tensors.no_model)
        beside = target.with_name(target.name + ".data")
        if self.external:
            outputs.place(beside, tensors.no_data)
            if target.parent != Path(path).absolute().parent.resolve():
                raise SlrpropError(
                    f"'{path}' is a link to a file in another folder, where its external data would not be found; name '{target}'"
                )
        return target, beside

    def save(self, path: str | Path, check: Callable[["OnnxFile"], None]) -> None:
        """Write the model whole or not at all, external data (if there are any) beside it as ``NAME.data``.

        Args:
            check: called with the written file, read again, before it takes its place.
        """
        with together() as outputs, contextlib.ExitStack() as stack:
            target, beside = self.places(path, outputs)
            part = stack.enter_context(replacing(target, tensors.no_model))
            if self.external:
                stack.enter_context(replacing(beside, tensors.no_data))
            self.write(part)
            check(OnnxFile.open(part))


class Session:
    """An ONNX Runtime session on the CPU; large tensors stay where the :class:`OnnxFile` has them."""

    def __init__(self, file: OnnxFile, proto: ModelProto, outputs: list[str]) -> None:
        import onnxruntime
        import torch

        self.outputs = outputs
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # it would keep the most that any run took, for every session
        if not any(node.op_type == "DequantizeLinear" for node in proto.graph.node):  # their integer products need it
            options.add_session_config_entry("session.disable_prepacking", "1")  # it would copy every weight
        folder = file.path.resolve().parent
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._lent: dict[str, np.ndarray] = {}
        for tensor in proto.graph.initializer:
            item = file.stored.get(tensor.name)
            if item is not None and item.array is None and item.path.is_relative_to(folder):
                tensors.mark(tensor, item, str(item.path.relative_to(folder)), item.offset)  # the runtime maps the file
            elif item is not None:
                self._lent[tensor.name] = file.array(tensor.name)
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._lent.values()]
        with tensors.reading(file.path):
            options.add_external_initializers(list(self._lent), values)
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )

    def element_type(self, name: str) -> int:
        """The ONNX code of an output's element type."""
        kind = next(output.type for output in self._session.get_outputs() if output.name == name)
        if kind not in ELEMENT_TYPES:
            raise SlrpropError(f"tensor '{name}' holds {kind}, which slrprop can't cut the model at")
        return ELEMENT_TYPES[kind]

    def run(self, feed: Feed) -> dict[str, Any]:
        """The outputs by name."""
        return dict(zip(self.outputs, self._session.run(self.outputs, feed), strict=True))


def _length(chunks: Iterable[Chunk]) -> int:
    return sum(chunk.stored_length if isinstance(chunk, tensors.Stored) else len(chunk) for chunk in chunks)


def node_reads(node: onnx.NodeProto) -> list[str]:
    """The tensors a node reads, its subgraphs' included."""
    return [*filter(None, node.input), *(name for graph in tensors.graphs_of(node) for name in _read_names(graph))]


def _read_names(graph: GraphProto) -> set[str]:
    """All tensors that nodes or outputs of the graph read."""
    return {name for node in graph.node for name in node_reads(node)} | {value.name for value in graph.output}


def _drop_unread(graph: GraphProto, before: set[str]) -> None:
    """Take out nodes whose outputs were read ``before`` and are no longer: constants that a weight was made of."""
    reads = Counter(name for node in graph.node for name in set(node_reads(node)))
    reads.update(value.name for value in graph.output)
    kept = []
    for node in reversed(graph.node):
        if before.isdisjoint(node.output) or any(reads[name] > 0 for name in node.output if name):
            kept.append(deepcopy(node))
        else:
            reads.subtract(set(node_reads(node)))
    if len(kept) < len(graph.node):
        tensors.refill(graph.node, reversed(kept))
