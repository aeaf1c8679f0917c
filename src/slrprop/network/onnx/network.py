"""ONNX models: stream what flows through them on ONNX Runtime, run what follows a layer on changed outputs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor

from slrprop.data import Batch, Data
from slrprop.errors import SlrpropError
from slrprop.forms import Fit
from slrprop.losses import rows_of
from slrprop.memory import bound
from slrprop.network.base import Changing, Flow, Network, gradients_along, require_finite
from slrprop.network.chain import Chain, Linear, fold
from slrprop.network.layer import Layer
from slrprop.network.onnx.constants import tensor_of
from slrprop.network.onnx.cut import Cut
from slrprop.network.onnx.feed import Part, input_dtype, unpadded
from slrprop.network.onnx.file import Feed, OnnxFile, Session
from slrprop.network.onnx.gradients import Behind
from slrprop.network.onnx.places import Place
from slrprop.network.onnx.rewrite import rewritten
from slrprop.network.onnx.tensors import reading
from slrprop.network.reading import LAST, Raised, Reading
from slrprop.network.samples import alike
from slrprop.operators import MatMul

MOST_AT_ONCE = 1 << 20  # samples of a batch whose size is fixed
STACKED = 1 << 22  # numbers of a layer's changed outputs that are run at once


class OnnxNetwork(Network):
    """An ONNX model and what one batch of data shows of it.

    Dense layers are the Gemm and MatMul nodes whose right factor is a constant matrix; they are called by their
    node's name. Layers inside the bodies of If, Loop and Scan are left alone.
    """

    def __init__(self, model: str | Path | OnnxFile, data: Data | None, reading_of: Reading | None = None) -> None:
        self.file = model if isinstance(model, OnnxFile) else OnnxFile.open(model)
        with reading(self.file.path):
            self.graph = self.file.graph
            super().__init__(
                {
                    name: Layer(name, place.operator, place.shape, tied=place.tied, held=place.held)
                    for name, place in self.graph.layers.items()
                }
            )
            self.ending, self.classes = self.graph.ending, self.graph.classes()
            self._paths = {name: self.graph.follow(layer) for name, layer in self.graph.layers.items()}
            self._reads = {name: layer.x for name, layer in self.graph.layers.items()}
        self._cut: Cut | None = None
        self._held: dict[str, Tensor] = {}  # the last weight, if it is small
        self.pieces: dict[
            str, Any
        ] = {}  # of the graph, by the layer that they lead to (:mod:`slrprop.network.onnx.lockstep`)
        self.reading = reading_of
        if data is not None:
            batch = next(iter(data))
            self.feed(batch)
            self.look(data)
            self._count(batch)
            if self.reading is None and (batch.targets is None or self.graph.rank(self.graph.main) != 2):
                self._read(next(self.parts(batch)), data)

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened anew by whoever receives it; the file is not sent."""
        if any(item.array is not None for item in self.file.stored.values()):
            raise TypeError("an edited ONNX network has no file that it could be opened from")
        return OnnxNetwork, (self.file.path.absolute(), None, self.reading)

    def _count(self, batch: Batch) -> None:
        """How often one sample is multiplied by each layer's weight."""
        size, made = self.fixed_batch(batch) or 1, sorted({place.y for place in self.graph.layers.values()})
        try:
            found = self.run(self.file.session(made), self.feed(batch.take([0] * size)))
        except SlrpropError:  # it takes no sample alone
            return
        for name, place in self.graph.layers.items():
            count = found[place.y].size // (place.shape[1] * size)
            self.layers[name] = replace(self.layers[name], positions=max(1, count))

    def _read(self, part: Part, data: Data) -> None:
        """See :meth:`Network.read`."""
        graph = self.graph
        leading = graph.before(graph.main)
        products = [i for i in sorted(leading, reverse=True) if graph.feature_axis(i) is not None][:LAST]
        output = tensor_of({**part.feed, **self.run(self.file.session([graph.main]), part.feed)}[graph.main])

        def raised(index: int, unit: int) -> Raised:
            end, axis = graph.nodes[index].output[0], graph.feature_axis(index) or 0
            value = self.run(self.file.session([end]), part.feed)[end]
            higher = np.moveaxis(value.copy(), axis, 0)
            higher[unit] += 10 * (1 + np.abs(value).max())
            kind = helper.make_tensor_value_info(end, helper.np_dtype_to_tensor_dtype(value.dtype), None)
            behind = self.file.session([graph.main], [*graph.inputs, kind], leading - {index})
            feed = part.feed | {end: np.ascontiguousarray(np.moveaxis(higher, 0, axis))}
            made = tensor_of(self.run(behind, feed)[graph.main])
            return Raised(self._samples_first(made, part), value.shape[axis], value.size)

        self.read(graph.main, self._samples_first(output, part), part.batch, data, products, raised)

    def dtype(self, name: str) -> torch.dtype:
        """What the layer is computed with."""
        stored = self.graph.constants[self.layer(name).weight].dtype
        return torch.float64 if stored == np.float64 else torch.float32

    def chain(self, name: str) -> Chain | None:
        """See :meth:`Network.chain`; the numbers of one chain at a time are kept."""
        if name not in self._chains:
            elements, whole = self._paths[name][:2]
            dense = whole and isinstance(self.operator(name), MatMul)
            with reading(self.file.path):
                real = [self._linear(e.name) if isinstance(e, Linear) and e.name else e for e in elements if dense]
                like = torch.ones(self.shape(name)[1], dtype=self.dtype(name))
                self._chains = {name: fold(real, like) if dense else None}
        return super().chain(name)

    def _linear(self, name: str) -> Linear:
        weight, bias = self.weight(name), self.bias(name)
        return Linear(weight, weight.new_zeros(weight.shape[1]) if bias is None else bias, name)

    def forget(self) -> None:
        self._chains.clear()

    def fingerprint(self, name: str) -> str:
        if name not in self.graph.fingerprints:
            self.graph.fingerprints[name] = super().fingerprint(name)
        return self.graph.fingerprints[name]

    def with_file(self, file: OnnxFile) -> "OnnxNetwork":
        """The same for a file of other layers with the same inputs and outputs, which is only to be run whole."""
        found = OnnxNetwork.__new__(OnnxNetwork)  # a copy would open the original again
        vars(found).update(vars(self) | {"file": file})
        return found

    def layer(self, name: str) -> Place:
        """Where a layer is in the graph."""
        self.require(name)
        return self.graph.layers[name]

    @property
    def norms(self) -> dict[str, str]:
        found = {name: made for name, made in super().norms.items() if self.graph.foldable(self.layer(name))}
        return {name: self.graph.label(self.graph.maker[made]) for name, made in found.items()}

    @property
    def numbers(self) -> int:
        return self.file.numbers

    def itemsize(self, name: str) -> int:
        return self.graph.itemsize(name)

    def elsewhere(self) -> Mapping[str, int]:
        return self.graph.elsewhere()

    def weight(self, name: str) -> Tensor:
        if name in self._held:  # asked for again and again while its layer is looked at
            return self._held[name]
        with reading(self.file.path):
            found = tensor_of(self.graph.weight(self.layer(name)))
        self._held = {name: found} if found.nbytes <= bound() // 16 else {}
        return found

    def bias(self, name: str) -> Tensor | None:
        with reading(self.file.path):
            bias = self.graph.bias(self.layer(name))
        return None if bias is None else tensor_of(bias)

    def with_fits(self, fits: Mapping[str, Fit], data: Data | None) -> "OnnxNetwork":
        found = OnnxNetwork(rewritten(self.file, fits), data, self.reading)
        found.at_once = self.at_once
        return found

    def _tried(self, batch: Batch) -> tuple[Tensor, int]:
        feed = self.feed(batch)
        made = {name for index in self.graph.after(set(feed)) for name in self.graph.nodes[index].output if name}
        found = self.run(self.file.session(sorted({*made, self.graph.main} - feed.keys())), feed)
        main = (feed | found)[self.graph.main]
        if not isinstance(main, np.ndarray) or main.dtype.kind not in "fiub":
            raise SlrpropError(f"the output '{self.graph.main}' holds no numbers")
        return tensor_of(main), sum(getattr(value, "nbytes", 0) for value in found.values())

    def outputs_of(self, batches: Iterable[Batch]) -> list[Tensor]:
        session, main = self.file.session([self.graph.main]), self.graph.main
        return [tensor_of(self.run(session, next(self.parts(batch)).feed)[main]) for batch in batches]

    def fixed_batch(self, batch: Batch) -> int | None:
        rest = [value for value in self.graph.inputs if value.name not in batch.named]
        axes = {value.name: batch.axes.get(place, 0) for place, value in enumerate(rest)} | dict(batch.axes)
        shapes = [(value.type.tensor_type.shape.dim, axes.get(value.name, 0)) for value in self.graph.inputs]
        sizes = {shape[axis].dim_value for shape, axis in shapes if len(shape) > axis}
        size = sizes.pop() if len(sizes) == 1 and min(sizes) > 0 else None
        if size is not None and size > MOST_AT_ONCE:
            raise SlrpropError(
                f"the model insists on batches of {size:,} samples, more than the {MOST_AT_ONCE:,} that are run at once; export it with an open batch size"
            )
        return size

    def feed(self, batch: Batch) -> Feed:
        """A batch as the model's inputs, in the types it declares.

        Raises:
            SlrpropError: missing or foreign inputs, or values of the wrong kind.
        """
        names = [value.name for value in self.graph.inputs]
        given = dict(batch.named)
        if batch.inputs:
            if len(batch.inputs) + len(given) != len(names):
                raise SlrpropError(
                    f"the model has inputs {', '.join(names)}, and the data holds {len(batch.inputs) + len(given)}; name each array after its input"
                )
            given |= dict(zip([name for name in names if name not in given], batch.inputs, strict=True))
        if set(given) != set(names):
            raise SlrpropError(
                f"the model's inputs are {', '.join(names)}, and the data holds {', '.join(sorted(given))}; name each array after its input"
            )
        feed = {}
        for value in self.graph.inputs:
            raw = given[value.name]
            array = raw.detach().cpu().numpy() if isinstance(raw, Tensor) else np.asarray(raw)
            want = input_dtype(value) or array.dtype
            if array.dtype.kind == "f" and want.kind in "iub":
                raise SlrpropError(f"input '{value.name}' takes {want} values, and the data has {array.dtype}")
            feed[value.name] = np.asarray(array, want, order="C")
        return feed

    def parts(self, batch: Batch) -> Iterator[Part]:
        """A batch in parts: of the size the model wants, the last one filled up with its last sample, or as they fit into memory."""
        batch = batch._replace(targets=self.numbered(batch.targets))
        size = self.fixed_batch(batch)
        if size is None:
            for small in self.parts_of(batch):
                yield Part(small, self.feed(small), small.samples, small.samples)
            return
        for start in range(0, batch.samples, size):
            stop = min(start + size, batch.samples)
            small = batch.take(slice(start, stop))
            padded = batch.take([min(place, stop - 1) for place in range(start, start + size)])
            yield Part(small, self.feed(padded), stop - start, size)

    def run(self, session: Session, feed: Feed) -> dict[str, np.ndarray]:
        """A session's outputs, or one sentence."""
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feed.items())
        try:
            return session.run(feed)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise SlrpropError(f"the model can't take data of shape {shapes}: {reason}") from error

    def stream(self, names: tuple[str, ...], data: Data, whole: bool = True) -> Iterator[Flow]:
        layers = {name: self.layer(name) for name in names}
        fed = {value.name for value in self.graph.inputs}
        wanted = {tensor for layer in layers.values() for tensor in (layer.x, layer.y)}
        wanted |= {self.graph.main} if whole else set()
        session = self.file.session(sorted(wanted - fed))
        first = 0
        for part in (part for batch in data for part in self.parts(batch)):
            found = {**part.feed, **self.run(session, part.feed)}
            output = torch.empty(0)
            if whole:
                output = self._samples_first(tensor_of(found[self.graph.main]), part)
                require_finite(output)
            calls = {}
            for name, layer in layers.items():
                x, y = unpadded(layer_input(layer, found), part), unpadded(tensor_of(found[layer.y]), part)
                calls[name] = [(layer.operator.inputs(x, first), layer.operator.outputs(y, first))]
            first += part.samples
            yield self.flow(part.batch, output, calls) if whole else Flow(part.batch, output, calls)

    def gradients(self, names: tuple[str, ...], data: Data, probes: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """By the chains that follow; where a layer has none, by torch operations for the nodes behind, if they give the runtime's output."""
        behind = Behind(self.graph, {name: self.layer(name).y for name in names})
        if not behind.watched or all(self.chain(name) is not None for name in names):
            yield from super().gradients(names, data, probes)
            return
        fed = {value.name for value in self.graph.inputs}
        session = self.file.session(sorted((behind.reads | {self.graph.main}) - fed))
        random = torch.Generator().manual_seed(0)
        for place, part in enumerate(part for batch in data for part in self.parts(batch)):
            found = {**part.feed, **self.run(session, part.feed)}
            made = behind.run(found)
            if made is None or not alike(made[0], tensor_of(found[self.graph.main])):
                if not place:  # later, what was seen before stands
                    yield from super().gradients(names, data, probes)
                return
            output, seen = made
            output = rows_of(self.classes_last(self._samples_first(self.scores(output), part)))
            along = self.directions(output, part.batch.targets, probes, random)
            for turn, gradients in gradients_along(output, list(seen.items()), along, self.rows_of(names)):
                yield turn, {name: unpadded(rows, part) for name, rows in gradients.items()}

    def outputs_with(self, name: str, flow: Flow, layer: Changing, candidates: Tensor) -> Tensor:
        """Candidates stand one after the other on the batch axis; one at a time where the graph can't be stretched so."""
        dense = self.layer(name)
        if dense.y != self.graph.main and not self.graph.between(dense.y):
            return flow.output.expand(len(candidates), *flow.output.shape)  # the layer makes another output
        if self._cut is None or self._cut.layer is not dense:
            self._cut = Cut(self, dense)  # the last one only: it holds a batch
        cut = self._cut
        cut.take(flow)
        x = layer_input(dense, cut.tensors)
        at_once = max(1, STACKED // max(cut.tensors[dense.y].size, 1)) if cut.stretch is not None else 1
        found = []
        for chosen in candidates.split(at_once):
            y = torch.vmap(lambda candidate: layer(x, candidate))(chosen)
            output = cut.output(y.flatten(0, 1), len(chosen)).unflatten(0, (len(chosen), -1))
            found += [self.classes_last(self._samples_first(one, cut.part)) for one in output]
        return torch.stack(found)

    def _samples_first(self, output: Tensor, part: Part) -> Tensor:
        """The main output without padding, its samples on the first axis."""
        return unpadded(output.movedim(self.place(part.batch), 0), part._replace(batch=part.batch._replace(axes={})))


def layer_input(layer: Place, found: Feed) -> Tensor:
    """What a layer multiplies (..., m)."""
    x = tensor_of(found[layer.x])
    return x.T if layer.trans_a else x
