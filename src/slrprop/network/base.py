"""What every network offers, wherever its layers come from: names, order, what follows a layer, streams of data."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from slrprop.checks import suggestion
from slrprop.data import Batch, Data, content
from slrprop.errors import SlrpropError
from slrprop.forms import Dense, Fit
from slrprop.linalg import in_parts
from slrprop.losses import IGNORED, LossName, pick_loss, rows_of
from slrprop.network.chain import ACTIVATIONS, Affine, Chain, Element, Linear, Path
from slrprop.network.junction import Junction
from slrprop.network.layer import Contents, Layer
from slrprop.network.reading import Raised, Reading, class_axis, embedding
from slrprop.network.samples import Sampled
from slrprop.operators import Lookup, Operator

Changing = Callable[[Tensor, Tensor], Tensor]  # (what a layer reads, candidate) -> what it makes


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of shape, dtype and values (n x m, like ``nn.Linear.weight``)."""
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    for (part,) in in_parts(weight):  # of a transposed weight a copy is made
        digest.update(content(part))
    return digest.hexdigest()


class Flow(NamedTuple):
    """One batch through the network: its main output (classes last), and per layer and call the rows that the weight is multiplied by (p x m) and makes (p x n)."""

    batch: Batch
    output: Tensor
    calls: dict[str, list[tuple[Tensor, Tensor]]]


class Network(Sampled, Contents):
    """Layers by name, and the graph around them.

    ``order`` are those the data reaches, in order of execution; ``ending`` is ``softmax`` or ``log_softmax`` where that makes the output.
    """

    layers: dict[str, Layer]

    def __init__(self, layers: dict[str, Layer]) -> None:
        super().__init__()
        self.layers, self.order = layers, tuple(layers)
        self.ending: str | None = None
        self.reading: Reading | None = None  # of the main output, once data was seen
        self._reads: dict[str, Any] = {}  # by layer, what tells apart the tensors that they read
        self._paths: dict[str, Path] = {}
        self._chains: dict[str, Chain | None] = {}

    def operator(self, name: str) -> Operator:
        """How a layer's weight is multiplied."""
        return self.layers[name].operator

    @property
    def norms(self) -> dict[str, str]:
        """Batch norms that alone take what a layer makes, and can be put into it, by the layer's name."""
        able = (name for name in self._paths if not self.stays(name) and not isinstance(self.operator(name), Lookup))
        found = {name: norm for name in able if (norm := self._paths[name].norm)}
        return {name: str(norm.name) for name, norm in found.items()}

    @property
    @abstractmethod
    def numbers(self) -> int:
        """Floating-point numbers the model stores, shared ones once."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """The layer's weight in the articles' orientation, m x n (inputs x outputs)."""

    @abstractmethod
    def bias(self, name: str) -> Tensor | None:
        """The layer's bias (n,)."""

    @abstractmethod
    def stream(self, names: tuple[str, ...], data: Data, whole: bool = True) -> Iterator[Flow]:
        """Run the data through the network batch by batch, with what the named layers saw.

        Args:
            whole: False goes no further than the named layers; the output is empty then.
        """

    @abstractmethod
    def outputs_with(self, name: str, flow: Flow, layer: Changing, candidates: Tensor) -> Tensor:
        """The network's outputs (candidates, ...) on a batch when ``layer(its input, candidate)`` takes the layer's place.

        What comes before the layer does not depend on the candidate and is not repeated for each.

        Args:
            candidates: whole numbers (c,), each handed to ``layer`` as a tensor without axes.
        """

    @abstractmethod
    def with_fits(self, fits: Mapping[str, Fit], data: Data | None) -> Self:
        """A copy of the network whose named layers have these forms and, where they bring such, biases.

        Args:
            data: to see what follows each layer; None for a network that is only to be streamed.
        """

    def stays(self, name: str) -> str:
        """Why a layer can't be replaced whatever the method; empty where it can."""
        layer = self.layers[name]
        return f"its weight is also {', '.join(layer.tied)}" if layer.tied else layer.held

    def stored(self, name: str, fit: Fit | None = None) -> int:
        """Bytes of a layer, with a fit if one is given, in the type that its numbers are stored in."""
        form = fit or Fit(Dense(torch.empty(self.shape(name), device="meta")))
        return form.over(self.bias(name)).bytes(self.itemsize(name))

    def fingerprint(self, name: str) -> str:
        """SHA-256 of the layer's weight: the same for equal weights of any network."""
        return fingerprint(self.weight(name).T)

    def rows_of(self, names: Iterable[str]) -> dict[str, Callable[[Tensor], Tensor]]:
        """What takes each layer's outputs apart into rows (p x n)."""
        return {name: self.operator(name).outputs for name in names}

    def require(self, name: str) -> None:
        """Refuse a name that is no layer, or one the data never reaches."""
        if name not in self.names:
            raise SlrpropError(
                f"no layer is called '{name}'{suggestion(str(name), self.names)}; the model has {', '.join(self.names) or 'none'}"
            )
        if not self.layers[name].calls:
            raise SlrpropError(
                f"layer '{name}' is not called as a module on this data (a fused path may read its weight), so it can't be replaced"
            )

    def read(
        self, name: str, output: Tensor, batch: Batch, data: Data, products: Sequence[Any], raised: Callable[[Any, int], Raised],
    ) -> None:  # fmt: skip
        """Find out how the output of this name is to be read, by what the network gave for a batch: see :func:`class_axis`."""
        axis = class_axis(output, batch.targets, data.class_axis, products, raised)
        if axis is not None:
            rows = rows_of(Reading(axis).classes_last(output))
            self.reading = Reading(axis, "" if self.ending or batch.targets is not None else embedding(rows, name))

    def classes_last(self, output: Tensor) -> Tensor:
        """A main output with its classes on the last axis.

        Raises:
            SlrpropError: it has several axes, and nothing tells which one that is.
        """
        if self.reading is None and output.ndim > 2:
            raise SlrpropError(
                f"the network's output has shape {tuple(output.shape)}, and nothing tells which axis holds its classes; "
                f"say it by class_axis (--class-axis), from 1 to {output.ndim - 1}"
            )
        return (self.reading or Reading()).classes_last(output)

    def flow(self, batch: Batch, output: Tensor, calls: dict[str, list[tuple[Tensor, Tensor]]]) -> Flow:
        """What a batch gave; real targets of the output's shape are turned as it is."""
        turned, targets = self.classes_last(output), batch.targets
        if targets is not None and targets.is_floating_point() and targets.shape == output.shape:
            batch = batch._replace(targets=self.classes_last(targets))
        return Flow(batch, turned, calls)

    def scores(self, output: Tensor) -> Tensor:
        """The network's output as class scores (logits), also where it ends in a softmax."""
        return output.clamp_min(torch.finfo(output.dtype).tiny).log() if self.ending == "softmax" else output

    def reproduces(self, chain: Chain, y: Tensor, output: Tensor) -> bool:
        """Whether the chain after a layer turns its output y (p x n) into the network's output, on this batch."""
        got, want = chain.values(rows_of(y))[-1], rows_of(output)
        if self.ending:
            got, want = got.log_softmax(-1), self.scores(want).log_softmax(-1)
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(y.dtype, 3e-2)
        return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance)

    def chain(self, name: str) -> Chain | None:
        """What followed a layer on the first batch, where that is a chain of dense layers up to the network's output."""
        return self._chains.get(name) if self.reading is None or self.reading.axis == -1 else None

    def forget(self) -> None:
        """Let go of numbers that were read and can be read again."""

    def next_layer(self, name: str) -> str | None:
        """The layer that alone takes this one's output, through functions of each channel alone, and has a weight for every channel."""
        reader = self._reader(name)
        return None if reader is None or self.operator(reader).bits_only else reader

    def _reader(self, name: str) -> str | None:
        return next((element.name for element in self._elements(name) if isinstance(element, Linear)), None)

    def apart(self, name: str) -> str:
        """Why a layer's outputs and the next layer's inputs are no junction, in words; empty where they are one."""
        reader = self._reader(name)
        for layer in (name, reader) if reader else (name,):
            operator, calls = self.operator(layer), self.layers[layer].calls
            kind = operator.bits_only or ("an embedding" if isinstance(operator, Lookup) else "")
            told = self.stays(layer) or (kind and f"it is {kind}") or (calls != 1 and f"it is called {calls} times")
            if told:
                return str(told) if layer == name else f"'{layer}', which reads it, must stay as it is: {told}"
        return self._paths[name].stop if name in self._paths else "it was not followed, for want of data"

    def junction(self, name: str) -> Junction | None:
        """What a layer makes, as far as it can be cut or put in another order together with what reads it."""
        reader = self.next_layer(name)
        if reader is None or self.apart(name):
            return None
        return Junction((name,), self._paths[name].carriers, {reader: self.shape(reader)[0] // self.shape(name)[1]})

    def junctions(self, wanted: Collection[str]) -> tuple[Junction, ...]:
        """Those that layers of these names make or read."""
        found = (self.junction(name) for name in self.order)
        return tuple(junction for junction in found if junction and not set(wanted).isdisjoint(junction.layers))

    def is_last(self, name: str) -> bool:
        """Whether the network's output is this layer's output, element-wise functions and a final softmax aside."""
        return name in self._paths and self._paths[name].whole and self.next_layer(name) is None

    def siblings(self, name: str) -> frozenset[str]:
        """The layers that read the very tensor that this one reads, itself among them: none changes another's inputs."""
        same = {other for other, what in self._reads.items() if what == self._reads.get(name, self)}
        return frozenset(same | {name})

    def activation(self, name: str) -> str | None:
        """The activation that takes a layer's output, None where it is not known."""
        after = next((element for element in self._elements(name) if not isinstance(element, Affine)), None)
        return after if isinstance(after, str) and after in ACTIVATIONS else None

    def gradients(self, names: tuple[str, ...], data: Data, probes: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Batch by batch, along one direction after the other (numbered in the batch): the outputs' gradients by layer.

        Those of a layer's p outputs of n numbers are (p, n). The directions' outer products sum to centring over classes, of real-valued
        outputs (:meth:`real_valued`) to the identity; for more than ``probes`` outputs they are random and do so on average over samples. Of a final softmax the scores are followed, see
        :meth:`scores`. Layers that no chain follows are left out where the network has no gradient of its own.
        """
        randoms = {name: torch.Generator().manual_seed(0) for name in names if self.chain(name) is not None}
        if not randoms:
            return
        for flow in self.stream(tuple(randoms), data):
            outputs = {}
            for name, random in randoms.items():
                if not flow.calls[name]:
                    continue  # this batch leaves the layer out
                y = torch.cat([y for _, y in flow.calls[name]]).detach().requires_grad_()
                chain = self.chain(name)
                assert chain is not None
                with torch.enable_grad():
                    output = chain.values(y)[-1]
                outputs[name] = (y, output, list(self.directions(output, flow.batch.targets, probes, random)))
            for turn in range(max((len(along) for *_, along in outputs.values()), default=0)):
                found = {
                    name: torch.autograd.grad(output, y, along[turn], retain_graph=True)[0]
                    for name, (y, output, along) in outputs.items()
                }
                yield turn, found

    def directions(
        self, output: Tensor, targets: Tensor | None, probes: int, random: torch.Generator
    ) -> Iterator[Tensor]:
        """Those of :func:`directions` for outputs (p x c), of length zero where a row's label is to be ignored."""
        along = directions(output, probes, random, self.real_valued(targets, output))
        if targets is None or targets.numel() != len(output) or targets.is_floating_point():
            return along
        counted = targets.reshape(-1, 1).long() != IGNORED
        return (one * counted for one in along)

    def real_valued(self, targets: Tensor | None, outputs: Tensor) -> bool:
        """Whether outputs (p x c) are numbers for themselves and not scores of classes to be compared."""
        return self.ending is None and self.loss(targets, outputs) == "squared"

    def loss(self, targets: Tensor | None, outputs: Tensor, asked: LossName | None = None) -> LossName:
        """The loss of outputs (p x c): see :func:`slrprop.losses.pick_loss`; of an embedding the squared distance."""
        embedded = targets is None and self.reading is not None and self.reading.embedding
        return pick_loss(targets, outputs, asked or ("squared" if embedded else None))

    def activated(self, name: str, y: Tensor) -> Tensor:
        """A layer's output (p x n) after the batch norm and activation that follow it."""
        for element in self._elements(name):
            if not isinstance(element, Affine):
                return ACTIVATIONS[element](y) if isinstance(element, str) and element in ACTIVATIONS else y
            y = y * element.scale + element.shift
        return y

    def _elements(self, name: str) -> list[Element]:
        return self._paths[name].elements if name in self._paths else []


def directions(output: Tensor, probes: int, random: torch.Generator, real_valued: bool = False) -> Iterator[Tensor]:
    """Directions (p, c), one after the other, in the space of outputs (p, c): see :meth:`Network.gradients`.

    Random ones differ from sample to sample, so that the noise of an average over samples falls with their number.
    """
    classes = output.shape[-1]
    centred = not real_valued and classes > 1
    if classes <= probes:
        for one in torch.eye(classes) - centred / classes:
            yield one.to(output).expand_as(output)
    else:
        for _ in range(probes):
            signs = torch.empty(output.shape).bernoulli_(generator=random) * 2 - 1
            yield ((signs - centred * signs.mean(-1, keepdim=True)) / probes**0.5).to(output)


def gradients_along(
    output: Tensor,
    places: Sequence[tuple[str, Tensor]],
    along: Iterable[Tensor],
    rows: Mapping[str, Callable[[Tensor], Tensor]],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """By automatic differentiation: the gradient (p, n) of an output along each direction, at named tensors, taken apart by ``rows``; zeros where there is none."""
    if not output.requires_grad:  # none of them leads to it
        output = output + 0 * sum((y.flatten()[:1].sum() for _, y in places), output.new_zeros(()))
    for turn, direction in enumerate(along if places else ()):
        parts = torch.autograd.grad(
            output, [y for _, y in places], direction, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found: dict[str, list[Tensor]] = {}
        for (name, _), part in zip(places, parts, strict=True):
            found.setdefault(name, []).append(rows[name](part))
        yield turn, {name: torch.cat(rows) for name, rows in found.items()}


def require_finite(output: Tensor) -> None:
    """Refuse to go on with a network whose output is empty or not finite."""
    if not output.numel():
        raise SlrpropError(f"the network's output has shape {tuple(output.shape)} on this data: nothing to judge it by")
    if not torch.isfinite(output).all():
        raise SlrpropError(
            "the network's output holds NaN or infinite values on this data; repair the model or the data first"
        )
