"""Where an ONNX graph multiplies by constants: the nodes that are layers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto

from slrprop.network.onnx.constants import Constant, attribute, standard, tensor_of
from slrprop.network.onnx.file import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

    from slrprop.network.onnx.graph import Graph
    from slrprop.operators import Operator
    from slrprop.operators.convolution import Sides


def operator(kind: str, *sides: Any) -> "Operator":
    """An operator by the name of its class: it computes with torch, which is not loaded before somebody does."""
    made: Operator = getattr(import_module("slrprop.operators"), kind)(*sides)
    return made


DENSE = partial(operator, "MatMul")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer is: node number ``index`` multiplies ``x`` by the constant ``weight``, ``y`` is its output.

    ``shape`` is that of the matrix, ``bias`` the tensor that is added, by ``adder`` (this node, or an Add node behind a MatMul).
    ``held`` says why nothing can take its place, ``port`` which of the node's inputs the weight is, ``tied`` what else uses it.
    """

    index: int
    x: str
    y: str
    weight: str
    shape: tuple[int, int]
    bias: str | None = None
    adder: int | None = None
    alpha: float = 1.0
    beta: float = 1.0
    trans_a: bool = False
    trans_b: bool = False
    makes: Callable[[], "Operator"] = DENSE
    held: str = ""
    port: int = 1
    tied: tuple[str, ...] = ()

    @cached_property
    def operator(self) -> "Operator":
        """How the node multiplies."""
        return self.makes()

    def matrix(self, stored: np.ndarray) -> np.ndarray:
        """The matrix (m x n) of the numbers as they are stored."""
        if self.operator.kind == "dense layer":
            return stored.T if self.trans_b else stored
        matrix: np.ndarray = self.operator.matrix(tensor_of(stored)).numpy()
        return matrix

    def stored(self, matrix: "Tensor") -> "Tensor":
        """A matrix as this node stores it."""
        if self.operator.kind == "dense layer":
            return matrix.T if self.trans_b else matrix
        return self.operator.stored(matrix)


class Finder:
    """Tells a graph's layers from its other nodes."""

    def __init__(self, graph: "Graph") -> None:
        self.graph = graph

    def places(self) -> dict[str, Place]:
        """The layers by the names of their nodes, or of what those make."""
        found: dict[str, Place] = {}
        finders = {
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "Conv": self._convolution,
            "ConvTranspose": self._convolution,
            "Gather": self._lookup,
        }
        for index, node in enumerate(self.graph.nodes):
            op, given = standard(node), list(node.input)
            reads = op in finders and len(given) > 1 and given[op == "Gather"] not in self.graph.constants
            layer = finders[op](index, node) if reads else None
            if layer is not None:
                name = node.name if node.name and node.name not in found else layer.y
                found[name if name not in found else f"{name}#{index}"] = layer
        return found

    def _matrix(self, name: str) -> Constant | None:
        found = self.graph.constants.get(name)
        known = found is not None and len(found.shape) == 2 and min(found.shape) > 0 and found.dtype in FLOATS.values()
        return found if known else None

    def _gemm(self, index: int, node: NodeProto) -> Place | None:
        weight = self._matrix(node.input[1])
        if weight is None:
            return None
        trans_b = bool(attribute(node, "transB", 0))
        m, n = weight.shape[::-1] if trans_b else weight.shape
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if bias is not None and not self._is_row(bias, n):
            return None  # added numbers that differ from sample to sample: no bias
        alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
        trans_a = bool(attribute(node, "transA", 0))
        return Place(
            index, node.input[0], node.output[0], node.input[1], (m, n), bias, index, alpha, beta, trans_a, trans_b
        )

    def _matmul(self, index: int, node: NodeProto) -> Place | None:
        weight = self._matrix(node.input[1])
        if weight is None:
            return None
        m, n = weight.shape
        y, bias, adder = node.output[0], None, None
        readers = [] if y in self.graph.outputs else self.graph.readers[y]
        if len(readers) == 1 and standard(after := self.graph.nodes[readers[0]]) == "Add":
            others = [name for name in after.input if name != y]
            if len(others) == 1 and self._is_row(others[0], n):
                y, bias, adder = after.output[0], others[0], readers[0]
        return Place(index, node.input[0], y, node.input[1], (m, n), bias, adder)

    def _convolution(self, index: int, node: NodeProto) -> Place | None:
        weight = self.graph.constants.get(node.input[1])
        if weight is None or weight.dtype not in FLOATS.values() or min(weight.shape) < 1:
            return None
        turned, count = node.op_type == "ConvTranspose", len(weight.shape) - 2
        if not 1 <= count <= 3:
            return None
        kernel, groups = tuple(map(int, weight.shape[2:])), int(attribute(node, "group", 1))
        stride, dilation = (tuple(attribute(node, name, [1] * count)) for name in ("strides", "dilations"))
        padding, held = self._padding(node, kernel, stride, dilation)
        wider = tuple(attribute(node, "output_padding", [0] * count)) if turned else ()
        if turned and (attribute(node, "output_shape", None) or any(one != two for one, two in padding)):
            held = held or "its map is made larger or smaller in a way of its own"
        outputs = weight.shape[1] * groups if turned else weight.shape[0]
        if groups < 1 or outputs % groups or weight.shape[0] % groups:
            held = f"its {groups} groups do not divide its channels"
        if turned and groups > 1:
            held = "it is a transposed convolution in groups"
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if bias is not None and not self._is_row(bias, outputs):
            return None
        makes = partial(operator, "Convolution", kernel, stride, padding, dilation, groups, turned, wider)
        m, n = weight.shape[0] if turned else weight.shape[1], weight.shape[1] if turned else weight.shape[0]
        m *= math.prod(kernel)
        return Place(index, node.input[0], node.output[0], node.input[1], (m, n), bias, index, makes=makes, held=held)

    def _lookup(self, index: int, node: NodeProto) -> Place | None:
        weight = self._matrix(node.input[0])
        if weight is None or attribute(node, "axis", 0) not in (0, -2):
            return None
        m, n = weight.shape
        return Place(
            index, node.input[1], node.output[0], node.input[0], (m, n), makes=partial(operator, "Lookup"), port=0
        )

    def _padding(
        self, node: NodeProto, kernel: "Sides", stride: "Sides", dilation: "Sides"
    ) -> tuple[tuple[tuple[int, int], ...], str]:
        """The zeros before and behind each axis of the map, and why that can't be known."""
        count, how = len(kernel), attribute(node, "auto_pad", b"NOTSET").decode()
        if how in ("NOTSET", "VALID"):
            pads = attribute(node, "pads", [0] * 2 * count) if how == "NOTSET" else [0] * 2 * count
            return tuple(zip(pads[:count], pads[count:], strict=True)), ""
        sides = self.graph.sides(node.input[0])[2:]
        if how not in ("SAME_UPPER", "SAME_LOWER") or node.op_type != "Conv":
            return ((0, 0),) * count, f"its auto_pad '{how}' is not known"
        if len(sides) != count or not all(side > 0 or step == 1 for side, step in zip(sides, stride, strict=True)):
            return ((0, 0),) * count, f"its auto_pad '{how}' depends on the map's sides, which are open"
        axes = zip(sides, kernel, stride, dilation, strict=True)
        return tuple(same(*axis, how == "SAME_UPPER") for axis in axes), ""

    def _is_row(self, name: str, n: int) -> bool:
        """Whether a tensor is a constant (n,) or (1, n), or one number for all."""
        found = self.graph.constants.get(name)
        return found is not None and found.dtype in FLOATS.values() and found.shape in ((n,), (1, n), (1,), ())


def same(side: int, places: int, step: int, reach: int, upper: bool) -> tuple[int, int]:
    """The zeros before and behind an axis that ONNX's ``SAME_UPPER``, or ``SAME_LOWER``, puts there; with a step of 1 for any side."""
    more = max(0, ((-(-side // step) - 1) * step - side + 1 if step > 1 else 0) + reach * (places - 1))
    return (more // 2, more - more // 2) if upper else (more - more // 2, more // 2)
