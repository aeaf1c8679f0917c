"""What follows a layer in an ONNX graph, run on changed outputs of the layer."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.network.base import Flow
from slrprop.network.onnx.constants import tensor_of
from slrprop.network.onnx.feed import Part
from slrprop.network.onnx.file import Feed
from slrprop.network.onnx.places import Place

if TYPE_CHECKING:
    from slrprop.network.onnx.network import OnnxNetwork


class Cut:
    """The graph behind a layer's output, fed with that and with what crosses the cut; it holds the tensors of one batch.

    ``crossing`` are the tensors made before the layer that are read behind it; ``stretch`` says how each grows with
    the batch: along axis 0 (True), in the marked entries of its value (a mask), or not at all (False); None where candidates
    can't be stacked.
    """

    flow: Flow | None = None
    part: Part
    tensors: Feed
    stretch: dict[str, bool | np.ndarray] | None = None

    def __init__(self, network: "OnnxNetwork", layer: Place) -> None:
        self.network, self.layer, graph = network, layer, network.graph
        behind = graph.between(layer.y)
        kinds = {value.name: value.type.tensor_type.elem_type for value in graph.inputs}
        varying = graph.after({*kinds})
        reads = sorted(graph.needs(behind) - {layer.y})
        self.crossing = [name for name in reads if name in kinds or graph.maker.get(name) in varying]
        fed = (layer.y, *self.crossing)
        self._before = network.file.session(sorted({layer.x, *fed} - kinds.keys()))
        found = {name: kinds[name] if name in kinds else self._before.element_type(name) for name in fed}
        self._behind = graph.part(behind, found, [graph.main])

    def take(self, flow: Flow) -> None:
        """Hold the tensors of this batch from now on."""
        if self.flow is flow:
            return
        first, self.flow = self.flow is None, flow
        (self.part,) = self.network.parts(flow.batch)
        self.tensors = self._tensors(self.part.feed)
        if first:
            self.stretch = self._stretch()

    def _tensors(self, feed: Feed) -> Feed:
        return {**feed, **self.network.run(self._before, feed)}

    def output(self, y: Tensor, copies: int) -> Tensor:
        """The main output for ``copies`` batches of the layer's output, stacked on axis 0."""
        feed = {self.layer.y: np.ascontiguousarray(y.numpy(), self.tensors[self.layer.y].dtype)}
        for name in self.crossing:
            value, how = self.tensors[name], self.stretch[name] if self.stretch is not None and copies > 1 else False
            if how is True:
                value = np.concatenate([value] * copies)
            elif how is not False:
                value = np.where(how, value * copies, value).astype(value.dtype)
            feed[name] = value
        return tensor_of(self.network.run(self._behind, feed)[self.network.graph.main])

    def _stretch(self) -> dict[str, bool | np.ndarray] | None:
        """How crossing tensors grow with the batch, found on a batch and its double; proved on two stacked batches."""
        found: dict[str, bool | np.ndarray] = {}
        batch, made = self.part.batch, self.tensors[self.layer.y]
        size = self.network.fixed_batch(batch)
        if size is None:
            rows = list(range(min(2, self.part.size)))
            try:
                one, two = (self._tensors(self.network.feed(batch.take(some))) for some in (rows, rows * 2))
            except SlrpropError:  # the inputs do not all have the samples on their first axis
                return None
            for name in self.crossing:
                a, b = one[name], two[name]
                if a.shape == b.shape:
                    found[name] = (b == 2 * a) & (a != b) if a.dtype.kind in "iu" else False
                elif a.ndim == b.ndim and b.shape == (2 * len(a), *a.shape[1:]):
                    found[name] = True
                else:
                    return None
        else:
            found = {name: self.tensors[name].ndim > 0 and len(self.tensors[name]) == size for name in self.crossing}
        y = tensor_of(made)
        other = y.roll(1, -1) * 0.5  # another batch, so that samples that see each other are noticed
        want = torch.cat([self.output(one_y, 1) for one_y in (y, other)])
        self.stretch = found
        try:
            got = self.output(torch.cat([y, other]), 2)
        except SlrpropError:
            return None
        room = (1e-5 if made.dtype != np.float16 else 1e-2) * max(1.0, float(want.abs().max()))
        return found if got.shape == want.shape and bool(((got - want).abs() <= room).all()) else None
