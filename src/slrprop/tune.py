"""Distillation: a short fine-tuning of a plan's factors on the original network's outputs; labels are not needed.

The student's outputs come near to the teacher's in Kullback-Leibler divergence at a temperature (Hinton, Vinyals, Dean,
2015). Forms in few bits are rounded in every step, and the gradient passes the rounding as if it were not there; their
scales learn too (Esser et al., learned step size quantization, ICLR 2020). Samples are mixed (mixup, Zhang et al., ICLR 2018):
the original answers between the samples too, and says more there than where it was trained to be certain. The mixtures come
again after a few epochs, so that the original, which is much slower than the plan, answers each of them once.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slrprop.checks import Count, Positive, Seed, hold
from slrprop.data import Batch, Data, open_data
from slrprop.errors import SlrpropError
from slrprop.fit.quantize import LARGEST, SMALLEST, bias_in_few_bits
from slrprop.forms import Bias, Fit, Form, Quantized
from slrprop.forms.quantized import CODES
from slrprop.losses import rows_of
from slrprop.network import Network, OnnxNetwork, TorchNetwork, folded, open_network
from slrprop.network.chain import ACTIVATIONS, Step
from slrprop.network.onnx.gradients import Behind, foreign_nodes
from slrprop.network.torch.find import evaluating
from slrprop.network.torch.modules import keep_factored
from slrprop.network.torch.network import main_output, swapped
from slrprop.operators import MatMul, Operator
from slrprop.plan import LayerPlan, Plan
from slrprop.progress import Progress

HELD_OUT = 0.1  # of the data, to choose the epoch by
LEAST_HELD_OUT = 1000  # few are mixed with one another again and again
EPOCHS, LEAST_STEPS = 40, 1000
MIXTURES, LEAST_MIXED = 4, 2**15  # of all samples, then they come again; more of them where samples are few
KEPT = 2**30  # bytes of the original's answers; where they would take more it answers anew in every step
RATES = 1.0, 0.1  # of the learning rate, one after the other
Inputs = dict[Any, Tensor]  # by position or name, samples first
Forward = Callable[[Inputs], Tensor]
LEAST = 10  # samples, of which one is held out


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How factors are fine-tuned.

    Args:
        epochs: passes over the data, the best of which by the held-out divergence is kept (0 is the start); None: 40, and where
            samples are few and mixed as many as make 1 000 steps.
        learning_rate: of Adam in the first half of the epochs, decaying to zero by a cosine; the other half begins at the best so
            far with a tenth of it, which is what a plan needs that is good from the start.
        batch: samples per step.
        temperature: of the softmax of both networks.
        mixup: whether a half of the samples, on average, are mixed with another one, in shares drawn evenly, in the steps and those
            held out; inputs of whole numbers never are.
        seed: of the order of the samples and of the mixtures.
    """

    epochs: Count | None = None
    learning_rate: Positive = 3e-3
    batch: Count = 256
    temperature: Positive = 2.0
    mixup: bool = True
    seed: Seed = 0

    def __post_init__(self) -> None:
        hold(self)


def _at(inputs: Inputs, places: Tensor | slice) -> Inputs:
    return {key: x[places] for key, x in inputs.items()}


def _parts(inputs: Inputs, most: int) -> Iterator[Inputs]:
    """The samples, so many at a time."""
    for start in range(0, len(next(iter(inputs.values()))), most):
        yield _at(inputs, slice(start, start + most))


def trained(
    student: Forward, teacher: Forward, inputs: Inputs, layers: nn.ModuleList, chosen: TuneSettings, quiet: bool, most: int,
    real_valued: Callable[[Tensor], bool],
) -> dict[str, float]:  # fmt: skip
    """Train the layers in place; what was reached."""
    count = len(next(iter(inputs.values())))
    held = int(count * HELD_OUT)
    random = torch.Generator().manual_seed(chosen.seed)
    order = torch.randperm(count, generator=random)
    aside, rest = order[:held], order[held:]
    mixing = chosen.mixup and all(x.is_floating_point() for x in inputs.values())

    def mixtures(places: Tensor, ways: int) -> tuple[Tensor, Tensor]:
        """So many partners and shares of theirs for each of these samples (ways x p)."""
        partners = torch.stack([places[torch.randperm(len(places), generator=random)] for _ in range(ways)])
        shares = torch.rand(partners.shape, generator=random)
        return partners, shares * (torch.rand(partners.shape, generator=random) < 0.5)

    def mixed(places: Tensor, partners: Tensor, shares: Tensor) -> Inputs:
        found = _at(inputs, places)
        if not mixing:
            return found
        others = _at(inputs, partners)
        return {key: x.lerp(others[key], shares.to(x).reshape(-1, *[1] * (x.ndim - 1))) for key, x in found.items()}

    def answers(run: Forward, x: Inputs) -> Tensor:
        with torch.no_grad():
            return torch.cat([rows_of(run(part)) for part in _parts(x, min(most, 1024))])

    ways = -(-LEAST_HELD_OUT // held) if mixing else 1
    held_parts = [mixed(aside, *way) for way in zip(*mixtures(aside, ways), strict=True)]
    held_inputs = {key: torch.cat([part[key] for part in held_parts]) for key in inputs}
    wanted = answers(teacher, held_inputs)
    numbers = real_valued(wanted[:1])

    def held_out() -> float:
        return float(distance(answers(student, held_inputs), wanted, 1.0, numbers))

    best = before = held_out()
    kept, reached, epoch = copy.deepcopy(layers.state_dict()), 0, 0
    an_epoch = -(-len(rest) // chosen.batch)
    epochs = chosen.epochs or max(EPOCHS, -(-LEAST_STEPS // an_epoch) if mixing else 0)
    ways = min(max(MIXTURES, -(-LEAST_MIXED // len(rest))), epochs) if mixing else 1
    partners, shares = mixtures(rest, ways)
    known = _kept(teacher, held_inputs, wanted, ways, len(rest))
    with Progress(total=epochs * an_epoch, desc="tuning", unit="step", disable=quiet) as bar:
        for rate, passes in zip(RATES, (epochs - epochs // 2, epochs // 2), strict=True):
            layers.load_state_dict(kept)
            optimizer = torch.optim.Adam(layers.parameters(), rate * chosen.learning_rate, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, passes * an_epoch))
            for done in range(1, passes + 1):
                way = epoch % ways
                for places in torch.randperm(len(rest), generator=random).split(chosen.batch):
                    x = mixed(rest[places], partners[way, places], shares[way, places])
                    if known is not None and epoch >= ways:
                        target = known[way, places].flatten(0, 1)
                    else:
                        target = answers(teacher, x)
                        if known is not None:
                            known[way, places] = target.reshape(len(places), *known.shape[2:])
                    optimizer.zero_grad()
                    apart = most if len(target) % len(places) == 0 else len(places)
                    for part, goal in zip(
                        _parts(x, apart), target.split(apart * len(target) // len(places)), strict=True
                    ):
                        loss = distance(rows_of(student(part)), goal, chosen.temperature, numbers)
                        (loss * (len(goal) / len(target))).backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
                epoch += 1
                if done % max(1, epochs // EPOCHS) and done < passes:
                    continue  # so many held-out samples would take longer than the few that it learns from
                found = held_out()
                if found < best:
                    best, kept, reached = found, copy.deepcopy(layers.state_dict()), epoch
    layers.load_state_dict(kept)
    return {"tuned_epochs": float(reached), "divergence_before": before, "divergence_after": best}


def _kept(teacher: Forward, x: Inputs, wanted: Tensor, ways: int, count: int) -> Tensor | None:
    """Room for the original's answers to ``count`` samples in so many ways; None where it takes too much, or an output is of no sample of its own.

    Args:
        x, wanted: some samples and the rows that it answers (:func:`slrprop.losses.rows_of`).
    """
    samples = len(next(iter(x.values())))
    each = wanted.numel() * wanted.element_size() // samples
    probe = _at(x, slice(7))
    with torch.no_grad():
        by_sample = len(teacher(probe)) == min(7, samples)
    if not by_sample or ways * count * each > KEPT:
        return None
    return wanted.new_empty(ways, count, len(wanted) // samples, wanted.shape[1])


def distance(outputs: Tensor, wanted: Tensor, temperature: float, real_valued: bool = False) -> Tensor:
    """Mean divergence of outputs (p x c) from the wanted ones; the mean squared distance of real-valued or single ones."""
    if real_valued or outputs.shape[1] < 2:
        return (outputs - wanted).square().mean()
    log_q, log_p = (wanted / temperature).log_softmax(-1), (outputs / temperature).log_softmax(-1)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


class Tunable(nn.Module):
    """A planned layer whose numbers learn; what is stored in few bits is rounded on the way.

    Args:
        bias: the original's.
        dtype: to learn in; inputs of another one are cast, and outputs cast back.
    """

    def __init__(
        self,
        layer: LayerPlan,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
        operator: Operator | None = None,
    ) -> None:
        super().__init__()
        assert layer.fit is not None
        form, start = layer.fit.form, layer.fit.over(bias).bias
        self.layer, self.dtype, self.operator = layer, dtype, operator or MatMul()
        self.bits = form.bits if isinstance(form, Quantized) else 32
        self.few = start is not None and start.scale is not None  # whether the bias is rounded too
        plain = form.plain() if isinstance(form, Quantized) else form
        self.form = plain
        self.register_forward_pre_hook(keep_factored)
        self.axes = plain.scale_axes()
        self.numbers = nn.ParameterDict(
            {name: nn.Parameter(matrix.detach().to(dtype, copy=True)) for name, matrix in plain.matrices().items()}
        )
        scales = form.scales if isinstance(form, Quantized) else {}
        self.scales = nn.ParameterDict({name: nn.Parameter(scale.to(dtype).log()) for name, scale in scales.items()})
        like = next(iter(self.numbers.values()))
        self.bias = None if start is None else nn.Parameter(start.value.detach().to(like, copy=True))

    @property
    def weight(self) -> Tensor:
        """The weight as torch stores it, for code that reads it."""
        return self.operator.stored(self.now().dense())

    def _codes(self, name: str) -> tuple[Tensor, Tensor]:
        """A matrix's whole numbers and their scales, as differentiable as if nothing were rounded."""
        scale, matrix, (low, high) = self.scales[name].exp(), self.numbers[name], CODES[self.bits]
        scale = scale + (_stored(scale).to(scale) - scale).detach()
        scale = scale if matrix.ndim == 1 else scale.unsqueeze(self.axes[name])
        ratio = matrix / scale
        return (ratio + (ratio.round() - ratio).detach()).clamp(low, high), scale

    def now(self) -> Form:
        """The factors at this step, rounded where they will be; differentiable."""
        if self.bits == 32:
            return self.form.with_matrices(dict(self.numbers.items()))
        made = {name: self._codes(name) for name in self.numbers}
        return self.form.with_matrices({name: codes * scale for name, (codes, scale) in made.items()})

    def _bias(self) -> Tensor | None:
        """The bias, rounded where it will be."""
        if self.bias is None or not self.few or not self.bias.abs().max() < LARGEST:  # too long steps
            return self.bias
        return self.bias + (bias_in_few_bits(self.bias.detach()).value.to(self.bias) - self.bias).detach()

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():  # numbers of rows
            return self.operator.compute(self.now(), None, x).to(next(iter(self.form.matrices().values())).dtype)
        return self.operator.compute(self.now(), self._bias(), x.to(self.dtype)).to(x.dtype)

    def finished(self) -> LayerPlan:
        """The layer's plan with the tuned factors."""
        self.cpu()
        with torch.no_grad():
            like = self.form.matrices()
            value = None if self.bias is None else self.bias.detach().to(next(iter(like.values())).dtype, copy=True)
            bias = None if value is None else bias_in_few_bits(value) if self.few else Bias(value)
            if self.bits == 32:
                form: Form = self.form.with_matrices(
                    {name: matrix.detach().to(like[name].dtype, copy=True) for name, matrix in self.numbers.items()}
                )
            else:
                codes = {name: self._codes(name)[0].round().float() for name in self.numbers}
                scales = {name: _stored(scale.exp()) for name, scale in self.scales.items()}
                form = Quantized(self.form.with_matrices(codes), scales, self.bits)
            return replace(self.layer, fit=Fit(form, bias)).sealed()


def _stored(scale: Tensor) -> Tensor:
    """A scale as it is stored."""
    return scale.detach().clamp(SMALLEST, LARGEST).half()


def tune(model: Any, data: Any, plan: Plan, settings: TuneSettings | None = None) -> Plan:
    """:func:`distilled` for a torch module or the path of an ONNX file, on anything that :class:`slrprop.data.Data` takes."""
    if not isinstance(plan, Plan):
        raise SlrpropError(f"tune takes a plan that slrprop.plan made, got {type(plan).__name__}")
    opened = open_data(data)
    return distilled(open_network(folded(model, plan.folded), opened), opened, plan, settings)


def distilled(
    network: Network, data: Data, plan: Plan, settings: TuneSettings | None = None, quiet: bool = False
) -> Plan:
    """A plan whose factors were tuned on the original network's outputs.

    Where a chain of dense layers and activations leads from the first planned layer to the output, only that chain is run.

    Args:
        network: the original.
        data: inputs; a tenth is held out to stop by. Labels are ignored.
        plan: with its factors in memory.

    Raises:
        SlrpropError: the plan treats no layer; an ONNX network has no such chain; too few samples.
    """
    chosen = settings or TuneSettings()
    if not plan.layers or any(layer.fit is None for layer in plan.layers):
        raise SlrpropError("there is nothing to tune: the plan treats no layer, or was read without its factors")
    names = [layer.name for layer in plan.layers]
    layers = {}
    for layer in plan.layers:
        weight = network.weight(layer.name)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        layers[layer.name] = Tunable(layer, network.bias(layer.name), dtype, network.operator(layer.name)).to(
            weight.device
        )
    entry = require_tunable(network, data, names)
    most = network.at_once or chosen.batch  # samples that a step runs together
    if entry is not None:
        inputs = {entry: torch.cat([x for flow in network.stream((entry,), data) for x, _ in flow.calls[entry]])}
        student, teacher, most = _along(network, entry, layers), _along(network, entry, {}), chosen.batch
    else:
        inputs, like = _whole_inputs(network, data), next(iter(data))
        if isinstance(network, TorchNetwork):
            with evaluating(network.model):  # the copy stays in that mode
                copied = swapped(network.model, dict(layers))
            student = _whole(network, _called(network, copied, like), like)
            teacher = evaluating(network.model)(_whole(network, _called(network, network.model, like), like))
        else:
            assert isinstance(network, OnnxNetwork)
            student, teacher = (
                _whole(network, _run(network, chosen_layers, like), like) for chosen_layers in (layers, {})
            )
    targets = network.numbered(next(iter(data)).targets)
    notes = trained(
        student, teacher, inputs, nn.ModuleList(layers.values()), chosen, quiet, most,
        lambda outputs: network.real_valued(targets, outputs),
    )  # fmt: skip
    done = [layers[layer.name].finished() for layer in plan.layers]
    return replace(plan, layers=tuple(replace(layer, notes=layer.notes | notes) for layer in done), sha256="")


def require_tunable(network: Network, data: Data, names: Sequence[str]) -> str | None:
    """Refuse to tune layers where that can't be done; the first of them, if a chain leads from it over all others to the output."""
    entry = _entry(network, names)
    if entry is None and isinstance(network, OnnxNetwork) and (foreign := foreign_nodes(network.graph)):
        reached = next((names[i:] for i in range(1, len(names)) if _entry(network, names[i:])), ())
        raise SlrpropError(
            f"tuning needs the gradients of all nodes, and this ONNX graph has some without ({', '.join(foreign)}); "
            + (f"name the layers that only dense ones follow ({', '.join(reached)}), " if reached else "")
            + "tune the torch module, or use the calibrated level"
        )
    rows: Iterable[int] = (batch.samples for batch in data)
    if entry is not None:
        rows = (len(x) for flow in network.stream((entry,), data, whole=False) for x, _ in flow.calls[entry])
    count = 0
    for count in itertools.accumulate(rows):
        if count >= LEAST:
            return entry
    raise SlrpropError(
        f"tuning needs {LEAST} samples or more (compress tunes on a third of the data), got {count}; give more data"
    )


def _entry(network: Network, names: Sequence[str]) -> str | None:
    """The first planned layer, if a chain leads from it over all others to the output."""
    first = next(name for name in network.order if name in names)
    chain = network.chain(first)
    reached = {first} if chain is None else {first, *(step.name for step in chain.steps)}
    return first if chain is not None and chain.is_plain(network.weight) and set(names) <= reached else None


def _along(network: Network, first: str, layers: Mapping[str, Tunable]) -> Forward:
    """The network from the inputs of a layer on, with these layers in place of the original ones."""
    chain = network.chain(first)
    assert chain is not None
    bias = network.bias(first)
    weight = network.weight(first)
    like = chain.scale
    start = Step("identity", weight.to(like), like.new_zeros(len(like)) if bias is None else bias.to(like), first)

    def run(inputs: Inputs) -> Tensor:
        x = inputs[first].to(like)
        for step in (start, *chain.steps):
            layer = layers.get(step.name or "")
            x = step(x) if layer is None else layer(ACTIVATIONS[step.activation](x))
        return x

    return run


def _whole(network: Network, run: Callable[[Inputs], Tensor], like: Batch) -> Forward:
    """The scores, classes last, of what gives a main output for inputs whose samples stand where the batch's do."""
    axes, place = like.axes, network.place(like)

    def scores(inputs: Inputs) -> Tensor:
        placed = {key: x.movedim(0, axes.get(key, 0)) for key, x in inputs.items()}
        return network.classes_last(network.scores(run(placed)).movedim(place, 0))

    return scores


def _called(network: TorchNetwork, model: nn.Module, like: Batch) -> Callable[[Inputs], Tensor]:
    def run(inputs: Inputs) -> Tensor:
        named = {key: x for key, x in inputs.items() if key in like.named}
        return main_output(model(*(x for key, x in inputs.items() if key not in named), **named))

    return run


def _run(network: OnnxNetwork, layers: Mapping[str, Tunable], like: Batch) -> Callable[[Inputs], Tensor]:
    """An ONNX graph by torch operations, with these layers in the place of their nodes."""
    graph, names = network.graph, list(network.feed(like.take(slice(1))))
    whole = Behind(graph, {name: name for name in names})
    places = {graph.layers[name]: layer for name, layer in layers.items()}
    free = [name for name in names if name not in like.named]

    def run(inputs: Inputs) -> Tensor:
        given = {str(key) if key in like.named else free[key]: x for key, x in inputs.items()}
        return whole.forward(given, places)

    return run


def _whole_inputs(network: Network, data: Data) -> Inputs:
    """The inputs of all batches, their samples on the first axis."""
    parts = [{key: x.movedim(batch.axes.get(key, 0), 0) for key, x in batch.values().items()} for batch in data]
    if any(not isinstance(x, Tensor) for x in parts[0].values()):
        raise SlrpropError("tuning takes numbers, and an input of the data holds text; use the calibrated level")
    device = network.device if isinstance(network, TorchNetwork) else "cpu"
    return {key: torch.cat([part[key] for part in parts]).to(device) for key in parts[0]}
