"""The graph of an ONNX model: its constants, its layers, and what follows a tensor."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from slrprop.errors import SlrpropError
from slrprop.network.layer import Contents
from slrprop.network.onnx.census import elsewhere
from slrprop.network.onnx.constants import attribute, constants_of, standard, tensor_of
from slrprop.network.onnx.file import FLOATS, OnnxFile, Session, node_reads
from slrprop.network.onnx.places import Finder, Place

if TYPE_CHECKING:
    from slrprop.network.chain import Affine, Element, Linear, Path, Walk

ACTIVATION_OPS = {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
POOLS = {"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"}
ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Erf", "Exp", "Max", "Min", "Clip", "Cast", "Identity", "Gelu", "Abs", "LeakyRelu",
    "Elu", "Selu", "Celu", "Mish", "HardSigmoid", "HardSwish", "Softplus", "Softsign", *ACTIVATION_OPS,
}  # fmt: skip
MAX_REGION = 16  # nodes that one activation may be made of


class Graph(Contents):
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
        found = Finder(self).places()
        self.by_index = {layer.index: name for name, layer in found.items()}
        self.layers = self._tied(found)
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

    def _tied(self, layers: dict[str, Place]) -> dict[str, Place]:
        """The layers, told what else uses the numbers of their weights."""
        uses: dict[str, list[int]] = defaultdict(list)
        for name, constant in self.constants.items():
            if name in self.outputs:
                uses[constant.root].append(-1)
            uses[constant.root] += [i for i in self.readers[name] if self.nodes[i].output[0] not in self.constants]

        def others(layer: Place) -> tuple[str, ...]:
            return tuple(self.label(i) for i in uses[self.constants[layer.weight].root] if i != layer.index)

        return {name: replace(layer, tied=others(layer)) for name, layer in layers.items()}

    def itemsize(self, name: str) -> int:
        return self.constants[self.layers[name].weight].dtype.itemsize

    def elsewhere(self) -> Mapping[str, int]:
        weights = {self.constants[layer.weight].root for layer in self.layers.values()}
        return elsewhere(self.file.proto.graph, weights)

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

    def follow(self, layer: Place) -> "Path":
        """What happens to a layer's output, as long as each channel goes its own way, or is read by a layer, and has no other use.

        The layers on the path are named; their numbers are not read.
        """
        import torch

        from slrprop.network.chain import Linear, Walk

        walk, tensor = Walk(layer.shape[1], bool(layer.operator.kernel)), layer.y
        flat, axes = standard(self.nodes[layer.index]) == "Gemm", 1 - layer.operator.axis
        for _ in self.nodes:  # a path is not longer, unless a broken graph goes in circles
            if tensor == self.main:
                return walk.end(True)
            if walk.ended:
                break
            if tensor in self.outputs:
                walk.hold("the network returns what it makes")
            readers = self.readers[tensor]
            told = f"what it makes has {len(readers)} uses" if len(readers) > 1 else "no layer reads its outputs"
            if len(readers) == 1:
                node, name = self.nodes[readers[0]], self.by_index.get(readers[0], "")
                told = f"'{node.op_type}' stands behind it"
                if self.ending and self.maker[self.main] == readers[0]:
                    return walk.end(self.ends_last)
                reader = self.layers.get(name)
                if reader is not None and self._reads(reader, tensor, walk):
                    m, n = reader.shape
                    walk.take(Linear(torch.empty(m, n, device="meta"), torch.empty(n, device="meta"), name))
                    tensor = reader.y
                    continue
                found = self._over_maps(node, tensor, walk, axes) if walk.maps else None
                found = found or self._element(node, tensor, walk, flat)
                if found is not None:
                    walk.take(found)
                    tensor = node.output[0]
                    continue
            region = self._activation(tensor)
            if region is None:
                return walk.end(False, told)
            walk.take(region[0])
            tensor = region[1]
        return walk.end(False)

    def _reads(self, reader: Place, tensor: str, walk: "Walk") -> bool:
        """Whether a layer reads the channels of a tensor, each in as many rows."""
        over_maps, grouped = bool(reader.operator.kernel), bool(reader.operator.bits_only)
        fits = over_maps == walk.maps and (grouped or reader.shape[0] % walk.width == 0)
        return fits and reader.x == tensor and not reader.trans_a

    def _over_maps(self, node: NodeProto, tensor: str, walk: "Walk", axes: int) -> "Element | None":
        """The node as an element of maps of so many axes, where it goes over the places of a map, or lays them one after the other."""
        op, sides = standard(node), self.sides(tensor)
        if op not in POOLS | {"Flatten", "ReduceMean", "Reshape"} or node.input[0] != tensor or len(node.output) > 1:
            return None
        second = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        target = [] if second is None else second.load().tolist()
        if op == "ReduceMean":
            along = attribute(node, "axes", target)
            walk.maps = bool(attribute(node, "keepdims", 1))
            return op if along and all(axis % axes > 1 for axis in along) else None
        if op == "Reshape":
            places = math.prod(sides[1:]) if len(sides) == axes else 0
            if len(target) != 2 or not (target[0] in (0, *sides[:1]) or (target[0] == -1 and target[1] == places > 0)):
                return None
            if target[1] != -1:
                walk.carry(node.output[0])
        elif op in POOLS or attribute(node, "axis", 1) != 1:
            return op if op in POOLS else None
        walk.maps = False
        return "same"

    def foldable(self, layer: Place) -> bool:
        """Whether a batch norm can be put into a layer: numbers of half precision would be rounded anew."""
        return self.constants[layer.weight].dtype != np.float16

    def linear(self, name: str) -> "Linear":
        """A layer as an element of a path, its numbers read."""
        from slrprop.network.chain import Linear

        layer = self.layers[name]
        weight, bias = tensor_of(self.weight(layer)), self.bias(layer)
        return Linear(weight, weight.new_zeros(layer.shape[1]) if bias is None else tensor_of(bias), name)

    def _element(self, node: NodeProto, tensor: str, walk: "Walk", flat: bool) -> "Element | None":
        """The node as an element, ``"same"`` where it changes nothing, None where it is neither."""
        op = standard(node)
        if not node.input or node.input[0] != tensor:
            return None
        if op in ACTIVATION_OPS:
            return ACTIVATION_OPS[op]
        if op == "Identity":
            return "same"
        if op == "Dropout":
            training = node.input[2] if len(node.input) > 2 else ""
            off = not training or (training in self.constants and not self.constants[training].load().any())
            return "same" if off and not any(self.readers[name] for name in node.output[1:]) else None
        two_axes = flat or (walk.from_maps and not walk.maps) or self.rank(tensor) == 2
        if op == "Flatten" and two_axes and attribute(node, "axis", 1) == 1:
            return "same"
        if op == "Reshape" and two_axes and len(node.input) > 1 and node.input[1] in self.constants:
            sides, width = self.constants[node.input[1]].load().tolist(), walk.width
            if sides not in ([-1, width], [0, width], [0, -1]):
                return None
            if sides[1] != -1:
                walk.carry(node.output[0])
            return "same"
        affine = self.affine(node) if two_axes or walk.maps else None
        name = node.output[0] if affine is not None and affine.scale.numel() == walk.width and not walk.stop else None
        return None if affine is None else replace(affine, name=name)

    def affine(self, node: NodeProto) -> "Affine | None":
        """What a batch norm of constants computes of each feature on axis 1; None for other nodes."""
        if standard(node) != "BatchNormalization" or len(node.input) != 5 or len(node.output) > 1:
            return None
        if attribute(node, "training_mode", 0) or any(name not in self.constants for name in node.input[1:]):
            return None
        from slrprop.network.chain import Affine

        gain, shift, mean, var = (tensor_of(self.constants[name].load()) for name in node.input[1:])
        return Affine.of(mean, var, attribute(node, "epsilon", 1e-5), gain, shift)

    def _activation(self, start: str) -> tuple[str, str] | None:
        """An activation that is written as several element-wise nodes of one tensor, and the tensor it gives.

        Recognised by its values: whatever the nodes are, they are compared with the known functions on [-6, 6]; an unknown one is
        called ``element-wise``.
        """
        region: list[int] = []
        unknown: tuple[str, str] | None = None
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
                return unknown
            region.append(index)
            inside.update(node.output)
            end = node.output[0]
            closed = all(set(self.readers[name]) <= set(region) and name not in self.outputs for name in inside - {end})
            if closed:
                name = self._named(start, end, region)
                if name is not None:
                    return name, end
                unknown = "element-wise", end
        return unknown

    def _named(self, start: str, end: str, region: list[int]) -> str | None:
        import torch

        from slrprop.network.chain import ACTIVATIONS
        from slrprop.network.onnx.gradients import OPS

        probe = torch.linspace(-6, 6, 121, dtype=torch.float64)[:, None]
        values, tolerance = {start: probe}, 1e-5
        try:
            for node in (self.nodes[index] for index in region):
                numbers = {name: self.constants[name] for name in node.input if name in self.constants}
                tolerance = max(tolerance, *(1e-2 * (number.dtype == np.float16) for number in numbers.values()), 0)
                known = values | {name: tensor_of(number.load()) for name, number in numbers.items()}
                values[node.output[0]] = OPS[standard(node)](
                    node, *(known[name] if name else None for name in node.input)
                )
        except (RuntimeError, TypeError, ValueError, LookupError):  # not what it looked like
            return None
        for name, function in ACTIVATIONS.items():
            got, want = values[end].double(), function(probe)
            if name != "identity" and got.shape == want.shape and torch.allclose(got, want, tolerance, tolerance):
                return name
        return None
