"""What follows dense layers in an ONNX graph as torch operations, for gradients alone.

ONNX Runtime gives the tensors that are made before; the nodes behind are computed here, one torch operation or two each. A layer
before a node that is not in ``OPS`` has no gradient; in a graph whose output is not that of ONNX Runtime none has one.
"""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto
from torch import Tensor
from torch.nn import functional

from slrprop.network.onnx.constants import attribute, standard, tensor_of
from slrprop.network.onnx.places import Place, same
from slrprop.operators.convolution import CONVOLVED, TRANSPOSED

if TYPE_CHECKING:
    from slrprop.network.onnx.graph import Graph

MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
Values = list[Tensor | None]
Op = Callable[[NodeProto, Any], Any]  # (node, inputs) -> output, or a list of several
KINDS = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float32, TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool,
}  # fmt: skip


def _axes(node: NodeProto, x: Values) -> list[int] | None:
    """Axes as an input (later operator sets) or as an attribute."""
    given = x[1] if len(x) > 1 else None
    return attribute(node, "axes") if given is None else given.tolist()


def _reduced(function: Callable[..., Tensor]) -> Op:
    def run(node: NodeProto, x: Values) -> Tensor:
        axes, value = _axes(node, x), x[0]
        assert value is not None
        return function(value, list(range(value.ndim)) if axes is None else axes, bool(attribute(node, "keepdims", 1)))

    return run


def _gemm(node: NodeProto, x: Any) -> Tensor:
    a = x[0].T if attribute(node, "transA", 0) else x[0]
    b = x[1].T if attribute(node, "transB", 0) else x[1]
    y = attribute(node, "alpha", 1.0) * (a @ b)
    return y + attribute(node, "beta", 1.0) * x[2] if len(x) > 2 and x[2] is not None else y


def _reshape(node: NodeProto, x: Any) -> Tensor:
    keeps = not attribute(node, "allowzero", 0)
    return x[0].reshape([x[0].shape[i] if side == 0 and keeps else side for i, side in enumerate(x[1].tolist())])


def _squeeze(node: NodeProto, x: Any) -> Tensor:
    axes = _axes(node, x)
    return x[0].squeeze() if axes is None else x[0].squeeze(tuple(axes))


def _unsqueeze(node: NodeProto, x: Any) -> Tensor:
    axes, y = _axes(node, x) or [], x[0]
    rank = y.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        y = y.unsqueeze(axis)
    return y


def _slice(node: NodeProto, x: Any) -> Tensor:
    if len(x) > 1:
        starts, ends = x[1].tolist(), x[2].tolist()
        axes, steps = (x[i].tolist() if len(x) > i and x[i] is not None else None for i in (3, 4))
    else:
        starts, ends, axes, steps = attribute(node, "starts"), attribute(node, "ends"), attribute(node, "axes"), None
    y = x[0]
    for start, end, axis, step in zip(
        starts, ends, axes or range(len(starts)), steps or [1] * len(starts), strict=True
    ):
        size = y.shape[axis]
        stop = None if step < 0 and end < -size else max(end, -1 - size)  # backwards, below the first means all
        y = y.index_select(axis, torch.tensor(list(range(size)[start:stop:step]), dtype=torch.int64))
    return y


def _split(node: NodeProto, x: Any) -> list[Tensor]:
    axis = attribute(node, "axis", 0)
    sizes = attribute(node, "split") if len(x) < 2 or x[1] is None else x[1].tolist()
    count = len(node.output)
    return list(x[0].split(-(-x[0].shape[axis] // count) if sizes is None else sizes, axis))


def _gather(node: NodeProto, x: Any) -> Tensor:
    axis, places = attribute(node, "axis", 0) % x[0].ndim, x[1].long() % x[0].shape[attribute(node, "axis", 0)]
    found = x[0].index_select(axis, places.flatten())
    return found.reshape(*x[0].shape[:axis], *places.shape, *x[0].shape[axis + 1 :])


def _layer_norm(node: NodeProto, x: Any) -> Tensor:
    axis = attribute(node, "axis", -1) % x[0].ndim
    bias = x[2] if len(x) > 2 else None
    return functional.layer_norm(x[0], x[0].shape[axis:], x[1], bias, attribute(node, "epsilon", 1e-5))


def _sides(node: NodeProto, name: str, count: int, default: int) -> list[int]:
    return list(attribute(node, name, [default] * count))


def _pads(node: NodeProto, x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    """Zeros as ``torch.nn.functional.pad`` takes them: the last axis first."""
    count, how = len(kernel), attribute(node, "auto_pad", b"NOTSET").decode()
    if how in ("NOTSET", "VALID"):
        pads = _sides(node, "pads", 2 * count, 0) if how == "NOTSET" else [0] * 2 * count
        pairs = list(zip(pads[:count], pads[count:], strict=True))
    else:
        axes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
        pairs = [same(*axis, how == "SAME_UPPER") for axis in axes]
    return [side for pair in reversed(pairs) for side in pair]


def _conv(node: NodeProto, x: Any) -> Tensor:
    count, kernel = x[1].ndim - 2, list(x[1].shape[2:])
    stride, dilation = _sides(node, "strides", count, 1), _sides(node, "dilations", count, 1)
    padded = functional.pad(x[0], _pads(node, x[0], kernel, stride, dilation))
    bias = x[2] if len(x) > 2 else None
    return CONVOLVED[count](padded, x[1], bias, stride, 0, dilation, attribute(node, "group", 1))


def _conv_transpose(node: NodeProto, x: Any) -> Tensor:
    count, bias = x[1].ndim - 2, x[2] if len(x) > 2 else None
    stride, dilation, wider = _sides(node, "strides", count, 1), _sides(node, "dilations", count, 1), _sides(node, "output_padding", count, 0)  # fmt: skip
    y = TRANSPOSED[count](x[0], x[1], bias, stride, 0, wider, attribute(node, "group", 1), dilation)
    pads = _sides(node, "pads", 2 * count, 0)
    return functional.pad(y, [-side for axis in reversed(range(count)) for side in (pads[axis], pads[count + axis])])


def _pool(node: NodeProto, x: Any) -> Tensor:
    """Average and maximum over windows; padding never counts as a number of the map unless the node says so."""
    kernel = list(attribute(node, "kernel_shape"))
    count = len(kernel)
    stride, dilation = _sides(node, "strides", count, 1), _sides(node, "dilations", count, 1)
    pads = _pads(node, x[0], kernel, stride, dilation)
    if standard(node) == "MaxPool":
        padded = functional.pad(x[0], pads, value=-math.inf)
        return MAX_POOLS[count](padded, kernel, stride, 0, dilation, bool(attribute(node, "ceil_mode", 0)))
    rounded_up = bool(attribute(node, "ceil_mode", 0))
    mean = AVERAGE_POOLS[count](functional.pad(x[0], pads), kernel, stride, 0, rounded_up)
    if attribute(node, "count_include_pad", 0) or not any(pads):
        return mean
    return mean / AVERAGE_POOLS[count](functional.pad(torch.ones_like(x[0]), pads), kernel, stride, 0, rounded_up)


def _pad(node: NodeProto, x: Any) -> Tensor:
    pads = attribute(node, "pads") if len(x) < 2 else x[1].tolist()
    value = attribute(node, "value", 0.0) if len(x) < 3 or x[2] is None else float(x[2])
    axes = x[3].tolist() if len(x) > 3 and x[3] is not None else list(range(x[0].ndim))
    around = [[0, 0] for _ in range(x[0].ndim)]
    for place, axis in enumerate(axes):
        around[axis] = [pads[place], pads[len(axes) + place]]
    mode = {"reflect": "reflect", "edge": "replicate"}.get(attribute(node, "mode", b"constant").decode(), "constant")
    if mode == "constant":
        return functional.pad(x[0], [side for pair in reversed(around) for side in pair], value=value)
    return functional.pad(x[0], [side for pair in reversed(around[2:]) for side in pair], mode=mode)


def _resize(node: NodeProto, x: Any) -> Tensor:
    """To the nearest number or by lines between them; other ways give other numbers than ONNX Runtime's, which is noticed."""
    scales: Any = x[-1] if len(x) == 2 else x[2] if len(x) > 2 else None
    given = x[3].tolist()[2:] if len(x) > 3 and x[3] is not None else None
    sides = given or [int(side * scale) for side, scale in zip(x[0].shape[2:], scales.tolist()[2:], strict=True)]
    linear = attribute(node, "mode", b"nearest").decode() == "linear"
    how = attribute(node, "coordinate_transformation_mode", b"half_pixel").decode()
    names = {1: "linear", 2: "bilinear", 3: "trilinear"}
    if linear:
        return functional.interpolate(x[0], sides, mode=names[len(sides)], align_corners=how == "align_corners")
    return functional.interpolate(x[0], sides, mode="nearest")


def _depth_to_space(node: NodeProto, x: Any) -> Tensor:
    size = attribute(node, "blocksize")
    if attribute(node, "mode", b"DCR") == b"CRD":
        return functional.pixel_shuffle(x[0], size)
    n, c, h, w = x[0].shape
    y = x[0].reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // size**2, h * size, w * size)


def _instance_norm(node: NodeProto, x: Any) -> Tensor:
    return functional.instance_norm(x[0], weight=x[1], bias=x[2], eps=attribute(node, "epsilon", 1e-5))


def _clip(node: NodeProto, x: Any) -> Tensor:
    low, high = (
        x[i] if len(x) > i and x[i] is not None else attribute(node, key) for i, key in ((1, "min"), (2, "max"))
    )
    y = x[0] if low is None else x[0].clamp_min(low)
    return y if high is None else y.clamp_max(high)


def _softmax(function: Callable[..., Tensor]) -> Op:
    return lambda node, x: function(x[0], attribute(node, "axis", -1))


def _plain(function: Callable[..., Tensor]) -> Op:
    return lambda node, x: function(*x)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    def run(node: NodeProto, x: Any) -> Tensor:
        y = x[0]
        for other in x[1:]:
            y = function(y, other)
        return y

    return run


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _expanded(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


PLAIN: dict[str, Callable[..., Tensor]] = {  # of the inputs alone
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Ceil": torch.ceil, "Cos": torch.cos, "Div": _divided,
    "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Expand": _expanded, "Softsign": functional.softsign,
    "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Identity": lambda x: x, "Less": torch.lt,
    "LessOrEqual": torch.le, "Log": torch.log, "MatMul": torch.matmul, "Mul": torch.mul, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "Pow": lambda x, y: x.pow(y.to(x)), "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Softplus": functional.softplus, "Sqrt": torch.sqrt,
    "Sub": torch.sub, "Tanh": torch.tanh, "Where": torch.where, "HardSwish": functional.hardswish, "Mish": functional.mish,
}  # fmt: skip
OPS: dict[str, Op] = {
    **{op: _plain(function) for op, function in PLAIN.items()},
    "AveragePool": _pool,
    "BatchNormalization": lambda node, x: functional.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=attribute(node, "epsilon", 1e-5)),
    "Cast": lambda node, x: x[0].to(KINDS[attribute(node, "to")]),
    "Celu": lambda node, x: functional.celu(x[0], attribute(node, "alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda node, x: torch.cat(x, attribute(node, "axis")),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Dropout": lambda node, x: x[0],
    "Elu": lambda node, x: functional.elu(x[0], attribute(node, "alpha", 1.0)),
    "Flatten": lambda node, x: x[0].reshape(math.prod(x[0].shape[: attribute(node, "axis", 1)]), -1),
    "Gather": _gather,
    "Gelu": lambda node, x: functional.gelu(x[0], approximate=attribute(node, "approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda node, x: x[0].mean(list(range(2, x[0].ndim)), keepdim=True),
    "GlobalMaxPool": lambda node, x: x[0].amax(list(range(2, x[0].ndim)), keepdim=True),
    "HardSigmoid": lambda node, x: (attribute(node, "alpha", 0.2) * x[0] + attribute(node, "beta", 0.5)).clamp(0, 1),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda node, x: functional.leaky_relu(x[0], attribute(node, "alpha", 0.01)),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Max": _folded(torch.maximum),
    "MaxPool": _pool,
    "Min": _folded(torch.minimum),
    "PRelu": lambda node, x: torch.where(x[0] >= 0, x[0], x[1] * x[0]),
    "Pad": _pad,
    "ReduceL2": _reduced(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": lambda node, x: attribute(node, "gamma", 1.050701) * functional.elu(x[0], attribute(node, "alpha", 1.673263)),
    "Shape": lambda node, x: torch.tensor(x[0].shape[attribute(node, "start", 0) : attribute(node, "end")], dtype=torch.int64),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _folded(torch.add),
    "Transpose": lambda node, x: x[0].permute(attribute(node, "perm", tuple(range(x[0].ndim))[::-1])),
    "Unsqueeze": _unsqueeze,
}  # fmt: skip


def _computable(node: NodeProto, opset: int) -> bool:
    """Whether a node can be computed here: inference alone, no output that only training has."""
    op = standard(node)
    if op not in OPS or attribute(node, "noop_with_empty_axes", 0):
        return False
    if op in ("Softmax", "LogSoftmax"):
        return opset >= 13  # before, all later axes were one
    if op == "Dropout":
        return len(node.output) == 1 and len(node.input) < 3
    if op == "MaxPool":
        return len(node.output) == 1 and not attribute(node, "storage_order", 0)
    if op == "ConvTranspose":
        return not attribute(node, "output_shape", None) and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    if op in ("BatchNormalization", "LayerNormalization"):
        return len(node.output) == 1 and not attribute(node, "training_mode", 0)
    return True


def foreign_nodes(graph: "Graph") -> list[str]:
    """The operators on the way from the inputs to the main output that can't be computed here, each once."""
    varying = graph.after({value.name for value in graph.inputs}) & graph.before(graph.main)
    nodes = (graph.nodes[index] for index in sorted(varying))
    return list(dict.fromkeys(node.op_type for node in nodes if not _computable(node, graph.file.opset)))


class Behind:
    """The nodes from tensors (by name, like dense layers' outputs) to the main output, of those behind which there is an operation for each.

    ``watched`` are these tensors and their names, ``reads`` the tensors that are to come from ONNX Runtime. ``ops`` computes the nodes.
    """

    def __init__(self, graph: "Graph", tensors: Mapping[str, str], ops: Mapping[str, Op] = OPS) -> None:
        self._ops = ops
        self.main, leading = graph.main, graph.before(graph.main)
        foreign = {index for index in leading if not _computable(graph.nodes[index], graph.file.opset)}
        behind = {name: graph.after({tensor}) & leading for name, tensor in tensors.items()}
        self.watched = {tensors[name]: name for name, nodes in behind.items() if not nodes & foreign}
        chosen = set[int]().union(*(behind[name] for name in self.watched.values()))
        self._nodes = [(index, graph.nodes[index]) for index in sorted(chosen)]
        made = {name for _, node in self._nodes for name in node.output}
        read = {name for _, node in self._nodes for name in node.input if name} | {self.main, *self.watched}
        self._constants = {name: graph.constants[name] for name in read - made if name in graph.constants}
        self.reads = read - made - self._constants.keys()

    @cached_property
    def _loaded(self) -> dict[str, Tensor]:
        return {name: tensor_of(value.load()) for name, value in self._constants.items()}

    def forward(self, given: Mapping[str, Tensor], layers: Mapping[Place, Callable[[Tensor], Tensor]]) -> Tensor:
        """The main output for the model's inputs, differentiable in what stands in the place of layers."""
        return self._computed(given, layers, lambda name, value: value)

    def run(self, given: Mapping[str, np.ndarray]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The main output, and the watched tensors, which its gradient can be asked for; None where an operation takes other values here."""
        seen: dict[str, Tensor] = {}

        def watched(name: str, value: Tensor) -> Tensor:
            if name in self.watched:
                value = seen[self.watched[name]] = value if value.requires_grad else value.detach().requires_grad_()
            return value

        try:
            with torch.enable_grad():
                return self._computed({name: tensor_of(given[name]) for name in self.reads}, {}, watched), seen
        except (RuntimeError, TypeError, ValueError, LookupError):
            return None

    def _computed(
        self,
        given: Mapping[str, Tensor],
        layers: Mapping[Place, Callable[[Tensor], Tensor]],
        handed_on: Callable[[str, Tensor], Tensor],
    ) -> Tensor:
        """The main output; what is read of each tensor is what ``handed_on`` makes of it."""
        values: dict[str, Any] = self._loaded | {name: handed_on(name, value) for name, value in given.items()}
        inside = {place.index: (place, layer) for place, layer in layers.items()}
        adders = {place.adder for place in layers} - inside.keys()
        for index, node in self._nodes:
            if index in adders:  # the layer has the bias
                continue
            if index in inside:
                place, layer = inside[index]
                x = values[place.x]
                made = {place.y: layer(x.T if place.trans_a else x)}
            else:
                result = self._ops[standard(node)](node, [values[name] if name else None for name in node.input])
                made = dict(zip(node.output, result if isinstance(result, list) else [result], strict=False))
            values |= {name: handed_on(name, value) for name, value in made.items()}
        output: Tensor = values[self.main]
        return output
