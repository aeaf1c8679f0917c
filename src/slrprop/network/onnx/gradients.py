"""What follows dense layers in an ONNX graph as torch operations, for gradients alone.

ONNX Runtime gives the tensors that are made before; the nodes behind are computed here, one torch operation or two each. A layer
before a node that is not in ``OPS`` has no gradient; in a graph whose output is not that of ONNX Runtime none has one.
"""

import functools
import itertools
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
Op = Callable[..., Any]  # (node, *inputs) -> output, or a list of several; an input that is left out is None
KINDS = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float32, TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool,
}  # fmt: skip


def _given(node: NodeProto, name: str, value: Tensor | None, default: Any = None) -> Any:
    """Numbers as an input (later operator sets) or as an attribute."""
    return attribute(node, name, default) if value is None else value.tolist()


def _unsqueeze(node: NodeProto, x: Tensor, axes: Tensor | None = None) -> Tensor:
    places = _given(node, "axes", axes)
    for axis in sorted(axis % (x.ndim + len(places)) for axis in places):
        x = x.unsqueeze(axis)
    return x


def _slice(node: NodeProto, x: Tensor, *given: Tensor | None) -> Tensor:
    names = ("starts", "ends", "axes", "steps")
    found = [_given(node, name, value) for name, value in itertools.zip_longest(names, given)]
    starts, ends, axes, steps = found[0], found[1], found[2] or range(x.ndim), found[3] or itertools.repeat(1)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=False):
        size = x.shape[axis]
        stop = None if step < 0 and end < -size else max(end, -1 - size)  # backwards, below the first means all
        x = x.index_select(axis, torch.tensor(list(range(size)[start:stop:step]), dtype=torch.int64))
    return x


def _split(node: NodeProto, x: Tensor, given: Tensor | None = None) -> list[Tensor]:
    axis = attribute(node, "axis", 0)
    return list(x.split(_given(node, "split", given) or -(-x.shape[axis] // len(node.output)), axis))


def _gather(node: NodeProto, x: Tensor, index: Tensor) -> Tensor:
    axis = attribute(node, "axis", 0) % x.ndim
    places = index.long() % x.shape[axis]
    return x.index_select(axis, places.flatten()).reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _sides(node: NodeProto, count: int) -> tuple[list[int], list[int]]:
    """Strides and dilations."""
    return attribute(node, "strides", [1] * count), attribute(node, "dilations", [1] * count)


def _pads(node: NodeProto, x: Tensor, kernel: list[int]) -> list[int]:
    """Zeros as ``torch.nn.functional.pad`` takes them: the last axis first."""
    count, how = len(kernel), attribute(node, "auto_pad", b"NOTSET").decode()
    if how in ("NOTSET", "VALID"):
        pads = attribute(node, "pads", [0] * 2 * count) if how == "NOTSET" else [0] * 2 * count
        pairs = list(zip(pads[:count], pads[count:], strict=True))
    else:
        axes = zip(x.shape[2:], kernel, *_sides(node, count), strict=True)
        pairs = [same(*axis, how == "SAME_UPPER") for axis in axes]
    return [side for pair in reversed(pairs) for side in pair]


def _conv(node: NodeProto, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    (stride, dilation), padded = _sides(node, len(kernel)), functional.pad(x, _pads(node, x, kernel))
    return CONVOLVED[len(kernel)](padded, weight, bias, stride, 0, dilation, attribute(node, "group", 1))


def _conv_transpose(node: NodeProto, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    (stride, dilation), wider = _sides(node, len(kernel)), attribute(node, "output_padding", [0] * len(kernel))
    y = TRANSPOSED[len(kernel)](x, weight, bias, stride, 0, wider, attribute(node, "group", 1), dilation)
    return functional.pad(y, [-side for side in _pads(node, x, kernel)])


def _pool(node: NodeProto, x: Tensor) -> Tensor:
    """Average and maximum over windows; padding never counts as a number of the map unless the node says so."""
    kernel = list(attribute(node, "kernel_shape"))
    (stride, dilation), pads = _sides(node, len(kernel)), _pads(node, x, kernel)
    rounded_up = bool(attribute(node, "ceil_mode", 0))
    if standard(node) == "MaxPool":
        return MAX_POOLS[len(kernel)](functional.pad(x, pads, value=-math.inf), kernel, stride, 0, dilation, rounded_up)

    def mean(values: Tensor) -> Tensor:
        return AVERAGE_POOLS[len(kernel)](functional.pad(values, pads), kernel, stride, 0, rounded_up)

    return mean(x) if attribute(node, "count_include_pad", 0) or not any(pads) else mean(x) / mean(torch.ones_like(x))


def _pad(
    node: NodeProto, x: Tensor, given: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    pads, along = _given(node, "pads", given), range(x.ndim) if axes is None else axes.tolist()
    around = [[0, 0] for _ in range(x.ndim)]
    for place, axis in enumerate(along):
        around[axis] = [pads[place], pads[len(along) + place]]
    mode = {"reflect": "reflect", "edge": "replicate"}.get(attribute(node, "mode", b"constant").decode())
    if mode is None:
        filled = attribute(node, "value", 0.0) if value is None else float(value)
        return functional.pad(x, [side for pair in reversed(around) for side in pair], value=filled)
    return functional.pad(x, [side for pair in reversed(around[2:]) for side in pair], mode=mode)


def _resize(node: NodeProto, x: Tensor, *given: Tensor | None) -> Tensor:
    """To the nearest number or by lines between them; other ways give other numbers than ONNX Runtime's, which is noticed."""
    *_, scales, sizes = (*given, None) if len(given) < 3 else given
    if sizes is None:
        sides = [int(side * scale) for side, scale in zip(x.shape, _given(node, "scales", scales), strict=True)]
    else:
        sides = sizes.tolist()
    if attribute(node, "mode", b"nearest") != b"linear":
        return functional.interpolate(x, sides[2:], mode="nearest")
    corners = attribute(node, "coordinate_transformation_mode", b"half_pixel") == b"align_corners"
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return functional.interpolate(x, sides[2:], mode=mode, align_corners=corners)


def _depth_to_space(node: NodeProto, x: Tensor) -> Tensor:
    size = attribute(node, "blocksize")
    if attribute(node, "mode", b"DCR") == b"DCR":  # as CRD, once the channels stand in that order
        x = x.unflatten(1, (size**2, -1)).transpose(1, 2).flatten(1, 2)
    return functional.pixel_shuffle(x, size)


def _clip(node: NodeProto, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least, most = _given(node, "min", low), _given(node, "max", high)
    x = x if least is None else x.clamp_min(least)
    return x if most is None else x.clamp_max(most)


def _reduced(function: Callable[..., Tensor]) -> Op:
    return lambda node, x, axes=None: function(
        x, _given(node, "axes", axes, list(range(x.ndim))), bool(attribute(node, "keepdims", 1))
    )


def _softmax(function: Callable[..., Tensor]) -> Op:
    return lambda node, x: function(x, attribute(node, "axis", -1))


def _plain(function: Callable[..., Tensor]) -> Op:
    return lambda node, *x: function(*x)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    return lambda node, *x: functools.reduce(function, x)


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


PLAIN: dict[str, Callable[..., Tensor]] = {  # of the inputs alone
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Ceil": torch.ceil, "Cos": torch.cos, "Div": _divided,
    "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Softsign": functional.softsign,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist()))),
    "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Identity": lambda x: x, "Less": torch.lt,
    "LessOrEqual": torch.le, "Log": torch.log, "MatMul": torch.matmul, "Mul": torch.mul, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "Pow": lambda x, y: x.pow(y.to(x)), "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Softplus": functional.softplus, "Sqrt": torch.sqrt,
    "Sub": torch.sub, "Tanh": torch.tanh, "Where": torch.where, "HardSwish": functional.hardswish, "Mish": functional.mish,
}  # fmt: skip
OPS: dict[str, Op] = {
    **{op: _plain(function) for op, function in PLAIN.items()},
    "AveragePool": _pool,
    "BatchNormalization": lambda node, x, gain, shift, mean, var: functional.batch_norm(
        x, mean, var, gain, shift, eps=attribute(node, "epsilon", 1e-5)
    ),
    "Cast": lambda node, x: x.to(KINDS[attribute(node, "to")]),
    "Celu": lambda node, x: functional.celu(x, attribute(node, "alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda node, *x: torch.cat(x, attribute(node, "axis")),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Dropout": lambda node, x, *_: x,
    "Elu": lambda node, x: functional.elu(x, attribute(node, "alpha", 1.0)),
    "Flatten": lambda node, x: x.reshape(math.prod(x.shape[: attribute(node, "axis", 1)]), -1),
    "Gather": _gather,
    "Gelu": lambda node, x: functional.gelu(x, approximate=attribute(node, "approximate", b"none").decode()),
    "Gemm": lambda node, a, b, c=None: attribute(node, "alpha", 1.0)
    * ((a.T if attribute(node, "transA", 0) else a) @ (b.T if attribute(node, "transB", 0) else b))
    + (0 if c is None else attribute(node, "beta", 1.0) * c),
    "GlobalAveragePool": lambda node, x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(list(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": lambda node, x: (attribute(node, "alpha", 0.2) * x + attribute(node, "beta", 0.5)).clamp(0, 1),
    "InstanceNormalization": lambda node, x, gain, shift: functional.instance_norm(
        x, weight=gain, bias=shift, eps=attribute(node, "epsilon", 1e-5)
    ),
    "LayerNormalization": lambda node, x, gain, shift=None: functional.layer_norm(
        x, x.shape[attribute(node, "axis", -1) % x.ndim :], gain, shift, attribute(node, "epsilon", 1e-5)
    ),
    "LeakyRelu": lambda node, x: functional.leaky_relu(x, attribute(node, "alpha", 0.01)),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Max": _folded(torch.maximum),
    "MaxPool": _pool,
    "Min": _folded(torch.minimum),
    "PRelu": lambda node, x, slope: torch.where(x >= 0, x, slope * x),
    "Pad": _pad,
    "ReduceL2": _reduced(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Reshape": lambda node, x, shape: x.reshape(
        [x.shape[i] if side == 0 and not attribute(node, "allowzero", 0) else side for i, side in enumerate(shape.tolist())]
    ),
    "Resize": _resize,
    "Selu": lambda node, x: attribute(node, "gamma", 1.050701) * functional.elu(x, attribute(node, "alpha", 1.673263)),
    "Shape": lambda node, x: torch.tensor(x.shape[attribute(node, "start", 0) : attribute(node, "end")], dtype=torch.int64),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Split": _split,
    "Squeeze": lambda node, x, axes=None: x.squeeze(tuple(_given(node, "axes", axes, range(x.ndim)))),
    "Sum": _folded(torch.add),
    "Transpose": lambda node, x: x.permute(attribute(node, "perm", tuple(range(x.ndim))[::-1])),
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
                result = self._ops[standard(node)](node, *(values[name] if name else None for name in node.input))
                made = dict(zip(node.output, result if isinstance(result, list) else [result], strict=False))
            values |= {name: handed_on(name, value) for name, value in made.items()}
        output: Tensor = values[self.main]
        return output
