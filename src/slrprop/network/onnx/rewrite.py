"""ONNX models whose chosen layers compute with factors, as plain standard nodes."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto, helper
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms import Bias, Dense, Fit, Form, LowRank, Quantized, SparseLowRank, express
from slrprop.network.onnx.census import OWN, is_own
from slrprop.network.onnx.constants import attribute
from slrprop.network.onnx.file import OnnxFile
from slrprop.network.onnx.places import Place
from slrprop.network.onnx.tensors import refill
from slrprop.network.onnx.together import matrix_of
from slrprop.network.onnx.writer import FOUR_BITS, Additions, Number, Writer
from slrprop.network.torch.modules import FactoredLayer
from slrprop.operators import Lookup, Operator

MERGED = 40_000  # zeros that may be multiplied to save nodes: python -m benchmarks.quantisation
GATHERED = 50  # zeros more for every number that blocks would gather
SPREAD = 380  # bytes of the nodes that put zeros between numbers
# numbers from which the runtime's integer products are the faster ones: python -m benchmarks.wide_layers
INTEGER = 100_000
INTEGER_FACTORS = 1_000_000  # the same of low-rank layers


class LayerWriter(Writer):
    """The writer of files, with what ONNX Runtime does better in another way than the form says."""

    def together(self, form: Form) -> str:
        return matrix_of(form, self)

    def merged(self, form: SparseLowRank, x: str) -> str | None:
        few, ranks = form.merged_zeros <= MERGED + GATHERED * form.gathered, sum(left.shape[1] for left in form.left)
        fits = self.flat and few and ranks <= form.numbers and len(form.left) < 16 and self.opset >= 11
        return _merged(form, self, x) if fits else None

    def whole_numbers(self, form: Form, x: str) -> str | None:
        """The runtime's integer product, where it was asked for and is the faster way."""
        if not (self.integers and self.flat and self.dtype == np.float32 and isinstance(form, Quantized)):
            return None
        codes, scales = form.codes, form.scales
        if isinstance(codes, Dense) and form.numbers >= INTEGER:
            return self.integer_product(x, codes.weight, scales["weight"], form.bits)
        if isinstance(codes, LowRank) and form.numbers >= INTEGER_FACTORS:
            # the first product has both scales of a component but for one number: another for every layer, because the runtime
            # lets equal constants be shared, and merges a shared one into no product
            rest = torch.tensor(1 + self.place.index / 1024)
            joined = scales["left"].float() * scales["right"].float() / rest
            h = self.integer_product(x, codes.left, joined, form.bits)
            return self.integer_product(h, codes.right, rest, form.bits)
        return None


def _merged(form: SparseLowRank, writer: Writer, x: str) -> str:
    """Two products (one, where that is less work) of matrices that the runtime puts together when it loads the file.

    These are the factors with zeros where a neuron takes no part in a block. Zeros are multiplied, but that takes less time than
    more nodes on a small layer, or than gathering (docs/quantisation.md); a few are stored, where nodes would take more bytes.
    """
    (m, n), add = form.shape, writer.add
    left, right = form.padded()
    names = [[f"{side}_{level}" for level in range(len(form.left))] for side in ("left", "right")]
    if writer.bits < 32 and (form.spread_numbers - form.numbers) * writer.bits <= 8 * SPREAD + (m + n):
        sides = [writer.laid(Number(left, tuple(names[0]))), writer.laid(Number(right, tuple(names[1])))]
    else:  # both, one below the other (m + n, k): a row begins with as many numbers as its neuron's level says
        width, widths = _widths(form, writer)
        rows, component = torch.cat([left, right.T]), torch.arange(left.shape[1])
        packed = rows.flip(0)[(component < widths[:, None]).flip(0).to(rows.device)]  # as places count from the end
        numbers = writer.raised(writer.tensor(packed)) if writer.bits == 32 else writer.whole(packed, writer.bits)
        column = writer.places(component, np.int32)
        place = add("Sub", [column, add("CumSum", [width, writer.tensor(np.array(0, np.int32))])])
        mask = writer.cast(add("Less", [column, width]), writer.unpacks)
        both = writer.split(add("Mul", [add("Gather", [numbers, place], axis=0), mask]), [m, n])
        both[1] = add("Transpose", [both[1]], perm=[1, 0])
        scaled = [writer.times(side, writer.scale(*parts)) for side, parts in zip(both, names, strict=True)]
        sides = list(map(writer.settled, scaled))
    if form.spread_numbers > m * n:
        return writer.product(x, writer.product(*sides))
    return writer.product(writer.product(x, sides[0]), sides[1])


def _widths(form: SparseLowRank, writer: Writer) -> tuple[str, Tensor]:
    """How many numbers each row of both factors begins with: nodes (m + n, 1) and the numbers (m + n,).

    A whole number of 4 bits says that of one to four neighbours, through a table.
    """
    sums = torch.tensor([0, *(block.shape[1] for block in form.left)]).cumsum(0)
    kinds, levels = torch.cat([form.row_levels, form.column_levels]).cpu().long().unique(return_inverse=True)
    base = max(2, len(kinds))
    powers = base ** torch.arange(int(math.log(16, base)))
    filled = torch.cat([levels, levels.new_zeros(-len(levels) % len(powers))])
    codes = (filled.reshape(-1, len(powers)) * powers).sum(1) - 8
    table = sums[kinds][(torch.arange(16)[:, None] // powers % base).clamp(max=len(kinds) - 1)].roll(8, 0)
    few = 4 if writer.opset >= FOUR_BITS or writer.bits == 4 else 8
    width = writer.add("Gather", [writer.places(table, np.int32), writer.whole(codes, few, np.dtype(np.int32))], axis=0)
    width = writer.add("Reshape", [width, writer.tensor(np.array([-1, 1]))])
    short = len(filled) > len(levels)
    return writer.slice(width, slice(0, len(levels)), 0) if short else width, sums[kinds][levels]


def _layer(form: Form, writer: LayerWriter, bias: Bias | None) -> None:
    """The same node with another weight, or smaller operations in its place; a bias goes to the last that can add it, or becomes an Add."""
    place, same = writer.place, isinstance(form, Dense) and bool(writer.place.weight)
    if same:
        last = deepcopy(writer.node)
        last.input[place.port] = writer.tensor(place.stored(form.dense()).contiguous())
        for item in last.attribute:
            if item.name == "alpha" or (item.name == "beta" and bias is not None):
                item.f = 1.0
        if last.op_type != "MatMul":
            refill(last.input, last.input if bias is None else [*last.input[:2], writer.bias_tensor(bias)])
            writer.nodes.append(last)
            return
        last.output[0] = next(writer.additions.names)
    else:
        x = writer.add("Transpose", [place.x], perm=[1, 0]) if place.trans_a else place.x
        y = writer.whole_numbers(form, x) or express(form, writer, x)
        last = writer.nodes.pop()
        assert last.output[0] == y
        last.name = writer.node.name
    added = None if bias is None and place.bias is None else writer.bias_tensor(bias)
    writer.nodes.append(last)
    adder = None if place.adder == place.index else place.adder
    alone = not same and adder is None and writer.adds == "Add"
    gemm = alone and writer.flat and writer.rank == 2 and last.op_type == "MatMul"
    if added is None or gemm or last.op_type in ("Conv", "ConvTranspose"):
        last.op_type, last.output[0] = "Gemm" if gemm and added else last.op_type, place.y  # which adds, too
        last.input.extend([] if added is None else [added])
        return
    if not writer.flat:  # channels on axis 1 of maps
        added = writer.add("Reshape", [added, writer.tensor(np.array([-1, *[1] * (-1 - writer.operator.axis)]))])
    writer.add(
        writer.adds, [last.output[0], added], place.y, name="" if adder is None else writer.graph.nodes[adder].name
    )


def rewritten(
    file: OnnxFile, fits: Mapping[str, Fit], integers: bool = False, orders: Mapping[str, Tensor] | None = None
) -> OnnxFile:
    """The model with the layers' forms in the place of their weights, and their new biases; the rest stays as it is.

    Args:
        integers: let the runtime multiply whole numbers in large layers of few bits.
        orders: for carriers whose channels go or move, by what they make, the places of those that they have then.

    Raises:
        SlrpropError: ``integers``, and the file's operator set has no whole numbers of 4 bits.
    """
    if integers and file.opset < FOUR_BITS:
        raise SlrpropError(
            f"integer products need an ONNX file of opset {FOUR_BITS} or later, and '{file.path}' has {file.opset}; convert it, or leave them out"
        )
    places, constants = file.graph.layers, file.graph.constants
    items = {name: (places[name], fit, constants[places[name].weight].dtype) for name, fit in fits.items()}
    return _edited(file, items, integers, orders or {})


def placed(file: OnnxFile, modules: Sequence[FactoredLayer]) -> OnnxFile:
    """An exported model with the nodes of factored layers, in the places that hold their numbers among ``modules``."""
    graph, items = file.graph, {}
    for index, node in enumerate(graph.nodes):
        if node.domain == OWN:
            module = modules[attribute(node, "index")]
            place = Place(
                index, node.input[0], node.output[0], "", module.shape, makes=partial(getattr, module, "operator")
            )
            fit = module.fit()
            kind = next((value.dtype for value in fit.form.matrices().values()), torch.float32)
            items[node.output[0]] = (place, fit, np.dtype(str(kind).removeprefix("torch.")))
    found = _edited(file, items, False, {})
    refill(found.proto.opset_import, [domain for domain in found.proto.opset_import if domain.domain != OWN])
    return found


def layer_file(form: Form, operator: Operator, shape: Sequence[int], integers: bool = False) -> OnnxFile:
    """A model of one layer without a bias in a form, for inputs of one shape in float32."""
    fed, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in (("x", shape), ("y", None))
    )
    graph = helper.make_graph([helper.make_node("Layer", ["x"], ["y"], OWN, domain=OWN)], OWN, [fed], [made])
    opsets = [helper.make_opsetid("", FOUR_BITS)]
    file = OnnxFile(Path(), helper.make_model(graph, opset_imports=opsets, ir_version=10), {})
    place = Place(0, "x", "y", "", form.shape, makes=lambda: operator)
    return _edited(file, {"y": (place, Fit(form), np.dtype(np.float32))}, integers, {})


def _edited(
    file: OnnxFile, items: Mapping[str, tuple[Place, Fit, np.dtype[Any]]], integers: bool, orders: Mapping[str, Tensor]
) -> OnnxFile:
    def edit(graph: GraphProto) -> dict[str, np.ndarray]:
        additions, layers = Additions(graph, file.opset), file.graph
        nodes: dict[int, list[NodeProto]] = {}
        writer: LayerWriter | None = None
        for name, (place, fit, dtype) in items.items():
            writer = LayerWriter(layers, name, place, dtype, additions, integers)
            _layer(fit.form, writer, None if isinstance(place.operator, Lookup) else fit.bias)
            nodes |= {place.index: [], place.index if place.adder is None else place.adder: writer.nodes}
        for made, order in orders.items():
            node = deepcopy(layers.nodes[layers.maker[made]])
            arrays = [np.array([0, -1])]  # a reshape to samples and what each has
            if node.op_type == "BatchNormalization":
                arrays = [layers.constants[name].load()[order.numpy()] for name in node.input[1:]]
            else:
                del node.attribute[:]
            node.input[1:] = map(additions.tensor, arrays)
            nodes[layers.maker[made]] = [node]
        first = [] if writer is None else writer.first()
        unnamed = [node for written in nodes.values() for node in written if not node.name]
        if unnamed and not is_own(graph):
            unnamed[0].name = OWN  # so that the file is known again: in float a form looks like any two layers
        result = [new_node for i, node in enumerate(graph.node) for new_node in nodes.get(i, [node])]
        refill(graph.node, [deepcopy(node) for node in (*first, *result)])
        return additions.tensors

    return file.edited(edit)
