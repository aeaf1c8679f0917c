"""What reaches a layer by now, and what the original network gave there: streamed, and kept where it fits."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from slrprop.data import Data
from slrprop.forms import Bias, Dense, Fit, Form, express
from slrprop.memory import bound
from slrprop.network import Lockstep, in_lockstep
from slrprop.network.base import Network
from slrprop.network.chain import ACTIVATIONS
from slrprop.operators import Lookup

SAMPLE_ROWS = 4096


class Compressed(NamedTuple):
    """What a layer computes by now: a form of its weight, and its bias (n,)."""

    form: Form
    bias: Tensor

    @classmethod
    def of(cls, fit: Fit) -> "Compressed":
        """What a fit of a layer makes, which may have no bias."""
        none = torch.zeros(fit.form.shape[1], dtype=torch.float64)
        return cls(fit.form, none if fit.bias is None else fit.bias.value.detach().double().cpu())

    @property
    def weight(self) -> Tensor:
        """The dense weight (m x n), multiplied out at each call: those of all layers are as large as the network."""
        return self.form.dense().cpu()


class Pairs:
    """A layer's inputs behind compressed layers, and its original pre-activations, on one data set.

    ``outputs``: the original pre-activations that are kept, batch by batch. ``together``: whether all batches may go through the
    network at once, one layer after the other. ``keeps``: whether the pre-activations of all layers fit.
    """

    def __init__(self, network: Network, data: Data) -> None:
        self.network, self.data = network, data
        self.outputs: dict[str, list[Tensor]] = {}
        self.together = self.keeps = False
        self._inputs: dict[str, list[Tensor] | None] = {}
        self._locksteps: dict[bool, Lockstep] = {}  # through the original network, and behind compressed layers

    def prepare(self, names: tuple[str, ...]) -> bool:
        """Find out whether batches may go together; returns whether the pre-activations of all named layers can be kept."""
        rows = samples = 0
        for flow in self.network.stream(names[:1], self.data, whole=False):
            rows += sum(len(z) for _, z in flow.calls[names[0]])
            samples += flow.batch.samples
        shapes = [self.network.shape(name) for name in names]
        once = all(self.network.layers[name].calls == 1 for name in self.network.order)
        standing = max(4 * rows * max(map(max, shapes)), samples * self.network.standing)
        self.together = once and 4 * standing <= bound()  # the original's batches, and those behind compressed layers
        self.keeps = 4 * rows * sum(n for _, n in shapes) <= bound() // 2
        return self.keeps

    def original(self, name: str) -> Compressed:
        """What the layer computes in the original network, in float64; an embedding's weight, which is wide, as it is from float32 on."""
        weight = self.network.weight(name).detach()
        least = torch.float32 if isinstance(self.network.operator(name), Lookup) else torch.float64
        dense = Dense(weight.to("cpu", torch.promote_types(weight.dtype, least)))
        return Compressed.of(Fit(dense).over(self.network.bias(name)))

    def samples(self, name: str, compressed: Mapping[str, Compressed]) -> tuple[Tensor, Tensor]:
        """The first ``SAMPLE_ROWS`` of a layer's pairs (p x m, p x n), float64."""
        xs, zs, count = [], [], 0
        for x, z in self.of(name, compressed):
            xs.append(x[: SAMPLE_ROWS - count].double().cpu())
            zs.append(z[: SAMPLE_ROWS - count].double().cpu())
            count += len(xs[-1])
            if count >= SAMPLE_ROWS:
                break
        return torch.cat(xs), torch.cat(zs)

    def of(self, name: str, compressed: Mapping[str, Compressed]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (input by now, original pre-activation) of a layer."""
        entry = self._entry(name, compressed)
        if entry is not None:
            inputs = self._inputs[entry] or []
            made = (self._passed(self._along(entry, x, name, {}), name) for x in inputs)
            now = (self._along(entry, x, name, compressed) for x in inputs)
            yield from zip(now, self._kept(name, made, sum(map(len, inputs))), strict=True)
            return
        if not compressed:
            for flow in self.network.stream((name,), self.data, whole=False):
                yield from flow.calls[name]
            return
        yield from zip(self._inputs_now(name, compressed), self._outputs_then(name), strict=True)

    def _kept(self, name: str, made: Iterable[Tensor], rows: int) -> Iterable[Tensor]:
        """A layer's original pre-activations, from now on kept where they fit."""
        kept = sum(z.nbytes for parts in self.outputs.values() for z in parts)
        if name not in self.outputs and kept + 4 * rows * self.network.shape(name)[1] > bound() // 2:
            return made
        self.outputs[name] = self.outputs.get(name) or list(made)
        return self.outputs[name]

    def _outputs_then(self, name: str) -> Iterator[Tensor]:
        """The original pre-activations of a layer."""
        if name in self.outputs:
            yield from self.outputs[name]
            return
        found = self._standing(name, {})
        if found is not None:
            weight, bias = self.network.weight(name), self.network.bias(name)
            made = (x.to(weight) @ weight if bias is None else x.to(weight) @ weight + bias for x in found)
            yield from self._kept(name, made, sum(map(len, found))) if self.keeps else made
            return
        for flow in self.network.stream((name,), self.data, whole=False):
            yield from (z for _, z in flow.calls[name])

    def _inputs_now(self, name: str, compressed: Mapping[str, Compressed]) -> Iterator[Tensor]:
        """A layer's inputs behind the compressed layers."""
        found = self._standing(name, compressed)
        if found is not None:
            yield from found
            return
        now = {}
        for key, value in compressed.items():
            like = self.network.weight(key)
            now[key] = Fit(Dense(value.weight.to(like)), Bias(value.bias.to(like)))
        for flow in self.network.with_fits(now, None).stream((name,), self.data, whole=False):
            for x, _ in flow.calls[name]:
                yield x

    def _standing(self, name: str, compressed: Mapping[str, Compressed]) -> list[Tensor] | None:
        """A layer's inputs where all batches can be held at once, so that what lies before is not run again."""
        if not self.together:
            return None
        known = self._locksteps.get(bool(compressed))
        if known is None or not known.reaches(name, compressed):
            if known is not None:
                known.close()
            known = self._locksteps[bool(compressed)] = in_lockstep(self.network, self.data)
        found = known.inputs(name, compressed)
        if found is None:
            self.rest()
            self.together = False
        return found

    def rest(self) -> None:
        """Let go of the batches that are on their way through the network."""
        for lockstep in self._locksteps.values():
            lockstep.close()
        self._locksteps.clear()

    def _entry(self, name: str, compressed: Mapping[str, Compressed]) -> str | None:
        """The first layer from which a plain chain leads over all compressed layers to this one, its inputs kept."""
        for first in self.network.order:
            chain = self.network.chain(first)
            steps = [] if chain is None else [step.name for step in chain.steps]
            if name not in (first, *steps):
                continue
            reached = {first, *steps} & set(self.network.order)
            earlier = set(self.network.order[: self.network.order.index(first)])
            if (
                chain is None
                or earlier & set(compressed)
                or not set(compressed) <= reached
                or not chain.is_plain(self.network.weight)
            ):
                continue
            if first not in self._inputs:
                self._inputs[first] = self._keep(first)
            if self._inputs[first] is not None:
                return first
        return None

    def _keep(self, first: str) -> list[Tensor] | None:
        """A layer's inputs, batch by batch; None where they would take too much memory."""
        kept, size = [], sum(x.nbytes for parts in self._inputs.values() for x in parts or ())
        for flow in self.network.stream((first,), self.data, whole=False):
            for x, _ in flow.calls[first]:
                size += x.nbytes
                if size > bound() // 2:
                    return None
                kept.append(x.cpu().clone())
        return kept

    def _along(self, first: str, x: Tensor, name: str, compressed: Mapping[str, Compressed]) -> Tensor:
        """A layer's input, from the inputs of the first layer of its chain."""
        chain = self.network.chain(first)
        assert chain is not None
        layer = first
        for step in chain.steps:
            if layer == name:
                break
            x = ACTIVATIONS[step.activation](self._passed(x, layer, compressed.get(layer)))
            layer = step.name or ""
        return x

    def _passed(self, x: Tensor, name: str, compressed: Compressed | None = None) -> Tensor:
        """A layer's pre-activation."""
        now = compressed or self.original(name)
        form, bias = now.form, now.bias.to(x)
        if form.multiplications >= form.shape[0] * form.shape[1]:
            return torch.addmm(bias, x, now.weight.to(x))
        made_of = next(iter(form.matrices().values()))  # factors have a dtype of their own
        return express(form, self.network.operator(name), x.to(made_of)).to(x) + bias
