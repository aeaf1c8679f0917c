"""The graph of an ONNX model: its constants, its layers, and what follows a tensor."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper

from slrprop.errors import SlrpropError
from slrprop.network.chain import ACTIVATIONS, Affine, Element, Linear, Path
from slrprop.network.onnx_constants import attribute, constants_of, standard, tensor_of
from slrprop.network.onnx_file import FLOATS, OnnxFile, Session, node_reads
from slrprop.network.onnx_places import Finder, Place
from slrprop.operators import MatMul

ACTIVATION_OPS = {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Erf", "Exp", "Max", "Min", "Clip", "Cast", "Identity"} | {
    *ACTIVATION_OPS
}  # fmt: skip
MAX_REGION = 16  # nodes that one activation may be made of
PROBE = np.linspace(-6, 6, 121)


class Graph:
    """Who makes and who reads each tensor, which tensors are constant, and which nodes are layers."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.nodes = list(file.proto.graph.node)
        self.reads = [node_reads(node) for node in self.nodes]
        self.maker: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.output:
                if name and self.maker.setdefault(name, index) != index:
                    raise SlrpropError(f"'{file.path}' is no valid graph: two nodes make tensor '{name}'")
            for name in dict.fromkeys(self.reads[index]):
                self.readers[name].append(index)
        self.outputs = {value.name for value in file.proto.graph.output}
        self.constants = constants_of(file)
        stored = {tensor.name for tensor in file.proto.graph.initializer}
        self.inputs = [value for value in file.proto.graph.input if value.name not in stored]
        self.main = self._main_output()
        self._ranks: dict[str, tuple[int, ...]] | None = None
        self.layers = Finder(self).places()
        self.by_index = {layer.index: name for name, layer in self.layers.items()}
        self.ending = self._ending()
        self.fingerprints: dict[str, str] = {}  # of layers' weights, those that were asked for

    def _main_output(self) -> str:
        """The tensor that quality is judged by: the output called ``logits``, or the first that holds real numbers."""
        outputs = list(self.file.proto.graph.output)
        outputs.sort(key=lambda value: value.name != "logits")
        for value in outputs:
            maker = self.nodes[self.maker[value.name]] if value.name in self.maker else NodeProto()
            kind = value.type.WhichOneof("value")
            real = kind in (None, "tensor_type") and value.type.tensor_type.elem_type in (0, *FLOATS)
            if maker.op_type == "ZipMap" or (real and maker.op_type == "Identity"):
                return maker.input[0]  # with class names, or another name for the same numbers
            if real:
                return value.name
        bfloat = any(value.type.tensor_type.elem_type == TensorProto.BFLOAT16 for value in outputs)
        told = " (bfloat16, which ONNX Runtime does not compute on the CPU: export it in float32)" if bfloat else ""
        raise SlrpropError(f"'{self.file.path}' has no output of real numbers to judge it by{told}")

    def classes(self) -> tuple[str, ...]:
        """The names or numbers of the classes in the order of the scores, where nodes of scikit-learn's models hold them."""
        stored = {tensor.name: tensor for tensor in self.file.proto.graph.initializer}
        keys = ("classlabels_strings", "classlabels_int64s", "classlabels_ints")
        found = [attribute(node, key, []) for node in self.nodes for key in keys]
        for node in self.nodes:
            if (
                node.op_type == "ArrayFeatureExtractor"
                and node.input[0] in stored
                and node.output[0] not in self.constants
            ):
                found.append(onnx.numpy_helper.to_array(stored[node.input[0]]).reshape(-1).tolist())
        names: list[Any] = next((labels for labels in found if labels), [])
        return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)

    def weight(self, layer: Place) -> np.ndarray:
        """The numbers that ``x`` is multiplied by (m x n), alpha included."""
        value = layer.matrix(self.constants[layer.weight].load())
        return value if layer.alpha == 1 else (value * np.asarray(layer.alpha, value.dtype))

    def bias(self, layer: Place) -> np.ndarray | None:
        """What is added (n,), beta included."""
        if layer.bias is None:
            return None
        value = self.constants[layer.bias].load().reshape(-1)
        value = np.broadcast_to(value, layer.shape[1:])
        return value if layer.beta == 1 else value * np.asarray(layer.beta, value.dtype)

    def tied(self) -> dict[str, tuple[str, ...]]:
        """For every layer, what else uses the numbers of its weight."""
        uses: dict[str, list[int]] = defaultdict(list)
        for name, constant in self.constants.items():
            if name in self.outputs:
                uses[constant.root].append(-1)
            uses[constant.root] += [i for i in self.readers[name] if self.nodes[i].output[0] not in self.constants]

        return {
            name: tuple(self.label(index) for index in uses[self.constants[layer.weight].root] if index != layer.index)
            for name, layer in self.layers.items()
        }

    def label(self, index: int) -> str:
        """What a node is called; -1 is an output of the model."""
        if index < 0:
            return "an output of the model"
        return self.by_index.get(index) or self.nodes[index].name or self.nodes[index].output[0]

    def rank(self, name: str) -> int | None:
        """How many axes a tensor has, where that can be known without data."""
        return len(self.sides(name)) or None

    def sides(self, name: str) -> tuple[int, ...]:
        """How long a tensor's axes are, 0 where that is open; none where nothing can be known without data."""
        if self._ranks is None:
            self._ranks = {}
            try:
                inferred = onnx.shape_inference.infer_shapes(self.file.proto).graph
            except Exception:  # what can't be inferred is unknown
                inferred = self.file.proto.graph
            for value in (*inferred.value_info, *inferred.input, *inferred.output):
                if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
                    self._ranks[value.name] = tuple(side.dim_value for side in value.type.tensor_type.shape.dim)
        return self._ranks.get(name, ())

    def after(self, names: set[str]) -> set[int]:
        """The nodes that depend on any of these tensors."""
        found: set[int] = set()
        reached = set(names)
        for index, node in enumerate(self.nodes):
            if not reached.isdisjoint(self.reads[index]):
                found.add(index)
                reached.update(node.output)
        return found

    def before(self, name: str) -> set[int]:
        """The nodes that a tensor depends on."""
        found: set[int] = set()
        open_names = [name]
        while open_names:
            index = self.maker.get(open_names.pop())
            if index is not None and index not in found:
                found.add(index)
                open_names += self.reads[index]
        return found

    def between(self, name: str) -> set[int]:
        """The nodes by which a tensor reaches the main output."""
        return self.after({name}) & self.before(self.main)

    def needs(self, nodes: Collection[int]) -> set[str]:
        """The tensors that some nodes read and none of them makes."""
        made = {name for index in nodes for name in self.nodes[index].output}
        return {name for index in nodes for name in self.reads[index]} - made

    def part(self, nodes: Collection[int], fed: Mapping[str, int], outputs: Collection[str]) -> Session:
        """Some nodes alone, with those that make the constants they read; ``fed`` are element types of tensors by name."""
        constant = {index for name in self.needs(nodes) - fed.keys() for index in self.before(name)}
        inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in fed.items()]
        return self.file.session(outputs, inputs, {*nodes, *constant})

    def feature_axis(self, index: int) -> int | None:
        """On which axis of its result a product of real numbers has its units; None for other nodes."""
        node = self.nodes[index]
        op = standard(node)
        if op in ("Conv", "ConvTranspose"):
            return 1
        return (-2 if op == "MatMul" and node.input[0] in self.constants else -1) if op in ("Gemm", "MatMul") else None

    def _ending(self) -> str | None:
        """``softmax`` or ``log_softmax`` where that makes the main output; ``ends_last`` tells whether over the last axis."""
        node = self.nodes[self.maker[self.main]] if self.main in self.maker else None
        kind = {"Softmax": "softmax", "LogSoftmax": "log_softmax"}.get(standard(node)) if node is not None else None
        if node is None or kind is None:
            return None
        axis = attribute(node, "axis", -1 if self.file.opset >= 13 else 1)
        self.ends_last = axis == -1 or axis + 1 == self.rank(self.main)
        return kind

    def follow(self, layer: Place) -> Path:
        """What happens to a layer's output, as long as it is element-wise or dense and its only use.

        The dense layers on the path are named; their numbers are not read (see :meth:`linear`).
        """
        elements: list[Element] = []
        private, maps = True, not isinstance(layer.operator, MatMul)
        tensor, width, flat = layer.y, layer.shape[1], standard(self.nodes[layer.index]) == "Gemm"
        for _ in self.nodes:  # a path is not longer, unless a broken graph goes in circles
            if tensor == self.main:
                return Path(elements, True, private)
            private = private and (tensor not in self.outputs or any(isinstance(e, Linear) for e in elements))
            readers = self.readers[tensor]
            if len(readers) == 1:
                node, name = self.nodes[readers[0]], self.by_index.get(readers[0])
                if self.ending and self.maker[self.main] == readers[0]:
                    return Path(elements, self.ends_last, private)
                dense = name is not None and not maps and isinstance(self.layers[name].operator, MatMul)
                if name is not None and dense and self.layers[name].x == tensor and self.layers[name].shape[0] == width:
                    if self.layers[name].trans_a:
                        break
                    m, n = self.layers[name].shape
                    elements.append(Linear(torch.empty(m, n, device="meta"), torch.empty(n, device="meta"), name))
                    tensor, width = self.layers[name].y, self.layers[name].shape[1]
                    continue
                found = self._element(node, tensor, width, flat, maps)
                if found is not None:
                    elements += [found] if found != "same" else []
                    private = private and (not self._sized(node) or any(isinstance(e, Linear) for e in elements))
                    tensor = node.output[0]
                    continue
            region = self._activation(tensor)
            if region is None:
                break
            elements.append(region[0])
            tensor = region[1]
        return Path(elements, False, private)

    def _sized(self, node: NodeProto) -> bool:
        """Whether a node that changes nothing holds the number of features."""
        return standard(node) == "Reshape" and self.constants[node.input[1]].load().tolist() != [0, -1]

    def linear(self, name: str) -> Linear:
        """A layer as an element of a path, its numbers read."""
        layer = self.layers[name]
        weight, bias = tensor_of(self.weight(layer)), self.bias(layer)
        return Linear(weight, weight.new_zeros(layer.shape[1]) if bias is None else tensor_of(bias), name)

    def _element(self, node: NodeProto, tensor: str, width: int, flat: bool, maps: bool) -> Element | None:
        """The node as an element, ``"same"`` where it changes nothing, None where it is neither."""
        op = standard(node)
        if not node.input or node.input[0] != tensor:
            return None
        if op in ACTIVATION_OPS:
            return ACTIVATION_OPS[op]
        if op == "Gelu":
            return "gelu_tanh" if attribute(node, "approximate", b"none") == b"tanh" else "gelu"
        if op == "Identity":
            return "same"
        if op == "Dropout":
            training = node.input[2] if len(node.input) > 2 else ""
            off = not training or (training in self.constants and not self.constants[training].load().any())
            return "same" if off and not any(self.readers[name] for name in node.output[1:]) else None
        two_axes = flat or self.rank(tensor) == 2
        if op == "Flatten" and two_axes and attribute(node, "axis", 1) == 1:
            return "same"
        if op == "Reshape" and two_axes and len(node.input) > 1 and node.input[1] in self.constants:
            return (
                "same" if self.constants[node.input[1]].load().tolist() in ([-1, width], [0, width], [0, -1]) else None
            )
        return self.affine(node) if two_axes or maps else None

    def affine(self, node: NodeProto) -> Affine | None:
        """What a batch norm of constants computes of each feature on axis 1; None for other nodes."""
        if standard(node) != "BatchNormalization" or len(node.input) != 5 or len(node.output) > 1:
            return None
        if attribute(node, "training_mode", 0) or any(name not in self.constants for name in node.input[1:]):
            return None
        gain, shift, mean, var = (tensor_of(self.constants[name].load()) for name in node.input[1:])
        scale = gain * (var + attribute(node, "epsilon", 1e-5)).rsqrt()
        return Affine(scale, shift - mean * scale)

    def _activation(self, start: str) -> tuple[str, str] | None:
        """An activation that is written as several element-wise nodes of one tensor, and the tensor it gives.

        Recognised by its values: whatever the nodes are, they are compared with the known functions on [-6, 6].
        """
        region: list[int] = []
        inside = {start}
        for index in sorted(self.after({start})):
            node = self.nodes[index]
            numbers = [name for name in node.input if name and name not in inside]
            scalar = all(
                name in self.constants and np.prod(self.constants[name].shape, dtype=object) == 1 for name in numbers
            )
            if standard(node) not in ELEMENTWISE or not scalar or len(region) == MAX_REGION:
                if inside.isdisjoint(self.reads[index]):
                    continue
                return None
            region.append(index)
            inside.update(node.output)
            end = node.output[0]
            closed = all(set(self.readers[name]) <= set(region) and name not in self.outputs for name in inside - {end})
            if closed:
                name = self._named(start, end, region)
                if name is not None:
                    return name, end
        return None

    def _named(self, start: str, end: str, region: list[int]) -> str | None:
        dtype = next(
            (c.dtype for i in region for name in self.nodes[i].input if (c := self.constants.get(name)) is not None),
            np.dtype(np.float32),
        )
        if dtype not in FLOATS.values():
            return None
        probe = PROBE.astype(dtype)[:, None]
        try:
            got = self.part(region, {start: helper.np_dtype_to_tensor_dtype(dtype)}, [end]).run({start: probe})[end]
        except Exception:  # not what it looked like
            return None
        tolerance = 1e-5 if dtype != np.float16 else 1e-2
        for name, function in ACTIVATIONS.items():
            want = function(torch.from_numpy(probe).double()).numpy()
            if name != "identity" and got.shape == want.shape and np.allclose(got, want, tolerance, tolerance):
                return name
        return None
