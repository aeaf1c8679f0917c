"""Write ONNX models whose chosen layers compute with factors, as plain standard nodes, and compare them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, helper
from torch import Tensor

from slrprop.data import Data
from slrprop.errors import SlrpropError
from slrprop.factors import Dense, Factors, LowRank, SparseLowRank, members, span
from slrprop.network.onnx import Feed, OnnxNetwork, input_dtype
from slrprop.network.onnx_file import OnnxFile, Session

TOLERANCE = {np.dtype(np.float16): 2e-2}  # of the largest output; sums in another order
FLOAT_TOLERANCE = 1e-4
SAMPLES = 16  # compared
SIDES = (8, 32, 224)  # tried in turn for open axes of made-up inputs


@dataclass(frozen=True)
class Parity:
    """How far a written file's outputs are from those of the original graph with the same factors multiplied out.

    ``outputs`` has the largest absolute difference of each output of real numbers; of others, the share of entries
    that differ.
    """

    outputs: dict[str, float]
    tolerance: float


class _Writer:
    """Nodes and initializers that take the place of one layer."""

    def __init__(self, network: OnnxNetwork, name: str, taken: set[str], new: dict[str, np.ndarray]) -> None:
        self.graph, self.name, self.layer = network.graph, name, network.layer(name)
        self.node = self.graph.nodes[self.layer.index]
        self.dtype = self.graph.constants[self.layer.weight].dtype
        self.opset = network.file.opset
        self.nodes: list[NodeProto] = []
        self._taken, self._new = taken, new
        self._rank = 2 if self.node.op_type == "Gemm" else self.graph.rank(self.layer.x)
        self.last_axis = -1 if self.opset >= 11 or self._rank is None else self._rank - 1

    def fresh(self, what: str) -> str:
        """A name that nothing has yet."""
        base = name = f"{self.name}/{what}"
        count = 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def tensor(self, what: str, value: Tensor | np.ndarray) -> str:
        """A new initializer; real numbers take the layer's type."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        name = self.fresh(what)
        self._new[name] = array.astype(self.dtype, copy=False) if array.dtype.kind == "f" else array
        return name

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """A new node; the name of its output."""
        output = output or self.fresh(op.lower())
        self.nodes.append(helper.make_node(op, inputs, [output], self.fresh(f"{op}_node"), **attributes))
        return output

    def slice(self, x: str, part: slice) -> str:
        if self.opset < 10:
            return self.add("Slice", [x], axes=[self.last_axis], starts=[part.start], ends=[part.stop])
        numbers = (("start", part.start), ("stop", part.stop), ("axis", self.last_axis))
        return self.add("Slice", [x, *(self.tensor(what, np.array([number])) for what, number in numbers)])

    def gather(self, x: str, index: Tensor, output: str | None = None) -> str:
        """``x[..., index]``; by whole rows of the transpose where the axes are known: the runtime copies those far faster."""
        places = self.tensor("order", index.long())
        if self._rank is None:
            return self.add("Gather", [x, places], output, axis=self.last_axis)
        axes = range(self._rank)
        turned = self.add("Transpose", [x], perm=[axes[-1], *axes[:-1]])
        picked = self.add("Gather", [turned, places], axis=0)
        return self.add("Transpose", [picked], output, perm=[*axes[1:], 0])

    def join(self, parts: list[str], output: str | None = None) -> str:
        return (
            parts[0] if len(parts) == 1 and output is None else self.add("Concat", parts, output, axis=self.last_axis)
        )

    def product(self, x: str, weight: str, output: str | None = None) -> str:
        return self.add("MatMul", [x, weight], output)

    def dense(self, form: Dense, moved: Tensor | None) -> None:
        """The same node with another weight."""
        node = NodeProto()
        node.CopyFrom(self.node)
        weight = form.weight.T if self.layer.trans_b else form.weight
        node.input[1] = self.tensor("weight", weight.contiguous())
        if self.layer.alpha != 1:
            next(item for item in node.attribute if item.name == "alpha").f = 1.0
        if moved is not None and self.layer.bias is not None and self.layer.adder == self.layer.index:
            node.input[2] = self.bias(moved, 1.0)
        self.nodes.append(node)

    def bias(self, moved: Tensor | None, beta: float) -> str:
        """The bias times beta in the new order of the outputs; the old one where nothing changes."""
        name = self.layer.bias
        assert name is not None
        value = self.graph.constants[name].load()
        if (moved is None or value.size == 1) and beta == 1:
            return name
        value = value if moved is None or value.size == 1 else value[..., moved.numpy()]
        return self.tensor("bias", value * np.asarray(beta, value.dtype))

    def factored(self, form: Factors, moved: Tensor | None) -> None:
        """Smaller products in the place of the node; a Gemm's bias becomes an Add."""
        out, layer = self.node.output[0], self.layer
        x = self.add("Transpose", [layer.x], perm=[1, 0]) if layer.trans_a else layer.x
        with_bias = layer.bias is not None and layer.adder == layer.index
        y = self.fresh("product") if with_bias else out
        if isinstance(form, LowRank):
            self.product(self.product(x, self.tensor("left", form.left)), self.tensor("right", form.right), y)
        elif isinstance(form, SparseLowRank):
            self._blocks(form, x, y)
        else:
            raise SlrpropError(f"no ONNX nodes compute with {type(form).__name__} factors")
        if with_bias:
            self.add("Add", [y, self.bias(moved, layer.beta)], out)

    def _blocks(self, form: SparseLowRank, x: str, y: str) -> None:
        hidden = []
        for level, left in enumerate(form.left):
            index = members(form.row_levels, level)
            piece = span(index)
            whole = len(index) == form.shape[0]
            seen = x if whole else self.gather(x, index) if piece is None else self.slice(x, piece)
            hidden.append(self.product(seen, self.tensor(f"left_{level}", left)))
        segments, order = form.segments()
        parts = []
        only = len(segments) == 1 and order is None
        for segment in segments:
            if segment.level:
                source, right = self.join(hidden[: segment.level]), segment.right
            else:
                source, right = self.slice(hidden[0], slice(0, 1)), form.left[0].new_zeros(1, len(segment.columns))
            parts.append(self.product(source, self.tensor("right", right), y if only else None))
        if not only:
            joined = self.join(parts, y if order is None else None)
            if order is not None:
                self.gather(joined, order, y)


def rewritten(network: OnnxNetwork, forms: Mapping[str, Factors], orders: Mapping[str, Tensor]) -> OnnxFile:
    """The model with the layers' factors in the place of their weights; the rest stays as it is.

    Args:
        orders: for layers whose outputs were put in another order, that order (n,).
    """

    def edit(graph: GraphProto) -> dict[str, np.ndarray]:
        taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
        taken |= {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
        new: dict[str, np.ndarray] = {}
        nodes: dict[int, list[NodeProto]] = {}
        for name, form in forms.items():
            writer, moved = _Writer(network, name, taken, new), orders.get(name)
            if isinstance(form, Dense):
                writer.dense(form, moved)
            else:
                writer.factored(form, moved)
            nodes[writer.layer.index] = writer.nodes
            adder = writer.layer.adder
            if moved is not None and adder is not None and adder != writer.layer.index:
                added = NodeProto()
                added.CopyFrom(writer.graph.nodes[adder])
                place = list(added.input).index(writer.layer.bias or "")
                added.input[place] = writer.bias(moved, 1.0)
                nodes[adder] = [added]
        result = [new_node for i, node in enumerate(graph.node) for new_node in nodes.get(i, [node])]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in result]
        del graph.node[:]
        graph.node.extend(copies)
        return new

    return network.file.edited(edit)


def stored_as(form: Factors, dtype: np.dtype) -> Factors:
    """The factors with the rounding that storing them in the layer's type brings, as float32 for float16."""
    if dtype != np.float16:
        return form

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.half().float()

    if isinstance(form, LowRank):
        return LowRank(rounded(form.left), rounded(form.right))
    if isinstance(form, SparseLowRank):
        left, right = (tuple(map(rounded, blocks)) for blocks in (form.left, form.right))
        return SparseLowRank(left, right, form.row_levels, form.column_levels)
    return form


def write(
    network: OnnxNetwork,
    forms: Mapping[str, Factors],
    new_forms: Mapping[str, Factors],
    orders: Mapping[str, Tensor],
    path: str | Path,
    data: Data | None,
) -> Parity:
    """Write the model with new factors, after its outputs were compared with those of the multiplied-out factors.

    Args:
        forms: the layers' factors, in the original order of neurons.
        new_forms: what is written, neighbours included, in the order of ``orders``.
        data: what to compare on, its first samples; made-up inputs without it.

    Raises:
        SlrpropError: the outputs differ, the model can't be run, or the file can't be written; none is left then.
    """
    dtypes = {name: network.graph.constants[network.layer(name).weight].dtype for name in forms}
    plain = rewritten(network, {name: Dense(stored_as(form, dtypes[name]).dense()) for name, form in forms.items()}, {})
    outputs = [value.name for value in network.file.proto.graph.output]
    if any(value.type.WhichOneof("value") not in (None, "tensor_type") for value in network.file.proto.graph.output):
        outputs.append(network.graph.main)  # the numbers behind a map of class names
    feed, want = _example(network, plain.session(outputs), data)
    del plain
    tolerance = max((TOLERANCE.get(dtype, FLOAT_TOLERANCE) for dtype in dtypes.values()), default=FLOAT_TOLERANCE)
    found: dict[str, float] = {}
    flaw = network.file.flaw()  # the runtime takes models that the checker does not

    def check(file: OnnxFile) -> None:
        new_flaw = file.flaw()
        if new_flaw and not flaw:
            raise SlrpropError(f"the new file does not pass onnx.checker: {new_flaw}; nothing was written")
        got = file.session(outputs).run(feed)
        for name in outputs:
            if isinstance(want[name], np.ndarray):
                found[name] = _difference(name, want[name], got[name], tolerance)

    rewritten(network, new_forms, orders).save(path, check)
    return Parity(found, tolerance)


def _difference(name: str, want: np.ndarray, got: np.ndarray, tolerance: float) -> float:
    if want.shape != got.shape or want.dtype != got.dtype:
        raise SlrpropError(
            f"output '{name}' of the new file has shape {got.shape} instead of {want.shape}; nothing was written"
        )
    if want.dtype.kind != "f":
        return float((want != got).mean()) if want.size else 0.0
    a, b = want.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    largest = float(apart.max(initial=0))
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0))
    if not largest <= tolerance * max(1.0, size):
        raise SlrpropError(
            f"output '{name}' of the new file differs from the factors' values by {largest:.3g}; nothing was written"
        )
    return largest


def _example(network: OnnxNetwork, session: Session, data: Data | None) -> tuple[Feed, Feed]:
    """Inputs to compare on, and the outputs for them."""
    if data is not None:
        batch = next(iter(data))
        feed = network.feed(batch)
        size = network.batch or SAMPLES
        feed = {name: np.resize(array, (size, *array.shape[1:])) if network.batch and array.ndim else array[:size] for name, array in feed.items()}  # fmt: skip
        return feed, network.run(session, feed)
    reasons = []
    for feed in made_up(network):
        try:
            return feed, network.run(session, feed)
        except SlrpropError as error:
            reasons.append(str(error))
    raise SlrpropError(f"{reasons[0]}; give data to compare the outputs on (made-up inputs were tried)")


def made_up(network: OnnxNetwork) -> Iterable[Feed]:
    """Random inputs of the declared types and shapes; open axes are 2 samples and, one after another, some sizes."""
    for side in SIDES:
        random, feed = np.random.default_rng(0), {}
        for value in network.graph.inputs:
            kind = value.type.tensor_type
            dtype = input_dtype(value) or np.dtype(np.float32)
            shape = [
                item.dim_value if item.dim_value > 0 else side if axis else 2
                for axis, item in enumerate(kind.shape.dim)
            ]
            if np.prod(shape, dtype=object) > 1 << 28:
                raise SlrpropError(f"input '{value.name}' of shape {tuple(shape)} is too large to make up; give data")
            feed[value.name] = random.standard_normal(shape).astype(dtype) if dtype.kind == "f" else random.integers(0, 2, shape).astype(dtype)  # fmt: skip
        yield feed
